//! Reports on files.

use std::{collections::BTreeMap, sync::Arc};

use postrider_actors::model::codec;
use postrider_actors::model::{
    file::{Checkpoint, DestinationCounts, FileRecord, FileReport, FileState, Reject},
    ids::FileId,
    room::OpenMessages,
    terms::Terms,
    time::UnixMs,
};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{
    holds,
    tx::{TxError, file_state, int, priority, uint},
};

macro_rules! select_file {
    ($condition:literal) => {
        concat!(
            "SELECT seq, id, feed, name, bytes, sha256, claimed_at, state, reason, closed_at, settled_at, rows, ",
            "rejected, duplicates, terms, priority FROM files ",
            $condition
        )
    };
}

/// `Outbox::find_file`.
pub(crate) fn find(connection: &Connection, id: FileId) -> Result<Option<(FileState, Checkpoint)>, TxError> {
    let found = connection
        .prepare_cached("SELECT state, reason, offset, rows, rejected, duplicates FROM files WHERE id = ?1")?
        .query_row([id.0], |row| {
            let checkpoint = Checkpoint {
                offset: uint(row.get(2)?),
                rows: uint(row.get(3)?),
                rejected: uint(row.get(4)?),
                duplicates: uint(row.get(5)?),
            };
            Ok((row.get::<_, i64>(0)?, row.get::<_, Option<String>>(1)?, checkpoint))
        })
        .optional()?;
    found.map(|(state, reason, checkpoint)| Ok((file_state(state, reason)?, checkpoint))).transpose()
}

/// `Ledger::report`.
pub(crate) fn report(connection: &Connection, id: FileId) -> Result<Option<FileReport>, TxError> {
    let mut select = connection.prepare_cached(select_file!("WHERE id = ?1"))?;
    let mut rows = select.query([id.0])?;
    rows.next()?.map(|row| read(connection, row)).transpose()
}

/// `Ledger::settled_files`.
pub(crate) fn unreported(
    connection: &Connection,
    feed: &str,
    limit: usize,
) -> Result<Vec<FileReport>, TxError> {
    let mut select = connection.prepare_cached(select_file!(
        "WHERE feed = ?1 AND settled_at IS NOT NULL AND reported = 0 ORDER BY seq LIMIT ?2"
    ))?;
    collect(connection, select.query(params![feed, int(limit as u64)])?)
}

/// `Ledger::timed_files`.
pub(crate) fn timed(connection: &Connection, limit: usize) -> Result<Vec<FileReport>, TxError> {
    let mut select = connection.prepare_cached(select_file!(
        "WHERE finish_by IS NOT NULL AND settled_at IS NULL ORDER BY finish_by, seq LIMIT ?1"
    ))?;
    collect(connection, select.query([int(limit as u64)])?)
}

/// The files called `name`, or all of them: up to `limit`, the latest first.
pub(crate) fn list(
    connection: &Connection,
    name: Option<&str>,
    limit: usize,
) -> Result<Vec<FileReport>, TxError> {
    let limit = int(limit as u64);
    if let Some(name) = name {
        let mut select =
            connection.prepare_cached(select_file!("WHERE name = ?1 ORDER BY seq DESC LIMIT ?2"))?;
        collect(connection, select.query(params![name, limit])?)
    } else {
        let mut select = connection.prepare_cached(select_file!("ORDER BY seq DESC LIMIT ?1"))?;
        collect(connection, select.query([limit])?)
    }
}

fn collect(connection: &Connection, mut rows: rusqlite::Rows<'_>) -> Result<Vec<FileReport>, TxError> {
    let mut reports = Vec::new();
    while let Some(row) = rows.next()? {
        reports.push(read(connection, row)?);
    }
    Ok(reports)
}

fn read(connection: &Connection, row: &Row<'_>) -> Result<FileReport, TxError> {
    let seq: i64 = row.get(0)?;
    let mut names = Vec::new();
    let (mut destinations, mut held, mut priorities) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut select = connection.prepare_cached(
        "SELECT n.name, d.accepted, d.sent, d.dead, d.retrying, d.unsent, d.cancelled, d.held_from, d.held_since,
             d.held_cause, d.held_reason, d.priority
         FROM file_destinations d
         JOIN destinations n ON n.seq = d.destination WHERE d.file = ?1 ORDER BY d.position",
    )?;
    let mut counts = select.query([seq])?;
    while let Some(row) = counts.next()? {
        let name: String = row.get(0)?;
        names.push(name.clone());
        held.extend(holds::read(row, 7)?.map(|hold| (name.clone(), hold)));
        if let Some(ordered) = row.get(11)? {
            priorities.insert(name.clone(), priority(ordered)?);
        }
        destinations.insert(
            name,
            DestinationCounts {
                accepted: uint(row.get(1)?),
                sent: uint(row.get(2)?),
                dead: uint(row.get(3)?),
                retrying: uint(row.get(4)?),
                unsent: uint(row.get(5)?),
                cancelled: uint(row.get(6)?),
            },
        );
    }
    let time = |at: Option<i64>| at.map(|at| UnixMs(uint(at)));
    let terms: Option<String> = row.get(14)?;
    Ok(FileReport {
        file: FileRecord {
            id: FileId(row.get(1)?),
            feed: row.get(2)?,
            name: row.get(3)?,
            bytes: uint(row.get(4)?),
            sha256: row.get(5)?,
            claimed_at: UnixMs(uint(row.get(6)?)),
            destinations: names,
            terms: terms.map_or_else(|| Ok(Terms::default()), |terms| serde_json::from_str(&terms))?,
            priority: priority(row.get(15)?)?,
        },
        state: file_state(row.get(7)?, row.get(8)?)?,
        closed_at: time(row.get(9)?),
        settled_at: time(row.get(10)?),
        rows: uint(row.get(11)?),
        rejected: uint(row.get(12)?),
        duplicates: uint(row.get(13)?),
        destinations,
        held,
        priorities,
        failures: BTreeMap::new(),
    })
}

/// `Ledger::rejects`: one chunk at a time, so that no more than a chunk beyond `limit` is decoded.
pub(crate) fn rejects(
    connection: &Connection,
    file: FileId,
    after: u64,
    limit: usize,
) -> Result<Vec<Reject>, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT r.body FROM rejects r JOIN files f ON f.seq = r.file
         WHERE f.id = ?1 AND r.last_row > ?2 ORDER BY r.last_row",
    )?;
    let mut rows = select.query(params![file.0, int(after)])?;
    let mut rejects = Vec::new();
    while rejects.len() < limit
        && let Some(row) = rows.next()?
    {
        let body = row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?;
        rejects.extend(codec::decode_rejects(body)?.into_iter().filter(|reject| reject.row > after));
    }
    rejects.truncate(limit);
    Ok(rejects)
}

/// `Ledger::disabled_destinations`.
pub(crate) fn disabled(connection: &Connection) -> Result<Vec<Arc<str>>, TxError> {
    let mut select = connection
        .prepare_cached("SELECT name FROM destinations WHERE disabled_at IS NOT NULL ORDER BY name")?;
    let names = select.query_map([], |row| Ok(row.get::<_, String>(0)?.into()))?;
    Ok(names.collect::<Result<_, _>>()?)
}

/// `Outbox::open_messages`.
pub(crate) fn open_messages(connection: &Connection) -> Result<OpenMessages, TxError> {
    let mut select = connection.prepare_cached("SELECT name, open FROM destinations WHERE open > 0")?;
    let open = select.query_map([], |row| Ok((row.get::<_, String>(0)?.into(), uint(row.get(1)?))))?;
    Ok(open.collect::<Result<_, _>>()?)
}
