//! What an operator sets for a destination while it runs: a fact of it, in one row (B11). What is not set is as the
//! configuration has it.

use std::{
    fmt,
    num::{NonZeroU32, NonZeroUsize},
};

use serde::{Deserialize, Serialize};

/// The highest rate and the highest number of requests in flight that can be set: those of the configuration.
pub const RATE_MAX: u32 = 10_000_000;
/// See [`RATE_MAX`].
pub const CONCURRENCY_MAX: usize = 65_536;

/// How many requests may be in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Concurrency {
    /// As many as the receiver can bear.
    Auto,
    /// So many.
    Fixed(NonZeroUsize),
}

impl fmt::Display for Concurrency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(number) => number.fmt(f),
        }
    }
}

/// What is set for a destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetLimits {
    /// Messages per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_per_s: Option<NonZeroU32>,
    /// Requests in flight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Concurrency>,
}

impl SetLimits {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What is set with this change.
    #[must_use]
    pub fn with(self, change: LimitChange) -> Self {
        match change {
            LimitChange::Rate(rate_per_s) => Self { rate_per_s, ..self },
            LimitChange::Concurrency(concurrency) => Self { concurrency, ..self },
        }
    }
}

/// One of them is set, or (`None`) is as the configuration has it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitChange {
    /// Messages per second.
    Rate(Option<NonZeroU32>),
    /// Requests in flight.
    Concurrency(Option<Concurrency>),
}

impl LimitChange {
    /// The command that orders it.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Rate(_) => "rate",
            Self::Concurrency(_) => "concurrency",
        }
    }
}

/// The new value.
impl fmt::Display for LimitChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rate(Some(rate)) => rate.fmt(f),
            Self::Concurrency(Some(concurrency)) => concurrency.fmt(f),
            Self::Rate(None) | Self::Concurrency(None) => f.write_str("default"),
        }
    }
}

/// What a gate is fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateRate {
    /// It is open: nothing limits it.
    Open,
    /// So many messages per second.
    PerS(NonZeroU32),
}

impl From<Option<NonZeroU32>> for GateRate {
    fn from(rate_per_s: Option<NonZeroU32>) -> Self {
        rate_per_s.map_or(Self::Open, Self::PerS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_set_and_unset_by_itself() {
        let (rate, number) = (NonZeroU32::new(7), NonZeroUsize::new(9).map(Concurrency::Fixed));
        let both = SetLimits::default().with(LimitChange::Rate(rate)).with(LimitChange::Concurrency(number));
        assert_eq!(both, SetLimits { rate_per_s: rate, concurrency: number });
        let one = both.with(LimitChange::Rate(None));
        assert_eq!(one, SetLimits { rate_per_s: None, concurrency: number });
        assert!(!one.is_empty() && one.with(LimitChange::Concurrency(None)).is_empty());
    }

    #[test]
    fn what_is_stored_reads_back_and_is_short() {
        for (limits, stored) in [
            (SetLimits::default(), "{}"),
            (SetLimits { rate_per_s: NonZeroU32::new(7), concurrency: None }, r#"{"rate_per_s":7}"#),
            (
                SetLimits { rate_per_s: None, concurrency: Some(Concurrency::Auto) },
                r#"{"concurrency":"auto"}"#,
            ),
            (
                SetLimits { rate_per_s: None, concurrency: NonZeroUsize::new(9).map(Concurrency::Fixed) },
                r#"{"concurrency":{"fixed":9}}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&limits).unwrap(), stored);
            assert_eq!(serde_json::from_str::<SetLimits>(stored).unwrap(), limits);
        }
    }
}
