//! Fakes and conformance suites.

mod clock;
pub mod conformance;
pub mod fixtures;
mod memory_rates;
mod memory_store;

pub use clock::FakeClock;
pub use memory_rates::MemoryRateTable;
pub use memory_store::MemoryStore;
