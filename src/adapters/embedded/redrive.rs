//! Dead letters: finding them and sending them again.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
};

use postrider_actors::model::{
    batch::{NewBatch, Rows},
    ids::{BatchId, FileId},
    outcome::{Attempt, DeathCause, Reason},
    state::MessageState,
    time::UnixMs,
};
use rusqlite::{Connection, OptionalExtension, params, types::Value};

use super::{
    codec,
    settle::Record,
    tx::{Tx, TxError, int, uint},
};

/// Dead letters per transaction: what the daemon's writer may have to wait for.
pub(crate) const REDRIVE_STEP: usize = 2_000;

/// Files by what an operator calls them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileSelector {
    /// The one with this id.
    Id(FileId),
    /// All with this name: the same name may be dropped with new content (F19).
    Name(String),
}

impl From<&str> for FileSelector {
    /// 32 hex digits are an id; anything else is a name.
    fn from(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Name(text.to_owned()), Self::Id)
    }
}

/// Which dead letters; all that is set must hold.
#[derive(Clone, Debug, Default)]
pub struct DeadFilter {
    /// Of one file, or of all with one name.
    pub file: Option<FileSelector>,
    /// Of one destination.
    pub destination: Option<String>,
    /// Whose last attempt failed for this reason.
    pub reason: Option<Reason>,
    /// That were given up for this cause.
    pub cause: Option<DeathCause>,
    /// That were given up before.
    pub before: Option<UnixMs>,
    /// That were given up then or later.
    pub since: Option<UnixMs>,
}

/// Where in the order of dead letters (file, destination, row) a walk stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeadCursor(i64, i64, i64);

/// A message that was given up.
#[derive(Clone)]
pub struct DeadLetter {
    /// Where a walk that has seen it goes on.
    pub cursor: DeadCursor,
    /// The file its row came from.
    pub file: FileId,
    /// That file's name.
    pub file_name: String,
    /// Where it was to go.
    pub destination: String,
    /// Its row.
    pub row: u64,
    /// Attempts that were made in its last drive.
    pub attempts: u32,
    /// The last of them.
    pub last: Attempt,
    /// Why there is no other.
    pub cause: DeathCause,
    /// The batch that holds it.
    pub(crate) batch: i64,
}

impl fmt::Debug for DeadLetter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeadLetter({}_{} to {})", self.file, self.row, self.destination)
    }
}

/// Up to `limit` dead letters after `cursor`, in the order of file, destination and row.
pub(crate) fn select(
    connection: &Connection,
    filter: &DeadFilter,
    cursor: DeadCursor,
    limit: usize,
) -> Result<Vec<DeadLetter>, TxError> {
    let mut sql = String::from(
        "SELECT d.file, d.destination, d.row, f.id, f.name, n.name, d.attempts, d.at, d.status, d.reason,
             d.cause, d.batch
         FROM dead d JOIN files f ON f.seq = d.file JOIN destinations n ON n.seq = d.destination
         WHERE (d.file, d.destination, d.row) > (?, ?, ?)",
    );
    let mut values: Vec<Value> = vec![cursor.0.into(), cursor.1.into(), cursor.2.into()];
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
        letters.push(DeadLetter {
            cursor: DeadCursor(row.get(0)?, row.get(1)?, row.get(2)?),
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
            batch: row.get(11)?,
        });
    }
    Ok(letters)
}

fn newer(what: &str, byte: u8) -> TxError {
    TxError::Refused(format!("{what} {byte} of a dead letter was written by a newer version"))
}

/// Sends dead letters again: same ids, same bodies, a new round of delivery. Messages of one root travel
/// together, so that redriving many needs few batches.
pub(crate) fn redrive(tx: &mut Tx<'_>, letters: &[DeadLetter], now: UnixMs) -> Result<(), TxError> {
    let mut records: BTreeMap<i64, (Record, Rows, Vec<Vec<Attempt>>)> = BTreeMap::new();
    let mut groups: BTreeMap<BatchId, Vec<&DeadLetter>> = BTreeMap::new();
    for letter in letters {
        let (record, ..) = match records.entry(letter.batch) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let record = Record::by_seq(tx, letter.batch)?;
                let rows = record.rows(tx)?;
                unknown.insert((record, rows, history(tx, letter.batch)?))
            }
        };
        groups.entry(record.root).or_default().push(letter);
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
    group: &[&DeadLetter],
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
    for letter in group {
        let (record, rows, history) = records.get_mut(&letter.batch).expect("redrive has read every batch");
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
    let first_row = group[0].row;
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
