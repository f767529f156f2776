//! `Ledger::settle`: recording what became of messages, exactly once.
//!
//! A batch's entry for a message goes from `accepted` to one of the settled states. `retrying` means that
//! a later batch with the same root carries the message on: the *live entry* is the one in the latest.
//! Whatever arrives later than it should is told to the live entry, so that every message is counted in
//! exactly one place (I1) and its state is the maximum of all it was told (I7).

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use postrider_actors::model::codec::SentTimes;
use postrider_actors::{
    model::{
        batch::{BatchHeader, NewBatch, Rows, StateVector},
        ids::BatchId,
        outcome::{Attempt, DeathCause, Verdict},
        record::details,
        state::MessageState,
        time::UnixMs,
    },
    ports::{Settled, Settlement},
};
use rusqlite::{OptionalExtension, Row, params};

use super::{
    leases::phase,
    tx::{Phase, Tx, TxError, int, uint},
};

/// A batch and what is recorded of it.
pub(crate) struct Record {
    pub(crate) seq: i64,
    pub(crate) root: BatchId,
    pub(crate) file: i64,
    pub(crate) destination: i64,
    pub(crate) drive: u32,
    pub(crate) attempt: u32,
    pub(crate) states: StateVector,
    header: i64,
    payload: i64,
    accepted_at: UnixMs,
    phase: Phase,
    fence: u64,
    unsettled: i64,
    sent: Option<SentTimes>,
}

/// What a message is told that ends its way.
#[derive(Clone, Copy)]
enum Told<'a> {
    Sent {
        at: UnixMs,
        status: u16,
    },
    /// With the destination's own words, if they are kept.
    Dead {
        attempt: Attempt,
        cause: DeathCause,
        detail: Option<&'a str>,
    },
}

impl Told<'_> {
    fn state(&self) -> MessageState {
        match self {
            Self::Sent { .. } => MessageState::Sent,
            Self::Dead { .. } => MessageState::Dead,
        }
    }
}

/// Records one settlement.
pub(crate) fn settle(tx: &mut Tx<'_>, settlement: &Settlement) -> Result<Settled, TxError> {
    let Some(mut record) = Record::by_id(tx, settlement.token.batch)? else {
        tracing::warn!(batch = %settlement.token.batch, "settled a batch that the store does not know");
        return Ok(Settled::Stale);
    };
    let current = record.phase == Phase::Leased && record.fence == settlement.token.fence;
    let mut retried = Vec::new();
    // Facts about messages that a later batch carries on.
    let mut elsewhere = Vec::new();
    let details = details(&settlement.records);
    // Most failures come without words, and then the rows need not be read for them.
    let rows = if details.is_empty() { None } else { Some(record.rows(tx)?) };
    for &(index, verdict) in &settlement.verdicts {
        let index = index as usize;
        if index >= record.states.0.len() {
            return Err(TxError::Refused(format!(
                "batch {} has {} messages, a verdict is about index {index}",
                settlement.token.batch,
                record.states.0.len()
            )));
        }
        let told = match verdict {
            Verdict::Sent { at, status } => Told::Sent { at, status },
            // Failures are the current holder's to tell.
            Verdict::Dead { .. } | Verdict::Retry { .. } if !current => continue,
            Verdict::Dead { attempt, cause } => {
                let words = rows.as_ref().filter(|rows| index < rows.len());
                let detail = words.and_then(|rows| details.get(&rows.row(index)).map(|detail| &**detail));
                Told::Dead { attempt, cause, detail }
            }
            Verdict::Retry { attempt, .. } => {
                retried.push((index, record.retry(tx, index, attempt.at)));
                continue;
            }
        };
        if record.tell(tx, index, told)? == MessageState::Retrying {
            elsewhere.push((index, told));
        }
    }
    if current {
        append_retries(tx, &record, &retried, &settlement.retries)?;
    }
    record.store(tx)?;
    if !elsewhere.is_empty() {
        let rows = record.rows(tx)?;
        for (index, told) in elsewhere {
            tell_live_entry(tx, &record, rows.row(index), told)?;
        }
    }
    Ok(match (current, record.unsettled) {
        (false, _) => Settled::Stale,
        (true, 0) => Settled::Complete,
        (true, _) => Settled::Open,
    })
}

