//! What the stages count. Handles are resolved once, when a stage is set up, and are plain atomics from
//! then on; they are touched per batch, with one exception that is measured: the duration of an attempt.
//!
//! Label values are names from the configuration and words of this code, so their number is bounded;
//! nothing of a message, a file or an answer is ever one (I10). The table in `docs/operations.md` says what
//! each metric means; a test in the binary compares it with what is registered.

mod families;
mod receipts;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

pub use families::{Counters, Gauges, Labels, Share, Timings, age_buckets, call_buckets, labels};
pub use receipts::{ReceiptMetrics, ReconcilerMetrics, SourceMetrics, SweeperMetrics};

use crate::{
    model::{
        file::FileState,
        ledger::{CountChange, MessageVerdict},
        limits::GateRate,
        outcome::{DeathCause, Obstacle, Reason, Shortage, Verdict},
        time::UnixMs,
        traffic::TrafficView,
    },
    ports::{ItemOutcome, Settled},
};

/// The outcomes of an attempt: values of the label `outcome`.
const OUTCOMES: [&str; 17] = [
    "sent",
    "gone",
    "status_3xx",
    "status_429",
    "status_4xx",
    "status_5xx",
    "status_other",
    "timeout",
    "connect",
    "dns",
    "tls",
    "reset",
    "protocol",
    "render",
    "panic",
    "refused",
    "unavailable",
];
const GONE: usize = 1;

const CAUSES: [DeathCause; 4] =
    [DeathCause::Permanent, DeathCause::Attempts, DeathCause::Age, DeathCause::Poison];

/// Index into [`OUTCOMES`]; `None` if nothing was attempted.
fn outcome_of(verdict: &Verdict) -> Option<usize> {
    let attempt = match verdict {
        Verdict::Sent { .. } => return Some(0),
        Verdict::Retry { attempt, .. } | Verdict::Dead { attempt, .. } => attempt,
    };
    let word = match (attempt.reason, attempt.status) {
        (Reason::Poison, _) => return None,
        (Reason::Status, 300..=399) => "status_3xx",
        (Reason::Status, 429) => "status_429",
        (Reason::Status, 400..=499) => "status_4xx",
        (Reason::Status, 500..=599) => "status_5xx",
        (Reason::Status, _) => "status_other",
        (reason, _) => reason.as_str(),
    };
    OUTCOMES.iter().position(|outcome| *outcome == word)
}

/// The families of all stages.
#[derive(Clone, Debug)]
pub struct StageMetrics {
    files: Counters<2>,
    unbalanced: Counters<1>,
    rows: Counters<2>,
    file_start: Timings<1>,
    last_file: Gauges<1>,
    queue_entries: Counters<1>,
    leases_lost: Counters<0>,
    attempts: Counters<2>,
    not_begun: Counters<2>,
    attempt_duration: Timings<1>,
    sent: Counters<1>,
    retries: Counters<1>,
    dead: Counters<2>,
    unsent: Counters<1>,
    cancelled: Counters<1>,
    batches: Counters<2>,
    batch_wait: Timings<1>,
    settle_age: Timings<1>,
    in_flight: Gauges<1>,
    permits: Gauges<1>,
    breaker_open: Gauges<1>,
    suspect: Gauges<1>,
    retry_tokens: Gauges<1>,
    leases: Gauges<1>,
    rate_granted: Counters<1>,
    rate_limit: Gauges<1>,
    restarts: Counters<2>,
    spans: Counters<1>,
    /// By actor and what it is part of: what is counted can't be listed.
    restarted: Arc<Mutex<BTreeMap<String, u64>>>,
}

impl Default for StageMetrics {
    /// Metrics that are not exported, for tests.
    fn default() -> Self {
        Self::register(&mut Registry::default())
    }
}

