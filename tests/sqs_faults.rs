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
    model::{
        batch::Rows,
        ids::{BatchId, FileId},
        ledger::MessageVerdict,
        outcome::Verdict,
        time::UnixMs,
    },
    ports::{
        Clock as _, DispatchSource as _, DispatchTarget as _, ItemOutcome, Lease, LeaseRequest, Ledger as _,
        Outbox as _, OutboxEntry, OutstandingQuery, Queue as _, Release, Settled, Settlement, Want,
    },
    testing::{FakeClock, MemoryStore, fixtures},
};
use postrider_aws::sqs::{SqsQueue, SqsSettings};
use sqs::{NOW, Queues, settings};
use tokio::time::{Instant, sleep};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(40);

/// How long leases hold. A doubled entry that another process finds held is hidden for as long.
const LEASE: Duration = Duration::from_secs(10);

/// One store, one queue, and processes at it.
struct World {
    queues: Queues,
    store: Arc<MemoryStore>,
    url: String,
    dead: String,
    processes: Vec<Arc<SqsQueue>>,
    /// Requests per message.
    requests: BTreeMap<(FileId, u64), u32>,
    /// Rows that were accepted for `d`.
    accepted: BTreeSet<(FileId, u64)>,
    files: u8,
}

impl World {
    async fn new(processes: usize, change: impl Fn(&mut SqsSettings)) -> Self {
        Self::with_queue("", processes, change).await
    }

    async fn with_queue(suffix: &str, processes: usize, change: impl Fn(&mut SqsSettings)) -> Self {
        let queues = Queues::start();
        let store = Arc::new(MemoryStore::new());
        let (url, dead) = queues.create(suffix).await;
        let opened = (0..processes).map(|process| {
            let mut settings = settings(&url, &dead);
            settings.process = format!("node-{process}-1").into();
            change(&mut settings);
            queues.open(&settings, &store, Arc::new(SystemClock))
        });
        let processes = opened.collect();
        Self {
            store,
            url,
            dead,
            processes,
            requests: BTreeMap::new(),
            accepted: BTreeSet::new(),
            files: 0,
            queues,
        }
    }

    /// Stores `batches` batches of `rows` rows for `destination` and returns their entries.
    async fn append(&mut self, destination: &str, batches: u64, rows: u64) -> Vec<OutboxEntry> {
        self.files += 1;
        let file = fixtures::file("feed", self.files, &[destination]);
        for batch in 0..batches {
            let step = fixtures::step(&file, batch * rows + 1..=(batch + 1) * rows, NOW);
            self.store.append(step).await.unwrap();
        }
        if destination == "d" {
            self.accepted.extend((1..=batches * rows).map(|row| (file.id, row)));
        }
        self.outstanding().await
    }

    async fn outstanding(&self) -> Vec<OutboxEntry> {
        let query = OutstandingQuery { due_by: UnixMs(u64::MAX), limit: 1_000, except: &[] };
        self.store.outstanding(query).await.unwrap()
    }

