//! A store in memory: the same rules as a real one, held in the plainest way. Counts are never kept but
//! counted from where each message stands, so that a store that keeps them can be judged by this one.

mod archive;
mod claims;
mod settle;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard},
};

use async_trait::async_trait;

use crate::{
    model::{
        batch::{NewBatch, Rows, StateVector},
        file::{Checkpoint, DestinationCounts, FileReport, FileState, Reject},
        ids::{BatchId, FileId},
        outcome::Attempt,
        state::MessageState,
        time::{MonoMs, UnixMs},
    },
    ports::{
        Append, Appended, EntryId, ItemOutcome, Lease, LeaseRequest, LeaseToken, Ledger, Outbox, OutboxEntry,
        OutstandingQuery, Queue, QueueDepth, Release, Settled, Settlement, StoreError,
    },
};

/// Outbox, queue and ledger in memory.
#[derive(Default)]
pub struct MemoryStore {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    files: Vec<File>,
    /// In the order in which they were stored.
    batches: Vec<Stored>,
    ids: HashMap<BatchId, usize>,
    messages: BTreeMap<MessageKey, Message>,
    disabled: BTreeMap<Arc<str>, String>,
    /// The entries of inbound queues that were taken, and when.
    entries: BTreeMap<EntryId, UnixMs>,
}

struct File {
    report: FileReport,
    checkpoint: Checkpoint,
    rejects: Vec<Reject>,
    reported: bool,
}

struct Stored {
    batch: NewBatch,
    rows: Rows,
    states: StateVector,
    phase: Phase,
    fence: u64,
    losses: u32,
    holder: Arc<str>,
    /// The deadline of a lease that this store's own queue gave.
    until: MonoMs,
    /// The deadline of a claim.
    claimed_until: Option<UnixMs>,
    archived: bool,
}

impl Stored {
    /// Gives it to `holder` under a new fence.
    fn lease(&mut self, holder: &Arc<str>) {
        self.phase = Phase::Leased;
        self.fence += 1;
        self.holder = holder.clone();
    }

    /// It as an entry of the outbox.
    fn entry(&self, with_batch: bool) -> OutboxEntry {
        OutboxEntry {
            id: self.batch.id,
            destination: self.batch.header.destination.as_str().into(),
            count: self.batch.count,
            not_before: self.batch.not_before,
            batch: with_batch.then(|| self.batch.clone()),
        }
    }

    /// What a worker is given of it.
    fn to_lease(&self) -> Lease {
        Lease {
            token: LeaseToken { batch: self.batch.id, fence: self.fence },
            root: self.batch.root,
            header: self.batch.header.clone(),
            drive: self.batch.drive,
            attempt: self.batch.attempt,
            accepted_at: self.batch.accepted_at,
            payload: self.batch.payload.clone(),
            states: self.states.clone(),
            history: self.batch.history.clone(),
            losses: self.losses,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Outstanding,
    Queued,
    Leased,
    Settled,
}

type MessageKey = (FileId, String, u64);

/// A dead message: its row, the batch and index of its live entry, and its last attempt.
type Dead = (u64, usize, usize, Attempt);

/// Where a message's live entry is: the latest batch that holds it.
struct Message {
    batch: usize,
    index: usize,
    /// Its last attempt, while it is dead.
    death: Option<Attempt>,
}

fn refused<T>(why: impl Into<String>) -> Result<T, StoreError> {
    Err(StoreError::Permanent(why.into()))
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no operation panics half-way")
    }

    /// Sends every dead message again, as `postrider dead redrive` does. Returns how many.
    pub fn redrive(&self, now: UnixMs) -> usize {
        self.state().redrive(now)
    }

    /// Leases the queued or outstanding batches among `ids`, as another store's queue has chosen them.
    pub fn lease_these(&self, holder: &Arc<str>, ids: &[BatchId], until: MonoMs) -> Vec<Lease> {
        let mut state = self.state();
        let mut leases = Vec::new();
        for id in ids {
            let Some(&at) = state.ids.get(id) else { continue };
            let batch = &mut state.batches[at];
            if matches!(batch.phase, Phase::Outstanding | Phase::Queued) {
                batch.lease(holder);
                batch.until = until;
                leases.push(batch.to_lease());
            }
        }
        leases
    }

    /// Enables a destination again, as `postrider destinations enable` does.
    pub fn enable_destination(&self, name: &str) {
        self.state().disabled.remove(name);
    }
}

impl State {
    fn file(&mut self, id: FileId) -> Option<&mut File> {
        self.files.iter_mut().find(|file| file.report.file.id == id)
    }

