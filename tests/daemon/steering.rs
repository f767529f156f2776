//! What an operator orders while messages are on their way: it holds within a second, whatever waits, and across kills.

use std::{
    collections::BTreeMap,
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use postrider_actors::{
    model::{
        file::FileState,
        outcome::{Attempt, DeathCause, Reason, Verdict},
        time::{MonoMs, UnixMs},
    },
    ports::{LeaseRequest, Ledger as _, Outbox as _, Queue as _, Settlement, Want},
    testing::{figure, fixtures},
};
use postrider_sqlite::EmbeddedStore;
use rustix::process::Signal;
use serde_json::json;

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind},
    knob, wait_report, wait_until,
};

/// Failpoints that are tested here.
pub(crate) const POINTS: &[&str] = &["redrive.step"];

/// Open messages; `POSTRIDER_ROWS=1000000` for all of what is asked for.
fn rows() -> usize {
    knob("POSTRIDER_ROWS", 20_000) as usize
}

/// A file of many rows behind a rate that would take minutes, read to its end and on its way.
fn on_its_way(name: &str) -> World {
    let mut world = World::new("csv");
    world.receive(&[]).add_destination("calm").add_feed("calm", "csv", &["calm"]);
    world.set("destinations.support.rate_per_s", 200).set("destinations.support.burst", 20);
    world.set("outbox.high_watermark", 10_000_000);
    world.drop_file(Input::csv(name, rows()).all(Kind::Cancelled)).start_ready();
    wait_until(LIVENESS * 2, "the file to be read", || {
        world.file(name).is_some_and(|file| file["state"] == "ingested")
    });
    world.wait_requests(50);
    world
}

/// Requests that came more than a second after `order` was given, of what is on its way to `support`.
fn ordered(world: &World, order: &[&str]) -> usize {
    let begun = Instant::now();
    world.postrider(order).ok();
    println!("{order:?}: the command took {:?}", begun.elapsed());
    thread::sleep(Duration::from_secs(1).saturating_sub(begun.elapsed()));
    let at_once = world.request_count();
    thread::sleep(Duration::from_secs(2));
    world.request_count() - at_once
}

#[test]
fn b11_a_held_file_stops_within_a_second_across_a_kill_and_goes_on_when_it_is_released() {
    let mut world = on_its_way("held.csv");
    assert_eq!(ordered(&world, &["hold", "held.csv", "--reason", "the template is wrong"]), 0);
    world.kill();
    world.start_ready();
    let before = world.request_count();
    world.drop_into("calm", Input::csv("calm.csv", 100).all(Kind::Sent));
    wait_report(&world.inbox("calm").join("done/calm.csv"));
    assert_eq!(world.request_count(), before + 100, "it outlasts the kill");
    let shown = world.postrider(&["files", "held.csv"]).stdout;
    assert!(shown.contains("the template is wrong"), "{shown}");
    world.postrider(&["release", "held.csv"]).ok();
    let released = Instant::now();
    world.wait_requests(before + 100 + 50);
    assert!(released.elapsed() < Duration::from_secs(3), "{:?}", released.elapsed());
    assert_eq!(ordered(&world, &["cancel", "held.csv"]), 0);
    world.wait_settled(LIVENESS);
    world.stop();
    world.unknown = world.window();
    world.prove();
}

#[test]
fn b11_a_cancelled_file_stops_within_a_second_balances_and_is_never_sent_across_a_kill() {
    let mut world = on_its_way("wrong.csv");
    assert_eq!(ordered(&world, &["cancel", "wrong.csv", "--reason", "the wrong list"]), 0);
    world.kill();
    world.start_ready();
    world.wait_settled(LIVENESS);
    let counts = world.file("wrong.csv").expect("it is known")["destinations"]["support"].clone();
    let (sent, cancelled) = (counts["sent"].as_u64().unwrap(), counts["cancelled"].as_u64().unwrap());
    assert_eq!(sent + cancelled, rows() as u64, "{counts}");
    assert!(sent >= 50 && cancelled > 0, "{counts}");
    let again = world.postrider(&["cancel", "wrong.csv"]);
    assert!(again.stdout.contains("wrong.csv"), "{}", again.stdout);
    wait_report(&world.done("wrong.csv"));
    world.stop();
    world.unknown = world.window();
    world.prove();
}

