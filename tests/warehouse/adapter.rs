//! The adapter by itself.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use postrider_actors::{
    model::{call::FailureKind, ids::FileId, table::TableRow},
    ports::{Table, TableError},
    testing::{
        MemoryTable,
        conformance::{self, TableSubject},
    },
};
use postrider_postgres::warehouse::{CheckError, CompareLimits, Compared, compare};
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use super::*;
use crate::pg::Stop;

const PEOPLE: &str = "CREATE TABLE people (id varchar(80) PRIMARY KEY, who varchar(200), amount bigint)";

fn people() -> Mapping {
    conformance::columns()
}

fn read(server: &Postgres) -> BTreeMap<String, Option<String>> {
    let rows = server.rows("SELECT id::text, who::text FROM people");
    rows.into_iter().map(|mut row| (row[0].take().expect("a key"), row[1].take())).collect()
}

fn row(mapping: &Arc<Mapping>, values: &[Option<&str>]) -> TableRow {
    MemoryTable::row(mapping, values)
}

#[tokio::test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn s4_6_both_dialects_keep_the_contract() {
    for dialect in DIALECTS {
        let server = Arc::new(Postgres::start());
        let make = || async {
            server.execute(&format!("DROP TABLE IF EXISTS people; {PEOPLE}"));
            let (table, server) = (table(&server, dialect, "public.people", &people()), server.clone());
            table.check().await.expect("it fits");
            TableSubject {
                table,
                refused: "x".repeat(201),
                read: Box::new(move || read(&server)),
                guard: Box::new(()),
            }
        };
        conformance::tables(make).await;
    }
}

#[tokio::test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f57_any_text_round_trips_through_the_server_whatever_it_thinks_of_backslashes() {
    let server = Postgres::start();
    server.execute("CREATE TABLE people (id text PRIMARY KEY, who text, amount bigint)");
    let mut runner =
        TestRunner::new_with_rng(Config::default(), TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let strategy = r"([\\'\x01-\x1f\x7f-\xff]|\PC){0,60}";
    let mapping = Arc::new(people());
    for conforming in ["on", "off"] {
        server.execute(&format!("ALTER ROLE postrider SET standard_conforming_strings = {conforming}"));
        assert_eq!(server.value("SHOW standard_conforming_strings"), conforming);
        for dialect in DIALECTS {
            let table = table(&server, dialect, "people", &people());
            for round in 0..5 {
                server.execute("TRUNCATE people");
                let texts: Vec<String> = (0..400)
                    .map(|_| strategy.new_tree(&mut runner).expect("a regex").current().replace('\0', ""))
                    .collect();
                let id = |at: usize| format!("{at}");
                let rows: Vec<_> = texts
                    .iter()
                    .enumerate()
                    .map(|(at, text)| row(&mapping, &[Some(&id(at)), Some(text), None]))
                    .collect();
                table.insert(&rows).await.unwrap_or_else(|error| panic!("{dialect} {conforming}: {error}"));
                let read = read(&server);
                assert_eq!(read.len(), texts.len());
                for (at, text) in texts.iter().enumerate() {
                    assert_eq!(
                        read[&id(at)].as_deref(),
                        Some(text.as_str()),
                        "{dialect} {conforming} {round}"
                    );
                }
            }
        }
    }
}