impl StageMetrics {
    /// Registers them all.
    pub fn register(to: &mut Registry) -> Self {
        Self {
            files: Counters::register(to, "files", ["feed", "state"], "Files closed"),
            unbalanced: Counters::register(
                to,
                "files_unbalanced",
                ["feed"],
                "Files settled whose rows and states do not add up",
            ),
            rows: Counters::register(to, "rows", ["feed", "outcome"], "Rows read and stored"),
            file_start: Timings::register(
                to,
                "file_start",
                ["feed"],
                "From a file's claim to its first rows in the outbox",
                age_buckets,
            ),
            last_file: Gauges::register_seconds(
                to,
                "feed_last_file_timestamp",
                ["feed"],
                "When the feed's last file was read to its end, since 1970",
            ),
            queue_entries: Counters::register(
                to,
                "queue_entries",
                ["outcome"],
                "Batches offered to the queue",
            ),
            leases_lost: Counters::register(
                to,
                "leases_lost",
                [],
                "Leases that expired because they were not extended in time",
            ),
            attempts: Counters::register(
                to,
                "attempts",
                ["destination", "outcome"],
                "Attempts whose outcome is recorded",
            ),
            not_begun: Counters::register(
                to,
                "attempts_not_begun",
                ["destination", "reason"],
                "Times that an attempt could not begin on this machine",
            ),
            attempt_duration: Timings::register(
                to,
                "attempt_duration",
                ["destination"],
                "From the start of an attempt to its outcome",
                call_buckets,
            ),
            sent: Counters::register(to, "messages_sent", ["destination"], "Messages recorded as sent"),
            retries: Counters::register(to, "retries", ["destination"], "Messages to be retried"),
            dead: Counters::register(to, "messages_dead", ["destination", "cause"], "Messages given up"),
            unsent: Counters::register(
                to,
                "messages_unsent",
                ["destination"],
                "Messages whose time was over before they were sent",
            ),
            cancelled: Counters::register(
                to,
                "messages_cancelled",
                ["destination"],
                "Messages of cancelled files",
            ),
            batches: Counters::register(
                to,
                "batches_settled",
                ["destination", "outcome"],
                "Batches whose last message is settled",
            ),
            batch_wait: Timings::register(
                to,
                "batch_wait",
                ["destination"],
                "From the acceptance of a batch to its first lease",
                age_buckets,
            ),
            settle_age: Timings::register(
                to,
                "settle_age",
                ["destination"],
                "From the acceptance of messages to their outcome, once per recorded group of a batch",
                age_buckets,
            ),
            in_flight: Gauges::register(to, "requests_in_flight", ["destination"], "Requests in flight"),
            permits: Gauges::register(to, "permits", ["destination"], "Requests that may be in flight"),
            breaker_open: Gauges::register(
                to,
                "breaker_open",
                ["destination"],
                "1 while a destination gets nothing but single messages that probe",
            ),
            suspect: Gauges::register(
                to,
                "destination_suspect",
                ["destination"],
                "1 while a destination is disabled because it seems to be used wrongly",
            ),
            retry_tokens: Gauges::register(
                to,
                "retry_tokens",
                ["destination"],
                "Tokens for retries; below 5, retries are deferred",
            ),
            leases: Gauges::register(to, "leases_held", ["destination"], "Batches that workers hold"),
            rate_granted: Counters::register(
                to,
                "rate_granted",
                ["gate"],
                "Messages that a rate let through",
            ),
            rate_limit: Gauges::register(
                to,
                "rate_limit",
                ["gate"],
                "Messages per second that a rate allows",
            ),
            restarts: Counters::register(
                to,
                "restarts",
                ["actor", "of"],
                "Actors that failed and are restarted",
            ),
            spans: Counters::register(
                to,
                "spans",
                ["outcome"],
                "Spans of batches, by whether the collector took them",
            ),
            restarted: Arc::default(),
        }
    }

    /// The handles of who exports spans.
    pub fn spans(&self) -> SpanMetrics {
        SpanMetrics { exported: self.spans.of(["exported"]), dropped: self.spans.of(["dropped"]) }
    }

    /// A feed's handles.
    pub fn feed(&self, name: &str) -> FeedMetrics {
        let rows = |outcome| self.rows.of([name, outcome]);
        let files = |state| self.files.of([name, state]);
        FeedMetrics {
            accepted: rows("accepted"),
            rejected: rows("rejected"),
            duplicates: rows("duplicate"),
            ingested: files("ingested"),
            failed: files("failed"),
            source_lost: files("source-lost"),
            unbalanced: self.unbalanced.of([name]),
            start: self.file_start.of([name]),
            last: FeedLast { feed: name.into(), gauges: self.last_file.clone() },
        }
    }