#[test]
fn every_order_leaves_a_line_and_a_name_that_nobody_has_is_refused() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.drop_file(Input::csv("a.csv", 10).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.stop();
    for order in [["pause", "support"], ["resume", "support"], ["resume", "support"], ["hold", "a.csv"]] {
        world.postrider(&order).ok();
    }
    world.postrider(&["release", "a.csv"]).ok();
    for wrong in [["pause", "nobody"], ["hold", "nobody.csv"], ["cancel", "nobody.csv"]] {
        let answer = world.postrider(&wrong);
        assert_eq!(answer.code, Some(1), "{wrong:?}: {}", answer.stderr);
        assert!(answer.stderr.contains("is called"), "{}", answer.stderr);
    }
    let lines: Vec<serde_json::Value> =
        serde_json::from_str(&world.postrider(&["audit", "--json"]).ok().stdout).expect("it is JSON");
    let orders: Vec<_> = lines.iter().map(|line| line["order"].as_str().expect("a word")).collect();
    assert_eq!(orders, ["release", "hold", "resume", "pause"], "what changed nothing leaves no line");
    assert!(lines.iter().all(|line| line["by"].as_str().is_some_and(|by| !by.is_empty())), "{lines:?}");
    world.prove();
}

/// The fewest and the most requests in any second within `from_ms..to_ms`, cut anywhere, in steps of 20 ms.
fn in_a_second(times: &[u64], from_ms: u64, to_ms: u64) -> (usize, usize) {
    let before = |at: u64| times.partition_point(|&time| time < at);
    let windows = (from_ms..=to_ms - 1_000).step_by(20).map(|from| before(from + 1_000) - before(from));
    let (fewest, most) = windows.fold((usize::MAX, 0), |(min, max), count| (min.min(count), max.max(count)));
    (fewest, most)
}

fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later").as_millis() as u64
}

/// Gives an order, and lets `seconds` pass after it; from when on it must hold, and until when it was left to.
fn set(world: &World, order: &[&str], seconds: u64) -> (u64, u64) {
    let begun = wall_ms();
    world.postrider(order).ok();
    thread::sleep(Duration::from_millis(1_000 * (1 + seconds)));
    (begun + 1_000, wall_ms())
}