    fn append(&mut self, append: Append) -> Result<Appended, StoreError> {
        let id = append.file.id;
        let (known, before) = match self.file(id) {
            Some(file) => (Some(file.report.state.clone()), file.checkpoint),
            None => (None, Checkpoint::default()),
        };
        let advances = (append.checkpoint.rows, append.checkpoint.offset) > (before.rows, before.offset);
        if advances {
            let taken: Vec<_> =
                append.entries.iter().filter(|entry| self.entries.contains_key(entry)).cloned().collect();
            if !taken.is_empty() {
                return Ok(Appended::Known(taken));
            }
            if known == Some(FileState::Ingested) {
                return refused(format!("file {id} is ingested"));
            }
            append.check_balance(&before).map_err(StoreError::Permanent)?;
            if let Some(batch) = append.batches.iter().find(|batch| self.ids.contains_key(&batch.id)) {
                return refused(format!("batch {} is stored already", batch.id));
            }
        }
        if known.is_none() {
            let destinations = append.file.destinations.iter();
            self.files.push(File {
                report: FileReport {
                    file: (*append.file).clone(),
                    state: FileState::Ingesting,
                    closed_at: None,
                    settled_at: None,
                    rows: 0,
                    rejected: 0,
                    duplicates: 0,
                    destinations: destinations
                        .map(|name| (name.clone(), DestinationCounts::default()))
                        .collect(),
                },
                checkpoint: Checkpoint::default(),
                rejects: Vec::new(),
                reported: false,
            });
        }
        if advances {
            self.entries.extend(append.entries.into_iter().map(|entry| (entry, append.at)));
            for batch in append.batches {
                self.insert(batch);
            }
        }
        let file = self.file(id).expect("it was inserted above");
        if advances {
            file.checkpoint = append.checkpoint;
            file.report.rows = append.checkpoint.rows;
            file.report.rejected = append.checkpoint.rejected;
            file.report.duplicates = append.checkpoint.duplicates;
            file.rejects.extend(append.rejects);
            file.reported = false;
        }
        if file.report.state != FileState::Ingested && file.report.state != append.state {
            file.report.closed_at = append.state.is_closed().then_some(append.at);
            file.report.state = append.state;
            file.reported = false;
        }
        self.settle_file(id, append.at);
        Ok(Appended::Stored)
    }

    fn insert(&mut self, batch: NewBatch) {
        let at = self.batches.len();
        let rows = Rows::decode(batch.payload.clone()).expect("ingest and workers write whole payloads");
        for index in 0..rows.len() {
            let key = (batch.header.file, batch.header.destination.clone(), rows.row(index));
            self.messages.insert(key, Message { batch: at, index, death: None });
        }
        self.ids.insert(batch.id, at);
        self.batches.push(Stored {
            states: StateVector::accepted(batch.count),
            rows,
            batch,
            phase: Phase::Outstanding,
            fence: 0,
            losses: 0,
            holder: "".into(),
            until: MonoMs(0),
            claimed_until: None,
            archived: false,
        });
    }

    fn counts(&self, file: FileId, destination: &str) -> DestinationCounts {
        let mut counts = DestinationCounts::default();
        let from = (file, destination.to_owned(), 0);
        let to = (file, destination.to_owned(), u64::MAX);
        for message in self.messages.range(from..=to).map(|(_, message)| message) {
            let live = &self.batches[message.batch];
            counts.accepted += 1;
            match live.states.get(message.index) {
                MessageState::Accepted if live.batch.drive + live.batch.attempt > 0 => counts.retrying += 1,
                MessageState::Accepted => {}
                MessageState::Dead => counts.dead += 1,
                MessageState::Retrying => unreachable!("a live entry is not carried on elsewhere"),
                _ => counts.sent += 1,
            }
        }
        counts
    }

    fn report(&self, file: &File) -> FileReport {
        let mut report = file.report.clone();
        for (name, counts) in &mut report.destinations {
            *counts = self.counts(file.report.file.id, name);
        }
        report
    }

    fn settle_file(&mut self, id: FileId, at: UnixMs) {
        let Some(at_index) = self.files.iter().position(|file| file.report.file.id == id) else { return };
        let settled = self.report(&self.files[at_index]).is_settled();
        let settled_at = &mut self.files[at_index].report.settled_at;
        *settled_at = settled.then(|| settled_at.unwrap_or(at));
    }

    fn is_current(&self, token: LeaseToken) -> Option<usize> {
        let at = *self.ids.get(&token.batch)?;
        let batch = &self.batches[at];
        (batch.phase == Phase::Leased && batch.fence == token.fence).then_some(at)
    }

    fn lose(&mut self, lost: impl Fn(&Stored) -> bool) -> usize {
        let batches = self.batches.iter_mut().filter(|batch| batch.phase == Phase::Leased && lost(batch));
        batches
            .map(|batch| {
                (batch.phase, batch.losses, batch.claimed_until) = (Phase::Queued, batch.losses + 1, None);
            })
            .count()
    }
}

#[async_trait]
impl Outbox for MemoryStore {
    async fn find_file(&self, id: FileId) -> Result<Option<(FileState, Checkpoint)>, StoreError> {
        Ok(self.state().file(id).map(|file| (file.report.state.clone(), file.checkpoint)))
    }

