//! Files that share one destination: a small one never waits for a large one, priorities share by weight, retries keep
//! their lane.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use serde_json::Value;

use crate::support::{LIVENESS, World, input::Input, knob, scripted::Reply, unix_ms, wait_until};

/// Rows of a large file; `POSTRIDER_ROWS=1000000` for all of what is asked for.
fn rows() -> usize {
    knob("POSTRIDER_ROWS", 100_000) as usize
}

/// A request: when it was complete, in milliseconds, and its id.
fn requests(world: &World) -> Vec<(u64, String)> {
    let log = fs::read_to_string(world.receiver_log()).expect("the log reads");
    let entry = |line: &str| {
        let entry: Value = serde_json::from_str(line).expect("whole lines");
        (entry["at"].as_u64().expect("its time"), entry["id"].as_str().expect("its id").to_owned())
    };
    log.lines().map(entry).collect()
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("it is after 1970").as_millis() as u64
}

/// The id of a file, which its messages' ids hold.
fn id_of(world: &World, name: &str) -> String {
    world.file(name).expect("it is known")["id"].as_str().expect("an id").to_owned()
}

/// How many of the requests that came between two times were of each of these files.
fn shares(world: &World, names: &[&str], from: u64, until: u64) -> BTreeMap<String, usize> {
    let files: Vec<_> = names.iter().map(|name| ((*name).to_owned(), id_of(world, name))).collect();
    let mut shares: BTreeMap<String, usize> = names.iter().map(|name| ((*name).to_owned(), 0)).collect();
    for (at, id) in requests(world) {
        if (from..until).contains(&at)
            && let Some((name, _)) = files.iter().find(|(_, file)| id.contains(file))
        {
            *shares.get_mut(name).expect("it was put in") += 1;
        }
    }
    shares
}

/// Waits until all of a file is read.
fn wait_read(world: &World, name: &str) {
    wait_until(LIVENESS * 3, &format!("{name} to be read"), || {
        world.file(name).is_some_and(|file| file["state"] == "ingested")
    });
}

/// Drops a small file behind what waits, and how long it takes from when it was read until its last message is recorded as
/// sent.
fn time_of_small(world: &mut World, name: &str) -> Duration {
    world.drop_into("alerts", Input::csv(name, 2));
    let settled = |world: &World| {
        let file = world.file(name)?;
        (file["complete"] == true).then(|| unix_ms(&file["settled_at"]) - unix_ms(&file["claimed_at"]))
    };
    wait_until(LIVENESS, &format!("{name} to be sent"), || settled(world).is_some());
    Duration::from_millis(settled(world).expect("it was just seen"))
}

/// What a daemon that shares one slow destination has: a rate of `rate` and a backlog far beyond it.
fn slow(rate: i64, files: &[&str]) -> World {
    let mut world = World::new("csv");
    world
        .receive(&[])
        .set("destinations.support.rate_per_s", rate)
        .set("destinations.support.burst", rate / 10)
        .set("outbox.high_watermark", 10_000_000)
        .set("outbox.max_backlog", 100_000_000);
    for name in files {
        world.drop_file(Input::csv(name, rows() / files.len()));
    }
    world.start_ready();
    for name in files {
        wait_read(&world, name);
    }
    world
}

#[test]
fn b11_a_small_file_behind_a_large_one_is_out_within_a_second_of_being_read() {
    let mut world = slow(20, &["large.csv"]);
    world.wait_requests(20);
    let times: Vec<_> = (0..5).map(|nth| time_of_small(&mut world, &format!("small{nth}.csv"))).collect();
    println!("two rows behind {} at 20/s: {times:?} from the claim until they are recorded", rows());
    assert!(times.iter().all(|time| *time <= Duration::from_secs(1)), "{times:?}");
    let shown = world.postrider(&["files"]).stdout;
    assert!(shown.contains("normal"), "{shown}");
}

#[test]
fn b11_a_small_file_does_not_wait_behind_a_large_one_for_a_receiver_that_is_slow() {
    let mut world = World::new("csv");
    world
        .receive(&["--latency-ms", "400"])
        .set("destinations.support.concurrency", 8)
        .set("outbox.high_watermark", 10_000_000)
        .drop_file(Input::csv("large.csv", rows()))
        .start_ready();
    wait_read(&world, "large.csv");
    world.wait_requests(16);
    // A request's time is its own.
    let bound = Duration::from_millis(1_000 + 400);
    let times: Vec<_> = (0..5).map(|nth| time_of_small(&mut world, &format!("small{nth}.csv"))).collect();
    println!("two rows behind {} of 8 permits and 400 ms each: {times:?}", rows());
    assert!(times.iter().all(|time| *time <= bound), "{times:?}");
}

