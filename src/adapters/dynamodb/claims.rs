//! `Claims`: one conditional update per batch, which brings back what the worker needs and no payload.

use futures_util::{StreamExt as _, stream};
use postrider_actors::{
    model::{ids::BatchId, lease::is_earlier_life, time::UnixMs},
    ports::{Claim, ClaimRequest, ItemOutcome, LeaseToken, Release, StoreError},
};

use super::{
    calls::{Change, PARALLEL_CALLS, Stated},
    item::{FENCE, HOLDER, Item, LOSSES, PK, SK, UNSETTLED, UNTIL, VERSION, number, text, time},
    record::Record,
    schema,
    state::Shared,
};

/// How often a claim is tried again when another one came first.
const ROUNDS: usize = 4;

impl Shared {
    pub(super) async fn claim(&self, request: &ClaimRequest) -> Result<Vec<(BatchId, Claim)>, StoreError> {
        let disabled = self.disabled_set().await?;
        let claims = request.batches.iter().map(|&id| {
            let disabled = disabled.clone();
            async move {
                let is_disabled = |record: &Record| disabled.contains(&record.destination);
                let claim = match self.claim_one(request, id, is_disabled).await {
                    Ok(claim) => claim,
                    Err(StoreError::Permanent(why)) => return Err(StoreError::Permanent(why)),
                    Err(error) => Claim::Unavailable(error.to_string()),
                };
                if !matches!(claim, Claim::Missing | Claim::Unavailable(_)) {
                    // Whoever claimed it has it from the queue: it is dispatched, marked or not.
                    self.take_for_dispatched(id);
                }
                Ok((id, claim))
            }
        });
        let claims: Vec<_> =
            stream::iter(claims.collect::<Vec<_>>()).buffered(PARALLEL_CALLS).collect().await;
        claims.into_iter().collect()
    }

    async fn claim_one(
        &self,
        request: &ClaimRequest,
        id: BatchId,
        is_disabled: impl Fn(&Record) -> bool,
    ) -> Result<Claim, StoreError> {
        // What most batches are: not held by anybody.
        let mut expected: Option<Record> = None;
        for _ in 0..ROUNDS {
            let change = self.claiming(request, id, expected.as_ref());
            let record = match self.calls.update("claiming a batch", change).await? {
                Ok(item) => {
                    let record = Record::read(&item)?;
                    if is_disabled(&record) {
                        return self.undo(&record).await;
                    }
                    return Ok(self.granted(record));
                }
                Err(None) => return Ok(Claim::Missing),
                Err(Some(item)) => Record::read(&item)?,
            };
            if record.unsettled == 0 {
                return Ok(Claim::Settled);
            }
            if is_disabled(&record) {
                return Ok(unavailable(&record));
            }
            if let Some(held) = &record.held {
                let is_ours = held.holder == *request.holder;
                let is_lost = held.until < request.now || is_earlier_life(&held.holder, &request.holder);
                if !is_lost && !is_ours {
                    return Ok(Claim::Held { until: held.until });
                }
            }
            expected = Some(record);
        }
        Ok(Claim::Unavailable(format!("batch {id} is being changed by somebody else")))
    }

    /// The update that claims a batch as `expected` has it, or one that nobody holds.
    fn claiming<'a>(&'a self, request: &ClaimRequest, id: BatchId, expected: Option<&Record>) -> Change<'a> {
        let mut names = vec![HOLDER, UNTIL, VERSION, UNSETTLED];
        let mut values = vec![
            ("Holder", text(&*request.holder)),
            ("Until", time(request.until)),
            ("one", number(1)),
            ("zero", number(0)),
        ];
        let mut update = String::from("SET #Holder = :Holder, #Until = :Until, #Version = #Version + :one");
        let held = expected.and_then(|record| record.held.as_ref());
        // What a holder has already is granted to it again: its first answer was lost. That goes for a claim
        // that has run out, too, only then it is a lost one.
        let again = held.is_some_and(|held| held.holder == *request.holder && held.until >= request.now);
        if !again {
            update.push_str(", #Fence = #Fence + :one");
            names.push(FENCE);
            if held.is_some() {
                update.push_str(", #Losses = #Losses + :one");
                names.push(LOSSES);
            }
        }
        let condition = if let Some(record) = expected {
            values.push(("Version", number(record.version)));
            // Its holder may have extended it since.
            if held.is_some() {
                let until = held.map_or(UnixMs(0), |held| held.until);
                values.push(("seen", time(until)));
                "attribute_exists(Pk) AND #Version = :Version AND #Until = :seen AND #Unsettled > :zero"
            } else {
                "attribute_exists(Pk) AND #Version = :Version AND #Unsettled > :zero"
            }
        } else {
            "attribute_exists(Pk) AND attribute_not_exists(#Holder) AND #Unsettled > :zero"
        };
        Change {
            table: &self.calls.tables.ledger,
            key: Record::key(id),
            update,
            condition: Some(condition),
            names,
            values,
        }
    }

    fn granted(&self, record: Record) -> Claim {
        let claim =
            Claim::Granted { fence: record.fence, losses: record.losses, states: record.states.clone() };
        self.cache_record(record);
        claim
    }

    /// Gives back a batch whose destination turned out to be disabled.
    async fn undo(&self, record: &Record) -> Result<Claim, StoreError> {
        let token = LeaseToken { batch: record.id, fence: record.fence };
        self.release_claims(&[token], Release::Unused).await?;
        Ok(unavailable(record))
    }

    fn take_for_dispatched(&self, id: BatchId) {
        if self.fresh().remove(id) {
            super::state::lock(&self.expiring).unmarked(id);
        }
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

    async fn release_one(&self, token: LeaseToken, how: Release) -> Result<(), StoreError> {
        self.forget_record(token.batch);
        let mut update = String::from("SET #Version = #Version + :one");
        let mut names = vec![VERSION, FENCE, HOLDER, UNTIL];
        if how == Release::Lost {
            update.push_str(", #Losses = #Losses + :one");
            names.push(LOSSES);
        }
        update.push_str(" REMOVE #Holder, #Until");
        let change = Change {
            table: &self.calls.tables.ledger,
            key: Record::key(token.batch),
            update,
            condition: Some("#Fence = :Fence AND attribute_exists(#Holder)"),
            names,
            values: vec![("one", number(1)), ("Fence", number(token.fence))],
        };
        // A token that is not current is ignored.
        let released: Result<Item, _> = self.calls.update("releasing a claim", change).await?;
        if let Ok(item) = released {
            self.cache_record(Record::read(&item)?);
        }
        Ok(())
    }
}

fn unavailable(record: &Record) -> Claim {
    Claim::Unavailable(format!("destination {} is disabled", record.destination))
}

fn extended(answer: Stated) -> ItemOutcome {
    match answer {
        Stated::Done => ItemOutcome::Ok,
        Stated::Refused => ItemOutcome::Permanent("the claim is not held any more".into()),
        Stated::Failed(outcome) => outcome,
    }
}
