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
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use aws_sdk_dynamodb::types::TransactWriteItem;
use postrider_actors::{
    flow::back_off,
    model::{
        ids::{BatchId, FileId},
        time::{MonoMs, UnixMs},
    },
    ports::{Settled, Settlement, StoreError},
};
use tokio::sync::oneshot;

use super::{
    cache::lock,
    calls::{ACTIONS_MAX, TRANSACTION_BYTES_MAX, TransactOutcome},
    change::{Change, delete, put},
    draft::{CountDelta, Draft, RecordChange},
    item::{
        CANCELLED, CHANGES, COUNT, DEAD, DIGEST, KEPT_UNTIL, LAST_AT, RETRYING, SENT, UNSENT, number, text,
        time,
    },
    keys::{self, ledger_key},
    lane::{SettleCall, SettleLane},
    record::{Records, StoredBatch, Transition},
    retry::BUDGET,
    state::Shared,
};

/// The lane's own depth counter.
const DEPTH_SLOT: &str = "s";

/// Outcomes that are worth a transaction of their own.
const GROUP_MIN: usize = 200;

/// How often a transaction is worked out anew when records have moved on.
const ROUNDS: usize = 10;

/// Files and destinations whose last settling times are remembered.
const TIMES_MAX: usize = 10_000;

/// What a transaction came to.
enum Commit {
    Done,
    /// Some records were not as expected: they are to be read again.
    Conflict,
}

impl Shared {
    pub(super) async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<Settled>, StoreError> {
        let (answer, mut answered) = oneshot::channel();
        lock(&self.settling).push(SettleCall { settlements, answer });
        self.more_to_settle.notify_one();
        let mut lane = self.lane.lock().await;
        // Whoever had the lane before may have taken it along.
        if let Ok(answer) = answered.try_recv() {
            return answer;
        }
        lane.linger(self).await;
        let group = std::mem::take(&mut *lock(&self.settling));
        lane.run(self, group).await;
        drop(lane);
        answered.await.unwrap_or_else(|_| Err(StoreError::Unknown("the recording was interrupted".into())))
    }
}

impl SettleLane {
    /// Waits for what other workers settle soon: a transaction for all of them costs a call. What is enough for one waits
    /// for nothing.
    async fn linger(&mut self, shared: &Shared) {
        let linger = shared.settings.settle_linger;
        let until = self.began.map_or(MonoMs(0), |began| began.after(linger));
        loop {
            let verdicts: usize = {
                let waiting = lock(&shared.settling);
                waiting.iter().flat_map(|call| &call.settlements).map(|one| one.verdicts.len()).sum()
            };
            let left = until.since(shared.clock.mono());
            if verdicts >= GROUP_MIN || left.is_zero() {
                break;
            }
            // Woken for nothing, it looks again.
            let _ = tokio::time::timeout(left, shared.more_to_settle.notified()).await;
        }
        self.began = Some(shared.clock.mono());
    }

    async fn run(&mut self, shared: &Shared, calls: Vec<SettleCall>) {
        let mut calls = VecDeque::from(calls);
        while !calls.is_empty() {
            self.run_some(shared, &mut calls).await;
        }
    }

