//! Dead letters: finding them and sending them again.

use std::collections::{BTreeMap, btree_map::Entry};

use postrider_actors::model::codec;
use postrider_actors::model::{
    batch::{NewBatch, Rows},
    ids::{BatchId, FileId},
    outcome::{Attempt, DeathCause, Reason},
    state::MessageState,
    time::UnixMs,
};
use rusqlite::{Connection, OptionalExtension, params, types::Value};

use crate::console::{DeadFilter, DeadLetter, FileSelector, Position};

use super::{
    settle::Record,
    tx::{Tx, TxError, int, uint},
};

/// Dead letters per transaction: what the daemon's writer may have to wait for.
pub(crate) const REDRIVE_STEP: usize = 2_000;

/// Where in the order of dead letters (file, destination, row) a walk stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place(i64, i64, i64);

impl Place {
    /// As an opaque position.
    fn position(self) -> Position {
        Position(format!("{}.{}.{}", self.0, self.1, self.2))
    }

    /// Reads back what [`Place::position`] made.
    pub(crate) fn read(position: &Position) -> Result<Self, TxError> {
        if position.0.is_empty() {
            return Ok(Self::default());
        }
        let numbers: Vec<i64> = position.0.split('.').map_while(|number| number.parse().ok()).collect();
        match numbers[..] {
            [file, destination, row] => Ok(Self(file, destination, row)),
            _ => Err(TxError::Refused(format!("{:?} is no position among dead letters", position.0))),
        }
    }
}

/// A dead letter as it is stored.
pub(crate) struct Found {
    pub(crate) place: Place,
    pub(crate) letter: DeadLetter,
    /// The number of its batch.
    batch: i64,
}

/// Up to `limit` dead letters after `place`, in the order of file, destination and row.
pub(crate) fn select(
    connection: &Connection,
    filter: &DeadFilter,
    place: Place,
    limit: usize,
) -> Result<Vec<Found>, TxError> {
    let mut sql = String::from(
        "SELECT d.file, d.destination, d.row, f.id, f.name, n.name, d.attempts, d.at, d.status, d.reason,
             d.cause, d.batch, b.id, d.detail
         FROM dead d JOIN files f ON f.seq = d.file JOIN destinations n ON n.seq = d.destination
             JOIN batches b ON b.seq = d.batch
         WHERE (d.file, d.destination, d.row) > (?, ?, ?)",
    );
    let mut values: Vec<Value> = vec![place.0.into(), place.1.into(), place.2.into()];
    let mut and = |condition: &str, value: Option<Value>| {
        if let Some(value) = value {
            sql.push_str(condition);
            values.push(value);
        }
    };
    match &filter.file {
        Some(FileSelector::Id(id)) => {
            and(" AND d.file = (SELECT seq FROM files WHERE id = ?)", Some(Value::Blob(id.0.to_vec())));
        }
        Some(FileSelector::Name(name)) => {
            and(" AND d.file IN (SELECT seq FROM files WHERE name = ?)", Some(Value::Text(name.clone())));
        }
        None => {}
    }
    and(" AND n.name = ?", filter.destination.clone().map(Value::Text));
    and(" AND d.reason = ?", filter.reason.map(|reason| Value::Integer(reason as i64)));
    and(" AND d.cause = ?", filter.cause.map(|cause| Value::Integer(cause as i64)));
    and(" AND d.at < ?", filter.before.map(|at| Value::Integer(int(at.0))));
    and(" AND d.at >= ?", filter.since.map(|at| Value::Integer(int(at.0))));
    sql.push_str(" ORDER BY d.file, d.destination, d.row LIMIT ?");
    values.push(Value::Integer(int(limit as u64)));

    let mut select = connection.prepare_cached(&sql)?;
    let mut rows = select.query(rusqlite::params_from_iter(values))?;
    let mut letters = Vec::new();
    while let Some(row) = rows.next()? {
        let (reason, cause): (u8, u8) = (row.get(9)?, row.get(10)?);
        let place = Place(row.get(0)?, row.get(1)?, row.get(2)?);
        let letter = DeadLetter {
            position: place.position(),
            file: FileId(row.get(3)?),
            file_name: row.get(4)?,
            destination: row.get(5)?,
            row: uint(row.get(2)?),
            attempts: row.get(6)?,
            last: Attempt {
                at: UnixMs(uint(row.get(7)?)),
                status: row.get(8)?,
                reason: Reason::from_byte(reason).ok_or_else(|| newer("reason", reason))?,
            },
            cause: DeathCause::from_byte(cause).ok_or_else(|| newer("cause", cause))?,
            detail: row.get(13)?,
            batch: BatchId(row.get(12)?),
        };
        letters.push(Found { place, letter, batch: row.get(11)? });
    }
    Ok(letters)
}

