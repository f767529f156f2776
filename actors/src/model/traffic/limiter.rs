//! How many requests a destination may have in flight: as many as it can bear, found by itself, or a fixed number.
//!
//! On single attempts; a window closes after 100 ms and 20 answers at least.
//!
//! 1. Slow start: the limit doubles per window until the first cut.
//! 2. After a cut at W the limit is 0.7 W and grows as CUBIC does (RFC 9438), from 1 s past the plateau on by 3 % per window
//!    at least, and by 10 % once it is above 1.5 W: the receiver is another one then.
//! 3. It does not grow while less than half of it is in use.
//! 4. It is cut on errors (429, 5xx, no answer) of the last second, if the lower bound of their share (Wilson, 95 %) is
//!    above 2 % and above 1.3 times what is known to be the receiver's own share. If more than 30 % are errors, what was
//!    answered well says what the receiver bears: that is W, and the limit is 0.9 of it.
//! 5. If two windows after that cut the share has not fallen as it does where places are short, and the goodput has fallen as
//!    the limit did, the number of requests was not the cause: the cut is taken back and the share remembered as the
//!    receiver's own, for 20 s: then another cut shows whether it still is. Errors that have just begun tell nothing of
//!    that: what was answered before them is of another receiver.
//! 6. It is cut when the median latency of three windows in a row is above 1.5 times the base. If the goodput then falls as the
//!    limit did, the receiver is far and not full: the cut is taken back, and that latency is the base.
//! 7. A failed attempt keeps its permit for the base latency, so that a fast 503 does not spin. See [`Limiter::base`].
//!
//! Rules 5 to 7 are there because limiters that cut on any error, or on any latency, starve receivers that fail 10 % at
//! random or are far away (vector, issue 7371). The tests are a simulation of nine receivers.

use std::{collections::VecDeque, time::Duration};

use crate::model::time::MonoMs;

/// The shortest window, and its fewest answers.
const WINDOW: Duration = Duration::from_millis(100);
const WINDOW_ANSWERS: usize = 20;

/// Latencies of a window that its median is taken from: the first ones, however many there are (I8).
const LATENCIES_MAX: usize = 4_096;

/// Over how long errors are counted, and how many answers a share of them needs.
const ERRORS_OVER: Duration = Duration::from_secs(1);
const SHARE_ANSWERS: u32 = 50;

/// The least share of errors that cuts.
const SHARE_MIN: f64 = 0.02;

/// What a cut leaves.
const CUT: f64 = 0.7;

/// What a cut leaves of what the receiver is seen to bear.
const CUT_OF_BORNE: f64 = 0.9;

/// How much the limit grows per window past the plateau, and so far past it that the receiver must have changed.
const GROWTH: f64 = 1.03;
const GROWTH_ELSEWHERE: f64 = 1.1;
const ELSEWHERE: f64 = 1.5;

/// How long a share of errors is the receiver's own before that is looked at again.
const OWN_FOR: Duration = Duration::from_secs(20);

/// Windows after a cut that tell nothing: their answers are from before it.
const SETTLING: u8 = 2;

/// Windows in a row with a high latency that cut.
const HIGH_WINDOWS: u8 = 3;

/// Where an automatic limit starts and what it never falls below; what a fixed one starts with after an outage.
pub const FLOOR: usize = 4;

/// What bounds the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// It is found between [`FLOOR`] and this.
    Auto {
        /// The highest limit.
        ceiling: usize,
    },
    /// An operator has fixed it.
    Fixed(usize),
}

impl Bound {
    /// The highest limit.
    pub fn ceiling(self) -> usize {
        match self {
            Self::Auto { ceiling } => ceiling,
            Self::Fixed(limit) => limit,
        }
    }

    /// The lowest limit: never above the highest.
    pub fn floor(self) -> usize {
        FLOOR.min(self.ceiling())
    }
}

/// A cut that is being watched.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Trial {
    cause: Cause,
    limit: f64,
    /// What the cut left of the limit.
    left: f64,
    goodput: f64,
    share: f64,
    slow_start: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Errors,
    Latency,
}

impl Trial {
    /// The least share of errors after the cut that says that their number was not the cause. Where places are short, a
    /// share p falls to 1 - (1 - p) / left: half of the way there is the bound, and 0.6 of the share at least.
    fn share_if_independent(&self) -> f64 {
        let if_short = 1.0 - (1.0 - self.share) / self.left;
        f64::midpoint(self.share, if_short).max(0.6 * self.share)
    }

