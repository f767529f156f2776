//! Pure values and rules. Nothing here reads a clock, draws randomness, does IO or knows actix:
//! time and randomness are arguments, so that a seeded simulation can drive every decision.

pub mod batch;
pub mod file;
pub mod formats;
pub mod ids;
pub mod outcome;
pub mod state;
pub mod time;
