//! The ledger's errors.

use postrider_actors::{
    model::call::{self, FailureKind},
    ports::StoreError,
};
use tokio_postgres::Error;

use crate::pg;

/// A failure of the taxonomy that `?` makes of the driver's errors.
#[derive(Debug)]
pub(super) struct Failure(pub call::Failure);

impl Failure {
    pub(super) fn new(kind: FailureKind, why: impl Into<String>) -> Self {
        Self(call::Failure::new(kind, why))
    }

    /// Of a COMMIT, or of a statement that is a transaction of its own: it may have been committed when the connection
    /// went.
    #[expect(clippy::needless_pass_by_value, reason = "it is what `map_err` passes")]
    pub(super) fn of_commit(error: Error) -> Self {
        Self::ours(pg::commit_failure(&error), &error)
    }

    fn ours(mut failure: call::Failure, error: &Error) -> Self {
        if failure.code.as_deref() == Some("23514") {
            // No partition takes the row: retention took it away just now, and it comes back.
            failure.kind = FailureKind::Unavailable;
        }
        Self(if error.as_db_error().is_some() { failure.about("Postgres") } else { failure })
    }
}

/// Of anything but a COMMIT: what was not committed did not happen.
impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::ours(pg::failure(&error), &error)
    }
}

impl From<call::Failure> for Failure {
    fn from(failure: call::Failure) -> Self {
        Self(failure)
    }
}

impl From<Failure> for StoreError {
    fn from(Failure(failure): Failure) -> Self {
        failure.into()
    }
}

/// For an operator.
pub(super) fn words(error: &Error) -> String {
    let words = pg::words(error);
    if error.as_db_error().is_some() { format!("Postgres: {words}") } else { words }
}
