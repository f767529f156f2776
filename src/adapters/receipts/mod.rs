//! Where receipts come from.

#[cfg(feature = "aws")]
pub mod cloudwatch;
pub mod http;
