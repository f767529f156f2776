//! An inbound queue in memory that delivers as a real one may: at least once, in any order, twice at a time,
//! and again whatever was not deleted before its visibility timeout.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::sync::Notify;

use crate::{
    model::time::{MonoMs, UnixMs},
    ports::{AckId, Clock, Intake, IntakeEntry, ItemOutcome, QueueDepth, StoreError},
};

/// What a receive brings at most, as with SQS.
const RECEIVE_MAX: usize = 10;

/// How often things go wrong: 0.0 never, 1.0 always.
#[derive(Clone, Copy, Debug, Default)]
pub struct IntakeFaults {
    /// An entry is delivered though it is in somebody's hands already.
    pub duplicate: f64,
    /// A deletion of one entry fails and nothing happened.
    pub delete_fails: f64,
    /// A deletion of one entry takes effect but is answered `Unknown`.
    pub delete_unknown: f64,
    /// A whole operation fails.
    pub unavailable: f64,
}

/// The queue.
pub struct MemoryIntake {
    clock: Arc<dyn Clock>,
    visibility: Duration,
    state: Mutex<State>,
    arrived: Notify,
}

struct State {
    faults: IntakeFaults,
    random: StdRng,
    entries: Vec<Queued>,
    /// Which entry each delivery is of.
    deliveries: HashMap<AckId, String>,
    calls: IntakeCalls,
}

struct Queued {
    id: String,
    sent_at: UnixMs,
    body: Bytes,
    receives: u32,
    /// The latest delivery: the only one that can be extended or released.
    ack: Option<AckId>,
    visible_at: MonoMs,
}

/// How many calls were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IntakeCalls {
    /// Of `receive`.
    pub receive: usize,
    /// Of `extend`.
    pub extend: usize,
    /// Of `delete`.
    pub delete: usize,
    /// Of `release`.
    pub release: usize,
}

impl MemoryIntake {
    /// An empty queue.
    pub fn new(clock: Arc<dyn Clock>, visibility: Duration, faults: IntakeFaults, seed: u64) -> Self {
        let state = State {
            faults,
            random: StdRng::seed_from_u64(seed),
            entries: Vec::new(),
            deliveries: HashMap::new(),
            calls: IntakeCalls::default(),
        };
        Self { clock, visibility, state: Mutex::new(state), arrived: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no operation panics half-way")
    }

    /// Sends an entry.
    pub fn put(&self, id: &str, body: impl Into<Bytes>) {
        self.put_at(id, body, self.clock.wall());
    }

    /// Sends one, or has sent it then.
    pub fn put_at(&self, id: &str, body: impl Into<Bytes>, sent_at: UnixMs) {
        self.state().entries.push(Queued {
            id: id.to_owned(),
            sent_at,
            body: body.into(),
            receives: 0,
            ack: None,
            visible_at: MonoMs(0),
        });
        self.arrived.notify_waiters();
    }

    /// How often things go wrong from now on.
    pub fn set_faults(&self, faults: IntakeFaults) {
        self.state().faults = faults;
    }

    /// How many entries were not deleted.
    pub fn len(&self) -> usize {
        self.state().entries.len()
    }

    /// Whether all of them were deleted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many calls were made.
    pub fn calls(&self) -> IntakeCalls {
        self.state().calls
    }

    /// Changes the entries whose latest delivery is `ack`, one outcome each.
    fn change(
        &self,
        acks: &[AckId],
        change: impl Fn(&mut Queued, MonoMs),
    ) -> Result<Vec<ItemOutcome>, StoreError> {
        let now = self.clock.mono();
        let mut state = self.state();
        state.may_fail()?;
        let outcomes = acks.iter().map(|ack| {
            let held = |entry: &&mut Queued| entry.ack.as_ref() == Some(ack) && entry.visible_at > now;
            match state.entries.iter_mut().find(held) {
                Some(entry) => {
                    change(entry, now);
                    ItemOutcome::Ok
                }
                None => ItemOutcome::Permanent("this delivery is not yours any more".into()),
            }
        });
        Ok(outcomes.collect())
    }
}

impl State {
    fn may_fail(&mut self) -> Result<(), StoreError> {
        let unavailable = self.faults.unavailable;
        if self.random.random_bool(unavailable) {
            return Err(StoreError::Retryable("the queue is away".into()));
        }
        Ok(())
    }

