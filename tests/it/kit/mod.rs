//! What the cases are told with: places, clients, partners, traffic, and the auditor who checks the books from outside.

pub(crate) mod amqp;
pub(crate) mod api;
pub(crate) mod auditor;
pub(crate) mod cells;
pub(crate) mod certificates;
pub(crate) mod command;
pub(crate) mod console;
pub(crate) mod contract;
pub(crate) mod front;
pub(crate) mod in_process;
pub(crate) mod issuer;
pub(crate) mod otlp;
pub(crate) mod partner;
pub(crate) mod pooler;
pub(crate) mod postgres;
pub(crate) mod private;
pub(crate) mod program;
pub(crate) mod proxy;
pub(crate) mod rabbitmq;
pub(crate) mod raw;
pub(crate) mod schema_change;
pub(crate) mod secrets;
pub(crate) mod storm;
pub(crate) mod stranded;
pub(crate) mod support;
pub(crate) mod traffic;
