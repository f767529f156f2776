//! The queue: leasing what is due, and giving it back. These writes need no sync of their own. They must
//! outlive the process (or a batch that kills it would never be a suspect), which the WAL in the page
//! cache does; a power cut undoes them together with the worker they were about.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::Bytes;
use postrider_actors::{
    model::{
        fairness::Waiting,
        ids::{BatchId, FileId},
        ledger::{Deadline, Evidence, Grant},
        priority::Priority,
        time::{MonoMs, UnixMs},
    },
    ports::{FirstTurns, ItemOutcome, Lease, LeaseRequest, LeaseToken, Release, Want},
};
use rusqlite::{Connection, OptionalExtension, params};

use super::{
    stored::{DUE, FIRST_ROW, Stored, select_stored},
    tx::{DestinationTurns, Looked, Tx, TxError, check_sum, int, priority},
};

/// Payload that one call leases, in bytes: what the writer copies before others have their turn. One batch is leased
/// whatever its size.
const LEASE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Files of a destination that one call looks at for first attempts. Where more wait, newer ones and the next calls' are …
const FILES_LOOKED_AT: usize = 256;

/// … and batches that it looks at for retries, those that have been due for longest.
const RETRIES_LOOKED_AT: i64 = 128;

/// What is due of a destination and is to be tried again, the oldest first, with its file and how urgent that is; nothing
/// that waits because its file is held or closed.
pub(crate) const RETRIES_DUE: &str = "SELECT b.seq, b.file, coalesce(d.priority, f.priority)
     FROM batches b INDEXED BY batches_waiting
         CROSS JOIN file_destinations d ON d.file = b.file AND d.destination = b.destination
         CROSS JOIN files f ON f.seq = b.file
     WHERE b.destination = ?1 AND b.retry = 1 AND b.holder IS NULL AND b.due IS NOT NULL AND b.place <= ?2
         AND (d.held_from IS NULL OR d.held_from > b.first_row)
         AND NOT coalesce(d.closed_from <= ?2 AND d.closed_until > ?2, 0)
     ORDER BY b.place, b.due, b.file, b.first_row LIMIT ?3";

/// The next file of a destination of which a first attempt waits, due or not; from which row on it waits, because it is
/// held or, at ?3, closed.
pub(crate) const NEXT_FILE: &str = "SELECT b.place, f.id, coalesce(d.priority, f.priority),
         iif(d.closed_from <= ?3 AND d.closed_until > ?3, 0, d.held_from)
     FROM batches b INDEXED BY batches_waiting
         CROSS JOIN file_destinations d ON d.file = b.place AND d.destination = b.destination
         CROSS JOIN files f ON f.seq = b.place
     WHERE b.destination = ?1 AND b.retry = 0 AND b.holder IS NULL AND b.due IS NOT NULL AND b.place > ?2
     ORDER BY b.place LIMIT 1";

/// The next batch of a file that is due for a first attempt, after one that became due at ?4 with the first row ?5.
pub(crate) const FRESH_DUE: &str = select_stored!(
    "INDEXED BY batches_waiting LEFT JOIN results r ON r.batch = b.seq
     WHERE b.destination = ?1 AND b.retry = 0 AND b.holder IS NULL AND b.place = ?2 AND b.due <= ?3
         AND (b.due, b.file, b.first_row) > (?4, ?2, ?5)
     ORDER BY b.due, b.file, b.first_row LIMIT 1"
);

/// The same of a file of which all from row ?6 on is held: the few before that, by their rows.
pub(crate) const FRESH_DUE_BEFORE: &str = select_stored!(
    "INDEXED BY batches_by_row LEFT JOIN results r ON r.batch = b.seq
     WHERE b.file = ?2 AND b.destination = ?1 AND b.first_row > ?5 AND b.first_row < ?6
         AND b.retry = 0 AND b.holder IS NULL AND b.due <= ?3 AND ?4 IS NOT NULL
     ORDER BY b.first_row LIMIT 1"
);

