//! Everything at once: kills, stops, reloads, disks that are full, a wall clock that is set, a receiver that fails, descriptors
//! that run out, bad files between good ones. A service manager restarts the daemon, and nobody does anything else for it.
//! `POSTRIDER_CHAOS_S` says for how long, `POSTRIDER_CHAOS_SEED` what happens.

mod plan;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, Permissions},
    io::ErrorKind,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::ExitStatus,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;

use self::plan::{Disk, Dropping, Event, FEEDS, Manner, Settings, Sort, plan};
use crate::{
    clock::Wall,
    disk::{assert_nothing_stranded, limit_files, open_files},
    files::gzip,
    support::{
        LIVENESS, World,
        disk::SmallDisk,
        input::{Input, Kind, Row},
        is_settled, keeps, knob,
        scripted::sha256_hex,
    },
};

/// The unit's times; it waits longer before a restart.
const RESTART_AFTER: Duration = Duration::from_millis(300);
const STOP_MAX: Duration = Duration::from_secs(35);
const START_MAX: Duration = Duration::from_secs(90);
const WATCHDOG: Duration = Duration::from_secs(30);

/// Exit codes after which the unit is not started again.
const STAYS_DOWN: [i32; 4] = [2, 65, 66, 78];

const DESTINATIONS: [&str; 2] = ["support", "audit"];

/// How long one attempt may take: less than the receiver hangs.
const TIMEOUT_S: i64 = 2;

/// Attempts that a receiver which hangs for so long may get of each request that it then answers.
const ATTEMPTS_OF_A_HANG: usize = 3;

/// Descriptors of a daemon that lacks none.
const PLENTY: u64 = 1024;

/// What the service manager knows of the daemon.
enum Unit {
    /// Gone; to be started then.
    Down(Instant),
    Starting(Instant),
    /// With the number of its watchdog's beats, and when the last one was.
    Up(usize, Instant),
    /// SIGTERM was sent then.
    Stopping(Instant),
}

struct Chaos {
    disks: BTreeMap<Disk, SmallDisk>,
    world: World,
    wall: Wall,
    began: Instant,
    unit: Unit,
    /// What the daemon may open beside what it has, while that is limited.
    spare: Option<u64>,
    manner: Manner,
    /// What was dropped, by number.
    dropped: BTreeMap<usize, (Dropping, Input)>,
    /// What waits for room on the feed's disk.
    undropped: Vec<Dropping>,
    unlocked: BTreeSet<usize>,
    /// How often the daemon ended in which way.
    ends: BTreeMap<String, usize>,
    /// Holds the disks' mount points, if there are any.
    _place: tempfile::TempDir,
}

impl Chaos {
    fn begin() -> Self {
        let mut place = tempfile::tempdir().expect("a temporary directory");
        place.disable_cleanup(keeps());
        let mut disks = BTreeMap::new();
        disks.extend(SmallDisk::mount(place.path(), "256m").map(|disk| (Disk::State, disk)));
        let mut world = World::on("csv", place.path());
        if !disks.is_empty() {
            disks.extend(SmallDisk::mount(&world.inbox("apart"), "64m").map(|disk| (Disk::Feed, disk)));
        }
        // A receiver whose clock is right would take the signatures for old ones.
        world.checks_signatures = false;
        world.receive(&[]);
        world.add_destination("audit").add_feed("news", "csv", &["audit"]).add_feed(
            "apart",
            "csv",
            &["support"],
        );
        world
            .set("feeds.alerts.destinations", DESTINATIONS.to_vec())
            .set("log.level", "info")
            .set("record.max_unrecorded", 50)
            .environment("WATCHDOG_USEC", &WATCHDOG.as_micros().to_string());
        for name in DESTINATIONS {
            // Nothing here is a message's fault: each is sent in the end.
            world
                .set(&format!("destinations.{name}.retry.max_attempts"), 250)
                .set(&format!("destinations.{name}.retry.max_age"), "30d")
                // For so long a wall clock that is set back keeps retries.
                .set(&format!("destinations.{name}.retry.max_retry_after"), "1s")
                .set(&format!("destinations.{name}.timeout"), format!("{TIMEOUT_S}s"));
        }
        let wall = Wall::of(&world);
        let now = Instant::now();
        let mut chaos = Self {
            disks,
            world,
            wall,
            began: now,
            unit: Unit::Down(now),
            spare: None,
            manner: Manner::Well,
            dropped: BTreeMap::new(),
            undropped: Vec::new(),
            unlocked: BTreeSet::new(),
            ends: BTreeMap::new(),
            _place: place,
        };
        chaos.use_settings(Settings::USUAL);
        chaos
    }

