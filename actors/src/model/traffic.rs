//! Whether a message may go now: what each destination can bear, and what all of them may have in flight together.
//!
//! One state for each destination, whoever sends to it: its [limit](limiter), its [breaker](breaker), its
//! [retry budget](budget), what its receiver has asked for (`Retry-After`) and whether it is [used wrongly](storm). A message
//! that may not go now takes nothing: it waits without a permit, so that no destination can hold up another (F43, F69).
//!
//! # The pool
//!
//! All destinations share a pool of permits. Each that is in use has an even part of it guaranteed; what it does not use
//! others may have. A request that hangs can't be asked to give its permit back, so what is lent leaves room: for what the
//! others lately used of their parts, for those that wait for a permit, and a sixteenth for who was idle. And nothing is lent
//! to a destination that does not answer.

pub mod brake;
pub mod breaker;
pub mod budget;
pub mod limiter;
pub mod storm;

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    time::Duration,
};

use self::{
    brake::{Brake, Brakes},
    breaker::{Allowed, Breaker, Change, Pulse},
    budget::RetryBudget,
    limiter::{Bound, Limiter},
    storm::{Judgement, PermanentFailure, Storm, Suspicion},
};
use super::{
    ids::FileId,
    outcome::{Outcome, Reason},
    time::MonoMs,
};

/// The part of the pool that is lent to nobody.
const SPARE: usize = 16;

/// Over how long the most permits that a destination used are remembered, twice.
const PEAK_OVER: Duration = Duration::from_secs(2);

/// How long ago a destination must have answered for more than its part to be lent to it.
const LENT_FOR: Duration = Duration::from_secs(2);

/// How long a worker counts as waiting that was refused: it may be gone, or busy with the store.
const WAITS_FOR: Duration = Duration::from_secs(1);

/// Times of standing that are remembered one by one.
const STANDS_MAX: usize = 128;

/// What an operator says about a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrafficRules {
    /// What bounds its requests in flight.
    pub bound: Bound,
    /// The share of permanent failures that makes it suspect, in percent; 0 for never.
    pub storm_percent: u8,
}

/// A permit to send one message. It must be given back by [`Traffic::ended`] or [`Traffic::withdrawn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permit {
    /// The destination.
    pub destination: usize,
    worker: u64,
    is_retry: bool,
    is_probe: bool,
    /// What its failure is judged by.
    epoch: u32,
}

/// Why a message may not go now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not before then, unless something changes.
    Until(MonoMs),
    /// A retry; not before then. First attempts may go.
    RetryUntil(MonoMs),
    /// Not before a permit is given back.
    Full,
    /// Not before an operator has done something.
    Suspended,
}

/// What followed from an attempt's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// What a permanent failure means.
    pub judgement: Judgement,
    /// What it is judged by, for [`Traffic::judge`].
    pub epoch: u32,
    /// What it changed at the breaker.
    pub change: Option<Change>,
    /// Whether more may go than before: those who wait should ask again.
    pub grew: bool,
    /// Whether it is this that made the destination suspect.
    pub became_suspect: bool,
}

/// How a destination stands, for an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficView {
    /// Requests that may be in flight.
    pub limit: usize,
    /// What bounds that.
    pub bound: Bound,
    /// Requests in flight.
    pub in_flight: usize,
    /// What keeps messages from going at once, and since when.
    pub brake: Option<(Brake, MonoMs)>,
    /// How long an answer takes when the receiver is not busy, if that is known.
    pub base: Option<Duration>,
    /// Since when its breaker is not closed.
    pub open_since: Option<MonoMs>,
    /// When it is tried again, if nothing goes before.
    pub paused_until: Option<MonoMs>,
    /// Tokens for retries.
    pub retry_tokens: u64,
    /// Why it is suspect.
    pub suspicion: Option<Suspicion>,
}

/// A worker's part in a destination.
#[derive(Clone, Copy, Debug)]
struct Part {
    worker: u64,
    held: usize,
    waits_since: Option<MonoMs>,
}

#[derive(Debug)]
struct Destination {
    limiter: Limiter,
    breaker: Breaker,
    budget: RetryBudget,
    storm: Storm,
    paused_until: MonoMs,
    /// When it answered last.
    answered: Option<MonoMs>,
    /// Those whose permits are kept for a while after they failed included.
    in_flight: usize,
    /// When the permits of failed attempts are free.
    cooling: BinaryHeap<Reverse<MonoMs>>,
    parts: Vec<Part>,
    peak: Peak,
    stood: Stood,
    brakes: Brakes,
}

