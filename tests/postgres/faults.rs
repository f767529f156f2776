//! F49 to F53 of the fault catalogue.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use postrider_actors::{
    model::{
        receipt::{EventId, Receipt},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::{Applied, ReceiptLedger as _, SourceCursor, StoreError, Taken},
    testing::figure,
};
use postrider_postgres::ledger::PostgresLedger;
use rand::{SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};

use crate::{
    DAY_MS, NOW, arrival, drain, insist, ledger, ledger_with, open_transaction,
    pg::{self, Postgres, Stop},
    receipt, record, server, settings, standings,
};

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
                  (SELECT postrider.state_word(state) AS state, count(*) AS n FROM postrider.messages GROUP BY 1) s";
    assert_eq!(server.value(counts), "delivered 6000");
    assert_eq!(server.value("SELECT count(*)::text FROM postrider.receipt_parked"), "0");
    assert_eq!(ledger.cursor("s").await, Ok(Some(SourceCursor("59".into()))));
    assert_eq!(stuck(server), "0");
    assert_eq!(deadlocks(server), "0");
    figure("6,000 messages and a receipt of each: all delivered, no stuck transaction, no deadlock");
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
    figure("a backend ended in its COMMIT: the outcome is unknown, and its repetition is taken once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f49_a_locked_table_and_an_exhausted_pool_are_waited_for_within_bounds() {
    let server = server();
    let ledger = ledger_with(&server, |settings| {
        settings.keys.connections = 1;
        settings.timeouts.connect = Duration::from_millis(400);
    })
    .await;
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
    figure(format!(
        "a locked table and no free connection: given up after {} ms, later done",
        started.elapsed().as_millis()
    ));
    assert_eq!(stuck(&server), "0");
    release.send(()).unwrap();
    locking.join().unwrap();
    ledger.record(records).await.unwrap();
    assert_eq!(server.value("SELECT count(*)::text FROM postrider.messages"), "10");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f49_what_an_operator_has_to_fix_is_waited_for() {
    let server = server();
    let ledger = ledger(&server).await;
    ledger.record(vec![record(1, 1)]).await.unwrap();
    let harms = [
        ("REVOKE UPDATE ON postrider.messages FROM daemon", "GRANT UPDATE ON postrider.messages TO daemon"),
        (
            "ALTER TABLE postrider.messages RENAME TO elsewhere",
            "ALTER TABLE postrider.elsewhere RENAME TO messages",
        ),
    ];
    for (harm, fix) in harms {
        server.execute(harm);
        let refused = ledger.record(vec![record(1, 2)]).await;
        assert!(matches!(refused, Err(StoreError::Denied(_))), "{harm}: {refused:?}");
        server.execute(fix);
        insist(|| ledger.record(vec![record(1, 2)])).await;
    }
    server.execute_as("postgres", "postgres", "ALTER ROLE daemon NOLOGIN");
    server.execute_as(
        "postgres",
        "postgres",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'daemon'",
    );
    let refused = insist_until(|| ledger.record(vec![record(1, 3)]), |error| error.contains("28000")).await;
    assert!(matches!(refused, StoreError::Denied(_)), "{refused:?}");
    server.execute_as("postgres", "postgres", "ALTER ROLE daemon LOGIN");
    insist(|| ledger.record(vec![record(1, 3)])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f65_a_row_that_the_database_refuses_is_degraded_alone_whatever_its_code() {
    let server = server();
    let ledger = ledger(&server).await;
    server.execute(
        "CREATE FUNCTION postrider.picky() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
           IF NEW.recipient LIKE 'bad-%' THEN \
             RAISE EXCEPTION 'no such recipient' USING ERRCODE = split_part(NEW.recipient, '-', 2); \
           END IF; \
           IF NEW.status = 599 THEN RAISE EXCEPTION 'never' USING ERRCODE = 'P0002'; END IF; \
           RETURN NEW; END $$; \
         CREATE TRIGGER picky BEFORE INSERT ON postrider.messages FOR EACH ROW EXECUTE FUNCTION postrider.picky()",
    );
    let bad =
        |row: u64, code: &str| MessageRecord { recipient: format!("bad-{code}-").into(), ..record(1, row) };
    let codes = ["P0001", "P0002", "54001", "MYERR", "42501", "22023", "23514"];
    for (part, code) in (0u64..).zip(codes) {
        let mut records: Vec<_> = (0..500).map(|row| record(1, part * 1_000 + row)).collect();
        records[250] = bad(part * 1_000 + 250, code);
        records[300].status = 599; // refused even without its texts
        ledger.record(records).await.unwrap_or_else(|error| panic!("{code}: {error}"));
        ledger
            .record(vec![bad(part * 1_000 + 900, code)])
            .await
            .unwrap_or_else(|error| panic!("{code}: {error}"));
    }
    let degraded = "SELECT count(*)::text FROM postrider.messages \
                     WHERE recipient = '' AND provider_id IS NULL AND detail LIKE 'the ledger refused%no such recipient%'";
    assert_eq!(server.value(degraded), (2 * codes.len()).to_string());
    assert_eq!(
        server.value("SELECT count(*)::text FROM postrider.messages"),
        (500 * codes.len()).to_string()
    );
    figure(format!(
        "{} SQLSTATEs: {} rows degraded alone, all {} stored",
        codes.len(),
        2 * codes.len(),
        500 * codes.len()
    ));
}

/// Repeats it until its error says what it should; the first tries may meet connections that were just ended.
async fn insist_until<F>(work: impl Fn() -> F, is_it: impl Fn(&str) -> bool) -> StoreError
where
    F: Future<Output = Result<(), StoreError>>,
{
    for _ in 0..100 {
        match work().await {
            Err(error) if is_it(&error.to_string()) => return error,
            Ok(()) => panic!("it is done"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    panic!("it never says so");
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
    let waiting = "SELECT ((SELECT coalesce(sum(cardinality(event)), 0) FROM postrider.receipt_inbox) \
                         + (SELECT count(*) FROM postrider.receipt_parked))::text";
    assert_eq!(server.value(waiting), "1000");
    assert_eq!(stuck(&server), "0");
    figure("5 callers that go away in the middle of 1,000 receipts: 1,000 kept, no transaction left open");
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
                 WHERE (postrider.state_word(state), reported, attempts, carrier) \
                       IS DISTINCT FROM ('delivered', 3, 7, 'carrier 14')";
    assert_eq!(server.value(wrong), "0");
    assert_eq!(deadlocks(&server), "0");
    figure(format!(
        "8 appliers in batches of 1,000, {sum} receipts of {MESSAGES} messages: each applied once, 0 deadlocks"
    ));
}

/// One that keeps changes, and waits for a lock for longer than a test holds one.
async fn patient_ledger(server: &Postgres) -> PostgresLedger {
    ledger_with(server, |settings| {
        settings.keep_changes = true;
        settings.timeouts.lock = Duration::from_secs(8);
    })
    .await
}

/// What the sweeper does to a row.
fn expire(row: u64) -> String {
    format!("UPDATE postrider.messages SET state = {} WHERE row = {row}", MessageState::Expired as i16)
}

/// The sweeper expires a message after its row was read and before it is written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f50_a_row_that_another_writes_in_between_is_read_again() {
    let server = server();
    let ledger = patient_ledger(&server).await;
    ledger.record((1..=3).map(|row| record(0, row)).collect()).await.unwrap();
    for number in [0, 1] {
        server.execute(&format!(
            "UPDATE postrider.messages SET state = {}, reported = 0, receipt_state = NULL, receipt_event = NULL",
            MessageState::Sent as i16
        ));
        let receipts = (1..=3).map(|row| receipt(0, row, number, MessageState::Delivered)).collect();
        ledger.take(arrival(receipts)).await.unwrap();
        let other = open_transaction(&server, &expire(2)).await;
        let applying = tokio::spawn({
            let ledger = ledger.clone();
            async move { ledger.apply(1000, usize::MAX, NOW).await }
        });
        let waits = "SELECT count(*)::text FROM pg_stat_activity \
                     WHERE usename = 'daemon' AND wait_event_type = 'Lock' AND query LIKE '%UPDATE messages%'";
        while server.value_as("postgres", pg::DATABASE, waits) != "1" {
            assert!(!applying.is_finished(), "{:?}", applying.await);
        }
        other.batch_execute("COMMIT").await.unwrap();
        let applied = applying.await.unwrap();
        assert_eq!(applied, Ok(Applied { matched: 3, parked: 0, rejected: 0, changed: 3, conflicts: 0 }));
        let changes = ledger.changes(None, 10).await.unwrap();
        let before: Vec<_> = changes.iter().map(|change| (change.id.row, change.before)).collect();
        let (sent, expired) = (MessageState::Sent, MessageState::Expired);
        assert_eq!(before, [(1, sent), (2, expired), (3, sent)]);
        ledger.forget_changes(&changes.iter().map(|change| change.number).collect::<Vec<_>>()).await.unwrap();
    }
    assert_eq!(stuck(&server), "0");
}

/// While the rows are locked to be read again, another has locked one of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f50_a_row_is_read_as_the_other_leaves_it() {
    let server = server();
    let ledger = patient_ledger(&server).await;
    let waiting = |role: &str, query: &str| {
        let count = format!(
            "SELECT count(*)::text FROM pg_stat_activity \
             WHERE usename = '{role}' AND wait_event_type = 'Lock' AND query LIKE '%{query}%'"
        );
        server.value_as("postgres", pg::DATABASE, &count) == "1"
    };
    // Who comes first after the rollback is for the server to say: it is the one who waits, nearly always.
    for first in (2..20).step_by(2) {
        ledger.record((first..first + 2).map(|row| record(0, row)).collect()).await.unwrap();
        let receipts = (first..first + 2).map(|row| receipt(0, row, 0, MessageState::Delivered)).collect();
        ledger.take(arrival(receipts)).await.unwrap();
        let second_row = open_transaction(&server, &expire(first + 1)).await;
        let applying = tokio::spawn({
            let ledger = ledger.clone();
            async move { ledger.apply(1000, usize::MAX, NOW).await }
        });
        while !waiting("daemon", "UPDATE messages") {
            assert!(!applying.is_finished(), "it waits for the second row");
        }
        let first_row = tokio::spawn({
            let server = server.clone();
            async move { open_transaction(&server, &expire(first)).await }
        });
        while !waiting("postrider", "UPDATE postrider.messages") {
            assert!(!first_row.is_finished(), "it waits for the applier");
        }
        second_row.batch_execute("COMMIT").await.unwrap();
        let first_row = first_row.await.unwrap();
        while !applying.is_finished() && !waiting("daemon", "FOR NO KEY UPDATE") {}
        let is_met = !applying.is_finished();
        first_row.batch_execute("COMMIT").await.unwrap();
        let applied = applying.await.unwrap();
        assert_eq!(applied, Ok(Applied { matched: 2, parked: 0, rejected: 0, changed: 2, conflicts: 0 }));
        let changes = ledger.changes(None, 10).await.unwrap();
        ledger.forget_changes(&changes.iter().map(|change| change.number).collect::<Vec<_>>()).await.unwrap();
        if is_met {
            assert!(changes.iter().all(|change| change.before == MessageState::Expired), "{changes:?}");
            let state = format!(
                "SELECT postrider.state_word(min(state)) FROM postrider.messages WHERE row >= {first}"
            );
            assert_eq!(server.value(&state), "delivered");
            return;
        }
    }
    panic!("the applier was always faster than who waited");
}

/// One receipt whose message's row a trigger refuses, one that nobody can read, and 2,998 others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f52_a_receipt_that_can_t_be_applied_becomes_a_reject_and_holds_up_no_other() {
    let server = server();
    let ledger = ledger(&server).await;
    ledger.record((0..3000).map(|row| record(1, row)).collect()).await.unwrap();
    server.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             RAISE EXCEPTION 'row 1700 is special'; END $$; \
         CREATE TRIGGER refuse BEFORE UPDATE ON postrider.messages FOR EACH ROW WHEN (NEW.row = 1700) \
             EXECUTE FUNCTION refuse()",
    );
    let receipts: Vec<_> = (0..3000).map(|row| receipt(1, row, 1, MessageState::Delivered)).collect();
    ledger.take(arrival(receipts.clone())).await.unwrap();
    server.execute("UPDATE postrider.receipt_inbox SET state[7] = 99 WHERE number = 1");
    let mut sum = Applied::default();
    while ledger.waiting().await.unwrap() > 0 {
        let applied = ledger.apply(1000, usize::MAX, NOW).await.unwrap();
        assert!(applied.total() > 0, "{applied:?}");
        sum += applied;
    }
    assert_eq!(sum, Applied { matched: 2998, parked: 0, rejected: 2, changed: 2998, conflicts: 0 });
    let rejects = server.rows("SELECT place, reason, text FROM postrider.receipt_rejects ORDER BY reason");
    let text = format!("{rejects:?}");
    assert!(text.contains("row 1700 is special (SQLSTATE P0001") && text.contains("p-1-1700"), "{text}");
    assert!(
        text.contains("state 99, which no version of Postrider wrote") && text.contains("p-1-6"),
        "{text}"
    );
    assert_eq!(stuck(&server), "0");

    // Once the row can be written, its receipt may come again.
    server.execute("DROP TRIGGER refuse ON postrider.messages");
    let again =
        ledger.take(arrival(vec![receipts[1700].clone(), receipts[6].clone(), receipts[0].clone()])).await;
    assert_eq!(again.map(|taken| (taken.new, taken.known)), Ok((2, 1)));
    drain(&ledger).await;
    let delivered = MessageState::Delivered as u8;
    let delivered = format!("SELECT count(*)::text FROM postrider.messages WHERE state = {delivered}");
    assert_eq!(server.value(&delivered), "3000");
    figure(
        "3,000 receipts of which a trigger refuses 1 and 1 is unreadable: 2 rejected by name, 2,998 applied",
    );
}

/// What refuses every receipt is no receipt's fault: they wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f52_a_missing_grant_makes_no_reject() {
    let server = server();
    let ledger = ledger(&server).await;
    ledger.record((0..20).map(|row| record(1, row)).collect()).await.unwrap();
    let receipts = (0..20).map(|row| receipt(1, row, 1, MessageState::Delivered)).collect();
    ledger.take(arrival(receipts)).await.unwrap();
    server.execute("REVOKE UPDATE ON postrider.messages FROM daemon");
    assert!(ledger.apply(1000, usize::MAX, NOW).await.is_err());
    assert_eq!(ledger.waiting().await, Ok(20));
    server.execute("GRANT UPDATE ON postrider.messages TO daemon");
    assert_eq!(ledger.apply(1000, usize::MAX, NOW).await.unwrap().changed, 20);
}

/// A commit takes 5 ms more; 32 requests of one source come at once, 1 receipt each. One row of `sources` made them wait for
/// each other's commits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn s3_waiting_requests_share_a_commit() {
    let server = Arc::new(Postgres::start_durable());
    server.execute_as("postgres", "postgres", "CREATE ROLE daemon LOGIN");
    let slow = format!("ALTER DATABASE {} SET commit_delay = 5000", pg::DATABASE);
    server.execute_as("postgres", "postgres", &slow);
    let siblings = format!("ALTER DATABASE {} SET commit_siblings = 0", pg::DATABASE);
    server.execute_as("postgres", "postgres", &siblings);
    let ledger = ledger(&server).await;
    let take = async |row| {
        let arrival = arrival(vec![receipt(1, row, 1, MessageState::Delivered)]);
        assert_eq!(ledger.take(arrival).await.unwrap().new, 1);
    };
    take(1_000_000).await;
    let alone = tokio::time::Instant::now();
    for row in 0..100 {
        take(row).await;
    }
    let alone = 100.0 / alone.elapsed().as_secs_f64();
    let together = tokio::time::Instant::now();
    let senders = (1..=32).map(async |sender| {
        for number in 0..50 {
            take(sender * 1000 + number).await;
        }
    });
    futures_util::future::join_all(senders).await;
    let together = 1600.0 / together.elapsed().as_secs_f64();
    println!("one at a time {alone:.0}/s, 32 at once {together:.0}/s");
    assert!(together > 5.0 * alone, "{together:.0}/s of 32 at once, {alone:.0}/s one at a time");
    assert_eq!(ledger.waiting().await, Ok(1701));
}