    /// Sends entries and marks what was accepted, as the dispatcher does.
    async fn dispatch(&self, entries: &[OutboxEntry]) -> Vec<(BatchId, ItemOutcome)> {
        let outcomes = self.processes[0].send(entries).await.unwrap();
        let ids: Vec<_> = outcomes.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, entries.iter().map(|entry| entry.id).collect::<Vec<_>>(), "by id, in order");
        let accepted = outcomes.iter().filter(|(_, outcome)| *outcome == ItemOutcome::Ok);
        let accepted: Vec<_> = accepted.map(|(id, _)| *id).collect();
        self.store.mark_dispatched(&accepted).await.unwrap();
        outcomes
    }

    async fn lease(&self, process: usize, destination: &str, limit: usize) -> Vec<Lease> {
        let until = SystemClock.mono().after(LEASE);
        let wants = vec![Want { destination: destination.into(), messages: usize::MAX, batches: limit }];
        let request =
            LeaseRequest { holder: "w".into(), wants, until, now: SystemClock.wall(), born: UnixMs(0) };
        self.processes[process].lease(request).await.unwrap()
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
        let sent = Verdict::Sent { at: NOW, status: 200 };
        let settlement = settlement(lease, lease.open.iter().map(|open| open.verdict(sent)).collect());
        let settled = self.store.settle(vec![settlement]).await.unwrap()[0];
        match settled {
            Settled::Complete | Settled::Released => {
                self.processes[process].acknowledge(&[lease.token]).await.unwrap();
            }
            Settled::Open | Settled::Stale => {
                self.processes[process].release(&[lease.token], Release::Unused).await.unwrap();
            }
        }
    }

    /// Delivers until nothing is open, with leases held for a while; then waits until the queue is empty too.
    async fn deliver_all(&mut self) {
        let until = Instant::now() + PATIENCE;
        loop {
            let mut in_hand = Vec::new();
            for process in 0..self.processes.len() {
                for lease in self.lease(process, "d", 3).await {
                    in_hand.push((process, lease));
                }
            }
            sleep(Duration::from_millis(50)).await;
            for (process, lease) in in_hand {
                self.work(process, &lease).await;
            }
            let open = self.store.depth().await.unwrap();
            if open == 0 && self.processes[0].queue_depth().await.is_ok_and(|depth| depth.total() == 0) {
                break;
            }
            assert!(
                Instant::now() < until,
                "{open} messages are open, and the queue holds {:?}",
                self.processes[0].queue_depth().await
            );
        }
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
        let receive = self.queues.direct.receive_message().queue_url(&self.dead);
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

fn accepted(outcomes: &[(BatchId, ItemOutcome)]) -> usize {
    outcomes.iter().filter(|(_, outcome)| *outcome == ItemOutcome::Ok).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f46_of_a_call_only_what_failed_is_sent_again() {
    let mut world = World::new(1, |_| ()).await;
    let entries = world.append("d", 20, 5).await;
    world.inject(Rule::on("SendMessageBatch", Fault::fail_entries(3)).next(2));
    let outcomes = world.dispatch(&entries).await;
    assert_eq!(accepted(&outcomes), 20);
    let sent = world.queues.proxy.counts()["SendMessageBatch"];
    assert_eq!((sent.calls, sent.items), (3, 26), "two calls of ten, and one with the six that failed");
    world.deliver_all().await;
    world.assert_each_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f46_a_sender_fault_is_permanent_and_its_batch_stays_in_the_outbox() {
    let mut world = World::new(1, |_| ()).await;
    let entries = world.append("d", 10, 5).await;
    world.inject(Rule::on("SendMessageBatch", Fault::refuse_entries(3)).next(1));
    let outcomes = world.dispatch(&entries).await;
    let permanent =
        outcomes.iter().filter(|(_, outcome)| matches!(outcome, ItemOutcome::Permanent(_))).count();
    assert_eq!((accepted(&outcomes), permanent), (7, 3), "{outcomes:?}");
    assert_eq!(world.queues.proxy.counts()["SendMessageBatch"].calls, 1, "repeating it won't help");
    let left = world.outstanding().await;
    assert_eq!(left.len(), 3);
    assert_eq!(accepted(&world.dispatch(&left).await), 3);
    world.deliver_all().await;
    world.assert_each_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f46_throttling_and_errors_of_the_service_are_waited_out() {
    let mut world = World::new(1, |_| ()).await;
    let entries = world.append("d", 10, 5).await;
    for fault in
        [Fault::sqs_throttled(), Fault::throttled(), Fault::unavailable(), Fault::Close { forward: false }]
    {
        world.inject(Rule::on("SendMessageBatch", fault).next(1));
    }
    assert_eq!(accepted(&world.dispatch(&entries).await), 10);
    assert_eq!(world.queues.proxy.injected("SendMessageBatch"), 4);
    world.deliver_all().await;
    world.assert_each_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f46_a_timeout_after_the_accept_doubles_entries_and_no_request() {
    let mut world = World::new(2, |_| ()).await;
    let entries = world.append("d", 10, 5).await;
    world.inject(Rule::on("SendMessageBatch", Fault::Hang { forward: true }).next(1));
    world.inject(Rule::on("SendMessageBatch", Fault::Close { forward: true }).skip(1).next(1));
    assert_eq!(accepted(&world.dispatch(&entries).await), 10);
    assert_eq!(world.queues.proxy.injected("SendMessageBatch"), 2);
    assert_eq!(world.processes[0].queue_depth().await.unwrap().total(), 30);
    world.deliver_all().await;
    world.assert_each_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f46_what_is_left_when_the_budget_is_spent_is_said_and_stays_outstanding() {
    let mut world = World::new(1, |settings| settings.send_budget = Duration::from_millis(1_500)).await;
    let entries = world.append("d", 10, 5).await;
    world.inject(Rule::on("SendMessageBatch", Fault::fail_entries(3)));
    let outcomes = world.dispatch(&entries).await;
    let residue = outcomes.iter().filter(|(_, outcome)| matches!(outcome, ItemOutcome::Retryable(_))).count();
    assert!(residue > 0 && residue + accepted(&outcomes) == 10, "{outcomes:?}");
    assert_eq!(world.outstanding().await.len(), residue);
    world.queues.proxy.clear_faults();
    world.inject(Rule::on("SendMessageBatch", Fault::Hang { forward: true }));
    let left = world.outstanding().await;
    let outcomes = world.dispatch(&left).await;
    assert!(outcomes.iter().all(|(_, outcome)| matches!(outcome, ItemOutcome::Unknown(_))), "{outcomes:?}");
    world.queues.proxy.clear_faults();
    assert_eq!(accepted(&world.dispatch(&left).await), left.len());
    world.deliver_all().await;
    world.assert_each_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f48_duplicates_disorder_and_expired_visibility_double_no_request() {
    let mut world = World::new(2, |_| ()).await;
    world.inject(Rule::on("SendMessageBatch", Fault::Scatter { delay_s_max: 2 }));
    let duplicate = Fault::Duplicate { messages: 3, delay_s: 1 };
    let expire = Fault::ExpireVisibility { messages: 3, after: Duration::from_millis(20) };
    world.inject(Rule::on("ReceiveMessage", duplicate).with_probability(0.5, 1));
    world.inject(Rule::on("ReceiveMessage", expire).with_probability(0.5, 2));
    world.inject(Rule::on("ReceiveMessage", Fault::Reorder));
    let entries = world.append("d", 60, 5).await;
    assert_eq!(accepted(&world.dispatch(&entries).await), 60);
    world.deliver_all().await;
    assert!(world.queues.proxy.injected("ReceiveMessage") > 5);
    world.assert_each_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f48_what_can_t_be_deleted_comes_again_is_known_as_settled_and_goes_then() {
    let mut world = World::new(1, |settings| settings.visibility = Duration::from_secs(4)).await;
    let entries = world.append("d", 20, 5).await;
    world.dispatch(&entries).await;
    // Some are refused and tried again; the others fail until their visibility timeout has run out.
    world.inject(Rule::on("DeleteMessageBatch", Fault::fail_entries(4)).next(2));
    world.inject(Rule::on("DeleteMessageBatch", Fault::internal_error()).skip(2).next(6));
    world.deliver_all().await;
    assert_eq!(world.queues.proxy.injected("DeleteMessageBatch"), 8);
    world.assert_each_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn f48_what_can_t_be_read_goes_to_the_dead_letters_with_the_reason_and_what_is_unknown_goes() {
    let mut world = World::new(1, |_| ()).await;
    let bodies = ["no envelope, but user-secret", r#"{"version":9,"rows":[]}"#];
    for body in bodies {
        world.queues.direct.send_message().queue_url(&world.url).message_body(body).send().await.unwrap();
    }
    // A batch of another store.
    let file = fixtures::file("feed", 200, &["d"]);
    let batch = fixtures::batch(&file, "d", 1..=5, NOW);
    let foreign =
        OutboxEntry { id: batch.id, destination: "d".into(), count: 5, not_before: NOW, batch: Some(batch) };
    world.processes[0].send(&[foreign]).await.unwrap();
    let entries = world.append("d", 5, 5).await;
    world.dispatch(&entries).await;
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
    assert!(reasons[0].starts_with("not an envelope: not JSON"), "{reasons:?}");
    assert!(reasons[1].starts_with("version 9"), "{reasons:?}");
    assert!(!reasons.concat().contains("secret"));
}

/// B18: an entry ends with its lease, and what is left of the batch comes as another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn what_a_lease_leaves_comes_again_from_the_store_when_it_is_due() {
    for suffix in ["", ".fifo"] {
        let mut world = World::with_queue(suffix, 1, |_| ()).await;
        let entries = world.append("d", 1, 5).await;
        world.dispatch(&entries).await;
        let lease = world.lease_one(0, "d").await;
        // Given back, it is due at once, as it was before: no queue may take it for a repetition.
        world.processes[0].release(&[lease.token], Release::Unused).await.unwrap();
        let again = world.outstanding().await;
        assert_eq!((again.len(), again[0].not_before), (1, NOW));
        world.dispatch(&again).await;
        let lease = world.lease_one(0, "d").await;
        let due = SystemClock.wall().after(Duration::from_secs(2));
        let attempt = fixtures::failed(NOW);
        let retry = Verdict::Retry { attempt, not_before: due };
        let sent = Verdict::Sent { at: NOW, status: 200 };
        let verdicts = lease.open.iter().map(|open| open.verdict(if open.index == 3 { retry } else { sent }));
        let mut settlement = settlement(&lease, verdicts.collect());
        settlement.ends = true;
        assert_eq!(world.store.settle(vec![settlement]).await.unwrap(), [Settled::Released]);
        world.processes[0].acknowledge(&[lease.token]).await.unwrap();
        let again = world.outstanding().await;
        assert_eq!((again.len(), again[0].not_before), (1, due));
        if suffix == ".fifo" {
            sleep(due.since(SystemClock.wall())).await; // such a queue delays no single message
        }
        world.dispatch(&again).await;
        let rest = world.lease_one(0, "d").await;
        assert!(SystemClock.wall() >= due, "not before it is due");
        assert_eq!(rest.payload, lease.payload);
        assert_eq!(rest.open.iter().map(|open| (open.index, open.tries)).collect::<Vec<_>>(), [(3, 1)]);
        world.work(0, &rest).await;
        let until = Instant::now() + PATIENCE;
        while world.processes[0].queue_depth().await.unwrap().total() > 0 {
            sleep(Duration::from_millis(50)).await;
            assert!(Instant::now() < until, "an entry is left");
        }
    }
}

/// F43 at the queue: one destination is blocked, hundreds of its entries stand in front.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn a_blocked_destination_with_hundreds_of_entries_in_front_blocks_no_other() {
    let mut world = World::new(1, |_| ()).await;
    let blocked = world.append("blocked", 300, 2).await;
    assert_eq!(accepted(&world.dispatch(&blocked).await), 300);
    let entries = world.append("d", 10, 5).await;
    assert_eq!(accepted(&world.dispatch(&entries).await), 10);
    let (begun, until) = (Instant::now(), Instant::now() + PATIENCE);
    while world.requests.len() < world.accepted.len() {
        for lease in world.lease(0, "d", 3).await {
            world.work(0, &lease).await;
        }
        sleep(Duration::from_millis(20)).await;
        assert!(
            Instant::now() < until,
            "{} of {} after {PATIENCE:?}",
            world.requests.len(),
            world.accepted.len()
        );
    }
    let received = world.queues.proxy.counts()["ReceiveMessage"];
    eprintln!("10 batches behind 300 of a blocked destination took {:?} and {received:?}", begun.elapsed());
    assert!(received.items >= 300, "they were in the way: {received:?}");
    world.assert_each_once();
    while world.processes[0].queue_depth().await.unwrap().total() > 300 {
        sleep(Duration::from_millis(20)).await; // acknowledgements linger
        assert!(Instant::now() < until);
    }
    assert_eq!(world.processes[0].queue_depth().await.unwrap().total(), 300, "held, not lost");
    // Enabled, they come.
    let mut come = BTreeSet::new();
    while come.len() < 20 {
        come.extend(world.lease(0, "blocked", 3).await.into_iter().map(|lease| lease.token.batch));
        sleep(Duration::from_millis(20)).await;
        assert!(Instant::now() < until, "{} came", come.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn s2_1_two_batches_of_500_take_one_send_and_at_most_three_other_calls() {
    let mut world = World::new(1, |settings| settings.delete_linger = Duration::from_secs(1)).await;
    let entries = world.append("d", 2, 500).await;
    // As a daemon that was idle: its poll waits already.
    world.lease(0, "d", 2).await;
    sleep(Duration::from_millis(200)).await;
    world.queues.proxy.reset_counts();
    world.dispatch(&entries).await;
    let until = Instant::now() + PATIENCE;
    while world.requests.len() < 1_000 {
        for lease in world.lease(0, "d", 2).await {
            world.work(0, &lease).await;
        }
        sleep(Duration::from_millis(10)).await;
        assert!(Instant::now() < until);
    }
    sleep(Duration::from_millis(1_500)).await;
    let counts = world.queues.proxy.counts();
    let calls = |name: &str| counts.get(name).map_or(0, |count| count.calls);
    // The one that waited already was begun before the counts were reset.
    let receives = calls("ReceiveMessage").max(1);
    eprintln!("calls per 1000 messages: {counts:?}");
    assert_eq!(calls("SendMessageBatch"), 1);
    assert!(
        receives + calls("DeleteMessageBatch") + calls("ChangeMessageVisibilityBatch") <= 3,
        "{counts:?}"
    );
    world.assert_each_once();
}

/// S2.10: one message per batch is the seed's way, and its count of calls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn s2_1_a_thousand_batches_of_one_message_take_the_seed_s_hundred_calls() {
    let mut world = World::new(1, |_| ()).await;
    let entries = world.append("d", 1_000, 1).await;
    assert_eq!(accepted(&world.dispatch(&entries).await), 1_000);
    let sent = world.queues.proxy.counts()["SendMessageBatch"];
    assert_eq!((sent.calls, sent.items), (100, 1_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn a_batch_too_large_for_a_message_is_loaded_from_the_outbox() {
    let mut world = World::new(1, |settings| settings.max_bytes = 4_000).await;
    let entries = world.append("d", 3, 500).await;
    assert_eq!(accepted(&world.dispatch(&entries).await), 3);
    world.deliver_all().await;
    world.assert_each_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn s2_5_an_entry_that_comes_too_early_is_hidden_without_a_claim() {
    let mut world = World::new(1, |_| ()).await;
    let mut entries = world.append("d", 1, 5).await;
    // Sent by a process whose clock is ahead: SQS does not delay it.
    let due = SystemClock.wall().after(Duration::from_secs(4));
    entries[0].not_before = due;
    let ahead = Arc::new(FakeClock::at(due));
    let sender = world.queues.open(&settings(&world.url, &world.dead), &world.store, ahead);
    assert_eq!(accepted(&sender.send(&entries).await.unwrap()), 1);
    world.store.mark_dispatched(&[entries[0].id]).await.unwrap();
    let lease = world.lease_one(0, "d").await;
    assert!(SystemClock.wall() >= due, "not before it is due");
    assert_eq!(lease.token.fence, 1, "it was claimed once");
    assert_eq!(world.queues.proxy.counts()["ChangeMessageVisibilityBatch"].items, 1);
    world.work(0, &lease).await;
    world.deliver_all().await;
    world.assert_each_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn closing_gives_back_what_waits_and_deletes_what_is_settled() {
    let mut world = World::new(2, |settings| {
        if &*settings.process == "node-0-1" {
            settings.delete_linger = Duration::from_secs(30);
        }
    })
    .await;
    let entries = world.append("d", 10, 5).await;
    world.dispatch(&entries).await;
    let until = Instant::now() + PATIENCE;
    while world.requests.is_empty() {
        if let Some(lease) = world.lease(0, "d", 1).await.pop() {
            world.work(0, &lease).await;
        }
        sleep(Duration::from_millis(20)).await;
        assert!(Instant::now() < until);
    }
    world.processes.remove(0).close().await;
    // Nine are visible again at once, one is gone, though its delete would have waited for half a minute.
    let depth = world.processes[0].queue_depth().await.unwrap();
    assert_eq!((depth.visible, depth.total()), (9, 9), "{depth:?}");
    world.deliver_all().await;
    world.assert_each_once();
}
