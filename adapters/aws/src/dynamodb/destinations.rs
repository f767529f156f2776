//! Destinations: which there are, and which are disabled.

use std::sync::{Arc, Mutex};

use aws_sdk_dynamodb::types::TransactWriteItem;
use postrider_actors::{
    flow::back_off,
    model::{
        file::{FileRecord, FileReport},
        hold::{HoldChange, shortened},
        ids::FileId,
        limits::LimitChange,
        priority::Priority,
        time::UnixMs,
    },
    ports::{
        LimitsSet, StoreError,
        console::{FileSelector, FilesAt, FilesCount, OrderedFiles},
    },
};

use super::{
    cache::{CACHED_MAX, lock},
    change::{Change, When},
    cluster::{ClusterState, Since},
    files::json,
    item::{BODY, Damaged, Item, PK, Reading, SK, TOPIC, VERSION, number, text},
    keys::{self, ledger_key},
    retry::BUDGET,
    state::Shared,
};

/// How often a change of what holds for all is worked out anew when others came first.
const ROUNDS: u32 = 10;

impl Shared {
    /// Every destination that was ever appended to.
    pub(super) async fn known_destinations(&self) -> Result<Vec<String>, StoreError> {
        let items = self.calls.partition("reading destinations", keys::DESTINATIONS_PK, "").await?;
        let names: Result<_, Damaged> =
            items.iter().map(|item| Ok(Reading(item).text(SK)?.to_owned())).collect();
        Ok(names?)
    }

