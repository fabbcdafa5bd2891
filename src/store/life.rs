//! What a person asks afterwards: one allocation, one receipt, one life. Read-only, and each answer is of one moment.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use jiff::Timestamp;
use serde::Serialize;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    Session, Store, StoreError,
    allocations::{allocation, select_allocations},
    letters::{self, DeadLetter, Replayed},
    subject::Subject,
    time::{maybe_time, time},
    told::{self, ToldRecord},
};
use crate::domain::{allocation::Allocation, receipt::ReceiptKey};

/// Rows of one kind that a life shows at most: a partner may ask for the same allocation again and again.
const LIFE_MAX: i64 = 500;

/// What became of one message, as kept for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReceiptRecord {
    pub enterprise_id: String,
    pub nonce: String,
    pub verdict: String,
    pub reason: Option<String>,
    pub payload_digest: String,
    pub message_digest: String,
    pub allocation_id: Uuid,
    pub event_id: Uuid,
    #[serde(serialize_with = "time")]
    pub first_seen: Timestamp,
    #[serde(serialize_with = "time")]
    pub last_seen: Timestamp,
    /// Since when the nonce is unusable, by an operator's word.
    #[serde(serialize_with = "maybe_time", skip_serializing_if = "Option::is_none")]
    pub voided_at: Option<Timestamp>,
    #[serde(skip)]
    pub key: Uuid,
    /// The batch that gave the verdict.
    #[serde(skip)]
    pub batch_id: Uuid,
}

pub(super) const RECEIPT_COLUMNS: &str = "\
    key, enterprise_id, nonce, verdict, reason, payload_digest, message_digest, allocation_id, event_id, first_seen,
    last_seen, voided_at, batch_id";

pub(super) fn receipt(row: &Row) -> ReceiptRecord {
    ReceiptRecord {
        enterprise_id: row.get("enterprise_id"),
        nonce: row.get("nonce"),
        verdict: row.get("verdict"),
        reason: row.get("reason"),
        payload_digest: hex::encode(row.get::<_, &[u8]>("payload_digest")),
        message_digest: hex::encode(row.get::<_, &[u8]>("message_digest")),
        allocation_id: row.get("allocation_id"),
        event_id: row.get("event_id"),
        first_seen: row.get("first_seen"),
        last_seen: row.get("last_seen"),
        voided_at: row.get("voided_at"),
        key: row.get("key"),
        batch_id: row.get("batch_id"),
    }
}

/// A step of a parked message: `parked`, `woken` or `left`.
#[derive(Clone, Debug)]
pub struct ParkingRecord {
    pub key: Uuid,
    pub allocation_id: Uuid,
    pub step: String,
    pub at: Timestamp,
}

/// A movement of an allocation's funds.
#[derive(Clone, Debug)]
pub struct TransferRecord {
    pub allocation_id: Uuid,
    /// `reserved`, `cleared` or `released`.
    pub event: String,
    pub debit: String,
    pub credit: String,
    pub currency: String,
    pub amount: String,
    /// The batch that settled it; none for the reservation.
    pub batch_id: Option<Uuid>,
    pub at: Timestamp,
}

/// What authorised a settlement.
#[derive(Clone, Debug)]
pub struct SettlementRecord {
    pub allocation_id: Uuid,
    pub enterprise_id: String,
    pub nonce: String,
    pub public_key: String,
    pub batch_id: Uuid,
    pub at: Timestamp,
}

/// A batch, and whether its publications still wait for the broker's confirms.
#[derive(Clone, Debug)]
pub struct BatchRecord {
    pub worker: String,
    /// `queue` or `parked`.
    pub source: String,
    pub at: Timestamp,
    pub pending: bool,
}

/// All that is known of some allocations and messages, of one moment.
#[derive(Clone, Debug, Default)]
pub struct Life {
    pub allocations: Vec<Allocation>,
    pub receipts: Vec<ReceiptRecord>,
    /// Every refusal and every parking, as it was told first.
    pub told: Vec<ToldRecord>,
    pub parkings: Vec<ParkingRecord>,
    pub transfers: Vec<TransferRecord>,
    pub settlements: Vec<SettlementRecord>,
    pub batches: BTreeMap<Uuid, BatchRecord>,
    pub dead_letters: Vec<DeadLetter>,
    /// With the dead letter that each is of.
    pub replays: Vec<(Uuid, Replayed)>,
    /// Batch and event of what the broker refused.
    pub set_aside: HashSet<(Uuid, Uuid)>,
    /// The same of what was refused, and is in the outbox again.
    pub put_back: HashSet<(Uuid, Uuid)>,
    /// There was more than is shown.
    pub cut: bool,
}

