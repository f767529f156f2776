//! Dead letters: finding them and sending them again.

use std::{collections::BTreeMap, ops::RangeInclusive, sync::Arc, time::Duration};

use postrider_actors::model::{
    batch::Rendering,
    ids::{BatchId, FileId},
    ledger::RowNumbers,
    outcome::{Attempt, DeathCause, Reason},
    time::UnixMs,
};
use rusqlite::{Connection, types::Value};

use postrider_actors::ports::console::{DeadFilter, DeadLetter, Position};

use super::{
    holds::column_of,
    stored::Stored,
    tx::{Tx, TxError, int, uint},
};

/// The position of a walk in the order of dead letters (file, destination, row).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RedriveCursor(i64, i64, i64);

impl RedriveCursor {
    /// As an opaque position.
    fn position(self) -> Position {
        Position(format!("{}.{}.{}", self.0, self.1, self.2))
    }

    /// Reads back what [`RedriveCursor::position`] made.
    pub(crate) fn read(position: &Position) -> Result<Self, TxError> {
        if position.0.is_empty() {
            return Ok(Self::default());
        }
        let numbers: Vec<i64> = position.0.split('.').map_while(|number| number.parse().ok()).collect();
        match numbers[..] {
            [file, destination, row] => Ok(Self(file, destination, row)),
            _ => Err(TxError::Refused(format!("{:?} is not a position among dead letters", position.0))),
        }
    }
}

/// What of `dead d` a filter lets through beyond a place: the condition, and its values.
///
/// Only the place and the last file bound the walk over the index (`+` keeps the rest out of that): whatever the filter,
/// a step goes on where the last one ended, and does not sort.
fn condition(
    connection: &Connection,
    filter: &DeadFilter,
    mut place: RedriveCursor,
) -> Result<(String, Vec<Value>), TxError> {
    let mut sql = String::from("(d.file, d.destination, d.row) > (?, ?, ?)");
    let mut more: Vec<Value> = Vec::new();
    let mut and = |condition: &str, value: Option<Value>| {
        if let Some(value) = value {
            sql.push_str(" AND ");
            sql.push_str(condition);
            more.push(value);
        }
    };
    if let Some(selector) = &filter.file {
        let (column, value) = column_of(selector);
        // None of them: numbers begin with 1.
        let (first, last): (i64, i64) = connection
            .prepare_cached(&format!(
                "SELECT coalesce(min(seq), 0), coalesce(max(seq), 0) FROM files WHERE {column} = ?"
            ))?
            .query_row([&value], |row| Ok((row.get(0)?, row.get(1)?)))?;
        place = place.max(RedriveCursor(first, 0, 0));
        and("d.file <= ?", Some(Value::Integer(last)));
        and(&format!("+d.file IN (SELECT seq FROM files WHERE {column} = ?)"), Some(value));
    }
    let destination = filter.destination.clone().map(Value::Text);
    and("+d.destination = (SELECT seq FROM destinations WHERE name = ?)", destination);
    and("d.status = ?", filter.status.map(|status| Value::Integer(status.into())));
    and("d.reason = ?", filter.reason.map(|reason| Value::Integer(reason as i64)));
    and("d.cause = ?", filter.cause.map(|cause| Value::Integer(cause as i64)));
    and("d.at < ?", filter.before.map(|at| Value::Integer(int(at.0))));
    and("d.at >= ?", filter.since.map(|at| Value::Integer(int(at.0))));
    let mut values: Vec<Value> = vec![place.0.into(), place.1.into(), place.2.into()];
    values.append(&mut more);
    Ok((sql, values))
}

/// Up to `limit` dead letters after `place`, in the order of file, destination and row.
pub(crate) fn select(
    connection: &Connection,
    filter: &DeadFilter,
    place: RedriveCursor,
    limit: usize,
) -> Result<Vec<DeadLetter>, TxError> {
    let (condition, mut values) = condition(connection, filter, place)?;
    values.push(Value::Integer(int(limit as u64)));
    let mut select = connection.prepare_cached(&format!(
        "SELECT d.file, d.destination, d.row, f.id, f.name, n.name, d.attempts, d.at, d.status, d.reason,
             d.cause, b.id, d.batch
         FROM dead d JOIN files f ON f.seq = d.file JOIN destinations n ON n.seq = d.destination
             JOIN batches b ON b.seq = d.batch
         WHERE {condition} ORDER BY d.file, d.destination, d.row LIMIT ?"
    ))?;
    let mut rows = select.query(rusqlite::params_from_iter(values))?;
    let mut letters = Vec::new();
    let mut words = Words::default();
    while let Some(row) = rows.next()? {
        let (reason, cause): (u8, u8) = (row.get(9)?, row.get(10)?);
        letters.push(DeadLetter {
            position: RedriveCursor(row.get(0)?, row.get(1)?, row.get(2)?).position(),
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
            detail: words.on(connection, row.get(12)?, uint(row.get(2)?)),
            batch: BatchId(row.get(11)?),
        });
    }
    Ok(letters)
}

