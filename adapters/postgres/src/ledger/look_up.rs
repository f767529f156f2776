//! Finding the rows that receipts are about, by the ids that they name.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    time::SystemTime,
};

use deadpool_postgres::Transaction;
use postrider_actors::model::{
    ids::FileId,
    receipt::{EventId, ReceiptKey, ReceiptStanding, ReportedStates},
    time::UnixMs,
};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    error::Failure,
    values::{self, Day, Tid, Xid, unix},
    waiting::{WaitingReceipt, state},
};

/// The order in which everybody locks rows: the latest partition first.
pub(super) type LockOrder = (Reverse<Day>, FileId, i64, i32);

/// What keeps rows from changing between read and write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Locking {
    /// Nothing: the write notices.
    Optimistic,
    /// A lock, taken in [`LockOrder`] (F50).
    Pessimistic,
}

/// A row as it was read. A row whose `tid` has another `xmin` was written since.
pub(super) struct SeenRow {
    pub(super) tid: Tid,
    pub(super) xmin: Xid,
    pub(super) provider_id: Option<String>,
    pub(super) standing: ReceiptStanding,
}

/// What a [`SeenRow`] is read from.
macro_rules! found {
    () => {
        "m.ctid AS tid, m.xmin AS xid, m.provider_id, m.state, m.reported, m.receipt_state, m.receipt_at, m.receipt_event"
    };
}

impl SeenRow {
    /// From the columns of [`found!`], which begin at `first`.
    fn read(row: &Row, first: usize) -> Result<Self, Failure> {
        let reported = ReportedStates(u8::try_from(row.get::<_, i16>(first + 4)).unwrap_or(0));
        let greatest = match row.get::<_, Option<i16>>(first + 5) {
            Some(number) => Some((
                state(number)?,
                row.get::<_, Option<SystemTime>>(first + 6).map_or(UnixMs(0), unix),
                EventId(row.get::<_, Uuid>(first + 7).into_bytes()),
            )),
            None => None,
        };
        Ok(Self {
            tid: row.get(first),
            xmin: row.get(first + 1),
            provider_id: row.get(first + 2),
            standing: ReceiptStanding::new(state(row.get(first + 3))?, reported, greatest),
        })
    }
}

/// The messages of provider ids, in the partitions of `$3` to before `$4`: of several the latest, for a provider that
/// uses an id again means the newer one, and a receipt is about one message. Ordinality counts from 1.
///
/// OFFSET keeps the inner query as it is: a look into the index per id. A table that was never analyzed (a new
/// partition in its first minute) looks as if another plan were cheap, and that one takes minutes.
const BY_PROVIDER_ID: &str = concat!(
    "SELECT k.n, l.* FROM unnest($2::text[]) WITH ORDINALITY AS k (provider_id, n),
            LATERAL (SELECT * FROM (SELECT m.day, m.file, m.row, m.accepted_at, ",
    found!(),
    "                 FROM messages m
                       WHERE m.destination = $1 AND m.provider_id = k.provider_id AND m.day >= $3 AND m.day < $4
                      OFFSET 0) c
                      ORDER BY day DESC, accepted_at DESC, file DESC, row DESC LIMIT 1) l"
);

