//! What the stages of receipts count. Families of their own: a process without receipts does not have them.

use std::time::Duration;

use prometheus_client::{
    metrics::{counter::Counter, histogram::Histogram},
    registry::Registry,
};

use super::{Counters, Gauges, Timings, call_buckets};
use crate::ports::{Applied, Taken};

/// The families of the stages of receipts.
#[derive(Clone, Debug)]
pub struct ReceiptMetrics {
    taken: Counters<2>,
    reused_ids: Counters<1>,
    poll_failures: Counters<1>,
    requests: Counters<2>,
    applied: Counters<1>,
    conflicts: Counters<0>,
    changed: Counters<0>,
    apply_duration: Timings<0>,
    rejoined: Counters<0>,
    orphaned: Counters<0>,
    expired: Counters<1>,
    waiting: Gauges<0>,
    parked: Gauges<0>,
    behind: Gauges<1>,
}

impl Default for ReceiptMetrics {
    /// Metrics that are not exported, for tests.
    fn default() -> Self {
        Self::register(&mut Registry::default())
    }
}

impl ReceiptMetrics {
    /// Messages to a destination whose final receipt did not come in time, so far.
    pub fn overdue(&self, destination: &str) -> u64 {
        self.expired.of([destination]).get()
    }

    /// Registers them all.
    pub fn register(to: &mut Registry) -> Self {
        Self {
            taken: Counters::register(
                to,
                "receipts",
                ["source", "outcome"],
                "Receipts that a source brought: new, known before, ignored, or rejected",
            ),
            reused_ids: Counters::register(
                to,
                "receipt_ids_reused",
                ["source"],
                "Receipts that were taken although another receipt had their event_id before",
            ),
            poll_failures: Counters::register(
                to,
                "receipt_poll_failures",
                ["source"],
                "Polls of a source that failed and were repeated",
            ),
            requests: Counters::register(
                to,
                "receipt_requests",
                ["source", "status"],
                "Requests with receipts, by the status that they were answered with",
            ),
            applied: Counters::register(
                to,
                "receipts_applied",
                ["outcome"],
                "Receipts that left the inbox: matched with their message, parked, or rejected",
            ),
            conflicts: Counters::register(
                to,
                "receipt_conflicts",
                [],
                "Messages that receipts report as both failed and delivered",
            ),
            changed: Counters::register(
                to,
                "receipt_changes",
                [],
                "Messages whose state a receipt has changed",
            ),
            apply_duration: Timings::register(
                to,
                "receipt_apply_duration",
                [],
                "Time to apply a batch of receipts",
                call_buckets,
            ),
            rejoined: Counters::register(
                to,
                "receipts_rejoined",
                [],
                "Parked receipts whose message became known, found by the sweeper",
            ),
            orphaned: Counters::register(
                to,
                "receipts_orphaned",
                [],
                "Parked receipts that were given up because their message never came",
            ),
            expired: Counters::register(
                to,
                "messages_expired",
                ["destination"],
                "Messages that expired without a final receipt",
            ),
            waiting: Gauges::register(to, "receipts_waiting", [], "Receipts in the inbox"),
            parked: Gauges::register(to, "receipts_parked", [], "Receipts that wait for their message"),
            behind: Gauges::register_seconds(
                to,
                "receipt_source_behind",
                ["source"],
                "How far behind the clock a time-based source is read",
            ),
        }
    }

    /// A source's handles.
    pub fn source(&self, name: &str) -> SourceMetrics {
        let taken = |outcome| self.taken.of([name, outcome]);
        SourceMetrics {
            new: taken("new"),
            known: taken("known"),
            rejected: taken("rejected"),
            ignored: taken("ignored"),
            reused_ids: self.reused_ids.of([name]),
            poll_failures: self.poll_failures.of([name]),
            requests: self.requests.clone(),
            behind: self.behind.clone(),
            name: name.into(),
        }
    }

    /// The reconcilers' handles.
    pub fn reconciler(&self) -> ReconcilerMetrics {
        ReconcilerMetrics {
            matched: self.applied.of(["matched"]),
            parked: self.applied.of(["parked"]),
            rejected: self.applied.of(["rejected"]),
            conflicts: self.conflicts.of([]),
            changed: self.changed.of([]),
            duration: self.apply_duration.of([]),
        }
    }

