//! The feed over fakes that misbehave, on tokio's paused clock. A crash is the feed's future being dropped:
//! it stops at whatever it was waiting for.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex as SyncMutex,
};

use async_trait::async_trait;
use bytes::Bytes;
use postrider_settings::Keys as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{
    flow::ProgressBoard,
    metrics::StageMetrics,
    model::{
        batch::Rows,
        entries::minute_of,
        file::{Checkpoint, FileReport},
        room::OpenMessages,
        time::UnixMs,
    },
    ports::{AppendLimits, LeaseRequest, Queue as _, Want},
    testing::{IntakeFaults, MemoryIntake, MemoryStore, TokioClock},
};

/// How the outbox behaves.
#[derive(Clone, Copy)]
struct Weather {
    limits: AppendLimits,
    /// Everything fails.
    is_away: bool,
    /// An append takes effect, but its answer is lost.
    lost_answers: f64,
    /// The backlog, whatever is stored.
    depth: Option<Result<u64, ()>>,
}

struct FlakyOutbox {
    store: Arc<MemoryStore>,
    weather: SyncMutex<Weather>,
    random: SyncMutex<StdRng>,
    appends: SyncMutex<Vec<(MonoMs, usize)>>,
    clock: Arc<dyn Clock>,
}

impl FlakyOutbox {
    fn weather(&self) -> Weather {
        *self.weather.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.weather.lock().unwrap());
    }

    /// When appends took effect, and with how many entries.
    fn appends(&self) -> Vec<(MonoMs, usize)> {
        self.appends.lock().unwrap().clone()
    }

    async fn answer(&self) -> Result<(), StoreError> {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if self.weather().is_away { Err(StoreError::Retryable("away".into())) } else { Ok(()) }
    }
}

#[async_trait]
impl Outbox for FlakyOutbox {
    fn append_limits(&self) -> AppendLimits {
        self.weather().limits
    }

    async fn find_file(&self, id: FileId) -> Result<Option<(FileState, Checkpoint)>, StoreError> {
        self.answer().await?;
        self.store.find_file(id).await
    }

    async fn append(&self, append: Append) -> Result<Appended, StoreError> {
        self.answer().await?;
        let limits = self.weather().limits;
        let minutes: BTreeSet<_> = append.entries.iter().map(|entry| minute_of(entry.sent_at)).collect();
        assert!(minutes.len() <= limits.entry_minutes);
        assert!(append.batches.len() <= limits.batches.max(append.file.destinations.len()));
        let entries = append.entries.len();
        let appended = self.store.append(append).await?;
        if appended == Appended::Stored {
            self.appends.lock().unwrap().push((self.clock.mono(), entries));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        if self.random.lock().unwrap().random_bool(self.weather().lost_answers) {
            return Err(StoreError::Unknown("no answer".into()));
        }
        Ok(appended)
    }

    async fn known_entries(&self, entries: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        self.store.known_entries(entries).await
    }

    async fn open_messages(&self) -> Result<OpenMessages, StoreError> {
        self.answer().await?;
        let all_of_one = |depth| OpenMessages::from([("north".into(), depth), ("south".into(), depth)]);
        match self.weather().depth {
            Some(depth) => depth.map(all_of_one).map_err(|()| StoreError::Unknown("no count".into())),
            None => self.store.open_messages().await,
        }
    }
}

/// A queue, a store, and what is between them.
struct World {
    clock: Arc<dyn Clock>,
    intake: Arc<MemoryIntake>,
    outbox: Arc<FlakyOutbox>,
    store: Arc<MemoryStore>,
    settings: QueueFeedSettings,
}

const VISIBILITY: Duration = Duration::from_secs(4);

impl World {
    fn new(seed: u64) -> Self {
        let clock: Arc<dyn Clock> = Arc::new(TokioClock::at(UnixMs(1_000_000)));
        let store = Arc::new(MemoryStore::new());
        let weather = Weather { limits: AppendLimits::NONE, is_away: false, lost_answers: 0.0, depth: None };
        let destination = |name: &str| FeedDestination {
            name: name.into(),
            template: None,
            content_type: "application/json".into(),
        };
        Self {
            intake: Arc::new(MemoryIntake::new(clock.clone(), VISIBILITY, IntakeFaults::default(), seed)),
            outbox: Arc::new(FlakyOutbox {
                store: store.clone(),
                weather: SyncMutex::new(weather),
                random: SyncMutex::new(StdRng::seed_from_u64(seed)),
                appends: SyncMutex::default(),
                clock: clock.clone(),
            }),
            store,
            clock,
            settings: QueueFeedSettings {
                name: "orders".into(),
                recipient: "id".into(),
                max_row_bytes: 1000,
                max_entry_rows: 1000,
                destinations: vec![destination("north"), destination("south")],
                conditions: Conditions::default(),
                priority: Priority::Normal,
                batch: BatchLimits { max_messages: 4, max_bytes: 10_000 },
                queue: FeedQueue {
                    max_rows: 100,
                    max_size: 1_000_000,
                    linger: Duration::from_secs(1),
                    ..FeedQueue::declared()
                },
                pollers: 3,
                wait: Duration::from_secs(20),
                backlog: postrider_settings::Outbox::declared(),
            },
        }
    }

