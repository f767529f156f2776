//! Receipts from files that are dropped into a directory.
//!
//! Files are taken as a feed takes them, by the same [`Inbox`]: once they are complete, by a rename out of the
//! dropper's reach; what is no regular file is refused. They are read one after the other, a bounded block at
//! a time. The cursor says which claim is being read and how many of its rows were taken, so that a crash goes
//! on behind them. A file that is read goes to `done/`, one that can't be used to `failed/`, with a report
//! beside it that says why.

mod file;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::OsString,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use postrider_actors::{
    failpoint,
    flow::blocking,
    model::{
        file::FileReport,
        receipt_format::{ReceiptFileFormat, ReceiptFormat},
        settle::{SettleRule, Settling, Sighting},
        time::MonoMs,
    },
    ports::{AckId, ClaimError, ClaimedFile, Clock, Inbox, Polled, ReceiptSource, SourceCursor, StoreError},
};

use file::{OpenFile, Position};

/// Files claimed and not yet read to their end: the others are safe where they are.
const CLAIMS_MAX: usize = 16;

/// Names looked at in one scan.
const SCAN_MAX: usize = 10_000;

/// Names remembered that are not complete yet.
const NAMES_MAX: usize = 20_000;

/// Names whose refusal was logged; beyond that the set starts anew.
const REFUSALS_MAX: usize = 1_000;

/// How often the directory is asked for changes at most, and at least.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How a directory of receipts is read.
#[derive(Clone, Debug)]
pub struct DirReceiptsSettings {
    /// The destination whose messages its receipts are about; for the reports.
    pub destination: Arc<str>,
    /// What the files are made of.
    pub kind: ReceiptFileFormat,
    /// The longest line, in bytes.
    pub line_bytes_max: usize,
    /// The most receipts of one look; at least 1.
    pub receipts_max: usize,
    /// When a file is complete.
    pub rule: SettleRule,
    /// How often the directory is looked at whatever the watch says.
    pub rescan: Duration,
}

/// A directory of receipts.
pub struct DirReceipts {
    shared: Arc<Shared>,
    state: Arc<Mutex<State>>,
}

struct Shared {
    inbox: Arc<dyn Inbox>,
    clock: Arc<dyn Clock>,
    format: ReceiptFormat,
    settings: DirReceiptsSettings,
}

/// What a restart finds out again.
struct State {
    /// What the next look comes with if all went well. `None`: nobody looked yet.
    #[expect(
        clippy::option_option,
        reason = "nobody looked yet, and a look without a cursor, are two things"
    )]
    expected: Option<Option<SourceCursor>>,
    open: Option<OpenFile>,
    /// Claimed and not opened, oldest first.
    claimed: VecDeque<ClaimedFile>,
    /// Read to their end and not acknowledged.
    finishing: HashMap<AckId, (ClaimedFile, FileReport)>,
    settling: Settling,
    ready: VecDeque<OsString>,
    refusals: HashSet<OsString>,
    /// What the watch told.
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
            open: None,
            claimed: VecDeque::new(),
            finishing: HashMap::new(),
            settling: Settling::new(settings.rule, NAMES_MAX),
            ready: VecDeque::new(),
            refusals: HashSet::new(),
            complete: Vec::new(),
            scan_at: MonoMs(0),
        };
        Self {
            shared: Arc::new(Shared { inbox, clock, format, settings }),
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Works on the state off the actors' threads. Cut off, the work is finished all the same, and the next
    /// look notices that its cursor is not the expected one.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut State, &Shared) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (state, shared) = (self.state.clone(), self.shared.clone());
        // A panic leaves at worst a cursor that is not the expected one.
        blocking(move || work(&mut state.lock().unwrap_or_else(PoisonError::into_inner), &shared))
            .await
            .map_err(|error| StoreError::Retryable(error.to_string()))
    }
}

