//! Operations on the outbox as a whole: listing it, fetching from it, and letting go of what is done.
//!
//! An archived batch keeps its row and what was recorded of it, for I1 and `postrider messages`; its payload is
//! reduced to the numbers of its rows. Nothing may need the rows again: a redrive takes them from the root of a
//! dead message's batches, and a late 2xx is told to the latest of them. So batches with one root wait for
//! each other.

use bytes::Bytes;
use postrider_actors::{
    model::{batch::Rows, ids::BatchId, time::UnixMs},
    ports::{Cursor, Dispatch, Fetched, ItemOutcome, OutboxEntry, Page, PageQuery},
};
use rusqlite::{Connection, OptionalExtension, params};

use super::{
    leases::{phase, read_batch},
    tx::{Caches, Phase, Tx, TxError, int, uint},
};

/// Batches that one step of archiving looks at: what the writer is kept from its other work for.
const LOOK_BATCHES_MAX: usize = 1_024;

/// Where a listing of outstanding batches stands in their order, by due time, then by number.
const OUTSTANDING_CURSOR: &str = "outstanding";

/// Where a listing of dispatched batches stands in their order, by number. The time is not used.
const DISPATCHED_CURSOR: &str = "dispatched";

/// `KIND:TIME:NUMBER`, decimal. Numbers of batches are never used again while the batch is stored.
fn cursor(kind: &str, time: i64, seq: i64) -> Cursor {
    Cursor(format!("{kind}:{time}:{seq}"))
}

fn read_cursor(cursor: Option<&Cursor>, kind: &str) -> Result<(i64, i64), TxError> {
    let Some(Cursor(text)) = cursor else { return Ok((i64::MIN, 0)) };
    let read = || {
        let (time, seq) = text.strip_prefix(kind)?.strip_prefix(':')?.split_once(':')?;
        Some((time.parse().ok()?, seq.parse().ok()?))
    };
    read().ok_or_else(|| {
        TxError::Refused(format!("{text:?} is no cursor of a listing of {kind} batches; begin without one"))
    })
}

/// `OutboxArchive::page`.
pub(crate) fn page(connection: &Connection, caches: &mut Caches, query: &PageQuery) -> Result<Page, TxError> {
    let kind = match query.dispatch {
        Dispatch::Outstanding => OUTSTANDING_CURSOR,
        Dispatch::Dispatched => DISPATCHED_CURSOR,
    };
    let (time, seq) = read_cursor(query.cursor.as_ref(), kind)?;
    let limit = query.limit.max(1);
    // One more, to know whether there is a page after this one.
    let mut values = vec![seq, int(limit as u64).saturating_add(1)];
    if let Some(name) = &query.destination {
        let number: Option<i64> = connection
            .prepare_cached("SELECT seq FROM destinations WHERE name = ?1")?
            .query_row([&**name], |row| row.get(0))
            .optional()?;
        let Some(number) = number else { return Ok(Page::default()) };
        values.push(number);
    }
    // Which index is used is said where SQLite would rather walk over everything that was ever stored.
    let sql = match (query.dispatch, &query.destination) {
        (Dispatch::Outstanding, None) => {
            "SELECT seq, id, destination, count, not_before FROM batches
             WHERE phase = 0 AND (not_before, seq) > (?3, ?1) ORDER BY not_before, seq LIMIT ?2"
        }
        (Dispatch::Outstanding, Some(_)) => {
            "SELECT seq, id, destination, count, not_before FROM batches
             WHERE phase = 0 AND destination = ?3 AND (not_before, seq) > (?4, ?1)
             ORDER BY not_before, seq LIMIT ?2"
        }
        (Dispatch::Dispatched, None) => {
            "SELECT seq, id, destination, count, not_before FROM batches INDEXED BY batches_kept
             WHERE archived = 0 AND phase > 0 AND seq > ?1 ORDER BY seq LIMIT ?2"
        }
        (Dispatch::Dispatched, Some(_)) => {
            "SELECT seq, id, destination, count, not_before FROM batches INDEXED BY batches_kept_by_destination
             WHERE archived = 0 AND phase > 0 AND destination = ?3 AND seq > ?1 ORDER BY seq LIMIT ?2"
        }
    };
    if query.dispatch == Dispatch::Outstanding {
        values.push(time);
    }
    let mut select = connection.prepare_cached(sql)?;
    let mut rows = select.query(rusqlite::params_from_iter(values))?;
    let mut page = Page::default();
    let mut last = (0, 0);
    while let Some(row) = rows.next()? {
        if page.entries.len() == limit {
            page.next = Some(cursor(kind, last.0, last.1));
            break;
        }
        let not_before: i64 = row.get(4)?;
        last = if kind == OUTSTANDING_CURSOR { (not_before, row.get(0)?) } else { (0, row.get(0)?) };
        page.entries.push(OutboxEntry {
            id: BatchId(row.get(1)?),
            destination: caches.destination_name(connection, row.get(2)?)?,
            count: row.get(3)?,
            not_before: UnixMs(uint(not_before)),
            batch: None,
        });
    }
    Ok(page)
}

