//! Receipts from files that are dropped into a directory.
//!
//! Files are taken as a feed takes them, by the same [`Inbox`]: once they are complete, by a rename out of the
//! dropper's reach; what is not a regular file is refused. They are read one after the other, a bounded block at
//! a time. The cursor says which claim is being read and how many of its rows were taken, so that after a crash
//! reading resumes behind them. A file that is read goes to `done/`, one that can't be used to `failed/`, with a report
//! beside it that says why.
//!
//! Hashing, copying or reading a file of gigabytes may take longer than a poll waits. Such a scan continues
//! by itself, the only one of its source, and what it found is handed out by a later poll.

mod file;
mod shared;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::{OsStr, OsString},
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use postrider_actors::{
    failpoint,
    flow::blocking,
    model::{
        file::{FileReport, FileState},
        receipt_format::{ReadReceipts, ReceiptFormat},
        stable::{Sighting, StableFiles},
        time::MonoMs,
    },
    ports::{AckId, ClaimError, ClaimedFile, Clock, Inbox, Polled, ReceiptSource, SourceCursor, StoreError},
};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout, timeout_at},
};

use file::{FileCursor, OpenFile};
use shared::Shared;

pub use shared::DirReceiptsSettings;

/// Files claimed and not yet read to their end: the others are safe where they are.
const CLAIMS_MAX: usize = 16;

/// Names looked at in one scan.
const SCAN_MAX: usize = 10_000;

/// Names remembered that are not complete yet.
const NAMES_MAX: usize = 20_000;

/// How long others come before a claim that could not be read.
const ASIDE: Duration = Duration::from_secs(10);

/// How often the directory is asked for changes at most, and at least.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// A directory of receipts.
pub struct DirReceipts {
    shared: Arc<Shared>,
    state: Arc<Mutex<State>>,
}

/// What a restart finds out again.
struct State {
    /// The cursor that the next scan is expected to start from. `None`: no scan yet.
    #[expect(clippy::option_option, reason = "no scan yet, and a scan without a cursor, are two things")]
    expected: Option<Option<SourceCursor>>,
    /// What the last scan found, and the cursor that it started from, until a poll has brought it.
    found: Option<(Option<SourceCursor>, Polled)>,
    open: Option<OpenFile>,
    /// Claimed and not opened, oldest first.
    claimed: VecDeque<ClaimedFile>,
    /// Claims that can't be read now, by their directories, and until when the others come first.
    aside: HashMap<PathBuf, MonoMs>,
    /// Whether these, what is open and what is finishing are all that is claimed.
    is_complete: bool,
    /// Read to their end and not acknowledged.
    finishing: HashMap<AckId, (ClaimedFile, FileReport)>,
    stable_files: StableFiles,
    ready: VecDeque<OsString>,
    /// What the watch reported.
    complete: Vec<OsString>,
    scan_at: MonoMs,
}

impl DirReceipts {
    /// Reads the files of `inbox` as `format` says. Nothing is looked at yet.
    pub fn new(
        inbox: Arc<dyn Inbox>,
        format: ReceiptFormat,
        settings: DirReceiptsSettings,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let state = State {
            expected: None,
            found: None,
            open: None,
            claimed: VecDeque::new(),
            aside: HashMap::new(),
            is_complete: false,
            finishing: HashMap::new(),
            stable_files: StableFiles::new(&settings.directory, NAMES_MAX),
            ready: VecDeque::new(),
            complete: Vec::new(),
            scan_at: MonoMs(0),
        };
        Self {
            shared: Arc::new(Shared { inbox, clock, format, settings, given_up: AtomicBool::new(false) }),
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Works on the state off the actors' threads. Cut off, the work is finished all the same, and no other
    /// begins before that: it keeps the lock, and who waits for it keeps no thread.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut State, &Shared) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (mut state, shared) = (self.state.clone().lock_owned().await, self.shared.clone());
        blocking(move || work(&mut state, &shared))
            .await
            .map_err(|error| StoreError::Retryable(error.to_string()))
    }
}

impl Drop for DirReceipts {
    fn drop(&mut self) {
        self.shared.given_up.store(true, Ordering::Relaxed);
    }
}

#[async_trait]
impl ReceiptSource for DirReceipts {
    async fn poll(&self, cursor: Option<&SourceCursor>, wait: Duration) -> Result<Polled, StoreError> {
        let begun = Instant::now();
        loop {
            let asked = cursor.cloned();
            let look = self.work(move |state, shared| {
                state.look(shared, asked)?;
                Ok(state.pause(shared))
            });
            // Too long: it continues, and a later poll has what it finds.
            let Ok(pause) = timeout_at(begun + wait.max(self.shared.settings.look_max), look).await else {
                return Ok(Polled::default());
            };
            let pause = pause?;
            // Nothing cuts this poll off between here and its answer.
            if let Some((_, polled)) = self.state.lock().await.found.take() {
                return Ok(polled);
            }
            let left = wait.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Ok(Polled::default());
            }
            match timeout(pause.min(left), self.shared.inbox.changed()).await {
                Ok(Ok(change)) => self.state.lock().await.note(change.complete, change.rescan),
                Ok(Err(error)) => {
                    tracing::debug!(source = %self.shared.format.source(), %error, "the directory can't be watched; it is still scanned");
                    tokio::time::sleep(pause.min(left)).await;
                }
                Err(_) => {} // it is looked at again
            }
        }
    }

