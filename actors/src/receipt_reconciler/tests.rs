//! The pool over the fake ledger, on tokio's paused clock.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use async_trait::async_trait;

use super::*;
use crate::{
    flow::ProgressBoard,
    metrics::ReceiptMetrics,
    model::{
        receipt::{EventId, Receipt, ReceiptFacts, ReceiptKey},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::{Arrival, SourceCursor, StatusChange, Taken},
    testing::{FakeClock, MemoryReceipts},
};

/// The fake, with a count of batches and refusals at will.
#[derive(Default)]
struct Ledger {
    inside: MemoryReceipts,
    batches: AtomicU64,
    calls: AtomicU64,
    refusals: AtomicU32,
}

#[async_trait]
impl ReceiptLedger for Ledger {
    async fn record(&self, records: Vec<MessageRecord>) -> Result<(), StoreError> {
        self.inside.record(records).await
    }

    async fn take(&self, arrival: Arrival) -> Result<Taken, StoreError> {
        self.inside.take(arrival).await
    }

    async fn cursor(&self, source: &str) -> Result<Option<SourceCursor>, StoreError> {
        self.inside.cursor(source).await
    }

    async fn apply(&self, receipts: usize, bytes: usize, at: UnixMs) -> Result<Applied, StoreError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(10)).await;
        if self.refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
        {
            return Err(StoreError::Permanent("a column is missing".into()));
        }
        let applied = self.inside.apply(receipts, bytes, at).await?;
        self.batches.fetch_add(u64::from(applied.total() > 0), Ordering::SeqCst);
        Ok(applied)
    }

    async fn waiting(&self) -> Result<u64, StoreError> {
        self.inside.waiting().await
    }

    async fn parked(&self) -> Result<u64, StoreError> {
        self.inside.parked().await
    }

    async fn rejoin(&self, limit: usize) -> Result<usize, StoreError> {
        self.inside.rejoin(limit).await
    }

    async fn orphan(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        self.inside.orphan(before, limit).await
    }

    async fn expire(
        &self,
        destination: &str,
        before: UnixMs,
        limit: usize,
        at: UnixMs,
    ) -> Result<usize, StoreError> {
        self.inside.expire(destination, before, limit, at).await
    }

    async fn changes(&self, after: Option<u64>, limit: usize) -> Result<Vec<StatusChange>, StoreError> {
        self.inside.changes(after, limit).await
    }

    async fn forget_changes(&self, numbers: &[u64]) -> Result<(), StoreError> {
        self.inside.forget_changes(numbers).await
    }

    async fn retire(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        self.inside.retire(before, limit).await
    }
}

struct World {
    ledger: Arc<Ledger>,
    bell: Bell,
    drain: watch::Sender<bool>,
}

impl World {
    fn new() -> Self {
        Self { ledger: Arc::default(), bell: Bell::default(), drain: watch::Sender::new(false) }
    }

    fn start(&self, pool: usize) -> Vec<tokio::task::JoinHandle<()>> {
        let clock = Arc::new(FakeClock::at(UnixMs(1)));
        let start = |_| {
            let setup = ReceiptReconcilerSetup {
                ledger: self.ledger.clone(),
                receipts_max: 100,
                bytes_max: 1 << 20,
                linger: Duration::from_millis(200),
                clock: clock.clone(),
                arrived: self.bell.clone(),
                metrics: ReceiptMetrics::default().reconciler(),
                progress: ProgressBoard::default().mark("reconciler"),
            };
            tokio::spawn(setup.run(self.drain.subscribe()))
        };
        (0..pool).map(start).collect()
    }

    async fn take(&self, numbers: std::ops::Range<u64>) {
        let receipt = |number: u64| {
            let mut event = [0; 16];
            event[..8].copy_from_slice(&number.to_le_bytes());
            Receipt {
                event: EventId(event),
                key: ReceiptKey::Provider(format!("p-{number}").into()),
                state: MessageState::Delivered,
                at: None,
                facts: ReceiptFacts::default(),
            }
        };
        let arrival = Arrival {
            source: "s".into(),
            destination: "d".into(),
            receipts: numbers.map(receipt).collect(),
            rejects: Vec::new(),
            cursor: None,
            at: UnixMs(1),
        };
        self.ledger.take(arrival).await.unwrap();
        self.bell.ring();
    }

    async fn until_empty(&self) {
        let all = async {
            while self.ledger.waiting().await != Ok(0) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_mins(10), all).await.expect("everything is applied");
    }

    fn batches(&self) -> u64 {
        self.ledger.batches.load(Ordering::SeqCst)
    }
}

#[tokio::test(start_paused = true)]
async fn full_batches_follow_each_other_without_a_wait_and_by_the_whole_pool() {
    for (pool, expected) in [(1, Duration::from_millis(500)), (4, Duration::from_millis(150))] {
        let world = World::new();
        world.take(0..4_000).await;
        let begun = tokio::time::Instant::now();
        let _pool = world.start(pool);
        world.until_empty().await;
        assert_eq!(world.batches(), 40);
        assert!(begun.elapsed() <= expected, "{pool}: {:?}", begun.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn receipts_that_trickle_in_share_batches_and_the_first_does_not_wait() {
    let world = World::new();
    let _pool = world.start(1);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let begun = tokio::time::Instant::now();
    world.take(0..1).await;
    world.until_empty().await;
    assert!(begun.elapsed() < Duration::from_millis(50), "{:?}", begun.elapsed());
    for number in 1..300 {
        world.take(number..number + 1).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.until_empty().await;
    let lingers = begun.elapsed().div_duration_f64(Duration::from_millis(200));
    assert!(world.batches() as f64 <= lingers + 2.0, "{} in {lingers} lingers", world.batches());
}

#[tokio::test(start_paused = true)]
async fn an_idle_pool_looks_twice_a_second() {
    let world = World::new();
    let _pool = world.start(1);
    tokio::time::sleep(Duration::from_secs(100)).await;
    let calls = world.ledger.calls.load(Ordering::SeqCst);
    assert!((180..=210).contains(&calls), "{calls}");
}

#[tokio::test(start_paused = true)]
async fn f49_what_the_ledger_refuses_or_does_not_answer_stays_and_is_applied_later() {
    let world = World::new();
    world.take(0..50).await;
    world.ledger.refusals.store(3, Ordering::SeqCst);
    let _pool = world.start(1);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(world.ledger.waiting().await, Ok(50));
    let calls = world.ledger.calls.load(Ordering::SeqCst);
    assert_eq!(calls, 1, "it is not stormed");
    world.until_empty().await;
    world.ledger.inside.set_down(true);
    tokio::time::sleep(Duration::from_mins(2)).await;
    world.ledger.inside.set_down(false);
    world.take(50..60).await;
    world.until_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_finishes_the_current_batch_and_is_bounded() {
    let world = World::new();
    world.take(0..100).await;
    let pool = world.start(1);
    tokio::time::sleep(Duration::from_millis(5)).await;
    world.drain.send_replace(true);
    for reconciler in pool {
        reconciler.await.unwrap();
    }
    assert_eq!(world.ledger.waiting().await, Ok(0), "the current batch was finished");

    let world = World::new();
    world.ledger.inside.set_down(true);
    let pool = world.start(2);
    tokio::time::sleep(Duration::from_secs(7)).await;
    let begun = tokio::time::Instant::now();
    world.drain.send_replace(true);
    for reconciler in pool {
        reconciler.await.unwrap();
    }
    assert!(begun.elapsed() <= LAST, "{:?}", begun.elapsed());
}
