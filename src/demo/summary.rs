//! What the demo shows at its end, and whether it adds up.

use std::{collections::BTreeMap, path::PathBuf};

use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use indicatif::{BinaryBytes, HumanCount};
use postrider_actors::model::file::{DestinationCounts, FileReport};
use serde::{Deserialize, Serialize};

use super::world::{Expected, World};
use crate::receiver::Counts;

/// One file as `postrider files --json` prints it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct PolledFile {
    #[serde(flatten)]
    pub(super) report: FileReport,
    /// Whether the counts add up, in the store's own opinion.
    balanced: bool,
}

impl PolledFile {
    /// Whether no row will change its state any more.
    pub(super) fn is_finished(&self) -> bool {
        self.report.is_settled()
    }

    fn counts(&self) -> DestinationCounts {
        // The demo has one destination.
        self.report.destinations.values().next().copied().unwrap_or_default()
    }
}

/// What was seen.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) expected: Expected,
    pub(super) report: PolledFile,
    pub(super) counts: Counts,
    pub(super) dropped_at_ms: u64,
    pub(super) peak_memory_bytes: u64,
    /// The report that lies beside the file, if it was written to its end.
    pub(super) written: Option<FileReport>,
}

/// What came of the demo.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Rows of the file.
    pub rows: u64,
    /// Rows whose message the receiver has taken.
    pub sent: u64,
    /// Requests that failed and were made again.
    pub retried: u64,
    /// Rows whose message was given up.
    pub dead: u64,
    /// Rows that were refused.
    pub rejected: u64,
    /// Rows of a recipient who had one before.
    pub duplicates: u64,
    /// Messages sent per second, from the first request to the last.
    pub messages_per_s: f64,
    /// From the drop of the file to the first request, in milliseconds.
    pub first_delivery_ms: u64,
    /// From the drop of the file to the last request, in milliseconds.
    pub duration_ms: u64,
    /// The most memory that the daemon has held.
    pub peak_memory_bytes: u64,
    /// Whether every row is accounted for, by the store, by the receiver and by the file that was written.
    pub balanced: bool,
    /// What does not add up.
    pub problems: Vec<String>,
    /// What there is to look at.
    pub files: Vec<(&'static str, PathBuf)>,
}

impl Facts {
    pub(super) fn summary(&self, world: &World) -> Summary {
        let Counts { accepted, failed, first_at, last_at, .. } = self.counts;
        let report = &self.report.report;
        let DestinationCounts { sent, dead, .. } = self.report.counts();
        let first_at = first_at.unwrap_or(self.dropped_at_ms);
        let last_at = last_at.unwrap_or(first_at);
        let problems = self.problems();
        Summary {
            rows: report.rows,
            sent,
            retried: failed,
            dead,
            rejected: report.rejected,
            duplicates: report.duplicates,
            // The clock's step is a millisecond: a demo of three messages takes less.
            messages_per_s: accepted as f64 * 1000.0 / last_at.saturating_sub(first_at).max(1) as f64,
            first_delivery_ms: first_at.saturating_sub(self.dropped_at_ms),
            duration_ms: last_at.saturating_sub(self.dropped_at_ms),
            peak_memory_bytes: self.peak_memory_bytes,
            balanced: problems.is_empty(),
            problems,
            files: vec![
                ("report", world.done(".report.json")),
                ("report to read", world.done(".report.html")),
                ("rejected rows", world.done(".rejects.csv")),
                ("configuration", world.directory().join("postrider.toml")),
                ("store", world.directory().join("state")),
                ("daemon's log", world.log("run")),
            ],
        }
    }

    /// Cross-checks four independent counts: the generated file, the store, the report, the receiver.
    fn problems(&self) -> Vec<String> {
        let report = &self.report.report;
        let counts = self.report.counts();
        let mut problems = Vec::new();
        let mut equal = |what: &str, found: u64, expected: u64| {
            if found != expected {
                problems.push(format!("{what}: {found}, expected {expected}"));
            }
        };
        equal("rows read", report.rows, self.expected.rows);
        equal("rows rejected", report.rejected, self.expected.rejected);
        equal("rows left out as duplicates", report.duplicates, self.expected.duplicates);
        equal(
            "rows sent, dead, rejected or duplicate",
            counts.settled() + report.rejected + report.duplicates,
            report.rows,
        );
        equal("messages the receiver took, of those sent", self.counts.accepted, counts.sent);
        equal("requests whose signature was refused", self.counts.unverified, 0);
        if !self.report.balanced || !report.is_balanced() {
            problems.push("the store's counts of the file do not balance".to_owned());
        }
        // Why messages are dead stands only in the file.
        let written = self.written.clone().map(|written| FileReport { failures: BTreeMap::new(), ..written });
        if written.as_ref() != Some(report) {
            problems.push("the report beside the file is not what the store says".to_owned());
        }
        if let Some(reason) = report.state.reason() {
            problems.push(format!("the file is {}: {reason}", report.state.as_str()));
        }
        problems
    }
}

