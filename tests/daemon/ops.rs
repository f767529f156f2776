//! The ops server and the alarms, as Prometheus, a probe and an attacker meet them.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use postrider_actors::testing::figure;
use rustix::process::Signal;

use crate::support::{
    LIVENESS, World,
    input::{Input, recipient},
    scripted::Reply,
    wait_for, wait_until,
};

/// What the server said: status, and everything else.
pub(crate) struct HttpResponse {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

/// Sends bytes, reads to the end.
pub(crate) fn send(address: SocketAddr, request: &str) -> HttpResponse {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(LIVENESS)).expect("a timeout can be set");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("it answers in text and closes");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    HttpResponse { status: status.expect("a status line"), head: head.to_lowercase(), body: body.to_owned() }
}

pub(crate) fn get(address: SocketAddr, path: &str) -> HttpResponse {
    send(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n"))
}

/// A world whose daemon serves metrics, and where.
pub(crate) fn serve(world: &mut World) -> SocketAddr {
    world.set("ops.listen", "127.0.0.1:0").start_ready();
    address(world)
}

pub(crate) fn address(world: &World) -> SocketAddr {
    // A daemon is ready before its log is written.
    wait_for(LIVENESS, "the line that names the address", || {
        let log = world.daemon_log_text();
        let line = log.lines().rfind(|line| line.contains("metrics and health are served"))?;
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        let found = line.pointer("/fields/address").or_else(|| line.get("address"));
        found.and_then(|address| address.as_str()?.parse().ok())
    })
}

/// The value of the series that begins with `series`.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

pub(crate) fn metric(address: SocketAddr, series: &str) -> Option<f64> {
    value(&get(address, "/metrics").body, series)
}

/// Whether an alarm is raised, whatever it is about.
pub(crate) fn alarmed(address: SocketAddr, alarm: &str) -> Option<f64> {
    let metrics = get(address, "/metrics").body;
    let start = format!("postrider_alarm{{alarm=\"{alarm}\",");
    let values = metrics.lines().filter(|line| line.starts_with(&start));
    values.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).reduce(f64::max)
}

#[test]
fn s2_7_metrics_show_what_was_done() {
    let mut world = World::new("csv");
    world.script(|request| match request.earlier {
        0 if request.id.ends_with("_7") => Reply::Status(503),
        _ if request.id.ends_with("_8") => Reply::Status(404),
        _ => Reply::Status(200),
    });
    let address = serve(&mut world);
    wait_until(LIVENESS, "the backlog to be counted", || {
        metric(address, "postrider_messages_open{destination=\"support\"}") == Some(0.0)
    });
    world.drop_file(Input::csv("counted.csv", 500)).wait_settled(LIVENESS);
    wait_until(LIVENESS, "everything to be counted", || {
        metric(address, "postrider_messages_open{destination=\"support\"}") == Some(0.0)
            && metric(address, "postrider_messages_sent_total{destination=\"support\"}") == Some(499.0)
    });
    let response = get(address, "/metrics");
    assert_eq!(response.status, 200);
    assert!(response.head.contains("text/plain; version=0.0.4"), "{}", response.head);
    let asked =
        format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nAccept: application/openmetrics-text\r\n\r\n");
    let openmetrics = send(address, &asked);
    assert!(openmetrics.head.contains("application/openmetrics-text"), "{}", openmetrics.head);
    assert!(openmetrics.body.ends_with("# EOF\n") && !response.body.contains("# EOF"));
    for (series, expected) in [
        ("postrider_rows_total{feed=\"alerts\",outcome=\"accepted\"}", 500.0),
        ("postrider_files_total{feed=\"alerts\",state=\"ingested\"}", 1.0),
        ("postrider_messages_sent_total{destination=\"support\"}", 499.0),
        ("postrider_messages_dead_total{destination=\"support\",cause=\"permanent\"}", 1.0),
        ("postrider_retries_total{destination=\"support\"}", 1.0),
        ("postrider_attempts_total{destination=\"support\",outcome=\"sent\"}", 499.0),
        ("postrider_attempts_total{destination=\"support\",outcome=\"status_5xx\"}", 1.0),
        ("postrider_attempts_total{destination=\"support\",outcome=\"status_4xx\"}", 1.0),
        ("postrider_attempt_duration_seconds_count{destination=\"support\"}", 501.0),
        ("postrider_permits{destination=\"support\"}", 16.0),
        ("postrider_file_start_seconds_count{feed=\"alerts\"}", 1.0),
        ("postrider_batch_wait_seconds_count{destination=\"support\"}", 5.0),
        ("postrider_store_calls_total{port=\"ledger\",operation=\"settle\",outcome=\"retryable\"}", 0.0),
        ("postrider_queue_batches{state=\"visible\"}", 0.0),
    ] {
        assert_eq!(value(&response.body, series), Some(expected), "{series}: {}", response.body);
    }
    // Five batches: a retry is the same batch, due again. The one with the retried and the dead message was not clean.
    for (outcome, expected) in [("clean", 4.0), ("with_failures", 1.0)] {
        let series =
            format!("postrider_batches_settled_total{{destination=\"support\",outcome=\"{outcome}\"}}");
        assert_eq!(value(&response.body, &series), Some(expected), "{series}");
    }
    // I10: nothing of a recipient or a message.
    assert!(!response.body.contains(&recipient("counted.csv", 1)) && !response.body.contains("msg_"));
    wait_until(LIVENESS, "nothing in flight", || {
        metric(address, "postrider_requests_in_flight{destination=\"support\"}") == Some(0.0)
    });
    world.stop();
    world.prove();
}

