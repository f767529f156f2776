//! The queue: leasing what is due, and giving it back. These writes need no sync of their own. They must
//! outlive the process (or a batch that kills it would never be a suspect), which the WAL in the page
//! cache does; a power cut undoes them together with the worker they were about.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::Bytes;
use postrider_actors::{
    model::{
        ids::BatchId,
        ledger::{Deadline, Evidence, Grant},
        time::{MonoMs, UnixMs},
    },
    ports::{ItemOutcome, Lease, LeaseRequest, LeaseToken, Release, Want},
};
use rusqlite::{Connection, OptionalExtension, Rows, params};

use super::{
    stored::{Stored, select_stored},
    tx::{Tx, TxError, check_sum, int},
};

/// Payload that one call leases, in bytes: what the writer copies before others have their turn. One batch is leased
/// whatever its size.
const LEASE_BYTES_MAX: usize = 8 * 1024 * 1024;

macro_rules! select_due {
    ($retry:literal) => {
        select_stored!(
            "INDEXED BY batches_waiting LEFT JOIN results r ON r.batch = b.seq
             WHERE b.destination = ?1 AND b.retry = ",
            $retry,
            " AND b.due <= ?2 AND b.holder IS NULL AND NOT EXISTS (
                 SELECT 1 FROM file_destinations h WHERE h.file = b.file AND h.destination = b.destination
                     AND (h.held_from <= b.first_row OR (h.closed_from <= ?2 AND h.closed_until > ?2)))
             ORDER BY b.due, b.file, b.first_row"
        )
    };
}

/// What is due of a destination and is to be tried again, the oldest first; nothing that waits because its file is held or
/// closed …
pub(crate) const RETRIES_DUE: &str = select_due!("1");
/// … and what was never tried.
pub(crate) const FRESH_DUE: &str = select_due!("0");

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

/// What is due of one lane of one destination, with how many messages of each batch are, in the order in which it is
/// leased. A batch that can't be read is left out and in `damaged`. An error ends it and is left in `failed`.
struct Lane<'a> {
    rows: Rows<'a>,
    now: UnixMs,
    damaged: &'a RefCell<Vec<(i64, TxError)>>,
    failed: &'a Cell<Option<TxError>>,
}

impl Lane<'_> {
    fn advance(&mut self) -> Result<Option<(Stored, usize)>, TxError> {
        let stored = loop {
            let Some(row) = self.rows.next()? else { return Ok(None) };
            match Stored::read(row) {
                Err(why) if why.is_damage() => self.damaged.borrow_mut().push((row.get(0)?, why)),
                read => break read?,
            }
        };
        let due = stored.record.open().filter(|&index| stored.record.due_of(index) <= self.now).count();
        Ok(Some((stored, due)))
    }
}

impl Iterator for Lane<'_> {
    type Item = (Stored, usize);

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().unwrap_or_else(|error| {
            self.failed.set(Some(error));
            None
        })
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
    let latest = request.now.after(want.longest_wait);
    cut_waits(connection, destination, latest, request.now)?;
    let damaged = RefCell::default();
    let chosen = {
        let failed = Cell::new(None);
        let mut retries = connection.prepare_cached(RETRIES_DUE)?;
        let mut fresh = connection.prepare_cached(FRESH_DUE)?;
        let place = [destination, int(request.now.0)];
        let now = request.now;
        let (damaged, failed) = (&damaged, &failed);
        let retries = Lane { rows: retries.query(place)?, now, damaged, failed };
        let fresh = Lane { rows: fresh.query(place)?, now, damaged, failed };
        let chosen = tx.caches.lane_share(destination).choose(retries, fresh, want.messages, want.batches);
        if let Some(error) = failed.take() {
            return Err(error);
        }
        chosen
    };
    // Rows are changed when they are not walked over any more.
    for (seq, why) in damaged.into_inner() {
        quarantine(connection, seq, &why)?;
    }
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
        let grant = stored.record.lease(&request.holder, until, Deadline(0), request.now, request.born);
        debug_assert_eq!(grant, Grant::Granted, "nobody holds it, and it is due");
        leases.push(Lease::of(stored.id, header, payload, &stored.record));
        if stored.record.has_suspects() {
            stored.store(connection)?;
        } else {
            stored.store_columns(connection)?;
        }
    }
    Ok(())
}

/// Batches that wait too long and are changed in one call.
const CUT_MAX: i64 = 64;

/// Makes due what waits until after `latest` (F9): [`Record::cut_waits`](postrider_actors::model::ledger::Record). Two
/// look-ups in an index that finds nothing, unless a clock was set back.
fn cut_waits(connection: &Connection, destination: i64, latest: UnixMs, now: UnixMs) -> Result<(), TxError> {
    let mut select = connection.prepare_cached(
        "SELECT seq FROM batches INDEXED BY batches_waiting
         WHERE destination = ?1 AND retry IN (0, 1) AND holder IS NULL AND due > ?2 LIMIT ?3",
    )?;
    let late = select.query_map([destination, int(latest.0), CUT_MAX], |row| row.get(0))?;
    for seq in late.collect::<Result<Vec<_>, _>>()? {
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
