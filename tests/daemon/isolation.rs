//! What a receiver, or a slip of the operator, can't do to the messages of others, and to its own.

use std::{
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use postrider_actors::testing::figure;
use rustix::process::Signal;

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind},
    knob,
    scripted::Reply,
    wait_for, wait_until,
};

/// `postrider status --json` of one destination.
fn status(world: &World, destination: &str) -> serde_json::Value {
    world.postrider(&["status", "--json", "--sample-ms", "0"]).ok().json()["destinations"][destination]
        .clone()
}

fn sent(world: &World, file: &str, destination: &str) -> u64 {
    world.file(file).and_then(|file| file["destinations"][destination]["sent"].as_u64()).unwrap_or(0)
}

/// How long a file takes from its drop until all its messages are sent.
fn time_of(world: &mut World, feed: &str, name: &str, rows: usize) -> Duration {
    let begun = Instant::now();
    world.drop_into(feed, Input::csv(name, rows));
    wait_until(LIVENESS, name, || sent(world, name, feed) == rows as u64);
    begun.elapsed()
}

#[test]
fn f69_destinations_that_hang_or_are_limited_do_not_slow_another() {
    const ROWS: usize = 3_000;
    let mut world = World::new("csv");
    world.receive(&["--latency-ms", "20"]);
    // Connections are made, and nothing ever answers.
    let hole = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = hole.local_addr().expect("it is bound");
    world.add_destination("quick").add_feed("quick", "csv", &["quick"]);
    world.set("destinations.quick.concurrency", 32);
    for nth in 0..8 {
        let name = format!("limited{nth}");
        world.add_destination(&name).add_feed(&name, "csv", &[&name]);
        world
            .set(&format!("destinations.{name}.rate_per_s"), 5)
            .set(&format!("destinations.{name}.burst"), 5);
    }
    for (name, concurrency) in [("hanging", "\"auto\""), ("greedy", "512")] {
        world.add_destination(name).add_feed(name, "csv", &[name]);
        world.set(&format!("destinations.{name}.url"), format!("http://{address}/{name}"));
        let value: toml::Table = toml::from_str(&format!("value = {concurrency}")).expect("it is TOML");
        world.set(&format!("destinations.{name}.concurrency"), value["value"].clone());
    }
    world.start_ready();
    let alone = time_of(&mut world, "quick", "alone.csv", ROWS);
    for name in (0..8).map(|nth| format!("limited{nth}")).chain(["hanging".into(), "greedy".into()]) {
        world.drop_into(&name, Input::csv(&format!("{name}.csv"), 2_000));
    }
    world.wait_requests(ROWS + 8 * 5);
    let beside = time_of(&mut world, "quick", "beside.csv", ROWS);
    assert!(beside <= alone * 2 + Duration::from_secs(2), "{beside:?}, {alone:?} alone");
    assert_eq!(sent(&world, "greedy.csv", "greedy") + sent(&world, "hanging.csv", "hanging"), 0);
    figure(format!("{ROWS} messages: {alone:.1?} alone, {beside:.1?} beside ten that hang or are limited"));
    drop(hole);
}

#[test]
fn f44_while_everything_fails_few_requests_go_and_no_message_grows_older() {
    let mut world = World::new("csv");
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = broken.clone();
    world.script(move |_| Reply::Status(if is_broken.load(Ordering::SeqCst) { 500 } else { 200 }));
    world
        .set("destinations.support.concurrency", "auto")
        .set("destinations.support.retry.max_age", "10s")
        .drop_file(Input::csv("outage.csv", 3_000).all(Kind::Sent))
        .start();
    world.daemon().wait_log("its circuit breaker is open");
    thread::sleep(Duration::from_secs(1));
    let opened = world.request_count();
    assert!(opened <= 60, "{opened} requests until it was open");
    thread::sleep(Duration::from_secs(18));
    let probes = world.request_count() - opened;
    assert!((1..=20).contains(&probes), "{probes} in 18 s");
    let shown = status(&world, "support");
    assert!(shown["out_since"].is_string() && shown["dead"] == 0, "{shown}");
    broken.store(false, Ordering::SeqCst);
    world.daemon().wait_log("the destination is back");
    let back = Instant::now();
    world.wait_settled(LIVENESS);
    let back = back.elapsed();
    world.stop();
    world.prove();
    figure(format!(
        "{opened} requests until the breaker opened, {probes} in 18 s after it, 3,000 messages sent {back:.1?} after the end"
    ));
}

