//! Receipts through the real binary: from where they come in to the row of each message, judged by the oracle.

use std::{
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use postrider_http::signature::SigningKey;

use postrider_actors::{
    model::ids::{FileId, MessageId},
    testing::figure,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

#[cfg(feature = "aws")]
use crate::cloud::{Fault, FaultProxy, Rule, Server, sdk_config, sdk_environment};
use crate::{
    pg::{self, Postgres, Stop},
    support::{LIVENESS, SECRET, World, input::Input, knob, wait_for, wait_report, wait_until},
};

/// The source of receipts in these tests.
const SOURCE: &str = "dlr";
/// The schema that `ledger.postgres.schema` names by default.
const SCHEMA: &str = "postrider";

/// The id of a row's message, as anybody can derive it from what was dropped.
fn message(input: &Input, row: usize) -> String {
    MessageId { file: file_id(input), row: row as u64 }.to_string()
}

fn file_id(input: &Input) -> FileId {
    let digest: [u8; 32] = Sha256::digest(&input.bytes).into();
    FileId::derive("alerts", &digest)
}

/// What `postrider receiver --answer-ids` calls a message.
fn provider_id(message: &str) -> String {
    let digest = Sha256::digest(message.as_bytes());
    digest.iter().take(12).fold(String::from("prv-"), |mut id, byte| {
        write!(id, "{byte:02x}").expect("strings take everything");
        id
    })
}

/// Receipts about a file's messages: the shares that the issue asks for, by a seed.
struct Receipts {
    /// Handed over before the file is dropped.
    early: Vec<String>,
    late: Vec<String>,
    /// How many messages they make `delivered` and `failed`.
    delivered: u64,
    failed: u64,
    /// How many name no message.
    unknown: u64,
}

fn receipts(input: &Input, seed: u64) -> Receipts {
    let mut random = StdRng::seed_from_u64(seed);
    let (mut early, mut late) = (Vec::new(), Vec::new());
    let (mut delivered, mut failed, mut unknown) = (0, 0, 0);
    let file = file_id(input);
    for row in 1..=input.rows.len() {
        let message = MessageId { file, row: row as u64 }.to_string();
        let line = |status: &str, number: usize, random: &mut StdRng| {
            // Half of them know the message by our id, half by the provider's.
            let (key, id) = if random.random_bool(0.5) {
                ("message_id", message.clone())
            } else {
                ("provider_id", provider_id(&message))
            };
            let at = 1_700_000_000_000u64 + random.random_range(0..1_000_000u64);
            let response = format!("{status} {row}.{number}");
            json!({ key: id, "event": format!("{row}.{number}"), "status": status, "at": at, "response": response })
                .to_string()
        };
        let dice: f64 = random.random();
        let mut lines = match dice {
            _ if dice < 0.01 => {
                delivered += 1;
                // Conflicting: reported as failed and as delivered.
                vec![line("UNDELIV", 1, &mut random), line("DELIVRD", 2, &mut random)]
            }
            _ if dice < 0.15 => {
                failed += 1;
                vec![line("UNDELIV", 1, &mut random)]
            }
            _ if dice < 0.18 => vec![line("QUEUED", 1, &mut random)],
            _ => {
                delivered += 1;
                vec![line("QUEUED", 1, &mut random), line("DELIVRD", 2, &mut random)]
            }
        };
        if random.random_bool(0.05) {
            lines.push(lines[0].clone());
        }
        let is_early = random.random_bool(0.05);
        if is_early { &mut early } else { &mut late }.append(&mut lines);
        if random.random_bool(0.01) {
            unknown += 1;
            let id = format!("prv-nobody-{row}");
            late.push(
                json!({ "provider_id": id, "event": format!("u{row}"), "status": "DELIVRD", "at": 1 })
                    .to_string(),
            );
        }
    }
    early.shuffle(&mut random);
    late.shuffle(&mut random);
    Receipts { early, late, delivered, failed, unknown }
}

/// `postrider receipts status --json`: messages by state, and what waits.
fn standing(world: &World) -> (Value, u64, u64) {
    let answer = world.postrider(&["receipts", "status", "--json"]);
    assert_eq!(answer.code, Some(0), "{}", answer.stderr);
    let status = answer.json();
    let sum = |key: &str| {
        let sources = status["sources"].as_array().expect("a list").iter();
        sources.map(|source| source[key].as_u64().expect("a number")).sum()
    };
    let (waiting, parked) = (sum("waiting"), sum("parked"));
    (status["messages"].clone(), waiting, parked)
}

fn count(messages: &Value, state: &str) -> u64 {
    let counts = messages.as_array().expect("a list").iter();
    counts
        .filter(|count| count["state"] == state)
        .map(|count| count["messages"].as_u64().expect("a number"))
        .sum()
}

/// Drops receipts in files of at most 50,000, so that several are worked on.
fn drop_all(world: &World, name: &str, lines: &[String]) {
    for (number, lines) in lines.chunks(50_000).enumerate() {
        world.drop_receipts(SOURCE, &format!("{name}-{number}.ndjson"), &(lines.join("\n") + "\n"));
    }
}

fn a_send_and_its_receipts(world: &mut World, engine: &[&str], rows: usize) {
    world.receive(&["--fail-rate", "0.01", "--seed", "3", "--answer-ids"]);
    world
        .set("batch.max_messages", 500)
        .set("destinations.support.provider_id", "/message/id")
        .set("receipts.reconcilers", 3)
        .add_receipts(SOURCE);
    let input = Input::csv("sent.csv", rows);
    let receipts = receipts(&input, 11);
    let all = world.path("receipts.ndjson");
    let lines = receipts.early.iter().chain(&receipts.late);
    let text = lines.fold(String::new(), |text, line| text + line + "\n");
    fs::write(&all, text).expect("the directory is ours");

    world.start_ready();
    drop_all(world, "early", &receipts.early);
    let early: std::collections::BTreeSet<_> = receipts.early.iter().collect();
    wait_for(LIVENESS, "the early receipts to be parked", || {
        let (_, waiting, parked) = standing(world);
        (waiting == 0 && parked == early.len() as u64).then_some(())
    });
    world.drop_file(input);
    // The others come while messages are being sent, and after.
    drop_all(world, "late", &receipts.late);
    world.wait_settled(LIVENESS * 4);
    wait_for(LIVENESS * 4, "every receipt to be applied", || {
        thread::sleep(Duration::from_millis(200));
        let (messages, waiting, parked) = standing(world);
        let states = (count(&messages, "delivered"), count(&messages, "failed"));
        (waiting == 0 && parked == receipts.unknown && states == (receipts.delivered, receipts.failed))
            .then_some(())
    });
    world.stop();
    let summary = world.prove_receipts(SOURCE, &all, engine, &[]);
    println!("{summary}");
    assert_eq!(summary["unknown"], receipts.unknown);
}

#[test]
fn s0_receipts_in_any_order_end_as_the_oracle_says() {
    let mut world = World::new("csv");
    let store = world.store().display().to_string();
    a_send_and_its_receipts(&mut world, &["--store", &store], knob("POSTRIDER_ROWS", 10_000) as usize);
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn s0_receipts_in_any_order_end_as_the_oracle_says_in_postgres() {
    let postgres = Postgres::start();
    let mut world = World::new("csv");
    world.keep_rows_in(&postgres);
    let psql = pg::psql();
    let engine = ["--postgres", &psql, &postgres.url(), SCHEMA];
    a_send_and_its_receipts(&mut world, &engine, knob("POSTRIDER_ROWS", 20_000) as usize);
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn f65_a_ledger_database_that_is_not_utf8_is_refused_by_migrate_the_check_and_the_start() {
    let postgres = Postgres::start();
    postgres.execute_as(
        "postgres",
        "postgres",
        "CREATE DATABASE latin OWNER postrider ENCODING 'LATIN1' TEMPLATE template0",
    );
    let mut world = World::new("csv");
    world.environment("POSTRIDER_TEST_LEDGER", &postgres.url_of(pg::OWNER, "latin"));
    world
        .set("ledger.kind", "postgres")
        .set("ledger.postgres.url", "env:POSTRIDER_TEST_LEDGER")
        .set("ledger.postgres.tls", "disable");
    world.configure();
    let names_it = |text: &str| ["\"latin\"", "LATIN1", "UTF8"].iter().all(|word| text.contains(word));
    for arguments in [&["migrate"][..], &["check-config", "--connect"]] {
        let answer = world.postrider(arguments);
        assert_eq!(answer.code, Some(78), "{arguments:?}: {}{}", answer.stdout, answer.stderr);
        assert!(names_it(&(answer.stdout.clone() + &answer.stderr)), "{}{}", answer.stdout, answer.stderr);
    }
    world.start();
    assert_eq!(world.wait_exit(LIVENESS).code(), Some(78));
    let log = fs::read_to_string(world.daemon_log()).expect("the daemon's log");
    assert!(names_it(&log), "{log}");
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn f65_rows_that_the_ledger_refuses_stop_no_worker_and_send_nothing_again() {
    let postgres = Postgres::start();
    let mut world = World::new("csv");
    world.keep_rows_in(&postgres);
    postgres.execute(
        "ALTER TABLE postrider.messages ADD CONSTRAINT recipients_are_short CHECK (recipient <> 'user-some-0000150')",
    );
    world.receive(&[]);
    world.start_ready();
    world.drop_file(Input::csv("some.csv", 300));
    world.wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.request_count(), 300, "nobody is asked twice");
    assert_eq!(postgres.value("SELECT count(*)::text FROM postrider.messages"), "300");
    let degraded = "SELECT detail FROM postrider.messages WHERE recipient = ''";
    assert!(postgres.value(degraded).contains("recipients_are_short"), "{}", postgres.value(degraded));
    figure("1 row refused of 300: 300 requests, 300 rows, 1 degraded with its reason");
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn f49_postgres_is_restarted_five_times_during_a_send_and_nothing_is_lost() {
    let rows = knob("POSTRIDER_ROWS", 20_000) as usize;
    let postgres = Postgres::start();
    let mut world = World::new("csv");
    world.keep_rows_in(&postgres);
    world.receive(&["--fail-rate", "0.01", "--seed", "5"]);
    let rate = i64::try_from(rows / 6).expect("rows are few");
    world.set("destinations.support.rate_per_s", rate.max(100)).set("batch.max_messages", 500);
    world.start_ready();
    world.drop_file(Input::csv("long.csv", rows));
    for round in 1..=5 {
        world.wait_requests(rows * round / 8);
        postgres.stop(if round % 2 == 0 { Stop::Fast } else { Stop::Crash });
        thread::sleep(Duration::from_millis(300));
        postgres.resume();
    }
    world.wait_settled(LIVENESS * 2);
    world.stop();
    let none = world.path("none.ndjson");
    fs::write(&none, "").expect("the directory is ours");
    let engine = ["--postgres", &pg::psql(), &postgres.url(), SCHEMA];
    let summary = world.prove_receipts(SOURCE, &none, &engine, &[]);
    assert_eq!(summary["rows"], rows);
    let open = "SELECT count(*)::text FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
    assert_eq!(postgres.value(open), "0", "no transaction is left open");
}

#[test]
fn s0_5_a_message_without_a_receipt_expires_and_a_late_receipt_undoes_it() {
    let mut world = World::new("csv");
    world.receive(&[]).set("receipts.timeout", "1s").add_receipts(SOURCE);
    world.set(&format!("receipts.sources.{SOURCE}.fields.sent_at"), "sent_at");
    let input = Input::csv("few.csv", 3);
    let (first, second) = (message(&input, 1), message(&input, 2));
    world.start_ready();
    world.drop_file(input).wait_settled(LIVENESS);
    wait_until(LIVENESS, "all to expire", || count(&standing(&world).0, "expired") == 3);
    let gaps = world.postrider(&["receipts", "gaps", "--json"]).json();
    assert_eq!(gaps[0]["messages"].as_array().map(Vec::len), Some(3), "{gaps}");
    let lines = json!({
        "message_id": first, "event": "a", "status": "DELIVRD", "carrier": "Wire\u{e9}", "price": "0.00645",
        "sent_at": "2026-11-22T04:49:11.468Z",
    })
    .to_string()
        + "\n{\"message_id\":\"" + &second + "\",\"event\":\"b\",\"status\":\"UNDELIV\"}\n"
        // One that can't be read harms no other (F52).
        + "{\"message_id\":\"" + &second + "\",\"event\":\"c\",\"status\":\"LOST\"}\n";
    world.drop_receipts(SOURCE, "late.ndjson", &lines);
    wait_until(LIVENESS, "the late receipts to be applied", || {
        let messages = standing(&world).0;
        (count(&messages, "delivered"), count(&messages, "failed"), count(&messages, "expired")) == (1, 1, 1)
    });
    let gaps = world.postrider(&["receipts", "gaps", "--json"]).json();
    assert_eq!(gaps[0]["messages"].as_array().map(Vec::len), Some(1), "{gaps}");
    let shown = world.postrider(&["messages", "--id", &first, "--json"]).json();
    assert_eq!(
        (&shown[0]["state"], &shown[0]["receipt"]["price"]),
        (&json!("delivered"), &json!("0.00645")),
        "{shown}"
    );
    let shown = world.postrider(&["messages", "--id", &first]).stdout;
    for said in ["receipt: delivered", "by Wire\u{e9}", "sent at 2026-11-22T04:49:11.468Z, for 0.00645"] {
        assert!(shown.contains(said), "{said}: {shown}");
    }
    let rejects = world.postrider(&["receipts", "rejects", "--json"]).json();
    let reason = rejects[0]["reason"].as_str().expect("a reason");
    assert!(reason.contains("LOST") && reason.contains("status"), "{rejects}");
    assert!(rejects[0]["place"].as_str().is_some_and(|place| place.contains("late.ndjson:3")), "{rejects}");
    world.stop();
    world.prove();
}

/// The provider has new words. Their receipts are kept, and read again by a mapping that knows one of them, while the
/// daemon still has the old one.
fn a_fixed_mapping_reads_what_was_rejected(world: &mut World) {
    const RECIPIENT: &str = "+41790000000";
    let rows = 600;
    world.receive(&[]).add_receipts(SOURCE);
    let input = Input::csv("words.csv", rows);
    let line = |row: usize| {
        let word = ["DELIVRD", "LOST", "GONE"][row % 3];
        json!({ "message_id": message(&input, row), "status": word, "to": RECIPIENT }).to_string() + "\n"
    };
    let lines = (1..=rows).map(line).collect::<String>();
    world.start_ready();
    world.drop_file(input).wait_settled(LIVENESS);
    world.drop_receipts(SOURCE, "a.ndjson", &lines);
    let rejects = |world: &World| {
        let arguments = ["receipts", "rejects", "--source", SOURCE, "--destination", "support"];
        world.postrider(&[&arguments[..], &["--limit", "1000", "--json"]].concat()).json()
    };
    let count_of = |world: &World| rejects(world).as_array().map_or(0, Vec::len);
    wait_until(LIVENESS, "two thirds to be rejected", || count_of(world) == rows / 3 * 2);
    let listed = rejects(world);
    assert!(listed[0]["text"].as_str().is_some_and(|text| text.contains(RECIPIENT)), "{}", listed[0]);
    assert_eq!(listed[0]["is_whole"], true);
    let table = world.postrider(&["receipts", "rejects"]).stdout;
    assert!(table.contains("LOST") && !table.contains(RECIPIENT), "{table}");
    let log = fs::read_to_string(world.daemon_log()).expect("the daemon's log");
    assert!(log.contains("receipts can't be read") && !log.contains(RECIPIENT), "I10");

    world.set(&format!("receipts.sources.{SOURCE}.statuses.LOST"), "failed").configure();
    let third = (rows / 3) as u64;
    let came = |taken, known, rejected| json!({ "taken": taken, "known": known, "ignored": 0, "rejected": rejected, "incomplete": 0 });
    let reread = |more: &[&str]| {
        let answer = world.postrider(&[&["receipts", "reread", "--json"][..], more].concat());
        assert_eq!(answer.code, Some(0), "{}", answer.stderr);
        answer.json()
    };
    let some = reread(&["--limit", "50"]);
    assert_eq!((&some["taken"], &some["incomplete"]), (&json!(50), &json!(0)), "{some}");
    assert_eq!(reread(&["--source", SOURCE]), came(third - 50, 0, third));
    assert_eq!(reread(&[]), came(0, 0, third), "nothing is left of them");
    wait_until(LIVENESS, "what was read again to be applied", || {
        let messages = standing(world).0;
        (count(&messages, "delivered"), count(&messages, "failed"), count(&messages, "sent"))
            == (third, third, third)
    });
    // The same comes again and is known, also to who still rejects it.
    world.drop_receipts(SOURCE, "b.ndjson", &lines);
    let done = world.inbox(SOURCE).join("done/b.ndjson");
    wait_until(LIVENESS, "the file to be read", || done.exists());
    assert_eq!(count_of(world) as u64, third);
    let (messages, waiting, parked) = standing(world);
    assert_eq!((count(&messages, "failed"), waiting, parked), (third, 0, 0));
    let nobody = world.postrider(&["receipts", "reread", "--source", "nobody"]);
    assert_eq!(nobody.code, Some(1));
    assert!(nobody.stderr.contains("nobody") && nobody.stderr.contains(SOURCE), "{}", nobody.stderr);
    let status = world.postrider(&["receipts", "status"]).stdout;
    assert!(status.contains("LAST RECEIPTS") && status.contains("CURSOR MOVED"), "{status}");
    world.stop();
    world.prove();
}

#[test]
fn rejected_receipts_are_read_again_once_the_mapping_is_fixed() {
    a_fixed_mapping_reads_what_was_rejected(&mut World::new("csv"));
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn rejected_receipts_are_read_again_once_the_mapping_is_fixed_in_postgres() {
    let postgres = Postgres::start();
    let mut world = World::new("csv");
    world.keep_rows_in(&postgres);
    a_fixed_mapping_reads_what_was_rejected(&mut world);
}

#[test]
fn i10_a_first_row_without_a_header_is_quoted_in_reports_and_never_in_the_log() {
    const PHONE: &str = "+15550100042";
    let mut world = World::new("csv");
    world.add_receipts(SOURCE).set(&format!("receipts.sources.{SOURCE}.format"), "csv");
    world.start_ready();
    world.drop_receipts(SOURCE, "bare.csv", &format!("{PHONE},DELIVRD\n"));
    world.drop_receipts("alerts", "bare.csv", &format!("{PHONE},Ann,1\n"));
    world.drop_receipts("alerts", "twice.csv", &format!("user_id,{PHONE},{PHONE}\n"));
    for (feed, name) in [(SOURCE, "bare.csv"), ("alerts", "bare.csv"), ("alerts", "twice.csv")] {
        let report = wait_report(&world.inbox(feed).join("failed").join(name));
        assert!(report["reason"].as_str().is_some_and(|reason| reason.contains(PHONE)), "{report}");
    }
    let rejects = world.postrider(&["receipts", "rejects", "--json"]).json();
    assert!(rejects[0]["reason"].as_str().is_some_and(|reason| reason.contains(PHONE)), "{rejects}");
    world.stop();
    let log = fs::read_to_string(world.daemon_log()).expect("the log is text");
    for said in ["the header has 2 columns", "the header has 3 columns", "has one name for columns 2 and 3"] {
        assert!(log.contains(said), "{said}: {log}");
    }
    assert!(!log.contains(PHONE), "{log}");
}

#[test]
fn each_change_of_a_state_is_sent_to_a_webhook_once() {
    let rows = 300;
    let mut world = World::new("csv");
    world.receive(&["--log-bodies"]);
    world.add_destination("status").set("receipts.events_to", "status").add_receipts(SOURCE);
    world.start_ready();
    let input = Input::csv("changes.csv", rows);
    let ids: Vec<_> = (1..=rows).map(|row| message(&input, row)).collect();
    world.drop_file(input).wait_settled(LIVENESS);
    let line = |id: &String| json!({ "message_id": id, "event": id, "status": "DELIVRD" }).to_string() + "\n";
    // Every receipt comes twice; the second changes nothing.
    world.drop_receipts(SOURCE, "a.ndjson", &ids.iter().map(line).collect::<String>());
    world.drop_receipts(SOURCE, "b.ndjson", &ids.iter().rev().map(line).collect::<String>());
    world.wait_requests(2 * rows);
    thread::sleep(Duration::from_secs(1));
    let changes = world.bodies_of("/status");
    assert_eq!(changes.len(), rows, "each change once");
    let mut named: Vec<_> = changes
        .iter()
        .map(|body| {
            let change = &body["data"];
            assert_eq!(
                (&change["before"], &change["state"]),
                (&json!("sent"), &json!("delivered")),
                "{body}"
            );
            change["message_id"].as_str().expect("an id").to_owned()
        })
        .collect();
    named.sort_unstable();
    let mut expected = ids;
    expected.sort_unstable();
    assert_eq!(named, expected);
    world.stop();
}

/// One request with a body, and the status that it is answered with.
fn post(address: &str, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("the daemon listens");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout can be set");
    let length = body.len();
    let mut request =
        format!("POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n");
    write!(request, "content-length: {length}\r\nconnection: close\r\n").expect("strings take everything");
    for (name, value) in headers {
        write!(request, "{name}: {value}\r\n").expect("strings take everything");
    }
    stream.write_all(format!("{request}\r\n{body}").as_bytes()).expect("the daemon reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("the daemon answers");
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, answer)
}

/// The headers of a signed request at `at_s`.
fn signed(id: &str, at_s: u64, body: &str) -> [(&'static str, String); 3] {
    let key = SigningKey::new(&SECRET.to_owned().into()).expect("the secret is one");
    let mut signature = Vec::new();
    key.sign(id.as_bytes(), at_s.to_string().as_bytes(), body.as_bytes(), &mut signature);
    let signature = String::from_utf8(signature).expect("signatures are ASCII");
    [("webhook-id", id.to_owned()), ("webhook-timestamp", at_s.to_string()), ("webhook-signature", signature)]
}

#[test]
fn f55_receipts_come_over_http_and_forged_stale_and_replayed_ones_change_nothing() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("it is bound");
    let address = free.to_string();
    world.set("receipts.listen", address.clone());
    world
        .set("receipts.sources.hook.kind", "http")
        .set("receipts.sources.hook.secrets", vec!["env:POSTRIDER_TEST_SECRET"]);
    world.map_receipts("hook");
    let input = Input::csv("hooked.csv", 3);
    let ids: Vec<_> = (1..=3).map(|row| message(&input, row)).collect();
    world.start_ready();
    world.drop_file(input).wait_settled(LIVENESS);
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let body = json!([
        { "message_id": ids[0], "event": "a", "status": "DELIVRD" },
        { "message_id": ids[1], "event": "b", "status": "NO SUCH WORD" },
    ])
    .to_string();
    let send = |headers: &[(&'static str, String); 3], body: &str| {
        let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
        post(&address, "/receipts/hook", &headers, body)
    };
    let good = signed("wh_1", now_s, &body);
    let forged = body.replace(&ids[0], &ids[2]);
    assert_eq!(send(&good, &forged).0, 403, "the body is not what was signed");
    assert_eq!(send(&signed("wh_2", now_s - 3600, &body), &body).0, 403, "it is stale");
    assert_eq!(post(&address, "/receipts/hook", &[], &body).0, 401);
    assert_eq!(post(&address, "/receipts/other", &[], &body).0, 404);
    let (status, answer) = send(&good, &body);
    assert_eq!(status, 200, "{answer}");
    assert!(answer.contains("\"taken\":1") && answer.contains("NO SUCH WORD"), "{answer}");
    let (status, answer) = send(&good, &body);
    assert!(
        status == 200 && answer.contains("\"taken\":0") && answer.contains("\"known\":1"),
        "a replay: {answer}"
    );
    wait_until(LIVENESS, "the one good receipt to be applied", || {
        count(&standing(&world).0, "delivered") == 1
    });
    assert_eq!(count(&standing(&world).0, "sent"), 2, "nothing else has changed");
    // A reload leaves the address to the next life.
    world.configure();
    world.daemon().signal(rustix::process::Signal::HUP);
    let late = json!({ "message_id": ids[2], "event": "z", "status": "UNDELIV" }).to_string();
    wait_until(LIVENESS, "a receipt after the reload", || {
        send(&signed("wh_3", now_s, &late), &late).0 == 200 && count(&standing(&world).0, "failed") == 1
    });
    world.stop();
    world.prove();
}

#[cfg(feature = "aws")]
#[test]
#[ignore = "needs moto (POSTRIDER_MOTO): script/test installs it"]
fn s0_1_the_receipts_of_a_send_are_read_from_cloudwatch_within_the_rate() {
    let rows = usize::try_from(knob("POSTRIDER_ROWS", 25_000)).expect("64 bits");
    let calls_per_s = 4_i64;
    let logs = Server::logs();
    let proxy = FaultProxy::start(logs.endpoint());
    let group = "sns/us-east-1/123456789012/DirectPublishToPhoneNumber";
    let mut world = World::new("csv");
    let mut environment: Vec<_> = sdk_environment(proxy.endpoint(), proxy.endpoint())
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec();
    environment.push(("AWS_ENDPOINT_URL_CLOUDWATCH_LOGS".into(), proxy.endpoint().to_owned()));
    world.share(environment, Vec::new());
    world.receive(&["--answer-ids"]);
    world
        .set("batch.max_messages", 500)
        .set("destinations.support.provider_id", "/message/id")
        .set("receipts.sources.sns.kind", "cloudwatch")
        .set("receipts.sources.sns.destination", "support")
        .set("receipts.sources.sns.log_groups", vec![group])
        .set("receipts.sources.sns.calls_per_s", calls_per_s)
        .set("receipts.sources.sns.poll", "1s")
        .set("receipts.sources.sns.overlap", "2s")
        .set("receipts.sources.sns.fields.provider_id", "notification.messageId")
        .set("receipts.sources.sns.fields.status", "status")
        .set("receipts.sources.sns.fields.response", "delivery.providerResponse")
        .set("receipts.sources.sns.fields.price", "delivery.priceInUSD")
        .set("receipts.sources.sns.statuses.SUCCESS", "delivered")
        .set("receipts.sources.sns.statuses.FAILURE", "failed");
    let input = Input::csv("sms.csv", rows);
    let file = file_id(&input);
    let id = |row: usize| provider_id(&MessageId { file, row: row as u64 }.to_string());
    let ids: Vec<_> = (1..=rows).map(id).collect();
    put_events(logs.endpoint(), group, &ids);
    // A window that fails is read again itself: the first polls are refused.
    proxy.inject(Rule::on("FilterLogEvents", Fault::unavailable()).next(2));
    world.start_ready();
    world.drop_file(input);
    let began = Instant::now();
    world.wait_settled(LIVENESS * 2);
    let (delivered, failed) = (rows - rows / 10, rows / 10);
    wait_until(LIVENESS * 4, "every receipt to be applied", || {
        thread::sleep(Duration::from_millis(500));
        let (messages, waiting, _) = standing(&world);
        waiting == 0
            && (count(&messages, "delivered"), count(&messages, "failed"))
                == (delivered as u64, failed as u64)
    });
    let calls = proxy.counts()["FilterLogEvents"].calls;
    let seconds = began.elapsed().as_secs() + 1;
    println!("{rows} messages: {calls} calls in {seconds} s, at most {calls_per_s} per second are allowed");
    assert!(calls <= calls_per_s.unsigned_abs() * (seconds + 5), "{calls} calls in {seconds} s");
    assert_eq!(proxy.injected("FilterLogEvents"), 2);
    let log = fs::read_to_string(world.daemon_log()).expect("the daemon's log");
    assert!(!log.contains("Throttling"), "no call was throttled");
    world.stop();
    world.prove();
}

/// Puts an event per message into the log group, one of ten a failure.
#[cfg(feature = "aws")]
fn put_events(endpoint: &str, group: &str, ids: &[String]) {
    use aws_sdk_cloudwatchlogs::{Client, types::InputLogEvent};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let client = Client::new(&sdk_config(endpoint));
    runtime.block_on(async {
        client.create_log_group().log_group_name(group).send().await.expect("a new group");
        client
            .create_log_stream()
            .log_group_name(group)
            .log_stream_name("s")
            .send()
            .await
            .expect("a new stream");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis();
        let now = i64::try_from(now).expect("it is not the year 292278994");
        for (part, ids) in ids.chunks(2_000).enumerate() {
            let events = ids.iter().enumerate().map(|(index, id)| {
                let number = part * 2_000 + index + 1;
                let status = if number % 10 == 0 { "FAILURE" } else { "SUCCESS" };
                let message = json!({
                    "notification": { "messageId": id, "timestamp": "2026-01-02 03:04:05.678" },
                    "delivery": { "providerResponse": "Message has been accepted", "priceInUSD": 0.00645 },
                    "status": status,
                });
                // Spread over the last minutes, in order.
                let at = now - 300_000 + i64::try_from(number * 8).expect("it is small").min(290_000);
                InputLogEvent::builder().timestamp(at).message(message.to_string()).build().expect("an event")
            });
            let put = client.put_log_events().log_group_name(group).log_stream_name("s");
            put.set_log_events(Some(events.collect())).send().await.expect("the emulator takes them");
        }
    });
}

/// Points of receipts. Those named `panic.` panic once, at the others the process ends once.
pub(crate) const POINTS: &[&str] = &[
    "record.after",
    "receipts.claimed",
    "receipts.taken",
    "receipts.applied",
    "receipts.before_finish",
    "panic.receipt_collector",
    "panic.receipt_reconciler",
    "panic.receipt_sweeper",
];

/// Points of the Postgres ledger alone; `tests/postgres/faults.rs` fails there.
pub(crate) const POSTGRES_POINTS: &[&str] = &["postgres_before_commit"];

#[test]
#[cfg_attr(not(feature = "failpoints"), ignore = "needs --features failpoints")]
fn f02_f14_a_crash_or_panic_at_each_point_loses_no_receipt() {
    const INJECTED: &str = "injected by the test";
    for point in POINTS {
        println!("{point}");
        let rows = 300;
        let mut world = World::new("csv");
        world.receive(&["--fail-rate", "0.05", "--seed", "9"]).add_receipts(SOURCE);
        let input = Input::csv("hurt.csv", rows);
        let lines: Vec<_> = (1..=rows)
            .map(|row| json!({ "message_id": message(&input, row), "event": row.to_string(), "status": "DELIVRD", "at": row, "response": "r" }))
            .map(|receipt| receipt.to_string())
            .collect();
        let all = world.path("receipts.ndjson");
        fs::write(&all, lines.join("\n") + "\n").expect("the directory is ours");
        let is_panic = point.starts_with("panic.");
        let action = if is_panic { format!("1*off->1*panic({INJECTED})") } else { "1*return".to_owned() };
        world.fail(&format!("{point}={action}")).start();
        world.drop_file(input);
        drop_all(&world, "half", &lines[..rows / 2]);
        if is_panic {
            world.daemon().wait_log(INJECTED);
            assert!(world.daemon().is_running(), "one panic is no reason to exit");
        } else {
            assert_ne!(world.wait_exit(LIVENESS).code(), Some(0), "{point} was not reached");
            world.kills += 1;
            world.fail("").start();
        }
        drop_all(&world, "rest", &lines[rows / 2..]);
        world.wait_settled(LIVENESS);
        wait_until(LIVENESS, "every receipt to be applied", || {
            thread::sleep(Duration::from_millis(50));
            count(&standing(&world).0, "delivered") == rows as u64
        });
        world.stop();
        let store = world.store().display().to_string();
        world.prove_receipts(SOURCE, &all, &["--store", &store], &[]);
    }
}
