//! A store in memory: the same rules as a real one, held in the plainest way. Counts are never kept but
//! counted from where each message stands, so that a store that keeps them can be judged by this one.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard},
};

use async_trait::async_trait;

use crate::{
    model::{
        batch::{NewBatch, Rows, StateVector},
        file::{Checkpoint, DestinationCounts, FileReport, FileState, Reject},
        ids::{BatchId, FileId},
        outcome::{Attempt, Verdict},
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
    /// The entries of inbound queues that were taken.
    entries: BTreeSet<EntryId>,
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
    until: MonoMs,
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
                append.entries.iter().filter(|entry| self.entries.contains(entry)).cloned().collect();
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
            self.entries.extend(append.entries);
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
        batches.map(|batch| (batch.phase, batch.losses) = (Phase::Queued, batch.losses + 1)).count()
    }

    fn settle(&mut self, settlement: Settlement) -> Settled {
        let Some(&at) = self.ids.get(&settlement.token.batch) else { return Settled::Stale };
        let current = self.is_current(settlement.token).is_some();
        let (file, destination) = {
            let header = &self.batches[at].batch.header;
            (header.file, header.destination.clone())
        };
        let mut carried_on = BTreeSet::new();
        let mut ends = Vec::new();
        let mut last = None;
        for (index, verdict) in settlement.verdicts {
            let index = index as usize;
            match verdict {
                Verdict::Sent { at, .. } => ends.push((index, MessageState::Sent, None, at)),
                Verdict::Dead { attempt, .. } if current => {
                    ends.push((index, MessageState::Dead, Some(attempt), attempt.at));
                }
                Verdict::Retry { attempt, .. } if current => {
                    let batch = &mut self.batches[at];
                    let ended = ends.iter().any(|&(ended, ..)| ended == index);
                    if !ended && batch.states.merge(index, MessageState::Retrying) == MessageState::Accepted {
                        carried_on.insert(batch.rows.row(index));
                        last = last.max(Some(attempt.at));
                    }
                }
                Verdict::Dead { .. } | Verdict::Retry { .. } => {}
            }
        }
        if current {
            for retry in settlement.retries {
                self.carry_on(retry, &carried_on);
            }
        }
        for (index, state, death, ended_at) in ends {
            let key = (file, destination.clone(), self.batches[at].rows.row(index));
            let message = self.messages.get_mut(&key).expect("every row of a batch is a message");
            let live = &mut self.batches[message.batch];
            if live.states.merge(message.index, state) < state {
                last = last.max(Some(ended_at));
            }
            // A 2xx here too, where the live entry is elsewhere. `dead` can be taken back by a redrive, so
            // it stands at the live entry alone.
            if state == MessageState::Sent {
                self.batches[at].states.merge(index, state);
            }
            let live = &mut self.batches[message.batch];
            message.death = if live.states.get(message.index) == MessageState::Dead {
                message.death.or(death)
            } else {
                None
            };
            if live.states.unsettled().next().is_none() {
                live.phase = Phase::Settled;
            }
        }
        let complete = self.batches[at].states.unsettled().next().is_none();
        if complete {
            self.batches[at].phase = Phase::Settled;
        }
        if let Some(last) = last {
            self.reopen_report(file);
            self.settle_file(file, last);
        }
        match (current, complete) {
            (false, _) => Settled::Stale,
            (true, true) => Settled::Complete,
            (true, false) => Settled::Open,
        }
    }

    /// A report that may be out of date is to be written again.
    fn reopen_report(&mut self, file: FileId) {
        if let Some(file) = self.file(file) {
            file.reported = false;
        }
    }

    /// What no store may accept, for it would lose or double a message.
    fn check_settlement(&self, at: usize, current: bool, settlement: &Settlement) -> Result<(), StoreError> {
        let batch = &self.batches[at];
        let len = batch.states.0.len();
        if let Some((index, _)) = settlement.verdicts.iter().find(|(index, _)| *index as usize >= len) {
            return refused(format!("index {index} of a batch of {len}"));
        }
        if !current {
            return Ok(());
        }
        let retried =
            settlement.verdicts.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Retry { .. }));
        let mut waiting: BTreeSet<u64> = retried.map(|(index, _)| batch.rows.row(*index as usize)).collect();
        for retry in &settlement.retries {
            let follows = retry.header == batch.batch.header
                && retry.root == batch.batch.root
                && (retry.drive, retry.attempt) == (batch.batch.drive, batch.batch.attempt + 1);
            let rows = Rows::decode(retry.payload.clone());
            let rows = rows.map_err(|error| StoreError::Permanent(error.to_string()))?;
            if !follows || rows.len() != retry.count as usize {
                return refused(format!("retry batch {} does not follow from {}", retry.id, batch.batch.id));
            }
            if let Some(row) = (0..rows.len()).map(|index| rows.row(index)).find(|row| !waiting.remove(row)) {
                return refused(format!("row {row} is carried on without a verdict"));
            }
        }
        match waiting.into_iter().find(|row| {
            let index = batch.rows.find(*row).expect("verdicts are about rows of the batch");
            batch.states.get(index) == MessageState::Accepted
        }) {
            Some(row) => refused(format!("row {row} is retried, but no batch carries it on")),
            None => Ok(()),
        }
    }

    /// Stores a retry batch with those of its messages that were open until now.
    fn carry_on(&mut self, mut retry: NewBatch, open: &BTreeSet<u64>) {
        let rows = Rows::decode(retry.payload.clone()).expect("check_settlement has read it");
        let live: Vec<_> = (0..rows.len()).filter(|&index| open.contains(&rows.row(index))).collect();
        let Some(&first) = live.first() else { return };
        if live.len() < rows.len() {
            let header = &retry.header;
            retry.first_row = rows.row(first);
            retry.id = BatchId::derive(
                header.file,
                &header.destination,
                retry.first_row,
                retry.drive,
                retry.attempt,
            );
            retry.count = live.len() as u32;
            retry.history = live.iter().filter_map(|&index| retry.history.get(index).cloned()).collect();
            retry.payload = rows.select(live).finish();
        }
        self.insert(retry);
    }

    fn redrive(&mut self, now: UnixMs) -> usize {
        let mut groups: BTreeMap<(BatchId, String), Vec<Dead>> = BTreeMap::new();
        for ((_, destination, row), message) in &self.messages {
            if let Some(death) = message.death {
                let root = self.batches[message.batch].batch.root;
                let group = groups.entry((root, destination.clone())).or_default();
                group.push((*row, message.batch, message.index, death));
            }
        }
        let count = groups.values().map(Vec::len).sum();
        for ((root, destination), group) in groups {
            let origin = &self.batches[self.ids[&root]];
            let header = origin.batch.header.clone();
            let indexes =
                group.iter().map(|(row, ..)| origin.rows.find(*row).expect("the root has every row"));
            let payload = origin.rows.select(indexes).finish();
            let mut history = Vec::new();
            let mut drive = 0;
            for &(_, batch, index, death) in &group {
                let batch = &mut self.batches[batch];
                let mut attempts = batch.batch.history.get(index).cloned().unwrap_or_default();
                attempts.push(death);
                history.push(attempts);
                drive = drive.max(batch.batch.drive + 1);
                batch.states.0[index] = MessageState::Retrying as u8;
            }
            let first_row = group[0].0;
            self.insert(NewBatch {
                id: BatchId::derive(header.file, &destination, first_row, drive, 0),
                root,
                first_row,
                count: group.len() as u32,
                drive,
                attempt: 0,
                accepted_at: now,
                not_before: now,
                payload,
                history,
                header: header.clone(),
            });
            self.reopen_report(header.file);
            self.settle_file(header.file, now);
        }
        count
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
        Ok(entries.iter().filter(|entry| state.entries.contains(entry)).cloned().collect())
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
        let entry = |batch: &&Stored| OutboxEntry {
            id: batch.batch.id,
            destination: batch.batch.header.destination.as_str().into(),
            count: batch.batch.count,
            not_before: batch.batch.not_before,
            batch: with_batches.then(|| batch.batch.clone()),
        };
        Ok(due.iter().take(limit).map(entry).collect())
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
                batch.phase = Phase::Leased;
                batch.fence += 1;
                batch.holder = request.holder.clone();
                batch.until = request.until;
                leases.push(Lease {
                    token: LeaseToken { batch: batch.batch.id, fence: batch.fence },
                    root: batch.batch.root,
                    header: batch.batch.header.clone(),
                    drive: batch.batch.drive,
                    attempt: batch.batch.attempt,
                    accepted_at: batch.batch.accepted_at,
                    payload: batch.batch.payload.clone(),
                    states: batch.states.clone(),
                    history: batch.batch.history.clone(),
                    losses: batch.losses,
                });
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
                batch.phase = Phase::Queued;
                batch.losses += u32::from(how == Release::Lost);
            }
        }
        Ok(())
    }

    async fn release_holder(&self, holder: &str) -> Result<usize, StoreError> {
        Ok(self.state().lose(|batch| *batch.holder == *holder))
    }

    async fn rescue(&self, now: MonoMs) -> Result<usize, StoreError> {
        Ok(self.state().lose(|batch| batch.until < now))
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
