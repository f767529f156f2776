//! Another version takes over (F16). Nothing is released yet, so every version there is has the same schema; what a later
//! one leaves behind is made here by its number.

use std::{
    fs,
    path::{Path, PathBuf},
};

use postrider_actors::testing::figure;
use rusqlite::Connection;

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind},
    process::POSTRIDER,
};

const ROWS: usize = 9_000;

/// A world that is in the middle of a file for a while: reading pauses at a few hundred open messages.
fn world_in_a_file() -> World {
    let mut world = World::new("csv");
    world
        .receive(&[])
        .set("outbox.high_watermark", 400)
        .set("destinations.support.rate_per_s", 800)
        .set("destinations.support.burst", 50)
        .set("record.max_unrecorded", 200)
        .drop_file(Input::csv("upgraded.csv", ROWS).all(Kind::Sent));
    world
}

#[track_caller]
fn assert_in_the_file(world: &World) {
    let file = world.file("upgraded.csv").expect("it was claimed");
    assert_eq!(file["state"], "ingesting", "{file}");
}

/// Brings a copy of the binary, and says where: to be renamed over the one that runs, as a package does.
fn bring(world: &World) -> PathBuf {
    let new = world.path("postrider.new");
    fs::copy(POSTRIDER, &new).expect("there is room");
    new
}

/// Sets the version of the schema; returns what it was.
fn set_version(store: &Path, version: i32) -> i32 {
    let store = Connection::open(store).expect("nobody else has it");
    let found = store.pragma_query_value(None, "user_version", |row| row.get(0)).expect("it is SQLite");
    store.pragma_update(None, "user_version", version).expect("it is ours");
    found
}

#[test]
fn f16_an_upgrade_in_the_middle_of_a_file_loses_and_repeats_nothing() {
    let mut world = world_in_a_file();
    let installed = world.path("postrider");
    let install = |new: PathBuf| fs::rename(new, &installed).expect("one file system");
    install(bring(&world));
    world.binary(&installed);
    for sent in [600, 1_600, 2_600] {
        let new = bring(&world);
        world.start();
        world.wait_requests(sent);
        assert_in_the_file(&world);
        install(new);
        world.stop();
        assert_in_the_file(&world);
    }
    world.set("destinations.support.rate_per_s", 0).start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], ROWS, "an orderly change of binaries repeats nothing");
    figure("3 changes of the binary in the middle of one file: each row sent once");
}

#[test]
fn f16_a_newer_schema_is_refused_in_the_middle_of_a_file_and_left_alone() {
    let mut world = world_in_a_file();
    world.start();
    world.wait_requests(600);
    world.stop();
    assert_in_the_file(&world);
    let requests = world.request_count();
    let own = set_version(&world.store(), i32::MAX);
    let newer = fs::read(world.store()).expect("it is there");

    world.start();
    let status = world.wait_exit(LIVENESS);
    assert_eq!(status.code(), Some(78), "{status}");
    let log = world.daemon_log_text();
    assert!(log.contains("it was written by a newer Postrider; run that version"), "{log}");
    for command in [
        &["files"][..],
        &["status"],
        &["dead", "list"],
        &["dead", "redrive", "--destination", "support"],
        &["migrate"],
    ] {
        let answer = world.postrider(command);
        assert!(matches!(answer.code, Some(64..=78)), "{command:?}: {:?} {}", answer.code, answer.stderr);
        assert!(answer.stderr.contains("newer"), "{command:?}: {}", answer.stderr);
    }
    assert!(fs::read(world.store()).expect("it is there") == newer, "it is left as it was");
    assert_eq!(world.request_count(), requests, "nothing is sent");

    set_version(&world.store(), own);
    world.set("destinations.support.rate_per_s", 0).start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], ROWS, "the version that wrote it goes on where it was");
    figure(
        "a newer schema in the middle of a file: exit 78, the store unchanged byte for byte, no request; the version that wrote it finishes the file",
    );
}
