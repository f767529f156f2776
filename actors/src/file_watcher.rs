//! `FileWatcher`: claims the files of one feed when they are complete, and moves them away when they are
//! closed. A directory event sets a flag; the loop acts at its own pace, as parsers become free: files
//! wait in the directory, where they are safe.
//!
//! What fails here is the machine's or the dropper's affair, and no restart changes it. A directory that can't be used, or
//! that no file can be taken from, parks the feed: it is tried again with growing waits, and the board says why (F58). A file
//! that can't be taken is held (F28), one that can't be read, moved or reported is set aside; the others go on.

use std::{
    collections::{HashSet, VecDeque},
    ffi::{OsStr, OsString},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use actix::prelude::*;
use postrider_settings::Directory;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    flow::{Bell, FeedNotes, Meter, Owner, Owners, Slot, Slots, blocking},
    messages::{FileClaimed, FileClosed, Inlet, Letter},
    model::{
        backoff::Backoff,
        stable::{Sighting, StableFiles},
        time::MonoMs,
    },
    ports::{ClaimError, ClaimedFile, Clock, Inbox, Ledger, StoreError},
    reading::FileInProgress,
    supervision::{ChildId, Drain, Exit, Fault, Stage},
};

/// Files in progress of one feed: claimed and not yet moved away. Small files spend most of their time
/// waiting for a sync that they share, so there are more of them than parsers.
pub const FILES_IN_PROGRESS_MAX: usize = 64;

/// Names looked at in one scan.
const SCAN_MAX: usize = 10_000;

/// Names remembered that are not complete yet.
const NAMES_MAX: usize = 20_000;

/// Rejected rows exported in one go.
const REJECTS_MAX: usize = 1_000;

/// Between two tries of a feed that is parked. The bound is what an operator who has put things right has to wait.
const PARK_BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));

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
    pub parsers: Vec<Inlet<FileClaimed>>,
    /// `[feeds.NAME]`: when a file is complete, and how often the directory is looked at.
    pub directory: Directory,
    /// What an operator should see.
    pub notes: FeedNotes,
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
    /// Something failed: the directories have to be checked.
    failed: bool,
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
        // Every life is measured; a test may start one that is not.
        let meter = Meter::current().unwrap_or_default();
        let claims = ClaimLoop {
            slots: Slots::new(self.setup.parsers.len(), self.bell.clone()),
            files: Arc::new(Semaphore::new(FILES_IN_PROGRESS_MAX)),
            owners: Owners::new(self.setup.clock.clone()),
            stable_files: StableFiles::new(&self.setup.directory, NAMES_MAX),
            unowned: VecDeque::new(),
            odd_claims: Vec::new(),
            ready: VecDeque::new(),
            queued: HashSet::new(),
            failed: HashSet::new(),
            troubled: HashSet::new(),
            is_checked: false,
            parked: None,
            noted: None,
            scan_at: MonoMs(0),
            unowned_at: MonoMs(0),
            watcher: Inlet::new(context.address().recipient(), Self::MAILBOX, meter),
            setup: self.setup.clone(),
            bell: self.bell.clone(),
            changes: self.changes.clone(),
            draining: self.draining.clone(),
        };
        context.spawn(claims.run().into_actor(self).map(|error, this, context| match error {
            WatchError::ParserGone => this.fault.end(context, Exit::Orphaned(error.to_string())),
            WatchError::Store(_) => this.fault.fail(context, error),
        }));
    }
}

impl Handler<Letter<FileClosed>> for FileWatcher {
    type Result = ();

