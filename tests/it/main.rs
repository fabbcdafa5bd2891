//! Everything together: the real binary, a real broker and a real database. `make test` runs it.
//!
//! Each test has a database and a vhost of its own (`kit::support`), speaks as partners do (`kit::partner`, `kit::amqp`), and ends with
//! the books checked from outside (`kit::auditor`).

mod cases;
mod kit;
