//! The disk gives back something else than was written to it (F15, F61).

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt as _,
    path::Path,
};

use postrider_actors::testing::figure;
use rusqlite::Connection;

use crate::{
    ops::{alarmed, metric, serve},
    support::{
        LIVENESS, World,
        input::{Input, Kind},
        wait_until,
    },
};

const ROWS: usize = 1_000;

/// The database and its log.
const STORE: [&str; 2] = ["postrider.db", "postrider.db-wal"];

/// What is in the state directory of them.
fn store_of(state: &Path) -> Vec<Option<Vec<u8>>> {
    STORE.iter().map(|name| fs::read(state.join(name)).ok()).collect()
}

fn put_store(state: &Path, store: &[Option<Vec<u8>>]) {
    for (name, bytes) in STORE.iter().zip(store) {
        let path = state.join(name);
        match bytes {
            Some(bytes) => fs::write(path, bytes).expect("it is ours"),
            None if path.exists() => fs::remove_file(path).expect("it is ours"),
            None => {}
        }
    }
    // SQLite's index of the log, of a process that is gone.
    let index = state.join("postrider.db-shm");
    if index.exists() {
        fs::remove_file(index).expect("it is ours");
    }
}

/// Overwrites a part of a file, as a disk would.
fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("it is there");
    file.write_all_at(bytes, at).expect("it is ours");
}

/// A world whose daemon was killed in the middle of a file, with commits in the store's log.
fn killed_world() -> World {
    let mut world = World::new("csv");
    world
        .receive(&[])
        .set("outbox.high_watermark", 400)
        .set("destinations.support.rate_per_s", 500)
        .set("destinations.support.burst", 50)
        .set("record.max_unrecorded", 100)
        .drop_file(Input::csv("damaged.csv", 3 * ROWS).all(Kind::Sent))
        .start();
    world.wait_requests(ROWS);
    world.kill();
    world.set("destinations.support.rate_per_s", 0);
    world
}

/// Damages the database or its log, given their paths.
type Damage = fn(&Path, &Path);

#[test]
fn f15_a_damaged_store_is_refused_and_left_alone() {
    let mut world = killed_world();
    let (state, requests) = (world.state(), world.request_count());
    let whole = store_of(&state);
    assert!(whole.iter().flatten().all(|bytes| bytes.len() > 8192), "both files hold something");
    let damages: [(&str, Damage); 7] = [
        // With its log, the page would be there once more.
        ("the header of the database, without a log", |database, log| {
            fs::remove_file(log).expect("it is there");
            overwrite(database, 0, &[0x5a; 4096]);
        }),
        ("an empty database", |database, _| fs::write(database, []).expect("it is ours")),
        ("an empty database without a log", |database, log| {
            fs::write(database, []).expect("it is ours");
            fs::remove_file(log).expect("it is there");
        }),
        ("no database beside a log", |database, _| fs::remove_file(database).expect("it is there")),
        ("a database that is cut off, without a log", |database, log| {
            fs::remove_file(log).expect("it is there");
            let file = OpenOptions::new().write(true).open(database).expect("it is there");
            file.set_len(8192).expect("it is ours");
        }),
        ("the header of the log", |_, log| overwrite(log, 17, &[0x5a])),
        ("a log whose header is gone", |_, log| overwrite(log, 0, &[0; 512])),
    ];
    for (what, damage) in &damages {
        put_store(&state, &whole);
        damage(&state.join(STORE[0]), &state.join(STORE[1]));
        let damaged = store_of(&state);
        let said = world.daemon_log_text().len();
        world.start();
        let status = world.wait_exit(LIVENESS);
        assert_eq!(status.code(), Some(65), "{what}: {status}");
        let log = world.daemon_log_text();
        assert!(log[said..].contains("It was left untouched"), "{what}: {}", &log[said..]);
        assert!(store_of(&state) == damaged, "{what}: it is neither changed nor made anew");
    }
    assert_eq!(world.request_count(), requests, "nothing is sent");
    put_store(&state, &whole);
    world.start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
    figure(format!(
        "{} damages of a store with a log: each refused with exit 65 and left alone",
        damages.len()
    ));
}

#[test]
fn f15_a_page_that_is_damaged_below_the_daemon_ends_it_before_anything_is_acknowledged() {
    let mut world = killed_world();
    // Everything is in the database, so that nothing of the log covers the damage.
    world.start_ready().stop();
    let state = world.state();
    let whole = store_of(&state);
    let page: u32 = {
        let store = Connection::open(world.store()).expect("nobody else has it");
        let root = "SELECT rootpage FROM sqlite_schema WHERE name = 'results'";
        store.query_row(root, [], |row| row.get(0)).expect("it is a table")
    };
    overwrite(&world.store(), u64::from(page - 1) * 8192, &[0xa5; 8192]);
    world.drop_file(Input::csv("later.csv", 100).all(Kind::Sent)).start();
    let status = world.wait_exit(LIVENESS);
    assert!(matches!(status.code(), Some(65 | 74)), "{status}");
    assert!(world.daemon_log_text().contains("malformed"), "it says why");
    world.kills += 1;
    put_store(&state, &whole);
    // What was recorded after the copy is sent again.
    world.unknown = world.request_count();
    world.start().wait_settled(LIVENESS);
    world.stop();
    world.prove();
}