/// Tells a message's live entry, which stands in the latest batch after `record` that has its row.
fn tell_live_entry(tx: &mut Tx<'_>, record: &Record, row: u64, told: Told<'_>) -> Result<(), TxError> {
    let later: Vec<i64> = tx
        .connection
        .prepare_cached(
            "SELECT seq FROM batches WHERE root = ?1 AND seq > ?2 AND first_row <= ?3 ORDER BY seq DESC",
        )?
        .query_map(params![record.root.0, record.seq, int(row)], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    for seq in later {
        let mut live = Record::by_seq(tx, seq)?;
        if let Some(index) = live.rows(tx)?.find(row) {
            live.tell(tx, index, told)?;
            return live.store(tx);
        }
    }
    Err(TxError::Refused(format!(
        "row {row} of batch {} is retrying, but no later batch carries it on",
        record.root
    )))
}

/// Stores the batches that carry on the messages of `retried` (index and state before). Every message
/// that is retrying from now on must be in one of them, or it would be lost.
fn append_retries(
    tx: &mut Tx<'_>,
    record: &Record,
    retried: &[(usize, MessageState)],
    retries: &[NewBatch],
) -> Result<(), TxError> {
    if retried.is_empty() && retries.is_empty() {
        return Ok(());
    }
    let rows = record.rows(tx)?;
    let header = tx.caches.header(tx.connection, record.header_number())?;
    let mut waiting: BTreeMap<u64, bool> = BTreeMap::new();
    for &(index, before) in retried {
        *waiting.entry(rows.row(index)).or_default() |= before == MessageState::Accepted;
    }
    for retry in retries {
        check_retry(record, &header, retry)?;
        let rows = Rows::decode(retry.payload.clone())?;
        if rows.len() != retry.count as usize
            || !(retry.history.is_empty() || retry.history.len() == rows.len())
        {
            return Err(refused(retry, "its payload, count and history disagree"));
        }
        let mut live = Vec::with_capacity(rows.len());
        for index in 0..rows.len() {
            match waiting.remove(&rows.row(index)) {
                Some(true) => live.push(index),
                // Settled before this verdict came, e.g. by a stale worker's 2xx: not to be sent again.
                Some(false) => {}
                None => return Err(refused(retry, "it carries on a message without a retry verdict")),
            }
        }
        let reduced = if live.len() == rows.len() {
            retry.clone()
        } else if live.is_empty() {
            continue;
        } else {
            retry.only(&rows, &live)
        };
        if tx.has_batch(reduced.id)? {
            return Err(refused(retry, "a batch with its id is stored already"));
        }
        let payload = tx.insert_payload(&reduced)?;
        tx.insert_batch(&reduced, record.file, record.destination, payload)?;
    }
    match waiting.into_iter().find(|&(_, live)| live) {
        None => Ok(()),
        Some((row, _)) => Err(TxError::Refused(format!(
            "row {row} of file {} is to be retried, but no retry batch carries it on",
            header.file
        ))),
    }
}

fn refused(retry: &NewBatch, why: &str) -> TxError {
    TxError::Refused(format!("retry batch {} is refused: {why}", retry.id))
}

fn check_retry(record: &Record, header: &Arc<BatchHeader>, retry: &NewBatch) -> Result<(), TxError> {
    if retry.header != *header {
        return Err(refused(retry, "its header is not that of the batch it carries on (I4)"));
    }
    if (retry.root, retry.drive, retry.attempt) != (record.root, record.drive, record.attempt + 1) {
        return Err(refused(
            retry,
            "its root, drive or attempt does not follow from the batch it carries on",
        ));
    }
    Ok(())
}

macro_rules! select_record {
    ($condition:literal) => {
        concat!(
            "SELECT b.seq, b.id, b.root, b.file, b.destination, b.header, b.payload, b.count, b.drive, b.attempt, ",
            "b.accepted_at, b.phase, b.fence, b.unsettled, r.states, r.sent ",
            "FROM batches b LEFT JOIN results r ON r.batch = b.seq WHERE ",
            $condition
        )
    };
}

impl Record {
    /// The batch with `id`, if it is stored.
    pub(crate) fn by_id(tx: &Tx<'_>, id: BatchId) -> Result<Option<Self>, TxError> {
        tx.connection
            .prepare_cached(select_record!("b.id = ?1"))?
            .query_row([id.0], |row| Ok(Self::read(row)))
            .optional()?
            .transpose()
    }

    /// The batch with number `seq`.
    pub(crate) fn by_seq(tx: &Tx<'_>, seq: i64) -> Result<Self, TxError> {
        tx.connection
            .prepare_cached(select_record!("b.seq = ?1"))?
            .query_row([seq], |row| Ok(Self::read(row)))?
    }

    fn read(row: &Row<'_>) -> Result<Self, TxError> {
        let count: u32 = row.get(7)?;
        Ok(Self {
            seq: row.get(0)?,
            root: BatchId(row.get::<_, Option<_>>(2)?.map_or_else(|| row.get(1), Ok)?),
            file: row.get(3)?,
            destination: row.get(4)?,
            header: row.get(5)?,
            payload: row.get(6)?,
            drive: row.get(8)?,
            attempt: row.get(9)?,
            accepted_at: UnixMs(uint(row.get(10)?)),
            phase: phase(row.get(11)?)?,
            fence: uint(row.get(12)?),
            unsettled: row.get(13)?,
            states: row.get::<_, Option<_>>(14)?.map_or_else(|| StateVector::accepted(count), StateVector),
            sent: row.get::<_, Option<_>>(15)?.map(SentTimes),
        })
    }

    /// Its rows.
    pub(crate) fn rows(&self, tx: &Tx<'_>) -> Result<Rows, TxError> {
        let body: Vec<u8> = tx
            .connection
            .prepare_cached("SELECT body FROM payloads WHERE seq = ?1")?
            .query_row([self.payload], |row| row.get(0))?;
        Ok(Rows::decode(Bytes::from(body))?)
    }

    /// The number its header is interned as.
    pub(crate) fn header_number(&self) -> i64 {
        self.header
    }

    /// Whether its messages were counted as `retrying` when it was made.
    fn is_carrying_on(&self) -> bool {
        self.drive > 0 || self.attempt > 0
    }

    /// Merges `retrying` and returns what stood there before.
    fn retry(&mut self, tx: &mut Tx<'_>, index: usize, at: UnixMs) -> MessageState {
        let before = self.states.merge(index, MessageState::Retrying);
        if before == MessageState::Accepted {
            self.unsettled -= 1;
            if !self.is_carrying_on() {
                tx.count(self.file, self.destination).retrying += 1;
            }
            tx.touch(self.file, at);
        }
        before
    }

    /// Merges a final state and returns what stood there before. Counts it, unless it was `retrying`:
    /// then it counts where the live entry is.
    fn tell(&mut self, tx: &mut Tx<'_>, index: usize, told: Told<'_>) -> Result<MessageState, TxError> {
        let before = self.states.get(index);
        // Only a 2xx is recorded where the message was before. `dead` stands at the live entry alone: a
        // redrive takes it back there, and a copy of it would be counted off once more.
        if before >= told.state() || (before == MessageState::Retrying && matches!(told, Told::Dead { .. })) {
            return Ok(before);
        }
        self.states.merge(index, told.state());
        if let Told::Sent { at, status } = told {
            let len = self.states.0.len();
            self.sent.get_or_insert_with(|| SentTimes::none(len)).set(index, status, self.accepted_at, at);
        }
        if before == MessageState::Retrying {
            return Ok(before);
        }
        let carrying_on = self.is_carrying_on();
        let counts = tx.count(self.file, self.destination);
        if before == MessageState::Dead {
            counts.dead -= 1;
        } else {
            self.unsettled -= 1;
            counts.retrying -= i64::from(carrying_on);
        }
        let at = match told {
            Told::Sent { at, .. } => {
                counts.sent += 1;
                if before == MessageState::Dead {
                    self.forget_death(tx, index)?;
                }
                at
            }
            Told::Dead { attempt, cause, detail } => {
                counts.dead += 1;
                self.record_death(tx, index, attempt, cause, detail)?;
                attempt.at
            }
        };
        tx.touch(self.file, at);
        Ok(before)
    }

    fn record_death(
        &self,
        tx: &Tx<'_>,
        index: usize,
        attempt: Attempt,
        cause: DeathCause,
        detail: Option<&str>,
    ) -> Result<(), TxError> {
        let row = self.rows(tx)?.row(index);
        tx.connection
            .prepare_cached(
                "INSERT INTO dead (file, destination, row, batch, at, attempts, status, reason, cause, detail)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            )?
            .execute(params![
                self.file,
                self.destination,
                int(row),
                self.seq,
                int(attempt.at.0),
                self.attempt + 1,
                attempt.status,
                attempt.reason as u8,
                cause as u8,
                detail
            ])?;
        Ok(())
    }

    fn forget_death(&self, tx: &Tx<'_>, index: usize) -> Result<(), TxError> {
        let row = self.rows(tx)?.row(index);
        tx.connection
            .prepare_cached("DELETE FROM dead WHERE file = ?1 AND destination = ?2 AND row = ?3")?
            .execute([self.file, self.destination, int(row)])?;
        Ok(())
    }

    /// Writes back what is recorded.
    pub(crate) fn store(&self, tx: &Tx<'_>) -> Result<(), TxError> {
        tx.connection
            .prepare_cached("INSERT OR REPLACE INTO results (batch, states, sent) VALUES (?1, ?2, ?3)")?
            .execute(params![self.seq, self.states.0, self.sent.as_ref().map(|sent| &sent.0)])?;
        if self.phase != Phase::Settled {
            tx.set_unsettled(self.seq, self.unsettled)?;
        }
        Ok(())
    }
}
