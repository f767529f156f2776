//! `WebhookDelivery`: a worker that pulls leased batches and sends their messages.
//!
//! Three loops run in the actor: one leases batches and gives them back, one records outcomes in groups
//! and so acknowledges, one extends leases; and one more waits for each rate. Messages are sent by *senders*: tasks on the
//! shared runtime. A sender takes from the roster the next message that may go, sends it, and ends when the roster has
//! nothing for it. It catches a panic in an attempt and reports it as that message's outcome; the worker and the other
//! senders continue.

use std::{
    collections::{BTreeMap, HashMap},
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use actix::prelude::*;
use futures_util::FutureExt as _;
use postrider_settings::Retry;
use rand::RngExt as _;
use tokio::{
    sync::RwLock,
    time::{Instant, sleep},
};

use crate::{
    flow::{
        Bell, DeliveryStrategy, Gate, Holds, Passage, Seat, TrafficControl, TroubleBoard, Worker,
        WorkerSetup, back_off,
    },
    metrics::{DestinationMetrics, Tally, WorkerGauges},
    model::{
        self,
        backoff::{Backoff, Draws},
        batch::OpenRows,
        body::BodyTemplate,
        hold::HeldFile,
        ids::FileId,
        lease::{Lease, LeaseToken, OpenMessage},
        ledger::{MessageVerdict, is_exclusive},
        outcome::{Attempt, DeathCause, Obstacle, Outcome, Reason, Verdict},
        record::Said,
        retry::{Decision, decide, longest_wait, poisoned},
        roster::{Pick, Ready, Report, Roster},
        suspect::{Pace, is_condemned},
        time::{MonoMs, UnixMs},
        traffic::{breaker::Change, storm::Judgement},
    },
    ports::{InFlight, Release, Settled, Settlement, StoreError, Want, Webhook, WebhookRequest},
    supervision::{ChildId, Drain, Fault, Stage},
};

/// How long an outcome waits to be recorded if its batch has more to come.
const RECORD_PATIENCE: Duration = Duration::from_millis(500);

/// How long a sender waits before it looks again whether its attempt can begin. A descriptor is free again within a
/// request's time (F72); a refused address (F54) costs a lookup per second at most, whoever asks.
const OBSTACLE: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));

/// What is held of a destination that stands for longer is given back: it would only take room.
const STANDS_HERE: Duration = Duration::from_secs(10);

/// How often a sender looks whether a permanent failure is ordinary by now, and after how long it is taken for that: until
/// it is known, its message is unrecorded.
const JUDGE_EVERY: Duration = Duration::from_millis(200);
const JUDGE_WITHIN: Duration = Duration::from_secs(5);

/// Batches of one destination that a worker holds at most: each has its rows in memory (I8).
const HELD_BATCHES_MAX: usize = 256;

/// One worker's share of a destination.
#[derive(Clone)]
pub struct DeliveryDestination {
    /// Its name.
    pub name: Arc<str>,
    /// Its receiver.
    pub webhook: Arc<dyn Webhook>,
    /// This worker's part of the messages that may be in flight to it at most; 0 if other workers send them all.
    pub concurrency: usize,
    /// Its rate limit, if it has one.
    pub gate: Option<Gate>,
    /// This worker's part of that, or of the limit over all destinations: messages per second.
    pub rate_per_s: Option<usize>,
    /// When its messages are tried again.
    pub retry: Retry,
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
    /// What it has in common with every worker.
    pub worker: WorkerSetup,
    /// Outcomes that may wait for the ledger, messages in flight included: this worker's part of the window of I6.
    pub unrecorded: usize,
    /// What may be in flight.
    pub traffic: TrafficControl,
    /// Where what is in flight is noted for the process' next life.
    pub in_flight: Arc<dyn InFlight>,
    /// Held to be read by every attempt; to be written by one that nothing else may be in flight with (B17).
    pub alone: Arc<RwLock<()>>,
    /// Outcomes that are recorded now when so many wait.
    pub record_group: usize,
    /// How long an outcome waits to be recorded with others, if it is the last of its batch's for now.
    pub record_linger: Duration,
    /// The rate limit over all destinations, if there is one.
    pub gate: Option<Gate>,
    /// Where it is noted what keeps a destination from being sent to.
    pub troubles: TroubleBoard,
}

