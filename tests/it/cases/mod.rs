//! One file a topic.

mod arguments;
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
mod metrics;
mod mutants;
mod outage;
mod outbox;
mod own_queue;
mod pages;
mod per_message;
mod poison;
mod proof;
mod readme;
mod reconcile;
mod reinstated;
mod replays;
mod strikes;
mod telling;
mod tidy;
mod tls;
mod topology;
mod traps;
mod worker;
