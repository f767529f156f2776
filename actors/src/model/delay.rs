//! How long the queue holds back what is sent to it (S2.3, S2.6): nothing, a fixed time, or a time that grows with the
//! messages of its destination that are due.
//!
//! A delay is not a rate limit (that is the throttle's): it spreads a burst and leaves what is due already to be
//! delivered first.

use std::time::Duration;

use postrider_settings::{Delay, DelayMode};

use super::time::MonoMs;

/// How often the depth is read: one call per reading.
const READ_EVERY: Duration = Duration::from_secs(5);

/// A step is left only when the depth is this much, in percent of the step's threshold, below it: so a depth that swings
/// around a threshold does not make the delay swing with it.
const HYSTERESIS_PERCENT: u128 = 10;

/// For how many readings the last known depth counts while no newer one can be had.
const STALE_READINGS: u32 = 3;

/// The state of `[queue.delay]`: its current step.
#[derive(Clone, Debug)]
pub struct CurrentDelay {
    keys: Delay,
    /// 0: below all steps; n: on the n-th.
    level: usize,
    /// When the depth was asked for last, and when it was last known.
    asked: Option<MonoMs>,
    known: Option<MonoMs>,
}

impl CurrentDelay {
    /// Before any reading.
    pub fn new(keys: Delay) -> Self {
        Self { keys, level: 0, asked: None, known: None }
    }

    /// Whether the depth is to be read before the next dispatch.
    pub fn wants_depth(&self, now: MonoMs) -> bool {
        self.keys.mode == DelayMode::ByDepth && self.asked.is_none_or(|asked| now.since(asked) >= READ_EVERY)
    }

    /// Takes a reading in; `None` if the depth is unknown.
    pub fn read(&mut self, depth: Option<u64>, now: MonoMs) {
        self.asked = Some(now);
        let Some(depth) = depth else { return };
        self.known = Some(now);
        let steps = &self.keys.steps;
        // Up at once, down only when the depth is clear of the threshold.
        let above = steps.iter().take_while(|(threshold, _)| depth > *threshold).count();
        // In 128 bits: a threshold may be any number.
        let clear =
            |threshold: u64| u128::from(depth) * 100 <= u128::from(threshold) * (100 - HYSTERESIS_PERCENT);
        while self.level > above && clear(steps[self.level - 1].0) {
            self.level -= 1;
        }
        self.level = self.level.max(above);
    }

    /// How long to hold back now. A depth that is unknown for long, or always was, counts as the greatest: an
    /// unknown count is not 0, and gates fail closed (design §7; the seed's read error opened its gate).
    pub fn now(&self, now: MonoMs) -> Duration {
        match self.keys.mode {
            DelayMode::None => Duration::ZERO,
            DelayMode::Fixed => self.keys.fixed,
            DelayMode::ByDepth => {
                let is_known = self.known.is_some_and(|known| now.since(known) < READ_EVERY * STALE_READINGS);
                let level = if is_known { self.level } else { self.keys.steps.len() };
                let step = level.checked_sub(1).and_then(|index| self.keys.steps.get(index));
                step.map_or(Duration::ZERO, |(_, delay)| *delay)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use postrider_settings::Keys as _;
    use proptest::prelude::*;

    /// The seed's table, which is the default: more than 500 entries 30 s, more than 1000 entries 60 s.
    fn by_depth() -> Delay {
        Delay { mode: DelayMode::ByDepth, ..Delay::declared() }
    }

    fn seconds(delay: &CurrentDelay, now: u64) -> u64 {
        delay.now(MonoMs(now)).as_secs()
    }

    #[test]
    fn s2_6_the_seed_s_table() {
        for (depth, expected) in [(0, 0), (500, 0), (501, 30), (1_000, 30), (1_001, 60), (1_000_000, 60)] {
            let mut delay = CurrentDelay::new(by_depth());
            delay.read(Some(depth), MonoMs(0));
            assert_eq!(seconds(&delay, 0), expected, "{depth}");
        }
    }

    #[test]
    fn s2_6_a_step_is_taken_at_once_and_left_only_clear_of_its_threshold() {
        let mut delay = CurrentDelay::new(by_depth());
        let course = [
            (400, 0),
            (501, 30),
            (480, 30),
            (451, 30),
            (450, 0),
            (1_001, 60),
            (901, 60),
            (900, 30),
            (451, 30),
            (2_000, 60),
            (10, 0),
        ];
        for (at, (depth, expected)) in course.into_iter().enumerate() {
            delay.read(Some(depth), MonoMs(at as u64));
            assert_eq!(seconds(&delay, at as u64), expected, "{depth} at {at}");
        }
    }

    #[test]
    fn s2_6_an_unknown_depth_is_not_zero() {
        let mut delay = CurrentDelay::new(by_depth());
        assert_eq!(seconds(&delay, 0), 60, "never known: the greatest");
        delay.read(None, MonoMs(0));
        assert_eq!(seconds(&delay, 0), 60);
        delay.read(Some(10), MonoMs(5_000));
        delay.read(None, MonoMs(10_000));
        assert_eq!(seconds(&delay, 19_999), 0, "one reading that failed changes nothing yet");
        assert_eq!(seconds(&delay, 20_000), 60);
        delay.read(Some(10), MonoMs(25_000));
        assert_eq!(seconds(&delay, 25_000), 0);
    }

    #[test]
    fn the_depth_is_read_now_and_then_and_only_if_it_matters() {
        let mut delay = CurrentDelay::new(by_depth());
        assert!(delay.wants_depth(MonoMs(0)));
        delay.read(None, MonoMs(0));
        assert!(!delay.wants_depth(MonoMs(4_999)));
        assert!(delay.wants_depth(MonoMs(5_000)));
        assert!(!CurrentDelay::new(Delay::declared()).wants_depth(MonoMs(0)));
        assert!(
            !CurrentDelay::new(Delay { mode: DelayMode::Fixed, ..Delay::declared() }).wants_depth(MonoMs(0))
        );
    }

    proptest! {
        #[test]
        fn the_delay_is_never_less_than_the_depth_asks_for(depths in prop::collection::vec(0u64..3_000, 1..50)) {
            let mut delay = CurrentDelay::new(by_depth());
            for (at, depth) in depths.into_iter().enumerate() {
                delay.read(Some(depth), MonoMs(at as u64));
                let asked = match depth { 0..=500 => 0, 501..=1_000 => 30, _ => 60 };
                let given = seconds(&delay, at as u64);
                prop_assert!(given >= asked);
                // And no more than one could be left with by hysteresis.
                prop_assert!(given == asked || depth > 450 && given == 30 || depth > 900 && given == 60);
            }
        }
    }
}
