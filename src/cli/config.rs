//! `settled config`: which settings count and where each comes from, and what every setting is.

use clap::Subcommand;
use serde::Serialize;
use serde_json::Value;

use super::{Exit, Failure, Global, output::Output};
use crate::config::{self, Origin, Reference, Settings, ShownSetting};

#[derive(Subcommand)]
pub(super) enum ConfigCommand {
    /// Every setting as it counts, and who says so; passwords are left out
    Show,
    /// Every setting there is: default, type and bounds, and what it is for, as a page in Markdown
    Reference,
}

/// A setting with the name of whoever has the word.
#[derive(Serialize)]
struct Setting<'a> {
    #[serde(flatten)]
    told: &'a ShownSetting,
    /// The flag, where it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    flag: Option<&'static str>,
}

/// Asks nobody: neither database nor broker must be there.
pub(super) fn run(global: &Global, out: &Output, command: ConfigCommand) -> Result<Exit, Failure> {
    match command {
        ConfigCommand::Show => show(global, out),
        ConfigCommand::Reference => {
            let settings = config::reference()?;
            out.say(&settings, |out| out.write(&page(&settings)))?;
            Ok(Exit::Done)
        }
    }
}

fn show(global: &Global, out: &Output) -> Result<Exit, Failure> {
    let (_, told) = Settings::told(global.sources())?;
    let settings: Vec<Setting<'_>> = told
        .iter()
        .map(|told| Setting {
            told,
            flag: (told.from == Origin::Flag).then(|| global.flag_of(&told.setting)),
        })
        .collect();
    out.say(&settings, |out| {
        let rows = settings.iter().map(|Setting { told, flag }| {
            let value = match (&told.value, told.derived) {
                (value, Some(how)) => format!("{} ({how})", text(value)),
                (value, None) => text(value),
            };
            let from = match (&told.from, flag) {
                (_, Some(flag)) => format!("flag {flag}"),
                (from, None) => from.to_string(),
            };
            vec![told.setting.clone(), value, from]
        });
        out.table(&["setting", "value", "from"], rows.collect(), "")
    })?;
    Ok(Exit::Done)
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// What stands above the tables of `docs/settings.md`.
const HEAD: &str = "\
# Settings: every one, with its default and bounds

This page is what `settled config reference` prints; with `--json` it is a list for programs. What counts on a machine, and \
who said so, is shown by `settled config show`.

A setting comes, strongest first, from a flag (`--set worker.lanes=4`), from its variable in the environment, from the file \
named with `--config`, from the default. A key or variable that is none of these is refused, with the nearest one that there \
is. Durations are a number and a unit: `250ms`, `15s`, `1h 30m`.
";

/// Every setting as a page.
fn page(settings: &[Reference]) -> String {
    let mut page = HEAD.to_owned();
    let mut section = None;
    for Reference {
        setting,
        variable,
        kind,
        default,
        bounds,
        text,
    } in settings
    {
        let room = setting.split_once('.').map_or("", |(room, _)| room);
        if section != Some(room) {
            section = Some(room);
            let title = if room.is_empty() { "Without a section" } else { room };
            page.push_str(&format!(
                "\n## {title}\n\n| setting and variable | default | type and bounds | what it is |\n|---|---|---|---|\n"
            ));
        }
        let bounds = bounds.as_ref().map_or_else(String::new, |bounds| format!(", {bounds}"));
        let default = match default {
            Value::String(text) if text.is_empty() => "empty".to_owned(),
            Value::Array(items) if items.is_empty() => "empty".to_owned(),
            Value::String(text) => format!("`{text}`"),
            other => format!("`{other}`"),
        };
        page.push_str(&format!(
            "| `{setting}` `{variable}` | {default} | {kind}{bounds} | {} |\n",
            in_a_cell(text)
        ));
    }
    page.push_str("\nSee also: [operators.md](operators.md), [README](../README.md).\n");
    page
}

/// Text in a table of Markdown.
fn in_a_cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "\\<").replace('*', "\\*")
}
