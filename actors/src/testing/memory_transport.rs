//! A message service in memory that behaves as SQS does: it carries hints, and promises little. It delivers at least
//! once, to whoever asks, and remembers nobody. Its limits are those of SQS ("Amazon SQS message quotas").

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use rand::{RngExt, SeedableRng, rngs::SmallRng, seq::SliceRandom};
use tokio::time::Instant;

use crate::{
    model::channel::Call,
    ports::{
        Handle, Hint, ItemOutcome, Outgoing, QueueDepth, Received, StoreError, Transport, TransportLimits,
    },
};

/// Entries in one call.
const ENTRIES_MAX: usize = 10;

/// The longest `DelaySeconds`.
const DELAY_MAX: Duration = Duration::from_mins(15);

/// The longest visibility timeout.
const HIDDEN_MAX: Duration = Duration::from_hours(12);

/// For how long a FIFO queue drops what was sent before.
const DEDUPLICATION: Duration = Duration::from_mins(5);

/// What a transport does that its users would rather it did not. Probabilities per entry or call.
#[derive(Clone, Copy, Debug, Default)]
pub struct TransportFaults {
    /// An entry that is sent is there twice; one that is in flight is delivered once more. Not where order is kept:
    /// there each is there once ("FIFO queue delivery logic").
    pub duplicate: f64,
    /// Entries come in any order.
    pub reorder: bool,
    /// One entry of a call is refused, the others are accepted.
    pub refuse: f64,
    /// A call other than a receive happens and is not answered.
    pub unanswered: f64,
    /// A receive is not answered: what it would have brought is hidden for the whole time.
    pub unanswered_receive: f64,
    /// An entry that is sent is lost.
    pub lose: f64,
    /// The depth is not known.
    pub unknown_depth: f64,
}

/// The service, with a queue for every destination that is asked about.
pub struct MemoryTransport {
    state: Mutex<State>,
    faults: Mutex<TransportFaults>,
    keeps_order: bool,
    begun: Instant,
}

struct State {
    rng: SmallRng,
    queues: BTreeMap<String, BTreeMap<u64, Entry>>,
    /// What was sent lately to a queue that keeps order.
    recent: BTreeMap<(String, Hint, u64), Duration>,
    denied: BTreeSet<(String, usize)>,
    calls: BTreeMap<(String, usize), usize>,
    sent: BTreeMap<Hint, usize>,
    number: u64,
}

struct Entry {
    hint: Hint,
    lane: u32,
    visible_at: Duration,
    /// What its latest receiver names it by; `None` until it was received.
    handle: Option<Handle>,
}

impl Entry {
    fn is_in_flight(&self, now: Duration) -> bool {
        self.handle.is_some() && self.visible_at > now
    }
}

fn too_many(call: &str, found: usize) -> StoreError {
    StoreError::Permanent(format!("a {call} of {found} entries, {ENTRIES_MAX} are allowed"))
}

impl MemoryTransport {
    /// An empty one; `seed` decides every accident.
    pub fn new(seed: u64, faults: TransportFaults, keeps_order: bool) -> Self {
        let duplicate = if keeps_order { 0.0 } else { faults.duplicate };
        let faults = TransportFaults { duplicate, ..faults };
        let state = State {
            rng: SmallRng::seed_from_u64(seed),
            queues: BTreeMap::new(),
            recent: BTreeMap::new(),
            denied: BTreeSet::new(),
            calls: BTreeMap::new(),
            sent: BTreeMap::new(),
            number: 0,
        };
        Self { state: Mutex::new(state), faults: Mutex::new(faults), keeps_order, begun: Instant::now() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no operation panics half-way")
    }

    fn faults(&self) -> TransportFaults {
        *self.faults.lock().expect("it is only copied")
    }

    /// Behaves from now on.
    pub fn heal(&self) {
        *self.faults.lock().expect("it is only copied") = TransportFaults::default();
        self.state().denied.clear();
    }

    /// Refuses a call to one queue, or allows it again.
    pub fn deny(&self, destination: &str, call: Call, denied: bool) {
        let key = (destination.to_owned(), call as usize);
        let mut state = self.state();
        if denied {
            state.denied.insert(key);
        } else {
            state.denied.remove(&key);
        }
    }

    /// Loses everything in a queue, as a purge does, a retention that is over, or a queue that is made anew.
    pub fn purge(&self, destination: &str) {
        self.state().queues.remove(destination);
    }

    /// How many entries a queue holds.
    pub fn len(&self, destination: &str) -> usize {
        self.state().queues.get(destination).map_or(0, BTreeMap::len)
    }

    /// How often a call was made to a queue, denied or not.
    pub fn calls(&self, destination: &str, call: Call) -> usize {
        self.state().calls.get(&(destination.to_owned(), call as usize)).copied().unwrap_or(0)
    }

    /// How often each hint was sent.
    pub fn sent(&self) -> BTreeMap<Hint, usize> {
        self.state().sent.clone()
    }

    fn begin(&self, destination: &str, call: Call) -> Result<MutexGuard<'_, State>, StoreError> {
        let mut state = self.state();
        let key = (destination.to_owned(), call as usize);
        *state.calls.entry(key.clone()).or_default() += 1;
        if state.denied.contains(&key) {
            return Err(StoreError::Permanent(format!("{call:?}: AccessDenied for queue {destination}")));
        }
        Ok(state)
    }

