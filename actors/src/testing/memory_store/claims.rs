//! Claims, in memory.

use async_trait::async_trait;

use super::{MemoryStore, Phase, State};
use crate::{
    model::{ids::BatchId, lease::is_earlier_life, time::UnixMs},
    ports::{Claim, ClaimRequest, Claims, ItemOutcome, LeaseToken, Queue, Release, StoreError},
};

#[async_trait]
impl Claims for MemoryStore {
    async fn claim(&self, request: ClaimRequest) -> Result<Vec<(BatchId, Claim)>, StoreError> {
        let mut state = self.state();
        Ok(request.batches.iter().map(|&id| (id, state.claim(&request, id))).collect())
    }

    async fn extend_claims(
        &self,
        tokens: &[LeaseToken],
        until: UnixMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let mut state = self.state();
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            let outcome = if let Some(at) = state.is_current(*token) {
                state.batches[at].claimed_until = Some(until);
                ItemOutcome::Ok
            } else {
                ItemOutcome::Permanent("the claim is not held any more".into())
            };
            outcomes.push((token.batch, outcome));
        }
        Ok(outcomes)
    }

    async fn release_claims(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        self.release(tokens, how).await
    }
}

impl State {
    fn claim(&mut self, request: &ClaimRequest, id: BatchId) -> Claim {
        let Some(&at) = self.ids.get(&id) else { return Claim::Missing };
        let batch = &mut self.batches[at];
        let destination = &batch.batch.header.destination;
        match batch.phase {
            Phase::Settled => return Claim::Settled,
            _ if self.disabled.contains_key(destination.as_str()) => {
                return Claim::Unavailable(format!("destination {destination} is disabled"));
            }
            Phase::Outstanding | Phase::Queued => batch.lease(&request.holder),
            Phase::Leased => {
                // A lease that this store's own queue gave is no claim: its deadline is by another clock.
                let until = batch.claimed_until.unwrap_or(request.until);
                if until < request.now || is_earlier_life(&batch.holder, &request.holder) {
                    batch.losses += 1;
                    batch.lease(&request.holder);
                } else if batch.holder != request.holder {
                    return Claim::Held { until };
                }
            }
        }
        batch.claimed_until = Some(request.until);
        Claim::Granted { fence: batch.fence, losses: batch.losses, states: batch.states.clone() }
    }
}
