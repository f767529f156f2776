//! Why is it not going? For a file, a destination and the whole: the ceiling that binds now, the setting or fact behind it, since
//! when, and what to do about it. Commands, the operator page and alarms ask here and nowhere else, so that all of them say
//! the same.
//!
//! What is asked is what is binding *now*: of two things that both hold messages up, the one without which the other would
//! still hold them. So the order is: the process, the file's own facts, the destination's, and then what merely slows it down.

#[cfg(test)]
mod tests;
mod words;

use std::collections::BTreeMap;

use postrider_settings::Retry;

use super::{
    canary,
    file::{DestinationCounts, FileReport, FileState},
    finish::{self, Punctuality},
    hold::{FileHold, HoldCause},
    outcome,
    standing::{ActorStanding, LastError, TrafficStanding},
    tail::Retries,
    terms::Terms,
    time::UnixMs,
    traffic::{brake::Brake, storm},
    trouble::Trouble,
};
pub use words::{HELD, PAUSED};

/// A disk with less room than this is full: the store's log alone grows by as much between two looks. A share of it
/// would say nothing: 1 % of a large disk is room for millions of rows.
const DISK_ROOM_MIN: u64 = 16 << 20;

/// Everything that is known, of one moment.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Whether a daemon runs that sends; `None` where several machines share the store, and nobody knows of the others.
    pub is_running: Option<bool>,
    /// The fullest disk that Postrider writes to.
    pub disk: Option<DiskUse>,
    /// Engines that don't do what is asked of them: SQS, DynamoDB, Postgres.
    pub engines: BTreeMap<String, Trouble>,
    /// Requests in flight over all destinations together, at most (`delivery.concurrency`).
    pub pool: usize,
    /// Messages per second over all destinations together (`delivery.rate_per_s`).
    pub rate_of_all: Option<u32>,
    /// By name, each feed.
    pub feeds: BTreeMap<String, FeedFacts>,
    /// By name, each destination that the store or the configuration knows.
    pub destinations: BTreeMap<String, DestinationFacts>,
    /// Files that are being read.
    pub reading: u64,
    /// Whether any file was ever read.
    pub has_files: bool,
    /// The pace of files, where it was measured: messages that got their final state per second.
    pub files_per_s: BTreeMap<super::ids::FileId, f64>,
    /// The actors that have something to do.
    pub actors: Vec<ActorStanding>,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskUse {
    /// A path on it.
    pub path: String,
    /// How full it is, for who may not use what is reserved.
    pub percent: u64,
    /// Bytes that are left, for the same.
    pub free: u64,
}

impl DiskUse {
    /// Whether nothing can be written to it any more, or as good as nothing.
    pub fn is_full(&self) -> bool {
        self.free < DISK_ROOM_MIN
    }
}

/// What is known of a feed.
#[derive(Clone, Debug, Default)]
pub struct FeedFacts {
    /// Why it takes no files, if it is parked.
    pub parked: Option<Trouble>,
    /// Its files that can't be taken, read, moved away or reported.
    pub held: BTreeMap<String, Trouble>,
    /// Since when it waits for room, and at which destinations.
    pub waits_for: Option<(UnixMs, Vec<String>)>,
}

/// What is known of a destination.
#[derive(Clone, Debug, Default)]
pub struct DestinationFacts {
    /// Whether the configuration has it.
    pub is_configured: bool,
    /// Whether the configuration holds its messages.
    pub is_paused: bool,
    /// Since when it is disabled, and why.
    pub disabled: Option<(UnixMs, String)>,
    /// Why nothing can be sent there from this machine: its address is not allowed.
    pub blocked: Option<Trouble>,
    /// Over all files.
    pub counts: DestinationCounts,
    /// Messages per second, and whether an operator has set that.
    pub rate_per_s: Option<u32>,
    /// See there.
    pub is_rate_set: bool,
    /// When the earliest batch that is not due yet will be.
    pub next_due: Option<UnixMs>,
    /// Batches that are due, or on their way; `None` if nobody knows.
    pub due: Option<u64>,
    /// How long its messages wait between attempts; `None` if the configuration does not have it.
    pub retry: Option<Retry>,
    /// What the daemon of this machine has noted.
    pub traffic: Option<TrafficStanding>,
}

