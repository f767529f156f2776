//! Crashes, power cuts, stops and second instances: F1–F3, F5, F10–F13.

use std::{collections::BTreeSet, fs, os::unix::process::ExitStatusExt, path::Path, time::Duration};

use rustix::process::Signal;

use crate::support::{
    LIVENESS, World,
    disk::LoopDisk,
    input::{Input, Kind},
    is_settled, knob,
    process::Process,
    wait_report, wait_until,
};

/// What happens and when, from a seed that a failure prints.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

/// The longest that a daemon of the kill loop lives.
const LIFE_MS_MAX: u64 = 700;

#[test]
fn f01_kills_at_random_times_lose_and_repeat_nothing_beyond_the_window() {
    let kills = knob("POSTRIDER_KILLS", 12);
    let rows = knob("POSTRIDER_ROWS", 20_000);
    let seed = knob("POSTRIDER_SEED", u64::from(std::process::id()));
    println!("POSTRIDER_SEED={seed} POSTRIDER_KILLS={kills} POSTRIDER_ROWS={rows}");
    let mut random = Random(seed);

    let mut world = World::new("csv");
    world.receive(&["--fail-rate", "0.05", "--seed", &seed.to_string()]);
    // Slow enough that the kills fall into the work, not behind it.
    let rate = (rows * 1000 / (kills * LIFE_MS_MAX / 2)).max(200);
    world
        .set("destinations.support.rate_per_s", i64::try_from(rate).expect("rows are few"))
        .set("destinations.support.burst", 100)
        .set("record.max_unrecorded", 500);
    world.drop_file(Input::csv("first.csv", usize::try_from(rows / 2).expect("64 bits")));
    let mut earlier = Vec::new();
    let mut kills_at_work = 0;
    for kill in 1..=kills {
        let before = world.request_count();
        world.start();
        if kill == kills / 2 {
            world.drop_file(Input::csv("second.csv", usize::try_from(rows - rows / 2).expect("64 bits")));
        }
        std::thread::sleep(Duration::from_millis(random.below(LIFE_MS_MAX)));
        world.kill();
        kills_at_work += u64::from(world.request_count() > before);
        // I7 over time, at a few points: a look costs as much as the whole proof.
        if kill % (kills / 3).max(1) == 0 && world.store().exists() {
            earlier.push(world.path(&format!("states-{kill}.json")));
            world.snapshot(earlier.last().expect("just pushed"));
        }
    }
    assert!(
        kills_at_work * 3 >= kills,
        "only {kills_at_work} of {kills} kills met a daemon that was sending"
    );

    world.set("destinations.support.rate_per_s", 0);
    world.start().wait_settled(LIVENESS * 2);
    world.stop();
    let summary = world.prove_since(&earlier);
    println!("{summary}");
    assert_eq!(summary["messages"], rows);
}

#[test]
fn f03_power_cuts_lose_nothing_that_was_acknowledged() {
    let cuts = knob("POSTRIDER_CUTS", 5);
    let rows = knob("POSTRIDER_CUT_ROWS", 10_000);
    let seed = knob("POSTRIDER_SEED", u64::from(std::process::id()));
    println!("POSTRIDER_SEED={seed} POSTRIDER_CUTS={cuts} POSTRIDER_CUT_ROWS={rows}");
    let mut random = Random(seed);
    let place = tempfile::tempdir().expect("a temporary directory");
    let Some(disk) = LoopDisk::mount(place.path(), 256 << 20) else { return };
    let mut world = World::on("csv", disk.path());
    world.receive(&["--fail-rate", "0.05", "--seed", &seed.to_string()]);
    let rate = (rows * 1000 / (cuts * LIFE_MS_MAX / 2)).max(200);
    world
        .set("destinations.support.rate_per_s", i64::try_from(rate).expect("rows are few"))
        .set("destinations.support.burst", 100)
        .set("record.max_unrecorded", 500);
    world.drop_file(Input::csv("first.csv", usize::try_from(rows / 2).expect("64 bits")));
    disk.sync();
    let mut cuts_at_work = 0;
    for cut in 1..=cuts {
        let before = world.request_count();
        world.start();
        if cut == cuts / 2 {
            // Whoever drops a file syncs it, or it may not outlive the power.
            world.drop_file(Input::csv("second.csv", usize::try_from(rows - rows / 2).expect("64 bits")));
            disk.sync();
        }
        std::thread::sleep(Duration::from_millis(random.below(LIFE_MS_MAX)));
        disk.cut();
        world.kill();
        cuts_at_work += u64::from(world.request_count() > before);
        disk.restore();
    }
    assert!(cuts_at_work * 3 >= cuts, "only {cuts_at_work} of {cuts} cuts met a daemon that was sending");
    world.set("destinations.support.rate_per_s", 0);
    world.start().wait_settled(LIVENESS * 2);
    world.stop();
    let summary = world.prove();
    println!("{summary}");
    assert_eq!(summary["messages"], rows);
}