    async fn append(&self, append: Append) -> Result<Appended, StoreError> {
        self.state().append(append)
    }

    async fn known_entries(&self, entries: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        let state = self.state();
        Ok(entries.iter().filter(|entry| state.entries.contains_key(entry)).cloned().collect())
    }

    async fn outstanding(&self, query: OutstandingQuery<'_>) -> Result<Vec<OutboxEntry>, StoreError> {
        let OutstandingQuery { due_by, limit, with_batches, except } = query;
        let state = self.state();
        let mut due: Vec<_> = state
            .batches
            .iter()
            .filter(|batch| {
                let destination = &batch.batch.header.destination;
                batch.phase == Phase::Outstanding
                    && batch.batch.not_before <= due_by
                    && except.iter().all(|name| **name != **destination)
            })
            .collect();
        due.sort_by_key(|batch| batch.batch.not_before); // stable: then by age
        Ok(due.iter().take(limit).map(|batch| batch.entry(with_batches)).collect())
    }

    async fn mark_dispatched(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let mut state = self.state();
        let mut outcomes = Vec::with_capacity(ids.len());
        for id in ids {
            let outcome = if let Some(&at) = state.ids.get(id) {
                let batch = &mut state.batches[at];
                if batch.phase == Phase::Outstanding {
                    batch.phase = Phase::Queued;
                }
                ItemOutcome::Ok
            } else {
                ItemOutcome::Permanent(format!("no batch {id} is stored"))
            };
            outcomes.push((*id, outcome));
        }
        Ok(outcomes)
    }

    async fn next_due(&self) -> Result<Option<UnixMs>, StoreError> {
        let state = self.state();
        let outstanding = state.batches.iter().filter(|batch| batch.phase == Phase::Outstanding);
        Ok(outstanding.map(|batch| batch.batch.not_before).min())
    }

    async fn depth(&self) -> Result<u64, StoreError> {
        let state = self.state();
        let live = state.messages.values();
        Ok(live
            .filter(|message| {
                state.batches[message.batch].states.get(message.index) == MessageState::Accepted
            })
            .count() as u64)
    }
}

#[async_trait]
impl Queue for MemoryStore {
    fn stores_batches(&self) -> bool {
        false
    }

    async fn send(&self, entries: &[OutboxEntry]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        self.mark_dispatched(&ids).await
    }

    async fn queue_depth(&self) -> Result<QueueDepth, StoreError> {
        let state = self.state();
        let count = |phase| state.batches.iter().filter(|batch| batch.phase == phase).count() as u64;
        Ok(QueueDepth { visible: count(Phase::Queued), in_flight: count(Phase::Leased), delayed: 0 })
    }

    async fn lease(&self, request: LeaseRequest) -> Result<Vec<Lease>, StoreError> {
        let mut state = self.state();
        let mut leases = Vec::new();
        for (destination, limit) in request.wants {
            if state.disabled.contains_key(&destination) {
                continue;
            }
            let mut queued: Vec<_> = state
                .batches
                .iter_mut()
                .filter(|batch| {
                    batch.phase == Phase::Queued && batch.batch.header.destination == *destination
                })
                .collect();
            queued.sort_by_key(|batch| batch.batch.not_before);
            for batch in queued.into_iter().take(limit) {
                batch.lease(&request.holder);
                batch.until = request.until;
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
        let mut state = self.state();
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            let outcome = if let Some(at) = state.is_current(*token) {
                state.batches[at].until = until;
                ItemOutcome::Ok
            } else {
                ItemOutcome::Permanent("the lease is not held any more".into())
            };
            outcomes.push((token.batch, outcome));
        }
        Ok(outcomes)
    }

    async fn release(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        let mut state = self.state();
        for token in tokens {
            if let Some(at) = state.is_current(*token) {
                let batch = &mut state.batches[at];
                (batch.phase, batch.claimed_until) = (Phase::Queued, None);
                batch.losses += u32::from(how == Release::Lost);
            }
        }
        Ok(())
    }

    async fn release_holder(&self, holder: &str) -> Result<usize, StoreError> {
        Ok(self.state().lose(|batch| *batch.holder == *holder))
    }

    async fn rescue(&self, now: MonoMs) -> Result<usize, StoreError> {
        Ok(self.state().lose(|batch| batch.claimed_until.is_none() && batch.until < now))
    }
}

#[async_trait]
impl Ledger for MemoryStore {
    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<Settled>, StoreError> {
        let mut state = self.state();
        // All or nothing: nothing is changed before everything is checked.
        for settlement in &settlements {
            if let Some(&at) = state.ids.get(&settlement.token.batch) {
                state.check_settlement(at, state.is_current(settlement.token).is_some(), settlement)?;
            }
        }
        Ok(settlements.into_iter().map(|settlement| state.settle(settlement)).collect())
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
