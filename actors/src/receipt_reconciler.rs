//! Receipt reconciler: one of a pool that applies the inbox's receipts to the messages they are about, in
//! batches. A single receipt never costs a statement of its own as long as others wait.

use std::{sync::Arc, time::Duration};

use actix::prelude::*;
use rand::RngExt as _;
use tokio::sync::watch;

use crate::{
    flow::{Bell, Progress, insist},
    metrics::ReconcilerMetrics,
    ports::{Applied, Clock, ReceiptLedger, StoreError},
    supervision::{ChildId, Drain, Fault, Stage},
};

/// The longest a reconciler waits for a ring; receipts also come by other processes, which ring no bell.
const TICK: Duration = Duration::from_millis(500);

/// How long the current batch may take when a drain begins. It is applied as a whole or not at all.
const LAST: Duration = Duration::from_secs(5);

/// The wait after a batch that the ledger refuses. It is drawn at random up to twice this: the others of the
/// pool meet the same batch.
const REFUSED_WAIT: Duration = Duration::from_secs(15);

/// What a reconciler works with.
#[derive(Clone)]
pub struct ReceiptReconcilerSetup {
    /// Where receipts wait and messages are.
    pub ledger: Arc<dyn ReceiptLedger>,
    /// The most receipts of a batch.
    pub receipts_max: usize,
    /// A batch ends with the receipt that brings it beyond so many bytes. A receipt takes less than 1 KiB.
    pub bytes_max: usize,
    /// How long receipts wait for others after a batch that was not full.
    pub linger: Duration,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Rung when receipts came: one bell for the pool.
    pub arrived: Bell,
    /// What is counted.
    pub metrics: ReconcilerMetrics,
    /// Sign of life.
    pub progress: Progress,
}

/// The actor. Nothing ends it but a drain or a panic.
pub struct ReceiptReconciler {
    setup: ReceiptReconcilerSetup,
    drain: watch::Sender<bool>,
}

impl Stage for ReceiptReconciler {
    const NAME: &'static str = "receipt_reconciler";

    type Setup = ReceiptReconcilerSetup;

    fn new(setup: ReceiptReconcilerSetup, _: &ChildId, _: Fault) -> Self {
        Self { setup, drain: watch::Sender::new(false) }
    }
}

impl Actor for ReceiptReconciler {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        let run = self.setup.clone().run(self.drain.subscribe());
        context.spawn(run.into_actor(self).map(|(), _, context| context.stop()));
    }
}

impl Handler<Drain> for ReceiptReconciler {
    type Result = ();

    fn handle(&mut self, _: Drain, _: &mut Self::Context) {
        self.drain.send_replace(true);
    }
}

impl ReceiptReconcilerSetup {
    /// Until it is drained; then the current batch is finished, if the ledger answers.
    async fn run(self, draining: watch::Receiver<bool>) {
        let mut signal = draining.clone();
        let drained = async {
            // An actor that is gone without a drain aborts its tasks.
            let _ = signal.wait_for(|draining| *draining).await;
        };
        tokio::pin!(drained);
        loop {
            failpoint!("panic.receipt_reconciler");
            if *draining.borrow() {
                return;
            }
            let mut apply = std::pin::pin!(self.apply());
            let applied = tokio::select! {
                applied = &mut apply => applied,
                () = &mut drained => {
                    let _ = tokio::time::timeout(LAST, apply).await; // a batch that is cut off waits on
                    return;
                }
            };
            let wait = async {
                match applied {
                    Ok(applied) if applied.total() * 2 >= self.receipts_max as u64 => {
                        // There is more, for another of the pool too.
                        self.arrived.ring();
                    }
                    Ok(applied) if applied.total() > 0 => {
                        tokio::time::sleep(self.linger).await;
                    }
                    Ok(_) => self.arrived.wait(TICK).await,
                    Err(error) => {
                        tracing::error!(%error, "the ledger refused to apply receipts; they stay in the inbox and are retried");
                        let wait = REFUSED_WAIT.mul_f64(2.0 * rand::rng().random::<f64>());
                        tokio::time::sleep(wait).await;
                    }
                }
            };
            tokio::select! {
                () = wait => {}
                () = &mut drained => return,
            }
        }
    }

    async fn apply(&self) -> Result<Applied, StoreError> {
        let Self { ledger, clock, progress, .. } = self;
        let begun = clock.mono();
        let apply = || ledger.apply(self.receipts_max, self.bytes_max, clock.wall());
        let applied = insist("applying receipts", &**clock, progress, apply).await?;
        failpoint!("receipts.applied");
        if applied.total() > 0 {
            self.metrics.applied(applied, clock.mono().since(begun));
        }
        Ok(applied)
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests;
