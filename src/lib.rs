//! `settled` settles asynchronous allocations for off-exchange settlement.
//!
//! A client's funds stand at a custodian and are *allocated* to a connection with a trading partner. For some partners an
//! allocation is first **reserved**; later the partner says, in a message signed with its secp256k1 account key, that it
//! is **cleared** or **released**. These messages arrive on RabbitMQ. A worker verifies them, moves the state and the
//! money in one PostgreSQL transaction, publishes what came of it, and dead-letters what it can not settle.
//!
//! # The walk of a message
//!
//! 1. [`broker::intake`] hands over whatever is waiting, up to a bound, and never waits for more.
//! 2. [`settle::Batch::read`] decodes each message, compares body and signed payload and recovers the signer, on all
//!    cores, before a database connection is taken ([`domain::message::facts`]).
//! 3. [`store::batch`] loads a [`domain::snapshot::Snapshot`] under locks, in one round trip.
//! 4. [`domain::decide::decide`] walks the table of reasons, message by message, each seeing the effects of those before
//!    it: one [`domain::verdict::Verdict`] each, one [`domain::changeset::Changeset`] for all.
//! 5. [`store::batch`] writes the changeset, one ordered list of statements, with one outbox row that holds everything to
//!    publish, and commits. What comes after an attempt that failed is said by [`settle::next_step`].
//! 6. [`worker`] acknowledges the batch; [`worker::publish`] publishes the row from memory until every confirm is in, and only
//!    then is it deleted. What a crash left, its relay publishes.
//!
//! A refused message goes to the dead-letter queue. [`worker::collector`] moves it from there into the database, one row a message
//! ([`domain::dead_letter`]); an operator looks at it there and has it replayed, which is this walk again: the worker claims the
//! row, and its verdict is written by the transaction that judges the message.
//!
//! # The rooms
//!
//! | room | what is in it |
//! |---|---|
//! | [`domain`] | the rules: values in, values out. No I/O, no clock, no async, no log |
//! | [`store`] | the only room with SQL |
//! | [`broker`] | the only room with lapin |
//! | [`settle`] | the steps of one batch; `explain` runs the same ones without the write. What becomes of one that failed |
//! | [`worker`] | the consumer pool: the order of steps, patience, shutdown. Lanes, publishing, relay, due and held messages, collector |
//! | [`desk`] | what an operator may ask and do, typed: look, plan, replay, act, life, books |
//! | [`api`] | what partners and clients ask over HTTP: tokens, updates, allocations, balances, receipts |
//! | [`console`] | the operator's console in the browser: pages on the desk, and who may see and do what |
//! | [`cli`] | what an operator types: it parses, asks the desk, and prints |
//! | [`partner`] | the other side: a partner that signs and publishes |
//! | [`telemetry`], [`health`], [`http`] | what a person watches: every signal is a type |
//! | [`config`] | every number someone may change, with its unit, in `config/default.toml` |
//! | [`retry`] | the only place that names the `backoff` crate |
//! | [`redact`] | what may be shown of a text that comes from outside |
//! | [`tls`] | whom to trust, and which hosts need no encryption |
//! | [`fail`] | where a test may kill the process, or break what it needs |
//!
//! A rule about money, states or messages goes to `domain` (if it needs the time, time is an argument). A question to
//! PostgreSQL goes to `store`, a word to RabbitMQ to `broker`, an order of steps or a retry to `worker` and its
//! neighbours. `tests/it/cases/tidy.rs` holds the walls.
//!
//! # Invariants
//!
//! 1. The domain does no I/O and can not fail: it returns verdicts.
//! 2. One delivery in, one verdict out.
//! 3. Nothing is acknowledged before the transaction that settles it has committed.
//! 4. Transfers are balanced by construction and only added; entries are their two sides.
//! 5. An allocation leaves `reserved` at most once.
//! 6. The same message is answered as before; the same nonce with other content is refused.
//! 7. SQL only in `store`, lapin only in `broker`, log and metric macros only in `telemetry`.
//! 8. Everything has a bound: message, batch, lanes, retries, waits, queues, memory.
//! 9. Migrations are added, never edited.
//!
//! A [`domain::reason::Reason`] is a value, never an error; a [`store::StoreError`] is ours, never a verdict. Neither
//! converts into the other.

pub mod api;
pub mod broker;
pub mod cli;
pub mod config;
pub mod console;
pub mod desk;
pub mod domain;
pub mod fail;
pub mod health;
pub mod http;
pub mod partner;
mod plain;
mod race;
pub mod redact;
pub mod retry;
mod sealed;
pub mod settle;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod worker;
