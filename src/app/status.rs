//! The daemon's status line.

use std::sync::Arc;

use postrider_actors::{
    model::{
        file::{DestinationCounts, FileReport},
        time::MonoMs,
    },
    ports::Clock,
};

use super::{machine::Machine, stores::Stores, watch::READ_TIMEOUT};
use crate::{
    config::Config,
    systemd::{Progress, status_line},
};

/// The newest files that are looked at for the status line: a backlog has more, but a line no room.
const FILES_MAX: usize = 20;

/// `2 feeds, 1 destination`.
pub(super) fn summary(config: &Config) -> String {
    let count = |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    format!("{}, {}", count(config.feeds.len(), "feed"), count(config.destinations.len(), "destination"))
}

/// Makes status lines out of what changed since the last one.
pub(super) struct StatusReporter {
    stores: Stores,
    clock: Arc<dyn Clock>,
    last: Option<(MonoMs, u64)>,
    /// No look before.
    look_again: MonoMs,
    said: String,
}

impl StatusReporter {
    /// Nothing was said yet.
    pub(super) fn new(machine: &Machine) -> Self {
        Self {
            stores: machine.stores.clone(),
            clock: machine.clock.clone(),
            last: None,
            look_again: MonoMs(0),
            said: String::new(),
        }
    }

    /// The line, if it has changed. A store that can't be read has a line of its own.
    pub(super) async fn line(&mut self) -> Option<String> {
        let look = self.clock.mono();
        if look < self.look_again {
            return None;
        }
        self.look_again = look.after(self.stores.look_pause());
        // The caller feeds the watchdog too: a store that is away must not keep it.
        let reads =
            async { tokio::join!(self.stores.outbox.depth(), self.stores.ledger.latest_files(FILES_MAX)) };
        let (open, files) = tokio::time::timeout(READ_TIMEOUT, reads).await.ok()?;
        let (open, files) = (open.ok()?, files.ok()?);
        let now = self.clock.mono();
        let total = files.iter().map(settled).sum::<u64>();
        let per_s = self.last.replace((now, total)).map_or(0.0, |(then, before)| {
            let seconds = now.since(then).as_secs_f64();
            if seconds > 0.0 { total.saturating_sub(before) as f64 / seconds } else { 0.0 }
        });
        let unsettled: Vec<_> = files.iter().filter(|file| !file.is_settled()).collect();
        let progress = Progress {
            file: unsettled.first().map(|file| file.file.name.as_str()),
            other_files: unsettled.len().saturating_sub(1),
            fraction: unsettled.first().filter(|file| file.state.is_closed()).map(|file| {
                let accepted: u64 = file.destinations.values().map(|counts| counts.accepted).sum();
                if accepted == 0 { 1.0 } else { settled(file) as f64 / accepted as f64 }
            }),
            open,
            per_s,
        };
        let line = status_line(&progress);
        (line != self.said).then(|| {
            self.said.clone_from(&line);
            line
        })
    }
}

fn settled(file: &FileReport) -> u64 {
    file.destinations.values().map(DestinationCounts::settled).sum()
}
