//! Why the daemon did not start, and the exit code that says so.

use std::{io, net::SocketAddr};

use postrider_otlp::ExporterError;
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
    /// Spans can't be exported.
    #[error("tracing.endpoint: {0}")]
    Tracing(#[from] ExporterError),
    /// The system refuses threads, signals or file descriptors.
    #[error("the system refuses {what}: {error}")]
    System {
        /// What it refuses.
        what: &'static str,
        /// Why.
        error: std::io::Error,
    },
}

impl StartError {
    /// The exit code, by sysexits.h. 78 tells systemd that a restart won't help: it is for what only another
    /// configuration changes. A full disk, missing descriptors or an engine that is away must not keep the unit down.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Lock(LockError::Held(_))
            | Self::Source { .. }
            | Self::Destination { .. }
            | Self::Tracing(ExporterError::NoRoots)
            | Self::Engine { may_pass: false, .. } => Exit::Config,
            Self::Ops { error, .. } | Self::Receipts { error, .. } => of_configured(error),
            Self::Engine { may_pass: true, .. }
            | Self::Store(OpenError::Unavailable { .. })
            | Self::Lock(LockError::Io { .. })
            | Self::Node { .. }
            | Self::Tracing(ExporterError::Thread(_))
            | Self::System { .. } => Exit::TryLater,
            Self::Store(error) => error.into(),
        }
    }
}

/// The exit code for an address of the configuration that can't be used.
fn of_configured(error: &io::Error) -> Exit {
    match error.kind() {
        io::ErrorKind::PermissionDenied
        | io::ErrorKind::AddrInUse
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::Unsupported => Exit::Config,
        _ => Exit::TryLater,
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn what_may_pass_is_tried_again_and_what_is_misconfigured_is_not() {
        let ops = |errno: Errno| {
            let address = ([127, 0, 0, 1], 9464).into();
            StartError::Ops { address, error: errno.into() }.exit()
        };
        let node = |errno: Errno| StartError::Node { path: "/x".into(), error: errno.into() }.exit();
        for errno in [Errno::NOSPC, Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::IO, Errno::DQUOT] {
            assert_eq!((ops(errno), node(errno)), (Exit::TryLater, Exit::TryLater));
        }
        assert_eq!(ops(Errno::ADDRNOTAVAIL), Exit::TryLater, "the address may not be up yet");
        assert_eq!((ops(Errno::ACCESS), ops(Errno::ADDRINUSE)), (Exit::Config, Exit::Config));
    }
}
