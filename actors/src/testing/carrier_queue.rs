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
        Claim, ClaimRequest, Claims, Clock, DispatchTarget, ItemOutcome, Lease, LeaseRequest, LeaseToken,
        OutboxEntry, Queue, QueueDepth, Release, StoreError,
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

/// What is wanted still.
#[derive(Default)]
struct Left {
    messages: i64,
    batches: usize,
}

impl Left {
    fn is_left(&self) -> bool {
        self.messages > 0 && self.batches > 0
    }
}

/// By destination.
type Wants = BTreeMap<Arc<str>, Left>;

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
    fn send_some(&self, entries: &[(NewBatch, UnixMs)]) -> Vec<(BatchId, ItemOutcome)> {
        let wall = self.clock.wall();
        let delayed: Vec<_> = entries.iter().map(|(batch, due)| (batch.clone(), due.since(wall))).collect();
        let ids = entries.iter().map(|(batch, _)| batch.id);
        match self.carrier.send(&delayed, self.clock.mono()) {
            Ok(outcomes) => ids.zip(outcomes).collect(),
            Err(error) => {
                let outcome = ItemOutcome::from(error);
                ids.map(|id| (id, outcome.clone())).collect()
            }
        }
    }

    /// Takes out of `deliveries` what may be leased now. Each counts with all its messages until its record is known.
    fn choose(&self, deliveries: Vec<Delivery>, wants: &mut Wants, back: &mut GivenBack) -> Vec<Delivery> {
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
                continue;
            }
            let want = wants.get_mut(delivery.batch.header.destination.as_str());
            match want.filter(|want| want.is_left()) {
                Some(want) if chosen.iter().all(|other| other.batch.id != id) => {
                    want.batches -= 1;
                    want.messages -= i64::from(delivery.batch.count);
                    chosen.push(delivery);
                }
                _ => back.push((receipt, Duration::ZERO)),
            }
        }
        chosen
    }

    /// Claims what was chosen. What it does not get is given back or forgotten.
    async fn claim(
        &self,
        chosen: Vec<Delivery>,
        request: &LeaseRequest,
        wants: &mut Wants,
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
            now: request.now,
            born: request.born,
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
            let want =
                wants.get_mut(batch.header.destination.as_str()).expect("only what is wanted is chosen");
            want.messages += i64::from(batch.count);
            if let Claim::Granted(record) = claim {
                let lease = Lease::of(id, batch.header, batch.payload, &record);
                want.messages -= i64::try_from(lease.due_count(request.now)).unwrap_or(i64::MAX);
                let hand = InHand { receipt, holder: request.holder.clone(), until: request.until };
                self.in_hand().insert(lease.token, hand);
                leases.push(lease);
                continue;
            }
            want.batches += 1;
            match claim {
                Claim::Held { until } => {
                    // At least a moment, or it would be received again at once.
                    let hidden = until.since(self.clock.wall()).max(Duration::from_millis(1));
                    back.push((receipt, hidden));
                }
                Claim::Unavailable(_) => back.push((receipt, Duration::ZERO)),
                // What is early is outstanding, and sent again when it is due.
                Claim::Early { .. } | Claim::Settled | Claim::Missing => done.push(receipt),
                Claim::Granted(_) => unreachable!("handled above"),
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
impl DispatchTarget for CarrierQueue {
    fn reach(&self) -> Duration {
        self.reach
    }

    async fn send(&self, entries: &[OutboxEntry]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        let mut outcomes = HashMap::new();
        let mut call: Vec<(NewBatch, UnixMs)> = Vec::new();
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
            call.push((batch.clone(), entry.not_before));
            bytes += size;
        }
        outcomes.extend(self.send_some(&call));
        Ok(entries.iter().map(|entry| (entry.id, outcomes[&entry.id].clone())).collect())
    }

    async fn queue_depth(&self) -> Result<QueueDepth, StoreError> {
        Ok(self.carrier.depth(self.clock.mono()))
    }
}

#[async_trait]
impl Queue for CarrierQueue {
    fn on_arrival(&self, ring: Arc<dyn Fn() + Send + Sync>) {
        self.carrier.on_arrival(&self.process, ring);
    }

    async fn acknowledge(&self, tokens: &[LeaseToken]) -> Result<(), StoreError> {
        let receipts: Vec<_> = {
            let mut in_hand = self.in_hand();
            tokens.iter().filter_map(|token| in_hand.remove(token)).map(|hand| hand.receipt).collect()
        };
        // What is not deleted comes again, is `Settled` or `Early`, and goes then.
        let _ = self.delete(&receipts);
        Ok(())
    }

    async fn lease(&self, request: LeaseRequest) -> Result<Vec<Lease>, StoreError> {
        let now = self.clock.mono();
        // Hidden at least until this call has looked at everything.
        let visibility = request.until.since(now).clamp(Duration::from_millis(1), VISIBILITY_MAX);
        let mut wants = Wants::new();
        for want in &request.wants {
            let left = wants.entry(want.destination.clone()).or_default();
            left.messages = left.messages.saturating_add(i64::try_from(want.messages).unwrap_or(i64::MAX));
            left.batches += want.batches;
        }
        let (mut leases, mut back) = (Vec::new(), GivenBack::new());
        let mut failed = None;
        for _ in 0..RECEIVES_MAX {
            if !wants.values().any(Left::is_left) {
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
        // The store sends what is left again when it is due.
        self.acknowledge(&held).await
    }

    async fn release_holder(&self, holder: &str) -> Result<usize, StoreError> {
        self.lose(|hand| *hand.holder == *holder).await
    }

    async fn rescue(&self, now: MonoMs) -> Result<usize, StoreError> {
        self.lose(|hand| hand.until < now).await
    }
}
