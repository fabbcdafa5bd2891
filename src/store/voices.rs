//! Acts that take two people and have no plan: who said that they shall be done.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use tokio_postgres::Row;

use super::{
    Session, Store, StoreError,
    audit::{Act, write_audit},
    time::time,
};
use crate::domain::person::Person;

/// That somebody wants something done that takes two people.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Voice {
    pub id: i64,
    pub operator: String,
    pub why: String,
    #[serde(serialize_with = "time")]
    pub at: Timestamp,
    #[serde(serialize_with = "time")]
    pub expires_at: Timestamp,
    #[serde(skip)]
    pub by: Person,
}

/// A voice to be written down.
#[derive(Clone, Copy, Debug)]
pub struct NewVoice<'a> {
    /// `recover` or `purge`.
    pub for_act: &'static str,
    /// What exactly.
    pub subject: &'a str,
    pub lasts_ms: i64,
    pub voucher: Option<&'a str>,
}

const VOICE_COLUMNS: &str = "id, operator, why, at, expires_at, voucher, session_name";

fn voice(row: &Row) -> Voice {
    Voice {
        id: row.get("id"),
        operator: row.get("operator"),
        why: row.get("why"),
        at: row.get("at"),
        expires_at: row.get("expires_at"),
        by: Person {
            operator: row.get("operator"),
            voucher: row.get("voucher"),
            session: row.get("session_name"),
        },
    }
}

impl Store {
    /// Who said so, the first first, as far as it counts by the database's clock.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn voices(&self, for_act: &'static str, subject: &str) -> Result<Vec<Voice>, StoreError> {
        let rows = self
            .session("voices")
            .await?
            .query(
                &format!(
                    "/* voices::voices */
                    SELECT {VOICE_COLUMNS}
                    FROM settled.voices
                    WHERE act = $1
                      AND subject = $2
                      AND expires_at > clock_timestamp()
                    ORDER BY id"
                ),
                &[&for_act, &subject],
            )
            .await?;
        Ok(rows.iter().map(voice).collect())
    }

    /// What is wanted of an act, by whomever, as far as it counts: what exactly, and who said so. The newest, oldest first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn wanted(&self, for_act: &'static str, limit: i64) -> Result<Vec<(String, Voice)>, StoreError> {
        let rows = self
            .session("wanted")
            .await?
            .query(
                &format!(
                    "/* voices::wanted */
                    SELECT subject, {VOICE_COLUMNS}
                    FROM settled.voices
                    WHERE act = $1
                      AND expires_at > clock_timestamp()
                    ORDER BY id DESC
                    LIMIT $2"
                ),
                &[&for_act, &limit],
            )
            .await?;
        Ok(rows.iter().rev().map(|row| (row.get("subject"), voice(row))).collect())
    }

    /// Writes down that somebody wants it done; nothing is done yet.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn raise_voice(
        &self,
        act: Act<'_>,
        new: NewVoice<'_>,
        outcome: &Value,
    ) -> Result<(Voice, i64), StoreError> {
        let session = self.session("raise_voice").await?;
        session.begin().await?;
        let mine = raise(&session, act, new).await?;
        let audit_id = write_audit(&session, act, outcome, None).await?;
        session.commit().await?;
        Ok((mine, audit_id))
    }
}

pub(super) async fn raise(session: &Session, act: Act<'_>, new: NewVoice<'_>) -> Result<Voice, StoreError> {
    let rows = session
        .query(
            &format!(
                "/* voices::raise */
                INSERT INTO settled.voices (act, subject, at, expires_at, operator, why, voucher)
                SELECT $1, $2, m.at, m.at + $3::bigint * interval '1 millisecond', $4, $5, $6
                FROM (SELECT date_trunc('milliseconds', clock_timestamp()) AS at) AS m
                RETURNING {VOICE_COLUMNS}"
            ),
            &[
                &new.for_act,
                &new.subject,
                &new.lasts_ms,
                &act.operator,
                &act.why.unwrap_or_default(),
                &new.voucher,
            ],
        )
        .await?;
    Ok(voice(session.one(&rows)?))
}