    fn setup(&self) -> QueueFeedSetup {
        QueueFeedSetup {
            feed: Arc::new(self.settings.clone()),
            intake: self.intake.clone(),
            outbox: self.outbox.clone(),
            ledger: self.store.clone(),
            clock: self.clock.clone(),
            appended: Bells::default(),
            metrics: StageMetrics::default().feed("orders"),
            held: HeldFeeds::default(),
            progress: ProgressBoard::default().mark("feed"),
        }
    }

    /// Starts a feed. Dropping the handle is a crash.
    fn start(&self) -> Running {
        let drain = watch::Sender::new(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(FeedState::new(self.setup(), drain.subscribe()).run());
        Running { drain, tasks }
    }

    async fn reports(&self) -> Vec<FileReport> {
        self.store.latest_files(usize::MAX).await.unwrap()
    }

    /// How often each recipient became a message, per destination.
    async fn messages(&self) -> BTreeMap<(String, String), usize> {
        let want = |name: &str| Want::new(name, usize::MAX, usize::MAX);
        let wants = vec![want("north"), want("south")];
        let (until, now) = (MonoMs(u64::MAX), UnixMs(u64::MAX));
        let request = LeaseRequest { holder: "test".into(), wants, until, now, born: UnixMs(0) };
        let mut messages = BTreeMap::new();
        for lease in self.store.lease(request).await.unwrap() {
            let rows = Rows::decode(lease.payload).unwrap();
            for index in 0..rows.len() {
                let parts = lease.header.layout.read(rows.bytes(index)).unwrap();
                let key = (lease.header.destination.clone(), parts.recipient.to_owned());
                *messages.entry(key).or_default() += 1;
            }
        }
        messages
    }

    async fn until(&self, what: &str, limit: Duration, mut condition: impl FnMut(&Self) -> bool) {
        let waiting = async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        assert!(tokio::time::timeout(limit, waiting).await.is_ok(), "{what}: not within {limit:?}");
    }
}

struct Running {
    drain: watch::Sender<bool>,
    tasks: JoinSet<Result<(), StoreError>>,
}

impl Running {
    async fn drained(mut self) {
        self.drain.send_replace(true);
        let ended = tokio::time::timeout(Duration::from_mins(1), self.tasks.join_next()).await;
        ended.expect("it drains").expect("it runs").expect("no panic").expect("no error");
    }

