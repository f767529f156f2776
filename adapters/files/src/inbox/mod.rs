//! A feed's directory as an [`Inbox`].
//!
//! ```text
//! <feed>/NAME                             dropped
//! <feed>/NAME.done, NAME.toml             its sidecars, if it has any
//! <state>/claimed/<feed>/<claim>/NAME     ours; `.claim` beside it says what it was when we took it
//! <feed>/done/NAME                        read, with NAME.report.json and, if need be, NAME.rejects.csv
//! <feed>/failed/NAME                      not usable, the same beside it
//! <feed>/.postrider/<claim>/NAME          on its way, if the state directory is on another file system
//! ```
//!
//! Claims are renames without a sync: what the dropper did not sync was never promised to last, and a
//! claim that a power cut undoes is made again, with the same ids. Only a copy to another file system
//! is synced, because the original is removed after it.
//!
//! A file that was moved is claimed, whatever fails after that: a claim without a note is as good as one with it, and what
//! is left half-way in `claimed/` or `.postrider/` is found by the next [`Inbox::unowned`], while the daemon runs.

mod claim;
mod dir;
mod finish;
mod page;
mod rejects;
mod rows;
mod scan;
mod seen;
mod sidecar;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    ffi::{OsStr, OsString},
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Mutex,
    sync::atomic::AtomicU64,
};

use async_trait::async_trait;
use postrider_actors::{
    model::{
        conditions::Conditions,
        file::FileReport,
        formats::{Format, RowBlock, RowParser},
        ids::FileId,
        time::UnixMs,
    },
    ports::{ClaimError, ClaimedFile, Inbox, InboxChange, RejectSink, Scan, Seen, Unowned},
};
use postrider_settings::Directory;
use rustix::fs::{Mode, OFlags, Stat};

use dir::{Dir, escaped, while_doing};
pub use finish::reported;

/// Ends the name of the sidecar that says that a file is complete.
const DONE: &str = ".done";

/// Ends the name of the sidecar that says when a file's messages may go.
pub const TERMS: &str = ".toml";

/// What one of those may take.
pub const TERMS_BYTES_MAX: u64 = 16 * 1024;

/// In the state directory: the claims of all feeds.
const CLAIMED: &str = "claimed";

/// What a [`DirectoryInbox`] is made from.
#[derive(Clone, Debug)]
pub struct InboxConfig {
    /// The feed's name; a directory is named after it.
    pub feed: String,
    /// `[feeds.NAME]`, what a directory has.
    pub settings: Directory,
    /// `state.dir`.
    pub state_dir: PathBuf,
    /// What the files are made of.
    pub format: Format,
    /// `feeds.NAME.max_row`.
    pub max_row: usize,
    /// When messages of its files may go, where a file's `NAME.toml` says nothing else.
    pub conditions: Conditions,
}

/// One feed's directory and its claimed files.
pub struct DirectoryInbox {
    config: InboxConfig,
    watch: watch::DirWatch,
    /// A scan that was cut short, to be continued by the next.
    walk: Mutex<Option<rustix::fs::Dir>>,
    /// Numbers claims of the same millisecond.
    claims: AtomicU64,
}

impl DirectoryInbox {
    /// Looks at nothing yet: [`Inbox::prepare`] does.
    pub fn new(config: InboxConfig) -> Self {
        Self {
            watch: watch::DirWatch::new(&config.settings.path),
            walk: Mutex::new(None),
            claims: AtomicU64::new(0),
            config,
        }
    }

    /// Opened each time: the directory may have been replaced.
    fn directory(&self) -> io::Result<Dir> {
        Dir::open(&self.config.settings.path)
    }

    /// The directory of this feed's claims. Opened each time for the same reason.
    fn claimed(&self) -> io::Result<Dir> {
        Dir::open(&self.config.state_dir)?.child(CLAIMED)?.child(&self.config.feed)
    }

    /// The header line of a CSV file, unchanged; `None` for other formats, and for a file that has none
    /// or is gone.
    fn header(&self, file: &ClaimedFile) -> io::Result<Option<Vec<u8>>> {
        if !matches!(self.config.format, Format::Csv { .. }) {
            return Ok(None);
        }
        let mut rows = match self.open_rows(file) {
            Ok(rows) => rows,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut parser = RowParser::new(&self.config.format, self.config.max_row);
        let mut block = RowBlock::new(1);
        let mut buffer = vec![0; parser.input_bytes_min()];
        let (mut filled, mut end) = (0, false);
        while !end && parser.header().is_none() {
            let read = match rows.read(&mut buffer[filled..]) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Damage behind the header is the file's own story.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
                Err(error) => return Err(error),
            };
            end = read == 0;
            filled += read;
            let Ok(consumed) = parser.parse(&buffer[..filled], end, &mut block) else { return Ok(None) };
            buffer.copy_within(consumed..filled, 0);
            filled -= consumed;
        }
        Ok(parser.header().map(<[u8]>::to_vec))
    }
}

