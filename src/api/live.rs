//! What changes while one looks: read once for all who look, on a thread of its own, and only while somebody does.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::Duration,
};

use actix_web::{http::StatusCode, web::Bytes};
use postrider_actors::{
    flow::{TrafficControl, TroubleBoard},
    model::{
        ceiling::Facts,
        file::FileReport,
        ids::FileId,
        time::{MonoMs, UnixMs},
        trouble::{Trouble, Troubles},
    },
    ports::{
        Clock,
        console::{DestinationView, FileTotals},
    },
    supervision::ActorBoard,
};
use tokio::sync::watch;

use super::{
    desk::{Clerk, InUse},
    series::{Samples, Series},
};
use crate::{
    alarm_board::AlarmBoard,
    app::ceiling,
    config::{Config, Profile},
    ops::{health::Health, problem::Problem},
    shapes::{
        Alarm, Ceiling, Daemon, Deadline, Destination, DestinationFacts, File, FileCounts, FileFacts,
        LiveTraffic, Overview, ParkedFeed, Time,
    },
    telemetry::metrics::{Format, Metrics},
};

/// Between two looks while somebody wants to know …
const TICK: Duration = Duration::from_secs(1);
/// … where each of them costs calls of a service …
const TICK_SHARED: Duration = Duration::from_secs(5);
/// … and while nobody does: then only what was counted is sampled.
const TICK_IDLE: Duration = Duration::from_secs(5);
/// For how long after a question somebody wants to know.
const WANTED: Duration = Duration::from_secs(10);
/// How long an answer is waited for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Files that are looked through for open ones, the latest first; with a store of several machines, fewer.
const FILES_LOOKED_AT: usize = 1_000;
const FILES_LOOKED_AT_SHARED: usize = 100;
/// Open files that are shown.
const FILES_MAX: usize = 200;
/// What the pace of files is taken over.
const MOMENT: Duration = Duration::from_secs(10);
/// Readings that are kept for that.
const READINGS_MAX: usize = 12;

/// What the daemon knows beside its store.
#[derive(Clone)]
pub(crate) struct Sources {
    pub(crate) in_use: InUse,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) started_at: UnixMs,
    pub(crate) traffic: TrafficControl,
    pub(crate) troubles: TroubleBoard,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) health: Health,
    pub(crate) alarms: AlarmBoard,
    pub(crate) actors: ActorBoard,
}

/// How things stand.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) overview: Overview,
    /// The open files, the latest first.
    pub(crate) files: Vec<File>,
    /// Whether there may be more.
    pub(crate) is_cut: bool,
    /// Files that were settled since the last snapshot.
    pub(crate) settled: Vec<File>,
    pub(crate) destinations: Vec<Destination>,
    /// The sample that was kept now.
    pub(crate) sample: Option<(Time, Samples)>,
    /// Alarms that were raised or cleared since the last snapshot.
    pub(crate) alarms: Vec<Alarm>,
    /// Counts them.
    pub(crate) number: u64,
    /// The same as events, once somebody has asked for it.
    pub(crate) frame: OnceLock<Bytes>,
    taken: MonoMs,
    /// Orders that had been given when it was taken.
    orders: u64,
}

/// See the module. Clones share it; the thread ends when all are gone.
#[derive(Clone)]
pub(crate) struct Live(Arc<Shared>);

struct Shared {
    sources: Sources,
    snapshot: watch::Sender<Option<Arc<Snapshot>>>,
    wanted: Mutex<Wanted>,
    changed: Condvar,
    series: Mutex<Series>,
    paces: Mutex<Paces>,
    /// Of the last snapshot.
    facts: Mutex<Arc<Facts>>,
}

#[derive(Default)]
struct Wanted {
    /// Until when somebody wants to know.
    until: Option<MonoMs>,
    /// Somebody waits for it.
    at_once: bool,
    /// Orders that were given so far.
    orders: u64,
    is_over: bool,
}

/// How much of each open file had been sent, lately.
#[derive(Default)]
struct Paces {
    readings: VecDeque<(MonoMs, HashMap<FileId, u64>)>,
}

impl Live {
    /// Starts to look.
    pub(crate) fn start(sources: Sources) -> io::Result<Self> {
        let (snapshot, _) = watch::channel(None);
        let shared = Arc::new(Shared {
            sources,
            snapshot,
            wanted: Mutex::default(),
            changed: Condvar::new(),
            series: Mutex::default(),
            paces: Mutex::default(),
            facts: Mutex::default(),
        });
        let looking = Arc::clone(&shared);
        thread::Builder::new().name("api live".to_owned()).spawn(move || looking.look())?;
        Ok(Self(shared))
    }

    /// What the daemon knows beside its store.
    pub(crate) fn sources(&self) -> &Sources {
        &self.0.sources
    }

