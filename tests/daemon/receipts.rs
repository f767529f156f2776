//! Receipts through the real binary: from where they come in to the row of each message, judged by the oracle.

use std::{fmt::Write as _, fs, thread, time::Duration};

use postrider_actors::model::ids::{FileId, MessageId};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    pg::{self, Postgres, Stop},
    support::{LIVENESS, World, input::Input, knob, wait_for, wait_until},
};

/// The source of receipts in these tests.
const SOURCE: &str = "dlr";
/// The schema that `ledger.postgres.schema` names by default.
const SCHEMA: &str = "postrider";

/// The id of a row's message, as anybody can derive it from what was dropped.
fn message(input: &Input, row: usize) -> String {
    let digest: [u8; 32] = Sha256::digest(&input.bytes).into();
    let file = FileId::derive("alerts", &digest);
    MessageId { file, row: row as u64 }.to_string()
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
    for row in 1..=input.rows.len() {
        let message = message(input, row);
        let line = |status: &str, number: usize, random: &mut StdRng| {
            // Half of them know the message by our id, half by the provider's.
            let (key, id) = match random.random_bool(0.5) {
                true => ("message_id", message.clone()),
                false => ("provider_id", provider_id(&message)),
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
                // Conflicting: told to have failed and to have arrived.
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
fn s0_receipts_in_any_order_come_to_what_the_oracle_says() {
    let mut world = World::new("csv");
    let store = world.store().display().to_string();
    a_send_and_its_receipts(&mut world, &["--store", &store], knob("POSTRIDER_ROWS", 10_000) as usize);
}

#[test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
fn s0_receipts_in_any_order_come_to_what_the_oracle_says_in_postgres() {
    let postgres = Postgres::start();
    let mut world = World::new("csv");
    world.keep_rows_in(&postgres);
    let psql = pg::psql();
    let engine = ["--postgres", &psql, &postgres.url(), SCHEMA];
    a_send_and_its_receipts(&mut world, &engine, knob("POSTRIDER_ROWS", 20_000) as usize);
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
    world.receive(&[]).set("receipts.timeout_s", 1).add_receipts(SOURCE);
    let input = Input::csv("few.csv", 3);
    let (first, second) = (message(&input, 1), message(&input, 2));
    world.start_ready();
    world.drop_file(input).wait_settled(LIVENESS);
    wait_until(LIVENESS, "all to expire", || count(&standing(&world).0, "expired") == 3);
    let gaps = world.postrider(&["receipts", "gaps", "--json"]).json();
    assert_eq!(gaps[0]["messages"].as_array().map(Vec::len), Some(3), "{gaps}");
    let lines = json!({ "message_id": first, "event": "a", "status": "DELIVRD", "carrier": "Wire\u{e9}", "price": "0.00645" })
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
    assert!(shown.contains("receipt: delivered") && shown.contains("by Wire\u{e9}"), "{shown}");
    let rejects = world.postrider(&["receipts", "rejects", "--json"]).json();
    let reason = rejects[0]["reason"].as_str().expect("a reason");
    assert!(reason.contains("LOST") && reason.contains("status"), "{rejects}");
    assert!(rejects[0]["place"].as_str().is_some_and(|place| place.contains("late.ndjson:3")), "{rejects}");
    world.stop();
    world.prove();
}

#[test]
fn each_change_of_a_state_is_told_to_a_webhook_once() {
    let rows = 300;
    let mut world = World::new("csv");
    world.receive(&["--log-bodies"]);
    world.add_destination("status").set("receipts.events_to", "status").add_receipts(SOURCE);
    world.start_ready();
    let input = Input::csv("told.csv", rows);
    let ids: Vec<_> = (1..=rows).map(|row| message(&input, row)).collect();
    world.drop_file(input).wait_settled(LIVENESS);
    let line = |id: &String| json!({ "message_id": id, "event": id, "status": "DELIVRD" }).to_string() + "\n";
    // Every receipt comes twice; the second changes nothing.
    world.drop_receipts(SOURCE, "a.ndjson", &ids.iter().map(line).collect::<String>());
    world.drop_receipts(SOURCE, "b.ndjson", &ids.iter().rev().map(line).collect::<String>());
    world.wait_requests(2 * rows);
    thread::sleep(Duration::from_secs(1));
    let told = world.bodies_of("/status");
    assert_eq!(told.len(), rows, "each change once");
    let mut named: Vec<_> = told
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
