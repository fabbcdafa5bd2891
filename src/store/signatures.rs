//! What authorised the settlements, part by part: for `settled ledger check --signatures`, which verifies them again.

use std::collections::HashMap;

use serde_json::Value;
use tokio_postgres::Row;

use super::{Store, StoreError};
use crate::domain::{
    authority::{Authorised, AuthorisedBy, AuthorisedRecord, KeyChange, KeyLife, KeyNow, Validity},
    calendar::CalendarTime,
    receipt::ReceiptKey,
    signature::PublicKey,
};

/// Settlements that are read at once. A signed text has up to 256 KiB, so this bounds what is in memory: 64 MiB a part.
const ROWS: i64 = 256;

/// How much of the table there is, in its order on disk: read in this order nothing is read twice, whatever its size. Rows are
/// only ever added, so that one stays where it is, unless the whole table is written anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableExtent {
    /// Another one once the table was written anew (VACUUM FULL, a restore).
    pub file: u32,
    pub blocks: u32,
}

/// Where a part of the table goes on: after a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowPlace(String);

/// A part of what authorised the settlements.
#[derive(Debug)]
pub struct AuthorisedPart {
    pub settlements: Vec<Authorised>,
    /// There may be more behind this row.
    pub more: Option<RowPlace>,
}

impl Store {
    /// How much there is to read.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn settlements_extent(&self) -> Result<TableExtent, StoreError> {
        let session = self.session("settlements_extent").await?;
        let rows = session
            .query(
                "/* signatures::settlements_extent */
                SELECT pg_relation_filenode('settled.transfers')::bigint,
                       pg_relation_size('settled.transfers') / current_setting('block_size')::bigint",
                &[],
            )
            .await?;
        let row = session.one(&rows)?;
        let number = |index| {
            u32::try_from(row.get::<_, i64>(index))
                .map_err(|_| StoreError::ours("settlements_extent", "the size of a table is no number of blocks"))
        };
        Ok(TableExtent {
            file: number(0)?,
            blocks: number(1)?,
        })
    }

    /// What authorised the settlements of some blocks, in one moment; `after` is where the part before ended.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn authorised(
        &self,
        blocks: std::ops::Range<u32>,
        after: Option<&RowPlace>,
    ) -> Result<AuthorisedPart, StoreError> {
        let session = self.session("authorised").await?;
        session.begin_read_only().await?;
        session
            .query(
                // Without statistics the server might read a whole table for each part.
                "/* signatures::authorised plan */
                SELECT set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true),
                       set_config('enable_seqscan', 'off', true)",
                &[],
            )
            .await?;
        // Rows are numbered from 1 in their block.
        let from = after.map_or_else(|| format!("({},0)", blocks.start), |place| place.0.clone());
        let until = format!("({},0)", blocks.end);
        let rows = session
            .query(
                "/* signatures::authorised */
                SELECT t.place::text AS place, t.subject_id, t.created_at, coalesce(t.payload, '') AS payload,
                       coalesce(t.signature, '') AS signature,
                       r.key, r.enterprise_id, r.nonce, r.payload_digest, r.public_key,
                       a.id, a.type, a.status, a.currency, a.partner_symbol, a.quantity::text AS quantity, a.client_id, a.connection_id,
                       a.partner_external_id, a.reason, a.evaluation_id, a.pending_approval_id, a.policy_result,
                       c.enterprise_id AS partner, c.partners_client_id, c.partners_connection_id
                FROM (
                    SELECT ctid AS place, subject_id, receipt_key, created_at, payload, signature
                    FROM settled.transfers
                    WHERE ctid > $1::text::tid
                      AND ctid < $2::text::tid
                      AND step = 1
                    ORDER BY ctid
                    LIMIT $3
                ) AS t
                LEFT JOIN settled.receipts AS r ON r.key = t.receipt_key
                LEFT JOIN (
                    settled.allocations AS a
                    JOIN settled.connections AS c ON c.connection_id = a.connection_id
                ) ON a.id = t.subject_id
                ORDER BY t.place",
                &[&from, &until, &ROWS],
            )
            .await?;
        session.rollback().await;
        let is_full = i64::try_from(rows.len()).is_ok_and(|read| read >= ROWS);
        let last = rows.last().filter(|_| is_full);
        Ok(AuthorisedPart {
            more: last.map(|row| RowPlace(row.get("place"))),
            settlements: rows.iter().map(authorised).collect(),
        })
    }

    /// Every key, whose it is and when it counted.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn key_lives(&self) -> Result<HashMap<PublicKey, KeyLife>, StoreError> {
        let session = self.session("key_lives").await?;
        session.begin_read_only().await?;
        let keys = session
            .query(
                "/* signatures::key_lives */
                SELECT public_key, enterprise_id, created_at, valid_from, valid_until, revoked_at
                FROM settled.partner_keys",
                &[],
            )
            .await?;
        let acts = session
            .query(
                "/* signatures::key_lives acts */
                SELECT a.filters ->> 'publicKey' AS public_key, a.act, a.at, a.outcome::text AS outcome
                FROM settled.audit AS a
                WHERE a.act LIKE 'key %'
                  AND a.filters ? 'publicKey'
                ORDER BY a.id",
                &[],
            )
            .await?;
        session.rollback().await;
        let mut changes = HashMap::<PublicKey, Vec<KeyChange>>::new();
        for row in &acts {
            if let Some(key) = PublicKey::from_hex(row.get("public_key")) {
                changes.entry(key).or_default().push(change(row)?);
            }
        }
        let mut lives = HashMap::new();
        for row in &keys {
            let key = PublicKey::stored(row.get("public_key"));
            let key = key.ok_or_else(|| StoreError::ours("key_lives", "a public key in the database is none"))?;
            let now = KeyNow {
                enterprise_id: row.get("enterprise_id"),
                registered_at: row.get("created_at"),
                validity: Validity {
                    from: row.get("valid_from"),
                    until: row.get("valid_until"),
                },
                revoked_at: row.get("revoked_at"),
            };
            lives.insert(key, KeyLife::new(now, changes.remove(&key).unwrap_or_default()));
        }
        Ok(lives)
    }
}

