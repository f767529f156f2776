//! One claimed file that is being read.

use std::{
    collections::BTreeMap,
    io::{self, Read},
};

use postrider_actors::{
    model::{
        file::{FileRecord, FileReport, FileState},
        ids::{FileId, hex},
        priority::Priority,
        receipt_format::{ReadReceipts, ReceiptRows},
        terms::Terms,
    },
    ports::{AckId, ClaimedFile, SourceCursor},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::shared::Shared;

/// How much is read at once, beside the longest line.
const READ_BYTES: usize = 64 << 10;

/// How far the directory is read, as a cursor keeps it: everything before the claim is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileCursor {
    /// The claim's name: it stays the same until the file is moved away.
    claim: String,
    /// Rows that were taken.
    rows: u64,
    /// How many of them were rejected.
    rejected: u64,
}

impl FileCursor {
    /// `None` for a cursor that says nothing here: the claims are read from their beginnings, and the inbox
    /// knows what it has.
    pub(super) fn read(cursor: &SourceCursor) -> Option<Self> {
        serde_json::from_str(&cursor.0).ok()
    }

    pub(super) fn cursor(&self) -> SourceCursor {
        SourceCursor(serde_json::to_string(self).expect("a text and two numbers"))
    }
}

/// A file that is being read.
pub(super) struct OpenFile {
    file: ClaimedFile,
    sha256: [u8; 32],
    position: FileCursor,
    /// Why it can't be read at all.
    unusable: Option<FileState>,
    reader: Box<dyn Read + Send>,
    rows: ReceiptRows,
    buffer: Vec<u8>,
    filled: usize,
    is_end: bool,
}

impl OpenFile {
    /// Opens a claim, behind `position` if that is in it.
    pub(super) fn open(file: ClaimedFile, position: Option<FileCursor>, shared: &Shared) -> io::Result<Self> {
        let claim = file.path.parent().and_then(|home| home.file_name()).unwrap_or(&file.name);
        let claim = claim.to_string_lossy().into_owned();
        let position = match position {
            Some(position) if position.claim == claim => position,
            _ => FileCursor { claim, rows: 0, rejected: 0 },
        };
        let (mut sha256, mut unusable) = ([0; 32], None);
        let mut reader: Box<dyn Read + Send> = Box::new(io::empty());
        match digest(&file, shared) {
            Ok(digest) => sha256 = digest,
            Err(error) => unusable = Some(judge(error)?),
        }
        match shared.inbox.open_rows(&file) {
            Ok(rows) => reader = rows,
            Err(error) => unusable = Some(judge(error)?),
        }
        let promised = file.expected.as_ref().and_then(|expected| expected.sha256.as_ref());
        if unusable.is_none()
            && let Some(promised) = promised
            && *promised != hex(&sha256)
        {
            let reason = format!("its sidecar promises the SHA-256 {promised}, it has {}", hex(&sha256));
            unusable = Some(FileState::Failed(reason));
        }
        let name = file.display_name().escape_debug().to_string();
        let settings = &shared.settings;
        let rows = ReceiptRows::new(shared.format.clone(), settings.kind, name, settings.line_bytes_max)
            .skip_rows(position.rows);
        let buffer = vec![0; rows.input_bytes_min().max(READ_BYTES)];
        Ok(Self { file, sha256, position, unusable, reader, rows, buffer, filled: 0, is_end: false })
    }

    /// It.
    pub(super) fn file(&self) -> &ClaimedFile {
        &self.file
    }

    /// Its name, for the operator.
    pub(super) fn name(&self) -> String {
        self.file.display_name()
    }

    /// How far it is read.
    pub(super) fn position(&self) -> &FileCursor {
        &self.position
    }

    /// Reads the next receipts; with them, what became of the file if that was its end.
    pub(super) fn read(&mut self, shared: &Shared) -> io::Result<(ReadReceipts, Option<FileState>)> {
        let mut read = ReadReceipts::default();
        let end = match self.unusable.take() {
            Some(state) => Some(state),
            None => self.read_rows(shared, &mut read)?,
        };
        // Rows that are left out because they were taken before are counted too.
        self.position.rows = self.position.rows.max(self.rows.rows());
        self.position.rejected += read.rejects.len() as u64;
        let end = match end {
            Some(FileState::Ingested) => Some(self.judge_whole(shared)?),
            end => end,
        };
        if let Some(reason) = end.as_ref().and_then(FileState::reason) {
            let place = self.name().escape_debug().to_string();
            // By its content and what is wrong with it: the same file again is the same reject.
            let text = [&self.sha256[..], reason.as_bytes()].concat();
            read.rejects.push(shared.format.reject_file(&text, place, reason.to_owned()));
        }
        Ok((read, end))
    }