#[async_trait]
impl Inbox for DirectoryInbox {
    fn prepare(&self) -> io::Result<()> {
        let feed = &self.config.feed;
        if feed.is_empty() || feed.starts_with('.') || feed.bytes().any(|byte| byte == b'/' || byte == 0) {
            let text = format!("feed {feed:?} can't have a directory of its name");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let directory = self.directory()?;
        directory.check_writable()?;
        for name in ["done", "failed"] {
            directory.make_child(name, 0o755)?.check_writable()?;
        }
        match directory.child(claim::STAGING) {
            Ok(staging) => staging.check_writable()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // made when it is needed
            Err(error) => return Err(error),
        }
        // Nobody but us looks into the state directory: what is claimed can't be swapped.
        let state = Dir::open(&self.config.state_dir)?;
        state.make_child(CLAIMED, 0o700)?.make_child(feed, 0o700)?.check_writable()
    }

    async fn changed(&self) -> io::Result<InboxChange> {
        self.watch.changed().await
    }

    fn scan(&self, limit: usize) -> io::Result<Scan> {
        scan::scan(self, limit)
    }

    fn claim(&self, name: &OsString, now: UnixMs) -> Result<ClaimedFile, ClaimError> {
        claim::claim(self, name, now)
    }

    fn unowned(&self, is_taken: &dyn Fn(&Path) -> bool) -> io::Result<Unowned> {
        claim::unowned(self, is_taken)
    }

    fn open_raw(&self, file: &ClaimedFile) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(open_claimed(file)?))
    }

    fn open_rows(&self, file: &ClaimedFile) -> io::Result<Box<dyn Read + Send>> {
        let raw = open_claimed(file)?;
        if file.name.as_bytes().ends_with(b".rejects.csv") {
            return rejects::unpack(raw);
        }
        rows::unpack(&file.name, raw, &self.config.settings)
    }

    fn seen(&self, file: &ClaimedFile) -> io::Result<Box<dyn Seen>> {
        // In the claim's own directory: on a real disk, and cleared away with it.
        Ok(Box::new(seen::SeenOnDisk::new(&file.directory().join(".seen"))?))
    }

    fn is_unchanged(&self, file: &ClaimedFile) -> io::Result<bool> {
        let stat = rustix::fs::lstat(&file.path).map_err(|error| while_doing(error, escaped(&file.path)))?;
        Ok(fingerprint(&stat) == file.fingerprint)
    }

    fn rejects(&self, file: &ClaimedFile, report: &FileReport) -> io::Result<Box<dyn RejectSink>> {
        let dir = finish::target(self, report)?;
        let place = finish::reserve(&dir, &finish::as_dropped(file, report))?;
        let header = self.header(file)?;
        Ok(Box::new(rejects::RejectFile::new(dir, place.rejects(), header.as_deref())?))
    }

    fn finish(&self, file: &ClaimedFile, report: &FileReport) -> io::Result<()> {
        finish::finish(self, file, report)
    }

    fn rewrite_reports(&self, reports: &[FileReport]) -> Vec<(FileId, io::Error)> {
        finish::rewrite_reports(self, reports)
    }
}

fn open_claimed(file: &ClaimedFile) -> io::Result<std::fs::File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(&file.path, flags, Mode::empty())
        .map(Into::into)
        .map_err(|error| while_doing(error, escaped(&file.path)))
}

fn fingerprint(stat: &Stat) -> [u64; 5] {
    [
        stat.st_dev,
        stat.st_ino,
        stat.st_size as u64,
        nanos(stat.st_mtime, stat.st_mtime_nsec),
        changed_nanos(stat),
    ]
}

/// When a file last changed in content, owner, permissions or name. Unlike its mtime nobody can set it, and
/// a file whose permissions were fixed counts as changed (F28).
fn changed_nanos(stat: &Stat) -> u64 {
    nanos(stat.st_ctime, stat.st_ctime_nsec)
}

fn nanos(seconds: i64, nanos: u64) -> u64 {
    u64::try_from(seconds).unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// The sidecar of a file with this ending.
fn sidecar_name(name: &OsStr, ending: &str) -> OsString {
    let mut sidecar = name.to_owned();
    sidecar.push(ending);
    sidecar
}
