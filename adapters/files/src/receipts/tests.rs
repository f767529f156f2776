//! Real files in real directories, and crashes between any two steps.

mod slow;

use std::{collections::BTreeSet, fs, io::Write, path::Path};

use postrider_actors::{
    model::{
        conditions::Conditions,
        formats::Format,
        receipt::{Receipt, ReceiptKey},
        receipt_format::{FieldPath, ReceiptFileFormat, ReceiptMapping, StatusMeaning, UnknownStatus},
        time::UnixMs,
    },
    ports::{Arrival, ReceiptLedger},
    testing::{FakeClock, MemoryReceipts},
};
use postrider_settings::{Directory, Keys as _};
use tempfile::TempDir;

use super::*;
use crate::inbox::{DirectoryInbox, InboxConfig};

fn format() -> ReceiptFormat {
    let path = |text: &str| FieldPath::parse(text).unwrap();
    let mapping = ReceiptMapping {
        message_id: None,
        provider_id: Some(path("id")),
        event_id: None,
        status: path("status"),
        time: None,
        carrier: None,
        response: None,
        sent_at: None,
        price: None,
        statuses: [("ok".to_owned(), StatusMeaning::Delivered), ("seen".to_owned(), StatusMeaning::Ignored)]
            .into(),
        otherwise: UnknownStatus::Reject,
    };
    ReceiptFormat::new("sms".into(), mapping).unwrap()
}

struct World {
    dropped: TempDir,
    state: TempDir,
    kind: ReceiptFileFormat,
    sidecar_required: bool,
    ledger: MemoryReceipts,
}

impl World {
    fn new(kind: ReceiptFileFormat) -> Self {
        Self {
            dropped: tempfile::tempdir().unwrap(),
            state: tempfile::tempdir().unwrap(),
            kind,
            sidecar_required: false,
            ledger: MemoryReceipts::new(),
        }
    }

    fn directory(&self) -> Directory {
        Directory {
            path: self.dropped.path().to_owned(),
            stable_after: Duration::ZERO,
            rescan: Duration::ZERO,
            require_done: self.sidecar_required,
            ..Directory::declared()
        }
    }

    fn inbox(&self) -> DirectoryInbox {
        let format_of_rows = match self.kind {
            ReceiptFileFormat::Ndjson => Format::Ndjson { recipient: "status".into() },
            ReceiptFileFormat::Csv { delimiter } => Format::Csv { delimiter, recipient: "status".into() },
        };
        let inbox = DirectoryInbox::new(InboxConfig {
            feed: "sms".into(),
            settings: self.directory(),
            state_dir: self.state.path().to_owned(),
            format: format_of_rows,
            max_row: 1_000,
            conditions: Conditions::default(),
        });
        inbox.prepare().unwrap();
        inbox
    }

    /// The source as a new process has it.
    fn source(&self) -> DirReceipts {
        self.source_over(Arc::new(self.inbox()), Duration::from_secs(30))
    }

    fn source_over(&self, inbox: Arc<dyn Inbox>, look_max: Duration) -> DirReceipts {
        let settings = DirReceiptsSettings {
            destination: "d".into(),
            kind: self.kind,
            line_bytes_max: 1_000,
            receipts_max: 10,
            directory: self.directory(),
            look_max,
        };
        DirReceipts::new(inbox, format(), settings, Arc::new(FakeClock::at(UnixMs(1_700_000_000_000))))
    }

    fn put(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let hidden = self.dropped.path().join(format!(".{name}"));
        fs::write(&hidden, bytes).unwrap();
        fs::rename(hidden, self.dropped.path().join(name)).unwrap();
    }

    async fn take(&self, polled: &Polled) {
        let arrival = Arrival {
            source: "sms".into(),
            destination: "d".into(),
            receipts: polled.receipts.clone(),
            rejects: polled.rejects.clone(),
            cursor: polled.cursor.clone(),
            at: UnixMs(1),
        };
        self.ledger.take(arrival).await.unwrap();
    }

