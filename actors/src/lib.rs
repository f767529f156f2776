//! Postrider's stages, rules and supervision.
//!
//! The crate knows no SDK, no SQL and no HTTP library. Rules are pure functions and state machines in
//! [`model`]; [`ports`] say what the outside world must offer; [`messages`] cross between actors;
//! [`flow`] holds what bounds and wakes them; [`metrics`] is what they count; the stages are thin actors
//! that move batches;
//! [`supervision`] keeps them alive.
//!
//! `supervision → stages → {messages, flow, metrics, ports} → model`, never back; no stage knows another.

/// A named point where the fault tests crash the process (`NAME=return` in `FAILPOINTS`) or raise a
/// panic (`NAME=panic`). Without the feature `failpoints` it is nothing.
#[macro_export]
macro_rules! failpoint {
    ($name:expr) => {
        ::fail::fail_point!($name, |_| ::std::process::abort())
    };
}

pub mod flow;
pub mod messages;
pub mod metrics;
pub mod model;
pub mod ports;
pub mod reading;
pub mod supervision;

pub mod batcher;
pub mod canary_judge;
pub mod coordinator;
pub mod file_watcher;
pub mod parser;
pub mod queue_feed;
pub mod receipt_collector;
pub mod receipt_reconciler;
pub mod receipt_reread;
pub mod receipt_sweeper;
pub mod sweeper;
pub mod table_delivery;
pub mod throttle;
pub mod webhook_delivery;

#[cfg(feature = "testing")]
pub mod testing;
