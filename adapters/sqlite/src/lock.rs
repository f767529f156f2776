//! One daemon per state directory (F13).

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// A process that was just killed holds its lock until the kernel has taken it apart: who is started in its place looks
/// again so often …
const LOOKS: u32 = 40;

/// … and waits so long in between.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// Why the state directory could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another daemon has it; exit 78.
    #[error(
        "the state directory {} is in use by another postrider process; stop that one, or give this one \
         a state.dir of its own", .0.display()
    )]
    Held(PathBuf),
    /// It can't be made or opened.
    #[error("can't lock {}: {error}; check that state.dir exists and that this user may write to it", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
}

/// Holds the state directory for the life of the process. The kernel releases it when the process
/// ends, however that happens, so that no stale lock survives a crash.
#[derive(Debug)]
pub struct InstanceLock {
    _file: File,
}

impl InstanceLock {
    /// Takes `state_dir`, which is made if it is not there. Blocks for up to two seconds while another process has it.
    pub fn acquire(state_dir: &Path) -> Result<Self, LockError> {
        let path = state_dir.join("lock");
        let open = || {
            fs::create_dir_all(state_dir)?;
            // Never truncated and never removed: another process may hold the lock on this very inode.
            OpenOptions::new().create(true).truncate(false).write(true).open(&path)
        };
        let file = open().map_err(|error| LockError::Io { path: path.clone(), error })?;
        for look in 0..LOOKS {
            match file.try_lock() {
                Ok(()) => return Ok(Self { _file: file }),
                Err(TryLockError::WouldBlock) if look + 1 < LOOKS => thread::sleep(LOOK_PAUSE),
                Err(TryLockError::WouldBlock) => break,
                Err(TryLockError::Error(error)) => return Err(LockError::Io { path, error }),
            }
        }
        Err(LockError::Held(state_dir.to_owned()))
    }
}

/// Whether a daemon has `state_dir`. Whoever asks needs only to read there, and is in no starting daemon's way for longer than
/// it looks for.
pub fn is_running(state_dir: &Path) -> io::Result<bool> {
    let file = match File::open(state_dir.join("lock")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file?,
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f13_a_second_instance_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        assert!(!is_running(&state).unwrap());
        let first = InstanceLock::acquire(&state).unwrap();
        assert!(is_running(&state).unwrap());
        let refused = InstanceLock::acquire(&state).unwrap_err();
        assert!(matches!(refused, LockError::Held(_)));
        assert!(refused.to_string().contains("in use by another postrider"), "{refused}");
        drop(first);
        assert!(!is_running(&state).unwrap());
        InstanceLock::acquire(&state).unwrap();
    }
}