impl DestinationFacts {
    fn retries(&self) -> Option<Retries> {
        Some(Retries { share: self.traffic.as_ref()?.retry_share, schedule: self.retry.clone()? })
    }

    fn per_s(&self) -> Option<f64> {
        self.traffic.as_ref().map(|traffic| traffic.per_s)
    }
}

/// What binds, and the setting or fact behind it.
#[derive(Clone, Debug, PartialEq)]
pub enum Cause {
    /// Nothing: every message has its final state.
    Done,
    /// Nothing: there is no file.
    NoFiles,
    /// No daemon runs.
    NotRunning,
    /// An engine does not do what is asked of it.
    Engine {
        /// Which.
        name: String,
        /// What it said last.
        reason: String,
    },
    /// A disk is full.
    Disk(DiskUse),
    /// A feed takes no files.
    Parked {
        /// Which.
        feed: String,
        /// Why.
        reason: String,
    },
    /// The file can't be taken, read, moved away or reported.
    Unreadable {
        /// Why.
        reason: String,
    },
    /// The file could not be used, or not to its end.
    Failed {
        /// Why.
        reason: String,
    },
    /// A feed waits for room.
    Watermark {
        /// Where.
        destinations: Vec<String>,
        /// What binds there.
        behind: Option<Box<Ceiling>>,
    },
    /// Rows are being read.
    Reading,
    /// Messages wait for a destination that the configuration does not have.
    NotConfigured,
    /// `paused = true`.
    Paused,
    /// An operator has paused the destination.
    PausedByOperator {
        /// Why.
        reason: String,
    },
    /// Postrider has paused the destination: it answered 410, or seems to be used wrongly.
    Disabled {
        /// Why.
        reason: String,
    },
    /// The destination leads to an address that is not allowed.
    Blocked {
        /// Which.
        reason: String,
    },
    /// Messages of the file are held.
    Held {
        /// By whom.
        cause: HoldCause,
        /// Why.
        reason: String,
    },
    /// The file's window is closed.
    WindowClosed {
        /// When it opens, by the clock of its time zone.
        opens: String,
    },
    /// It is too early for the file.
    NotBefore,
    /// The time of the file is over.
    Expired,
    /// The breaker is open.
    Breaker,
    /// The receiver has asked for a pause.
    RetryAfter,
    /// All open messages have failed and wait for their next attempt.
    Retries {
        /// How many.
        messages: u64,
    },
    /// Retries are no more than a part of what goes.
    RetryBudget,
    /// A rate.
    Rate {
        /// Messages per second.
        per_s: Option<u32>,
        /// Whose rate it is.
        of: RateOf,
    },
    /// As many requests are in flight as may be.
    Limit {
        /// How many.
        limit: usize,
        /// The most that it can become.
        max: usize,
        /// Whether it is found by itself.
        is_found: bool,
    },
    /// As many requests are in flight as all destinations together may have.
    Pool {
        /// How many.
        limit: usize,
    },
    /// Messages are on their way, and nothing that is known slows them down.
    OnTheirWay,
}

/// Whose rate it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RateOf {
    /// The destination's, from the configuration.
    Destination,
    /// The destination's, set by an operator.
    Set,
    /// That over all destinations.
    All,
    /// The file's, or its feed's.
    File,
}

/// The answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Ceiling {
    /// What binds.
    pub cause: Cause,
    /// The destination that it is about.
    pub destination: Option<String>,
    /// The file that it is about.
    pub file: Option<String>,
    /// Since when.
    pub since: Option<UnixMs>,
    /// When it is tried again, or ends by itself.
    pub until: Option<UnixMs>,
    /// How the last attempt there that failed did so.
    pub last_error: Option<LastError>,
    /// When it will be done; what is promised of it is [`Ceiling::done_at`].
    pub finish: Option<UnixMs>,
    /// When it is to be done, and whether it will be.
    pub finish_by: Option<(UnixMs, Punctuality)>,
    /// When that was so.
    pub at: UnixMs,
}

