//! How findings are shown, and the exit code they lead to.

use serde_json::{Value, json};

use super::{
    Exit,
    table::{table, text},
};
use crate::findings::{Finding, Verdict};

/// The worst decides.
pub(super) fn exit(findings: &[Finding]) -> Exit {
    match findings.iter().map(|finding| finding.verdict).max() {
        None | Some(Verdict::Fine | Verdict::Costly) => Exit::Done,
        Some(Verdict::Unreachable) => Exit::TryLater,
        Some(Verdict::Wrong) => Exit::Config,
    }
}

/// For programs: `verdict` is ok, note, unreachable or wrong.
pub(super) fn as_json(findings: &[Finding]) -> Value {
    let view = |finding: &Finding| json!({ "engine": finding.engine, "verdict": finding.verdict.as_str(), "detail": finding.detail });
    findings.iter().map(view).collect()
}

/// For people; empty without findings.
pub(super) fn as_table(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return String::new();
    }
    let row = |finding: &Finding| {
        vec![text(finding.verdict.as_str()), text(&finding.engine), text(&finding.detail)]
    };
    table(&["verdict", "engine", "found"], findings.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides_the_exit_code() {
        let of = |verdicts: &[Verdict]| {
            exit(&verdicts.iter().map(|verdict| Finding::new("x", *verdict, "")).collect::<Vec<_>>())
        };
        assert_eq!(of(&[]), Exit::Done);
        assert_eq!(of(&[Verdict::Fine, Verdict::Costly]), Exit::Done);
        assert_eq!(of(&[Verdict::Unreachable, Verdict::Fine]), Exit::TryLater);
        assert_eq!(of(&[Verdict::Wrong, Verdict::Unreachable]), Exit::Config);
    }

    #[test]
    fn findings_are_shown_with_their_words() {
        let findings = [Finding::new("queue q", Verdict::Wrong, "not\u{1b} found")];
        assert!(as_table(&findings).contains("not\\u{1b} found"));
        assert_eq!(as_json(&findings)[0]["verdict"], "wrong");
        assert_eq!(as_table(&[]), "");
    }
}
