//! Receipt collector: reads one source of receipts into the ledger's inbox.
//!
//! What a poll of the source brings is taken together with the source's cursor, and acknowledged after that.
//! A crash in between brings the same receipts again, and the inbox knows them. A poll that fails is repeated
//! with the cursor it had: no window is ever skipped because its turn went by (S0.1).

use std::{sync::Arc, time::Duration};

use actix::prelude::*;
use rand::RngExt as _;
use tokio::sync::watch;

use crate::{
    flow::{Bell, Progress, insist},
    metrics::SourceMetrics,
    model::backoff::Backoff,
    ports::{Arrival, Clock, Polled, ReceiptLedger, ReceiptSource, SourceCursor, StoreError},
    supervision::{ChildId, Drain, Fault, Stage},
};

/// How often a collector that waits gives a sign of life and looks whether there is room.
const TICK: Duration = Duration::from_millis(500);

/// How long a poll may take beyond its wait, before it counts as failed.
const ANSWER_MAX: Duration = Duration::from_mins(2);

/// How long the current receipts may take when a drain begins. What is cut off comes again.
const LAST: Duration = Duration::from_secs(1);

/// After a poll that failed.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(30));

/// A source that answers at once that it has nothing must not be asked in a busy loop.
const EMPTY_PAUSE: Duration = Duration::from_millis(20);

/// After how many receipts the inbox is looked at again: counting is not for every poll.
const ROOM_CHECK: u64 = 5_000;

/// What a collector works with.
#[derive(Clone)]
pub struct ReceiptCollectorSetup {
    /// The source's name.
    pub source: Arc<str>,
    /// The destination whose messages its receipts are about.
    pub destination: Arc<str>,
    /// Where receipts come from.
    pub from: Arc<dyn ReceiptSource>,
    /// Where they go.
    pub ledger: Arc<dyn ReceiptLedger>,
    /// How long a poll of the source waits for receipts.
    pub wait: Duration,
    /// Reading pauses while the inbox holds more receipts than this: a source is its own buffer. It is looked
    /// at every few thousand receipts, so that many more may be there, per source.
    pub inbox_max: u64,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// To ring when receipts were taken.
    pub arrived: Bell,
    /// What is counted.
    pub metrics: SourceMetrics,
    /// Sign of life.
    pub progress: Progress,
}

/// The actor.
pub struct ReceiptCollector {
    setup: ReceiptCollectorSetup,
    fault: Fault,
    drain: watch::Sender<bool>,
}

impl Stage for ReceiptCollector {
    const NAME: &'static str = "receipt_collector";

    type Setup = ReceiptCollectorSetup;

    fn new(setup: ReceiptCollectorSetup, _: &ChildId, fault: Fault) -> Self {
        Self { setup, fault, drain: watch::Sender::new(false) }
    }
}

impl Actor for ReceiptCollector {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        let run = self.setup.clone().run(self.drain.subscribe());
        context.spawn(run.into_actor(self).map(|end, this, context| match end {
            Ok(()) => context.stop(),
            Err(error) => this.fault.fail(context, error),
        }));
    }
}

impl Handler<Drain> for ReceiptCollector {
    type Result = ();

    fn handle(&mut self, _: Drain, _: &mut Self::Context) {
        self.drain.send_replace(true);
    }
}

impl ReceiptCollectorSetup {
    /// Until it is drained; then the current receipts have a second.
    async fn run(self, draining: watch::Receiver<bool>) -> Result<(), StoreError> {
        let mut signal = draining.clone();
        let end = tokio::select! {
            end = self.collect(draining) => end,
            () = async {
                // An actor that is gone without a drain aborts its tasks.
                let _ = signal.wait_for(|draining| *draining).await;
                tokio::time::sleep(LAST).await;
            } => Ok(()),
        };
        self.metrics.behind(None);
        end
    }

