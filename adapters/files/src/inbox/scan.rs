//! One scan of the directory.

use std::{ffi::OsStr, io, os::unix::ffi::OsStrExt, sync::PoisonError};

use postrider_actors::{
    model::{stable::NameKind, time::UnixMs},
    ports::{Candidate, Scan},
};
use rustix::fs::FileType;

use super::{
    DONE, DirectoryInbox, TERMS, changed_nanos,
    dir::{escaped, objection, while_doing},
    sidecar_name,
};

/// Looks at up to `limit` names; a scan that was cut short continues where it stopped.
pub(super) fn scan(inbox: &DirectoryInbox, limit: usize) -> io::Result<Scan> {
    let directory = inbox.directory()?;
    // A panic in here leaves no half-done state behind: at worst the walk starts over.
    let mut kept = inbox.walk.lock().unwrap_or_else(PoisonError::into_inner);
    let mut walk = match kept.take() {
        Some(walk) => walk,
        None => directory.walk()?,
    };
    let mut scan = Scan::default();
    while let Some(entry) = walk.read() {
        let entry = entry.map_err(|error| while_doing(error, escaped(&inbox.config.settings.path)))?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if entry.file_type() == FileType::Directory || NameKind::of(name) != NameKind::File {
            continue;
        }
        // It may be gone by now, or be a directory that the listing does not mark as one.
        let stat = match directory.stat(name) {
            Ok(Some(stat)) => stat,
            Ok(None) => continue,
            // One damaged entry does not hide the others.
            Err(error) => {
                scan.refused.push((name.to_owned(), error.to_string()));
                continue;
            }
        };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            continue;
        }
        // A name that leaves no room for the ending has no sidecar.
        let beside = |ending| directory.stat(sidecar_name(name, ending)).ok().flatten();
        let terms = beside(TERMS);
        match objection(&stat) {
            Some(why) => scan.refused.push((name.to_owned(), why.to_owned())),
            None => scan.candidates.push(Candidate {
                name: name.to_owned(),
                bytes: stat.st_size as u64,
                modified: UnixMs(
                    changed_nanos(&stat).max(terms.as_ref().map_or(0, changed_nanos)) / 1_000_000,
                ),
                has_sidecar: beside(DONE).is_some(),
            }),
        }
        if scan.candidates.len() + scan.refused.len() >= limit {
            scan.truncated = true;
            *kept = Some(walk);
            break;
        }
    }
    Ok(scan)
}
