//! Postrider on AWS. Here is what the adapters of its services share: the SDK's setup, and how their calls are watched.
//!
//! Credentials come from the SDK's own chain and from nowhere else: environment, shared files and profiles, SSO,
//! web identity, ECS and EC2 metadata ("Credential providers", AWS SDK for Rust developer guide).

pub mod cloudwatch;
pub mod dynamodb;
pub mod receipt_queue;
pub mod sqs;

use std::{error::Error, fmt, time::Duration};

pub use aws_config::SdkConfig;
use aws_config::{
    BehaviorVersion, Region, retry::RetryConfig, stalled_stream_protection::StalledStreamProtectionConfig,
    timeout::TimeoutConfig,
};
use aws_sdk_sqs::{
    config::ProvideCredentials as _,
    error::{ProvideErrorMetadata, SdkError},
};
use aws_smithy_http_client::{
    Builder as HttpClientBuilder,
    tls::{Provider, rustls_provider::CryptoMode},
};
use postrider_actors::ports::StoreError;
use rand::RngExt as _;

/// How AWS is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct AwsSettings {
    /// The region; `None`: as the SDK finds it (`AWS_REGION`, the profile, the instance).
    pub region: Option<String>,
    /// The profile of the shared files; `None`: `AWS_PROFILE` or the default one.
    pub profile: Option<String>,
    /// Where SQS is; `None`: at AWS, or where `AWS_ENDPOINT_URL_SQS` says.
    pub sqs_endpoint_url: Option<String>,
    /// Where DynamoDB is; `None`: at AWS, or where `AWS_ENDPOINT_URL_DYNAMODB` says.
    pub dynamodb_endpoint_url: Option<String>,
    /// Where CloudWatch Logs is; `None`: at AWS, or where `AWS_ENDPOINT_URL_CLOUDWATCH_LOGS` says.
    pub logs_endpoint_url: Option<String>,
    /// Until a connection stands.
    pub connect_timeout: Duration,
    /// Until a request is answered. A long poll takes its waiting time in addition.
    pub attempt_timeout: Duration,
    /// Tries inside the SDK, the first included; at least 1. The adapters have retries of their own, which
    /// know what may be repeated; one more try here only mends a connection that was closed while it was idle.
    pub max_attempts: u32,
}

impl Default for AwsSettings {
    fn default() -> Self {
        Self {
            region: None,
            profile: None,
            sqs_endpoint_url: None,
            dynamodb_endpoint_url: None,
            logs_endpoint_url: None,
            connect_timeout: Duration::from_secs(3),
            attempt_timeout: Duration::from_secs(10),
            max_attempts: 2,
        }
    }
}

impl fmt::Debug for AwsSettings {
    /// Without what an endpoint's URL may hold before its host (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bare = |url: &Option<String>| {
            url.as_deref().map(|url| url.rsplit_once('@').map_or(url, |(_, host)| host).to_owned())
        };
        f.debug_struct("AwsSettings")
            .field("region", &self.region)
            .field("profile", &self.profile)
            .field("sqs_endpoint_url", &bare(&self.sqs_endpoint_url))
            .field("dynamodb_endpoint_url", &bare(&self.dynamodb_endpoint_url))
            .field("logs_endpoint_url", &bare(&self.logs_endpoint_url))
            .field("connect_timeout", &self.connect_timeout)
            .field("attempt_timeout", &self.attempt_timeout)
            .field("max_attempts", &self.max_attempts)
            .finish()
    }
}

impl AwsSettings {
    /// The bounds on one call; `waiting` is how long the service is asked to hold the answer back.
    pub fn timeouts(&self, waiting: Duration) -> TimeoutConfig {
        let attempt = self.attempt_timeout + waiting;
        TimeoutConfig::builder()
            .connect_timeout(self.connect_timeout)
            .operation_attempt_timeout(attempt)
            // Between the tries the SDK waits a second at most.
            .operation_timeout((attempt + Duration::from_secs(1)) * self.max_attempts.max(1))
            .build()
    }
}

