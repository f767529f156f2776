//! The machine's wall clock is set while the daemon runs (F9). `libfaketime` fakes it for the daemon alone; the other
//! clocks are real.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind},
    scripted::{Reply, Request},
    wait_until,
};

const ROWS: usize = 200;

/// The wall clock of a world's daemon.
pub(crate) struct Wall(PathBuf);

impl Wall {
    /// One that shows the real time as yet.
    pub(crate) fn of(world: &World) -> Self {
        let wall = Self(world.path("wall"));
        wall.set("+0");
        wall
    }

    /// What the daemon has to be started by to go by it.
    pub(crate) fn command(&self) -> Vec<String> {
        let library = fs::read_dir("/usr/lib").expect("it is there").flatten().find_map(|arch| {
            let path = arch.path().join("faketime/libfaketimeMT.so.1");
            path.exists().then(|| path.display().to_string())
        });
        let library = library.expect("script/test installs the package `faketime`");
        vec![
            "env".to_owned(),
            format!("LD_PRELOAD={library}"),
            format!("FAKETIME_TIMESTAMP_FILE={}", self.0.display()),
            "FAKETIME_CACHE_DURATION=1".to_owned(),
            "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
            // It would be left behind by each kill.
            "FAKETIME_DISABLE_SHM=1".to_owned(),
            "NO_FAKE_STAT=1".to_owned(),
        ]
    }

    /// Sets it: so far from the real one.
    pub(crate) fn set(&self, off: &str) {
        let fresh = self.0.with_extension("new");
        fs::write(&fresh, off).expect("the directory is ours");
        fs::rename(fresh, &self.0).expect("one file system");
    }
}

/// Starts the world's daemon with a clock that can be set, and a schedule whose waits are seconds.
fn with_wall(world: &mut World) -> Wall {
    let wall = Wall::of(world);
    let command = wall.command();
    world
        .under(&command.iter().map(String::as_str).collect::<Vec<_>>())
        .set("destinations.support.retry.base", "1s")
        .set("destinations.support.retry.cap", "3s")
        .set("destinations.support.retry.max_retry_after", "3s")
        .set("destinations.support.retry.max_attempts", 100)
        .set("destinations.support.retry.max_age", "1h");
    wall
}

/// Of its message alone: a 503 would hold the whole destination.
fn fails_first(request: &Request) -> Reply {
    if request.earlier == 0 { Reply::Header(425, "retry-after", "2".into()) } else { Reply::Status(200) }
}

/// How long each message waited for its second attempt, the shortest and the longest.
fn waits(world: &World) -> (Duration, Duration) {
    let requests = world.requests();
    let waits = requests.iter().filter(|request| request.earlier == 1).map(|second| {
        let first = requests.iter().find(|first| first.id == second.id && first.earlier == 0);
        second.at - first.expect("a second attempt comes after a first").at
    });
    let waits: Vec<_> = waits.collect();
    let (shortest, longest) = (waits.iter().min(), waits.iter().max());
    (*shortest.expect("there are some"), *longest.expect("there are some"))
}

#[test]
fn f09_a_day_back_leaves_no_retry_stuck() {
    let mut world = World::new("csv");
    world.script(fails_first);
    let wall = with_wall(&mut world);
    world.start().drop_file(Input::csv("back.csv", ROWS).all(Kind::Sent)).wait_requests(ROWS);
    wall.set("-1d");
    world.wait_settled(LIVENESS);
    let (shortest, longest) = waits(&world);
    println!("retries waited {shortest:?} to {longest:?}");
    assert!(
        shortest >= Duration::from_millis(1_900) && longest < Duration::from_secs(20),
        "{shortest:?} {longest:?}"
    );
    assert_eq!(world.daemon().log_text().matches("the wall clock has jumped").count(), 1);

    // Two days back for a process that knows nothing of it: it finds waits that end in two days.
    world.drop_file(Input::csv("restart.csv", ROWS).all(Kind::Sent)).wait_requests(3 * ROWS);
    world.stop();
    wall.set("-3d");
    world.start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 4 * ROWS, "two attempts of each");
}

#[test]
fn f09_days_forward_kill_nothing_and_hurry_nothing() {
    for lasts in [false, true] {
        let healthy = Arc::new(AtomicBool::new(false));
        let is_healthy = Arc::clone(&healthy);
        let mut world = World::new("csv");
        world.script(move |request| {
            if is_healthy.load(Ordering::SeqCst) { Reply::Status(200) } else { fails_first(request) }
        });
        let wall = with_wall(&mut world);
        world.start().drop_file(Input::csv("forward.csv", ROWS).all(Kind::Sent)).wait_requests(ROWS);
        wall.set("+4d");
        world.drop_file(Input::csv("meanwhile.csv", ROWS).all(Kind::Sent)).wait_requests(2 * ROWS);
        let jumped = Instant::now();
        wait_until(LIVENESS, "the jump to be noticed", || {
            world.daemon().log_text().contains("the wall clock has jumped")
        });
        thread::sleep(Duration::from_secs(6).saturating_sub(jumped.elapsed()));
        if !lasts {
            wall.set("+0");
        }
        healthy.store(true, Ordering::SeqCst);
        world.wait_settled(LIVENESS);
        let (shortest, _) = waits(&world);
        assert!(shortest >= Duration::from_millis(1_900), "none is early: {shortest:?}");
        assert_eq!(world.daemon().log_text().matches("the wall clock has jumped").count(), 1);
        world.stop();
        world.prove();
    }
}
