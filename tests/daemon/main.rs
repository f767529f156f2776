//! The real binary with real files, sockets and signals. One module per theme; where a test covers a
//! case of the fault catalogue, its name starts with the case's id. The judge is `tests/oracle`, which
//! shares no code with the product.
//!
//! Knobs, for longer runs than CI's: `POSTRIDER_KILLS`, `POSTRIDER_ROWS` and `POSTRIDER_SEED` (kill loop),
//! `POSTRIDER_CHAOS_S` and `POSTRIDER_CHAOS_SEED` (chaos), `POSTRIDER_F4_SEEDS`, `POSTRIDER_F8_ROWS`,
//! `POSTRIDER_FILES` (F29), `POSTRIDER_LINE_BYTES` (F20), `POSTRIDER_KEEP=1` (keep the
//! directories of failed tests), `POSTRIDER_PYTHON` (an interpreter for the oracle).
#![allow(
    clippy::disallowed_types,
    reason = "real processes run in real time: no test here can drive a clock"
)]
#![cfg_attr(
    not(all(feature = "aws", feature = "postgres")),
    allow(dead_code, reason = "some of what tests share is for engines that are left out")
)]

mod alarms;
mod api;
mod bundles;
mod care;
mod chaos;
mod cli;
mod clock;
#[cfg(feature = "aws")]
#[path = "../cloud/mod.rs"]
mod cloud;
mod crash;
mod damage;
mod delivery;
mod disk;
mod events;
mod evidence;
mod fairness;
mod files;
mod guard;
mod isolation;
mod liveness;
mod memory;
mod openapi;
mod ops;
mod ordering;
mod page;
mod panics;
#[cfg(feature = "postgres")]
#[path = "../pg/mod.rs"]
mod pg;
mod promtool;
#[cfg(feature = "postgres")]
mod quiet;
#[cfg(feature = "postgres")]
mod receipts;
mod receivers;
mod remedies;
#[cfg(feature = "aws")]
mod several;
mod shortages;
mod steering;
mod support;
mod systemd;
#[cfg(all(feature = "aws", feature = "postgres"))]
mod tables;
mod terms;
mod top;
mod torn;
mod tracing;
mod trouble;
mod upgrade;
mod why;
