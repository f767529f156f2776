//! Taking receipts into the inbox, or among the rejects.

use std::{
    collections::{BTreeMap, HashSet},
    time::SystemTime,
};

use deadpool_postgres::Transaction;
use postrider_actors::{
    model::receipt::{EventId, Receipt, ReceiptReject},
    ports::{Arrival, SourceCursor, Taken},
};
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::{
    Shared, connect,
    error::Failure,
    values,
    waiting::{Columns, columns},
};

/// Receipts per transaction (F53): some megabytes, some tens of milliseconds.
const PART: usize = 4096;

/// Rejects per transaction: they bring their texts, some megabytes at most.
const REJECTS_PART: usize = 256;

/// Which of the events are new, and whether another brought the same id before: see `EventId::same_id`. A statement does
/// not see its own rows. OFFSET: a look into the index per event.
const REMEMBER: &str = "
INSERT INTO receipt_events AS n (source, event, at)
SELECT $1, event, $3 FROM unnest($2::uuid[]) event
    ON CONFLICT DO NOTHING
RETURNING event, EXISTS (
    SELECT FROM receipt_events e
     WHERE e.source = $1 AND e.event BETWEEN (left(n.event::text, 18) || '-0000-000000000000')::uuid
                                         AND (left(n.event::text, 18) || '-ffff-ffffffffffff')::uuid
    OFFSET 0)";

const TAKE: &str = concat!(
    "INSERT INTO receipt_inbox (",
    columns!(),
    ") SELECT event, file, row, at, sent_at, price, $1, $2, bytes, state, provider_id, status, carrier, response
         FROM unnest($3::uuid[], $4::uuid[], $5::bigint[], $6::timestamptz[], $7::timestamptz[], $8::bigint[],
                     $9::integer[], $10::smallint[], $11::text[], $12::text[], $13::text[], $14::text[])
           AS r (event, file, row, at, sent_at, price, bytes, state, provider_id, status, carrier, response)"
);

/// One whose event is known was taken before, when it could be read. OFFSET: a look into the index per reject.
const REJECT: &str = "
INSERT INTO receipt_rejects (source, event, at, happened_at, is_whole, place, reason, text)
SELECT $1, r.event, $2, r.happened_at, r.is_whole, r.place, r.reason, r.text
  FROM unnest($3::uuid[], $4::timestamptz[], $5::boolean[], $6::text[], $7::text[], $8::text[])
    AS r (event, happened_at, is_whole, place, reason, text)
 WHERE NOT EXISTS (SELECT FROM receipt_events e WHERE e.source = $1 AND e.event = r.event OFFSET 0)
    ON CONFLICT DO NOTHING";

const NOTE: &str = "
UPDATE sources SET destination = $2, cursor = coalesce($3, cursor), receipts_at = coalesce($4, receipts_at),
       cursor_at = coalesce($5, cursor_at)
 WHERE id = $1";

impl Shared {
    pub(super) async fn take(&self, arrival: &Arrival) -> Result<Taken, Failure> {
        let (source, destination) = self.source_id(&arrival.source, &arrival.destination).await?;
        let mut taken = Taken::default();
        let mut seen = HashSet::new();
        let (receipts, twice): (Vec<_>, Vec<_>) =
            arrival.receipts.iter().partition(|receipt| seen.insert(receipt.event));
        taken.known += twice.len() as u64;
        let mut seen = HashSet::new();
        let mut rejects: Vec<_> = arrival.rejects.iter().filter(|reject| seen.insert(reject.event)).collect();
        rejects.sort_by_key(|reject| reject.event);
        let parts = receipts.len().div_ceil(PART).max(rejects.len().div_ceil(REJECTS_PART)).max(1);
        for part in 0..parts {
            let cursor = arrival.cursor.as_ref().filter(|_| part + 1 == parts);
            let part = TakePart {
                source,
                destination,
                receipts: receipts.chunks(PART).nth(part).unwrap_or_default(),
                rejects: rejects.chunks(REJECTS_PART).nth(part).unwrap_or_default(),
                cursor,
            };
            taken += self.take_part(arrival, &part).await?;
        }
        Ok(taken)
    }

    async fn take_part(&self, arrival: &Arrival, part: &TakePart<'_>) -> Result<Taken, Failure> {
        let at = values::time(arrival.at);
        let mut held = self.connections.hold().await?;
        let transaction = connect::begin(self.timeouts, &mut held).await?;
        let taken = self
            .within(async {
                let mut taken = Taken::default();
                if !part.receipts.is_empty() {
                    let events = part.receipts.iter().map(|receipt| receipt.event);
                    let new = remember(&transaction, part.source, events, at).await?;
                    taken.reused_ids = reused_ids(&new);
                    let is_new = |receipt: &&Receipt| new.contains_key(&receipt.event);
                    let new: Vec<_> = part.receipts.iter().copied().filter(is_new).collect();
                    taken.new = new.len() as u64;
                    taken.known = (part.receipts.len() - new.len()) as u64;
                    put(&transaction, part.source, part.destination, &new).await?;
                }
                if !part.rejects.is_empty() {
                    taken.rejected = reject(&transaction, part, at).await?;
                }
                // Last: whoever takes for the same source waits here, with nothing held that we need.
                let note = transaction.prepare_cached(NOTE).await?;
                let cursor = part.cursor.map(|SourceCursor(cursor)| cursor);
                let has_receipts = !arrival.receipts.is_empty() || !arrival.rejects.is_empty();
                let (receipts_at, cursor_at) = (has_receipts.then_some(at), cursor.is_some().then_some(at));
                let values: [&(dyn ToSql + Sync); 5] =
                    [&part.source, &part.destination, &cursor, &receipts_at, &cursor_at];
                transaction.execute(&note, &values).await?;
                Ok(taken)
            })
            .await?;
        connect::commit(self.timeouts, transaction).await?;
        held.keep();
        Ok(taken)
    }

