//! Every command as an operator meets it: exit codes, `--json`, `--help`, completions.

use std::{
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind, recipient},
    process::{Answer, POSTRIDER, run},
    scripted::Reply,
    wait_report, wait_until,
};

const COMMANDS: [&str; 12] = [
    "run",
    "demo",
    "receiver",
    "check-config",
    "status",
    "files",
    "watch",
    "messages",
    "dead",
    "destinations",
    "migrate",
    "completions",
];

/// `postrider ARGUMENTS`, without any config.
fn postrider(arguments: &[&str]) -> Answer {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    run(Command::new(POSTRIDER).args(arguments), scratch.path(), Duration::from_secs(30))
}

/// A world in which 30 of 40 messages were sent and 10 are dead; the daemon is gone.
fn finished_world() -> World {
    let mut world = World::new("csv");
    world.script(|request| {
        Reply::Status(if request.id.ends_with('3') || request.id.ends_with("_40") { 404 } else { 200 })
    });
    world.set("destinations.support.storm.percent", 0);
    world.drop_file(Input::csv("users.csv", 40)).start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
    world
}

#[test]
fn help_is_complete() {
    let help = postrider(&["--help"]).ok().stdout;
    for command in COMMANDS {
        assert!(help.contains(command), "`{command}` is missing in: {help}");
        let long = postrider(&[command, "--help"]).ok().stdout;
        assert!(long.lines().count() > 5, "{long}");
    }
    assert!(help.contains("78"), "the exit codes are listed: {help}");
    for command in ["list", "redrive", "export"] {
        postrider(&["dead", command, "--help"]).ok();
    }
    let version = postrider(&["--version"]).ok().stdout;
    assert!(
        version.contains(env!("CARGO_PKG_VERSION")) && version.contains("engines: embedded"),
        "{version}"
    );
}

#[test]
fn completions_are_made_for_every_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let script = postrider(&["completions", shell]).ok().stdout;
        for command in COMMANDS {
            assert!(script.contains(command), "{shell} knows `{command}`");
        }
        for word in ["unavailable", "poison"] {
            assert!(script.contains(word), "{shell} completes --reason and --cause with `{word}`");
        }
    }
}

#[test]
fn wrong_usage_exits_2() {
    for arguments in [
        &["no-such-command"][..],
        &["files", "--no-such-flag"],
        &["messages"],
        &["completions", "no-such-shell"],
        &["demo", "-c", "/etc/postrider/postrider.toml"],
    ] {
        assert_eq!(postrider(arguments).code, Some(2), "{arguments:?}");
    }
}

#[test]
fn a_bad_config_exits_78_and_names_every_problem() {
    let mut world = World::new("csv");
    world.configure();
    let text = fs::read_to_string(world.config_path()).expect("it was just written");
    let bad = text
        .replace("format = \"json\"", "fromat = \"json\"")
        .replace("concurrency = 16", "concurrency = \"many\"")
        + "\n[feeds.orphan]\npath = \"/tmp/orphan\"\nformat = \"text\"\ndestinations = [\"nowhere\"]\n";
    fs::write(world.config_path(), bad).expect("the directory is ours");
    for command in ["check-config", "run"] {
        let answer = world.postrider(&[command]);
        assert_eq!(answer.code, Some(78), "{command}: {}", answer.stderr);
        for named in ["fromat", "format", "concurrency", "many", "nowhere"] {
            assert!(answer.stderr.contains(named), "{command} does not name `{named}`: {}", answer.stderr);
        }
    }
}

#[test]
fn a_missing_config_names_the_file() {
    let answer = postrider(&["check-config", "-c", "/nonexistent/postrider.toml"]);
    assert!(matches!(answer.code, Some(64..=78)), "{:?}", answer.code);
    assert!(answer.stderr.contains("/nonexistent/postrider.toml"), "{}", answer.stderr);
}

#[test]
fn a_good_config_is_summed_up() {
    let mut world = World::new("csv");
    world.configure();
    let answer = world.postrider(&["check-config"]).ok();
    assert!(answer.stdout.contains("alerts") && answer.stdout.contains("support"), "{}", answer.stdout);
    world.postrider(&["check-config", "--json"]).ok().json();
}

