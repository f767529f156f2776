//! A message service in memory that behaves as SQS does: it carries entries, and promises little. It delivers
//! at least once, in no order, to whoever asks, and remembers nobody.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::SmallRng, seq::SliceRandom};

use crate::{
    model::{batch::NewBatch, time::MonoMs},
    ports::{ItemOutcome, QueueDepth, StoreError},
};

/// Entries in one call: `SendMessageBatch`, `ReceiveMessage` and the others in Amazon's API reference.
pub(super) const CALL_ENTRIES_MAX: usize = 10;

/// Bytes in one call and in one entry (SQS quotas, since August 2025).
pub(super) const CALL_BYTES_MAX: usize = 1_048_576;

/// The longest `DelaySeconds`.
pub(super) const DELAY_MAX: Duration = Duration::from_mins(15);

/// The longest visibility timeout.
pub(super) const VISIBILITY_MAX: Duration = Duration::from_hours(12);

/// What an entry weighs beside its rows.
const ENVELOPE_BYTES: usize = 512;

/// What a carrier does that its users would rather it did not. Probabilities per entry or call.
#[derive(Clone, Copy, Debug, Default)]
pub struct CarrierFaults {
    /// An entry that is sent is there twice; one that is in flight is delivered once more.
    pub duplicate: f64,
    /// Entries come in any order.
    pub reorder: bool,
    /// One entry of a call is refused, the others are accepted.
    pub refuse: f64,
    /// A call other than a receive happens and is not answered.
    pub unanswered: f64,
    /// A receive is not answered: what it would have brought is hidden for the whole time.
    pub unanswered_receive: f64,
}

/// The service.
pub struct Carrier {
    state: Mutex<State>,
    faults: CarrierFaults,
}

/// Rung when there is something to receive.
type Ring = Arc<dyn Fn() + Send + Sync>;

struct State {
    rng: SmallRng,
    entries: BTreeMap<u64, Entry>,
    last_number: u64,
    last_receipt: u64,
    rings: BTreeMap<Arc<str>, Ring>,
}

struct Entry {
    batch: NewBatch,
    visible_at: MonoMs,
    /// What its latest receiver names it by; `None` until it was received.
    receipt: Option<Receipt>,
}

/// Names one delivery of an entry. It is void once the entry was delivered again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Receipt {
    /// Which entry.
    pub entry: u64,
    delivery: u64,
}

/// An entry that was received.
pub struct Delivery {
    /// What to name it by.
    pub receipt: Receipt,
    /// What it carries.
    pub batch: NewBatch,
}

fn too_many(operation: &str, found: usize) -> StoreError {
    StoreError::Permanent(format!("{operation} of {found} entries, {CALL_ENTRIES_MAX} are allowed"))
}

/// The bytes that a batch takes in a call.
pub(super) fn entry_bytes(batch: &NewBatch) -> usize {
    batch.payload.len() + ENVELOPE_BYTES
}

impl Carrier {
    /// An empty one; `seed` decides every accident.
    pub fn new(seed: u64, faults: CarrierFaults) -> Self {
        let rng = SmallRng::seed_from_u64(seed);
        let (entries, rings) = (BTreeMap::new(), BTreeMap::new());
        Self { state: Mutex::new(State { rng, entries, last_number: 0, last_receipt: 0, rings }), faults }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no operation panics half-way")
    }

    /// Calls `ring` when entries arrive; one per process.
    pub(super) fn on_arrival(&self, process: &Arc<str>, ring: Ring) {
        self.state().rings.insert(process.clone(), ring);
    }

    /// The answer to a call that was made, but for the share that is lost.
    fn answer<T>(&self, answer: T, unanswered: f64) -> Result<T, StoreError> {
        if unanswered > 0.0 && self.state().rng.random_bool(unanswered) {
            return Err(StoreError::Unknown("the connection was closed".into()));
        }
        Ok(answer)
    }

    /// Takes up to [`CALL_ENTRIES_MAX`] entries, each with its delay; one outcome per entry in order.
    pub fn send(
        &self,
        entries: &[(NewBatch, Duration)],
        now: MonoMs,
    ) -> Result<Vec<ItemOutcome>, StoreError> {
        if entries.len() > CALL_ENTRIES_MAX {
            return Err(too_many("a send", entries.len()));
        }
        let bytes: usize = entries.iter().map(|(batch, _)| entry_bytes(batch)).sum();
        if bytes > CALL_BYTES_MAX {
            return Err(StoreError::Permanent(format!(
                "a send of {bytes} bytes, {CALL_BYTES_MAX} are allowed"
            )));
        }
        let (outcomes, rings) = {
            let mut state = self.state();
            let take = |(batch, delay): &(NewBatch, Duration)| state.take(batch, *delay, now, self.faults);
            let outcomes = entries.iter().map(take).collect();
            (outcomes, state.rings.values().cloned().collect::<Vec<_>>())
        };
        for ring in rings {
            ring();
        }
        self.answer(outcomes, self.faults.unanswered)
    }

