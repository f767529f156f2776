//! What the store costs in calls and units (S3), counted by the proxy in front of the emulator.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use postrider_actors::ports::console::DeadFilter;
use postrider_actors::{
    model::{
        batch::{NewBatch, PayloadWriter},
        call::CallOutcome,
        file::FileState,
        ids::FileId,
        time::UnixMs,
    },
    ports::{
        Append, Appended, CallObserver, Claim, Dispatch, EntryId, Ledger as _, Outbox as _, OutboxPages as _,
        PageQuery, Settled,
    },
    testing::fixtures,
};
use postrider_aws::dynamodb::{DynamoSettings, DynamoStore, migrate};
use sha2::{Digest as _, Sha256};

use super::{
    client,
    cloud::{FaultProxy, Server},
    faults::{LATER, NOW, all, calls_of, claim, clock, dead, due, first, granted, open, sent, settlement},
    settings,
};

/// What calls consume, by table and index.
#[derive(Default)]
struct Units(Mutex<BTreeMap<String, f64>>);

impl CallObserver for Units {
    fn call(&self, _: &'static str, _: &'static str, _: CallOutcome, _: Duration, _: usize) {}

    fn capacity(&self, table: &str, index: Option<&str>, units: f64) {
        let name = format!("{table} {}", index.unwrap_or("itself"));
        *self.0.lock().unwrap().entry(name).or_default() += units;
    }
}

/// S3.1: the seed asked every shard of every destination, 100 queries for nothing.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn s3_1_an_empty_outbox_costs_no_more_calls_than_segments() {
    let server = Server::dynamodb();
    let proxy = FaultProxy::start(server.endpoint());
    let settings = settings();
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let clock = clock();
    let store = open(proxy.endpoint(), &settings, &clock).await;
    // Once, it looks for what its last life left.
    assert_eq!(due(&store, 256, &[]).await, []);
    clock.advance(settings.sweep_interval);
    proxy.reset_counts();
    assert_eq!(due(&store, 256, &[]).await, []);
    assert!(calls_of(&proxy) <= u64::from(settings.keys.scan_concurrency), "{:?}", proxy.counts());
    let query = PageQuery { dispatch: Dispatch::Outstanding, destination: None, limit: 100, cursor: None };
    proxy.reset_counts();
    assert_eq!(store.page(query).await.unwrap().entries.len(), 0);
    assert!(calls_of(&proxy) <= u64::from(settings.keys.scan_concurrency), "{:?}", proxy.counts());
}

/// The seed made 1,000 calls per 1,000 messages, batched 100.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn at_most_nine_calls_per_thousand_messages() {
    let server = Server::dynamodb();
    let proxy = FaultProxy::start(server.endpoint());
    let settings = settings();
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let store = open(proxy.endpoint(), &settings, &clock()).await;
    // What a process does once.
    let file = fixtures::file("feed", 1, &["d"]);
    store.append(fixtures::step(&file, 1..=1, NOW)).await.unwrap();
    store.disabled_destinations().await.unwrap();
    granted(&store, due(&store, 9, &[]).await[0]).await;
    proxy.reset_counts();
    let file = fixtures::file("feed", 2, &["d"]);
    assert_eq!(store.find_file(file.id).await, Ok(None));
    for first in [1, 501] {
        store.append(fixtures::step(&file, first..=first + 499, NOW)).await.unwrap();
    }
    let ids = due(&store, 256, &[]).await;
    assert_eq!(ids.len(), 2);
    for id in ids {
        let token = granted(&store, id).await;
        let settlement = settlement(token, all(500, sent()));
        assert_eq!(store.settle(vec![settlement]).await.unwrap(), [Settled::Complete]);
    }
    let calls = calls_of(&proxy);
    assert!(calls <= 9, "{:?}", proxy.counts());
    assert_eq!(store.report(file.id).await.unwrap().unwrap().destinations["d"].sent, 1_000);
}

/// Several processes and many workers settle batches of one file at once.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn concurrent_settlements_share_transactions_and_add_up() {
    let server = Server::dynamodb();
    let proxy = FaultProxy::start(server.endpoint());
    proxy.set_latency(Duration::from_millis(5)..=Duration::from_millis(15));
    let settings = settings();
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let clock = clock();
    let mut stores = BTreeMap::new();
    for process in ["node-7", "other-1"] {
        let settings = DynamoSettings { process: process.into(), ..settings.clone() };
        stores.insert(process, Arc::new(open(proxy.endpoint(), &settings, &clock).await));
    }
    let file = fixtures::file("feed", 1, &["d", "e"]);
    let mut batches = Vec::new();
    for nth in 0..20 {
        let first = nth * 5 + 1;
        let mut step: Append = fixtures::step(&file, first..=first + 4, NOW);
        if nth == 19 {
            step.state = FileState::Ingested;
        }
        batches.extend(step.batches.iter().map(|batch| batch.id));
        stores["node-7"].append(step).await.unwrap();
    }
    proxy.reset_counts();
    let mut workers = Vec::new();
    for (nth, id) in batches.into_iter().enumerate() {
        let process = ["node-7", "other-1"][nth % 2];
        let store = stores[process].clone();
        workers.push(tokio::spawn(async move {
            let claims = claim(&store, &format!("{process}/w-{nth}#1"), vec![id]).await;
            let Claim::Granted(lease) = &claims[0] else { panic!("{claims:?}") };
            let mut verdicts = all(4, sent());
            verdicts.push(first(4, dead()));
            store.settle(vec![settlement(lease.token, verdicts)]).await.unwrap()
        }));
    }
    for worker in workers {
        assert_eq!(worker.await.unwrap(), [Settled::Complete]);
    }
    let transactions = proxy.counts()["TransactWriteItems"].calls;
    assert!(transactions < 20, "40 settlements took {transactions} transactions");
    for store in stores.values() {
        let report = store.report(file.id).await.unwrap().unwrap();
        assert!(report.is_balanced() && report.is_settled() && report.settled_at.is_some(), "{report:?}");
        for counts in report.destinations.values() {
            assert_eq!((counts.sent, counts.dead), (80, 20));
        }
    }
    // The report is the owner's to write, and it sees what the other has settled.
    assert_eq!(stores["other-1"].settled_files("feed", 9).await.unwrap(), []);
    assert_eq!(stores["node-7"].settled_files("feed", 9).await.unwrap().len(), 1);
    stores["node-7"].mark_reported(&[file.id]).await.unwrap();
    assert_eq!(stores["other-1"].redrive(&DeadFilter::default(), 1, LATER).await, Ok(1));
    clock.advance(Duration::from_secs(31));
    assert_eq!(stores["node-7"].settled_files("feed", 9).await.unwrap(), [], "it is open again");
}

