//! What an error of the database means for the work in hand.

use std::fmt;

use tokio_postgres::error::SqlState;

use super::trouble::Trouble;
use crate::{fail::Injected, redact};

/// What an error means for the work in hand. Decided by SQLSTATE, never by text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The server chose us to give way, or somebody was quicker: load again and try at once, a bounded number of times.
    Retry,
    /// One message of the batch may be the cause: bisect.
    Bisect,
    /// The database is away or going away: pause and reconnect.
    Away,
    /// Our fault (a missing grant, table, column; anything unknown): pause and alarm, never a dead letter.
    Ours,
    /// The batch's own id is there already: an earlier attempt committed.
    CommittedBefore,
    /// Another worker judged these messages meanwhile: there is nothing left to do.
    Overtaken,
    /// There is no room for more dead letters (`dead_letters.max_rows`, `max_bytes`).
    Full,
}

/// An error of ours. Never a verdict.
#[derive(Debug)]
pub struct StoreError {
    /// The transaction or command it happened in.
    pub during: &'static str,
    pub fate: Fate,
    /// The SQLSTATE, where the server answered.
    pub sqlstate: Option<String>,
    /// It happened at COMMIT: whether the transaction committed is unknown.
    pub at_commit: bool,
    pub(super) trouble: Trouble,
    pub(super) sentence: String,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.during, self.said())
    }
}

impl std::error::Error for StoreError {}

impl StoreError {
    /// What was said, without in which transaction: it never began where we could not get in.
    pub fn said(&self) -> String {
        match &self.sqlstate {
            Some(code) => format!("{} (SQLSTATE {code})", self.sentence),
            None => self.sentence.clone(),
        }
    }

    /// Whether a row would break a constraint of its table.
    pub fn breaks_a_rule(&self) -> bool {
        self.sqlstate.as_deref().is_some_and(|code| code.starts_with("23"))
    }

    /// What was said, without a code.
    pub fn sentence(&self) -> &str {
        &self.sentence
    }

    pub(super) fn new(during: &'static str, fate: Fate, sentence: impl Into<String>) -> Self {
        Self {
            during,
            fate,
            sqlstate: None,
            at_commit: false,
            trouble: match fate {
                Fate::Away => Trouble::NoAnswer,
                Fate::Retry | Fate::Bisect | Fate::Ours | Fate::CommittedBefore | Fate::Overtaken | Fate::Full => {
                    Trouble::Refuses
                }
            },
            sentence: sentence.into(),
        }
    }

    /// Something that one message of the batch may have caused.
    pub fn blame_the_batch(sentence: &str) -> Self {
        Self::new("settle_batch", Fate::Bisect, sentence)
    }

    /// A mistake of our own, found before it did harm.
    pub fn ours(during: &'static str, sentence: impl Into<String>) -> Self {
        Self::new(during, Fate::Ours, sentence)
    }

    /// What is locked can not be kept apart either.
    pub fn room_is_full() -> Self {
        Self::new(
            "settle_batch",
            Fate::Retry,
            "somebody's open transaction has locked what messages need, and there is no room left to hold them meanwhile",
        )
    }

    /// What the server would say to the first write.
    pub(super) fn read_only(during: &'static str) -> Self {
        Self {
            sqlstate: Some("25006".to_owned()),
            trouble: Trouble::ReadOnly,
            ..Self::new(during, Fate::Away, Trouble::ReadOnly.sentence())
        }
    }

    /// What is kept for another cell has a bound too.
    pub fn no_room_for_another_cell() -> Self {
        Self::new(
            "settle_batch",
            Fate::Retry,
            "a partner is on its way to another cell, or lives there, and there is no room left to hold its messages; `settled \
             partner move --apply` goes on, and hands over what is held",
        )
    }