#[test]
fn without_a_store_the_read_commands_say_so() {
    let mut world = World::new("csv");
    world.configure();
    for arguments in [&["status"][..], &["files"], &["messages", "--recipient", "anybody"], &["dead", "list"]]
    {
        let answer = world.postrider(arguments);
        assert!(matches!(answer.code, Some(64..=78)), "{arguments:?}: {:?}", answer.code);
        assert!(answer.stderr.contains("state"), "it names the place: {}", answer.stderr);
    }
}

#[test]
fn what_was_done_can_be_read_with_and_without_the_daemon() {
    let mut world = finished_world();
    for with_daemon in [false, true] {
        if with_daemon {
            world.start_ready();
        }
        world.postrider(&["status"]).ok();
        let status = world.postrider(&["status", "--json"]).ok().json();
        assert!(status.to_string().contains("support"), "{status}");

        let table = world.postrider(&["files"]).ok().stdout;
        assert!(table.contains("users.csv") && table.contains("40"), "{table}");
        let files = world.postrider(&["files", "--json"]).ok().json();
        let file = &files[0];
        assert_eq!(
            (&file["rows"], &file["balanced"], &file["complete"]),
            (&40.into(), &true.into(), &true.into())
        );
        let counts = &file["destinations"]["support"];
        let sent = counts["sent"].as_u64().expect("a count");
        assert_eq!(sent + counts["dead"].as_u64().expect("a count"), 40);
        assert_eq!(counts["dead"], 5, "{counts}");
        let id = file["id"].as_str().expect("an id");
        for name in ["users.csv", id] {
            assert_eq!(world.postrider(&["files", name, "--json"]).ok().json()[0]["id"], id);
        }
        assert_ne!(world.postrider(&["files", "no-such-file"]).code, Some(0));

        let who = recipient("users.csv", 3);
        let messages = world.postrider(&["messages", "--recipient", &who, "--json"]).ok().json();
        let text = messages.to_string();
        assert!(
            text.contains(&format!("msg_{id}_3")) && text.contains("dead") && text.contains("404"),
            "{text}"
        );
        assert!(world.postrider(&["messages", "--id", &format!("msg_{id}_1")]).ok().stdout.contains("sent"));
        assert_ne!(world.postrider(&["messages", "--recipient", "nobody-at-all"]).code, Some(0));

        let dead = world.postrider(&["dead", "list", "--json"]).ok().json();
        assert_eq!(dead.as_array().map(Vec::len), Some(5), "{dead}");
        for filter in [
            ["--file", "users.csv"],
            ["--destination", "support"],
            ["--reason", "status"],
            ["--cause", "permanent"],
        ] {
            let found = world.postrider(&[&["dead", "list", "--json"], &filter[..]].concat()).ok().json();
            assert_eq!(found.as_array().map(Vec::len), Some(5), "{filter:?}: {found}");
        }
        let none = world.postrider(&["dead", "list", "--json", "--reason", "timeout"]).ok().json();
        assert_eq!(none, Value::Array(Vec::new()));
        let export = world.postrider(&["dead", "export"]).ok().stdout;
        assert_eq!(export.lines().count(), 6, "a header and five rows: {export}");
        world.postrider(&["destinations", "--json"]).ok().json();
    }
    world.stop();
}

#[test]
fn a_name_that_nobody_has_is_refused_by_every_filter_of_dead_letters() {
    let world = finished_world();
    for command in [&["dead", "list"][..], &["dead", "summary"], &["dead", "export"], &["dead", "redrive"]] {
        for filter in [["--file", "nosuch"], ["--destination", "nosuch"]] {
            let answer = world.postrider(&[command, &filter[..]].concat());
            assert_eq!(answer.code, world.postrider(&["files", "nosuch"]).code, "{command:?} {filter:?}");
            assert!(answer.stderr.contains("nosuch"), "{command:?}: {}", answer.stderr);
        }
    }
    assert_eq!(world.postrider(&["watch", "nosuch", "--wait", "0s"]).code, Some(1));
}

