//! `ordering = "per_key"`: messages of one key go in row order, one after the other, whatever the receiver does.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::support::{
    LIVENESS, World,
    input::{Input, Kind, Row},
    scripted::{Reply, Request},
    wait_until,
};

/// How long the receiver takes: long enough for two of a key to meet.
const ANSWER: Duration = Duration::from_millis(3);

/// A message's file, and its row.
type Place = (String, usize);

/// What a receiver saw of each key.
#[derive(Default)]
struct Seen {
    in_flight: HashSet<String>,
    /// Messages in the order of their first 2xx.
    accepted: HashMap<String, Vec<Place>>,
    /// How often two messages of a key were in flight at once.
    together: usize,
    requests: usize,
    refused: usize,
}

impl Seen {
    fn messages(&self) -> usize {
        self.accepted.values().map(Vec::len).sum()
    }
}

fn place(id: &str) -> Place {
    let (file, row) = id.rsplit_once('_').expect("message ids end in a row number");
    (file.to_owned(), row.parse().expect("message ids end in a row number"))
}

/// The recipient in a body.
fn key(body: &str) -> String {
    let body: serde_json::Value = serde_json::from_str(body).expect("bodies are JSON");
    body["recipient"].as_str().expect("bodies name the recipient").to_owned()
}

/// A file in which `keys` users have `rows` rows each, in turn. Its last row makes its content its own.
fn file(name: &str, keys: usize, rows: usize) -> Input {
    let mut users: Vec<_> = (0..keys * rows).map(|nth| format!("user-{:04}", nth % keys)).collect();
    users.push(format!("last-of-{name}"));
    let lines = users.join("\n") + "\n";
    let rows = users.iter().map(|user| Row::new(Kind::Sent, user)).collect();
    Input::of(&format!("{name}.txt"), lines, rows)
}

/// A receiver that takes a moment for each request, and answers as `status_of` says: by request and number.
fn watch(
    world: &mut World,
    status_of: impl Fn(&Request, usize) -> u16 + Send + Sync + 'static,
) -> Arc<Mutex<Seen>> {
    let seen: Arc<Mutex<Seen>> = Arc::default();
    let watching = seen.clone();
    world.script(move |request| {
        let messages = request.messages();
        let number = {
            let mut seen = watching.lock().expect("no script panics");
            for (_, body) in &messages {
                let is_alone = seen.in_flight.insert(key(body));
                seen.together += usize::from(!is_alone);
            }
            seen.requests += 1;
            seen.requests
        };
        thread::sleep(ANSWER);
        let status = status_of(request, number);
        let mut seen = watching.lock().expect("no script panics");
        seen.refused += usize::from(status >= 300);
        for (id, body) in &messages {
            let key = key(body);
            seen.in_flight.remove(&key);
            let accepted = seen.accepted.entry(key).or_default();
            if status < 300 && !accepted.contains(&place(id)) {
                accepted.push(place(id));
            }
        }
        Reply::Status(status)
    });
    seen
}

/// Never two of one key at once, and each key's messages first accepted in their order: file by file, row by row.
fn assert_order(seen: &Mutex<Seen>, keys: usize, rows: usize, files: usize) {
    let seen = seen.lock().expect("no script panics");
    assert_eq!(seen.together, 0, "two messages of one key were in flight at once");
    assert_eq!(seen.accepted.len(), keys + files);
    for (key, accepted) in seen.accepted.iter().filter(|(key, _)| key.starts_with("user-")) {
        assert_eq!(accepted.len(), rows * files, "{key}");
        for of_file in accepted.chunks(rows) {
            assert!(of_file.iter().all(|(file, _)| *file == of_file[0].0), "{key}: {accepted:?}");
            assert!(of_file.is_sorted_by_key(|(_, row)| *row), "{key}: {accepted:?}");
        }
    }
    println!("{} requests, {} of them refused", seen.requests, seen.refused);
}

fn world() -> World {
    let mut world = World::new("text");
    world.set("destinations.support.ordering", "per_key").set("destinations.support.concurrency", 32);
    world.set("destinations.support.retry.base", "300ms").set("destinations.support.retry.cap", "1s");
    world
}

