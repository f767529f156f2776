//! Receipts and the messages that they are about.

use std::collections::{BTreeMap, HashMap};

use postrider_actors::{
    model::{
        receipt::{EventId, Price, Receipt, ReceiptKey, ReceiptStanding, ReportedStates},
        time::UnixMs,
    },
    ports::Applied,
};
use rusqlite::{CachedStatement, Row, params};

use super::{RECEIPT_COLUMNS, file_number, ms, read_receipt, state, sweep::insert_change};
use crate::tx::{Tx, TxError, int, uint};

/// A receipt from the inbox.
struct InboxReceipt {
    seq: i64,
    destination: i64,
    receipt: Receipt,
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
    let mut waiting = first_waiting(tx, receipts, bytes)?;
    let Some(last) = waiting.last().map(|waiting| waiting.seq) else { return Ok(Applied::default()) };
    // Rows that lie together are read together.
    waiting.sort_unstable_by(|a, b| (a.destination, &a.receipt.key).cmp(&(b.destination, &b.receipt.key)));

    let mut applied = Applied::default();
    let mut standings: BTreeMap<MessageKey, ReceiptStanding> = BTreeMap::new();
    let mut find = Find::prepare(tx)?;
    let mut park =
        tx.connection.prepare_cached("UPDATE receipts SET phase = 1, since = ?2 WHERE seq = ?1")?;
    for InboxReceipt { seq, destination, receipt } in waiting {
        if let Some(standing) = find.standing(tx, destination, &receipt.key, &mut standings)? {
            applied.matched += 1;
            standing.hear(receipt);
        } else {
            applied.parked += 1;
            park.execute([seq, int(at.0)])?;
        }
    }
    // What is left of what was looked at was matched.
    tx.connection
        .prepare_cached(
            "DELETE FROM receipts WHERE seq IN
             (SELECT seq FROM receipts INDEXED BY receipts_waiting WHERE phase = 0 AND seq <= ?1)",
        )?
        .execute([last])?;
    store(tx, &standings, at, keep_changes, &mut applied)?;
    Ok(applied)
}

/// The receipts that have waited longest: as many as there may be, or the first that have more than `bytes`.
fn first_waiting(tx: &Tx<'_>, receipts: usize, bytes: usize) -> Result<Vec<InboxReceipt>, TxError> {
    let sql = format!(
        "SELECT seq, destination, {RECEIPT_COLUMNS} FROM receipts INDEXED BY receipts_waiting WHERE phase = 0
         ORDER BY seq LIMIT ?1"
    );
    let mut select = tx.connection.prepare_cached(&sql)?;
    let mut rows = select.query([int(receipts as u64)])?;
    let (mut waiting, mut held_bytes) = (Vec::new(), 0);
    while held_bytes <= bytes {
        let Some(row) = rows.next()? else { break };
        let receipt = read_receipt(row, 2)?;
        held_bytes += receipt.held_bytes();
        waiting.push(InboxReceipt { seq: row.get(0)?, destination: row.get(1)?, receipt });
    }
    Ok(waiting)
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
