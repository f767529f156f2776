//! `WebhookDelivery`: a worker that pulls leased batches and sends their messages.
//!
//! Three loops run in the actor: one leases batches and gives them back, one records outcomes in groups
//! and so acknowledges, one extends leases. Messages are sent by *lanes*, tasks on the shared runtime that
//! ask the roster for the next message until it has none. A panic in one attempt is caught in its lane
//! and is that message's outcome; the worker and the other lanes go on.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use actix::prelude::*;
use bytes::Bytes;
use futures_util::FutureExt as _;
use rand::RngExt as _;
use tokio::{sync::watch, time::Instant};

use crate::{
    flow::{Bell, Gate, Progress, insist, tell_pace},
    metrics::{DestinationMetrics, Tally, WorkerGauges},
    model::{
        self,
        batch::{PAYLOAD_VERSION, Rows},
        body::BodyTemplate,
        lease::{Lease, LeaseToken},
        outcome::{Attempt, DeathCause, Outcome, Reason, Verdict},
        record::Said,
        retry::{Decision, RetrySchedule, poisoned, retry_batches},
        roster::{Pick, Report, Roster, RosterLimits},
        suspect::Pace,
        throughput::Telling,
        time::UnixMs,
    },
    ports::{
        Clock, ItemOutcome, LeaseRequest, Ledger, Queue, Release, Settled, Settlement, StoreError, Webhook,
        WebhookRequest,
    },
    supervision::{Drain, Fault},
};

/// Only control messages come in: batches are pulled.
pub const MAILBOX: usize = 4;

/// The longest a worker sleeps before it looks into the queue again.
const TICK: Duration = Duration::from_millis(500);

/// Retries that are due within the same step of this length travel in one batch.
const RETRY_GRANULARITY: Duration = Duration::from_millis(100);

/// One worker's share of a destination.
#[derive(Clone)]
pub struct DeliveryDestination {
    /// Its name.
    pub name: Arc<str>,
    /// Its receiver.
    pub webhook: Arc<dyn Webhook>,
    /// Messages that this worker may have in flight to it.
    pub concurrency: usize,
    /// Its rate limit, if it has one.
    pub gate: Option<Gate>,
    /// When its messages are tried again.
    pub retry: RetrySchedule,
    /// Whether config holds its messages.
    pub paused: bool,
    /// Whether the ledger keeps a row of each of its messages.
    pub recorded: bool,
    /// What is counted.
    pub metrics: DestinationMetrics,
}

/// What a worker works with.
#[derive(Clone)]
pub struct DeliverySetup {
    /// Where messages go.
    pub destinations: Vec<DeliveryDestination>,
    /// Where batches come from.
    pub queue: Arc<dyn Queue>,
    /// Where outcomes go.
    pub ledger: Arc<dyn Ledger>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Rung when batches were queued, and by the worker itself when it needs more.
    pub queued: Bell,
    /// To ring when retries were appended.
    pub appended: Bell,
    /// The limits on what is in flight and unrecorded.
    pub limits: RosterLimits,
    /// Batches leased ahead per destination.
    pub prefetch: usize,
    /// How long a lease holds unless extended.
    pub lease: Duration,
    /// Lost leases that condemn a message.
    pub lost_cap: u32,
    /// Outcomes recorded at once at the latest.
    pub record_group: usize,
    /// How long an outcome waits to be recorded with others.
    pub record_linger: Duration,
    /// The rate limit over all destinations, if there is one.
    pub gate: Option<Gate>,
    /// Sign of life.
    pub progress: Progress,
}

/// The actor.
pub struct WebhookDelivery {
    desk: Arc<Desk>,
    /// The holder of this worker's leases in its last life.
    predecessor: Option<String>,
    fault: Fault,
}

impl WebhookDelivery {
    /// A worker without batches. `holder` names this life of it, `predecessor` the one before.
    pub fn new(setup: DeliverySetup, holder: &str, predecessor: Option<String>, fault: Fault) -> Self {
        let shares: Vec<_> = setup.destinations.iter().map(|destination| destination.concurrency).collect();
        let state = DeskState {
            roster: Roster::new(setup.limits, &shares),
            batches: HashMap::new(),
            held: vec![false; shares.len()],
            lanes: 0,
            gauges: setup.destinations.iter().map(|d| d.metrics.worker(d.concurrency)).collect(),
            telling: Telling::new(setup.clock.mono()),
        };
        let desk = Desk {
            setup,
            holder: holder.into(),
            state: Mutex::new(state),
            flush: Bell::default(),
            closing: watch::Sender::new(false),
        };
        Self { desk: Arc::new(desk), predecessor, fault }
    }
}