/// The oldest open batches of a destination that keeps an order, due or not, by file and first row; none that waits because
/// its file is held or closed. What was never tried is in that order already, file by file.
pub(crate) const OLDEST: &str = "SELECT seq FROM (
         SELECT * FROM (
             SELECT b.seq, b.file, b.first_row FROM batches b INDEXED BY batches_waiting
                 CROSS JOIN file_destinations d ON d.file = b.place AND d.destination = b.destination
             WHERE b.destination = ?1 AND b.retry = 0 AND b.holder IS NULL AND b.due IS NOT NULL
                 AND (d.held_from IS NULL OR d.held_from > b.first_row)
                 AND NOT coalesce(d.closed_from <= ?2 AND d.closed_until > ?2, 0)
             ORDER BY b.place, b.first_row LIMIT ?3)
         UNION ALL
         SELECT b.seq, b.file, b.first_row FROM batches b INDEXED BY batches_waiting
             CROSS JOIN file_destinations d ON d.file = b.file AND d.destination = b.destination
         WHERE b.destination = ?1 AND b.retry = 1 AND b.holder IS NULL AND b.due IS NOT NULL
             AND (d.held_from IS NULL OR d.held_from > b.first_row)
             AND NOT coalesce(d.closed_from <= ?2 AND d.closed_until > ?2, 0))
     ORDER BY file, first_row LIMIT ?3";

/// The workers of this process that have leased something. One that lives and could not extend its leases, because the
/// disk is full, still has what it has in flight and unrecorded: to lease it to another would send it twice.
#[derive(Default)]
pub(crate) struct Holders(Mutex<HashMap<String, Weak<str>>>);

impl Holders {
    /// `holder` leases something.
    pub(crate) fn note(&self, holder: &Arc<str>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.get(&**holder).is_none_or(|known| known.strong_count() == 0) {
            known.retain(|_, holder| holder.strong_count() > 0);
            known.insert(holder.to_string(), Arc::downgrade(holder));
        }
    }

    /// The names of those that live.
    pub(crate) fn living(&self) -> HashSet<String> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().filter(|(_, holder)| holder.strong_count() > 0).map(|(name, _)| name.clone()).collect()
    }
}

/// What the lanes of one call have in common. A batch that can't be read is left out and in `damaged`.
struct Looking<'a> {
    connection: &'a Connection,
    destination: i64,
    now: UnixMs,
    /// Due later than that is due: see [`cut_waits`].
    latest: UnixMs,
    first_turns: Option<&'a FirstTurns>,
    damaged: &'a RefCell<Vec<(i64, TxError)>>,
}

impl Looking<'_> {
    /// How many messages of a batch are due.
    fn due_of(&self, stored: &Stored) -> usize {
        stored.record.open().filter(|&index| stored.record.due_of(index) <= self.now).count()
    }
}

/// What is to be tried again.
struct Retries<'a> {
    looking: &'a Looking<'a>,
    found: HashMap<i64, VecDeque<i64>>,
}

impl Waiting<i64> for Retries<'_> {
    type Batch = Stored;
    type Error = TxError;

    fn files(&mut self) -> Result<Vec<(i64, Priority)>, TxError> {
        let Looking { connection, destination, now, first_turns, .. } = *self.looking;
        if first_turns.is_some_and(|first| !first.retries) {
            return Ok(Vec::new());
        }
        let mut select = connection.prepare_cached(RETRIES_DUE)?;
        let mut rows = select.query([destination, int(now.0), RETRIES_LOOKED_AT])?;
        let mut files = Vec::new();
        while let Some(row) = rows.next()? {
            let (seq, file) = (row.get(0)?, row.get(1)?);
            if !self.found.contains_key(&file) {
                files.push((file, priority(row.get(2)?)?));
            }
            self.found.entry(file).or_default().push_back(seq);
        }
        Ok(files)
    }

    fn next(&mut self, file: i64) -> Result<Option<(Stored, usize)>, TxError> {
        let Looking { connection, damaged, first_turns, .. } = self.looking;
        let Some(found) = self.found.get_mut(&file) else { return Ok(None) };
        while let Some(seq) = found.pop_front() {
            match Stored::by_seq(connection, seq) {
                Err(why) if why.is_damage() => damaged.borrow_mut().push((seq, why)),
                read => {
                    if first_turns.is_some() {
                        found.clear();
                    }
                    let stored = read?;
                    let due = self.looking.due_of(&stored);
                    return Ok(Some((stored, due)));
                }
            }
        }
        Ok(None)
    }
}

