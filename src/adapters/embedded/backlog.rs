//! How much there is to do, for metrics and alarms.

use postrider_actors::model::time::UnixMs;
use rusqlite::Connection;

use super::tx::{TxError, uint};

/// Batches that are not settled, by where they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// The queue has not accepted them, or they wait for their retry.
    pub outstanding: u64,
    /// They wait for a worker.
    pub queued: u64,
    /// A worker has them.
    pub leased: u64,
    /// When the one that is due for longest became due; `None` if there is none.
    pub oldest_due: Option<UnixMs>,
}

/// Counts them. The time it takes grows with their number: each is an entry of an index.
pub(crate) fn read(connection: &Connection) -> Result<Backlog, TxError> {
    let count = |phase: &str| -> Result<u64, TxError> {
        let sql = format!("SELECT count(*) FROM batches WHERE phase = {phase}");
        Ok(uint(connection.prepare_cached(&sql)?.query_row([], |row| row.get(0))?))
    };
    // Each minimum is the first entry of an index; leased batches are few.
    let oldest_due: Option<i64> = connection
        .prepare_cached(
            "SELECT min(due) FROM (
                 SELECT min(not_before) AS due FROM batches WHERE phase = 0
                 UNION ALL
                 SELECT (SELECT min(not_before) FROM batches WHERE phase = 1 AND destination = d.seq)
                 FROM destinations d
                 UNION ALL
                 SELECT min(not_before) FROM batches WHERE phase = 2)",
        )?
        .query_row([], |row| row.get(0))?;
    Ok(Backlog {
        outstanding: count("0")?,
        queued: count("1")?,
        leased: count("2")?,
        oldest_due: oldest_due.map(|due| UnixMs(uint(due))),
    })
}
