//! Torn and reordered writes (F4): a disk is simulated from what the real binary wrote and synced, and cut at any point of
//! it. Of what was written and not synced by then any sectors are there, in any order.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::Path,
    sync::Arc,
    time::Duration,
};

use postrider_actors::{
    model::{file::FileReport, ids::MessageId},
    ports::Ledger as _,
    testing::figure,
};
use postrider_sqlite::{DATABASE, EmbeddedStore};
use rusqlite::Connection;

use crate::{
    crash::Random,
    support::{LIVENESS, World, input::Input, knob, wait_until},
};

const ROWS: usize = 9_000;
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;
/// Outcomes that may be unrecorded, and requests in flight.
const UNRECORDED: usize = 100;
const CONCURRENCY: usize = 16;

/// What happened, in order. Files by their names in the state directory.
enum Event {
    Write {
        file: String,
        at: usize,
        bytes: Vec<u8>,
    },
    Truncate {
        file: String,
        length: usize,
    },
    /// Complete: what was written before is on the disk.
    Sync {
        file: String,
    },
    Create {
        file: String,
    },
    Remove {
        file: String,
    },
    Rename {
        from: String,
        to: String,
    },
    /// What happened to names before is on the disk.
    SyncNames,
    /// A request about this message left the machine: its row was acknowledged.
    Requested(MessageId),
    /// The final report was moved into `done/`: every outcome was acknowledged.
    Reported,
}

/// Bytes as strace prints them with `-xx`: `\x2f\x74`.
fn unhex(text: &str) -> Vec<u8> {
    let digit = |byte: u8| (byte as char).to_digit(16).expect("strace writes hex digits") as u8;
    text.as_bytes().chunks_exact(4).map(|four| digit(four[2]) << 4 | digit(four[3])).collect()
}

fn unhex_text(text: &str) -> String {
    String::from_utf8(unhex(text)).expect("paths here are text")
}

/// Between two characters.
fn between(text: &str, open: char, close: char) -> &str {
    let (_, rest) = text.split_once(open).expect("the call has it");
    rest.split_once(close).expect("the call has it").0
}

/// Reads the calls of one state directory from a log of strace (`-f -y -xx`).
struct Recording<'a> {
    state: &'a str,
    /// Calls that have begun, by thread.
    begun: BTreeMap<String, String>,
    names: BTreeSet<String>,
    events: Vec<Event>,
}

impl<'a> Recording<'a> {
    fn read(log: &Path, state: &'a str) -> Vec<Event> {
        let mut recording =
            Self { state, begun: BTreeMap::new(), names: BTreeSet::new(), events: Vec::new() };
        for line in BufReader::new(File::open(log).expect("strace wrote it")).lines() {
            let line = line.expect("hex is text");
            let (thread, call) = line.split_once(' ').expect("each line has its thread");
            let call = call.trim_start();
            if let Some((begun, _)) = call.split_once(" <unfinished ...>") {
                recording.begin(begun);
                recording.begun.insert(thread.to_owned(), begun.to_owned());
            } else if let Some(rest) = call.strip_prefix("<... ") {
                let begun = recording.begun.remove(thread).expect("it began");
                let (_, end) = rest.split_once(" resumed>").expect("it is resumed");
                recording.end(&format!("{begun}{end}"));
            } else if call.contains(") = ") {
                recording.begin(call);
                recording.end(call);
            }
        }
        // A report is written when the file was read, and again until all is settled.
        let last = recording.events.iter().rposition(|event| matches!(event, Event::Reported));
        let mut number = 0..;
        recording.events.retain(|event| number.next() == last || !matches!(event, Event::Reported));
        recording.events
    }

    /// The file's name, if it is one of the store's. The index of the log is rebuilt at each start.
    fn name(&self, path: &str) -> Option<String> {
        let name = path.strip_prefix(self.state)?.strip_prefix('/')?;
        (name.starts_with(DATABASE) && !name.ends_with("-shm")).then(|| name.to_owned())
    }

