//! The daemon lives as long as it can do anything, whatever the machine does.

use std::{
    io::Write as _,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{
    LIVENESS, World, disk::SmallDisk, input::Input, process::Process, scripted::Reply, wait_until,
};

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
    let Some(disk) = SmallDisk::mount(&world.state(), "16m") else { return };
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
    let Some(disk) = SmallDisk::mount(&world.state(), "16m") else { return };
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
    daemon.wait_log("intake pauses");
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
    let Some(disk) = SmallDisk::mount(&world.state(), "16m") else { return };
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

#[test]
fn f60_a_sighup_during_a_reload_is_not_lost() {
    let mut world = World::new("csv");
    world.receive(&[]).configure();
    // Whoever opens the configuration has to wait for it, and reads what it was then.
    let config = world.config_path().display().to_string();
    let slow = ["-e", "trace=openat", "-P", &config, "-e", "inject=openat:delay_exit=1500000"];
    world.under(&[&["strace", "-D", "-f", "-o", "/dev/null"], &slow[..]].concat()).start_ready();
    for paused in [true, false] {
        world.set("destinations.support.paused", paused).configure();
        world.daemon().signal(Signal::HUP);
        thread::sleep(Duration::from_millis(500));
    }
    world.drop_file(Input::csv("released.csv", 100)).wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 100);
}

#[test]
fn f60_a_reload_while_a_destination_hangs_does_not_stop_the_others() {
    const HANGS: Duration = Duration::from_secs(20);
    const AT_ONCE: usize = 8;
    const RATE: usize = 200;
    /// Requests that take a second and a half, or a second if a reload grants a new burst.
    const SOME: usize = RATE * 3 / 2;
    const GAP_MAX: Duration = Duration::from_millis(200);
    let mut world = World::new("csv");
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    world.script({
        let (now, most) = (now.clone(), most.clone());
        move |request| {
            if request.path == "/hanging" {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                thread::sleep(HANGS);
                now.fetch_sub(1, Ordering::SeqCst);
            }
            Reply::Status(200)
        }
    });
    world
        .add_destination("hanging")
        .add_feed("slow", "csv", &["hanging"])
        .set("destinations.hanging.timeout", "29s")
        .set("destinations.hanging.concurrency", i64::try_from(AT_ONCE).expect("a small number"))
        .set("destinations.support.rate_per_s", i64::try_from(RATE).expect("a small number"))
        .set("destinations.support.burst", 100)
        .drop_file(Input::csv("steady.csv", 6000))
        .set("pools.deliveries", 1)
        // Of one batch some messages are begun; the other is returned, and would be begun by the new worker.
        .drop_into("slow", Input::csv("hanging.csv", 12))
        .drop_into("slow", Input::csv("waiting.csv", 12))
        .start_ready();
    let of = |world: &World, path: &str| {
        world
            .requests()
            .iter()
            .filter(|request| request.path == path)
            .map(|request| request.at)
            .collect::<Vec<_>>()
    };
    wait_until(LIVENESS, "both destinations at work", || {
        of(&world, "/support").len() >= 2 * RATE && of(&world, "/hanging").len() >= AT_ONCE
    });
    let mut reloads = Vec::new();
    for cap in ["201ms", "202ms"] {
        world.set("destinations.support.retry.cap", cap).configure();
        reloads.push(Instant::now());
        world.daemon().signal(Signal::HUP);
        let notify = &mut world.notify;
        let expected = 1 + reloads.len();
        wait_until(Duration::from_secs(5), "the new configuration in use", || {
            notify.count("READY=1") >= expected
        });
        thread::sleep(Duration::from_secs(3));
    }
    let arrivals = of(&world, "/support");
    let end = *reloads.last().expect("two") + Duration::from_secs(3);
    let watched: Vec<_> =
        arrivals.iter().filter(|at| **at + Duration::from_secs(1) >= reloads[0] && **at < end).collect();
    let longest = |arrivals: &[&Instant]| arrivals.windows(2).map(|pair| *pair[1] - *pair[0]).max();
    let gap = longest(&watched).expect("many requests");
    // What the machine's load makes of a steady rate.
    let before: Vec<_> = watched.iter().copied().filter(|at| **at < reloads[0]).collect();
    let usual = longest(&before).expect("a second's");
    let fastest = watched.windows(SOME).map(|window| **window.last().expect("not empty") - *window[0]).min();
    println!(
        "around two reloads: the longest gap {gap:?} ({usual:?} before), {SOME} in at least {fastest:?}"
    );
    assert!(gap <= GAP_MAX + usual, "{gap:?} without a request, {usual:?} before");
    assert!(fastest.expect("five seconds'") >= Duration::from_millis(1250), "{fastest:?}");

    world.wait_settled(LIVENESS * 2);
    assert_eq!(most.load(Ordering::SeqCst), AT_ONCE, "the old configuration's requests count");
    world.stop();
    let summary = world.prove();
    assert_eq!((&summary["requests"], &summary["requests_after_2xx"]), (&6024.into(), &0.into()));
}
