//! What a warehouse's errors say of rows and of sessions.

use postrider_actors::model::call::{Failure, FailureKind};
use tokio_postgres::Error;

use crate::pg::commit_failure;

/// Redshift reports its compute nodes' errors as `XX000`, an internal error, with a number of its own in the detail. Those
/// that blame a value, as far as they are known: too long for its column (8001, amazon-redshift-utils issue 716) and out of
/// its number's range (1058, issue 114).
fn blames_a_value_on_redshift(code: &str, detail: Option<&str>) -> bool {
    let number = detail.and_then(|detail| {
        let mut lines = detail.lines().filter_map(|line| line.trim().strip_prefix("code:"));
        lines.next()?.trim().parse::<u32>().ok()
    });
    code == "XX000" && matches!(number, Some(8001 | 1058))
}

/// An error of a statement with rows, which is a transaction of its own. Why rows are invalid quotes them: it is kept
/// with their messages and never logged (I10).
pub(super) fn of_rows(error: &Error) -> Failure {
    let mut failure = commit_failure(error);
    let Some(refused) = error.as_db_error() else { return failure };
    if blames_a_value_on_redshift(refused.code().code(), refused.detail()) {
        failure.kind = FailureKind::Invalid;
    }
    if failure.kind == FailureKind::Invalid
        && let Some(detail) = refused.detail()
    {
        failure.why = format!("{}: {detail}", failure.why);
    }
    failure
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
}
