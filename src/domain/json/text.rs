//! Finds its way in JSON that is well-formed. In what is not it would end early, or find other borders; it never panics.

use std::{borrow::Cow, cmp::Ordering, str::Chars};

/// A place in a text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

/// A member of an object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member<'a> {
    /// Where its key's quote stands.
    pub(super) at: u32,
    pub(super) key: Text<'a>,
    pub(super) value: &'a str,
}

/// What stands between the quotes of a string, escapes untouched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text<'a>(&'a str);

impl<'a> Cursor<'a> {
    pub(super) fn at(text: &'a str, at: u32) -> Self {
        Self {
            text,
            at: usize::try_from(at).unwrap_or(usize::MAX),
        }
    }

    /// Behind the bracket with which an object or an array begins.
    pub(super) fn inside(text: &'a str) -> Self {
        Self { text, at: 1 }
    }

    /// From here on, the members of the object.
    pub(super) fn members(mut self) -> impl Iterator<Item = Member<'a>> {
        std::iter::from_fn(move || {
            self.next_value()?;
            self.member_here()
        })
    }

    /// From here on, the elements of the array.
    pub(super) fn elements(mut self) -> impl Iterator<Item = &'a str> {
        std::iter::from_fn(move || {
            self.next_value()?;
            Some(self.value())
        })
    }

    /// The member that begins here.
    pub(super) fn member(mut self) -> Option<Member<'a>> {
        self.member_here()
    }

    /// The string that begins here against another one, by code points like strings are compared. It looks no further than to
    /// where they differ: a key may be as long as its text, and is compared with many.
    pub(super) fn cmp_string(self, other: Self) -> Ordering {
        let (left, right) = (self.behind_quote(), other.behind_quote());
        let same = unescaped_in_common(left, right);
        match (byte_of(left, same), byte_of(right, same)) {
            (Some(b'\\'), _) | (_, Some(b'\\')) => characters(left, same).cmp(characters(right, same)),
            (one, another) => one.cmp(&another),
        }
    }

    /// The string that begins here against a plain one.
    pub(super) fn cmp_plain(self, plain: &str) -> Ordering {
        let text = self.behind_quote();
        let same = unescaped_in_common(text, plain);
        match byte_of(text, same) {
            Some(b'\\') => characters(text, same).cmp(plain.get(same..).unwrap_or_default().chars()),
            one => one.cmp(&plain.as_bytes().get(same).copied()),
        }
    }

    fn behind_quote(self) -> &'a str {
        self.text.get(self.at.saturating_add(1)..).unwrap_or_default()
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn step(&mut self) {
        self.at = self.at.saturating_add(1);
    }

    fn since(&self, start: usize) -> &'a str {
        self.text.get(start..self.at).unwrap_or_default()
    }

    /// On to what is neither white space nor one of these.
    fn pass(&mut self, also: u8) {
        while let Some(byte) = self.byte() {
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') && byte != also {
                break;
            }
            self.step();
        }
    }

    /// On to the next member or element; none: there is no further.
    fn next_value(&mut self) -> Option<()> {
        self.pass(b',');
        self.byte().filter(|byte| !matches!(byte, b'}' | b']')).map(drop)
    }

    fn member_here(&mut self) -> Option<Member<'a>> {
        let at = u32::try_from(self.at).ok()?;
        let key = self.text_here();
        self.pass(b':');
        let value = self.value();
        Some(Member { at, key, value })
    }

    fn text_here(&mut self) -> Text<'a> {
        self.step();
        let start = self.at;
        while let Some(rest) = self.text.as_bytes().get(self.at..) {
            let plain = rest.iter().position(|byte| matches!(byte, b'"' | b'\\'));
            self.at = self.at.saturating_add(plain.unwrap_or(rest.len()));
            if self.byte() != Some(b'\\') {
                break;
            }
            self.step();
            self.step();
        }
        let inner = self.since(start);
        self.step();
        Text(inner)
    }

    /// Passes a value: its text.
    fn value(&mut self) -> &'a str {
        let start = self.at;
        let mut open = 0_usize;
        while let Some(byte) = self.byte() {
            match byte {
                b'"' => {
                    self.text_here();
                }
                b'{' | b'[' => {
                    open = open.saturating_add(1);
                    self.step();
                    continue;
                }
                b'}' | b']' if open > 0 => {
                    open = open.saturating_sub(1);
                    self.step();
                }
                // Behind a number or a word.
                b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r' if open == 0 => break,
                _ => {
                    self.step();
                    continue;
                }
            }
            if open == 0 {
                break;
            }
        }
        self.since(start)
    }
}

