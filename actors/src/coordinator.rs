//! Coordinator: the queue over a network, for several processes that share a store. What goes out when, what is
//! received for whom, claims, extension, deletion and delay are decided here, once, over a [`Transport`] of five calls
//! and a store's [`Claims`].
//!
//! - [`SharedQueue`] is the queue that workers lease from.
//! - [`Coordinator`] is the actor that keeps it going: one feeder, which asks the store for what is due, and for each
//!   destination a task that sends and deletes and one that receives. A destination whose queue is missing, forbidden or
//!   slow waits for itself alone.
//! - `carry.rs` has those tasks; [`crate::model::channel`] has every decision about one destination's queue.

mod carry;
#[cfg(all(test, feature = "testing"))]
mod tests;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use actix::prelude::*;
use async_trait::async_trait;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

pub use self::carry::CarrySetup;
use crate::{
    flow::Bell,
    model::{
        channel::{Channel, Claimed, Stocked},
        ids::BatchId,
        time::{MonoMs, UnixMs},
    },
    ports::{
        Claim, ClaimRequest, Claims, Clock, Handle, ItemOutcome, Lease, LeaseRequest, LeaseToken, Queue,
        QueueDepth, Release, StoreError, Transport, Want,
    },
    supervision::{ChildId, Drain, Fault, Stage},
};

/// How long [`SharedQueue::close`] takes at most.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// One process at the queues that several share.
pub struct SharedQueue {
    transport: Arc<dyn Transport>,
    claims: Arc<dyn Claims>,
    clock: Arc<dyn Clock>,
    /// `NODE-START`: the first part of its claims' holder names.
    process: Arc<str>,
    lines: RwLock<BTreeMap<Arc<str>, Arc<Line>>>,
    in_hand: Mutex<HashMap<LeaseToken, InHand>>,
    ring: Mutex<Option<Ring>>,
    /// Rung when something may have become due, or there is room for it.
    due: Bell,
    closing: watch::Sender<bool>,
    /// What its waits are counted from: by real time, whatever clock the leases go by, as hidden entries are.
    begun: Instant,
}

type Ring = Arc<dyn Fn() + Send + Sync>;

/// One destination's queue, and what its tasks wait for.
struct Line {
    name: Arc<str>,
    channel: Mutex<Channel>,
    /// There is something to send, hide or delete.
    work: Notify,
    /// A worker wants something.
    asked: Notify,
}

impl Line {
    fn channel(&self) -> MutexGuard<'_, Channel> {
        // Its steps are infallible.
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lease that was given and not ended.
#[derive(Clone)]
struct InHand {
    holder: Arc<str>,
    line: Arc<Line>,
    until: MonoMs,
    /// Its entry, where it is kept until the lease ends.
    handle: Option<Handle>,
}

/// What is wanted still of one destination.
#[derive(Clone, Copy, Default)]
struct Left {
    messages: usize,
    leases: usize,
}

impl Left {
    fn is_left(self) -> bool {
        self.messages > 0 && self.leases > 0
    }
}

impl SharedQueue {
    /// The queues of the process `process`, `NODE-START`. `due` is rung when something was appended; the queue rings it
    /// too. Nothing is called before a worker asks or a [`Coordinator`] runs.
    pub fn new(
        transport: Arc<dyn Transport>,
        claims: Arc<dyn Claims>,
        clock: Arc<dyn Clock>,
        process: Arc<str>,
        due: Bell,
    ) -> Self {
        Self {
            transport,
            claims,
            clock,
            process,
            lines: RwLock::default(),
            in_hand: Mutex::default(),
            ring: Mutex::default(),
            due,
            closing: watch::Sender::new(false),
            begun: Instant::now(),
        }
    }

    /// These are the destinations now. One that is gone is held: what is in its queue stays there.
    pub fn serve(&self, destinations: &[Arc<str>]) {
        let mut lines = self.lines.write().unwrap_or_else(PoisonError::into_inner);
        for name in destinations {
            lines.entry(name.clone()).or_insert_with(|| {
                Arc::new(Line {
                    name: name.clone(),
                    channel: Mutex::new(Channel::new(self.transport.limits())),
                    work: Notify::new(),
                    asked: Notify::new(),
                })
            });
        }
        for line in lines.values() {
            line.channel().hold(!destinations.contains(&line.name));
        }
    }

