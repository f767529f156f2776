//! `TableDelivery`: a worker that pulls leased batches and writes them into warehouse tables, many rows per
//! statement (S4.1).
//!
//! Three loops run in the actor: one leases batches and gives them back, one extends leases, and one puts
//! batches together until they are worth a statement (S4.2): by rows, by bytes, or by a timer that waits for
//! neither of the others. Each group is written by a task on the shared runtime: it makes rows, passes the
//! warehouse's gates before every statement, halves what is refused until the bad row is alone (S4.4), and
//! settles its batches after the commit (S4.3).
//!
//! Every row has a key, so writing it again changes nothing (S4.6): a lost lease, a lost answer or a second
//! worker do no harm.

mod group;
mod shelf;
#[cfg(all(test, feature = "testing"))]
mod tests;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use actix::prelude::*;
use postrider_settings::{Group, Retry};
use rand::RngExt as _;
use tokio::sync::RwLock;

use self::shelf::Shelf;
use crate::{
    flow::{Bell, DeliveryStrategy, Gate, Holds, Places, Worker, WorkerSetup, unused},
    metrics::{DestinationMetrics, WorkerGauges},
    model::{
        batch::OpenRows,
        hold::HeldFile,
        lease::{Lease, LeaseToken, OpenMessage},
        ledger::is_exclusive,
        retry::longest_wait,
        suspect::Pace,
        table::Mapping,
        time::UnixMs,
    },
    ports::{InFlight, Release, StoreError, Table, Want},
    supervision::{ChildId, Drain, Fault, Stage},
};

/// How often at least to check whether a group is ready.
const TICK: Duration = Duration::from_millis(500);

/// What every statement to a warehouse waits for, whichever worker makes it (S4.1).
#[derive(Clone, Debug)]
pub struct StatementGates {
    /// One place per statement in flight; shared by all workers and tables of the warehouse.
    pub in_flight: Places,
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
    pub group: Group,
    /// Groups that this worker writes at the same time.
    pub concurrency: usize,
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
pub struct TableDeliverySetup {
    /// Where messages go.
    pub destinations: Vec<TableDestination>,
    /// What it has in common with every worker.
    pub worker: WorkerSetup,
    /// Where what is in flight is noted for the process' next life.
    pub in_flight: Arc<dyn InFlight>,
    /// Held to be read by every statement; to be written by one that nothing else may be in flight with (B17).
    pub alone: Arc<RwLock<()>>,
}

/// The actor.
pub struct TableDelivery {
    strategy: Arc<TableStrategy>,
    /// The holder of this worker's leases in its last life.
    predecessor: Option<String>,
    fault: Fault,
}

impl Stage for TableDelivery {
    const NAME: &'static str = "table_delivery";

    type Setup = TableDeliverySetup;

    fn new(setup: TableDeliverySetup, id: &ChildId, fault: Fault) -> Self {
        let (holder, predecessor) = (id.to_string(), id.predecessor().map(|last| last.to_string()));
        let state = TableState {
            shelves: setup
                .destinations
                .iter()
                .map(|destination| Shelf::new(destination.group.clone()))
                .collect(),
            held: HashMap::new(),
            held_files: Vec::new(),
            gauges: setup.destinations.iter().map(|d| d.metrics.worker(d.concurrency)).collect(),
            failure: None,
        };
        let worker = Worker::new(setup.worker.clone(), &holder);
        let holds = Holds::new(setup.destinations.len());
        let strategy =
            TableStrategy { worker, setup, state: Mutex::new(state), holds, moved: Bell::default() };
        Self { strategy: Arc::new(strategy), predecessor, fault }
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
        let (lease, predecessor) = (self.strategy.clone(), self.predecessor.take());
        let leasing = async move { lease.worker.lease(&lease, predecessor).await };
        context.spawn(leasing.into_actor(self).map(fail));
        let extend = self.strategy.clone();
        let extending = async move { extend.worker.extend(&extend).await };
        context.spawn(extending.into_actor(self).map(fail));
        let group = self.strategy.clone();
        context.spawn(async move { group.group_loop().await }.into_actor(self));
    }
}

impl Handler<Drain> for TableDelivery {
    type Result = ();