#[test]
fn probes_follow_the_daemon_s_phases() {
    let mut world = World::new("csv");
    world.script(|_| Reply::Hang).set("shutdown.timeout", "3s");
    let address = serve(&mut world);
    assert_eq!((get(address, "/healthz").status, get(address, "/healthz").body), (200, "ok\n".into()));
    let ready = get(address, "/readyz");
    assert_eq!((ready.status, ready.body), (200, "ready\n".into()));
    let head = send(address, &format!("HEAD /readyz HTTP/1.1\r\nHost: {address}\r\n\r\n"));
    assert_eq!((head.status, head.body), (200, String::new()));
    assert_eq!(get(address, "/nothing").status, 404);
    world.drop_file(Input::csv("hangs.csv", 10)).wait_requests(1);
    world.daemon().signal(Signal::TERM);
    let draining = wait_for(LIVENESS, "readyz to report the drain", || {
        let response = get(address, "/readyz");
        (response.status == 503).then_some(response.body)
    });
    assert_eq!(draining, "stopping\n");
    world.daemon().kill();
}

#[test]
#[cfg_attr(not(feature = "failpoints"), ignore = "needs --features failpoints")]
fn a_stuck_thread_is_unhealthy() {
    let mut world = World::new("csv");
    world.receive(&[]);
    // `sleep` blocks the sweeper's arbiter for longer than the test lasts.
    world.fail("panic.sweeper=1*off->sleep(120000)");
    let address = serve(&mut world);
    wait_until(LIVENESS, "an unhealthy daemon", || {
        let response = get(address, "/healthz");
        response.status == 503 && response.body.contains("arbiter")
    });
    world.daemon().kill();
}

#[test]
fn a_port_in_use_is_a_start_error() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("it is bound").to_string();
    let mut world = World::new("csv");
    world.set("ops.listen", address.clone()).start();
    assert_eq!(world.wait_exit(LIVENESS).code(), Some(78));
    let log = std::fs::read_to_string(world.daemon_log()).expect("it is there");
    assert!(
        log.contains("ops.listen") && log.contains(&address) && log.contains("choose another port"),
        "{log}"
    );
    assert!(!world.store().exists(), "it is found before anything begins");
}

