//! The deliveries that are held, and until when the queue hides them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    model::{intake::AckId, time::MonoMs},
    ports::ItemOutcome,
};

/// When each held delivery was received or last extended.
#[derive(Clone, Debug, Default)]
pub(super) struct HeldEntries(Arc<Mutex<BTreeMap<AckId, MonoMs>>>);

impl HeldEntries {
    fn map(&self) -> MutexGuard<'_, BTreeMap<AckId, MonoMs>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// They were received at `now`.
    pub(super) fn hold(&self, acks: impl Iterator<Item = AckId>, now: MonoMs) {
        self.map().extend(acks.map(|ack| (ack, now)));
    }

    /// They are no longer held.
    pub(super) fn forget(&self, acks: &[AckId]) {
        let mut held = self.map();
        for ack in acks {
            held.remove(ack);
        }
    }

    /// Those that were received or extended `age` ago or earlier.
    pub(super) fn older_than(&self, age: Duration, now: MonoMs) -> Vec<AckId> {
        let held = self.map();
        held.iter().filter(|(_, since)| now.since(**since) >= age).map(|(ack, _)| ack.clone()).collect()
    }

    /// What came of extending `acks` at `now`. One that is not ours any more is not asked for again.
    pub(super) fn extended(&self, acks: &[AckId], outcomes: &[ItemOutcome], now: MonoMs) {
        let mut held = self.map();
        for (ack, outcome) in acks.iter().zip(outcomes) {
            match outcome {
                // It may have been deleted meanwhile: then it stays forgotten.
                ItemOutcome::Ok => {
                    held.entry(ack.clone()).and_modify(|since| *since = now);
                }
                ItemOutcome::Permanent(_) => {
                    held.remove(ack);
                }
                ItemOutcome::Retryable(_) | ItemOutcome::Unknown(_) => {}
            }
        }
    }
}
