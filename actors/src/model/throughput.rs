//! Throughput over the last minute (S4.7): the count, and the rates per hour and per day at that pace.
//! Never an average over a lifetime, which hides that nothing moves any more.

use std::time::Duration;

use super::time::MonoMs;

/// How much of the past counts.
pub const WINDOW: Duration = Duration::from_mins(1);

const SLOTS: u64 = WINDOW.as_secs();
const SLOT_MS: u64 = 1000;

/// A count per second of the last minute, for one worker.
#[derive(Clone, Debug)]
pub struct Throughput {
    since: MonoMs,
    counts: [u64; SLOTS as usize],
    /// The second that was counted last.
    latest: u64,
}

/// The count of a window, and its length.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Done within the window.
    pub processed: u64,
    /// How long the window is: a minute, or less in the first minute.
    pub window: Duration,
}

impl Rates {
    /// Per hour, at the window's pace.
    pub fn per_hour(self) -> f64 {
        self.per(Duration::from_hours(1))
    }

    /// Per day, at the window's pace.
    pub fn per_day(self) -> f64 {
        self.per(Duration::from_hours(24))
    }

    fn per(self, time: Duration) -> f64 {
        if self.window.is_zero() {
            return 0.0;
        }
        self.processed as f64 * (time.as_secs_f64() / self.window.as_secs_f64())
    }
}

impl Throughput {
    /// Nothing is done at `now`.
    pub fn new(now: MonoMs) -> Self {
        Self { since: now, counts: [0; SLOTS as usize], latest: now.0 / SLOT_MS }
    }

    /// `count` more were done at `now`.
    pub fn add(&mut self, now: MonoMs, count: u64) {
        self.forget(now);
        self.counts[(self.latest % SLOTS) as usize] += count;
    }

    /// The rates over the minute before `now`. The first second counts as a whole one, so that a start makes no
    /// peak.
    pub fn rates(&mut self, now: MonoMs) -> Rates {
        self.forget(now);
        let begin = (self.latest + 1).saturating_sub(SLOTS).saturating_mul(SLOT_MS).max(self.since.0);
        Rates {
            processed: self.counts.iter().sum(),
            window: MonoMs(now.0.max(self.latest * SLOT_MS))
                .since(MonoMs(begin))
                .max(Duration::from_millis(SLOT_MS)),
        }
    }

    /// Empties the seconds that have left the window.
    fn forget(&mut self, now: MonoMs) {
        let second = now.0 / SLOT_MS;
        let passed = second.saturating_sub(self.latest);
        for step in 1..=passed.min(SLOTS) {
            self.counts[((self.latest + step) % SLOTS) as usize] = 0;
        }
        self.latest = self.latest.max(second);
    }
}

/// A worker's throughput, and when to log it.
#[derive(Clone, Debug)]
pub struct ThroughputLog {
    throughput: Throughput,
    due: MonoMs,
}

impl ThroughputLog {
    /// Nothing is done at `now`.
    pub fn new(now: MonoMs) -> Self {
        Self { throughput: Throughput::new(now), due: now.after(WINDOW) }
    }

    /// `count` more were done at `now`.
    pub fn add(&mut self, now: MonoMs, count: u64) {
        self.throughput.add(now, count);
    }

    /// What to log at `now`: once a minute, and only if something was done.
    pub fn due(&mut self, now: MonoMs) -> Option<Rates> {
        if now < self.due {
            return None;
        }
        self.due = now.after(WINDOW);
        Some(self.throughput.rates(now)).filter(|rates| rates.processed > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: f64 = 3600.0;

    #[test]
    fn s4_7_a_steady_pace_is_extrapolated_and_its_end_is_seen() {
        let start = 5_300;
        let mut throughput = Throughput::new(MonoMs(start));
        for ms in (0..300_000).step_by(100) {
            throughput.add(MonoMs(start + ms), 50);
        }
        let now = MonoMs(start + 300_000);
        let rates = throughput.rates(now);
        assert!((rates.per_hour() / (500.0 * HOUR) - 1.0).abs() < 0.01, "{rates:?}");
        assert!((rates.per_day() / (12_000.0 * HOUR) - 1.0).abs() < 0.01, "{rates:?}");
        // Half a minute without anything, then a whole one.
        let half = throughput.rates(now.after(WINDOW / 2));
        assert!((half.per_hour() / (250.0 * HOUR) - 1.0).abs() < 0.05, "{half:?}");
        let idle = throughput.rates(now.after(WINDOW));
        assert_eq!((idle.processed, idle.per_hour()), (0, 0.0));
    }

    #[test]
    fn s4_7_a_start_is_no_peak_and_a_young_worker_no_slow_one() {
        let mut throughput = Throughput::new(MonoMs(999));
        throughput.add(MonoMs(1_000), 10);
        let rates = throughput.rates(MonoMs(1_001));
        assert_eq!((rates.processed, rates.window), (10, Duration::from_secs(1)));
        throughput.add(MonoMs(10_000), 80);
        let rates = throughput.rates(MonoMs(10_999));
        assert_eq!((rates.processed, rates.window), (90, Duration::from_secs(10)));
        assert!((rates.per_hour() - 9.0 * HOUR).abs() < 1e-6);
        assert!(Rates::default().per_day().abs() < f64::EPSILON);
    }

    proptest! {
        #[test]
        fn s4_7_exactly_the_window_is_counted(steps in prop::collection::vec((0u64..90_000, 0u64..9), 1..40)) {
            let mut throughput = Throughput::new(MonoMs(0));
            let mut done = Vec::new();
            let mut now = 0;
            for (pause, count) in steps {
                now += pause;
                throughput.add(MonoMs(now), count);
                done.push((now, count));
                let rates = throughput.rates(MonoMs(now));
                let begin = now - u64::try_from(rates.window.as_millis()).unwrap().min(now);
                let expected: u64 = done.iter().filter(|(at, _)| *at >= begin).map(|(_, count)| count).sum();
                prop_assert_eq!(rates.processed, expected);
                prop_assert!(rates.window <= WINDOW);
            }
        }
    }

    #[test]
    fn s4_7_it_is_logged_once_a_minute_and_not_while_nothing_is_done() {
        let mut log = ThroughputLog::new(MonoMs(0));
        log.add(MonoMs(30_000), 600);
        assert_eq!(log.due(MonoMs(59_999)), None);
        let rates = log.due(MonoMs(60_000)).expect("a minute is over");
        assert_eq!(rates.processed, 600);
        assert_eq!(log.due(MonoMs(60_001)), None);
        assert_eq!(log.due(MonoMs(200_000)), None, "nothing was done");
    }
}
