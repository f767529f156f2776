//! What is removed in the end, in memory.

use async_trait::async_trait;
use bytes::Bytes;

use super::{MemoryStore, Stored};
use crate::{
    model::time::UnixMs,
    ports::{Archive, StoreError},
};

impl Stored {
    /// Removes the payload; what became of its messages stays.
    pub(super) fn archive(&mut self) {
        self.archived = true;
        self.batch.payload = Bytes::new();
    }
}

#[async_trait]
impl Archive for MemoryStore {
    async fn archive(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        let mut state = self.state();
        let is_over = |batch: &&mut Stored| {
            !batch.archived && batch.record.accepted_at < before && batch.record.why_kept().is_none()
        };
        let over = state.batches.iter_mut().filter(is_over).take(limit);
        Ok(over.map(Stored::archive).count())
    }

    async fn forget_entries(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        let mut state = self.state();
        let old: Vec<_> = state.entries.iter().filter(|(_, at)| **at < before).take(limit).collect();
        let old: Vec<_> = old.into_iter().map(|(entry, _)| entry.clone()).collect();
        for entry in &old {
            state.entries.remove(entry);
        }
        Ok(old.len())
    }
}