/// `POSTRIDER_SECONDS=60` for all of what is asked for. Only then it is asked that the machine keeps up.
#[test]
fn s5_a_rate_holds_in_every_second_and_one_that_is_set_holds_within_a_second_across_a_kill_and_a_reload() {
    const BURST: u16 = 50;
    let seconds = knob("POSTRIDER_SECONDS", 8);
    let least = |count: usize| if seconds < 60 { count / 4 } else { count };
    let mut world = World::new("csv");
    world.receive(&[]).set("destinations.support.concurrency", 64);
    world.set("destinations.support.rate_per_s", 1_000).set("destinations.support.burst", i64::from(BURST));
    world.set("outbox.high_watermark", 10_000_000);
    let rows = 1_000 * (seconds as usize + 20);
    world.drop_file(Input::csv("steady.csv", rows).all(Kind::Cancelled)).start_ready();
    world.wait_requests(500);
    let from = wall_ms();
    thread::sleep(Duration::from_secs(seconds));
    let (fewest, most) = in_a_second(&world.request_times(), from, wall_ms());
    assert!(
        fewest >= least(950) && most <= 1_000 + usize::from(BURST),
        "{fewest} to {most} requests per second"
    );
    figure(format!("{seconds} s at 1000/s: {fewest} to {most} requests in any second"));

    let (from, to) = set(&world, &["rate", "support", "200"], 2);
    let (fewest, most) = in_a_second(&world.request_times(), from, to);
    assert!(
        fewest >= least(190) && most <= 205,
        "{fewest} to {most} requests per second, a second after `rate support 200`"
    );
    let (from, to) = set(&world, &["rate", "support", "700"], 2);
    let (fewest, most) = in_a_second(&world.request_times(), from, to);
    assert!(
        fewest >= least(650) && most <= 705,
        "{fewest} to {most} requests per second, a second after `rate support 700`"
    );
    set(&world, &["rate", "support", "100"], 0);

    world.kill();
    world.start_ready();
    thread::sleep(Duration::from_secs(3));
    let now = wall_ms();
    let (_, most) = in_a_second(&world.request_times(), now - 2_000, now);
    assert!(most <= 100 + usize::from(BURST), "{most} requests per second, after a kill");
    world.set("destinations.support.rate_per_s", 500).configure();
    world.daemon().signal(Signal::HUP);
    thread::sleep(Duration::from_secs(1));
    let now = wall_ms();
    thread::sleep(Duration::from_secs(2));
    let (fewest, most) = in_a_second(&world.request_times(), now, now + 2_000);
    assert!(fewest >= least(90) && most <= 105, "{fewest} to {most} requests per second, after a reload");
    let shown = world.postrider(&["destinations", "--json"]).json()[0].clone();
    assert_eq!((&shown["rate_per_s"], &shown["rate_set"]), (&json!(100), &json!(true)));
    let status = world.postrider(&["status", "--sample-ms", "0"]).stdout;
    assert!(status.contains("100 (set)"), "{status}");

    let (from, to) = set(&world, &["rate", "support", "default"], 2);
    let (fewest, most) = in_a_second(&world.request_times(), from, to);
    assert!(
        fewest >= least(470) && most <= 505,
        "{fewest} to {most} requests per second, as configured again"
    );
    let again = world.postrider(&["rate", "support", "default"]).ok().stdout;
    assert!(again.contains("already"), "{again}");
    let lines = world.postrider(&["audit", "--json"]).json();
    let said: Vec<_> = lines.as_array().expect("lines").iter().map(|line| &line["detail"]).collect();
    assert_eq!(said, ["default", "100", "700", "200"]);
    assert!(
        lines
            .as_array()
            .expect("lines")
            .iter()
            .all(|line| line["order"] == "rate" && line["of"] == "support")
    );
    world.postrider(&["cancel", "steady.csv"]).ok();
    world.wait_settled(LIVENESS);
    world.stop();
    world.unknown = world.window();
    world.prove();
}

