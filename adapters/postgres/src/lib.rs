//! Postrider on Postgres' protocol: the ledger of rows, and tables of a warehouse as destinations.

pub mod ledger;
mod pg;
pub mod warehouse;

pub use pg::BadSettings;
