//! Feeds and files that wait for an operator: the others and the daemon go on, and whoever asks hears why. Who may ask, too.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind},
    process::{Answer, POSTRIDER, Process, run},
    wait_for, wait_report, wait_until,
};

/// Nobody in particular: what a daemon without privileges runs as.
const NOBODY: u32 = 65534;
/// Somebody who is in the daemon's group.
const READER: u32 = 65532;

/// What is active of an alarm, by the log: its last line.
fn alarm(world: &mut World, kind: &str) -> Option<Value> {
    let log = world.daemon().log_text();
    let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.rfind(|line| line["fields"]["alarm"] == kind || line["alarm"] == kind)
}

pub(crate) fn wait_alarm(world: &mut World, kind: &str, word: &str, what: &str) {
    wait_until(LIVENESS, &format!("alarm {kind} {word}"), || {
        alarm(world, kind).is_some_and(|line| {
            let line = line.to_string();
            line.contains(&format!("alarm {word}")) && line.contains(what)
        })
    });
}

pub(crate) fn status(world: &World) -> Value {
    world.postrider(&["status", "--json", "--sample-ms", "0"]).ok().json()
}

/// Two feeds: what is done to `alerts` must not concern `calm`.
fn two_feeds() -> World {
    let mut world = World::new("text");
    world.receive(&[]);
    world.add_feed("calm", "text", &["support"]);
    world
}

/// Spoils a feed's directory by `spoil`, and puts it right by `repair`. Meanwhile the feed is parked for a reason that holds
/// `why`, and the other one goes on.
fn parks(spoil: impl Fn(&Path), why: &str, repair: impl Fn(&Path), is_running: bool) {
    let mut world = two_feeds();
    let inbox = world.inbox("alerts");
    if is_running {
        world.start_ready();
        world.drop_file(Input::text("before.txt", 10)).wait_settled(LIVENESS);
        wait_report(&world.done("before.txt"));
    }
    spoil(&inbox);
    if !is_running {
        world.start_ready();
    }
    let pid = world.daemon().pid();
    let parked = wait_for(LIVENESS, "the feed to be parked", || {
        let feed = status(&world)["feeds"]["alerts"].clone();
        (feed["state"] == "parked").then_some(feed)
    });
    assert!(parked["parked_reason"].as_str().expect("a reason").contains(why), "{parked}");
    assert_eq!(status(&world)["feeds"]["calm"]["state"], "enabled");
    let text = world.postrider(&["status", "--sample-ms", "0"]).ok().stdout;
    assert!(text.contains("parked   feed alerts since") && text.contains(why), "{text}");
    wait_alarm(&mut world, "feeds", "raised", why);
    for number in 0..3 {
        world.drop_into("calm", Input::text(&format!("calm{number}.txt"), 10));
    }
    world.wait_settled(LIVENESS);
    // Six failures took 3 s, and then the daemon was gone.
    thread::sleep(Duration::from_secs(5));
    assert!(world.daemon().is_running());
    repair(&inbox);
    world.drop_file(Input::text("after.txt", 10)).wait_settled(LIVENESS);
    wait_report(&world.done("after.txt"));
    wait_alarm(&mut world, "feeds", "cleared", "");
    wait_until(LIVENESS, "the status to say so", || status(&world)["feeds"]["alerts"]["state"] == "enabled");
    assert_eq!(world.daemon().pid(), pid);
    let log = world.daemon().log_text();
    assert_eq!(
        log.lines().filter(|line| line.contains("will be restarted")).count(),
        0,
        "nothing was restarted"
    );
    assert_eq!(log.lines().filter(|line| line.contains("the feed is parked")).count(), 1, "said once");
    if is_running {
        spoil(&inbox);
        wait_until(LIVENESS, "the feed to be parked again", || {
            status(&world)["feeds"]["alerts"]["state"] == "parked"
        });
    }
    world.stop();
    // What a daemon has noted that has ended says nothing of now.
    assert_eq!(status(&world)["feeds"]["alerts"]["state"], "enabled");
    world.prove();
}

