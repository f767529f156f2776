//! What goes wrong around the ledger of rows in Postgres, with a real server.
#![cfg(feature = "postgres")]

#[path = "pg/mod.rs"]
mod pg;

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use pg::{Postgres, Stop};
use postrider::{
    adapters::postgres::{
        OpenError, PostgresLedger, PostgresSettings, PostgresView, SCHEMA_VERSION, Tls, check, grants,
        migrate,
    },
    console::receipts::ReceiptView as _,
};
use postrider_actors::{
    model::{
        ids::{FileId, MessageId},
        receipt::{EventId, Receipt, ReceiptFacts, ReceiptKey},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::{Applied, Arrival, ReceiptLedger as _, SourceCursor, StoreError},
};
use rand::{SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};

const NOW: UnixMs = UnixMs(1_700_000_000_000);
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

fn server() -> Arc<Postgres> {
    let server = Postgres::start();
    server.execute_as("postgres", "postgres", "CREATE ROLE daemon LOGIN");
    Arc::new(server)
}

/// Short timeouts: faults are to show within seconds.
fn settings(server: &Postgres) -> PostgresSettings {
    let mut settings = PostgresSettings::new(server.url_of("daemon", pg::DATABASE).into());
    settings.timeouts.connect = Duration::from_secs(2);
    settings.timeouts.statement = Duration::from_secs(10);
    settings.timeouts.lock = Duration::from_secs(1);
    settings
}

async fn install(server: &Postgres) {
    let mut owner = PostgresSettings::new(server.url().into());
    owner.partition_days = 1;
    migrate(&owner).await.unwrap();
    server.execute(&grants("postrider", "daemon").unwrap());
}

async fn ledger(server: &Postgres) -> PostgresLedger {
    install(server).await;
    PostgresLedger::open(settings(server)).await.unwrap()
}

/// File `n` was accepted on day `n`.
fn record(file: u8, row: u64) -> MessageRecord {
    let at = UnixMs(NOW.0 + u64::from(file) * DAY_MS);
    MessageRecord {
        id: MessageId { file: FileId([file; 16]), row },
        destination: "d".into(),
        feed: "feed".into(),
        recipient: format!("user-{file}-{row}").into(),
        state: MessageState::Sent,
        attempts: 1,
        status: 200,
        reason: None,
        detail: None,
        provider_id: Some(format!("p-{file}-{row}").into()),
        accepted_at: at,
        at,
    }
}

/// By the provider's id for odd numbers.
fn receipt(file: u8, row: u64, number: u64, state: MessageState) -> Receipt {
    let id = MessageId { file: FileId([file; 16]), row };
    let key = if number.is_multiple_of(2) {
        ReceiptKey::Message(id)
    } else {
        ReceiptKey::Provider(format!("p-{file}-{row}").into())
    };
    Receipt {
        event: EventId::named("s", &format!("{file} {row} {number} {}", state.as_str())),
        key,
        state,
        at: Some(UnixMs(NOW.0 + number)),
        facts: ReceiptFacts { carrier: Some(format!("carrier {number}").into()), ..ReceiptFacts::default() },
    }
}

fn arrival(receipts: Vec<Receipt>) -> Arrival {
    Arrival {
        source: "s".into(),
        destination: "d".into(),
        receipts,
        rejects: Vec::new(),
        cursor: None,
        at: NOW,
    }
}

/// Repeats what may be repeated; what is refused for good fails the test.
async fn insist<T, F>(work: impl Fn() -> F) -> T
where
    F: Future<Output = Result<T, StoreError>>,
{
    let started = tokio::time::Instant::now();
    loop {
        match work().await {
            Ok(done) => return done,
            Err(StoreError::Permanent(why)) => panic!("refused: {why}"),
            Err(error) => assert!(started.elapsed() < Duration::from_secs(90), "no end to it: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn drain(ledger: &PostgresLedger) {
    while insist(|| ledger.waiting()).await > 0 {
        insist(|| ledger.apply(1000, usize::MAX, NOW)).await;
    }
}

/// Everything that a receipt can change, of every message.
fn standings(server: &Postgres) -> Vec<Vec<Option<String>>> {
    server.rows(
        "SELECT file::text, row::text, state::text, told::text, receipt_event::text, carrier \
           FROM postrider.messages ORDER BY file, row",
    )
}

fn deadlocks(server: &Postgres) -> String {
    assert!(!server.log().contains("deadlock detected"), "{}", server.log());
    server.value("SELECT deadlocks::text FROM pg_stat_database WHERE datname = current_database()")
}

/// Connections of the daemon that hold a transaction open.
fn stuck(server: &Postgres) -> String {
    server.value_as(
        "postgres",
        pg::DATABASE,
        "SELECT count(*)::text FROM pg_stat_activity WHERE usename = 'daemon' AND state LIKE 'idle in transaction%'",
    )
}

/// 6,000 messages of three days, and a final receipt of each, while `harm` is done.
async fn work_while(server: &Arc<Postgres>, harm: impl Fn(&Postgres) + Send + 'static) {
    let ledger = ledger(server).await;
    let is_over = Arc::new(AtomicBool::new(false));
    let harming = std::thread::spawn({
        let (server, is_over) = (server.clone(), is_over.clone());
        move || {
            while !is_over.load(Ordering::SeqCst) {
                harm(&server);
            }
        }
    });
    let recording = tokio::spawn({
        let ledger = ledger.clone();
        async move {
            for part in 0..60 {
                let records: Vec<_> =
                    (0..100).map(|row| record((part % 3) as u8, part / 3 * 100 + row)).collect();
                insist(|| ledger.record(records.clone())).await;
            }
        }
    });
    let taking = tokio::spawn({
        let ledger = ledger.clone();
        async move {
            for part in 0..60u64 {
                let receipts = (0..100)
                    .map(|row| receipt((part % 3) as u8, part / 3 * 100 + row, row, MessageState::Delivered));
                let mut arrival = arrival(receipts.collect());
                arrival.cursor = Some(SourceCursor(part.to_string()));
                insist(|| ledger.take(arrival.clone())).await;
            }
        }
    });
    let applying: Vec<_> = (0..2)
        .map(|_| {
            let (ledger, is_over) = (ledger.clone(), is_over.clone());
            tokio::spawn(async move {
                while !is_over.load(Ordering::SeqCst) {
                    insist(|| ledger.apply(300, usize::MAX, NOW)).await;
                    insist(|| ledger.rejoin(1000)).await;
                }
            })
        })
        .collect();
    recording.await.unwrap();
    taking.await.unwrap();
    is_over.store(true, Ordering::SeqCst);
    harming.join().unwrap();
    for applying in applying {
        applying.await.unwrap();
    }
    insist(|| ledger.rejoin(10_000)).await;
    drain(&ledger).await;
    let counts = "SELECT string_agg(state || ' ' || n, ', ') FROM \
                  (SELECT state, count(*) AS n FROM postrider.messages GROUP BY state) s";
    assert_eq!(server.value(counts), "6 6000");
    assert_eq!(server.value("SELECT count(*)::text FROM postrider.receipt_parked"), "0");
    assert_eq!(ledger.cursor("s").await, Ok(Some(SourceCursor("59".into()))));
    assert_eq!(stuck(server), "0");
    assert_eq!(deadlocks(server), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f49_restarts_lose_nothing() {
    let server = server();
    work_while(&server, |server| {
        for how in [Stop::Fast, Stop::Crash] {
            std::thread::sleep(Duration::from_millis(400));
            server.stop(how);
            std::thread::sleep(Duration::from_millis(50));
            server.resume();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f49_terminated_backends_lose_nothing() {
    let server = server();
    work_while(&server, |server| {
        std::thread::sleep(Duration::from_millis(60));
        let end =
            "SELECT count(pg_terminate_backend(pid))::text FROM pg_stat_activity WHERE usename = 'daemon'";
        server.value_as("postgres", pg::DATABASE, end);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f49_a_backend_that_ends_in_its_commit_leaves_it_unknown_and_repeating_is_harmless() {
    let server = server();
    let ledger = ledger(&server).await;
    // A deferred trigger runs within COMMIT.
    server.execute(
        "CREATE FUNCTION postrider.wait() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN PERFORM pg_sleep(5); RETURN NULL; END $$; \
         CREATE CONSTRAINT TRIGGER wait AFTER UPDATE ON postrider.sources DEFERRABLE INITIALLY DEFERRED \
         FOR EACH ROW EXECUTE FUNCTION postrider.wait()",
    );
    let arrival = arrival(vec![receipt(1, 1, 0, MessageState::Delivered)]);
    let taking = tokio::spawn({
        let (ledger, arrival) = (ledger.clone(), arrival.clone());
        async move { ledger.take(arrival).await }
    });
    let in_commit = "SELECT coalesce(max(pid), 0)::text FROM pg_stat_activity \
                     WHERE usename = 'daemon' AND query = 'COMMIT' AND state = 'active'";
    let pid = loop {
        let pid = server.value_as("postgres", pg::DATABASE, in_commit);
        if pid != "0" {
            break pid;
        }
        assert!(!taking.is_finished());
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    server.value_as("postgres", pg::DATABASE, &format!("SELECT pg_terminate_backend({pid})::text"));
    let answer = taking.await.unwrap();
    assert!(matches!(answer, Err(StoreError::Unknown(_))), "{answer:?}");
    server.execute("DROP TRIGGER wait ON postrider.sources");
    let taken = insist(|| ledger.take(arrival.clone())).await;
    assert_eq!(taken.new + taken.known, 1);
    assert_eq!(ledger.waiting().await, Ok(1));
    assert_eq!(stuck(&server), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f49_a_locked_table_and_an_exhausted_pool_are_waited_for_within_bounds() {
    let server = server();
    install(&server).await;
    let mut settings = settings(&server);
    settings.pool = 1;
    settings.timeouts.connect = Duration::from_millis(400);
    let ledger = PostgresLedger::open(settings).await.unwrap();
    let records: Vec<_> = (0..10).map(|row| record(1, row)).collect();
    ledger.record(records.clone()).await.unwrap();

    let (release, released) = std::sync::mpsc::channel::<()>();
    let locking = std::thread::spawn({
        let server = server.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (client, connection) =
                    tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
                tokio::spawn(connection);
                client.batch_execute("BEGIN; LOCK TABLE postrider.messages").await.unwrap();
                let _ = released.recv();
                client.batch_execute("COMMIT").await.unwrap();
            });
        }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let started = tokio::time::Instant::now();
    let (first, second) = tokio::join!(ledger.record(records.clone()), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        ledger.waiting().await
    });
    let Err(StoreError::Retryable(why)) = first else { panic!("{first:?}") };
    assert!(why.contains("55P03"), "{why}");
    let Err(StoreError::Retryable(why)) = second else { panic!("{second:?}") };
    assert!(why.contains("all 1 connections"), "{why}");
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    assert_eq!(stuck(&server), "0");
    release.send(()).unwrap();
    locking.join().unwrap();
    ledger.record(records).await.unwrap();
    assert_eq!(server.value("SELECT count(*)::text FROM postrider.messages"), "10");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f49_a_caller_that_goes_away_leaves_no_transaction() {
    let server = server();
    let ledger = ledger(&server).await;
    let receipts: Vec<_> = (0..1000).map(|row| receipt(1, row, 0, MessageState::Delivered)).collect();
    ledger.take(arrival(receipts)).await.unwrap();
    for wait_ms in [1, 3, 6, 12, 24] {
        let abandoned = ledger.apply(500, usize::MAX, NOW);
        let _ = tokio::time::timeout(Duration::from_millis(wait_ms), abandoned).await;
    }
    drain(&ledger).await;
    let waiting = "SELECT ((SELECT count(*) FROM postrider.receipt_inbox) \
                         + (SELECT count(*) FROM postrider.receipt_parked))::text";
    assert_eq!(server.value(waiting), "1000");
    assert_eq!(stuck(&server), "0");
}

/// Each of the messages gets 8 receipts, each of the appliers meets most of the messages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f50_eight_appliers_on_the_same_rows_never_deadlock() {
    const MESSAGES: u64 = 600;
    let server = server();
    let ledger = ledger(&server).await;
    let records: Vec<_> =
        (0..3).flat_map(|file| (0..MESSAGES / 3).map(move |row| record(file, row))).collect();
    ledger.record(records.clone()).await.unwrap();
    let mut rng = SmallRng::seed_from_u64(50);
    let mut receipts: Vec<_> = (0..16)
        .flat_map(|number| {
            records.iter().map(move |record| {
                let state = if number % 5 == 0 { MessageState::Failed } else { MessageState::Delivered };
                receipt(record.id.file.0[0], record.id.row, number, state)
            })
        })
        .collect();
    receipts.shuffle(&mut rng);
    let sum: u64 = receipts.len() as u64;
    ledger.take(arrival(receipts)).await.unwrap();
    let appliers: Vec<_> = (0..8)
        .map(|_| {
            let ledger = ledger.clone();
            tokio::spawn(async move {
                let mut all = Applied::default();
                loop {
                    let applied = ledger.apply(1000, usize::MAX, NOW).await.expect("nothing is in the way");
                    if applied.total() == 0 {
                        break all;
                    }
                    all.matched += applied.matched;
                    all.conflicts += applied.conflicts;
                }
            })
        })
        .collect();
    // What else writes these rows.
    let again = tokio::spawn({
        let (ledger, mut records) = (ledger.clone(), records.clone());
        async move {
            for attempts in 2..8 {
                for record in &mut records {
                    record.attempts = attempts;
                }
                records.reverse();
                ledger.record(records.clone()).await.expect("nothing is in the way");
                let later = UnixMs(NOW.0 + 9 * DAY_MS);
                ledger.expire("d", later, 100, later).await.expect("nothing is in the way");
            }
        }
    });
    let (mut matched, mut conflicts) = (0, 0);
    for applier in appliers {
        let applied = applier.await.unwrap();
        matched += applied.matched;
        conflicts += applied.conflicts;
    }
    again.await.unwrap();
    assert_eq!((matched, conflicts), (sum, MESSAGES), "each is applied once");
    let wrong = "SELECT count(*)::text FROM postrider.messages \
                 WHERE (state, told, attempts, carrier) IS DISTINCT FROM (6, 3, 7, 'carrier 14')";
    assert_eq!(server.value(wrong), "0");
    assert_eq!(deadlocks(&server), "0");
}

/// Over several partitions, by both keys; what is before its message comes again through the parked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f51_the_order_of_receipts_does_not_matter() {
    let server = server();
    let ledger = ledger(&server).await;
    let mut seen: Option<Vec<Vec<Option<String>>>> = None;
    for seed in 0..4 {
        server.execute(
            "TRUNCATE postrider.messages, postrider.files, postrider.receipt_inbox, postrider.receipt_parked, \
             postrider.receipt_events",
        );
        let ledger = if seed == 0 {
            ledger.clone()
        } else {
            // One that does not remember where files were.
            PostgresLedger::open(settings(&server)).await.unwrap()
        };
        let mut rng = SmallRng::seed_from_u64(seed);
        let records: Vec<_> = (0..3).flat_map(|file| (0..100).map(move |row| record(file, row))).collect();
        let mut receipts: Vec<_> = (0..6)
            .flat_map(|number| {
                // Row 100 on is unknown.
                (0..3).flat_map(move |file| {
                    (0..110).map(move |row| {
                        let state = match (row + number) % 3 {
                            0 => MessageState::Sent,
                            1 => MessageState::Failed,
                            _ if row < 50 => MessageState::Delivered,
                            _ => MessageState::Failed,
                        };
                        receipt(file, row, number, state)
                    })
                })
            })
            .collect();
        let thrice: Vec<_> = receipts.iter().chain(&receipts).cloned().collect();
        receipts.extend(thrice);
        receipts.shuffle(&mut rng);
        let (before, after) = receipts.split_at(receipts.len() / 3);
        ledger.take(arrival(before.to_vec())).await.unwrap();
        drain(&ledger).await;
        let mut shuffled = records.clone();
        shuffled.shuffle(&mut rng);
        for some in shuffled.chunks(70) {
            ledger.record(some.to_vec()).await.unwrap();
        }
        for some in after.chunks(500) {
            ledger.take(arrival(some.to_vec())).await.unwrap();
            drain(&ledger).await;
        }
        let found = standings(&server);
        assert_eq!(found.len(), 300);
        assert_eq!(
            server.value("SELECT count(*)::text FROM postrider.receipt_parked"),
            (3 * 10 * 6).to_string()
        );
        assert_eq!(server.value("SELECT count(DISTINCT tableoid)::text FROM postrider.messages"), "3");
        if let Some(seen) = &seen {
            assert_eq!(*seen, found, "seed {seed}");
        }
        seen = Some(found);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f53_65536_receipts_are_taken_in_parts_and_the_cursor_with_the_last() {
    let server = server();
    let ledger = ledger(&server).await;
    let receipts: Vec<_> = (0..65_536).map(|row| receipt(1, row, 0, MessageState::Delivered)).collect();
    let mut arrival = arrival(receipts);
    arrival.cursor = Some(SourceCursor("end".into()));
    let taken = ledger.take(arrival.clone()).await.unwrap();
    assert_eq!((taken.new, taken.known), (65_536, 0));
    let transactions: u32 =
        server.value("SELECT count(DISTINCT xmin::text)::text FROM postrider.receipt_inbox").parse().unwrap();
    assert_eq!(transactions, 16);
    assert_eq!(ledger.cursor("s").await, Ok(Some(SourceCursor("end".into()))));
    let again = ledger.take(arrival).await.unwrap();
    assert_eq!((again.new, again.known), (0, 65_536));
    assert_eq!(ledger.waiting().await, Ok(65_536));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn a_schema_is_made_once_and_only_its_own_version_is_used() {
    let server = server();
    let settings = settings(&server);
    let error = PostgresLedger::open(settings.clone()).await.unwrap_err();
    assert!(
        matches!(error, OpenError::Missing { .. }) && error.to_string().contains("postrider migrate"),
        "{error}"
    );
    let owner = PostgresSettings::new(server.url().into());
    let (one, two) = tokio::join!(migrate(&owner), migrate(&owner));
    let mut from = [one.unwrap(), two.unwrap()].map(|migrated| migrated.from);
    from.sort_unstable();
    assert_eq!(from, [0, SCHEMA_VERSION]);

    let error = PostgresLedger::open(settings.clone()).await.unwrap_err();
    assert!(
        matches!(error, OpenError::Privileges { .. }) && error.to_string().contains("role.sql"),
        "{error}"
    );
    server.execute(&grants("postrider", "daemon").unwrap());
    PostgresLedger::open(settings.clone()).await.unwrap();
    let checked = check(&settings).await.unwrap();
    assert_eq!((checked.role.as_str(), checked.encrypted), ("daemon", false));
    assert!(checked.warnings.iter().all(|warning| warning.contains("fsync")), "{:?}", checked.warnings);
    assert!(check(&owner).await.unwrap().warnings.iter().any(|warning| warning.contains("owns")));
    server.execute("REVOKE DELETE ON postrider.receipt_parked FROM daemon");
    assert!(matches!(check(&settings).await, Err(OpenError::Privileges { .. })));

    server.execute("UPDATE postrider.meta SET version = 99");
    let error = PostgresLedger::open(settings.clone()).await.unwrap_err();
    assert!(matches!(error, OpenError::Newer { found: 99, .. }), "{error}");
    assert!(matches!(migrate(&owner).await, Err(OpenError::Newer { .. })));
    server.execute("UPDATE postrider.meta SET version = 0");
    let error = PostgresLedger::open(settings).await.unwrap_err();
    assert!(matches!(error, OpenError::Older { found: 0, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn the_file_of_grants_is_enough_and_gives_no_right_to_make_or_drop_tables() {
    let server = server();
    let ledger_before = PostgresSettings::new(server.url().into());
    migrate(&ledger_before).await.unwrap();
    server.execute_as("postgres", "postgres", "CREATE ROLE postrider_daemon LOGIN");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/postgres/role.sql");
    server.execute(&fs::read_to_string(file).unwrap());
    let mut settings = settings(&server);
    settings.url = server.url_of("postrider_daemon", pg::DATABASE).into();
    settings.keep_changes = true;
    assert!(check(&settings).await.is_ok());
    let ledger = PostgresLedger::open(settings.clone()).await.unwrap();
    ledger.record(vec![record(1, 1), record(2, 1), record(3, 1)]).await.unwrap();
    ledger
        .take(arrival(vec![receipt(1, 1, 0, MessageState::Failed), receipt(1, 9, 0, MessageState::Failed)]))
        .await
        .unwrap();
    drain(&ledger).await;
    let later = UnixMs(NOW.0 + 100 * DAY_MS);
    assert_eq!(ledger.orphan(later, 10).await, Ok(1));
    assert_eq!(ledger.rejoin(10).await, Ok(0));
    assert_eq!(ledger.expire("d", later, 10, later).await, Ok(2));
    let changes = ledger.changes(None, 10).await.unwrap();
    assert_eq!(changes.len(), 3);
    ledger.forget_changes(&[changes[0].number]).await.unwrap();
    let view = PostgresView::open(&settings).await.unwrap();
    assert_eq!(view.sources().await.unwrap().len(), 1);
    assert_eq!(view.orphans(10).await.unwrap().len(), 1);
    while ledger.retire(later, 10).await.unwrap() > 0 {}
    assert_eq!(server.value("SELECT count(*)::text FROM postrider.messages"), "0");

    for forbidden in [
        "CREATE TABLE postrider.mine ()",
        "DROP TABLE postrider.messages",
        "TRUNCATE postrider.messages",
        "DELETE FROM postrider.messages",
        "UPDATE postrider.meta SET version = 7",
        "INSERT INTO postrider.partitions VALUES ('2000-01-01', '2000-01-02', 'pg_class')",
    ] {
        let (client, connection) =
            tokio_postgres::connect(&server.url_of("postrider_daemon", pg::DATABASE), tokio_postgres::NoTls)
                .await
                .unwrap();
        tokio::spawn(connection);
        let refused = client.batch_execute(forbidden).await.expect_err(forbidden);
        assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("42501"), "{forbidden}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn retention_drops_whole_partitions_and_gives_way_to_who_reads() {
    let server = server();
    let ledger = ledger(&server).await;
    let records: Vec<_> = (0..4).flat_map(|file| (0..50).map(move |row| record(file, row))).collect();
    ledger.record(records).await.unwrap();
    // Of the first two days.
    let before = UnixMs(NOW.0 + 2 * DAY_MS);
    let count = || server.value("SELECT count(*)::text FROM postrider.messages");
    {
        let (client, connection) =
            tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
        let driving = tokio::spawn(connection);
        client.batch_execute("BEGIN; SELECT count(*) FROM postrider.messages").await.unwrap();
        let started = tokio::time::Instant::now();
        let (retired, recorded) =
            tokio::join!(ledger.retire(before, 1000), ledger.record(vec![record(3, 50)]));
        retired.unwrap();
        recorded.unwrap();
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        assert_eq!(count(), "201");
        client.batch_execute("COMMIT").await.unwrap();
        drop(client);
        let _ = driving.await;
    }
    while ledger.retire(before, 1000).await.unwrap() > 0 {}
    assert_eq!(count(), "101");
    // The ledger remembers where the file was; it asks again.
    let again = MessageRecord { at: UnixMs(NOW.0 + 3 * DAY_MS), ..record(0, 1) };
    insist(|| ledger.record(vec![again.clone()])).await;
    assert_eq!(count(), "102");
    assert_eq!(
        server.value("SELECT count(*)::text FROM postrider.partitions WHERE end_day <= '2023-11-16'"),
        "0"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn partitions_of_another_width_fit_between_their_neighbours() {
    let server = server();
    let ledger = ledger(&server).await;
    ledger.record(vec![record(0, 1), record(3, 1)]).await.unwrap();
    let mut owner = PostgresSettings::new(server.url().into());
    owner.partition_days = 30;
    migrate(&owner).await.unwrap();
    let more: Vec<_> = (0..60).map(|file| record(file, 2)).collect();
    ledger.record(more).await.unwrap();
    assert_eq!(server.value("SELECT count(*)::text FROM postrider.messages"), "62");
    let overlaps = "SELECT count(*)::text FROM postrider.partitions a JOIN postrider.partitions b \
                    ON a.first_day < b.first_day AND a.end_day > b.first_day";
    assert_eq!(server.value(overlaps), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn the_view_shows_gaps_counts_and_what_is_held() {
    let server = server();
    let ledger = ledger(&server).await;
    let records: Vec<_> = (0..3).flat_map(|file| (1..=4).map(move |row| record(file, row))).collect();
    ledger.record(records).await.unwrap();
    ledger
        .take(arrival(vec![
            receipt(0, 1, 0, MessageState::Delivered),
            receipt(1, 1, 1, MessageState::Sent),
            receipt(9, 1, 0, MessageState::Failed),
        ]))
        .await
        .unwrap();
    drain(&ledger).await;
    let expired_by = UnixMs(NOW.0 + 1);
    assert_eq!(ledger.expire("d", expired_by, 2, expired_by).await, Ok(2));
    let view = PostgresView::open(&settings(&server)).await.unwrap();

    let counts: BTreeMap<_, _> =
        view.counts(None).await.unwrap().into_iter().map(|count| (count.state, count.messages)).collect();
    let expected = [(MessageState::Sent, 9), (MessageState::Expired, 2), (MessageState::Delivered, 1)];
    assert_eq!(counts, BTreeMap::from(expected));
    let of_file = view.counts(Some(FileId([1; 16]))).await.unwrap();
    assert_eq!((of_file.len(), of_file[0].messages), (1, 4));
    assert!(view.counts(Some(FileId([9; 16]))).await.unwrap().is_empty());

    let far = UnixMs(NOW.0 + 9 * DAY_MS);
    let (mut after, mut walked) = (None, Vec::new());
    loop {
        let page = view.gaps("d", far, after.as_ref(), 4).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.place());
        walked.extend(page.iter().map(|gap| (gap.sent_at, gap.id)));
    }
    assert_eq!(walked.len(), 11);
    assert!(walked.is_sorted());
    assert_eq!(view.gaps("d", UnixMs(NOW.0 + 1), None, 100).await.unwrap().len(), 3);
    assert!(view.gaps("elsewhere", far, None, 100).await.unwrap().is_empty());
    // Ages at the third day: 3 of 72 h, 4 of 48 h, 4 of 24 h.
    let ages = view.gap_ages("d", UnixMs(NOW.0 + 3 * DAY_MS)).await.unwrap();
    assert_eq!(ages, [0, 0, 0, 4, 4, 3]);

    let parked = view.parked(10).await.unwrap();
    assert_eq!(parked.len(), 1);
    assert_eq!(
        (&*parked[0].source, &*parked[0].destination, parked[0].state),
        ("s", "d", MessageState::Failed)
    );
    assert!(view.orphans(10).await.unwrap().is_empty());
    let sources = view.sources().await.unwrap();
    assert_eq!((sources[0].waiting, sources[0].parked), (0, 1));
    let words = "SELECT id || ' ' || state || ' ' || destination FROM postrider.message_words WHERE state = 'delivered'";
    assert_eq!(server.value(words), format!("msg_{}_1 delivered d", "00".repeat(16)));
}

/// A server that speaks TLS with a certificate for `localhost`; where the certificate is.
fn encrypt(server: &Postgres) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let data = server.value_as(
        "postgres",
        "postgres",
        "SELECT setting FROM pg_settings WHERE name = 'data_directory'",
    );
    let owner = fs::metadata(&data).unwrap();
    let put = |name: &str, text: &str| -> io::Result<()> {
        let path = Path::new(&data).join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        std::os::unix::fs::chown(&path, Some(owner.uid()), Some(owner.gid()))
    };
    put("server.crt", &key.cert.pem()).unwrap();
    put("server.key", &key.signing_key.serialize_pem()).unwrap();
    fs::write(directory.path().join("ca.pem"), key.cert.pem()).unwrap();
    server.execute_as("postgres", "postgres", "ALTER SYSTEM SET ssl = on");
    server.stop(Stop::Fast);
    server.resume();
    directory
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn encryption_is_used_or_the_start_refused() {
    let server = server();
    install(&server).await;
    let url = format!("postgres://daemon@localhost:{}/{}", server.port(), pg::DATABASE);
    let with = |tls: Tls| PostgresSettings { url: url.clone().into(), tls, ..settings(&server) };
    let system = Tls::Require { ca_file: None };
    // The server can't: no silent fallback.
    let error = PostgresLedger::open(with(system.clone())).await.unwrap_err();
    assert!(matches!(error, OpenError::Unreachable(_)), "{error}");
    let directory = encrypt(&server);
    let ours = Tls::Require { ca_file: Some(directory.path().join("ca.pem")) };
    assert!(check(&with(ours.clone())).await.unwrap().encrypted);
    let ledger = PostgresLedger::open(with(ours.clone())).await.unwrap();
    ledger.record(vec![record(1, 1)]).await.unwrap();
    // A certificate that nobody vouches for, and one for another host.
    let error = PostgresLedger::open(with(system)).await.unwrap_err();
    assert!(matches!(error, OpenError::Unreachable(_)), "{error}");
    let mut elsewhere = with(ours);
    elsewhere.url = server.url_of("daemon", pg::DATABASE).into();
    let error = PostgresLedger::open(elsewhere).await.unwrap_err();
    assert!(matches!(error, OpenError::Unreachable(_)), "{error}");
    let missing = with(Tls::Require { ca_file: Some("/nowhere/ca.pem".into()) });
    assert!(PostgresLedger::open(missing).await.unwrap_err().to_string().contains("/nowhere/ca.pem"));
}
