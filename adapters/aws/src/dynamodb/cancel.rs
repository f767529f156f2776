//! Cancelling what is open of cancelled files: see [`Steering`](postrider_actors::ports::Steering).

use postrider_actors::{
    flow::back_off,
    model::{
        hold::{HeldFile, HoldCause, HoldChange},
        ids::BatchId,
        time::UnixMs,
    },
    ports::StoreError,
};

use super::{cache::lock, draft::Draft, record::Records, retry::BUDGET, settle::fits, state::Shared};

/// How often a step is worked out anew when records have moved on.
const ROUNDS: u32 = 10;

impl Shared {
    /// `Steering::cancel_step`. Each process walks over the batches of a cancelled file once, in the order of their rows,
    /// and goes on where rows are still read. One that a worker has is cancelled too: what it records under its lease
    /// afterwards is taken as it comes.
    pub(super) async fn cancel_step(&self, batches: usize, now: UnixMs) -> Result<usize, StoreError> {
        let cluster = self.cluster_state().await?;
        let is_cancelled = |held: &&HeldFile| held.hold.cause == HoldCause::Cancelled;
        let mut done = 0;
        for held in cluster.held.iter().filter(is_cancelled) {
            let place = (held.file, held.destination.clone());
            let from = lock(&self.cancelled_until).get(&place).copied().unwrap_or(0);
            let found = self.batches_from(held.file, &held.destination, from, batches - done).await?;
            let ids: Vec<_> = found.values().copied().collect();
            self.cancel_some(&ids, now).await?;
            if let Some((last, _)) = found.last_key_value() {
                lock(&self.cancelled_until).insert(place, last + 1);
                done += ids.len();
                if done >= batches {
                    return Ok(batches);
                }
            } else if let Some(look) = self.look_at(held.file).await?
                && look.report.state.is_closed()
            {
                lock(&self.cancelled_until).remove(&place);
                let of = [(&look.report.file, vec![&*held.destination])];
                self.change_hold_of(&of, &HoldChange::Cancelled).await?;
            }
        }
        Ok(done)
    }

    async fn cancel_some(&self, ids: &[BatchId], now: UnixMs) -> Result<(), StoreError> {
        let mut left = ids.to_vec();
        for round in 1..=ROUNDS {
            if left.is_empty() {
                return Ok(());
            }
            let mut lane = self.lane.lock().await;
            let mut known = Records::new();
            self.look_up_all(&mut known, left.iter().copied(), false).await?;
            let mut draft = Draft::default();
            let mut drafted = 0;
            for id in &left {
                let mut next = draft.clone();
                next.cancel(&known, *id, now);
                if !fits(&next) {
                    break; // the next round goes on
                }
                draft = next;
                drafted += 1;
            }
            if draft.changed.is_empty() || lane.write_change(self, &draft).await? {
                left.drain(..drafted);
            } else {
                drop(lane);
                back_off(BUDGET.backoff, round).await;
            }
        }
        if left.is_empty() {
            return Ok(());
        }
        Err(StoreError::Retryable("batches of a cancelled file keep being changed by others".into()))
    }
}
