//! The defaults of alarms, where there are receipts: quiet on a normal day, and raised where those do not come.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use postrider_actors::testing::figure;
use serde_json::{Value, json};

use crate::{
    alarms::raised,
    ops::{alarmed, metric, serve},
    support::{
        LIVENESS, SECRET, World,
        input::{Input, Row},
        knob,
        process::{POSTRIDER, Process},
        wait_report, wait_until,
    },
};

/// Receipts that may be overdue within an hour: some phones never answer.
const OVERDUE_MAX: usize = 1_000;

#[test]
fn s2_8_receipts_that_do_not_come_raise_an_alarm() {
    let mut world = World::new("csv");
    world.receive(&[]).add_receipts("dlr").set("receipts.timeout", "2s");
    let address = serve(&mut world);
    world.drop_file(Input::csv("few.csv", OVERDUE_MAX)).wait_settled(LIVENESS);
    let expired = "postrider_messages_expired_total{destination=\"support\"}";
    wait_until(LIVENESS, "them to be overdue", || metric(address, expired) == Some(OVERDUE_MAX as f64));
    thread::sleep(Duration::from_secs(2));
    assert_eq!(alarmed(address, "receipts"), Some(0.0), "that many are normal");
    world.drop_file(Input::csv("more.csv", 1));
    wait_until(LIVENESS, "the alarm", || alarmed(address, "receipts") == Some(1.0));
    assert_eq!(raised(&world, "receipts")[0].0, "support");
    world.stop();
    world.prove();
}

/// Rows of a normal day; `POSTRIDER_ROWS=1000000` for all of them.
fn rows() -> usize {
    knob("POSTRIDER_ROWS", 100_000) as usize
}

/// Messages of which receipts come in time.
const RECEIPTS: usize = 20_000;

#[test]
fn s2_8_a_normal_day_raises_no_alarm_but_for_what_is_dead() {
    let mut world = World::new("csv");
    // As an operator would have it: what this test is about are the defaults.
    world.unset("batch.max_messages").unset("canary.enabled");
    world.add_destination("sms").add_receipts("dlr");
    for name in ["support", "sms"] {
        for key in ["concurrency", "timeout", "retry.max_attempts", "retry.base", "retry.cap"] {
            world.unset(&format!("destinations.{name}.{key}"));
        }
    }
    // Of a hundred requests 3 are answered 503 and tried again; the other receiver answers one with 404.
    world.receive(&["--fail-rate", "0.03", "--seed", "7"]);
    let unknown = ["--fail-rate", "0.01", "--status", "404", "--seed", "7"];
    let mut sms = Command::new(POSTRIDER);
    sms.args(["receiver", "--listen", "127.0.0.1:0", "--secret", SECRET])
        .args(unknown)
        .stdout(Stdio::piped());
    let mut sms = Process::spawn(&mut sms, &world.path("sms.stderr"));
    let line = sms.first_line();
    let at = line.strip_prefix("listening on ").expect("the receiver says where it listens");
    world.set("destinations.sms.url", format!("http://{at}/sms"));
    world.set("feeds.alerts.destinations", vec!["support", "sms"]);
    let address = serve(&mut world);
    let mut input = Input::csv("day.csv", rows());
    input.bytes.extend_from_slice(b",nobody,1.50\n");
    input.rows.push(Row::rejected());
    world.drop_file(input).wait_settled(LIVENESS * 20);
    let report = wait_report(&world.done("day.csv"));
    let count =
        |destination: &str, key: &str| report["destinations"][destination][key].as_u64().expect("a count");
    assert_eq!((count("support", "sent"), count("support", "dead")), (rows() as u64, 0), "{report}");
    let dead = count("sms", "dead");
    assert!(dead > rows() as u64 / 200 && dead < rows() as u64 / 50, "{report}");
    assert_eq!(report["rejected"], 1, "{report}");
    let retries = metric(address, "postrider_retries_total{destination=\"support\"}").unwrap_or_default();
    assert!(retries > rows() as f64 * 0.02, "{retries}");
    let id = report["id"].as_str().expect("an id");
    let receipts = (1..=rows().min(RECEIPTS)).fold(String::new(), |mut text, row| {
        let line = json!({ "message_id": format!("msg_{id}_{row}"), "event": row.to_string(), "status": "DELIVRD", "at": 1 });
        writeln!(text, "{line}").expect("strings take everything");
        text
    });
    world.drop_receipts("dlr", "day.ndjson", &receipts);
    let changed = "postrider_receipt_changes_total{}";
    wait_until(LIVENESS * 4, "the receipts", || {
        metric(address, changed) >= Some(rows().min(RECEIPTS) as f64)
    });
    thread::sleep(Duration::from_secs(3)); // alarms are judged every second
    let log = world.daemon().log_text();
    let lines = log.lines().filter(|line| line.contains("alarm raised"));
    let kinds: BTreeSet<_> = lines
        .map(|line| {
            let line: Value = serde_json::from_str(line).expect("lines are JSON");
            line["alarm"].as_str().or(line["fields"]["alarm"].as_str()).expect("it has a name").to_owned()
        })
        .collect();
    assert_eq!(kinds, BTreeSet::from(["dead".to_owned()]), "each message that is given up is worth a look");
    figure(format!(
        "{} rows to 2 destinations, {retries} retries, {dead} dead, 1 rejected, {} receipts: no alarm but `dead`",
        rows(),
        rows().min(RECEIPTS)
    ));
    world.stop();
}