/// `OutboxArchive::get`.
pub(crate) fn get(
    connection: &Connection,
    caches: &mut Caches,
    ids: &[BatchId],
) -> Result<Vec<(BatchId, Fetched)>, TxError> {
    let mut select = connection.prepare_cached("SELECT seq FROM batches WHERE id = ?1 AND archived = 0")?;
    let mut fetched = Vec::with_capacity(ids.len());
    for &id in ids {
        let seq: Option<i64> = select.query_row([id.0], |row| row.get(0)).optional()?;
        fetched.push(match seq {
            Some(seq) => (id, Fetched::Batch(read_batch(connection, caches, seq)?)),
            None => (id, Fetched::Missing),
        });
    }
    Ok(fetched)
}

/// `OutboxArchive::count_outstanding`.
pub(crate) fn count_outstanding(connection: &Connection) -> Result<u64, TxError> {
    let count = connection
        .prepare_cached("SELECT count(*) FROM batches WHERE phase = 0")?
        .query_row([], |row| row.get(0))?;
    Ok(uint(count))
}

/// `OutboxArchive::delete`.
pub(crate) fn delete(tx: &Tx<'_>, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, TxError> {
    let mut outcomes = Vec::with_capacity(ids.len());
    for &id in ids {
        let outcome = match Kept::by_id(tx, id)? {
            None => ItemOutcome::Ok,
            Some(batch) => {
                if let Some(why) = batch.why_kept(tx)? {
                    ItemOutcome::Permanent(format!("batch {id} is kept: {why}"))
                } else {
                    batch.archive(tx)?;
                    ItemOutcome::Ok
                }
            }
        };
        outcomes.push((id, outcome));
    }
    Ok(outcomes)
}

/// One step of `OutboxArchive::archive`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// How many it archived.
    pub(crate) archived: usize,
    /// The number of the last batch it looked at; 0 if the next step is to begin anew.
    pub(crate) looked_until: i64,
}

/// Archives up to `limit` batches with numbers above `after` that were due before `before`.
pub(crate) fn archive(tx: &Tx<'_>, after: i64, before: UnixMs, limit: usize) -> Result<Step, TxError> {
    let mut step = Step { archived: 0, looked_until: after };
    if limit == 0 {
        return Ok(step);
    }
    let candidates: Vec<(Kept, UnixMs)> = tx
        .connection
        .prepare_cached(
            "SELECT seq, id, root, file, destination, payload, first_row, phase, not_before
             FROM batches INDEXED BY batches_kept WHERE archived = 0 AND seq > ?1 ORDER BY seq LIMIT ?2",
        )?
        .query_map([after, int(LOOK_BATCHES_MAX as u64)], |row| {
            Ok((Kept::read(row)?, UnixMs(uint(row.get(8)?))))
        })?
        .collect::<Result<_, _>>()?;
    let is_last = candidates.len() < LOOK_BATCHES_MAX;
    for (batch, due) in candidates {
        if step.archived == limit {
            return Ok(step);
        }
        step.looked_until = batch.seq;
        if due < before && batch.why_kept(tx)?.is_none() {
            batch.archive(tx)?;
            step.archived += 1;
        }
    }
    if is_last {
        step.looked_until = 0;
    }
    Ok(step)
}

