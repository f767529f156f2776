//! A token bucket whose rate may change at any time.
//!
//! governor's limiters have one rate for life, and a new one grants a fresh burst; a leased rate changes with
//! every renewal. So a shared rate is paced by this one: what was saved stays, up to the new burst, and
//! nothing is added.

use std::time::Duration;

use super::time::MonoMs;

/// How many millionths a message has: a rate of one thousandth per second brings one in a millisecond.
pub const MICRO: u64 = 1_000_000;

/// Permits that come in at a rate and are saved up to a burst. It starts empty.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    level_micro: u64,
    rate_milli: u64,
    burst_micro: u64,
    at: MonoMs,
}

impl Bucket {
    /// Empty, and stays so until it is [`Self::set`].
    pub fn empty(now: MonoMs) -> Self {
        Self { level_micro: 0, rate_milli: 0, burst_micro: 0, at: now }
    }

    /// From `at` on it fills at `rate_milli` thousandths of a message per second, up to `burst_micro` millionths of
    /// a message.
    pub fn set(&mut self, rate_milli: u64, burst_micro: u64, at: MonoMs) {
        self.fill(at);
        (self.rate_milli, self.burst_micro) = (rate_milli, burst_micro);
        self.level_micro = self.level_micro.min(burst_micro);
    }

    /// Takes `count` permits, at most the burst; or how long it takes until there are so many, if nothing
    /// changes: `Duration::MAX` if there never are.
    pub fn take(&mut self, count: u32, now: MonoMs) -> Result<(), Duration> {
        self.fill(now);
        let needed = u64::from(count) * MICRO;
        if self.level_micro >= needed {
            self.level_micro -= needed;
            return Ok(());
        }
        if self.rate_milli == 0 || needed > self.burst_micro {
            return Err(Duration::MAX);
        }
        Err(Duration::from_millis((needed - self.level_micro).div_ceil(self.rate_milli)))
    }

    fn fill(&mut self, now: MonoMs) {
        let elapsed_ms = now.since(self.at).as_millis() as u64;
        let level = self.level_micro.saturating_add(self.rate_milli.saturating_mul(elapsed_ms));
        self.level_micro = level.min(self.burst_micro);
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_change_of_rate_grants_nothing_and_takes_nothing() {
        let mut bucket = Bucket::empty(MonoMs(5));
        assert_eq!(bucket.take(1, MonoMs(9_000)), Err(Duration::MAX));
        bucket.set(10_000, 5 * MICRO, MonoMs(10_000));
        assert_eq!(bucket.take(1, MonoMs(10_000)), Err(Duration::from_millis(100)));
        assert_eq!(bucket.take(2, MonoMs(10_250)), Ok(()));
        bucket.set(1_000, 5 * MICRO, MonoMs(10_250));
        assert_eq!(bucket.take(1, MonoMs(10_250)), Err(Duration::from_millis(500)), "half a permit is kept");
        assert_eq!(bucket.take(6, MonoMs(10_250)), Err(Duration::MAX), "more than the burst never comes");
        bucket.set(0, 0, MonoMs(99_000));
        bucket.set(10_000, 5 * MICRO, MonoMs(99_000));
        assert_eq!(
            bucket.take(1, MonoMs(99_000)),
            Err(Duration::from_millis(100)),
            "a closed bucket is empty"
        );
    }

    proptest! {
        #[test]
        fn never_more_than_the_rates_brought_and_never_later_than_said(
            steps in prop::collection::vec((0u64..400, 0u64..3_000_000, 1u32..20, 1u32..8), 1..60),
        ) {
            let (mut bucket, mut now, mut rate) = (Bucket::empty(MonoMs(0)), 0u64, 0u64);
            let (mut taken, mut brought) = (0u64, 0u64);
            for (wait, new_rate, burst, count) in steps {
                now += wait;
                brought += rate * wait;
                bucket.set(new_rate, u64::from(burst) * MICRO, MonoMs(now));
                rate = new_rate;
                while bucket.take(count, MonoMs(now)).is_ok() {
                    taken += u64::from(count);
                    prop_assert!(taken * MICRO <= brought, "{taken} taken, {brought} µ brought");
                }
                if count <= burst && rate > 0 {
                    let wait = bucket.take(count, MonoMs(now)).unwrap_err();
                    let mut later = bucket;
                    prop_assert_eq!(later.take(count, MonoMs(now).after(wait)), Ok(()));
                    let early = wait.saturating_sub(Duration::from_millis(1));
                    let mut before = bucket;
                    prop_assert!(before.take(count, MonoMs(now).after(early)).is_err());
                }
            }
        }

        #[test]
        fn a_pause_saves_up_the_burst_and_no_more(pause in 0u64..100_000, rate in 1u64..9_000_000, burst in 1u32..50) {
            let mut bucket = Bucket::empty(MonoMs(0));
            bucket.set(rate, u64::from(burst) * MICRO, MonoMs(0));
            let mut taken = 0u64;
            while bucket.take(1, MonoMs(pause)).is_ok() {
                taken += 1;
            }
            prop_assert_eq!(taken, (rate * pause / MICRO).min(u64::from(burst)));
        }
    }
}
