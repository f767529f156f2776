//! When a dropped file is complete, and which names are files at all.
//!
//! A file is complete when it was renamed into place or closed after writing (the directory's watch
//! reports that), or when it has not changed for `stable_after`. A feed that requires sidecars takes a file
//! only together with its `NAME.done`: the sidecar is written last. `NAME.toml` is written first, and is never a file itself.
//!
//! [`StableFiles`] is given every scan and every change and returns the names that may be taken. It
//! remembers a bounded number of names. One that it can't remember is taken all the same, once its own
//! timestamp is `stable_after` old.

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    time::Duration,
};

use postrider_settings::Directory;

use super::{
    time::{MonoMs, UnixMs},
    trouble::FILES_MAX,
};

/// How long a file that could not be taken is held before it is offered again unchanged: the obstacle (a
/// directory's permissions, a full disk) may be gone.
pub const HOLD: Duration = Duration::from_mins(1);

/// What a name in a feed's directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameKind<'a> {
    /// A file of rows.
    File,
    /// The sidecar of the file of this name that says that it is complete.
    Sidecar(&'a OsStr),
    /// The sidecar of the file of this name that says when its messages may go.
    Terms(&'a OsStr),
    /// Unfinished, or not meant for us: it starts with `.` or ends in `.part` or `.tmp`; or one of our own directories.
    Ignored,
}

impl<'a> NameKind<'a> {
    /// Judges a name by itself.
    pub fn of(name: &'a OsStr) -> Self {
        let bytes = name.as_bytes();
        // These two are where finished files go. A plain file in their place is in our way (F58).
        if matches!(bytes, b"done" | b"failed") {
            return Self::Ignored;
        }
        if bytes.is_empty() || bytes[0] == b'.' || bytes.ends_with(b".part") || bytes.ends_with(b".tmp") {
            return Self::Ignored;
        }
        if let Some(file) = bytes.strip_suffix(b".done") {
            return Self::Sidecar(OsStr::from_bytes(file));
        }
        bytes.strip_suffix(b".toml").map_or(Self::File, |file| Self::Terms(OsStr::from_bytes(file)))
    }
}

/// A file as a scan saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting<'a> {
    /// Its name.
    pub name: &'a OsStr,
    /// Its size.
    pub bytes: u64,
    /// When it last changed.
    pub modified: UnixMs,
    /// Whether it has a sidecar.
    pub has_sidecar: bool,
}

/// What is remembered of a name that was not taken yet.
#[derive(Debug)]
struct KnownFile {
    /// Size, time of change and sidecar as last seen; `None` until a scan has seen it.
    seen: Option<(u64, UnixMs, bool)>,
    unchanged_since: MonoMs,
    /// The watch said that it is complete.
    complete: bool,
    /// It was returned as ready and has not changed since.
    offered: bool,
    /// It could not be taken; it is not offered before then.
    held_until: Option<MonoMs>,
    /// The last pass that saw it.
    pass: u64,
}

/// Decides which files are complete. Driven by the file watcher; knows no clock and no directory.
#[derive(Debug)]
pub struct StableFiles {
    stable_after: Duration,
    require_done: bool,
    names_max: usize,
    names: HashMap<OsString, KnownFile>,
    /// Counts the scans of the whole directory; one that is cut short is continued by the next.
    pass: u64,
    /// Files that could not be taken, and why; [`FILES_MAX`] at most.
    held: BTreeMap<OsString, Held>,
    /// Counts the changes of `held`.
    held_changes: u64,
}

/// Why a file is held.
#[derive(Debug)]
struct Held {
    reason: String,
    /// The last pass that saw it.
    pass: u64,
}

impl StableFiles {
    /// Remembers nothing yet, and `names_max` names at most.
    pub fn new(directory: &Directory, names_max: usize) -> Self {
        let &Directory { stable_after, require_done, .. } = directory;
        Self {
            stable_after,
            require_done,
            names_max,
            names: HashMap::new(),
            pass: 0,
            held: BTreeMap::new(),
            held_changes: 0,
        }
    }

