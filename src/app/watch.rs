//! The daemon's self-check: reads the backlog, exports it, and watches the alarms.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use postrider_actors::{
    flow::{HeldFeeds, TrafficControl, TroubleBoard},
    metrics::{DestinationMetrics, FeedMetrics, QueueMetrics, Totals},
    model::{
        alarm::{Alarm, AlarmEvent, AlarmKind, AlarmRule, Growth, Reading, failure_percent},
        ids::FileId,
        room::OpenMessages,
        standing::{Standing, TrafficStanding},
        time::{MonoMs, UnixMs},
        traffic::limiter::Bound,
        trouble::{FeedTroubles, Trouble, Troubles},
    },
    ports::{Clock, DestinationDepth},
};

use super::{
    machine::Machine,
    stores::{Stores, ToDo},
    troubles::NoteFile,
};
use crate::{
    config::{Alarms, Config, LedgerKind, Profile, STATUS_FEED},
    telemetry::metrics::Metrics,
};

/// A store that does not answer within this time leaves the reading unknown.
pub(super) const READ_TIMEOUT: Duration = Duration::from_millis(500);

/// Files that are held and named by their alarm.
const HELD_NAMED: usize = 3;

/// Counting the backlog takes time that grows with it: it is done again after so many times as long.
const READ_PAUSE_FACTOR: u32 = 100;

/// How much of the past a pace is taken of: long enough to be steady, short enough to follow a change.
pub(super) const PACE_WINDOW: Duration = Duration::from_secs(30);

/// A port that has done nothing right for so long has an engine that is away; less is a hiccup.
const AWAY_AFTER: Duration = Duration::from_secs(3);

