//! Reports on files.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use postrider_actors::{
    model::{
        codec,
        file::{Checkpoint, DestinationCounts, FileReport, Reject},
        ids::FileId,
        time::UnixMs,
    },
    ports::StoreError,
};

use super::{
    cache::lock,
    calls::PARALLEL_CALLS,
    change::{Change, When, delete},
    files::StoredFile,
    item::{
        BODY, CANCELLED, CHANGES, DEAD, Damaged, Item, LAST_AT, PK, REPORTED, RETRYING, Reading, SENT, SK,
        UNSENT, text,
    },
    keys,
    reporting::{REMEMBERED_MAX, Reporting},
    state::Shared,
};
/// Open files of one feed that one look goes through; the next one goes on.
const LOOK_MAX: u16 = 500;

/// Between two looks at a file that this process settles messages of, and others may.
const LOOK_PAUSE: Duration = Duration::from_secs(15);

/// A file as it stands.
pub(super) struct FileStatus {
    pub(super) stored: StoredFile,
    pub(super) report: FileReport,
    /// Names how it stands: it is another one after every change.
    pub(super) mark: String,
}

impl Shared {
    /// Takes note that so many more messages of a file were settled here.
    pub(super) fn touched_file(&self, file: FileId, settled: i64) {
        let known = self.cached_file(file);
        let feed = known.as_ref().map(|known| Arc::from(known.record.feed.as_str()));
        let mut reporting = lock(&self.reporting);
        reporting.insert(file, feed);
        reporting.settled_here(file, settled);
    }

    /// Whether a file that was touched is worth a look: this process alone may have settled it, or others may have
    /// meanwhile.
    fn is_worth_a_look(&self, reporting: &Reporting, id: FileId) -> bool {
        let Some(here) = reporting.here.get(&id) else { return true };
        let is_all = self.cached_file(id).is_some_and(|known| {
            let Checkpoint { rows, rejected, duplicates, .. } = known.checkpoint;
            let accepted = (rows - rejected - duplicates) * known.record.destinations.len() as u64;
            known.state.is_closed() && here.settled >= accepted.cast_signed()
        });
        is_all || here.looked_at.is_none_or(|at| self.clock.mono().since(at) >= LOOK_PAUSE)
    }

    /// A file and its counts, in one read. They are read one after the other, so they may be of different
    /// moments; who acts on them acts again when they change.
    pub(super) async fn look_at(&self, id: FileId) -> Result<Option<FileStatus>, StoreError> {
        let items = self.calls.partition("reading a file", &keys::file_pk(id), keys::FILE_SK).await?;
        look(&items)
    }

    pub(super) async fn rejects(
        &self,
        id: FileId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<Reject>, StoreError> {
        let Some(file) = self.read_file(id).await? else { return Ok(Vec::new()) };
        let mut found: BTreeMap<u64, Reject> = BTreeMap::new();
        let mut from = None;
        loop {
            let range = [
                (":first", keys::rejects_sk(after.saturating_add(1))),
                (":last", keys::rejects_sk(u64::MAX)),
            ];
            let call = self
                .calls
                .in_partition(keys::file_pk(id), "Sk BETWEEN :first AND :last", range)
                // A chunk holds a hundred kilobytes: few of them are enough for a page.
                .limit(4)
                .set_exclusive_start_key(from);
            let (items, next) = self.calls.query("reading rejected rows", call).await?;
            for item in &items {
                let rejects = codec::decode_rejects(Reading(item).bytes(BODY)?).map_err(|_| Damaged(BODY))?;
                for reject in rejects {
                    // Beyond the checkpoint is what a crash left behind; and it may be there twice.
                    if reject.row > after && reject.row <= file.checkpoint.rows {
                        found.entry(reject.row).or_insert(reject);
                    }
                }
            }
            from = next;
            if from.is_none() || found.len() >= limit {
                return Ok(found.into_values().take(limit).collect());
            }
        }
    }

    /// Up to `limit` files by the order in which they were stored, the latest first.
    pub(super) async fn latest_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        let ids = self.file_ids(None, limit).await?;
        let looks = self.look_at_all(ids).await?;
        self.reports_of(looks, limit).await
    }