    /// The coordinator's handles.
    pub fn queue(&self) -> QueueMetrics {
        let entries = |outcome| self.queue_entries.of([outcome]);
        QueueMetrics {
            ok: entries("ok"),
            retryable: entries("retryable"),
            permanent: entries("permanent"),
            unknown: entries("unknown"),
        }
    }

    /// Counts leases that were taken back.
    pub fn leases_lost(&self) -> Counter {
        self.leases_lost.of([])
    }

    /// Messages of a destination ended without being sent.
    pub fn ended(&self, destination: &str, counts: CountChange) {
        for (family, count) in [(&self.unsent, counts.unsent), (&self.cancelled, counts.cancelled)] {
            if let Ok(count @ 1..) = u64::try_from(count) {
                family.of([destination]).inc_by(count);
            }
        }
    }

    /// A destination's handles.
    pub fn destination(&self, name: &str) -> DestinationMetrics {
        DestinationMetrics(Arc::new(DestinationHandles {
            attempts: OUTCOMES.map(|outcome| self.attempts.of([name, outcome])),
            not_begun: Obstacle::WORDS.map(|reason| self.not_begun.of([name, reason])),
            attempt_duration: self.attempt_duration.of([name]),
            sent: self.sent.of([name]),
            retries: self.retries.of([name]),
            dead: CAUSES.map(|cause| self.dead.of([name, cause.as_str()])),
            clean: self.batches.of([name, "clean"]),
            with_failures: self.batches.of([name, "with_failures"]),
            wait: self.batch_wait.of([name]),
            age: self.settle_age.of([name]),
            in_flight: self.in_flight.of([name]),
            permits: self.permits.of([name]),
            breaker_open: self.breaker_open.of([name]),
            suspect: self.suspect.of([name]),
            retry_tokens: self.retry_tokens.of([name]),
            leases: self.leases.of([name]),
        }))
    }

    /// A rate's handles. `gate` is a destination's name, or `all`.
    pub fn gate(&self, gate: &str) -> RateMetrics {
        RateMetrics { gate: gate.into(), limit: self.rate_limit.clone(), granted: self.rate_granted.clone() }
    }

    /// Counts restarts of one kind of actor. `of` is its second name, e.g. the feed's.
    pub fn restarts(&self, actor: &str, of: Option<&str>) -> Counter {
        self.restarts.of([actor, of.unwrap_or("")])
    }

    /// An actor failed and is restarted.
    pub fn restart(&self, actor: &str, of: Option<&str>) {
        self.restarts(actor, of).inc();
        let name = of.map_or_else(|| actor.to_owned(), |of| format!("{actor} of {of}"));
        *self.restarted.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += 1;
    }

    /// How often each actor was restarted that ever was, by name.
    pub fn restarted(&self) -> BTreeMap<String, u64> {
        self.restarted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What a rate counts. Without one nothing of it is exported.
#[derive(Clone, Debug)]
pub struct RateMetrics {
    gate: Arc<str>,
    limit: Gauges<1>,
    granted: Counters<1>,
}

impl RateMetrics {
    /// What holds from now on.
    pub fn limit(&self, rate: GateRate) {
        let per_s = match rate {
            GateRate::Open => None,
            GateRate::PerS(rate) => Some(rate.get().into()),
        };
        self.limit.set([&self.gate], per_s);
    }

    /// Counts what it lets through.
    pub fn granted(&self) -> Counter {
        self.granted.of([&self.gate])
    }
}

/// Rows that one append brings to the outbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredRows {
    /// They became messages.
    pub accepted: u64,
    /// They can't be used.
    pub rejected: u64,
    /// They were left out.
    pub duplicates: u64,
}

/// What a batcher counts.
#[derive(Clone, Debug)]
pub struct FeedMetrics {
    accepted: Counter,
    rejected: Counter,
    duplicates: Counter,
    ingested: Counter,
    failed: Counter,
    source_lost: Counter,
    unbalanced: Counter,
    start: Histogram,
    last: FeedLast,
}

/// When a feed's last file was closed; not exported before there is one.
#[derive(Clone, Debug)]
struct FeedLast {
    feed: Arc<str>,
    gauges: Gauges<1>,
}

impl FeedMetrics {
    /// Rows were appended to the outbox.
    pub fn appended(&self, rows: StoredRows) {
        self.accepted.inc_by(rows.accepted);
        self.rejected.inc_by(rows.rejected);
        self.duplicates.inc_by(rows.duplicates);
    }