/// What destinations said of dead letters: it is in the records of their batches. Neighbours mostly share one, which is read
/// once.
#[derive(Default)]
struct Words(Option<(i64, Option<(Stored, RowNumbers)>)>);

impl Words {
    /// Of the message of `row` in a batch; nothing of a batch that is damaged, which is said elsewhere.
    fn on(&mut self, connection: &Connection, batch: i64, row: u64) -> Option<String> {
        if self.0.as_ref().is_none_or(|(last, _)| *last != batch) {
            let read = || {
                let stored = Stored::by_seq(connection, batch).ok()?;
                let rows = stored.rows().ok()?;
                Some((stored, rows))
            };
            self.0 = Some((batch, read()));
        }
        let (stored, rows) = self.0.as_ref()?.1.as_ref()?;
        let index = u32::try_from(rows.find(row)?).ok()?;
        Some(stored.record.exceptions.get(&index)?.death.as_ref()?.detail.as_deref()?.to_owned())
    }
}

fn newer(what: &str, byte: u8) -> TxError {
    TxError::Refused(format!("{what} {byte} of a dead letter was written by a newer version"))
}

/// `View::count_dead`.
pub(crate) fn count(connection: &Connection, filter: &DeadFilter) -> Result<u64, TxError> {
    let (condition, values) = condition(connection, filter, RedriveCursor::default())?;
    let count = format!("SELECT count(*) FROM dead d WHERE {condition}");
    Ok(uint(connection.query_row(&count, rusqlite::params_from_iter(values), |row| row.get(0))?))
}

/// One step of a redrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RedriveStep {
    /// How many dead letters it looked at.
    pub(crate) looked_at: usize,
    /// How many of them are to be sent again.
    pub(crate) redriven: usize,
    /// The position of the last of them.
    pub(crate) looked_until: RedriveCursor,
}

impl RedriveStep {
    /// What was found behind `place`, and nothing is done with it yet.
    fn beyond(place: RedriveCursor, found: &[(RedriveCursor, i64)]) -> Self {
        let looked_until = found.last().map_or(place, |(place, _)| *place);
        Self { looked_at: found.len(), redriven: 0, looked_until }
    }
}

/// Up to `limit` dead letters after `place`, each with the number of its batch.
fn find(
    connection: &Connection,
    filter: &DeadFilter,
    place: RedriveCursor,
    limit: usize,
) -> Result<Vec<(RedriveCursor, i64)>, TxError> {
    let (condition, mut values) = condition(connection, filter, place)?;
    values.push(Value::Integer(int(limit as u64)));
    let mut select = connection.prepare_cached(&format!(
        "SELECT d.file, d.destination, d.row, d.batch FROM dead d
         WHERE {condition} ORDER BY d.file, d.destination, d.row LIMIT ?"
    ))?;
    let found = select.query_map(rusqlite::params_from_iter(&values), |row| {
        Ok((RedriveCursor(row.get(0)?, row.get(1)?, row.get(2)?), row.get(3)?))
    })?;
    Ok(found.collect::<Result<_, _>>()?)
}

/// The dead letters `group` of one batch: the batch, and their indexes in it.
fn load(connection: &Connection, group: &[(RedriveCursor, i64)]) -> Result<(Stored, Vec<u32>), TxError> {
    let stored = Stored::by_seq(connection, group[0].1)?;
    let rows = stored.rows()?;
    let index = |(RedriveCursor(_, _, row), _): &(RedriveCursor, i64)| {
        let missing = || format!("dead letters can't be redriven: batch {} has no row {row}", stored.id);
        rows.find(uint(*row)).map(|index| index as u32).ok_or_else(|| TxError::Refused(missing()))
    };
    let indexes = group.iter().map(index).collect::<Result<_, _>>()?;
    Ok((stored, indexes))
}