/// `POSTRIDER_OUTAGE_S=300 POSTRIDER_ROWS=100000` for an outage of five minutes.
#[test]
fn f44_ten_seconds_after_an_outage_the_full_rate_is_back() {
    let rows = knob("POSTRIDER_ROWS", 40_000) as usize;
    let outage = Duration::from_secs(knob("POSTRIDER_OUTAGE_S", 12));
    let mut world = World::new("csv");
    let broken = Arc::new(AtomicBool::new(false));
    let is_broken = broken.clone();
    world.script(move |_| {
        thread::sleep(Duration::from_millis(20));
        Reply::Status(if is_broken.load(Ordering::SeqCst) { 500 } else { 200 })
    });
    world
        .set("destinations.support.concurrency", "auto")
        .set("destinations.support.concurrency_max", 48)
        .drop_file(Input::csv("outage.csv", rows).all(Kind::Sent))
        .start();
    world.wait_requests(2_000);
    let rate = |world: &World, seconds| {
        let (before, begun) = (world.request_count(), Instant::now());
        thread::sleep(Duration::from_secs(seconds));
        (world.request_count() - before) as f64 / begun.elapsed().as_secs_f64()
    };
    let full = rate(&world, 4);
    broken.store(true, Ordering::SeqCst);
    world.daemon().wait_log("its circuit breaker is open");
    let opened = world.request_count();
    thread::sleep(outage);
    let meanwhile = world.request_count() - opened;
    assert!((1..=200).contains(&meanwhile), "{meanwhile} requests in {outage:?}");
    assert_eq!(status(&world, "support")["dead"], 0);
    broken.store(false, Ordering::SeqCst);
    let back = Instant::now();
    let mut again = 0.0;
    while again < 0.9 * full && back.elapsed() < LIVENESS {
        again = rate(&world, 1);
    }
    let took = back.elapsed();
    figure(format!(
        "{meanwhile} requests in an outage of {} s, {again:.0}/s of {full:.0}/s after {:.1} s",
        outage.as_secs(),
        took.as_secs_f64()
    ));
    println!("{full:.0}/s, {meanwhile} requests in {outage:?}, {again:.0}/s {took:?} after it");
    assert!(took <= Duration::from_secs(11), "{again}/s of {full}/s after {took:?}");
    world.wait_settled(LIVENESS * 4);
    world.stop();
    world.prove();
}

#[test]
fn f38_a_retry_after_holds_all_messages_of_its_destination_and_those_of_no_other() {
    const PAUSE: Duration = Duration::from_secs(4);
    let mut world = World::new("csv");
    let busy = Arc::new(AtomicBool::new(true));
    world.script(move |request| match request.path.as_str() {
        "/support" if busy.swap(false, Ordering::SeqCst) => Reply::Header(429, "retry-after", "4".into()),
        _ => Reply::Status(200),
    });
    world
        .add_destination("other")
        .add_feed("other", "csv", &["other"])
        .set("destinations.support.rate_per_s", 100)
        .set("destinations.support.burst", 1)
        .set("destinations.other.rate_per_s", 100)
        .drop_file(Input::csv("paused.csv", 300).all(Kind::Sent))
        .drop_into("other", Input::csv("other.csv", 600).all(Kind::Sent))
        .start()
        .wait_settled(LIVENESS);
    let at = |path: &str| -> Vec<Instant> {
        world.requests().iter().filter(|request| request.path == path).map(|request| request.at).collect()
    };
    let of_it = at("/support");
    // What was on its way when the answer came is not held back.
    let after = of_it.iter().filter(|at| **at > of_it[0] + Duration::from_millis(500));
    let first = *after.min().expect("it goes on") - of_it[0];
    assert!(first >= PAUSE && first < PAUSE + Duration::from_secs(3), "{first:?}");
    let meanwhile = at("/other").iter().filter(|at| **at > of_it[0] && **at < of_it[0] + PAUSE).count();
    assert!(meanwhile >= 200, "{meanwhile} to the other one");
    world.stop();
    world.prove();
}

