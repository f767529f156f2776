//! What a warehouse's errors say of rows and of sessions.

use postrider_actors::model::{
    bisect::Refusal,
    call::{Failure, FailureKind},
    outcome::Shortage,
};
use tokio_postgres::Error;

use crate::pg::{commit_failure, words};

/// Why rows were not written. Its words may quote them: they are kept with their messages and never logged (I10).
pub(super) enum NotWritten {
    /// No answer, or none that says so.
    Failed(Failure),
    /// The server answered, and the connection lives.
    Refused(Refusal),
    /// There is no connection, for this machine lacks that.
    Short(Shortage),
}

/// Why there is no connection.
pub(super) struct NoConnection {
    /// For an operator.
    pub(super) failure: Failure,
    /// What this machine lacks, if that is why.
    pub(super) shortage: Option<Shortage>,
}

impl From<NoConnection> for NotWritten {
    fn from(none: NoConnection) -> Self {
        none.shortage.map_or(Self::Failed(none.failure), Self::Short)
    }
}

impl From<Failure> for NotWritten {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// An error of a statement with rows, which is a transaction of its own.
impl From<&Error> for NotWritten {
    fn from(error: &Error) -> Self {
        let failure = commit_failure(error);
        match (error.as_db_error(), failure.code.as_deref()) {
            (Some(refused), Some(code)) if failure.kind != FailureKind::Unknown => Self::Refused(Refusal {
                kind: failure.kind,
                code: code.into(),
                words: with_detail(failure.why, refused.detail()),
            }),
            _ => Self::Failed(Failure { why: words(error), ..failure }),
        }
    }
}

/// Words and what the server adds to them.
pub(super) fn with_detail(words: String, detail: Option<&str>) -> String {
    match detail {
        Some(detail) if !detail.is_empty() => format!("{words}: {detail}"),
        _ => words,
    }
}

/// Whether a session is as it was after this error: the server has answered and goes on.
pub(super) fn leaves_session(error: &Error) -> bool {
    let code = error.code().map_or("", |code| code.code());
    !error.is_closed() && !code.is_empty() && !code.starts_with("57P") && !code.starts_with("08")
}

/// Whether the error may come of a prepared statement that the table has outgrown.
pub(super) fn is_about_the_table(error: &Error) -> bool {
    error
        .code()
        .is_some_and(|code| ["42", "0A", "3F", "3D"].iter().any(|class| code.code().starts_with(class)))
}
