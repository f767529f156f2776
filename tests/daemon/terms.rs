//! When a file's messages may go: windows, `not_before`, and the end of their time, whatever holds them.

use std::{
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;

use crate::{
    clock::Wall,
    support::{
        LIVENESS, World,
        input::{Input, Kind},
        knob,
        scripted::{Reply, Request},
        unix_ms, wait_report, wait_until,
    },
};

const DAY_S: u64 = 86_400;

/// Open messages; `POSTRIDER_ROWS=1000000` for all of what is asked for.
fn rows() -> usize {
    knob("POSTRIDER_ROWS", 20_000) as usize
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later")
}

fn counts(world: &World, name: &str) -> Value {
    world.file(name).expect("it is known")["destinations"]["support"].clone()
}

fn wait_ingested(world: &World, name: &str) {
    wait_until(LIVENESS * 2, "the file to be read", || {
        world.file(name).is_some_and(|file| file["state"] == "ingested")
    });
}

#[test]
fn b11_what_is_not_sent_in_time_is_unsent_while_its_destination_is_paused_across_a_kill() {
    let mut world = World::new("csv");
    world.receive(&[]).set("feeds.alerts.expires_after", "12s").set("outbox.high_watermark", 10_000_000);
    world.start_ready();
    world.postrider(&["pause", "support"]).ok();
    world.drop_file(Input::csv("late.csv", rows()).all(Kind::Unsent));
    wait_ingested(&world, "late.csv");
    assert_eq!(counts(&world, "late.csv")["unsent"], 0);
    world.kill();
    world.start_ready().wait_settled(LIVENESS);
    let counts = counts(&world, "late.csv");
    assert_eq!((&counts["unsent"], &counts["sent"]), (&rows().into(), &0.into()), "{counts}");
    let report = wait_report(&world.done("late.csv"));
    assert_eq!((&report["balanced"], &report["complete"]), (&true.into(), &true.into()));
    world.postrider(&["resume", "support"]).ok();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(world.request_count(), 0);
    let status = world.postrider(&["status", "--json"]).ok().stdout;
    assert!(status.contains(&format!("\"unsent\": {}", rows())), "{status}");
    world.stop();
    world.prove();
}

#[test]
fn b11_within_a_second_after_its_time_nothing_more_of_a_file_goes() {
    let mut world = World::new("csv");
    world.receive(&[]).set("feeds.alerts.expires_after", "6s").set("outbox.high_watermark", 10_000_000);
    world.set("destinations.support.rate_per_s", 200).set("destinations.support.burst", 20);
    world.drop_file(Input::csv("slow.csv", rows()).all(Kind::Unsent)).start_ready();
    wait_until(LIVENESS, "the file to be known", || world.file("slow.csv").is_some());
    let expires_at = unix_ms(&world.file("slow.csv").unwrap()["terms"]["expires_at"]);
    let left = Duration::from_millis(expires_at + 1_000).saturating_sub(since_epoch());
    thread::sleep(left);
    let at_once = world.request_count();
    assert!(at_once > 0, "some went before");
    thread::sleep(Duration::from_secs(2));
    assert_eq!(world.request_count(), at_once, "more than a second after");
    world.wait_settled(LIVENESS * 2);
    let counts = counts(&world, "slow.csv");
    let (sent, unsent) = (counts["sent"].as_u64().unwrap(), counts["unsent"].as_u64().unwrap());
    assert_eq!((sent + unsent, sent), (rows() as u64, at_once as u64), "{counts}");
    world.stop();
    world.prove();
}

/// A wall clock of the daemon's own: it shows so many seconds after the midnight of `day` days ahead when it is set. A
/// clock that is set while the daemon runs is not followed at once.
fn show(wall: &Wall, day: u64, second: u64) {
    let midnight = (since_epoch().as_secs() / DAY_S + day) * DAY_S;
    wall.set(&format!("{:+.3}", (midnight + second) as f64 - since_epoch().as_secs_f64()));
}

const OPENS: u64 = 8 * 3_600;
const CLOSES: u64 = 20 * 3_600;

fn with_window(world: &mut World) -> Wall {
    world.set("feeds.alerts.window", "08:00-20:00 UTC").set("destinations.support.retry.max_age", "1h");
    let wall = Wall::of(world);
    let command = wall.command();
    world.under(&command.iter().map(String::as_str).collect::<Vec<_>>());
    wall
}

#[test]
fn b11_a_window_opens_and_closes_within_a_second() {
    let mut world = World::new("csv");
    world.checks_signatures = false;
    world.receive(&[]).add_destination("calm").add_feed("calm", "csv", &["calm"]);
    world.set("destinations.support.rate_per_s", 300).set("destinations.support.burst", 30);
    let wall = with_window(&mut world);
    world.drop_file(Input::csv("early.csv", 5_000).all(Kind::Sent));
    world.drop_into("calm", Input::csv("calm.csv", 100).all(Kind::Sent));
    show(&wall, 1, OPENS - 15);
    let set = Instant::now();
    world.start_ready();
    wait_report(&world.inbox("calm").join("done/calm.csv"));
    wait_ingested(&world, "early.csv");
    assert_eq!(world.request_count(), 100, "its neighbours go");
    assert!(set.elapsed() < Duration::from_secs(14), "the machine is too slow for this: {:?}", set.elapsed());
    while world.request_count() <= 100 {
        assert!(set.elapsed() < LIVENESS, "it never opened");
        thread::sleep(Duration::from_millis(5));
    }
    let opened = set.elapsed();
    println!("opened {opened:?} after the clock was set to 15 s before the window's time");
    assert!(opened > Duration::from_millis(14_900) && opened < Duration::from_secs(16), "{opened:?}");
    world.stop();
    show(&wall, 1, CLOSES - 6);
    let set = Instant::now();
    world.start_ready();
    thread::sleep(Duration::from_secs(7).saturating_sub(set.elapsed()));
    let closed = world.request_count();
    assert!(closed > 400 && closed < 5_000, "some went before: {closed}");
    thread::sleep(Duration::from_secs(2));
    assert_eq!(world.request_count(), closed, "more than a second after it closed");
    world.stop();
    show(&wall, 2, OPENS + 60);
    world.start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

/// Some fail twice, of their message alone: a 503 would hold the whole destination.
fn some_fail_twice(request: &Request) -> Reply {
    match request.earlier {
        0 if request.body.contains("7\",\"data\"") => Reply::Header(425, "retry-after", "20".into()),
        1 => Reply::Header(425, "retry-after", "1".into()),
        _ => Reply::Status(200),
    }
}

#[test]
fn b11_a_message_grows_no_older_while_its_window_is_closed() {
    let mut world = World::new("csv");
    world.script(some_fail_twice);
    let wall = with_window(&mut world);
    show(&wall, 1, CLOSES - 8);
    let set = Instant::now();
    world.drop_file(Input::csv("evening.csv", 100).all(Kind::Sent)).start_ready();
    wait_until(LIVENESS, "most to be sent", || {
        world.file("evening.csv").is_some_and(|file| file["destinations"]["support"]["sent"] == 90)
    });
    thread::sleep(Duration::from_secs(9).saturating_sub(set.elapsed()));
    assert_eq!(world.request_count(), 100);
    world.stop();
    show(&wall, 2, OPENS + 1);
    world.start().wait_settled(LIVENESS);
    assert_eq!(world.request_count(), 120);
    assert_eq!(counts(&world, "evening.csv")["dead"], 0, "twelve hours are no age");
    world.stop();
    world.prove();
}

#[test]
fn b11_nothing_of_a_feed_goes_before_its_time() {
    let mut world = World::new("csv");
    let begins = since_epoch() + Duration::from_secs(8);
    let shown = humantime::format_rfc3339_millis(UNIX_EPOCH + begins).to_string();
    world.receive(&[]).set("feeds.alerts.not_before", shown);
    world.drop_file(Input::csv("later.csv", 500).all(Kind::Sent)).start_ready();
    wait_ingested(&world, "later.csv");
    let closed = world.postrider(&["files", "later.csv"]).stdout;
    assert!(closed.contains("waiting") && closed.contains("not_before = "), "{closed}");
    thread::sleep(begins.saturating_sub(since_epoch() + Duration::from_millis(50)));
    assert_eq!(world.request_count(), 0);
    world.wait_requests(1);
    let late = since_epoch().saturating_sub(begins);
    assert!(late < Duration::from_secs(1), "{late:?} late");
    world.wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

/// Drops `NAME.toml`, as a dropper does before its file.
fn say(world: &World, name: &str, text: &str) {
    let staged = world.staging().join("sidecar");
    std::fs::write(&staged, text).expect("the directory is ours");
    std::fs::rename(staged, world.inbox("alerts").join(format!("{name}.toml"))).expect("one file system");
}

#[test]
fn what_a_sidecar_says_holds_for_its_file_alone_across_a_kill() {
    let mut world = World::new("csv");
    world.receive(&[]).set("feeds.alerts.expires_after", "1h");
    world.start_ready();
    say(&world, "over.csv", "expires_at = 2020-01-01T00:00:00Z\n");
    say(
        &world,
        "later.csv",
        "not_before = \"2099-01-01T08:00:00Z\"\nexpires_at = \"2099-01-02T08:00:00Z\"\n",
    );
    world.drop_file(Input::csv("over.csv", 250).all(Kind::Unsent));
    world.drop_file(Input::csv("later.csv", 250).all(Kind::Ok));
    world.drop_file(Input::csv("plain.csv", 250).all(Kind::Sent));
    for name in ["over.csv", "plain.csv"] {
        wait_report(&world.done(name));
    }
    wait_ingested(&world, "later.csv");
    assert_eq!(counts(&world, "over.csv")["unsent"], 250);
    world.kill();
    world.start_ready();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(world.request_count(), 250, "those of the plain one");
    let terms = world.file("later.csv").unwrap()["terms"].clone();
    assert_eq!(terms["not_before"], "2099-01-01T08:00:00.000Z", "{terms}");
    let plain = world.file("plain.csv").unwrap();
    let after = unix_ms(&plain["terms"]["expires_at"]) - unix_ms(&plain["claimed_at"]);
    assert_eq!(after, 3_600_000);
    for name in ["over.csv", "later.csv"] {
        assert!(world.done(&format!("{name}.toml")).exists(), "it went with its file");
    }
    world.postrider(&["cancel", "later.csv"]).ok();
    world.stop();
}

#[test]
fn a_wrong_sidecar_holds_its_file_alone_until_it_is_corrected() {
    let mut world = World::new("csv");
    world.receive(&[]).start_ready();
    say(&world, "a.csv", "windw = \"08:00-20:00 UTC\"\n");
    world.drop_file(Input::csv("a.csv", 100).all(Kind::Sent));
    world.drop_file(Input::csv("b.csv", 100).all(Kind::Sent));
    wait_report(&world.done("b.csv"));
    let why = "a.csv.toml:1:1: windw: unknown key; did you mean `window`?";
    wait_until(LIVENESS, "the reason", || {
        world.postrider(&["files", "a.csv"]).stdout.contains("did you mean")
    });
    let files = world.postrider(&["files", "a.csv", "--json"]).ok().stdout;
    let files: Value = serde_json::from_str(&files).expect("it is JSON");
    assert_eq!((&files[0]["state"], files[0]["reason"].as_str()), (&"held".into(), Some(why)), "{files}");
    let status = world.postrider(&["status"]).ok().stdout;
    assert!(status.contains("a.csv"), "{status}");
    assert!(world.inbox("alerts").join("a.csv").exists());
    assert_eq!(world.request_count(), 100);
    let answer = world.postrider(&[
        "preflight",
        "--feed",
        "alerts",
        &world.inbox("alerts").join("a.csv").display().to_string(),
    ]);
    assert!(answer.code == Some(1) && answer.stdout.contains("unknown key"), "{}", answer.stdout);
    say(&world, "a.csv", "window = \"00:00-24:00 UTC\"\n");
    let corrected = Instant::now();
    wait_report(&world.done("a.csv"));
    assert!(corrected.elapsed() < Duration::from_secs(10), "{:?}", corrected.elapsed());
    world.wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn a_file_s_rate_is_kept_and_keeps_no_other_file_away() {
    let mut world = World::new("csv");
    world.receive(&[]).start_ready();
    say(&world, "slow.csv", "rate_per_s = 50\n");
    world.drop_file(Input::csv("slow.csv", 5_000).all(Kind::Cancelled));
    wait_until(LIVENESS, "some to be sent", || world.request_count() >= 50);
    let (begun, before) = (Instant::now(), world.request_count());
    thread::sleep(Duration::from_secs(6));
    let sent = (world.request_count() - before) as f64 / begun.elapsed().as_secs_f64();
    println!("{sent:.1} messages per second");
    assert!((45.0..=51.5).contains(&sent), "{sent}");
    world.drop_file(Input::csv("small.csv", 100).all(Kind::Sent));
    let dropped = Instant::now();
    wait_report(&world.done("small.csv"));
    assert!(dropped.elapsed() < Duration::from_secs(8), "it waited {:?} behind the other", dropped.elapsed());
    world.postrider(&["cancel", "slow.csv"]).ok();
    world.wait_settled(LIVENESS);
    world.stop();
    world.prove();
}
