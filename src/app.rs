//! The composition root: the only place where adapters, stages and supervision meet.
//!
//! [`run`] opens what lives as long as the process (`machine`): stores, metrics, listeners, places. Under it lives a
//! `generation`, trees of actors built from one configuration: `feeds` take files and entries in, `delivery` and `tables`
//! send, `receipts` join what comes back. A reload (SIGHUP) validates the new configuration first; only then each tree
//! is handed over to its successor on the same stores. A configuration that can't be used changes nothing. Commands ask for
//! one by a file (`reload`).
//!
//! `console` and `engines` are for commands, with no daemon.

mod alarms;
mod announcer;
#[cfg(feature = "aws")]
mod aws;
pub(crate) mod ceiling;
mod clients;
pub mod console;
mod delivery;
pub mod engines;
mod error;
mod feeds;
mod generation;
mod lookout;
mod machine;
#[cfg(any(feature = "aws", feature = "postgres"))]
mod patience;
#[cfg(feature = "postgres")]
mod postgres;
pub mod preflight;
mod receipts;
mod recorded;
pub(crate) mod reload;
#[cfg(feature = "aws")]
mod remote;
mod signals;
mod state_dir;
mod status;
mod stores;
mod tables;
mod traces;
mod tree;
pub(crate) mod troubles;
mod watch;

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use actix_rt::{Arbiter, System};
use postrider_actors::{
    flow::{Bell, Bells, FileRates, HeldFeeds, ProgressBoard, TrafficControl, TroubleBoard},
    ports::Clock,
    supervision::ActorBoard,
};
use postrider_files::in_flight::{IN_FLIGHT_FILE, InFlightFile};
use postrider_sqlite::InstanceLock;
use tokio::runtime::{Builder, Runtime};

use crate::{
    alarm_board::AlarmBoard,
    api::{Api, desk::InUse, live::Sources},
    clock::SteadyClock,
    config::{Config, Delay, Dynamodb, LedgerKind, OPS_LISTEN, Postgres, Profile, Resolved, Sqs},
    descriptors,
    exit::Exit,
    ops::{Health, OpsServer, OpsSetup, Phase, Serving},
    systemd::Notifier,
    telemetry::{Telemetry, metrics::Metrics},
};
use announcer::Announcer;
use generation::{Generation, Parts};
use lookout::Lookout;
use machine::Machine;
use reload::Reloads;
use signals::{Asked, Signals};
use stores::Stores;
use troubles::OpsNote;

pub use error::StartError;
#[cfg(feature = "postgres")]
pub use postgres::compare;

/// Event loops that the actors are spread over. Their work is on the runtime's threads; more gained nothing in
/// measurements.
const ARBITERS: usize = 2;

/// Threads for file reading and name lookups. SQLite has threads of its own: a DNS hang can't stall it.
const BLOCKING_THREADS_MAX: usize = 32;

/// How long the end of the process waits for what whoever is on call is to hear.
const LAST_EVENTS: Duration = Duration::from_secs(2);

