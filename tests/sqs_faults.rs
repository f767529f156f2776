//! F46 and F48: what SQS and the way to it may do, and that no message is lost or sent twice by it.
//!
//! The oracle is the test's own: a worker that notes every request, and what it was given to deliver.
#![cfg(feature = "aws")]

#[path = "cloud/mod.rs"]
mod cloud;
#[path = "sqs/mod.rs"]
mod sqs;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use aws_sdk_sqs::types::Message;
use cloud::{Fault, Rule};
use postrider::clock::SystemClock;
use postrider_actors::{
    coordinator::{CarrySetup, SharedQueue},
    flow::{Bell, ProgressBoard},
    metrics::StageMetrics,
    model::{batch::Rows, ids::FileId, ledger::MessageVerdict, outcome::Verdict, time::UnixMs},
    ports::{
        Clock as _, Hint, Lease, LeaseRequest, Ledger as _, Outbox as _, Outgoing, Queue as _, Release,
        Settled, Settlement, Transport as _, Want,
    },
    testing::{MemoryStore, figure, fixtures},
};
use postrider_aws::sqs::SqsTransport;
use postrider_settings::Sqs;
use postrider_settings::{Delay, Keys as _};
use sqs::Queues;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

/// How long leases hold.
const LEASE: Duration = Duration::from_secs(10);

/// A process at the queues, with a coordinator that keeps them going.
struct Process {
    queue: Arc<SharedQueue>,
    carry: JoinHandle<()>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.carry.abort();
    }
}

/// One store, one queue for each of `d` and `e`, and processes at them.
struct World {
    queues: Queues,
    store: Arc<MemoryStore>,
    names: Sqs,
    transport: Arc<SqsTransport>,
    processes: Vec<Process>,
    /// Requests per message.
    requests: BTreeMap<(FileId, u64), u32>,
    accepted: BTreeSet<(FileId, u64)>,
    files: u8,
}

impl World {
    async fn new(processes: usize) -> Self {
        Self::with_queues(false, &["d", "e"], processes).await
    }

    async fn with_queues(fifo: bool, destinations: &[&str], processes: usize) -> Self {
        let queues = Queues::start();
        let names = queues.create(fifo, destinations).await;
        let transport = queues.transport(&names);
        let mut world = Self {
            store: Arc::new(MemoryStore::new()),
            names,
            transport,
            processes: Vec::new(),
            requests: BTreeMap::new(),
            accepted: BTreeSet::new(),
            files: 0,
            queues,
        };
        for number in 0..processes {
            world.processes.push(world.process(&format!("node-{number}-1")));
        }
        world
    }

    fn process(&self, name: &str) -> Process {
        let clock = Arc::new(SystemClock);
        let (transport, store) = (self.queues.transport(&self.names), self.store.clone());
        let queue = SharedQueue::new(transport, store.clone(), clock.clone(), name.into(), Bell::default());
        let queue = Arc::new(queue);
        let setup = CarrySetup {
            queue: queue.clone(),
            ledger: store,
            destinations: vec!["d".into(), "e".into()],
            paused: Vec::new(),
            delay: Delay::declared(),
            metrics: StageMetrics::default().queue(),
            progress: ProgressBoard::default().mark("coordinator"),
        };
        let carry = tokio::spawn(async move { setup.run().await.expect("the store refuses nothing") });
        Process { queue, carry }
    }

    /// Stores `batches` batches of `rows` rows for `destination`.
    async fn append(&mut self, destination: &str, batches: u64, rows: u64) {
        self.files += 1;
        let file = fixtures::file("feed", self.files, &[destination]);
        let now = SystemClock.wall();
        for batch in 0..batches {
            let step = fixtures::step(&file, batch * rows + 1..=(batch + 1) * rows, now);
            self.store.append(step).await.unwrap();
        }
        self.accepted.extend((1..=batches * rows).map(|row| (file.id, row)));
        self.processes.iter().for_each(|process| process.queue.bell().ring());
    }

