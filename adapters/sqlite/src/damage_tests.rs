//! F15: whatever of the database or its log is damaged, it is noticed or it changes nothing; nothing is made anew.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    os::unix::fs::FileExt as _,
    sync::{Arc, Mutex},
};

use postrider_actors::{
    model::{
        file::FileReport,
        outcome::{DeathCause, Verdict},
        time::{MonoMs, UnixMs},
    },
    ports::{LeaseRequest, Ledger as _, Outbox as _, Queue as _, Settlement, Want},
    testing::{figure, fixtures},
};
use rusqlite::Connection;
use tempfile::TempDir;

use super::{open::Access, *};

const NOW: UnixMs = UnixMs(1_000_000);
const LOG: &str = "postrider.db-wal";

/// What a store says of itself: every file's counts, and the batches that can be sent.
#[derive(Clone, PartialEq, Debug)]
struct Facts {
    files: Vec<FileReport>,
    open: u64,
    leased: BTreeMap<String, Lease>,
    quarantined: usize,
}

/// What comes of opening a store and reading all of it.
#[derive(Debug)]
enum Seen {
    /// It is not opened; the daemon ends with an exit code of its own.
    Refused(OpenError),
    /// It is opened, and a call meets the damage.
    Stopped,
    Read(Facts),
}

async fn look(dir: &Path) -> Seen {
    let fatal = Arc::new(Mutex::new(Vec::new()));
    let log = fatal.clone();
    let on_fatal: OnFatal = Arc::new(move |error: &str| log.lock().unwrap().push(error.to_owned()));
    let store = match EmbeddedStore::open(dir, on_fatal) {
        Ok(store) => store,
        Err(error) => return Seen::Refused(error),
    };
    let read = read(&store).await;
    drop(store);
    match read {
        Ok(facts) if fatal.lock().unwrap().is_empty() => Seen::Read(facts),
        _ => Seen::Stopped,
    }
}

async fn read(store: &EmbeddedStore) -> Result<Facts, StoreError> {
    let files = store.latest_files(1_000).await?;
    for report in &files {
        store.rejects(report.file.id, 0, 1_000).await?;
    }
    let mut leased = BTreeMap::new();
    loop {
        let leases = store.lease(request(&["d", "e"])).await?;
        if leases.is_empty() {
            break;
        }
        leased.extend(leases.into_iter().map(|lease| (format!("{:?}", lease.token.batch), lease)));
    }
    let quarantined = store.backlog(NOW).await?.quarantined as usize;
    Ok(Facts { files, open: store.depth().await?, leased, quarantined })
}

fn request(destinations: &[&str]) -> LeaseRequest {
    let want = |name: &&str| Want::new(*name, usize::MAX, 1_000);
    LeaseRequest {
        holder: "w".into(),
        wants: destinations.iter().map(want).collect(),
        until: MonoMs(9_999),
        now: NOW,
        born: UnixMs(0),
    }
}

/// A store of `files` files, each appended in a commit of its own, the last with a payload of several pages; of some
/// messages the outcome is recorded.
async fn fill(dir: &Path, files: u8) -> EmbeddedStore {
    let store = EmbeddedStore::open(dir, Arc::new(|error| panic!("fatal: {error}"))).unwrap();
    for content in 1..=files {
        let rows = if content == files { 4_000 } else { 150 };
        let file = fixtures::file("f", content, &["d", "e"]);
        store.append(fixtures::step_without(&file, 1..=rows, &[3], &[4], NOW)).await.unwrap();
        if content % 3 == 0 {
            for lease in store.lease(request(&["d"])).await.unwrap() {
                let attempt = fixtures::failed(NOW);
                let verdicts = vec![
                    lease.open[0].verdict(Verdict::Dead { attempt, cause: DeathCause::Permanent }),
                    lease.open[1].verdict(Verdict::Retry { attempt, not_before: NOW }),
                    lease.open[2].verdict(Verdict::Sent { at: NOW, status: 200 }),
                ];
                let settlement = Settlement {
                    token: lease.token,
                    verdicts,
                    details: BTreeMap::new(),
                    records: Vec::new(),
                    ends: true,
                    begins: None,
                };
                store.settle(vec![settlement]).await.unwrap();
            }
        }
    }
    store
}

/// A copy of a store's files, as a power cut leaves them.
fn copy(from: &Path) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in [DATABASE, LOG] {
        match fs::copy(from.join(name), dir.path().join(name)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            done => drop(done.unwrap()),
        }
    }
    dir
}

fn page_bytes(dir: &Path) -> usize {
    let bytes: i64 = Connection::open(dir.join(DATABASE))
        .unwrap()
        .pragma_query_value(None, "page_size", |row| row.get(0))
        .unwrap();
    usize::try_from(bytes).unwrap()
}

fn write(dir: &Path, name: &str, at: usize, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(dir.join(name)).unwrap();
    file.write_all_at(bytes, at as u64).unwrap();
}

