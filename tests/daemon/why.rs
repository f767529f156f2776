//! Why is it not going? What `postrider status` says of the whole, of a destination and of a file: the setting or fact behind
//! it, the last error, and what to do.

use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind},
    scripted::Reply,
    wait_for, wait_until,
};

/// `postrider status --json`.
fn status(world: &World) -> Value {
    world.postrider(&["status", "--json", "--sample-ms", "0"]).ok().json()
}

fn text(ceiling: &Value) -> &str {
    ceiling["text"].as_str().unwrap_or_default()
}

/// Waits until the whole, `support` and the only open file say the same; it.
fn wait_all(world: &World, says: &str) -> Value {
    wait_for(LIVENESS, says, || {
        let status = status(world);
        let (file, destination) =
            (&status["open_files"][0]["ceiling"], &status["destinations"]["support"]["ceiling"]);
        let is_said = [&status["ceiling"], file, destination].iter().all(|said| text(said).contains(says));
        is_said.then(|| destination.clone())
    })
}

#[test]
fn a_rate_a_pause_a_hold_and_nothing_at_all_are_each_named_with_what_to_do() {
    let mut world = World::new("csv");
    world.receive(&[]).set("destinations.support.rate_per_s", 100).set("destinations.support.burst", 10);
    world.start_ready();
    wait_until(LIVENESS, "no files", || text(&status(&world)["ceiling"]) == "no files");
    world.drop_file(Input::csv("slow.csv", 4_000).all(Kind::Cancelled));
    let rate = wait_all(&world, "rate_per_s = 100");
    assert_eq!(rate["cause"], "rate_per_s");
    assert!(
        rate["since"].is_string() && rate["remedy"].to_string().contains("postrider rate support"),
        "{rate}"
    );
    let promise = wait_for(LIVENESS, "an estimate", || {
        let status = status(&world);
        status["open_files"][0]["ceiling"]["done_at"].as_str().map(str::to_owned)
    });
    assert!(promise.ends_with(":00.000Z"), "to the full minute: {promise}");

    world.postrider(&["rate", "support", "200"]).ok();
    wait_all(&world, "rate_per_s = 200 (set by the operator)");
    world.postrider(&["pause", "support", "--reason", "they deploy"]).ok();
    let paused = wait_all(&world, "paused by the operator");
    assert!(text(&paused).ends_with(": they deploy") && paused["done_at"].is_null(), "{paused}");
    assert_eq!(paused["remedy"], "postrider resume support");
    let shown = world.postrider(&["status", "--sample-ms", "0"]).ok().stdout;
    assert!(shown.contains("slow.csv at support: paused by the operator"), "{shown}");
    assert!(shown.contains("postrider resume support"), "{shown}");
    world.postrider(&["resume", "support"]).ok();

    world.postrider(&["hold", "slow.csv", "--reason", "wrong list"]).ok();
    let held = wait_for(LIVENESS, "the file to be held", || {
        let status = status(&world);
        let held = status["open_files"][0]["ceiling"].clone();
        text(&held).contains("held by the operator").then_some(held)
    });
    assert!(text(&held).ends_with(": wrong list"), "{held}");
    assert_eq!(held["remedy"], "postrider release slow.csv");
    for command in [&["status", "--sample-ms", "0"][..], &["advise"]] {
        let first = || {
            let says = world.postrider(command).ok().stdout;
            says.lines().take(3).collect::<Vec<_>>().join("\n")
        };
        // What bound before is remembered for a moment.
        let first = wait_for(LIVENESS, "the hold to be named", || {
            Some(first()).filter(|first| first.contains("held by the operator"))
        });
        assert!(first.contains("postrider release slow.csv"), "{command:?}: {first}");
        assert!(!first.contains("done by"), "a promise of what stands: {first}");
    }
    world.postrider(&["cancel", "slow.csv"]).ok();
    world.wait_settled(LIVENESS);
    wait_until(LIVENESS, "nothing to do", || text(&status(&world)["ceiling"]) == "nothing: all is sent");
    world.stop();
    assert_eq!(text(&status(&world)["ceiling"]), "no daemon is running");
    assert!(world.postrider(&["status"]).ok().stdout.contains("postrider run"));
}