    /// Takes what counts from its begin: writes, which may be on the disk before they return, and acknowledgements.
    fn begin(&mut self, call: &str) {
        let (function, arguments) = call.split_once('(').expect("a call");
        match function {
            "pwrite64" => {
                let Some(file) = self.name(&unhex_text(between(arguments, '<', '>'))) else { return };
                let bytes = unhex(between(arguments, '"', '"'));
                let (_, rest) = arguments.rsplit_once("\", ").expect("length and place");
                let mut numbers =
                    rest.split(", ").map(|number| number.trim_end_matches(|c: char| !c.is_ascii_digit()));
                let length: usize = numbers.next().and_then(|n| n.parse().ok()).expect("a length");
                let at = numbers.next().map(|n| n.split(')').next().expect("a number"));
                let at = at.and_then(|at| at.parse().ok()).expect("a place");
                assert_eq!(bytes.len(), length, "strace was given room for it");
                self.events.push(Event::Write { file, at, bytes });
            }
            "ftruncate" => {
                let Some(file) = self.name(&unhex_text(between(arguments, '<', '>'))) else { return };
                let (_, length) = arguments.split_once(", ").expect("a length");
                let digits: String = length.chars().take_while(char::is_ascii_digit).collect();
                self.events.push(Event::Truncate { file, length: digits.parse().expect("a length") });
            }
            "sendto" | "write" | "writev" => {
                // Several requests may be in one call, never a part of a head without its id: the log has whole buffers.
                let bytes = unhex_all(arguments);
                let ids = bytes.split(|&byte| byte == b'\n').filter_map(|line| {
                    let line = std::str::from_utf8(line).ok()?;
                    line.strip_prefix("webhook-id: ").and_then(|id| id.trim_end().parse().ok())
                });
                self.events.extend(ids.map(Event::Requested));
            }
            "rename" | "renameat" | "renameat2" => {
                let mut paths = arguments.split('"').skip(1).step_by(2).map(unhex_text);
                let (from, to) = (paths.next().expect("from"), paths.next().expect("to"));
                if let (Some(from), Some(to)) = (self.name(&from), self.name(&to)) {
                    self.names.insert(to.clone());
                    self.events.push(Event::Rename { from, to });
                } else if to.ends_with(".report.json") {
                    self.events.push(Event::Reported);
                }
            }
            "unlink" => {
                if let Some(file) = self.name(&unhex_text(between(arguments, '"', '"')))
                    && self.names.remove(&file)
                {
                    self.events.push(Event::Remove { file });
                }
            }
            _ => {}
        }
    }

    /// Takes what counts once it has returned: syncs, and files that were made.
    fn end(&mut self, call: &str) {
        let (function, arguments) = call.split_once('(').expect("a call");
        match function {
            "fsync" | "fdatasync" => {
                let path = unhex_text(between(arguments, '<', '>'));
                assert!(arguments.ends_with("= 0"), "{call}");
                if path == self.state {
                    self.events.push(Event::SyncNames);
                } else if let Some(file) = self.name(&path) {
                    self.events.push(Event::Sync { file });
                }
            }
            "openat" if arguments.contains("O_CREAT") && !arguments.contains("= -1") => {
                if let Some(file) = self.name(&unhex_text(between(arguments, '"', '"')))
                    && self.names.insert(file.clone())
                {
                    self.events.push(Event::Create { file });
                }
            }
            _ => {}
        }
    }
}

/// All bytes between quotes.
fn unhex_all(arguments: &str) -> Vec<u8> {
    arguments.split('"').skip(1).step_by(2).flat_map(unhex).collect()
}

/// What a write or a truncation that is not synced changes.
#[derive(Clone)]
enum Change {
    Write { at: usize, bytes: Vec<u8> },
    Truncate { length: usize },
}

/// A file: what is on the disk for certain, and what may be.
#[derive(Clone, Default)]
struct Content {
    synced: Vec<u8>,
    pending: Vec<Change>,
}

fn write(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if content.len() < at + bytes.len() {
        content.resize(at + bytes.len(), 0);
    }
    content[at..at + bytes.len()].copy_from_slice(bytes);
}

impl Content {
    fn sync(&mut self) {
        for change in self.pending.drain(..) {
            match change {
                Change::Write { at, bytes } => write(&mut self.synced, at, &bytes),
                Change::Truncate { length } => self.synced.resize(length, 0),
            }
        }
    }

    /// What a power cut leaves: of each write all, nothing or some sectors. Writes between two truncations come in any order.
    fn cut(&self, random: &mut Random) -> Vec<u8> {
        let mut content = self.synced.clone();
        // A disk that wrote nearly all, one that wrote nearly nothing, and those between.
        let kept_of_8 = random.below(9);
        for run in self.pending.split_inclusive(|change| matches!(change, Change::Truncate { .. })) {
            let mut order: Vec<_> = run.iter().collect();
            let writes = order.iter().filter(|change| matches!(change, Change::Write { .. })).count();
            for last in (1..writes).rev() {
                order.swap(last, random.below(last as u64 + 1) as usize);
            }
            for change in order {
                match change {
                    Change::Truncate { length } if random.below(2) == 0 => content.resize(*length, 0),
                    Change::Write { at, bytes } if random.below(8) < kept_of_8 => {
                        write(&mut content, *at, bytes);
                    }
                    Change::Write { at, bytes } if random.below(2) == 0 => {
                        let mut done = 0;
                        while done < bytes.len() {
                            let end = bytes.len().min((at + done) / SECTOR * SECTOR + SECTOR - at);
                            if random.below(2) == 0 {
                                write(&mut content, at + done, &bytes[done..end]);
                            }
                            done = end;
                        }
                    }
                    _ => {}
                }
            }
        }
        content
    }
}

