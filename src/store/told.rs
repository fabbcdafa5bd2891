//! What was told first under an event's id: see [`crate::domain::told`].

use std::{collections::HashMap, time::Duration};

use futures_util::join;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Session, Store, StoreError, outbox};
use crate::domain::{
    delivery::BatchId,
    reason::Reason,
    told::{First, Firsts, Tellings},
};

const REMEMBER: &str = "\
    /* told::remember */
    INSERT INTO settled.told (event_id, at, verdict, reason, proven, digest, key, allocation_id, words, batch_id)
    SELECT n.*, $10
    FROM unnest(
        $1::uuid[], $2::timestamptz[], $3::text[], $4::text[], $5::boolean[], $6::bytea[], $7::uuid[], $8::uuid[],
        $9::bytea[]
    ) AS n
    ON CONFLICT (event_id) DO NOTHING";

/// A statement of its own: it sees what another batch committed while the one before waited for it.
const FIRST: &str = "\
    /* told::first */
    SELECT event_id, at, words
    FROM settled.told
    WHERE event_id = ANY ($1)";

/// The words of an event, and what names its life where no receipt does.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Words<F> {
    #[serde(flatten)]
    first: F,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    enterprise_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nonce: Option<String>,
    /// For versions that do not know the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    class: Option<u16>,
    #[serde(default, rename = "final", skip_serializing_if = "Option::is_none")]
    is_final: Option<bool>,
}

fn first(row: &Row) -> Option<Words<First>> {
    let mut words: Words<First> = serde_json::from_slice(row.get("words")).ok()?;
    words.first.at = row.get("at");
    Some(words)
}

/// In the order of the ids, so that two batches never wait for each other. One round trip.
pub(super) async fn remember(session: &Session, id: BatchId, tellings: &Tellings) -> Result<Firsts, StoreError> {
    if session.skips(tellings.is_empty()) {
        return Ok(Firsts::new());
    }
    for sql in [REMEMBER, FIRST] {
        session.prepare(sql).await?;
    }
    let each = || tellings.told.values();
    let ids: Vec<Uuid> = tellings.told.keys().copied().collect();
    let asked: Vec<Uuid> = ids.iter().chain(&tellings.answered).copied().collect();
    let times: Vec<Timestamp> = each().map(|telling| telling.first.at).collect();
    let verdicts: Vec<&str> = each().map(|telling| telling.verdict.as_str()).collect();
    let reasons: Vec<&str> = each().map(|telling| telling.reason.as_str()).collect();
    let proven: Vec<bool> = each().map(|telling| telling.proven).collect();
    let digests: Vec<&[u8]> = each().map(|telling| telling.digest.as_slice()).collect();
    let keys: Vec<Option<Uuid>> = each().map(|telling| telling.key.map(|key| key.0)).collect();
    let allocations: Vec<Option<Uuid>> = each().map(|telling| telling.allocation_id).collect();
    let words: Result<Vec<Vec<u8>>, StoreError> = each()
        .map(|telling| {
            let words = Words {
                first: &telling.first,
                enterprise_id: telling.enterprise_id.clone(),
                nonce: telling.nonce.clone(),
                class: Some(telling.reason.class()),
                is_final: Some(telling.reason.is_final()),
            };
            serde_json::to_vec(&words).map_err(|error| outbox::unwritable(&error))
        })
        .collect();
    let words = words?;
    let answers = join!(
        async {
            if session.skips(ids.is_empty()) {
                return Ok(0);
            }
            session
                .execute(
                    REMEMBER,
                    &[
                        &ids,
                        &times,
                        &verdicts,
                        &reasons,
                        &proven,
                        &digests,
                        &keys,
                        &allocations,
                        &words,
                        &id,
                    ],
                )
                .await
        },
        async { session.query(FIRST, &[&asked]).await },
    );
    answers.0?;
    let mut firsts = Firsts::new();
    for row in answers.1? {
        // What a later version wrote in a way of its own is told in our words.
        if let Some(words) = first(&row) {
            firsts.insert(row.get("event_id"), words.first);
        }
    }
    Ok(firsts)
}

const REASONS: &str = "\
    /* told::reasons */
    SELECT event_id, reason, at, words
    FROM settled.told
    WHERE event_id = ANY ($1)";

