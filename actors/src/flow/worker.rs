use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

use super::{Bell, Bells, Progress, Tracing, insist, log_rates, spans::OpenSpans};
use crate::{
    model::{
        hold::HeldFile,
        lease::LeaseToken,
        priority::FilePriority,
        terms::Terms,
        throughput::ThroughputLog,
        time::{MonoMs, UnixMs},
        trace::{LeaseEnd, TraceParent},
    },
    ports::{
        Clock, ItemOutcome, Lease, LeaseRequest, Ledger, Queue, Release, Settled, Settlement, Steering,
        StoreError, Want,
    },
};

/// The longest a worker sleeps before it asks the queue again: changes by other processes ring no bell.
const TICK: Duration = Duration::from_millis(500);

/// How often at most it asks which destinations are disabled, which files held, and which are urgent by order: a store that has to be called for it remembers the answer
/// for a second (B25).
const HOLDS_EVERY: Duration = Duration::from_millis(100);

/// What every worker that pulls leased batches works with.
#[derive(Clone)]
pub struct WorkerSetup {
    /// Where batches come from.
    pub queue: Arc<dyn Queue>,
    /// Where outcomes go.
    pub ledger: Arc<dyn Ledger>,
    /// Which files are held.
    pub steering: Arc<dyn Steering>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Rung when batches may have become due, and by the worker itself when it needs more.
    pub queued: Bell,
    /// To ring when a lease ended with messages left, which have to be dispatched again; nobody's where
    /// workers lease what is due.
    pub due_again: Bells,
    /// Those who lease what a worker gives back that was closed.
    pub successors: Bells,
    /// How long a lease holds unless extended.
    pub lease: Duration,
    /// When the process was born.
    pub born: MonoMs,
    /// Where the batches' spans go, if anybody collects traces.
    pub tracing: Option<Tracing>,
    /// Sign of life.
    pub progress: Progress,
}

/// How a batch of a file on these terms is given back unused at `now`.
pub fn unused(terms: &Terms, now: UnixMs) -> Release {
    terms.closed_until(now).map_or(Release::Unused, |until| Release::Closed { from: now, until })
}

/// What a worker does with the batches that it has leased.
pub trait DeliveryStrategy {
    /// These destinations are disabled, and these files held: nothing more is begun for them, nor for files that are closed
    /// by now, and what is leased of them is given back.
    fn hold(&self, disabled: &[Arc<str>], files: &[HeldFile]);

    /// So urgent are these files by an operator's order; the others are as their batches say.
    fn prioritize(&self, _files: &[FilePriority]) {}

    /// One turn of the loop that leases: gives back what it is done with.
    fn turn(&self) -> impl Future<Output = Result<(), StoreError>>;

    /// What it could do with now.
    fn wants(&self) -> Vec<Want>;

    /// Takes over a leased batch.
    fn take(&self, lease: Lease);

    /// Begins what may be begun, after leases came or time has passed.
    fn begin(&self);

    /// How long it may sleep at most.
    fn sleep(&self) -> Duration;

    /// The held leases.
    fn tokens(&self) -> Vec<LeaseToken>;

    /// Does nothing more under a lease that is lost or has ended; whether it was held.
    fn forget(&self, token: LeaseToken) -> bool;

    /// Whether it holds nothing.
    fn is_empty(&self) -> bool;
}

/// One life of a worker: it leases batches and extends their leases, records outcomes and so acknowledges, and returns
/// what it can't finish, until it is closed and holds nothing. Its [`DeliveryStrategy`] delivers the messages.
pub struct Worker {
    setup: WorkerSetup,
    /// Names this life.
    holder: Arc<str>,
    closing: watch::Sender<bool>,
    throughput: Mutex<ThroughputLog>,
    spans: Option<OpenSpans>,
}

