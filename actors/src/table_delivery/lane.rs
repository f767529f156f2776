//! How one group of batches is written: rows, statements, verdicts, settlement.

use std::{collections::HashMap, panic::AssertUnwindSafe, sync::Arc};

use futures_util::FutureExt as _;
use rand::RngExt as _;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use super::{BatchInHand, Desk, TableDestination};
use crate::{
    metrics::Tally,
    model::{
        self,
        bisect::{Bisection, Refusal},
        lease::LeaseToken,
        outcome::{Attempt, DeathCause, Outcome, Reason, Verdict},
        receipt::RESPONSE_BYTES_MAX,
        record::Said,
        retry::{Decision, poisoned, retry_batches},
        state::MessageState,
        suspect::Pace,
        table::{Mapping, TableRow, divide},
    },
    ports::{Release, Settled, Settlement, StoreError, TableError},
};

/// Retries that are due within the same step of this length travel in one batch.
const RETRY_GRANULARITY: std::time::Duration = std::time::Duration::from_millis(100);

/// The longest of a table's words that are kept, in bytes.
const WORDS_BYTES_MAX: usize = RESPONSE_BYTES_MAX;

/// What stores record as the status of a row that was written: with them, 0 is what was not sent.
const WRITTEN: u16 = 200;

/// A group on its way.
struct Group<'a> {
    destination: &'a TableDestination,
    batches: Vec<InLane>,
    /// Whether the table took the last statement, or refused a row of it; `None` before the first.
    took_rows: Option<bool>,
}

/// One batch of it.
struct InLane {
    batch: Arc<BatchInHand>,
    /// What is not recorded yet.
    verdicts: Vec<(u32, Verdict)>,
    said: HashMap<u32, Said>,
    failed: bool,
    /// Its lease has ended.
    settled: bool,
}

/// A row and the message it was made of.
struct Written {
    batch: usize,
    index: u32,
}

impl InLane {
    fn judge(&mut self, destination: &TableDestination, index: u32, verdict: Verdict, words: Option<&str>) {
        self.verdicts.push((index, verdict));
        // With a dead letter they are kept whatever the ledger.
        let is_kept = destination.recorded || matches!(verdict, Verdict::Dead { .. });
        if let Some(words) = words.filter(|_| is_kept) {
            self.said.insert(index, Said { provider_id: None, detail: Some(cut(words).into()) });
        }
    }
}

/// The beginning of `words`, without what no store takes.
fn cut(words: &str) -> String {
    let words = words.replace('\0', "\u{fffd}");
    words[..words.floor_char_boundary(WORDS_BYTES_MAX)].to_owned()
}

impl Desk {
    /// Writes a group and settles it. However that ends, the lane's place on the shelf is free again.
    pub(super) async fn lane(self: Arc<Self>, index: usize, batches: Vec<Arc<BatchInHand>>) {
        let tokens: Vec<_> = batches.iter().map(|batch| batch.lease.token).collect();
        let mut group = Group {
            destination: &self.setup.destinations[index],
            batches: batches.into_iter().map(InLane::new).collect(),
            took_rows: None,
        };
        let written = AssertUnwindSafe(self.write(&mut group)).catch_unwind().await;
        let done = if let Ok(done) = written {
            done
        } else {
            tracing::error!(destination = %group.destination.name, batches = tokens.len(),
                "writing a group panicked: its batches are suspects");
            self.release(&tokens, Release::Lost).await
        };
        let took_rows = group.took_rows;
        {
            let mut state = self.state();
            state.shelves[index].done(self.setup.clock.mono(), took_rows, rand::rng().random());
            if let Err(failure) = done {
                state.failure = Some(failure);
            }
        }
        self.moved.ring();
        self.setup.queued.ring();
    }