impl Actor for WebhookDelivery {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        let fail = |result: Result<(), StoreError>, this: &mut Self, context: &mut Context<Self>| match result
        {
            Ok(()) => context.stop(), // drained
            Err(error) => this.fault.fail(context, error),
        };
        let (lease, predecessor) = (self.desk.clone(), self.predecessor.take());
        context.spawn(async move { lease.lease_loop(predecessor).await }.into_actor(self).map(fail));
        let record = self.desk.clone();
        context.spawn(async move { record.record_loop().await }.into_actor(self).map(fail));
        let extend = self.desk.clone();
        context.spawn(async move { extend.extend_loop().await }.into_actor(self).map(fail));
    }
}

impl Handler<Drain> for WebhookDelivery {
    type Result = ();

    fn handle(&mut self, _: Drain, _: &mut Self::Context) {
        self.desk.close();
    }
}

impl Drop for WebhookDelivery {
    /// However the worker ended, its lanes begin nothing more.
    fn drop(&mut self) {
        self.desk.close();
    }
}

/// A leased batch, ready to send from.
struct BatchInHand {
    lease: Lease,
    rows: Rows,
    template: BodyTemplate,
    /// One draw per lease: the retries of a batch stay together.
    jitter: f64,
    /// Index of the destination.
    destination: usize,
    /// Whether a message of it was not sent.
    failed: AtomicBool,
    /// What the receiver said of messages that are not recorded yet, by index.
    said: Mutex<HashMap<u32, Said>>,
}

impl BatchInHand {
    fn said(&self) -> MutexGuard<'_, HashMap<u32, Said>> {
        // Changed by single inserts and removals only.
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct DeskState {
    roster: Roster,
    batches: HashMap<LeaseToken, Arc<BatchInHand>>,
    /// Destinations that answered 410 and are yet to be disabled in the ledger.
    held: Vec<bool>,
    lanes: usize,
    /// One per destination.
    gauges: Vec<WorkerGauges>,
    telling: Telling,
}

impl DeskState {
    fn gauge(&mut self) {
        for (index, gauges) in self.gauges.iter_mut().enumerate() {
            gauges.set(self.roster.in_flight_to(index), self.roster.held(index));
        }
    }
}

/// What the worker's loops and lanes share.
struct Desk {
    setup: DeliverySetup,
    holder: Arc<str>,
    state: Mutex<DeskState>,
    /// Rung when outcomes should be recorded now.
    flush: Bell,
    closing: watch::Sender<bool>,
}

impl Desk {
    fn state(&self) -> MutexGuard<'_, DeskState> {
        // The roster is changed by infallible steps only; a lane's panic is caught outside the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.closing.send_replace(true);
        self.state().roster.stop(None);
        self.flush.ring();
        self.setup.queued.ring();
    }

    async fn insist<T, F>(&self, what: &'static str, operation: impl FnMut() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        insist(what, &*self.setup.clock, &self.setup.progress, operation).await
    }

    fn is_closing(&self) -> bool {
        *self.closing.borrow()
    }

    async fn lease_loop(self: &Arc<Self>, predecessor: Option<String>) -> Result<(), StoreError> {
        let Self { setup, .. } = &**self;
        if let Some(predecessor) = predecessor {
            self.insist("taking leases back", || setup.queue.release_holder(&predecessor)).await?;
        }
        loop {
            failpoint!("panic.webhook_delivery");
            setup.progress.turn(setup.clock.mono());
            self.state().gauge();
            if let Some(rates) = self.state().telling.due(setup.clock.mono()) {
                tell_pace(&self.holder, rates);
            }
            self.disable_held().await?;
            self.give_back().await?;
            if self.is_closing() && self.state().roster.is_empty() {
                return Ok(());
            }
            let wants = self.wants();
            let wanted: usize = wants.iter().map(|(_, batches)| batches).sum();
            let mut leased = 0;
            if wanted > 0 {
                let until = setup.clock.mono().after(setup.lease);
                let request = LeaseRequest { holder: self.holder.clone(), wants, until };
                let leases = self.insist("leasing", || setup.queue.lease(request.clone())).await?;
                failpoint!("lease.after");
                leased = leases.len();
                for lease in leases {
                    self.take(lease);
                }
                self.start_lanes();
            }
            if wanted == 0 || leased < wanted {
                setup.queued.wait(TICK).await;
            }
        }
    }

