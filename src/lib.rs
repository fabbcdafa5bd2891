//! settled
pub mod domain;
