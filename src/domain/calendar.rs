//! Moments that an operator may name: every time that RFC 3339 can write, years 0001 to 9999.

use std::fmt;

use jiff::{SignedDuration, Timestamp, civil, fmt::temporal::Pieces};

/// RFC 3339, UTC, milliseconds.
pub fn rfc3339(time: Timestamp) -> String {
    format!("{time:.3}")
}

/// Reads what RFC 3339 writes and nothing else, cut to milliseconds: other programs must read it alike. Beyond the ends of
/// jiff's calendar it is that end.
pub fn strict_rfc3339(text: &str) -> Option<Timestamp> {
    /// 2030-01-31T00:00:00 with digits where there is a zero.
    const MOMENT: &[u8] = b"0000-00-00T00:00:00";
    let fits = |bytes: &[u8], form: &[u8]| {
        bytes.len() == form.len()
            && bytes.iter().zip(form).all(|(byte, form)| match form {
                b'0' => byte.is_ascii_digit(),
                form => byte.to_ascii_uppercase() == *form,
            })
    };
    let (moment, rest) = text.as_bytes().split_at_checked(MOMENT.len())?;
    let digits = match rest {
        [b'.', rest @ ..] => Some(rest.iter().take_while(|byte| byte.is_ascii_digit()).count()),
        _ => None,
    };
    let offset = match digits {
        // More than nine are beyond what any clock of ours tells.
        Some(digits @ 1..=9) => rest.get(digits.saturating_add(1)..)?,
        Some(_) => return None,
        None => rest,
    };
    let is_offset = fits(offset, b"Z") || fits(offset, b"+00:00") || fits(offset, b"-00:00");
    if !fits(moment, MOMENT) || !is_offset {
        return None;
    }
    CalendarTime::parse(text).ok().map(CalendarTime::timestamp)
}

/// A moment, in microseconds since 1970. jiff's own timestamps end a day before the year 9999 does, so that no local time of
/// any offset is out of range; here what was asked for is kept exactly. What an offset moves beyond the ends of the
/// calendar in UTC counts as that end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CalendarTime(i64);

const EPOCH: civil::DateTime = civil::date(1970, 1, 1).at(0, 0, 0, 0);
/// 0001-01-01T00:00:00Z.
const FIRST: i64 = -62_135_596_800_000_000;
/// 9999-12-31T23:59:59.999999Z.
const LAST: i64 = 253_402_300_799_999_999;

impl CalendarTime {
    /// Reads RFC 3339, cut to milliseconds: what is stored is what is shown.
    ///
    /// # Errors
    /// How to write it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let unreadable = || "write it as RFC 3339, such as 2030-01-31T00:00:00Z".to_owned();
        let pieces = Pieces::parse(text).map_err(|_| unreadable())?;
        let (Some(time), Some(offset)) = (pieces.time(), pieces.to_numeric_offset()) else {
            return Err(unreadable());
        };
        if pieces.time_zone_annotation().is_some() {
            return Err(unreadable());
        }
        if !(1..=9999).contains(&pieces.date().year()) {
            return Err("the year is 0001 to 9999".into());
        }
        let local = pieces.date().to_datetime(time).duration_since(EPOCH);
        let moment = local.saturating_sub(SignedDuration::from_secs(i64::from(offset.seconds())));
        // Down to the millisecond, also before 1970.
        let millis = moment.as_nanos().div_euclid(1_000_000);
        let millis = i64::try_from(millis).map_err(|_| unreadable())?;
        Ok(Self::from_microsecond(millis.saturating_mul(1_000)))
    }

    /// Microseconds since 1970; beyond the ends it is the end.
    pub fn from_microsecond(microsecond: i64) -> Self {
        Self(microsecond.clamp(FIRST, LAST))
    }

    pub fn as_microsecond(self) -> i64 {
        self.0
    }

    /// RFC 3339 to the microsecond, for a database.
    pub fn exactly(self) -> String {
        let micros = self.0.rem_euclid(1_000);
        let shown = self.to_string();
        format!("{}{micros:03}Z", shown.trim_end_matches('Z'))
    }

    /// For comparing with what has happened: beyond its end jiff has nothing, and so has nobody.
    pub fn timestamp(self) -> Timestamp {
        Timestamp::from_microsecond(self.0).unwrap_or(Timestamp::MAX)
    }
}

impl From<Timestamp> for CalendarTime {
    fn from(time: Timestamp) -> Self {
        Self::from_microsecond(time.as_microsecond())
    }
}

