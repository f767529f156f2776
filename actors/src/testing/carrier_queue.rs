//! A queue that only carries: the port over [`Carrier`] and a store's [`Claims`]. It is the reference for
//! adapters of real message services, and gives every store a queue to be tested with.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;

use super::carrier::{
    CALL_BYTES_MAX, CALL_ENTRIES_MAX, Carrier, Delivery, Receipt, VISIBILITY_MAX, entry_bytes,
};
use crate::{
    model::{
        batch::NewBatch,
        ids::BatchId,
        time::{MonoMs, UnixMs},
    },
    ports::{
        Claim, ClaimRequest, Claims, Clock, ItemOutcome, Lease, LeaseRequest, LeaseToken, OutboxEntry, Queue,
        QueueDepth, Release, StoreError,
    },
};

/// Receives in one call of `lease`: what others want must not keep it busy.
const RECEIVES_MAX: usize = 256;

/// One process at a carrier.
pub struct CarrierQueue {
    carrier: Arc<Carrier>,
    claims: Arc<dyn Claims>,
    clock: Arc<dyn Clock>,
    process: Arc<str>,
    reach: Duration,
    in_hand: Mutex<HashMap<LeaseToken, InHand>>,
}

/// A lease that was given and not ended.
#[derive(Clone)]
struct InHand {
    receipt: Receipt,
    holder: Arc<str>,
    until: MonoMs,
}

/// What is received but not leased, and for how long it is to be hidden.
type GivenBack = Vec<(Receipt, Duration)>;

impl CarrierQueue {
    /// A queue for the process `process`, `NODE-START`. It sends what is due within `reach`.
    pub fn new(
        carrier: Arc<Carrier>,
        claims: Arc<dyn Claims>,
        clock: Arc<dyn Clock>,
        process: &str,
        reach: Duration,
    ) -> Self {
        Self { carrier, claims, clock, process: process.into(), reach, in_hand: Mutex::default() }
    }

