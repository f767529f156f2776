use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    model::time::{MonoMs, UnixMs},
    ports::Clock,
};

/// A clock that a test sets. The wall clock may jump; the other one only advances.
#[derive(Debug)]
pub struct FakeClock {
    wall: AtomicU64,
    mono: AtomicU64,
}

impl FakeClock {
    /// Starts at `wall`; the monotonic clock starts at an arbitrary other number.
    pub fn at(wall: UnixMs) -> Self {
        Self { wall: AtomicU64::new(wall.0), mono: AtomicU64::new(77) }
    }

    /// Lets time pass on both clocks.
    pub fn advance(&self, by: Duration) {
        let by = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        for clock in [&self.wall, &self.mono] {
            let _ =
                clock.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |now| Some(now.saturating_add(by)));
        }
    }

    /// Makes the wall clock jump (F9).
    pub fn set_wall(&self, wall: UnixMs) {
        self.wall.store(wall.0, Ordering::SeqCst);
    }
}

/// tokio's clock, which a test may pause; the monotonic one starts at 0.
#[derive(Debug)]
pub struct TokioClock {
    start: Instant,
    wall: UnixMs,
}

impl TokioClock {
    /// Starts now, at `wall`.
    pub fn at(wall: UnixMs) -> Self {
        Self { start: Instant::now(), wall }
    }
}

impl Clock for TokioClock {
    fn wall(&self) -> UnixMs {
        self.wall.after(self.start.elapsed())
    }

    fn mono(&self) -> MonoMs {
        MonoMs(self.start.elapsed().as_millis() as u64)
    }
}

impl Clock for FakeClock {
    fn wall(&self) -> UnixMs {
        UnixMs(self.wall.load(Ordering::SeqCst))
    }

    fn mono(&self) -> MonoMs {
        MonoMs(self.mono.load(Ordering::SeqCst))
    }
}
