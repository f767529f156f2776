use std::{fmt, sync::Arc};

use actix::Message;
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    model::{
        file::{Checkpoint, ReadEnd},
        formats::{Position, RowBlock},
    },
    reading::FileInProgress,
};

/// A stretch of a file's rows, in order. From a parser to its feed's batcher.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ParsedRows {
    /// The file.
    pub file: Arc<FileInProgress>,
    /// The rows.
    pub block: RowBlock,
    /// Row numbers that were left out as duplicates.
    pub duplicates: Vec<u64>,
    /// What the outbox had when this reading began: rows up to there are not appended again.
    pub resume: Checkpoint,
    /// How far the file is read with this stretch.
    pub read: Position,
    /// How reading has ended, with the last stretch.
    pub end: Option<ReadEnd>,
    /// Bounds the rows between the parser and the outbox.
    pub permit: OwnedSemaphorePermit,
}

impl fmt::Debug for ParsedRows {
    /// Counts, never rows (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParsedRows")
            .field("file", &self.file.record.id)
            .field("rows", &self.block.rows.len())
            .field("read", &self.read)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}
