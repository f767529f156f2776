//! The interface for programs, as a page, a script and an attacker meet it.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use postrider_actors::testing::figure;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::{Value, json};

use crate::{
    ops::{HttpResponse, address, get, send, serve},
    support::{
        LIVENESS, World,
        input::{Input, Kind, Row, recipient},
        scripted::Reply,
        wait_for, wait_until,
    },
};

pub(crate) const VIEW: &str = "view-0123456789abcdef";
pub(crate) const OPERATE: &str = "operate-0123456789abc";

/// What a GET answers, which must be 200.
pub(crate) fn read(address: SocketAddr, path: &str) -> Value {
    let answer = get(address, &format!("/api/v1{path}"));
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    assert!(answer.head.contains("content-type: application/json"), "{path}: {}", answer.head);
    assert!(
        answer.head.contains("cache-control: no-store") && answer.head.contains("nosniff"),
        "{}",
        answer.head
    );
    serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{path}: {error}: {}", answer.body))
}

/// A POST with more headers.
fn post_with(address: SocketAddr, path: &str, headers: &str, body: &str) -> HttpResponse {
    let request = format!(
        "POST /api/v1{path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    send(address, &request)
}

const JSON: &str = "Content-Type: application/json\r\n";

fn post(address: SocketAddr, path: &str, body: &Value) -> (u16, Value) {
    let answer = post_with(address, path, JSON, &body.to_string());
    (answer.status, serde_json::from_str(&answer.body).unwrap_or(Value::Null))
}

/// An order that must be carried out.
fn give(address: SocketAddr, path: &str, body: &Value) -> Value {
    let (status, answer) = post(address, path, body);
    assert_eq!(status, 200, "{path}: {answer}");
    answer
}

#[test]
fn it_shows_what_commands_show() {
    let mut world = World::new("csv");
    world.script(|request| match request.earlier {
        0 if request.id.ends_with("_7") => Reply::Status(503),
        _ if request.id.ends_with("_9") => Reply::Status(404),
        _ => Reply::Status(200),
    });
    let address = serve(&mut world);
    world.drop_file(Input::csv("shown.csv", 500)).wait_settled(LIVENESS);
    let file = read(address, "/files/shown.csv");
    for (key, expected) in [
        ("state", json!("done")),
        ("rows", json!(500)),
        ("sent", json!(499)),
        ("dead", json!(1)),
        ("open", json!(0)),
        ("balanced", json!(true)),
        ("to", json!(["support"])),
        ("receipts", json!(null)),
    ] {
        assert_eq!(file[key], expected, "{key}: {file}");
    }
    assert_eq!(file["destinations"]["support"]["sent"], 499);
    assert_eq!(file["percent"].as_f64(), Some(100.0));
    let id = file["id"].as_str().expect("it is registered");
    assert_eq!(read(address, &format!("/files/{id}"))["name"], "shown.csv");
    let files = read(address, "/files?state=done&q=SHOWN&destination=support&sort=name");
    assert_eq!((files["total"].as_u64(), &files["items"][0]["id"]), (Some(1), &json!(id)));
    assert_eq!(read(address, "/files?state=open")["total"], 0);

    let dead = read(address, "/dead?file=shown.csv&status=404");
    let letter = &dead["items"][0];
    assert_eq!((letter["row"].as_u64(), &letter["cause"]), (Some(9), &json!("permanent")));
    assert_eq!(letter["recipient"], recipient("shown.csv", 9).as_str());
    let shown: Value = world.postrider(&["dead", "list", "--json"]).json();
    assert_eq!(&shown[0], letter, "the same as the command shows");
    let groups = read(address, "/dead/groups");
    assert_eq!((groups["total"].as_u64(), groups["groups"][0]["status"].as_u64()), (Some(1), Some(404)));

    let message = letter["id"].as_str().expect("an id");
    let story = read(address, &format!("/messages?id={message}"));
    let by_command: Value = world.postrider(&["messages", "--id", message, "--json"]).json();
    assert_eq!(story["items"], by_command, "one shape");
    let found = read(address, &format!("/messages?recipient={}", recipient("shown.csv", 7)));
    assert_eq!(found["items"][0]["attempts"][0]["status"], 503);
    assert_eq!(found["next"], Value::Null);

    let destination = read(address, "/destinations/support");
    assert_eq!(
        (&destination["state"], destination["counts"]["sent"].as_u64()),
        (&json!("enabled"), Some(499))
    );
    assert_eq!(destination["breaker"], "closed");
    let overview = read(address, "/overview");
    assert_eq!((overview["open"].as_u64(), overview["dead"].as_u64()), (Some(0), Some(1)));
    assert_eq!(overview["daemon"]["phase"], "ready");
    assert_eq!(overview["files"]["done"], 1);
    let series = read(address, "/series?destination=support");
    assert_eq!(series["at"].as_array().map(Vec::len), series["sent_per_s"].as_array().map(Vec::len));
    let actors = read(address, "/actors");
    let actors = actors["items"].as_array().expect("a list");
    for name in ["feed", "webhook_delivery", "sweeper"] {
        let found = actors.iter().find(|actor| actor["name"] == name);
        let found = found.unwrap_or_else(|| panic!("{name} is not among {actors:?}"));
        assert_eq!((found["alive"].as_bool(), found["generation"].as_u64()), (Some(true), Some(1)));
    }
    let receipts = read(address, "/receipts");
    assert_eq!(receipts["kept"], false);

    // Whatever is described can be read.
    let description = read(address, "/openapi.json");
    let paths = description["paths"].as_object().expect("paths");
    for (path, item) in paths.iter().filter(|(path, _)| !path.contains('{') && !path.ends_with("/events")) {
        let path = path.strip_prefix("/api/v1").expect("one root");
        match (item["get"].is_object(), path) {
            (true, "/messages") => assert_eq!(get(address, "/api/v1/messages").status, 400),
            (true, path) => drop(read(address, path)),
            (false, path) => assert_eq!(get(address, &format!("/api/v1{path}")).status, 405, "{path}"),
        }
    }
    world.stop();
    world.prove();
}

#[test]
fn a_name_that_nothing_has_is_no_empty_list() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let address = serve(&mut world);
    world.drop_file(Input::csv("a.csv", 10)).wait_settled(LIVENESS);
    for missing in [
        "/files/nosuch",
        "/destinations/nosuch",
        "/dead?file=nosuch",
        "/dead?destination=nosuch",
        "/nosuch",
        "/series?destination=x",
    ] {
        let answer = get(address, &format!("/api/v1{missing}"));
        assert_eq!(answer.status, 404, "{missing}");
        assert!(answer.head.contains("application/problem+json"), "{}", answer.head);
        let problem: Value = serde_json::from_str(&answer.body).expect("a problem is JSON");
        assert_eq!((problem["status"].as_u64(), &problem["type"]), (Some(404), &json!("about:blank")));
    }
    for wrong in [
        "/files?state=x",
        "/files?sort=x",
        "/files?limit=0",
        "/files?limit=1001",
        "/files?nosuch=1",
        "/dead?reason=x",
        "/dead?older_than=x",
        "/messages",
        "/messages?id=x",
        "/audit?limit=x",
        "/files?cursor=x",
    ] {
        assert_eq!(get(address, &format!("/api/v1{wrong}")).status, 400, "{wrong}");
    }
    for order in ["/destinations/nosuch/pause", "/files/nosuch/hold"] {
        assert_eq!(post(address, order, &json!({})).0, 404, "{order}");
    }
    for (order, body) in [
        ("/destinations/support/pause", json!({ "reasno": "x" })),
        ("/destinations/support/rate", json!({ "rate_per_s": 0 })),
        ("/destinations/support/rate", json!({})),
        ("/destinations/support/concurrency", json!({ "concurrency": "many" })),
        ("/files/a.csv/priority", json!({ "priority": "high" })),
        ("/dead/redrive", json!({})),
        ("/dead/redrive", json!([])),
    ] {
        assert_eq!(post(address, order, &body).0, 400, "{order} {body}");
    }
    world.drop_file(Input::csv("b.csv", 10)).wait_settled(LIVENESS);
    world.drop_file(Input::csv("a.csv", 11)).wait_settled(LIVENESS);
    let answer = get(address, "/api/v1/files/a.csv");
    let problem: Value = serde_json::from_str(&answer.body).expect("a problem is JSON");
    assert_eq!((answer.status, problem["ids"].as_array().map(Vec::len)), (409, Some(2)));
    world.stop();
    world.prove();
}