/// The SDK's configuration for all services. Endpoints are the services' own: see [`sqs_client`],
/// [`dynamodb_client`] and [`logs_client`]. Fetches no credentials yet; the first call does.
pub async fn sdk_config(settings: &AwsSettings) -> SdkConfig {
    let http = HttpClientBuilder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
    let retries = match settings.max_attempts {
        0 | 1 => RetryConfig::disabled(),
        attempts => {
            RetryConfig::standard().with_max_attempts(attempts).with_max_backoff(Duration::from_secs(1))
        }
    };
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http)
        .retry_config(retries)
        .timeout_config(settings.timeouts(Duration::ZERO))
        // It watches streamed bodies; ours are read whole within the attempt's timeout.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
    if let Some(region) = &settings.region {
        loader = loader.region(Region::new(region.clone()));
    }
    if let Some(profile) = &settings.profile {
        loader = loader.profile_name(profile);
    }
    loader.load().await
}

/// A client of SQS.
pub fn sqs_client(config: &SdkConfig, settings: &AwsSettings) -> aws_sdk_sqs::Client {
    let mut builder = aws_sdk_sqs::config::Builder::from(config);
    if let Some(url) = &settings.sqs_endpoint_url {
        builder = builder.endpoint_url(url);
    }
    aws_sdk_sqs::Client::from_conf(builder.build())
}

/// A client of DynamoDB.
pub fn dynamodb_client(config: &SdkConfig, settings: &AwsSettings) -> aws_sdk_dynamodb::Client {
    let mut builder = aws_sdk_dynamodb::config::Builder::from(config);
    if let Some(url) = &settings.dynamodb_endpoint_url {
        builder = builder.endpoint_url(url);
    }
    aws_sdk_dynamodb::Client::from_conf(builder.build())
}

/// A client of CloudWatch Logs. It never tries twice by itself: its calls are counted against a rate, and a second
/// try would go uncounted.
pub fn logs_client(config: &SdkConfig, settings: &AwsSettings) -> aws_sdk_cloudwatchlogs::Client {
    let mut builder =
        aws_sdk_cloudwatchlogs::config::Builder::from(config).retry_config(RetryConfig::disabled());
    if let Some(url) = &settings.logs_endpoint_url {
        builder = builder.endpoint_url(url);
    }
    aws_sdk_cloudwatchlogs::Client::from_conf(builder.build())
}

/// How a call to a service ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CallOutcome {
    /// Answered; every item was taken.
    Ok,
    /// Answered; some items were not taken.
    Partial,
    /// The service asks for fewer calls.
    Throttled,
    /// The service refused.
    Refused,
    /// No answer that could be read: it may have happened.
    Unknown,
}

impl CallOutcome {
    /// The word for logs and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Partial => "partial",
            Self::Throttled => "throttled",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
        }
    }
}

/// Why a call failed, in words that hold no payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What kind of failure it is.
    pub outcome: CallOutcome,
    /// The service's own word for it, if it answered.
    pub code: Option<String>,
    /// For people: what happened.
    pub why: String,
}

impl Failure {
    /// Reads the SDK's error of any operation.
    pub fn of<E: ProvideErrorMetadata + Error + 'static>(error: &SdkError<E>) -> Self {
        let unknown = |why: String| Self { outcome: CallOutcome::Unknown, code: None, why };
        match error {
            // It was never sent.
            SdkError::ConstructionFailure(_) => {
                Self { outcome: CallOutcome::Refused, code: None, why: causes(error) }
            }
            SdkError::ServiceError(answer) => {
                let status = answer.raw().status().as_u16();
                let code = answer.err().code();
                let outcome = match code {
                    Some(code) if is_throttling(code) => CallOutcome::Throttled,
                    _ if status == 429 => CallOutcome::Throttled,
                    // It may have happened before it failed.
                    _ if status >= 500 => CallOutcome::Unknown,
                    _ => CallOutcome::Refused,
                };
                let why = match (code, answer.err().message()) {
                    (Some(code), Some(message)) => format!("{code} ({status}): {message}"),
                    (Some(code), None) => format!("{code} ({status})"),
                    (None, message) => format!("status {status}: {}", message.unwrap_or("no reason given")),
                };
                Self { outcome, code: code.map(ToOwned::to_owned), why }
            }
            error => unknown(causes(error)),
        }
    }
}