    fn say(&self, what: &str) {
        println!("{:>9.3?} {what}", self.began.elapsed());
    }

    // --- the service manager

    fn start(&mut self) {
        let mut words: Vec<String> = Vec::new();
        if rustix::process::getuid().is_root() {
            // Root can't read everything then.
            words.extend(["setpriv", "--bounding-set", "-dac_override,-dac_read_search"].map(str::to_owned));
        }
        words.extend(self.wall.command());
        self.world.under(&words.iter().map(String::as_str).collect::<Vec<_>>()).start();
        self.unit = Unit::Starting(Instant::now());
        if self.spare.is_some() {
            self.limit_files();
        }
    }

    fn limit_files(&mut self) {
        let pid = self.world.daemon().pid();
        let limit = self.spare.and_then(|spare| Some(spare + open_files(pid)?)).unwrap_or(PLENTY);
        // It may have ended just now.
        let _ = limit_files(pid, limit);
    }

    /// Its process is there.
    fn is_running(&self) -> bool {
        !matches!(self.unit, Unit::Down(_))
    }

    /// What the service manager does about what the daemon did.
    fn supervise(&mut self) {
        if let Unit::Down(until) = self.unit {
            if until <= Instant::now() {
                self.start();
            }
            return;
        }
        if let Some(status) = self.world.daemon().exit_status() {
            self.world.wait_exit(Duration::ZERO);
            self.ended(status);
            return;
        }
        match self.unit {
            Unit::Down(_) => {}
            Unit::Starting(since) => {
                if self.world.notify.count("READY=1") > 0 {
                    self.unit = Unit::Up(0, Instant::now());
                }
                assert!(since.elapsed() < START_MAX, "the start takes longer than TimeoutStartSec");
            }
            Unit::Up(beats, last) => {
                let now = self.world.notify.count("WATCHDOG=1");
                if now > beats {
                    self.unit = Unit::Up(now, Instant::now());
                }
                assert!(last.elapsed() < WATCHDOG, "the watchdog would have killed it");
            }
            Unit::Stopping(since) => {
                if since.elapsed() > STOP_MAX {
                    self.kill("killed after TimeoutStopSec");
                }
            }
        }
    }

    fn ended(&mut self, status: ExitStatus) {
        let was_asked = matches!(self.unit, Unit::Stopping(_));
        assert!(was_asked || status.code() != Some(0), "it ended by itself, as if it was done");
        assert!(!status.code().is_some_and(|code| STAYS_DOWN.contains(&code)), "it stays down: {status}");
        // Before it listens to signals, SIGTERM ends it like any process.
        if !was_asked || !(status.code() == Some(0) || status.signal() == Some(Signal::TERM.as_raw())) {
            self.world.kills += 1;
        }
        self.down(&status.to_string());
    }

    fn kill(&mut self, why: &str) {
        self.world.kill();
        self.down(why);
    }

    fn down(&mut self, why: &str) {
        self.say(why);
        *self.ends.entry(why.to_owned()).or_default() += 1;
        self.unit = Unit::Down(Instant::now() + RESTART_AFTER);
    }

    // --- what happens

