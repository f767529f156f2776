//! What is dropped, in every shape that it can have: F17–F33.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use postrider_actors::testing::figure;
use rustix::process::Signal;

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind, Row},
    knob,
    process::Process,
    wait_for, wait_report, wait_until,
};

/// A world whose ingest is paused in the middle of any large file by the high watermark.
fn slow_world() -> World {
    let mut world = World::new("text");
    world.receive(&["--latency-ms", "10"]);
    world.set("outbox.high_watermark", 400).set("destinations.support.concurrency", 8);
    world
}

/// The one file under the state directory's `claimed/`.
fn claimed_file(world: &World) -> PathBuf {
    fn find(directory: &Path, name: &str) -> Option<PathBuf> {
        fs::read_dir(directory).ok()?.flatten().find_map(|entry| {
            let path = entry.path();
            if path.is_dir() { find(&path, name) } else { path.ends_with(name).then_some(path) }
        })
    }
    wait_for(LIVENESS, "the claimed file", || find(&world.state().join("claimed"), "large.txt"))
}

/// Disturbs a large file in the middle of its ingest; the rows committed before must be delivered and
/// no other. Returns the file's report.
fn disturb(state: &'static str, act: impl FnOnce(&mut File, &Path)) -> serde_json::Value {
    let mut world = slow_world();
    let input = Input::text("large.txt", 200_000);
    let staged = world.staging().join("large.txt");
    fs::write(&staged, &input.bytes).expect("the directory is ours");
    // The dropper keeps it open, as a careless one does.
    let mut held = OpenOptions::new().read(true).write(true).open(&staged).expect("it was just written");
    fs::rename(&staged, world.inbox("alerts").join("large.txt")).expect("one file system");
    world.expect("alerts", input.ending(state)).start();
    world.wait_requests(100);
    let path = claimed_file(&world);
    act(&mut held, &path);
    world.wait_settled(LIVENESS);
    let report = world.file("large.txt").expect("it is known");
    let rows = usize::try_from(report["rows"].as_u64().expect("a count")).expect("64 bits");
    assert!((100..200_000).contains(&rows), "it was disturbed in the middle: {rows} rows");
    for input in world.expected_mut() {
        input.rows.truncate(rows);
    }
    world.stop();
    world.prove();
    if state == "failed" {
        assert!(world.failed("large.txt").exists(), "it is quarantined");
    }
    report
}

#[test]
fn f17_a_file_appended_to_after_its_claim_is_quarantined() {
    let report = disturb("failed", |held, _| {
        held.seek(SeekFrom::End(0)).expect("a regular file");
        held.write_all(b"user-appended-0000001\n").expect("the disk has room");
    });
    assert!(report["reason"].as_str().expect("failed files have a reason").contains("changed"), "{report}");
}

#[test]
fn f17_a_file_truncated_after_its_claim_is_quarantined() {
    // In the middle of a row: half a recipient must not be sent to.
    disturb("failed", |held, _| held.set_len(1_000_007).expect("a regular file"));
}

#[test]
fn f32_a_source_that_vanishes_is_lost_and_its_rows_are_delivered() {
    disturb("source-lost", |_, path| fs::remove_file(path).expect("it is there"));
}

#[test]
fn f18_the_same_bytes_dropped_again_send_nothing() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.start().drop_file(Input::csv("first.csv", 300)).wait_settled(LIVENESS);
    let first = wait_report(&world.done("first.csv"));
    world.drop_file(Input::csv("first.csv", 300).named("again.csv"));
    let again = wait_report(&world.done("again.csv"));
    assert_eq!(first["id"], again["id"]);
    assert_eq!(world.files().len(), 1);
    // The same again under the same name, and after a restart.
    world.stop();
    world.drop_file(Input::csv("first.csv", 300)).start();
    let inbox = world.inbox("alerts").join("first.csv");
    wait_until(LIVENESS, "the third drop to be taken", || !inbox.exists());
    world.wait_settled(LIVENESS).stop();
    assert_eq!(world.prove()["requests"], 300);
}

