//! Alarms that need a world of their own: each is raised on its bad day, and cleared after it.

use std::{
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;

use crate::{
    ops::{alarmed, serve},
    support::{
        LIVENESS, World,
        disk::SmallDisk,
        input::{Input, Kind},
        wait_until,
    },
    trouble::wait_alarm,
};

/// Longer than any alarm takes that has to last a minute, or to be over for one.
const MINUTES: Duration = Duration::from_mins(3);

/// The alarms of that kind that are raised: their subjects and texts.
pub(crate) fn raised(world: &World, kind: &str) -> Vec<(String, String)> {
    let status = world.postrider(&["status", "--json", "--sample-ms", "0"]).ok().json();
    let alarms = status["alarms"].as_array().expect("a list").iter();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    alarms.filter(|one| one["alarm"] == kind).map(|one| (text(&one["subject"]), text(&one["text"]))).collect()
}

#[test]
fn s2_8_a_full_disk_raises_an_alarm_until_there_is_room() {
    let place = tempfile::tempdir().expect("a temporary directory");
    let Some(disk) = SmallDisk::mount(&place.path().join("small"), "64m") else { return };
    let mut world = World::on("csv", &place.path().join("small"));
    world.receive(&[]).unset("alarms.disk.max_percent");
    let address = serve(&mut world);
    world.drop_file(Input::csv("before.csv", 100)).wait_settled(LIVENESS);
    assert_eq!(alarmed(address, "disk"), Some(0.0));
    disk.fill();
    wait_until(LIVENESS, "the alarm", || alarmed(address, "disk") == Some(1.0));
    disk.free();
    wait_until(MINUTES, "its end", || alarmed(address, "disk") == Some(0.0));
    world.drop_file(Input::csv("after.csv", 100)).wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

/// Files that are dropped after the one that is late.
const NEWER: usize = 40;

#[test]
fn s2_8_a_file_that_can_t_be_done_in_time_raises_an_alarm_however_many_came_after_it() {
    let mut world = World::new("csv");
    world.receive(&[]).add_destination("slow").add_feed("slow", "csv", &["slow"]);
    let by = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later") + Duration::from_mins(10);
    let by = humantime::format_rfc3339_millis(UNIX_EPOCH + by).to_string();
    world
        .set("feeds.slow.finish_by", by)
        .set("destinations.slow.rate_per_s", 1)
        .set("destinations.slow.burst", 1);
    let address = serve(&mut world);
    // 5,000 s of work.
    world.drop_into("slow", Input::csv("late.csv", 5_000).all(Kind::Cancelled));
    wait_until(LIVENESS, "it to be read", || {
        world.file("late.csv").is_some_and(|file| file["state"] == "ingested")
    });
    for number in 0..NEWER {
        world.drop_file(Input::csv(&format!("newer{number}.csv"), 10));
    }
    wait_until(MINUTES, "the alarm", || alarmed(address, "late") == Some(1.0));
    let late = raised(&world, "late");
    assert_eq!(late.len(), 1, "{late:?}");
    assert!(late[0].0 == "slow: late.csv" && late[0].1.contains("to be done by"), "{late:?}");
    world.postrider(&["cancel", "late.csv"]).ok();
    wait_until(MINUTES, "its end", || alarmed(address, "late") == Some(0.0));
    world.stop();
}

#[test]
#[cfg_attr(not(feature = "failpoints"), ignore = "needs --features failpoints")]
fn s2_8_an_actor_that_fails_again_and_again_raises_an_alarm() {
    let mut world = World::new("csv");
    world.receive(&[]).fail("panic.sweeper=3*panic(injected by the test)->off");
    world.start_ready();
    world.drop_file(Input::csv("three.csv", 100)).wait_settled(LIVENESS);
    thread::sleep(Duration::from_secs(3));
    assert_eq!(raised(&world, "restarts"), [], "three within ten minutes are too few");
    world.stop();
    // One more, and one less than end the process.
    world.fail("panic.sweeper=4*panic(injected by the test)->off").start_ready();
    wait_alarm(&mut world, "restarts", "raised", "sweeper");
    world.drop_file(Input::csv("four.csv", 100)).wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn s2_8_a_file_that_does_not_balance_raises_an_alarm() {
    let mut world = World::new("csv");
    world.receive(&[]).set("destinations.support.paused", true).set("alarms.dead.window", "3s");
    world.start_ready();
    world.drop_file(Input::csv("odd.csv", 100));
    wait_until(LIVENESS, "it to be read", || {
        world.file("odd.csv").is_some_and(|file| file["state"] == "ingested")
    });
    world.stop();
    // A row that nobody knows anything of.
    let store = rusqlite::Connection::open(world.store()).expect("the daemon has ended");
    assert_eq!(store.execute("UPDATE files SET rows = rows + 1", []).expect("it is a store"), 1);
    drop(store);
    world.set("destinations.support.paused", false).start_ready();
    wait_alarm(&mut world, "balance", "raised", "rows and their states do not add up");
    assert_eq!(raised(&world, "balance")[0].0, "alerts");
    wait_alarm(&mut world, "balance", "cleared", "");
    assert_eq!(world.postrider(&["files"]).code, Some(1), "the file stays what it is");
    world.stop();
}
