//! `FileWatcher`: claims the files of one feed when they are complete, and moves them away when they are
//! closed. A directory event sets a flag; the loop acts at its own pace, as parsers become free: files
//! wait in the directory, where they are safe.

use std::{
    collections::{HashSet, VecDeque},
    ffi::OsString,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use actix::prelude::*;
use postrider_settings::Directory;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    flow::{Bell, Slot, Slots, back_off, blocking},
    messages::{FileClaimed, FileClosed},
    model::{
        backoff::Backoff,
        stable::{Sighting, StableFiles},
        time::MonoMs,
    },
    ports::{ClaimError, ClaimedFile, Clock, Inbox, Ledger, StoreError},
    reading::FileInProgress,
    supervision::{ChildId, Drain, Fault, Stage},
};

/// Files in progress of one feed: claimed and not yet moved away. Small files spend most of their time
/// waiting for a sync that they share, so there are more of them than parsers.
pub const FILES_IN_PROGRESS_MAX: usize = 64;

/// Names looked at in one scan.
const SCAN_MAX: usize = 10_000;

/// Names remembered that are not complete yet.
const NAMES_MAX: usize = 20_000;

/// Names whose refusal was logged; beyond that the set is cleared.
const REFUSALS_MAX: usize = 1_000;

/// Rejected rows exported in one go.
const REJECTS_MAX: usize = 1_000;

/// Between tries of moving a finished file away.
const FINISH_BACKOFF: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// The longest the watcher sleeps.
const TICK: Duration = Duration::from_secs(1);

/// What a file watcher works with.
#[derive(Clone)]
pub struct FileWatcherSetup {
    /// The feed's name.
    pub feed: Arc<str>,
    /// Its directory.
    pub inbox: Arc<dyn Inbox>,
    /// Where reports come from.
    pub ledger: Arc<dyn Ledger>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// The feed's parsers.
    pub parsers: Vec<Recipient<FileClaimed>>,
    /// `[feeds.NAME]`: when a file is complete, and how often the directory is looked at.
    pub directory: Directory,
}

/// The actor.
pub struct FileWatcher {
    setup: FileWatcherSetup,
    fault: Fault,
    bell: Bell,
    changes: Arc<Mutex<WatchedChanges>>,
    finishing: usize,
    draining: Arc<AtomicBool>,
}

/// What the watch has reported and the loop has not seen yet.
#[derive(Default)]
struct WatchedChanges {
    complete: Vec<OsString>,
    rescan: bool,
}

impl FileWatcher {
    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

impl Stage for FileWatcher {
    const NAME: &'static str = "file_watcher";
    /// Every file in progress may be reported closed at once.
    const MAILBOX: usize = FILES_IN_PROGRESS_MAX + 4;

    type Setup = FileWatcherSetup;

    fn new(setup: FileWatcherSetup, _: &ChildId, fault: Fault) -> Self {
        let bell = Bell::default();
        Self { setup, fault, bell, changes: Arc::default(), finishing: 0, draining: Arc::default() }
    }
}

impl Actor for FileWatcher {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        let watch = WatchLoop {
            feed: self.setup.feed.clone(),
            inbox: self.setup.inbox.clone(),
            rescan: self.setup.directory.rescan,
            changes: self.changes.clone(),
            bell: self.bell.clone(),
        };
        context.spawn(watch.run().into_actor(self));
        let claims = ClaimLoop {
            slots: Slots::new(self.setup.parsers.len(), self.bell.clone()),
            files: Arc::new(Semaphore::new(FILES_IN_PROGRESS_MAX)),
            stable_files: StableFiles::new(&self.setup.directory, NAMES_MAX),
            ready: VecDeque::new(),
            queued: HashSet::new(),
            refusals: HashSet::new(),
            scan_at: MonoMs(0),
            watcher: context.address().recipient(),
            setup: self.setup.clone(),
            bell: self.bell.clone(),
            changes: self.changes.clone(),
            draining: self.draining.clone(),
        };
        context.spawn(claims.run().into_actor(self).map(|error, this, context| {
            this.fault.fail(context, error);
        }));
    }
}

impl Handler<FileClosed> for FileWatcher {
    type Result = ();

    fn handle(&mut self, closed: FileClosed, context: &mut Self::Context) {
        self.finishing += 1;
        let (setup, bell, draining) = (self.setup.clone(), self.bell.clone(), self.draining.clone());
        let work = async move {
            let result = setup.finish(&closed.file, &draining).await;
            drop(closed); // the file's places are free
            bell.ring();
            result
        };
        context.spawn(work.into_actor(self).map(|result, this, context| {
            this.finishing -= 1;
            if let Err(error) = result {
                this.fault.fail(context, error);
            } else if this.is_draining() && this.finishing == 0 {
                context.stop();
            }
        }));
    }
}

