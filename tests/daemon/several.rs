//! Several processes on one outbox and one queue: the main job past one machine (S2, S3), over emulators of SQS
//! and DynamoDB with a proxy in front that counts.

use std::{
    collections::BTreeMap,
    fs, thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    cloud::{Counts, Emulators, Fault, FaultProxy, Rule, sdk_environment},
    support::{LIVENESS, World, inbound::Inbound, input::Input, knob, wait_until},
};

/// The name of the table and of the queues; each test has servers of its own.
const NAME: &str = "postrider";

/// The engines, and what counts the calls to them.
pub(crate) struct Engines {
    _emulators: Emulators,
    pub(crate) sqs: FaultProxy,
    dynamodb: FaultProxy,
}

impl Engines {
    pub(crate) fn start() -> Self {
        let emulators = Emulators::start();
        let sqs = FaultProxy::start(emulators.sqs().endpoint());
        let dynamodb = FaultProxy::start(emulators.dynamodb().endpoint());
        Self { _emulators: emulators, sqs, dynamodb }
    }

    /// A world on these engines, its queue and tables made.
    pub(crate) fn world(&self) -> World {
        let mut world = World::new("csv");
        let environment = sdk_environment(self.sqs.endpoint(), self.dynamodb.endpoint());
        let environment = environment.map(|(name, value)| (name.to_owned(), value)).to_vec();
        let engine = ["--dynamodb", self.dynamodb.endpoint(), NAME].map(str::to_owned).to_vec();
        world.share(environment, engine);
        world
            .set("profile", "aws")
            .set("queue.sqs.prefix", NAME)
            .set("outbox.dynamodb.table", NAME)
            // A test does not wait a minute for what a kill left behind. It must be above twice the timeout.
            .set("lease.duration", "3s")
            .set("destinations.support.timeout", "1s");
        world
    }

    /// Calls since the last reset, by service.
    fn calls(&self) -> (Counts, Counts) {
        (self.sqs.counts(), self.dynamodb.counts())
    }

    fn forget(&self) {
        self.sqs.reset_counts();
        self.dynamodb.reset_counts();
    }
}

pub(crate) fn migrate(world: &mut World) {
    world.configure();
    let answer = world.postrider(&["migrate"]);
    assert_eq!(answer.code, Some(0), "migrate: {}\n{}", answer.stdout, answer.stderr);
}

fn sum(counts: &Counts, operations: &[&str]) -> u64 {
    operations.iter().filter_map(|operation| counts.get(*operation)).map(|count| count.calls).sum()
}

fn total(counts: &Counts) -> u64 {
    counts.values().map(|count| count.calls).sum()
}

fn wall_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
    u64::try_from(now.as_millis()).expect("64 bits")
}

fn number(value: &Value) -> u64 {
    value.as_u64().expect("the oracle counts")
}

#[test]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn two_processes_share_a_file_and_one_is_killed_half_way() {
    let rows = knob("POSTRIDER_ROWS", 20_000);
    let engines = Engines::start();
    let mut world = engines.world();
    world.receive(&["--fail-rate", "0.02", "--seed", "7"]);
    world.set("batch.max_messages", 500).set("record.max_unrecorded", 500);
    // Long enough that the kill falls into the work.
    let rate = i64::try_from(rows / 6).expect("rows are few");
    world.set("destinations.support.rate_per_s", rate.max(100)).set("destinations.support.burst", 50);
    migrate(&mut world);
    world.start_ready();
    world.start_peer("second").start_peer("third");
    world.drop_file(Input::csv("shared.csv", usize::try_from(rows).expect("64 bits")));
    world.wait_requests(usize::try_from(rows / 2).expect("64 bits"));
    world.kill_peer("second");
    world.wait_settled(LIVENESS * 2);
    world.stop_peers();
    world.stop();
    let summary = world.prove();
    println!("{summary}");
    assert_eq!(number(&summary["sent"]), rows);
}

