//! The embedded store keeps the contracts of Outbox, Queue and Ledger.

#[path = "receipt_view/mod.rs"]
mod receipt_view;

use std::sync::Arc;

use async_trait::async_trait;
use postrider_actors::ports::console::{
    DeadFilter, Operate as _, Order,
    receipts::{ReceiptFilter, ReceiptView as _},
};
use postrider_actors::{
    model::{ids::MessageId, time::UnixMs},
    testing::{
        LedgerReceipt, LedgerRow, LedgerSource, LedgerTally, RowReader,
        conformance::{self, Patience, ReceiptSubject, Subject},
    },
};
use postrider_sqlite::{EmbeddedStore, Operator, ReceiptOperator, ReceiptViewer};

async fn make() -> Subject {
    let dir = tempfile::tempdir().unwrap();
    let store =
        Arc::new(EmbeddedStore::open(dir.path(), Arc::new(|error| panic!("fatal: {error}"))).unwrap());
    let path = || dir.path().to_owned();
    let (redriving, rerendering, enabling) = (path(), path(), path());
    Subject {
        outbox: store.clone(),
        queue: store.clone(),
        ledger: store.clone(),
        steering: store.clone(),
        archive: store,
        carried: None,
        clock: None,
        patience: Patience::default(),
        // As the command does: from outside, beside the daemon.
        redrive: Box::new(move |now| {
            let redriven =
                Operator::open(&redriving).unwrap().redrive(&DeadFilter::default(), usize::MAX, now);
            Box::pin(async { redriven.unwrap() })
        }),
        rerender: Box::new(move |template, now| {
            let mut operator = Operator::open(&rerendering).unwrap();
            let renderings = conformance::rendering(template);
            let done =
                operator.rerender(&DeadFilter::default(), &renderings, usize::MAX, now, false).unwrap();
            Box::pin(async move { done.redriven })
        }),
        enable: Box::new(move |name| {
            let order = Order::Resume { destination: name.to_owned() };
            assert_eq!(Operator::open(&enabling).unwrap().order(&order, "tests", UnixMs(1)).unwrap(), 1);
        }),
        guard: Box::new(dir),
    }
}

/// The suite looks in as a command does: from outside, beside the daemon.
struct Rows(ReceiptViewer);

#[async_trait]
impl RowReader for Rows {
    async fn row(&self, id: MessageId, destination: &str) -> Option<LedgerRow> {
        let rows = self.0.message(id).await.unwrap();
        let row = rows.into_iter().find(|row| &*row.destination == destination)?;
        assert!(row.state >= row.recorded && row.updated_at >= row.recorded_at);
        Some(LedgerRow {
            id: row.id,
            destination: row.destination,
            feed: row.feed,
            recipient: row.recipient.into(),
            state: row.state,
            attempts: row.attempts,
            status: row.status,
            reason: row.reason,
            detail: row.detail.map(Into::into),
            provider_id: row.provider_id.map(Into::into),
            accepted_at: row.accepted_at,
            at: row.recorded_at,
            reported: row.reported,
            receipt: row.receipt.map(|receipt| LedgerReceipt {
                state: receipt.state,
                at: receipt.at,
                facts: receipt.facts,
            }),
        })
    }

    async fn tally(&self) -> LedgerTally {
        let all = ReceiptFilter::default();
        LedgerTally {
            rows: self.0.counts(None).await.unwrap().iter().map(|count| count.messages).sum(),
            parked: self.0.parked(&all, usize::MAX).await.unwrap().len() as u64,
            orphans: self.0.orphans(&all, usize::MAX).await.unwrap().len() as u64,
            rejects: self.0.rejects(&all, usize::MAX).await.unwrap().len() as u64,
        }
    }

    async fn source(&self, name: &str) -> Option<LedgerSource> {
        let source = self.0.sources().await.unwrap().into_iter().find(|source| &*source.name == name)?;
        Some(LedgerSource { receipts_at: source.receipts_at, cursor_at: source.cursor_at })
    }
}

async fn make_receipts() -> ReceiptSubject {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(dir.path(), Arc::new(|error| panic!("fatal: {error}"))).unwrap();
    store.keep_changes(true);
    let rows = Rows(ReceiptViewer::open(dir.path()).unwrap());
    let rejects = ReceiptOperator::open(dir.path()).unwrap();
    ReceiptSubject {
        ledger: Arc::new(store),
        rejects: Arc::new(rejects),
        rows: Arc::new(rows),
        guard: Box::new(dir),
    }
}

#[tokio::test]
async fn receipts() {
    conformance::receipts(make_receipts).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receipts_on_several_threads() {
    conformance::receipts(make_receipts).await;
}

#[tokio::test]
async fn what_commands_list_of_receipts() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(dir.path(), Arc::new(|error| panic!("fatal: {error}"))).unwrap();
    let view = ReceiptViewer::open(dir.path()).unwrap();
    receipt_view::what_is_held_is_listed_by_source_and_destination(&store, &view).await;
}

/// `POSTRIDER_SEED=n` plays one history again, `POSTRIDER_SEEDS=n` plays more.
#[tokio::test]
async fn receipt_histories() {
    for seed in seeds(12) {
        conformance::receipt_history(make_receipts().await, seed).await;
    }
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
async fn archive() {
    conformance::archive(make).await;
}

#[tokio::test]
async fn entries() {
    conformance::entries(make).await;
}

/// `POSTRIDER_SEED=n` plays one history again, `POSTRIDER_SEEDS=n` plays more.
#[tokio::test]
async fn histories() {
    for seed in seeds(48) {
        conformance::history(make().await, seed).await;
    }
}

fn seeds(by_default: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match number("POSTRIDER_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("POSTRIDER_SEEDS").unwrap_or(by_default),
    }
}