#[test]
fn f58_a_plain_file_called_done_parks_its_feed_alone() {
    let spoil = |inbox: &Path| {
        let _ = fs::remove_dir_all(inbox.join("done")); // not there before the first start
        fs::write(inbox.join("done"), "").expect("the directory is ours");
    };
    parks(
        spoil,
        "/done: Not a directory",
        |inbox| fs::remove_file(inbox.join("done")).expect("it is there"),
        false,
    );
}

#[test]
fn f58_a_plain_file_called_postrider_parks_its_feed_alone() {
    let spoil = |inbox: &Path| fs::write(inbox.join(".postrider"), "").expect("the directory is ours");
    let repair = |inbox: &Path| fs::remove_file(inbox.join(".postrider")).expect("it is there");
    parks(spoil, "/.postrider: Not a directory", repair, false);
}

#[test]
fn f58_a_feed_whose_directory_is_not_there_at_the_start_comes_with_it() {
    let spoil = |inbox: &Path| fs::remove_dir_all(inbox).expect("it is ours");
    parks(
        spoil,
        "No such file or directory",
        |inbox| fs::create_dir(inbox).expect("its place is free"),
        false,
    );
}

#[test]
fn f58_a_feed_whose_directory_goes_away_comes_back_with_it() {
    let away = |inbox: &Path| inbox.with_extension("away");
    let spoil = |inbox: &Path| fs::rename(inbox, away(inbox)).expect("its place is ours");
    let repair = |inbox: &Path| fs::rename(away(inbox), inbox).expect("its place is free");
    parks(spoil, "No such file or directory", repair, true);
}

#[test]
fn f58_a_file_in_the_place_of_done_while_it_runs_parks_the_feed_and_loses_nothing() {
    let mut world = two_feeds();
    world.start_ready();
    let (done, away) = (world.inbox("alerts").join("done"), world.inbox("alerts").join(".done-away"));
    wait_until(LIVENESS, "the directory to be made", || done.exists());
    fs::rename(&done, &away).expect("it is ours");
    fs::write(&done, "").expect("its place is free");
    world.drop_file(Input::text("stuck.txt", 30));
    // Its rows are delivered; it can't be moved away, which is said.
    world.wait_requests(30);
    wait_alarm(&mut world, "feeds", "raised", "Not a directory");
    let held = wait_for(LIVENESS, "the file to be held", || world.held("stuck.txt"));
    assert!(held["reason"].as_str().expect("a reason").contains("Not a directory"), "{held}");
    world.drop_into("calm", Input::text("calm.txt", 10));
    wait_report(&world.inbox("calm").join("done/calm.txt"));
    fs::remove_file(&done).expect("it is there");
    fs::rename(&away, &done).expect("its place is free");
    wait_report(&world.done("stuck.txt"));
    wait_alarm(&mut world, "feeds", "cleared", "");
    wait_alarm(&mut world, "files", "cleared", "");
    world.stop();
    assert_eq!(world.prove()["requests"], 40, "nothing was sent again");
}

