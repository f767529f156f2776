//! What an operator orders while messages are on their way: it holds within a second, whatever waits, and across kills.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind},
    knob, wait_report, wait_until,
};

/// Open messages; `POSTRIDER_ROWS=1000000` for all of what is asked for.
fn rows() -> usize {
    knob("POSTRIDER_ROWS", 20_000) as usize
}

/// A file of many rows behind a rate that would take minutes, read to its end and on its way.
fn on_its_way(name: &str) -> World {
    let mut world = World::new("csv");
    world.receive(&[]).add_destination("calm").add_feed("calm", "csv", &["calm"]);
    world.set("destinations.support.rate_per_s", 200).set("destinations.support.burst", 20);
    world.set("outbox.high_watermark", 10_000_000);
    world.drop_file(Input::csv(name, rows()).all(Kind::Cancelled)).start_ready();
    wait_until(LIVENESS * 2, "the file to be read", || {
        world.file(name).is_some_and(|file| file["state"] == "ingested")
    });
    world.wait_requests(50);
    world
}

/// Requests that came more than a second after `order` was given, of what is on its way to `support`.
fn ordered(world: &World, order: &[&str]) -> usize {
    let begun = Instant::now();
    world.postrider(order).ok();
    println!("{order:?}: the command took {:?}", begun.elapsed());
    thread::sleep(Duration::from_secs(1).saturating_sub(begun.elapsed()));
    let at_once = world.request_count();
    thread::sleep(Duration::from_secs(2));
    world.request_count() - at_once
}

#[test]
fn b11_a_held_file_stops_within_a_second_across_a_kill_and_goes_on_when_it_is_released() {
    let mut world = on_its_way("held.csv");
    assert_eq!(ordered(&world, &["hold", "held.csv", "--reason", "the template is wrong"]), 0);
    world.kill();
    world.start_ready();
    let before = world.request_count();
    world.drop_into("calm", Input::csv("calm.csv", 100).all(Kind::Sent));
    wait_report(&world.inbox("calm").join("done/calm.csv"));
    assert_eq!(world.request_count(), before + 100, "it outlasts the kill");
    let shown = world.postrider(&["files", "held.csv"]).stdout;
    assert!(shown.contains("the template is wrong"), "{shown}");
    world.postrider(&["release", "held.csv"]).ok();
    let released = Instant::now();
    world.wait_requests(before + 100 + 50);
    assert!(released.elapsed() < Duration::from_secs(3), "{:?}", released.elapsed());
    assert_eq!(ordered(&world, &["cancel", "held.csv"]), 0);
    world.wait_settled(LIVENESS);
    world.stop();
    world.unknown = world.window();
    world.prove();
}

#[test]
fn b11_a_cancelled_file_stops_within_a_second_balances_and_is_never_sent_across_a_kill() {
    let mut world = on_its_way("wrong.csv");
    assert_eq!(ordered(&world, &["cancel", "wrong.csv", "--reason", "the wrong list"]), 0);
    world.kill();
    world.start_ready();
    world.wait_settled(LIVENESS);
    let counts = world.file("wrong.csv").expect("it is known")["destinations"]["support"].clone();
    let (sent, cancelled) = (counts["sent"].as_u64().unwrap(), counts["cancelled"].as_u64().unwrap());
    assert_eq!(sent + cancelled, rows() as u64, "{counts}");
    assert!(sent >= 50 && cancelled > 0, "{counts}");
    let again = world.postrider(&["cancel", "wrong.csv"]);
    assert!(again.stdout.contains("wrong.csv"), "{}", again.stdout);
    wait_report(&world.done("wrong.csv"));
    world.stop();
    world.unknown = world.window();
    world.prove();
}

#[test]
fn every_order_leaves_a_line_and_a_name_that_nobody_has_is_refused() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.drop_file(Input::csv("a.csv", 10).all(Kind::Sent)).start().wait_settled(LIVENESS);
    world.stop();
    for order in [["pause", "support"], ["resume", "support"], ["resume", "support"], ["hold", "a.csv"]] {
        world.postrider(&order).ok();
    }
    world.postrider(&["release", "a.csv"]).ok();
    for wrong in [["pause", "nobody"], ["hold", "nobody.csv"], ["cancel", "nobody.csv"]] {
        let answer = world.postrider(&wrong);
        assert_eq!(answer.code, Some(1), "{wrong:?}: {}", answer.stderr);
        assert!(answer.stderr.contains("is called"), "{}", answer.stderr);
    }
    let lines: Vec<serde_json::Value> =
        serde_json::from_str(&world.postrider(&["audit", "--json"]).ok().stdout).expect("it is JSON");
    let orders: Vec<_> = lines.iter().map(|line| line["order"].as_str().expect("a word")).collect();
    assert_eq!(orders, ["release", "hold", "resume", "pause"], "what changed nothing leaves no line");
    assert!(lines.iter().all(|line| line["by"].as_str().is_some_and(|by| !by.is_empty())), "{lines:?}");
    world.prove();
}