#[test]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn f60_reloads_of_one_of_two_processes_repeat_nothing() {
    const ROWS: usize = 6_000;
    let engines = Engines::start();
    let mut world = engines.world();
    world
        .receive(&["--latency-ms", "100"])
        .set("record.max_unrecorded", 500)
        .set("destinations.support.rate_per_s", 600)
        .set("destinations.support.burst", 50);
    migrate(&mut world);
    world.start_ready().start_peer("second");
    world.drop_file(Input::csv("reloaded.csv", ROWS));
    for reload in 1..=3 {
        world.wait_requests(reload * 1_200);
        world.set("destinations.support.retry.cap", format!("{}ms", 200 + reload)).configure();
        world.daemon().signal(Signal::HUP);
        let notify = &mut world.notify;
        wait_until(LIVENESS, "the new configuration in use", || notify.count("READY=1") > reload);
    }
    world.wait_settled(LIVENESS * 2);
    world.stop_peers();
    world.stop();
    assert_eq!(world.prove()["requests"], ROWS);
}

#[test]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn the_process_that_read_the_file_is_killed_and_another_carries_it_on() {
    let rows = 5_000;
    let engines = Engines::start();
    let mut world = engines.world();
    world.receive(&[]);
    world.set("record.max_unrecorded", 500);
    world.set("destinations.support.rate_per_s", 1500).set("destinations.support.burst", 50);
    migrate(&mut world);
    world.start_ready();
    world.start_peer("second");
    world.drop_file(Input::csv("orphaned.csv", rows));
    world.wait_requests(rows / 4);
    world.kill();
    // Whatever the killed one accepted is delivered by the other, whatever it did not is read again.
    thread::sleep(Duration::from_secs(2));
    world.start().wait_settled(LIVENESS * 2);
    world.stop_peers();
    world.stop();
    let summary = world.prove();
    assert_eq!(number(&summary["sent"]), rows as u64);
}

#[test]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn calls_per_thousand_messages_are_few_and_one_message_per_entry_is_the_seed_s_count() {
    let mut rows_of = Vec::new();
    for (max_messages, rows) in [(500, knob("POSTRIDER_ROWS", 20_000)), (1, 1000)] {
        let engines = Engines::start();
        let mut world = engines.world();
        world.receive(&[]);
        world.set("batch.max_messages", i64::from(max_messages)).set("lease.duration", "60s");
        migrate(&mut world);
        world.start_ready();
        engines.forget();
        world.drop_file(Input::csv("counted.csv", usize::try_from(rows).expect("64 bits")));
        world.wait_requests(usize::try_from(rows).expect("64 bits"));
        // What is read to look at it is not the job's.
        thread::sleep(Duration::from_secs(3));
        let (sqs, dynamodb) = engines.calls();
        world.wait_settled(LIVENESS);
        world.stop();
        let summary = world.prove();
        assert_eq!(number(&summary["sent"]), rows);
        let per_thousand = |calls: u64| calls as f64 * 1000.0 / rows as f64;
        let send = per_thousand(sum(&sqs, &["SendMessageBatch", "SendMessage"]));
        let receive = per_thousand(sum(&sqs, &["ReceiveMessage", "DeleteMessageBatch", "DeleteMessage"]));
        let store = per_thousand(total(&dynamodb));
        let by_operation: BTreeMap<_, _> =
            sqs.iter().chain(&dynamodb).map(|(operation, count)| (operation.clone(), count.calls)).collect();
        println!(
            "max_messages {max_messages}, {rows} rows, calls per 1000 messages: send {send:.2}, \
             receive + delete {receive:.2}, DynamoDB {store:.2}; {by_operation:?}"
        );
        rows_of.push((send, receive, store));
    }
    let (send, receive, store) = rows_of[0];
    assert!(send <= 3.0 && receive <= 3.0 && store <= 10.0, "batched: {:?}", rows_of[0]);
    let (send, ..) = rows_of[1];
    // On a busy machine a dispatch may find fewer than ten entries ready.
    assert!((99.5..=110.0).contains(&send), "the seed counts 100 sends per 1000 messages, not {send}");
}

