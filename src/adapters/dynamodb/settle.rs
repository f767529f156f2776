//! `Ledger::settle`: recording what became of messages, exactly once.
//!
//! Settlements of all workers of a process go through one lane, which writes as many as fit into one
//! transaction: they share counters, and two transactions that change one item refuse each other. What comes
//! while a transaction is on its way is in the next one.
//!
//! A settlement that is repeated because its answer was lost finds everything recorded and changes nothing, so
//! it needs no mark of its own. Each transaction holds only if every record is still as it was read; if not,
//! the records are read again and it is worked out anew.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use aws_sdk_dynamodb::types::TransactWriteItem;
use postrider_actors::{
    model::{
        ids::{BatchId, FileId},
        time::UnixMs,
    },
    ports::{Settled, Settlement, StoreError},
};
use tokio::sync::oneshot;

use super::{
    calls::{ACTIONS_MAX, Change, Got, TRANSACTION_BYTES_MAX, Transacted, delete, ledger_key, put},
    draft::{CountChange, Draft, Known, Part, Stop},
    item::{CHANGES, COUNT, DEAD, LAST_AT, RETRYING, SENT, number, time},
    record::Record,
    schema,
    state::{LastTimes, Shared, lock},
};

/// The lane's own depth counter.
const DEPTH_SLOT: &str = "s";

/// How often a transaction is worked out anew when records have moved on.
const ROUNDS: usize = 10;

/// Files and destinations whose last settling times are remembered.
const TIMES_MAX: usize = 10_000;

/// A call of `settle` and where its answer goes.
pub(super) struct Waiting {
    settlements: Vec<Settlement>,
    answer: oneshot::Sender<Result<Vec<Settled>, StoreError>>,
}

/// What the lane remembers.
#[derive(Default)]
pub(super) struct Lane {
    times: LastTimes,
}

/// What a transaction came to.
enum Written {
    Done,
    /// Some records were not as expected: they are to be read again.
    MovedOn,
}

impl Shared {
    pub(super) async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<Settled>, StoreError> {
        let (answer, mut answered) = oneshot::channel();
        lock(&self.waiting).push(Waiting { settlements, answer });
        let mut lane = self.lane.lock().await;
        // Whoever had the lane before may have taken it along.
        if let Ok(answer) = answered.try_recv() {
            return answer;
        }
        let group = std::mem::take(&mut *lock(&self.waiting));
        lane.run(self, group).await;
        drop(lane);
        answered.await.unwrap_or_else(|_| Err(StoreError::Unknown("the recording was interrupted".into())))
    }

