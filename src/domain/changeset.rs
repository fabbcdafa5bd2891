//! What a batch changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use jiff::Timestamp;
use num_bigint::BigInt;
use uuid::Uuid;

use super::{
    allocation::Allocation,
    ledger::{AccountId, Transfer},
    message::Content,
    receipt::{Receipt, ReceiptKey},
    reply::ReplyTo,
    signature::PublicKey,
    snapshot::Parked,
};

/// One settlement: the record after it, the movement, and what authorised it.
#[derive(Clone, Debug)]
pub struct Settlement {
    pub allocation: Arc<Allocation>,
    pub transfer: Transfer,
    /// The message that did it: what was signed, and the signature.
    pub content: Arc<Content>,
    pub public_key: PublicKey,
}

/// A message to keep until its allocation is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewlyParked {
    pub key: ReceiptKey,
    /// Its place in the batch.
    pub index: usize,
    pub enterprise_id: String,
    pub nonce: String,
    pub allocation_id: Uuid,
    pub parked: Parked,
    pub due_at: Timestamp,
    /// What it takes of the room for parked messages.
    pub bytes: u64,
}

/// What a batch changes, each row once.
#[derive(Clone, Debug, Default)]
pub struct Changeset {
    pub settlements: Vec<Settlement>,
    /// Receipts that were not there.
    pub new_receipts: BTreeMap<ReceiptKey, Receipt>,
    /// Receipts that were there, as they are now.
    pub changed_receipts: BTreeMap<ReceiptKey, Receipt>,
    pub newly_parked: BTreeMap<ReceiptKey, NewlyParked>,
    /// Parked messages that go on waiting: attempts so far and when they are due.
    pub parked_later: BTreeMap<ReceiptKey, (u32, Timestamp)>,
    /// Parked messages that wait no more, each with which waiting under its key it was.
    pub unparked: BTreeMap<ReceiptKey, i64>,
    /// Where the newest copy of a parked message asks to be answered.
    pub asked_again: BTreeMap<ReceiptKey, ReplyTo>,
    /// Who else is answered, by place in the batch: the newest copy of a message that waited.
    pub also_answered: BTreeMap<usize, ReplyTo>,
    /// What each account's balance changes by.
    pub balances: BTreeMap<AccountId, BigInt>,
    /// Digests of signed texts that are refused because their key is revoked: the key may be reinstated, they never are.
    pub distrusted: BTreeSet<(PublicKey, [u8; 32])>,
}