    /// Lets time pass.
    fn until(&mut self, at: Duration) {
        loop {
            self.supervise();
            self.lose_claimed();
            let left = at.saturating_sub(self.began.elapsed());
            if left.is_zero() {
                return;
            }
            thread::sleep(left.min(Duration::from_millis(20)));
        }
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Kill => {
                if self.is_running() {
                    self.kill("killed");
                }
            }
            Event::Terminate => {
                if matches!(self.unit, Unit::Starting(_) | Unit::Up(..)) {
                    self.world.daemon().signal(Signal::TERM);
                    self.unit = Unit::Stopping(Instant::now());
                }
            }
            Event::Reload(settings) => {
                self.use_settings(settings);
                self.world.configure();
                // `systemctl reload` is for a unit that is up.
                if matches!(self.unit, Unit::Up(..)) {
                    self.world.daemon().signal(Signal::HUP);
                }
            }
            Event::Fill(disk) => {
                if let Some(disk) = self.disks.get(&disk) {
                    disk.fill();
                }
            }
            Event::Free(disk) => {
                if let Some(disk) = self.disks.get(&disk) {
                    disk.free();
                }
                for dropping in std::mem::take(&mut self.undropped) {
                    self.drop_file(dropping);
                }
            }
            Event::Wall(seconds) => self.wall.set(&format!("{seconds:+}")),
            Event::Receiver(manner) => self.receiver(manner),
            Event::Descriptors(spare) => {
                self.spare = spare;
                if self.is_running() {
                    self.limit_files();
                }
            }
            Event::Drop(dropping) => self.drop_file(dropping),
            Event::Unlock(number) => {
                self.unlocked.insert(number);
                if let Some((dropping, input)) = self.dropped.get(&number) {
                    let path = self.world.inbox(dropping.feed).join(&input.name);
                    fs::set_permissions(path, Permissions::from_mode(0o644)).expect("nobody could take it");
                }
            }
            Event::Vanish(number) => {
                if let Some((dropping, input)) = self.dropped.get(&number) {
                    // It may be claimed.
                    let _ = fs::remove_file(self.world.inbox(dropping.feed).join(&input.name));
                }
            }
        }
    }

    fn use_settings(&mut self, settings: Settings) {
        let world = &mut self.world;
        for name in DESTINATIONS {
            world.set(&format!("destinations.{name}.concurrency"), settings.concurrency);
        }
        world
            .set("destinations.support.rate_per_s", settings.rate_per_s)
            .set("destinations.audit.paused", settings.paused)
            .set("pools.deliveries", settings.deliveries)
            .set("pools.parsers", settings.parsers)
            .set("batch.max_messages", settings.batch);
    }

    fn receiver(&mut self, manner: Manner) {
        let in_flight = DESTINATIONS.len() * usize::try_from(Settings::USUAL.concurrency).expect("few");
        let rate = |percent: u64| (percent as f64 / 100.0).to_string();
        match (std::mem::replace(&mut self.manner, manner), manner) {
            (_, Manner::Hangs) => {
                self.world.unknown += in_flight * ATTEMPTS_OF_A_HANG;
                self.world.receiver().signal(Signal::STOP);
            }
            (Manner::Hangs, Manner::Well) => self.world.receiver().signal(Signal::CONT),
            (_, Manner::Away) => {
                self.world.unknown += in_flight;
                self.world.receiver().kill();
            }
            (_, Manner::Fails(percent)) => {
                self.world.unknown += in_flight;
                self.world.receiver().kill();
                self.world.receive(&["--fail-rate", &rate(percent)]);
            }
            (_, Manner::Well) => {
                self.world.unknown += in_flight;
                self.world.receive(&[]);
            }
        }
    }

    /// Drops a file, now or when there is room again.
    fn drop_file(&mut self, dropping: Dropping) {
        let input = self.input(dropping);
        let inbox = self.world.inbox(dropping.feed);
        let (hidden, path) = (inbox.join(format!(".{}", input.name)), inbox.join(&input.name));
        let is_locked = dropping.sort == Sort::Locked && !self.unlocked.contains(&dropping.number);
        let mode = Permissions::from_mode(if is_locked { 0o000 } else { 0o644 });
        let done = fs::write(&hidden, &input.bytes)
            .and_then(|()| fs::set_permissions(&hidden, mode))
            .and_then(|()| fs::rename(&hidden, path));
        match done {
            Ok(()) => {
                self.dropped.insert(dropping.number, (dropping, input));
            }
            Err(error) if error.kind() == ErrorKind::StorageFull => {
                // Without a name free it was not even made.
                let _ = fs::remove_file(hidden);
                self.undropped.push(dropping);
            }
            Err(error) => panic!("dropping {}: {error}", input.name),
        }
    }

    fn input(&self, dropping: Dropping) -> Input {
        let Dropping { number, rows, sort, .. } = dropping;
        let good = |word: &str| Input::csv(&format!("{word}-{number}.csv"), rows).all(Kind::Sent);
        match sort {
            Sort::Good => good("good"),
            Sort::BadRows => {
                let mut input = good("bad-rows");
                for bad in [",nobody,1.50\n", "user-short\n"] {
                    input.bytes.extend_from_slice(bad.as_bytes());
                    input.rows.push(Row::rejected());
                }
                input
            }
            Sort::Again(of) => match self.dropped.get(&of) {
                Some((_, earlier)) => earlier.clone().named(&format!("again-{number}.csv")),
                // It still waits for room.
                None => good("good"),
            },
            Sort::CutOff => {
                let mut input = good("cut-off").named(&format!("cut-off-{number}.csv.gz")).ending("failed");
                input.bytes = gzip(&input.bytes);
                input.bytes.truncate(input.bytes.len() * 3 / 4);
                input
            }
            Sort::NoColumn => {
                let bytes = format!("id,name\nuser-none-{number},Ann\n");
                Input::of(&format!("no-column-{number}.csv"), bytes, Vec::new()).ending("failed")
            }
            Sort::Locked => good("locked"),
            Sort::Vanishing => good("vanishing"),
            Sort::Lost => good("lost"),
        }
    }

    /// Removes each claimed file that is to be lost.
    fn lose_claimed(&self) {
        for (dropping, input) in self.dropped.values().filter(|(dropping, _)| dropping.sort == Sort::Lost) {
            let claims = self.world.state().join("claimed").join(dropping.feed);
            for claim in fs::read_dir(claims).into_iter().flatten().flatten() {
                // Its owner may be faster.
                let _ = fs::remove_file(claim.path().join(&input.name));
            }
        }
    }

    // --- afterwards

    /// Everything is in its one final state within the time that is allowed, without anybody's help.
    fn settles(mut self) {
        self.use_settings(Settings::USUAL);
        self.world.configure();
        if matches!(self.unit, Unit::Up(..)) {
            self.world.daemon().signal(Signal::HUP);
        }
        assert!(self.undropped.is_empty(), "both disks were freed");
        let faults_end = Instant::now();
        let files: Vec<_> = self.dropped.values().cloned().collect();
        for (dropping, input) in &files {
            if matches!(dropping.sort, Sort::Vanishing | Sort::Lost) {
                continue;
            }
            loop {
                self.supervise();
                if ended_report(&self.world.inbox(dropping.feed), &input.name).is_some() {
                    break;
                }
                let waited = faults_end.elapsed();
                assert!(waited < LIVENESS, "{waited:?} after the last fault {} is not done", input.name);
                thread::sleep(Duration::from_millis(20));
            }
        }
        self.say("all files have their final reports");
        // It may have been killed after the last of them.
        while !matches!(self.unit, Unit::Up(..)) {
            self.supervise();
            assert!(faults_end.elapsed() < LIVENESS, "it does not start again");
            thread::sleep(Duration::from_millis(20));
        }
        let known = self.world.files();
        for (dropping, input) in files {
            self.expect(&known, dropping, input);
        }
        self.world.wait_settled(LIVENESS);
        self.world.stop();
        for feed in FEEDS {
            assert_nothing_stranded(&self.world, feed);
        }
        let summary = self.world.prove();
        println!("{:?}\n{summary}", self.ends);
        assert_eq!(summary["sent"], summary["messages"], "no message was given up: {summary}");
    }

    /// Tells the oracle what must have become of a file.
    fn expect(&mut self, files: &[Value], dropping: Dropping, mut input: Input) {
        let mut known = files.iter().filter(|file| file["name"] == input.name);
        match dropping.sort {
            // Maybe it was gone before anything was noted of it, or noted again when it was.
            Sort::Vanishing | Sort::Lost => {
                for report in known {
                    let mut input = input.clone();
                    if report["state"] == "source-lost" {
                        input = input.ending("source-lost");
                    }
                    let digest = report["sha256"].as_str().expect("every file has one");
                    if sha256_hex(&input.bytes) == digest {
                        input.rows.truncate(rows(report));
                    } else {
                        // Of bytes of its own: the world knows a file by them.
                        input.bytes = digest.into();
                        input = input.unread(digest);
                    }
                    self.world.expect(dropping.feed, input);
                }
                return;
            }
            // What was read before the end was missed.
            Sort::CutOff => input.rows.truncate(rows(known.next().expect("it has a report"))),
            _ => {}
        }
        self.world.expect(dropping.feed, input);
    }
}