#[tokio::test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn s0_3_every_type_is_stored_as_itself_and_too_long_texts_are_refused_not_cut() {
    let server = Postgres::start();
    let kinds = [
        ("t", ColumnType::Text, "varchar(5)", "abcde", "abcde"),
        ("c", ColumnType::Text, "char(3)", "ab", "ab "),
        ("i", ColumnType::Integer, "int", "-7", "-7"),
        ("n", ColumnType::Numeric, "numeric(10,2)", "12.30", "12.30"),
        ("d", ColumnType::Double, "double precision", "1e308", "1e+308"),
        ("b", ColumnType::Boolean, "boolean", "true", "true"),
        (
            "z",
            ColumnType::Timestamp,
            "timestamptz",
            "2023-11-14 22:13:20.500000+00",
            "2023-11-14 22:13:20.5+00",
        ),
        ("l", ColumnType::Timestamp, "timestamp", "2023-11-14 22:13:20.500000+00", "2023-11-14 22:13:20.5"),
        ("y", ColumnType::Date, "date", "2024-02-29", "2024-02-29"),
        ("j", ColumnType::Json, "text", "{\"a\": [1]}", "{\"a\": [1]}"),
    ];
    let mut columns = vec![key()];
    columns.extend(kinds.iter().map(|(name, kind, ..)| field(name, *kind)));
    let mapping = Arc::new(Mapping { columns });
    let definitions: Vec<_> = kinds.iter().map(|(name, _, sql, ..)| format!("{name} {sql}")).collect();
    for dialect in DIALECTS {
        let sql = definitions.join(", ");
        server
            .execute(&format!("DROP TABLE IF EXISTS kinds; CREATE TABLE kinds (id text PRIMARY KEY, {sql})"));
        let table = table(&server, dialect, "kinds", &mapping);
        table.check().await.unwrap_or_else(|error| panic!("{dialect}: {error}"));
        let with = |at: usize, id: &str, value: &str| {
            let mut values = vec![Some(id.to_owned())];
            values.extend(kinds.iter().map(|(.., value, _)| Some((*value).to_owned())));
            if at > 0 {
                values[at] = Some(value.to_owned());
            }
            let values: Vec<_> = values.iter().map(Option::as_deref).collect();
            row(&mapping, &values)
        };
        table.insert(&[with(0, "a", "")]).await.unwrap_or_else(|error| panic!("{dialect}: {error}"));
        for (name, _, sql, _, stored) in &kinds {
            let query = format!("SELECT (({name})::text = ('{stored}'::{sql})::text)::text FROM kinds");
            assert_eq!(server.value(&query), "true", "{dialect} {name}");
        }
        for (at, value, code) in
            [(1, "abcdef", "22001"), (3, "2147483648", "22003"), (4, "123456789.00", "22003")]
        {
            let refused = table.insert(&[with(at, "b", value)]).await.unwrap_err();
            assert!(
                matches!(&refused, TableError::Refused(refusal) if refusal.words.contains(code)),
                "{dialect}: {refused:?}"
            );
        }
        assert_eq!(server.value("SELECT count(*)::text FROM kinds"), "1", "nothing was cut to fit");
    }
}

#[tokio::test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn f57_hostile_names_are_refused_before_anything_is_sent() {
    let server = Postgres::start();
    server.execute("CREATE TABLE victim (id text PRIMARY KEY)");
    let warehouse = Warehouse::new(settings(server.url(), Dialect::Redshift), Arc::new(())).unwrap();
    let hostile = "id\"; DROP TABLE victim; --";
    for name in [hostile, "public.people; DROP TABLE victim", "a.b.c", ""] {
        let settings = TableSettings { table: name.into(), mapping: people() };
        let error = warehouse.table(&settings).unwrap_err().to_string();
        assert!(error.contains("`table`"), "{error}");
    }
    let columns = vec![key(), field(hostile, ColumnType::Text)];
    let mapping = Mapping { columns };
    let settings = TableSettings { table: "victim".into(), mapping: mapping.clone() };
    assert!(warehouse.table(&settings).unwrap_err().to_string().contains("`columns`"));
    // Not even by a batch that was accepted with such a mapping.
    for dialect in DIALECTS {
        let table = table(&server, dialect, "victim", &Mapping { columns: vec![key()] });
        let rows = [row(&Arc::new(mapping.clone()), &[Some("a"), None])];
        assert!(matches!(table.insert(&rows).await, Err(TableError::Refused(_))));
    }
    assert_eq!(server.value("SELECT count(*)::text FROM victim"), "0");
}

