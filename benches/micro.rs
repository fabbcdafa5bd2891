//! What each room costs by itself, on one core and without a service, so that a regression names its room. `make micro` prints
//! the table. A line is a batch of 256 messages of about a kilobyte, but for those of `read`, which are one message.

use std::{fmt, sync::Arc};

use divan::{Bencher, counter::ItemsCount};
use jiff::{SignedDuration, Timestamp};
use settled::{
    domain::{
        address,
        allocation::{Allocation, Kind, Status},
        currency::Symbols,
        decide,
        delivery::{Delivery, Properties, Publication, PublicationKind, Source},
        digest, draft,
        event::{self, Format},
        ledger::{Amount, Quantity},
        message::{self, Facts, MessageRef},
        publications,
        signature::{self, SigningKey},
        snapshot::{Partner, Rules, Snapshot, Whereabouts},
        update::{Outcome, Update},
        verdict::{Judgement, VerdictKind},
    },
    store::outbox,
};
use uuid::Uuid;

fn main() {
    divan::main();
}

const BATCH: usize = 256;
/// Messages are of so many partners by turns.
const PARTNERS: usize = 4;

/// What a batch is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mix {
    /// Every message settles its allocation.
    Clean,
    /// Every second one has another amount than its allocation, and is refused.
    HalfRejected,
    /// Every message comes twice.
    Twice,
}

impl Mix {
    const ALL: [Mix; 3] = [Mix::Clean, Mix::HalfRejected, Mix::Twice];
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mix::Clean => "clean",
            Mix::HalfRejected => "half rejected",
            Mix::Twice => "every message twice",
        })
    }
}

fn uuid(room: u128, number: usize) -> Uuid {
    Uuid::from_u128(room << 64 | 0xa000_0000_0000_0000 | number as u128)
}

fn key(partner: usize) -> SigningKey {
    let mut bytes = [7; 32];
    bytes[31] = u8::try_from(partner).expect("few partners");
    SigningKey::from_bytes(bytes).expect("a key")
}

fn amount(quantity: &str) -> Amount {
    Amount {
        currency: "BTC".to_owned(),
        quantity: Quantity::parse(quantity).expect("a quantity"),
    }
}

fn rules() -> Rules {
    Rules {
        park_deadline: SignedDuration::from_mins(15),
        park_first_retry: SignedDuration::from_millis(500),
        park_max_interval: SignedDuration::from_secs(60),
        park_max_per_partner: 10_000,
        park_max_bytes: u64::MAX,
        park_max_bytes_per_partner: u64::MAX,
        event_source: "/settled".to_owned(),
        api_users: Vec::new(),
    }
}

/// A partner's word about the allocation of that number.
fn draft(number: usize, quantity: &str) -> Update {
    let partner = number % PARTNERS;
    Update {
        enterprise_id: format!("partner-{partner}"),
        kind: Kind::Allocation,
        id: uuid(1, number),
        amount: amount(quantity),
        client_id: uuid(2, partner),
        connection_id: uuid(3, partner),
        partners_client_id: format!("customer-{partner}"),
        partners_connection_id: format!("link-{partner}"),
        partners_id: format!("theirs-{number}"),
        outcome: Outcome::Cleared,
        nonce: format!("2026-11-20-{number:09}"),
        evaluation_id: Some("evaluation-5".to_owned()),
        pending_approval_id: None,
        policy_result: None,
        expires_at: None,
    }
}

/// As the broker hands it over.
fn delivery(draft: &Update, number: usize) -> Delivery {
    let payload = draft::payload_text(draft);
    let signature = key(number % PARTNERS).sign(&payload);
    Delivery {
        exchange: "settlement.updates".to_owned(),
        routing_key: address::routing_key(&draft.enterprise_id, draft.kind),
        body: draft::body_text(draft, &payload, &signature).into_bytes(),
        properties: Properties {
            content_type: Some("application/json".to_owned()),
            delivery_mode: Some(2),
            ..Properties::default()
        },
        cut: None,
        redelivered: false,
        source: Source::Plain,
    }
}

