//! What a process remembers of the store, all of it bounded and none of it needed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    hash::Hash,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aws_sdk_dynamodb::types::TransactWriteItem;
use postrider_actors::{
    model::{
        ids::{BatchId, FileId},
        ledger::Record,
        time::{MonoMs, UnixMs},
    },
    ports::{Clock, StoreError},
};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{
    DynamoSettings,
    calls::{Calls, ledger_key},
    change::{Change, When},
    due::{Counted, Sweep},
    files::StoredFile,
    item::{DISABLED_AT, MESSAGES, REASON, Reading, SK, TOPIC, number, text},
    record::{Known, Stamp},
    schema,
    settle::{Call, Lane},
    store_time::StoreTime,
    waiting::WaitingList,
};

/// Append transactions in flight at once. Each changes a depth counter of its own, or they would refuse each
/// other.
const SLOTS: u32 = 16;

/// How old the depth may be, but for what this process has changed in it: that is counted at once.
const DEPTH_AGE_MAX: Duration = Duration::from_secs(15);

/// How old the list of disabled destinations may be, but for what this process has changed in it.
const DISABLED_AGE_MAX: Duration = Duration::from_secs(10);

/// Entries of each cache.
const CACHED_MAX: usize = 4096;

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
    pub(super) counted: Mutex<Option<(MonoMs, Counted)>>,
    pub(super) sweep: tokio::sync::Mutex<Sweep>,
    pub(super) archive: tokio::sync::Mutex<super::archive::Progress>,
    files: Mutex<Cache<FileId, StoredFile>>,
    /// Files that another machine has been ahead with.
    moved: Mutex<BTreeSet<FileId>>,
    records: Mutex<Known>,
    pub(super) payloads: Mutex<super::payload::Remembered>,
    disabled: Mutex<Option<(MonoMs, Names)>>,
    /// Destinations that this process has made known.
    registered: Mutex<BTreeSet<String>>,
    depth: Mutex<Depth>,
    slots: Semaphore,
    free_slots: Mutex<Vec<u32>>,
    /// Appends of one file go one after the other, in the order in which they came.
    pub(super) appending: Vec<tokio::sync::Mutex<()>>,
    pub(super) settling: Mutex<Vec<Call>>,
    /// Rung when there is more of it.
    pub(super) more_to_settle: tokio::sync::Notify,
    pub(super) lane: tokio::sync::Mutex<Lane>,
    pub(super) reporting: Mutex<super::reports::Reporting>,
}

/// Names of destinations.
type Names = Arc<BTreeSet<Arc<str>>>;

/// A map that forgets something when it is full.
pub(super) struct Cache<K, V>(HashMap<K, V>);

impl<K: Eq + Hash + Clone, V> Cache<K, V> {
    pub(super) fn insert(&mut self, key: K, value: V) {
        make_room(&mut self.0);
        self.0.insert(key, value);
    }
}

/// Leaves room for one more.
fn make_room<K: Eq + Hash + Clone, V>(map: &mut HashMap<K, V>) {
    if map.len() >= CACHED_MAX {
        // Any will do: what is missing is read again.
        let some: Vec<_> = map.keys().take(CACHED_MAX / 4).cloned().collect();
        for key in some {
            map.remove(&key);
        }
    }
}

#[derive(Default)]
struct Depth {
    /// The sum as it was read, with what this process changed since.
    known: Option<(MonoMs, i64)>,
    /// Counts this process's changes.
    changes: u64,
}

/// One of this node's depth counters, ours until dropped.
pub(super) struct Slot<'a> {
    shared: &'a Shared,
    number: u32,
    _permit: SemaphorePermit<'a>,
}

impl Slot<'_> {
    pub(super) fn name(&self) -> String {
        format!("a{}", self.number)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        lock(&self.shared.free_slots).push(self.number);
    }
}