fn rows(report: &Value) -> usize {
    usize::try_from(report["rows"].as_u64().expect("reports count")).expect("64 bits")
}

/// The final report of a file that was moved to where it belongs.
fn ended_report(inbox: &Path, name: &str) -> Option<PathBuf> {
    ["done", "failed"].into_iter().find_map(|place| {
        let path = inbox.join(place).join(format!("{name}.report.json"));
        let report: Value = serde_json::from_slice(&fs::read(&path).ok()?).expect("reports are whole");
        (path.with_file_name(name).exists() && is_settled(&report)).then_some(path)
    })
}

#[test]
fn chaos_leaves_every_row_in_its_one_state_and_needs_nobody() {
    let seconds = knob("POSTRIDER_CHAOS_S", 20);
    let seed = knob("POSTRIDER_CHAOS_SEED", u64::from(std::process::id()));
    println!("POSTRIDER_CHAOS_SEED={seed} POSTRIDER_CHAOS_S={seconds}");
    let length = Duration::from_secs(seconds);
    let events = plan(seed, length);
    for (at, event) in &events {
        println!("planned {at:>9.3?} {event:?}");
    }
    let mut chaos = Chaos::begin();
    for (at, event) in events {
        chaos.until(at);
        chaos.happens(event);
    }
    chaos.until(length);
    chaos.settles();
}