fn problems(checked: Result<(), CheckError>) -> Vec<String> {
    match checked {
        Ok(()) => Vec::new(),
        Err(CheckError::Unfit(problems)) => problems,
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn check_says_what_to_fix_and_a_role_with_those_rights_alone_can_write() {
    let server = Postgres::start();
    let columns = vec![key(), field("n", ColumnType::Integer), field("t", ColumnType::Timestamp)];
    let mapping = Mapping { columns };
    for (dialect, role) in [(Dialect::Postgres, "poor_pg"), (Dialect::Redshift, "poor_rs")] {
        server.execute("DROP SCHEMA IF EXISTS sales CASCADE; CREATE SCHEMA sales");
        server.execute_as("postgres", "postgres", &format!("CREATE ROLE {role} LOGIN"));
        server.execute(&format!("GRANT USAGE ON SCHEMA sales TO {role}"));
        server.execute("REVOKE TEMP ON DATABASE postrider FROM PUBLIC");
        let url = server.url_of(role, "postrider");
        let warehouse = Warehouse::new(settings(url, dialect), Arc::new(())).unwrap();
        let settings = TableSettings { table: "sales.orders".into(), mapping: mapping.clone() };
        let table = warehouse.table(&settings).unwrap();
        let found = problems(table.check().await);
        assert!(found.len() == 1 && found[0].contains("no table"), "{found:?}");
        server.execute(&format!(
            "CREATE TABLE sales.orders (id text NOT NULL, n text, must int NOT NULL, at timestamptz DEFAULT now()); \
             GRANT INSERT, SELECT, UPDATE ON sales.orders TO {role}"
        ));
        let found = problems(table.check().await);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].contains("\"n\" of type text") && found[0].contains("bigint"), "{found:?}");
        assert!(found[1].contains("no column \"t\"") && found[2].contains("\"must\""), "{found:?}");
        server.execute(&format!(
            "ALTER TABLE sales.orders DROP n, DROP must, ADD n int, ADD t timestamp; \
             REVOKE ALL ON sales.orders FROM {role}"
        ));
        if dialect == Dialect::Redshift {
            // Its catalogue shows only what the role has a right to.
            server.execute(&format!("GRANT SELECT ON sales.orders TO {role}"));
        }
        let found = problems(table.check().await);
        assert_eq!(found.len(), 3, "{found:?}");
        let rows = [row(&Arc::new(mapping.clone()), &[Some("a"), Some("1"), Some("2023-11-14 22:13:20+00")])];
        let refused = table.insert(&rows).await;
        assert!(
            matches!(&refused, Err(TableError::Refused(refusal)) if refusal.kind != FailureKind::Invalid),
            "an operator can fix it: {refused:?}"
        );
        // The advice is followed, word by word.
        for problem in found {
            let at = problem.find("CREATE UNIQUE").or(problem.find("GRANT")).expect("it says what to do");
            let statement = problem[at..].split(" (MERGE").next().unwrap().split(" (rows").next().unwrap();
            let statement = statement.replace("ROLE", role).replace("…", "postrider");
            server.execute(&statement);
        }
        assert_eq!(problems(table.check().await), Vec::<String>::new(), "{dialect}");
        table.insert(&rows).await.unwrap_or_else(|error| panic!("{dialect}: {error}"));
        assert_eq!(server.value("SELECT count(*)::text FROM sales.orders WHERE at IS NOT NULL"), "1");
    }
}