/// The actor.
pub struct WebhookDelivery {
    strategy: Arc<WebhookStrategy>,
    /// The holder of this worker's leases in its last life.
    predecessor: Option<String>,
    fault: Fault,
}

impl Stage for WebhookDelivery {
    const NAME: &'static str = "webhook_delivery";

    type Setup = DeliverySetup;

    fn new(setup: DeliverySetup, id: &ChildId, fault: Fault) -> Self {
        let (holder, predecessor) = (id.to_string(), id.predecessor().map(|last| last.to_string()));
        let count = setup.destinations.len();
        let state = WebhookState {
            roster: Roster::new(setup.unrecorded, count),
            batches: HashMap::new(),
            to_disable: vec![None; count],
            gauges: setup.destinations.iter().map(|d| d.metrics.worker(0)).collect(),
            ask_again: None,
        };
        let worker = Worker::new(setup.worker.clone(), &holder);
        let holds = Holds::new(count);
        let seats = setup.destinations.iter().map(|d| (&*d.name, d.gate.clone()));
        let seat = Seat::new(&setup.traffic, setup.worker.queued.clone(), seats, setup.gate.clone());
        let ahead =
            |d: &DeliveryDestination| model::ahead::ahead(d.concurrency, d.rate_per_s, setup.worker.lease);
        let ahead = setup.destinations.iter().map(ahead).collect();
        let strategy = WebhookStrategy {
            worker,
            setup,
            ahead,
            state: Mutex::new(state),
            holds,
            seat,
            flush: Bell::default(),
        };
        Self { strategy: Arc::new(strategy), predecessor, fault }
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
        let (lease, predecessor) = (self.strategy.clone(), self.predecessor.take());
        let leasing = async move { lease.worker.lease(&lease, predecessor).await };
        context.spawn(leasing.into_actor(self).map(fail));
        let record = self.strategy.clone();
        context.spawn(async move { record.record_loop().await }.into_actor(self).map(fail));
        let extend = self.strategy.clone();
        let extending = async move { extend.worker.extend(&extend).await };
        context.spawn(extending.into_actor(self).map(fail));
        for rate in self.strategy.seat.rates() {
            let strategy = self.strategy.clone();
            context.spawn(async move { strategy.rate_loop(rate).await }.into_actor(self));
        }
    }
}

impl Handler<Drain> for WebhookDelivery {
    type Result = ();

    fn handle(&mut self, _: Drain, _: &mut Self::Context) {
        self.strategy.close();
    }
}

impl Drop for WebhookDelivery {
    /// However the worker ended, its senders start nothing more.
    fn drop(&mut self) {
        self.strategy.close();
    }
}

/// A leased batch, ready to send from.
struct WebhookBatch {
    lease: Lease,
    rows: OpenRows,
    template: BodyTemplate,
    /// What its waits are drawn from: one for each number of attempts, so that the retries of a batch come back together.
    draws: Draws,
    /// Index of the destination.
    destination: usize,
    /// Whether a message of it was not sent.
    failed: AtomicBool,
    /// Its file is held: nothing more of it is begun here.
    held: AtomicBool,
    /// What the receiver said of messages that are not recorded yet, by index.
    said: Mutex<HashMap<u32, Said>>,
}

impl WebhookBatch {
    fn is_held_by(&self, files: &[HeldFile]) -> bool {
        files.iter().any(|held| held.covers(&self.lease.header, self.rows.first_row()))
    }