/// What was never tried, by file.
struct Fresh<'a> {
    looking: &'a Looking<'a>,
    looked: &'a mut Looked,
    files: HashMap<i64, FreshFile>,
    /// Batches that are due much later than any should be.
    late: Vec<i64>,
}

/// A file of which first attempts wait.
struct FreshFile {
    /// All from this row on is held.
    held_from: Option<i64>,
    /// The due time and the first row of the batch that was read last.
    after: (i64, i64),
    /// It has had its turn.
    is_over: bool,
}

impl Fresh<'_> {
    /// The file that was accepted last.
    fn last(&self) -> Result<i64, TxError> {
        let last = "SELECT coalesce(max(seq), 0) FROM files";
        Ok(self.looking.connection.prepare_cached(last)?.query_row([], |row| row.get(0))?)
    }

    /// Looks at up to half of the files that one call looks at, from `after` on, which moves along. Whether there are no
    /// more.
    fn look(&mut self, after: &mut i64, files: &mut Vec<(i64, Priority)>) -> Result<bool, TxError> {
        let Looking { connection, destination, now, first_turns, .. } = *self.looking;
        let mut select = connection.prepare_cached(NEXT_FILE)?;
        for _ in 0..FILES_LOOKED_AT / 2 {
            let mut rows = select.query([destination, *after, int(now.0)])?;
            let Some(row) = rows.next()? else { return Ok(true) };
            *after = row.get(0)?;
            let is_there = match first_turns {
                Some(first) => first.besides.contains(&FileId(row.get(1)?)),
                None => false,
            };
            let held_from: Option<i64> = row.get(3)?;
            if is_there || held_from.is_some_and(|row| row <= 0) || self.files.contains_key(after) {
                continue;
            }
            self.files.insert(*after, FreshFile { held_from, after: (-1, -1), is_over: false });
            files.push((*after, priority(row.get(2)?)?));
        }
        Ok(false)
    }
}

impl Waiting<i64> for Fresh<'_> {
    type Batch = Stored;
    type Error = TxError;

    /// Those that are new, then the next ones of a walk over all of them: where there are no more than one call looks at,
    /// that is all.
    fn files(&mut self) -> Result<Vec<(i64, Priority)>, TxError> {
        let mut files = Vec::new();
        let Looked { mut until, newest } = *self.looked;
        let mut newest = match newest {
            Some(newest) => newest,
            None => self.last()?,
        };
        self.look(&mut newest, &mut files)?;
        if self.look(&mut until, &mut files)? {
            until = 0;
            self.look(&mut until, &mut files)?;
        }
        *self.looked = Looked { until, newest: Some(newest) };
        Ok(files)
    }

    fn next(&mut self, file: i64) -> Result<Option<(Stored, usize)>, TxError> {
        let Looking { connection, destination, now, latest, first_turns, damaged } = *self.looking;
        let Some(waiting) = self.files.get_mut(&file).filter(|file| !file.is_over) else { return Ok(None) };
        loop {
            let (due, first_row) = waiting.after;
            let mut select = match waiting.held_from {
                None => connection.prepare_cached(FRESH_DUE)?,
                Some(_) => connection.prepare_cached(FRESH_DUE_BEFORE)?,
            };
            let now = int(now.0);
            let mut rows = match waiting.held_from {
                None => select.query([destination, file, now, due, first_row])?,
                Some(held_from) => select.query([destination, file, now, due, first_row, held_from])?,
            };
            let Some(row) = rows.next()? else { break };
            waiting.after = (row.get(DUE)?, row.get(FIRST_ROW)?);
            match Stored::read(row) {
                Err(why) if why.is_damage() => damaged.borrow_mut().push((row.get(0)?, why)),
                read => {
                    waiting.is_over = first_turns.is_some();
                    let stored = read?;
                    let due = self.looking.due_of(&stored);
                    return Ok(Some((stored, due)));
                }
            }
        }
        waiting.is_over = true;
        let mut select = connection.prepare_cached(
            "SELECT seq FROM batches INDEXED BY batches_waiting
             WHERE destination = ?1 AND retry = 0 AND holder IS NULL AND place = ?2 AND due > ?3 LIMIT ?4",
        )?;
        let late = select.query_map([destination, file, int(latest.0), CUT_MAX], |row| row.get(0))?;
        self.late.extend(late.collect::<Result<Vec<i64>, _>>()?);
        Ok(None)
    }
}

