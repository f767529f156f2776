//! Sweeper: takes lost leases back, ends what operators cancelled and what is never sent because its time is over, writes the
//! final reports of settled files and archives what is old.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use actix::prelude::*;

use crate::{
    flow::{Bells, FeedNotes, Progress, blocking, insist},
    metrics::StageMetrics,
    model::{
        backoff::Backoff,
        file::{DeadBy, DestinationCounts, FileReport},
        ids::FileId,
        time::{MonoMs, UnixMs},
    },
    ports::{Archive, Clock, Ended, Inbox, Ledger, Queue, Steering, StoreError},
    supervision::{ChildId, Drain, Fault, Stage},
};

/// How often it sweeps.
const TICK: Duration = Duration::from_millis(500);

/// Reports written in one go.
const REPORTS_MAX: usize = 256;

/// Reports of one feed that could not be written and are remembered as such.
const UNWRITTEN_MAX: usize = 4_096;

/// Between two tries of a report that can't be written.
const REPORT_BACKOFF: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(10));

/// Batches archived in one go: twice a second, this keeps up with 250,000 messages per second in batches of
/// 500, and keeps the embedded store's writer for some milliseconds.
const ARCHIVED_MAX: usize = 256;

/// Batches ended in one go: what the store's other callers wait for.
const ENDED_MAX: usize = 100;

/// Entries of inbound queues forgotten in one go.
const FORGOTTEN_MAX: usize = 10_000;

/// How long the taken entries of inbound queues are known. SQS keeps a message for 14 days at most
/// (`MessageRetentionPeriod`), so none can come again after that.
const ENTRY_RETENTION: Duration = Duration::from_hours(15 * 24);

/// The wait after archiving has failed: it is never urgent.
const ARCHIVE_PAUSE: Duration = Duration::from_mins(1);

/// What a sweeper works with.
#[derive(Clone)]
pub struct SweeperSetup {
    /// Whose leases are looked after.
    pub queue: Arc<dyn Queue>,
    /// Which files are settled.
    pub ledger: Arc<dyn Ledger>,
    /// Which are cancelled, or have had their time.
    pub steering: Arc<dyn Steering>,
    /// Where each feed's reports go, and where it is said that they can't.
    pub inboxes: Vec<(FeedNotes, Arc<dyn Inbox>)>,
    /// Feeds without a directory: their reports stay in the ledger, and settled files are only marked.
    pub queue_feeds: Vec<Arc<str>>,
    /// The store whose settled batches are archived, and how long they are kept after they were accepted
    /// (`outbox.retention`); zero: for ever.
    pub archive: Option<(Arc<dyn Archive>, Duration)>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// To ring when leases were taken back.
    pub queued: Bells,
    /// Counts leases that were taken back, and messages that are ended.
    pub metrics: StageMetrics,
    /// Hears of every dropped file that is settled, once its report is written.
    pub on_settled: SettledHook,
    /// Sign of life.
    pub progress: Progress,
}

/// See [`SweeperSetup::on_settled`]. It must not wait.
pub type SettledHook = Arc<dyn Fn(SettledFile) + Send + Sync>;

/// The actor.
pub struct Sweeper {
    setup: SweeperSetup,
    fault: Fault,
}

impl Stage for Sweeper {
    const NAME: &'static str = "sweeper";

    type Setup = SweeperSetup;

    fn new(setup: SweeperSetup, _: &ChildId, fault: Fault) -> Self {
        Self { setup, fault }
    }
}

impl Actor for Sweeper {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.spawn(self.setup.clone().run().into_actor(self).map(|error, this, context| {
            this.fault.fail(context, error);
        }));
    }
}

impl Handler<Drain> for Sweeper {
    type Result = ();

    fn handle(&mut self, _: Drain, context: &mut Self::Context) {
        // The last messages may have settled while the others drained.
        let setup = self.setup.clone();
        let last = async move { setup.write_reports(&mut Unwritten::default()).await };
        context.spawn(last.into_actor(self).map(|swept, _, context| {
            if let Err(error) = swept {
                tracing::warn!(%error, "final reports could not be written; the next start writes them");
            }
            context.stop();
        }));
    }
}

/// Reports that could not be written, and when they are tried again. One that is in somebody's way holds up no other.
#[derive(Default)]
struct Unwritten(HashMap<FileId, UnwrittenReport>);

