//! Every metric of the process: one registry, rendered when somebody asks.
//!
//! The stages' families are in [`postrider_actors::metrics`]. Here are those of the process, of the stores'
//! ports and of remote services. The table in `docs/operations.md` is held against [`Metrics::render`].

use std::{
    borrow::Cow,
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use postrider_actors::{
    metrics::{Counters, Gauges, Labels, ReceiptMetrics, StageMetrics, Timings, call_buckets},
    model::{alarm::AlarmKind, call::CallOutcome, trouble::FeedTroubles},
    ports::{CallObserver, DestinationDepth, QueueDepth, StoreError},
};
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, histogram::Histogram, info::Info},
    registry::Registry,
};
use tokio::time::Instant;

use super::machine::{DiskFigures, ProcessFigures};

/// In which format metrics are exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `OpenMetrics` 1.0.
    OpenMetrics,
    /// The text format of Prometheus, 0.0.4: what `promtool` and older scrapers read.
    Text,
}

impl Format {
    /// What whoever sends such an `Accept` header reads. Prometheus names `OpenMetrics` first where it reads it.
    pub fn for_accept(accept: Option<&str>) -> Self {
        match accept {
            Some(accept) if accept.contains("application/openmetrics-text") => Self::OpenMetrics,
            _ => Self::Text,
        }
    }

    /// Its media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The same in the older format: there a counter's family is called as its samples are, and neither units nor infos are known.
fn as_text(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut help = None;
    for line in openmetrics.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            help = described.split_once(' ');
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|typed| typed.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                kind => ("", kind),
            };
            if let Some((_, help)) = help.take() {
                text.extend(["# HELP ", name, suffix, " ", help, "\n"]);
            }
            text.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            text.extend([line, "\n"]);
        }
    }
    text
}

/// All metrics. One per process: it survives reloads, so counters never go back.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// What the stages count.
    pub stages: StageMetrics,
    /// What the stages of receipts count.
    pub receipts: ReceiptMetrics,
    /// Calls of remote services, for the adapters that make them.
    pub api: ApiCalls,
    /// What DynamoDB charged.
    pub capacity: ConsumedCapacity,
    /// How much there is to do.
    pub backlog: BacklogMetrics,
    parked: Gauges<1>,
    held: Gauges<1>,
    store_calls: Counters<3>,
    store_call_duration: Timings<2>,
    alarms: Gauges<2>,
    events: Counters<2>,
    disk: Arc<DiskFigures>,
    ports: Mutex<BTreeMap<&'static str, Arc<PortHealth>>>,
}

/// Whether a port does what is asked of it.
#[derive(Debug, Default)]
struct PortHealth {
    /// Looked at by every call; the rest only by those that change it.
    is_failing: AtomicBool,
    /// Since when it does nothing right, and what it said last.
    failing: Mutex<Option<(Instant, String)>>,
}

impl PortHealth {
    fn note<T>(&self, result: &Result<T, StoreError>) {
        let error = match result {
            Err(error @ (StoreError::Retryable(_) | StoreError::Denied(_) | StoreError::Unknown(_))) => {
                Some(error)
            }
            Ok(_) | Err(StoreError::Permanent(_)) => None,
        };
        if error.is_none() && !self.is_failing.load(Relaxed) {
            return;
        }
        // Replaced as a whole.
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_failing.store(error.is_some(), Relaxed);
        *failing = error.map(|error| {
            let since = failing.as_ref().map_or_else(Instant::now, |(since, _)| *since);
            (since, error.to_string())
        });
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(ProcessFigures));
        let to = registry.sub_registry_with_prefix("postrider");
        let disk = Arc::new(DiskFigures::default());
        to.register_collector(Box::new(disk.clone()));
        to.register("build", "What runs", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        Self {
            stages: StageMetrics::register(to),
            receipts: ReceiptMetrics::register(to),
            api: ApiCalls::register(to),
            capacity: ConsumedCapacity::register(to),
            backlog: BacklogMetrics::register(to),
            parked: Gauges::register(to, "feed_parked", ["feed"], "1 while the feed takes no files"),
            held: Gauges::register(
                to,
                "files_held",
                ["feed"],
                "Files that can't be taken, read, moved away or reported",
            ),
            store_calls: Counters::register(
                to,
                "store_calls",
                ["port", "operation", "outcome"],
                "Operations on outbox, queue and ledger",
            ),
            store_call_duration: Timings::register(
                to,
                "store_call_duration",
                ["port", "operation"],
                "Duration of operations on outbox, queue and ledger",
                call_buckets,
            ),
            alarms: Gauges::register(to, "alarm", ["alarm", "subject"], "1 while the alarm is raised"),
            events: Counters::register(
                to,
                "events",
                ["way", "outcome"],
                "Events about alarms and settled files, for whoever is on call",
            ),
            disk,
            ports: Mutex::default(),
            registry,
        }
    }
}

