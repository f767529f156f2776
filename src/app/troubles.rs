//! The troubles of this machine, for commands: a small file beside the store. A dropped file that can't be read is in no
//! store, and a store that several machines share knows nothing of this one's directories and name lookups.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use postrider_actors::model::trouble::Troubles;
use tokio::task::JoinHandle;

use super::state_dir;

/// The file's name in the state directory.
const FILE: &str = "troubles.json";

/// Keeps the file as the board is. On a full disk it says what it said last, until there is room; alarms and metrics
/// don't need it.
pub(super) struct TroubleFile {
    path: PathBuf,
    /// What is in the file, as far as is known.
    written: Option<Troubles>,
    writing: Option<(Troubles, JoinHandle<io::Result<()>>)>,
}

impl TroubleFile {
    pub(super) fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join(FILE), written: None, writing: None }
    }

    /// Brings the file up to date, without waiting for the disk.
    pub(super) async fn keep(&mut self, troubles: &Troubles) {
        if let Some((what, writing)) = self.writing.take() {
            if !writing.is_finished() {
                self.writing = Some((what, writing));
                return;
            }
            match writing.await {
                Ok(Ok(())) => self.written = Some(what),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "the file of troubles can't be written; it is tried again");
                }
                Err(_) => {} // the process ends
            }
        }
        if self.written.as_ref() != Some(troubles) {
            let (path, what) = (self.path.clone(), troubles.clone());
            let write = move || state_dir::write_file(&path, &serde_json::to_vec_pretty(&what)?);
            let writing = tokio::task::spawn_blocking(write);
            self.writing = Some((troubles.clone(), writing));
        }
    }
}

/// The troubles that the daemon of this machine noted last. None if it never ran.
pub(crate) fn read(state_dir: &Path) -> anyhow::Result<Troubles> {
    let path = state_dir.join(FILE);
    let doing = || format!("can't read {}", path.display());
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).with_context(doing),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Troubles::default()),
        Err(error) => Err(error).with_context(doing),
    }
}

#[cfg(test)]
mod tests {
    use postrider_actors::model::{
        time::UnixMs,
        trouble::{FeedTroubles, Trouble},
    };

    use super::*;

    #[tokio::test]
    async fn commands_read_what_was_noted() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), Troubles::default(), "no daemon ran yet");
        let mut file = TroubleFile::new(dir.path());
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
            assert_eq!(read(dir.path()).unwrap(), *expected);
        }
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(read(dir.path()).is_err());
    }
}
