//! The DynamoDB store keeps the contracts of all its ports, on dynoxide.
#![cfg(feature = "aws")]

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aws_sdk_dynamodb::Client;
use postrider_actors::ports::console::DeadFilter;
use postrider_actors::{
    model::time::{MonoMs, UnixMs},
    ports::{Clock, RateTable},
    testing::{
        FakeClock,
        conformance::{self, Carried, Patience, Subject},
    },
};
use postrider_aws::dynamodb::{DynamoSettings, DynamoStore, migrate};
use postrider_settings::{Dynamodb, Keys as _};

#[path = "cloud/mod.rs"]
mod cloud;

#[path = "dynamodb/cost.rs"]
mod cost;
#[path = "dynamodb/faults.rs"]
mod faults;
#[path = "dynamodb/payloads.rs"]
mod payloads;

use cloud::{Server, sdk_config};

fn client(endpoint: &str) -> Client {
    Client::new(&sdk_config(endpoint))
}

fn keys(table: &str) -> Dynamodb {
    Dynamodb { table: table.to_owned(), ..Dynamodb::declared() }
}

fn settings() -> DynamoSettings {
    static TABLES: AtomicU64 = AtomicU64::new(0);
    let table = format!("outbox-{}", TABLES.fetch_add(1, Ordering::Relaxed));
    let now = Duration::ZERO;
    DynamoSettings {
        grace: now,
        take_over_after: now,
        clock_margin: now,
        store_time: false,
        ..DynamoSettings::new(keys(&table), "node-7")
    }
}

/// The clock of the queue that carries for a store, which is made after the store.
#[derive(Clone, Default)]
struct LateClock(Arc<OnceLock<Arc<FakeClock>>>);

impl LateClock {
    fn clock(&self) -> Arc<FakeClock> {
        self.0.get_or_init(|| Arc::new(FakeClock::at(UnixMs(1_700_000_000_000)))).clone()
    }
}

impl Clock for LateClock {
    fn wall(&self) -> UnixMs {
        self.clock().wall()
    }

    fn mono(&self) -> MonoMs {
        self.clock().mono()
    }
}

async fn open(client: &Client, settings: &DynamoSettings, clock: LateClock) -> Arc<DynamoStore> {
    migrate(client, settings).await.unwrap();
    let clock: Arc<dyn Clock> = Arc::new(clock);
    Arc::new(DynamoStore::open(client, settings.clone(), clock, Arc::new(())).await.unwrap())
}

async fn make(server: &Server) -> Subject {
    make_on(server.endpoint(), 1).await
}

/// The store with a queue in memory that carries its batches; `seed` decides how that doubles and reorders.
async fn make_on(endpoint: &str, seed: u64) -> Subject {
    // Every look is a sweep.
    let settings = DynamoSettings { sweep_interval: Duration::ZERO, ..settings() };
    let late = LateClock::default();
    let store = open(&client(endpoint), &settings, late.clone()).await;
    let (carry, clock) = conformance::shared_queue_in_memory(store.clone(), store.clone(), seed);
    assert!(late.0.set(clock.clone()).is_ok(), "nothing has asked for the time yet");
    let (redriving, rerendering, enabling) = (store.clone(), store.clone(), store.clone());
    Subject {
        outbox: store.clone(),
        queue: carry.queue.clone(),
        ledger: store.clone(),
        steering: store.clone(),
        archive: store.clone(),
        carried: Some(Carried { claims: store.clone(), pages: store.clone(), carry }),
        clock: Some(clock),
        patience: Patience::default(),
        redrive: Box::new(move |now| {
            let store = redriving.clone();
            Box::pin(async move { store.redrive(&DeadFilter::default(), usize::MAX, now).await.unwrap() })
        }),
        rerender: Box::new(move |template, now| {
            let store = rerendering.clone();
            Box::pin(async move { store.rerender(&conformance::rendering(template), now).await.unwrap() })
        }),
        enable: Box::new(move |name| {
            let enable = enabling.enable_destination(name);
            let enabled = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(enable));
            assert!(enabled.unwrap());
        }),
        guard: Box::new(()),
    }
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
        conformance::queue(|| async move { make_on(server.endpoint(), seed).await }).await;
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
    conformance::rates(|| async {
        open(&client, &settings(), LateClock::default()).await as Arc<dyn RateTable>
    })
    .await;
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
        conformance::history(make_on(server.endpoint(), seed).await, seed).await;
    }
}