/// The record that a message is about.
fn reserved(number: usize) -> Allocation {
    let Update {
        enterprise_id,
        kind,
        id,
        amount,
        client_id,
        connection_id,
        partners_client_id,
        partners_connection_id,
        ..
    } = draft(number, "100000000");
    let account = i64::try_from(number).expect("a number");
    Allocation {
        id,
        kind,
        status: Status::Reserved,
        amount,
        connection_id,
        enterprise_id,
        client_id,
        partners_client_id,
        partners_connection_id,
        client_external_id: format!("order-{number}"),
        initiated_by: "desk".to_owned(),
        notes: None,
        reason: Some("awaiting the partner's update".to_owned()),
        retriable: false,
        partner_external_id: None,
        partner_symbol: None,
        evaluation_id: None,
        pending_approval_id: None,
        policy_result: None,
        settled_nonce: None,
        created_at: Timestamp::UNIX_EPOCH,
        updated_at: Timestamp::UNIX_EPOCH,
        available_account: account,
        held_account: account + 10_000,
        allocated_account: account + 20_000,
    }
}

/// A batch, read, with what the database has of it.
struct Batch {
    deliveries: Vec<Delivery>,
    facts: Vec<Facts>,
    snapshot: Snapshot,
    rules: Rules,
}

impl Batch {
    fn new(mix: Mix) -> Self {
        let deliveries: Vec<Delivery> = (0..BATCH)
            .map(|number| match mix {
                Mix::Clean => (number, "100000000"),
                Mix::HalfRejected if number % 2 == 0 => (number, "100000001"),
                Mix::HalfRejected => (number, "100000000"),
                Mix::Twice => (number / 2, "100000000"),
            })
            .map(|(number, quantity)| delivery(&draft(number, quantity), number))
            .collect();
        let partners = (0..PARTNERS).map(|partner| {
            let known = Partner {
                quarantined: false,
                whereabouts: Whereabouts::Here,
                broker_user: None,
                suspended: false,
                async_allocations: true,
                async_deallocations: true,
                keys: vec![key(partner).public_key()],
                revoked: Vec::new(),
                symbols: Symbols::default(),
            };
            (format!("partner-{partner}"), known)
        });
        Self {
            facts: deliveries.iter().map(message::facts).collect(),
            deliveries,
            snapshot: Snapshot {
                now: "2026-11-20T08:15:02.113Z".parse().expect("a time"),
                partners: partners.collect(),
                allocations: (0..BATCH)
                    .map(|number| (uuid(1, number), Arc::new(reserved(number))))
                    .collect(),
                ..Snapshot::default()
            },
            rules: rules(),
        }
    }

    fn messages(&self) -> Vec<MessageRef<'_>> {
        self.deliveries
            .iter()
            .zip(&self.facts)
            .map(|(delivery, facts)| MessageRef { delivery, facts })
            .collect()
    }

    /// What the batch comes to: it is what its mix says, or the figures would be of something else.
    fn judgements(&self, mix: Mix) -> Vec<Judgement> {
        let (judgements, _) = decide::decide(self.snapshot.clone(), &self.messages(), &self.rules);
        for (number, judgement) in judgements.iter().enumerate() {
            let is_first = number % 2 == 0;
            let expected = match mix {
                Mix::HalfRejected if is_first => VerdictKind::Rejected,
                Mix::Twice if !is_first => VerdictKind::Duplicate,
                Mix::Clean | Mix::HalfRejected | Mix::Twice => VerdictKind::Settled,
            };
            assert_eq!(
                judgement.verdict.kind(),
                expected,
                "message {number}: {:?}",
                judgement.verdict
            );
        }
        judgements
    }

    fn say(&self, judgements: &[Judgement]) -> Vec<Publication> {
        let messages = self.messages();
        let said = messages.iter().zip(judgements).flat_map(|(message, judgement)| {
            publications::publications(*message, judgement, self.snapshot.now, &self.rules)
        });
        said.collect()
    }
}

