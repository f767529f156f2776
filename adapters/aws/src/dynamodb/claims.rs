//! `Claims`: all batches of a request in one call, each under a condition of its own.
//!
//! `Record::lease` decides over records that were seen before, or are read; a change holds only if its record is still
//! as it was seen. Nobody is refused for what a record was like a while ago.

use std::collections::{BTreeSet, HashMap};

use postrider_actors::{
    flow::back_off,
    model::{
        ids::BatchId,
        ledger::{Deadline, Grant, Record, is_earlier_life},
        time::UnixMs,
    },
    ports::{Claim, ClaimRequest, Fetched, ItemOutcome, Lease, LeaseToken, Origin, Release, StoreError},
};

use super::{
    calls::StatementOutcome,
    change::{Change, When},
    item::{FENCE, HOLDER, UNTIL, number, time},
    record::{Records, StoredBatch, Transition},
    retry::BUDGET,
    state::Shared,
    waiting::Waiting,
};

/// How often changes are worked out anew when others came first.
const ROUNDS: usize = 10;

/// A change that was written, with the record as it stands then.
struct ChangedRecord {
    stored: StoredBatch,
    side: Transition,
    stamp: u64,
}

/// What a rule says to a change of one record.
enum Decision<T> {
    /// This is the record then, unless it has changed meanwhile.
    Change(Record),
    /// This is the answer if the record is as it is stored now.
    Answer(T),
}

impl Shared {
    /// Changes records as `decide` says, over what was seen of them before; the answers to those that are not changed.
    /// Those that keep being changed by others are in neither.
    async fn change_records<T>(
        &self,
        what: &str,
        ids: impl IntoIterator<Item = BatchId>,
        mut decide: impl FnMut(&StoredBatch) -> Decision<T>,
    ) -> Result<(Vec<ChangedRecord>, HashMap<BatchId, Result<T, ItemOutcome>>), StoreError> {
        let mut open: BTreeSet<BatchId> = ids.into_iter().collect();
        let (mut written, mut answers) = (Vec::new(), HashMap::new());
        for round in 0..ROUNDS {
            // What was cached may be out of date: an answer counts if the record was read.
            let is_cached = |id: &BatchId| round == 0 && self.cached_record(*id).is_some();
            let cached: BTreeSet<BatchId> = open.iter().copied().filter(is_cached).collect();
            let mut known = Records::new();
            self.look_up(&mut known, open.iter().copied(), round == 0).await?;
            let mut changes: Vec<(BatchId, StoredBatch, Transition, u64)> = Vec::new();
            let mut statements = Vec::new();
            for &id in &open {
                let Some(Some(stored)) = known.get(&id) else { continue };
                match decide(stored) {
                    Decision::Change(next) => {
                        let stamp = self.stamp();
                        let mut change = self.change(stored, &next, stamp);
                        if let Some(holder) = &stored.record.holder
                            && stored.record.fence != next.fence
                        {
                            // It may have been extended since.
                            change = change.when(When::Is(UNTIL, number(holder.until.0)));
                        }
                        statements.push(change.statement());
                        changes.push((id, stored.changed_to(next.clone()), stored.transition(&next), stamp));
                    }
                    Decision::Answer(answer) if !cached.contains(&id) => {
                        answers.insert(id, Ok(answer));
                    }
                    Decision::Answer(_) => {}
                }
            }
            open.retain(|id| !answers.contains_key(id) && known.get(id).is_none_or(Option::is_some));
            let stated = self.calls.execute(what, statements).await;
            for ((id, stored, side, stamp), stated) in changes.into_iter().zip(stated) {
                match stated {
                    StatementOutcome::Done => {
                        self.cache_record(stored.clone());
                        written.push(ChangedRecord { stored, side, stamp });
                    }
                    // Others came first; or an earlier try that was not answered.
                    StatementOutcome::Refused => {
                        self.forget_record(id);
                        continue;
                    }
                    StatementOutcome::Failed(outcome) => {
                        self.forget_record(id);
                        answers.insert(id, Err(outcome));
                    }
                }
                open.remove(&id);
            }
            if open.is_empty() {
                break;
            }
            if round > 0 {
                back_off(BUDGET.backoff, round as u32 + 1).await;
            }
        }
        let moving = |id| (id, Err(ItemOutcome::Retryable(format!("batch {id} is being changed by others"))));
        answers.extend(open.into_iter().map(moving));
        Ok((written, answers))
    }

