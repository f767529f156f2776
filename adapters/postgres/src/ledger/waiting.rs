//! Receipts between their arrival and their message: inbox and parked, orphans among these.
//!
//! What arrives together lies together: a row of the inbox holds up to [`CHUNK`] receipts, each column an array of what a
//! column of the parked holds. So taking receipts in and out costs a row, not a row per receipt. Parked receipts are looked
//! for by their message, so each has a row of its own.

use std::time::SystemTime;

use deadpool_postgres::Transaction;
use postrider_actors::model::{
    call::FailureKind,
    ids::{FileId, MessageId},
    receipt::{EventId, Price, Receipt, ReceiptFacts, ReceiptKey},
    state::MessageState,
    time::UnixMs,
};
use tokio_postgres::{
    Row,
    types::{FromSql, ToSql},
};
use uuid::Uuid;

use super::{
    error::Failure,
    values::{self, unix},
};

/// Receipts of a row of the inbox: two make a batch to apply, so that batches are full and no reconciler waits for another's row.
pub(super) const CHUNK: usize = 500;

/// What a receipt is made of, in both tables.
macro_rules! columns {
    () => {
        "source, destination, event, file, row, at, sent_at, price, bytes, state, provider_id, status, carrier, response"
    };
}
pub(super) use columns;

/// The arrays of a row of the inbox.
pub(super) const ARRAYS: [&str; 12] = [
    "event",
    "file",
    "row",
    "at",
    "sent_at",
    "price",
    "bytes",
    "state",
    "provider_id",
    "status",
    "carrier",
    "response",
];

/// Receipts by columns, in the order of [`ARRAYS`].
struct Columns<'a> {
    events: Vec<Uuid>,
    files: Vec<Option<Uuid>>,
    rows: Vec<Option<i64>>,
    ats: Vec<Option<SystemTime>>,
    sent_ats: Vec<Option<SystemTime>>,
    prices: Vec<Option<i64>>,
    bytes: Vec<i32>,
    states: Vec<i16>,
    provider_ids: Vec<Option<std::borrow::Cow<'a, str>>>,
    statuses: Vec<Option<std::borrow::Cow<'a, str>>>,
    carriers: Vec<Option<std::borrow::Cow<'a, str>>>,
    responses: Vec<Option<std::borrow::Cow<'a, str>>>,
}

impl<'a> Columns<'a> {
    fn of(receipts: &[&'a Receipt]) -> Self {
        let message = |receipt: &Receipt| match receipt.key {
            ReceiptKey::Message(id) => Some(id),
            ReceiptKey::Provider(_) => None,
        };
        let provider_id = |receipt: &'a Receipt| match &receipt.key {
            ReceiptKey::Provider(id) => Some(values::text(id)),
            ReceiptKey::Message(_) => None,
        };
        let all = || receipts.iter().copied();
        Self {
            events: all().map(|receipt| Uuid::from_bytes(receipt.event.0)).collect(),
            files: all().map(|receipt| message(receipt).map(|id| values::file(id.file))).collect(),
            rows: all().map(|receipt| message(receipt).map(|id| values::row(id.row))).collect(),
            ats: all().map(|receipt| receipt.at.map(values::time)).collect(),
            sent_ats: all().map(|receipt| receipt.facts.sent_at.map(values::time)).collect(),
            prices: all().map(|receipt| receipt.facts.price.map(|price| price.0)).collect(),
            bytes: all().map(|receipt| i32::try_from(receipt.held_bytes()).unwrap_or(i32::MAX)).collect(),
            states: all().map(|receipt| receipt.state as i16).collect(),
            provider_ids: all().map(provider_id).collect(),
            statuses: all().map(|receipt| values::texts(receipt.facts.status.as_deref())).collect(),
            carriers: all().map(|receipt| values::texts(receipt.facts.carrier.as_deref())).collect(),
            responses: all().map(|receipt| values::texts(receipt.facts.response.as_deref())).collect(),
        }
    }

