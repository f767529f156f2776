//! What this machine's daemon knows and no store does, for commands: small files beside the store. A dropped file that can't
//! be read is in no store, and a store that several machines share knows nothing of this one's directories, nor of what its
//! destinations can bear.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use postrider_actors::model::{alarm::board::AlarmNotes, standing::Standing, trouble::Troubles};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::task::JoinHandle;

use super::state_dir;

/// Where this machine's daemon serves its interface for operators.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OpsNote {
    /// `None`: nowhere.
    pub(crate) address: Option<SocketAddr>,
    /// Whether it speaks TLS.
    pub(crate) has_tls: bool,
    /// Whether it wants a token.
    pub(crate) has_tokens: bool,
}

/// What is noted, and where in the state directory.
pub(crate) trait Noted:
    Clone + Default + PartialEq + Serialize + DeserializeOwned + Send + 'static
{
    const FILE: &str;
}

impl Noted for Troubles {
    const FILE: &str = "troubles.json";
}

impl Noted for Standing {
    const FILE: &str = "traffic.json";
}

/// Alarms.
impl Noted for AlarmNotes {
    const FILE: &str = "alarms.json";
}

impl Noted for OpsNote {
    const FILE: &str = "ops.json";
}

/// Writes such a file once. It says nothing of now until it is written.
pub(super) fn write<T: Noted>(state_dir: &Path, notes: &T) -> io::Result<()> {
    state_dir::write_file(&state_dir.join(T::FILE), &serde_json::to_vec_pretty(notes)?)
}

/// Keeps such a file. On a full disk it says what it said last, until there is room; alarms and metrics don't need it.
pub(super) struct NoteFile<T> {
    path: PathBuf,
    /// What is in the file, as far as is known.
    written: Option<T>,
    writing: Option<(T, JoinHandle<io::Result<()>>)>,
}

impl<T: Noted> NoteFile<T> {
    pub(super) fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join(T::FILE), written: None, writing: None }
    }

    /// Brings the file up to date, without waiting for the disk.
    pub(super) async fn keep(&mut self, notes: &T) {
        if let Some((what, writing)) = self.writing.take() {
            if !writing.is_finished() {
                self.writing = Some((what, writing));
                return;
            }
            match writing.await {
                Ok(Ok(())) => self.written = Some(what),
                Ok(Err(error)) => {
                    tracing::debug!(file = T::FILE, %error, "the file can't be written; it is tried again");
                }
                Err(_) => {} // the process ends
            }
        }
        if self.written.as_ref() != Some(notes) {
            let (path, what) = (self.path.clone(), notes.clone());
            let write = move || state_dir::write_file(&path, &serde_json::to_vec_pretty(&what)?);
            let writing = tokio::task::spawn_blocking(write);
            self.writing = Some((notes.clone(), writing));
        }
    }
}

/// What the daemon that runs on this machine has noted. What one that has ended noted last says nothing of now.
pub(crate) fn read<T: Noted>(state_dir: &Path) -> anyhow::Result<T> {
    let path = state_dir.join(T::FILE);
    let doing = || format!("can't read {}", path.display());
    if !postrider_sqlite::is_running(state_dir).with_context(doing)? {
        return Ok(T::default());
    }
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).with_context(doing),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        Err(error) => Err(error).with_context(doing),
    }
}

#[cfg(test)]
mod tests {
    use postrider_actors::model::{
        time::UnixMs,
        trouble::{FeedTroubles, Trouble},
    };
    use postrider_sqlite::InstanceLock;

    use super::*;

    #[tokio::test]
    async fn commands_read_what_was_noted() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read::<Troubles>(dir.path()).unwrap(), Troubles::default(), "no daemon ran yet");
        let daemon = InstanceLock::acquire(dir.path()).unwrap();
        assert_eq!(read::<Troubles>(dir.path()).unwrap(), Troubles::default(), "it has noted nothing yet");
        let mut file = NoteFile::<Troubles>::new(dir.path());
        let trouble = Trouble { since: UnixMs(7), reason: "no room".into() };
        let held = [("a.csv".to_owned(), trouble.clone())].into();
        let feed = FeedTroubles { parked: Some(trouble.clone()), held };
        let troubles = Troubles {
            feeds: [("alerts".to_owned(), feed)].into(),
            destinations: [("support".to_owned(), trouble)].into(),
        };
        for expected in [&troubles, &Troubles::default()] {
            while file.written.as_ref() != Some(expected) {
                file.keep(expected).await;
                tokio::task::yield_now().await;
            }
            assert_eq!(read::<Troubles>(dir.path()).unwrap(), *expected);
        }
        fs::write(dir.path().join(Troubles::FILE), "{").unwrap();
        assert!(read::<Troubles>(dir.path()).is_err());
        drop(daemon);
        assert_eq!(read::<Troubles>(dir.path()).unwrap(), Troubles::default(), "it has ended");
    }
}