    fn said(&self) -> MutexGuard<'_, HashMap<u32, Said>> {
        // Changed by single inserts and removals only.
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The verdicts on messages that are given up without another attempt: their delivery has killed the process too often.
fn condemned(lease: &Lease, at: UnixMs) -> Vec<MessageVerdict> {
    let is_condemned = |message: &&OpenMessage| {
        lease.charged.get(&message.index).is_some_and(|&(_, alone)| is_condemned(alone))
    };
    lease.open.iter().filter(is_condemned).map(|message| message.verdict(poisoned(at))).collect()
}

/// Says that a destination's breaker has opened or closed, once per outage.
fn say(destination: &str, change: Change, now: MonoMs) {
    match change {
        Change::Opened { since, .. } if since == now => tracing::warn!(
            destination,
            "nothing more is sent there for the time being: its circuit breaker is open; single messages probe"
        ),
        Change::Opened { until, since } => tracing::debug!(
            destination,
            out_s = now.since(since).as_secs(),
            next_s = until.since(now).as_secs(),
            "the destination is still out"
        ),
        Change::Closed { since } => {
            tracing::info!(destination, out_s = now.since(since).as_secs(), "the destination is back");
        }
    }
}

struct WebhookState {
    roster: Roster,
    batches: HashMap<LeaseToken, Arc<WebhookBatch>>,
    /// Destinations that are yet to be disabled in the ledger, and why.
    to_disable: Vec<Option<String>>,
    /// One per destination.
    gauges: Vec<WorkerGauges>,
    /// When something may go that may not now, as far as time decides.
    ask_again: Option<MonoMs>,
}

impl WebhookState {
    fn gauge(&mut self) {
        for (index, gauges) in self.gauges.iter_mut().enumerate() {
            gauges.set(self.roster.in_flight_to(index), self.roster.held(index));
        }
    }
}

/// What the worker's loops and senders share.
struct WebhookStrategy {
    worker: Worker,
    setup: DeliverySetup,
    /// Messages of each destination that may wait here.
    ahead: Vec<usize>,
    state: Mutex<WebhookState>,
    /// The destinations that are disabled, or about to be.
    holds: Holds,
    /// Where it asks whether a message may go.
    seat: Seat,
    /// Rung when outcomes should be recorded now.
    flush: Bell,
}

impl DeliveryStrategy for Arc<WebhookStrategy> {
    fn hold(&self, disabled: &[Arc<str>], files: &[HeldFile]) {
        let mut state = self.state();
        let state = &mut *state;
        for (token, batch) in &state.batches {
            if batch.is_held_by(files) && !batch.held.swap(true, Ordering::Relaxed) {
                state.roster.stop_batch(*token);
            }
        }
        for (index, destination) in self.setup.destinations.iter().enumerate() {
            let is_held = disabled.contains(&destination.name) || state.to_disable[index].is_some();
            let was_held = self.holds.is_held(index);
            if self.holds.set(index, is_held) {
                state.roster.stop(Some(index));
            } else if was_held && !is_held {
                self.seat.resume(index);
            }
        }
    }

    async fn turn(&self) -> Result<(), StoreError> {
        failpoint!("panic.webhook_delivery");
        self.state().gauge();
        self.disable().await?;
        self.give_back();
        let done = self.state().roster.returnable();
        self.worker.release(&done, Release::Unused).await?;
        for token in done {
            self.forget(token);
        }
        Ok(())
    }

    fn wants(&self) -> Vec<Want> {
        let state = self.state();
        let want = |(index, destination): (usize, &DeliveryDestination)| {
            let ahead = self.ahead[index];
            let waiting = state.roster.waiting(index);
            let batches = HELD_BATCHES_MAX.saturating_sub(state.roster.held(index));
            let open = !destination.paused && !self.holds.is_held(index) && destination.concurrency > 0;
            let messages = if !open || self.seat.stands_for(index).is_some() {
                0
            } else if self.seat.is_probing(index) {
                usize::from(waiting == 0)
            } else if waiting <= ahead / 2 {
                // Refilled when half used up, so that a lease is worth its transaction.
                ahead - waiting
            } else {
                0
            };
            (messages > 0 && batches > 0).then(|| Want {
                destination: destination.name.clone(),
                messages,
                batches,
                longest_wait: longest_wait(&destination.retry),
            })
        };
        self.setup.destinations.iter().enumerate().filter_map(want).collect()
    }