    /// The numbers of a source and of its destination; they get some if they have none.
    pub(super) async fn source_id(&self, name: &str, destination: &str) -> Result<(i32, i32), Failure> {
        let destination =
            self.names.destination_ids(&self.connections, self.timeouts, [destination]).await?[destination];
        let held = self.connections.hold().await?;
        let id = self
            .within(async {
                let client = held.client();
                let find = client.prepare_cached("SELECT id FROM sources WHERE name = $1").await?;
                if let Some(row) = client.query_opt(&find, &[&name]).await? {
                    return Ok(row.get(0));
                }
                let insert = "INSERT INTO sources (name, destination) VALUES ($1, $2) ON CONFLICT DO NOTHING";
                client.execute(insert, &[&name, &destination]).await?;
                Ok(client.query_one(&find, &[&name]).await?.get(0))
            })
            .await?;
        held.keep();
        Ok((id, destination))
    }

    pub(super) async fn cursor(&self, source: &str) -> Result<Option<SourceCursor>, Failure> {
        let held = self.connections.hold().await?;
        let query = "SELECT cursor FROM sources WHERE name = $1";
        let row = self.within(async { Ok(held.client().query_opt(query, &[&source]).await?) }).await?;
        held.keep();
        Ok(row.and_then(|row| row.get::<_, Option<String>>(0)).map(SourceCursor))
    }

    /// How many rows one of the tables of receipts has.
    pub(super) async fn depth(&self, table: &'static str) -> Result<u64, Failure> {
        let held = self.connections.hold().await?;
        let query = format!("SELECT count(*) FROM {table}");
        let row = self.within(async { Ok(held.client().query_one(&query, &[]).await?) }).await?;
        held.keep();
        Ok(row.get::<_, i64>(0).cast_unsigned())
    }
}

/// What one transaction takes.
struct TakePart<'a> {
    source: i32,
    destination: i32,
    receipts: &'a [&'a Receipt],
    rejects: &'a [&'a ReceiptReject],
    cursor: Option<&'a SourceCursor>,
}

/// Makes events known; those that were not, and whether their id was.
pub(super) async fn remember(
    transaction: &Transaction<'_>,
    source: i32,
    events: impl Iterator<Item = EventId>,
    at: SystemTime,
) -> Result<BTreeMap<EventId, bool>, Failure> {
    let mut events: Vec<_> = events.map(|event| Uuid::from_bytes(event.0)).collect();
    // Two that take the same wait for each other in one direction.
    events.sort_unstable();
    let statement = transaction.prepare_cached(REMEMBER).await?;
    let rows = transaction.query(&statement, &[&source, &events, &at]).await?;
    Ok(rows.iter().map(|row| (EventId(row.get::<_, Uuid>(0).into_bytes()), row.get(1))).collect())
}

/// How many of these new events have an id that came before, by itself or among them.
pub(super) fn reused_ids(new: &BTreeMap<EventId, bool>) -> u64 {
    let mut before = None;
    let is_reused = |(event, is_known): (&EventId, &bool)| {
        let id = event.same_id();
        *is_known || before.replace(id) == Some(id)
    };
    new.iter().map(is_reused).filter(|is_reused| *is_reused).count() as u64
}

pub(super) async fn put(
    transaction: &Transaction<'_>,
    source: i32,
    destination: i32,
    receipts: &[&Receipt],
) -> Result<(), Failure> {
    if receipts.is_empty() {
        return Ok(());
    }
    let c = Columns::of(receipts);
    let statement = transaction.prepare_cached(TAKE).await?;
    transaction
        .execute(
            &statement,
            &[
                &source,
                &destination,
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

/// Keeps the part's rejects; how many are new.
async fn reject(transaction: &Transaction<'_>, part: &TakePart<'_>, at: SystemTime) -> Result<u64, Failure> {
    let rejects = || part.rejects.iter();
    let events: Vec<_> = rejects().map(|reject| Uuid::from_bytes(reject.event.0)).collect();
    let happened: Vec<_> = rejects().map(|reject| reject.at.map(values::time)).collect();
    let whole: Vec<_> = rejects().map(|reject| reject.text.is_whole).collect();
    let places: Vec<_> = rejects().map(|reject| values::text(&reject.place)).collect();
    let reasons: Vec<_> = rejects().map(|reject| values::text(&reject.reason)).collect();
    let texts: Vec<_> = rejects().map(|reject| values::text(&reject.text.text)).collect();
    let statement = transaction.prepare_cached(REJECT).await?;
    let values: [&(dyn ToSql + Sync); 8] =
        [&part.source, &at, &events, &happened, &whole, &places, &reasons, &texts];
    Ok(transaction.execute(&statement, &values).await?)
}
