//! Postrider's binary: composition root, command line, configuration and adapters.
//!
//! The stages and rules are in the crate `postrider_actors`, which knows none of this.

pub mod adapters;
pub mod app;
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