/// Each reads it, cuts it where it likes, and takes up from where another was faster: no failure, no restart, one request
/// per row.
#[test]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn f62_the_same_file_dropped_on_three_machines_is_sent_once() {
    let rows = usize::try_from(knob("POSTRIDER_ROWS", 20_000)).expect("64 bits");
    let engines = Engines::start();
    let mut world = engines.world();
    world.receive(&[]);
    // Nothing is sent twice because a busy machine was late.
    world.set("lease.duration", "60s").set("batch.max_messages", 100);
    world.set("destinations.support.timeout", "20s");
    migrate(&mut world);
    world.start_ready();
    // Machines that are configured differently for a while cut differently.
    world.set("batch.max_messages", 70).start_peer("second");
    world.set("batch.max_messages", 130).start_peer("third");
    let input = Input::csv("shared.csv", rows);
    for peer in ["second", "third"] {
        let (feed, staged) = (world.path(peer).join("alerts"), world.path("staged"));
        wait_until(LIVENESS, "the peer's feed is there", || feed.is_dir());
        fs::write(&staged, &input.bytes).expect("the directory is ours");
        fs::copy(&staged, feed.join(".shared")).expect("the directory is ours");
        fs::rename(feed.join(".shared"), feed.join("shared.csv")).expect("one directory");
    }
    world.drop_file(input);
    let patience = LIVENESS * 2 + Duration::from_millis(rows as u64);
    let begun = Instant::now();
    world.wait_settled(patience);
    println!("{rows} rows in {:.0?}", begun.elapsed());
    let closed = |peer: &str| world.path(peer).join("alerts/done/shared.csv").exists();
    wait_until(patience, "all of them have read it", || closed("second") && closed("third"));
    world.stop_peers();
    world.stop();
    let summary = world.prove();
    println!("{summary}");
    assert_eq!((number(&summary["sent"]), number(&summary["requests"])), (rows as u64, rows as u64));
    let log = fs::read_to_string(world.daemon_log()).expect("it was written");
    assert!(!log.contains("will be restarted"), "a stage failed:\n{log}");
}

/// However long a backlog waits for its rate, and whichever machine sends it: the queue stays shallow, and what is in it is
/// not sent again.
#[test]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn b19_a_backlog_behind_a_rate_sends_each_hint_at_most_twice() {
    const BATCH: u32 = 10;
    const RATE: u32 = 200;
    let rows = knob("POSTRIDER_ROWS", 4_000);
    let count = usize::try_from(rows).expect("64 bits");
    let engines = Engines::start();
    let mut world = engines.world();
    world.receive(&[]);
    world.set("lease.duration", "60s").set("batch.max_messages", i64::from(BATCH));
    world.set("destinations.support.rate_per_s", i64::from(RATE)).set("destinations.support.burst", 20);
    migrate(&mut world);
    world.start_ready();
    world.start_peer("second").start_peer("third");
    engines.forget();
    let begun = Instant::now();
    world.drop_file(Input::csv("backlog.csv", count));
    wait_until(LIVENESS + Duration::from_millis(rows * 1_500 / u64::from(RATE)), "all requests", || {
        thread::sleep(Duration::from_millis(200));
        world.request_count() >= count
    });
    let (sqs, dynamodb) = engines.calls();
    let seconds = begun.elapsed().as_secs();
    world.wait_settled(LIVENESS);
    world.stop_peers();
    world.stop();
    let sent = sqs.get("SendMessageBatch").map_or(0, |count| count.items);
    let batches = rows.div_ceil(u64::from(BATCH));
    println!("{rows} rows in {batches} batches, {seconds} s: {sent} hints; {sqs:?}; {dynamodb:?}");
    assert!((batches..=batches * 2).contains(&sent), "{sent} hints of {batches} batches");
    // A machine looks at what is due every 15 s, and no more often at a file that another one reads.
    let queries = sum(&dynamodb, &["Query"]);
    assert!(queries <= 60 + seconds * 2, "{queries} queries in {seconds} s");
    let summary = world.prove();
    assert_eq!((number(&summary["sent"]), number(&summary["requests"])), (rows, rows));
}

/// What an operator says holds for every machine, and for what their workers have leased, too.
#[test]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn b25_a_pause_stops_every_machine_within_two_seconds() {
    const ROWS: usize = 6_000;
    let engines = Engines::start();
    let mut world = engines.world();
    world.receive(&[]);
    // Each worker leases for more seconds ahead than a pause may take.
    world.set("lease.duration", "60s").set("batch.max_messages", 100);
    world.set("destinations.support.rate_per_s", 300).set("destinations.support.burst", 20);
    migrate(&mut world);
    world.start_ready();
    world.start_peer("second");
    world.drop_file(Input::csv("paused.csv", ROWS));
    world.wait_requests(2_000);
    world.postrider(&["pause", "support", "--reason", "a look at the receiver"]).ok();
    let paused_ms = wall_ms();
    thread::sleep(Duration::from_secs(6));
    let late = world.request_times().into_iter().filter(|&at| at > paused_ms + 2_000).count();
    assert_eq!(late, 0, "requests more than 2 s after the pause");
    let sent = world.request_count();
    assert!(sent < ROWS, "it was over before it was paused");
    world.postrider(&["resume", "support"]).ok();
    let resumed_ms = wall_ms();
    world.wait_settled(LIVENESS);
    world.stop_peers();
    world.stop();
    let times = world.request_times();
    println!(
        "{sent} requests before; the last one {} ms after the pause, the next one {} ms after the end of it",
        times[sent - 1].saturating_sub(paused_ms),
        times[sent] - resumed_ms
    );
    assert!(times[sent] < resumed_ms + 3_000, "it did not go on");
    let summary = world.prove();
    assert_eq!((number(&summary["sent"]), number(&summary["requests"])), (ROWS as u64, ROWS as u64));
}

