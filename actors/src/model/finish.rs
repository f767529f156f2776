//! How far something is and when it will be done. What is promised is never too early: finish times round up to the minute,
//! percent rounds down, and 100 % means that every message has its final state.

use std::{fmt, time::Duration};

use super::{
    file::{DestinationCounts, FileReport},
    tail::{Retries, Tail},
    terms::Terms,
    time::UnixMs,
};

/// A slower pace gives no estimate: it says of tomorrow what happened to be true of the last seconds.
const PER_S_MIN: f64 = 0.01;

/// How far, in percent.
pub fn percent(settled: u64, of: u64) -> u64 {
    if settled >= of { 100 } else { (u128::from(settled) * 100 / u128::from(of)) as u64 }
}

/// How far the messages of a file are. While it is read nobody knows how many there will be.
pub fn percent_of(report: &FileReport) -> Option<u64> {
    let (settled, accepted) = totals(report);
    if report.is_settled() {
        return Some(100);
    }
    report.state.is_closed().then(|| percent(settled, accepted).min(99))
}

/// Messages of a file, at all of its destinations: those that are settled, of so many.
pub fn totals(report: &FileReport) -> (u64, u64) {
    let counts = || report.destinations.values();
    (counts().map(DestinationCounts::settled).sum(), counts().map(|counts| counts.accepted).sum())
}

/// How long `left` messages of so `many` take, `per_s` of which get their final state per second, with the last of their
/// `retries`. `None` if they don't move.
pub fn work(left: u64, many: u64, per_s: f64, retries: Option<&Retries>) -> Option<Duration> {
    if left == 0 {
        return Some(Duration::ZERO);
    }
    if !per_s.is_finite() || per_s < PER_S_MIN {
        return None;
    }
    let left = left as f64;
    let tail = retries.map(|retries| Tail::new(many, per_s, retries)).unwrap_or_default();
    // Those that are new go at this pace, as those that wait come after them.
    let new = (left - tail.waiting()).max(0.0);
    let work = Duration::try_from_secs_f64(new / per_s).ok()?;
    Some(work + tail.lasts(left - new))
}

/// When messages are done that are so much `work`; whoever promises it rounds up ([`to_minute`]). `None` if that can't be said:
/// they don't move, or may never go. While they may not go, `terms` say so.
pub fn finish(work: Option<Duration>, terms: &Terms, now: UnixMs) -> Option<UnixMs> {
    let work = work.filter(|work| work.is_zero() || !terms.is_over(now))?;
    let done = terms.done_at(now, work);
    // What is not sent by then ends as unsent.
    Some(terms.expires_at.map_or(done, |ends| done.min(ends)))
}

/// The full minute that is not earlier.
pub fn to_minute(at: UnixMs) -> UnixMs {
    const MINUTE_MS: u64 = 60_000;
    UnixMs(at.0.div_ceil(MINUTE_MS).saturating_mul(MINUTE_MS))
}

/// Whether something will be done in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Punctuality {
    /// It will.
    InTime,
    /// It will not.
    Late,
    /// Nobody can say; it must go on by then to be done in time at the pace that it had, if that is known.
    Unknown {
        /// See above.
        latest: Option<UnixMs>,
    },
}

/// Whether `left` messages will be done by `by`: `finish` is when they will be, or were, and `work` how long they take when they
/// go. What will only be done in the minute of its deadline is late.
pub fn punctuality(
    finish: Option<UnixMs>,
    by: UnixMs,
    left: u64,
    work: Option<Duration>,
    now: UnixMs,
) -> Punctuality {
    let promised = finish.map(|finish| if left > 0 { to_minute(finish) } else { finish });
    match promised {
        _ if left > 0 && by <= now => Punctuality::Late,
        Some(finish) if finish <= by => Punctuality::InTime,
        Some(_) => Punctuality::Late,
        None => {
            let latest = work.map(|work| by.before(work));
            match latest {
                Some(latest) if latest <= now => Punctuality::Late,
                latest => Punctuality::Unknown { latest },
            }
        }
    }
}

/// A duration to the precision that an estimate deserves, rounded up: `8 s`, `4 min`, `3 h`, `12 days`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rough(pub Duration);

impl fmt::Display for Rough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs() + u64::from(self.0.subsec_nanos() > 0);
        match seconds {
            0..90 => write!(f, "{seconds} s"),
            90..5_400 => write!(f, "{} min", seconds.div_ceil(60)),
            5_400..172_800 => write!(f, "{} h", seconds.div_ceil(3_600)),
            _ => write!(f, "{} days", Thousands(seconds.div_ceil(86_400))),
        }
    }
}

/// A count as people read it: `12,300`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thousands(pub u64);

