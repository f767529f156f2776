//! Receipts out of the inbox, into the rows of their messages.
//!
//! Rows are read without a lock, and written where they lie if they still say what was read: that saves two of three
//! index lookups, and the record of a lock. If another transaction has written in between, all is rolled back and
//! repeated with the rows locked before they are read.

use std::cmp::Reverse;

use deadpool_postgres::Transaction;
use postrider_actors::{
    model::{
        call::{self, FailureKind},
        receipt::{Receipt, ReceiptFacts},
        time::UnixMs,
    },
    ports::Applied,
};
use uuid::Uuid;

use super::{
    Shared, connect,
    error::Failure,
    look_up::{LockOrder, Locking, SeenRow, look_up},
    values,
    waiting::{self, ARRAYS, Chunk, RefusedReceipt, WaitingReceipt, columns},
};

/// So that the planner goes to the places that [`WRITE`] names: statistics that are out of date say that next to nothing
/// is in the partition, and that each of its rows is best compared with each receipt. To compare costs a quarter of
/// reading a page then; and what it still compares it takes in the order of the key, not in that of the pages (F50).
const GO_BY_PLACE: &str = "SET LOCAL cpu_operator_cost = 1; SET LOCAL enable_bitmapscan = off";

/// The oldest first. A lock is on each until the end of the transaction.
const LOOK_AT: &str = concat!(
    "SELECT number, ",
    columns!(),
    " FROM receipt_inbox WHERE number > $1 ORDER BY number LIMIT $2 FOR UPDATE SKIP LOCKED"
);

/// Rows of the inbox that are looked at together.
const CHUNKS_MAX: usize = 1000;

/// Writes rows of one partition, those that still are as they were read: a row's version is known by its place and by
/// the transaction that made it, because a place may be reused. The order of the arrays is the order in which it waits
/// for others (F50).
const WRITE: &str = "
UPDATE messages m SET
       state = r.state,
       reported = r.reported,
       updated_at = $2,
       receipt_state = CASE WHEN r.event IS NULL THEN m.receipt_state ELSE r.receipt_state END,
       receipt_at = CASE WHEN r.event IS NULL THEN m.receipt_at ELSE r.at END,
       receipt_event = CASE WHEN r.event IS NULL THEN m.receipt_event ELSE r.event END,
       provider_status = CASE WHEN r.event IS NULL THEN m.provider_status ELSE r.status END,
       carrier = CASE WHEN r.event IS NULL THEN m.carrier ELSE r.carrier END,
       response = CASE WHEN r.event IS NULL THEN m.response ELSE r.response END,
       provider_sent_at = CASE WHEN r.event IS NULL THEN m.provider_sent_at ELSE r.sent_at END,
       price = CASE WHEN r.event IS NULL THEN m.price ELSE r.price * 0.00000001 END
  FROM unnest($3::tid[], $4::xid[], $5::smallint[], $6::smallint[], $7::uuid[], $8::smallint[], $9::timestamptz[],
              $10::text[], $11::text[], $12::text[], $13::timestamptz[], $14::bigint[])
       AS r (tid, xid, state, reported, event, receipt_state, at, status, carrier, response, sent_at, price)
 WHERE m.day = $1 AND m.ctid = r.tid AND m.xmin = r.xid";

const REJECT: &str = "
WITH refused AS (
    SELECT * FROM unnest($1::integer[], $2::uuid[], $3::text[], $4::text[]) AS r (source, event, reason, text)
), forgotten AS (
    DELETE FROM receipt_events e USING refused r WHERE e.source = r.source AND e.event = r.event
)
INSERT INTO receipt_rejects (source, event, at, is_whole, place, reason, text)
SELECT source, event, $5, false, 'inbox', reason, text FROM refused
    ON CONFLICT (source, event) DO UPDATE SET at = excluded.at, reason = excluded.reason";

const KEEP_CHANGES: &str = "
INSERT INTO status_changes (file, row, at, destination, before, state, provider_id)
SELECT file, row, $1, destination, before, state, provider_id
  FROM unnest($2::uuid[], $3::bigint[], $4::integer[], $5::smallint[], $6::smallint[], $7::text[])
       AS c (file, row, destination, before, state, provider_id)";

/// How a batch is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// All at once, with or without locks.
    Whole(Locking),
    /// Whatever the database refuses is divided until single receipts are left, with locks.
    Divided,
}

