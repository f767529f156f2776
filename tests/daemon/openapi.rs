//! The interface as its own description has it: a schema-driven tester asks a daemon that has files, dead letters and held
//! messages everything that the description allows, and what it does not. It gives every order too: the daemon is thrown away.

use std::{fs, path::Path, process::Command, time::Duration};

use postrider_actors::testing::figure;
use serde_json::Value;

use crate::{
    api::{OPERATE, with_tokens},
    support::{LIVENESS, World, input::Input, process::run, scripted::Reply, wait_until},
};

/// How long it may take on a loaded machine; alone it takes less than a minute.
const RUN: Duration = Duration::from_mins(10);

#[test]
#[ignore = "needs Schemathesis (POSTRIDER_PYTHON), which script/test installs"]
fn s2_7_the_interface_does_what_its_description_says() {
    let mut world = World::new("csv");
    world.add_destination("other").script(|request| match request.earlier {
        0 if request.id.ends_with("_3") => Reply::Status(503),
        _ if request.id.ends_with("_4") => Reply::Status(404),
        _ => Reply::Status(200),
    });
    let address = with_tokens(&mut world);
    let mut bytes = Input::csv("good.csv", 300).bytes;
    bytes.extend(b",nobody\n");
    world.drop_file(Input::of("good.csv", bytes, Vec::new())).wait_settled(LIVENESS);
    for count in [20, 21] {
        world.drop_file(Input::csv("twice.csv", count)).wait_settled(LIVENESS);
    }
    world.postrider(&["pause", "support", "--reason", "a new certificate"]).ok();
    world.drop_file(Input::csv("held.csv", 200));
    wait_until(LIVENESS, "the file to be read", || {
        world.file("held.csv").is_some_and(|file| file["state"] == "ingested")
    });
    world.postrider(&["hold", "held.csv", "--reason", "not yet"]).ok();

    let settings = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openapi/schemathesis.toml");
    let report = world.path("report.json");
    let python = std::env::var("POSTRIDER_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let mut command = Command::new(python);
    command
        .args(["-m", "schemathesis.cli", "--config-file"])
        .arg(settings)
        .args(["run", "--no-color", "--report-json-path"])
        .arg(&report)
        .arg(format!("http://{address}/api/v1/openapi.json"))
        .env("POSTRIDER_TOKEN", OPERATE)
        .current_dir(world.path("."));
    let answer = run(&mut command, &world.path("."), RUN);
    assert_eq!(answer.code, Some(0), "{}{}", answer.stdout, answer.stderr);
    let report: Value =
        serde_json::from_slice(&fs::read(&report).expect("it was written")).expect("it is JSON");
    println!("{}", report["summary"]);
    let log = world.daemon().log_text();
    assert!(!log.contains("panicked") && !log.contains(OPERATE), "{log}");
    figure("every operation of the description, with what it allows and what it does not: nothing found");
    world.daemon().kill();
}
