//! How one group of batches is written: rows, statements, verdicts, settlement.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt as _;
use rand::RngExt as _;
use tokio::time::Instant;

use super::{TableBatch, TableDestination, TableStrategy};
use crate::{
    flow::{Place, unused},
    metrics::Tally,
    model::{
        self,
        bisect::{Bisection, Narrowed, NextStatement, Refusal, RefusedRow},
        call::FailureKind,
        lease::OpenMessage,
        ledger::MessageVerdict,
        outcome::{Attempt, DeathCause, Obstacle, Outcome, Reason, Verdict},
        receipt::RESPONSE_BYTES_MAX,
        record::Said,
        retry::{Decision, decide, poisoned},
        suspect::is_condemned,
        table::{Mapping, TableRow, divide},
    },
    ports::{Release, Settled, Settlement, StoreError, TableError},
};

/// The longest of a table's words that are kept, in bytes.
const WORDS_BYTES_MAX: usize = RESPONSE_BYTES_MAX;

/// What stores record as the status of a row that was written: with them, 0 is what was not sent.
const WRITTEN: u16 = 200;

/// How often what was written is recorded while more of its group is to come: a crash in a long bisection repeats little.
const SETTLE_EVERY: Duration = Duration::from_millis(250);

/// A group that is being written.
struct Group<'a> {
    /// The index of its destination.
    index: usize,
    destination: &'a TableDestination,
    batches: Vec<GroupBatch>,
    /// Whether the table took the last statement, or refused a row of it; `None` before the first.
    took_rows: Option<bool>,
    /// Rows that the table was asked to take, and those of them that it refused with evidence.
    asked: usize,
    refused: usize,
}

/// One batch of a group.
struct GroupBatch {
    batch: Arc<TableBatch>,
    /// What is not recorded yet.
    verdicts: Vec<MessageVerdict>,
    said: HashMap<u32, Said>,
    failed: bool,
    /// Its lease has ended.
    settled: bool,
}

/// The database will never take this row.
const REFUSED: Outcome = Outcome::Permanent { status: 0, reason: Reason::Refused };

/// The database did not take this row now, and it is not known whose fault that is.
fn refused_for_now(refusal: &Refusal) -> Outcome {
    let is_of_the_moment = refusal.kind == FailureKind::Unavailable;
    let reason = if is_of_the_moment { Reason::Unavailable } else { Reason::Refused };
    Outcome::Retryable { status: 0, reason, retry_after: None }
}

/// A row and the message it was made of.
struct WrittenRow {
    batch: usize,
    message: OpenMessage,
}

