//! What is the embedded store's own; what every store must do is in `tests/conformance_store.rs`.

use std::{
    fs,
    io::{Read, Seek, SeekFrom, Write},
    sync::{Arc, Mutex},
};

use postrider_actors::{
    model::{
        file::FileState,
        outcome::{DeathCause, Verdict},
        time::{MonoMs, UnixMs},
    },
    ports::{
        Claim, ClaimRequest, Claims, Dispatch, LeaseRequest, Ledger, Outbox, OutboxArchive, OutstandingQuery,
        PageQuery, Queue, Settled, Settlement,
    },
    testing::fixtures,
};
use rusqlite::Connection;

use super::*;

const NOW: UnixMs = UnixMs(1_000_000);

fn open(dir: &Path) -> EmbeddedStore {
    EmbeddedStore::open(dir, Arc::new(|error| panic!("fatal: {error}"))).unwrap()
}

async fn lease(store: &EmbeddedStore) -> Vec<Lease> {
    let wants = vec![("d".into(), 10)];
    store.lease(LeaseRequest { holder: "w".into(), wants, until: MonoMs(9_999) }).await.unwrap()
}

async fn dispatch(store: &EmbeddedStore) {
    let entries = store
        .outstanding(OutstandingQuery {
            due_by: UnixMs(u64::MAX),
            limit: 100,
            with_batches: false,
            except: &[],
        })
        .await
        .unwrap();
    store.send(&entries).await.unwrap();
}

#[tokio::test]
async fn a_batch_goes_its_way_and_everything_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let file = fixtures::file("f", 1, &["d"]);
    {
        let store = open(dir.path());
        let mut step = fixtures::step_without(&file, 1..=10, &[3], &[4], NOW);
        step.state = FileState::Ingested;
        store.append(step).await.unwrap();
        assert_eq!(store.depth().await.unwrap(), 8);
        dispatch(&store).await;
        let leases = lease(&store).await;
        let attempt = fixtures::failed(NOW);
        let settled = store
            .settle(vec![Settlement {
                token: leases[0].token,
                verdicts: vec![
                    (0, Verdict::Sent { at: NOW, status: 200 }),
                    (1, Verdict::Dead { attempt, cause: DeathCause::Permanent }),
                    (2, Verdict::Retry { attempt, not_before: NOW }),
                ],
                retries: vec![fixtures::retry(&leases[0], &[2], attempt, NOW)],
                records: Vec::new(),
            }])
            .await
            .unwrap();
        assert_eq!(settled, [Settled::Open]);
    }
    let store = open(dir.path());
    assert_eq!(store.losses(), 1, "the lease that was held when the process ended");
    assert_eq!(store.depth().await.unwrap(), 6);
    let report = store.report(file.id).await.unwrap().unwrap();
    let counts = report.destinations["d"];
    assert_eq!((counts.accepted, counts.sent, counts.dead, counts.retrying), (8, 1, 1, 1));
    assert!(report.is_balanced() && !report.is_settled());
    dispatch(&store).await;
    let leases = lease(&store).await;
    assert_eq!(leases.len(), 2);
    let lost = leases.iter().find(|lease| lease.attempt == 0).unwrap();
    assert_eq!((lost.losses, lost.states.unsettled().count()), (1, 5));
    let retry = leases.iter().find(|lease| lease.attempt == 1).unwrap();
    assert_eq!(retry.history, [[fixtures::failed(NOW)]]);
    assert_eq!((retry.root, retry.losses), (lost.token.batch, 0));
}

#[tokio::test]
async fn a_clean_end_leaves_an_empty_log() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.append(fixtures::step(&fixtures::file("f", 1, &["d"]), 1..=10, NOW)).await.unwrap();
    assert!(dir.path().join("postrider.db-wal").metadata().unwrap().len() > 0);
    drop(store);
    assert!(!dir.path().join("postrider.db-wal").exists());
}

#[tokio::test]
async fn batches_of_the_same_rows_share_one_payload() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.append(fixtures::step(&fixtures::file("f", 1, &["a", "b", "c"]), 1..=10, NOW)).await.unwrap();
    drop(store);
    let connection = Connection::open(dir.path().join(DATABASE)).unwrap();
    let counts: (i64, i64) = connection
        .query_row("SELECT (SELECT count(*) FROM batches), (SELECT count(*) FROM payloads)", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .unwrap();
    assert_eq!(counts, (3, 1));
}

