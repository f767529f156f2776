//! What the operator asks of the process by signals.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// SIGTERM or SIGINT: stop in order; asked again, at once.
    Stop,
    /// SIGHUP: read the configuration anew.
    Reload,
}

/// Listens to SIGTERM, SIGINT and SIGHUP.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// Whether SIGHUP came while something was done that can't be interrupted by it.
    reload_after: bool,
}

impl Signals {
    /// Starts to listen.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            reload_after: false,
        })
    }

    /// Waits until the process is asked to stop. What asks for a reload meanwhile is kept for [`Self::next`]: one that has
    /// begun may have read the configuration before it was changed again.
    pub(super) async fn stop(&mut self) {
        while self.signal().await != Asked::Stop {
            self.reload_after = true;
        }
    }

    /// Waits for the next one. Cancelling it loses none.
    pub(super) async fn next(&mut self) -> Asked {
        if std::mem::take(&mut self.reload_after) { Asked::Reload } else { self.signal().await }
    }

    async fn signal(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop,
            _ = self.interrupt.recv() => Asked::Stop,
            _ = self.hangup.recv() => Asked::Reload,
        }
    }
}