    fn wants(&self) -> Vec<(Arc<str>, usize)> {
        if self.is_closing() {
            return Vec::new();
        }
        let state = self.state();
        let prefetch = self.setup.prefetch;
        let want = |(index, destination): (usize, &DeliveryDestination)| {
            let waiting = state.roster.waiting(index);
            let room = (prefetch + destination.concurrency).saturating_sub(state.roster.held(index));
            let open = !destination.paused && !state.held[index] && destination.concurrency > 0;
            // Refilled when half used up, so that a lease is worth its transaction.
            let batches = if open && waiting <= prefetch / 2 { (prefetch - waiting).min(room) } else { 0 };
            (batches > 0).then(|| (destination.name.clone(), batches))
        };
        self.setup.destinations.iter().enumerate().filter_map(want).collect()
    }

    fn take(&self, lease: Lease) {
        let name = &lease.header.destination;
        let Some(destination) = self.setup.destinations.iter().position(|d| *d.name == **name) else {
            return; // never leased: only own destinations are asked for
        };
        let at = self.setup.clock.wall();
        let mut pace = Pace::of(lease.losses, self.setup.lost_cap);
        let open: Vec<_> = lease.states.unsettled().map(|index| index as u32).collect();
        let mut condemned = usize::from(pace == Pace::Condemn);
        let mut sentence = poisoned(at);
        let rows = Rows::decode(lease.payload.clone()).map_err(|error| error.to_string());
        let template = BodyTemplate::compile(lease.header.template.as_deref(), &lease.header.content_type)
            .map_err(|error| error.to_string());
        let (rows, template) = match (rows, template) {
            (Ok(rows), Ok(template)) if rows.len() == lease.states.0.len() => (rows, template),
            (rows, template) => {
                let why =
                    rows.err().or(template.err()).unwrap_or_else(|| "rows and states differ".to_owned());
                tracing::error!(batch = %lease.token.batch, why, "the batch can't be sent: its messages are dead");
                let attempt = Attempt { at, status: 0, reason: Reason::Render };
                sentence = Verdict::Dead { attempt, cause: DeathCause::Permanent };
                condemned = open.len();
                pace = Pace::Together;
                let nothing =
                    Rows::decode(Bytes::from_static(&[PAYLOAD_VERSION])).expect("an empty payload is valid");
                (nothing, BodyTemplate::compile(None, "").expect("the default body needs no compiling"))
            }
        };
        let token = lease.token;
        if (lease.drive, lease.attempt, lease.losses) == (0, 0, 0) {
            self.setup.destinations[destination].metrics.leased(at.since(lease.accepted_at));
        }
        let failed = AtomicBool::new(false);
        let (jitter, said) = (rand::rng().random(), Mutex::default());
        let batch = BatchInHand { lease, rows, template, jitter, destination, failed, said };
        let mut state = self.state();
        state.batches.insert(token, Arc::new(batch));
        state.roster.add(destination, token, pace, open);
        for _ in 0..condemned {
            state.roster.condemn(token, sentence);
        }
        if condemned > 0 {
            self.flush.ring();
        }
    }

    /// As many lanes as there are messages that may be sent now.
    fn start_lanes(self: &Arc<Self>) {
        let mut state = self.state();
        while let Some(pick) = state.roster.pick() {
            let Some(batch) = state.batches.get(&pick.token).cloned() else {
                state.roster.report(pick, Report::Unsent, usize::MAX);
                continue;
            };
            state.lanes += 1;
            tokio::spawn(self.clone().lane(pick, batch));
        }
    }

