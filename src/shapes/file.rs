use std::collections::BTreeMap;

use postrider_actors::model::{
    ceiling,
    file::{DestinationCounts, FileReport, Reject, Stage},
    finish::Punctuality,
    hold::HoldCause,
    time::{UnixMs, rfc3339},
    trouble::Trouble,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{Ceiling, Counts, DeadGroup, StateCount, Time};

/// A dropped file, and what became of its rows.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct File {
    /// `null`: it can't be taken or read, so that it is in no store.
    pub(crate) id: Option<String>,
    pub(crate) feed: String,
    pub(crate) name: String,
    /// `reading`, `sending`, `held`, `waiting`, `done` or `failed`
    pub(crate) state: &'static str,
    /// Why it is held, waits or failed.
    pub(crate) reason: Option<String>,
    /// Since when it is held.
    pub(crate) since: Option<Time>,
    /// Its destinations.
    pub(crate) to: Vec<String>,
    pub(crate) bytes: Option<u64>,
    pub(crate) sha256: Option<String>,
    pub(crate) claimed_at: Option<Time>,
    /// When its last row was read.
    pub(crate) closed_at: Option<Time>,
    /// When its last message settled.
    pub(crate) settled_at: Option<Time>,
    /// From its claim until it was settled, or until now.
    pub(crate) took_s: Option<f64>,
    pub(crate) rows: u64,
    /// Whether all its rows were read.
    pub(crate) rows_final: bool,
    /// Over all its destinations.
    #[serde(flatten)]
    pub(crate) counts: Counts,
    /// Rows that were refused.
    pub(crate) rejected: u64,
    /// Rows that were left out.
    pub(crate) duplicates: u64,
    /// Messages that are not settled.
    pub(crate) open: u64,
    /// Of its messages, those that are settled; rounded down, and 100 only when all are.
    pub(crate) percent: f64,
    pub(crate) sent_per_s: Option<f64>,
    pub(crate) left_s: Option<f64>,
    pub(crate) done_at: Option<Time>,
    /// When it is to be done.
    pub(crate) finish_by: Option<Time>,
    pub(crate) in_time: Option<bool>,
    /// The latest moment at which it must go on to be done in time.
    pub(crate) latest: Option<Time>,
    pub(crate) priority: &'static str,
    pub(crate) balanced: bool,
    pub(crate) complete: bool,
    pub(crate) ceiling: Option<Ceiling>,
}

/// What a file's store does not know.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileFacts {
    /// Messages per second; `None`: nobody has looked for long enough.
    pub(crate) sent_per_s: Option<f64>,
    /// What is wrong with it on this machine.
    pub(crate) trouble: Option<Trouble>,
    /// What binds it, and when it will be done.
    pub(crate) ceiling: Option<ceiling::Ceiling>,
}

impl File {
    /// At `now`.
    pub(crate) fn of(report: &FileReport, facts: &FileFacts, now: UnixMs) -> Self {
        let file = &report.file;
        let counts = total(report);
        let open: u64 = report.destinations.values().map(DestinationCounts::open).sum();
        let (state, reason, since) = state_of(report, facts.trouble.as_ref(), now);
        let complete = report.is_settled();
        let ceiling = facts.ceiling.as_ref();
        let going = ceiling.filter(|_| !complete);
        let finish_by = ceiling.and_then(|ceiling| ceiling.finish_by);
        let (in_time, latest) = match finish_by {
            Some((_, Punctuality::InTime)) => (Some(true), None),
            Some((_, Punctuality::Late)) => (Some(false), None),
            Some((_, Punctuality::Unknown { latest })) => (None, latest),
            None => (None, None),
        };
        let end = report.settled_at.unwrap_or(now);
        Self {
            id: Some(file.id.to_string()),
            feed: file.feed.clone(),
            name: file.name.clone(),
            state,
            reason,
            since: since.map(Time),
            to: file.destinations.clone(),
            bytes: Some(file.bytes),
            sha256: Some(file.sha256.clone()),
            claimed_at: Some(file.claimed_at.into()),
            closed_at: report.closed_at.map(Time),
            settled_at: report.settled_at.map(Time),
            took_s: Some(end.since(file.claimed_at).as_secs_f64()),
            rows: report.rows,
            rows_final: report.state.is_closed(),
            counts,
            rejected: report.rejected,
            duplicates: report.duplicates,
            open,
            percent: percent(counts.accepted, open, complete),
            sent_per_s: facts.sent_per_s.filter(|_| !complete),
            left_s: going.and_then(|ceiling| ceiling.finish).map(|at| at.since(now).as_secs_f64()),
            done_at: going.and_then(ceiling::Ceiling::done_at).map(Time),
            finish_by: report.file.terms.finish_by.map(Time),
            in_time,
            latest: latest.map(Time),
            priority: file.priority.as_str(),
            balanced: report.is_balanced(),
            complete,
            ceiling: going.map(Ceiling::from),
        }
    }

