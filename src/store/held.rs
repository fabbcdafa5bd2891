//! The side room: messages that are taken and acknowledged and not judged yet, in packs.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    Fate, Session, Store, StoreError, outbox,
    write::{Rows, Write, count, params},
};
use crate::{
    domain::delivery::{Cut, Delivery, Properties, Source},
    fail::Point,
};

/// Why messages are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HeldWhy {
    /// Their partner sent more than its share, while others wait.
    Share,
    /// Their partner sends faster than it may.
    Rate,
    /// They need what somebody's open transaction has locked.
    Locked,
    /// Their partner is in quarantine: none of them is judged until it is resumed.
    Quarantine,
}

impl HeldWhy {
    pub const ALL: [HeldWhy; 4] = [HeldWhy::Share, HeldWhy::Rate, HeldWhy::Locked, HeldWhy::Quarantine];

    pub fn as_str(self) -> &'static str {
        match self {
            HeldWhy::Share => "share",
            HeldWhy::Rate => "rate",
            HeldWhy::Locked => "locked",
            HeldWhy::Quarantine => "quarantine",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|why| why.as_str() == text)
    }
}

/// Messages of one owner, to be held together.
#[derive(Clone, Debug)]
pub struct Pack {
    /// The enterprise; None: nobody we know.
    pub whose: Option<String>,
    pub why: HeldWhy,
    pub deliveries: Vec<Delivery>,
    /// When they are to be judged, from now.
    pub due_in: Duration,
    /// How often it was tried.
    pub attempts: i32,
}

impl Pack {
    /// Bytes of bodies and properties.
    pub fn bytes(&self) -> u64 {
        self.deliveries.iter().map(bytes_of).sum()
    }
}

