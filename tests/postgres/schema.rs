//! Schema, partitions, grants, encryption, and what the read commands ask.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use postrider_actors::ports::console::receipts::{ReceiptFilter, ReceiptView as _};
use postrider_actors::{
    model::{
        ids::FileId,
        receipt::{Price, Receipt, ReceiptFacts, ReceiptKey},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::ReceiptLedger as _,
};
use postrider_postgres::ledger::{
    OpenError, PostgresLedger, PostgresSettings, PostgresView, SCHEMA_VERSION, check, grants, migrate,
};

use crate::{
    DAY_MS, NOW, arrival, drain, insist, install, ledger, open_transaction,
    pg::{self, Postgres, Stop},
    receipt, record, server, settings,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn a_schema_is_made_once_and_only_its_own_version_is_used() {
    let server = server();
    let settings = settings(&server);
    let error = PostgresLedger::open(settings.clone(), Arc::new(())).await.unwrap_err();
    assert!(
        matches!(error, OpenError::Missing { .. }) && error.to_string().contains("postrider migrate"),
        "{error}"
    );
    let owner = PostgresSettings::new(server.url().into(), pg::keys());
    let (one, two) = tokio::join!(migrate(&owner), migrate(&owner));
    let mut from = [one.unwrap(), two.unwrap()].map(|migrated| migrated.from);
    from.sort_unstable();
    assert_eq!(from, [0, SCHEMA_VERSION]);

    let error = PostgresLedger::open(settings.clone(), Arc::new(())).await.unwrap_err();
    assert!(
        matches!(error, OpenError::Privileges { .. }) && error.to_string().contains("role.sql"),
        "{error}"
    );
    server.execute(&grants("postrider", "daemon").unwrap());
    PostgresLedger::open(settings.clone(), Arc::new(())).await.unwrap();
    let checked = check(&settings).await.unwrap();
    assert_eq!((checked.role.as_str(), checked.encrypted), ("daemon", false));
    assert!(checked.warnings.iter().all(|warning| warning.contains("fsync")), "{:?}", checked.warnings);
    assert!(check(&owner).await.unwrap().warnings.iter().any(|warning| warning.contains("owns")));
    for (grant, missing) in [
        ("DELETE ON postrider.receipt_parked", "DELETE on receipt_parked"),
        ("UPDATE (last_recorded) ON postrider.partitions", "UPDATE on partitions"),
        ("EXECUTE ON FUNCTION postrider.make_partition(date)", "EXECUTE on make_partition(date)"),
    ] {
        server.execute(&format!("REVOKE {grant} FROM daemon"));
        let error = check(&settings).await.unwrap_err();
        assert!(
            matches!(error, OpenError::Privileges { .. }) && error.to_string().contains(missing),
            "{error}"
        );
        server.execute(&format!("GRANT {grant} TO daemon"));
    }

    server.execute("UPDATE postrider.meta SET version = 99");
    let error = PostgresLedger::open(settings.clone(), Arc::new(())).await.unwrap_err();
    assert!(matches!(error, OpenError::Newer { found: 99, .. }), "{error}");
    assert!(matches!(migrate(&owner).await, Err(OpenError::Newer { .. })));
    server.execute("UPDATE postrider.meta SET version = 0");
    let error = PostgresLedger::open(settings, Arc::new(())).await.unwrap_err();
    assert!(matches!(error, OpenError::Older { found: 0, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f65_a_database_that_cannot_hold_every_text_is_refused_by_name() {
    let server = server();
    for encoding in ["SQL_ASCII", "LATIN1"] {
        let database = encoding.to_lowercase();
        server.execute_as(
            "postgres",
            "postgres",
            &format!("CREATE DATABASE {database} OWNER postrider ENCODING '{encoding}' TEMPLATE template0"),
        );
        let settings = PostgresSettings::new(server.url_of(pg::OWNER, &database).into(), pg::keys());
        let refused = [
            migrate(&settings).await.map(drop).unwrap_err(),
            check(&settings).await.map(drop).unwrap_err(),
            PostgresLedger::open(settings.clone(), Arc::new(())).await.map(drop).unwrap_err(),
        ];
        for error in refused {
            let words = error.to_string();
            assert!(matches!(error, OpenError::Encoding { .. }), "{encoding}: {words}");
            for needed in [database.as_str(), encoding, "UTF8", "CREATE DATABASE"] {
                assert!(words.contains(needed), "{needed}: {words}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn the_file_of_grants_is_enough_and_gives_no_right_to_make_or_drop_tables() {
    let server = server();
    let ledger_before = PostgresSettings::new(server.url().into(), pg::keys());
    migrate(&ledger_before).await.unwrap();
    server.execute_as("postgres", "postgres", "CREATE ROLE postrider_daemon LOGIN");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/postgres/role.sql");
    server.execute(&fs::read_to_string(file).unwrap());
    let mut settings = settings(&server);
    settings.url = server.url_of("postrider_daemon", pg::DATABASE).into();
    settings.keep_changes = true;
    assert!(check(&settings).await.is_ok());
    let ledger = PostgresLedger::open(settings.clone(), Arc::new(())).await.unwrap();
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
    assert_eq!(view.orphans(&ReceiptFilter::default(), 10).await.unwrap().len(), 1);
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
        let reader = open_transaction(&server, "SELECT count(*) FROM postrider.messages").await;
        let started = tokio::time::Instant::now();
        let (retired, recorded) =
            tokio::join!(ledger.retire(before, 1000), ledger.record(vec![record(3, 50)]));
        retired.unwrap();
        recorded.unwrap();
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        assert_eq!(count(), "201");
        reader.batch_execute("COMMIT").await.unwrap();
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

/// In the order in which messages were sent, as providers report: one transaction has the receipts of all rows of a page.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn a_receipt_changes_no_index() {
    let server = server();
    let ledger = ledger(&server).await;
    let id = |row| format!("SM{:032x}", row * 0x9e37_79b9_u64);
    let record = |row| MessageRecord { provider_id: Some(id(row).into()), ..record(0, row) };
    ledger.record((1..=2000).map(record).collect()).await.unwrap();
    let receipt = |row| Receipt {
        key: ReceiptKey::Provider(id(row).into()),
        facts: ReceiptFacts {
            status: Some("DELIVERED".into()),
            carrier: Some("carrier 7".into()),
            response: Some("accepted by handset".into()),
            sent_at: Some(NOW),
            price: Some(Price(645_000)),
        },
        ..receipt(0, row, 1, MessageState::Delivered)
    };
    ledger.take(arrival((1..=2000).map(receipt).collect())).await.unwrap();
    drain(&ledger).await;
    // An update that made no index entry stays in its page and is found from the old row.
    server.execute_as("postgres", pg::DATABASE, "CREATE EXTENSION pageinspect");
    let chained = "SELECT count(*)::text \
                     FROM generate_series(0, pg_relation_size('postrider.messages_20231114') / 8192 - 1) page, \
                          heap_page_items(get_raw_page('postrider.messages_20231114', page::integer)) \
                    WHERE t_infomask2 & 32768 <> 0";
    assert_eq!(server.value_as("postgres", pg::DATABASE, chained), "2000", "heap-only tuples");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn retention_goes_by_what_was_recorded_last() {
    let server = server();
    let ledger = ledger(&server).await;
    // The second message of the file was held back for five days.
    let late = MessageRecord { at: UnixMs(NOW.0 + 5 * DAY_MS), ..record(0, 2) };
    ledger.record(vec![record(0, 1)]).await.unwrap();
    ledger.record(vec![late]).await.unwrap();
    let count = || server.value("SELECT count(*)::text FROM postrider.messages");
    for (days, left) in [(3, "2"), (5, "2"), (7, "0")] {
        while ledger.retire(UnixMs(NOW.0 + days * DAY_MS), 1000).await.unwrap() > 0 {}
        assert_eq!(count(), left, "after {days} days");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn a_file_that_another_machine_has_forgotten_is_found_again() {
    let server = server();
    let ledger = ledger(&server).await;
    let other = PostgresLedger::open(settings(&server), Arc::new(())).await.unwrap();
    ledger.record(vec![record(0, 1)]).await.unwrap();
    let later = UnixMs(NOW.0 + 9 * DAY_MS);
    let reader = open_transaction(&server, "SELECT count(*) FROM postrider.messages").await;
    // The other one forgets the file, and can't drop its partition.
    while other.retire(later, 1000).await.unwrap() > 0 {}
    assert_eq!(server.value("SELECT count(*)::text FROM postrider.files"), "0");
    assert_eq!(server.value("SELECT count(*)::text FROM postrider.messages"), "1");
    let again = MessageRecord { at: later, ..record(0, 2) };
    insist(|| ledger.record(vec![again.clone()])).await;
    reader.batch_execute("COMMIT").await.unwrap();
    while other.retire(later, 1000).await.unwrap() > 0 {}
    assert_eq!(server.value("SELECT string_agg(row::text, ' ') FROM postrider.messages"), "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn a_partition_is_not_dropped_while_a_file_may_be_in_it() {
    let server = server();
    let ledger = ledger(&server).await;
    ledger.record(vec![record(0, 1)]).await.unwrap();
    // Another machine has got as far as forgetting the file when its connection goes.
    let other = open_transaction(&server, "DELETE FROM postrider.files").await;
    assert_eq!(ledger.retire(UnixMs(NOW.0 + 9 * DAY_MS), 1000).await, Ok(0));
    other.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(server.value("SELECT count(*)::text FROM postrider.messages"), "1");
    ledger.record(vec![MessageRecord { status: 202, attempts: 2, ..record(0, 1) }]).await.unwrap();
    assert_eq!(server.value("SELECT string_agg(status::text, ' ') FROM postrider.messages"), "202");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn partitions_of_another_width_fit_between_their_neighbours() {
    let server = server();
    let ledger = ledger(&server).await;
    ledger.record(vec![record(0, 1), record(3, 1)]).await.unwrap();
    let mut owner = PostgresSettings::new(server.url().into(), pg::keys());
    owner.keys.partition_days = 30;
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

    let parked = view.parked(&ReceiptFilter::default(), 10).await.unwrap();
    assert_eq!(parked.len(), 1);
    assert_eq!(
        (&*parked[0].source, &*parked[0].destination, parked[0].state),
        ("s", "d", MessageState::Failed)
    );
    assert!(view.orphans(&ReceiptFilter::default(), 10).await.unwrap().is_empty());
    let sources = view.sources().await.unwrap();
    assert_eq!((sources[0].waiting, sources[0].parked), (0, 1));
    let words = "SELECT id || ' ' || state || ' ' || destination FROM postrider.message_words WHERE state = 'delivered'";
    assert_eq!(server.value(words), format!("msg_{}_1 delivered d", "00".repeat(16)));
}

/// A TLS server with a certificate for `localhost`; where the certificate is.
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
    let with = |ca_file: Option<PathBuf>| {
        let keys =
            postrider_settings::Postgres { tls: postrider_settings::Tls::Require, ca_file, ..pg::keys() };
        PostgresSettings { url: url.clone().into(), keys, ..settings(&server) }
    };
    // The server can't: no fallback to plain text.
    let error = PostgresLedger::open(with(None), Arc::new(())).await.unwrap_err();
    assert!(matches!(error, OpenError::Unreachable(_)), "{error}");
    let directory = encrypt(&server);
    let ours = Some(directory.path().join("ca.pem"));
    assert!(check(&with(ours.clone())).await.unwrap().encrypted);
    let ledger = PostgresLedger::open(with(ours.clone()), Arc::new(())).await.unwrap();
    ledger.record(vec![record(1, 1)]).await.unwrap();
    // A certificate that nobody vouches for, and one for another host.
    let error = PostgresLedger::open(with(None), Arc::new(())).await.unwrap_err();
    assert!(matches!(error, OpenError::Unreachable(_)), "{error}");
    let mut elsewhere = with(ours);
    elsewhere.url = server.url_of("daemon", pg::DATABASE).into();
    let error = PostgresLedger::open(elsewhere, Arc::new(())).await.unwrap_err();
    assert!(matches!(error, OpenError::Unreachable(_)), "{error}");
    let missing = with(Some("/nowhere/ca.pem".into()));
    assert!(
        PostgresLedger::open(missing, Arc::new(()))
            .await
            .unwrap_err()
            .to_string()
            .contains("/nowhere/ca.pem")
    );
}
