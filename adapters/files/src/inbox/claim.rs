//! Claiming a file: renaming it out of the drop directory, and checking what was claimed.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::atomic::Ordering,
};

use postrider_actors::{
    failpoint,
    model::{conditions::Conditions, stable::NameKind, time::UnixMs},
    ports::{ClaimError, ClaimedFile, Expected, Unowned},
};
use rustix::{fs::Stat, io::Errno};
use serde::{Deserialize, Serialize};

use super::{
    DONE, DirectoryInbox, TERMS, TERMS_BYTES_MAX,
    dir::{Dir, objection, while_doing},
    fingerprint, sidecar, sidecar_name,
};

/// In the feed's directory, for files on their way to another file system.
pub(super) const STAGING: &str = ".postrider";
/// In a claim's directory. No claimed file's name starts with a dot.
const NOTE: &str = ".claim";
/// Starts the name of a claim's directory while it is copied.
const COPY: &str = ".copy-";
/// Far more than a note takes.
const NOTE_BYTES_MAX: u64 = 16 * 1024;

/// What a restart must know of a claim. Not synced: a note that a power cut took is made up again.
#[derive(Serialize, Deserialize)]
struct Note {
    /// Bytes: a name need not be text.
    name: Vec<u8>,
    claimed_at: UnixMs,
    bytes: u64,
    fingerprint: [u64; 5],
}

pub(super) fn claim(inbox: &DirectoryInbox, name: &OsStr, now: UnixMs) -> Result<ClaimedFile, ClaimError> {
    if NameKind::of(name) != NameKind::File || name.as_bytes().iter().any(|&byte| byte == b'/' || byte == 0) {
        return Err(ClaimError::Refused("its name is not that of a file of rows".to_owned()));
    }
    let feed = inbox.directory()?;
    let opened = inspect(&feed, name)?.ok_or(ClaimError::Gone)?;
    let expected = read_expected(&feed, name)?;
    if expected.is_none() && inbox.config.settings.require_done {
        return Err(ClaimError::Refused("its sidecar, NAME.done, is missing".to_owned()));
    }
    let conditions = read_conditions(inbox, &feed, name)?;
    let endings = [expected.as_ref().map(|_| DONE), conditions.as_ref().map(|_| TERMS)];
    let sidecars: Vec<_> = endings.into_iter().flatten().map(|ending| sidecar_name(name, ending)).collect();
    let home = take(inbox, &feed, name, &opened, &sidecars, now)?;
    failpoint!("inbox.taken");
    let taken = home.stat(name)?.ok_or(ClaimError::Gone)?;
    Ok(note(&home, name, now, Sidecars { expected, conditions }, &taken))
}

/// Looks at `name` without touching anything but a regular file; `None` if it does not exist.
fn inspect(feed: &Dir, name: &OsStr) -> Result<Option<Stat>, ClaimError> {
    let refuse = |stat: &Stat| objection(stat).map(|why| ClaimError::Refused(why.to_owned()));
    let Some(stat) = feed.stat(name)? else { return Ok(None) };
    // Opening a device may do things, so it is looked at before.
    if let Some(refused) = refuse(&stat) {
        return Err(refused);
    }
    // It must be readable before it is ours: a file that we can't read stays with its dropper (F28).
    let file = match feed.read(name) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => return Err(ClaimError::Refused("it is a symbolic link".to_owned())),
        Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => {
            return Err(while_doing(error, "can't read files").into());
        }
        Err(error) => return Err(ClaimError::Unreadable(while_doing(error, "can't read it"))),
    };
    let stat = rustix::fs::fstat(&file).map_err(io::Error::from)?;
    refuse(&stat).map_or(Ok(Some(stat)), Err)
}

/// What the sidecars of a claimed file say.
#[derive(Default)]
struct Sidecars {
    expected: Option<Expected>,
    conditions: Option<Conditions>,
}

