//! The wall clock, told from its mistakes (F9): how a process sees the time while somebody sets the machine's clock.
//!
//! Between two readings the wall clock must advance as a clock does that nobody can set. Where it does not it has
//! jumped. A jump is not followed at once: what it says may be a mistake that is corrected in the next moment, and four
//! days forward for six seconds would have ended every message by its age. One that lasts is a correction. It is
//! followed then, but no message grows older by it.

use std::{collections::VecDeque, time::Duration};

use super::time::{MonoMs, UnixMs};

/// What clocks are corrected by all the time, in milliseconds; it is followed at once.
const DRIFT_MS: u64 = 1_000;

/// How long a jump must last until it is followed.
const LASTS: Duration = Duration::from_mins(1);

/// Jumps forward that are remembered one by one.
const JUMPS_MAX: usize = 16;

/// What a look at the wall clock has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Jump {
    /// It has jumped by so many milliseconds, and is not followed.
    Noticed(i64),
    /// It is back where it should be.
    Over,
    /// It has jumped by so many milliseconds, for good: it is followed from now on.
    Followed(i64),
}

/// A jump forward that was followed.
#[derive(Clone, Copy, Debug)]
struct Forward {
    from: UnixMs,
    by: Duration,
}

/// The wall clock as schedules go by it. The other clock counts the time that the machine is suspended too.
#[derive(Clone, Debug)]
pub struct SteadyTime {
    /// What is added to the other clock, in milliseconds.
    offset: i64,
    /// What it would be if the wall clock were right, and since when.
    doubted: Option<(i64, MonoMs)>,
    forward: VecDeque<Forward>,
}

/// What has to be added to `mono` to have `wall`.
fn offset(wall: UnixMs, mono: MonoMs) -> i64 {
    wall.0.cast_signed().saturating_sub(mono.0.cast_signed())
}

impl SteadyTime {
    /// Believes the wall clock as it is at the start.
    pub fn new(wall: UnixMs, mono: MonoMs) -> Self {
        Self { offset: offset(wall, mono), doubted: None, forward: VecDeque::new() }
    }

    /// What to add to the other clock, in milliseconds, to have the time.
    pub fn offset(&self) -> i64 {
        self.offset
    }

    /// The time.
    pub fn wall(&self, mono: MonoMs) -> UnixMs {
        UnixMs(mono.0.saturating_add_signed(self.offset))
    }

    /// Looks at both clocks; to be done every second or so.
    pub fn observe(&mut self, wall: UnixMs, mono: MonoMs) -> Option<Jump> {
        let seen = offset(wall, mono);
        let is_near = |other: i64| seen.abs_diff(other) <= DRIFT_MS;
        if is_near(self.offset) {
            self.offset = seen;
            return self.doubted.take().map(|_| Jump::Over);
        }
        let by = seen.saturating_sub(self.offset);
        match self.doubted {
            Some((doubted, since)) if is_near(doubted) => {
                if mono.since(since) < LASTS {
                    return None;
                }
                self.follow(seen, mono);
                Some(Jump::Followed(by))
            }
            _ => {
                self.doubted = Some((seen, mono));
                Some(Jump::Noticed(by))
            }
        }
    }

    fn follow(&mut self, seen: i64, mono: MonoMs) {
        let from = self.wall(mono);
        (self.offset, self.doubted) = (seen, None);
        let by = self.wall(mono).since(from);
        if by.is_zero() {
            return;
        }
        self.forward.push_back(Forward { from, by });
        if self.forward.len() > JUMPS_MAX {
            // Of what was accepted between the two, too much is left out: it lives longer, which is the safe side.
            let oldest = self.forward.pop_front().expect("there are several");
            if let Some(next) = self.forward.front_mut() {
                next.by += oldest.by;
            }
        }
    }