    async fn cursor(&self) -> Option<SourceCursor> {
        self.ledger.cursor("sms").await.unwrap()
    }

    /// Looks until nothing comes any more; what came.
    async fn drain(&self, source: &DirReceipts) -> Polled {
        let mut all = Polled::default();
        loop {
            let cursor = self.cursor().await;
            let polled = source.poll(cursor.as_ref(), Duration::from_millis(50)).await.unwrap();
            if polled.cursor.is_none() {
                return all;
            }
            assert!(polled.receipts.len() <= 10);
            self.take(&polled).await;
            source.acknowledge(&polled.acks).await.unwrap();
            all.receipts.extend(polled.receipts);
            all.rejects.extend(polled.rejects);
            all.ignored += polled.ignored;
            all.acks.extend(polled.acks);
        }
    }

    fn names(&self, dir: &str) -> BTreeSet<String> {
        let entries = fs::read_dir(self.dropped.path().join(dir)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn report(&self, path: &str) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.dropped.path().join(path)).unwrap()).unwrap()
    }

    /// Why the only file there failed.
    async fn failure(&self, name: &str) -> String {
        let all = self.drain(&self.source()).await;
        assert_eq!(all.acks.len(), 1);
        let report = self.report(&format!("failed/{name}.report.json"));
        let reason = report["reason"].as_str().unwrap().to_owned();
        let last = all.rejects.last().unwrap();
        assert_eq!((&last.place, &last.reason), (&name.to_owned(), &reason), "it is in the ledger too");
        reason
    }
}

fn key(receipt: &Receipt) -> String {
    match &receipt.key {
        ReceiptKey::Provider(id) => id.to_string(),
        ReceiptKey::Message(id) => id.to_string(),
    }
}

fn lines(range: std::ops::Range<u32>) -> String {
    range.fold(String::new(), |lines, number| {
        lines + &format!("{{\"id\":\"p-{number}\",\"status\":\"ok\"}}\n")
    })
}

const CSV: ReceiptFileFormat = ReceiptFileFormat::Csv { delimiter: b',' };

#[tokio::test]
async fn files_are_read_in_bounded_blocks_and_moved_away() {
    let world = World::new(ReceiptFileFormat::Ndjson);
    let bad = "{\"id\":\"p-1\",\"status\":\"?\"}\n{\"status\":\"seen\"}\nnonsense\n";
    world.put("a.ndjson", format!("{}{bad}", lines(0..25)));
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(lines(25..30).as_bytes()).unwrap();
    world.put("b.ndjson.gz", packed.finish().unwrap());
    let source = world.source();
    let all = world.drain(&source).await;
    let keys: BTreeSet<_> = all.receipts.iter().map(key).collect();
    assert_eq!((keys.len(), all.receipts.len()), (30, 30));
    let places: Vec<_> = all.rejects.iter().map(|reject| &*reject.place).collect();
    assert_eq!(places, ["a.ndjson:26", "a.ndjson:28"]);
    assert_eq!(all.ignored, 1);
    let expected = ["a.ndjson", "a.ndjson.report.json", "b.ndjson.gz", "b.ndjson.gz.report.json"];
    assert_eq!(world.names("done"), expected.map(str::to_owned).into());
    let report = world.report("done/a.ndjson.report.json");
    assert_eq!(
        (&report["rows"], &report["rejected"], &report["complete"]),
        (&28.into(), &2.into(), &true.into())
    );
    // What comes later is read by the same source.
    world.put("c.ndjson", lines(30..31));
    assert_eq!(world.drain(&source).await.receipts.len(), 1);
}

#[tokio::test]
async fn a_csv_file_is_read_by_its_header() {
    let world = World::new(CSV);
    world.put("a.csv", "other,status,id\n\"x\ny\",ok,p-1\n,ok,\n,seen,p-2\n");
    let all = world.drain(&world.source()).await;
    assert_eq!(all.receipts.iter().map(key).collect::<Vec<_>>(), ["p-1"]);
    assert_eq!(all.rejects[0].place, "a.csv:4");
}