    /// One that is in no store: it can't be taken or read.
    pub(crate) fn untaken(feed: &str, name: &str, trouble: &Trouble) -> Self {
        Self {
            id: None,
            feed: feed.to_owned(),
            name: name.to_owned(),
            state: "held",
            reason: Some(trouble.reason.clone()),
            since: Some(trouble.since.into()),
            to: Vec::new(),
            bytes: None,
            sha256: None,
            claimed_at: None,
            closed_at: None,
            settled_at: None,
            took_s: None,
            rows: 0,
            rows_final: false,
            counts: Counts::default(),
            rejected: 0,
            duplicates: 0,
            open: 0,
            percent: 0.0,
            sent_per_s: None,
            left_s: None,
            done_at: None,
            finish_by: None,
            in_time: None,
            latest: None,
            priority: "normal",
            balanced: true,
            complete: false,
            ceiling: None,
        }
    }

    /// Whether something of it is still to be done.
    pub(crate) fn is_open(&self) -> bool {
        !self.complete
    }
}

fn total(report: &FileReport) -> Counts {
    Counts::from(&report.destinations.values().sum::<DestinationCounts>())
}

/// The state in a word, why, and since when it is held.
fn state_of(
    report: &FileReport,
    trouble: Option<&Trouble>,
    now: UnixMs,
) -> (&'static str, Option<String>, Option<UnixMs>) {
    let stage = report.stage(now);
    let (reason, since) = match (stage, trouble) {
        (Stage::Failed, _) => (report.state.reason().map(str::to_owned), None),
        (Stage::Done, _) | (Stage::Reading | Stage::Sending, None) => (None, None),
        (_, Some(Trouble { since, reason })) => {
            return (Stage::Held.as_str(), Some(reason.clone()), Some(*since));
        }
        (Stage::Held, None) => {
            let holds = report.held.values().filter(|hold| !hold.cause.passes());
            let first = holds.min_by_key(|hold| hold.since);
            (first.map(|hold| hold.reason.clone()), first.map(|hold| hold.since))
        }
        (Stage::Waiting, None) => {
            let until = report.file.terms.closed_until(now).filter(|until| until.0 < u64::MAX);
            (until.map(|until| format!("closed until {}", rfc3339(until))), None)
        }
    };
    (stage.as_str(), reason, since)
}

fn percent(accepted: u64, open: u64, complete: bool) -> f64 {
    match (complete, accepted) {
        (true, _) => 100.0,
        (false, 0) => 0.0,
        (false, _) => {
            // In tenths, rounded down.
            let tenths = u128::from(accepted - open.min(accepted)) * 1_000 / u128::from(accepted);
            tenths.min(999) as f64 / 10.0
        }
    }
}

/// A file with what is known of it at each destination.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct FileDetail {
    #[serde(flatten)]
    pub(crate) file: File,
    pub(crate) destinations: BTreeMap<String, FileAtDestination>,
    pub(crate) terms: FileTerms,
    /// `ingesting`, `ingested`, `failed` or `source-lost`
    pub(crate) ingest: &'static str,
    /// The largest ones.
    pub(crate) dead_groups: Vec<DeadGroup>,
    /// By state; `null` without a ledger of rows.
    pub(crate) receipts: Option<Vec<StateCount>>,
}