/// What happens to names, in the order of the file system's journal.
#[derive(Clone)]
enum Naming {
    Create { file: String, content: usize },
    Remove { file: String },
    Rename { from: String, to: String },
}

fn name_in(names: &mut BTreeMap<String, usize>, naming: &Naming) {
    match naming {
        Naming::Create { file, content } => drop(names.insert(file.clone(), *content)),
        Naming::Remove { file } => drop(names.remove(file)),
        Naming::Rename { from, to } => {
            let content = names.remove(from).expect("it was there");
            names.insert(to.clone(), content);
        }
    }
}

/// The state directory's disk.
#[derive(Default)]
struct Disk {
    contents: Vec<Content>,
    /// As a process sees them.
    names: BTreeMap<String, usize>,
    synced_names: BTreeMap<String, usize>,
    pending_names: Vec<Naming>,
    /// It claims to have synced, and has not.
    lies: bool,
}

impl Disk {
    fn content(&mut self, file: &str) -> &mut Content {
        let content = self.names[file];
        &mut self.contents[content]
    }

    fn name(&mut self, naming: Naming) {
        name_in(&mut self.names, &naming);
        self.pending_names.push(naming);
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::Write { file, at, bytes } => {
                self.content(file).pending.push(Change::Write { at: *at, bytes: bytes.clone() });
            }
            Event::Truncate { file, length } => {
                self.content(file).pending.push(Change::Truncate { length: *length });
            }
            Event::Sync { file } if !self.lies => self.content(file).sync(),
            Event::SyncNames if !self.lies => {
                for naming in self.pending_names.drain(..) {
                    name_in(&mut self.synced_names, &naming);
                }
            }
            Event::Create { file } => {
                self.contents.push(Content::default());
                self.name(Naming::Create { file: file.clone(), content: self.contents.len() - 1 });
            }
            Event::Remove { file } => self.name(Naming::Remove { file: file.clone() }),
            Event::Rename { from, to } => self.name(Naming::Rename { from: from.clone(), to: to.clone() }),
            Event::Sync { .. } | Event::SyncNames | Event::Requested(_) | Event::Reported => {}
        }
    }

    /// Writes what a power cut leaves into a directory.
    fn cut(&self, random: &mut Random, into: &Path) {
        let mut names = self.synced_names.clone();
        let kept = random.below(self.pending_names.len() as u64 + 1) as usize;
        for naming in &self.pending_names[..kept] {
            name_in(&mut names, naming);
        }
        for (name, content) in names {
            fs::write(into.join(name), self.contents[content].cut(random)).expect("there is room");
        }
    }
}

/// What was acknowledged up to a point.
#[derive(Clone, Default)]
struct Acknowledged {
    /// The rows that were requested.
    rows: BTreeSet<u64>,
    /// Whether the file was reported as finished.
    reported: bool,
}

/// What is lost of it, if anything is, in the store that a power cut left.
async fn lost(directory: &Path, acknowledged: &Acknowledged) -> Result<(), String> {
    let store = EmbeddedStore::open(directory, Arc::new(|error: &str| panic!("fatal: {error}")))
        .map_err(|error| format!("it is not opened: {error}"))?;
    let files = store.latest_files(10).await.map_err(|error| format!("it can't be read: {error}"))?;
    let report = files.into_iter().next();
    drop(store);
    let sound: String = Connection::open(directory.join(DATABASE))
        .and_then(|store| store.query_row("PRAGMA integrity_check", [], |row| row.get(0)))
        .map_err(|error| format!("it can't be checked: {error}"))?;
    if sound != "ok" {
        return Err(format!("integrity_check: {sound}"));
    }
    judge(report.as_ref(), acknowledged)
}

fn judge(report: Option<&FileReport>, acknowledged: &Acknowledged) -> Result<(), String> {
    let Some(&last) = acknowledged.rows.last() else { return Ok(()) };
    let report = report.ok_or_else(|| format!("row {last} was requested, and the file is not known"))?;
    if !report.is_balanced() {
        return Err("it does not balance".into());
    }
    if report.rows < last {
        return Err(format!("row {last} was requested, and rows are known up to {}", report.rows));
    }
    let counts = report.destinations["support"];
    let recorded = (counts.sent + counts.dead + counts.retrying) as usize;
    if recorded + UNRECORDED + CONCURRENCY < acknowledged.rows.len() {
        return Err(format!("{} rows were requested, {recorded} are recorded", acknowledged.rows.len()));
    }
    if acknowledged.reported && !report.is_settled() {
        return Err("it was reported as finished, and is not".into());
    }
    Ok(())
}

