//! The daemon's status line.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use postrider_actors::{
    model::{
        alarm::Growth,
        file::FileReport,
        finish::{self, Punctuality},
        ids::FileId,
        time::{MonoMs, UnixMs},
        window::shown,
    },
    ports::Clock,
};

use super::{
    machine::Machine,
    stores::Stores,
    watch::{PACE_WINDOW, READ_TIMEOUT},
};
use crate::{
    config::Config,
    systemd::{Progress, status_line},
};

/// The newest files that are looked at for the status line: a backlog has more, but a line no room.
const FILES_MAX: usize = 20;

/// Open files with a `finish_by` that are looked at beside them, the earliest first; fewer where each costs a call.
const TIMED_MAX: usize = 1_000;
const TIMED_MAX_SHARED: usize = 100;

/// `2 feeds, 1 destination`.
pub(super) fn summary(config: &Config) -> String {
    let count = |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    format!("{}, {}", count(config.feeds.len(), "feed"), count(config.destinations.len(), "destination"))
}

/// Makes status lines out of what changed since the last one, and measures the pace of files.
pub(super) struct StatusReporter {
    stores: Stores,
    clock: Arc<dyn Clock>,
    /// Messages of each of these files that have their final state.
    files: BTreeMap<FileId, Growth<1>>,
    /// Those of them that will not be done in time, as `FEED: FILE`, and why that is said.
    late: Vec<(String, String)>,
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
            files: BTreeMap::new(),
            late: Vec::new(),
            look_again: MonoMs(0),
            said: String::new(),
        }
    }

    /// Messages per second, lately, of each of the newest files and of each that is to be done by a time.
    pub(super) fn paces(&self) -> BTreeMap<FileId, f64> {
        self.files.iter().map(|(file, settled)| (*file, settled.per_s())).collect()
    }

    /// Those that will not be done by their `finish_by`: each as `FEED: FILE`, and why that is said.
    pub(super) fn late(&self) -> &[(String, String)] {
        &self.late
    }

    /// The line, if it has changed. A store that can't be read has a line of its own.
    pub(super) async fn line(&mut self) -> Option<String> {
        let look = self.clock.mono();
        if look < self.look_again {
            return None;
        }
        self.look_again = look.after(self.stores.look_pause());
        // The caller feeds the watchdog too: a store that is away must not keep it.
        let Stores { outbox, ledger, .. } = &self.stores;
        let timed_max = if self.stores.is_shared() { TIMED_MAX_SHARED } else { TIMED_MAX };
        let reads = async {
            tokio::join!(outbox.depth(), ledger.latest_files(FILES_MAX), ledger.timed_files(timed_max))
        };
        let (open, newest, timed) = tokio::time::timeout(READ_TIMEOUT, reads).await.ok()?;
        let (open, mut files, timed) = (open.ok()?, newest.ok()?, timed.ok()?);
        let known: BTreeSet<_> = files.iter().map(|file| file.file.id).collect();
        files.extend(timed.into_iter().filter(|file| !known.contains(&file.file.id)));
        let per_s = self.measure(&files);
        let now = self.clock.wall();
        self.late = files.iter().filter_map(|file| self.lateness(file, now)).collect();
        let unsettled: Vec<_> = files.iter().filter(|file| !file.is_settled()).collect();
        let progress = Progress {
            file: unsettled.first().map(|file| file.file.name.as_str()),
            other_files: unsettled.len().saturating_sub(1),
            percent: unsettled.first().and_then(|file| finish::percent_of(file)),
            open,
            per_s,
        };
        let line = status_line(&progress);
        (line != self.said).then(|| {
            self.said.clone_from(&line);
            line
        })
    }

    /// What is to be said of a file that will not be done in time, or that nobody can say of before it is.
    fn lateness(&self, report: &FileReport, now: UnixMs) -> Option<(String, String)> {
        let by = report.file.terms.finish_by?;
        if report.is_settled() || !report.state.is_closed() {
            return None;
        }
        let (settled, accepted) = finish::totals(report);
        let (left, terms) = (accepted.saturating_sub(settled), &report.file.terms);
        let per_s = self.files.get(&report.file.id).map_or(0.0, Growth::per_s);
        let work = finish::work(left, accepted, per_s, None);
        let finish = finish::finish(work, terms, now);
        let is_late = finish::punctuality(finish, by, left, work, now) == Punctuality::Late || now > by;
        let estimate = finish.map_or_else(
            || "it stands".to_owned(),
            |at| format!("at this pace at {}", shown(finish::to_minute(at))),
        );
        let why = format!("to be done by {}: {estimate}", shown(by));
        is_late.then(|| (format!("{}: {}", report.file.feed, report.file.name), why))
    }

    /// Takes note of how far files are; the pace of all together. One that is settled is kept as long as its end is
    /// news, so that the pace does not fall with it.
    fn measure(&mut self, files: &[FileReport]) -> f64 {
        let (now, wall) = (self.clock.mono(), self.clock.wall());
        let is_news = |file: &FileReport| match file.settled_at {
            Some(settled) => wall.since(settled) < PACE_WINDOW,
            None => true,
        };
        let files = || files.iter().filter(|file| is_news(file));
        self.files.retain(|id, _| files().any(|file| file.file.id == *id));
        files().for_each(|file| {
            let settled = self.files.entry(file.file.id).or_insert_with(|| Growth::new(PACE_WINDOW));
            settled.look(now, [finish::totals(file).0]);
        });
        self.files.values().map(Growth::per_s).sum()
    }
}
