//! Gathers what [`postrider_actors::model::ceiling`] asks for: from the configuration, the store, this machine's disks, and what
//! its daemon has noted.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use postrider_actors::{
    model::{
        ceiling::{DestinationFacts, DiskUse, Facts, FeedFacts},
        file::FileReport,
        room::{OpenMessages, holders},
        standing::Standing,
        trouble::{Trouble, Troubles},
    },
    ports::console::{DestinationView, FileTotals, View},
};

use super::troubles;
use crate::config::{Config, Profile};

/// What is known, from where it is known.
pub(crate) struct Known<'a> {
    /// The configuration.
    pub(crate) config: &'a Config,
    /// What the store says of destinations …
    pub(crate) destinations: &'a BTreeMap<String, DestinationView>,
    /// … and of files.
    pub(crate) files: FileTotals,
    /// What the daemon of this machine has met …
    pub(crate) troubles: &'a Troubles,
    /// … and how it stands.
    pub(crate) standing: &'a Standing,
    /// Whether one runs here.
    pub(crate) is_running: bool,
    /// The fullest disk.
    pub(crate) disk: Option<DiskUse>,
}

impl Known<'_> {
    /// All of it together.
    pub(crate) fn facts(&self) -> Facts {
        let Self { config, destinations, files, troubles, standing, .. } = self;
        let engine = |(name, (since, reason)): (&String, &(_, String))| {
            (name.clone(), Trouble { since: *since, reason: reason.clone() })
        };
        let configured = config.destinations.iter().map(|destination| destination.name.as_str());
        let names: BTreeSet<&str> = configured.chain(destinations.keys().map(String::as_str)).collect();
        let feeds = config.feeds.iter().map(|feed| &feed.name).chain(troubles.feeds.keys());
        let feeds: BTreeSet<&String> = feeds.collect();
        Facts {
            // Another machine may send what this one's store holds.
            is_running: (self.is_running || config.profile == Profile::Embedded).then_some(self.is_running),
            disk: self.disk.clone(),
            engines: standing.engines.iter().map(engine).collect(),
            pool: config.delivery.concurrency.min(config.record.max_unrecorded),
            rate_of_all: config.delivery.rate().map(|rate| rate.per_s),
            feeds: feeds.into_iter().map(|name| (name.clone(), self.feed(name))).collect(),
            destinations: names.into_iter().map(|name| (name.to_owned(), self.destination(name))).collect(),
            reading: files.ingesting,
            has_files: files.ingesting + files.open + files.settled > 0,
            files_per_s: standing.files.clone(),
            actors: standing.actors.clone(),
        }
    }

    fn feed(&self, name: &str) -> FeedFacts {
        let troubles = self.troubles.feeds.get(name).cloned().unwrap_or_default();
        FeedFacts {
            parked: troubles.parked,
            held: troubles.held,
            waits_for: self.standing.waiting.get(name).cloned(),
        }
    }

    fn destination(&self, name: &str) -> DestinationFacts {
        let known = self.config.destination(name);
        let view = self.destinations.get(name).cloned().unwrap_or_default();
        let of_config = || known.and_then(|known| known.rate()).map(|rate| rate.per_s);
        DestinationFacts {
            is_configured: known.is_some(),
            is_paused: known.is_some_and(|known| known.paused),
            blocked: self.troubles.destinations.get(name).cloned(),
            rate_per_s: view.limits.rate_per_s.map(Into::into).or_else(of_config),
            is_rate_set: view.limits.rate_per_s.is_some(),
            next_due: view.next_due,
            due: view.queued.zip(view.leased).map(|(queued, leased)| queued + leased),
            retry: known.map(|known| known.retry.clone()),
            traffic: self.standing.destinations.get(name).cloned(),
            disabled: view.disabled,
            counts: view.counts,
        }
    }
}

/// Files that are looked at for those that are open, the newest first.
const FILES_LOOKED_AT: usize = 1_000;

/// Files on their way, the newest first.
pub(crate) fn open_files(view: &mut dyn View) -> anyhow::Result<Vec<FileReport>> {
    let mut reports = view.files(None, FILES_LOOKED_AT)?;
    reports.retain(|report| !report.is_settled());
    Ok(reports)
}

/// What a command knows, with or without a running daemon.
pub(crate) fn gather(config: &Config, view: &mut dyn View) -> anyhow::Result<Facts> {
    let troubles: Troubles = troubles::read(&config.state.dir)?;
    let standing: Standing = troubles::read(&config.state.dir)?;
    let known = Known {
        config,
        destinations: &view.destinations()?,
        files: view.file_totals()?,
        troubles: &troubles,
        standing: &standing,
        is_running: postrider_sqlite::is_running(&config.state.dir)?,
        disk: fullest_disk(config),
    };
    Ok(known.facts())
}

/// The feeds that each destination holds up by its backlog, alone or together with others.
pub(crate) fn holds(
    config: &Config,
    views: &BTreeMap<String, DestinationView>,
) -> BTreeMap<String, Vec<String>> {
    let open: OpenMessages =
        views.iter().map(|(name, view)| (name.as_str().into(), view.counts.open())).collect();
    let mut holds: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for feed in &config.feeds {
        let destinations = feed.destinations.iter().map(String::as_str);
        for destination in holders(&config.outbox, &open, destinations, false) {
            holds.entry(destination.to_owned()).or_default().push(feed.name.clone());
        }
    }
    holds
}

/// The fullest disk of those that Postrider writes to.
pub(crate) fn fullest_disk(config: &Config) -> Option<DiskUse> {
    fullest(disks(config))
}

/// Directories on the disks that Postrider writes to: the store's, and the feeds'.
pub(super) fn disks(config: &Config) -> impl Iterator<Item = &Path> {
    let feeds = config.feeds.iter().filter_map(|feed| Some(feed.directory()?.path.as_path()));
    std::iter::once(config.state.dir.as_path()).chain(feeds)
}

/// The fullest disk of these.
pub(super) fn fullest<'a>(disks: impl Iterator<Item = &'a Path>) -> Option<DiskUse> {
    disks.filter_map(disk_use).max_by_key(|disk| (disk.is_full(), disk.percent))
}

/// How full a disk is, as `df` says it: of what may be used without privileges, rounded up.
fn disk_use(path: &Path) -> Option<DiskUse> {
    let stat = rustix::fs::statvfs(path).ok()?;
    let used = stat.f_blocks.saturating_sub(stat.f_bfree);
    let percent = (used * 100).div_ceil((used + stat.f_bavail).max(1));
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    Some(DiskUse { path: path.display().to_string(), percent, free })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_as_full_as_df_says() {
        let disk = disk_use(Path::new("/")).expect("there is one");
        let df =
            std::process::Command::new("df").args(["--output=pcent", "/"]).output().expect("df is there");
        let df = String::from_utf8(df.stdout).unwrap();
        let percent: u64 = df.lines().last().unwrap().trim().trim_end_matches('%').parse().unwrap();
        assert!(disk.percent.abs_diff(percent) <= 1, "{disk:?} {percent}");
        assert_eq!(disk_use(Path::new("/nowhere/at/all")), None);
    }
}
