use std::{
    collections::HashSet,
    ffi::OsString,
    io::{self, Read},
    path::{Path, PathBuf},
};

use async_trait::async_trait;

use crate::model::{
    conditions::Conditions,
    file::{FileReport, Reject},
    ids::FileId,
    time::UnixMs,
};

/// A regular file in the feed's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name in the directory.
    pub name: OsString,
    /// Its size.
    pub bytes: u64,
    /// When it or its `NAME.toml` last changed.
    pub modified: UnixMs,
    /// Whether it has a `NAME.done` sidecar.
    pub has_sidecar: bool,
}

/// One look at the directory.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// Files that may be taken once they are settled, sidecars and ignored names left out.
    pub candidates: Vec<Candidate>,
    /// Names that are refused and why: symlinks, FIFOs, devices, hard links (F26). They stay where they are.
    pub refused: Vec<(OsString, String)>,
    /// Whether there were more than `limit` names.
    pub truncated: bool,
}

/// What the directory's watch reported since the last call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InboxChange {
    /// Names that were renamed into place or closed after writing: complete without waiting.
    pub complete: Vec<OsString>,
    /// Whether something was missed (the kernel's queue overflowed), so that a scan is needed.
    pub rescan: bool,
}

/// What a `NAME.done` sidecar promises of its file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// SHA-256 of the file, lower-case hex.
    pub sha256: Option<String>,
    /// How many rows, the CSV header not counted.
    pub rows: Option<u64>,
}

/// A claimed file: it is in the state directory, in a directory of its own, where nobody drops anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimedFile {
    /// Its name when it was dropped.
    pub name: OsString,
    /// Where it is now.
    pub path: PathBuf,
    /// When it was claimed.
    pub claimed_at: UnixMs,
    /// Its size when it was claimed.
    pub bytes: u64,
    /// What its `NAME.done` promised, if it had one.
    pub expected: Option<Expected>,
    /// What its `NAME.toml` says, over what the feed's configuration says, if it had one.
    pub conditions: Option<Conditions>,
    /// Device, inode, size, mtime and ctime as they were after the claim; opaque to the stages.
    pub fingerprint: [u64; 5],
}

impl ClaimedFile {
    /// The claim's directory, which identifies the claim.
    pub fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    /// The name as readable text, bytes that are not UTF-8 replaced. Escape it before printing.
    pub fn display_name(&self) -> String {
        self.name.to_string_lossy().into_owned()
    }
}

/// Claims that nobody works on.
#[derive(Debug, Default)]
pub struct Unowned {
    /// Their files, oldest claim first.
    pub files: Vec<ClaimedFile>,
    /// The directory of every claim there is, taken or not.
    pub directories: HashSet<PathBuf>,
    /// Claims that can't be made sense of, and why: path and reason. They stay where they are, the others go on.
    pub troubles: Vec<(String, io::Error)>,
}

/// Why a file could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// It is gone: somebody else took it, or the dropper removed it.
    #[error("it is gone")]
    Gone,
    /// It is nothing that Postrider reads; it stays where it is.
    #[error("{0}")]
    Refused(String),
    /// This file can't be read, or not be moved, e.g. for want of permission (F28); report once, retry when it changes.
    #[error(transparent)]
    Unreadable(io::Error),
    /// No file can be taken now: no room, no file descriptors. Either the file is where it was, or it is among the
    /// claimed ones and [`Inbox::unowned`] finds it.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// One feed's directory and its claimed files. Every method but `changed` blocks: the stages call
/// them off the actors' threads.
#[async_trait]
pub trait Inbox: Send + Sync {
    /// Checks the directories, makes those that are ours, and says what is wrong with them (F58). Called before anything
    /// else, and again whenever something fails.
    fn prepare(&self) -> io::Result<()>;

    /// Waits until the directory changes. Cancelling it loses nothing but time.
    async fn changed(&self) -> io::Result<InboxChange>;

    /// Looks at up to `limit` names.
    fn scan(&self, limit: usize) -> io::Result<Scan>;

    /// Takes a file, with its sidecar if it has one: an atomic rename out of the dropper's reach. The
    /// kind is checked on what was taken, not on the name, so a swapped symlink is refused too.
    fn claim(&self, name: &OsString, now: UnixMs) -> Result<ClaimedFile, ClaimError>;

    /// The claims that nobody works on, whatever left them: an earlier run, a claim that failed half-way. `is_taken` says of
    /// a claim's directory whether somebody does. What a crash interrupted is repaired. Not to be called while a claim
    /// is being made.
    fn unowned(&self, is_taken: &dyn Fn(&Path) -> bool) -> io::Result<Unowned>;

    /// Opens the bytes as they were dropped, for the digest.
    ///
    /// Of this and all that reads: an error of kind `NotFound` says that the file is gone, `InvalidData` that its content
    /// can't be used. Any other is no verdict on the file: a disk that fails for a moment, no file descriptors.
    fn open_raw(&self, file: &ClaimedFile) -> io::Result<Box<dyn Read + Send>>;

    /// Opens the rows: decompressed by the name's ending (`.gz`, `.zst`) within the caps on ratio and
    /// size (F30, an error of kind `InvalidData` that says which cap), a `.rejects.csv` unpacked.
    fn open_rows(&self, file: &ClaimedFile) -> io::Result<Box<dyn Read + Send>>;

    /// An empty set of recipients for one pass over `file`, for `duplicates = "first"`. Its memory does
    /// not grow with the file (I8), and it leaves nothing behind when it is dropped.
    fn seen(&self, file: &ClaimedFile) -> io::Result<Box<dyn Seen>>;

    /// Whether the file is still what was claimed: same inode, size, mtime and ctime (F17).
    /// `NotFound` if it vanished (F32).
    fn is_unchanged(&self, file: &ClaimedFile) -> io::Result<bool>;

    /// Begins `NAME.rejects.csv` beside the place that `finish` will move the file to.
    fn rejects(&self, file: &ClaimedFile, report: &FileReport) -> io::Result<Box<dyn RejectSink>>;

    /// Moves the claimed file to `done/` or `failed/` (by the report's state) and writes
    /// `NAME.report.json` beside it, unless it is there already. The report is written before the file is moved, so a
    /// crash in between is repaired by calling it again. A file that vanished is not an error. Where the same bytes came
    /// before, the report has the earlier name, and the file's own report becomes final with the earlier one.
    fn finish(&self, file: &ClaimedFile, report: &FileReport) -> io::Result<()>;

    /// Replaces the reports of files that are finished, and of copies of them, when their last message has settled, and
    /// makes them durable.
    /// Returns those that could not be written, and why; they hold up no other.
    fn rewrite_reports(&self, reports: &[FileReport]) -> Vec<(FileId, io::Error)>;
}

/// The recipients that one pass over a file has met.
pub trait Seen: Send {
    /// Adds a recipient; whether it was new.
    fn insert(&mut self, recipient: &str) -> io::Result<bool>;
}

/// Where rejected rows are exported to.
pub trait RejectSink: Send {
    /// Appends rows.
    fn push(&mut self, rejects: &[Reject]) -> io::Result<()>;
    /// Makes the export visible under its name.
    fn finish(self: Box<Self>) -> io::Result<()>;
}
