//! Text from outside, fit for whoever looks at it: what moves a cursor, turns the direction of writing or can not be seen is
//! shown as an escape.

use std::{
    fmt,
    io::{self, Write},
};

use serde_json::Value;
use tracing_subscriber::fmt::MakeWriter;

/// Whether a character does something to the text around it instead of being seen.
pub(crate) fn is_hidden(letter: char) -> bool {
    letter.is_control()
        || matches!(
            letter,
            // Marks of direction, zero widths, line and paragraph separators, embeddings, joiners, isolates, deprecated
            // format characters, the byte-order mark, annotations, tags.
            '\u{61c}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

/// So many of something: `1 message`, `2 messages`.
pub(crate) fn counted<N: PartialEq + From<u8> + fmt::Display>(number: N, one: &str) -> String {
    let plural = if number == N::from(1) { "" } else { "s" };
    format!("{number} {one}{plural}")
}

/// An object as `name value, name value`.
pub(crate) fn brief(value: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Array(values) if values.iter().all(Value::is_string) => {
            let texts: Vec<&str> = values.iter().filter_map(Value::as_str).collect();
            texts.join("+")
        }
        other => other.to_string(),
    };
    value.as_object().map_or_else(String::new, |object| {
        let members: Vec<String> = object
            .iter()
            .map(|(name, value)| format!("{name} {}", text(value)))
            .collect();
        members.join(", ")
    })
}

/// One line, fit for a terminal.
pub(crate) fn plain(text: &str) -> String {
    escaped(text, |_, _| false)
}

/// The same of lines, with their ends.
pub(crate) fn plain_lines(text: &str) -> String {
    escaped(text, |letter, _| letter == '\n')
}

/// The same of lines in our own colours.
pub(crate) fn coloured_lines(text: &str) -> String {
    escaped(text, |letter, rest| {
        letter == '\n' || letter == '\x1b' && is_colour(rest)
    })
}

/// `[`, digits and `;`, `m`: what sets a colour and can do no more.
fn is_colour(rest: &str) -> bool {
    rest.strip_prefix('[')
        .and_then(|rest| rest.split_once('m'))
        .is_some_and(|(code, _)| code.len() <= 8 && code.bytes().all(|byte| byte.is_ascii_digit() || byte == b';'))
}

fn escaped(text: &str, stays: impl Fn(char, &str) -> bool) -> String {
    let mut shown = String::with_capacity(text.len());
    for (at, letter) in text.char_indices() {
        let rest = text.get(at + letter.len_utf8()..).unwrap_or_default();
        if is_hidden(letter) && !stays(letter, rest) {
            shown.extend(letter.escape_default());
        } else {
            shown.push(letter);
        }
    }
    shown
}

/// JSON that a person looks at: the same document, with such characters written as JSON's own escapes. Outside of strings
/// there are none but the ends of lines.
pub(crate) fn json_for_people(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        if is_hidden(letter) && letter != '\n' {
            for unit in letter.encode_utf16(&mut [0; 2]) {
                shown.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            shown.push(letter);
        }
    }
    shown
}

/// Where a log goes that a person looks at. Each event is one write.
pub(crate) struct ForPeople<W> {
    pub(crate) inner: W,
    pub(crate) json: bool,
}

impl<'w, W: MakeWriter<'w>> MakeWriter<'w> for ForPeople<W> {
    type Writer = Shown<W::Writer>;

    fn make_writer(&'w self) -> Self::Writer {
        Shown {
            inner: self.inner.make_writer(),
            json: self.json,
        }
    }
}

pub(crate) struct Shown<W> {
    inner: W,
    json: bool,
}

impl<W: Write> Write for Shown<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let shown = if self.json {
            json_for_people(&text)
        } else {
            coloured_lines(&text)
        };
        self.inner.write_all(shown.as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each of the kinds, first and last.
    const HIDDEN: &str = "\u{0}\u{7}\u{8}\r\x1b\u{7f}\u{85}\u{9b}\u{61c}\u{200b}\u{200f}\u{2028}\u{2029}\u{202a}\u{202e}\
                          \u{2060}\u{2066}\u{2069}\u{feff}\u{e0000}\u{e0041}\u{e007f}";

    #[test]
    fn what_can_not_be_seen_is_shown() {
        assert_eq!(plain("café 東京 é 😀"), "café 東京 é 😀");
        assert_eq!(plain("a\x1b[31mb\nc\u{202e}d"), "a\\u{1b}[31mb\\nc\\u{202e}d");
        assert_eq!(plain("\u{feff}\u{e0041}"), "\\u{feff}\\u{e0041}");
        for letter in HIDDEN.chars() {
            assert!(is_hidden(letter), "{letter:?}");
            assert!(!plain(&letter.to_string()).contains(letter), "{letter:?}");
        }
        assert_eq!(plain_lines("a\nb\x1b[0m"), "a\nb\\u{1b}[0m");
    }

    #[test]
    fn our_colours_stay_and_nothing_else_of_the_kind() {
        let ours = "\x1b[1;31mx\x1b[0m\n";
        assert_eq!(coloured_lines(ours), ours);
        for other in ["\x1b[2J", "\x1b]0;title\x07", "\x1b[31", "\x1b[1;1H", "\u{9b}31m"] {
            let shown = coloured_lines(other);
            assert!(!shown.contains(['\x1b', '\u{9b}', '\x07']), "{shown:?}");
        }
    }

    #[test]
    fn json_for_people_is_the_same_document() {
        let value = serde_json::json!({"a": format!("{HIDDEN}é😀"), HIDDEN: [1, null]});
        let text = serde_json::to_string(&value).expect("JSON");
        let shown = json_for_people(&format!("{text}\n"));
        assert!(!shown.trim_end().chars().any(is_hidden), "{shown:?}");
        let again: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
        assert_eq!(again, value);
    }

    #[test]
    fn a_log_that_a_person_looks_at() {
        for (json, expected) in [(false, "a\\u{202e}b\n"), (true, "a\\u202eb\n")] {
            let mut shown = Shown {
                inner: Vec::new(),
                json,
            };
            shown.write_all("a\u{202e}b\n".as_bytes()).expect("written");
            assert_eq!(String::from_utf8_lossy(&shown.inner), expected);
        }
    }
}
