//! The world around `decide`: a store that holds what changesets told it, a queue that hands out again what was not
//! acknowledged, an outbox, lanes that do one step at a time and may be killed between any two. What commits is told to the
//! reference as well, and everything that came of it is compared.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    rc::Rc,
    sync::Arc,
};

use jiff::{SignedDuration, Timestamp};
use num_bigint::BigInt;
use serde_json::Value;
use settled::domain::{
    allocation::{self, Allocation, PolicyResult, Status},
    changeset::Changeset,
    decide::decide,
    delivery::{HeaderValue, Headers, Publication, PublicationKind},
    ledger::{AccountId, Amount, Quantity},
    message::MessageRef,
    publications,
    receipt::{Receipt, ReceiptKey},
    signature::{PublicKey, Signer},
    snapshot::{Parked, Partner, Rules, Snapshot, Whereabouts},
    verdict::{Judgement, Verdict, VerdictKind},
};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    palette::{
        LETTERS_EACH, Letter, MAPS, PALETTE, RESERVATIONS, RESERVED_AT_FIRST, TRACEPARENT, identity, key_number,
        number, public_key,
    },
    reference::{
        self, AWAITING, Account, Answer, Books, Door, INITIATED_BY, Kind, Millis, PARK_DEADLINE, PARK_MAX, Record,
        Reservation, Validity, class_of, rfc3339,
    },
    schedule::{Op, Who},
};

/// 2026-01-02T00:00:00Z.
const MIDNIGHT: i64 = 1_767_312_000_000;
/// When every schedule begins.
const START: Millis = 3_600_000;
/// How long the writer of an outbox row and the claimer of a parked one own it.
const LEASE: Millis = 4_000;

fn time(millis: Millis) -> Timestamp {
    Timestamp::from_millisecond(MIDNIGHT + i64::try_from(millis).expect("a day")).expect("a time")
}

fn millis(time: Timestamp) -> Millis {
    Millis::try_from(time.as_millisecond() - MIDNIGHT).expect("the day of the schedules")
}

fn rules() -> Rules {
    Rules {
        park_deadline: SignedDuration::from_millis(i64::try_from(PARK_DEADLINE).expect("seconds")),
        park_first_retry: SignedDuration::from_secs(1),
        park_max_interval: SignedDuration::from_secs(5),
        park_max_per_partner: PARK_MAX as u64,
        park_max_bytes: u64::MAX,
        park_max_bytes_per_partner: u64::MAX,
        event_source: "/settled".to_owned(),
        api_users: Vec::new(),
    }
}

/// What is broken on purpose, to see that it is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    ForgetsTheReceiptOfADuplicate,
    ForgetsTheReceiptOfARejection,
    WritesBalancesTwice,
    SettlesWithoutTheRecord,
    LosesRedeliveries,
    AcknowledgesBeforeTheCommit,
    WritesNoOutboxRow,
    DeletesTheOutboxRowBeforeItIsPublished,
    PublishesTheSecondJudgementOfOneCommit,
    TimesEventsByTheClock,
    LoadsKeysThatAreNotValid,
    LoadsReceiptsByTheBodysNonceOnly,
    ExtendsTheDeadlineOfARepeat,
    LeavesParkedRowsBehind,
    TellsTheReferenceNobodyIsSuspended,
}

impl Flaw {
    pub(crate) const ALL: [Flaw; 15] = [
        Flaw::ForgetsTheReceiptOfADuplicate,
        Flaw::ForgetsTheReceiptOfARejection,
        Flaw::WritesBalancesTwice,
        Flaw::SettlesWithoutTheRecord,
        Flaw::LosesRedeliveries,
        Flaw::AcknowledgesBeforeTheCommit,
        Flaw::WritesNoOutboxRow,
        Flaw::DeletesTheOutboxRowBeforeItIsPublished,
        Flaw::PublishesTheSecondJudgementOfOneCommit,
        Flaw::TimesEventsByTheClock,
        Flaw::LoadsKeysThatAreNotValid,
        Flaw::LoadsReceiptsByTheBodysNonceOnly,
        Flaw::ExtendsTheDeadlineOfARepeat,
        Flaw::LeavesParkedRowsBehind,
        Flaw::TellsTheReferenceNobodyIsSuspended,
    ];
}

/// What the schedules did, counted where it was done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) ops: u64,
    pub(crate) commits: u64,
    /// Verdicts and reasons of messages that were committed.
    pub(crate) verdicts: BTreeMap<&'static str, u64>,
    /// Processes killed, by who and between which steps.
    pub(crate) kills: BTreeMap<(Who, &'static str), u64>,
    /// Commits whose answer was lost: those that had committed, and those that had not.
    pub(crate) lost: [u64; 2],
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Tally) {
        self.ops += other.ops;
        self.commits += other.commits;
        for (name, count) in &other.verdicts {
            *self.verdicts.entry(name).or_default() += count;
        }
        for (place, count) in &other.kills {
            *self.kills.entry(*place).or_default() += count;
        }
        self.lost = [self.lost[0] + other.lost[0], self.lost[1] + other.lost[1]];
    }
}

/// One message of a batch in hand.
#[derive(Clone, Copy, Debug)]
struct Held {
    letter: u16,
    door: Door,
}

impl Held {
    fn letter(self) -> &'static Letter {
        &PALETTE[usize::from(self.letter)]
    }

    fn by_ref(self) -> MessageRef<'static> {
        let letter = self.letter();
        let delivery = match self.door {
            Door::Queue => &letter.queued,
            Door::Due => &letter.due,
        };
        MessageRef {
            delivery,
            facts: &letter.facts,
        }
    }
}

type BatchId = u64;
type Publications = Rc<[Publication]>;

/// What a process has in hand, step by step.
#[derive(Clone, Debug, Default)]
enum Hand {
    #[default]
    Empty,
    /// Taken and read. `earlier` is what an attempt came to whose commit is unknown.
    Holding {
        id: BatchId,
        held: Vec<Held>,
        earlier: Option<Publications>,
    },
    /// Committed, and nothing is acknowledged.
    Committed {
        id: BatchId,
        held: Vec<Held>,
        publications: Publications,
    },
    /// Acknowledged; so many are confirmed.
    Publishing {
        id: BatchId,
        publications: Publications,
        confirmed: usize,
    },
    /// Every confirm is in; the outbox row is still there.
    Published { id: BatchId },
}

