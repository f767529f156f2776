//! Who works on which claimed file.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    model::{backoff::Backoff, time::MonoMs},
    ports::{ClaimedFile, Clock},
};

/// Between two tries of a file that can't be read, moved away or reported: what fails (a disk that is full, no file
/// descriptors, a read error) concerns the machine, and passes or is repaired without us.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// Not as long as these owners live: a new configuration brings new ones.
const NEVER: MonoMs = MonoMs(u64::MAX);

/// The claims that somebody works on, and those that are set aside for a while. A claim that is in neither belongs to
/// nobody, however that came about: the watcher looks for such claims again and again and takes them (F6, F7).
#[derive(Clone)]
pub struct Owners {
    clock: Arc<dyn Clock>,
    claims: Arc<Mutex<Claims>>,
}

#[derive(Default)]
struct Claims {
    by_directory: HashMap<PathBuf, Claim>,
    /// Counts the changes of [`Owners::failing`].
    changes: u64,
}

struct Claim {
    name: String,
    /// When anybody may take it; `None` while somebody has it.
    free_from: Option<MonoMs>,
    /// Tries that have failed in a row, and why the last one did.
    failures: u32,
    reason: String,
}

impl Owners {
    /// Nobody has anything.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, claims: Arc::default() }
    }

    /// Whether the claim that `directory` holds is somebody's, or is to be left alone for now.
    pub fn is_taken(&self, directory: &Path) -> bool {
        self.lock().is_taken(directory, self.clock.mono())
    }

    /// Makes the caller the owner of `file`, unless somebody is.
    pub fn take(&self, file: &ClaimedFile) -> Option<Owner> {
        let directory = file.directory().to_owned();
        let mut claims = self.lock();
        if claims.is_taken(&directory, self.clock.mono()) {
            return None;
        }
        let new = || Claim { name: file.display_name(), free_from: None, failures: 0, reason: String::new() };
        claims.by_directory.entry(directory.clone()).or_insert_with(new).free_from = None;
        Some(Owner { owners: self.clone(), directory, reason: Mutex::default() })
    }

    /// Forgets claims that are not there any more.
    pub fn retain(&self, directories: &HashSet<PathBuf>) {
        let mut claims = self.lock();
        let before = claims.by_directory.len();
        claims
            .by_directory
            .retain(|directory, claim| claim.free_from.is_none() || directories.contains(directory));
        claims.changes += u64::from(claims.by_directory.len() < before);
    }

    /// The files that could not be worked on when that was tried last, and why.
    pub fn failing(&self) -> Vec<(String, String)> {
        let claims = self.lock();
        let failing = claims.by_directory.values().filter(|claim| claim.failures > 0);
        failing.map(|claim| (claim.name.clone(), claim.reason.clone())).collect()
    }

    /// Changes whenever [`Owners::failing`] does.
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// When the first of them is to be tried again.
    pub fn next_due(&self) -> Option<MonoMs> {
        let free_from = |claim: &Claim| claim.free_from.filter(|from| *from != NEVER);
        self.lock().by_directory.values().filter_map(free_from).min()
    }

    fn lock(&self) -> MutexGuard<'_, Claims> {
        // Changed by single inserts and removals only.
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claims {
    fn is_taken(&self, directory: &Path, now: MonoMs) -> bool {
        self.by_directory.get(directory).is_some_and(|claim| claim.free_from.is_none_or(|from| now < from))
    }
}

/// The right to work on a claim. Once it is dropped the claim is finished, or anybody's.
pub struct Owner {
    owners: Owners,
    directory: PathBuf,
    /// Why it can't be worked on now, and whether time alone may change that.
    reason: Mutex<Option<(String, bool)>>,
}

impl Owner {
    /// The claim can't be worked on now: when this is dropped, it is set aside for a while. Logged once, not at every try.
    pub fn set_aside(&self, feed: &str, reason: impl Into<String>) {
        let reason = reason.into();
        let claims = self.owners.lock();
        if let Some(claim) = claims.by_directory.get(&self.directory) {
            if claim.failures == 0 {
                tracing::warn!(
                    feed,
                    name = claim.name,
                    reason,
                    "a claimed file has to wait; it is tried again"
                );
            } else {
                tracing::debug!(feed, name = claim.name, reason, "a claimed file still has to wait");
            }
        }
        drop(claims);
        self.leave(reason, true);
    }

