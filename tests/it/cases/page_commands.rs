//! README and the pages in docs/ name only commands, flags and exit codes that exist, and each stands on a page.

use std::collections::{BTreeMap, BTreeSet};

use clap::CommandFactory;
use settled::cli::Cli;

use super::pages::{code, everything, lines, none, pages, read, spans, words};

/// A command with everything below it, by path: `dead-letters runs list`. With the flags of each.
fn commands() -> BTreeMap<String, BTreeSet<String>> {
    fn add(command: &clap::Command, path: &str, found: &mut BTreeMap<String, BTreeSet<String>>) {
        let flags = command
            .get_arguments()
            .filter_map(clap::Arg::get_long)
            .map(|flag| format!("--{flag}"));
        found.insert(path.to_owned(), flags.collect());
        for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
            add(inner, format!("{path} {}", inner.get_name()).trim_start(), found);
        }
    }
    let mut cli = Cli::command();
    // Makes the flags of every command known to those below it.
    cli.build();
    let mut found = BTreeMap::new();
    add(&cli, "", &mut found);
    found
}

/// What somebody types after `settled`: the command, and its flags.
fn typed(text: &str, commands: &BTreeMap<String, BTreeSet<String>>) -> Result<(String, Vec<String>), String> {
    let mut path = String::new();
    let mut flags = Vec::new();
    let mut in_path = true;
    for word in text.split_whitespace() {
        if word == "help" && path.is_empty() {
            return Ok((String::new(), Vec::new()));
        }
        if let Some(flag) = word.strip_prefix("--") {
            in_path = false;
            let name = flag.split(['=', ']', ',']).next().unwrap_or_default();
            flags.push(format!("--{name}"));
        } else if ["|", "&&", ">", "<", "\\"].contains(&word) {
            break;
        } else if in_path {
            let longer = format!("{path} {word}");
            let longer = longer.trim_start();
            if commands.contains_key(longer) {
                path = longer.to_owned();
            } else {
                let has_inner = commands.keys().any(|known| known.starts_with(&format!("{path} ")));
                if path.is_empty() || has_inner {
                    return Err(format!("there is no `settled {longer}`"));
                }
                in_path = false;
            }
        }
    }
    Ok((path, flags))
}

/// What a page has one type: code spans that begin with `settled `, and lines of its blocks.
fn typed_lines(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut before = String::new();
    for (fence, line) in lines(text) {
        match fence {
            None => {
                // The second is what the id of a dead letter is hashed with.
                let typed = spans(line).filter(|code| code.starts_with("settled ") && *code != "settled dead letter 2");
                found.extend(typed.map(str::to_owned));
            }
            Some(_) => {
                let line = format!("{before}{}", line.trim().trim_start_matches("$ "));
                before.clear();
                if let Some(line) = line.strip_suffix('\\') {
                    before = line.to_owned();
                    continue;
                }
                let parts = line.split("&& ").flat_map(|part| part.split("| "));
                found.extend(
                    parts
                        .map(str::trim)
                        .filter(|part| part.starts_with("settled ") && fence == Some("console"))
                        .map(str::to_owned),
                );
            }
        }
    }
    found
}

#[test]
fn every_command_and_flag_named_exists() {
    let commands = commands();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (path, text) in pages() {
        for line in typed_lines(&text) {
            seen += 1;
            // `settled ledger balances`, `check` in a table: what is said of both.
            match typed(line.trim_start_matches("settled "), &commands) {
                Err(why) => wrong.push(format!("{path}: {why}")),
                Ok((command, flags)) => {
                    let known = &commands[&command];
                    for flag in flags.iter().filter(|flag| !known.contains(*flag) && *flag != "--help") {
                        wrong.push(format!("{path}: `settled {command}` has no {flag}"));
                    }
                }
            }
        }
        let all: BTreeSet<&String> = commands.values().flatten().collect();
        for flag in code(&text).into_iter().filter(|code| code.starts_with("--")) {
            let name = flag.split([' ', '=']).next().unwrap_or_default().to_owned();
            if !all.contains(&name) && name != "--features" {
                wrong.push(format!("{path}: no command has {name}"));
            }
        }
    }
    assert!(seen > 50, "the pages name commands: {seen}");
    none(wrong, "the pages name what is not there");
}

/// The commands that a page names, also those that a line names after others of their kind: `settled partner add`, `list`.
fn commands_named(commands: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for (_, text) in pages() {
        for line in typed_lines(&text) {
            if let Ok((command, _)) = typed(line.trim_start_matches("settled "), commands) {
                named.insert(command);
            }
        }
        for (_, line) in lines(&text).into_iter().filter(|(fence, _)| fence.is_none()) {
            let mut outer = String::new();
            for span in spans(line) {
                if let Some(rest) = span.strip_prefix("settled ") {
                    let path = typed(rest, commands).map(|(path, _)| path).unwrap_or_default();
                    outer = path
                        .rsplit_once(' ')
                        .map_or(String::new(), |(outer, _)| outer.to_owned());
                } else {
                    named.insert(format!("{outer} {span}").trim_start().to_owned());
                }
            }
        }
    }
    named
}

#[test]
fn every_command_and_flag_is_on_a_page() {
    let commands = commands();
    let named = commands_named(&commands);
    let text = everything();
    let mut missing = Vec::new();
    for (command, flags) in &commands {
        let is_leaf = !commands.keys().any(|other| other.starts_with(&format!("{command} ")));
        if is_leaf && !named.contains(command) {
            missing.push(format!("`settled {command}`"));
        }
        for flag in flags
            .iter()
            .filter(|flag| !["--help", "--version"].contains(&flag.as_str()))
        {
            if !words(&text, flag, |letter| letter.is_ascii_alphanumeric() || letter == '-').contains(flag) {
                missing.push(format!("{flag} of `settled {command}`"));
            }
        }
    }
    none(missing, "no page tells of");
}

#[test]
fn exit_codes_are_those_of_the_help() {
    let help = Cli::command()
        .get_after_help()
        .expect("it tells exit codes")
        .to_string();
    let numbers = |text: &str| -> BTreeSet<u8> {
        text.split(|letter: char| !letter.is_ascii_digit())
            .filter_map(|digits| digits.parse().ok())
            .collect()
    };
    let operators = read("docs/operators.md");
    let (_, table) = operators.split_once("| exit code | meaning |").expect("the table");
    let rows = table.lines().skip(2).take_while(|line| line.starts_with("| "));
    let told: BTreeSet<u8> = rows
        .filter_map(|row| row.trim_start_matches("| ").split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(told, numbers(&help), "{help}");
}

#[test]
fn the_reader_of_commands_reads_them() {
    let page = "`settled partner add`, `list`\n```console\n$ settled a && settled b \\\n    --c\nsettled d\n```\n";
    assert_eq!(typed_lines(page).len(), 4);
    let commands = commands();
    assert!(typed("partner ad", &commands).is_err());
    assert!(typed("no-such-command", &commands).is_err());
    let (command, flags) = typed("partner add --name 'A b' --own-queue", &commands).expect("a command");
    assert_eq!((command.as_str(), flags.len()), ("partner add", 2));
    assert!(commands["partner add"].contains("--own-queue") && commands["partner add"].contains("--json"));
}
