//! The watch on a feed's directory: inotify, awaited.

use std::{
    io,
    path::{Path, PathBuf},
};

use futures_util::{FutureExt, StreamExt};
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchMask};
use postrider_actors::{model::stable::NameKind, ports::InboxChange};
use tokio::sync::Mutex;

use super::dir::{escaped, while_doing};

/// Room for the events of one read: 2000 of usual names, 200 of the longest.
const EVENT_BYTES: usize = 64 * 1024;

/// What bounds one answer.
const NAMES_MAX: usize = 4096;

/// A watch that is set up when it is first awaited, and again after an error.
pub(super) struct DirWatch {
    directory: PathBuf,
    events: Mutex<Option<EventStream<Vec<u8>>>>,
}

impl DirWatch {
    pub(super) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), events: Mutex::new(None) }
    }

    /// Waits for a change. The first answer of a new watch asks for a scan: nobody looked before.
    pub(super) async fn changed(&self) -> io::Result<InboxChange> {
        let mut events = self.events.lock().await;
        let Some(stream) = events.as_mut() else {
            *events = Some(self.set_up()?);
            return Ok(InboxChange { complete: Vec::new(), rescan: true });
        };
        let change = next(stream).await;
        if change.is_err() {
            *events = None;
        }
        change
            .map_err(|error| while_doing(error, format_args!("feed directory {}", escaped(&self.directory))))
    }

    fn set_up(&self) -> io::Result<EventStream<Vec<u8>>> {
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR
            // A file that was unlinked while it was written is ignored.
            | WatchMask::EXCL_UNLINK;
        let set_up = || {
            let inotify = Inotify::init()?;
            inotify.watches().add(&self.directory, mask)?;
            inotify.into_event_stream(vec![0; EVENT_BYTES])
        };
        set_up().map_err(|error| while_doing(error, format_args!("can't watch {}", escaped(&self.directory))))
    }
}

/// Waits for an event that concerns us and takes those that came with it. An event that was read is in the
/// answer before the next await, so cancelling loses none.
async fn next(events: &mut EventStream<Vec<u8>>) -> io::Result<InboxChange> {
    let mut change = InboxChange::default();
    loop {
        let event = if change == InboxChange::default() {
            events.next().await
        } else if change.complete.len() < NAMES_MAX
            && let Some(event) = events.next().now_or_never()
        {
            event
        } else {
            return Ok(change);
        };
        let event = event.unwrap_or_else(|| Err(io::Error::other("the watch has ended")))?;
        note(&event, &mut change)?;
    }
}

fn note(event: &EventOwned, change: &mut InboxChange) -> io::Result<()> {
    let gone = |text| Err(io::Error::new(io::ErrorKind::NotFound, text));
    // The kernel dropped events: only a scan finds what came (F29).
    if event.mask.contains(EventMask::Q_OVERFLOW) {
        change.rescan = true;
    } else if event.mask.contains(EventMask::MOVE_SELF) {
        return gone("it was moved away");
    } else if event.mask.intersects(EventMask::DELETE_SELF | EventMask::IGNORED | EventMask::UNMOUNT) {
        return gone("it was deleted or unmounted");
    } else if let Some(name) = &event.name
        && !event.mask.contains(EventMask::ISDIR)
        && NameKind::of(name) != NameKind::Ignored
    {
        change.complete.push(name.clone());
    }
    Ok(())
}