    /// `Ledger::timed_files`: costs nothing if no file has a deadline.
    pub(super) async fn timed_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        let timed: Vec<_> = lock(&self.timed).iter().take(limit).copied().collect();
        let looks = self.look_at_all(timed.iter().map(|(_, id)| *id).collect()).await?;
        let open: Vec<_> =
            looks.into_iter().map(|look| look.report).filter(|report| report.settled_at.is_none()).collect();
        let is_open: BTreeSet<_> = open.iter().map(|report| report.file.id).collect();
        // One that is opened again is noted again.
        let mut known = lock(&self.timed);
        for key in timed.iter().filter(|(_, id)| !is_open.contains(id)) {
            known.remove(key);
        }
        Ok(open)
    }

    /// The first `limit` reports of these, with what is held.
    pub(super) async fn reports_of(
        &self,
        looks: Vec<FileStatus>,
        limit: usize,
    ) -> Result<Vec<FileReport>, StoreError> {
        let mut reports: Vec<_> = looks.into_iter().take(limit).map(|look| look.report).collect();
        for report in &mut reports {
            self.add_holds(report).await?;
        }
        Ok(reports)
    }

    pub(super) async fn look_at_all(&self, ids: Vec<FileId>) -> Result<Vec<FileStatus>, StoreError> {
        let looks = stream::iter(ids).map(|id| self.look_at(id)).buffered(PARALLEL_CALLS);
        let looks: Vec<_> = looks.collect().await;
        looks.into_iter().filter_map(Result::transpose).collect()
    }

    pub(super) async fn settled_files(
        &self,
        feed: &str,
        limit: usize,
    ) -> Result<Vec<FileReport>, StoreError> {
        let feed: Arc<str> = feed.into();
        let mut ids: BTreeSet<FileId> = {
            let reporting = lock(&self.reporting);
            let is_of =
                |(_, known): &(&FileId, &Option<Arc<str>>)| known.as_ref().is_none_or(|of| *of == feed);
            let touched = reporting.touched.iter().filter(is_of).map(|(id, _)| *id);
            let touched = touched.filter(|id| self.is_worth_a_look(&reporting, *id));
            let unreported = reporting.unreported.iter().filter(|(_, of)| **of == feed).map(|(id, _)| *id);
            touched.chain(unreported).take(LOOK_MAX.into()).collect()
        };
        ids.extend(self.open_files_if_due(&feed).await?);
        let mut settled = Vec::new();
        for id in ids {
            // Taken off before it is looked at: a change that comes now is looked at again.
            {
                let now = self.clock.mono();
                let mut reporting = lock(&self.reporting);
                reporting.touched.remove(&id);
                if let Some(here) = reporting.here.get_mut(&id) {
                    here.looked_at = Some(now);
                }
            }
            let look = match self.look_at(id).await {
                Ok(Some(look)) => look,
                Ok(None) => continue,
                Err(error) => {
                    lock(&self.reporting).insert(id, None);
                    return Err(error);
                }
            };
            self.note_times(&look.report.file, look.report.settled_at.is_none());
            if *look.report.file.feed != *feed {
                let of = Arc::from(look.report.file.feed.as_str());
                lock(&self.reporting).insert(id, Some(of));
                continue;
            }
            settled.extend(self.unreported(look, &feed).await?);
        }
        settled.sort_by_key(|look| (look.stored.stamp, look.report.file.id));
        settled.truncate(limit);
        let mut reporting = lock(&self.reporting);
        for look in &settled {
            if reporting.marks.len() >= REMEMBERED_MAX {
                reporting.marks.clear();
            }
            reporting.marks.insert(look.report.file.id, look.mark.clone());
        }
        Ok(settled.into_iter().map(|look| look.report).collect())
    }

    /// The look, if it is to be reported by this process.
    async fn unreported(&self, look: FileStatus, feed: &Arc<str>) -> Result<Option<FileStatus>, StoreError> {
        let id = look.report.file.id;
        let is_reported = look.stored.reported.as_ref() == Some(&look.mark);
        if !is_reported && look.stored.reported.is_some() {
            // Its report is out of date, and its owner may look for it no more.
            self.calls
                .put_all("opening a file again", &self.calls.tables.ledger, vec![look.stored.open_item()])
                .await?;
        }
        if is_reported || look.stored.owner != self.node || look.report.settled_at.is_none() {
            lock(&self.reporting).unreported.remove(&id);
            return Ok(None);
        }
        let mut reporting = lock(&self.reporting);
        if reporting.unreported.len() < REMEMBERED_MAX {
            reporting.unreported.insert(id, feed.clone());
        }
        drop(reporting);
        Ok(Some(look))
    }

    /// Some of this node's open files, if it is time to look through them: others may have settled them.
    async fn open_files_if_due(&self, feed: &Arc<str>) -> Result<Vec<FileId>, StoreError> {
        let now = self.clock.mono();
        let from = match lock(&self.reporting).looks.get(feed) {
            Some((at, _)) if now.since(*at) < self.settings.look_interval => return Ok(Vec::new()),
            Some((_, from)) => from.clone(),
            None => None,
        };
        let call = self
            .calls
            .in_partition(keys::open_pk(&self.node, feed), "", [])
            .limit(LOOK_MAX.into())
            .set_exclusive_start_key(from);
        let (items, next) = self.calls.query("looking through open files", call).await?;
        lock(&self.reporting).looks.insert(feed.clone(), (now, next));
        let id = |item: &Item| -> Result<FileId, Damaged> {
            let file = Reading(item).text(SK)?.rsplit_once('#').and_then(|(_, file)| file.parse().ok());
            file.ok_or(Damaged(SK))
        };
        Ok(items.iter().map(id).collect::<Result<_, _>>()?)
    }

    pub(super) async fn mark_reported(&self, files: &[FileId]) -> Result<(), StoreError> {
        let marks: Vec<_> = files.iter().map(|id| self.mark_one(*id)).collect();
        let marked: Vec<Result<(), StoreError>> =
            stream::iter(marks).buffered(PARALLEL_CALLS).collect().await;
        marked.into_iter().collect()
    }

    async fn mark_one(&self, id: FileId) -> Result<(), StoreError> {
        let remembered = lock(&self.reporting).marks.get(&id).cloned();
        let mark = match remembered {
            // What has changed since is reported again, because the mark is another one then.
            Some(mark) => mark,
            None => match self.look_at(id).await? {
                Some(look) if look.report.settled_at.is_some() => look.mark,
                _ => return Ok(()),
            },
        };
        let file = match self.cached_file(id) {
            Some(file) => Some(file),
            None => self.read_file(id).await?,
        };
        if let Some(file) = file {
            let table = &self.calls.tables.ledger;
            let change = Change::of(table, StoredFile::key(id))
                .set(REPORTED, text(&*mark))
                .when(When::Exists(PK))
                .action()?;
            let actions = vec![change, delete(table, file.open_item())?];
            self.calls.transact("marking a report", actions).await?;
            self.cache_file(id, Some(StoredFile { reported: Some(mark), ..file }));
        }
        let mut reporting = lock(&self.reporting);
        reporting.here.remove(&id);
        reporting.unreported.remove(&id);
        reporting.marks.remove(&id);
        Ok(())
    }
}