impl Worker {
    /// `holder` names this life of it.
    pub fn new(setup: WorkerSetup, holder: &str) -> Self {
        let throughput = Mutex::new(ThroughputLog::new(setup.clock.mono()));
        let open_spans = |tracing| OpenSpans::new(tracing, setup.clock.clone());
        let spans = setup.tracing.clone().map(open_spans);
        Self { setup, holder: holder.into(), closing: watch::Sender::new(false), throughput, spans }
    }

    /// The time.
    pub fn clock(&self) -> &dyn Clock {
        &*self.setup.clock
    }

    /// What the requests of a lease carry, if anybody collects traces.
    pub fn trace_parent(&self, lease: &Lease) -> Option<TraceParent> {
        self.spans.as_ref().map(|spans| spans.parent(lease))
    }

    fn end_spans(&self, tokens: impl IntoIterator<Item = LeaseToken>, end: LeaseEnd) {
        if let Some(spans) = &self.spans {
            for token in tokens {
                spans.end(token, end);
            }
        }
    }

    /// Wakes the loop that leases.
    pub fn wake(&self) {
        self.setup.queued.ring();
    }

    /// Leases nothing more.
    pub fn close(&self) {
        self.closing.send_replace(true);
        self.wake();
    }

    /// Whether it was closed.
    pub fn is_closing(&self) -> bool {
        *self.closing.borrow()
    }

    /// Returns when it is closed.
    pub async fn closed(&self) {
        // It can't be dropped while it is borrowed.
        let _ = self.closing.subscribe().wait_for(|closing| *closing).await;
    }

    /// Does a store operation until it is done or refused.
    pub async fn insist<T, F>(
        &self,
        what: &'static str,
        operation: impl FnMut() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        insist(what, self.clock(), &self.setup.progress, operation).await
    }

    fn throughput(&self) -> MutexGuard<'_, ThroughputLog> {
        // Changed by infallible steps only.
        self.throughput.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until when a lease holds that is asked for now: each try asks for a whole one, or what a store that was away for
    /// longer grants in the end would be over when it comes.
    fn until(&self) -> MonoMs {
        self.setup.clock.mono().after(self.setup.lease)
    }

    /// Leases what the strategy wants until the worker is closed and holds nothing. `predecessor` is the holder
    /// of its leases in its last life.
    pub async fn lease(
        &self,
        strategy: &impl DeliveryStrategy,
        predecessor: Option<String>,
    ) -> Result<(), StoreError> {
        let setup = &self.setup;
        if let Some(predecessor) = predecessor {
            self.insist("taking leases back", || setup.queue.release_holder(&predecessor)).await?;
        }
        let mut looked = None;
        loop {
            let now = setup.clock.mono();
            let rates = self.throughput().due(now);
            if let Some(rates) = rates {
                log_rates(&self.holder, rates);
            }
            if looked.is_none_or(|at| now.since(at) >= HOLDS_EVERY) {
                looked = Some(now);
                let steered = tokio::try_join!(
                    setup.ledger.disabled_destinations(),
                    setup.steering.held_files(),
                    setup.steering.priorities()
                );
                match steered {
                    Ok((disabled, files, priorities)) => {
                        strategy.hold(&disabled, &files);
                        strategy.prioritize(&priorities);
                    }
                    // What was known holds on: leasing and recording will wait for the store and say so.
                    Err(error) => {
                        tracing::debug!(%error, "it is not known what is held and how urgent files are");
                    }
                }
            }
            strategy.turn().await?;
            if self.is_closing() && strategy.is_empty() {
                return Ok(());
            }
            let mut wants = if self.is_closing() { Vec::new() } else { strategy.wants() };
            if wants.is_empty() {
                strategy.begin();
            } else {
                let now = setup.clock.wall();
                let born = now.before(setup.clock.mono().since(setup.born));
                let lease = || {
                    let (holder, wants) = (self.holder.clone(), wants.clone());
                    setup.queue.lease(LeaseRequest { holder, wants, until: self.until(), now, born })
                };
                let leases = self.insist("leasing", lease).await?;
                failpoint!("lease.after");
                for lease in leases {
                    let is_its = |want: &&mut Want| *want.destination == *lease.header.destination;
                    if let Some(want) = wants.iter_mut().find(is_its) {
                        want.messages = want.messages.saturating_sub(lease.due_count(now));
                        want.batches = want.batches.saturating_sub(1);
                    }
                    if let Some(spans) = &self.spans {
                        spans.begin(&lease);
                    }
                    strategy.take(lease);
                }
                wants.retain(|want| want.messages > 0 && want.batches > 0);
                strategy.begin();
                if wants.is_empty() {
                    continue;
                }
            }
            setup.queued.wait(strategy.sleep().min(TICK)).await;
        }
    }

