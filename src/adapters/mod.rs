//! Implementations of the ports: where SQL, HTTP and files live.

#[cfg(feature = "aws")]
pub mod aws;
pub mod clock;
#[cfg(feature = "aws")]
pub mod dynamodb;
pub mod embedded;
pub mod in_flight;
pub mod inbox;
#[cfg(feature = "postgres")]
pub mod pg;
#[cfg(feature = "postgres")]
pub mod postgres;
pub mod receipts;
#[cfg(feature = "aws")]
pub mod sqs;
pub mod status_changes;
#[cfg(feature = "postgres")]
pub mod warehouse;
pub mod webhook;
