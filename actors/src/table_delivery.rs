//! `TableDelivery`: a worker that pulls leased batches and writes them into warehouse tables, many rows per
//! statement (S4.1).
//!
//! Three loops run in the actor: one leases batches and gives them back, one extends leases, and one puts
//! batches together until they are worth a statement (S4.2): by rows, by bytes, or by a timer that waits for
//! neither of the others. What is put together is written by a *lane*, a task on the shared runtime: it makes
//! rows, passes the warehouse's gates before every statement, halves what is refused until the bad row stands
//! alone (S4.4), and settles its batches after the commit (S4.3).
//!
//! Every row has a key, so writing it again changes nothing (S4.6): a lost lease, a lost answer or a second
//! worker do no harm.

mod lane;
mod shelf;
#[cfg(all(test, feature = "testing"))]
mod tests;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use actix::prelude::*;
use bytes::Bytes;
use rand::RngExt as _;
use tokio::sync::{Semaphore, watch};

pub use self::shelf::GroupLimits;
use self::shelf::Shelf;
use crate::{
    flow::{Bell, Gate, Progress, insist, tell_pace},
    metrics::{DestinationMetrics, WorkerGauges},
    model::{
        batch::{PAYLOAD_VERSION, Rows},
        lease::{Lease, LeaseToken},
        retry::RetrySchedule,
        suspect::Pace,
        table::Mapping,
        throughput::Telling,
    },
    ports::{Clock, ItemOutcome, LeaseRequest, Ledger, Queue, Release, StoreError, Table},
    supervision::{Drain, Fault},
};

/// Only control messages come in: batches are pulled.
pub const MAILBOX: usize = 4;

/// The longest a worker sleeps before it looks into the queue again.
const TICK: Duration = Duration::from_millis(500);

/// What every statement to a warehouse waits for, whoever makes it (S4.1).
#[derive(Clone, Debug)]
pub struct StatementGates {
    /// One permit per statement in flight; shared by all workers and tables of the warehouse.
    pub in_flight: Arc<Semaphore>,
    /// Statements per second, fed by a throttle, if they are limited.
    pub rate: Option<Gate>,
}

/// One worker's share of a table.
#[derive(Clone)]
pub struct TableDestination {
    /// Its name.
    pub name: Arc<str>,
    /// Where rows go.
    pub table: Arc<dyn Table>,
    /// What its statements wait for.
    pub gates: StatementGates,
    /// How batches are put together.
    pub group: GroupLimits,
    /// Groups that this worker writes at the same time.
    pub concurrency: usize,
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
pub struct TableDeliverySetup {
    /// Where messages go.
    pub destinations: Vec<TableDestination>,
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
    /// How long a lease holds unless extended.
    pub lease: Duration,
    /// Lost leases that condemn a message.
    pub lost_cap: u32,
    /// Sign of life.
    pub progress: Progress,
}

/// The actor.
pub struct TableDelivery {
    desk: Arc<Desk>,
    /// The holder of this worker's leases in its last life.
    predecessor: Option<String>,
    fault: Fault,
}

impl TableDelivery {
    /// A worker without batches. `holder` names this life of it, `predecessor` the one before.
    pub fn new(setup: TableDeliverySetup, holder: &str, predecessor: Option<String>, fault: Fault) -> Self {
        let state = DeskState {
            shelves: setup.destinations.iter().map(|destination| Shelf::new(destination.group)).collect(),
            held: HashMap::new(),
            gauges: setup.destinations.iter().map(|d| d.metrics.worker(d.concurrency)).collect(),
            telling: Telling::new(setup.clock.mono()),
            failure: None,
        };
        let desk = Desk {
            setup,
            holder: holder.into(),
            state: Mutex::new(state),
            moved: Bell::default(),
            closing: watch::Sender::new(false),
        };
        Self { desk: Arc::new(desk), predecessor, fault }
    }
}

impl Actor for TableDelivery {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        let fail = |result: Result<(), StoreError>, this: &mut Self, context: &mut Context<Self>| match result
        {
            Ok(()) => context.stop(), // drained
            Err(error) => this.fault.fail(context, error),
        };
        let (lease, predecessor) = (self.desk.clone(), self.predecessor.take());
        context.spawn(async move { lease.lease_loop(predecessor).await }.into_actor(self).map(fail));
        let extend = self.desk.clone();
        context.spawn(async move { extend.extend_loop().await }.into_actor(self).map(fail));
        let group = self.desk.clone();
        context.spawn(async move { group.group_loop().await }.into_actor(self));
    }
}

