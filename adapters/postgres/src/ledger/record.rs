//! Writing delivery's records into the rows of messages.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    iter,
    sync::Mutex,
};

use deadpool_postgres::Transaction;
use postrider_actors::model::{
    bisect::{Bisection, Narrowed, RefusedRow},
    call::FailureKind,
    ids::FileId,
    record::{MessageRecord, record_rank},
    time::UnixMs,
};
use tokio_postgres::types::ToSql;

use super::{
    Shared, connect,
    error::Failure,
    look_up::LockOrder,
    values::{self, Day},
    waiting,
};

/// Rows per statement; beyond a thousand it gets no faster (`benches/record_strategies.rs`).
const STATEMENT_ROWS: usize = 1000;

/// Rows per transaction: how much is held locked at once.
const TRANSACTION_ROWS: usize = 10 * STATEMENT_ROWS;

/// Files whose day is remembered.
const FILES_KNOWN_MAX: usize = 10_000;

/// In which partition files live, as far as it was asked lately. An entry may be out of date when retention has
/// removed the partition: then the database refuses the row, and all entries are forgotten.
#[derive(Default)]
pub(super) struct FilePartitions(Mutex<HashMap<FileId, Day>>);

impl FilePartitions {
    fn known(&self, wanted: &HashSet<FileId>) -> HashMap<FileId, Day> {
        let known = self.0.lock().expect("nobody panics while holding it");
        wanted.iter().filter_map(|file| Some((*file, *known.get(file)?))).collect()
    }

    fn learn(&self, days: impl IntoIterator<Item = (FileId, Day)>) {
        let mut known = self.0.lock().expect("nobody panics while holding it");
        if known.len() >= FILES_KNOWN_MAX {
            known.clear();
        }
        known.extend(days);
    }

    pub(super) fn forget(&self) {
        self.0.lock().expect("nobody panics while holding it").clear();
    }
}

macro_rules! is_greater {
    () => {
        "(excluded.recorded, excluded.accepted_at, excluded.attempts, excluded.recorded_at) \
         > (m.recorded, m.accepted_at, m.attempts, m.recorded_at)"
    };
}
macro_rules! greater {
    ($($column:literal),*) => {
        concat!($($column, " = CASE WHEN ", is_greater!(), " THEN excluded.", $column, " ELSE m.", $column, " END, "),*)
    };
}

/// The rows' order is the order in which everybody locks them. `greatest` is the merge of states (I7), `least` the
/// choice among provider ids; all other columns are those of the greater record, by `record_rank`.
const UPSERT: &str = concat!(
    "
INSERT INTO messages AS m (day, file, row, destination, recipient, state, recorded, attempts, status, reason, detail,
                           provider_id, accepted_at, recorded_at, updated_at)
SELECT day, file, row, destination, recipient, state, state, attempts, status, reason, detail,
       provider_id, accepted_at, recorded_at, recorded_at
  FROM unnest($1::date[], $2::uuid[], $3::bigint[], $4::integer[], $5::text[], $6::smallint[], $7::integer[],
              $8::smallint[], $9::smallint[], $10::text[], $11::text[], $12::timestamptz[], $13::timestamptz[])
       AS r (day, file, row, destination, recipient, state, attempts, status, reason, detail,
             provider_id, accepted_at, recorded_at)
    ON CONFLICT (day, file, row, destination) DO UPDATE SET ",
    greater!("recorded", "attempts", "status", "reason", "detail", "accepted_at", "recorded_at"),
    "sweep = CASE WHEN ",
    is_greater!(),
    " THEN 0 ELSE m.sweep END,
     state = greatest(m.state, excluded.state),
     provider_id = least(m.provider_id, excluded.provider_id),
     updated_at = greatest(m.updated_at, excluded.updated_at)
 WHERE ",
    is_greater!(),
    " OR least(m.provider_id, excluded.provider_id) IS DISTINCT FROM m.provider_id"
);

