//! Postrider's binary: composition root, command line and configuration.
//!
//! The stages and rules are in the crate `postrider_actors`, which knows none of this; the adapters are crates of their
//! own, one per family of engines, and meet only in [`app`].

mod alarm_board;
mod api;
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
pub mod clock;
pub mod config;
pub mod demo;
pub mod descriptors;
mod events;
pub mod exit;
pub mod findings;
pub mod node;
pub mod ops;
pub mod receiver;
mod shapes;
pub mod systemd;
pub mod telemetry;