/// The state of all destinations.
#[derive(Debug)]
pub struct Traffic {
    pool: usize,
    in_flight: usize,
    destinations: Vec<Destination>,
}

impl Traffic {
    /// A pool of so many permits, and no destination.
    pub fn new(pool: usize) -> Self {
        Self { pool, in_flight: 0, destinations: Vec::new() }
    }

    /// So many permits from now on. Who has one keeps it.
    pub fn resize(&mut self, pool: usize) {
        self.pool = pool;
    }

    /// One more destination; its index.
    pub fn add(&mut self, rules: TrafficRules, now: MonoMs) -> usize {
        let limiter = Limiter::new(rules.bound);
        self.destinations.push(Destination {
            breaker: Breaker::default(),
            budget: RetryBudget::new(limiter.limit(), now),
            storm: Storm::new(rules.storm_percent),
            limiter,
            paused_until: now,
            answered: None,
            in_flight: 0,
            cooling: BinaryHeap::new(),
            parts: Vec::new(),
            peak: Peak::default(),
            stood: Stood::default(),
            brakes: Brakes::default(),
        });
        self.destinations.len() - 1
    }

    /// The destination has another configuration, which may be the remedy: nothing is held against it any more.
    pub fn reconfigure(&mut self, destination: usize, rules: TrafficRules) {
        let this = &mut self.destinations[destination];
        this.limiter.rebound(rules.bound);
        this.storm.renew(rules.storm_percent);
        this.breaker = Breaker::default();
    }

    /// Other bounds hold for what it may have in flight. What is in flight beyond them ends.
    pub fn rebound(&mut self, destination: usize, bound: Bound) {
        self.destinations[destination].limiter.rebound(bound);
    }

    /// What bounds its requests in flight.
    pub fn bound(&self, destination: usize) -> Bound {
        self.destinations[destination].limiter.bound()
    }

    /// An operator says that the destination can be used again.
    pub fn resume(&mut self, destination: usize, rules: TrafficRules, now: MonoMs) {
        self.reconfigure(destination, rules);
        self.destinations[destination].paused_until = now;
    }

    /// Whether a message may go. A worker that is refused counts as waiting, until it is granted one or has none.
    pub fn may(
        &mut self,
        destination: usize,
        worker: u64,
        is_retry: bool,
        now: MonoMs,
    ) -> Result<Permit, Refusal> {
        self.cool(destination, now);
        let this = &mut self.destinations[destination];
        if this.storm.suspicion().is_some() {
            return Err(Refusal::Suspended);
        }
        if now < this.paused_until {
            return Err(Refusal::Until(this.paused_until));
        }
        let mut is_probe = false;
        match this.breaker.allowed(now) {
            Allowed::All => {}
            Allowed::Probe => is_probe = true,
            Allowed::NotBefore(until) => return Err(Refusal::Until(until)),
            Allowed::NotNow => return Err(this.refuse(worker, now, None)),
        }
        if is_retry
            && !is_probe
            && let Err(until) = this.budget.may_retry(this.limiter.limit(), now)
        {
            this.brakes.meet(Brake::RetryBudget, now);
            return Err(Refusal::RetryUntil(until));
        }
        if !is_probe && !this.has_room(worker, now) {
            return Err(this.refuse(worker, now, Some(Brake::Limit)));
        }
        if !self.pool_has_room(destination, now) {
            return Err(self.destinations[destination].refuse(worker, now, Some(Brake::Pool)));
        }
        let epoch = self.destinations[destination].storm.epoch();
        Ok(Permit { destination, worker, is_retry, is_probe, epoch })
    }

    /// The message goes that [`Self::may`] has allowed at the same time.
    pub fn take(&mut self, permit: Permit, now: MonoMs) {
        self.in_flight += 1;
        let this = &mut self.destinations[permit.destination];
        this.in_flight += 1;
        this.peak.note(this.in_flight, now);
        let part = this.part(permit.worker);
        part.held += 1;
        part.waits_since = None;
        if permit.is_probe {
            this.breaker.probe();
        }
        if permit.is_retry {
            this.budget.retry();
        }
    }

    /// The worker has no message for a destination: it does not wait.
    pub fn has_none(&mut self, destination: usize, worker: u64) {
        let this = &mut self.destinations[destination];
        if let Some(part) = this.parts.iter_mut().find(|part| part.worker == worker) {
            part.waits_since = None;
            if part.held == 0 {
                this.parts.retain(|part| part.worker != worker);
            }
        }
    }