#[test]
#[cfg_attr(not(feature = "failpoints"), ignore = "needs --features failpoints")]
fn f58_a_feed_that_panics_without_end_is_parked_and_the_daemon_goes_on() {
    let mut world = two_feeds();
    // From the second pass on: the first was the calm feed's.
    world.fail("panic.parser=1*off->panic(injected without end)");
    world.drop_into("calm", Input::text("calm.txt", 10)).start_ready();
    world.wait_settled(LIVENESS);
    world.drop_file(Input::text("hurt.txt", 10));
    wait_alarm(&mut world, "feeds", "raised", "parser fails again and again");
    assert_eq!(status(&world)["feeds"]["alerts"]["state"], "parked");
    assert_eq!(status(&world)["feeds"]["calm"]["state"], "enabled");
    thread::sleep(Duration::from_secs(5));
    assert!(world.daemon().is_running());
    world.stop();
    world.fail("").start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn f58_a_reload_that_corrects_the_path_takes_the_feed_up_again() {
    let mut world = two_feeds();
    fs::remove_dir_all(world.inbox("alerts")).expect("it is ours");
    world.start_ready();
    wait_alarm(&mut world, "feeds", "raised", "No such file or directory");
    let other = world.path("other");
    fs::create_dir(&other).expect("its place is free");
    world.set("feeds.alerts.path", other.display().to_string()).configure();
    world.daemon().signal(rustix::process::Signal::HUP);
    wait_alarm(&mut world, "feeds", "cleared", "");
    assert_eq!(status(&world)["feeds"]["alerts"]["state"], "enabled");
    let input = Input::text("after.txt", 10);
    fs::write(other.join(".after.txt"), &input.bytes).expect("the directory is ours");
    fs::rename(other.join(".after.txt"), other.join("after.txt")).expect("one file system");
    world.expect("alerts", input).wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn f58_what_would_park_a_feed_is_found_before_the_start() {
    let mut world = two_feeds();
    let check = |world: &World| world.postrider(&["check-config", "--connect", "--json"]);
    world.configure();
    check(&world).ok();
    fs::write(world.inbox("alerts").join("done"), "").expect("the directory is ours");
    fs::remove_dir_all(world.inbox("calm")).expect("it is ours");
    let answer = check(&world);
    assert_eq!(answer.code, Some(78), "{}", answer.stdout);
    assert!(answer.stdout.contains("a file is called done; move it away"), "{}", answer.stdout);
    assert!(answer.stdout.contains("No such file or directory"), "{}", answer.stdout);
}

/// The same command as somebody else, with a binary and a world that they can reach.
fn as_user(world: &World, command: &Command, uid: u32, gid: u32) -> Command {
    use std::os::unix::process::CommandExt as _;
    let binary = world.path("postrider");
    if !binary.exists() {
        fs::copy(POSTRIDER, &binary).expect("the disk has room");
        for directory in [world.path("."), world.inbox("alerts").join("..")] {
            fs::set_permissions(directory, Permissions::from_mode(0o755)).expect("it is ours");
        }
    }
    let mut other = Command::new(&binary);
    other.args(command.get_args()).uid(uid).gid(gid).current_dir("/");
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => other.env(name, value),
            None => other.env_remove(name),
        };
    }
    other
}

/// Gives a tree to `uid`.
fn give(path: &Path, uid: u32) {
    chown(path, Some(uid), Some(uid)).expect("root may");
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("it is ours") {
            give(&entry.expect("it reads").path(), uid);
        }
    }
}

/// A daemon of somebody who can't read everything, as root can.
pub(crate) fn start_as_nobody(world: &mut World) -> Process {
    world.configure();
    let command = as_user(world, &world.run_command(), NOBODY, NOBODY);
    give(&world.path("."), NOBODY);
    give(world.staging().parent().expect("it is beside the feeds"), NOBODY);
    let mut command = command;
    let daemon = Process::spawn(&mut command, &world.daemon_log());
    world.notify.wait("READY=1");
    daemon
}

/// Files that are dropped at once.
const FILES: usize = 10_000;

