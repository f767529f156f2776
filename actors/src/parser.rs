//! Parser: reads claimed files, one at a time, and hands their rows to the batcher in blocks.
//!
//! A file is read twice: once for its digest, which is its identity, and once for its rows. After a
//! crash the rows are parsed from the start again and those up to the checkpoint are not handed on.

use std::{
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use actix::prelude::*;
use postrider_settings::Duplicates;
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;

use crate::{
    flow::{HeldFeeds, Progress, blocking, insist},
    messages::{FileClaimed, Inlet, Letter, ParsedRows},
    model::{
        batch::RowLayout,
        file::{Checkpoint, FileRecord, FileState, ReadEnd},
        formats::{Position, RowBlock, RowParser},
        ids::{FileId, hex},
        rendering::BodyChecks,
    },
    ports::{ClaimedFile, Clock, Inbox, Ledger, Outbox, Seen, StoreError},
    reading::{BLOCK_BYTES, FeedSettings, FileInProgress, Readers, RowStream, RowsError},
    supervision::{ChildId, Drain, Exit, Fault, Stage},
};

/// Rows per block at most, rejected ones counted.
const BLOCK_ROWS_MAX: u64 = 8 * 1024;

/// Rows per block at least.
const BLOCK_ROWS_MIN: u64 = 512;

/// Where every file begins.
const START: Position = Position { offset: 0, rows: 0, line: 1 };

/// How often a parser that waits for the backlog to shrink looks again.
const WATERMARK_TICK: Duration = Duration::from_millis(100);

/// What a parser works with.
#[derive(Clone)]
pub struct ParserSetup {
    /// The feed's settings.
    pub feed: Arc<FeedSettings>,
    /// The feed's files.
    pub inbox: Arc<dyn Inbox>,
    /// What is known of files.
    pub outbox: Arc<dyn Outbox>,
    /// Where the first rows of a file went.
    pub ledger: Arc<dyn Ledger>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Where rows go.
    pub batcher: Inlet<ParsedRows>,
    /// Bounds the blocks between parsers and outbox.
    pub blocks: Arc<Semaphore>,
    /// Who reads what.
    pub readers: Readers,
    /// Which feeds wait for room.
    pub held: HeldFeeds,
    /// Sign of life.
    pub progress: Progress,
}

/// The actor.
pub struct Parser {
    setup: ParserSetup,
    fault: Fault,
    draining: Arc<AtomicBool>,
    reading: usize,
}

impl Stage for Parser {
    const NAME: &'static str = "parser";
    /// One file at a time comes in, with its slot; more is a restart's leftover.
    const MAILBOX: usize = 4;

    type Setup = ParserSetup;

    fn new(setup: ParserSetup, _: &ChildId, fault: Fault) -> Self {
        Self { setup, fault, draining: Arc::default(), reading: 0 }
    }
}

impl Actor for Parser {
    type Context = Context<Self>;
}

impl Handler<Letter<FileClaimed>> for Parser {
    type Result = ();

    fn handle(&mut self, letter: Letter<FileClaimed>, context: &mut Self::Context) {
        let claimed = letter.open();
        self.reading += 1;
        let pass = Pass { setup: self.setup.clone(), draining: self.draining.clone() };
        context.spawn(pass.run(claimed).into_actor(self).map(|end, this, context| {
            this.reading -= 1;
            match end {
                Ok(()) if this.reading == 0 && this.draining.load(Ordering::Relaxed) => context.stop(),
                Ok(()) => {}
                Err(error @ PassError::BatcherGone) => {
                    this.fault.end(context, Exit::Orphaned(error.to_string()));
                }
                Err(error) => this.fault.fail(context, error),
            }
        }));
    }
}

impl Handler<Drain> for Parser {
    type Result = ();

    fn handle(&mut self, _: Drain, context: &mut Self::Context) {
        self.draining.store(true, Ordering::Relaxed);
        if self.reading == 0 {
            context.stop();
        }
    }
}

/// Why a pass could not continue. The feed is restarted and resumes at the checkpoint.
#[derive(Debug, thiserror::Error)]
enum PassError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the batcher is gone")]
    BatcherGone,
    #[error(transparent)]
    Cancelled(io::Error),
}

/// Why a file is read no further.
enum Obstacle {
    /// A verdict on the file.
    Verdict(FileState),
    /// None of its rows can become a message as the configuration is (F67).
    Unfit(String),
    /// The machine can't read it now: a disk that fails or is full, no file descriptors, no permission. It says nothing of
    /// the file.
    NotNow(String),
}

