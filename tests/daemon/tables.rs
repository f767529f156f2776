//! Warehouse tables through the real binary: a queue into a primary and a secondary (S4).

use std::{collections::BTreeSet, fmt::Write as _, thread, time::Duration};

use postrider_actors::testing::figure;
use serde_json::Value;

use crate::{
    cloud::{Server, sdk_environment},
    ops,
    pg::{Postgres, Stop},
    support::{LIVENESS, World, inbound::Inbound, input::Input, knob, wait_until},
};

/// Rows per entry of the inbound queue.
const ENTRY_ROWS: usize = 500;

/// The table of each warehouse: the database itself refuses what is poison.
const TABLE: &str = "CREATE TABLE events (message_id text PRIMARY KEY, user_id text NOT NULL,
    amount bigint NOT NULL CONSTRAINT amounts_are_positive CHECK (amount >= 0), at timestamptz)";

impl World {
    /// A destination `name` that is the table `events` of `postgres`.
    fn add_table(&mut self, name: &str, postgres: &Postgres) -> &mut Self {
        let variable = format!("POSTRIDER_TEST_{}", name.to_uppercase());
        self.environment(&variable, &postgres.url());
        let (warehouse, destination) = (format!("warehouses.{name}"), format!("destinations.{name}"));
        self.set(&format!("{warehouse}.url"), format!("env:{variable}"))
            .set(&format!("{warehouse}.tls"), "disable")
            .set(&format!("{warehouse}.statements"), 2)
            .set(&format!("{warehouse}.statements_per_s"), 50)
            .set(&format!("{warehouse}.statement_timeout"), "10s")
            .set(&format!("{destination}.kind"), "table")
            .set(&format!("{destination}.warehouse"), name)
            .set(&format!("{destination}.table"), "events")
            .set(&format!("{destination}.retry.base"), "50ms")
            .set(&format!("{destination}.retry.cap"), "500ms")
            .set(&format!("{destination}.columns.user_id"), "recipient")
            .set(&format!("{destination}.columns.amount"), "data.amount integer required")
            .set(&format!("{destination}.columns.at"), "data.at timestamp")
    }
}

/// The entries of a queue with `rows` rows, of which `poison` are refused by the database; their users.
fn entries(rows: usize, poison: usize) -> (Vec<String>, BTreeSet<String>) {
    let every = rows / poison;
    let mut refused = BTreeSet::new();
    let numbers: Vec<_> = (0..rows).collect();
    let entries = numbers.chunks(ENTRY_ROWS).map(|chunk| {
        let mut body = String::from("[");
        for &row in chunk {
            let is_poison = row % every == every / 2;
            let amount = if is_poison { -1 } else { i64::try_from(row % 1000).expect("it is small") };
            if is_poison {
                refused.insert(format!("user-{row}"));
            }
            let comma = if body.len() > 1 { "," } else { "" };
            write!(
                body,
                "{comma}{{\"user_id\":\"user-{row}\",\"amount\":{amount},\"at\":\"2026-01-02T03:04:05Z\"}}"
            )
            .expect("strings take everything");
        }
        body + "]"
    });
    (entries.collect(), refused)
}

