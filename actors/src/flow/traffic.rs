use std::{
    collections::BTreeMap,
    fmt, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use rand::RngExt as _;
use tokio::sync::Notify;

use super::{Bell, Gate};
use crate::{
    model::{
        ids::FileId,
        lease::LeaseToken,
        limits::{Concurrency, GateRate},
        outcome::{Attempt, Outcome},
        roster::{Admission, Answer},
        standing::LastError,
        time::MonoMs,
        traffic::{
            Ended, Permit, Refusal, Traffic, TrafficRules, TrafficView,
            brake::Brake,
            limiter::Bound,
            storm::{Judgement, PermanentFailure},
        },
    },
    ports::{Clock, LimitsSet},
};

/// What a process may have in flight, and to which destinations: see [`crate::model::traffic`]. It outlives workers and
/// configurations; workers that finish what an earlier configuration began count too. Clones are the same one.
#[derive(Clone)]
pub struct TrafficControl(Arc<Inside>);

struct Inside {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

struct State {
    traffic: Traffic,
    /// Each destination that a configuration of this process had.
    destinations: BTreeMap<Arc<str>, Known>,
    /// Workers that may be woken.
    bells: BTreeMap<u64, Bell>,
    workers: u64,
}

/// A destination.
struct Known {
    index: usize,
    configured: ConfiguredTraffic,
    /// What is set instead.
    set: Option<Concurrency>,
    /// How the last attempt that failed did so.
    last_error: Option<LastError>,
}

/// What the configuration says of a destination.
#[derive(Clone, Copy, Debug)]
pub struct ConfiguredTraffic {
    /// What holds for it.
    pub rules: TrafficRules,
    /// The most that it may have in flight if its limit is set to find itself.
    pub ceiling: usize,
}

impl Known {
    fn rules(&self) -> TrafficRules {
        let bound = match self.set {
            None => self.configured.rules.bound,
            Some(Concurrency::Auto) => Bound::Auto { ceiling: self.configured.ceiling },
            Some(Concurrency::Fixed(number)) => Bound::Fixed(number.get()),
        };
        TrafficRules { bound, ..self.configured.rules }
    }
}

impl fmt::Debug for TrafficControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrafficControl").finish_non_exhaustive()
    }
}

