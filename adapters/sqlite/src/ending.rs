//! Ending what is never sent: see [`Steering::end_step`](postrider_actors::ports::Steering).

use postrider_actors::{
    model::{
        hold::{HoldCause, HoldChange},
        ledger::CountChange,
        state::MessageState,
        time::UnixMs,
    },
    ports::Ended,
};
use rusqlite::Params;

use super::{
    holds, leases,
    tx::{Tx, TxError, int},
};

/// Places that one step looks at: with something open, and all of it leased perhaps.
const PLACES_MAX: usize = 10_000;

/// `Steering::end_step`. While there is nothing to end it looks into two indexes that are empty or nearly so.
pub(crate) fn step(tx: &mut Tx<'_>, batches: usize, now: UnixMs) -> Result<Ended, TxError> {
    let mut done = Ended::default();
    for (file, destination) in cancelled(tx)? {
        let ended = end(tx, (file, destination), MessageState::Cancelled, batches - done.batches, now)?;
        let is_done = ended.batches == 0;
        done += ended;
        if done.batches == batches {
            return Ok(done);
        }
        if is_done {
            release(tx, file, destination)?;
        }
    }
    for place in over(tx, now)? {
        if done.batches == batches {
            break;
        }
        done += end(tx, place, MessageState::Unsent, batches - done.batches, now)?;
    }
    if done.batches < batches {
        for (file, destination) in held_and_over(tx, now)? {
            release(tx, file, destination)?;
        }
    }
    Ok(done)
}

/// Ends what is open of up to `limit` batches of a file for a destination that nobody has.
fn end(
    tx: &mut Tx<'_>,
    (file, destination): (i64, i64),
    state: MessageState,
    limit: usize,
    now: UnixMs,
) -> Result<Ended, TxError> {
    let connection = tx.connection;
    // An entry of the index says all that is asked of a batch.
    let mut select = connection.prepare_cached(
        "SELECT seq FROM batches INDEXED BY batches_waiting
         WHERE destination = ?1 AND retry = 0 AND holder IS NULL AND due IS NOT NULL AND place = ?2
         UNION ALL
         SELECT seq FROM batches INDEXED BY batches_waiting
         WHERE destination = ?1 AND retry = 1 AND holder IS NULL AND due IS NOT NULL AND file = ?2
         LIMIT ?3",
    )?;
    let waiting = select.query_map([destination, file, int(limit as u64)], |row| row.get(0))?;
    let waiting: Vec<i64> = waiting.collect::<Result<_, _>>()?;
    if waiting.is_empty() {
        return Ok(Ended::default());
    }
    let mut counts = CountChange::default();
    for &seq in &waiting {
        if let Some(mut stored) = leases::read_or_quarantine(connection, seq)? {
            let changes = stored.record.end_open(state, now);
            stored.store_changes(tx, &changes)?;
            counts += changes.counts;
        }
    }
    let name = tx.caches.destination_name(connection, destination)?;
    Ok(Ended { batches: waiting.len(), counts: [(name, counts)].into() })
}

fn cancelled(tx: &Tx<'_>) -> Result<Vec<(i64, i64)>, TxError> {
    let select = "SELECT file, destination FROM file_destinations INDEXED BY files_held
                  WHERE held_since IS NOT NULL AND held_cause = ?1";
    places(tx, select, [HoldCause::Cancelled as u8])
}

/// Where the time of a file is over and messages of it are open.
fn over(tx: &Tx<'_>, now: UnixMs) -> Result<Vec<(i64, i64)>, TxError> {
    let select = "SELECT d.file, d.destination FROM files f INDEXED BY files_expiring
                      JOIN file_destinations d ON d.file = f.seq
                  WHERE f.settled_at IS NULL AND f.expires_at <= ?1
                      AND d.sent + d.dead + d.unsent + d.cancelled < d.accepted LIMIT ?2";
    places(tx, select, [int(now.0), int(PLACES_MAX as u64)])
}

/// Where a file is held whose time is over.
fn held_and_over(tx: &Tx<'_>, now: UnixMs) -> Result<Vec<(i64, i64)>, TxError> {
    let select = "SELECT d.file, d.destination FROM file_destinations d INDEXED BY files_held
                      JOIN files f ON f.seq = d.file
                  WHERE d.held_since IS NOT NULL AND f.expires_at <= ?1";
    places(tx, select, [int(now.0)])
}

fn places(tx: &Tx<'_>, select: &str, values: impl Params) -> Result<Vec<(i64, i64)>, TxError> {
    let mut select = tx.connection.prepare_cached(select)?;
    let places = select.query_map(values, |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(places.collect::<Result<_, _>>()?)
}

/// Ends what is held of a file, if no more rows come and no message is open.
fn release(tx: &Tx<'_>, file: i64, destination: i64) -> Result<(), TxError> {
    let has_ended: bool = tx
        .connection
        .prepare_cached(
            "SELECT f.state <> 0 AND d.sent + d.dead + d.unsent + d.cancelled = d.accepted
             FROM file_destinations d JOIN files f ON f.seq = d.file WHERE d.file = ?1 AND d.destination = ?2",
        )?
        .query_row([file, destination], |row| row.get(0))?;
    if has_ended {
        holds::change(tx, file, destination, &HoldChange::Ended)?;
    }
    Ok(())
}