    async fn lease(&self, process: usize, destination: &str, limit: usize) -> Vec<Lease> {
        let until = SystemClock.mono().after(LEASE);
        let wants = vec![Want::new(destination, usize::MAX, limit)];
        let request =
            LeaseRequest { holder: "w".into(), wants, until, now: SystemClock.wall(), born: UnixMs(0) };
        self.processes[process].queue.lease(request).await.unwrap()
    }

    /// Asks until there is a lease.
    async fn lease_one(&self, process: usize, destination: &str) -> Lease {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(lease) = self.lease(process, destination, 1).await.pop() {
                return lease;
            }
            sleep(Duration::from_millis(20)).await;
            assert!(Instant::now() < until, "nothing comes");
        }
    }

    /// Sends every open message of a lease once and settles it.
    async fn work(&mut self, process: usize, lease: &Lease) {
        let rows = Rows::decode(lease.payload.clone()).unwrap();
        for open in &lease.open {
            *self.requests.entry((lease.header.file, rows.row(open.index as usize))).or_default() += 1;
        }
        let sent = Verdict::Sent { at: SystemClock.wall(), status: 200 };
        let settlement = settlement(lease, lease.open.iter().map(|open| open.verdict(sent)).collect());
        let settled = self.store.settle(vec![settlement]).await.unwrap()[0];
        let queue = &self.processes[process].queue;
        match settled {
            Settled::Complete | Settled::Released => queue.acknowledge(&[lease.token]).await.unwrap(),
            Settled::Open | Settled::Stale => queue.release(&[lease.token], Release::Unused).await.unwrap(),
        }
    }

    /// Delivers everything of `destination` that is open there, with leases held for a while.
    async fn deliver(&mut self, destination: &str) {
        let until = Instant::now() + PATIENCE;
        while self.open(destination) > 0 {
            let mut in_hand = Vec::new();
            for process in 0..self.processes.len() {
                for lease in self.lease(process, destination, 3).await {
                    in_hand.push((process, lease));
                }
            }
            sleep(Duration::from_millis(20)).await;
            for (process, lease) in in_hand {
                self.work(process, &lease).await;
            }
            assert!(Instant::now() < until, "{} messages are open", self.open(destination));
        }
    }

    /// The same, until the queue is empty too.
    async fn deliver_all(&mut self) {
        self.deliver("d").await;
        let until = Instant::now() + PATIENCE;
        loop {
            // What is left is refused by the store, once it is received.
            for process in 0..self.processes.len() {
                assert!(self.lease(process, "d", 3).await.is_empty());
            }
            sleep(Duration::from_millis(100)).await;
            let depth = self.transport.depth("d").await;
            if depth.as_ref().is_ok_and(|depth| depth.total() == 0) {
                break;
            }
            assert!(Instant::now() < until, "the queue holds {depth:?}");
        }
    }

    fn open(&self, destination: &str) -> u64 {
        self.store.open_at(destination)
    }

    /// I1, I3, I5: every accepted message was requested, exactly once, and no other.
    fn assert_each_once(&self) {
        let requested: BTreeSet<_> = self.requests.keys().copied().collect();
        assert_eq!(requested, self.accepted);
        let repeated: Vec<_> = self.requests.iter().filter(|(_, requests)| **requests != 1).collect();
        assert!(repeated.is_empty(), "{repeated:?}");
        assert_eq!(self.queues.proxy.problems(), Vec::<String>::new());
    }

    fn inject(&self, rule: Rule) {
        self.queues.proxy.inject(rule);
    }

    async fn dead_letters(&self) -> Vec<Message> {
        let url = self.queues.url(&self.names.dead_letters()).await;
        let receive = self.queues.direct.receive_message().queue_url(url);
        let receive = receive.max_number_of_messages(10).message_attribute_names("All");
        receive.send().await.unwrap().messages.unwrap_or_default()
    }
}

