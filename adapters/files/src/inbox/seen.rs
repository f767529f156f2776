//! The recipients that one pass over a file has met, on disk: their number is unbounded (I8).

use std::{io, path::Path};

use postrider_actors::ports::Seen;
use rusqlite::{Connection, OpenFlags};

/// Pages of the set that stay in memory, in KiB; the rest is the kernel's to cache.
const CACHE_KIB: u32 = 4096;

/// A scratch table whose file has no name any more: a crash leaves nothing behind either.
pub(super) struct SeenOnDisk {
    scratch: Connection,
}

impl SeenOnDisk {
    /// An empty set. `path` is a free name; nothing is left there.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        let open = || {
            // Journal, sync and locking serve a file that outlives the process; this one does not. The inserts
            // are one transaction that is never committed.
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
                | OpenFlags::SQLITE_OPEN_CREATE
                | OpenFlags::SQLITE_OPEN_NO_MUTEX
                | OpenFlags::SQLITE_OPEN_NOFOLLOW;
            let scratch = Connection::open_with_flags(path, flags)?;
            scratch.execute_batch(&format!(
                "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE;
                 PRAGMA cache_size = -{CACHE_KIB}; PRAGMA temp_store = FILE; BEGIN EXCLUSIVE;
                 CREATE TABLE seen (recipient BLOB PRIMARY KEY) WITHOUT ROWID;"
            ))?;
            Ok(scratch)
        };
        let scratch = open().map_err(|error| failed(&error));
        std::fs::remove_file(path).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
        Ok(Self { scratch: scratch? })
    }
}

impl Seen for SeenOnDisk {
    fn insert(&mut self, recipient: &str) -> io::Result<bool> {
        let mut insert = self
            .scratch
            .prepare_cached("INSERT OR IGNORE INTO seen VALUES (?1)")
            .map_err(|error| failed(&error))?;
        let inserted = insert.execute([recipient.as_bytes()]).map_err(|error| failed(&error))?;
        Ok(inserted == 1)
    }
}

fn failed(error: &rusqlite::Error) -> io::Error {
    let kind = match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => io::ErrorKind::StorageFull,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, format!("the scratch set of `duplicates = \"first\"`: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f31_a_recipient_is_new_once_and_nothing_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".seen");
        let mut seen = SeenOnDisk::new(&path).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        // More than the cache holds.
        let name = |n: u64| format!("{:020}-{}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15), "x".repeat(40));
        for n in 0..100_000 {
            assert!(seen.insert(&name(n)).unwrap());
        }
        for n in (0..100_000).step_by(997) {
            assert!(!seen.insert(&name(n)).unwrap());
        }
        assert!(seen.insert("").unwrap() && !seen.insert("").unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
