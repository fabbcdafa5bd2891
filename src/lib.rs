//! settled
pub mod broker;
pub mod config;
pub mod domain;
pub mod due;
pub mod fail;
pub mod http;
pub mod publish;
pub mod relay;
pub mod retry;
pub mod settle;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod worker;
