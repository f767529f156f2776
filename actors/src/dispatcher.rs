//! Dispatcher: hands due batches from a store to the queue that carries them to workers, on whatever machine. A batch
//! that is to be tried again waits in the store until its time has come.
//!
//! The queue is shared and one line for all: what can't be delivered now is not put into it.
//! Batches of a destination that config pauses or that is disabled (410) stay in the outbox; and what is
//! dispatched is held back as the delay policy says (S2.3, S2.6).

use std::{collections::HashMap, sync::Arc, time::Duration};

use actix::prelude::*;

use crate::{
    flow::{Bell, Progress, insist},
    metrics::QueueMetrics,
    model::{
        delay::{Delay, DelayPolicy},
        ids::BatchId,
        time::MonoMs,
    },
    ports::{
        Clock, DispatchSource, DispatchTarget, ItemOutcome, Ledger, OutboxEntry, OutstandingQuery, StoreError,
    },
    supervision::{ChildId, Drain, Fault, Stage},
};

/// Batches moved in one go.
const GROUP_MAX: usize = 256;

/// The longest the dispatcher sleeps; redrives come from other processes and ring no bell.
const TICK: Duration = Duration::from_millis(500);

/// The wait after the queue took nothing of what it was offered.
const REFUSED_WAIT: Duration = Duration::from_millis(200);

/// How long it is taken for known which destinations are disabled.
const DISABLED_FOR: Duration = Duration::from_secs(1);

/// What a dispatcher works with.
#[derive(Clone)]
pub struct DispatcherSetup {
    /// Where batches come from.
    pub source: Arc<dyn DispatchSource>,
    /// Where they go.
    pub target: Arc<dyn DispatchTarget>,
    /// Which destinations are disabled.
    pub ledger: Arc<dyn Ledger>,
    /// Destinations whose messages config holds.
    pub paused: Vec<Arc<str>>,
    /// How long the queue holds back what is dispatched.
    pub delay: DelayPolicy,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Rung when batches were appended, or are due again.
    pub appended: Bell,
    /// To ring when batches were queued: one bell per delivery worker.
    pub queued: Vec<Bell>,
    /// What is counted.
    pub metrics: QueueMetrics,
    /// Sign of life.
    pub progress: Progress,
}

/// The actor.
pub struct Dispatcher {
    setup: DispatcherSetup,
    fault: Fault,
}

impl Stage for Dispatcher {
    const NAME: &'static str = "dispatcher";

    type Setup = DispatcherSetup;

    fn new(setup: DispatcherSetup, _: &ChildId, fault: Fault) -> Self {
        Self { setup, fault }
    }
}

impl Actor for Dispatcher {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.spawn(self.setup.clone().run().into_actor(self).map(|error, this, context| {
            this.fault.fail(context, error);
        }));
    }
}

impl Handler<Drain> for Dispatcher {
    type Result = ();

    /// Nothing is in hand between two steps, and a step that is cut off is repeated.
    fn handle(&mut self, _: Drain, context: &mut Self::Context) {
        context.stop();
    }
}

impl DispatcherSetup {
    async fn run(self) -> StoreError {
        let mut delay = Delay::new(self.delay.clone());
        let mut held = Held::default();
        loop {
            failpoint!("panic.dispatcher");
            self.progress.turn(self.clock.mono());
            match self.dispatch(&mut delay, &mut held).await {
                Ok(Step::MoreIsDue) => {}
                Ok(Step::Refused) => tokio::time::sleep(REFUSED_WAIT).await,
                Ok(Step::NothingDue(wait)) => self.appended.wait(wait).await,
                Err(error) => return error,
            }
        }
    }

