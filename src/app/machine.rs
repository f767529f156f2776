//! What lives as long as the process, whichever configuration is in use.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use actix_rt::ArbiterHandle;
use postrider_actors::{
    flow::{
        Bell, Bells, FileRates, HeldFeeds, Places, Progress, ProgressBoard, Tracing, TrafficControl,
        TroubleBoard, WorkerSetup,
    },
    model::time::MonoMs,
    ports::{Clock, InFlight},
    supervision::{ActorBoard, ChildId},
};
use postrider_http::receipts::HttpReceipts;
use postrider_otlp::Exporter;
use tokio::sync::RwLock;

use super::{announcer::Announcer, error::StartError, stores::Stores};
use crate::{
    alarm_board::AlarmBoard,
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
    /// The actors that run.
    pub(super) actors: ActorBoard,
    /// The alarms that are raised …
    pub(super) alarms: AlarmBoard,
    /// … and who is called for them.
    pub(super) announcer: Announcer,
    /// What keeps feeds and their files from going on.
    pub(super) troubles: TroubleBoard,
    pub(super) health: Health,
    /// Which feeds wait for room, and which destinations hold them up.
    pub(super) held: HeldFeeds,
    pub(super) systemd: Notifier,
    pub(super) telemetry: Telemetry,
    /// Where receipts are handed in. It stays bound across a reload, so that no sender is turned away.
    pub(super) receipts: Mutex<Option<(SocketAddr, TcpListener)>>,
    /// How many descriptors it may have, if that is limited.
    pub(super) descriptors: Option<u64>,
    /// Rung when receipts are in the inbox.
    pub(super) arrived: Bell,
    /// Event loops that the actors are spread over.
    pub(super) arbiters: Vec<ArbiterHandle>,
    /// The workers of the configuration in use. They lease what is due, unless several machines share it: then the
    /// coordinator sends hints of it first.
    pub(super) workers: Bells,
    /// What may be in flight to webhooks. Workers of an earlier configuration have their permits until they are done.
    pub(super) traffic: TrafficControl,
    /// The rates of feeds and files to webhooks; the same holds for them.
    pub(super) file_rates: FileRates,
    /// How many statements may be in flight at once, by warehouse; the same holds for them.
    pub(super) places: Mutex<BTreeMap<String, Places>>,
    /// What posts the spans of the configuration in use.
    pub(super) exporter: Mutex<Option<Arc<Exporter>>>,
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

    /// To ring when batches were appended.
    pub(super) fn appended(&self) -> Bells {
        self.feeder().unwrap_or_else(|| self.workers.clone())
    }

    /// To ring when something is due that has to be dispatched; `None` where workers lease what is due.
    fn feeder(&self) -> Option<Bells> {
        self.stores.carried.as_ref().map(|carried| vec![carried.queue.bell()].into())
    }

    /// The places for `name`, of which there are `size` from now on.
    pub(super) fn places(&self, name: &str, size: usize) -> Places {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let of_name = places.entry(name.to_owned()).or_insert_with(|| Places::new(size));
        of_name.resize(size);
        of_name.clone()
    }

    /// What the worker `id` has in common with every other, which `queued` wakes.
    pub(super) fn worker(
        &self,
        id: &ChildId,
        queued: &Bell,
        lease: Duration,
        tracing: Option<Tracing>,
    ) -> WorkerSetup {
        WorkerSetup {
            tracing,
            born: self.born,
            queue: self.stores.queue.clone(),
            ledger: self.stores.ledger.clone(),
            steering: self.stores.steering.clone(),
            clock: self.clock.clone(),
            queued: queued.clone(),
            due_again: self.feeder().unwrap_or_default(),
            successors: self.workers.clone(),
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
    pub(super) fn receipts_listener(&self, config: &Config) -> Result<Option<HttpReceipts>, StartError> {
        let mut bound = self.receipts.lock().unwrap_or_else(PoisonError::into_inner);
        let before = bound.take();
        let is_needed =
            config.receipt_sources.iter().any(|source| matches!(source.kind, SourceKind::Http(_)));
        let Some(address) = config.receipts.listen.filter(|_| is_needed) else { return Ok(None) };
        let failed = |error| StartError::Receipts { address, error };
        let listener = match before {
            Some((at, listener)) if at == address => listener,
            _ => TcpListener::bind(address).map_err(failed)?,
        };
        let clone = listener.try_clone().and_then(HttpReceipts::on).map_err(failed)?;
        *bound = Some((address, listener));
        Ok(Some(clone))
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").finish_non_exhaustive()
    }
}
