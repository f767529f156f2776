//! A machine with little memory (F8).

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    io::{BufRead as _, BufReader, BufWriter, Write as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use postrider_actors::testing::figure;

use crate::support::{LIVENESS, World, is_settled, knob};

const LIMIT_BYTES: u64 = 256 << 20;

/// A cgroup of one process; removed when dropped, by when the process must be gone.
struct MemoryGroup {
    path: PathBuf,
    /// Where the kernel counts what it killed there.
    events: &'static str,
}

impl MemoryGroup {
    /// Makes one with [`LIMIT_BYTES`]; `None`, with a message, where this process may not.
    fn make() -> Option<Self> {
        let name = format!("postrider-test-{}", std::process::id());
        let (first, second) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
        let made = if first.exists() {
            Self::with(first.join(name), "memory.limit_in_bytes", "memory.oom_control")
        } else {
            Self::with(second.join(name), "memory.max", "memory.events")
        };
        made.inspect_err(|error| eprintln!("no memory cgroup can be made here ({error})")).ok()
    }

    fn with(path: PathBuf, limit: &str, events: &'static str) -> std::io::Result<Self> {
        fs::create_dir(&path)?;
        let group = Self { path, events };
        fs::write(group.path.join(limit), LIMIT_BYTES.to_string())?;
        Ok(group)
    }

    /// How many processes the kernel killed for want of memory.
    fn killed(&self) -> u64 {
        let text = fs::read_to_string(self.path.join(self.events)).expect("it was made");
        let number = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        number.and_then(|number| number.parse().ok()).expect("the kernel counts what it kills")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("{} is left: {error}", self.path.display());
        }
    }
}

/// Drops a file of `rows` rows, written as it is made: 10 million would not fit in this process either.
fn drop_rows(world: &World, name: &str, rows: u64) {
    let staged = world.staging().join("rows");
    let mut file = BufWriter::new(File::create(&staged).expect("the directory is ours"));
    for row in 1..=rows {
        writeln!(file, "user-{row:09}").expect("there is room");
    }
    file.into_inner().map_err(std::io::IntoInnerError::into_error).expect("there is room");
    fs::rename(staged, world.inbox("alerts").join(name)).expect("one file system");
}

/// How many of `rows` were accepted by the receiver, and how many requests there were.
fn count_accepted(world: &World, rows: u64) -> (u64, u64) {
    let mut seen = vec![0_u64; rows as usize / 64 + 1];
    let (mut accepted, mut requests) = (0, 0);
    let log = BufReader::with_capacity(1 << 20, File::open(world.receiver_log()).expect("it was made"));
    for line in log.lines() {
        let line = line.expect("the log reads");
        let entry: BTreeMap<String, serde_json::Value> = serde_json::from_str(&line).expect("whole lines");
        requests += 1;
        if entry["status"] != 200 {
            continue;
        }
        let id = entry["id"].as_str().expect("every entry has an id");
        let row: u64 = id.rsplit('_').next().and_then(|row| row.parse().ok()).expect("msg_FILE_ROW");
        assert!((1..=rows).contains(&row), "{id} is of no row");
        let (word, bit) = (row as usize / 64, 1 << (row % 64));
        accepted += u64::from(seen[word] & bit == 0);
        seen[word] |= bit;
    }
    (accepted, requests)
}

/// 10,000,000 rows: `POSTRIDER_F8_ROWS=10000000`, and `POSTRIDER_F8_BINARY` names a release build.
#[test]
fn f08_a_large_file_is_sent_within_256_mib() {
    let rows = knob("POSTRIDER_F8_ROWS", 100_000);
    // Before the world, and so removed after its daemon is gone.
    let group = MemoryGroup::make();
    let mut world = World::new("text");
    if let Some(binary) = env::var_os("POSTRIDER_F8_BINARY") {
        world.binary(Path::new(&binary));
    }
    world
        .receive(&[])
        .set("log.level", "info")
        .set("destinations.support.concurrency", 64)
        .set("batch.max_messages", 500);
    if let Some(group) = &group {
        let enter = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", group.path.display());
        world.under(&["sh", "-c", &enter, "sh"]);
    } else {
        eprintln!(
            "the limit is one of the daemon's data instead (prlimit --data), where an allocation fails"
        );
        world.under(&["prlimit", &format!("--data={LIMIT_BYTES}")]);
    }
    drop_rows(&world, "large.txt", rows);
    world.start_ready();
    let (pid, began) = (world.daemon().pid(), Instant::now());
    let within = LIVENESS * 2 + Duration::from_secs(rows / 2_000);
    while world.file("large.txt").is_none_or(|file| !is_settled(&file)) {
        assert!(world.daemon().is_running(), "it ended: {:?}", world.daemon().exit_status());
        assert!(began.elapsed() < within, "{rows} rows are not sent after {within:?}");
        thread::sleep(Duration::from_millis(500));
    }
    let took = began.elapsed();
    assert_eq!(world.daemon().pid(), pid);
    let peak = world.daemon().peak_memory_bytes();
    let file = world.file("large.txt").expect("it settled");
    let counts = &file["destinations"]["support"];
    assert_eq!(
        (&file["rows"], &counts["sent"], &counts["dead"], &file["balanced"]),
        (&rows.into(), &rows.into(), &0.into(), &true.into()),
        "{file}"
    );
    world.stop();
    if let Some(group) = &group {
        assert_eq!(group.killed(), 0);
    }
    assert!(peak < LIMIT_BYTES);
    let (accepted, requests) = count_accepted(&world, rows);
    assert_eq!(accepted, rows, "the receiver has each row");
    // On a busy machine an answer may come too late.
    let again = requests - accepted;
    assert!(again <= rows / 10_000, "{again} requests were made again");
    figure(format!(
        "{rows} rows in {} s within {}: not killed, {} MiB resident at the peak, each row sent, {again} requests made again",
        took.as_secs(),
        if group.is_some() {
            "a memory cgroup of 256 MiB"
        } else {
            "256 MiB of data (no cgroup can be made here)"
        },
        peak >> 20,
    ));
}
