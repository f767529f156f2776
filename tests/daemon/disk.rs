//! What the machine runs out of while files are taken: room on a disk, file descriptors, a disk that reads.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use crate::support::{LIVENESS, World, disk::SmallDisk, input::Input, wait_until};

/// How often each disk is filled and freed.
const TIMES: usize = 10;

/// Files that are dropped while a disk is full.
const FILES: usize = 4;

/// How long a disk stays full: long enough for several tries of whatever fails.
const FULL: Duration = Duration::from_millis(800);

/// Nothing is left in `claimed/`, nor in the feed's directory.
pub(crate) fn assert_nothing_stranded(world: &World, feed: &str) {
    let names = |path: &Path| -> Vec<_> {
        let entries = fs::read_dir(path).expect("it is there").flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    assert_eq!(names(&world.state().join("claimed").join(feed)), [""; 0], "claimed files without an owner");
    let left: Vec<_> = names(&world.inbox(feed));
    let is_dropped = |name: &String| !name.starts_with('.') && !["done", "failed"].contains(&name.as_str());
    assert!(!left.iter().any(is_dropped), "files that nobody takes: {left:?}");
}

fn assert_no_restart(world: &mut World, pid: u32) {
    assert!(world.daemon().is_running() && world.daemon().pid() == pid);
    let log = world.daemon().log_text();
    let restart = log.lines().find(|line| line.contains("will be restarted"));
    assert_eq!(restart, None, "no actor had a reason to fail");
}

/// Writes the next files where they can be dropped without any room: hidden, in the feed's own directory.
fn stage(world: &World, prefix: &str) -> Vec<Input> {
    (0..FILES)
        .map(|number| {
            let input = Input::text(&format!("{prefix}-{number}.txt"), 20);
            fs::write(world.inbox("alerts").join(format!(".{}", input.name)), &input.bytes)
                .expect("there is room");
            input
        })
        .collect()
}

fn drop_staged(world: &mut World, inputs: Vec<Input>) {
    for input in inputs {
        let inbox = world.inbox("alerts");
        fs::rename(inbox.join(format!(".{}", input.name)), inbox.join(&input.name)).expect("one file system");
        world.expect("alerts", input);
    }
}

/// Fills and frees `disk`, files being dropped meanwhile. Each time they are all done before the next.
fn fill_and_free(world: &mut World, what: &str, disk: &SmallDisk) {
    for time in 0..TIMES {
        let inputs = stage(world, &format!("full-{what}-{time}"));
        disk.fill();
        drop_staged(world, inputs);
        thread::sleep(FULL);
        disk.free();
        world.wait_settled(LIVENESS);
        wait_until(LIVENESS, &format!("the files of {what}, time {time}, to be moved away"), || {
            (0..FILES).all(|number| world.done(&format!("full-{what}-{time}-{number}.txt")).exists())
        });
    }
}

#[test]
fn f06_a_disk_that_is_full_and_freed_strands_no_file_and_restarts_nothing() {
    let mut world = World::new("text");
    world.receive(&[]);
    // Three file systems: a file is copied from the feed to where it is claimed.
    let (state, feed) = (world.state(), world.inbox("alerts"));
    let Some(state) = SmallDisk::mount(&state, "64m") else { return };
    let Some(claimed) = SmallDisk::mount(&world.state().join("claimed"), "8m") else { return };
    let Some(feed) = SmallDisk::mount(&feed, "8m") else { return };
    world.start_ready();
    let pid = world.daemon().pid();
    for (what, disk) in [("claimed", &claimed), ("feed", &feed), ("state", &state)] {
        fill_and_free(&mut world, what, disk);
    }
    assert_no_restart(&mut world, pid);
    world.stop();
    assert_nothing_stranded(&world, "alerts");
    world.prove();
}

#[test]
fn f06_on_one_full_file_system_a_claim_is_owned_or_undone() {
    // A rename claims: the state directory is beside the feed's.
    let place = tempfile::tempdir().expect("a temporary directory");
    let Some(disk_of_both) = SmallDisk::mount(place.path(), "64m") else { return };
    let mut world = World::on("text", place.path());
    world.receive(&[]);
    world.start_ready();
    let pid = world.daemon().pid();
    fill_and_free(&mut world, "both", &disk_of_both);
    assert_no_restart(&mut world, pid);
    world.stop();
    assert_nothing_stranded(&world, "alerts");
    world.prove();
}

#[test]
fn f06_a_file_that_never_fits_is_held_and_parks_its_feed_once() {
    let mut world = World::apart("text");
    world.receive(&[]);
    let claimed = world.state().join("claimed");
    let Some(_claimed) = SmallDisk::mount(&claimed, "1m") else { return };
    world.start_ready();
    // It has to be copied, and there will never be room for it.
    let large = Input::text("large.txt", 100_000);
    let path = world.inbox("alerts").join(&large.name);
    fs::write(world.staging().join("large"), &large.bytes).expect("there is room");
    fs::rename(world.staging().join("large"), &path).expect("one file system");
    for number in 0..8 {
        world.drop_file(Input::text(&format!("small-{number}.txt"), 20)).wait_settled(LIVENESS);
        thread::sleep(Duration::from_secs(1));
    }
    let held = world.held("large.txt").expect("it is held");
    assert!(held["reason"].as_str().expect("a reason").contains("No space left"), "{held}");
    let log = world.daemon().log_text();
    let times = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    assert!(times("the feed is parked") <= 1, "the others go on");
    assert!(times("\"alarm\":\"feeds\"") <= 2, "raised once and cleared, at most");
    // Not while somebody tries once more to claim it.
    wait_until(LIVENESS, "the file to be where it was", || fs::remove_file(&path).is_ok());
    world.stop();
    world.prove();
}

#[test]
fn f06_the_first_rows_of_each_recipient_on_a_full_disk_wait_for_room() {
    let mut world = World::new("text");
    world.receive(&[]);
    world.set("feeds.alerts.duplicates", "first");
    let state = world.state();
    let Some(_state) = SmallDisk::mount(&state, "64m") else { return };
    let Some(claimed) = SmallDisk::mount(&world.state().join("claimed"), "8m") else { return };
    world.start_ready();
    let pid = world.daemon().pid();
    // It is claimed and hashed; then there is no room for the set of recipients that were seen.
    let claim = world.state().join("claimed/.claim");
    fs::create_dir(&claim).expect("there is room");
    let input = Input::text("full-first.txt", 5000);
    fs::write(claim.join("full-first.txt"), &input.bytes).expect("there is room");
    claimed.fill();
    fs::rename(&claim, world.state().join("claimed/alerts/00000000000001-000000")).expect("one file system");
    world.expect("alerts", input);
    // Six restarts took 5 s, and then the daemon was gone.
    thread::sleep(Duration::from_secs(8));
    assert_no_restart(&mut world, pid);
    claimed.free();
    world.wait_settled(LIVENESS);
    assert_no_restart(&mut world, pid);
    world.stop();
    assert_nothing_stranded(&world, "alerts");
    world.prove();
}

/// Sets the soft limit of open files of a running process, below a hard one of 4096; false if it is gone.
#[must_use]
pub(crate) fn limit_files(pid: u32, limit: u64) -> bool {
    let mut prlimit = Command::new("prlimit");
    prlimit.args(["--pid", &pid.to_string(), &format!("--nofile={limit}:4096")]).stderr(Stdio::null());
    prlimit.status().expect("util-linux is there").success()
}

/// How many files a process has open; `None` if it is gone.
pub(crate) fn open_files(pid: u32) -> Option<u64> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64)
}

