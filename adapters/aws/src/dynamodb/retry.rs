//! How calls are repeated.
//!
//! Every call that the store makes may be repeated: reads, and writes whose condition fails if they were done
//! already. So a call that was not answered is repeated too; if none of its tries is answered the outcome is
//! `Unknown`, however the last one failed.

use std::time::Duration;

use aws_sdk_dynamodb::{
    config::http::HttpResponse,
    error::{ProvideErrorMetadata, SdkError},
};
use postrider_actors::model::{
    backoff::{Backoff, Budget},
    call::Failure,
};

use crate::failure;

/// With the waits between them a call is given up after about ten seconds; the stages go on insisting after that.
pub(super) const BUDGET: Budget =
    Budget { tries: 8, backoff: Backoff::new(Duration::from_millis(50), Duration::from_secs(3)) };

/// A failure in words that say what was being done, and what to do about it.
pub(super) fn described<E: ProvideErrorMetadata + std::error::Error + 'static>(
    what: &str,
    error: &SdkError<E, HttpResponse>,
) -> Failure {
    let mut failure = failure(error).about(format_args!("DynamoDB {what}"));
    if failure.code.as_deref() == Some("ResourceNotFoundException") {
        failure.why.push_str("; the table or index is missing, `postrider migrate` makes it");
    }
    failure
}