/// RFC 3339, UTC, milliseconds, as every time that leaves the program.
impl fmt::Display for CalendarTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let written = EPOCH
            .checked_add(SignedDuration::from_micros(self.0))
            .unwrap_or(civil::DateTime::MAX);
        let (date, time) = (written.date(), written.time());
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
            date.year(),
            date.month(),
            date.day(),
            time.hour(),
            time.minute(),
            time.second(),
            time.millisecond()
        )
    }
}

impl fmt::Debug for CalendarTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_of_the_calendar_is_read_and_written() {
        for (text, written) in [
            ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
            ("0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00.000Z"),
            ("0001-01-01T00:00:00-01:00", "0001-01-01T01:00:00.000Z"),
            ("1969-12-31T23:59:59.9999Z", "1969-12-31T23:59:59.999Z"),
            ("2020-02-29T12:00:00.123456+01:00", "2020-02-29T11:00:00.123Z"),
            ("2030-01-31t00:00:00z", "2030-01-31T00:00:00.000Z"),
            ("9999-12-30T22:00:01Z", "9999-12-30T22:00:01.000Z"),
            ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59.000Z"),
            ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999Z"),
            ("9999-12-31T23:59:59-12:00", "9999-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(
                CalendarTime::parse(text).map(|time| time.to_string()),
                Ok(written.to_owned()),
                "{text}"
            );
        }
        for text in [
            "",
            "now",
            "tomorrow",
            "2030-01-31",
            "2030-01-31T00:00:00",
            "2030-02-30T00:00:00Z",
            "2030-01-31T24:00:00Z",
            "2030-01-31T00:00:00+25:61",
            "2030-01-31T00:00:00Z[Europe/Zurich]",
            "0000-12-31T23:59:59Z",
            "-000001-01-01T00:00:00Z",
            "+010000-01-01T00:00:00Z",
            "10000-01-01T00:00:00Z",
            "99999999999999999999-01-01T00:00:00Z",
        ] {
            let refusal = CalendarTime::parse(text).expect_err(text);
            assert!(
                refusal.contains("RFC 3339") || refusal.contains("0001 to 9999"),
                "{text}: {refusal}"
            );
        }
    }

    #[test]
    fn a_signed_time_is_rfc_3339_to_the_letter() {
        for (text, written) in [
            ("2030-01-31T00:00:00Z", "2030-01-31T00:00:00.000Z"),
            ("2030-01-31t00:00:00z", "2030-01-31T00:00:00.000Z"),
            ("2030-01-31T00:00:00.9999+01:00", "2030-01-30T23:00:00.999Z"),
            ("2030-01-31T00:00:00.123456789-00:00", "2030-01-31T00:00:00.123Z"),
            ("9999-12-31T23:59:59Z", "9999-12-30T22:00:00.999Z"),
        ] {
            assert_eq!(strict_rfc3339(text).map(rfc3339).as_deref(), Some(written), "{text}");
        }
        for text in [
            "",
            "2030-01-31",
            "2030-01-31 00:00:00Z",
            "20300131T000000Z",
            "2030-01-31T00:00Z",
            "2030-01-31T00:00:00",
            "2030-01-31T00:00:00,5Z",
            "2030-01-31T00:00:00.Z",
            "2030-01-31T00:00:00.1234567890Z",
            "2030-01-31T00:00:00+01",
            "2030-01-31T00:00:00+0100",
            "2030-01-31T00:00:00+01:00:00",
            "2030-01-31T00:00:00Z[UTC]",
            "2030-01-31T00:00:00Z ",
            "2030-02-30T00:00:00Z",
            "2030-01-31T24:00:00Z",
            "0000-01-31T00:00:00Z",
            "+002030-01-31T00:00:00Z",
            "2030-01-31T00:00:00\u{ff3a}",
            "1893456000",
        ] {
            assert_eq!(strict_rfc3339(text), None, "{text}");
        }
    }

    #[test]
    fn what_jiff_has_not_is_its_end() {
        let last = CalendarTime::parse("9999-12-31T23:59:59Z").expect("a time");
        assert_eq!(last.timestamp(), Timestamp::MAX);
        let some: Timestamp = "2026-01-02T03:04:05.678Z".parse().expect("a time");
        assert_eq!(CalendarTime::from(some).timestamp(), some);
        assert_eq!(
            CalendarTime::from_microsecond(i64::MAX).to_string(),
            "9999-12-31T23:59:59.999Z"
        );
        assert_eq!(
            CalendarTime::from_microsecond(i64::MIN).to_string(),
            "0001-01-01T00:00:00.000Z"
        );
    }
}