    /// The claim can't be worked on as the configuration is: when this is dropped, it is left alone until there is another
    /// one, or the process starts anew.
    pub fn hold(&self, feed: &str, reason: impl Into<String>) {
        let reason = reason.into();
        if let Some(claim) = self.owners.lock().by_directory.get(&self.directory) {
            tracing::error!(
                feed,
                name = claim.name,
                reason,
                "a file is held, nothing of it is accepted: it is tried again when the configuration is reloaded"
            );
        }
        self.leave(reason, false);
    }

    fn leave(&self, reason: String, may_pass: bool) {
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some((reason, may_pass));
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut claims = self.owners.lock();
        let now = self.owners.clock.mono();
        if let (Some((reason, may_pass)), Some(claim)) =
            (reason, claims.by_directory.get_mut(&self.directory))
        {
            claim.failures = claim.failures.saturating_add(1);
            claim.reason = reason;
            // No jitter: the files of one machine meet nobody else's.
            claim.free_from = Some(if may_pass { now.after(BACKOFF.bound(claim.failures)) } else { NEVER });
            claims.changes += 1;
        } else {
            let claim = claims.by_directory.remove(&self.directory);
            claims.changes += u64::from(claim.is_some_and(|claim| claim.failures > 0));
        }
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::{model::time::UnixMs, testing::FakeClock};

    fn file(claim: &str) -> ClaimedFile {
        ClaimedFile {
            name: "a.csv".into(),
            path: Path::new(claim).join("a.csv"),
            claimed_at: UnixMs(0),
            bytes: 0,
            expected: None,
            conditions: None,
            fingerprint: [0; 5],
        }
    }

    #[test]
    fn a_claim_has_one_owner_and_is_anybodys_when_that_one_is_gone() {
        let owners = Owners::new(Arc::new(FakeClock::at(UnixMs(0))));
        let owner = owners.take(&file("/c/1")).expect("it is nobody's");
        assert!(owners.is_taken(Path::new("/c/1")) && !owners.is_taken(Path::new("/c/2")));
        assert!(owners.take(&file("/c/1")).is_none());
        owners.retain(&HashSet::new());
        assert!(owners.is_taken(Path::new("/c/1")), "it is being worked on");
        drop(owner);
        assert!(!owners.is_taken(Path::new("/c/1")));
        assert_eq!((owners.changes(), owners.next_due()), (0, None));
    }

    #[test]
    fn f06_what_is_set_aside_is_tried_again_later_and_later_and_named_until_it_is_done() {
        let clock = Arc::new(FakeClock::at(UnixMs(0)));
        let owners = Owners::new(clock.clone());
        let mut waits = Vec::new();
        for _ in 0..9 {
            let owner = owners.take(&file("/c/1")).expect("it is due");
            owner.set_aside("feed", "no room");
            drop(owner);
            assert_eq!(owners.failing(), [("a.csv".to_owned(), "no room".to_owned())]);
            assert!(owners.is_taken(Path::new("/c/1")), "not yet");
            let wait = owners.next_due().expect("it is set aside").since(clock.mono());
            clock.advance(wait);
            waits.push(wait.as_millis());
        }
        assert_eq!(waits, [500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000, 30_000]);
        let owner = owners.take(&file("/c/1")).expect("it is due");
        assert_eq!(owners.failing().len(), 1, "not done yet");
        drop(owner);
        assert!(owners.failing().is_empty());

        let owner = owners.take(&file("/c/2")).expect("it is nobody's");
        owner.set_aside("feed", "no room");
        drop(owner);
        let before = owners.changes();
        owners.retain(&HashSet::new());
        assert!(owners.failing().is_empty() && owners.changes() > before, "somebody removed it");
    }

    #[test]
    fn f67_what_is_held_is_left_alone_and_named() {
        let clock = Arc::new(FakeClock::at(UnixMs(0)));
        let owners = Owners::new(clock.clone());
        let owner = owners.take(&file("/c/1")).expect("it is nobody's");
        owner.hold("feed", "the template needs data.nmae");
        drop(owner);
        clock.advance(Duration::from_hours(1_000));
        assert!(owners.is_taken(Path::new("/c/1")));
        assert_eq!(owners.next_due(), None);
        assert_eq!(owners.failing(), [("a.csv".to_owned(), "the template needs data.nmae".to_owned())]);
    }
}