    /// Whether the messages of a file go in order: then nothing goes ahead, for what is claimed without an entry has no place
    /// among others.
    pub fn keeps_order(&self) -> bool {
        self.transport.limits().keeps_order
    }

    /// The bell to ring when something was appended, or is due again.
    pub fn bell(&self) -> Bell {
        self.due.clone()
    }

    /// What is in the queues, as it was read last: a diagnostic, read only where there is a backlog.
    pub fn depths(&self) -> Vec<(Arc<str>, QueueDepth)> {
        let depth = |line: Arc<Line>| Some((line.name.clone(), line.channel().last_depth()?));
        self.lines().into_iter().filter_map(depth).collect()
    }

    fn lines(&self) -> Vec<Arc<Line>> {
        self.lines.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn in_hand(&self) -> MutexGuard<'_, HashMap<LeaseToken, InHand>> {
        self.in_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> MonoMs {
        MonoMs(u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// A deadline by the wall clock, for claims that other machines read.
    fn wall(&self, until: MonoMs) -> UnixMs {
        self.clock.wall().after(until.since(self.clock.mono()))
    }

    fn ring(&self) {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(ring) = ring {
            ring();
        }
    }

    /// Claims batches from one destination's stock until there is enough or nothing more.
    async fn lease_from(
        &self,
        line: &Arc<Line>,
        request: &LeaseRequest,
        left: &mut Left,
        leases: &mut Vec<Lease>,
    ) -> Result<(), StoreError> {
        let mut unanswered = Vec::new();
        let mut result = Ok(());
        while left.is_left() && result.is_ok() {
            let taken = {
                let mut channel = line.channel();
                let limit = channel.leases_for(left.messages).min(left.leases);
                channel.take(limit, &request.holder, self.now())
            };
            if taken.is_empty() {
                break;
            }
            let mut some = Vec::new();
            result = self.claim(line, taken, request, &mut some, &mut unanswered).await;
            for lease in some {
                let messages = lease.due_count(request.now);
                left.leases -= 1;
                left.messages = left.messages.saturating_sub(messages);
                line.channel().brought(messages);
                leases.push(lease);
            }
        }
        line.channel().put_back(unanswered, &request.holder);
        result
    }

    /// Claims what goes ahead of what a worker has.
    async fn lease_first_turns(
        &self,
        line: &Arc<Line>,
        want: &Want,
        request: &LeaseRequest,
        leases: &mut Vec<Lease>,
    ) -> Result<(), StoreError> {
        if self.keeps_order() {
            return Ok(());
        }
        let hints = self.claims.first_turns(want, request.now).await?;
        let now = self.now();
        let taken = hints.into_iter().map(|hint| Stocked::without_entry(hint, now)).collect();
        let mut unanswered = Vec::new();
        let result = self.claim(line, taken, request, leases, &mut unanswered).await;
        line.channel().put_back(unanswered, &request.holder);
        result
    }

    /// Claims batches. What the store can't say now is left in `unanswered`.
    async fn claim(
        &self,
        line: &Arc<Line>,
        taken: Vec<Stocked>,
        request: &LeaseRequest,
        leases: &mut Vec<Lease>,
        unanswered: &mut Vec<Stocked>,
    ) -> Result<(), StoreError> {
        let (in_hand, taken): (Vec<_>, Vec<_>) = {
            let hands = self.in_hand();
            let batches: HashSet<BatchId> = hands.keys().map(|token| token.batch).collect();
            taken.into_iter().partition(|stocked| batches.contains(&stocked.hint.batch))
        };
        for stocked in in_hand {
            self.doubled(line, stocked);
        }
        if taken.is_empty() {
            return Ok(());
        }
        let claim = ClaimRequest {
            holder: format!("{}/{}", self.process, request.holder).into(),
            batches: taken.iter().map(|stocked| stocked.hint.batch).collect(),
            until: self.wall(request.until),
            now: request.now,
            born: request.born,
        };
        let claims = match self.claims.claim(claim).await {
            Ok(claims) => claims,
            Err(error) => {
                unanswered.extend(taken);
                return Err(error);
            }
        };
        let mut answers: HashMap<BatchId, Claim> = claims.into_iter().collect();
        for stocked in taken {
            let (lease, claimed) = match answers.remove(&stocked.hint.batch) {
                Some(Claim::Granted(lease)) => (Some(lease), Claimed::Granted),
                Some(
                    Claim::Held { .. } | Claim::Early { .. } | Claim::Waits | Claim::Settled | Claim::Missing,
                ) => (None, Claimed::Refused),
                Some(Claim::Unavailable(why)) => {
                    tracing::debug!(batch = %stocked.hint.batch, why, "a batch can't be claimed now");
                    unanswered.push(stocked);
                    continue;
                }
                None => {
                    unanswered.push(stocked);
                    continue;
                }
            };
            let handle = line.channel().claimed(stocked, claimed, self.now());
            let Some(lease) = lease else { continue };
            if let Some(handle) = handle.clone() {
                line.channel().hide(handle, request.until.since(self.clock.mono()));
            }
            let hand =
                InHand { holder: request.holder.clone(), line: line.clone(), until: request.until, handle };
            self.in_hand().insert(lease.token, hand);
            leases.push(*lease);
        }
        line.work.notify_one();
        Ok(())
    }

    /// An entry of a batch that a worker here has: delivered twice, or sent twice.
    fn doubled(&self, line: &Line, stocked: Stocked) {
        let mut hands = self.in_hand();
        let hand = hands.iter_mut().find(|(token, _)| token.batch == stocked.hint.batch);
        let kept = line.channel().claimed(stocked, Claimed::Granted, self.now());
        if let (Some(handle), Some((_, hand))) = (kept, hand) {
            // The latest handle is the one that counts; its lane waits for the lease to end.
            line.channel().hide(handle.clone(), hand.until.since(self.clock.mono()));
            hand.handle = Some(handle);
        }
    }

    /// Those of `tokens` that are leases of workers here, each once.
    fn held(&self, tokens: &[LeaseToken]) -> Vec<LeaseToken> {
        let in_hand = self.in_hand();
        let mut seen = HashSet::new();
        tokens.iter().copied().filter(|token| in_hand.contains_key(token) && seen.insert(*token)).collect()
    }

    /// Ends leases here: their entries, where they were kept, can go.
    fn forget(&self, tokens: &[LeaseToken]) {
        let now = self.now();
        let mut in_hand = self.in_hand();
        for hand in tokens.iter().filter_map(|token| in_hand.remove(token)) {
            hand.line.channel().delete(hand.handle, now);
        }
        drop(in_hand);
        // What is left of their batches is due again, sooner or later.
        self.due.ring();
    }

    async fn lose(&self, ends: impl Fn(&InHand) -> bool) -> Result<usize, StoreError> {
        let lost: Vec<_> =
            self.in_hand().iter().filter(|(_, hand)| ends(hand)).map(|(token, _)| *token).collect();
        self.release(&lost, Release::Lost).await?;
        Ok(lost.len())
    }

    /// Receives and sends nothing more.
    pub fn stop(&self) {
        self.closing.send_replace(true);
        for line in self.lines() {
            line.asked.notify_one();
            line.work.notify_one();
        }
        self.due.ring();
    }

    /// Ends in good order: gives back what is in stock and deletes what is to be deleted. Leases are their workers' to
    /// settle or release, before. Takes some seconds at most; what is not done by then comes again, is refused by the
    /// store and deleted then.
    pub async fn close(&self) {
        self.stop();
        let finish = async {
            for line in self.lines() {
                line.channel().give_back(self.now(), true);
                while self.tidy(&line, true).await {}
            }
        };
        if tokio::time::timeout(CLOSE_TIMEOUT, finish).await.is_err() {
            tracing::warn!("the queues did not close in time; entries in hand come again");
        }
    }
}

#[async_trait]
impl Queue for SharedQueue {
    fn on_arrival(&self, ring: Arc<dyn Fn() + Send + Sync>) {
        *self.ring.lock().unwrap_or_else(PoisonError::into_inner) = Some(ring);
    }

    async fn acknowledge(&self, tokens: &[LeaseToken]) -> Result<(), StoreError> {
        self.forget(tokens);
        Ok(())
    }

    async fn lease(&self, request: LeaseRequest) -> Result<Vec<Lease>, StoreError> {
        let mut wants: BTreeMap<Arc<str>, Left> = BTreeMap::new();
        for want in &request.wants {
            let left = wants.entry(want.destination.clone()).or_default();
            left.messages = left.messages.saturating_add(want.messages);
            left.leases = left.leases.saturating_add(want.batches);
        }
        let mut leases = Vec::new();
        let mut result = Ok(());
        for line in self.lines() {
            let mut left = wants.get(&line.name).copied().unwrap_or_default();
            let is_its = |want: &&Want| want.first_turns.is_some() && want.destination == line.name;
            if result.is_ok()
                && let Some(want) = request.wants.iter().find(is_its)
            {
                result = self.lease_first_turns(&line, want, &request, &mut leases).await;
            }
            if result.is_ok() {
                result = self.lease_from(&line, &request, &mut left, &mut leases).await;
            }
            line.channel().ask(&request.holder, left.messages, left.leases, self.now());
            if left.is_left() {
                line.asked.notify_one();
            }
        }
        match result {
            Err(error) if leases.is_empty() => Err(error),
            _ => Ok(leases),
        }
    }

    async fn extend(
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
        let mut in_hand = self.in_hand();
        for token in tokens {
            let outcome = extended.get(&token.batch).filter(|_| held.contains(token)).cloned();
            let outcome = outcome
                .unwrap_or_else(|| ItemOutcome::Permanent("the lease is not held any more".to_owned()));
            match (&outcome, in_hand.get_mut(token)) {
                (ItemOutcome::Ok, Some(hand)) => {
                    hand.until = until;
                    if let Some(handle) = hand.handle.clone() {
                        hand.line.channel().hide(handle, until.since(self.clock.mono()));
                        hand.line.work.notify_one();
                    }
                }
                (ItemOutcome::Permanent(_), Some(_)) => {
                    in_hand.remove(token);
                }
                _ => {}
            }
            outcomes.push((token.batch, outcome));
        }
        Ok(outcomes)
    }

    async fn release(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        let held = self.held(tokens);
        if held.is_empty() {
            return Ok(());
        }
        self.claims.release_claims(&held, how).await?;
        self.forget(&held);
        Ok(())
    }

    async fn release_holder(&self, holder: &str) -> Result<usize, StoreError> {
        self.lose(|hand| *hand.holder == *holder).await
    }

    async fn rescue(&self, now: MonoMs) -> Result<usize, StoreError> {
        self.lose(|hand| hand.until < now).await
    }
}

/// The actor.
pub struct Coordinator {
    setup: CarrySetup,
    fault: Fault,
}

impl Stage for Coordinator {
    const NAME: &'static str = "coordinator";

    type Setup = CarrySetup;

    fn new(setup: CarrySetup, _: &ChildId, fault: Fault) -> Self {
        Self { setup, fault }
    }
}

impl Actor for Coordinator {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        let run = self.setup.clone().run();
        context.spawn(run.into_actor(self).map(|ended, this, context| match ended {
            Ok(()) => context.stop(),
            Err(error) => this.fault.fail(context, error),
        }));
    }
}

impl Handler<Drain> for Coordinator {
    type Result = ();

    /// It ends when what is being received has come, or soon: cut off, an entry would be hidden from everybody for a
    /// while.
    fn handle(&mut self, _: Drain, _: &mut Self::Context) {
        self.setup.queue.stop();
    }
}
