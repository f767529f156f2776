//! `check-config --connect` and `migrate` through the real binary, on emulators.
#![cfg(feature = "aws")]

use std::{
    fs,
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::TempDir;

#[path = "cloud/mod.rs"]
mod cloud;

use cloud::Server;

struct World {
    dir: TempDir,
}

impl World {
    fn new(sqs: &str, dynamodb: &str, more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().display();
        let config = format!(
            "profile = \"aws\"\nstate.dir = \"{root}/state\"\n{more}\n[queue]\nsqs.prefix = \"pr\"\n[aws]\nregion = \"us-east-1\"\nsqs_endpoint_url = \"{sqs}\"\n\
             dynamodb_endpoint_url = \"{dynamodb}\"\n[feeds.f]\npath = \"{root}/in\"\nformat = \"text\"\n\
             destinations = [\"d\"]\n[destinations.d]\nurl = \"http://127.0.0.1:9/\"\nallow = [\"127.0.0.0/8\"]\nsecrets = []\n"
        );
        fs::write(dir.path().join("postrider.toml"), config).unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        Self { dir }
    }

    /// Runs a command with credentials that the emulators take, or none.
    fn run(&self, arguments: &[&str], has_credentials: bool) -> (i32, Value) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_postrider"));
        command.env_clear().env("AWS_EC2_METADATA_DISABLED", "true").env("HOME", self.dir.path());
        if has_credentials {
            command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "s3cr3t-key");
        }
        command.arg("-c").arg(self.dir.path().join("postrider.toml")).args(arguments).arg("--json");
        let Output { status, stdout, stderr } = command.output().unwrap();
        let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
        assert!(!stdout.contains("s3cr3t") && !stderr.contains("s3cr3t"), "I10: {stdout}{stderr}");
        let value = serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}"));
        (status.code().expect("it was not killed"), value)
    }
}

/// `engine: detail` of the findings with this verdict.
fn with(findings: &Value, verdict: &str) -> Vec<String> {
    let all = findings.as_array().expect("findings are a list").iter();
    all.filter(|finding| finding["verdict"] == verdict)
        .map(|finding| {
            format!("{}: {}", finding["engine"].as_str().unwrap(), finding["detail"].as_str().unwrap())
        })
        .collect()
}

#[test]
#[ignore = "needs ministack and dynoxide: set POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE"]
fn what_is_missing_is_named_made_and_then_fine() {
    let (sqs, dynamodb) = (Server::sqs(), Server::dynamodb());
    let world = World::new(sqs.endpoint(), dynamodb.endpoint(), "");

    let (code, report) = world.run(&["check-config", "--connect"], true);
    assert_eq!((code, &report["ok"]), (78, &Value::Bool(false)));
    let wrong = with(&report["findings"], "wrong");
    for part in [
        "table postrider is missing",
        "table postrider-ledger is missing",
        "queue pr-dead-letters: ",
        "queue pr-d: ",
    ] {
        assert!(
            wrong.iter().any(|line| line.contains(part) && line.contains("migrate")),
            "{part}: {wrong:#?}"
        );
    }

    let (code, report) = world.run(&["migrate", "--dry-run"], true);
    assert_eq!((code, with(&report["shared"], "wrong")), (78, wrong), "a dry run makes nothing");
    let (code, report) = world.run(&["migrate"], true);
    assert_eq!(code, 0, "{report}");
    let made = with(&report["shared"], "ok");
    for queue in ["pr-d", "pr-dead-letters"] {
        assert!(made.contains(&format!("queue {queue}: made")), "{made:#?}");
    }
    let (code, report) = world.run(&["migrate"], true);
    assert_eq!(code, 0, "{report}");
    assert!(!with(&report["shared"], "ok").iter().any(|line| line.ends_with("made")), "it is harmless again");

    let (code, report) = world.run(&["check-config", "--connect"], true);
    assert_eq!((code, &report["ok"]), (0, &Value::Bool(true)), "{report}");
    assert_eq!(with(&report["findings"], "ok").len(), 6, "{report}");
}

#[test]
#[ignore = "needs ministack and dynoxide: set POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE"]
fn what_differs_is_said_and_left_alone() {
    let (sqs, dynamodb) = (Server::sqs(), Server::dynamodb());
    let world = World::new(sqs.endpoint(), dynamodb.endpoint(), "");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = aws_sdk_sqs::Client::new(&cloud::sdk_config(sqs.endpoint()));
    runtime.block_on(client.create_queue().queue_name("pr-d").send()).expect("ministack makes queues");
    let (code, report) = world.run(&["migrate"], true);
    let notes = with(&report["shared"], "note");
    assert_eq!((code, notes.len()), (0, 2), "{report}");
    assert!(notes[0].contains("MessageRetentionPeriod") && notes[1].contains("RedrivePolicy"), "{notes:?}");
    assert_eq!(with(&world.run(&["check-config", "--connect"], true).1["findings"], "note"), notes);
}

#[test]
#[ignore = "needs ministack: set POSTRIDER_MINISTACK"]
fn an_unreachable_engine_is_not_reported_as_wrong() {
    let sqs = Server::sqs();
    assert_eq!(World::new(sqs.endpoint(), "http://127.0.0.1:9", "").run(&["migrate"], true).0, 75);
    let world = World::new(sqs.endpoint(), "http://127.0.0.1:9", "");
    let (code, report) = world.run(&["check-config", "--connect"], true);
    let unreachable = with(&report["findings"], "unreachable");
    assert_eq!((code, unreachable.len()), (75, 1), "{report}");
    assert!(unreachable[0].starts_with("tables postrider and postrider-ledger: "), "{unreachable:?}");

    let (code, report) = world.run(&["check-config", "--connect"], false);
    let wrong = with(&report["findings"], "wrong");
    assert_eq!((code, wrong.len()), (78, 1), "{report}");
    assert!(wrong[0].starts_with("aws credentials: ") && wrong[0].contains("AWS_PROFILE"), "{wrong:?}");
}
