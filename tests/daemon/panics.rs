//! F14: a panic in each kind of actor, once and without end. Past its restarts a feed is parked; anything else ends the process.

use std::time::Duration;

use crate::support::{LIVENESS, World, input::Input};

/// Two feeds that share nothing but the process.
fn two_feeds() -> World {
    let mut world = World::new("csv");
    world
        .receive(&["--fail-rate", "0.05"])
        .set("record.max_unrecorded", 500)
        // So that the throttle has something to do.
        .set("destinations.support.rate_per_s", 100_000)
        .add_destination("calm")
        .add_feed("calm", "csv", &["calm"]);
    world
}

fn survives(failpoint: &str) {
    let mut world = two_feeds();
    // The first pass goes through, so that there is work that the panic can hurt.
    world.fail(&format!("{failpoint}=1*off->1*panic(injected by the test)"));
    for number in 0..4 {
        world.drop_file(Input::csv(&format!("hurt{number}.csv"), 500));
        world.drop_into("calm", Input::csv(&format!("calm{number}.csv"), 500));
    }
    world.start();
    world.daemon().wait_log("injected by the test");
    world.wait_settled(LIVENESS);
    assert!(world.daemon().is_running(), "one panic is no reason to exit");
    let log = world.daemon().log_text();
    let panic = log.lines().find(|line| line.contains("injected by the test")).expect("it was waited for");
    assert!(panic.contains("panic"), "the panic is logged as one: {panic}");
    assert!(log.contains("generation"), "the restart is logged with the actor's generation");
    world.stop();
    // What a dead worker had in flight and unrecorded is delivered again, as suspects.
    world.unknown = world.window();
    world.prove();
}

fn escalates(failpoint: &str) {
    let mut world = two_feeds();
    world
        // The end of the process is one death of what it had in flight: too few to make it poison.
        .fail(&format!("{failpoint}=panic(injected without end)"))
        .drop_file(Input::csv("hurt.csv", 500))
        .drop_into("calm", Input::csv("calm.csv", 500))
        .start();
    let status = world.wait_exit(LIVENESS);
    assert!(!status.success(), "past the intensity: {status}");
    assert!(status.code().is_some(), "an exit, not a signal: {status}");
    world.fail("").start().wait_settled(LIVENESS);
    world.stop();
    // Five restarts, and the failure that was one too many; no level above grants more.
    world.kills = 6;
    world.prove();
}

/// A feed that panics without end is parked; the daemon goes on.
fn parks(failpoint: &str) {
    let mut world = two_feeds();
    world
        .fail(&format!("{failpoint}=panic(injected without end)"))
        .drop_file(Input::csv("hurt.csv", 500))
        .drop_into("calm", Input::csv("calm.csv", 500))
        .start();
    world.daemon().wait_log("restarts don't help; it is parked and tried again");
    world.daemon().wait_log("fails again and again: injected without end");
    assert!(world.daemon().is_running(), "the daemon goes on");
    world.stop();
    world.fail("").start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

macro_rules! panics {
    ($($once:ident $always:ident: $name:literal $judge:ident;)*) => {
        /// Every point that is there to panic at.
        pub(crate) const POINTS: &[&str] = &[$($name),*];
        $(
            #[test]
            #[cfg_attr(not(feature = "failpoints"), ignore = "needs --features failpoints")]
            fn $once() {
                survives($name);
            }

            #[test]
            #[cfg_attr(not(feature = "failpoints"), ignore = "needs --features failpoints")]
            fn $always() {
                $judge($name);
            }
        )*
    };
}

panics! {
    f14_a_panic_in_the_file_watcher f14_panics_without_end_in_the_file_watcher: "panic.file_watcher" parks;
    f14_a_panic_in_the_parser f14_panics_without_end_in_the_parser: "panic.parser" parks;
    f14_a_panic_in_the_batcher f14_panics_without_end_in_the_batcher: "panic.batcher" parks;
    f14_a_panic_in_the_throttle f14_panics_without_end_in_the_throttle: "panic.throttle" escalates;
    f14_a_panic_in_webhook_delivery f14_panics_without_end_in_webhook_delivery: "panic.webhook_delivery" escalates;
    f14_a_panic_in_the_sweeper f14_panics_without_end_in_the_sweeper: "panic.sweeper" escalates;
}

#[test]
#[cfg_attr(not(feature = "failpoints"), ignore = "needs --features failpoints")]
fn a_panic_in_one_attempt_kills_only_that_attempt() {
    let mut world = two_feeds();
    world
        .fail("attempt.before=100*off->1*panic(injected into an attempt)")
        .drop_file(Input::csv("one.csv", 1000))
        .start();
    world.daemon().wait_log("injected into an attempt");
    world.wait_settled(LIVENESS + Duration::from_secs(10));
    world.stop();
    world.unknown = 1;
    world.prove();
}
