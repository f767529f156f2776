//! Alarms: how high a reading must be, and for how long, before an alarm is raised, and when it is cleared (seed row
//! S2.8). The caller takes the readings.

pub mod board;
pub mod facts;

use std::{collections::VecDeque, time::Duration};

use super::time::MonoMs;

/// What is watched, each for every subject by itself: see [`board`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AlarmKind {
    /// Messages without a final state, of a destination.
    Depth,
    /// The share of a destination's attempts, or of queue entries, that failed.
    Failures,
    /// Age of the oldest overdue batch.
    Latency,
    /// Messages to a destination that were given up.
    Dead,
    /// Attempts that could not begin because this machine lacked descriptors, ports or memory.
    Shortage,
    /// A feed is parked.
    Feeds,
    /// Files of a feed that failed, or one that can't be taken.
    Files,
    /// Batches that can't be read and are set aside.
    Damage,
    /// A destination leads to an address that is not allowed.
    Blocked,
    /// A destination seems to be used wrongly and is disabled.
    Suspects,
    /// A destination's circuit breaker has been open for long.
    Breaker,
    /// A file's first messages failed, and the others wait.
    Canary,
    /// Files whose rows and states do not add up.
    Balance,
    /// How full the disk of the state directory is.
    Disk,
    /// Messages whose final receipt did not come in time.
    Receipts,
    /// Actors that fail and are restarted again and again.
    Restarts,
    /// A file will not be done by its `finish_by`.
    Late,
}

impl AlarmKind {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::Depth,
        Self::Failures,
        Self::Latency,
        Self::Dead,
        Self::Shortage,
        Self::Feeds,
        Self::Files,
        Self::Damage,
        Self::Blocked,
        Self::Suspects,
        Self::Breaker,
        Self::Canary,
        Self::Balance,
        Self::Disk,
        Self::Receipts,
        Self::Restarts,
        Self::Late,
    ];

    /// The word that operators see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Depth => "depth",
            Self::Failures => "failures",
            Self::Latency => "latency",
            Self::Dead => "dead",
            Self::Shortage => "shortage",
            Self::Feeds => "feeds",
            Self::Files => "files",
            Self::Damage => "damage",
            Self::Blocked => "blocked",
            Self::Suspects => "suspects",
            Self::Breaker => "breaker",
            Self::Canary => "canary",
            Self::Balance => "balance",
            Self::Disk => "disk",
            Self::Receipts => "receipts",
            Self::Restarts => "restarts",
            Self::Late => "late",
        }
    }

    /// The unit that its readings are in.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Depth | Self::Dead | Self::Receipts => "messages",
            Self::Failures | Self::Disk => "percent",
            Self::Latency | Self::Breaker => "seconds",
            Self::Shortage => "attempts",
            Self::Feeds => "feeds",
            Self::Files | Self::Canary | Self::Balance | Self::Late => "files",
            Self::Damage => "batches",
            Self::Blocked | Self::Suspects => "destinations",
            Self::Restarts => "restarts",
        }
    }

    /// Whether messages may be lost or stand still (`critical`), or somebody should look (`warning`).
    pub fn severity(self) -> &'static str {
        match self {
            Self::Damage
            | Self::Blocked
            | Self::Suspects
            | Self::Breaker
            | Self::Canary
            | Self::Balance
            | Self::Disk => "critical",
            Self::Depth
            | Self::Failures
            | Self::Latency
            | Self::Dead
            | Self::Shortage
            | Self::Feeds
            | Self::Files
            | Self::Receipts
            | Self::Restarts
            | Self::Late => "warning",
        }
    }

    /// What to do about it.
    pub fn remedy(self, subject: &str) -> String {
        let file = subject.rsplit(": ").next().unwrap_or(subject);
        match self {
            Self::Depth | Self::Latency => {
                "is it slow, held or paused? postrider status says what limits it".into()
            }
            Self::Failures => {
                "postrider status has the last error; postrider dead summary what was given up".into()
            }
            Self::Dead => format!("postrider dead list --destination {subject}; then postrider dead redrive"),
            Self::Shortage => {
                "raise LimitNOFILE or net.ipv4.ip_local_port_range; the log names what is missing".into()
            }
            Self::Feeds => "correct it; the feed goes on by itself".into(),
            Self::Files => "postrider files says which and why; correct the file and drop it again".into(),
            Self::Damage => "the log names the batch; restore the store, or give its rows up".into(),
            Self::Blocked => format!("if it is meant: add the network to destinations.{subject}.allow"),
            Self::Suspects => format!("correct the configuration, then: postrider resume {subject}"),
            Self::Breaker => "is the receiver down? Its messages wait and are charged nothing".into(),
            Self::Canary => {
                format!("postrider release {file} to go on, postrider cancel {file} to give it up")
            }
            Self::Balance => "postrider files says which; keep the store, and report it".into(),
            Self::Disk => {
                "make room, or move state.dir to a larger disk; intake pauses when it is full".into()
            }
            Self::Receipts => "does the provider still send receipts? postrider receipts status".into(),
            Self::Restarts => "the log says why it failed each time".into(),
            Self::Late => format!("postrider status says what limits it; postrider priority {file} urgent"),
        }
    }
}

