//! Which files are held at which destinations.

use postrider_actors::{
    model::{
        canary::Trial,
        hold::{FileHold, HeldFile, HoldCause, HoldChange},
        ids::FileId,
        priority::{FilePriority, Priority},
        time::UnixMs,
    },
    ports::console::{FileSelector, FilesAt, FilesCount, OrderedFiles},
};
use rusqlite::{Connection, OptionalExtension, Row, params, types::Value};

use super::{
    stored::{Stored, select_stored},
    tx::{Tx, TxError, int, priority, uint},
};

/// The hold in four columns, the first of them at `at`; `None` if nothing is held.
pub(crate) fn read(row: &Row<'_>, at: usize) -> Result<Option<FileHold>, TxError> {
    let Some(from_row) = row.get::<_, Option<i64>>(at)? else { return Ok(None) };
    let cause: u8 = row.get(at + 2)?;
    let newer = || TxError::Refused(format!("cause {cause} of a hold was written by a newer version"));
    Ok(Some(FileHold {
        from_row: uint(from_row),
        since: UnixMs(uint(row.get(at + 1)?)),
        cause: HoldCause::from_byte(cause).ok_or_else(newer)?,
        reason: row.get(at + 3)?,
    }))
}

/// `Steering::held_files`. Where nothing is held it looks into an index that is empty.
pub(crate) fn list(connection: &Connection) -> Result<Vec<HeldFile>, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT f.id, f.feed, f.name, n.name, d.held_from, d.held_since, d.held_cause, d.held_reason
         FROM file_destinations d INDEXED BY files_held JOIN files f ON f.seq = d.file
             JOIN destinations n ON n.seq = d.destination
         WHERE d.held_since IS NOT NULL ORDER BY d.held_since, d.file, d.destination",
    )?;
    let mut rows = select.query([])?;
    let mut held = Vec::new();
    while let Some(row) = rows.next()? {
        let Some(hold) = read(row, 4)? else { continue };
        held.push(HeldFile {
            file: FileId(row.get(0)?),
            feed: row.get(1)?,
            name: row.get(2)?,
            destination: row.get(3)?,
            hold,
        });
    }
    Ok(held)
}

/// Changes what is held of the file `file` at `destination`; whether that changed anything.
pub(crate) fn change(tx: &Tx<'_>, file: i64, destination: i64, change: &HoldChange) -> Result<bool, TxError> {
    let current = tx
        .connection
        .prepare_cached(
            "SELECT held_from, held_since, held_cause, held_reason FROM file_destinations
             WHERE file = ?1 AND destination = ?2",
        )?
        .query_row([file, destination], |row| Ok(read(row, 0)))
        .optional()?;
    let Some(current) = current.transpose()? else { return Ok(false) };
    let Some(next) = change.apply(current.as_ref()) else { return Ok(false) };
    let next = next.as_ref();
    tx.connection
        .prepare_cached(
            "UPDATE file_destinations SET held_from = ?3, held_since = ?4, held_cause = ?5, held_reason = ?6
             WHERE file = ?1 AND destination = ?2",
        )?
        .execute(params![
            file,
            destination,
            next.map(|hold| int(hold.from_row)),
            next.map(|hold| int(hold.since.0)),
            next.map(|hold| hold.cause as u8),
            next.map(|hold| &hold.reason),
        ])?;
    Ok(true)
}

/// Changes what is held of files; at how many destinations.
pub(crate) fn change_of(tx: &Tx<'_>, of: &FilesAt, wanted: &HoldChange) -> Result<usize, TxError> {
    let (places, value) = places(of);
    let mut select = tx.connection.prepare_cached(&format!("SELECT d.file, d.destination {places}"))?;
    let places = select.query_map(params![value, of.destination], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let mut changed = 0;
    for (file, destination) in places.collect::<Result<Vec<_>, _>>()? {
        changed += usize::from(change(tx, file, destination, wanted)?);
    }
    Ok(changed)
}

/// `Steering::priorities`. Where nothing was ordered it looks into an index that is empty.
pub(crate) fn priorities(connection: &Connection) -> Result<Vec<FilePriority>, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT f.id, n.name, d.priority
         FROM file_destinations d INDEXED BY files_prioritized JOIN files f ON f.seq = d.file
             JOIN destinations n ON n.seq = d.destination
         WHERE d.priority IS NOT NULL AND d.sent + d.dead + d.unsent + d.cancelled - d.accepted < 0 ORDER BY d.file, d.destination",
    )?;
    let mut rows = select.query([])?;
    let mut ordered = Vec::new();
    while let Some(row) = rows.next()? {
        let (file, destination) = (FileId(row.get(0)?), row.get(1)?);
        ordered.push(FilePriority { file, destination, priority: priority(row.get(2)?)? });
    }
    Ok(ordered)
}

