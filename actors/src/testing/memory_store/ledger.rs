//! What became of every message, in memory.

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;

use super::{MemoryStore, State};
use crate::{
    model::{
        file::{FileReport, Reject},
        ids::FileId,
        ledger::{Changes, Record, codec},
        time::UnixMs,
    },
    ports::{Ledger, Settled, Settlement, StoreError},
};

impl State {
    /// Records all of them or, if one is refused, nothing.
    fn settle(&mut self, settlements: &[Settlement]) -> Result<Vec<Settled>, StoreError> {
        let mut answers = Vec::with_capacity(settlements.len());
        let mut records: BTreeMap<usize, Record> = BTreeMap::new();
        let mut changed: Vec<(usize, Changes)> = Vec::new();
        for settlement in settlements {
            let Some(&at) = self.ids.get(&settlement.token.batch) else {
                answers.push(Settled::Stale);
                continue;
            };
            let record = records.entry(at).or_insert_with(|| self.batches[at].record.clone());
            let changes = record.settle(settlement.standing());
            let changes = changes.map_err(|error| StoreError::Permanent(error.to_string()))?;
            answers.push(Settled::of(&changes, record));
            changed.push((at, changes));
        }
        for (at, record) in records {
            self.batches[at].record = record;
        }
        for (at, changes) in changed {
            if !changes.failures.is_empty() {
                self.batches[at].history.push(codec::encode_history(&changes.failures));
            }
            if let Some(last) = changes.last_at {
                self.touch_file(self.batches[at].batch.header.file, last);
            }
        }
        Ok(answers)
    }
}

#[async_trait]
impl Ledger for MemoryStore {
    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<Settled>, StoreError> {
        self.state().settle(&settlements)
    }

    async fn disable_destination(&self, name: &str, reason: &str, _: UnixMs) -> Result<(), StoreError> {
        self.state().disabled.entry(name.into()).or_insert_with(|| reason.into());
        Ok(())
    }

    async fn disabled_destinations(&self) -> Result<Vec<Arc<str>>, StoreError> {
        Ok(self.state().disabled.keys().cloned().collect())
    }

    async fn report(&self, file: FileId) -> Result<Option<FileReport>, StoreError> {
        let state = self.state();
        let found = state.files.iter().find(|known| known.report.file.id == file);
        Ok(found.map(|file| state.report(file)))
    }

    async fn rejects(&self, file: FileId, after: u64, limit: usize) -> Result<Vec<Reject>, StoreError> {
        let mut state = self.state();
        let Some(file) = state.file(file) else { return Ok(Vec::new()) };
        Ok(file.rejects.iter().filter(|reject| reject.row > after).take(limit).cloned().collect())
    }

    async fn latest_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        let state = self.state();
        Ok(state.files.iter().rev().take(limit).map(|file| state.report(file)).collect())
    }

    async fn timed_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        let state = self.state();
        let mut timed: Vec<_> = state.files.iter().map(|file| state.report(file)).collect();
        timed.retain(|report| report.settled_at.is_none() && report.file.terms.finish_by.is_some());
        timed.sort_by_key(|report| report.file.terms.finish_by);
        timed.truncate(limit);
        Ok(timed)
    }

    async fn settled_files(&self, feed: &str, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        let state = self.state();
        let settled = state.files.iter().filter(|file| {
            file.report.file.feed == feed && file.report.settled_at.is_some() && !file.reported
        });
        Ok(settled.take(limit).map(|file| state.report(file)).collect())
    }

    async fn mark_reported(&self, files: &[FileId]) -> Result<(), StoreError> {
        let mut state = self.state();
        for &id in files {
            if let Some(file) = state.file(id)
                && file.report.settled_at.is_some()
            {
                file.reported = true;
            }
        }
        Ok(())
    }
}
