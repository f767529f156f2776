//! What every implementation of the store ports must do, the fake too. Each suite takes a factory and
//! asks it for an empty store per case; it panics with the case's name on the first that fails.

mod archive;
mod claims;
mod entries;
mod histories;
mod ledger;
mod outbox;
mod queue;
mod rates;
mod receipts;
mod tables;

use std::{any::Any, future::Future, pin::Pin, sync::Arc, time::Duration};

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

use super::{Carrier, CarrierFaults, CarrierQueue, FakeClock, fixtures, memory_store::MemoryStore};
use crate::{
    model::{
        file::{DestinationCounts, FileRecord},
        ids::FileId,
        outcome::Verdict,
        time::{MonoMs, UnixMs},
    },
    ports::{
        Claims, ItemOutcome, Lease, LeaseRequest, Ledger, Outbox, OutboxArchive, OutboxEntry,
        OutstandingQuery, Queue, Release, Settled, Settlement,
    },
};

/// Sends every dead message again, as an operator would; returns how many.
pub type Redrive = Box<dyn Fn(UnixMs) -> Pin<Box<dyn Future<Output = usize>>>>;

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
///
/// A queue that only carries (`stores_batches`) need not lease in order, may be of another opinion than the
/// outbox for a while about what is dispatched, and is told when a batch is done; all else holds for it too.
pub struct Subject {
    /// The outbox.
    pub outbox: Arc<dyn Outbox>,
    /// The queue it dispatches to.
    pub queue: Arc<dyn Queue>,
    /// The ledger of both.
    pub ledger: Arc<dyn Ledger>,
    /// The claims on its batches.
    pub claims: Arc<dyn Claims>,
    /// The outbox as a whole.
    pub archive: Arc<dyn OutboxArchive>,
    /// The clock that the queue goes by, if it goes by one. The suites set its wall.
    pub clock: Option<Arc<FakeClock>>,
    /// How long the queue may take.
    pub patience: Patience,
    /// The operator's redrive.
    pub redrive: Redrive,
    /// The operator's way to enable a destination.
    pub enable: Enable,
    /// What must live as long: a directory, a server.
    pub guard: Box<dyn Any>,
}

impl Subject {
    /// The fake.
    pub fn in_memory() -> Self {
        Self::of(Arc::new(MemoryStore::new()))
    }

    fn of(store: Arc<MemoryStore>) -> Self {
        let (redriven, enabled) = (store.clone(), store.clone());
        Self {
            outbox: store.clone(),
            queue: store.clone(),
            ledger: store.clone(),
            claims: store.clone(),
            archive: store,
            clock: None,
            patience: Patience::default(),
            redrive: Box::new(move |now| {
                let store = redriven.clone();
                Box::pin(async move { store.redrive(now) })
            }),
            enable: Box::new(move |name| enabled.enable_destination(name)),
            guard: Box::new(()),
        }
    }

    /// The same store with a queue that only carries, doubles and reorders; `seed` decides how.
    #[must_use]
    pub fn carried(self, seed: u64) -> Self {
        let faults = CarrierFaults {
            duplicate: 0.2,
            reorder: true,
            refuse: 0.1,
            unanswered: 0.1,
            // What is hidden so comes when time passes, which it does not in most cases.
            unanswered_receive: 0.0,
        };
        let clock = Arc::new(FakeClock::at(NOW));
        let carrier = Arc::new(Carrier::new(seed, faults));
        let queue = CarrierQueue::new(carrier, self.claims.clone(), clock.clone(), "node-1", Duration::ZERO);
        Self { queue: Arc::new(queue), clock: Some(clock), ..self }
    }

    fn set_time(&self, now: UnixMs) {
        if let Some(clock) = &self.clock {
            clock.set_wall(now);
        }
    }

    /// What is outstanding and due at `now`, with what the queue needs of it.
    async fn outstanding(&self, now: UnixMs, limit: usize) -> Vec<OutboxEntry> {
        let with_batches = self.queue.stores_batches();
        let query = OutstandingQuery { due_by: now, limit, with_batches, except: &[] };
        self.outbox.outstanding(query).await.unwrap()
    }

