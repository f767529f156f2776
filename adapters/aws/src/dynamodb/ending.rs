//! Ending what is never sent: see [`Steering::end_step`](postrider_actors::ports::Steering).

use std::{ops::Range, sync::Arc};

use postrider_actors::{
    flow::back_off,
    model::{
        file::FileRecord,
        hold::{HeldFile, HoldCause, HoldChange},
        ids::{BatchId, FileId},
        ledger::CountChange,
        state::MessageState,
        time::UnixMs,
    },
    ports::{Ended, StoreError},
};

use super::{
    cache::{CACHED_MAX, lock},
    draft::Draft,
    expiring::EXPIRING_MAX,
    record::Records,
    retry::BUDGET,
    settle::fits,
    state::Shared,
};

/// How often a step is worked out anew when records have moved on.
const ROUNDS: u32 = 10;

impl Shared {
    /// Takes note of when a file's time is over and of when it is to be done, if messages of it may be open.
    pub(super) fn note_times(&self, file: &FileRecord, is_open: bool) {
        if !is_open {
            return;
        }
        if let Some(at) = file.terms.expires_at {
            lock(&self.expiring).insert(file, at);
        }
        if let Some(by) = file.terms.finish_by {
            let mut timed = lock(&self.timed);
            if timed.len() < EXPIRING_MAX {
                timed.insert((by, file.id));
            }
        }
    }

    /// `Steering::end_step`. Each process walks over the batches of such a file once, in the order of their rows, and goes on
    /// where rows are still read. One that a worker has is ended too: what it records under its lease afterwards is taken as
    /// it comes. Where a file's time is over, the node does it that owns the file.
    pub(super) async fn end_step(&self, batches: usize, now: UnixMs) -> Result<Ended, StoreError> {
        let cluster = self.cluster_state().await?;
        let is_cancelled = |held: &&HeldFile| held.hold.cause == HoldCause::Cancelled;
        let mut done = Ended::default();
        for held in cluster.held.iter().filter(is_cancelled) {
            let place = (held.file, held.destination.as_str());
            let ended = self.end_some_of(place, MessageState::Cancelled, batches - done.batches, now).await?;
            let is_done = ended.batches == 0;
            done += ended;
            if done.batches >= batches {
                return Ok(done);
            }
            if is_done
                && let Some(look) = self.look_at(held.file).await?
                && look.report.state.is_closed()
            {
                lock(&self.ended_until).remove(&(held.file, held.destination.clone()));
                let of = [(&look.report.file, vec![&*held.destination])];
                self.change_hold_of(&of, &HoldChange::Ended).await?;
            }
        }
        let over = lock(&self.expiring).over(now);
        for (file, destinations) in over {
            let before = done.batches;
            for destination in &destinations {
                let place = (file, destination.as_str());
                done += self.end_some_of(place, MessageState::Unsent, batches - done.batches, now).await?;
                if done.batches >= batches {
                    return Ok(done);
                }
            }
            if done.batches > before {
                continue;
            }
            let look = self.look_at(file).await?;
            if look.as_ref().is_some_and(|look| !look.report.state.is_closed()) {
                continue; // rows are still read
            }
            if let Some(look) = look
                && cluster.held.iter().any(|held| held.file == file)
            {
                let of = [(&look.report.file, destinations.iter().map(String::as_str).collect())];
                self.change_hold_of(&of, &HoldChange::Ended).await?;
            }
            lock(&self.ended_until).retain(|(of, _), _| *of != file);
            lock(&self.expiring).remove(file);
        }
        Ok(done)
    }

    /// Ends what is open of up to `limit` batches of a file for a destination that this process has not walked over.
    async fn end_some_of(
        &self,
        (file, destination): (FileId, &str),
        state: MessageState,
        limit: usize,
        now: UnixMs,
    ) -> Result<Ended, StoreError> {
        let place = (file, destination.to_owned());
        let from = lock(&self.ended_until).get(&place).copied().unwrap_or(0);
        let found = self.batches_from(file, destination, from, limit).await?;
        let Some((last, _)) = found.last_key_value() else {
            return Ok(Ended::default());
        };
        let ids: Vec<_> = found.values().copied().collect();
        let counts = self.end_all(&ids, state, now).await?;
        lock(&self.ended_until).insert(place, last + 1);
        Ok(Ended { batches: ids.len(), counts: [(destination.into(), counts)].into() })
    }

    async fn end_all(
        &self,
        ids: &[BatchId],
        state: MessageState,
        now: UnixMs,
    ) -> Result<CountChange, StoreError> {
        let (mut left, mut counts) = (ids.to_vec(), CountChange::default());
        for round in 1..=ROUNDS {
            if left.is_empty() {
                return Ok(counts);
            }
            let mut lane = self.lane.lock().await;
            let mut known = Records::new();
            self.look_up_all(&mut known, left.iter().copied(), false).await?;
            let mut draft = Draft::default();
            let mut drafted = 0;
            for id in &left {
                let mut next = draft.clone();
                next.end_open(&known, *id, state, now);
                if !fits(&next) {
                    break; // the next round goes on
                }
                draft = next;
                drafted += 1;
            }
            if draft.changed.is_empty() || lane.write_change(self, &draft).await? {
                left.drain(..drafted);
                counts += draft.count_change();
            } else {
                drop(lane);
                back_off(BUDGET.backoff, round).await;
            }
        }
        if left.is_empty() {
            return Ok(counts);
        }
        Err(StoreError::Retryable("batches of a file that is ended keep being changed by others".into()))
    }

    /// No request may begin for the files of these batches then, at their destinations.
    pub(super) async fn close(&self, ids: &[BatchId], when: Range<UnixMs>) -> Result<(), StoreError> {
        let mut known = Records::new();
        self.look_up(&mut known, ids.iter().copied(), true).await?;
        let mut closed = lock(&self.closed);
        for stored in known.into_values().flatten() {
            if closed.len() >= CACHED_MAX {
                closed.clear(); // workers find it again
            }
            closed.insert((stored.file, stored.destination.clone()), when.clone());
        }
        Ok(())
    }

    /// Whether no request may begin for a file at a destination, as far as workers here have found.
    pub(super) fn is_closed(&self, file: FileId, destination: &Arc<str>, now: UnixMs) -> bool {
        let closed = lock(&self.closed);
        // Most files have no terms: then nothing is looked up.
        !closed.is_empty() && closed.get(&(file, destination.clone())).is_some_and(|when| when.contains(&now))
    }
}
