//! Spans to a collector by OTLP over HTTP, in protobuf (OpenTelemetry Protocol 1.x; `docs/decisions/0034-traces.md`).
//!
//! Workers put spans into a bounded queue and never wait. One thread takes them out in batches and posts them; it is the only one that
//! waits for the collector. What there is no room for, and what the collector does not take, is dropped and counted.

mod message;
mod post;
mod queue;
mod settings;
#[cfg(test)]
mod tests;

use std::{sync::Arc, thread, time::Duration};

use postrider_actors::{metrics::SpanMetrics, model::trace::BatchSpan, ports::SpanSink};

pub use self::{
    message::CONTENT_TYPE,
    settings::{CollectorSettings, ExporterError},
};
use self::{
    post::{Collector, NotTaken},
    queue::SpanQueue,
};

/// How often the same spans are posted: after that, newer ones say more.
const TRIES_MAX: u32 = 5;

/// Between two tries: the first wait, which doubles, and the longest that a collector may ask for.
const WAIT_MIN: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(30);

/// Exports spans. When it is dropped, those that are left are still posted, if the process lives for as long as that takes.
pub struct Exporter {
    settings: CollectorSettings,
    queue: Arc<SpanQueue>,
    metrics: SpanMetrics,
}

impl Exporter {
    /// Starts the thread that posts. Connects to nothing yet.
    pub fn start(settings: CollectorSettings, metrics: SpanMetrics) -> Result<Self, ExporterError> {
        let queue = Arc::new(SpanQueue::default());
        let collector = Collector::new(&settings)?;
        let poster = Poster { collector, queue: queue.clone(), metrics: metrics.clone(), is_failing: false };
        thread::Builder::new().name("spans".into()).spawn(move || poster.run())?;
        Ok(Self { settings, queue, metrics })
    }

    /// Whom it exports to.
    pub fn settings(&self) -> &CollectorSettings {
        &self.settings
    }

    /// Posts what is left, for as long as `within`, and takes nothing more. Blocks; whether all of it was posted, or dropped, by then.
    pub fn close(&self, within: Duration) -> bool {
        self.queue.close(within)
    }
}

impl SpanSink for Exporter {
    fn take(&self, span: BatchSpan) {
        if !self.queue.push(span) {
            self.metrics.dropped.inc();
        }
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.queue.close(Duration::ZERO);
    }
}

/// The thread.
struct Poster {
    collector: Collector,
    queue: Arc<SpanQueue>,
    metrics: SpanMetrics,
    /// Whether the last spans were not taken: said once.
    is_failing: bool,
}

impl Poster {
    fn run(mut self) {
        while let Some(spans) = self.queue.next() {
            self.export(&spans);
        }
        self.queue.ended();
    }

    fn export(&mut self, spans: &[BatchSpan]) {
        let (body, count) = (message::encode(spans), spans.len() as u64);
        let mut wait = WAIT_MIN;
        for attempt in 1.. {
            let not_taken = match self.collector.post(&body) {
                Ok(refused) => {
                    let refused = self.taken(refused).min(count);
                    self.metrics.exported.inc_by(count - refused);
                    self.metrics.dropped.inc_by(refused);
                    return;
                }
                Err(not_taken) => not_taken,
            };
            self.say(&not_taken);
            let asked = not_taken.retry_after.unwrap_or_default();
            let may_repeat = not_taken.may_succeed && attempt < TRIES_MAX;
            if !may_repeat || !self.queue.sleep(asked.clamp(wait, WAIT_MAX)) {
                break;
            }
            wait *= 2;
        }
        self.metrics.dropped.inc_by(count);
    }

    /// The collector has answered; how many spans it has refused all the same.
    fn taken(&mut self, refused: Option<(u64, String)>) -> u64 {
        if self.is_failing {
            self.is_failing = false;
            tracing::info!("the collector takes spans again");
        }
        let Some((refused, why)) = refused else { return 0 };
        tracing::warn!(refused, why, "the collector refuses spans");
        refused
    }

    fn say(&mut self, NotTaken { why, .. }: &NotTaken) {
        if !self.is_failing {
            self.is_failing = true;
            tracing::warn!(
                why,
                "the collector does not take spans; they are dropped and counted if that lasts. Nothing else waits for it"
            );
        }
    }
}
