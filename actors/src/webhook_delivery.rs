//! `WebhookDelivery`: a worker that pulls leased batches and sends their messages.
//!
//! Three loops run in the actor: one leases batches and gives them back, one records outcomes in groups
//! and so acknowledges, one extends leases; and one more waits for each rate. Messages are sent by *senders*: tasks on the
//! shared runtime. A sender takes from the roster the messages of the next request that may go (one, or a bundle), sends it, and
//! ends when the roster has nothing for it. It catches a panic in an attempt and reports it as the outcome of its messages; the
//! worker and the other senders continue.

mod attempt;
mod recording;
mod sending;

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use actix::prelude::*;
use futures_util::{FutureExt as _, future::join_all};
use postrider_settings::Retry;
use rand::RngExt as _;
use tokio::sync::RwLock;

use crate::{
    flow::{
        Bell, DeliveryStrategy, FileRate, FileRates, Gate, Holds, Seat, TrafficControl, TroubleBoard, Worker,
        WorkerSetup, unused,
    },
    metrics::{DestinationMetrics, WorkerGauges},
    model::{
        ahead::{Rank, ahead},
        backoff::Draws,
        batch::{BatchHeader, OpenRows},
        body::BodyTemplate,
        hold::HeldFile,
        lease::{Lease, LeaseToken, OpenMessage},
        ledger::MessageVerdict,
        order::OrderingKey,
        outcome::{Attempt, DeathCause, Reason, Verdict},
        priority::FilePriority,
        record::Said,
        retry::{longest_wait, poisoned},
        roster::{Incoming, Roster},
        suspect::{Pace, is_condemned},
        time::{MonoMs, UnixMs},
        trace::TraceParent,
    },
    ports::{FirstTurns, InFlight, Release, StoreError, Want, Webhook},
    supervision::{ChildId, Drain, Fault, Stage},
};

/// What is held of a destination that stands for longer is given back: it would only take room.
const STANDS_HERE: Duration = Duration::from_secs(10);

/// For how long its rate lets through what a worker holds of a file …
const CROWD: Duration = Duration::from_secs(10);
/// … and for how long it leases nothing of it when it has more.
const CROWDED_FOR: Duration = Duration::from_secs(5);

/// Batches of one destination that a worker holds at most: each has its rows in memory (I8).
const HELD_BATCHES_MAX: usize = 256;

/// The same where an order is kept: what is younger than a message that is tried for hours goes on only while the batch of
/// that is held …
const ORDERED_BATCHES_MAX: usize = 4_096;

/// … and for no more than this, in bytes: most messages of those batches have ended, and what waits for its turn takes room.
const ORDERED_BYTES_MAX: usize = 64 << 20;

/// What a message takes beside its row: its key, and its place in the order.
const ORDERED_MESSAGE_BYTES: usize = 128;

/// A batch that is held for longer is leased anew, and all of its destination with it: messages of it may have been redriven
/// meanwhile.
const LEASED_ANEW_AFTER: Duration = Duration::from_mins(10);

/// So many of them may be there for first turns alone; the others are for what the worker has room for.
const FIRST_TURNS_MAX: usize = HELD_BATCHES_MAX / 2;

/// Of a file it has enough if that is this part of what it leases ahead: more than goes out until it asks again.
const ENOUGH_PART: usize = 8;

/// How often a worker that has enough asks for what goes ahead of that: a small file is on its way within a second.
const FIRST_TURNS_EVERY: Duration = Duration::from_millis(250);

/// How often a worker looks for retries that are due while requests are in flight: each that ends finds them too, and with
/// hundreds of batches one is due in every millisecond.
const RETRIES_LOOKED_AT_EVERY: Duration = Duration::from_millis(20);