/// The units of docs/aws.md: rows of 200 bytes in batches of 500, each claimed once and recorded in two groups.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn units_per_million_messages() {
    const BATCHES: u64 = 40;
    let server = Server::dynamodb();
    let settings = settings();
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let units = Arc::new(Units::default());
    let client = client(server.endpoint());
    let store = DynamoStore::open(&client, settings.clone(), clock(), units.clone()).await.unwrap();
    let file = fixtures::file("feed", 1, &["d"]);
    let mut step = fixtures::step(&file, 1..=BATCHES * 500, NOW);
    let rows_of = |batch: u64| batch * 500 + 1..=batch * 500 + 500;
    step.batches = (0..BATCHES)
        .map(|nth| {
            let mut payload = PayloadWriter::default();
            for row in rows_of(nth) {
                payload.push(row, format!("{row:0200}").as_bytes());
            }
            NewBatch { payload: payload.finish(), ..fixtures::batch(&file, "d", rows_of(nth), NOW) }
        })
        .collect();
    let ids: Vec<_> = step.batches.iter().map(|batch| batch.id).collect();
    store.append(step).await.unwrap();
    let claims = claim(&store, "node-7/w#1", ids).await;
    let tokens = claims.into_iter().map(|claim| match claim {
        Claim::Granted(lease) => lease.token,
        other => panic!("{other:?}"),
    });
    let tokens: Vec<_> = tokens.collect();
    for half in [0..250, 250..500] {
        let verdicts: Vec<_> = half.map(|index| first(index, sent())).collect();
        let settlements = tokens.iter().map(|token| settlement(*token, verdicts.clone())).collect();
        store.settle(settlements).await.unwrap();
    }
    let units = units.0.lock().unwrap();
    let per_million = 1e6 / (BATCHES * 500) as f64;
    for (name, units) in &*units {
        println!("per 1,000,000 messages: {name}: {:.0} units", units * per_million);
    }
    let sum: f64 = units.values().sum::<f64>() * per_million;
    println!("per 1,000,000 messages: {sum:.0} units");
    // Each row's bytes once, and not as part of a transaction; then a few small items per batch.
    assert!((200_000.0..260_000.0).contains(&sum), "{sum} units: {units:?}");
}

/// The units of docs/aws.md: 10,000 entries of an inbound queue, one row of 200 bytes each, a thousand a minute.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn b22_units_per_ten_thousand_inbound_messages() {
    const ENTRIES: u64 = 10_000;
    let server = Server::dynamodb();
    let settings = settings();
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let units = Arc::new(Units::default());
    let client = client(server.endpoint());
    let store = DynamoStore::open(&client, settings.clone(), clock(), units.clone()).await.unwrap();
    let of_step = 500;
    for (first, content) in (1..=ENTRIES).step_by(500).zip(1..) {
        let mut file = fixtures::file("feed", 1, &["d"]);
        Arc::make_mut(&mut file).id =
            FileId::derive("feed", &Sha256::digest(u64::to_be_bytes(content)).into());
        let last = ENTRIES.min(first + of_step - 1);
        let rows = last - first + 1;
        let mut step = fixtures::step(&file, 1..=rows, NOW);
        let mut payload = PayloadWriter::default();
        for row in 1..=rows {
            payload.push(row, format!("{:0200}", first + row).as_bytes());
        }
        step.batches[0].payload = payload.finish();
        let entry = |number: u64| EntryId {
            feed: "feed".into(),
            id: format!("5fea7756-0ea4-451a-a703-{number:012}"),
            sent_at: UnixMs(NOW.0 + number * 60),
        };
        step.entries = (first..=last).map(entry).collect();
        assert_eq!(store.append(step).await, Ok(Appended::Stored));
    }
    let units = units.0.lock().unwrap();
    let sum: f64 = units.values().sum();
    println!("per {ENTRIES} inbound messages: {sum:.0} units: {units:?}");
    // Each row's bytes once; then ten steps' few small items and 160 kB of packed ids, in transactions.
    assert!((2_000.0..3_500.0).contains(&sum), "{sum} units: {units:?}");
}