    /// Whether the goodput has fallen about as the limit did, by two thirds of it at least. Where places are short, or the
    /// sender is, it has not.
    fn has_lost(&self, goodput: f64, limit: f64) -> bool {
        goodput < self.goodput * (1.0 + 2.0 * limit / self.limit) / 3.0
    }
}

/// The limit of one destination.
#[derive(Clone, Debug, PartialEq)]
pub struct Limiter {
    bound: Bound,
    limit: f64,
    slow_start: bool,
    cut_at: MonoMs,
    cut_from: f64,
    /// Latency, in seconds, of the receiver when it is not full.
    base: Option<f64>,
    /// The share of errors that does not depend on the limit.
    own_errors: f64,
    /// Since when that is known.
    own_since: MonoMs,
    begun: MonoMs,
    answers: u32,
    good: u32,
    latencies: Vec<f64>,
    /// The most that was in flight in this window.
    most: usize,
    /// Closed windows of the last second: when, answers, errors.
    second: VecDeque<(MonoMs, u32, u32)>,
    settling: u8,
    high: u8,
    trial: Option<Trial>,
}

impl Limiter {
    /// A limit for a receiver of which nothing is known.
    pub fn new(bound: Bound) -> Self {
        let limit = match bound {
            Bound::Auto { .. } => bound.floor(),
            Bound::Fixed(limit) => limit,
        };
        Self {
            bound,
            limit: limit as f64,
            slow_start: true,
            cut_at: MonoMs(0),
            cut_from: 0.0,
            base: None,
            own_errors: 0.0,
            own_since: MonoMs(0),
            begun: MonoMs(0),
            answers: 0,
            good: 0,
            latencies: Vec::new(),
            most: 0,
            second: VecDeque::new(),
            settling: 0,
            high: 0,
            trial: None,
        }
    }

    /// Other bounds hold from now on. What is known of the receiver stays known.
    pub fn rebound(&mut self, bound: Bound) {
        if self.bound == bound {
            return;
        }
        self.bound = bound;
        self.limit = match bound {
            Bound::Auto { .. } => self.limit.clamp(bound.floor() as f64, bound.ceiling() as f64),
            Bound::Fixed(limit) => limit as f64,
        };
    }

    /// Requests that may be in flight now.
    pub fn limit(&self) -> usize {
        self.limit as usize
    }

    /// What bounds it.
    pub fn bound(&self) -> Bound {
        self.bound
    }

    /// How long an attempt takes when the receiver is not full, once that is known.
    pub fn base(&self) -> Option<Duration> {
        self.base.map(Duration::from_secs_f64)
    }

    /// The receiver is back after an outage: slow start, whether the limit is fixed or not.
    pub fn restart(&mut self) {
        let (base, own_errors, own_since) = (self.base, self.own_errors, self.own_since);
        *self =
            Self { base, own_errors, own_since, limit: self.bound.floor() as f64, ..Self::new(self.bound) };
    }

    /// An attempt ended with an answer after `latency`, or (`None`) with an error that may come of too many requests.
    /// `in_flight` counts it too.
    pub fn answered(&mut self, now: MonoMs, latency: Option<Duration>, in_flight: usize) {
        if self.answers == 0 && self.begun == MonoMs(0) {
            self.begun = now;
        }
        self.answers += 1;
        self.most = self.most.max(in_flight);
        if let Some(latency) = latency {
            self.good += 1;
            if self.latencies.len() < LATENCIES_MAX {
                self.latencies.push(latency.as_secs_f64());
            }
        }
        if now.since(self.begun) >= WINDOW && self.answers as usize >= WINDOW_ANSWERS {
            self.close(now);
            (self.begun, self.answers, self.good, self.most) = (now, 0, 0, 0);
            self.latencies.clear();
        }
    }

