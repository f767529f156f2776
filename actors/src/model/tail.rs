//! How long a send goes on after its last message was tried for the first time, because messages that fail wait for another
//! attempt.
//!
//! While messages are tried at a steady rate, and the same share of the attempts fails, `rate × shareᵏ` of them per second
//! fail `k` times, and each waits for the sum of `k` waits. Once no message is new any more those that wait are all
//! that is left. The sum of `k` waits, each drawn evenly below a bound ([`Backoff`](super::backoff::Backoff)), is taken to be
//! spread evenly with the same mean and variance: exact for one wait, and close enough for more.

use std::time::Duration;

use postrider_settings::Retry;

use super::retry;

/// The tail is over when on average so many messages are left: a little later than with equal chances (ln 2).
const LEFT_AT_END: f64 = 0.5;

/// More than this of the attempts is not assumed to fail for good: such a send has no end that could be told.
const SHARE_MAX: f64 = 0.99;

/// Failures of one message in a row that are so rare that they count no more.
const RARE: f64 = 1e-3;

/// Halvings of an interval: to a thousandth of a second in a day.
const STEPS: u32 = 27;

/// How the attempts at a destination fail.
#[derive(Clone, Debug, PartialEq)]
pub struct Retries {
    /// The share of the attempts after which a message waits for another one.
    pub share: f64,
    /// How long it waits.
    pub schedule: Retry,
}

/// Messages that wait for another attempt, of those that are sent at a steady rate.
#[derive(Clone, Debug, Default)]
pub struct Tail {
    /// For how long messages are new, in seconds.
    new_for_s: f64,
    /// Of those that fail `k` times in a row: how many come per second, and the mean and half the spread of the sum of their
    /// waits in seconds.
    failing: Vec<(f64, f64, f64)>,
}

impl Tail {
    /// Of a send of so `many` messages, `per_s` per second.
    pub fn new(many: u64, per_s: f64, retries: &Retries) -> Self {
        let share = retries.share.clamp(0.0, SHARE_MAX);
        let backoff = retry::backoff(&retries.schedule);
        let most = retries.schedule.max_attempts.saturating_sub(1);
        let (mut failing, mut mean, mut squares, mut left) = (Vec::new(), 0.0, 0.0, per_s);
        for failures in 1..=most {
            let bound = backoff.bound(failures).as_secs_f64();
            mean += bound / 2.0;
            squares += bound * bound;
            left *= share;
            // Whoever fails after the last wait is given up: it is not waited for.
            let end_here = if failures == most { left } else { left * (1.0 - share) };
            failing.push((end_here, mean, squares.sqrt() / 2.0));
            if left * mean < RARE {
                break;
            }
        }
        Self { new_for_s: many as f64 / per_s, failing }
    }

    /// How many of them are left on average `after_s` seconds after the last message was tried for the first time.
    fn left(&self, after_s: f64) -> f64 {
        self.left_of_endless(after_s) - self.left_of_endless(after_s + self.new_for_s)
    }

    /// The same if messages had been new for ever.
    fn left_of_endless(&self, after_s: f64) -> f64 {
        let of = |&(per_s, mean, spread): &(f64, f64, f64)| {
            let (least, most) = (mean - spread, mean + spread);
            let longer = match after_s {
                after_s if after_s <= least => mean - after_s,
                after_s if after_s < most => (most - after_s).powi(2) / (4.0 * spread),
                _ => 0.0,
            };
            per_s * longer
        };
        self.failing.iter().map(of).sum()
    }

    /// How many wait while messages are new.
    pub fn waiting(&self) -> f64 {
        self.left(0.0)
    }

    /// How long it takes until the last one is done, when `left` of them are left and no message is new.
    pub fn lasts(&self, left: f64) -> Duration {
        let end = self.when(LEFT_AT_END.min(left));
        Duration::try_from_secs_f64(end - self.when(left)).unwrap_or_default()
    }