impl Handler<Drain> for FileWatcher {
    type Result = ();

    fn handle(&mut self, _: Drain, context: &mut Self::Context) {
        // A claim in flight is found among the claimed files at the next start.
        self.draining.store(true, Ordering::Relaxed);
        if self.finishing == 0 {
            context.stop();
        }
    }
}

/// Listens to the directory.
struct WatchLoop {
    feed: Arc<str>,
    inbox: Arc<dyn Inbox>,
    rescan: Duration,
    changes: Arc<Mutex<WatchedChanges>>,
    bell: Bell,
}

impl WatchLoop {
    async fn run(self) {
        loop {
            match self.inbox.changed().await {
                Ok(change) => {
                    let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
                    changes.rescan |= change.rescan;
                    changes.complete.extend(change.complete);
                    if changes.complete.len() > SCAN_MAX {
                        changes.complete.clear();
                        changes.rescan = true;
                    }
                }
                Err(error) => {
                    tracing::warn!(feed = %self.feed, %error, "the directory can't be watched; it is still scanned");
                    tokio::time::sleep(self.rescan).await;
                }
            }
            self.bell.ring();
        }
    }
}

/// Claims files as parsers become free.
struct ClaimLoop {
    setup: FileWatcherSetup,
    bell: Bell,
    changes: Arc<Mutex<WatchedChanges>>,
    watcher: Recipient<FileClosed>,
    slots: Slots,
    files: Arc<Semaphore>,
    stable_files: StableFiles,
    ready: VecDeque<OsString>,
    queued: HashSet<OsString>,
    refusals: HashSet<OsString>,
    scan_at: MonoMs,
    draining: Arc<AtomicBool>,
}

/// Why a feed can't continue watching: it is restarted.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error("the claimed files can't be listed: {0}")]
    Claimed(io::Error),
    #[error("a parser is gone")]
    ParserGone,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ClaimLoop {
    async fn run(mut self) -> WatchError {
        let inbox = self.setup.inbox.clone();
        let mut leftovers: VecDeque<_> = match blocking(move || inbox.claimed()).await {
            Ok(claimed) => claimed.into(),
            Err(error) => return WatchError::Claimed(error),
        };
        loop {
            failpoint!("panic.file_watcher");
            let now = self.setup.clock.mono();
            self.look(now).await;
            // Places are taken only for a file: giving one back unused rings the bell that is waited for.
            while !self.draining.load(Ordering::Relaxed)
                && leftovers.len() + self.ready.len() > 0
                && let Some((slot, permit)) = self.places()
            {
                let file = match leftovers.pop_front() {
                    Some(leftover) => leftover,
                    None => match self.claim_next().await {
                        Some(claimed) => claimed,
                        None => break,
                    },
                };
                failpoint!("claim.after");
                let parser = &self.setup.parsers[slot.index()];
                let claimed = FileClaimed { file, watcher: self.watcher.clone(), slot, permit };
                if parser.send(claimed).await.is_err() {
                    return WatchError::ParserGone;
                }
            }
            let now = self.setup.clock.mono();
            let due = self.stable_files.next_due().unwrap_or(self.scan_at).min(self.scan_at);
            self.bell.wait(due.since(now).clamp(Duration::from_millis(10), TICK)).await;
        }
    }

    /// A parser's place and a file's place, if both are free.
    fn places(&self) -> Option<(Slot, OwnedSemaphorePermit)> {
        let permit = self.files.clone().try_acquire_owned().ok()?;
        Some((self.slots.take()?, permit))
    }

    /// Takes note of what the watch reported, and scans when it is time.
    async fn look(&mut self, now: MonoMs) {
        let changes = std::mem::take(&mut *self.changes.lock().unwrap_or_else(PoisonError::into_inner));
        let complete = changes.complete.iter().map(OsString::as_os_str);
        let ready = self.stable_files.observe_change(now, complete);
        self.enqueue(ready);
        let due = now >= self.scan_at || self.stable_files.next_due().is_some_and(|due| now >= due);
        if !(due || changes.rescan) || self.ready.len() >= SCAN_MAX {
            return;
        }
        let inbox = self.setup.inbox.clone();
        match blocking(move || inbox.scan(SCAN_MAX)).await {
            Ok(scan) => {
                let sightings = scan.candidates.iter().map(|candidate| Sighting {
                    name: &candidate.name,
                    bytes: candidate.bytes,
                    modified: candidate.modified,
                    has_sidecar: candidate.has_sidecar,
                });
                let wall = self.setup.clock.wall();
                let ready = self.stable_files.observe_scan(now, wall, sightings, scan.truncated);
                self.enqueue(ready);
                for (name, why) in scan.refused {
                    self.refuse(name, &why);
                }
                self.scan_at = if scan.truncated { now } else { now.after(self.setup.directory.rescan) };
            }
            Err(error) => {
                tracing::warn!(feed = %self.setup.feed, %error, "the directory can't be scanned");
                self.scan_at = now.after(self.setup.directory.rescan);
            }
        }
    }

    fn enqueue(&mut self, names: Vec<OsString>) {
        for name in names {
            if self.queued.insert(name.clone()) {
                self.ready.push_back(name);
            }
        }
    }

    fn refuse(&mut self, name: OsString, why: &str) {
        if self.refusals.len() >= REFUSALS_MAX {
            self.refusals.clear();
        }
        if !self.refusals.contains(&name) {
            tracing::warn!(feed = %self.setup.feed, name = %name.display(), why, "a file was refused and stays in place");
            self.refusals.insert(name);
        }
    }

    async fn claim_next(&mut self) -> Option<ClaimedFile> {
        while let Some(name) = self.ready.pop_front() {
            self.queued.remove(&name);
            let (inbox, wall, claimed_name) =
                (self.setup.inbox.clone(), self.setup.clock.wall(), name.clone());
            let now = self.setup.clock.mono();
            match blocking(move || inbox.claim(&claimed_name, wall)).await {
                Ok(file) => {
                    self.stable_files.forget(&name);
                    return Some(file);
                }
                Err(ClaimError::Gone) => self.stable_files.forget(&name),
                Err(ClaimError::Refused(why)) => {
                    if self.stable_files.hold(&name, now) {
                        self.refuse(name, &why);
                    }
                }
                Err(ClaimError::Io(error)) => {
                    if self.stable_files.hold(&name, now) {
                        tracing::warn!(feed = %self.setup.feed, name = %name.display(), %error,
                            "a file can't be claimed; retrying when it changes, and every minute");
                    }
                }
            }
        }
        None
    }
}

