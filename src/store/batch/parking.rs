//! Writes who waits for an allocation, and who waits no longer.

use std::collections::BTreeSet;

use jiff::Timestamp;
use uuid::Uuid;

use crate::store::judged::JudgedBatch;
use crate::{
    domain::changeset::Changeset,
    fail::Point,
    store::{
        StoreError, outbox,
        write::{Rows, Write, params},
    },
};

const LOCK_PARKED: &str = "\
    /* batch::lock_parked */
    SELECT FROM settled.parked WHERE key = ANY ($1) ORDER BY key FOR UPDATE";

const UNPARK: &str = "\
    /* batch::unpark */
    WITH gone AS (
        DELETE FROM settled.parked AS p
        USING unnest($1::uuid[], $3::bigint[]) AS n (key, seq)
        WHERE p.key = n.key
          AND p.seq = n.seq
        RETURNING p.key, p.allocation_id
    )
    INSERT INTO settled.parkings (key, allocation_id, step, at)
    SELECT key, allocation_id, 'left', $2 FROM gone";

const PARK: &str = "\
    /* batch::park */
    WITH made AS (
        INSERT INTO settled.parked (
            key, enterprise_id, nonce, allocation_id, exchange, routing_key, properties, body,
            parked_at, until, due_at, dead_letter_id, format, attempts
        )
        SELECT n.key, n.enterprise_id, n.nonce, n.allocation_id, n.exchange, n.routing_key, n.properties, n.body,
               n.parked_at, n.until, n.due_at,
               -- What was purged meanwhile takes no verdict: a refusal later makes a dead letter, as of any other message.
               (SELECT d.id FROM settled.dead_letters AS d WHERE d.id = n.dead_letter_id),
               $13::smallint, 0
        FROM unnest(
            $1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::text[], $6::text[], $7::text[], $8::bytea[],
            $9::timestamptz[], $10::timestamptz[], $11::timestamptz[], $12::uuid[]
        ) AS n (
            key, enterprise_id, nonce, allocation_id, exchange, routing_key, properties, body, parked_at, until, due_at,
            dead_letter_id
        )
        RETURNING key, allocation_id, parked_at
    )
    INSERT INTO settled.parkings (key, allocation_id, step, at)
    SELECT key, allocation_id, 'parked', parked_at FROM made";

const PARK_ON: &str = "\
    /* batch::park_on */
    UPDATE settled.parked AS p
    SET attempts = n.attempts,
        due_at = CASE WHEN p.due_at < p.leased_until THEN p.due_at ELSE n.due_at END,
        leased_until = NULL
    FROM unnest($1::uuid[], $2::integer[], $3::timestamptz[]) AS n (key, attempts, due_at)
    WHERE p.key = n.key";

const ASK_AGAIN: &str = "\
    /* batch::ask_again */
    UPDATE settled.parked AS p
    SET also_reply = n.reply
    FROM unnest($1::uuid[], $2::text[]) AS n (key, reply)
    WHERE p.key = n.key";

/// In key order, as settled.reserve() locks them to wake them.
pub(super) fn lock(changes: &Changeset) -> Write<'_> {
    let keys: BTreeSet<Uuid> = changes
        .unparked
        .keys()
        .chain(changes.parked_later.keys())
        .chain(changes.asked_again.keys())
        .map(|key| key.0)
        .collect();
    let keys: Vec<Uuid> = keys.into_iter().collect();
    Write::unless(keys.is_empty(), LOCK_PARKED, Rows::Any, params![keys])
}

/// Ends the waiting. Another worker may have done so already: rows are not counted.
pub(super) fn unpark<'a>(outcome: &JudgedBatch<'a>) -> Write<'a> {
    let unparked = &outcome.changes.unparked;
    let keys: Vec<Uuid> = unparked.keys().map(|key| key.0).collect();
    let seqs: Vec<i64> = unparked.values().copied().collect();
    Write::unless(unparked.is_empty(), UNPARK, Rows::Any, params![keys, outcome.now, seqs]).then(Point::Unparked)
}

