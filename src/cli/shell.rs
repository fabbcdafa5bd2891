//! `settled completions` and `settled man`: what shells and `man` know of the commands, made from their definition.

use std::{io, path::PathBuf};

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::Shell;

use super::{Cli, Exit, Failure, output::Output};

/// Completions for a shell, on stdout
#[derive(Args)]
#[command(after_help = "\
bash: settled completions bash > /etc/bash_completion.d/settled
zsh:  settled completions zsh > \"${fpath[1]}/_settled\"
fish: settled completions fish > ~/.config/fish/completions/settled.fish")]
pub(super) struct Completions {
    /// Which shell
    shell: ShellName,
}

/// The shells that there are completions for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ShellName {
    Bash,
    Elvish,
    Fish,
    #[value(name = "powershell")]
    PowerShell,
    Zsh,
}

/// The manual page of settled on stdout, or every page into a directory
#[derive(Args)]
#[command(after_help = "To read one: settled man | man -l -")]
pub(super) struct Man {
    /// Write settled.1 and a page for each command into this directory, which must exist
    #[arg(long, value_name = "DIRECTORY")]
    to: Option<PathBuf>,
}

pub(super) fn completions(out: &Output, wish: &Completions) -> Result<Exit, Failure> {
    let shell = match wish.shell {
        ShellName::Bash => Shell::Bash,
        ShellName::Elvish => Shell::Elvish,
        ShellName::Fish => Shell::Fish,
        ShellName::PowerShell => Shell::PowerShell,
        ShellName::Zsh => Shell::Zsh,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "settled", &mut script);
    out.write(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}

pub(super) fn man(out: &Output, wish: &Man) -> Result<Exit, Failure> {
    let mut command = Cli::command();
    command.build();
    let Some(directory) = &wish.to else {
        out.write(&page(command).map_err(unwritten)?)?;
        return Ok(Exit::Done);
    };
    let mut waiting = vec![("settled".to_owned(), command)];
    let mut written = 0_usize;
    while let Some((name, command)) = waiting.pop() {
        for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
            waiting.push((format!("{name}-{}", inner.get_name()), inner.clone()));
        }
        let path = directory.join(format!("{name}.1"));
        // A page's title is its file's name.
        let text = page(command.name(name)).map_err(unwritten)?;
        std::fs::write(&path, text).map_err(|error| {
            Failure::usage(format!("{} can not be written: {error}", path.display()))
                .hint("name a directory that exists and that you may write to")
        })?;
        written = written.saturating_add(1);
    }
    out.line(format!("{written} pages are in {}", directory.display()))?;
    Ok(Exit::Done)
}

fn page(command: clap::Command) -> io::Result<String> {
    let mut roff = Vec::new();
    clap_mangen::Man::new(command).render(&mut roff)?;
    Ok(String::from_utf8_lossy(&roff).into_owned())
}

fn unwritten(error: io::Error) -> Failure {
    Failure::ours(format!("the page could not be made: {error}"))
}
