//! What a process remembers of the store, all of it bounded and none of it needed.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use postrider_actors::{
    model::{
        ids::FileId,
        ledger::Record,
        time::{MonoMs, UnixMs},
    },
    ports::Clock,
};

use super::{
    cache::lock,
    calls::Calls,
    cluster::ClusterCache,
    depth::Depth,
    entry_groups::GroupCache,
    expiring::{Closed, Expiring},
    files::StoredFile,
    index::IndexCount,
    item::Item,
    lane::{SettleCall, SettleLane},
    payload::PayloadCache,
    record::{Records, Stamp},
    reporting::Reporting,
    settings::DynamoSettings,
    store_time::StoreTime,
    waiting::WaitingList,
};

/// What the store's operations share.
pub(super) struct Shared {
    pub(super) calls: Calls,
    pub(super) settings: DynamoSettings,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) time: Arc<StoreTime>,
    pub(super) node: String,
    last_stamp: AtomicU64,
    waiting: Mutex<WaitingList>,
    /// What was counted of the index, and how long that stands.
    pub(super) counted: Mutex<Option<(MonoMs, IndexCount)>>,
    pub(super) sweep: tokio::sync::Mutex<Sweep>,
    pub(super) archive: tokio::sync::Mutex<ArchiveProgress>,
    pub(super) files: Mutex<HashMap<FileId, StoredFile>>,
    /// Files that another machine has been ahead with.
    pub(super) moved: Mutex<BTreeSet<FileId>>,
    pub(super) records: Mutex<Records>,
    pub(super) entries: Mutex<GroupCache>,
    pub(super) payloads: Mutex<PayloadCache>,
    pub(super) cluster: ClusterCache,
    /// The row from which on batches are yet to be ended of files that are cancelled or whose time is over, by file and
    /// destination.
    pub(super) ended_until: Mutex<HashMap<(FileId, String), u64>>,
    /// Files that are yet to be looked at for that when their time is over.
    pub(super) expiring: Mutex<Expiring>,
    /// Files that are to be done by a time and may be open.
    pub(super) timed: Mutex<BTreeSet<(UnixMs, FileId)>>,
    /// When no request may begin for a file at a destination, as workers here have found.
    pub(super) closed: Mutex<Closed>,
    /// Destinations that this process has made known.
    pub(super) registered: Mutex<BTreeSet<String>>,
    pub(super) depth: Depth,
    /// Appends of one file go one after the other, in the order in which they came.
    pub(super) appending: Vec<tokio::sync::Mutex<()>>,
    pub(super) settling: Mutex<Vec<SettleCall>>,
    /// Rung when there is more of it.
    pub(super) more_to_settle: tokio::sync::Notify,
    pub(super) lane: tokio::sync::Mutex<SettleLane>,
    pub(super) reporting: Mutex<Reporting>,
}

/// Where the sweeps stand.
#[derive(Default)]
pub(super) struct Sweep {
    pub(super) last: Option<MonoMs>,
    /// Too much stood in the index at the last sweep to be read whole.
    pub(super) is_large: bool,
}

/// Where the archiver goes on.
#[derive(Default)]
pub(super) struct ArchiveProgress {
    pub(super) shard: u32,
    pub(super) from: Option<Item>,
}

impl Shared {
    pub(super) fn new(
        calls: Calls,
        settings: DynamoSettings,
        clock: Arc<dyn Clock>,
        time: Arc<StoreTime>,
    ) -> Self {
        let node = settings.process.rsplit_once('-').map_or(&*settings.process, |(node, _)| node).to_owned();
        let depth = Depth::of(&node);
        Self {
            calls,
            settings,
            clock,
            time,
            node,
            last_stamp: AtomicU64::new(0),
            waiting: Mutex::default(),
            counted: Mutex::default(),
            sweep: tokio::sync::Mutex::default(),
            archive: tokio::sync::Mutex::default(),
            files: Mutex::default(),
            moved: Mutex::default(),
            records: Mutex::default(),
            entries: Mutex::default(),
            payloads: Mutex::default(),
            cluster: ClusterCache::default(),
            ended_until: Mutex::default(),
            expiring: Mutex::default(),
            timed: Mutex::default(),
            closed: Mutex::default(),
            registered: Mutex::default(),
            depth,
            appending: (0..64).map(|_| tokio::sync::Mutex::new(())).collect(),
            settling: Mutex::default(),
            more_to_settle: tokio::sync::Notify::new(),
            lane: tokio::sync::Mutex::default(),
            reporting: Mutex::default(),
        }
    }

    /// The wall clock in microseconds, moved on so that no two answers are alike and they only grow.
    pub(super) fn stamp(&self) -> u64 {
        let now = self.clock.wall().0.saturating_mul(1_000);
        let next = |last: u64| Some(now.max(last + 1));
        let last = self.last_stamp.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        now.max(last.expect("there is always a next one") + 1)
    }

    pub(super) fn waiting(&self) -> MutexGuard<'_, WaitingList> {
        lock(&self.waiting)
    }

    /// What is written with a change to `record`, at a stamp.
    pub(super) fn stamp_of(&self, record: &Record, at: u64) -> Stamp<'_> {
        let due = record.due().unwrap_or_default().max(self.store_now());
        Stamp { at, look_at: due.after(self.settings.grace), owner: &self.settings.process }
    }

    /// What the store's clock shows now.
    pub(super) fn store_now(&self) -> UnixMs {
        self.time.at(self.clock.wall())
    }
}
