//! What the parts of a source that reads a directory share.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use postrider_actors::{
    model::receipt_format::{ReceiptFileFormat, ReceiptFormat},
    ports::{Clock, Inbox},
};
use postrider_settings::Directory;

/// How a directory of receipts is read.
#[derive(Clone, Debug)]
pub struct DirReceiptsSettings {
    /// The destination whose messages its receipts are about; for the reports.
    pub destination: Arc<str>,
    /// What the files are made of.
    pub kind: ReceiptFileFormat,
    /// The longest line, in bytes.
    pub line_bytes_max: usize,
    /// The most receipts of one scan; at least 1.
    pub receipts_max: usize,
    /// When a file is complete, and how often the directory is looked at.
    pub directory: Directory,
    /// How long a poll waits for a running scan; then it brings nothing.
    pub look_max: Duration,
}

/// What reading one directory needs, whoever reads.
pub(super) struct Shared {
    pub(super) inbox: Arc<dyn Inbox>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) format: ReceiptFormat,
    pub(super) settings: DirReceiptsSettings,
    /// Nobody polls any more: running work ends.
    pub(super) given_up: AtomicBool,
}

impl Shared {
    /// Ends what reads on and on: the process, or a reload, does not wait for it.
    pub(super) fn check_wanted(&self) -> io::Result<()> {
        if self.given_up.load(Ordering::Relaxed) {
            Err(io::Error::other("nobody asks any more"))
        } else {
            Ok(())
        }
    }
}