/// `Queue::lease`.
pub(crate) fn lease(tx: &mut Tx<'_>, request: &LeaseRequest) -> Result<Vec<Lease>, TxError> {
    let mut leases = Vec::new();
    let mut bytes = 0;
    for want in &request.wants {
        if bytes >= LEASE_BYTES_MAX {
            break;
        }
        let enabled: Option<i64> = tx
            .connection
            .prepare_cached("SELECT seq FROM destinations WHERE name = ?1 AND disabled_at IS NULL")?
            .query_row([&*want.destination], |row| row.get(0))
            .optional()?;
        if let Some(destination) = enabled {
            lease_some(tx, request, want, destination, &mut leases, &mut bytes)?;
        }
    }
    Ok(leases)
}

fn lease_some(
    tx: &mut Tx<'_>,
    request: &LeaseRequest,
    want: &Want,
    destination: i64,
    leases: &mut Vec<Lease>,
    bytes: &mut usize,
) -> Result<(), TxError> {
    let connection = tx.connection;
    let (now, latest) = (request.now, request.now.after(want.longest_wait));
    let damaged = RefCell::default();
    let first_turns = want.first_turns.as_ref();
    let looking = &Looking { connection, destination, now, latest, first_turns, damaged: &damaged };
    let (chosen, late) = if want.in_order {
        (oldest(looking, request, want)?, Vec::new())
    } else {
        let DestinationTurns { turns, looked } = tx.caches.turns(destination);
        let mut retries = Retries { looking, found: HashMap::new() };
        let mut fresh = Fresh { looking, looked, files: HashMap::new(), late: Vec::new() };
        let messages = if first_turns.is_some() { usize::MAX } else { want.messages };
        (turns.choose(&mut retries, &mut fresh, messages, want.batches)?, fresh.late)
    };
    // Rows are changed when they are not walked over any more.
    for (seq, why) in damaged.into_inner() {
        quarantine(connection, seq, &why)?;
    }
    cut_waits(connection, destination, late, latest, now)?;
    for mut stored in chosen {
        if *bytes >= LEASE_BYTES_MAX {
            break;
        }
        // Some of its messages may be due, and others wait too long.
        if stored.record.cut_waits(latest, request.now) {
            stored.store(connection)?;
        }
        let content = payload(connection, &stored)
            .and_then(|payload| Ok((payload, tx.caches.header(connection, stored.header)?)));
        let (payload, header) = match content {
            Err(why) if why.is_damage() => {
                quarantine(connection, stored.seq, &why)?;
                continue;
            }
            read => read?,
        };
        *bytes += payload.len();
        let until = Deadline(request.until.0);
        let wall = if want.in_order { UnixMs(u64::MAX) } else { now };
        let grant = stored.record.lease(&request.holder, until, Deadline(0), wall, request.born);
        debug_assert_eq!(grant, Grant::Granted, "nobody holds it, and it is due where that matters");
        leases.push(Lease::of(stored.id, header, payload, &stored.record));
        if stored.record.has_suspects() {
            stored.store(connection)?;
        } else {
            stored.store_columns(connection)?;
        }
    }
    Ok(())
}