    /// The sweeper's handles.
    pub fn sweeper(&self) -> SweeperMetrics {
        SweeperMetrics {
            rejoined: self.rejoined.of([]),
            orphaned: self.orphaned.of([]),
            expired: self.expired.clone(),
            waiting: self.waiting.clone(),
            parked: self.parked.clone(),
        }
    }
}

/// What one source counts.
#[derive(Clone, Debug)]
pub struct SourceMetrics {
    new: Counter,
    known: Counter,
    rejected: Counter,
    ignored: Counter,
    reused_ids: Counter,
    poll_failures: Counter,
    requests: Counters<2>,
    behind: Gauges<1>,
    name: Box<str>,
}

impl SourceMetrics {
    /// The inbox has taken receipts.
    pub fn taken(&self, taken: Taken) {
        self.new.inc_by(taken.new);
        self.known.inc_by(taken.known);
        self.rejected.inc_by(taken.rejected);
        self.ids_reused(taken.reused_ids);
    }

    /// Logged for the first, the tenth, the hundredth and so on: a mapping that takes a message's id for a receipt's makes
    /// every message one.
    fn ids_reused(&self, receipts: u64) {
        let before = self.reused_ids.inc_by(receipts);
        let total = before + receipts;
        if total.checked_ilog10() != before.checked_ilog10() {
            tracing::warn!(
                source = %self.name, receipts = total,
                "receipts have an event_id that other receipts had before, and were taken all the same; is it the id of a receipt?"
            );
        }
    }

    /// Receipts had a status that is of no interest.
    pub fn ignored(&self, receipts: u64) {
        self.ignored.inc_by(receipts);
    }

    /// How far behind the clock the source is read; `None` if it does not say, or is read no more.
    pub fn behind(&self, behind: Option<Duration>) {
        self.behind.set([&self.name], behind.map(|behind| behind.as_secs()));
    }

    /// A poll of the source has failed.
    pub fn poll_failed(&self) {
        self.poll_failures.inc();
    }

    /// A request was answered with `status`, one of the few that the listener gives.
    pub fn answered(&self, status: u16) {
        self.requests.of([&self.name, &status.to_string()]).inc();
    }

    #[cfg(test)]
    pub(crate) fn failures(&self) -> u64 {
        self.poll_failures.get()
    }

    #[cfg(test)]
    pub(crate) fn shown_ignored(&self) -> u64 {
        self.ignored.get()
    }

    #[cfg(test)]
    pub(crate) fn shown_behind(&self) -> Option<u64> {
        self.behind.get([&self.name])
    }
}

/// What reconcilers count.
#[derive(Clone, Debug)]
pub struct ReconcilerMetrics {
    matched: Counter,
    parked: Counter,
    rejected: Counter,
    conflicts: Counter,
    changed: Counter,
    duration: Histogram,
}

impl ReconcilerMetrics {
    /// A batch of receipts was applied.
    pub fn applied(&self, applied: Applied, took: Duration) {
        self.matched.inc_by(applied.matched);
        self.parked.inc_by(applied.parked);
        self.rejected.inc_by(applied.rejected);
        self.conflicts.inc_by(applied.conflicts);
        self.changed.inc_by(applied.changed);
        self.duration.observe(took.as_secs_f64());
    }
}

/// What the sweeper of receipts counts.
#[derive(Clone, Debug)]
pub struct SweeperMetrics {
    rejoined: Counter,
    orphaned: Counter,
    expired: Counters<1>,
    waiting: Gauges<0>,
    parked: Gauges<0>,
}

impl SweeperMetrics {
    /// Parked receipts went back into the inbox.
    pub fn rejoined(&self, receipts: usize) {
        self.rejoined.inc_by(receipts as u64);
    }

    /// Parked receipts were given up.
    pub fn orphaned(&self, receipts: usize) {
        self.orphaned.inc_by(receipts as u64);
    }

    /// Messages expired.
    pub fn expired(&self, destination: &str, messages: usize) {
        self.expired.of([destination]).inc_by(messages as u64);
    }

    /// How many receipts wait; `None` if unknown.
    pub fn waiting(&self, receipts: Option<u64>) {
        self.waiting.set([], receipts);
    }

    /// How many are parked; `None` if unknown.
    pub fn parked(&self, receipts: Option<u64>) {
        self.parked.set([], receipts);
    }

    #[cfg(test)]
    pub(crate) fn shown(&self) -> (Option<u64>, Option<u64>) {
        (self.waiting.get([]), self.parked.get([]))
    }
}
