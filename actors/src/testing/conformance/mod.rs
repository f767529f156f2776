//! What every implementation of the store ports must do, the fake too. Each suite takes a factory and
//! asks it for an empty store per case; it panics with the case's name on the first that fails.

mod histories;
mod ledger;
mod outbox;
mod queue;
mod rates;

use std::{any::Any, future::Future, pin::Pin, sync::Arc};

pub use histories::history;
pub use ledger::ledger;
pub use outbox::outbox;
pub use queue::queue;
pub use rates::rates;

use super::{fixtures, memory_store::MemoryStore};
use crate::{
    model::{
        file::{DestinationCounts, FileRecord},
        ids::FileId,
        outcome::Verdict,
        time::{MonoMs, UnixMs},
    },
    ports::{Lease, LeaseRequest, Ledger, Outbox, OutstandingQuery, Queue, Settled, Settlement},
};

/// Sends every dead message again, as an operator would; returns how many.
pub type Redrive = Box<dyn Fn(UnixMs) -> Pin<Box<dyn Future<Output = usize>>>>;

/// Enables a destination, as an operator would.
pub type Enable = Box<dyn Fn(&str)>;

/// An empty store under test: three ports that belong together.
pub struct Subject {
    /// The outbox.
    pub outbox: Arc<dyn Outbox>,
    /// The queue it dispatches to.
    pub queue: Arc<dyn Queue>,
    /// The ledger of both.
    pub ledger: Arc<dyn Ledger>,
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
        let store = Arc::new(MemoryStore::new());
        let (redriven, enabled) = (store.clone(), store.clone());
        Self {
            outbox: store.clone(),
            queue: store.clone(),
            ledger: store,
            redrive: Box::new(move |now| {
                let store = redriven.clone();
                Box::pin(async move { store.redrive(now) })
            }),
            enable: Box::new(move |name| enabled.enable_destination(name)),
            guard: Box::new(()),
        }
    }

    /// Dispatches what is due at `now`; how many batches.
    async fn dispatch(&self, now: UnixMs) -> usize {
        let entries = self
            .outbox
            .outstanding(OutstandingQuery {
                due_by: now,
                limit: 1_000,
                with_batches: self.queue.stores_batches(),
                except: &[],
            })
            .await
            .unwrap();
        self.queue.send(&entries).await.unwrap();
        let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        self.outbox.mark_dispatched(&ids).await.unwrap();
        ids.len()
    }

    async fn lease(&self, holder: &str, destination: &str, limit: usize) -> Vec<Lease> {
        self.lease_until(holder, destination, limit, MonoMs(1_000)).await
    }

    async fn lease_until(&self, holder: &str, destination: &str, limit: usize, until: MonoMs) -> Vec<Lease> {
        let request = LeaseRequest { holder: holder.into(), wants: vec![(destination.into(), limit)], until };
        self.queue.lease(request).await.unwrap()
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
        let settlement = Settlement { token: lease.token, verdicts: verdicts.to_vec(), retries };
        self.ledger.settle(vec![settlement]).await.unwrap()[0]
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
