//! Where receipts come from.

pub mod http;
