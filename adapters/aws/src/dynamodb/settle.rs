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
    collections::{BTreeMap, HashSet, VecDeque},
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
    draft::{Changed, Counted, Draft, Known},
    item::{CHANGES, COUNT, DEAD, LAST_AT, RETRYING, SENT, number, time},
    record::{Mark, Stored, Waiting},
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
pub(super) struct Call {
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
        lock(&self.waiting).push(Call { settlements, answer });
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
        let keys: Vec<_> = missing.iter().map(|id| Stored::key(*id)).collect();
        let found = self.calls.get_many("reading records", &self.calls.tables.ledger, &keys, None).await?;
        for (id, got) in missing.into_iter().zip(found) {
            let record = match got {
                Got::Item(item) => Some(Stored::read(&item)?),
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
    async fn run(&mut self, shared: &Shared, calls: Vec<Call>) {
        let mut calls = VecDeque::from(calls);
        while !calls.is_empty() {
            self.run_some(shared, &mut calls).await;
        }
    }

    /// Settles as many calls as fit into one transaction, at least the first.
    async fn run_some(&mut self, shared: &Shared, calls: &mut VecDeque<Call>) {
        let ids: Vec<_> =
            calls.iter().flat_map(|call| &call.settlements).map(|settlement| settlement.token).collect();
        // A record that is older than the token is of no use: somebody else's claim is newer still.
        for token in &ids {
            if shared.cached_record(token.batch).is_some_and(|stored| stored.record.fence < token.fence) {
                shared.forget_record(token.batch);
            }
        }
        for round in 0..ROUNDS {
            let mut known = Known::new();
            if let Err(error) = shared.know(&mut known, ids.iter().map(|token| token.batch), round == 0).await
            {
                return answer_all(calls.drain(..), &error);
            }
            let mut draft = Draft::default();
            let mut answers: Vec<Result<Vec<Settled>, StoreError>> = Vec::new();
            for call in calls.iter() {
                let mut next = draft.clone();
                let settled: Result<Vec<_>, _> =
                    call.settlements.iter().map(|settlement| next.settle(&known, settlement)).collect();
                match settled {
                    Ok(settled) if fits(&next) => {
                        draft = next;
                        answers.push(Ok(settled));
                    }
                    Ok(_) => break, // it begins the next transaction
                    Err(refused) => answers.push(Err(refused)),
                }
            }
            if answers.is_empty() {
                let call = calls.pop_front().expect("the caller has seen one");
                return halve(call, calls);
            }
            match self.write(shared, &draft).await {
                Ok(Written::Done) => {
                    for (call, answer) in calls.drain(..answers.len()).zip(answers) {
                        let _ = call.answer.send(answer); // nobody waits any more
                    }
                    return;
                }
                Ok(Written::MovedOn) => super::retry::back_off(round as u32).await,
                Err(error) => return answer_all(calls.drain(..answers.len()), &error),
            }
        }
        answer_all(calls.drain(..), &StoreError::Retryable("batches keep being changed by others".into()));
    }

    /// Writes a draft in one transaction.
    async fn write(&mut self, shared: &Shared, draft: &Draft) -> Result<Written, StoreError> {
        if draft.is_empty() {
            return Ok(Written::Done);
        }
        let waiting = draft.changed.iter();
        let waiting = waiting.filter_map(|(id, changed)| Some((*id, changed.waits()?)));
        let waiting: BTreeMap<BatchId, Waiting> =
            waiting.map(|(id, due)| (id, Waiting { created: shared.stamp(), due })).collect();
        let actions = self.actions(shared, draft, &waiting)?;
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
        self.written(shared, draft, &waiting);
        Ok(Written::Done)
    }

    fn actions(
        &self,
        shared: &Shared,
        draft: &Draft,
        waiting: &BTreeMap<BatchId, Waiting>,
    ) -> Result<Vec<TransactWriteItem>, StoreError> {
        let table = &shared.calls.tables.ledger;
        let mut actions = Vec::with_capacity(draft.actions());
        for (id, changed) in &draft.changed {
            let Changed { before, after, failures, .. } = changed;
            let mark = match waiting.get(id) {
                Some(waiting) => Mark::Outstanding(*waiting),
                // A 2xx of a stale worker may have settled what was yet to be dispatched.
                None if changed.is_done() => Mark::Dispatched { at: shared.stamp() },
                None => Mark::None,
            };
            actions.push(before.change(table, after, mark, &shared.settings.process).action()?);
            if !failures.is_empty() {
                actions.push(before.keep_history(table, failures)?);
            }
            if changed.changes_list() {
                actions.push(list_dead(table, before, after.has_dead())?);
            }
        }
        for (of, counted) in &draft.counts {
            actions.push(self.count(shared, of, counted)?);
        }
        let depth = draft.depth();
        if depth != 0 {
            actions.push(shared.change_depth(DEPTH_SLOT, depth)?);
        }
        Ok(actions)
    }

    fn count(
        &self,
        shared: &Shared,
        of: &(FileId, Arc<str>),
        counted: &Counted,
    ) -> Result<TransactWriteItem, StoreError> {
        let mut names = vec![SENT, DEAD, RETRYING, CHANGES];
        let mut values = vec![
            ("Sent", number(counted.change.sent)),
            ("Dead", number(counted.change.dead)),
            ("Retrying", number(counted.change.retrying)),
            ("one", number(1)),
        ];
        let mut update = String::from("ADD #Sent :Sent, #Dead :Dead, #Retrying :Retrying, #Changes :one");
        if let Some(at) =
            counted.last_at.max(self.times.get(of).copied()).filter(|_| counted.last_at.is_some())
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
    fn written(&mut self, shared: &Shared, draft: &Draft, waiting: &BTreeMap<BatchId, Waiting>) {
        for (id, changed) in &draft.changed {
            let stored = changed.before.changed_to(changed.after.clone());
            match waiting.get(id) {
                Some(waiting) => shared.waits(&stored, *waiting),
                None if changed.is_done() => {
                    shared.fresh().remove(*id);
                }
                None => {}
            }
            // Most batches are done with once they are settled.
            if stored.record.is_settled() {
                shared.forget_record(*id);
            } else {
                shared.cache_record(stored);
            }
        }
        for (of, counted) in &draft.counts {
            if let Some(at) = counted.last_at {
                if self.times.len() >= TIMES_MAX {
                    self.times.clear();
                }
                let last: &mut UnixMs = self.times.entry(of.clone()).or_default();
                *last = at.max(*last);
            }
        }
        shared.depth_changed(draft.depth());
        let files: HashSet<FileId> = draft.counts.keys().map(|(file, _)| *file).collect();
        for file in files {
            shared.touched_file(file);
        }
    }

    /// Writes a redrive; whether it was as expected.
    pub(super) async fn write_redrive(&mut self, shared: &Shared, draft: &Draft) -> Result<bool, StoreError> {
        Ok(matches!(self.write(shared, draft).await?, Written::Done))
    }
}

pub(super) fn fits(draft: &Draft) -> bool {
    draft.actions() <= ACTIONS_MAX && draft.bytes() <= TRANSACTION_BYTES_MAX
}

/// Divides a call that is too much for a transaction of its own: each part is sound by itself, and if only the first
/// is recorded, the whole can be repeated.
fn halve(call: Call, calls: &mut VecDeque<Call>) {
    let Call { mut settlements, answer } = call;
    if settlements.len() < 2 {
        // Of one batch: see the worst record's test.
        let _ =
            answer.send(Err(StoreError::Permanent("a settlement does not fit into a transaction".into())));
        return;
    }
    let (first, second) = (oneshot::channel(), oneshot::channel());
    let right = settlements.split_off(settlements.len() / 2);
    calls.push_front(Call { settlements: right, answer: second.0 });
    calls.push_front(Call { settlements, answer: first.0 });
    tokio::spawn(async move {
        let lost = |_| StoreError::Unknown("the recording was interrupted".into());
        let (first, second) = (first.1.await, second.1.await);
        let both = || -> Result<Vec<Settled>, StoreError> {
            let mut settled = first.map_err(lost)??;
            settled.extend(second.map_err(lost)??);
            Ok(settled)
        };
        let _ = answer.send(both()); // nobody waits any more
    });
}

fn answer_all(calls: impl Iterator<Item = Call>, error: &StoreError) {
    for call in calls {
        let _ = call.answer.send(Err(error.clone())); // nobody waits any more
    }
}

/// The action that lists a batch among those with dead messages, or takes it off the list.
fn list_dead(table: &str, stored: &Stored, has_dead: bool) -> Result<TransactWriteItem, StoreError> {
    let mut key = ledger_key(schema::DEAD_PK, &schema::dead_sk(stored));
    if has_dead {
        key.insert(COUNT.to_owned(), number(stored.rows.len() as u64));
        put(table, key, None)
    } else {
        delete(table, key)
    }
}
