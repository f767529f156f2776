//! What an operator's commands read, with or without a running daemon. Every query is a
//! snapshot of its own and bounded, so that a slow reader does not keep the log from being reused.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use postrider_actors::{
    model::{
        file::{DestinationCounts, FileReport, Reject},
        ids::{FileId, MessageId},
        time::UnixMs,
    },
    ports::StoreError,
};
use rusqlite::{Connection, params};

use postrider_actors::ports::console::{
    AuditLine, DeadFilter, DeadLetter, DestinationView, FileSelector, FileTotals, FilesAt, FilesCount,
    MessageReport, Position, Search, View,
};

use super::{
    archive::KeptPlace,
    audit, holds, limits, messages,
    open::{self, Access, OpenError},
    redrive::{self, RedriveCursor},
    reports,
    tx::{Caches, TxError, int, uint},
};

/// An operator's view of the store, which must be there already.
pub struct Viewer {
    connection: Connection,
    caches: Caches,
}

impl Viewer {
    /// Opens the store in `state_dir`; changes nothing.
    pub fn open(state_dir: &Path) -> Result<Self, OpenError> {
        Ok(Self { connection: open::open(state_dir, Access::Read)?, caches: Caches::default() })
    }

    fn search_some(
        &mut self,
        search: &mut Search,
        recipient: &str,
        file: Option<FileId>,
        batches: usize,
        limit: usize,
    ) -> Result<bool, TxError> {
        let KeptPlace { payload: mut last_payload, batch: mut last_batch } = read_position(&search.position)?;
        let finder = memchr::memmem::Finder::new(recipient.as_bytes());
        let mut select = self.connection.prepare_cached(
            "SELECT b.seq, b.payload, b.header, p.body
             FROM batches b INDEXED BY batches_kept JOIN payloads p ON p.seq = b.payload
             WHERE b.payload IS NOT NULL AND (b.payload, b.seq) > (?1, ?2)
                 AND (?3 IS NULL OR b.file = (SELECT seq FROM files WHERE id = ?3))
             ORDER BY b.payload, b.seq LIMIT ?4",
        )?;
        let file = file.map(|file| file.0);
        let mut rows = select.query(params![last_payload, last_batch, file, int(batches as u64)])?;
        let mut looked_at = 0;
        while let Some(row) = rows.next()? {
            if search.found.len() >= limit {
                return Ok(false);
            }
            last_batch = row.get(0)?;
            search.batches += 1;
            looked_at += 1;
            // The batches that share a payload are neighbours.
            let payload: i64 = row.get(1)?;
            if std::mem::replace(&mut last_payload, payload) == payload {
                continue;
            }
            let body = row.get_ref(3)?.as_blob().map_err(rusqlite::Error::from)?;
            let header = self.caches.header(&self.connection, row.get(2)?)?;
            search.look_through(&finder, &header, &Bytes::copy_from_slice(body), limit)?;
        }
        search.position = Position(format!("{last_payload}.{last_batch}"));
        Ok(looked_at == batches && search.found.len() < limit)
    }
}

impl View for Viewer {
    fn files(
        &mut self,
        selector: Option<&FileSelector>,
        limit: usize,
    ) -> Result<Vec<FileReport>, StoreError> {
        let found = match selector {
            None => reports::list(&self.connection, None, limit),
            Some(FileSelector::Name(name)) => reports::list(&self.connection, Some(name), limit),
            Some(FileSelector::Id(id)) => {
                reports::report(&self.connection, *id).map(|report| report.into_iter().collect())
            }
        };
        answer(found)
    }

    fn count_files(&mut self, of: &FilesAt) -> Result<FilesCount, StoreError> {
        answer(holds::count(&self.connection, of))
    }

    fn file_totals(&mut self) -> Result<FileTotals, StoreError> {
        let totals = self.connection.query_row(
            "SELECT coalesce(sum(state = 0), 0), coalesce(sum(state <> 0 AND settled_at IS NULL), 0),
                 coalesce(sum(settled_at IS NOT NULL), 0), coalesce(sum(state >= 2), 0) FROM files",
            [],
            |row| {
                Ok(FileTotals {
                    ingesting: uint(row.get(0)?),
                    open: uint(row.get(1)?),
                    settled: uint(row.get(2)?),
                    failed: uint(row.get(3)?),
                })
            },
        );
        answer(totals.map_err(TxError::from))
    }

    fn depth(&mut self) -> Result<u64, StoreError> {
        answer(reports::open_messages(&self.connection).map(|open| open.values().sum()))
    }

    fn destinations(&mut self) -> Result<BTreeMap<String, DestinationView>, StoreError> {
        answer(destinations(&self.connection, now()))
    }

    fn dead(
        &mut self,
        filter: &DeadFilter,
        position: &Position,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        answer(
            RedriveCursor::read(position)
                .and_then(|place| redrive::select(&self.connection, filter, place, limit)),
        )
    }