/// What is leased of a destination that keeps an order: nothing while another worker still has something of it.
fn oldest(looking: &Looking<'_>, request: &LeaseRequest, want: &Want) -> Result<Vec<Stored>, TxError> {
    let Looking { connection, destination, now, damaged, .. } = *looking;
    let has_another: bool = connection
        .prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM batches INDEXED BY batches_leased
                 WHERE holder IS NOT NULL AND destination = ?1 AND holder <> ?2)",
        )?
        .query_row(params![destination, &*request.holder], |row| row.get(0))?;
    let mut chosen = Vec::new();
    if has_another {
        return Ok(chosen);
    }
    let mut select = connection.prepare_cached(OLDEST)?;
    let mut rows = select.query(params![destination, int(now.0), int(want.batches as u64)])?;
    let mut messages = 0;
    while messages < want.messages
        && let Some(row) = rows.next()?
    {
        let seq = row.get(0)?;
        match Stored::by_seq(connection, seq) {
            Err(why) if why.is_damage() => damaged.borrow_mut().push((seq, why)),
            read => {
                let stored = read?;
                messages += looking.due_of(&stored);
                chosen.push(stored);
            }
        }
    }
    Ok(chosen)
}

/// Batches that wait too long and are changed in one call.
const CUT_MAX: i64 = 64;

/// Makes due what waits until after `latest` (F9): [`Record::cut_waits`](postrider_actors::model::ledger::Record). A
/// look-up in an index that finds nothing, unless a clock was set back. `late` are such batches of the other lane.
fn cut_waits(
    connection: &Connection,
    destination: i64,
    mut late: Vec<i64>,
    latest: UnixMs,
    now: UnixMs,
) -> Result<(), TxError> {
    let mut select = connection.prepare_cached(
        "SELECT seq FROM batches INDEXED BY batches_waiting
         WHERE destination = ?1 AND retry = 1 AND holder IS NULL AND due IS NOT NULL AND place > ?2 LIMIT ?3",
    )?;
    let retries = select.query_map([destination, int(latest.0), CUT_MAX], |row| row.get(0))?;
    late.extend(retries.collect::<Result<Vec<i64>, _>>()?);
    for seq in late {
        if let Some(mut stored) = read_or_quarantine(connection, seq)? {
            stored.record.cut_waits(latest, now);
            stored.store(connection)?;
        }
    }
    Ok(())
}

/// Sets a batch aside whose stored parts are damaged (F61): it is due never, its messages stay open, and all else goes
/// on. Who else read it would fail, and everybody who wants what is beside it.
fn quarantine(connection: &Connection, seq: i64, why: &TxError) -> Result<(), TxError> {
    let why = why.to_string();
    connection
        .prepare_cached(
            "UPDATE batches SET due = NULL, holder = NULL, lease_until_mono = NULL, quarantined = ?2
             WHERE seq = ?1",
        )?
        .execute(params![seq, why])?;
    let name =
        "SELECT b.id, f.name, d.name, b.first_row, b.count FROM batches b JOIN files f ON f.seq = b.file
                    JOIN destinations d ON d.seq = b.destination WHERE b.seq = ?1";
    connection.prepare_cached(name)?.query_row([seq], |row| {
        let (file, destination) = (row.get::<_, String>(1)?, row.get::<_, String>(2)?);
        let (batch, first_row, messages) =
            (BatchId(row.get(0)?), row.get::<_, i64>(3)?, row.get::<_, i64>(4)?);
        tracing::error!(%batch, file, destination, first_row, messages, why,
            "a batch is damaged and set aside: its messages stay open, everything else goes on");
        Ok(())
    })?;
    Ok(())
}

/// The batch with number `seq`, unless it is damaged and set aside.
pub(crate) fn read_or_quarantine(connection: &Connection, seq: i64) -> Result<Option<Stored>, TxError> {
    match Stored::by_seq(connection, seq) {
        Err(why) if why.is_damage() => quarantine(connection, seq, &why).map(|()| None),
        read => read.map(Some),
    }
}

/// Gives what was set aside another try: somebody may have repaired it. For the start.
pub(crate) fn try_quarantined(connection: &Connection) -> Result<usize, TxError> {
    let again = "UPDATE batches SET due = not_before, quarantined = NULL WHERE quarantined IS NOT NULL";
    Ok(connection.execute(again, [])?)
}