    /// Up to `limit` visible entries, which are hidden for `visibility`.
    pub fn receive(
        &self,
        limit: usize,
        visibility: Duration,
        now: MonoMs,
    ) -> Result<Vec<Delivery>, StoreError> {
        if limit > CALL_ENTRIES_MAX {
            return Err(too_many("a receive", limit));
        }
        let mut state = self.state();
        let mut numbers: Vec<u64> = Vec::new();
        for (&number, entry) in &state.entries {
            if entry.visible_at <= now {
                numbers.push(number);
            }
        }
        if self.faults.reorder {
            numbers.shuffle(&mut state.rng);
        }
        numbers.truncate(limit);
        if numbers.len() < limit
            && self.faults.duplicate > 0.0
            && state.rng.random_bool(self.faults.duplicate)
        {
            let in_flight = state.entries.iter().filter(|(_, entry)| entry.is_in_flight(now));
            let in_flight: Vec<u64> = in_flight.map(|(&number, _)| number).collect();
            if !in_flight.is_empty() {
                numbers.push(in_flight[state.rng.random_range(0..in_flight.len())]);
            }
        }
        let deliveries = numbers.into_iter().map(|number| state.deliver(number, visibility, now)).collect();
        drop(state);
        self.answer(deliveries, self.faults.unanswered_receive)
    }

    /// Hides entries for a time that begins now, one outcome per receipt in order.
    pub fn change_visibility(
        &self,
        changes: &[(Receipt, Duration)],
        now: MonoMs,
    ) -> Result<Vec<ItemOutcome>, StoreError> {
        if changes.len() > CALL_ENTRIES_MAX {
            return Err(too_many("a change of visibility", changes.len()));
        }
        let mut state = self.state();
        let mut outcomes = Vec::with_capacity(changes.len());
        for (receipt, visibility) in changes {
            outcomes.push(match state.entry(*receipt) {
                Some(_) if *visibility > VISIBILITY_MAX => ItemOutcome::Permanent(format!(
                    "hidden for {visibility:?}, {VISIBILITY_MAX:?} are allowed"
                )),
                Some(entry) => {
                    entry.visible_at = now.after(*visibility);
                    ItemOutcome::Ok
                }
                None => ItemOutcome::Permanent("the receipt is void".into()),
            });
        }
        drop(state);
        self.answer(outcomes, self.faults.unanswered)
    }

    /// Forgets entries. A void receipt changes nothing.
    pub fn delete(&self, receipts: &[Receipt]) -> Result<(), StoreError> {
        if receipts.len() > CALL_ENTRIES_MAX {
            return Err(too_many("a delete", receipts.len()));
        }
        let mut state = self.state();
        for receipt in receipts {
            if state.entry(*receipt).is_some() {
                state.entries.remove(&receipt.entry);
            }
        }
        drop(state);
        self.answer((), self.faults.unanswered)
    }

    /// What it holds.
    pub fn depth(&self, now: MonoMs) -> QueueDepth {
        let mut depth = QueueDepth::default();
        for entry in self.state().entries.values() {
            match entry.receipt {
                _ if entry.visible_at <= now => depth.visible += 1,
                Some(_) => depth.in_flight += 1,
                None => depth.delayed += 1,
            }
        }
        depth
    }
}

impl Entry {
    fn is_in_flight(&self, now: MonoMs) -> bool {
        self.receipt.is_some() && self.visible_at > now
    }
}

impl State {
    fn take(&mut self, batch: &NewBatch, delay: Duration, now: MonoMs, faults: CarrierFaults) -> ItemOutcome {
        if delay > DELAY_MAX {
            return ItemOutcome::Permanent(format!("a delay of {delay:?}, {DELAY_MAX:?} are allowed"));
        }
        if faults.refuse > 0.0 && self.rng.random_bool(faults.refuse) {
            return ItemOutcome::Retryable("internal error".into());
        }
        let copies = if faults.duplicate > 0.0 && self.rng.random_bool(faults.duplicate) { 2 } else { 1 };
        for _ in 0..copies {
            self.last_number += 1;
            let entry = Entry { batch: batch.clone(), visible_at: now.after(delay), receipt: None };
            self.entries.insert(self.last_number, entry);
        }
        ItemOutcome::Ok
    }

    fn deliver(&mut self, number: u64, visibility: Duration, now: MonoMs) -> Delivery {
        self.last_receipt += 1;
        let receipt = Receipt { entry: number, delivery: self.last_receipt };
        let entry = self.entries.get_mut(&number).expect("it was found under the same guard");
        entry.receipt = Some(receipt);
        entry.visible_at = now.after(visibility);
        Delivery { receipt, batch: entry.batch.clone() }
    }

    fn entry(&mut self, receipt: Receipt) -> Option<&mut Entry> {
        self.entries.get_mut(&receipt.entry).filter(|entry| entry.receipt == Some(receipt))
    }
}
