//! Outcomes are recorded in groups, and so acknowledged.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::{WebhookBatch, WebhookStrategy};
use crate::{
    metrics::Tally,
    model::{self, lease::LeaseToken, roster::Ready, time::UnixMs},
    ports::{Settled, Settlement, StoreError},
};

/// How long an outcome waits to be recorded if its batch has more to come.
const RECORD_PATIENCE: Duration = Duration::from_millis(500);

impl WebhookStrategy {
    pub(super) async fn record_loop(self: &Arc<Self>) -> Result<(), StoreError> {
        let (linger, group) = (self.setup.record_linger, self.setup.record_group);
        let patience = linger.max(RECORD_PATIENCE);
        let mut looks_at = Instant::now() + linger;
        loop {
            self.flush.wait(looks_at.saturating_duration_since(Instant::now())).await;
            let is_time = Instant::now() >= looks_at;
            if is_time {
                looks_at = Instant::now() + linger;
            }
            let settlements = self.settlements(if is_time { 0 } else { group / 2 }, patience);
            if settlements.is_empty() {
                continue;
            }
            let tallies = self.tallies(&settlements);
            self.worker.settle(&settlements, |settled| self.note(tallies, settled)).await?;
            self.start_senders();
            self.worker.wake();
        }
    }

    /// Takes note of what was recorded.
    fn note(&self, tallies: Vec<(LeaseToken, Tally, Option<Arc<WebhookBatch>>)>, settled: &[Settled]) {
        let now = self.worker.clock().wall();
        let mut state = self.state();
        for ((token, tally, batch), &settled) in tallies.into_iter().zip(settled) {
            if let Some(batch) = batch {
                self.count(&batch, &tally, settled, now);
            }
            state.roster.recorded(token, tally.count);
            if settled == Settled::Open {
                state.narrow(token);
            } else {
                state.remove(token);
            }
        }
    }

    fn tallies(&self, settlements: &[Settlement]) -> Vec<(LeaseToken, Tally, Option<Arc<WebhookBatch>>)> {
        let state = self.state();
        let tally = |s: &Settlement| (s.token, Tally::of(&s.verdicts), state.batches.get(&s.token).cloned());
        settlements.iter().map(tally).collect()
    }

    fn count(&self, batch: &WebhookBatch, tally: &Tally, settled: Settled, now: UnixMs) {
        let failed = batch.failed.fetch_or(!tally.is_clean(), Ordering::Relaxed) || !tally.is_clean();
        let metrics = &self.setup.destinations[batch.destination].metrics;
        metrics.settled(tally, settled, now.since(batch.lease.accepted_at), !failed);
    }

    /// What is to be recorded now. See [`Roster::take_ready`].
    fn settlements(&self, group: usize, patience: Duration) -> Vec<Settlement> {
        let now = self.worker.clock().wall();
        let mut state = self.state();
        let ready = state.roster.take_ready(group, now, patience);
        let settlement = |Ready { token, verdicts, ends, begins }: Ready| {
            let (mut details, mut records) = (BTreeMap::new(), Vec::new());
            if let Some(batch) = state.batches.get(&token) {
                let mut said = batch.said();
                details = model::record::details(&verdicts, &said);
                if self.setup.destinations[batch.destination].recorded {
                    records = model::record::records(&batch.lease, &batch.rows, &verdicts, &mut said);
                } else if !said.is_empty() {
                    for message in &verdicts {
                        said.remove(&message.index);
                    }
                }
            }
            Settlement { token, verdicts, details, records, ends, begins }
        };
        ready.into_iter().map(settlement).collect()
    }
}