/// 503 for 30 % of the requests, at random by their number.
fn flaky(number: usize) -> u16 {
    let is_bad = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) & 0xff < 77;
    if is_bad { 503 } else { 200 }
}

#[test]
fn b13_a_receiver_that_fails_30_percent_at_random_sees_each_key_in_row_order() {
    let mut world = world();
    let seen = watch(&mut world, |_, number| flaky(number));
    world.drop_file(file("a", 200, 20)).start().wait_settled(LIVENESS * 2);
    world.stop();
    assert_order(&seen, 200, 20, 1);
    let seen = seen.lock().expect("no script panics");
    assert!(seen.refused * 5 > seen.requests, "{} of {}", seen.refused, seen.requests);
    world.prove();
}

#[test]
fn b13_the_order_outlasts_kill_9_in_the_middle() {
    let mut world = world();
    let seen = watch(&mut world, |_, number| flaky(number));
    world.drop_file(file("a", 100, 20)).start();
    for kill in 1..=3 {
        wait_until(LIVENESS, "messages before a kill", || {
            seen.lock().expect("no script panics").messages() >= kill * 450
        });
        world.kill();
        thread::sleep(ANSWER * 10); // what was in flight has ended
        world.start();
    }
    world.wait_settled(LIVENESS * 2);
    world.stop();
    assert_order(&seen, 100, 20, 1);
    world.prove();
}

#[test]
fn b13_the_order_outlasts_restarts_and_reloads() {
    let mut world = world();
    let seen = watch(&mut world, |_, number| flaky(number));
    world.drop_file(file("a", 100, 20)).start();
    for stop in 1..=3 {
        wait_until(LIVENESS, "messages before a stop", || {
            seen.lock().expect("no script panics").messages() >= stop * 450
        });
        if stop == 2 {
            world.set("destinations.support.concurrency", 16).configure();
            world.daemon().signal(rustix::process::Signal::HUP);
        } else {
            world.stop();
            world.start();
        }
    }
    world.wait_settled(LIVENESS * 2);
    world.stop();
    assert_order(&seen, 100, 20, 1);
    world.prove();
}

#[test]
fn b13_a_bundle_has_one_message_of_a_key() {
    let mut world = world();
    world.set("destinations.support.bundle", 20);
    let seen = watch(&mut world, |_, number| flaky(number));
    world.drop_file(file("a", 60, 20)).start().wait_settled(LIVENESS * 2);
    world.stop();
    assert_order(&seen, 60, 20, 1);
    let requests = world.requests();
    for request in &requests {
        let keys: HashSet<_> = request.messages().iter().map(|(_, body)| key(body)).collect();
        assert_eq!(keys.len(), request.messages().len());
    }
    assert!(requests.iter().any(|request| request.messages().len() > 5), "they are bundles");
    world.prove();
}

#[test]
fn b13_a_key_that_is_tried_again_for_hours_holds_only_itself() {
    const STUCK: &str = "user-0007";
    let mut world = world();
    world.set("destinations.support.retry.base", "1h").set("destinations.support.retry.cap", "1h");
    let seen = watch(&mut world, |request, _| if key(&request.body) == STUCK { 503 } else { 200 });
    world.drop_file(file("a", 50, 40)).start();
    let begun = Instant::now();
    wait_until(LIVENESS, "the other keys", || {
        seen.lock().expect("no script panics").messages() == 49 * 40 + 1
    });
    println!("49 of 50 keys took {:?}", begun.elapsed());
    let rows_tried = |world: &World| -> HashSet<usize> {
        let requests = world.requests();
        let stuck = requests.iter().filter(|request| key(&request.body) == STUCK);
        stuck.map(|request| place(&request.id).1).collect()
    };
    assert_eq!(rows_tried(&world), HashSet::from([8]));
    // A restart, and a kill, remember whose turn it is.
    world.stop();
    world.start_ready();
    thread::sleep(Duration::from_secs(1));
    world.kill();
    world.start_ready();
    world.drop_file(file("b", 50, 2));
    wait_until(LIVENESS, "the other keys of another file", || {
        seen.lock().expect("no script panics").messages() == 49 * 42 + 2
    });
    assert_eq!(rows_tried(&world), HashSet::from([8]), "no other row of that key was tried");
    world.stop();
}

