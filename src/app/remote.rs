//! Opens what a configuration names at AWS, for the daemon.

use std::{num::NonZeroU32, path::Path, sync::Arc, time::Duration};

use postrider_actors::{
    model::{ledger::Evidence, receipt_format::ReceiptFormat},
    ports::{Clock, Intake},
    throttle::RateShares,
};

use super::{
    aws::{LOOK_TIMEOUT, dynamo_settings, settings, url_of, within},
    error::StartError,
    machine::Machine,
    stores::Stores,
};
use crate::{
    config::{CloudwatchSource, Config, Feed, Profile, QueueFeed, ReceiptSource, SqsSource},
    findings::{Finding, Verdict},
    node::{self, NodeError, Started},
    telemetry::metrics::Metrics,
};
use postrider_aws::{
    self as aws,
    cloudwatch::{CallRate, CloudWatchReceipts, CloudWatchSettings},
    dynamodb::{DynamoSettings, DynamoStore},
    receipt_queue::{QueueReceipts, QueueReceiptsLimits},
    sqs::{SqsIntake, SqsTransport, provision::Provisioner},
};

/// How long a poll waits for entries: the most that SQS allows. Less costs more calls and brings nothing sooner.
pub(super) const POLL_WAIT: Duration = Duration::from_secs(20);

/// How long received receipts are hidden from other machines: they are in the inbox within seconds.
const RECEIPTS_VISIBILITY: Duration = Duration::from_mins(2);

/// Opens the stores of several machines, if the configuration names them.
pub(super) async fn open_stores(
    config: &Config,
    state_dir: &Path,
    evidence: &Evidence,
    clock: &Arc<dyn Clock>,
    metrics: &Arc<Metrics>,
) -> Result<Option<Stores>, StartError> {
    if config.profile != Profile::Aws {
        return Ok(None); // Only a feed, or receipts, may come from there.
    }
    let process = match node::start(state_dir) {
        Ok(Started { process, replaced }) => {
            if let Some(why) = replaced {
                tracing::warn!(%process, why, "this is a new node");
            }
            Arc::<str>::from(process.to_string())
        }
        Err(NodeError { path, error }) => return Err(StartError::Node { path, error }),
    };
    let settings = settings(&config.aws);
    let sdk = aws::sdk_config(&settings).await;
    let observer = metrics.clone();
    let tables = aws::dynamodb_client(&sdk, &settings);
    let store_settings = DynamoSettings { evidence: evidence.clone(), ..dynamo_settings(config, &process) };
    let open = DynamoStore::open(&tables, store_settings, clock.clone(), observer.clone());
    let engine = format!("table {}", config.dynamodb.table);
    let store = Arc::new(within(LOOK_TIMEOUT, &engine, Box::pin(open)).await.map_err(refused)?);
    // Whether the queues are there is found out destination by destination: a missing one stops only its own.
    let transport =
        SqsTransport::new(aws::sqs_client(&sdk, &settings), &settings, config.sqs.clone(), observer);
    let shares = RateShares { table: store.clone(), process };
    Ok(Some(Stores::shared(&store, Arc::new(transport), shares, clock, metrics)))
}

fn refused(finding: Finding) -> StartError {
    let may_pass = finding.verdict == Verdict::Unreachable;
    StartError::Engine { engine: finding.engine, problem: finding.detail, may_pass }
}

/// Opens the queues of feeds.
pub(super) async fn open_intakes<'a>(
    machine: &Machine,
    config: &'a Config,
) -> Result<Vec<(&'a Feed, &'a QueueFeed, Arc<dyn Intake>)>, StartError> {
    let feeds: Vec<_> = config.feeds.iter().filter_map(|feed| Some((feed, feed.queue()?))).collect();
    let mut opened = Vec::new();
    if feeds.is_empty() {
        return Ok(opened); // no need to look for credentials
    }
    let settings = settings(&config.aws);
    let sdk = aws::sdk_config(&settings).await;
    let observer = machine.metrics.clone();
    let client = aws::sqs_client(&sdk, &settings);
    let provisioner = Provisioner::new(client.clone(), &settings, observer.clone());
    for (feed, queue) in feeds {
        let engine = format!("feed {}: queue {}", feed.name, queue.queue.name());
        let url = url_of(&provisioner, &engine, &queue.queue, "its owner makes it, not Postrider");
        let url = url.await.map_err(refused)?;
        let intake = SqsIntake::new(client.clone(), &settings, url, queue.visibility, observer.clone());
        opened.push((feed, queue, Arc::new(intake) as Arc<dyn Intake>));
    }
    Ok(opened)
}

/// Entries of one look at a queue of receipts, and receipts of one entry.
const LOOK_ENTRIES_MAX: usize = 1_000;
const ENTRY_RECEIPTS_MAX: usize = 1_000;

/// Opens a queue of receipts; how long a look at it waits.
pub(super) async fn receipts_from_queue(
    machine: &Machine,
    config: &Config,
    source: &ReceiptSource,
    sqs: &SqsSource,
    format: ReceiptFormat,
) -> Result<(Arc<dyn postrider_actors::ports::ReceiptSource>, Duration), StartError> {
    let settings = settings(&config.aws);
    let sdk = aws::sdk_config(&settings).await;
    let observer = machine.metrics.clone();
    let client = aws::sqs_client(&sdk, &settings);
    let provisioner = Provisioner::new(client.clone(), &settings, observer.clone());
    let engine = format!("receipts {}: queue {}", source.name, sqs.queue.name());
    let url = url_of(&provisioner, &engine, &sqs.queue, "its owner makes it, not Postrider");
    let url = url.await.map_err(refused)?;
    let intake = SqsIntake::new(client, &settings, url, RECEIPTS_VISIBILITY, observer);
    let limits = QueueReceiptsLimits { receipts: LOOK_ENTRIES_MAX, entry_receipts: ENTRY_RECEIPTS_MAX };
    Ok((Arc::new(QueueReceipts::new(Arc::new(intake), format, limits)), POLL_WAIT))
}

/// Opens log groups with receipts; how long a look at them waits.
pub(super) async fn receipts_from_logs(
    machine: &Machine,
    config: &Config,
    source: &CloudwatchSource,
    format: ReceiptFormat,
) -> Result<(Arc<dyn postrider_actors::ports::ReceiptSource>, Duration), StartError> {
    let settings = settings(&config.aws);
    let sdk = aws::sdk_config(&settings).await;
    let logs = CloudWatchSettings::new(source.clone());
    let rate = CallRate::per_second(NonZeroU32::new(source.calls_per_s).unwrap_or(NonZeroU32::MIN));
    let observer = machine.metrics.clone();
    let client = aws::logs_client(&sdk, &settings);
    let receipts = CloudWatchReceipts::new(client, logs, format, rate, machine.clock.clone(), observer);
    Ok((Arc::new(receipts), source.poll.min(LOOK_WAIT_MAX)))
}

/// A look at log groups waits no longer, so that a drain does not wait for it.
const LOOK_WAIT_MAX: Duration = Duration::from_secs(5);