    async fn lane(self: Arc<Self>, mut pick: Pick, mut batch: Arc<BatchInHand>) {
        let mut body = Vec::new();
        loop {
            let attempt = AssertUnwindSafe(self.attempt(pick, &batch, &mut body)).catch_unwind().await;
            let outcome = attempt.unwrap_or_else(|_| {
                tracing::error!(id = %batch.lease.header.message_id(batch.rows.row(pick.index as usize)),
                    "the attempt panicked");
                Some(Outcome::Retryable { status: 0, reason: Reason::Panic, retry_after: None })
            });
            let report = self.judge(pick, &batch, outcome);
            let mut state = self.state();
            let waiting = state.roster.waiting(pick.destination);
            let flush = state.roster.report(pick, report, self.setup.record_group);
            let next = state.roster.pick();
            let starved = state.roster.waiting(pick.destination) < waiting;
            let next = next.and_then(|next| {
                if next.token == pick.token {
                    return Some((next, None));
                }
                let batch = state.batches.get(&next.token).cloned();
                if batch.is_none() {
                    state.roster.report(next, Report::Unsent, usize::MAX);
                }
                batch.map(|batch| (next, Some(batch)))
            });
            if next.is_none() {
                state.lanes -= 1;
            }
            drop(state);
            if flush {
                self.flush.ring();
            }
            if starved || report == Report::Unsent {
                self.setup.queued.ring();
            }
            match next {
                Some((next, other_batch)) => {
                    pick = next;
                    batch = other_batch.unwrap_or(batch);
                }
                None => return,
            }
        }
    }

    /// One attempt; `None` if the worker closes before the message's turn has come.
    async fn attempt(&self, pick: Pick, batch: &BatchInHand, body: &mut Vec<u8>) -> Option<Outcome> {
        let destination = &self.setup.destinations[pick.destination];
        for gate in destination.gate.iter().chain(&self.setup.gate) {
            let mut closing = self.closing.subscribe();
            tokio::select! {
                biased;
                () = gate.pass() => {}
                _ = closing.wait_for(|closing| *closing) => return None,
            }
        }
        let header = &batch.lease.header;
        let index = pick.index as usize;
        let id = header.message_id(batch.rows.row(index));
        body.clear();
        if let Err(error) = batch.template.render(header, id, batch.rows.bytes(index), body) {
            tracing::warn!(%id, destination = %destination.name, %error, "the body can't be rendered");
            return Some(Outcome::Permanent { status: 0, reason: Reason::Render });
        }
        failpoint!("attempt.before");
        let at = self.setup.clock.wall();
        let request = WebhookRequest { id, at, content_type: &header.content_type, body };
        let begun = Instant::now();
        let answer = destination.webhook.send(request).await;
        destination.metrics.attempted(begun.elapsed());
        failpoint!("attempt.after");
        if answer.provider_id.is_some() && destination.recorded {
            let said = Said { provider_id: answer.provider_id, detail: None };
            batch.said().insert(pick.index, said);
        }
        Some(answer.outcome)
    }

    fn judge(&self, pick: Pick, batch: &BatchInHand, outcome: Option<Outcome>) -> Report {
        let Some(outcome) = outcome else {
            return Report::Unsent;
        };
        let Lease { attempt, accepted_at, .. } = batch.lease;
        let retry = &self.setup.destinations[pick.destination].retry;
        match retry.decide(outcome, attempt + 1, accepted_at, self.setup.clock.wall(), batch.jitter) {
            Decision::Record(verdict) => Report::Verdict(verdict),
            Decision::Hold => {
                self.setup.destinations[pick.destination].metrics.gone();
                let mut state = self.state();
                state.roster.stop(Some(pick.destination));
                state.held[pick.destination] = true;
                Report::Unsent
            }
        }
    }

    /// Records which destinations are gone (410).
    async fn disable_held(&self) -> Result<(), StoreError> {
        let held: Vec<_> = {
            let state = self.state();
            (0..state.held.len()).filter(|&index| state.held[index]).collect()
        };
        for index in held {
            let name = &self.setup.destinations[index].name;
            tracing::error!(destination = %name, "the destination answered 410 Gone: it is disabled, its messages are held");
            let at = self.setup.clock.wall();
            let disable = || self.setup.ledger.disable_destination(name, "it answered 410 Gone", at);
            self.insist("disabling a destination", disable).await?;
            self.state().held[index] = false; // from now on the queue itself leases none of it
        }
        Ok(())
    }

