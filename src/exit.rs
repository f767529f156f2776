//! Exit codes, for scripts and systemd: sysexits(3) above 63.

use std::{fmt, io, process::ExitCode};

use postrider_actors::ports::StoreError;
use rustix::io::Errno;

use crate::{
    config::{ConfigError, Problems},
    telemetry::TelemetryError,
};
use postrider_sqlite::{LockError, MigrateError, OpenError};

/// An exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed, or the answer is no.
    Failed = 1,
    /// The command line is wrong; clap reports it.
    Usage = 2,
    /// The store is damaged (`EX_DATAERR`).
    Data = 65,
    /// An input can't be read (`EX_NOINPUT`).
    NoInput = 66,
    /// Restarts are used up (`EX_SOFTWARE`).
    Software = 70,
    /// The disk or the store failed (`EX_IOERR`).
    Io = 74,
    /// Not now (`EX_TEMPFAIL`): nothing that another configuration would change.
    TryLater = 75,
    /// The configuration, or the state directory, can't be used (`EX_CONFIG`).
    Config = 78,
}

impl Exit {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Done,
        Self::Failed,
        Self::Usage,
        Self::Data,
        Self::NoInput,
        Self::Software,
        Self::Io,
        Self::TryLater,
        Self::Config,
    ];

    /// The exit code of an error: the one attached to it, or its type's. The outermost wins.
    pub fn of(error: &anyhow::Error) -> Self {
        error.chain().find_map(Self::of_cause).unwrap_or(Self::Failed)
    }

    fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Self> {
        if let Some(failure) = cause.downcast_ref::<Failure>() {
            return Some(failure.exit);
        }
        if let Some(error) = cause.downcast_ref::<ConfigError>() {
            return Some(match error {
                ConfigError::Unreadable { error, .. } if is_short_of_something(error) => Self::TryLater,
                ConfigError::Unreadable { .. } => Self::NoInput,
                ConfigError::Invalid(_) => Self::Config,
            });
        }
        if let Some(error) = cause.downcast_ref::<TelemetryError>() {
            return Some(match error {
                TelemetryError::Thread(_) => Self::TryLater,
                TelemetryError::Filter { .. } | TelemetryError::Twice(_) => Self::Config,
            });
        }
        if cause.is::<Problems>() {
            return Some(Self::Config);
        }
        if let Some(error) = cause.downcast_ref::<OpenError>() {
            return Some(error.into());
        }
        if let Some(error) = cause.downcast_ref::<MigrateError>() {
            return Some(match error {
                MigrateError::Lock(LockError::Held(_)) => Self::Config,
                MigrateError::Lock(LockError::Io { .. }) => Self::Io,
                MigrateError::Open(error) => error.into(),
            });
        }
        if let Some(StoreError::Retryable(_) | StoreError::Denied(_) | StoreError::Unknown(_)) =
            cause.downcast_ref::<StoreError>()
        {
            return Some(Self::TryLater);
        }
        let error = cause.downcast_ref::<io::Error>()?;
        Some(if error.kind() == io::ErrorKind::BrokenPipe { Self::Done } else { Self::Io })
    }
}

/// Whether the system lacked what it may have again, whatever was read.
fn is_short_of_something(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| [Errno::IO, Errno::MFILE, Errno::NFILE, Errno::NOMEM].contains(&errno))
}

impl From<&OpenError> for Exit {
    fn from(error: &OpenError) -> Self {
        match error {
            OpenError::Missing(_) => Self::NoInput,
            OpenError::Corrupt { .. } => Self::Data,
            OpenError::Library { .. } => Self::Software,
            OpenError::Unavailable { .. } => Self::Io,
            OpenError::Foreign { .. } | OpenError::Newer { .. } | OpenError::Older { .. } => Self::Config,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error with the exit code that it means. It says no more than the error itself.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    error: anyhow::Error,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// Attaches an exit code to an error.
pub trait ExitContext<T> {
    /// The error ends the process with `exit`, whatever its type says.
    fn exit(self, exit: Exit) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> ExitContext<T> for Result<T, E> {
    fn exit(self, exit: Exit) -> anyhow::Result<T> {
        self.map_err(|error| Failure { exit, error: error.into() }.into())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use anyhow::Context as _;

    use super::*;
    use crate::config;

    #[test]
    fn systemd_keeps_trying_unless_only_a_person_can_help() {
        let unit = include_str!("../config/postrider.service");
        let value = |key: &str| {
            unit.lines()
                .find_map(|line| line.strip_prefix(key))
                .unwrap_or_else(|| panic!("the unit has {key}"))
        };
        assert_eq!((value("Restart="), value("StartLimitIntervalSec=")), ("on-failure", "0"));
        let stays_down = [Exit::Usage, Exit::Data, Exit::NoInput, Exit::Config];
        let stays_down: Vec<_> = stays_down.map(|exit| (exit as u8).to_string()).into();
        assert_eq!(value("RestartPreventExitStatus="), stays_down.join(" "));
    }

    #[test]
    fn the_exit_code_is_what_was_attached_or_what_the_type_says() {
        let io = |kind| anyhow::Error::from(io::Error::from(kind));
        assert_eq!(Exit::of(&anyhow::anyhow!("x")), Exit::Failed);
        assert_eq!(Exit::of(&io(io::ErrorKind::PermissionDenied)), Exit::Io);
        assert_eq!(Exit::of(&io(io::ErrorKind::PermissionDenied).context("while writing")), Exit::Io);
        assert_eq!(Exit::of(&io(io::ErrorKind::BrokenPipe)), Exit::Done);
        let attached = Err::<(), _>(io(io::ErrorKind::WouldBlock)).exit(Exit::Config).context("lock");
        let attached = attached.unwrap_err();
        assert_eq!(Exit::of(&attached), Exit::Config);
        let text = io::Error::from(io::ErrorKind::WouldBlock).to_string();
        assert_eq!(format!("{attached:#}"), format!("lock: {text}"));
        let unreadable = config::load(Path::new("/nowhere/x.toml")).unwrap_err();
        assert_eq!(Exit::of(&unreadable.into()), Exit::NoInput);
        let invalid = config::parse("x = 1", Path::new("x.toml"), []).unwrap_err();
        assert_eq!(Exit::of(&invalid.clone().into()), Exit::Config);
        assert_eq!(Exit::of(&ConfigError::from(invalid).into()), Exit::Config);
    }
}
