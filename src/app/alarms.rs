//! The alarms: facts of this process' counters and notes, judged every second by `model::alarm`, said in log, metrics, a
//! file and events.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use postrider_actors::{
    flow::{HeldFeeds, Speaker, TroubleBoard},
    metrics::{DestinationMetrics, FeedMetrics, Totals},
    model::{
        alarm::{
            AlarmEvent, AlarmKind, AlarmRule, Growth,
            board::{AlarmBoard, AlarmNote, AlarmNotes, Change},
            facts::{DestinationFacts, Facts, FeedFacts, watched},
            failure_percent,
        },
        ceiling::DiskUse,
        room::OpenMessages,
        time::{MonoMs, UnixMs},
        trouble::{FeedTroubles, Troubles},
    },
};

use super::{announcer::Announcer, machine::Machine, troubles::NoteFile};
use crate::{
    config::{Alarms, Config, STATUS_FEED},
    telemetry::metrics::Metrics,
};

/// What was looked at for other reasons, too.
pub(super) struct Looked {
    pub(super) now: MonoMs,
    pub(super) wall: UnixMs,
    /// Open messages, if they could be counted.
    pub(super) open: Option<OpenMessages>,
    /// How long the batch that is due for longest has been so.
    pub(super) overdue: Option<Duration>,
    /// Batches that are set aside.
    pub(super) quarantined: u64,
    /// What the queue was offered, and did not take.
    pub(super) queue: Totals,
    pub(super) troubles: Troubles,
    /// The fullest disk.
    pub(super) disk: Option<DiskUse>,
    /// Files that will not be done in time, as `FEED: FILE`, and why that is said.
    pub(super) late: Vec<(String, String)>,
    /// By destination: why it is suspect, and for how long its breaker has been open.
    pub(super) traffic: BTreeMap<String, (Option<String>, Option<Duration>)>,
}

/// What is raised, and what was seen of what is counted.
pub(super) struct AlarmWatch {
    metrics: Arc<Metrics>,
    troubles: TroubleBoard,
    held: HeldFeeds,
    config: Alarms,
    alarms: AlarmBoard,
    file: NoteFile<AlarmNotes>,
    /// For whoever asks this process.
    shown: crate::alarm_board::AlarmBoard,
    /// For whoever is to be called.
    announcer: Announcer,
    /// Every destination that a configuration of this process had, by name.
    destinations: BTreeMap<String, Grown>,
    queue: Growth<2>,
    /// The feeds of the configuration, by name: files that failed, and that don't balance.
    feeds: BTreeMap<String, (FeedMetrics, Growth<2>)>,
    /// By actor.
    restarts: BTreeMap<String, Growth<1>>,
}

/// A destination's counters, and how they grow.
struct Grown {
    metrics: DestinationMetrics,
    /// Attempts, and those that failed.
    attempts: Growth<2>,
    dead: Growth<1>,
    shortages: Growth<1>,
    receipts_overdue: Growth<1>,
}

impl AlarmWatch {
    /// Nothing was looked at yet.
    pub(super) fn new(machine: &Machine, config: &Config) -> Self {
        let mut watch = Self {
            metrics: machine.metrics.clone(),
            troubles: machine.troubles.clone(),
            held: machine.held.clone(),
            config: config.alarms.clone(),
            alarms: AlarmBoard::new(rules(&config.alarms)),
            file: NoteFile::new(&config.state.dir),
            shown: machine.alarms.clone(),
            announcer: machine.announcer.clone(),
            destinations: BTreeMap::new(),
            queue: Growth::new(Duration::ZERO),
            feeds: BTreeMap::new(),
            restarts: BTreeMap::new(),
        };
        for kind in AlarmKind::ALL {
            watch.metrics.alarm(kind, "", Some(false));
        }
        watch.configure(config);
        watch
    }