    /// A crash.
    async fn killed(mut self) {
        self.tasks.shutdown().await;
    }
}

fn object(id: impl std::fmt::Display) -> Bytes {
    format!("{{\"id\":\"{id}\"}}").into()
}

#[tokio::test(start_paused = true)]
async fn s4_2_the_linger_is_kept_while_every_poll_still_waits() {
    let world = World::new(1);
    let running = world.start();
    tokio::time::sleep(Duration::from_millis(300)).await;
    world.intake.put("a", object(1));
    world.until("stored", Duration::from_millis(1100), |world| !world.outbox.appends().is_empty()).await;
    let (at, _) = world.outbox.appends()[0];
    assert!((1300..1350).contains(&at.0), "{at:?}");
    assert!(world.intake.calls().receive <= 4, "the other polls still wait");
    running.drained().await;
}

#[tokio::test(start_paused = true)]
async fn s4_2_entries_are_accumulated_across_polls_until_there_are_enough() {
    let mut world = World::new(2);
    world.settings.queue.max_rows = 50;
    world.settings.queue.linger = Duration::from_hours(1);
    let running = world.start();
    for id in 0..100 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        world.intake.put(&id.to_string(), object(id));
        assert!(id >= 50 || world.outbox.appends().is_empty(), "not before there are 50 rows");
    }
    world.until("deleted", Duration::from_secs(1), |world| world.intake.is_empty()).await;
    assert_eq!(world.outbox.appends().iter().map(|(_, entries)| *entries).collect::<Vec<_>>(), [50, 50]);
    running.drained().await;
}

#[tokio::test(start_paused = true)]
async fn s4_3_entries_stay_ours_and_undeleted_for_as_long_as_the_outbox_is_away() {
    let world = World::new(3);
    world.outbox.change(|weather| weather.depth = Some(Ok(0)));
    for id in 0..5 {
        world.intake.put(&id.to_string(), object(id));
    }
    let running = world.start();
    tokio::time::sleep(Duration::from_millis(500)).await;
    world.outbox.change(|weather| weather.is_away = true);
    tokio::time::sleep(VISIBILITY * 20).await;
    assert_eq!((world.intake.len(), world.intake.calls().delete), (5, 0));
    assert!(world.intake.calls().extend > 5);
    assert!(world.intake.receive(10, Duration::ZERO).await.unwrap().is_empty(), "none became visible");
    world.outbox.change(|weather| weather.is_away = false);
    world.until("deleted", Duration::from_secs(15), |world| world.intake.is_empty()).await;
    assert_eq!(world.outbox.appends().len(), 1);
    running.drained().await;
}

#[tokio::test(start_paused = true)]
async fn polling_pauses_above_the_watermark_and_while_the_backlog_is_unknown() {
    let mut world = World::new(4);
    world.settings.backlog.high_watermark = 100;
    world.settings.wait = Duration::from_millis(100);
    for closed in [Err(()), Ok(100)] {
        world.outbox.change(|weather| weather.depth = Some(closed));
        let running = world.start();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(world.intake.calls().receive, 0, "{closed:?}");
        running.drained().await;
    }
    let running = world.start();
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.outbox.change(|weather| weather.depth = Some(Ok(76)));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(world.intake.calls().receive, 0, "still above the low watermark");
    world.outbox.change(|weather| weather.depth = Some(Ok(75)));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let open = world.intake.calls().receive;
    assert!(open > 0);
    world.outbox.change(|weather| weather.depth = Some(Err(())));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let closed = world.intake.calls().receive;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(world.intake.calls().receive, closed, "an unknown backlog closes the gate again");
    running.drained().await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_appends_and_deletes_what_was_accumulated() {
    let mut world = World::new(5);
    world.settings.queue.linger = Duration::from_hours(1);
    world.intake.put("a", object(1));
    let running = world.start();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(world.outbox.appends().is_empty());
    running.drained().await;
    assert!(world.intake.is_empty());
    assert_eq!(world.reports().await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_drain_gives_back_what_cannot_be_appended() {
    let mut world = World::new(6);
    world.settings.queue.linger = Duration::from_hours(1);
    world.intake.put("a", object(1));
    let running = world.start();
    tokio::time::sleep(Duration::from_millis(500)).await;
    world.outbox.change(|weather| weather.is_away = true);
    running.drained().await;
    assert_eq!(world.intake.receive(10, Duration::ZERO).await.unwrap().len(), 1, "visible at once");
    assert!(world.reports().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn s4_6_an_entry_that_cannot_be_deleted_is_taken_once() {
    let world = World::new(7);
    world.intake.set_faults(IntakeFaults { delete_fails: 1.0, ..IntakeFaults::default() });
    world.intake.put("a", object(1));
    let running = world.start();
    tokio::time::sleep(VISIBILITY * 5).await;
    assert!(world.intake.calls().delete > 8, "it came again and its file was stored already");
    world.intake.put("b", object(2));
    tokio::time::sleep(VISIBILITY * 5).await;
    assert_eq!(world.intake.len(), 2);
    world.intake.set_faults(IntakeFaults::default());
    world.until("deleted", VISIBILITY * 2, |world| world.intake.is_empty()).await;
    running.drained().await;
    assert_eq!(world.reports().await.iter().map(|report| report.rows).collect::<Vec<_>>(), [1, 1]);
    let messages = world.messages().await;
    assert!(messages.len() == 4 && messages.values().all(|&times| times == 1), "{messages:?}");
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_is_a_rejected_row_and_blocks_nothing() {
    let world = World::new(8);
    for (id, body) in
        [("a", "no json"), ("b", "{\"id\":\"ok\"}"), ("c", "[{\"id\":\"fine\"},7]"), ("d", "[]")]
    {
        world.intake.put(id, body);
    }
    let running = world.start();
    world.until("deleted", Duration::from_secs(3), |world| world.intake.is_empty()).await;
    running.drained().await;
    let [report] = &world.reports().await[..] else { panic!("one file") };
    assert_eq!((report.rows, report.rejected, &report.state), (4, 2, &FileState::Ingested));
    assert!(report.is_balanced() && report.file.name.starts_with("queue-"));
    let rejects = world.store.rejects(report.file.id, 0, 10).await.unwrap();
    assert!(rejects.iter().any(|reject| reject.raw == b"no json"));
    assert_eq!(world.messages().await.len(), 4, "two messages for two destinations");
}

#[tokio::test(start_paused = true)]
async fn an_entry_whose_first_rows_went_elsewhere_stays_in_the_queue() {
    let mut world = World::new(9);
    world.outbox.change(|weather| weather.limits = AppendLimits { batches: 2, ..AppendLimits::NONE });
    let rows: Vec<_> = (0..12).map(|row| format!("{{\"id\":{row}}}")).collect();
    world.intake.put("a", format!("[{}]", rows.join(",")));
    let running = world.start();
    world.until("first step", Duration::from_secs(3), |world| !world.outbox.appends().is_empty()).await;
    running.killed().await;
    assert_eq!(
        world.outbox.appends(),
        [(world.outbox.appends()[0].0, 0)],
        "the entry comes with the last step"
    );
    let south = world.settings.destinations.pop().unwrap();
    let running = world.start();
    tokio::time::sleep(VISIBILITY * 3).await;
    running.drained().await;
    assert_eq!((world.intake.len(), world.outbox.appends().len()), (1, 1));
    world.settings.destinations.push(south);
    let running = world.start();
    world.until("deleted", VISIBILITY * 3, |world| world.intake.is_empty()).await;
    running.drained().await;
    let messages = world.messages().await;
    assert!(messages.len() == 24 && messages.values().all(|&times| times == 1), "{messages:?}");
}

/// F48 for the way in: duplicates, reordering, deletions that fail, visibility that runs out, answers that
/// are lost, an outbox that comes and goes, two processes, and crashes at any moment.
#[tokio::test(start_paused = true)]
async fn f48_every_entrys_rows_are_taken_once_whatever_goes_wrong() {
    let seeds = std::env::var("POSTRIDER_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    for seed in seeds.map_or(0..40, |seed| seed..seed + 1) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut world = World::new(seed);
        world.settings.queue.linger = Duration::from_millis(random.random_range(0..500));
        world.settings.queue.max_rows = random.random_range(1..60);
        world.settings.max_entry_rows = 40;
        let limits = AppendLimits {
            batches: random.random_range(2..12),
            bytes: 4000,
            entry_minutes: random.random_range(1..5),
        };
        world.outbox.change(|weather| (weather.limits, weather.lost_answers) = (limits, 0.2));
        world.intake.set_faults(IntakeFaults {
            duplicate: 0.1,
            delete_fails: 0.3,
            delete_unknown: 0.1,
            unavailable: 0.1,
        });
        let (mut accepted, mut rejected) = (0, 0);
        for entry in 0..60 {
            let rows =
                if random.random_bool(0.1) { random.random_range(20..50) } else { random.random_range(0..6) };
            let body: Vec<_> = (0..rows)
                .map(|row| if row % 5 == 3 { "null".into() } else { format!("{{\"id\":\"{entry}-{row}\"}}") })
                .collect();
            let body =
                if random.random_bool(0.05) { "broken [".into() } else { format!("[{}]", body.join(",")) };
            let bad = body.matches("null").count() as u64;
            if body.starts_with('[') && rows <= 40 {
                (accepted, rejected) = (accepted + rows - bad, rejected + bad);
            } else {
                rejected += 1;
            }
            let sent_at = UnixMs(random.random_range(0..6) * 60_000);
            world.intake.put_at(&format!("entry-{entry}"), body, sent_at);
        }
        for _ in 0..12 {
            let (one, other) = (world.start(), random.random_bool(0.5).then(|| world.start()));
            tokio::time::sleep(Duration::from_millis(random.random_range(0..800))).await;
            world.outbox.change(|weather| weather.is_away = !weather.is_away && random.random_bool(0.3));
            tokio::time::sleep(Duration::from_millis(random.random_range(0..800))).await;
            one.killed().await;
            if let Some(other) = other {
                other.killed().await;
            }
        }
        world.intake.set_faults(IntakeFaults::default());
        world.outbox.change(|weather| (weather.is_away, weather.lost_answers) = (false, 0.0));
        let running = world.start();
        world.until(&format!("seed {seed}"), Duration::from_mins(1), |world| world.intake.is_empty()).await;
        running.drained().await;

        let messages = world.messages().await;
        assert!(messages.values().all(|&times| times == 1), "seed {seed}: {messages:?}");
        assert_eq!(messages.len() as u64, accepted * 2, "seed {seed}");
        let reports = world.reports().await;
        assert!(
            reports.iter().all(|report| report.is_balanced() && report.state == FileState::Ingested),
            "{seed}"
        );
        let sum = |count: fn(&FileReport) -> u64| reports.iter().map(count).sum::<u64>();
        assert_eq!(sum(|report| report.rows), accepted + rejected, "seed {seed}");
        assert_eq!(sum(|report| report.rejected), rejected, "seed {seed}");
    }
}

#[actix::test]
async fn the_actor_ends_when_it_is_drained() {
    let world = World::new(10);
    let fault = Fault::default();
    let address = QueueFeed::new(world.setup(), &ChildId::first("queue_feed"), fault).start();
    world.intake.put("a", object(1));
    address.send(Drain).await.unwrap();
    world.until("ended", Duration::from_secs(5), |_| !address.connected()).await;
}
