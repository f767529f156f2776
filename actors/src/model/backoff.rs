//! How long to wait before the next try, and when to stop trying. Time and randomness are arguments.

use std::time::Duration;

use super::call::FailureKind;

/// Exponential backoff with full jitter: each wait is drawn evenly between nothing and a bound that doubles (AWS
/// Architecture Blog, "Exponential Backoff And Jitter"), so that those who failed together don't come back together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The bound of the first wait.
    pub base: Duration,
    /// The bound of every wait.
    pub cap: Duration,
}

impl Backoff {
    /// From `base` up to `cap`.
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap }
    }

    /// The longest wait after `failures` failures in a row (from 1).
    pub fn bound(&self, failures: u32) -> Duration {
        self.base.saturating_mul(1 << failures.saturating_sub(1).min(31)).min(self.cap)
    }

    /// The wait after `failures` failures in a row (from 1); `jitter` is in `0.0..1.0`.
    pub fn wait(&self, failures: u32, jitter: f64) -> Duration {
        self.bound(failures).mul_f64(jitter.clamp(0.0, 1.0))
    }
}

/// How often a call is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Tries, the first included.
    pub tries: u32,
    /// Between two of them.
    pub backoff: Backoff,
}

/// The tries of one logical call, which may repeat with less each time. A call that has not been answered once is
/// `Unknown` in the end, however the last try failed.
#[derive(Clone, Copy, Debug)]
pub struct Tries {
    budget: Budget,
    failed: u32,
    is_unknown: bool,
}

impl Tries {
    /// None made yet.
    pub fn new(budget: Budget) -> Self {
        Self { budget, failed: 0, is_unknown: false }
    }

    /// The call gets on: tries are for standing still. What was not answered is remembered.
    pub fn progressed(&mut self) {
        self.failed = 0;
    }

    /// A try failed: how long to wait before the next one, or as what to give up. `jitter` is in `0.0..1.0`.
    ///
    /// What an operator has to change is not repeated here: who needs the answer waits for it, others do without.
    pub fn failed(&mut self, kind: FailureKind, jitter: f64) -> Result<Duration, FailureKind> {
        self.is_unknown |= kind == FailureKind::Unknown;
        let in_the_end = if self.is_unknown { FailureKind::Unknown } else { kind };
        match kind {
            FailureKind::Invalid => return Err(kind),
            FailureKind::Denied | FailureKind::Refused => return Err(in_the_end),
            FailureKind::Throttled | FailureKind::Unavailable | FailureKind::Unknown => {}
        }
        self.failed = self.failed.saturating_add(1);
        if self.failed >= self.budget.tries {
            return Err(in_the_end);
        }
        Ok(self.budget.backoff.wait(self.failed, jitter))
    }
}

impl From<Budget> for Tries {
    fn from(budget: Budget) -> Self {
        Self::new(budget)
    }
}

/// A draw for each number of failures, from a seed: what shares it comes back at the same time, and one that is low does
/// not make all of the waits short.
#[derive(Clone, Copy, Debug)]
pub struct Draws(pub u64);

impl Draws {
    /// The draw after `failures` failures in a row, in `0.0..1.0` (splitmix64).
    pub fn of(self, failures: u32) -> f64 {
        let mut mixed =
            self.0.wrapping_add(u64::from(failures).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // 53 bits: a fraction that a double holds exactly.
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use FailureKind::{Denied, Invalid, Refused, Throttled, Unavailable, Unknown};

    fn any_passing() -> impl Strategy<Value = FailureKind> {
        prop::sample::select(vec![Throttled, Unavailable, Unknown])
    }

    #[test]
    fn f44_no_seed_makes_every_wait_short() {
        for seed in 0..10_000 {
            let draws: Vec<_> = (1..=40).map(|failures| Draws(seed).of(failures)).collect();
            assert!(draws.iter().all(|draw| (0.0..1.0).contains(draw)));
            let mean = draws.iter().sum::<f64>() / 40.0;
            assert!((0.25..0.75).contains(&mean), "{seed}: {mean}");
        }
    }

    proptest! {
        #[test]
        fn a_bound_doubles_from_the_base_to_the_cap_and_never_overflows(
            base_ms in 0u64..100_000, cap_ms in 0u64..10_000_000, failures in 1u32..1_000, jitter in -1.0f64..2.0,
        ) {
            let backoff = Backoff::new(Duration::from_millis(base_ms), Duration::from_millis(cap_ms));
            let (this, next) = (backoff.bound(failures), backoff.bound(failures + 1));
            prop_assert!(this <= backoff.cap && this <= next && next <= (this * 2).max(backoff.base));
            prop_assert_eq!(backoff.bound(1), backoff.base.min(backoff.cap));
            prop_assert!(backoff.wait(failures, jitter) <= this);
            let never = Backoff::new(Duration::MAX, Duration::MAX);
            prop_assert_eq!(never.bound(failures), Duration::MAX);
        }

        #[test]
        fn waits_are_spread_over_the_whole_bound(failures in 1u32..40, jitters in prop::collection::vec(0.0f64..1.0, 64)) {
            let backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
            let bound = backoff.bound(failures).as_secs_f64();
            for jitter in jitters {
                let share = backoff.wait(failures, jitter).as_secs_f64() / bound;
                prop_assert!((share - jitter).abs() < 1e-6);
            }
        }

        #[test]
        fn tries_end_and_one_that_was_not_answered_makes_the_whole_unknown(
            tries in 1u32..12, kinds in prop::collection::vec(any_passing(), 12), jitter in 0.0f64..1.0,
        ) {
            let budget = Budget { tries, backoff: Backoff::new(Duration::from_millis(1), Duration::from_secs(1)) };
            let mut all = Tries::new(budget);
            for (nth, kind) in kinds.iter().take(tries as usize).enumerate() {
                let seen = &kinds[..=nth];
                match all.failed(*kind, jitter) {
                    Ok(wait) => prop_assert!((nth as u32) + 1 < tries && wait <= budget.backoff.cap),
                    Err(end) => {
                        prop_assert_eq!(nth as u32 + 1, tries);
                        prop_assert_eq!(end, if seen.contains(&Unknown) { Unknown } else { *kind });
                    }
                }
            }
        }

        #[test]
        fn who_gets_on_may_go_on(rounds in 1usize..50) {
            let backoff = Backoff::new(Duration::from_millis(1), Duration::from_secs(1));
            let mut tries = Tries::new(Budget { tries: 2, backoff });
            for _ in 0..rounds {
                prop_assert!(tries.failed(Throttled, 0.5).is_ok());
                tries.progressed();
            }
            prop_assert!(tries.failed(Throttled, 0.5).is_ok());
            prop_assert_eq!(tries.failed(Throttled, 0.5), Err(Throttled));
        }
    }

    #[test]
    fn what_waits_for_an_operator_or_never_works_is_not_repeated() {
        let budget =
            Budget { tries: 5, backoff: Backoff::new(Duration::from_millis(1), Duration::from_secs(1)) };
        for (first, second, end) in [
            (None, Denied, Denied),
            (None, Refused, Refused),
            (None, Invalid, Invalid),
            (Some(Unknown), Denied, Unknown),
            (Some(Unknown), Refused, Unknown),
            // The service has looked at it now: it never happened.
            (Some(Unknown), Invalid, Invalid),
            (Some(Throttled), Denied, Denied),
        ] {
            let mut tries = Tries::new(budget);
            if let Some(first) = first {
                assert!(tries.failed(first, 0.0).is_ok());
            }
            assert_eq!(tries.failed(second, 0.0), Err(end), "{first:?} {second:?}");
        }
    }
}
