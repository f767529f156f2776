use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use postrider_actors::{
    flow::{HeldFeeds, ProgressBoard},
    ports::Clock,
};

/// The phase of the daemon's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not everything is up.
    Starting,
    /// Files are taken and delivered.
    Ready,
    /// The old tree drains, a new one follows.
    Reloading,
    /// The last drain.
    Stopping,
}

impl Phase {
    /// The word that probes see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Reloading => "reloading",
            Self::Stopping => "stopping",
        }
    }
}

/// How the daemon does: one judgement for the systemd watchdog and for probes.
#[derive(Clone)]
pub struct Health {
    board: ProgressBoard,
    clock: Arc<dyn Clock>,
    held: HeldFeeds,
    phase: Arc<Mutex<Phase>>,
}

impl Health {
    /// A daemon that starts.
    pub fn new(board: ProgressBoard, clock: Arc<dyn Clock>, held: HeldFeeds) -> Self {
        Self { board, clock, held, phase: Arc::new(Mutex::new(Phase::Starting)) }
    }

    /// The threads and actors that are stuck.
    pub fn stuck(&self) -> Vec<String> {
        self.board.stuck(self.clock.mono())
    }

    /// The feeds that wait for room, one line each.
    pub fn held(&self) -> Vec<String> {
        let line = |(feed, by): (Arc<str>, Vec<Arc<str>>)| {
            format!("feed {feed} waits: too many open messages at {}", by.join(", "))
        };
        self.held.list().into_iter().map(line).collect()
    }

    /// The daemon's phase.
    pub fn phase(&self) -> Phase {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the daemon's phase.
    pub fn enter(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health").field("phase", &self.phase()).finish_non_exhaustive()
    }
}
