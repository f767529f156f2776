//! The shapes that facts have in JSON: in the answers of `/api/v1`, and in what commands print with `--json`.
//!
//! Times are RFC 3339 in UTC; what is not known is `null`, never 0. Texts of files, recipients and receivers are as they came:
//! whoever shows them escapes them (F27, F56).

mod dead;
mod destination;
mod file;
mod message;
mod overview;
mod receipts;

use postrider_actors::{
    model::{
        alarm::board::AlarmNote,
        ceiling,
        file::DestinationCounts,
        time::{UnixMs, rfc3339},
    },
    ports::console,
};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

pub(crate) use self::{
    dead::{Dead, DeadGroup, DeadGroups, DeadTally},
    destination::{Destination, DestinationFacts, InFlightLimit, LiveTraffic, concurrency, rate, whole_of},
    file::{File, FileDetail, FileFacts, RefusedRow},
    message::Story,
    overview::{Daemon, Deadline, FileCounts, Overview, ParkedFeed, Sample},
    receipts::{Gaps, Held, Rejected, Source, StateCount, key_text},
};

/// A time, in RFC 3339 in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ToSchema)]
#[schema(value_type = String, format = DateTime)]
pub(crate) struct Time(pub(crate) UnixMs);

impl From<UnixMs> for Time {
    fn from(at: UnixMs) -> Self {
        Self(at)
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&rfc3339(self.0))
    }
}

/// What became of messages: `accepted` is the sum of the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Counts {
    pub(crate) accepted: u64,
    pub(crate) sent: u64,
    pub(crate) dead: u64,
    pub(crate) retrying: u64,
    pub(crate) pending: u64,
    pub(crate) unsent: u64,
    pub(crate) cancelled: u64,
}

impl From<&DestinationCounts> for Counts {
    fn from(counts: &DestinationCounts) -> Self {
        let DestinationCounts { accepted, sent, dead, retrying, unsent, cancelled } = *counts;
        Self { accepted, sent, dead, retrying, pending: counts.pending(), unsent, cancelled }
    }
}

/// What binds now: why it is not faster, or does not go at all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Ceiling {
    /// Such as `rate_per_s = 500`.
    pub(crate) text: String,
    /// A word for what it is.
    pub(crate) cause: String,
    pub(crate) since: Option<Time>,
    /// When it is tried again, or ends by itself.
    pub(crate) until: Option<Time>,
    /// What would lift it.
    pub(crate) remedy: Option<String>,
}

impl From<&ceiling::Ceiling> for Ceiling {
    fn from(ceiling: &ceiling::Ceiling) -> Self {
        Self {
            text: ceiling.to_string(),
            cause: ceiling.word().to_owned(),
            since: ceiling.since.map(Time),
            until: ceiling.until.map(Time),
            remedy: ceiling.remedy(),
        }
    }
}

/// An alarm that is or was raised.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "it is the word that logs and metrics have")]
pub(crate) struct Alarm {
    /// Which one.
    pub(crate) alarm: String,
    /// What it is about: a destination, a feed or a file.
    pub(crate) subject: Option<String>,
    pub(crate) severity: Severity,
    pub(crate) since: Time,
    pub(crate) text: String,
    /// What to do.
    pub(crate) remedy: Option<String>,
    /// What was read when it was raised.
    pub(crate) value: Option<f64>,
    pub(crate) threshold: Option<f64>,
    /// Of both.
    pub(crate) unit: Option<String>,
    pub(crate) cleared: Option<Time>,
}

impl From<&AlarmNote> for Alarm {
    fn from(note: &AlarmNote) -> Self {
        let AlarmNote { alarm, subject, severity, since, value, threshold, unit, cause, remedy, cleared } =
            note;
        let text = match (cause.is_empty(), value) {
            (false, _) => cause.clone(),
            (true, Some(value)) => format!("{value:.0} {unit}, more than {threshold:.0}"),
            (true, None) => format!("not known, and it may be more than {threshold:.0} {unit}"),
        };
        Self {
            alarm: alarm.clone(),
            subject: Some(subject.clone()).filter(|subject| !subject.is_empty()),
            severity: if severity == "critical" { Severity::Critical } else { Severity::Warning },
            since: Time(*since),
            text,
            remedy: Some(remedy.clone()),
            value: *value,
            threshold: Some(*threshold),
            unit: Some(unit.clone()),
            cleared: cleared.map(Time),
        }
    }
}

/// How urgent an alarm is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Severity {
    /// Somebody has to look soon.
    Critical,
    /// Somebody has to look.
    Warning,
}

/// Who ordered what, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct AuditLine {
    pub(crate) at: Time,
    pub(crate) by: String,
    /// The command.
    pub(crate) order: String,
    /// What it was about.
    pub(crate) of: String,
    /// The reason, or how much it changed.
    pub(crate) detail: String,
}

impl From<console::AuditLine> for AuditLine {
    fn from(line: console::AuditLine) -> Self {
        let console::AuditLine { at, by, verb, of, detail } = line;
        Self { at: at.into(), by, order: verb, of, detail }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339_in_utc() {
        assert_eq!(serde_json::to_string(&Time(UnixMs(0))).unwrap(), "\"1970-01-01T00:00:00.000Z\"");
    }
}
