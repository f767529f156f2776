//! Which failures of a call are repeated, and how.
//!
//! Every call that the store makes may be repeated: reads, and writes whose condition fails if they were done
//! already. So a call that was not answered is repeated too; if none of its tries is answered the outcome is
//! `Unknown`, however the last one failed.

use std::{error::Error as _, fmt, future::Future, time::Duration};

use aws_sdk_dynamodb::{
    config::http::HttpResponse,
    error::{ProvideErrorMetadata, SdkError},
};
use postrider_actors::ports::StoreError;

use crate::{CallOutcome, full_jitter};

/// Tries of one call. With the waits between them a call is given up after about ten seconds; the stages go on
/// insisting after that.
const TRIES: u32 = 8;

/// The longest wait before the second try. It doubles with each further one.
const WAIT_FIRST: Duration = Duration::from_millis(50);

/// The longest wait of all.
const WAIT_MAX: Duration = Duration::from_secs(3);

/// Why a call failed.
pub(super) enum Failure<E> {
    /// It was repeated as often as is sensible, or repeating is pointless.
    Store(StoreError),
    /// The service answered that a condition does not hold: for the caller to judge.
    Condition(E),
}

impl<E: fmt::Display> From<Failure<E>> for StoreError {
    fn from(failure: Failure<E>) -> Self {
        match failure {
            Failure::Store(error) => error,
            Failure::Condition(error) => Self::Permanent(format!("DynamoDB refused: {error}")),
        }
    }
}

/// What a failed try means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// It did not happen, and may succeed later.
    NotNow,
    /// It may have happened.
    Unknown,
    /// A condition does not hold.
    Condition,
    /// It did not happen, and will not until somebody fixes permissions or tables: the daemon goes on when they
    /// are.
    Refused,
    /// It did not happen, and repeating it won't help.
    Permanent,
}

impl Class {
    /// The same in the words of metrics.
    pub(super) fn outcome(self) -> CallOutcome {
        match self {
            Self::NotNow => CallOutcome::Throttled,
            Self::Unknown => CallOutcome::Unknown,
            Self::Condition | Self::Refused | Self::Permanent => CallOutcome::Refused,
        }
    }
}

/// What an error code of the service means ("Error handling with DynamoDB" in its developer guide).
pub(super) fn class_of_code(code: &str, status: u16) -> Class {
    match code {
        "ConditionalCheckFailedException" | "TransactionCanceledException" => Class::Condition,
        "ProvisionedThroughputExceededException"
        | "ProvisionedThroughputExceeded"
        | "ThrottlingException"
        | "Throttling"
        | "ThrottlingError"
        | "RequestLimitExceeded"
        | "LimitExceededException"
        | "TransactionConflictException"
        | "TransactionConflict"
        | "TransactionInProgressException"
        | "TransactionInProgress"
        | "ReplicatedWriteConflictException"
        // Credentials are renewed by the SDK's chain.
        | "ExpiredTokenException"
        | "ServiceUnavailable" => Class::NotNow,
        "InternalServerError" | "InternalServerErrorException" | "InternalFailure" => Class::Unknown,
        _ if status == 429 || status == 503 => Class::NotNow,
        _ if status >= 500 => Class::Unknown,
        "ValidationException" | "ValidationError" | "ItemCollectionSizeLimitExceededException"
        | "ItemCollectionSizeLimitExceeded" | "IdempotentParameterMismatchException" | "SerializationException" => {
            Class::Permanent
        }
        _ => Class::Refused,
    }
}

pub(super) fn class<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> Class {
    match error {
        SdkError::DispatchFailure(failure) if failure.is_user() => Class::Permanent,
        // No connection, a broken one, no answer in time, or no credentials: what was sent may have arrived.
        SdkError::TimeoutError(_) | SdkError::ResponseError(_) | SdkError::DispatchFailure(_) => {
            Class::Unknown
        }
        SdkError::ServiceError(context) => {
            class_of_code(context.err().code().unwrap_or_default(), context.raw().status().as_u16())
        }
        _ => Class::Permanent,
    }
}