    /// A file's first rows were appended to the outbox, `after` its claim.
    pub fn started(&self, after: Duration) {
        self.start.observe(after.as_secs_f64());
    }

    /// Files that could not be used, or not to their end.
    pub fn unusable_files(&self) -> u64 {
        self.failed.get() + self.source_lost.get()
    }

    /// A file was closed at a time, by this process or by one before.
    pub fn last_closed(&self, at: UnixMs) {
        let FeedLast { feed, gauges } = &self.last;
        let gauge = gauges.of([feed]);
        gauge.set(gauge.get().max(i64::try_from(at.0 / 1_000).unwrap_or(i64::MAX)));
    }

    /// A file was settled whose rows and states do not add up.
    pub fn off_balance(&self) {
        self.unbalanced.inc();
    }

    /// How many were.
    pub fn unbalanced_files(&self) -> u64 {
        self.unbalanced.get()
    }

    /// A file was closed.
    pub fn closed(&self, state: &FileState, at: UnixMs) {
        let counter = match state {
            FileState::Ingesting => return,
            FileState::Ingested => &self.ingested,
            FileState::Failed(_) => &self.failed,
            FileState::SourceLost(_) => &self.source_lost,
        };
        counter.inc();
        self.last_closed(at);
    }
}

/// What a coordinator counts.
#[derive(Clone, Debug)]
pub struct QueueMetrics {
    ok: Counter,
    retryable: Counter,
    permanent: Counter,
    unknown: Counter,
}

impl QueueMetrics {
    /// The queue has answered.
    pub fn offered<I>(&self, outcomes: &[(I, ItemOutcome)]) {
        for (_, outcome) in outcomes {
            match outcome {
                ItemOutcome::Ok => &self.ok,
                ItemOutcome::Retryable(_) => &self.retryable,
                ItemOutcome::Permanent(_) => &self.permanent,
                ItemOutcome::Unknown(_) => &self.unknown,
            }
            .inc();
        }
    }

    /// All entries so far, and those that the queue did not accept.
    pub fn totals(&self) -> Totals {
        let failed = self.retryable.get() + self.permanent.get() + self.unknown.get();
        Totals { all: self.ok.get() + failed, failed }
    }
}

/// Cumulative counts for a failure rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Everything that was tried.
    pub all: u64,
    /// What of it failed.
    pub failed: u64,
}

impl std::ops::Add for Totals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { all: self.all + other.all, failed: self.failed + other.failed }
    }
}

/// What delivery workers count for one destination.
#[derive(Clone, Debug)]
pub struct DestinationMetrics(Arc<DestinationHandles>);

#[derive(Debug)]
struct DestinationHandles {
    attempts: [Counter; OUTCOMES.len()],
    /// By [`Obstacle`].
    not_begun: [Counter; Obstacle::WORDS.len()],
    attempt_duration: Histogram,
    sent: Counter,
    retries: Counter,
    dead: [Counter; CAUSES.len()],
    clean: Counter,
    with_failures: Counter,
    wait: Histogram,
    age: Histogram,
    in_flight: Gauge,
    permits: Gauge,
    breaker_open: Gauge,
    suspect: Gauge,
    retry_tokens: Gauge,
    leases: Gauge,
}

/// What becomes of spans.
#[derive(Clone, Debug)]
pub struct SpanMetrics {
    /// The collector took them.
    pub exported: Counter,
    /// There was no room for them, or the collector did not take them.
    pub dropped: Counter,
}

/// The verdicts of one settlement, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many verdicts.
    pub count: usize,
    sent: u64,
    retried: u64,
    dead: [u64; CAUSES.len()],
    attempts: [u64; OUTCOMES.len()],
}

impl Tally {
    /// Counts them.
    pub fn of(verdicts: &[MessageVerdict]) -> Self {
        let mut tally = Self { count: verdicts.len(), ..Self::default() };
        for MessageVerdict { verdict, .. } in verdicts {
            if let Some(outcome) = outcome_of(verdict) {
                tally.attempts[outcome] += 1;
            }
            match *verdict {
                Verdict::Sent { .. } => tally.sent += 1,
                Verdict::Retry { .. } => tally.retried += 1,
                Verdict::Dead { cause, .. } => {
                    let at = CAUSES.iter().position(|&known| known == cause).expect("every cause is listed");
                    tally.dead[at] += 1;
                }
            }
        }
        tally
    }