impl Ceiling {
    fn new(cause: Cause, at: UnixMs) -> Self {
        Self {
            cause,
            destination: None,
            file: None,
            since: None,
            until: None,
            last_error: None,
            finish: None,
            finish_by: None,
            at,
        }
    }

    /// When it will be done, to the next full minute: never too early.
    pub fn done_at(&self) -> Option<UnixMs> {
        self.finish.map(finish::to_minute)
    }

    fn since(self, since: impl Into<Option<UnixMs>>) -> Self {
        Self { since: since.into(), ..self }
    }

    fn until(self, until: impl Into<Option<UnixMs>>) -> Self {
        Self { until: until.into(), ..self }
    }

    /// How much it stops: more is worse.
    fn gravity(&self) -> u8 {
        match &self.cause {
            Cause::Done | Cause::NoFiles => 0,
            Cause::OnTheirWay | Cause::Reading => 1,
            Cause::Rate { .. } | Cause::Limit { .. } | Cause::Pool { .. } => 2,
            Cause::Held { cause, .. } if cause.passes() => 2,
            Cause::Watermark { behind, .. } => behind.as_ref().map_or(2, |behind| behind.gravity().max(2)),
            Cause::RetryBudget | Cause::Retries { .. } => 3,
            Cause::WindowClosed { .. }
            | Cause::NotBefore
            | Cause::RetryAfter
            | Cause::Expired
            | Cause::Held { cause: HoldCause::Cancelled, .. } => 4,
            _ => 5,
        }
    }

    /// Whether nothing goes until something changes.
    pub fn is_stop(&self) -> bool {
        self.gravity() >= 4
    }

    /// Whether it waits for a person.
    pub fn is_for_operator(&self) -> bool {
        self.gravity() >= 5
    }
}

impl Facts {
    /// What binds the whole. `open` are files on their way, as many as are known: where a destination is ready for messages and
    /// none comes, all of its files may be held, or wait for their time.
    pub fn of_whole(&self, open: &[&FileReport], now: UnixMs) -> Ceiling {
        if let Some(ceiling) = self.of_process(now) {
            return ceiling;
        }
        let feeds = self.feeds.iter().filter_map(|(name, facts)| self.of_feed(name, facts, open, now));
        let names = self.destinations.iter().filter(|(_, facts)| facts.counts.open() > 0);
        let destinations = names.map(|(name, _)| self.of_destination(name, now));
        let worst = feeds.chain(destinations).max_by_key(|ceiling| {
            let open = ceiling.destination.as_ref().and_then(|name| self.destinations.get(name));
            (ceiling.gravity(), open.map_or(u64::MAX, |facts| facts.counts.open()))
        });
        let finish = self.finish_of_all(now);
        let worst = worst.map(|worst| {
            let files = open.iter().filter(|_| worst.cause == Cause::OnTheirWay);
            let stopped = files.map(|report| self.of_file(report, now)).max_by_key(Ceiling::gravity);
            stopped.filter(|file| file.gravity() > worst.gravity()).unwrap_or(worst)
        });
        match worst {
            // What stands has no end that could be promised.
            Some(worst) => Ceiling { finish: finish.filter(|_| !worst.is_stop()), ..worst },
            None if self.reading > 0 => Ceiling::new(Cause::Reading, now),
            None if self.has_files => Ceiling::new(Cause::Done, now),
            None => Ceiling::new(Cause::NoFiles, now),
        }
    }

    /// What binds a destination.
    pub fn of_destination(&self, name: &str, now: UnixMs) -> Ceiling {
        let unknown = DestinationFacts::default();
        let facts = self.destinations.get(name).unwrap_or(&unknown);
        let open = facts.counts.open();
        let traffic = facts.traffic.as_ref();
        let at_rest = self.at_rest(facts, now);
        let ceiling = match at_rest {
            Some(ceiling) => ceiling,
            None if open == 0 => Ceiling::new(Cause::Done, now),
            None => match self.of_process(now) {
                Some(ceiling) => ceiling,
                None => self.in_motion(facts, now),
            },
        };
        let goes = !ceiling.is_stop() && open > 0;
        let work = || finish::work(open, facts.counts.accepted, facts.per_s()?, facts.retries().as_ref());
        let finish = goes.then(|| finish::finish(work(), &Terms::default(), now)).flatten();
        Ceiling {
            destination: Some(name.to_owned()),
            last_error: traffic.and_then(|traffic| traffic.last_error.clone()),
            finish,
            ..ceiling
        }
    }

