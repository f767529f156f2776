//! The daemon's self-check: reads the backlog, exports it, and watches the alarms.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use postrider_actors::{
    flow::{HeldFeeds, TrafficControl, TroubleBoard},
    metrics::{DestinationMetrics, QueueMetrics},
    model::{
        alarm::Growth,
        ceiling::DiskUse,
        ids::FileId,
        room::OpenMessages,
        standing::{ActorStanding, Standing, TrafficStanding},
        time::{MonoMs, UnixMs},
        traffic::limiter::Bound,
        trouble::{FeedTroubles, Troubles},
    },
    ports::{Clock, DestinationDepth},
    supervision::{ActorBoard, ActorReport},
};

use super::{
    alarms::{AlarmWatch, Looked},
    ceiling::{disks, fullest},
    machine::Machine,
    stores::{Stores, ToDo},
    troubles::NoteFile,
};
use crate::{
    config::{Config, LedgerKind, Profile, STATUS_FEED},
    telemetry::metrics::Metrics,
};

/// A store that does not answer within this time leaves the reading unknown.
pub(super) const READ_TIMEOUT: Duration = Duration::from_millis(500);

/// Counting the backlog takes time that grows with it: it is done again after so many times as long.
const READ_PAUSE_FACTOR: u32 = 100;

/// How much of the past a pace is taken of: long enough to be steady, short enough to follow a change.
pub(super) const PACE_WINDOW: Duration = Duration::from_secs(30);

/// A port that has done nothing right for so long has an engine that is away; less is a hiccup.
const AWAY_AFTER: Duration = Duration::from_secs(3);

/// A destination that is watched.
struct WatchedDestination {
    metrics: DestinationMetrics,
    /// Messages that got their final state, attempts, and those of them after which a message waits for another one.
    ended: Growth<3>,
    /// The most that this was per second lately.
    pace: f64,
}

/// What is left of the best pace after each second: half after some 20 minutes.
const PACE_LEFT: f64 = 0.9994;

/// The daemon's view of its own work. It lives as long as the process: a reload changes the rules and keeps
/// what is raised and what was seen.
pub(super) struct Watch {
    stores: Stores,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    troubles: TroubleBoard,
    trouble_file: NoteFile<Troubles>,
    traffic: TrafficControl,
    actors: ActorBoard,
    standing_file: NoteFile<Standing>,
    /// Since when feeds wait for room.
    waiting: BTreeMap<String, UnixMs>,
    /// The engines behind the ports.
    engines: EngineNames,
    alarms: AlarmWatch,
    /// What disks are looked at.
    disks: Vec<PathBuf>,
    /// Every destination that a configuration of this process had, by name.
    destinations: BTreeMap<String, WatchedDestination>,
    queue: QueueMetrics,
    /// The feeds of the configuration.
    feeds: BTreeSet<String>,
    held: HeldFeeds,
    to_do: Option<ToDo>,
    read_again: MonoMs,
}

impl Watch {
    /// Nothing was looked at yet.
    pub(super) fn new(machine: &Machine, config: &Config) -> Self {
        let mut watch = Self {
            stores: machine.stores.clone(),
            clock: machine.clock.clone(),
            metrics: machine.metrics.clone(),
            troubles: machine.troubles.clone(),
            trouble_file: NoteFile::new(&config.state.dir),
            traffic: machine.traffic.clone(),
            actors: machine.actors.clone(),
            standing_file: NoteFile::new(&config.state.dir),
            waiting: BTreeMap::new(),
            engines: EngineNames::of(config),
            alarms: AlarmWatch::new(machine, config),
            disks: Vec::new(),
            destinations: BTreeMap::new(),
            queue: machine.metrics.stages.queue(),
            feeds: BTreeSet::new(),
            held: machine.held.clone(),
            to_do: None,
            read_again: MonoMs(0),
        };
        watch.configure(config);
        watch
    }

    /// Another configuration is in use.
    pub(super) fn configure(&mut self, config: &Config) {
        self.alarms.configure(config);
        self.disks = disks(config).map(Path::to_owned).collect();
        self.held.keep(|feed| config.feeds.iter().any(|known| known.name == feed));
        for destination in &config.destinations {
            let name = &destination.name;
            self.destinations.entry(name.clone()).or_insert_with(|| {
                let metrics = self.metrics.stages.destination(name); // its counters go on
                WatchedDestination { metrics, ended: Growth::new(PACE_WINDOW), pace: 0.0 }
            });
        }
        for before in &self.feeds {
            self.metrics.troubles(before, None);
        }
        let names = config.feeds.iter().map(|feed| feed.name.clone());
        self.feeds =
            names.chain(config.receipts.events_to.as_ref().map(|_| STATUS_FEED.to_owned())).collect();
    }

