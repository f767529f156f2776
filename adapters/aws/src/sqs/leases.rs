//! Leases: entries from the stock, claimed in the store for a worker.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use postrider_actors::{
    model::{ids::BatchId, ledger::Record, time::MonoMs},
    ports::{
        Claim, ClaimRequest, Fetched, ItemOutcome, Lease, LeaseRequest, LeaseToken, Release, StoreError, Want,
    },
};

use super::{
    Desk,
    calls::ENTRIES_MAX,
    dead_letters::DeadLetter,
    envelope,
    receive::Leftovers,
    stock::{Receipt, Received, Wanted},
};

/// A lease that a worker here has.
pub(super) struct Held {
    fence: u64,
    pub(super) holder: Arc<str>,
    destination: Arc<str>,
    /// Its deadline.
    pub(super) until: MonoMs,
    pub(super) receipt: Receipt,
}

impl Held {
    pub(super) fn is_for(&self, destination: &str) -> bool {
        *self.destination == *destination
    }

    fn has(&self, token: LeaseToken) -> bool {
        self.fence == token.fence
    }
}

/// An entry whose claim was granted.
struct Granted {
    received: Received,
    record: Box<Record>,
}

impl Granted {
    fn token(&self) -> LeaseToken {
        LeaseToken { batch: self.received.entry.batch.id, fence: self.record.fence }
    }
}

impl Desk {
    /// Hands out what is in stock and can be claimed; one claim request per ten entries. What there is not is
    /// noted, so that pollers receive it.
    pub(super) async fn lease(&self, request: LeaseRequest) -> Result<Vec<Lease>, StoreError> {
        let mut wants: BTreeMap<Arc<str>, Wanted> = BTreeMap::new();
        for Want { destination, messages, batches } in &request.wants {
            wants.entry(destination.clone()).or_default().add(*messages, *batches);
        }
        let mut leases = Vec::new();
        let mut result = Ok(());
        loop {
            let taken = self.state().stock.take(&wants, ENTRIES_MAX, self.stock_time());
            if taken.is_empty() {
                break;
            }
            let before = leases.len();
            result = self.claim(taken, &request, &mut leases).await;
            for lease in &leases[before..] {
                let destination = lease.header.destination.as_str();
                let due = lease.due_count(request.now);
                if let Some(wanted) = wants.get_mut(destination) {
                    wanted.got(due);
                }
                self.state().stock.grant(destination, due, self.stock_time());
            }
            if result.is_err() {
                break;
            }
        }
        self.state().stock.ask(&request.holder, wants, self.stock_time());
        self.asked.notify_waiters();
        match result {
            Err(error) if leases.is_empty() => Err(error),
            _ => Ok(leases),
        }
    }

    async fn claim(
        &self,
        taken: Vec<Received>,
        request: &LeaseRequest,
        leases: &mut Vec<Lease>,
    ) -> Result<(), StoreError> {
        let claim = ClaimRequest {
            holder: format!("{}/{}", self.settings.process, request.holder).into(),
            batches: taken.iter().map(|received| received.entry.batch.id).collect(),
            until: self.wall(request.until),
            now: request.now,
            born: request.born,
        };
        let claims: HashMap<_, _> = match self.claims.claim(claim).await {
            Ok(claims) => claims.into_iter().collect(),
            Err(error) => {
                self.state().stock.restock(taken);
                return Err(error);
            }
        };
        let mut left = Leftovers::default();
        let mut granted = Vec::new();
        for received in taken {
            let batch = &received.entry.batch;
            match claims.get(&batch.id).cloned() {
                Some(Claim::Granted(record)) => granted.push(Granted { received, record }),
                Some(Claim::Held { until }) => {
                    // At least a second, or it would come again at once.
                    let hidden = until.since(self.clock.wall()).max(Duration::from_secs(1));
                    left.hide.push((received.receipt, hidden));
                }
                // B18: an entry is a hint. The store sends another one for a batch that is not due yet.
                Some(Claim::Settled | Claim::Early { .. }) => left.delete.push(received.receipt),
                Some(Claim::Missing) => {
                    tracing::warn!(batch = %batch.id, "an entry is deleted: the store does not know its batch");
                    left.delete.push(received.receipt);
                }
                Some(Claim::Unavailable(_)) | None => {
                    let back = self.state().stock.refuse(&batch.header.destination, self.stock_time());
                    left.back.push((received, back));
                }
            }
        }
        for granted in self.load(granted, &mut left).await {
            let token = granted.token();
            let Granted { received, record } = granted;
            let batch = received.entry.batch;
            let lease = Lease::of(batch.id, batch.header, batch.payload, &record);
            let held = Held {
                fence: token.fence,
                holder: request.holder.clone(),
                destination: lease.header.destination.as_str().into(),
                until: request.until,
                receipt: received.receipt,
            };
            self.state().leases.insert(token.batch, held);
            leases.push(lease);
        }
        self.dispose(left).await;
        Ok(())
    }

