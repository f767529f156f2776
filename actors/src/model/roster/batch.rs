//! A batch as a worker holds it, and what goes of it.

use std::collections::{BTreeSet, VecDeque};

use super::in_order::InOrder;
use crate::model::{
    ids::FileId,
    lease::{LeaseToken, OpenMessage},
    ledger::MessageVerdict,
    priority::Priority,
    suspect::Pace,
    time::UnixMs,
};

/// A message for a sender to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pick {
    /// Index of the destination.
    pub destination: usize,
    /// Its batch.
    pub token: LeaseToken,
    /// Its index in the batch.
    pub index: u32,
    /// Its drive.
    pub drive: u32,
    /// Which attempt of that drive this is, from 1.
    pub attempt: u32,
}

/// A batch that a worker holds.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) token: LeaseToken,
    pub(super) destination: usize,
    pub(super) file: FileId,
    pub(super) priority: Priority,
    pub(super) pace: Pace,
    /// Messages to send, in row order.
    pub(super) open: VecDeque<OpenMessage>,
    /// Messages to send again, if the batch goes at full pace; those of others are in `open`.
    pub(super) again: VecDeque<OpenMessage>,
    /// Messages that wait to be tried again here.
    pub(super) later: u32,
    pub(super) in_flight: u32,
    /// Verdicts that wait for the ledger …
    pub(super) ready: Vec<MessageVerdict>,
    /// … the oldest of them since this.
    pub(super) ready_since: UnixMs,
    /// Verdicts that the ledger is recording.
    pub(super) recording: u32,
    /// The message that the ledger is marking as begun …
    pub(super) marking: Option<u32>,
    /// … or has marked.
    pub(super) marked: Option<u32>,
    /// No more picks: the destination is held, the lease is lost, or the worker drains.
    pub(super) stopped: bool,
    /// Messages that share no request: they may have killed a process.
    pub(super) apart: BTreeSet<u32>,
    /// Where an order is kept.
    pub(super) in_order: Option<Box<InOrder>>,
}

impl Batch {
    /// How many messages from the front of `queue` go in one request, `max` at most.
    pub(super) fn bundle(&self, queue: &VecDeque<OpenMessage>, max: usize) -> usize {
        if self.pace != Pace::Together {
            return 1;
        }
        let shares = |message: &&OpenMessage| !self.apart.contains(&message.index);
        queue.iter().take(max).take_while(shares).count().max(1)
    }

    /// One message at a time, and where each is to be recorded, not before it is marked as begun.
    pub(super) fn is_blocked(&self) -> bool {
        match self.pace {
            Pace::Together => false,
            Pace::Alone => self.in_flight > 0,
            Pace::AloneMarked => {
                let next = self.open.front().map(|message| message.index);
                self.in_flight > 0 || next != self.marked || self.recording > 0
            }
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.ready.is_empty() && self.recording == 0 && self.marking.is_none()
    }

    /// Whether nothing is left to begin here.
    pub(super) fn is_exhausted(&self) -> bool {
        let is_blocked = self.in_order.as_ref().is_some_and(|in_order| in_order.is_blocked());
        self.stopped || (self.open.is_empty() && self.again.is_empty() && self.later == 0 && !is_blocked)
    }

    /// The message that is to be marked as begun next.
    pub(super) fn to_mark(&self) -> Option<u32> {
        let waits = self.pace == Pace::AloneMarked && self.in_flight == 0 && !self.stopped;
        let next = self.open.front().map(|message| message.index).filter(|_| waits && self.marking.is_none());
        next.filter(|next| self.marked != Some(*next))
    }
}