/// Runs the daemon until it is asked to stop or gives up, and returns its exit code. `reload` reads the configuration
/// anew.
pub fn run(
    resolved: Resolved,
    systemd: Notifier,
    telemetry: Telemetry,
    reload: impl Fn() -> anyhow::Result<Resolved>,
) -> Result<Exit, StartError> {
    let state_dir = resolved.config.state.dir.clone();
    let _lock = InstanceLock::acquire(&state_dir)?;
    let descriptors = descriptors::raise_limit();
    warn_of_shortfall(&resolved.config, descriptors);
    descriptors::check_start().map_err(|error| StartError::System { what: "file descriptors", error })?;
    let ops = bind_ops(&resolved)?;
    let runtime = runtime()?;
    let steady = Arc::new(SteadyClock::default());
    let clock: Arc<dyn Clock> = steady.clone();
    let (board, held) = (ProgressBoard::default(), HeldFeeds::default());
    let metrics = Arc::new(Metrics::default());
    let (in_flight, evidence) = InFlightFile::open(&state_dir)
        .map_err(|error| StartError::Node { path: state_dir.join(IN_FLIGHT_FILE), error })?;
    let stores = runtime.block_on(Stores::open(&resolved, &state_dir, &evidence, &clock, &metrics))?;
    metrics.watch_disk(&state_dir);
    runtime.block_on(note_last_files(&stores, &resolved.config, &metrics));
    state_dir::set_permissions(&state_dir)
        .map_err(|error| StartError::Node { path: state_dir.clone(), error })?;
    let system = System::with_tokio_rt({
        let runtime = runtime.clone();
        move || runtime
    });
    let arbiter = |_| {
        let runtime = runtime.clone();
        Arbiter::with_tokio_rt(move || runtime)
    };
    let arbiters: Vec<_> = (0..ARBITERS).map(arbiter).collect();
    let workers = Bells::default();
    stores.queue.on_arrival(Arc::new({
        let workers = workers.clone();
        move || workers.ring()
    }));
    let machine = Arc::new(Machine {
        actors: ActorBoard::default(),
        alarms: AlarmBoard::default(),
        announcer: Announcer::new(clock.clone(), &metrics),
        troubles: TroubleBoard::new(clock.clone()),
        stores,
        in_flight: Arc::new(in_flight),
        alone: Arc::default(),
        metrics,
        born: clock.mono(),
        health: Health::new(board.clone(), clock.clone(), held.clone()),
        held,
        traffic: TrafficControl::new(clock.clone()),
        file_rates: FileRates::default(),
        clock,
        steady,
        board,
        systemd,
        telemetry,
        receipts: Mutex::default(),
        descriptors,
        arrived: Bell::default(),
        arbiters: arbiters.iter().map(Arbiter::handle).collect(),
        workers,
        places: Mutex::default(),
        exporter: Mutex::default(),
    });
    runtime.spawn(machine.beat("runtime"));
    for (number, arbiter) in arbiters.iter().enumerate() {
        arbiter.spawn(machine.beat(&format!("arbiter {number}")));
    }
    let exit = system.block_on(async {
        // Answers until the end: whoever asks meanwhile hears that the daemon starts, drains or reloads.
        let in_use = InUse::new(&resolved.config);
        let _serving = serve_ops(&machine, ops, &resolved, &in_use)?;
        machine.announcer.start();
        let exit = run_generations(&machine, resolved, &state_dir, &in_use, reload).await;
        machine.announcer.finish(LAST_EVENTS).await;
        machine.stores.close().await;
        exit
    });
    for arbiter in &arbiters {
        arbiter.stop();
    }
    exit
}

/// Says so where a configuration may need more descriptors than there are.
/// Files that are looked through for each feed's last one.
const LAST_FILES_MAX: usize = 200;

/// Says when each feed's last file came, of those among the latest: who waits for the next one must not start anew.
async fn note_last_files(stores: &Stores, config: &Config, metrics: &Metrics) {
    let look = stores.ledger.latest_files(LAST_FILES_MAX);
    // Without it the metric is absent until the next file.
    let Ok(Ok(files)) = tokio::time::timeout(watch::READ_TIMEOUT, look).await else { return };
    for feed in &config.feeds {
        let of_it = files.iter().filter(|report| report.file.feed == feed.name);
        if let Some(at) = of_it.filter_map(|report| report.closed_at).max() {
            metrics.stages.feed(&feed.name).last_closed(at);
        }
    }
}

fn warn_of_shortfall(config: &Config, limit: Option<u64>) {
    if let Some(shortfall) = descriptors::shortfall(config, limit) {
        tracing::warn!("{}", shortfall.detail);
    }
}

/// As many threads as there are cores, or as `TOKIO_WORKER_THREADS` says.
fn runtime() -> Result<Arc<Runtime>, StartError> {
    let runtime = Builder::new_multi_thread()
        .thread_name("postrider")
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .enable_all()
        .build();
    runtime.map(Arc::new).map_err(|error| StartError::System { what: "threads", error })
}

/// Ports from the default on that daemons of one machine share out.
const OPS_PORTS: u16 = 32;