/// A role that may not make one of the calls: the daemon says so, asks seldom, and goes on when it may. Nothing is lost
/// and nothing is sent twice.
#[test]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn f64_a_permission_that_is_missing_is_waited_for_and_nothing_is_sent_twice() {
    const ROWS: usize = 400;
    // Storing rows, storing batches and recording, claiming.
    for operation in ["BatchWriteItem", "TransactWriteItems", "BatchExecuteStatement"] {
        let engines = Engines::start();
        let mut world = engines.world();
        world.receive(&[]);
        world.set("lease.duration", "60s").set("batch.max_messages", 50);
        world.set("destinations.support.rate_per_s", 100).set("destinations.support.burst", 10);
        migrate(&mut world);
        world.start_ready();
        let denied = || Rule::on(operation, Fault::Error { status: 400, code: "AccessDeniedException" });
        engines.dynamodb.inject(denied());
        engines.forget();
        world.drop_file(Input::csv("denied.csv", ROWS));
        thread::sleep(Duration::from_secs(4));
        let asked = sum(&engines.dynamodb.counts(), &[operation]);
        assert!((1..=40).contains(&asked), "{operation} was asked for {asked} times in 4 s");
        engines.dynamodb.clear_faults();
        // And once more in the middle of it.
        world.wait_requests(ROWS / 4);
        engines.dynamodb.inject(denied());
        thread::sleep(Duration::from_secs(3));
        engines.dynamodb.clear_faults();
        world.wait_settled(LIVENESS);
        world.stop();
        let summary = world.prove();
        assert_eq!(
            (number(&summary["sent"]), number(&summary["requests"])),
            (ROWS as u64, ROWS as u64),
            "{operation}"
        );
        let log = fs::read_to_string(world.daemon_log()).expect("it was written");
        assert!(log.contains("AccessDeniedException"), "{operation}: nothing was said:\n{log}");
    }
}

/// What a thousand messages cost in calls to DynamoDB, whatever their pace: everything that the daemon does meanwhile, but for
/// the one read a second by which a machine knows what is paused (B25), whether it sends or not.
#[test]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn a_thousand_messages_cost_few_dynamodb_calls_at_any_rate() {
    let mut exceeded = Vec::new();
    // A burst costs so many per thousand; at a rate it is a thousand.
    for (rate, rows, most) in [(None, 20_000, 6), (Some(500), 1_000, 15), (Some(100), 1_000, 30)] {
        let engines = Engines::start();
        let mut world = engines.world();
        world.receive(&[]);
        // As it is by default: what a record costs depends on it.
        world.set("lease.duration", "60s").set("batch.max_messages", 500);
        if let Some(rate) = rate {
            world.set("destinations.support.rate_per_s", rate).set("destinations.support.burst", 50);
        }
        migrate(&mut world);
        world.start_ready();
        thread::sleep(Duration::from_secs(3));
        engines.forget();
        let begun = Instant::now();
        world.drop_file(Input::csv("counted.csv", rows));
        world.wait_requests(rows);
        // The last outcomes linger for a second; what is looked at later is not the messages' cost.
        thread::sleep(Duration::from_millis(1_500));
        let (_, dynamodb) = engines.calls();
        let seconds = begun.elapsed().as_secs();
        world.wait_settled(LIVENESS);
        world.stop();
        assert_eq!(number(&world.prove()["sent"]), rows as u64);
        let calls: BTreeMap<_, _> =
            dynamodb.iter().map(|(operation, count)| (operation, count.calls)).collect();
        println!("{rows} messages at {rate:?}/s: {} calls in {seconds} s, {calls:?}", total(&dynamodb));
        // Beside them, the file and the rate's table are read once.
        let reads = sum(&dynamodb, &["GetItem"]);
        assert!(reads <= seconds + 4, "{reads} reads in {seconds} s");
        let per_thousand = (total(&dynamodb) - reads.min(seconds)) * 1_000 / rows as u64;
        if per_thousand > most {
            exceeded.push((rate, most, per_thousand));
        }
    }
    assert!(exceeded.is_empty(), "rate, allowed, made: {exceeded:?}");
}