/// When an alarm is raised and cleared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AlarmRule {
    /// Readings above this are too high.
    pub threshold: f64,
    /// An alarm that is raised clears at readings of this or below; at most `threshold`.
    pub clear_at: f64,
    /// How long readings must be too high.
    pub raise_after: Duration,
    /// How long they must be low enough again.
    pub clear_after: Duration,
}

/// One reading. `None` if it could not be taken: that counts as too high.
pub type Reading = Option<f64>;

/// What a reading caused.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AlarmEvent {
    /// It was too high for long enough.
    Raised(Reading),
    /// It was low enough for long enough.
    Cleared(f64),
}

/// One alarm. Between `clear_at` and `threshold` it stays what it is, and both ways take their time, so that
/// a reading that swings around one value does not cause a flood of events.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alarm {
    rule: AlarmRule,
    active: bool,
    /// Since when readings ask for the other state.
    since: Option<MonoMs>,
}

impl Alarm {
    /// An alarm that is not raised.
    pub fn new(rule: AlarmRule) -> Self {
        Self { rule, active: false, since: None }
    }

    /// Whether it is raised.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Its rule.
    pub fn rule(&self) -> &AlarmRule {
        &self.rule
    }

    /// Another rule from now on; what is raised stays so until the new rule clears it.
    pub fn set_rule(&mut self, rule: AlarmRule) {
        if self.rule != rule {
            self.rule = rule;
            self.since = None;
        }
    }

    /// Takes the reading at `now`.
    pub fn look(&mut self, now: MonoMs, reading: Reading) -> Option<AlarmEvent> {
        let change = match reading {
            None if !self.active => AlarmEvent::Raised(None),
            Some(value) if !self.active && value > self.rule.threshold => AlarmEvent::Raised(reading),
            Some(value) if self.active && value <= self.rule.clear_at => AlarmEvent::Cleared(value),
            _ => {
                self.since = None;
                return None;
            }
        };
        let since = *self.since.get_or_insert(now);
        let wait = if self.active { self.rule.clear_after } else { self.rule.raise_after };
        if now.since(since) < wait {
            return None;
        }
        self.since = None;
        self.active = !self.active;
        Some(change)
    }
}

/// Samples of a window at most: one per second for an hour, and the one before the window.
const SAMPLES_MAX: usize = 3601;

/// How much something that only grows has grown within a sliding window. It keeps a bounded number of samples:
/// readings that come faster than the window allows for replace the latest one.
#[derive(Clone, Debug)]
pub struct Growth<const N: usize> {
    window: Duration,
    samples: VecDeque<(MonoMs, [u64; N])>,
}

impl<const N: usize> Growth<N> {
    /// A window in which nothing was seen.
    pub fn new(window: Duration) -> Self {
        Self { window, samples: VecDeque::new() }
    }

    /// Another length from now on. A longer window fills as time goes by.
    pub fn set_window(&mut self, window: Duration) {
        self.window = window;
    }

