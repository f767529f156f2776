//! Every rule about a batch record, once (design §6; the rules B1–B25 are named where they are held).
//!
//! One record per batch for its whole life: a retry is the same batch, due again; a redrive opens messages of the
//! same record. A [`Record`] and what is asked of it are values; what follows is decided here, by functions that
//! know no store and no clock. Stores load records, hand them to these rules at their own point of serialization
//! (inside the writer's transaction, or under a condition on the version), and write back what changed.
//!
//! - [`record`]: what is recorded, and what can be read off it.
//! - [`lease`]: who may work on a batch.
//! - `evidence`: what is known of messages that were in flight when a process died.
//! - [`settle`]: recording a worker's verdicts on messages, and what an operator does with them.
//! - `rerender`: new bodies for messages that were never sent.
//! - [`codec`]: how a record and its history are stored.

pub mod codec;
#[cfg(test)]
mod codec_tests;
mod evidence;
pub mod lease;
pub mod record;
mod rerender;
pub mod settle;
#[cfg(test)]
mod tests;

pub use evidence::{Evidence, is_exclusive};
pub use lease::{Grant, is_earlier_life, is_earlier_process};
pub use record::{Deadline, Death, Exception, Fate, Holder, Record, Rendered, RowNumbers, Sent};
pub use rerender::KeepsBody;
pub use settle::{Changes, CountChange, DETAIL_BYTES_MAX, Failure, MessageVerdict, Rejected, Standing};
