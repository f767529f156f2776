//! Postrider on the file system.

pub mod in_flight;
pub mod inbox;
pub mod receipts;
pub mod status_changes;
