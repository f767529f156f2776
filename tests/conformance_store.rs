//! The embedded store keeps the contracts of Outbox, Queue and Ledger.

use std::sync::Arc;

use postrider::{
    adapters::embedded::{EmbeddedStore, Operator},
    console::{DeadFilter, Operate as _},
};
use postrider_actors::testing::conformance::{self, Patience, Subject};

async fn make() -> Subject {
    let dir = tempfile::tempdir().unwrap();
    let store =
        Arc::new(EmbeddedStore::open(dir.path(), Arc::new(|error| panic!("fatal: {error}"))).unwrap());
    let (redriving, enabling) = (dir.path().to_owned(), dir.path().to_owned());
    Subject {
        outbox: store.clone(),
        queue: store.clone(),
        ledger: store.clone(),
        claims: store.clone(),
        archive: store,
        clock: None,
        patience: Patience::default(),
        // As the command does: from outside, beside the daemon.
        redrive: Box::new(move |now| {
            let redriven =
                Operator::open(&redriving).unwrap().redrive(&DeadFilter::default(), usize::MAX, now);
            Box::pin(async { redriven.unwrap() })
        }),
        enable: Box::new(move |name| assert!(Operator::open(&enabling).unwrap().enable(name).unwrap())),
        guard: Box::new(dir),
    }
}

/// With a queue that only carries.
async fn carried() -> Subject {
    make().await.carried(1)
}

#[tokio::test]
async fn outbox() {
    conformance::outbox(make).await;
}

#[tokio::test]
async fn claims() {
    conformance::claims(make).await;
}

#[tokio::test]
async fn a_queue_that_only_carries() {
    for seed in 0..4 {
        conformance::queue(|| async move { make().await.carried(seed) }).await;
    }
    conformance::ledger(carried).await;
    conformance::claims(carried).await;
}

#[tokio::test]
async fn queue() {
    conformance::queue(make).await;
}

#[tokio::test]
async fn ledger() {
    conformance::ledger(make).await;
}

#[tokio::test]
async fn archive() {
    conformance::archive(make).await;
    conformance::archive(carried).await;
}

#[tokio::test]
async fn entries() {
    conformance::entries(make).await;
}

/// `POSTRIDER_SEED=n` plays one history again, `POSTRIDER_SEEDS=n` plays more.
#[tokio::test]
async fn histories() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("POSTRIDER_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("POSTRIDER_SEEDS").unwrap_or(48),
    };
    for seed in seeds {
        conformance::history(make().await, seed).await;
        if seed % 4 == 0 {
            conformance::history(make().await.carried(seed), seed).await;
        }
    }
}
