//! What is the embedded store's own; what every store must do is in `tests/conformance_store.rs`.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    sync::Arc,
};

use postrider_actors::{
    model::{
        batch::PayloadWriter,
        file::{FileRecord, FileState},
        lease::OpenMessage,
        outcome::{DeathCause, Verdict},
        time::{MonoMs, UnixMs},
    },
    ports::{LeaseRequest, Ledger, Outbox, Queue, Settled, Settlement, Want},
    testing::fixtures,
};
use rusqlite::Connection;

use super::*;
use postrider_actors::ports::console::{DeadFilter, Operate as _};

const NOW: UnixMs = UnixMs(1_000_000);

fn open(dir: &Path) -> EmbeddedStore {
    EmbeddedStore::open(dir, Arc::new(|error| panic!("fatal: {error}"))).unwrap()
}

async fn lease(store: &EmbeddedStore) -> Vec<Lease> {
    lease_at(store, NOW).await
}

async fn lease_at(store: &EmbeddedStore, now: UnixMs) -> Vec<Lease> {
    store.lease(request(now)).await.unwrap()
}

fn request(now: UnixMs) -> LeaseRequest {
    let wants = vec![Want::new("d", usize::MAX, 10)];
    LeaseRequest { holder: "w".into(), wants, until: MonoMs(9_999), now, born: UnixMs(0) }
}

/// The first attempts of messages, by index.
fn settlement(lease: &Lease, verdicts: &[(u32, Verdict)]) -> Settlement {
    let open = |index| lease.open.iter().find(|open| open.index == index).expect("the message is open");
    Settlement {
        token: lease.token,
        verdicts: verdicts.iter().map(|&(index, verdict)| open(index).verdict(verdict)).collect(),
        details: BTreeMap::new(),
        records: Vec::new(),
        ends: false,
        begins: None,
    }
}

fn dead() -> Verdict {
    Verdict::Dead { attempt: fixtures::failed(NOW), cause: DeathCause::Permanent }
}

fn count(dir: &Path, sql: &str) -> i64 {
    Connection::open(dir.join(DATABASE)).unwrap().query_row(sql, [], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn a_batch_goes_its_way_and_everything_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let file = fixtures::file("f", 1, &["d"]);
    let later = UnixMs(NOW.0 + 5_000);
    {
        let store = open(dir.path());
        let mut step = fixtures::step_without(&file, 1..=10, &[3], &[4], NOW);
        step.state = FileState::Ingested;
        store.append(step).await.unwrap();
        assert_eq!(store.depth().await.unwrap(), 8);
        let leases = lease(&store).await;
        let verdicts = [
            (0, Verdict::Sent { at: NOW, status: 200 }),
            (1, dead()),
            (2, Verdict::Retry { attempt: fixtures::failed(NOW), not_before: later }),
        ];
        let settled = store.settle(vec![settlement(&leases[0], &verdicts)]).await.unwrap();
        assert_eq!(settled, [Settled::Open]);
    }
    let store = open(dir.path());
    assert_eq!(store.losses(), 1, "the lease that was held when the process ended");
    assert_eq!(store.depth().await.unwrap(), 6);
    let report = store.report(file.id).await.unwrap().unwrap();
    let counts = report.destinations["d"];
    assert_eq!((counts.accepted, counts.sent, counts.dead, counts.retrying), (8, 1, 1, 1));
    assert!(report.is_balanced() && !report.is_settled());
    let leases = lease(&store).await;
    let [lease] = &leases[..] else { panic!("{leases:?}") };
    assert_eq!((lease.token.fence, lease.losses, lease.count), (2, 1, 8));
    let open = |index, tries, not_before| OpenMessage { not_before, index, drive: 0, tries };
    assert_eq!(lease.open[..2], [open(2, 1, later), open(3, 0, NOW)]);
    assert_eq!(lease.open.len(), 6);
}

#[tokio::test]
async fn a_settled_batch_is_in_no_index_of_what_is_to_be_done() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.append(fixtures::step(&fixtures::file("f", 1, &["d"]), 1..=2, NOW)).await.unwrap();
    // How many entries an index has: a query that only it can answer counts them.
    let entries = || {
        ["waiting WHERE due IS NOT NULL AND holder IS NULL", "leased WHERE holder IS NOT NULL"].map(|index| {
            count(dir.path(), &format!("SELECT count(*) FROM batches INDEXED BY batches_{index}"))
        })
    };
    assert_eq!(entries(), [1, 0]);
    let leases = lease(&store).await;
    assert_eq!(entries(), [0, 1]);
    let sent = Verdict::Sent { at: NOW, status: 200 };
    let settled = store.settle(vec![settlement(&leases[0], &[(0, sent), (1, sent)])]).await;
    assert_eq!(settled, Ok(vec![Settled::Complete]));
    assert_eq!(entries(), [0, 0]);
}