#[tokio::test]
async fn one_refused_write_does_not_take_its_group_along() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let good: Vec<_> = (1..20).map(|content| fixtures::file("f", content, &["d"])).collect();
    let mut bad = fixtures::step(&fixtures::file("f", 0, &["d"]), 1..=3, NOW);
    bad.checkpoint.rows = 4;
    let appends = good.iter().map(|file| store.append(fixtures::step(file, 1..=3, NOW)));
    let (done, refused) = tokio::join!(futures_util::future::join_all(appends), store.append(bad));
    assert!(done.into_iter().all(|done| done.is_ok()));
    assert!(matches!(refused, Err(StoreError::Permanent(_))), "{refused:?}");
    assert_eq!(store.depth().await.unwrap(), 19 * 3);
}

#[test]
fn f15_a_corrupt_database_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let path = dir.path().join(DATABASE);
    let mut database = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    database.write_all(b"not a database at all").unwrap();
    let before = fs::read(&path).unwrap();
    let error = EmbeddedStore::open(dir.path(), exit_on_fatal()).err().unwrap();
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("restore a backup"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn f15_a_log_with_a_damaged_header_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let copy = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.append(fixtures::step(&fixtures::file("f", 1, &["d"]), 1..=10, NOW)).await.unwrap();
    for name in ["postrider.db", "postrider.db-wal"] {
        fs::copy(dir.path().join(name), copy.path().join(name)).unwrap();
    }
    drop(store);
    // As it was when the power went: recovered.
    let whole = copy.path().join("whole");
    fs::create_dir(&whole).unwrap();
    for name in ["postrider.db", "postrider.db-wal"] {
        fs::copy(copy.path().join(name), whole.join(name)).unwrap();
    }
    assert_eq!(open(&whole).depth().await.unwrap(), 10);

    let wal = copy.path().join("postrider.db-wal");
    let mut log = fs::OpenOptions::new().read(true).write(true).open(&wal).unwrap();
    let mut byte = [0];
    log.seek(SeekFrom::Start(17)).unwrap();
    log.read_exact(&mut byte).unwrap();
    log.seek(SeekFrom::Start(17)).unwrap();
    log.write_all(&[byte[0] ^ 1]).unwrap();
    let error = EmbeddedStore::open(copy.path(), exit_on_fatal()).err().unwrap();
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");

    fs::remove_file(copy.path().join(DATABASE)).unwrap();
    let error = EmbeddedStore::open(copy.path(), exit_on_fatal()).err().unwrap();
    assert!(error.to_string().contains("missing or empty"), "{error}");
    assert!(wal.exists());
}

#[test]
fn f16_a_newer_schema_and_a_foreign_database_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let path = dir.path().join(DATABASE);
    let set = |pragma: &str, value: i32| {
        Connection::open(&path).unwrap().pragma_update(None, pragma, value).unwrap();
    };
    set("user_version", SCHEMA_VERSION + 1);
    let error = EmbeddedStore::open(dir.path(), exit_on_fatal()).err().unwrap();
    assert!(matches!(error, OpenError::Newer { found, .. } if found == SCHEMA_VERSION + 1), "{error}");
    set("user_version", SCHEMA_VERSION);
    set("application_id", 7);
    let error = EmbeddedStore::open(dir.path(), exit_on_fatal()).err().unwrap();
    assert!(matches!(error, OpenError::Foreign { found: 7, .. }), "{error}");
}

#[tokio::test]
async fn what_was_claimed_when_the_process_ended_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let step = fixtures::step(&fixtures::file("f", 1, &["d"]), 1..=10, NOW);
    let id = step.batches[0].id;
    let claim = |holder: &str| ClaimRequest {
        holder: holder.into(),
        batches: vec![id],
        until: UnixMs(NOW.0 + 60_000),
        now: NOW,
    };
    {
        let store = open(dir.path());
        store.append(step).await.unwrap();
        let claimed = store.claim(claim("here-1/w#1")).await.unwrap();
        assert!(matches!(claimed[0].1, Claim::Granted { fence: 1, losses: 0, .. }), "{claimed:?}");
        assert_eq!(store.rescue(MonoMs(u64::MAX)).await, Ok(0), "its deadline is by another clock");
    }
    let store = open(dir.path());
    assert_eq!(store.losses(), 1);
    // Even where the name does not say that the process is a later one.
    let claimed = store.claim(claim("elsewhere-1/w#1")).await.unwrap();
    assert!(matches!(claimed[0].1, Claim::Granted { fence: 2, losses: 1, .. }), "{claimed:?}");
}

