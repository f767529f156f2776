//! What whoever is on call hears of: events about alarms and settled files, at a destination and by a command.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use postrider_http::signature::SigningKey;
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    ops::{metric, serve},
    support::{
        LIVENESS, SECRET, World,
        input::{Input, Kind},
        scripted::{Reply, Request, ScriptedReceiver},
        wait_until,
    },
};

/// A world that calls a receiver of its own, `on-call`; one row of each file is dead: the eighth.
fn on_call(
    world: &mut World,
    script: impl Fn(&Request) -> Reply + Send + Sync + 'static,
) -> ScriptedReceiver {
    let receiver = ScriptedReceiver::start(&world.path("on-call.log"), script);
    world.script(|request| Reply::Status(if request.id.ends_with("_8") { 404 } else { 200 }));
    world.add_destination("on-call").set("alarms.events_to", "on-call").set("alarms.dead.window", "3s");
    world.set("destinations.on-call.url", format!("http://{}/hook", receiver.address));
    receiver
}

/// A file of 50 rows, one of which will be dead.
fn one_dead(name: &str) -> Input {
    Input::csv(name, 50).but(8, Kind::Dead)
}

fn event(request: &Request) -> Value {
    serde_json::from_str(&request.body).expect("events are JSON")
}

fn of_kind(receiver: &ScriptedReceiver, kind: &str) -> Vec<Request> {
    receiver.requests().into_iter().filter(|request| event(request)["type"] == kind).collect()
}

fn wait_kind(receiver: &ScriptedReceiver, kind: &str) -> Request {
    wait_until(LIVENESS, kind, || !of_kind(receiver, kind).is_empty());
    of_kind(receiver, kind).remove(0)
}

/// Whether the signature is that of the test's secret.
fn is_signed(request: &Request) -> bool {
    let mut expected = Vec::new();
    let timestamp = &request.headers["webhook-timestamp"];
    let key = SigningKey::new(&SECRET.to_owned().into()).expect("it is a secret");
    key.sign(request.id.as_bytes(), timestamp.as_bytes(), request.body.as_bytes(), &mut expected);
    request.headers["webhook-signature"].contains(&*String::from_utf8_lossy(&expected))
}