#[test]
fn f18_the_report_of_a_copy_becomes_final_with_the_first() {
    let mut world = World::new("csv");
    world.receive(&[]).set("destinations.support.paused", true).start();
    let first = Input::csv("first.csv", 300);
    for name in ["first.csv", "again.csv", "and-again.csv"] {
        world.drop_file(first.clone().named(name));
        let done = world.done(name);
        wait_until(LIVENESS, &format!("{name} to be moved away"), || done.exists());
    }
    world.stop();
    world.set("destinations.support.paused", false).start();
    for name in ["first.csv", "again.csv", "and-again.csv"] {
        let report = world.done(&format!("{name}.report.json"));
        wait_until(LIVENESS, &format!("the final report of {name}"), || {
            let text = fs::read(&report).expect("it is there");
            let report: serde_json::Value = serde_json::from_slice(&text).expect("reports are whole");
            assert_eq!(report["name"], name);
            report["settled_at"].is_string() && report["destinations"]["support"]["sent"] == 300
        });
    }
    world.stop();
    assert_eq!(world.prove()["requests"], 300);
}

#[test]
fn f19_the_same_name_with_new_content_is_a_new_file() {
    let mut world = World::new("csv");
    world.receive(&[]);
    world.start().drop_file(Input::csv("daily.csv", 100)).wait_settled(LIVENESS);
    world.drop_file(Input::csv("other.csv", 120).named("daily.csv")).wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 220);
    let done: Vec<_> = names(&world.inbox("alerts").join("done"))
        .into_iter()
        .filter(|name| name.starts_with("daily.csv") && !name.contains(".report."))
        .collect();
    assert_eq!(done.len(), 2, "neither replaces the other: {done:?}");
}

#[test]
fn f20_an_endless_line_is_one_rejected_row() {
    let length = usize::try_from(knob("POSTRIDER_LINE_BYTES", 1 << 30)).expect("64 bits");
    let mut world = World::new("text");
    world.receive(&[]);
    let mut bytes = b"user-before-0000001\n".to_vec();
    bytes.resize(bytes.len() + length, b'x');
    bytes.extend_from_slice(b"\nuser-after-0000003\n");
    let rows = vec![
        Row::new(Kind::Ok, "user-before-0000001"),
        Row::rejected(),
        Row::new(Kind::Ok, "user-after-0000003"),
    ];
    world.drop_file(Input::of("endless.txt", bytes, rows)).start().wait_settled(LIVENESS * 2);
    let peak = world.daemon().peak_memory_bytes();
    assert!(peak < 96 << 20, "peak memory of {peak} bytes for a line of {length}");
    world.stop();
    world.prove();
    figure(format!("a line of {} MiB: 1 row rejected, {} MiB at the peak", length >> 20, peak >> 20));
}

/// Drops one file, waits, proves, and gives its report.
fn judge(world: &mut World, input: Input) -> serde_json::Value {
    let name = input.name.clone();
    world.drop_file(input).start().wait_settled(LIVENESS);
    let report = world.file(&name).expect("it is known");
    let place = if report["state"] == "failed" { world.failed(&name) } else { world.done(&name) };
    assert_eq!(wait_report(&place)["state"], report["state"]);
    world.stop();
    world.prove();
    report
}

/// The rejects file beside `path`, as text.
fn rejects(path: &Path) -> String {
    let name = format!("{}.rejects.csv", path.file_name().expect("a file").to_string_lossy());
    String::from_utf8_lossy(&fs::read(path.with_file_name(name)).expect("rows were rejected")).into_owned()
}

fn good(recipient: &str) -> Row {
    Row::new(Kind::Ok, recipient)
}

#[test]
fn f21_bytes_that_are_no_text_are_rejected_with_their_line() {
    let mut world = World::new("text");
    world.receive(&[]);
    let bytes =
        b"\xef\xbb\xbfuser-with-bom\r\nuser-nul-\0-in-it\r\nuser-crlf\r\n\r\nuser-bad-\xff-utf8\nuser-last\n";
    let rows =
        vec![good("user-with-bom"), Row::rejected(), good("user-crlf"), Row::rejected(), good("user-last")];
    judge(&mut world, Input::of("bytes.txt", *bytes, rows));
    let rejects = rejects(&world.done("bytes.txt"));
    assert!(rejects.lines().any(|line| line.starts_with("2,2,")), "row 2 on line 2: {rejects}");
    // The blank line 4 is no row.
    assert!(rejects.lines().any(|line| line.starts_with("4,5,")), "row 4 on line 5: {rejects}");
}

#[test]
fn f21_utf16_is_refused_as_a_whole() {
    let mut world = World::new("text");
    world.receive(&[]);
    let bytes: Vec<u8> = "\u{feff}user-1\nuser-2\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let report = judge(&mut world, Input::of("wide.txt", bytes, Vec::new()).ending("failed"));
    assert!(report["reason"].as_str().expect("a reason").contains("UTF-16"), "{report}");
    assert!(world.failed("wide.txt").exists());
}

