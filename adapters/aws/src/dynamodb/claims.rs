//! `Claims`: one conditional update per batch, which brings back what the worker needs and no payload.
//!
//! `Record::lease` decides over a record that was seen before, or is read; the update holds only if it is still so.
//! Nobody is refused for what a record was like a while ago.

use futures_util::{StreamExt as _, stream};
use postrider_actors::{
    model::{
        ids::BatchId,
        ledger::{Deadline, Grant, Record, is_earlier_life},
        time::UnixMs,
    },
    ports::{Claim, ClaimRequest, ItemOutcome, LeaseToken, Release, StoreError},
};

use super::{
    calls::{Change, PARALLEL_CALLS, Stated},
    draft::Known,
    item::{DUE, FENCE, HOLDER, OUTSTANDING_CREATED_TIME, PK, Reading, SK, UNTIL, number, text, time},
    record::{Mark, Stored, Waiting},
    schema,
    state::Shared,
};

/// How often a claim is tried again when another change came first.
const ROUNDS: usize = 4;

/// The same for a release, which nobody else does.
const RELEASE_ROUNDS: usize = 10;

/// A record that was stored when it was written or read.
enum Written {
    Done(Stored),
    /// The record is another one by now, and outstanding or not.
    MovedOn(Stored, Option<Waiting>),
    Gone,
}

impl Shared {
    pub(super) async fn claim(&self, request: &ClaimRequest) -> Result<Vec<(BatchId, Claim)>, StoreError> {
        let disabled = self.disabled_set().await?;
        let mut known = Known::new();
        if let Err(error) = self.know(&mut known, request.batches.iter().copied(), true).await {
            return match error {
                StoreError::Permanent(_) => Err(error),
                StoreError::Retryable(why) | StoreError::Denied(why) | StoreError::Unknown(why) => {
                    let claim = |id: &BatchId| (*id, Claim::Unavailable(why.clone()));
                    Ok(request.batches.iter().map(claim).collect())
                }
            };
        }
        let claims = request.batches.iter().map(|&id| {
            let (disabled, seen) = (disabled.clone(), known.remove(&id).flatten());
            async move {
                let Some(seen) = seen else { return Ok((id, Claim::Missing)) };
                if disabled.contains(&seen.destination) {
                    let why = format!("destination {} is disabled", seen.destination);
                    return Ok((id, Claim::Unavailable(why)));
                }
                match self.claim_one(request, seen).await {
                    Ok(claim) => Ok((id, claim)),
                    Err(StoreError::Permanent(why)) => Err(StoreError::Permanent(why)),
                    Err(error) => Ok((id, Claim::Unavailable(error.to_string()))),
                }
            }
        });
        let claims: Vec<_> =
            stream::iter(claims.collect::<Vec<_>>()).buffered(PARALLEL_CALLS).collect().await;
        claims.into_iter().collect()
    }

    async fn claim_one(&self, request: &ClaimRequest, mut seen: Stored) -> Result<Claim, StoreError> {
        let id = seen.id;
        let (until, now) = (Deadline(request.until.0), Deadline(request.now.0));
        let mut is_current = false;
        for _ in 0..ROUNDS {
            let mut next = seen.record.clone();
            self.lose_by_evidence(id, &mut next, request);
            let grant = next.lease(&request.holder, until, now, request.now, request.born);
            let mark = match grant {
                Grant::Granted => Mark::Dispatched { at: self.stamp() },
                _ if !is_current => {
                    // Perhaps it was only so when it was cached.
                    let mut known = Known::new();
                    self.know(&mut known, [id], false).await?;
                    let Some(found) = known.remove(&id).flatten() else { return Ok(Claim::Missing) };
                    is_current = true;
                    seen = found;
                    continue;
                }
                Grant::Held { until } => return Ok(Claim::Held { until: UnixMs(until.0) }),
                Grant::Settled => return Ok(Claim::Settled),
                // The queue may forget its entry: the batch comes again when it is due.
                Grant::Early { due } => Mark::Outstanding(Waiting { created: self.stamp(), due }),
            };
            let mut change = self.change(&seen, &next, mark);
            if let Some(holder) = &seen.record.holder {
                // It may have been extended since.
                change.condition = Some("#Version = :Version AND #Until = :seen");
                change.names.push(UNTIL);
                change.values.push(("seen", number(holder.until.0)));
            }
            match self.write("claiming a batch", change).await? {
                Written::Done(stored) => {
                    if let (Grant::Early { due }, Mark::Outstanding(waiting)) = (grant, mark) {
                        self.waits(&stored, waiting);
                        return Ok(Claim::Early { due });
                    }
                    if let Mark::Dispatched { at } = mark {
                        // The answer may be late: what was left to be tried again since is not dispatched.
                        self.fresh().remove_before(id, at);
                    }
                    return Ok(Claim::Granted(Box::new(stored.record)));
                }
                Written::MovedOn(stored, _) => {
                    seen = stored;
                    is_current = true;
                }
                Written::Gone => return Ok(Claim::Missing),
            }
        }
        Ok(Claim::Unavailable(format!("batch {id} is being changed by somebody else")))
    }

