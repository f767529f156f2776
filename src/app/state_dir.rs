//! The state directory's permissions, which do not depend on the umask: the daemon's group may read what commands read, and
//! nobody else anything.

use std::{
    fs::{self, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

/// Of the directory …
const DIRECTORY_MODE: u32 = 0o750;

/// … and of the files in it. What SQLite makes beside the store gets the store's.
const FILE_MODE: u32 = 0o640;

/// Gives the directory and the files in it their permissions. Directories in it are their makers' affair: nobody else
/// looks into `claimed`.
pub(super) fn set_permissions(path: &Path) -> io::Result<()> {
    set_mode(path, DIRECTORY_MODE)?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            set_mode(&entry.path(), FILE_MODE)?;
        }
    }
    Ok(())
}

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    if fs::metadata(path)?.mode() & 0o7777 == mode {
        return Ok(());
    }
    match fs::set_permissions(path, Permissions::from_mode(mode)) {
        // It belongs to somebody else, who decides.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!(path = %path.display(), %error, "its permissions stay as they are");
            Ok(())
        }
        done => done,
    }
}

/// Replaces a file of the state directory. Readers see the old one or the new one.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(FILE_MODE).open(&fresh)?;
    set_mode(&fresh, FILE_MODE)?;
    file.write_all(bytes)?;
    fs::rename(&fresh, path)
}
