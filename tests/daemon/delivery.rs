//! What becomes of messages by what the receiver does: retries, dead letters, redrives, 410,
//! `Retry-After`, signatures, bodies.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use postrider_actors::testing::figure;

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind},
    scripted::{Reply, Request},
    wait_until,
};

/// The row number at the end of a request's message id.
fn row(request: &Request) -> usize {
    let row = request.id.rsplit('_').next().expect("`rsplit` yields at least one piece");
    row.parse().expect("message ids end in a row number")
}

fn by_id(requests: Vec<Request>) -> HashMap<String, Vec<Request>> {
    let mut grouped: HashMap<String, Vec<Request>> = HashMap::new();
    for request in requests {
        grouped.entry(request.id.clone()).or_default().push(request);
    }
    grouped
}

#[test]
fn f44_a_batch_of_bad_luck_still_waits_between_its_attempts() {
    const ATTEMPTS: usize = 16;
    let mut world = World::new("csv");
    // No sign of a receiver that is down: a breaker would make the waits longer.
    world.script(|_| Reply::Status(425));
    world
        .set("batch.max_messages", 1)
        // As much of a budget as these retries need.
        .set("destinations.support.concurrency", 512)
        .set("destinations.support.retry.base", "100ms")
        .set("destinations.support.retry.cap", "100ms")
        .set("destinations.support.retry.max_attempts", i64::try_from(ATTEMPTS).expect("few"));
    // Sixty batches: of sixty draws some are very low.
    world.drop_file(Input::csv("unlucky.csv", 60).all(Kind::Dead)).start().wait_settled(LIVENESS * 2);
    let requests = by_id(world.requests());
    let spans = requests.values().map(|of| of[of.len() - 1].at - of[0].at);
    let shortest = spans.min().expect("there are some");
    println!("{ATTEMPTS} attempts took at least {shortest:?}");
    assert!(
        shortest >= Duration::from_millis(300),
        "{shortest:?}, half of {ATTEMPTS} times 100 ms on average"
    );
    world.stop();
    world.prove();
}

#[test]
fn a_failed_attempt_is_repeated_until_it_succeeds() {
    let mut world = World::new("csv");
    world.script(|request| match (row(request) % 3, request.earlier) {
        (0, 0) => Reply::Status(503),
        (0, 1) => Reply::Status(429),
        (1, 0) => Reply::Status(500),
        _ => Reply::Status(202),
    });
    world.drop_file(Input::csv("flaky.csv", 300).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 300 + 2 * 100 + 100);
    for attempts in by_id(world.requests()).values() {
        // A fresh timestamp and signature at each attempt, the id and the body the same.
        let signed: HashSet<_> =
            attempts.iter().map(|request| &request.headers["webhook-signature"]).collect();
        let times: HashSet<_> =
            attempts.iter().map(|request| &request.headers["webhook-timestamp"]).collect();
        assert_eq!(signed.len(), times.len());
    }
}

#[test]
fn the_policy_decides_by_the_status() {
    // Row n is answered STATUSES[n - 1]; what is retried succeeds the second time.
    const STATUSES: [(u16, bool); 13] = [
        (200, false),
        (204, false),
        (299, false),
        (301, false),
        (302, false),
        (307, false),
        (400, false),
        (404, false),
        (408, true),
        (422, false),
        (425, true),
        (429, true),
        (503, true),
    ];
    let mut world = World::new("csv");
    world.script(|request| {
        let (status, _) = STATUSES[row(request) - 1];
        let location = format!("http://{}/moved", request.headers["host"]);
        match request.earlier {
            0 if (300..400).contains(&status) => Reply::Header(status, "location", location),
            0 => Reply::Status(status),
            _ => Reply::Status(200),
        }
    });
    let mut input = Input::csv("policy.csv", STATUSES.len());
    for (row, (status, retried)) in input.rows.iter_mut().zip(STATUSES) {
        row.kind = if retried || status < 300 { Kind::Sent } else { Kind::Dead };
    }
    world.drop_file(input).start().wait_settled(LIVENESS);
    world.stop();
    // F39: no redirect is followed: the oracle refuses requests to a path of no destination.
    assert_eq!(world.prove()["requests"], STATUSES.len() + 4);
}