fn payload(connection: &Connection, stored: &Stored) -> Result<Bytes, TxError> {
    let body = connection
        .prepare_cached("SELECT body, sum FROM payloads WHERE seq = ?1")?
        .query_row([stored.payload], |row| {
            let body = row.get_ref(0)?.as_blob()?;
            let checked = row.get(1).map(|sum| check_sum("payload", body, sum));
            Ok(checked?.map(|()| Bytes::copy_from_slice(body)))
        })
        .optional()?;
    body.unwrap_or(Err(TxError::Altered("payload")))
}

/// Moves deadlines of leases that are current. Only in the columns: it changes nothing else.
pub(crate) fn extend(
    tx: &Tx<'_>,
    tokens: &[LeaseToken],
    until: MonoMs,
) -> Result<Vec<(BatchId, ItemOutcome)>, TxError> {
    let mut update = tx.connection.prepare_cached(
        "UPDATE batches SET lease_until_mono = ?3 WHERE id = ?1 AND holder IS NOT NULL AND fence = ?2",
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
    for token in tokens {
        let Some(mut stored) = Stored::by_id(tx.connection, token.batch)? else { continue };
        if !stored.record.is_current(token.fence) {
            continue;
        }
        match how {
            Release::Unused | Release::Closed { .. } => {
                stored.record.release(token.fence);
            }
            Release::Lost => stored.record.lose(),
        }
        stored.store(tx.connection)?;
        if let Release::Closed { from, until } = how {
            close(tx, &stored, from, until)?;
        }
    }
    Ok(())
}

/// Nothing of a batch's file is leased for its destination while the clock is between these.
fn close(tx: &Tx<'_>, stored: &Stored, from: UnixMs, until: UnixMs) -> Result<(), TxError> {
    tx.connection
        .prepare_cached(
            "UPDATE file_destinations SET closed_from = ?3, closed_until = ?4 WHERE file = ?1 AND destination = ?2",
        )?
        .execute([stored.file, stored.destination, int(from.0), int(until.0)])?;
    Ok(())
}

/// Marks lost the leases of a holder who is gone.
pub(crate) fn release_holder(tx: &Tx<'_>, holder: &str) -> Result<usize, TxError> {
    lose(tx.connection, &held(tx.connection, |name, _| name == holder)?, &Evidence::unknown())
}

/// Marks expired leases lost, unless their holder is one of `living`.
pub(crate) fn rescue(tx: &Tx<'_>, now: MonoMs, living: &HashSet<String>) -> Result<usize, TxError> {
    let is_lost = |name: &str, until| until < int(now.0) && !living.contains(name);
    lose(tx.connection, &held(tx.connection, is_lost)?, &Evidence::unknown())
}

/// Marks lost every lease of an earlier process; a graceful shutdown has left none.
pub(crate) fn lose_all(connection: &Connection, evidence: &Evidence) -> Result<usize, TxError> {
    let transaction = connection.unchecked_transaction()?;
    let lost = lose(connection, &held(connection, |_, _| true)?, evidence)?;
    transaction.commit()?;
    Ok(lost)
}

/// The numbers of the batches that are leased, by holder and deadline. They are few: an index has only them.
fn held(connection: &Connection, which: impl Fn(&str, i64) -> bool) -> Result<Vec<i64>, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT seq, holder, coalesce(lease_until_mono, 0) FROM batches INDEXED BY batches_leased
         WHERE holder IS NOT NULL",
    )?;
    let mut rows = select.query([])?;
    let mut held = Vec::new();
    while let Some(row) = rows.next()? {
        let holder = row.get_ref(1)?.as_str().map_err(rusqlite::Error::from)?;
        if which(holder, row.get(2)?) {
            held.push(row.get(0)?);
        }
    }
    Ok(held)
}

fn lose(connection: &Connection, batches: &[i64], evidence: &Evidence) -> Result<usize, TxError> {
    for &seq in batches {
        if let Some(mut stored) = read_or_quarantine(connection, seq)? {
            stored.record.lose_by(evidence, stored.id);
            stored.store(connection)?;
        }
    }
    Ok(batches.len())
}
