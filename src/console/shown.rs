//! How things are shown: text from outside, times, amounts, states. What is written here is markup of our own; whatever else
//! stands in it is escaped.

use std::{fmt, time::Duration};

use askama::filters::HtmlSafe;
use jiff::Timestamp;

use crate::{
    domain::{allocation::Allocation, calendar::rfc3339, ledger::Amount},
    plain::is_hidden,
};

/// A page as a browser gets it, with nothing in it that can not be seen: in text it is shown as an escape, and in a tag, where
/// a form's field must stay what it is, it is written as a reference. What came from outside has no `<` of its own any more.
pub(super) fn fit(page: &str) -> String {
    let mut shown = String::with_capacity(page.len());
    let mut in_tag = false;
    for letter in page.chars() {
        match letter {
            '<' => in_tag = true,
            '>' => in_tag = false,
            _ => {}
        }
        if letter == '\n' || !is_hidden(letter) {
            shown.push(letter);
        } else if in_tag {
            shown.push_str(&format!("&#{};", u32::from(letter)));
        } else {
            shown.extend(letter.escape_default());
        }
    }
    shown
}

/// Text in markup that is made here.
pub(super) fn escaped(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => shown.push_str("&amp;"),
            '<' => shown.push_str("&lt;"),
            '>' => shown.push_str("&gt;"),
            '"' => shown.push_str("&quot;"),
            '\'' => shown.push_str("&#39;"),
            letter => shown.push(letter),
        }
    }
    shown
}

/// A time, short, and exact for who points at it.
#[derive(Clone, Copy, Debug)]
pub(super) struct At(pub(super) Timestamp);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = rfc3339(self.0);
        let short = self.0.strftime("%-d %b %H:%M:%S");
        write!(f, "<time datetime=\"{exact}\" title=\"{exact}\">{short}</time>")
    }
}

impl HtmlSafe for At {}

/// A time that is a text already; one that is none in our calendar stays as it is.
pub(super) fn at(text: &str) -> Markup {
    text.parse()
        .map_or_else(|_| Markup(escaped(text)), |time| Markup(At(time).to_string()))
}

/// A time that may be missing.
#[derive(Clone, Copy, Debug)]
pub(super) struct MaybeAt(pub(super) Option<Timestamp>);

impl fmt::Display for MaybeAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(time) => At(time).fmt(f),
            None => f.write_str("<span class=\"none\">–</span>"),
        }
    }
}

impl HtmlSafe for MaybeAt {}

/// Base units or a number, exact, in groups of three for the eye: the gaps are no characters, so that a copy has none.
#[derive(Clone, Debug)]
pub(super) struct Digits(pub(super) String);

impl Digits {
    pub(super) fn of(number: impl ToString) -> Self {
        Self(number.to_string())
    }
}

impl fmt::Display for Digits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, digits) = match self.0.strip_prefix('-') {
            Some(digits) => ("−", digits),
            None => ("", self.0.as_str()),
        };
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return write!(f, "<span class=\"num\">{}</span>", escaped(&self.0));
        }
        f.write_str("<span class=\"num\">")?;
        f.write_str(sign)?;
        let first = match digits.len() % 3 {
            0 => 3,
            rest => rest,
        };
        let (head, mut rest) = digits.split_at(first.min(digits.len()));
        f.write_str(head)?;
        while !rest.is_empty() {
            let (three, others) = rest.split_at(3.min(rest.len()));
            write!(f, "<i>{three}</i>")?;
            rest = others;
        }
        f.write_str("</span>")
    }
}

impl HtmlSafe for Digits {}

/// How something is, by a sign, a word and a colour: the colour is never the only one.
#[derive(Clone, Debug)]
pub(super) struct Chip {
    pub(super) mood: &'static str,
    pub(super) word: String,
}

impl Chip {
    fn of(mood: &'static str, word: impl Into<String>) -> Self {
        Self {
            mood,
            word: word.into(),
        }
    }

    pub(super) fn good(word: impl Into<String>) -> Self {
        Self::of("good", word)
    }

    pub(super) fn bad(word: impl Into<String>) -> Self {
        Self::of("bad", word)
    }