#[test]
fn f28_a_file_that_can_t_be_read_is_shown_and_holds_up_none_of_ten_thousand() {
    if !rustix::process::getuid().is_root() {
        eprintln!("SKIPPED: only root can run the daemon as somebody else");
        return;
    }
    let mut world = World::new("text");
    world.receive(&[]);
    world.set("ops.listen", "127.0.0.1:0");
    let mut daemon = start_as_nobody(&mut world);
    // All at once: a directory of files takes the place of the feed's, with the one that can't be read in the middle.
    let inbox = world.inbox("alerts");
    let mut bytes = Vec::new();
    for number in 0..FILES {
        let input = Input::text(&format!("many{number:05}.txt"), 1);
        let path = world.staging().join(&input.name);
        fs::write(&path, &input.bytes).expect("the directory is ours");
        let mode = if number == FILES / 2 { 0o000 } else { 0o644 };
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("it is ours");
        bytes.push(input);
    }
    let locked = bytes[FILES / 2].name.clone();
    for input in &bytes {
        fs::rename(world.staging().join(&input.name), inbox.join(&input.name)).expect("one file system");
    }
    for input in bytes {
        world.expect("alerts", input);
    }
    wait_until(LIVENESS * 5, "all others to be sent", || world.request_count() >= FILES - 1);
    let held = wait_for(LIVENESS, "the file to be held", || world.held(&locked));
    assert_eq!((&held["state"], &held["feed"]), (&"held".into(), &"alerts".into()), "{held}");
    assert!(held["reason"].as_str().expect("a reason").contains("Permission denied"), "{held}");
    assert_eq!(status(&world)["files"]["held"], 1);
    let log = daemon.log_text();
    assert!(log.lines().any(|line| line.contains("alarm raised") && line.contains("\"files\"")), "{log}");
    assert_eq!(
        log.lines().filter(|line| line.contains(&locked) && line.contains("claimed")).count(),
        1,
        "it is reported once"
    );
    fs::set_permissions(inbox.join(&locked), Permissions::from_mode(0o644)).expect("it is ours");
    world.wait_requests(FILES);
    wait_until(LIVENESS, "nothing to be held", || status(&world)["files"]["held"] == 0);
    wait_until(LIVENESS, "the alarm to be cleared", || daemon.log_text().contains("alarm cleared"));
    assert!(daemon.is_running());
    daemon.signal(rustix::process::Signal::TERM);
    assert_eq!(daemon.wait_exit(Duration::from_secs(30)).code(), Some(0));
    world.prove();
}

#[test]
fn f28_a_file_that_failed_is_in_the_status_and_raises_an_alarm() {
    let mut world = World::new("text");
    world.receive(&[]);
    world.start_ready();
    fs::write(world.inbox("alerts").join("short.txt.done"), "rows=61\n").expect("the directory is ours");
    world.drop_file(Input::text("short.txt", 60).ending("failed"));
    for input in world.expected_mut() {
        input.rows.clear();
    }
    world.wait_settled(LIVENESS);
    wait_report(&world.failed("short.txt"));
    assert_eq!(status(&world)["files"]["failed"], 1);
    wait_alarm(&mut world, "files", "raised", "");
    world.stop();
    world.prove();
}

#[test]
fn f06_a_report_that_can_t_be_written_holds_up_no_other() {
    let mut world = World::new("text");
    world.script(|_| crate::support::scripted::Reply::Status(200));
    world.start_ready();
    let done = world.inbox("alerts").join("done");
    wait_until(LIVENESS, "the directory to be made", || done.exists());
    // In the way of the first file's report: before it is finished, and of the hidden name that it is written under.
    fs::create_dir(done.join("taken.txt.report.json")).expect("its place is free");
    world.drop_file(Input::text("taken.txt", 5)).wait_settled(LIVENESS);
    let report = wait_for(LIVENESS, "a report beside the one that is taken", || {
        let mut names = fs::read_dir(&done).expect("it is there").flatten();
        names.find(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            name.starts_with("taken.txt.") && name.ends_with(".report.json") && entry.path().is_file()
        })
    });
    let id = world.file("taken.txt").expect("it is known")["id"].as_str().expect("an id").to_owned();
    assert!(report.file_name().to_string_lossy().contains(&id[..8]));
    // Nothing can be written under that name: the hidden file's is a directory with something in it.
    let id = |world: &World, name: &str| {
        world.file(name).expect("it is known")["id"].as_str().expect("an id")[..8].to_owned()
    };
    let blocked = Input::text("blocked.txt", 5);
    world.drop_file(blocked.clone()).wait_settled(LIVENESS);
    let final_report = wait_report(&world.done("blocked.txt"));
    assert!(final_report["settled_at"].is_string(), "{final_report}");
    let hidden = done.join(format!(".blocked.txt.report.json.{}", id(&world, "blocked.txt")));
    fs::create_dir_all(hidden.join("in the way")).expect("its place is free");
    // Somebody has cleared up, and drops the same bytes again: the report is to be written again, and can't be.
    fs::remove_file(done.join("blocked.txt")).expect("it is there");
    fs::remove_file(done.join("blocked.txt.report.json")).expect("it is there");
    world.drop_file(blocked);
    let held = wait_for(LIVENESS, "the file to be held", || world.held("blocked.txt"));
    assert!(held["reason"].as_str().expect("a reason").contains("blocked.txt.report.json"), "{held}");
    wait_alarm(&mut world, "files", "raised", "");
    for number in 0..5 {
        world.drop_file(Input::text(&format!("other{number}.txt"), 5));
    }
    for number in 0..5 {
        wait_report(&world.done(&format!("other{number}.txt")));
    }
    fs::remove_dir_all(&hidden).expect("it is ours");
    wait_until(LIVENESS, "nothing to be held", || status(&world)["files"]["held"] == 0);
    world.stop();
    world.prove();
}

