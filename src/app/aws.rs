//! Settings of the adapters for AWS, derived from the configuration, and trying them.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context as _;
use postrider_actors::ports::{Dispatch, OutboxPages as _, PageQuery, StoreError};

use crate::{
    clock::SystemClock,
    config::{Aws, Config, Profile, QueueAddress, SourceKind},
    findings::{Finding, Verdict},
};
use postrider_aws::{
    self as aws, AwsSettings, SdkConfig, cloudwatch,
    dynamodb::{self, Console, DynamoSettings, DynamoStore},
    sqs::provision::{Difference, MAKE, Provisioner},
};

/// Credentials may come from the instance or from a login: several calls, each with its own timeout.
const CREDENTIALS_TIMEOUT: Duration = Duration::from_secs(15);
/// How long one engine may take to be looked at.
pub(super) const LOOK_TIMEOUT: Duration = Duration::from_secs(30);
/// How long tables and indexes may take to be made.
const MAKE_TIMEOUT: Duration = Duration::from_mins(15);
/// The process that commands are: what they redrive is dispatched by the daemons.
const OPERATOR: &str = "operator-1";

/// How often the outbox's index is looked at. What this process appended itself needs no look; what others left does,
/// and 15 s are short beside the lease that its batches wait for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(15);
/// What a process knows to wait it keeps from others for two leases, and at least for two sweeps.
const KEPT_MIN: Duration = Duration::from_secs(30);
/// How long outcomes of few messages wait for those of other workers, so that one transaction records them all.
const SETTLE_LINGER: Duration = Duration::from_secs(1);
/// What batches carry outlives a month in which no daemon runs …
const PAYLOAD_LIFE_MIN: Duration = Duration::from_hours(60 * 24);
/// … and a service that keeps everything has it for so long.
const PAYLOAD_LIFE_MAX: Duration = Duration::from_hours(3_650 * 24);
/// Where a reader finds what a role needs.
const SEE: &str = "see \"Permissions\" in docs/aws.md";

/// Whether the configuration names anything at AWS.
pub(super) fn is_needed(config: &Config) -> bool {
    config.profile == Profile::Aws
        || config.feeds.iter().any(|feed| feed.queue().is_some())
        || config
            .receipt_sources
            .iter()
            .any(|source| matches!(source.kind, SourceKind::Sqs(_) | SourceKind::Cloudwatch(_)))
}

/// `[aws]` for the adapters.
pub(super) fn settings(aws: &Aws) -> AwsSettings {
    AwsSettings::new(aws.clone())
}

/// `[outbox.dynamodb]` for the adapter, as `process` (`NODE-START`) uses it.
pub(super) fn dynamo_settings(config: &Config, process: &str) -> DynamoSettings {
    DynamoSettings {
        sweep_interval: SWEEP_INTERVAL,
        kept_for: (config.lease.duration * 2).max(KEPT_MIN),
        payload_life: payload_life(config.outbox.retention),
        settle_linger: SETTLE_LINGER,
        ..DynamoSettings::new(config.dynamodb.clone(), process)
    }
}

/// How long what a batch carries is kept by itself: while a daemon runs, it is kept for as long as it is needed.
fn payload_life(retention: Option<Duration>) -> Duration {
    let retention = retention.filter(|retention| !retention.is_zero());
    retention.map_or(PAYLOAD_LIFE_MAX, |retention| (retention * 2).clamp(PAYLOAD_LIFE_MIN, PAYLOAD_LIFE_MAX))
}

/// The store in DynamoDB for an operator's commands.
pub(super) fn console(config: &Config) -> anyhow::Result<Console> {
    let runtime = super::engines::runtime()?;
    let settings = settings(&config.aws);
    let opening = async {
        let sdk = aws::sdk_config(&settings).await;
        let client = aws::dynamodb_client(&sdk, &settings);
        let dynamo = dynamo_settings(config, OPERATOR);
        DynamoStore::open(&client, dynamo, Arc::new(SystemClock), Arc::new(())).await
    };
    let store = runtime.block_on(opening).context(
        "the tables of [outbox.dynamodb] can't be opened; `postrider check-config --connect` says what is wrong",
    )?;
    Ok(Console::new(runtime, store))
}

