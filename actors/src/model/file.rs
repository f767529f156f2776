//! What is known of a dropped file: its record, how far it was read, what became of its rows.

use std::{collections::BTreeMap, iter::Sum, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    hold::FileHold,
    ids::FileId,
    outcome::Reason,
    priority::Priority,
    terms::Terms,
    time::{UnixMs, as_rfc3339},
};

/// A file as it was accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Digest of feed and content.
    pub id: FileId,
    /// The feed it was dropped into.
    pub feed: String,
    /// Its name there, as readable text: bytes that are not UTF-8 are replaced.
    pub name: String,
    /// Its size as dropped, before decompression.
    pub bytes: u64,
    /// SHA-256 of its content as dropped, in hex.
    pub sha256: String,
    /// When it was claimed.
    #[serde(with = "as_rfc3339")]
    pub claimed_at: UnixMs,
    /// The destinations that every accepted row goes to. Named `to` in JSON, where a report has counts
    /// under `destinations` beside it.
    #[serde(rename = "to")]
    pub destinations: Vec<String>,
    /// When its messages may go.
    #[serde(default, skip_serializing_if = "Terms::is_default")]
    pub terms: Terms,
    /// How urgent it is, beside other files for the same destination.
    #[serde(default, skip_serializing_if = "Priority::is_normal")]
    pub priority: Priority,
}

/// How far into a file the outbox has rows; committed together with them. `rows` counts every row
/// seen: accepted, rejected and duplicate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The byte after the last row counted here, in the decompressed stream.
    pub offset: u64,
    /// Rows before `offset`.
    pub rows: u64,
    /// How many of them were rejected.
    pub rejected: u64,
    /// How many of them were left out as duplicates (`duplicates = "first"`).
    pub duplicates: u64,
}

/// Separates a reason from what it quotes from the file: the quote is for reports, not for the log (I10).
pub(in crate::model) const NAMELY: &str = ", namely: ";

/// The state of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", content = "reason", rename_all = "kebab-case")]
pub enum FileState {
    /// Rows are still being read.
    Ingesting,
    /// Every row is in the outbox, or recorded as rejected or duplicate.
    Ingested,
    /// It can't be used, or no further; rows committed before are delivered all the same.
    Failed(String),
    /// It vanished while it was read; rows committed before are delivered all the same (F32).
    SourceLost(String),
}

impl FileState {
    /// The word that operators see.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Ingesting => "ingesting",
            Self::Ingested => "ingested",
            Self::Failed(_) => "failed",
            Self::SourceLost(_) => "source-lost",
        }
    }

    /// Why, for the states that have a reason.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Failed(reason) | Self::SourceLost(reason) => Some(reason),
            Self::Ingesting | Self::Ingested => None,
        }
    }

    /// The reason without what it quotes from the file: where the header is missing, that is the first row (I10).
    pub fn reason_to_log(&self) -> Option<&str> {
        self.reason().map(|reason| reason.split_once(NAMELY).map_or(reason, |(said, _)| said))
    }

    /// Whether no more rows will come.
    pub fn is_closed(&self) -> bool {
        *self != Self::Ingesting
    }
}

/// How far a file is, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Rows are still being read.
    Reading,
    /// Messages are on their way.
    Sending,
    /// All open messages are held.
    Held,
    /// Its window or `not_before` lets nothing go.
    Waiting,
    /// Every message has its final state.
    Done,
    /// It can't be used, or no further.
    Failed,
}

impl Stage {
    /// The word that operators see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reading => "reading",
            Self::Sending => "sending",
            Self::Held => "held",
            Self::Waiting => "waiting",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

/// How a pass over a file ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadEnd {
    /// No more rows will come.
    Closed(FileState),
    /// It can't be read now, which is no verdict on it: another pass goes on at the checkpoint.
    SetAside,
}

/// A row that was not accepted, with enough to fix it and drop it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reject {
    /// Its row number, from 1.
    pub row: u64,
    /// The line it starts on, from 1; a CSV header is line 1.
    pub line: u64,
    /// What is wrong with it, for the operator.
    pub reason: String,
    /// The row as it stood in the file, cut to the format's `max_row_bytes`.
    pub raw: Vec<u8>,
}