impl GroupBatch {
    fn judge(
        &mut self,
        destination: &TableDestination,
        message: OpenMessage,
        verdict: Verdict,
        words: Option<&str>,
    ) {
        let index = message.index;
        self.verdicts.push(message.verdict(verdict));
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

impl TableStrategy {
    /// Writes a group and settles it. However that ends, the shelf's place is free again.
    pub(super) async fn write_group(self: Arc<Self>, index: usize, batches: Vec<Arc<TableBatch>>) {
        let tokens: Vec<_> = batches.iter().map(|batch| batch.lease.token).collect();
        let mut group = Group {
            index,
            destination: &self.setup.destinations[index],
            batches: batches.into_iter().map(GroupBatch::new).collect(),
            took_rows: None,
            asked: 0,
            refused: 0,
        };
        let in_flight = &self.setup.in_flight;
        let slots: Vec<_> = tokens.iter().map(|_| in_flight.enter()).collect();
        let written = AssertUnwindSafe(self.write(&mut group, &slots)).catch_unwind().await;
        for slot in slots {
            in_flight.leave(slot);
        }
        let done = if let Ok(done) = written {
            done
        } else {
            tracing::error!(destination = %group.destination.name, batches = tokens.len(),
                "writing a group panicked; its batches are now suspects");
            let lost: Vec<_> = tokens.iter().map(|token| (*token, Release::Lost)).collect();
            self.give_back(&lost).await
        };
        {
            let mut state = self.state();
            let now = self.worker.clock().mono();
            state.shelves[index].refused.note(group.asked, group.refused);
            state.shelves[index].done(now, group.took_rows, rand::rng().random());
            if let Err(failure) = done {
                state.failure = Some(failure);
            }
        }
        self.moved.ring();
        self.worker.wake();
    }

    async fn write(&self, group: &mut Group<'_>, slots: &[u32]) -> Result<(), StoreError> {
        if let [only] = &mut group.batches[..] {
            self.condemn(group.destination, only);
        }
        let table = group.destination.table.clone();
        let (rows, written) = self.rows_that_fit(group).await;
        let suspect = group.batches.iter().any(|member| member.batch.goes_alone());
        let expected_rows = self.state().shelves[group.index].refused.statement_rows();
        let rows_max = match group.destination.group.max_rows {
            // A suspect's rows go one by one, each recorded before the next begins: see `model::suspect`.
            _ if suspect => 1,
            most if table.sifts() => most,
            most => most.min(expected_rows),
        };
        let bytes_max = table.statement_bytes_max();
        let sizes: Vec<_> = rows.iter().map(TableRow::statement_bytes).collect();
        let (statements, too_large) = divide(sizes.iter().copied(), rows_max, bytes_max);
        for row in too_large {
            let words =
                format!("the row takes {} bytes of a statement, which has {bytes_max} at most", sizes[row]);
            let refused = Outcome::Permanent { status: 0, reason: Reason::Render };
            self.judge(group, &written[row], refused, &words);
        }
        let mut bisection = Bisection::new(statements, table.sifts(), expected_rows < rows.len());
        let mut settled_at = Instant::now();
        while let Some(NextStatement { rows: range, row_by_row }) = bisection.next() {
            if suspect {
                let begins = written.get(range.start).map(|row| row.message.index);
                self.settle(group, false, begins).await?;
            } else if settled_at.elapsed() >= SETTLE_EVERY {
                self.settle(group, false, None).await?;
                settled_at = Instant::now();
            }
            let Some(permit) = self.enter(group).await else {
                break; // what is left is given back, open
            };
            let now = self.worker.clock().wall();
            if group.batches.iter().any(|member| member.batch.lease.header.terms.is_closed(now)) {
                break; // the same: what may go is written with others
            }
            let is_exclusive = suspect && group.batches[0].batch.is_exclusive(written[range.start].message);
            let (_others, _nobody);
            if is_exclusive {
                _nobody = self.setup.alone.write().await;
            } else {
                _others = self.setup.alone.read().await;
            }
            // Of several rows in a statement it is not known which one killed the process.
            let row = if suspect { Some(written[range.start].message.index) } else { None };
            for (slot, member) in slots.iter().zip(&group.batches) {
                self.setup.in_flight.begin(*slot, member.batch.lease.token.batch, row);
            }
            failpoint!("table.before");
            let begun = Instant::now();
            let statement = async {
                let rows = &rows[range.clone()];
                if row_by_row {
                    table.sift(rows).await.map(Some)
                } else {
                    table.insert(rows).await.map(|()| None)
                }
            };
            let answer = AssertUnwindSafe(statement).catch_unwind().await;
            for slot in slots {
                self.setup.in_flight.end(*slot);
            }
            drop(permit);
            failpoint!("table.after");
            group.destination.metrics.attempted(begun.elapsed());
            group.asked = group.asked.max(range.end);
            match answer {
                Ok(Ok(None)) => {
                    self.sent(group, &written[range]);
                    let blamed = bisection.written();
                    self.refuse(group, &written, blamed);
                }
                Ok(Ok(Some(refused))) => {
                    let at = |(row, refusal)| (range.start + row, refusal);
                    let refused: Vec<_> = refused.into_iter().map(at).collect();
                    let bad: BTreeSet<_> = refused.iter().map(|(row, _)| *row).collect();
                    for row in range.clone().filter(|row| !bad.contains(row)) {
                        self.sent(group, &written[row..=row]);
                    }
                    let whole =
                        refused.first().filter(|_| bad.len() == range.len()).map(|(_, why)| why.clone());
                    let refused = bisection.sifted(refused);
                    let blames_some = refused.iter().any(|row| row.is_blamed);
                    self.refuse(group, &written, refused);
                    if let Some(refusal) = whole.filter(|_| !blames_some) {
                        self.refused_as_such(group, &written, bisection, &refusal);
                        break;
                    }
                }
                Ok(Err(TableError::Refused(refusal))) => {
                    match bisection.refused(refusal, rand::rng().random()) {
                        Narrowed::Parts => {}
                        Narrowed::Row(row) => self.refuse(group, &written, vec![row]),
                        Narrowed::Whole(refusal) => {
                            self.refused_as_such(group, &written, bisection, &refusal);
                            break;
                        }
                    }
                }
                Ok(Err(TableError::Retryable(words))) => {
                    tracing::warn!(destination = %group.destination.name, words, "the table can't take rows now; they are retried");
                    self.put_off(group, &written, bisection, Reason::Unavailable, &words);
                    break;
                }
                Ok(Err(TableError::Short(shortage))) => {
                    group.destination.metrics.not_begun(Obstacle::Shortage(shortage));
                    let shortage = shortage.as_str();
                    tracing::warn!(destination = %group.destination.name, shortage, "this machine can't open a connection; the rows wait and are charged nothing");
                    group.took_rows = Some(false);
                    break; // what is left is given back, open
                }
                Err(_) => {
                    tracing::error!(destination = %group.destination.name, "a statement panicked");
                    self.put_off(group, &written, bisection, Reason::Panic, "the statement panicked");
                    break;
                }
            }
            if bisection.next().is_none() {
                let unproven = bisection.unproven();
                self.refuse(group, &written, unproven);
            }
        }
        self.settle(group, true, None).await?;
        let now = self.worker.clock().wall();
        let open = group.batches.iter().filter(|member| !member.settled).map(|member| &member.batch.lease);
        let open: Vec<_> = open.map(|lease| (lease.token, unused(&lease.header.terms, now))).collect();
        self.give_back(&open).await
    }

    /// The group's rows that the table can take, as far as its catalogue says.
    async fn rows_that_fit(&self, group: &mut Group<'_>) -> (Vec<TableRow>, Vec<WrittenRow>) {
        let (rows, written) = self.make_rows(group);
        let unfit: BTreeMap<_, _> = group.destination.table.unfit(&rows).await.into_iter().collect();
        if unfit.is_empty() {
            return (rows, written);
        }
        for (&row, words) in &unfit {
            self.judge(group, &written[row], REFUSED, words);
        }
        let rows_and_messages = std::iter::zip(rows, written).enumerate();
        rows_and_messages.filter(|(row, _)| !unfit.contains_key(row)).map(|(_, both)| both).unzip()
    }

    /// These rows are in the table.
    fn sent(&self, group: &mut Group<'_>, written: &[WrittenRow]) {
        let at = self.worker.clock().wall();
        group.took_rows = Some(true);
        for row in written {
            let sent = row.message.verdict(Verdict::Sent { at, status: WRITTEN });
            group.batches[row.batch].verdicts.push(sent);
        }
    }

    /// These rows were refused by themselves: dead if there is evidence, tried again later if not.
    fn refuse(&self, group: &mut Group<'_>, written: &[WrittenRow], rows: Vec<RefusedRow>) {
        for RefusedRow { row, refusal, is_blamed } in rows {
            group.refused += usize::from(is_blamed);
            group.took_rows = Some(is_blamed || group.took_rows.unwrap_or(false));
            let outcome = if is_blamed { REFUSED } else { refused_for_now(&refusal) };
            self.judge(group, &written[row], outcome, &refusal.words);
        }
    }

    /// The table refuses whatever it is given: nobody is to blame, and what is left of the group waits.
    fn refused_as_such(
        &self,
        group: &mut Group<'_>,
        written: &[WrittenRow],
        bisection: Bisection,
        refusal: &Refusal,
    ) {
        let (code, words) = (&*refusal.code, refusal.for_the_journal());
        if refusal.kind == FailureKind::Unavailable {
            tracing::warn!(destination = %group.destination.name, code, words, "the table can't take rows now; they are retried");
        } else {
            tracing::error!(destination = %group.destination.name, code, words, "the table refuses every row: fix it there; the rows wait");
        }
        self.put_off(group, written, bisection, Reason::Unavailable, &refusal.words);
    }

    /// What is left of a group is tried again later.
    fn put_off(
        &self,
        group: &mut Group<'_>,
        written: &[WrittenRow],
        bisection: Bisection,
        reason: Reason,
        words: &str,
    ) {
        group.took_rows = Some(false);
        for row in bisection.rest() {
            let failed = Outcome::Retryable { status: 0, reason, retry_after: None };
            self.judge(group, &written[row], failed, words);
        }
    }

    /// Decides on one message by the retry schedule.
    fn judge(&self, group: &mut Group<'_>, row: &WrittenRow, outcome: Outcome, words: &str) {
        let member = &mut group.batches[row.batch];
        let clock = self.worker.clock();
        let (lease, index, at) = (&member.batch.lease, row.message.index, clock.wall());
        let age = if matches!(outcome, Outcome::Retryable { .. }) {
            lease.age(index, clock.age(lease.since(index)), at)
        } else {
            Duration::ZERO
        };
        let retry = &group.destination.retry;
        match decide(retry, outcome, row.message.tries + 1, age, at, member.batch.jitter) {
            Decision::Record(verdict) => member.judge(group.destination, row.message, verdict, Some(words)),
            Decision::Hold | Decision::Leave => {} // for webhooks alone: a table says neither
        }
    }

    /// The verdicts that need no statement: on a batch that can't be read, and on messages that have killed the
    /// process too often.
    fn condemn(&self, destination: &TableDestination, member: &mut GroupBatch) {
        let (batch, at) = (member.batch.clone(), self.worker.clock().wall());
        if let Err(why) = &batch.mapping {
            let attempt = Attempt { at, status: 0, reason: Reason::Render };
            let dead = Verdict::Dead { attempt, cause: DeathCause::Permanent };
            for message in &batch.open {
                member.judge(destination, *message, dead, Some(why));
            }
            return;
        }
        let charged = &batch.lease.charged;
        for message in &batch.open {
            if charged.get(&message.index).is_some_and(|&(_, alone)| is_condemned(alone)) {
                member.judge(destination, *message, poisoned(at), None);
            }
        }
    }

    /// A row of every message that has no verdict yet; those that can't be made are judged.
    fn make_rows(&self, group: &mut Group<'_>) -> (Vec<TableRow>, Vec<WrittenRow>) {
        let (mut rows, mut written) = (Vec::new(), Vec::new());
        let mut shared: Option<Arc<Mapping>> = None;
        for at in 0..group.batches.len() {
            let batch = group.batches[at].batch.clone();
            let Ok(mapping) = &batch.mapping else { continue };
            // One for the whole group: they are alike.
            let mapping = shared.get_or_insert_with(|| mapping.clone()).clone();
            let judged: Vec<_> = group.batches[at].verdicts.iter().map(|message| message.index).collect();
            for &message in &batch.open {
                let Some((row, bytes)) = batch.rows.get(message.index) else { continue };
                if judged.contains(&message.index) {
                    continue;
                }
                let header = &batch.lease.header;
                let id = header.message_id(row);
                // A row that makes the mapping panic must not take its neighbours with it.
                let made = std::panic::catch_unwind(AssertUnwindSafe(|| mapping.row(header, id, bytes)));
                let written_as = WrittenRow { batch: at, message };
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

    /// Waits for a statement's turn; `None` if the worker closes, or the destination is held, before it comes. The place
    /// first: the time between the rate and the statement is as short as can be, so that the database sees the rate too.
    async fn enter(&self, group: &Group<'_>) -> Option<Place> {
        let gates = &group.destination.gates;
        let turn = async {
            let place = gates.in_flight.take().await;
            if let Some(rate) = &gates.rate {
                rate.pass().await;
            }
            place
        };
        tokio::select! {
            biased;
            () = self.worker.closed() => None,
            () = self.holds.held(group.index) => None,
            place = turn => Some(place),
        }
    }

    /// Records the group's outcomes, after the commit (S4.3). `ends`: nothing more will be done
    /// for them here. `begins`: the message of the group's only batch that is written next, by itself (B17).
    async fn settle(&self, group: &mut Group<'_>, ends: bool, begins: Option<u32>) -> Result<(), StoreError> {
        let destination = group.destination;
        let mut settlements = Vec::new();
        let mut members = Vec::new();
        let has_to_record = |member: &&mut GroupBatch| {
            !member.settled && (ends || begins.is_some() || !member.verdicts.is_empty())
        };
        for member in group.batches.iter_mut().filter(has_to_record) {
            let batch = &member.batch;
            let mut verdicts = std::mem::take(&mut member.verdicts);
            verdicts.sort_unstable_by_key(|message| message.index);
            let details = model::record::details(&verdicts, &member.said);
            let mut records = Vec::new();
            if destination.recorded {
                records = model::record::records(&batch.lease, &batch.rows, &verdicts, &mut member.said);
            }
            let token = batch.lease.token;
            settlements.push(Settlement { token, verdicts, details, records, ends, begins });
            members.push(member);
        }
        if settlements.is_empty() {
            return Ok(());
        }
        let now = self.worker.clock().wall();
        let note = |settled: &[Settled]| {
            for ((member, settlement), &settled) in members.into_iter().zip(&settlements).zip(settled) {
                let tally = Tally::of(&settlement.verdicts);
                member.failed |= !tally.is_clean();
                let age = now.since(member.batch.lease.accepted_at);
                destination.metrics.settled(&tally, settled, age, !member.failed);
                if settled != Settled::Open {
                    member.settled = true;
                    self.state().forget(settlement.token);
                }
            }
        };
        self.worker.settle(&settlements, note).await
    }
}

impl GroupBatch {
    fn new(batch: Arc<TableBatch>) -> Self {
        Self { batch, verdicts: Vec::new(), said: HashMap::new(), failed: false, settled: false }
    }
}
