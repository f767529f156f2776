//! Queue feed: takes the entries of an inbound queue, accumulates them across polls, appends their rows to
//! the outbox and deletes the entries after the commit.
//!
//! Several pollers wait at the queue at once. One loop owns what they bring: it checks the linger's
//! deadline by a timer of its own, never only after a poll (S4.2). An entry is deleted once the outbox has
//! its rows (S4.3). One that comes again after that, because its deletion failed or a crash came between,
//! is recognised by the outbox, which has stored its id with its rows, and then deleted.

mod held;

use std::{sync::Arc, time::Duration};

use actix::prelude::*;
use postrider_settings::FeedQueue;
use tokio::{
    sync::{Mutex, mpsc, watch},
    task::{JoinError, JoinSet},
};

use crate::{
    flow::{Bells, HeldFeeds, Progress, blocking, delete_entries, insist},
    metrics::{FeedMetrics, StoredRows},
    model::{
        batch::RowLayout,
        builder::BatchLimits,
        conditions::Conditions,
        file::{FileRecord, FileState},
        formats::entry::EntryParser,
        ids::{FileId, hex},
        intake::{
            Accumulator, AckId, Entry, IntakeStep, QueueFile, StepLimits, content_digest, files, steps,
        },
        priority::Priority,
        time::MonoMs,
    },
    ports::{Append, Appended, Clock, EntryId, Intake, IntakeEntry, Ledger, Outbox, StoreError},
    reading::FeedDestination,
    supervision::{ChildId, Drain, Fault, Stage},
};
use held::HeldEntries;

/// Entries asked for at once: what SQS gives at most.
const RECEIVE_MAX: usize = 10;

/// How often the loop gives a sign of life, and a poller that waits for room looks again at most.
const TICK: Duration = Duration::from_millis(500);

/// How long a backlog that was read counts: pollers ask one after the other, the store is asked once.
const DEPTH_FRESH: Duration = Duration::from_millis(100);

/// How long a poll may continue when a drain begins: what it brings would be invisible for a while otherwise.
const LAST_POLL: Duration = Duration::from_secs(1);

/// How long an append may take while draining, before its entries are given back.
const LAST_APPEND: Duration = Duration::from_secs(5);

/// A queue that answers an empty poll at once must not be asked in a busy loop.
const EMPTY_PAUSE: Duration = Duration::from_millis(20);

/// Concurrent deletions at most; appends wait for one to end.
const DELETIONS_MAX: usize = 8;

/// A queue feed's settings.
#[derive(Clone, Debug)]
pub struct QueueFeedSettings {
    /// Its name.
    pub name: Arc<str>,
    /// The top-level key that holds the recipient.
    pub recipient: String,
    /// The longest object, in bytes.
    pub max_row_bytes: usize,
    /// The most rows of one entry.
    pub max_entry_rows: usize,
    /// Where every accepted row goes.
    pub destinations: Vec<FeedDestination>,
    /// When messages may go.
    pub conditions: Conditions,
    /// How urgent its messages are.
    pub priority: Priority,
    /// The limits of a batch.
    pub batch: BatchLimits,
    /// `[feeds.NAME]`, what a queue has: when enough is accumulated.
    pub queue: FeedQueue,
    /// Polls at once; at least 1.
    pub pollers: usize,
    /// How long a poll waits for an entry.
    pub wait: Duration,
    /// `[outbox]`: when polling pauses.
    pub backlog: postrider_settings::Outbox,
}

/// What a queue feed works with.
#[derive(Clone)]
pub struct QueueFeedSetup {
    /// Its settings.
    pub feed: Arc<QueueFeedSettings>,
    /// The queue.
    pub intake: Arc<dyn Intake>,
    /// Where rows go.
    pub outbox: Arc<dyn Outbox>,
    /// Where the first rows of a file went.
    pub ledger: Arc<dyn Ledger>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// To ring when batches were appended.
    pub appended: Bells,
    /// What is counted.
    pub metrics: FeedMetrics,
    /// Which feeds wait for room.
    pub held: HeldFeeds,
    /// Sign of life.
    pub progress: Progress,
}

