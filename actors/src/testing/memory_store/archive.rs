//! Operations on the outbox as a whole, in memory.

use async_trait::async_trait;

use super::{MemoryStore, Phase, State, Stored, refused};
use crate::{
    model::{ids::BatchId, state::MessageState, time::UnixMs},
    ports::{Cursor, Dispatch, Fetched, ItemOutcome, OutboxArchive, Page, PageQuery, StoreError},
};

#[async_trait]
impl OutboxArchive for MemoryStore {
    async fn page(&self, query: PageQuery) -> Result<Page, StoreError> {
        let from = match &query.cursor {
            None => 0,
            // The number of the first that was not listed yet.
            Some(Cursor(text)) => match text.parse::<usize>() {
                Ok(from) => from,
                Err(_) => return refused(format!("{text:?} is no cursor")),
            },
        };
        let state = self.state();
        let is_listed = |batch: &Stored| {
            !batch.archived
                && (batch.phase == Phase::Outstanding) == (query.dispatch == Dispatch::Outstanding)
                && query.destination.as_ref().is_none_or(|name| **name == *batch.batch.header.destination)
        };
        let mut listed = state.batches.iter().enumerate().skip(from).filter(|(_, batch)| is_listed(batch));
        let page = listed.by_ref().take(query.limit.max(1));
        let entries = page.map(|(_, batch)| batch.entry(false)).collect();
        let next = listed.next().map(|(number, _)| Cursor(number.to_string()));
        Ok(Page { entries, next })
    }

    async fn get(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, Fetched)>, StoreError> {
        let state = self.state();
        let fetch = |id: &BatchId| match state.ids.get(id).map(|&at| &state.batches[at]) {
            Some(batch) if !batch.archived => (*id, Fetched::Batch(batch.batch.clone())),
            _ => (*id, Fetched::Missing),
        };
        Ok(ids.iter().map(fetch).collect())
    }

    async fn delete(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let mut state = self.state();
        let mut outcomes = Vec::with_capacity(ids.len());
        for &id in ids {
            let outcome = match state.ids.get(&id).copied() {
                Some(at) if !state.batches[at].archived => {
                    let kept = state.why_kept(at);
                    if kept.is_none() {
                        state.archive(at);
                    }
                    kept.map_or(ItemOutcome::Ok, |why| ItemOutcome::Permanent(why.into()))
                }
                _ => ItemOutcome::Ok,
            };
            outcomes.push((id, outcome));
        }
        Ok(outcomes)
    }

    async fn count_outstanding(&self) -> Result<u64, StoreError> {
        let state = self.state();
        Ok(state.batches.iter().filter(|batch| batch.phase == Phase::Outstanding).count() as u64)
    }

    async fn archive(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        let mut state = self.state();
        let is_old = |at: &usize| {
            let batch = &state.batches[*at];
            !batch.archived && batch.batch.not_before < before && state.why_kept(*at).is_none()
        };
        let old: Vec<_> = (0..state.batches.len()).filter(is_old).take(limit).collect();
        for &at in &old {
            state.archive(at);
        }
        Ok(old.len())
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

impl State {
    /// Why the batch at `at` can't go, if it can't.
    fn why_kept(&self, at: usize) -> Option<&'static str> {
        let root = self.batches[at].batch.root;
        let family = || self.batches.iter().filter(|batch| batch.batch.root == root);
        if self.batches[at].phase == Phase::Outstanding {
            Some("it is outstanding")
        } else if family().any(|batch| batch.phase != Phase::Settled) {
            Some("its messages, or others of the same root, are not settled")
        } else if family().any(|batch| batch.states.0.contains(&(MessageState::Dead as u8))) {
            Some("a message of its root is dead, and a redrive would need it")
        } else {
            None
        }
    }

    fn archive(&mut self, at: usize) {
        let batch = &mut self.batches[at];
        batch.archived = true;
        batch.batch.payload = batch.rows.skeleton().finish();
    }
}