    /// Another configuration is in use. What is raised stays so until its new rule clears it.
    pub(super) fn configure(&mut self, config: &Config) {
        self.config = config.alarms.clone();
        self.alarms.set_rules(rules(&config.alarms));
        let (window, dead_window) = (config.alarms.failures.window, config.alarms.dead.window);
        for destination in &config.destinations {
            let name = &destination.name;
            self.destinations.entry(name.clone()).or_insert_with(|| Grown {
                metrics: self.metrics.stages.destination(name), // its counters go on
                attempts: Growth::new(window),
                dead: Growth::new(dead_window),
                shortages: Growth::new(SHORTAGE_WINDOW),
                receipts_overdue: Growth::new(RECEIPTS_WINDOW),
            });
        }
        for destination in self.destinations.values_mut() {
            destination.attempts.set_window(window);
            destination.dead.set_window(dead_window);
        }
        self.queue.set_window(window);
        let names = config.feeds.iter().map(|feed| feed.name.as_str());
        let names: BTreeSet<_> =
            names.chain(config.receipts.events_to.as_ref().map(|_| STATUS_FEED)).collect();
        self.feeds.retain(|name, _| names.contains(name.as_str()));
        for name in names {
            let feed = || (self.metrics.stages.feed(name), Growth::new(dead_window)); // its counters go on
            self.feeds.entry(name.to_owned()).or_insert_with(feed).1.set_window(dead_window);
        }
    }

    /// Judges, and says what has changed.
    pub(super) async fn look(&mut self, mut looked: Looked) {
        let (now, wall) = (looked.now, looked.wall);
        let traffic = std::mem::take(&mut looked.traffic);
        let facts = Facts {
            is_counted: looked.open.is_some(),
            destinations: self.destination_facts(&looked, traffic),
            feeds: self.feed_facts(now, &looked.troubles),
            queue_failures_percent: failures(looked.queue, &mut self.queue, now),
            overdue: looked.overdue,
            quarantined: looked.quarantined,
            disk: looked.disk.take().map(|disk| (disk.path, disk.percent)),
            late: std::mem::take(&mut looked.late),
            restarts: self.restarts(now),
        };
        for change in self.alarms.look(now, wall, watched(&facts)) {
            self.report(&change);
        }
        let notes = self.alarms.notes();
        self.file.keep(&notes).await;
        self.shown.set(notes);
    }

    /// Says in log, metrics and an event what has become of an alarm. A kind without any is exported as 0.
    fn report(&self, change: &Change) {
        log_alarm(change, &rule(&self.config, change.kind));
        self.announcer.alarm(&change.alarm);
        let raised = self.alarms.raised();
        let of_kind = raised.iter().filter(|raised| raised.alarm == change.kind.as_str());
        let labels: BTreeSet<_> = of_kind.map(|raised| label(&raised.subject)).collect();
        let changed = label(&change.alarm.subject);
        if !changed.is_empty() {
            self.metrics.alarm(change.kind, changed, labels.contains(changed).then_some(true));
        }
        let is_of_all = labels.contains("");
        self.metrics.alarm(change.kind, "", (is_of_all || labels.is_empty()).then_some(is_of_all));
    }

    fn destination_facts(
        &mut self,
        looked: &Looked,
        mut traffic: BTreeMap<String, (Option<String>, Option<Duration>)>,
    ) -> Vec<DestinationFacts> {
        let Looked { now, open, troubles, .. } = looked;
        let none = OpenMessages::new();
        let open = open.as_ref().unwrap_or(&none);
        let held = self.held.list();
        let holds_up = |name: &str| -> Vec<String> {
            let feeds = held.iter().filter(|(_, by)| by.iter().any(|destination| **destination == *name));
            feeds.map(|(feed, _)| feed.to_string()).collect()
        };
        let receipts = &self.metrics.receipts;
        let facts = |(name, grown): (&String, &mut Grown)| {
            let Grown { metrics, attempts, dead, shortages, receipts_overdue } = grown;
            let grown = |growth: &mut Growth<1>, total| growth.look(*now, [total])[0];
            let (suspicion, out_for) = traffic.remove(name).unwrap_or_default();
            DestinationFacts {
                name: name.clone(),
                open: open.get(name.as_str()).copied().unwrap_or(0),
                holds_up: holds_up(name),
                failures_percent: failures(metrics.totals(), attempts, *now),
                dead: grown(dead, metrics.dead()),
                shortages: grown(shortages, metrics.shortages()),
                receipts_overdue: grown(receipts_overdue, receipts.overdue(name)),
                suspicion,
                blocked: troubles.destinations.get(name).map(|trouble| trouble.reason.clone()),
                out_for,
            }
        };
        let mut all: Vec<_> = self.destinations.iter_mut().map(facts).collect();
        // Messages may be open for one that the configuration has no more.
        let gone = open.iter().filter(|(name, _)| !self.destinations.contains_key(&***name));
        all.extend(gone.map(|(name, &open)| DestinationFacts {
            name: name.to_string(),
            open,
            holds_up: holds_up(name),
            ..DestinationFacts::default()
        }));
        all
    }