impl Handler<Drain> for TableDelivery {
    type Result = ();

    fn handle(&mut self, _: Drain, _: &mut Self::Context) {
        self.desk.close();
    }
}

impl Drop for TableDelivery {
    /// However the worker ended, its lanes make no further statement.
    fn drop(&mut self) {
        self.desk.close();
    }
}

/// A leased batch, ready to be written.
struct BatchInHand {
    lease: Lease,
    rows: Rows,
    /// Why it can't be written, if it can't.
    mapping: Result<Arc<Mapping>, String>,
    /// One draw per lease: the retries of a batch stay together.
    jitter: f64,
    pace: Pace,
    /// Its messages that are not settled yet.
    open: Vec<u32>,
}

impl BatchInHand {
    fn of(lease: Lease, lost_cap: u32) -> Self {
        let rows = Rows::decode(lease.payload.clone()).map_err(|error| error.to_string());
        let mapping = Mapping::of(&lease.header).map_err(|error| error.to_string());
        let (rows, mapping) = match rows {
            Ok(rows) if rows.len() == lease.states.0.len() => (rows, mapping),
            rows => {
                let why = rows.err().unwrap_or_else(|| "rows and states differ".to_owned());
                let nothing =
                    Rows::decode(Bytes::from_static(&[PAYLOAD_VERSION])).expect("an empty payload is valid");
                (nothing, Err(why))
            }
        };
        let open = lease.states.unsettled().map(|index| index as u32).collect();
        let pace = Pace::of(lease.losses, lost_cap);
        Self { lease, rows, mapping, jitter: rand::rng().random(), pace, open }
    }

    /// Whether it may be written together with others: not if it may be what killed its worker twice.
    fn goes_alone(&self) -> bool {
        self.mapping.is_err() || matches!(self.pace, Pace::AloneRecorded | Pace::Condemn)
    }
}

struct DeskState {
    /// One per destination.
    shelves: Vec<Shelf<Arc<BatchInHand>>>,
    /// Every lease in hand, those that lanes work on included, and the index of its destination.
    held: HashMap<LeaseToken, usize>,
    /// One per destination.
    gauges: Vec<WorkerGauges>,
    telling: Telling,
    /// What a lane could not go on with.
    failure: Option<StoreError>,
}

impl DeskState {
    fn gauge(&mut self) {
        let mut held = vec![0; self.shelves.len()];
        for destination in self.held.values() {
            held[*destination] += 1;
        }
        for ((gauges, shelf), held) in self.gauges.iter_mut().zip(&self.shelves).zip(held) {
            gauges.set(shelf.lanes(), held);
        }
    }

    /// Forgets a lease, wherever its batch is. A lane that has it goes on: its rows are harmless.
    fn forget(&mut self, token: LeaseToken) {
        if let Some(destination) = self.held.remove(&token) {
            self.shelves[destination].remove(|batch| batch.lease.token == token);
        }
    }
}

/// What the worker's loops and lanes share.
struct Desk {
    setup: TableDeliverySetup,
    holder: Arc<str>,
    state: Mutex<DeskState>,
    /// Rung when a group may be ready: a batch came, a lane ended.
    moved: Bell,
    closing: watch::Sender<bool>,
}

impl Desk {
    fn state(&self) -> MutexGuard<'_, DeskState> {
        // Changed by infallible steps only; a lane's panic is caught outside the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.closing.send_replace(true);
        self.moved.ring();
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
            failpoint!("panic.table_delivery");
            setup.progress.turn(setup.clock.mono());
            if let Some(failure) = self.state().failure.take() {
                return Err(failure);
            }
            self.state().gauge();
            if let Some(rates) = self.state().telling.due(setup.clock.mono()) {
                tell_pace(&self.holder, rates);
            }
            if self.is_closing() {
                self.give_back().await?;
                if self.state().held.is_empty() {
                    return Ok(());
                }
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
                if leased > 0 {
                    self.moved.ring();
                }
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
        let now = self.setup.clock.mono();
        let want = |(destination, shelf): (&TableDestination, &Shelf<_>)| {
            let open = !destination.paused && destination.concurrency > 0;
            let batches = if open { shelf.room(now, destination.concurrency) } else { 0 };
            (batches > 0).then(|| (destination.name.clone(), batches))
        };
        self.setup.destinations.iter().zip(&state.shelves).filter_map(want).collect()
    }

