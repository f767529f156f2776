//! Postrider's binary: composition root, command line, configuration and adapters.
//!
//! The stages and rules are in the crate `postrider_actors`, which knows none of this.

pub mod adapters;
#[cfg_attr(
    not(all(feature = "aws", feature = "postgres")),
    allow(
        clippy::unused_async,
        clippy::unnecessary_wraps,
        reason = "what waits and fails is left out with an engine"
    )
)]
pub mod app;
pub mod built_in;
pub mod cli;
pub mod config;
pub mod console;
pub mod demo;
pub mod listener;
pub mod node;
pub mod ops;
pub mod receiver;
pub mod signature;
pub mod systemd;
pub mod telemetry;
mod tls;