/// A mapping gives every receipt the same `event_id`: each arrival finds thousands of its id.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f51_thousands_of_receipts_with_one_id_cost_no_more_than_others() {
    let server = server();
    let ledger = ledger(&server).await;
    let same = |row| {
        let receipt = receipt(1, row, 1, MessageState::Delivered);
        Receipt { event: EventId::named("s", "the same").saying(&receipt), ..receipt }
    };
    let take =
        async |rows: std::ops::Range<u64>| ledger.take(arrival(rows.map(same).collect())).await.unwrap();
    let taken = |new, known, reused_ids| Taken { new, known, reused_ids, rejected: 0 };
    for part in 0..4 {
        let reused = if part == 0 { 3_999 } else { 4_000 };
        assert_eq!(take(part * 4_000..(part + 1) * 4_000).await, taken(4_000, 0, reused), "part {part}");
    }
    assert_eq!(take(14_000..18_000).await, taken(2_000, 2_000, 2_000));
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
            PostgresLedger::open(settings(&server), Arc::new(())).await.unwrap()
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
    figure(
        "4 orders of 5,940 receipts, each 3 times, a third before its message, 30 messages unknown: the same 300 rows",
    );
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
    figure(format!("65,536 receipts at once: {transactions} transactions, all taken once, again: none"));
}
