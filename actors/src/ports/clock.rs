use std::time::Duration;

use crate::model::time::{MonoMs, UnixMs};

/// Reads the time. Waiting is tokio's; deciding is `model`'s.
pub trait Clock: Send + Sync {
    /// The wall clock: for schedules that outlive the process, and for records. It may jump.
    fn wall(&self) -> UnixMs;
    /// How long ago `since` was by the wall clock, the jumps forward that it has made in this process left out (F9).
    fn age(&self, since: UnixMs) -> Duration {
        self.wall().since(since)
    }
    /// A clock that never jumps and goes on while the process is stopped: for leases and rates.
    fn mono(&self) -> MonoMs;
}