/// `OutboxArchive::forget_entries`.
pub(crate) fn forget_entries(tx: &Tx<'_>, before: UnixMs, limit: usize) -> Result<usize, TxError> {
    Ok(tx
        .connection
        .prepare_cached(
            "DELETE FROM entries WHERE (feed, id) IN
                 (SELECT feed, id FROM entries WHERE at < ?1 ORDER BY at LIMIT ?2)",
        )?
        .execute([int(before.0), int(limit as u64)])?)
}

/// A batch that is not archived.
struct Kept {
    seq: i64,
    root: [u8; 16],
    /// Whether it is its own root, a first attempt.
    is_root: bool,
    file: i64,
    destination: i64,
    payload: i64,
    first_row: i64,
    phase: i64,
}

impl Kept {
    fn by_id(tx: &Tx<'_>, id: BatchId) -> Result<Option<Self>, TxError> {
        Ok(tx
            .connection
            .prepare_cached(
                "SELECT seq, id, root, file, destination, payload, first_row, phase FROM batches
                 WHERE id = ?1 AND archived = 0",
            )?
            .query_row([id.0], Self::read)
            .optional()?)
    }

    fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Self> {
        let root: Option<[u8; 16]> = row.get(2)?;
        Ok(Self {
            seq: row.get(0)?,
            is_root: root.is_none(),
            root: root.map_or_else(|| row.get(1), Ok)?,
            file: row.get(3)?,
            destination: row.get(4)?,
            payload: row.get(5)?,
            first_row: row.get(6)?,
            phase: row.get(7)?,
        })
    }

    /// Why it can't go, if it can't.
    fn why_kept(&self, tx: &Tx<'_>) -> Result<Option<&'static str>, TxError> {
        match phase(self.phase)? {
            Phase::Outstanding => return Ok(Some("it is outstanding")),
            Phase::Queued | Phase::Leased => return Ok(Some("it is not settled")),
            Phase::Settled => {}
        }
        let is_open = tx
            .connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM batches WHERE id = ?1 AND phase <> 3)
                     OR EXISTS (SELECT 1 FROM batches WHERE root = ?1 AND phase <> 3)",
            )?
            .query_row([self.root], |row| row.get(0))?;
        if is_open {
            return Ok(Some("another batch with its root is not settled"));
        }
        // The rows of a root are those from its first to the next root's.
        let is_dead = tx
            .connection
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM dead WHERE file = ?2 AND destination = ?3
                     AND row >= (SELECT first_row FROM batches WHERE id = ?1)
                     AND row < coalesce((SELECT min(n.first_row) FROM batches n
                         WHERE n.file = ?2 AND n.destination = ?3 AND n.root IS NULL
                             AND n.first_row > (SELECT first_row FROM batches WHERE id = ?1)),
                         9223372036854775807))",
            )?
            .query_row(params![self.root, self.file, self.destination], |row| row.get(0))?;
        Ok(if is_dead { Some("a message of its root is dead, and a redrive would need it") } else { None })
    }

    /// Marks it, and reduces its payload if nobody else has it.
    fn archive(&self, tx: &Tx<'_>) -> Result<(), TxError> {
        tx.connection
            .prepare_cached("UPDATE batches SET archived = 1 WHERE seq = ?1")?
            .execute([self.seq])?;
        // Only first attempts share, with those of the same rows for the file's other destinations.
        let is_shared = self.is_root
            && tx
                .connection
                .prepare_cached(
                    "SELECT 1 FROM file_destinations d JOIN batches b INDEXED BY batches_by_row
                         ON b.file = d.file AND b.destination = d.destination
                     WHERE d.file = ?1 AND b.first_row = ?2 AND b.root IS NULL AND b.payload = ?3
                         AND b.archived = 0",
                )?
                .exists([self.file, self.first_row, self.payload])?;
        if is_shared {
            return Ok(());
        }
        let body: Vec<u8> = tx
            .connection
            .prepare_cached("SELECT body FROM payloads WHERE seq = ?1")?
            .query_row([self.payload], |row| row.get(0))?;
        let skeleton = Rows::decode(Bytes::from(body))?.skeleton().finish();
        tx.connection
            .prepare_cached("UPDATE payloads SET body = ?2 WHERE seq = ?1")?
            .execute(params![self.payload, &skeleton[..]])?;
        Ok(())
    }
}
