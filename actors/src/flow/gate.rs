use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

/// More permits than are ever spent.
const OPEN: usize = Semaphore::MAX_PERMITS / 2;

/// What [`Inside::rate`] holds of a gate that nobody feeds yet, and of an open one.
const UNFED: u64 = u64::MAX;
const UNLIMITED: u64 = 0;

use tokio::sync::{Notify, Semaphore};

use crate::model::limits::GateRate;

/// A rate limit as senders see it: a first-come-first-served semaphore that the throttle feeds at
/// the destination's rate. (Measured: 3000 waiters on governor itself take 395 polls per permit and
/// are served unfairly; one feeding task costs 15 times less.) Without a rate it is open.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Inside>);

#[derive(Debug)]
struct Inside {
    permits: Semaphore,
    /// Messages that wait.
    waiting: AtomicU64,
    /// Permits that were fed and are not spent yet, those that a waiter was given but has not seen included.
    unspent: AtomicU64,
    /// Messages per second that it is fed, [`UNLIMITED`] or [`UNFED`].
    rate: AtomicU64,
    /// Messages that went through.
    passed: AtomicU64,
    /// A message passed or began to wait: for who feeds.
    moved: Notify,
    /// A message began to wait: for who leases the rate.
    wanted: Notify,
}

impl Default for Gate {
    fn default() -> Self {
        Self(Arc::new(Inside {
            permits: Semaphore::new(0),
            waiting: AtomicU64::new(0),
            unspent: AtomicU64::new(0),
            rate: AtomicU64::new(UNFED),
            passed: AtomicU64::new(0),
            moved: Notify::new(),
            wanted: Notify::new(),
        }))
    }
}

/// Messages that wait. Dropped when their turn has come, or when they give their place up.
struct GateTicket<'a>(&'a Inside, u64);

impl Drop for GateTicket<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(self.1, SeqCst);
    }
}

impl Gate {
    /// Waits for this message's turn. Cancelling it gives the place in the queue up.
    pub async fn pass(&self) {
        self.pass_up_to(1).await;
    }

    /// Waits until some of `count` messages may go, and lets them through; how many. Cancelling it gives the place in the
    /// queue up.
    pub async fn pass_up_to(&self, count: usize) -> usize {
        let inside = &*self.0;
        let passed = self.try_pass(count);
        if passed > 0 || count == 0 {
            return passed;
        }
        let waiting = GateTicket(inside, count as u64);
        inside.waiting.fetch_add(waiting.1, SeqCst);
        inside.moved.notify_one();
        inside.wanted.notify_one();
        let permit = inside.permits.acquire().await.expect("a gate's semaphore is never closed");
        let more = self.take_free(count - 1);
        // Before the permits count as spent: see `unserved`.
        drop(waiting);
        permit.forget();
        self.spent(1 + more);
        1 + more
    }

    /// Lets up to `count` messages through that need not wait; how many.
    pub fn try_pass(&self, count: usize) -> usize {
        let taken = self.take_free(count);
        if taken > 0 {
            self.spent(taken);
        }
        taken
    }

    fn take_free(&self, count: usize) -> usize {
        let permits = &self.0.permits;
        let free = permits.available_permits().min(count);
        // Another task may have taken them since; then we get nothing.
        match permits.try_acquire_many(u32::try_from(free).unwrap_or(u32::MAX)) {
            Ok(taken) => {
                taken.forget();
                free
            }
            Err(_) => 0,
        }
    }

    fn spent(&self, count: usize) {
        self.0.unspent.fetch_sub(count as u64, SeqCst);
        self.0.passed.fetch_add(count as u64, SeqCst);
        self.0.moved.notify_one();
    }

    /// Lets `count` messages through.
    pub fn feed(&self, count: u32) {
        self.0.unspent.fetch_add(u64::from(count), SeqCst);
        self.0.permits.add_permits(count as usize);
    }

    /// Says what it is fed from now on.
    pub fn limit(&self, rate: GateRate) {
        let per_s = match rate {
            GateRate::Open => UNLIMITED,
            GateRate::PerS(rate) => rate.get().into(),
        };
        self.0.rate.store(per_s, SeqCst);
        self.withdraw();
        if rate == GateRate::Open {
            self.0.unspent.fetch_add(OPEN as u64, SeqCst);
            self.0.permits.add_permits(OPEN);
        }
    }

    /// What it is fed; `None` until that is known.
    pub fn rate(&self) -> Option<GateRate> {
        let rate = self.0.rate.load(SeqCst);
        let per_s =
            || u32::try_from(rate).ok().and_then(NonZeroU32::new).map_or(GateRate::Open, GateRate::PerS);
        (rate != UNFED).then(per_s)
    }

