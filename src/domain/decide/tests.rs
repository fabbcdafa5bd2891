//! The table of reasons as tables, and a model: a store made of nothing but the changesets it was given. Whatever a batch
//! comes to is compared with the same messages judged one at a time.
#![expect(
    clippy::arithmetic_side_effects,
    reason = "a test that overflows has failed, and sums are BigInt"
)]

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use jiff::SignedDuration;
use num_bigint::BigInt;

use proptest::{
    prelude::*,
    test_runner::{TestCaseResult, TestRunner},
};

use uuid::Uuid;

use super::*;
use crate::domain::{
    address::routing_key,
    allocation::{Kind, PolicyResult, Status},
    currency::Symbols,
    delivery::Properties,
    digest::sha256,
    draft::{body_text, payload_text},
    ledger::{AccountId, AccountKind, Amount, Quantity},
    message::{self, Facts, facts},
    signature::SigningKey,
    snapshot::{KeyStanding, RegisteredKey, Whereabouts},
    update::Outcome,
};

const QUANTITY_MAX: &str = "115792089237316195423570985008687907853269984665640564039457584007913129639935";
const ALLOCATION: Uuid = Uuid::from_u128(0xa1);
const DEALLOCATION: Uuid = Uuid::from_u128(0xd1);
/// Of the partner `beta`.
const OF_BETA: Uuid = Uuid::from_u128(0xb1);
/// In another currency, and as large as can be.
const LARGE: Uuid = Uuid::from_u128(0xa2);
/// Not reserved at first.
const LATE: Uuid = Uuid::from_u128(0xa3);
const LATE_DEALLOCATION: Uuid = Uuid::from_u128(0xd2);

fn start() -> Timestamp {
    "2026-01-02T03:04:05.678Z".parse().expect("a time")
}

fn seconds(seconds: i64) -> SignedDuration {
    SignedDuration::from_secs(seconds)
}

/// The secret keys of the tests, by number: 1 and 2 are acme's, 3 is beta's, 9 is a stranger's.
fn key(number: u8) -> SigningKey {
    SigningKey::from_bytes([number; 32]).expect("a key")
}

fn partner(keys: &[u8]) -> Partner {
    Partner {
        broker_user: None,
        suspended: false,
        quarantined: false,
        whereabouts: Whereabouts::Here,
        async_allocations: true,
        async_deallocations: true,
        keys: keys.iter().map(|number| key(*number).public_key()).collect(),
        revoked: Vec::new(),
        symbols: Symbols::default(),
    }
}

/// What a partner calls the currencies.
fn symbols(pairs: &[(&str, &str)]) -> Symbols {
    let owned = |(symbol, currency): &(&str, &str)| ((*symbol).to_owned(), (*currency).to_owned());
    pairs.iter().map(owned).collect()
}

/// A reservation: one connection and three accounts a partner and currency.
fn reserved(id: Uuid) -> Allocation {
    let (enterprise_id, number, currency, quantity) = match id {
        OF_BETA => ("beta", 3, "BTC", "70"),
        LARGE => ("acme", 2, "ETH:wei", QUANTITY_MAX),
        _ => ("acme", 1, "BTC", "100000000"),
    };
    Allocation {
        id,
        kind: kind_of(id),
        status: Status::Reserved,
        amount: Amount {
            currency: currency.to_owned(),
            quantity: Quantity::parse(quantity).expect("a quantity"),
        },
        connection_id: Uuid::from_u128(0xc000 + u128::from(enterprise_id == "beta")),
        enterprise_id: enterprise_id.to_owned(),
        client_id: Uuid::from_u128(0xc1),
        partners_client_id: "cust-1".to_owned(),
        partners_connection_id: "conn-1".to_owned(),
        client_external_id: format!("external-{id}"),
        initiated_by: "user-1".to_owned(),
        notes: None,
        reason: Some("awaiting the partner's update".to_owned()),
        retriable: true,
        partner_external_id: None,
        partner_symbol: None,
        evaluation_id: None,
        pending_approval_id: None,
        policy_result: None,
        settled_nonce: None,
        created_at: start() - seconds(60),
        updated_at: start() - seconds(60),
        available_account: number * 10 + 1,
        held_account: number * 10 + 2,
        allocated_account: number * 10 + 3,
    }
}

