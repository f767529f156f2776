//! What every implementation of the store ports must do, the fake too. Each suite takes a factory and
//! asks it for an empty store per case; it panics with the case's name on the first that fails.

mod archive;
mod claims;
mod entries;
mod histories;
mod ledger;
mod order;
mod outbox;
mod queue;
mod rates;
mod receipts;
mod tables;
mod transport;

use std::{any::Any, collections::BTreeMap, future::Future, pin::Pin, sync::Arc, time::Duration};

pub use archive::archive;
pub use claims::claims;
pub use entries::entries;
pub use histories::history;
pub use ledger::ledger;
pub use outbox::outbox;
pub use queue::queue;
pub use rates::rates;
pub use receipts::{ReceiptSubject, receipt_history, receipts};
pub use tables::{TableSubject, columns, tables};
pub use transport::transport;

use postrider_settings::{Delay, Keys as _};

use super::{FakeClock, MemoryTransport, TransportFaults, fixtures, memory_store::MemoryStore};
use crate::{
    coordinator::{CarrySetup, SharedQueue},
    flow::{Bell, ProgressBoard},
    metrics::StageMetrics,
    model::{
        batch::Rendering,
        file::{DestinationCounts, FileRecord},
        ids::FileId,
        ledger::MessageVerdict,
        outcome::{DeathCause, Verdict},
        time::{MonoMs, UnixMs},
    },
    ports::{
        Archive, Claims, DueBatch, DueQuery, Lease, LeaseRequest, LeaseToken, Ledger, Outbox, OutboxPages,
        Queue, Release, Settled, Settlement, Steering, Transport, Want,
    },
};

/// Sends every dead message again, as an operator would; returns how many.
pub type Redrive = Box<dyn Fn(UnixMs) -> Pin<Box<dyn Future<Output = usize>>>>;

/// Gives every dead message that was never sent a body by this template, in plain text, and sends it again, as an operator
/// would; returns how many.
pub type Rerender = Box<dyn Fn(&'static str, UnixMs) -> Pin<Box<dyn Future<Output = usize>>>>;

/// What [`Rerender`] takes for destination `d`.
pub fn rendering(template: &str) -> BTreeMap<String, Rendering> {
    let rendering = Rendering { template: Some(template.to_owned()), content_type: "text/plain".to_owned() };
    BTreeMap::from([("d".to_owned(), rendering)])
}

/// Enables a destination, as an operator would.
pub type Enable = Box<dyn Fn(&str)>;

/// How long a queue may take to hand out what it was sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Patience {
    /// Asked again for so long before what does not come counts as missing; and so long nothing may come
    /// where nothing is due. Zero for a queue that answers at once.
    pub arrival: Duration,
}

/// An empty store under test: ports that belong together.
pub struct Subject {
    /// The outbox.
    pub outbox: Arc<dyn Outbox>,
    /// The queue that brings its batches to workers.
    pub queue: Arc<dyn Queue>,
    /// The ledger of both.
    pub ledger: Arc<dyn Ledger>,
    /// Which files are held.
    pub steering: Arc<dyn Steering>,
    /// Archiving.
    pub archive: Arc<dyn Archive>,
    /// What is between store and queue, if these are two.
    pub carried: Option<Carried>,
    /// The clock that the queue goes by, if it goes by one. The suites set its wall.
    pub clock: Option<Arc<FakeClock>>,
    /// How long the queue may take.
    pub patience: Patience,
    /// The operator's redrive.
    pub redrive: Redrive,
    /// The operator's redrive with new bodies.
    pub rerender: Rerender,
    /// The operator's way to enable a destination.
    pub enable: Enable,
    /// What must live as long: a directory, a server.
    pub guard: Box<dyn Any>,
}

/// What is between a store and the queue that several processes share. Such a queue need not lease in order, and is told
/// when a lease has ended; all else holds for it too.
pub struct Carried {
    /// The claims on the store's batches.
    pub claims: Arc<dyn Claims>,
    /// The outbox as a whole.
    pub pages: Arc<dyn OutboxPages>,
    /// What keeps the queue going: the suites do it step by step.
    pub carry: CarrySetup,
}

/// The queue of one process, `node-1`, for destinations `d` and `e`, over a transport and a store's claims; what keeps it
/// going, and the clock that both go by.
pub fn shared_queue(
    transport: Arc<dyn Transport>,
    claims: Arc<dyn Claims>,
    ledger: Arc<dyn Ledger>,
) -> (CarrySetup, Arc<FakeClock>) {
    let clock = Arc::new(FakeClock::at(NOW));
    let queue = SharedQueue::new(transport, claims, clock.clone(), PROCESS.into(), Bell::default());
    let carry = CarrySetup {
        queue: Arc::new(queue),
        ledger,
        destinations: vec!["d".into(), "e".into()],
        paused: Vec::new(),
        delay: Delay::declared(),
        metrics: StageMetrics::default().queue(),
        progress: ProgressBoard::default().mark("coordinator"),
    };
    (carry, clock)
}