/// The actor.
pub struct QueueFeed {
    setup: QueueFeedSetup,
    fault: Fault,
    drain: watch::Sender<bool>,
}

impl Stage for QueueFeed {
    const NAME: &'static str = "queue_feed";

    type Setup = QueueFeedSetup;

    fn new(setup: QueueFeedSetup, _: &ChildId, fault: Fault) -> Self {
        Self { setup, fault, drain: watch::Sender::new(false) }
    }
}

impl Actor for QueueFeed {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        let feed = FeedState::new(self.setup.clone(), self.drain.subscribe());
        context.spawn(feed.run().into_actor(self).map(|end, this, context| match end {
            Ok(()) => context.stop(),
            Err(error) => this.fault.fail(context, error),
        }));
    }
}

impl Handler<Drain> for QueueFeed {
    type Result = ();

    fn handle(&mut self, _: Drain, _: &mut Self::Context) {
        self.drain.send_replace(true);
    }
}

/// Whether polling is allowed, and since when that is known.
struct PollGate {
    looked: Option<MonoMs>,
    is_open: bool,
}

/// What a feed's loop and its tasks share.
#[derive(Clone)]
struct FeedState {
    setup: QueueFeedSetup,
    draining: watch::Receiver<bool>,
    gate: Arc<Mutex<PollGate>>,
    held: HeldEntries,
}

impl FeedState {
    fn new(setup: QueueFeedSetup, draining: watch::Receiver<bool>) -> Self {
        Self {
            setup,
            draining,
            gate: Arc::new(Mutex::new(PollGate { looked: None, is_open: true })),
            held: HeldEntries::default(),
        }
    }

    async fn run(self) -> Result<(), StoreError> {
        tokio::select! {
            end = self.take() => end,
            error = self.keep_visible() => Err(error),
        }
    }

