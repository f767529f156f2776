//! What holds for all machines (B25): one item, which each of them reads once a second. It says only what is not as
//! usual, so that it costs one read unit however many destinations there are.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use postrider_actors::{
    model::{
        file::FileRecord,
        hold::{FileHold, HeldFile, HoldChange},
        ids::FileId,
        limits::{LimitChange, SetLimits},
        priority::{FilePriority, Priority},
        time::{MonoMs, UnixMs},
    },
    ports::StoreError,
};
use serde::{Deserialize, Serialize};

use super::{
    cache::lock,
    item::{BODY, Damaged, Item, Reading, VERSION},
    keys::{self, ledger_key},
};

/// How old it may be, but for what this process has changed in it.
const AGE_MAX: Duration = Duration::from_secs(1);

/// Files that are held at once, some 500 bytes each: every machine reads them every second.
const HELD_MAX: usize = 200;

/// Orders on how urgent files are that are kept, some 100 bytes each. Nobody knows when they have had their effect.
const PRIORITIES_MAX: usize = 100;

/// Since when something is so, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Since {
    pub(super) at: UnixMs,
    pub(super) reason: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClusterState {
    /// Destinations whose messages are held.
    pub(super) disabled: BTreeMap<String, Since>,
    /// What is set for destinations.
    #[serde(default)]
    pub(super) limits: BTreeMap<String, SetLimits>,
    /// Files that are held.
    #[serde(default)]
    pub(super) held: Vec<HeldFile>,
    /// How urgent files are by order, the latest last.
    #[serde(default)]
    pub(super) priorities: Vec<FilePriority>,
}

impl ClusterState {
    /// Sets a limit of a destination; whether that changes anything.
    pub(super) fn limit(&mut self, destination: &str, change: LimitChange) -> bool {
        let before = self.limits.get(destination).copied().unwrap_or_default();
        let after = before.with(change);
        self.limits.insert(destination.to_owned(), after);
        self.limits.retain(|_, limits| !limits.is_empty());
        after != before
    }

    /// Why a batch waits, if it does because its file is held.
    pub(super) fn hold_of(&self, file: FileId, destination: &str, first_row: u64) -> Option<&FileHold> {
        let of = |held: &&HeldFile| held.file == file && held.destination == destination;
        self.held.iter().find(of).map(|held| &held.hold).filter(|hold| hold.covers(first_row))
    }

    /// How urgent a file is at a destination, if that was ordered.
    pub(super) fn priority_of(&self, file: FileId, destination: &str) -> Option<Priority> {
        let is_its = |order: &&FilePriority| order.file == file && order.destination == destination;
        self.priorities.iter().find(is_its).map(|order| order.priority)
    }

    /// Orders how urgent a file is at its destinations `names`; at how many that is new. Of too many orders the oldest go.
    pub(super) fn prioritize(&mut self, file: &FileRecord, names: &[&str], priority: Priority) -> usize {
        let mut changed = 0;
        for &name in names {
            if self.priority_of(file.id, name).unwrap_or(file.priority) == priority {
                continue;
            }
            changed += 1;
            self.priorities.retain(|order| !(order.file == file.id && order.destination == name));
            if priority != file.priority {
                self.priorities.push(FilePriority { file: file.id, destination: name.into(), priority });
            }
        }
        let surplus = self.priorities.len().saturating_sub(PRIORITIES_MAX);
        self.priorities.drain(..surplus);
        changed
    }

    /// Changes what is held of a file at its destinations `names`; at how many that changed something. `None` if there is
    /// no room for it.
    pub(super) fn change_hold(
        &mut self,
        file: &FileRecord,
        names: &[&str],
        change: &HoldChange,
    ) -> Option<usize> {
        let mut changed = 0;
        for &name in names {
            let place = self.held.iter().position(|held| held.file == file.id && held.destination == name);
            let Some(next) = change.apply(place.map(|at| &self.held[at].hold)) else { continue };
            changed += 1;
            match (place, next) {
                (Some(at), Some(hold)) => self.held[at].hold = hold,
                (Some(at), None) => drop(self.held.remove(at)),
                (None, Some(hold)) if self.held.len() < HELD_MAX => self.held.push(HeldFile {
                    file: file.id,
                    feed: file.feed.clone(),
                    name: file.name.clone(),
                    destination: name.into(),
                    hold,
                }),
                (None, Some(_)) => return None,
                (None, None) => {}
            }
        }
        Some(changed)
    }

    pub(super) fn key() -> Item {
        ledger_key(keys::CLUSTER_PK, "state")
    }

    /// With the version that it was read at; `None` before the first change.
    pub(super) fn read(item: Option<&Item>) -> Result<(Option<u64>, Self), StoreError> {
        let Some(item) = item else { return Ok((None, Self::default())) };
        let reading = Reading(item);
        let state = serde_json::from_str(reading.text(BODY)?).map_err(|_| Damaged(BODY))?;
        Ok((Some(reading.number(VERSION)?), state))
    }
}

/// What a process knows of it.
#[derive(Default)]
pub(super) struct ClusterCache {
    known: Mutex<Option<(MonoMs, Arc<ClusterState>)>>,
    /// Held by who reads it.
    pub(super) reading: tokio::sync::Mutex<()>,
}

impl ClusterCache {
    /// As it was known last, and whether that is good enough at `now`.
    pub(super) fn known(&self, now: MonoMs) -> Option<(Arc<ClusterState>, bool)> {
        let known = lock(&self.known).clone();
        known.map(|(at, state)| (state, now.since(at) < AGE_MAX))
    }

    /// Takes it in as it was asked for at `at`.
    pub(super) fn learn(&self, at: MonoMs, state: ClusterState) -> Arc<ClusterState> {
        let state = Arc::new(state);
        *lock(&self.known) = Some((at, state.clone()));
        state
    }
}
