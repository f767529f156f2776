//! The disk gives back something else than was written to it (F61).

use rusqlite::Connection;

use crate::{
    ops::{metric, serve},
    support::{LIVENESS, World, input::Input, wait_until},
};

const ROWS: usize = 1_000;

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
        let alarm = "postrider_alarm_active{alarm=\"damage\"}";
        wait_until(LIVENESS, "the alarm", || metric(address, alarm) == Some(1.0));
        assert_eq!(metric(address, "postrider_batches_quarantined{}"), Some(2.0));
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
}
