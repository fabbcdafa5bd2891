//! What a person or a program reads. A reader that goes away (`| head`) ends the talk, not the program.

use std::{
    fmt::Display,
    io::{ErrorKind, IsTerminal, Write},
    sync::atomic::{AtomicBool, Ordering},
};

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, LineStyle, Table, TableStyle};
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
    /// Columns that a line of a table may have. None: as many as it takes.
    width: Option<u16>,
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
            width: width(terminal),
            closed: AtomicBool::new(false),
        }
    }

    /// The same with tables as wide as their content.
    #[must_use]
    pub(super) fn wide(self, wide: bool) -> Self {
        Self {
            width: if wide { None } else { self.width },
            ..self
        }
    }

    /// Whether nobody reads any more.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Writes text as it is.
    pub(super) fn write(&self, text: &str) -> Result<(), Failure> {
        self.bytes(text.as_bytes())
    }

    /// Writes what need not be text.
    pub(super) fn bytes(&self, bytes: &[u8]) -> Result<(), Failure> {
        if self.is_closed() {
            return Ok(());
        }
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
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
        self.line(draw(header, rows, None, self.width).trim_fmt())
    }

    /// The same, with numbers in the last column.
    pub(super) fn numbers(&self, header: &[&str], rows: Vec<Vec<String>>, none: &str) -> Result<(), Failure> {
        if rows.is_empty() {
            return self.line(none);
        }
        self.line(draw(header, rows, header.len().checked_sub(1), self.width).trim_fmt())
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

/// How wide this terminal is; of what is no terminal, what COLUMNS says, if anybody set it.
fn width(terminal: bool) -> Option<u16> {
    let measured = || console::Term::stdout().size_checked().map(|(_, columns)| columns);
    let said = || std::env::var("COLUMNS").ok()?.trim().parse().ok();
    let columns: Option<u16> = if terminal { measured().or_else(said) } else { said() };
    columns.filter(|columns| *columns >= WIDTH_MIN)
}

/// A table that is narrower than this is not read more easily.
const WIDTH_MIN: u16 = 20;
/// What is one word, such as an id or a time, is not broken if it is no longer than this ...
const WORD_MAX: u16 = 40;
/// ... and each other column keeps this much.
const TEXT_MIN: u16 = 10;

/// Names, a rule below them, and one line a row; more lines where the table would be wider than it may be.
fn draw(header: &[&str], rows: Vec<Vec<String>>, numbers: Option<usize>, width: Option<u16>) -> Table {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| plain(cell)).collect())
        .collect();
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─')));
    table.set_header(header.iter().copied());
    for row in &rows {
        table.add_row(row.iter());
    }
    if let Some(column) = numbers.and_then(|column| table.column_mut(column)) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let Some(width) = width else {
        return table;
    };
    // A space on both sides of each, and one between them.
    let natural: Vec<u16> = table
        .column_max_content_widths()
        .into_iter()
        .map(|column| column.saturating_add(2))
        .collect();
    let between = u32::try_from(natural.len().saturating_sub(1)).unwrap_or(u32::MAX);
    let fits = |widths: &[u16]| widths.iter().copied().map(u32::from).sum::<u32>() + between <= u32::from(width);
    if fits(&natural) {
        return table;
    }
    let is_word = |column: usize| {
        natural.get(column).is_some_and(|natural| *natural <= WORD_MAX + 2)
            && rows
                .iter()
                .all(|row| row.get(column).is_none_or(|cell| !cell.contains(char::is_whitespace)))
    };
    let needed: Vec<u16> = natural
        .iter()
        .enumerate()
        .map(|(column, natural)| {
            if is_word(column) {
                *natural
            } else {
                (*natural).min(TEXT_MIN)
            }
        })
        .collect();
    if !fits(&needed) {
        return one_below_the_other(header, &rows, width);
    }
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(width);
    for column in (0..needed.len()).filter(|column| is_word(*column)) {
        if let Some(column) = table.column_mut(column) {
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
    }
    table
}

/// A block a row, where side by side an id, a time or a name would be broken: whoever reads it wants to copy them.
fn one_below_the_other(header: &[&str], rows: &[Vec<String>], width: u16) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new());
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(width);
    for (index, row) in rows.iter().enumerate() {
        if index > 0 {
            table.add_row(["", ""]);
        }
        for (name, cell) in header.iter().zip(row) {
            table.add_row([*name, cell.as_str()]);
        }
    }
    if let Some(column) = table.column_mut(0) {
        column.set_constraint(ColumnConstraint::ContentWidth);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(rows: &[[&str; 3]], width: Option<u16>) -> Vec<String> {
        let rows = rows
            .iter()
            .map(|row| row.iter().map(|cell| (*cell).to_owned()).collect());
        let table = draw(&["id", "name", "number"], rows.collect(), Some(2), width);
        table.trim_fmt().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_table_is_no_wider_than_it_may_be() {
        const ID: &str = "3f2504e0-4f89-41d3-9a0c-0305e82c3301";
        let long = "a name that goes on and on, so that no terminal of eighty columns holds it with the others";
        let rows = [[ID, long, "12"], [ID, "東京 \u{202e}x", "1234567"]];
        let whole = drawn(&rows, None);
        assert_eq!(whole.len(), 4);
        assert!(whole[2].contains(long));
        for width in 60..=200 {
            let lines = drawn(&rows, Some(width));
            for line in &lines {
                let measured = console::measure_text_width(line);
                assert!(measured <= usize::from(width), "{width}: {measured} {line:?}");
            }
            // What is one word stays one.
            assert_eq!(lines.iter().filter(|line| line.contains(ID)).count(), 2, "{width}");
            assert!(lines.iter().any(|line| line.ends_with("1234567")), "{width}: {lines:?}");
            let words: String = lines.join(" ");
            assert!(
                words.contains("eighty") && words.contains("others") && !words.contains('\u{202e}'),
                "{words}"
            );
        }
        // Narrower than its words it breaks them, and loses nothing.
        for width in [20, 30, 40] {
            let lines = drawn(&rows, Some(width));
            assert!(
                lines
                    .iter()
                    .all(|line| console::measure_text_width(line) <= usize::from(width)),
                "{lines:?}"
            );
        }
        assert_eq!(drawn(&rows, Some(500)), whole);
        assert_eq!(drawn(&[["a", "b", "1"]], Some(20)).len(), 3);
    }
}