#[tokio::test]
async fn f16_a_store_of_schema_1_is_brought_up_to_date_with_what_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let connection = Connection::open(dir.path().join(DATABASE)).unwrap();
    connection.execute_batch(include_str!("schema_1.sql")).unwrap();
    connection
        .execute_batch(
            "INSERT INTO destinations (seq, name) VALUES (1, 'd');
             INSERT INTO files VALUES (1, x'01010101010101010101010101010101', 'f', 'a', 1, '', 1, 1, NULL, 9, 2, 0, 0, 1,
                 NULL, 0);
             INSERT INTO file_destinations VALUES (1, 1, 0, 2, 0, 0, 0);
             UPDATE counters SET depth = 2;
             INSERT INTO headers VALUES (1, 1, 1, '{\"feed\":\"f\",\"destination\":\"d\",\"file\":\"01010101010101010101010101010101\",\"layout\":{\"kind\":\"lines\"},\"template\":null,\"content_type\":\"text/plain\"}');
             INSERT INTO payloads VALUES (1, x'01010161010162', NULL);
             INSERT INTO batches (id, file, destination, header, payload, first_row, count, drive, attempt,
                 accepted_at, not_before, phase, unsettled)
             VALUES (x'02020202020202020202020202020202', 1, 1, 1, 1, 1, 2, 0, 0, 1, 1, 1, 2);
             PRAGMA application_id = 0x50747264;
             PRAGMA user_version = 1;",
        )
        .unwrap();
    drop(connection);
    let store = open(dir.path());
    assert_eq!(schema_version(dir.path()).unwrap(), SCHEMA_VERSION);
    let query = PageQuery { dispatch: Dispatch::Dispatched, destination: None, limit: 9, cursor: None };
    let page = store.page(query).await.unwrap();
    assert_eq!(page.entries.iter().map(|entry| entry.id).collect::<Vec<_>>(), [BatchId([2; 16])]);
    let leased = lease(&store).await.pop().unwrap();
    let verdicts = (0..2).map(|index| (index, Verdict::Sent { at: NOW, status: 200 })).collect();
    let settlement = Settlement { token: leased.token, verdicts, retries: Vec::new(), records: Vec::new() };
    assert_eq!(store.settle(vec![settlement]).await, Ok(vec![Settled::Complete]));
    assert_eq!(store.archive(NOW, 9).await, Ok(1));
}

#[test]
fn a_reader_makes_no_store() {
    let dir = tempfile::tempdir().unwrap();
    let error = open::open(dir.path(), Access::Read).err().unwrap();
    assert!(matches!(error, OpenError::Missing(_)), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn damage_met_at_work_is_fatal_and_nothing_is_acknowledged_after_it() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let path = dir.path().join(DATABASE);
    // Everything but the header and the schema: found only when it is used.
    let len = fs::metadata(&path).unwrap().len();
    let mut database = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let connection = Connection::open(&path).unwrap();
    let root: u64 = connection
        .query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'files'", [], |row| row.get::<_, i64>(0))
        .unwrap() as u64;
    let page: u64 =
        connection.pragma_query_value(None, "page_size", |row| row.get::<_, i64>(0)).unwrap() as u64;
    drop(connection);
    assert!(root * page <= len);
    database.seek(SeekFrom::Start((root - 1) * page)).unwrap();
    database.write_all(&vec![0xA5; page as usize]).unwrap();
    drop(database);

    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = seen.clone();
    let store = EmbeddedStore::open(
        dir.path(),
        Arc::new(move |error: &str| told.lock().unwrap().push(error.to_owned())),
    )
    .unwrap();
    let step = fixtures::step(&fixtures::file("f", 1, &["d"]), 1..=10, NOW);
    assert!(matches!(store.append(step.clone()).await, Err(StoreError::Unknown(_))));
    assert!(store.append(step).await.is_err());
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 1);
    assert!(seen[0].contains("malformed"), "{seen:?}");
}
