//! The store's own queue: nothing but its records.

use std::collections::HashMap;

use async_trait::async_trait;

use super::{MemoryStore, State, Stored};
use crate::{
    model::{
        fairness::Listed,
        ids::{BatchId, FileId},
        ledger::{Deadline, Grant},
        time::{MonoMs, UnixMs},
    },
    ports::{ItemOutcome, Lease, LeaseRequest, LeaseToken, Queue, Release, StoreError, Want},
};

impl State {
    /// Whether a batch could be leased for `destination` at `now`.
    pub(super) fn is_leasable(&self, batch: &Stored, destination: &str, now: UnixMs) -> bool {
        batch.batch.header.destination == destination
            && !batch.is_held()
            && batch.record.due().is_some_and(|due| due <= now)
            && !self.waits_for_its_file(batch, now)
    }

    /// Which batches to lease, by their numbers.
    fn choose(&mut self, want: &Want, now: UnixMs) -> Vec<usize> {
        let latest = now.after(want.longest_wait);
        let is_its =
            |batch: &&mut Stored| batch.batch.header.destination == *want.destination && !batch.is_held();
        for batch in self.batches.iter_mut().filter(is_its) {
            batch.record.cut_waits(latest, now);
        }
        let due = self.due_for(&want.destination, now);
        self.take_turns(want, due, now)
    }

    /// The oldest of a destination that keeps an order, by their numbers.
    fn choose_in_order(&self, want: &Want, holder: &str, now: UnixMs) -> Vec<usize> {
        let is_its = |batch: &Stored| batch.batch.header.destination == *want.destination;
        let has_another =
            |batch: &Stored| batch.record.holder.as_ref().is_some_and(|held| held.name != holder);
        if self.batches.iter().any(|batch| is_its(batch) && has_another(batch)) {
            return Vec::new();
        }
        let is_open = |at: &usize| {
            let batch = &self.batches[*at];
            let is_free = !batch.is_held() && !self.waits_for_its_file(batch, now);
            is_its(batch) && is_free && batch.record.due().is_some()
        };
        let mut open: Vec<usize> = (0..self.batches.len()).filter(is_open).collect();
        let mut files = HashMap::new();
        for (at, batch) in self.batches.iter().enumerate() {
            files.entry(batch.batch.header.file).or_insert(at);
        }
        open.sort_by_key(|&at| {
            let batch = &self.batches[at].batch;
            (files[&batch.header.file], batch.first_row)
        });
        let mut due = 0;
        let is_wanted = |&at: &usize| {
            let record = &self.batches[at].record;
            let is_wanted = due < want.messages;
            due += record.open().filter(|&index| record.due_of(index) <= now).count();
            is_wanted
        };
        open.into_iter().take(want.batches).take_while(is_wanted).collect()
    }

    /// What could be leased for a destination, by number, what has been due for longest first.
    pub(super) fn due_for(&self, destination: &str, now: UnixMs) -> Vec<usize> {
        let is_due = |at: &usize| self.is_leasable(&self.batches[*at], destination, now);
        let mut due: Vec<usize> = (0..self.batches.len()).filter(is_due).collect();
        due.sort_by_key(|&at| self.batches[at].record.due()); // stable: then by age
        due
    }

    /// Of these batches, which are due, those whose turn it is.
    pub(super) fn take_turns(&mut self, want: &Want, due: Vec<usize>, now: UnixMs) -> Vec<usize> {
        let (retries, fresh): (Vec<_>, Vec<_>) =
            due.into_iter().partition(|&at| self.batches[at].record.is_retry());
        let listed = |batches: Vec<usize>, each: usize, besides: &[FileId]| {
            let batches = batches.into_iter().map(|at| {
                let stored = &self.batches[at];
                let due = stored.record.open().filter(|&index| stored.record.due_of(index) <= now).count();
                (stored.batch.header.file, self.priority_of(stored), at, due)
            });
            Listed::new(batches.filter(|(file, ..)| !besides.contains(file)), each)
        };
        let (mut retries, mut fresh, messages) = if let Some(first) = &want.first_turns {
            let retries = if first.retries { retries } else { Vec::new() };
            (listed(retries, 1, &[]), listed(fresh, 1, &first.besides), usize::MAX)
        } else {
            let all = usize::MAX;
            (listed(retries, all, &[]), listed(fresh, all, &[]), want.messages)
        };
        let turns = self.turns.entry(want.destination.clone()).or_default();
        let Ok(chosen) = turns.choose(&mut retries, &mut fresh, messages, want.batches);
        chosen
    }

    /// Marks lost the leases that `is_lost` picks.
    fn lose(&mut self, is_lost: impl Fn(&str, Deadline) -> bool) -> usize {
        let mut lost = 0;
        for batch in &mut self.batches {
            if batch.record.holder.as_ref().is_some_and(|holder| is_lost(&holder.name, holder.until)) {
                batch.record.lose();
                lost += 1;
            }
        }
        lost
    }

    pub(super) fn extend(&mut self, tokens: &[LeaseToken], until: Deadline) -> Vec<(BatchId, ItemOutcome)> {
        let mut extend = |token: &LeaseToken| {
            let at = self.ids.get(&token.batch).copied();
            if at.is_some_and(|at| self.batches[at].record.extend(token.fence, until)) {
                ItemOutcome::Ok
            } else {
                ItemOutcome::Permanent("the lease is not held any more".into())
            }
        };
        tokens.iter().map(|token| (token.batch, extend(token))).collect()
    }

    pub(super) fn release(&mut self, tokens: &[LeaseToken], how: Release) {
        for token in tokens {
            let Some(batch) = self.current(*token) else { continue };
            match how {
                Release::Unused | Release::Closed { .. } => {
                    batch.record.release(token.fence);
                }
                Release::Lost => batch.record.lose(),
            }
            if let Release::Closed { from, until } = how {
                let header = batch.batch.header.clone();
                self.closed.insert((header.file, header.destination.as_str().into()), from..until);
            }
        }
    }
}

#[async_trait]
impl Queue for MemoryStore {
    async fn lease(&self, request: LeaseRequest) -> Result<Vec<Lease>, StoreError> {
        let mut state = self.state();
        let mut leases = Vec::new();
        for want in &request.wants {
            if state.disabled.contains_key(&want.destination) {
                continue;
            }
            let (chosen, wall) = if want.in_order {
                (state.choose_in_order(want, &request.holder, request.now), UnixMs(u64::MAX))
            } else {
                (state.choose(want, request.now), request.now)
            };
            for at in chosen {
                let batch = &mut state.batches[at];
                let until = Deadline(request.until.0);
                let grant = batch.record.lease(&request.holder, until, Deadline(0), wall, request.born);
                debug_assert_eq!(grant, Grant::Granted, "nobody holds it, and it is due where that matters");
                leases.push(batch.to_lease());
            }
        }
        Ok(leases)
    }

    async fn extend(
        &self,
        tokens: &[LeaseToken],
        until: MonoMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        Ok(self.state().extend(tokens, Deadline(until.0)))
    }

    async fn release(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        self.state().release(tokens, how);
        Ok(())
    }

    async fn release_holder(&self, holder: &str) -> Result<usize, StoreError> {
        Ok(self.state().lose(|name, _| name == holder))
    }

    async fn rescue(&self, now: MonoMs) -> Result<usize, StoreError> {
        Ok(self.state().lose(|_, until| until < Deadline(now.0)))
    }
}
