//! Why is it not going? What `postrider status` says of the whole, of a destination and of a file: the setting or fact behind
//! it, the last error, and what to do.

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