    /// What binds a file.
    pub fn of_file(&self, report: &FileReport, now: UnixMs) -> Ceiling {
        let own = self.of_file_alone(report, now);
        let ceiling = own.unwrap_or_else(|| {
            let places = report.destinations.iter().filter(|(_, counts)| counts.open() > 0);
            let places = places.map(|(name, counts)| (counts.open(), self.of_file_at(report, name, now)));
            let worst = places.max_by_key(|(open, ceiling)| (ceiling.gravity(), *open));
            worst.map_or_else(|| self.of_reading(report, now), |(_, ceiling)| ceiling)
        });
        let (settled, accepted) = finish::totals(report);
        let per_s = self.files_per_s.get(&report.file.id).copied();
        let waits = matches!(ceiling.cause, Cause::WindowClosed { .. } | Cause::NotBefore);
        let moves = report.state.is_closed() && (waits || !ceiling.is_stop());
        let left = accepted.saturating_sub(settled);
        let measured = per_s.filter(|per_s| *per_s > 0.0);
        // A file that only waits for its time goes at the pace of its destinations then.
        let pace = if waits { measured.or_else(|| self.expected_pace(report)) } else { per_s };
        let retries = self.retries_of(report);
        let work = |pace: Option<f64>| finish::work(left, accepted, pace?, retries.as_ref());
        let finish =
            (moves && left > 0).then(|| finish::finish(work(pace), &report.file.terms, now)).flatten();
        let punctuality = |by: UnixMs| {
            if let Some(settled) = report.settled_at {
                return finish::punctuality(Some(settled), by, 0, None, now);
            }
            // What stands goes on at the pace of its destinations, if it goes on. Nobody knows how much there is of what is
            // being read.
            let is_known = report.state.is_closed();
            let pace = measured.or_else(|| self.expected_pace(report)).filter(|_| is_known);
            finish::punctuality(finish, by, if is_known { left } else { u64::MAX }, work(pace), now)
        };
        let finish_by = report.file.terms.finish_by.map(|by| (by, punctuality(by)));
        Ceiling { file: Some(report.file.name.clone()), finish, finish_by, ..ceiling }
    }

    /// What binds a file at one of its destinations.
    pub fn of_file_at(&self, report: &FileReport, destination: &str, now: UnixMs) -> Ceiling {
        let of_destination = self.of_destination(destination, now);
        let held = report.held.get(destination).map(|hold| of_hold(hold, now));
        let of_file = match held {
            // What stops more counts; of two that stop alike the file's own.
            Some(held) if held.gravity() >= of_destination.gravity() => held,
            _ => of_destination.clone(),
        };
        let is_of_file = matches!(of_file.cause, Cause::Held { .. });
        let last_error = if is_of_file { of_destination.last_error } else { of_file.last_error.clone() };
        let cause = match of_file.cause {
            Cause::Rate { of: RateOf::File, .. } => {
                let per_s = report.file.terms.rate.map(|rate| rate.per_s);
                Cause::Rate { per_s, of: RateOf::File }
            }
            cause => cause,
        };
        Ceiling { cause, destination: Some(destination.to_owned()), last_error, ..of_file }
    }

    /// What binds a file that can't be taken or read, as far as it is one of those.
    pub fn of_unread(&self, feed: &str, name: &str, now: UnixMs) -> Option<Ceiling> {
        let trouble = self.feeds.get(feed)?.held.get(name)?;
        let cause = Cause::Unreadable { reason: trouble.reason.clone() };
        Some(Ceiling { file: Some(name.to_owned()), ..Ceiling::new(cause, now).since(trouble.since) })
    }

