//! A batch in the hands of a worker.

use std::{fmt, sync::Arc};

use bytes::Bytes;

use super::{
    batch::{BatchHeader, NewBatch, StateVector},
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

/// Whether `holder` can be nobody any more, since `asks` is a later life of its process.
///
/// The holder of a claim is named `NODE-START/WORKER`, e.g. `9f3c62d4a1b07e58-12/delivery-0#3`: where the process
/// runs, how often it has been started there, and which worker of it. One process at a time runs on a node,
/// so an earlier start has ended. Names of another form are never of the same process.
pub fn is_earlier_life(holder: &str, asks: &str) -> bool {
    let life = |name: &str| -> Option<(String, u64)> {
        let (process, _) = name.split_once('/')?;
        let (node, start) = process.rsplit_once('-')?;
        Some((node.to_owned(), start.parse().ok()?))
    };
    match (life(holder), life(asks)) {
        (Some((node, start)), Some((asking_node, asking_start))) => {
            node == asking_node && start < asking_start
        }
        _ => false,
    }
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

impl Lease {
    /// The lease of a batch that a queue carried, as the store has granted it.
    pub fn granted(batch: NewBatch, fence: u64, losses: u32, states: StateVector) -> Self {
        Self {
            token: LeaseToken { batch: batch.id, fence },
            root: batch.root,
            header: batch.header,
            drive: batch.drive,
            attempt: batch.attempt,
            accepted_at: batch.accepted_at,
            payload: batch.payload,
            states,
            history: batch.history,
            losses,
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_earlier_start_on_the_same_node_is_gone() {
        assert!(is_earlier_life("node-a-9/delivery-0#7", "node-a-10/delivery-1#1"));
        assert!(
            !is_earlier_life("node-a-10/w#1", "node-a-10/w#2"),
            "a worker's own supervisor says when it is gone"
        );
        assert!(!is_earlier_life("node-a-10/w#1", "node-a-9/w#1"));
        assert!(!is_earlier_life("node-b-9/w#1", "node-a-10/w#1"));
        assert!(!is_earlier_life("w-1", "w-2"));
        assert!(!is_earlier_life("node-x/w", "node-10/w"));
    }
}