/// One worker's share of a destination.
#[derive(Clone)]
pub struct DeliveryDestination {
    /// Its name.
    pub name: Arc<str>,
    /// Its receiver.
    pub webhook: Arc<dyn Webhook>,
    /// Which of those that send to it this worker is.
    pub rank: Rank,
    /// The most messages of a request, which is a JSON array then; `None` for requests with one message each.
    pub bundle: Option<usize>,
    /// The key of messages that go one after the other, if it keeps an order. Then one worker sends them all.
    pub order: Option<OrderingKey>,
    /// Its rate: of messages.
    pub gate: Gate,
    /// When its messages are tried again.
    pub retry: Retry,
    /// Whether config holds its messages.
    pub paused: bool,
    /// Whether the ledger keeps a row of each of its messages.
    pub recorded: bool,
    /// What is counted.
    pub metrics: DestinationMetrics,
}

impl DeliveryDestination {
    /// The most messages of a request.
    fn messages_max(&self) -> usize {
        self.bundle.unwrap_or(1)
    }

    /// Batches of it that a worker holds at most.
    fn batches_max(&self) -> usize {
        if self.order.is_some() { ORDERED_BATCHES_MAX } else { HELD_BATCHES_MAX }
    }
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
    /// The rates of feeds and files.
    pub file_rates: FileRates,
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
        let bundles = setup.destinations.iter().map(DeliveryDestination::messages_max);
        let mut roster = Roster::new(setup.unrecorded, bundles);
        for (index, destination) in setup.destinations.iter().enumerate() {
            if destination.order.is_some() {
                roster.keep_order(index, longest_wait(&destination.retry));
            }
        }
        let state = WebhookState {
            roster,
            batches: HashMap::new(),
            to_disable: vec![None; count],
            gauges: setup.destinations.iter().map(|d| d.metrics.worker(0)).collect(),
            ask_again: None,
            priorities: Vec::new(),
            first_turns_at: MonoMs(0),
        };
        let worker = Worker::new(setup.worker.clone(), &holder);
        let holds = Holds::new(count);
        let seats = setup.destinations.iter().map(|d| (&*d.name, d.gate.clone()));
        let seat = Seat::new(&setup.traffic, setup.worker.queued.clone(), seats, setup.gate.clone());
        let strategy = WebhookStrategy {
            worker,
            setup,
            ahead: (0..count).map(|_| AtomicUsize::new(0)).collect(),
            state: Mutex::new(state),
            holds,
            seat,
            flush: Bell::default(),
            hasher: RandomState::new(),
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
        let rate_loop = |rate| self.strategy.clone().rate_loop(rate);
        let rates: Vec<_> = self.strategy.seat.rates().into_iter().map(rate_loop).collect();
        context.spawn(join_all(rates).map(drop).into_actor(self));
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
    /// Since then.
    taken: MonoMs,
    rows: OpenRows,
    template: BodyTemplate,
    /// What its waits are drawn from: one for each number of attempts, so that the retries of a batch come back together.
    draws: Draws,
    /// Index of the destination.
    destination: usize,
    /// Whether a message of it was not sent.
    failed: AtomicBool,
    /// Its file is held or closed: nothing more of it is begun here.
    held: AtomicBool,
    /// The rate of its file or feed, if that has one.
    rate: Option<FileRate>,
    /// Enough of its file waits here for that rate.
    crowded: bool,
    /// What its requests carry, if anybody collects traces.
    trace: Option<TraceParent>,
    /// What the receiver said of messages that are not recorded yet, by index …
    said: Mutex<HashMap<u32, Said>>,
    /// … and its different answers to those that failed, as far as they are kept.
    answers: Mutex<Vec<Box<str>>>,
}

/// Different answers of a receiver that are kept with the dead letters of a batch: it mostly says the same, and where it adds
/// something of its own to each, the first of them will do. What is kept is written with every record of the batch (B3).
const ANSWERS_MAX: usize = 16;

impl WebhookBatch {
    /// Whether nothing of it may be begun at `now`, while these files are held.
    fn waits(&self, files: &[HeldFile], now: UnixMs) -> bool {
        self.is_closed(now) || files.iter().any(|held| held.covers(&self.lease.header, self.rows.first_row()))
    }

    fn is_closed(&self, now: UnixMs) -> bool {
        self.lease.header.terms.is_closed(now)
    }

