//! A batch in the hands of a worker.

use std::{fmt, sync::Arc};

use bytes::Bytes;

use super::{
    batch::{BatchHeader, StateVector},
    ids::BatchId,
    outcome::Attempt,
    time::UnixMs,
};

/// Proof of a lease. The fence grows with every lease of a batch, so that a holder who was thought
/// dead can be told from the one who has it now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseToken {
    /// The batch.
    pub batch: BatchId,
    /// Which lease of it.
    pub fence: u64,
}

/// A leased batch.
#[derive(Clone)]
pub struct Lease {
    /// Proof of the lease.
    pub token: LeaseToken,
    /// The batch of the first attempt that these messages belong to.
    pub root: BatchId,
    /// What its messages have in common.
    pub header: Arc<BatchHeader>,
    /// The round of delivery.
    pub drive: u32,
    /// How many attempts its messages had before.
    pub attempt: u32,
    /// When the messages were accepted.
    pub accepted_at: UnixMs,
    /// The encoded rows.
    pub payload: Bytes,
    /// What is recorded already: only unsettled messages are to be sent.
    pub states: StateVector,
    /// The failed attempts so far, per message; empty if there were none.
    pub history: Vec<Vec<Attempt>>,
    /// How many leases of it were lost: its holder vanished with messages unrecorded. See `model::suspect`.
    pub losses: u32,
}

impl fmt::Debug for Lease {
    /// Counts, never payload (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("token", &self.token)
            .field("destination", &self.header.destination)
            .field("attempt", &self.attempt)
            .field("count", &self.states.0.len())
            .field("losses", &self.losses)
            .finish_non_exhaustive()
    }
}
