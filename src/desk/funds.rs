//! Funds that come in and go out.

use serde::Serialize;
use uuid::Uuid;

use super::{Desk, Refusal};
pub use crate::store::funds::FundsWay;
use crate::{
    domain::ledger::Amount,
    store::{funds::FundsMoved, registry::By},
};

/// Funds of a client that are to move.
#[derive(Clone, Debug)]
pub struct FundsWish {
    pub client_id: Uuid,
    pub amount: Amount,
    /// What tells it from the client's others of the same way.
    pub reference: String,
}

/// Funds that moved, now or before.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FundsTold {
    pub client_id: Uuid,
    #[serde(flatten)]
    pub amount: Amount,
    pub reference: String,
    /// `deposited`, `withdrawn`; `exists`: it moved before, and nothing was changed.
    pub result: &'static str,
}

impl Desk {
    /// Every currency that the books have ever held.
    ///
    /// # Errors
    /// The database is away.
    pub async fn currencies(&self) -> Result<Vec<String>, Refusal> {
        Ok(self.patiently(async || self.store.currencies().await).await?)
    }

    /// Funds come in or go out, once per client and reference.
    ///
    /// # Errors
    /// Other funds moved under this reference; the client has less available; the database is away.
    pub async fn move_funds(&self, way: FundsWay, wish: FundsWish, by: By<'_>) -> Result<FundsTold, Refusal> {
        let FundsWish {
            client_id,
            amount,
            reference,
        } = wish;
        let moved = self
            .patiently(async || self.store.move_funds(way, client_id, &amount, &reference, by).await)
            .await?;
        let what = match way {
            FundsWay::In => "deposit",
            FundsWay::Out => "withdrawal",
        };
        let result = match (moved, way) {
            (FundsMoved::Moved, FundsWay::In) => "deposited",
            (FundsMoved::Moved, FundsWay::Out) => "withdrawn",
            (FundsMoved::Exists, _) => "exists",
            (FundsMoved::Insufficient, _) => {
                return Err(Refusal::refused(format!(
                    "client {client_id} has less than {} {} available; nothing was changed",
                    amount.quantity, amount.currency
                ))
                .hint("`settled ledger balances` shows what is available; what is held or allocated can not go out"));
            }
            (FundsMoved::Conflict(earlier), _) => {
                let differs: Vec<String> = [
                    ("currency", earlier.currency, amount.currency),
                    ("quantity", earlier.quantity.to_string(), amount.quantity.to_string()),
                ]
                .into_iter()
                .filter(|(_, is, given)| is != given)
                .map(|(what, is, given)| format!("its {what} is {is}, and {given} was given"))
                .collect();
                return Err(Refusal::refused(format!(
                    "client {client_id} has another {what} under the reference {reference:?} ({}); nothing was changed",
                    differs.join("; ")
                ))
                .hint(format!(
                    "a reference is used once per client: choose another if this is another {what}"
                )));
            }
        };
        Ok(FundsTold {
            client_id,
            amount,
            reference,
            result,
        })
    }
}