fn kind_of(id: Uuid) -> Kind {
    if id == DEALLOCATION || id == LATE_DEALLOCATION {
        Kind::Deallocation
    } else {
        Kind::Allocation
    }
}

/// What a partner would say of one of our allocations.
fn draft(id: Uuid, outcome: Outcome, nonce: &str) -> Update {
    let allocation = reserved(id);
    Update {
        enterprise_id: allocation.enterprise_id,
        kind: allocation.kind,
        id,
        amount: allocation.amount,
        client_id: allocation.client_id,
        connection_id: allocation.connection_id,
        partners_client_id: allocation.partners_client_id,
        partners_connection_id: allocation.partners_connection_id,
        partners_id: "theirs-1".to_owned(),
        outcome,
        nonce: nonce.to_owned(),
        evaluation_id: None,
        pending_approval_id: None,
        policy_result: None,
        expires_at: None,
    }
}

fn released() -> Outcome {
    Outcome::Released {
        reject_reason: "no funds \u{1f4b8} \"quoted\"\n".to_owned(),
    }
}

/// A message on its way: what is signed, by whom, and what is done to it afterwards.
#[derive(Clone, Debug)]
struct Letter {
    draft: Update,
    signed_by: u8,
    /// Fields of the body that say something else than what was signed; `null` takes one away.
    altered: Vec<(&'static str, serde_json::Value)>,
    properties: Properties,
    routing_key: Option<String>,
    source: Source,
}

impl Letter {
    fn new(id: Uuid, outcome: Outcome, nonce: &str) -> Self {
        let draft = draft(id, outcome, nonce);
        let signed_by = if draft.enterprise_id == "beta" { 3 } else { 1 };
        Self {
            draft,
            signed_by,
            altered: Vec::new(),
            properties: Properties::default(),
            routing_key: None,
            source: Source::Queue { delivery_tag: 1 },
        }
    }

    /// The door it comes back through when it is due.
    fn parked(&self) -> Source {
        let key = ReceiptKey::new(&self.draft.enterprise_id, &self.draft.nonce).0;
        Source::Parked {
            key,
            seq: 0,
            dead_letter: None,
        }
    }

    fn cleared(id: Uuid, nonce: &str) -> Self {
        Self::new(id, Outcome::Cleared, nonce)
    }

    fn by(mut self, number: u8) -> Self {
        self.signed_by = number;
        self
    }

    fn with(mut self, field: &'static str, value: impl Into<serde_json::Value>) -> Self {
        self.altered.push((field, value.into()));
        self
    }

    fn send(&self) -> Sent {
        let payload = payload_text(&self.draft);
        let signature = key(self.signed_by).sign(&payload);
        let mut body = body_text(&self.draft, &payload, &signature);
        if !self.altered.is_empty() {
            let mut value: serde_json::Value = serde_json::from_str(&body).expect("a body is JSON");
            let members = value.as_object_mut().expect("a body is an object");
            for (field, value) in &self.altered {
                if value.is_null() {
                    members.remove(*field);
                } else {
                    members.insert((*field).to_owned(), value.clone());
                }
            }
            body = value.to_string();
        }
        let written = routing_key(&self.draft.enterprise_id, self.draft.kind);
        let delivery = Delivery {
            exchange: "settlement.updates".to_owned(),
            routing_key: self.routing_key.clone().unwrap_or(written),
            body: body.into_bytes(),
            properties: self.properties.clone(),
            cut: None,
            redelivered: false,
            source: self.source,
        };
        let facts = facts(&delivery);
        Sent { delivery, facts }
    }
}

/// A message with what it tells by itself.
#[derive(Clone, Debug)]
struct Sent {
    delivery: Delivery,
    facts: Facts,
}

impl Sent {
    fn by_ref(&self) -> MessageRef<'_> {
        MessageRef {
            delivery: &self.delivery,
            facts: &self.facts,
        }
    }

    fn content(&self) -> &Content {
        self.facts.content.as_ref().expect("it decodes")
    }

    fn key(&self) -> ReceiptKey {
        let update = &self.content().update;
        ReceiptKey::new(&update.enterprise_id, &update.nonce)
    }