fn read_expected(feed: &Dir, name: &OsStr) -> Result<Option<Expected>, ClaimError> {
    let bytes = read_sidecar(feed, &sidecar_name(name, DONE), sidecar::SIDECAR_BYTES_MAX)?;
    bytes.map(|bytes| sidecar::parse(name, &bytes)).transpose().map_err(ClaimError::Refused)
}

fn read_conditions(
    inbox: &DirectoryInbox,
    feed: &Dir,
    name: &OsStr,
) -> Result<Option<Conditions>, ClaimError> {
    let sidecar = sidecar_name(name, TERMS);
    let bytes = read_sidecar(feed, &sidecar, TERMS_BYTES_MAX)?;
    bytes.map(|bytes| conditions(inbox, &sidecar, &bytes)).transpose().map_err(ClaimError::Refused)
}

/// What `NAME.toml` says; `Err` with every problem of it, by line and column.
fn conditions(inbox: &DirectoryInbox, sidecar: &OsStr, bytes: &[u8]) -> Result<Conditions, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| format!("{} is not UTF-8", sidecar.display()))?;
    let read = Conditions::of_sidecar(text, Path::new(sidecar), &inbox.config.conditions);
    read.map_err(|problems| problems.to_string().replace('\n', "; "))
}

/// The contents of a sidecar, up to `bytes_max` bytes; `None` if the file has no sidecar.
fn read_sidecar(feed: &Dir, sidecar: &OsStr, bytes_max: u64) -> Result<Option<Vec<u8>>, ClaimError> {
    let stat = match feed.stat(sidecar) {
        Ok(Some(stat)) => stat,
        Ok(None) => return Ok(None),
        // The name leaves no room for the ending.
        Err(error) if error.kind() == io::ErrorKind::InvalidFilename => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if let Some(why) = objection(&stat) {
        return Err(ClaimError::Refused(format!("its sidecar can't be read: {why}")));
    }
    feed.read_small(sidecar, bytes_max).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => {
            ClaimError::Refused(format!("its sidecar is longer than {bytes_max} bytes"))
        }
        io::ErrorKind::PermissionDenied => ClaimError::Unreadable(error),
        _ => error.into(),
    })
}