impl TrafficControl {
    /// No destination yet.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let state = State {
            traffic: Traffic::new(0),
            destinations: BTreeMap::new(),
            bells: BTreeMap::new(),
            workers: 0,
        };
        Self(Arc::new(Inside { clock, state: Mutex::new(state) }))
    }

    /// A configuration is taken up: `pool` requests in flight, and these destinations. What is set for them stays.
    pub fn configure(
        &self,
        pool: usize,
        destinations: impl IntoIterator<Item = (Arc<str>, ConfiguredTraffic)>,
    ) {
        let now = self.0.clock.mono();
        let state = &mut *self.state();
        state.traffic.resize(pool);
        for (name, configured) in destinations {
            if let Some(known) = state.destinations.get_mut(&name) {
                known.configured = configured;
                state.traffic.reconfigure(known.index, known.rules());
            } else {
                let index = state.traffic.add(configured.rules, now);
                state.destinations.insert(name, Known { index, configured, set: None, last_error: None });
            }
        }
    }

    /// From now on this is set for destinations, and nothing else.
    pub fn set_limits(&self, limits: &LimitsSet) {
        let state = &mut *self.state();
        for (name, known) in &mut state.destinations {
            known.set = limits.get(name).and_then(|limits| limits.concurrency);
            state.traffic.rebound(known.index, known.rules().bound);
        }
    }

    /// How a destination stands, what time that is, and how the last attempt that failed did so; nothing of one that was never
    /// configured.
    pub fn view(&self, destination: &str) -> Option<(TrafficView, MonoMs, Option<LastError>)> {
        let now = self.0.clock.mono();
        let state = &mut *self.state();
        let known = state.destinations.get(destination)?;
        Some((state.traffic.view(known.index, now), now, known.last_error.clone()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Changed by infallible steps only.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A rate, as one worker waits for it.
#[derive(Debug)]
struct Rate {
    gate: Gate,
    /// Messages that were let through and are not begun.
    passed: AtomicUsize,
    /// Messages wait for it.
    lacking: Notify,
}

impl Rate {
    fn new(gate: Gate) -> Self {
        Self { gate, passed: AtomicUsize::new(0), lacking: Notify::new() }
    }

    /// How many of `wanted` messages may go now.
    fn try_pass(&self, wanted: usize) -> usize {
        let took = self.passed.fetch_update(SeqCst, SeqCst, |passed| Some(passed.saturating_sub(wanted)));
        let taken = took.map_or(0, |before| before.min(wanted));
        if taken == wanted { taken } else { taken + self.gate.try_pass(wanted - taken) }
    }

    fn keep(&self, count: usize) {
        self.passed.fetch_add(count, SeqCst);
    }
}

/// A worker's place at the [`TrafficControl`].
pub struct Seat {
    control: TrafficControl,
    worker: u64,
    /// By the worker's own numbers: the destination's index, and its rate.
    destinations: Vec<(usize, Rate)>,
    /// What was noted last of failures of each, and when: see [`Self::failed`].
    noted: Vec<AtomicU64>,
    /// The rate over all destinations.
    all: Option<Rate>,
}

impl Seat {
    /// For a worker that sends to these destinations and is woken by `bell`.
    ///
    /// # Panics
    ///
    /// For a destination that was never configured.
    pub fn new<'a>(
        control: &TrafficControl,
        bell: Bell,
        destinations: impl IntoIterator<Item = (&'a str, Gate)>,
        all: Option<Gate>,
    ) -> Self {
        let mut state = control.state();
        state.workers += 1;
        let worker = state.workers;
        state.bells.insert(worker, bell);
        let destination = |(name, gate): (&str, Gate)| {
            let known = state.destinations.get(name).expect("a worker's destinations are configured first");
            (known.index, Rate::new(gate))
        };
        let destinations: Vec<_> = destinations.into_iter().map(destination).collect();
        drop(state);
        let noted = destinations.iter().map(|_| AtomicU64::new(0)).collect();
        Self { control: control.clone(), worker, destinations, noted, all: all.map(Rate::new) }
    }

    fn index(&self, destination: usize) -> usize {
        self.destinations[destination].0
    }

    fn now(&self) -> MonoMs {
        self.control.0.clock.mono()
    }

    /// Asks for messages to be let go. Nobody else asks meanwhile.
    pub fn ask(&self) -> Asking<'_> {
        Asking { seat: self, state: self.control.state(), now: self.now(), granted: None, ask_again: None }
    }

    /// When the destination can be tried again, if not now.
    pub fn stands_for(&self, destination: usize) -> Option<Duration> {
        let now = self.now();
        let until = self.control.state().traffic.stands_until(self.index(destination), now);
        until.map(|until| until.since(now))
    }

    /// Whether the destination gets nothing but probes.
    pub fn is_probing(&self, destination: usize) -> bool {
        self.control.state().traffic.is_probing(self.index(destination))
    }

    /// How much of the last `age` the destination stood.
    pub fn stood(&self, destination: usize, age: Duration) -> Duration {
        let now = self.now();
        self.control.state().traffic.stood(self.index(destination), age, now)
    }

    /// What a permanent failure of a message of `file` under a permit of `epoch` means by now.
    pub fn judge(
        &self,
        destination: usize,
        epoch: u32,
        file: FileId,
        failure: PermanentFailure,
    ) -> Judgement {
        let index = self.index(destination);
        self.control.state().traffic.judge(index, epoch, file, failure)
    }

    /// An attempt failed: it is kept for the operator, until another one does. Of those that fail alike within a tenth of a
    /// second the first will do: where half of all requests fail, the others would cost more than their retries.
    pub fn failed(&self, destination: usize, attempt: Attempt, text: Option<&str>) {
        let alike = (attempt.at.0 / 100) << 24 | u64::from(attempt.status) << 8 | attempt.reason as u64;
        if self.noted[destination].swap(alike, Relaxed) == alike {
            return;
        }
        let index = self.index(destination);
        let state = &mut *self.control.state();
        if let Some(known) = state.destinations.values_mut().find(|known| known.index == index) {
            known.last_error = Some(LastError { attempt, text: text.map(Into::into) });
        }
    }

    /// Whether requests to the destination are in flight.
    pub fn is_busy(&self, destination: usize) -> bool {
        let (index, now) = (self.index(destination), self.now());
        self.control.state().traffic.view(index, now).in_flight > 0
    }

    /// An operator says that the destination can be used again.
    pub fn resume(&self, destination: usize) {
        let (index, now) = (self.index(destination), self.now());
        let state = &mut *self.control.state();
        let known = state.destinations.values().find(|known| known.index == index);
        state.traffic.resume(index, known.expect("it was configured").rules(), now);
    }

    /// Why the destination is suspect.
    pub fn suspicion(&self, destination: usize) -> Option<String> {
        let now = self.now();
        let view = self.control.state().traffic.view(self.index(destination), now);
        view.suspicion.map(|suspicion| suspicion.to_string())
    }

    /// The rates that messages wait for: of each destination, and over all (`None`).
    pub fn rates(&self) -> Vec<Option<usize>> {
        (0..self.destinations.len()).map(Some).chain(self.all.as_ref().map(|_| None)).collect()
    }

    fn rate(&self, destination: Option<usize>) -> Option<&Rate> {
        match destination {
            Some(destination) => Some(&self.destinations[destination].1),
            None => self.all.as_ref(),
        }
    }

    /// What bounds the requests in flight to a destination, and the lower one of its rate and that over all; `None` until
    /// they are known.
    pub fn limits(&self, destination: usize) -> Option<(Bound, Option<usize>)> {
        let (index, rate) = &self.destinations[destination];
        let of_all = self.all.as_ref().map_or(Some(GateRate::Open), |all| all.gate.rate());
        let per_s = |rate| match rate {
            GateRate::Open => None,
            GateRate::PerS(rate) => Some(rate.get() as usize),
        };
        let lower = [rate.gate.rate()?, of_all?].into_iter().filter_map(per_s).min();
        Some((self.control.state().traffic.bound(*index), lower))
    }

    /// Returns when messages wait for a rate.
    pub async fn lacks(&self, destination: Option<usize>) {
        match self.rate(destination) {
            Some(rate) => rate.lacking.notified().await,
            None => std::future::pending().await,
        }
    }

    /// Waits until a rate lets messages through, `wanted` at most.
    pub async fn pass(&self, destination: Option<usize>, wanted: usize) {
        if let Some(rate) = self.rate(destination) {
            let passed = rate.gate.pass_up_to(wanted).await;
            rate.keep(passed);
        }
    }

    /// How many messages could go to a destination now if its rate allowed it.
    pub fn free(&self, destination: usize) -> usize {
        let (index, now) = (self.index(destination), self.now());
        self.control.state().traffic.free(index, self.worker, now)
    }

    /// Wakes the other workers that wait for what was given back at a destination.
    pub fn wake_waiting(&self, destination: usize) {
        let (index, now) = (self.index(destination), self.now());
        let state = self.control.state();
        for worker in state.traffic.waiting(index, self.worker, now) {
            if let Some(bell) = state.bells.get(&worker) {
                bell.ring();
            }
        }
    }

    /// Wakes all workers: more may go than before.
    pub fn wake_all(&self) {
        self.control.state().bells.values().for_each(Bell::ring);
    }
}

impl Drop for Seat {
    /// It is not woken any more. Its permits come back with their requests.
    fn drop(&mut self) {
        let state = &mut *self.control.state();
        state.bells.remove(&self.worker);
        for (destination, _) in &self.destinations {
            state.traffic.has_none(*destination, self.worker);
        }
    }
}

/// A worker asks for messages to be let go, one at a time.
pub struct Asking<'a> {
    seat: &'a Seat,
    state: MutexGuard<'a, State>,
    now: MonoMs,
    granted: Option<Permit>,
    ask_again: Option<MonoMs>,
}

impl Admission for Asking<'_> {
    /// A destination's own rate lets a bundle through as a whole: what has come of it for a part is kept until the rest has, or
    /// a slow rate would make many small requests. Of the rate over all destinations a part is taken, for others wait for it
    /// too.
    fn ask(&mut self, destination: usize, _: LeaseToken, is_retry: bool, messages: usize) -> Answer {
        let (index, rate) = &self.seat.destinations[destination];
        let traffic = &mut self.state.traffic;
        let permit = match traffic.may(*index, self.seat.worker, is_retry, self.now) {
            Ok(permit) => permit,
            Err(refusal) => {
                let (at, answer) = match refusal {
                    Refusal::Until(at) => (Some(at), Answer::Refused),
                    Refusal::RetryUntil(at) => (Some(at), Answer::NoRetries),
                    Refusal::Full => (traffic.cools_at(*index), Answer::Refused),
                    Refusal::Suspended => (None, Answer::Refused),
                };
                self.ask_again = self.ask_again.into_iter().chain(at).min();
                return answer;
            }
        };
        let (rate, all) = (Some(rate), self.seat.all.as_ref());
        let passed = |rate: Option<&Rate>| rate.map_or(messages, |rate| rate.try_pass(messages));
        let lacks = |rate: Option<&Rate>, kept: usize| {
            rate.inspect(|rate| {
                rate.keep(kept);
                rate.lacking.notify_one();
            });
        };
        let own = passed(rate);
        let granted = if own == messages { passed(all) } else { 0 };
        if granted == 0 {
            // It waits for a rate, not for a permit.
            traffic.has_none(*index, self.seat.worker);
            traffic.braked(*index, if own < messages { Brake::Rate } else { Brake::RateOfAll }, self.now);
            if own < messages {
                lacks(rate, own);
            } else {
                rate.inspect(|rate| rate.keep(own));
                lacks(all, 0);
            }
            return Answer::Refused;
        }
        rate.inspect(|rate| rate.keep(own - granted));
        traffic.take(permit, self.now);
        self.granted = Some(permit);
        Answer::Granted(granted)
    }

    fn has_none(&mut self, destination: usize) {
        self.state.traffic.has_none(self.seat.index(destination), self.seat.worker);
    }
}

