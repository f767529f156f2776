//! A store in memory: the rules of `model::ledger`, with everything else held in the plainest way. Counts are never
//! kept but counted from where each message stands, so that a store that keeps them can be judged by this one.

mod archive;
mod carried;
mod ledger;
mod queue;
mod steering;

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard},
};

use async_trait::async_trait;

use crate::{
    model::{
        batch::{NewBatch, Rendering},
        fairness::LeaseTurns,
        file::{Checkpoint, DestinationCounts, FileReport, FileState, Reject},
        hold::FileHold,
        ids::{BatchId, FileId},
        ledger::{Deadline, Fate, Grant, Record, RowNumbers, codec},
        limits::LimitChange,
        outcome::Attempt,
        priority::Priority,
        room::OpenMessages,
        state::MessageState,
        time::{MonoMs, UnixMs},
    },
    ports::{Append, Appended, EntryId, Lease, LeaseToken, LimitsSet, Outbox, StoreError},
};

/// Outbox, queue and ledger in memory. A store is used with its own queue, whose deadlines are by the monotonic clock,
/// or with one that carries for it and claims, whose deadlines are by the wall clock; never with both.
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
    disabled: BTreeMap<Arc<str>, String>,
    limits: LimitsSet,
    /// By file and destination.
    holds: BTreeMap<(FileId, Arc<str>), FileHold>,
    /// The same: when no request may begin.
    closed: BTreeMap<(FileId, Arc<str>), Range<UnixMs>>,
    /// By file and destination.
    priorities: BTreeMap<(FileId, Arc<str>), Priority>,
    /// By destination.
    turns: BTreeMap<Arc<str>, LeaseTurns<FileId>>,
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
    rows: RowNumbers,
    record: Record,
    /// One chunk per settlement that brought failures.
    history: Vec<Vec<u8>>,
    archived: bool,
}

impl Stored {
    fn is_open(&self) -> bool {
        !self.record.is_settled()
    }

    fn is_held(&self) -> bool {
        self.record.holder.is_some()
    }

    /// What a worker is given of it.
    fn to_lease(&self) -> Lease {
        Lease::of(self.batch.id, self.batch.header.clone(), self.batch.payload.clone(), &self.record)
    }
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

    /// Sends every dead message again that was never sent, with a new body, as `postrider dead redrive --rerender` does.
    /// Returns how many.
    ///
    /// # Panics
    ///
    /// If a history can't be read.
    pub fn rerender(&self, renderings: &BTreeMap<String, Rendering>, now: UnixMs) -> usize {
        let mut state = self.state();
        let (mut redriven, mut files) = (0, Vec::new());
        for stored in &mut state.batches {
            let history = stored.history.iter().map(Vec::as_slice);
            let keeps = stored.record.keeps_bodies(history).expect("it was written by this program");
            let rendering = renderings.get(&stored.batch.header.destination);
            let (None, Some(rendering)) = (keeps, rendering) else { continue };
            let changes = stored.record.rerender(0..stored.record.len() as u32, now);
            if !changes.rose.is_empty() {
                redriven += changes.rose.len();
                files.push(stored.batch.header.file);
                stored.batch.header = Arc::new(stored.batch.header.rendered_by(rendering));
            }
        }
        for file in files {
            state.touch_file(file, now);
        }
        redriven
    }

    /// Enables a destination again, as `postrider resume` does.
    pub fn enable_destination(&self, name: &str) {
        self.state().disabled.remove(name);
    }

    /// Sets a limit, as `postrider rate` and `postrider concurrency` do.
    pub fn limit(&self, destination: &str, change: LimitChange) {
        let limits = &mut self.state().limits;
        let set = limits.get(destination).copied().unwrap_or_default().with(change);
        limits.insert(destination.into(), set);
        limits.retain(|_, set| !set.is_empty());
    }

    /// How many messages of a destination are open.
    pub fn open_at(&self, destination: &str) -> u64 {
        let state = self.state();
        let of_it = state.batches.iter().filter(|batch| batch.batch.header.destination == destination);
        of_it.map(|batch| u64::from(batch.record.open_count())).sum()
    }

    /// How many batches are leased.
    pub fn leased(&self) -> usize {
        self.state().batches.iter().filter(|batch| batch.is_held()).count()
    }

    /// How the message of `row` stands at `destination`, and its failed attempts, the oldest first; `None` if it is not
    /// stored.
    pub fn fate(&self, file: FileId, destination: &str, row: u64) -> Option<(Fate, Vec<Attempt>)> {
        let state = self.state();
        let (batch, index) =
            state.batches_of(file, destination).find_map(|batch| Some((batch, batch.rows.find(row)?)))?;
        let chunks = batch.history.iter().map(Vec::as_slice);
        let failures = codec::failures_of(chunks, index as u32).expect("it was written by this program");
        Some((batch.record.fate(index)?, failures))
    }

    /// Leases the batches `ids`, as another store's queue has chosen them, as far as they may be leased.
    pub(super) fn lease_these(
        &self,
        holder: &str,
        ids: &[BatchId],
        until: MonoMs,
        now: UnixMs,
    ) -> Vec<Lease> {
        let mut state = self.state();
        let mut leases = Vec::new();
        for id in ids {
            let Some(&at) = state.ids.get(id) else { continue };
            let batch = &mut state.batches[at];
            if !batch.is_held()
                && batch.record.lease(holder, Deadline(until.0), Deadline(0), now, UnixMs(0))
                    == Grant::Granted
            {
                leases.push(batch.to_lease());
            }
        }
        leases
    }

