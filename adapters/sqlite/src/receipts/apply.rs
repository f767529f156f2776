//! Receipts and the messages that they are about.

use std::collections::{BTreeMap, HashMap};

use postrider_actors::{
    model::{
        codec::{self, StoredReceipt},
        receipt::{EventId, Price, Receipt, ReceiptKey, ReceiptStanding, ReportedStates},
        time::UnixMs,
    },
    ports::Applied,
};
use rusqlite::{CachedStatement, Row, params};

use super::{events::Events, file_number, ms, state, sweep::insert_change};
use crate::tx::{Tx, TxError, int, uint};

/// A receipt from the inbox.
struct InboxReceipt {
    source: i64,
    destination: i64,
    receipt: Receipt,
}

/// One that can't be applied.
struct RefusedReceipt {
    source: i64,
    event: EventId,
    reason: String,
}

/// File, row and destination, by their numbers: the order in which rows lie on the disk.
type MessageKey = (i64, i64, i64);

/// From columns `state, reported, receipt_state, receipt_at, receipt_event`, which begin at `first`.
fn read_standing(row: &Row<'_>, first: usize) -> Result<ReceiptStanding, TxError> {
    let greatest = match row.get::<_, Option<u8>>(first + 2)? {
        Some(byte) => Some((
            state(byte)?,
            UnixMs(uint(row.get::<_, Option<i64>>(first + 3)?.unwrap_or(0))),
            EventId(row.get(first + 4)?),
        )),
        None => None,
    };
    Ok(ReceiptStanding::new(state(row.get(first)?)?, ReportedStates(row.get(first + 1)?), greatest))
}

/// `ReceiptLedger::apply`.
pub(super) fn apply(
    tx: &mut Tx<'_>,
    receipts: usize,
    bytes: usize,
    at: UnixMs,
    keep_changes: bool,
) -> Result<Applied, TxError> {
    tx.widen_cache()?;
    let (mut waiting, mut refused) = take_out(tx, receipts, bytes)?;
    // Rows that lie together are read together.
    waiting.sort_by(|a, b| (a.destination, &a.receipt.key).cmp(&(b.destination, &b.receipt.key)));

    let mut applied = Applied::default();
    let mut standings: BTreeMap<MessageKey, ReceiptStanding> = BTreeMap::new();
    let mut find = Find::prepare(tx)?;
    for InboxReceipt { source, destination, receipt } in waiting {
        match find.standing(tx, destination, &receipt.key, &mut standings) {
            Ok(Some(standing)) => {
                applied.matched += 1;
                standing.hear(receipt);
            }
            Ok(None) => {
                applied.parked += 1;
                park(tx, source, destination, &receipt, at)?;
            }
            // Its row says what no version knows.
            Err(TxError::Refused(reason)) => {
                refused.push(RefusedReceipt { source, event: receipt.event, reason });
            }
            Err(error) => return Err(error),
        }
    }
    applied.rejected = refused.len() as u64;
    reject(tx, &refused, at)?;
    store(tx, &standings, at, keep_changes, &mut applied)?;
    Ok(applied)
}