#[test]
fn attempts_end_and_redrive_keeps_ids_and_bodies() {
    let healthy = Arc::new(AtomicBool::new(false));
    let is_healthy = Arc::clone(&healthy);
    let mut world = World::new("csv");
    world.script(move |request| {
        let fine = is_healthy.load(Ordering::SeqCst) || !row(request).is_multiple_of(4);
        Reply::Status(if fine { 200 } else { 500 })
    });
    world.set("destinations.support.retry.max_attempts", 3);
    world.drop_file(Input::csv("fragile.csv", 80)).start().wait_settled(LIVENESS);
    let listed = world.postrider(&["dead", "list", "--json"]).ok().json();
    assert_eq!(listed.as_array().expect("an array").len(), 20, "{listed}");
    let before = by_id(world.requests());
    assert!(before.values().filter(|attempts| attempts.len() == 3).count() == 20, "three attempts each");
    world.prove();

    let id = before.iter().find(|(_, attempts)| attempts.len() == 3).expect("there are 20").0.clone();
    let story = world.postrider(&["messages", "--id", &id, "--json"]).ok().stdout;
    assert_eq!(story.matches("500").count(), 3, "every attempt with its status: {story}");

    healthy.store(true, Ordering::SeqCst);
    // A filter that matches nothing touches nothing.
    world.postrider(&["dead", "redrive", "--destination", "support", "--older-than", "1day"]).ok();
    assert_eq!(world.postrider(&["dead", "list", "--json"]).ok().json().as_array().map(Vec::len), Some(20));
    world.postrider(&["dead", "redrive", "--destination", "support"]).ok();
    world.redrives = 1;
    for input in world.expected_mut() {
        *input = input.clone().all(Kind::Sent);
    }
    world.wait_settled(LIVENESS);
    world.stop();
    // I3 and I4 hold over the redrive: the same ids, the same bodies.
    assert_eq!(world.prove()["requests"], 60 + 20 * 3 + 20);
    assert_eq!(world.postrider(&["dead", "list", "--json"]).ok().json().as_array().map(Vec::len), Some(0));
}

