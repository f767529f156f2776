//! What the stages of one feed share about the feed and about a file that is being read.

use std::{
    collections::HashSet,
    fmt,
    io::{self, Read},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use postrider_settings::{Canary, Directory, Feed, Outbox};
use tokio::sync::{Notify, OwnedSemaphorePermit};

use crate::{
    flow::Owner,
    messages::{FileClosed, Inlet},
    model::{
        batch::{BatchHeader, RowLayout},
        builder::BatchLimits,
        conditions::Conditions,
        file::FileRecord,
        formats::{FileError, Format, RowBlock, RowParser},
        ids::FileId,
        rendering::BodyChecks,
    },
    ports::ClaimedFile,
};

/// Bytes read and parsed in one go: long enough that hops between threads don't count, short enough
/// that a drain waits for milliseconds.
pub const BLOCK_BYTES: usize = 64 * 1024;

/// Why a file's rows can't be read further.
#[derive(Debug, thiserror::Error)]
pub enum RowsError {
    /// Its bytes can't be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is not what its feed reads.
    #[error(transparent)]
    File(#[from] FileError),
    /// A row does not end.
    #[error("a row is longer than any row may be")]
    Overlong,
}

/// Where a feed's messages go, with the parts of the destination that a batch carries along (I4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedDestination {
    /// The destination's name.
    pub name: Arc<str>,
    /// The body template's source; `None` is the default body.
    pub template: Option<String>,
    /// The body's content type.
    pub content_type: String,
}

impl FeedDestination {
    /// The header of the batches of `file` for it.
    pub fn header(&self, file: &FileRecord, layout: &RowLayout) -> Arc<BatchHeader> {
        Arc::new(BatchHeader {
            feed: file.feed.clone(),
            destination: self.name.to_string(),
            file: file.id,
            layout: layout.clone(),
            template: self.template.clone(),
            content_type: self.content_type.clone(),
            terms: file.terms.clone(),
            priority: file.priority,
        })
    }
}

/// What the stages of a feed are given about it.
#[derive(Clone, Debug)]
pub struct FeedSettings {
    /// Its name.
    pub name: Arc<str>,
    /// `[feeds.NAME]`, what all feeds have in common.
    pub settings: Feed,
    /// `[feeds.NAME]`, what a directory has.
    pub directory: Directory,
    /// How its files are written.
    pub format: Format,
    /// Where every accepted row goes.
    pub destinations: Vec<FeedDestination>,
    /// When its files' messages may go.
    pub conditions: Conditions,
    /// The limits of a batch.
    pub batch: BatchLimits,
    /// `[canary]`.
    pub canary: Canary,
    /// `[outbox]`: when reading pauses.
    pub backlog: Outbox,
}

/// A claimed file whose identity is known. Dropping the last reference frees its places.
pub struct FileInProgress {
    /// Its record.
    pub record: Arc<FileRecord>,
    /// Its state.
    pub claimed: ClaimedFile,
    /// Who moves it away when it is closed.
    pub watcher: Inlet<FileClosed>,
    /// The right to work on it.
    pub owner: Owner,
    headers: OnceLock<Vec<Arc<BatchHeader>>>,
    _permit: OwnedSemaphorePermit,
    _sole: SoleReader,
}

impl FileInProgress {
    /// A file in progress; `permit` is its place among them, `sole` the right to read its content.
    pub fn new(
        record: FileRecord,
        claimed: ClaimedFile,
        watcher: Inlet<FileClosed>,
        owner: Owner,
        permit: OwnedSemaphorePermit,
        sole: SoleReader,
    ) -> Self {
        Self {
            record: Arc::new(record),
            claimed,
            watcher,
            owner,
            headers: OnceLock::new(),
            _permit: permit,
            _sole: sole,
        }
    }

    /// The headers of this file's batches, one per destination, made from the layout that the first
    /// accepted row had.
    pub fn make_headers(&self, feed: &FeedSettings, layout: &RowLayout) -> &[Arc<BatchHeader>] {
        self.headers.get_or_init(|| {
            let of_file = |destination: &&FeedDestination| {
                self.record.destinations.iter().any(|name| **name == *destination.name)
            };
            let of_file = feed.destinations.iter().filter(of_file);
            of_file.map(|destination| destination.header(&self.record, layout)).collect()
        })
    }
}

impl FileInProgress {
    /// The headers, empty until a layout is known.
    pub fn headers(&self) -> &[Arc<BatchHeader>] {
        self.headers.get().map_or(&[], Vec::as_slice)
    }
}

impl fmt::Debug for FileInProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileInProgress").field("id", &self.record.id).finish_non_exhaustive()
    }
}

/// Sees to it that two copies of one content are never read at once: their batches could be cut
/// at different rows, and the overlap would be sent twice.
#[derive(Clone, Debug, Default)]
pub struct Readers {
    reading: Arc<Mutex<HashSet<FileId>>>,
    done: Arc<Notify>,
}

impl Readers {
    /// Waits until nobody else reads `id`. The wait ends with the other reader's file.
    pub async fn enter(&self, id: FileId) -> SoleReader {
        loop {
            let done = self.done.notified();
            if self.reading.lock().unwrap_or_else(PoisonError::into_inner).insert(id) {
                return SoleReader { id, readers: self.clone() };
            }
            done.await;
        }
    }
}

/// The right to read one content.
#[derive(Debug)]
pub struct SoleReader {
    id: FileId,
    readers: Readers,
}

impl Drop for SoleReader {
    fn drop(&mut self) {
        self.readers.reading.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
        self.readers.done.notify_waiters();
    }
}

/// A file's rows, read and parsed block by block: a source, and the bytes of it that are not parsed yet.
pub struct RowStream {
    source: Box<dyn Read + Send>,
    parser: RowParser,
    buffer: Vec<u8>,
    start: usize,
    filled: usize,
    ended: bool,
}

impl RowStream {
    /// The rows that `parser` finds in `source`.
    pub fn new(source: Box<dyn Read + Send>, parser: RowParser) -> Self {
        let capacity = BLOCK_BYTES.max(parser.input_bytes_min());
        Self { source, parser, buffer: vec![0; capacity], start: 0, filled: 0, ended: false }
    }

    /// Rejects rows whose bodies can't be made.
    #[must_use]
    pub fn checking(mut self, bodies: BodyChecks) -> Self {
        self.parser = self.parser.checking(bodies);
        self
    }

    /// What parses it.
    pub fn parser(&self) -> &RowParser {
        &self.parser
    }

    /// Parses about [`BLOCK_BYTES`] more. Whether the file has ended; `Err` if it can't be read further: the rows before
    /// that are in `block` all the same.
    pub fn next_block(&mut self, block: &mut RowBlock) -> Result<bool, RowsError> {
        let mut parsed = 0;
        while parsed < BLOCK_BYTES && !block.is_full() {
            if !self.ended {
                self.fill()?;
            }
            let input = &self.buffer[self.start..self.filled];
            let consumed = self.parser.parse(input, self.ended, block)?;
            self.start += consumed;
            parsed += consumed;
            if self.ended && self.start == self.filled {
                return Ok(true);
            }
            if consumed == 0 && !block.is_full() {
                // The buffer holds `input_bytes_min`, with which the parser promises progress.
                return Err(RowsError::Overlong);
            }
        }
        Ok(false)
    }

    fn fill(&mut self) -> io::Result<()> {
        self.buffer.copy_within(self.start..self.filled, 0);
        self.filled -= self.start;
        self.start = 0;
        while self.filled < self.buffer.len() {
            match self.source.read(&mut self.buffer[self.filled..]) {
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(len) => self.filled += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
