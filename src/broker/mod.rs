//! The broker: connections, topology, taking messages in and publishing them. The only room with lapin; what crosses
//! its door are the values of [`crate::domain::delivery`].
//!
//! Consume and publish on two [`Connection`]s: under a memory or disk alarm the broker stops reading from a connection
//! that publishes, and acknowledgements would stop with it.

mod answer;
mod channel;
mod connection;
mod error;
mod greeting;
mod hosts;
pub mod intake;
pub mod management;
pub mod own_exchange;
pub mod own_queue;
mod properties;
pub mod publisher;
pub mod replies;
pub mod rights;
mod settings;
mod sieve;
pub mod subscribe;
#[cfg(test)]
mod testing;
pub mod topology;
pub mod witness;

use self::answer::{ANSWER_TIMEOUT, all_together, answer};
use self::connection::Socket;
pub use self::connection::{Connection, probe};
pub use self::error::BrokerError;
pub use self::greeting::server_version;
pub use self::hosts::Memory;
pub use self::settings::BrokerSettings;

/// An environment variable that a consuming process must be started with, and its value: the stack of each thread, which
/// lapin gives us no other way to choose. lapin parses header tables by recursion, on a thread of its own: with this the
/// deepest that a frame can hold passes, and only what is used is ever paid for.
pub const STACK: (&str, &str) = ("RUST_MIN_STACK", "134217728");
