//! Who ordered what.

use postrider_actors::{
    model::time::UnixMs,
    ports::console::{AUDIT_LINES_MAX, AuditLine},
};
use rusqlite::{Connection, params};

use super::tx::{Tx, TxError, int, uint};

/// Adds a line; the oldest goes when there are too many.
pub(crate) fn note(tx: &Tx<'_>, line: &AuditLine) -> Result<(), TxError> {
    let AuditLine { at, by, verb, of, detail } = line;
    tx.connection
        .prepare_cached("INSERT INTO audit (at, by, verb, subject, detail) VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![int(at.0), by, verb, of, detail])?;
    let oldest = tx.connection.last_insert_rowid() - int(AUDIT_LINES_MAX);
    tx.connection.prepare_cached("DELETE FROM audit WHERE seq <= ?1")?.execute([oldest])?;
    Ok(())
}

/// Up to `limit` lines, the latest first.
pub(crate) fn lines(connection: &Connection, limit: usize) -> Result<Vec<AuditLine>, TxError> {
    let mut select = connection
        .prepare_cached("SELECT at, by, verb, subject, detail FROM audit ORDER BY seq DESC LIMIT ?1")?;
    let lines = select.query_map([int(limit as u64)], |row| {
        Ok(AuditLine {
            at: UnixMs(uint(row.get(0)?)),
            by: row.get(1)?,
            verb: row.get(2)?,
            of: row.get(3)?,
            detail: row.get(4)?,
        })
    })?;
    Ok(lines.collect::<Result<_, _>>()?)
}