/// More files than one call looks at.
#[tokio::test]
async fn b11_of_very_many_files_the_new_one_goes_ahead_and_each_has_its_turn() {
    const FILES: u16 = 700;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let file = |number: u16| {
        let [high, low] = number.to_be_bytes();
        let id = FileId([high, low, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        Arc::new(FileRecord { id, ..(*fixtures::file("f", 1, &["d"])).clone() })
    };
    for number in 0..FILES {
        store.append(fixtures::step(&file(number), 1..=1, NOW)).await.unwrap();
    }
    let of = async |batches| -> Vec<FileId> {
        let wants = vec![Want::new("d", usize::MAX, batches)];
        let leases = store.lease(LeaseRequest { wants, ..request(NOW) }).await.unwrap();
        leases.iter().map(|lease| lease.header.file).collect()
    };
    assert_eq!(of(10).await.len(), 10);
    store.append(fixtures::step(&file(FILES), 1..=1, NOW)).await.unwrap();
    let mut seen = of(200).await;
    assert!(seen.contains(&file(FILES).id), "it was seen at once");
    while seen.len() <= usize::from(FILES) - 10 {
        let some = of(200).await;
        assert!(!some.is_empty(), "{} of {FILES}", seen.len());
        seen.extend(some);
    }
    assert!(of(9).await.is_empty());
    assert_eq!(seen.iter().collect::<HashSet<_>>().len(), usize::from(FILES) - 9);
}

#[test]
fn what_is_asked_all_the_time_sorts_nothing_and_counts_in_the_index() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let connection = open::open(dir.path(), Access::Read).unwrap();
    let plan = |sql: &str| -> String {
        let mut explain = connection.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        let parameters = explain.parameter_count();
        let steps =
            explain.query_map(rusqlite::params_from_iter((0..parameters).map(|_| 1)), |row| row.get(3));
        steps.unwrap().collect::<Result<Vec<String>, _>>().unwrap().join("; ")
    };
    for (sql, by) in [
        (leases::RETRIES_DUE, "batches_waiting (destination=? AND retry=? AND holder=? AND place<?)"),
        (leases::NEXT_FILE, "batches_waiting (destination=? AND retry=? AND holder=? AND place>?)"),
        (leases::FRESH_DUE, "batches_waiting (destination=? AND retry=? AND holder=? AND place=? AND "),
        (
            leases::FRESH_DUE_BEFORE,
            "batches_by_row (file=? AND destination=? AND first_row>? AND first_row<?)",
        ),
    ] {
        let plan = plan(sql);
        assert!(plan.contains(by), "{plan}");
        assert!(!plan.contains("TEMP B-TREE"), "{plan}");
    }
    // Within a file, what was never tried is sorted by its rows: file by file, so that it ends when there is enough.
    let of_order = plan(leases::OLDEST);
    let by = "batches_waiting (destination=? AND retry=? AND holder=?)";
    assert_eq!(of_order.matches(by).count(), 2, "{of_order}");
    assert!(of_order.contains("USE TEMP B-TREE FOR LAST TERM OF ORDER BY"), "{of_order}");
    let plan = plan(backlog::COUNT_WAITING);
    assert!(plan.contains("COVERING INDEX batches_waiting"), "{plan}");
}

#[tokio::test]
async fn a_lease_call_copies_so_much_and_one_batch_whatever_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let file = fixtures::file("f", 1, &["d"]);
    for row in 1..=4 {
        let mut step = fixtures::step(&file, row..=row, NOW);
        let mut payload = PayloadWriter::default();
        let mebibytes = if row == 1 { 9 } else { 5 };
        payload.push(row, &vec![b'x'; mebibytes * 1024 * 1024]);
        step.batches[0].payload = payload.finish();
        store.append(step).await.unwrap();
    }
    for batches in [1, 2, 1, 0] {
        assert_eq!(lease(&store).await.len(), batches);
    }
}

