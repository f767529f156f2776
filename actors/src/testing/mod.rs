//! Fakes and conformance suites.

mod clock;
pub mod conformance;
pub mod fixtures;
mod memory_store;

pub use clock::FakeClock;
pub use memory_store::MemoryStore;