#[test]
fn f22_an_unclosed_quote_does_not_swallow_the_rest() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let bytes =
        "user_id,name\nuser-one,Ann\nuser-two,\"never closed\nuser-three,Cid\nuser-four,\"two\nlines\"\n";
    let rows = vec![good("user-one"), Row::rejected(), good("user-three"), good("user-four")];
    judge(&mut world, Input::of("quote.csv", bytes, rows));
    let rejects = rejects(&world.done("quote.csv"));
    assert!(rejects.lines().any(|line| line.starts_with("2,3,")), "row 2 on line 3: {rejects}");
}

#[test]
fn f23_json_that_is_deep_ambiguous_or_huge_is_rejected() {
    let mut world = World::new("ndjson");
    world.receive(&[]);
    let deep = format!("{{\"user_id\":\"user-deep\",\"x\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let lines = [
        "{\"user_id\":\"user-good\",\"n\":12345678901234567890123}",
        &deep,
        "{\"user_id\":\"user-one\",\"user_id\":\"user-two\"}",
        "{\"user_id\":\"user-huge\",\"n\":1e400}",
        "[1]",
        "{\"user_id\":{}}",
        "{\"user_id\":9007199254740993}",
    ];
    let rows = vec![
        good("user-good"),
        Row::rejected(),
        Row::rejected(),
        Row::rejected(),
        Row::rejected(),
        Row::rejected(),
        good("9007199254740993"),
    ];
    judge(&mut world, Input::of("odd.ndjson", lines.join("\n"), rows));
}

#[test]
fn f24_empty_files_and_missing_final_newlines_count_right() {
    let mut world = World::new("text");
    world.receive(&[]);
    world.add_feed("tables", "csv", &["support"]);
    world.drop_file(Input::of("empty.txt", "", Vec::new()));
    world.drop_file(Input::of("open.txt", "user-a1\nuser-b2", vec![good("user-a1"), good("user-b2")]));
    world.drop_into("tables", Input::of("header.csv", "user_id,name\n", Vec::new()));
    world.drop_into("tables", Input::of("bare.csv", "user_id,name", Vec::new()));
    world.drop_into("tables", Input::of("open.csv", "user_id,name\nuser-c3,\"\"", vec![good("user-c3")]));
    world.start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 3);
}

#[test]
fn f25_a_file_of_bad_rows_alone_has_failed() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let bytes = "user_id,name\n,Ann\nuser-x\nuser-y,a,b\n";
    judge(&mut world, Input::of("bad.csv", bytes, vec![Row::rejected(); 3]).ending("failed"));
    let rejects = rejects(&world.failed("bad.csv"));
    for row in 1..=3 {
        assert!(rejects.lines().any(|line| line.starts_with(&format!("{row},{},", row + 1))), "{rejects}");
    }
}