    /// Whether every message was sent.
    pub fn is_clean(&self) -> bool {
        self.sent == self.count as u64
    }
}

impl DestinationMetrics {
    /// An attempt has ended. The one thing that is done per message.
    pub fn attempted(&self, took: Duration) {
        self.0.attempt_duration.observe(took.as_secs_f64());
    }

    /// An attempt was answered 410; nothing of it is recorded.
    pub fn gone(&self) {
        self.0.attempts[GONE].inc();
    }

    /// An attempt could not begin.
    pub fn not_begun(&self, obstacle: Obstacle) {
        self.0.not_begun[obstacle.index()].inc();
    }

    /// How often attempts could not begin so far because this machine lacked something.
    pub fn shortages(&self) -> u64 {
        Shortage::ALL
            .map(|shortage| self.0.not_begun[Obstacle::Shortage(shortage).index()].get())
            .iter()
            .sum()
    }

    /// A batch was leased for the first time, so long after it was accepted.
    pub fn leased(&self, after: Duration) {
        self.0.wait.observe(after.as_secs_f64());
    }

    /// The ledger took a settlement, `age` after its messages were accepted. `clean` says whether all of its
    /// batch's messages were sent so far.
    pub fn settled(&self, tally: &Tally, settled: Settled, age: Duration, clean: bool) {
        let handles = &self.0;
        for (counter, attempts) in handles.attempts.iter().zip(tally.attempts) {
            if attempts > 0 {
                counter.inc_by(attempts);
            }
        }
        handles.sent.inc_by(tally.sent);
        if settled == Settled::Stale {
            return; // failures are left to the current holder
        }
        handles.retries.inc_by(tally.retried);
        for (counter, dead) in handles.dead.iter().zip(tally.dead) {
            if dead > 0 {
                counter.inc_by(dead);
            }
        }
        handles.age.observe(age.as_secs_f64());
        if settled == Settled::Complete {
            if clean { &handles.clean } else { &handles.with_failures }.inc();
        }
    }

    /// Attempts so far, and those that failed.
    pub fn totals(&self) -> Totals {
        let all: u64 = self.0.attempts.iter().map(Counter::get).sum();
        Totals { all, failed: all - self.0.attempts[0].get().min(all) }
    }

    /// Attempts so far after which a message waits for another one.
    pub fn retries(&self) -> u64 {
        self.0.retries.get()
    }

    /// Messages given up so far.
    pub fn dead(&self) -> u64 {
        self.0.dead.iter().map(Counter::get).sum()
    }

    /// Messages that got their final state so far: sent, or given up.
    pub fn ended(&self) -> u64 {
        self.0.sent.get() + self.dead()
    }

    /// How a webhook's traffic stands.
    pub fn traffic(&self, view: &TrafficView) {
        self.0.permits.set(i64::try_from(view.limit).unwrap_or(i64::MAX));
        self.0.breaker_open.set(view.open_since.is_some().into());
        self.0.suspect.set(view.suspicion.is_some().into());
        self.0.retry_tokens.set(i64::try_from(view.retry_tokens).unwrap_or(i64::MAX));
    }

    /// One worker's part of the gauges: its permits if they are its own, and what it holds.
    pub fn worker(&self, permits: usize) -> WorkerGauges {
        let mut share = Share::of(self.0.permits.clone());
        share.set(permits);
        WorkerGauges {
            permits: share,
            in_flight: Share::of(self.0.in_flight.clone()),
            leases: Share::of(self.0.leases.clone()),
        }
    }
}

/// One worker's part of a destination's gauges, taken back when it is dropped.
#[derive(Debug)]
pub struct WorkerGauges {
    permits: Share,
    in_flight: Share,
    leases: Share,
}

impl WorkerGauges {
    /// The worker begins nothing more: who follows it has its permits.
    pub fn close(&mut self) {
        self.permits.set(0);
    }

    /// What the worker holds now.
    pub fn set(&mut self, in_flight: usize, leases: usize) {
        self.in_flight.set(in_flight);
        self.leases.set(leases);
    }
}

#[cfg(test)]
mod tests;