impl From<io::Error> for Obstacle {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Verdict(FileState::SourceLost(format!("it vanished: {error}"))),
            io::ErrorKind::InvalidData => Self::Verdict(FileState::Failed(error.to_string())),
            _ => Self::NotNow(format!("it can't be read: {error}")),
        }
    }
}

impl From<RowsError> for Obstacle {
    fn from(error: RowsError) -> Self {
        match error {
            RowsError::Io(error) => error.into(),
            unusable => FileState::Failed(unusable.to_string()).into(),
        }
    }
}

impl From<FileState> for Obstacle {
    fn from(state: FileState) -> Self {
        Self::Verdict(state)
    }
}

/// One file's way through the parser.
struct Pass {
    setup: ParserSetup,
    draining: Arc<AtomicBool>,
}

impl Pass {
    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    async fn run(self, claimed: FileClaimed) -> Result<(), PassError> {
        let FileClaimed { file, owner, watcher, slot: _slot, permit } = claimed;
        let (digest, unusable) = match self.digest(&file).await {
            Ok(Some(digest)) => (digest, unmet_promise(&file, &digest)),
            Ok(None) => return Ok(()), // draining: the file stays claimed and is read after the restart
            Err(Obstacle::NotNow(why) | Obstacle::Unfit(why)) => {
                owner.set_aside(&self.setup.feed.name, why);
                return Ok(());
            }
            // Without its content it has no identity; it gets one of its own, to be reported under.
            Err(Obstacle::Verdict(state)) => {
                (Sha256::digest(file.path.as_os_str().as_encoded_bytes()).into(), Some(state))
            }
        };
        let id = FileId::derive(&self.setup.feed.name, &digest);
        let sole = self.setup.readers.enter(id).await;
        let conditions = file.conditions.as_ref().unwrap_or(&self.setup.feed.conditions);
        let mut record = FileRecord {
            id,
            feed: self.setup.feed.name.to_string(),
            name: file.display_name(),
            bytes: file.bytes,
            sha256: hex(&digest),
            claimed_at: file.claimed_at,
            destinations: conditions.destinations.clone(),
            terms: conditions.of_file(file.claimed_at),
            priority: conditions.priority.unwrap_or(self.setup.feed.settings.priority),
        };
        let known = self.insist("looking for the file", || self.setup.outbox.find_file(id)).await?;
        let moved = if known.is_some() { self.keep_terms(&mut record).await? } else { None };
        let file = Arc::new(FileInProgress::new(record, file, watcher, owner, permit, sole));
        match (known, unusable.or(moved)) {
            (Some((FileState::Ingested, _)), _) => {
                tracing::info!(feed = %self.setup.feed.name, file = %id, "the same bytes were ingested before");
                self.close(&file, FileState::Ingested).await
            }
            (_, Some(state)) => self.close(&file, state).await,
            (known, None) => {
                let resume = known.map(|(_, checkpoint)| checkpoint).unwrap_or_default();
                self.read_rows(&file, resume).await
            }
        }
    }

    /// The rest of a file goes where, when and as urgently as its first rows went, whatever the config says by now (I1). What is
    /// wrong if it can't.
    async fn keep_terms(&self, record: &mut FileRecord) -> Result<Option<FileState>, PassError> {
        let report = || self.setup.ledger.report(record.id);
        if let Some(report) = self.insist("reading the ledger", report).await? {
            (record.destinations, record.terms) = (report.file.destinations, report.file.terms);
            record.priority = report.file.priority;
        }
        let gone = |name: &&String| !self.setup.feed.destinations.iter().any(|known| *known.name == ***name);
        Ok(record.destinations.iter().find(gone).map(|name| {
            FileState::Failed(format!(
                "its first rows went to destination {name}, which the feed no longer has; rows read before \
                 are delivered when it is back. Add it to feeds.{}.destinations and drop the file again",
                self.setup.feed.name
            ))
        }))
    }

