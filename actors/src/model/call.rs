//! How a call to a remote service may end, in one taxonomy for all of them.
//!
//! An adapter classifies what its client library says, once, as a [`Failure`]; who may repeat what follows from its
//! kind alone ([`Tries`](super::backoff::Tries)), and so do the answers that ports give.

/// Why a call failed: what it says about the past, and about the next try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FailureKind {
    /// It did not happen: the service asks for fewer calls.
    Throttled,
    /// It did not happen: the service, the way to it or a lock is not free just now. That passes by itself.
    Unavailable,
    /// It may have happened: no answer that could be read.
    Unknown,
    /// It did not happen, and will not until somebody grants a permission.
    Denied,
    /// It did not happen, and will not until somebody changes something there: a table, a queue, a column. Also
    /// whatever nobody foresaw: it is waited for, not given up.
    Refused,
    /// It did not happen, and the same call never will: a value is wrong.
    Invalid,
}

impl FailureKind {
    /// The word for logs and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Throttled => "throttled",
            Self::Unavailable => "unavailable",
            Self::Unknown => "unknown",
            Self::Denied => "denied",
            Self::Refused => "refused",
            Self::Invalid => "invalid",
        }
    }
}

/// A failed call, in words that hold no payload and no secret (I10).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Failure {
    /// What kind of failure it is.
    pub kind: FailureKind,
    /// The service's own word for it, if it answered: an error code, an SQLSTATE.
    pub code: Option<String>,
    /// For people: what happened.
    pub why: String,
}

impl Failure {
    /// A failure without a word of the service.
    pub fn new(kind: FailureKind, why: impl Into<String>) -> Self {
        Self { kind, code: None, why: why.into() }
    }

    /// The same, saying what it is about.
    #[must_use]
    pub fn about(mut self, what: impl std::fmt::Display) -> Self {
        self.why = format!("{what}: {}", self.why);
        self
    }
}

/// How a call ended, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CallOutcome {
    /// Answered; every item was taken.
    Ok,
    /// Answered; some items were not taken.
    Partial,
    /// Answered; a condition did not hold, so nothing was written. It is what the condition is for.
    Conflict,
    /// Not done, or not known to be.
    Failed(FailureKind),
}

impl CallOutcome {
    /// The word for metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Partial => "partial",
            Self::Conflict => "conflict",
            Self::Failed(kind) => kind.as_str(),
        }
    }
}
