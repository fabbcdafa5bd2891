//! What a person or a program reads. A reader that goes away (`| head`) ends the talk, not the program.

use std::{
    fmt::Display,
    io::{ErrorKind, IsTerminal, Write},
    sync::atomic::{AtomicBool, Ordering},
};

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use serde::Serialize;

use super::Failure;
pub(super) use crate::plain::plain;
use crate::plain::{coloured_lines, json_for_people, plain_lines};

/// Stdout, in the form that was asked for.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) json: bool,
    colour: bool,
    /// A person looks at it.
    terminal: bool,
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
        let terminal = std::io::stdout().is_terminal();
        Self {
            json,
            colour: !json && !unwanted && terminal,
            terminal,
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

    /// A line for people. What others wrote is escaped where it stands in it; this is for what was forgotten.
    pub(super) fn line(&self, text: impl Display) -> Result<(), Failure> {
        let text = format!("{text}\n");
        self.write(&if self.colour {
            coloured_lines(&text)
        } else {
            plain_lines(&text)
        })
    }

    /// Lines of JSON, each with its end. A program gets them as they are; on a terminal the same values are written so that
    /// none of them can steer it.
    pub(super) fn json_lines(&self, text: &str) -> Result<(), Failure> {
        if self.terminal {
            return self.write(&json_for_people(text));
        }
        self.write(text)
    }

    /// One JSON document on one line.
    pub(super) fn document(&self, value: &impl Serialize) -> Result<(), Failure> {
        let text =
            serde_json::to_string(value).map_err(|error| Failure::ours(format!("the answer is no JSON: {error}")))?;
        self.json_lines(&format!("{text}\n"))
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

/// Lines on stderr, fit for people. Nobody is left to tell if that fails.
pub(super) fn complain(text: &str) {
    let mut stderr = std::io::stderr().lock();
    drop(writeln!(stderr, "{}", coloured_lines(text)));
}

/// One JSON document on stderr, as [`Output::json_lines`] writes it on stdout.
pub(super) fn complain_in_json(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let shown = if stderr.is_terminal() {
        json_for_people(text)
    } else {
        text.to_owned()
    };
    drop(writeln!(stderr, "{shown}"));
}

/// `yes` or `no`.
pub(super) fn yes_no(truth: bool) -> String {
    if truth { "yes" } else { "no" }.to_owned()
}