impl fmt::Display for Thousands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let mut text = String::with_capacity(digits.len() + digits.len() / 3);
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        f.pad_integral(true, "", &text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2027-01-15 08:00 UTC, a Friday.
    const NOW: UnixMs = UnixMs(1_800_000_000_000);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn only_what_is_settled_is_at_100_percent() {
        assert_eq!((percent(0, 7), percent(999_999, 1_000_000), percent(7, 7)), (0, 99, 100));
        assert_eq!((percent(0, 0), percent(u64::MAX - 1, u64::MAX)), (100, 99));
    }

    #[test]
    fn an_estimate_is_never_too_early() {
        let none = Terms::default();
        assert_eq!(finish(work(61, 61, 1.0, None), &none, NOW), Some(NOW.after(seconds(61))));
        assert_eq!(to_minute(NOW.after(seconds(61))), NOW.after(seconds(120)));
        assert_eq!(to_minute(NOW.after(seconds(60))), NOW.after(seconds(60)));
        assert_eq!(finish(work(0, 0, 0.0, None), &none, NOW), Some(NOW));
        for pace in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(finish(work(1, 1, pace, None), &none, NOW), None, "{pace}");
        }
        assert_eq!(finish(work(u64::MAX, u64::MAX, 0.01, None), &none, NOW), None, "no calendar has it");
    }

    #[test]
    fn what_waits_for_its_window_is_done_after_it_opens_and_what_expires_by_then() {
        let terms = Terms {
            windows: super::super::window::Windows(vec!["08:00-09:00 UTC".parse().unwrap()]),
            ..Terms::default()
        };
        let two_hours = finish(work(7_200, 7_200, 1.0, None), &terms, NOW);
        assert_eq!(two_hours, Some(NOW.after(Duration::from_hours(25))), "an hour a day");
        let ends = Terms { expires_at: Some(NOW.after(seconds(300))), ..terms };
        assert_eq!(finish(work(7_200, 7_200, 1.0, None), &ends, NOW), Some(NOW.after(seconds(300))));
        assert_eq!(finish(work(7_200, 7_200, 1.0, None), &ends, NOW.after(seconds(300))), None);
    }

    #[test]
    fn a_file_that_stands_says_when_it_must_go_on() {
        let by = NOW.after(seconds(600));
        let work = |left| work(left, left, 10.0, None);
        let finish = |left| finish(work(left), &Terms::default(), NOW);
        let verdict = |finish, left, work| punctuality(finish, by, left, work, NOW);
        assert_eq!(verdict(finish(6_000), 6_000, work(6_000)), Punctuality::InTime);
        assert_eq!(verdict(finish(6_001), 6_001, work(6_001)), Punctuality::Late);
        let latest = Some(NOW.after(seconds(500)));
        assert_eq!(verdict(None, 1_000, work(1_000)), Punctuality::Unknown { latest });
        assert_eq!(verdict(None, 6_000, work(6_000)), Punctuality::Late, "even if it went on now");
        assert_eq!(verdict(None, 6_000, None), Punctuality::Unknown { latest: None });
        assert_eq!(punctuality(None, NOW, 1, None, NOW), Punctuality::Late);
        assert_eq!(punctuality(Some(NOW), NOW, 0, None, NOW), Punctuality::InTime);
    }

    #[test]
    fn durations_and_counts_read_well() {
        for (secs, text) in [
            (0, "0 s"),
            (89, "89 s"),
            (90, "2 min"),
            (240, "4 min"),
            (241, "5 min"),
            (5_400, "2 h"),
            (172_800, "2 days"),
            (123_456_789_000, "1,428,899 days"),
        ] {
            assert_eq!(Rough(seconds(secs)).to_string(), text);
        }
        assert_eq!(Rough(Duration::from_millis(1)).to_string(), "1 s");
        for (count, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (48_211, "48,211")] {
            assert_eq!(Thousands(count).to_string(), text);
        }
        assert_eq!(format!("{:>7}", Thousands(1_000)), "  1,000");
    }

    proptest! {
        #[test]
        fn percent_rounds_down_and_finish_times_round_up(
            of in 1u64..10_000_000, settled in 0u64..10_000_000, per_s in 1u32..100_000,
        ) {
            let settled = settled.min(of);
            prop_assert!(percent(settled, of) * of <= settled * 100);
            prop_assert_eq!(percent(settled, of) == 100, settled == of);
            let left = of - settled;
            let done = finish(work(left, left, f64::from(per_s), None), &Terms::default(), NOW).expect("it moves");
            let exact_ms = left as f64 * 1_000.0 / f64::from(per_s);
            prop_assert!((done.since(NOW).as_secs_f64() * 1_000.0 - exact_ms).abs() <= 1.0);
            let done = to_minute(done);
            prop_assert!(done.since(NOW).as_secs_f64() * 1_000.0 + 1.0 >= exact_ms);
            prop_assert!(done.since(NOW).as_secs_f64() * 1_000.0 < exact_ms + 60_000.0);
        }
    }
}
