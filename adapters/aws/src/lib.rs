//! Postrider on AWS. Here is what the adapters of its services share: the SDK's setup, and how their calls are watched.
//!
//! Credentials come from the SDK's own chain and from nowhere else: environment, shared files and profiles, SSO,
//! web identity, ECS and EC2 metadata ("Credential providers", AWS SDK for Rust developer guide).

pub mod cloudwatch;
pub mod dynamodb;
pub mod receipt_queue;
pub mod sqs;

use std::{error::Error, time::Duration};

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
use postrider_actors::model::call::{Failure, FailureKind};
use postrider_settings::{Aws, Keys as _};

/// How AWS is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AwsSettings {
    /// `[aws]`
    pub keys: Aws,
    /// Until a connection stands.
    pub connect_timeout: Duration,
    /// Until a request is answered. A long poll takes its waiting time in addition.
    pub attempt_timeout: Duration,
    /// The longest wait of a receive ("Amazon SQS short and long polling").
    pub poll_max: Duration,
    /// Tries inside the SDK, the first included; at least 1. The adapters have retries of their own, which
    /// know what may be repeated; one more try here only replaces a connection that was closed while it was idle.
    pub max_attempts: u32,
}

impl Default for AwsSettings {
    /// As the SDK finds everything.
    fn default() -> Self {
        Self::new(Aws::declared())
    }
}

impl AwsSettings {
    /// With these keys.
    pub fn new(keys: Aws) -> Self {
        Self {
            keys,
            connect_timeout: Duration::from_secs(3),
            attempt_timeout: Duration::from_secs(10),
            poll_max: Duration::from_secs(20),
            max_attempts: 2,
        }
    }

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
    if let Some(region) = &settings.keys.region {
        loader = loader.region(Region::new(region.clone()));
    }
    if let Some(profile) = &settings.keys.profile {
        loader = loader.profile_name(profile);
    }
    loader.load().await
}

/// A client of SQS.
pub fn sqs_client(config: &SdkConfig, settings: &AwsSettings) -> aws_sdk_sqs::Client {
    let mut builder = aws_sdk_sqs::config::Builder::from(config);
    if let Some(url) = &settings.keys.sqs_endpoint_url {
        builder = builder.endpoint_url(url.as_str());
    }
    aws_sdk_sqs::Client::from_conf(builder.build())
}

/// A client of DynamoDB.
pub fn dynamodb_client(config: &SdkConfig, settings: &AwsSettings) -> aws_sdk_dynamodb::Client {
    let mut builder = aws_sdk_dynamodb::config::Builder::from(config);
    if let Some(url) = &settings.keys.dynamodb_endpoint_url {
        builder = builder.endpoint_url(url.as_str());
    }
    aws_sdk_dynamodb::Client::from_conf(builder.build())
}

/// A client of CloudWatch Logs. It never tries twice by itself: its calls are counted against a rate, and a second
/// try would go uncounted.
pub fn logs_client(config: &SdkConfig, settings: &AwsSettings) -> aws_sdk_cloudwatchlogs::Client {
    let mut builder =
        aws_sdk_cloudwatchlogs::config::Builder::from(config).retry_config(RetryConfig::disabled());
    if let Some(url) = &settings.keys.logs_endpoint_url {
        builder = builder.endpoint_url(url.as_str());
    }
    aws_sdk_cloudwatchlogs::Client::from_conf(builder.build())
}

/// Classifies the SDK's error of any operation of any service.
pub fn failure<E: ProvideErrorMetadata + Error + 'static>(error: &SdkError<E>) -> Failure {
    match error {
        // It was never sent.
        SdkError::ConstructionFailure(_) => Failure::new(FailureKind::Invalid, causes(error)),
        SdkError::DispatchFailure(dispatch) if dispatch.is_user() => {
            Failure::new(FailureKind::Invalid, causes(error))
        }
        SdkError::ServiceError(answer) => {
            let status = answer.raw().status().as_u16();
            let code = answer.err().code();
            let why = match (code, answer.err().message()) {
                (Some(code), Some(message)) => format!("{code} ({status}): {message}"),
                (Some(code), None) => format!("{code} ({status})"),
                (None, message) => format!("status {status}: {}", message.unwrap_or("no reason given")),
            };
            let kind = kind_of(code.unwrap_or_default(), status);
            Failure { kind, code: code.map(ToOwned::to_owned), why }
        }
        // No connection, a broken one, no answer in time, or no credentials: what was sent may have arrived.
        error => Failure::new(FailureKind::Unknown, causes(error)),
    }
}