impl Asking<'_> {
    /// A message waits for the rate of its file or feed.
    pub fn braked_by_file(&mut self, destination: usize) {
        let index = self.seat.index(destination);
        self.state.traffic.braked(index, Brake::RateOfFile, self.now);
    }

    /// The permit that was granted, and when it is worth to ask again, as far as time decides.
    pub fn finish(self) -> (Option<Passage>, Option<MonoMs>) {
        let passage = |permit| Passage { control: self.seat.control.clone(), permit: Some(permit) };
        (self.granted.map(passage), self.ask_again)
    }
}

/// A message's permit to be sent. It is given back when it is dropped.
pub struct Passage {
    control: TrafficControl,
    permit: Option<Permit>,
}

impl Passage {
    /// The attempt at a message of `file` has ended, `latency` after it began.
    pub fn ended(mut self, outcome: &Outcome, latency: Duration, file: FileId) -> Ended {
        let permit = mem::take(&mut self.permit).expect("it ends once");
        let now = self.control.0.clock.mono();
        let jitter = rand::rng().random();
        self.control.state().traffic.ended(permit, now, latency, outcome, file, jitter)
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            let now = self.control.0.clock.mono();
            self.control.state().traffic.withdrawn(permit, now);
        }
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::{
        model::{outcome::Reason, time::UnixMs},
        testing::TokioClock,
    };