    fn take(&self, lease: Lease) {
        let name = &lease.header.destination;
        let Some(destination) = self.setup.destinations.iter().position(|d| *d.name == **name) else {
            return; // never leased: only own destinations are asked for
        };
        let at = self.worker.clock().wall();
        let token = lease.token;
        let indexes: Vec<_> = lease.open.iter().map(|message| message.index).collect();
        let rows = OpenRows::of(lease.payload.clone(), lease.count as usize, &indexes);
        let template = BodyTemplate::compile(lease.header.template.as_deref(), &lease.header.content_type)
            .map_err(|error| error.to_string());
        let (rows, template, verdicts) = match (rows, template) {
            (Ok(rows), Ok(template)) => (rows, template, condemned(&lease, at)),
            (rows, template) => {
                let why = rows.err().or(template.err()).unwrap_or_default();
                tracing::error!(batch = %token.batch, why, "the batch can't be sent; its messages are dead");
                let attempt = Attempt { at, status: 0, reason: Reason::Render };
                let dead = Verdict::Dead { attempt, cause: DeathCause::Permanent };
                let verdicts = lease.open.iter().map(|message| message.verdict(dead)).collect();
                let template = BodyTemplate::compile(None, "").expect("the default body needs no compiling");
                (OpenRows::none(), template, verdicts)
            }
        };
        if lease.is_first() {
            self.setup.destinations[destination].metrics.leased(at.since(lease.accepted_at));
        }
        let is_open = |message: &&OpenMessage| verdicts.iter().all(|verdict| verdict.index != message.index);
        let open = lease.open.iter().filter(is_open).copied().collect();
        let pace = Pace::of(lease.losses);
        let lease = Lease { payload: bytes::Bytes::new(), open: Vec::new(), ..lease };
        let (failed, held) = (AtomicBool::new(false), AtomicBool::new(false));
        let (draws, said) = (Draws(rand::rng().random()), Mutex::default());
        let batch = WebhookBatch { lease, rows, template, draws, destination, failed, held, said };
        let mut state = self.state();
        state.batches.insert(token, Arc::new(batch));
        state.roster.add(destination, token, pace, open, at);
        let has_to_record = !verdicts.is_empty() || pace == Pace::AloneMarked;
        for verdict in verdicts {
            state.roster.conclude(token, verdict);
        }
        if has_to_record {
            self.flush.ring();
        }
    }

    fn begin(&self) {
        self.start_senders();
    }

    /// Until a message is due again that waits here, or may go that may not now.
    fn sleep(&self) -> Duration {
        let state = self.state();
        let due = state.roster.next_due().map(|due| due.since(self.worker.clock().wall()));
        let ask = state.ask_again.map(|at| at.since(self.worker.clock().mono()));
        let wait = due.into_iter().chain(ask).min();
        wait.map_or(Duration::MAX, |wait| wait.max(Duration::from_millis(1)))
    }

    fn tokens(&self) -> Vec<LeaseToken> {
        self.state().roster.tokens()
    }

    fn forget(&self, token: LeaseToken) -> bool {
        let mut state = self.state();
        state.roster.remove(token);
        state.batches.remove(&token).is_some()
    }

    fn is_empty(&self) -> bool {
        self.state().roster.is_empty()
    }
}

impl WebhookStrategy {
    fn state(&self) -> MutexGuard<'_, WebhookState> {
        // The roster is changed by infallible steps only; a sender's panic is caught outside the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        let mut state = self.state();
        state.roster.stop(None);
        state.gauges.iter_mut().for_each(WorkerGauges::close);
        drop(state);
        self.flush.ring();
        self.worker.close();
    }

    /// Starts a sender for every message that may be sent now.
    fn start_senders(self: &Arc<Self>) {
        let now = self.worker.clock().wall();
        let mut state = self.state();
        while let Some((pick, passage, batch)) = self.pick(&mut state, now) {
            tokio::spawn(self.clone().send_loop(pick, passage, batch));
        }
    }

    /// The next message that may go.
    fn pick(&self, state: &mut WebhookState, now: UnixMs) -> Option<(Pick, Passage, Arc<WebhookBatch>)> {
        loop {
            let mut asking = self.seat.ask();
            let picked = state.roster.pick(now, &mut asking);
            let (passage, ask_again) = asking.finish();
            let Some(pick) = picked else {
                let before = state.ask_again.filter(|at| *at > self.worker.clock().mono());
                state.ask_again = ask_again;
                if ask_again.is_some_and(|at| before.is_none_or(|before| at < before)) {
                    self.worker.wake(); // it sleeps for longer
                }
                return None;
            };
            let passage = passage.expect("what is picked was granted");
            if let Some(batch) = state.batches.get(&pick.token).cloned() {
                return Some((pick, passage, batch));
            }
            state.roster.report(pick, Report::Unsent, usize::MAX, now);
        }
    }