/// Takes receipts out of the inbox, those that have waited longest: whole rows of it, and a part of one only if there would
/// be less than half of what may be taken.
fn take_out(
    tx: &Tx<'_>,
    receipts: usize,
    bytes: usize,
) -> Result<(Vec<InboxReceipt>, Vec<RefusedReceipt>), TxError> {
    let mut select = tx
        .connection
        .prepare_cached("SELECT seq, source, destination, body FROM receipt_inbox ORDER BY seq")?;
    let mut rows = select.query([])?;
    let (mut waiting, mut refused) = (Vec::new(), Vec::new());
    let (mut count, mut held_bytes, mut last) = (0, 0, None);
    let mut rest = None;
    while count < receipts && held_bytes <= bytes {
        let Some(row) = rows.next()? else { break };
        let (seq, source, destination): (i64, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let body = row.get_ref(3)?.as_blob().map_err(rusqlite::Error::from)?;
        let mut chunk = match codec::decode_receipts(body) {
            Ok(chunk) => chunk,
            Err(damaged) => {
                let event = EventId::of_text("", body);
                refused.push(RefusedReceipt { source, event, reason: damaged.to_string() });
                Vec::new()
            }
        };
        let mut fits = 0;
        for stored in &chunk {
            if count + fits == receipts || held_bytes > bytes {
                break;
            }
            held_bytes += stored.receipt.as_ref().map_or(0, Receipt::held_bytes);
            fits += 1;
        }
        if fits < chunk.len() && (count >= receipts.div_ceil(2) || fits == 0) {
            break;
        }
        if fits < chunk.len() {
            rest = Some((seq, chunk.split_off(fits)));
        } else {
            last = Some(seq);
        }
        count += fits;
        for StoredReceipt { event, receipt } in chunk {
            match receipt {
                Ok(receipt) => waiting.push(InboxReceipt { source, destination, receipt }),
                Err(damaged) => {
                    refused.push(RefusedReceipt { source, event, reason: damaged.to_string() });
                }
            }
        }
        if rest.is_some() {
            break;
        }
    }
    drop(rows);
    tx.connection.prepare_cached("DELETE FROM receipt_inbox WHERE seq <= ?1")?.execute([last])?;
    if let Some((seq, rest)) = rest {
        // What can't be read of it is refused now, so that the row can be written anew.
        let readable: Vec<_> = rest.iter().filter_map(|stored| stored.receipt.as_ref().ok()).collect();
        tx.connection
            .prepare_cached("UPDATE receipt_inbox SET receipts = ?2, body = ?3 WHERE seq = ?1")?
            .execute(params![seq, int(readable.len() as u64), codec::encode_receipts(&readable)])?;
        let source: i64 = tx
            .connection
            .prepare_cached("SELECT source FROM receipt_inbox WHERE seq = ?1")?
            .query_row([seq], |row| row.get(0))?;
        refused.extend(rest.iter().filter_map(|stored| {
            let reason = stored.receipt.as_ref().err()?.to_string();
            Some(RefusedReceipt { source, event: stored.event, reason })
        }));
    }
    Ok((waiting, refused))
}

/// Holds a receipt until its message comes.
fn park(tx: &Tx<'_>, source: i64, destination: i64, receipt: &Receipt, at: UnixMs) -> Result<(), TxError> {
    let (id, provider_id) = match &receipt.key {
        ReceiptKey::Message(id) => (Some(id), None),
        ReceiptKey::Provider(provider_id) => (None, Some(&**provider_id)),
    };
    tx.connection
        .prepare_cached(
            "INSERT INTO receipts (phase, since, source, event, destination, file, row, provider_id, state, at,
                 provider_status, carrier, response, provider_sent_at, price)
             VALUES (1, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
        )?
        .execute(params![
            int(at.0),
            source,
            receipt.event.0,
            destination,
            id.map(|id| id.file.0),
            id.map(|id| int(id.row)),
            provider_id,
            receipt.state as u8,
            ms(receipt.at),
            receipt.facts.status,
            receipt.facts.carrier,
            receipt.facts.response,
            ms(receipt.facts.sent_at),
            receipt.facts.price.map(|Price(price)| price),
        ])?;
    Ok(())
}

/// Makes rejects of receipts that can't be applied. Their events are forgotten: what its source sends again is tried again.
fn reject(tx: &mut Tx<'_>, refused: &[RefusedReceipt], at: UnixMs) -> Result<(), TxError> {
    if refused.is_empty() {
        return Ok(());
    }
    tracing::warn!(
        receipts = refused.len(),
        "receipts can't be applied and are rejected; the ledger has the reasons"
    );
    let mut insert = tx.connection.prepare_cached(
        "INSERT INTO receipt_rejects (source, event, place, reason, at, text, is_whole)
         VALUES (?1, ?2, 'inbox', ?3, ?4, '', 0)
         ON CONFLICT (source, event) DO UPDATE SET at = excluded.at, reason = excluded.reason",
    )?;
    for RefusedReceipt { source, event, reason } in refused {
        insert.execute(params![source, event.0, reason, int(at.0)])?;
    }
    Events::open(tx)?.forget(refused.iter().map(|refused| (refused.source, refused.event)))
}

/// Finds the rows of messages by what receipts call them.
struct Find<'a> {
    by_message: CachedStatement<'a>,
    by_provider_id: CachedStatement<'a>,
    files: HashMap<[u8; 16], Option<i64>>,
}

