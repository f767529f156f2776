//! What lives as long as the process, whichever configuration is in use.

use std::{
    fmt, io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use postrider_actors::{
    flow::{Bell, Bells, Progress, ProgressBoard, WorkerSetup},
    model::time::MonoMs,
    ports::{Clock, InFlight},
    supervision::ChildId,
};
use postrider_net::listener::Listener;
use tokio::{runtime::Runtime, sync::RwLock};

use super::{error::StartError, stores::Stores};
use crate::{
    clock::SteadyClock,
    config::{Config, SourceKind},
    ops::Health,
    systemd::Notifier,
    telemetry::{Telemetry, metrics::Metrics},
};

/// How old a thread's sign of life may be before the watchdog is no longer fed and probes fail.
const PATIENCE: Duration = Duration::from_secs(20);

/// What lives as long as the process.
pub(super) struct Machine {
    pub(super) runtime: Arc<Runtime>,
    pub(super) stores: Stores,
    /// What this process has in flight …
    pub(super) in_flight: Arc<dyn InFlight>,
    /// … and the lock on having anything: see `DeliverySetup::alone`.
    pub(super) alone: Arc<RwLock<()>>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) clock: Arc<dyn Clock>,
    /// The same, to be looked after.
    pub(super) steady: Arc<SteadyClock>,
    /// When the process was born.
    pub(super) born: MonoMs,
    pub(super) board: ProgressBoard,
    pub(super) health: Health,
    pub(super) systemd: Notifier,
    pub(super) telemetry: Telemetry,
    /// Where receipts are handed in. It stays bound across a reload, so that no sender is turned away.
    pub(super) receipts: Mutex<Option<(SocketAddr, Listener)>>,
    /// How many descriptors it may have, if that is limited.
    pub(super) descriptors: Option<u64>,
}

impl Machine {
    /// A mark for the child that is being born.
    pub(super) fn mark(&self, id: &ChildId) -> Progress {
        self.board.mark(id.to_string())
    }

    /// Gives signs of life of the thread that it runs on.
    pub(super) fn beat(&self, thread: &str) -> impl Future<Output = ()> + use<> {
        self.board.beat(thread, PATIENCE, self.clock.clone())
    }

    /// What the worker `id` has in common with every other, which `queued` wakes.
    pub(super) fn worker(
        &self,
        id: &ChildId,
        queued: &Bell,
        due_again: &Bells,
        lease: Duration,
    ) -> WorkerSetup {
        WorkerSetup {
            born: self.born,
            queue: self.stores.queue.clone(),
            ledger: self.stores.ledger.clone(),
            clock: self.clock.clone(),
            queued: queued.clone(),
            due_again: due_again.clone(),
            lease,
            progress: self.mark(id),
        }
    }

    /// Passes a notification on. One that systemd does not take is worth a line, not an end.
    pub(super) fn notify(&self, notify: impl FnOnce(&Notifier) -> io::Result<()>) {
        if let Err(error) = notify(&self.systemd) {
            tracing::warn!(%error, "systemd does not take notifications");
        }
    }

    /// The address that receipts are handed in at, if there is one.
    pub(super) fn receipts_listener(&self, config: &Config) -> Result<Option<Listener>, StartError> {
        let mut bound = self.receipts.lock().unwrap_or_else(PoisonError::into_inner);
        let before = bound.take();
        let is_needed =
            config.receipt_sources.iter().any(|source| matches!(source.kind, SourceKind::Http(_)));
        let Some(address) = config.receipts.listen.filter(|_| is_needed) else { return Ok(None) };
        let failed = |error| StartError::Receipts { address, error };
        let listener = match before {
            Some((at, listener)) if at == address => listener,
            _ => Listener::bind(address).map_err(failed)?,
        };
        let clone = listener.try_clone().map_err(failed)?;
        *bound = Some((address, listener));
        Ok(Some(clone))
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").finish_non_exhaustive()
    }
}
