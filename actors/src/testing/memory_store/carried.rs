//! What a queue between several processes needs of the store: what is due, and claims.

use async_trait::async_trait;

use super::{MemoryStore, State, Stored, refused};
use crate::{
    model::{
        ids::BatchId,
        ledger::{Deadline, Grant, is_earlier_life},
        shard::shard,
        time::UnixMs,
    },
    ports::{
        Claim, ClaimRequest, Claims, Cursor, DestinationDepth, Dispatch, DueBatch, DueQuery, Fetched, Hint,
        ItemOutcome, LeaseToken, Origin, OutboxEntry, OutboxPages, Page, PageQuery, Release, StoreError,
        Want,
    },
};

/// Lanes of a destination.
const LANES: u32 = 1_024;

impl Stored {
    /// Nobody has claimed it, and a message of it is open.
    fn is_outstanding(&self) -> bool {
        self.is_open() && !self.is_held()
    }

    /// When its first open message may be delivered.
    fn due(&self) -> UnixMs {
        self.record.due().unwrap_or(self.record.not_before)
    }

    fn entry(&self) -> OutboxEntry {
        OutboxEntry {
            id: self.batch.id,
            destination: self.batch.header.destination.as_str().into(),
            count: self.batch.count,
            not_before: self.due(),
        }
    }

    /// How it is due for `process` at `now`, if it is.
    fn origin(&self, process: &str, now: UnixMs) -> Option<Origin> {
        match &self.record.holder {
            _ if !self.is_open() => None,
            None => (self.due() <= now).then_some(Origin::Fresh),
            // Whatever of it is due.
            Some(holder) if is_earlier_life(&holder.name, &format!("{process}/")) => Some(Origin::Mine),
            Some(holder) => (holder.until < Deadline(now.0)).then_some(Origin::Found),
        }
    }
}

#[async_trait]
impl Claims for MemoryStore {
    async fn due(&self, query: DueQuery<'_>) -> Result<Vec<DueBatch>, StoreError> {
        let state = self.state();
        let mut listed = Vec::new();
        for (destination, limit) in query.wants {
            let of_it = state.batches.iter().filter(|batch| batch.batch.header.destination == **destination);
            let of_it = of_it.filter(|batch| !state.waits_for_its_file(batch, query.due_by));
            let due = of_it.filter_map(|batch| Some((batch, batch.origin(query.process, query.due_by)?)));
            let mut due: Vec<_> = due.collect();
            due.sort_by_key(|(batch, _)| batch.due()); // stable: then by age
            listed.extend(due.into_iter().take(*limit).map(|(batch, origin)| DueBatch {
                id: batch.batch.id,
                destination: destination.clone(),
                lane: shard(Some(&batch.batch.header.file.to_string()), LANES, 0),
                open: batch.record.open_count(),
                due: batch.due(),
                origin,
            }));
        }
        Ok(listed)
    }

    async fn first_turns(&self, want: &Want, due_by: UnixMs) -> Result<Vec<Hint>, StoreError> {
        let mut state = self.state();
        if state.disabled.contains_key(&want.destination) {
            return Ok(Vec::new());
        }
        let due = state.due_for(&want.destination, due_by);
        let chosen = state.take_turns(want, due, due_by);
        let hint = |at: usize| {
            let batch = &state.batches[at];
            Hint { batch: batch.batch.id, due: batch.due() }
        };
        Ok(chosen.into_iter().map(hint).collect())
    }

    async fn next_due(&self) -> Result<Option<UnixMs>, StoreError> {
        let state = self.state();
        Ok(state.batches.iter().filter(|batch| batch.is_outstanding()).map(Stored::due).min())
    }

    async fn depths(&self, now: UnixMs) -> Result<Vec<DestinationDepth>, StoreError> {
        let state = self.state();
        let mut depths: Vec<DestinationDepth> = Vec::new();
        for batch in state.batches.iter().filter(|batch| batch.is_open()) {
            let name = batch.batch.header.destination.as_str();
            let at = depths.iter().position(|depth| *depth.destination == *name).unwrap_or_else(|| {
                depths.push(DestinationDepth { destination: name.into(), due: 0, waiting: 0, leased: 0 });
                depths.len() - 1
            });
            let open = u64::from(batch.record.open_count());
            let depth = &mut depths[at];
            if batch.is_held() {
                depth.leased += open;
            } else if batch.due() <= now {
                depth.due += open;
            } else {
                depth.waiting += open;
            }
        }
        Ok(depths)
    }

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
        let batch = &self.batches[at];
        let destination = batch.batch.header.destination.as_str();
        if batch.is_open() && self.disabled.contains_key(destination) {
            return Claim::Unavailable(format!("destination {destination} is disabled"));
        }
        if self.waits_for_its_file(&self.batches[at], request.now) {
            return Claim::Waits;
        }
        let batch = &mut self.batches[at];
        let (until, now) = (Deadline(request.until.0), Deadline(request.now.0));
        match batch.record.lease(&request.holder, until, now, request.now, request.born) {
            Grant::Granted => Claim::Granted(Box::new(batch.to_lease())),
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
        let entries = page.map(|(_, batch)| batch.entry()).collect();
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