/// Takes the address of the ops server, if there is one. By default a daemon takes the first port that no other has; where
/// an operator has chosen one, it is that or none.
fn bind_ops(resolved: &Resolved) -> Result<Option<OpsServer>, StartError> {
    let Some(address) = resolved.config.ops.listen else { return Ok(None) };
    let failed = |error| StartError::Ops { address, error };
    if address != OPS_LISTEN {
        return OpsServer::bind(address).map(Some).map_err(failed);
    }
    for port in (address.port()..).take(OPS_PORTS.into()) {
        match OpsServer::bind(SocketAddr::new(address.ip(), port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            bound => return bound.map(Some).map_err(failed),
        }
    }
    tracing::warn!(%address, ports = OPS_PORTS, "every port is taken: metrics, health and /api/v1 are not served; set ops.listen");
    Ok(None)
}

fn serve_ops(
    machine: &Machine,
    ops: Option<OpsServer>,
    resolved: &Resolved,
    in_use: &InUse,
) -> Result<Option<Serving>, StartError> {
    let secrets = &resolved.ops;
    let note = OpsNote {
        address: ops.as_ref().map(OpsServer::address),
        has_tls: secrets.identity.is_some(),
        has_tokens: secrets.view.is_some() || secrets.operate.is_some(),
    };
    if let Err(error) = troubles::write(&resolved.config.state.dir, &note) {
        tracing::warn!(%error, "commands can't find the ops server");
    }
    let Some((ops, address)) = ops.zip(note.address) else { return Ok(None) };
    let api = Api::start(Sources {
        in_use: in_use.clone(),
        clock: machine.clock.clone(),
        started_at: machine.clock.wall(),
        traffic: machine.traffic.clone(),
        troubles: machine.troubles.clone(),
        metrics: machine.metrics.clone(),
        health: machine.health.clone(),
        alarms: machine.alarms.clone(),
        actors: machine.actors.clone(),
    });
    let api = api.map_err(|error| StartError::System { what: "threads", error })?;
    let setup = OpsSetup {
        allowed_hosts: resolved.config.ops.allowed_hosts.clone(),
        secrets: secrets.clone(),
        health: machine.health.clone(),
        metrics: machine.metrics.clone(),
        api,
    };
    let serving = ops.serve(setup).map_err(|error| StartError::Ops { address, error })?;
    let is_other = resolved.config.ops.listen.is_some_and(|asked| asked.port() != 0 && asked != address);
    let why = if is_other { "; another daemon has the port before it" } else { "" };
    tracing::info!(%address, "metrics and health are served{why}");
    Ok(Some(serving))
}

/// One generation after the other, until the operator or one of them ends the process.
async fn run_generations(
    machine: &Arc<Machine>,
    resolved: Resolved,
    state_dir: &Path,
    in_use: &InUse,
    reload: impl Fn() -> anyhow::Result<Resolved>,
) -> Result<Exit, StartError> {
    let mut signals =
        Signals::new().map_err(|error| StartError::System { what: "signal handlers", error })?;
    let opened = opened_once(&resolved.config);
    let lookout = Lookout::start(machine, &resolved.config);
    let parts = Parts::build(machine, &resolved).await?;
    let mut generation = Generation::start(machine, &resolved, parts).await;
    let (mut timeout, file) = (resolved.config.shutdown.timeout, resolved.config.file.clone());
    let mut reloads = Reloads::new(state_dir);
    machine.health.enter(Phase::Ready);
    machine.notify(|systemd| systemd.ready(&status::summary(&resolved.config)));
    tracing::info!(config = %resolved.config.file.display(), version = env!("CARGO_PKG_VERSION"),
        feeds = resolved.config.feeds.len(), destinations = resolved.config.destinations.len(), "started");
    loop {
        tokio::select! {
            exit = generation.give_up() => {
                stop(machine, generation, timeout, &mut signals).await;
                return Ok(exit);
            }
            asked = signals.next() => if asked == Asked::Stop {
                return Ok(stop(machine, generation, timeout, &mut signals).await);
            },
            () = reloads.asked() => {}
        }
        machine.health.enter(Phase::Reloading);
        machine.notify(Notifier::reloading);
        let asked = reloads.take();
        let prepared = async {
            let used = Box::pin(usable(machine, reload(), state_dir, &opened)).await;
            (generation.room().await, used)
        };
        let (exit, used) = tokio::select! {
            prepared = prepared => prepared,
            () = signals.stop() => return Ok(stop(machine, generation, timeout, &mut signals).await),
        };
        if exit != Exit::Done {
            stop(machine, generation, timeout, &mut signals).await;
            return Ok(exit);
        }
        match used {
            Ok((new, parts)) => {
                let mut is_to_stop = false;
                let replace = generation.replace(machine, &new, parts);
                match unless_hurried(replace, &mut signals, &mut is_to_stop).await {
                    Some(Exit::Done) => {}
                    Some(exit) => {
                        stop(machine, generation, timeout, &mut signals).await;
                        return Ok(exit);
                    }
                    None => return Ok(Exit::Failed),
                }
                timeout = new.config.shutdown.timeout;
                lookout.configure(&new.config);
                in_use.replace(&new.config);
                warn_of_shortfall(&new.config, machine.descriptors);
                tracing::info!("the new configuration is in use");
                reloads.answer(asked, &file, None);
                if is_to_stop {
                    return Ok(stop(machine, generation, timeout, &mut signals).await);
                }
            }
            Err(error) => {
                tracing::error!("the new configuration is not used, the old one stays: {error:#}");
                reloads.answer(asked, &file, Some(&format!("{error:#}")));
            }
        }
        machine.health.enter(Phase::Ready);
        machine.notify(|systemd| systemd.ready("running"));
    }
}

/// Drains for good, within `timeout`; the second request to stop ends the process at once.
async fn stop(
    machine: &Machine,
    mut generation: Generation,
    timeout: Duration,
    signals: &mut Signals,
) -> Exit {
    machine.health.enter(Phase::Stopping);
    machine.notify(Notifier::stopping);
    tracing::info!(timeout_ms = timeout.as_millis() as u64, "draining");
    let end = tokio::time::timeout(timeout, generation.end());
    let exit = match unless_hurried(end, signals, &mut true).await {
        Some(Ok(exit)) => {
            tracing::info!(?exit, "drained");
            exit
        }
        Some(Err(_)) => {
            tracing::error!("the drain took longer than shutdown.timeout; what is in flight is resent later");
            Exit::Software
        }
        None => return Exit::Failed,
    };
    // Outside of the drain: a collector that does not answer must not make a failure of it.
    unless_hurried(traces::post_last(machine), signals, &mut true).await;
    exit
}

/// Does `work` to its end, unless the operator asks to stop for the second time; `is_to_stop` says whether it was asked
/// for.
async fn unless_hurried<T>(
    work: impl Future<Output = T>,
    signals: &mut Signals,
    is_to_stop: &mut bool,
) -> Option<T> {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return Some(done),
            () = signals.stop() => {
                if *is_to_stop {
                    tracing::warn!("asked to stop a second time: stopping at once");
                    return None;
                }
                tracing::info!("asked to stop during a reload: stopping when the drain is done");
                *is_to_stop = true;
            }
        }
    }
}

