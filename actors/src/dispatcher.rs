//! Dispatcher: hands due batches from the outbox to the queue. A retry waits in the outbox until its
//! time has come.

use std::{collections::HashMap, sync::Arc, time::Duration};

use actix::prelude::*;

use crate::{
    flow::{Bell, Progress, insist},
    metrics::QueueMetrics,
    model::ids::BatchId,
    ports::{Clock, ItemOutcome, Outbox, OutstandingQuery, Queue, StoreError},
    supervision::{Drain, Fault},
};

/// Only control messages come in.
pub const MAILBOX: usize = 4;

/// Batches moved in one go.
const GROUP_MAX: usize = 256;

/// The longest the dispatcher sleeps; redrives come from other processes and ring no bell.
const TICK: Duration = Duration::from_millis(500);

/// The wait after the queue took nothing of what it was offered.
const REFUSED_WAIT: Duration = Duration::from_millis(200);

/// What a dispatcher works with.
#[derive(Clone)]
pub struct DispatcherSetup {
    /// Where batches come from.
    pub outbox: Arc<dyn Outbox>,
    /// Where they go.
    pub queue: Arc<dyn Queue>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Rung when batches were appended.
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

impl Dispatcher {
    /// A dispatcher that has moved nothing yet.
    pub fn new(setup: DispatcherSetup, fault: Fault) -> Self {
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
        loop {
            failpoint!("panic.dispatcher");
            self.progress.turn(self.clock.mono());
            match self.dispatch().await {
                Ok(Step::MoreIsDue) => {}
                Ok(Step::Refused) => tokio::time::sleep(REFUSED_WAIT).await,
                Ok(Step::NothingDue(wait)) => self.appended.wait(wait).await,
                Err(error) => return error,
            }
        }
    }

    async fn dispatch(&self) -> Result<Step, StoreError> {
        let Self { outbox, queue, clock, progress, .. } = self;
        let due_by = clock.wall().after(queue.reach());
        let query =
            OutstandingQuery { due_by, limit: GROUP_MAX, with_batches: queue.stores_batches(), except: &[] };
        let outstanding = || outbox.outstanding(query);
        let entries = insist("reading the outbox", &**clock, progress, outstanding).await?;
        if entries.is_empty() {
            let due = insist("reading the outbox", &**clock, progress, || outbox.next_due()).await?;
            return Ok(Step::NothingDue(
                due.map_or(TICK, |due| due.since(due_by).clamp(Duration::from_millis(1), TICK)),
            ));
        }
        let outcomes = insist("sending to the queue", &**clock, progress, || queue.send(&entries)).await?;
        self.metrics.offered(&outcomes);
        let accepted = accepted(outcomes);
        failpoint!("dispatch.sent");
        if accepted.is_empty() {
            return Ok(Step::Refused);
        }
        let marked =
            insist("marking what is dispatched", &**clock, progress, || outbox.mark_dispatched(&accepted))
                .await?;
        log_unmarked(marked);
        for bell in &self.queued {
            bell.ring();
        }
        Ok(if accepted.len() < entries.len() { Step::Refused } else { Step::MoreIsDue })
    }
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