    /// Loads the batches that stay in the outbox.
    async fn load(&self, granted: Vec<Granted>, left: &mut Leftovers) -> Vec<Granted> {
        let (referring, mut whole): (Vec<_>, Vec<_>) =
            granted.into_iter().partition(|granted| granted.received.entry.by_reference);
        if referring.is_empty() {
            return whole;
        }
        let ids: Vec<_> = referring.iter().map(|granted| granted.received.entry.batch.id).collect();
        let mut loaded: HashMap<BatchId, Fetched> = match self.pages.get(&ids).await {
            Ok(loaded) => loaded.into_iter().collect(),
            Err(error) => {
                tracing::warn!(%error, batches = ids.len(), "batches can't be loaded from the outbox now");
                HashMap::new()
            }
        };
        let mut unused = Vec::new();
        for mut granted in referring {
            match loaded.remove(&granted.received.entry.batch.id) {
                Some(Fetched::Batch(batch)) => {
                    granted.received.entry.batch = batch;
                    whole.push(granted);
                }
                Some(Fetched::Missing) => {
                    unused.push(granted.token());
                    left.dead.push(dead_letter(granted.received, "the outbox does not hold its rows"));
                }
                Some(Fetched::Unprocessed) | None => {
                    // It is outstanding again, and sent once more when the store can read it.
                    unused.push(granted.token());
                    left.delete.push(granted.received.receipt);
                }
            }
        }
        if !unused.is_empty()
            && let Err(error) = self.claims.release_claims(&unused, Release::Unused).await
        {
            // They run out; then each counts as lost once, which condemns nothing by itself.
            tracing::warn!(%error, "claims on batches that can't be loaded are not given back");
        }
        whole
    }

    pub(super) async fn extend(
        &self,
        tokens: &[LeaseToken],
        until: MonoMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let held = self.held(tokens);
        let extended: HashMap<_, _> = if held.is_empty() {
            HashMap::new()
        } else {
            self.claims.extend_claims(&held, self.wall(until)).await?.into_iter().collect()
        };
        let mut outcomes = Vec::with_capacity(tokens.len());
        let mut hide = Vec::new();
        {
            let mut state = self.state();
            let hidden = until.since(self.clock.mono());
            for token in tokens {
                let ours = held.contains(token);
                let outcome = extended
                    .get(&token.batch)
                    .filter(|_| ours)
                    .cloned()
                    .unwrap_or_else(|| ItemOutcome::Permanent("the lease is not held any more".into()));
                if let Some(current) = state.leases.get_mut(&token.batch).filter(|held| held.has(*token)) {
                    match outcome {
                        ItemOutcome::Ok => {
                            current.until = until;
                            hide.push((current.receipt.clone(), hidden));
                        }
                        ItemOutcome::Permanent(_) => {
                            state.leases.remove(&token.batch);
                        }
                        ItemOutcome::Retryable(_) | ItemOutcome::Unknown(_) => {}
                    }
                }
                outcomes.push((token.batch, outcome));
            }
        }
        // The claim is what counts. If its message is somebody else's by now (a stale handle), that receiver
        // finds the claim held and hides the message itself; giving up here would only send twice.
        self.hide(hide).await;
        Ok(outcomes)
    }

    pub(super) async fn release(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        let held = self.held(tokens);
        if held.is_empty() {
            return Ok(());
        }
        self.claims.release_claims(&held, how).await?;
        // The store sends them again.
        self.acknowledge(&held).await;
        Ok(())
    }

    /// Marks leases lost.
    pub(super) async fn lose(&self, is_lost: impl Fn(&Held) -> bool) -> Result<usize, StoreError> {
        let lost: Vec<_> = {
            let state = self.state();
            let leases = state.leases.iter().filter(|(_, held)| is_lost(held));
            leases.map(|(batch, held)| LeaseToken { batch: *batch, fence: held.fence }).collect()
        };
        self.release(&lost, Release::Lost).await?;
        Ok(lost.len())
    }

    pub(super) async fn acknowledge(&self, tokens: &[LeaseToken]) {
        let ended = self.forget(tokens);
        self.deletes.push(ended.into_iter().map(|receipt| receipt.handle)).await;
    }

    /// Those of `tokens` that are leases of workers here, each once.
    fn held(&self, tokens: &[LeaseToken]) -> Vec<LeaseToken> {
        let state = self.state();
        let mut seen = HashSet::new();
        let is_held =
            |token: &LeaseToken| state.leases.get(&token.batch).is_some_and(|held| held.has(*token));
        tokens.iter().copied().filter(|token| is_held(token) && seen.insert(*token)).collect()
    }

    /// Ends leases here; what receipts they had.
    fn forget(&self, tokens: &[LeaseToken]) -> Vec<Receipt> {
        let mut state = self.state();
        let mut receipts = Vec::with_capacity(tokens.len());
        for token in tokens {
            if state.leases.get(&token.batch).is_some_and(|held| held.has(*token)) {
                receipts.extend(state.leases.remove(&token.batch).map(|held| held.receipt));
            }
        }
        receipts
    }
}

fn dead_letter(received: Received, reason: &str) -> DeadLetter {
    let batch = &received.entry.batch;
    let body = if received.entry.by_reference {
        envelope::write_reference(batch, batch.not_before)
    } else {
        envelope::write(batch, batch.not_before)
    };
    DeadLetter { receipt: received.receipt, body: body.into(), group: None, reason: reason.into() }
}
