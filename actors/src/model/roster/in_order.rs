//! Where a destination keeps an [order](crate::model::order): a message waits in its batch until it is its turn, and every
//! batch stays until all of its messages have ended. Then a request never has two messages of one key, bundles included.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use super::{Roster, destination::DestinationQueue};
use crate::model::{
    ids::BatchId,
    lease::{LeaseToken, OpenMessage},
    order::KeyOrder,
};

/// Suspects wait at the beginning of a process' life (B17), however short the waits of a destination are.
const SUSPECTS_WAIT: Duration = Duration::from_mins(1);

/// The order of a destination.
#[derive(Debug)]
pub(super) struct Order {
    keys: KeyOrder<(BatchId, u32)>,
    /// The longest that a message of it waits: what seems to wait longer was noted by a clock that was ahead (F9).
    pub(super) longest_wait: Duration,
}

/// What a batch has to do with it.
#[derive(Debug)]
pub(super) struct InOrder {
    /// The keys of its messages that have not ended …
    keys: HashMap<u32, u64>,
    /// … and those whose turn is yet to come.
    blocked: BTreeMap<u32, OpenMessage>,
}

impl Order {
    /// Open messages come, younger than those that came before. Only those whose turn it is are left in `open`.
    pub(super) fn admit(
        &mut self,
        batch: BatchId,
        keys: HashMap<u32, u64>,
        open: &mut Vec<OpenMessage>,
    ) -> InOrder {
        let mut blocked = BTreeMap::new();
        open.retain(|message| {
            let arrive = |key: &u64| self.keys.arrive(*key, (batch, message.index));
            let has_turn = keys.get(&message.index).is_none_or(arrive);
            if !has_turn {
                blocked.insert(message.index, *message);
            }
            has_turn
        });
        InOrder { keys, blocked }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

impl InOrder {
    /// Whether messages wait for their turn.
    pub(super) fn is_blocked(&self) -> bool {
        !self.blocked.is_empty()
    }
}

impl Roster {
    /// Messages of a destination go in the order of their keys from now on. None waits for longer than `longest_wait` to be
    /// tried again.
    pub fn keep_order(&mut self, destination: usize, longest_wait: Duration) {
        let longest_wait = longest_wait.max(SUSPECTS_WAIT);
        self.destinations[destination].order = Some(Order { keys: KeyOrder::default(), longest_wait });
    }

    /// What a batch that keeps an order is still held for, ascending, if all else of it is recorded.
    pub fn held_for(&self, token: LeaseToken) -> Option<Vec<u32>> {
        let batch = self.batches.get(&token.batch).filter(|batch| batch.token == token && batch.is_idle())?;
        let mut open: Vec<_> = batch.in_order.as_ref()?.keys.keys().copied().collect();
        open.sort_unstable();
        Some(open)
    }

    /// Whether batches of a destination are yet to be given back: all of them, for what is younger would go ahead of those
    /// that are. What is younger still must not be leased before they are leased again.
    pub fn is_giving_back(&self, destination: usize) -> bool {
        self.batches.values().any(|batch| batch.destination == destination && batch.stopped)
    }

    /// A message has ended: the next of its key has its turn.
    pub(super) fn pass_on(&mut self, id: BatchId, index: u32) {
        let Some(batch) = self.batches.get_mut(&id) else { return };
        let slot = &mut self.destinations[batch.destination];
        let key = batch.in_order.as_mut().and_then(|in_order| in_order.keys.remove(&index));
        let (Some(key), Some(order)) = (key, &mut slot.order) else { return };
        let next = order.keys.leave(key, (id, index));
        if let Some((id, index)) = next
            && let Some(batch) = self.batches.get_mut(&id)
            && let Some(message) = batch.in_order.as_mut().and_then(|order| order.blocked.remove(&index))
        {
            slot.wait(batch, message);
        }
    }
}

impl DestinationQueue {
    /// Nobody has a turn any more: all that is held is stopped.
    pub(super) fn end_order(&mut self) {
        if let Some(order) = &mut self.order {
            order.keys.clear();
        }
    }
}
