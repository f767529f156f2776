//! How long the queue holds back what is sent to it (S2.3, S2.6): nothing, a fixed time, or a time that grows with the
//! messages of its destination that are due.
//!
//! A delay is not a rate limit (that is the throttle's): it spreads a burst and leaves what is due already to be
//! delivered first.

use std::time::Duration;

use super::time::MonoMs;

/// The longest delay: what SQS holds back by itself (`DelaySeconds`, "Amazon SQS message quotas").
pub const DELAY_MAX: Duration = Duration::from_mins(15);

/// How often the depth is read by the seed's table: one call per reading.
const READ_EVERY: Duration = Duration::from_secs(5);

/// For how many readings the last known depth counts while no newer one can be had.
const STALE_READINGS: u32 = 3;

/// One step of [`DelayPolicy::ByDepth`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DepthStep {
    /// Taken when more messages than this are due.
    pub above: u64,
    /// The delay from then on.
    pub delay: Duration,
}

/// How long what is dispatched is held back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DelayPolicy {
    /// Not at all.
    #[default]
    None,
    /// Always as long.
    Fixed(Duration),
    /// By how many messages are due: the depth.
    ByDepth {
        /// Ascending in both. See [`DelayPolicy::check`].
        steps: Vec<DepthStep>,
        /// A step is left only when the depth is this much, in percent of the step's threshold, below it: so a
        /// depth that swings around a threshold does not make the delay swing with it.
        hysteresis_percent: u32,
        /// How often the depth is read at most: one call per reading.
        read_every: Duration,
    },
}

impl DelayPolicy {
    /// The seed's table: above 500 30 s, above 1000 60 s.
    pub fn seed_table() -> Self {
        let step = |above, seconds| DepthStep { above, delay: Duration::from_secs(seconds) };
        Self::ByDepth {
            steps: vec![step(500, 30), step(1_000, 60)],
            hysteresis_percent: 10,
            read_every: READ_EVERY,
        }
    }

    /// What is wrong with the policy, for whoever wrote it.
    pub fn check(&self) -> Result<(), String> {
        let too_long = |delay: Duration| {
            format!(
                "a delay of {} s is longer than the {} s that SQS allows",
                delay.as_secs(),
                DELAY_MAX.as_secs()
            )
        };
        match self {
            Self::Fixed(delay) if *delay > DELAY_MAX => Err(too_long(*delay)),
            Self::None | Self::Fixed(_) => Ok(()),
            Self::ByDepth { steps, hysteresis_percent, .. } => {
                if steps.is_empty() {
                    return Err("a delay by depth needs at least one step".into());
                }
                if let Some(step) = steps.iter().find(|step| step.delay > DELAY_MAX) {
                    return Err(too_long(step.delay));
                }
                let ascends =
                    |pair: &[DepthStep]| pair[0].above < pair[1].above && pair[0].delay <= pair[1].delay;
                if !steps.windows(2).all(ascends) {
                    return Err(
                        "steps must ascend in depth, and none may delay less than the one before".into()
                    );
                }
                if *hysteresis_percent >= 100 {
                    return Err(format!("a hysteresis of {hysteresis_percent} % never leaves a step"));
                }
                Ok(())
            }
        }
    }
}

/// The state of the policy: its current step.
#[derive(Clone, Debug)]
pub struct Delay {
    policy: DelayPolicy,
    /// 0: below all steps; n: on the n-th.
    level: usize,
    /// When the depth was asked for last, and when it was last known.
    asked: Option<MonoMs>,
    known: Option<MonoMs>,
}

impl Delay {
    /// Before any reading.
    pub fn new(policy: DelayPolicy) -> Self {
        Self { policy, level: 0, asked: None, known: None }
    }

    /// Whether the depth is to be read before the next dispatch.
    pub fn wants_depth(&self, now: MonoMs) -> bool {
        let DelayPolicy::ByDepth { read_every, .. } = &self.policy else { return false };
        self.asked.is_none_or(|asked| now.since(asked) >= *read_every)
    }