struct UnwrittenReport {
    feed: Arc<str>,
    name: String,
    reason: String,
    failures: u32,
    until: MonoMs,
}

impl Unwritten {
    fn of(&self, feed: &str) -> impl Iterator<Item = &UnwrittenReport> {
        self.0.values().filter(move |report| *report.feed == *feed)
    }

    fn is_due(&self, file: FileId, now: MonoMs) -> bool {
        self.0.get(&file).is_none_or(|report| report.until <= now)
    }

    /// Whether that is news.
    fn add(&mut self, feed: &Arc<str>, file: FileId, name: String, reason: String, now: MonoMs) -> bool {
        if self.0.len() >= UNWRITTEN_MAX && !self.0.contains_key(&file) {
            return false; // it is tried again at once
        }
        let new =
            || UnwrittenReport { feed: feed.clone(), name, reason: String::new(), failures: 0, until: now };
        let report = self.0.entry(file).or_insert_with(new);
        report.reason = reason;
        report.failures = report.failures.saturating_add(1);
        report.until = now.after(REPORT_BACKOFF.bound(report.failures));
        report.failures == 1
    }
}

/// What is said of a file when its last message has its final state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettledFile {
    /// The feed it was dropped into.
    pub feed: String,
    /// Its name there.
    pub name: String,
    /// Its id.
    pub file: FileId,
    /// When its last message got its final state.
    pub at: UnixMs,
    /// Why it could not be used, or not to its end, without what it quotes from the file (I10).
    pub failed: Option<String>,
    /// Rows read.
    pub rows: u64,
    /// Rows refused.
    pub rejected: u64,
    /// Rows left out as duplicates.
    pub duplicates: u64,
    /// Over all destinations.
    pub counts: DestinationCounts,
    /// Whether its rows and their states add up.
    pub is_balanced: bool,
    /// From when it was claimed until then.
    pub took: Duration,
}

impl SettledFile {
    /// What this report says.
    pub fn of(report: &FileReport) -> Self {
        let at = report.settled_at.unwrap_or_default();
        Self {
            feed: report.file.feed.clone(),
            name: report.file.name.clone(),
            file: report.file.id,
            at,
            failed: report.state.reason_to_log().map(str::to_owned),
            rows: report.rows,
            rejected: report.rejected,
            duplicates: report.duplicates,
            counts: report.destinations.values().sum(),
            is_balanced: report.is_balanced(),
            took: at.since(report.file.claimed_at),
        }
    }

    fn say(&self) {
        let Self { feed, name, file, rows, rejected, duplicates, .. } = self;
        let DestinationCounts { sent, dead, unsent, cancelled, .. } = self.counts;
        let took_ms = self.took.as_millis() as u64;
        let reason = self.failed.as_deref();
        tracing::info!(%feed, %name, %file, reason, rows, sent, dead, unsent, cancelled, rejected, duplicates, took_ms,
            "the file is settled: every message has its final state");
        if !self.is_balanced {
            tracing::error!(%feed, %name, %file, "its rows and their states do not add up");
        }
    }
}

impl SweeperSetup {
    async fn run(self) -> StoreError {
        let mut unwritten = Unwritten::default();
        let mut archive_from = MonoMs(0);
        loop {
            failpoint!("panic.sweeper");
            if let Err(error) = self.sweep(&mut unwritten).await {
                return error;
            }
            if self.clock.mono() >= archive_from
                && let Err(error) = self.archive_old().await
            {
                tracing::warn!(%error, "archiving failed; retrying in a minute");
                archive_from = self.clock.mono().after(ARCHIVE_PAUSE);
            }
            tokio::time::sleep(TICK).await;
        }
    }

    async fn sweep(&self, unwritten: &mut Unwritten) -> Result<(), StoreError> {
        let Self { queue, clock, progress, .. } = self;
        let rescue = || queue.rescue(clock.mono());
        let rescued = insist("taking leases back", &**clock, progress, rescue).await?;
        if rescued > 0 {
            self.metrics.leases_lost().inc_by(rescued as u64);
            tracing::warn!(batches = rescued, "leases expired; their batches go to other workers");
            self.queued.ring();
        }
        self.end().await?;
        self.write_reports(unwritten).await
    }