    /// Sends until the queue has accepted everything, as the dispatcher does.
    async fn send(&self, entries: &[OutboxEntry]) {
        let mut left = entries.to_vec();
        for _ in 0..1_000 {
            let outcomes = self.queue.send(&left).await.unwrap();
            let ids: Vec<_> = left.iter().map(|entry| entry.id).collect();
            assert_eq!(
                ids,
                outcomes.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
                "one answer per id in order"
            );
            for (_, outcome) in &outcomes {
                assert!(!matches!(outcome, ItemOutcome::Permanent(_)), "{outcome:?}");
            }
            let mut outcomes = outcomes.into_iter();
            left.retain(|_| outcomes.next().is_some_and(|(_, outcome)| outcome != ItemOutcome::Ok));
            if left.is_empty() {
                return;
            }
        }
        panic!("the queue does not accept {} batches", left.len());
    }

    /// Dispatches what is due at `now`; how many batches.
    async fn dispatch(&self, now: UnixMs) -> usize {
        self.set_time(now);
        let entries = self.outstanding(now, 1_000).await;
        self.send(&entries).await;
        let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        self.outbox.mark_dispatched(&ids).await.unwrap();
        ids.len()
    }

    async fn lease(&self, holder: &str, destination: &str, limit: usize) -> Vec<Lease> {
        self.lease_until(holder, destination, limit, MonoMs(1_000)).await
    }

    async fn lease_until(&self, holder: &str, destination: &str, limit: usize, until: MonoMs) -> Vec<Lease> {
        let wants = vec![(destination.into(), limit)];
        self.lease_all(LeaseRequest { holder: holder.into(), wants, until }).await
    }

    /// Asks until there is what is wanted, or patience has ended.
    async fn lease_all(&self, mut request: LeaseRequest) -> Vec<Lease> {
        let started = tokio::time::Instant::now();
        let mut leases = Vec::new();
        loop {
            let some = self.queue.lease(request.clone()).await.unwrap();
            for lease in &some {
                let mut wants = request.wants.iter_mut();
                let want = wants
                    .find(|(destination, want)| **destination == *lease.header.destination && *want > 0)
                    .expect("never more than asked for");
                want.1 -= 1;
            }
            leases.extend(some);
            if request.wants.iter().all(|(_, want)| *want == 0) || started.elapsed() >= self.patience.arrival
            {
                return leases;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Stores rows 1 to `rows` of one file for `d` and leases them.
    async fn one_lease(&self, rows: u64) -> (Arc<FileRecord>, Lease) {
        let file = fixtures::file("feed", 1, &["d"]);
        self.outbox.append(fixtures::step(&file, 1..=rows, NOW)).await.unwrap();
        self.dispatch(NOW).await;
        let mut leases = self.lease("first", "d", 1).await;
        (file, leases.pop().expect("a dispatched batch can be leased"))
    }

    async fn settle(&self, lease: &Lease, verdicts: &[(u32, Verdict)]) -> Settled {
        self.settle_with(lease, verdicts, &[]).await
    }

    /// Settles, with a retry batch that carries on the messages at `retried`.
    async fn settle_with(&self, lease: &Lease, verdicts: &[(u32, Verdict)], retried: &[usize]) -> Settled {
        let retries = if retried.is_empty() {
            Vec::new()
        } else {
            vec![fixtures::retry(lease, retried, fixtures::failed(NOW), LATER)]
        };
        let settlement =
            Settlement { token: lease.token, verdicts: verdicts.to_vec(), retries, records: Vec::new() };
        let settled = self.ledger.settle(vec![settlement]).await.unwrap()[0];
        self.tell_queue(lease, settled).await;
        settled
    }

    /// What a worker tells its queue after a settlement.
    async fn tell_queue(&self, lease: &Lease, settled: Settled) {
        match settled {
            Settled::Open => {}
            Settled::Complete => self.queue.acknowledge(&[lease.token]).await.unwrap(),
            Settled::Stale => self.queue.release(&[lease.token], Release::Unused).await.unwrap(),
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

const NOW: UnixMs = UnixMs(1_700_000_000_000);
const LATER: UnixMs = UnixMs(NOW.0 + 60_000);

fn sent() -> Verdict {
    Verdict::Sent { at: NOW, status: 200 }
}

fn dead() -> Verdict {
    Verdict::Dead { attempt: fixtures::failed(NOW), cause: crate::model::outcome::DeathCause::Attempts }
}

fn retry() -> Verdict {
    Verdict::Retry { attempt: fixtures::failed(NOW), not_before: LATER }
}
