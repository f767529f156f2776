//! Receipts between their arrival and their message: inbox and parked, orphans among these. The two tables have the
//! same columns, and a receipt moves from one to the other.

use std::time::SystemTime;

use deadpool_postgres::Transaction;
use postrider_actors::model::{
    call::FailureKind,
    ids::{FileId, MessageId},
    receipt::{EventId, Price, Receipt, ReceiptFacts, ReceiptKey},
    state::MessageState,
    time::UnixMs,
};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    error::Failure,
    values::{self, unix},
};

/// What a receipt is made of, in both tables. `number` comes beside it.
macro_rules! columns {
    () => {
        "event, file, row, at, sent_at, price, source, destination, bytes, state, provider_id, status, carrier, response"
    };
}
pub(super) use columns;

/// The columns of [`columns!`] as the parameters from `$2` on; `$1` is the source (`take`) or the numbers (`park`).
pub(super) struct Columns<'a> {
    pub(super) events: Vec<Uuid>,
    pub(super) files: Vec<Option<Uuid>>,
    pub(super) rows: Vec<Option<i64>>,
    pub(super) ats: Vec<Option<SystemTime>>,
    pub(super) sent_ats: Vec<Option<SystemTime>>,
    pub(super) prices: Vec<Option<i64>>,
    pub(super) bytes: Vec<i32>,
    pub(super) states: Vec<i16>,
    pub(super) provider_ids: Vec<Option<std::borrow::Cow<'a, str>>>,
    pub(super) statuses: Vec<Option<std::borrow::Cow<'a, str>>>,
    pub(super) carriers: Vec<Option<std::borrow::Cow<'a, str>>>,
    pub(super) responses: Vec<Option<std::borrow::Cow<'a, str>>>,
}

impl<'a> Columns<'a> {
    pub(super) fn of(receipts: &[&'a Receipt]) -> Self {
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
}

/// A receipt in one of the two.
pub(super) struct WaitingReceipt {
    pub(super) number: i64,
    pub(super) source: i32,
    pub(super) destination: i32,
    pub(super) receipt: Receipt,
}

impl WaitingReceipt {
    /// From a row with `number` and the [`columns!`], by their names.
    pub(super) fn read(row: &Row) -> Result<Self, Failure> {
        let key = match (row.get::<_, Option<Uuid>>("file"), row.get::<_, Option<&str>>("provider_id")) {
            (Some(file), _) => ReceiptKey::Message(MessageId {
                file: FileId(file.into_bytes()),
                row: row.get::<_, Option<i64>>("row").unwrap_or(0).cast_unsigned(),
            }),
            (None, id) => ReceiptKey::Provider(id.unwrap_or_default().into()),
        };
        let text = |column: &str| row.get::<_, Option<&str>>(column).map(Box::from);
        let time = |column: &str| row.get::<_, Option<SystemTime>>(column).map(unix);
        let facts = ReceiptFacts {
            status: text("status"),
            carrier: text("carrier"),
            response: text("response"),
            sent_at: time("sent_at"),
            price: row.get::<_, Option<i64>>("price").map(Price),
        };
        let event = EventId(row.get::<_, Uuid>("event").into_bytes());
        let receipt = Receipt { event, key, state: state(row.get("state"))?, at: time("at"), facts };
        let (number, source, destination) = (row.get("number"), row.get("source"), row.get("destination"));
        Ok(Self { number, source, destination, receipt })
    }
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
    let c = Columns::of(&inner);
    let numbers: Vec<_> = receipts.iter().map(|waiting| waiting.number).collect();
    let sources: Vec<_> = receipts.iter().map(|waiting| waiting.source).collect();
    let destinations: Vec<_> = receipts.iter().map(|waiting| waiting.destination).collect();
    let insert = concat!(
        "INSERT INTO receipt_parked (number, ",
        columns!(),
        ", since) SELECT *, $16::timestamptz FROM unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::bigint[], \
         $5::timestamptz[], $6::timestamptz[], $7::bigint[], $8::integer[], $9::integer[], $10::integer[], \
         $11::smallint[], $12::text[], $13::text[], $14::text[], $15::text[])"
    );
    let insert = transaction.prepare_cached(insert).await?;
    transaction
        .execute(
            &insert,
            &[
                &numbers,
                &c.events,
                &c.files,
                &c.rows,
                &c.ats,
                &c.sent_ats,
                &c.prices,
                &sources,
                &destinations,
                &c.bytes,
                &c.states,
                &c.provider_ids,
                &c.statuses,
                &c.carriers,
                &c.responses,
                &values::time(at),
            ],
        )
        .await?;
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
             back AS (DELETE FROM receipt_parked WHERE number = ANY (ARRAY(SELECT number FROM picked)) RETURNING ",
            $crate::ledger::waiting::columns!(),
            ") INSERT INTO receipt_inbox (",
            $crate::ledger::waiting::columns!(),
            ") SELECT ",
            $crate::ledger::waiting::columns!(),
            " FROM back"
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
    transaction.execute(&statement, &[&files, &rows, &destinations]).await?;
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
    transaction.execute(&statement, &[&destinations, &ids]).await?;
    Ok(())
}