    /// How things stand, a few seconds ago at most.
    pub(crate) async fn snapshot(&self) -> Result<Arc<Snapshot>, Problem> {
        let mut snapshots = self.subscribe();
        let now = self.0.sources.clock.mono();
        let (fresh, orders) = (self.0.tick() * 2, self.0.wanted().orders);
        let is_fresh = |snapshot: &Option<Arc<Snapshot>>| {
            snapshot
                .as_ref()
                .is_some_and(|snapshot| now.since(snapshot.taken) <= fresh && snapshot.orders >= orders)
        };
        let waited = tokio::time::timeout(ANSWER_TIMEOUT, snapshots.wait_for(is_fresh)).await;
        let found = waited.ok().and_then(Result::ok).and_then(|snapshot| snapshot.clone());
        found.ok_or_else(|| Problem::later(StatusCode::SERVICE_UNAVAILABLE, "the store can't be read now"))
    }

    /// The snapshots from now on. Somebody wants to know.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<Arc<Snapshot>>> {
        self.want();
        self.0.snapshot.subscribe()
    }

    /// Somebody still wants to know.
    pub(crate) fn want(&self) {
        let now = self.0.sources.clock.mono();
        let mut wanted = self.0.wanted();
        let was = wanted.until.is_some_and(|until| now < until);
        wanted.until = Some(now.after(WANTED));
        if !was {
            wanted.at_once = true;
            self.0.changed.notify_all();
        }
    }

    /// Something was ordered: it is looked at once, and nothing older is shown to who asks from now on.
    pub(crate) fn look_again(&self) {
        let mut wanted = self.0.wanted();
        wanted.orders += 1;
        wanted.at_once = true;
        drop(wanted);
        self.0.changed.notify_all();
    }

    /// Samples of one destination, or of all under the empty name.
    pub(crate) fn series<T>(&self, read: impl FnOnce(&Series) -> T) -> T {
        read(&self.0.series.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is known of a file beside its report, as of the last snapshot.
    pub(crate) fn facts(&self, report: &FileReport, troubles: &Troubles, now: UnixMs) -> FileFacts {
        let facts = self.0.facts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let paces = self.0.paces.lock().unwrap_or_else(PoisonError::into_inner);
        file_facts(report, troubles, &paces, &facts, now)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // The thread has the other one.
        if Arc::strong_count(&self.0) <= 2 {
            self.0.wanted().is_over = true;
            self.0.changed.notify_all();
        }
    }
}

fn file_facts(
    report: &FileReport,
    troubles: &Troubles,
    paces: &Paces,
    facts: &Facts,
    now: UnixMs,
) -> FileFacts {
    let file = &report.file;
    let trouble = troubles.feeds.get(&file.feed).and_then(|feed| feed.held.get(&file.name));
    FileFacts {
        sent_per_s: paces.of_file(file.id),
        trouble: trouble.cloned(),
        ceiling: Some(facts.of_file(report, now)),
    }
}

impl Paces {
    fn add(&mut self, now: MonoMs, reports: &[FileReport]) {
        while self.readings.len() >= READINGS_MAX
            || self.readings.get(1).is_some_and(|(at, _)| now.since(*at) >= MOMENT)
        {
            self.readings.pop_front();
        }
        let open = reports.iter().filter(|report| !report.is_settled() || report.settled_at.is_none());
        let sent = |report: &FileReport| report.destinations.values().map(|counts| counts.sent).sum();
        self.readings.push_back((now, open.map(|report| (report.file.id, sent(report))).collect()));
    }

    /// Messages of a file that were sent per second.
    fn of_file(&self, id: FileId) -> Option<f64> {
        let ((from, first), (to, last)) = (self.readings.front()?, self.readings.back()?);
        let seconds = to.since(*from).as_secs_f64();
        let sent = last.get(&id)?.saturating_sub(*first.get(&id)?);
        (seconds > 0.0).then(|| sent as f64 / seconds)
    }
}

/// What one look at the store found.
struct Found {
    destinations: BTreeMap<String, DestinationView>,
    totals: FileTotals,
    reports: Vec<FileReport>,
    is_cut: bool,
    /// What binds.
    facts: Arc<Facts>,
}

impl Shared {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        // Changed by infallible steps only.
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_shared(&self) -> bool {
        self.sources.in_use.get().profile == Profile::Aws
    }

    fn tick(&self) -> Duration {
        if self.is_shared() { TICK_SHARED } else { TICK }
    }

    /// Looks until nobody is left who could ask.
    fn look(&self) {
        let mut clerk = Clerk::new(&self.sources.in_use);
        loop {
            let (is_wanted, orders) = {
                let mut wanted = self.wanted();
                if !wanted.at_once && !wanted.is_over {
                    let now = self.sources.clock.mono();
                    let is_wanted = wanted.until.is_some_and(|until| now < until);
                    let pause = if is_wanted { self.tick() } else { TICK_IDLE };
                    let waited = self
                        .changed
                        .wait_timeout_while(wanted, pause, |wanted| !wanted.at_once && !wanted.is_over);
                    wanted = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                if wanted.is_over {
                    return;
                }
                wanted.at_once = false;
                let now = self.sources.clock.mono();
                (wanted.until.is_some_and(|until| now < until), wanted.orders)
            };
            let sample = self.sample();
            if is_wanted && let Some(snapshot) = self.snapshot(&mut clerk, sample, orders) {
                self.snapshot.send_replace(Some(Arc::new(snapshot)));
            }
        }
    }

    /// Takes what was counted; the sample, if one is kept now.
    fn sample(&self) -> Option<(Time, Samples)> {
        let (metrics, now) = (self.sources.metrics.render(Format::OpenMetrics), self.sources.clock.wall());
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.take(&metrics, now).map(|samples| (Time(now), samples.clone()))
    }

    fn snapshot(&self, clerk: &mut Clerk, sample: Option<(Time, Samples)>, orders: u64) -> Option<Snapshot> {
        let looked_at = if self.is_shared() { FILES_LOOKED_AT_SHARED } else { FILES_LOOKED_AT };
        let config = self.sources.in_use.get();
        let found = clerk.read(|view| {
            let facts = ceiling::gather(&config, view);
            let (destinations, totals) = (view.destinations()?, view.file_totals()?);
            let reports = view.files(None, looked_at)?;
            let is_cut = reports.len() == looked_at;
            // What it reads beside the store is small files of ours: without them nothing is said to bind.
            let facts = Arc::new(facts.unwrap_or_default());
            Ok(Found { destinations, totals, reports, is_cut, facts })
        });
        // It is said to whoever asks, and by alarms.
        let found = found.inspect_err(|error| tracing::debug!(%error, "the store can't be read")).ok()?;
        let taken = self.sources.clock.mono();
        let mut paces = self.paces.lock().unwrap_or_else(PoisonError::into_inner);
        paces.add(taken, &found.reports);
        let before = self.snapshot.borrow().clone();
        *self.facts.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&found.facts);
        let now = self.sources.clock.wall();
        let troubles = self.sources.troubles.all();
        let (files, settled, is_cut) = open_files(&found, &troubles, &paces, before.as_deref(), now);
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let destinations = self.destinations(&config, &found, &troubles, series.now(), now);
        let alarms = self.sources.alarms.raised();
        let changed = changed(before.as_deref(), &alarms, &self.sources.alarms.cleared());
        let open: u64 = found.destinations.values().map(|view| view.counts.open()).sum();
        let open_reports: Vec<_> = found.reports.iter().filter(|report| !report.is_settled()).collect();
        let ceiling = found.facts.of_whole(&open_reports, now);
        let is_open = open > 0;
        let finish = ceiling.finish.filter(|_| is_open);
        let overview = Overview {
            at: now.into(),
            daemon: self.daemon(&config),
            open: Some(open),
            sent_per_s: series.now().get("").and_then(|all| all.sent_per_s),
            failed_percent: series.now().get("").and_then(crate::shapes::Sample::failed_percent),
            left_s: finish.map(|at| at.since(now).as_secs_f64()),
            done_at: ceiling.done_at().filter(|_| is_open).map(Time),
            finish_by: deadline(&files),
            ceiling: Some(Ceiling::from(&ceiling)),
            ceiling_of: ceiling.destination.clone(),
            files: count(&found.totals, &files),
            dead: found.destinations.values().map(|view| view.counts.dead).sum(),
            parked: parked(&troubles),
            alarms,
        };
        Some(Snapshot {
            overview,
            files,
            is_cut,
            settled,
            destinations,
            sample,
            alarms: changed,
            number: before.map_or(0, |before| before.number) + 1,
            frame: OnceLock::new(),
            taken,
            orders,
        })
    }

    fn daemon(&self, config: &Config) -> Daemon {
        Daemon {
            version: env!("CARGO_PKG_VERSION"),
            phase: self.sources.health.phase().as_str(),
            started_at: self.sources.started_at.into(),
            config: config.file.display().to_string(),
            profile: match config.profile {
                Profile::Embedded => "embedded",
                Profile::Aws => "aws",
            },
            stuck: self.sources.health.stuck(),
            feeds: config.feeds.len(),
            destinations: config.destinations.len(),
        }
    }

    fn destinations(
        &self,
        config: &Config,
        found: &Found,
        troubles: &Troubles,
        samples: &Samples,
        now: UnixMs,
    ) -> Vec<Destination> {
        let mut views = found.destinations.clone();
        for destination in &config.destinations {
            views.entry(destination.name.clone()).or_default();
        }
        let mut holds = ceiling::holds(config, &views);
        let shape = |(name, view): (&String, &DestinationView)| {
            let known = config.destination(name);
            let facts = DestinationFacts {
                trouble: known.and_then(|_| troubles.destinations.get(name).cloned()),
                traffic: known.and_then(|_| self.traffic(name, now)),
                sample: samples.get(name).copied().unwrap_or_default(),
                holds: holds.remove(name).unwrap_or_default(),
                ceiling: Some(found.facts.of_destination(name, now)),
            };
            Destination::of(name, view, known, facts, now)
        };
        views.iter().map(shape).collect()
    }

    fn traffic(&self, name: &str, wall: UnixMs) -> Option<LiveTraffic> {
        let (view, now, _) = self.sources.traffic.view(name)?;
        Some(LiveTraffic {
            limit: view.limit,
            in_flight: view.in_flight,
            out_since: view.open_since.map(|since| wall.before(now.since(since))),
            paused_until: view.paused_until.map(|until| wall.after(until.since(now))),
            retry_tokens: view.retry_tokens,
        })
    }
}

/// The open files, those that were settled since `before`, and whether there may be more open ones.
fn open_files(
    found: &Found,
    troubles: &Troubles,
    paces: &Paces,
    before: Option<&Snapshot>,
    now: UnixMs,
) -> (Vec<File>, Vec<File>, bool) {
    let shape =
        |report: &FileReport| File::of(report, &file_facts(report, troubles, paces, &found.facts, now), now);
    let mut files = untaken(troubles, &found.reports);
    files.extend(found.reports.iter().filter(|report| !report.is_settled()).map(shape));
    let is_cut = files.len() > FILES_MAX || found.is_cut;
    files.truncate(FILES_MAX);
    let was_open = |report: &&FileReport| {
        let id = report.file.id.to_string();
        before.is_some_and(|before| before.files.iter().any(|file| file.id.as_ref() == Some(&id)))
    };
    let settled = found.reports.iter().filter(|report| report.is_settled()).filter(was_open).map(shape);
    (files, settled.collect(), is_cut)
}

/// Files that can't be taken or read, and are in no store.
pub(super) fn untaken(troubles: &Troubles, reports: &[FileReport]) -> Vec<File> {
    let held = troubles
        .feeds
        .iter()
        .flat_map(|(feed, troubles)| troubles.held.iter().map(move |(name, trouble)| (feed, name, trouble)));
    let is_known = |feed: &str, name: &str| {
        reports.iter().any(|report| report.file.feed == feed && report.file.name == name)
    };
    held.filter(|(feed, name, _)| !is_known(feed, name))
        .map(|(feed, name, trouble): (&String, &String, &Trouble)| File::untaken(feed, name, trouble))
        .collect()
}

fn parked(troubles: &Troubles) -> Vec<ParkedFeed> {
    let parked = troubles.feeds.iter().filter_map(|(feed, troubles)| Some((feed, troubles.parked.as_ref()?)));
    parked
        .map(|(feed, trouble)| ParkedFeed {
            feed: feed.clone(),
            since: trouble.since.into(),
            reason: trouble.reason.clone(),
        })
        .collect()
}

fn count(totals: &FileTotals, files: &[File]) -> FileCounts {
    let of = |state: &str| files.iter().filter(|file| file.state == state).count() as u64;
    let (held, waiting) = (of("held"), of("waiting"));
    FileCounts {
        reading: totals.ingesting,
        sending: totals.open.saturating_sub(held + waiting),
        held,
        waiting,
        done: totals.settled.saturating_sub(totals.failed),
        failed: totals.failed,
    }
}

/// The earliest deadline of a file with open messages.
fn deadline(files: &[File]) -> Option<Deadline> {
    let file = files
        .iter()
        .filter(|file| file.open > 0)
        .min_by_key(|file| file.finish_by.map_or((1, None), |by| (0, Some(by))))?;
    Some(Deadline {
        at: file.finish_by?,
        file: file.name.clone(),
        id: file.id.clone(),
        open: file.open,
        done_at: file.done_at,
        in_time: file.in_time,
        latest: file.latest,
    })
}

/// Alarms that were raised or cleared since `before`.
fn changed(before: Option<&Snapshot>, raised: &[Alarm], cleared: &[Alarm]) -> Vec<Alarm> {
    let Some(before) = before else { return Vec::new() };
    let known = &before.overview.alarms;
    let is = |one: &Alarm, other: &Alarm| {
        one.alarm == other.alarm && one.subject == other.subject && one.since == other.since
    };
    let new = raised.iter().filter(|alarm| !known.iter().any(|known| is(known, alarm)));
    let over = cleared.iter().filter(|alarm| known.iter().any(|known| is(known, alarm)));
    new.chain(over).cloned().collect()
}