fn settlement(lease: &Lease, verdicts: Vec<MessageVerdict>) -> Settlement {
    Settlement {
        token: lease.token,
        verdicts,
        details: BTreeMap::new(),
        records: Vec::new(),
        ends: false,
        begins: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f46_of_a_call_only_what_failed_is_sent_again() {
    let mut world = World::new(1).await;
    world.inject(Rule::on("SendMessageBatch", Fault::fail_entries(3)).next(2));
    world.append("d", 20, 5).await;
    world.deliver_all().await;
    let sent = world.queues.proxy.counts()["SendMessageBatch"];
    assert_eq!(sent.items, 26, "twenty, and the six that failed: {sent:?}");
    world.assert_each_once();
    figure("20 batches, 2 calls of which 3 of 10 entries fail: 26 entries sent, each message once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f46_calls_that_fail_as_a_whole_are_made_again() {
    let mut world = World::new(1).await;
    for fault in [
        Fault::sqs_throttled(),
        Fault::internal_error(),
        Fault::unavailable(),
        Fault::Close { forward: false },
    ] {
        world.inject(Rule::on("SendMessageBatch", fault).next(1));
    }
    world.append("d", 10, 5).await;
    world.deliver_all().await;
    assert_eq!(world.queues.proxy.injected("SendMessageBatch"), 4);
    world.assert_each_once();
    figure(
        "10 batches, 4 calls that fail (throttled, 500, 503, closed before they arrive): each message once",
    );
}

/// Whether it was accepted is unknown: the depth decides, and nothing is sent twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f46_a_timeout_after_the_accept_doubles_nothing() {
    let mut world = World::new(2).await;
    world.processes.truncate(1);
    world.inject(Rule::on("SendMessageBatch", Fault::Hang { forward: true }).next(1));
    world.append("d", 10, 5).await;
    world.deliver_all().await;
    assert_eq!(world.queues.proxy.injected("SendMessageBatch"), 1);
    assert_eq!(world.queues.proxy.counts()["SendMessageBatch"].items, 10);
    world.assert_each_once();
    figure("10 batches, accepted and never answered: 10 entries in the queue, each message once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f48_duplicates_disorder_and_expired_visibility_double_no_request() {
    let mut world = World::new(2).await;
    world.inject(Rule::on("SendMessageBatch", Fault::Scatter { delay_s_max: 2 }));
    let duplicate = Fault::Duplicate { messages: 3, delay_s: 1 };
    let expire = Fault::ExpireVisibility { messages: 3, after: Duration::from_millis(20) };
    world.inject(Rule::on("ReceiveMessage", duplicate).with_probability(0.5, 1));
    world.inject(Rule::on("ReceiveMessage", expire).with_probability(0.5, 2));
    world.inject(Rule::on("ReceiveMessage", Fault::Reorder));
    world.append("d", 60, 5).await;
    world.deliver("d").await;
    assert!(world.queues.proxy.injected("ReceiveMessage") > 5);
    world.assert_each_once();
    figure(
        "60 batches by 2 processes, half of the receives with duplicates or expired entries: each message once",
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f48_what_can_t_be_deleted_is_deleted_later() {
    let mut world = World::new(1).await;
    world.inject(Rule::on("DeleteMessageBatch", Fault::fail_entries(4)).next(2));
    world.inject(Rule::on("DeleteMessageBatch", Fault::internal_error()).skip(2).next(3));
    world.append("d", 20, 5).await;
    world.deliver_all().await;
    assert_eq!(world.queues.proxy.injected("DeleteMessageBatch"), 5);
    world.assert_each_once();
    figure("20 batches, 5 deletes that fail: each message once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f48_what_can_t_be_read_goes_to_the_dead_letters_with_the_reason_and_what_is_unknown_goes() {
    let mut world = World::new(1).await;
    let url = world.queues.url(&world.names.queue_name("d")).await;
    let bodies = ["no entry, but user-secret", r#"{"version":9,"batch":"x"}"#];
    for body in bodies {
        world.queues.direct.send_message().queue_url(&url).message_body(body).send().await.unwrap();
    }
    // A batch of another store.
    let file = fixtures::file("feed", 200, &["d"]);
    let batch = fixtures::batch(&file, "d", 1..=5, SystemClock.wall()).id;
    let foreign = Outgoing { hint: Hint { batch, due: SystemClock.wall() }, sending: 1, lane: 1 };
    world.transport.send("d", &[foreign], Duration::ZERO).await.unwrap();
    world.append("d", 5, 5).await;
    world.deliver_all().await;
    world.assert_each_once();
    let mut reasons: Vec<_> = world
        .dead_letters()
        .await
        .iter()
        .map(|letter| {
            let attributes = letter.message_attributes().expect("it says why");
            attributes["postrider-reason"].string_value().unwrap().to_owned()
        })
        .collect();
    reasons.sort();
    assert_eq!(
        reasons.len(),
        2,
        "B18: an entry is a hint, and this store knows of nothing to do: {reasons:?}"
    );
    assert!(reasons[0].starts_with("not an entry: not JSON"), "{reasons:?}");
    assert!(reasons[1].starts_with("version 9"), "{reasons:?}");
    assert!(!reasons.concat().contains("secret"));
}

/// B18: what a lease leaves comes as another entry, which no queue may take for a repetition.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn what_a_lease_leaves_comes_again_from_the_store_when_it_is_due() {
    for fifo in [false, true] {
        let mut world = World::with_queues(fifo, &["d", "e"], 1).await;
        world.append("d", 1, 5).await;
        let lease = world.lease_one(0, "d").await;
        // Given back, it is due at once, as it was before.
        world.processes[0].queue.release(&[lease.token], Release::Unused).await.unwrap();
        let lease = world.lease_one(0, "d").await;
        let due = SystemClock.wall().after(Duration::from_secs(2));
        let retry = Verdict::Retry { attempt: fixtures::failed(SystemClock.wall()), not_before: due };
        let sent = Verdict::Sent { at: SystemClock.wall(), status: 200 };
        let verdicts = lease.open.iter().map(|open| open.verdict(if open.index == 3 { retry } else { sent }));
        let mut settlement = settlement(&lease, verdicts.collect());
        settlement.ends = true;
        assert_eq!(world.store.settle(vec![settlement]).await.unwrap(), [Settled::Released]);
        world.processes[0].queue.acknowledge(&[lease.token]).await.unwrap();
        let rest = world.lease_one(0, "d").await;
        let now = SystemClock.wall();
        assert!(now >= due && now < due.after(Duration::from_secs(3)), "when it is due, and soon then");
        assert_eq!(rest.payload, lease.payload);
        assert_eq!(rest.open.iter().map(|open| (open.index, open.tries)).collect::<Vec<_>>(), [(3, 1)]);
        world.work(0, &rest).await;
        world.deliver_all().await;
    }
}

/// F43 at the queue: a destination with hundreds of batches that nobody wants.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f43_a_blocked_destination_with_hundreds_of_batches_blocks_no_other() {
    let mut world = World::new(1).await;
    world.append("e", 300, 2).await;
    world.append("d", 10, 5).await;
    let begun = Instant::now();
    world.deliver("d").await;
    eprintln!("10 batches beside 300 of a blocked destination took {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(10));
    let depth = world.transport.depth("e").await.unwrap();
    assert!(depth.total() <= 20, "B19: shallow, {depth:?}");
    // Wanted, they come.
    world.deliver("e").await;
    world.assert_each_once();
}

/// Issue 11: what SQS loses goes out again by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f63_a_queue_that_is_purged_or_made_anew_loses_nothing() {
    let mut world = World::new(1).await;
    world.append("d", 30, 2).await;
    sleep(Duration::from_secs(1)).await;
    let name = world.names.queue_name("d");
    let url = world.queues.url(&name).await;
    world.queues.direct.purge_queue().queue_url(&url).send().await.unwrap();
    world.deliver("d").await;
    world.append("d", 30, 2).await;
    sleep(Duration::from_secs(1)).await;
    world.queues.direct.delete_queue().queue_url(&url).send().await.unwrap();
    world.queues.direct.create_queue().queue_name(&name).send().await.unwrap();
    world.deliver("d").await;
    world.assert_each_once();
    figure("a purge and a deletion with 30 batches each in the queue: each message sent once");
}

/// B24: a missing queue stops its destination only, until it is made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn a_missing_queue_stops_its_destination_only() {
    let mut world = World::with_queues(false, &["d"], 1).await;
    world.append("e", 10, 2).await;
    world.append("d", 10, 2).await;
    world.deliver("d").await;
    assert_eq!(world.open("e"), 20);
    world.queues.direct.create_queue().queue_name(world.names.queue_name("e")).send().await.unwrap();
    world.deliver("e").await;
    world.assert_each_once();
}

/// Issue 11: a missing permission on one call backs off, and sends nothing twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f64_a_missing_permission_on_one_call_sends_nothing_twice() {
    let denied = || Fault::Error { status: 403, code: "AccessDenied" };
    for call in ["SendMessageBatch", "ReceiveMessage", "DeleteMessageBatch", "GetQueueAttributes"] {
        let mut world = World::new(1).await;
        world.inject(Rule::on(call, denied()));
        world.append("d", 10, 2).await;
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            for lease in world.lease(0, "d", 3).await {
                world.work(0, &lease).await;
            }
            sleep(Duration::from_millis(50)).await;
        }
        let calls = world.queues.proxy.injected(call);
        assert!(calls < 15, "{call} was tried {calls} times in five seconds");
        world.queues.proxy.clear_faults();
        world.deliver("d").await;
        let sent = world.queues.proxy.counts()["SendMessageBatch"].items
            - if call == "SendMessageBatch" { calls * 10 } else { 0 };
        assert_eq!(sent, 10, "{call}: each entry once");
        world.assert_each_once();
    }
    figure("4 calls denied for 5 s each: fewer than 15 tries of it, each entry and each message sent once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn s2_1_two_batches_of_500_take_one_send_and_at_most_three_other_calls() {
    let mut world = World::new(1).await;
    // As a daemon that was idle: its poll waits already.
    world.lease(0, "d", 2).await;
    sleep(Duration::from_millis(200)).await;
    world.queues.proxy.reset_counts();
    world.append("d", 2, 500).await;
    world.deliver("d").await;
    let counts = world.queues.proxy.counts();
    let receives = counts.get("ReceiveMessage").map_or(0, |count| count.calls);
    sleep(Duration::from_millis(1_500)).await;
    let counts = world.queues.proxy.counts();
    let calls = |name: &str| counts.get(name).map_or(0, |count| count.calls);
    eprintln!("calls per 1000 messages: {counts:?}");
    assert_eq!(calls("SendMessageBatch"), 1);
    // The one that waited already was begun before the counts were reset.
    assert!(
        receives.max(1) + calls("DeleteMessageBatch") + calls("ChangeMessageVisibilityBatch") <= 3,
        "{counts:?}"
    );
    world.assert_each_once();
}

/// S2.10: one message per batch is the seed's way, and its count of calls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn s2_1_a_thousand_batches_of_one_message_take_the_seed_s_hundred_calls() {
    let mut world = World::new(1).await;
    world.append("d", 1_000, 1).await;
    world.deliver("d").await;
    let sent = world.queues.proxy.counts()["SendMessageBatch"];
    eprintln!("{sent:?}");
    assert!(sent.calls <= 110 && sent.items == 1_000, "{sent:?}");
    world.assert_each_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn s2_5_an_entry_that_comes_too_early_is_hidden_without_a_claim() {
    let mut world = World::new(1).await;
    // Sent by a process whose clock is ahead: SQS does not delay it.
    let due = SystemClock.wall().after(Duration::from_secs(4));
    let file = fixtures::file("feed", 1, &["d"]);
    let step = fixtures::step(&file, 1..=5, due);
    let hint = Hint { batch: step.batches[0].id, due };
    world.store.append(step).await.unwrap();
    world.accepted.extend((1..=5).map(|row| (file.id, row)));
    world.transport.send("d", &[Outgoing { hint, sending: 1, lane: 1 }], Duration::ZERO).await.unwrap();
    let lease = world.lease_one(0, "d").await;
    assert!(SystemClock.wall() >= due, "not before it is due");
    assert_eq!(lease.token.fence, 1, "it was claimed once");
    assert_eq!(world.queues.proxy.counts()["ChangeMessageVisibilityBatch"].items, 1);
    world.work(0, &lease).await;
    world.deliver_all().await;
    world.assert_each_once();
}
