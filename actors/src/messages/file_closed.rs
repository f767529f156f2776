use std::sync::Arc;

use actix::Message;

use crate::reading::FileInProgress;

/// Every row of a file is recorded in the outbox, or the file is given up: it can be moved away. From
/// the batcher to the feed's file watcher.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct FileClosed {
    /// The file.
    pub file: Arc<FileInProgress>,
}