    /// The answer to a call that was made, but for the share that is lost.
    fn answer<T>(state: &mut State, answer: T, unanswered: f64) -> Result<T, StoreError> {
        if unanswered > 0.0 && state.rng.random_bool(unanswered) {
            return Err(StoreError::Unknown("the connection was closed".into()));
        }
        Ok(answer)
    }
}

impl State {
    fn chance(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.rng.random_bool(probability)
    }

    fn entry(&mut self, destination: &str, handle: &Handle) -> Option<&mut Entry> {
        let queue = self.queues.get_mut(destination)?;
        queue.values_mut().find(|entry| entry.handle.as_ref() == Some(handle))
    }

    fn take(
        &mut self,
        destination: &str,
        sent: Outgoing,
        visible_at: Duration,
        faults: TransportFaults,
    ) -> ItemOutcome {
        if self.chance(faults.refuse) {
            return ItemOutcome::Retryable("internal error".into());
        }
        *self.sent.entry(sent.hint).or_default() += 1;
        if self.chance(faults.lose) {
            return ItemOutcome::Ok;
        }
        for _ in 0..if self.chance(faults.duplicate) { 2 } else { 1 } {
            self.number += 1;
            let entry = Entry { hint: sent.hint, lane: sent.lane, visible_at, handle: None };
            self.queues.entry(destination.to_owned()).or_default().insert(self.number, entry);
        }
        ItemOutcome::Ok
    }
}

#[async_trait]
impl Transport for MemoryTransport {
    fn limits(&self) -> TransportLimits {
        let delay = if self.keeps_order { Duration::ZERO } else { DELAY_MAX };
        TransportLimits { entries: ENTRIES_MAX, delay, hidden: HIDDEN_MAX, keeps_order: self.keeps_order }
    }

    async fn send(
        &self,
        destination: &str,
        entries: &[Outgoing],
        delay: Duration,
    ) -> Result<Vec<ItemOutcome>, StoreError> {
        if entries.len() > ENTRIES_MAX {
            return Err(too_many("send", entries.len()));
        }
        if delay > self.limits().delay {
            return Err(StoreError::Permanent(format!("a delay of {delay:?} is too long")));
        }
        let now = self.begun.elapsed();
        let faults = self.faults();
        let mut state = self.begin(destination, Call::Send)?;
        let mut outcomes = Vec::with_capacity(entries.len());
        for sent in entries {
            let key = (destination.to_owned(), sent.hint, sent.sending);
            if self.keeps_order && state.recent.get(&key).is_some_and(|at| now < *at + DEDUPLICATION) {
                outcomes.push(ItemOutcome::Ok);
                continue;
            }
            let outcome = state.take(destination, *sent, now + delay, faults);
            if outcome == ItemOutcome::Ok {
                state.recent.insert(key, now);
            }
            outcomes.push(outcome);
        }
        Self::answer(&mut state, outcomes, faults.unanswered)
    }

