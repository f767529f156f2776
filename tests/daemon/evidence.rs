//! What the interface for programs shows when somebody asks why: rejected rows, what receivers said, what actors do.

use std::{fmt::Write as _, net::SocketAddr};

use postrider_actors::testing::figure;
use serde_json::{Value, json};

use crate::{
    api::{OPERATE, VIEW, with_tokens},
    ops::send,
    support::{
        LIVENESS, World,
        input::{Input, Kind, Row, recipient},
        scripted::Reply,
        wait_for,
    },
};

/// What a GET answers to whoever has this token, which must be 200.
fn read(address: SocketAddr, token: &str, path: &str) -> Value {
    let request =
        format!("GET /api/v1{path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n\r\n");
    let answer = send(address, &request);
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{path}: {error}: {}", answer.body))
}

#[test]
fn rejected_rows_are_shown_in_pages_and_what_stood_in_them_to_who_may_operate() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let address = with_tokens(&mut world);
    let (mut text, mut rows) = ("user_id,city\n".to_owned(), Vec::new());
    for row in 1..=300 {
        if row % 2 == 0 {
            writeln!(text, "  ,city of {row} {}", "x".repeat(250)).expect("strings take everything");
            rows.push(Row::rejected());
        } else {
            writeln!(text, "user-{row},city").expect("strings take everything");
            rows.push(Row::new(Kind::Sent, &format!("user-{row}")));
        }
    }
    world.drop_file(Input::of("half.csv", text, rows).templated()).wait_settled(LIVENESS);
    let (mut found, mut cursor, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let page = read(address, OPERATE, &format!("/files/half.csv/rejects?limit=60{cursor}"));
        assert_eq!(page["total"], 150);
        found.extend(page["items"].as_array().expect("a list").clone());
        pages += 1;
        let Some(next) = page["next"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!((found.len(), pages), (150, 3));
    let rows: Vec<_> = found.iter().map(|row| row["row"].as_u64().expect("a number")).collect();
    assert_eq!(rows, (1..=150).map(|half| half * 2).collect::<Vec<_>>());
    let first = &found[0];
    assert_eq!((&first["line"], &first["is_whole"]), (&json!(3), &json!(false)), "{first}");
    assert!(first["text"].as_str().is_some_and(|text| text.starts_with("  ,city of 2 x")), "{first}");
    let seen = read(address, VIEW, "/files/half.csv/rejects?limit=1");
    assert_eq!((&seen["items"][0]["text"], &seen["items"][0]["reason"]), (&Value::Null, &first["reason"]));
    assert_eq!(seen["next"], "2");
    world.stop();
    world.prove();
}

#[test]
fn f56_dead_letters_show_what_the_receiver_said_and_no_secret_of_the_request() {
    let mut world = World::new("csv");
    let token = world.path("token");
    std::fs::write(&token, "t0ken-of-the-receiver\n").expect("the directory is ours");
    world
        .set("destinations.support.headers.X-Key", format!("file:{}", token.display()))
        .set("destinations.support.storm.percent", 0)
        .set("destinations.support.retry.max_attempts", 2)
        .set("destinations.support.retry.base", "10ms");
    world.script(|request| {
        let row: u64 = request.id.rsplit('_').next().and_then(|row| row.parse().ok()).unwrap_or(0);
        let (status, body) = match row % 4 {
            0 => ("404 No", "no such user\r\nmore".to_owned()),
            1 => ("401 No", "{\"error\":\"bad key t0ken-of-the-receiver\"}".to_owned()),
            2 => ("400 No", format!("request {row} \u{1b}[2J<script>alert(1)</script>")),
            // Its first answer says something, its last one nothing.
            _ if request.earlier == 0 => ("503 No", "down".to_owned()),
            _ => ("503 No", String::new()),
        };
        Reply::Raw(format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes())
    });
    let address = with_tokens(&mut world);
    world.drop_file(Input::csv("all.csv", 400).all(Kind::Dead)).wait_settled(LIVENESS);
    let detail = |letter: &Value| letter["detail"].as_str().map(str::to_owned);
    let letters = |status: u16| {
        let page = read(address, OPERATE, &format!("/dead?status={status}&limit=1000"));
        let letters = page["items"].as_array().expect("a list").clone();
        assert_eq!(letters.len(), 100, "{status}");
        letters
    };
    assert!(letters(404).iter().all(|one| detail(one).as_deref() == Some("no such user")));
    assert!(letters(401).iter().all(|one| detail(one).as_deref() == Some("{\"error\":\"bad key ***\"}")));
    assert!(letters(503).iter().all(|one| detail(one).is_none()), "of its last answer");
    // 100 messages to a batch; each of these has an answer of its own.
    let kept: Vec<_> = letters(400).iter().filter_map(detail).collect();
    assert!((4 * 10..=4 * 16).contains(&kept.len()), "{}", kept.len());
    assert!(kept.iter().all(|text| text.ends_with("\u{1b}[2J<script>alert(1)</script>")), "{kept:?}");
    let groups = read(address, VIEW, "/dead/groups?status=404");
    assert_eq!(groups["groups"][0]["detail"], "no such user");
    let id = &letters(404)[0]["id"];
    let story = read(address, VIEW, &format!("/messages?id={}", id.as_str().expect("an id")));
    assert_eq!(story["items"][0]["detail"], "no such user");
    let by_command: Value = world.postrider(&["dead", "list", "--status", "404", "--json"]).json();
    assert_eq!(by_command[0], letters(404)[0], "one shape");
    let shown = world.postrider(&["dead", "list", "--status", "400"]).ok().stdout;
    assert!(shown.contains("\\u{1b}[2J") && !shown.contains('\u{1b}'), "{shown}");
    let log = world.daemon().log_text();
    assert!(!log.contains("no such user") && !log.contains("t0ken-of"), "I10");
    let store = std::fs::read(world.store()).expect("it is there");
    world.stop();
    let store = [store, std::fs::read(world.store()).expect("it is there")].concat();
    assert!(memchr::memmem::find(&store, b"t0ken-of-the-receiver").is_none(), "I10");
    figure("400 dead letters: what the receiver said of each last attempt, and no secret that it repeated");
}

#[test]
fn actors_say_what_waits_for_them_and_how_busy_they_are() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let address = with_tokens(&mut world);
    world.drop_file(Input::csv("a.csv", 20_000));
    let actors = wait_for(LIVENESS, "somebody to be busy", || {
        let actors = read(address, VIEW, "/actors")["items"].as_array().expect("a list").clone();
        let is_busy = |actor: &Value| actor["busy_percent"].as_f64().is_some_and(|busy| busy > 0.0);
        let busy = |name: &str| actors.iter().any(|actor| actor["name"] == name && is_busy(actor));
        (busy("webhook_delivery") && busy("parser") && busy("batcher")).then_some(actors)
    });
    for (name, room) in [("batcher", json!(64)), ("parser", json!(4)), ("file_watcher", json!(68))] {
        let actor = actors.iter().find(|actor| actor["name"] == name).expect("it runs");
        assert_eq!(actor["mailbox_max"], room, "{actor}");
        assert!(actor["mailbox"].as_u64().is_some(), "{actor}");
    }
    let sweeper = actors.iter().find(|actor| actor["name"] == "sweeper").expect("it runs");
    assert_eq!((&sweeper["mailbox"], &sweeper["mailbox_max"]), (&Value::Null, &Value::Null));
    world.wait_settled(LIVENESS);
    let id = recipient("a.csv", 1);
    assert!(!world.daemon().log_text().contains(&id), "I10");
    wait_for(LIVENESS, "mailboxes to be empty", || {
        let actors = read(address, VIEW, "/actors")["items"].as_array().expect("a list").clone();
        actors.iter().all(|actor| actor["mailbox"].as_u64().unwrap_or(0) == 0).then_some(())
    });
    world.stop();
    world.prove();
}