    fn in_hand(&self) -> MutexGuard<'_, HashMap<LeaseToken, InHand>> {
        self.in_hand.lock().expect("no operation panics half-way")
    }

    /// The wall-clock time of a deadline.
    fn wall(&self, until: MonoMs) -> UnixMs {
        self.clock.wall().after(until.since(self.clock.mono()))
    }

    /// Sends what fits into one call.
    fn send_some(&self, batches: &[NewBatch]) -> Vec<(BatchId, ItemOutcome)> {
        let wall = self.clock.wall();
        let entries: Vec<_> =
            batches.iter().map(|batch| (batch.clone(), batch.not_before.since(wall))).collect();
        let ids = batches.iter().map(|batch| batch.id);
        match self.carrier.send(&entries, self.clock.mono()) {
            Ok(outcomes) => ids.zip(outcomes).collect(),
            Err(error) => {
                let outcome = match error {
                    StoreError::Retryable(why) => ItemOutcome::Retryable(why),
                    StoreError::Permanent(why) => ItemOutcome::Permanent(why),
                    StoreError::Unknown(why) => ItemOutcome::Unknown(why),
                };
                ids.map(|id| (id, outcome.clone())).collect()
            }
        }
    }

    /// Takes out of `deliveries` what may be leased now.
    fn choose(
        &self,
        deliveries: Vec<Delivery>,
        wants: &mut BTreeMap<Arc<str>, usize>,
        back: &mut GivenBack,
    ) -> Vec<Delivery> {
        let wall = self.clock.wall();
        let mut chosen: Vec<Delivery> = Vec::new();
        let mut in_hand = self.in_hand();
        for delivery in deliveries {
            let (id, receipt) = (delivery.batch.id, delivery.receipt);
            if let Some((_, hand)) = in_hand.iter_mut().find(|(token, _)| token.batch == id) {
                // The service delivers at least once. The latest receipt is the one that counts.
                if hand.receipt.entry == receipt.entry {
                    hand.receipt = receipt;
                }
                back.push((receipt, hand.until.since(self.clock.mono())));
            } else if delivery.batch.not_before > wall {
                back.push((receipt, delivery.batch.not_before.since(wall)));
            } else {
                let want = wants.get_mut(delivery.batch.header.destination.as_str());
                match want.filter(|want| **want > 0) {
                    Some(want) if chosen.iter().all(|other| other.batch.id != id) => {
                        *want -= 1;
                        chosen.push(delivery);
                    }
                    _ => back.push((receipt, Duration::ZERO)),
                }
            }
        }
        chosen
    }

    /// Claims what was chosen. What it does not get is given back or forgotten.
    async fn claim(
        &self,
        chosen: Vec<Delivery>,
        request: &LeaseRequest,
        wants: &mut BTreeMap<Arc<str>, usize>,
        back: &mut GivenBack,
        leases: &mut Vec<Lease>,
    ) -> Result<(), StoreError> {
        if chosen.is_empty() {
            return Ok(());
        }
        let holder: Arc<str> = format!("{}/{}", self.process, request.holder).into();
        let claim = ClaimRequest {
            holder,
            batches: chosen.iter().map(|delivery| delivery.batch.id).collect(),
            until: self.wall(request.until),
            now: self.clock.wall(),
        };
        let claims = match self.claims.claim(claim).await {
            Ok(claims) => claims,
            Err(error) => {
                back.extend(chosen.iter().map(|delivery| (delivery.receipt, Duration::ZERO)));
                return Err(error);
            }
        };
        let mut done = Vec::new();
        for (delivery, (id, claim)) in chosen.into_iter().zip(claims) {
            let Delivery { receipt, batch } = delivery;
            assert_eq!(batch.id, id, "claims are answered in order");
            if let Claim::Granted { fence, losses, states } = claim {
                let lease = Lease::granted(batch, fence, losses, states);
                let hand = InHand { receipt, holder: request.holder.clone(), until: request.until };
                self.in_hand().insert(lease.token, hand);
                leases.push(lease);
                continue;
            }
            if let Some(want) = wants.get_mut(batch.header.destination.as_str()) {
                *want += 1;
            }
            match claim {
                Claim::Held { until } => {
                    // At least a moment, or it would be received again at once.
                    let hidden = until.since(self.clock.wall()).max(Duration::from_millis(1));
                    back.push((receipt, hidden));
                }
                Claim::Unavailable(_) => back.push((receipt, Duration::ZERO)),
                Claim::Settled | Claim::Missing => done.push(receipt),
                Claim::Granted { .. } => unreachable!("handled above"),
            }
        }
        // Not deleted, it comes again.
        let _ = self.delete(&done);
        Ok(())
    }

    fn delete(&self, receipts: &[Receipt]) -> Result<(), StoreError> {
        receipts.chunks(CALL_ENTRIES_MAX).try_for_each(|receipts| self.carrier.delete(receipts))
    }

    /// Not hidden anew, an entry comes again when its time has run out; so failures are left alone.
    fn hide(&self, changes: &[(Receipt, Duration)]) {
        for changes in changes.chunks(CALL_ENTRIES_MAX) {
            let bounded: Vec<_> =
                changes.iter().map(|(receipt, hidden)| (*receipt, (*hidden).min(VISIBILITY_MAX))).collect();
            let _ = self.carrier.change_visibility(&bounded, self.clock.mono());
        }
    }

    /// Ends the leases in hand that `ends` picks.
    async fn lose(&self, ends: impl Fn(&InHand) -> bool) -> Result<usize, StoreError> {
        let lost: Vec<_> =
            self.in_hand().iter().filter(|(_, hand)| ends(hand)).map(|(token, _)| *token).collect();
        self.release(&lost, Release::Lost).await?;
        Ok(lost.len())
    }
}

#[async_trait]
impl Queue for CarrierQueue {
    fn stores_batches(&self) -> bool {
        true
    }

    fn reach(&self) -> Duration {
        self.reach
    }

    fn on_arrival(&self, ring: Arc<dyn Fn() + Send + Sync>) {
        self.carrier.on_arrival(&self.process, ring);
    }

    async fn send(&self, entries: &[OutboxEntry]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let mut outcomes = HashMap::new();
        let mut call: Vec<NewBatch> = Vec::new();
        let mut bytes = 0;
        for entry in entries {
            let Some(batch) = &entry.batch else {
                let why = format!("batch {} was not brought along", entry.id);
                outcomes.insert(entry.id, ItemOutcome::Permanent(why));
                continue;
            };
            let size = entry_bytes(batch);
            if call.len() == CALL_ENTRIES_MAX || bytes + size > CALL_BYTES_MAX {
                outcomes.extend(self.send_some(&std::mem::take(&mut call)));
                bytes = 0;
            }
            call.push(batch.clone());
            bytes += size;
        }
        outcomes.extend(self.send_some(&call));
        Ok(entries.iter().map(|entry| (entry.id, outcomes[&entry.id].clone())).collect())
    }

