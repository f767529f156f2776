//! Real files in real directories.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::{ffi::OsStringExt, fs::PermissionsExt},
    time::Duration,
};

use postrider_actors::model::{
    conditions::Conditions,
    file::{FileRecord, FileState, Reject},
    ids::FileId,
    priority::Priority,
    terms::Terms,
};
use postrider_settings::Keys as _;
use tempfile::TempDir;

use super::*;

struct World {
    feed: TempDir,
    state: TempDir,
    inbox: DirectoryInbox,
}

const NOW: UnixMs = UnixMs(1_700_000_000_000);

fn config(feed: &TempDir, state: &TempDir) -> InboxConfig {
    InboxConfig {
        feed: "alerts".into(),
        settings: Directory { path: feed.path().to_owned(), ..Directory::declared() },
        state_dir: state.path().to_owned(),
        format: Format::Csv { delimiter: b',', recipient: "id".into() },
        max_row: 65536,
        conditions: Conditions::default(),
    }
}

fn prepared(config: InboxConfig) -> io::Result<DirectoryInbox> {
    let inbox = DirectoryInbox::new(config);
    inbox.prepare().map(|()| inbox)
}

impl World {
    fn new() -> Self {
        Self::across(tempfile::tempdir().unwrap())
    }

    /// With the state directory given.
    fn across(state: TempDir) -> Self {
        let feed = tempfile::tempdir().unwrap();
        let inbox = prepared(config(&feed, &state)).unwrap();
        Self { feed, state, inbox }
    }

    /// The inbox as a new process has it.
    fn restart(&mut self) {
        self.inbox = prepared(config(&self.feed, &self.state)).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.feed.path().join(name)
    }

