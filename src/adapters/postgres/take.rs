//! Receipts into the inbox.

use std::{collections::HashSet, time::SystemTime};

use deadpool_postgres::Transaction;
use postrider_actors::{
    model::receipt::{EventId, Receipt, ReceiptReject},
    ports::{Arrival, SourceCursor, Taken},
};
use uuid::Uuid;

use super::{
    Shared, connect,
    error::Failure,
    values,
    waiting::{Columns, columns},
};

/// Receipts per transaction (F53): some megabytes, some tens of milliseconds.
const PART: usize = 4096;

/// Which of the events are new.
const REMEMBER: &str = "
INSERT INTO receipt_events (source, event, at)
SELECT $1, event, $3 FROM unnest($2::uuid[]) event
    ON CONFLICT DO NOTHING
RETURNING event";

const TAKE: &str = concat!(
    "INSERT INTO receipt_inbox (",
    columns!(),
    ") SELECT event, file, row, at, sent_at, price, $1, $2, bytes, state, provider_id, status, carrier, response
         FROM unnest($3::uuid[], $4::uuid[], $5::bigint[], $6::timestamptz[], $7::timestamptz[], $8::bigint[],
                     $9::integer[], $10::smallint[], $11::text[], $12::text[], $13::text[], $14::text[])
           AS r (event, file, row, at, sent_at, price, bytes, state, provider_id, status, carrier, response)"
);

impl Shared {
    pub(super) async fn take(&self, arrival: &Arrival) -> Result<Taken, Failure> {
        let destination = self.destination_ids([&*arrival.destination]).await?[&*arrival.destination];
        let source = self.source_id(arrival, destination).await?;
        let mut taken = Taken::default();
        let mut seen = HashSet::new();
        let (receipts, twice): (Vec<_>, Vec<_>) =
            arrival.receipts.iter().partition(|receipt| seen.insert(receipt.event));
        taken.known += twice.len() as u64;
        let mut seen = HashSet::new();
        let mut rejects: Vec<_> = arrival.rejects.iter().filter(|reject| seen.insert(reject.event)).collect();
        rejects.sort_by_key(|reject| reject.event);
        let parts = receipts.len().max(rejects.len()).div_ceil(PART).max(1);
        for part in 0..parts {
            let cursor = arrival.cursor.as_ref().filter(|_| part + 1 == parts);
            let part = Part {
                source,
                destination,
                receipts: slice(&receipts, part),
                rejects: slice(&rejects, part),
                cursor,
            };
            let step = self.take_part(arrival, &part).await?;
            taken.new += step.new;
            taken.known += step.known;
            taken.rejected += step.rejected;
        }
        Ok(taken)
    }

    async fn take_part(&self, arrival: &Arrival, part: &Part<'_>) -> Result<Taken, Failure> {
        let at = values::time(arrival.at);
        let mut held = self.connections.hold().await?;
        let transaction = connect::begin(self.timeouts, &mut held).await?;
        let taken = self
            .within(async {
                let mut taken = Taken::default();
                if !part.receipts.is_empty() {
                    let new = remember(&transaction, part, at).await?;
                    taken.new = new.len() as u64;
                    taken.known = (part.receipts.len() - new.len()) as u64;
                    if !new.is_empty() {
                        put(&transaction, part, &new).await?;
                    }
                }
                if !part.rejects.is_empty() {
                    let rejects = || part.rejects.iter();
                    let events: Vec<_> = rejects().map(|reject| Uuid::from_bytes(reject.event.0)).collect();
                    let places: Vec<_> = rejects().map(|reject| values::text(&reject.place)).collect();
                    let reasons: Vec<_> = rejects().map(|reject| values::text(&reject.reason)).collect();
                    let insert = "INSERT INTO receipt_rejects (source, event, at, place, reason) \
                                  SELECT $1, r.event, $5, r.place, r.reason \
                                    FROM unnest($2::uuid[], $3::text[], $4::text[]) AS r (event, place, reason) \
                                  ON CONFLICT DO NOTHING";
                    let insert = transaction.prepare_cached(insert).await?;
                    taken.rejected = transaction
                        .execute(&insert, &[&part.source, &events, &places, &reasons, &at])
                        .await?;
                }
                // Last: whoever takes for the same source waits here, with nothing held that we need.
                let update = "UPDATE sources SET updated_at = $2, destination = $3, cursor = coalesce($4, cursor) \
                               WHERE id = $1";
                let update = transaction.prepare_cached(update).await?;
                let cursor = part.cursor.map(|SourceCursor(cursor)| cursor);
                transaction.execute(&update, &[&part.source, &at, &part.destination, &cursor]).await?;
                Ok(taken)
            })
            .await?;
        connect::commit(self.timeouts, transaction).await?;
        held.keep();
        Ok(taken)
    }

