//! The terms of a file: when its messages may go. They are facts of the file, settled when it is claimed, and looked at
//! before every request (B11). No batch is changed by them until its file's time is over.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    time::{UnixMs, as_rfc3339},
    window::{Windows, shown},
};

/// See the module. By default a file's messages go at any time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Terms {
    /// No request begins before then.
    #[serde(default, with = "as_rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub not_before: Option<UnixMs>,
    /// None begins from then on: what is open ends as unsent, whatever else holds it.
    #[serde(default, with = "as_rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<UnixMs>,
    /// None begins while these are closed.
    #[serde(default, skip_serializing_if = "Windows::is_empty")]
    pub windows: Windows,
    /// How many messages go at a destination, beside its own rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// When it is to be done. Nothing goes faster for it; it is said when it will not be.
    #[serde(default, with = "as_rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub finish_by: Option<UnixMs>,
}

/// Messages per second at each destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rate {
    /// At least 1.
    pub per_s: u32,
    /// Whether all files of the feed share it.
    pub of_feed: bool,
}

impl Terms {
    /// Whether they say nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the file's time is over at `now`.
    pub fn is_over(&self, now: UnixMs) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }

    /// Whether no request may begin at `now`.
    pub fn is_closed(&self, now: UnixMs) -> bool {
        self.is_over(now) || self.not_before.is_some_and(|begins| now < begins) || !self.windows.is_open(now)
    }

    /// Until when no request may begin, if it is so at `now`; for ever once its time is over.
    pub fn closed_until(&self, now: UnixMs) -> Option<UnixMs> {
        if self.is_over(now) {
            return Some(UnixMs(u64::MAX));
        }
        match self.not_before {
            Some(begins) if now < begins => Some(self.windows.closed_until(begins).unwrap_or(begins)),
            _ => self.windows.closed_until(now),
        }
    }

    /// How much of the time from `from` to `to` no request might begin: it makes no message older.
    pub fn closed_between(&self, from: UnixMs, to: UnixMs) -> Duration {
        let begins = self.not_before.map_or(from, |begins| begins.clamp(from, to.max(from)));
        begins.since(from) + self.windows.closed_between(begins, to)
    }

    /// What they say, a line each, for the operator.
    pub fn lines(&self) -> Vec<String> {
        let windows = (!self.windows.is_empty()).then(|| format!("window: {}", self.windows));
        let moment = |name: &str, at: Option<UnixMs>| at.map(|at| format!("{name}: {}", shown(at)));
        let of_all = |rate: Rate| if rate.of_feed { ", of all files of the feed" } else { "" };
        let rate = self.rate.map(|rate| format!("rate_per_s: {}{}", rate.per_s, of_all(rate)));
        let moments = [
            moment("not_before", self.not_before),
            moment("expires_at", self.expires_at),
            moment("finish_by", self.finish_by),
        ];
        windows.into_iter().chain(moments.into_iter().flatten()).chain(rate).collect()
    }

    /// When `work` is done that could begin at `now`.
    pub fn done_at(&self, now: UnixMs, work: Duration) -> UnixMs {
        self.windows.done_at(self.not_before.map_or(now, |begins| begins.max(now)), work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);
    /// 2027-01-15 08:00 UTC, a Friday.
    const FRIDAY: UnixMs = UnixMs(1_800_000_000_000);

    fn windows(text: &str) -> Windows {
        Windows(vec![text.parse().unwrap()])
    }

    #[test]
    fn without_terms_nothing_is_ever_closed() {
        let none = Terms::default();
        assert_eq!((none.closed_until(FRIDAY), none.is_over(UnixMs(u64::MAX))), (None, false));
        assert_eq!(none.closed_between(UnixMs(0), FRIDAY), Duration::ZERO);
        assert_eq!(serde_json::to_string(&none).unwrap(), "{}");
    }

    #[test]
    fn b11_what_is_over_is_closed_for_ever_whatever_else_is_open() {
        let terms = Terms { expires_at: Some(FRIDAY), ..Terms::default() };
        assert_eq!(terms.closed_until(UnixMs(FRIDAY.0 - 1)), None);
        assert_eq!(terms.closed_until(FRIDAY), Some(UnixMs(u64::MAX)));
        let later = Terms { not_before: Some(FRIDAY.after(HOUR)), ..terms };
        assert_eq!(later.closed_until(FRIDAY), Some(UnixMs(u64::MAX)));
    }

    #[test]
    fn what_may_not_begin_yet_begins_when_its_window_is_open_too() {
        let terms = Terms {
            not_before: Some(FRIDAY.after(20 * HOUR)),
            windows: windows("Mon-Fri 08:00-18:00 UTC"),
            ..Terms::default()
        };
        let monday = FRIDAY.after(72 * HOUR);
        assert_eq!(terms.closed_until(FRIDAY), Some(monday));
        assert_eq!(terms.closed_between(FRIDAY, monday.after(HOUR)), 72 * HOUR);
        assert_eq!(terms.done_at(FRIDAY, HOUR), monday.after(HOUR));
        assert_eq!(terms.closed_between(monday, FRIDAY), Duration::ZERO, "a clock that was set back");
    }
}