/// Tries what the configuration names at AWS; with `may_make`, makes what is missing of Postrider's own
/// queues and tables.
pub(super) async fn try_engines(config: &Config, may_make: bool) -> Vec<Finding> {
    let settings = settings(&config.aws);
    let sdk = aws::sdk_config(&settings).await;
    let mut findings = Vec::new();
    let region = sdk.region().map(ToString::to_string);
    findings.push(match &region {
        Some(region) => Finding::new("aws region", Verdict::Fine, region),
        None => Finding::new(
            "aws region",
            Verdict::Wrong,
            "no region is set: set aws.region, AWS_REGION, or a region in the profile",
        ),
    });
    let credentials = aws::find_credentials(&sdk);
    let credentials: Result<(), String> = match tokio::time::timeout(CREDENTIALS_TIMEOUT, credentials).await {
        Ok(found) => found,
        Err(_) => Err(format!("no answer within {} s", CREDENTIALS_TIMEOUT.as_secs())),
    };
    let has_credentials = credentials.is_ok();
    findings.push(match credentials {
        Ok(()) => Finding::new("aws credentials", Verdict::Fine, "found"),
        Err(why) => {
            let detail = format!(
                "{why}; give the instance or task a role, or set AWS_PROFILE or AWS_ACCESS_KEY_ID and \
                 AWS_SECRET_ACCESS_KEY for the daemon's user"
            );
            Finding::new("aws credentials", Verdict::Wrong, detail)
        }
    });
    if region.is_none() || !has_credentials {
        return findings;
    }
    if config.profile == Profile::Aws {
        findings.extend(Box::pin(try_tables(&sdk, &settings, config, may_make)).await);
    }
    let provisioner = Provisioner::new(aws::sqs_client(&sdk, &settings), &settings, Arc::new(()));
    if config.profile == Profile::Aws {
        findings.extend(try_queues(&provisioner, config, may_make).await);
    }
    for feed in &config.feeds {
        if let Some(queue) = feed.queue() {
            let engine = format!("feed {}: queue {}", feed.name, queue.queue.name());
            findings.push(try_inbound(&provisioner, engine, &queue.queue).await);
        }
    }
    for source in &config.receipt_sources {
        match &source.kind {
            SourceKind::Sqs(sqs) => {
                let engine = format!("receipts {}: queue {}", source.name, sqs.queue.name());
                findings.push(try_inbound(&provisioner, engine, &sqs.queue).await);
            }
            SourceKind::Cloudwatch(logs) => {
                let client = aws::logs_client(&sdk, &settings);
                for group in &logs.log_groups {
                    let engine = format!("receipts {}: log group {group}", source.name);
                    findings.push(
                        match within(LOOK_TIMEOUT, &engine, cloudwatch::look(&client, group)).await {
                            Ok(()) => Finding::new(engine, Verdict::Fine, "it can be read"),
                            Err(finding) => finding,
                        },
                    );
                }
            }
            SourceKind::Directory(_) | SourceKind::Http(_) => {}
        }
    }
    findings
}

/// A look at an engine that must end.
pub(super) async fn within<T>(
    limit: Duration,
    engine: &str,
    look: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, Finding> {
    match tokio::time::timeout(limit, look).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(failed(engine, &error)),
        Err(_) => {
            let detail =
                format!("no answer within {} s; is the address right, and the way open?", limit.as_secs());
            Err(Finding::new(engine, Verdict::Unreachable, detail))
        }
    }
}

/// What is denied or wrong has to be fixed; what was not answered, or can't be done now, may be tried again.
fn failed(engine: &str, error: &StoreError) -> Finding {
    let (verdict, advice) = match error {
        StoreError::Unknown(_) => (Verdict::Unreachable, "is the address right, and the way open?"),
        StoreError::Retryable(_) => (Verdict::Unreachable, "try again"),
        StoreError::Denied(_) => (Verdict::Wrong, SEE),
        StoreError::Permanent(_) => (Verdict::Wrong, "see docs/aws.md"),
    };
    Finding::new(engine, verdict, format!("{error}; {advice}"))
}

async fn try_tables(
    sdk: &SdkConfig,
    settings: &AwsSettings,
    config: &Config,
    may_make: bool,
) -> Vec<Finding> {
    let engine = format!("tables {} and {}", config.dynamodb.table, config.dynamodb.ledger_table());
    let client = aws::dynamodb_client(sdk, settings);
    let dynamo = dynamo_settings(config, OPERATOR);
    if may_make
        && let Err(finding) =
            within(MAKE_TIMEOUT, &engine, Box::pin(dynamodb::migrate(&client, &dynamo))).await
    {
        return vec![finding];
    }
    let wrong = match within(LOOK_TIMEOUT, &engine, Box::pin(dynamodb::check(&client, &dynamo))).await {
        Ok(wrong) => wrong,
        Err(finding) => return vec![finding],
    };
    if !wrong.is_empty() {
        let verdict = |text: &str| {
            // An index that is being built, for example.
            if text.contains("not ACTIVE") { Verdict::Unreachable } else { Verdict::Wrong }
        };
        return wrong.into_iter().map(|text| Finding::new(&engine, verdict(&text), text)).collect();
    }
    // The indexes have permissions of their own.
    let look = async {
        let store = DynamoStore::open(&client, dynamo, Arc::new(SystemClock), Arc::new(())).await?;
        let one = PageQuery { dispatch: Dispatch::Outstanding, destination: None, limit: 1, cursor: None };
        store.page(one).await
    };
    vec![match within(LOOK_TIMEOUT, &engine, Box::pin(look)).await {
        Ok(_) => Finding::new(engine, Verdict::Fine, "as expected"),
        Err(finding) => finding,
    }]
}