    /// Whether an answer is one of those that are kept.
    fn keeps(&self, answer: &str) -> bool {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.iter().any(|known| **known == *answer) {
            return true;
        }
        let has_room = answers.len() < ANSWERS_MAX;
        if has_room {
            answers.push(answer.into());
        }
        has_room
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

struct WebhookState {
    roster: Roster,
    batches: HashMap<LeaseToken, Arc<WebhookBatch>>,
    /// Destinations that are yet to be disabled in the ledger, and why.
    to_disable: Vec<Option<String>>,
    /// One per destination.
    gauges: Vec<WorkerGauges>,
    /// When something may go that may not now, as far as time decides.
    ask_again: Option<MonoMs>,
    /// How urgent files are by order.
    priorities: Vec<FilePriority>,
    /// Not before then it asks for first turns again.
    first_turns_at: MonoMs,
}

impl WebhookState {
    /// Messages that wait for the rates of their files or feeds, by destination.
    fn waiting_for_files(&self) -> Vec<usize> {
        let mut waiting = vec![0; self.gauges.len()];
        for (token, batch) in self.batches.iter().filter(|(_, batch)| batch.rate.is_some()) {
            waiting[batch.destination] += self.roster.waiting_in(*token);
        }
        waiting
    }

    /// Whether enough of a file waits here for its rate: more would only keep others from the places of batches.
    fn is_crowded(&self, header: &BatchHeader, rate: &FileRate) -> bool {
        let of_it = self.batches.iter().filter(|(_, batch)| {
            batch.lease.header.file == header.file && batch.lease.header.destination == header.destination
        });
        let waiting: usize = of_it.map(|(token, _)| self.roster.waiting_in(*token)).sum();
        waiting > 0 && waiting >= rate.messages_in(CROWD)
    }

    /// Nothing more is done for a batch; whether it was held.
    fn remove(&mut self, token: LeaseToken) -> bool {
        self.roster.remove(token);
        self.batches.remove(&token).is_some()
    }

    /// Whether nothing more is to be leased of a destination that keeps an order: what is given back comes again before what
    /// is younger, and what is held takes only so much memory (I8).
    fn is_full_in_order(&self, destination: usize) -> bool {
        let its = self.batches.values().filter(|batch| batch.destination == destination);
        let bytes = its.map(|batch| batch.rows.bytes() + batch.rows.len() * ORDERED_MESSAGE_BYTES);
        self.roster.is_giving_back(destination) || bytes.sum::<usize>() >= ORDERED_BYTES_MAX
    }

    /// Drops the rows of messages that have ended, where an order is kept and the batch stays for a few others.
    fn narrow(&mut self, token: LeaseToken) {
        let Some(open) = self.roster.held_for(token) else { return };
        // A sender may have it; then it is for the next time.
        if let Some(batch) = self.batches.get_mut(&token).and_then(Arc::get_mut)
            && batch.rows.len() >= 4 * open.len()
        {
            batch.rows = batch.rows.narrow(&open);
        }
    }

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
    /// Messages of each destination that may wait here, as it was looked at last.
    ahead: Vec<AtomicUsize>,
    state: Mutex<WebhookState>,
    /// The destinations that are disabled, or about to be.
    holds: Holds,
    /// Where it asks whether a message may go.
    seat: Seat,
    /// Rung when outcomes should be recorded now.
    flush: Bell,
    /// Makes a number of a key.
    hasher: RandomState,
}

impl DeliveryStrategy for Arc<WebhookStrategy> {
    fn hold(&self, disabled: &[Arc<str>], files: &[HeldFile]) {
        let mut state = self.state();
        let state = &mut *state;
        let now = self.worker.clock().wall();
        for (token, batch) in &state.batches {
            if batch.waits(files, now) && !batch.held.swap(true, Ordering::Relaxed) {
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

    fn prioritize(&self, files: &[FilePriority]) {
        let mut state = self.state();
        if state.priorities == files {
            return;
        }
        state.priorities = files.to_vec();
        let state = &mut *state;
        for batch in state.batches.values() {
            let header = &batch.lease.header;
            let priority = header.priority_by(&state.priorities);
            state.roster.prioritize(batch.destination, header.file, priority);
        }
    }

    async fn turn(&self) -> Result<(), StoreError> {
        failpoint!("panic.webhook_delivery");
        self.state().gauge();
        self.disable().await?;
        self.give_back();
        let done = self.returnable();
        self.worker.give_back(&done).await?;
        let mut state = self.state();
        for (token, _) in done {
            state.remove(token);
        }
        Ok(())
    }

    fn wants(&self) -> Vec<Want> {
        let mut state = self.state();
        let for_files = state.waiting_for_files();
        let now = self.worker.clock().mono();
        let takes_turns = now >= state.first_turns_at;
        if takes_turns {
            state.first_turns_at = now.after(FIRST_TURNS_EVERY);
        }
        let state = &*state;
        let want = |(index, destination): (usize, &DeliveryDestination)| {
            let limits = self.seat.limits(index);
            let ahead = limits
                .and_then(|(bound, rate)| ahead(destination.rank, bound, rate, self.setup.worker.lease))
                .unwrap_or(0);
            // As many requests are worth as many bundles, as far as their outcomes may wait to be recorded.
            let in_bundles = ahead.saturating_mul(destination.messages_max()).min(self.setup.unrecorded);
            let ahead = ahead.max(in_bundles);
            self.ahead[index].store(ahead, Ordering::Relaxed);
            // What waits for its file's rate keeps no other file away.
            let waiting = state.roster.waiting(index) - for_files[index];
            let batches = destination.batches_max().saturating_sub(state.roster.held(index));
            let in_order = destination.order.is_some();
            let is_full = in_order && state.is_full_in_order(index);
            let open = !destination.paused && !self.holds.is_held(index) && ahead > 0;
            if !open || is_full || self.seat.stands_for(index).is_some() {
                return None;
            }
            let is_probing = self.seat.is_probing(index);
            let messages = if is_probing {
                usize::from(waiting == 0)
            } else if waiting <= ahead / 2 {
                // Refilled when half used up, so that a lease is worth its transaction.
                ahead - waiting
            } else {
                0
            };
            let room = FIRST_TURNS_MAX.saturating_sub(state.roster.held(index)).min(FirstTurns::BATCHES_MAX);
            let takes_turns = takes_turns && messages == 0 && !is_probing && !in_order && room > 0;
            let first_turns = takes_turns.then(|| FirstTurns {
                besides: state.roster.files_with(index, (ahead / ENOUGH_PART).max(1)),
                retries: !state.roster.has_retries(index),
            });
            let batches = if takes_turns { room } else { batches };
            ((messages > 0 || takes_turns) && batches > 0).then(|| Want {
                longest_wait: longest_wait(&destination.retry),
                first_turns,
                in_order,
                ..Want::new(destination.name.clone(), messages, batches)
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
        let open: Vec<_> = lease.open.iter().filter(is_open).copied().collect();
        let keys = self.keys(destination, &lease, &rows, &open);
        let charged: Vec<_> = lease.charged.keys().copied().collect();
        let pace = Pace::of(lease.losses);
        let (header, trace) = (lease.header.clone(), self.worker.trace_parent(&lease));
        let lease = Lease { payload: bytes::Bytes::new(), open: Vec::new(), ..lease };
        let (failed, held) = (AtomicBool::new(false), AtomicBool::new(false));
        let (draws, said) = (Draws(rand::rng().random()), Mutex::default());
        let taken = self.worker.clock().mono();
        let rate = self.setup.file_rates.of(&lease.header, taken);
        let in_order = self.setup.destinations[destination].order.is_some();
        let mut state = self.state();
        // Where an order is kept, other files wait for it anyway.
        let is_crowded = |rate: &FileRate| !in_order && state.is_crowded(&lease.header, rate);
        let crowded = rate.as_ref().is_some_and(is_crowded);
        let batch = Arc::new(WebhookBatch {
            lease,
            taken,
            rows,
            template,
            draws,
            destination,
            failed,
            held,
            rate,
            crowded,
            trace,
            said,
            answers: Mutex::default(),
        });
        state.batches.insert(token, batch.clone());
        let priority = header.priority_by(&state.priorities);
        state.roster.add(destination, Incoming { token, file: header.file, priority, pace, open, keys }, at);
        state.roster.keep_apart(token, charged);
        if crowded || batch.is_closed(at) {
            batch.held.store(true, Ordering::Relaxed);
            state.roster.stop_batch(token);
            self.worker.wake(); // so that no more of its file is leased
        }
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

    /// Until a message is due again that waits here, or may go that may not now, or another file's may go ahead.
    fn sleep(&self) -> Duration {
        let state = self.state();
        let now = self.worker.clock().mono();
        let least = if state.roster.in_flight() > 0 { RETRIES_LOOKED_AT_EVERY } else { Duration::ZERO };
        let due = state.roster.next_due().map(|due| due.since(self.worker.clock().wall()).max(least));
        let ask = state.ask_again.map(|at| at.since(now));
        let waits = (0..self.ahead.len()).any(|index| state.roster.waiting(index) > 0);
        let turns = waits.then(|| state.first_turns_at.since(now));
        let wait = due.into_iter().chain(ask).chain(turns).min();
        wait.map_or(Duration::MAX, |wait| wait.max(Duration::from_millis(1)))
    }

    fn tokens(&self) -> Vec<LeaseToken> {
        self.state().roster.tokens()
    }

    fn forget(&self, token: LeaseToken) -> bool {
        let mut state = self.state();
        let of = state.batches.get(&token).map(|batch| batch.destination);
        if let Some(index) = of.filter(|index| self.setup.destinations[*index].order.is_some()) {
            // Another worker has a part of the order: all of it is leased anew.
            state.roster.stop(Some(index));
        }
        state.remove(token)
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

    /// The key of each open message, where the destination keeps an order.
    fn keys(
        &self,
        destination: usize,
        lease: &Lease,
        rows: &OpenRows,
        open: &[OpenMessage],
    ) -> HashMap<u32, u64> {
        let Some(order) = &self.setup.destinations[destination].order else { return HashMap::new() };
        let key = |message: &OpenMessage| {
            let (_, bytes) = rows.get(message.index)?;
            Some((message.index, self.hasher.hash_one(order.of(&lease.header.layout, bytes))))
        };
        open.iter().filter_map(key).collect()
    }

    fn close(&self) {
        let mut state = self.state();
        state.roster.stop(None);
        state.gauges.iter_mut().for_each(WorkerGauges::close);
        drop(state);
        self.flush.ring();
        self.worker.close();
    }

    /// What is to be given back, and how.
    fn returnable(&self) -> Vec<(LeaseToken, Release)> {
        let now = self.worker.clock().wall();
        let state = self.state();
        let how = |token: LeaseToken| {
            let how = state.batches.get(&token).map_or(Release::Unused, |batch| {
                match unused(&batch.lease.header.terms, now) {
                    Release::Unused if batch.crowded => {
                        Release::Closed { from: now, until: now.after(CROWDED_FOR) }
                    }
                    how => how,
                }
            });
            (token, how)
        };
        state.roster.returnable().into_iter().map(how).collect()
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

    /// Stops what is held of destinations that stand for long, and of those that keep an order and are to be leased anew.
    fn give_back(&self) {
        let now = self.worker.clock().mono();
        for (index, destination) in self.setup.destinations.iter().enumerate() {
            let mut state = self.state();
            let is_old = |batch: &Arc<WebhookBatch>| {
                batch.destination == index && now.since(batch.taken) > LEASED_ANEW_AFTER
            };
            let is_standing = self.seat.stands_for(index).is_some_and(|wait| wait > STANDS_HERE);
            if is_standing || (destination.order.is_some() && state.batches.values().any(is_old)) {
                state.roster.stop(Some(index));
            }
        }
    }
}
