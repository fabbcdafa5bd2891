//! Funds that come in and go out, by the custody system's word.

use serde_json::json;
use uuid::Uuid;

use super::{
    Session, Store, StoreError,
    registry::{By, note, vanished},
};
use crate::domain::ledger::{Amount, Quantity};

/// Which way funds move between a client and the world outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FundsWay {
    In,
    Out,
}

/// What a deposit or a withdrawal came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FundsMoved {
    Moved,
    /// The same content under the same reference moved before.
    Exists,
    /// Other content moved under this reference: this.
    Conflict(Amount),
    /// The client has less available.
    Insufficient,
}

impl FundsWay {
    /// The act, as the audit and the command have it.
    pub fn act(self) -> &'static str {
        match self {
            FundsWay::In => "deposit",
            FundsWay::Out => "withdraw",
        }
    }

    /// Where it is kept.
    fn table(self) -> &'static str {
        match self {
            FundsWay::In => "deposits",
            FundsWay::Out => "withdrawals",
        }
    }
}

/// What moved under a reference before.
async fn earlier(session: &Session, way: FundsWay, client_id: Uuid, reference: &str) -> Result<Amount, StoreError> {
    let (act, table) = (way.act(), way.table());
    let rows = session
        .query(
            &format!(
                "/* funds::{act} earlier */
                SELECT currency, quantity::text AS quantity
                FROM settled.{table}
                WHERE client_id = $1
                  AND reference = $2"
            ),
            &[&client_id, &reference],
        )
        .await?;
    let row = rows
        .first()
        .ok_or_else(|| vanished(session, "what stands under the reference"))?;
    let quantity = Quantity::parse(row.get("quantity"))
        .map_err(|why| StoreError::ours(act, format!("a stored {act}'s quantity: {why}")))?;
    Ok(Amount {
        currency: row.get("currency"),
        quantity,
    })
}

impl Store {
    /// Funds come in or go out, once per client and reference.
    ///
    /// # Errors
    /// The database is away or refuses. It may be asked again: what moved is found by its reference.
    pub async fn move_funds(
        &self,
        way: FundsWay,
        client_id: Uuid,
        amount: &Amount,
        reference: &str,
        by: By<'_>,
    ) -> Result<FundsMoved, StoreError> {
        let act = way.act();
        let session = self.session(act).await?;
        session.begin().await?;
        let quantity = amount.quantity.to_string();
        let rows = session
            .query(
                &format!("/* funds::{act} */ SELECT settled.{act}($1, $2, $3::text::numeric, $4)"),
                &[&client_id, &amount.currency, &quantity, &reference],
            )
            .await?;
        let moved = match session.one(&rows)?.get::<_, &str>(0) {
            "deposited" | "withdrawn" => FundsMoved::Moved,
            "exists" => FundsMoved::Exists,
            "conflict" => FundsMoved::Conflict(earlier(&session, way, client_id, reference).await?),
            "insufficient_funds" => FundsMoved::Insufficient,
            answer => {
                return Err(StoreError::ours(
                    act,
                    format!("settled.{act}() answers {answer:?}, which this version does not know"),
                ));
            }
        };
        if moved != FundsMoved::Moved {
            session.rollback().await;
            return Ok(moved);
        }
        let about = json!({"clientId": client_id, "reference": reference});
        let outcome = json!({"currency": amount.currency, "quantity": amount.quantity});
        note(&session, by, act, &about, &outcome).await?;
        session.commit().await?;
        Ok(moved)
    }
}