    /// The same as it comes back when it is due.
    fn due(&self) -> Self {
        let mut due = self.clone();
        due.delivery.source = Source::Parked {
            key: self.key().0,
            seq: 0,
            dead_letter: None,
        };
        due
    }
}

/// A parked row.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    parked: Parked,
    due_at: Timestamp,
    enterprise_id: String,
    nonce: String,
    allocation_id: Uuid,
    /// The body that was kept.
    message_digest: [u8; 32],
}

/// The store as a value: it knows only what changesets told it.
#[derive(Clone, Debug, PartialEq)]
struct Model {
    now: Timestamp,
    partners: BTreeMap<String, Partner>,
    allocations: BTreeMap<Uuid, Allocation>,
    receipts: BTreeMap<ReceiptKey, Receipt>,
    parked: BTreeMap<ReceiptKey, Row>,
    balances: BTreeMap<AccountId, BigInt>,
    /// What authorised each settlement: nonce, payload digest, key.
    settled: BTreeMap<Uuid, (String, [u8; 32], PublicKey)>,
    distrusted: HashSet<(PublicKey, [u8; 32])>,
    /// Keys that no partner's list of valid ones holds.
    registered: BTreeMap<PublicKey, (String, KeyStanding)>,
    newer_details: BTreeMap<ReceiptKey, String>,
}

impl Model {
    fn new() -> Self {
        let mut model = Self {
            now: start(),
            partners: BTreeMap::from([
                ("acme".to_owned(), partner(&[1, 2])),
                ("beta".to_owned(), partner(&[3])),
            ]),
            allocations: BTreeMap::new(),
            receipts: BTreeMap::new(),
            parked: BTreeMap::new(),
            balances: BTreeMap::new(),
            settled: BTreeMap::new(),
            distrusted: HashSet::new(),
            registered: BTreeMap::from([(key(3).public_key(), ("beta".to_owned(), KeyStanding::Valid))]),
            newer_details: BTreeMap::new(),
        };
        for id in [ALLOCATION, DEALLOCATION, OF_BETA, LARGE] {
            model.reserve(id);
        }
        model
    }

    fn reserve(&mut self, id: Uuid) {
        if let std::collections::btree_map::Entry::Vacant(entry) = self.allocations.entry(id) {
            let allocation = entry.insert(reserved(id));
            *self.balances.entry(allocation.held_account).or_default() += allocation.amount.quantity.to_signed();
        }
    }

    fn acme(&mut self) -> &mut Partner {
        self.partners.get_mut("acme").expect("acme")
    }

    fn pass(&mut self, duration: SignedDuration) {
        self.now = self.now.saturating_add(duration).expect("a time");
    }

