//! Postrider over HTTP.

pub mod receipts;
pub mod signature;
pub mod token;
pub mod webhook;