/// Sends up to `limit` dead letters after `place` again: same ids, same bodies, a new round of delivery in the same
/// batches. Each batch costs one write, however many of its messages are dead, and all that leave the list one statement.
pub(crate) fn redrive(
    tx: &mut Tx<'_>,
    filter: &DeadFilter,
    place: RedriveCursor,
    limit: usize,
    now: UnixMs,
) -> Result<RedriveStep, TxError> {
    let found = find(tx.connection, filter, place, limit)?;
    let mut step = RedriveStep::beyond(place, &found);
    if found.is_empty() {
        return Ok(step);
    }
    // The rows of a batch are neighbours.
    for group in found.chunk_by(|(_, left), (_, right)| left == right) {
        let (mut stored, indexes) = load(tx.connection, group)?;
        let mut changes = stored.record.redrive(indexes, now);
        // Below, all at once.
        step.redriven += std::mem::take(&mut changes.rose).len();
        stored.store_changes(tx, &changes)?;
    }
    // What was found, and nothing else.
    let (condition, mut values) = condition(tx.connection, filter, place)?;
    let last = step.looked_until;
    values.extend([last.0, last.1, last.2].map(Value::Integer));
    tx.connection
        .prepare_cached(&format!(
            "DELETE FROM dead AS d WHERE {condition} AND (d.file, d.destination, d.row) <= (?, ?, ?)"
        ))?
        .execute(rusqlite::params_from_iter(values))?;
    Ok(step)
}

/// Sends up to `limit` dead letters after `place` again with new bodies, those that were never sent. With `dry_run` it only
/// counts.
pub(crate) fn rerender(
    tx: &mut Tx<'_>,
    filter: &DeadFilter,
    renderings: &BTreeMap<String, Rendering>,
    place: RedriveCursor,
    limit: usize,
    now: UnixMs,
    dry_run: bool,
) -> Result<RedriveStep, TxError> {
    let found = find(tx.connection, filter, place, limit)?;
    let mut step = RedriveStep::beyond(place, &found);
    for group in found.chunk_by(|(_, left), (_, right)| left == right) {
        let (mut stored, indexes) = load(tx.connection, group)?;
        let history = stored.history(tx.connection)?;
        let keeps = stored.record.keeps_bodies(history.iter().map(Vec::as_slice))?;
        let header = tx.caches.header(tx.connection, stored.header)?;
        let Some(rendering) = renderings.get(&header.destination).filter(|_| keeps.is_none()) else {
            continue;
        };
        let changes = stored.record.rerender(indexes, now);
        step.redriven += changes.rose.len();
        if !dry_run {
            let header = Arc::new(header.rendered_by(rendering));
            let number = tx.header_number(&header, stored.file, stored.destination)?;
            stored.set_header(tx.connection, number)?;
            stored.store_changes(tx, &changes)?;
        }
    }
    Ok(step)
}

/// How many dead letters are sent again in one transaction, so that each takes about as long as the daemon's writer may
/// have to wait.
pub(crate) struct RedrivePace {
    letters: usize,
}

/// The first step, and the shortest and the longest one.
const FIRST: usize = 2_000;
const LETTERS: RangeInclusive<usize> = 250..=32_000;

/// How long a step should take.
const STEP: RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_millis(60);

impl Default for RedrivePace {
    fn default() -> Self {
        Self { letters: FIRST }
    }
}

impl RedrivePace {
    /// Dead letters of the next step.
    pub(crate) fn letters(&self) -> usize {
        self.letters
    }

    /// A step has taken so long.
    pub(crate) fn took(&mut self, step: Duration) {
        if step < *STEP.start() {
            self.letters = (self.letters * 2).min(*LETTERS.end());
        } else if step > *STEP.end() {
            self.letters = (self.letters / 2).max(*LETTERS.start());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_as_long_as_the_machine_is_fast() {
        let mut pace = RedrivePace::default();
        let take = |pace: &mut RedrivePace, per_letter_us: u64, steps: usize| {
            for _ in 0..steps {
                pace.took(Duration::from_micros(per_letter_us * pace.letters() as u64));
            }
            pace.letters()
        };
        assert_eq!(take(&mut pace, 2, 10), 16_000, "32 ms");
        assert_eq!(take(&mut pace, 20, 10), 2_000, "40 ms");
        assert_eq!(take(&mut pace, 10_000, 10), 250, "never less: a step has its sync");
        assert_eq!(take(&mut pace, 0, 10), 32_000);
    }
}
