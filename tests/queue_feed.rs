//! A feed that reads a queue, from SQS (ministack, behind the fault proxy) to the embedded store.
#![cfg(feature = "aws")]

#[path = "cloud/mod.rs"]
mod cloud;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::Duration,
};

use actix::{Actor as _, Addr};
use aws_sdk_sqs::{Client, types::SendMessageBatchRequestEntry};
use cloud::{Fault, FaultProxy, Rule, Server};
use postrider::clock::SystemClock;
use postrider_actors::{
    flow::{Bells, ProgressBoard},
    metrics::StageMetrics,
    model::{
        batch::{MessageData, Rows},
        builder::BatchLimits,
        conditions::Conditions,
        file::{FileReport, FileState},
        time::{MonoMs, UnixMs},
    },
    ports::{Intake, ItemOutcome, LeaseRequest, Ledger as _, Queue as _, Release, Want},
    queue_feed::{QueueFeed, QueueFeedSettings, QueueFeedSetup},
    reading::FeedDestination,
    supervision::{ChildId, Drain, Fault as ActorFault, Stage as _},
    testing::figure,
};
use postrider_aws::{AwsSettings, sqs::SqsIntake};
use postrider_settings::{FeedQueue, Keys as _, Priority};
use postrider_sqlite::EmbeddedStore;

const QUEUE: &str = "inbound";
const VISIBILITY: Duration = Duration::from_secs(4);

/// A queue behind a proxy.
struct World {
    proxy: FaultProxy,
    intake: Arc<SqsIntake>,
    url: String,
    /// Past the proxy.
    direct: Client,
    _server: Server,
}

impl World {
    async fn new() -> Self {
        let server = Server::sqs();
        let proxy = FaultProxy::start(server.endpoint());
        let direct = Client::new(&cloud::sdk_config(server.endpoint()));
        direct.create_queue().queue_name(QUEUE).send().await.expect("ministack creates queues");
        let client = Client::new(&cloud::sdk_config(proxy.endpoint()));
        let url = client.get_queue_url().queue_name(QUEUE).send().await.expect("it is there");
        let url = url.queue_url.expect("it has one");
        let aws = AwsSettings::default();
        let intake = Arc::new(SqsIntake::new(client, &aws, url.clone(), VISIBILITY, Arc::new(())));
        proxy.reset_counts();
        Self { proxy, intake, url, direct, _server: server }
    }

    async fn send(&self, bodies: &[String]) {
        for ten in bodies.chunks(10) {
            let entry = |(id, body): (usize, &String)| {
                SendMessageBatchRequestEntry::builder().id(id.to_string()).message_body(body).build().unwrap()
            };
            let entries = ten.iter().enumerate().map(entry).collect();
            let sent =
                self.direct.send_message_batch().queue_url(&self.url).set_entries(Some(entries)).send();
            assert_eq!(sent.await.unwrap().successful().len(), ten.len());
        }
    }