#[test]
fn orders_hold_at_once_and_leave_their_line() {
    let mut world = World::new("csv");
    world.script(|request| match request.earlier {
        0 if request.id.ends_with("_3") => Reply::Status(404),
        _ => Reply::Status(200),
    });
    let address = serve(&mut world);
    let paused = give(address, "/destinations/support/pause", &json!({ "reason": "a new certificate" }));
    assert_eq!(paused["changed"], 1);
    assert_eq!(give(address, "/destinations/support/pause", &json!({}))["changed"], 0, "it was paused");
    world.drop_file(Input::csv("held.csv", 100));
    wait_until(LIVENESS, "the file to be read", || {
        world.file("held.csv").is_some_and(|file| file["state"] == "ingested")
    });
    assert_eq!(world.request_count(), 0);
    let destination = wait_for(LIVENESS, "the pause to be seen", || {
        let destination = read(address, "/destinations/support");
        (destination["state"] == "disabled").then_some(destination)
    });
    assert_eq!(destination["reason"], "a new certificate");
    let dry = give(address, "/files/held.csv/hold", &json!({ "dry_run": true }));
    assert_eq!((dry["open"].as_u64(), dry["changed"].as_u64()), (Some(100), Some(0)));
    assert_eq!(give(address, "/files/held.csv/hold", &json!({}))["changed"], 1);
    assert_eq!(read(address, "/files/held.csv")["state"], "held");
    give(address, "/destinations/support/resume", &json!({}));
    thread::sleep(Duration::from_secs(2));
    assert_eq!(world.request_count(), 0, "the file is held by itself");
    give(address, "/files/held.csv/priority", &json!({ "priority": "urgent" }));
    give(address, "/destinations/support/rate", &json!({ "rate_per_s": 5000 }));
    give(address, "/destinations/support/concurrency", &json!({ "concurrency": 8 }));
    let destination = read(address, "/destinations/support");
    assert_eq!(
        (destination["rate_per_s"].as_u64(), destination["rate_set"].as_bool()),
        (Some(5000), Some(true))
    );
    assert_eq!(destination["concurrency"], 8);
    give(address, "/destinations/support/concurrency", &json!({ "concurrency": "auto" }));
    give(address, "/destinations/support/concurrency", &json!({ "concurrency": null }));
    give(address, "/files/held.csv/release", &json!({}));
    world.wait_settled(LIVENESS);
    let dry = give(address, "/dead/redrive", &json!({ "file": "held.csv", "dry_run": true }));
    assert_eq!((dry["would_redrive"].as_u64(), dry["redriven"].as_u64()), (Some(1), Some(0)));
    let redriven = give(address, "/dead/redrive", &json!({ "file": "held.csv", "status": 404 }));
    assert_eq!((redriven["redriven"].as_u64(), redriven["more"].as_bool()), (Some(1), Some(false)));
    world.redrives += 1;
    world.wait_settled(LIVENESS);
    assert_eq!(read(address, "/dead")["items"], json!([]));
    assert_eq!(give(address, "/files/held.csv/cancel", &json!({}))["open"], 0);
    let config = give(address, "/reload", &json!({}));
    assert_eq!(config["config"], world.config_path().display().to_string().as_str());

    let audit = read(address, "/audit");
    let orders: Vec<_> =
        audit["items"].as_array().expect("a list").iter().map(|line| &line["order"]).collect();
    for order in
        ["pause", "resume", "hold", "release", "priority", "rate", "concurrency", "redrive", "reload"]
    {
        assert!(orders.contains(&&json!(order)), "{order} is not among {orders:?}");
    }
    assert_eq!(orders.iter().filter(|order| **order == "pause").count(), 1, "only what changed something");
    assert!(audit["items"].as_array().expect("a list").iter().all(|line| line["by"] == "api (operate)"));
    let lines = read(address, "/audit?of=--status%20404");
    assert_eq!(lines["items"][0]["of"], "dead letters --file held.csv --status 404");
    let shown: Value = world.postrider(&["audit", "--json"]).json();
    assert_eq!(shown, audit["items"], "the same as the command shows");
    world.stop();
    world.prove();
}