    /// The loop: the only owner of what was received.
    async fn take(&self) -> Result<(), StoreError> {
        let feed = &self.setup.feed;
        // Pollers wait while an append lasts: what they hold then is one receive each, and one in here.
        let (sender, mut received) = mpsc::channel(1);
        let mut pollers = JoinSet::new();
        for _ in 0..feed.pollers.max(1) {
            pollers.spawn(self.clone().poll(sender.clone()));
        }
        drop(sender);
        let mut deletions = JoinSet::new();
        let minutes_max = self.setup.outbox.append_limits().entry_minutes;
        let mut accumulator = Accumulator::new(feed.queue.clone(), minutes_max);
        let mut is_polling = true;
        let mut draining = self.draining.clone();
        loop {
            failpoint!("panic.queue_feed");
            let now = self.setup.clock.mono();
            if accumulator.is_due(now) || (!is_polling && !accumulator.is_empty()) {
                while deletions.len() >= DELETIONS_MAX {
                    deletions.join_next().await.map_or(Ok(()), joined)?;
                }
                let done = self.store(accumulator.take()).await?;
                deletions.spawn(self.clone().delete(done));
                continue;
            }
            if !is_polling && deletions.is_empty() {
                while let Some(ended) = pollers.join_next().await {
                    joined(ended)??;
                }
                return Ok(());
            }
            let wait = accumulator.deadline().map_or(TICK, |deadline| deadline.since(now).min(TICK));
            let is_draining = *draining.borrow();
            tokio::select! {
                entries = received.recv(), if is_polling => match entries {
                    Some(entries) => self.accumulate(&mut accumulator, entries),
                    None => is_polling = false,
                },
                Some(ended) = pollers.join_next() => joined(ended)??,
                Some(ended) = deletions.join_next() => joined(ended)?,
                _ = draining.changed(), if !is_draining => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn accumulate(&self, accumulator: &mut Accumulator, entries: Vec<Entry>) {
        for entry in entries {
            if let Some(earlier) = accumulator.push(entry) {
                tracing::debug!(feed = %self.setup.feed.name, "an entry was delivered again while it waited");
                self.held.forget(&[earlier]);
            }
        }
    }

    /// Polls until the feed drains.
    async fn poll(self, to: mpsc::Sender<Vec<Entry>>) -> Result<(), StoreError> {
        let Self { setup, .. } = &self;
        loop {
            self.wait_for_room().await?;
            if self.is_draining() {
                return Ok(());
            }
            let receive = || setup.intake.receive(RECEIVE_MAX, setup.feed.wait);
            let received = tokio::select! {
                received = insist("receiving from the queue", &*setup.clock, &setup.progress, receive) => received?,
                () = self.drained_for(LAST_POLL) => return Ok(()),
            };
            if received.is_empty() {
                tokio::time::sleep(EMPTY_PAUSE).await;
                continue;
            }
            let now = setup.clock.mono();
            self.held.hold(received.iter().map(|entry| entry.ack.clone()), now);
            let entries = self.read(received, now).await?;
            if to.send(entries).await.is_err() {
                return Ok(()); // the loop is gone
            }
        }
    }

    async fn read(&self, received: Vec<IntakeEntry>, now: MonoMs) -> Result<Vec<Entry>, StoreError> {
        let feed = self.setup.feed.clone();
        let work = move || {
            let mut parser =
                EntryParser::new(feed.recipient.clone(), feed.max_row_bytes, feed.max_entry_rows);
            let read = |entry: IntakeEntry| {
                Entry::read(entry.id, entry.ack, &entry.body, &mut parser, now)
                    .delivered(entry.sent_at, entry.receives)
            };
            Ok(received.into_iter().map(read).collect())
        };
        blocking(work).await.map_err(|error: std::io::Error| StoreError::Retryable(error.to_string()))
    }

    fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// Waits until the feed has been draining for `time`.
    async fn drained_for(&self, time: Duration) {
        // An actor that is gone without a drain aborts its tasks.
        let _ = self.draining.clone().wait_for(|draining| *draining).await;
        tokio::time::sleep(time).await;
    }

    /// Polling pauses while the destinations hold too much: the queue is its own buffer. An unknown backlog is waited for: the gate fails closed.
    async fn wait_for_room(&self) -> Result<(), StoreError> {
        let Self { setup, .. } = self;
        let mut gate = self.gate.lock().await;
        while !self.is_draining() {
            let now = setup.clock.mono();
            if gate.looked.is_none_or(|looked| now.since(looked) >= DEPTH_FRESH) {
                let open = || setup.outbox.open_messages();
                let open = insist("reading the backlog", &*setup.clock, &setup.progress, open);
                let open = tokio::select! {
                    open = open => open?,
                    () = self.drained_for(Duration::ZERO) => return Ok(()),
                };
                let feed = &setup.feed;
                let destinations = feed.destinations.iter().map(|destination| &*destination.name);
                let is_open = setup.held.allows(&feed.name, destinations, &feed.backlog, &open);
                *gate = PollGate { looked: Some(setup.clock.mono()), is_open };
            }
            if gate.is_open {
                return Ok(());
            }
            tokio::time::sleep(TICK).await;
        }
        Ok(())
    }

    /// Stores entries' rows; the deliveries that are done with, to be deleted.
    async fn store(&self, entries: Vec<Entry>) -> Result<Vec<AckId>, StoreError> {
        let Self { setup, .. } = self;
        let limits = self.step_limits();
        let acks: Vec<_> = entries.iter().map(|entry| entry.ack.clone()).collect();
        let (entries, mut done) = tokio::select! {
            known = self.without_known(entries) => known?,
            () = self.drained_for(LAST_APPEND) => {
                self.give_back(&acks).await;
                return Ok(Vec::new());
            }
        };
        let mut left = files(entries, setup.feed.batch, limits);
        while let Some(file) = left.pop() {
            let acks: Vec<_> = file.entries.iter().map(|entry| entry.ack.clone()).collect();
            let appended = tokio::select! {
                appended = self.append_file(&file) => appended?,
                () = self.drained_for(LAST_APPEND) => {
                    self.give_back(&acks).await;
                    continue;
                }
            };
            match appended {
                FileAppended::Stored => {
                    setup.appended.ring();
                    done.extend(acks);
                }
                FileAppended::Left(why) => {
                    tracing::error!(feed = %setup.feed.name, entries = acks.len(), "entries stay in the queue: {why}");
                    self.held.forget(&acks);
                }
                FileAppended::Known(known) => {
                    self.tell_known(known.len());
                    let is_known = |entry: &Entry| known.iter().any(|id| id.id == entry.id);
                    let (known, rest): (Vec<_>, Vec<_>) = file.entries.into_iter().partition(is_known);
                    if known.is_empty() {
                        return Err(StoreError::Permanent(
                            "it knows entries that were not in the step".into(),
                        ));
                    }
                    done.extend(known.into_iter().map(|entry| entry.ack));
                    left.extend(files(rest, setup.feed.batch, limits));
                }
            }
        }
        Ok(done)
    }

    /// Leaves out those that come again and were stored before; also returns the deliveries of these. (The
    /// append would recognise them too, but a file of the same entries counts as a repetition.)
    async fn without_known(&self, entries: Vec<Entry>) -> Result<(Vec<Entry>, Vec<AckId>), StoreError> {
        let again = entries.iter().filter(|entry| entry.receives != 1);
        let again: Vec<_> = again.map(|entry| self.entry_id(entry)).collect();
        if again.is_empty() {
            return Ok((entries, Vec::new()));
        }
        let known = || self.setup.outbox.known_entries(&again);
        let known = self.insist("looking for entries", known).await?;
        self.tell_known(known.len());
        let (known, rest): (Vec<_>, Vec<_>) =
            entries.into_iter().partition(|entry| known.iter().any(|id| id.id == entry.id));
        Ok((rest, known.into_iter().map(|entry| entry.ack).collect()))
    }

    fn entry_id(&self, entry: &Entry) -> EntryId {
        EntryId { feed: self.setup.feed.name.clone(), id: entry.id.clone(), sent_at: entry.sent_at }
    }

    fn tell_known(&self, entries: usize) {
        if entries > 0 {
            tracing::info!(feed = %self.setup.feed.name, entries,
                "entries were delivered again after they were stored; they are deleted");
        }
    }

    /// If they are stored after all, they are known when they come again.
    async fn give_back(&self, acks: &[AckId]) {
        tracing::warn!(feed = %self.setup.feed.name, entries = acks.len(),
            "the outbox does not answer while draining; returning entries to the queue");
        let _ = self.setup.intake.release(acks).await; // they come again in any case
        self.held.forget(acks);
    }

    fn step_limits(&self) -> StepLimits {
        let limits = self.setup.outbox.append_limits();
        let copies = self.setup.feed.destinations.len().max(1);
        StepLimits { cuts: (limits.batches / copies).max(1), bytes: limits.bytes / copies }
    }

    async fn insist<T, F>(&self, what: &'static str, operation: impl FnMut() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        insist(what, &*self.setup.clock, &self.setup.progress, operation).await
    }

    async fn append_file(&self, file: &QueueFile) -> Result<FileAppended, StoreError> {
        let Self { setup: QueueFeedSetup { feed, outbox, ledger, clock, .. }, .. } = self;
        let digest = content_digest(&file.entries);
        let id = FileId::derive(&feed.name, &digest);
        let claimed_at = clock.wall();
        let mut record = FileRecord {
            id,
            feed: feed.name.to_string(),
            name: format!("queue-{}", file.entries.first().map_or("", |entry| &entry.id)),
            bytes: file.entries.iter().map(|entry| entry.body_bytes).sum(),
            sha256: hex(&digest),
            claimed_at,
            destinations: feed.destinations.iter().map(|destination| destination.name.to_string()).collect(),
            terms: feed.conditions.of_file(claimed_at),
            priority: feed.priority,
        };
        if file.steps.len() <= 1 {
            return self.append_steps(&file.entries, record, &file.steps).await;
        }
        // Its first steps may be stored: go on behind them, to where they went (I1).
        let found = self.insist("looking for the file", || outbox.find_file(id)).await?;
        let resume = found.map(|(_, checkpoint)| checkpoint);
        if resume.is_some() {
            let report = self.insist("reading the ledger", || ledger.report(id)).await?;
            if let Some(report) = report {
                (record.destinations, record.terms) = (report.file.destinations, report.file.terms);
                record.priority = report.file.priority;
            }
        }
        let gone = |name: &&String| !feed.destinations.iter().any(|known| *known.name == ***name);
        if let Some(name) = record.destinations.iter().find(gone) {
            return Ok(FileAppended::Left(format!(
                "file {id}: its first rows went to destination {name}, which the feed no longer has; add it to \
                 feeds.{}.destinations",
                feed.name
            )));
        }
        let rest = steps(&file.entries, resume.unwrap_or_default(), feed.batch, self.step_limits());
        self.append_steps(&file.entries, record, &rest).await
    }

    /// Appends steps, the last one with the entries.
    async fn append_steps(
        &self,
        entries: &[Entry],
        record: FileRecord,
        steps: &[IntakeStep],
    ) -> Result<FileAppended, StoreError> {
        let Self { setup: QueueFeedSetup { feed, outbox, clock, metrics, .. }, .. } = self;
        let headers: Vec<_> = feed
            .destinations
            .iter()
            .filter(|destination| record.destinations.iter().any(|name| **name == *destination.name))
            .map(|destination| destination.header(&record, &RowLayout::Objects))
            .collect();
        let record = Arc::new(record);
        for (step, left) in steps.iter().zip((0..steps.len()).rev()) {
            let at = clock.wall();
            let batches = step.cuts.iter();
            let batches = batches.flat_map(|cut| headers.iter().map(|header| cut.batch(header.clone(), at)));
            let ids = entries.iter().map(|entry| self.entry_id(entry));
            let append = Append {
                file: record.clone(),
                batches: batches.collect(),
                rejects: step.rejects.clone(),
                duplicates: Vec::new(),
                checkpoint: step.checkpoint,
                state: if left == 0 { FileState::Ingested } else { FileState::Ingesting },
                hold: None,
                at,
                entries: if left == 0 { ids.collect() } else { Vec::new() },
            };
            failpoint!("intake.append.before");
            let appended = self.insist("appending to the outbox", || outbox.append(append.clone())).await?;
            failpoint!("intake.append.after");
            if let Appended::Known(known) = appended {
                return Ok(FileAppended::Known(known));
            }
            metrics.appended(StoredRows {
                accepted: step.cuts.iter().map(|cut| u64::from(cut.count)).sum(),
                rejected: step.rejects.len() as u64,
                duplicates: 0,
            });
        }
        metrics.closed(&FileState::Ingested, self.setup.clock.wall());
        Ok(FileAppended::Stored)
    }

    /// Deletes entries, a few times over; those that can't be deleted come again and are known then.
    async fn delete(self, acks: Vec<AckId>) {
        if let Err((entries, error)) = delete_entries(&*self.setup.intake, &acks).await {
            tracing::warn!(feed = %self.setup.feed.name, entries, error,
                "entries are stored but can't be deleted; they are deleted when they come again");
        }
        self.held.forget(&acks);
    }

    /// Extends the entries for as long as they are held.
    async fn keep_visible(&self) -> StoreError {
        let Self { setup: QueueFeedSetup { intake, clock, .. }, .. } = self;
        let half = intake.visibility() / 2;
        loop {
            tokio::time::sleep((half / 4).clamp(Duration::from_millis(10), Duration::from_secs(5))).await;
            let due = self.held.older_than(half, clock.mono());
            if due.is_empty() {
                continue;
            }
            let now = clock.mono();
            match intake.extend(&due).await {
                Ok(outcomes) => self.held.extended(&due, &outcomes, now),
                Err(error @ StoreError::Permanent(_)) => return error,
                Err(error) => tracing::warn!(feed = %self.setup.feed.name, %error,
                    "held entries can't be extended; they may be delivered twice"),
            }
        }
    }
}

/// What became of a queue file.
enum FileAppended {
    /// It is stored, its entries can be deleted.
    Stored,
    /// Nothing is stored: these entries were before.
    Known(Vec<EntryId>),
    /// It can't be stored now: its entries stay in the queue.
    Left(String),
}

/// A task's panic is the feed's own.
fn joined<T>(ended: Result<T, JoinError>) -> Result<T, StoreError> {
    ended.map_err(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(cancelled) => StoreError::Retryable(cancelled.to_string()),
    })
}

#[cfg(all(test, feature = "testing"))]
mod tests;