#[test]
fn f45_what_a_receiver_can_bear_is_found_again_after_its_latency_has_changed() {
    let mut world = World::new("csv");
    let latency_ms = Arc::new(AtomicU64::new(20));
    let waits = latency_ms.clone();
    world.script(move |_| {
        thread::sleep(Duration::from_millis(waits.load(Ordering::SeqCst)));
        Reply::Status(200)
    });
    world
        .set("destinations.support.concurrency", "auto")
        .set("destinations.support.concurrency_max", 64)
        .drop_file(Input::csv("slow.csv", 40_000))
        .start();
    world.wait_requests(500);
    let rate = |world: &World| {
        let (before, begun) = (world.request_count(), Instant::now());
        thread::sleep(Duration::from_secs(3));
        (world.request_count() - before) as f64 / begun.elapsed().as_secs_f64()
    };
    let quick = rate(&world);
    latency_ms.store(400, Ordering::SeqCst);
    thread::sleep(Duration::from_secs(4));
    let slow = rate(&world);
    let permits = status(&world, "support")["permits"].as_u64().expect("it is shown");
    latency_ms.store(20, Ordering::SeqCst);
    thread::sleep(Duration::from_secs(3));
    let again = rate(&world);
    assert!(slow >= 0.7 * 64.0 / 0.4, "a far receiver gets all permits: {slow}/s");
    assert!(again >= 0.7 * quick, "{again}/s, {quick}/s before");
    figure(format!(
        "{quick:.0}/s at 20 ms, {slow:.0}/s at 400 ms with {permits} permits, {again:.0}/s at 20 ms again"
    ));
}

#[test]
fn f68_a_wrong_secret_pauses_its_destination_and_kills_nothing() {
    const ROWS: usize = 2_000;
    let mut world = World::new("csv");
    let wrong = Arc::new(AtomicBool::new(true));
    let is_wrong = wrong.clone();
    world.script(move |_| Reply::Status(if is_wrong.load(Ordering::SeqCst) { 401 } else { 200 }));
    world
        .set("destinations.support.concurrency", "auto")
        .drop_file(Input::csv("secret.csv", ROWS).all(Kind::Sent))
        .start();
    world.daemon().wait_log("suspect configuration");
    let shown = wait_for(LIVENESS, "the destination to be disabled", || {
        let shown = status(&world, "support");
        (shown["state"] == "disabled").then_some(shown)
    });
    assert!(shown["disabled_reason"].as_str().is_some_and(|why| why.contains("status 401")), "{shown}");
    thread::sleep(Duration::from_secs(2));
    let requests = world.request_count();
    assert!(requests <= 500, "{requests}");
    assert_eq!(status(&world, "support")["dead"], 0);
    world.daemon().wait_log("alarm raised");
    // A restart does not make it right.
    world.stop();
    world.start_ready();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(world.request_count(), requests);
    wrong.store(false, Ordering::SeqCst);
    world.postrider(&["resume", "support"]).ok();
    world.wait_settled(LIVENESS);
    world.stop();
    // What was refused is in no record: the messages are as if never tried.
    world.unknown = requests;
    assert_eq!(world.prove()["requests"], ROWS + requests, "each is sent once");
}

#[test]
fn f68_a_reload_with_the_right_secret_needs_no_more_than_enabling() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let wrong = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX\n";
    let path = world.path("wrong.secret");
    std::fs::write(&path, wrong).expect("the directory is ours");
    world
        .set("destinations.support.secrets", vec![format!("file:{}", path.display())])
        .drop_file(Input::csv("reloaded.csv", 500).all(Kind::Sent))
        .start_ready();
    world.daemon().wait_log("the destination is disabled");
    world.set("destinations.support.secrets", vec!["env:POSTRIDER_TEST_SECRET"]).configure();
    world.daemon().signal(Signal::HUP);
    world.daemon().wait_log("the new configuration is in use");
    world.postrider(&["resume", "support"]).ok();
    world.wait_settled(LIVENESS);
    assert_eq!(status(&world, "support")["dead"], 0);
    world.stop();
}

#[test]
fn f68_usual_failures_are_no_storm() {
    const ROWS: usize = 1_000;
    let mut world = World::new("csv");
    world.script(|request| {
        let row: usize = request.id.rsplit('_').next().and_then(|row| row.parse().ok()).expect("ids end so");
        Reply::Status(if row.is_multiple_of(10) { 404 } else { 200 })
    });
    let mut input = Input::csv("usual.csv", ROWS).all(Kind::Sent);
    (9..ROWS).step_by(10).for_each(|row| input.rows[row].kind = Kind::Dead);
    world.drop_file(input).start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], ROWS);
}
