//! The ledger's errors.

use postrider_actors::{
    model::{
        bisect::Refusal,
        call::{self, FailureKind},
    },
    ports::StoreError,
};
use tokio_postgres::{Error, error::DbError};

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

    /// Whether the server refused what it was given, and the connection lives: a part of it may be fine.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self.0.kind, FailureKind::Invalid | FailureKind::Denied | FailureKind::Refused)
    }

    fn ours(mut failure: call::Failure, error: &Error) -> Self {
        // It names the table, and no constraint of it.
        let lacks_a_partition =
            |refused: &DbError| refused.constraint().is_none() && refused.table().is_some();
        if failure.code.as_deref() == Some("23514") && error.as_db_error().is_some_and(lacks_a_partition) {
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

impl Failure {
    /// As a refusal of rows, if the server answered and the connection lives. One for the moment is waited for instead.
    pub(super) fn as_refusal(&self) -> Option<Refusal> {
        let Self(call::Failure { kind, code: Some(code), why }) = self else { return None };
        let may_be_of_a_row =
            matches!(kind, FailureKind::Invalid | FailureKind::Denied | FailureKind::Refused);
        may_be_of_a_row.then(|| Refusal { kind: *kind, code: code.as_str().into(), words: why.clone() })
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
