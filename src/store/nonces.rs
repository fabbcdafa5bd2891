//! A nonce that is made unusable. What has settled can not be taken back.

use serde_json::{Value, json};

use super::{
    Store, StoreError,
    audit::{Act, write_audit},
    life::{RECEIPT_COLUMNS, ReceiptRecord, receipt},
    registry::By,
};
use crate::domain::{reason::Reason, receipt::ReceiptKey, verdict::VerdictKind};

/// What came of voiding a nonce, with its receipt as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Voided {
    /// Nothing settles with it any more. If its message waited for a reservation, it waits no more.
    Voided { receipt: ReceiptRecord, was_parked: bool },
    /// It was voided before.
    Exists(ReceiptRecord),
    /// It is refused for good already.
    Final(ReceiptRecord),
    /// Its effect is there: it settled, or said what had settled.
    Settled(ReceiptRecord),
    /// No authentic message with it was ever seen.
    Unknown,
}

impl Store {
    /// Makes a nonce unusable, from the next batch on. Waits for the batch that judges a message with it just now, and that
    /// batch for this; a message that waits for its reservation is due at once, to be refused.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn void_nonce(&self, enterprise_id: &str, nonce: &str, by: By<'_>) -> Result<Voided, StoreError> {
        let session = self.session("void_nonce").await?;
        session.begin().await?;
        let key = ReceiptKey::new(enterprise_id, nonce).0;
        // The receipt first and then who waits, as a batch locks them.
        let rows = session
            .query(
                &format!(
                    "/* nonces::void_nonce receipt */
                    SELECT {RECEIPT_COLUMNS}
                    FROM settled.receipts
                    WHERE key = $1
                      AND enterprise_id = $2
                      AND nonce = $3
                    FOR NO KEY UPDATE"
                ),
                &[&key, &enterprise_id, &nonce],
            )
            .await?;
        let Some(before) = rows.first().map(receipt) else {
            session.rollback().await;
            return Ok(Voided::Unknown);
        };
        if let Some(refusal) = no_more(&before) {
            session.rollback().await;
            return Ok(refusal);
        }
        let rows = session
            .query(
                &format!(
                    "/* nonces::void_nonce */
                    UPDATE settled.receipts
                    SET voided_at = date_trunc('milliseconds', clock_timestamp())
                    WHERE key = $1
                    RETURNING {RECEIPT_COLUMNS}"
                ),
                &[&key],
            )
            .await?;
        let voided = receipt(session.one(&rows)?);
        // As a reservation wakes it: see `parked.leased_until`.
        let woken = session
            .execute(
                "/* nonces::void_nonce wake */
                WITH woken AS (
                    UPDATE settled.parked
                    SET due_at = least(due_at, $2)
                    WHERE key = $1
                    RETURNING key, allocation_id
                )
                INSERT INTO settled.parkings (key, allocation_id, step, at)
                SELECT key, allocation_id, 'woken', $2
                FROM woken",
                &[&key, &voided.voided_at],
            )
            .await?;
        let was_parked = woken > 0;
        let about = json!({"enterpriseId": enterprise_id, "nonce": nonce});
        let act = Act {
            name: "nonce void",
            operator: by.operator,
            why: by.why,
            filters: &about,
            voucher: None,
        };
        write_audit(&session, act, &outcome(&before), None).await?;
        session.commit().await?;
        Ok(Voided::Voided {
            receipt: voided,
            was_parked,
        })
    }
}

/// Why there is nothing to void.
fn no_more(receipt: &ReceiptRecord) -> Option<Voided> {
    // What a later version calls otherwise is no refusal that could be taken back.
    match VerdictKind::parse(&receipt.verdict) {
        Some(VerdictKind::Settled | VerdictKind::Duplicate) | None => return Some(Voided::Settled(receipt.clone())),
        Some(VerdictKind::Parked | VerdictKind::Rejected) => {}
    }
    if receipt.voided_at.is_some() {
        return Some(Voided::Exists(receipt.clone()));
    }
    let reason = receipt.reason.as_deref().map(Reason::written);
    reason
        .is_some_and(Reason::is_final)
        .then(|| Voided::Final(receipt.clone()))
}

fn outcome(before: &ReceiptRecord) -> Value {
    json!({"allocationId": before.allocation_id, "verdict": before.verdict, "reason": before.reason})
}
