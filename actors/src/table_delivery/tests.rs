use std::{collections::BTreeMap, ops::Range};

use async_trait::async_trait;
use postrider_settings::{Group, Keys as _};
use tokio::{task::JoinHandle, time::Instant};

use super::*;
use crate::{
    flow::{Bells, Places, ProgressBoard},
    metrics::StageMetrics,
    model::{
        batch::{BatchHeader, NewBatch},
        bisect::{Refusal, statements_max},
        call::FailureKind,
        file::{DestinationCounts, FileRecord, FileReport, Reject},
        ids::FileId,
        outcome::{Reason, Shortage},
        record::MessageRecord,
        state::MessageState,
        table::{Column, ColumnSource, ColumnType, MAPPING_TYPE},
        time::{MonoMs, UnixMs},
    },
    ports::{
        Clock, LeaseRequest, Ledger, Outbox as _, Queue as _, Settled, Settlement, StoreError, TableError,
        Want,
    },
    testing::{MemoryStore, MemoryTable, TokioClock, fixtures},
};

const TABLES: [&str; 2] = ["primary", "secondary"];
const GROUP: Group = Group { max_rows: 1_000, linger: Duration::from_millis(200) };

/// The store's ledger, and what was recorded in it.
struct RecordingLedger {
    store: Arc<MemoryStore>,
    records: Mutex<Vec<MessageRecord>>,
}

#[async_trait]
impl Ledger for RecordingLedger {
    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<Settled>, StoreError> {
        let records = settlements.iter().flat_map(|settlement| settlement.records.clone());
        self.records.lock().unwrap().extend(records);
        self.store.settle(settlements).await
    }

    async fn disable_destination(&self, name: &str, reason: &str, at: UnixMs) -> Result<(), StoreError> {
        self.store.disable_destination(name, reason, at).await
    }

    async fn disabled_destinations(&self) -> Result<Vec<Arc<str>>, StoreError> {
        self.store.disabled_destinations().await
    }

    async fn report(&self, file: FileId) -> Result<Option<FileReport>, StoreError> {
        self.store.report(file).await
    }

    async fn rejects(&self, file: FileId, after: u64, limit: usize) -> Result<Vec<Reject>, StoreError> {
        self.store.rejects(file, after, limit).await
    }

    async fn latest_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.store.latest_files(limit).await
    }

    async fn timed_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.store.timed_files(limit).await
    }

    async fn settled_files(&self, feed: &str, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.store.settled_files(feed, limit).await
    }

    async fn mark_reported(&self, files: &[FileId]) -> Result<(), StoreError> {
        self.store.mark_reported(files).await
    }
}

fn template() -> String {
    let column = |name: &str, source, kind| Column { name: name.into(), source, kind, required: true };
    let columns = vec![
        column("id", ColumnSource::Id, ColumnType::Text),
        column("who", ColumnSource::Recipient, ColumnType::Text),
    ];
    Mapping { columns }.to_template()
}

struct World {
    clock: Arc<TokioClock>,
    store: Arc<MemoryStore>,
    ledger: Arc<RecordingLedger>,
    tables: [Arc<MemoryTable>; 2],
    setup: TableDeliverySetup,
    file: Arc<FileRecord>,
    appended: u64,
}

impl World {
    fn new() -> Self {
        let clock = Arc::new(TokioClock::at(UnixMs(1_000_000)));
        let store = Arc::new(MemoryStore::new());
        let ledger = Arc::new(RecordingLedger { store: store.clone(), records: Mutex::default() });
        let tables = [Arc::new(MemoryTable::new()), Arc::new(MemoryTable::new())];
        let destination = |(name, table): (&&str, &Arc<MemoryTable>)| TableDestination {
            name: (*name).into(),
            table: table.clone(),
            gates: StatementGates { in_flight: Places::new(4), rate: None },
            group: GROUP,
            concurrency: 2,
            retry: Retry {
                max_attempts: 20,
                max_age: Duration::from_hours(1),
                base: Duration::from_secs(1),
                cap: Duration::from_secs(30),
                ..Retry::declared()
            },
            paused: false,
            recorded: true,
            metrics: StageMetrics::default().destination(name),
        };
        let setup = TableDeliverySetup {
            destinations: TABLES.iter().zip(&tables).map(destination).collect(),
            worker: WorkerSetup {
                born: MonoMs(0),
                tracing: None,
                queue: store.clone(),
                ledger: ledger.clone(),
                steering: Arc::new(MemoryStore::new()),
                clock: clock.clone(),
                queued: Bell::default(),
                due_again: Bells::default(),
                successors: Bells::default(),
                lease: Duration::from_secs(30),
                progress: ProgressBoard::default().mark("table"),
            },
            in_flight: Arc::new(()),
            alone: Arc::default(),
        };
        let file = fixtures::file("orders", 1, &TABLES);
        Self { clock, store, ledger, tables, setup, file, appended: 0 }
    }

