//! What takes receipts in and joins them with messages.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use postrider_actors::{
    model::{conditions::Conditions, formats::Format, receipt_format::ReceiptFormat},
    ports::{Inbox, ReceiptLedger, ReceiptSource},
    receipt_collector::{ReceiptCollector, ReceiptCollectorSetup},
    receipt_reconciler::{ReceiptReconciler, ReceiptReconcilerSetup},
    receipt_sweeper::{Expiring, ReceiptSweeper, ReceiptSweeperSetup},
    supervision::ChildSpec,
};

use super::{error::StartError, machine::Machine};
use crate::config::{self, Config, Directory, HttpAuth, Resolved, SourceKind};
use postrider_files::{
    inbox::{DirectoryInbox, InboxConfig},
    receipts::{DirReceipts, DirReceiptsSettings},
};
use postrider_http::receipts::{Credentials, HttpReceipts, HttpSource, Sink};
use postrider_net::serving::Serving;
use postrider_settings::Keys as _;

/// A source that is asked for receipts.
pub(super) struct PulledSource {
    name: Arc<str>,
    destination: Arc<str>,
    from: Arc<dyn ReceiptSource>,
    wait: Duration,
}

/// Everything about receipts that may fail to be built.
#[derive(Default)]
pub(super) struct Receipts {
    pulled: Vec<PulledSource>,
    listener: Option<HttpReceipts>,
    pushed: Vec<HttpSource>,
}

impl Receipts {
    /// Makes the sources of a configuration.
    pub(super) async fn build(machine: &Machine, resolved: &Resolved) -> Result<Self, StartError> {
        let config = &resolved.config;
        let mut parts = Self::default();
        for source in &config.receipt_sources {
            let refused = |problem: String| StartError::Source { source_name: source.name.clone(), problem };
            let (name, destination) =
                (Arc::<str>::from(&*source.name), Arc::<str>::from(&*source.destination));
            let format = ReceiptFormat::new(name.clone(), source.mapping.clone())
                .map_err(|error| refused(error.to_string()))?;
            let (from, wait): (Arc<dyn ReceiptSource>, _) = match &source.kind {
                SourceKind::Directory(directory) => {
                    let inbox = inbox(config, source, directory);
                    let settings = dir_settings(source, directory);
                    (Arc::new(DirReceipts::new(inbox, format, settings, machine.clock.clone())), POLL)
                }
                SourceKind::Http(http) => {
                    let secrets = &resolved.receipt_secrets[&source.name];
                    let credentials = match http.auth {
                        HttpAuth::Signature => Credentials::signature(secrets),
                        HttpAuth::Bearer => Credentials::bearer(secrets),
                    };
                    let credentials = credentials.map_err(|error| refused(error.to_string()))?;
                    let metrics = machine.metrics.receipts.source(&source.name);
                    parts.pushed.push(HttpSource { format, destination, credentials, metrics });
                    continue;
                }
                #[cfg(feature = "aws")]
                SourceKind::Sqs(sqs) => {
                    super::remote::receipts_from_queue(machine, config, source, sqs, format).await?
                }
                #[cfg(feature = "aws")]
                SourceKind::Cloudwatch(cloudwatch) => {
                    super::remote::receipts_from_logs(machine, config, cloudwatch, format).await?
                }
                // The configuration was refused.
                #[cfg(not(feature = "aws"))]
                SourceKind::Sqs(_) | SourceKind::Cloudwatch(_) => continue,
            };
            parts.pulled.push(PulledSource { name, destination, from, wait });
        }
        parts.listener = machine.receipts_listener(config)?;
        Ok(parts)
    }

    /// Answers requests with receipts from now on, if any are expected.
    pub(super) fn serve(&mut self, machine: &Machine) -> Option<Serving> {
        let (listener, ledger) = (self.listener.take()?, machine.stores.rows.clone()?);
        let pushed = std::mem::take(&mut self.pushed);
        let address = listener.address();
        let sink = Sink {
            ledger,
            inbox_max: INBOX_MAX,
            taken: machine.arrived.clone(),
            clock: machine.clock.clone(),
        };
        match listener.serve(pushed, sink) {
            Ok(serving) => {
                tracing::info!(%address, "listening for receipts");
                Some(serving)
            }
            Err(error) => {
                // Only a runtime without descriptors gets here; senders try again, and health reports it.
                tracing::error!(%address, %error, "can't listen for receipts");
                None
            }
        }
    }
}

/// Receipts that may wait in the inbox. Above it files, queues and logs are not read, and requests are answered 503: an
/// outage of the ledger fills the sources, not the disk.
const INBOX_MAX: u64 = 500_000;

/// Receipts, and bytes of them, that are applied at once at most, and the longest that one waits for others. In random order
/// a page is written for nearly each of them, fewer the more there are at once; other writes wait for them meanwhile.
/// Decision 13 has the measurements.
const APPLY_RECEIPTS_MAX: usize = 2_000;
const APPLY_BYTES_MAX: usize = 1 << 20;
const APPLY_LINGER: Duration = Duration::from_millis(200);