#[test]
fn f40_a_410_holds_the_destination_until_it_is_enabled() {
    let status = Arc::new(AtomicU16::new(410));
    let answered = Arc::clone(&status);
    let mut world = World::new("csv");
    world.add_destination("other").add_feed("others", "csv", &["other"]);
    world.script(move |request| {
        let gone = request.path == "/support";
        Reply::Status(if gone { answered.load(Ordering::SeqCst) } else { 200 })
    });
    world.drop_file(Input::csv("held.csv", 500).all(Kind::Sent));
    world.drop_into("others", Input::csv("free.csv", 500).all(Kind::Sent));
    world.start();
    wait_until(LIVENESS, "the other destination to be done", || {
        world.file("free.csv").is_some_and(|file| file["destinations"]["other"]["sent"] == 500)
    });
    wait_until(LIVENESS, "the destination to be disabled", || {
        world.postrider(&["destinations", "--json"]).stdout.contains("410")
    });
    let requests = world.requests().iter().filter(|request| request.path == "/support").count();
    assert!(requests <= 16, "no more than what was in flight when the first 410 came: {requests}");
    let held = world.file("held.csv").expect("it is known");
    assert_eq!(held["destinations"]["support"]["dead"], 0, "held, not dead: {held}");
    // It survives a restart.
    world.stop();
    world.start_ready();
    world.drop_into("others", Input::csv("more.csv", 100).all(Kind::Sent));
    wait_until(LIVENESS, "the other destination to go on", || {
        world.file("more.csv").is_some_and(|file| file["destinations"]["other"]["sent"] == 100)
    });
    let still = world.requests().iter().filter(|request| request.path == "/support").count();
    assert_eq!(requests, still);

    status.store(200, Ordering::SeqCst);
    world.postrider(&["resume", "support"]).ok();
    world.wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn f38_retry_after_is_honoured_and_clamped() {
    let mut world = World::new("csv");
    world.script(|request| {
        if request.earlier > 0 {
            return Reply::Status(200);
        }
        let in_two_seconds = std::time::SystemTime::now() + Duration::from_secs(3);
        let value = match row(request) {
            1 => "2".to_owned(),
            2 => httpdate::fmt_http_date(in_two_seconds),
            3 => "315360000".to_owned(), // ten years
            4 => "-5".to_owned(),
            5 => "soon".to_owned(),
            _ => "99999999999999999999999999".to_owned(),
        };
        Reply::Header(503, "retry-after", value)
    });
    world.set("destinations.support.retry.max_retry_after", "4s");
    world.drop_file(Input::csv("later.csv", 6).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
    for attempts in by_id(world.requests()).values() {
        let waited = attempts[1].at - attempts[0].at;
        let (from, to) = match row(&attempts[0]) {
            1 | 2 => (Duration::from_millis(1900), Duration::from_secs(12)),
            3 => (Duration::from_millis(3900), Duration::from_secs(14)),
            // Nothing to honour: the schedule alone, capped at 200 ms.
            4 | 5 => (Duration::ZERO, Duration::from_secs(8)),
            _ => (Duration::ZERO, Duration::from_secs(14)),
        };
        assert!(from <= waited && waited <= to, "row {} waited {waited:?}", row(&attempts[0]));
    }
}

/// Answers of 200 that break the rules behind their status line.
fn odd_answers() -> Vec<Vec<u8>> {
    let many = "x: y\r\n".repeat(101) + "content-length: 0\r\n\r\n";
    let long = format!("x: {}\r\ncontent-length: 0\r\n\r\n", "y".repeat(17 << 10));
    let answers = [
        "1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        "1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
        "1.1 200 OK\r\ncontent-length: 0\r\ncontent-length: 7\r\n\r\n",
        "1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        &format!("1.1 200 OK\r\n{many}"),
        &format!("1.1 200 OK\r\n{long}"),
        "1.1 200 OK\r\nx: a\r\n folded\r\ncontent-length: 0\r\n\r\n",
        "1.1 200 OK\r\nServer : odd\r\ncontent-length: 0\r\n\r\n",
        "1.1 200 OK\r\nx: a\0b\r\ncontent-length: 0\r\n\r\n",
        "1.1 200 OK\r\nnot a field\r\ncontent-length: 0\r\n\r\n",
    ];
    answers.into_iter().map(|answer| format!("HTTP/{answer}").into_bytes()).collect()
}

#[test]
fn f70_a_200_with_an_odd_head_is_a_200() {
    const ROUNDS: usize = 25;
    let answers = odd_answers();
    let messages = answers.len() * ROUNDS;
    let mut world = World::new("csv");
    world.script(move |request| Reply::Raw(answers[row(request) % answers.len()].clone()));
    let started = Instant::now();
    world.set("destinations.support.timeout", "25s");
    world.drop_file(Input::csv("odd.csv", messages).all(Kind::Sent)).start().wait_settled(LIVENESS);
    assert!(started.elapsed() < Duration::from_secs(20), "no slot waits for a body whose end can't be found");
    world.stop();
    assert_eq!(world.prove()["requests"], messages, "each is sent once");
}

#[test]
fn f37_a_reset_after_the_request_is_tried_again_under_the_same_id() {
    let mut world = World::new("csv");
    world.script(|request| {
        if request.earlier == 0 && row(request).is_multiple_of(5) { Reply::Reset } else { Reply::Status(200) }
    });
    world.drop_file(Input::csv("reset.csv", 100).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.stop();
    world.unknown = 20;
    assert_eq!(world.prove()["requests"], 120);
}

#[test]
fn f34_a_receiver_that_hangs_costs_its_timeout_and_no_slot() {
    let mut world = World::new("csv");
    world.script(|request| {
        if request.earlier == 0 && row(request).is_multiple_of(10) { Reply::Hang } else { Reply::Status(200) }
    });
    world.set("destinations.support.timeout", "700ms").set("destinations.support.concurrency", 4);
    world.drop_file(Input::csv("hung.csv", 200).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.stop();
    world.unknown = 20;
    world.prove();
}

#[test]
fn f43_a_hanging_destination_does_not_slow_another() {
    let mut world = World::new("csv");
    world.add_destination("quick").add_feed("quick", "csv", &["quick"]);
    world.script(|request| if request.path == "/support" { Reply::Hang } else { Reply::Status(200) });
    world.drop_file(Input::csv("stuck.csv", 2000)).start();
    world.wait_requests(1);
    let started = Instant::now();
    world.drop_into("quick", Input::csv("quick.csv", 2000).all(Kind::Sent));
    wait_until(LIVENESS, "the quick destination to be done", || {
        world.file("quick.csv").is_some_and(|file| file["destinations"]["quick"]["sent"] == 2000)
    });
    let stuck = world.file("stuck.csv").expect("it is known");
    assert_eq!(stuck["destinations"]["support"]["sent"], 0, "it hangs");
    figure(format!("2,000 messages beside a destination that hangs: {:.1?}", started.elapsed()));
}

#[test]
fn a_receiver_that_knows_one_of_two_secrets_verifies() {
    let mut world = World::new("csv");
    // The receiver verifies by SECRET; here it is the second one, in the middle of a rotation.
    world.receive(&[]);
    world.set("destinations.support.secrets", vec!["file:FIRST", "env:POSTRIDER_TEST_SECRET"]);
    let first = world.path("first.secret");
    std::fs::write(&first, "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX\n").expect("the directory is ours");
    world.set(
        "destinations.support.secrets",
        vec![format!("file:{}", first.display()), "env:POSTRIDER_TEST_SECRET".to_owned()],
    );
    world.drop_file(Input::csv("signed.csv", 120).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn i4_a_config_change_changes_no_body() {
    let healthy = Arc::new(AtomicBool::new(false));
    let is_healthy = Arc::clone(&healthy);
    let mut world = World::new("csv");
    world.script(move |_| Reply::Status(if is_healthy.load(Ordering::SeqCst) { 200 } else { 408 }));
    world
        .set(
            "destinations.support.template",
            "{\"to\":{{ recipient }},\"text\":{{ \"Hello \" ~ data.name }}}",
        )
        .set("destinations.support.content_type", "application/vnd.hello+json")
        .set("destinations.support.retry.max_attempts", 100);
    world.drop_file(Input::csv("hello.csv", 150).templated().all(Kind::Sent)).start();
    world.wait_requests(200);
    world.stop();
    let request = world.requests().remove(0);
    assert!(request.body.contains("Hello Näme"), "{}", request.body);
    assert_eq!(request.headers["content-type"], "application/vnd.hello+json");

    world
        .set("destinations.support.template", "Goodbye {{ recipient }}")
        .set("destinations.support.content_type", "text/plain");
    healthy.store(true, Ordering::SeqCst);
    world.start();
    world.drop_file(Input::csv("goodbye.csv", 20).templated().all(Kind::Sent)).wait_settled(LIVENESS);
    world.stop();
    world.prove();
    for (_, attempts) in by_id(world.requests()) {
        let types: HashSet<_> = attempts.iter().map(|request| &request.headers["content-type"]).collect();
        assert_eq!(types.len(), 1, "the content type belongs to the body");
    }
    let goodbyes =
        world.requests().iter().filter(|request| request.body.starts_with("Goodbye user-goodbye-")).count();
    assert_eq!(goodbyes, 20, "new files get the new template");
}

#[test]
fn the_rate_is_kept_with_its_burst() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.set("destinations.support.rate_per_s", 200).set("destinations.support.burst", 20);
    world.drop_file(Input::csv("paced.csv", 620).all(Kind::Sent)).start();
    world.wait_requests(1);
    let started = Instant::now();
    world.wait_settled(LIVENESS);
    let took = started.elapsed();
    // 20 at once, then 600 at 200 per second; the first request was a moment before the clock started.
    assert!(took >= Duration::from_millis(2800), "too fast: {took:?}");
    assert!(took <= Duration::from_secs(12), "too slow: {took:?}");
    world.stop();
    world.prove();
}

#[test]
fn concurrency_is_never_exceeded() {
    use std::sync::atomic::AtomicUsize;
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (here, peak) = (Arc::clone(&now), Arc::clone(&most));
    let mut world = World::new("csv");
    world.script(move |_| {
        peak.fetch_max(here.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(5));
        here.fetch_sub(1, Ordering::SeqCst);
        Reply::Status(200)
    });
    world.set("destinations.support.concurrency", 7);
    world.drop_file(Input::csv("narrow.csv", 700).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
    let most = most.load(Ordering::SeqCst);
    assert!((2..=7).contains(&most), "{most} at once");
}

#[test]
fn a_paused_destination_ingests_and_sends_nothing() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.set("destinations.support.paused", true);
    world.drop_file(Input::csv("waiting.csv", 400).all(Kind::Sent)).start();
    wait_until(LIVENESS, "the file to be ingested", || {
        world.file("waiting.csv").is_some_and(|file| file["state"] == "ingested")
    });
    world.stop();
    assert_eq!(world.request_count(), 0);
    world.set("destinations.support.paused", false).start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

/// What its workers have leased is not sent on.
#[test]
fn b11_a_destination_that_is_disabled_stops_within_two_seconds_and_goes_on_when_it_is_enabled() {
    const ROWS: usize = 1_000;
    let mut world = World::new("csv");
    world.receive(&[]);
    world.set("destinations.support.rate_per_s", 100).set("destinations.support.burst", 10);
    world.drop_file(Input::csv("held.csv", ROWS).all(Kind::Sent)).start();
    world.wait_requests(100);
    world.postrider(&["pause", "support"]).ok();
    thread::sleep(Duration::from_secs(2));
    let sent = world.request_count();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(world.request_count(), sent);
    assert!(sent < ROWS, "it was over before");
    world.postrider(&["resume", "support"]).ok();
    world.wait_settled(LIVENESS);
    world.stop();
    let summary = world.prove();
    assert_eq!(summary["requests"], ROWS);
}

#[test]
fn s1_3_pools_of_one_are_the_sequential_approach() {
    let mut world = World::new("csv");
    world.receive(&["--fail-rate", "0.1"]);
    for pool in ["parsers", "deliveries"] {
        world.set(&format!("pools.{pool}"), 1);
    }
    world.set("destinations.support.concurrency", 1);
    world.drop_file(Input::csv("sequential.csv", 300)).start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn s2_10_single_sends_are_a_config_value_away() {
    let mut world = World::new("csv");
    world.receive(&["--fail-rate", "0.1"]);
    world.set("batch.max_messages", 1);
    world.drop_file(Input::csv("single.csv", 200)).start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn every_format_goes_to_every_destination_of_its_feed() {
    let mut world = World::new("csv");
    world.receive(&["--fail-rate", "0.05"]);
    world.add_destination("second").add_feed("lists", "text", &["support", "second"]).add_feed(
        "objects",
        "ndjson",
        &["second"],
    );
    world.drop_file(Input::csv("a.csv", 250));
    world.drop_into("lists", Input::text("b.txt", 250));
    let objects: Vec<_> =
        (1..=250).map(|row| format!("{{\"user_id\":\"user-object-{row}\",\"n\":{row}}}")).collect();
    let rows = (1..=250)
        .map(|row| crate::support::input::Row::new(Kind::Ok, &format!("user-object-{row}")))
        .collect();
    world.drop_into("objects", Input::of("c.ndjson", objects.join("\n"), rows));
    world.start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["messages"], 1000);
}
