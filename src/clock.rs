//! The machine's clocks.

use std::time::{SystemTime, UNIX_EPOCH};

use postrider_actors::{
    model::time::{MonoMs, UnixMs},
    ports::Clock,
};
use rustix::time::{ClockId, clock_gettime};

/// The machine's clocks: `CLOCK_REALTIME`, and `CLOCK_MONOTONIC`, which continues while the process is
/// stopped (SIGSTOP) and does not count the time that the machine is suspended.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn wall(&self) -> UnixMs {
        // Before 1970 only on a machine whose clock is unset; it then counts as 1970.
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        UnixMs(since_epoch.as_millis() as u64)
    }

    fn mono(&self) -> MonoMs {
        let now = clock_gettime(ClockId::Monotonic);
        MonoMs(now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000)
    }
}