    /// As parameters of a statement that takes [`columns!`]: behind those of source and destination.
    fn after<'s>(
        &'s self,
        sources: &'s (dyn ToSql + Sync),
        destinations: &'s (dyn ToSql + Sync),
    ) -> Vec<&'s (dyn ToSql + Sync)> {
        vec![
            sources,
            destinations,
            &self.events,
            &self.files,
            &self.rows,
            &self.ats,
            &self.sent_ats,
            &self.prices,
            &self.bytes,
            &self.states,
            &self.provider_ids,
            &self.statuses,
            &self.carriers,
            &self.responses,
        ]
    }
}

const PUT: &str = concat!(
    "INSERT INTO receipt_inbox (",
    columns!(),
    ") VALUES ($1, $2, $3::uuid[], $4::uuid[], $5::bigint[], $6::timestamptz[], $7::timestamptz[], $8::bigint[],
               $9::integer[], $10::smallint[], $11::text[], $12::text[], $13::text[], $14::text[])"
);

/// Puts receipts into the inbox.
pub(super) async fn put(
    transaction: &Transaction<'_>,
    source: i32,
    destination: i32,
    receipts: &[&Receipt],
) -> Result<(), Failure> {
    let statement = transaction.prepare_cached(PUT).await?;
    for chunk in receipts.chunks(CHUNK) {
        let columns = Columns::of(chunk);
        transaction.execute(&statement, &columns.after(&source, &destination)).await?;
    }
    Ok(())
}

/// A receipt that waits, in one of the two.
#[derive(Clone)]
pub(super) struct WaitingReceipt {
    pub(super) source: i32,
    pub(super) destination: i32,
    pub(super) receipt: Receipt,
}

/// One that can't be applied.
pub(super) struct RefusedReceipt {
    pub(super) source: i32,
    pub(super) event: EventId,
    pub(super) reason: String,
    /// What it says, for the operator.
    pub(super) text: String,
}

/// What a receipt is stored as.
struct StoredReceipt<'a> {
    event: Uuid,
    file: Option<Uuid>,
    row: Option<i64>,
    at: Option<SystemTime>,
    sent_at: Option<SystemTime>,
    price: Option<i64>,
    state: Option<i16>,
    provider_id: Option<&'a str>,
    status: Option<&'a str>,
    carrier: Option<&'a str>,
    response: Option<&'a str>,
}

impl StoredReceipt<'_> {
    fn read(self) -> Result<Receipt, Failure> {
        let key = match (self.file, self.provider_id) {
            (Some(file), _) => ReceiptKey::Message(MessageId {
                file: FileId(file.into_bytes()),
                row: self.row.unwrap_or(0).cast_unsigned(),
            }),
            (None, id) => ReceiptKey::Provider(id.unwrap_or_default().into()),
        };
        let facts = ReceiptFacts {
            status: self.status.map(Box::from),
            carrier: self.carrier.map(Box::from),
            response: self.response.map(Box::from),
            sent_at: self.sent_at.map(unix),
            price: self.price.map(Price),
        };
        let event = EventId(self.event.into_bytes());
        Ok(Receipt { event, key, state: state(self.state.unwrap_or(-1))?, at: self.at.map(unix), facts })
    }
}

impl WaitingReceipt {
    /// From a row of the parked, by the names of its columns.
    pub(super) fn read(row: &Row) -> Result<Self, Failure> {
        let stored = StoredReceipt {
            event: row.get("event"),
            file: row.get("file"),
            row: row.get("row"),
            at: row.get("at"),
            sent_at: row.get("sent_at"),
            price: row.get("price"),
            state: row.get("state"),
            provider_id: row.get("provider_id"),
            status: row.get("status"),
            carrier: row.get("carrier"),
            response: row.get("response"),
        };
        Ok(Self { source: row.get("source"), destination: row.get("destination"), receipt: stored.read()? })
    }