#[tokio::test]
async fn a_crash_between_any_two_steps_loses_nothing_and_takes_nothing_twice() {
    for kind in [ReceiptFileFormat::Ndjson, CSV] {
        for first_crash in 0..5 {
            let world = World::new(kind);
            for file in 0..4u32 {
                let text = match kind {
                    ReceiptFileFormat::Ndjson => lines(file * 25..(file + 1) * 25),
                    ReceiptFileFormat::Csv { .. } => {
                        let rows = (file * 25..(file + 1) * 25).map(|number| format!("p-{number},ok\n"));
                        format!("id,status\n{}", rows.collect::<String>())
                    }
                };
                world.put(&format!("f{file}"), format!("{text}bad\n"));
            }
            let mut source = world.source();
            let mut known = 0;
            for step in 0.. {
                assert!(step < 500, "it never ends");
                let cursor = world.cursor().await;
                let polled = source.poll(cursor.as_ref(), Duration::from_millis(20)).await.unwrap();
                if polled.cursor.is_none() {
                    break;
                }
                // Crashes before the commit, after it, and not at all, in turns.
                let crash = (step + first_crash) % 5;
                if crash == 0 {
                    source = world.source();
                    continue;
                }
                let waiting = world.ledger.waiting().await.unwrap();
                world.take(&polled).await;
                known += polled.receipts.len() as u64 - (world.ledger.waiting().await.unwrap() - waiting);
                if crash == 1 {
                    source = world.source();
                    continue;
                }
                source.acknowledge(&polled.acks).await.unwrap();
            }
            assert_eq!(world.ledger.waiting().await, Ok(100));
            assert_eq!(world.names("done").len(), 8, "{:?}", world.names("done"));
            assert!(known <= 25, "a crash costs no more than a file that was read but not moved: {known}");
            let report = world.report("done/f3.report.json");
            assert_eq!((&report["rows"], &report["rejected"]), (&26.into(), &1.into()));
        }
    }
}

#[tokio::test]
async fn s0_1_what_was_not_taken_is_read_again() {
    let world = World::new(ReceiptFileFormat::Ndjson);
    world.put("a", lines(0..15));
    let source = world.source();
    let wait = Duration::from_millis(20);
    let first = source.poll(None, wait).await.unwrap();
    assert_eq!(source.poll(None, wait).await.unwrap().receipts, first.receipts);
    let second = source.poll(first.cursor.as_ref(), wait).await.unwrap();
    assert_eq!((second.receipts.len(), second.acks.len()), (5, 1));
    // The file's end was reached, and that block was not taken either.
    let again = source.poll(first.cursor.as_ref(), wait).await.unwrap();
    assert_eq!((again.receipts, &again.acks), (second.receipts, &second.acks));
    source.acknowledge(&again.acks).await.unwrap();
    source.acknowledge(&again.acks).await.unwrap();
    assert!(world.names("done").contains("a"));
    // A cursor of something else is not an obstacle.
    world.put("b", lines(15..16));
    let strange = SourceCursor("strange".into());
    assert_eq!(source.poll(Some(&strange), wait).await.unwrap().receipts.len(), 1);
}

#[tokio::test]
async fn a_file_that_cannot_be_used_fails_with_the_reason_beside_it() {
    let fails = async |kind, name: &str, bytes: &[u8]| {
        let world = World::new(kind);
        world.put(name, bytes);
        let why = world.failure(name).await;
        assert!(world.names("failed").contains(name));
        why
    };
    let why = fails(ReceiptFileFormat::Ndjson, "utf16", b"\xff\xfea\0").await;
    assert!(why.contains("UTF-16"), "{why}");
    let why = fails(CSV, "columns", b"id,state\n1,ok\n").await;
    assert!(why.contains("`status`") && why.contains("id, state"), "{why}");
    let why = fails(CSV, "bad", b"id,status\n1,?\n2,?\n").await;
    assert!(why.contains("none of its 2 receipts"), "{why}");
    let why = fails(ReceiptFileFormat::Ndjson, "torn.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\0abc").await;
    assert!(!why.is_empty());
    let why = fails(ReceiptFileFormat::Ndjson, "no.gz", b"text").await;
    assert!(!why.is_empty());
    // Empty is not a failure.
    let world = World::new(CSV);
    world.put("empty", "");
    world.put("header", "id,status\n");
    world.drain(&world.source()).await;
    assert_eq!(world.names("done").len(), 4);
}

