//! Cancelling what is open of cancelled files: see [`Steering`](postrider_actors::ports::Steering).

use postrider_actors::model::{
    hold::{HoldCause, HoldChange},
    time::UnixMs,
};

use super::{
    holds, leases,
    tx::{Tx, TxError, int},
};

/// `Steering::cancel_step`. While nothing is cancelled it looks into an index that is empty or nearly so.
pub(crate) fn step(tx: &mut Tx<'_>, batches: usize, now: UnixMs) -> Result<usize, TxError> {
    let connection = tx.connection;
    let mut done = 0;
    for (file, destination) in cancelled(tx)? {
        // An entry of the index says all that is asked of a batch.
        let mut select = connection.prepare_cached(
            "SELECT seq FROM batches INDEXED BY batches_waiting
             WHERE destination = ?1 AND retry IN (0, 1) AND holder IS NULL AND due IS NOT NULL AND file = ?2
             LIMIT ?3",
        )?;
        let place = [destination, file, int((batches - done) as u64)];
        let waiting: Vec<i64> = select.query_map(place, |row| row.get(0))?.collect::<Result<_, _>>()?;
        for &seq in &waiting {
            if let Some(mut stored) = leases::read_or_quarantine(connection, seq)? {
                let changes = stored.record.cancel(now);
                stored.store_changes(tx, &changes)?;
            }
        }
        done += waiting.len();
        if done == batches {
            break;
        }
        if waiting.is_empty() && is_over(tx, file, destination)? {
            holds::change(tx, file, destination, &HoldChange::Cancelled)?;
        }
    }
    Ok(done)
}

fn cancelled(tx: &Tx<'_>) -> Result<Vec<(i64, i64)>, TxError> {
    let mut select = tx.connection.prepare_cached(
        "SELECT file, destination FROM file_destinations INDEXED BY files_held
         WHERE held_since IS NOT NULL AND held_cause = ?1",
    )?;
    let cancelled = select.query_map([HoldCause::Cancelled as u8], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(cancelled.collect::<Result<_, _>>()?)
}

/// Whether no more rows come and no message is open.
fn is_over(tx: &Tx<'_>, file: i64, destination: i64) -> Result<bool, TxError> {
    Ok(tx
        .connection
        .prepare_cached(
            "SELECT f.state <> 0 AND d.sent + d.dead + d.cancelled = d.accepted
             FROM file_destinations d JOIN files f ON f.seq = d.file WHERE d.file = ?1 AND d.destination = ?2",
        )?
        .query_row([file, destination], |row| row.get(0))?)
}