    /// As one that is refused.
    pub(super) fn refused(self, reason: String) -> RefusedReceipt {
        let Receipt { event, key, state, facts, .. } = self.receipt;
        let key = match key {
            ReceiptKey::Message(id) => id.to_string(),
            ReceiptKey::Provider(id) => id.into(),
        };
        let text = format!("{key}: {}, {}", state.as_str(), facts.status.unwrap_or_default());
        RefusedReceipt { source: self.source, event, reason, text }
    }
}

/// A row of the inbox.
pub(super) struct Chunk {
    pub(super) number: i64,
    pub(super) receipts: Vec<Result<WaitingReceipt, RefusedReceipt>>,
}

impl Chunk {
    /// From a row with `number` and the [`columns!`], by their names. A receipt that can't be read hides no other.
    pub(super) fn read(row: &Row) -> Result<Self, Failure> {
        let (source, destination): (i32, i32) = (row.get("source"), row.get("destination"));
        let events: Vec<Uuid> = array(row, "event")?;
        let files: Vec<Option<Uuid>> = array(row, "file")?;
        let rows: Vec<Option<i64>> = array(row, "row")?;
        let ats: Vec<Option<SystemTime>> = array(row, "at")?;
        let sent_ats: Vec<Option<SystemTime>> = array(row, "sent_at")?;
        let prices: Vec<Option<i64>> = array(row, "price")?;
        let states: Vec<Option<i16>> = array(row, "state")?;
        let provider_ids: Vec<Option<&str>> = array(row, "provider_id")?;
        let statuses: Vec<Option<&str>> = array(row, "status")?;
        let carriers: Vec<Option<&str>> = array(row, "carrier")?;
        let responses: Vec<Option<&str>> = array(row, "response")?;
        let receipt = |index: usize| {
            // The arrays are of one length: a CHECK holds that.
            let stored = StoredReceipt {
                event: events[index],
                file: files[index],
                row: rows[index],
                at: ats[index],
                sent_at: sent_ats[index],
                price: prices[index],
                state: states[index],
                provider_id: provider_ids[index],
                status: statuses[index],
                carrier: carriers[index],
                response: responses[index],
            };
            let text = |stored: &StoredReceipt<'_>| {
                let of = stored
                    .provider_id
                    .map_or_else(|| format!("{:?} {:?}", stored.file, stored.row), str::to_owned);
                format!("{of}: {:?}, {}", stored.state, stored.status.unwrap_or_default())
            };
            let (event, text) = (EventId(stored.event.into_bytes()), text(&stored));
            match stored.read() {
                Ok(receipt) => Ok(WaitingReceipt { source, destination, receipt }),
                Err(Failure(failure)) => Err(RefusedReceipt { source, event, reason: failure.why, text }),
            }
        };
        Ok(Self { number: row.get("number"), receipts: (0..events.len()).map(receipt).collect() })
    }
}

fn array<'a, T: FromSql<'a>>(row: &'a Row, column: &str) -> Result<Vec<T>, Failure> {
    Ok(row.try_get(column)?)
}

/// A state's number in a row.
pub(super) fn state(number: i16) -> Result<MessageState, Failure> {
    u8::try_from(number).ok().and_then(MessageState::from_byte).ok_or_else(|| {
        let why = format!("a row has state {number}, which no version of Postrider wrote");
        Failure::new(FailureKind::Invalid, why)
    })
}

/// Holds receipts until their message comes.
pub(super) async fn park(
    transaction: &Transaction<'_>,
    receipts: &[WaitingReceipt],
    at: UnixMs,
) -> Result<(), Failure> {
    if receipts.is_empty() {
        return Ok(());
    }
    let inner: Vec<_> = receipts.iter().map(|waiting| &waiting.receipt).collect();
    let columns = Columns::of(&inner);
    let sources: Vec<_> = receipts.iter().map(|waiting| waiting.source).collect();
    let destinations: Vec<_> = receipts.iter().map(|waiting| waiting.destination).collect();
    let insert = concat!(
        "INSERT INTO receipt_parked (",
        columns!(),
        ", since) SELECT *, $15::timestamptz FROM unnest($1::integer[], $2::integer[], $3::uuid[], $4::uuid[], \
         $5::bigint[], $6::timestamptz[], $7::timestamptz[], $8::bigint[], $9::integer[], $10::smallint[], \
         $11::text[], $12::text[], $13::text[], $14::text[])"
    );
    let insert = transaction.prepare_cached(insert).await?;
    let since = values::time(at);
    let mut parameters = columns.after(&sources, &destinations);
    parameters.push(&since);
    transaction.execute(&insert, &parameters).await?;
    Ok(())
}