#[test]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn s3_1_a_look_at_an_empty_outbox_of_five_destinations_costs_as_many_calls_as_segments() {
    const SEGMENTS: u64 = 4;
    let engines = Engines::start();
    let mut world = engines.world();
    world.receive(&[]);
    for name in ["second", "third", "fourth", "fifth"] {
        world.add_destination(name);
        world.set(&format!("destinations.{name}.timeout"), "1s");
    }
    let segments = i64::try_from(SEGMENTS).expect("it is small");
    world.set("outbox.dynamodb.shards", 20).set("outbox.dynamodb.scan_concurrency", segments);
    migrate(&mut world);
    world.start_ready();
    thread::sleep(Duration::from_secs(3));
    engines.forget();
    // A sweep every 15 s, which counts the backlog for the metrics, too.
    thread::sleep(Duration::from_secs(17));
    let (_, dynamodb) = engines.calls();
    world.stop();
    println!("idle for 17 s: {dynamodb:?}");
    let queries = sum(&dynamodb, &["Query"]);
    assert!(queries >= SEGMENTS, "nothing was looked at: {dynamodb:?}");
    // Beside the looks, it reads the list of destinations, the depth and the open files now and then.
    assert!(queries <= SEGMENTS * 2 + 6, "{queries} queries in two looks: {dynamodb:?}");
    // The seed asks each shard of each topic: 100 queries per look.
    assert_eq!(sum(&dynamodb, &["Scan"]), 0, "{dynamodb:?}");
}

#[test]
#[ignore = "needs emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE; script/test installs them"]
fn three_processes_keep_a_destination_s_rate_while_one_is_killed_and_one_joins() {
    const RATE: u64 = 400;
    let engines = Engines::start();
    let mut world = engines.world();
    world.receive(&[]);
    let rate = i64::try_from(RATE).expect("it is small");
    world.set("batch.max_messages", 50);
    world.set("destinations.support.rate_per_s", rate);
    // What a loaded machine's late timers hold back may follow at once, within the twentieth allowed below.
    world.set("destinations.support.burst", rate / 20);
    migrate(&mut world);
    world.start_ready();
    world.start_peer("second").start_peer("third");
    world.drop_file(Input::csv("rated.csv", usize::try_from(RATE * 40).expect("it is small")));
    world.wait_requests(usize::try_from(RATE * 10).expect("it is small"));
    world.kill_peer("second");
    let killed = world.request_count();
    wait_until(LIVENESS, "the rate after the kill", || {
        world.request_count() as u64 >= killed as u64 + RATE * 10
    });
    world.start_peer("fourth");
    world.wait_settled(LIVENESS * 2);
    world.stop_peers();
    world.stop();
    world.prove();
    let times = world.request_times();
    let first = times[0];
    // Sliding windows of one second over every request's arrival.
    let mut begin = 0;
    let mut most = 0;
    for (end, &at) in times.iter().enumerate() {
        while at - times[begin] >= 1000 {
            begin += 1;
        }
        most = most.max(end - begin + 1);
    }
    let mut per_second = BTreeMap::<u64, u64>::new();
    for at in &times {
        *per_second.entry((at - first) / 1000).or_default() += 1;
    }
    println!("most in any second: {most}; per second: {:?}", per_second.values().collect::<Vec<_>>());
    // The receiver stamps a request when it has read it: a few that were sent before a second's beginning
    // arrive within it.
    assert!(most as u64 <= RATE + RATE / 20, "{most} requests in one second, the limit is {RATE}");
    let seconds = per_second.len() as u64;
    let full = |second: u64| per_second.get(&second).copied().unwrap_or(0) * 10 >= RATE * 9;
    // From any second on, the rate is back within ten, but for the last ones, when the file runs out.
    for second in 0..seconds.saturating_sub(12) {
        assert!((second..=second + 10).any(full), "no full second within 10 s of second {second}");
    }
    let at_full = (0..seconds).filter(|&second| full(second)).count() as u64;
    assert!(at_full * 2 >= seconds, "only {at_full} of {seconds} seconds reached 90 % of the limit");
}