#[test]
fn f05_a_sync_that_fails_ends_the_daemon_which_then_starts_clean() {
    // Counted in each thread. Of a store that is made the start syncs it, of one that is there its writer, log and database.
    // The second sync of either is of a directory, where SQLite goes on without it.
    for (nth, is_new) in [(3, true), (5, true), (1, false), (3, false), (9, false)] {
        let mut world = World::new("csv");
        world.receive(&[]);
        if !is_new {
            world.start_ready().stop();
        }
        let inject = format!("inject=fsync:error=EIO:when={nth}");
        world.under(&["strace", "-D", "-f", "-o", "/dev/null", "-e", "trace=fsync", "-e", &inject]);
        for number in 0..20 {
            world.drop_file(Input::csv(&format!("file{number}.csv"), 50));
        }
        world.start();
        let status = world.wait_exit(LIVENESS);
        // 74: what the disk has is known after a recovery only; 75 at the start, where it may pass.
        assert!(matches!(status.code(), Some(74 | 75)), "sync {nth}, of a new store: {is_new}: {status}");
        world.kills += 1;
        world.under(&[]).start().wait_settled(LIVENESS);
        world.stop();
        world.prove();
    }
}

#[test]
fn f73_kills_while_a_healthy_receiver_is_slow_condemn_nobody() {
    let kills = knob("POSTRIDER_SLOW_KILLS", 4);
    let rows = knob("POSTRIDER_SLOW_ROWS", 200);
    let seed = knob("POSTRIDER_SEED", u64::from(std::process::id()));
    println!("POSTRIDER_SEED={seed} POSTRIDER_SLOW_KILLS={kills} POSTRIDER_SLOW_ROWS={rows}");
    let mut random = Random(seed);
    let mut world = World::new("csv");
    world.receive(&["--latency-ms", "2000"]);
    world.set("destinations.support.concurrency", 32).set("record.max_unrecorded", 200);
    world.drop_file(Input::csv("slow.csv", usize::try_from(rows).expect("64 bits")));
    for _ in 0..kills {
        world.start_ready();
        std::thread::sleep(Duration::from_millis(300 + random.below(2_000)));
        world.kill();
    }
    // One worker may have leased nearly all: half of the permits, two seconds each.
    world.start().wait_settled(LIVENESS * 2 + Duration::from_secs(rows / 8));
    world.stop();
    let summary = world.prove();
    println!("{summary}");
    assert_eq!(
        (&summary["sent"], &summary["dead"]),
        (&rows.into(), &0.into()),
        "everything was answered 200"
    );
}

/// Crashes at `name`, the first time and after each number of passes: in a fresh daemon, and again while
/// that crash is being recovered from.
fn crash_at(make_world: fn(&str) -> World, rows: usize, name: &str, passes: &[u32]) {
    for pass in passes {
        println!("{name} after {pass} passes");
        let mut world = make_world("csv");
        world.receive(&["--fail-rate", "0.1"]);
        let skip = if *pass == 0 { String::new() } else { format!("{pass}*off->") };
        world.fail(&format!("{name}={skip}1*return"));
        for number in 0..3 {
            world.drop_file(Input::csv(&format!("file{number}.csv"), rows));
        }
        world.start();
        let status = world.wait_exit(LIVENESS);
        assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{name} was not reached: {status}");
        world.kills += 1;
        // The same again, so that the recovery itself is crashed.
        world.start();
        wait_until(LIVENESS, "the recovery to crash, or to finish", || {
            // Everything may be settled before the daemon listens to signals.
            let listens = world.notify.count("READY=1") > 0;
            let settled = world.files().iter().filter(|file| is_settled(file)).count();
            !world.daemon().is_running() || (listens && settled == 3)
        });
        if world.daemon().is_running() {
            // It may reach the point on its way out.
            world.daemon().signal(Signal::TERM);
        }
        let status = world.wait_exit(Duration::from_secs(30));
        if status.code() != Some(0) {
            assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{status}");
            world.kills += 1;
        }
        world.fail("").start().wait_settled(LIVENESS);
        for number in 0..3 {
            let report = wait_report(&world.done(&format!("file{number}.csv")));
            assert_eq!(report["rows"], rows, "{report}");
        }
        world.stop();
        world.prove();
    }
}

