//! The daemon lives as long as it can do anything, whatever the machine does.

use std::{io::Write as _, process::Stdio, thread, time::Duration};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{LIVENESS, World, disk::SmallDisk, input::Input, process::Process, wait_until};

/// Longer than a thread may give no sign of life.
const PAST_PATIENCE: Duration = Duration::from_secs(24);

/// Starts the daemon with a watchdog that expects a beat every half second.
fn start_watched(world: &mut World, failpoints: &str) -> Process {
    world.configure();
    world.notify.forget();
    let mut command = world.run_command();
    command.env("WATCHDOG_USEC", "1000000").env("FAILPOINTS", failpoints);
    let daemon = Process::spawn(&mut command, &world.daemon_log());
    world.notify.wait("READY=1");
    daemon
}

/// The watchdog is still fed after a time in which anything stuck would have been noticed.
#[track_caller]
fn stays_alive(world: &mut World, daemon: &mut Process) {
    thread::sleep(PAST_PATIENCE);
    let beats = world.notify.count("WATCHDOG=1");
    thread::sleep(Duration::from_secs(4));
    assert!(daemon.is_running());
    let stuck = daemon.log_text().lines().find(|line| line.contains("are stuck")).map(str::to_owned);
    assert_eq!(stuck, None);
    assert!(world.notify.count("WATCHDOG=1") >= beats + 2, "the watchdog is fed");
}

#[test]
#[cfg_attr(not(feature = "failpoints"), ignore = "needs --features failpoints")]
fn f06_a_full_disk_feeds_the_watchdog() {
    let mut world = World::new("csv");
    let disk = SmallDisk::mount(&world.state(), "16m");
    world.receive(&[]);
    // The disk fills up between the claim and the first append; the parser then has blocks that nobody takes.
    let mut daemon = start_watched(&mut world, "claim.after=1*sleep(3000)");
    world.drop_file(Input::csv("large.csv", 40_000));
    let claimed = world.inbox("alerts").join("large.csv");
    wait_until(LIVENESS, "the claim", || !claimed.exists());
    thread::sleep(Duration::from_millis(300));
    disk.fill();
    stays_alive(&mut world, &mut daemon);
    assert!(daemon.log_text().contains("tried again until it succeeds"), "the disk was full");
    assert_eq!(world.request_count(), 0);
    disk.free();
    world.wait_settled(LIVENESS);
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait_exit(Duration::from_secs(30)).code(), Some(0));
    assert_eq!(world.prove()["requests"], 40_000);
}

#[test]
fn f06_a_disk_that_is_full_for_longer_than_a_lease_doubles_nothing() {
    let mut world = World::new("csv");
    let disk = SmallDisk::mount(&world.state(), "16m");
    world
        .receive(&["--latency-ms", "20"])
        .set("destinations.support.timeout", "1s")
        .set("lease.duration", "2500ms")
        .set("pools.deliveries", 2)
        .set("record.max_unrecorded", 1_000)
        .drop_file(Input::csv("full.csv", 12_000))
        .start();
    // Whether the worker or the sweeper is first when there is room again is a matter of luck: three times.
    for round in 1..=3 {
        world.wait_requests(round * 2_500);
        disk.fill();
        thread::sleep(Duration::from_secs(5));
        disk.free();
    }
    assert!(world.daemon().log_text().contains("recording outcomes: tried again"), "the disk was full");
    world.wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 12_000, "each is sent once");
}

#[test]
fn f18_the_same_bytes_twice_feed_the_watchdog() {
    let mut world = World::new("csv");
    world
        .receive(&[])
        // The first copy is read no further than this; the second waits for the first.
        .set("outbox.high_watermark", 1000)
        .set("destinations.support.rate_per_s", 1);
    let mut daemon = start_watched(&mut world, "");
    let input = Input::csv("first.csv", 20_000);
    world.drop_file(input.clone()).drop_file(input.named("second.csv"));
    daemon.wait_log("reading paused");
    stays_alive(&mut world, &mut daemon);
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait_exit(Duration::from_secs(30)).code(), Some(0));
    world.set("destinations.support.rate_per_s", 0).start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 20_000);
}

#[test]
fn f06_a_start_on_a_full_disk_is_tried_again_until_there_is_room() {
    let mut world = World::new("csv");
    let disk = SmallDisk::mount(&world.state(), "16m");
    world.receive(&[]);
    disk.fill();
    world.start();
    let status = world.wait_exit(LIVENESS);
    assert_eq!(status.code(), Some(75), "on a disk that was always full: {status}");
    disk.free();
    world.drop_file(Input::csv("first.csv", 300)).start_ready().wait_settled(LIVENESS);
    world.stop();

    world.drop_file(Input::csv("second.csv", 300));
    disk.fill();
    world.start();
    // With a store that is whole it may as well start, and wait.
    thread::sleep(Duration::from_secs(2));
    let is_running = world.daemon().is_running();
    disk.free();
    if !is_running {
        assert_eq!(world.wait_exit(LIVENESS).code(), Some(75));
        world.start();
    }
    world.wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 600);
}

#[test]
fn f59_nobody_reads_the_log() {
    const ROWS: usize = 50_000;
    let mut world = World::new("csv");
    world.receive(&[]).configure();
    // Full from the start: the first line that the daemon waits for would be its last.
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&writer, true).expect("a pipe can be non-blocking");
    while writer.write(&[b'.'; 4096]).is_ok_and(|written| written > 0) {}
    rustix::io::ioctl_fionbio(&writer, false).expect("and blocking again");
    let mut command = world.run_command();
    let mut daemon = command.stdin(Stdio::null()).stderr(writer).spawn().expect("the binary starts");
    world.notify.wait("READY=1");
    world.drop_file(Input::csv("unread.csv", ROWS)).wait_settled(LIVENESS);
    kill_process(Pid::from_child(&daemon), Signal::TERM).expect("it is our child");
    let mut exit = None;
    wait_until(Duration::from_secs(10), "the end of the daemon", || {
        exit = daemon.try_wait().expect("it is our child");
        exit.is_some()
    });
    assert_eq!(exit.and_then(|status| status.code()), Some(0));
    drop(reader);
    assert_eq!(world.prove()["requests"], ROWS);
}