    fn feed_facts(&mut self, now: MonoMs, troubles: &Troubles) -> Vec<FeedFacts> {
        let none = FeedTroubles::default();
        let facts = |(name, (metrics, growth)): (&String, &mut (FeedMetrics, Growth<2>))| {
            let troubles = troubles.feeds.get(name).unwrap_or(&none);
            let waits = self.troubles.held_by(name, Speaker::Judge);
            let files = troubles.held.iter().map(|(file, trouble)| (file.clone(), trouble.reason.clone()));
            let (canaries, held) = files.partition(|(file, _)| waits.contains(file));
            let [failed, unbalanced] =
                growth.look(now, [metrics.unusable_files(), metrics.unbalanced_files()]);
            let parked = troubles.parked.as_ref().map(|trouble| trouble.reason.clone());
            FeedFacts { name: name.clone(), parked, held, canaries, failed, unbalanced }
        };
        self.feeds.iter_mut().map(facts).collect()
    }

    fn restarts(&mut self, now: MonoMs) -> Vec<(String, u64)> {
        let grown = |(actor, total): (String, u64)| {
            let growth = self.restarts.entry(actor.clone()).or_insert_with(|| {
                let mut growth = Growth::new(RESTARTS_WINDOW);
                growth.look(now, [0]);
                growth
            });
            (actor, growth.look(now, [total])[0])
        };
        self.metrics.stages.restarted().into_iter().map(grown).collect()
    }
}

/// What metrics say of a subject: no file's name (I10), but its feed's.
fn label(subject: &str) -> &str {
    subject.split_once(": ").map_or(subject, |(feed, _)| feed)
}

/// Per cent of what was tried that failed within the window.
fn failures(totals: Totals, growth: &mut Growth<2>, now: MonoMs) -> f64 {
    let [all, failed] = growth.look(now, [totals.all, totals.failed]);
    failure_percent(all, failed, ATTEMPTS_MIN)
}

/// Attempts (or batches) below which no rate is computed: one of two is not 50 %.
const ATTEMPTS_MIN: u64 = 20;

/// An alarm clears at this share of its bound, and after so long: between the two it stays what it is.
const CLEAR_AT: f64 = 0.8;
const DISK_CLEAR_AT: f64 = 0.98;
const CLEAR_AFTER: Duration = Duration::from_mins(1);

/// How long the backlog must be too high: a burst is worth no alarm.
const DEPTH_RAISE_AFTER: Duration = Duration::from_mins(1);

/// How long ago this machine may have lacked something for the alarm to stay raised.
const SHORTAGE_WINDOW: Duration = Duration::from_mins(1);

/// Receipts that are overdue are counted for so long, and so many are normal: some phones never answer.
const RECEIPTS_WINDOW: Duration = Duration::from_hours(1);
const RECEIPTS_OVERDUE_MAX: f64 = 1_000.0;

/// How long a circuit breaker must have been open: shorter outages are everyday life.
const BREAKER_OPEN_FOR: Duration = Duration::from_mins(5);

/// Restarts of one actor, and the window that they are counted for.
const RESTARTS_MAX: f64 = 3.0;
const RESTARTS_WINDOW: Duration = Duration::from_mins(10);

/// How long an estimate must say so.
const LATE_RAISE_AFTER: Duration = Duration::from_mins(1);

fn rules(config: &Alarms) -> [AlarmRule; AlarmKind::ALL.len()] {
    AlarmKind::ALL.map(|kind| rule(config, kind))
}

