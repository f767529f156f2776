//! A batch that a worker has leased.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;

use super::{
    batch::BatchHeader,
    ids::BatchId,
    ledger::{MessageVerdict, Record},
    outcome::Verdict,
    time::UnixMs,
};

/// Proof of a lease. The fence grows with every lease of a batch, so that a holder who was thought
/// dead is not taken for the current one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseToken {
    /// The batch.
    pub batch: BatchId,
    /// Which lease of it.
    pub fence: u64,
}

/// A message that still needs delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpenMessage {
    /// No attempt before then.
    pub not_before: UnixMs,
    /// Its index in the batch.
    pub index: u32,
    /// Its drive.
    pub drive: u32,
    /// Attempts in that drive so far.
    pub tries: u32,
}

impl OpenMessage {
    /// The verdict on its next attempt.
    pub fn verdict(&self, verdict: Verdict) -> MessageVerdict {
        MessageVerdict { index: self.index, drive: self.drive, attempt: self.tries + 1, verdict }
    }
}

/// A leased batch: what a worker needs of its record, and its payload.
#[derive(Clone, PartialEq, Eq)]
pub struct Lease {
    /// Proof of the lease.
    pub token: LeaseToken,
    /// What its messages have in common.
    pub header: Arc<BatchHeader>,
    /// When the messages were accepted.
    pub accepted_at: UnixMs,
    /// How many messages the batch has.
    pub count: u32,
    /// The encoded rows, of all messages.
    pub payload: Bytes,
    /// The messages that need delivery, in row order. Only those that are due are to be sent (B10).
    pub open: Vec<OpenMessage>,
    /// When messages were redriven: their age counts from then.
    pub redriven: BTreeMap<u32, UnixMs>,
    /// Leases in a row that were lost without progress and without evidence: see `model::suspect`.
    pub losses: u8,
    /// Messages that were in flight when the process died: deaths, and those of them in which it was alone (B17).
    pub charged: BTreeMap<u32, (u8, u8)>,
}

impl Lease {
    /// What a worker is given of a batch that was just leased.
    pub fn of(batch: BatchId, header: Arc<BatchHeader>, payload: Bytes, record: &Record) -> Self {
        let open = record.open().map(|index| OpenMessage {
            not_before: record.due_of(index),
            index: index as u32,
            drive: record.drive(index),
            tries: record.tries[index].into(),
        });
        let redriven = record.exceptions.iter();
        let redriven = redriven.filter_map(|(index, exception)| Some((*index, exception.redriven_at?)));
        let charged = record.exceptions.iter().filter(|(_, exception)| exception.losses > 0);
        Self {
            token: LeaseToken { batch, fence: record.fence },
            header,
            accepted_at: record.accepted_at,
            count: record.len() as u32,
            payload,
            open: open.collect(),
            redriven: redriven.collect(),
            losses: record.losses,
            charged: charged
                .map(|(index, exception)| (*index, (exception.losses, exception.losses_alone)))
                .collect(),
        }
    }

    /// When the message at `index` was accepted, or last redriven: what its age counts from.
    pub fn since(&self, index: u32) -> UnixMs {
        self.redriven.get(&index).copied().unwrap_or(self.accepted_at)
    }

    /// How old the message at `index` is for its retries, if `passed` of the time since then count: what passed while no
    /// request might begin for its file makes it no older.
    pub fn age(&self, index: u32, passed: Duration, now: UnixMs) -> Duration {
        passed.saturating_sub(self.header.terms.closed_between(self.since(index), now))
    }

    /// How many of its messages are due at `now`.
    pub fn due_count(&self, now: UnixMs) -> usize {
        self.open.iter().filter(|message| message.not_before <= now).count()
    }

    /// Whether no message of it was ever tried.
    pub fn is_first(&self) -> bool {
        self.losses == 0
            && self.charged.is_empty()
            && self.open.len() == self.count as usize
            && self.open.iter().all(|message| (message.drive, message.tries) == (0, 0))
    }
}

impl fmt::Debug for Lease {
    /// Counts, never payload (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("token", &self.token)
            .field("destination", &self.header.destination)
            .field("count", &self.count)
            .field("open", &self.open.len())
            .field("losses", &self.losses)
            .finish_non_exhaustive()
    }
}