    /// How many batches of `destination` could be leased at `now`, disabled or not.
    pub(super) fn leasable(&self, destination: &str, now: UnixMs) -> usize {
        let state = self.state();
        state.batches.iter().filter(|batch| state.is_leasable(batch, destination, now)).count()
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
        let mut batches = Vec::new();
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
            for batch in append.batches {
                if self.ids.contains_key(&batch.id) {
                    return refused(format!("batch {} is stored already", batch.id));
                }
                let rows = batch.row_numbers().map_err(StoreError::Permanent)?;
                batches.push((batch, rows));
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
                    held: BTreeMap::new(),
                    priorities: BTreeMap::new(),
                    failures: BTreeMap::new(),
                },
                checkpoint: Checkpoint::default(),
                rejects: Vec::new(),
                reported: false,
            });
        }
        if advances {
            self.entries.extend(append.entries.into_iter().map(|entry| (entry, append.at)));
            for (batch, rows) in batches {
                self.insert(batch, rows);
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
        let changes_state = file.report.state != FileState::Ingested && file.report.state != append.state;
        if changes_state {
            file.report.closed_at = append.state.is_closed().then_some(append.at);
            file.report.state = append.state;
            file.reported = false;
        }
        self.settle_file(id, append.at);
        if let Some(step) = append.hold.filter(|_| advances || changes_state) {
            for destination in &step.destinations {
                self.change_hold(id, destination, &step.change);
            }
        }
        Ok(Appended::Stored)
    }

    fn insert(&mut self, batch: NewBatch, rows: RowNumbers) {
        self.ids.insert(batch.id, self.batches.len());
        self.batches.push(Stored {
            record: Record::new(batch.count, batch.accepted_at, batch.not_before),
            batch,
            rows,
            history: Vec::new(),
            archived: false,
        });
    }

    fn batches_of(&self, file: FileId, destination: &str) -> impl Iterator<Item = &Stored> {
        self.batches.iter().filter(move |batch| {
            batch.batch.header.file == file && batch.batch.header.destination == destination
        })
    }

    fn counts(&self, file: FileId, destination: &str) -> DestinationCounts {
        let mut counts = DestinationCounts::default();
        for batch in self.batches_of(file, destination) {
            for index in 0..batch.record.len() {
                counts.accepted += 1;
                match batch.record.states.get(index) {
                    MessageState::Accepted => {}
                    MessageState::Retrying => counts.retrying += 1,
                    MessageState::Unsent => counts.unsent += 1,
                    MessageState::Cancelled => counts.cancelled += 1,
                    MessageState::Dead => counts.dead += 1,
                    _ => counts.sent += 1,
                }
            }
        }
        counts
    }

    fn report(&self, file: &File) -> FileReport {
        let mut report = file.report.clone();
        for (name, counts) in &mut report.destinations {
            *counts = self.counts(file.report.file.id, name);
        }
        let held = self.holds.iter().filter(|((of, _), _)| *of == report.file.id);
        report.held = held.map(|((_, name), hold)| (name.to_string(), hold.clone())).collect();
        let ordered = self.priorities.iter().filter(|((of, _), _)| *of == report.file.id);
        report.priorities = ordered.map(|((_, name), priority)| (name.to_string(), *priority)).collect();
        report
    }

    /// The messages of a file have changed, the last of them at `at`: its report is to be written again.
    fn touch_file(&mut self, id: FileId, at: UnixMs) {
        if let Some(file) = self.file(id) {
            file.reported = false;
        }
        self.settle_file(id, at);
    }

    fn settle_file(&mut self, id: FileId, at: UnixMs) {
        let Some(place) = self.files.iter().position(|file| file.report.file.id == id) else { return };
        let settled = self.report(&self.files[place]).is_settled();
        let settled_at = &mut self.files[place].report.settled_at;
        *settled_at = settled.then(|| settled_at.unwrap_or(at));
    }

    /// The batch of a lease that is held.
    fn current(&mut self, token: LeaseToken) -> Option<&mut Stored> {
        let batch = &mut self.batches[*self.ids.get(&token.batch)?];
        batch.record.is_current(token.fence).then_some(batch)
    }

    fn redrive(&mut self, now: UnixMs) -> usize {
        let mut redriven = 0;
        let mut files = Vec::new();
        for batch in &mut self.batches {
            let changes = batch.record.redrive(0..batch.record.len() as u32, now);
            if !changes.rose.is_empty() {
                redriven += changes.rose.len();
                files.push(batch.batch.header.file);
            }
        }
        for file in files {
            self.touch_file(file, now);
        }
        redriven
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

    async fn open_messages(&self) -> Result<OpenMessages, StoreError> {
        let mut open = OpenMessages::new();
        for batch in &self.state().batches {
            let count = u64::from(batch.record.open_count());
            if count > 0 {
                *open.entry(batch.batch.header.destination.as_str().into()).or_default() += count;
            }
        }
        Ok(open)
    }
}
