//! Pure values and rules. Nothing here reads a clock, draws randomness, does IO or knows actix:
//! time and randomness are arguments, so that a seeded simulation can drive every decision.

pub mod alarm;
pub mod backoff;
pub mod batch;
pub mod bisect;
pub mod body;
pub mod bucket;
pub mod builder;
pub mod call;
pub mod codec;
pub mod delay;
pub mod file;
pub mod formats;
pub mod http_policy;
pub mod ids;
pub mod intake;
pub mod lease;
pub mod ledger;
pub mod outcome;
pub mod rate_share;
pub mod receipt;
pub mod receipt_format;
pub mod receipt_window;
pub mod record;
pub mod restart;
pub mod retry;
pub mod roster;
pub mod shard;
pub mod stable;
pub mod state;
pub mod suspect;
pub mod table;
pub mod throughput;
pub mod time;
pub mod timestamp;
