use actix::Message;
use tokio::sync::OwnedSemaphorePermit;

use super::{FileClosed, Inlet};
use crate::{
    flow::{Owner, Slot},
    ports::ClaimedFile,
};

/// A file is ours and wants to be read. From the file watcher to a parser.
#[derive(Message)]
#[rtype(result = "()")]
pub struct FileClaimed {
    /// The file.
    pub file: ClaimedFile,
    /// The right to work on it: held until it is moved to `done/` or `failed/`, or set aside.
    pub owner: Owner,
    /// Who moves it away when it is closed.
    pub watcher: Inlet<FileClosed>,
    /// The parser's place: held while the file is read.
    pub slot: Slot,
    /// The file's place among those in progress: held until it is moved to `done/` or `failed/`.
    pub permit: OwnedSemaphorePermit,
}