/// What a message counts for.
pub fn bytes_of(delivery: &Delivery) -> u64 {
    let bytes = delivery.body.len().saturating_add(delivery.properties.wire_len());
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// An id for each, made once: under the same one it is stored once, however often that is tried.
pub fn new_ids(packs: &[Pack]) -> Vec<Uuid> {
    packs.iter().map(|_| Uuid::now_v7()).collect()
}

/// A pack that is ours to judge, for as long as the lease runs.
#[derive(Clone, Debug)]
pub struct HeldPack {
    pub id: Uuid,
    pub pack: Pack,
}

/// Packs that were taken.
#[derive(Debug, Default)]
pub struct HeldPacks {
    pub packs: Vec<HeldPack>,
    /// Of a format that this version can not read: they wait for a version that can.
    pub unreadable: Vec<Uuid>,
}

/// How much of one owner is held for one reason.
#[derive(Clone, Debug)]
pub struct HeldTotal {
    pub whose: Option<String>,
    pub why: HeldWhy,
    pub messages: u64,
    pub bytes: u64,
    /// Since when the oldest waits.
    pub oldest: Duration,
}

/// A message that is held.
#[derive(Clone, Debug)]
pub struct HeldOne {
    pub why: String,
    pub held_at: Timestamp,
    pub due_at: Timestamp,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PackHead<Text, Properties> {
    exchange: Text,
    routing_key: Text,
    properties: Properties,
    /// Bytes of the body.
    body: usize,
    /// What it was as a whole, where the body is only the head of what came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cut: Option<Box<Cut>>,
}

/// Of a pack in which a message is cut: a version that knows nothing of that must not take its head for a whole message.
const WITH_CUT: i16 = 2;

fn format_of(deliveries: &[Delivery]) -> i16 {
    let is_cut = deliveries.iter().any(|delivery| delivery.cut.is_some());
    if is_cut { WITH_CUT } else { outbox::FORMAT }
}

/// Length of the heads, the heads as JSON, the bodies one after the other.
/// What can not be written is not held: it is acknowledged once it is.
fn encode(deliveries: &[Delivery]) -> Result<Vec<u8>, StoreError> {
    let heads: Vec<PackHead<&str, &Properties>> = deliveries
        .iter()
        .map(|delivery| PackHead {
            exchange: delivery.exchange.as_str(),
            routing_key: delivery.routing_key.as_str(),
            properties: &delivery.properties,
            body: delivery.body.len(),
            cut: delivery.cut.clone(),
        })
        .collect();
    let heads = serde_json::to_vec(&heads).map_err(|error| outbox::unwritable(&error))?;
    let len = u32::try_from(heads.len()).map_err(|error| outbox::unwritable(&error))?;
    let mut bytes = len.to_be_bytes().to_vec();
    bytes.extend(heads);
    for delivery in deliveries {
        bytes.extend(&delivery.body);
    }
    Ok(bytes)
}

fn decode(id: Uuid, format: i16, bytes: &[u8]) -> Option<Vec<Delivery>> {
    if format != outbox::FORMAT && format != WITH_CUT {
        return None;
    }
    let (len, rest) = bytes.split_first_chunk::<4>()?;
    let (heads, mut bodies) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    let heads: Vec<PackHead<String, Properties>> = serde_json::from_slice(heads).ok()?;
    heads
        .into_iter()
        .map(|head| {
            let (body, rest) = bodies.split_at_checked(head.body)?;
            bodies = rest;
            Some(Delivery {
                exchange: head.exchange,
                routing_key: head.routing_key,
                properties: head.properties,
                body: body.to_vec(),
                redelivered: false,
                cut: head.cut,
                source: Source::Held { id },
            })
        })
        .collect()
}

const HOLD: &str = "\
    /* held::hold */
    WITH made AS (
        INSERT INTO settled.held (
            id, whose, why, messages, bytes, format, content, digests, held_at, due_at, attempts
        )
        SELECT n.id, n.whose, n.why, n.messages, n.bytes, n.format, n.content, n.digests, statement_timestamp(),
               statement_timestamp() + make_interval(secs => n.due_in), n.attempts
        FROM unnest(
            $1::uuid[], $2::text[], $3::text[], $4::integer[], $5::bigint[], $6::bytea[], $7::smallint[], $8::bytea[],
            $9::float8[], $10::integer[]
        ) AS n (id, whose, why, messages, bytes, content, format, digests, due_in, attempts)
        ON CONFLICT (id) DO NOTHING
        RETURNING id, messages, held_at
    )
    INSERT INTO settled.holdings (held_id, step, messages, at)
    SELECT id, 'held', messages, held_at FROM made";

/// Says how many were not there before.
async fn hold(session: &Session, ids: &[Uuid], packs: &[Pack]) -> Result<u64, StoreError> {
    if session.skips(packs.is_empty()) {
        return Ok(0);
    }
    let whose: Vec<Option<&str>> = packs.iter().map(|pack| pack.whose.as_deref()).collect();
    let why: Vec<&str> = packs.iter().map(|pack| pack.why.as_str()).collect();
    let messages: Vec<i32> = packs
        .iter()
        .map(|pack| i32::try_from(pack.deliveries.len()).unwrap_or(i32::MAX))
        .collect();
    let bytes: Vec<i64> = packs
        .iter()
        .map(|pack| i64::try_from(pack.bytes()).unwrap_or(i64::MAX))
        .collect();
    let contents: Result<Vec<Vec<u8>>, StoreError> = packs.iter().map(|pack| encode(&pack.deliveries)).collect();
    let contents = contents?;
    let formats: Vec<i16> = packs.iter().map(|pack| format_of(&pack.deliveries)).collect();
    let digests: Vec<Vec<u8>> = packs
        .iter()
        .map(|pack| pack.deliveries.iter().flat_map(Delivery::digest).collect())
        .collect();
    let due_in: Vec<f64> = packs.iter().map(|pack| pack.due_in.as_secs_f64()).collect();
    let attempts: Vec<i32> = packs.iter().map(|pack| pack.attempts).collect();
    session
        .execute(
            HOLD,
            &[
                &ids, &whose, &why, &messages, &bytes, &contents, &formats, &digests, &due_in, &attempts,
            ],
        )
        .await
}

const LEAVE: &str = "\
    /* held::leave */
    WITH gone AS (
        DELETE FROM settled.held
        WHERE id = ANY ($1)
        RETURNING id, messages
    )
    INSERT INTO settled.holdings (held_id, step, messages, at, batch_id)
    SELECT id, 'left', messages, $2, $3 FROM gone";

/// Packs that the batch has judged leave the room. One that is not there any more was judged by another worker, after our
/// lease: then this batch is nothing new, and must not count.
pub(super) fn leave<'a>(outcome: &super::judged::JudgedBatch<'_>) -> Write<'a> {
    let mut ids: Vec<Uuid> = outcome
        .judged
        .iter()
        .filter_map(|(message, _)| match message.delivery.source {
            Source::Held { id } => Some(id),
            Source::Queue { .. } | Source::Parked { .. } | Source::Replayed { .. } | Source::Plain => None,
        })
        .collect();
    ids.sort_unstable();
    ids.dedup();
    let sentence = "held messages were judged by another worker meanwhile";
    let rows = Rows::Or(ids.len(), Fate::Overtaken, sentence);
    Write::unless(ids.is_empty(), LEAVE, rows, params![ids, outcome.now, outcome.id]).then(Point::HeldLeft)
}