/// `POINTS` holds every name, so that a point which nobody crashes at is found.
macro_rules! crash_points {
    ($($test:ident: $world:expr, $rows:literal, $name:literal, $passes:expr;)*) => {
        const POINTS: &[&str] = &[$($name),*];
        $(
            #[test]
            #[cfg_attr(not(feature = "failpoints"), ignore = "needs --features failpoints")]
            fn $test() {
                crash_at($world, $rows, $name, &$passes);
            }
        )*
    };
}

crash_points! {
    f02_crash_when_a_file_is_taken: World::new, 400, "inbox.taken", [0, 1];
    f02_crash_when_a_file_of_another_file_system_is_staged: World::apart, 400, "inbox.staged", [0, 1];
    f02_crash_when_a_file_of_another_file_system_is_copied: World::apart, 400, "inbox.copied", [0, 1];
    f02_crash_after_the_claim: World::new, 400, "claim.after", [0, 1];
    f02_crash_before_the_append: World::new, 400, "append.before", [0, 2];
    f02_crash_after_the_append: World::new, 400, "append.after", [0, 2];
    f02_crash_before_the_finish: World::new, 400, "finish.before", [0, 1];
    f02_crash_after_the_finish: World::new, 400, "finish.after", [0, 1];
    f02_crash_when_the_report_is_written: World::new, 400, "inbox.reported", [0, 1];
    f02_crash_when_the_file_is_moved: World::new, 400, "inbox.moved", [0, 1];
    f02_crash_after_the_lease: World::new, 400, "lease.after", [0, 1];
    f02_crash_before_an_attempt: World::new, 400, "attempt.before", [0, 250];
    f02_crash_after_an_attempt: World::new, 400, "attempt.after", [0, 250];
    f02_crash_before_the_settlement: World::new, 400, "settle.before", [0, 1];
    f02_crash_after_the_settlement: World::new, 400, "settle.after", [0, 1];
    f02_crash_before_the_report_is_marked: World::new, 400, "report.before_mark", [0];
    f02_crash_before_a_commit: World::new, 400, "store-before-commit", [0, 4, 15];
    f02_crash_after_a_commit: World::new, 400, "store-after-commit", [0, 4, 15];
    // Enough rows for the store's log to be moved into the database.
    f02_crash_before_the_log_is_moved: World::new, 10_000, "store-checkpoint", [0];
}

/// Points of the queue feed and of the coordinator; `several` crashes and panics at them, for they need a queue.
const QUEUE_POINTS: &[&str] = &[
    "intake.append.before",
    "intake.append.after",
    "panic.queue_feed",
    "dispatch.sent",
    "panic.coordinator",
];

/// The names in `failpoint!("…")` below a directory of sources.
fn declared_points(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).expect("sources are there") {
        let path = entry.expect("it reads").path();
        if path.is_dir() {
            declared_points(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("sources are text");
            let names = text.split("failpoint!(\"").skip(1).filter_map(|rest| rest.split('"').next());
            found.extend(names.map(str::to_owned));
        }
    }
}

#[cfg(all(feature = "aws", feature = "postgres"))]
#[test]
fn f02_every_failpoint_of_the_product_has_its_test() {
    use crate::{panics, receipts, steering, tables};
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut declared = BTreeSet::new();
    for sources in ["src", "actors/src", "adapters"] {
        declared_points(&root.join(sources), &mut declared);
    }
    let own = POINTS.iter().chain(panics::POINTS).chain(QUEUE_POINTS);
    let later = receipts::POINTS.iter().chain(receipts::POSTGRES_POINTS);
    let later = later.chain(tables::POINTS).chain(steering::POINTS);
    let tested: BTreeSet<_> = own.chain(later).map(|name| (*name).to_owned()).collect();
    assert_eq!(declared, tested);
}