impl<'a> Text<'a> {
    /// Of a value that is a string and nothing beside it.
    pub(super) fn of(value: &'a str) -> Self {
        let inner = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        Self(inner.unwrap_or_default())
    }

    /// Borrowed where it has no escapes.
    pub(super) fn unescaped(self) -> Cow<'a, str> {
        let Some((plain, mut rest)) = self.to_escape() else {
            return Cow::Borrowed(self.0);
        };
        let mut text = String::with_capacity(self.0.len());
        text.push_str(plain);
        loop {
            text.extend(rest.next().flatten());
            let Some((plain, further)) = Text(rest.0.as_str()).to_escape() else {
                text.push_str(rest.0.as_str());
                return Cow::Owned(text);
            };
            text.push_str(plain);
            rest = further;
        }
    }

    pub(super) fn has_lone_surrogate(self) -> bool {
        let mut text = self;
        while let Some((_, mut rest)) = text.to_escape() {
            if rest.next() == Some(None) {
                return true;
            }
            text = Text(rest.0.as_str());
        }
        false
    }

    /// What stands before the first escape, and from there on.
    fn to_escape(self) -> Option<(&'a str, Characters<'a>)> {
        let (plain, escaped) = self.0.split_at_checked(self.0.find('\\')?)?;
        Some((plain, Characters(escaped.chars())))
    }
}

/// The characters of a string one by one, up to its quote; none where half a surrogate pair stands alone (RFC 8259, 7 and 8.2).
struct Characters<'a>(Chars<'a>);

/// The same of one that was checked, from a place on.
fn characters(text: &str, at: usize) -> impl Iterator<Item = char> {
    Characters(text.get(at..).unwrap_or_default().chars()).map_while(|character| character)
}

/// Up to where two texts are the same, byte by byte, and the first neither ends nor has an escape. What differs within a character
/// has no escape there, and bytes are in the order of code points.
fn unescaped_in_common(text: &str, other: &str) -> usize {
    let pairs = text.bytes().zip(other.bytes());
    pairs
        .take_while(|(one, another)| one == another && !matches!(one, b'"' | b'\\'))
        .count()
}

/// The byte at a place; none where the string ends there, and so comes before any other.
fn byte_of(text: &str, at: usize) -> Option<u8> {
    text.as_bytes().get(at).copied().filter(|byte| *byte != b'"')
}

impl Characters<'_> {
    /// The UTF-16 unit of `\uXXXX`, whose first two characters are passed.
    fn unit(&mut self) -> u32 {
        let digits = self.0.by_ref().take(4);
        digits.fold(0, |unit, digit| (unit << 4) | digit.to_digit(16).unwrap_or_default())
    }

    /// What `\uXXXX` stands for, with the other half of its pair where it has one.
    fn escaped(&mut self) -> Option<char> {
        let first = self.unit();
        if !(0xd800..0xdc00).contains(&first) {
            return char::from_u32(first);
        }
        let mut ahead = Characters(self.0.clone());
        if (ahead.0.next(), ahead.0.next()) != (Some('\\'), Some('u')) {
            return None;
        }
        let second = ahead.unit();
        if !(0xdc00..0xe000).contains(&second) {
            return None;
        }
        self.0 = ahead.0;
        char::from_u32(0x1_0000_u32.saturating_add(((first & 0x3ff) << 10) | (second & 0x3ff)))
    }
}

impl Iterator for Characters<'_> {
    type Item = Option<char>;

    fn next(&mut self) -> Option<Option<char>> {
        let first = self.0.next().filter(|first| *first != '"')?;
        if first != '\\' {
            return Some(Some(first));
        }
        Some(match self.0.next()? {
            'u' => self.escaped(),
            'b' => Some('\u{8}'),
            'f' => Some('\u{c}'),
            'n' => Some('\n'),
            'r' => Some('\r'),
            't' => Some('\t'),
            same => Some(same),
        })
    }
}