/// Does what holding does, of nothing: so that a missing grant shows.
pub(super) async fn rehearse(session: &Session) -> Result<(), StoreError> {
    hold(session, &[], &[]).await.map(drop)
}

impl Store {
    /// Stores packs, in one transaction; each once, however often it is said under the same ids.
    ///
    /// # Errors
    /// Whether they are stored is unknown: say it again under the same ids.
    pub async fn hold(&self, ids: &[Uuid], packs: &[Pack]) -> Result<(), StoreError> {
        let session = self.session("hold").await?;
        let put = hold(&session, ids, packs).await?;
        session.pass(Point::Held).await?;
        if put == packs.len() as u64 {
            return session.nobody_cut_its_wait();
        }
        drop(session);
        // An earlier try put them here, and its wait for a standby may have been cut off.
        self.await_standbys().await?;
        self.are_held(ids).await
    }

    /// # Errors
    /// Not all of these packs are in the room of the server that answers: another one had them, or they were judged meanwhile.
    async fn are_held(&self, ids: &[Uuid]) -> Result<(), StoreError> {
        let session = self.session("hold").await?;
        let rows = session
            .query(
                "/* held::are_held */ SELECT count(*) FROM settled.held WHERE id = ANY ($1)",
                &[&ids],
            )
            .await?;
        if session.one(&rows)?.get::<_, i64>(0) == count(ids.len()) {
            return Ok(());
        }
        let sentence = "packs that were put into the side room are not on the server that answers now";
        Err(StoreError::new("hold", Fate::Retry, sentence))
    }

