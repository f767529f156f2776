//! `CanaryJudge`: looks after the files whose first messages go ahead of the others, and lets the others follow or holds
//! them. What it decides by is stored, and so is what it decides: it may die at any time, and where several machines share
//! the store each of them judges, with the same result.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use actix::prelude::*;
use postrider_settings::Canary;

use crate::{
    flow::{Bells, Progress, Speaker, TroubleBoard, insist},
    model::{
        canary::{Extent, Trial, judge},
        hold::{HeldFile, HoldCause, HoldChange},
    },
    ports::{Clock, Ledger, Steering, StoreError},
    supervision::{ChildId, Drain, Fault, Stage},
};

/// What a judge works with.
#[derive(Clone)]
pub struct CanaryJudgeSetup {
    /// `[canary]`.
    pub settings: Canary,
    /// How often it looks.
    pub tick: Duration,
    /// Which files are held.
    pub steering: Arc<dyn Steering>,
    /// How they stand.
    pub ledger: Arc<dyn Ledger>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// To ring when messages may go that waited.
    pub queued: Bells,
    /// Where it is said which files are held.
    pub troubles: TroubleBoard,
    /// Sign of life.
    pub progress: Progress,
}

/// The actor.
pub struct CanaryJudge {
    setup: CanaryJudgeSetup,
    fault: Fault,
}

impl Stage for CanaryJudge {
    const NAME: &'static str = "canary_judge";

    type Setup = CanaryJudgeSetup;

    fn new(setup: CanaryJudgeSetup, _: &ChildId, fault: Fault) -> Self {
        Self { setup, fault }
    }
}

impl Actor for CanaryJudge {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.spawn(self.setup.clone().run().into_actor(self).map(|error, this, context| {
            this.fault.fail(context, error);
        }));
    }
}

impl Handler<Drain> for CanaryJudge {
    type Result = ();

    fn handle(&mut self, _: Drain, context: &mut Self::Context) {
        context.stop();
    }
}

impl CanaryJudgeSetup {
    async fn run(self) -> StoreError {
        let mut noted = Vec::new();
        loop {
            let held = match self.insist("looking for held files", || self.steering.held_files()).await {
                Ok(held) => held,
                Err(error) => return error,
            };
            for file in held.iter().filter(|file| file.hold.cause.passes()) {
                if let Err(error) = self.look_at(file).await {
                    return error;
                }
            }
            self.write_notes(&held, &mut noted);
            tokio::time::sleep(self.tick).await;
        }
    }

    async fn insist<T, F>(&self, what: &'static str, operation: impl FnMut() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        insist(what, &*self.clock, &self.progress, operation).await
    }

    /// Decides about one file at one destination, if there is something to decide.
    async fn look_at(&self, file: &HeldFile) -> Result<(), StoreError> {
        let HeldFile { file: id, destination, hold, .. } = file;
        let report = self.insist("reading the ledger", || self.ledger.report(*id)).await?;
        let Some((report, counts)) = report
            .and_then(|report| report.destinations.get(destination).copied().map(|counts| (report, counts)))
        else {
            return Ok(()); // its first rows are not there yet
        };
        let extent =
            Extent { rows: report.rows, accepted: counts.accepted, is_closed: report.state.is_closed() };
        let trial = if hold.cause == HoldCause::Canary && self.settings.enabled {
            let look = || self.steering.trial(*id, destination, hold.from_row);
            self.insist("looking at a canary", look).await?
        } else {
            Trial::of_counts(&counts)
        };
        let Some(change) = judge(&self.settings, hold, extent, &trial, self.clock.wall()) else {
            return Ok(());
        };
        let apply = || self.steering.change_hold(*id, Some(destination), &change);
        if self.insist("changing what is held of a file", apply).await? > 0 {
            say(file, &change);
            self.queued.ring();
        }
        Ok(())
    }

    /// Says which files wait for somebody, by feed.
    fn write_notes(&self, held: &[HeldFile], noted: &mut Vec<HeldFile>) {
        let mut waiting: Vec<HeldFile> =
            held.iter().filter(|file| waits_for_somebody(file)).cloned().collect();
        if waiting == *noted {
            return;
        }
        let mut by_feed: BTreeMap<&str, Vec<(String, String)>> = BTreeMap::new();
        for file in noted.iter() {
            by_feed.entry(&file.feed).or_default();
        }
        for file in &waiting {
            let why = format!("at {}: {}", file.destination, file.hold.reason);
            by_feed.entry(&file.feed).or_default().push((file.name.clone(), why));
        }
        for (feed, files) in by_feed {
            self.troubles.of(feed.into(), Speaker::Judge).hold(files);
        }
        std::mem::swap(noted, &mut waiting);
    }
}

/// Whether its messages don't go on by themselves, and are not over either.
fn waits_for_somebody(file: &HeldFile) -> bool {
    matches!(file.hold.cause, HoldCause::Errors | HoldCause::Operator)
}

fn say(file: &HeldFile, change: &HoldChange) {
    let HeldFile { file: id, name, destination, .. } = file;
    match change {
        HoldChange::Judge(hold) if hold.cause == HoldCause::Errors => {
            tracing::error!(file = %id, name, destination, why = hold.reason,
                "too many of the file's first messages failed: the rest is held; fix the cause, then run `postrider release`");
        }
        HoldChange::Judge(hold) => {
            tracing::debug!(file = %id, destination, from_row = hold.from_row, "more of a file may go");
        }
        HoldChange::Pass => {
            tracing::info!(file = %id, name, destination, "the canary went well: the whole file goes");
        }
        HoldChange::Hold(_) | HoldChange::Release | HoldChange::Ended => {}
    }
}