#[tokio::test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn what_passes_or_can_be_fixed_is_retryable_and_the_connection_comes_back() {
    for dialect in DIALECTS {
        let server = Postgres::start();
        let mapping = Arc::new(people());
        let mut settings = settings(server.url(), dialect);
        settings.keys.statements = 1;
        settings.keys.statement_timeout = Duration::from_millis(1_500);
        settings.connect_timeout = Duration::from_secs(2);
        let warehouse = Warehouse::new(settings, Arc::new(())).unwrap();
        let table = warehouse.table(&TableSettings { table: "people".into(), mapping: people() }).unwrap();
        let write = async |id: &str| table.insert(&[row(&mapping, &[Some(id), Some("w"), Some("1")])]).await;
        let retryable = |answer: Result<_, TableError>, words: &str| match answer {
            Err(TableError::Retryable(why)) => assert!(why.contains(words), "{dialect}: {why}"),
            Err(TableError::Refused(refusal)) => {
                assert_ne!(refusal.kind, FailureKind::Invalid, "{dialect}");
                assert!(refusal.words.contains(words), "{dialect}: {}", refusal.words);
            }
            other => panic!("{dialect} {words}: {other:?}"),
        };
        retryable(write("a").await, "people");
        server.execute(PEOPLE);
        write("a").await.expect("the table is there now");
        // A lock that nobody gives back in time.
        let locking = format!("{}?application_name=locker", server.url());
        let (locker, connection) = tokio_postgres::connect(&locking, tokio_postgres::NoTls).await.unwrap();
        let driving = tokio::spawn(connection);
        locker.batch_execute("BEGIN; LOCK TABLE people IN ACCESS EXCLUSIVE MODE").await.unwrap();
        retryable(write("b").await, "57014");
        locker.batch_execute("ROLLBACK").await.unwrap();
        write("b").await.expect("the lock is gone");
        driving.abort();
        // An administrator ends the session, then the server.
        let kill = "SELECT count(pg_terminate_backend(pid))::text FROM pg_stat_activity \
                    WHERE pid <> pg_backend_pid() AND application_name = 'postrider'";
        assert_eq!(server.value_as("postgres", "postgres", kill), "1");
        for id in ["c", "c"] {
            let _ = write(id).await; // the first may meet the dead connection
        }
        write("c").await.expect("a new connection");
        server.stop(Stop::Crash);
        retryable(write("d").await, "");
        server.resume();
        write("d").await.expect("it is up again");
        // The table changes under a prepared statement.
        server.execute("ALTER TABLE people ALTER amount TYPE numeric, ALTER who TYPE text");
        for id in ["e", "e"] {
            let _ = write(id).await;
        }
        write("e").await.expect("by a statement for what it is now");
        assert_eq!(read(&server).len(), 5);
        let idle = "SELECT count(*)::text FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
        assert_eq!(server.value(idle), "0", "{dialect}: no transaction is stuck");
    }
}