    /// Settles as many calls as fit into one transaction, at least the first.
    async fn run_some(&mut self, shared: &Shared, calls: &mut VecDeque<SettleCall>) {
        let ids: Vec<_> =
            calls.iter().flat_map(|call| &call.settlements).map(|settlement| settlement.token).collect();
        // A record that is older than the token is of no use: somebody else's claim is newer still.
        for token in &ids {
            if shared.cached_record(token.batch).is_some_and(|stored| stored.record.fence < token.fence) {
                shared.forget_record(token.batch);
            }
        }
        for round in 0..ROUNDS {
            let mut known = Records::new();
            if let Err(error) =
                shared.look_up_all(&mut known, ids.iter().map(|token| token.batch), round == 0).await
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
                Ok(Commit::Done) => {
                    for (call, answer) in calls.drain(..answers.len()).zip(answers) {
                        let _ = call.answer.send(answer); // nobody waits any more
                    }
                    return;
                }
                Ok(Commit::Conflict) => back_off(BUDGET.backoff, round as u32 + 1).await,
                Err(error) => return answer_all(calls.drain(..answers.len()), &error),
            }
        }
        answer_all(calls.drain(..), &StoreError::Retryable("batches keep being changed by others".into()));
    }

    /// Writes a draft in one transaction.
    async fn write(&mut self, shared: &Shared, draft: &Draft) -> Result<Commit, StoreError> {
        if draft.is_empty() {
            return Ok(Commit::Done);
        }
        let stamps: BTreeMap<BatchId, u64> = draft.changed.keys().map(|id| (*id, shared.stamp())).collect();
        let actions = self.actions(shared, draft, &stamps)?;
        match shared.calls.transact("recording outcomes", actions).await {
            Ok(TransactOutcome::Done) => {}
            Ok(TransactOutcome::Refused(_)) => {
                for id in draft.changed.keys() {
                    shared.forget_record(*id);
                }
                return Ok(Commit::Conflict);
            }
            Err(error) => {
                // It may have happened; what waits then, a sweep finds.
                for id in draft.changed.keys() {
                    shared.forget_record(*id);
                }
                shared.depth.unknown();
                return Err(error);
            }
        }
        self.written(shared, draft, &stamps);
        Ok(Commit::Done)
    }

    fn actions(
        &self,
        shared: &Shared,
        draft: &Draft,
        stamps: &BTreeMap<BatchId, u64>,
    ) -> Result<Vec<TransactWriteItem>, StoreError> {
        let table = &shared.calls.tables.ledger;
        let mut actions = Vec::with_capacity(draft.actions());
        for (id, changed) in &draft.changed {
            let RecordChange { before, after, failures, payload } = changed;
            let mut change = shared.change(before, after, stamps[id]);
            if let Some((payload, until)) = payload {
                let kept_until = number(until.0 / 1000);
                change.set.extend([(DIGEST, text(payload.to_string())), (KEPT_UNTIL, kept_until)]);
            }
            actions.push(change.action()?);
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
        if !depth.is_empty() {
            actions.push(shared.depth.change(&shared.calls.tables.ledger, DEPTH_SLOT, &depth)?);
        }
        Ok(actions)
    }

    fn count(
        &self,
        shared: &Shared,
        of: &(FileId, Arc<str>),
        counted: &CountDelta,
    ) -> Result<TransactWriteItem, StoreError> {
        let key = ledger_key(&keys::file_pk(of.0), &keys::counts_sk(&of.1, &shared.node));
        let mut change = Change::of(&shared.calls.tables.ledger, key)
            .add(SENT, number(counted.change.sent))
            .add(DEAD, number(counted.change.dead))
            .add(RETRYING, number(counted.change.retrying))
            .add(UNSENT, number(counted.change.unsent))
            .add(CANCELLED, number(counted.change.cancelled))
            .add(CHANGES, number(1));
        if counted.last_at.is_some() {
            let last_at = counted.last_at.max(self.times.get(of).copied());
            change.set.extend(last_at.map(|at| (LAST_AT, time(at))));
        }
        change.action()
    }

    /// Takes note of what a transaction has done.
    fn written(&mut self, shared: &Shared, draft: &Draft, stamps: &BTreeMap<BatchId, u64>) {
        for (id, changed) in &draft.changed {
            let mut stored = changed.before.changed_to(changed.after.clone());
            if let Some((payload, until)) = changed.payload {
                (stored.payload, stored.kept_until) = (payload, UnixMs(until.0 / 1000 * 1000));
            }
            match changed.before.transition(&changed.after) {
                Transition::Waits(due) => shared.waits(&stored, due, stamps[id]),
                Transition::Done => shared.waiting().remove(*id),
                Transition::Same | Transition::Claimed => {}
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
        shared.depth.changed(&draft.depth());
        for ((file, _), counted) in &draft.counts {
            shared.touched_file(*file, counted.change.settled());
        }
    }

    /// Writes what an operator changes; whether it was as expected.
    pub(super) async fn write_change(&mut self, shared: &Shared, draft: &Draft) -> Result<bool, StoreError> {
        Ok(matches!(self.write(shared, draft).await?, Commit::Done))
    }
}

pub(super) fn fits(draft: &Draft) -> bool {
    draft.actions() <= ACTIONS_MAX && draft.bytes() <= TRANSACTION_BYTES_MAX
}

/// Divides a call that is too much for a transaction of its own: each part is sound by itself, and if only the first
/// is recorded, the whole can be repeated.
fn halve(call: SettleCall, calls: &mut VecDeque<SettleCall>) {
    let SettleCall { mut settlements, answer } = call;
    if settlements.len() < 2 {
        // Of one batch: see the worst record's test.
        let _ =
            answer.send(Err(StoreError::Permanent("a settlement does not fit into a transaction".into())));
        return;
    }
    let (first, second) = (oneshot::channel(), oneshot::channel());
    let right = settlements.split_off(settlements.len() / 2);
    calls.push_front(SettleCall { settlements: right, answer: second.0 });
    calls.push_front(SettleCall { settlements, answer: first.0 });
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

fn answer_all(calls: impl Iterator<Item = SettleCall>, error: &StoreError) {
    for call in calls {
        let _ = call.answer.send(Err(error.clone())); // nobody waits any more
    }
}

/// The action that lists a batch among those with dead messages, or takes it off the list.
fn list_dead(table: &str, stored: &StoredBatch, has_dead: bool) -> Result<TransactWriteItem, StoreError> {
    let mut key = ledger_key(
        keys::DEAD_PK,
        &keys::dead_sk(stored.file, &stored.destination, stored.rows.row(0), stored.id),
    );
    if has_dead {
        key.insert(COUNT.to_owned(), number(stored.rows.len() as u64));
        put(table, key, None)
    } else {
        delete(table, key)
    }
}