    /// Waits for a destination's rate, or for that over all (`None`), whenever messages lack it.
    async fn rate_loop(self: Arc<Self>, rate: Option<usize>) {
        loop {
            tokio::select! {
                biased;
                () = self.worker.closed() => return,
                () = self.seat.lacks(rate) => {}
            }
            // As many as could go at once: what is let through is to be sent now.
            let could_go =
                |index: usize| self.state().roster.waiting(index).max(1).min(self.seat.free(index));
            let wanted = match rate {
                Some(index) => could_go(index),
                None => (0..self.setup.destinations.len()).map(could_go).sum(),
            };
            tokio::select! {
                biased;
                () = self.worker.closed() => return,
                () = self.seat.pass(rate, wanted) => {}
            }
            self.start_senders();
        }
    }

    async fn send_loop(self: Arc<Self>, mut pick: Pick, mut passage: Passage, mut batch: Arc<WebhookBatch>) {
        let mut body = Vec::new();
        let slot = self.setup.in_flight.enter();
        let mut refusals = 0;
        loop {
            let begun = Instant::now();
            let attempt = AssertUnwindSafe(self.attempt(pick, &batch, slot, &mut body)).catch_unwind().await;
            self.setup.in_flight.end(slot);
            let attempt = attempt.unwrap_or_else(|_| {
                let row = batch.rows.get(pick.index).map_or(0, |(row, _)| row);
                tracing::error!(id = %batch.lease.header.message_id(row), "the attempt panicked");
                let outcome = Outcome::Retryable { status: 0, reason: Reason::Panic, retry_after: None };
                Some((outcome, begun.elapsed()))
            });
            if let Some((Outcome::Unsent(obstacle), _)) = attempt {
                refusals += 1;
                if self.wait_out(pick, obstacle, refusals).await {
                    continue;
                }
            }
            refusals = 0;
            let outcome = if let Some((outcome, latency)) = attempt {
                self.give_back_permit(pick, passage, &batch, outcome, latency).await
            } else {
                drop(passage); // with its permit
                None
            };
            let report = self.judge(pick, &batch, outcome);
            let now = self.worker.clock().wall();
            let mut state = self.state();
            let flush = state.roster.report(pick, report, self.setup.record_group, now);
            let next = self.pick(&mut state, now);
            let waiting = state.roster.waiting(pick.destination);
            // Not at every message: a few times on the way down.
            let ahead = self.ahead[pick.destination];
            let starved = waiting <= ahead / 2 && waiting.is_multiple_of(ahead / 8);
            drop(state);
            if flush {
                self.flush.ring();
            }
            if starved || report == Report::Unsent {
                self.worker.wake();
            }
            if next.as_ref().is_none_or(|(next, ..)| next.destination != pick.destination) {
                self.seat.wake_waiting(pick.destination);
            }
            match next {
                Some(next) => (pick, passage, batch) = next,
                None => break self.setup.in_flight.leave(slot),
            }
        }
    }

    /// Gives the permit of an attempt back, and takes note of what the attempt says of its destination. The outcome to
    /// record; `None` if the message stays as it was because the destination is used wrongly.
    async fn give_back_permit(
        self: &Arc<Self>,
        pick: Pick,
        passage: Passage,
        batch: &WebhookBatch,
        outcome: Outcome,
        latency: Duration,
    ) -> Option<Outcome> {
        let destination = &self.setup.destinations[pick.destination];
        let file = batch.lease.header.file;
        let ended = passage.ended(&outcome, latency, file);
        if let Some(change) = ended.change {
            say(&destination.name, change, self.worker.clock().mono());
        }
        if ended.grew {
            self.seat.wake_all();
        }
        let Outcome::Permanent { status, reason } = outcome else { return Some(outcome) };
        let mut judgement = ended.judgement;
        if judgement == Judgement::Undecided {
            self.start_senders();
            judgement = self.await_judgement(pick, file, status, reason).await?;
        }
        if judgement == Judgement::Suspect {
            self.suspect(pick.destination);
            return None;
        }
        Some(outcome)
    }

