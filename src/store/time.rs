//! How the records of this room write their times.

use jiff::Timestamp;
use serde::Serializer;

use crate::domain::calendar::{CalendarTime, rfc3339};

/// RFC 3339 with milliseconds, as every time that leaves the program.
pub(super) fn time<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&rfc3339(*time))
}

/// The same, or null.
pub(super) fn maybe_time<S: Serializer>(time: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => serializer.serialize_some(&rfc3339(*time)),
        None => serializer.serialize_none(),
    }
}

/// Of any moment of the calendar.
pub(super) fn shown<S: Serializer>(time: &CalendarTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(time)
}

/// The same, or null.
pub(super) fn maybe_shown<S: Serializer>(time: &Option<CalendarTime>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => serializer.serialize_some(&time.to_string()),
        None => serializer.serialize_none(),
    }
}