    /// What binds everything, whatever it is.
    fn of_process(&self, now: UnixMs) -> Option<Ceiling> {
        if self.is_running == Some(false) {
            return Some(Ceiling::new(Cause::NotRunning, now));
        }
        if let Some((name, trouble)) = self.engines.iter().min_by_key(|(_, trouble)| trouble.since) {
            let cause = Cause::Engine { name: name.clone(), reason: trouble.reason.clone() };
            return Some(Ceiling::new(cause, now).since(trouble.since));
        }
        let full = self.disk.as_ref().filter(|disk| disk.is_full());
        full.map(|disk| Ceiling::new(Cause::Disk(disk.clone()), now))
    }

    /// What keeps a feed from taking files.
    fn of_feed(&self, name: &str, facts: &FeedFacts, open: &[&FileReport], now: UnixMs) -> Option<Ceiling> {
        if let Some(Trouble { since, reason }) = &facts.parked {
            let cause = Cause::Parked { feed: name.to_owned(), reason: reason.clone() };
            return Some(Ceiling::new(cause, now).since(*since));
        }
        if let Some((file, _)) = facts.held.iter().next() {
            let report = open.iter().find(|report| report.file.feed == name && report.file.name == *file);
            return report
                .map(|report| self.of_file(report, now))
                .or_else(|| self.of_unread(name, file, now));
        }
        let (since, destinations) = facts.waits_for.clone()?;
        Some(self.watermark(destinations, now).since(since))
    }

    fn watermark(&self, destinations: Vec<String>, now: UnixMs) -> Ceiling {
        let behind = destinations.iter().map(|name| self.of_destination(name, now));
        let behind = behind.max_by_key(Ceiling::gravity).map(Box::new);
        Ceiling::new(Cause::Watermark { destinations, behind }, now)
    }

    /// What binds a file wherever it goes.
    fn of_file_alone(&self, report: &FileReport, now: UnixMs) -> Option<Ceiling> {
        // What is held of one that was read says why itself.
        if report.held.is_empty()
            && let Some(unread) = self.of_unread(&report.file.feed, &report.file.name, now)
        {
            return Some(unread);
        }
        if report.is_settled() {
            let cause = match &report.state {
                FileState::Failed(reason) | FileState::SourceLost(reason) => {
                    Cause::Failed { reason: reason.clone() }
                }
                _ => Cause::Done,
            };
            return Some(Ceiling::new(cause, now).since(report.settled_at));
        }
        if let Some(ceiling) = self.of_process(now) {
            return Some(ceiling);
        }
        of_terms(&report.file.terms, now)
    }

    /// What keeps a file from being read, none of whose messages is open.
    fn of_reading(&self, report: &FileReport, now: UnixMs) -> Ceiling {
        let feed = self.feeds.get(&report.file.feed);
        match feed.and_then(|facts| facts.waits_for.clone()) {
            Some((since, destinations)) => self.watermark(destinations, now).since(since),
            None => Ceiling::new(Cause::Reading, now).since(report.file.claimed_at),
        }
    }

    /// Why nothing goes to a destination.
    fn at_rest(&self, facts: &DestinationFacts, now: UnixMs) -> Option<Ceiling> {
        let traffic = facts.traffic.as_ref();
        if !facts.is_configured {
            return Some(Ceiling::new(Cause::NotConfigured, now));
        }
        if let Some((since, reason)) = &facts.disabled {
            let reason = reason.clone();
            let is_own = reason.starts_with(storm::SUSPECT) || reason == outcome::GONE;
            let cause = if is_own { Cause::Disabled { reason } } else { Cause::PausedByOperator { reason } };
            return Some(Ceiling::new(cause, now).since(*since));
        }
        if facts.is_paused {
            return Some(Ceiling::new(Cause::Paused, now));
        }
        if facts.counts.open() == 0 || self.is_running == Some(false) {
            return None;
        }
        if let Some(Trouble { since, reason }) = &facts.blocked {
            return Some(Ceiling::new(Cause::Blocked { reason: reason.clone() }, now).since(*since));
        }
        match traffic {
            Some(&TrafficStanding { open_since: Some(since), paused_until, .. }) => {
                Some(Ceiling::new(Cause::Breaker, now).since(since).until(paused_until))
            }
            Some(&TrafficStanding { paused_until: Some(until), .. }) if until > now => {
                Some(Ceiling::new(Cause::RetryAfter, now).until(until))
            }
            _ => None,
        }
    }