/// A `postrider` command of somebody in the daemon's group, who may write nowhere.
fn ask(world: &World, arguments: &[&str]) -> Answer {
    // The tests' daemon is root's, and root's its group.
    let mut command = as_user(world, &world.command(arguments), READER, 0);
    run(&mut command, &world.path("."), LIVENESS)
}

#[test]
fn the_store_is_the_group_s_to_read_whatever_the_umask_and_the_rest_of_the_configuration() {
    if !rustix::process::getuid().is_root() {
        eprintln!("SKIPPED: only root can ask as somebody else");
        return;
    }
    let mut world = World::new("text");
    world.script(|request| {
        let is_dead = request.body.contains("user-ask-0000007");
        crate::support::scripted::Reply::Status(if is_dead { 404 } else { 200 })
    });
    // As an earlier run with another umask left it.
    fs::create_dir(world.state()).expect("its place is free");
    fs::set_permissions(world.state(), Permissions::from_mode(0o700)).expect("it is ours");
    world.under(&["sh", "-c", "umask 077; exec \"$0\" \"$@\""]).start_ready();
    let mut input = Input::text("ask.txt", 20);
    input.rows[6].kind = Kind::Dead;
    world.drop_file(input).wait_settled(LIVENESS);
    wait_until(LIVENESS, "the file of troubles", || world.state().join("troubles.json").exists());
    let mode = |path: &Path| fs::metadata(path).expect("it is there").mode() & 0o7777;
    assert_eq!(mode(&world.state()), 0o750);
    for entry in fs::read_dir(world.state()).expect("it is there").flatten() {
        let expected = if entry.path().is_dir() { 0o700 } else { 0o640 };
        assert_eq!(mode(&entry.path()), expected, "{}", entry.path().display());
    }

    // A destination whose secret is missing, and keys that are none.
    world.add_destination("broken").set("destinations.broken.secrets", vec!["env:NOT_SET_ANYWHERE"]);
    world.set("destinations.broken.no_such_key", 1).set("feeds.alerts.rescan", "sometimes").configure();
    assert_eq!(world.postrider(&["check-config"]).code, Some(78));
    let commands: [&[&str]; 7] = [
        &["status", "--sample-ms", "0"],
        &["files"],
        &["files", "ask.txt", "--json"],
        &["messages", "--recipient", "user-ask-0000003"],
        &["dead", "list"],
        &["dead", "export"],
        &["destinations"],
    ];
    let check = |world: &World, when: &str| {
        for arguments in commands {
            let answer = ask(world, arguments);
            assert_eq!(answer.code, Some(0), "{arguments:?} {when}: {}{}", answer.stdout, answer.stderr);
            assert!(answer.stderr.contains("postrider check-config"), "{arguments:?}: {}", answer.stderr);
        }
        let files = ask(world, &["files", "ask.txt", "--json"]).json();
        assert_eq!(files[0]["destinations"]["support"]["sent"], 19, "{files}");
        assert!(ask(world, &["dead", "list"]).stdout.contains("404"));
    };
    check(&world, "while the daemon runs");
    world.stop();
    check(&world, "after a clean stop");
    // Whoever is in no group of ours reads nothing.
    let mut stranger = as_user(&world, &world.command(&["files"]), READER, READER);
    let answer = crate::support::process::run(&mut stranger, &world.path("."), LIVENESS);
    assert!(answer.code != Some(0) && answer.stderr.contains("Permission denied"), "{}", answer.stderr);
    world.prove();
}