    async fn give_back(&self) -> Result<(), StoreError> {
        let tokens = self.state().roster.returnable();
        if tokens.is_empty() {
            return Ok(());
        }
        let release = || self.setup.queue.release(&tokens, Release::Unused);
        self.insist("giving leases back", release).await?;
        let mut state = self.state();
        for token in tokens {
            state.roster.remove(token);
            state.batches.remove(&token);
        }
        Ok(())
    }

    async fn record_loop(self: &Arc<Self>) -> Result<(), StoreError> {
        let Self { setup, .. } = &**self;
        loop {
            self.flush.wait(setup.record_linger).await;
            let settlements = self.settlements();
            if settlements.is_empty() {
                continue;
            }
            let retries = settlements.iter().any(|settlement| !settlement.retries.is_empty());
            let tallies = self.tallies(&settlements);
            failpoint!("settle.before");
            let settled =
                self.insist("recording outcomes", || setup.ledger.settle(settlements.clone())).await?;
            failpoint!("settle.after");
            let (mut complete, mut stale) = (Vec::new(), Vec::new());
            {
                let now = setup.clock.wall();
                let mut state = self.state();
                for ((token, tally, batch), settled) in tallies.into_iter().zip(settled) {
                    if let Some(batch) = batch {
                        self.count(&batch, &tally, settled, now);
                    }
                    state.roster.recorded(token, tally.count);
                    state.telling.add(setup.clock.mono(), tally.count as u64);
                    match settled {
                        Settled::Open => continue,
                        Settled::Complete => complete.push(token),
                        Settled::Stale => stale.push(token),
                    }
                    state.roster.remove(token);
                    state.batches.remove(&token);
                }
            }
            if !complete.is_empty() {
                self.insist("acknowledging", || setup.queue.acknowledge(&complete)).await?;
            }
            if !stale.is_empty() {
                // Somebody else has it, or it is settled: whoever gets it next will see.
                self.insist("giving leases back", || setup.queue.release(&stale, Release::Unused)).await?;
            }
            if retries {
                setup.appended.ring();
            }
            self.start_lanes();
            setup.queued.ring();
        }
    }

    fn tallies(&self, settlements: &[Settlement]) -> Vec<(LeaseToken, Tally, Option<Arc<BatchInHand>>)> {
        let state = self.state();
        let tally = |s: &Settlement| (s.token, Tally::of(&s.verdicts), state.batches.get(&s.token).cloned());
        settlements.iter().map(tally).collect()
    }

    fn count(&self, batch: &BatchInHand, tally: &Tally, settled: Settled, now: UnixMs) {
        let failed = batch.failed.fetch_or(!tally.is_clean(), Ordering::Relaxed) || !tally.is_clean();
        let metrics = &self.setup.destinations[batch.destination].metrics;
        metrics.settled(tally, settled, now.since(batch.lease.accepted_at), !failed);
    }

    fn settlements(&self) -> Vec<Settlement> {
        let mut state = self.state();
        let ready = state.roster.take_ready();
        let settlement = |(token, verdicts): (LeaseToken, Vec<(u32, Verdict)>)| {
            let (mut retries, mut records) = (Vec::new(), Vec::new());
            if let Some(batch) = state.batches.get(&token) {
                retries = retry_batches(&batch.lease, &batch.rows, &verdicts, RETRY_GRANULARITY);
                if self.setup.destinations[batch.destination].recorded {
                    records = model::record::records(&batch.lease, &batch.rows, &verdicts, &mut batch.said());
                }
            }
            Settlement { token, verdicts, retries, records }
        };
        ready.into_iter().map(settlement).collect()
    }

    async fn extend_loop(&self) -> Result<(), StoreError> {
        loop {
            tokio::time::sleep(self.setup.lease / 3).await;
            let tokens = self.state().roster.tokens();
            if tokens.is_empty() {
                continue;
            }
            let until = self.setup.clock.mono().after(self.setup.lease);
            let extend = || self.setup.queue.extend(&tokens, until);
            let outcomes = self.insist("extending leases", extend).await?;
            let mut state = self.state();
            for (token, (_, outcome)) in tokens.into_iter().zip(outcomes) {
                if let ItemOutcome::Permanent(why) = outcome {
                    tracing::warn!(batch = %token.batch, why, "the lease is lost; its messages are left to its new holder");
                    state.roster.remove(token);
                    state.batches.remove(&token);
                }
            }
        }
    }
}
