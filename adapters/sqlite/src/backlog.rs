//! The size of the backlog, for metrics and alarms.

use postrider_actors::model::time::UnixMs;
use rusqlite::Connection;

use super::tx::{TxError, int, uint};

/// Batches that are not settled, by what they wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// They are not due yet.
    pub outstanding: u64,
    /// They are due and wait for a worker.
    pub queued: u64,
    /// A worker has them.
    pub leased: u64,
    /// They can't be read and are set aside.
    pub quarantined: u64,
    /// When the oldest due batch became due, or the next one will, those of closed files left out; `None` without batches.
    pub oldest_due: Option<UnixMs>,
}

/// How many are not due yet at a time, and how many are.
pub(crate) const COUNT_WAITING: &str = "SELECT coalesce(sum(due > ?1), 0), coalesce(sum(due <= ?1), 0)
     FROM batches INDEXED BY batches_waiting WHERE due IS NOT NULL AND holder IS NULL";

/// Counts them. The time it takes grows with their number: each is an entry of an index.
pub(crate) fn read(connection: &Connection, now: UnixMs) -> Result<Backlog, TxError> {
    let (outstanding, queued) = connection
        .prepare_cached(COUNT_WAITING)?
        .query_row([int(now.0)], |row| Ok((uint(row.get(0)?), uint(row.get(1)?))))?;
    let count = |sql: &str| -> Result<u64, TxError> {
        Ok(uint(connection.prepare_cached(sql)?.query_row([], |row| row.get(0))?))
    };
    let leased = count("SELECT count(*) FROM batches INDEXED BY batches_leased WHERE holder IS NOT NULL")?;
    let quarantined =
        count("SELECT count(*) FROM batches INDEXED BY batches_quarantined WHERE quarantined IS NOT NULL")?;
    // What is closed is due, and not late.
    let waiting_due: Option<i64> = connection
        .prepare_cached(
            "SELECT min(due) FROM batches b INDEXED BY batches_waiting
             WHERE b.due IS NOT NULL AND b.holder IS NULL
                 AND NOT EXISTS (SELECT 1 FROM file_destinations h WHERE h.file = b.file AND h.destination = b.destination
                     AND h.closed_from <= ?1 AND h.closed_until > ?1)",
        )?
        .query_row([int(now.0)], |row| row.get(0))?;
    let leased_due: Option<i64> = connection
        .prepare_cached("SELECT min(due) FROM batches INDEXED BY batches_leased WHERE holder IS NOT NULL")?
        .query_row([], |row| row.get(0))?;
    let oldest_due = waiting_due.into_iter().chain(leased_due).min();
    Ok(Backlog {
        outstanding,
        queued,
        leased,
        quarantined,
        oldest_due: oldest_due.map(|due| UnixMs(uint(due))),
    })
}