    /// Takes the totals at `now`; how much each has grown within the window, or since the first reading if that
    /// is later. A total that has shrunk was reset, and counts from 0.
    pub fn look(&mut self, now: MonoMs, totals: [u64; N]) -> [u64; N] {
        let step = self.window / (SAMPLES_MAX as u32 - 1);
        // Samples are at least a step apart, except the latest one.
        if let Some(before) = self.samples.len().checked_sub(2)
            && self.samples[before + 1].0.since(self.samples[before].0) < step
        {
            self.samples.pop_back();
        }
        self.samples.push_back((now, totals));
        // The newest sample that is as old as the window stays: growth is measured from it.
        while self.samples.get(1).is_some_and(|(at, _)| now.since(*at) >= self.window) {
            self.samples.pop_front();
        }
        let (_, first) = self.samples[0];
        std::array::from_fn(|at| totals[at].checked_sub(first[at]).unwrap_or(totals[at]))
    }

    /// How much the first total has grown per second, within the window or since the first reading; 0 until there are two.
    pub fn per_s(&self) -> f64 {
        let (Some((from, before)), Some((to, now))) = (self.samples.front(), self.samples.back()) else {
            return 0.0;
        };
        let over = to.since(*from).as_secs_f64();
        let grown = now[0].checked_sub(before[0]).unwrap_or(now[0]);
        if over > 0.0 { grown as f64 / over } else { 0.0 }
    }
}