    fn close(&mut self, now: MonoMs) {
        let median = self.median();
        if let Some(median) = median {
            let base = self.base.unwrap_or(median);
            self.base = Some(base + (median - base) * if median < base { 0.5 } else { 0.02 });
        }
        let used = self.most as f64 >= self.limit / 2.0;
        if let Bound::Fixed(limit) = self.bound {
            if used {
                self.limit = (2.0 * self.limit).min(limit as f64);
            }
            return;
        }
        let goodput = f64::from(self.good) / now.since(self.begun).as_secs_f64();
        while self.second.front().is_some_and(|&(at, ..)| now.since(at) >= ERRORS_OVER) {
            self.second.pop_front();
        }
        self.second.push_back((now, self.answers, self.answers - self.good));
        let sum = |(a, b), &(_, answers, errors): &(MonoMs, u32, u32)| (a + answers, b + errors);
        let (answers, errors) = self.second.iter().fold((0u32, 0u32), sum);
        let share = f64::from(errors) / f64::from(answers);
        if self.settling > 0 {
            self.settling -= 1;
            if self.settling == 0 {
                self.second.drain(..self.second.len() - 1);
            }
            return;
        }
        match self.trial {
            Some(trial) if trial.cause == Cause::Latency => {
                self.trial = None;
                if trial.has_lost(goodput, self.limit) {
                    self.base = median.or(self.base);
                    return self.take_back(now, trial);
                }
            }
            Some(trial) => {
                if answers < SHARE_ANSWERS {
                    return;
                }
                self.trial = None;
                let is_used = self.most as f64 >= 0.8 * self.limit;
                let is_chance = share > trial.share_if_independent() && share < 0.5;
                if is_used && is_chance && trial.has_lost(goodput, self.limit) {
                    (self.own_errors, self.own_since) = (share.max(trial.share), now);
                    return self.take_back(now, trial);
                }
                self.own_errors = self.own_errors.min(share);
            }
            None => {}
        }
        let is_old = now.since(self.own_since) >= OWN_FOR;
        let bound = SHARE_MIN.max(if is_old { 0.0 } else { 1.3 * self.own_errors });
        if answers >= SHARE_ANSWERS && wilson_lower(errors, answers) >= bound {
            let bad = self.answers - self.good;
            let have_begun = wilson_lower(bad, self.answers) > 2.0 * share;
            let share = if have_begun { f64::from(bad) / f64::from(self.answers) } else { share };
            self.cut(now, Cause::Errors, goodput, share);
            if have_begun {
                self.trial = None;
            }
        } else if used && median.zip(self.base).is_some_and(|(median, base)| median > 1.5 * base) {
            self.high += 1;
            if self.high >= HIGH_WINDOWS {
                self.cut(now, Cause::Latency, goodput, share);
            }
        } else if used {
            self.high = 0;
            self.grow(now);
        }
    }

    fn median(&mut self) -> Option<f64> {
        let middle = self.latencies.len() / 2;
        let find = |latencies: &mut Vec<f64>| *latencies.select_nth_unstable_by(middle, f64::total_cmp).1;
        (!self.latencies.is_empty()).then(|| find(&mut self.latencies))
    }

    fn cut(&mut self, now: MonoMs, cause: Cause, goodput: f64, share: f64) {
        let before = self.limit;
        let borne = (1.0 - share) * before;
        (self.cut_from, self.limit) =
            if borne < CUT * before { (borne, CUT_OF_BORNE * borne) } else { (before, CUT * before) };
        self.limit = self.limit.max(self.bound.floor() as f64);
        let left = self.limit / before;
        self.trial = Some(Trial { cause, limit: before, left, goodput, share, slow_start: self.slow_start });
        (self.cut_at, self.slow_start) = (now, false);
        (self.settling, self.high) = (SETTLING, 0);
        self.second.clear();
    }

    fn take_back(&mut self, now: MonoMs, trial: Trial) {
        (self.limit, self.cut_from) = (trial.limit, trial.limit);
        (self.cut_at, self.slow_start) = (now, trial.slow_start);
        self.second.clear();
    }

    fn grow(&mut self, now: MonoMs) {
        let ceiling = self.bound.ceiling() as f64;
        if self.slow_start {
            self.limit = (2.0 * self.limit).min(ceiling);
            return;
        }
        let plateau = (0.75 * self.cut_from).cbrt();
        let since = now.since(self.cut_at).as_secs_f64();
        let mut grown = 0.4 * (since - plateau).powi(3) + self.cut_from;
        if since > plateau + 1.0 {
            let growth = if self.limit > ELSEWHERE * self.cut_from { GROWTH_ELSEWHERE } else { GROWTH };
            grown = grown.max(growth * self.limit);
        }
        self.limit = self.limit.max(grown).min(ceiling);
    }
}

/// The lower bound of Wilson's interval for a share of `count` in `of`, 95 % one-sided.
pub fn wilson_lower(count: u32, of: u32) -> f64 {
    const Z: f64 = 1.64;
    let (n, p) = (f64::from(of), f64::from(count) / f64::from(of));
    let spread = Z * (p * (1.0 - p) / n + Z * Z / 4.0 / n / n).sqrt();
    (p + Z * Z / 2.0 / n - spread) / (1.0 + Z * Z / n)
}

#[cfg(test)]
mod tests;
