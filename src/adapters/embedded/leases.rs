//! The queue: dispatching, leasing and giving back. These writes need no sync of their own. They must
//! outlive the process (or a batch that kills it would never be a suspect), which the WAL in the page
//! cache does; a power cut undoes them together with the worker they were about.

use std::sync::Arc;

use bytes::Bytes;
use postrider_actors::model::codec;
use postrider_actors::{
    model::{
        batch::{NewBatch, StateVector},
        ids::BatchId,
        time::{MonoMs, UnixMs},
    },
    ports::{ItemOutcome, Lease, LeaseRequest, LeaseToken, OutboxEntry, QueueDepth, Release},
};
use rusqlite::{Connection, OptionalExtension, params};

use super::tx::{Caches, Phase, Tx, TxError, int, uint};

/// Moves outstanding batches to the queue.
pub(crate) fn dispatch(tx: &Tx<'_>, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, TxError> {
    let mut update =
        tx.connection.prepare_cached("UPDATE batches SET phase = 1 WHERE id = ?1 AND phase = 0")?;
    let mut outcomes = Vec::with_capacity(ids.len());
    for &id in ids {
        let known = update.execute([id.0])? == 1 || tx.has_batch(id)?;
        let outcome =
            if known { ItemOutcome::Ok } else { ItemOutcome::Permanent(format!("no batch {id} is stored")) };
        outcomes.push((id, outcome));
    }
    Ok(outcomes)
}

/// Leases queued batches, oldest due first.
pub(crate) fn lease(tx: &mut Tx<'_>, request: &LeaseRequest) -> Result<Vec<Lease>, TxError> {
    let mut leases = Vec::new();
    for (destination, limit) in &request.wants {
        let enabled: Option<i64> = tx
            .connection
            .prepare_cached("SELECT seq FROM destinations WHERE name = ?1 AND disabled_at IS NULL")?
            .query_row([&**destination], |row| row.get(0))
            .optional()?;
        if let Some(destination) = enabled {
            lease_some(tx, request, destination, *limit, &mut leases)?;
        }
    }
    Ok(leases)
}

fn lease_some(
    tx: &mut Tx<'_>,
    request: &LeaseRequest,
    destination: i64,
    limit: usize,
    leases: &mut Vec<Lease>,
) -> Result<(), TxError> {
    let connection = tx.connection;
    let mut select = connection.prepare_cached(
        "SELECT b.seq, b.id, b.root, b.header, b.count, b.drive, b.attempt, b.accepted_at, b.fence, b.losses,
             p.body, p.history, r.states
         FROM batches b JOIN payloads p ON p.seq = b.payload LEFT JOIN results r ON r.batch = b.seq
         WHERE b.phase = 1 AND b.destination = ?1 ORDER BY b.not_before, b.seq LIMIT ?2",
    )?;
    let from = leases.len();
    let mut seqs = Vec::new();
    let mut rows = select.query([destination, int(limit as u64)])?;
    while let Some(row) = rows.next()? {
        let id = BatchId(row.get(1)?);
        let count: u32 = row.get(4)?;
        let history = row.get_ref(11)?.as_blob_or_null().map_err(rusqlite::Error::from)?;
        seqs.push(row.get::<_, i64>(0)?);
        leases.push(Lease {
            token: LeaseToken { batch: id, fence: uint(row.get(8)?) + 1 },
            root: row.get::<_, Option<[u8; 16]>>(2)?.map_or(id, BatchId),
            header: tx.caches.header(connection, row.get(3)?)?,
            drive: row.get(5)?,
            attempt: row.get(6)?,
            accepted_at: UnixMs(uint(row.get(7)?)),
            payload: Bytes::copy_from_slice(row.get_ref(10)?.as_blob().map_err(rusqlite::Error::from)?),
            states: match row.get::<_, Option<Vec<u8>>>(12)? {
                Some(states) => StateVector(states),
                None => StateVector::accepted(count),
            },
            history: history.map_or_else(|| Ok(Vec::new()), codec::decode_history)?,
            losses: row.get(9)?,
        });
    }
    drop(rows);
    let mut update = connection.prepare_cached(
        "UPDATE batches SET phase = 2, fence = ?2, holder = ?3, lease_until_mono = ?4 WHERE seq = ?1",
    )?;
    for (seq, lease) in seqs.iter().zip(&leases[from..]) {
        update.execute(params![seq, int(lease.token.fence), &*request.holder, int(request.until.0)])?;
    }
    Ok(())
}

/// Moves deadlines of leases that are current.
pub(crate) fn extend(
    tx: &Tx<'_>,
    tokens: &[LeaseToken],
    until: MonoMs,
) -> Result<Vec<(BatchId, ItemOutcome)>, TxError> {
    let mut update = tx.connection.prepare_cached(
        "UPDATE batches SET lease_until_mono = ?3 WHERE id = ?1 AND phase = 2 AND fence = ?2",
    )?;
    let mut outcomes = Vec::with_capacity(tokens.len());
    for token in tokens {
        let held = update.execute(params![token.batch.0, int(token.fence), int(until.0)])? == 1;
        let outcome = if held {
            ItemOutcome::Ok
        } else {
            ItemOutcome::Permanent("the lease is not held any more".into())
        };
        outcomes.push((token.batch, outcome));
    }
    Ok(outcomes)
}