#[test]
fn corrected_rejects_can_be_dropped_again() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let bytes = "user_id,name\nuser-good,Ann\n,Bob\n";
    judge(&mut world, Input::of("half.csv", bytes, vec![good("user-good"), Row::rejected()]));
    let corrected = rejects(&world.done("half.csv")).replace(",Bob", "user-corrected,Bob");
    assert!(corrected.contains("user-corrected"), "the raw row is there to be corrected: {corrected}");
    world.drop_file(Input::of("half.csv.rejects.csv", corrected, vec![good("user-corrected")]));
    world.start().wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 2);
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("it is there");
    entries.map(|entry| entry.expect("it reads").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn f26_what_is_no_plain_file_is_refused_and_never_read() {
    let mut world = World::new("text");
    world.receive(&[]);
    let inbox = world.inbox("alerts");
    let secret = world.path("outside.txt");
    fs::write(&secret, "user-outside-1\nuser-outside-2\n").expect("the directory is ours");
    symlink(&secret, inbox.join("link.txt")).expect("links can be made");
    symlink("/etc/passwd", inbox.join("passwd.txt")).expect("links can be made");
    fs::hard_link(&secret, inbox.join("hard.txt")).expect("links can be made");
    fs::create_dir(inbox.join("directory.txt")).expect("directories can be made");
    make_node(&inbox.join("pipe.txt"), "p");
    if rustix::process::getuid().is_root() {
        make_node(&inbox.join("device.txt"), "c 1 5");
    }
    let mut odd_names = vec![good("user-odd-name")];
    world.drop_file(Input::of("x..%2f..%2fetc%2fpasswd", "user-odd-name\n", odd_names.clone()));
    odd_names[0] = good("user-hidden-name");
    fs::write(inbox.join(".hidden"), "user-never-1\n").expect("the directory is ours");
    fs::write(inbox.join("upload.part"), "user-never-2\n").expect("the directory is ours");
    fs::write(inbox.join("upload.tmp"), "user-never-3\n").expect("the directory is ours");
    world.start_ready();
    world.drop_file(Input::text("plain.txt", 50)).wait_settled(LIVENESS);
    for name in ["link.txt", "passwd.txt", "hard.txt", "pipe.txt"] {
        let kind = fs::symlink_metadata(inbox.join(name)).expect("it stays where it is").file_type();
        assert!(kind.is_symlink() || kind.is_fifo() || kind.is_file());
        world.daemon().wait_log(name);
    }
    for name in [".hidden", "upload.part", "upload.tmp", "directory.txt"] {
        assert!(inbox.join(name).exists(), "{name} is left alone");
    }
    assert_eq!(fs::read_to_string(&secret).expect("it is still there"), "user-outside-1\nuser-outside-2\n");
    // Reported once, not at every rescan: three of them pass.
    std::thread::sleep(Duration::from_millis(1700));
    let reports = world.daemon().log_text().lines().filter(|line| line.contains("pipe.txt")).count();
    assert!(reports <= 2, "the pipe is reported {reports} times");
    world.stop();
    assert_eq!(world.prove()["requests"], 51);
}

fn make_node(path: &Path, kind: &str) {
    let status = Command::new("mknod").arg(path).args(kind.split(' ')).status().expect("coreutils are there");
    assert!(status.success());
}

#[test]
fn f27_names_that_forge_lines_are_escaped() {
    let mut world = World::new("text");
    world.receive(&[]);
    let name = "evil\n{\"level\":\"ERROR\"}\u{1b}[31m\r.txt";
    world.start().drop_file(Input::of(
        name,
        "user-evil-1\nuser-evil-\u{1b}[2J\n",
        vec![good("user-evil-1"), Row::rejected()],
    ));
    world.wait_settled(LIVENESS);
    let table = world.postrider(&["files"]).ok().stdout;
    assert!(!table.contains('\u{1b}') && !table.contains('\r'), "{table:?}");
    assert!(table.contains("evil"), "{table}");
    let json = world.postrider(&["files", "--json"]).ok().json();
    assert_eq!(json[0]["name"], name, "JSON gives the name as it is");
    let log = world.daemon().log_text();
    assert!(!log.contains('\u{1b}'));
    for line in log.lines() {
        assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "a forged line: {line}");
    }
    world.stop();
    world.prove();
}

/// Gives a tree to `uid`, so that a daemon without privileges can work in it.
fn give(path: &Path, uid: u32) {
    chown(path, Some(uid), Some(uid)).expect("root may");
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("it is ours") {
            give(&entry.expect("it reads").path(), uid);
        }
    }
}

#[test]
fn f28_a_file_without_permission_is_reported_once_and_taken_when_that_changes() {
    const NOBODY: u32 = 65534;
    let mut world = World::new("text");
    world.receive(&[]);
    let input = Input::text("locked.txt", 40);
    let path = world.inbox("alerts").join("locked.txt");
    fs::write(&path, &input.bytes).expect("the directory is ours");
    fs::set_permissions(&path, Permissions::from_mode(0o000)).expect("it is ours");
    world.expect("alerts", input);
    world.configure();
    let mut command = world.run_command();
    if rustix::process::getuid().is_root() {
        // Root reads everything: the daemon runs as somebody else, from a place that they can reach.
        let binary = world.path("postrider");
        fs::copy(crate::support::process::POSTRIDER, &binary).expect("the disk has room");
        let mut other = Command::new(&binary);
        other.args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => other.env(name, value),
                None => other.env_remove(name),
            };
        }
        give(&world.path("."), NOBODY);
        give(&world.inbox("."), NOBODY);
        chown(&path, Some(0), Some(0)).expect("root may");
        other.uid(NOBODY).gid(NOBODY);
        command = other;
    }
    let mut daemon = Process::spawn(&mut command, &world.daemon_log());
    daemon.wait_log("locked.txt");
    // Three rescans and more.
    std::thread::sleep(Duration::from_millis(1700));
    let reports = daemon.log_text().lines().filter(|line| line.contains("a file can't be claimed")).count();
    assert_eq!(reports, 1, "{}", daemon.log_text());
    assert_eq!(world.request_count(), 0);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("it is ours");
    world.wait_requests(40);
    world.wait_settled(LIVENESS);
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait_exit(Duration::from_secs(30)).code(), Some(0));
    world.prove();
}