    fn drop_file(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    fn unowned(&self) -> Vec<ClaimedFile> {
        let found = self.inbox.unowned(&|_| false).unwrap();
        assert!(found.troubles.is_empty(), "{:?}", found.troubles);
        found.files
    }

    fn claim(&self, name: &str) -> Result<ClaimedFile, ClaimError> {
        self.inbox.claim(&name.into(), NOW)
    }

    fn refusal(&self, name: &str) -> String {
        match self.claim(name) {
            Err(ClaimError::Refused(why)) => why,
            other => panic!("{name}: {other:?}"),
        }
    }

    fn rows(&self, file: &ClaimedFile) -> String {
        let mut text = String::new();
        self.inbox.open_rows(file).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// The names in a directory of the feed.
    fn names(&self, dir: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.path(dir))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        names
    }

    /// What is left in the state directory.
    fn claims(&self) -> usize {
        fs::read_dir(self.state.path().join("claimed/alerts")).unwrap().count()
    }
}

fn report(name: &str, content: u8, state: FileState) -> FileReport {
    FileReport {
        file: FileRecord {
            id: FileId::derive("alerts", &[content; 32]),
            feed: "alerts".into(),
            name: name.into(),
            bytes: 0,
            sha256: String::new(),
            claimed_at: NOW,
            destinations: vec![],
            terms: Terms::default(),
            priority: Priority::Normal,
        },
        state,
        closed_at: None,
        settled_at: None,
        rows: 1,
        rejected: 0,
        duplicates: 0,
        destinations: BTreeMap::new(),
        held: BTreeMap::new(),
        priorities: BTreeMap::new(),
        failures: BTreeMap::new(),
    }
}

fn read_report(path: PathBuf) -> FileReport {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_file_is_taken_out_of_the_droppers_reach_and_comes_back_finished() {
    let world = World::new();
    world.drop_file("users.csv", "id\n1\n");
    world.drop_file("users.csv.done", "rows=1\n");
    let scan = world.inbox.scan(10).unwrap();
    assert_eq!(scan.candidates.len(), 1);
    assert!(scan.candidates[0].has_sidecar && scan.candidates[0].bytes == 5 && !scan.truncated);

    let file = world.claim("users.csv").unwrap();
    assert_eq!(world.names("."), ["done", "failed"]);
    assert_eq!(file.expected, Some(postrider_actors::ports::Expected { sha256: None, rows: Some(1) }));
    assert_eq!((file.bytes, file.claimed_at, file.display_name().as_str()), (5, NOW, "users.csv"));
    assert_eq!(world.rows(&file), "id\n1\n");
    assert!(world.inbox.is_unchanged(&file).unwrap());
    assert_eq!(world.unowned(), std::slice::from_ref(&file));

    let report = report("users.csv", 1, FileState::Ingested);
    world.inbox.finish(&file, &report).unwrap();
    assert_eq!(world.names("done"), ["users.csv", "users.csv.done", "users.csv.report.json"]);
    assert_eq!(read_report(world.path("done/users.csv.report.json")), report);
    assert_eq!(world.claims(), 0);
    world.inbox.finish(&file, &report).unwrap();
    assert_eq!(world.names("done").len(), 3, "a repetition changes nothing");
    assert!(matches!(world.claim("users.csv"), Err(ClaimError::Gone)));
}

#[test]
fn claims_survive_a_restart_oldest_first() {
    let mut world = World::new();
    for (name, at) in [("b", 3), ("a", 20), ("c", 1)] {
        world.drop_file(name, "id\n");
        world.inbox.claim(&name.into(), UnixMs(at)).unwrap();
    }
    world.restart();
    let files = world.unowned();
    assert_eq!(
        files.iter().map(|file| (file.display_name(), file.claimed_at.0)).collect::<Vec<_>>(),
        [("c".to_owned(), 1), ("b".to_owned(), 3), ("a".to_owned(), 20)]
    );
    assert!(files.iter().all(|file| world.inbox.is_unchanged(file).unwrap()));
}

#[test]
fn f17_a_file_that_changes_after_the_claim_is_noticed_even_across_a_restart() {
    let mut world = World::new();
    world.drop_file("a", "id\n1\n");
    let mut writer = fs::OpenOptions::new().append(true).open(world.path("a")).unwrap();
    let file = world.claim("a").unwrap();
    writer.write_all(b"2\n").unwrap();
    assert!(!world.inbox.is_unchanged(&file).unwrap());
    world.restart();
    let files = world.unowned();
    assert!(!world.inbox.is_unchanged(&files[0]).unwrap());
    assert_eq!(files[0].bytes, 5, "what it was when it was claimed");
}

#[test]
fn f18_f19_a_name_that_is_taken_gets_a_suffix_that_a_repetition_finds() {
    let world = World::new();
    for (content, times) in [(1, 2), (2, 2), (1, 1)] {
        for _ in 0..times {
            world.drop_file("a.csv", [content]);
            let file = world.claim("a.csv").unwrap();
            world.inbox.finish(&file, &report("a.csv", content, FileState::Ingested)).unwrap();
        }
    }
    let other = report("a.csv", 2, FileState::Ingested);
    let second = format!("a.csv.{}", &other.file.id.to_string()[..8]);
    assert_eq!(
        world.names("done"),
        ["a.csv".to_owned(), second.clone(), format!("{second}.report.json"), "a.csv.report.json".to_owned()]
    );
    assert_eq!(fs::read(world.path("done/a.csv")).unwrap(), [1]);
    assert_eq!(read_report(world.path(&format!("done/{second}.report.json"))), other);

    // A file that an operator put there is nobody's.
    fs::write(world.path("done/b"), "mine").unwrap();
    world.drop_file("b", "x");
    let file = world.claim("b").unwrap();
    world.inbox.finish(&file, &report("b", 3, FileState::Ingested)).unwrap();
    assert_eq!(fs::read(world.path("done/b")).unwrap(), b"mine");

    // Nor is the report of another file a file of ours.
    world.drop_file("a.csv.report.json", "{\"id\":1}");
    let file = world.claim("a.csv.report.json").unwrap();
    world.inbox.finish(&file, &report("a.csv.report.json", 4, FileState::Ingested)).unwrap();
    assert_eq!(read_report(world.path("done/a.csv.report.json")).file.name, "a.csv");
}

#[test]
fn reports_are_rewritten_where_they_stand() {
    let world = World::new();
    let mut reports = Vec::new();
    for content in [1, 2] {
        world.drop_file("a", [content]);
        let file = world.claim("a").unwrap();
        reports.push(report("a", content, FileState::Ingested));
        world.inbox.finish(&file, reports.last().unwrap()).unwrap();
    }
    let before = world.names("done");
    for report in &mut reports {
        report.settled_at = Some(UnixMs(5));
    }
    assert!(world.inbox.rewrite_reports(&reports).is_empty());
    let (pages, others): (Vec<_>, Vec<_>) =
        world.names("done").into_iter().partition(|name| name.ends_with(".report.html"));
    assert_eq!((others, pages.len()), (before, 2), "a page for people comes with each: {pages:?}");
    assert_eq!(read_report(world.path("done/a.report.json")), reports[0]);
}

#[test]
fn a_file_that_is_called_like_a_page_is_left_alone() {
    let world = World::new();
    world.drop_file("a.report.html", "id\n");
    let (like, plain) =
        (report("a.report.html", 1, FileState::Ingested), report("a", 2, FileState::Ingested));
    world.inbox.finish(&world.claim("a.report.html").unwrap(), &like).unwrap();
    world.drop_file("a", "id 2\n");
    world.inbox.finish(&world.claim("a").unwrap(), &plain).unwrap();
    let settled = FileReport { settled_at: Some(UnixMs(5)), ..plain };
    assert!(world.inbox.rewrite_reports(&[settled]).is_empty());
    assert_eq!(fs::read_to_string(world.path("done/a.report.html")).unwrap(), "id\n");
}

#[test]
fn f18_a_final_report_stays_final_and_makes_those_of_copies_final() {
    let world = World::new();
    let early = report("a", 1, FileState::Ingested);
    let settled = FileReport { settled_at: Some(UnixMs(5)), ..early.clone() };
    let drop = |name: &str, report: &FileReport| {
        world.drop_file(name, [1]);
        world.inbox.finish(&world.claim(name).unwrap(), report).unwrap();
    };
    let written = |name: &str| read_report(world.path(&format!("done/{name}.report.json")));
    drop("a", &early);
    drop("b", &early);
    drop("c", &early);
    assert_eq!((written("b").file.name.as_str(), written("b").settled_at), ("b", None));
    assert!(world.inbox.rewrite_reports(std::slice::from_ref(&settled)).is_empty());
    // Whoever asked the ledger before the last message settled comes late: the file itself, and a copy.
    drop("a", &early);
    drop("d", &early);
    drop("e", &settled);
    for name in ["a", "b", "c", "d", "e"] {
        let mut expected = settled.clone();
        expected.file.name = name.into();
        assert_eq!(written(name), expected);
    }
    // A redrive opens the file again.
    let redriven = FileReport { settled_at: Some(UnixMs(9)), ..settled };
    assert!(world.inbox.rewrite_reports(&[redriven]).is_empty());
    assert_eq!(written("d").settled_at, Some(UnixMs(9)));
}

#[test]
fn long_and_odd_names_find_a_place() {
    let world = World::new();
    let long = "é".repeat(127);
    let odd = OsString::from_vec(b"a\n\x1b[31m\xff".to_vec());
    for (content, name) in [(1, OsString::from(&long)), (2, OsString::from(&long)), (3, odd)] {
        fs::write(world.feed.path().join(&name), "id\n").unwrap();
        let file = world.inbox.claim(&name, NOW).unwrap();
        assert_eq!(file.name, name);
        let report = report(&file.display_name(), content, FileState::Failed("no".into()));
        let mut sink = world.inbox.rejects(&file, &report).unwrap();
        sink.push(&[]).unwrap();
        sink.finish().unwrap();
        world.inbox.finish(&file, &report).unwrap();
        assert!(world.inbox.rewrite_reports(&[report]).is_empty());
    }
    let names = world.names("failed");
    assert_eq!(names.len(), 9, "{names:?}");
    // F27: the name is what it was, apart from bytes that are not text; printing it is another matter.
    assert!(names.contains(&"a\n\u{1b}[31m\u{fffd}".to_owned()));
    assert_eq!(world.claims(), 0);
}

#[test]
fn f26_links_and_devices_are_refused_and_stay_where_they_are() {
    let world = World::new();
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "1\n").unwrap();
    std::os::unix::fs::symlink(&secret, world.path("symlink")).unwrap();
    fs::hard_link(&secret, world.path("hard")).unwrap_or_else(|_| {
        fs::write(world.path("other"), "1\n").unwrap();
        fs::hard_link(world.path("other"), world.path("hard")).unwrap();
    });
    let feed = fs::File::open(world.feed.path()).unwrap();
    rustix::fs::mknodat(&feed, "fifo", rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    let root = rustix::process::geteuid().is_root();
    if root {
        let null = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(
            &feed,
            "null",
            rustix::fs::FileType::CharacterDevice,
            Mode::from_raw_mode(0o666),
            null,
        )
        .unwrap();
        assert!(world.refusal("null").contains("device"));
    }
    let socket = std::os::unix::net::UnixListener::bind(world.path("socket")).unwrap();
    assert!(world.refusal("symlink").contains("symbolic link"));
    assert!(world.refusal("hard").contains("hard links"));
    assert!(world.refusal("fifo").contains("FIFO"));
    assert!(world.refusal("socket").contains("socket"));
    fs::create_dir(world.path("directory")).unwrap();
    assert!(world.refusal("directory").contains("directory"));
    for name in
        ["done", "failed", "../secret", "/etc/passwd", ".x", "a.part", "a.done", "a.toml", ".", "a\0b"]
    {
        assert!(world.refusal(name).contains("name"), "{name:?}");
    }
    let scan = world.inbox.scan(100).unwrap();
    assert!(scan.candidates.iter().all(|candidate| candidate.name == "other"), "{scan:?}");
    assert_eq!(scan.refused.len(), 4 + usize::from(root) + scan.candidates.len());
    assert!(world.path("fifo").exists() && world.path("hard").exists());
    assert_eq!(world.claims(), 0);
    drop(socket);

    // A sidecar is read by the same rules.
    world.drop_file("a", "id\n");
    std::os::unix::fs::symlink(&secret, world.path("a.done")).unwrap();
    assert!(world.refusal("a").contains("sidecar can't be read: it is a symbolic link"));
}

#[test]
fn f26_a_directory_of_ours_that_became_a_link_is_not_followed() {
    let world = World::new();
    let outside = tempfile::tempdir().unwrap();
    world.drop_file("a", "id\n");
    let file = world.claim("a").unwrap();
    fs::remove_dir(world.path("done")).unwrap();
    std::os::unix::fs::symlink(outside.path(), world.path("done")).unwrap();
    assert!(world.inbox.finish(&file, &report("a", 1, FileState::Ingested)).is_err());
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn f28_a_file_that_can_t_be_read_stays_with_its_dropper() {
    if rustix::process::geteuid().is_root() {
        return; // Root reads everything.
    }
    let world = World::new();
    world.drop_file("a", "id\n");
    fs::set_permissions(world.path("a"), fs::Permissions::from_mode(0o000)).unwrap();
    let before = world.inbox.scan(10).unwrap().candidates[0].clone();
    match world.claim("a") {
        Err(ClaimError::Unreadable(error)) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
        other => panic!("{other:?}"),
    }
    std::thread::sleep(Duration::from_millis(20));
    fs::set_permissions(world.path("a"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_ne!(world.inbox.scan(10).unwrap().candidates[0], before, "a fixed file is a changed one");
    world.claim("a").unwrap();
}

#[test]
fn f28_fixed_permissions_count_as_a_change() {
    let world = World::new();
    world.drop_file("a", "id\n");
    let before = world.inbox.scan(10).unwrap().candidates[0].clone();
    std::thread::sleep(Duration::from_millis(20)); // File times are as coarse as the kernel's tick.
    fs::set_permissions(world.path("a"), fs::Permissions::from_mode(0o400)).unwrap();
    assert!(world.inbox.scan(10).unwrap().candidates[0].modified > before.modified);
}

#[test]
fn a_sidecar_that_is_not_understood_refuses_the_file() {
    let world = World::new();
    world.drop_file("a", "id\n");
    world.drop_file("a.done", "lines=4\n");
    assert!(world.refusal("a").contains("line 1"));
    world.drop_file("a.done", vec![b' '; 5000]);
    assert!(world.refusal("a").contains("4096 bytes"));
    assert_eq!(world.names("."), ["a", "a.done", "done", "failed"]);

    let state = tempfile::tempdir().unwrap();
    let mut strict = config(&world.feed, &state);
    strict.settings.require_done = true;
    let strict = prepared(strict).unwrap();
    fs::remove_file(world.path("a.done")).unwrap();
    assert!(
        matches!(strict.claim(&"a".into(), NOW), Err(ClaimError::Refused(why)) if why.contains("missing"))
    );
}

#[test]
fn what_is_said_of_a_file_s_messages_is_claimed_with_it_and_moved_with_it() {
    let mut world = World::new();
    for name in ["users.csv", "users.csv.gz"] {
        world.drop_file(&format!("{name}.toml"), "expires_after = \"2h\"\n");
        world.drop_file(name, "id\n");
    }
    let mut scanned: Vec<_> =
        world.inbox.scan(10).unwrap().candidates.into_iter().map(|found| found.name).collect();
    scanned.sort_unstable();
    assert_eq!(scanned, ["users.csv", "users.csv.gz"], "a sidecar is no file");
    let file = world.claim("users.csv").unwrap();
    assert_eq!(file.conditions.as_ref().unwrap().expires_after, Some(Duration::from_hours(2)));
    assert!(world.claim("users.csv.gz").unwrap().conditions.is_some());
    assert_eq!(world.names("."), ["done", "failed"]);
    world.restart();
    let files = world.unowned();
    assert_eq!(files[0], file);
    world.inbox.finish(&file, &report("users.csv", 1, FileState::Ingested)).unwrap();
    assert_eq!(world.names("done"), ["users.csv", "users.csv.report.json", "users.csv.toml"]);
    assert_eq!(world.claims(), 1);
    // Without one nothing is said of it.
    world.drop_file("plain.csv", "id\n");
    assert_eq!(world.claim("plain.csv").unwrap().conditions, None);
    assert!(world.refusal("alone.toml").contains("name"));
}

#[test]
fn what_is_wrong_with_a_file_s_terms_holds_it_until_that_is_corrected() {
    let world = World::new();
    world.drop_file("a.csv", "id\n");
    world.drop_file("a.csv.toml", "expires_after = 2\nnot_befor = \"2026-12-01T08:00:00Z\"\n");
    let why = world.refusal("a.csv");
    assert!(why.contains("a.csv.toml:1:1: expires_after: found 2; it has no unit"), "{why}");
    assert!(why.contains("a.csv.toml:2:1: not_befor: unknown key; did you mean `not_before`?"), "{why}");
    assert_eq!(world.names("."), ["a.csv", "a.csv.toml", "done", "failed"]);
    let before = world.inbox.scan(10).unwrap().candidates[0].clone();
    std::thread::sleep(Duration::from_millis(20)); // File times are as coarse as the kernel's tick.
    world.drop_file("a.csv.toml", "expires_after = \"2h\"\n");
    let after = world.inbox.scan(10).unwrap().candidates[0].clone();
    assert!(after.modified > before.modified, "a scan finds that it was corrected");
    assert!(world.claim("a.csv").unwrap().conditions.is_some());
    world.drop_file("b.csv", "id\n");
    world.drop_file("b.csv.toml", vec![b'#'; 20_000]);
    assert!(world.refusal("b.csv").contains("16384 bytes"));
    world.drop_file("b.csv.toml", vec![0xff]);
    assert!(world.refusal("b.csv").contains("UTF-8"));
}

#[test]
fn what_a_crash_leaves_of_a_claim_is_repaired() {
    let mut world = World::new();
    let claimed = world.state.path().join("claimed/alerts");
    // Killed between the directory and the sidecar, the sidecar and the file, the file and the note, and in
    // the middle of a copy.
    fs::create_dir(claimed.join("00000000000001-000000")).unwrap();
    fs::create_dir(claimed.join("00000000000002-000000")).unwrap();
    fs::write(claimed.join("00000000000002-000000/b.done"), "rows=1").unwrap();
    fs::create_dir(claimed.join("00000000000003-000000")).unwrap();
    fs::write(claimed.join("00000000000003-000000/c"), "id\n1\n").unwrap();
    fs::write(claimed.join("00000000000003-000000/c.done"), "rows=1").unwrap();
    fs::create_dir(claimed.join(".copy-00000000000004-000000")).unwrap();
    fs::write(claimed.join(".copy-00000000000004-000000/d"), "id").unwrap();
    world.restart();
    let files = world.unowned();
    assert_eq!(files.len(), 1);
    assert_eq!((files[0].display_name().as_str(), files[0].claimed_at), ("c", UnixMs(3)));
    assert_eq!(files[0].expected.as_ref().and_then(|expected| expected.rows), Some(1));
    assert_eq!(world.names("."), ["b.done", "done", "failed"]);
    assert_eq!(world.unowned(), files);
    assert_eq!(world.claims(), 1);
}

#[test]
fn f32_a_claim_whose_file_vanished_is_still_a_claim() {
    let mut world = World::new();
    world.drop_file("a", "id\n");
    let file = world.claim("a").unwrap();
    fs::remove_file(&file.path).unwrap();
    world.restart();
    assert_eq!(world.unowned(), std::slice::from_ref(&file));
    let kind = |result: io::Result<bool>| result.unwrap_err().kind();
    assert_eq!(kind(world.inbox.is_unchanged(&file)), io::ErrorKind::NotFound);
    assert_eq!(kind(world.inbox.open_raw(&file).map(|_| true)), io::ErrorKind::NotFound);
    let lost = report("a", 1, FileState::SourceLost("gone".into()));
    world.inbox.rejects(&file, &lost).unwrap().finish().unwrap();
    world.inbox.finish(&file, &lost).unwrap();
    assert_eq!(world.names("failed"), ["a.rejects.csv", "a.report.json"]);
    assert_eq!(world.claims(), 0);
}

#[test]
fn rejected_rows_can_be_dropped_again_with_their_header() {
    let world = World::new();
    world.drop_file("a.csv", "id,\"n\n\"\r\n1\r\n=2,\"x\ny\",z\r\n3,ok\r\n");
    let file = world.claim("a.csv").unwrap();
    let report = report("a.csv", 1, FileState::Ingested);
    let mut sink = world.inbox.rejects(&file, &report).unwrap();
    let raw = |row, raw: &str| Reject { row, line: row + 2, reason: "no".into(), raw: raw.into() };
    sink.push(&[raw(1, "1"), raw(2, "=2,\"x")]).unwrap();
    sink.finish().unwrap();
    world.inbox.finish(&file, &report).unwrap();
    let export = "a.csv.rejects.csv";
    assert_eq!(world.names("done"), ["a.csv", export, "a.csv.report.json"]);

    fs::rename(world.path("done").join(export), world.path(export)).unwrap();
    let again = world.claim(export).unwrap();
    assert_eq!(world.rows(&again), "id,\"n\n\"\n1\n=2,\"x\n");
    let mut raw = String::new();
    world.inbox.open_raw(&again).unwrap().read_to_string(&mut raw).unwrap();
    assert!(raw.starts_with("row,line,reason,raw\n0,1,header,"), "the digest is of the file as dropped");
}

#[test]
fn f24_the_header_is_found_in_packed_files_and_none_is_no_error() {
    let world = World::new();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(b"\xef\xbb\xbfid,n").unwrap();
    world.drop_file("a.csv.gz", gz.finish().unwrap());
    world.drop_file("empty.csv", "");
    world.drop_file("other.csv", "x\n1\n");
    let header = |name| world.inbox.header(&world.claim(name).unwrap()).unwrap();
    assert_eq!(header("a.csv.gz").as_deref(), Some(b"id,n".as_slice()));
    assert_eq!(header("empty.csv"), None);
    assert_eq!(header("other.csv"), None, "a file without the recipient's column has no rows to reject");
}

#[test]
fn seen_leaves_nothing_behind() {
    let world = World::new();
    world.drop_file("a", "id\n");
    let file = world.claim("a").unwrap();
    let mut seen = world.inbox.seen(&file).unwrap();
    assert!(seen.insert("x").unwrap() && !seen.insert("x").unwrap());
    assert!(world.inbox.seen(&file).unwrap().insert("x").unwrap(), "each set is its own");
    assert_eq!(fs::read_dir(file.path.parent().unwrap()).unwrap().count(), 2);
}

#[test]
fn f29_a_scan_that_is_cut_short_goes_on() {
    let world = World::new();
    for n in 0..25 {
        world.drop_file(&format!("f{n}"), "");
        world.drop_file(&format!("f{n}.tmp"), "");
    }
    let mut names = Vec::new();
    for truncated in [true, true, false] {
        let scan = world.inbox.scan(10).unwrap();
        assert_eq!(scan.truncated, truncated);
        names.extend(scan.candidates.into_iter().map(|candidate| candidate.name));
    }
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 25, "nothing is left out, nothing starves");
    assert_eq!(world.inbox.scan(100).unwrap().candidates.len(), 25, "then it starts over");
}

#[test]
fn a_directory_that_is_not_there_or_can_t_be_ours_is_an_error_that_names_it() {
    let world = World::new();
    let state = tempfile::tempdir().unwrap();
    let mut missing = config(&world.feed, &state);
    missing.settings.path = world.path("missing");
    let error = prepared(missing).err().unwrap();
    assert!(error.to_string().contains("missing"), "{error}");
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("done"), "").unwrap();
    let error = prepared(config(&other, &state)).err().unwrap();
    assert!(error.to_string().contains("done"), "{error}");
    let named = InboxConfig { feed: "../x".into(), ..config(&world.feed, &state) };
    assert_eq!(prepared(named).err().unwrap().kind(), io::ErrorKind::InvalidInput);
}

/// Two file systems, if this machine has them.
fn other_file_system() -> Option<TempDir> {
    let here = tempfile::tempdir().ok()?;
    let there = tempfile::Builder::new().prefix("postrider-test-").tempdir_in("/dev/shm").ok()?;
    let device = |dir: &TempDir| rustix::fs::stat(dir.path()).map(|stat| stat.st_dev).ok();
    (device(&here) != device(&there)).then_some(there)
}

#[test]
fn a_state_directory_on_another_file_system_is_copied_to() {
    let Some(state) = other_file_system() else { return };
    let mut world = World::across(state);
    world.drop_file("a", "id\n1\n");
    world.drop_file("a.done", "rows=1");
    let file = world.claim("a").unwrap();
    assert_eq!(world.names("."), [".postrider", "done", "failed"]);
    assert_eq!(world.names(".postrider"), Vec::<String>::new());
    assert_eq!(world.rows(&file), "id\n1\n");
    assert!(world.inbox.is_unchanged(&file).unwrap());
    world.restart();
    assert_eq!(world.unowned(), std::slice::from_ref(&file));
    world.inbox.finish(&file, &report("a", 1, FileState::Ingested)).unwrap();
    assert_eq!(world.names("done"), ["a", "a.done", "a.report.json"]);
    assert_eq!(world.claims(), 0);
}

#[test]
fn a_file_without_a_sidecar_is_finished_on_another_file_system() {
    let Some(state) = other_file_system() else { return };
    let world = World::across(state);
    world.drop_file("a", "id\n1\n");
    let file = world.claim("a").unwrap();
    world.inbox.finish(&file, &report("a", 1, FileState::Ingested)).unwrap();
    assert_eq!(world.names("done"), ["a", "a.report.json"]);
    assert_eq!(world.claims(), 0);
}

#[test]
fn what_a_crash_leaves_of_a_copy_is_repaired() {
    let Some(state) = other_file_system() else { return };
    let mut world = World::across(state);
    let staging = world.path(".postrider");
    let claimed = world.state.path().join("claimed/alerts");
    // Killed before, in the middle of, and behind the copy.
    for claim in ["00000000000001-000000", "00000000000002-000000", "00000000000003-000000"] {
        fs::create_dir_all(staging.join(claim)).unwrap();
        fs::write(staging.join(claim).join("a"), claim).unwrap();
    }
    fs::create_dir(claimed.join(".copy-00000000000002-000000")).unwrap();
    fs::write(claimed.join(".copy-00000000000002-000000/a"), "000").unwrap();
    fs::create_dir(claimed.join("00000000000003-000000")).unwrap();
    fs::write(claimed.join("00000000000003-000000/a"), "00000000000003-000000").unwrap();
    world.restart();
    let files = world.unowned();
    let texts: Vec<_> = files.iter().map(|file| world.rows(file)).collect();
    assert_eq!(texts, ["00000000000001-000000", "00000000000002-000000", "00000000000003-000000"]);
    assert_eq!(fs::read_dir(&staging).unwrap().count(), 0);
    assert_eq!(world.claims(), 3);
}

#[test]
fn f26_a_file_that_is_swapped_while_it_is_taken_goes_back() {
    for state in [tempfile::tempdir().ok(), other_file_system()].into_iter().flatten() {
        let mut world = World::across(state);
        world.drop_file("a", "id\n");
        let feed = world.inbox.directory().unwrap();
        let opened = feed.stat("a").unwrap().unwrap();
        // Kept, lest its inode number is given away again.
        fs::rename(world.path("a"), world.path(".a")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", world.path("a")).unwrap();
        let taken = claim::take(&world.inbox, &feed, OsStr::new("a"), &opened, &[], NOW);
        assert!(matches!(taken, Err(ClaimError::Refused(why)) if why.contains("replaced")));
        assert!(fs::symlink_metadata(world.path("a")).unwrap().is_symlink());
        assert_eq!(world.claims(), 0);

        // Killed before the check.
        let claim = "00000000000001-000000";
        for home in [world.path(".postrider"), world.state.path().join("claimed/alerts")] {
            fs::create_dir_all(home.join(claim)).unwrap();
            fs::rename(world.path("a"), home.join(claim).join("a")).unwrap_or_else(|_| {
                fs::remove_file(world.path("a")).unwrap();
                std::os::unix::fs::symlink("/etc/passwd", home.join(claim).join("a")).unwrap();
            });
            world.restart();
            assert_eq!(world.unowned(), []);
            assert!(!home.join(claim).exists());
            if !world.path("a").is_symlink() {
                std::os::unix::fs::symlink("/etc/passwd", world.path("a")).unwrap();
            }
        }
    }
}

async fn next(inbox: &DirectoryInbox) -> io::Result<InboxChange> {
    tokio::time::timeout(Duration::from_secs(10), inbox.changed()).await.expect("a change is seen")
}

#[tokio::test]
async fn complete_files_are_reported_and_a_new_watch_asks_for_a_scan() {
    let world = World::new();
    assert_eq!(next(&world.inbox).await.unwrap(), InboxChange { complete: vec![], rescan: true });
    world.drop_file(".hidden", "");
    world.drop_file("a.tmp", "");
    fs::create_dir(world.path("sub")).unwrap();
    let open = fs::File::create(world.path("open")).unwrap();
    world.drop_file("a", "");
    fs::rename(world.path(".hidden"), world.path("b")).unwrap();
    world.drop_file("b.done", "");
    let mut names = Vec::new();
    while names.len() < 3 {
        names.extend(next(&world.inbox).await.unwrap().complete);
    }
    assert_eq!(names, ["a", "b", "b.done"], "what is still open is not complete");
    drop(open);
    assert_eq!(next(&world.inbox).await.unwrap().complete, ["open"]);
    // Cancelling a wait loses nothing.
    assert!(tokio::time::timeout(Duration::from_millis(20), world.inbox.changed()).await.is_err());
    world.drop_file("c", "");
    assert_eq!(next(&world.inbox).await.unwrap().complete, ["c"]);
}

#[tokio::test]
async fn a_directory_that_goes_away_is_an_error_that_says_so_and_its_return_is_seen() {
    let world = World::new();
    next(&world.inbox).await.unwrap();
    let away = tempfile::tempdir().unwrap();
    fs::rename(world.feed.path(), away.path().join("feed")).unwrap();
    let error = next(&world.inbox).await.unwrap_err();
    assert!(error.to_string().contains("moved away"), "{error}");
    assert!(error.to_string().contains(&*world.feed.path().to_string_lossy()), "{error}");
    assert_eq!(next(&world.inbox).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    fs::rename(away.path().join("feed"), world.feed.path()).unwrap();
    assert!(next(&world.inbox).await.unwrap().rescan);
    fs::remove_dir_all(world.feed.path()).unwrap();
    let error = next(&world.inbox).await.unwrap_err();
    assert!(error.to_string().contains("deleted"), "{error}");
}

#[tokio::test]
async fn f29_an_overflow_of_the_kernels_queue_asks_for_a_scan() {
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events");
    let limit: usize = limit.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(16384);
    if limit > 70_000 {
        return; // It would take too many files.
    }
    let world = World::new();
    next(&world.inbox).await.unwrap();
    // Equal events in a row are merged by the kernel, so two names take turns.
    let names = [world.path("a"), world.path("b")];
    for n in 0..limit + 100 {
        fs::write(&names[n % 2], "").unwrap();
    }
    let mut reported = 0;
    loop {
        let change = next(&world.inbox).await.unwrap();
        reported += change.complete.len();
        if change.rescan {
            break;
        }
    }
    assert!(reported <= limit);
    assert_eq!(world.inbox.scan(10).unwrap().candidates.len(), 2);
}

#[test]
fn f06_a_claim_that_makes_no_sense_holds_up_no_other_and_one_that_is_taken_is_left_alone() {
    let world = World::new();
    for name in ["a", "b", "c"] {
        world.drop_file(name, "id\n");
    }
    let claimed: Vec<_> = ["a", "b", "c"].iter().map(|name| world.claim(name).unwrap()).collect();
    // Another file than its note says, and no note at all.
    fs::rename(&claimed[0].path, claimed[0].directory().join("x")).unwrap();
    fs::remove_file(claimed[1].directory().join(".claim")).unwrap();
    let taken = claimed[2].directory();
    let found = world.inbox.unowned(&|claim| claim == taken).unwrap();
    assert_eq!(found.files.iter().map(ClaimedFile::display_name).collect::<Vec<_>>(), ["b"]);
    assert_eq!(found.directories.len(), 3);
    let [(path, error)] = &found.troubles[..] else { panic!("{:?}", found.troubles) };
    assert_eq!(Path::new(path), claimed[0].directory());
    assert!(error.to_string().contains("holds another file"), "{error}");
    assert!(world.inbox.is_unchanged(&claimed[2]).unwrap());
}

#[test]
fn f06_a_report_that_can_t_be_written_holds_up_no_other() {
    let world = World::new();
    let mut reports = Vec::new();
    for (content, name) in [(1, "a"), (2, "b"), (3, "c")] {
        world.drop_file(name, [content]);
        let file = world.claim(name).unwrap();
        reports.push(report(name, content, FileState::Ingested));
        world.inbox.finish(&file, reports.last().unwrap()).unwrap();
    }
    let id = reports[1].file.id.to_string();
    let in_the_way = world.path(&format!("done/.b.report.json.{}", &id[..8]));
    fs::create_dir_all(in_the_way.join("full")).unwrap();
    for report in &mut reports {
        report.settled_at = Some(UnixMs(5));
    }
    let failed = world.inbox.rewrite_reports(&reports);
    assert_eq!(failed.iter().map(|(file, _)| *file).collect::<Vec<_>>(), [reports[1].file.id]);
    assert_eq!(read_report(world.path("done/a.report.json")), reports[0]);
    assert_eq!(read_report(world.path("done/c.report.json")), reports[2]);
    fs::remove_dir_all(in_the_way).unwrap();
    assert!(world.inbox.rewrite_reports(&reports).is_empty());

    // A directory has the report's own name: the file gets another place.
    fs::create_dir(world.path("done/d.report.json")).unwrap();
    world.drop_file("d", [4]);
    let file = world.claim("d").unwrap();
    let report = report("d", 4, FileState::Ingested);
    world.inbox.finish(&file, &report).unwrap();
    let place = format!("done/d.{}", &report.file.id.to_string()[..8]);
    assert_eq!(fs::read(world.path(&place)).unwrap(), [4]);
    assert_eq!(read_report(world.path(&format!("{place}.report.json"))), report);
}