    async fn source_id(&self, arrival: &Arrival, destination: i32) -> Result<i32, Failure> {
        let held = self.connections.hold().await?;
        let id = self
            .within(async {
                let client = held.client();
                let find = client.prepare_cached("SELECT id FROM sources WHERE name = $1").await?;
                if let Some(row) = client.query_opt(&find, &[&&*arrival.source]).await? {
                    return Ok(row.get(0));
                }
                let insert = "INSERT INTO sources (name, destination, updated_at) VALUES ($1, $2, $3) \
                              ON CONFLICT DO NOTHING";
                let at = values::time(arrival.at);
                client.execute(insert, &[&&*arrival.source, &destination, &at]).await?;
                Ok(client.query_one(&find, &[&&*arrival.source]).await?.get(0))
            })
            .await?;
        held.keep();
        Ok(id)
    }

    pub(super) async fn cursor(&self, source: &str) -> Result<Option<SourceCursor>, Failure> {
        let held = self.connections.hold().await?;
        let query = "SELECT cursor FROM sources WHERE name = $1";
        let row = self.within(async { Ok(held.client().query_opt(query, &[&source]).await?) }).await?;
        held.keep();
        Ok(row.and_then(|row| row.get::<_, Option<String>>(0)).map(SourceCursor))
    }

    pub(super) async fn waiting(&self) -> Result<u64, Failure> {
        let held = self.connections.hold().await?;
        let query = "SELECT count(*) FROM receipt_inbox";
        let row = self.within(async { Ok(held.client().query_one(query, &[]).await?) }).await?;
        held.keep();
        Ok(row.get::<_, i64>(0).cast_unsigned())
    }
}

/// What one transaction takes.
struct Part<'a> {
    source: i32,
    destination: i32,
    receipts: &'a [&'a Receipt],
    rejects: &'a [&'a ReceiptReject],
    cursor: Option<&'a SourceCursor>,
}

fn slice<T>(all: &[T], part: usize) -> &[T] {
    let from = (part * PART).min(all.len());
    &all[from..(from + PART).min(all.len())]
}

/// The part's receipts that were never taken. They are known from here on.
async fn remember<'a>(
    transaction: &Transaction<'_>,
    part: &Part<'a>,
    at: SystemTime,
) -> Result<Vec<&'a Receipt>, Failure> {
    let mut events: Vec<_> = part.receipts.iter().map(|receipt| Uuid::from_bytes(receipt.event.0)).collect();
    // Two that take the same wait for each other in one direction.
    events.sort_unstable();
    let statement = transaction.prepare_cached(REMEMBER).await?;
    let rows = transaction.query(&statement, &[&part.source, &events, &at]).await?;
    let new: HashSet<_> = rows.iter().map(|row| EventId(row.get::<_, Uuid>(0).into_bytes())).collect();
    Ok(part.receipts.iter().copied().filter(|receipt| new.contains(&receipt.event)).collect())
}

async fn put(transaction: &Transaction<'_>, part: &Part<'_>, receipts: &[&Receipt]) -> Result<(), Failure> {
    let c = Columns::of(receipts);
    let statement = transaction.prepare_cached(TAKE).await?;
    transaction
        .execute(
            &statement,
            &[
                &part.source,
                &part.destination,
                &c.events,
                &c.files,
                &c.rows,
                &c.ats,
                &c.sent_ats,
                &c.prices,
                &c.bytes,
                &c.states,
                &c.provider_ids,
                &c.statuses,
                &c.carriers,
                &c.responses,
            ],
        )
        .await?;
    Ok(())
}