    /// Ends what is open of files that are cancelled or have had their time, in steps that others wait little for.
    async fn end(&self) -> Result<(), StoreError> {
        let Self { steering, clock, progress, .. } = self;
        let step = || steering.end_step(ENDED_MAX, clock.wall());
        loop {
            let Ended { batches, counts } = insist("ending messages", &**clock, progress, step).await?;
            for (destination, counts) in counts {
                self.metrics.ended(&destination, counts);
            }
            if batches < ENDED_MAX {
                return Ok(());
            }
        }
    }

    /// One bounded step of archiving.
    async fn archive_old(&self) -> Result<(), StoreError> {
        let Some((archive, retention)) = &self.archive else { return Ok(()) };
        let now = self.clock.wall();
        let ago = |age: Duration| UnixMs(now.0.saturating_sub(UnixMs(0).after(age).0));
        if !retention.is_zero() {
            archive.archive(ago(*retention), ARCHIVED_MAX).await?;
        }
        archive.forget_entries(ago(ENTRY_RETENTION), FORGOTTEN_MAX).await?;
        Ok(())
    }

    /// Adds to the report of a settled file why messages are dead.
    async fn explain(&self, report: &mut FileReport) -> Result<(), StoreError> {
        let Self { steering, clock, progress, .. } = self;
        let id = report.file.id;
        for (destination, _) in report.destinations.iter().filter(|(_, counts)| counts.dead > 0) {
            let trial = || steering.trial(id, destination, u64::MAX);
            let trial = insist("looking for why messages are dead", &**clock, progress, trial).await?;
            let by = |((reason, status), messages)| DeadBy { reason, status, messages };
            let mut dead: Vec<_> = trial.dead.into_iter().map(by).collect();
            dead.sort_by_key(|by| Reverse(by.messages));
            report.failures.insert(destination.clone(), dead);
        }
        Ok(())
    }