#[test]
fn a_list_that_is_cut_says_so_and_what_has_no_status_has_none() {
    let mut world = World::new("csv");
    world.script(|request| match request.id.as_str() {
        id if id.ends_with("_1") => Reply::Reset,
        id if id.ends_with("_2") => Reply::Status(422),
        _ => Reply::Status(404),
    });
    world.set("destinations.support.storm.percent", 0).set("destinations.support.retry.max_attempts", 2);
    for name in ["a.csv", "b.csv"] {
        world.drop_file(Input::csv(name, 9).all(Kind::Dead));
    }
    world.start().wait_settled(LIVENESS);
    world.stop();
    let list = world.postrider(&["dead", "list", "--limit", "3"]).ok().stdout;
    assert!(list.contains("Showing 3 of 18 dead letters; --limit N shows more."), "{list}");
    let list = world.postrider(&["dead", "list"]).ok().stdout;
    assert!(!list.contains("Showing"), "{list}");
    let reset: Vec<_> = list.lines().filter(|line| line.contains("reset")).collect();
    assert!(reset.len() == 2 && reset.iter().all(|line| line.contains(" - ")), "{list}");
    let files = world.postrider(&["files", "--limit", "1"]).ok().stdout;
    assert!(files.contains("Showing 1 of 2, the latest first"), "{files}");
    assert!(files.contains("1 file, 9 rows: 0 sent, 9 dead, 0 open"), "{files}");

    let summary = world.postrider(&["dead", "summary", "--json"]).ok().json();
    let groups = summary["groups"].as_array().expect("an array");
    assert_eq!((&summary["total"], groups.len()), (&18.into(), 6), "three of each file: {summary}");
    assert_eq!((&groups[0]["messages"], &groups[0]["status"]), (&7.into(), &404.into()));
    let shown = world.postrider(&["dead", "summary", "--file", "a.csv", "--limit", "1"]).ok().stdout;
    assert!(shown.contains("9 dead letters") && shown.contains("Showing 1 of 3 groups"), "{shown}");
    assert!(shown.contains("404") && shown.contains("a.csv") && !shown.contains("b.csv"), "{shown}");
    for _ in 0..2 {
        world.postrider(&["pause", "support"]).ok();
        world.postrider(&["resume", "support"]).ok();
    }
    let audit = world.postrider(&["audit", "--limit", "1"]).ok().stdout;
    assert!(audit.contains("Showing 1 lines, and there are more"), "{audit}");
}

#[test]
fn the_same_bytes_under_a_second_name_are_found_by_it() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let input = Input::csv("m1.csv", 20).all(Kind::Sent);
    let again = input.clone().named("m2.csv");
    world.drop_file(input).start().wait_settled(LIVENESS);
    wait_report(&world.done("m1.csv"));
    world.drop_file(again);
    wait_report(&world.done("m2.csv"));
    let first = world.postrider(&["files", "m1.csv", "--json"]).ok().json();
    let second = world.postrider(&["files", "m2.csv", "--json"]).ok().json();
    assert_eq!((&second[0]["id"], &second[0]["name"]), (&first[0]["id"], &"m2.csv".into()));
    assert!(world.postrider(&["files", "m2.csv"]).ok().stdout.contains("m2.csv"));
    world.postrider(&["dead", "list", "--file", "m2.csv"]).ok();
    world.stop();
    world.prove();
}

