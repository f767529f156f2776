//! Care before a send: what is wrong with a configuration or a file is found before it hurts thousands of messages.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    support::{
        LIVENESS, World,
        input::{Input, Kind, Row},
        scripted::{Reply, Request},
        wait_for, wait_until,
    },
    trouble::{status, wait_alarm},
};

/// A `csv` feed whose bodies are made by `template`.
fn templated(template: &str) -> World {
    let mut world = World::new("csv");
    world.receive(&[]).set("destinations.support.template", template);
    world
}

/// `user_id,points`, with these points.
fn points(name: &str, points: &[(&str, Kind)]) -> Input {
    let line = |(number, (points, _)): (usize, &(&str, Kind))| format!("user-{number},{points}\r\n");
    let lines: Vec<_> = points.iter().enumerate().map(line).collect();
    let bytes = format!("user_id,points\n{}", lines.concat());
    let mut rows = Vec::new();
    for (number, (_, kind)) in points.iter().enumerate() {
        let recipient = format!("user-{number}");
        rows.push(if *kind == Kind::Rejected { Row::rejected() } else { Row::new(*kind, &recipient) });
    }
    Input::of(name, bytes, rows)
}

#[test]
fn f67_a_template_that_names_what_the_feed_lacks_holds_the_file_until_it_is_right() {
    let mut world = templated(r#"{"to": {{ recipient }}, "name": {{ data.nmae }}}"#);
    world.drop_file(Input::csv("slip.csv", 300).templated().all(Kind::Sent)).start_ready();
    for life in 1..=2 {
        let held = wait_for(LIVENESS, "the file to be held", || world.held("slip.csv"));
        let reason = held["reason"].as_str().expect("a reason").to_owned();
        assert_eq!(reason, "destination support: the template needs data.nmae, which the row does not have");
        wait_alarm(&mut world, "files", "raised", "data.nmae");
        wait_until(LIVENESS, "the status to say so", || status(&world)["files"]["held"] == 1);
        let rows = world.file("slip.csv").map_or(json!(0), |file| file["rows"].clone());
        assert_eq!(rows, 0, "not a row was accepted");
        if life == 1 {
            // It is not read again and again meanwhile, and a new life finds the same.
            let log = world.daemon().log_text();
            assert_eq!(log.lines().filter(|line| line.contains("a file is held")).count(), 1);
            world.stop();
            world.start_ready();
        }
    }
    world
        .set("destinations.support.template", r#"{"to": {{ recipient }}, "name": {{ data.name }}}"#)
        .configure();
    world.daemon().signal(Signal::HUP);
    world.wait_settled(LIVENESS);
    wait_alarm(&mut world, "files", "cleared", "");
    world.stop();
    assert_eq!(world.prove()["requests"], 300, "every row once");
}

#[test]
fn f67_a_row_whose_own_body_fails_is_a_reject_that_can_be_dropped_again() {
    let mut world = templated(r#"{"to": {{ recipient }}, "points": {{ data.points | int }}}"#);
    let rows =
        [("7", Kind::Sent), ("many", Kind::Rejected), ("8", Kind::Sent), ("\"a\nfew\"", Kind::Rejected)];
    world.drop_file(points("points.csv", &rows).templated()).start_ready().wait_settled(LIVENESS);
    let rejects = wait_for(LIVENESS, "the rejected rows", || {
        fs::read_to_string(world.inbox("alerts").join("done/points.csv.rejects.csv")).ok()
    });
    let why = "destination support: the body can't be rendered: invalid operation in line 1 of the template";
    let header = "row,line,reason,raw\n0,1,header,\"user_id,points\"\n";
    let expected = format!("{header}2,3,{why},\"user-1,many\"\n4,5,{why},\"user-3,\"\"a\nfew\"\"\"\n");
    assert_eq!(rejects, expected);
    world.stop();
    assert_eq!(world.prove()["requests"], 2);
}

#[test]
fn f67_a_body_that_is_not_json_holds_the_file() {
    let mut world = templated(r#"{"to": {{ recipient }}, "points": {{ data["points"] }}"#);
    world.drop_file(points("points.csv", &[("7", Kind::Sent)]).templated()).start_ready();
    let held = wait_for(LIVENESS, "the file to be held", || world.held("points.csv"));
    assert!(held["reason"].as_str().expect("a reason").contains("the body is not JSON"), "{held}");
    assert_eq!(world.request_count(), 0);
    world.set("destinations.support.content_type", "text/plain").configure();
    world.daemon().signal(Signal::HUP);
    world.wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn f67_check_config_says_what_no_file_of_a_feed_can_have() {
    let mut world = World::new("text");
    world
        .set("destinations.support.template", "{{ data.name }}")
        .set("destinations.support.content_type", "text/plain");
    world.configure();
    let answer = world.postrider(&["check-config"]);
    assert_eq!(answer.code, Some(78));
    let why = "destinations.support.template: it can't be used for the feed alerts: the template needs data.name, \
               which its rows do not have";
    assert!(answer.stderr.contains(why), "{}", answer.stderr);
    world.set("feeds.alerts.format", "csv").set("feeds.alerts.recipient", "user_id").configure();
    world.postrider(&["check-config"]).ok();
}

#[test]
fn preflight_says_what_a_feed_would_make_of_a_file_and_does_nothing() {
    let mut world = templated(r#"{"to": {{ recipient }}, "points": {{ data.points | int }}}"#);
    world.set("feeds.alerts.duplicates", "first").set("destinations.support.rate_per_s", 2);
    world.configure();
    let file = world.path("points.csv");
    let rows = "user_id,points\nu1,1\nu2,2\nu3,3\nu4,many\nu1,5\n,6\nu7,7\nu8,few\n";
    fs::write(&file, rows).expect("the directory is ours");
    let path = file.display().to_string();
    let before = fs::read_dir(world.path("")).expect("it is there").count();
    let answer = world.postrider(&["preflight", &path, "--feed", "alerts", "--json"]).ok().json();
    let number = |key: &str| answer[key].as_u64().expect("a number");
    assert_eq!((number("rows"), number("accepted"), number("duplicates"), number("rejected")), (8, 4, 1, 3));
    assert_eq!(number("bytes"), rows.len() as u64);
    let reason =
        |rows: u64, line: u64, reason: &str| json!({ "reason": reason, "rows": rows, "first_line": line });
    let why = "destination support: the body can't be rendered: invalid operation in line N of the template";
    assert_eq!(answer["reasons"], json!([reason(2, 5, why), reason(1, 7, "the recipient is empty")]));
    let support = &answer["destinations"]["support"];
    let body = |user: &str, points: u32| format!(r#"{{"to": "{user}", "points": {points}}}"#);
    assert_eq!(support["bodies"], json!([body("u1", 1), body("u2", 2), body("u3", 3)]));
    assert_eq!((&support["rate_per_s"], &support["takes_s"]), (&json!(2), &json!(2.0)));
    assert!(support["finish"].is_string() && support["latency_ms"].is_null(), "{support}");
    assert_eq!((&answer["refused"], &answer["known"]), (&json!(null), &json!(null)));
    let text = world.postrider(&["preflight", &path, "--feed", "alerts"]).ok().stdout;
    assert!(text.contains("8 rows: 4 messages, 1 duplicates, 3 rejected"), "{text}");
    assert!(text.contains("{\"to\": \"u3\", \"points\": 3}"), "{text}");
    assert_eq!(fs::read_dir(world.path("")).expect("it is there").count(), before, "nothing is written");
    assert!(!world.state().exists());

    // What would hold it, and a feed that is not there.
    world.set("destinations.support.template", "{{ data.nmae }}").configure();
    let answer = world.postrider(&["preflight", &path, "--feed", "alerts", "--json"]);
    assert_eq!(answer.code, Some(1), "{}", answer.stderr);
    let why = "destination support: the template needs data.nmae, which the row does not have";
    assert_eq!(answer.json()["refused"], why);
    let answer = world.postrider(&["preflight", &path, "--feed", "alarms"]);
    assert_eq!(answer.code, Some(1));
    assert!(answer.stderr.contains("there is no feed \"alarms\"; there are: alerts"), "{}", answer.stderr);
}

/// Large files have a canary here, of 200 messages.
fn with_canary(format: &str) -> World {
    let mut world = World::new(format);
    world
        .set("canary.enabled", true)
        .set("canary.min_rows", 2_000)
        .set("canary.ramp", "2s")
        .set("destinations.support.retry.base", "30s")
        .set("destinations.support.retry.cap", "30s");
    world
}

/// What is held of a file at `support`, by `postrider files`.
fn hold_of(world: &World, name: &str) -> Option<Value> {
    let hold = world.file(name)?["held"]["support"].clone();
    (!hold.is_null()).then_some(hold)
}

#[test]
fn b14_a_file_whose_first_messages_fail_is_held_and_goes_on_when_it_is_released() {
    let mut world = with_canary("text");
    let is_broken = Arc::new(AtomicBool::new(true));
    let broken = is_broken.clone();
    // 30 % of the recipients.
    let fails = |request: &Request| request.id.bytes().map(u32::from).sum::<u32>() % 10 < 3;
    world.script(move |request| {
        let fails = broken.load(Ordering::SeqCst) && fails(request);
        Reply::Status(if fails { 500 } else { 200 })
    });
    world.drop_file(Input::text("large.txt", 3_000).all(Kind::Sent)).start_ready();
    let hold = wait_for(LIVENESS, "the file to be held", || {
        hold_of(&world, "large.txt").filter(|hold| hold["cause"] == "errors")
    });
    let reason = hold["reason"].as_str().expect("a reason").to_owned();
    assert!(
        reason.contains("messages failed: status 500 × ")
            && reason.contains("canary.max_error_percent is 10"),
        "{reason}"
    );
    wait_alarm(&mut world, "canary", "raised", "status 500 × ");
    wait_until(LIVENESS, "the status to say so", || status(&world)["files"]["held"] == 1);
    // It outlives the process, however that ends.
    world.kill();
    is_broken.store(false, Ordering::SeqCst);
    world.start_ready();
    wait_alarm(&mut world, "canary", "raised", "status 500 × ");
    thread::sleep(Duration::from_secs(2));
    assert_eq!(hold_of(&world, "large.txt"), Some(hold));
    let requests = world.request_count();
    assert!((30..=220).contains(&requests), "{requests} requests: some of the canary's, few of them twice");
    let counts = world.file("large.txt").expect("it is known")["destinations"]["support"].clone();
    assert_eq!(counts["dead"], 0, "{counts}");

    world.postrider(&["release", "large.txt"]).ok();
    world.wait_settled(LIVENESS);
    wait_alarm(&mut world, "canary", "cleared", "");
    world.stop();
    world.prove();
}

#[test]
fn b14_a_file_whose_first_messages_go_well_follows_them() {
    let mut world = with_canary("csv");
    world.script(|_| Reply::Status(200));
    world.drop_file(Input::csv("large.csv", 4_000).all(Kind::Sent)).start_ready();
    // One that is not large is not kept waiting.
    world.drop_file(Input::csv("small.csv", 1_999).all(Kind::Sent));
    world.wait_settled(LIVENESS);
    assert_eq!(hold_of(&world, "large.csv"), None);
    world.stop();
    world.prove();
    let requests = world.requests();
    let first = requests.first().expect("there were some").at;
    let of_large: Vec<_> = requests.iter().filter(|request| request.body.contains("user-large-")).collect();
    let row = |request: &Request| -> u64 {
        request.id.rsplit('_').next().and_then(|row| row.parse().ok()).expect("a row")
    };
    assert!(of_large[..200].iter().all(|request| row(request) <= 200), "the first 200 go first");
    let last = of_large.last().expect("there were some").at.duration_since(first);
    assert!(last >= Duration::from_millis(700), "the rate grows: 4,000 rows took {last:?}");
    let of_small =
        requests.iter().filter(|request| request.body.contains("user-small-")).map(|request| request.at);
    let small = of_small.max().expect("there were some").duration_since(first);
    eprintln!("large {last:?}, small {small:?}");
}

#[test]
fn f68_a_wrong_secret_that_a_canary_meets_kills_nothing_and_each_row_is_sent_once() {
    const ROWS: usize = 3_000;
    let mut world = with_canary("csv");
    let wrong = Arc::new(AtomicBool::new(true));
    let is_wrong = wrong.clone();
    world.script(move |_| Reply::Status(if is_wrong.load(Ordering::SeqCst) { 401 } else { 200 }));
    world.drop_file(Input::csv("large.csv", ROWS).all(Kind::Sent)).start_ready();
    let shown = wait_for(LIVENESS, "the destination to be disabled", || {
        let shown = status(&world)["destinations"]["support"].clone();
        (shown["state"] == "disabled").then_some(shown)
    });
    assert!(shown["disabled_reason"].as_str().is_some_and(|why| why.contains("status 401")), "{shown}");
    let hold = hold_of(&world, "large.csv").expect("all but its first 200");
    assert_eq!(hold["cause"], "canary", "the receiver's word is no verdict on the file: {hold}");
    let refused = world.request_count();
    assert!(refused <= 200, "no more than the canary's: {refused}");
    wrong.store(false, Ordering::SeqCst);
    world.postrider(&["resume", "support"]).ok();
    world.wait_settled(LIVENESS);
    let counts = world.file("large.csv").expect("it is known")["destinations"]["support"].clone();
    assert_eq!((&counts["sent"], &counts["dead"]), (&ROWS.into(), &0.into()), "{counts}");
    world.stop();
    // What was refused is in no record.
    world.unknown = refused;
    assert_eq!(world.prove()["requests"], ROWS + refused);
}