/// Characters of a refused row that are shown.
const REFUSED_TEXT_MAX: usize = 200;

/// A row of a file that was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct RefusedRow {
    pub(crate) row: u64,
    /// The line it starts on.
    pub(crate) line: u64,
    pub(crate) reason: String,
    /// How it begins, 200 characters at most; `null` for who may only look: a row may hold more than its recipient.
    pub(crate) text: Option<String>,
    /// Whether that is all of it.
    pub(crate) is_whole: bool,
}

impl RefusedRow {
    /// With what stood there only for who may see it.
    pub(crate) fn of(reject: Reject, shows_text: bool) -> Self {
        let Reject { row, line, reason, raw } = reject;
        let all = String::from_utf8_lossy(&raw);
        let text: String = all.chars().take(REFUSED_TEXT_MAX).collect();
        let is_whole = shows_text && text.as_bytes() == raw;
        Self { row, line, reason, text: shows_text.then_some(text), is_whole }
    }
}

/// A file at one of its destinations.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct FileAtDestination {
    #[serde(flatten)]
    pub(crate) counts: Counts,
    pub(crate) priority: &'static str,
    pub(crate) held: Option<FileHeld>,
    /// Until when its window or its `not_before` lets nothing go.
    pub(crate) closed_until: Option<Time>,
}

/// Why messages of a file wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct FileHeld {
    pub(crate) since: Time,
    /// `canary`, `ramp`, `errors`, `operator` or `cancelled`
    pub(crate) cause: &'static str,
    pub(crate) reason: String,
    /// Messages from this row on wait.
    pub(crate) from_row: u64,
}

/// When a file's messages may go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct FileTerms {
    pub(crate) not_before: Option<Time>,
    pub(crate) expires_at: Option<Time>,
    pub(crate) finish_by: Option<Time>,
    pub(crate) windows: Option<String>,
    pub(crate) rate_per_s: Option<u32>,
}

