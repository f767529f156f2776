//! When a failed attempt is retried, and when a message is given up (design §10).

use std::time::Duration;

use postrider_settings::Retry;

use super::{
    backoff::Backoff,
    outcome::{Attempt, DeathCause, Outcome, Reason, Verdict},
    time::UnixMs,
};

/// What follows from an attempt's outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Record this.
    Record(Verdict),
    /// Record nothing: the destination is gone, its messages are held, this one too.
    Hold,
    /// Record nothing: there was no attempt. The message is as it was.
    Leave,
}

/// How long a destination's messages wait between attempts.
pub fn backoff(retry: &Retry) -> Backoff {
    Backoff::new(retry.base, retry.cap)
}

/// The longest that a message ever waits for its next attempt: more can only be said by a clock that was ahead (F9).
pub fn longest_wait(retry: &Retry) -> Duration {
    let longest = retry.cap.max(retry.max_retry_after);
    longest + longest / 8
}

/// Decides on the outcome of a message's `attempts`-th attempt (from 1), which ended at `at`, `age` after it was accepted
/// or redriven: it is tried again by
/// full-jitter exponential backoff, bounded by attempts and by age. A `Retry-After` is honoured where it is longer than
/// the backoff.
pub fn decide(
    retry: &Retry,
    outcome: Outcome,
    attempts: u32,
    age: Duration,
    at: UnixMs,
    jitter: f64,
) -> Decision {
    let dead = |status, reason, cause| {
        Decision::Record(Verdict::Dead { attempt: Attempt { at, status, reason }, cause })
    };
    match outcome {
        Outcome::Sent { status } => Decision::Record(Verdict::Sent { at, status }),
        Outcome::Gone => Decision::Hold,
        Outcome::Unsent(_) => Decision::Leave,
        Outcome::Permanent { status, reason } => dead(status, reason, DeathCause::Permanent),
        Outcome::Retryable { status, reason, retry_after } => {
            if attempts >= retry.max_attempts {
                return dead(status, reason, DeathCause::Attempts);
            }
            let wait = backoff(retry).wait(attempts, jitter).max(retry_after.unwrap_or_default());
            let Some(spare) = retry.max_age.checked_sub(age.saturating_add(wait)) else {
                return dead(status, reason, DeathCause::Age);
            };
            // Rounding makes no message too old.
            let not_before = together(at, wait).min(at.after(wait.saturating_add(spare)));
            Decision::Record(Verdict::Retry { attempt: Attempt { at, status, reason }, not_before })
        }
    }
}

/// `wait` after `at`, rounded up to a step of at most an eighth of the wait, so that messages that failed together
/// come back together (B10).
fn together(at: UnixMs, wait: Duration) -> UnixMs {
    let eighth = u64::try_from(wait.as_millis() / 8).unwrap_or(u64::MAX).max(1);
    // A power of two: waits that are nearly alike have the same step.
    let step = 1 << eighth.ilog2();
    UnixMs(at.after(wait).0.div_ceil(step).saturating_mul(step))
}

/// The verdict on a message whose delivery killed its worker too often.
pub fn poisoned(at: UnixMs) -> Verdict {
    Verdict::Dead { attempt: Attempt { at, status: 0, reason: Reason::Poison }, cause: DeathCause::Poison }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::outcome::{Obstacle, Shortage};
    use proptest::prelude::*;

    const SCHEDULE: Retry = Retry {
        max_attempts: 3,
        max_age: Duration::from_mins(1),
        base: Duration::from_secs(1),
        cap: Duration::from_secs(10),
        max_retry_after: Duration::from_hours(1),
    };

    fn retryable(retry_after: Option<u64>) -> Outcome {
        Outcome::Retryable {
            status: 503,
            reason: Reason::Status,
            retry_after: retry_after.map(Duration::from_secs),
        }
    }

    #[test]
    fn the_last_attempt_is_the_last() {
        let decide = |attempts| decide(&SCHEDULE, retryable(None), attempts, Duration::ZERO, UnixMs(10), 0.5);
        assert!(matches!(decide(1), Decision::Record(Verdict::Retry { not_before: UnixMs(512), .. })));
        assert!(matches!(decide(2), Decision::Record(Verdict::Retry { not_before: UnixMs(1024), .. })));
        assert!(matches!(decide(3), Decision::Record(Verdict::Dead { cause: DeathCause::Attempts, .. })));
    }

    #[test]
    fn a_retry_that_would_come_too_late_is_not_made() {
        let decide =
            |age| decide(&SCHEDULE, retryable(Some(20)), 1, Duration::from_millis(age), UnixMs(7), 0.0);
        assert!(matches!(decide(40_000), Decision::Record(Verdict::Retry { .. })));
        assert!(matches!(decide(40_001), Decision::Record(Verdict::Dead { cause: DeathCause::Age, .. })));
    }

    #[test]
    fn f72_what_this_machine_lacks_is_charged_to_no_message() {
        // Not even where it was the last attempt, long after the last time for one.
        let unsent = Outcome::Unsent(Obstacle::Shortage(Shortage::Descriptors));
        assert_eq!(decide(&SCHEDULE, unsent, 3, Duration::MAX, UnixMs(1), 0.0), Decision::Leave);
    }

    #[test]
    fn gone_records_nothing_and_permanent_is_dead_at_once() {
        assert_eq!(decide(&SCHEDULE, Outcome::Gone, 1, Duration::ZERO, UnixMs(1), 0.0), Decision::Hold);
        let permanent = Outcome::Permanent { status: 400, reason: Reason::Status };
        assert!(matches!(
            decide(&SCHEDULE, permanent, 1, Duration::ZERO, UnixMs(1), 0.0),
            Decision::Record(Verdict::Dead { cause: DeathCause::Permanent, .. })
        ));
    }

    proptest! {
        #[test]
        fn waits_stay_between_retry_after_and_the_cap(
            attempts in 1u32..100, jitter in 0.0f64..1.0, retry_after in prop::option::of(0u64..50), at in 0u64..9_000,
        ) {
            let schedule = Retry { max_attempts: 1000, ..SCHEDULE };
            let decision = decide(&schedule, retryable(retry_after), attempts, Duration::from_millis(at), UnixMs(at), jitter);
            let Decision::Record(Verdict::Retry { not_before, .. }) = decision else {
                panic!("{decision:?}")
            };
            let wait = not_before.since(UnixMs(at));
            let asked = Duration::from_secs(retry_after.unwrap_or(0));
            prop_assert!(wait >= asked);
            prop_assert!(wait <= schedule.cap.max(asked) * 9 / 8);
            prop_assert!(wait <= longest_wait(&schedule));
        }
    }
}
