use std::sync::Arc;

use uuid::Uuid;

use super::*;
use crate::domain::{
    address::routing_key,
    allocation::{Allocation, Kind, PolicyResult, Status},
    calendar::rfc3339,
    dead_letter::headers::as_text,
    decide::decide,
    delivery::{Bytes, Delivery, HeaderValue, Headers, Source},
    draft::{body_text, payload_text},
    event::{
        AllocationView,
        array::{Format, count_of, in_format, read},
    },
    event_id::{id_of, settlement_id},
    ledger::{Amount, Quantity},
    message::{Facts, facts},
    names::{DEAD, content_type, header},
    reply::is_reply_queue,
    signature::SigningKey,
    snapshot::{Partner, Snapshot, Whereabouts},
    update::{Outcome, Update},
    wire,
};

const ID: &str = "10764cd8-59b5-422a-93a6-681bae7e84bd";

fn time(text: &str) -> Timestamp {
    text.parse().expect("a time")
}

fn rules() -> Rules {
    Rules {
        park_deadline: jiff::SignedDuration::from_mins(15),
        park_first_retry: jiff::SignedDuration::from_secs(1),
        park_max_interval: jiff::SignedDuration::from_secs(60),
        park_max_per_partner: 10,
        park_max_bytes: u64::MAX,
        park_max_bytes_per_partner: u64::MAX,
        event_source: "/settled".to_owned(),
        api_users: Vec::new(),
    }
}

/// A record with every optional field, or with none.
fn allocation(kind: Kind, status: Status, full: bool) -> Allocation {
    let some = |text: &str| full.then(|| text.to_owned());
    let reason = match status {
        Status::Cleared => None,
        Status::Released => Some("no funds \u{1f4b8} \"quoted\" \\ \n".to_owned()),
        Status::Reserved => Some("awaiting the partner's update".to_owned()),
    };
    Allocation {
        id: ID.parse().expect("a UUID"),
        kind,
        status,
        amount: Amount {
            currency: "ETH:wei".to_owned(),
            quantity: Quantity::parse("115792089237316195423570985008687907853269984665640564039457584007913129639935")
                .expect("a quantity"),
        },
        connection_id: Uuid::from_u128(0xc0),
        enterprise_id: "acme".to_owned(),
        client_id: Uuid::from_u128(0xc1),
        partners_client_id: "cust-1".to_owned(),
        partners_connection_id: "conn-1".to_owned(),
        client_external_id: "external-1".to_owned(),
        initiated_by: "user-1".to_owned(),
        notes: some("a note"),
        reason,
        retriable: false,
        partner_external_id: some("theirs-1"),
        partner_symbol: some("XETH"),
        evaluation_id: some("eval-1"),
        pending_approval_id: some("pending-1"),
        policy_result: full.then_some(PolicyResult::Approved),
        settled_nonce: Some("nonce-1".to_owned()),
        created_at: time("2026-01-02T03:04:05Z"),
        updated_at: time("2026-01-02T03:05:06.789Z"),
        available_account: 1,
        held_account: 2,
        allocated_account: 3,
    }
}

/// A delivery with what it tells by itself.
struct Sent {
    delivery: Delivery,
    facts: Facts,
}

impl Sent {
    fn new(routing_key: &str, body: impl Into<Vec<u8>>, properties: Properties) -> Self {
        let delivery = Delivery {
            exchange: "settlement.updates".to_owned(),
            routing_key: routing_key.to_owned(),
            body: body.into(),
            properties,
            cut: None,
            redelivered: false,
            source: Source::Plain,
        };
        let facts = facts(&delivery);
        Self { delivery, facts }
    }

    /// A real update of the kind, signed.
    fn update(kind: Kind, properties: Properties) -> Self {
        let record = allocation(kind, Status::Reserved, false);
        let draft = Update {
            enterprise_id: record.enterprise_id,
            kind,
            id: record.id,
            amount: record.amount,
            client_id: record.client_id,
            connection_id: record.connection_id,
            partners_client_id: record.partners_client_id,
            partners_connection_id: record.partners_connection_id,
            partners_id: "theirs-1".to_owned(),
            outcome: Outcome::Cleared,
            nonce: "nonce-1".to_owned(),
            evaluation_id: None,
            pending_approval_id: None,
            policy_result: None,
            expires_at: None,
        };
        let payload = payload_text(&draft);
        let signature = SigningKey::from_bytes([1; 32]).expect("a key").sign(&payload);
        Self::new(
            &routing_key("acme", kind),
            body_text(&draft, &payload, &signature),
            properties,
        )
    }

    fn by_ref(&self) -> MessageRef<'_> {
        MessageRef {
            delivery: &self.delivery,
            facts: &self.facts,
        }
    }

    fn say(&self, verdict: Verdict, proven: bool) -> Vec<Publication> {
        publications(
            self.by_ref(),
            &Judgement { verdict, proven },
            time("2026-01-02T03:06:07.008Z"),
            &rules(),
        )
    }

    fn reject(&self, reason: Reason) -> Vec<Publication> {
        let detail = "a sentence".to_owned();
        self.say(Verdict::Rejected { reason, detail }, reason >= Reason::NonceReused)
    }
}

fn settled(allocation: &Allocation) -> Verdict {
    Verdict::Settled {
        allocation: Arc::new(allocation.clone()),
    }
}

fn parked(again: bool) -> Verdict {
    Verdict::Parked {
        parked_at: time("2026-01-02T03:04:05.006Z"),
        until: time("2026-01-02T03:19:05.006Z"),
        again,
    }
}

fn text(publication: &Publication) -> &str {
    std::str::from_utf8(&publication.body).expect("an event is UTF-8")
}

fn only(mut publications: Vec<Publication>) -> Publication {
    assert_eq!(publications.len(), 1, "{publications:?}");
    publications.remove(0)
}

fn header(name: &str, value: &str) -> Properties {
    Properties {
        headers: Some(Headers::from([(name.to_owned(), HeaderValue::text(value))])),
        ..Properties::default()
    }
}

mod arrays;
mod events;
mod letters;
mod replies;
