//! A circuit breaker: whether a destination is worth an attempt at all.
//!
//! It opens when, of 20 or more attempts of the last 10 s, clearly more than half came to nothing (5xx, no answer in time, no
//! connection): by four standard deviations of what chance makes of a half. It also opens after 5 connections in a row
//! that could not be opened, and when nothing is heard of the destination any more: as many
//! timeouts in a row as half of the requests that may be in flight, 4 at least. (A receiver that hangs takes a few requests
//! per timeout, which never makes 20 in 10 s.)
//!
//! It stays open for 5 s, doubled with each probe that fails, up to 300 s, but for no more than a fortieth of the outage:
//! after 5 minutes a probe goes every 7 s, so that a receiver that is back is found within 10 s, at some 50 requests. One
//! real message probes. After a success its destination begins with a slow start.

use std::{collections::VecDeque, time::Duration};

use crate::model::time::MonoMs;

/// The ring, in slices of [`SLICE`].
const RING: Duration = Duration::from_secs(10);
const SLICE: Duration = Duration::from_secs(1);

/// Attempts that a share is taken of.
const ATTEMPTS_MIN: u32 = 20;

/// The square of the standard deviations by which failures exceed a half before it opens: 19 of the first 20, 70 of 100.
/// Who fails half of all requests at random is at work, and must not be stopped by a streak: beyond 4 of them there is one
/// in hours.
const DEVIATIONS_SQUARED: u64 = 16;

/// Failed connections in a row that open it.
const CONNECTS_IN_A_ROW: u32 = 5;

/// The fewest timeouts in a row that open it.
const TIMEOUTS_IN_A_ROW: u32 = 4;

/// How long it is open.
const OPEN_MIN: Duration = Duration::from_secs(5);
const OPEN_MAX: Duration = Duration::from_mins(5);

/// The part of an outage that it is open for at most.
const PART_OF_OUTAGE: u32 = 40;

/// Opened again so soon after it closed, it is the same outage.
const SAME_OUTAGE: Duration = Duration::from_mins(1);

/// How an attempt ended, as far as the receiver's health is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pulse {
    /// It answered, and not with 5xx.
    Alive,
    /// 5xx, or an answer that broke off.
    Broken,
    /// No answer in time.
    Timeout,
    /// No connection.
    Connect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed,
    Open {
        until: MonoMs,
    },
    /// A message is on its way to find out.
    Probing,
}

/// What a breaker allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Any attempt.
    All,
    /// One attempt, which is the probe.
    Probe,
    /// None before that.
    NotBefore(MonoMs),
    /// None before the probe has ended.
    NotNow,
}

/// What an attempt's end changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It opened, or opened again.
    Opened {
        /// The next probe.
        until: MonoMs,
        /// Since when the receiver is out.
        since: MonoMs,
        /// How often it had opened before in this outage.
        times: u32,
    },
    /// The receiver is back.
    Closed {
        /// Since when it was out.
        since: MonoMs,
    },
}

/// The breaker of one destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Breaker {
    state: State,
    /// Slices of the ring: when one began, attempts, failures.
    ring: VecDeque<(MonoMs, u32, u32)>,
    connects: u32,
    timeouts: u32,
    /// The outage that goes on, or the last one: its begin, how often it was found to go on, when it ended.
    outage: Option<(MonoMs, u32, MonoMs)>,
}

impl Default for Breaker {
    fn default() -> Self {
        Self { state: State::Closed, ring: VecDeque::new(), connects: 0, timeouts: 0, outage: None }
    }
}