    async fn dispatch(&self, delay: &mut Delay, held: &mut Held) -> Result<Step, StoreError> {
        let Self { source, target, clock, progress, .. } = self;
        self.look_up_held(held).await?;
        let due_by = clock.wall().after(target.reach());
        let query = OutstandingQuery { due_by, limit: GROUP_MAX, except: &held.destinations };
        let outstanding = || source.outstanding(query);
        let mut entries = insist("reading the outbox", &**clock, progress, outstanding).await?;
        if entries.is_empty() {
            let due = insist("reading the outbox", &**clock, progress, || source.next_due()).await?;
            return Ok(Step::NothingDue(match due {
                // Of a held destination, probably: looked at again in a while.
                Some(due) if due <= due_by && !held.destinations.is_empty() => TICK,
                due => due.map_or(TICK, |due| due.since(due_by).clamp(Duration::from_millis(1), TICK)),
            }));
        }
        self.hold_back(&mut entries, delay).await;
        let outcomes = insist("sending to the queue", &**clock, progress, || target.send(&entries)).await?;
        self.metrics.offered(&outcomes);
        let accepted = accepted(outcomes);
        failpoint!("dispatch.sent");
        if accepted.is_empty() {
            return Ok(Step::Refused);
        }
        let marked =
            insist("marking what is dispatched", &**clock, progress, || source.mark_dispatched(&accepted))
                .await?;
        log_unmarked(marked);
        for bell in &self.queued {
            bell.ring();
        }
        Ok(if accepted.len() < entries.len() { Step::Refused } else { Step::MoreIsDue })
    }

    /// Which destinations nothing is dispatched for. Asked at most once a second: what slips into the queue
    /// meanwhile, its leases hold.
    async fn look_up_held(&self, held: &mut Held) -> Result<(), StoreError> {
        let now = self.clock.mono();
        if held.at.is_some_and(|at| now.since(at) < DISABLED_FOR) {
            return Ok(());
        }
        let disabled = || self.ledger.disabled_destinations();
        held.destinations =
            insist("looking for disabled destinations", &*self.clock, &self.progress, disabled).await?;
        held.destinations.extend(self.paused.iter().cloned());
        held.at = Some(self.clock.mono());
        Ok(())
    }

    /// Moves what is to be sent behind the delay that the policy asks for now.
    async fn hold_back(&self, entries: &mut [OutboxEntry], delay: &mut Delay) {
        if delay.wants_depth(self.clock.mono()) {
            let depth = self.target.queue_depth().await;
            if let Err(error) = &depth {
                tracing::warn!(%error, "the queue's depth is unknown");
            }
            delay.read(depth.ok().map(|depth| depth.total()), self.clock.mono());
        }
        let (wall, now) = (self.clock.wall(), self.clock.mono());
        for entry in entries {
            entry.not_before = delay.hold_back(entry.not_before, wall, now);
            if let Some(batch) = &mut entry.batch {
                batch.not_before = entry.not_before;
            }
        }
    }
}

/// The destinations that nothing is dispatched for, as they were known last.
#[derive(Default)]
struct Held {
    destinations: Vec<Arc<str>>,
    at: Option<MonoMs>,
}

enum Step {
    MoreIsDue,
    Refused,
    NothingDue(Duration),
}

/// A batch that is not marked is offered to the queue again, which has it already: worth a line, no more.
fn log_unmarked(outcomes: Vec<(BatchId, ItemOutcome)>) {
    for (batch, outcome) in outcomes {
        if let ItemOutcome::Retryable(why) | ItemOutcome::Permanent(why) | ItemOutcome::Unknown(why) = outcome
        {
            tracing::warn!(%batch, why, "the queue has the batch, but it is not marked as dispatched");
        }
    }
}