/// What an error code of SQS, DynamoDB or CloudWatch Logs means, or, for any other code, what the status means
/// ("Common errors" of the API references; "Error handling with DynamoDB" in its developer guide; the SDK's own list in
/// `aws_runtime::retries::classifiers`).
pub fn kind_of(code: &str, status: u16) -> FailureKind {
    // SQS writes some of them as `AWS.SimpleQueueService.…`.
    match code.rsplit(['.', '#']).next().unwrap_or(code) {
        "Throttling"
        | "ThrottlingException"
        | "ThrottlingError"
        | "ThrottledException"
        | "RequestThrottled"
        | "RequestThrottledException"
        | "TooManyRequestsException"
        | "ProvisionedThroughputExceededException"
        | "ProvisionedThroughputExceeded"
        | "RequestLimitExceeded"
        | "LimitExceededException"
        | "BandwidthLimitExceeded"
        | "OverLimit"
        | "SlowDown"
        | "KmsThrottled" => FailureKind::Throttled,
        "ServiceUnavailable"
        | "ServiceUnavailableException"
        | "TransactionConflictException"
        | "TransactionConflict"
        | "TransactionInProgressException"
        | "TransactionInProgress"
        | "ReplicatedWriteConflictException"
        // Credentials are renewed by the SDK's chain.
        | "ExpiredTokenException"
        | "ExpiredToken" => FailureKind::Unavailable,
        "InternalServerError" | "InternalServerErrorException" | "InternalFailure" => FailureKind::Unknown,
        "AccessDenied"
        | "AccessDeniedException"
        | "AuthorizationError"
        | "IncompleteSignature"
        | "IncompleteSignatureException"
        | "InvalidClientTokenId"
        | "InvalidSignatureException"
        | "KmsAccessDenied"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException"
        | "NotAuthorized"
        | "OptInRequired"
        | "SignatureDoesNotMatch"
        | "UnrecognizedClientException" => FailureKind::Denied,
        "BatchRequestTooLong"
        | "IdempotentParameterMismatchException"
        | "ItemCollectionSizeLimitExceeded"
        | "ItemCollectionSizeLimitExceededException"
        | "SerializationException"
        | "ValidationError"
        | "ValidationException" => FailureKind::Invalid,
        _ => match status {
            429 => FailureKind::Throttled,
            401 | 403 => FailureKind::Denied,
            // It may have happened before it failed.
            500.. => FailureKind::Unknown,
            // Queues and tables are made from outside, and the daemon goes on when they are.
            _ => FailureKind::Refused,
        },
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

/// Whether the SDK's chain finds credentials; the error is its own words without their causes, which may hold parts of
/// files or answers (I10).
pub async fn find_credentials(sdk: &SdkConfig) -> Result<(), String> {
    let provider = sdk.credentials_provider().ok_or("the SDK has no provider of credentials")?;
    provider.provide_credentials().await.map(drop).map_err(|error| error.to_string())
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

    /// An error of an operation as the SDK makes it of an answer.
    fn answered(status: u16, code: &str) -> SdkError<aws_sdk_sqs::operation::send_message::SendMessageError> {
        use aws_sdk_sqs::{error::ErrorMetadata, operation::send_message::SendMessageError};
        use aws_smithy_types::body::SdkBody;
        let meta = ErrorMetadata::builder().code(code).message("said the service").build();
        let status = status.try_into().expect("a status");
        let raw = aws_sdk_sqs::config::http::HttpResponse::new(status, SdkBody::empty());
        SdkError::service_error(SendMessageError::generic(meta), raw)
    }

    #[test]
    fn what_the_services_answer_is_classified_by_code_and_then_by_status() {
        use FailureKind::{Denied, Invalid, Refused, Throttled, Unavailable, Unknown};
        for (status, code, kind) in [
            (400, "ThrottlingException", Throttled),
            (400, "ProvisionedThroughputExceededException", Throttled),
            (403, "RequestThrottled", Throttled),
            (400, "AWS.SimpleQueueService.KmsThrottled", Throttled),
            (429, "", Throttled),
            (400, "TransactionConflictException", Unavailable),
            (400, "ExpiredTokenException", Unavailable),
            (503, "ServiceUnavailable", Unavailable),
            (500, "InternalServerError", Unknown),
            (400, "InternalServerError", Unknown),
            (502, "", Unknown),
            (503, "", Unknown),
            (400, "AccessDeniedException", Denied),
            (403, "AccessDenied", Denied),
            (400, "UnrecognizedClientException", Denied),
            (403, "SomethingNew", Denied),
            (400, "ValidationException", Invalid),
            (400, "SerializationException", Invalid),
            (400, "AWS.SimpleQueueService.NonExistentQueue", Refused),
            (400, "ResourceNotFoundException", Refused),
            (413, "", Refused),
        ] {
            let failure = failure(&answered(status, code));
            assert_eq!(failure.kind, kind, "{status} {code}");
            assert!(failure.why.contains("said the service"), "{failure}");
        }
    }

    #[test]
    fn what_was_not_answered_may_have_happened_and_what_was_not_sent_has_not() {
        type Error = SdkError<aws_sdk_sqs::operation::send_message::SendMessageError>;
        use aws_sdk_sqs::error::ConnectorError;
        let kind = |error: Error| failure(&error).kind;
        assert_eq!(kind(Error::timeout_error("late")), FailureKind::Unknown);
        assert_eq!(kind(Error::dispatch_failure(ConnectorError::io("gone".into()))), FailureKind::Unknown);
        assert_eq!(
            kind(Error::dispatch_failure(ConnectorError::timeout("late".into()))),
            FailureKind::Unknown
        );
        assert_eq!(kind(Error::dispatch_failure(ConnectorError::user("no".into()))), FailureKind::Invalid);
        assert_eq!(kind(Error::construction_failure("no")), FailureKind::Invalid);
    }
}
