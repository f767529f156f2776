//! Sweeper: takes lost leases back and writes the final reports of settled files.

use std::{sync::Arc, time::Duration};

use actix::prelude::*;
use prometheus_client::metrics::counter::Counter;

use crate::{
    flow::{Bell, Progress, blocking, insist},
    ports::{Clock, Inbox, Ledger, Queue, StoreError},
    supervision::{Drain, Fault},
};

/// Only control messages come in.
pub const MAILBOX: usize = 4;

/// How often it sweeps.
const TICK: Duration = Duration::from_millis(500);

/// Reports written in one go.
const REPORTS_MAX: usize = 256;

/// What a sweeper works with.
#[derive(Clone)]
pub struct SweeperSetup {
    /// Whose leases are looked after.
    pub queue: Arc<dyn Queue>,
    /// Which files are settled.
    pub ledger: Arc<dyn Ledger>,
    /// Where each feed's reports go.
    pub inboxes: Vec<(Arc<str>, Arc<dyn Inbox>)>,
    /// Feeds without a directory: their reports stay in the ledger, and settled files are only marked.
    pub queue_feeds: Vec<Arc<str>>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// To ring when leases were taken back.
    pub queued: Vec<Bell>,
    /// Counts leases that were taken back.
    pub leases_lost: Counter,
    /// Sign of life.
    pub progress: Progress,
}

/// The actor.
pub struct Sweeper {
    setup: SweeperSetup,
    fault: Fault,
}

impl Sweeper {
    /// A sweeper that has swept nothing yet.
    pub fn new(setup: SweeperSetup, fault: Fault) -> Self {
        Self { setup, fault }
    }
}

impl Actor for Sweeper {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.spawn(self.setup.clone().run().into_actor(self).map(|error, this, context| {
            this.fault.fail(context, error);
        }));
    }
}

impl Handler<Drain> for Sweeper {
    type Result = ();

    fn handle(&mut self, _: Drain, context: &mut Self::Context) {
        // The last messages may have settled while the others drained.
        let setup = self.setup.clone();
        context.spawn(async move { setup.write_reports().await }.into_actor(self).map(
            |swept, _, context| {
                if let Err(error) = swept {
                    tracing::warn!(%error, "final reports are left to the next start");
                }
                context.stop();
            },
        ));
    }
}

impl SweeperSetup {
    async fn run(self) -> StoreError {
        loop {
            failpoint!("panic.sweeper");
            self.progress.turn(self.clock.mono());
            if let Err(error) = self.sweep().await {
                return error;
            }
            tokio::time::sleep(TICK).await;
        }
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        let Self { queue, clock, progress, .. } = self;
        let rescue = || queue.rescue(clock.mono());
        let rescued = insist("taking leases back", &**clock, progress, rescue).await?;
        if rescued > 0 {
            self.leases_lost.inc_by(rescued as u64);
            tracing::warn!(batches = rescued, "leases were not extended in time and are taken back");
            for bell in &self.queued {
                bell.ring();
            }
        }
        self.write_reports().await
    }

    async fn write_reports(&self) -> Result<(), StoreError> {
        let Self { ledger, clock, progress, .. } = self;
        for (feed, inbox) in &self.inboxes {
            let settled = || ledger.settled_files(feed, REPORTS_MAX);
            let reports = insist("looking for settled files", &**clock, progress, settled).await?;
            if reports.is_empty() {
                continue;
            }
            let ids: Vec<_> = reports.iter().map(|report| report.file.id).collect();
            let work = inbox.clone();
            match blocking(move || work.rewrite_reports(&reports)).await {
                Ok(()) => {
                    failpoint!("report.before_mark");
                    let mark = || ledger.mark_reported(&ids);
                    insist("marking reports", &**clock, progress, mark).await?;
                }
                // The report can be written as long as the mark is not set: tried again next time.
                Err(error) => tracing::warn!(%feed, %error, "final reports can't be written yet"),
            }
        }
        for feed in &self.queue_feeds {
            let settled = || ledger.settled_files(feed, REPORTS_MAX);
            let reports = insist("looking for settled files", &**clock, progress, settled).await?;
            let ids: Vec<_> = reports.iter().map(|report| report.file.id).collect();
            if !ids.is_empty() {
                let mark = || ledger.mark_reported(&ids);
                insist("marking reports", &**clock, progress, mark).await?;
            }
        }
        Ok(())
    }
}