/// A destination that is watched.
struct WatchedDestination {
    metrics: DestinationMetrics,
    /// Attempts, and those that failed.
    attempts: Growth<2>,
    /// Messages that got their final state.
    ended: Growth<1>,
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
    standing_file: NoteFile<Standing>,
    /// Since when feeds wait for room.
    waiting: BTreeMap<String, UnixMs>,
    /// The engines behind the ports.
    engines: EngineNames,
    config: Alarms,
    alarms: [Alarm; AlarmKind::ALL.len()],
    /// Every destination that a configuration of this process had, by name.
    destinations: BTreeMap<String, WatchedDestination>,
    queue: (QueueMetrics, Growth<2>),
    /// The feeds of the configuration, by name.
    feeds: BTreeMap<String, FeedMetrics>,
    dead: Growth<1>,
    shortages: Growth<1>,
    unusable_files: Growth<1>,
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
            standing_file: NoteFile::new(&config.state.dir),
            waiting: BTreeMap::new(),
            engines: EngineNames::of(config),
            config: config.alarms.clone(),
            alarms: AlarmKind::ALL.map(|kind| Alarm::new(rule(&config.alarms, kind))),
            destinations: BTreeMap::new(),
            queue: (machine.metrics.stages.queue(), Growth::new(Duration::ZERO)),
            feeds: BTreeMap::new(),
            dead: Growth::new(Duration::ZERO),
            shortages: Growth::new(SHORTAGE_WINDOW),
            unusable_files: Growth::new(Duration::ZERO),
            held: machine.held.clone(),
            to_do: None,
            read_again: MonoMs(0),
        };
        watch.configure(config);
        watch
    }

    /// Another configuration is in use.
    pub(super) fn configure(&mut self, config: &Config) {
        self.config = config.alarms.clone();
        self.held.keep(|feed| config.feeds.iter().any(|known| known.name == feed));
        let window = config.alarms.failures.window;
        for destination in &config.destinations {
            let name = &destination.name;
            self.destinations.entry(name.clone()).or_insert_with(|| {
                let metrics = self.metrics.stages.destination(name); // its counters go on
                let (attempts, ended) = (Growth::new(window), Growth::new(PACE_WINDOW));
                WatchedDestination { metrics, attempts, ended, pace: 0.0 }
            });
        }
        for destination in self.destinations.values_mut() {
            destination.attempts.set_window(window);
        }
        self.queue.1.set_window(window);
        self.dead.set_window(config.alarms.dead.window);
        self.unusable_files.set_window(config.alarms.dead.window);
        for before in self.feeds.keys() {
            self.metrics.troubles(before, None);
        }
        let names = config.feeds.iter().map(|feed| feed.name.as_str());
        let names = names.chain(config.receipts.events_to.as_ref().map(|_| STATUS_FEED));
        // Their counters go on.
        self.feeds = names.map(|name| (name.to_owned(), self.metrics.stages.feed(name))).collect();
        for (kind, alarm) in AlarmKind::ALL.into_iter().zip(&mut self.alarms) {
            alarm.set_rule(rule(&config.alarms, kind));
            self.metrics.alarm(kind, Some(alarm.is_active()));
        }
    }

    /// Reads, exports and judges. `files` is the pace of those that are on their way.
    pub(super) async fn look(&mut self, files: BTreeMap<FileId, f64>) {
        let open = tokio::time::timeout(READ_TIMEOUT, self.stores.outbox.open_messages()).await;
        let open = open.ok().and_then(Result::ok);
        self.read_backlog().await;
        let age = self.to_do.as_ref().map(|to_do| self.oldest(to_do));
        self.export(open.as_ref(), age);
        let now = self.clock.mono();
        let (percent, where_) = self.failures(now);
        let total = |of: fn(&DestinationMetrics) -> u64| {
            self.destinations.values().map(|destination| of(&destination.metrics)).sum()
        };
        let (dead, shortages) = (total(DestinationMetrics::dead), total(DestinationMetrics::shortages));
        let ([dead], [shortages]) = (self.dead.look(now, [dead]), self.shortages.look(now, [shortages]));
        let (deepest, deepest_at) = deepest(open.as_ref(), &self.held.list());
        let troubles = self.look_at_troubles().await;
        let suspects = self.look_at_traffic(files).await;
        let unusable = self.feeds.values().map(FeedMetrics::unusable_files).sum();
        let [unusable] = self.unusable_files.look(now, [unusable]);
        let Troubles { feeds, destinations } = troubles;
        let parked: Vec<_> = feeds.iter().filter_map(|(feed, troubles)| parked(feed, troubles)).collect();
        let held: usize = feeds.values().map(|troubles| troubles.held.len()).sum();
        let at_held =
            feeds.iter().flat_map(|(feed, troubles)| troubles.held.iter().map(move |held| (feed, held)));
        let at_held = at_held.map(|(feed, (name, trouble))| format!("{feed}: {name}: {}", trouble.reason));
        let at_held: Vec<_> = at_held.take(HELD_NAMED).collect();
        let line = |(name, trouble): (&String, &Trouble)| format!("{name}: {}", trouble.reason);
        let blocked: Vec<_> = destinations.iter().map(line).collect();
        let readings: [(Reading, String); AlarmKind::ALL.len()] = [
            (deepest, deepest_at),
            (Some(percent), where_.unwrap_or_default()),
            (age.map(|age| age.as_secs_f64()), String::new()),
            (Some(dead as f64), String::new()),
            (Some(shortages as f64), String::new()),
            (Some(parked.len() as f64), parked.join("; ")),
            (Some(unusable as f64 + held as f64), at_held.join("; ")),
            (Some(self.quarantined().unwrap_or_default() as f64), String::new()),
            (Some(blocked.len() as f64), blocked.join("; ")),
            (Some(suspects.len() as f64), suspects.join("; ")),
        ];
        for ((kind, alarm), (reading, at)) in AlarmKind::ALL.into_iter().zip(&mut self.alarms).zip(readings) {
            if let Some(event) = alarm.look(now, reading) {
                log_alarm(kind, alarm.rule(), event, &at);
                self.metrics.alarm(kind, Some(alarm.is_active()));
            }
        }
    }

    /// Exports what is wrong with feeds, their files and destinations.
    async fn look_at_troubles(&mut self) -> Troubles {
        let troubles = self.troubles.all();
        let none = FeedTroubles::default();
        for name in self.feeds.keys() {
            self.metrics.troubles(name, Some(troubles.feeds.get(name).unwrap_or(&none)));
        }
        self.trouble_file.keep(&troubles).await;
        troubles
    }

    /// Exports how everything stands and notes it for commands; which destinations are suspect, and why.
    async fn look_at_traffic(&mut self, files: BTreeMap<FileId, f64>) -> Vec<String> {
        let (mut destinations, mut suspects) = (BTreeMap::new(), Vec::new());
        let wall = self.clock.wall();
        for (name, destination) in &mut self.destinations {
            destination.ended.look(self.clock.mono(), [destination.metrics.ended()]);
            let per_s = destination.ended.per_s();
            destination.pace = per_s.max(destination.pace * PACE_LEFT);
            let pace = destination.pace;
            let mut standing = TrafficStanding { per_s, pace, ..TrafficStanding::default() };
            if let Some((view, now, last_error)) = self.traffic.view(name) {
                destination.metrics.traffic(&view);
                suspects.extend(view.suspicion.map(|suspicion| format!("{name}: {suspicion}")));
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
        let engines = self.engines_away(wall);
        self.standing_file.keep(&Standing { destinations, files, waiting, engines }).await;
        suspects
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

    /// The worst failure rate, and whose it is: a small destination that fails must not be outvoted.
    fn failures(&mut self, now: MonoMs) -> (f64, Option<String>) {
        let percent = |totals: Totals, growth: &mut Growth<2>| {
            let [all, failed] = growth.look(now, [totals.all, totals.failed]);
            failure_percent(all, failed, ATTEMPTS_MIN)
        };
        let mut worst = (percent(self.queue.0.totals(), &mut self.queue.1), None);
        if worst.0 > 0.0 {
            worst.1 = Some("queue".to_owned());
        }
        for (name, destination) in &mut self.destinations {
            let percent = percent(destination.metrics.totals(), &mut destination.attempts);
            if percent > worst.0 {
                worst = (percent, Some(name.clone()));
            }
        }
        worst
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

/// The most messages that are open at one destination, and which it is and what it holds up.
fn deepest(open: Option<&OpenMessages>, held: &[(Arc<str>, Vec<Arc<str>>)]) -> (Reading, String) {
    let Some(open) = open else { return (None, String::new()) };
    let Some((name, &messages)) = open.iter().max_by_key(|(_, messages)| **messages) else {
        return (Some(0.0), String::new());
    };
    let feeds: Vec<_> = held.iter().filter(|(_, by)| by.contains(name)).map(|(feed, _)| &**feed).collect();
    let holds = if feeds.is_empty() { String::new() } else { format!(", holds up {}", feeds.join(", ")) };
    (Some(messages as f64), format!("{name}{holds}"))
}

/// Attempts (or batches) below which no rate is computed: one of two is not 50 %.
const ATTEMPTS_MIN: u64 = 20;

/// An alarm clears at this share of its bound, and after so long: between the two it stays what it is.
const CLEAR_AT: f64 = 0.8;
const CLEAR_AFTER: Duration = Duration::from_mins(1);

/// How long the backlog must be too high: a burst is worth no alarm.
const DEPTH_RAISE_AFTER: Duration = Duration::from_mins(1);

/// How long ago this machine may have lacked something for the alarm to stay raised.
const SHORTAGE_WINDOW: Duration = Duration::from_mins(1);

fn rule(config: &Alarms, kind: AlarmKind) -> AlarmRule {
    // The window is its hysteresis: what happened once is looked at for as long.
    let any_above = |threshold: f64| AlarmRule {
        threshold,
        clear_at: threshold,
        raise_after: Duration::ZERO,
        clear_after: Duration::ZERO,
    };
    let (threshold, raise_after) = match kind {
        AlarmKind::Depth => (config.depth.max_messages as f64, DEPTH_RAISE_AFTER),
        AlarmKind::Failures => (config.failures.max_percent.into(), Duration::ZERO),
        AlarmKind::Latency => (config.latency.max.as_secs_f64(), Duration::ZERO),
        AlarmKind::Dead => return any_above(config.dead.max_messages as f64),
        AlarmKind::Shortage
        | AlarmKind::Feeds
        | AlarmKind::Files
        | AlarmKind::Damage
        | AlarmKind::Blocked
        | AlarmKind::Suspects => return any_above(0.0),
    };
    AlarmRule { threshold, clear_at: threshold * CLEAR_AT, raise_after, clear_after: CLEAR_AFTER }
}

/// `FEED: why`, if it is parked.
fn parked(feed: &str, troubles: &FeedTroubles) -> Option<String> {
    troubles.parked.as_ref().map(|trouble| format!("{feed}: {}", trouble.reason))
}

/// The unit that a value and its threshold are in.
fn unit(kind: AlarmKind) -> &'static str {
    match kind {
        AlarmKind::Depth | AlarmKind::Dead => "messages",
        AlarmKind::Failures => "percent",
        AlarmKind::Latency => "seconds",
        AlarmKind::Shortage => "attempts",
        AlarmKind::Feeds => "feeds",
        AlarmKind::Files => "files",
        AlarmKind::Damage => "batches",
        AlarmKind::Blocked | AlarmKind::Suspects => "destinations",
    }
}

fn log_alarm(kind: AlarmKind, rule: &AlarmRule, event: AlarmEvent, at: &str) {
    let (alarm, unit) = (kind.as_str(), unit(kind));
    match event {
        AlarmEvent::Raised(Some(value)) => {
            tracing::warn!(alarm, value, threshold = rule.threshold, unit, at, "alarm raised");
        }
        AlarmEvent::Raised(None) => {
            tracing::warn!(alarm, value = "unknown", threshold = rule.threshold, unit, "alarm raised");
        }
        AlarmEvent::Cleared(value) => {
            tracing::info!(alarm, value, clear_at = rule.clear_at, unit, "alarm cleared");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alert_rules_hold_the_defaults() {
        let rules = include_str!("../../config/alerts.yml");
        let alarms =
            crate::config::parse("", std::path::Path::new("x"), []).expect("the defaults are fine").alarms;
        let threshold = |kind| rule(&alarms, kind).threshold;
        let window = Duration::from_mins(5);
        assert_eq!((alarms.failures.window, alarms.dead.window), (window, window));
        for bound in [
            format!("postrider_messages_open > {} or absent", threshold(AlarmKind::Depth)),
            format!("[5m])) > {}\n", threshold(AlarmKind::Failures)),
            format!("[5m])) >= {ATTEMPTS_MIN}\n"),
            format!("postrider_oldest_due_seconds > {}\n", threshold(AlarmKind::Latency)),
            format!("increase(postrider_messages_dead_total[5m])) > {}\n", threshold(AlarmKind::Dead)),
            format!(
                "increase(postrider_attempts_not_begun_total{{reason!=\"address\"}}[{}m])) > 0\n",
                SHORTAGE_WINDOW.as_secs() / 60
            ),
            format!("postrider_batches_quarantined > {}\n", threshold(AlarmKind::Damage)),
            format!("for: {}m", rule(&alarms, AlarmKind::Depth).raise_after.as_secs() / 60),
        ] {
            assert!(rules.contains(&bound), "{bound}");
        }
    }

    #[test]
    fn f71_the_alarm_names_the_deepest_destination_and_the_feeds_that_it_holds_up() {
        let open = OpenMessages::from([("primary".into(), 5), ("secondary".into(), 900)]);
        assert_eq!(deepest(Some(&open), &[]), (Some(900.0), "secondary".into()));
        let held = [("a".into(), vec!["secondary".into()]), ("b".into(), vec!["primary".into()])];
        assert_eq!(deepest(Some(&open), &held), (Some(900.0), "secondary, holds up a".into()));
        assert_eq!(deepest(Some(&OpenMessages::new()), &held), (Some(0.0), String::new()));
        assert_eq!(deepest(None, &held).0, None, "unknown is not 0");
    }

    /// S2.8: the thresholds of the seed, and where alarms clear.
    #[test]
    fn s2_8_an_alarm_clears_at_four_fifths_of_its_bound() {
        let alarms =
            crate::config::parse("", std::path::Path::new("x"), []).expect("the defaults are fine").alarms;
        let rules =
            [AlarmKind::Failures, AlarmKind::Latency, AlarmKind::Dead].map(|kind| rule(&alarms, kind));
        for (rule, (threshold, clear_at)) in rules.iter().zip([(5.0, 4.0), (300.0, 240.0), (0.0, 0.0)]) {
            let is = |a: f64, b: f64| (a - b).abs() < 1e-9;
            assert!(is(rule.threshold, threshold) && is(rule.clear_at, clear_at), "{rule:?}");
        }
    }
}