/// What the test says when it panics inside the daemon.
const INJECTED: &str = "injected by the test";

#[test]
#[ignore = "needs --features failpoints and emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE"]
fn f02_f14_a_coordinator_that_crashes_and_panics_loses_and_doubles_nothing() {
    const ROWS: usize = 2_000;
    let engines = Engines::start();
    let mut world = engines.world();
    world.receive(&["--fail-rate", "0.02", "--seed", "7"]);
    migrate(&mut world);
    world.drop_file(Input::csv("first.csv", ROWS));
    world.fail("dispatch.sent=1*return").start();
    assert_ne!(world.wait_exit(LIVENESS).code(), Some(0), "dispatch.sent was not reached");
    world.kills += 1;
    world.fail(&format!("panic.coordinator=1*off->1*panic({INJECTED})")).start();
    world.daemon().wait_log(INJECTED);
    world.drop_file(Input::csv("second.csv", ROWS));
    world.wait_settled(LIVENESS * 2);
    world.stop();
    let summary = world.prove();
    assert_eq!(number(&summary["sent"]), 2 * ROWS as u64);
}

/// Entries of an inbound queue become messages once each, whatever crashes at `point`, on the embedded stores
/// or on shared ones.
fn a_queue_feed_survives(point: &str, shared: bool) {
    const ENTRIES: usize = 60;
    const ROWS: usize = 10;
    let engines = Engines::start();
    let inbound = Inbound::new(engines.sqs.endpoint());
    let mut world = engines.world();
    world.receive(&["--log-bodies"]);
    world
        .set("feeds.inbound.kind", "sqs")
        .set("feeds.inbound.queue", Inbound::NAME)
        .set("feeds.inbound.format", "json")
        .set("feeds.inbound.recipient", "user")
        .set("feeds.inbound.destinations", vec!["support"])
        .set("feeds.inbound.max_rows", 40)
        .set("feeds.inbound.linger", "100ms")
        .set("feeds.inbound.visibility", "30s");
    if shared {
        migrate(&mut world);
    } else {
        world.set("profile", "embedded").read_embedded();
    }
    let bodies: Vec<_> = (0..ENTRIES)
        .map(|entry| {
            let rows = (0..ROWS).map(|row| json!({"user": format!("u-{entry}-{row}")}));
            rows.collect::<Value>().to_string()
        })
        .collect();
    inbound.send(&bodies);
    for point in [point, "panic.queue_feed"] {
        if point.starts_with("panic") {
            world.fail(&format!("{point}=1*off->1*panic({INJECTED})")).start();
            world.daemon().wait_log(INJECTED);
            assert!(world.daemon().is_running(), "one panic is no reason to exit");
        } else {
            world.fail(&format!("{point}=1*off->1*return")).start();
            assert_ne!(world.wait_exit(LIVENESS).code(), Some(0), "{point} was not reached");
        }
    }
    // What the crash held comes again after its visibility timeout.
    wait_until(LIVENESS * 2, "every entry to be delivered", || {
        thread::sleep(Duration::from_millis(200));
        world.recipients("user").len() == ENTRIES * ROWS
    });
    wait_until(LIVENESS * 2, "every entry to be deleted", || {
        thread::sleep(Duration::from_millis(200));
        inbound.left() == 0
    });
    world.stop();
    let recipients = world.recipients("user");
    assert!(recipients.values().all(|ids| ids.len() == 1), "a recipient became two messages");
    let files = world.files();
    let total = |key: &str| files.iter().map(|file| number(&file[key])).sum::<u64>();
    assert_eq!((total("rows"), total("rejected")), ((ENTRIES * ROWS) as u64, 0));
    assert!(files.iter().all(|file| file["balanced"] == true), "{files:?}");
}

#[test]
#[ignore = "needs --features failpoints and emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE"]
fn f48_a_queue_feed_that_crashes_before_the_append_takes_each_entry_once() {
    a_queue_feed_survives("intake.append.before", true);
}

#[test]
#[ignore = "needs --features failpoints and emulators: POSTRIDER_MINISTACK and POSTRIDER_DYNOXIDE"]
fn f48_a_queue_feed_that_crashes_after_the_append_takes_each_entry_once() {
    a_queue_feed_survives("intake.append.after", false);
}
