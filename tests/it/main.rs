//! Everything together: the real binary, a real broker and a real database. `make test` runs it.
//!
//! Each test has a database and a vhost of its own (`support`), speaks as partners do (`partner`, `amqp`), and ends with
//! the books checked from outside (`auditor`).

#![expect(dead_code, reason = "the tests that use the rest are on their way")]

mod amqp;
mod auditor;
mod commands;
mod doctor;
#[cfg(feature = "faults")]
mod kill;
mod partner;
mod proof;
mod proxy;
mod raw;
mod readme;
mod support;
mod tidy;
mod tls;
mod traffic;
mod worker;