    fn handle(&mut self, _: Drain, _: &mut Self::Context) {
        self.strategy.close();
    }
}

impl Drop for TableDelivery {
    /// However the worker ended, its groups make no further statement.
    fn drop(&mut self) {
        self.strategy.close();
    }
}

/// A leased batch, ready to be written.
struct TableBatch {
    lease: Lease,
    rows: OpenRows,
    /// Why it can't be written, if it can't.
    mapping: Result<Arc<Mapping>, String>,
    /// One draw per lease: the retries of a batch come back together.
    jitter: f64,
    pace: Pace,
    /// Its messages that are due, in row order.
    open: Vec<OpenMessage>,
}

impl TableBatch {
    fn of(lease: Lease, now: UnixMs) -> Self {
        let open: Vec<_> = lease.open.iter().filter(|message| message.not_before <= now).copied().collect();
        let indexes: Vec<_> = open.iter().map(|message| message.index).collect();
        let mapping = Mapping::of(&lease.header).map_err(|error| error.to_string());
        let (rows, mapping) = match OpenRows::of(lease.payload.clone(), lease.count as usize, &indexes) {
            Ok(rows) => (rows, mapping),
            Err(why) => (OpenRows::none(), Err(why)),
        };
        let pace = Pace::of(lease.losses);
        Self { lease, rows, mapping, jitter: rand::rng().random(), pace, open }
    }

    /// Whether a message of it may only be written while nothing else of the process is in flight.
    fn is_exclusive(&self, message: OpenMessage) -> bool {
        self.lease.charged.get(&message.index).is_some_and(|&(deaths, _)| is_exclusive(deaths))
    }

    /// Whether it may be written together with others: not if it may be what killed its worker twice.
    fn goes_alone(&self) -> bool {
        self.mapping.is_err() || self.pace == Pace::AloneMarked || !self.lease.charged.is_empty()
    }
}

struct TableState {
    /// One per destination.
    shelves: Vec<Shelf<Arc<TableBatch>>>,
    /// Every held lease, groups that are being written included, and the index of its destination.
    held: HashMap<LeaseToken, usize>,
    /// Files of which nothing more is begun.
    held_files: Vec<HeldFile>,
    /// One per destination.
    gauges: Vec<WorkerGauges>,
    /// Why a group could not continue.
    failure: Option<StoreError>,
}

impl TableState {
    fn gauge(&mut self) {
        let mut held = vec![0; self.shelves.len()];
        for destination in self.held.values() {
            held[*destination] += 1;
        }
        for ((gauges, shelf), held) in self.gauges.iter_mut().zip(&self.shelves).zip(held) {
            gauges.set(shelf.writing(), held);
        }
    }

    /// Forgets a lease, wherever its batch is; whether it was held.
    fn forget(&mut self, token: LeaseToken) -> bool {
        let Some(destination) = self.held.remove(&token) else { return false };
        self.shelves[destination].remove(|batch| batch.lease.token == token);
        true
    }
}

/// What the worker's loops and group tasks share.
struct TableStrategy {
    worker: Worker,
    setup: TableDeliverySetup,
    state: Mutex<TableState>,
    /// The destinations that are disabled.
    holds: Holds,
    /// Rung when a group may be ready: a batch came, or a group was written.
    moved: Bell,
}

impl DeliveryStrategy for Arc<TableStrategy> {
    fn hold(&self, disabled: &[Arc<str>], files: &[HeldFile]) {
        self.state().held_files = files.to_vec();
        for (index, destination) in self.setup.destinations.iter().enumerate() {
            self.holds.set(index, disabled.contains(&destination.name));
        }
    }

    async fn turn(&self) -> Result<(), StoreError> {
        failpoint!("panic.table_delivery");
        if let Some(failure) = self.state().failure.take() {
            return Err(failure);
        }
        self.state().gauge();
        // Only what waits: a group that is being written is released by its task.
        let now = self.worker.clock().wall();
        let waiting: Vec<_> = {
            let mut state = self.state();
            let TableState { shelves, held_files, .. } = &mut *state;
            let ends = |index| self.worker.is_closing() || self.holds.is_held(index);
            let waits = |batch: &Arc<TableBatch>| {
                let header = &batch.lease.header;
                header.terms.is_closed(now)
                    || held_files.iter().any(|held| held.covers(header, batch.rows.first_row()))
            };
            let cleared = shelves
                .iter_mut()
                .enumerate()
                .flat_map(|(index, shelf)| if ends(index) { shelf.clear() } else { shelf.remove(waits) });
            cleared.map(|batch| (batch.lease.token, unused(&batch.lease.header.terms, now))).collect()
        };
        self.give_back(&waiting).await
    }

