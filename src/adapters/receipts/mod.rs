//! Where receipts come from.

#[cfg(feature = "aws")]
pub mod cloudwatch;
pub mod dir;
pub mod http;
pub mod queue;
