//! Writes who has proven what again, and came to what; and what is distrusted since its key was revoked.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use uuid::Uuid;

use crate::store::judged::JudgedBatch;
use crate::{
    domain::{
        changeset::Changeset,
        reason::Reason,
        receipt::{Receipt, ReceiptKey},
    },
    fail::Point,
    store::{
        Fate,
        registry::REMEMBERED_MAX,
        write::{Rows, Write, count, params},
    },
};

const UPDATE: &str = "\
    /* batch::update_receipts */
    WITH touched AS (
        UPDATE settled.receipts AS r
        SET message_digest = n.message_digest,
            verdict = n.verdict,
            reason = n.reason,
            allocation_id = n.allocation_id,
            event_id = n.event_id,
            public_key = n.public_key,
            last_seen = n.last_seen,
            batch_id = CASE WHEN (r.verdict, r.event_id) IS DISTINCT FROM (n.verdict, n.event_id)
                            THEN $8 ELSE r.batch_id END
        FROM (
            SELECT unnest($1::uuid[]) AS key, unnest($2::bytea[]) AS message_digest, unnest($3::text[]) AS verdict,
                   unnest($4::text[]) AS reason, unnest($5::uuid[]) AS event_id, unnest($6::bytea[]) AS public_key,
                   unnest($7::timestamptz[]) AS last_seen, unnest($9::uuid[]) AS allocation_id
        ) AS n
        WHERE r.key = n.key
        RETURNING 1
    )
    SELECT settled.exactly('batch::update_receipts', count(*), $10) FROM touched";

/// In key order, so that two batches never wait for each other. Of each key as many as are remembered.
const DISTRUST: &str = "\
    /* batch::distrust */
    WITH room AS MATERIALIZED (
        SELECT k.public_key
        FROM (SELECT DISTINCT unnest($1::bytea[])) AS k (public_key)
        WHERE (
            SELECT count(*)
            FROM (SELECT FROM settled.distrusted AS d WHERE d.public_key = k.public_key LIMIT $4) AS known
        ) < $4
    )
    INSERT INTO settled.distrusted (public_key, payload_digest, at)
    SELECT n.public_key, n.payload_digest, $3
    FROM unnest($1::bytea[], $2::bytea[]) AS n (public_key, payload_digest)
    JOIN room AS r ON r.public_key = n.public_key
    ORDER BY n.public_key, n.payload_digest
    ON CONFLICT DO NOTHING";

/// A later statement than the one that adds to what is distrusted: that waits for whoever reinstates the key just now.
const STILL_REVOKED: &str = "\
    /* batch::still_revoked */
    SELECT FROM settled.partner_keys WHERE public_key = ANY ($1) AND revoked_at IS NOT NULL";

/// Receipts as columns.
#[derive(Default)]
pub(super) struct ReceiptColumns<'a> {
    pub(super) keys: Vec<Uuid>,
    pub(super) enterprise_ids: Vec<&'a str>,
    pub(super) nonces: Vec<&'a str>,
    pub(super) payload_digests: Vec<&'a [u8]>,
    pub(super) message_digests: Vec<&'a [u8]>,
    pub(super) verdicts: Vec<&'static str>,
    pub(super) reasons: Vec<Option<&'a str>>,
    pub(super) allocation_ids: Vec<Uuid>,
    pub(super) event_ids: Vec<Uuid>,
    pub(super) public_keys: Vec<&'a [u8]>,
    pub(super) last_seen: Vec<Timestamp>,
}

impl<'a> ReceiptColumns<'a> {
    pub(super) fn of(receipts: &'a BTreeMap<ReceiptKey, Receipt>) -> Self {
        let mut columns = Self::default();
        for (key, receipt) in receipts {
            columns.keys.push(key.0);
            columns.enterprise_ids.push(&receipt.enterprise_id);
            columns.nonces.push(&receipt.nonce);
            columns.payload_digests.push(&receipt.payload_digest);
            columns.message_digests.push(&receipt.message_digest);
            columns.verdicts.push(receipt.verdict.as_str());
            columns.reasons.push(receipt.reason.as_ref().map(Reason::as_str));
            columns.allocation_ids.push(receipt.allocation_id);
            columns.event_ids.push(receipt.event_id);
            columns.public_keys.push(receipt.public_key.as_bytes());
            columns.last_seen.push(receipt.last_seen);
        }
        columns
    }
}

/// A receipt that is only seen again keeps the batch that gave its verdict.
pub(super) fn update<'a>(outcome: &JudgedBatch<'a>) -> Write<'a> {
    let receipts = &outcome.changes.changed_receipts;
    let columns = ReceiptColumns::of(receipts);
    Write::unless(
        receipts.is_empty(),
        UPDATE,
        Rows::Certain(1),
        params![
            columns.keys,
            columns.message_digests,
            columns.verdicts,
            columns.reasons,
            columns.event_ids,
            columns.public_keys,
            columns.last_seen,
            outcome.id,
            columns.allocation_ids,
            count(receipts.len()),
        ],
    )
    .then(Point::ReceiptsUpdated)
}

pub(super) fn distrust<'a>(outcome: &JudgedBatch<'a>) -> Write<'a> {
    let refused = &outcome.changes.distrusted;
    let (keys, digests): (Vec<&[u8]>, Vec<&[u8]>) = refused
        .iter()
        .map(|(key, digest)| (key.as_bytes().as_slice(), digest.as_slice()))
        .unzip();
    let params = params![keys, digests, outcome.now, REMEMBERED_MAX];
    Write::unless(refused.is_empty(), DISTRUST, Rows::Any, params)
}

/// A key that was reinstated while the batch was judged: what it signed is judged again, and was never refused.
pub(super) fn still_revoked(changes: &Changeset) -> Write<'_> {
    let keys: BTreeSet<&[u8]> = changes
        .distrusted
        .iter()
        .map(|(key, _)| key.as_bytes().as_slice())
        .collect();
    let keys: Vec<&[u8]> = keys.into_iter().collect();
    let sentence = "a key was reinstated while what it signed was refused";
    let rows = Rows::Or(keys.len(), Fate::Retry, sentence);
    Write::unless(keys.is_empty(), STILL_REVOKED, rows, params![keys])
}