#[tokio::test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn s4_5_compare_counts_both_by_key_range() {
    let server = Postgres::start();
    let files = [FileId([1; 16]), FileId([0xab; 16]), FileId([3; 16])];
    for name in ["one", "two"] {
        server.execute(&format!("CREATE TABLE {name} (id text PRIMARY KEY, who text, amount bigint)"));
        for file in files {
            server.execute(&format!(
                "INSERT INTO {name} SELECT 'msg_{file}_' || n FROM generate_series(1, 25000) n"
            ));
        }
        server.execute(&format!("INSERT INTO {name} VALUES ('other_{name}'), ('msg_x_1')"));
    }
    // Redshift's own.
    server.execute(
        "CREATE FUNCTION strtol(text, integer) RETURNS bigint LANGUAGE sql AS          $$ SELECT CAST(CAST('x' || $1 AS bit(60)) AS bigint) $$",
    );
    let pair = [
        table(&server, Dialect::Postgres, "one", &people()),
        table(&server, Dialect::Redshift, "two", &people()),
    ];
    let limits = CompareLimits::default();
    let report = compare(&pair[0], &pair[1], Compared::Keys, limits).await.unwrap();
    assert!(report.is_equal(), "{report}");
    assert_eq!((report.files, report.primary, report.secondary), (3, 75_000, 75_000));
    server.execute(&format!(
        "DELETE FROM two WHERE id IN ('msg_{0}_1', 'msg_{0}_10000'); \
         DELETE FROM one WHERE id = 'msg_{1}_20001'; DELETE FROM two WHERE id = 'msg_{1}_20002'; \
         DELETE FROM two WHERE id LIKE 'msg_{2}_%'",
        files[0], files[1], files[2]
    ));
    let report = compare(&pair[0], &pair[1], Compared::Keys, limits).await.unwrap();
    let found: Vec<_> = report
        .differing
        .iter()
        .map(|file| {
            let ranges =
                file.ranges.iter().map(|range| (range.from, range.to, range.primary, range.secondary));
            (file.file, ranges.collect::<Vec<_>>())
        })
        .collect();
    assert_eq!(
        found,
        [
            (files[0], vec![(1, 10_000, 10_000, 9_998)]),
            (files[2], vec![(1, 10_000, 10_000, 0), (10_001, 20_000, 10_000, 0), (20_001, 30_000, 5_000, 0)]),
            (files[1], vec![(20_001, 30_000, 4_999, 4_999)]),
        ]
    );
    assert!(report.to_string().contains("different: 3 files, 74999 rows in the primary, 49997"), "{report}");
    assert!(serde_json::to_string(&report).unwrap().contains(&files[2].to_string()));
    let few = CompareLimits { files: 1, differing: 1, range_rows: 100, ranges: 1 };
    let report = compare(&pair[0], &pair[1], Compared::Keys, few).await.unwrap();
    let counted = (report.files, report.primary, report.secondary);
    assert_eq!(counted, (3, 74_999, 49_997), "page by page all are counted: {report}");
    assert_eq!((report.differing[0].ranges_more, report.differing_more), (1, 2), "{report}");
}

/// The same number of rows with the same sum of row numbers; the same keys with other values.
#[tokio::test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn s4_5_other_rows_of_equal_count_and_sum_and_other_values_are_a_difference() {
    let server = Postgres::start();
    let file = FileId([1; 16]);
    for (name, rows) in [("one", [1, 4]), ("two", [2, 3])] {
        server.execute(&format!("CREATE TABLE {name} (id text PRIMARY KEY, who text, amount bigint)"));
        for row in rows {
            server.execute(&format!("INSERT INTO {name} VALUES ('msg_{file}_{row}', 'w', 1)"));
        }
    }
    let pair = ["one", "two"].map(|name| table(&server, Dialect::Postgres, name, &people()));
    let is_equal =
        async |what| compare(&pair[0], &pair[1], what, CompareLimits::default()).await.unwrap().is_equal();
    assert!(!is_equal(Compared::Keys).await, "rows 1 and 4 are not rows 2 and 3");
    server.execute("DELETE FROM two; INSERT INTO two SELECT * FROM one");
    assert!(is_equal(Compared::Values).await);
    server.execute("UPDATE two SET amount = amount + 1");
    assert!(is_equal(Compared::Keys).await && !is_equal(Compared::Values).await);
    server.execute("UPDATE two SET amount = 1; UPDATE one SET who = NULL; UPDATE two SET who = ''");
    assert!(!is_equal(Compared::Values).await, "nothing is no empty text");
    let redshift = table(&server, Dialect::Redshift, "two", &people());
    let refused = compare(&pair[0], &redshift, Compared::Values, CompareLimits::default()).await.unwrap_err();
    assert!(refused.to_string().contains("compare the keys alone"), "{refused}");
}

#[tokio::test]
async fn i10_debug_shows_no_password() {
    let settings = settings("postgres://u:hunter2@h/d".to_owned(), Dialect::Postgres);
    let warehouse = Warehouse::new(settings.clone(), Arc::new(())).unwrap();
    assert!(!format!("{settings:?} {warehouse:?}").contains("hunter2"));
}