/// The receipts of a batch, out of the inbox.
#[derive(Default)]
struct TakenOut {
    waiting: Vec<WaitingReceipt>,
    unreadable: Vec<RefusedReceipt>,
}

impl Shared {
    pub(super) async fn apply(&self, receipts: usize, bytes: usize, at: UnixMs) -> Result<Applied, Failure> {
        let mut way = Way::Whole(Locking::Optimistic);
        loop {
            let mut held = self.connections.hold().await?;
            let mut transaction = connect::begin(self.timeouts, &mut held).await?;
            let applied = self.within(self.apply_by(&mut transaction, receipts, bytes, at, way)).await;
            let next = match (applied, way) {
                (Ok(Some(applied)), _) => {
                    connect::commit(self.timeouts, transaction).await?;
                    held.keep();
                    return Ok(applied);
                }
                (Ok(None), Way::Whole(Locking::Optimistic)) => Way::Whole(Locking::Pessimistic),
                (Ok(None), _) => {
                    let why = "rows of messages changed while they were locked";
                    return Err(Failure::new(FailureKind::Unavailable, why));
                }
                (Err(failure), Way::Whole(_)) if failure.is_refusal() => {
                    tracing::warn!(why = %failure.0, "receipts can't be applied together; applying them in parts");
                    Way::Divided
                }
                (Err(failure), _) => return Err(failure),
            };
            self.within(async { Ok(transaction.rollback().await?) }).await?;
            held.keep();
            tracing::debug!(from = ?way, to = ?next, "applying a batch again");
            way = next;
        }
    }

    /// `None` if another has written one of the rows in between: nothing of this may stay.
    async fn apply_by(
        &self,
        transaction: &mut Transaction<'_>,
        receipts: usize,
        bytes: usize,
        at: UnixMs,
        way: Way,
    ) -> Result<Option<Applied>, Failure> {
        let TakenOut { waiting, unreadable } = take_out(transaction, receipts, bytes).await?;
        reject(transaction, &unreadable, at).await?;
        let rejected = unreadable.len() as u64;
        let applied = match way {
            Way::Whole(locking) => self.apply_all(transaction, waiting, at, locking).await?,
            Way::Divided => Some(self.apply_divided(transaction, waiting, at).await?),
        };
        Ok(applied.map(|applied| Applied { rejected: applied.rejected + rejected, ..applied }))
    }

    /// Applies what the database lets, and rejects the rest if that is not all: what refuses every receipt is no fault
    /// of one, unless it is about a value.
    async fn apply_divided(
        &self,
        transaction: &mut Transaction<'_>,
        waiting: Vec<WaitingReceipt>,
        at: UnixMs,
    ) -> Result<Applied, Failure> {
        let (mut sum, mut refused) = (Applied::default(), Vec::new());
        let mut parts = vec![waiting];
        while let Some(mut part) = parts.pop() {
            let step = transaction.savepoint("part").await?;
            match self.apply_all(&step, part.clone(), at, Locking::Pessimistic).await {
                Ok(Some(applied)) => {
                    step.commit().await?;
                    sum += applied;
                }
                Ok(None) => {
                    let why = "rows of messages changed while they were locked";
                    return Err(Failure::new(FailureKind::Unavailable, why));
                }
                Err(failure) if failure.is_refusal() => {
                    step.rollback().await?;
                    let half = part.split_off(part.len() / 2);
                    if part.is_empty() {
                        refused.extend(half.into_iter().map(|waiting| (waiting, failure.0.clone())));
                    } else {
                        parts.extend([half, part]);
                    }
                }
                Err(failure) => return Err(failure),
            }
        }
        let is_about_a_value = |(_, failure): &(_, call::Failure)| failure.kind == FailureKind::Invalid;
        if let Some((_, failure)) = refused.iter().find(|refused| !is_about_a_value(refused))
            && sum.total() == 0
        {
            return Err(failure.clone().into());
        }
        sum.rejected = refused.len() as u64;
        let refused: Vec<_> =
            refused.into_iter().map(|(waiting, failure)| waiting.refused(failure.why)).collect();
        reject(transaction, &refused, at).await?;
        Ok(sum)
    }