    fn handle(&mut self, letter: Letter<FileClosed>, context: &mut Self::Context) {
        let closed = letter.open();
        self.finishing += 1;
        let (setup, bell, changes) = (self.setup.clone(), self.bell.clone(), self.changes.clone());
        let work = async move {
            let result = setup.finish(&closed.file, &changes).await;
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
        let mut is_news = true;
        loop {
            match self.inbox.changed().await {
                Ok(change) => {
                    is_news = true;
                    let mut changes = lock(&self.changes);
                    changes.rescan |= change.rescan;
                    changes.complete.extend(change.complete);
                    if changes.complete.len() > SCAN_MAX {
                        changes.complete.clear();
                        changes.rescan = true;
                    }
                }
                Err(error) => {
                    if std::mem::take(&mut is_news) {
                        tracing::warn!(feed = %self.feed, %error, "the directory can't be watched; it is still scanned");
                    }
                    lock(&self.changes).failed = true;
                    self.bell.ring();
                    tokio::time::sleep(self.rescan).await;
                }
            }
            self.bell.ring();
        }
    }
}

fn lock(changes: &Mutex<WatchedChanges>) -> MutexGuard<'_, WatchedChanges> {
    // Whatever a panic left of it, every flag and every name in it stands for itself.
    changes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Claims files as parsers become free.
struct ClaimLoop {
    setup: FileWatcherSetup,
    bell: Bell,
    changes: Arc<Mutex<WatchedChanges>>,
    watcher: Inlet<FileClosed>,
    slots: Slots,
    files: Arc<Semaphore>,
    owners: Owners,
    stable_files: StableFiles,
    /// Claimed files that nobody works on, oldest claim first.
    unowned: VecDeque<ClaimedFile>,
    /// Claims that can't be made sense of.
    odd_claims: Vec<(String, String)>,
    ready: VecDeque<OsString>,
    queued: HashSet<OsString>,
    /// Files that could not be claimed as if none could, since the last that was claimed …
    failed: HashSet<OsString>,
    /// … and those of which others could be claimed since: it is their own trouble.
    troubled: HashSet<OsString>,
    /// Whether the directories were fit for use when they were checked last, and nothing failed since.
    is_checked: bool,
    parked: Option<Parked>,
    /// What the notes were made from.
    noted: Option<(u64, u64, usize)>,
    scan_at: MonoMs,
    unowned_at: MonoMs,
    draining: Arc<AtomicBool>,
}

/// A feed that takes no files.
struct Parked {
    /// Tries that failed in a row.
    failures: u32,
    /// The next one.
    until: MonoMs,
    /// What has to succeed.
    by: Obstacle,
}

/// What keeps a feed from taking files.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Obstacle {
    /// Its directories can't be used, or not be looked into.
    Directories,
    /// They can, and yet no file can be claimed.
    Claims,
}