#[test]
fn a_receiver_that_is_down_is_named_with_its_own_words_and_they_can_not_drive_the_terminal() {
    let mut world = World::new("csv");
    world.script(|_| {
        let body = "\r\n down for repair \u{1b}[2J\r\nmore";
        Reply::Raw(format!("HTTP/1.1 503 No\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes())
    });
    world.drop_file(Input::csv("a.csv", 200).all(Kind::Sent)).start_ready();
    let down = wait_all(&world, "breaker open: 503 for ");
    assert_eq!(down["cause"], "breaker");
    assert_eq!(
        (&down["last_error"]["status"], &down["last_error"]["reason"]),
        (&503.into(), &"status".into())
    );
    assert_eq!(down["last_error"]["text"], "down for repair \u{1b}[2J");
    assert!(down["remedy"].to_string().contains("receiver"), "{down}");
    let shown = world.postrider(&["status", "--sample-ms", "0"]).ok().stdout;
    assert!(shown.contains("503: down for repair \\u{1b}[2J"), "{shown}");
}

#[test]
fn a_closed_window_says_when_it_opens() {
    let mut world = World::new("csv");
    world.receive(&[]).set("feeds.alerts.not_before", "2099-01-01T08:00:00Z");
    world.drop_file(Input::csv("later.csv", 20).all(Kind::Cancelled)).start_ready();
    let file = wait_for(LIVENESS, "the file to wait", || {
        let file = status(&world)["open_files"][0]["ceiling"].clone();
        (file["cause"] == "not_before").then_some(file)
    });
    assert_eq!(text(&file), "not_before = 2099-01-01 08:00 UTC");
    assert_eq!(file["until"], "2099-01-01T08:00:00.000Z");
}

#[test]
fn a_feed_that_waits_for_room_names_the_destination_and_what_binds_there() {
    let mut world = World::new("csv");
    world.receive(&[]).set("outbox.high_watermark", 300).set("outbox.max_backlog", 300);
    world.start_ready();
    world.postrider(&["pause", "support"]).ok();
    world.drop_file(Input::csv("many.csv", 5_000).all(Kind::Cancelled));
    let whole = wait_for(LIVENESS, "the watermark to be named", || {
        let whole = status(&world)["ceiling"].clone();
        (whole["cause"] == "watermark").then_some(whole)
    });
    assert!(text(&whole).starts_with("watermark: waiting for support (paused by the operator, "), "{whole}");
    assert!(whole["since"].is_string() && whole["remedy"] == "postrider resume support", "{whole}");
    let shown = world.postrider(&["files"]).ok().stdout;
    assert!(shown.contains("so far"), "the number of rows is not final: {shown}");
}

#[test]
fn a_canary_that_is_held_says_how_many_failed_and_how_to_go_on() {
    let mut world = World::new("csv");
    world.script(|_| Reply::Status(404));
    world.set("canary.enabled", true).set("canary.min_rows", 100).set("canary.messages", 50);
    world.set("destinations.support.storm.percent", 0);
    world.drop_file(Input::csv("wrong.csv", 2_000).all(Kind::Cancelled)).start_ready();
    let file = wait_for(LIVENESS, "the file to be held", || {
        let file = status(&world)["open_files"][0]["ceiling"].clone();
        // The daemon notes its last error once a second.
        (text(&file).starts_with("canary held: ") && file["last_error"]["status"] == 404).then_some(file)
    });
    assert!(text(&file).starts_with("canary held: 100 % of the first "), "{file}");
    assert!(text(&file).contains("status 404"), "{file}");
    let remedy = file["remedy"].as_str().expect("there is one");
    assert!(
        remedy.contains("dead summary --file wrong.csv") && remedy.contains("release wrong.csv"),
        "{remedy}"
    );
    assert_eq!(world.file("wrong.csv").expect("it is known")["stage"], "held");
}

#[test]
fn a_file_that_will_not_be_done_in_time_says_so() {
    let mut world = World::new("csv");
    let by = SystemTime::now() + Duration::from_secs(20);
    world.receive(&[]).set("feeds.alerts.finish_by", humantime::format_rfc3339_millis(by).to_string());
    world.set("destinations.support.rate_per_s", 20).set("destinations.support.burst", 1);
    world.drop_file(Input::csv("late.csv", 4_000).all(Kind::Cancelled)).start_ready();
    wait_until(LIVENESS, "it to be said", || {
        world.postrider(&["files"]).ok().stdout.contains("will not be done by ")
    });
    let file = wait_for(LIVENESS, "an estimate", || {
        let file = world.file("late.csv").expect("it is known");
        file["left_s"].as_u64().is_some_and(|left| left > 60).then_some(file)
    });
    assert_eq!(file["ceiling"]["in_time"], false, "{file}");
    assert!(file["terms"]["finish_by"].is_string(), "{file}");
    wait_until(LIVENESS, "the rate to be met", || {
        world.postrider(&["advise"]).ok().stdout.starts_with("support: rate_per_s = 20\n")
    });
    let advice = world.postrider(&["advise"]).ok().stdout;
    assert!(advice.contains("requests in flight"), "{advice}");
}
