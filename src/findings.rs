//! Findings: the results of trying the engines of a configuration.

/// How serious a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// As expected.
    Fine,
    /// It works, at a price that the finding names.
    Costly,
    /// It could not be tried: no answer, or too many calls. Trying again may help.
    Unreachable,
    /// It has to be fixed first.
    Wrong,
}

impl Verdict {
    /// The word for tables and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fine => "ok",
            Self::Costly => "note",
            Self::Unreachable => "unreachable",
            Self::Wrong => "wrong",
        }
    }
}

/// One thing that was tried or made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is about, such as `queue postrider`.
    pub engine: String,
    /// How serious it is.
    pub verdict: Verdict,
    /// What was found, and what to do if that is not fine.
    pub detail: String,
}

impl Finding {
    /// A finding.
    pub fn new(engine: impl Into<String>, verdict: Verdict, detail: impl Into<String>) -> Self {
        Self { engine: engine.into(), verdict, detail: detail.into() }
    }
}