    /// The actions that make destinations known, with the first step for them that this process appends.
    pub(super) fn register(&self, names: &[String]) -> Result<Vec<TransactWriteItem>, StoreError> {
        let registered = lock(&self.registered);
        let new = names.iter().filter(|name| !registered.contains(&***name));
        let action = |name: &String| {
            let key = ledger_key(keys::DESTINATIONS_PK, name);
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

    /// What holds for all machines, as it was a second ago at most (B25).
    pub(super) async fn cluster_state(&self) -> Result<Arc<ClusterState>, StoreError> {
        let now = self.clock.mono();
        let _turn = match self.cluster.known(now) {
            Some((state, true)) => return Ok(state),
            // One reads it for all, who go on with what is known meanwhile.
            Some((state, false)) => match self.cluster.reading.try_lock() {
                Ok(turn) => turn,
                Err(_) => return Ok(state),
            },
            None => self.cluster.reading.lock().await,
        };
        match self.cluster.known(now) {
            Some((state, true)) => Ok(state),
            _ => Ok(self.read_cluster().await?.1),
        }
    }

    /// As it is, and the version that it was read at.
    pub(super) async fn read_cluster(&self) -> Result<(Option<u64>, Arc<ClusterState>), StoreError> {
        let asked = self.clock.mono();
        let item = self.calls.get("reading what holds for all machines", ClusterState::key()).await?;
        let (version, state) = ClusterState::read(item.as_ref())?;
        Ok((version, self.cluster.learn(asked, state)))
    }

    /// Changes it, unless `change` says that there is nothing to change; whether it did.
    async fn change_cluster(&self, change: impl Fn(&mut ClusterState) -> bool) -> Result<bool, StoreError> {
        let _turn = self.cluster.reading.lock().await;
        for round in 1..=ROUNDS {
            let (version, state) = self.read_cluster().await?;
            let mut state = (*state).clone();
            if !change(&mut state) {
                return Ok(false);
            }
            let body = json(&state)?;
            let when = version.map_or(When::Missing(PK), |version| When::Is(VERSION, number(version)));
            let write = Change::of(&self.calls.tables.ledger, ClusterState::key())
                .set(VERSION, number(version.unwrap_or(0) + 1))
                .set(BODY, text(&*body))
                .when(when);
            let asked = self.clock.mono();
            let written = self.calls.update("changing what holds for all machines", write).await?;
            // Done by a try that was not answered?
            let is_ours = |item: Item| Reading(&item).text(BODY) == Ok(&*body);
            if written.map_or_else(|other| other.is_some_and(is_ours), |_| true) {
                self.cluster.learn(asked, state);
                return Ok(true);
            }
            back_off(BUDGET.backoff, round).await;
        }
        Err(StoreError::Retryable("what holds for all machines keeps being changed by others".into()))
    }

    pub(super) async fn disabled(&self) -> Result<Vec<Arc<str>>, StoreError> {
        let state = self.cluster_state().await?;
        Ok(state.disabled.keys().map(|name| name.as_str().into()).collect())
    }

    /// Whether that is new.
    pub(super) async fn disable(&self, name: &str, reason: &str, at: UnixMs) -> Result<bool, StoreError> {
        let reason = shortened(reason);
        let disable = |state: &mut ClusterState| {
            // The first reason stands.
            let is_new = !state.disabled.contains_key(name);
            state.disabled.entry(name.to_owned()).or_insert_with(|| Since { at, reason: reason.clone() });
            is_new
        };
        self.change_cluster(disable).await
    }

    /// Sets a limit of a destination; whether that changes anything.
    pub(super) async fn limit(&self, name: &str, change: LimitChange) -> Result<bool, StoreError> {
        self.change_cluster(|state| state.limit(name, change)).await
    }

    pub(super) async fn set_limits(&self) -> Result<LimitsSet, StoreError> {
        let state = self.cluster_state().await?;
        Ok(state.limits.iter().map(|(name, limits)| (name.as_str().into(), *limits)).collect())
    }

    /// Changes what is held of files at some of their destinations, of all or of none; at how many that changed something.
    pub(super) async fn change_hold_of(
        &self,
        files: &[(&FileRecord, Vec<&str>)],
        change: &HoldChange,
    ) -> Result<usize, StoreError> {
        let outcome = Mutex::new(None);
        let apply = |state: &mut ClusterState| {
            let mut changes = files.iter().map(|(file, names)| state.change_hold(file, names, change));
            let changed = changes.try_fold(0, |sum, changed| Some(sum + changed?));
            *lock(&outcome) = changed;
            changed.is_some_and(|changed| changed > 0)
        };
        self.change_cluster(apply).await?;
        let full = || StoreError::Permanent("too many files are held: release some of them first".into());
        lock(&outcome).ok_or_else(full)
    }

    pub(super) async fn change_hold(
        &self,
        id: FileId,
        destination: Option<&str>,
        change: &HoldChange,
    ) -> Result<usize, StoreError> {
        let Some(file) = self.read_file(id).await? else { return Ok(0) };
        self.change_hold_of(&[(&file.record, names_at(&file.record, destination))], change).await
    }

    /// Orders how urgent a file is; at how many destinations that is new.
    pub(super) async fn prioritize(
        &self,
        id: FileId,
        destination: Option<&str>,
        priority: Priority,
    ) -> Result<usize, StoreError> {
        let Some(file) = self.read_file(id).await? else { return Ok(0) };
        self.prioritize_all(&[(&file.record, names_at(&file.record, destination))], priority).await
    }

    /// The same of the files that an operator names.
    pub(super) async fn change_priorities(
        &self,
        of: &FilesAt,
        priority: Priority,
    ) -> Result<usize, StoreError> {
        let files = self.ordered_files(of).await?;
        let at = of.destination.as_deref();
        let files: Vec<_> = files.iter().map(|report| (&report.file, names_at(&report.file, at))).collect();
        self.prioritize_all(&files, priority).await
    }

    async fn prioritize_all(
        &self,
        files: &[(&FileRecord, Vec<&str>)],
        priority: Priority,
    ) -> Result<usize, StoreError> {
        let outcome = Mutex::new(0);
        let apply = |state: &mut ClusterState| {
            let changed = files.iter().map(|(file, names)| state.prioritize(file, names, priority)).sum();
            *lock(&outcome) = changed;
            changed > 0
        };
        self.change_cluster(apply).await?;
        let changed = *lock(&outcome);
        Ok(changed)
    }

    /// The same of the files that an operator names.
    pub(super) async fn change_holds(&self, of: &FilesAt, change: &HoldChange) -> Result<usize, StoreError> {
        let files = self.ordered_files(of).await?;
        let at = of.destination.as_deref();
        let files: Vec<_> = files.iter().map(|report| (&report.file, names_at(&report.file, at))).collect();
        self.change_hold_of(&files, change).await
    }

    /// The files that an order is about.
    async fn ordered_files(&self, of: &FilesAt) -> Result<Vec<FileReport>, StoreError> {
        let ids = match &of.files {
            OrderedFiles::Named(FileSelector::Id(id)) => vec![*id],
            OrderedFiles::Named(FileSelector::Name(name)) => self.file_ids(Some(name), usize::MAX).await?,
            OrderedFiles::OpenOf(_) | OrderedFiles::Open => self.file_ids(None, usize::MAX).await?,
        };
        let is_meant = |report: &FileReport| match &of.files {
            OrderedFiles::Named(_) => true,
            OrderedFiles::OpenOf(feed) => report.file.feed == *feed && report.settled_at.is_none(),
            OrderedFiles::Open => report.settled_at.is_none(),
        };
        let reports = self.look_at_all(ids).await?.into_iter().map(|look| look.report);
        Ok(reports.filter(is_meant).collect())
    }

    /// How much an order would be about.
    pub(super) async fn count_files(&self, of: &FilesAt) -> Result<FilesCount, StoreError> {
        let mut count = FilesCount::default();
        for mut report in self.ordered_files(of).await? {
            self.add_holds(&mut report).await?;
            count.add(&report, of);
        }
        Ok(count)
    }

    /// What of a file is held, where, and how urgent it is by order.
    pub(super) async fn add_holds(&self, report: &mut FileReport) -> Result<(), StoreError> {
        let state = self.cluster_state().await?;
        let of_it = state.held.iter().filter(|held| held.file == report.file.id);
        report.held = of_it.map(|held| (held.destination.clone(), held.hold.clone())).collect();
        let of_it = state.priorities.iter().filter(|order| order.file == report.file.id);
        report.priorities = of_it.map(|order| (order.destination.clone(), order.priority)).collect();
        Ok(())
    }

    pub(super) async fn enable(&self, name: &str) -> Result<bool, StoreError> {
        self.change_cluster(|state| state.disabled.remove(name).is_some()).await
    }
}

/// The destinations of a file that are meant: one, or all.
fn names_at<'a>(file: &'a FileRecord, destination: Option<&str>) -> Vec<&'a str> {
    let names = file.destinations.iter().map(String::as_str);
    names.filter(|name| destination.is_none_or(|asked| asked == *name)).collect()
}