impl Metrics {
    /// Everything.
    pub fn render(&self, format: Format) -> String {
        let mut text = String::with_capacity(32 << 10);
        encode(&mut text, &self.registry).expect("writing to a String can't fail");
        match format {
            Format::OpenMetrics => text,
            Format::Text => as_text(&text),
        }
    }

    /// Exports how full the disk of the state directory is, and what the store takes of it.
    pub fn watch_disk(&self, state_dir: &Path) {
        self.disk.watch(state_dir.to_owned());
    }

    /// What is wrong with a feed; `None`: there is no such feed any more.
    pub fn troubles(&self, feed: &str, troubles: Option<&FeedTroubles>) {
        self.parked.set([feed], troubles.map(|troubles| troubles.parked.is_some().into()));
        self.held.set([feed], troubles.map(|troubles| troubles.held.len() as u64));
    }

    /// Says whether an alarm is raised for a subject; `None`: it is not exported.
    pub fn alarm(&self, alarm: AlarmKind, subject: &str, active: Option<bool>) {
        self.alarms.set([alarm.as_str(), subject], active.map(u64::from));
    }

    /// Counts the events that leave in one way.
    pub fn events(&self, way: &str) -> EventCounts {
        let [sent, failed, dropped] =
            ["sent", "failed", "dropped"].map(|outcome| self.events.of([way, outcome]));
        EventCounts { sent, failed, dropped }
    }

    /// The handles of one operation of a port.
    pub(super) fn store_call(&self, port: &'static str, operation: &str) -> StoreCall {
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let health = ports.entry(port).or_default().clone();
        let outcome = |word| self.store_calls.of([port, operation, word]);
        StoreCall {
            ok: outcome("ok"),
            retryable: outcome("retryable"),
            denied: outcome("denied"),
            permanent: outcome("permanent"),
            unknown: outcome("unknown"),
            duration: self.store_call_duration.of([port, operation]),
            health,
        }
    }

    /// The ports that do nothing right, for how long, and what they said last.
    pub fn failing_ports(&self) -> Vec<(&'static str, Duration, String)> {
        let ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let failing = ports.iter().filter_map(|(port, health)| {
            let failing = health.failing.lock().unwrap_or_else(PoisonError::into_inner);
            failing.as_ref().map(|(since, why)| (*port, since.elapsed(), why.clone()))
        });
        failing.collect()
    }
}

/// What became of events that leave in one way.
#[derive(Clone, Debug)]
pub struct EventCounts {
    /// Taken.
    pub sent: Counter,
    /// Given up after all tries.
    pub failed: Counter,
    /// Not even tried: too many were waiting.
    pub dropped: Counter,
}

/// One operation of a port.
#[derive(Clone, Debug)]
pub(super) struct StoreCall {
    ok: Counter,
    retryable: Counter,
    denied: Counter,
    permanent: Counter,
    unknown: Counter,
    duration: Histogram,
    health: Arc<PortHealth>,
}

impl StoreCall {
    /// Counts a call, and how long it takes.
    pub(super) async fn count<T>(
        &self,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let begun = Instant::now();
        let result = call.await;
        self.duration.observe(begun.elapsed().as_secs_f64());
        self.health.note(&result);
        match &result {
            Ok(_) => &self.ok,
            Err(StoreError::Retryable(_)) => &self.retryable,
            Err(StoreError::Denied(_)) => &self.denied,
            Err(StoreError::Permanent(_)) => &self.permanent,
            Err(StoreError::Unknown(_)) => &self.unknown,
        }
        .inc();
        result
    }
}

/// Calls of remote services, each request to the wire counted, the SDK's own repetitions as far as it says.
///
/// ```
/// # use std::time::Duration;
/// # use postrider::telemetry::metrics::Metrics;
/// # use postrider_actors::model::call::CallOutcome;
/// let api = Metrics::default().api.clone();
/// api.record("sqs", "SendMessageBatch", CallOutcome::Partial, Duration::from_millis(12), 10);
/// ```
#[derive(Clone, Debug)]
pub struct ApiCalls {
    calls: Counters<3>,
    duration: Timings<2>,
    items: Counters<2>,
}

impl ApiCalls {
    fn register(to: &mut Registry) -> Self {
        Self {
            calls: Counters::register(
                to,
                "api_calls",
                ["service", "operation", "outcome"],
                "Calls to remote services",
            ),
            duration: Timings::register(
                to,
                "api_call_duration",
                ["service", "operation"],
                "Duration of calls to remote services",
                call_buckets,
            ),
            items: Counters::register(
                to,
                "api_items",
                ["service", "operation"],
                "Items carried by calls to remote services",
            ),
        }
    }