#[test]
fn f29_many_files_at_once_are_all_done() {
    let files = knob("POSTRIDER_FILES", 1500);
    let mut world = World::new("text");
    world.receive(&[]);
    world.start_ready();
    for number in 0..files {
        world.drop_file(Input::text(&format!("many-{number:06}.txt"), 2));
    }
    world.wait_settled(LIVENESS + Duration::from_millis(files * 100));
    world.stop();
    assert_eq!(world.prove()["requests"], files * 2);
    let left = names(&world.inbox("alerts"));
    assert!(!left.iter().any(|name| name.starts_with("many-")), "{} names are left", left.len());
}

#[test]
fn f29_an_overflow_of_the_watch_queue_is_made_good_by_a_scan() {
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("Linux has inotify");
    let limit: usize = limit.trim().parse().expect("a number");
    assert!(limit <= 1 << 20, "this machine queues {limit} events: too many for a test");
    let mut world = World::new("text");
    world.receive(&[]);
    // No rescan helps.
    world.set("feeds.alerts.rescan", "1h").start_ready();
    world.daemon().signal(Signal::STOP);
    let inbox = world.inbox("alerts");
    // Two names by turns, since equal events in a row are merged.
    for number in 0..=limit {
        File::create(inbox.join(if number % 2 == 0 { ".noise" } else { ".other-noise" }))
            .expect("it is ours");
    }
    for number in 0..40 {
        world.drop_file(Input::text(&format!("lost-{number}.txt"), 3));
    }
    world.daemon().signal(Signal::CONT);
    world.wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 120);
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).expect("memory takes everything");
    encoder.finish().expect("memory takes everything")
}

#[test]
fn f30_a_compressed_bomb_is_refused_and_a_good_archive_is_read() {
    let mut world = World::new("text");
    world.receive(&[]);
    let zeros = vec![b'\n'; 200 << 20];
    world.drop_file(Input::of("bomb.txt.gz", gzip(&zeros), Vec::new()).ending("failed"));
    world.drop_file(
        Input::of("bomb.txt.zst", zstd::encode_all(&zeros[..], 3).expect("it fits"), Vec::new())
            .ending("failed"),
    );
    let mut plain = Input::text("good.txt", 500);
    plain.bytes = gzip(&plain.bytes);
    world.drop_file(plain.named("good.txt.gz"));
    let mut plain = Input::text("fine.txt", 500);
    plain.bytes = zstd::encode_all(&plain.bytes[..], 3).expect("it fits");
    world.drop_file(plain.named("fine.txt.zst"));
    world.start().wait_settled(LIVENESS);
    for name in ["bomb.txt.gz", "bomb.txt.zst"] {
        let report = world.file(name).expect("it is known");
        assert!(report["reason"].as_str().expect("a reason").contains("ratio"), "{report}");
        assert!(world.failed(name).exists());
    }
    let peak = world.daemon().peak_memory_bytes();
    assert!(peak < 96 << 20, "peak memory of {peak} bytes");
    world.stop();
    assert_eq!(world.prove()["requests"], 1000);
}

#[test]
fn f31_a_user_twice_in_a_file_is_kept_or_counted() {
    let bytes = "user-ann\nuser-bob\nuser-ann\nuser-ann\n";
    let mut world = World::new("text");
    world.receive(&[]);
    world.add_feed("first", "text", &["support"]).set("feeds.first.duplicates", "first");
    world.set("feeds.alerts.duplicates", "keep");
    world.drop_file(Input::of(
        "kept.txt",
        bytes,
        ["ann", "bob", "ann", "ann"].map(|name| good(&format!("user-{name}"))).to_vec(),
    ));
    let duplicate = Row::new(Kind::Duplicate, "user-ann");
    world.drop_into(
        "first",
        Input::of("once.txt", bytes, vec![good("user-ann"), good("user-bob"), duplicate.clone(), duplicate]),
    );
    world.start().wait_settled(LIVENESS);
    let report = world.file("once.txt").expect("it is known");
    assert_eq!((&report["rows"], &report["duplicates"]), (&4.into(), &2.into()));
    world.stop();
    assert_eq!(world.prove()["requests"], 6);
}

