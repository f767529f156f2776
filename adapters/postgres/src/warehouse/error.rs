//! What a warehouse's errors come to, by SQLSTATE (Postgres' manual, appendix A).

use postrider_actors::ports::TableError;
use tokio_postgres::Error;

use crate::pg::words;

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

/// Redshift tells of its compute nodes' errors as `XX000`, an internal error, with a number of its own in the detail. Those
/// that blame a value, as far as they are known: too long for its column (8001, amazon-redshift-utils issue 716) and out of
/// its number's range (1058, issue 114).
fn blames_a_value_on_redshift(code: &str, detail: Option<&str>) -> bool {
    let number = detail.and_then(|detail| {
        let mut lines = detail.lines().filter_map(|line| line.trim().strip_prefix("code:"));
        lines.next()?.trim().parse::<u32>().ok()
    });
    code == "XX000" && matches!(number, Some(8001 | 1058))
}

/// An error of a statement with rows. It is logged here where an operator has to do something about it.
pub(super) fn of_rows(table: &impl std::fmt::Display, error: &Error) -> TableError {
    let Some(refused) = error.as_db_error() else {
        return TableError::Retryable(words(error));
    };
    let code = refused.code().code();
    match if blames_a_value_on_redshift(code, refused.detail()) { Class::Rows } else { class(code) } {
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
    fn s4_4_redshift_blames_values_in_the_detail_of_an_internal_error() {
        let detail = |number: &str| {
            format!(
                "\n  -----------------------------------------------\n  error:  Value too long for character type\n  \
                 code:      {number}\n  context:   Value too long for type character varying(64)\n"
            )
        };
        for (code, detail, blames) in [
            ("XX000", Some(detail("8001")), true),
            ("XX000", Some(detail("1058")), true),
            ("XX000", Some(detail("1016")), false),
            ("XX000", Some("code: none".to_owned()), false),
            ("XX000", None, false),
            ("57014", Some(detail("8001")), false),
        ] {
            assert_eq!(blames_a_value_on_redshift(code, detail.as_deref()), blames, "{code} {detail:?}");
        }
    }

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