#[test]
fn a_file_says_how_far_it_is_and_its_end_is_logged_once_with_its_counts() {
    let mut world = World::new("csv");
    world.receive(&[]).set("destinations.support.rate_per_s", 100).set("destinations.support.burst", 1);
    world.drop_file(Input::csv("slow.csv", 400).all(Kind::Sent)).start_ready();
    wait_until(LIVENESS, "it to be read", || {
        world.file("slow.csv").is_some_and(|file| file["stage"] == "sending")
    });
    let shown = world.postrider(&["files"]).ok().stdout;
    assert!(shown.contains("sending"), "{shown}");
    wait_until(LIVENESS, "the rate to be named", || {
        world.postrider(&["files"]).ok().stdout.contains("slow.csv at support: rate_per_s = 100")
    });
    let followed = world.postrider(&["watch", "slow.csv"]).ok().stdout;
    let last = followed.lines().last().expect("a line");
    assert!(
        last.contains("slow.csv: 100 %, 400 of 400 messages settled") && last.ends_with("done"),
        "{followed}"
    );
    assert!(followed.lines().count() >= 2, "{followed}");
    let file = world.file("slow.csv").expect("it is known");
    assert_eq!((&file["stage"], &file["percent"]), (&"done".into(), &100.into()));
    assert!(file["took_s"].as_f64().is_some_and(|took| took >= 3.0), "{file}");
    let shown = world.postrider(&["files"]).ok().stdout;
    assert!(shown.contains(" done ") && !shown.contains("ingested"), "{shown}");
    wait_report(&world.done("slow.csv"));
    world.stop();
    let log = world.daemon_log_text();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("the file is settled")).collect();
    let line: Value = serde_json::from_str(lines.first().expect("its end is logged")).expect("JSON");
    assert_eq!((lines.len(), &line["sent"], &line["rows"]), (1, &400.into(), &400.into()), "{lines:?}");
    assert_eq!((&line["name"], &line["dead"]), (&"slow.csv".into(), &0.into()));
    world.prove();
}

#[test]
fn the_report_says_when_how_fast_and_why_messages_are_dead() {
    let world = finished_world();
    let report = wait_report(&world.done("users.csv"));
    let dead = serde_json::json!([{ "reason": "status", "status": 404, "messages": 5 }]);
    assert_eq!(report["failures"]["support"], dead, "{report}");
    for time in ["claimed_at", "closed_at", "settled_at"] {
        let at = report[time].as_str().expect("a time");
        assert!(at.ends_with('Z') && at.contains('T'), "{time}: {at}");
    }
    let took = report["took_s"].as_f64().expect("seconds");
    assert!(took > 0.0 && report["sent_per_s"].as_f64().expect("a rate") > 0.0, "{report}");
    let page = fs::read_to_string(world.done("users.csv.report.html")).expect("a page is beside it");
    assert!(page.contains("35 messages sent, 5 dead. It balances."), "{page}");
    // Commands say the same without an epoch.
    let file = &world.postrider(&["files", "--json"]).ok().json()[0];
    assert_eq!(file["settled_at"], report["settled_at"]);
}

#[test]
fn watching_a_file_with_dead_letters_ends_with_1() {
    let world = finished_world();
    let answer = world.postrider(&["watch", "users.csv"]);
    assert_eq!(answer.code, Some(1), "{}", answer.stderr);
    assert!(answer.stdout.contains("5 dead"), "{}", answer.stdout);
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let world = finished_world();
    let mut child = world
        .command(&["files", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it is our child");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!stderr.contains("panic"), "{stderr}");
}

#[test]
fn migrate_is_harmless_on_a_current_store() {
    let mut world = finished_world();
    world.postrider(&["migrate"]).ok();
    world.start_ready().stop();
    world.prove();
}

#[test]
fn a_demo_with_nothing_installed_balances() {
    let answer = run(
        Command::new(POSTRIDER).args(["demo", "--messages", "2000"]),
        tempfile::tempdir().expect("a temporary directory").path(),
        LIVENESS,
    )
    .ok();
    for word in ["sent", "retried", "dead", "rejected", "duplicates", "balanc"] {
        assert!(answer.stdout.to_lowercase().contains(word), "no `{word}` in: {}", answer.stdout);
    }
    let (_, left) = answer.stdout.rsplit_once("Remove it: rm -r ").expect("it says how");
    assert!(answer.stdout.contains("MiB); nothing of it is needed"), "{}", answer.stdout);
    fs::remove_dir_all(left.trim()).expect("it is the directory");
}

#[test]
fn environment_overrides_the_file() {
    let mut world = World::new("csv");
    world.configure();
    let mut command = world.command(&["check-config"]);
    command.env("POSTRIDER__POOLS__PARSERS", "many");
    let answer = run(&mut command, &world.path("."), Duration::from_secs(30));
    assert_eq!(answer.code, Some(78));
    assert!(answer.stderr.contains("many"), "{}", answer.stderr);
}
