//! Where a destination keeps an [order](crate::model::order): a message waits in its batch until it is its turn, and every
//! batch stays until all of its messages have ended. Then a request never has two messages of one key, bundles included.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use crate::model::{ids::BatchId, lease::OpenMessage, order::KeyOrder};

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
    /// None of its messages waits for longer than `longest_wait` to be tried again.
    pub(super) fn new(longest_wait: Duration) -> Self {
        Self { keys: KeyOrder::default(), longest_wait: longest_wait.max(SUSPECTS_WAIT) }
    }

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

    /// A message of a key has ended; the next of it has its turn.
    pub(super) fn leave(&mut self, key: u64, message: (BatchId, u32)) -> Option<(BatchId, u32)> {
        self.keys.leave(key, message)
    }

    /// Nobody has a turn any more: all that is held is stopped.
    pub(super) fn end(&mut self) {
        self.keys.clear();
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

impl InOrder {
    /// Its messages that have not ended, ascending.
    pub(super) fn open(&self) -> Vec<u32> {
        let mut open: Vec<_> = self.keys.keys().copied().collect();
        open.sort_unstable();
        open
    }

    /// A message has ended; the key that it had.
    pub(super) fn end(&mut self, index: u32) -> Option<u64> {
        self.keys.remove(&index)
    }

    /// A message has its turn, if it waited for it.
    pub(super) fn unblock(&mut self, index: u32) -> Option<OpenMessage> {
        self.blocked.remove(&index)
    }

    /// Whether messages wait for their turn.
    pub(super) fn is_blocked(&self) -> bool {
        !self.blocked.is_empty()
    }
}