/// What to tell a person of a failure: the service's words, or the chain of causes.
fn describe<E: ProvideErrorMetadata + std::error::Error + 'static>(
    what: &str,
    error: &SdkError<E, HttpResponse>,
) -> String {
    if let SdkError::ServiceError(context) = error {
        let code = context.err().code().unwrap_or("an unnamed error");
        let message = context.err().message().unwrap_or("no further words");
        let advice = if code == "ResourceNotFoundException" {
            "; the table or index is missing, `postrider migrate` makes it"
        } else {
            ""
        };
        return format!("DynamoDB {what}: {code}: {message}{advice}");
    }
    let mut text = format!("DynamoDB {what}: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A wait drawn evenly between nothing and a bound that doubles ("full jitter", AWS Architecture Blog,
/// "Exponential Backoff And Jitter").
pub(super) async fn back_off(tries: u32) {
    let bound = WAIT_FIRST.saturating_mul(1 << tries.min(16)).min(WAIT_MAX);
    tokio::time::sleep(full_jitter(bound)).await;
}

/// The tries of one logical call, which may repeat with less each time.
#[derive(Default)]
pub(super) struct Tries {
    failed: u32,
    unknown: bool,
}

impl Tries {
    /// Notes a failed try and waits; the error to give up with if it was the last.
    pub(super) async fn failed(
        &mut self,
        class: Class,
        why: impl FnOnce() -> String,
    ) -> Result<(), StoreError> {
        self.unknown |= class == Class::Unknown;
        match class {
            Class::Permanent => return Err(StoreError::Permanent(why())),
            Class::Refused if !self.unknown => return Err(StoreError::Retryable(why())),
            Class::Refused => return Err(StoreError::Unknown(why())),
            Class::NotNow | Class::Unknown | Class::Condition => {}
        }
        self.failed += 1;
        if self.failed >= TRIES {
            return Err(if self.unknown { StoreError::Unknown(why()) } else { StoreError::Retryable(why()) });
        }
        back_off(self.failed - 1).await;
        Ok(())
    }
}

/// Makes a call until it is answered or its tries are used up.
pub(super) async fn insist<T, E, F>(what: &str, mut call: impl FnMut() -> F) -> Result<T, Failure<E>>
where
    F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let mut tries = Tries::default();
    loop {
        let error = match call().await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        match class(&error) {
            Class::Condition => match error {
                SdkError::ServiceError(context) => return Err(Failure::Condition(context.into_err())),
                _ => unreachable!("only the service judges conditions"),
            },
            class => {
                tries.failed(class, || describe(what, &error)).await.map_err(Failure::Store)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_did_not_happen_is_told_from_what_may_have() {
        assert_eq!(class_of_code("ThrottlingException", 400), Class::NotNow);
        assert_eq!(class_of_code("InternalServerError", 500), Class::Unknown);
        assert_eq!(class_of_code("", 502), Class::Unknown);
        assert_eq!(class_of_code("ValidationException", 400), Class::Permanent);
        assert_eq!(class_of_code("AccessDeniedException", 400), Class::Refused);
        assert_eq!(class_of_code("TransactionCanceledException", 400), Class::Condition);
    }

    #[tokio::test(start_paused = true)]
    async fn one_unanswered_try_makes_the_whole_call_unknown() {
        let mut tries = Tries::default();
        tries.failed(Class::Unknown, String::new).await.unwrap();
        let mut last = Ok(());
        for _ in 1..TRIES {
            last = tries.failed(Class::NotNow, || "busy".into()).await;
        }
        assert_eq!(last, Err(StoreError::Unknown("busy".into())));

        let mut throttled = Tries::default();
        for _ in 0..TRIES {
            last = throttled.failed(Class::NotNow, || "busy".into()).await;
        }
        assert_eq!(last, Err(StoreError::Retryable("busy".into())));
    }
}
