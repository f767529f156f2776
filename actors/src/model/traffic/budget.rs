//! How many retries a destination is worth: a token bucket, so that a receiver in trouble gets no storm of them.
//!
//! It holds 500 tokens, or ten for each request that may be in flight. A retry costs 5, and 5 more after a timeout. A message
//! that is sent at once brings 1; a retry that succeeds 12: what it has cost (as in the retry quota of AWS' SDKs), and what one
//! beside it has that failed, so that the retries of a receiver which is well again are not slowed down, nor those of one that
//! fails half of all requests; time brings 10 per second. An empty bucket defers retries; first attempts need no token. As
//! long as less than 58 % of attempts fail at random it never runs dry.

use std::time::Duration;

use crate::model::time::MonoMs;

const CAPACITY_MIN: f64 = 500.0;
const CAPACITY_PER_PERMIT: f64 = 10.0;
const RETRY: f64 = 5.0;
const TIMEOUT: f64 = 5.0;
const SUCCESS: f64 = 1.0;
/// More than two retries cost: of a receiver that fails half of all requests it must grow, or it runs dry by chance.
const RETRY_SUCCESS: f64 = 12.0;
const PER_SECOND: f64 = 10.0;

/// The budget of one destination.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudget {
    level: f64,
    capacity: f64,
    at: MonoMs,
}

impl RetryBudget {
    /// A full one, for a destination that may have `limit` requests in flight.
    pub fn new(limit: usize, now: MonoMs) -> Self {
        let capacity = capacity(limit);
        Self { level: capacity, capacity, at: now }
    }

    /// Tokens that it holds.
    pub fn level(&self) -> u64 {
        self.level as u64
    }

    /// Whether a retry may go at `now`; otherwise when one may, if nothing is sent until then.
    pub fn may_retry(&mut self, limit: usize, now: MonoMs) -> Result<(), MonoMs> {
        self.capacity = capacity(limit);
        let since = now.since(self.at);
        self.at = self.at.max(now);
        self.level = (self.level + since.as_secs_f64() * PER_SECOND).min(self.capacity);
        if self.level >= RETRY {
            return Ok(());
        }
        // Rounded up to the clock's milliseconds.
        let wait = Duration::from_secs_f64((RETRY - self.level) / PER_SECOND);
        Err(now.after(wait + Duration::from_millis(1)))
    }

    /// A retry goes, which [`Self::may_retry`] allowed.
    pub fn retry(&mut self) {
        self.level = (self.level - RETRY).max(0.0);
    }

    /// An attempt was not answered in time: its retry costs more.
    pub fn timed_out(&mut self) {
        self.level = (self.level - TIMEOUT).max(0.0);
    }

    /// A message was sent, at once or by a retry.
    pub fn sent(&mut self, is_retry: bool) {
        let brings = if is_retry { RETRY_SUCCESS } else { SUCCESS };
        self.level = (self.level + brings).min(self.capacity);
    }
}

