//! Bounds what one place in the code may log, so that an outage can't fill the disk: a token bucket
//! per callsite. What is kept back is counted and reported. Pure: the time is an argument.

use std::{collections::HashMap, hash::Hash};

/// How long kept-back lines may stay unreported while others are logged.
const REPORT_AFTER_MS: u64 = 10_000;

/// How many lines one place may log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Quota {
    /// At once.
    pub(super) burst: u32,
    /// Per second after that.
    pub(super) per_s: u32,
}

#[derive(Clone, Copy, Debug)]
struct LineBucket {
    /// Thousandths of a line.
    tokens: u64,
    at_ms: u64,
    suppressed: u64,
    reported_ms: u64,
}

/// What to do with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Admission<K> {
    /// Write it, and before it how many lines of which places were kept back.
    Write(Vec<(K, u64)>),
    /// Keep it back.
    Suppress,
}

/// The buckets of all places. There are as many as there are log statements in the program.
#[derive(Debug)]
pub(super) struct Limiter<K> {
    quota: Quota,
    buckets: HashMap<K, LineBucket>,
    swept_ms: u64,
}

impl<K: Clone + Eq + Hash> Limiter<K> {
    pub(super) fn new(quota: Quota) -> Self {
        Self { quota, buckets: HashMap::new(), swept_ms: 0 }
    }

    /// Decides on one line of `place`. `now_ms` counts from anywhere and never jumps back.
    pub(super) fn admit(&mut self, place: &K, now_ms: u64) -> Admission<K> {
        let full = u64::from(self.quota.burst) * 1000;
        let bucket = self.buckets.entry(place.clone()).or_insert(LineBucket {
            tokens: full,
            at_ms: now_ms,
            suppressed: 0,
            reported_ms: now_ms,
        });
        let earned = now_ms.saturating_sub(bucket.at_ms).saturating_mul(u64::from(self.quota.per_s));
        bucket.tokens = bucket.tokens.saturating_add(earned).min(full);
        bucket.at_ms = now_ms;
        if bucket.tokens < 1000 {
            if bucket.suppressed == 0 {
                bucket.reported_ms = now_ms;
            }
            bucket.suppressed += 1;
            return Admission::Suppress;
        }
        bucket.tokens -= 1000;
        let own = std::mem::take(&mut bucket.suppressed);
        let mut reports = Vec::new();
        if own > 0 {
            reports.push((place.clone(), own));
        }
        if now_ms.saturating_sub(self.swept_ms) >= REPORT_AFTER_MS {
            self.swept_ms = now_ms;
            reports.extend(self.take_suppressed(|bucket| now_ms - bucket.reported_ms >= REPORT_AFTER_MS));
        }
        Admission::Write(reports)
    }

    /// Everything that was kept back and not reported yet.
    pub(super) fn take_all_suppressed(&mut self) -> Vec<(K, u64)> {
        self.take_suppressed(|_| true)
    }

    fn take_suppressed(&mut self, is_wanted: impl Fn(&LineBucket) -> bool) -> Vec<(K, u64)> {
        self.buckets
            .iter_mut()
            .filter(|(_, bucket)| bucket.suppressed > 0 && is_wanted(bucket))
            .map(|(place, bucket)| (place.clone(), std::mem::take(&mut bucket.suppressed)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const QUOTA: Quota = Quota { burst: 3, per_s: 2 };

    #[test]
    fn a_burst_passes_then_the_rate_and_the_rest_is_counted() {
        let mut limiter = Limiter::new(QUOTA);
        for _ in 0..3 {
            assert_eq!(limiter.admit(&"a", 0), Admission::Write(vec![]));
        }
        for _ in 0..5 {
            assert_eq!(limiter.admit(&"a", 0), Admission::Suppress);
        }
        assert_eq!(limiter.admit(&"b", 0), Admission::Write(vec![]), "each place has its own");
        assert_eq!(limiter.admit(&"a", 499), Admission::Suppress);
        assert_eq!(limiter.admit(&"a", 500), Admission::Write(vec![("a", 6)]));
        assert_eq!(limiter.admit(&"a", 500), Admission::Suppress);
    }

    #[test]
    fn what_is_kept_back_is_reported_by_others_and_at_the_end() {
        let mut limiter = Limiter::new(QUOTA);
        for _ in 0..10 {
            limiter.admit(&"a", 0);
        }
        assert_eq!(limiter.admit(&"b", REPORT_AFTER_MS - 1), Admission::Write(vec![]));
        assert_eq!(limiter.admit(&"b", REPORT_AFTER_MS), Admission::Write(vec![("a", 7)]));
        assert_eq!(limiter.take_all_suppressed(), []);
        for _ in 0..10 {
            limiter.admit(&"b", REPORT_AFTER_MS);
        }
        assert_eq!(limiter.take_all_suppressed(), [("b", 9)]);
    }

    proptest! {
        #[test]
        fn the_volume_is_bounded_and_every_line_is_written_or_counted(
            steps in prop::collection::vec((0u64..700, 0u8..3), 0..300),
        ) {
            let mut limiter = Limiter::new(QUOTA);
            let (mut now, mut written, mut reported) = (0, [0u64; 3], 0);
            for (wait, place) in &steps {
                now += wait;
                if let Admission::Write(reports) = limiter.admit(place, now) {
                    written[usize::from(*place)] += 1;
                    reported += reports.iter().map(|(_, lines)| lines).sum::<u64>();
                }
            }
            for lines in written {
                prop_assert!(lines <= 3 + now * 2 / 1000);
            }
            reported += limiter.take_all_suppressed().iter().map(|(_, lines)| lines).sum::<u64>();
            prop_assert_eq!(written.iter().sum::<u64>() + reported, steps.len() as u64);
        }
    }
}
