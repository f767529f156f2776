//! How calls are repeated.
//!
//! Every call that the store makes may be repeated: reads, and writes whose condition fails if they were done
//! already. So a call that was not answered is repeated too; if none of its tries is answered the outcome is
//! `Unknown`, however the last one failed.

use std::{future::Future, time::Duration};

use aws_sdk_dynamodb::{
    config::http::HttpResponse,
    error::{ProvideErrorMetadata, SdkError},
};
use postrider_actors::{
    flow,
    model::{
        backoff::{Backoff, Budget, Tries},
        call::Failure,
    },
};

use crate::failure;

const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(3));

/// With the waits between them a call is given up after about ten seconds; the stages go on insisting after that.
pub(super) const BUDGET: Budget = Budget { tries: 8, backoff: BACKOFF };

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

/// Waits before round `round` (from 0) of something that others got in the way of.
pub(super) async fn back_off(round: u32) {
    flow::back_off(BACKOFF, round.saturating_add(1)).await;
}

/// Makes a call that nobody watches, for migration and checks, until it is answered or its tries are used up.
pub(super) async fn insist<T, E, F>(what: &str, mut call: impl FnMut() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let mut tries = Tries::new(BUDGET);
    loop {
        match Box::pin(call()).await {
            Ok(answer) => return Ok(answer),
            Err(error) => flow::again(&mut tries, described(what, &error)).await?,
        }
    }
}
