//! Receipt sweeper: timed work on receipts and on the messages that wait for them. Parked receipts find
//! their message or become orphans (S0.6), messages without a receipt expire (S0.5), and old rows are removed.
//!
//! Every job is done in bounded steps with a pause after each, so that nothing waits behind them for long:
//! millions of old rows are removed slowly, beside the deliveries.

use std::{sync::Arc, time::Duration};

use actix::prelude::*;

use crate::{
    flow::{Bell, Progress, insist},
    metrics::SweeperMetrics,
    model::time::{MonoMs, UnixMs},
    ports::{Clock, ReceiptLedger, StoreError},
    supervision::{ChildId, Drain, Fault, Stage},
};

/// The longest the sweeper sleeps.
const TICK: Duration = Duration::from_millis(500);

/// Receipts or messages of one step.
const STEP_MAX: usize = 1_000;

/// The pause after a step that found as much as it may take: there is more.
const STEP_PAUSE: Duration = Duration::from_millis(50);

/// How often an idle job checks for work. What it waits for takes hours.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// How often parked receipts are looked at. It is the second of two ways for them to find their message, for
/// what `record` could not see.
const REJOIN_EVERY: Duration = Duration::from_secs(5);

/// How often the inbox and the parked receipts are counted …
const COUNT_EVERY: Duration = Duration::from_secs(5);

/// … and how long that may take: a store that is stopped answers nothing, and nothing gives a sign of life meanwhile.
const COUNT_MAX: Duration = Duration::from_secs(5);

/// The wait after a job was refused.
const REFUSED_WAIT: Duration = Duration::from_mins(1);

/// A destination whose messages expire.
#[derive(Clone, Debug)]
pub struct Expiring {
    /// Its name.
    pub destination: Arc<str>,
    /// How long after it was sent a message waits for a final receipt (72 h).
    pub after: Duration,
}

/// What a sweeper of receipts works with.
#[derive(Clone)]
pub struct ReceiptSweeperSetup {
    /// Where receipts and messages are.
    pub ledger: Arc<dyn ReceiptLedger>,
    /// Whose messages expire, and when.
    pub expiring: Vec<Expiring>,
    /// How long a receipt waits for its message before it is an orphan.
    pub orphan_after: Duration,
    /// How long rows, orphans, rejects and the memory of events are kept; zero: for ever.
    pub retention: Duration,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// To ring when receipts are in the inbox again.
    pub arrived: Bell,
    /// What is counted.
    pub metrics: SweeperMetrics,
    /// Sign of life.
    pub progress: Progress,
}

/// The actor. Nothing ends it but a drain or a panic.
pub struct ReceiptSweeper {
    setup: ReceiptSweeperSetup,
}

impl Stage for ReceiptSweeper {
    const NAME: &'static str = "receipt_sweeper";

    type Setup = ReceiptSweeperSetup;

    fn new(setup: ReceiptSweeperSetup, _: &ChildId, _: Fault) -> Self {
        Self { setup }
    }
}

impl Actor for ReceiptSweeper {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.spawn(self.setup.clone().run().into_actor(self).map(|never, _, _| match never {}));
    }
}

impl Handler<Drain> for ReceiptSweeper {
    type Result = ();

    /// Nothing is held between two steps, and a step that is cut off is repeated.
    fn handle(&mut self, _: Drain, context: &mut Self::Context) {
        context.stop();
    }
}

#[derive(Clone, Debug)]
enum SweepJob {
    Rejoin,
    Orphan,
    Expire(Expiring),
    Retire,
    Count,
}

impl SweepJob {
    fn every(&self) -> Duration {
        match self {
            Self::Rejoin => REJOIN_EVERY,
            Self::Count => COUNT_EVERY,
            Self::Orphan | Self::Expire(_) | Self::Retire => LOOK_EVERY,
        }
    }
}

impl ReceiptSweeperSetup {
    fn jobs(&self) -> Vec<SweepJob> {
        let mut jobs = vec![SweepJob::Count, SweepJob::Rejoin, SweepJob::Orphan];
        jobs.extend(self.expiring.iter().cloned().map(SweepJob::Expire));
        if !self.retention.is_zero() {
            jobs.push(SweepJob::Retire);
        }
        jobs
    }

