//! The table of reasons as tables, and a model: a store made of nothing but the changesets it was given. Whatever a batch
//! comes to is compared with the same messages judged one at a time.
#![expect(
    clippy::arithmetic_side_effects,
    reason = "a test that overflows has failed, and sums are BigInt"
)]

use std::{cell::RefCell, collections::BTreeSet, sync::Arc};

use proptest::{
    prelude::*,
    test_runner::{TestCaseResult, TestRunner},
};

use super::*;
use crate::domain::{
    delivery::Properties,
    ledger::{AccountKind, Amount, Quantity},
    message::{Draft, Outcome, body_text, facts, payload_text, routing_key, sha256},
    signature::SigningKey,
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
        async_allocations: true,
        async_deallocations: true,
        keys: keys.iter().map(|number| key(*number).public_key()).collect(),
        revoked: Vec::new(),
    }
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
fn draft(id: Uuid, outcome: Outcome, nonce: &str) -> Draft {
    let allocation = reserved(id);
    Draft {
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
    draft: Draft,
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
    fn judged(&self) -> Judged<'_> {
        Judged {
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
    fn snapshot(&self, batch: &[Judged<'_>]) -> Snapshot {
        let mut snapshot = Snapshot {
            now: self.now,
            partners: HashMap::new(),
            allocations: HashMap::new(),
            receipts: HashMap::new(),
            parked: HashMap::new(),
            parked_counts: HashMap::new(),
            distrusted: self.distrusted.clone(),
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
    fn apply(&mut self, batch: &[Judged<'_>], changes: &Changeset) {
        self.distrusted.extend(&changes.distrusted);
        for (key, receipt) in &changes.new_receipts {
            let earlier = self.receipts.insert(*key, receipt.clone());
            assert!(earlier.is_none(), "a receipt is inserted twice: {receipt:?}");
            assert_eq!(*key, ReceiptKey::new(&receipt.enterprise_id, &receipt.nonce));
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
            let authority = (update.nonce.clone(), sha256(&update.payload), settlement.public_key);
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
        let batch: Vec<Judged<'_>> = sent.iter().map(Sent::judged).collect();
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
    }
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

// The table of reasons -----------------------------------------------------------------------------------------------

/// Reason, class and finality, column by column.
#[test]
fn code_class_and_finality_of_every_reason() {
    let table = [
        ("message_too_large", 400, true),
        ("malformed_message", 400, true),
        ("invalid_field", 400, true),
        ("unknown_partner", 401, false),
        ("sender_mismatch", 403, false),
        ("malformed_signature", 401, true),
        ("signature_mismatch", 401, false),
        ("payload_mismatch", 400, true),
        ("nonce_reused", 409, true),
        ("policy_contradiction", 400, false),
        ("partner_inactive", 403, false),
        ("allocation_not_found", 404, false),
        ("not_permitted", 403, true),
        ("allocation_mismatch", 409, true),
        ("already_settled", 409, true),
        ("delivery_limit", 500, false),
        ("expired", 408, false),
        ("internal", 500, false),
    ];
    let ours: Vec<(String, u16, bool)> = Reason::ALL
        .into_iter()
        .map(|reason| (reason.to_string(), reason.class(), reason.is_final()))
        .collect();
    let theirs: Vec<(String, u16, bool)> = table
        .into_iter()
        .map(|(name, class, is_final)| (name.to_owned(), class, is_final))
        .collect();
    assert_eq!(ours, theirs);
    assert!(
        Reason::ALL.is_sorted(),
        "the order of the enum is the order of precedence"
    );
    for reason in Reason::ALL {
        assert_eq!(Reason::parse(reason.as_str()), Some(reason));
        assert_eq!(
            serde_json::to_string(&reason).ok(),
            Some(format!("\"{reason}\"")),
            "the public code is what JSON says too"
        );
    }
    assert_eq!(Reason::parse("Internal"), None);
    for kind in VerdictKind::ALL {
        assert_eq!(VerdictKind::parse(kind.as_str()), Some(kind));
    }
}

/// What a row changes before its message is judged: the books and the rules, or the letter.
type Twist = fn(&mut Model, &mut Rules, &mut Letter);

/// One row for every way to a reason: what is wrong, the reason, the exact detail, and whether the sender is proven.
#[test]
fn every_reason_has_the_message_that_causes_it() {
    let table: &[(&str, Twist, Reason, &str, bool)] = &[
        (
            "a body above the limit",
            |_, _, letter| letter.altered.push(("padding", "x".repeat(message::BODY_MAX).into())),
            Reason::MessageTooLarge,
            "the body has 263027 bytes, at most 262144 are allowed",
            false,
        ),
        (
            "a content type that is not JSON",
            |_, _, letter| letter.properties.content_type = Some("text/plain".to_owned()),
            Reason::MalformedMessage,
            "content_type must be application/json, with no charset but utf-8",
            false,
        ),
        (
            "a quantity with a leading zero",
            |_, _, letter| {
                let amount = serde_json::json!({"currency": "BTC", "quantity": "01"});
                letter.altered.push(("amount", amount));
            },
            Reason::InvalidField,
            "amount.quantity: must be at least 1 and have no leading zeros",
            false,
        ),
        (
            "an enterprise nobody registered",
            |_, _, letter| letter.routing_key = Some("Acme.allocation.update".to_owned()),
            Reason::UnknownPartner,
            "no partner of this enterprise id is registered",
            false,
        ),
        (
            "another broker user",
            |model, _, letter| {
                model.acme().broker_user = Some("acme-user".to_owned());
                letter.properties.user_id = Some("Acme-user".to_owned());
            },
            Reason::SenderMismatch,
            "the user_id property is not the broker user that this partner is bound to",
            false,
        ),
        (
            "no broker user at all",
            |model, _, _| model.acme().broker_user = Some("acme-user".to_owned()),
            Reason::SenderMismatch,
            "the user_id property is not the broker user that this partner is bound to",
            false,
        ),
        (
            "an empty signature",
            |_, _, letter| letter.altered.push(("signature", "".into())),
            Reason::MalformedSignature,
            "signature: must be exactly 130 hexadecimal characters: header, r, s",
            false,
        ),
        (
            "a signature with 0x",
            |_, _, letter| letter.altered.push(("signature", "0x1f".into())),
            Reason::MalformedSignature,
            "signature: must be bare hexadecimal, without 0x",
            false,
        ),
        (
            "a stranger's signature",
            |_, _, letter| letter.signed_by = 9,
            Reason::SignatureMismatch,
            "the signature was made by no key of the partner that is valid now",
            false,
        ),
        (
            "another partner's signature",
            |_, _, letter| letter.signed_by = 3,
            Reason::SignatureMismatch,
            "the signature was made by no key of the partner that is valid now",
            false,
        ),
        (
            "a partner without a key",
            |model, _, _| model.acme().keys.clear(),
            Reason::SignatureMismatch,
            "the signature was made by no key of the partner that is valid now",
            false,
        ),
        (
            "a signature no point can be recovered from",
            // x = 5 is on no point of the curve.
            |_, _, letter| {
                let signature = format!("1f{:064x}{:064x}", 5, 1);
                letter.altered.push(("signature", signature.into()));
            },
            Reason::SignatureMismatch,
            "no public key can be recovered from the signature and the payload",
            false,
        ),
        (
            "a body that says more than was signed",
            |_, _, letter| letter.altered.push(("partnersClientId", "cust-2".into())),
            Reason::PayloadMismatch,
            "partnersClientId: differs between the payload and the body",
            false,
        ),
        (
            "a nonce that another payload had",
            |model, _, _| {
                let first = Letter::cleared(DEALLOCATION, "n");
                assert_eq!(line(&model.judge_letter(&first)), "settled");
            },
            Reason::NonceReused,
            "nonce: this partner used it with another payload",
            true,
        ),
        (
            "cleared, but rejected by policy (unsigned)",
            |_, _, letter| letter.altered.push(("policyResult", "REJECTED".into())),
            Reason::PolicyContradiction,
            "policyResult: rejected contradicts the status cleared",
            true,
        ),
        (
            "a suspended partner",
            |model, _, _| model.acme().suspended = true,
            Reason::PartnerInactive,
            "the partner is suspended",
            true,
        ),
        (
            "no asynchronous allocations",
            |model, _, _| model.acme().async_allocations = false,
            Reason::PartnerInactive,
            "asynchronous allocations are not enabled for the partner",
            true,
        ),
        (
            "no asynchronous deallocations",
            |model, _, letter| {
                model.acme().async_deallocations = false;
                letter.draft = draft(DEALLOCATION, Outcome::Cleared, "n");
            },
            Reason::PartnerInactive,
            "asynchronous deallocations are not enabled for the partner",
            true,
        ),
        (
            "no such id, and no room to wait",
            |_, rules, letter| {
                rules.park_max_per_partner = 0;
                letter.draft.id = LATE;
            },
            Reason::AllocationNotFound,
            "no allocation of this id, and too many of this partner's messages wait already",
            true,
        ),
        (
            "no such id, and the wait is over",
            |model, _, letter| {
                letter.draft.id = LATE;
                assert_eq!(line(&model.judge_letter(letter)), "parked");
                model.pass(seconds(900));
                letter.source = letter.parked();
            },
            Reason::AllocationNotFound,
            "no allocation of this id was reserved in time",
            true,
        ),
        (
            "another partner's allocation",
            |_, _, letter| letter.draft.id = OF_BETA,
            Reason::NotPermitted,
            "the id belongs to another partner's connection",
            true,
        ),
        (
            "a deallocation's id in an allocation update",
            |_, _, letter| letter.draft.id = DEALLOCATION,
            Reason::NotPermitted,
            "allocationId: the id is of the other type",
            true,
        ),
        (
            "an allocation's id in a deallocation update",
            |_, _, letter| letter.draft.kind = Kind::Deallocation,
            Reason::NotPermitted,
            "deallocationId: the id is of the other type",
            true,
        ),
        (
            "another currency",
            |_, _, letter| letter.draft.amount.currency = "btc".to_owned(),
            Reason::AllocationMismatch,
            "amount.currency: differs from the record",
            true,
        ),
        (
            "another quantity",
            |_, _, letter| letter.draft.amount.quantity = Quantity::parse("99999999").expect("a quantity"),
            Reason::AllocationMismatch,
            "amount.quantity: differs from the record",
            true,
        ),
        (
            "a quantity that differs in the last of 78 digits",
            |_, _, letter| {
                letter.draft = draft(LARGE, Outcome::Cleared, "n");
                let less = QUANTITY_MAX.replace("639935", "639934");
                letter.draft.amount.quantity = Quantity::parse(&less).expect("a quantity");
            },
            Reason::AllocationMismatch,
            "amount.quantity: differs from the record",
            true,
        ),
        (
            "another client",
            |_, _, letter| letter.draft.client_id = Uuid::from_u128(7),
            Reason::AllocationMismatch,
            "clientId: differs from the record",
            true,
        ),
        (
            "another connection",
            |_, _, letter| letter.draft.connection_id = Uuid::from_u128(7),
            Reason::AllocationMismatch,
            "connectionId: differs from the record",
            true,
        ),
        (
            "another partner's client",
            |_, _, letter| letter.draft.partners_client_id = "cust-2".to_owned(),
            Reason::AllocationMismatch,
            "partnersClientId: differs from the record",
            true,
        ),
        (
            "another partner's connection",
            |_, _, letter| letter.draft.partners_connection_id = "CONN-1".to_owned(),
            Reason::AllocationMismatch,
            "partnersConnectionId: differs from the record",
            true,
        ),
        (
            "every id differs: the first is named",
            |_, _, letter| {
                letter.draft.partners_connection_id = "x".to_owned();
                letter.draft.connection_id = Uuid::from_u128(7);
                letter.draft.partners_client_id = "x".to_owned();
            },
            Reason::AllocationMismatch,
            "connectionId: differs from the record",
            true,
        ),
        (
            "settled, under another id of the partner's",
            |model, _, letter| {
                assert_eq!(line(&model.judge_letter(letter)), "settled");
                letter.draft.nonce = "m".to_owned();
                letter.draft.partners_id = "theirs-2".to_owned();
            },
            Reason::AllocationMismatch,
            "partnersAllocationId: differs from the record",
            true,
        ),
        (
            "a settled deallocation, under another id of the partner's",
            |model, _, letter| {
                letter.draft = draft(DEALLOCATION, released(), "n");
                assert_eq!(line(&model.judge_letter(letter)), "settled");
                letter.draft.nonce = "m".to_owned();
                letter.draft.partners_id = "theirs-2".to_owned();
            },
            Reason::AllocationMismatch,
            "partnersDeallocationId: differs from the record",
            true,
        ),
        (
            "released, after it was cleared",
            |model, _, letter| {
                assert_eq!(line(&model.judge_letter(letter)), "settled");
                letter.draft.nonce = "m".to_owned();
                letter.draft.outcome = released();
            },
            Reason::AlreadySettled,
            "it is cleared already",
            true,
        ),
        (
            "cleared, after it was released",
            |model, _, letter| {
                letter.draft.outcome = released();
                assert_eq!(line(&model.judge_letter(letter)), "settled");
                letter.draft.nonce = "m".to_owned();
                letter.draft.outcome = Outcome::Cleared;
            },
            Reason::AlreadySettled,
            "it is released already",
            true,
        ),
    ];
    for (what, twist, reason, detail, proven) in table {
        let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(ALLOCATION, "n"));
        twist(&mut model, &mut rules, &mut letter);
        let (books, receipts) = (
            (model.allocations.clone(), model.balances.clone()),
            model.receipts.len(),
        );
        let sent = letter.send();
        let (judgements, changes) = model.post(&rules, std::slice::from_ref(&sent));
        let expected = Judgement {
            verdict: Verdict::Rejected {
                reason: *reason,
                detail: (*detail).to_owned(),
            },
            proven: *proven,
        };
        assert_eq!(judgements, std::slice::from_ref(&expected), "{what}");
        assert_eq!(expected.verdict.kind(), VerdictKind::Rejected);
        assert_eq!(expected.verdict.reason(), Some(*reason));
        assert_eq!((model.allocations, model.balances), books, "{what}");
        assert!(
            changes.settlements.is_empty() && changes.newly_parked.is_empty(),
            "{what}"
        );
        if *proven && *reason != Reason::NonceReused {
            let receipt = model.receipts.get(&sent.key()).expect("a receipt");
            assert_eq!(
                (receipt.verdict, receipt.reason),
                (VerdictKind::Rejected, Some(*reason)),
                "{what}"
            );
            assert_eq!(receipt.public_key, key(letter.signed_by).public_key());
        } else {
            assert_eq!(model.receipts.len(), receipts, "{what}");
            assert!(
                changes.new_receipts.is_empty() && changes.changed_receipts.is_empty(),
                "{what}"
            );
        }
    }
    let covered: BTreeSet<Reason> = table.iter().map(|row| row.2).collect();
    let ours: Vec<Reason> = Reason::ALL.into_iter().take(15).collect();
    assert_eq!(covered.into_iter().collect::<Vec<_>>(), ours, "a reason without a row");
}

/// Each breaks one rule, in the table's order, and leaves the others as they are.
const BREAKERS: [Twist; 15] = [
    |_, _, letter| letter.altered.push(("padding", "x".repeat(message::BODY_MAX).into())),
    |_, _, letter| letter.properties.content_encoding = Some("gzip".to_owned()),
    |_, _, letter| letter.altered.push(("evaluationId", "".into())),
    |model, _, _| model.partners.clear(),
    |model, _, _| model.acme().broker_user = Some("acme-user".to_owned()),
    |_, _, letter| letter.altered.push(("signature", "1f".into())),
    |_, _, letter| letter.signed_by = 9,
    |_, _, letter| letter.altered.push(("partnersAllocationId", "altered".into())),
    |model, _, letter| {
        let mut receipt = receipt_of(letter);
        receipt.payload_digest = [0; 32];
        model
            .receipts
            .insert(ReceiptKey::new("acme", &letter.draft.nonce), receipt);
    },
    |_, _, letter| letter.altered.push(("policyResult", "rejected".into())),
    |model, _, _| model.acme().suspended = true,
    |model, rules, letter| {
        model.allocations.remove(&letter.draft.id);
        rules.park_max_per_partner = 0;
    },
    |model, _, letter| {
        model
            .allocations
            .entry(letter.draft.id)
            .and_modify(|allocation| allocation.enterprise_id = "beta".to_owned());
    },
    |_, _, letter| letter.draft.partners_client_id = "cust-2".to_owned(),
    |model, _, letter| {
        model
            .allocations
            .entry(letter.draft.id)
            .and_modify(|allocation| allocation.status = Status::Released);
    },
];

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
    }
}

/// What a message comes to that breaks these rules (numbers of the table) and no other.
fn broken(numbers: impl DoubleEndedIterator<Item = usize>) -> String {
    let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(ALLOCATION, "n"));
    // The later ones first: a breaker may take away what a later one needs, as an allocation that is not there.
    for number in numbers.rev() {
        BREAKERS[number - 1](&mut model, &mut rules, &mut letter);
    }
    let sent = letter.send();
    let batch = [sent.judged()];
    let (judgements, _) = decide(model.snapshot(&batch), &batch, &rules);
    lines(&judgements).concat()
}

#[test]
fn the_earliest_broken_rule_names_the_reason() {
    assert_eq!(broken(std::iter::empty()), "settled");
    for (index, reason) in Reason::ALL.iter().enumerate().take(15) {
        let first = index + 1;
        assert_eq!(broken([first].into_iter()), reason.as_str(), "{first} alone");
        assert_eq!(broken(first..=15), reason.as_str(), "{first} and all that follow");
        for second in first + 1..=15 {
            assert_eq!(
                broken([first, second].into_iter()),
                reason.as_str(),
                "{first}, {second}"
            );
        }
    }
}

// What settles -------------------------------------------------------------------------------------------------------

/// The movements of money, row by row.
#[test]
fn the_funds_move_as_the_table_says() {
    use AccountKind::{Allocated, Available};
    for (id, outcome, account) in [
        (ALLOCATION, Outcome::Cleared, (Allocated, 13)),
        (ALLOCATION, released(), (Available, 11)),
        (DEALLOCATION, Outcome::Cleared, (Available, 11)),
        (DEALLOCATION, released(), (Allocated, 13)),
    ] {
        let mut model = Model::new();
        let mut letter = Letter::new(id, outcome.clone(), "n");
        letter.draft.evaluation_id = Some("eval-1".to_owned());
        letter.draft.pending_approval_id = Some("pending-1".to_owned());
        letter.draft.policy_result = Some(PolicyResult::Approved);
        let sent = letter.send();
        let (judgements, changes) = model.post(&rules(), std::slice::from_ref(&sent));
        let expected = Allocation {
            status: Status::parse(outcome.as_str()).expect("a status"),
            reason: outcome.reject_reason().map(str::to_owned),
            retriable: false,
            partner_external_id: Some("theirs-1".to_owned()),
            evaluation_id: Some("eval-1".to_owned()),
            pending_approval_id: Some("pending-1".to_owned()),
            policy_result: Some(PolicyResult::Approved),
            settled_nonce: Some("n".to_owned()),
            updated_at: start(),
            ..reserved(id)
        };
        let verdict = Verdict::Settled {
            allocation: Arc::new(expected),
        };
        assert_eq!(judgements, [Judgement { verdict, proven: true }]);
        let [settlement] = changes.settlements.as_slice() else {
            panic!("one settlement");
        };
        assert_eq!(settlement.transfer.credit, account);
        let update = &settlement.content.update;
        assert_eq!(update.payload, payload_text(&letter.draft));
        assert_eq!(update.signature, key(1).sign(&update.payload));
        assert_eq!(settlement.public_key, key(1).public_key());
        let quantity = BigInt::from(100_000_000);
        let moved = BTreeMap::from([(12, -quantity.clone()), (account.1, quantity)]);
        assert_eq!(changes.balances, moved);
        assert_eq!(model.receipt("n"), "settled");
        let receipt = model.receipts.get(&sent.key()).expect("a receipt");
        assert_eq!(
            Some(receipt.event_id),
            event::settlement_id(&model.allocations[&id]),
            "the receipt names the event"
        );
        assert_eq!(receipt.allocation_id, id);
        assert_eq!(receipt.message_digest, sent.facts.message_digest);
    }
}

/// A policy may reject what is released; it may be absent; a bound user may speak; any of the keys will do.
#[test]
fn what_breaks_no_rule_settles() {
    let twists: [Twist; 5] = [
        |_, _, letter| {
            letter.draft.outcome = released();
            letter.draft.policy_result = Some(PolicyResult::Rejected);
        },
        |_, _, letter| letter.draft.pending_approval_id = Some("p".to_owned()),
        |model, _, letter| {
            model.acme().broker_user = Some("acme-user".to_owned());
            letter.properties.user_id = Some("acme-user".to_owned());
        },
        |_, _, letter| letter.signed_by = 2,
        |model, _, _| model.acme().async_deallocations = false,
    ];
    for (index, twist) in twists.into_iter().enumerate() {
        let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(ALLOCATION, "n"));
        twist(&mut model, &mut rules, &mut letter);
        assert_eq!(line(&model.judge_letter(&letter)), "settled", "{index}");
    }
}

#[test]
fn the_largest_quantity_settles_exactly() {
    let mut model = Model::new();
    let max: BigInt = QUANTITY_MAX.parse().expect("a number");
    assert_eq!(line(&model.judge_letter(&Letter::cleared(LARGE, "n"))), "settled");
    assert_eq!((&model.balances[&22], &model.balances[&23]), (&BigInt::ZERO, &max));
}

/// A revoked key may be reinstated: what it signed meanwhile, and was refused for that alone, stays refused.
#[test]
fn what_was_refused_for_a_revoked_key_stays_refused() {
    let mut model = Model::new();
    let revoke = |model: &mut Model, revoked: bool| {
        let (old, new) = (key(1).public_key(), key(2).public_key());
        model.acme().keys = if revoked { vec![new] } else { vec![old, new] };
        model.acme().revoked = if revoked { vec![old] } else { Vec::new() };
    };
    revoke(&mut model, true);
    let refused = Letter::cleared(ALLOCATION, "n");
    assert_eq!(line(&model.judge_letter(&refused)), "signature_mismatch");
    // Not for the sake of the key: bound to a broker user, or by another key.
    model.acme().broker_user = Some("acme-user".to_owned());
    let elsewhere = Letter::cleared(LARGE, "m");
    assert_eq!(line(&model.judge_letter(&elsewhere)), "sender_mismatch");
    model.acme().broker_user = None;
    assert_eq!(model.distrusted.len(), 1);
    revoke(&mut model, false);
    assert_eq!(line(&model.judge_letter(&refused)), "signature_mismatch");
    assert_eq!(line(&model.judge_letter(&elsewhere)), "settled");
    assert_eq!(
        line(&model.judge_letter(&Letter::cleared(ALLOCATION, "other"))),
        "settled"
    );
    assert!(model.receipts.values().all(|receipt| receipt.nonce != "n"));
}

// Duplicates ---------------------------------------------------------------------------------------------------------

/// Whatever the registry says by now, and however the unsigned parts were altered: the money moved.
#[test]
fn a_settled_receipt_answers_before_every_rule_from_4_on() {
    let twists: &[(&str, Twist)] = &[
        ("nothing changed", |_, _, _| {}),
        ("the partner is gone", |model, _, _| model.partners.clear()),
        ("the partner is bound to a user", |model, _, _| {
            model.acme().broker_user = Some("acme-user".to_owned());
        }),
        ("the key is revoked", |model, _, _| {
            model.acme().keys = vec![key(2).public_key()]
        }),
        ("the partner is suspended", |model, _, _| model.acme().suspended = true),
        ("the partner has no asynchronous allocations", |model, _, _| {
            model.acme().async_allocations = false;
        }),
        ("the body has another amount", |_, _, letter| {
            let amount = serde_json::json!({"currency": "BTC", "quantity": "1"});
            letter.altered.push(("amount", amount));
        }),
        ("the body has another nonce", |_, _, letter| {
            letter.altered.push(("nonce", "m".into()))
        }),
        ("the body has the nonce of another receipt", |model, _, letter| {
            assert_eq!(line(&model.judge_letter(&Letter::cleared(LARGE, "m"))), "settled");
            letter.altered.push(("nonce", "m".into()));
        }),
        ("the body has another id", |_, _, letter| {
            letter.altered.push(("allocationId", LATE.to_string().into()));
        }),
        ("the body has the other status", |_, _, letter| {
            letter.altered.push(("status", "released".into()));
            letter.altered.push(("rejectReason", "altered".into()));
        }),
        ("the policy says no by now", |_, _, letter| {
            letter.altered.push(("policyResult", "rejected".into()));
        }),
        ("the policy's ids differ", |_, _, letter| {
            letter.altered.push(("evaluationId", "other".into()));
        }),
        ("its row was left behind", |model, _, letter| {
            letter.source = letter.parked();
            let sent = letter.send();
            let row = Row {
                parked: Parked {
                    seq: 0,
                    parked_at: model.now,
                    until: model.now,
                    attempts: 0,
                    also: None,
                },
                due_at: model.now,
                enterprise_id: "acme".to_owned(),
                nonce: "n".to_owned(),
                allocation_id: letter.draft.id,
                message_digest: sent.facts.message_digest,
            };
            model.parked.insert(sent.key(), row);
        }),
        ("nobody keeps it", |_, _, letter| letter.source = Source::Plain),
        ("it came as a deallocation", |_, _, letter| {
            letter.routing_key = Some("acme.deallocation.update".to_owned());
            letter.altered.push(("deallocationId", LATE.to_string().into()));
            letter.altered.push(("partnersDeallocationId", "another".into()));
        }),
    ];
    for (what, twist) in twists {
        let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(ALLOCATION, "n"));
        assert_eq!(line(&model.judge_letter(&letter)), "settled");
        let first_digest = letter.send().facts.message_digest;
        twist(&mut model, &mut rules, &mut letter);
        model.pass(seconds(7));
        let (judgements, changes) = model.post(&rules, &[letter.send()]);
        let verdict = Verdict::Duplicate {
            allocation: Arc::new(model.allocations[&ALLOCATION].clone()),
        };
        assert_eq!(judgements, [Judgement { verdict, proven: true }], "{what}");
        assert!(changes.settlements.is_empty() && changes.balances.is_empty(), "{what}");
        assert!(model.parked.is_empty(), "{what}");
        assert_eq!(model.receipt("n"), "settled", "{what}");
        let receipt = &model.receipts[&ReceiptKey::new("acme", "n")];
        assert_eq!(
            (receipt.first_seen, receipt.last_seen),
            (start(), start() + seconds(7)),
            "{what}"
        );
        assert_eq!(receipt.message_digest, first_digest, "{what}");
    }
}

/// Steps 1 to 3 come first, and the signature must verify with the key that the receipt keeps.
#[test]
fn only_the_kept_key_speaks_for_a_settled_receipt() {
    let twists: &[(&str, Twist, &str)] = &[
        (
            "the partner's other key signs the same text",
            |_, _, letter| letter.signed_by = 2,
            "duplicate",
        ),
        (
            "the same, the other key being revoked",
            |model, _, letter| {
                model.acme().keys.pop();
                letter.signed_by = 2;
            },
            "signature_mismatch",
        ),
        (
            "the same, the body being altered",
            |_, _, letter| {
                letter.signed_by = 2;
                letter.altered.push(("clientId", LATE.to_string().into()));
            },
            "payload_mismatch",
        ),
        (
            "a stranger signs the same text",
            |_, _, letter| letter.signed_by = 9,
            "signature_mismatch",
        ),
        (
            "the signature is cut off",
            |_, _, letter| letter.altered.push(("signature", "1f".into())),
            "malformed_signature",
        ),
        (
            "the payload has another white space",
            |_, _, letter| {
                let payload = format!(" {}", payload_text(&letter.draft));
                letter.altered.push(("signature", key(1).sign(&payload).into()));
                letter.altered.push(("payload", payload.into()));
            },
            "nonce_reused",
        ),
        (
            "the body misses a field",
            |_, _, letter| letter.altered.push(("clientId", serde_json::Value::Null)),
            "invalid_field",
        ),
        (
            "another partner's routing key",
            |_, _, letter| letter.routing_key = Some("beta.allocation.update".to_owned()),
            "signature_mismatch",
        ),
    ];
    for (what, twist, expected) in twists {
        let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(ALLOCATION, "n"));
        assert_eq!(line(&model.judge_letter(&letter)), "settled");
        let before = model.receipts[&ReceiptKey::new("acme", "n")].clone();
        twist(&mut model, &mut rules, &mut letter);
        assert_eq!(line(&model.judge_letter(&letter)), *expected, "{what}");
        assert_eq!(
            model.receipts,
            BTreeMap::from([(ReceiptKey::new("acme", "n"), before)]),
            "{what}"
        );
    }
}

/// The other key, valid, same text: step 15 finds the same status.
#[test]
fn a_new_nonce_with_the_same_status_is_a_duplicate_with_a_receipt_of_its_own() {
    for (id, first, again, expected) in [
        (ALLOCATION, Outcome::Cleared, Outcome::Cleared, "duplicate"),
        (
            ALLOCATION,
            released(),
            Outcome::Released {
                reject_reason: "another".to_owned(),
            },
            "duplicate",
        ),
        (DEALLOCATION, released(), released(), "duplicate"),
        (DEALLOCATION, Outcome::Cleared, released(), "already_settled"),
        (ALLOCATION, released(), Outcome::Cleared, "already_settled"),
    ] {
        let mut model = Model::new();
        assert_eq!(line(&model.judge_letter(&Letter::new(id, first, "n"))), "settled");
        let record = model.allocations[&id].clone();
        let mut letter = Letter::new(id, again, "m").with("evaluationId", "unsigned and new");
        letter.signed_by = 2;
        model.pass(seconds(1));
        let sent = letter.send();
        let judgement = model.judge(&sent);
        assert_eq!(line(&judgement), expected);
        assert_eq!(model.allocations[&id], record, "the first one stands");
        let receipt = model.receipts[&sent.key()].clone();
        match judgement.verdict {
            Verdict::Duplicate { allocation } => {
                assert_eq!(*allocation, record);
                assert_eq!((receipt.verdict, receipt.reason), (VerdictKind::Duplicate, None));
                assert_eq!(Some(receipt.event_id), event::settlement_id(&record));
            }
            Verdict::Rejected { reason, .. } => {
                assert_eq!((receipt.verdict, receipt.reason), (VerdictKind::Rejected, Some(reason)));
                assert_ne!(Some(receipt.event_id), event::settlement_id(&record));
            }
            Verdict::Settled { .. } | Verdict::Parked { .. } => panic!("{expected}"),
        }
        assert_eq!(receipt.public_key, key(2).public_key());
        assert_eq!(model.receipt("n"), "settled");
    }
}

#[test]
fn the_partners_id_counts_from_the_settlement_on() {
    let mut model = Model::new();
    let mut letter = Letter::cleared(ALLOCATION, "n");
    letter.draft.partners_id = "anything they like".to_owned();
    assert_eq!(line(&model.judge_letter(&letter)), "settled");
    letter.draft.nonce = "m".to_owned();
    assert_eq!(line(&model.judge_letter(&letter)), "duplicate");
    letter.draft.nonce = "o".to_owned();
    letter.draft.partners_id = "something else".to_owned();
    assert_eq!(line(&model.judge_letter(&letter)), "allocation_mismatch");
    // Step 14 comes before step 15.
    letter.draft.nonce = "p".to_owned();
    letter.draft.outcome = released();
    assert_eq!(line(&model.judge_letter(&letter)), "allocation_mismatch");
    // It need not be unique.
    let mut other = Letter::cleared(LARGE, "q");
    other.draft.partners_id = "anything they like".to_owned();
    assert_eq!(line(&model.judge_letter(&other)), "settled");
}

#[test]
fn the_same_message_fifty_times_in_one_batch_moves_the_money_once() {
    let mut model = Model::new();
    let sent = Letter::cleared(ALLOCATION, "n").send();
    let (judgements, changes) = model.post(&rules(), &vec![sent; 50]);
    let mut expected = vec!["duplicate"; 50];
    expected[0] = "settled";
    assert_eq!(lines(&judgements), expected);
    assert_eq!(changes.settlements.len(), 1);
    assert_eq!((changes.new_receipts.len(), changes.changed_receipts.len()), (1, 0));
    assert_eq!(model.balances[&13], BigInt::from(100_000_000));
    let ids: BTreeSet<Option<Uuid>> = judgements
        .iter()
        .map(|judgement| match &judgement.verdict {
            Verdict::Settled { allocation } | Verdict::Duplicate { allocation } => event::settlement_id(allocation),
            Verdict::Parked { .. } | Verdict::Rejected { .. } => None,
        })
        .collect();
    assert_eq!(ids.len(), 1, "one event id");
}

#[test]
fn a_batch_sees_its_own_effects() {
    let mut model = Model::new();
    let batch = [
        Letter::cleared(ALLOCATION, "a").send(),
        Letter::new(ALLOCATION, released(), "b").send(),
        Letter::cleared(ALLOCATION, "c").send(),
        // The nonce of another, the other's effect standing.
        Letter::cleared(LARGE, "a").send(),
        Letter::cleared(ALLOCATION, "a").send(),
        // A rejection binds its nonce as well.
        Letter::cleared(LARGE, "b").send(),
        Letter::cleared(LARGE, "d").send(),
        // A stranger's message binds nothing.
        Letter::cleared(DEALLOCATION, "e").by(9).send(),
        Letter::new(DEALLOCATION, released(), "e").send(),
    ];
    let (judgements, changes) = model.post(&rules(), &batch);
    assert_eq!(
        lines(&judgements),
        [
            "settled",
            "already_settled",
            "duplicate",
            "nonce_reused",
            "duplicate",
            "nonce_reused",
            "settled",
            "signature_mismatch",
            "settled"
        ]
    );
    assert_eq!(changes.settlements.len(), 3);
    let receipts: Vec<String> = ["a", "b", "c", "d", "e"]
        .into_iter()
        .map(|nonce| model.receipt(nonce))
        .collect();
    assert_eq!(
        receipts,
        ["settled", "rejected already_settled", "duplicate", "settled", "settled"]
    );
}

#[test]
fn a_nonce_is_each_partners_own() {
    let mut model = Model::new();
    assert_eq!(line(&model.judge_letter(&Letter::cleared(ALLOCATION, "n"))), "settled");
    assert_eq!(line(&model.judge_letter(&Letter::cleared(OF_BETA, "n"))), "settled");
    // The separator keeps ("ab", "c") and ("a", "bc") apart.
    assert_ne!(ReceiptKey::new("ab", "c"), ReceiptKey::new("a", "bc"));
}

/// As a string: neither letter case, nor white space, nor another way to write the same character makes two nonces one.
#[test]
fn a_nonce_is_compared_exactly() {
    let nonces = [
        "n\u{e9}",
        "N\u{e9}",
        "n\u{c9}",
        "ne\u{301}",
        "n\u{e9} ",
        "n\u{e9}\u{200b}",
    ];
    let keys: BTreeSet<ReceiptKey> = nonces.iter().map(|nonce| ReceiptKey::new("acme", nonce)).collect();
    assert_eq!(keys.len(), nonces.len());
    let mut model = Model::new();
    assert_eq!(line(&model.judge_letter(&Letter::cleared(ALLOCATION, "n"))), "settled");
    assert_eq!(line(&model.judge_letter(&Letter::cleared(LARGE, "N"))), "settled");
}

/// Whoever knows a nonce can write it into a message; before step 9 that says nothing about it.
#[test]
fn a_stranger_changes_no_receipt() {
    let strangers: [fn(&mut Letter); 5] = [
        |letter| letter.signed_by = 9,
        |letter| letter.altered.push(("signature", "1f".into())),
        |letter| letter.altered.push(("partnersClientId", "altered".into())),
        |letter| letter.draft.id = LARGE,
        |letter| letter.properties.user_id = Some("somebody else".to_owned()),
    ];
    for first in ["rejected partner_inactive", "parked allocation_not_found"] {
        for (number, stranger) in strangers.iter().enumerate() {
            let mut model = Model::new();
            let id = if first.starts_with("parked") { LATE } else { ALLOCATION };
            model.acme().suspended = first.starts_with("rejected");
            model.judge_letter(&Letter::cleared(id, "n"));
            assert_eq!(model.receipt("n"), first);
            model.acme().suspended = false;
            model.acme().broker_user = (number == 4).then(|| "acme-user".to_owned());
            let before = model.clone();
            let mut letter = Letter::cleared(id, "n");
            if number == 3 {
                letter.signed_by = 9;
            }
            stranger(&mut letter);
            let (judgements, _) = model.post(&rules(), &[letter.send()]);
            assert!(!judgements[0].proven, "{number}: {judgements:?}");
            assert_eq!(model, before, "{first}: {number}");
        }
    }
}

/// Receipts: the newest verdict, but never out of `settled` or a final reason.
#[test]
fn a_receipt_takes_the_newest_verdict_until_it_is_closed() {
    let mut model = Model::new();
    let sent = Letter::cleared(ALLOCATION, "n").send();
    let contradicted = Letter::cleared(ALLOCATION, "n").with("policyResult", "rejected").send();
    let judge = |model: &mut Model, sent: &Sent| {
        model.pass(seconds(1));
        let judgement = model.judge(sent);
        (line(&judgement), model.receipt("n"))
    };
    model.acme().suspended = true;
    let said = |verdict: &str, receipt: &str| (verdict.to_owned(), receipt.to_owned());
    assert_eq!(
        judge(&mut model, &sent),
        said("partner_inactive", "rejected partner_inactive")
    );
    model.acme().suspended = false;
    assert_eq!(
        judge(&mut model, &contradicted),
        said("policy_contradiction", "rejected policy_contradiction")
    );
    let receipt = model.receipts[&sent.key()].clone();
    assert_eq!(receipt.message_digest, contradicted.facts.message_digest);
    assert_eq!(
        (receipt.first_seen, receipt.last_seen),
        (start() + seconds(1), start() + seconds(2))
    );
    assert_eq!(judge(&mut model, &sent), said("settled", "settled"));
    assert_eq!(judge(&mut model, &contradicted), said("duplicate", "settled"));

    // A final reason stays, even if the next answer is another.
    let mut mismatched = Letter::cleared(LARGE, "n2");
    mismatched.draft.partners_client_id = "other".to_owned();
    let mismatched = mismatched.send();
    assert_eq!(line(&model.judge(&mismatched)), "allocation_mismatch");
    let kept = model.receipts[&mismatched.key()].clone();
    model.acme().suspended = true;
    model.pass(seconds(1));
    assert_eq!(line(&model.judge(&mismatched)), "partner_inactive");
    let expected = Receipt {
        last_seen: model.now,
        ..kept
    };
    assert_eq!(model.receipts[&mismatched.key()], expected);
}

#[test]
fn a_reused_nonce_leaves_the_first_receipt_untouched() {
    for first in ["settled", "rejected", "parked"] {
        let mut model = Model::new();
        let id = if first == "parked" { LATE } else { ALLOCATION };
        model.acme().suspended = first == "rejected";
        model.judge_letter(&Letter::cleared(id, "n"));
        assert!(model.receipt("n").starts_with(first));
        model.acme().suspended = false;
        let before = model.clone();
        model.pass(seconds(5));
        let (judgements, _) = model.post(&rules(), &[Letter::cleared(LARGE, "n").send()]);
        assert_eq!(lines(&judgements), ["nonce_reused"]);
        assert!(judgements.iter().all(|judgement| judgement.proven));
        model.now = before.now;
        assert_eq!(model, before, "{first}");
    }
}

// Parking ------------------------------------------------------------------------------------------------------------

fn parked_until(judgement: &Judgement) -> Timestamp {
    match &judgement.verdict {
        Verdict::Parked { until, .. } => *until,
        Verdict::Settled { .. } | Verdict::Duplicate { .. } | Verdict::Rejected { .. } => panic!("{judgement:?}"),
    }
}

#[test]
fn the_same_bytes_while_parked_write_nothing() {
    let mut model = Model::new();
    let sent = Letter::cleared(LATE, "n").send();
    let (judgements, changes) = model.post(&rules(), &[sent.clone(), sent.clone()]);
    assert_eq!(lines(&judgements), ["parked", "parked again"]);
    assert_eq!(changes.newly_parked[&sent.key()].index, 0);
    assert!(judgements.iter().all(|judgement| judgement.proven));
    assert_eq!(model.receipt("n"), "parked allocation_not_found");
    let row = &model.parked[&sent.key()];
    assert_eq!(
        (row.parked.parked_at, row.parked.until, row.due_at),
        (start(), start() + seconds(900), start() + seconds(1))
    );
    let before = model.clone();
    // Nothing changes its answer while it waits: neither time, nor a suspension, nor the reservation.
    let twists: [fn(&mut Model); 3] = [
        |model| model.pass(seconds(899)),
        |model| model.acme().suspended = true,
        |model| model.reserve(LATE),
    ];
    for twist in twists {
        let mut model = before.clone();
        twist(&mut model);
        let expected = model.clone();
        let (judgements, changes) = model.post(&rules(), std::slice::from_ref(&sent));
        assert_eq!(lines(&judgements), ["parked again"]);
        assert_eq!(parked_until(&judgements[0]), start() + seconds(900));
        assert!(changes.new_receipts.is_empty() && changes.changed_receipts.is_empty());
        assert!(changes.newly_parked.is_empty() && changes.parked_later.is_empty() && changes.unparked.is_empty());
        assert_eq!(model, expected);
    }
}

/// A worker that stood still for longer than its lease comes back with a message that another judged, while another copy
/// of the same signed text waits: the copy keeps its place and its verdict to come, whatever the old one would come to.
#[test]
fn a_claim_that_was_overtaken_takes_nothing_from_the_copy_that_waits_now() {
    let mut model = Model::new();
    let sent = Letter::cleared(LATE, "n").send();
    assert_eq!(line(&model.judge(&sent)), "parked");
    model.parked.get_mut(&sent.key()).expect("it waits").parked.seq = 2;
    let mut old = sent.due();
    old.delivery.source = Source::Parked {
        key: sent.key().0,
        seq: 1,
        dead_letter: None,
    };
    let twists: [fn(&mut Model); 3] = [
        |model| model.reserve(LATE),
        |model| model.acme().suspended = true,
        |model| model.pass(seconds(900)),
    ];
    for twist in twists {
        let mut model = model.clone();
        twist(&mut model);
        let before = model.clone();
        let (judgements, changes) = model.post(&rules(), std::slice::from_ref(&old));
        assert_eq!(lines(&judgements), ["parked again"]);
        assert!(changes.parked_later.is_empty() && changes.unparked.is_empty());
        assert_eq!(model, before);
    }
}

/// The policy fields may be unsigned, so the copy of a parked message may contradict itself: step 10 comes before 12.
#[test]
fn a_contradicting_copy_of_a_parked_message_is_refused() {
    let mut model = Model::new();
    let sent = Letter::cleared(LATE, "n").send();
    assert_eq!(line(&model.judge(&sent)), "parked");
    let copy = Letter::cleared(LATE, "n").with("policyResult", "rejected").send();
    assert_eq!(line(&model.judge(&copy)), "policy_contradiction");
    assert_eq!(model.parked.len(), 1, "the first one waits on");
    model.reserve(LATE);
    assert_eq!(line(&model.judge(&sent.due())), "settled");
    assert_eq!((model.receipt("n").as_str(), model.parked.len()), ("settled", 0));
}

#[test]
fn a_parked_message_is_judged_at_growing_intervals_until_its_deadline() {
    let mut model = Model::new();
    let sent = Letter::cleared(LATE, "n").send();
    assert_eq!(line(&model.judge(&sent)), "parked");
    let receipt = model.receipts[&sent.key()].clone();
    let mut waits = Vec::new();
    let end = loop {
        let due_at = model.parked[&sent.key()].due_at;
        waits.push(due_at.duration_since(model.now).as_secs());
        assert!(waits.len() < 100, "it waits for ever: {waits:?}");
        model.now = due_at;
        let judgement = model.judge(&sent.due());
        assert!(judgement.proven);
        if line(&judgement) != "parked again" {
            break line(&judgement);
        }
        assert_eq!(parked_until(&judgement), start() + seconds(900));
        assert_eq!(model.receipts[&sent.key()], receipt, "waiting on writes no receipt");
    };
    assert_eq!(end, "allocation_not_found");
    assert_eq!(waits[..8], [1, 2, 4, 8, 16, 32, 60, 60]);
    assert_eq!(waits.last(), Some(&57), "the last wait is cut by the deadline");
    assert_eq!(model.now, start() + seconds(900));
    assert!(model.parked.is_empty());
    assert_eq!(model.receipt("n"), "rejected allocation_not_found");
    // After a rejection the same bytes are judged again, with a deadline of their own.
    model.pass(seconds(10));
    let judgement = model.judge(&sent);
    assert_eq!(
        (line(&judgement), parked_until(&judgement)),
        ("parked".to_owned(), model.now + seconds(900))
    );
    assert_eq!(model.receipts[&sent.key()].first_seen, start());
}

#[test]
fn intervals_stand_extreme_settings() {
    let mut rules = rules();
    rules.park_max_interval = SignedDuration::MAX;
    rules.park_first_retry = SignedDuration::MAX;
    let until = start() + seconds(900);
    for attempts in [0, 1, 30, 31, 32, u32::MAX] {
        assert_eq!(rules.due_at(start(), attempts, until), until);
        assert_eq!(rules.due_at(Timestamp::MAX, attempts, Timestamp::MAX), Timestamp::MAX);
    }
    rules.park_first_retry = SignedDuration::from_millis(1);
    rules.park_max_interval = seconds(60);
    let mut last = start();
    for attempts in 0..100 {
        let due_at = rules.due_at(start(), attempts, until);
        assert!(due_at >= last && due_at <= start() + seconds(60), "{attempts}");
        last = due_at;
    }
    assert_eq!(last, start() + seconds(60));
}

#[test]
fn a_parked_message_settles_when_its_allocation_is_there() {
    for id in [LATE, LATE_DEALLOCATION] {
        let mut model = Model::new();
        let sent = Letter::cleared(id, "n").send();
        assert_eq!(line(&model.judge(&sent)), "parked");
        let digest = model.receipts[&sent.key()].message_digest;
        model.reserve(id);
        // Even at the deadline: what is there is not "not found".
        model.pass(seconds(900));
        let judgement = model.judge(&sent.due());
        assert_eq!(line(&judgement), "settled");
        assert_eq!((model.receipt("n").as_str(), model.parked.len()), ("settled", 0));
        assert_eq!(model.receipts[&sent.key()].message_digest, digest);
        assert_eq!(model.receipts[&sent.key()].first_seen, start());
        assert_eq!(line(&model.judge(&sent)), "duplicate");
        assert_eq!(line(&model.judge(&sent.due())), "duplicate", "claimed twice");
    }
}

/// From step 4 on, with the registry of that moment.
#[test]
fn a_parked_message_is_judged_by_the_registry_of_that_moment() {
    let twists: &[(Twist, &str, bool)] = &[
        (|model, _, _| model.partners.clear(), "unknown_partner", false),
        (
            |model, _, _| model.acme().broker_user = Some("u".to_owned()),
            "sender_mismatch",
            false,
        ),
        (|model, _, _| model.acme().keys.clear(), "signature_mismatch", false),
        (|model, _, _| model.acme().suspended = true, "partner_inactive", true),
        (
            |model, _, _| {
                model.allocations.insert(
                    LATE,
                    Allocation {
                        enterprise_id: "beta".to_owned(),
                        ..reserved(LATE)
                    },
                );
            },
            "not_permitted",
            true,
        ),
        (
            |model, _, _| {
                model.reserve(LATE);
                assert_eq!(line(&model.judge_letter(&Letter::cleared(LATE, "m"))), "settled");
            },
            "duplicate",
            true,
        ),
        (
            |model, _, _| {
                model.reserve(LATE);
                assert_eq!(
                    line(&model.judge_letter(&Letter::new(LATE, released(), "m"))),
                    "settled"
                );
            },
            "already_settled",
            true,
        ),
    ];
    for (twist, expected, proven) in twists {
        let (mut model, mut rules, mut letter) = (Model::new(), rules(), Letter::cleared(LATE, "n"));
        let sent = letter.send();
        assert_eq!(line(&model.judge(&sent)), "parked");
        twist(&mut model, &mut rules, &mut letter);
        model.pass(seconds(1));
        let judgement = model.judge(&sent.due());
        assert_eq!((line(&judgement), judgement.proven), ((*expected).to_owned(), *proven));
        assert!(model.parked.is_empty(), "{expected}: it waits no more");
        let receipt = match *expected {
            "duplicate" => "duplicate".to_owned(),
            reason => format!("rejected {reason}"),
        };
        assert_eq!(model.receipt("n"), receipt);
        assert_eq!(model.receipts[&sent.key()].public_key, key(1).public_key());
        assert_eq!(model.receipts[&sent.key()].last_seen, model.now);
    }
}

#[test]
fn parked_messages_are_bounded_in_bytes_too() {
    let letters: Vec<Sent> = ["a", "b", "c"]
        .into_iter()
        .map(|nonce| Letter::cleared(LATE, nonce).send())
        .collect();
    let size = size_of(&letters[0].delivery);
    let mut beta = Letter::cleared(OF_BETA, "a");
    beta.draft.id = LATE;
    for (all, of_one, expected) in [
        (
            u64::MAX,
            2 * size,
            ["parked", "parked", "allocation_not_found", "parked"],
        ),
        (
            u64::MAX,
            2 * size - 1,
            ["parked", "allocation_not_found", "allocation_not_found", "parked"],
        ),
        (
            2 * size,
            u64::MAX,
            ["parked", "parked", "allocation_not_found", "allocation_not_found"],
        ),
        (0, u64::MAX, ["allocation_not_found"; 4]),
    ] {
        let mut model = Model::new();
        let mut rules = rules();
        (rules.park_max_bytes, rules.park_max_bytes_per_partner) = (all, of_one);
        let (judgements, _) = model.post(&rules, &[&letters[..], &[beta.send()]].concat());
        assert_eq!(lines(&judgements), expected, "{all} {of_one}");
    }
}

#[test]
fn a_partner_may_park_so_many_and_no_more() {
    let mut model = Model::new();
    let mut rules = rules();
    rules.park_max_per_partner = 2;
    let letters: Vec<Sent> = ["a", "b", "c", "a", "d"]
        .into_iter()
        .map(|nonce| Letter::cleared(LATE, nonce).send())
        .collect();
    let (judgements, _) = model.post(&rules, &letters);
    assert_eq!(
        lines(&judgements),
        [
            "parked",
            "parked",
            "allocation_not_found",
            "parked again",
            "allocation_not_found"
        ]
    );
    assert_eq!(model.receipt("c"), "rejected allocation_not_found");
    assert_eq!(model.parked.len(), 2);
    // Another partner's share is its own.
    let mut beta = Letter::cleared(OF_BETA, "a");
    beta.draft.id = LATE;
    let (judgements, _) = model.post(&rules, &[beta.send(), letters[2].clone()]);
    assert_eq!(lines(&judgements), ["parked", "allocation_not_found"]);
    // Those who wait may wait on, and whoever leaves makes room, in the same batch too.
    let (judgements, _) = model.post(&rules, &[letters[0].due(), letters[2].clone()]);
    assert_eq!(lines(&judgements), ["parked again", "allocation_not_found"]);
    model.pass(seconds(900));
    let (judgements, _) = model.post(&rules, &[letters[0].due(), letters[2].clone(), letters[4].clone()]);
    assert_eq!(
        lines(&judgements),
        ["allocation_not_found", "parked", "allocation_not_found"]
    );
}

/// With no time to wait, one batch may park a message and reject it: nothing stays behind.
#[test]
fn a_message_parked_and_due_in_one_batch_leaves_no_row() {
    let mut model = Model::new();
    let mut rules = rules();
    rules.park_deadline = SignedDuration::ZERO;
    let sent = Letter::cleared(LATE, "n").send();
    let (judgements, changes) = model.post(&rules, &[sent.clone(), sent.due()]);
    assert_eq!(lines(&judgements), ["parked", "allocation_not_found"]);
    assert!(changes.newly_parked.is_empty() && changes.unparked.is_empty());
    assert_eq!(
        (model.receipt("n").as_str(), model.parked.len()),
        ("rejected allocation_not_found", 0)
    );
    // One that was there goes, comes anew, and goes again.
    assert_eq!(lines(&model.post(&rules, std::slice::from_ref(&sent)).0), ["parked"]);
    let (judgements, changes) = model.post(&rules, &[sent.due(), sent.clone(), sent.due()]);
    assert_eq!(
        lines(&judgements),
        ["allocation_not_found", "parked", "allocation_not_found"]
    );
    assert_eq!((changes.unparked.len(), changes.newly_parked.len()), (1, 0));
    assert!(model.parked.is_empty());
}

// Properties ---------------------------------------------------------------------------------------------------------

/// What happens in a generated story.
#[derive(Clone, Debug)]
enum Step {
    /// Messages, by their place in the pool.
    Batch(Vec<Post>),
    Reserve(usize),
    Suspend(bool),
    /// Takes one of acme's keys away, or gives it back.
    Key(bool),
    Bind(bool),
    Pass(i64),
}

#[derive(Clone, Debug)]
enum Post {
    Queue(usize),
    /// One that waits now.
    Due(usize),
    /// One that waited once: a claim whose lease ran out.
    Stale(usize),
}

fn story(pool: usize) -> impl Strategy<Value = Vec<Step>> {
    let post = prop_oneof![
        8 => (0..pool).prop_map(Post::Queue),
        3 => any::<usize>().prop_map(Post::Due),
        1 => any::<usize>().prop_map(Post::Stale),
    ];
    let step = prop_oneof![
        8 => prop::collection::vec(post, 1..16).prop_map(Step::Batch),
        1 => (0..2_usize).prop_map(Step::Reserve),
        1 => any::<bool>().prop_map(Step::Suspend),
        1 => any::<bool>().prop_map(Step::Key),
        1 => any::<bool>().prop_map(Step::Bind),
        2 => (0..8_i64).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 1..14)
}

/// Every message that a story may hold, signed once.
fn pool() -> Vec<Sent> {
    let mut pool = Vec::new();
    for id in [ALLOCATION, DEALLOCATION, OF_BETA, LARGE, LATE, LATE_DEALLOCATION] {
        for nonce in ["1", "2", "3"] {
            for outcome in [Outcome::Cleared, released()] {
                pool.push(Letter::new(id, outcome, nonce));
            }
        }
    }
    let honest = pool.clone();
    let mut spoil = |every: usize, spoil: fn(&mut Letter)| {
        for letter in honest.iter().skip(every % 3).step_by(every) {
            let mut letter = letter.clone();
            spoil(&mut letter);
            pool.push(letter);
        }
    };
    spoil(3, |letter| letter.signed_by = 2);
    spoil(8, |letter| letter.signed_by = 9);
    spoil(4, |letter| letter.altered.push(("nonce", "1".into())));
    spoil(9, |letter| {
        letter.altered.push(("allocationId", LATE.to_string().into()))
    });
    spoil(5, |letter| letter.altered.push(("policyResult", "rejected".into())));
    spoil(5, |letter| letter.altered.push(("evaluationId", "other".into())));
    spoil(9, |letter| letter.altered.push(("signature", "1f".into())));
    spoil(9, |letter| letter.draft.partners_id = "theirs-2".to_owned());
    spoil(9, |letter| letter.draft.partners_client_id = "cust-2".to_owned());
    spoil(9, |letter| letter.draft.kind = Kind::Deallocation);
    spoil(9, |letter| letter.draft.id = OF_BETA);
    spoil(9, |letter| letter.draft.enterprise_id = "ghost".to_owned());
    spoil(5, |letter| letter.properties.user_id = Some("acme-user".to_owned()));
    spoil(12, |letter| {
        letter.properties.content_type = Some("text/plain".to_owned())
    });
    spoil(12, |letter| letter.altered.push(("status", "done".into())));
    pool.iter().map(Letter::send).collect()
}

/// Few may wait, and not for long, so that a story meets both bounds.
fn story_rules() -> Rules {
    Rules {
        park_deadline: seconds(8),
        park_first_retry: seconds(1),
        park_max_interval: seconds(3),
        park_max_per_partner: 2,
        park_max_bytes: u64::MAX,
        park_max_bytes_per_partner: u64::MAX,
        ..rules()
    }
}

/// Tells a story twice: by batches, and one message at a time. Everything must come out the same.
fn tell(pool: &[Sent], steps: &[Step], seen: &RefCell<BTreeMap<String, usize>>) -> TestCaseResult {
    let rules = story_rules();
    let (mut together, mut alone) = (Model::new(), Model::new());
    let mut once_parked: Vec<Sent> = Vec::new();
    for step in steps {
        let Step::Batch(posts) = step else {
            for model in [&mut together, &mut alone] {
                change(model, step);
            }
            continue;
        };
        let waiting: Vec<Sent> = once_parked
            .iter()
            .filter(|sent| {
                let row = together.parked.get(&sent.key());
                row.is_some_and(|row| row.message_digest == sent.facts.message_digest)
            })
            .map(Sent::due)
            .collect();
        let stale: Vec<Sent> = once_parked.iter().map(Sent::due).collect();
        let pick = |from: &[Sent], index: usize| from.get(index.checked_rem(from.len())?).cloned();
        let batch: Vec<Sent> = posts
            .iter()
            .filter_map(|post| match post {
                Post::Queue(index) => pick(pool, *index),
                Post::Due(index) => pick(&waiting, *index),
                Post::Stale(index) => pick(&stale, *index),
            })
            .collect();
        let (judgements, _) = together.post(&rules, &batch);
        let one_by_one: Vec<Judgement> = batch
            .iter()
            .flat_map(|sent| alone.post(&rules, std::slice::from_ref(sent)).0)
            .collect();
        prop_assert_eq!(&judgements, &one_by_one);
        prop_assert_eq!(&together, &alone);
        for (sent, judgement) in batch.iter().zip(&judgements) {
            *seen.borrow_mut().entry(line(judgement)).or_default() += 1;
            if let Verdict::Parked { again: false, .. } = judgement.verdict {
                once_parked.push(sent.clone());
            }
        }
        for count in parked_by_partner(&together) {
            prop_assert!(count <= rules.park_max_per_partner);
        }
        // A crash between commit and acknowledgement: the whole batch comes again.
        let mut replayed = together.clone();
        let queued: Vec<Sent> = batch
            .iter()
            .filter(|sent| !sent.delivery.source.is_parked())
            .cloned()
            .collect();
        let (again, changes) = replayed.post(&rules, &queued);
        let first: Vec<&Judgement> = batch
            .iter()
            .zip(&judgements)
            .filter(|(sent, _)| !sent.delivery.source.is_parked())
            .map(|(_, judgement)| judgement)
            .collect();
        // A copy of what waited left nothing behind. If that came to its end later in the batch, the copy may settle now;
        // nothing else may.
        let copied = |judgement: &Judgement| matches!(judgement.verdict, Verdict::Parked { again: true, .. });
        for (first, again) in first.iter().zip(&again) {
            let (before, now) = (first.verdict.kind(), again.verdict.kind());
            prop_assert!(now != VerdictKind::Settled || copied(first), "{first:?} then {again:?}");
            prop_assert!(
                before != VerdictKind::Settled || now == VerdictKind::Duplicate,
                "{again:?}"
            );
        }
        for settlement in &changes.settlements {
            prop_assert_eq!(together.allocations[&settlement.allocation.id].status, Status::Reserved);
        }
        if changes.settlements.is_empty() {
            prop_assert!(changes.balances.is_empty());
            prop_assert_eq!(&replayed.allocations, &together.allocations);
            prop_assert_eq!(&replayed.settled, &together.settled);
        }
    }
    for (id, (nonce, digest, key)) in &together.settled {
        let receipt = &together.receipts[&ReceiptKey::new(&together.allocations[id].enterprise_id, nonce)];
        let kept = (receipt.verdict, receipt.payload_digest, receipt.public_key);
        prop_assert_eq!(kept, (VerdictKind::Settled, *digest, *key));
    }
    Ok(())
}

fn change(model: &mut Model, step: &Step) {
    match step {
        Step::Batch(_) => {}
        Step::Reserve(0) => model.reserve(LATE),
        Step::Reserve(_) => model.reserve(LATE_DEALLOCATION),
        Step::Suspend(suspended) => model.acme().suspended = *suspended,
        Step::Key(given) => model.acme().keys = partner(if *given { &[1, 2] } else { &[2] }).keys,
        Step::Bind(bound) => model.acme().broker_user = bound.then(|| "acme-user".to_owned()),
        Step::Pass(time) => model.pass(seconds(*time)),
    }
}

fn parked_by_partner(model: &Model) -> impl Iterator<Item = u64> {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for row in model.parked.values() {
        *counts.entry(row.enterprise_id.clone()).or_default() += 1;
    }
    counts.into_values()
}

/// A batch of n equals n batches of one, entries sum to zero, an allocation settles once, a replay writes
/// no settlement. What [`Model::apply`] asserts is part of it.
#[test]
fn a_batch_of_n_is_n_batches_of_one() {
    let pool = pool();
    let seen = RefCell::new(BTreeMap::new());
    let config = ProptestConfig {
        cases: 1_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    TestRunner::new(config)
        .run(&story(pool.len()), |steps| tell(&pool, &steps, &seen))
        .unwrap_or_else(|failure| panic!("{failure}"));
    // A property that never meets a rule says nothing of it.
    let mut expected: Vec<&str> = Reason::ALL[1..15].iter().map(|reason| reason.as_str()).collect();
    expected.extend(["settled", "duplicate", "parked", "parked again"]);
    let seen = seen.into_inner();
    let missing: Vec<&str> = expected.into_iter().filter(|name| !seen.contains_key(*name)).collect();
    assert!(missing.is_empty(), "never met: {missing:?} of {seen:?}");
}

/// A copy of what waits is acknowledged with nothing kept, and what waited may then be refused in the same batch, its key
/// withdrawn. If that batch comes again, the copy is judged for itself.
#[test]
fn a_copy_may_settle_once_what_waited_was_refused() {
    let pool = pool();
    let steps = [
        Step::Batch(vec![Post::Queue(28), Post::Queue(65)]),
        Step::Reserve(0),
        Step::Key(false),
        Step::Batch(vec![Post::Queue(45), Post::Due(1)]),
    ];
    tell(&pool, &steps, &RefCell::default()).expect("the copy settles, and nothing else");
}