    async fn acknowledge(&self, acks: &[AckId]) -> Result<(), StoreError> {
        let acks = acks.to_vec();
        self.work(move |state, shared| {
            for ack in &acks {
                let Some((file, report)) = state.finishing.get(ack) else { continue };
                failpoint!("receipts.before_finish");
                shared.inbox.finish(file, report)?;
                state.finishing.remove(ack);
            }
            Ok(())
        })
        .await
    }
}

impl State {
    /// Finds the next block of receipts, if there is a file to read.
    fn look(&mut self, shared: &Shared, cursor: Option<SourceCursor>) -> io::Result<()> {
        if self.found.as_ref().is_some_and(|(asked, _)| *asked == cursor) {
            return Ok(()); // by a scan that was cut off
        }
        self.found = None;
        // Not due again before this scan has succeeded: after an error or a panic everything is found again.
        if self.expected.take().as_ref() != Some(&cursor) || !self.is_complete {
            // The first scan, or what the last one brought was not taken, or a claim failed half-way.
            self.open = None;
            self.finishing.clear();
            shared.inbox.prepare()?;
            let found = shared.inbox.unowned(&|_| false)?;
            for (claim, error) in found.troubles {
                tracing::warn!(source = %shared.format.source(), claim, %error, "a claim can't be made sense of");
            }
            self.claimed = found.files.into();
            self.aside.retain(|directory, _| found.directories.contains(directory));
            self.is_complete = true;
        }
        self.claim(shared);
        let polled = self.read(shared, cursor.as_ref())?;
        self.expected = Some(polled.as_ref().map_or_else(|| cursor.clone(), |polled| polled.cursor.clone()));
        self.found = polled.map(|polled| (cursor, polled));
        Ok(())
    }

    /// The next block of receipts; `None` if there is no file to read. One that its disk can't read now holds up no other;
    /// it is an error if there is no other.
    fn read(&mut self, shared: &Shared, cursor: Option<&SourceCursor>) -> io::Result<Option<Polled>> {
        let now = shared.clock.mono();
        let mut failure = None;
        loop {
            let (file, opened) = match self.open.take() {
                Some(open) => (open.file().clone(), Ok(open)),
                None => match self.next_claimed(now) {
                    Some(file) => {
                        let position = cursor.and_then(FileCursor::read);
                        (file.clone(), OpenFile::open(file, position, shared))
                    }
                    None => return failure.map_or(Ok(None), Err),
                },
            };
            match opened.and_then(|mut open| open.read(shared).map(|(read, end)| (open, read, end))) {
                Ok((open, read, end)) => {
                    self.aside.remove(file.directory());
                    return Ok(Some(self.polled(shared, open, read, end)));
                }
                Err(error) => {
                    shared.check_wanted()?;
                    if self.aside.insert(file.directory().to_owned(), now.after(ASIDE)).is_none() {
                        tracing::warn!(source = %shared.format.source(), file = %file.display_name().escape_debug(), %error,
                            "a file of receipts can't be read now; it is tried again, and others come first");
                    }
                    self.claimed.push_back(file);
                    failure = Some(error);
                }
            }
        }
    }

    /// The oldest claim that nothing is known against.
    fn next_claimed(&mut self, now: MonoMs) -> Option<ClaimedFile> {
        let is_next = |file: &ClaimedFile| self.aside.get(file.directory()).is_none_or(|until| *until <= now);
        let at = self.claimed.iter().position(is_next)?;
        self.claimed.remove(at)
    }

