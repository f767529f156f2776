//! Postrider's stages, rules and supervision.
//!
//! The crate knows no SDK, no SQL and no HTTP library. Rules are pure functions and state machines in
//! [`model`]; [`ports`] say what the outside world must offer; [`messages`] cross between actors;
//! the stages are thin actors that move batches; [`supervision`] keeps them alive.
//!
//! `supervision → stages → {messages, ports} → model`, never back.

/// A named point where the fault tests crash the process (`NAME=return` in `FAILPOINTS`) or raise a
/// panic (`NAME=panic`). Without the feature `failpoints` it is nothing.
#[macro_export]
macro_rules! failpoint {
    ($name:expr) => {
        ::fail::fail_point!($name, |_| ::std::process::abort())
    };
}

pub mod messages;
pub mod model;
pub mod ports;
#[cfg(feature = "testing")]
pub mod testing;