    async fn run(self) -> std::convert::Infallible {
        let mut jobs: Vec<_> = self.jobs().into_iter().map(|job| (self.clock.mono(), job)).collect();
        loop {
            failpoint!("panic.receipt_sweeper");
            let now = self.clock.mono();
            let mut has_more = false;
            for (due, job) in &mut jobs {
                if *due > now {
                    continue;
                }
                let found = match self.step(job).await {
                    Ok(found) => found,
                    Err(error) => {
                        tracing::error!(%error, ?job, "the ledger refused a sweep; retrying in a minute");
                        *due = self.clock.mono().after(REFUSED_WAIT);
                        continue;
                    }
                };
                if found >= STEP_MAX {
                    has_more = true;
                    tokio::time::sleep(STEP_PAUSE).await;
                } else {
                    *due = self.clock.mono().after(job.every());
                }
            }
            if !has_more {
                tokio::time::sleep(self.sleep(&jobs)).await;
            }
        }
    }

    fn sleep(&self, jobs: &[(MonoMs, SweepJob)]) -> Duration {
        let now = self.clock.mono();
        let next = jobs.iter().map(|(due, _)| due.since(now)).min();
        next.map_or(TICK, |next| next.clamp(Duration::from_millis(1), TICK))
    }

    /// One bounded step; how much it found, if there may be more.
    async fn step(&self, job: &SweepJob) -> Result<usize, StoreError> {
        let Self { ledger, clock, progress, metrics, .. } = self;
        let now = clock.wall();
        let ago = |age: Duration| UnixMs(now.0.saturating_sub(UnixMs(0).after(age).0));
        match job {
            SweepJob::Rejoin => {
                let rejoin = || ledger.rejoin(STEP_MAX);
                let found = insist("looking for parked receipts", &**clock, progress, rejoin).await?;
                if found > 0 {
                    metrics.rejoined(found);
                    self.arrived.ring();
                }
                Ok(found)
            }
            SweepJob::Orphan => {
                let orphan = || ledger.orphan(ago(self.orphan_after), STEP_MAX);
                let found = insist("giving parked receipts up", &**clock, progress, orphan).await?;
                if found > 0 {
                    metrics.orphaned(found);
                    tracing::warn!(receipts = found, "receipts of unknown messages were given up");
                }
                Ok(found)
            }
            SweepJob::Expire(Expiring { destination, after }) => {
                let expire = || ledger.expire(destination, ago(*after), STEP_MAX, now);
                let found = insist("marking expired messages", &**clock, progress, expire).await?;
                if found > 0 {
                    metrics.expired(destination, found);
                    tracing::warn!(%destination, messages = found, "messages expired: no receipt in time");
                }
                Ok(found)
            }
            SweepJob::Retire => {
                let retire = || ledger.retire(ago(self.retention), STEP_MAX);
                // "Roughly how many": whatever it found, there may be more.
                let found = insist("removing what is old", &**clock, progress, retire).await?;
                Ok(if found > 0 { STEP_MAX } else { 0 })
            }
            SweepJob::Count => {
                let (waiting, parked) = tokio::join!(counted(ledger.waiting()), counted(ledger.parked()));
                metrics.waiting(waiting);
                metrics.parked(parked);
                Ok(0)
            }
        }
    }
}