    /// How long ago `since` was, the jumps forward since then left out.
    pub fn age(&self, since: UnixMs, mono: MonoMs) -> Duration {
        // What was accepted within a jump's span was so before another one, backward.
        let jumped = self.forward.iter().map(|jump| jump.from.after(jump.by).since(jump.from.max(since)));
        self.wall(mono).since(since).saturating_sub(jumped.sum())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: UnixMs = UnixMs(1_700_000_000_000);
    const DAY: i64 = 24 * 60 * 60 * 1000;
    const MINUTE: u64 = 60_000;

    /// Both clocks, the wall clock wrong by so much.
    struct Clocks {
        steady: SteadyTime,
        mono: u64,
        wrong: i64,
    }

    impl Clocks {
        fn new() -> Self {
            Self { steady: SteadyTime::new(START, MonoMs(0)), mono: 0, wrong: 0 }
        }

        /// Lets time pass, looking every second; what was seen.
        fn pass(&mut self, ms: u64) -> Vec<Jump> {
            let end = self.mono + ms;
            let mut seen = Vec::new();
            while self.mono < end {
                self.mono = end.min(self.mono + 1_000);
                let wall = UnixMs((START.0 + self.mono).saturating_add_signed(self.wrong));
                seen.extend(self.steady.observe(wall, MonoMs(self.mono)));
            }
            seen
        }

        fn wall(&self) -> u64 {
            self.steady.wall(MonoMs(self.mono)).0 - START.0
        }

        fn age(&self) -> Duration {
            self.steady.age(START, MonoMs(self.mono))
        }
    }

    #[test]
    fn f09_a_jump_that_passes_is_not_followed() {
        for by in [4 * DAY, -DAY] {
            let mut clocks = Clocks::new();
            assert_eq!(clocks.pass(5_000), []);
            clocks.wrong = by;
            assert_eq!(clocks.pass(6_000), [Jump::Noticed(by)], "said once");
            assert_eq!((clocks.wall(), clocks.age()), (11_000, Duration::from_secs(11)));
            clocks.wrong = 0;
            assert_eq!(clocks.pass(5_000), [Jump::Over]);
            assert_eq!((clocks.wall(), clocks.age()), (16_000, Duration::from_secs(16)));
        }
    }

    #[test]
    fn f09_a_jump_that_lasts_is_followed_and_makes_nothing_older() {
        let mut clocks = Clocks::new();
        clocks.wrong = DAY;
        assert_eq!(clocks.pass(10 * MINUTE), [Jump::Noticed(DAY), Jump::Followed(DAY)]);
        assert_eq!(clocks.wall(), 10 * MINUTE + DAY.cast_unsigned());
        assert_eq!(clocks.age(), Duration::from_mins(10));
        // What is accepted from now on has the new time.
        let since = clocks.steady.wall(MonoMs(clocks.mono));
        clocks.pass(MINUTE);
        assert_eq!(clocks.steady.age(since, MonoMs(clocks.mono)), Duration::from_mins(1));
        // And back: younger than it is, rather than older.
        clocks.wrong = 0;
        assert_eq!(clocks.pass(2 * MINUTE), [Jump::Noticed(-DAY), Jump::Followed(-DAY)]);
        assert_eq!((clocks.wall(), clocks.age()), (13 * MINUTE, Duration::ZERO));
    }

    #[test]
    fn f09_what_clocks_are_corrected_by_all_the_time_is_followed_at_once() {
        let mut clocks = Clocks::new();
        for _ in 0..100 {
            clocks.wrong += 900;
            assert_eq!(clocks.pass(1_000), []);
        }
        assert_eq!(clocks.wall(), 100 * 1_900);
    }

    #[test]
    fn f09_a_jump_that_changes_waits_anew() {
        let mut clocks = Clocks::new();
        for step in 1..=5 {
            clocks.wrong = step * DAY;
            assert_eq!(clocks.pass(59_000), [Jump::Noticed(step * DAY)]);
        }
        assert_eq!(clocks.wall(), 5 * 59_000);
    }

    proptest! {
        #[test]
        fn f09_nothing_is_ever_older_than_it_is(
            steps in prop::collection::vec((-3i64..=3, 1u64..200_000), 0..40),
        ) {
            let mut clocks = Clocks::new();
            for (days, ms) in steps {
                clocks.wrong = days * DAY;
                clocks.pass(ms);
                prop_assert!(clocks.age() <= Duration::from_millis(clocks.mono));
                prop_assert!(clocks.steady.forward.len() <= JUMPS_MAX);
            }
        }
    }
}
