//! What every write shares: its transaction, the caches of interned names, and the counters that are
//! changed once per transaction however many messages it settles.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use postrider_actors::{
    model::{
        batch::{BatchHeader, NewBatch, PayloadError},
        fairness::LeaseTurns,
        file::FileState,
        ledger::CountChange,
        priority::Priority,
        time::UnixMs,
    },
    ports::StoreError,
};
use rusqlite::{Connection, ErrorCode, OptionalExtension, params};

use postrider_actors::model::codec;

use super::receipts::fresh::FreshEvents;

/// Why an operation inside a transaction failed; the transaction is rolled back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TxError {
    /// SQLite said no.
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    /// The request breaks a rule; repeating it won't help.
    #[error("{0}")]
    Refused(String),
    /// What is stored can't be read.
    #[error(transparent)]
    Damaged(#[from] codec::Damaged),
    /// A stored payload can't be read.
    #[error(transparent)]
    Payload(#[from] PayloadError),
    /// A stored header can't be read.
    #[error("a stored batch header is damaged: {0}")]
    Header(#[from] serde_json::Error),
    /// What is stored is not what was written.
    #[error("the stored {0} does not match its checksum")]
    Altered(&'static str),
}

impl TxError {
    /// Whether the disk or the database can't be trusted any more, so that the process must end.
    pub(crate) fn is_fatal(&self) -> bool {
        let Self::Sqlite(error) = self else { return false };
        matches!(
            error.sqlite_error_code(),
            Some(ErrorCode::SystemIoFailure | ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
        )
    }

    /// Whether it is about what one batch has stored, and about nothing else.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged(_) | Self::Payload(_) | Self::Header(_) | Self::Altered(_))
    }

    /// The error for the caller of a port.
    pub(crate) fn to_store_error(&self) -> StoreError {
        let text = self.to_string();
        let Self::Sqlite(error) = self else { return StoreError::Permanent(text) };
        match error.sqlite_error_code() {
            Some(
                ErrorCode::DiskFull
                | ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked
                | ErrorCode::OutOfMemory
                | ErrorCode::CannotOpen
                | ErrorCode::OperationInterrupted,
            ) => StoreError::Retryable(text),
            _ => StoreError::Permanent(text),
        }
    }
}

/// What finds a bit that flipped on the disk (F61).
pub(crate) fn sum(bytes: &[u8]) -> i64 {
    crc32fast::hash(bytes).into()
}

/// Fails if `bytes` are not those that `stored` was made of.
pub(crate) fn check_sum(what: &'static str, bytes: &[u8], stored: i64) -> Result<(), TxError> {
    if sum(bytes) == stored { Ok(()) } else { Err(TxError::Altered(what)) }
}

/// A whole number as SQLite has it. Nothing that is counted here comes near the end.
pub(crate) fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Reads back what [`int`] stored.
pub(crate) fn uint(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

pub(crate) fn priority(byte: u8) -> Result<Priority, TxError> {
    let newer = || TxError::Refused(format!("priority {byte} was written by a newer version"));
    Priority::from_byte(byte).ok_or_else(newer)
}

pub(crate) fn file_state_byte(state: &FileState) -> i64 {
    match state {
        FileState::Ingesting => 0,
        FileState::Ingested => 1,
        FileState::Failed(_) => 2,
        FileState::SourceLost(_) => 3,
    }
}

pub(crate) fn file_state(byte: i64, reason: Option<String>) -> Result<FileState, TxError> {
    Ok(match byte {
        0 => FileState::Ingesting,
        1 => FileState::Ingested,
        2 => FileState::Failed(reason.unwrap_or_default()),
        3 => FileState::SourceLost(reason.unwrap_or_default()),
        _ => return Err(TxError::Refused(format!("file state {byte} was written by a newer version"))),
    })
}

/// Entries per cache; a full one is emptied. Enough for every file in flight.
const CACHE_ENTRIES_MAX: usize = 512;

/// What a connection remembers and can do without: names and headers that were met lately, by the numbers they are
/// stored as, and how its leases were shared.
#[derive(Default)]
pub(crate) struct Caches {
    destinations: HashMap<String, i64>,
    destination_names: HashMap<i64, Arc<str>>,
    header_numbers: HashMap<Arc<BatchHeader>, i64>,
    headers: HashMap<i64, Arc<BatchHeader>>,
    turns: HashMap<i64, DestinationTurns>,
    /// Of the ledger of rows.
    pub(crate) events: FreshEvents,
    /// Whether there is a ledger of rows.
    pub(crate) is_wide: bool,
}

/// How a destination's leases were shared between retries and first attempts, and between files, by their numbers.
#[derive(Default)]
pub(crate) struct DestinationTurns {
    pub(crate) turns: LeaseTurns<i64>,
    pub(crate) looked: Looked,
}

/// How far the files of which first attempts wait were looked at: where there are very many, not all of them at once.
#[derive(Default)]
pub(crate) struct Looked {
    /// The last one of a walk over all of them.
    pub(crate) until: i64,
    /// The last one that was there when the walk began, or that was looked at since: those beyond are new.
    pub(crate) newest: Option<i64>,
}

/// Memory for pages of the ledger of rows, in KiB: its indexes are met in random places, and a page that is not in memory
/// is read, and written before the commit, for each receipt of it.
const WIDE_CACHE_KIB: i64 = 32 << 10;

impl Caches {
    /// The name that destination `seq` was interned for.
    pub(crate) fn destination_name(
        &mut self,
        connection: &Connection,
        seq: i64,
    ) -> Result<Arc<str>, TxError> {
        if let Some(name) = self.destination_names.get(&seq) {
            return Ok(name.clone());
        }
        let name: String = connection
            .prepare_cached("SELECT name FROM destinations WHERE seq = ?1")?
            .query_row([seq], |row| row.get(0))?;
        let name: Arc<str> = name.into();
        bounded(&mut self.destination_names).insert(seq, name.clone());
        Ok(name)
    }

    /// The header that was interned as `seq`.
    pub(crate) fn header(&mut self, connection: &Connection, seq: i64) -> Result<Arc<BatchHeader>, TxError> {
        if let Some(header) = self.headers.get(&seq) {
            return Ok(header.clone());
        }
        let (json, stored): (Vec<u8>, i64) = connection
            .prepare_cached("SELECT CAST(json AS BLOB), sum FROM headers WHERE seq = ?1")?
            .query_row([seq], |row| Ok((row.get(0)?, row.get(1)?)))?;
        check_sum("header", &json, stored)?;
        let header: Arc<BatchHeader> = Arc::new(serde_json::from_slice(&json)?);
        bounded(&mut self.headers).insert(seq, header.clone());
        Ok(header)
    }

    /// How a destination's leases were shared.
    pub(crate) fn turns(&mut self, destination: i64) -> &mut DestinationTurns {
        if !self.turns.contains_key(&destination) {
            bounded(&mut self.turns);
        }
        self.turns.entry(destination).or_default()
    }
}

fn bounded<K, V>(cache: &mut HashMap<K, V>) -> &mut HashMap<K, V> {
    if cache.len() >= CACHE_ENTRIES_MAX {
        cache.clear();
    }
    cache
}

/// A write transaction at work.
pub(crate) struct Tx<'a> {
    pub(crate) connection: &'a Connection,
    pub(crate) caches: &'a mut Caches,
    counts: BTreeMap<(i64, i64), CountChange>,
    /// Files whose settledness may have changed, and when the last fact about them came.
    files: BTreeMap<i64, UnixMs>,
}

impl<'a> Tx<'a> {
    /// For a transaction that was just begun on `connection`.
    pub(crate) fn new(connection: &'a Connection, caches: &'a mut Caches) -> Self {
        Self { connection, caches, counts: BTreeMap::new(), files: BTreeMap::new() }
    }

    /// Lets SQLite keep more pages in memory from now on. Who has no ledger of rows needs none of it (I8).
    pub(crate) fn widen_cache(&mut self) -> Result<(), TxError> {
        if !self.caches.is_wide {
            self.connection.pragma_update(None, "cache_size", -WIDE_CACHE_KIB)?;
            self.caches.is_wide = true;
        }
        Ok(())
    }

    /// The counts of `file` at `destination`, to be changed by what the caller adds.
    pub(crate) fn count(&mut self, file: i64, destination: i64) -> &mut CountChange {
        self.counts.entry((file, destination)).or_default()
    }

    /// Says that `file` changed at `at`.
    pub(crate) fn touch(&mut self, file: i64, at: UnixMs) {
        let last = self.files.entry(file).or_insert(at);
        *last = (*last).max(at);
    }

    /// Writes the counters. Called once, before the commit.
    pub(crate) fn flush(&mut self) -> Result<(), TxError> {
        let mut open: BTreeMap<i64, i64> = BTreeMap::new();
        for ((file, destination), change) in std::mem::take(&mut self.counts) {
            if change.is_zero() {
                continue;
            }
            *open.entry(destination).or_default() += change.depth();
            let CountChange { accepted, sent, dead, retrying, unsent, cancelled } = change;
            let changed = self
                .connection
                .prepare_cached(
                    "UPDATE file_destinations SET accepted = accepted + ?3, sent = sent + ?4, dead = dead + ?5,
                         retrying = retrying + ?6, unsent = unsent + ?7, cancelled = cancelled + ?8
                     WHERE file = ?1 AND destination = ?2",
                )?
                .execute([file, destination, accepted, sent, dead, retrying, unsent, cancelled])?;
            if changed != 1 {
                return Err(TxError::Refused(format!(
                    "file {file} was not accepted for destination {destination}, yet has a batch for it"
                )));
            }
        }
        for (destination, messages) in open.into_iter().filter(|(_, messages)| *messages != 0) {
            self.connection
                .prepare_cached("UPDATE destinations SET open = open + ?2 WHERE seq = ?1")?
                .execute([destination, messages])?;
        }
        for (file, at) in std::mem::take(&mut self.files) {
            self.settle_file(file, at)?;
        }
        Ok(())
    }

    /// Keeps `settled_at` true, and has a report that is out of date written again.
    fn settle_file(&self, file: i64, at: UnixMs) -> Result<(), TxError> {
        let (settled, settled_at, reported): (bool, Option<i64>, bool) = self
            .connection
            .prepare_cached(
                "SELECT state <> 0 AND NOT EXISTS (SELECT 1 FROM file_destinations
                     WHERE file = ?1 AND sent + dead + unsent + cancelled < accepted), settled_at, reported
                 FROM files WHERE seq = ?1",
            )?
            .query_row([file], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        let now_settled_at = settled.then(|| settled_at.unwrap_or(int(at.0)));
        if now_settled_at != settled_at || reported {
            self.connection
                .prepare_cached("UPDATE files SET settled_at = ?2, reported = 0 WHERE seq = ?1")?
                .execute(params![file, now_settled_at])?;
        }
        Ok(())
    }

    /// The number of a destination's name, which is interned.
    pub(crate) fn destination(&mut self, name: &str) -> Result<i64, TxError> {
        if let Some(&seq) = self.caches.destinations.get(name) {
            return Ok(seq);
        }
        let found = self
            .connection
            .prepare_cached("SELECT seq FROM destinations WHERE name = ?1")?
            .query_row([name], |row| row.get(0))
            .optional()?;
        let seq = match found {
            Some(seq) => seq,
            None => self
                .connection
                .prepare_cached("INSERT INTO destinations (name) VALUES (?1)")?
                .insert([name])?,
        };
        bounded(&mut self.caches.destinations).insert(name.to_owned(), seq);
        Ok(seq)
    }

    /// The number of a header, which is interned.
    pub(crate) fn header_number(
        &mut self,
        header: &Arc<BatchHeader>,
        file: i64,
        destination: i64,
    ) -> Result<i64, TxError> {
        if let Some(&seq) = self.caches.header_numbers.get(header) {
            return Ok(seq);
        }
        let json = serde_json::to_string(&**header)?;
        let found = self
            .connection
            .prepare_cached("SELECT seq FROM headers WHERE file = ?1 AND destination = ?2 AND json = ?3")?
            .query_row(params![file, destination, json], |row| row.get(0))
            .optional()?;
        let seq = match found {
            Some(seq) => seq,
            None => self
                .connection
                .prepare_cached("INSERT INTO headers (file, destination, json, sum) VALUES (?1, ?2, ?3, ?4)")?
                .insert(params![file, destination, json, sum(json.as_bytes())])?,
        };
        bounded(&mut self.caches.header_numbers).insert(header.clone(), seq);
        Ok(seq)
    }

    /// Stores a payload and returns its number.
    pub(crate) fn insert_payload(&self, payload: &[u8]) -> Result<i64, TxError> {
        let insert = "INSERT INTO payloads (body, sum) VALUES (?1, ?2)";
        Ok(self.connection.prepare_cached(insert)?.insert(params![payload, sum(payload)])?)
    }

    /// Stores a batch, whose id must be new.
    pub(crate) fn insert_batch(
        &mut self,
        batch: &NewBatch,
        file: i64,
        destination: i64,
        payload: i64,
        gaps: Option<&[u8]>,
    ) -> Result<(), TxError> {
        let header = self.header_number(&batch.header, file, destination)?;
        // Of a new record: due when the batch may be delivered, no retry, held by nobody.
        self.connection
            .prepare_cached(
                "INSERT INTO batches (id, file, destination, header, payload, first_row, count, gaps, accepted_at,
                     not_before, due)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?10)",
            )?
            .execute(params![
                batch.id.0,
                file,
                destination,
                header,
                payload,
                int(batch.first_row),
                batch.count,
                gaps,
                int(batch.accepted_at.0),
                int(batch.not_before.0),
            ])?;
        Ok(())
    }
}