/// Why a feed can't continue watching: it is restarted.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error("a parser is gone")]
    ParserGone,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ClaimLoop {
    async fn run(mut self) -> WatchError {
        loop {
            failpoint!("panic.file_watcher");
            let now = self.setup.clock.mono();
            let rescan = self.take_note(now);
            if self.parked.as_ref().is_none_or(|parked| now >= parked.until) {
                match self.look(now, rescan).await {
                    Ok(()) => {
                        self.overcome(Obstacle::Directories);
                        if let Err(error) = self.hand_out().await {
                            return error;
                        }
                    }
                    Err(error) => self.park(Obstacle::Directories, &error),
                }
            }
            self.write_notes();
            self.bell.wait(self.rest()).await;
        }
    }

    /// How long there is nothing to do unless the bell rings.
    fn rest(&self) -> Duration {
        let now = self.setup.clock.mono();
        let next = match &self.parked {
            Some(parked) if now < parked.until => parked.until,
            _ => {
                let scan = self.stable_files.next_due().unwrap_or(self.scan_at).min(self.scan_at);
                if self.unowned.is_empty() {
                    scan.min(self.owners.next_due().unwrap_or(self.unowned_at)).min(self.unowned_at)
                } else {
                    scan // only a place that becomes free lets these go on
                }
            }
        };
        next.since(now).clamp(Duration::from_millis(10), TICK)
    }

    /// Takes note of what the watch reported. Whether it missed something.
    fn take_note(&mut self, now: MonoMs) -> bool {
        let changes = std::mem::take(&mut *lock(&self.changes));
        let complete = changes.complete.iter().map(OsString::as_os_str);
        let ready = self.stable_files.observe_change(now, complete);
        self.enqueue(ready);
        self.is_checked &= !changes.failed;
        changes.rescan
    }

    /// Looks into the directories for what there is to do, as far as it is time for that.
    async fn look(&mut self, now: MonoMs, rescan: bool) -> io::Result<()> {
        if !self.is_checked {
            let inbox = self.setup.inbox.clone();
            blocking(move || inbox.prepare()).await?;
            self.is_checked = true;
            // What came meanwhile was seen by nobody.
            (self.scan_at, self.unowned_at) = (now, now);
        }
        self.scan(now, rescan).await?;
        self.look_for_unowned(now).await
    }

    fn park(&mut self, by: Obstacle, error: &io::Error) {
        let failures = self.parked.as_ref().map_or(0, |parked| parked.failures).saturating_add(1);
        let until = self.setup.clock.mono().after(PARK_BACKOFF.bound(failures));
        self.parked = Some(Parked { failures, until, by });
        self.is_checked = false;
        if self.setup.notes.park(&error.to_string()) {
            tracing::error!(feed = %self.setup.feed, %error, "the feed is parked: it takes no files until this is put right; it is tried again");
        }
    }

    /// What was in the way is so no longer.
    fn overcome(&mut self, obstacle: Obstacle) {
        if self.parked.as_ref().is_some_and(|parked| parked.by == obstacle) {
            self.parked = None;
            if self.setup.notes.resume() {
                tracing::info!(feed = %self.setup.feed, "the feed takes files again");
            }
        }
    }

    async fn scan(&mut self, now: MonoMs, rescan: bool) -> io::Result<()> {
        let due = now >= self.scan_at || self.stable_files.next_due().is_some_and(|due| now >= due);
        if !(due || rescan) || self.ready.len() >= SCAN_MAX {
            return Ok(());
        }
        let inbox = self.setup.inbox.clone();
        let scan = blocking(move || inbox.scan(SCAN_MAX)).await?;
        for (name, why) in scan.refused {
            if self.stable_files.refuse(&name, &why) {
                tracing::warn!(feed = %self.setup.feed, name = %name.display(), why, "a file was refused and stays in place");
            }
        }
        let sightings = scan.candidates.iter().map(|candidate| Sighting {
            name: &candidate.name,
            bytes: candidate.bytes,
            modified: candidate.modified,
            has_sidecar: candidate.has_sidecar,
        });
        let wall = self.setup.clock.wall();
        let ready = self.stable_files.observe_scan(now, wall, sightings, scan.truncated);
        self.enqueue(ready);
        self.scan_at = if scan.truncated { now } else { now.after(self.setup.directory.rescan) };
        Ok(())
    }

    /// Finds claims without an owner: those of an earlier run, and what failed half-way (F6, F7).
    async fn look_for_unowned(&mut self, now: MonoMs) -> io::Result<()> {
        let is_due = now >= self.unowned_at || self.owners.next_due().is_some_and(|due| now >= due);
        if !is_due || !self.unowned.is_empty() {
            return Ok(());
        }
        let (inbox, owners) = (self.setup.inbox.clone(), self.owners.clone());
        let found = blocking(move || inbox.unowned(&|claim| owners.is_taken(claim))).await?;
        self.owners.retain(&found.directories);
        self.unowned = found.files.into();
        self.odd_claims = found.troubles.into_iter().map(|(path, error)| (path, error.to_string())).collect();
        self.unowned_at = now.after(self.setup.directory.rescan);
        Ok(())
    }

    /// Gives files to parsers as long as there is room for them.
    async fn hand_out(&mut self) -> Result<(), WatchError> {
        // Places are taken only for a file: giving one back unused rings the bell that is waited for.
        while !self.draining.load(Ordering::Relaxed)
            && self.unowned.len() + self.ready.len() > 0
            && let Some((slot, permit)) = self.places()
        {
            let next = match self.next_unowned() {
                Some(unowned) => Some(unowned),
                None => self.claim_next().await,
            };
            let Some((file, owner)) = next else { break };
            failpoint!("claim.after");
            let parser = &self.setup.parsers[slot.index()];
            let claimed = FileClaimed { file, owner, watcher: self.watcher.clone(), slot, permit };
            if parser.send(claimed).await.is_err() {
                return Err(WatchError::ParserGone);
            }
        }
        if self.ready.is_empty() {
            self.overcome(Obstacle::Claims); // whatever could not be claimed is not there any more
        }
        Ok(())
    }

    /// A parser's place and a file's place, if both are free.
    fn places(&self) -> Option<(Slot, OwnedSemaphorePermit)> {
        let permit = self.files.clone().try_acquire_owned().ok()?;
        Some((self.slots.take()?, permit))
    }

    fn next_unowned(&mut self) -> Option<(ClaimedFile, Owner)> {
        while let Some(file) = self.unowned.pop_front() {
            if let Some(owner) = self.owners.take(&file) {
                return Some((file, owner));
            }
        }
        None
    }

    fn enqueue(&mut self, names: Vec<OsString>) {
        for name in names {
            if self.queued.insert(name.clone()) {
                self.ready.push_back(name);
            }
        }
    }

    fn hold(&mut self, name: &OsStr, why: &str) {
        if self.stable_files.hold(name, self.setup.clock.mono(), why) {
            tracing::warn!(feed = %self.setup.feed, name = %name.display(), why,
                "a file can't be claimed; retrying when it changes, and every minute");
        }
    }

    async fn claim_next(&mut self) -> Option<(ClaimedFile, Owner)> {
        while let Some(name) = self.ready.pop_front() {
            let (inbox, wall, claimed_name) =
                (self.setup.inbox.clone(), self.setup.clock.wall(), name.clone());
            let claimed = blocking(move || inbox.claim(&claimed_name, wall)).await;
            if let Err(ClaimError::Io(error)) = &claimed
                && !self.troubled.contains(&name)
            {
                self.park(Obstacle::Claims, error);
                self.failed.insert(name.clone());
                // It may be half-way. Others come first the next time: one that fails for ever holds up none.
                self.unowned_at = MonoMs(0);
                self.ready.push_back(name);
                return None;
            }
            self.queued.remove(&name);
            match claimed {
                Ok(file) => {
                    self.stable_files.forget(&name);
                    self.troubled.remove(&name);
                    self.failed.remove(&name);
                    if self.troubled.len() > SCAN_MAX {
                        self.troubled.clear(); // they are found out again
                    }
                    self.troubled.extend(self.failed.drain());
                    self.overcome(Obstacle::Claims);
                    // Nobody else makes claims, so this one is nobody's.
                    if let Some(owner) = self.owners.take(&file) {
                        return Some((file, owner));
                    }
                }
                Err(ClaimError::Gone) => {
                    self.failed.remove(&name);
                    self.stable_files.forget(&name);
                }
                Err(ClaimError::Refused(why)) => self.hold(&name, &why),
                Err(ClaimError::Unreadable(error)) => self.hold(&name, &error.to_string()),
                Err(ClaimError::Io(error)) => {
                    self.hold(&name, &error.to_string());
                    self.unowned_at = MonoMs(0); // it may be half-way
                }
            }
        }
        None
    }

    /// Says which files wait for somebody, if that has changed.
    fn write_notes(&mut self) {
        let made_from = (self.stable_files.held_changes(), self.owners.changes(), self.odd_claims.len());
        if self.noted.replace(made_from) == Some(made_from) {
            return;
        }
        let held = self.stable_files.held();
        let held = held.map(|(name, reason)| (name.to_string_lossy().into_owned(), reason.to_owned()));
        self.setup.notes.hold(held.chain(self.owners.failing()).chain(self.odd_claims.iter().cloned()));
    }
}

impl FileWatcherSetup {
    /// Moves a closed file away. If that fails, the file is set aside: it stays among the claimed ones and is closed
    /// again later, when its rows are found to be known.
    async fn finish(&self, file: &FileInProgress, changes: &Mutex<WatchedChanges>) -> Result<(), WatchError> {
        match self.try_finish(file).await {
            Ok(()) => Ok(()),
            Err(FinishError::Store(error)) => Err(error.into()),
            Err(FinishError::Io(error)) => {
                file.owner.set_aside(&self.feed, format!("it can't be moved away or reported: {error}"));
                lock(changes).failed = true;
                Ok(())
            }
        }
    }

    async fn try_finish(&self, file: &FileInProgress) -> Result<(), FinishError> {
        let id = file.record.id;
        let Some(report) = self.ledger.report(id).await? else {
            return Err(FinishError::Io(io::Error::other("the ledger does not know the file")));
        };
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
        let (name, state) = (&file.record.name, report.state.clone());
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
