//! Every command as an operator meets it: exit codes, `--json`, `--help`, completions.

use std::{
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::support::{
    LIVENESS, World,
    input::{Input, recipient},
    process::{Answer, POSTRIDER, run},
    scripted::Reply,
};

const COMMANDS: [&str; 11] = [
    "run",
    "demo",
    "receiver",
    "check-config",
    "status",
    "files",
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
    }
}

#[test]
fn wrong_usage_exits_2() {
    for arguments in [
        &["no-such-command"][..],
        &["files", "--no-such-flag"],
        &["messages"],
        &["completions", "no-such-shell"],
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
