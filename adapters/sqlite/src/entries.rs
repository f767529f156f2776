//! The entries of inbound queues that were taken: a queue delivers at least once.

use postrider_actors::{model::time::UnixMs, ports::EntryId};
use rusqlite::{Connection, params};

use super::tx::{Tx, TxError, int};

/// `Outbox::known_entries`.
pub(crate) fn known(connection: &Connection, entries: &[EntryId]) -> Result<Vec<EntryId>, TxError> {
    let mut select = connection.prepare_cached("SELECT 1 FROM entries WHERE feed = ?1 AND id = ?2")?;
    let mut known = Vec::new();
    for entry in entries {
        if select.exists(params![&*entry.feed, entry.id])? {
            known.push(entry.clone());
        }
    }
    Ok(known)
}

/// Stores entries with the file that their rows became.
pub(crate) fn insert(tx: &Tx<'_>, entries: &[EntryId], file: i64, at: UnixMs) -> Result<(), TxError> {
    let mut insert =
        tx.connection.prepare_cached("INSERT INTO entries (feed, id, file, at) VALUES (?1, ?2, ?3, ?4)")?;
    for entry in entries {
        insert.execute(params![&*entry.feed, entry.id, file, int(at.0)])?;
    }
    Ok(())
}