#[test]
fn f15_a_log_that_is_damaged_in_its_middle_is_said_and_loses_no_row_of_a_file_in_work() {
    let mut world = killed_world();
    let log = world.state().join(STORE[1]);
    let length = fs::metadata(&log).expect("it was killed").len();
    overwrite(&log, length / 3, &[0xa5; 64]);
    let requests = world.request_count();
    // What the lost commits recorded is sent again.
    world.unknown = requests;
    world.start().wait_settled(LIVENESS);
    let said = "the store's log is not whole";
    let line = world.daemon_log_text().lines().find(|line| line.contains(said)).map(str::to_owned);
    let line: serde_json::Value =
        serde_json::from_str(&line.expect("it is said")).expect("the log is JSON lines");
    world.stop();
    let summary = world.prove();
    let fields = if line["fields"].is_object() { &line["fields"] } else { &line };
    let commits = fields["commits"].as_u64().expect("they are counted");
    assert!(commits > 0);
    figure(format!(
        "a log of {length} bytes damaged after a third: {commits} lost commits reported, 0 rows lost, {} sent again",
        summary["requests_after_2xx"]
    ));
}

/// Lets `change` alter one stored value in place, as a disk would.
fn alter(store: &Connection, select: &str, update: &str, change: impl Fn(&mut Vec<u8>)) {
    let (seq, mut bytes): (i64, Vec<u8>) =
        store.query_row(select, [], |row| Ok((row.get(0)?, row.get(1)?))).expect("it is there");
    change(&mut bytes);
    assert_eq!(store.execute(update, (bytes, seq)).expect("the store is ours"), 1);
}

#[test]
fn f61_a_flipped_bit_is_found_and_named_and_stops_nothing_else() {
    let mut world = World::new("csv");
    world.receive(&["--log-bodies"]).set("destinations.support.paused", true);
    let (whole, header) = (Input::csv("customer.csv", ROWS), Input::csv("header.csv", 100));
    world.start().drop_file(whole).drop_file(header);
    wait_until(LIVENESS, "the files to be ingested", || {
        world.files().iter().filter(|file| file["state"] == "ingested").count() == 2
    });
    world.stop();
    {
        let store = Connection::open(world.store()).expect("nobody else has it");
        // One bit: 5 and 4 differ in the last one. Without a checksum, this is just another customer.
        alter(
            &store,
            "SELECT seq, body FROM payloads WHERE instr(body, CAST('user-customer-0000250' AS BLOB)) > 0",
            "UPDATE payloads SET body = ?1 WHERE seq = ?2",
            |body| {
                let id = b"user-customer-0000250";
                let at = memchr::memmem::find(body, id).expect("the query found it");
                body[at + id.len() - 2] ^= 1;
            },
        );
        alter(
            &store,
            "SELECT h.seq, CAST(h.json AS BLOB) FROM headers h JOIN files f ON f.seq = h.file WHERE f.name = 'header.csv'",
            "UPDATE headers SET json = CAST(?1 AS TEXT) WHERE seq = ?2",
            |json| {
                let name = memchr::memmem::find(json, b"amount").expect("the header has the columns");
                json[name] ^= 1;
            },
        );
    }
    world.set("destinations.support.paused", false);
    // The start after the next finds the same again.
    for _ in 0..2 {
        let address = serve(&mut world);
        wait_until(LIVENESS, "all others to be sent", || world.request_count() == ROWS - 100);
        let alarm = "damage";
        wait_until(LIVENESS, "the alarm", || alarmed(address, alarm) == Some(1.0));
        assert_eq!(metric(address, "postrider_batches_quarantined{}"), Some(2.0));
        let status = world.postrider(&["status", "--json", "--sample-ms", "0"]).ok().json();
        assert_eq!(status["destinations"]["support"]["batches"]["damaged"], 2, "{status}");
        world.stop();
    }
    let log = world.daemon_log_text();
    let named = |file: &str, what: &str| {
        let is_it = |line: &&str| {
            line.contains("is damaged and set aside") && line.contains(file) && line.contains(what)
        };
        log.lines().filter(is_it).count()
    };
    assert_eq!(named("customer.csv", "the stored payload does not match its checksum"), 2, "once a start");
    assert_eq!(named("customer.csv", "\"first_row\":201"), 2);
    assert_eq!(named("header.csv", "the stored header does not match its checksum"), 2);
    let sent = world.recipients("user_id");
    for gone in ["user-customer-0000240", "user-customer-0000250"] {
        assert!(!sent.contains_key(gone), "{gone}: the other one was made of this one's message");
    }
    assert_eq!(world.request_count(), ROWS - 100, "nothing of them was sent, and nothing else twice");
    let file = world.file("customer.csv").expect("it is known");
    assert_eq!(
        (&file["destinations"]["support"]["sent"], &file["destinations"]["support"]["dead"]),
        (&900.into(), &0.into())
    );
    figure(
        "1 flipped bit in a payload, 1 in a header: 2 batches of 100 set aside and named, the other 900 messages sent, 0 wrong",
    );
}