#[tokio::test]
async fn a_redrive_leaves_a_lease_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    // Rows 1, 3 and 4: what is redriven is found by its row.
    store
        .append(fixtures::step_without(&fixtures::file("f", 1, &["d"]), 1..=4, &[2], &[], NOW))
        .await
        .unwrap();
    let held = lease(&store).await.pop().unwrap();
    store.settle(vec![settlement(&held, &[(1, dead()), (2, dead())])]).await.unwrap();
    let later = UnixMs(NOW.0 + 100);
    let mut operator = Operator::open(dir.path()).unwrap();
    assert_eq!(operator.redrive(&DeadFilter::default(), 1, later), Ok(1));
    // B6: the holder continues under its fence, and what it says of the message now is of an old drive.
    let sent = Verdict::Sent { at: NOW, status: 200 };
    let settlements = vec![settlement(&held, &[(0, sent), (1, dead())])];
    assert_eq!(store.settle(settlements).await, Ok(vec![Settled::Open]));
    assert_eq!((store.depth().await, count(dir.path(), "SELECT row FROM dead")), (Ok(1), 4));
    store.release(&[held.token], Release::Unused).await.unwrap();
    assert!(lease(&store).await.is_empty());
    let again = lease_at(&store, later).await.pop().unwrap();
    assert_eq!(again.open, [OpenMessage { not_before: later, index: 1, drive: 1, tries: 0 }]);
    assert_eq!(again.since(1), later);
}

#[tokio::test]
async fn an_archived_payload_is_gone_and_its_number_is_not_given_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (before, after) = (NOW, UnixMs(NOW.0 + 1));
    let sent = Verdict::Sent { at: NOW, status: 200 };
    for content in 1..=2 {
        store.append(fixtures::step(&fixtures::file("f", content, &["d"]), 1..=2, NOW)).await.unwrap();
        let held = lease(&store).await.pop().unwrap();
        assert_eq!(store.archive(after, 9).await, Ok(0), "it is not settled");
        store.settle(vec![settlement(&held, &[(0, sent), (1, dead())])]).await.unwrap();
        assert_eq!(store.archive(after, 9).await, Ok(0), "a redrive would need it");
        let mut operator = Operator::open(dir.path()).unwrap();
        assert_eq!(operator.redrive(&DeadFilter::default(), 9, NOW), Ok(1));
        let held = lease(&store).await.pop().unwrap();
        store.settle(vec![settlement(&held, &[(1, sent)])]).await.unwrap();
        assert_eq!(store.archive(before, 9).await, Ok(0), "it is too young");
        assert_eq!(count(dir.path(), "SELECT seq FROM payloads"), i64::from(content));
        assert_eq!(store.archive(after, 9).await, Ok(1));
        assert_eq!(count(dir.path(), "SELECT count(*) FROM payloads"), 0);
    }
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
fn f16_a_newer_schema_and_a_foreign_database_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let path = dir.path().join(DATABASE);
    let set = |pragma: &str, value: i32| {
        Connection::open(&path).unwrap().pragma_update(None, pragma, value).unwrap();
    };
    set("user_version", SCHEMA_VERSION + 1);
    let error = EmbeddedStore::open(dir.path(), exit_on_fatal(|| {})).err().unwrap();
    assert!(matches!(error, OpenError::Newer { found, .. } if found == SCHEMA_VERSION + 1), "{error}");
    set("user_version", SCHEMA_VERSION);
    set("application_id", 7);
    let error = EmbeddedStore::open(dir.path(), exit_on_fatal(|| {})).err().unwrap();
    assert!(matches!(error, OpenError::Foreign { found: 7, .. }), "{error}");
}

