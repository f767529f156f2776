//! What the database's errors come to.

use postrider_actors::ports::StoreError;
use tokio_postgres::Error;

use crate::pg;

/// A [`StoreError`] that `?` makes of the driver's errors.
pub(super) struct Failure(pub StoreError);

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(classify(&error))
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self(error)
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        failure.0
    }
}

/// Of anything but a COMMIT: what was not committed did not happen.
pub(super) fn classify(error: &Error) -> StoreError {
    let words = words(error);
    match error.as_db_error() {
        Some(refused) if blames_a_value(refused.code().code()) => StoreError::Permanent(words),
        // The driver could not read or write a value.
        None if !error.is_closed() && is_ours(error) => StoreError::Permanent(words),
        _ => StoreError::Retryable(words),
    }
}

/// Of a COMMIT: whether it happened is known only if the server said that it did not.
pub(super) fn classify_commit(error: &Error) -> StoreError {
    match error.as_db_error() {
        // 57P01 and its like come when the session is ended, maybe just after the commit.
        Some(refused)
            if !refused.code().code().starts_with("57P") && !refused.code().code().starts_with("08") =>
        {
            classify(error)
        }
        _ => StoreError::Unknown(words(error)),
    }
}

/// By the SQLSTATE's class (Postgres' manual, appendix A): whether it says no however often it is asked. All else
/// passes by itself, or when an operator has mended it: a missing grant, a dropped table, a changed password. A worker
/// that fails of such a thing would send its messages again.
fn blames_a_value(code: &str) -> bool {
    // A partition that retention took away just now (23514) comes back.
    (code.starts_with("22") || code.starts_with("23") || code == "54000") && code != "23514"
}

/// Whether the error is about a value, not about the connection.
fn is_ours(error: &Error) -> bool {
    use std::error::Error as _;
    error.source().is_some_and(|source| !source.is::<std::io::Error>())
}

/// For an operator.
pub(super) fn words(error: &Error) -> String {
    let words = pg::words(error);
    if error.as_db_error().is_some() { format!("Postgres: {words}") } else { words }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_refused_for_good_and_all_else_is_waited_for() {
        for code in [
            "40001", "40P01", "55P03", "57014", "57P01", "57P03", "08006", "53100", "53300", "58030",
            "42501", "42P01", "42703", "28P01", "3D000", "0A000", "XX000", "23514",
        ] {
            assert!(!blames_a_value(code), "{code}");
        }
        for code in ["22021", "22003", "23502", "23505", "54000"] {
            assert!(blames_a_value(code), "{code}");
        }
    }
}