#[test]
fn f10_a_stop_past_the_lease_does_no_harm() {
    let mut world = World::new("csv");
    world.receive(&["--latency-ms", "20"]);
    world
        .set("destinations.support.timeout", "1s")
        .set("lease.duration", "2500ms")
        .set("record.max_unrecorded", 200)
        .drop_file(Input::csv("stopped.csv", 3000))
        .start();
    world.wait_requests(300);
    world.daemon().signal(Signal::STOP);
    // Nothing to wait for: the point is that the lease's time passes.
    std::thread::sleep(Duration::from_millis(3500));
    assert!(world.request_count() < 3000, "it was done before it was stopped");
    world.daemon().signal(Signal::CONT);
    world.wait_settled(LIVENESS);
    world.stop();
    // What was in flight at the stop may have timed out in the sender's eyes, once.
    world.unknown = world.window();
    let summary = world.prove();
    assert_eq!(summary["dead"], 0, "a stop costs no message its attempts");
}

#[test]
fn f11_sigterm_under_load_repeats_nothing() {
    let mut world = World::new("csv");
    world.receive(&["--latency-ms", "20"]);
    world.drop_file(Input::csv("drained.csv", 6000));
    for stop in 1..=3 {
        world.start();
        world.wait_requests(stop * 800);
        world.stop();
        assert!(world.request_count() < 6000, "it was done before it was stopped");
    }
    world.start().wait_settled(LIVENESS);
    world.stop();
    let summary = world.prove();
    assert_eq!(summary["requests"], 6000);
    assert_eq!(summary["sent"], 6000);
}

#[test]
fn f12_a_second_sigterm_exits_at_once() {
    let mut world = World::new("csv");
    world.receive(&["--latency-ms", "4000"]);
    world.drop_file(Input::csv("hurried.csv", 50)).start();
    world.wait_requests(1);
    world.daemon().signal(Signal::TERM);
    world.notify.wait("STOPPING=1");
    assert!(world.daemon().is_running(), "the drain waits for what is in flight");
    world.daemon().signal(Signal::TERM);
    world.wait_exit(Duration::from_secs(2));
    world.kills += 1;
    world.receive(&[]);
    world.start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn f60_a_sigterm_after_a_reload_drains_and_repeats_nothing() {
    let mut world = World::new("csv");
    world.receive(&["--latency-ms", "2000"]);
    world.drop_file(Input::csv("reloaded.csv", 50)).start();
    world.wait_requests(1);
    world.daemon().signal(Signal::HUP);
    // The old configuration still has its requests in flight.
    world.daemon().wait_log("the new configuration is in use");
    world.daemon().signal(Signal::TERM);
    assert_eq!(world.wait_exit(Duration::from_secs(20)).code(), Some(0), "the first SIGTERM is the first");
    world.receive(&[]);
    world.start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests_after_2xx"], 0);
}

#[test]
fn f12_a_bad_config_is_not_taken_up() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.start_ready();
    fs::write(world.config_path(), "[state]\ndir = 7\n[pools]\nparserz = 2\n").expect("it is ours");
    world.daemon().signal(Signal::HUP);
    world.daemon().wait_log("parserz");
    // `postrider files` would read the bad file.
    world.configure();
    world.drop_file(Input::csv("after.csv", 300)).wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn f13_a_second_instance_is_refused() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.start_ready();
    let mut second = Process::spawn(&mut world.command(&["run"]), &world.path("second.log"));
    let status = second.wait_exit(Duration::from_secs(10));
    assert_eq!(status.code(), Some(78), "{}", second.log_text());
    let state = world.state().display().to_string();
    assert!(second.log_text().contains(&state), "it names the state directory: {}", second.log_text());
    world.drop_file(Input::csv("undisturbed.csv", 300).all(Kind::Sent)).wait_settled(LIVENESS);
    world.stop();
    world.prove();
}
