//! The store's time (B23): deadlines that other machines read go by one clock for all, which is that of the service. Each
//! answer says it in its `Date`, to the second.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use aws_sdk_dynamodb::{
    config::{
        ConfigBag, Intercept, RuntimeComponents, interceptors::BeforeDeserializationInterceptorContextRef,
    },
    error::BoxError,
};
use aws_smithy_types::{DateTime, date_time::Format};
use postrider_actors::{model::time::UnixMs, ports::Clock};

/// A smaller difference is not one: the `Date` is cut to seconds, and the answer was on its way.
const DIFFERENCE_MIN_MS: i64 = 2_000;

/// By how much the store's clock is ahead of this machine's, as far as answers have told.
#[derive(Debug, Default)]
pub(super) struct StoreTime {
    ahead_ms: AtomicI64,
}

impl StoreTime {
    /// Learns from an answer that was given at `date`, cut to the second, and read at `wall`.
    fn learn(&self, date: UnixMs, wall: UnixMs) {
        let ahead = date.0.cast_signed() + 500 - wall.0.cast_signed();
        let ahead = if ahead.abs() < DIFFERENCE_MIN_MS { 0 } else { ahead };
        let before = self.ahead_ms.swap(ahead, Ordering::Relaxed);
        if before == 0 && ahead != 0 {
            tracing::warn!(
                ahead_ms = ahead,
                "this machine's clock and DynamoDB's differ; deadlines go by DynamoDB's. Synchronize the clock"
            );
        }
    }

    /// What the store's clock shows when this machine's shows `wall`.
    pub(super) fn at(&self, wall: UnixMs) -> UnixMs {
        UnixMs(wall.0.saturating_add_signed(self.ahead_ms.load(Ordering::Relaxed)))
    }

    /// What this machine's clock shows when the store's shows `at`.
    pub(super) fn wall(&self, at: UnixMs) -> UnixMs {
        UnixMs(at.0.saturating_add_signed(-self.ahead_ms.load(Ordering::Relaxed)))
    }
}

/// Learns from every answer to a client.
pub(super) struct Learns {
    pub(super) time: Arc<StoreTime>,
    pub(super) clock: Arc<dyn Clock>,
}

impl fmt::Debug for Learns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Learns").field(&self.time).finish()
    }
}

impl Intercept for Learns {
    fn name(&self) -> &'static str {
        "StoreTime"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date");
        if let Some(Ok(date)) = date.map(|date| DateTime::from_str(date, Format::HttpDate))
            && let Ok(seconds) = u64::try_from(date.secs())
        {
            self.time.learn(UnixMs(seconds * 1_000), self.clock.wall());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b23_deadlines_go_by_the_store_s_clock() {
        let time = StoreTime::default();
        let wall = UnixMs(1_700_000_000_900);
        // Cut to the second, and late by another.
        time.learn(UnixMs(1_700_000_000_000), wall);
        time.learn(UnixMs(1_700_000_000_000), UnixMs(wall.0 + 1_000));
        assert_eq!(time.at(wall), wall);
        for (date, ahead) in [(1_700_000_060_000, 59_600), (1_699_999_940_000, -60_400)] {
            time.learn(UnixMs(date), wall);
            assert_eq!(time.at(wall).0.cast_signed() - wall.0.cast_signed(), ahead);
            assert_eq!(time.wall(time.at(wall)), wall);
        }
        time.learn(UnixMs(1_700_000_000_000), wall);
        assert_eq!(time.at(wall), wall, "somebody has set the clock");
    }
}