    async fn is_empty(&self) -> bool {
        // Not a single reading: the counts are of different moments.
        for _ in 0..3 {
            if self.intake.depth().await.map_or(1, |depth| depth.total()) > 0 {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        true
    }
}

fn store(dir: &Path) -> Arc<EmbeddedStore> {
    Arc::new(EmbeddedStore::open(dir, Arc::new(|error| panic!("fatal: {error}"))).unwrap())
}

fn feed(intake: &Arc<SqsIntake>, store: &Arc<EmbeddedStore>, linger: Duration) -> Addr<QueueFeed> {
    let clock = Arc::new(SystemClock);
    let destination =
        FeedDestination { name: "shop".into(), template: None, content_type: "application/json".into() };
    let settings = QueueFeedSettings {
        name: "orders".into(),
        recipient: "id".into(),
        max_row_bytes: 65_536,
        max_entry_rows: 10_000,
        destinations: vec![destination],
        conditions: Conditions::default(),
        priority: Priority::Normal,
        batch: BatchLimits { max_messages: 50, max_bytes: 100_000 },
        queue: FeedQueue { max_rows: 200, max_size: 1_000_000, linger, ..FeedQueue::declared() },
        pollers: 3,
        wait: Duration::from_secs(20),
        backlog: postrider_settings::Outbox::declared(),
    };
    let setup = QueueFeedSetup {
        feed: Arc::new(settings),
        intake: intake.clone(),
        outbox: store.clone(),
        ledger: store.clone(),
        clock: clock.clone(),
        appended: Bells::default(),
        metrics: StageMetrics::default().feed("orders"),
        held: postrider_actors::flow::HeldFeeds::default(),
        progress: ProgressBoard::default().mark("queue_feed"),
    };
    QueueFeed::new(setup, &ChildId::first("queue_feed"), ActorFault::default()).start()
}

async fn drained(feed: Addr<QueueFeed>) {
    feed.send(Drain).await.expect("it lives");
    let ended = async {
        while feed.connected() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended).await.expect("it drains");
}

/// How often each recipient became a message.
async fn messages(store: &EmbeddedStore) -> BTreeMap<String, usize> {
    let mut messages = BTreeMap::new();
    let mut tokens = Vec::new();
    loop {
        let wants = vec![Want::new("shop", 1_000, 1_000)];
        let (until, now) = (MonoMs(u64::MAX), UnixMs(u64::MAX));
        let leases = store
            .lease(LeaseRequest { holder: "look".into(), wants, until, now, born: UnixMs(0) })
            .await
            .unwrap();
        if leases.is_empty() {
            break;
        }
        for lease in leases {
            tokens.push(lease.token);
            let rows = Rows::decode(lease.payload).unwrap();
            for index in 0..rows.len() {
                let parts = lease.header.layout.read(rows.bytes(index)).unwrap();
                assert!(matches!(parts.data, MessageData::Object(_)));
                *messages.entry(parts.recipient.to_owned()).or_default() += 1;
            }
        }
    }
    store.release(&tokens, Release::Unused).await.unwrap();
    messages
}

#[actix::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn f48_rows_from_sqs_are_stored_once_whatever_the_queue_does() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (mut bodies, mut expected) = (Vec::new(), BTreeSet::new());
    for entry in 0..400 {
        let rows: Vec<_> = (0..entry % 5).map(|row| format!("{entry}-{row}")).collect();
        expected.extend(rows.iter().cloned());
        let rows: Vec<_> = rows.iter().map(|id| format!("{{\"id\":\"{id}\"}}")).collect();
        bodies.push(match entry % 10 {
            7 => "no json".to_owned(),
            1 => rows[0].clone(),
            _ => format!("[{}]", rows.join(",")),
        });
        if entry % 10 == 7 {
            expected.retain(|id| !id.starts_with(&format!("{entry}-")));
        }
    }
    world.send(&bodies).await;
    let rules = [
        Rule::on("DeleteMessageBatch", Fault::fail_entries(3)).with_probability(0.3, 1),
        Rule::on("DeleteMessageBatch", Fault::Close { forward: true }).with_probability(0.1, 2),
        Rule::on("ReceiveMessage", Fault::Duplicate { messages: 2, delay_s: 1 }).with_probability(0.3, 3),
        Rule::on("ReceiveMessage", Fault::Reorder),
        Rule::on(
            "ReceiveMessage",
            Fault::ExpireVisibility { messages: 1, after: Duration::from_millis(200) },
        )
        .with_probability(0.3, 4),
        Rule::on("ReceiveMessage", Fault::unavailable()).with_probability(0.1, 5),
        Rule::on("ReceiveMessage", Fault::sqs_throttled()).with_probability(0.1, 6),
    ];
    for rule in rules {
        world.proxy.inject(rule);
    }
    for life in 0..4 {
        let store = store(dir.path());
        let feed = feed(&world.intake, &store, Duration::from_millis(200));
        tokio::time::sleep(Duration::from_millis(700 * (life + 1))).await;
        drained(feed).await;
    }
    for operation in ["DeleteMessageBatch", "ReceiveMessage"] {
        assert!(world.proxy.injected(operation) > 0, "{operation}: no fault happened");
    }
    world.proxy.clear_faults();
    let store = store(dir.path());
    let feed = feed(&world.intake, &store, Duration::from_millis(200));
    let empty = async {
        while !world.is_empty().await {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), empty).await.expect("the queue is emptied");
    drained(feed).await;

    let messages = messages(&store).await;
    assert!(messages.values().all(|&times| times == 1), "{messages:?}");
    assert_eq!(messages.keys().cloned().collect::<BTreeSet<_>>(), expected);
    let reports = store.latest_files(10_000).await.unwrap();
    assert!(reports.iter().all(|report| report.is_balanced() && report.state == FileState::Ingested));
    let sum = |count: fn(&FileReport) -> u64| reports.iter().map(count).sum::<u64>();
    assert_eq!(sum(|report| report.rejected), 40, "each body that is not JSON is one rejected row");
    assert_eq!(sum(|report| report.rows), expected.len() as u64 + 40);
    figure(format!(
        "400 entries over 5 lives, 7 faults of the queue: {} rows, each stored once; 40 bad bodies rejected",
        expected.len()
    ));
}

#[actix::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn s4_2_and_s4_3_the_linger_outruns_the_long_poll_and_deletions_go_in_tens() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let feed = feed(&world.intake, &store, Duration::from_secs(1));
    tokio::time::sleep(Duration::from_millis(300)).await;
    // Three polls wait at the queue for 20 s; what one of them brings must not wait for the others.
    let bodies: Vec<_> = (0..20).map(|id| format!("{{\"id\":{id}}}")).collect();
    world.send(&bodies).await;
    let begun = tokio::time::Instant::now();
    while !world.is_empty().await {
        assert!(begun.elapsed() < Duration::from_secs(5), "S4.2: the linger waits for a poll");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let counts = world.proxy.counts();
    drained(feed).await;
    assert_eq!(messages(&store).await.len(), 20);
    let deletions = counts["DeleteMessageBatch"];
    assert_eq!(deletions.items, 20);
    assert!(deletions.calls <= 4, "{deletions:?}");
}

#[actix::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn an_entry_is_ours_while_it_is_extended_and_comes_again_when_it_is_released() {
    let world = World::new().await;
    let bodies: Vec<_> = (0..25).map(|id| format!("{{\"id\":{id}}}")).collect();
    world.send(&bodies).await;
    let mut received = Vec::new();
    while received.len() < 25 {
        received.extend(world.intake.receive(10, Duration::from_secs(1)).await.unwrap());
    }
    assert!(
        received
            .iter()
            .all(|entry| entry.receives == 1 && bodies.iter().any(|body| body.as_bytes() == entry.body))
    );
    let acks: Vec<_> = received.iter().map(|entry| entry.ack.clone()).collect();
    for _ in 0..3 {
        tokio::time::sleep(VISIBILITY / 2).await;
        let extended = world.intake.extend(&acks).await.unwrap();
        assert_eq!(extended, vec![ItemOutcome::Ok; 25]);
        assert!(world.intake.receive(10, Duration::ZERO).await.unwrap().is_empty());
    }
    assert_eq!(world.intake.depth().await.unwrap().in_flight, 25);
    assert_eq!(world.intake.release(&acks[..15]).await.unwrap(), vec![ItemOutcome::Ok; 15]);
    assert_eq!(world.intake.delete(&acks[15..]).await.unwrap(), vec![ItemOutcome::Ok; 10]);
    let mut again = Vec::new();
    while again.len() < 15 {
        let next = world.intake.receive(10, Duration::from_secs(1)).await.unwrap();
        assert!(!next.is_empty(), "released entries are visible at once: {} came", again.len());
        again.extend(next);
    }
    assert!(again.iter().all(|entry| entry.receives == 2));
    let released: BTreeSet<_> = received[..15].iter().map(|entry| &entry.id).collect();
    assert_eq!(again.iter().map(|entry| &entry.id).collect::<BTreeSet<_>>(), released);
    world.intake.delete(&again.iter().map(|entry| entry.ack.clone()).collect::<Vec<_>>()).await.unwrap();
    assert!(world.is_empty().await);
}