    /// Takes packs that are due: so many messages at most, or one pack; in turn of each owner's, oldest first, and none of
    /// the owners that are to wait, or of partners in quarantine.
    ///
    /// # Errors
    /// The database is away.
    pub async fn claim_held(&self, max: usize, lease: Duration, wait: &[String]) -> Result<HeldPacks, StoreError> {
        let session = self.session("claim_held").await?;
        let max = i64::try_from(max).unwrap_or(i64::MAX);
        let mut rows = session
            .query(
                "/* held::claim_held */
                WITH ranked AS (
                    SELECT id, seq, messages, row_number() OVER (PARTITION BY whose ORDER BY seq) AS turn
                    FROM settled.held
                    WHERE due_at <= statement_timestamp()
                      AND (whose IS NULL OR whose <> ALL ($3))
                      AND NOT EXISTS (
                          SELECT
                          FROM settled.partners AS q
                          WHERE q.enterprise_id = held.whose
                            AND q.quarantined_at IS NOT NULL
                      )
                ), summed AS (
                    SELECT id, messages, sum(messages) OVER (ORDER BY turn, seq) AS total
                    FROM ranked
                ), mine AS MATERIALIZED (
                    SELECT h.id
                    FROM summed AS s
                    JOIN settled.held AS h ON h.id = s.id
                    WHERE (s.total <= $1 OR s.total = s.messages)
                      AND h.due_at <= statement_timestamp()
                    FOR UPDATE OF h SKIP LOCKED
                )
                UPDATE settled.held AS h
                SET due_at = statement_timestamp() + make_interval(secs => $2),
                    leased_until = statement_timestamp() + make_interval(secs => $2)
                FROM mine AS m
                WHERE h.id = m.id
                RETURNING h.id, h.seq, h.whose, h.why, h.format, h.content, h.attempts",
                &[&max, &lease.as_secs_f64(), &wait],
            )
            .await?;
        if !rows.is_empty() {
            session.pass(Point::HeldClaimed).await?;
        }
        rows.sort_by_key(|row| row.get::<_, i64>("seq"));
        let mut claimed = HeldPacks::default();
        for row in &rows {
            let id: Uuid = row.get("id");
            match pack(id, row) {
                Some(pack) => claimed.packs.push(HeldPack { id, pack }),
                None => claimed.unreadable.push(id),
            }
        }
        Ok(claimed)
    }

    /// Cuts a pack in parts, which come in its place. Nothing, where it is not there any more.
    ///
    /// # Errors
    /// It is as it was, or cut.
    pub async fn split_held(&self, id: Uuid, parts: &[Pack]) -> Result<(), StoreError> {
        let session = self.session("split_held").await?;
        session.begin().await?;
        let gone = session
            .execute(
                "/* held::split_held */
                WITH gone AS (DELETE FROM settled.held WHERE id = $1 RETURNING id, messages)
                INSERT INTO settled.holdings (held_id, step, messages, at)
                SELECT id, 'split', messages, statement_timestamp() FROM gone",
                &[&id],
            )
            .await?;
        if gone == 0 {
            session.rollback().await;
            return Ok(());
        }
        let ids = new_ids(parts);
        hold(&session, &ids, parts).await?;
        session.commit().await
    }

    /// Lets packs wait on.
    ///
    /// # Errors
    /// They are due when their lease ends.
    pub async fn postpone_held(&self, ids: &[Uuid], wait: Duration) -> Result<(), StoreError> {
        self.session("postpone_held")
            .await?
            .execute(
                "/* held::postpone_held */
                UPDATE settled.held
                SET due_at = statement_timestamp() + make_interval(secs => $2),
                    leased_until = NULL,
                    attempts = attempts + 1
                WHERE id = ANY ($1)",
                &[&ids, &wait.as_secs_f64()],
            )
            .await
            .map(drop)
    }

    /// What waits for locks is due now: some of them are gone.
    ///
    /// # Errors
    /// They are due later.
    pub async fn wake_held(&self) -> Result<(), StoreError> {
        self.session("wake_held")
            .await?
            .execute(
                "/* held::wake_held */
                UPDATE settled.held
                SET due_at = statement_timestamp()
                WHERE id IN (
                    SELECT id
                    FROM settled.held
                    WHERE why = 'locked'
                      AND due_at > statement_timestamp()
                      AND leased_until IS NULL
                    FOR UPDATE SKIP LOCKED
                )",
                &[],
            )
            .await
            .map(drop)
    }

    /// Where a message is held, by the SHA-256 of its body. Walks through the whole room.
    ///
    /// # Errors
    /// The database is away.
    pub async fn held_of(&self, digest: &[u8; 32]) -> Result<Vec<HeldOne>, StoreError> {
        let rows = self
            .session("held_of")
            .await?
            .query(
                "/* held::held_of */
                SELECT why, held_at, due_at
                FROM settled.held
                WHERE position($1::bytea IN digests) % 32 = 1
                ORDER BY seq
                LIMIT 100",
                &[&digest.as_slice()],
            )
            .await?;
        Ok(rows
            .iter()
            .map(|row| HeldOne {
                why: row.get(0),
                held_at: row.get(1),
                due_at: row.get(2),
            })
            .collect())
    }