fn newer(what: &str, byte: u8) -> TxError {
    TxError::Refused(format!("{what} {byte} of a dead letter was written by a newer version"))
}

/// Sends dead letters again: same ids, same bodies, a new round of delivery. Messages of one root travel
/// together, so that redriving many needs few batches.
pub(crate) fn redrive(tx: &mut Tx<'_>, found: &[Found], now: UnixMs) -> Result<(), TxError> {
    let mut records: BTreeMap<i64, (Record, Rows, Vec<Vec<Attempt>>)> = BTreeMap::new();
    let mut groups: BTreeMap<BatchId, Vec<&Found>> = BTreeMap::new();
    for found in found {
        let (record, ..) = match records.entry(found.batch) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let record = Record::by_seq(tx, found.batch)?;
                let rows = record.rows(tx)?;
                unknown.insert((record, rows, history(tx, found.batch)?))
            }
        };
        groups.entry(record.root).or_default().push(found);
    }
    for (root, group) in groups {
        redrive_group(tx, root, &group, &mut records, now)?;
    }
    for (record, ..) in records.values() {
        record.store(tx)?;
    }
    Ok(())
}

fn redrive_group(
    tx: &mut Tx<'_>,
    root: BatchId,
    group: &[&Found],
    records: &mut BTreeMap<i64, (Record, Rows, Vec<Vec<Attempt>>)>,
    now: UnixMs,
) -> Result<(), TxError> {
    let missing =
        |what: String| TxError::Refused(format!("dead letters can't be redriven: {what} is missing"));
    let origin = Record::by_id(tx, root)?.ok_or_else(|| missing(format!("batch {root}")))?;
    let origin_rows = origin.rows(tx)?;
    let header = tx.caches.header(tx.connection, origin.header_number())?;
    let (file, destination) = (origin.file, origin.destination);
    let mut indexes = Vec::with_capacity(group.len());
    let mut histories = Vec::with_capacity(group.len());
    let mut drive = 0;
    for Found { letter, batch, .. } in group {
        let (record, rows, history) = records.get_mut(batch).expect("redrive has read every batch");
        let row = || missing(format!("row {} of batch {root}", letter.row));
        let index = rows.find(letter.row).ok_or_else(row)?;
        indexes.push(origin_rows.find(letter.row).ok_or_else(row)?);
        let mut attempts = history.get(index).cloned().unwrap_or_default();
        attempts.push(letter.last);
        histories.push(attempts);
        drive = drive.max(record.drive + 1);
        // From here on the new batch's entry is the live one.
        record.states.0[index] = MessageState::Retrying as u8;
        tx.connection
            .prepare_cached("DELETE FROM dead WHERE file = ?1 AND destination = ?2 AND row = ?3")?
            .execute(params![file, destination, int(letter.row)])?;
    }
    let first_row = group[0].letter.row;
    let batch = NewBatch {
        id: BatchId::derive(header.file, &header.destination, first_row, drive, 0),
        root,
        first_row,
        count: group.len() as u32,
        drive,
        attempt: 0,
        // Its age counts from now, or it would die of it at once.
        accepted_at: now,
        not_before: now,
        payload: origin_rows.select(indexes).finish(),
        history: histories,
        header,
    };
    let payload = tx.insert_payload(&batch)?;
    tx.insert_batch(&batch, file, destination, payload)?;
    let counts = tx.count(file, destination);
    counts.dead -= i64::from(batch.count);
    counts.retrying += i64::from(batch.count);
    tx.touch(file, now);
    Ok(())
}

/// The failed attempts of a batch's messages before it; empty if there were none.
pub(crate) fn history(tx: &Tx<'_>, batch: i64) -> Result<Vec<Vec<Attempt>>, TxError> {
    let history: Option<Option<Vec<u8>>> = tx
        .connection
        .prepare_cached(
            "SELECT p.history FROM batches b JOIN payloads p ON p.seq = b.payload WHERE b.seq = ?1",
        )?
        .query_row([batch], |row| row.get(0))
        .optional()?;
    Ok(match history.flatten() {
        Some(bytes) => codec::decode_history(&bytes)?,
        None => Vec::new(),
    })
}