    fn batch(&self, destination: &str, rows: Range<u64>, change: impl Fn(&mut BatchHeader)) -> NewBatch {
        let mut header = (*fixtures::header(&self.file, destination)).clone();
        header.template = Some(template());
        header.content_type = MAPPING_TYPE.into();
        change(&mut header);
        let batch = fixtures::batch(&self.file, destination, rows, self.clock.wall());
        NewBatch { header: Arc::new(header), ..batch }
    }

    /// Appends the next `rows` rows to both tables as one batch each. Row `n` is for `user-n`.
    async fn append(&mut self, rows: u64) {
        self.append_with(rows, |_| {}).await;
    }

    async fn append_with(&mut self, rows: u64, change: impl Fn(&mut BatchHeader)) {
        let (first, last) = (self.appended + 1, self.appended + rows);
        let mut append = fixtures::step(&self.file, first..=last, self.clock.wall());
        append.batches =
            TABLES.iter().map(|destination| self.batch(destination, first..last + 1, &change)).collect();
        self.appended = last;
        self.store.append(append).await.unwrap();
        self.setup.worker.queued.ring();
    }

    /// Leases the only batch for the primary table as `holder`, who is then gone; before, it may have begun a row.
    async fn lose(&self, holder: &str, begins: Option<u32>) {
        let wants = vec![Want::new("primary", usize::MAX, 1)];
        let now = self.clock.wall();
        let request =
            LeaseRequest { holder: holder.into(), wants, until: MonoMs(u64::MAX), now, born: UnixMs(0) };
        let lease = self.store.lease(request).await.unwrap().pop().expect("nobody has it");
        let settlement = Settlement {
            token: lease.token,
            verdicts: Vec::new(),
            details: BTreeMap::new(),
            records: Vec::new(),
            ends: false,
            begins,
        };
        assert_eq!(self.store.settle(vec![settlement]).await, Ok(vec![Settled::Open]));
        assert_eq!(self.store.release_holder(holder).await, Ok(1));
    }

    /// Starts a worker as its actor does.
    fn worker(&self) -> Worker {
        let worker = TableDelivery::new(self.setup.clone(), &ChildId::first("table"), Fault::default());
        let strategy = worker.strategy.clone();
        let (lease, extend, group) = (strategy.clone(), strategy.clone(), strategy);
        let tasks = vec![
            tokio::spawn(async move { extend.worker.extend(&extend).await.unwrap() }),
            tokio::spawn(async move { group.group_loop().await }),
        ];
        let life = tokio::spawn(async move { lease.worker.lease(&lease, None).await });
        Worker { actor: Some(worker), life, tasks }
    }

    async fn counts(&self, destination: &str) -> DestinationCounts {
        let report = self.store.report(self.file.id).await.unwrap().unwrap();
        report.destinations[destination]
    }