fn rule(config: &Alarms, kind: AlarmKind) -> AlarmRule {
    // The window is its hysteresis: what happened once is looked at for as long.
    let any_above = |threshold: f64| AlarmRule {
        threshold,
        clear_at: threshold,
        raise_after: Duration::ZERO,
        clear_after: Duration::ZERO,
    };
    let (threshold, clear_at, raise_after) = match kind {
        AlarmKind::Depth => (config.depth.max_messages as f64, CLEAR_AT, DEPTH_RAISE_AFTER),
        AlarmKind::Failures => (config.failures.max_percent.into(), CLEAR_AT, Duration::ZERO),
        AlarmKind::Latency => (config.latency.max.as_secs_f64(), CLEAR_AT, Duration::ZERO),
        // It counts the seconds: it is closed again at 0.
        AlarmKind::Breaker => (BREAKER_OPEN_FOR.as_secs_f64(), 0.0, Duration::ZERO),
        AlarmKind::Late => (0.0, 0.0, LATE_RAISE_AFTER),
        AlarmKind::Disk => (config.disk.max_percent.into(), DISK_CLEAR_AT, Duration::ZERO),
        AlarmKind::Dead => return any_above(config.dead.max_messages as f64),
        AlarmKind::Receipts => return any_above(RECEIPTS_OVERDUE_MAX),
        AlarmKind::Restarts => return any_above(RESTARTS_MAX),
        AlarmKind::Shortage
        | AlarmKind::Feeds
        | AlarmKind::Files
        | AlarmKind::Damage
        | AlarmKind::Blocked
        | AlarmKind::Suspects
        | AlarmKind::Canary
        | AlarmKind::Balance => return any_above(0.0),
    };
    AlarmRule { threshold, clear_at: threshold * clear_at, raise_after, clear_after: CLEAR_AFTER }
}

/// One line, with cause and remedy.
fn log_alarm(change: &Change, rule: &AlarmRule) {
    let AlarmNote { alarm, subject, unit, cause, remedy, .. } = &change.alarm;
    match change.event {
        AlarmEvent::Raised(value) => {
            let value = value.map_or_else(|| "unknown".to_owned(), |value| value.to_string());
            let threshold = rule.threshold;
            tracing::warn!(alarm, subject, value, threshold, unit, cause, remedy, "alarm raised");
        }
        AlarmEvent::Cleared(value) => {
            tracing::info!(alarm, subject, value, clear_at = rule.clear_at, unit, "alarm cleared");
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

    /// The changes of looking at `facts` once a second, from `second` on: when, and whether it was raised.
    fn changes(board: &mut AlarmBoard, second: u64, facts: &Facts) -> Vec<(AlarmKind, u64, bool)> {
        let look = |nth: u64| {
            let now = (second + nth) * 1_000;
            let changes = board.look(MonoMs(now), UnixMs(now), watched(facts));
            let of = |change: Change| (change.kind, nth, matches!(change.event, AlarmEvent::Raised(_)));
            changes.into_iter().map(of).collect::<Vec<_>>()
        };
        (0..100).flat_map(look).collect()
    }

    #[test]
    fn s2_8_what_lasts_minutes_is_raised_beyond_its_bound_and_cleared_after_it() {
        let alarms =
            crate::config::parse("", std::path::Path::new("x"), []).expect("the defaults are fine").alarms;
        let quiet = Facts { is_counted: true, overdue: Some(Duration::ZERO), ..Facts::default() };
        let at = |of: DestinationFacts| Facts { destinations: vec![of], ..quiet.clone() };
        let breaker = |seconds| {
            at(DestinationFacts {
                out_for: Some(Duration::from_secs(seconds)),
                ..DestinationFacts::default()
            })
        };
        let receipts =
            |receipts_overdue| at(DestinationFacts { receipts_overdue, ..DestinationFacts::default() });
        let restarts = |times| Facts { restarts: vec![("sweeper".into(), times)], ..quiet.clone() };
        let disk = |percent| Facts { disk: Some(("/srv".into(), percent)), ..quiet.clone() };
        let late = Facts { late: vec![("alerts: a.csv".into(), "why".into())], ..quiet.clone() };
        let balance = |unbalanced| Facts {
            feeds: vec![FeedFacts { unbalanced, ..FeedFacts::default() }],
            ..quiet.clone()
        };
        for (kind, bound, beyond, raised_after, cleared_after) in [
            (AlarmKind::Breaker, breaker(300), breaker(301), 0, 60),
            (AlarmKind::Receipts, receipts(1_000), receipts(1_001), 0, 0),
            (AlarmKind::Restarts, restarts(3), restarts(4), 0, 0),
            (AlarmKind::Disk, disk(95), disk(96), 0, 60),
            (AlarmKind::Late, quiet.clone(), late, 60, 60),
            (AlarmKind::Balance, balance(0), balance(1), 0, 0),
        ] {
            let mut board = AlarmBoard::new(rules(&alarms));
            assert_eq!(changes(&mut board, 0, &bound), [], "{kind:?}");
            assert_eq!(changes(&mut board, 100, &beyond), [(kind, raised_after, true)], "{kind:?}");
            assert_eq!(changes(&mut board, 200, &quiet), [(kind, cleared_after, false)], "{kind:?}");
        }
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
