//! The composition root: the only place where adapters, stages and supervision meet.
//!
//! A *reign* is the life of one tree under one configuration. A reload (SIGHUP) validates the new
//! configuration first; only then the old tree drains and a new one starts on the same store. A
//! configuration that can't be used changes nothing.

#[cfg(feature = "aws")]
mod aws;
pub mod console;
pub mod engines;
mod feeds;
#[cfg(any(feature = "aws", feature = "postgres"))]
mod patience;
#[cfg(feature = "postgres")]
mod postgres;
mod receipts;
mod recorded;
mod reign;
#[cfg(feature = "aws")]
mod remote;
mod signals;
mod status;
mod stores;
mod tables;
mod watch;

use std::{
    fmt,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use actix_rt::System;
use postrider_actors::{
    flow::ProgressBoard,
    model::time::MonoMs,
    ports::{Clock, InFlight},
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::RwLock,
};

use crate::{
    cli::Exit,
    clock::SystemClock,
    config::{Config, Delay, Dynamodb, LedgerKind, Postgres, Profile, Resolved, SourceKind, Sqs},
    ops::{Health, OpsServer, Phase, Serving},
    systemd::Notifier,
    telemetry::{Telemetry, metrics::Metrics},
};
#[cfg(feature = "postgres")]
pub use postgres::compare;
use postrider_files::in_flight::{IN_FLIGHT_FILE, InFlightFile};
use postrider_net::listener::Listener;
use postrider_sqlite::{InstanceLock, LockError, OpenError};
use reign::{End, Parts, Reign};
use stores::Stores;
use watch::Watch;

/// Threads for file reading and name lookups. SQLite has threads of its own: a DNS hang can't stall it.
const BLOCKING_THREADS_MAX: usize = 32;

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory is somebody else's.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The store can't be opened.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// A feed's directory can't be used.
    #[error("feeds.{feed}.path {path:?}: {error}; make the directory, or correct the path")]
    Feed {
        /// The feed.
        feed: String,
        /// Its path.
        path: std::path::PathBuf,
        /// What is wrong.
        error: std::io::Error,
    },
    /// An engine across the network can't be used.
    #[error("{engine}: {problem}")]
    Engine {
        /// Which.
        engine: String,
        /// What is wrong, and what to do.
        problem: String,
        /// Whether it may be better later.
        may_pass: bool,
    },
    /// A file beside the store can't be kept: the node's own identity, or what is in flight.
    #[error("{path:?}: {error}; check that this user may write there")]
    Node {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The ops server can't listen.
    #[error("ops.listen {address}: {error}; is another daemon there? choose another port, or \"\" for none")]
    Ops {
        /// Its address.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// Receipts can't be listened for.
    #[error("receipts.listen {address}: {error}; is another daemon there? choose another port")]
    Receipts {
        /// The address.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// A source of receipts can't be used.
    #[error("receipts.sources.{source_name}: {problem}")]
    Source {
        /// Its name.
        source_name: String,
        /// What is wrong.
        problem: String,
    },
    /// A destination can't be used.
    #[error("destinations.{name}: {problems}")]
    Destination {
        /// The destination.
        name: String,
        /// What is wrong.
        problems: String,
    },
    /// The system refuses threads or signals.
    #[error("the system refuses {what}: {error}")]
    System {
        /// What it refuses.
        what: &'static str,
        /// Why.
        error: std::io::Error,
    },
}

impl StartError {
    /// The exit code, by sysexits.h. 78 tells systemd that a restart won't help.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Lock(LockError::Held(_))
            | Self::Feed { .. }
            | Self::Ops { .. }
            | Self::Receipts { .. }
            | Self::Source { .. }
            | Self::Destination { .. }
            | Self::Engine { may_pass: false, .. } => Exit::Config,
            Self::Engine { may_pass: true, .. } => Exit::TryLater,
            Self::Lock(LockError::Io { .. }) | Self::Node { .. } | Self::System { .. } => Exit::Io,
            Self::Store(error) => error.into(),
        }
    }
}

/// What lives as long as the process.
struct Machine {
    runtime: Arc<Runtime>,
    stores: Stores,
    /// What this process has in flight …
    in_flight: Arc<dyn InFlight>,
    /// … and the lock on having anything: see `DeliverySetup::alone`.
    alone: Arc<RwLock<()>>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
    /// When the process was born.
    born: MonoMs,
    board: ProgressBoard,
    health: Health,
    systemd: Notifier,
    telemetry: Telemetry,
    /// Where receipts are handed in. It stays bound across a reload, so that no sender is turned away.
    receipts: Mutex<Option<(SocketAddr, Listener)>>,
}

impl Machine {
    /// The address that receipts are handed in at, if there is one.
    fn receipts_listener(&self, config: &Config) -> Result<Option<Listener>, StartError> {
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

/// Runs the daemon until it is told to stop or gives up, and returns its exit code. `reload` reads the
/// configuration anew.
pub fn run(
    resolved: Resolved,
    systemd: Notifier,
    telemetry: Telemetry,
    reload: impl Fn() -> anyhow::Result<Resolved>,
) -> Result<Exit, StartError> {
    let state_dir = resolved.config.state.dir.clone();
    let _lock = InstanceLock::acquire(&state_dir)?;
    let ops = bind_ops(&resolved)?;
    // As many threads as there are cores, or as TOKIO_WORKER_THREADS says.
    let runtime = Builder::new_multi_thread()
        .thread_name("postrider")
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .enable_all()
        .build()
        .map_err(|error| StartError::System { what: "threads", error })?;
    let runtime = Arc::new(runtime);
    let (clock, board): (Arc<dyn Clock>, _) = (Arc::new(SystemClock), ProgressBoard::default());
    let health = Health::new(board.clone(), clock.clone(), PATIENCE);
    let metrics = Arc::new(Metrics::default());
    let (in_flight, evidence) = InFlightFile::open(&state_dir)
        .map_err(|error| StartError::Node { path: state_dir.join(IN_FLIGHT_FILE), error })?;
    let stores = runtime.block_on(Stores::open(&resolved, &state_dir, &evidence, &clock, &metrics))?;
    let machine = Machine {
        runtime: runtime.clone(),
        stores,
        in_flight: Arc::new(in_flight),
        alone: Arc::default(),
        metrics,
        born: clock.mono(),
        clock,
        board,
        health,
        systemd,
        telemetry,
        receipts: Mutex::default(),
    };
    let system = System::with_tokio_rt(move || runtime);
    system.block_on(async {
        // Answers until the end: whoever asks meanwhile hears that the daemon starts, drains or reloads.
        let _serving = serve_ops(&machine, ops, &resolved)?;
        let exit = reign_until_stopped(&machine, resolved, &state_dir, reload).await;
        machine.stores.close().await;
        exit
    })
}

/// Takes the address that metrics and health are served at, if there is one.
fn bind_ops(resolved: &Resolved) -> Result<Option<OpsServer>, StartError> {
    let bind = |address| OpsServer::bind(address).map_err(|error| StartError::Ops { address, error });
    resolved.config.ops.listen.map(bind).transpose()
}

fn serve_ops(
    machine: &Machine,
    ops: Option<OpsServer>,
    resolved: &Resolved,
) -> Result<Option<Serving>, StartError> {
    let Some(ops) = ops else {
        return Ok(None);
    };
    let address = ops.address();
    let hosts = resolved.config.ops.allowed_hosts.clone();
    let serving = ops
        .serve(hosts, machine.health.clone(), machine.metrics.clone())
        .map_err(|error| StartError::Ops { address, error })?;
    tracing::info!(%address, "metrics and health are served");
    Ok(Some(serving))
}

async fn reign_until_stopped(
    machine: &Machine,
    resolved: Resolved,
    state_dir: &Path,
    reload: impl Fn() -> anyhow::Result<Resolved>,
) -> Result<Exit, StartError> {
    let mut signals =
        signals::Signals::new().map_err(|error| StartError::System { what: "signal handlers", error })?;
    let stores_of = engines_of(&resolved.config);
    let mut reign = Reign::start(machine, &resolved).await?;
    let mut watch = Watch::new(machine, &resolved.config);
    machine.health.enter(Phase::Ready);
    tell(machine.systemd.ready(&status::summary(&resolved.config)));
    tracing::info!(config = %resolved.config.file.display(), version = env!("CARGO_PKG_VERSION"),
        feeds = resolved.config.feeds.len(), destinations = resolved.config.destinations.len(), "started");
    loop {
        match reign.until_signalled(machine, &mut watch, &mut signals).await {
            End::Ended(exit) => return Ok(exit),
            End::Stop => {
                machine.health.enter(Phase::Stopping);
                tell(machine.systemd.stopping());
                return Ok(reign.drain(&mut signals).await);
            }
            End::Reload => {
                machine.health.enter(Phase::Reloading);
                tell(machine.systemd.reloading());
                match Box::pin(usable(machine, reload(), state_dir, &stores_of)).await {
                    Ok((new, parts)) => {
                        let exit = reign.drain(&mut signals).await;
                        if exit != Exit::Done {
                            return Ok(exit);
                        }
                        reign = Reign::start_with(machine, &new, parts);
                        watch.configure(&new.config);
                        tracing::info!("the new configuration is in use");
                    }
                    Err(error) => {
                        tracing::error!("the new configuration is not used, the old one stays: {error:#}");
                    }
                }
                machine.health.enter(Phase::Ready);
                tell(machine.systemd.ready("running"));
            }
        }
    }
}

/// What is opened once.
#[derive(PartialEq)]
struct Engines {
    aws: Option<(Dynamodb, Sqs, Delay)>,
    postgres: Option<Postgres>,
    keeps_changes: bool,
}

fn engines_of(config: &Config) -> Engines {
    let aws = || (config.dynamodb.clone(), config.sqs.clone(), config.delay.clone());
    Engines {
        aws: (config.profile == Profile::Aws).then(aws),
        postgres: (config.ledger.kind == LedgerKind::Postgres).then(|| config.postgres.clone()),
        keeps_changes: config.receipts.events_to.is_some(),
    }
}

/// A notification that systemd does not take is worth a line, not an end.
fn tell(notified: std::io::Result<()>) {
    if let Err(error) = notified {
        tracing::warn!(%error, "systemd does not take notifications");
    }
}

/// A new configuration with everything that could still prove it unusable done.
async fn usable(
    machine: &Machine,
    new: anyhow::Result<Resolved>,
    state_dir: &Path,
    engines: &Engines,
) -> anyhow::Result<(Resolved, Parts)> {
    let new = new?;
    let dir = &new.config.state.dir;
    // The store stays open across a reload.
    anyhow::ensure!(
        dir == state_dir,
        "state.dir: {dir:?} is not {state_dir:?}; it can't change while the daemon runs, restart it"
    );
    // So do the stores that it opened.
    anyhow::ensure!(
        engines_of(&new.config) == *engines,
        "profile, ledger.kind and their settings, and whether receipts.events_to is set, can't change while \
         the daemon runs, restart it"
    );
    let parts = Parts::build(machine, &new).await?;
    Ok((new, parts))
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").finish_non_exhaustive()
    }
}

/// How often the daemon looks at itself: signs of life, the status line.
const LOOK: Duration = Duration::from_secs(1);

/// How old an actor's sign of life may be before the watchdog is left unfed and probes are told.
const PATIENCE: Duration = Duration::from_secs(20);

/// How many looks lie between two reports of suppressed log lines.
const LOOKS_PER_LOG_REPORT: u64 = 60;
