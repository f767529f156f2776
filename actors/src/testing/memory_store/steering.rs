//! What operators and the canary say of files, in memory.

use std::sync::Arc;

use async_trait::async_trait;

use super::{File, MemoryStore, State, Stored};
use crate::{
    model::{
        canary::Trial,
        hold::{FileHold, HeldFile, HoldCause, HoldChange},
        ids::FileId,
        priority::{FilePriority, Priority},
        state::MessageState,
        time::UnixMs,
    },
    ports::{Ended, LimitsSet, Steering, StoreError},
};

impl State {
    /// Whether a batch waits because its file is held, or closed.
    pub(super) fn waits_for_its_file(&self, batch: &Stored, now: UnixMs) -> bool {
        let header = &batch.batch.header;
        let place = (header.file, header.destination.as_str().into());
        self.holds.get(&place).is_some_and(|hold| hold.covers(batch.batch.first_row))
            || self.closed.get(&place).is_some_and(|closed| closed.contains(&now))
    }

    /// Changes what is held of a file at a destination; whether that changed anything.
    pub(super) fn change_hold(&mut self, file: FileId, destination: &Arc<str>, change: &HoldChange) -> bool {
        let place = (file, destination.clone());
        match change.apply(self.holds.get(&place)) {
            Some(Some(hold)) => drop(self.holds.insert(place, hold)),
            Some(None) => drop(self.holds.remove(&place)),
            None => return false,
        }
        true
    }

    /// How urgent a batch is.
    pub(super) fn priority_of(&self, batch: &Stored) -> Priority {
        let header = &batch.batch.header;
        let ordered = self.priorities.get(&(header.file, header.destination.as_str().into()));
        ordered.copied().unwrap_or(header.priority)
    }

    /// Where messages are never sent, and what they end as.
    fn ending(&self, now: UnixMs) -> Vec<(FileId, Arc<str>, MessageState)> {
        let is_cancelled = |(_, hold): &(&(FileId, Arc<str>), &FileHold)| hold.cause == HoldCause::Cancelled;
        let cancelled = self.holds.iter().filter(is_cancelled);
        let cancelled = cancelled.map(|((file, name), _)| (*file, name.clone(), MessageState::Cancelled));
        let is_over = |file: &&File| file.report.file.terms.is_over(now);
        let over = self.files.iter().filter(is_over).flat_map(|file| {
            let names = file.report.file.destinations.iter();
            names.map(|name| (file.report.file.id, Arc::from(name.as_str()), MessageState::Unsent))
        });
        cancelled.chain(over).collect()
    }

    fn end_step(&mut self, batches: usize, now: UnixMs) -> Ended {
        let mut done = Ended::default();
        for (file, destination, state) in self.ending(now) {
            let of_it = self.batches.iter_mut().filter(|stored| {
                let header = &stored.batch.header;
                header.file == file && *header.destination == *destination
            });
            let waiting =
                of_it.filter(|stored| stored.record.holder.is_none() && !stored.record.is_settled());
            let mut ended = Ended::default();
            for stored in waiting.take(batches - done.batches) {
                let changes = stored.record.end_open(state, now);
                ended += Ended { batches: 1, counts: [(destination.clone(), changes.counts)].into() };
            }
            let closed = self.file(file).is_some_and(|file| file.report.state.is_closed());
            if ended.batches > 0 {
                self.touch_file(file, now);
                done += ended;
            } else if closed && self.counts(file, &destination).open() == 0 {
                self.change_hold(file, &destination, &HoldChange::Ended);
            }
        }
        done
    }
}

#[async_trait]
impl Steering for MemoryStore {
    async fn held_files(&self) -> Result<Vec<HeldFile>, StoreError> {
        let state = self.state();
        let held = state.holds.iter().filter_map(|((file, destination), hold)| {
            let known = state.files.iter().find(|known| known.report.file.id == *file)?;
            Some(HeldFile {
                file: *file,
                feed: known.report.file.feed.clone(),
                name: known.report.file.name.clone(),
                destination: destination.to_string(),
                hold: hold.clone(),
            })
        });
        Ok(held.collect())
    }

    async fn set_limits(&self) -> Result<LimitsSet, StoreError> {
        Ok(self.state().limits.clone())
    }

    async fn change_hold(
        &self,
        file: FileId,
        destination: Option<&str>,
        change: &HoldChange,
    ) -> Result<usize, StoreError> {
        let mut state = self.state();
        let Some(known) = state.file(file) else { return Ok(0) };
        let names: Vec<Arc<str>> =
            known.report.file.destinations.iter().map(|name| name.as_str().into()).collect();
        let asked = names.iter().filter(|name| destination.is_none_or(|asked| asked == &***name));
        Ok(asked.filter(|name| state.change_hold(file, name, change)).count())
    }

    async fn priorities(&self) -> Result<Vec<FilePriority>, StoreError> {
        let ordered = self.state().priorities.clone().into_iter();
        let listed = ordered.map(|((file, destination), priority)| FilePriority {
            file,
            destination: destination.to_string(),
            priority,
        });
        Ok(listed.collect())
    }

    async fn prioritize(
        &self,
        file: FileId,
        destination: Option<&str>,
        priority: Priority,
    ) -> Result<usize, StoreError> {
        let mut state = self.state();
        let Some(report) = state.file(file).map(|known| known.report.clone()) else { return Ok(0) };
        let names = report.file.destinations.iter();
        let mut changed = 0;
        for name in names.filter(|name| destination.is_none_or(|asked| asked == **name)) {
            let before = state.priorities.insert((file, name.as_str().into()), priority);
            changed += usize::from(before.unwrap_or(report.file.priority) != priority);
        }
        Ok(changed)
    }

    async fn end_step(&self, batches: usize, now: UnixMs) -> Result<Ended, StoreError> {
        Ok(self.state().end_step(batches, now))
    }

    async fn trial(&self, file: FileId, destination: &str, before: u64) -> Result<Trial, StoreError> {
        let mut trial = Trial::default();
        for batch in self.state().batches_of(file, destination).filter(|batch| batch.batch.first_row < before)
        {
            let added = trial.add(&batch.record, batch.history.iter().map(Vec::as_slice));
            added.map_err(|error| StoreError::Permanent(error.to_string()))?;
        }
        Ok(trial)
    }
}