#[test]
fn a_reader_makes_no_store() {
    let dir = tempfile::tempdir().unwrap();
    let error = open::open(dir.path(), Access::Read).err().unwrap();
    assert!(matches!(error, OpenError::Missing(_)), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn f06_a_lease_outlives_its_deadline_while_its_worker_lives() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.append(fixtures::step(&fixtures::file("f", 1, &["d"]), 1..=2, NOW)).await.unwrap();
    let holder: Arc<str> = "w".into();
    let request = |holder: &Arc<str>| LeaseRequest { holder: holder.clone(), ..request(NOW) };
    let leased = store.lease(request(&holder)).await.unwrap();
    assert_eq!(leased.len(), 1);
    let late = MonoMs(1_000_000);
    assert_eq!(store.rescue(late).await, Ok(0), "the worker could not extend it, and still works on it");
    assert_eq!(store.lease(request(&"other".into())).await.unwrap(), []);
    let extended = store.extend(&[leased[0].token], late).await.unwrap();
    assert_eq!(extended, [(leased[0].token.batch, ItemOutcome::Ok)]);
    drop(holder);
    assert_eq!(store.rescue(MonoMs(late.0 + 1)).await, Ok(1), "it is gone");
}

#[tokio::test]
async fn f61_what_is_damaged_is_set_aside_and_the_rest_is_leased() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open(dir.path());
        for file in 1..=4 {
            let file = fixtures::file("f", file, &["d"]);
            store.append(fixtures::step(&file, 1..=10, NOW)).await.unwrap();
        }
        let leases = lease(&store).await;
        assert_eq!(leases.len(), 4);
        let retry = Verdict::Retry { attempt: fixtures::failed(NOW), not_before: NOW };
        for lease in &leases {
            store.settle(vec![Settlement { ends: true, ..settlement(lease, &[(0, retry)]) }]).await.unwrap();
        }
    }
    let damage = Connection::open(dir.path().join(DATABASE)).unwrap();
    for sql in [
        "UPDATE payloads SET body = zeroblob(length(body)) WHERE seq = (SELECT min(seq) FROM payloads)",
        "UPDATE headers SET json = replace(json, 'd', 'e') WHERE seq = (SELECT min(seq) + 1 FROM headers)",
        "UPDATE results SET sum = sum + 1 WHERE batch = (SELECT min(batch) + 2 FROM results)",
    ] {
        assert_eq!(damage.execute(sql, []).unwrap(), 1, "{sql}");
    }
    for _ in 0..2 {
        let store = open(dir.path());
        let leased = lease(&store).await;
        assert_eq!(leased.len(), 1, "the fourth");
        assert_eq!(store.backlog(NOW).await.unwrap().quarantined, 3);
        assert_eq!(lease(&store).await, []);
        // Nor does anything else stop for them.
        assert_eq!(store.archive(UnixMs(u64::MAX), 10).await, Ok(0));
        assert_eq!(store.depth().await, Ok(40));
        store.release(&[leased[0].token], Release::Unused).await.unwrap();
    }
    let why = count(dir.path(), "SELECT count(DISTINCT quarantined) FROM batches WHERE due IS NULL");
    assert_eq!(why, 3, "each for its own reason");
    // A lease of a batch whose record is damaged meanwhile keeps no store from opening.
    {
        let store = open(dir.path());
        assert_eq!(lease(&store).await.len(), 1);
        damage.execute("UPDATE results SET body = x'ff'", []).unwrap();
    }
    let store = open(dir.path());
    assert_eq!(lease(&store).await, []);
    assert_eq!(store.backlog(NOW).await.unwrap().quarantined, 4);
}

/// `POSTRIDER_ROWS=1000000` for all of what is asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_of_very_many_lets_the_daemon_commit_within_200_ms() {
    let rows: u64 = std::env::var("POSTRIDER_ROWS").map_or(50_000, |rows| rows.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let file = fixtures::file("f", 1, &["d"]);
    for first in (1..=rows).step_by(1_000) {
        store.append(fixtures::step(&file, first..=first + 999, NOW)).await.unwrap();
        for lease in lease(&store).await {
            let verdicts: Vec<_> = (0..lease.count).map(|index| (index, dead())).collect();
            store.settle(vec![settlement(&lease, &verdicts)]).await.unwrap();
        }
    }
    let path = dir.path().to_owned();
    let redrive = std::thread::spawn(move || {
        let begun = tokio::time::Instant::now();
        let redriven = Operator::open(&path).unwrap().redrive(&DeadFilter::default(), usize::MAX, NOW);
        (redriven, begun.elapsed())
    });
    let (mut commits, mut longest) = (0, std::time::Duration::ZERO);
    let other = fixtures::file("f", 2, &["e"]);
    while !redrive.is_finished() {
        commits += 1;
        let begun = tokio::time::Instant::now();
        store.append(fixtures::step(&other, commits..=commits, NOW)).await.unwrap();
        longest = longest.max(begun.elapsed());
    }
    let (redriven, took) = redrive.join().unwrap();
    assert_eq!(redriven, Ok(rows as usize));
    assert_eq!(count(dir.path(), "SELECT count(*) FROM dead"), 0);
    assert_eq!(count(dir.path(), "SELECT sum(retrying) FROM file_destinations"), rows.cast_signed());
    let said = format!(
        "{rows} redriven in {took:?}; {commits} commits of the daemon meanwhile, the longest {longest:?}"
    );
    println!("{said}");
    assert!(longest < std::time::Duration::from_millis(200), "{said}");
    postrider_actors::testing::figure(said);
}