    /// One call has ended. Cheap beside a call: three look-ups.
    ///
    /// `service` and `operation` are words of the code (`"sqs"`, `"SendMessageBatch"`); `items` is how many
    /// entries, keys or messages it carried or brought.
    pub fn record(
        &self,
        service: &'static str,
        operation: &'static str,
        outcome: CallOutcome,
        took: Duration,
        items: u64,
    ) {
        self.calls.of([service, operation, outcome.as_str()]).inc();
        self.duration.of([service, operation]).observe(took.as_secs_f64());
        self.items.of([service, operation]).inc_by(items);
    }
}

impl CallObserver for Metrics {
    fn call(
        &self,
        service: &'static str,
        operation: &'static str,
        outcome: CallOutcome,
        latency: Duration,
        items: usize,
    ) {
        self.api.record(service, operation, outcome, latency, items as u64);
    }

    fn capacity(&self, table: &str, index: Option<&str>, units: f64) {
        self.capacity.add(table, index, units);
    }
}

/// The capacity units that DynamoDB reported for calls.
#[derive(Clone, Debug)]
pub struct ConsumedCapacity(Family<Labels<2>, Counter<f64, AtomicU64>>);

impl ConsumedCapacity {
    fn register(to: &mut Registry) -> Self {
        let family = Family::default();
        to.register("consumed_capacity_units", "Capacity units that DynamoDB reported", family.clone());
        Self(family)
    }

    /// Adds what a call consumed. `index` is `None` for the table itself. Units may be halves; what is no
    /// finite amount above 0 is left out.
    pub fn add(&self, table: &str, index: Option<&str>, units: f64) {
        if !(units.is_finite() && units > 0.0) {
            return;
        }
        let own = |text: &str| Cow::Owned(text.to_owned());
        let labels = [("table", own(table)), ("index", own(index.unwrap_or("")))];
        self.0.get_or_create(&labels).inc_by(units);
    }
}

/// How much there is to do. What could not be read is absent, never 0.
#[derive(Clone, Debug)]
pub struct BacklogMetrics {
    open: Gauges<1>,
    outstanding: Gauges<0>,
    quarantined: Gauges<0>,
    oldest: Gauges<0>,
    queue: Gauges<1>,
    messages: Gauges<2>,
    entries: Gauges<2>,
}

impl BacklogMetrics {
    fn register(to: &mut Registry) -> Self {
        Self {
            open: Gauges::register(
                to,
                "messages_open",
                ["destination"],
                "Messages of a destination without a final state",
            ),
            outstanding: Gauges::register(
                to,
                "outbox_batches",
                [],
                "Batches that are not due yet (embedded profile)",
            ),
            quarantined: Gauges::register(
                to,
                "batches_quarantined",
                [],
                "Batches that can't be read and are set aside (embedded profile)",
            ),
            oldest: Gauges::register_seconds(to, "oldest_due", [], "Age of the oldest overdue batch"),
            queue: Gauges::register(
                to,
                "queue_batches",
                ["state"],
                "Batches that are due, or that a worker has (embedded profile)",
            ),
            messages: Gauges::register(
                to,
                "destination_messages",
                ["destination", "state"],
                "Open messages of a destination by state of their batch (aws profile)",
            ),
            entries: Gauges::register(
                to,
                "queue_depth",
                ["destination", "state"],
                "Entries of a destination's queue, as read last (aws profile)",
            ),
        }
    }

    /// Messages of a destination without a final state.
    pub fn open(&self, destination: &str, messages: Option<u64>) {
        self.open.set([destination], messages);
    }

    /// Batches that are not due yet.
    pub fn outstanding(&self, batches: Option<u64>) {
        self.outstanding.set([], batches);
    }

    /// Batches that are set aside.
    pub fn quarantined(&self, batches: Option<u64>) {
        self.quarantined.set([], batches);
    }

    /// How long the batch that is due for longest has been so; zero if none is.
    pub fn oldest(&self, age: Option<Duration>) {
        self.oldest.set([], age.map(|age| age.as_secs()));
    }

    /// Batches that are due, and those that a worker has.
    pub fn queue(&self, batches: Option<(u64, u64)>) {
        self.queue.set(["visible"], batches.map(|(due, _)| due));
        self.queue.set(["in_flight"], batches.map(|(_, leased)| leased));
    }

    /// Where the open messages of a destination stand (B21).
    pub fn messages(&self, destination: &str, depth: Option<&DestinationDepth>) {
        self.messages.set([destination, "due"], depth.map(|depth| depth.due));
        self.messages.set([destination, "waiting"], depth.map(|depth| depth.waiting));
        self.messages.set([destination, "leased"], depth.map(|depth| depth.leased));
    }

    /// What is in each destination's queue.
    pub fn entries(&self, depths: &[(Arc<str>, QueueDepth)]) {
        for (name, depth) in depths {
            self.entries.set([name, "visible"], Some(depth.visible));
            self.entries.set([name, "in_flight"], Some(depth.in_flight));
            self.entries.set([name, "delayed"], Some(depth.delayed));
        }
    }
}

#[cfg(test)]
mod tests;