fn authorised(row: &Row) -> Authorised {
    let by = row.get::<_, Option<_>>("key").map(|key| AuthorisedBy {
        key: ReceiptKey(key),
        enterprise_id: row.get("enterprise_id"),
        nonce: row.get("nonce"),
        payload_digest: row.get("payload_digest"),
        public_key: row.get("public_key"),
    });
    let record = row.get::<_, Option<uuid::Uuid>>("id").map(|_| AuthorisedRecord {
        kind: row.get("type"),
        status: row.get("status"),
        currency: row.get("currency"),
        partner_symbol: row.get("partner_symbol"),
        quantity: row.get("quantity"),
        client_id: row.get("client_id"),
        connection_id: row.get("connection_id"),
        enterprise_id: row.get("partner"),
        partners_client_id: row.get("partners_client_id"),
        partners_connection_id: row.get("partners_connection_id"),
        partner_external_id: row.get("partner_external_id"),
        reason: row.get("reason"),
        evaluation_id: row.get("evaluation_id"),
        pending_approval_id: row.get("pending_approval_id"),
        policy_result: row.get("policy_result"),
    });
    Authorised {
        allocation_id: row.get("subject_id"),
        settled_at: row.get("created_at"),
        payload: row.get("payload"),
        signature: row.get("signature"),
        by,
        record,
    }
}

/// What an act of the audit did to its key.
fn change(row: &Row) -> Result<KeyChange, StoreError> {
    let outcome: Value = serde_json::from_str(row.get("outcome"))
        .map_err(|error| StoreError::ours("key_lives", format!("an act of the audit can not be read: {error}")))?;
    let time = |value: &Value| CalendarTime::parse(value.as_str()?).ok();
    let validity = |said: &Value| {
        Some(Validity {
            from: time(&said["validFrom"])?,
            until: time(&said["validUntil"]),
        })
    };
    Ok(KeyChange {
        at: row.get("at"),
        was: validity(&outcome["was"]),
        validity: validity(&outcome),
        revoked: match row.get("act") {
            "key revoke" => Some(true),
            "key reinstate" => Some(false),
            _ => None,
        },
    })
}
