//! The fake keeps the contracts that it stands in for.

use postrider_actors::testing::conformance::{self, Subject};

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
async fn histories() {
    for seed in 0..300 {
        conformance::history(make().await, seed).await;
    }
}