    pub(super) fn from_postgres(during: &'static str, error: &tokio_postgres::Error) -> Self {
        let sentence = match error.as_db_error() {
            // The server's primary message names tables and constraints; its DETAIL would echo values.
            Some(db) => redact::outside(db.message()),
            None => redact::outside(&error.to_string()),
        };
        Self {
            during,
            fate: fate_of(error),
            sqlstate: error.code().map(|code| code.code().to_owned()),
            at_commit: false,
            trouble: error
                .code()
                .map_or_else(|| Trouble::of_error(error), |code| Trouble::of_code(code.code())),
            sentence,
        }
    }

    /// Whether a lock was waited for in vain.
    pub fn is_lock_wait(&self) -> bool {
        self.sqlstate.as_deref() == Some(SqlState::LOCK_NOT_AVAILABLE.code())
    }

    /// Whether the statement cache of the connection is stale.
    pub(super) fn is_stale_plan(&self) -> bool {
        self.sqlstate.as_deref() == Some(SqlState::FEATURE_NOT_SUPPORTED.code())
    }

    /// Whether something of the schema is missing, or older than this program.
    pub fn is_schema(&self) -> bool {
        // One by one: other states of their classes are a missing right, a pooler's doing, a mistake of ours.
        const MISSING: [SqlState; 5] = [
            SqlState::UNDEFINED_TABLE,
            SqlState::UNDEFINED_COLUMN,
            SqlState::UNDEFINED_FUNCTION,
            SqlState::UNDEFINED_OBJECT,
            SqlState::INVALID_SCHEMA_NAME,
        ];
        let code = self.sqlstate.as_deref();
        MISSING.iter().any(|missing| Some(missing.code()) == code)
    }

    /// Whether somebody else was in the way and nothing was done: what may be done twice may be tried again.
    pub fn is_in_the_way(&self) -> bool {
        self.fate == Fate::Retry && !self.at_commit
    }

    /// Whether this user is not allowed what was asked. What is behind it can not be seen then: it may be there or not.
    pub fn is_right(&self) -> bool {
        self.sqlstate.as_deref() == Some(SqlState::INSUFFICIENT_PRIVILEGE.code())
    }
}

/// What an injected error stands for: the connection broke.
impl From<Injected> for StoreError {
    fn from(_: Injected) -> Self {
        Self::new("a fail point", Fate::Away, "the connection broke, as a test asked for")
    }
}

/// The table "SQLSTATE to fate".
fn fate_of(error: &tokio_postgres::Error) -> Fate {
    let Some(db) = error.as_db_error() else {
        return Fate::Away;
    };
    if *db.code() == SqlState::UNIQUE_VIOLATION {
        return match db.table() {
            // Both bear the batch's id.
            Some("batches" | "outbox") => Fate::CommittedBefore,
            // Somebody else wrote the same receipt, parked row or dead letter first: load again and see it.
            Some("receipts" | "parked" | "dead_letters") => Fate::Retry,
            _ => Fate::Bisect,
        };
    }
    fate_of_code(db.code().code())
}

fn fate_of_code(code: &str) -> Fate {
    match code {
        "40001" | "40P01" | "55P03" | "57014" | "0A000" => Fate::Retry,
        "23502" | "23503" | "23505" | "23514" | "P0001" | "54000" => Fate::Bisect,
        "25006" | "25P03" | "57P01" | "57P02" | "57P03" | "57P05" => Fate::Away,
        _ => match code.get(..2) {
            Some("22") => Fate::Bisect,
            Some("53" | "08") => Fate::Away,
            _ => Fate::Ours,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_state_has_its_fate() {
        for (fate, codes) in [
            (Fate::Retry, vec!["40001", "40P01", "55P03", "57014", "0A000"]),
            (
                Fate::Bisect,
                vec!["22003", "22P02", "23502", "23503", "23505", "23514", "P0001", "54000"],
            ),
            (
                Fate::Away,
                vec![
                    "25006", "25P03", "57P01", "57P02", "57P03", "57P05", "53300", "53100", "08006", "08P01",
                ],
            ),
            (
                Fate::Ours,
                vec!["42501", "42P01", "42703", "3F000", "XX000", "25P02", "58030", ""],
            ),
        ] {
            for code in codes {
                assert_eq!(fate_of_code(code), fate, "{code}");
            }
        }
    }
}