/// The events of a stream, one after the other.
struct Events {
    stream: TcpStream,
    text: String,
}

impl Events {
    fn open(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(LIVENESS)).expect("a timeout can be set");
        let request = format!("GET /api/v1/events HTTP/1.1\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("it reads");
        Self { stream, text: String::new() }
    }

    /// The next event of this name.
    fn next(&mut self, name: &str) -> Value {
        let start = format!("event: {name}\ndata: ");
        loop {
            if let Some(at) = self.text.find(&start) {
                let data = &self.text[at + start.len()..];
                if let Some(end) = data.find("\n\n") {
                    // Chunks of the transfer may lie between, in lines of their own.
                    let value = serde_json::from_str(&data[..end]);
                    let rest = data[end..].to_owned();
                    if let Ok(value) = value {
                        self.text = rest;
                        return value;
                    }
                    self.text = rest;
                    continue;
                }
            }
            let mut bytes = vec![0; 64 << 10];
            let read = self.stream.read(&mut bytes).expect("the stream goes on");
            assert!(read > 0, "the stream has ended: {}", self.text);
            self.text.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
    }
}

#[test]
fn whoever_watches_sees_progress_every_second() {
    let mut world = World::new("csv");
    world.receive(&[]).set("destinations.support.rate_per_s", 100).set("destinations.support.burst", 10);
    let address = serve(&mut world);
    let mut events = Events::open(address);
    assert_eq!(events.next("overview")["open"], 0);
    world.drop_file(Input::csv("watched.csv", 500));
    let mut seen = Vec::new();
    let settled = wait_for(LIVENESS, "the file to be settled", || {
        let files = events.next("files");
        let file = files["items"].as_array()?.iter().find(|file| file["name"] == "watched.csv")?.clone();
        seen.push(file["sent"].as_u64()?);
        (file["complete"] == true).then_some(file)
    });
    assert_eq!(settled["state"], "done", "the event after it was settled has it once more");
    assert!(seen.windows(2).all(|pair| pair[0] <= pair[1]) && seen.len() >= 4, "{seen:?}");
    let sample = events.next("sample");
    assert!(sample["destinations"]["support"]["attempts_per_s"].is_number(), "{sample}");
    assert_eq!(events.next("destinations")["items"][0]["name"], "support");
    world.stop();
    world.prove();
}

#[test]
fn f56_streams_are_bounded_and_one_that_is_not_read_is_cut_off() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let address = serve(&mut world);
    // Names that make the events long, so that the socket's buffers are soon full.
    give(address, "/destinations/support/pause", &json!({}));
    for number in 0..150 {
        world.drop_file(Input::csv(&format!("{}-{number}.csv", "x".repeat(150)), 1));
    }
    let mut streams: Vec<_> = (0..16).map(|_| Events::open(address)).collect();
    for stream in &mut streams {
        stream.next("overview");
    }
    let refused = get(address, "/api/v1/events");
    assert_eq!(refused.status, 429);
    assert_eq!(get(address, "/healthz").status, 200, "there is room for others");
    let begun = Instant::now();
    let mut unread = streams.pop().expect("sixteen");
    let readers: Vec<_> = streams
        .into_iter()
        .map(|mut stream| {
            thread::spawn(move || {
                let begun = Instant::now();
                while begun.elapsed() < Duration::from_secs(45) {
                    stream.next("overview");
                }
            })
        })
        .collect();
    let cut_off = wait_for(Duration::from_mins(1), "the place to be free", || {
        let mut stream = TcpStream::connect(address).expect("it listens");
        let request = format!("GET /api/v1/events HTTP/1.1\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut status = [0; 12];
        stream.read_exact(&mut status).expect("it answers");
        thread::sleep(Duration::from_millis(500));
        (&status == b"HTTP/1.1 200").then(|| begun.elapsed())
    });
    let mut rest = Vec::new();
    let _ = unread.stream.read_to_end(&mut rest);
    for reader in readers {
        reader.join().expect("whoever reads is not cut off");
    }
    figure(format!(
        "a stream that nobody reads: cut off after {} s; 15 that are read: none",
        cut_off.as_secs()
    ));
    give(address, "/destinations/support/resume", &json!({}));
    world.wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

/// A daemon with both tokens.
pub(crate) fn with_tokens(world: &mut World) -> SocketAddr {
    let (view, operate) = (world.path("view"), world.path("operate"));
    fs::write(&view, VIEW).expect("the directory is ours");
    fs::write(&operate, format!("{OPERATE}\n")).expect("the directory is ours");
    world
        .set("ops.view_token", format!("file:{}", view.display()))
        .set("ops.operate_token", format!("file:{}", operate.display()));
    serve(world)
}

#[test]
fn f56_without_a_token_nothing_is_seen_and_with_the_one_for_looking_nothing_is_ordered() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let address = with_tokens(&mut world);
    let get_with = |path: &str, headers: &str| {
        send(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{headers}\r\n"))
    };
    let bearer = |token: &str| format!("Authorization: Bearer {token}\r\n");
    let paths = [
        "/api/v1/overview",
        "/api/v1/files",
        "/api/v1/events",
        "/api/v1/openapi.json",
        "/api/v1/nosuch",
        "/metrics",
    ];
    for path in paths {
        for headers in [
            String::new(),
            bearer("view-0123456789abcdeX"),
            format!("Cookie: token={OPERATE}\r\n"),
            format!("Authorization: Basic {OPERATE}\r\n"),
            bearer(VIEW) + &bearer(OPERATE),
        ] {
            let answer = get_with(path, &headers);
            assert_eq!(answer.status, 401, "{path} {headers}");
            assert!(answer.head.contains("www-authenticate: bearer"), "{}", answer.head);
            assert!(!answer.body.contains("postrider_") && !answer.body.contains(OPERATE), "{}", answer.body);
        }
        assert_eq!(get_with(&format!("{path}?token={OPERATE}"), "").status, 401, "{path}");
    }
    assert_eq!(get_with("/healthz", "").status, 200);
    assert_eq!(get_with("/metrics", &bearer(VIEW)).status, 200);
    let session: Value =
        serde_json::from_str(&get_with("/api/v1/session", &bearer(VIEW)).body).expect("JSON");
    assert_eq!((&session["role"], &session["auth"]), (&json!("view"), &json!(true)));
    let pause = "/destinations/support/pause";
    assert_eq!(post_with(address, pause, &(bearer(VIEW) + JSON), "{}").status, 403);
    assert_eq!(post_with(address, pause, JSON, "{}").status, 401);
    assert_eq!(get_with("/api/v1/audit", &bearer(VIEW)).status, 200);
    let log = world.daemon().log_text();
    assert!(!log.contains(VIEW) && !log.contains(OPERATE), "I10");
    let audit: Value =
        serde_json::from_str(&get_with("/api/v1/audit", &bearer(VIEW)).body).expect("answers are JSON");
    assert_eq!(audit["items"], json!([]), "nothing was ordered");
    assert_eq!(post_with(address, pause, &(bearer(OPERATE) + JSON), "{}").status, 200);
    world.stop();
    figure("6 paths, each with 6 wrong or missing tokens: 401; an order with the token for looking: 403");
}

#[test]
fn f56_no_page_of_another_origin_can_give_an_order() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let address = serve(&mut world);
    let pause = "/destinations/support/pause";
    for (headers, status) in [
        // What a form of any page may send without asking.
        ("Content-Type: text/plain\r\n".to_owned(), 415),
        ("Content-Type: application/x-www-form-urlencoded\r\n".to_owned(), 415),
        (String::new(), 415),
        (format!("{JSON}Origin: http://evil.example\r\n"), 403),
        (format!("{JSON}Origin: null\r\n"), 403),
        (format!("{JSON}Origin: http://localhost:{}\r\n", address.port()), 403),
        (format!("{JSON}Origin: http://127.0.0.1:{}\r\n", address.port() ^ 1), 403),
        (format!("{JSON}Sec-Fetch-Site: cross-site\r\n"), 403),
        (format!("{JSON}Sec-Fetch-Site: same-site\r\n"), 403),
    ] {
        let answer = post_with(address, pause, &headers, "{}");
        assert_eq!(answer.status, status, "{headers}: {}", answer.body);
        assert!(!answer.head.contains("access-control-"), "{}", answer.head);
    }
    let wrong_host = send(
        address,
        &format!("POST /api/v1{pause} HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n{JSON}\r\n{{}}"),
    );
    assert_eq!(wrong_host.status, 421);
    for method in ["PUT", "DELETE", "PATCH", "OPTIONS", "GET"] {
        let answer = send(address, &format!("{method} /api/v1{pause} HTTP/1.1\r\nHost: {address}\r\n\r\n"));
        assert_eq!(answer.status, 405, "{method}");
        assert!(answer.head.contains("allow: post"), "{}", answer.head);
    }
    assert_eq!(read(address, "/destinations/support")["state"], "enabled");
    assert_eq!(read(address, "/audit")["items"], json!([]));
    let own = format!("{JSON}Origin: http://{address}\r\nSec-Fetch-Site: same-origin\r\n");
    assert_eq!(post_with(address, pause, &own, "{}").status, 200);
    world.stop();
    figure("10 requests of other pages, names and types, 5 methods: refused, and nothing in the audit");
}

#[test]
fn f56_a_body_that_is_long_or_slow_is_cut_off() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let address = serve(&mut world);
    let pause = "/destinations/support/pause";
    let long = format!("{{\"reason\":\"{}\"}}", "x".repeat(20 << 10));
    assert_eq!(post_with(address, pause, JSON, &long).status, 413);
    let begun = Instant::now();
    let request = format!(
        "POST /api/v1{pause} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 100\r\n{JSON}\r\n{{\"rea"
    );
    assert_eq!(send(address, &request).status, 408);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert_eq!(read(address, "/audit")["items"], json!([]));
    world.stop();
    figure(format!("half a body: answered 408 after {} ms", begun.elapsed().as_millis()));
}