/// A row to write, and its place.
type PlacedRecord<'a> = (LockOrder, Cow<'a, MessageRecord>);

/// Rows that were left out, by the code that they were refused with.
pub(super) type Unwritable = BTreeMap<Box<str>, usize>;

impl Shared {
    /// Writes all records that the database takes. One that it refuses is written without its texts, or left out if
    /// even that is refused: no row keeps others waiting, nor a worker from its messages (F65, F66).
    pub(super) async fn record(&self, records: &[MessageRecord]) -> Result<Unwritable, Failure> {
        let mut unwritable = Unwritable::new();
        if records.is_empty() {
            return Ok(unwritable);
        }
        let days = self.days(records).await?;
        let ids = self
            .names
            .destination_ids(
                &self.connections,
                self.timeouts,
                records.iter().map(|record| &*record.destination),
            )
            .await?;
        let mut merged: BTreeMap<LockOrder, Cow<'_, MessageRecord>> = BTreeMap::new();
        for record in records {
            let place = (
                std::cmp::Reverse(days[&record.id.file]),
                record.id.file,
                values::row(record.id.row),
                ids[&*record.destination],
            );
            match merged.get_mut(&place) {
                Some(known) => merge(known, record),
                None => drop(merged.insert(place, Cow::Borrowed(record))),
            }
        }
        let mut merged: Vec<_> = merged.into_iter().collect();
        for step in merged.chunks_mut(TRANSACTION_ROWS) {
            let done = self.record_divided(step, &mut unwritable).await;
            if done.is_err() {
                self.files.forget();
            }
            done?;
        }
        Ok(unwritable)
    }