impl From<Failure> for StoreError {
    /// A refusal is `Retryable` too: permissions, queues and tables are mended from outside, and the daemon
    /// goes on when they are.
    fn from(failure: Failure) -> Self {
        match failure.outcome {
            CallOutcome::Unknown => Self::Unknown(failure.why),
            _ => Self::Retryable(failure.why),
        }
    }
}

/// An error with its causes. (The SDK's own `DisplayErrorContext` adds the debug form, which may hold a response's
/// body.)
fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// The words for "fewer calls" of SQS, DynamoDB and CloudWatch Logs ("Common errors" of the API references; the SDK's
/// own list in `aws_runtime::retries::classifiers`).
fn is_throttling(code: &str) -> bool {
    matches!(
        code,
        "Throttling"
            | "ThrottlingException"
            | "ThrottledException"
            | "RequestThrottled"
            | "RequestThrottledException"
            | "TooManyRequestsException"
            | "ProvisionedThroughputExceededException"
            | "RequestLimitExceeded"
            | "LimitExceededException"
            | "BandwidthLimitExceeded"
            | "OverLimit"
            | "SlowDown"
            | "KmsThrottled"
            | "AWS.SimpleQueueService.KmsThrottled"
    )
}

/// Whether the SDK's chain finds credentials; the error is its own words without their causes, which may hold parts of
/// files or answers (I10).
pub async fn find_credentials(sdk: &SdkConfig) -> Result<(), String> {
    let provider = sdk.credentials_provider().ok_or("the SDK has no provider of credentials")?;
    provider.provide_credentials().await.map(drop).map_err(|error| error.to_string())
}

/// A wait below `bound`, drawn at random ("full jitter"; AWS Architecture Blog, "Exponential Backoff And Jitter").
pub fn full_jitter(bound: Duration) -> Duration {
    bound.mul_f64(rand::rng().random())
}

/// Watches calls to services (S2.7): for metrics. It must not block.
pub trait ApiObserver: Send + Sync {
    /// A call has ended. `items`: how many entries, messages or rows it carried either way.
    fn call(
        &self,
        service: &'static str,
        operation: &'static str,
        outcome: CallOutcome,
        latency: Duration,
        items: usize,
    );

    /// Items of an answered call that were not taken, and why, in the service's own word.
    fn rejected(&self, _service: &'static str, _operation: &'static str, _why: &str, _items: usize) {}

    /// Capacity that a call consumed; `index` is `None` for the table itself.
    fn capacity(&self, _table: &str, _index: Option<&str>, _units: f64) {}
}

impl ApiObserver for () {
    fn call(&self, _: &'static str, _: &'static str, _: CallOutcome, _: Duration, _: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_poll_may_take_its_waiting_time_and_every_try_has_its_own() {
        let settings = AwsSettings { max_attempts: 3, ..AwsSettings::default() };
        let timeouts = settings.timeouts(Duration::from_secs(20));
        assert_eq!(timeouts.operation_attempt_timeout(), Some(Duration::from_secs(30)));
        assert_eq!(timeouts.operation_timeout(), Some(Duration::from_secs(93)));
    }

    #[test]
    fn i10_debug_shows_no_credentials_of_an_endpoint() {
        let url = Some("http://someone:secret@localhost:4566/".to_owned());
        let settings = AwsSettings { sqs_endpoint_url: url, ..AwsSettings::default() };
        let printed = format!("{settings:?}");
        assert!(!printed.contains("secret") && printed.contains("localhost:4566"), "{printed}");
    }
}