    pub(super) fn change(&self, stored: &StoredBatch, next: &Record, at: u64) -> Change<'_> {
        stored.change(&self.calls.tables.ledger, next, self.stamp_of(next, at))
    }

    pub(super) async fn claim(&self, request: &ClaimRequest) -> Result<Vec<(BatchId, Claim)>, StoreError> {
        let cluster = self.cluster_state().await?;
        // Deadlines go by the store's time (B23), which is that of all machines.
        let (until, now) = (self.time.at(request.until), self.time.at(request.now));
        let decide = |stored: &StoredBatch| {
            if cluster.disabled.contains_key(&*stored.destination) {
                let why = format!("destination {} is disabled", stored.destination);
                return Decision::Answer(Claim::Unavailable(why));
            }
            let is_held = cluster.hold_of(stored.file, &stored.destination, stored.rows.row(0)).is_some();
            if (is_held || self.is_closed(stored.file, &stored.destination, request.now))
                && !stored.record.is_settled()
            {
                return Decision::Answer(Claim::Waits);
            }
            let mut next = stored.record.clone();
            self.lose_by_evidence(stored.id, &mut next, request);
            // What has only just run out may be extended yet.
            let ran_out = Deadline(now.0.saturating_sub(self.settings.clock_margin.as_millis() as u64));
            match next.lease(&request.holder, Deadline(until.0), ran_out, request.now, request.born) {
                Grant::Granted => Decision::Change(next),
                Grant::Held { until } => {
                    Decision::Answer(Claim::Held { until: self.time.wall(UnixMs(until.0)) })
                }
                Grant::Early { due } => Decision::Answer(Claim::Early { due }),
                Grant::Settled => Decision::Answer(Claim::Settled),
            }
        };
        let ids = request.batches.iter().copied();
        let changed = self.change_records("claiming batches", ids, decide).await;
        let (written, refused) = match changed {
            Ok(changed) => changed,
            Err(StoreError::Permanent(why)) => return Err(StoreError::Permanent(why)),
            Err(StoreError::Retryable(why) | StoreError::Denied(why) | StoreError::Unknown(why)) => {
                let claim = |id: &BatchId| (*id, Claim::Unavailable(why.clone()));
                return Ok(request.batches.iter().map(claim).collect());
            }
        };
        let mut answers: HashMap<BatchId, Claim> = HashMap::new();
        for (id, refused) in refused {
            let claim = match refused {
                Ok(claim) => claim,
                Err(
                    ItemOutcome::Retryable(why) | ItemOutcome::Unknown(why) | ItemOutcome::Permanent(why),
                ) => Claim::Unavailable(why),
                Err(ItemOutcome::Ok) => unreachable!("what failed has a reason"),
            };
            match &claim {
                // What somebody else has is listed again when his claim runs out.
                Claim::Held { .. } | Claim::Settled => self.waiting().remove(id),
                Claim::Early { due } => self.waits_until(id, *due),
                _ => {}
            }
            answers.insert(id, claim);
        }
        answers.extend(self.leases_of(written).await?);
        Ok(request
            .batches
            .iter()
            .map(|id| (*id, answers.get(id).cloned().unwrap_or(Claim::Missing)))
            .collect())
    }

    /// What was claimed, with what it carries. What can't be read is given back.
    async fn leases_of(&self, written: Vec<ChangedRecord>) -> Result<Vec<(BatchId, Claim)>, StoreError> {
        for ChangedRecord { stored, stamp, .. } in &written {
            // The answer may be late: what was left to be tried again since waits.
            self.waiting().remove_until(stored.id, *stamp);
        }
        let claimed: Vec<_> = written.iter().map(|written| &written.stored).collect();
        let fetched = self.payloads_of(&claimed).await;
        let mut claims = Vec::with_capacity(claimed.len());
        let (mut back, mut gone) = (Vec::new(), Vec::new());
        for stored in claimed {
            let token = LeaseToken { batch: stored.id, fence: stored.record.fence };
            let why = match fetched.as_ref().map(|fetched| fetched.get(&stored.id)) {
                Ok(Some(Fetched::Batch(batch))) => {
                    let lease =
                        Lease::of(stored.id, batch.header.clone(), batch.payload.clone(), &stored.record);
                    claims.push((stored.id, Claim::Granted(Box::new(lease))));
                    continue;
                }
                Ok(Some(Fetched::Missing)) => {
                    tracing::error!(batch = %stored.id, "its rows are gone from the outbox table, or damaged; it can't be sent");
                    back.push(token);
                    gone.push(stored.id);
                    claims.push((stored.id, Claim::Missing));
                    continue;
                }
                Ok(Some(Fetched::Unprocessed) | None) => "its rows were not read".to_owned(),
                Err(error) => error.to_string(),
            };
            back.push(token);
            claims.push((stored.id, Claim::Unavailable(why)));
        }
        if !back.is_empty() {
            self.release_claims(&back, Release::Unused).await?;
        }
        // A sweep looks at it again, now and then; asked for at once, it would be claimed for nothing as fast as can be.
        for id in gone {
            self.waiting().remove(id);
        }
        Ok(claims)
    }

    /// A claim of this node's last life: what was in flight when it died may be known.
    fn lose_by_evidence(&self, id: BatchId, record: &mut Record, request: &ClaimRequest) {
        let holder = record.holder.as_ref().map(|holder| holder.name.as_str());
        if holder.is_some_and(|holder| is_earlier_life(holder, &request.holder)) {
            record.lose_by(&self.settings.evidence, id);
        }
    }

    pub(super) async fn extend_claims(
        &self,
        tokens: &[LeaseToken],
        until: UnixMs,
    ) -> Vec<(BatchId, ItemOutcome)> {
        let until = self.time.at(until);
        let mut distinct: Vec<LeaseToken> = Vec::with_capacity(tokens.len());
        for token in tokens {
            // Two statements of one call may not be about one item: of two tokens the later one counts.
            match distinct.iter_mut().find(|other| other.batch == token.batch) {
                Some(other) if other.fence < token.fence => *other = *token,
                Some(_) => {}
                None => distinct.push(*token),
            }
        }
        let extend = |token: &LeaseToken| {
            // No index holds the deadline (B20), and no version counts it.
            Change::of(&self.calls.tables.ledger, StoredBatch::key(token.batch))
                .set(UNTIL, time(until))
                .when(When::Is(FENCE, number(token.fence)))
                .when(When::Exists(HOLDER))
                .statement()
        };
        let answers = self.calls.execute("extending claims", distinct.iter().map(extend).collect()).await;
        let answers: Vec<_> = distinct.into_iter().zip(answers.into_iter().map(extended)).collect();
        let not_held = || ItemOutcome::Permanent("the claim is not held any more".into());
        tokens
            .iter()
            .map(|token| {
                let answer = answers.iter().find(|(answered, _)| answered == token);
                (token.batch, answer.map_or_else(not_held, |(_, outcome)| outcome.clone()))
            })
            .collect()
    }

    /// Gives claims back; batches of which messages are left wait again, due when the first of them is.
    pub(super) async fn release_claims(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        let mut fences: HashMap<BatchId, u64> = HashMap::new();
        for token in tokens {
            let fence = fences.entry(token.batch).or_default();
            *fence = token.fence.max(*fence);
        }
        let decide = |stored: &StoredBatch| {
            if !stored.record.is_current(fences[&stored.id]) {
                // It is ignored; or a try that was not answered has done it.
                return Decision::Answer(stored.clone());
            }
            let mut next = stored.record.clone();
            match how {
                Release::Unused | Release::Closed { .. } => {
                    next.release(fences[&stored.id]);
                }
                Release::Lost => next.lose(),
            }
            Decision::Change(next)
        };
        let ids: Vec<_> = fences.keys().copied().collect();
        if let Release::Closed { from, until } = how {
            // Before they wait again.
            self.close(&ids, from..until).await?;
        }
        let (written, answers) = self.change_records("releasing claims", ids, decide).await?;
        for ChangedRecord { stored, side, stamp } in &written {
            if let Transition::Waits(due) = side {
                self.waits(stored, *due, *stamp);
            }
        }
        let mut failed = None;
        for (_, answer) in answers {
            match answer {
                Ok(stored) => {
                    if let (Some(due), None) = (stored.record.due(), &stored.record.holder) {
                        self.waits(&stored, due, self.stamp());
                    }
                }
                Err(ItemOutcome::Unknown(why)) => failed = Some(StoreError::Unknown(why)),
                Err(ItemOutcome::Permanent(why)) => failed = Some(StoreError::Permanent(why)),
                Err(ItemOutcome::Retryable(why)) => {
                    failed = failed.or(Some(StoreError::Retryable(why)));
                }
                Err(ItemOutcome::Ok) => {}
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Takes note that nobody has a batch now: this process sends a hint of it when it is due.
    pub(super) fn waits(&self, stored: &StoredBatch, due: UnixMs, stamp: u64) {
        // No earlier than others: what was written a moment ago says so.
        let look_at = due.max(self.store_now()).after(self.settings.grace);
        self.waiting().insert(Waiting::of(stored, due, stamp, look_at, Origin::Fresh));
    }

    /// A batch that waits is not due before then.
    fn waits_until(&self, id: BatchId, due: UnixMs) {
        if let Some(stored) = self.cached_record(id) {
            let look_at = due.max(self.store_now()).after(self.settings.grace);
            self.waiting().insert(Waiting::of(&stored, due, self.stamp(), look_at, Origin::Found));
        }
    }
}

fn extended(answer: StatementOutcome) -> ItemOutcome {
    match answer {
        StatementOutcome::Done => ItemOutcome::Ok,
        StatementOutcome::Refused => ItemOutcome::Permanent("the claim is not held any more".into()),
        StatementOutcome::Failed(outcome) => outcome,
    }
}