    #[tokio::test]
    async fn the_last_failure_is_known_and_of_many_alike_the_first_in_a_tenth_of_a_second() {
        let control = TrafficControl::new(Arc::new(TokioClock::at(UnixMs(0))));
        let rules = TrafficRules { bound: Bound::Fixed(1), storm_percent: 0 };
        let names: [Arc<str>; 2] = ["a".into(), "b".into()];
        control.configure(1, names.clone().map(|name| (name, ConfiguredTraffic { rules, ceiling: 1 })));
        let seat =
            Seat::new(&control, Bell::default(), [("b", Gate::default()), ("a", Gate::default())], None);
        let fail = |at, status, text| {
            seat.failed(0, Attempt { at: UnixMs(at), status, reason: Reason::Status }, Some(text));
        };
        let last =
            |name| control.view(name).unwrap().2.map(|error| (error.attempt.at.0, error.text.unwrap()));
        fail(1_000, 503, "down");
        fail(1_099, 503, "still down");
        assert_eq!(last("b"), Some((1_000, "down".to_owned())));
        fail(1_099, 500, "broken");
        assert_eq!(last("b"), Some((1_099, "broken".to_owned())));
        fail(1_099, 503, "down again");
        assert_eq!(last("b"), Some((1_099, "down again".to_owned())));
        fail(1_100, 503, "down for longer");
        assert_eq!(last("b"), Some((1_100, "down for longer".to_owned())));
        assert_eq!(last("a"), None);
    }
}