/// Locks; a panic in between leaves nothing half-done that matters, for all of it is only remembered.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(
        calls: Calls,
        settings: DynamoSettings,
        clock: Arc<dyn Clock>,
        time: Arc<StoreTime>,
    ) -> Self {
        let node = settings.process.rsplit_once('-').map_or(&*settings.process, |(node, _)| node).to_owned();
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
            files: Mutex::new(Cache(HashMap::new())),
            moved: Mutex::default(),
            records: Mutex::default(),
            payloads: Mutex::default(),
            disabled: Mutex::default(),
            registered: Mutex::default(),
            depth: Mutex::default(),
            slots: Semaphore::new(SLOTS as usize),
            free_slots: Mutex::new((0..SLOTS).collect()),
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

    pub(super) fn cached_file(&self, id: FileId) -> Option<StoredFile> {
        lock(&self.files).0.get(&id).cloned()
    }

    /// Whether another machine has been ahead with a file; with `note`, it has now.
    pub(super) fn is_moved(&self, id: FileId, note: bool) -> bool {
        let mut moved = lock(&self.moved);
        if note {
            if moved.len() >= CACHED_MAX {
                moved.clear();
            }
            moved.insert(id);
        }
        moved.contains(&id)
    }

    pub(super) fn cache_file(&self, id: FileId, file: Option<StoredFile>) {
        let mut files = lock(&self.files);
        match file {
            Some(file) => files.insert(id, file),
            None => {
                files.0.remove(&id);
            }
        }
    }

    /// A record as it was when it was last seen.
    pub(super) fn cached_record(&self, id: BatchId) -> Option<super::record::Stored> {
        lock(&self.records).get(&id).cloned().flatten()
    }

    pub(super) fn cache_record(&self, record: super::record::Stored) {
        let mut records = lock(&self.records);
        make_room(&mut records);
        match records.entry(record.id) {
            Entry::Occupied(mut known) => {
                // An answer that was overtaken tells nothing new.
                if known.get().as_ref().is_none_or(|known| known.version <= record.version) {
                    known.insert(Some(record));
                }
            }
            Entry::Vacant(unknown) => {
                unknown.insert(Some(record));
            }
        }
    }

    pub(super) fn forget_record(&self, id: BatchId) {
        lock(&self.records).remove(&id);
    }

    pub(super) async fn slot(&self) -> Slot<'_> {
        let permit = self.slots.acquire().await.expect("the semaphore is never closed");
        let number = lock(&self.free_slots).pop().expect("there are as many slots as permits");
        Slot { shared: self, number, _permit: permit }
    }

    /// The action that changes the depth by `messages`.
    pub(super) fn change_depth(&self, slot: &str, messages: i64) -> Result<TransactWriteItem, StoreError> {
        let key = ledger_key(schema::DEPTH_PK, &format!("{}#{slot}", self.node));
        Change::of(&self.calls.tables.ledger, key).add(MESSAGES, number(messages)).action()
    }

    /// Takes note that the depth was changed.
    pub(super) fn depth_changed(&self, messages: i64) {
        let mut depth = lock(&self.depth);
        depth.changes += 1;
        if let Some((_, known)) = &mut depth.known {
            *known += messages;
        }
    }

    /// Takes note that the depth may have been changed.
    pub(super) fn depth_unknown(&self) {
        let mut depth = lock(&self.depth);
        depth.changes += 1;
        depth.known = None;
    }

    pub(super) async fn depth(&self) -> Result<u64, StoreError> {
        let now = self.clock.mono();
        let changes = {
            let depth = lock(&self.depth);
            if let Some((at, known)) = depth.known
                && now.since(at) < DEPTH_AGE_MAX
            {
                return Ok(u64::try_from(known).unwrap_or(0));
            }
            depth.changes
        };
        let parts = self.calls.partition("reading the depth", schema::DEPTH_PK, "").await?;
        let parts: Result<Vec<i64>, _> = parts.iter().map(|part| Reading(part).number(MESSAGES)).collect();
        let sum: i64 = parts?.iter().sum();
        let mut depth = lock(&self.depth);
        // Our own changes may be in it or not, if there were any meanwhile: then it is read anew next time.
        depth.known = (depth.changes == changes).then_some((now, sum));
        // The parts are read one after the other: a sum below 0 is one that was caught between two of them.
        Ok(u64::try_from(sum).unwrap_or(0))
    }

    /// Every destination that was ever appended to or disabled; since when and why it is disabled.
    pub(super) async fn known_destinations(
        &self,
    ) -> Result<BTreeMap<String, Option<(UnixMs, String)>>, StoreError> {
        let items = self.calls.partition("reading destinations", schema::DESTINATIONS_PK, "").await?;
        let read = |item: &super::item::Item| {
            let reading = Reading(item);
            let name = reading.text(SK)?.to_owned();
            let at = reading.maybe_number(DISABLED_AT)?;
            let reason = reading.maybe_text(REASON)?.unwrap_or_default().to_owned();
            Ok((name, at.map(|at| (UnixMs(at), reason))))
        };
        let read: Result<_, super::item::Damaged> = items.iter().map(read).collect();
        Ok(read?)
    }

    /// The actions that make destinations known, with the first step for them that this process appends.
    pub(super) fn register(&self, names: &[String]) -> Result<Vec<TransactWriteItem>, StoreError> {
        let registered = lock(&self.registered);
        let new = names.iter().filter(|name| !registered.contains(&***name));
        let action = |name: &String| {
            let key = ledger_key(schema::DESTINATIONS_PK, name);
            Change::of(&self.calls.tables.ledger, key).set(TOPIC, text(&**name)).action()
        };
        new.map(action).collect()
    }

    /// They are known now.
    pub(super) fn registered(&self, names: &[String]) {
        let mut registered = lock(&self.registered);
        for name in names {
            if registered.len() < CACHED_MAX {
                registered.insert(name.clone());
            }
        }
    }

    /// The disabled destinations, some seconds old at most.
    pub(super) async fn disabled_set(&self) -> Result<Names, StoreError> {
        let now = self.clock.mono();
        if let Some((at, known)) = &*lock(&self.disabled)
            && now.since(*at) < DISABLED_AGE_MAX
        {
            return Ok(known.clone());
        }
        let known = self.known_destinations().await?;
        let names = known.into_iter().filter(|(_, disabled)| disabled.is_some());
        let names: Names = Arc::new(names.map(|(name, _)| name.into()).collect());
        *lock(&self.disabled) = Some((now, names.clone()));
        Ok(names)
    }

    pub(super) async fn disabled(&self) -> Result<Vec<Arc<str>>, StoreError> {
        Ok(self.disabled_set().await?.iter().cloned().collect())
    }

    pub(super) async fn disable(&self, name: &str, reason: &str, at: UnixMs) -> Result<(), StoreError> {
        let key = ledger_key(schema::DESTINATIONS_PK, name);
        let change = Change::of(&self.calls.tables.ledger, key)
            .set(DISABLED_AT, number(at.0))
            .set(REASON, text(reason))
            // The first reason stands.
            .when(When::Missing(DISABLED_AT));
        self.calls.update("disabling a destination", change).await?.ok();
        *lock(&self.disabled) = None;
        Ok(())
    }

    pub(super) async fn enable(&self, name: &str) -> Result<bool, StoreError> {
        let key = ledger_key(schema::DESTINATIONS_PK, name);
        let change = Change::of(&self.calls.tables.ledger, key)
            .remove(DISABLED_AT)
            .remove(REASON)
            .when(When::Exists(DISABLED_AT));
        let was_disabled = self.calls.update("enabling a destination", change).await?.is_ok();
        *lock(&self.disabled) = None;
        Ok(was_disabled)
    }
}

/// Times at which a node's counts last settled a message, so that they only grow.
pub(super) type LastTimes = BTreeMap<(FileId, Arc<str>), UnixMs>;