    /// Lets the worker work until `done`.
    async fn until(&self, what: &str, limit: Duration, mut done: impl AsyncFnMut(&Self) -> bool) {
        let until = Instant::now() + limit;
        while !done(self).await {
            assert!(Instant::now() < until, "{what}: not within {limit:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_settled(&self, destination: &str, limit: Duration) {
        self.until("settled", limit, async |world| {
            let counts = world.counts(destination).await;
            counts.settled() == counts.accepted
        })
        .await;
    }

    fn records_of(&self, destination: &str) -> BTreeMap<u64, MessageRecord> {
        let records = self.ledger.records.lock().unwrap();
        let of = records.iter().filter(|record| *record.destination == *destination);
        of.map(|record| (record.id.row, record.clone())).collect()
    }
}

struct Worker {
    actor: Option<TableDelivery>,
    life: JoinHandle<Result<(), StoreError>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Worker {
    /// As a `Drain` does.
    async fn drained(mut self) {
        self.actor.as_ref().expect("it lives").strategy.close();
        let life = tokio::time::timeout(Duration::from_secs(20), &mut self.life).await;
        life.expect("it drains").expect("it does not panic").expect("the store refuses nothing");
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.life.abort();
        for task in &self.tasks {
            task.abort();
        }
        drop(self.actor.take());
    }
}

#[tokio::test(start_paused = true)]
async fn s4_1_s4_2_small_batches_share_statements_and_a_lonely_one_waits_no_longer_than_its_linger() {
    let mut world = World::new();
    for _ in 0..100 {
        world.append(10).await;
    }
    let worker = world.worker();
    world.until_settled("primary", Duration::from_secs(10)).await;
    let statements = world.tables[0].statements();
    assert!(statements.len() <= 4, "{} statements for 1000 rows", statements.len());
    assert!(statements.iter().all(|statement| statement.rows <= GROUP.max_rows));
    assert_eq!(world.tables[0].rows().len(), 1_000);
    let begun = Instant::now();
    world.append(1).await;
    world.until_settled("primary", Duration::from_secs(10)).await;
    let (took, statements) = (begun.elapsed(), world.tables[0].statements());
    assert!(took >= GROUP.linger && took < GROUP.linger * 2, "{took:?}");
    assert_eq!(statements.last().unwrap().rows, 1);
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn s4_3_nothing_is_settled_before_the_commit() {
    let mut world = World::new();
    world.tables[0].slow(Duration::from_secs(40)); // longer than a lease
    world.append(5).await;
    let worker = world.worker();
    tokio::time::sleep(Duration::from_secs(39)).await;
    assert_eq!(world.counts("primary").await.sent, 0);
    world.until_settled("primary", Duration::from_secs(5)).await;
    assert_eq!((world.tables[0].statements().len(), world.counts("primary").await.sent), (1, 5));
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn s4_4_bad_rows_are_dead_with_the_tables_words_and_cost_few_statements() {
    let mut world = World::new();
    for _ in 0..4 {
        world.append(500).await;
    }
    for row in [1, 2, 777, 1_500] {
        world.tables[0].refuse(&format!("user-{row}"));
    }
    let worker = world.worker();
    world.until_settled("primary", Duration::from_secs(20)).await;
    let counts = world.counts("primary").await;
    assert_eq!((counts.sent, counts.dead), (1_996, 4));
    assert_eq!(world.tables[0].rows().len(), 1_996);
    for (row, record) in world.records_of("primary") {
        let is_bad = [1, 2, 777, 1_500].contains(&row);
        assert_eq!(record.state == MessageState::Dead, is_bad, "row {row}");
        if is_bad {
            assert_eq!(record.reason, Some(Reason::Refused));
            assert_eq!(record.detail.as_deref(), Some(&*format!("value \"user-{row}\" is refused")));
            assert_eq!(record.attempts, 1);
        }
    }
    let statements = world.tables[0].statements().len();
    assert!(statements <= statements_max(4, 1_000, 3) + statements_max(4, 1_000, 1), "{statements}");
    world.until_settled("secondary", Duration::from_secs(1)).await;
    assert_eq!(world.counts("secondary").await.sent, 2_000);
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn s4_5_a_secondary_that_is_away_holds_up_nothing_and_catches_up_by_itself() {
    let mut world = World::new();
    let away = TableError::Retryable("connection refused".into());
    world.tables[1].answer(Some(away));
    for _ in 0..20 {
        world.append(500).await;
    }
    let worker = world.worker();
    world.until_settled("primary", Duration::from_secs(10)).await;
    tokio::time::sleep(Duration::from_mins(2)).await;
    let failed = world.tables[1].statements().len();
    assert!(failed <= 20, "{failed} statements into nothing in two minutes");
    assert_eq!(world.counts("secondary").await.dead, 0);
    let record = world.records_of("secondary").into_values().next().expect("the first group was put off");
    assert_eq!((record.state, record.reason), (MessageState::Retrying, Some(Reason::Unavailable)));
    assert_eq!(record.detail.as_deref(), Some("connection refused"));
    world.tables[1].answer(None);
    world.until_settled("secondary", Duration::from_mins(2)).await;
    assert_eq!((world.counts("secondary").await.sent, world.tables[1].rows().len()), (10_000, 10_000));
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn f72_what_this_machine_lacks_is_charged_to_no_row() {
    let mut world = World::new();
    world.tables[0].answer(Some(TableError::Short(Shortage::Descriptors)));
    for _ in 0..4 {
        world.append(500).await;
    }
    let worker = world.worker();
    tokio::time::sleep(Duration::from_mins(1)).await;
    let tried = world.tables[0].statements().len();
    assert!((2..=20).contains(&tried), "{tried} statements in a minute");
    let record = world.records_of("primary").into_values().next();
    assert_eq!(record.map(|record| record.attempts), None, "nothing is recorded of them");
    world.tables[0].answer(None);
    world.until_settled("primary", Duration::from_mins(1)).await;
    assert_eq!((world.counts("primary").await.sent, world.tables[0].rows().len()), (2_000, 2_000));
    assert!(world.records_of("primary").into_values().all(|record| record.attempts == 1));
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn s4_1_every_statement_passes_both_gates_those_of_a_bisection_too() {
    let mut world = World::new();
    let rate = Gate::default();
    for destination in &mut world.setup.destinations {
        destination.gates.rate = Some(rate.clone());
        destination.gates.in_flight = Places::new(1);
        destination.concurrency = 4;
    }
    world.setup.destinations[1].paused = true;
    world.tables[0].slow(Duration::from_millis(50));
    world.tables[0].refuse("user-1234");
    for _ in 0..8 {
        world.append(500).await;
    }
    let worker = world.worker();
    let mut fed = 0;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let counts = world.counts("primary").await;
        if counts.settled() == counts.accepted {
            break;
        }
        assert_eq!(world.tables[0].statements().len(), fed, "each waits for its turn, and takes it");
        assert!(fed < 40, "it ends");
        rate.feed(1);
        fed += 1;
    }
    assert!(fed > 10, "the bisection was counted: {fed}");
    assert_eq!(world.tables[0].in_flight_max(), 1);
    assert_eq!(world.tables[1].statements().len(), 0, "paused");
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn f66_a_bad_row_dies_alone_whatever_its_code() {
    for (kind, code) in [
        (FailureKind::Refused, "P0001"),
        (FailureKind::Refused, "P0002"),
        (FailureKind::Refused, "54001"),
        (FailureKind::Refused, "MYERR"),
        (FailureKind::Denied, "42501"),
        (FailureKind::Invalid, "22P05"),
    ] {
        for sifts in [false, true] {
            let mut world = World::new();
            world.append(500).await;
            world.tables[0].refuse_as("user-250", kind, code);
            if sifts {
                world.tables[0].can_sift();
            }
            let worker = world.worker();
            world.until_settled("primary", Duration::from_secs(20)).await;
            let counts = world.counts("primary").await;
            assert_eq!((counts.sent, counts.dead), (499, 1), "{code} {sifts}");
            let record = &world.records_of("primary")[&250];
            assert_eq!((record.state, record.reason), (MessageState::Dead, Some(Reason::Refused)));
            let statements = world.tables[0].statements().len();
            assert!(statements <= if sifts { 2 } else { 24 }, "{code} {sifts}: {statements} statements");
            worker.drained().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn f66_a_table_that_refuses_everything_condemns_nobody_and_takes_all_once_it_is_there() {
    for (kind, code) in [(FailureKind::Refused, "42P01"), (FailureKind::Denied, "42501")] {
        for sifts in [false, true] {
            let mut world = World::new();
            if sifts {
                world.tables[0].can_sift();
            }
            let refusal = Refusal { kind, code: code.into(), words: "there is no table".into() };
            world.tables[0].answer(Some(TableError::Refused(refusal)));
            for _ in 0..4 {
                world.append(500).await;
            }
            let worker = world.worker();
            tokio::time::sleep(Duration::from_mins(2)).await;
            let statements = world.tables[0].statements().len();
            assert!(statements <= 100, "{code} {sifts}: {statements} statements into nothing in two minutes");
            assert_eq!(world.counts("primary").await.dead, 0, "{code} {sifts}");
            world.tables[0].answer(None);
            world.until_settled("primary", Duration::from_mins(3)).await;
            let counts = world.counts("primary").await;
            assert_eq!((counts.sent, counts.dead), (2_000, 0), "{code} {sifts}");
            worker.drained().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn f66_rows_that_the_catalogue_refuses_cost_no_statement() {
    let mut world = World::new();
    world.tables[0].foresee("user-7");
    world.append(500).await;
    let worker = world.worker();
    world.until_settled("primary", Duration::from_secs(20)).await;
    let counts = world.counts("primary").await;
    assert_eq!((counts.sent, counts.dead, world.tables[0].statements().len()), (499, 1, 1));
    let record = &world.records_of("primary")[&7];
    assert_eq!((record.reason, record.detail.as_deref()), (Some(Reason::Refused), Some("it does not fit")));
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn f66_halves_are_recorded_as_they_commit() {
    let mut world = World::new();
    world.tables[0].slow(Duration::from_secs(1));
    world.tables[0].refuse("user-500");
    world.append(500).await;
    let worker = world.worker();
    // Refused as a whole, then the first half goes through.
    tokio::time::sleep(Duration::from_millis(3_700)).await;
    assert!(world.counts("primary").await.sent >= 250, "{:?}", world.counts("primary").await);
    world.until_settled("primary", Duration::from_mins(1)).await;
    assert_eq!(world.counts("primary").await.dead, 1);
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_become_a_row_is_dead_with_the_reason() {
    let mut world = World::new();
    world.append_with(3, |header| header.template = Some("{{ id }}".into())).await;
    world.append_with(3, |header| header.content_type = "application/json".into()).await;
    world
        .append_with(3, |header| {
            header.template = Some(template().replace("\"who\"", "\"id\\\"; drop\""));
        })
        .await;
    world
        .append_with(3, |header| {
            header.template = Some(
                template().replace("\"recipient\",\"kind\":\"text\"", "\"recipient\",\"kind\":\"integer\""),
            );
        })
        .await;
    world.tables[0].limit_bytes(100);
    world.append(3).await; // too large for that
    let worker = world.worker();
    world.until_settled("primary", Duration::from_secs(5)).await;
    assert_eq!(world.counts("primary").await.dead, 12);
    let records = world.records_of("primary");
    for (row, expected) in [
        (1, "the mapping can't be read"),
        (4, "the batch has no mapping"),
        (7, "is not a name of a column"),
        (10, "column `who`: found \"user-10\", expected a whole number"),
    ] {
        let record = &records[&row];
        let detail = record.detail.as_deref().unwrap_or_default();
        assert!(detail.contains(expected), "row {row}: {detail}");
        assert_eq!((record.state, record.reason), (MessageState::Dead, Some(Reason::Render)));
    }
    assert_eq!(records[&13].state, MessageState::Sent);
    worker.drained().await;
    let mut world = World::new();
    world.tables[0].limit_bytes(50);
    world.append(3).await;
    let worker = world.worker();
    world.until_settled("primary", Duration::from_secs(5)).await;
    assert_eq!((world.counts("primary").await.dead, world.tables[0].statements().len()), (3, 0));
    assert!(world.records_of("primary")[&1].detail.as_deref().unwrap().contains("50 at most"));
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn s4_6_a_batch_whose_lease_was_lost_is_written_again_one_row_at_a_time() {
    let mut world = World::new();
    world.append(5).await;
    // It had written the rows, but not recorded them.
    let mapping = Arc::new(serde_json::from_str::<Mapping>(&template()).unwrap());
    let id = |row| format!("msg_{}_{row}", world.file.id);
    let rows: Vec<_> = (1..=5)
        .map(|row| MemoryTable::row(&mapping, &[Some(&id(row)), Some(&format!("user-{row}"))]))
        .collect();
    world.tables[0].insert(&rows).await.unwrap();
    for holder in ["a", "b", "c"] {
        world.lose(holder, None).await;
    }
    let worker = world.worker();
    world.until_settled("primary", Duration::from_secs(5)).await;
    let counts = world.counts("primary").await;
    assert_eq!((counts.sent, counts.dead, world.tables[0].rows().len()), (5, 0, 5), "nobody is condemned");
    let rows: Vec<_> = world.tables[0].statements().iter().map(|statement| statement.rows).collect();
    assert_eq!(rows, [5, 1, 1, 1, 1, 1], "suspects go alone");
    world.until_settled("secondary", Duration::from_secs(5)).await;
    assert_eq!(world.counts("secondary").await.sent, 5);
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn b17_a_row_that_was_alone_in_flight_at_three_deaths_is_condemned() {
    let mut world = World::new();
    world.append(5).await;
    for holder in ["a", "b", "c"] {
        world.lose(holder, Some(2)).await;
    }
    let worker = world.worker();
    world.until_settled("primary", Duration::from_secs(5)).await;
    let counts = world.counts("primary").await;
    assert_eq!((counts.sent, counts.dead, world.tables[0].rows().len()), (4, 1, 4));
    assert_eq!(world.records_of("primary")[&3].reason, Some(Reason::Poison));
    let rows: Vec<_> = world.tables[0].statements().iter().map(|statement| statement.rows).collect();
    assert_eq!(rows, [1, 1, 1, 1], "it goes alone, and the condemned row not at all");
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_statement_is_its_rows_failure_and_the_worker_goes_on() {
    let mut world = World::new();
    world.tables[0].panic(1);
    world.append(5).await;
    let worker = world.worker();
    world.until_settled("primary", Duration::from_mins(1)).await;
    assert_eq!(world.counts("primary").await.sent, 5);
    let ledger = world.ledger.records.lock().unwrap().clone();
    assert!(ledger.iter().any(|record| record.reason == Some(Reason::Panic)));
    worker.drained().await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_finishes_the_statement_and_gives_back_the_rest_uncharged() {
    let mut world = World::new();
    world.setup.destinations[1].paused = true;
    world.setup.destinations[0].concurrency = 1;
    world.tables[0].slow(Duration::from_secs(5));
    world.append(2_000).await; // two statements
    world.append(5).await;
    let worker = world.worker();
    tokio::time::sleep(Duration::from_secs(1)).await;
    worker.drained().await;
    let counts = world.counts("primary").await;
    assert_eq!((counts.sent, counts.retrying, counts.dead), (1_000, 0, 0));
    assert_eq!(world.store.leased(), 0);
    world.tables[0].slow(Duration::ZERO);
    let wants = vec![Want::new("primary", usize::MAX, 10)];
    let now = world.clock.wall();
    let request =
        LeaseRequest { holder: "next".into(), wants, until: MonoMs(u64::MAX), now, born: UnixMs(0) };
    let leases = world.store.lease(request).await.unwrap();
    assert!(leases.iter().all(|lease| lease.losses == 0), "{leases:?}");
    let open = || leases.iter().flat_map(|lease| &lease.open);
    assert_eq!((open().count(), open().filter(|open| open.tries > 0).count()), (1_005, 0));
}

#[tokio::test(start_paused = true)]
async fn b11_a_table_that_is_disabled_takes_no_further_statement_and_goes_on_when_it_is_enabled() {
    let mut world = World::new();
    world.setup.destinations[1].paused = true;
    world.setup.destinations[0].concurrency = 1;
    world.tables[0].slow(Duration::from_secs(5));
    world.append(2_000).await; // two statements
    world.append(5).await;
    let worker = world.worker();
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.store.disable_destination("primary", "a look at the table", world.clock.wall()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(20)).await;
    let counts = world.counts("primary").await;
    assert_eq!((counts.sent, counts.retrying, counts.dead), (1_000, 0, 0));
    assert_eq!((world.tables[0].statements().len(), world.store.leased()), (1, 0));
    world.store.enable_destination("primary");
    world.until_settled("primary", Duration::from_mins(1)).await;
    assert_eq!((world.counts("primary").await.sent, world.tables[0].rows().len()), (2_005, 2_005));
    worker.drained().await;
}

#[actix::test]
async fn the_actor_ends_when_it_is_drained() {
    let mut world = World::new();
    world.append(5).await;
    let address = TableDelivery::new(world.setup.clone(), &ChildId::first("table"), Fault::default()).start();
    world.until_settled("primary", Duration::from_secs(10)).await;
    address.send(Drain).await.unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    while address.connected() {
        assert!(Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
