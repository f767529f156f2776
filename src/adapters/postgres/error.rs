//! What the database's errors come to.

use postrider_actors::ports::StoreError;
use tokio_postgres::{Error, error::DbError};

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
        Some(refused) if is_passing(refused.code().code()) => StoreError::Retryable(words),
        // The driver could not read or write a value.
        None if !error.is_closed() && is_ours(error) => StoreError::Permanent(words),
        None => StoreError::Retryable(words),
        Some(_) => StoreError::Permanent(words),
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

/// By the SQLSTATE's class (Postgres' manual, appendix A): what another try may find otherwise.
fn is_passing(code: &str) -> bool {
    // Rolled back for another's sake; connections; resources; an operator's doing; the system's errors.
    const CLASSES: [&str; 5] = ["40", "08", "53", "57", "58"];
    // A lock that was not to be had; a transaction that idled too long; a server that became a standby;
    // a partition that retention took away just now.
    const CODES: [&str; 4] = ["55P03", "25P03", "25006", "23514"];
    CLASSES.iter().any(|class| code.starts_with(class)) || CODES.contains(&code)
}

/// Whether the error is about a value, not about the connection.
fn is_ours(error: &Error) -> bool {
    use std::error::Error as _;
    error.source().is_some_and(|source| !source.is::<std::io::Error>())
}

/// For an operator. Neither the details, which quote rows (I10), nor the statement.
pub(super) fn words(error: &Error) -> String {
    use std::error::Error as _;
    match error.as_db_error() {
        Some(refused) => db_words(refused),
        None => error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}")),
    }
}

fn db_words(refused: &DbError) -> String {
    let about = refused.constraint().or(refused.table());
    let about = about.map_or_else(String::new, |about| format!(", {about}"));
    format!("Postgres: {} (SQLSTATE {}{about})", refused.message(), refused.code().code())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_told_from_what_stays() {
        for code in ["40001", "40P01", "55P03", "57014", "57P01", "57P03", "08006", "53100", "53300", "58030"]
        {
            assert!(is_passing(code), "{code}");
        }
        for code in ["42501", "42P01", "22021", "23502", "23505", "28P01", "3D000", "XX000"] {
            assert!(!is_passing(code), "{code}");
        }
    }
}
