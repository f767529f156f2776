//! Notifications to the service manager, over a real notify socket.

use std::time::Duration;

use rustix::process::Signal;

use crate::support::{LIVENESS, World, input::Input, process::Process, wait_until};

#[test]
fn ready_status_and_stopping_are_said_in_order() {
    let mut world = World::new("csv");
    world.receive(&["--latency-ms", "10"]);
    world.start_ready();
    world.drop_file(Input::csv("shown.csv", 4000));
    let status = {
        let said = &mut world.notify;
        crate::support::wait_for(LIVENESS, "a STATUS that names the file", || {
            said.said().iter().find(|line| line.starts_with("STATUS=") && line.contains("shown.csv")).cloned()
        })
    };
    assert!(status.contains('%') && status.contains("/s"), "percent and rate: {status}");
    world.wait_settled(LIVENESS);
    world.stop();
    let said = world.notify.said();
    let position = |prefix: &str| said.iter().position(|line| line.starts_with(prefix));
    let (ready, stopping) = (position("READY=1"), position("STOPPING=1"));
    assert!(ready.is_some() && stopping > ready, "{said:?}");
    world.prove();
}

#[test]
fn the_watchdog_beats_while_the_actors_move_and_not_while_they_do_not() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.configure();
    let mut command = world.run_command();
    command.env("WATCHDOG_USEC", "1000000");
    let mut daemon = Process::spawn(&mut command, &world.daemon_log());
    // systemd sets WATCHDOG_PID to the main process; unset means any.
    world.notify.wait("READY=1");
    let before = world.notify.count("WATCHDOG=1");
    let notify = &mut world.notify;
    wait_until(Duration::from_secs(10), "four beats", || notify.count("WATCHDOG=1") >= before + 4);
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait_exit(Duration::from_secs(30)).code(), Some(0));
}

#[test]
#[cfg_attr(not(feature = "failpoints"), ignore = "needs --features failpoints")]
fn a_stuck_thread_stops_the_watchdog() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.configure();
    // `sleep` blocks the sweeper's arbiter for longer than the test lasts.
    let mut command = world.run_command();
    command.env("WATCHDOG_USEC", "1000000").env("FAILPOINTS", "panic.sweeper=sleep(120000)");
    let mut daemon = Process::spawn(&mut command, &world.daemon_log());
    world.drop_file(Input::csv("stuck.csv", 100));
    let mut last = (0, std::time::Instant::now());
    let notify = &mut world.notify;
    wait_until(LIVENESS, "the beats to stop for 3 s", || {
        let count = notify.count("WATCHDOG=1");
        if count != last.0 {
            last = (count, std::time::Instant::now());
        }
        last.1.elapsed() >= Duration::from_secs(3)
    });
    assert!(daemon.is_running(), "it hangs; systemd would kill it now");
    daemon.kill();
}

#[test]
fn a_good_reload_is_announced() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.start_ready();
    world.daemon().signal(Signal::HUP);
    world.notify.wait("RELOADING=1");
    let notify = &mut world.notify;
    wait_until(LIVENESS, "READY=1 after the reload", || notify.count("READY=1") == 2);
    assert!(world.notify.said().iter().any(|line| line.starts_with("MONOTONIC_USEC=")));
    world.stop();
}