/// One message by itself.
mod read {
    use super::*;

    fn one() -> (Delivery, String, String) {
        let draft = draft(1, "100000000");
        let payload = draft::payload_text(&draft);
        let signature = key(1).sign(&payload);
        (delivery(&draft, 1), payload, signature)
    }

    #[divan::bench]
    fn digest_of_the_body(bencher: Bencher) {
        let (delivery, ..) = one();
        bencher.bench(|| digest::sha256(&delivery.body));
    }

    /// All that needs no curve: its signature is none, which the text shows.
    #[divan::bench]
    fn decode_and_agreement(bencher: Bencher) {
        let (mut delivery, payload, _) = one();
        delivery.body = draft::body_text(&draft(1, "100000000"), &payload, "none").into_bytes();
        let content = message::facts(&delivery).content.expect("it decodes");
        assert_eq!(content.agreement, Ok(()));
        bencher.bench(|| message::facts(&delivery));
    }

    #[divan::bench]
    fn recover_the_signer(bencher: Bencher) {
        let (_, payload, signature) = one();
        let signer = signature::signer(&payload, &signature);
        assert_eq!(signer, signature::Signer::Key(key(1).public_key()));
        bencher.bench(|| signature::signer(&payload, &signature));
    }

    #[divan::bench]
    fn facts(bencher: Bencher) {
        let (delivery, ..) = one();
        bencher.bench(|| message::facts(&delivery));
    }
}

/// From a snapshot to verdicts and changes.
#[divan::bench(args = Mix::ALL)]
fn decide(bencher: Bencher, mix: Mix) {
    let batch = Batch::new(mix);
    batch.judgements(mix);
    let messages = batch.messages();
    bencher
        .counter(ItemsCount::new(BATCH))
        .with_inputs(|| batch.snapshot.clone())
        .bench_values(|snapshot| decide::decide(snapshot, &messages, &batch.rules));
}

/// From verdicts to events and dead letters.
#[divan::bench(args = Mix::ALL)]
fn say(bencher: Bencher, mix: Mix) {
    let batch = Batch::new(mix);
    let judgements = batch.judgements(mix);
    bencher.counter(ItemsCount::new(BATCH)).bench(|| batch.say(&judgements));
}

/// From publications to what the outbox keeps and the broker gets.
mod tell {
    use super::*;

    const BATCHED: Format = Format::Batched { max_bytes: 262_144 };

    fn said(mix: Mix) -> Vec<Publication> {
        let batch = Batch::new(mix);
        batch.say(&batch.judgements(mix))
    }

    #[divan::bench(args = Mix::ALL)]
    fn group_events(bencher: Bencher, mix: Mix) {
        let said = said(mix);
        let events = said.iter().filter(|one| one.kind == PublicationKind::Event).count();
        assert_eq!(events, BATCH);
        bencher
            .counter(ItemsCount::new(BATCH))
            .with_inputs(|| said.clone())
            .bench_values(|said| event::in_format(said, BATCHED));
    }

    #[divan::bench(args = Mix::ALL)]
    fn outbox_row_of_single_events(bencher: Bencher, mix: Mix) {
        let said = said(mix);
        bencher
            .counter(ItemsCount::new(BATCH))
            .bench(|| outbox::encode(&said).expect("it can be written"));
    }

    #[divan::bench(args = Mix::ALL)]
    fn outbox_row_of_grouped_events(bencher: Bencher, mix: Mix) {
        let said = event::in_format(said(mix), BATCHED);
        bencher
            .counter(ItemsCount::new(BATCH))
            .bench(|| outbox::encode(&said).expect("it can be written"));
    }
}