#[test]
fn f33_a_formula_travels_verbatim_and_is_neutralised_in_exports() {
    let formula = "=cmd|' /C calc'!A0";
    let mut world = World::new("csv");
    world.script(|_| crate::support::scripted::Reply::Status(404));
    let bytes = format!("user_id,name\n{formula},{formula}\n{formula}\n");
    world.drop_file(Input::of("formula.csv", bytes, vec![Row::new(Kind::Dead, formula), Row::rejected()]));
    world.start().wait_settled(LIVENESS);
    let request = world.requests().remove(0);
    let body: serde_json::Value = serde_json::from_str(&request.body).expect("the default body is JSON");
    assert_eq!(body["recipient"], formula);
    assert_eq!(body["data"]["name"], formula);
    let export = world.postrider(&["dead", "export"]).ok().stdout;
    assert!(export.contains(&format!("'{formula}")), "{export}");
    assert!(!export.contains(&format!(",{formula}")), "{export}");
    wait_report(&world.done("formula.csv"));
    let rejects = rejects(&world.done("formula.csv"));
    assert!(rejects.contains(&format!("'{formula}")), "{rejects}");
    world.stop();
    world.prove();
}

#[test]
fn a_file_is_not_taken_while_it_is_written_and_never_without_a_required_sidecar() {
    let mut world = World::new("text");
    world.receive(&[]);
    world.add_feed("strict", "text", &["support"]).set("feeds.strict.require_done", true).start_ready();
    // Written in place, slowly: closed only at the end.
    let input = Input::text("slow.txt", 100);
    let mut slow = File::create(world.inbox("alerts").join("slow.txt")).expect("it is ours");
    let half = input.bytes.len() / 2;
    slow.write_all(&input.bytes[..half]).expect("the disk has room");
    let strict = Input::text("strict.txt", 60);
    world.drop_into("strict", strict.clone());
    slow.write_all(&input.bytes[half..]).expect("the disk has room");
    drop(slow);
    world.expect("alerts", input);
    world.wait_requests(100);
    assert_eq!(world.request_count(), 100, "nothing of the file without its sidecar");
    let digest = crate::support::scripted::sha256_hex(&strict.bytes);
    let sidecar = world.staging().join("sidecar");
    fs::write(&sidecar, format!("sha256={digest}\nrows=60\n")).expect("the directory is ours");
    fs::rename(&sidecar, world.inbox("strict").join("strict.txt.done")).expect("one file system");
    world.wait_settled(LIVENESS);
    world.stop();
    assert_eq!(world.prove()["requests"], 160);
}

#[test]
fn a_sidecar_that_promises_something_else_fails_the_file() {
    let mut world = World::new("text");
    world.receive(&[]);
    fs::write(world.inbox("alerts").join("short.txt.done"), "rows=61\n").expect("the directory is ours");
    fs::write(world.inbox("alerts").join("wrong.txt.done"), format!("sha256={}\n", "0".repeat(64)))
        .expect("the directory is ours");
    world.drop_file(Input::text("wrong.txt", 30).ending("failed"));
    world.drop_file(Input::text("short.txt", 60).ending("failed"));
    // A promise is checked before the first row is sent.
    for input in world.expected_mut() {
        input.rows.clear();
    }
    world.start().wait_settled(LIVENESS);
    for name in ["wrong.txt", "short.txt"] {
        let report = wait_report(&world.failed(name));
        assert_eq!(report["state"], "failed", "{report}");
    }
    world.stop();
    world.prove();
}

#[test]
fn a_finished_file_is_kept_byte_by_byte_with_its_report() {
    let mut world = World::new("csv");
    world.receive(&[]);
    let input = Input::csv("kept.csv", 250);
    let bytes = input.bytes.clone();
    let report = judge(&mut world, input);
    assert_eq!(report["balanced"], true);
    assert_eq!(report["complete"], true);
    let mut kept = Vec::new();
    let path = world.done("kept.csv");
    File::open(&path).expect("it is in done/").read_to_end(&mut kept).expect("it reads");
    assert!(kept == bytes, "done/ holds what was dropped");
    assert_eq!(fs::metadata(&path).expect("it is there").nlink(), 1);
    assert!(!path.with_file_name("kept.csv.rejects.csv").exists(), "nothing was rejected");
}
