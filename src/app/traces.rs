//! Who collects traces, and which files are traced.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use postrider_actors::{flow::Tracing, model::trace::Sampling};
use postrider_otlp::{CollectorSettings, Exporter};

use super::{error::StartError, machine::Machine};
use crate::config::Resolved;

/// How long the last spans may take to be posted when the daemon ends.
const LAST_SPANS: Duration = Duration::from_secs(1);

/// The traces of a configuration; nothing where nobody collects them.
#[derive(Default)]
pub(super) struct Traces {
    exporter: Option<Arc<Exporter>>,
    /// For every worker.
    pub(super) tracing: Option<Tracing>,
}

impl Traces {
    /// Starts an exporter, unless the one in use posts to the same collector. Connects to nothing.
    pub(super) fn build(machine: &Machine, resolved: &Resolved) -> Result<Self, StartError> {
        let keys = &resolved.config.tracing;
        let Some(endpoint) = keys.endpoint.clone() else { return Ok(Self::default()) };
        let settings = CollectorSettings { endpoint, headers: resolved.tracing_headers.clone() };
        let exporter = match in_use(machine).filter(|exporter| exporter.settings().is_same(&settings)) {
            Some(exporter) => exporter,
            None => Arc::new(Exporter::start(settings, machine.metrics.stages.spans())?),
        };
        let tracing = Tracing { sampling: Sampling::percent(keys.sample_percent), sink: exporter.clone() };
        Ok(Self { exporter: Some(exporter), tracing: Some(tracing) })
    }

    /// Takes the place of the one in use. Workers of the last configuration keep that, which posts what they have left.
    pub(super) fn install(self, machine: &Machine) {
        *machine.exporter.lock().unwrap_or_else(PoisonError::into_inner) = self.exporter;
    }
}

fn in_use(machine: &Machine) -> Option<Arc<Exporter>> {
    // Replaced as a whole.
    machine.exporter.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Posts what is left, when no worker runs any more.
pub(super) async fn post_last(machine: &Machine) {
    let Some(exporter) = in_use(machine) else { return };
    let posted = tokio::task::spawn_blocking(move || exporter.close(LAST_SPANS)).await;
    if !posted.unwrap_or(false) {
        tracing::warn!("the collector does not answer; the last spans are lost");
    }
}