/// The same over a transport in memory that doubles and reorders; `seed` decides how.
pub fn shared_queue_in_memory(
    claims: Arc<dyn Claims>,
    ledger: Arc<dyn Ledger>,
    seed: u64,
) -> (CarrySetup, Arc<FakeClock>) {
    let faults = TransportFaults { duplicate: 0.2, reorder: true, ..TransportFaults::default() };
    // Every fourth keeps order, which excludes disorder.
    let transport = MemoryTransport::new(seed, faults, seed % 4 == 3);
    shared_queue(Arc::new(transport), claims, ledger)
}

/// Who asks, in all suites.
const PROCESS: &str = "node-1";

impl Subject {
    /// The fake.
    pub fn in_memory() -> Self {
        Self::of(&Arc::new(MemoryStore::new()))
    }

    /// The fake with a queue that several processes could share, see [`shared_queue_in_memory`].
    pub fn in_memory_carried(seed: u64) -> Self {
        let store = Arc::new(MemoryStore::new());
        let (carry, clock) = shared_queue_in_memory(store.clone(), store.clone(), seed);
        let queue = carry.queue.clone();
        let carried = Carried { claims: store.clone(), pages: store.clone(), carry };
        Self { queue, carried: Some(carried), clock: Some(clock), ..Self::of(&store) }
    }

    fn of(store: &Arc<MemoryStore>) -> Self {
        let (redriven, rerendered, enabled) = (store.clone(), store.clone(), store.clone());
        Self {
            outbox: store.clone(),
            queue: store.clone(),
            ledger: store.clone(),
            steering: store.clone(),
            archive: store.clone(),
            carried: None,
            clock: None,
            patience: Patience::default(),
            redrive: Box::new(move |now| {
                let store = redriven.clone();
                Box::pin(async move { store.redrive(now) })
            }),
            rerender: Box::new(move |template, now| {
                let store = rerendered.clone();
                Box::pin(async move { store.rerender(&rendering(template), now) })
            }),
            enable: Box::new(move |name| enabled.enable_destination(name)),
            guard: Box::new(()),
        }
    }

    fn set_time(&self, now: UnixMs) {
        if let Some(clock) = &self.clock {
            clock.set_wall(now);
        }
    }

    /// Sends hints of what is due at `now`, as the coordinator does. There is nothing to do where workers lease from the
    /// store itself.
    async fn dispatch(&self, now: UnixMs) {
        self.set_time(now);
        if let Some(carried) = &self.carried {
            carried.carry.turn().await.unwrap();
        }
    }

    /// Leases up to `batches` batches at [`NOW`].
    async fn lease(&self, holder: &str, destination: &str, batches: usize) -> Vec<Lease> {
        self.lease_at(holder, destination, batches, NOW).await
    }

    async fn lease_at(&self, holder: &str, destination: &str, batches: usize, now: UnixMs) -> Vec<Lease> {
        self.lease_until(holder, destination, batches, MonoMs(1_000), now).await
    }

    async fn lease_until(
        &self,
        holder: &str,
        destination: &str,
        batches: usize,
        until: MonoMs,
        now: UnixMs,
    ) -> Vec<Lease> {
        let wants = vec![want(destination, usize::MAX, batches)];
        self.lease_all(LeaseRequest { holder: holder.into(), wants, until, now, born: UnixMs(0) }).await
    }