/// Not insisted upon: what is not known is not shown.
async fn counted(count: impl Future<Output = Result<u64, StoreError>>) -> Option<u64> {
    match tokio::time::timeout(COUNT_MAX, count).await {
        Ok(Ok(receipts)) => Some(receipts),
        Ok(Err(error)) => {
            tracing::debug!(%error, "receipts can't be counted");
            None
        }
        Err(_) => {
            tracing::debug!("counting receipts timed out");
            None
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
            ids::{FileId, MessageId},
            receipt::{EventId, Receipt, ReceiptFacts, ReceiptKey},
            record::MessageRecord,
            state::MessageState,
        },
        ports::Arrival,
        testing::{MemoryReceipts, RowReader, TokioClock},
    };

    const START: u64 = 1_700_000_000_000;
    /// One: every tick is run.
    const HOUR: Duration = Duration::from_mins(2);

    struct World {
        ledger: Arc<MemoryReceipts>,
        clock: Arc<TokioClock>,
        board: ProgressBoard,
        metrics: SweeperMetrics,
    }

    fn id(row: u64) -> MessageId {
        MessageId { file: FileId([1; 16]), row }
    }

    impl World {
        fn start(retention: Duration) -> Self {
            let clock = Arc::new(TokioClock::at(UnixMs(START)));
            let ledger = Arc::new(MemoryReceipts::new());
            let (board, metrics) = (ProgressBoard::default(), ReceiptMetrics::default().sweeper());
            let setup = ReceiptSweeperSetup {
                ledger: ledger.clone(),
                expiring: vec![
                    Expiring { destination: "slow".into(), after: 72 * HOUR },
                    Expiring { destination: "fast".into(), after: HOUR },
                ],
                orphan_after: 24 * HOUR,
                retention,
                clock: clock.clone(),
                arrived: Bell::default(),
                metrics: metrics.clone(),
                progress: board.mark("sweeper"),
            };
            tokio::spawn(setup.run());
            Self { ledger, clock, board, metrics }
        }

        async fn sent(&self, rows: std::ops::Range<u64>, destination: &str) {
            let record = |row| MessageRecord {
                id: id(row),
                destination: destination.into(),
                feed: "f".into(),
                recipient: "r".into(),
                state: MessageState::Sent,
                attempts: 1,
                status: 200,
                reason: None,
                detail: None,
                provider_id: None,
                accepted_at: self.clock.wall(),
                at: self.clock.wall(),
            };
            self.ledger.record(rows.map(record).collect()).await.unwrap();
        }

        async fn parked(&self, row: u64) {
            let receipt = Receipt {
                event: EventId([9; 16]),
                key: ReceiptKey::Message(id(row)),
                state: MessageState::Delivered,
                at: None,
                facts: ReceiptFacts::default(),
            };
            let arrival = Arrival {
                source: "s".into(),
                destination: "slow".into(),
                receipts: vec![receipt],
                rejects: Vec::new(),
                cursor: None,
                at: self.clock.wall(),
            };
            self.ledger.take(arrival).await.unwrap();
            self.ledger.apply(9, 1 << 20, self.clock.wall()).await.unwrap();
        }

        async fn state(&self, row: u64, destination: &str) -> Option<MessageState> {
            self.ledger.row(id(row), destination).await.map(|row| row.state)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn s0_5_messages_expire_by_their_destinations_timeout_in_bounded_steps() {
        let world = World::start(Duration::ZERO);
        world.sent(1..5_001, "slow").await;
        world.sent(1..2, "fast").await;
        tokio::time::sleep(HOUR.checked_sub(Duration::from_secs(15)).unwrap()).await;
        assert_eq!(world.state(1, "fast").await, Some(MessageState::Sent));
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(world.state(1, "fast").await, Some(MessageState::Expired));
        assert_eq!(world.state(1, "slow").await, Some(MessageState::Sent));
        tokio::time::sleep(71 * HOUR + Duration::from_secs(15)).await;
        for row in [1, 2_500, 5_000] {
            assert_eq!(world.state(row, "slow").await, Some(MessageState::Expired), "{row}");
        }
        assert_eq!(world.ledger.tally().await.rows, 5_001, "no retention, nothing goes");
    }

    #[tokio::test(start_paused = true)]
    async fn s0_6_a_parked_receipt_is_an_orphan_after_its_time() {
        let world = World::start(Duration::ZERO);
        world.parked(7).await;
        tokio::time::sleep((24 * HOUR).checked_sub(Duration::from_secs(20)).unwrap()).await;
        assert_eq!(world.ledger.tally().await.orphans, 0);
        tokio::time::sleep(Duration::from_secs(40)).await;
        let tally = world.ledger.tally().await;
        assert_eq!((tally.parked, tally.orphans), (0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_old_goes_after_its_retention() {
        let world = World::start(100 * HOUR);
        world.sent(1..3_001, "other").await;
        tokio::time::sleep((100 * HOUR).checked_sub(Duration::from_secs(20)).unwrap()).await;
        assert_eq!(world.ledger.tally().await.rows, 3_000);
        tokio::time::sleep(Duration::from_secs(40)).await;
        assert_eq!(world.ledger.tally().await.rows, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn f49_a_ledger_that_is_away_is_waited_for() {
        let world = World::start(Duration::ZERO);
        world.sent(1..2, "fast").await;
        world.ledger.set_down(true);
        tokio::time::sleep(2 * HOUR).await;
        world.ledger.set_down(false);
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(world.state(1, "fast").await, Some(MessageState::Expired));
    }

    #[tokio::test(start_paused = true)]
    async fn f49_a_ledger_that_hangs_is_not_counted_and_does_not_make_the_sweeper_look_stuck() {
        let world = World::start(Duration::ZERO);
        world.parked(7).await;
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(world.metrics.shown(), (Some(0), Some(1)));
        world.ledger.hang_counts(true);
        for _ in 0..120 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let stuck = world.board.stuck(world.clock.mono());
            assert!(stuck.is_empty(), "{stuck:?}");
        }
        assert_eq!(world.metrics.shown(), (None, None), "unknown, never 0");
        world.sent(1..2, "fast").await;
        tokio::time::sleep(HOUR + Duration::from_secs(30)).await;
        assert_eq!(world.state(1, "fast").await, Some(MessageState::Expired), "the others have their turn");
        world.ledger.hang_counts(false);
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert_eq!(world.metrics.shown(), (Some(0), Some(1)));
    }
}