    /// A claim of this node's last life: what was in flight when it died may be known.
    fn lose_by_evidence(&self, id: BatchId, record: &mut Record, request: &ClaimRequest) {
        let holder = record.holder.as_ref().map(|holder| holder.name.as_str());
        if holder.is_some_and(|holder| is_earlier_life(holder, &request.holder)) {
            record.lose_by(&self.settings.evidence, id);
        }
    }

    fn change<'a>(&'a self, stored: &Stored, next: &Record, mark: Mark) -> Change<'a> {
        stored.change(&self.calls.tables.ledger, next, mark, &self.settings.process)
    }

    /// Writes one record's change, and remembers how it stands then.
    async fn write(&self, what: &str, change: Change<'_>) -> Result<Written, StoreError> {
        let updated = self.calls.update(what, change).await.inspect_err(|_| {
            // It may have happened, and left something outstanding.
            self.fresh().note_dropped();
        })?;
        Ok(match updated {
            Ok(item) => {
                let stored = Stored::read(&item)?;
                self.cache_record(stored.clone());
                Written::Done(stored)
            }
            Err(Some(item)) => {
                let stored = Stored::read(&item)?;
                self.cache_record(stored.clone());
                let reading = Reading(&item);
                let waiting = match reading.maybe_number(OUTSTANDING_CREATED_TIME)? {
                    Some(created) => Some(Waiting { created, due: reading.time(DUE)? }),
                    None => None,
                };
                Written::MovedOn(stored, waiting)
            }
            Err(None) => Written::Gone,
        })
    }

    pub(super) async fn extend_claims(
        &self,
        tokens: &[LeaseToken],
        until: UnixMs,
    ) -> Vec<(BatchId, ItemOutcome)> {
        let table = &self.calls.tables.ledger;
        let statement = format!(
            "UPDATE \"{table}\" SET {UNTIL}=? WHERE {PK}=? AND {SK}=? AND {FENCE}=? AND {HOLDER} IS NOT MISSING"
        );
        let mut distinct: Vec<LeaseToken> = Vec::with_capacity(tokens.len());
        for token in tokens {
            // Two statements of one call may not be about one item: of two tokens the later one counts.
            match distinct.iter_mut().find(|other| other.batch == token.batch) {
                Some(other) if other.fence < token.fence => *other = *token,
                Some(_) => {}
                None => distinct.push(*token),
            }
        }
        let statements = distinct
            .iter()
            .map(|token| {
                let key = [text(schema::batch_pk(token.batch)), text(schema::BATCH_SK)];
                let parameters = [time(until)].into_iter().chain(key).chain([number(token.fence)]);
                (statement.clone(), parameters.collect())
            })
            .collect();
        let answers = self.calls.execute("extending claims", statements).await;
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

    pub(super) async fn release_claims(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        let releases: Vec<_> = tokens.iter().map(|token| self.release_one(*token, how)).collect();
        let released: Vec<_> = stream::iter(releases).buffered(PARALLEL_CALLS).collect().await;
        released.into_iter().collect()
    }

    /// Gives a claim back; a batch of which messages are left is outstanding again, due when the first of them is.
    async fn release_one(&self, token: LeaseToken, how: Release) -> Result<(), StoreError> {
        let mut known = Known::new();
        self.know(&mut known, [token.batch], true).await?;
        let mut seen = known.remove(&token.batch).flatten();
        let mut is_current = false;
        let mut found = None;
        for _ in 0..RELEASE_ROUNDS {
            let Some(stored) = seen else { return Ok(()) };
            if !stored.record.is_current(token.fence) {
                if is_current || stored.record.fence > token.fence {
                    // A token that is not current is ignored; or a try that was not answered has done it.
                    match found {
                        Some(waiting) => self.waits(&stored, waiting),
                        // Or an earlier call, and then nobody has remembered it.
                        None => self.fresh().note_dropped(),
                    }
                    return Ok(());
                }
                let mut known = Known::new();
                self.know(&mut known, [token.batch], false).await?;
                seen = known.remove(&token.batch).flatten();
                is_current = true;
                continue;
            }
            let mut next = stored.record.clone();
            match how {
                Release::Unused => {
                    next.release(token.fence);
                }
                Release::Lost => next.lose(),
            }
            let waiting = next.due().map(|due| Waiting { created: self.stamp(), due });
            let mark = waiting.map_or(Mark::None, Mark::Outstanding);
            let change = self.change(&stored, &next, mark);
            match self.write("releasing a claim", change).await? {
                Written::Done(stored) => {
                    if let Some(waiting) = waiting {
                        self.waits(&stored, waiting);
                    }
                    return Ok(());
                }
                Written::MovedOn(stored, outstanding) => {
                    seen = Some(stored);
                    is_current = true;
                    found = outstanding;
                }
                Written::Gone => return Ok(()),
            }
        }
        Err(StoreError::Retryable(format!("batch {} is being changed by somebody else", token.batch)))
    }
}

fn extended(answer: Stated) -> ItemOutcome {
    match answer {
        Stated::Done => ItemOutcome::Ok,
        Stated::Refused => ItemOutcome::Permanent("the claim is not held any more".into()),
        Stated::Failed(outcome) => outcome,
    }
}
