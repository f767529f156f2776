//! What an operator orders while messages are on their way, and the line that remains of it.

use std::fmt;

use super::FileSelector;
use crate::model::{limits::LimitChange, time::UnixMs};

/// An order. Each is a fact of a destination or a file (B11): it costs one write however many messages it is about, it
/// holds before the next request begins, and it outlasts a restart and a reload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Nothing more is sent to a destination, whose name may be new; the first reason stands.
    Pause {
        /// Its name.
        destination: String,
        /// Why.
        reason: String,
    },
    /// Undoes that, whoever said it: also a receiver's 410.
    Resume {
        /// Its name.
        destination: String,
    },
    /// What a destination may be sent, whose name may be new.
    Limit {
        /// Its name.
        destination: String,
        /// The limit.
        change: LimitChange,
    },
    /// Nothing more of files is sent.
    Hold {
        /// Which, and where.
        of: FilesAt,
        /// Why.
        reason: String,
    },
    /// Undoes that, whoever said it.
    Release {
        /// Which, and where.
        of: FilesAt,
    },
    /// Nothing more of files is sent, ever: their open messages end as cancelled.
    Cancel {
        /// Which, and where.
        of: FilesAt,
        /// Why.
        reason: String,
    },
}

/// Files, at one of their destinations or at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesAt {
    /// Which files.
    pub files: FileSelector,
    /// `None`: at all of theirs.
    pub destination: Option<String>,
}

impl fmt::Display for FilesAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.files {
            FileSelector::Id(id) => write!(f, "{id}")?,
            FileSelector::Name(name) => f.write_str(name)?,
        }
        self.destination.as_ref().map_or(Ok(()), |destination| write!(f, " at {destination}"))
    }
}

impl Order {
    /// The command that gives it.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Pause { .. } => "pause",
            Self::Resume { .. } => "resume",
            Self::Limit { change, .. } => change.verb(),
            Self::Hold { .. } => "hold",
            Self::Release { .. } => "release",
            Self::Cancel { .. } => "cancel",
        }
    }

    /// The line that remains of it.
    pub fn line(&self, by: &str, at: UnixMs) -> AuditLine {
        let (of, detail) = match self {
            Self::Pause { destination, reason } => (destination.clone(), reason.clone()),
            Self::Resume { destination } => (destination.clone(), String::new()),
            Self::Limit { destination, change } => (destination.clone(), change.to_string()),
            Self::Hold { of, reason } | Self::Cancel { of, reason } => (of.to_string(), reason.clone()),
            Self::Release { of } => (of.to_string(), String::new()),
        };
        AuditLine { at, by: by.to_owned(), verb: self.verb().to_owned(), of, detail }
    }
}

/// Lines that are kept; the oldest go.
pub const AUDIT_LINES_MAX: u64 = 100_000;

/// Who ordered what, and when. Only what changed something leaves a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditLine {
    /// When.
    pub at: UnixMs,
    /// Who.
    pub by: String,
    /// The command.
    pub verb: String,
    /// What it was about: a destination, a file, or a filter.
    pub of: String,
    /// The reason, or how much it changed.
    pub detail: String,
}