    fn count_dead(&mut self, filter: &DeadFilter) -> Result<u64, StoreError> {
        answer(redrive::count(&self.connection, filter))
    }

    fn recipients(&mut self, letters: &[DeadLetter]) -> Result<Vec<String>, StoreError> {
        answer(messages::recipients(&self.connection, &mut self.caches, letters))
    }

    fn rejects(&mut self, file: FileId, after: u64, limit: usize) -> Result<Vec<Reject>, StoreError> {
        answer(reports::rejects(&self.connection, file, after, limit))
    }

    fn message(&mut self, id: MessageId) -> Result<Vec<MessageReport>, StoreError> {
        answer(messages::report(&self.connection, &mut self.caches, id))
    }

    fn audit(&mut self, limit: usize) -> Result<Vec<AuditLine>, StoreError> {
        answer(audit::lines(&self.connection, limit))
    }

    fn search(
        &mut self,
        search: &mut Search,
        recipient: &str,
        file: Option<FileId>,
        batches: usize,
        limit: usize,
    ) -> Result<bool, StoreError> {
        answer(self.search_some(search, recipient, file, batches, limit))
    }
}

/// How far a search came.
fn read_position(position: &Position) -> Result<KeptPlace, TxError> {
    if position.0.is_empty() {
        return Ok(KeptPlace::default());
    }
    let place = position.0.split_once('.').and_then(|(payload, batch)| {
        Some(KeptPlace { payload: payload.parse().ok()?, batch: batch.parse().ok()? })
    });
    place.ok_or_else(|| TxError::Refused(format!("{:?} is not a position of a search", position.0)))
}

fn answer<T>(result: Result<T, TxError>) -> Result<T, StoreError> {
    result.map_err(|error| error.to_store_error())
}

/// The wall clock, which due times go by.
fn now() -> UnixMs {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMs(u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

fn destinations(connection: &Connection, now: UnixMs) -> Result<BTreeMap<String, DestinationView>, TxError> {
    let mut views: BTreeMap<i64, (String, DestinationView)> = BTreeMap::new();
    let mut select = connection.prepare(
        "SELECT n.seq, n.name, n.disabled_at, n.disabled_reason, coalesce(sum(d.accepted), 0),
             coalesce(sum(d.sent), 0), coalesce(sum(d.dead), 0), coalesce(sum(d.retrying), 0),
             coalesce(sum(d.unsent), 0), coalesce(sum(d.cancelled), 0), n.rate_per_s, n.concurrency
         FROM destinations n LEFT JOIN file_destinations d ON d.destination = n.seq GROUP BY n.seq",
    )?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let disabled_at: Option<i64> = row.get(2)?;
        let reason: Option<String> = row.get(3)?;
        let view = DestinationView {
            disabled: disabled_at.map(|at| (UnixMs(uint(at)), reason.unwrap_or_default())),
            limits: limits::read(row, 10)?,
            counts: DestinationCounts {
                accepted: uint(row.get(4)?),
                sent: uint(row.get(5)?),
                dead: uint(row.get(6)?),
                retrying: uint(row.get(7)?),
                unsent: uint(row.get(8)?),
                cancelled: uint(row.get(9)?),
            },
            queued: Some(0),
            leased: Some(0),
            quarantined: Some(0),
            ..DestinationView::default()
        };
        views.insert(row.get(0)?, (row.get(1)?, view));
    }
    // Each query is answered by its partial index.
    let mut select = connection.prepare(
        "SELECT destination, sum(due > ?1), sum(due <= ?1), min(CASE WHEN due > ?1 THEN due END)
         FROM batches INDEXED BY batches_waiting WHERE due IS NOT NULL AND holder IS NULL GROUP BY destination",
    )?;
    let mut rows = select.query([int(now.0)])?;
    while let Some(row) = rows.next()? {
        if let Some((_, view)) = views.get_mut(&row.get(0)?) {
            view.outstanding = uint(row.get(1)?);
            view.queued = Some(uint(row.get(2)?));
            view.next_due = row.get::<_, Option<i64>>(3)?.map(|due| UnixMs(uint(due)));
        }
    }
    let mut count = |sql: &str, of: fn(&mut DestinationView) -> &mut Option<u64>| -> Result<(), TxError> {
        let mut select = connection.prepare(sql)?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            if let Some((_, view)) = views.get_mut(&row.get(0)?) {
                *of(view) = Some(uint(row.get(1)?));
            }
        }
        Ok(())
    };
    count(
        "SELECT destination, count(*) FROM batches INDEXED BY batches_leased WHERE holder IS NOT NULL GROUP BY 1",
        |view| &mut view.leased,
    )?;
    count(
        "SELECT destination, count(*) FROM batches INDEXED BY batches_quarantined
         WHERE quarantined IS NOT NULL GROUP BY 1",
        |view| &mut view.quarantined,
    )?;
    Ok(views.into_values().collect())
}