impl Store {
    /// One allocation.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn allocation(&self, id: Uuid) -> Result<Option<Allocation>, StoreError> {
        let session = self.session("allocation").await?;
        let rows = session
            .query(&select_allocations("life::allocation", "WHERE a.id = $1"), &[&id])
            .await?;
        rows.first().map(|row| allocation(&session, row)).transpose()
    }

    /// What became of a nonce.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn receipt(&self, enterprise_id: &str, nonce: &str) -> Result<Option<ReceiptRecord>, StoreError> {
        let rows = self
            .session("receipt")
            .await?
            .query(
                &format!(
                    "/* life::receipt */
                    SELECT {RECEIPT_COLUMNS}
                    FROM settled.receipts
                    WHERE key = $1"
                ),
                &[&ReceiptKey::new(enterprise_id, nonce).0],
            )
            .await?;
        Ok(rows.first().map(receipt))
    }

    /// Everything about some subjects, in one moment. A message brings its allocation along.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn life(&self, subjects: &[Subject]) -> Result<Life, StoreError> {
        let mut session = self.session("life").await?;
        session.begin_long().await?;
        let mut life = Life::default();
        let mut ids = BTreeSet::new();
        for subject in subjects {
            let rows = match subject {
                Subject::Allocation(id) => {
                    ids.insert(*id);
                    receipts_where(&session, OF_ALLOCATION, &id).await?
                }
                Subject::Nonce(nonce) => {
                    let keys = keys_of(&session, nonce).await?;
                    receipts_where(&session, "key = ANY ($1)", &keys).await?
                }
                Subject::Digest(digest) => {
                    let digest = digest.as_slice();
                    receipts_where(&session, "message_digest = $1 OR payload_digest = $1", &digest).await?
                }
            };
            life.cut |= rows.len() > LIFE_MAX as usize;
            for row in rows.iter().take(LIFE_MAX as usize) {
                let receipt = receipt(row);
                ids.insert(receipt.allocation_id);
                life.receipts.push(receipt);
            }
        }
        let digests: Vec<&[u8]> = subjects.iter().filter_map(Subject::digest).collect();
        life.told = told::of_messages(&session, &digests, LIFE_MAX + 1).await?;
        // A body that is not the newest of its receipt's.
        let known: BTreeSet<Uuid> = life.receipts.iter().map(|receipt| receipt.key).collect();
        let proven = life.told.iter().filter(|told| told.proven);
        let keys: Vec<Uuid> = proven
            .filter_map(|told| told.key)
            .filter(|key| !known.contains(key))
            .collect();
        if !keys.is_empty() {
            for row in receipts_where(&session, "key = ANY ($1)", &keys).await? {
                let receipt = receipt(&row);
                ids.insert(receipt.allocation_id);
                life.receipts.push(receipt);
            }
        }
        life.receipts.sort_by_key(|receipt| (receipt.first_seen, receipt.key));
        life.receipts.dedup_by_key(|receipt| receipt.key);
        fill_refusals(&session, &mut life, subjects).await?;
        fill(&session, &mut life, ids.into_iter().collect()).await?;
        session.rollback().await;
        Ok(life)
    }
}

/// Those that did not settle it stand in an index of their own; the one that did is named by the transfer.
const OF_ALLOCATION: &str = "\
    key = ANY (ARRAY(
        SELECT r.key FROM settled.receipts AS r WHERE r.allocation_id = $1 AND r.verdict <> 'settled'
        UNION ALL
        SELECT t.receipt_key FROM settled.transfers AS t WHERE t.subject_id = $1 AND t.step = 1
    ))";

async fn receipts_where(
    session: &Session,
    condition: &str,
    what: &(dyn tokio_postgres::types::ToSql + Sync),
) -> Result<Vec<Row>, StoreError> {
    session
        .query(
            &format!(
                "/* life::life receipts */
                SELECT {RECEIPT_COLUMNS}
                FROM settled.receipts
                WHERE {condition}
                ORDER BY first_seen, key
                LIMIT {LIFE_MAX} + 1"
            ),
            &[what],
        )
        .await
}

