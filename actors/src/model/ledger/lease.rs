//! Who may work on a batch: leases with a fence and a deadline, never counters (S1.4).

use super::record::{Deadline, Holder, Record};
use crate::model::{suspect::EXACT_LOSSES, time::UnixMs};

/// The answer to who asks for a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant {
    /// It is the asker's, under the record's fence.
    Granted,
    /// Another holder has it.
    Held {
        /// Until then, unless extended.
        until: Deadline,
    },
    /// Nothing of it is due before then.
    Early {
        /// When its first message may be tried.
        due: UnixMs,
    },
    /// Nothing is left to do for it.
    Settled,
}

/// Whether `holder` can be nobody any more, since `asks` is a later life of its process.
///
/// Holders are named `NODE-START/WORKER`, e.g. `9f3c62d4a1b07e58-12/delivery-0#3`: where the process runs, how often
/// it has been started there, and which worker of it. One process at a time runs on a node, so an earlier start has
/// ended. Names of another form are never of the same process.
pub fn is_earlier_life(holder: &str, asks: &str) -> bool {
    match (holder.split_once('/'), asks.split_once('/')) {
        (Some((process, _)), Some((asking, _))) => is_earlier_process(process, asking),
        _ => false,
    }
}

/// The same of two processes, `NODE-START`.
pub fn is_earlier_process(process: &str, asks: &str) -> bool {
    let life = |process: &str| -> Option<(String, u64)> {
        let (node, start) = process.rsplit_once('-')?;
        Some((node.to_owned(), start.parse().ok()?))
    };
    let (Some((node, start)), Some((asking_node, asking_start))) = (life(process), life(asks)) else {
        return false;
    };
    node == asking_node && start < asking_start
}

impl Record {
    /// Whether the lease with this fence is held.
    pub fn is_current(&self, fence: u64) -> bool {
        self.holder.is_some() && self.fence == fence
    }

    /// Gives the batch to `asks` until `until`, if it may have it. `now` is the store's clock for deadlines, `wall`
    /// the one for due times, by which the process of `asks` was born at `born`: while it is young, messages wait that
    /// were in flight when another died (B17).
    ///
    /// A lease whose deadline has passed, or whose holder is an earlier life of the same process, is lost: the batch
    /// is granted again and the loss is counted, whether a message of it is due or not. What a holder has already is
    /// granted to it again under the same fence and charges nothing, because its first answer was lost.
    pub fn lease(&mut self, asks: &str, until: Deadline, now: Deadline, wall: UnixMs, born: UnixMs) -> Grant {
        let Some(due) = self.due() else { return Grant::Settled };
        match &mut self.holder {
            Some(holder) if holder.until < now || is_earlier_life(&holder.name, asks) => self.lose(),
            Some(holder) if holder.name == asks => {
                holder.until = holder.until.max(until);
                return Grant::Granted;
            }
            Some(holder) => return Grant::Held { until: holder.until },
            None if due > wall => return Grant::Early { due },
            None => {}
        }
        self.hold_suspects(born);
        self.fence += 1;
        self.holder = Some(Holder { name: asks.to_owned(), until });
        Grant::Granted
    }

    /// Moves the deadline of the lease with `fence`; whether it is held. One that has run out but was not given to
    /// another is still held.
    pub fn extend(&mut self, fence: u64, until: Deadline) -> bool {
        match &mut self.holder {
            Some(holder) if self.fence == fence => {
                holder.until = until;
                true
            }
            _ => false,
        }
    }

    /// Returns the lease with `fence`, which charges nothing; whether it was held. A message that was marked
    /// as begun is begun no more: the next lease's loss must not charge it.
    pub fn release(&mut self, fence: u64) -> bool {
        let held = self.is_current(fence);
        if held {
            self.holder = None;
            self.begun = None;
        }
        held
    }

    /// Ends whatever lease there is as lost: its holder is gone with messages unrecorded, and nothing says which were
    /// in flight. Only a message that was begun by itself is charged; then the next lease continues marking each, however
    /// much was recorded under this one, because the suspect is still there (I5).
    pub fn lose(&mut self) {
        if self.holder.take().is_none() {
            return;
        }
        self.losses = self.losses.saturating_add(1);
        if let Some(index) = self.begun.take() {
            self.losses = self.losses.max(EXACT_LOSSES);
            self.charge_one(index, true);
        }
    }

    /// Ends whatever lease there is, whose holder is gone, and charges the messages that were in flight when it went
    /// (B17). `alone` says whether the only one of them was the only one of the whole process. The others are no
    /// suspects.
    pub(crate) fn charge(&mut self, in_flight: &[u32], alone: bool) {
        if self.holder.take().is_none() {
            return;
        }
        self.begun = None;
        for &index in in_flight {
            self.charge_one(index, alone);
        }
    }

    fn charge_one(&mut self, index: u32, alone: bool) {
        let at = index as usize;
        if at < self.len() && self.states.get(at).is_open() {
            self.except(at, |exception| {
                exception.losses = exception.losses.saturating_add(1);
                exception.losses_alone = exception.losses_alone.saturating_add(u8::from(alone));
            });
        }
    }
}