    /// Extends the held leases, as long as the worker lives.
    pub async fn extend(&self, strategy: &impl DeliveryStrategy) -> Result<(), StoreError> {
        loop {
            tokio::time::sleep(self.setup.lease / 3).await;
            let tokens = strategy.tokens();
            if tokens.is_empty() {
                continue;
            }
            let extend = || self.setup.queue.extend(&tokens, self.until());
            let outcomes = self.insist("extending leases", extend).await?;
            for (token, (_, outcome)) in tokens.into_iter().zip(outcomes) {
                // One that was settled meanwhile is not held any more, and no loss.
                if let ItemOutcome::Permanent(why) = outcome
                    && strategy.forget(token)
                {
                    self.end_spans([token], LeaseEnd::Lost);
                    tracing::warn!(batch = %token.batch, why, "the lease is lost; its new holder delivers the rest");
                }
            }
        }
    }

    /// Records outcomes, hands the answers to `note` in order, and acknowledges the batches whose leases have ended
    /// with it.
    pub async fn settle(
        &self,
        settlements: &[Settlement],
        note: impl FnOnce(&[Settled]),
    ) -> Result<(), StoreError> {
        failpoint!("settle.before");
        let settle = || self.setup.ledger.settle(settlements.to_vec());
        let settled = self.insist("recording outcomes", settle).await?;
        failpoint!("settle.after");
        if let Some(spans) = &self.spans {
            spans.settled(settlements, &settled);
        }
        note(&settled);
        let (mut ended, mut stale, mut is_due_again, mut recorded) = (Vec::new(), Vec::new(), false, 0);
        for (settlement, settled) in settlements.iter().zip(settled) {
            recorded += settlement.verdicts.len() as u64;
            match settled {
                Settled::Open => {}
                Settled::Complete => ended.push(settlement.token),
                Settled::Released => {
                    ended.push(settlement.token);
                    is_due_again = true;
                }
                Settled::Stale => stale.push(settlement.token),
            }
        }
        self.throughput().add(self.clock().mono(), recorded);
        if !ended.is_empty() {
            self.insist("acknowledging", || self.setup.queue.acknowledge(&ended)).await?;
        }
        // Another worker has them, or they are settled: their next holder will see.
        self.release(&stale, Release::Unused).await?;
        if is_due_again {
            self.setup.due_again.ring();
            self.hand_over();
        }
        Ok(())
    }

    /// Gives leases back, each in its way.
    pub async fn give_back(&self, leases: &[(LeaseToken, Release)]) -> Result<(), StoreError> {
        let mut leases = leases.to_vec();
        leases.sort_by_key(|(_, how)| *how);
        for alike in leases.chunk_by(|(_, how), (_, other)| how == other) {
            let tokens: Vec<_> = alike.iter().map(|(token, _)| *token).collect();
            self.release(&tokens, alike[0].1).await?;
        }
        Ok(())
    }

    /// Gives leases back.
    pub async fn release(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        if tokens.is_empty() {
            return Ok(());
        }
        self.insist("giving leases back", || self.setup.queue.release(tokens, how)).await?;
        let end = if how == Release::Lost { LeaseEnd::Lost } else { LeaseEnd::Returned };
        self.end_spans(tokens.iter().copied(), end);
        self.hand_over();
        Ok(())
    }

