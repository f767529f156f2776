//! Which files' time is over, and when no request may begin.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    sync::Arc,
};

use postrider_actors::model::{file::FileRecord, ids::FileId, time::UnixMs};

/// Files whose times this process remembers. Those beyond are met again when open files are looked through.
pub(super) const EXPIRING_MAX: usize = 100_000;

/// When no request may begin for a file at a destination.
pub(super) type Closed = HashMap<(FileId, Arc<str>), Range<UnixMs>>;

/// Files whose time is or will be over with messages open, by when.
#[derive(Default)]
pub(super) struct Expiring {
    by_time: BTreeSet<(UnixMs, FileId)>,
    files: BTreeMap<FileId, (UnixMs, Vec<String>)>,
}

impl Expiring {
    pub(super) fn insert(&mut self, file: &FileRecord, at: UnixMs) {
        if self.files.len() < EXPIRING_MAX && !self.files.contains_key(&file.id) {
            self.files.insert(file.id, (at, file.destinations.clone()));
            self.by_time.insert((at, file.id));
        }
    }

    pub(super) fn remove(&mut self, id: FileId) {
        if let Some((at, _)) = self.files.remove(&id) {
            self.by_time.remove(&(at, id));
        }
    }

    /// Those whose time is over, and where they go.
    pub(super) fn over(&self, now: UnixMs) -> Vec<(FileId, Vec<String>)> {
        let over = self.by_time.iter().take_while(|(at, _)| *at <= now);
        over.map(|(_, id)| (*id, self.files[id].1.clone())).collect()
    }
}
