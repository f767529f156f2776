//! Bodies in batches: several messages in one request, and what becomes of each of them.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind},
    scripted::{Reply, Request},
    wait_until,
};

/// The row number at the end of a message id.
fn row(id: &str) -> usize {
    let row = id.rsplit('_').next().expect("`rsplit` yields at least one piece");
    row.parse().expect("message ids end in a row number")
}

fn rows(request: &Request) -> Vec<usize> {
    request.messages().iter().map(|(id, _)| row(id)).collect()
}

/// A world whose receiver takes bundles of `bundle`.
fn world(bundle: i64) -> World {
    let mut world = World::new("csv");
    world.set("destinations.support.bundle", bundle);
    world
}

fn sizes(requests: &[Request]) -> Vec<usize> {
    requests.iter().map(|request| request.messages().len()).collect()
}

#[test]
fn bundles_hold_every_row_once_and_are_signed_as_one() {
    let mut world = world(40);
    world.receive(&[]);
    world.drop_file(Input::csv("rows.csv", 1_050).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.stop();
    // A line per message; batches of 100 make bundles of 40, 40 and 20. The oracle checks their ids (B15).
    assert_eq!(world.prove()["requests"], 1_050);
    let log = std::fs::read_to_string(world.receiver_log()).expect("it was made");
    let line = |line: &str| -> serde_json::Value { serde_json::from_str(line).expect("lines are JSON") };
    let bundles: HashSet<_> = log.lines().map(|text| line(text)["bundle"].to_string()).collect();
    assert!((30..=60).contains(&bundles.len()), "{} requests", bundles.len());
    assert!(log.lines().all(|text| line(text)["of"].as_u64().is_some_and(|of| of <= 40)));
}

#[test]
fn a_bundle_never_mixes_destinations_or_files() {
    let mut world = world(100);
    world.add_destination("other").set("destinations.other.bundle", 7).add_destination("single");
    world.add_feed("others", "csv", &["other", "support", "single"]);
    world.script(|_| Reply::Status(200));
    world.drop_file(Input::csv("a.csv", 300).all(Kind::Sent));
    world.drop_into("others", Input::csv("b.csv", 300).all(Kind::Sent));
    world.start().wait_settled(LIVENESS);
    world.stop();
    let requests = world.requests();
    for request in &requests {
        let messages = request.messages();
        let of_file = |id: &str| id.rsplit_once('_').map(|(file, _)| file.to_owned());
        let files: HashSet<_> = messages.iter().map(|(id, _)| of_file(id)).collect();
        assert_eq!(files.len(), 1);
        let most = match &*request.path {
            "/support" => 100,
            "/other" => 7,
            _ => 1,
        };
        assert!(messages.len() <= most);
        assert_eq!(request.id.starts_with("bundle_"), request.path != "/single");
    }
    world.prove();
}

#[test]
fn what_the_answer_says_of_each_message_holds_for_it() {
    let mut world = world(50);
    world.set("destinations.support.results", "/items");
    let tried: Mutex<HashMap<String, usize>> = Mutex::default();
    world.script(move |request| {
        let mut tried = tried.lock().expect("no script panics");
        let results = request.messages().into_iter().filter_map(|(id, _)| {
            let before = tried.entry(id.clone()).or_default();
            *before += 1;
            match (row(&id) % 10, *before) {
                (1, 1) => Some((id, 503)),
                // Row 2 of ten is not named at first: it is tried again.
                (2, 1) => None,
                // The receiver answers for the destination: what is gone is the message's own.
                (3, _) if row(&id) < 40 => Some((id, 410)),
                (4, _) if row(&id) < 40 => Some((id, 422)),
                _ => Some((id, 202)),
            }
        });
        Reply::Results(results.collect())
    });
    let mut input = Input::csv("each.csv", 500);
    for (nth, row) in input.rows.iter_mut().enumerate() {
        let is_bad = nth + 1 < 40 && matches!((nth + 1) % 10, 3 | 4);
        row.kind = if is_bad { Kind::Dead } else { Kind::Sent };
    }
    world.drop_file(input).start().wait_settled(LIVENESS);
    world.stop();
    // Each of the fifty of row 1 and of row 2 twice, every other message once.
    assert_eq!(world.prove()["requests"], 600);
    let dead = world.postrider(&["dead", "list", "--json"]).ok().stdout;
    assert_eq!((dead.matches("410").count() >= 4, dead.matches("422").count() >= 4), (true, true), "{dead}");
}

#[test]
fn without_results_the_status_holds_for_all() {
    let mut world = world(25);
    world.script(|request| Reply::Status(if request.earlier == 0 { 503 } else { 200 }));
    world.drop_file(Input::csv("all.csv", 100).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 200);
    // What failed together comes back together, under the same id.
    assert_eq!(sizes(&world.requests()), [25; 8]);
}

#[test]
fn b16_one_bad_message_is_found_and_the_others_are_sent_once() {
    for status in [400, 413, 422] {
        let mut world = world(100);
        world.script(move |request| {
            let is_bad = rows(request).contains(&77);
            Reply::Status(if is_bad { status } else { 200 })
        });
        let mut input = Input::csv("one.csv", 300).all(Kind::Sent);
        input.rows[76].kind = Kind::Dead;
        world.drop_file(input).start().wait_settled(LIVENESS);
        world.stop();
        world.prove();
        let requests = world.requests();
        let accepted = requests.iter().filter(|request| !rows(request).contains(&77));
        let mut sent: Vec<_> = accepted.flat_map(rows).collect();
        sent.sort_unstable();
        assert_eq!(sent, (1..=300).filter(|row| *row != 77).collect::<Vec<_>>(), "{status}");
        assert!(requests.len() <= 3 + 20, "{status}: {} requests", requests.len());
        let dead = world.postrider(&["dead", "list", "--json"]).ok().json();
        assert_eq!((&dead[0]["attempts"], &dead[0]["status"]), (&1.into(), &status.into()), "{dead}");
    }
}

#[test]
fn f68_a_receiver_that_refuses_every_bundle_kills_nothing() {
    let is_fixed = Arc::new(AtomicBool::new(false));
    let fixed = is_fixed.clone();
    let mut world = world(100);
    world.script(move |_| Reply::Status(if fixed.load(Ordering::SeqCst) { 200 } else { 400 }));
    world.drop_file(Input::csv("slip.csv", 3_000).all(Kind::Sent)).start();
    wait_until(LIVENESS, "the destination to be suspect", || {
        world.postrider(&["destinations", "--json"]).stdout.contains("suspect configuration")
    });
    let refused = world.requests();
    assert!(refused.len() <= 300, "{} requests until it was known", refused.len());
    is_fixed.store(true, Ordering::SeqCst);
    world.postrider(&["resume", "support"]).ok();
    world.wait_settled(LIVENESS);
    world.stop();
    // What was refused is in no record: the messages are as if never tried.
    world.unknown = world.requests().iter().filter(|request| request.messages().len() == 1).count();
    world.prove();
    let file = world.file("slip.csv").expect("it is known");
    assert_eq!(file["destinations"]["support"]["dead"], 0, "{file}");
}

#[test]
fn f01_kills_in_the_middle_of_bundles_lose_nothing() {
    let mut world = world(30);
    world.set("record.max_unrecorded", 400);
    world.receive(&["--latency-ms", "20"]);
    world.drop_file(Input::csv("killed.csv", 4_000).all(Kind::Sent));
    for kill in 1..=3 {
        world.start();
        world.wait_requests(kill * 600);
        world.kill();
    }
    world.start().wait_settled(LIVENESS * 2);
    world.stop();
    world.prove();
}

#[test]
fn a_rate_counts_messages_and_waits_for_a_whole_bundle() {
    let mut world = world(50);
    world.set("destinations.support.rate_per_s", 200).set("destinations.support.burst", 50);
    world.script(|_| Reply::Status(200));
    world.drop_file(Input::csv("limited.csv", 600).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
    let requests = world.requests();
    assert_eq!(sizes(&requests), [50; 12]);
    let took = requests[11].at - requests[0].at;
    assert!(took >= Duration::from_millis(2_200), "600 messages at 200/s took {took:?}");
}