/// Runs the daemon through one file and returns what it did to its disk.
fn record() -> Vec<Event> {
    let mut world = World::new("csv");
    world.receive(&["--fail-rate", "0.1"]);
    world
        .set("record.max_unrecorded", i64::try_from(UNRECORDED).expect("it is small"))
        .set("destinations.support.concurrency", i64::try_from(CONCURRENCY).expect("it is small"))
        .drop_file(Input::csv("torn.csv", ROWS));
    let log = world.path("strace");
    let log_text = log.display().to_string();
    let calls = "trace=openat,pwrite64,fsync,fdatasync,ftruncate,unlink,rename,renameat,renameat2,sendto,write,writev";
    world.under(&["strace", "-D", "-f", "-y", "-xx", "-s", "1048576", "-o", &log_text, "-e", calls]);
    world.start().wait_settled(LIVENESS * 2);
    let report = world.inbox("alerts").join("done/torn.csv.report.json");
    wait_until(LIVENESS, "the final report", || {
        let report = fs::read(&report).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        report.as_ref().is_some_and(crate::support::is_settled)
    });
    // As the power goes: nothing is closed in order.
    world.kill();
    std::thread::sleep(Duration::from_millis(500));
    let state = fs::canonicalize(world.state()).expect("it is there").display().to_string();
    Recording::read(&log, &state)
}

/// Cuts the power at `cuts` points of a recording; what was lost at each where something was.
async fn cut(events: &[Event], seed: u64, cuts: u64, lies: bool) -> Vec<String> {
    let mut random = Random(seed);
    let mut points: Vec<_> = (0..cuts).map(|_| random.below(events.len() as u64 + 1) as usize).collect();
    points.sort_unstable();
    let (mut disk, mut acknowledged) = (Disk { lies, ..Disk::default() }, Acknowledged::default());
    let (mut done, mut losses) = (0, Vec::new());
    for (number, &point) in points.iter().enumerate() {
        for event in &events[done..point] {
            disk.apply(event);
            match event {
                Event::Requested(id) => drop(acknowledged.rows.insert(id.row)),
                Event::Reported => acknowledged.reported = true,
                _ => {}
            }
        }
        done = point;
        let directory = tempfile::tempdir_in("/dev/shm").expect("there is room");
        let own_seed = seed ^ (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        disk.cut(&mut Random(own_seed), directory.path());
        if let Err(loss) = lost(directory.path(), &acknowledged).await {
            losses.push(format!("after {point} of {} events: {loss}", events.len()));
        }
    }
    losses
}

#[tokio::test]
async fn f04_torn_and_reordered_writes_lose_nothing_that_was_acknowledged() {
    let cuts = knob("POSTRIDER_F4_SEEDS", 1_000);
    let seed = knob("POSTRIDER_SEED", u64::from(std::process::id()));
    println!("POSTRIDER_SEED={seed} POSTRIDER_F4_SEEDS={cuts}");
    let events = record();
    let count = |is: fn(&Event) -> bool| events.iter().filter(|event| is(event)).count();
    let (writes, syncs) = (
        count(|event| matches!(event, Event::Write { .. })),
        count(|event| matches!(event, Event::Sync { .. } | Event::SyncNames)),
    );
    let restarts = count(|event| matches!(event, Event::Write { file, at: 0, .. } if file.ends_with("-wal")));
    assert!(
        count(|event| matches!(event, Event::Requested(_))) >= ROWS
            && count(|event| matches!(event, Event::Reported)) > 0
    );
    assert!(restarts > 1, "the log was moved into the database and begun again");
    // The same judge on a disk that keeps no promise: it has to find losses, or it would find none at all.
    let unkept = cut(&events, seed, 100, true).await;
    assert!(!unkept.is_empty(), "without syncs acknowledged rows are lost");
    let losses = cut(&events, seed, cuts, false).await;
    assert!(
        losses.is_empty(),
        "{} of {cuts} cuts lost something: {:#?}",
        losses.len(),
        &losses[..losses.len().min(5)]
    );
    figure(format!(
        "{cuts} power cuts in a run of {ROWS} rows ({writes} writes, {syncs} syncs, the log begun {restarts} times): 0 lost; with \
         syncs left out {} of 100 lost something",
        unkept.len()
    ));
}
