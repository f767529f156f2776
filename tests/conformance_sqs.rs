//! The SQS queue keeps the contract of `Queue` over an emulator, with the in-memory store for outbox, ledger and
//! claims.
#![cfg(feature = "aws")]

#[path = "cloud/mod.rs"]
mod cloud;
#[path = "sqs/mod.rs"]
mod sqs;

use std::{sync::Arc, time::Duration};

use postrider_actors::{
    ports::DispatchTarget as _,
    testing::{
        MemoryStore,
        conformance::{self, Carried, Patience, Subject},
    },
};
use sqs::{Queues, clock, settings};

/// An entry that was received while nobody wanted it is hidden for some seconds.
const PATIENCE: Patience = Patience { arrival: Duration::from_secs(5) };

async fn make(queues: &Queues, suffix: &str) -> Subject {
    let store = Arc::new(MemoryStore::new());
    let (url, dead) = queues.create(suffix).await;
    let clock = clock();
    let queue = queues.open(&settings(&url, &dead), &store, clock.clone());
    let (redriven, enabled) = (store.clone(), store.clone());
    Subject {
        outbox: store.clone(),
        queue: queue.clone(),
        ledger: store.clone(),
        archive: store.clone(),
        carried: Some(Carried { source: store.clone(), target: queue, claims: store.clone(), pages: store }),
        clock: Some(clock),
        patience: PATIENCE,
        redrive: Box::new(move |now| {
            let store = redriven.clone();
            Box::pin(async move { store.redrive(now) })
        }),
        enable: Box::new(move |name| enabled.enable_destination(name)),
        guard: Box::new(()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn queue() {
    let queues = Queues::start();
    conformance::queue(|| make(&queues, "")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn fifo_queue() {
    let queues = Queues::start();
    conformance::queue(|| make(&queues, ".fifo")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn ledger() {
    let queues = Queues::start();
    conformance::ledger(|| make(&queues, "")).await;
}

/// `POSTRIDER_SEED=n` plays one history again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn histories() {
    let queues = Queues::start();
    let number = std::env::var("POSTRIDER_SEED").ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = number.map_or(0..1, |seed| seed..seed + 1);
    for seed in seeds {
        conformance::history(make(&queues, "").await, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn depth_counts_what_is_visible_in_flight_and_delayed() {
    let queues = Queues::start();
    let (url, dead) = queues.create("").await;
    let queue = queues.open(&settings(&url, &dead), &Arc::new(MemoryStore::new()), clock());
    let depth = queue.queue_depth().await.unwrap();
    assert_eq!(depth.total(), 0);
    queues.server.kill();
    assert!(queue.queue_depth().await.is_err(), "unknown is not 0");
}