    fn receive(&mut self, limit: usize, now: MonoMs, until: MonoMs) -> Vec<IntakeEntry> {
        let mut order: Vec<usize> = (0..self.entries.len()).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, self.random.random_range(0..=at));
        }
        let mut received = Vec::new();
        for index in order {
            if received.len() == limit.min(RECEIVE_MAX) {
                break;
            }
            let is_visible = self.entries[index].visible_at <= now;
            let duplicate = self.faults.duplicate;
            if !is_visible && !self.random.random_bool(duplicate) {
                continue;
            }
            let entry = &mut self.entries[index];
            entry.receives += 1;
            let ack = AckId(format!("{}#{}", entry.id, entry.receives).into());
            entry.ack = Some(ack.clone());
            entry.visible_at = until;
            self.deliveries.insert(ack.clone(), entry.id.clone());
            received.push(IntakeEntry {
                id: entry.id.clone(),
                ack,
                body: entry.body.clone(),
                sent_at: entry.sent_at,
                receives: entry.receives,
            });
        }
        received
    }
}

#[async_trait]
impl Intake for MemoryIntake {
    async fn receive(&self, limit: usize, wait: Duration) -> Result<Vec<IntakeEntry>, StoreError> {
        self.state().calls.receive += 1;
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            let arrived = self.arrived.notified();
            {
                let mut state = self.state();
                state.may_fail()?;
                let now = self.clock.mono();
                let received = state.receive(limit, now, now.after(self.visibility));
                if !received.is_empty() {
                    return Ok(received);
                }
            }
            // Also looks for entries whose visibility timeout ran out.
            let look = deadline.min(tokio::time::Instant::now() + Duration::from_millis(50));
            let _ = tokio::time::timeout_at(look, arrived).await;
            if tokio::time::Instant::now() >= deadline {
                return Ok(Vec::new());
            }
        }
    }

    fn visibility(&self) -> Duration {
        self.visibility
    }

    async fn extend(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError> {
        self.state().calls.extend += 1;
        self.change(acks, |entry, now| entry.visible_at = now.after(self.visibility))
    }

    async fn delete(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError> {
        let mut state = self.state();
        state.calls.delete += 1;
        state.may_fail()?;
        let IntakeFaults { delete_fails, delete_unknown, .. } = state.faults;
        let mut outcomes = Vec::with_capacity(acks.len());
        for ack in acks {
            if state.random.random_bool(delete_fails) {
                outcomes.push(ItemOutcome::Retryable("this one failed".into()));
                continue;
            }
            // As SQS does, an earlier delivery's ack id still deletes.
            if let Some(id) = state.deliveries.get(ack).cloned() {
                state.entries.retain(|entry| entry.id != id);
            }
            let unknown = state.random.random_bool(delete_unknown);
            outcomes.push(if unknown { ItemOutcome::Unknown("no answer".into()) } else { ItemOutcome::Ok });
        }
        Ok(outcomes)
    }

    async fn release(&self, acks: &[AckId]) -> Result<Vec<ItemOutcome>, StoreError> {
        self.state().calls.release += 1;
        let outcomes = self.change(acks, |entry, now| entry.visible_at = now);
        self.arrived.notify_waiters();
        outcomes
    }

    async fn depth(&self) -> Result<QueueDepth, StoreError> {
        let now = self.clock.mono();
        let mut state = self.state();
        state.may_fail()?;
        let visible = state.entries.iter().filter(|entry| entry.visible_at <= now).count() as u64;
        Ok(QueueDepth { visible, in_flight: state.entries.len() as u64 - visible, delayed: 0 })
    }
}