/// Orders how urgent files are; at how many destinations that is new.
pub(crate) fn prioritize(tx: &Tx<'_>, of: &FilesAt, priority: Priority) -> Result<usize, TxError> {
    let (places, value) = places(of);
    let mut update = tx.connection.prepare_cached(&format!(
        "UPDATE file_destinations SET priority = ?3 FROM (
             SELECT d.file AS in_file, d.destination AS at, coalesce(d.priority, f.priority) AS before {places}) p
         WHERE p.in_file = file AND p.at = destination AND p.before <> ?3"
    ))?;
    Ok(update.execute(params![value, of.destination, priority as u8])?)
}

/// `View::count_files`.
pub(crate) fn count(connection: &Connection, of: &FilesAt) -> Result<FilesCount, TxError> {
    let (places, value) = places(of);
    let count = format!(
        "SELECT count(DISTINCT d.file), count(*), count(d.held_since),
             coalesce(sum(d.accepted - d.sent - d.dead - d.cancelled), 0) {places}"
    );
    Ok(connection.query_row(&count, params![value, of.destination], |row| {
        Ok(FilesCount {
            files: uint(row.get(0)?),
            places: uint(row.get(1)?),
            held: uint(row.get(2)?),
            open: uint(row.get(3)?),
        })
    })?)
}

/// Where an order is to be carried out, in SQL: which `file_destinations d` of files `f`, and the value for `?1`; `?2` is
/// the destination.
fn places(of: &FilesAt) -> (String, Value) {
    let (condition, value) = match &of.files {
        OrderedFiles::Named(selector) => {
            let (column, value) = column_of(selector);
            (format!("f.{column} = ?1"), value)
        }
        OrderedFiles::OpenOf(feed) => {
            ("f.feed = ?1 AND f.settled_at IS NULL".to_owned(), Value::Text(feed.clone()))
        }
        OrderedFiles::Open => ("?1 IS NULL AND f.settled_at IS NULL".to_owned(), Value::Null),
    };
    let sql = format!(
        "FROM files f JOIN file_destinations d ON d.file = f.seq JOIN destinations n ON n.seq = d.destination
         WHERE {condition} AND (?2 IS NULL OR n.name = ?2)"
    );
    (sql, value)
}

/// `Steering::trial`.
pub(crate) fn trial(
    connection: &Connection,
    file: FileId,
    destination: &str,
    before: u64,
) -> Result<Trial, TxError> {
    let mut select = connection.prepare_cached(select_stored!(
        "LEFT JOIN results r ON r.batch = b.seq
         WHERE b.file = (SELECT seq FROM files WHERE id = ?1)
             AND b.destination = (SELECT seq FROM destinations WHERE name = ?2) AND b.first_row < ?3"
    ))?;
    let mut rows = select.query(params![file.0, destination, int(before)])?;
    let mut trial = Trial::default();
    while let Some(row) = rows.next()? {
        let stored = Stored::read(row)?;
        let history =
            if Trial::needs_history(&stored.record) { stored.history(connection)? } else { Vec::new() };
        trial.add(&stored.record, history.iter().map(Vec::as_slice))?;
    }
    Ok(trial)
}

/// The column of `files` that a selector looks at, and the value it looks for.
pub(crate) fn column_of(selector: &FileSelector) -> (&'static str, Value) {
    match selector {
        FileSelector::Id(id) => ("id", Value::Blob(id.0.to_vec())),
        FileSelector::Name(name) => ("name", Value::Text(name.clone())),
    }
}
