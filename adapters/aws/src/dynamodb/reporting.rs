//! What is remembered for writing reports on files: see [`super::reports`].

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use postrider_actors::model::{ids::FileId, time::MonoMs};

use super::item::Item;

/// Files whose marks are remembered, and touched files: beyond that a full look finds them.
pub(super) const REMEMBERED_MAX: usize = 10_000;

/// What is remembered for writing reports.
#[derive(Default)]
pub(super) struct Reporting {
    /// Files that changed since they were last looked at, and their feeds if they are known.
    pub(super) touched: BTreeMap<FileId, Option<Arc<str>>>,
    /// How settled files stood when they were handed out.
    pub(super) marks: HashMap<FileId, String>,
    /// Settled files that were handed out and are not marked as reported yet.
    pub(super) unreported: BTreeMap<FileId, Arc<str>>,
    /// What this process has settled of files.
    pub(super) here: HashMap<FileId, SettledHere>,
    /// When each feed's open files were looked through, and where the next look goes on.
    pub(super) looks: HashMap<Arc<str>, (MonoMs, Option<Item>)>,
}

/// What this process knows of a file without a look.
#[derive(Default)]
pub(super) struct SettledHere {
    pub(super) settled: i64,
    pub(super) looked_at: Option<MonoMs>,
}

impl Reporting {
    pub(super) fn settled_here(&mut self, file: FileId, settled: i64) {
        if self.here.len() >= REMEMBERED_MAX {
            self.here.clear();
        }
        self.here.entry(file).or_default().settled += settled;
    }

    /// Takes note of a step of a file. `is_first`, at that time: nothing of it can have been settled before.
    pub(super) fn touch(&mut self, feed: Arc<str>, file: FileId, is_first: Option<MonoMs>) {
        self.insert(file, Some(feed));
        if is_first.is_some() {
            self.settled_here(file, 0);
            self.here.entry(file).or_default().looked_at = is_first;
        }
    }

    pub(super) fn insert(&mut self, file: FileId, feed: Option<Arc<str>>) {
        if self.touched.len() < REMEMBERED_MAX {
            let known = self.touched.entry(file).or_default();
            *known = feed.or_else(|| known.take());
        }
    }
}