/// Moves a file, after its sidecars, into a claim of its own. Returns the claim's directory.
pub(super) fn take(
    inbox: &DirectoryInbox,
    feed: &Dir,
    name: &OsStr,
    opened: &Stat,
    sidecars: &[OsString],
    now: UnixMs,
) -> Result<Dir, ClaimError> {
    let claimed = inbox.claimed()?;
    let (claim, home) = loop {
        let number = inbox.claims.fetch_add(1, Ordering::Relaxed);
        // Sorted by name is sorted by time.
        let claim = format!("{:014}-{number:06}", now.0);
        match claimed.make_new_child(&claim, 0o700) {
            Ok(home) => break (claim, home),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
    };
    match move_in(feed, &home, name, sidecars) {
        Ok(()) => {
            check_taken(&home, name, opened, || put_back(feed, &claimed, &claim, &home))?;
            Ok(home)
        }
        Err(Errno::XDEV) => {
            claimed.remove_dir(&claim)?;
            let staging = feed.make_child(STAGING, 0o700)?;
            let on_its_way = staging.make_new_child(&claim, 0o700)?;
            if let Err(error) = move_in(feed, &on_its_way, name, sidecars) {
                staging.remove_dir(&claim)?;
                return Err(cant_take(error));
            }
            check_taken(&on_its_way, name, opened, || put_back(feed, &staging, &claim, &on_its_way))?;
            failpoint!("inbox.staged");
            match adopt(&claimed, &staging, &claim) {
                Ok(()) => Ok(claimed.child(&claim)?),
                Err(error) => {
                    // A full disk, most likely: the file stays with its dropper until there is room. If the copy is
                    // complete, it is the file.
                    if claimed.stat(&claim)?.is_none() {
                        put_back(feed, &staging, &claim, &on_its_way)?;
                    }
                    Err(error.into())
                }
            }
        }
        Err(error) => {
            claimed.remove_dir(&claim)?;
            Err(cant_take(error))
        }
    }
}

/// Whoever may write to the feed's directory may have swapped the file between the check and the move. What
/// was moved can't be swapped any more.
fn check_taken(
    home: &Dir,
    name: &OsStr,
    opened: &Stat,
    put_back: impl FnOnce() -> io::Result<()>,
) -> Result<(), ClaimError> {
    let taken = home.stat(name)?.ok_or(ClaimError::Gone)?;
    let swapped = (taken.st_dev, taken.st_ino) != (opened.st_dev, opened.st_ino);
    let why = if swapped { Some("it was replaced while it was taken") } else { objection(&taken) };
    match why {
        None => Ok(()),
        Some(why) => {
            put_back()?;
            Err(ClaimError::Refused(why.to_owned()))
        }
    }
}

fn cant_take(error: Errno) -> ClaimError {
    let said = |error| while_doing(error, "can't move it out of the feed's directory");
    match error {
        Errno::NOENT => ClaimError::Gone,
        // Of a directory with the sticky bit, others' files can't be moved; ours could.
        Errno::ACCESS | Errno::PERM => ClaimError::Unreadable(said(error)),
        error => said(error).into(),
    }
}

/// The sidecars go first: a crash in between leaves sidecars alone, which are put back, and never a file without what they
/// say.
fn move_in(feed: &Dir, home: &Dir, name: &OsStr, sidecars: &[OsString]) -> rustix::io::Result<()> {
    let mut names = sidecars.iter().map(OsString::as_os_str).chain([name]);
    names.try_for_each(|name| feed.rename(name, home, name)).inspect_err(|_| {
        for sidecar in sidecars {
            // What can't be put back now is put back when claims without an owner are looked for.
            let _ = home.rename_new(sidecar, feed, sidecar);
        }
    })
}

/// Copies a staged claim into the state directory, then removes it. Repeatable at every point.
fn adopt(claimed: &Dir, staging: &Dir, claim: &str) -> io::Result<()> {
    let from = staging.child(claim)?;
    if claimed.stat(claim)?.is_none() {
        let copy_name = format!("{COPY}{claim}");
        discard(claimed, &copy_name)?;
        let copy = claimed.make_new_child(&copy_name, 0o700)?;
        let copied = copy_all(&from, &copy).and_then(|()| {
            claimed.rename(&copy_name, claimed, claim).map_err(io::Error::from)?;
            claimed.sync()
        });
        if let Err(error) = copied {
            discard(claimed, &copy_name)?;
            return Err(error);
        }
    }
    failpoint!("inbox.copied");
    for name in from.names()? {
        from.remove(&name)?;
    }
    staging.remove_dir(claim)
}

fn copy_all(from: &Dir, to: &Dir) -> io::Result<()> {
    for name in from.names()? {
        copy(from, to, &name, &name)?;
    }
    to.sync()
}

/// Copies a file to another file system and syncs it.
pub(super) fn copy(from: &Dir, to: &Dir, name: &OsStr, new: &OsStr) -> io::Result<()> {
    let doing = || format!("can't copy {} to {}", from.at(name), to.at(new));
    // A crash may have come before the check of what was taken. Nobody else writes to `from`.
    if let Some(why) = from.stat(name)?.as_ref().and_then(objection) {
        return Err(while_doing(io::Error::new(io::ErrorKind::InvalidData, why), doing()));
    }
    let mut source = from.read(name).map_err(|error| while_doing(error, doing()))?;
    let mut target = to.create(new, 0o600)?;
    io::copy(&mut source, &mut target)
        .and_then(|_| target.sync_all())
        .map_err(|error| while_doing(error, doing()))
}

/// Removes a directory of ours with the files in it, if it is there.
fn discard(parent: &Dir, name: &str) -> io::Result<()> {
    let dir = match parent.child(name) {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for file in dir.names()? {
        dir.remove(&file)?;
    }
    parent.remove_dir(name)
}

/// Gives a claim's files back to the feed's directory.
fn put_back(feed: &Dir, parent: &Dir, claim: &str, home: &Dir) -> io::Result<()> {
    for name in home.names()? {
        if name.as_bytes().starts_with(b".") {
            home.remove(&name)?;
            continue;
        }
        let kept = match home.rename_new(&name, feed, &name) {
            // Its name is taken again: it is kept where it is in nobody's way.
            Err(Errno::EXIST) => home.rename(&name, &feed.child("failed")?, format!("{claim}.unread")),
            done => done,
        };
        match kept {
            // A FIFO or a link is not worth a copy.
            Err(Errno::XDEV) if home.stat(&name)?.is_some_and(|stat| objection(&stat).is_none()) => {
                let hidden = format!(".{claim}.tmp");
                copy(home, feed, &name, OsStr::new(&hidden))?;
                feed.rename_new(&hidden, feed, &name).map_err(io::Error::from)?;
                home.remove(&name)?;
            }
            Err(Errno::XDEV) => home.remove(&name)?,
            kept => {
                kept.map_err(|error| while_doing(error, format_args!("can't put {} back", home.at(&name))))?;
            }
        }
    }
    parent.remove_dir(claim)
}

/// Writes down what a restart must know, and makes the claimed file. It is ours with or without that: a note that there was
/// no room for is made up again by the next process, as one that a power cut took.
fn note(home: &Dir, name: &OsStr, claimed_at: UnixMs, sidecars: Sidecars, stat: &Stat) -> ClaimedFile {
    let note = Note {
        name: name.as_bytes().to_vec(),
        claimed_at,
        bytes: stat.st_size as u64,
        fingerprint: fingerprint(stat),
    };
    let written =
        serde_json::to_vec(&note).map_err(io::Error::from).and_then(|text| home.write(NOTE, &text, false));
    if let Err(error) = written {
        tracing::debug!(%error, "a claim has no note");
    }
    note.into_file(home, sidecars)
}

impl Note {
    fn into_file(self, home: &Dir, Sidecars { expected, conditions }: Sidecars) -> ClaimedFile {
        let name = OsStr::from_bytes(&self.name).to_owned();
        ClaimedFile {
            path: home.path_of(&name),
            name,
            claimed_at: self.claimed_at,
            bytes: self.bytes,
            expected,
            conditions,
            fingerprint: self.fingerprint,
        }
    }
}

/// The claims that nobody works on, after those that were interrupted are repaired. One that can't be repaired now holds up
/// no other.
pub(super) fn unowned(inbox: &DirectoryInbox, is_taken: &dyn Fn(&Path) -> bool) -> io::Result<Unowned> {
    let (feed, claimed) = (inbox.directory()?, inbox.claimed()?);
    let mut found = Unowned::default();
    if feed.stat(STAGING)?.is_some() {
        let staging = feed.child(STAGING)?;
        for claim in staging.names()? {
            // Not UTF-8 is not ours.
            let Some(claim) = claim.to_str() else { continue };
            if let Err(error) = repair_staged(&feed, &claimed, &staging, claim) {
                found.troubles.push((staging.at(claim), error));
            }
        }
    }
    for claim in claimed.names()? {
        let Some(claim) = claim.to_str() else { continue };
        if claim.starts_with(COPY) {
            if let Err(error) = discard(&claimed, claim) {
                found.troubles.push((claimed.at(claim), error));
            }
            continue;
        }
        let directory = claimed.path_of(claim);
        if !is_taken(&directory) {
            match reclaim(inbox, &feed, &claimed, claim) {
                Ok(file) => found.files.extend(file),
                Err(error) => found.troubles.push((claimed.at(claim), error)),
            }
        }
        found.directories.insert(directory);
    }
    Ok(found)
}

/// Brings a claim to its end that was on its way to another file system.
fn repair_staged(feed: &Dir, claimed: &Dir, staging: &Dir, claim: &str) -> io::Result<()> {
    match adopt(claimed, staging, claim) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            put_back(feed, staging, claim, &staging.child(claim)?)
        }
        done => done,
    }
}

