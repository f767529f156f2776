//! Receipts out of the inbox, into the rows of their messages.
//!
//! Rows are read without a lock, and written where they lie if they still say what was read: that saves two of three
//! index lookups, and the record of a lock. If another transaction has written in between, all is rolled back and
//! repeated with the rows locked before they are read.

use std::cmp::Reverse;

use deadpool_postgres::Transaction;
use postrider_actors::{
    model::{
        call::FailureKind,
        receipt::{Receipt, ReceiptFacts},
        time::UnixMs,
    },
    ports::Applied,
};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::{
    Shared, connect,
    error::Failure,
    look_up::{LockOrder, Locking, SeenRow, look_up},
    values,
    waiting::{self, WaitingReceipt, columns},
};

/// So that the planner goes to the places that [`WRITE`] names: statistics that are out of date say that next to nothing
/// is in the partition, and that each of its rows is best compared with each receipt. To compare costs a quarter of
/// reading a page then; and what it still compares it takes in the order of the key, not in that of the pages (F50).
const GO_BY_PLACE: &str = "SET LOCAL cpu_operator_cost = 1; SET LOCAL enable_bitmapscan = off";

/// The oldest first, up to `$1` of them or the first that together have more than `$2` bytes. The lock is on all
/// that were looked at, until the end of the transaction. A row of the inbox never changes, so it stays where it lies;
/// rows are summed in the order in which they were looked at.
const TAKE_OUT: &str = concat!(
    "
WITH looked_at AS (
    SELECT ctid AS tid, bytes FROM receipt_inbox ORDER BY number LIMIT $1 FOR UPDATE SKIP LOCKED
), summed AS (
    SELECT tid, sum(bytes) OVER (ROWS UNBOUNDED PRECEDING) - bytes AS before FROM looked_at
)
DELETE FROM receipt_inbox WHERE ctid = ANY (ARRAY(SELECT tid FROM summed WHERE before <= $2)) RETURNING number, ",
    columns!()
);

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

const KEEP_CHANGES: &str = "
INSERT INTO status_changes (file, row, at, destination, before, state, provider_id)
SELECT file, row, $1, destination, before, state, provider_id
  FROM unnest($2::uuid[], $3::bigint[], $4::integer[], $5::smallint[], $6::smallint[], $7::text[])
       AS c (file, row, destination, before, state, provider_id)";

impl Shared {
    pub(super) async fn apply(&self, receipts: usize, bytes: usize, at: UnixMs) -> Result<Applied, Failure> {
        for locking in [Locking::Optimistic, Locking::Pessimistic] {
            let mut held = self.connections.hold().await?;
            let transaction = connect::begin(self.timeouts, &mut held).await?;
            let applied = self.within(self.apply_with(&transaction, receipts, bytes, at, locking)).await?;
            if let Some(applied) = applied {
                connect::commit(self.timeouts, transaction).await?;
                held.keep();
                return Ok(applied);
            }
            self.within(async { Ok(transaction.rollback().await?) }).await?;
            held.keep();
            tracing::debug!(
                ?locking,
                "another process wrote a row of the batch meanwhile; applying it again"
            );
        }
        Err(Failure::new(FailureKind::Unavailable, "rows of messages changed while they were locked"))
    }

    /// `None` if another has written one of the rows in between: nothing of this may stay.
    async fn apply_with(
        &self,
        transaction: &Transaction<'_>,
        receipts: usize,
        bytes: usize,
        at: UnixMs,
        locking: Locking,
    ) -> Result<Option<Applied>, Failure> {
        let statement = transaction.prepare_cached(TAKE_OUT).await?;
        let (receipts, bytes) = (clamp(receipts), clamp(bytes));
        let limits: [&(dyn ToSql + Sync); 2] = [&receipts, &bytes];
        // In one round trip, in this order.
        let ((), taken) =
            tokio::try_join!(transaction.batch_execute(GO_BY_PLACE), transaction.query(&statement, &limits))?;
        let taken = taken.iter().map(WaitingReceipt::read).collect::<Result<Vec<_>, _>>()?;
        let mut applied = Applied::default();
        if taken.is_empty() {
            return Ok(Some(applied));
        }
        let (mut rows, places) = look_up(transaction, &taken, locking).await?;
        let mut unknown = Vec::new();
        for (waiting, place) in taken.into_iter().zip(places) {
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
