//! What the worker would come to, by the worker's own code, without effect.

use serde::Serialize;

use super::{Desk, Refusal};
use crate::{
    broker::topology::UPDATES,
    config::{Secret, Settings},
    domain::{
        calendar::rfc3339,
        delivery::{Delivery, Properties, Source},
        ledger::{AccountKind, Quantity},
        message,
        reason::Reason,
        verdict::{Verdict, VerdictKind},
    },
    settle,
    store::Store,
};

/// A message, as it would be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExplainQuestion {
    pub routing_key: String,
    /// The AMQP property `user_id`.
    pub user_id: Option<String>,
    /// The AMQP property `content_type`.
    pub content_type: String,
    pub body: Vec<u8>,
}

/// What would come of it.
#[derive(Clone, Debug, Serialize)]
pub struct Explained {
    pub verdict: VerdictKind,
    pub reason: Option<Reason>,
    pub class: Option<u16>,
    #[serde(rename = "final")]
    pub is_final: Option<bool>,
    pub detail: Option<String>,
    /// The key that made a signature that is refused, compressed, in hexadecimal; none where there is none to recover.
    #[serde(rename = "recoveredKey", skip_serializing_if = "Option::is_none")]
    pub recovered_key: Option<String>,
    /// By which symbol of its own the partner names the amount; none where it does so by the currency, or nothing would move.
    #[serde(rename = "partnerSymbol", skip_serializing_if = "Option::is_none")]
    pub partner_symbol: Option<String>,
    pub transfers: Vec<Movement>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Movement {
    pub debit: AccountKind,
    pub credit: AccountKind,
    pub currency: String,
    pub amount: Quantity,
}

/// Judges a message and changes nothing. What does not even decode needs no database.
///
/// # Errors
/// The database is away, or nobody said where it is and it is needed.
pub async fn explain(settings: &Settings, question: ExplainQuestion) -> Result<Explained, Refusal> {
    let delivery = Delivery {
        exchange: UPDATES.to_owned(),
        routing_key: question.routing_key,
        body: question.body,
        properties: Properties {
            content_type: Some(question.content_type),
            delivery_mode: Some(2),
            user_id: question.user_id,
            ..Properties::default()
        },
        cut: None,
        redelivered: false,
        source: Source::Plain,
    };
    let desk = if message::facts(&delivery).content.is_err() && settings.database_url().is_err() {
        nowhere(settings)?
    } else {
        Desk::open(settings)?
    };
    let rules = settle::rules(settings);
    let (judgement, changes, facts) = desk
        .patiently(async || settle::explain(&desk.store, &rules, delivery.clone()).await)
        .await?;
    let reason = judgement.verdict.reason();
    Ok(Explained {
        verdict: judgement.verdict.kind(),
        reason,
        class: reason.map(Reason::class),
        is_final: reason.map(Reason::is_final),
        detail: detail(&judgement.verdict),
        recovered_key: facts
            .content
            .ok()
            .filter(|_| reason == Some(Reason::SignatureMismatch))
            .and_then(|content| content.signer.key())
            .map(|key| key.to_hex()),
        partner_symbol: changes
            .settlements
            .first()
            .and_then(|settlement| settlement.allocation.partner_symbol.clone()),
        transfers: changes
            .settlements
            .iter()
            .map(|settlement| Movement {
                debit: settlement.transfer.debit.0,
                credit: settlement.transfer.credit.0,
                currency: settlement.transfer.amount.currency.clone(),
                amount: settlement.transfer.amount.quantity.clone(),
            })
            .collect(),
    })
}

/// A sentence about the verdict. One that settles needs none.
fn detail(verdict: &Verdict) -> Option<String> {
    match verdict {
        Verdict::Settled { .. } => None,
        Verdict::Duplicate { allocation } => Some(format!(
            "{} {} is {} already; its event would go out again",
            allocation.kind.as_str(),
            allocation.id,
            allocation.status.as_str()
        )),
        Verdict::Parked { until, again, .. } => {
            let waits = if *again { "it waits already" } else { "it would wait" };
            Some(format!(
                "no allocation of this id is reserved yet; {waits}, until {} at the latest",
                rfc3339(*until)
            ))
        }
        Verdict::Rejected { detail, .. } => Some(detail.clone()),
    }
}

/// The desk of messages that need no database.
fn nowhere(settings: &Settings) -> Result<Desk, Refusal> {
    let mut settings = settings.clone();
    settings.database.url = Secret::new("postgres://localhost");
    Ok(Desk {
        store: Store::new(&settings).map_err(Refusal::ours)?,
        settings,
        voucher: None,
        limits: None,
    })
}