impl Summary {
    /// The table.
    pub fn table(&self) -> String {
        let count = |count: u64| HumanCount(count).to_string();
        let balance = if self.balanced {
            "yes: every row is accounted for".to_owned()
        } else {
            format!("NO: {}", self.problems.join("; "))
        };
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED);
        table.add_rows([
            ["rows", &count(self.rows)],
            ["sent", &count(self.sent)],
            ["dead", &count(self.dead)],
            ["rejected", &count(self.rejected)],
            ["duplicates", &count(self.duplicates)],
            ["retried", &count(self.retried)],
            ["messages/s", &count(self.messages_per_s as u64)],
            ["first delivery", &format!("{} ms after the drop", self.first_delivery_ms)],
            ["last delivery", &format!("{} ms after the drop", count(self.duration_ms))],
            ["peak memory", &BinaryBytes(self.peak_memory_bytes).to_string()],
            ["balanced", &balance],
        ]);
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        format!("{table}\n")
    }

    /// What there is to look at, a line each.
    pub fn files(&self) -> String {
        let width = self.files.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        let files = self.files.iter().map(|(name, path)| format!("{name:width$}  {}\n", path.display()));
        files.collect()
    }
}

#[cfg(test)]
mod tests {
    use postrider_actors::model::{
        file::{FileRecord, FileState},
        ids::FileId,
        priority::Priority,
        terms::Terms,
        time::UnixMs,
    };

    use super::*;

    /// As the store would print it.
    fn polled(change: impl FnOnce(&mut FileReport)) -> PolledFile {
        let counts = DestinationCounts { accepted: 97, sent: 96, dead: 1, ..DestinationCounts::default() };
        let mut report = FileReport {
            file: FileRecord {
                id: FileId([1; 16]),
                feed: "demo".into(),
                name: "users.csv".into(),
                bytes: 1,
                sha256: "00".into(),
                claimed_at: UnixMs(1),
                destinations: vec!["receiver".into()],
                terms: Terms::default(),
                priority: Priority::Normal,
            },
            state: FileState::Ingested,
            closed_at: Some(UnixMs(2)),
            settled_at: Some(UnixMs(3)),
            rows: 100,
            rejected: 1,
            duplicates: 2,
            destinations: BTreeMap::from([("receiver".to_owned(), counts)]),
            held: BTreeMap::new(),
            priorities: BTreeMap::new(),
            failures: BTreeMap::new(),
        };
        change(&mut report);
        let mut json = serde_json::to_value(&report).unwrap();
        json["balanced"] = report.is_balanced().into();
        json["complete"] = true.into();
        serde_json::from_value(json).unwrap()
    }

    fn facts(change: impl FnOnce(&mut FileReport)) -> Facts {
        let report = polled(change);
        Facts {
            written: Some(report.report.clone()),
            report,
            expected: Expected { rows: 100, rejected: 1, duplicates: 2 },
            counts: Counts {
                requests: 99,
                accepted: 96,
                failed: 3,
                unverified: 0,
                bytes: 1,
                first_at: Some(1_050),
                last_at: Some(1_250),
            },
            dropped_at_ms: 1_000,
            peak_memory_bytes: 20 << 20,
        }
    }

    fn set(report: &mut FileReport, change: impl FnOnce(&mut DestinationCounts)) {
        change(report.destinations.get_mut("receiver").unwrap());
    }

    #[test]
    fn a_job_that_adds_up_is_summed_up() {
        let directory = tempfile::tempdir().unwrap();
        let world = World::create(Some(directory.path()), 100).unwrap();
        let summary = facts(|_| {}).summary(&world);
        assert!(summary.balanced && summary.problems.is_empty());
        assert_eq!((summary.first_delivery_ms, summary.duration_ms), (50, 250));
        assert!((summary.messages_per_s - 480.0).abs() < 1e-9);
        let table = summary.table() + &summary.files();
        for shown in
            ["100", "96", "480", "50 ms", "20.00 MiB", "every row is accounted for", "users.csv.rejects.csv"]
        {
            assert!(table.contains(shown), "{shown}:\n{table}");
        }
    }

    #[test]
    fn each_witness_can_object() {
        assert_eq!(facts(|_| {}).problems(), Vec::<String>::new());
        let objections = [
            facts(|report| report.rows = 99),
            facts(|report| report.rejected = 0),
            facts(|report| report.duplicates = 3),
            facts(|report| set(report, |counts| counts.sent = 95)),
            facts(|report| report.state = FileState::Failed("torn".into())),
            Facts { counts: Counts { accepted: 97, ..facts(|_| {}).counts }, ..facts(|_| {}) },
            Facts { written: None, ..facts(|_| {}) },
            Facts { written: Some(polled(|report| report.rows = 99).report), ..facts(|_| {}) },
            Facts { counts: Counts { unverified: 1, ..facts(|_| {}).counts }, ..facts(|_| {}) },
        ];
        for (index, facts) in objections.iter().enumerate() {
            assert!(!facts.problems().is_empty(), "objection {index}");
        }
    }

    #[test]
    fn a_file_is_finished_when_nothing_can_change_any_more() {
        assert!(polled(|_| {}).is_finished());
        assert!(!polled(|report| report.state = FileState::Ingesting).is_finished());
        assert!(!polled(|report| set(report, |counts| counts.accepted += 1)).is_finished());
    }
}
