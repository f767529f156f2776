//! Fakes and conformance suites.

pub mod clock;
pub mod fixtures;

pub use clock::FakeClock;