    /// The permit was not used.
    pub fn withdrawn(&mut self, permit: Permit, now: MonoMs) {
        let this = &mut self.destinations[permit.destination];
        if permit.is_probe {
            this.breaker.probe_withdrawn(now);
        }
        this.in_flight -= 1;
        this.give_back(permit);
        self.in_flight -= 1;
    }

    /// An attempt at a message of `file` ended, `latency` after it began; `jitter` is in `0.0..1.0`.
    pub fn ended(
        &mut self,
        permit: Permit,
        now: MonoMs,
        latency: Duration,
        outcome: &Outcome,
        file: FileId,
        jitter: f64,
    ) -> Ended {
        let this = &mut self.destinations[permit.destination];
        let was = (this.limiter.limit(), this.breaker.is_closed(), this.storm.suspicion().is_some());
        let health = Health::of(outcome);
        let failure = match *outcome {
            Outcome::Permanent { status, reason } => Some(PermanentFailure::new(status, reason)),
            _ => None,
        };
        let mut change = None;
        if let Some(Health { pulse, is_overloaded, pause }) = health {
            let in_flight = this.in_flight;
            this.limiter.answered(now, (!is_overloaded).then_some(latency), in_flight);
            let limit = this.limiter.limit();
            change = this.breaker.ended(now, pulse, permit.is_probe, limit, jitter);
            if matches!(pulse, Pulse::Alive | Pulse::Broken) {
                this.answered = Some(now);
            }
            if let Some(pause) = pause {
                this.pause(now, now.after(pause));
            }
            if pulse == Pulse::Timeout {
                this.budget.timed_out();
            }
        } else if permit.is_probe {
            this.breaker.probe_withdrawn(now);
        }
        if matches!(outcome, Outcome::Sent { .. }) {
            this.budget.sent(permit.is_retry);
        }
        let judgement = match outcome {
            Outcome::Unsent(_) => Judgement::Ordinary,
            _ => this.storm.ended(permit.epoch, file, failure),
        };
        match change {
            Some(Change::Opened { until, .. }) => this.stood.add(now, until),
            Some(Change::Closed { since }) => {
                this.stood.add(since, now);
                this.limiter.restart();
            }
            None => {}
        }
        let spare = this.limiter.base().and_then(|base| base.checked_sub(latency));
        let has_failed = health.is_some_and(|health| health.is_overloaded);
        match spare.filter(|spare| has_failed && *spare >= Duration::from_millis(1)) {
            // Only the destination's: the pool's is free at once.
            Some(spare) => this.cooling.push(Reverse(now.after(spare))),
            None => this.in_flight -= 1,
        }
        this.give_back(permit);
        let is = (this.limiter.limit(), this.breaker.is_closed(), this.storm.suspicion().is_some());
        self.in_flight -= 1;
        let epoch = permit.epoch;
        Ended {
            judgement,
            epoch,
            change,
            grew: is.0 > was.0 || (is.1 && !was.1),
            became_suspect: is.2 && !was.2,
        }
    }

    /// What such a failure of a message of `file` means by now, if its permit was of `epoch`. It counts in no share: attempts
    /// do, and a bundle is one.
    pub fn judge(
        &mut self,
        destination: usize,
        epoch: u32,
        file: FileId,
        failure: PermanentFailure,
    ) -> Judgement {
        self.destinations[destination].storm.judge(epoch, file, failure)
    }

    /// When a destination can be tried again, if not now; [`MonoMs`]' end if an operator has to do something.
    pub fn stands_until(&self, destination: usize, now: MonoMs) -> Option<MonoMs> {
        let this = &self.destinations[destination];
        if this.storm.suspicion().is_some() {
            return Some(MonoMs(u64::MAX));
        }
        let until = match this.breaker.allowed(now) {
            Allowed::NotBefore(until) => until.max(this.paused_until),
            _ => this.paused_until,
        };
        (until > now).then_some(until)
    }

    /// Whether a destination gets nothing but probes.
    pub fn is_probing(&self, destination: usize) -> bool {
        !self.destinations[destination].breaker.is_closed()
    }

    /// How much of the last `age` a destination stood: with its breaker open, or as its receiver had asked.
    pub fn stood(&self, destination: usize, age: Duration, now: MonoMs) -> Duration {
        let this = &self.destinations[destination];
        let stood = this.stood.within(age, now);
        let open = this.breaker.out_since().map_or(Duration::ZERO, |since| now.since(since).min(age));
        stood.max(open)
    }

