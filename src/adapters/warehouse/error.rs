//! What a warehouse's errors come to, by SQLSTATE (Postgres' manual, appendix A).

use postrider_actors::ports::TableError;
use tokio_postgres::Error;

use crate::adapters::pg::words;

/// What an error says of the rows that a statement had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// One of them is refused whenever it comes.
    Rows,
    /// It may pass by itself.
    Passing,
    /// It passes when an operator has mended something, and the rows wait until then.
    Mendable,
}

fn class(code: &str) -> Class {
    match code {
        // Limits of the program, of which "an index row is too large" is a value's; WITH CHECK OPTION; what a
        // trigger raises.
        "54000" | "44000" | "P0001" => Class::Rows,
        // Values; constraints.
        _ if code.starts_with("22") || code.starts_with("23") => Class::Rows,
        // No such table or column, wrong type, no grant; no such schema or database; no entry.
        _ if code.starts_with("42") || code.starts_with('3') || code.starts_with("28") => Class::Mendable,
        // Rolled back, resources, intervention, connection, and whatever nobody foresaw.
        _ => Class::Passing,
    }
}

/// An error of a statement with rows. It is logged here where an operator has to do something about it.
pub(super) fn of_rows(table: &impl std::fmt::Display, error: &Error) -> TableError {
    let Some(refused) = error.as_db_error() else {
        return TableError::Retryable(words(error));
    };
    match class(refused.code().code()) {
        Class::Rows => {
            // With the details, which quote the row: they are kept with the message and never logged.
            let detail = refused.detail().map_or_else(String::new, |detail| format!(": {detail}"));
            TableError::Refused(format!("{}{detail}", words(error)))
        }
        Class::Passing => TableError::Retryable(words(error)),
        Class::Mendable => {
            let why = words(error);
            tracing::error!(table = %table, why, "the warehouse refuses to work with the table: mend it there or in \
                the configuration; the rows wait until their retries end");
            TableError::Retryable(why)
        }
    }
}

/// Whether a session is as it was after this error: the server has answered and goes on.
pub(super) fn leaves_session(error: &Error) -> bool {
    let code = error.code().map_or("", |code| code.code());
    !error.is_closed() && !code.is_empty() && !code.starts_with("57P") && !code.starts_with("08")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_blamed_for_values_and_constraints_alone() {
        for code in ["22001", "22003", "22008", "22P02", "22021", "23502", "23505", "23514", "54000", "P0001"]
        {
            assert_eq!(class(code), Class::Rows, "{code}");
        }
        for code in ["42P01", "42703", "42501", "42804", "3F000", "3D000", "28P01"] {
            assert_eq!(class(code), Class::Mendable, "{code}");
        }
        for code in [
            "40001", "40P01", "53300", "53100", "55P03", "57014", "57P01", "08006", "25006", "XX000", "54001",
        ] {
            assert_eq!(class(code), Class::Passing, "{code}");
        }
    }
}