    pub(super) fn warn(word: impl Into<String>) -> Self {
        Self::of("warn", word)
    }

    pub(super) fn calm(word: impl Into<String>) -> Self {
        Self::of("calm", word)
    }

    pub(super) fn busy(word: impl Into<String>) -> Self {
        Self::of("busy", word)
    }

    /// A dead letter's state.
    pub(super) fn of_letter(state: &str) -> Self {
        match state {
            "open" => Self::warn(state),
            "due" | "parked" => Self::busy(state),
            "settled" => Self::good(state),
            _ => Self::calm(state),
        }
    }

    /// A run's state.
    pub(super) fn of_run(state: &str) -> Self {
        match state {
            "running" => Self::busy(state),
            "done" => Self::good(state),
            "stopped" | "stalled" => Self::bad(state),
            _ => Self::warn(state),
        }
    }

    /// What a verdict would be, or was.
    pub(super) fn of_verdict(verdict: &str) -> Self {
        match verdict {
            "settled" => Self::good(verdict),
            "duplicate" => Self::calm(verdict),
            "parked" => Self::busy(verdict),
            _ => Self::bad(verdict),
        }
    }
}

impl fmt::Display for Chip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.mood {
            "good" => "✓",
            "bad" => "✕",
            "warn" => "!",
            "busy" => "↻",
            _ => "·",
        };
        write!(
            f,
            "<span class=\"chip {}\"><b aria-hidden=\"true\">{sign}</b>{}</span>",
            self.mood,
            escaped(&self.word)
        )
    }
}

impl HtmlSafe for Chip {}

/// Markup that was made here, of escaped parts.
#[derive(Clone, Debug, Default)]
pub(super) struct Markup(pub(super) String);

impl fmt::Display for Markup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl HtmlSafe for Markup {}

/// Where an allocation stands.
pub(super) fn status(allocation: &Allocation) -> Markup {
    let chip = match allocation.status.as_str() {
        "reserved" => Chip::busy("reserved"),
        status => Chip::good(status),
    };
    Markup(chip.to_string())
}

/// Exact, with its currency.
pub(super) fn amount(amount: &Amount) -> Markup {
    Markup(format!(
        "{} {}",
        Digits::of(&amount.quantity),
        escaped(&amount.currency)
    ))
}

/// So long, in the two largest units.
pub(super) fn lasting(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

/// The head of an id.
pub(super) fn short(id: impl ToString) -> String {
    id.to_string().chars().take(13).collect()
}

/// Text in lines, each for itself.
pub(super) fn lines(text: &str) -> Vec<String> {
    text.split('\n').map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_is_markup_and_nothing_is_hidden() {
        assert_eq!(escaped("a<b>&\"'"), "a&lt;b&gt;&amp;&quot;&#39;");
        assert_eq!(fit("<p>a\u{202e}b\u{7}\n"), "<p>a\\u{202e}b\\u{7}\n");
        assert_eq!(
            fit("<input value=\"\u{202e}\">\u{200b}"),
            "<input value=\"&#8238;\">\\u{200b}"
        );
        assert_eq!(escaped("größer 東京"), "größer 東京");
        let chip = Chip::of_letter("<script>").to_string();
        assert!(chip.contains("&lt;script&gt;") && !chip.contains("<script"), "{chip}");
        assert_eq!(Digits::of("<i>").to_string(), "<span class=\"num\">&lt;i&gt;</span>");
    }

    #[test]
    fn digits_are_grouped_without_a_character_between_them() {
        for (text, shown) in [
            ("0", "0"),
            ("12", "12"),
            ("123", "123"),
            ("1234", "1<i>234</i>"),
            ("-1234567", "−1<i>234</i><i>567</i>"),
        ] {
            assert_eq!(
                Digits::of(text).to_string(),
                format!("<span class=\"num\">{shown}</span>")
            );
        }
    }

    #[test]
    fn times_are_said_in_their_largest_units() {
        for (seconds, said) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min 0 s"),
            (3_661, "1 h 1 min"),
            (90_000, "1 d 1 h"),
        ] {
            assert_eq!(lasting(Duration::from_secs(seconds)), said);
        }
    }
}