/// Puts together what the items of a file say.
pub(super) fn look(items: &[Item]) -> Result<Option<FileStatus>, StoreError> {
    let mut stored = None;
    let mut counts: BTreeMap<&str, DestinationCounts> = BTreeMap::new();
    let (mut sums, mut changes, mut last_at) = (BTreeMap::<&str, [i64; 5]>::new(), 0u64, None);
    for item in items {
        let reading = Reading(item);
        let sk = reading.text(SK)?;
        if sk == keys::FILE_SK {
            stored = Some(StoredFile::read(item)?);
            continue;
        }
        let destination = sk.split('#').nth(1).ok_or(Damaged(SK))?;
        let sum = sums.entry(destination).or_default();
        for (sum, name) in sum.iter_mut().zip([SENT, DEAD, RETRYING, UNSENT, CANCELLED]) {
            *sum += reading.number::<i64>(name)?;
        }
        changes += reading.number::<u64>(CHANGES)?;
        last_at = last_at.max(reading.maybe_number(LAST_AT)?.map(UnixMs));
    }
    let Some(stored) = stored else { return Ok(None) };
    let checkpoint = stored.checkpoint;
    // Every row that was read and neither rejected nor left out is a message at each destination (I1).
    let accepted = checkpoint.rows - checkpoint.rejected - checkpoint.duplicates;
    for name in &stored.record.destinations {
        let [sent, dead, retrying, unsent, cancelled] =
            sums.get(name.as_str()).copied().unwrap_or_default().map(|sum| u64::try_from(sum).unwrap_or(0));
        counts.insert(name, DestinationCounts { accepted, sent, dead, retrying, unsent, cancelled });
    }
    let mut report = FileReport {
        file: stored.record.clone(),
        state: stored.state.clone(),
        closed_at: stored.closed_at,
        settled_at: None,
        rows: checkpoint.rows,
        rejected: checkpoint.rejected,
        duplicates: checkpoint.duplicates,
        destinations: counts.into_iter().map(|(name, counts)| (name.to_owned(), counts)).collect(),
        held: BTreeMap::new(),
        priorities: BTreeMap::new(),
        failures: BTreeMap::new(),
    };
    // Exactly all of them: parts that were read at different moments may come to more.
    let is_exact = report.destinations.values().all(|counts| counts.settled() == counts.accepted);
    if report.is_settled() && is_exact {
        report.settled_at = report.closed_at.max(last_at);
    }
    let mark = format!("{}.{changes}", stored.version);
    Ok(Some(FileStatus { stored, report, mark }))
}