#[test]
fn f56_what_came_from_outside_is_nothing_but_data() {
    let script = "<script>alert(1)</script>";
    let mut world = World::new("csv");
    world.script(|_| Reply::Status(404)).set("destinations.support.storm.percent", 0);
    let address = serve(&mut world);
    let text = format!("user_id\n{script}\n");
    let name = "<img src=x onerror=alert(1)>.csv";
    world.drop_file(Input::of(name, text, vec![Row::new(Kind::Dead, script)])).wait_settled(LIVENESS);
    let answer = get(address, "/api/v1/dead");
    assert!(answer.head.contains("content-type: application/json"), "{}", answer.head);
    assert!(answer.head.contains("x-content-type-options: nosniff"), "{}", answer.head);
    let dead: Value = serde_json::from_str(&answer.body).expect("answers are JSON");
    assert_eq!(
        (&dead["items"][0]["recipient"], &dead["items"][0]["file_name"]),
        (&json!(script), &json!(name))
    );
    let problem = get(address, "/api/v1/files/%3Cscript%3E");
    assert_eq!(problem.status, 404);
    assert!(
        problem.head.contains("application/problem+json") && problem.head.contains("nosniff"),
        "{}",
        problem.head
    );
    let log = world.daemon().log_text();
    assert!(!log.contains(script), "I10");
    world.stop();
    world.prove();
}