    async fn write(&self, group: &mut Group<'_>) -> Result<(), StoreError> {
        if let [only] = &mut group.batches[..] {
            self.condemn(group.destination, only);
        }
        let (rows, written) = self.make_rows(group);
        let suspect = group.batches.iter().any(|lane| lane.batch.goes_alone());
        // A suspect's rows go one by one, each recorded before the next begins: see `model::suspect`.
        let rows_max = if suspect { 1 } else { group.destination.group.rows.max(1) };
        let bytes_max = group.destination.table.statement_bytes_max();
        let sizes: Vec<_> = rows.iter().map(TableRow::statement_bytes).collect();
        let (statements, too_large) = divide(sizes.iter().copied(), rows_max, bytes_max);
        for row in too_large {
            let words =
                format!("the row takes {} bytes of a statement, which has {bytes_max} at most", sizes[row]);
            let refused = Outcome::Permanent { status: 0, reason: Reason::Render };
            self.judge(group, &written[row], refused, &words);
        }
        let mut bisection = Bisection::new(statements);
        while let Some(range) = bisection.next() {
            if suspect {
                self.settle(group).await?;
            }
            let Some(permit) = self.enter(group.destination).await else {
                break; // draining: what is left is given back, open
            };
            failpoint!("table.before");
            let begun = Instant::now();
            let insert = AssertUnwindSafe(group.destination.table.insert(&rows[range.clone()]));
            let answer = insert.catch_unwind().await;
            drop(permit);
            failpoint!("table.after");
            group.destination.metrics.attempted(begun.elapsed());
            let at = self.setup.clock.wall();
            match answer {
                Ok(Ok(())) => {
                    group.took_rows = Some(true);
                    for row in &written[range] {
                        group.batches[row.batch]
                            .verdicts
                            .push((row.index, Verdict::Sent { at, status: WRITTEN }));
                    }
                    bisection.written();
                }
                Ok(Err(TableError::Refused(words))) => {
                    group.took_rows = Some(true);
                    if let Refusal::Row(row) = bisection.refused() {
                        let refused = Outcome::Permanent { status: 0, reason: Reason::Refused };
                        self.judge(group, &written[row], refused, &words);
                    }
                }
                Ok(Err(TableError::Retryable(words))) => {
                    tracing::warn!(destination = %group.destination.name, words, "the table takes no rows now");
                    self.put_off(group, &written, bisection, Reason::Unavailable, &words);
                    break;
                }
                Err(_) => {
                    tracing::error!(destination = %group.destination.name, "a statement panicked");
                    self.put_off(group, &written, bisection, Reason::Panic, "the statement panicked");
                    break;
                }
            }
        }
        self.settle(group).await?;
        let open: Vec<_> =
            group.batches.iter().filter(|lane| !lane.settled).map(|lane| lane.batch.lease.token).collect();
        self.release(&open, Release::Unused).await
    }

    /// What is left of a group is tried again later.
    fn put_off(
        &self,
        group: &mut Group<'_>,
        written: &[Written],
        bisection: Bisection,
        reason: Reason,
        words: &str,
    ) {
        group.took_rows = Some(false);
        for row in bisection.rest().flatten() {
            let failed = Outcome::Retryable { status: 0, reason, retry_after: None };
            self.judge(group, &written[row], failed, words);
        }
    }

    /// Decides on one message by the retry schedule.
    fn judge(&self, group: &mut Group<'_>, row: &Written, outcome: Outcome, words: &str) {
        let lane = &mut group.batches[row.batch];
        let (lease, at) = (&lane.batch.lease, self.setup.clock.wall());
        let retry = &group.destination.retry;
        match retry.decide(outcome, lease.attempt + 1, lease.accepted_at, at, lane.batch.jitter) {
            Decision::Record(verdict) => lane.judge(group.destination, row.index, verdict, Some(words)),
            Decision::Hold => {} // for 410 alone, which no table answers
        }
    }

    /// The verdicts that need no statement: on a batch that can't be read, and on the first open message of
    /// one that was lost too often.
    fn condemn(&self, destination: &TableDestination, lane: &mut InLane) {
        let (batch, at) = (lane.batch.clone(), self.setup.clock.wall());
        if let Err(why) = &batch.mapping {
            let attempt = Attempt { at, status: 0, reason: Reason::Render };
            let dead = Verdict::Dead { attempt, cause: DeathCause::Permanent };
            for index in &batch.open {
                lane.judge(destination, *index, dead, Some(why));
            }
        } else if batch.pace == Pace::Condemn
            && let Some(first) = batch.open.first()
        {
            lane.judge(destination, *first, poisoned(at), None);
        }
    }