impl Breaker {
    /// What may be attempted at `now`.
    pub fn allowed(&self, now: MonoMs) -> Allowed {
        match self.state {
            State::Closed => Allowed::All,
            State::Open { until } if now < until => Allowed::NotBefore(until),
            State::Open { .. } => Allowed::Probe,
            State::Probing => Allowed::NotNow,
        }
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// Since when the receiver is out, if it is.
    pub fn out_since(&self) -> Option<MonoMs> {
        self.outage.map(|(since, ..)| since).filter(|_| !self.is_closed())
    }

    /// The probe that [`Self::allowed`] asked for has begun.
    pub fn probe(&mut self) {
        self.state = State::Probing;
    }

    /// The probe was not sent after all: another one may be.
    pub fn probe_withdrawn(&mut self, now: MonoMs) {
        if self.state == State::Probing {
            self.state = State::Open { until: now };
        }
    }

    /// An attempt ended; `limit` requests may be in flight, and `jitter` is in `0.0..1.0`.
    pub fn ended(
        &mut self,
        now: MonoMs,
        pulse: Pulse,
        is_probe: bool,
        limit: usize,
        jitter: f64,
    ) -> Option<Change> {
        match self.state {
            State::Closed => {
                self.count(now, pulse);
                self.has_tripped(limit).then(|| self.open(now, jitter))
            }
            State::Probing if is_probe && pulse == Pulse::Alive => Some(self.close(now)),
            State::Probing if is_probe => Some(self.open(now, jitter)),
            // Begun before it opened: it says nothing about now.
            State::Open { .. } | State::Probing => None,
        }
    }

    fn count(&mut self, now: MonoMs, pulse: Pulse) {
        while self.ring.front().is_some_and(|&(begun, ..)| now.since(begun) >= RING) {
            self.ring.pop_front();
        }
        if self.ring.back().is_none_or(|&(begun, ..)| now.since(begun) >= SLICE) {
            self.ring.push_back((now, 0, 0));
        }
        let slice = self.ring.back_mut().expect("there is one at least");
        slice.1 += 1;
        slice.2 += u32::from(pulse != Pulse::Alive);
        self.connects = if pulse == Pulse::Connect { self.connects + 1 } else { 0 };
        self.timeouts = if pulse == Pulse::Timeout { self.timeouts + 1 } else { 0 };
    }

    fn has_tripped(&self, limit: usize) -> bool {
        let (all, failed) = self
            .ring
            .iter()
            .fold((0u64, 0u64), |sum, slice| (sum.0 + u64::from(slice.1), sum.1 + u64::from(slice.2)));
        let silent = TIMEOUTS_IN_A_ROW.max(u32::try_from(limit / 2).unwrap_or(u32::MAX));
        // Failures less answers: of `all` tosses of a coin its deviation is the root of `all`.
        let excess = (failed * 2).saturating_sub(all);
        (all >= u64::from(ATTEMPTS_MIN) && excess * excess >= DEVIATIONS_SQUARED * all)
            || self.connects >= CONNECTS_IN_A_ROW
            || self.timeouts >= silent
    }

    fn open(&mut self, now: MonoMs, jitter: f64) -> Change {
        let goes_on =
            self.outage.filter(|&(.., ended)| self.state == State::Probing || now.since(ended) < SAME_OUTAGE);
        let (since, times) = goes_on.map_or((now, 0), |(since, times, _)| (since, times + 1));
        self.outage = Some((since, times, now));
        let part = (now.since(since) / PART_OF_OUTAGE).clamp(OPEN_MIN, OPEN_MAX);
        let longest = OPEN_MIN.saturating_mul(1 << times.min(16)).min(part);
        let until = now.after(longest.mul_f64(0.75 + 0.25 * jitter.clamp(0.0, 1.0)));
        self.state = State::Open { until };
        Change::Opened { until, since, times }
    }

    fn close(&mut self, now: MonoMs) -> Change {
        let (since, times, _) = self.outage.unwrap_or((now, 0, now));
        *self = Self { outage: Some((since, times, now)), ..Self::default() };
        Change::Closed { since }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    const LIMIT: usize = 64;

    fn at(ms: u64) -> MonoMs {
        MonoMs(1_000_000 + ms)
    }

    fn end(breaker: &mut Breaker, ms: u64, pulse: Pulse) -> bool {
        matches!(breaker.ended(at(ms), pulse, false, LIMIT, 1.0), Some(Change::Opened { .. }))
    }

    /// How many attempts it takes to open it, one each `every` ms.
    fn opens_after(every: u64, pulse: impl Fn(u64) -> Pulse) -> Option<u64> {
        let mut breaker = Breaker::default();
        (1..=1_000).find(|&nth| end(&mut breaker, nth * every, pulse(nth)))
    }

    #[test]
    fn f44_it_opens_when_clearly_more_than_half_of_twenty_or_more_fail_in_ten_seconds() {
        let broken = |is_broken| if is_broken { Pulse::Broken } else { Pulse::Alive };
        assert_eq!(opens_after(10, |_| Pulse::Broken), Some(20));
        assert_eq!(opens_after(10, |nth| broken(nth != 7)), Some(20));
        assert_eq!(opens_after(10, |nth| broken(nth % 4 != 0)), Some(59), "three quarters");
        assert_eq!(opens_after(10, |nth| broken(nth % 2 == 0)), None);
        assert_eq!(opens_after(10, |nth| broken(nth % 3 == 0)), None);
        assert_eq!(opens_after(1_000, |_| Pulse::Broken), None, "never 20 in 10 s");
        let mut breaker = Breaker::default();
        (0..200).for_each(|nth| assert!(!end(&mut breaker, nth, Pulse::Alive)));
        let opened = (0..100).find(|nth| end(&mut breaker, 11_000 + nth * 10, Pulse::Broken));
        assert_eq!(opened, Some(19), "what is older than 10 s counts no more");
    }

    #[test]
    fn half_of_all_requests_may_fail_at_random() {
        for seed in 0..20 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut breaker = Breaker::default();
            for nth in 0..200_000 {
                let pulse = if random.random::<bool>() { Pulse::Broken } else { Pulse::Alive };
                assert!(!end(&mut breaker, nth / 50, pulse), "seed {seed}, after {nth}");
            }
        }
    }

    #[test]
    fn f43_it_opens_when_nothing_connects_or_answers_any_more() {
        assert_eq!(opens_after(5_000, |_| Pulse::Connect), Some(5));
        assert_eq!(opens_after(5_000, |nth| if nth % 5 == 0 { Pulse::Alive } else { Pulse::Connect }), None);
        assert_eq!(opens_after(5_000, |_| Pulse::Timeout), Some(32), "half of what may be in flight");
        let mut breaker = Breaker::default();
        let opened =
            (1..100).find(|nth| breaker.ended(at(nth * 9_000), Pulse::Timeout, false, 4, 0.0).is_some());
        assert_eq!(opened, Some(4));
    }

    #[test]
    fn f44_one_message_probes_and_a_success_closes_it() {
        let mut breaker = Breaker::default();
        for _ in 1..=20 {
            end(&mut breaker, 0, Pulse::Broken);
        }
        assert_eq!(breaker.allowed(at(4_999)), Allowed::NotBefore(at(5_000)));
        assert_eq!(breaker.allowed(at(5_000)), Allowed::Probe);
        breaker.probe();
        assert_eq!(breaker.allowed(at(5_000)), Allowed::NotNow);
        assert!(!end(&mut breaker, 5_001, Pulse::Alive), "that was begun before");
        assert_eq!(breaker.allowed(at(5_001)), Allowed::NotNow);
        breaker.probe_withdrawn(at(5_002));
        assert_eq!(breaker.allowed(at(5_002)), Allowed::Probe);
        breaker.probe();
        let closed = breaker.ended(at(5_100), Pulse::Alive, true, LIMIT, 1.0);
        assert_eq!(closed, Some(Change::Closed { since: at(0) }));
        assert_eq!((breaker.allowed(at(5_100)), breaker.out_since()), (Allowed::All, None));
        assert!(!end(&mut breaker, 5_101, Pulse::Broken), "it counts anew");
    }

    /// Probes until the receiver is back after `outage` ms; the probes, and how late the last one was.
    fn probes(outage: u64, jitter: f64) -> (u32, u64) {
        let mut breaker = Breaker::default();
        for _ in 1..=20 {
            end(&mut breaker, 0, Pulse::Broken);
        }
        for count in 1.. {
            let Allowed::Probe = breaker.allowed(at(40_000_000)) else { panic!("it is open") };
            let State::Open { until } = breaker.state else { panic!("it is open") };
            breaker.probe();
            if until >= at(outage) {
                return (count, until.since(at(outage)).as_millis() as u64);
            }
            breaker.ended(until, Pulse::Broken, true, LIMIT, jitter);
        }
        unreachable!("an outage ends")
    }

    #[test]
    fn f44_an_outage_costs_few_probes_and_its_end_is_found_soon() {
        for jitter in [0.0, 0.3, 1.0] {
            let (count, late) = probes(300_000, jitter);
            assert!(count <= 80 && late <= 7_500, "{count}, {late} ms late");
            let (count, late) = probes(10 * 3_600_000, jitter);
            assert!(count <= 600 && late <= 300_000, "{count}, {late} ms late");
        }
    }

    #[test]
    fn what_fails_again_at_once_is_the_same_outage() {
        let mut breaker = Breaker::default();
        for _ in 1..=20 {
            end(&mut breaker, 0, Pulse::Broken);
        }
        breaker.probe();
        breaker.ended(at(600_000), Pulse::Alive, true, LIMIT, 1.0);
        let opened = (1..=20).map(|_| breaker.ended(at(601_000), Pulse::Broken, false, LIMIT, 1.0)).last();
        let until = at(601_000).after(Duration::from_secs(10));
        assert_eq!(opened, Some(Some(Change::Opened { until, since: at(0), times: 1 })));
        breaker.probe();
        breaker.ended(at(620_000), Pulse::Alive, true, LIMIT, 1.0);
        let opened = (1..=20).map(|_| breaker.ended(at(900_000), Pulse::Broken, false, LIMIT, 1.0)).last();
        let until = at(900_000).after(OPEN_MIN);
        assert_eq!(opened, Some(Some(Change::Opened { until, since: at(900_000), times: 0 })), "another one");
    }

    proptest! {
        #[test]
        fn it_always_opens_for_a_bounded_time_and_lets_one_probe_at_a_time(
            steps in prop::collection::vec((0u64..20_000, 0u8..4, any::<bool>(), 0.0f64..1.0), 1..300),
        ) {
            let (mut breaker, mut now, mut probing) = (Breaker::default(), 0, false);
            for (wait, pulse, ends_probe, jitter) in steps {
                now += wait;
                match breaker.allowed(at(now)) {
                    Allowed::Probe => {
                        prop_assert!(!probing);
                        breaker.probe();
                        probing = true;
                    }
                    Allowed::NotBefore(until) => {
                        prop_assert!(!probing && until.since(at(now)) <= OPEN_MAX);
                    }
                    Allowed::All => prop_assert!(!probing),
                    Allowed::NotNow => prop_assert!(probing),
                }
                let pulse = [Pulse::Alive, Pulse::Broken, Pulse::Timeout, Pulse::Connect][usize::from(pulse)];
                let is_probe = probing && ends_probe;
                breaker.ended(at(now), pulse, is_probe, LIMIT, jitter);
                probing &= !is_probe;
                prop_assert!(breaker.ring.len() <= 11);
            }
        }
    }
}
