//! The stores of batches and their records that the configuration chooses.

use std::{path::Path, sync::Arc, time::Duration};

use postrider_actors::{
    coordinator::SharedQueue,
    model::{ledger::Evidence, time::UnixMs},
    ports::{
        Archive, Claims, Clock, DestinationDepth, Ledger, Outbox, Queue, QueueDepth, ReceiptLedger, Steering,
        StoreError,
    },
    throttle::RateShares,
};
#[cfg(feature = "aws")]
use postrider_actors::{flow::Bell, ports::Transport};

use super::{error::StartError, recorded::Recorded};
use crate::{
    config::{LedgerKind, Profile, Resolved},
    telemetry::{self, Metered, metrics::Metrics},
};
use postrider_sqlite::{Backlog, EmbeddedStore, exit_on_fatal};

/// Time between two reads of a backlog that is counted across the network.
const SHARED_LOOK: Duration = Duration::from_secs(15);

/// The stores of one process. They stay open as long as it lives.
#[derive(Clone)]
pub(super) struct Stores {
    pub(super) outbox: Arc<dyn Outbox>,
    pub(super) queue: Arc<dyn Queue>,
    pub(super) ledger: Arc<dyn Ledger>,
    pub(super) steering: Arc<dyn Steering>,
    pub(super) archive: Arc<dyn Archive>,
    /// Where a row of each message is kept, if the configuration asks for it.
    pub(super) rows: Option<Arc<dyn ReceiptLedger>>,
    /// What several machines share; `None` where the embedded store has everything.
    pub(super) carried: Option<Carried>,
    embedded: Option<Arc<EmbeddedStore>>,
}

/// A store that several machines share, and the queue between them.
#[derive(Clone)]
pub(super) struct Carried {
    /// What is due, and who has what.
    pub(super) claims: Arc<dyn Claims>,
    /// The queue, which a coordinator keeps going.
    pub(super) queue: Arc<SharedQueue>,
    /// How rates are shared with the other processes.
    pub(super) shares: RateShares,
}

/// What there is to do, as each profile counts it.
#[derive(Clone, Debug, Default)]
pub(super) struct ToDo {
    /// Batches, in the embedded store.
    pub(super) batches: Option<Backlog>,
    /// Messages of each destination, in a store that several machines share (B21).
    pub(super) messages: Vec<DestinationDepth>,
    /// Entries of each destination's queue, as they were counted last: a diagnostic.
    pub(super) entries: Vec<(Arc<str>, QueueDepth)>,
    /// When the batch that is due for longest became due, or the next will.
    pub(super) oldest_due: Option<UnixMs>,
}