    /// Records as they are stored now, the cached ones as they were seen.
    pub(super) async fn know(
        &self,
        known: &mut Known,
        ids: impl IntoIterator<Item = BatchId>,
        cached: bool,
    ) -> Result<(), StoreError> {
        let mut missing = Vec::new();
        for id in ids {
            if known.contains_key(&id) || missing.contains(&id) {
                continue;
            }
            match self.cached_record(id).filter(|_| cached) {
                Some(record) => {
                    known.insert(id, Some(record));
                }
                None => missing.push(id),
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let keys: Vec<_> = missing.iter().map(|id| Record::key(*id)).collect();
        let found = self.calls.get_many("reading records", &self.calls.tables.ledger, &keys, None).await?;
        for (id, got) in missing.into_iter().zip(found) {
            let record = match got {
                Got::Item(item) => Some(Record::read(&item)?),
                Got::Missing => None,
                Got::Unprocessed => {
                    return Err(StoreError::Retryable("reading records: some were not read".into()));
                }
            };
            if let Some(record) = &record {
                self.cache_record(record.clone());
            }
            known.insert(id, record);
        }
        Ok(())
    }
}

impl Lane {
    async fn run(&mut self, shared: &Shared, waiting: Vec<Waiting>) {
        let mut waiting = std::collections::VecDeque::from(waiting);
        while !waiting.is_empty() {
            self.run_some(shared, &mut waiting).await;
        }
    }

    /// Settles as many calls as fit into one transaction, at least the first.
    async fn run_some(&mut self, shared: &Shared, waiting: &mut std::collections::VecDeque<Waiting>) {
        let mut known = Known::new();
        let ids: Vec<_> = waiting
            .iter()
            .flat_map(|call| call.settlements.iter().map(|settlement| settlement.token.batch))
            .collect();
        // A record that is older than the token is of no use: somebody else's claim is newer still.
        for call in waiting.iter() {
            for Settlement { token, .. } in &call.settlements {
                if shared.cached_record(token.batch).is_some_and(|record| record.fence < token.fence) {
                    shared.forget_record(token.batch);
                }
            }
        }
        for round in 0..ROUNDS {
            if let Err(error) = shared.know(&mut known, ids.iter().copied(), round == 0).await {
                return answer_all(waiting.drain(..), &error);
            }
            let mut draft = Draft::default();
            let mut answers: Vec<Result<Vec<Settled>, StoreError>> = Vec::new();
            let mut error = None;
            for call in waiting.iter() {
                match self.work_out(shared, &mut known, &draft, &call.settlements).await {
                    Ok(Ok((next, settled))) => {
                        if fits(&next) {
                            draft = next;
                            answers.push(Ok(settled));
                            continue;
                        }
                        break; // it starts the next transaction
                    }
                    Ok(Err(refused)) => answers.push(Err(refused)),
                    Err(failed) => {
                        error = Some(failed);
                        break;
                    }
                }
            }
            if answers.is_empty() {
                if let Some(error) = error {
                    return answer_all(waiting.drain(..1), &error);
                }
                // Too much for a transaction of its own: in parts, each of which is sound by itself.
                let call = waiting.pop_front().expect("the caller has seen one");
                let answer = self.settle_in_parts(shared, &call.settlements).await;
                let _ = call.answer.send(answer); // nobody waits any more
                return;
            }
            match self.write(shared, &draft).await {
                Ok(Written::Done) => {
                    for (call, answer) in waiting.drain(..answers.len()).zip(answers) {
                        let _ = call.answer.send(answer); // nobody waits any more
                    }
                    return;
                }
                Ok(Written::MovedOn) => {
                    known.clear();
                    super::retry::back_off(round as u32).await;
                }
                Err(error) => return answer_all(waiting.drain(..answers.len()), &error),
            }
        }
        answer_all(waiting.drain(..), &StoreError::Retryable("batches keep being changed by others".into()));
    }

    /// What one call's settlements add to `draft`; `Ok(Err(_))` if they are refused.
    async fn work_out(
        &self,
        shared: &Shared,
        known: &mut Known,
        draft: &Draft,
        settlements: &[Settlement],
    ) -> Result<Result<(Draft, Vec<Settled>), StoreError>, StoreError> {
        loop {
            let mut next = draft.clone();
            let settled: Result<Vec<_>, _> =
                settlements.iter().map(|settlement| next.settle(known, &part_of(settlement))).collect();
            match settled {
                Ok(settled) => return Ok(Ok((next, settled))),
                Err(Stop::Refused(refused)) => return Ok(Err(refused)),
                Err(Stop::Need(id)) => shared.know(known, [id], false).await?,
            }
        }
    }

    async fn settle_in_parts(
        &mut self,
        shared: &Shared,
        settlements: &[Settlement],
    ) -> Result<Vec<Settled>, StoreError> {
        let mut answers = Vec::with_capacity(settlements.len());
        for settlement in settlements {
            let part = part_of(settlement);
            let mut known = Known::new();
            shared.know(&mut known, [settlement.token.batch], false).await?;
            let mut parts = match known.get(&settlement.token.batch) {
                Some(Some(record)) => part.by_retry(record)?,
                _ => vec![part],
            };
            parts.reverse();
            let mut answer = Settled::Stale;
            while let Some(part) = parts.pop() {
                if part.verdicts.is_empty() && part.retries.is_empty() {
                    continue;
                }
                if let Some(settled) = self.settle_part(shared, &part).await? {
                    // Its last message ends the claim; what comes then is stale and changes nothing.
                    answer = if answer == Settled::Complete { answer } else { settled };
                } else {
                    let (left, right) = part.halves().ok_or_else(|| {
                        StoreError::Permanent(format!(
                            "a retry batch of {} does not fit into a transaction: set batch.max_bytes lower",
                            settlement.token.batch
                        ))
                    })?;
                    parts.extend([right, left]);
                }
            }
            answers.push(answer);
        }
        Ok(answers)
    }

    /// Settles one part by itself; `None` if it does not fit.
    async fn settle_part(&mut self, shared: &Shared, part: &Part) -> Result<Option<Settled>, StoreError> {
        let settlement = Settlement {
            token: part.token,
            verdicts: part.verdicts.clone(),
            retries: part.retries.clone(),
            records: part.records.to_vec(),
        };
        for round in 0..ROUNDS {
            let mut known = Known::new();
            shared.know(&mut known, [part.token.batch], round == 0).await?;
            let worked_out = self
                .work_out(shared, &mut known, &Draft::default(), std::slice::from_ref(&settlement))
                .await?;
            let (draft, settled) = worked_out?;
            if !fits(&draft) {
                return Ok(None);
            }
            if let Written::Done = self.write(shared, &draft).await? {
                return Ok(settled.first().copied());
            }
            super::retry::back_off(round as u32).await;
        }
        Err(StoreError::Retryable("a batch keeps being changed by others".into()))
    }

    /// Writes a draft in one transaction.
    async fn write(&mut self, shared: &Shared, draft: &Draft) -> Result<Written, StoreError> {
        if draft.is_empty() {
            return Ok(Written::Done);
        }
        let created: BTreeMap<BatchId, u64> =
            draft.made_order.iter().map(|id| (*id, shared.stamp())).collect();
        let actions = self.actions(shared, draft, &created)?;
        match shared.calls.transact("recording outcomes", actions).await {
            Ok(Transacted::Done) => {}
            Ok(Transacted::Refused(_)) => {
                for id in draft.changed.keys() {
                    shared.forget_record(*id);
                }
                return Ok(Written::MovedOn);
            }
            Err(error) => {
                // It may have happened.
                for id in draft.changed.keys() {
                    shared.forget_record(*id);
                }
                shared.depth_unknown();
                shared.fresh().note_dropped();
                return Err(error);
            }
        }
        self.written(shared, draft, &created);
        Ok(Written::Done)
    }

    fn actions(
        &self,
        shared: &Shared,
        draft: &Draft,
        created: &BTreeMap<BatchId, u64>,
    ) -> Result<Vec<TransactWriteItem>, StoreError> {
        let table = &shared.calls.tables.ledger;
        let mut actions = Vec::with_capacity(draft.actions());
        for (id, record) in &draft.changed {
            actions.push(record.replace(table)?);
            if draft.had_dead[id] != record.has_dead() {
                actions.push(mark_dead(table, record)?);
            }
        }
        for (id, (batch, record)) in &draft.made {
            actions.extend(shared.batch_and_record(batch, record, created[id])?);
            if record.has_dead() {
                actions.push(mark_dead(table, record)?);
            }
        }
        for (of, change) in &draft.counts {
            actions.push(self.count(shared, of, change)?);
        }
        let depth = depth_change(draft);
        if depth != 0 {
            actions.push(shared.change_depth(DEPTH_SLOT, depth)?);
        }
        Ok(actions)
    }

    fn count(
        &self,
        shared: &Shared,
        of: &(FileId, Arc<str>),
        change: &CountChange,
    ) -> Result<TransactWriteItem, StoreError> {
        let mut names = vec![SENT, DEAD, RETRYING, CHANGES];
        let mut values = vec![
            ("Sent", number(change.sent)),
            ("Dead", number(change.dead)),
            ("Retrying", number(change.retrying)),
            ("one", number(1)),
        ];
        let mut update = String::from("ADD #Sent :Sent, #Dead :Dead, #Retrying :Retrying, #Changes :one");
        if let Some(at) = change.last_at.max(self.times.get(of).copied()).filter(|_| change.last_at.is_some())
        {
            update.push_str(" SET #LastAt = :LastAt");
            names.push(LAST_AT);
            values.push(("LastAt", time(at)));
        }
        Change {
            table: &shared.calls.tables.ledger,
            key: ledger_key(&schema::file_pk(of.0), &schema::counts_sk(&of.1, &shared.node)),
            update,
            condition: None,
            names,
            values,
        }
        .action()
    }

    /// Takes note of what a transaction has done.
    fn written(&mut self, shared: &Shared, draft: &Draft, created: &BTreeMap<BatchId, u64>) {
        for record in draft.changed.values() {
            let mut record = record.clone();
            record.version += 1;
            if record.unsettled == 0 && !record.has_dead() {
                lock(&shared.expiring).settled(record.id);
            }
            shared.cache_record(record);
        }
        for (of, change) in &draft.counts {
            if let Some(at) = change.last_at {
                if self.times.len() >= TIMES_MAX {
                    self.times.clear();
                }
                let last: &mut UnixMs = self.times.entry(of.clone()).or_default();
                *last = at.max(*last);
            }
        }
        shared.depth_changed(depth_change(draft));
        let files: HashSet<FileId> = draft.counts.keys().map(|(file, _)| *file).collect();
        for file in files {
            shared.touched_file(file);
        }
        let mut fresh = shared.fresh();
        for id in &draft.made_order {
            let (batch, record) = &draft.made[id];
            if record.unsettled > 0 {
                fresh.insert(batch.clone(), created[id]);
            } else {
                // Nothing is left to send of it, but it stands in the outbox.
                lock(&shared.expiring).unmarked(*id);
            }
        }
        // A 2xx of a stale worker may have settled what was yet to be dispatched.
        for (id, record) in &draft.changed {
            if record.unsettled == 0 && fresh.remove(*id) {
                lock(&shared.expiring).unmarked(*id);
            }
        }
    }

    /// Writes a redrive; whether it was as expected.
    pub(super) async fn write_redrive(&mut self, shared: &Shared, draft: &Draft) -> Result<bool, StoreError> {
        Ok(matches!(self.write(shared, draft).await?, Written::Done))
    }
}

fn part_of(settlement: &Settlement) -> Part {
    Part {
        token: settlement.token,
        verdicts: settlement.verdicts.clone(),
        retries: settlement.retries.clone(),
        // Only these have anything to say that is kept here.
        records: settlement.records.iter().filter(|record| record.detail.is_some()).cloned().collect(),
    }
}

pub(super) fn fits(draft: &Draft) -> bool {
    draft.actions() <= ACTIONS_MAX && draft.bytes() <= TRANSACTION_BYTES_MAX
}

fn answer_all(calls: impl Iterator<Item = Waiting>, error: &StoreError) {
    for call in calls {
        let _ = call.answer.send(Err(error.clone())); // nobody waits any more
    }
}

/// The action that lists a batch among those with dead messages, or takes it off the list.
fn mark_dead(table: &str, record: &Record) -> Result<TransactWriteItem, StoreError> {
    let sk = schema::dead_sk(record.file, &record.destination, record.first_row, record.id);
    let mut key = ledger_key(schema::DEAD_PK, &sk);
    if record.has_dead() {
        key.insert(COUNT.to_owned(), number(record.count));
        put(table, key, None)
    } else {
        delete(table, key)
    }
}

/// By how much the number of open messages changes.
fn depth_change(draft: &Draft) -> i64 {
    -draft.counts.values().map(|change| change.sent + change.dead).sum::<i64>()
}
