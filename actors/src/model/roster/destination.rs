//! What of one destination is held, in flight, and waits.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    time::Duration,
};

use super::{
    batch::{Batch, Pick},
    in_order::Order,
    lane::Lane,
};
use crate::model::{fairness::LaneShare, ids::BatchId, lease::OpenMessage, suspect::Pace, time::UnixMs};

/// A message that is due again within this is tried again under the same lease (B9).
const RETRY_HERE: Duration = Duration::from_secs(10);

/// Messages of one destination that may wait for that; beyond it their batches are given back, to come again when
/// they are due.
pub(super) const RETRIES_HERE_MAX: usize = 4_096;

/// A message that waits for its time under the same lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Later {
    message: OpenMessage,
    batch: BatchId,
    fence: u64,
}

#[derive(Debug, Default)]
pub(super) struct DestinationQueue {
    /// Requests in flight.
    pub(super) in_flight: usize,
    /// Messages of a request at most.
    pub(super) bundle: usize,
    pub(super) share: LaneShare,
    /// Whose turn it is, if it keeps an order.
    pub(super) order: Option<Order>,
    /// Batches with messages to send at their first turn here: of a file those that were redriven, then the others in the
    /// order in which they were leased.
    pub(super) fresh: Lane,
    /// Batches with messages to send again, of a file in the order in which they became due.
    pub(super) retries: Lane,
    /// Messages that wait here to be due, the earliest first.
    pub(super) later: BinaryHeap<Reverse<Later>>,
    pub(super) held: usize,
    /// Open messages of batches that go at full pace.
    pub(super) waiting: usize,
    pub(super) deficit: u32,
}

impl DestinationQueue {
    /// A message goes, which was taken out of its batch.
    pub(super) fn begin(&mut self, batch: &mut Batch, message: OpenMessage) -> Pick {
        batch.marked = None;
        batch.in_flight += 1;
        self.waiting -= usize::from(batch.pace == Pace::Together);
        let OpenMessage { index, drive, tries, .. } = message;
        Pick { destination: batch.destination, token: batch.token, index, drive, attempt: tries + 1 }
    }

    /// Puts a message that was not tried to where it belongs.
    pub(super) fn put_back(&mut self, batch: &mut Batch, message: OpenMessage) {
        if batch.stopped {
            return;
        }
        let is_again = batch.pace == Pace::Together && message.tries > 0;
        let messages = if is_again { &mut batch.again } else { &mut batch.open };
        let was_empty = messages.is_empty();
        messages.insert(messages.partition_point(|other| other.index < message.index), message);
        if was_empty {
            let lane = if is_again { &mut self.retries } else { &mut self.fresh };
            lane.push(batch, true);
        }
        self.waiting += usize::from(batch.pace == Pace::Together);
    }

    /// Keeps a message of `batch` that is due soon, if there is room. Where an order is kept, whenever it is due: it has its
    /// turn, and others wait for it.
    pub(super) fn keep_for_later(&mut self, batch: &mut Batch, message: OpenMessage, now: UnixMs) {
        let is_soon = message.not_before.since(now) <= RETRY_HERE && self.later.len() < RETRIES_HERE_MAX;
        if is_soon || self.order.is_some() {
            self.wait(batch, message);
        }
    }

    /// A message waits here to be due.
    pub(super) fn wait(&mut self, batch: &mut Batch, message: OpenMessage) {
        if !batch.stopped {
            batch.later += 1;
            let (id, fence) = (batch.token.batch, batch.token.fence);
            self.later.push(Reverse(Later { message, batch: id, fence }));
        }
    }

    /// When the first of those is.
    pub(super) fn next_due(&self) -> Option<UnixMs> {
        self.later.peek().map(|Reverse(later)| later.message.not_before)
    }

    /// Those of a batch wait here no more.
    pub(super) fn forget_later(&mut self, batch: BatchId) {
        self.later.retain(|Reverse(later)| later.batch != batch);
    }

    /// Makes ready what is due.
    pub(super) fn promote(&mut self, batches: &mut HashMap<BatchId, Batch>, now: UnixMs) {
        // What seems to be due much later was put here by a clock that was ahead (F9).
        let longest = self.order.as_ref().map_or(RETRY_HERE, |order| order.longest_wait);
        let is_due = |at: UnixMs| at <= now || at.since(now) > longest;
        while let Some(Reverse(later)) = self.later.peek().copied()
            && is_due(later.message.not_before)
        {
            self.later.pop();
            let batch = batches.get_mut(&later.batch).filter(|batch| batch.token.fence == later.fence);
            let Some(batch) = batch else { continue };
            batch.later -= 1;
            if batch.stopped {
                continue;
            }
            if later.message.tries == 0 {
                self.put_back(batch, later.message); // its turn has come
            } else if batch.pace == Pace::Together {
                if batch.again.is_empty() {
                    self.retries.push(batch, false);
                }
                batch.again.push_back(later.message);
                self.waiting += 1;
            } else {
                if batch.open.is_empty() {
                    self.fresh.push(batch, true);
                }
                batch.open.push_front(later.message);
            }
        }
    }
}