    async fn apply_all(
        &self,
        transaction: &Transaction<'_>,
        waiting: Vec<WaitingReceipt>,
        at: UnixMs,
        locking: Locking,
    ) -> Result<Option<Applied>, Failure> {
        let mut applied = Applied::default();
        if waiting.is_empty() {
            return Ok(Some(applied));
        }
        let (mut rows, places) = look_up(transaction, &waiting, locking).await?;
        let mut unknown = Vec::new();
        for (waiting, place) in waiting.into_iter().zip(places) {
            match place.and_then(|place| rows.get_mut(&place)) {
                Some(row) => {
                    row.standing.hear(waiting.receipt);
                    applied.matched += 1;
                }
                None => unknown.push(waiting),
            }
        }
        applied.parked = unknown.len() as u64;
        let mut changed = Vec::new();
        for (place, row) in &rows {
            applied.changed += u64::from(row.standing.is_changed());
            applied.conflicts += u64::from(row.standing.is_new_conflict());
            if row.standing.has_news() {
                changed.push((place, row));
            }
        }
        for partition in changed.chunk_by(|a, b| a.0.0 == b.0.0) {
            if !write(transaction, partition, at).await? {
                return Ok(None);
            }
        }
        if self.keep_changes {
            keep_changes(transaction, &changed, at).await?;
        }
        waiting::park(transaction, &unknown, at).await?;
        Ok(Some(applied))
    }
}

/// Takes receipts out of the inbox: whole rows of it, and a part of one only if there would be less than half of what may
/// be taken.
async fn take_out(transaction: &Transaction<'_>, receipts: usize, bytes: usize) -> Result<TakenOut, Failure> {
    let statement = transaction.prepare_cached(LOOK_AT).await?;
    let mut out = TakenOut::default();
    let (mut count, mut held_bytes, mut chunks) = (0, 0, 0);
    let (mut done, mut last) = (Vec::new(), 0_i64);
    transaction.batch_execute(GO_BY_PLACE).await?;
    'looking: while count < receipts && held_bytes <= bytes {
        // As many as are needed if they go on like those before; two whole ones make a batch.
        let wanted = if count == 0 { 2 } else { ((receipts - count) * chunks).div_ceil(count) };
        let limit = wanted.clamp(1, CHUNKS_MAX);
        let rows = transaction.query(&statement, &[&last, &clamp(limit)]).await?;
        let is_last = rows.len() < limit;
        for row in &rows {
            let Chunk { number, receipts: mut chunk } = Chunk::read(row)?;
            (last, chunks) = (number, chunks + 1);
            let mut fits = 0;
            for receipt in &chunk {
                if count + fits == receipts || held_bytes > bytes {
                    break;
                }
                held_bytes += receipt.as_ref().map_or(0, |waiting| waiting.receipt.held_bytes());
                fits += 1;
            }
            if fits < chunk.len() && (count >= receipts.div_ceil(2) || fits == 0) {
                break 'looking;
            }
            if fits < chunk.len() {
                put_back(transaction, number, fits).await?;
                chunk.truncate(fits);
            } else {
                done.push(number);
            }
            count += fits;
            for receipt in chunk {
                match receipt {
                    Ok(waiting) => out.waiting.push(waiting),
                    Err(unreadable) => out.unreadable.push(unreadable),
                }
            }
        }
        if is_last {
            break;
        }
    }
    if !done.is_empty() {
        let delete = transaction.prepare_cached("DELETE FROM receipt_inbox WHERE number = ANY ($1)").await?;
        transaction.execute(&delete, &[&done]).await?;
    }
    Ok(out)
}

/// Leaves the rest of a row where it was, without its first `taken` receipts.
async fn put_back(transaction: &Transaction<'_>, number: i64, taken: usize) -> Result<(), Failure> {
    let rest: Vec<_> = ARRAYS.iter().map(|array| format!("{array} = {array}[$2:]")).collect();
    let update = format!("UPDATE receipt_inbox SET {} WHERE number = $1", rest.join(", "));
    let update = transaction.prepare_cached(&update).await?;
    let first = i32::try_from(taken + 1).unwrap_or(i32::MAX);
    transaction.execute(&update, &[&number, &first]).await?;
    Ok(())
}

