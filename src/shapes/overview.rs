use serde::Serialize;
use utoipa::ToSchema;

use super::{Alarm, Ceiling, Time};

/// What comes first: will it be done in time, and if not, why.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct Overview {
    pub(crate) at: Time,
    pub(crate) daemon: Daemon,
    /// Messages without a final state.
    pub(crate) open: Option<u64>,
    pub(crate) sent_per_s: Option<f64>,
    /// Attempts that failed, in the last 10 s.
    pub(crate) failed_percent: Option<f64>,
    pub(crate) left_s: Option<f64>,
    /// An estimate for everything that is not held.
    pub(crate) done_at: Option<Time>,
    /// The earliest deadline of a file with open messages.
    pub(crate) finish_by: Option<Deadline>,
    /// What binds at the destination with the most open messages.
    pub(crate) ceiling: Option<Ceiling>,
    pub(crate) ceiling_of: Option<String>,
    pub(crate) files: FileCounts,
    /// Dead letters.
    pub(crate) dead: u64,
    /// Feeds that take no files.
    pub(crate) parked: Vec<ParkedFeed>,
    /// Those that are raised, the most severe first.
    pub(crate) alarms: Vec<Alarm>,
}

/// The process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Daemon {
    pub(crate) version: &'static str,
    /// `starting`, `ready`, `reloading` or `stopping`
    pub(crate) phase: &'static str,
    pub(crate) started_at: Time,
    /// Its configuration file.
    pub(crate) config: String,
    pub(crate) profile: &'static str,
    /// Threads and actors that give no sign of life.
    pub(crate) stuck: Vec<String>,
    pub(crate) feeds: usize,
    pub(crate) destinations: usize,
}

/// A file's deadline.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct Deadline {
    pub(crate) at: Time,
    /// The file's name.
    pub(crate) file: String,
    pub(crate) id: Option<String>,
    pub(crate) open: u64,
    pub(crate) done_at: Option<Time>,
    pub(crate) in_time: Option<bool>,
    /// The latest moment at which it must go on to be done in time.
    pub(crate) latest: Option<Time>,
}

/// Files by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct FileCounts {
    pub(crate) reading: u64,
    pub(crate) sending: u64,
    pub(crate) held: u64,
    pub(crate) waiting: u64,
    pub(crate) done: u64,
    pub(crate) failed: u64,
}

/// A feed that takes no files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct ParkedFeed {
    pub(crate) feed: String,
    pub(crate) since: Time,
    pub(crate) reason: String,
}

/// How the last seconds were, at one destination or at all. What is not known is `null`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct Sample {
    pub(crate) sent_per_s: Option<f64>,
    pub(crate) attempts_per_s: Option<f64>,
    pub(crate) failed_4xx_per_s: Option<f64>,
    pub(crate) failed_5xx_per_s: Option<f64>,
    pub(crate) failed_timeout_per_s: Option<f64>,
    pub(crate) failed_other_per_s: Option<f64>,
    /// Half of the attempts took no longer. `null`: there was none.
    pub(crate) p50_ms: Option<f64>,
    /// 95 of 100 attempts took no longer.
    pub(crate) p95_ms: Option<f64>,
    /// Requests that may be in flight.
    pub(crate) limit: Option<u64>,
    pub(crate) in_flight: Option<u64>,
    /// Messages without a final state.
    pub(crate) open: Option<u64>,
}
