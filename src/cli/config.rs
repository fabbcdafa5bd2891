//! `settled config`: which settings count, and where each comes from.

use clap::Subcommand;
use serde::Serialize;
use serde_json::Value;

use super::{Exit, Failure, Global, output::Output};
use crate::config::{Origin, Settings, Told};

#[derive(Subcommand)]
pub(super) enum ConfigCommand {
    /// Every setting as it counts, and who says so; passwords are left out
    Show,
}

/// A setting with the name of whoever has the word.
#[derive(Serialize)]
struct Setting<'a> {
    #[serde(flatten)]
    told: &'a Told,
    /// The flag, where it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    flag: Option<&'static str>,
}

/// Asks nobody: neither database nor broker must be there.
pub(super) fn run(global: &Global, out: &Output, command: ConfigCommand) -> Result<Exit, Failure> {
    let ConfigCommand::Show = command;
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