/// How long a poll of a source waits for receipts.
const POLL: Duration = Duration::from_secs(1);

/// Receipts of one poll of a directory.
const LOOK_RECEIPTS_MAX: usize = 5_000;

/// How long a poll waits for one. A file of gigabytes takes longer to be hashed, or to be copied from another
/// file system: less than what a collector takes for a failure.
const LOOK_MAX: Duration = Duration::from_secs(30);

/// Bytes of one receipt in a file: what a request with a thousand of them may have on average, many times over.
const LINE_BYTES_MAX: usize = 64 << 10;

fn inbox(
    config: &Config,
    source: &config::ReceiptSource,
    directory: &config::DirectorySource,
) -> Arc<dyn Inbox> {
    Arc::new(DirectoryInbox::new(InboxConfig {
        // No feed can have this name, so that nobody else's claimed files are taken for its own.
        feed: format!("receipts.{}", source.name),
        settings: as_of_a_feed(directory),
        state_dir: config.state.dir.clone(),
        format: Format::Text,
        max_row: LINE_BYTES_MAX,
        conditions: Conditions::default(),
    }))
}

/// The keys of a feed's directory: what a source has none of, it has as feeds do by default.
fn as_of_a_feed(directory: &config::DirectorySource) -> Directory {
    Directory { path: directory.path.clone(), stable_after: directory.stable_after, ..Directory::declared() }
}

fn dir_settings(source: &config::ReceiptSource, directory: &config::DirectorySource) -> DirReceiptsSettings {
    DirReceiptsSettings {
        destination: source.destination.as_str().into(),
        kind: source.format,
        line_bytes_max: LINE_BYTES_MAX,
        receipts_max: LOOK_RECEIPTS_MAX,
        directory: as_of_a_feed(directory),
        look_max: LOOK_MAX,
    }
}

impl Receipts {
    /// The actors that work on receipts; none if no row is kept.
    pub(super) fn specs(self, machine: &Arc<Machine>, config: &Config) -> Vec<ChildSpec> {
        let Some(ledger) = machine.stores.rows.clone().filter(|_| config.has_rows()) else {
            return Vec::new();
        };
        let mut specs = vec![reconciler(machine, config, &ledger), sweeper(machine, config, &ledger)];
        specs.extend(self.pulled.into_iter().map(|source| collector(machine, source, &ledger)));
        specs
    }
}

fn collector(machine: &Arc<Machine>, source: PulledSource, ledger: &Arc<dyn ReceiptLedger>) -> ChildSpec {
    let (machine, ledger) = (machine.clone(), ledger.clone());
    let metrics = machine.metrics.receipts.source(&source.name);
    let name = source.name.clone();
    let spec = ChildSpec::stage::<ReceiptCollector>(1, move |id| ReceiptCollectorSetup {
        source: source.name.clone(),
        destination: source.destination.clone(),
        from: source.from.clone(),
        ledger: ledger.clone(),
        wait: source.wait,
        inbox_max: INBOX_MAX,
        clock: machine.clock.clone(),
        arrived: machine.arrived.clone(),
        metrics: metrics.clone(),
        progress: machine.mark(id),
    });
    spec.of(name)
}

fn reconciler(machine: &Arc<Machine>, config: &Config, ledger: &Arc<dyn ReceiptLedger>) -> ChildSpec {
    let (machine, ledger) = (machine.clone(), ledger.clone());
    let metrics = machine.metrics.receipts.reconciler();
    let spec = ChildSpec::stage::<ReceiptReconciler>(0, move |id| ReceiptReconcilerSetup {
        ledger: ledger.clone(),
        receipts_max: APPLY_RECEIPTS_MAX,
        bytes_max: APPLY_BYTES_MAX,
        linger: APPLY_LINGER,
        clock: machine.clock.clone(),
        arrived: machine.arrived.clone(),
        metrics: metrics.clone(),
        progress: machine.mark(id),
    });
    spec.times(config.receipts.reconcilers)
}

fn sweeper(machine: &Arc<Machine>, config: &Config, ledger: &Arc<dyn ReceiptLedger>) -> ChildSpec {
    let (machine, ledger) = (machine.clone(), ledger.clone());
    let metrics = machine.metrics.receipts.sweeper();
    let after = config.receipts.timeout;
    let expecting: BTreeSet<&str> =
        config.receipt_sources.iter().map(|source| source.destination.as_str()).collect();
    let expiring =
        expecting.into_iter().map(|destination| Expiring { destination: destination.into(), after });
    let expiring: Vec<_> = expiring.collect();
    let (orphan_after, retention) = (config.receipts.park, config.ledger.retention.unwrap_or_default());
    ChildSpec::stage::<ReceiptSweeper>(0, move |id| ReceiptSweeperSetup {
        ledger: ledger.clone(),
        expiring: expiring.clone(),
        orphan_after,
        retention,
        clock: machine.clock.clone(),
        arrived: machine.arrived.clone(),
        metrics: metrics.clone(),
        progress: machine.mark(id),
    })
}
