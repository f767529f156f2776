//! When a failed attempt is made again, and when a message is given up (design §10).

use std::{collections::BTreeMap, time::Duration};

use super::{
    batch::{NewBatch, Rows},
    ids::BatchId,
    lease::Lease,
    outcome::{Attempt, DeathCause, Outcome, Reason, Verdict},
    time::UnixMs,
};

/// A destination's retry schedule: full-jitter exponential backoff (AWS Architecture Blog,
/// "Exponential Backoff And Jitter"), bounded by attempts and by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetrySchedule {
    /// Attempts per message and drive, the first included; at least 1.
    pub max_attempts: u32,
    /// No attempt is made later than this after the message was accepted.
    pub max_age: Duration,
    /// The upper bound of the first backoff.
    pub base: Duration,
    /// The upper bound of every backoff.
    pub cap: Duration,
}

/// What follows from an attempt's outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Record this.
    Record(Verdict),
    /// Record nothing: the destination is gone, its messages are held, this one too.
    Hold,
}

impl RetrySchedule {
    /// How long to wait after `attempts` attempts failed: `jitter`, in `0.0..1.0`, times
    /// `min(cap, base · 2^(attempts-1))`.
    pub fn backoff(&self, attempts: u32, jitter: f64) -> Duration {
        let doublings = attempts.saturating_sub(1).min(31);
        self.base.saturating_mul(1 << doublings).min(self.cap).mul_f64(jitter.clamp(0.0, 1.0))
    }

    /// Decides on the outcome of a message's `attempts`-th attempt (from 1), which ended at `at`.
    /// A `Retry-After` is honoured where it is longer than the backoff.
    pub fn decide(
        &self,
        outcome: Outcome,
        attempts: u32,
        accepted_at: UnixMs,
        at: UnixMs,
        jitter: f64,
    ) -> Decision {
        let dead = |status, reason, cause| {
            Decision::Record(Verdict::Dead { attempt: Attempt { at, status, reason }, cause })
        };
        match outcome {
            Outcome::Sent { status } => Decision::Record(Verdict::Sent { at, status }),
            Outcome::Gone => Decision::Hold,
            Outcome::Permanent { status, reason } => dead(status, reason, DeathCause::Permanent),
            Outcome::Retryable { status, reason, retry_after } => {
                if attempts >= self.max_attempts {
                    return dead(status, reason, DeathCause::Attempts);
                }
                let wait = self.backoff(attempts, jitter).max(retry_after.unwrap_or_default());
                let not_before = at.after(wait);
                if not_before.since(accepted_at) > self.max_age {
                    return dead(status, reason, DeathCause::Age);
                }
                Decision::Record(Verdict::Retry { attempt: Attempt { at, status, reason }, not_before })
            }
        }
    }
}

/// The verdict on a message whose delivery killed its worker too often.
pub fn poisoned(at: UnixMs) -> Verdict {
    Verdict::Dead { attempt: Attempt { at, status: 0, reason: Reason::Poison }, cause: DeathCause::Poison }
}

/// The batches that carry on the messages of `lease` whose verdict is a retry, one per due time. Due
/// times are rounded up to `granularity`, so that many `Retry-After` answers make few batches.
pub fn retry_batches(
    lease: &Lease,
    rows: &Rows,
    verdicts: &[(u32, Verdict)],
    granularity: Duration,
) -> Vec<NewBatch> {
    let step = u64::try_from(granularity.as_millis()).unwrap_or(u64::MAX).max(1);
    let mut by_due: BTreeMap<u64, BTreeMap<usize, Attempt>> = BTreeMap::new();
    for &(index, verdict) in verdicts {
        if let Verdict::Retry { attempt, not_before } = verdict {
            let due = not_before.0.div_ceil(step).saturating_mul(step);
            by_due.entry(due).or_default().insert(index as usize, attempt);
        }
    }
    by_due
        .into_iter()
        .map(|(due, messages)| {
            let history = messages
                .iter()
                .map(|(&index, &attempt)| {
                    let mut history = lease.history.get(index).cloned().unwrap_or_default();
                    history.push(attempt);
                    history
                })
                .collect();
            let payload = rows.select(messages.keys().copied());
            let count = payload.count();
            let first_row = messages.keys().next().map_or(0, |&index| rows.row(index));
            let (drive, attempt) = (lease.drive, lease.attempt + 1);
            NewBatch {
                id: BatchId::derive(lease.header.file, &lease.header.destination, first_row, drive, attempt),
                root: lease.root,
                header: lease.header.clone(),
                first_row,
                count,
                drive,
                attempt,
                accepted_at: lease.accepted_at,
                not_before: UnixMs(due),
                payload: payload.finish(),
                history,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SCHEDULE: RetrySchedule = RetrySchedule {
        max_attempts: 3,
        max_age: Duration::from_mins(1),
        base: Duration::from_secs(1),
        cap: Duration::from_secs(10),
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
        let decide = |attempts| SCHEDULE.decide(retryable(None), attempts, UnixMs(0), UnixMs(10), 0.5);
        assert!(matches!(decide(1), Decision::Record(Verdict::Retry { not_before: UnixMs(510), .. })));
        assert!(matches!(decide(2), Decision::Record(Verdict::Retry { not_before: UnixMs(1010), .. })));
        assert!(matches!(decide(3), Decision::Record(Verdict::Dead { cause: DeathCause::Attempts, .. })));
    }

    #[test]
    fn a_retry_that_would_come_too_late_is_none() {
        let decide = |at| SCHEDULE.decide(retryable(Some(20)), 1, UnixMs(0), UnixMs(at), 0.0);
        assert!(matches!(decide(40_000), Decision::Record(Verdict::Retry { .. })));
        assert!(matches!(decide(40_001), Decision::Record(Verdict::Dead { cause: DeathCause::Age, .. })));
    }

    #[test]
    fn gone_records_nothing_and_permanent_is_dead_at_once() {
        assert_eq!(SCHEDULE.decide(Outcome::Gone, 1, UnixMs(0), UnixMs(1), 0.0), Decision::Hold);
        let permanent = Outcome::Permanent { status: 400, reason: Reason::Status };
        assert!(matches!(
            SCHEDULE.decide(permanent, 1, UnixMs(0), UnixMs(1), 0.0),
            Decision::Record(Verdict::Dead { cause: DeathCause::Permanent, .. })
        ));
    }

    proptest! {
        #[test]
        fn waits_stay_between_retry_after_and_the_cap(
            attempts in 1u32..100, jitter in 0.0f64..1.0, retry_after in prop::option::of(0u64..50), at in 0u64..9_000,
        ) {
            let schedule = RetrySchedule { max_attempts: 1000, ..SCHEDULE };
            let decision = schedule.decide(retryable(retry_after), attempts, UnixMs(0), UnixMs(at), jitter);
            let Decision::Record(Verdict::Retry { not_before, .. }) = decision else {
                panic!("{decision:?}")
            };
            let wait = not_before.since(UnixMs(at));
            let asked = Duration::from_secs(retry_after.unwrap_or(0));
            prop_assert!(wait >= asked);
            prop_assert!(wait <= schedule.cap.max(asked));
            prop_assert!(schedule.backoff(attempts, jitter) <= schedule.backoff(attempts + 1, jitter));
        }
    }
}