    /// Waits until an attempt may be able to begin. Whether the message is still to be sent here then: its lease may be
    /// lost meanwhile, or the worker closed, or the destination held.
    async fn wait_out(&self, pick: Pick, obstacle: Obstacle, times: u32) -> bool {
        let destination = &self.setup.destinations[pick.destination];
        destination.metrics.unsent(obstacle);
        match obstacle {
            Obstacle::Shortage(shortage) if times == 1 => tracing::warn!(
                destination = %destination.name,
                shortage = shortage.as_str(),
                "this machine can't open a connection; the message waits and is charged nothing"
            ),
            Obstacle::Shortage(_) => {}
            Obstacle::Address(refused) => {
                if self.setup.troubles.meet(&destination.name, refused) {
                    tracing::error!(
                        destination = %destination.name,
                        reason = %refused,
                        "the destination leads to an address that is not allowed; its messages wait and are charged \
                         nothing"
                    );
                }
            }
        }
        tokio::select! {
            biased;
            () = self.worker.closed() => return false,
            () = self.holds.held(pick.destination) => return false,
            () = back_off(OBSTACLE, times) => {}
        }
        self.state().batches.contains_key(&pick.token)
    }

    /// One attempt, and how long it took; `None` if the worker closes, or the destination is held, before it begins.
    async fn attempt(
        &self,
        pick: Pick,
        batch: &WebhookBatch,
        slot: u32,
        body: &mut Vec<u8>,
    ) -> Option<(Outcome, Duration)> {
        let destination = &self.setup.destinations[pick.destination];
        let charged = batch.lease.charged.get(&pick.index).is_some_and(|&(deaths, _)| is_exclusive(deaths));
        let (_others, _nobody);
        if charged {
            _nobody = self.setup.alone.write().await;
        } else {
            _others = self.setup.alone.read().await;
        }
        let is_held = self.holds.is_held(pick.destination) || batch.held.load(Ordering::Relaxed);
        if is_held || self.worker.is_closing() {
            return None;
        }
        self.setup.in_flight.begin(slot, pick.token.batch, Some(pick.index));
        let header = &batch.lease.header;
        let (row, bytes) = batch.rows.get(pick.index)?;
        let id = header.message_id(row);
        body.clear();
        if let Err(error) = batch.template.render(header, id, bytes, body) {
            tracing::warn!(%id, destination = %destination.name, %error, "the body can't be rendered");
            return Some((Outcome::Permanent { status: 0, reason: Reason::Render }, Duration::ZERO));
        }
        failpoint!("attempt.before");
        let at = self.worker.clock().wall();
        let request = WebhookRequest { id, at, content_type: &header.content_type, body };
        let begun = Instant::now();
        let answer = destination.webhook.send(request).await;
        let latency = begun.elapsed();
        destination.metrics.attempted(latency);
        failpoint!("attempt.after");
        if answer.provider_id.is_some() && destination.recorded {
            let said = Said { provider_id: answer.provider_id, detail: None };
            batch.said().insert(pick.index, said);
        }
        Some((answer.outcome, latency))
    }

    /// Waits until it is known what a permanent failure means; `None` if the worker closes before. It is ordinary when
    /// nothing more comes that could say otherwise, and when it takes too long.
    async fn await_judgement(
        &self,
        pick: Pick,
        file: FileId,
        status: u16,
        reason: Reason,
    ) -> Option<Judgement> {
        let until = Instant::now() + JUDGE_WITHIN;
        loop {
            tokio::select! {
                biased;
                () = self.worker.closed() => return None,
                () = sleep(JUDGE_EVERY) => {}
            }
            let (judgement, is_busy) = self.seat.judge(pick.destination, file, status, reason);
            let more = is_busy || self.state().roster.waiting(pick.destination) > 0;
            if judgement != Judgement::Undecided {
                return Some(judgement);
            }
            if !more || Instant::now() >= until {
                return Some(Judgement::Ordinary);
            }
        }
    }

    /// Holds a destination that is used wrongly: from here on in this process, in a moment everywhere.
    fn suspect(&self, destination: usize) {
        let Some(suspicion) = self.seat.suspicion(destination) else { return };
        let mut state = self.state();
        if state.to_disable[destination].is_none() && !self.holds.is_held(destination) {
            state.to_disable[destination] = Some(suspicion);
            self.holds.set(destination, true);
            state.roster.stop(Some(destination));
        }
    }

    fn judge(&self, pick: Pick, batch: &WebhookBatch, outcome: Option<Outcome>) -> Report {
        let Some(outcome) = outcome else {
            return Report::Unsent;
        };
        let clock = self.worker.clock();
        let age = clock.age(batch.lease.since(pick.index));
        let age = age.saturating_sub(self.seat.stood(pick.destination, age));
        let retry = &self.setup.destinations[pick.destination].retry;
        match decide(retry, outcome, pick.attempt, age, clock.wall(), batch.draws.of(pick.attempt)) {
            Decision::Record(verdict) => Report::Verdict(verdict),
            Decision::Leave => Report::Unsent,
            Decision::Hold => {
                self.setup.destinations[pick.destination].metrics.gone();
                let mut state = self.state();
                state.to_disable[pick.destination] = Some("it answered 410 Gone".to_owned());
                self.holds.set(pick.destination, true);
                state.roster.stop(Some(pick.destination));
                Report::Unsent
            }
        }
    }