    /// Divides what is refused until single rows are left (S4.4).
    async fn record_divided(
        &self,
        rows: &mut [PlacedRecord<'_>],
        unwritable: &mut Unwritable,
    ) -> Result<(), Failure> {
        let mut bisection = Bisection::new(iter::once(0..rows.len()).collect(), false, false);
        let mut blamed = Vec::new();
        while let Some(next) = bisection.next() {
            let Err(failure) = self.record_step(&rows[next.rows]).await else {
                blamed.extend(bisection.written());
                continue;
            };
            let Some(refusal) = failure.as_refusal() else { return Err(failure) };
            match bisection.refused(refusal, 0.5) {
                Narrowed::Parts => {}
                Narrowed::Row(row) => blamed.push(row),
                Narrowed::Whole(_) => return Err(failure),
            }
        }
        let unproven = bisection.unproven();
        if blamed.is_empty() && !unproven.is_empty() {
            // A batch of one or two rows: without any, the statement shows whether it works as such.
            let mut held = self.connections.hold().await?;
            let transaction = connect::begin(self.timeouts, &mut held).await?;
            self.within(upsert(&transaction, &[])).await?;
        }
        for RefusedRow { row, refusal, .. } in blamed.into_iter().chain(unproven) {
            let (_, record) = &mut rows[row];
            tracing::error!(id = %record.id, destination = &*record.destination, code = &*refusal.code,
                "the ledger refuses a message's row; it is written without its texts");
            bare(record.to_mut(), &refusal.words);
            match self.record_step(&rows[row..=row]).await {
                Ok(()) => {}
                Err(failure) if failure.as_refusal().is_some() => {
                    let (_, record) = &rows[row];
                    tracing::error!(id = %record.id, destination = &*record.destination, code = &*refusal.code,
                        "the ledger refuses it even so: it has no row of this message");
                    *unwritable.entry(refusal.code).or_default() += 1;
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    async fn record_step(&self, rows: &[PlacedRecord<'_>]) -> Result<(), Failure> {
        let mut held = self.connections.hold().await?;
        let transaction = connect::begin(self.timeouts, &mut held).await?;
        self.within(async {
            hold_partitions(&transaction, rows).await?;
            for rows in rows.chunks(STATEMENT_ROWS) {
                upsert(&transaction, rows).await?;
                let places = rows.iter().map(|((_, file, row, destination), _)| (*file, *row, *destination));
                waiting::return_by_message(&transaction, places).await?;
                let named = rows.iter().filter_map(|((.., destination), record)| {
                    Some((*destination, record.provider_id.as_deref()?))
                });
                waiting::return_by_provider_id(&transaction, named).await?;
            }
            Ok(())
        })
        .await?;
        connect::commit(self.timeouts, transaction).await?;
        held.keep();
        Ok(())
    }

    /// The partitions of the records' files. What is new goes into the partition of the day of its first record.
    async fn days(&self, records: &[MessageRecord]) -> Result<HashMap<FileId, Day>, Failure> {
        let wanted: HashSet<_> = records.iter().map(|record| record.id.file).collect();
        let mut days = self.files.known(&wanted);
        let mut missing: BTreeMap<FileId, (UnixMs, &str)> = BTreeMap::new();
        for record in records.iter().filter(|record| !days.contains_key(&record.id.file)) {
            let first = missing.entry(record.id.file).or_insert((record.at, &record.feed));
            first.0 = first.0.min(record.at);
        }
        if missing.is_empty() {
            return Ok(days);
        }
        let held = self.connections.hold().await?;
        let missing: Vec<_> = missing.into_iter().collect();
        for some in missing.chunks(STATEMENT_ROWS) {
            let files: Vec<_> = some.iter().map(|(file, _)| values::file(*file)).collect();
            let new_days: Vec<_> = some.iter().map(|(_, (at, _))| Day::of(*at)).collect();
            let feeds: Vec<_> = some.iter().map(|(_, (_, feed))| values::text(feed)).collect();
            let found = self
                .within(async {
                    let client = held.client();
                    // In two statements: the second sees what others have added meanwhile.
                    let insert = "
                        INSERT INTO files (file, day, feed)
                        SELECT new.file, make_partition(new.day), new.feed
                          FROM unnest($1::uuid[], $2::date[], $3::text[]) AS new (file, day, feed)
                         WHERE NOT EXISTS (SELECT FROM files f WHERE f.file = new.file)
                            ON CONFLICT DO NOTHING";
                    let insert = client.prepare_cached(insert).await?;
                    client.execute(&insert, &[&files, &new_days, &feeds]).await?;
                    Ok(client.query("SELECT file, day FROM files WHERE file = ANY($1)", &[&files]).await?)
                })
                .await?;
            let found = found.iter().map(|row| {
                let file: uuid::Uuid = row.get(0);
                (FileId(file.into_bytes()), row.get::<_, Day>(1))
            });
            days.extend(found);
        }
        held.keep();
        if days.len() < wanted.len() {
            return Err(retired());
        }
        self.files.learn(days.iter().map(|(file, day)| (*file, *day)));
        Ok(days)
    }
}

fn retired() -> Failure {
    Failure::new(FailureKind::Unavailable, "a file was retired while it was recorded")
}

/// Keeps retention away from the rows' files and their partitions until the transaction ends: the files must be where
/// they were found, and partitions know when something was recorded in them, to the hour.
async fn hold_partitions(transaction: &Transaction<'_>, rows: &[PlacedRecord<'_>]) -> Result<(), Failure> {
    let places: BTreeMap<FileId, Day> = rows.iter().map(|((day, file, ..), _)| (*file, day.0)).collect();
    let (files, days): (Vec<_>, Vec<_>) =
        places.iter().map(|(file, day)| (values::file(*file), *day)).unzip();
    let lock = "SELECT 1 FROM files f JOIN unnest($1::uuid[], $2::date[]) AS k (file, day) USING (file, day) \
                 ORDER BY f.file FOR KEY SHARE OF f";
    let lock = transaction.prepare_cached(lock).await?;
    if transaction.execute(&lock, &[&files, &days]).await? < files.len() as u64 {
        return Err(retired());
    }
    let mut lasts: BTreeMap<Day, UnixMs> = BTreeMap::new();
    for ((day, ..), record) in rows {
        let last = lasts.entry(day.0).or_insert(record.at);
        *last = (*last).max(record.at);
    }
    let (days, lasts): (Vec<_>, Vec<_>) = lasts.into_iter().map(|(day, at)| (day, values::time(at))).unzip();
    let touch = "UPDATE partitions p SET last_recorded = k.at \
                   FROM (SELECT q.first_day, k.at FROM unnest($1::date[], $2::timestamptz[]) AS k (day, at) \
                           JOIN partitions q ON q.first_day = k.day AND q.last_recorded < k.at - interval '1 hour' \
                          ORDER BY q.first_day DESC FOR NO KEY UPDATE OF q) k \
                  WHERE p.first_day = k.first_day";
    let touch = transaction.prepare_cached(touch).await?;
    transaction.execute(&touch, &[&days, &lasts]).await?;
    Ok(())
}

/// A record without the texts that the database may have refused, and why.
fn bare(record: &mut MessageRecord, why: &str) {
    const WHY_BYTES_MAX: usize = 500;
    record.recipient = "".into();
    record.provider_id = None;
    let is_plain = |character: &char| character.is_ascii() && !character.is_ascii_control();
    let why: String = why.chars().filter(is_plain).take(WHY_BYTES_MAX).collect();
    record.detail = Some(format!("the ledger refused the row's texts: {why}").into());
}

/// Two records of one message, as the statement merges a record with a row.
fn merge(known: &mut Cow<'_, MessageRecord>, record: &MessageRecord) {
    let ids = iter::chain(&known.provider_id, &record.provider_id);
    let provider_id = ids.min().cloned();
    if record_rank(record) > record_rank(known) {
        *known = Cow::Owned(record.clone());
    }
    if known.provider_id != provider_id {
        known.to_mut().provider_id = provider_id;
    }
}

async fn upsert(transaction: &Transaction<'_>, rows: &[PlacedRecord<'_>]) -> Result<(), Failure> {
    let days: Vec<_> = rows.iter().map(|(place, _)| place.0.0).collect();
    let files: Vec<_> = rows.iter().map(|(place, _)| values::file(place.1)).collect();
    let numbers: Vec<_> = rows.iter().map(|(place, _)| place.2).collect();
    let destinations: Vec<_> = rows.iter().map(|(place, _)| place.3).collect();
    let records = || rows.iter().map(|(_, record)| &**record);
    let recipients: Vec<_> = records().map(|record| values::text(&record.recipient)).collect();
    let states: Vec<_> = records().map(|record| record.state as i16).collect();
    let attempts: Vec<_> =
        records().map(|record| i32::try_from(record.attempts).unwrap_or(i32::MAX)).collect();
    let statuses: Vec<_> = records().map(|record| i16::try_from(record.status).unwrap_or(i16::MAX)).collect();
    let reasons: Vec<_> = records().map(|record| record.reason.map(|reason| reason as i16)).collect();
    let details: Vec<_> = records().map(|record| values::texts(record.detail.as_deref())).collect();
    let provider_ids: Vec<_> = records().map(|record| values::texts(record.provider_id.as_deref())).collect();
    let accepted: Vec<_> = records().map(|record| values::time(record.accepted_at)).collect();
    let recorded: Vec<_> = records().map(|record| values::time(record.at)).collect();
    let columns: [&(dyn ToSql + Sync); 13] = [
        &days,
        &files,
        &numbers,
        &destinations,
        &recipients,
        &states,
        &attempts,
        &statuses,
        &reasons,
        &details,
        &provider_ids,
        &accepted,
        &recorded,
    ];
    let statement = transaction.prepare_cached(UPSERT).await?;
    transaction.execute(&statement, &columns).await?;
    Ok(())
}