    async fn digest(&self, file: &ClaimedFile) -> Result<Option<[u8; 32]>, Obstacle> {
        let (inbox, file, draining) = (self.setup.inbox.clone(), file.clone(), self.draining.clone());
        blocking(move || {
            let mut source = inbox.open_raw(&file)?;
            let mut hash = Sha256::new();
            let mut buffer = vec![0; BLOCK_BYTES];
            loop {
                if draining.load(Ordering::Relaxed) {
                    return Ok(None);
                }
                match source.read(&mut buffer) {
                    Ok(0) => return Ok(Some(hash.finalize().into())),
                    Ok(len) => hash.update(&buffer[..len]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
            }
        })
        .await
    }

    async fn read_rows(&self, file: &Arc<FileInProgress>, resume: Checkpoint) -> Result<(), PassError> {
        let (mut stream, mut seen) = match self.prepare(file, resume).await {
            Ok(Some(prepared)) => prepared,
            Ok(None) => return Ok(()), // draining
            Err(Obstacle::Verdict(state)) => return self.close(file, state).await,
            Err(Obstacle::NotNow(why) | Obstacle::Unfit(why)) => {
                file.owner.set_aside(&self.setup.feed.name, why);
                return Ok(());
            }
        };
        loop {
            self.wait_for_room().await?;
            if self.is_draining() {
                return Ok(());
            }
            let permit =
                self.setup.blocks.clone().acquire_owned().await.map_err(|_| PassError::BatcherGone)?;
            let (inbox, claimed) = (self.setup.inbox.clone(), file.claimed.clone());
            let block_rows = self.block_rows();
            let step = blocking(move || {
                failpoint!("panic.parser");
                let mut block = RowBlock::new(block_rows);
                let before = stream.parser().position();
                let mut is_end = stream.next_block(&mut block).map_err(Obstacle::from);
                let mut read = stream.parser().position();
                let mut duplicates = Vec::new();
                // What was read before this check is what was claimed; of the rest nothing is known (F17, F32).
                let checked = check_unchanged(&*inbox, &claimed).and_then(|()| {
                    if let Some(why) = stream.parser().bodies().and_then(BodyChecks::verdict) {
                        return Err(Obstacle::Unfit(why.to_owned()));
                    }
                    if let (Some(seen), Some(layout)) = (&mut seen, stream.parser().layout()) {
                        find_duplicates(&mut **seen, layout, &block, &mut duplicates)?;
                    }
                    Ok(())
                });
                if let Err(obstacle) = checked {
                    block.clear();
                    duplicates.clear();
                    read = before;
                    is_end = Err(obstacle);
                }
                Ok((stream, seen, block, duplicates, read, is_end))
            });
            let (next, still_seen, block, duplicates, read, is_end) =
                step.await.map_err(PassError::Cancelled)?;
            (stream, seen) = (next, still_seen);
            if let Some(layout) = stream.parser().layout() {
                file.make_headers(&self.setup.feed, layout);
            }
            let end = match is_end {
                Ok(false) => None,
                Ok(true) => Some(ReadEnd::Closed(FileState::Ingested)),
                Err(Obstacle::Verdict(state)) => Some(ReadEnd::Closed(state)),
                Err(Obstacle::NotNow(why)) => {
                    file.owner.set_aside(&self.setup.feed.name, why);
                    Some(ReadEnd::SetAside)
                }
                Err(Obstacle::Unfit(why)) => {
                    file.owner.hold(&self.setup.feed.name, why);
                    Some(ReadEnd::SetAside)
                }
            };
            let is_last = end.is_some();
            let rows = ParsedRows { file: file.clone(), block, duplicates, resume, read, end, permit };
            self.setup.batcher.send(rows).await.map_err(|_| PassError::BatcherGone)?;
            if is_last {
                return Ok(());
            }
        }
    }

    /// What reading rows takes, once what the sidecar promises of them is true; `None` while draining.
    async fn prepare(
        &self,
        file: &Arc<FileInProgress>,
        resume: Checkpoint,
    ) -> Result<Option<(RowStream, Option<Box<dyn Seen>>)>, Obstacle> {
        if let Some(rows) = file.claimed.expected.as_ref().and_then(|expected| expected.rows) {
            let Some(counted) = self.count_rows(file).await? else { return Ok(None) };
            if counted != rows {
                let why = format!("its sidecar promises {rows} rows, it has {counted}");
                return Err(FileState::Failed(why).into());
            }
        }
        let duplicates = self.setup.feed.directory.duplicates;
        // To know what was seen before the checkpoint, those rows have to be parsed in full.
        let skip = if duplicates == Duplicates::Keep { resume.rows } else { 0 };
        let stream = self.open(file, skip).await?;
        let (of, feed) = (file.clone(), self.setup.feed.clone());
        let headers_of = move |layout: &RowLayout| of.make_headers(&feed, layout).to_vec();
        let stream = stream.checking(BodyChecks::new(resume.rows + 1, Box::new(headers_of)));
        let seen = match duplicates {
            Duplicates::Keep => None,
            Duplicates::First => {
                let (inbox, claimed) = (self.setup.inbox.clone(), file.claimed.clone());
                let seen = blocking(move || inbox.seen(&claimed)).await;
                // However that fails, the file has no part in it.
                Some(seen.map_err(|error| Obstacle::NotNow(error.to_string()))?)
            }
        };
        Ok(Some((stream, seen)))
    }

    /// How many rows the file has; `None` while draining.
    async fn count_rows(&self, file: &Arc<FileInProgress>) -> Result<Option<u64>, Obstacle> {
        let mut stream = self.open(file, u64::MAX).await?;
        loop {
            if self.is_draining() {
                return Ok(None);
            }
            let block_rows = self.block_rows();
            let step = blocking(move || {
                let mut block = RowBlock::new(block_rows);
                let is_end = stream.next_block(&mut block)?;
                Ok::<_, Obstacle>((stream, is_end))
            });
            let (next, is_end) = step.await?;
            stream = next;
            if is_end {
                return Ok(Some(stream.parser().position().rows));
            }
        }
    }

    async fn open(&self, file: &Arc<FileInProgress>, skip_rows: u64) -> Result<RowStream, Obstacle> {
        let (inbox, claimed) = (self.setup.inbox.clone(), file.claimed.clone());
        let source = blocking(move || inbox.open_rows(&claimed)).await?;
        let feed = &self.setup.feed;
        Ok(RowStream::new(source, RowParser::new(&feed.format, feed.settings.max_row).skip_rows(skip_rows)))
    }

    /// Blocks on their way to the outbox are not counted in its depth yet: together they stay below the
    /// high watermark, so that it is never exceeded twofold.
    fn block_rows(&self) -> usize {
        (self.setup.feed.backlog.high_watermark / 8).clamp(BLOCK_ROWS_MIN, BLOCK_ROWS_MAX) as usize
    }

    async fn insist<T, F>(&self, what: &'static str, operation: impl FnMut() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        insist(what, &*self.setup.clock, &self.setup.progress, operation).await
    }

    /// Reading pauses while the destinations hold too much: a file is its own buffer. An unknown backlog is waited for: the
    /// gate fails closed.
    async fn wait_for_room(&self) -> Result<(), PassError> {
        let ParserSetup { feed, outbox, held, .. } = &self.setup;
        while !self.is_draining() {
            let open = self.insist("reading the backlog", || outbox.open_messages()).await?;
            let destinations = feed.destinations.iter().map(|destination| &*destination.name);
            if held.allows(&feed.name, destinations, &feed.backlog, &open) {
                break;
            }
            tokio::time::sleep(WATERMARK_TICK).await;
        }
        Ok(())
    }

    async fn close(&self, file: &Arc<FileInProgress>, state: FileState) -> Result<(), PassError> {
        let permit = self.setup.blocks.clone().acquire_owned().await.map_err(|_| PassError::BatcherGone)?;
        let rows = ParsedRows {
            file: file.clone(),
            block: RowBlock::new(1),
            duplicates: Vec::new(),
            resume: Checkpoint::default(),
            read: START,
            end: Some(ReadEnd::Closed(state)),
            permit,
        };
        self.setup.batcher.send(rows).await.map_err(|_| PassError::BatcherGone)
    }
}

fn unmet_promise(file: &ClaimedFile, digest: &[u8; 32]) -> Option<FileState> {
    let promised = file.expected.as_ref()?.sha256.as_ref()?;
    let found = hex(digest);
    (*promised != found).then(|| {
        FileState::Failed(format!("its sidecar promises sha256 {promised}, its content has {found}"))
    })
}

fn check_unchanged(inbox: &dyn Inbox, claimed: &ClaimedFile) -> Result<(), Obstacle> {
    if inbox.is_unchanged(claimed)? {
        return Ok(());
    }
    let why = "it was changed after it was claimed; rows read before are delivered. Write files under a name that \
               starts with `.` and rename them when they are complete";
    Err(FileState::Failed(why.to_owned()).into())
}

fn find_duplicates(
    seen: &mut dyn Seen,
    layout: &RowLayout,
    block: &RowBlock,
    duplicates: &mut Vec<u64>,
) -> Result<(), Obstacle> {
    for (row, bytes) in block.iter() {
        let parts = layout.read(bytes).map_err(|error| FileState::Failed(error.to_string()))?;
        let is_new = seen.insert(parts.recipient).map_err(|error| Obstacle::NotNow(error.to_string()))?;
        if !is_new {
            duplicates.push(row.row);
        }
    }
    Ok(())
}
