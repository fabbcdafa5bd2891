//! Times as people say them.

use std::time::Duration;

use super::Moment;
use crate::{config::parse_duration, domain::calendar::CalendarTime};

/// RFC 3339, or a duration ago.
pub fn moment(text: &str) -> Result<Moment, String> {
    let wrong = match CalendarTime::parse(text) {
        Ok(time) => return Ok(Moment::At(time)),
        Err(wrong) => wrong,
    };
    match parse_duration(text) {
        Some(ago) if ago <= AGO_MAX => Ok(Moment::Ago(ago)),
        Some(_) => Err(TOO_LONG_AGO.into()),
        // A number of hours that no duration can hold is one all the same.
        None if is_duration(text) => Err(TOO_LONG_AGO.into()),
        None if wrong.contains("0001 to 9999") => Err(wrong),
        None => Err("write it as RFC 3339, such as 2030-01-31T00:00:00Z, or as so long ago, such as 90m or 24h".into()),
    }
}

/// Whether it would be a duration if each of its numbers were small.
fn is_duration(text: &str) -> bool {
    let mut small = String::new();
    for letter in text.chars() {
        match (letter.is_ascii_digit(), small.chars().next_back()) {
            (true, Some(before)) if before.is_ascii_digit() => {}
            (true, _) => small.push('1'),
            (false, _) => small.push(letter),
        }
    }
    parse_duration(&small).is_some()
}

/// The calendar of our times begins with the year 0001.
const AGO_MAX: Duration = Duration::from_secs(17_520_000 * 3_600);
const TOO_LONG_AGO: &str = "so long ago is at most 17520000h, which is 2,000 years; or write it as RFC 3339";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_time_or_so_long_ago() {
        assert_eq!(
            moment("2030-01-31T01:00:00.1234+01:00").map(|moment| match moment {
                Moment::At(time) => time.to_string(),
                Moment::Ago(_) => String::new(),
            }),
            Ok("2030-01-31T00:00:00.123Z".to_owned())
        );
        for (text, seconds) in [
            ("24h", 86_400),
            ("90m", 5_400),
            ("1h 30m", 5_400),
            ("15s", 15),
            ("0s", 0),
        ] {
            assert_eq!(moment(text), Ok(Moment::Ago(Duration::from_secs(seconds))), "{text}");
        }
        // Both ends of the calendar are themselves, and not the ends of jiff's.
        for (text, shown) in [
            ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
            ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59.000Z"),
        ] {
            let Ok(Moment::At(time)) = moment(text) else {
                panic!("{text} is a time");
            };
            assert_eq!(time.to_string(), shown);
        }
        for text in ["", "24", "yesterday", "2030-01-31", "-24h", "24h ago"] {
            assert!(moment(text).is_err_and(|why| why.contains("RFC 3339")), "{text}");
        }
        assert!(moment("17520000h").is_ok());
        for text in [
            "17520001h",
            "300000000h",
            "99999999999999999999999h",
            "1h 99999999999999999999999m",
            "9223372036854775807s",
        ] {
            assert!(
                moment(text).is_err_and(|why| why.contains("2,000 years")),
                "{text}: {:?}",
                moment(text)
            );
        }
        for text in ["10000-01-01T00:00:00Z", "0000-01-01T00:00:00Z"] {
            assert!(moment(text).is_err(), "{text}");
        }
    }
}