    /// Takes note of names that the watch reports as complete, and returns those that may be taken now.
    /// They are offered again by later scans until they are claimed, held or gone.
    pub fn observe_change<'a>(
        &mut self,
        now: MonoMs,
        complete: impl IntoIterator<Item = &'a OsStr>,
    ) -> Vec<OsString> {
        let mut ready = Vec::new();
        let mut reported = HashSet::new();
        for name in complete {
            let name = match NameKind::of(name) {
                // A sidecar is written last, so its file is complete.
                NameKind::Sidecar(file) if NameKind::of(file) == NameKind::File => file,
                NameKind::File if !self.require_done => name,
                // It says nothing of whether its file is complete; but it may be what kept it from being taken.
                NameKind::Terms(file) if self.is_held(file) => file,
                _ => continue,
            };
            let pass = self.pass;
            if let Some(known) = self.remember(name, now) {
                known.complete = true;
                known.offered = true;
                known.held_until = None;
                // A running scan may have passed its place before it came: it counts as seen by that scan.
                known.pass = pass;
                self.release(name);
            }
            if reported.insert(name) {
                ready.push(name.to_owned());
            }
        }
        ready
    }

    /// Takes note of what a scan saw and returns the names that may be taken now, least recently changed
    /// first. `wall` is the clock that file times are taken from. `truncated` says that the scan did
    /// not see the whole directory; the next one continues.
    pub fn observe_scan<'a>(
        &mut self,
        now: MonoMs,
        wall: UnixMs,
        sightings: impl IntoIterator<Item = Sighting<'a>>,
        truncated: bool,
    ) -> Vec<OsString> {
        let (stable_after, require_done) = (self.stable_after, self.require_done);
        let pass = self.pass;
        let mut ready = Vec::new();
        for sighting in sightings {
            if NameKind::of(sighting.name) != NameKind::File {
                continue;
            }
            // A time in the future proves nothing. A file's own time proves nothing of its sidecar, which may
            // be half written: two scans must see it unchanged.
            let left_alone = sighting.modified <= wall
                && wall.since(sighting.modified) >= stable_after
                && !sighting.has_sidecar;
            if let Some(held) = self.held.get_mut(sighting.name) {
                held.pass = pass;
            }
            let is_ready = match self.remember(sighting.name, now) {
                Some(known) => {
                    known.pass = known.pass.max(pass);
                    let seen = (sighting.bytes, sighting.modified, sighting.has_sidecar);
                    let before = known.seen.replace(seen);
                    if before.is_some_and(|before| before != seen) {
                        known.unchanged_since = now;
                        known.complete = false;
                        known.offered = false;
                        known.held_until = None;
                    }
                    let rests = known.held_until.is_some_and(|until| now < until);
                    let is_stable = now.since(known.unchanged_since) >= stable_after;
                    let is_ready = !rests && (known.complete || left_alone || is_stable);
                    known.offered |= is_ready;
                    if known.held_until.is_none() {
                        self.release(sighting.name);
                    }
                    is_ready
                }
                None => left_alone,
            };
            if is_ready && (sighting.has_sidecar || !require_done) {
                ready.push((sighting.modified, sighting.name.to_owned()));
            }
        }
        if !truncated {
            self.names.retain(|_, known| known.pass >= pass);
            let held = self.held.len();
            self.held.retain(|_, held| held.pass >= pass);
            self.held_changes += u64::from(self.held.len() < held);
            self.pass += 1;
        }
        ready.sort_unstable();
        ready.into_iter().map(|(_, name)| name).collect()
    }

    /// Forgets a name: it was claimed, or it is gone.
    pub fn forget(&mut self, name: &OsStr) {
        self.names.remove(name);
        self.release(name);
    }

    /// Holds back a file that could not be taken until it changes, or for [`HOLD`]. Returns whether that is news: a file
    /// is reported once, not at every try (F28).
    pub fn hold(&mut self, name: &OsStr, now: MonoMs, reason: &str) -> bool {
        if let Some(known) = self.remember(name, now) {
            known.offered = false;
            known.held_until = Some(now.after(HOLD));
        }
        self.refuse(name, reason)
    }

    /// Takes note of a name that a scan refuses; it is looked at again by every scan. Returns whether that is news.
    pub fn refuse(&mut self, name: &OsStr, reason: &str) -> bool {
        let pass = self.pass;
        if let Some(held) = self.held.get_mut(name) {
            held.pass = pass;
            if held.reason == reason {
                return false;
            }
            reason.clone_into(&mut held.reason);
        } else {
            if self.held.len() >= FILES_MAX {
                return false; // there are a thousand examples already
            }
            self.held.insert(name.to_owned(), Held { reason: reason.to_owned(), pass });
        }
        self.held_changes += 1;
        true
    }

    /// The files that are held and those that were refused, with the reason.
    pub fn held(&self) -> impl Iterator<Item = (&OsStr, &str)> {
        self.held.iter().map(|(name, held)| (name.as_os_str(), held.reason.as_str()))
    }

    /// Changes whenever [`StableFiles::held`] does.
    pub fn held_changes(&self) -> u64 {
        self.held_changes
    }

    fn is_held(&self, name: &OsStr) -> bool {
        self.names.get(name).is_some_and(|known| known.held_until.is_some())
    }

    fn release(&mut self, name: &OsStr) {
        self.held_changes += u64::from(self.held.remove(name).is_some());
    }

    /// When a scan may find a name ready that was not offered yet; `None` if only a change can. Names that
    /// were offered need no scan, however long the caller takes to claim them.
    pub fn next_due(&self) -> Option<MonoMs> {
        let require_done = self.require_done;
        let due = |known: &KnownFile| match (known.held_until, known.seen) {
            (Some(until), _) if !known.offered => Some(until),
            (None, Some((_, _, false))) if require_done => None,
            _ if known.offered => None,
            _ => Some(known.unchanged_since.after(self.stable_after)),
        };
        self.names.values().filter_map(due).min()
    }

    /// How many names it remembers.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether it remembers none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    fn remember(&mut self, name: &OsStr, now: MonoMs) -> Option<&mut KnownFile> {
        let room = self.names.len() < self.names_max;
        match self.names.entry(name.to_owned()) {
            Entry::Occupied(known) => Some(known.into_mut()),
            Entry::Vacant(free) if room => Some(free.insert(KnownFile {
                seen: None,
                unchanged_since: now,
                complete: false,
                offered: false,
                held_until: None,
                pass: self.pass,
            })),
            Entry::Vacant(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use postrider_settings::Keys as _;
    use proptest::prelude::*;

    const STABLE_AFTER: u64 = 2000;
    /// The wall clock runs this far ahead of the monotonic one in these tests.
    const EPOCH: u64 = 1_000_000;

    fn stable_files(sidecar_required: bool) -> StableFiles {
        let stable_after = Duration::from_millis(STABLE_AFTER);
        StableFiles::new(
            &Directory { stable_after, require_done: sidecar_required, ..Directory::declared() },
            8,
        )
    }

    fn seen(name: &str, bytes: u64, modified: u64) -> Sighting<'_> {
        Sighting { name: OsStr::new(name), bytes, modified: UnixMs(EPOCH + modified), has_sidecar: false }
    }

    fn scan(files: &mut StableFiles, now: u64, sightings: &[Sighting<'_>]) -> Vec<OsString> {
        files.observe_scan(MonoMs(now), UnixMs(EPOCH + now), sightings.iter().copied(), false)
    }

    fn change(files: &mut StableFiles, now: u64, name: &str) -> Vec<OsString> {
        files.observe_change(MonoMs(now), [OsStr::new(name)])
    }

    #[test]
    fn names_that_are_no_files_of_rows_are_left_alone() {
        for name in [".x", "", "x.part", "x.csv.tmp", ".", "..", ".done", "x.done.part", "done", "failed"] {
            assert_eq!(NameKind::of(OsStr::new(name)), NameKind::Ignored, "{name:?}");
        }
        for name in ["x", "x.csv", "part", "tmp", "done2", "x.done.csv", "-rf", "a\nb"] {
            assert_eq!(NameKind::of(OsStr::new(name)), NameKind::File, "{name:?}");
        }
        assert_eq!(NameKind::of(OsStr::new("x.csv.done")), NameKind::Sidecar(OsStr::new("x.csv")));
        assert_eq!(
            NameKind::of(OsStr::from_bytes(b"\xff.done")),
            NameKind::Sidecar(OsStr::from_bytes(b"\xff"))
        );
        let mut files = stable_files(false);
        assert!(change(&mut files, 0, "x.part").is_empty());
        assert!(scan(&mut files, 99_999, &[seen(".x", 1, 0), seen("y.done", 1, 0)]).is_empty());
    }

    #[test]
    fn a_file_that_was_closed_or_renamed_is_taken_at_once() {
        let mut files = stable_files(false);
        assert_eq!(change(&mut files, 0, "a"), ["a"]);
        assert_eq!(files.next_due(), None, "nothing is waited for");
        // Not claimed yet: a scan offers it again, and does not wait for it to be stable.
        assert_eq!(scan(&mut files, 10, &[seen("a", 1, 5)]), ["a"]);
        files.forget(OsStr::new("a"));
        assert!(files.is_empty());
    }

    #[test]
    fn a_file_that_grows_is_taken_when_it_stood_still() {
        let mut files = stable_files(false);
        assert!(scan(&mut files, 0, &[seen("a", 1, 0)]).is_empty());
        assert_eq!(files.next_due(), Some(MonoMs(STABLE_AFTER)));
        assert!(scan(&mut files, 1500, &[seen("a", 2, 1400)]).is_empty());
        assert!(scan(&mut files, 3399, &[seen("a", 2, 1400)]).is_empty());
        assert_eq!(files.next_due(), Some(MonoMs(1500 + STABLE_AFTER)));
        assert_eq!(scan(&mut files, 3400, &[seen("a", 2, 1400)]), ["a"]);
        assert_eq!(files.next_due(), None, "it was offered");
    }

    #[test]
    fn a_file_that_was_left_alone_long_ago_is_taken_at_once_and_a_time_to_come_proves_nothing() {
        let mut files = stable_files(false);
        let sightings = [seen("new", 1, 5000), seen("b", 1, 10), seen("a", 1, 10), seen("oldest", 1, 1)];
        assert_eq!(scan(&mut files, 5000, &sightings), ["oldest", "a", "b"]);
        let future = [seen("future", 1, 999_999)];
        assert!(scan(&mut files, 5000, &future).is_empty());
        assert_eq!(scan(&mut files, 5000 + STABLE_AFTER, &future), ["future"]);
    }

    #[test]
    fn a_held_file_is_offered_again_when_its_terms_are_corrected() {
        let mut files = stable_files(false);
        assert_eq!(NameKind::of(OsStr::new("x.csv.gz.toml")), NameKind::Terms(OsStr::new("x.csv.gz")));
        assert!(change(&mut files, 1, "a.toml").is_empty(), "it says nothing of a file that is not there");
        assert_eq!(change(&mut files, 2, "a"), ["a"]);
        assert!(change(&mut files, 3, "a.toml").is_empty(), "nor of one that is offered");
        assert!(files.hold(OsStr::new("a"), MonoMs(4), "a.toml is wrong"));
        assert_eq!(change(&mut files, 5, "a.toml"), ["a"]);
        assert_eq!(files.held().count(), 0);
    }

    #[test]
    fn a_required_sidecar_is_waited_for_and_speaks_for_its_file() {
        let mut files = stable_files(true);
        assert!(change(&mut files, 0, "a").is_empty());
        assert!(scan(&mut files, 90_000, &[seen("a", 1, 0)]).is_empty());
        assert_eq!(files.next_due(), None, "only a change can help");
        assert_eq!(change(&mut files, 90_001, "a.done"), ["a"]);

        // Found by a scan: the sidecar may be half written, so it must be seen unchanged.
        let both = [Sighting { has_sidecar: true, ..seen("b", 1, 0) }];
        assert!(scan(&mut files, 100_000, &both).is_empty());
        assert_eq!(scan(&mut files, 100_000 + STABLE_AFTER, &both), ["b"]);
    }

    #[test]
    fn f28_a_file_that_can_t_be_taken_is_news_once_and_offered_again_when_it_changes() {
        let mut files = stable_files(false);
        let file = [seen("a", 1, 0)];
        assert_eq!(scan(&mut files, 5000, &file), ["a"]);
        assert!(files.hold(OsStr::new("a"), MonoMs(5000), "locked"));
        assert_eq!(files.held().collect::<Vec<_>>(), [(OsStr::new("a"), "locked")]);
        assert!(scan(&mut files, 6000, &file).is_empty());
        let later = 5000 + HOLD.as_millis() as u64;
        assert_eq!(files.next_due(), Some(MonoMs(later)));
        assert_eq!(scan(&mut files, later, &file), ["a"]);
        assert!(!files.hold(OsStr::new("a"), MonoMs(later), "locked"), "reported before");
        assert!(files.hold(OsStr::new("a"), MonoMs(later), "gone wrong"), "for another reason");
        // chmod: the time of change moves on.
        let changed = [seen("a", 1, later + 1)];
        assert!(scan(&mut files, later + 1, &changed).is_empty());
        assert_eq!(files.held().count(), 0);
        assert_eq!(scan(&mut files, later + 1 + STABLE_AFTER, &changed), ["a"]);
        let news = files.hold(OsStr::new("a"), MonoMs(later + STABLE_AFTER), "locked");
        assert!(news, "it has changed since");
        files.forget(OsStr::new("a"));
        assert_eq!(files.held().count(), 0);
    }

    #[test]
    fn f26_what_a_scan_refuses_is_news_once_and_forgotten_once_it_is_gone() {
        let mut files = stable_files(false);
        assert!(files.refuse(OsStr::new("link"), "a link"));
        scan(&mut files, 0, &[]);
        assert!(!files.refuse(OsStr::new("link"), "a link"));
        scan(&mut files, 1, &[]);
        let (changes, held) = (files.held_changes(), files.held().count());
        assert_eq!(held, 1);
        scan(&mut files, 2, &[]);
        assert_eq!(files.held().count(), 0, "a whole pass has not seen it");
        assert_ne!(files.held_changes(), changes);
        // Replaced by a file.
        files.refuse(OsStr::new("a"), "a link");
        scan(&mut files, 3, &[seen("a", 1, 0)]);
        assert_eq!(files.held().count(), 0);
        for n in 0..2 * FILES_MAX {
            files.refuse(OsStr::new(&n.to_string()), "a link");
        }
        assert_eq!(files.held().count(), FILES_MAX);
    }

    #[test]
    fn names_that_vanish_are_forgotten_after_a_whole_pass() {
        let mut files = stable_files(false);
        scan(&mut files, 0, &[seen("a", 1, 0), seen("b", 1, 0)]);
        files.observe_scan(MonoMs(1), UnixMs(EPOCH + 1), [seen("a", 1, 0)], true);
        assert_eq!(files.len(), 2, "the scan was cut short");
        files.observe_scan(MonoMs(2), UnixMs(EPOCH + 2), [seen("c", 1, 0)], false);
        assert_eq!(files.len(), 2, "b was not seen in the whole pass");
        // An event that comes while a scan runs outlives it.
        change(&mut files, 3, "d");
        scan(&mut files, 3, &[]);
        assert_eq!(files.len(), 1);
        scan(&mut files, 4, &[]);
        assert!(files.is_empty());
    }

    proptest! {
        /// However many names there are, memory is bounded and every file is offered in the end.
        #[test]
        fn f29_more_names_than_it_remembers(count in 1usize..60, step in 1u64..3000) {
            let names: Vec<_> = (0..count).map(|n| format!("f{n}")).collect();
            let mut files = stable_files(false);
            let mut here: Vec<_> = names.iter().map(|name| seen(name, 1, 0)).collect();
            let mut now = 0;
            while !here.is_empty() {
                prop_assert!(now < 100 * STABLE_AFTER, "{} of {count} are never taken", here.len());
                for name in scan(&mut files, now, &here) {
                    here.retain(|sighting| sighting.name != name);
                    files.forget(&name);
                }
                prop_assert!(files.len() <= 8);
                now += step;
            }
        }
    }
}