    async fn write_reports(&self, unwritten: &mut Unwritten) -> Result<(), StoreError> {
        let Self { ledger, clock, progress, .. } = self;
        for (notes, inbox) in &self.inboxes {
            let feed = notes.feed();
            // Behind those that can't be written there are others.
            let limit = REPORTS_MAX + unwritten.of(feed).count();
            let settled = || ledger.settled_files(feed, limit);
            let mut reports = insist("looking for settled files", &**clock, progress, settled).await?;
            reports.retain(|report| unwritten.is_due(report.file.id, clock.mono()));
            if reports.is_empty() {
                continue;
            }
            for report in &mut reports {
                self.explain(report).await?;
            }
            let mut settled: HashMap<_, _> =
                reports.iter().map(|report| (report.file.id, SettledFile::of(report))).collect();
            let work = inbox.clone();
            let rewrite = move || Ok::<_, std::io::Error>(work.rewrite_reports(&reports));
            // It fails only where the process ends: then no report is known to be written.
            let Ok(failed) = blocking(rewrite).await else { return Ok(()) };
            let not_written: HashSet<_> = failed.iter().map(|(file, _)| *file).collect();
            let written: Vec<_> =
                settled.keys().copied().filter(|file| !not_written.contains(file)).collect();
            if !written.is_empty() {
                failpoint!("report.before_mark");
                let mark = || ledger.mark_reported(&written);
                insist("marking reports", &**clock, progress, mark).await?;
                for file in written.iter().filter_map(|file| settled.remove(file)) {
                    file.say();
                    if !file.is_balanced {
                        self.metrics.feed(feed).off_balance();
                    }
                    (self.on_settled)(file);
                }
            }
            let recovered = written.iter().filter(|file| unwritten.0.remove(file).is_some()).count();
            // They can be written as long as the mark is not set.
            let (count, now) = (failed.len(), clock.mono());
            for (file, error) in failed {
                let name = settled.get(&file).map(|settled| settled.name.clone()).unwrap_or_default();
                let reason = format!("its report can't be written: {error}");
                if unwritten.add(feed, file, name, reason, now) {
                    tracing::warn!(%feed, %file, %error, "a final report can't be written; it is tried again");
                }
            }
            if count + recovered > 0 {
                notes.hold(unwritten.of(feed).map(|report| (report.name.clone(), report.reason.clone())));
            }
        }
        for feed in &self.queue_feeds {
            let settled = || ledger.settled_files(feed, REPORTS_MAX);
            let reports = insist("looking for settled files", &**clock, progress, settled).await?;
            let ids: Vec<_> = reports.iter().map(|report| report.file.id).collect();
            if !ids.is_empty() {
                let mark = || ledger.mark_reported(&ids);
                insist("marking reports", &**clock, progress, mark).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        flow::{Bells, ProgressBoard},
        model::outcome::Verdict,
        ports::{Append, EntryId, Fetched, LeaseRequest, Outbox, OutboxPages, Settlement, Want},
        testing::{FakeClock, MemoryStore, fixtures},
    };

    const NOW: UnixMs = UnixMs(1_700_000_000_000);

    fn step() -> Append {
        let file = fixtures::file("feed", 1, &["d"]);
        let mut step = fixtures::step(&file, 1..=2, NOW);
        step.entries = vec![EntryId { feed: "feed".into(), id: "a".into(), sent_at: NOW }];
        step
    }

    fn setup(store: &Arc<MemoryStore>, clock: &Arc<FakeClock>, retention: Duration) -> SweeperSetup {
        SweeperSetup {
            queue: store.clone(),
            ledger: store.clone(),
            steering: store.clone(),
            inboxes: Vec::new(),
            queue_feeds: vec!["feed".into()],
            archive: Some((store.clone(), retention)),
            clock: clock.clone(),
            queued: Bells::default(),
            metrics: StageMetrics::default(),
            on_settled: Arc::new(|_| {}),
            progress: ProgressBoard::default().mark("sweeper"),
        }
    }

    /// Whether the only batch, which was sent at `NOW`, and its entry are kept after `age`.
    async fn kept_after(retention: Duration, age: Duration) -> (bool, bool) {
        let store = Arc::new(MemoryStore::new());
        let clock = Arc::new(FakeClock::at(NOW));
        let id = step().batches[0].id;
        store.append(step()).await.unwrap();
        let wants = vec![Want::new("d", 9, 1)];
        let request =
            LeaseRequest { holder: "w".into(), wants, until: MonoMs(1_000), now: NOW, born: UnixMs(0) };
        let lease = store.lease(request).await.unwrap().pop().unwrap();
        let sent = Verdict::Sent { at: NOW, status: 200 };
        let settlement = Settlement {
            token: lease.token,
            verdicts: lease.open.iter().map(|open| open.verdict(sent)).collect(),
            details: BTreeMap::new(),
            records: Vec::new(),
            ends: true,
            begins: None,
        };
        store.settle(vec![settlement]).await.unwrap();
        let setup = setup(&store, &clock, retention);
        clock.advance(age);
        setup.archive_old().await.unwrap();
        let fetched = store.get(&[id]).await.unwrap().pop().unwrap().1;
        let known = store.known_entries(&step().entries).await.unwrap();
        (fetched != Fetched::Missing, !known.is_empty())
    }

    #[tokio::test]
    async fn settled_files_of_queue_feeds_are_marked_so_that_they_do_not_pile_up() {
        let store = Arc::new(MemoryStore::new());
        let file = fixtures::file("feed", 2, &["d"]);
        let mut append = fixtures::step_without(&file, 1..=2, &[1, 2], &[], NOW);
        append.state = crate::model::file::FileState::Ingested;
        store.append(append).await.unwrap();
        assert_eq!(store.settled_files("feed", 9).await.unwrap().len(), 1);
        let clock = Arc::new(FakeClock::at(NOW));
        setup(&store, &clock, Duration::ZERO).write_reports(&mut Unwritten::default()).await.unwrap();
        assert_eq!(store.settled_files("feed", 9).await.unwrap().len(), 0);
    }

    #[tokio::test]
    async fn what_is_done_goes_after_its_retention_and_entries_after_fifteen_days() {
        let day = Duration::from_hours(24);
        assert_eq!(kept_after(day, day).await, (true, true));
        assert_eq!(kept_after(day, day + Duration::from_secs(1)).await, (false, true));
        assert_eq!(kept_after(Duration::ZERO, 15 * day).await, (true, true));
        assert_eq!(kept_after(Duration::ZERO, 16 * day).await, (true, false));
        assert_eq!(kept_after(Duration::MAX, 16 * day).await, (true, false));
    }
}