/// A receiver that takes 100 ms: ten requests per second for each that may be in flight.
#[test]
fn what_may_be_in_flight_is_set_within_a_second_across_a_kill_and_a_reload() {
    let mut world = World::new("csv");
    world.receive(&["--latency-ms", "100"]).set("destinations.support.concurrency", 16);
    world.set("outbox.high_watermark", 10_000_000);
    world.drop_file(Input::csv("steady.csv", 20_000).all(Kind::Cancelled)).start_ready();
    world.wait_requests(100);
    let (from, to) = set(&world, &["concurrency", "support", "4"], 2);
    let (fewest, most) = in_a_second(&world.request_times(), from, to);
    assert!(fewest >= 25 && most <= 44, "{fewest} to {most} requests per second with 4 in flight");
    let status = world.postrider(&["status", "--sample-ms", "0"]).stdout;
    assert!(status.contains("4 (set)"), "{status}");
    world.kill();
    world.start_ready();
    thread::sleep(Duration::from_secs(1));
    world.set("destinations.support.concurrency", 32).configure();
    world.daemon().signal(Signal::HUP);
    thread::sleep(Duration::from_secs(1));
    let now = wall_ms();
    thread::sleep(Duration::from_secs(2));
    let (fewest, most) = in_a_second(&world.request_times(), now, now + 2_000);
    assert!(fewest >= 25 && most <= 44, "{fewest} to {most} requests per second after a kill and a reload");
    let (from, to) = set(&world, &["concurrency", "support", "12"], 2);
    let (fewest, most) = in_a_second(&world.request_times(), from, to);
    assert!(most > 44 && most <= 132, "{fewest} to {most} requests per second with 12 in flight");
    let (from, to) = set(&world, &["concurrency", "support", "default"], 2);
    let (fewest, most) = in_a_second(&world.request_times(), from, to);
    assert!(most > 132 && most <= 352, "{fewest} to {most} requests per second as configured");
    world.postrider(&["concurrency", "support", "auto"]).ok();
    let shown = world.postrider(&["destinations", "--json"]).json()[0].clone();
    assert_eq!((&shown["concurrency"], &shown["concurrency_set"]), (&json!("auto"), &json!(true)));
    let refused = world.postrider(&["concurrency", "support", "0"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    world.postrider(&["cancel", "steady.csv"]).ok();
    world.wait_settled(LIVENESS);
    world.stop();
    world.unknown = world.window();
    world.prove();
}

#[test]
fn a_reload_is_waited_for_and_what_is_refused_says_where() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.configure();
    let nobody = world.postrider(&["reload"]);
    assert_eq!(nobody.code, Some(1), "{}", nobody.stderr);
    assert!(nobody.stderr.contains("no daemon runs"), "{}", nobody.stderr);
    world.start_ready();
    let in_use = |world: &World| world.daemon_log_text().matches("the new configuration is in use").count();
    world.set("destinations.support.rate_per_s", 70).configure();
    let used = world.postrider(&["reload"]).ok();
    assert!(used.stdout.contains("is in use"), "{}", used.stdout);
    assert_eq!(in_use(&world), 1, "it has waited");

    world.set("destinations.support.rate_pers", 70).configure();
    let refused = world.postrider(&["reload"]);
    assert_eq!(refused.code, Some(78), "{}", refused.stderr);
    for said in [
        "the old one stays",
        "postrider.toml:",
        "destinations.support.rate_pers",
        "did you mean",
        "rate_per_s",
    ] {
        assert!(refused.stderr.contains(said), "{said}: {}", refused.stderr);
    }
    assert_eq!(in_use(&world), 1);
    world.unset("destinations.support.rate_pers").configure();
    let mut others: Vec<_> = (0..3).map(|_| world.command(&["reload"]).spawn().expect("it starts")).collect();
    world.postrider(&["reload"]).ok();
    for other in &mut others {
        assert!(other.wait().expect("it ends").success(), "each that asks is answered");
    }
    assert!((2..=5).contains(&in_use(&world)));
    let lines = world.postrider(&["audit", "--json"]).json();
    let reloads: Vec<_> =
        lines.as_array().expect("lines").iter().filter(|line| line["order"] == "reload").collect();
    assert_eq!(reloads.len(), 5, "{lines}");
    world.drop_file(Input::csv("a.csv", 10).all(Kind::Sent)).wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

/// A store with so many dead letters at `support`, of a file of no feed.
fn make_dead(world: &World, rows: u64) {
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let (now, file) = (UnixMs(wall_ms()), fixtures::file("gone", 1, &["support"]));
    fs::create_dir_all(world.state()).expect("the directory is ours");
    let store =
        EmbeddedStore::open(&world.state(), Arc::new(|error| panic!("fatal: {error}"))).expect("a new store");
    let want = Want::new("support", usize::MAX, usize::MAX);
    runtime.block_on(async {
        for first in (1..=rows).step_by(1_000) {
            let last = rows.min(first + 999);
            let mut step = fixtures::step(&file, first..=last, now);
            if last == rows {
                step.state = FileState::Ingested;
            }
            store.append(step).await.expect("it is stored");
            let request = LeaseRequest {
                holder: "test".into(),
                wants: vec![want.clone()],
                until: MonoMs(u64::MAX),
                now,
                born: UnixMs(0),
            };
            for lease in store.lease(request).await.expect("it is leased") {
                let attempt = Attempt { at: now, status: 400, reason: Reason::Status };
                let dead = Verdict::Dead { attempt, cause: DeathCause::Permanent };
                let settlement = Settlement {
                    token: lease.token,
                    verdicts: lease.open.iter().map(|open| open.verdict(dead)).collect(),
                    details: BTreeMap::new(),
                    records: Vec::new(),
                    ends: true,
                    begins: None,
                };
                store.settle(vec![settlement]).await.expect("it is recorded");
            }
        }
    });
}

/// `POSTRIDER_ROWS=1000000` for all of what is asked for.
#[test]
fn very_many_dead_letters_are_redriven_within_5_s_beside_the_daemon() {
    let rows = knob("POSTRIDER_ROWS", 50_000);
    let mut world = World::new("csv");
    world.receive(&[]).set("destinations.support.rate_per_s", 1);
    make_dead(&world, rows);
    world.start_ready();
    let counted = world.postrider(&["dead", "redrive", "--status", "400", "--dry-run"]).ok().stdout;
    assert_eq!(counted, format!("{rows} would be redriven\n"));
    let counted = world.postrider(&["dead", "redrive", "--status", "401", "--dry-run", "--json"]).ok().json();
    assert_eq!(counted, json!({ "would_redrive": 0 }));
    let begun = Instant::now();
    let redriven =
        world.postrider(&["dead", "redrive", "--reason", "status", "--older-than", "1ms"]).ok().stdout;
    let took = begun.elapsed();
    assert_eq!(redriven, format!("{rows} redriven\n"));
    assert!(took < Duration::from_secs(5), "{rows} redriven in {took:?}");
    figure(format!("{rows} redriven in {:.1} s", took.as_secs_f64()));
    let lines = world.postrider(&["audit", "--json"]).json();
    assert_eq!(lines[0]["of"], "dead letters --reason status --older-than 1ms", "{lines}");
    assert_eq!(lines[0]["detail"], format!("{rows} redriven"));
    world.wait_requests(1);
    world.stop();
}

#[test]
#[cfg_attr(not(feature = "failpoints"), ignore = "needs --features failpoints")]
fn b6_a_redrive_across_kills_of_the_command_and_of_the_daemon_sends_everything_once_again() {
    const ROWS: usize = 5_000;
    let mut world = World::new("csv");
    world.receive(&["--status", "400"]).set("destinations.support.storm.percent", 0);
    world.drop_file(Input::csv("dead.csv", ROWS).all(Kind::Sent)).start().wait_settled(LIVENESS * 2);
    world.postrider(&["pause", "--all"]).ok();
    let dead = |world: &World| -> u64 {
        world.file("dead.csv").expect("it is known")["destinations"]["support"]["dead"]
            .as_u64()
            .expect("a number")
    };
    assert_eq!(dead(&world), ROWS as u64);
    let mut command = world.command(&["dead", "redrive", "--all"]);
    let mut command =
        command.env("FAILPOINTS", format!("{}=sleep(60000)", POINTS[0])).spawn().expect("it starts");
    wait_until(LIVENESS, "a part to be redriven", || dead(&world) < ROWS as u64);
    thread::sleep(Duration::from_millis(500)); // it sleeps in a step
    command.kill().expect("it runs");
    command.wait().expect("it is gone");
    let left = dead(&world);
    assert!(left > 0, "it was killed half-way");
    let audit = world.postrider(&["audit", "--json"]).ok().json();
    assert_eq!(
        (&audit[0]["of"], &audit[0]["detail"]),
        (&json!("all dead letters"), &json!("begun")),
        "{audit}"
    );
    world.kill();
    let rest = world.postrider(&["dead", "redrive", "--all"]).ok().stdout;
    assert_eq!(rest, format!("{left} redriven\n"));
    world.receive(&[]).start_ready();
    world.postrider(&["resume", "--all"]).ok();
    world.wait_settled(LIVENESS * 2);
    world.stop();
    world.redrives = 1;
    world.prove();
    assert_eq!(world.request_count(), 2 * ROWS, "nothing was in flight when anything was killed");
}

#[test]
fn orders_by_feed_and_for_all_say_how_much_they_are_about() {
    let mut world = World::new("csv");
    world.receive(&[]).add_feed("others", "csv", &["support"]);
    world.set("destinations.support.paused", true);
    world.drop_file(Input::csv("a.csv", 10).all(Kind::Cancelled));
    world.drop_file(Input::csv("b.csv", 20).all(Kind::Cancelled));
    world.drop_into("others", Input::csv("c.csv", 30).all(Kind::Sent)).start_ready();
    wait_until(LIVENESS, "the files to be read", || world.files().len() == 3);
    wait_until(LIVENESS, "the files to be read", || {
        world.files().iter().all(|file| file["state"] == "ingested")
    });
    let said = |order: &[&str]| world.postrider(order).ok().stdout;
    let counted = said(&["hold", "--feed", "alerts", "--dry-run"]);
    assert!(counted.contains("would be held: 2 files, 30 open messages; held at 0"), "{counted}");
    let held = said(&["hold", "--feed", "alerts", "--reason", "wrong"]);
    assert!(held.contains("all of feed alerts are held: 2 files, 30 open messages"), "{held}");
    let again = said(&["hold", "--feed", "alerts"]);
    assert!(again.contains("nothing to do"), "{again}");
    let counted = said(&["release", "--all", "--dry-run"]);
    assert!(counted.contains("would be released: 3 files, 60 open messages; held at 2"), "{counted}");
    let cancelled = said(&["cancel", "--feed", "alerts", "--destination", "support"]);
    assert!(cancelled.contains("cancelled: 2 files, 30 open messages"), "{cancelled}");
    for wrong in [&["hold", "--feed", "nobody"][..], &["hold", "--all", "--destination", "nobody"]] {
        let answer = world.postrider(wrong);
        assert_eq!(answer.code, Some(1), "{}", answer.stderr);
    }
    for wrong in [&["hold"][..], &["hold", "a.csv", "--all"], &["pause"], &["pause", "support", "--all"]] {
        assert_eq!(world.postrider(wrong).code, Some(2), "{wrong:?}");
    }
    let lines = world.postrider(&["audit", "--json"]).json();
    let of: Vec<_> =
        lines.as_array().expect("lines").iter().map(|line| (&line["order"], &line["of"])).collect();
    assert_eq!(
        of,
        [
            (&json!("cancel"), &json!("all of feed alerts at support")),
            (&json!("hold"), &json!("all of feed alerts")),
        ]
    );
    world.set("destinations.support.paused", false).configure();
    world.postrider(&["reload"]).ok();
    world.wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn i4_only_what_was_never_sent_gets_a_new_body() {
    let mut world = World::new("csv");
    world.receive(&["--status", "400"]).set("destinations.support.retry.max_attempts", 1);
    world
        .set("destinations.support.storm.percent", 0)
        .set("destinations.support.template", r#"{"old": {{ row }}}"#);
    world.drop_file(Input::csv("answered.csv", 3).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.receiver().kill();
    world.drop_file(Input::csv("unsent.csv", 3).all(Kind::Sent)).wait_settled(LIVENESS);
    world.set("destinations.support.template", r#"{"new": {{ row }}}"#).configure();
    let redrive = |world: &World, more: &str| {
        world.postrider(&["dead", "redrive", "--rerender", "--all", more]).ok().stdout
    };
    let counted = redrive(&world, "--dry-run");
    assert!(
        counted.starts_with("3 would be redriven with new bodies; 3 may have been received"),
        "{counted}"
    );
    world.receive(&["--log-bodies"]);
    let done = redrive(&world, "--limit=99");
    assert!(done.starts_with("3 redriven with new bodies; 3 may have been received"), "{done}");
    wait_report(&world.done("unsent.csv"));
    world.postrider(&["dead", "redrive", "--all"]).ok();
    world.wait_settled(LIVENESS);
    let bodies =
        |word: &str| world.bodies_of("/support").iter().filter(|body| body.get(word).is_some()).count();
    assert_eq!((bodies("new"), bodies("old")), (3, 3));
    let file = world.file("unsent.csv").expect("it is known")["id"].as_str().expect("an id").to_owned();
    let said = world.postrider(&["messages", "--id", &format!("msg_{file}_1")]).ok().stdout;
    assert!(said.contains("made anew"), "{said}");
    world.stop();
}