/// Opens a damaged store for the daemon: refused, and left as it was.
#[track_caller]
fn assert_refused(dir: &Path, what: &str) {
    let before: Vec<_> = [DATABASE, LOG].map(|name| fs::read(dir.join(name)).ok()).into();
    let error = EmbeddedStore::open(dir, exit_on_fatal(|| {})).err();
    let error = error.unwrap_or_else(|| panic!("{what}: it was opened"));
    // Of less than a page SQLite says that it is empty, and so not ours.
    assert!(
        matches!(error, OpenError::Corrupt { .. } | OpenError::Foreign { found: 0, .. }),
        "{what}: {error}"
    );
    assert!(error.to_string().contains("left untouched"), "{what}: {error}");
    let after: Vec<_> = [DATABASE, LOG].map(|name| fs::read(dir.join(name)).ok()).into();
    assert!(before == after, "{what}: it was changed");
}

#[tokio::test]
async fn f15_a_damaged_page_is_noticed_or_changes_nothing() {
    let whole = tempfile::tempdir().unwrap();
    drop(fill(whole.path(), 9).await);
    let Seen::Read(facts) = look(copy(whole.path()).path()).await else { panic!("it is whole") };
    assert_eq!(facts.files.len(), 9);
    let page = page_bytes(whole.path());
    let database = fs::read(whole.path().join(DATABASE)).unwrap();
    let pages = database.len() / page;
    let (mut refused, mut stopped, mut named, mut unused) = (0, 0, 0, 0);
    for number in 0..pages {
        let old = &database[number * page..][..page];
        let inverted: Vec<_> = old.iter().map(|byte| !byte).collect();
        for (how, new) in [("zeros", vec![0; page]), ("noise", vec![0xA5; page]), ("inverted", inverted)] {
            let what = format!("page {} of {pages}, {how}", number + 1);
            let damaged = copy(whole.path());
            write(damaged.path(), DATABASE, number * page, &new);
            match look(damaged.path()).await {
                Seen::Refused(OpenError::Corrupt { .. }) => refused += 1,
                Seen::Refused(other) => panic!("{what}: {other}"),
                Seen::Stopped => stopped += 1,
                Seen::Read(seen) if seen == facts => unused += 1,
                Seen::Read(seen) => {
                    // What can't be sent is set aside and counted, and nothing else differs.
                    assert_eq!(seen.leased.len() + seen.quarantined, facts.leased.len(), "{what}");
                    assert!(seen.leased.iter().all(|(id, lease)| facts.leased[id] == *lease), "{what}");
                    assert_eq!((&seen.files, seen.open), (&facts.files, facts.open), "{what}");
                    named += 1;
                }
            }
            let after = fs::metadata(damaged.path().join(DATABASE)).unwrap().len();
            assert!(after >= database.len() as u64, "{what}: it was made anew");
        }
    }
    assert!(refused >= 3 && stopped >= 30 && named > 0, "{refused} {stopped} {named} {unused} of {pages}");
    figure(format!(
        "{pages} pages, each damaged in 3 ways: {refused} times refused at the start, {stopped} times met at work, \
         {named} times a batch set aside, {unused} times not met (a table that is empty or not read); never other facts"
    ));
}

#[tokio::test]
async fn f15_a_header_that_is_wrong_and_a_file_that_is_too_short_are_refused() {
    let whole = tempfile::tempdir().unwrap();
    drop(fill(whole.path(), 4).await);
    let page = page_bytes(whole.path());
    let length = fs::metadata(whole.path().join(DATABASE)).unwrap().len() as usize;
    // The magic string, and what the size of a page may not be.
    for (at, bytes) in [(0, b"not a database at all".as_slice()), (15, b"!"), (16, &[0, 3]), (20, &[255])] {
        let damaged = copy(whole.path());
        write(damaged.path(), DATABASE, at, bytes);
        assert_refused(damaged.path(), &format!("byte {at} of the header"));
    }
    let lengths: Vec<_> =
        [0, 1, 99, 100, page - 1].into_iter().chain((1..length / page).map(|pages| pages * page)).collect();
    for &length in &lengths {
        let damaged = copy(whole.path());
        OpenOptions::new()
            .write(true)
            .open(damaged.path().join(DATABASE))
            .and_then(|file| file.set_len(length as u64))
            .unwrap();
        assert_refused(damaged.path(), &format!("{length} bytes"));
    }
    figure(format!(
        "4 wrong headers, {} lengths that are too short: all refused, none changed",
        lengths.len()
    ));
}