/// The receipts that a nonce may have, one for each partner.
async fn keys_of(session: &Session, nonce: &str) -> Result<Vec<Uuid>, StoreError> {
    let rows = session
        .query(
            "/* life::life partners */ SELECT enterprise_id FROM settled.partners",
            &[],
        )
        .await?;
    Ok(rows.iter().map(|row| ReceiptKey::new(row.get(0), nonce).0).collect())
}

/// What hangs on receipts and allocations.
async fn fill(session: &Session, life: &mut Life, ids: Vec<Uuid>) -> Result<(), StoreError> {
    let rows = session
        .query(
            &select_allocations("life::life allocations", "WHERE a.id = ANY ($1) ORDER BY a.id"),
            &[&ids],
        )
        .await?;
    for row in &rows {
        life.allocations.push(allocation(session, row)?);
    }
    let keys: Vec<Uuid> = life.receipts.iter().map(|receipt| receipt.key).collect();
    let rows = session
        .query(
            &format!(
                "/* life::life parkings */
                SELECT key, allocation_id, step, at
                FROM settled.parkings
                WHERE key = ANY ($1)
                ORDER BY at, id
                LIMIT {LIFE_MAX} + 1"
            ),
            &[&keys],
        )
        .await?;
    life.cut |= rows.len() > LIFE_MAX as usize;
    life.parkings = rows
        .iter()
        .take(LIFE_MAX as usize)
        .map(|row| ParkingRecord {
            key: row.get("key"),
            allocation_id: row.get("allocation_id"),
            step: row.get("step"),
            at: row.get("at"),
        })
        .collect();
    let rows = session
        .query(
            "/* life::life transfers */
            SELECT t.subject_id, t.event, settled.kind_of(t.debit_account) AS debit,
                   settled.kind_of(t.credit_account) AS credit, f.currency, t.amount::text AS amount, t.batch_id, t.created_at
            FROM settled.transfers AS t
            JOIN settled.funds AS f ON f.id = t.debit_account / 4
            WHERE t.subject_id = ANY ($1)
            ORDER BY t.subject_id, t.step",
            &[&ids],
        )
        .await?;
    life.transfers = rows
        .iter()
        .map(|row| TransferRecord {
            allocation_id: row.get("subject_id"),
            event: row.get("event"),
            debit: row.get("debit"),
            credit: row.get("credit"),
            currency: row.get("currency"),
            amount: row.get("amount"),
            batch_id: row.get("batch_id"),
            at: row.get("created_at"),
        })
        .collect();
    let rows = session
        .query(
            "/* life::life settlements */
            SELECT allocation_id, enterprise_id, nonce, public_key, batch_id, settled_at
            FROM settled.settlements
            WHERE allocation_id = ANY ($1)
            ORDER BY allocation_id",
            &[&ids],
        )
        .await?;
    life.settlements = rows
        .iter()
        .map(|row| SettlementRecord {
            allocation_id: row.get("allocation_id"),
            enterprise_id: row.get("enterprise_id"),
            nonce: row.get("nonce"),
            public_key: hex::encode(row.get::<_, &[u8]>("public_key")),
            batch_id: row.get("batch_id"),
            at: row.get("settled_at"),
        })
        .collect();
    fill_batches(session, life).await
}

