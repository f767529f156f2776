//! Why the daemon did not start, and the exit code that says so.

use std::net::SocketAddr;

use postrider_sqlite::{LockError, OpenError};

use crate::exit::Exit;

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory is somebody else's.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The store can't be opened.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// A feed's directory can't be used.
    #[error("feeds.{feed}.path {path:?}: {error}; make the directory, or correct the path")]
    Feed {
        /// The feed.
        feed: String,
        /// Its path.
        path: std::path::PathBuf,
        /// What is wrong.
        error: std::io::Error,
    },
    /// An engine across the network can't be used.
    #[error("{engine}: {problem}")]
    Engine {
        /// Which.
        engine: String,
        /// What is wrong, and what to do.
        problem: String,
        /// Whether it may be better later.
        may_pass: bool,
    },
    /// A file beside the store can't be kept: the node's own identity, or what is in flight.
    #[error("{path:?}: {error}; check that this user may write there")]
    Node {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The ops server can't listen.
    #[error("ops.listen {address}: {error}; is another daemon there? choose another port, or \"\" for none")]
    Ops {
        /// Its address.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// Receipts can't be listened for.
    #[error("receipts.listen {address}: {error}; is another daemon there? choose another port")]
    Receipts {
        /// The address.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// A source of receipts can't be used.
    #[error("receipts.sources.{source_name}: {problem}")]
    Source {
        /// Its name.
        source_name: String,
        /// What is wrong.
        problem: String,
    },
    /// A destination can't be used.
    #[error("destinations.{name}: {problems}")]
    Destination {
        /// The destination.
        name: String,
        /// What is wrong.
        problems: String,
    },
    /// The system refuses threads or signals.
    #[error("the system refuses {what}: {error}")]
    System {
        /// What it refuses.
        what: &'static str,
        /// Why.
        error: std::io::Error,
    },
}

impl StartError {
    /// The exit code, by sysexits.h. 78 tells systemd that a restart won't help.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Lock(LockError::Held(_))
            | Self::Feed { .. }
            | Self::Ops { .. }
            | Self::Receipts { .. }
            | Self::Source { .. }
            | Self::Destination { .. }
            | Self::Engine { may_pass: false, .. } => Exit::Config,
            Self::Engine { may_pass: true, .. } => Exit::TryLater,
            Self::Lock(LockError::Io { .. }) | Self::Node { .. } | Self::System { .. } => Exit::Io,
            Self::Store(error) => error.into(),
        }
    }
}