    /// The workers other than `worker` that wait for a permit which may be free now: at this destination, or in the pool.
    pub fn waiting(&self, destination: usize, worker: u64, now: MonoMs) -> Vec<u64> {
        let mut workers: Vec<u64> = Vec::new();
        for (index, this) in self.destinations.iter().enumerate() {
            if index == destination || this.in_flight < this.limiter.limit() {
                let waiting = this.parts.iter().filter(|part| part.worker != worker && part.waits(now));
                workers.extend(waiting.map(|part| part.worker));
            }
        }
        workers.sort_unstable();
        workers.dedup();
        workers
    }

    /// Permits of a destination that a worker could take now, if its rate allows: for asking for rate.
    pub fn free(&mut self, destination: usize, worker: u64, now: MonoMs) -> usize {
        if self.may(destination, worker, false, now).is_err() {
            return 0;
        }
        let this = &self.destinations[destination];
        if !this.breaker.is_closed() {
            return 1;
        }
        this.limiter.limit().saturating_sub(this.in_flight)
    }

    /// A message that had a permit could not go at once because of `brake`.
    pub fn braked(&mut self, destination: usize, brake: Brake, now: MonoMs) {
        self.destinations[destination].brakes.meet(brake, now);
    }

    /// When the next permit of a destination's failed attempts is free.
    pub fn cools_at(&self, destination: usize) -> Option<MonoMs> {
        self.destinations[destination].cooling.peek().map(|at| at.0)
    }

    /// Requests that may be in flight to a destination.
    pub fn limit(&self, destination: usize) -> usize {
        self.destinations[destination].limiter.limit()
    }

    /// How a destination stands.
    pub fn view(&mut self, destination: usize, now: MonoMs) -> TrafficView {
        self.cool(destination, now);
        let until = self.stands_until(destination, now).filter(|until| *until < MonoMs(u64::MAX));
        let this = &mut self.destinations[destination];
        let limit = this.limiter.limit();
        // What came in since.
        let _ = this.budget.may_retry(limit, now);
        TrafficView {
            limit,
            bound: this.limiter.bound(),
            in_flight: this.in_flight,
            brake: this.brakes.strongest(now),
            base: this.limiter.base(),
            open_since: this.breaker.out_since(),
            paused_until: until,
            retry_tokens: this.budget.level(),
            suspicion: this.storm.suspicion().copied(),
        }
    }

    fn cool(&mut self, destination: usize, now: MonoMs) {
        let this = &mut self.destinations[destination];
        while this.cooling.peek().is_some_and(|at| at.0 <= now) {
            this.cooling.pop();
            this.in_flight -= 1;
        }
    }

    fn pool_has_room(&self, destination: usize, now: MonoMs) -> bool {
        if self.in_flight >= self.pool {
            return false;
        }
        let this = &self.destinations[destination];
        let is_lent_to = this.answered.is_some_and(|at| now.since(at) < LENT_FOR);
        // An even part among all is guaranteed, whatever the others do.
        if this.in_flight < (self.pool / self.destinations.len()).max(1) {
            return true;
        }
        if !is_lent_to {
            return false;
        }
        let in_use = |this: &&Destination| this.in_flight > 0 || this.peak.of(now) > 0 || this.waits(now);
        let others = || {
            self.destinations
                .iter()
                .enumerate()
                .filter(|(index, _)| *index != destination)
                .map(|(_, this)| this)
        };
        let users = 1 + others().filter(in_use).count();
        let spare = if users < self.destinations.len() { self.pool / SPARE } else { 0 };
        let guaranteed = ((self.pool - spare) / users).max(1);
        if this.in_flight < guaranteed {
            return true;
        }
        let kept: usize = others()
            .map(|this| {
                let part = if this.waits(now) { guaranteed } else { this.peak.of(now).min(guaranteed) };
                let usable = if this.breaker.is_closed() && now >= this.paused_until { part } else { 1 };
                usable.min(this.limiter.limit()).saturating_sub(this.in_flight)
            })
            .sum();
        self.in_flight + kept + spare < self.pool
    }
}

impl Destination {
    fn part(&mut self, worker: u64) -> &mut Part {
        let at = self.parts.iter().position(|part| part.worker == worker).unwrap_or_else(|| {
            self.parts.push(Part { worker, held: 0, waits_since: None });
            self.parts.len() - 1
        });
        &mut self.parts[at]
    }

    fn give_back(&mut self, permit: Permit) {
        let part = self.part(permit.worker);
        part.held -= 1;
        if part.held == 0 && part.waits_since.is_none() {
            self.parts.retain(|part| part.worker != permit.worker);
        }
    }

    fn refuse(&mut self, worker: u64, now: MonoMs, brake: Option<Brake>) -> Refusal {
        if let Some(brake) = brake {
            self.brakes.meet(brake, now);
        }
        self.part(worker).waits_since = Some(now);
        Refusal::Full
    }