/// Moves parked receipts back into the inbox whose numbers the query finds. `lock` says what happens to rows that
/// another has locked: a recorder waits for them, or a receipt that becomes an orphan at that moment would stay one; the
/// sweeper skips them and comes again.
macro_rules! return_sql {
    ($lock:literal, $numbers:literal) => {
        concat!(
            "WITH picked AS (SELECT number FROM receipt_parked WHERE number = ANY (ARRAY(",
            $numbers,
            ")) ORDER BY number ",
            $lock,
            "), \
             back AS (DELETE FROM receipt_parked WHERE number = ANY (ARRAY(SELECT number FROM picked)) RETURNING number, ",
            $crate::ledger::waiting::columns!(),
            "), \
             numbered AS (SELECT *, (row_number() OVER (PARTITION BY source, destination ORDER BY number) - 1) / 500 AS chunk \
                            FROM back), \
             put AS (INSERT INTO receipt_inbox (",
            $crate::ledger::waiting::columns!(),
            ") SELECT source, destination, array_agg(event), array_agg(file), array_agg(row), array_agg(at), \
                      array_agg(sent_at), array_agg(price), array_agg(bytes), array_agg(state), array_agg(provider_id), \
                      array_agg(status), array_agg(carrier), array_agg(response) \
                 FROM numbered GROUP BY source, destination, chunk) \
             SELECT count(*) FROM back"
        )
    };
}
pub(super) use return_sql;

/// Puts what is parked for these messages back into the inbox. It costs next to nothing while nothing is parked.
pub(super) async fn return_by_message(
    transaction: &Transaction<'_>,
    places: impl Iterator<Item = (FileId, i64, i32)>,
) -> Result<(), Failure> {
    let (mut files, mut rows, mut destinations) = (Vec::new(), Vec::new(), Vec::new());
    for (file, row, destination) in places {
        files.push(values::file(file));
        rows.push(row);
        destinations.push(destination);
    }
    // OFFSET: a look into the index per key, whatever the statistics say.
    let sql = return_sql!(
        "FOR UPDATE",
        "SELECT p.number FROM unnest($1::uuid[], $2::bigint[], $3::integer[]) AS k (file, row, destination), \
                LATERAL (SELECT number FROM receipt_parked \
                          WHERE file = k.file AND row = k.row AND destination = k.destination OFFSET 0) p \
          WHERE EXISTS (SELECT FROM receipt_parked)"
    );
    let statement = transaction.prepare_cached(sql).await?;
    transaction.query(&statement, &[&files, &rows, &destinations]).await?;
    Ok(())
}

/// The same by the ids of the destinations.
pub(super) async fn return_by_provider_id(
    transaction: &Transaction<'_>,
    ids: impl Iterator<Item = (i32, &str)>,
) -> Result<(), Failure> {
    let (destinations, ids): (Vec<_>, Vec<_>) =
        ids.map(|(destination, id)| (destination, values::text(id))).unzip();
    if ids.is_empty() {
        return Ok(());
    }
    let sql = return_sql!(
        "FOR UPDATE",
        "SELECT p.number FROM unnest($1::integer[], $2::text[]) AS k (destination, provider_id), \
                LATERAL (SELECT number FROM receipt_parked \
                          WHERE destination = k.destination AND provider_id = k.provider_id OFFSET 0) p \
          WHERE EXISTS (SELECT FROM receipt_parked)"
    );
    let statement = transaction.prepare_cached(sql).await?;
    transaction.query(&statement, &[&destinations, &ids]).await?;
    Ok(())
}
