//! The rules. Values in, values out: no I/O, no clock, no async, no log.
//!
//! [`message`] turns bytes into [`message::Facts`], [`signature`] says who signed them, [`decide`] walks the table of
//! reasons over facts and a [`snapshot::Snapshot`] and answers one [`verdict::Verdict`] a message and one
//! [`changeset::Changeset`] a batch, [`event`] says it to the world.
#![warn(
    clippy::wildcard_enum_match_arm,
    clippy::match_wildcard_for_single_variants,
    clippy::arithmetic_side_effects
)]

mod added;
pub mod address;
mod agreement;
pub mod allocation;
pub mod authority;
pub mod calendar;
mod carried;
pub mod changeset;
pub mod currency;
pub mod dead_letter;
pub mod decide;
pub mod delivery;
pub mod digest;
pub mod draft;
pub mod epoch;
pub mod event;
pub mod event_id;
pub(crate) mod json;
pub mod kept;
pub mod ledger;
pub mod message;
pub mod names;
pub mod notice;
pub mod person;
pub mod public_key;
pub mod publications;
pub mod reason;
pub mod receipt;
pub mod reply;
pub mod share;
pub mod signature;
pub mod snapshot;
pub mod told;
pub mod trace;
pub mod update;
pub mod verdict;
pub mod wire;