    /// A row of every message that has no verdict yet; those that can't be made are judged.
    fn make_rows(&self, group: &mut Group<'_>) -> (Vec<TableRow>, Vec<Written>) {
        let (mut rows, mut written) = (Vec::new(), Vec::new());
        let mut shared: Option<Arc<Mapping>> = None;
        for at in 0..group.batches.len() {
            let batch = group.batches[at].batch.clone();
            let Ok(mapping) = &batch.mapping else { continue };
            // One for the whole group: they are alike.
            let mapping = shared.get_or_insert_with(|| mapping.clone()).clone();
            let judged = group.batches[at].verdicts.len();
            for &index in &batch.open[judged..] {
                let (row, bytes) = (batch.rows.row(index as usize), batch.rows.bytes(index as usize));
                let header = &batch.lease.header;
                let id = header.message_id(row);
                // A row that makes the mapping panic must not take its neighbours with it.
                let made = std::panic::catch_unwind(AssertUnwindSafe(|| mapping.row(header, id, bytes)));
                let written_as = Written { batch: at, index };
                match made {
                    Ok(Ok(row)) => {
                        rows.push(row);
                        written.push(written_as);
                    }
                    Ok(Err(why)) => {
                        let refused = Outcome::Permanent { status: 0, reason: Reason::Render };
                        self.judge(group, &written_as, refused, &why);
                    }
                    Err(_) => {
                        tracing::error!(%id, "making its row panicked");
                        let failed =
                            Outcome::Retryable { status: 0, reason: Reason::Panic, retry_after: None };
                        self.judge(group, &written_as, failed, "making its row panicked");
                    }
                }
            }
        }
        (rows, written)
    }

    /// Waits for a statement's turn; `None` if the worker closes before it comes. The permit first: the time
    /// between the rate and the statement is as short as can be, so that the database sees the rate too.
    async fn enter(&self, destination: &TableDestination) -> Option<OwnedSemaphorePermit> {
        let mut closing = self.closing.subscribe();
        let gates = &destination.gates;
        let turn = async {
            let permit = gates.in_flight.clone().acquire_owned().await;
            if let Some(rate) = &gates.rate {
                rate.pass().await;
            }
            permit.ok() // never closed
        };
        tokio::select! {
            biased;
            _ = closing.wait_for(|closing| *closing) => None,
            permit = turn => permit,
        }
    }

    /// Records what there is to say of the group's batches, after the commit (S4.3).
    async fn settle(&self, group: &mut Group<'_>) -> Result<(), StoreError> {
        let (setup, destination) = (&self.setup, group.destination);
        let mut settlements = Vec::new();
        let mut lanes = Vec::new();
        for lane in group.batches.iter_mut().filter(|lane| !lane.verdicts.is_empty() && !lane.settled) {
            let batch = &lane.batch;
            let mut verdicts = std::mem::take(&mut lane.verdicts);
            verdicts.sort_unstable_by_key(|(index, _)| *index);
            let retries = retry_batches(&batch.lease, &batch.rows, &verdicts, RETRY_GRANULARITY);
            let mut records = model::record::records(&batch.lease, &batch.rows, &verdicts, &mut lane.said);
            if !destination.recorded {
                // The database's words are kept with the dead letter all the same.
                records.retain(|record| record.detail.is_some() && record.state == MessageState::Dead);
            }
            settlements.push(Settlement { token: batch.lease.token, verdicts, retries, records });
            lanes.push(lane);
        }
        if settlements.is_empty() {
            return Ok(());
        }
        failpoint!("settle.before");
        let settled = self.insist("recording rows", || setup.ledger.settle(settlements.clone())).await?;
        failpoint!("settle.after");
        let now = setup.clock.wall();
        let (mut complete, mut stale) = (Vec::<LeaseToken>::new(), Vec::<LeaseToken>::new());
        for ((lane, settlement), settled) in lanes.into_iter().zip(&settlements).zip(settled) {
            let tally = Tally::of(&settlement.verdicts);
            lane.failed |= !tally.is_clean();
            let age = now.since(lane.batch.lease.accepted_at);
            destination.metrics.settled(&tally, settled, age, !lane.failed);
            match settled {
                Settled::Open => continue,
                Settled::Complete => complete.push(settlement.token),
                Settled::Stale => stale.push(settlement.token),
            }
            lane.settled = true;
        }
        {
            let mut state = self.state();
            for token in &complete {
                state.forget(*token);
            }
            let rows = settlements.iter().map(|settlement| settlement.verdicts.len() as u64).sum();
            state.telling.add(setup.clock.mono(), rows);
        }
        if !complete.is_empty() {
            self.insist("acknowledging", || setup.queue.acknowledge(&complete)).await?;
        }
        // Somebody else has them, or they are settled: whoever gets them next will see.
        self.release(&stale, Release::Unused).await?;
        if settlements.iter().any(|settlement| !settlement.retries.is_empty()) {
            setup.appended.ring();
        }
        Ok(())
    }
}

impl InLane {
    fn new(batch: Arc<BatchInHand>) -> Self {
        Self { batch, verdicts: Vec::new(), said: HashMap::new(), failed: false, settled: false }
    }
}