    /// What the store loads for a batch: only what it names.
    fn snapshot(&self, batch: &[MessageRef<'_>]) -> Snapshot {
        let mut snapshot = Snapshot {
            now: self.now,
            partners: HashMap::new(),
            allocations: HashMap::new(),
            receipts: HashMap::new(),
            parked: HashMap::new(),
            parked_counts: HashMap::new(),
            distrusted: self.distrusted.clone(),
            registered: self
                .registered
                .iter()
                .map(|(key, (enterprise_id, standing))| {
                    let (enterprise_id, standing) = (enterprise_id.clone(), *standing);
                    (
                        *key,
                        RegisteredKey {
                            enterprise_id,
                            standing,
                        },
                    )
                })
                .collect(),
            newer_details: self
                .newer_details
                .iter()
                .map(|(key, detail)| (*key, detail.clone()))
                .collect(),
            parked_bytes: HashMap::new(),
            parked_bytes_of_all: 0,
        };
        let (mut ids, mut enterprises) = (BTreeSet::new(), BTreeSet::new());
        for content in batch.iter().filter_map(|message| message.facts.content.as_ref().ok()) {
            let update = &content.update;
            enterprises.insert(update.enterprise_id.clone());
            ids.insert(update.id);
            ids.extend(&content.signed_ids);
            for nonce in [Some(&update.nonce), content.signed_nonce.as_ref()]
                .into_iter()
                .flatten()
            {
                let key = ReceiptKey::new(&update.enterprise_id, nonce);
                if let Some(receipt) = self.receipts.get(&key) {
                    snapshot.receipts.insert(key, receipt.clone());
                }
                if let Some(row) = self.parked.get(&key) {
                    snapshot.parked.insert(key, row.parked.clone());
                }
            }
        }
        for id in &ids {
            if let Some(allocation) = self.allocations.get(id) {
                snapshot.allocations.insert(*id, Arc::new(allocation.clone()));
            }
        }
        let some_missing = snapshot.allocations.len() < ids.len();
        for enterprise_id in enterprises {
            let waiting = self.parked.values().filter(|row| row.enterprise_id == enterprise_id);
            let count = waiting.count() as u64;
            if some_missing && count > 0 {
                snapshot.parked_counts.insert(enterprise_id.clone(), count);
            }
            if let Some(partner) = self.partners.get(&enterprise_id) {
                snapshot.partners.insert(enterprise_id, partner.clone());
            }
        }
        snapshot
    }

    /// Writes a changeset in the store's order, and refuses what the store would refuse.
    fn apply(&mut self, batch: &[MessageRef<'_>], changes: &Changeset) {
        self.distrusted.extend(&changes.distrusted);
        for (key, receipt) in &changes.new_receipts {
            let earlier = self.receipts.insert(*key, receipt.clone());
            assert!(earlier.is_none(), "a receipt is inserted twice: {receipt:?}");
            assert_eq!(*key, ReceiptKey::new(&receipt.enterprise_id, &receipt.nonce));
            // The store writes the batch's moment for both.
            assert_eq!((receipt.first_seen, receipt.last_seen), (self.now, self.now));
        }
        for (key, receipt) in &changes.changed_receipts {
            let earlier = self.receipts.insert(*key, receipt.clone());
            let earlier = earlier.expect("a receipt is updated that was not there");
            assert_eq!(earlier.payload_digest, receipt.payload_digest, "a nonce is bound once");
            assert_eq!(earlier.first_seen, receipt.first_seen);
            if earlier.is_closed() {
                let expected = Receipt {
                    last_seen: receipt.last_seen,
                    ..earlier
                };
                assert_eq!(*receipt, expected, "a closed receipt only takes the time");
            }
        }
        self.apply_money(changes);
        for key in changes.unparked.keys() {
            self.parked.remove(key);
        }
        for (key, new) in &changes.newly_parked {
            let message = batch.get(new.index).expect("a message of the batch");
            let row = Row {
                parked: new.parked.clone(),
                due_at: new.due_at,
                enterprise_id: new.enterprise_id.clone(),
                nonce: new.nonce.clone(),
                allocation_id: new.allocation_id,
                message_digest: message.facts.message_digest,
            };
            assert_eq!(*key, new.key);
            assert!(self.parked.insert(*key, row).is_none(), "parked twice: {new:?}");
        }
        for (key, (attempts, due_at)) in &changes.parked_later {
            if let Some(row) = self.parked.get_mut(key) {
                row.parked.attempts = *attempts;
                row.due_at = *due_at;
            }
        }
    }

    fn apply_money(&mut self, changes: &Changeset) {
        let mut by_account: BTreeMap<AccountId, BigInt> = BTreeMap::new();
        let mut by_currency: BTreeMap<&str, BigInt> = BTreeMap::new();
        for settlement in &changes.settlements {
            let after = &settlement.allocation;
            let before = self
                .allocations
                .insert(after.id, Allocation::clone(after))
                .expect("it is there");
            assert_eq!(before.status, Status::Reserved, "it leaves reserved once");
            assert_ne!(after.status, Status::Reserved);
            let update = &settlement.content.update;
            assert_eq!(after.settled_nonce.as_ref(), Some(&update.nonce));
            assert_eq!(after.enterprise_id, update.enterprise_id);
            assert_eq!(settlement.transfer.amount, after.amount);
            assert_eq!(settlement.transfer.debit, (AccountKind::Held, after.held_account));
            let authority = (
                update.nonce.clone(),
                sha256(&settlement.content.payload),
                settlement.public_key,
            );
            assert!(self.settled.insert(after.id, authority).is_none(), "it settles once");
            for (account, change) in settlement.transfer.entries() {
                *by_account.entry(account).or_default() += &change;
                *by_currency.entry(after.amount.currency.as_str()).or_default() += change;
            }
        }
        for (currency, sum) in by_currency {
            assert_eq!(sum, BigInt::ZERO, "{currency} does not sum to zero");
        }
        assert_eq!(by_account, changes.balances, "balances are the sums of the entries");
        for (account, change) in &changes.balances {
            let balance = self.balances.entry(*account).or_default();
            *balance += change;
            assert!(*balance >= BigInt::ZERO, "account {account} is negative");
        }
    }

    /// One batch: load, decide, write.
    fn post(&mut self, rules: &Rules, sent: &[Sent]) -> (Vec<Judgement>, Changeset) {
        let batch: Vec<MessageRef<'_>> = sent.iter().map(Sent::by_ref).collect();
        let (judgements, changes) = decide(self.snapshot(&batch), &batch, rules);
        assert_eq!(judgements.len(), batch.len(), "exactly one verdict each");
        self.apply(&batch, &changes);
        (judgements, changes)
    }

    /// A batch of one, by the usual rules.
    fn judge(&mut self, sent: &Sent) -> Judgement {
        let (judgements, _) = self.post(&rules(), std::slice::from_ref(sent));
        judgements.into_iter().next().expect("one verdict")
    }

    fn judge_letter(&mut self, letter: &Letter) -> Judgement {
        self.judge(&letter.send())
    }

    /// A receipt as one line.
    fn receipt(&self, nonce: &str) -> String {
        let receipt = self.receipts.get(&ReceiptKey::new("acme", nonce));
        receipt.map_or("none".to_owned(), |receipt| match receipt.reason {
            None => receipt.verdict.as_str().to_owned(),
            Some(reason) => format!("{} {reason}", receipt.verdict.as_str()),
        })
    }
}

fn rules() -> Rules {
    Rules {
        park_deadline: seconds(900),
        park_first_retry: seconds(1),
        park_max_interval: seconds(60),
        park_max_per_partner: 100,
        park_max_bytes: u64::MAX,
        park_max_bytes_per_partner: u64::MAX,
        event_source: "/settled".to_owned(),
        api_users: Vec::new(),
    }
}

/// A settled receipt as the letter would have left it.
fn receipt_of(letter: &Letter) -> Receipt {
    let sent = letter.send();
    Receipt {
        enterprise_id: "acme".to_owned(),
        nonce: letter.draft.nonce.clone(),
        payload_digest: sha256(payload_text(&letter.draft)),
        message_digest: sent.facts.message_digest,
        verdict: VerdictKind::Settled,
        reason: None,
        allocation_id: letter.draft.id,
        event_id: Uuid::nil(),
        public_key: key(letter.signed_by).public_key(),
        first_seen: start(),
        last_seen: start(),
        voided: false,
    }
}

/// As an operator does it: the nonce of a message that was proven, and has not settled.
fn void(model: &mut Model, letter: &Letter) {
    let proven = Receipt {
        verdict: VerdictKind::Rejected,
        reason: Some(Reason::PartnerInactive),
        ..receipt_of(letter)
    };
    let key = ReceiptKey::new("acme", &letter.draft.nonce);
    model.receipts.entry(key).or_insert(proven).voided = true;
}

/// A verdict as one line.
fn line(judgement: &Judgement) -> String {
    match &judgement.verdict {
        Verdict::Rejected { reason, .. } => reason.to_string(),
        Verdict::Parked { again: true, .. } => "parked again".to_owned(),
        Verdict::Settled { .. } | Verdict::Duplicate { .. } | Verdict::Parked { again: false, .. } => {
            judgement.verdict.kind().as_str().to_owned()
        }
    }
}

fn lines(judgements: &[Judgement]) -> Vec<String> {
    judgements.iter().map(line).collect()
}

/// What a row changes before its message is judged: the books and the rules, or the letter.
type Twist = fn(&mut Model, &mut Rules, &mut Letter);

// Properties ---------------------------------------------------------------------------------------------------------

mod funds;
mod parking;
mod reasons;
mod receipts;
mod stories;
mod symbols;
