//! Implementations of the ports: where SQL, HTTP and files live.

pub mod clock;
pub mod embedded;
pub mod inbox;
pub mod webhook;