impl Hand {
    fn stage(&self) -> Option<&'static str> {
        match self {
            Hand::Empty => None,
            Hand::Holding { earlier: None, .. } => Some("taken, not committed"),
            Hand::Holding { earlier: Some(_), .. } => Some("committed, and not told so"),
            Hand::Committed { .. } => Some("committed, not acknowledged"),
            Hand::Publishing { confirmed: 0, .. } => Some("acknowledged, not published"),
            Hand::Publishing { .. } => Some("half published"),
            Hand::Published { .. } => Some("published, row not deleted"),
        }
    }
}

/// Every stage that somebody can be killed in.
pub(crate) fn stages(who: Who) -> &'static [&'static str] {
    const ALL: [&str; 6] = [
        "taken, not committed",
        "committed, and not told so",
        "committed, not acknowledged",
        "acknowledged, not published",
        "half published",
        "published, row not deleted",
    ];
    match who {
        Who::LaneA | Who::LaneB | Who::DueA | Who::DueB => &ALL,
        Who::Relay => &ALL[3..],
    }
}

/// A parked row.
#[derive(Clone, Debug)]
struct Row {
    letter: u16,
    seq: u64,
    parked: Parked,
    due_at: Timestamp,
    leased_until: Option<Timestamp>,
}

struct OutboxRow {
    publications: Publications,
    leased_until: Millis,
}

/// A schedule failed: what was seen and what must have been.
pub(crate) type Wrong = String;

macro_rules! ensure {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            return Err(format!($($what)+));
        }
    };
}

pub(crate) struct World {
    flaw: Option<Flaw>,
    rules: Rules,
    /// The reference. Its registry and its clock are everybody's.
    books: Books,
    allocations: BTreeMap<Uuid, Allocation>,
    receipts: BTreeMap<ReceiptKey, Receipt>,
    parked: BTreeMap<ReceiptKey, Row>,
    /// What was refused because its key was revoked.
    distrusted: BTreeSet<(PublicKey, [u8; 32])>,
    /// What the accounts say, and what the entries say.
    balances: BTreeMap<AccountId, BigInt>,
    entries: BTreeMap<AccountId, BigInt>,
    /// Payload digest, signature and key of each settlement.
    authority: BTreeMap<Uuid, (String, String, u8)>,
    accounts: BTreeMap<Account, AccountId>,
    batches: BTreeSet<BatchId>,
    outbox: BTreeMap<BatchId, OutboxRow>,
    queue: VecDeque<u16>,
    hands: [Hand; 5],
    numbers: u64,
    sent: Vec<u16>,
    /// Messages that the broker was told to forget.
    disposed: usize,
    /// What must be heard, and what subscribers heard.
    owed: HashSet<u64>,
    heard: HashSet<u64>,
    /// The bytes of a settlement's event, by its id.
    copies: HashMap<Uuid, u64>,
    /// Letters that lie in settlement.dead, by their identity.
    dead: HashSet<u16>,
    tally: Tally,
}

impl World {
    pub(crate) fn new(flaw: Option<Flaw>) -> Self {
        let mut world = Self {
            flaw,
            rules: rules(),
            books: first_books(),
            allocations: BTreeMap::new(),
            receipts: BTreeMap::new(),
            parked: BTreeMap::new(),
            distrusted: BTreeSet::new(),
            balances: BTreeMap::new(),
            entries: BTreeMap::new(),
            authority: BTreeMap::new(),
            accounts: BTreeMap::new(),
            batches: BTreeSet::new(),
            outbox: BTreeMap::new(),
            queue: VecDeque::new(),
            hands: Default::default(),
            numbers: 0,
            sent: Vec::new(),
            disposed: 0,
            owed: HashSet::new(),
            heard: HashSet::new(),
            copies: HashMap::new(),
            dead: HashSet::new(),
            tally: Tally::default(),
        };
        // The same funds on both sides; what moves them afterwards is counted on each side for itself.
        for (account, balance) in world.books.balances.clone() {
            let id = world.account(account);
            world.balances.insert(id, balance.clone());
            world.entries.insert(id, balance);
        }
        for reservation in RESERVATIONS.iter().take(RESERVED_AT_FIRST) {
            world.reserve(reservation);
        }
        world
    }