    async fn receive(
        &self,
        destination: &str,
        max: usize,
        wait: Duration,
        hidden: Duration,
    ) -> Result<Vec<Received>, StoreError> {
        if max > ENTRIES_MAX {
            return Err(too_many("receive", max));
        }
        let until = Instant::now() + wait;
        loop {
            let received = self.receive_once(destination, max, hidden)?;
            if !received.is_empty() || Instant::now() >= until {
                return Ok(received);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn hide(
        &self,
        destination: &str,
        changes: &[(Handle, Duration)],
    ) -> Result<Vec<ItemOutcome>, StoreError> {
        if changes.len() > ENTRIES_MAX {
            return Err(too_many("change of visibility", changes.len()));
        }
        let now = self.begun.elapsed();
        let faults = self.faults();
        let mut state = self.begin(destination, Call::Hide)?;
        let mut outcomes = Vec::with_capacity(changes.len());
        for (handle, hidden) in changes {
            outcomes.push(match state.entry(destination, handle) {
                Some(_) if *hidden > HIDDEN_MAX => {
                    ItemOutcome::Permanent(format!("hidden for {hidden:?}, {HIDDEN_MAX:?} are allowed"))
                }
                Some(entry) => {
                    entry.visible_at = now + *hidden;
                    ItemOutcome::Ok
                }
                None => ItemOutcome::Permanent("the handle is out of date".into()),
            });
        }
        Self::answer(&mut state, outcomes, faults.unanswered)
    }

    async fn delete(&self, destination: &str, handles: &[Handle]) -> Result<Vec<ItemOutcome>, StoreError> {
        if handles.len() > ENTRIES_MAX {
            return Err(too_many("delete", handles.len()));
        }
        let faults = self.faults();
        let mut state = self.begin(destination, Call::Delete)?;
        if let Some(queue) = state.queues.get_mut(destination) {
            queue.retain(|_, entry| entry.handle.as_ref().is_none_or(|handle| !handles.contains(handle)));
        }
        let outcomes = handles.iter().map(|_| ItemOutcome::Ok).collect();
        Self::answer(&mut state, outcomes, faults.unanswered)
    }

    async fn depth(&self, destination: &str) -> Result<QueueDepth, StoreError> {
        let now = self.begun.elapsed();
        let faults = self.faults();
        let mut state = self.begin(destination, Call::Depth)?;
        let mut depth = QueueDepth::default();
        for entry in state.queues.get(destination).into_iter().flat_map(BTreeMap::values) {
            match entry.handle {
                _ if entry.visible_at <= now => depth.visible += 1,
                Some(_) => depth.in_flight += 1,
                None => depth.delayed += 1,
            }
        }
        Self::answer(&mut state, depth, faults.unknown_depth)
    }
}

impl MemoryTransport {
    fn receive_once(
        &self,
        destination: &str,
        max: usize,
        hidden: Duration,
    ) -> Result<Vec<Received>, StoreError> {
        let now = self.begun.elapsed();
        let faults = self.faults();
        let mut state = self.begin(destination, Call::Receive)?;
        let State { rng, queues, number, .. } = &mut *state;
        let queue = queues.entry(destination.to_owned()).or_default();
        let mut numbers: Vec<u64> =
            queue.iter().filter(|(_, entry)| entry.visible_at <= now).map(|(number, _)| *number).collect();
        if self.keeps_order {
            // None of a lane of which some are in flight.
            let in_flight = queue.values().filter(|entry| entry.is_in_flight(now));
            let lanes: BTreeSet<u32> = in_flight.map(|entry| entry.lane).collect();
            numbers.retain(|number| !lanes.contains(&queue[number].lane));
        } else if faults.reorder {
            numbers.shuffle(rng);
        }
        numbers.truncate(max);
        let in_flight: Vec<u64> =
            queue.iter().filter(|(_, entry)| entry.is_in_flight(now)).map(|(number, _)| *number).collect();
        if numbers.len() < max
            && !in_flight.is_empty()
            && faults.duplicate > 0.0
            && rng.random_bool(faults.duplicate)
        {
            numbers.push(in_flight[rng.random_range(0..in_flight.len())]);
        }
        let mut received = Vec::with_capacity(numbers.len());
        for entry in numbers {
            let entry = queue.get_mut(&entry).expect("it was found under the same guard");
            *number += 1;
            let handle = Handle(Arc::from(number.to_string()));
            entry.handle = Some(handle.clone());
            entry.visible_at = now + hidden;
            received.push(Received { hint: entry.hint, handle });
        }
        Self::answer(&mut state, received, faults.unanswered_receive)
    }
}