/// The ids that were accepted. What may or may not have been is offered again with the same ids.
fn accepted(outcomes: Vec<(BatchId, ItemOutcome)>) -> Vec<BatchId> {
    let mut refusals: HashMap<String, u32> = HashMap::new();
    let mut accepted = Vec::with_capacity(outcomes.len());
    for (id, outcome) in outcomes {
        match outcome {
            ItemOutcome::Ok => accepted.push(id),
            ItemOutcome::Retryable(why) | ItemOutcome::Permanent(why) | ItemOutcome::Unknown(why) => {
                *refusals.entry(why).or_default() += 1;
            }
        }
    }
    for (why, batches) in refusals {
        tracing::warn!(why, batches, "the queue did not accept batches; they stay in the outbox");
    }
    accepted
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::{
        flow::ProgressBoard,
        metrics::StageMetrics,
        model::time::UnixMs,
        ports::Outbox as _,
        testing::{Carrier, CarrierFaults, CarrierQueue, FakeClock, MemoryStore, fixtures},
    };

    const NOW: UnixMs = UnixMs(1_700_000_000_000);

    /// A dispatcher from a fake store with `batches` batches for each of `d` and `e` to a queue that only carries.
    async fn setup(
        batches: u64,
        change: impl FnOnce(&mut DispatcherSetup),
    ) -> (DispatcherSetup, Arc<MemoryStore>, Arc<FakeClock>) {
        let store = Arc::new(MemoryStore::new());
        let file = fixtures::file("feed", 1, &["d", "e"]);
        for batch in 0..batches {
            store.append(fixtures::step(&file, batch * 10 + 1..=batch * 10 + 10, NOW)).await.unwrap();
        }
        let clock = Arc::new(FakeClock::at(NOW));
        let carrier = Arc::new(Carrier::new(1, CarrierFaults::default()));
        let reach = Duration::from_mins(15);
        let queue = CarrierQueue::new(carrier, store.clone(), clock.clone(), "node-1", reach);
        let mut setup = DispatcherSetup {
            source: store.clone(),
            target: Arc::new(queue),
            ledger: store.clone(),
            paused: Vec::new(),
            delay: DelayPolicy::None,
            clock: clock.clone(),
            appended: Bell::default(),
            queued: Vec::new(),
            metrics: StageMetrics::default().queue(),
            progress: ProgressBoard::default().mark("dispatcher", clock.mono()),
        };
        change(&mut setup);
        (setup, store, clock)
    }

    async fn dispatch_all(setup: &DispatcherSetup, delay: &mut Delay, held: &mut Held) -> Duration {
        for _ in 0..100 {
            if let Step::NothingDue(wait) = setup.dispatch(delay, held).await.unwrap() {
                return wait;
            }
        }
        panic!("there is always more");
    }

    #[tokio::test]
    async fn what_is_held_stays_in_the_outbox_and_the_others_go() {
        let (setup, store, clock) = setup(300, |setup| setup.paused = vec!["d".into()]).await;
        let (mut delay, mut held) = (Delay::new(DelayPolicy::None), Held::default());
        // The held ones are as old, and many: they neither stand in the way nor keep the loop busy.
        assert_eq!(dispatch_all(&setup, &mut delay, &mut held).await, TICK);
        assert_eq!(setup.target.queue_depth().await.unwrap().total(), 300);

        setup.ledger.disable_destination("e", "410", NOW).await.unwrap();
        let file = fixtures::file("feed", 2, &["e"]);
        store.append(fixtures::step(&file, 1..=1, NOW)).await.unwrap();
        clock.advance(DISABLED_FOR);
        dispatch_all(&setup, &mut delay, &mut held).await;
        assert_eq!(setup.target.queue_depth().await.unwrap().total(), 300, "disabled: asked within a second");
    }

    #[tokio::test]
    async fn s2_3_s2_6_what_is_dispatched_is_held_back() {
        let policy = DelayPolicy::seed_table();
        let (setup, _, clock) = setup(350, |setup| setup.delay = policy.clone()).await;
        let (mut delay, mut held) = (Delay::new(policy), Held::default());
        // 256 at a time; the depth is read every few seconds.
        for (expected, total) in [(0, 256), (0, 512), (188, 700)] {
            setup.dispatch(&mut delay, &mut held).await.unwrap();
            let depth = setup.target.queue_depth().await.unwrap();
            assert_eq!((depth.delayed, depth.total()), (expected, total));
            clock.advance(Duration::from_secs(5)); // as often as the table reads
        }
        // 30 s after the dispatch, which was 5 s ago.
        clock.advance(Duration::from_secs(26));
        assert_eq!(setup.target.queue_depth().await.unwrap().delayed, 0);
    }
}