    /// Reads, exports and judges. `files` is the pace of those that are on their way, `late` those that will not be done in
    /// time.
    pub(super) async fn look(&mut self, files: BTreeMap<FileId, f64>, late: Vec<(String, String)>) {
        let open = tokio::time::timeout(READ_TIMEOUT, self.stores.outbox.open_messages()).await;
        let open = open.ok().and_then(Result::ok);
        self.read_backlog().await;
        let overdue = self.to_do.as_ref().map(|to_do| self.oldest(to_do));
        self.export(open.as_ref(), overdue);
        let troubles = self.look_at_troubles().await;
        let traffic = self.look_at_traffic(files).await;
        let looked = Looked {
            now: self.clock.mono(),
            wall: self.clock.wall(),
            open,
            overdue,
            quarantined: self.quarantined().unwrap_or_default(),
            queue: self.queue.totals(),
            troubles,
            traffic,
            disk: self.disk().await,
            late,
        };
        self.alarms.look(looked).await;
    }

    /// The fullest disk; `None` if that does not answer.
    async fn disk(&self) -> Option<DiskUse> {
        let disks = self.disks.clone();
        let ask = tokio::task::spawn_blocking(move || fullest(disks.iter().map(PathBuf::as_path)));
        tokio::time::timeout(READ_TIMEOUT, ask).await.ok()?.ok()?
    }

    /// Exports what is wrong with feeds, their files and destinations.
    async fn look_at_troubles(&mut self) -> Troubles {
        let troubles = self.troubles.all();
        let none = FeedTroubles::default();
        for name in &self.feeds {
            self.metrics.troubles(name, Some(troubles.feeds.get(name).unwrap_or(&none)));
        }
        self.trouble_file.keep(&troubles).await;
        troubles
    }

    /// Exports how everything stands and notes it for commands; why each destination is suspect, and for how long its
    /// breaker has been open.
    async fn look_at_traffic(
        &mut self,
        files: BTreeMap<FileId, f64>,
    ) -> BTreeMap<String, (Option<String>, Option<Duration>)> {
        let (mut destinations, mut facts) = (BTreeMap::new(), BTreeMap::new());
        let wall = self.clock.wall();
        for (name, destination) in &mut self.destinations {
            let metrics = &destination.metrics;
            let totals = [metrics.ended(), metrics.totals().all, metrics.retries()];
            let [_, attempts, retries] = destination.ended.look(self.clock.mono(), totals);
            let retry_share = if attempts > 0 { retries as f64 / attempts as f64 } else { 0.0 };
            let per_s = destination.ended.per_s();
            destination.pace = per_s.max(destination.pace * PACE_LEFT);
            let pace = destination.pace;
            let mut standing = TrafficStanding { per_s, pace, retry_share, ..TrafficStanding::default() };
            if let Some((view, now, last_error)) = self.traffic.view(name) {
                destination.metrics.traffic(&view);
                let suspicion = view.suspicion.map(|suspicion| suspicion.to_string());
                facts.insert(name.clone(), (suspicion, view.open_since.map(|since| now.since(since))));
                let ago = |since: MonoMs| wall.before(now.since(since));
                standing = TrafficStanding {
                    limit: view.limit,
                    limit_max: view.bound.ceiling(),
                    is_found: matches!(view.bound, Bound::Auto { .. }),
                    brake: view.brake.map(|(brake, since)| (brake, ago(since))),
                    open_since: view.open_since.map(ago),
                    paused_until: view.paused_until.map(|until| wall.after(until.since(now))),
                    retry_tokens: view.retry_tokens,
                    in_flight: view.in_flight,
                    answer_ms: view.base.map(|base| base.as_secs_f64() * 1_000.0),
                    last_error,
                    ..standing
                };
            }
            destinations.insert(name.clone(), standing);
        }
        let waiting = self.waiting(wall);
        let (engines, actors) = (self.engines_away(wall), self.look_at_actors());
        self.standing_file.keep(&Standing { destinations, files, waiting, engines, actors }).await;
        facts
    }