#[async_trait]
impl ReceiptSource for DirReceipts {
    async fn poll(&self, cursor: Option<&SourceCursor>, wait: Duration) -> Result<Polled, StoreError> {
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            let cursor = cursor.cloned();
            let (polled, pause) = self
                .work(move |state, shared| {
                    let polled = state.look(shared, cursor.as_ref()).inspect_err(|_| state.start_over())?;
                    Ok((polled, state.pause(shared)))
                })
                .await?;
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            match polled {
                Some(polled) => return Ok(polled),
                None if left.is_zero() => return Ok(Polled::default()),
                None => {}
            }
            match tokio::time::timeout(pause.min(left), self.shared.inbox.changed()).await {
                Ok(Ok(change)) => {
                    self.work(move |state, _| {
                        state.heard(change.complete, change.rescan);
                        Ok(())
                    })
                    .await?;
                }
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
    /// The next block of receipts; `None` if there is no file to read.
    fn look(&mut self, shared: &Shared, cursor: Option<&SourceCursor>) -> io::Result<Option<Polled>> {
        if self.expected.as_ref().map(Option::as_ref) != Some(cursor) {
            // The first look, or what the last one brought was not taken.
            self.open = None;
            self.finishing.clear();
            self.claimed = shared.inbox.claimed()?.into();
            self.expected = Some(cursor.cloned());
        }
        self.claim(shared);
        let mut open = match self.open.take() {
            Some(open) => open,
            None => match self.claimed.pop_front() {
                Some(file) => {
                    let position = cursor.and_then(Position::read);
                    OpenFile::open(file, position, shared)?
                }
                None => return Ok(None),
            },
        };
        let (read, end) = open.read(shared)?;
        let cursor = open.position().cursor();
        let mut polled = Polled {
            receipts: read.receipts,
            rejects: read.rejects,
            cursor: Some(cursor.clone()),
            acks: Vec::new(),
        };
        self.expected = Some(Some(cursor));
        match end {
            None => self.open = Some(open),
            Some(state) => {
                if let Some(reason) = state.reason() {
                    tracing::warn!(source = %shared.format.source(), file = ?open.name(), reason, "a file of receipts can't be used");
                }
                let (ack, file, report) = open.into_finished(state, shared);
                self.finishing.insert(ack.clone(), (file, report));
                polled.acks.push(ack);
            }
        }
        Ok(Some(polled))
    }

    /// After an error: everything is found again.
    fn start_over(&mut self) {
        self.expected = None;
    }

    fn heard(&mut self, complete: Vec<OsString>, rescan: bool) {
        self.complete.extend(complete);
        if rescan || self.complete.len() > SCAN_MAX {
            self.complete.clear();
            self.scan_at = MonoMs(0);
        }
    }

    /// How long nothing new is to be expected, unless the watch tells of it.
    fn pause(&self, shared: &Shared) -> Duration {
        let due = self.settling.next_due().map_or(self.scan_at, |due| due.min(self.scan_at));
        due.since(shared.clock.mono()).clamp(PAUSE_MIN, PAUSE_MAX)
    }

    /// Claims complete files, as many as may be in hand.
    fn claim(&mut self, shared: &Shared) {
        let now = shared.clock.mono();
        let complete = std::mem::take(&mut self.complete);
        let ready = self.settling.observe_change(now, complete.iter().map(OsString::as_os_str));
        self.enqueue(ready);
        let is_due = now >= self.scan_at || self.settling.next_due().is_some_and(|due| now >= due);
        if is_due
            && self.ready.len() < SCAN_MAX
            && let Err(error) = self.scan(shared, now)
        {
            // What is claimed is read all the same.
            tracing::warn!(source = %shared.format.source(), %error, "the directory can't be scanned");
            self.scan_at = now.after(shared.settings.rescan.max(PAUSE_MAX));
        }
        while self.claimed.len() < CLAIMS_MAX
            && let Some(name) = self.ready.pop_front()
        {
            match shared.inbox.claim(&name, shared.clock.wall()) {
                Ok(file) => {
                    self.settling.forget(&name);
                    self.claimed.push_back(file);
                    failpoint!("receipts.claimed");
                }
                Err(ClaimError::Gone) => self.settling.forget(&name),
                Err(ClaimError::Refused(why)) => {
                    self.settling.hold(&name, now);
                    self.refuse(shared, name, &why);
                }
                Err(ClaimError::Io(error)) => {
                    if self.settling.hold(&name, now) {
                        tracing::warn!(source = %shared.format.source(), file = ?name, %error, "a file can't be taken now; it is tried again when it changes, and every minute");
                    }
                }
            }
        }
    }

    fn scan(&mut self, shared: &Shared, now: MonoMs) -> io::Result<()> {
        let scan = shared.inbox.scan(SCAN_MAX)?;
        let sightings = scan.candidates.iter().map(|candidate| Sighting {
            name: &candidate.name,
            bytes: candidate.bytes,
            modified: candidate.modified,
            has_sidecar: candidate.has_sidecar,
        });
        let ready = self.settling.observe_scan(now, shared.clock.wall(), sightings, scan.truncated);
        self.enqueue(ready);
        for (name, why) in scan.refused {
            self.refuse(shared, name, &why);
        }
        self.scan_at = if scan.truncated { now } else { now.after(shared.settings.rescan) };
        Ok(())
    }

    fn enqueue(&mut self, names: Vec<OsString>) {
        let known: HashSet<_> = self.ready.iter().cloned().collect();
        self.ready.extend(names.into_iter().filter(|name| !known.contains(name)));
    }

    fn refuse(&mut self, shared: &Shared, name: OsString, why: &str) {
        if self.refusals.len() >= REFUSALS_MAX {
            self.refusals.clear();
        }
        if !self.refusals.contains(&name) {
            tracing::warn!(source = %shared.format.source(), file = ?name, why, "a file is refused and stays where it is");
            self.refusals.insert(name);
        }
    }
}

#[cfg(test)]
mod tests;
