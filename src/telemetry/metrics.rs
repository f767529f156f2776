//! Every metric of the process: one registry, rendered when somebody asks.
//!
//! The stages' families are in [`postrider_actors::metrics`]. Here are those of the process, of the stores'
//! ports and of remote services. The table in `docs/operations.md` is held against [`Metrics::render`].

use std::{borrow::Cow, sync::atomic::AtomicU64, time::Duration};

use postrider_actors::{
    metrics::{Counters, Gauges, Labels, StageMetrics, Timings, call_buckets},
    model::alarm::AlarmKind,
    ports::StoreError,
};
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, histogram::Histogram, info::Info},
    registry::Registry,
};

/// The media type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics. One per process: it survives reloads, so counters never go back.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// What the stages count.
    pub stages: StageMetrics,
    /// Calls of remote services, for the adapters that make them.
    pub api: ApiCalls,
    /// What DynamoDB charged.
    pub capacity: ConsumedCapacity,
    /// How much there is to do.
    pub backlog: BacklogMetrics,
    store_calls: Counters<3>,
    store_call_duration: Timings<2>,
    alarms: Gauges<1>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("postrider");
        let to = &mut registry;
        to.register("build", "What runs", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        Self {
            stages: StageMetrics::register(to),
            api: ApiCalls::register(to),
            capacity: ConsumedCapacity::register(to),
            backlog: BacklogMetrics::register(to),
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
            alarms: Gauges::register(to, "alarm_active", ["alarm"], "1 while the alarm is raised"),
            registry,
        }
    }
}

impl Metrics {
    /// The `OpenMetrics` text of everything.
    pub fn render(&self) -> String {
        let mut text = String::with_capacity(32 << 10);
        encode(&mut text, &self.registry).expect("writing to a String can't fail");
        text
    }

    /// Says whether an alarm is raised; `None`: it is not watched, and not exported.
    pub fn alarm(&self, alarm: AlarmKind, active: Option<bool>) {
        self.alarms.set([alarm.as_str()], active.map(u64::from));
    }

    /// The handles of one operation of a port.
    pub(super) fn store_call(&self, port: &str, operation: &str) -> StoreCall {
        let outcome = |word| self.store_calls.of([port, operation, word]);
        StoreCall {
            ok: outcome("ok"),
            retryable: outcome("retryable"),
            permanent: outcome("permanent"),
            unknown: outcome("unknown"),
            duration: self.store_call_duration.of([port, operation]),
        }
    }
}

/// One operation of a port.
#[derive(Clone, Debug)]
pub(super) struct StoreCall {
    ok: Counter,
    retryable: Counter,
    permanent: Counter,
    unknown: Counter,
    duration: Histogram,
}

impl StoreCall {
    /// Counts a call, and how long it takes.
    pub(super) async fn count<T>(
        &self,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let begun = tokio::time::Instant::now();
        let result = call.await;
        self.duration.observe(begun.elapsed().as_secs_f64());
        match &result {
            Ok(_) => &self.ok,
            Err(StoreError::Retryable(_)) => &self.retryable,
            Err(StoreError::Permanent(_)) => &self.permanent,
            Err(StoreError::Unknown(_)) => &self.unknown,
        }
        .inc();
        result
    }
}

/// What a call of a remote service came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallOutcome {
    /// Every item was taken.
    Ok,
    /// Some items were not: failed entries, unprocessed items.
    Partial,
    /// The service asks for fewer calls.
    Throttled,
    /// The service refused, or answered with an error of its own.
    Error,
    /// No answer: it may or may not have happened.
    Unknown,
}

impl CallOutcome {
    /// As the label `outcome` says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Partial => "partial",
            Self::Throttled => "throttled",
            Self::Error => "error",
            Self::Unknown => "unknown",
        }
    }
}

/// Calls of remote services, each request to the wire counted, the SDK's own repetitions as far as it says.
///
/// ```
/// # use std::time::Duration;
/// # use postrider::telemetry::metrics::{CallOutcome, Metrics};
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
                "Calls of remote services",
            ),
            duration: Timings::register(
                to,
                "api_call_duration",
                ["service", "operation"],
                "Duration of calls of remote services",
                call_buckets,
            ),
            items: Counters::register(
                to,
                "api_items",
                ["service", "operation"],
                "Items that calls of remote services carried",
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

/// Which capacity a call consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capacity {
    /// Read units.
    Read,
    /// Write units.
    Write,
}

/// The capacity units that DynamoDB reported for calls.
#[derive(Clone, Debug)]
pub struct ConsumedCapacity(Family<Labels<3>, Counter<f64, AtomicU64>>);

impl ConsumedCapacity {
    fn register(to: &mut Registry) -> Self {
        let family = Family::default();
        to.register("consumed_capacity_units", "Capacity units that DynamoDB reported", family.clone());
        Self(family)
    }

    /// Adds what a call consumed. `index` is `None` for the table itself. Units may be halves; what is no
    /// finite amount above 0 is left out.
    pub fn add(&self, table: &str, index: Option<&str>, capacity: Capacity, units: f64) {
        if !(units.is_finite() && units > 0.0) {
            return;
        }
        let capacity = match capacity {
            Capacity::Read => "read",
            Capacity::Write => "write",
        };
        let own = |text: &str| Cow::Owned(text.to_owned());
        let labels =
            [("table", own(table)), ("index", own(index.unwrap_or(""))), ("capacity", capacity.into())];
        self.0.get_or_create(&labels).inc_by(units);
    }
}

/// How many batches the queue holds, as far as it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueDepth {
    /// They may be leased now.
    pub visible: Option<u64>,
    /// They are leased.
    pub in_flight: Option<u64>,
    /// They may be leased later.
    pub delayed: Option<u64>,
}

/// How much there is to do. What could not be read is absent, never 0.
#[derive(Clone, Debug)]
pub struct BacklogMetrics {
    open: Gauges<0>,
    outstanding: Gauges<0>,
    oldest: Gauges<0>,
    queue: Gauges<1>,
}

impl BacklogMetrics {
    fn register(to: &mut Registry) -> Self {
        Self {
            open: Gauges::register(to, "messages_open", [], "Messages without a final state"),
            outstanding: Gauges::register(
                to,
                "outbox_batches",
                [],
                "Batches that the queue has not accepted",
            ),
            oldest: Gauges::register_seconds(
                to,
                "oldest_waiting",
                [],
                "Age of the oldest batch that was not tried yet",
            ),
            queue: Gauges::register(to, "queue_batches", ["state"], "Batches that the queue holds"),
        }
    }

    /// Messages without a final state.
    pub fn open(&self, messages: Option<u64>) {
        self.open.set([], messages);
    }

    /// Batches that the queue has not accepted.
    pub fn outstanding(&self, batches: Option<u64>) {
        self.outstanding.set([], batches);
    }

    /// The age of the oldest batch that was not tried yet.
    pub fn oldest(&self, age: Option<Duration>) {
        self.oldest.set([], age.map(|age| age.as_secs()));
    }

    /// What the queue holds.
    pub fn queue(&self, depth: QueueDepth) {
        self.queue.set(["visible"], depth.visible);
        self.queue.set(["in_flight"], depth.in_flight);
        self.queue.set(["delayed"], depth.delayed);
    }
}