    /// Shows how far behind the source is: also while it can't be read, which is when it matters.
    fn show_behind(&self, cursor: Option<&SourceCursor>) {
        self.metrics.behind(self.from.behind(cursor, self.clock.wall()));
    }

    async fn collect(&self, draining: watch::Receiver<bool>) -> Result<(), StoreError> {
        let Self { ledger, clock, progress, .. } = self;
        let cursor = || ledger.cursor(&self.source);
        let mut cursor = insist("reading a source's cursor", &**clock, progress, cursor).await?;
        let (mut failures, mut unchecked) = (0_u32, ROOM_CHECK);
        while !*draining.borrow() {
            failpoint!("panic.receipt_collector");
            self.show_behind(cursor.as_ref());
            if unchecked >= ROOM_CHECK {
                self.wait_for_room(cursor.as_ref()).await?;
                unchecked = 0;
            }
            match self.step(&mut cursor).await {
                Ok(0) => {
                    failures = 0;
                    tokio::time::sleep(EMPTY_PAUSE).await;
                }
                Ok(taken) => {
                    failures = 0;
                    unchecked += taken;
                }
                Err(error) => {
                    self.metrics.poll_failed();
                    failures = failures.saturating_add(1);
                    let wait = BACKOFF.wait(failures, rand::rng().random());
                    match &error {
                        // The adapter has said what is missing.
                        StoreError::Denied(_) => {
                            tracing::debug!(source = %self.source, %error, "receipts can't be fetched: it waits for an operator");
                        }
                        StoreError::Permanent(_) => {
                            tracing::error!(source = %self.source, %error, "receipts can't be fetched; retrying until it succeeds");
                        }
                        _ => {
                            tracing::warn!(source = %self.source, %error, "receipts can't be fetched now; retrying the same window");
                        }
                    }
                    tokio::time::sleep(wait).await;
                }
            }
        }
        Ok(())
    }

    /// One look, and what it brought into the inbox; how many.
    async fn step(&self, cursor: &mut Option<SourceCursor>) -> Result<u64, StoreError> {
        let Self { ledger, clock, progress, .. } = self;
        let Polled { receipts, rejects, ignored, cursor: next, acks } = self.poll(cursor.as_ref()).await?;
        let (brought, unreadable) = ((receipts.len() + rejects.len()) as u64, rejects.len());
        if brought > 0 || next.is_some() {
            let arrival = Arrival {
                source: self.source.clone(),
                destination: self.destination.clone(),
                receipts,
                rejects,
                cursor: next.clone(),
                at: clock.wall(),
            };
            let take = || ledger.take(arrival.clone());
            let taken = insist("taking receipts", &**clock, progress, take).await?;
            failpoint!("receipts.taken");
            self.metrics.taken(taken);
            if taken.new > 0 {
                self.arrived.ring();
            }
            if taken.rejected > 0 {
                // The reasons may quote what was sent: they are in the ledger, not in the log (I10).
                tracing::warn!(source = %self.source, rejected = unreadable, "receipts can't be read; the ledger has the reasons");
            }
            if next.is_some() {
                *cursor = next;
            }
        }
        self.metrics.ignored(ignored);
        if !acks.is_empty() {
            let acknowledge = || self.from.acknowledge(&acks);
            let done = insist("acknowledging receipts", &**clock, progress, acknowledge).await;
            if let Err(error) = done {
                tracing::error!(source = %self.source, %error, "receipts stay unacknowledged; their repeats will be recognised");
            }
        }
        Ok(brought + ignored + acks.len() as u64)
    }

    /// Polls once. A poll that never ends counts as failed.
    async fn poll(&self, cursor: Option<&SourceCursor>) -> Result<Polled, StoreError> {
        let mut poll = self.from.poll(cursor, self.wait);
        let deadline = tokio::time::Instant::now() + self.wait + ANSWER_MAX;
        loop {
            if let Ok(polled) = tokio::time::timeout(TICK, poll.as_mut()).await {
                return polled;
            }
            self.show_behind(cursor);
            if tokio::time::Instant::now() >= deadline {
                return Err(StoreError::Unknown("the source does not answer".into()));
            }
        }
    }

