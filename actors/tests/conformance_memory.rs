//! The fake keeps the contracts that it stands in for, with its own queue and with one that several processes could share.

use std::sync::Arc;

use postrider_actors::{
    ports::{RateTable, Transport},
    testing::{
        MemoryRateTable, MemoryTable, MemoryTransport, TransportFaults,
        conformance::{self, ReceiptSubject, Subject, TableSubject},
    },
};

async fn make() -> Subject {
    Subject::in_memory()
}

async fn carried() -> Subject {
    Subject::in_memory_carried(1)
}

#[tokio::test]
async fn outbox() {
    conformance::outbox(make).await;
    conformance::outbox(carried).await;
}

#[tokio::test]
async fn queue() {
    conformance::queue(make).await;
}

#[tokio::test]
async fn a_queue_that_is_shared() {
    for seed in 0..100 {
        conformance::queue(|| async move { Subject::in_memory_carried(seed) }).await;
    }
}

#[tokio::test(start_paused = true)]
async fn transport() {
    for keeps_order in [false, true] {
        let names = || ["one".to_owned(), "other".to_owned()];
        let make = || async move {
            let transport = MemoryTransport::new(1, TransportFaults::default(), keeps_order);
            (Arc::new(transport) as Arc<dyn Transport>, names())
        };
        conformance::transport(make).await;
    }
}

#[tokio::test]
async fn ledger() {
    conformance::ledger(make).await;
    conformance::ledger(carried).await;
}

#[tokio::test]
async fn claims() {
    conformance::claims(carried).await;
}

#[tokio::test]
async fn rates() {
    conformance::rates(|| async { Arc::new(MemoryRateTable::new()) as Arc<dyn RateTable> }).await;
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

#[tokio::test]
async fn histories() {
    for seed in 0..300 {
        conformance::history(make().await, seed).await;
        conformance::history(Subject::in_memory_carried(seed), seed).await;
    }
}

#[tokio::test]
async fn receipts() {
    conformance::receipts(|| async { ReceiptSubject::in_memory() }).await;
}

/// It shows that the histories themselves hold together.
#[tokio::test]
async fn receipt_histories() {
    for seed in 0..100 {
        conformance::receipt_history(ReceiptSubject::in_memory(), seed).await;
    }
}

#[tokio::test]
async fn tables() {
    conformance::tables(|| async {
        let table = Arc::new(MemoryTable::new());
        table.refuse("poison");
        table.can_sift();
        let read = table.clone();
        TableSubject {
            table,
            refused: "poison".into(),
            read: Box::new(move || {
                read.rows()
                    .into_iter()
                    .map(|(key, mut values)| (key, values.remove("who").flatten()))
                    .collect()
            }),
            guard: Box::new(()),
        }
    })
    .await;
}