/// The reason of events, with what was told beside it, and the detail. For reasons that this version does not know.
pub(super) async fn reasons(
    session: &Session,
    event_ids: &[Uuid],
) -> Result<HashMap<Uuid, (Reason, String)>, StoreError> {
    let mut reasons = HashMap::new();
    for row in session.query(REASONS, &[&event_ids]).await? {
        if let Some(words) = first(&row) {
            let reason = Reason::written(row.get("reason")).with(words.class, words.is_final);
            reasons.insert(row.get("event_id"), (reason, words.first.detail));
        }
    }
    Ok(reasons)
}

/// An event of a refusal or a parking, the first time it was told.
#[derive(Clone, Debug)]
pub struct ToldRecord {
    pub event_id: Uuid,
    pub at: Timestamp,
    pub batch_id: Uuid,
    /// `parked` or `rejected`.
    pub verdict: String,
    pub reason: String,
    pub proven: bool,
    pub message_digest: String,
    /// As of a receipt.
    pub key: Option<Uuid>,
    pub allocation_id: Option<Uuid>,
    pub enterprise_id: Option<String>,
    pub nonce: Option<String>,
}

fn record(row: &Row) -> ToldRecord {
    let (enterprise_id, nonce) = first(row).map_or((None, None), |words| (words.enterprise_id, words.nonce));
    ToldRecord {
        event_id: row.get("event_id"),
        at: row.get("at"),
        batch_id: row.get("batch_id"),
        verdict: row.get("verdict"),
        reason: row.get("reason"),
        proven: row.get("proven"),
        message_digest: hex::encode(row.get::<_, &[u8]>("digest")),
        key: row.get("key"),
        allocation_id: row.get("allocation_id"),
        enterprise_id,
        nonce,
    }
}

const COLUMNS: &str = "event_id, at, batch_id, verdict, reason, proven, digest, key, allocation_id, words";

/// What was told of some lives. Of strangers last: they can not push out what was proven.
pub(super) async fn of(
    session: &Session,
    keys: &[Uuid],
    allocations: &[Uuid],
    limit: i64,
) -> Result<Vec<ToldRecord>, StoreError> {
    let rows = session
        .query(
            &format!(
                "/* told::of */
                SELECT {COLUMNS}
                FROM settled.told
                WHERE key = ANY ($1) OR allocation_id = ANY ($2)
                ORDER BY proven DESC, seq
                LIMIT $3"
            ),
            &[&keys, &allocations, &limit],
        )
        .await?;
    Ok(rows.iter().map(record).collect())
}

/// What was told of messages with these bytes. Reads every row there is.
pub(super) async fn of_messages(
    session: &Session,
    digests: &[&[u8]],
    limit: i64,
) -> Result<Vec<ToldRecord>, StoreError> {
    if digests.is_empty() {
        return Ok(Vec::new());
    }
    let rows = session
        .query(
            &format!(
                "/* told::of_messages */
                SELECT {COLUMNS}
                FROM settled.told
                WHERE digest = ANY ($1)
                ORDER BY proven DESC, seq
                LIMIT $2"
            ),
            &[&digests, &limit],
        )
        .await?;
    Ok(rows.iter().map(record).collect())
}

/// Rows that are forgotten in one statement.
const FORGET_AT_ONCE: i64 = 5_000;
/// And statements of one round.
const FORGET_ROUNDS: usize = 20;

impl Store {
    /// Forgets what strangers brought about, the oldest first: what is older than that, and what is more than that. What a
    /// proven sender's life went through stays. Says how many were forgotten.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn forget_told(&self, age: Duration, most: u64) -> Result<u64, StoreError> {
        let session = self.session("forget_told").await?;
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let mut forgotten = 0;
        for _ in 0..FORGET_ROUNDS {
            let now = session
                .execute(
                    "/* told::forget_told */
                    WITH top AS (
                        SELECT max(seq) AS seq FROM settled.told WHERE NOT proven
                    ), oldest AS MATERIALIZED (
                        SELECT event_id, seq, at FROM settled.told WHERE NOT proven ORDER BY seq LIMIT $3
                    )
                    DELETE FROM settled.told AS t
                    USING oldest AS o, top
                    WHERE t.event_id = o.event_id
                      AND NOT t.proven
                      AND (o.at < clock_timestamp() - make_interval(secs => $1) OR o.seq <= top.seq - $2)",
                    &[&age.as_secs_f64(), &most, &FORGET_AT_ONCE],
                )
                .await?;
            forgotten += now;
            if now < FORGET_AT_ONCE.unsigned_abs() {
                break;
            }
        }
        Ok(forgotten)
    }
}