/// What became of the rows at one destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationCounts {
    /// Rows that became messages.
    pub accepted: u64,
    /// Answered 2xx.
    pub sent: u64,
    /// Given up.
    pub dead: u64,
    /// At least one attempt failed, another will be made.
    pub retrying: u64,
    /// Never sent: their time was over.
    pub unsent: u64,
    /// Cancelled by an operator.
    pub cancelled: u64,
}

impl DestinationCounts {
    /// Messages that need no delivery any more.
    pub fn settled(&self) -> u64 {
        self.sent + self.dead + self.unsent + self.cancelled
    }

    /// Messages that still need delivery.
    pub fn open(&self) -> u64 {
        self.accepted.saturating_sub(self.settled())
    }

    /// Those of them without a recorded attempt.
    pub fn pending(&self) -> u64 {
        self.open().saturating_sub(self.retrying)
    }
}

impl<'a> Sum<&'a Self> for DestinationCounts {
    fn sum<I: Iterator<Item = &'a Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |sum, counts| Self {
            accepted: sum.accepted + counts.accepted,
            sent: sum.sent + counts.sent,
            dead: sum.dead + counts.dead,
            retrying: sum.retrying + counts.retrying,
            unsent: sum.unsent + counts.unsent,
            cancelled: sum.cancelled + counts.cancelled,
        })
    }
}

/// Everything there is to prove about a file: `NAME.report.json`, and what `postrider files` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileReport {
    /// The file.
    #[serde(flatten)]
    pub file: FileRecord,
    /// Its state, and why.
    #[serde(flatten)]
    pub state: FileState,
    /// When the last row was read, if it was.
    #[serde(with = "as_rfc3339::option", default)]
    pub closed_at: Option<UnixMs>,
    /// When the last message settled, if all have.
    #[serde(with = "as_rfc3339::option", default)]
    pub settled_at: Option<UnixMs>,
    /// Rows read.
    pub rows: u64,
    /// Rows refused, with a reason each.
    pub rejected: u64,
    /// Rows left out as duplicates.
    pub duplicates: u64,
    /// What became of the other rows, per destination.
    pub destinations: BTreeMap<String, DestinationCounts>,
    /// What of them waits though it is due, per destination, and why.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub held: BTreeMap<String, FileHold>,
    /// How urgent it is at destinations where an operator has ordered that.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub priorities: BTreeMap<String, Priority>,
    /// Why messages are dead, per destination, the most frequent first. Only the report of a settled file has it: it costs a look at
    /// every batch of the file.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub failures: BTreeMap<String, Vec<DeadBy>>,
}

/// Messages that are dead for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadBy {
    /// Why the last attempt failed …
    pub reason: Reason,
    /// … and with which status; 0: no answer.
    pub status: u16,
    /// How many.
    pub messages: u64,
}

impl FileReport {
    /// How urgent it is at a destination.
    pub fn priority_at(&self, destination: &str) -> Priority {
        self.priorities.get(destination).copied().unwrap_or(self.file.priority)
    }

    /// How far it is at `now`.
    pub fn stage(&self, now: UnixMs) -> Stage {
        let is_held = |name: &String| self.held.get(name).is_some_and(|hold| !hold.cause.passes());
        let mut open = self.destinations.iter().filter(|(_, counts)| counts.open() > 0).peekable();
        match &self.state {
            FileState::Failed(_) | FileState::SourceLost(_) => Stage::Failed,
            FileState::Ingested if open.peek().is_none() => Stage::Done,
            _ if open.peek().is_some() && open.all(|(name, _)| is_held(name)) => Stage::Held,
            FileState::Ingesting => Stage::Reading,
            FileState::Ingested if self.file.terms.is_closed(now) => Stage::Waiting,
            FileState::Ingested => Stage::Sending,
        }
    }