/// What was refused and parked of these lives: as it was told, and as the dead letters keep it.
async fn fill_refusals(session: &Session, life: &mut Life, subjects: &[Subject]) -> Result<(), StoreError> {
    let is_too_many = |count: usize| count > LIFE_MAX as usize;
    // A message by its payload is known to the dead letters by its nonce, and by its body's digest.
    let mut wider = subjects.to_vec();
    for receipt in &life.receipts {
        wider.push(Subject::Nonce(receipt.nonce.clone()));
        wider.extend(digest(&receipt.message_digest).map(Subject::Digest));
    }
    let (mut dead_letters, replays) = letters::refusals(session, &wider, LIFE_MAX + 1).await?;
    life.cut |= is_too_many(dead_letters.len());
    // The same nonce of another partner's is another life, unless it was asked for.
    dead_letters.retain(|dead_letter| {
        subjects.iter().any(|subject| is_about(dead_letter, subject))
            || life.receipts.iter().any(|receipt| {
                let same = (dead_letter.enterprise_id.as_deref(), dead_letter.nonce.as_deref());
                same == (Some(&receipt.enterprise_id), Some(&receipt.nonce))
                    || dead_letter.message_digest == receipt.message_digest
            })
    });
    dead_letters.truncate(LIFE_MAX as usize);
    (life.dead_letters, life.replays) = (dead_letters, replays);

    let mut keys: Vec<Uuid> = life.receipts.iter().map(|receipt| receipt.key).collect();
    let named = |dead_letter: &DeadLetter| {
        let names = dead_letter.enterprise_id.as_deref().zip(dead_letter.nonce.as_deref());
        names.map(|(enterprise_id, nonce)| ReceiptKey::new(enterprise_id, nonce).0)
    };
    keys.extend(life.dead_letters.iter().filter_map(named));
    let allocations: Vec<Uuid> = subjects.iter().filter_map(Subject::allocation).collect();
    let told = told::of(session, &keys, &allocations, LIFE_MAX + 1).await?;
    life.told.extend(told);
    let digests: Vec<[u8; 32]> = life
        .dead_letters
        .iter()
        .filter(|dead_letter| dead_letter.nonce.is_none())
        .filter_map(|dead_letter| digest(&dead_letter.message_digest))
        .collect();
    let asked: BTreeSet<&[u8]> = subjects.iter().filter_map(Subject::digest).collect();
    let others: Vec<&[u8]> = digests
        .iter()
        .map(<[u8; 32]>::as_slice)
        .filter(|digest| !asked.contains(digest))
        .collect();
    life.told
        .extend(told::of_messages(session, &others, LIFE_MAX + 1).await?);
    life.told.sort_by_key(|told| (told.at, told.event_id));
    life.told.dedup_by_key(|told| told.event_id);
    life.cut |= is_too_many(life.told.len());
    life.told.truncate(LIFE_MAX as usize);
    Ok(())
}

fn digest(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    Some(bytes)
}

/// The batches, and what became of their publications.
async fn fill_batches(session: &Session, life: &mut Life) -> Result<(), StoreError> {
    let receipts = life.receipts.iter().map(|receipt| (receipt.batch_id, receipt.event_id));
    let told = life.told.iter().map(|told| (told.batch_id, told.event_id));
    let (batches, events): (Vec<Uuid>, Vec<Uuid>) = receipts.chain(told).unzip();
    let mut wanted: BTreeSet<Uuid> = batches.iter().copied().collect();
    wanted.extend(life.settlements.iter().map(|settlement| settlement.batch_id));
    let wanted: Vec<Uuid> = wanted.into_iter().collect();
    let rows = session
        .query(
            "/* life::life batches */
            SELECT b.id, b.worker, b.source, b.at,
                   EXISTS (SELECT FROM settled.outbox AS o WHERE o.batch_id = b.id) AS pending
            FROM settled.batches AS b
            WHERE b.id = ANY ($1)",
            &[&wanted],
        )
        .await?;
    life.batches = rows
        .iter()
        .map(|row| {
            let batch = BatchRecord {
                worker: row.get("worker"),
                source: row.get("source"),
                at: row.get("at"),
                pending: row.get("pending"),
            };
            (row.get("id"), batch)
        })
        .collect();
    // A publication's head is JSON text and holds the event's id; few were ever refused.
    let rows = session
        .query(
            "/* life::life set aside */
            SELECT DISTINCT w.batch_id, w.event_id
            FROM unnest($1::uuid[], $2::uuid[]) AS w (batch_id, event_id)
            JOIN settled.outbox_refused AS r ON r.batch_id = w.batch_id
            WHERE position(convert_to(w.event_id::text, 'UTF8') IN r.publications) > 0",
            &[&batches, &events],
        )
        .await?;
    life.set_aside = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let rows = session
        .query(
            "/* life::life put back */
            SELECT DISTINCT w.batch_id, w.event_id
            FROM unnest($1::uuid[], $2::uuid[]) AS w (batch_id, event_id)
            JOIN settled.outbox AS o ON o.of_batch = w.batch_id
            WHERE position(convert_to(w.event_id::text, 'UTF8') IN o.publications) > 0",
            &[&batches, &events],
        )
        .await?;
    life.put_back = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    Ok(())
}

fn is_about(dead_letter: &DeadLetter, subject: &Subject) -> bool {
    match subject {
        Subject::Allocation(id) => dead_letter.allocation_id == Some(*id),
        Subject::Nonce(nonce) => dead_letter.nonce.as_ref() == Some(nonce),
        Subject::Digest(digest) => dead_letter.message_digest == hex::encode(digest),
    }
}