    /// Waits until the inbox has room. An unknown number is waited for: the gate fails closed.
    async fn wait_for_room(&self, cursor: Option<&SourceCursor>) -> Result<(), StoreError> {
        let Self { ledger, clock, progress, .. } = self;
        let mut is_told = false;
        loop {
            let waiting = || ledger.waiting();
            let waiting = insist("counting the inbox", &**clock, progress, waiting).await?;
            if waiting <= self.inbox_max {
                return Ok(());
            }
            if !is_told {
                tracing::info!(source = %self.source, waiting, "the inbox is full: reading paused");
                is_told = true;
            }
            tokio::time::sleep(TICK).await;
            self.show_behind(cursor);
        }
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::{
        flow::ProgressBoard,
        metrics::ReceiptMetrics,
        model::{
            receipt::{EventId, Receipt, ReceiptFacts, ReceiptKey, ReceiptReject, RejectedText},
            state::MessageState,
            time::UnixMs,
        },
        testing::{FakeClock, MemoryReceipts, MemorySource},
    };

    fn receipts(numbers: std::ops::Range<u8>) -> Vec<Result<Receipt, ReceiptReject>> {
        let receipt = |number: u8| Receipt {
            event: EventId([number; 16]),
            key: ReceiptKey::Provider(format!("p-{number}").into()),
            state: MessageState::Delivered,
            at: None,
            facts: ReceiptFacts::default(),
        };
        numbers.map(|number| Ok(receipt(number))).collect()
    }

    struct World {
        source: Arc<MemorySource>,
        ledger: Arc<MemoryReceipts>,
        metrics: SourceMetrics,
        drain: watch::Sender<bool>,
    }

    impl World {
        fn new(page: usize) -> Self {
            Self {
                source: Arc::new(MemorySource::new(page)),
                ledger: Arc::new(MemoryReceipts::new()),
                metrics: ReceiptMetrics::default().source("s"),
                drain: watch::Sender::new(false),
            }
        }

        fn start(&self, inbox_max: u64) -> tokio::task::JoinHandle<Result<(), StoreError>> {
            let clock = Arc::new(FakeClock::at(UnixMs(1)));
            let setup = ReceiptCollectorSetup {
                source: "s".into(),
                destination: "d".into(),
                from: self.source.clone(),
                ledger: self.ledger.clone(),
                wait: Duration::from_secs(20),
                inbox_max,
                progress: ProgressBoard::default().mark("collector"),
                clock,
                arrived: Bell::default(),
                metrics: self.metrics.clone(),
            };
            tokio::spawn(setup.run(self.drain.subscribe()))
        }

        async fn until_acknowledged(&self, places: &[usize]) {
            let all = async {
                while self.source.acknowledged() != places {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            let end = tokio::time::timeout(Duration::from_mins(10), all).await;
            end.unwrap_or_else(|_| panic!("{:?}", self.source.acknowledged()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn s0_1_a_look_that_fails_is_repeated_with_the_same_cursor() {
        let world = World::new(2);
        world.source.put(receipts(0..4));
        let collector = world.start(1_000_000);
        world.until_acknowledged(&[2, 4]).await;
        world.source.fail(5);
        world.source.put(receipts(4..5));
        world.until_acknowledged(&[2, 4, 5]).await;
        assert_eq!(world.ledger.waiting().await, Ok(5));
        let polls = world.source.polls();
        // The poll that waited at 4 brought the fifth, so the failures came at 5 and continue there.
        assert_eq!(polls[..3], [None, Some(2), Some(4)]);
        tokio::time::sleep(Duration::from_mins(2)).await;
        assert_eq!(world.metrics.failures(), 5);
        assert!(world.source.polls()[3..].iter().all(|cursor| *cursor == Some(5)), "{polls:?}");
        world.drain.send_replace(true);
        collector.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn s0_1_a_restart_goes_on_at_the_ledgers_cursor_and_what_comes_again_is_known() {
        let world = World::new(2);
        world.source.put(receipts(0..3));
        world.source.fail_acks(1_000_000);
        let collector = world.start(1_000_000);
        while world.ledger.waiting().await != Ok(2) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        collector.abort(); // a crash between the commit and the acknowledgement
        assert!(collector.await.unwrap_err().is_cancelled());
        assert_eq!(world.source.acknowledged(), [0; 0]);
        world.source.fail_acks(0);
        let collector = world.start(1_000_000);
        world.until_acknowledged(&[3]).await;
        assert_eq!(world.source.polls()[1], Some(2));
        assert_eq!(world.ledger.waiting().await, Ok(3));
        // A source that forgot its cursor brings everything again.
        let twice = World { source: Arc::new(MemorySource::new(9)), ..world };
        twice.source.put(receipts(0..0));
        collector.abort();
        let again = Arrival {
            source: "s".into(),
            destination: "d".into(),
            receipts: receipts(0..3).into_iter().map(Result::unwrap).collect(),
            rejects: Vec::new(),
            cursor: None,
            at: UnixMs(2),
        };
        assert_eq!(twice.ledger.take(again).await.unwrap().known, 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_is_away_loses_nothing() {
        let world = World::new(2);
        world.source.put(receipts(0..6));
        world.source.put([Err(ReceiptReject {
            event: EventId([99; 16]),
            at: None,
            place: "f:1".into(),
            reason: "bad".into(),
            text: RejectedText::default(),
        })]);
        world.ledger.set_down(true);
        let _collector = world.start(1_000_000);
        tokio::time::sleep(Duration::from_mins(1)).await;
        world.ledger.set_down(false);
        world.ledger.lose_answers(2);
        world.until_acknowledged(&[2, 4, 6, 7]).await;
        assert_eq!(world.ledger.waiting().await, Ok(6));
    }

    #[tokio::test(start_paused = true)]
    async fn reading_pauses_while_the_inbox_is_full() {
        let world = World::new(3);
        world.source.put(receipts(0..3));
        let first = world.start(2);
        world.until_acknowledged(&[3]).await;
        first.abort();
        world.source.put(receipts(3..6));
        let _second = world.start(2);
        tokio::time::sleep(Duration::from_mins(5)).await;
        assert_eq!(world.source.acknowledged(), [3], "three wait, more than two");
        world.ledger.apply(1, 1 << 20, UnixMs(1)).await.unwrap();
        world.until_acknowledged(&[3, 6]).await;
    }

    #[tokio::test(start_paused = true)]
    async fn how_far_behind_a_source_is_is_shown_while_it_can_not_be_read_too() {
        let world = World::new(2);
        world.source.put(receipts(0..4));
        world.source.ignore(3);
        let collector = world.start(1_000_000);
        world.until_acknowledged(&[2, 4]).await;
        assert_eq!((world.metrics.shown_behind(), world.metrics.shown_ignored()), (Some(0), 3));
        world.source.fail(u32::MAX);
        world.source.put(receipts(4..9));
        tokio::time::sleep(Duration::from_mins(2)).await;
        // The poll that waited at 4 brought two more.
        assert_eq!(world.metrics.shown_behind(), Some(3), "a second for each that is not read");
        world.drain.send_replace(true);
        collector.await.unwrap().unwrap();
        assert_eq!(world.metrics.shown_behind(), None, "nobody reads it any more");
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_takes_a_second_whatever_the_collector_waits_for() {
        for is_down in [false, true] {
            let world = World::new(2);
            world.ledger.set_down(is_down);
            let collector = world.start(1_000_000);
            tokio::time::sleep(Duration::from_secs(5)).await;
            let begun = tokio::time::Instant::now();
            world.drain.send_replace(true);
            collector.await.unwrap().unwrap();
            assert!(begun.elapsed() <= LAST, "{:?}", begun.elapsed());
        }
    }
}
