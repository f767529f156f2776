//! What an operator orders while messages are on their way, and the line that remains of it.

use std::fmt;

use super::FileSelector;
use crate::model::{file::FileReport, limits::LimitChange, priority::Priority, time::UnixMs};

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
    /// Files are so urgent from now on, beside others that wait for the same destination.
    Priority {
        /// Which, and where.
        of: FilesAt,
        /// How urgent.
        priority: Priority,
    },
}

/// Which files an order is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrderedFiles {
    /// These.
    Named(FileSelector),
    /// All of a feed that are not settled.
    OpenOf(String),
    /// All that are not settled.
    Open,
}

/// Files, at one of their destinations or at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesAt {
    /// Which files.
    pub files: OrderedFiles,
    /// `None`: at all of theirs.
    pub destination: Option<String>,
}

impl fmt::Display for FilesAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.files {
            OrderedFiles::Named(FileSelector::Id(id)) => write!(f, "{id}")?,
            OrderedFiles::Named(FileSelector::Name(name)) => f.write_str(name)?,
            OrderedFiles::OpenOf(feed) => write!(f, "all of feed {feed}")?,
            OrderedFiles::Open => f.write_str("all files")?,
        }
        self.destination.as_ref().map_or(Ok(()), |destination| write!(f, " at {destination}"))
    }
}

/// How much an order would be about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilesCount {
    /// Files.
    pub files: u64,
    /// Of them, each at one of its destinations.
    pub places: u64,
    /// Of these, where messages are held.
    pub held: u64,
    /// Open messages.
    pub open: u64,
}

impl FilesCount {
    /// Adds a file, as far as the order is about it.
    pub fn add(&mut self, report: &FileReport, of: &FilesAt) {
        let is_meant = |name: &str| of.destination.as_deref().is_none_or(|asked| asked == name);
        let places = || report.destinations.iter().filter(|(name, _)| is_meant(name));
        if places().next().is_none() {
            return;
        }
        self.files += 1;
        self.places += places().count() as u64;
        self.held += report.held.keys().filter(|name| is_meant(name)).count() as u64;
        self.open += places().map(|(_, counts)| counts.open()).sum::<u64>();
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
            Self::Priority { .. } => "priority",
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
            Self::Priority { of, priority } => (of.to_string(), priority.to_string()),
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