#[tokio::test]
async fn f17_a_file_that_changes_after_it_was_claimed_fails_and_what_was_read_is_taken() {
    let world = World::new(ReceiptFileFormat::Ndjson);
    world.put("a", lines(0..30));
    let mut writer = fs::OpenOptions::new().append(true).open(world.dropped.path().join("a")).unwrap();
    let source = world.source();
    let first = source.poll(None, Duration::from_millis(50)).await.unwrap();
    world.take(&first).await;
    writer.write_all(lines(30..31).as_bytes()).unwrap();
    world.drain(&source).await;
    assert!(world.ledger.waiting().await.unwrap() >= 30);
    let report = world.report("failed/a.report.json");
    assert!(report["reason"].as_str().unwrap().contains("changed after it was claimed"), "{report}");
}

#[tokio::test]
async fn a_sidecars_promises_are_held_against_the_file() {
    let mut world = World::new(ReceiptFileFormat::Ndjson);
    world.sidecar_required = true;
    world.put("a", lines(0..3));
    assert!(world.drain(&world.source()).await.acks.is_empty(), "it waits for its sidecar");
    world.put("a.done", "rows=4\n");
    let why = world.failure("a").await;
    assert!(why.contains("promises 4 rows, it has 3"), "{why}");
    assert_eq!(world.ledger.waiting().await, Ok(3), "what it has is taken all the same");
}

#[tokio::test]
async fn f26_what_is_no_file_and_what_is_not_complete_is_left_alone() {
    let world = World::new(ReceiptFileFormat::Ndjson);
    let outside = world.state.path().join("secret");
    fs::write(&outside, lines(0..1)).unwrap();
    std::os::unix::fs::symlink(&outside, world.dropped.path().join("link")).unwrap();
    fs::hard_link(&outside, world.dropped.path().join("hard")).unwrap();
    for name in ["a.part", "a.tmp", ".hidden"] {
        fs::write(world.dropped.path().join(name), lines(0..1)).unwrap();
    }
    fs::create_dir(world.dropped.path().join("directory")).unwrap();
    let all = world.drain(&world.source()).await;
    assert!(all.receipts.is_empty() && all.acks.is_empty());
    for name in ["link", "hard", "a.part", "a.tmp", ".hidden", "directory"] {
        assert!(fs::symlink_metadata(world.dropped.path().join(name)).is_ok(), "{name}");
    }
    assert!(Path::new(&outside).exists());
}

#[tokio::test]
async fn f27_a_name_cannot_write_to_a_terminal() {
    let world = World::new(ReceiptFileFormat::Ndjson);
    world.put("a\u{1b}[2J\nb", "bad\n{\"id\":\"p\",\"status\":\"ok\"}\n");
    let all = world.drain(&world.source()).await;
    assert_eq!(all.rejects[0].place, "a\\u{1b}[2J\\nb:1");
}

#[tokio::test]
async fn a_directory_that_is_away_is_waited_for() {
    let world = World::new(ReceiptFileFormat::Ndjson);
    world.put("a", lines(0..15));
    let source = world.source();
    let first = source.poll(None, Duration::from_millis(50)).await.unwrap();
    let moved = world.state.path().join("moved");
    fs::rename(world.dropped.path(), &moved).unwrap();
    let second = source.poll(first.cursor.as_ref(), Duration::from_millis(50)).await.unwrap();
    assert_eq!(second.receipts.len(), 5, "what is claimed needs no directory");
    assert!(source.acknowledge(&second.acks).await.is_err());
    fs::rename(&moved, world.dropped.path()).unwrap();
    source.acknowledge(&second.acks).await.unwrap();
    assert!(world.names("done").contains("a"));
}