    /// Takes back the permits that lie unused.
    pub fn withdraw(&self) {
        let taken_back = self.0.permits.forget_permits(usize::MAX >> 3);
        self.0.unspent.fetch_sub(taken_back as u64, SeqCst);
    }

    /// Waits until less than `count` permits lie unused, so that an idle gate saves up no burst
    /// beyond what the limiter grants.
    pub async fn drained(&self, count: u32) {
        while self.0.permits.available_permits() >= count as usize {
            self.moved().await;
        }
    }

    /// Messages that wait and have no permit coming. It may miss one that is just passing, never count one
    /// too many; [`Self::moved`] returns when it has passed.
    pub fn unserved(&self) -> u64 {
        // In this order: a message that passes leaves the waiting ones first.
        let unspent = self.0.unspent.load(SeqCst);
        self.0.waiting.load(SeqCst).saturating_sub(unspent)
    }

    /// Messages that went through since the gate was made.
    pub fn passed(&self) -> u64 {
        self.0.passed.load(SeqCst)
    }

    /// Waits until a message passes or begins to wait; returns at once if one has since the last call. For
    /// one task only.
    pub async fn moved(&self) {
        self.0.moved.notified().await;
    }

    /// Waits until a message waits. For one task only.
    pub async fn wanted(&self) {
        while self.unserved() == 0 {
            self.0.wanted.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn several_pass_at_once_as_far_as_there_are_permits() {
        let gate = Gate::default();
        assert_eq!((gate.try_pass(3), gate.passed()), (0, 0));
        gate.feed(5);
        assert_eq!((gate.try_pass(3), gate.pass_up_to(9).await, gate.passed()), (3, 2, 5));
        let waiting = gate.clone();
        let waiting = tokio::spawn(async move { waiting.pass_up_to(4).await });
        gate.wanted().await;
        assert_eq!(gate.unserved(), 4, "so many could go");
        gate.feed(3);
        assert_eq!((waiting.await.unwrap(), gate.unserved(), gate.passed()), (3, 0, 8));
        assert_eq!(gate.pass_up_to(0).await, 0, "who wants none does not wait");
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_gate_lets_everybody_through_until_it_is_limited_again() {
        let gate = Gate::default();
        let limited = GateRate::PerS(NonZeroU32::new(5).unwrap());
        assert_eq!(gate.rate(), None, "nobody feeds it");
        let waiting = gate.clone();
        let waiting = tokio::spawn(async move { waiting.pass_up_to(4).await });
        gate.wanted().await;
        gate.limit(GateRate::Open);
        assert_eq!((waiting.await.unwrap(), gate.unserved(), gate.rate()), (4, 0, Some(GateRate::Open)));
        assert_eq!((gate.try_pass(1_000_000), gate.passed()), (1_000_000, 1_000_004));
        gate.limit(limited);
        assert_eq!((gate.try_pass(1), gate.unserved(), gate.rate()), (0, 0, Some(limited)));
        gate.feed(2);
        assert_eq!(gate.try_pass(3), 2);
        let waiting = gate.clone();
        let waiting = tokio::spawn(async move { waiting.pass().await });
        gate.wanted().await;
        assert_eq!(gate.unserved(), 1, "what an open gate had too many is forgotten");
        gate.limit(GateRate::Open);
        gate.limit(GateRate::Open);
        waiting.await.unwrap();
        gate.limit(limited);
        assert!(timeout(Duration::from_secs(1), gate.pass()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_and_what_lies_unused_are_known() {
        let gate = Gate::default();
        assert!(timeout(Duration::from_secs(1), gate.wanted()).await.is_err());
        let tasks: Vec<_> = (0..3)
            .map(|_| {
                let gate = gate.clone();
                tokio::spawn(async move { gate.pass().await })
            })
            .collect();
        gate.wanted().await;
        tokio::task::yield_now().await;
        assert_eq!((gate.unserved(), gate.passed()), (3, 0));
        gate.feed(2);
        assert_eq!((gate.unserved(), gate.passed()), (1, 0), "two have their permits but have not run yet");
        for _ in 0..9 {
            tokio::task::yield_now().await;
        }
        assert_eq!((gate.unserved(), gate.passed()), (1, 2));
        for task in &tasks {
            task.abort();
        }
        for task in tasks {
            let _ = task.await; // aborted or through
        }
        assert_eq!(gate.unserved(), 0, "who gave up does not wait");
        gate.feed(2);
        gate.pass().await;
        assert_eq!(gate.passed(), 3);
        gate.withdraw();
        assert!(timeout(Duration::from_secs(1), gate.pass()).await.is_err(), "what lay unused is gone");
        gate.feed(1);
        gate.pass().await;
    }
}