    async fn acknowledge(&self, tokens: &[LeaseToken]) -> Result<(), StoreError> {
        let receipts: Vec<_> = {
            let mut in_hand = self.in_hand();
            tokens.iter().filter_map(|token| in_hand.remove(token)).map(|hand| hand.receipt).collect()
        };
        // What is not deleted comes again, is `Settled` and goes then.
        let _ = self.delete(&receipts);
        Ok(())
    }

    async fn queue_depth(&self) -> Result<QueueDepth, StoreError> {
        Ok(self.carrier.depth(self.clock.mono()))
    }

    async fn lease(&self, request: LeaseRequest) -> Result<Vec<Lease>, StoreError> {
        let now = self.clock.mono();
        // Hidden at least until this call has looked at everything.
        let visibility = request.until.since(now).clamp(Duration::from_millis(1), VISIBILITY_MAX);
        let mut wants: BTreeMap<Arc<str>, usize> = BTreeMap::new();
        for (destination, want) in &request.wants {
            *wants.entry(destination.clone()).or_default() += want;
        }
        let (mut leases, mut back) = (Vec::new(), GivenBack::new());
        let mut failed = None;
        for _ in 0..RECEIVES_MAX {
            if wants.values().all(|want| *want == 0) {
                break;
            }
            let Ok(deliveries) = self.carrier.receive(CALL_ENTRIES_MAX, visibility, now) else { continue };
            if deliveries.is_empty() {
                break;
            }
            let chosen = self.choose(deliveries, &mut wants, &mut back);
            let claimed = self.claim(chosen, &request, &mut wants, &mut back, &mut leases).await;
            if let Err(error) = claimed {
                failed = Some(error);
                break;
            }
        }
        self.hide(&back);
        match failed {
            Some(error) if leases.is_empty() => Err(error),
            _ => Ok(leases),
        }
    }

    async fn extend(
        &self,
        tokens: &[LeaseToken],
        until: MonoMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let held: Vec<_> =
            tokens.iter().copied().filter(|token| self.in_hand().contains_key(token)).collect();
        let extended: HashMap<BatchId, ItemOutcome> =
            self.claims.extend_claims(&held, self.wall(until)).await?.into_iter().collect();
        let mut outcomes = Vec::with_capacity(tokens.len());
        let mut hidden = Vec::new();
        {
            let mut in_hand = self.in_hand();
            for token in tokens {
                let outcome = match extended.get(&token.batch) {
                    Some(outcome) if held.contains(token) => outcome.clone(),
                    _ => ItemOutcome::Permanent("the lease is not held any more".into()),
                };
                match (&outcome, in_hand.get_mut(token)) {
                    (ItemOutcome::Ok, Some(hand)) => {
                        hand.until = until;
                        hidden.push((hand.receipt, until.since(self.clock.mono())));
                    }
                    (ItemOutcome::Permanent(_), Some(_)) => {
                        in_hand.remove(token);
                    }
                    _ => {}
                }
                outcomes.push((token.batch, outcome));
            }
        }
        // The claim is what counts. Delivered to somebody else meanwhile, the entry finds it held.
        self.hide(&hidden);
        Ok(outcomes)
    }

    async fn release(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        let held: Vec<_> = {
            let in_hand = self.in_hand();
            let mut seen = HashSet::new();
            let held = tokens.iter().copied();
            held.filter(|token| in_hand.contains_key(token) && seen.insert(*token)).collect()
        };
        if held.is_empty() {
            return Ok(());
        }
        self.claims.release_claims(&held, how).await?;
        let hands: Vec<_> = {
            let mut in_hand = self.in_hand();
            held.iter().filter_map(|token| in_hand.remove(token)).collect()
        };
        self.hide(&hands.iter().map(|hand| (hand.receipt, Duration::ZERO)).collect::<Vec<_>>());
        Ok(())
    }

    async fn release_holder(&self, holder: &str) -> Result<usize, StoreError> {
        self.lose(|hand| *hand.holder == *holder).await
    }

    async fn rescue(&self, now: MonoMs) -> Result<usize, StoreError> {
        self.lose(|hand| hand.until < now).await
    }
}