    fn wants(&self) -> Vec<Want> {
        let state = self.state();
        let now = self.worker.clock().mono();
        let want = |(index, (destination, shelf)): (usize, (&TableDestination, &Shelf<_>))| {
            let open = !destination.paused && !self.holds.is_held(index) && destination.concurrency > 0;
            let batches = if open { shelf.room(now, destination.concurrency) } else { 0 };
            // What a group needs is counted in batches: a shelf knows how many rows they usually have.
            (batches > 0).then(|| Want {
                longest_wait: longest_wait(&destination.retry),
                ..Want::new(destination.name.clone(), usize::MAX, batches)
            })
        };
        self.setup.destinations.iter().zip(&state.shelves).enumerate().filter_map(want).collect()
    }

    fn take(&self, lease: Lease) {
        let name = &lease.header.destination;
        let Some(destination) = self.setup.destinations.iter().position(|d| *d.name == **name) else {
            return; // never leased: only own destinations are asked for
        };
        let token = lease.token;
        let at = self.worker.clock().wall();
        if lease.is_first() {
            let wait = at.since(lease.accepted_at);
            self.setup.destinations[destination].metrics.leased(wait);
        }
        let batch = TableBatch::of(lease, at);
        if let Err(why) = &batch.mapping {
            tracing::error!(batch = %token.batch, why, "the batch can't be written; its messages are dead");
        }
        let (rows, bytes, alone) = (batch.open.len(), batch.lease.payload.len(), batch.goes_alone());
        let kind = batch.lease.header.clone();
        let mut state = self.state();
        // Leased again after a loss that this worker has not noticed yet: the old lease is over.
        state.shelves[destination].remove(|waiting| waiting.lease.token.batch == token.batch);
        state.held.insert(token, destination);
        let now = self.worker.clock().mono();
        state.shelves[destination].put(now, Arc::new(batch), rows, bytes, alone, |other| {
            other.lease.header.template == kind.template
        });
    }

    fn begin(&self) {
        self.moved.ring();
    }

    fn sleep(&self) -> Duration {
        Duration::MAX
    }

    fn tokens(&self) -> Vec<LeaseToken> {
        self.state().held.keys().copied().collect()
    }

    /// A group that has it continues: its rows are harmless.
    fn forget(&self, token: LeaseToken) -> bool {
        self.state().forget(token)
    }

    fn is_empty(&self) -> bool {
        self.state().held.is_empty()
    }
}

impl TableStrategy {
    fn state(&self) -> MutexGuard<'_, TableState> {
        // Changed by infallible steps only; a group's panic is caught outside the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.state().gauges.iter_mut().for_each(WorkerGauges::close);
        self.moved.ring();
        self.worker.close();
    }

    /// Starts writing every group that is full or has waited long enough.
    async fn group_loop(self: &Arc<Self>) {
        loop {
            let (mut wait, mut has_cut) = (TICK, false);
            if !self.worker.is_closing() {
                let mut state = self.state();
                let now = self.worker.clock().mono();
                for (index, destination) in self.setup.destinations.iter().enumerate() {
                    while let Some(group) = state.shelves[index].cut(now, destination.concurrency) {
                        has_cut = true;
                        tokio::spawn(self.clone().write_group(index, group));
                    }
                    if let Some(due) = state.shelves[index].due(destination.concurrency) {
                        wait = wait.min(due.since(now).max(Duration::from_millis(1)));
                    }
                }
            }
            if has_cut {
                self.worker.wake(); // there is room on the shelf
            }
            self.moved.wait(wait).await;
        }
    }

    /// Ends leases whose batches no group works on any more.
    async fn give_back(&self, leases: &[(LeaseToken, Release)]) -> Result<(), StoreError> {
        self.worker.give_back(leases).await?;
        let mut state = self.state();
        for (token, _) in leases {
            state.forget(*token);
        }
        Ok(())
    }
}
