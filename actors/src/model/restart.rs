//! When a child is restarted, and when its supervisor gives up (design §8).

use std::{collections::VecDeque, time::Duration};

use super::{backoff::Backoff, time::MonoMs};

/// How often and how fast children are restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// More restarts than this within `period` escalate to the parent.
    pub max_restarts: u32,
    /// The window that restarts are counted in. A child that lived this long starts over at the backoff's base.
    pub period: Duration,
    /// Before each of them.
    pub backoff: Backoff,
}

impl RestartPolicy {
    /// Whether the intensity can ever be reached: a child that fails at once must exceed
    /// `max_restarts` within `period`, or a crash loop would go on for ever. (Measured: with
    /// 1–30 s backoff and 5 restarts a 60 s window escalates, a 10 s window never does.)
    pub fn is_consistent(&self) -> bool {
        let waits: Duration = (1..=self.max_restarts).map(|restarts| self.backoff.bound(restarts)).sum();
        waits < self.period
    }
}

/// What to do about a child that exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// Start it again after this wait.
    After(Duration),
    /// Too many restarts: fail towards the parent.
    Escalate,
}

/// Counts the restarts that a supervisor made lately.
#[derive(Clone, Debug)]
pub struct RestartIntensity {
    policy: RestartPolicy,
    recent: VecDeque<MonoMs>,
}

impl RestartIntensity {
    /// No restarts yet.
    pub fn new(policy: RestartPolicy) -> Self {
        Self { policy, recent: VecDeque::new() }
    }

    /// A child exited at `now` for the `failures`-th time in a row (from 1). `jitter` is in
    /// `0.0..1.0`: full jitter, so that children who fail together don't restart together.
    pub fn exited(&mut self, now: MonoMs, failures: u32, jitter: f64) -> Restart {
        while self.recent.front().is_some_and(|&at| now.since(at) > self.policy.period) {
            self.recent.pop_front();
        }
        self.recent.push_back(now);
        if self.recent.len() > self.policy.max_restarts as usize {
            return Restart::Escalate;
        }
        Restart::After(self.policy.backoff.wait(failures, jitter))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policy(max_restarts: u32, period_s: u64, base_s: u64, cap_s: u64) -> RestartPolicy {
        RestartPolicy {
            max_restarts,
            period: Duration::from_secs(period_s),
            backoff: Backoff::new(Duration::from_secs(base_s), Duration::from_secs(cap_s)),
        }
    }

    #[test]
    fn the_measured_example_is_judged_as_measured() {
        assert!(policy(5, 60, 1, 30).is_consistent());
        assert!(!policy(5, 10, 1, 30).is_consistent());
    }

    proptest! {
        #[test]
        fn a_consistent_policy_escalates_a_crash_loop(
            max_restarts in 0u32..12, period_s in 1u64..200, base_s in 0u64..8, cap_s in 0u64..40, jitter in 0.0f64..1.0,
        ) {
            let policy = policy(max_restarts, period_s, base_s, cap_s);
            prop_assume!(policy.is_consistent());
            let mut intensity = RestartIntensity::new(policy);
            let mut now = MonoMs(0);
            for failures in 1..=max_restarts {
                match intensity.exited(now, failures, jitter) {
                    Restart::After(wait) => {
                        prop_assert!(wait <= policy.backoff.cap);
                        now = now.after(wait);
                    }
                    Restart::Escalate => prop_assert!(false, "escalated after {failures}"),
                }
            }
            prop_assert_eq!(intensity.exited(now, max_restarts + 1, jitter), Restart::Escalate);
        }

        #[test]
        fn rare_restarts_never_escalate(times in 1usize..50, failures in 1u32..9) {
            let policy = policy(1, 10, 1, 2);
            let mut intensity = RestartIntensity::new(policy);
            for nth in 0..times {
                let now = MonoMs(nth as u64 * 10_001);
                prop_assert!(matches!(intensity.exited(now, failures, 0.5), Restart::After(_)));
            }
        }
    }
}
