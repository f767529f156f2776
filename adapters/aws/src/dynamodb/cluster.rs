//! What holds for all machines (B25): one item, which each of them reads once a second. It says only what is not as
//! usual, so that it costs one read unit however many destinations there are.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use postrider_actors::{
    model::time::{MonoMs, UnixMs},
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
}

impl ClusterState {
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