#[test]
fn a_second_daemon_takes_the_next_port_and_says_so() {
    let mut worlds = [World::new("csv"), World::new("csv")];
    let addresses = worlds.each_mut().map(|world| {
        world.receive(&[]).unset("ops.listen").start_ready();
        address(world)
    });
    assert_ne!(addresses[0], addresses[1]);
    for (world, address) in worlds.iter().zip(addresses) {
        assert!((9464..9464 + 32).contains(&address.port()), "{address}");
        let note = fs::read(world.state().join("ops.json")).expect("it is noted");
        let note: Value = serde_json::from_slice(&note).expect("notes are JSON");
        assert_eq!(note["address"], address.to_string().as_str());
        assert_eq!(get(address, "/readyz").body, "ready\n");
        assert_eq!(
            read(address, "/overview")["daemon"]["config"],
            world.config_path().display().to_string().as_str()
        );
    }
    let log = worlds[1].daemon_log_text();
    assert!(log.contains("another daemon has the port before it"), "{log}");
    for world in &mut worlds {
        world.stop();
    }
}

#[test]
fn other_machines_need_a_token_and_tls() {
    let mut world = World::new("csv");
    world.receive(&[]).set("ops.listen", "0.0.0.0:0").configure();
    let refused = world.postrider(&["check-config"]);
    assert_eq!(refused.code, Some(78));
    for word in ["ops.listen", "ops.operate_token", "ops.tls_cert_file"] {
        assert!(refused.stderr.contains(word), "{word}: {}", refused.stderr);
    }
    let own = rcgen::generate_simple_self_signed(["postrider.internal".to_owned()]).expect("a certificate");
    let (certificate, key) = (world.path("ops.pem"), world.path("ops.key"));
    fs::write(&certificate, own.cert.pem()).expect("the directory is ours");
    fs::write(&key, own.signing_key.serialize_pem()).expect("the directory is ours");
    let token = world.path("operate");
    fs::write(&token, OPERATE).expect("the directory is ours");
    world
        .set("ops.operate_token", format!("file:{}", token.display()))
        .set("ops.tls_cert_file", certificate.display().to_string())
        .set("ops.tls_key", format!("file:{}", key.display()))
        .set("ops.allowed_hosts", vec!["postrider.internal"])
        .start_ready();
    let port = address(&world).port();
    let mut roots = RootCertStore::empty();
    roots.add(own.cert.der().clone()).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring offers them")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "postrider.internal".try_into().expect("a name");
    let connection = ClientConnection::new(Arc::new(client), name).expect("a client");
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    let mut stream = StreamOwned::new(connection, stream);
    let request = format!(
        "GET /api/v1/session HTTP/1.1\r\nHost: postrider.internal:{port}\r\nAuthorization: Bearer {OPERATE}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"operate\""), "{answer}");
    // Without TLS nothing is answered.
    let mut plain = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    plain.set_read_timeout(Some(LIVENESS)).expect("a timeout can be set");
    let _ = plain.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP/"), "{}", String::from_utf8_lossy(&answer));
    world.stop();
}
