//! Everything together: the real binary, a real broker and a real database. `make test` runs it.
//!
//! Each test has a database and a vhost of its own (`support`), speaks as partners do (`partner`, `amqp`), and ends with
//! the books checked from outside (`auditor`).

mod amqp;
mod arguments;
mod auditor;
mod batch;
mod causes;
mod collector;
mod commands;
mod desk;
mod desk_page;
mod doctor;
mod doors;
mod drain;
mod event_format;
mod fairness;
#[cfg(feature = "faults")]
mod faults;
mod flood;
mod letters;
mod mutants;
mod outage;
mod outbox;
mod own_queue;
mod partner;
mod per_message;
mod poison;
mod private;
mod proof;
mod proxy;
mod raw;
mod readme;
mod reconcile;
mod reinstated;
mod replays;
mod strikes;
mod support;
mod telling;
mod tidy;
mod tls;
mod topology;
mod traffic;
mod traps;
mod worker;