    /// Takes a reading in; `None` if the depth is unknown.
    pub fn read(&mut self, depth: Option<u64>, now: MonoMs) {
        self.asked = Some(now);
        let Some(depth) = depth else { return };
        self.known = Some(now);
        let DelayPolicy::ByDepth { steps, hysteresis_percent, .. } = &self.policy else { return };
        let kept = 100u32.saturating_sub(*hysteresis_percent);
        // Up at once, down only when the depth is clear of the threshold.
        let above = steps.iter().take_while(|step| depth > step.above).count();
        // In 128 bits: a threshold may be any number.
        let clear = |step: &DepthStep| u128::from(depth) * 100 <= u128::from(step.above) * u128::from(kept);
        while self.level > above && clear(&steps[self.level - 1]) {
            self.level -= 1;
        }
        self.level = self.level.max(above);
    }

    /// How long to hold back now. A depth that is unknown for long, or always was, counts as the greatest: an
    /// unknown count is not 0, and gates fail closed (design §7; the seed's read error opened its gate).
    pub fn now(&self, now: MonoMs) -> Duration {
        let (steps, read_every) = match &self.policy {
            DelayPolicy::None => return Duration::ZERO,
            DelayPolicy::Fixed(delay) => return *delay,
            DelayPolicy::ByDepth { steps, read_every, .. } => (steps, *read_every),
        };
        let is_known = self.known.is_some_and(|known| now.since(known) < read_every * STALE_READINGS);
        let level = if is_known { self.level } else { steps.len() };
        level.checked_sub(1).and_then(|index| steps.get(index)).map_or(Duration::ZERO, |step| step.delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seconds(delay: &Delay, now: u64) -> u64 {
        delay.now(MonoMs(now)).as_secs()
    }

    #[test]
    fn s2_6_the_seed_s_table() {
        for (depth, expected) in [(0, 0), (500, 0), (501, 30), (1_000, 30), (1_001, 60), (1_000_000, 60)] {
            let mut delay = Delay::new(DelayPolicy::seed_table());
            delay.read(Some(depth), MonoMs(0));
            assert_eq!(seconds(&delay, 0), expected, "{depth}");
        }
    }

    #[test]
    fn s2_6_a_step_is_taken_at_once_and_left_only_clear_of_its_threshold() {
        let mut delay = Delay::new(DelayPolicy::seed_table());
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
        let mut delay = Delay::new(DelayPolicy::seed_table());
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
        let mut delay = Delay::new(DelayPolicy::seed_table());
        assert!(delay.wants_depth(MonoMs(0)));
        delay.read(None, MonoMs(0));
        assert!(!delay.wants_depth(MonoMs(4_999)));
        assert!(delay.wants_depth(MonoMs(5_000)));
        assert!(!Delay::new(DelayPolicy::None).wants_depth(MonoMs(0)));
        assert!(!Delay::new(DelayPolicy::Fixed(Duration::from_secs(1))).wants_depth(MonoMs(0)));
    }

    #[test]
    fn a_policy_that_makes_no_sense_is_refused() {
        let by_depth = |steps: &[(u64, u64)], hysteresis_percent| DelayPolicy::ByDepth {
            steps: steps
                .iter()
                .map(|&(above, s)| DepthStep { above, delay: Duration::from_secs(s) })
                .collect(),
            hysteresis_percent,
            read_every: READ_EVERY,
        };
        assert_eq!(DelayPolicy::seed_table().check(), Ok(()));
        assert_eq!(DelayPolicy::Fixed(DELAY_MAX).check(), Ok(()));
        let refused = [
            DelayPolicy::Fixed(DELAY_MAX + Duration::from_secs(1)),
            by_depth(&[], 10),
            by_depth(&[(500, 901)], 10),
            by_depth(&[(500, 30), (500, 60)], 10),
            by_depth(&[(500, 30), (1_000, 20)], 10),
            by_depth(&[(500, 30)], 100),
        ];
        for policy in refused {
            assert!(policy.check().is_err(), "{policy:?}");
        }
    }

    proptest! {
        #[test]
        fn the_delay_is_never_less_than_the_depth_asks_for(depths in prop::collection::vec(0u64..3_000, 1..50)) {
            let mut delay = Delay::new(DelayPolicy::seed_table());
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