/// The percentage of `failed` in `all`; 0 if there are fewer than `least`: one failure out of two attempts is
/// no failure rate.
pub fn failure_percent(all: u64, failed: u64, least: u64) -> f64 {
    if all == 0 || all < least { 0.0 } else { failed as f64 * 100.0 / all as f64 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1000;

    fn rule() -> AlarmRule {
        AlarmRule {
            threshold: 1000.0,
            clear_at: 800.0,
            raise_after: Duration::from_secs(10),
            clear_after: Duration::from_secs(20),
        }
    }

    /// The events of one reading per second.
    fn run(alarm: &mut Alarm, readings: impl IntoIterator<Item = Reading>) -> Vec<(u64, AlarmEvent)> {
        let look = |(second, reading)| {
            let event = alarm.look(MonoMs(second as u64 * SECOND), reading)?;
            Some((second as u64, event))
        };
        readings.into_iter().enumerate().filter_map(look).collect()
    }

    fn seconds(value: f64, count: usize) -> impl Iterator<Item = Reading> {
        std::iter::repeat_n(Some(value), count)
    }

    #[test]
    fn it_is_raised_after_its_time_and_cleared_after_its_own() {
        let mut alarm = Alarm::new(rule());
        let events = run(&mut alarm, seconds(1001.0, 15).chain(seconds(800.0, 30)));
        assert_eq!(events, [(10, AlarmEvent::Raised(Some(1001.0))), (35, AlarmEvent::Cleared(800.0))]);
        assert!(!alarm.is_active());
    }

    #[test]
    fn at_the_threshold_nothing_happens() {
        assert_eq!(run(&mut Alarm::new(rule()), seconds(1000.0, 100)), []);
    }

    #[test]
    fn a_short_peak_is_none_and_a_short_dip_does_not_clear() {
        let mut alarm = Alarm::new(rule());
        assert_eq!(
            run(&mut alarm, seconds(5000.0, 10).chain(seconds(0.0, 1)).chain(seconds(5000.0, 10))),
            []
        );
        let mut alarm = Alarm::new(AlarmRule { raise_after: Duration::ZERO, ..rule() });
        let events = run(&mut alarm, seconds(5000.0, 1).chain(seconds(0.0, 20)).chain(seconds(900.0, 100)));
        assert_eq!(events, [(0, AlarmEvent::Raised(Some(5000.0)))]);
        assert!(alarm.is_active());
    }

    #[test]
    fn what_is_not_known_raises_and_never_clears() {
        let mut alarm = Alarm::new(rule());
        let events = run(&mut alarm, std::iter::repeat_n(None, 100));
        assert_eq!(events, [(10, AlarmEvent::Raised(None))]);
        // Known and low, with a gap in which it is not known: the time starts over.
        let readings = seconds(0.0, 19).chain([None]).chain(seconds(0.0, 21));
        assert_eq!(run(&mut alarm, readings), [(40, AlarmEvent::Cleared(0.0))]);
    }

    #[test]
    fn the_seeds_dead_letter_rule_is_raised_by_one_and_cleared_when_the_window_has_passed() {
        let mut alarm = Alarm::new(AlarmRule {
            threshold: 0.0,
            clear_at: 0.0,
            raise_after: Duration::ZERO,
            clear_after: Duration::ZERO,
        });
        let mut growth = Growth::new(Duration::from_mins(1));
        let mut events = Vec::new();
        for second in 0..200u64 {
            let dead = 7 + u64::from(second >= 30); // seven are old news
            let [new] = growth.look(MonoMs(second * SECOND), [dead]);
            events.extend(alarm.look(MonoMs(second * SECOND), Some(new as f64)).map(|event| (second, event)));
        }
        assert_eq!(events, [(30, AlarmEvent::Raised(Some(1.0))), (90, AlarmEvent::Cleared(0.0))]);
    }

    #[test]
    fn a_new_rule_keeps_what_is_raised() {
        let mut alarm = Alarm::new(AlarmRule { raise_after: Duration::ZERO, ..rule() });
        assert!(alarm.look(MonoMs(0), Some(2000.0)).is_some());
        alarm.set_rule(AlarmRule { threshold: 5000.0, clear_at: 4000.0, ..rule() });
        assert!(alarm.is_active());
        assert_eq!(run(&mut alarm, seconds(2000.0, 30)), [(20, AlarmEvent::Cleared(2000.0))]);
    }

    #[test]
    fn the_pace_is_that_of_the_window() {
        let mut growth = Growth::new(Duration::from_secs(10));
        assert!(growth.per_s().abs() < 1e-9);
        for second in 0..100u64 {
            // 5 per second, then 20.
            growth.look(
                MonoMs(second * SECOND),
                [if second < 50 { second * 5 } else { 250 + (second - 50) * 20 }],
            );
            let expected = match second {
                0 => 0.0,
                1..=49 => 5.0,
                60.. => 20.0,
                _ => continue,
            };
            assert!((growth.per_s() - expected).abs() < 1e-9, "{second}: {}", growth.per_s());
        }
    }

    #[test]
    fn few_attempts_are_no_rate() {
        let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(close(failure_percent(0, 0, 0), 0.0));
        assert!(close(failure_percent(19, 19, 20), 0.0));
        assert!(close(failure_percent(20, 1, 20), 5.0));
        assert!(close(failure_percent(1, 1, 1), 100.0));
    }

    proptest! {
        /// However readings swing between `clear_at` and any height, an alarm that is raised is raised once.
        #[test]
        fn between_its_bounds_it_does_not_flap(readings in prop::collection::vec(800.1f64..5000.0, 1..300)) {
            let mut alarm = Alarm::new(AlarmRule { raise_after: Duration::ZERO, ..rule() });
            let events = run(&mut alarm, readings.iter().copied().map(Some));
            prop_assert_eq!(events.len(), usize::from(readings.iter().any(|&reading| reading > 1000.0)));
        }

        /// Against a window that is recomputed from everything that was ever seen.
        #[test]
        fn growth_is_that_of_the_window(
            window_s in 1u64..40,
            steps in prop::collection::vec((1u64..5, 0u64..10), 1..200),
        ) {
            let window = Duration::from_secs(window_s);
            let mut growth = Growth::new(window);
            let (mut now, mut total, mut all) = (0, 0, Vec::new());
            for (wait_s, grown) in steps {
                now += wait_s * SECOND;
                total += grown;
                all.push((now, total));
                let base = all.iter().rev().find(|(at, _)| now - at >= window_s * SECOND).unwrap_or(&all[0]);
                prop_assert_eq!(growth.look(MonoMs(now), [total]), [total - base.1]);
                prop_assert!(growth.samples.len() as u64 <= window_s + 2);
            }
        }

        #[test]
        fn samples_are_bounded_however_often_one_looks(step_ms in 1u64..50, window_s in 1u64..3600) {
            let mut growth = Growth::new(Duration::from_secs(window_s));
            for look in 0..8000 {
                growth.look(MonoMs(look * step_ms), [look]);
            }
            prop_assert!(growth.samples.len() <= SAMPLES_MAX + 2, "{}", growth.samples.len());
        }
    }
}
