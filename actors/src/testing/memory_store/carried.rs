//! What a queue that only carries needs of the store: what to send, and claims.

use async_trait::async_trait;

use super::{MemoryStore, State, Stored, refused};
use crate::{
    model::{
        ids::BatchId,
        ledger::{Deadline, Grant},
        time::UnixMs,
    },
    ports::{
        Claim, ClaimRequest, Claims, Cursor, Dispatch, DispatchSource, Fetched, ItemOutcome, LeaseToken,
        OutboxEntry, OutboxPages, OutstandingQuery, Page, PageQuery, Release, StoreError,
    },
};

impl Stored {
    fn is_outstanding(&self) -> bool {
        self.is_open() && !self.is_held() && !self.dispatched
    }

    /// When its first open message may be delivered.
    fn due(&self) -> UnixMs {
        self.record.due().unwrap_or(self.record.not_before)
    }

    fn entry(&self, with_batch: bool) -> OutboxEntry {
        OutboxEntry {
            id: self.batch.id,
            destination: self.batch.header.destination.as_str().into(),
            count: self.batch.count,
            not_before: self.due(),
            batch: with_batch.then(|| self.batch.clone()),
        }
    }
}

#[async_trait]
impl DispatchSource for MemoryStore {
    async fn outstanding(&self, query: OutstandingQuery<'_>) -> Result<Vec<OutboxEntry>, StoreError> {
        let OutstandingQuery { due_by, limit, except } = query;
        let mut state = self.state();
        let is_asked = |batch: &&mut Stored| {
            let destination = &batch.batch.header.destination;
            batch.is_outstanding()
                && batch.due() <= due_by
                && except.iter().all(|name| **name != **destination)
        };
        let mut due: Vec<_> = state.batches.iter_mut().filter(is_asked).collect();
        due.sort_by_key(|batch| batch.due()); // stable: then by age
        let mut entries = Vec::new();
        for batch in due.into_iter().take(limit) {
            batch.listed = batch.record.fence;
            entries.push(batch.entry(true));
        }
        Ok(entries)
    }

    async fn mark_dispatched(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let mut state = self.state();
        let mut mark = |id: &BatchId| {
            let Some(&at) = state.ids.get(id) else {
                return ItemOutcome::Permanent(format!("no batch {id} is stored"));
            };
            let batch = &mut state.batches[at];
            // Claimed and put back since, it is to be sent again: what was accepted then is spent.
            if batch.listed == batch.record.fence {
                batch.dispatched = true;
            }
            ItemOutcome::Ok
        };
        Ok(ids.iter().map(|id| (*id, mark(id))).collect())
    }

    async fn next_due(&self) -> Result<Option<UnixMs>, StoreError> {
        let state = self.state();
        Ok(state.batches.iter().filter(|batch| batch.is_outstanding()).map(Stored::due).min())
    }
}

#[async_trait]
impl Claims for MemoryStore {
    async fn claim(&self, request: ClaimRequest) -> Result<Vec<(BatchId, Claim)>, StoreError> {
        let mut state = self.state();
        Ok(request.batches.iter().map(|&id| (id, state.claim(&request, id))).collect())
    }

    async fn extend_claims(
        &self,
        tokens: &[LeaseToken],
        until: UnixMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        Ok(self.state().extend(tokens, Deadline(until.0)))
    }

    async fn release_claims(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        self.state().release(tokens, how);
        Ok(())
    }
}

impl State {
    fn claim(&mut self, request: &ClaimRequest, id: BatchId) -> Claim {
        let Some(&at) = self.ids.get(&id) else { return Claim::Missing };
        let batch = &mut self.batches[at];
        let destination = batch.batch.header.destination.as_str();
        if batch.is_open() && self.disabled.contains_key(destination) {
            return Claim::Unavailable(format!("destination {destination} is disabled"));
        }
        let (until, now) = (Deadline(request.until.0), Deadline(request.now.0));
        match batch.lease(&request.holder, until, now, request.now, request.born) {
            Grant::Granted => Claim::Granted(Box::new(batch.record.clone())),
            Grant::Held { until } => Claim::Held { until: UnixMs(until.0) },
            Grant::Early { due } => Claim::Early { due },
            Grant::Settled => Claim::Settled,
        }
    }
}

#[async_trait]
impl OutboxPages for MemoryStore {
    async fn page(&self, query: PageQuery) -> Result<Page, StoreError> {
        let from = match &query.cursor {
            None => 0,
            // The number of the first that was not listed yet.
            Some(Cursor(text)) => match text.parse::<usize>() {
                Ok(from) => from,
                Err(_) => return refused(format!("{text:?} is not a cursor")),
            },
        };
        let state = self.state();
        let is_listed = |batch: &Stored| {
            !batch.archived
                && batch.is_outstanding() == (query.dispatch == Dispatch::Outstanding)
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
        let mut delete = |id: &BatchId| {
            let Some(&at) = state.ids.get(id) else { return ItemOutcome::Ok };
            let batch = &mut state.batches[at];
            if let Some(why) = batch.record.why_kept() {
                return ItemOutcome::Permanent(why.into());
            }
            batch.archive();
            ItemOutcome::Ok
        };
        Ok(ids.iter().map(|id| (*id, delete(id))).collect())
    }

    async fn count_outstanding(&self) -> Result<u64, StoreError> {
        Ok(self.state().batches.iter().filter(|batch| batch.is_outstanding()).count() as u64)
    }
}
