//! The DynamoDB store keeps the contracts of all its ports, on dynoxide.
#![cfg(feature = "aws")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aws_sdk_dynamodb::Client;
use postrider::adapters::dynamodb::{DeadWish, DynamoSettings, DynamoStore, migrate};
use postrider_actors::{
    model::time::UnixMs,
    ports::{Clock, RateTable},
    testing::{
        FakeClock,
        conformance::{self, Patience, Subject},
    },
};

#[path = "cloud/mod.rs"]
mod cloud;

#[path = "dynamodb/faults.rs"]
mod faults;

use cloud::{Server, sdk_config};

fn client(endpoint: &str) -> Client {
    Client::new(&sdk_config(endpoint))
}

fn settings() -> DynamoSettings {
    static TABLES: AtomicU64 = AtomicU64::new(0);
    let table = format!("outbox-{}", TABLES.fetch_add(1, Ordering::Relaxed));
    DynamoSettings { sweep_after: Duration::ZERO, ..DynamoSettings::new(&table, "node-7") }
}

async fn open(client: &Client, settings: &DynamoSettings) -> Arc<DynamoStore> {
    migrate(client, settings).await.unwrap();
    let clock: Arc<dyn Clock> = Arc::new(FakeClock::at(UnixMs(1_700_000_000_000)));
    Arc::new(DynamoStore::open(client, settings.clone(), clock, Arc::new(())).await.unwrap())
}

async fn make(server: &Server) -> Subject {
    make_on(server.endpoint()).await
}

async fn make_on(endpoint: &str) -> Subject {
    let store = open(&client(endpoint), &settings()).await;
    let (redriving, enabling) = (store.clone(), store.clone());
    let subject = Subject {
        outbox: store.clone(),
        // Replaced by `carried`: the store has no queue of its own.
        queue: Subject::in_memory().queue,
        ledger: store.clone(),
        claims: store.clone(),
        archive: store,
        clock: None,
        patience: Patience::default(),
        redrive: Box::new(move |now| {
            let store = redriving.clone();
            Box::pin(async move { store.redrive(&DeadWish::default(), usize::MAX, now).await.unwrap() })
        }),
        enable: Box::new(move |name| {
            let enable = enabling.enable_destination(name);
            let enabled = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(enable));
            assert!(enabled.unwrap());
        }),
        guard: Box::new(()),
    };
    subject.carried(1)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn outbox() {
    let server = Server::dynamodb();
    conformance::outbox(|| make(&server)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn claims() {
    let server = Server::dynamodb();
    conformance::claims(|| make(&server)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn queue() {
    let server = Server::dynamodb();
    for seed in 0..3 {
        let server = &server;
        conformance::queue(|| async move { make(server).await.carried(seed) }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn ledger() {
    let server = Server::dynamodb();
    conformance::ledger(|| make(&server)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn archive() {
    let server = Server::dynamodb();
    conformance::archive(|| make(&server)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn entries() {
    let server = Server::dynamodb();
    conformance::entries(|| make(&server)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn rates() {
    let server = Server::dynamodb();
    let client = client(server.endpoint());
    conformance::rates(|| async { open(&client, &settings()).await as Arc<dyn RateTable> }).await;
}

/// `POSTRIDER_SEED=n` plays one history again, `POSTRIDER_SEEDS=n` plays more.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn histories() {
    let server = Server::dynamodb();
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("POSTRIDER_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("POSTRIDER_SEEDS").unwrap_or(12),
    };
    for seed in seeds {
        conformance::history(make(&server).await.carried(seed), seed).await;
    }
}