    fn read_rows(&mut self, shared: &Shared, read: &mut ReadReceipts) -> io::Result<Option<FileState>> {
        let receipts_max = shared.settings.receipts_max.max(1);
        loop {
            shared.check_wanted()?;
            let input = &self.buffer[..self.filled];
            let consumed = match self.rows.read(input, self.is_end, receipts_max, read) {
                Ok(consumed) => consumed,
                Err(error) => return Ok(Some(FileState::Failed(error.to_string()))),
            };
            self.buffer.copy_within(consumed..self.filled, 0);
            self.filled -= consumed;
            if self.is_end && self.filled == 0 {
                return Ok(Some(FileState::Ingested));
            }
            if read.is_full(receipts_max) {
                return Ok(None);
            }
            match self.reader.read(&mut self.buffer[self.filled..]) {
                Ok(0) => self.is_end = true,
                Ok(bytes) => self.filled += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return judge(error).map(Some),
            }
        }
    }

    /// What there is to say of a file whose end was reached.
    fn judge_whole(&self, shared: &Shared) -> io::Result<FileState> {
        let FileCursor { rows, rejected, .. } = self.position;
        let promised = self.file.expected.as_ref().and_then(|expected| expected.rows);
        let failed = match (shared.inbox.is_unchanged(&self.file), promised) {
            (Err(error), _) => return judge(error),
            // F17: whoever still writes to it may have written what nobody will read.
            (Ok(false), _) => "it changed after it was claimed: drop it again as a new file".to_owned(),
            (_, Some(promised)) if promised != rows => {
                format!("its sidecar promises {promised} rows, it has {rows}")
            }
            _ if rows > 0 && rejected == rows => {
                format!("none of its {rows} receipts can be read; the ledger has the reasons")
            }
            _ => return Ok(FileState::Ingested),
        };
        Ok(FileState::Failed(failed))
    }

    /// What is needed to move it away.
    pub(super) fn into_finished(self, state: FileState, shared: &Shared) -> (AckId, ClaimedFile, FileReport) {
        let Self { file, sha256, position, .. } = self;
        let source = shared.format.source();
        let now = shared.clock.wall();
        let report = FileReport {
            file: FileRecord {
                id: FileId::derive(source, &sha256),
                feed: source.to_string(),
                name: file.display_name(),
                bytes: file.bytes,
                sha256: hex(&sha256),
                claimed_at: file.claimed_at,
                destinations: vec![shared.settings.destination.to_string()],
                terms: Terms::default(),
                priority: Priority::Normal,
            },
            state,
            closed_at: Some(now),
            settled_at: Some(now),
            rows: position.rows,
            rejected: position.rejected,
            duplicates: 0,
            // Receipts are no messages: nothing is sent or dead because of them.
            destinations: BTreeMap::new(),
            held: BTreeMap::new(),
            priorities: BTreeMap::new(),
            failures: BTreeMap::new(),
        };
        (AckId(position.claim.into()), file, report)
    }
}

/// SHA-256 of the file as it was dropped.
fn digest(file: &ClaimedFile, shared: &Shared) -> io::Result<[u8; 32]> {
    let mut raw = shared.inbox.open_raw(file)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; READ_BYTES]);
    loop {
        shared.check_wanted()?;
        match raw.read(&mut buffer) {
            Ok(0) => return Ok(hash.finalize().into()),
            Ok(bytes) => hash.update(&buffer[..bytes]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// What an error makes of a file; one that may pass is returned.
fn judge(error: io::Error) -> io::Result<FileState> {
    match error.kind() {
        // Damaged, or beyond a cap on decompression (F30).
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => {
            Ok(FileState::Failed(error.to_string()))
        }
        io::ErrorKind::NotFound => Ok(FileState::SourceLost("it vanished while it was read".to_owned())),
        _ => Err(error),
    }
}
