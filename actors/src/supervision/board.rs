use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::child::{ChildId, Exit};
use crate::model::time::UnixMs;

/// The children of all supervisors of the process, for whoever looks from outside. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct ActorBoard(Arc<Mutex<Reports>>);

/// By path and number.
type Reports = BTreeMap<(Arc<str>, usize), ActorReport>;

/// What is known of one child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorReport {
    /// Its place in the tree, and which life it is.
    pub id: ChildId,
    /// What it is.
    pub name: &'static str,
    /// Its second name: a feed's, a source's.
    pub of: Option<Arc<str>>,
    /// Whether it runs, or waits to be restarted.
    pub alive: bool,
    /// When this life began.
    pub since: UnixMs,
    /// How often it was restarted.
    pub restarts: u64,
    /// When a life of it ended last, and how.
    pub last_exit: Option<(UnixMs, String)>,
}

impl ActorBoard {
    fn reports(&self) -> MutexGuard<'_, Reports> {
        // Changed by infallible steps only.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A life begins.
    pub(super) fn born(&self, id: &ChildId, name: &'static str, of: Option<Arc<str>>, at: UnixMs) {
        let mut reports = self.reports();
        let before = reports.remove(&(id.path.clone(), id.slot));
        let restarts = before.as_ref().map_or(0, |before| before.restarts + 1);
        let last_exit = before.and_then(|before| before.last_exit);
        let report = ActorReport { id: id.clone(), name, of, alive: true, since: at, restarts, last_exit };
        reports.insert((id.path.clone(), id.slot), report);
    }

    /// A life has ended; another one follows.
    pub(super) fn ended(&self, id: &ChildId, exit: &Exit, at: UnixMs) {
        if let Some(report) = self.reports().get_mut(&(id.path.clone(), id.slot)) {
            report.alive = false;
            report.last_exit = Some((at, exit.why().to_owned()));
        }
    }

    /// It is no longer needed.
    pub(super) fn gone(&self, id: &ChildId) {
        self.reports().remove(&(id.path.clone(), id.slot));
    }

    /// All of them, by their places in the tree.
    pub fn list(&self) -> Vec<ActorReport> {
        self.reports().values().cloned().collect()
    }
}