    fn waits(&self, now: MonoMs) -> bool {
        self.parts.iter().any(|part| part.waits(now))
    }

    /// Whether there is a permit, and no other worker has a better claim to it: who waits with fewer than an even part.
    fn has_room(&self, worker: u64, now: MonoMs) -> bool {
        let limit = self.limiter.limit();
        if self.in_flight >= limit {
            return false;
        }
        let others = || self.parts.iter().filter(|part| part.worker != worker);
        let part = limit.div_ceil(1 + others().count());
        let held = self.parts.iter().find(|part| part.worker == worker).map_or(0, |part| part.held);
        held < part || !others().any(|other| other.waits(now) && other.held < part)
    }

    fn pause(&mut self, now: MonoMs, until: MonoMs) {
        if until > self.paused_until.max(now) {
            self.paused_until = until;
            self.stood.add(now, until);
        }
    }
}

impl Part {
    fn waits(&self, now: MonoMs) -> bool {
        self.waits_since.is_some_and(|since| now.since(since) < WAITS_FOR)
    }
}

/// What an outcome says of its receiver; nothing if there was no attempt.
#[derive(Clone, Copy, Debug)]
struct Health {
    pulse: Pulse,
    /// Whether it may come of too many requests.
    is_overloaded: bool,
    /// How long it wants to be left alone.
    pause: Option<Duration>,
}

impl Health {
    fn of(outcome: &Outcome) -> Option<Self> {
        let alive = Self { pulse: Pulse::Alive, is_overloaded: false, pause: None };
        let failed = |pulse| Self { pulse, is_overloaded: true, pause: None };
        match *outcome {
            Outcome::Unsent(_) | Outcome::Permanent { reason: Reason::Render, .. } => None,
            Outcome::Sent { .. } | Outcome::Permanent { .. } | Outcome::Gone => Some(alive),
            Outcome::Retryable { status, reason, retry_after } => match reason {
                Reason::Status => Some(Self {
                    pulse: if status >= 500 { Pulse::Broken } else { Pulse::Alive },
                    is_overloaded: status == 429 || status >= 500,
                    pause: retry_after.filter(|_| matches!(status, 429 | 503)),
                }),
                Reason::Timeout => Some(failed(Pulse::Timeout)),
                Reason::Connect | Reason::Dns | Reason::Tls => Some(failed(Pulse::Connect)),
                Reason::Panic => None,
                _ => Some(failed(Pulse::Broken)),
            },
        }
    }
}

/// The most permits in use lately.
#[derive(Clone, Copy, Debug, Default)]
struct Peak {
    begun: MonoMs,
    before: usize,
    now: usize,
}

impl Peak {
    fn note(&mut self, in_flight: usize, now: MonoMs) {
        let since = now.since(self.begun);
        if since >= PEAK_OVER {
            self.before = if since < PEAK_OVER * 2 { self.now } else { 0 };
            (self.begun, self.now) = (now, 0);
        }
        self.now = self.now.max(in_flight);
    }

    fn of(&self, now: MonoMs) -> usize {
        match now.since(self.begun) {
            since if since < PEAK_OVER => self.now.max(self.before),
            since if since < PEAK_OVER * 2 => self.now,
            _ => 0,
        }
    }
}

/// When a destination stood, by time. The oldest times are kept together (I8).
#[derive(Clone, Debug, Default)]
struct Stood(VecDeque<(MonoMs, MonoMs, Duration)>);

impl Stood {
    fn add(&mut self, from: MonoMs, to: MonoMs) {
        let (mut from, mut to) = (from, to);
        while let Some((begun, end, _)) = self.0.pop_back_if(|(_, end, _)| *end >= from) {
            (from, to) = (from.min(begun), to.max(end));
        }
        self.0.push_back((from, to, to.since(from)));
        if self.0.len() > STANDS_MAX {
            let (first, second) = (self.0.pop_front(), self.0.pop_front());
            if let Some(((begun, _, a), (_, end, b))) = first.zip(second) {
                self.0.push_front((begun, end, a + b));
            }
        }
    }

    fn within(&self, age: Duration, now: MonoMs) -> Duration {
        let since = MonoMs(now.0.saturating_sub(u64::try_from(age.as_millis()).unwrap_or(u64::MAX)));
        let part = |&(begun, end, stood): &(MonoMs, MonoMs, Duration)| {
            stood.min(end.min(now).since(begun.max(since)))
        };
        self.0.iter().map(part).sum()
    }
}

#[cfg(test)]
mod tests;