    /// What slows a destination down that takes messages.
    fn in_motion(&self, facts: &DestinationFacts, now: UnixMs) -> Ceiling {
        let counts = &facts.counts;
        // Nothing is due, and all that is open has failed before: it waits for its time.
        if facts.due == Some(0) && counts.retrying > 0 && counts.pending() == 0 {
            let cause = Cause::Retries { messages: counts.retrying };
            return Ceiling::new(cause, now).until(facts.next_due);
        }
        let Some((brake, since, traffic)) = facts
            .traffic
            .as_ref()
            .and_then(|traffic| traffic.brake.map(|(brake, since)| (brake, since, traffic)))
        else {
            return Ceiling::new(Cause::OnTheirWay, now);
        };
        let of_destination = if facts.is_rate_set { RateOf::Set } else { RateOf::Destination };
        let cause = match brake {
            Brake::Limit => {
                Cause::Limit { limit: traffic.limit, max: traffic.limit_max, is_found: traffic.is_found }
            }
            Brake::Pool => Cause::Pool { limit: self.pool },
            Brake::Rate => Cause::Rate { per_s: facts.rate_per_s, of: of_destination },
            Brake::RateOfAll => Cause::Rate { per_s: self.rate_of_all, of: RateOf::All },
            Brake::RateOfFile => Cause::Rate { per_s: None, of: RateOf::File },
            Brake::RetryBudget => Cause::RetryBudget,
        };
        Ceiling::new(cause, now).since(since)
    }

    /// The pace that a file may be expected to have, of which none was measured: of the slowest of its destinations.
    fn expected_pace(&self, report: &FileReport) -> Option<f64> {
        let pace = |name: &String| {
            let facts = self.destinations.get(name)?;
            let rates = facts.rate_per_s.into_iter().chain(report.file.terms.rate.map(|rate| rate.per_s));
            let had = facts.traffic.as_ref().map(|traffic| traffic.pace).filter(|pace| *pace > 0.0);
            rates.map(f64::from).chain(had).min_by(f64::total_cmp)
        };
        report.destinations.keys().filter_map(pace).min_by(f64::total_cmp)
    }

    /// How the attempts for a file fail, at that of its open destinations where most do.
    fn retries_of(&self, report: &FileReport) -> Option<Retries> {
        let open = report.destinations.iter().filter(|(_, counts)| counts.open() > 0);
        let retries = open.filter_map(|(name, _)| self.destinations.get(name)?.retries());
        retries.max_by(|a, b| a.share.total_cmp(&b.share))
    }

    /// When everything that moves is done.
    fn finish_of_all(&self, now: UnixMs) -> Option<UnixMs> {
        let open = self.destinations.iter().filter(|(_, facts)| facts.counts.open() > 0);
        let mut latest = None;
        for (name, _) in open {
            latest = latest.max(Some(self.of_destination(name, now).finish?));
        }
        latest.filter(|_| self.reading == 0)
    }
}

/// What of a file's terms keeps its messages from going.
fn of_terms(terms: &Terms, now: UnixMs) -> Option<Ceiling> {
    if terms.is_over(now) {
        return Some(Ceiling::new(Cause::Expired, now).since(terms.expires_at));
    }
    let until = terms.closed_until(now)?;
    let cause = match terms.not_before {
        Some(begins) if now < begins => Cause::NotBefore,
        _ => Cause::WindowClosed { opens: terms.windows.clock(until, now) },
    };
    Some(Ceiling::new(cause, now).until(until))
}

fn of_hold(hold: &FileHold, now: UnixMs) -> Ceiling {
    let reason = hold.reason.strip_prefix(canary::PREFIX).unwrap_or(&hold.reason).to_owned();
    Ceiling::new(Cause::Held { cause: hold.cause, reason }, now).since(hold.since)
}