/// Keeps messages until their allocation is there: body and properties as received.
pub(super) fn park<'a>(outcome: &'a JudgedBatch<'_>) -> Result<Write<'a>, StoreError> {
    let parked = &outcome.changes.newly_parked;
    let rows: Vec<_> = parked
        .values()
        .filter_map(|new| {
            outcome
                .judged
                .get(new.index)
                .map(|(message, _)| (new, message.delivery))
        })
        .collect();
    let keys: Vec<Uuid> = rows.iter().map(|(new, _)| new.key.0).collect();
    let enterprises: Vec<&str> = rows.iter().map(|(new, _)| new.enterprise_id.as_str()).collect();
    let nonces: Vec<&str> = rows.iter().map(|(new, _)| new.nonce.as_str()).collect();
    let allocations: Vec<Uuid> = rows.iter().map(|(new, _)| new.allocation_id).collect();
    let exchanges: Vec<&str> = rows.iter().map(|(_, delivery)| delivery.exchange.as_str()).collect();
    let routing_keys: Vec<&str> = rows.iter().map(|(_, delivery)| delivery.routing_key.as_str()).collect();
    let properties: Result<Vec<String>, StoreError> = rows
        .iter()
        .map(|(_, delivery)| outbox::properties_text(&delivery.properties))
        .collect();
    let bodies: Vec<&[u8]> = rows.iter().map(|(_, delivery)| delivery.body.as_slice()).collect();
    let parked_at: Vec<Timestamp> = rows.iter().map(|(new, _)| new.parked.parked_at).collect();
    let until: Vec<Timestamp> = rows.iter().map(|(new, _)| new.parked.until).collect();
    let due_at: Vec<Timestamp> = rows.iter().map(|(new, _)| new.due_at).collect();
    let dead_letters: Vec<Option<Uuid>> = rows.iter().map(|(_, delivery)| delivery.source.dead_letter()).collect();
    let write = Write::unless(
        parked.is_empty(),
        PARK,
        // Of each that is to be parked there is a message, or it is a mistake of ours.
        Rows::Exactly(parked.len()),
        params![
            keys,
            enterprises,
            nonces,
            allocations,
            exchanges,
            routing_keys,
            properties?,
            bodies,
            parked_at,
            until,
            due_at,
            dead_letters,
            outbox::FORMAT,
        ],
    );
    Ok(write.then(Point::Parked))
}

/// Lets messages wait on. One that was woken while it was judged stays due: see `parked.leased_until`.
pub(super) fn park_on(changes: &Changeset) -> Write<'_> {
    let later = &changes.parked_later;
    let keys: Vec<Uuid> = later.keys().map(|key| key.0).collect();
    let attempts: Vec<i32> = later
        .values()
        .map(|(attempts, _)| i32::try_from(*attempts).unwrap_or(i32::MAX))
        .collect();
    let due_at: Vec<Timestamp> = later.values().map(|(_, due_at)| *due_at).collect();
    Write::unless(later.is_empty(), PARK_ON, Rows::Any, params![keys, attempts, due_at]).then(Point::ParkedOn)
}

/// Keeps who asked last, so that both are answered. What this batch parked is there by now.
pub(super) fn ask_again(changes: &Changeset) -> Result<Write<'_>, StoreError> {
    let asked = &changes.asked_again;
    let keys: Vec<Uuid> = asked.keys().map(|key| key.0).collect();
    let text = |reply| {
        serde_json::to_string(reply)
            .map_err(|error| StoreError::ours("settle_batch", format!("who asked again can not be written: {error}")))
    };
    let replies: Result<Vec<String>, StoreError> = asked.values().map(text).collect();
    Ok(Write::unless(
        asked.is_empty(),
        ASK_AGAIN,
        Rows::Any,
        params![keys, replies?],
    ))
}
