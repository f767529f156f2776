use std::time::Duration;

use super::Progress;
use crate::ports::Clock;

/// How often an actor that rests gives a sign of life.
const SIGN: Duration = Duration::from_millis(500);

/// Sleeps for longer than the watchdog may be left without a sign of life.
pub async fn rest(clock: &dyn Clock, progress: &Progress, time: Duration) {
    let end = tokio::time::Instant::now() + time;
    loop {
        let left = end.saturating_duration_since(tokio::time::Instant::now());
        tokio::time::sleep(left.min(SIGN)).await;
        progress.turn(clock.mono());
        if left <= SIGN {
            return;
        }
    }
}