fn capacity(limit: usize) -> f64 {
    (CAPACITY_PER_PERMIT * limit as f64).max(CAPACITY_MIN)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    /// Retries that go while of `rate` attempts per second this share fails, in 60 s; and those that were wanted.
    fn retries(rate: u32, failing: impl Fn(u32) -> bool) -> (u32, u32) {
        let mut budget = RetryBudget::new(64, MonoMs(0));
        let (mut went, mut wanted) = (0, 0);
        for nth in 0..rate * 60 {
            let now = MonoMs(u64::from(nth) * 1_000 / u64::from(rate));
            if failing(nth) {
                wanted += 1;
                if budget.may_retry(64, now).is_ok() {
                    budget.retry();
                    went += 1;
                }
            } else {
                budget.sent(false);
            }
        }
        (went, wanted)
    }

    #[test]
    fn f44_a_receiver_in_trouble_gets_few_retries_and_a_healthy_one_all() {
        let (went, wanted) = retries(1_000, |nth| nth % 7 == 0);
        assert_eq!(went, wanted, "one in seven fails");
        let (went, wanted) = retries(1_000, |_| true);
        assert!(wanted == 60_000 && went <= 128 + 120, "the bucket, and two per second: {went}");
        let (went, wanted) = retries(1_000, |nth| nth % 2 == 0);
        assert!(went < wanted / 4, "a fifth of what is sent: {went} of {wanted}");
    }

    #[test]
    fn retries_that_succeed_cost_nothing() {
        let mut budget = RetryBudget::new(4, MonoMs(0));
        for _ in 0..10_000 {
            budget.may_retry(4, MonoMs(0)).unwrap();
            budget.retry();
            budget.sent(true);
        }
        assert_eq!(budget.level(), 500);
        // A quarter of all attempts fails, retries too: every message is tried until it is sent.
        let mut failures = 0;
        let mut attempt = 0;
        for _ in 0..10_000 {
            attempt += 1;
            let mut is_retry = false;
            while attempt % 4 == 0 {
                failures += 1;
                assert_eq!(budget.may_retry(4, MonoMs(0)), Ok(()), "after {failures} failures");
                budget.retry();
                is_retry = true;
                attempt += 1;
            }
            budget.sent(is_retry);
        }
        assert_eq!(failures, 3_333);
    }

    #[test]
    fn a_receiver_that_fails_half_of_all_requests_gets_every_retry() {
        // The worst order is that of a large file: first attempts bring what they do at once, then only retries are left.
        for seed in 0..20 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut budget = RetryBudget::new(64, MonoMs(0));
            for nth in 0..100_000 {
                assert_eq!(budget.may_retry(64, MonoMs(0)), Ok(()), "seed {seed}, after {nth}");
                budget.retry();
                if random.random() {
                    budget.sent(true);
                }
            }
        }
    }

    #[test]
    fn a_timeout_costs_twice_as_much() {
        let mut budget = RetryBudget::new(1, MonoMs(0));
        let drain = |budget: &mut RetryBudget, limit, timeouts| {
            let mut retries = 0;
            while budget.may_retry(limit, MonoMs(0)).is_ok() {
                budget.retry();
                if timeouts {
                    budget.timed_out();
                }
                retries += 1;
            }
            retries
        };
        assert_eq!(drain(&mut budget, 1, true), 50);
        assert_eq!(drain(&mut RetryBudget::new(1, MonoMs(0)), 1, false), 100);
        assert_eq!(drain(&mut RetryBudget::new(1_000, MonoMs(0)), 1_000, false), 2_000);
        assert_eq!(budget.may_retry(1, MonoMs(0)), Err(MonoMs(501)));
        assert_eq!(budget.may_retry(1, MonoMs(501)), Ok(()), "when it said");
    }

    proptest! {
        #[test]
        fn what_it_grants_is_covered_and_it_grants_when_it_said(
            steps in prop::collection::vec((0u64..2_000, 0u8..4), 1..400),
        ) {
            let (mut budget, mut now, mut spent, mut sent) = (RetryBudget::new(10, MonoMs(0)), 0u64, 0u64, 0u64);
            for (wait, step) in steps {
                now += wait;
                match (step, budget.may_retry(10, MonoMs(now))) {
                    (0, Ok(())) => {
                        budget.retry();
                        spent += 5;
                    }
                    (1, _) => {
                        budget.sent(false);
                        sent += 1;
                    }
                    (2, _) => budget.timed_out(),
                    (_, Err(at)) => {
                        prop_assert!(at > MonoMs(now) && at.since(MonoMs(now)) <= Duration::from_millis(502));
                        let mut later = budget;
                        prop_assert_eq!(later.may_retry(10, at), Ok(()));
                    }
                    _ => {}
                }
                prop_assert!(spent <= 500 + sent + now / 100 + 1);
                prop_assert!(budget.level() <= 500);
            }
        }
    }
}
