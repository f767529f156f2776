//! x
pub mod adapters;
