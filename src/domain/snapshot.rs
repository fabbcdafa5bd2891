//! What a batch is judged by: everything that it may touch, as the database had it, and the settings.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::{
    allocation::{Allocation, Kind},
    currency::Symbols,
    receipt::{Receipt, ReceiptKey},
    reply::ReplyTo,
    signature::PublicKey,
};

/// Where a partner's messages are judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Whereabouts {
    #[default]
    Here,
    /// Nowhere just now: it moves to another cell, or from one.
    OnItsWay,
    /// In another cell.
    Elsewhere,
}

/// What a partner may do, as the registry says at the moment of judging.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partner {
    /// The AMQP user its messages must carry in `user_id`, if it is bound to one.
    pub broker_user: Option<String>,
    pub suspended: bool,
    /// Its messages are held and not judged; what can not be held is refused.
    pub quarantined: bool,
    pub whereabouts: Whereabouts,
    pub async_allocations: bool,
    pub async_deallocations: bool,
    /// The keys valid now, by the database's clock.
    pub keys: Vec<PublicKey>,
    /// The keys that are revoked now.
    pub revoked: Vec<PublicKey>,
    /// What it calls the currencies.
    pub symbols: Symbols,
}

impl Partner {
    /// Why the partner may not settle this kind now.
    pub(super) fn inactive(&self, kind: Kind) -> Option<&'static str> {
        match self.whereabouts {
            Whereabouts::Here => {}
            Whereabouts::OnItsWay => return Some("the partner is on its way to another cell"),
            Whereabouts::Elsewhere => {
                return Some("the partner lives in another cell, and its messages are judged there");
            }
        }
        if self.suspended {
            return Some("the partner is suspended");
        }
        if self.quarantined {
            return Some("the partner is in quarantine: its messages are held, and this one can not be");
        }
        let enabled = match kind {
            Kind::Allocation => self.async_allocations,
            Kind::Deallocation => self.async_deallocations,
        };
        if enabled {
            return None;
        }
        Some(match kind {
            Kind::Allocation => "asynchronous allocations are not enabled for the partner",
            Kind::Deallocation => "asynchronous deallocations are not enabled for the partner",
        })
    }
}

/// A message that waits for its allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parked {
    /// Which waiting under its key, as in `Source::Parked`; 0 where the database has not numbered it yet.
    pub seq: i64,
    pub parked_at: Timestamp,
    /// When waiting ends in a rejection.
    pub until: Timestamp,
    /// How often it was judged and parked.
    pub attempts: u32,
    /// Where its newest copy asks to be answered too.
    pub also: Option<ReplyTo>,
}

/// Whose a key is that made a signature and is not accepted, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisteredKey {
    pub enterprise_id: String,
    pub standing: KeyStanding,
}

/// Where a key stands that is not revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyStanding {
    /// Not valid yet.
    Early,
    Valid,
    Expired,
}

/// Everything a batch may touch, as the database had it while it was locked.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The database's clock, cut to milliseconds.
    pub now: Timestamp,
    pub partners: HashMap<String, Partner>,
    pub allocations: HashMap<Uuid, Arc<Allocation>>,
    pub receipts: HashMap<ReceiptKey, Receipt>,
    pub parked: HashMap<ReceiptKey, Parked>,
    /// Parked messages by enterprise, for those whose message may be parked by this batch.
    pub parked_counts: HashMap<String, u64>,
    /// The same in bytes.
    pub parked_bytes: HashMap<String, u64>,
    /// Of the signed texts that this batch brings, by key: those that were refused because the key was revoked then.
    pub distrusted: HashSet<(PublicKey, [u8; 32])>,
    /// Of the keys that made this batch's signatures and are not accepted: those that are registered, and for whom.
    pub registered: HashMap<PublicKey, RegisteredKey>,
    /// What was told of those receipts whose reason a newer version wrote.
    pub newer_details: HashMap<ReceiptKey, String>,
    /// Bytes of all parked messages, as far as they were counted lately.
    pub parked_bytes_of_all: u64,
}

/// What the settings say about judging.
#[derive(Clone, Debug)]
pub struct Rules {
    /// How long a message waits for its allocation.
    pub park_deadline: SignedDuration,
    /// The first wait before a parked message is judged again; it doubles each time.
    pub park_first_retry: SignedDuration,
    /// The longest wait between two judgements of a parked message.
    pub park_max_interval: SignedDuration,
    /// Parked messages a partner may have.
    pub park_max_per_partner: u64,
    /// Bytes of all parked messages, bodies and properties.
    pub park_max_bytes: u64,
    /// Bytes of the parked messages of a partner.
    pub park_max_bytes_per_partner: u64,
    /// The `source` attribute of every event.
    pub event_source: String,
    /// Logins whose messages count as sent by whomever the partner of their routing key is bound to: of the API, which has
    /// proven that by a token.
    pub api_users: Vec<String>,
}

impl Rules {
    /// When a message parked `attempts` times is due again.
    pub(super) fn due_at(&self, now: Timestamp, attempts: u32, until: Timestamp) -> Timestamp {
        let factor = 1_i32.checked_shl(attempts.min(30)).unwrap_or(i32::MAX);
        let wait = self.park_first_retry.saturating_mul(factor).min(self.park_max_interval);
        now.saturating_add(wait).map_or(until, |due| due.min(until))
    }
}