impl Stores {
    /// Opens what the configuration names. `state_dir` is locked by this process.
    pub(super) async fn open(
        resolved: &Resolved,
        state_dir: &Path,
        evidence: &Evidence,
        clock: &Arc<dyn Clock>,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, StartError> {
        let config = &resolved.config;
        #[cfg(feature = "aws")]
        if let Some(stores) = super::remote::open_stores(config, state_dir, evidence, clock, metrics).await? {
            return stores.recording(resolved, metrics).await;
        }
        #[cfg(not(feature = "aws"))]
        let _ = clock; // leases of the embedded store go by its callers' time
        debug_assert!(config.profile == Profile::Embedded, "the other profile was opened, or refused");
        let store = open_embedded(state_dir, evidence)?;
        Self::embedded(&store, metrics).recording(resolved, metrics).await
    }

    /// The same with a row of each message, if the configuration asks for it.
    async fn recording(self, resolved: &Resolved, metrics: &Arc<Metrics>) -> Result<Self, StartError> {
        let config = &resolved.config;
        let rows: Arc<dyn ReceiptLedger> = match (config.ledger.kind, &self.embedded) {
            #[cfg(feature = "postgres")]
            (LedgerKind::Postgres, _) => {
                let ledger = Arc::new(super::postgres::open_ledger(resolved, metrics).await?);
                Arc::new(Metered::new(ledger, metrics))
            }
            #[cfg(not(feature = "postgres"))]
            (LedgerKind::Postgres, _) => return Ok(self), // the configuration was refused
            (LedgerKind::Embedded, Some(store)) => {
                store.keep_changes(config.receipts.events_to.is_some());
                Arc::new(Metered::new(store.clone(), metrics))
            }
            // The configuration was refused if it names receipts too.
            (LedgerKind::Embedded, None) => return Ok(self),
        };
        let ledger = Arc::new(Recorded::new(rows.clone(), self.ledger.clone()));
        Ok(Self { ledger, rows: Some(rows), ..self })
    }

    /// Everything in one store.
    fn embedded(store: &Arc<EmbeddedStore>, metrics: &Metrics) -> Self {
        Self {
            outbox: Arc::new(Metered::new(store.clone(), metrics)),
            queue: Arc::new(Metered::new(store.clone(), metrics)),
            ledger: Arc::new(Metered::new(store.clone(), metrics)),
            steering: Arc::new(Metered::new(store.clone(), metrics)),
            archive: store.clone(),
            rows: None,
            carried: None,
            embedded: Some(store.clone()),
        }
    }

    /// A store that several machines share, and what carries hints between them.
    #[cfg(feature = "aws")]
    pub(super) fn shared<S>(
        store: &Arc<S>,
        transport: Arc<dyn Transport>,
        shares: RateShares,
        clock: &Arc<dyn Clock>,
        metrics: &Metrics,
    ) -> Self
    where
        S: Outbox + Ledger + Steering + Archive + Claims + 'static,
    {
        let claims: Arc<dyn Claims> = Arc::new(Metered::new(store.clone(), metrics));
        let transport = Arc::new(Metered::new(transport, metrics));
        let process = shares.process.clone();
        let queue =
            Arc::new(SharedQueue::new(transport, claims.clone(), clock.clone(), process, Bell::default()));
        Self {
            outbox: Arc::new(Metered::new(store.clone(), metrics)),
            queue: Arc::new(Metered::new(queue.clone(), metrics)),
            ledger: Arc::new(Metered::new(store.clone(), metrics)),
            steering: Arc::new(Metered::new(store.clone(), metrics)),
            archive: store.clone(),
            rows: None,
            carried: Some(Carried { claims, queue, shares }),
            embedded: None,
        }
    }

    /// Whether several machines share them.
    pub(super) fn is_shared(&self) -> bool {
        self.carried.is_some()
    }

    /// How long to wait between two reads of them for metrics and status: what lies across the network
    /// costs a call each.
    pub(super) fn look_pause(&self) -> Duration {
        if self.carried.is_some() { SHARED_LOOK } else { Duration::ZERO }
    }

    /// What there is to do at `now`.
    pub(super) async fn to_do(&self, now: UnixMs) -> Result<ToDo, StoreError> {
        let Some(Carried { claims, queue, .. }) = &self.carried else {
            let store = self.embedded.as_ref().expect("stores are the embedded one, or carried");
            let batches = store.backlog(now).await?;
            let oldest_due = batches.oldest_due;
            return Ok(ToDo { batches: Some(batches), oldest_due, ..ToDo::default() });
        };
        let (messages, oldest_due) = tokio::join!(claims.depths(now), claims.next_due());
        Ok(ToDo { batches: None, messages: messages?, entries: queue.depths(), oldest_due: oldest_due? })
    }

    /// Finishes what runs in the background: acknowledgements that wait for others.
    pub(super) async fn close(&self) {
        if let Some(Carried { queue, .. }) = &self.carried {
            queue.close().await;
        }
    }
}

/// Opens the embedded store and says what an earlier run left.
fn open_embedded(state_dir: &Path, evidence: &Evidence) -> Result<Arc<EmbeddedStore>, StartError> {
    let store = EmbeddedStore::open_after(state_dir, evidence, exit_on_fatal(telemetry::flush))?;
    match (store.losses(), evidence.len()) {
        (0, _) => {}
        (batches, Some(messages)) => tracing::warn!(
            batches,
            messages,
            "an earlier run died with messages in flight; they are sent again in half a minute, the others now"
        ),
        (batches, None) => tracing::warn!(
            batches,
            "an earlier run left batches behind, and nothing says what was in flight: their unrecorded messages are \
             sent one at a time"
        ),
    }
    Ok(Arc::new(store))
}