impl FileDetail {
    /// Of a report, and what was looked up beside it.
    pub(crate) fn of(
        report: &FileReport,
        file: File,
        dead_groups: Vec<DeadGroup>,
        receipts: Option<Vec<StateCount>>,
        now: UnixMs,
    ) -> Self {
        let terms = &report.file.terms;
        let closed_until = terms.closed_until(now).filter(|until| until.0 < u64::MAX).map(Time);
        let at = |name: &String| {
            let counts = report.destinations.get(name).copied().unwrap_or_default();
            let held = report.held.get(name).map(|hold| FileHeld {
                since: hold.since.into(),
                cause: match hold.cause {
                    HoldCause::Canary => "canary",
                    HoldCause::Ramp => "ramp",
                    HoldCause::Errors => "errors",
                    HoldCause::Operator => "operator",
                    HoldCause::Cancelled => "cancelled",
                },
                reason: hold.reason.clone(),
                from_row: hold.from_row,
            });
            let place = FileAtDestination {
                counts: Counts::from(&counts),
                priority: report.priority_at(name).as_str(),
                held,
                closed_until: closed_until.filter(|_| counts.open() > 0),
            };
            (name.clone(), place)
        };
        Self {
            file,
            destinations: report.file.destinations.iter().map(at).collect(),
            terms: FileTerms {
                not_before: terms.not_before.map(Time),
                expires_at: terms.expires_at.map(Time),
                finish_by: terms.finish_by.map(Time),
                windows: (!terms.windows.is_empty()).then(|| terms.windows.to_string()),
                rate_per_s: terms.rate.map(|rate| rate.per_s),
            },
            ingest: report.state.as_str(),
            dead_groups,
            receipts,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use postrider_actors::model::{
        file::{FileRecord, FileState},
        hold::FileHold,
        ids::FileId,
        priority::Priority,
        terms::Terms,
    };

    use super::*;

    const NOW: UnixMs = UnixMs(1_700_000_000_000);

    fn report(accepted: u64, sent: u64) -> FileReport {
        let counts = DestinationCounts { accepted, sent, ..DestinationCounts::default() };
        FileReport {
            file: FileRecord {
                id: FileId([7; 16]),
                feed: "alerts".into(),
                name: "a.csv".into(),
                bytes: 9,
                sha256: "00".into(),
                claimed_at: NOW.before(Duration::from_secs(100)),
                destinations: vec!["push".into()],
                terms: Terms::default(),
                priority: Priority::Normal,
            },
            state: FileState::Ingested,
            closed_at: None,
            settled_at: None,
            rows: accepted,
            rejected: 0,
            duplicates: 0,
            destinations: [("push".to_owned(), counts)].into(),
            held: BTreeMap::new(),
            priorities: BTreeMap::new(),
            failures: BTreeMap::new(),
        }
    }

    fn shape(report: &FileReport) -> File {
        File::of(report, &FileFacts::default(), NOW)
    }

    #[test]
    fn percent_is_rounded_down_and_100_means_settled() {
        let percent = |accepted, sent| format!("{:.1}", shape(&report(accepted, sent)).percent);
        assert_eq!(percent(100_000, 99_999), "99.9");
        assert_eq!(percent(1_000, 629), "62.9");
        assert_eq!(percent(3, 2), "66.6");
        assert_eq!(percent(5, 5), "100.0");
        assert_eq!(percent(0, 0), "100.0");
    }

    #[test]
    fn when_it_is_done_and_how_long_that_takes_are_one_estimate() {
        let report = report(1_000, 100);
        let facts = ceiling::Facts {
            is_running: Some(true),
            files_per_s: [(report.file.id, 10.0)].into(),
            destinations: [(
                "push".to_owned(),
                ceiling::DestinationFacts { is_configured: true, ..Default::default() },
            )]
            .into(),
            ..Default::default()
        };
        let ceiling = Some(facts.of_file(&report, NOW));
        let file = File::of(&report, &FileFacts { ceiling, ..FileFacts::default() }, NOW);
        assert_eq!(file.left_s, Some(90.0));
        let done_at = file.done_at.expect("it goes");
        assert!(
            done_at.0 >= NOW.after(Duration::from_secs(90)) && done_at.0.0.is_multiple_of(60_000),
            "{done_at:?}"
        );
    }

    #[test]
    fn of_a_refused_row_only_the_beginning_is_shown_and_only_to_who_may_see_it() {
        let of = |raw: &[u8], shows_text| {
            let reject = Reject { row: 3, line: 4, reason: "it is blank".into(), raw: raw.to_vec() };
            let RefusedRow { text, is_whole, .. } = RefusedRow::of(reject, shows_text);
            (text, is_whole)
        };
        assert_eq!(of(b"user-1,Ada", true), (Some("user-1,Ada".into()), true));
        assert_eq!(of(b"user-1,Ada", false), (None, false));
        assert_eq!(of("é".repeat(201).as_bytes(), true), (Some("é".repeat(200)), false));
        assert_eq!(of(b"\xff", true), (Some("\u{fffd}".into()), false));
    }

    #[test]
    fn a_file_is_held_by_its_first_hold_or_by_this_machine() {
        let mut report = report(1_000, 500);
        assert_eq!(shape(&report).state, "sending");
        report.held.insert("push".into(), FileHold::by_operator(NOW, "wait"));
        let held = shape(&report);
        assert_eq!((held.state, held.reason.as_deref(), held.left_s), ("held", Some("wait"), None));
        let trouble = Some(Trouble { since: NOW, reason: "no room".into() });
        let facts = FileFacts { trouble, ..FileFacts::default() };
        assert_eq!(File::of(&report, &facts, NOW).reason.as_deref(), Some("no room"));
        report.state = FileState::Failed("no column".into());
        let failed = shape(&report);
        assert_eq!((failed.state, failed.reason.as_deref()), ("failed", Some("no column")));
    }
}