    /// Records which destinations are gone (410) or used wrongly.
    async fn disable(&self) -> Result<(), StoreError> {
        let to_disable = self.state().to_disable.clone();
        for (index, reason) in to_disable.into_iter().enumerate() {
            let Some(reason) = reason else { continue };
            let name = &self.setup.destinations[index].name;
            tracing::error!(
                destination = %name,
                reason,
                "the destination is disabled, its messages are held; when that is corrected: postrider resume {name}"
            );
            self.worker.disable(name, &reason).await?;
            self.state().to_disable[index] = None; // held from now on because it is disabled
        }
        Ok(())
    }

    /// Stops what is held of destinations that stand for long.
    fn give_back(&self) {
        for index in 0..self.setup.destinations.len() {
            if self.seat.stands_for(index).is_some_and(|wait| wait > STANDS_HERE) {
                self.state().roster.stop(Some(index));
            }
        }
    }

    async fn record_loop(self: &Arc<Self>) -> Result<(), StoreError> {
        let (linger, group) = (self.setup.record_linger, self.setup.record_group);
        let patience = linger.max(RECORD_PATIENCE);
        let mut looks_at = Instant::now() + linger;
        loop {
            self.flush.wait(looks_at.saturating_duration_since(Instant::now())).await;
            let is_time = Instant::now() >= looks_at;
            if is_time {
                looks_at = Instant::now() + linger;
            }
            let settlements = self.settlements(if is_time { 0 } else { group / 2 }, patience);
            if settlements.is_empty() {
                continue;
            }
            let tallies = self.tallies(&settlements);
            self.worker.settle(&settlements, |settled| self.note(tallies, settled)).await?;
            self.start_senders();
            self.worker.wake();
        }
    }

    /// Takes note of what was recorded.
    fn note(&self, tallies: Vec<(LeaseToken, Tally, Option<Arc<WebhookBatch>>)>, settled: &[Settled]) {
        let now = self.worker.clock().wall();
        let mut state = self.state();
        for ((token, tally, batch), &settled) in tallies.into_iter().zip(settled) {
            if let Some(batch) = batch {
                self.count(&batch, &tally, settled, now);
            }
            state.roster.recorded(token, tally.count);
            if settled != Settled::Open {
                state.roster.remove(token);
                state.batches.remove(&token);
            }
        }
    }

    fn tallies(&self, settlements: &[Settlement]) -> Vec<(LeaseToken, Tally, Option<Arc<WebhookBatch>>)> {
        let state = self.state();
        let tally = |s: &Settlement| (s.token, Tally::of(&s.verdicts), state.batches.get(&s.token).cloned());
        settlements.iter().map(tally).collect()
    }

    fn count(&self, batch: &WebhookBatch, tally: &Tally, settled: Settled, now: UnixMs) {
        let failed = batch.failed.fetch_or(!tally.is_clean(), Ordering::Relaxed) || !tally.is_clean();
        let metrics = &self.setup.destinations[batch.destination].metrics;
        metrics.settled(tally, settled, now.since(batch.lease.accepted_at), !failed);
    }

    /// What is to be recorded now. See [`Roster::take_ready`].
    fn settlements(&self, group: usize, patience: Duration) -> Vec<Settlement> {
        let now = self.worker.clock().wall();
        let mut state = self.state();
        let ready = state.roster.take_ready(group, now, patience);
        let settlement = |Ready { token, verdicts, ends, begins }: Ready| {
            let mut records = Vec::new();
            if let Some(batch) = state.batches.get(&token)
                && self.setup.destinations[batch.destination].recorded
            {
                records = model::record::records(&batch.lease, &batch.rows, &verdicts, &mut batch.said());
            }
            Settlement { token, verdicts, details: BTreeMap::new(), records, ends, begins }
        };
        ready.into_iter().map(settlement).collect()
    }
}