    /// Asks until there is what is wanted, or patience has ended.
    async fn lease_all(&self, mut request: LeaseRequest) -> Vec<Lease> {
        self.set_time(request.now);
        let started = tokio::time::Instant::now();
        let mut leases = Vec::new();
        let mut empty_turns = 0;
        loop {
            let some = self.queue.lease(request.clone()).await.unwrap();
            for lease in &some {
                let mut wants = request.wants.iter_mut();
                let want = wants
                    .find(|want| *want.destination == *lease.header.destination && want.batches > 0)
                    .expect("never more than asked for");
                let due = lease.due_count(request.now);
                assert!(due > 0 || lease.losses > 0, "nothing of it is due: {lease:?}");
                want.batches -= 1;
                want.messages = want.messages.saturating_sub(due);
            }
            empty_turns = if some.is_empty() { empty_turns + 1 } else { 0 };
            leases.extend(some);
            let is_enough = |want: &Want| want.batches == 0 || want.messages == 0;
            let is_over = empty_turns >= EMPTY_TURNS && started.elapsed() >= self.patience.arrival;
            let Some(carried) = self.carried.as_ref().filter(|_| !is_over) else { return leases };
            if request.wants.iter().all(is_enough) {
                return leases;
            }
            carried.carry.turn().await.unwrap();
            if !self.patience.arrival.is_zero() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// Stores rows 1 to `rows` of one file for `d` and leases them.
    async fn one_lease(&self, rows: u64) -> (Arc<FileRecord>, Lease) {
        let file = fixtures::file("feed", 1, &["d"]);
        self.outbox.append(fixtures::step(&file, 1..=rows, NOW)).await.unwrap();
        self.dispatch(NOW).await;
        let mut leases = self.lease("first", "d", 1).await;
        (file, leases.pop().expect("what was stored can be leased"))
    }

    /// The one batch that is due for `d` at `now`, for `holder`.
    async fn again(&self, holder: &str, now: UnixMs) -> Lease {
        self.dispatch(now).await;
        let mut leases = self.lease_at(holder, "d", 9, now).await;
        assert_eq!(leases.len(), 1);
        leases.pop().expect("there is one")
    }

    /// Nothing is due for `d` at `now`.
    async fn assert_idle(&self, now: UnixMs) {
        self.dispatch(now).await;
        assert_eq!(self.lease_at("nobody", "d", 9, now).await, []);
    }

    /// Settles next attempts of messages of `lease`; the worker continues.
    async fn settle(&self, lease: &Lease, verdicts: &[(u32, Verdict)]) -> Settled {
        self.settle_as(told(lease, verdicts)).await
    }

    /// The same, and the lease ends with it.
    async fn settle_and_end(&self, lease: &Lease, verdicts: &[(u32, Verdict)]) -> Settled {
        self.settle_as(Settlement { ends: true, ..told(lease, verdicts) }).await
    }

    async fn settle_as(&self, settlement: Settlement) -> Settled {
        let token = settlement.token;
        let settled = self.ledger.settle(vec![settlement]).await.unwrap()[0];
        self.tell_queue(token, settled).await;
        settled
    }

    /// What a worker does at its queue after a settlement.
    async fn tell_queue(&self, token: LeaseToken, settled: Settled) {
        match settled {
            Settled::Open => {}
            Settled::Released | Settled::Complete => self.queue.acknowledge(&[token]).await.unwrap(),
            Settled::Stale => self.queue.release(&[token], Release::Unused).await.unwrap(),
        }
    }

    async fn counts(&self, file: FileId) -> DestinationCounts {
        self.ledger.report(file).await.unwrap().expect("the file is known").destinations["d"]
    }

    /// `(accepted, sent, dead, retrying)`.
    async fn tally(&self, file: FileId) -> (u64, u64, u64, u64) {
        let counts = self.counts(file).await;
        (counts.accepted, counts.sent, counts.dead, counts.retrying)
    }
}

impl Carried {
    /// Up to `limit` batches of each destination that are due at `now`.
    async fn due(&self, now: UnixMs, limit: usize) -> Vec<DueBatch> {
        let wants = [("d".into(), limit), ("e".into(), limit)];
        let query = DueQuery { process: PROCESS, due_by: now, wants: &wants, confirm: &[] };
        self.claims.due(query).await.unwrap()
    }
}

/// Turns in a row that bring nothing, after which nothing is taken to come: one sends, the next receives, and what was
/// doubled may come in between.
const EMPTY_TURNS: u32 = 4;

const NOW: UnixMs = UnixMs(1_700_000_000_000);
const LATER: UnixMs = UnixMs(NOW.0 + 60_000);

fn want(destination: &str, messages: usize, batches: usize) -> Want {
    Want::new(destination, messages, batches)
}

/// A worker's word on the next attempts of messages that it was given with `lease`.
fn told(lease: &Lease, verdicts: &[(u32, Verdict)]) -> Settlement {
    let next = |(index, verdict): &(u32, Verdict)| {
        let open = lease.open.iter().find(|open| open.index == *index);
        open.expect("the worker was given the message").verdict(*verdict)
    };
    settlement(lease.token, verdicts.iter().map(next).collect())
}

fn settlement(token: LeaseToken, verdicts: Vec<MessageVerdict>) -> Settlement {
    Settlement { token, verdicts, details: BTreeMap::new(), records: Vec::new(), ends: false, begins: None }
}

/// A verdict on attempt `attempt` of the first drive of the message at `index`.
fn nth(index: u32, attempt: u32, verdict: Verdict) -> MessageVerdict {
    MessageVerdict { index, drive: 0, attempt, verdict }
}

/// The open messages of a lease, and the attempts that were made of each.
fn tries(lease: &Lease) -> Vec<(u32, u32)> {
    lease.open.iter().map(|open| (open.index, open.tries)).collect()
}

fn sent() -> Verdict {
    Verdict::Sent { at: NOW, status: 200 }
}

fn dead() -> Verdict {
    Verdict::Dead { attempt: fixtures::failed(NOW), cause: DeathCause::Attempts }
}

fn retry() -> Verdict {
    retry_at(LATER)
}

fn retry_at(not_before: UnixMs) -> Verdict {
    Verdict::Retry { attempt: fixtures::failed(NOW), not_before }
}