/// The part of a configuration whose engines are opened once, at the start.
#[derive(PartialEq)]
struct OpenedOnce {
    aws: Option<(Dynamodb, Sqs, Delay)>,
    postgres: Option<Postgres>,
    keeps_changes: bool,
}

fn opened_once(config: &Config) -> OpenedOnce {
    let aws = || (config.dynamodb.clone(), config.sqs.clone(), config.delay.clone());
    OpenedOnce {
        aws: (config.profile == Profile::Aws).then(aws),
        postgres: (config.ledger.kind == LedgerKind::Postgres).then(|| config.postgres.clone()),
        keeps_changes: config.receipts.events_to.is_some(),
    }
}

/// A new configuration with everything that could still prove it unusable done.
async fn usable(
    machine: &Arc<Machine>,
    new: anyhow::Result<Resolved>,
    state_dir: &Path,
    opened: &OpenedOnce,
) -> anyhow::Result<(Resolved, Parts)> {
    let new = new?;
    let dir = &new.config.state.dir;
    anyhow::ensure!(
        dir == state_dir,
        "state.dir: {dir:?} is not {state_dir:?}; it can't change while the daemon runs, restart it"
    );
    anyhow::ensure!(
        opened_once(&new.config) == *opened,
        "profile, ledger.kind and their settings, and whether receipts.events_to is set, can't change while \
         the daemon runs, restart it"
    );
    let parts = Parts::build(machine, &new).await?;
    Ok((new, parts))
}
