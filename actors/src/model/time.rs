//! The two kinds of time, kept apart by type.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Wall-clock milliseconds since the Unix epoch. For schedules and records: it may jump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMs(pub u64);

impl UnixMs {
    /// This instant moved forward by `delay`, saturating.
    #[must_use]
    pub fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)))
    }

    /// This instant moved back by `by`, saturating.
    #[must_use]
    pub fn before(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(by.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this instant is; zero if the clock went backwards.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// Milliseconds of a clock that never jumps, counted from an arbitrary start. For leases and waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MonoMs(pub u64);

impl MonoMs {
    /// This instant moved forward by `delay`, saturating.
    #[must_use]
    pub fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this instant is.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// A time as RFC 3339 in UTC, in milliseconds: how every time is shown. What no calendar has is shown as the last that one has.
pub fn rfc3339(at: UnixMs) -> String {
    format!("{:.3}", timestamp(at))
}

/// Serializes a time as [`rfc3339`], for `#[serde(with = …)]`.
pub mod as_rfc3339 {
    use jiff::Timestamp;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use super::{UnixMs, rfc3339};

    /// See the module.
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    pub fn serialize<S: Serializer>(at: &UnixMs, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&rfc3339(*at))
    }

    /// See the module.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<UnixMs, D::Error> {
        let text = String::deserialize(deserializer)?;
        let at: Timestamp = text.parse().map_err(D::Error::custom)?;
        u64::try_from(at.as_millisecond()).map(UnixMs).map_err(D::Error::custom)
    }

    /// The same of a time that there may be.
    pub mod option {
        use serde::{Deserialize, Deserializer, Serialize as _, Serializer};

        use super::UnixMs;

        #[derive(Deserialize)]
        struct At(#[serde(with = "super")] UnixMs);

        /// See the module.
        #[allow(clippy::ref_option, reason = "serde calls it so")]
        pub fn serialize<S: Serializer>(at: &Option<UnixMs>, serializer: S) -> Result<S::Ok, S::Error> {
            at.map(super::super::rfc3339).serialize(serializer)
        }

        /// See the module.
        pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<UnixMs>, D::Error> {
            Ok(Option::<At>::deserialize(deserializer)?.map(|At(at)| at))
        }
    }
}

/// The same for a calendar.
pub(super) fn timestamp(at: UnixMs) -> Timestamp {
    i64::try_from(at.0).ok().and_then(|at| Timestamp::from_millisecond(at).ok()).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_can_be_shown() {
        assert_eq!(rfc3339(UnixMs(0)), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(UnixMs(1_800_000_000_123)), "2027-01-15T08:00:00.123Z");
        assert_eq!(rfc3339(UnixMs(u64::MAX)), "9999-12-30T22:00:00.999Z");
    }
}
