//! The transport on SQS keeps its contract over an emulator, and the queue that processes share by it keeps that of
//! `Queue`, with the in-memory store for outbox, ledger and claims.
#![cfg(feature = "aws")]

#[path = "cloud/mod.rs"]
mod cloud;
#[path = "sqs/mod.rs"]
mod sqs;

use std::sync::Arc;

use postrider_actors::{
    ports::Transport,
    testing::{
        MemoryStore,
        conformance::{self, Carried, Patience, Subject},
    },
};
use sqs::Queues;

async fn make(queues: &Queues, fifo: bool) -> Subject {
    let store = Arc::new(MemoryStore::new());
    let names = queues.create(fifo, &["d", "e"]).await;
    let (carry, clock) = conformance::shared_queue(queues.transport(&names), store.clone(), store.clone());
    let queue = carry.queue.clone();
    let (redriven, rerendered, enabled) = (store.clone(), store.clone(), store.clone());
    Subject {
        outbox: store.clone(),
        queue,
        ledger: store.clone(),
        steering: store.clone(),
        archive: store.clone(),
        carried: Some(Carried { claims: store.clone(), pages: store, carry }),
        clock: Some(clock),
        patience: Patience::default(),
        redrive: Box::new(move |now| {
            let store = redriven.clone();
            Box::pin(async move { store.redrive(now) })
        }),
        rerender: Box::new(move |template, now| {
            let store = rerendered.clone();
            Box::pin(async move { store.rerender(&conformance::rendering(template), now) })
        }),
        enable: Box::new(move |name| enabled.enable_destination(name)),
        guard: Box::new(()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn transport() {
    let queues = &Queues::start();
    for fifo in [false, true] {
        conformance::transport(|| async move {
            let names = ["one", "other"];
            let transport = queues.transport(&queues.create(fifo, &names).await);
            (transport as Arc<dyn Transport>, names.map(str::to_owned))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn queue() {
    let queues = Queues::start();
    conformance::queue(|| make(&queues, false)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn fifo_queue() {
    let queues = Queues::start();
    conformance::queue(|| make(&queues, true)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn ledger() {
    let queues = Queues::start();
    conformance::ledger(|| make(&queues, false)).await;
}

/// `POSTRIDER_SEED=n` plays one history again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn histories() {
    let queues = Queues::start();
    let number = std::env::var("POSTRIDER_SEED").ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = number.map_or(0..1, |seed| seed..seed + 1);
    for seed in seeds {
        conformance::history(make(&queues, false).await, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs ministack: POSTRIDER_MINISTACK names its executable; script/test installs it"]
async fn an_unknown_depth_is_not_zero_and_a_missing_queue_is_named() {
    let queues = Queues::start();
    let transport = queues.transport(&queues.create(false, &["d"]).await);
    assert_eq!(transport.depth("d").await.unwrap().total(), 0);
    let missing = transport.depth("e").await.unwrap_err().to_string();
    assert!(missing.contains("q0-e") && missing.contains("postrider migrate"), "{missing}");
    queues.server.kill();
    assert!(transport.depth("d").await.is_err(), "unknown is not 0");
}