    /// After how many seconds `left` of them are left.
    fn when(&self, left: f64) -> f64 {
        let last = self.failing.last().map_or(0.0, |(_, mean, spread)| mean + spread);
        let (mut from, mut to) = (0.0, last);
        if self.waiting() <= left {
            return 0.0;
        }
        for _ in 0..STEPS {
            let middle = f64::midpoint(from, to);
            if self.left(middle) > left { from = middle } else { to = middle }
        }
        to
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

    use super::*;
    use crate::model::{
        finish::work,
        outcome::{Outcome, Reason, Verdict},
        retry::{Decision, decide},
        time::UnixMs,
    };

    const SCHEDULE: Retry = Retry {
        max_attempts: 40,
        max_age: Duration::from_hours(72),
        base: Duration::from_secs(1),
        cap: Duration::from_hours(1),
        max_retry_after: Duration::from_hours(1),
    };

    /// When each of `messages` gets its final state, in order, of a send that tries `per_s` for the first time per second.
    fn send(messages: u64, per_s: u64, share: f64, draw: &mut SmallRng) -> Vec<u64> {
        let mut ends: Vec<_> = (0..messages)
            .map(|number| {
                let mut at = UnixMs(number * 1_000 / per_s);
                let failed = Outcome::Retryable { status: 503, reason: Reason::Status, retry_after: None };
                for attempt in 1.. {
                    let outcome = if draw.random_bool(share) { failed } else { return at.0 };
                    let decision =
                        decide(&SCHEDULE, outcome, attempt, Duration::ZERO, at, draw.random_range(0.0..1.0));
                    let Decision::Record(Verdict::Retry { not_before, .. }) = decision else { break };
                    at = not_before;
                }
                at.0
            })
            .collect();
        ends.sort_unstable();
        ends
    }

    /// How far off the estimate is at each tenth of a send of 300 s, in seconds, and the tail that the send had.
    fn off(share: f64, knows_retries: bool, draw: &mut SmallRng) -> (Vec<f64>, f64) {
        let (per_s, seconds) = (200, 300);
        let retries = Retries { share, schedule: SCHEDULE };
        let ends = send(per_s * seconds, per_s, share, draw);
        let end = ends[ends.len() - 1] as f64 / 1_000.0;
        let looks = (1..10).map(|tenth| {
            let at = seconds as f64 * f64::from(tenth) / 10.0;
            let settled = ends.partition_point(|ended| *ended as f64 <= at * 1_000.0);
            let left = (ends.len() - settled) as u64;
            let said = work(left, ends.len() as u64, per_s as f64, knows_retries.then_some(&retries))
                .expect("it moves");
            at + said.as_secs_f64() - end
        });
        (looks.collect(), end - seconds as f64)
    }

    #[test]
    fn a_send_of_which_a_part_fails_is_done_when_it_was_said() {
        let mut draw = SmallRng::seed_from_u64(3);
        for share in [0.02, 0.1] {
            for _ in 0..10 {
                let (off, tail) = off(share, true, &mut draw);
                assert!(off.iter().all(|off| off.abs() < 0.1 * (300.0 + tail)), "{share}: {off:?} {tail}");
            }
        }
    }

    #[test]
    fn a_tail_that_chance_decides_is_said_to_a_factor_of_two() {
        let mut draw = SmallRng::seed_from_u64(5);
        for share in [0.1, 0.3, 0.5] {
            let mut ratios: Vec<_> = (0..21)
                .map(|_| {
                    let (off, tail) = off(share, true, &mut draw);
                    (off[4] + tail) / tail
                })
                .collect();
            ratios.sort_by(f64::total_cmp);
            assert!((0.5..2.0).contains(&ratios[10]), "{share}: {ratios:?}");
            let (off, tail) = off(share, false, &mut draw);
            assert!((off[4] + tail) / tail < 0.3, "{share}: without it {off:?} of {tail}");
        }
    }

    #[test]
    fn where_nothing_fails_there_is_no_tail() {
        let tail = Tail::new(300_000, 1_000.0, &Retries { share: 0.0, schedule: SCHEDULE });
        assert_eq!((tail.waiting(), tail.lasts(0.0), tail.lasts(5.0)), (0.0, Duration::ZERO, Duration::ZERO));
        let once = Retry { max_attempts: 1, ..SCHEDULE };
        let tail = Tail::new(300_000, 1_000.0, &Retries { share: 0.5, schedule: once });
        assert_eq!((tail.waiting(), tail.lasts(5.0)), (0.0, Duration::ZERO));
    }

    #[test]
    fn a_tail_becomes_shorter_as_it_passes() {
        let tail = Tail::new(300_000, 1_000.0, &Retries { share: 0.3, schedule: SCHEDULE });
        let whole = tail.lasts(tail.waiting());
        assert!(whole > Duration::from_mins(2) && whole < Duration::from_mins(30), "{whole:?}");
        let mut before = whole;
        for left in [300.0, 100.0, 20.0, 3.0, 1.0] {
            let lasts = tail.lasts(left);
            assert!(lasts < before, "{left}: {lasts:?} after {before:?}");
            before = lasts;
        }
        assert_eq!(tail.lasts(0.5), Duration::ZERO);
    }

    #[test]
    fn what_always_fails_has_a_tail_that_ends() {
        let tail = Tail::new(1_000_000, 1e6, &Retries { share: 1.0, schedule: SCHEDULE });
        let lasts = tail.lasts(tail.waiting());
        assert!(lasts > Duration::from_hours(10) && lasts < Duration::from_hours(40), "{lasts:?}");
        assert!(tail.lasts(f64::MAX) >= lasts);
    }
}