#[test]
fn b11_priorities_share_by_weight_and_bulk_is_not_starved() {
    const RATE: i64 = 210;
    const FOR_S: u64 = 10;
    let mut world = World::new("csv");
    world
        .receive(&[])
        .set("destinations.support.rate_per_s", RATE)
        .set("destinations.support.burst", 20)
        .set("outbox.high_watermark", 10_000_000);
    let names = ["urgent", "normal", "bulk"];
    for name in names {
        world.add_feed(name, "csv", &["support"]).set(&format!("feeds.{name}.priority"), name);
        world.drop_into(name, Input::csv(&format!("{name}.csv"), rows() / 3));
    }
    world.start_ready();
    let files = names.map(|name| format!("{name}.csv"));
    let files: Vec<_> = files.iter().map(String::as_str).collect();
    for name in &files {
        wait_read(&world, name);
    }
    thread::sleep(Duration::from_secs(1));
    let from = now_ms();
    thread::sleep(Duration::from_secs(FOR_S + 1));
    let shares = shares(&world, &files, from, from + FOR_S * 1_000);
    println!("{RATE}/s for {FOR_S} s: {shares:?}");
    let all = shares.values().sum::<usize>() as f64;
    for (name, part) in [("urgent.csv", 16.0), ("normal.csv", 4.0), ("bulk.csv", 1.0)] {
        let (share, due) = (shares[name] as f64 / all, part / 21.0);
        assert!((share - due).abs() <= 0.02, "{name}: {share:.3}, {due:.3} is its part");
    }
    assert!(all >= 0.8 * (RATE as u64 * FOR_S) as f64, "{all} in all");
}

#[test]
fn b11_an_ordered_priority_holds_within_a_second_and_across_a_kill() {
    let mut world = slow(200, &["first.csv", "second.csv"]);
    let files = ["first.csv", "second.csv"];
    // How much of the flow is of the second file, a second after now.
    let share = |world: &World| {
        let from = now_ms() + 1_000;
        thread::sleep(Duration::from_secs(5));
        let shares = shares(world, &files, from, from + 3_500);
        println!("{shares:?}");
        shares["second.csv"] as f64 / shares.values().sum::<usize>() as f64
    };
    let even = share(&world);
    assert!((even - 0.5).abs() <= 0.05, "{even}");
    let begun = Instant::now();
    world.postrider(&["priority", "second.csv", "urgent"]).ok();
    println!("{} open messages: the command took {:?}", rows(), begun.elapsed());
    let urgent = share(&world);
    assert!((urgent - 0.8).abs() <= 0.05, "{urgent}");
    world.kill();
    world.start_ready();
    let urgent = share(&world);
    assert!((urgent - 0.8).abs() <= 0.08, "it outlasts the kill: {urgent}");
    world.postrider(&["priority", "second.csv", "bulk", "--destination", "support"]).ok();
    let bulk = share(&world);
    assert!((bulk - 0.2).abs() <= 0.05, "{bulk}");
    let shown = world.postrider(&["files", "second.csv"]).stdout;
    assert!(shown.contains("bulk"), "{shown}");
    let again = world.postrider(&["priority", "second.csv", "bulk"]).ok().stdout.clone();
    assert!(again.contains("was bulk already"), "{again}");
    let wrong = world.postrider(&["priority", "second.csv", "important"]);
    assert!(wrong.code == Some(2) && wrong.stderr.contains("urgent"), "{}", wrong.stderr);
    let lines: Vec<Value> =
        serde_json::from_str(&world.postrider(&["audit", "--json"]).ok().stdout).expect("it is JSON");
    let orders: Vec<_> = lines.iter().map(|line| (&line["order"], &line["detail"])).collect();
    assert_eq!(orders, [(&"priority".into(), &"bulk".into()), (&"priority".into(), &"urgent".into())]);
}

/// Every fifth message fails once. How long after its first attempt each of them was tried again, while first attempts are
/// plenty.
fn waits_for_retries(base: &str, rate: i64, failures: usize) -> Vec<Duration> {
    let failed = Arc::new(AtomicUsize::new(0));
    let counted = failed.clone();
    let nth = AtomicUsize::new(0);
    let mut world = World::new("csv");
    world.script(move |request| {
        let fails = request.earlier == 0
            && nth.fetch_add(1, Ordering::SeqCst).is_multiple_of(5)
            && counted.fetch_add(1, Ordering::SeqCst) < failures;
        Reply::Status(if fails { 503 } else { 200 })
    });
    world
        .set("destinations.support.rate_per_s", rate)
        .set("destinations.support.burst", 1)
        .set("destinations.support.retry.base", base)
        .set("destinations.support.retry.cap", base)
        .set("outbox.high_watermark", 10_000_000)
        .drop_file(Input::csv("large.csv", rows()))
        .start_ready();
    let again = |world: &World| world.requests().iter().filter(|request| request.earlier == 1).count();
    wait_until(LIVENESS * 3, "every failed message to be tried again", || again(&world) >= failures);
    let seen = world.requests();
    let first = |id: &str| {
        let first = seen.iter().find(|request| request.id == id && request.earlier == 0);
        first.expect("it was tried before").at
    };
    let again = seen.iter().filter(|request| request.earlier == 1);
    let mut waits: Vec<_> = again.map(|request| request.at - first(&request.id)).collect();
    waits.sort_unstable();
    waits
}

#[test]
fn b11_a_retry_goes_within_a_second_of_its_time_while_first_attempts_are_plenty() {
    // Full jitter: each is due within the base.
    for (base, base_s, rate) in [("3s", 3, 100), ("20s", 20, 100)] {
        let waits = waits_for_retries(base, rate, 60);
        let last = *waits.last().expect("some were tried again");
        println!(
            "{} retries, each due within {base}, beside {} rows: the last after {last:?}",
            waits.len(),
            rows()
        );
        // Waits round up to an eighth of themselves (B10).
        let bound = Duration::from_millis(base_s * 1_125 + 1_000);
        assert!(last <= bound, "{last:?}, {bound:?} at most");
    }
}