fn count(postgres: &Postgres) -> usize {
    postgres.value("SELECT count(*)::text FROM events").parse().expect("a number")
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES) and POSTRIDER_MINISTACK: script/test installs them"]
fn s4_5_a_queue_fills_two_tables_and_the_one_that_was_down_catches_up() {
    let rows = usize::try_from(knob("POSTRIDER_ROWS", 40_000)).expect("64 bits");
    let poison = 20;
    let sqs = Server::sqs();
    let (primary, secondary) = (Postgres::start(), Postgres::start());
    for postgres in [&primary, &secondary] {
        postgres.execute(TABLE);
    }
    let inbound = Inbound::new(sqs.endpoint());
    let (entries, refused) = entries(rows, poison);

    let mut world = World::new("csv");
    let environment = sdk_environment(sqs.endpoint(), sqs.endpoint());
    world.share(environment.map(|(name, value)| (name.to_owned(), value)).to_vec(), Vec::new());
    world.add_table("primary", &primary).add_table("secondary", &secondary);
    world
        .set("feeds.in.kind", "sqs")
        .set("feeds.in.queue", Inbound::NAME)
        .set("feeds.in.recipient", "user_id")
        .set("feeds.in.destinations", vec!["primary", "secondary"])
        .set("feeds.in.linger", "50ms")
        .set("feeds.in.max_size", "1MiB");
    // A table is looked up at the start: from then on it may be away.
    world.start_ready();
    secondary.stop(Stop::Crash);
    inbound.send(&entries[..entries.len() / 2]);
    wait_until(LIVENESS * 2, "the primary to take half of the rows", || count(&primary) >= rows / 2 - poison);
    secondary.resume();
    inbound.send(&entries[entries.len() / 2..]);
    wait_until(LIVENESS * 4, "both tables to have all rows", || {
        thread::sleep(Duration::from_millis(200));
        count(&primary) == rows - poison && count(&secondary) == rows - poison
    });
    let dead = || world.postrider(&["dead", "list", "--json", "--limit", "1000"]).json();
    wait_until(LIVENESS, "the refused rows to be recorded", || {
        dead().as_array().is_some_and(|letters| letters.len() == 2 * poison)
    });
    wait_until(LIVENESS, "the queue to be empty", || inbound.left() == 0);

    for letter in dead().as_array().expect("a list") {
        assert_eq!(letter["reason"], "refused", "{letter}");
        let detail = letter["detail"].as_str().unwrap_or_default();
        assert!(detail.contains("amounts_are_positive"), "the database's own words: {letter}");
    }
    let exported = world.postrider(&["dead", "export", "--format", "ndjson", "--destination", "secondary"]);
    let users: BTreeSet<_> = exported
        .stdout
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).expect("JSON")["recipient"].as_str().expect("text").to_owned()
        })
        .collect();
    assert_eq!(users, refused, "exactly the poison rows");
    let compared = world.postrider(&["compare", "primary", "secondary", "--json"]);
    assert_eq!(compared.code, Some(0), "{}\n{}", compared.stdout, compared.stderr);
    secondary.execute("DELETE FROM events WHERE message_id = (SELECT min(message_id) FROM events)");
    let compared = world.postrider(&["compare", "primary", "secondary", "--json"]);
    assert_eq!(compared.code, Some(1), "one row is missing: {}", compared.stdout);
    assert_eq!(compared.json()["differing"].as_array().map(Vec::len), Some(1), "{}", compared.stdout);
    world.stop();
    secondary.stop(Stop::Fast);
    let compared = world.postrider(&["compare", "primary", "secondary"]);
    assert_eq!(compared.code, Some(75), "nobody knows: {}\n{}", compared.stdout, compared.stderr);
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn f57_a_hostile_name_and_an_unfit_table_are_refused_at_the_start() {
    let postgres = Postgres::start();
    postgres.execute("CREATE TABLE events (message_id text, user_id text, amount bigint, at timestamptz)");
    let mut world = World::new("csv");
    world.add_table("primary", &postgres);
    world.add_feed("alerts", "csv", &["primary"]);
    let refused = |world: &mut World, expected: &str| {
        world.start();
        let status = world.wait_exit(LIVENESS);
        assert_eq!(status.code(), Some(78), "{expected}");
        let log = std::fs::read_to_string(world.daemon_log()).expect("the daemon's log");
        assert!(log.contains(expected), "{expected}: {log}");
    };
    // The key is not unique: rows that are written again would be there twice.
    refused(&mut world, "unique");
    postgres.execute("ALTER TABLE events ADD PRIMARY KEY (message_id)");
    world.set("destinations.primary.columns.id\"; DROP TABLE events; --", "recipient");
    let answer = {
        world.configure();
        world.postrider(&["check-config"])
    };
    assert_eq!(answer.code, Some(78), "{}", answer.stdout);
    assert!(answer.stderr.contains("62 letters, digits"), "{}", answer.stderr);
    assert_eq!(postgres.value("SELECT count(*)::text FROM events"), "0", "the table is still there");
    figure("a column called `id\"; DROP TABLE events; --`: exit 78, the table is still there");
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn s4_6_a_killed_daemon_writes_no_row_twice() {
    let rows = 5_000;
    let postgres = Postgres::start();
    // No key would be noticed as a second row; with one, the second write must be harmless, not an error.
    postgres.execute(
        "CREATE TABLE events (message_id text PRIMARY KEY, user_id text, amount numeric, at timestamptz)",
    );
    let mut world = World::new("csv");
    world.add_table("primary", &postgres);
    world.add_feed("alerts", "csv", &["primary"]);
    world
        .set("destinations.primary.columns.amount", "data.amount numeric")
        .set("warehouses.primary.statements_per_s", 10)
        .set("destinations.primary.max_rows", 200)
        .set("warehouses.primary.statement_timeout", "1s")
        .set("lease.duration", "12s");
    world.start_ready();
    world.drop_file(Input::csv("rows.csv", rows));
    for part in 1..=3 {
        wait_until(LIVENESS, "some rows", || count(&postgres) >= rows * part / 5);
        world.kill();
        world.start_ready();
    }
    world.wait_settled(LIVENESS * 2);
    assert_eq!(count(&postgres), rows);
    let report = world.file("rows.csv").expect("the file is known");
    assert_eq!(report["destinations"]["primary"]["sent"], rows, "{report}");
    world.stop();
}

/// One table of a directory feed whose amounts are decimals.
fn one_table(postgres: &Postgres) -> World {
    postgres.execute(
        "CREATE TABLE events (message_id text PRIMARY KEY, user_id varchar(30), amount numeric, at timestamptz)",
    );
    let mut world = World::new("csv");
    world.add_table("primary", postgres);
    world.add_feed("alerts", "csv", &["primary"]);
    world.set("destinations.primary.columns.amount", "data.amount numeric");
    world
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn f66_rows_die_alone_whatever_the_code_that_they_are_refused_with() {
    let postgres = Postgres::start();
    let mut world = one_table(&postgres);
    // 22P05 and 54001 are what the server says of values; the others are what triggers and policies say.
    let codes = ["22P05", "54001", "P0001", "P0002", "MYERR", "42501", "XX000"];
    postgres.execute(&format!(
        "CREATE FUNCTION picky() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
           IF split_part(NEW.message_id, '_', 3)::int % 100 = 50 THEN \
             RAISE EXCEPTION 'not this one' USING ERRCODE = \
               (string_to_array('{}', ','))[split_part(NEW.message_id, '_', 3)::int / 100 % 7 + 1]; \
           END IF; \
           RETURN NEW; END $$; \
         CREATE TRIGGER picky BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION picky()",
        codes.join(",")
    ));
    world.start_ready();
    world.drop_file(Input::csv("some.csv", 7_000));
    world.wait_settled(LIVENESS);
    let report = world.file("some.csv").expect("the file is known");
    let counts = &report["destinations"]["primary"];
    assert_eq!((&counts["sent"], &counts["dead"]), (&6_930.into(), &70.into()), "{report}");
    assert_eq!(count(&postgres), 6_930);
    let dead = world.postrider(&["dead", "list", "--json", "--limit", "1000"]).json();
    for letter in dead.as_array().expect("a list") {
        assert_eq!(letter["reason"], "refused", "{letter}");
        assert!(letter["detail"].as_str().is_some_and(|words| words.contains("not this one")), "{letter}");
    }
    world.stop();
    let log = std::fs::read_to_string(world.daemon_log()).expect("the daemon's log");
    assert!(!log.contains("not this one"), "a trigger's words may quote a row");
    figure(format!("{} SQLSTATEs, 70 bad rows of 7,000: 70 dead, 6,930 in the table", codes.len()));
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn f66_a_table_that_is_gone_or_takes_nothing_condemns_nobody() {
    let postgres = Postgres::start();
    let mut world = one_table(&postgres);
    postgres.execute(
        "CREATE FUNCTION never() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'frozen'; END $$",
    );
    world.start_ready();
    let mut rows = 0;
    for (at, (harm, fix)) in [
        ("ALTER TABLE events RENAME TO elsewhere", "ALTER TABLE elsewhere RENAME TO events"),
        ("ALTER TABLE events RENAME amount TO sum", "ALTER TABLE events RENAME sum TO amount"),
        (
            "CREATE TRIGGER never BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION never()",
            "DROP TRIGGER never ON events",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        postgres.execute(harm);
        world.drop_file(Input::csv(&format!("part{at}.csv"), 2_000));
        rows += 2_000;
        world.daemon().wait_log(" wait");
        thread::sleep(Duration::from_secs(2));
        let dead = world.postrider(&["dead", "list", "--json"]).json();
        assert_eq!(dead.as_array().map(Vec::len), Some(0), "{harm}: {dead}");
        postgres.execute(fix);
        wait_until(LIVENESS, "the rows to be there", || count(&postgres) == rows);
    }
    world.wait_settled(LIVENESS);
    world.stop();
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn f71_a_secondary_that_is_down_stops_neither_the_primary_nor_other_feeds() {
    let (primary, secondary) = (Postgres::start(), Postgres::start());
    for postgres in [&primary, &secondary] {
        postgres.execute(
            "CREATE TABLE events (message_id text PRIMARY KEY, user_id text, amount numeric, at timestamptz)",
        );
    }
    let mut world = World::new("csv");
    world.add_table("primary", &primary).add_table("secondary", &secondary);
    for name in ["primary", "secondary"] {
        world.set(&format!("destinations.{name}.columns.amount"), "data.amount numeric");
    }
    world.add_feed("both", "csv", &["primary", "secondary"]).add_feed("one", "csv", &["primary"]);
    world.set("outbox.high_watermark", 500).set("outbox.max_backlog", 4_000);
    let address = ops::serve(&mut world);
    secondary.stop(Stop::Crash);

    // Far beyond the watermark, the primary has all of it.
    world.drop_into("both", Input::csv("first.csv", 3_000));
    wait_until(LIVENESS, "the primary to have the first file", || count(&primary) == 3_000);
    assert_eq!(ops::get(address, "/readyz").body, "ready\n", "nobody waits");
    // There is a limit: then the feed waits for the secondary alone, and the other feed does not.
    world.drop_into("both", Input::csv("second.csv", 3_000));
    let waits = "ready\nfeed both waits: too many open messages at secondary\n";
    wait_until(LIVENESS, "the feed to wait", || ops::get(address, "/readyz").body == waits);
    world.drop_into("one", Input::csv("third.csv", 1_000));
    let thirds = "SELECT count(*)::text FROM events WHERE user_id LIKE 'user-third-%'";
    wait_until(LIVENESS, "the other feed's file to be there", || primary.value(thirds) == "1000");
    let status = world.postrider(&["status", "--json", "--sample-ms", "0"]).json();
    assert_eq!(status["destinations"]["secondary"]["holds"], serde_json::json!(["both"]), "{status}");
    assert_eq!(status["destinations"]["primary"]["holds"], serde_json::json!([]), "{status}");
    let open = "postrider_messages_open{destination=\"secondary\"}";
    assert!(ops::metric(address, open) >= Some(4_000.0));

    secondary.resume();
    world.wait_settled(LIVENESS * 2);
    assert_eq!((count(&primary), count(&secondary)), (7_000, 6_000));
    assert_eq!(ops::get(address, "/readyz").body, "ready\n");
    world.stop();
    figure(
        "3,000 rows reach the primary beyond a watermark of 500, 1,000 of another feed beyond max_backlog; then all 7,000 and 6,000",
    );
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn f72_connections_that_find_no_port_are_charged_to_no_row() {
    let postgres = Postgres::start();
    postgres.execute(TABLE);
    let mut world = World::new("csv");
    world.add_table("primary", &postgres).add_feed("alerts", "csv", &["primary"]);
    world.set("destinations.primary.columns.amount", "data.amount numeric required");
    postgres.execute("ALTER TABLE events ALTER amount TYPE numeric");
    // One that is charged an attempt is dead.
    world.set("destinations.primary.retry.max_attempts", 1);
    // Every second connection of each thread; the first one looks the table up.
    let inject = "inject=connect:error=EADDRNOTAVAIL:when=2+2";
    world.under(&["strace", "-D", "-f", "-o", "/dev/null", "-e", "trace=connect", "-e", inject]);
    let address = ops::serve(&mut world);
    let terminate =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'postrider'";
    for round in 1..=6 {
        postgres.execute(terminate);
        world.drop_file(Input::csv(&format!("part{round}.csv"), 500));
        wait_until(LIVENESS, "the rows to be there", || count(&postgres) == 500 * round);
    }
    world.wait_settled(LIVENESS);
    let unsent = "postrider_attempts_not_begun_total{destination=\"primary\",reason=\"ports\"}";
    assert!(ops::metric(address, unsent) > Some(0.0), "there was a port for each");
    assert_eq!(world.postrider(&["dead", "list", "--json"]).json(), serde_json::json!([]));
    world.stop();
}

/// Points of the workers that write into tables.
pub(crate) const POINTS: &[&str] = &["table.before", "table.after", "panic.table_delivery"];

#[test]
#[ignore = "needs --features failpoints and Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn f02_f14_a_crash_or_panic_at_each_point_loses_no_row_and_doubles_none() {
    const INJECTED: &str = "injected by the test";
    let postgres = Postgres::start();
    for point in POINTS {
        println!("{point}");
        let rows = 1_000;
        postgres.execute("DROP TABLE IF EXISTS events");
        postgres.execute(
            "CREATE TABLE events (message_id text PRIMARY KEY, user_id text, amount numeric, at timestamptz)",
        );
        let mut world = World::new("csv");
        world.add_table("primary", &postgres);
        world.add_feed("alerts", "csv", &["primary"]);
        world
            .set("destinations.primary.columns.amount", "data.amount numeric")
            .set("destinations.primary.max_rows", 200)
            .set("warehouses.primary.statement_timeout", "1s")
            .set("lease.duration", "12s");
        let is_panic = point.starts_with("panic.");
        let action =
            if is_panic { format!("1*off->1*panic({INJECTED})") } else { "1*off->1*return".to_owned() };
        world.fail(&format!("{point}={action}")).start();
        world.drop_file(Input::csv("hurt.csv", rows));
        if is_panic {
            world.daemon().wait_log(INJECTED);
        } else {
            assert_ne!(world.wait_exit(LIVENESS).code(), Some(0), "{point} was not reached");
            world.fail("").start();
        }
        world.wait_settled(LIVENESS);
        assert_eq!(count(&postgres), rows, "{point}");
        world.stop();
    }
}
