//! The fake keeps the contracts that it stands in for.

use std::sync::Arc;

use postrider_actors::{
    ports::RateTable,
    testing::{
        MemoryRateTable,
        conformance::{self, Subject},
    },
};

async fn make() -> Subject {
    Subject::in_memory()
}

#[tokio::test]
async fn outbox() {
    conformance::outbox(make).await;
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
async fn rates() {
    conformance::rates(|| async { Arc::new(MemoryRateTable::new()) as Arc<dyn RateTable> }).await;
}

#[tokio::test]
async fn histories() {
    for seed in 0..300 {
        conformance::history(make().await, seed).await;
    }
}
