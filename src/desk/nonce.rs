//! A nonce that is made unusable.

use serde::Serialize;

use super::{Author, Desk, ReceiptRecord, Refusal};
use crate::store::{nonces::Voided, registry::By};

/// What became of a nonce that was to be made unusable.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NonceVoided {
    #[serde(flatten)]
    pub receipt: ReceiptRecord,
    /// `voided`; `exists`: it was voided before; `final`: it is refused for good already.
    pub result: &'static str,
    /// Its message waited for a reservation. The worker refuses it within a second, and tells so.
    pub was_parked: bool,
}

impl Desk {
    /// Makes a partner's nonce unusable: copies, replays and fresh messages with it are refused from the next batch on.
    ///
    /// # Errors
    /// No authentic message with it was ever seen, or its effect is there; the database is away.
    pub async fn void_nonce(&self, enterprise_id: &str, nonce: &str, author: &Author) -> Result<NonceVoided, Refusal> {
        let by = By {
            operator: &author.operator,
            why: Some(&author.why),
        };
        let voided = self
            .patiently(async || self.store.void_nonce(enterprise_id, nonce, by).await)
            .await?;
        let told = |receipt, result, was_parked| NonceVoided {
            receipt,
            result,
            was_parked,
        };
        Ok(match voided {
            Voided::Voided { receipt, was_parked } => told(receipt, "voided", was_parked),
            Voided::Exists(receipt) => told(receipt, "exists", false),
            Voided::Final(receipt) => told(receipt, "final", false),
            Voided::Settled(receipt) => {
                return Err(Refusal::refused(format!(
                    "the nonce {nonce:?} of {enterprise_id} has its effect on allocation {}: what has settled can not be \
                     voided; nothing was changed",
                    receipt.allocation_id
                ))
                .hint("to move the funds back, the client makes another allocation or deallocation"));
            }
            Voided::Unknown => {
                return Err(Refusal::refused(format!(
                    "no authentic message of {enterprise_id} with the nonce {nonce:?} was ever seen; nothing was changed"
                ))
                .hint("what was never proven can be kept out by its key: `settled key revoke`"));
            }
        })
    }
}