#[test]
fn b13_of_two_files_the_one_that_was_accepted_first_goes_first() {
    let mut world = world();
    let seen = watch(&mut world, |_, number| flaky(number));
    world.start_ready();
    world.postrider(&["pause", "support"]).ok();
    for name in ["a", "b"] {
        world.drop_file(file(name, 50, 10));
        wait_until(LIVENESS, "the file to be read", || {
            world.file(&format!("{name}.txt")).is_some_and(|file| file["state"] == "ingested")
        });
    }
    world.postrider(&["resume", "support"]).ok();
    wait_until(LIVENESS, "some messages", || seen.lock().expect("no script panics").messages() > 100);
    // What is given back in the middle comes again in its order.
    world.postrider(&["pause", "support"]).ok();
    thread::sleep(Duration::from_secs(1));
    world.postrider(&["resume", "support"]).ok();
    world.wait_settled(LIVENESS * 2);
    world.stop();
    assert_order(&seen, 50, 10, 2);
    world.prove();
}

#[test]
fn b13_a_held_file_is_left_out_and_goes_on_in_its_order() {
    let mut world = world();
    let seen = watch(&mut world, |_, number| flaky(number));
    world.set("destinations.support.concurrency", 4);
    world.drop_file(file("a", 50, 20)).start_ready();
    wait_until(LIVENESS, "some messages", || seen.lock().expect("no script panics").messages() > 100);
    world.postrider(&["hold", "a.txt"]).ok();
    world.drop_file(file("b", 50, 4));
    let of_b = |seen: &Seen| seen.accepted.contains_key("last-of-b");
    wait_until(LIVENESS, "the other file", || of_b(&seen.lock().expect("no script panics")));
    world.postrider(&["release", "a.txt"]).ok();
    world.wait_settled(LIVENESS * 2);
    world.stop();
    let seen = seen.lock().expect("no script panics");
    assert_eq!(seen.together, 0);
    for (key, accepted) in &seen.accepted {
        let mut rows: HashMap<&str, Vec<usize>> = HashMap::new();
        for (file, row) in accepted {
            rows.entry(file).or_default().push(*row);
        }
        assert!(rows.values().all(|rows| rows.is_sorted()), "{key}: {accepted:?}");
    }
    drop(seen);
    world.prove();
}

#[test]
fn b13_a_dead_letter_is_out_of_the_order_and_redriven_never_beside_its_key() {
    const REFUSED: usize = 8;
    let mut world = world();
    let is_healthy = Arc::new(AtomicBool::new(false));
    let healthy = is_healthy.clone();
    let seen = watch(&mut world, move |request, number| {
        let is_refused = place(&request.id).1 == REFUSED && !healthy.load(Ordering::SeqCst);
        if is_refused { 404 } else { flaky(number) }
    });
    let mut input = file("a", 50, 20);
    input.rows[REFUSED - 1].kind = Kind::Sent;
    world.drop_file(input).start();
    wait_until(LIVENESS * 2, "all others", || seen.lock().expect("no script panics").messages() == 50 * 20);
    world.wait_settled(LIVENESS);
    is_healthy.store(true, Ordering::SeqCst);
    world.drop_file(file("b", 50, 20));
    world.postrider(&["dead", "redrive", "--all"]).ok();
    world.redrives += 1;
    wait_until(LIVENESS * 2, "it to be sent", || {
        seen.lock().expect("no script panics").messages() == 2 * (50 * 20 + 1)
    });
    world.wait_settled(LIVENESS);
    world.stop();
    let seen = seen.lock().expect("no script panics");
    assert_eq!(seen.together, 0, "two messages of one key were in flight at once");
    let of_key = &seen.accepted[&format!("user-{:04}", (REFUSED - 1) % 50)];
    assert_eq!(of_key.iter().filter(|(_, row)| *row == REFUSED).count(), 2, "{of_key:?}");
    drop(seen);
    world.prove();
}