/// The rows of places in the partition of `$1`, in the order in which they are given.
macro_rules! by_place {
    ($lock:literal) => {
        concat!(
            "SELECT k.n, l.*
               FROM unnest($2::uuid[], $3::bigint[], $4::integer[]) WITH ORDINALITY AS k (file, row, destination, n),
                    LATERAL (SELECT ",
            found!(),
            "                  FROM messages m
                              WHERE m.day = $1 AND m.file = k.file AND m.row = k.row AND m.destination = k.destination
                             OFFSET 0 ",
            $lock,
            ") l"
        )
    };
}
const BY_PLACE: &str = by_place!("");
const BY_PLACE_LOCKED: &str = by_place!("FOR NO KEY UPDATE");

/// The rows that there are of those that receipts name, and which of them each receipt names, if any.
pub(super) async fn look_up(
    transaction: &Transaction<'_>,
    waiting: &[WaitingReceipt],
    locking: Locking,
) -> Result<(BTreeMap<LockOrder, SeenRow>, Vec<Option<LockOrder>>), Failure> {
    let mut rows = BTreeMap::new();
    let named = by_provider_id(transaction, waiting, &mut rows).await?;
    let days = days(transaction, waiting).await?;
    let mut places: Vec<_> = waiting
        .iter()
        .map(|waiting| match &waiting.receipt.key {
            ReceiptKey::Message(id) => {
                let day = days.get(&id.file)?;
                Some((Reverse(*day), id.file, values::row(id.row), waiting.destination))
            }
            ReceiptKey::Provider(id) => named.get(&(waiting.destination, &**id)).copied(),
        })
        .collect();
    let mut wanted: BTreeSet<LockOrder> = places.iter().flatten().copied().collect();
    match locking {
        Locking::Optimistic => wanted.retain(|place| !rows.contains_key(place)),
        Locking::Pessimistic => rows.clear(),
    }
    by_place(transaction, &wanted, locking, &mut rows).await?;
    for place in &mut places {
        place.take_if(|place| !rows.contains_key(place));
    }
    Ok((rows, places))
}

/// Reads the rows that provider ids name into `rows`; which id names which.
///
/// Most receipts are about what was sent in the latest two partitions: only what is not there is looked for in all
/// others, so that their number does not matter.
async fn by_provider_id<'a>(
    transaction: &Transaction<'_>,
    waiting: &'a [WaitingReceipt],
    rows: &mut BTreeMap<LockOrder, SeenRow>,
) -> Result<HashMap<(i32, &'a str), LockOrder>, Failure> {
    let mut ids: BTreeMap<i32, BTreeSet<&str>> = BTreeMap::new();
    for WaitingReceipt { destination, receipt, .. } in waiting {
        if let ReceiptKey::Provider(id) = &receipt.key {
            ids.entry(*destination).or_default().insert(id);
        }
    }
    let mut named = HashMap::new();
    if ids.is_empty() {
        return Ok(named);
    }
    let latest =
        "SELECT first_day FROM partitions WHERE first_day <= current_date ORDER BY first_day DESC LIMIT 2";
    let latest = transaction.query(&transaction.prepare_cached(latest).await?, &[]).await?;
    let mut bounds = vec![Day::LATEST];
    bounds.extend(latest.iter().map(|row| row.get::<_, Day>(0)));
    bounds.push(Day::EARLIEST);
    let statement = transaction.prepare_cached(BY_PROVIDER_ID).await?;
    for (destination, ids) in ids {
        let mut missing: Vec<_> = ids.into_iter().collect();
        for pair in bounds.windows(2) {
            let (before, from) = (pair[0], pair[1]);
            for row in transaction.query(&statement, &[&destination, &missing, &from, &before]).await? {
                let place = (Reverse(row.get(1)), file(&row, 2), row.get(3), destination);
                named.insert((destination, missing[index(&row)]), place);
                rows.insert(place, SeenRow::read(&row, 5)?);
            }
            missing.retain(|id| !named.contains_key(&(destination, *id)));
            if missing.is_empty() {
                break;
            }
        }
    }
    Ok(named)
}

/// The partitions of the files that receipts name.
async fn days(
    transaction: &Transaction<'_>,
    waiting: &[WaitingReceipt],
) -> Result<HashMap<FileId, Day>, Failure> {
    let files: BTreeSet<_> = waiting
        .iter()
        .filter_map(|waiting| match waiting.receipt.key {
            ReceiptKey::Message(id) => Some(id.file),
            ReceiptKey::Provider(_) => None,
        })
        .collect();
    if files.is_empty() {
        return Ok(HashMap::new());
    }
    let files: Vec<_> = files.into_iter().map(values::file).collect();
    let query = transaction.prepare_cached("SELECT file, day FROM files WHERE file = ANY($1)").await?;
    let rows = transaction.query(&query, &[&files]).await?;
    Ok(rows.iter().map(|row| (file(row, 0), row.get(1))).collect())
}

async fn by_place(
    transaction: &Transaction<'_>,
    places: &BTreeSet<LockOrder>,
    locking: Locking,
    rows: &mut BTreeMap<LockOrder, SeenRow>,
) -> Result<(), Failure> {
    let places: Vec<_> = places.iter().copied().collect();
    let sql = match locking {
        Locking::Optimistic => BY_PLACE,
        Locking::Pessimistic => BY_PLACE_LOCKED,
    };
    for places in places.chunk_by(|a, b| a.0 == b.0) {
        let files: Vec<_> = places.iter().map(|place| values::file(place.1)).collect();
        let numbers: Vec<_> = places.iter().map(|place| place.2).collect();
        let destinations: Vec<_> = places.iter().map(|place| place.3).collect();
        let statement = transaction.prepare_cached(sql).await?;
        let Reverse(day) = places[0].0;
        for row in transaction.query(&statement, &[&day, &files, &numbers, &destinations]).await? {
            rows.insert(places[index(&row)], SeenRow::read(&row, 1)?);
        }
    }
    Ok(())
}

/// Of an ordinality, which counts from 1.
fn index(row: &Row) -> usize {
    row.get::<_, i64>(0) as usize - 1
}

fn file(row: &Row, column: usize) -> FileId {
    FileId(row.get::<_, Uuid>(column).into_bytes())
}
