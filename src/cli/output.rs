//! What a person or a program reads. A reader that goes away (`| head`) ends the talk, not the program.

use std::{
    fmt::Display,
    io::{ErrorKind, IsTerminal, Write},
    sync::atomic::{AtomicBool, Ordering},
};

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use serde::Serialize;

use super::Failure;

/// Stdout, in the form that was asked for.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) json: bool,
    colour: bool,
    /// The reader went away.
    closed: AtomicBool,
}

/// What a line in colour says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mood {
    Good,
    Bad,
    Dim,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        // https://no-color.org
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            json,
            colour: !json && !unwanted && std::io::stdout().is_terminal(),
            closed: AtomicBool::new(false),
        }
    }

    /// Whether nobody reads any more.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Writes text as it is.
    pub(super) fn write(&self, text: &str) -> Result<(), Failure> {
        if self.is_closed() {
            return Ok(());
        }
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => Err(Failure::ours(format!(
                "the answer could not be written to stdout: {error}"
            ))),
        }
    }

    /// A line for people.
    pub(super) fn line(&self, text: impl Display) -> Result<(), Failure> {
        self.write(&format!("{text}\n"))
    }

    /// One JSON document on one line.
    pub(super) fn document(&self, value: &impl Serialize) -> Result<(), Failure> {
        let text =
            serde_json::to_string(value).map_err(|error| Failure::ours(format!("the answer is no JSON: {error}")))?;
        self.line(text)
    }

    /// One JSON document for programs, or what `human` says for people.
    pub(super) fn say(
        &self,
        value: &impl Serialize,
        human: impl FnOnce(&Self) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        if self.json { self.document(value) } else { human(self) }
    }

    /// A table for people; a line instead where there is nothing to show.
    pub(super) fn table(&self, header: &[&str], rows: Vec<Vec<String>>, none: &str) -> Result<(), Failure> {
        if rows.is_empty() {
            return self.line(none);
        }
        self.line(draw(header, rows).trim_fmt())
    }

    /// The same, with numbers in the last column.
    pub(super) fn numbers(&self, header: &[&str], rows: Vec<Vec<String>>, none: &str) -> Result<(), Failure> {
        if rows.is_empty() {
            return self.line(none);
        }
        let mut table = draw(header, rows);
        if let Some(column) = header.len().checked_sub(1).and_then(|last| table.column_mut(last)) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        self.line(table.trim_fmt())
    }

    /// Text in colour, on a terminal.
    pub(super) fn coloured(&self, mood: Mood, text: &str) -> String {
        if !self.colour {
            return text.to_owned();
        }
        let code = match mood {
            Mood::Good => "32",
            Mood::Bad => "1;31",
            Mood::Dim => "2",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// Names, a rule below them, and one line a row.
fn draw(header: &[&str], rows: Vec<Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─')));
    table.set_header(header.iter().copied());
    for row in rows {
        table.add_row(row.iter().map(|cell| plain(cell)).collect::<Vec<_>>());
    }
    table
}

/// A line on stderr. Nobody is left to tell if that fails.
pub(super) fn complain(text: &str) {
    let mut stderr = std::io::stderr().lock();
    drop(writeln!(stderr, "{text}"));
}

/// Text from outside, fit for a terminal: what would move the cursor or change colours is shown escaped.
pub(super) fn plain(text: &str) -> String {
    text.chars()
        .flat_map(|letter| {
            let harmful = letter.is_control() || matches!(letter, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            let escaped = harmful.then(|| letter.escape_default());
            let same = (!harmful).then_some(letter);
            escaped.into_iter().flatten().chain(same)
        })
        .collect()
}

/// `yes` or `no`.
pub(super) fn yes_no(truth: bool) -> String {
    if truth { "yes" } else { "no" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_outside_can_not_steer_a_terminal() {
        assert_eq!(plain("café 東京"), "café 東京");
        assert_eq!(plain("a\x1b[31mb\nc\u{202e}d"), "a\\u{1b}[31mb\\nc\\u{202e}d");
    }
}