/// Makes rejects of receipts that can't be applied. Their events are forgotten: what its source sends again is tried again.
async fn reject(
    transaction: &Transaction<'_>,
    refused: &[RefusedReceipt],
    at: UnixMs,
) -> Result<(), Failure> {
    if refused.is_empty() {
        return Ok(());
    }
    tracing::warn!(
        receipts = refused.len(),
        "receipts can't be applied and are rejected; the ledger has the reasons"
    );
    let sources: Vec<_> = refused.iter().map(|refused| refused.source).collect();
    let events: Vec<_> = refused.iter().map(|refused| Uuid::from_bytes(refused.event.0)).collect();
    let reasons: Vec<_> = refused.iter().map(|refused| values::text(&refused.reason)).collect();
    let texts: Vec<_> = refused.iter().map(|refused| values::text(&refused.text)).collect();
    let statement = transaction.prepare_cached(REJECT).await?;
    transaction.execute(&statement, &[&sources, &events, &reasons, &texts, &values::time(at)]).await?;
    Ok(())
}

fn clamp(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Writes rows of one partition; whether all were as they were read.
async fn write(
    transaction: &Transaction<'_>,
    rows: &[(&LockOrder, &SeenRow)],
    at: UnixMs,
) -> Result<bool, Failure> {
    let Reverse(day) = rows[0].0.0;
    let tids: Vec<_> = rows.iter().map(|(_, row)| row.tid).collect();
    let xids: Vec<_> = rows.iter().map(|(_, row)| row.xmin).collect();

    let standings = || rows.iter().map(|(_, row)| &row.standing);
    let states: Vec<_> = standings().map(|standing| standing.state as i16).collect();
    let reported: Vec<_> = standings().map(|standing| i16::from(standing.reported.0)).collect();

    let best = || standings().map(|standing| standing.best.as_ref());
    let events: Vec<_> = best().map(|best| best.map(|best| Uuid::from_bytes(best.event.0))).collect();
    let receipt_states: Vec<_> = best().map(|best| best.map(|best| best.state as i16)).collect();
    let ats: Vec<_> = best().map(|best| best.and_then(|best| best.at).map(values::time)).collect();

    let facts = || best().map(|best| best.map(|Receipt { facts, .. }| facts));
    let text = |of: fn(&ReceiptFacts) -> Option<&str>| -> Vec<_> {
        facts().map(|facts| values::texts(facts.and_then(of))).collect()
    };
    let statuses = text(|facts| facts.status.as_deref());
    let carriers = text(|facts| facts.carrier.as_deref());
    let responses = text(|facts| facts.response.as_deref());
    let sent_ats: Vec<_> =
        facts().map(|facts| facts.and_then(|facts| facts.sent_at).map(values::time)).collect();
    let prices: Vec<_> =
        facts().map(|facts| facts.and_then(|facts| facts.price).map(|price| price.0)).collect();

    let statement = transaction.prepare_cached(WRITE).await?;
    let written = transaction
        .execute(
            &statement,
            &[
                &day,
                &values::time(at),
                &tids,
                &xids,
                &states,
                &reported,
                &events,
                &receipt_states,
                &ats,
                &statuses,
                &carriers,
                &responses,
                &sent_ats,
                &prices,
            ],
        )
        .await?;
    Ok(written == rows.len() as u64)
}

/// Notes which states have changed.
async fn keep_changes(
    transaction: &Transaction<'_>,
    rows: &[(&LockOrder, &SeenRow)],
    at: UnixMs,
) -> Result<(), Failure> {
    let changed: Vec<_> = rows.iter().filter(|(_, row)| row.standing.is_changed()).collect();
    if changed.is_empty() {
        return Ok(());
    }
    let files: Vec<_> = changed.iter().map(|(place, _)| values::file(place.1)).collect();
    let numbers: Vec<_> = changed.iter().map(|(place, _)| place.2).collect();
    let destinations: Vec<_> = changed.iter().map(|(place, _)| place.3).collect();
    let before: Vec<_> = changed.iter().map(|(_, row)| row.standing.state_before() as i16).collect();
    let states: Vec<_> = changed.iter().map(|(_, row)| row.standing.state as i16).collect();
    let provider_ids: Vec<_> = changed.iter().map(|(_, row)| row.provider_id.as_deref()).collect();
    let statement = transaction.prepare_cached(KEEP_CHANGES).await?;
    transaction
        .execute(
            &statement,
            &[&values::time(at), &files, &numbers, &destinations, &before, &states, &provider_ids],
        )
        .await?;
    Ok(())
}
