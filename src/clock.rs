//! The machine's clocks.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use postrider_actors::{
    model::{
        steady::{Jump, SteadyTime},
        time::{MonoMs, UnixMs},
    },
    ports::Clock,
};
use rustix::time::{ClockId, clock_gettime};

/// The machine's clocks as they are: `CLOCK_REALTIME`, and `CLOCK_MONOTONIC`, which continues while the process is
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
        read(ClockId::Monotonic)
    }
}

fn read(clock: ClockId) -> MonoMs {
    let now = clock_gettime(clock);
    MonoMs(now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000)
}

/// The daemon's clocks: the wall clock does not jump when somebody sets the machine's (F9); see [`SteadyTime`]. It goes
/// by `CLOCK_BOOTTIME`, so that a suspended machine is no jump.
#[derive(Debug)]
pub struct SteadyClock {
    /// [`SteadyTime::offset`], for who only asks for the time.
    offset: AtomicI64,
    time: Mutex<SteadyTime>,
}

impl Default for SteadyClock {
    fn default() -> Self {
        let time = SteadyTime::new(SystemClock.wall(), read(ClockId::Boottime));
        Self { offset: AtomicI64::new(time.offset()), time: Mutex::new(time) }
    }
}

impl SteadyClock {
    /// Looks whether the wall clock has jumped, and says so once. To be called every second or so.
    pub fn observe(&self) {
        let mut time = self.time();
        let jump = time.observe(SystemClock.wall(), read(ClockId::Boottime));
        self.offset.store(time.offset(), Relaxed);
        drop(time);
        match jump {
            None => {}
            Some(Jump::Noticed(by_ms)) => {
                tracing::warn!(by_ms, "the wall clock has jumped; it is followed if that lasts for a minute");
            }
            Some(Jump::Over) => tracing::info!("the wall clock is right again"),
            Some(Jump::Followed(by_ms)) => {
                tracing::warn!(by_ms, "the wall clock's jump is followed; no message grows older by it");
            }
        }
    }

    fn time(&self) -> MutexGuard<'_, SteadyTime> {
        // Changed by infallible steps only.
        self.time.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for SteadyClock {
    fn wall(&self) -> UnixMs {
        UnixMs(read(ClockId::Boottime).0.saturating_add_signed(self.offset.load(Relaxed)))
    }

    fn age(&self, since: UnixMs) -> Duration {
        self.time().age(since, read(ClockId::Boottime))
    }

    fn mono(&self) -> MonoMs {
        SystemClock.mono()
    }
}
