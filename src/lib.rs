//! settled
pub mod broker;
pub mod domain;
pub mod fail;
pub mod settle;
pub mod store;
pub mod tls;