/// Looks at the queue of each destination and at that of the dead letters; with `may_make`, makes what is missing.
async fn try_queues(provisioner: &Provisioner, config: &Config, may_make: bool) -> Vec<Finding> {
    let dead_letters = config.sqs.dead_letters();
    let engine = format!("queue {dead_letters}");
    let mut findings = Vec::new();
    let mut arn = None;
    match queue_at(provisioner, &engine, &dead_letters, None, may_make).await {
        Ok((url, made)) => {
            findings.extend(made);
            match within(LOOK_TIMEOUT, &engine, Box::pin(provisioner.read(&url))).await {
                Ok(found) => {
                    findings.push(Finding::new(&engine, Verdict::Fine, "it is there"));
                    arn = found.arn;
                }
                Err(finding) => findings.push(finding),
            }
        }
        Err(finding) => findings.push(finding),
    }
    if may_make && arn.is_none() {
        // Made now, the others would have no dead-letter queue for good.
        return findings;
    }
    for destination in &config.destinations {
        let name = config.sqs.queue_name(&destination.name);
        let engine = format!("queue {name}");
        findings
            .extend(try_queue(provisioner, &engine, &name, arn.as_deref(), config.sqs.fifo, may_make).await);
    }
    findings
}

async fn try_queue(
    provisioner: &Provisioner,
    engine: &str,
    name: &str,
    dead_letters: Option<&str>,
    fifo: bool,
    may_make: bool,
) -> Vec<Finding> {
    let (url, mut findings) = match queue_at(provisioner, engine, name, dead_letters, may_make).await {
        Ok(found) => found,
        Err(finding) => return vec![finding],
    };
    match within(LOOK_TIMEOUT, engine, Box::pin(provisioner.read(&url))).await {
        Ok(found) => findings.extend(differences(engine, &found.differences(fifo))),
        Err(finding) => findings.push(finding),
    }
    findings
}

/// The URL of one of Postrider's own queues, made if it may be; what to say of that.
async fn queue_at(
    provisioner: &Provisioner,
    engine: &str,
    name: &str,
    dead_letters: Option<&str>,
    may_make: bool,
) -> Result<(String, Vec<Finding>), Finding> {
    if may_make && within(LOOK_TIMEOUT, engine, Box::pin(provisioner.find(name))).await?.is_none() {
        let made = within(LOOK_TIMEOUT, engine, Box::pin(provisioner.make(name, dead_letters))).await?;
        return Ok((made, vec![Finding::new(engine, Verdict::Fine, "made")]));
    }
    let url = url_of(provisioner, engine, &QueueAddress::Name(name.to_owned()), MAKE).await?;
    Ok((url, Vec::new()))
}

/// Where a queue is, or a finding that says it was not found.
pub(super) async fn url_of(
    provisioner: &Provisioner,
    engine: &str,
    queue: &QueueAddress,
    how_to_make: &str,
) -> Result<String, Finding> {
    match queue {
        QueueAddress::Url(url) => Ok(url.to_string()),
        QueueAddress::Name(name) => {
            within(LOOK_TIMEOUT, engine, Box::pin(provisioner.find(name))).await?.ok_or_else(|| {
                let detail = format!(
                    "not found in this account and region, or this role may not see it; {how_to_make}"
                );
                Finding::new(engine, Verdict::Wrong, detail)
            })
        }
    }
}

fn differences(engine: &str, differences: &[Difference]) -> Vec<Finding> {
    if differences.is_empty() {
        return vec![Finding::new(engine, Verdict::Fine, "as expected")];
    }
    let verdict = |difference: &Difference| {
        if difference.must_be_fixed { Verdict::Wrong } else { Verdict::Costly }
    };
    differences.iter().map(|one| Finding::new(engine, verdict(one), one.to_string())).collect()
}

/// A queue that others own: it must be there and readable, how it is set up is their matter.
async fn try_inbound(provisioner: &Provisioner, engine: String, queue: &QueueAddress) -> Finding {
    let url = match url_of(provisioner, &engine, queue, "its owner makes it, not Postrider").await {
        Ok(url) => url,
        Err(finding) => return finding,
    };
    match within(LOOK_TIMEOUT, &engine, Box::pin(provisioner.read(&url))).await {
        Ok(_) => Finding::new(engine, Verdict::Fine, "it is there"),
        Err(finding) => finding,
    }
}