/// A script that `alarms.command` names.
fn script(world: &mut World, text: &str) {
    let path = world.path("page-me");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("the directory is ours");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    world.set("alarms.command", vec![path.display().to_string()]);
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn s2_8_an_alarm_and_a_settled_file_are_signed_events_and_alarms_run_a_command() {
    let mut world = World::new("csv");
    let receiver = on_call(&mut world, |_| Reply::Status(200));
    let calls = world.path("calls");
    fs::create_dir(&calls).expect("a new directory");
    let dir = calls.display();
    script(&mut world, &format!("cat > {dir}/$POSTRIDER_EVENT.json\nenv > {dir}/$POSTRIDER_EVENT.env"));
    let address = serve(&mut world);
    world.drop_file(one_dead("a.csv")).wait_settled(LIVENESS);
    let settled = wait_kind(&receiver, "file.settled");
    let data = &event(&settled)["data"];
    for (key, expected) in [("rows", 50), ("accepted", 50), ("sent", 49), ("dead", 1), ("rejected", 0)] {
        assert_eq!(data[key], expected, "{key}: {data}");
    }
    assert_eq!((&data["feed"], &data["name"]), (&"alerts".into(), &"a.csv".into()));
    assert_eq!((&data["failed"], &data["balanced"]), (&Value::Null, &true.into()));
    assert!(data["took_s"].as_f64().is_some_and(|took| took > 0.0), "{data}");
    let raised = wait_kind(&receiver, "alarm.raised");
    let data = &event(&raised)["data"];
    assert_eq!(
        (&data["alarm"], &data["subject"], &data["value"]),
        (&"dead".into(), &"support".into(), &1.0.into())
    );
    assert!(data["remedy"].as_str().is_some_and(|remedy| remedy.contains("dead list")), "{data}");
    let cleared = wait_kind(&receiver, "alarm.cleared");
    assert_eq!(event(&cleared)["data"]["since"], data["since"]);
    assert!(event(&cleared)["data"]["cleared"].is_string());
    let all = receiver.requests();
    assert_eq!(all.len(), 3, "each once: {all:?}");
    for request in &all {
        assert!(is_signed(request), "{request:?}");
        assert_eq!((request.earlier, &*request.headers["content-type"]), (0, "application/json"));
    }
    let last = calls.join("alarm.cleared.env");
    wait_until(LIVENESS, "the command", || read(&last).contains("POSTRIDER_ALARM=dead"));
    for request in [&raised, &cleared] {
        let kind = event(request)["type"].as_str().expect("a text").to_owned();
        assert_eq!(read(&calls.join(format!("{kind}.json"))), request.body);
        let environment = read(&calls.join(format!("{kind}.env")));
        assert!(
            !environment.contains(SECRET) && environment.contains("POSTRIDER_SEVERITY=warning"),
            "{environment}"
        );
    }
    assert!(!calls.join("file.settled.json").exists(), "nobody is called for a file that is done");
    for (way, expected) in [("webhook", 3.0), ("command", 2.0)] {
        let series = format!("postrider_events_total{{way=\"{way}\",outcome=\"sent\"}}");
        wait_until(LIVENESS, &series, || metric(address, &series) == Some(expected));
    }
    // The daemon ends with it: it is heard of all the same.
    world.drop_file(Input::csv("b.csv", 5));
    world.wait_requests(55);
    world.stop();
    assert_eq!(of_kind(&receiver, "file.settled").len(), 2);
}

#[test]
fn a_command_that_hangs_is_killed_and_stops_nothing() {
    let mut world = World::new("csv");
    let receiver = on_call(&mut world, |_| Reply::Status(200));
    let pids = world.path("pids");
    script(&mut world, &format!("sleep 1000 &\necho $$ $! >> {}\nwait", pids.display()));
    let address = serve(&mut world);
    let begun = Instant::now();
    world.drop_file(one_dead("a.csv")).wait_settled(LIVENESS);
    wait_kind(&receiver, "alarm.cleared");
    world.drop_file(Input::csv("b.csv", 5)).wait_settled(LIVENESS);
    assert!(begun.elapsed() < Duration::from_secs(25), "it waited for the command: {:?}", begun.elapsed());
    let failed = "postrider_events_total{way=\"command\",outcome=\"failed\"}";
    wait_until(LIVENESS, "its end", || metric(address, failed) == Some(1.0));
    assert!(begun.elapsed() > Duration::from_secs(29), "{:?}", begun.elapsed());
    // The next one, for the end of the alarm, hangs when the daemon is to end.
    wait_until(LIVENESS, "the next", || read(&pids).lines().count() == 2);
    let log = world.daemon().log_text();
    let said: Vec<_> = log.lines().filter(|line| line.contains("can't be sent to who is on call")).collect();
    assert!(said.len() == 1 && said[0].contains("was killed"), "{said:?}");
    let stopped = Instant::now();
    world.stop();
    assert!(stopped.elapsed() < Duration::from_secs(15), "{:?}", stopped.elapsed());
    for pid in read(&pids).split_whitespace() {
        let state = || read(Path::new(&format!("/proc/{pid}/stat")));
        wait_until(LIVENESS, "no process to be left", || state().is_empty() || state().contains(") Z "));
    }
}

#[test]
fn a_receiver_of_events_that_is_down_holds_up_nothing_and_gets_them_when_it_is_back() {
    let mut world = World::new("csv");
    let receiver = on_call(&mut world, |request| Reply::Status(if request.earlier < 2 { 503 } else { 200 }));
    let address = serve(&mut world);
    world.drop_file(one_dead("a.csv")).wait_settled(LIVENESS);
    let kinds = ["file.settled", "alarm.raised", "alarm.cleared"];
    for kind in kinds {
        wait_until(LIVENESS, kind, || of_kind(&receiver, kind).len() == 3);
    }
    thread::sleep(Duration::from_secs(3)); // a fourth would come
    for kind in kinds {
        let tries = of_kind(&receiver, kind);
        assert_eq!(tries.len(), 3, "{kind}");
        assert!(tries.iter().all(|request| request.id == tries[0].id && request.body == tries[0].body));
        assert!(tries[2].at - tries[0].at >= Duration::from_secs(3), "1 s, then 2 s");
    }
    let series = |outcome: &str| {
        metric(address, &format!("postrider_events_total{{way=\"webhook\",outcome=\"{outcome}\"}}"))
    };
    assert_eq!((series("sent"), series("failed"), series("dropped")), (Some(3.0), Some(0.0), Some(0.0)));
    let log = world.daemon().log_text();
    let lines = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    assert_eq!(lines("can't be sent to who is on call"), lines("events are sent again"), "{log}");
    // What can't be changed by waiting is tried once; a reload names another receiver.
    let refusing = ScriptedReceiver::start(&world.path("refusing.log"), |_| Reply::Status(401));
    world.set("destinations.on-call.url", format!("http://{}/hook", refusing.address)).configure();
    world.daemon().signal(Signal::HUP);
    world.daemon().wait_log("the new configuration is in use");
    world.drop_file(Input::csv("b.csv", 5)).wait_settled(LIVENESS);
    wait_until(LIVENESS, "it to be given up", || series("failed") == Some(1.0));
    assert_eq!(refusing.requests().len(), 1);
    world.stop();
}

#[test]
fn events_are_rendered_by_the_template_of_their_destination() {
    let mut world = World::new("csv");
    let receiver = on_call(&mut world, |_| Reply::Status(200));
    let template = r#"{"text": {{ data.type ~ " " ~ (data.text if data.text is defined else data.name) }}}"#;
    world.set("destinations.on-call.template", template).start_ready();
    world.drop_file(one_dead("a.csv")).wait_settled(LIVENESS);
    let has = |text: &str| receiver.requests().iter().any(|request| event(request)["text"] == text);
    wait_until(LIVENESS, "the file", || has("file.settled a.csv"));
    wait_until(LIVENESS, "the alarm", || has("alarm.raised 1 messages, more than 0"));
    world.stop();
}

#[test]
fn check_config_finds_out_who_can_t_be_called() {
    let mut world = World::new("csv");
    world.add_destination("on-call").set("alarms.events_to", "on-cal");
    let problem = |world: &mut World, key: &str, arguments: &[&str]| -> String {
        world.configure();
        let answer = world.postrider(&[&["check-config", "--json"], arguments].concat());
        assert_eq!(answer.code, Some(78), "{}{}", answer.stdout, answer.stderr);
        let answer = answer.json();
        let problems = answer["problems"].as_array().expect("they are listed");
        assert_eq!(problems.len(), 1, "{problems:#?}");
        assert_eq!(problems[0]["key"], key, "{problems:#?}");
        problems[0]["advice"].as_str().expect("text").to_owned()
    };
    assert!(problem(&mut world, "alarms.events_to", &[]).contains("did you mean \"on-call\"?"));
    world.set("alarms.events_to", "on-call").set("destinations.on-call.template", "{{ data.points }}");
    let why = problem(&mut world, "destinations.on-call.template", &[]);
    assert!(why.contains("data.points") && why.contains("a destination of their own"), "{why}");
    world.unset("destinations.on-call.template").set("alarms.command", vec!["page-me"]);
    assert!(problem(&mut world, "alarms.command[0]", &[]).contains("absolute path"));
    let path = world.path("page-me");
    world.set("alarms.command", vec![path.display().to_string()]);
    assert!(problem(&mut world, "alarms.command[0]", &["--resolve"]).contains("No such file"));
    fs::create_dir(&path).expect("its place is free");
    assert!(problem(&mut world, "alarms.command[0]", &["--resolve"]).contains("not a file"));
    fs::remove_dir(&path).expect("it is empty");
    fs::write(&path, "").expect("its place is free");
    assert!(problem(&mut world, "alarms.command[0]", &["--resolve"]).contains("can't run it"));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    let summary = world.postrider(&["check-config", "--resolve"]).ok().stdout;
    assert!(
        summary.contains("alarms: events to on-call\n") && summary.contains("alarms: each runs /"),
        "{summary}"
    );
}
