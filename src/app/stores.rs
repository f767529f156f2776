//! Where batches and what became of them are kept, by the configuration's choice.

use std::{path::Path, sync::Arc, time::Duration};

use postrider_actors::{
    ports::{Clock, Ledger, Outbox, OutboxArchive, Queue, ReceiptLedger, StoreError},
    throttle::RateShares,
};

use super::{StartError, recorded::Recorded};
use crate::{
    adapters::embedded::{Backlog, EmbeddedStore, exit_on_fatal},
    config::{LedgerKind, OutboxKind, QueueKind, Resolved},
    telemetry::{Metered, metrics::Metrics},
};

/// Between two looks at a backlog that is counted across the network.
const SHARED_LOOK: Duration = Duration::from_secs(15);

/// The stores of one process. They stay open as long as it lives.
#[derive(Clone)]
pub(super) struct Stores {
    pub(super) outbox: Arc<dyn Outbox>,
    pub(super) queue: Arc<dyn Queue>,
    pub(super) ledger: Arc<dyn Ledger>,
    pub(super) archive: Arc<dyn OutboxArchive>,
    /// Where a row of each message is kept, if the configuration asks for it.
    pub(super) rows: Option<Arc<dyn ReceiptLedger>>,
    /// How rates are shared with other processes, if the stores are.
    pub(super) shares: Option<RateShares>,
    /// The embedded store, if the outbox is in it …
    own: Option<Arc<EmbeddedStore>>,
    /// … and if everything is.
    embedded: Option<Arc<EmbeddedStore>>,
    #[cfg(feature = "aws")]
    sqs: Option<Arc<crate::adapters::sqs::SqsQueue>>,
}

impl Stores {
    /// Opens what the configuration names. `state_dir` is locked by this process.
    pub(super) async fn open(
        resolved: &Resolved,
        state_dir: &Path,
        clock: &Arc<dyn Clock>,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, StartError> {
        let config = &resolved.config;
        #[cfg(feature = "aws")]
        if super::aws::is_needed(config) {
            let stores = super::remote::open_stores(config, state_dir, clock, metrics).await?;
            return stores.recording(resolved, metrics).await;
        }
        let _ = clock;
        debug_assert!(config.outbox.kind == OutboxKind::Embedded && config.queue.kind == QueueKind::Embedded);
        let store = open_embedded(state_dir)?;
        Self::embedded(&store, metrics).recording(resolved, metrics).await
    }

    /// The same with a row of each message, if the configuration asks for it.
    async fn recording(self, resolved: &Resolved, metrics: &Metrics) -> Result<Self, StartError> {
        let config = &resolved.config;
        let rows: Arc<dyn ReceiptLedger> = match (&config.ledger.kind, &self.own) {
            #[cfg(feature = "postgres")]
            (LedgerKind::Postgres(_), _) => {
                let ledger = Arc::new(super::postgres::open_ledger(resolved).await?);
                Arc::new(Metered::new(ledger, metrics))
            }
            #[cfg(not(feature = "postgres"))]
            (LedgerKind::Postgres(_), _) => return Ok(self), // the configuration was refused
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
    pub(super) fn embedded(store: &Arc<EmbeddedStore>, metrics: &Metrics) -> Self {
        let stores = Self::metered(store, store, store, store.clone(), metrics).with_own(store);
        Self { embedded: Some(store.clone()), ..stores }
    }

    /// The same with an outbox that is in the embedded store.
    pub(super) fn with_own(self, store: &Arc<EmbeddedStore>) -> Self {
        Self { own: Some(store.clone()), ..self }
    }

    /// The stores as the stages see them: counted.
    pub(super) fn metered<O, Q, L>(
        outbox: &Arc<O>,
        queue: &Arc<Q>,
        ledger: &Arc<L>,
        archive: Arc<dyn OutboxArchive>,
        metrics: &Metrics,
    ) -> Self
    where
        O: Outbox + 'static,
        Q: Queue + 'static,
        L: Ledger + 'static,
    {
        Self {
            outbox: Arc::new(Metered::new(outbox.clone(), metrics)),
            queue: Arc::new(Metered::new(queue.clone(), metrics)),
            ledger: Arc::new(Metered::new(ledger.clone(), metrics)),
            archive,
            rows: None,
            shares: None,
            own: None,
            embedded: None,
            #[cfg(feature = "aws")]
            sqs: None,
        }
    }

    /// The same with the queue that has to be closed.
    #[cfg(feature = "aws")]
    pub(super) fn with_sqs(self, queue: Arc<crate::adapters::sqs::SqsQueue>) -> Self {
        Self { sqs: Some(queue), ..self }
    }

    /// The same with rates that are shared.
    #[cfg(feature = "aws")]
    pub(super) fn with_shares(self, shares: RateShares) -> Self {
        Self { shares: Some(shares), ..self }
    }

    /// How long to leave between two looks at them for metrics and status: what lies across the network
    /// costs a call each.
    pub(super) fn look_pause(&self) -> Duration {
        if self.embedded.is_some() { Duration::ZERO } else { SHARED_LOOK }
    }

    /// How many batches are not settled.
    pub(super) async fn backlog(&self) -> Result<Backlog, StoreError> {
        if let Some(store) = &self.embedded {
            return store.backlog().await;
        }
        let (outstanding, depth, due) =
            tokio::join!(self.archive.count_outstanding(), self.queue.queue_depth(), self.outbox.next_due());
        let depth = depth?;
        Ok(Backlog {
            outstanding: outstanding?,
            queued: depth.visible + depth.delayed,
            leased: depth.in_flight,
            oldest_due: due?,
        })
    }

    /// Finishes what runs in the background: acknowledgements that wait for others.
    pub(super) async fn close(&self) {
        #[cfg(feature = "aws")]
        if let Some(queue) = &self.sqs {
            queue.close().await;
        }
    }
}

/// Opens the embedded store and says what an earlier run left.
pub(super) fn open_embedded(state_dir: &Path) -> Result<Arc<EmbeddedStore>, StartError> {
    let store = EmbeddedStore::open(state_dir, exit_on_fatal())?;
    if store.losses() > 0 {
        tracing::warn!(
            batches = store.losses(),
            "an earlier run left batches in flight: their unrecorded messages are sent one at a time"
        );
    }
    Ok(Arc::new(store))
}