    fn take(&self, lease: Lease) {
        let name = &lease.header.destination;
        let Some(destination) = self.setup.destinations.iter().position(|d| *d.name == **name) else {
            return; // never leased: only own destinations are asked for
        };
        let token = lease.token;
        if (lease.drive, lease.attempt, lease.losses) == (0, 0, 0) {
            let wait = self.setup.clock.wall().since(lease.accepted_at);
            self.setup.destinations[destination].metrics.leased(wait);
        }
        let batch = BatchInHand::of(lease, self.setup.lost_cap);
        if let Err(why) = &batch.mapping {
            tracing::error!(batch = %token.batch, why, "the batch can't be written: its messages are dead");
        }
        let (rows, bytes, alone) = (batch.open.len(), batch.lease.payload.len(), batch.goes_alone());
        let kind = batch.lease.header.clone();
        let mut state = self.state();
        // Leased again after a loss that this worker has not noticed yet: the old lease is over.
        state.shelves[destination].remove(|waiting| waiting.lease.token.batch == token.batch);
        state.held.insert(token, destination);
        let now = self.setup.clock.mono();
        state.shelves[destination].put(now, Arc::new(batch), rows, bytes, alone, |other| {
            other.lease.header.template == kind.template
        });
    }

    /// Starts a lane for every group that is ready, at the latest when its time has come.
    async fn group_loop(self: &Arc<Self>) {
        loop {
            let (mut wait, mut has_cut) = (TICK, false);
            if !self.is_closing() {
                let mut state = self.state();
                let now = self.setup.clock.mono();
                for (index, destination) in self.setup.destinations.iter().enumerate() {
                    while let Some(group) = state.shelves[index].cut(now, destination.concurrency) {
                        has_cut = true;
                        tokio::spawn(self.clone().lane(index, group));
                    }
                    if let Some(due) = state.shelves[index].due(destination.concurrency) {
                        wait = wait.min(due.since(now).max(Duration::from_millis(1)));
                    }
                }
            }
            if has_cut {
                self.setup.queued.ring(); // there is room on the shelf
            }
            self.moved.wait(wait).await;
        }
    }

    /// Gives back what waits; what a lane has is given back by the lane.
    async fn give_back(&self) -> Result<(), StoreError> {
        let tokens: Vec<_> = {
            let mut state = self.state();
            state.shelves.iter_mut().flat_map(Shelf::clear).map(|batch| batch.lease.token).collect()
        };
        self.release(&tokens, Release::Unused).await
    }

    /// Ends leases whose batches no lane works on any more.
    async fn release(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        if !tokens.is_empty() {
            self.insist("giving leases back", || self.setup.queue.release(tokens, how)).await?;
            let mut state = self.state();
            for token in tokens {
                state.forget(*token);
            }
        }
        Ok(())
    }

    async fn extend_loop(&self) -> Result<(), StoreError> {
        loop {
            tokio::time::sleep(self.setup.lease / 3).await;
            let tokens: Vec<_> = self.state().held.keys().copied().collect();
            if tokens.is_empty() {
                continue;
            }
            let until = self.setup.clock.mono().after(self.setup.lease);
            let extend = || self.setup.queue.extend(&tokens, until);
            let outcomes = self.insist("extending leases", extend).await?;
            let mut state = self.state();
            for (token, (_, outcome)) in tokens.into_iter().zip(outcomes) {
                // One that a lane has settled meanwhile is not held any more, and no loss.
                if let ItemOutcome::Permanent(why) = outcome
                    && state.held.contains_key(&token)
                {
                    tracing::warn!(batch = %token.batch, why, "the lease is lost; its messages are left to its new holder");
                    state.forget(token);
                }
            }
        }
    }
}