    /// I1: at every destination, `rows = sent + dead + unsent + cancelled + retrying + pending + rejected + duplicates`.
    pub fn is_balanced(&self) -> bool {
        self.destinations.values().all(|counts| {
            counts.settled() + counts.retrying <= counts.accepted
                && counts.accepted + self.rejected + self.duplicates == self.rows
        })
    }

    /// From when it was claimed until its last message settled.
    pub fn took(&self) -> Option<Duration> {
        Some(self.settled_at?.since(self.file.claimed_at))
    }

    /// Messages sent per second, from then to then.
    pub fn sent_per_s(&self) -> Option<f64> {
        let took = self.took()?.max(Duration::from_millis(1));
        let sent: u64 = self.destinations.values().map(|counts| counts.sent).sum();
        Some(sent as f64 / took.as_secs_f64())
    }

    /// The report with what follows from it, as it is written and printed: `pending` per destination,
    /// `balanced` and `complete`, how long it took, until it was read and in all, and the rate.
    pub fn view(&self) -> serde_json::Result<serde_json::Value> {
        let mut view = serde_json::to_value(self)?;
        for (name, counts) in &self.destinations {
            view["destinations"][name]["pending"] = counts.pending().into();
        }
        view["balanced"] = self.is_balanced().into();
        view["complete"] = self.is_settled().into();
        let read = self.closed_at.map(|closed| closed.since(self.file.claimed_at));
        view["read_s"] = read.map(|read| read.as_secs_f64()).into();
        view["took_s"] = self.took().map(|took| took.as_secs_f64()).into();
        view["sent_per_s"] = self.sent_per_s().map(|per_s| (per_s * 10.0).round() / 10.0).into();
        Ok(view)
    }

    /// Whether no row will change its state any more unless an operator acts.
    pub fn is_settled(&self) -> bool {
        self.state.is_closed() && self.destinations.values().all(|counts| counts.open() == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_where_its_messages_are() {
        let counts = |sent| DestinationCounts { accepted: 3, sent, ..DestinationCounts::default() };
        let mut report = report();
        let stage = |report: &FileReport| report.stage(UnixMs(9)).as_str();
        assert_eq!(stage(&report), "failed");
        report.state = FileState::Ingested;
        report.destinations = [("a".to_owned(), counts(3)), ("b".to_owned(), counts(2))].into();
        assert_eq!(stage(&report), "sending");
        report.file.terms.not_before = Some(UnixMs(10));
        assert_eq!(stage(&report), "waiting");
        report.held.insert("b".into(), FileHold::by_operator(UnixMs(1), "why"));
        assert_eq!(stage(&report), "held", "all that is open");
        report.destinations.insert("a".into(), counts(1));
        assert_eq!(stage(&report), "waiting");
        report.state = FileState::Ingesting;
        assert_eq!(stage(&report), "reading");
        report.state = FileState::Ingested;
        report.destinations = [("a".to_owned(), counts(3))].into();
        assert_eq!(stage(&report), "done");
    }

    fn report() -> FileReport {
        let counts = DestinationCounts { accepted: 3, sent: 2, dead: 1, ..DestinationCounts::default() };
        FileReport {
            file: FileRecord {
                id: FileId::derive("alerts", &[1; 32]),
                feed: "alerts".into(),
                name: "a.csv".into(),
                bytes: 9,
                sha256: "00".into(),
                claimed_at: UnixMs(1),
                destinations: vec!["support".into()],
                terms: Terms::default(),
                priority: Priority::Urgent,
            },
            state: FileState::Failed("why".into()),
            closed_at: Some(UnixMs(2)),
            settled_at: None,
            rows: 4,
            rejected: 1,
            duplicates: 0,
            destinations: [("support".to_owned(), counts)].into(),
            held: BTreeMap::new(),
            priorities: BTreeMap::from([("support".to_owned(), Priority::Bulk)]),
            failures: BTreeMap::new(),
        }
    }

    #[test]
    fn reports_read_back_what_was_written() {
        let report = report();
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(json.matches("\"destinations\"").count(), 1, "no key occurs twice: {json}");
        assert_eq!(serde_json::from_str::<FileReport>(&json).unwrap(), report);
    }
}
