//! What this machine lacks: descriptors, ports. It delays messages and is charged to none of them (F7, F72).

use crate::{
    ops::{alarmed, metric, serve},
    support::{
        LIVENESS, World,
        input::{Input, Kind},
        wait_until,
    },
};

const ROWS: usize = 20_000;

/// A world in which every message fits one attempt, so that one that is charged is dead.
fn strict() -> World {
    let mut world = World::new("csv");
    world.set("destinations.support.retry.max_attempts", 1);
    world
}

#[test]
fn f07_too_few_descriptors_delay_messages_and_kill_none() {
    let mut world = strict();
    // Slow enough for far more requests in flight than there are descriptors.
    world.receive(&["--latency-ms", "50"]);
    // By name: the resolver needs descriptors too, and does not say so when it has none.
    let url = format!("http://localhost:{}/support", world.receiver_port());
    world.set("destinations.support.url", url);
    world.set("destinations.support.concurrency", 512).under(&["prlimit", "--nofile=128:128"]);
    let address = serve(&mut world);
    let log = world.daemon().log_text();
    assert!(log.contains("RLIMIT_NOFILE is 128, and "), "the start says so");
    world.drop_file(Input::csv("many.csv", ROWS).all(Kind::Sent)).wait_requests(1);
    let unsent = "postrider_attempts_not_begun_total{destination=\"support\",reason=\"descriptors\"}";
    let alarm = "shortage";
    // Whoever asks needs a descriptor too: it answers when one is free.
    wait_until(LIVENESS, "the alarm", || alarmed(address, alarm) == Some(1.0));
    world.wait_settled(LIVENESS * 2);
    let waits = metric(address, unsent).expect("it is exported");
    println!("{waits} times no descriptor was free");
    assert!(waits > 0.0 && waits < ROWS as f64, "it backs off: {waits}");
    assert_eq!(metric(address, "postrider_retries_total{destination=\"support\"}"), Some(0.0));
    world.stop();
    assert_eq!(world.prove()["requests"], ROWS, "each is sent once");
}

#[test]
fn f07_the_limit_is_held_against_the_concurrency() {
    let mut world = strict();
    world.set("destinations.support.concurrency", 512).configure();
    let check = |world: &mut World, limit: &str| {
        world.under(&["prlimit", limit]).postrider_under(&["check-config"]).ok().stdout
    };
    let found = check(&mut world, "--nofile=128:128");
    assert!(found.contains("RLIMIT_NOFILE is 128, and 57"), "{found}");
    assert!(found.contains("LimitNOFILE (or ulimit -n) to at least 57"), "{found}");
    assert!(found.contains("delivery.concurrency to at most 6"), "{found}");
    // The daemon raises a soft limit by itself.
    assert!(!check(&mut world, "--nofile=128:4096").contains("RLIMIT_NOFILE"));
    world.under(&["prlimit", "--nofile=128:4096"]).receive(&[]);
    world.start_ready();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", world.daemon().pid()));
    let limits = limits.expect("it runs");
    let files = limits.lines().find(|line| line.starts_with("Max open files")).expect("Linux lists it");
    assert_eq!(files.split_whitespace().collect::<Vec<_>>()[3..5], ["4096", "4096"]);
    assert!(!world.daemon().log_text().contains("RLIMIT_NOFILE"));
    world.stop();
}

#[test]
fn f07_a_start_without_descriptors_is_tried_again() {
    let mut world = strict();
    world.receive(&[]);
    // With 7 and 8 the runtime panicked.
    for limit in 4..24 {
        let limit = format!("--nofile={limit}:{limit}");
        world.under(&["prlimit", &limit]).start();
        let status = world.wait_exit(LIVENESS);
        assert_eq!(status.code(), Some(75), "{limit}: {status}\n{}", world.daemon_log_text());
    }
    world.under(&[]).drop_file(Input::csv("later.csv", 100)).start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 100);
}

#[test]
fn f72_ports_that_run_out_are_charged_to_no_message() {
    let mut world = strict();
    world.receive(&["--latency-ms", "20"]);
    // Every second connection finds no port.
    let inject = "inject=connect:error=EADDRNOTAVAIL:when=2+2";
    world.under(&["strace", "-D", "-f", "-o", "/dev/null", "-e", "trace=connect", "-e", inject]);
    let address = serve(&mut world);
    world.drop_file(Input::csv("ports.csv", 2_000).all(Kind::Sent)).wait_settled(LIVENESS);
    let unsent = "postrider_attempts_not_begun_total{destination=\"support\",reason=\"ports\"}";
    assert!(metric(address, unsent) > Some(0.0));
    assert_eq!(alarmed(address, "shortage"), Some(1.0));
    world.stop();
    assert_eq!(world.prove()["requests"], 2_000, "each is sent once");
}