#[test]
fn f56_a_wrong_host_gets_nothing() {
    let mut world = World::new("csv");
    world.receive(&[]).set("ops.allowed_hosts", vec!["metrics.internal"]);
    let address = serve(&mut world);
    let status = |request: String| send(address, &request).status;
    let with_host = |host: &str| status(format!("GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n"));
    for host in ["evil.example", "evil.example:9464", "169.254.169.254", "localhost.evil.example"] {
        let response = send(address, &format!("GET /metrics HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(response.status, 421, "{host}");
        assert!(!response.body.contains("postrider_"), "{}", response.body);
    }
    for host in ["localhost", "localhost:9464", "metrics.internal", "127.0.0.1"] {
        assert_eq!(with_host(host), 200, "{host}");
    }
    assert_eq!(status("GET /metrics HTTP/1.1\r\n\r\n".into()), 400);
    assert_eq!(status("GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n".into()), 400);
    assert_eq!(status("GET http://evil.example/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".into()), 421);
    world.stop();
    figure("7 requests with a wrong, missing or doubled host: 421 or 400, no metric in any answer");
}

#[test]
fn f56_a_cross_origin_request_is_refused() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let address = serve(&mut world);
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"] {
        let same = send(address, &format!("{method} /metrics HTTP/1.1\r\nHost: {address}\r\n\r\n"));
        assert_eq!(same.status, 405, "{method}");
        assert!(same.head.contains("allow: get, head"), "{}", same.head);
        let cross =
            format!("{method} /metrics HTTP/1.1\r\nHost: {address}\r\nOrigin: http://evil.example\r\n\r\n");
        let response = send(address, &cross);
        assert_eq!(response.status, 403, "{method}");
        assert!(!response.head.contains("access-control-"), "{}", response.head);
    }
    let read = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nOrigin: null\r\n\r\n");
    assert_eq!(send(address, &read).status, 403);
    let body = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nContent-Length: 1000000000\r\n\r\n");
    assert_eq!(send(address, &body).status, 413);
    let long = format!("GET /{} HTTP/1.1\r\nHost: {address}\r\n\r\n", "a".repeat(15 << 10));
    assert_eq!(send(address, &long).status, 404, "long, but within the limit");
    let many = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\n{}\r\n", "X-A: b\r\n".repeat(100));
    assert_eq!(send(address, &many).status, 431);
    world.stop();
    figure("6 methods from another origin: 403 each, from the same one 405: nothing can be changed");
}