impl FileWatcherSetup {
    /// Moves a closed file away. Tried until it works or the watcher drains: then the file stays
    /// among the claimed ones and is moved at the next start.
    async fn finish(&self, file: &FileInProgress, draining: &AtomicBool) -> Result<(), WatchError> {
        let mut failures: u32 = 0;
        loop {
            match self.try_finish(file).await {
                Ok(()) => return Ok(()),
                Err(FinishError::Store(error)) => return Err(error.into()),
                Err(FinishError::Io(error)) => {
                    tracing::warn!(feed = %self.feed, file = %file.record.id, %error,
                        "a finished file could not be moved or reported; retrying");
                }
            }
            if draining.load(Ordering::Relaxed) {
                return Ok(());
            }
            failures = failures.saturating_add(1);
            back_off(FINISH_BACKOFF, failures).await;
        }
    }

    async fn try_finish(&self, file: &FileInProgress) -> Result<(), FinishError> {
        let id = file.record.id;
        let Some(mut report) = self.ledger.report(id).await? else {
            return Err(FinishError::Io(io::Error::other("the ledger does not know the file")));
        };
        // Under the name of this drop: the same bytes may have come before under another.
        report.file.name.clone_from(&file.record.name);
        if report.rejected > 0 {
            let (inbox, claimed, of) = (self.inbox.clone(), file.claimed.clone(), report.clone());
            let mut sink = blocking(move || inbox.rejects(&claimed, &of)).await?;
            let mut after = 0;
            loop {
                let rejects = self.ledger.rejects(id, after, REJECTS_MAX).await?;
                let Some(last) = rejects.last() else { break };
                after = last.row;
                sink = blocking(move || sink.push(&rejects).map(|()| sink)).await?;
            }
            blocking(move || sink.finish()).await?;
        }
        failpoint!("finish.before");
        let (inbox, claimed) = (self.inbox.clone(), file.claimed.clone());
        let (name, state) = (report.file.name.clone(), report.state.clone());
        blocking(move || inbox.finish(&claimed, &report)).await?;
        failpoint!("finish.after");
        tracing::info!(feed = %self.feed, file = %id, name, state = state.as_str(),
            reason = state.reason_to_log(), "file closed");
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum FinishError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}