/// Lets a daemon run out of file descriptors at each step of a claim, and of reading.
fn runs_out_of_descriptors(mut world: World) {
    world.receive(&[]);
    world.start_ready();
    let pid = world.daemon().pid();
    for time in 0..TIMES {
        let inputs = stage(&world, &format!("full-{time}"));
        // None, then one, then two …
        let open = open_files(pid).expect("it runs");
        assert!(limit_files(pid, open + time as u64));
        drop_staged(&mut world, inputs);
        thread::sleep(FULL);
        assert!(limit_files(pid, 1024));
        world.wait_settled(LIVENESS);
    }
    assert_no_restart(&mut world, pid);
    assert!(fs::read_dir(world.inbox("alerts").join("failed")).expect("it is there").next().is_none());
    world.stop();
    assert_nothing_stranded(&world, "alerts");
    world.prove();
}

#[test]
fn f07_without_file_descriptors_files_wait_and_are_read_once_there_are_some() {
    runs_out_of_descriptors(World::new("text"));
}

#[test]
fn f07_without_file_descriptors_a_claim_on_another_file_system_is_owned_or_undone() {
    runs_out_of_descriptors(World::apart("text"));
}

#[test]
fn f05_a_disk_that_fails_to_read_for_a_while_is_no_verdict_on_the_file() {
    if Command::new("strace").arg("--version").output().is_err() {
        eprintln!("SKIPPED: strace is not there to make a disk fail");
        return;
    }
    let mut world = World::new("text");
    world.receive(&[]);
    // As an earlier run left it: where it is read from is known.
    let claim = world.state().join("claimed/alerts/00000000000001-000000");
    fs::create_dir_all(&claim).expect("the directory is ours");
    let input = Input::text("full-eio.txt", 500);
    let path = claim.join("full-eio.txt");
    fs::write(&path, &input.bytes).expect("there is room");
    world.expect("alerts", input);
    // The first read of each thread fails, which is how strace counts.
    let path = path.display().to_string();
    let inject = ["-e", "trace=read", "-P", &path, "-e", "inject=read:error=EIO:when=1"];
    world.under(&[&["strace", "-D", "-f", "-o", "/dev/null"], &inject[..]].concat());
    world.start().wait_settled(LIVENESS);
    assert_eq!(world.file("full-eio.txt").expect("it is known")["state"], "ingested");
    let log = world.daemon().log_text();
    assert!(log.contains("Input/output error"), "the fault was there: {log}");
    let pid = world.daemon().pid();
    assert_no_restart(&mut world, pid);
    world.stop();
    assert_nothing_stranded(&world, "alerts");
    world.prove();
}