    /// What was read, and what becomes of the file.
    fn polled(
        &mut self,
        shared: &Shared,
        open: OpenFile,
        read: ReadReceipts,
        end: Option<FileState>,
    ) -> Polled {
        let mut polled = Polled {
            receipts: read.receipts,
            rejects: read.rejects,
            ignored: read.ignored,
            cursor: Some(open.position().cursor()),
            acks: Vec::new(),
        };
        match end {
            None => self.open = Some(open),
            Some(state) => {
                if let Some(reason) = state.reason_to_log() {
                    tracing::warn!(source = %shared.format.source(), file = %open.name(), reason, "a file of receipts can't be used");
                }
                let (ack, file, report) = open.into_finished(state, shared);
                self.finishing.insert(ack.clone(), (file, report));
                polled.acks.push(ack);
            }
        }
        polled
    }

    fn note(&mut self, complete: Vec<OsString>, rescan: bool) {
        self.complete.extend(complete);
        if rescan || self.complete.len() > SCAN_MAX {
            self.complete.clear();
            self.scan_at = MonoMs(0);
        }
    }

    /// How long nothing new is expected unless the watch reports it.
    fn pause(&self, shared: &Shared) -> Duration {
        let due = self.stable_files.next_due().map_or(self.scan_at, |due| due.min(self.scan_at));
        due.since(shared.clock.mono()).clamp(PAUSE_MIN, PAUSE_MAX)
    }

    /// Claims complete files, up to the limit on claims.
    fn claim(&mut self, shared: &Shared) {
        let now = shared.clock.mono();
        let complete = std::mem::take(&mut self.complete);
        let ready = self.stable_files.observe_change(now, complete.iter().map(OsString::as_os_str));
        self.enqueue(ready);
        let is_due = now >= self.scan_at || self.stable_files.next_due().is_some_and(|due| now >= due);
        if is_due
            && self.ready.len() < SCAN_MAX
            && let Err(error) = self.scan(shared, now)
        {
            // What is claimed is read all the same.
            tracing::warn!(source = %shared.format.source(), %error, "the directory can't be scanned");
            self.scan_at = now.after(shared.settings.directory.rescan.max(PAUSE_MAX));
        }
        while self.claimed.len() < CLAIMS_MAX
            && let Some(name) = self.ready.pop_front()
        {
            match shared.inbox.claim(&name, shared.clock.wall()) {
                Ok(file) => {
                    self.stable_files.forget(&name);
                    self.claimed.push_back(file);
                    failpoint!("receipts.claimed");
                }
                Err(ClaimError::Gone) => self.stable_files.forget(&name),
                Err(ClaimError::Refused(why)) => self.hold(shared, &name, &why),
                Err(ClaimError::Unreadable(error)) => self.hold(shared, &name, &error.to_string()),
                Err(ClaimError::Io(error)) => {
                    self.hold(shared, &name, &error.to_string());
                    // It may be half-way: the next scan finds everything again.
                    self.is_complete = false;
                }
            }
        }
    }

    fn scan(&mut self, shared: &Shared, now: MonoMs) -> io::Result<()> {
        let scan = shared.inbox.scan(SCAN_MAX)?;
        for (name, why) in scan.refused {
            if self.stable_files.refuse(&name, &why) {
                tracing::warn!(source = %shared.format.source(), file = %name.display(), why, "a file was refused and stays in place");
            }
        }
        let sightings = scan.candidates.iter().map(|candidate| Sighting {
            name: &candidate.name,
            bytes: candidate.bytes,
            modified: candidate.modified,
            has_sidecar: candidate.has_sidecar,
        });
        let ready = self.stable_files.observe_scan(now, shared.clock.wall(), sightings, scan.truncated);
        self.enqueue(ready);
        self.scan_at = if scan.truncated { now } else { now.after(shared.settings.directory.rescan) };
        Ok(())
    }

    fn enqueue(&mut self, names: Vec<OsString>) {
        let known: HashSet<_> = self.ready.iter().cloned().collect();
        self.ready.extend(names.into_iter().filter(|name| !known.contains(name)));
    }

    fn hold(&mut self, shared: &Shared, name: &OsStr, why: &str) {
        if self.stable_files.hold(name, shared.clock.mono(), why) {
            tracing::warn!(source = %shared.format.source(), file = %name.display(), why, "a file can't be claimed; retrying when it changes, and every minute");
        }
    }
}

#[cfg(test)]
mod tests;
