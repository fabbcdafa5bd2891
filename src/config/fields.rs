//! How a field is read, and the bounds that it has.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer, de::Error as _};
use toml::Value;

pub(super) fn within<'de, const MIN: u64, const MAX: u64, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    let number = i64::deserialize(deserializer)?;
    u64::try_from(number)
        .ok()
        .filter(|number| (MIN..=MAX).contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| D::Error::custom(format!("must be from {MIN} to {MAX}")))
}

pub(super) fn tenths<'de, const MIN: u32, const MAX: u32, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<f64, D::Error> {
    let (min, max) = (f64::from(MIN) / 10.0, f64::from(MAX) / 10.0);
    let number = f64::deserialize(deserializer)?;
    if number >= min && number <= max {
        return Ok(number);
    }
    Err(D::Error::custom(format!("must be from {min:.1} to {max:.1}")))
}

/// A number and its unit, such as `90m`, or several of them.
pub fn parse_duration(text: &str) -> Option<Duration> {
    jiff::fmt::friendly::SpanParser::new()
        .parse_unsigned_duration(text)
        .ok()
}

pub(super) fn in_words(duration: Duration) -> String {
    jiff::fmt::friendly::SpanPrinter::new()
        .designator(jiff::fmt::friendly::Designator::Compact)
        .unsigned_duration_to_string(&duration)
}

/// A duration between bounds in milliseconds, and not finer than those: PostgreSQL counts in them.
pub(super) fn lasting<'de, const MIN: u64, const MAX: u64, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    let duration = parse_duration(&text).ok_or_else(|| {
        D::Error::custom("not a duration: write a number and its unit (ms, s, m, h), such as 500ms, 15s or 1h 30m")
    })?;
    let (min, max) = (Duration::from_millis(MIN), Duration::from_millis(MAX));
    if duration < min || duration > max {
        return Err(D::Error::custom(format!(
            "must be from {} to {}",
            in_words(min),
            in_words(max)
        )));
    }
    if duration.subsec_nanos() % 1_000_000 != 0 {
        return Err(D::Error::custom("must be whole milliseconds"));
    }
    Ok(duration)
}

pub(super) fn whole_seconds<'de, const MIN: u64, const MAX: u64, D>(deserializer: D) -> Result<Duration, D::Error>
where
    D: Deserializer<'de>,
{
    let duration = lasting::<MIN, MAX, D>(deserializer)?;
    if duration.subsec_nanos() != 0 {
        return Err(D::Error::custom("must be whole seconds"));
    }
    Ok(duration)
}

pub(super) fn short_text<'de, const MIN: usize, const MAX: usize, D>(deserializer: D) -> Result<String, D::Error>
where
    D: Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    if text.len() < MIN || text.len() > MAX {
        return Err(D::Error::custom(format!("must be {MIN} to {MAX} bytes long")));
    }
    if text.chars().any(|letter| letter.is_control() || letter.is_whitespace()) {
        return Err(D::Error::custom("must hold no white space and no control characters"));
    }
    Ok(text)
}

/// A list of texts.
pub(super) fn texts<'de, const MOST: usize, const BYTES: usize, D>(deserializer: D) -> Result<Vec<String>, D::Error>
where
    D: Deserializer<'de>,
{
    let texts = Vec::<String>::deserialize(deserializer)?;
    if texts.len() > MOST {
        return Err(D::Error::custom(format!("must have {MOST} entries at most")));
    }
    if texts
        .iter()
        .any(|text| text.len() > BYTES || text.chars().any(char::is_control))
    {
        return Err(D::Error::custom(format!(
            "must have entries of at most {BYTES} bytes without control characters"
        )));
    }
    Ok(texts)
}

/// The entries of a list in the environment, between commas. Two quotes stand for an empty one: a comma too many must not.
pub(super) fn items(text: &str) -> Vec<Value> {
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(|item| Value::String(if item == "\"\"" { String::new() } else { item.to_owned() }))
        .collect()
}

pub(super) fn optional_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok(if text.is_empty() {
        None
    } else {
        Some(PathBuf::from(text))
    })
}

pub(super) fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    String::deserialize(deserializer)?
        .parse()
        .map_err(|_| D::Error::custom("must be an IP address and a port, such as 127.0.0.1:9464 or [::]:9464"))
}

pub(super) fn optional_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .map_err(|_| D::Error::custom("must be empty, or an IP address and a port, such as 127.0.0.1:9466"))
}

/// A list of addresses with ports.
pub(super) fn addresses<'de, const MOST: usize, D>(deserializer: D) -> Result<Vec<SocketAddr>, D::Error>
where
    D: Deserializer<'de>,
{
    let texts = texts::<MOST, 64, _>(deserializer)?;
    let read = |text: String| {
        text.parse()
            .map_err(|_| D::Error::custom("must have IP addresses with a port, such as 127.0.0.1:9464"))
    };
    texts.into_iter().map(read).collect()
}

/// A list of `CURRENCY=QUANTITY`.
pub(super) fn amounts<'de, const MOST: usize, D>(deserializer: D) -> Result<Vec<(String, String)>, D::Error>
where
    D: Deserializer<'de>,
{
    let read = |text: String| {
        let (currency, quantity) = text.split_once('=')?;
        let fits = (1..=64).contains(&currency.len())
            && currency
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b":._-".contains(&byte))
            && (1..=78).contains(&quantity.len())
            && quantity.bytes().all(|byte| byte.is_ascii_digit());
        fits.then(|| (currency.to_owned(), quantity.to_owned()))
    };
    let texts = texts::<MOST, 255, _>(deserializer)?;
    let amounts = texts.into_iter().map(read).collect::<Option<Vec<_>>>();
    amounts.ok_or_else(|| D::Error::custom("must have entries such as BTC=100000000, in base units"))
}

/// The name of an HTTP header, in lower case.
pub(super) fn header_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = short_text::<1, 64, _>(deserializer)?;
    let fits = name
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if fits {
        return Ok(name);
    }
    Err(D::Error::custom(
        "must be a header's name: lower-case letters, digits and -",
    ))
}