impl<'a> Find<'a> {
    fn prepare(tx: &Tx<'a>) -> Result<Self, TxError> {
        Ok(Self {
            by_message: tx.connection.prepare_cached(
                "SELECT state, reported, receipt_state, receipt_at, receipt_event FROM messages
                 WHERE file = ?1 AND row = ?2 AND destination = ?3",
            )?,
            // Of several messages that the provider gave the same id, the latest: it means the newer one, and a
            // receipt costs one row.
            by_provider_id: tx.connection.prepare_cached(
                "SELECT file, row, state, reported, receipt_state, receipt_at, receipt_event FROM messages
                 WHERE destination = ?1 AND provider_id = ?2 ORDER BY file DESC, row DESC LIMIT 1",
            )?,
            files: HashMap::new(),
        })
    }

    /// The standing of the message that `key` names, read into `standings` unless it is there; `None` if no
    /// message is known by it.
    fn standing<'s>(
        &mut self,
        tx: &Tx<'_>,
        destination: i64,
        key: &ReceiptKey,
        standings: &'s mut BTreeMap<MessageKey, ReceiptStanding>,
    ) -> Result<Option<&'s mut ReceiptStanding>, TxError> {
        let place = match key {
            ReceiptKey::Message(id) => {
                let file = match self.files.get(&id.file.0) {
                    Some(&file) => file,
                    None => *self.files.entry(id.file.0).or_insert(file_number(tx.connection, &id.file.0)?),
                };
                let Some(file) = file else { return Ok(None) };
                let place = (file, int(id.row), destination);
                if let std::collections::btree_map::Entry::Vacant(e) = standings.entry(place) {
                    let mut rows = self.by_message.query([place.0, place.1, place.2])?;
                    let Some(row) = rows.next()? else { return Ok(None) };
                    e.insert(read_standing(row, 0)?);
                }
                place
            }
            ReceiptKey::Provider(provider_id) => {
                let mut rows = self.by_provider_id.query(params![destination, provider_id])?;
                let Some(row) = rows.next()? else { return Ok(None) };
                let place = (row.get(0)?, row.get(1)?, destination);
                if let std::collections::btree_map::Entry::Vacant(e) = standings.entry(place) {
                    e.insert(read_standing(row, 2)?);
                }
                place
            }
        };
        Ok(standings.get_mut(&place))
    }
}

/// Writes what is new, and counts it.
fn store(
    tx: &mut Tx<'_>,
    standings: &BTreeMap<MessageKey, ReceiptStanding>,
    at: UnixMs,
    keep_changes: bool,
    applied: &mut Applied,
) -> Result<(), TxError> {
    let mut update = tx.connection.prepare_cached(
        "UPDATE messages SET state = ?4, reported = ?5, updated_at = max(updated_at, ?6), receipt_state = ?7,
             receipt_at = ?8, receipt_event = ?9, provider_status = ?10, carrier = ?11, response = ?12,
             provider_sent_at = ?13, price = ?14
         WHERE file = ?1 AND row = ?2 AND destination = ?3",
    )?;
    let mut update_reported = tx.connection.prepare_cached(
        "UPDATE messages SET reported = ?4, updated_at = max(updated_at, ?5)
         WHERE file = ?1 AND row = ?2 AND destination = ?3",
    )?;
    for (&(file, row, destination), standing) in standings {
        let ReceiptStanding { state, reported, best, .. } = standing;
        applied.conflicts += u64::from(standing.is_new_conflict());
        if let Some(Receipt { event, state: receipt_state, at: receipt_at, facts, .. }) = best {
            update.execute(params![
                file,
                row,
                destination,
                *state as u8,
                reported.0,
                int(at.0),
                *receipt_state as u8,
                ms(*receipt_at),
                event.0,
                facts.status,
                facts.carrier,
                facts.response,
                ms(facts.sent_at),
                facts.price.map(|Price(price)| price),
            ])?;
        } else if standing.has_news() {
            // A lesser receipt changes no state.
            update_reported.execute(params![file, row, destination, reported.0, int(at.0)])?;
        }
        if standing.is_changed() {
            applied.changed += 1;
            if keep_changes {
                insert_change(tx, (file, row, destination), standing.state_before(), *state, at)?;
            }
        }
    }
    Ok(())
}