/// What a claim's directory holds; `None` if it was nothing to continue with and was cleared away.
fn reclaim(
    inbox: &DirectoryInbox,
    feed: &Dir,
    claimed: &Dir,
    claim: &str,
) -> io::Result<Option<ClaimedFile>> {
    let home = claimed.child(claim)?;
    let note: Option<Note> =
        home.read_small(NOTE, NOTE_BYTES_MAX)?.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let file = home.names()?.into_iter().find(|name| NameKind::of(name) == NameKind::File);
    match (note, file) {
        (Some(mut note), file) => {
            let name = OsStr::from_bytes(&note.name).to_owned();
            if let Some(stat) = home.stat(&name)? {
                // A reboot may renumber devices; the rest stays.
                note.fingerprint[0] = stat.st_dev;
            } else if let Some(other) = file {
                let text = format!("{} holds another file than its {NOTE} says", home.at(other));
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            // Without its file the claim still counts: the stage finds out that it is lost (F32).
            let sidecars = sidecars_in(inbox, &home, &name)?;
            Ok(Some(note.into_file(&home, sidecars)))
        }
        (None, Some(name)) => {
            let stat = home.stat(&name)?.ok_or(io::ErrorKind::NotFound)?;
            if objection(&stat).is_some() {
                put_back(feed, claimed, claim, &home)?;
                return Ok(None);
            }
            let claimed_at = UnixMs(claim.split('-').next().and_then(|ms| ms.parse().ok()).unwrap_or(0));
            let sidecars = sidecars_in(inbox, &home, &name)?;
            Ok(Some(self::note(&home, &name, claimed_at, sidecars, &stat)))
        }
        // A crash between the sidecar and its file, or behind the file's last move.
        (None, None) => put_back(feed, claimed, claim, &home).map(|()| None),
    }
}

/// What the sidecars of a claimed file say. They were understood when it was claimed.
fn sidecars_in(inbox: &DirectoryInbox, home: &Dir, name: &OsStr) -> io::Result<Sidecars> {
    let read = |ending, bytes_max| match home.read_small(sidecar_name(name, ending), bytes_max) {
        // The name leaves no room for the ending.
        Err(error) if error.kind() == io::ErrorKind::InvalidFilename => Ok(None),
        read => read,
    };
    let expected = read(DONE, sidecar::SIDECAR_BYTES_MAX)?;
    let terms = read(TERMS, TERMS_BYTES_MAX)?;
    let sidecar = sidecar_name(name, TERMS);
    // A time that goes by the clock of the feed's window is not understood any more when that is gone: nothing is sent at a
    // time that nobody meant.
    let conditions = terms.map(|bytes| conditions(inbox, &sidecar, &bytes)).transpose();
    Ok(Sidecars {
        expected: expected.and_then(|bytes| sidecar::parse(name, &bytes).ok()),
        conditions: conditions.map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))?,
    })
}

/// The claim's directory, opened; `None` if it is gone.
pub(super) fn home(inbox: &DirectoryInbox, path: &Path) -> io::Result<Option<Dir>> {
    let Some(claim) = path.file_name() else { return Ok(None) };
    match inbox.claimed()?.child(claim) {
        Ok(dir) => Ok(Some(dir)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Forgets what a restart would know of a claim: without its file it is only cleared away from here on.
pub(super) fn forget(home: &Dir) -> io::Result<()> {
    home.remove(NOTE)
}

/// Removes a claim's directory and what is left in it.
pub(super) fn release(inbox: &DirectoryInbox, path: &Path) -> io::Result<()> {
    match path.file_name().and_then(OsStr::to_str) {
        Some(claim) => discard(&inbox.claimed()?, claim),
        None => Ok(()),
    }
}