/// Gives leases back.
pub(crate) fn release(tx: &Tx<'_>, tokens: &[LeaseToken], how: Release) -> Result<(), TxError> {
    let lost = i64::from(how == Release::Lost);
    let mut update = tx.connection.prepare_cached(
        "UPDATE batches SET phase = 1, losses = losses + ?3, holder = NULL, lease_until_mono = NULL
         WHERE id = ?1 AND phase = 2 AND fence = ?2",
    )?;
    for token in tokens {
        update.execute(params![token.batch.0, int(token.fence), lost])?;
    }
    Ok(())
}

/// Marks lost the leases of a holder who is gone.
pub(crate) fn release_holder(tx: &Tx<'_>, holder: &str) -> Result<usize, TxError> {
    Ok(tx
        .connection
        .prepare_cached(
            "UPDATE batches SET phase = 1, losses = losses + 1, holder = NULL, lease_until_mono = NULL
             WHERE phase = 2 AND holder = ?1",
        )?
        .execute([holder])?)
}

/// Marks lost the leases that nobody extended.
pub(crate) fn rescue(tx: &Tx<'_>, now: MonoMs) -> Result<usize, TxError> {
    Ok(tx
        .connection
        .prepare_cached(
            "UPDATE batches SET phase = 1, losses = losses + 1, holder = NULL, lease_until_mono = NULL
             WHERE phase = 2 AND lease_until_mono < ?1",
        )?
        .execute([int(now.0)])?)
}

/// Marks lost every lease of an earlier process; a graceful shutdown has left none.
pub(crate) fn lose_all(connection: &Connection) -> Result<usize, TxError> {
    Ok(connection.execute(
        "UPDATE batches SET phase = 1, losses = losses + 1, holder = NULL, lease_until_mono = NULL
         WHERE phase = 2",
        [],
    )?)
}

/// `Outbox::outstanding`: due batches that are not dispatched, oldest due first.
pub(crate) fn outstanding(
    connection: &Connection,
    caches: &mut Caches,
    now: UnixMs,
    limit: usize,
    with_batches: bool,
    except: &[Arc<str>],
) -> Result<Vec<OutboxEntry>, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT seq, id, destination, count, not_before FROM batches
         WHERE phase = 0 AND not_before <= ?1 ORDER BY not_before, seq",
    )?;
    let mut rows = select.query([int(now.0)])?;
    let mut entries = Vec::new();
    while entries.len() < limit
        && let Some(row) = rows.next()?
    {
        let destination = caches.destination_name(connection, row.get(2)?)?;
        if except.contains(&destination) {
            continue;
        }
        let batch = if with_batches { Some(read_batch(connection, caches, row.get(0)?)?) } else { None };
        entries.push(OutboxEntry {
            id: BatchId(row.get(1)?),
            destination,
            count: row.get(3)?,
            not_before: UnixMs(uint(row.get(4)?)),
            batch,
        });
    }
    Ok(entries)
}

/// The batch with number `seq`.
pub(crate) fn read_batch(
    connection: &Connection,
    caches: &mut Caches,
    seq: i64,
) -> Result<NewBatch, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT b.id, b.root, b.header, b.first_row, b.count, b.drive, b.attempt, b.accepted_at, b.not_before,
             p.body, p.history
         FROM batches b JOIN payloads p ON p.seq = b.payload WHERE b.seq = ?1",
    )?;
    let mut rows = select.query([seq])?;
    let row = rows.next()?.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
    let id = BatchId(row.get(0)?);
    let history = row.get_ref(10)?.as_blob_or_null().map_err(rusqlite::Error::from)?;
    Ok(NewBatch {
        id,
        root: row.get::<_, Option<[u8; 16]>>(1)?.map_or(id, BatchId),
        header: caches.header(connection, row.get(2)?)?,
        first_row: uint(row.get(3)?),
        count: row.get(4)?,
        drive: row.get(5)?,
        attempt: row.get(6)?,
        accepted_at: UnixMs(uint(row.get(7)?)),
        not_before: UnixMs(uint(row.get(8)?)),
        payload: Bytes::copy_from_slice(row.get_ref(9)?.as_blob().map_err(rusqlite::Error::from)?),
        history: history.map_or_else(|| Ok(Vec::new()), codec::decode_history)?,
    })
}

/// `Queue::depth`, in batches.
pub(crate) fn depth(connection: &Connection) -> Result<QueueDepth, TxError> {
    let count = |phase: i64| -> rusqlite::Result<u64> {
        connection
            .prepare_cached("SELECT count(*) FROM batches WHERE phase = ?1 AND phase IN (1, 2)")?
            .query_row([phase], |row| row.get(0))
            .map(uint)
    };
    Ok(QueueDepth { visible: count(1)?, in_flight: count(2)?, delayed: 0 })
}

/// `Outbox::next_due`.
pub(crate) fn next_due(connection: &Connection) -> Result<Option<UnixMs>, TxError> {
    let due: Option<i64> = connection
        .prepare_cached("SELECT min(not_before) FROM batches WHERE phase = 0")?
        .query_row([], |row| row.get(0))?;
    Ok(due.map(|due| UnixMs(uint(due))))
}

/// A batch's phase from its stored number.
pub(crate) fn phase(byte: i64) -> Result<Phase, TxError> {
    Ok(match byte {
        0 => Phase::Outstanding,
        1 => Phase::Queued,
        2 => Phase::Leased,
        3 => Phase::Settled,
        _ => return Err(TxError::Refused(format!("batch phase {byte} was written by a newer version"))),
    })
}