    /// Lets others know that they may lease what this worker had, if it leases nothing more.
    fn hand_over(&self) {
        if self.is_closing() {
            self.setup.successors.ring();
        }
    }

    /// Holds a destination that is gone (410).
    pub async fn disable(&self, name: &str, reason: &str) -> Result<(), StoreError> {
        let at = self.clock().wall();
        self.insist("disabling a destination", || self.setup.ledger.disable_destination(name, reason, at))
            .await
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use async_trait::async_trait;

    use super::*;
    use crate::{
        flow::ProgressBoard,
        model::ids::BatchId,
        testing::{MemoryStore, TokioClock},
    };

    const LEASE: Duration = Duration::from_secs(3);

    /// Can do nothing until a time, and then takes note of what it is asked for.
    struct FullDisk {
        clock: Arc<TokioClock>,
        until: MonoMs,
        extended: Mutex<Vec<(MonoMs, MonoMs)>>,
    }

    #[async_trait]
    impl Queue for FullDisk {
        async fn lease(&self, _: LeaseRequest) -> Result<Vec<Lease>, StoreError> {
            Ok(Vec::new())
        }

        async fn extend(
            &self,
            tokens: &[LeaseToken],
            until: MonoMs,
        ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
            let now = self.clock.mono();
            if now < self.until {
                return Err(StoreError::Retryable("the disk is full".into()));
            }
            self.extended.lock().unwrap().push((now, until));
            Ok(tokens.iter().map(|token| (token.batch, ItemOutcome::Ok)).collect())
        }

        async fn release(&self, _: &[LeaseToken], _: Release) -> Result<(), StoreError> {
            Ok(())
        }

        async fn release_holder(&self, _: &str) -> Result<usize, StoreError> {
            Ok(0)
        }

        async fn rescue(&self, _: MonoMs) -> Result<usize, StoreError> {
            Ok(0)
        }
    }

    /// Holds one lease.
    struct Holding;

    impl DeliveryStrategy for Holding {
        fn hold(&self, _: &[Arc<str>], _: &[HeldFile]) {}

        async fn turn(&self) -> Result<(), StoreError> {
            Ok(())
        }

        fn wants(&self) -> Vec<Want> {
            Vec::new()
        }

        fn take(&self, _: Lease) {}

        fn begin(&self) {}

        fn sleep(&self) -> Duration {
            Duration::MAX
        }

        fn tokens(&self) -> Vec<LeaseToken> {
            vec![LeaseToken { batch: BatchId([1; 16]), fence: 1 }]
        }

        fn forget(&self, _: LeaseToken) -> bool {
            true
        }

        fn is_empty(&self) -> bool {
            false
        }
    }

    #[tokio::test(start_paused = true)]
    async fn f06_what_is_extended_late_is_extended_for_a_whole_lease() {
        let clock = Arc::new(TokioClock::at(UnixMs(0)));
        let extended = Mutex::default();
        let queue = Arc::new(FullDisk { clock: clock.clone(), until: MonoMs(20_000), extended });
        let setup = WorkerSetup {
            queue: queue.clone(),
            ledger: Arc::new(MemoryStore::new()),
            steering: Arc::new(MemoryStore::new()),
            clock,
            queued: Bell::default(),
            due_again: Bells::default(),
            successors: Bells::default(),
            lease: LEASE,
            born: MonoMs(0),
            tracing: None,
            progress: ProgressBoard::default().mark("worker"),
        };
        let worker = Worker::new(setup, "w");
        assert!(tokio::time::timeout(Duration::from_secs(40), worker.extend(&Holding)).await.is_err());
        let extended = queue.extended.lock().unwrap();
        assert!(extended.len() > 2, "it goes on");
        for &(now, until) in &*extended {
            assert_eq!(until, now.after(LEASE), "not for what was left when it was asked for first");
        }
    }
}