    /// How much is held.
    ///
    /// # Errors
    /// The database is away.
    pub async fn count_held(&self) -> Result<Vec<HeldTotal>, StoreError> {
        let rows = self
            .session("count_held")
            .await?
            .query(
                "/* held::count_held */
                SELECT whose, why, sum(messages)::bigint, sum(bytes)::bigint,
                       extract(epoch FROM clock_timestamp() - min(held_at))::float8
                FROM settled.held
                GROUP BY whose, why",
                &[],
            )
            .await?;
        let natural = |number: i64| u64::try_from(number).unwrap_or_default();
        Ok(rows
            .iter()
            .filter_map(|row| {
                Some(HeldTotal {
                    whose: row.get(0),
                    why: HeldWhy::parse(row.get(1))?,
                    messages: natural(row.get(2)),
                    bytes: natural(row.get(3)),
                    oldest: Duration::from_secs_f64(row.get::<_, f64>(4).max(0.0)),
                })
            })
            .collect())
    }
}

fn pack(id: Uuid, row: &Row) -> Option<Pack> {
    Some(Pack {
        whose: row.get("whose"),
        why: HeldWhy::parse(row.get("why"))?,
        deliveries: decode(id, row.get("format"), row.get("content"))?,
        due_in: Duration::ZERO,
        attempts: row.get("attempts"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery(routing_key: &str, body: &[u8], id: Uuid) -> Delivery {
        Delivery {
            exchange: "settlement.updates".into(),
            routing_key: routing_key.into(),
            body: body.to_vec(),
            properties: Properties {
                message_id: Some("m-1".into()),
                ..Properties::default()
            },
            redelivered: false,
            cut: None,
            source: Source::Held { id },
        }
    }

    #[test]
    fn a_pack_comes_out_as_it_went_in() {
        let id = Uuid::from_u128(7);
        let deliveries = vec![
            delivery("a.allocation.update", b"one", id),
            delivery("no key of ours", b"", id),
            delivery("b.deallocation.update", &[0, 255, 1], id),
        ];
        let bytes = encode(&deliveries).expect("it can be written");
        assert_eq!(decode(id, outbox::FORMAT, &bytes), Some(deliveries));
        assert_eq!(decode(id, WITH_CUT + 1, &bytes), None, "a later version's");
        assert_eq!(decode(id, outbox::FORMAT, &bytes[..bytes.len() - 1]), None, "cut short");
        assert_eq!(decode(id, outbox::FORMAT, &[]), None);
    }

    /// The head of what was too large comes out as that, and never as a smaller message.
    #[test]
    fn what_is_cut_is_held_as_cut_in_a_format_of_its_own() {
        let id = Uuid::from_u128(7);
        let whole = delivery("a.allocation.update", b"one", id);
        let cut = Delivery {
            cut: Some(Box::new(Cut {
                body_len: 70_000,
                digest: [9; 32],
                detail: "the body has 70000 bytes".into(),
                without_headers: true,
            })),
            ..delivery("a.allocation.update", b"its head", id)
        };
        assert_eq!(format_of(std::slice::from_ref(&whole)), outbox::FORMAT);
        let deliveries = vec![whole, cut];
        assert_eq!(format_of(&deliveries), WITH_CUT);
        let bytes = encode(&deliveries).expect("it can be written");
        assert_eq!(decode(id, WITH_CUT, &bytes), Some(deliveries.clone()));
        assert_eq!(decode(id, WITH_CUT + 1, &bytes), None, "a later version's");
        assert_eq!(deliveries[1].digest(), [9; 32], "by which it is found");
    }
}