#[test]
fn f56_slowloris_holds_no_place_for_long() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let address = serve(&mut world);
    let begun = Instant::now();
    // More than there are places: half a head each, and a byte now and then.
    let mut slow: Vec<_> = (0..80)
        .map(|_| {
            let mut stream = TcpStream::connect(address).expect("the backlog takes it");
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: loc").expect("it is buffered");
            stream.set_read_timeout(Some(LIVENESS)).expect("a timeout can be set");
            stream
        })
        .collect();
    let drip = slow[0].try_clone().expect("a second handle");
    let dripping = std::thread::spawn(move || {
        let mut drip = drip;
        while drip.write_all(b"a").is_ok() {
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    assert_eq!(get(address, "/healthz").status, 200);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    figure(format!("80 connections with half a head: answered after {} ms", begun.elapsed().as_millis()));
    for stream in &mut slow {
        let mut rest = Vec::new();
        // Closed or reset: either way the place is free.
        let _ = stream.read_to_end(&mut rest);
        assert!(!String::from_utf8_lossy(&rest).contains("200 OK"));
    }
    dripping.join().expect("it ends when the connection does");
    // Delivery never noticed.
    world.drop_file(Input::csv("undisturbed.csv", 100)).wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn s2_8_alarms_are_raised_and_cleared() {
    let mut world = World::new("csv");
    world.script(|request| Reply::Status(if request.path == "/bad" { 404 } else { 200 }));
    world.add_destination("bad").add_feed("bad", "csv", &["bad"]).set("alarms.dead.window", "3s");
    world.set("destinations.bad.storm.percent", 0);
    let address = serve(&mut world);
    let active = |alarm: &str| alarmed(address, alarm);
    for alarm in ["depth", "failures", "latency", "dead", "shortage", "damage"] {
        assert_eq!(active(alarm), Some(0.0), "{alarm}");
    }
    world.drop_into("bad", Input::csv("bad.csv", 50));
    wait_until(LIVENESS, "two alarms", || active("dead") == Some(1.0) && active("failures") == Some(1.0));
    assert_eq!(metric(address, "postrider_alarm{alarm=\"failures\",subject=\"bad\"}"), Some(1.0));
    assert_eq!(metric(address, "postrider_alarm{alarm=\"failures\",subject=\"\"}"), None);
    let notes = |world: &World| -> serde_json::Value {
        let text = std::fs::read_to_string(world.state().join("alarms.json")).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    };
    wait_until(LIVENESS, "the file", || {
        let raised = notes(&world)["raised"].as_array().cloned().unwrap_or_default();
        let is_there = |kind: &str| {
            raised
                .iter()
                .any(|one| one["alarm"] == kind && one["subject"] == "bad" && one["remedy"].is_string())
        };
        is_there("dead") && is_there("failures")
    });
    let status = world.postrider(&["status", "--sample-ms", "0"]).ok().stdout;
    assert!(status.contains("alarm    failures (bad): "), "{status}");
    let status = world.postrider(&["status", "--sample-ms", "0", "--json"]).ok().json();
    let of_bad = |alarm: &&serde_json::Value| alarm["alarm"] == "failures" && alarm["subject"] == "bad";
    let alarm = status["alarms"].as_array().expect("a list").iter().find(of_bad).expect("it is raised");
    assert!(alarm["remedy"].is_string() && alarm["since"].is_string(), "{alarm}");
    wait_until(LIVENESS, "the end of one", || active("dead") == Some(0.0));
    wait_until(LIVENESS, "the end in the file", || {
        let cleared = notes(&world)["cleared"].as_array().cloned().unwrap_or_default();
        cleared.iter().any(|one| one["alarm"] == "dead" && one["cleared"].is_u64())
    });
    assert_eq!((active("depth"), active("latency")), (Some(0.0), Some(0.0)));
    let log = world.daemon().log_text();
    for (event, words) in [
        ("alarm raised", ["\"dead\"", "postrider dead list --destination bad"]),
        ("alarm raised", ["\"failures\"", "\"bad\""]),
        ("alarm cleared", ["\"dead\"", "messages"]),
    ] {
        let found = log.lines().filter(|line| line.contains(event) && line.contains(words[0]));
        let found: Vec<_> = found.collect();
        assert_eq!(found.len(), 1, "{event} {words:?}: it does not flap: {found:?}");
        assert!(found[0].contains(words[1]), "{}", found[0]);
    }
    world.stop();
    world.prove();
}

#[test]
fn s2_8_a_backlog_that_is_held_raises_latency() {
    let mut world = World::new("csv");
    world.receive(&[]).set("destinations.support.paused", true).set("alarms.latency.max", "2s");
    let address = serve(&mut world);
    let active = |alarm: &str| alarmed(address, alarm);
    world.drop_file(Input::csv("held.csv", 100));
    wait_until(LIVENESS, "the alarm", || active("latency") == Some(1.0));
    assert_eq!(metric(address, "postrider_messages_open{destination=\"support\"}"), Some(100.0));
    assert!(metric(address, "postrider_oldest_due_seconds{}") >= Some(2.0), "whole seconds");
    // A reload keeps what is raised; it clears a minute after all is delivered, which no test waits for.
    world.set("destinations.support.paused", false).configure();
    world.daemon().signal(Signal::HUP);
    world.wait_settled(LIVENESS);
    let log = world.daemon().log_text();
    let raised = log.lines().filter(|line| line.contains("alarm raised") && line.contains("latency")).count();
    assert_eq!((raised, active("latency")), (1, Some(1.0)), "once, in spite of the reload");
    world.stop();
    world.prove();
}