    /// The actors that have something to do.
    fn look_at_actors(&self) -> Vec<ActorStanding> {
        self.actors.look(self.clock.mono());
        let standing = |report: ActorReport| ActorStanding {
            path: report.id.path.to_string(),
            name: report.name.to_owned(),
            busy_percent: report.busy_percent.unwrap_or_default().round() as u32,
            waiting: report.mailbox.map_or(0, |(waiting, _)| waiting),
        };
        let all = self.actors.list().into_iter().map(standing);
        all.filter(|actor| actor.busy_percent > 0 || actor.waiting > 0).collect()
    }

    /// Feeds that wait for room.
    fn waiting(&mut self, now: UnixMs) -> BTreeMap<String, (UnixMs, Vec<String>)> {
        let list = self.held.list();
        self.waiting.retain(|feed, _| list.iter().any(|(waits, _)| **waits == **feed));
        let waits = |(feed, by): (Arc<str>, Vec<Arc<str>>)| {
            let since = *self.waiting.entry(feed.to_string()).or_insert(now);
            (feed.to_string(), (since, by.iter().map(ToString::to_string).collect()))
        };
        list.into_iter().map(waits).collect()
    }

    /// Engines that have done nothing right for a while.
    fn engines_away(&self, now: UnixMs) -> BTreeMap<String, (UnixMs, String)> {
        let failing =
            self.metrics.failing_ports().into_iter().filter(|(_, lasting, _)| *lasting >= AWAY_AFTER);
        failing.map(|(port, lasting, why)| (self.engines.of_port(port), (now.before(lasting), why))).collect()
    }

    /// Batches that are set aside; `None` if that is not known.
    fn quarantined(&self) -> Option<u64> {
        Some(self.to_do.as_ref()?.batches?.quarantined)
    }

    async fn read_backlog(&mut self) {
        let begun = self.clock.mono();
        if begun < self.read_again {
            return;
        }
        let read = tokio::time::timeout(READ_TIMEOUT, self.stores.to_do(self.clock.wall())).await;
        self.to_do = read.ok().and_then(Result::ok);
        let now = self.clock.mono();
        self.read_again = now.after((now.since(begun) * READ_PAUSE_FACTOR).max(self.stores.look_pause()));
    }

    /// How long the oldest batch has been due; zero if none is.
    fn oldest(&self, to_do: &ToDo) -> Duration {
        let now = self.clock.wall();
        to_do.oldest_due.map_or(Duration::ZERO, |due: UnixMs| now.since(due))
    }

    fn export(&self, open: Option<&OpenMessages>, age: Option<Duration>) {
        let backlog = &self.metrics.backlog;
        for name in self.destinations.keys() {
            backlog.open(name, open.map(|open| open.get(name.as_str()).copied().unwrap_or(0)));
        }
        backlog.oldest(age);
        let batches = self.to_do.as_ref().and_then(|to_do| to_do.batches);
        backlog.outstanding(batches.map(|batches| batches.outstanding));
        backlog.quarantined(self.quarantined());
        backlog.queue(batches.map(|batches| (batches.queued, batches.leased)));
        if !self.stores.is_shared() {
            return;
        }
        for name in self.destinations.keys() {
            let depth = self.to_do.as_ref().map(|to_do| {
                let known = to_do.messages.iter().find(|depth| *depth.destination == **name);
                // What has no open message is not listed.
                let none =
                    || DestinationDepth { destination: name.as_str().into(), due: 0, waiting: 0, leased: 0 };
                known.cloned().unwrap_or_else(none)
            });
            backlog.messages(name, depth.as_ref());
        }
        backlog.entries(self.to_do.as_ref().map(|to_do| &to_do.entries[..]).unwrap_or_default());
    }
}

/// What operators call the engines behind the ports.
struct EngineNames {
    store: &'static str,
    rows: &'static str,
}

impl EngineNames {
    fn of(config: &Config) -> Self {
        let store = match config.profile {
            Profile::Embedded => "the store",
            Profile::Aws => "DynamoDB",
        };
        let rows = match config.ledger.kind {
            LedgerKind::Embedded => store,
            LedgerKind::Postgres => "Postgres",
        };
        Self { store, rows }
    }

    fn of_port(&self, port: &str) -> String {
        match port {
            "transport" => "SQS",
            "receipts" => self.rows,
            _ => self.store,
        }
        .to_owned()
    }
}