    fn account(&mut self, account: Account) -> AccountId {
        let next = AccountId::try_from(self.accounts.len()).expect("few") + 1;
        *self.accounts.entry(account).or_insert(next)
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// As settled.reserve() does it: the record, the transfer, and whoever waits is woken.
    fn reserve(&mut self, reservation: &Reservation) {
        let now = time(self.books.now);
        for row in self.parked.values_mut() {
            if PALETTE[usize::from(row.letter)].word.said.id == reservation.id {
                row.due_at = row.due_at.min(now);
            }
        }
        if self.allocations.contains_key(&reservation.id) {
            return;
        }
        let accounts = [
            ("available", reservation.client),
            ("held", reservation.connection),
            ("allocated", reservation.connection),
        ];
        let [available, held, allocated] =
            accounts.map(|(kind, owner)| self.account((kind, Some(owner), reservation.currency)));
        let source = match reservation.kind {
            Kind::Allocation => available,
            Kind::Deallocation => allocated,
        };
        let quantity = number(reservation.quantity);
        for sums in [&mut self.balances, &mut self.entries] {
            *sums.entry(source).or_default() -= &quantity;
            *sums.entry(held).or_default() += &quantity;
        }
        self.allocations.insert(
            reservation.id,
            Allocation {
                id: reservation.id,
                kind: match reservation.kind {
                    Kind::Allocation => allocation::Kind::Allocation,
                    Kind::Deallocation => allocation::Kind::Deallocation,
                },
                status: Status::Reserved,
                amount: Amount {
                    currency: reservation.currency.to_owned(),
                    quantity: Quantity::parse(reservation.quantity).expect("a quantity"),
                },
                connection_id: reservation.connection,
                enterprise_id: reservation.enterprise.to_owned(),
                client_id: reservation.client,
                partners_client_id: reservation.partners_client.to_owned(),
                partners_connection_id: reservation.partners_connection.to_owned(),
                client_external_id: reservation.external_id.to_owned(),
                initiated_by: INITIATED_BY.to_owned(),
                notes: reservation.notes.map(str::to_owned),
                reason: Some(reservation.reason.unwrap_or(AWAITING).to_owned()),
                retriable: reservation.retriable,
                partner_external_id: None,
                partner_symbol: None,
                evaluation_id: None,
                pending_approval_id: None,
                policy_result: None,
                settled_nonce: None,
                created_at: now,
                updated_at: now,
                available_account: available,
                held_account: held,
                allocated_account: allocated,
            },
        );
        self.books.reserve(*reservation);
    }

    /// Tells a schedule to its end: what happens, then no more faults until everything is at rest, then the proof.
    pub(crate) fn tell(mut self, ops: &[Op]) -> Result<Tally, Wrong> {
        for (place, op) in ops.iter().enumerate() {
            self.happen(*op)
                .map_err(|wrong| format!("step {place}, {op:?}: {wrong}"))?;
            self.tally.ops += 1;
        }
        self.come_to_rest()
            .map_err(|wrong| format!("after the faults stopped: {wrong}"))?;
        self.prove().map_err(|wrong| format!("at rest: {wrong}"))?;
        Ok(self.tally)
    }

    fn happen(&mut self, op: Op) -> Result<(), Wrong> {
        match op {
            Op::Send(letter) => {
                self.sent.push(letter);
                self.queue.push_back(letter);
            }
            Op::Overtake(place) => {
                if let Some(letter) = self.queue.remove(usize::from(place)) {
                    self.queue.push_front(letter);
                }
            }
            Op::Step(who, most) => self.step(who, most)?,
            Op::Walk(who, most) => {
                self.step(who, most)?;
                while self.hands[who as usize].stage().is_some() {
                    self.step(who, most)?;
                }
            }
            Op::Lost(who, committed) => {
                if let Hand::Holding { .. } = self.hands[who as usize] {
                    self.tally.lost[usize::from(committed)] += 1;
                    self.commit(who, Some(committed))?;
                }
            }
            Op::Kill(who) => self.kill(who),
            Op::Reserve(number) => {
                let reservation = RESERVATIONS[usize::from(number)];
                self.reserve(&reservation);
            }
            Op::Suspend(enterprise, suspended) => self.partner(enterprise).suspended = suspended,
            Op::Revoke(key, revoked) => {
                let keys = self.books.partners.values_mut().flat_map(|partner| &mut partner.keys);
                keys.filter(|validity| validity.key == key)
                    .for_each(|validity| validity.revoked = revoked);
            }
            Op::Bind(bound) => self.partner("acme").user = bound.then_some("acme-user"),
            Op::Void(letter) => self.void(letter),
            Op::Map(map) => self.partner("acme").symbols = MAPS[usize::from(map)],
            Op::Deallocations(enabled) => self.partner("acme").deallocations = enabled,
            Op::Register => {
                self.books
                    .partners
                    .entry("ghost")
                    .or_insert_with(|| partner(&[(5, 0, None)]));
            }
            Op::Pass(millis) => self.books.now += Millis::from(millis),
        }
        Ok(())
    }

    /// As `settled nonce void` does it: the receipt, and whoever waits under it is due.
    fn void(&mut self, letter: u16) {
        let word = &PALETTE[usize::from(letter)].word;
        let Some(enterprise) = word.enterprise else {
            return;
        };
        let key = ReceiptKey::new(enterprise, word.said.nonce);
        if let Some(receipt) = self.receipts.get_mut(&key)
            && matches!(receipt.verdict, VerdictKind::Parked | VerdictKind::Rejected)
            && !receipt.is_closed()
        {
            receipt.voided = true;
        }
        if let Some(row) = self.parked.get_mut(&key) {
            row.due_at = row.due_at.min(time(self.books.now));
        }
        self.books.void(enterprise, word.said.nonce);
    }

    fn partner(&mut self, enterprise: &'static str) -> &mut reference::Partner {
        self.books.partners.get_mut(enterprise).expect("a partner")
    }

    // The walk ---------------------------------------------------------------------------------------------------------

    fn step(&mut self, who: Who, most: u8) -> Result<(), Wrong> {
        match std::mem::take(&mut self.hands[who as usize]) {
            Hand::Empty => self.hands[who as usize] = self.take(who, usize::from(most)),
            holding @ Hand::Holding { .. } => {
                self.hands[who as usize] = holding;
                self.commit(who, None)?;
            }
            Hand::Committed { id, held, publications } => {
                self.dispose(held.iter().filter(|held| held.door == Door::Queue).count());
                self.hands[who as usize] = self.after_ack(id, publications);
            }
            Hand::Publishing {
                id,
                publications,
                confirmed,
            } => {
                // In two halves, where there are two.
                let end = if confirmed == 0 {
                    publications.len().div_ceil(2)
                } else {
                    publications.len()
                };
                for publication in publications.get(confirmed..end).unwrap_or_default() {
                    self.hear(publication);
                }
                self.hands[who as usize] = if end < publications.len() {
                    Hand::Publishing {
                        id,
                        publications,
                        confirmed: end,
                    }
                } else {
                    Hand::Published { id }
                };
            }
            Hand::Published { id } => {
                self.outbox.remove(&id);
            }
        }
        Ok(())
    }

    fn dispose(&mut self, messages: usize) {
        if self.flaw != Some(Flaw::AcknowledgesBeforeTheCommit) {
            self.disposed += messages;
        }
    }

    fn after_ack(&mut self, id: BatchId, publications: Publications) -> Hand {
        if self.flaw == Some(Flaw::DeletesTheOutboxRowBeforeItIsPublished) {
            self.outbox.remove(&id);
        }
        if publications.is_empty() {
            return Hand::Empty;
        }
        Hand::Publishing {
            id,
            publications,
            confirmed: 0,
        }
    }

    fn take(&mut self, who: Who, most: usize) -> Hand {
        let held: Vec<Held> = match who {
            Who::LaneA | Who::LaneB => {
                let many = most.min(self.queue.len());
                if self.flaw == Some(Flaw::AcknowledgesBeforeTheCommit) {
                    self.disposed += many;
                }
                self.queue
                    .drain(..many)
                    .map(|letter| Held {
                        letter,
                        door: Door::Queue,
                    })
                    .collect()
            }
            Who::DueA | Who::DueB => self.claim(most),
            Who::Relay => return self.take_abandoned(),
        };
        if held.is_empty() {
            return Hand::Empty;
        }
        Hand::Holding {
            id: self.number(),
            held,
            earlier: None,
        }
    }

    /// Parked messages that are due, oldest first.
    fn claim(&mut self, most: usize) -> Vec<Held> {
        let (now, lease) = (time(self.books.now), time(self.books.now + LEASE));
        let mut due: Vec<&mut Row> = self.parked.values_mut().filter(|row| row.due_at <= now).collect();
        due.sort_by_key(|row| row.seq);
        due.into_iter()
            .take(most)
            .map(|row| {
                (row.due_at, row.leased_until) = (lease, Some(lease));
                Held {
                    letter: row.letter,
                    door: Door::Due,
                }
            })
            .collect()
    }

    /// One outbox row whose lease has run out.
    fn take_abandoned(&mut self) -> Hand {
        let now = self.books.now;
        let abandoned = self.outbox.iter_mut().find(|(_, row)| row.leased_until < now);
        abandoned.map_or(Hand::Empty, |(id, row)| {
            row.leased_until = now + LEASE;
            Hand::Publishing {
                id: *id,
                publications: Rc::clone(&row.publications),
                confirmed: 0,
            }
        })
    }

    /// Load, decide, write, commit. `lost`: nobody hears whether it committed, and it is said here.
    fn commit(&mut self, who: Who, lost: Option<bool>) -> Result<(), Wrong> {
        let Hand::Holding { id, held, earlier } = std::mem::take(&mut self.hands[who as usize]) else {
            return Ok(());
        };
        let batch: Vec<MessageRef<'_>> = held.iter().map(|held| held.by_ref()).collect();
        let (judgements, changes) = decide(self.snapshot(&batch), &batch, &self.rules);
        ensure!(
            judgements.len() == batch.len(),
            "{} verdicts for {} messages",
            judgements.len(),
            batch.len()
        );
        let spoken: Vec<Vec<Publication>> = batch
            .iter()
            .zip(&judgements)
            .map(|(message, judgement)| self.say(*message, judgement))
            .collect();
        if self.batches.contains(&id) {
            // An earlier attempt of the same id had committed: what it came to is what counts.
            let mut publications = earlier.ok_or_else(|| format!("batch {id} is there, and nobody tried it before"))?;
            if self.flaw == Some(Flaw::PublishesTheSecondJudgementOfOneCommit) {
                publications = row_of(spoken);
            }
            self.hands[who as usize] = Hand::Committed { id, held, publications };
            return Ok(());
        }
        if lost == Some(false) {
            self.hands[who as usize] = Hand::Holding { id, held, earlier };
            return Ok(());
        }
        self.batches.insert(id);
        self.tally.commits += 1;
        self.apply(&held, &judgements, &changes)?;
        for ((held, judgement), spoken) in held.iter().zip(&judgements).zip(&spoken) {
            let answer = self.ask_the_reference(*held);
            *self.tally.verdicts.entry(outcome_of(&answer)).or_default() += 1;
            self.compare(*held, judgement, spoken, &answer).map_err(|wrong| {
                let letter = held.letter;
                format!("letter {letter} ({:?}, {}): {wrong}", held.door, describe(letter))
            })?;
        }
        let publications = row_of(spoken);
        if !publications.is_empty() && self.flaw != Some(Flaw::WritesNoOutboxRow) {
            let row = OutboxRow {
                publications: Rc::clone(&publications),
                leased_until: self.books.now + LEASE,
            };
            self.outbox.insert(id, row);
        }
        self.hands[who as usize] = if lost == Some(true) {
            Hand::Holding {
                id,
                held,
                earlier: Some(publications),
            }
        } else {
            Hand::Committed { id, held, publications }
        };
        Ok(())
    }

    fn kill(&mut self, who: Who) {
        let hand = std::mem::take(&mut self.hands[who as usize]);
        if let Some(stage) = hand.stage() {
            *self.tally.kills.entry((who, stage)).or_default() += 1;
        }
        if let Hand::Holding { held, .. } | Hand::Committed { held, .. } = hand
            && !matches!(
                self.flaw,
                Some(Flaw::LosesRedeliveries | Flaw::AcknowledgesBeforeTheCommit)
            )
        {
            for held in held.iter().rev().filter(|held| held.door == Door::Queue) {
                self.queue.push_front(held.letter);
            }
        }
    }

    // The store --------------------------------------------------------------------------------------------------------

    /// What the store loads for a batch: only what it names.
    fn snapshot(&self, batch: &[MessageRef<'_>]) -> Snapshot {
        let mut snapshot = Snapshot {
            now: time(self.books.now),
            ..Snapshot::default()
        };
        let (mut ids, mut enterprises) = (BTreeSet::new(), BTreeSet::new());
        for content in batch.iter().filter_map(|message| message.facts.content.as_ref().ok()) {
            let update = &content.update;
            enterprises.insert(update.enterprise_id.as_str());
            if let Signer::Key(key) = &content.signer
                && self.distrusted.contains(&(*key, content.payload_digest))
            {
                snapshot.distrusted.insert((*key, content.payload_digest));
            }
            ids.insert(update.id);
            ids.extend(&content.signed_ids);
            let signed = content.signed_nonce.as_ref();
            let signed = signed.filter(|_| self.flaw != Some(Flaw::LoadsReceiptsByTheBodysNonceOnly));
            for nonce in [Some(&update.nonce), signed].into_iter().flatten() {
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
        for enterprise in enterprises {
            let of_partner = self
                .parked
                .values()
                .filter(|row| PALETTE[usize::from(row.letter)].word.enterprise == Some(enterprise));
            let count = of_partner.count() as u64;
            if some_missing && count > 0 {
                snapshot.parked_counts.insert(enterprise.to_owned(), count);
            }
            if let Some(partner) = self.books.partners.get(enterprise) {
                snapshot
                    .partners
                    .insert(enterprise.to_owned(), self.load_partner(partner));
            }
        }
        snapshot
    }

    fn load_partner(&self, partner: &reference::Partner) -> Partner {
        let any = self.flaw == Some(Flaw::LoadsKeysThatAreNotValid);
        let valid = partner
            .keys
            .iter()
            .filter(|validity| any || validity.holds_at(self.books.now));
        Partner {
            quarantined: false,
            whereabouts: Whereabouts::Here,
            broker_user: partner.user.map(str::to_owned),
            suspended: partner.suspended,
            async_allocations: partner.allocations,
            async_deallocations: partner.deallocations,
            keys: valid.map(|validity| public_key(validity.key)).collect(),
            revoked: partner
                .keys
                .iter()
                .filter(|validity| validity.revoked)
                .map(|validity| public_key(validity.key))
                .collect(),
            symbols: partner
                .symbols
                .iter()
                .map(|(symbol, currency)| ((*symbol).to_owned(), (*currency).to_owned()))
                .collect(),
        }
    }

    /// Writes a changeset in the store's order, and refuses what the store would refuse.
    fn apply(&mut self, held: &[Held], judgements: &[Judgement], changes: &Changeset) -> Result<(), Wrong> {
        let forgotten = match self.flaw {
            Some(Flaw::ForgetsTheReceiptOfADuplicate) => "duplicate",
            Some(Flaw::ForgetsTheReceiptOfARejection) => "rejected",
            _ => "",
        };
        self.distrusted.extend(&changes.distrusted);
        for (key, receipt) in &changes.new_receipts {
            ensure!(
                !self.receipts.contains_key(key),
                "a receipt is inserted twice: {receipt:?}"
            );
            if receipt.verdict.as_str() != forgotten {
                self.receipts.insert(*key, receipt.clone());
            }
        }
        for (key, receipt) in &changes.changed_receipts {
            ensure!(
                self.receipts.contains_key(key),
                "a receipt is updated that is not there: {receipt:?}"
            );
            if receipt.verdict.as_str() != forgotten {
                self.receipts.insert(*key, receipt.clone());
            }
        }
        for settlement in &changes.settlements {
            let after = &settlement.allocation;
            let before = self
                .allocations
                .get(&after.id)
                .ok_or_else(|| format!("{} settles and is not there", after.id))?;
            ensure!(before.status == Status::Reserved, "{} leaves reserved twice", after.id);
            let content = &settlement.content;
            let digest = hex::encode(Sha256::digest(&content.payload));
            let signature = content.signature.map(hex::encode).unwrap_or_default();
            let authority = (digest, signature, key_number(&settlement.public_key));
            self.authority.insert(after.id, authority);
            if self.flaw != Some(Flaw::SettlesWithoutTheRecord) {
                self.allocations.insert(after.id, Allocation::clone(after));
            }
            for (account, change) in settlement.transfer.entries() {
                *self.entries.entry(account).or_default() += change;
            }
        }
        for (account, change) in &changes.balances {
            let balance = self.balances.entry(*account).or_default();
            *balance += change;
            if self.flaw == Some(Flaw::WritesBalancesTwice) {
                *balance += change;
            }
        }
        self.park(held, judgements, changes)
    }

    fn park(&mut self, held: &[Held], judgements: &[Judgement], changes: &Changeset) -> Result<(), Wrong> {
        if self.flaw != Some(Flaw::LeavesParkedRowsBehind) {
            self.parked.retain(|key, _| !changes.unparked.contains_key(key));
        }
        for (key, new) in &changes.newly_parked {
            let held = held
                .get(new.index)
                .ok_or("a parked message that is none of the batch")?;
            let (now, until) = (time(self.books.now), new.parked.until);
            ensure!(
                now < new.due_at && new.due_at <= until,
                "parked until {until}, and due at {}",
                new.due_at
            );
            let row = Row {
                letter: held.letter,
                seq: self.number(),
                parked: new.parked.clone(),
                due_at: new.due_at,
                leased_until: None,
            };
            ensure!(self.parked.insert(*key, row).is_none(), "parked twice: {new:?}");
        }
        for (key, (attempts, due_at)) in &changes.parked_later {
            if let Some(row) = self.parked.get_mut(key) {
                row.parked.attempts = *attempts;
                // One that was woken while it was judged stays due.
                if row.leased_until.is_none_or(|lease| row.due_at >= lease) {
                    row.due_at = *due_at;
                }
                row.leased_until = None;
            }
        }
        if self.flaw == Some(Flaw::ExtendsTheDeadlineOfARepeat) {
            for (held, judgement) in held.iter().zip(judgements) {
                if let (Door::Queue, Verdict::Parked { again: true, .. }) = (held.door, &judgement.verdict) {
                    let word = &held.letter().word;
                    let key = ReceiptKey::new(word.enterprise.unwrap_or_default(), word.said.nonce);
                    if let Some(row) = self.parked.get_mut(&key) {
                        row.parked.until = time(self.books.now + PARK_DEADLINE);
                    }
                }
            }
        }
        Ok(())
    }

    // What is said -----------------------------------------------------------------------------------------------------

    fn say(&self, message: MessageRef<'_>, judgement: &Judgement) -> Vec<Publication> {
        let now = time(self.books.now);
        if self.flaw == Some(Flaw::TimesEventsByTheClock) {
            let mut judgement = judgement.clone();
            if let Verdict::Settled { allocation } | Verdict::Duplicate { allocation } = &mut judgement.verdict {
                Arc::make_mut(allocation).updated_at = now;
            }
            return publications::publications(message, &judgement, now, &self.rules);
        }
        publications::publications(message, judgement, now, &self.rules)
    }

    fn ask_the_reference(&mut self, held: Held) -> Answer {
        let word = &held.letter().word;
        if self.flaw == Some(Flaw::TellsTheReferenceNobodyIsSuspended) {
            let mut books = self.books.clone();
            books
                .partners
                .values_mut()
                .for_each(|partner| partner.suspended = false);
            let answer = books.judge(word, held.door);
            books.partners = std::mem::take(&mut self.books.partners);
            self.books = books;
            return answer;
        }
        self.books.judge(word, held.door)
    }

    /// One verdict and everything that is said of it, against the reference.
    fn compare(
        &mut self,
        held: Held,
        judgement: &Judgement,
        spoken: &[Publication],
        answer: &Answer,
    ) -> Result<(), Wrong> {
        let verdict = judgement.verdict.kind().as_str();
        let reason = judgement.verdict.reason().map(|reason| reason.label());
        ensure!(
            (verdict, reason) == (answer.verdict, answer.reason),
            "the verdict is {verdict} {reason:?}, and must be {} {:?}",
            answer.verdict,
            answer.reason
        );
        if let (Verdict::Rejected { detail, .. }, Some(field)) = (&judgement.verdict, answer.names) {
            ensure!(
                detail.starts_with(&format!("{field}: ")),
                "the detail {detail:?} does not name {field}"
            );
        }
        let of_kind = |kind| spoken.iter().filter(move |publication| publication.kind == kind);
        let events: Vec<&Publication> = of_kind(PublicationKind::Event).collect();
        let dead: Vec<&Publication> = of_kind(PublicationKind::DeadLetter).collect();
        let replies: Vec<&Publication> = of_kind(PublicationKind::Reply).collect();
        let counts = (events.len(), dead.len(), replies.len());
        let expected = (
            usize::from(answer.published),
            usize::from(answer.dead),
            usize::from(answer.reply.is_some()),
        );
        ensure!(
            counts == expected,
            "events, dead letters, replies: {counts:?}, and must be {expected:?}"
        );
        let letter = held.letter();
        for event in events {
            ensure!(
                (event.exchange.as_str(), event.routing_key.as_str())
                    == ("settlement.events", answer.routing_key.as_str()),
                "an event goes to {} {}, and must go to {}",
                event.exchange,
                event.routing_key,
                answer.routing_key
            );
            self.compare_event(letter, event, answer)?;
        }
        for reply in replies {
            ensure!(
                ("", answer.reply) == (reply.exchange.as_str(), Some(reply.routing_key.as_str())),
                "the reply goes to {} {}",
                reply.exchange,
                reply.routing_key
            );
            ensure!(
                reply.properties.correlation_id == letter.queued.properties.correlation_id,
                "the reply carries another correlation_id"
            );
            self.compare_event(letter, reply, answer)?;
        }
        for dead in dead {
            compare_dead_letter(letter, dead, self.books.now, answer)?;
        }
        self.owed.extend(
            spoken
                .iter()
                .filter(|publication| publication.kind != PublicationKind::Reply)
                .map(mark_of),
        );
        Ok(())
    }

    fn compare_event(&mut self, letter: &Letter, event: &Publication, answer: &Answer) -> Result<(), Wrong> {
        let properties = &event.properties;
        ensure!(
            properties.content_type.as_deref() == Some("application/cloudevents+json")
                && properties.delivery_mode == Some(2)
                && properties.message_id.as_deref() == Some(answer.event_id.to_string().as_str()),
            "the event's properties are {properties:?}"
        );
        let traced = letter.kept_headers.contains(&"traceparent");
        let headers = traced.then(|| Headers::from([("traceparent".to_owned(), HeaderValue::text(TRACEPARENT))]));
        ensure!(
            properties.headers == headers,
            "the event's headers are {:?}",
            properties.headers
        );
        let settles = answer.event["data"]["allocation"].is_object();
        if settles && event.kind == PublicationKind::Event {
            let mark = mark_of(event);
            // A copy that is the first one byte for byte was compared when that was.
            match self.copies.insert(answer.event_id, mark) {
                Some(first) if first == mark => return Ok(()),
                Some(_) => return Err("a copy of the event differs from the first one".to_owned()),
                None => {}
            }
        }
        let mut said: Value =
            serde_json::from_slice(&event.body).map_err(|error| format!("the event is no JSON: {error}"))?;
        if let Some(data) = said["data"].as_object_mut().filter(|_| !settles) {
            let detail = data.remove("detail");
            let detail = detail.as_ref().and_then(Value::as_str).unwrap_or_default();
            ensure!((1..=512).contains(&detail.len()), "the detail is {detail:?}");
        }
        ensure!(
            said == answer.event,
            "the event is\n{said}\nand must be\n{}",
            answer.event
        );
        Ok(())
    }

    /// A subscriber of everything.
    fn hear(&mut self, publication: &Publication) {
        self.heard.insert(mark_of(publication));
        if publication.kind == PublicationKind::DeadLetter {
            self.dead.extend(identity(&publication.routing_key, &publication.body));
        }
    }

    // The end ----------------------------------------------------------------------------------------------------------

    /// No more faults: within two rounds nothing waits anywhere, whatever was killed.
    fn come_to_rest(&mut self) -> Result<(), Wrong> {
        for who in Who::ALL {
            self.walk_on(who)?;
        }
        for _ in 0..2 {
            while !self.queue.is_empty() {
                self.happen(Op::Walk(Who::LaneA, 4))?;
            }
            // Every lease and every deadline runs out.
            self.books.now += PARK_DEADLINE + LEASE + 1;
            while self.outbox.values().any(|row| row.leased_until < self.books.now) {
                self.happen(Op::Walk(Who::Relay, 1))?;
            }
            let now = time(self.books.now);
            while self.parked.values().any(|row| row.due_at <= now) {
                self.happen(Op::Walk(Who::DueA, 4))?;
            }
        }
        let held = self.hands.iter().filter(|hand| hand.stage().is_some()).count();
        let waiting = [self.queue.len(), self.outbox.len(), self.parked.len(), held];
        ensure!(
            waiting == [0; 4],
            "in queue, outbox, parked, in hand there are still {waiting:?}"
        );
        Ok(())
    }

    fn walk_on(&mut self, who: Who) -> Result<(), Wrong> {
        while self.hands[who as usize].stage().is_some() {
            self.step(who, 1)?;
        }
        Ok(())
    }

    /// The state against the reference's, and what must hold whatever happened.
    fn prove(&self) -> Result<(), Wrong> {
        ensure!(
            self.disposed == self.sent.len(),
            "{} were sent, {} disposed of",
            self.sent.len(),
            self.disposed
        );
        let silent = self.owed.difference(&self.heard).count();
        ensure!(
            silent == 0,
            "{silent} events or dead letters of committed effects were never heard"
        );
        let invented = self.heard.difference(&self.owed).count();
        ensure!(
            invented == 0,
            "{invented} events or dead letters tell of nothing that was committed"
        );
        self.prove_money()?;
        self.prove_allocations()?;
        self.prove_receipts()?;
        ensure!(
            self.parked.len() == self.books.waiting.len(),
            "{} messages wait, and {} must",
            self.parked.len(),
            self.books.waiting.len()
        );
        for letter in &self.sent {
            self.prove_place(*letter)?;
        }
        Ok(())
    }

    fn prove_money(&self) -> Result<(), Wrong> {
        ensure!(
            self.balances == self.entries,
            "balances {:?} and entries {:?}",
            self.balances,
            self.entries
        );
        let mut sums: BTreeMap<&str, BigInt> = BTreeMap::new();
        for (account, id) in &self.accounts {
            let balance = self.balances.get(id).cloned().unwrap_or_default();
            let expected = self.books.balances.get(account).cloned().unwrap_or_default();
            ensure!(
                balance == expected,
                "the balance of {account:?} is {balance}, and must be {expected}"
            );
            ensure!(
                account.0 == "external" || balance >= BigInt::ZERO,
                "{account:?} owes {balance}"
            );
            *sums.entry(account.2).or_default() += balance;
        }
        ensure!(
            self.books
                .balances
                .keys()
                .all(|account| self.accounts.contains_key(account)),
            "an account is missing"
        );
        ensure!(
            sums.values().all(|sum| *sum == BigInt::ZERO),
            "currencies sum to {sums:?}"
        );
        Ok(())
    }

    fn prove_allocations(&self) -> Result<(), Wrong> {
        ensure!(
            self.allocations.len() == self.books.allocations.len(),
            "allocations are missing"
        );
        for (id, expected) in &self.books.allocations {
            let record = self
                .allocations
                .get(id)
                .ok_or_else(|| format!("allocation {id} is missing"))?;
            let (seen, wanted) = (columns(record), columns_of(expected));
            ensure!(seen == wanted, "allocation {id} is\n{seen:?}\nand must be\n{wanted:?}");
            let authority = expected
                .settled
                .as_ref()
                .map(|settled| (settled.payload.clone(), settled.signature.clone(), settled.key));
            let kept = self.authority.get(id);
            ensure!(
                kept == authority.as_ref(),
                "allocation {id} was settled by {kept:?}, and must be by {authority:?}"
            );
        }
        Ok(())
    }

    fn prove_receipts(&self) -> Result<(), Wrong> {
        ensure!(
            self.receipts.len() == self.books.receipts.len(),
            "there are {} receipts, and must be {}",
            self.receipts.len(),
            self.books.receipts.len()
        );
        let mut accepted = BTreeSet::new();
        for ((enterprise, nonce), expected) in &self.books.receipts {
            let receipt = self
                .receipts
                .get(&ReceiptKey::new(enterprise, nonce))
                .ok_or_else(|| format!("there is no receipt of {enterprise} {nonce}"))?;
            let seen = reference::Receipt {
                payload: hex::encode(receipt.payload_digest),
                message: hex::encode(receipt.message_digest),
                verdict: receipt.verdict.as_str(),
                reason: receipt.reason.map(|reason| reason.label()),
                allocation: receipt.allocation_id,
                event: receipt.event_id,
                key: key_number(&receipt.public_key),
                first: millis(receipt.first_seen),
                last: millis(receipt.last_seen),
                voided: receipt.voided,
            };
            ensure!(
                (receipt.enterprise_id.as_str(), receipt.nonce.as_str()) == (*enterprise, *nonce),
                "the receipt of {enterprise} {nonce} is another's"
            );
            ensure!(
                seen == *expected,
                "the receipt of {enterprise} {nonce} is\n{seen:?}\nand must be\n{expected:?}"
            );
            ensure!(
                seen.verdict != "settled" || accepted.insert(seen.allocation),
                "{} settled twice",
                seen.allocation
            );
        }
        let settled = self
            .allocations
            .values()
            .filter(|allocation| allocation.status != Status::Reserved)
            .count();
        ensure!(
            accepted.len() == settled,
            "{settled} settled, by {} receipts",
            accepted.len()
        );
        Ok(())
    }

    /// A message that was sent is in some place: it has its effect, or it lies in the dead-letter queue. One that came
    /// again while its like was parked shares that one's fate.
    fn prove_place(&self, letter: u16) -> Result<(), Wrong> {
        if identity_of(letter).is_some_and(|identity| self.dead.contains(&identity)) {
            return Ok(());
        }
        let word = &PALETTE[usize::from(letter)].word;
        let slot = (word.enterprise.unwrap_or_default(), word.signed.nonce);
        let receipt = self
            .books
            .receipts
            .get(&slot)
            .filter(|receipt| receipt.payload == word.payload);
        let receipt = receipt.ok_or_else(|| format!("letter {letter} ({}) is in no place", describe(letter)))?;
        let like_is_dead = self.dead.iter().any(|dead| {
            let like = &PALETTE[usize::from(*dead)].word;
            like.digest == receipt.message && like.enterprise == word.enterprise
        });
        ensure!(
            matches!(receipt.verdict, "settled" | "duplicate") || like_is_dead,
            "letter {letter} ({}) is in no place; its receipt says {}",
            describe(letter),
            receipt.verdict
        );
        Ok(())
    }
}

/// The name under which an outcome is counted.
fn outcome_of(answer: &Answer) -> &'static str {
    match (answer.verdict, answer.published) {
        ("rejected", _) => answer.reason.unwrap_or_default(),
        ("parked", false) => "parked again",
        (verdict, _) => verdict,
    }
}

fn identity_of(letter: u16) -> Option<u16> {
    let letter = &PALETTE[usize::from(letter)];
    identity(letter.word.routing_key, &letter.queued.body)
}

/// What the outbox row of a batch holds.
fn row_of(spoken: Vec<Vec<Publication>>) -> Publications {
    spoken
        .into_iter()
        .flatten()
        .filter(|publication| publication.kind != PublicationKind::Reply)
        .collect()
}

/// A publication in a number, for sets.
fn mark_of(publication: &Publication) -> u64 {
    let mut hasher = DefaultHasher::new();
    publication.exchange.hash(&mut hasher);
    publication.routing_key.hash(&mut hasher);
    publication.properties.message_id.hash(&mut hasher);
    publication.body.hash(&mut hasher);
    hasher.finish()
}

/// For the reader of a failure.
fn describe(letter: u16) -> String {
    let word = &PALETTE[usize::from(letter)].word;
    let variant = usize::from(letter) % LETTERS_EACH;
    format!(
        "variant {variant} of reservation {}, {}, nonce {}, {:?}, {:?}",
        usize::from(letter) / LETTERS_EACH,
        word.routing_key,
        word.said.nonce,
        word.said.released,
        word.signature
    )
}

/// The properties of a dead letter.
fn compare_dead_letter(letter: &Letter, dead: &Publication, now: Millis, answer: &Answer) -> Result<(), Wrong> {
    let reason = answer.reason.unwrap_or_default();
    let (class, is_final) = class_of(reason);
    ensure!(
        dead.exchange == "settlement.dead"
            && dead.routing_key == letter.word.routing_key
            && dead.body == letter.queued.body,
        "the dead letter is not the message"
    );
    let received = &letter.queued.properties;
    let mut headers: Headers = received.headers.clone().unwrap_or_default();
    headers.retain(|name, _| letter.kept_headers.contains(&name.as_str()));
    for (name, value) in [
        ("settled-origin-user-id", &received.user_id),
        ("settled-origin-expiration", &received.expiration),
    ] {
        if let Some(value) = value {
            headers.insert(name.to_owned(), HeaderValue::text(value));
        }
    }
    for (name, value) in [
        ("settled-reason", reason),
        ("settled-digest", letter.word.digest.as_str()),
        ("settled-failed-at", rfc3339(now).as_str()),
        ("settled-origin-exchange", "settlement.updates"),
        ("settled-origin-routing-key", letter.word.routing_key),
    ] {
        headers.insert(name.to_owned(), HeaderValue::text(value));
    }
    headers.insert("settled-class".to_owned(), HeaderValue::LongLongInt(i64::from(class)));
    headers.insert("settled-final".to_owned(), HeaderValue::Boolean(is_final));
    if reason == "message_too_large" {
        let length = i64::try_from(letter.queued.body.len()).expect("a small body");
        headers.insert("settled-body-length".to_owned(), HeaderValue::LongLongInt(length));
    }
    let mut said = dead.properties.headers.clone().unwrap_or_default();
    let detail = said.remove("settled-detail");
    ensure!(
        detail.as_ref().and_then(HeaderValue::as_text).is_some(),
        "the dead letter has no detail"
    );
    ensure!(
        said == headers,
        "the dead letter's headers are\n{said:?}\nand must be\n{headers:?}"
    );
    let expected = settled::domain::delivery::Properties {
        headers: dead.properties.headers.clone(),
        delivery_mode: Some(2),
        user_id: None,
        expiration: None,
        ..received.clone()
    };
    ensure!(
        dead.properties == expected,
        "the dead letter's properties are {:?}",
        dead.properties
    );
    Ok(())
}

/// An allocation as text, by the public names: what the store has, and what it must have.
fn columns(record: &Allocation) -> Vec<(&'static str, String)> {
    let text = |value: &Option<String>| format!("{value:?}");
    vec![
        ("status", record.status.as_str().to_owned()),
        ("reason", text(&record.reason)),
        ("retriable", record.retriable.to_string()),
        ("partnerExternalId", text(&record.partner_external_id)),
        ("partnerSymbol", text(&record.partner_symbol)),
        ("evaluationId", text(&record.evaluation_id)),
        ("pendingApprovalId", text(&record.pending_approval_id)),
        (
            "policyResult",
            text(&record.policy_result.map(PolicyResult::as_str).map(str::to_owned)),
        ),
        ("nonce", text(&record.settled_nonce)),
        ("createdAt", rfc3339(millis(record.created_at))),
        ("updatedAt", rfc3339(millis(record.updated_at))),
        ("quantity", record.amount.quantity.to_string()),
    ]
}

fn columns_of(record: &Record) -> Vec<(&'static str, String)> {
    let text = |value: Option<&str>| format!("{:?}", value.map(str::to_owned));
    let settled = record.settled.as_ref();
    vec![
        ("status", record.status.to_owned()),
        ("reason", text(record.reason)),
        ("retriable", record.retriable.to_string()),
        ("partnerExternalId", text(settled.map(|settled| settled.partners_id))),
        ("partnerSymbol", text(settled.and_then(|settled| settled.symbol))),
        ("evaluationId", text(settled.and_then(|settled| settled.evaluation))),
        ("pendingApprovalId", text(settled.and_then(|settled| settled.approval))),
        (
            "policyResult",
            text(settled.and_then(|settled| settled.policy.as_deref())),
        ),
        ("nonce", text(settled.map(|settled| settled.nonce))),
        ("createdAt", rfc3339(record.created)),
        ("updatedAt", rfc3339(record.updated)),
        ("quantity", record.reservation.quantity.to_owned()),
    ]
}

fn partner(keys: &[(u8, Millis, Option<Millis>)]) -> reference::Partner {
    let valid = |(key, from, until): &(u8, Millis, Option<Millis>)| Validity {
        key: *key,
        from: *from,
        until: *until,
        revoked: false,
    };
    reference::Partner {
        user: None,
        suspended: false,
        allocations: true,
        deallocations: true,
        keys: keys.iter().map(valid).collect(),
        symbols: &[],
    }
}

/// Two partners, and the funds that the reservations will need.
fn first_books() -> Books {
    let mut books = Books {
        now: START,
        partners: BTreeMap::from([
            // Key 4 comes in late and goes soon.
            (
                "acme",
                partner(&[
                    (1, 0, None),
                    (2, 0, Some(START + 30_000)),
                    (4, START + 5_000, Some(START + 60_000)),
                ]),
            ),
            ("beta", partner(&[(3, 0, None)])),
        ]),
        allocations: BTreeMap::new(),
        receipts: BTreeMap::new(),
        waiting: BTreeMap::new(),
        distrusted: BTreeSet::new(),
        balances: BTreeMap::new(),
    };
    for reservation in &RESERVATIONS {
        let Reservation {
            kind,
            client,
            connection,
            currency,
            quantity,
            ..
        } = *reservation;
        let source = match kind {
            Kind::Allocation => ("available", Some(client), currency),
            Kind::Deallocation => ("allocated", Some(connection), currency),
        };
        books.move_funds(("external", None, currency), source, quantity);
    }
    books
}