#[tokio::test]
async fn f15_a_log_with_a_damaged_header_or_without_its_database_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = fill(dir.path(), 4).await;
    let whole = copy(dir.path());
    drop(store);
    let Seen::Read(facts) = look(copy(whole.path()).path()).await else { panic!("it is whole") };
    assert_eq!(facts.files.len(), 4, "the log is recovered");
    let header = fs::read(whole.path().join(LOG)).unwrap()[..32].to_vec();
    for (at, byte) in header.iter().enumerate() {
        let damaged = copy(whole.path());
        write(damaged.path(), LOG, at, &[byte ^ 1]);
        assert_refused(damaged.path(), &format!("byte {at} of the log's header"));
    }
    let damaged = copy(whole.path());
    write(damaged.path(), LOG, 0, &[0; 32]);
    assert_refused(damaged.path(), "a header of zeros before frames");
    let damaged = copy(whole.path());
    fs::write(damaged.path().join(DATABASE), []).unwrap();
    assert_refused(damaged.path(), "an empty database beside its log");
    let damaged = copy(whole.path());
    fs::remove_file(damaged.path().join(DATABASE)).unwrap();
    assert_refused(damaged.path(), "a log without its database");
    figure(
        "each of the 32 bytes of the log's header flipped, zeros, and a log without its database: all refused",
    );
}

#[tokio::test]
async fn f15_a_log_with_a_damaged_frame_is_read_up_to_it_and_the_lost_commits_are_reported() {
    const FILES: u8 = 6;
    let dir = tempfile::tempdir().unwrap();
    let mut commits = Vec::new();
    let store = EmbeddedStore::open(dir.path(), Arc::new(|error| panic!("fatal: {error}"))).unwrap();
    let log = dir.path().join(LOG);
    for content in 1..=FILES {
        let file = fixtures::file("f", content, &["d"]);
        store.append(fixtures::step(&file, 1..=150, NOW)).await.unwrap();
        commits.push(fs::metadata(&log).unwrap().len() as usize);
    }
    let whole = copy(dir.path());
    drop(store);
    let frame = 24 + page_bytes(whole.path());
    let bytes = fs::read(whole.path().join(LOG)).unwrap();
    let frames = (commits.last().unwrap() - 32) / frame;
    // The last frame of a commit has the size of the database in it.
    let ends: Vec<_> = (0..frames).filter(|number| bytes[32 + number * frame + 4..][..4] != [0; 4]).collect();
    assert!(ends.len() >= FILES as usize && frames > ends.len() * 2, "{frames} frames, {ends:?}");
    for number in 0..frames {
        let at = 32 + number * frame;
        let kept = commits.iter().filter(|&&end| end <= at).count();
        // Of the frame's head: the page's number, the size, a salt, the checksum; then its page, and all of it.
        let places = [(0, 4), (5, 1), (9, 1), (17, 1), (24 + number % 4_000, 1), (0, frame)];
        for (offset, length) in places {
            let what = format!("frame {number} of {frames}, byte {offset}");
            let damaged = copy(whole.path());
            let old = fs::read(damaged.path().join(LOG)).unwrap();
            let new: Vec<_> = old[at + offset..][..length].iter().map(|byte| !byte).collect();
            write(damaged.path(), LOG, at + offset, &new);
            {
                let connection = open::open(damaged.path(), Access::Own).unwrap();
                let lost = open::lost_commits(&connection, &damaged.path().join(DATABASE)).unwrap().commits;
                let gone = ends.iter().filter(|&&end| end >= number).count() as u64;
                // The damaged frame itself may not look like the end of a commit any more, or may by chance.
                assert!(lost.abs_diff(gone) <= 1, "{what}: {lost} of {gone} commits reported");
                assert!(lost > 0 || gone == 1, "{what}");
            }
            let Seen::Read(facts) = look(damaged.path()).await else { panic!("{what}: the rest is whole") };
            assert_eq!(facts.files.len(), kept, "{what}: a commit is there or not");
            assert!(facts.files.iter().all(FileReport::is_balanced), "{what}");
        }
    }
    figure(format!(
        "{frames} frames of the log, each damaged in 6 ways: read up to the damage, the lost commits reported; damage in \
         the last commit alone looks like a power cut before its sync"
    ));
}

#[tokio::test]
async fn f15_damage_met_at_work_is_fatal_and_nothing_is_acknowledged_after_it() {
    let dir = tempfile::tempdir().unwrap();
    drop(EmbeddedStore::open(dir.path(), exit_on_fatal(|| {})).unwrap());
    // Neither the header nor the schema: found only when it is used.
    let root: i64 = Connection::open(dir.path().join(DATABASE))
        .unwrap()
        .query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'files'", [], |row| row.get(0))
        .unwrap();
    let page = page_bytes(dir.path());
    write(dir.path(), DATABASE, (usize::try_from(root).unwrap() - 1) * page, &vec![0xA5; page]);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let on_fatal: OnFatal = Arc::new(move |error: &str| log.lock().unwrap().push(error.to_owned()));
    let store = EmbeddedStore::open(dir.path(), on_fatal).unwrap();
    let step = fixtures::step(&fixtures::file("f", 1, &["d"]), 1..=10, NOW);
    assert!(matches!(store.append(step.clone()).await, Err(StoreError::Unknown(_))));
    assert!(store.append(step).await.is_err());
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 1);
    assert!(seen[0].contains("malformed"), "{seen:?}");
}
