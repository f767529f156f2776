//! What an operator's commands read, while the daemon runs and while it does not. Every query is a
//! snapshot of its own and bounded, so that a slow reader does not keep the log from being reused.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use bytes::Bytes;
use postrider_actors::{
    model::{
        batch::{BatchHeader, Rows},
        file::{DestinationCounts, FileReport},
        ids::{FileId, MessageId},
        time::UnixMs,
    },
    ports::StoreError,
};
use rusqlite::{Connection, params};

use super::{
    messages::{self, MessageReport},
    open::{self, Access, OpenError},
    redrive::{self, DeadCursor, DeadFilter, DeadLetter, FileSelector},
    reports,
    tx::{Caches, TxError, int, uint},
};

/// An operator's view of the store, which must be there already.
pub struct Viewer {
    connection: Connection,
    caches: Caches,
}

/// How a destination stands.
#[derive(Clone, Debug, Default)]
pub struct DestinationView {
    /// Since when it is disabled, and why.
    pub disabled: Option<(UnixMs, String)>,
    /// Over all files.
    pub counts: DestinationCounts,
    /// Batches that the queue has not accepted.
    pub outstanding: u64,
    /// Batches that wait for a worker.
    pub queued: u64,
    /// Batches that a worker has, or had when the daemon ended.
    pub leased: u64,
    /// When the earliest outstanding batch is due.
    pub next_due: Option<UnixMs>,
}

/// How many files there are, by where they stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileTotals {
    /// Being read.
    pub ingesting: u64,
    /// Closed, with messages that are not settled.
    pub open: u64,
    /// Closed and settled.
    pub settled: u64,
}

/// A walk over what was accepted, in search of a recipient.
#[derive(Clone, Debug, Default)]
pub struct Search {
    after: i64,
    last_payload: Option<i64>,
    /// Batches looked at so far.
    pub batches: u64,
    /// Messages found so far.
    pub found: Vec<MessageId>,
}

impl Viewer {
    /// Opens the store in `state_dir`; changes nothing.
    pub fn open(state_dir: &Path) -> Result<Self, OpenError> {
        Ok(Self { connection: open::open(state_dir, Access::Read)?, caches: Caches::default() })
    }

    /// Up to `limit` files, the latest first; those that `selector` names, or all.
    pub fn files(
        &self,
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

    /// How many files there are.
    pub fn file_totals(&self) -> Result<FileTotals, StoreError> {
        let totals = self.connection.query_row(
            "SELECT coalesce(sum(state = 0), 0), coalesce(sum(state <> 0 AND settled_at IS NULL), 0),
                 coalesce(sum(settled_at IS NOT NULL), 0) FROM files",
            [],
            |row| {
                Ok(FileTotals {
                    ingesting: uint(row.get(0)?),
                    open: uint(row.get(1)?),
                    settled: uint(row.get(2)?),
                })
            },
        );
        answer(totals.map_err(TxError::from))
    }

    /// How many messages have no final state yet.
    pub fn depth(&self) -> Result<u64, StoreError> {
        answer(reports::depth(&self.connection))
    }

    /// Every destination that the store knows, by name.
    pub fn destinations(&self) -> Result<BTreeMap<String, DestinationView>, StoreError> {
        answer(destinations(&self.connection))
    }

    /// Up to `limit` dead letters after `cursor`.
    pub fn dead(
        &self,
        filter: &DeadFilter,
        cursor: DeadCursor,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        answer(redrive::select(&self.connection, filter, cursor, limit))
    }

    /// The recipients of dead letters, in their order.
    pub fn recipients(&mut self, letters: &[DeadLetter]) -> Result<Vec<String>, StoreError> {
        answer(messages::recipients(&self.connection, &mut self.caches, letters))
    }

    /// What became of one message at each destination of its file, or why its row became none. Empty if
    /// the file is not known or its row was not read (yet).
    pub fn message(&mut self, id: MessageId) -> Result<Vec<MessageReport>, StoreError> {
        answer(messages::report(&self.connection, &mut self.caches, id))
    }

    /// Goes on with a search for `recipient` through up to `batches` more batches, `limit` messages at
    /// most in all. Whether there is more to look at. It reads every payload it passes.
    pub fn search(
        &mut self,
        search: &mut Search,
        recipient: &str,
        file: Option<FileId>,
        batches: usize,
        limit: usize,
    ) -> Result<bool, StoreError> {
        answer(self.search_some(search, recipient, file, batches, limit))
    }

    fn search_some(
        &mut self,
        search: &mut Search,
        recipient: &str,
        file: Option<FileId>,
        batches: usize,
        limit: usize,
    ) -> Result<bool, TxError> {
        let finder = memchr::memmem::Finder::new(recipient.as_bytes());
        let mut select = self.connection.prepare_cached(
            "SELECT b.seq, b.payload, b.header, p.body FROM batches b JOIN payloads p ON p.seq = b.payload
             WHERE b.seq > ?1 AND b.root IS NULL AND (?2 IS NULL OR b.file = (SELECT seq FROM files WHERE id = ?2))
             ORDER BY b.seq LIMIT ?3",
        )?;
        let mut rows = select.query(params![search.after, file.map(|file| file.0), int(batches as u64)])?;
        let mut looked_at = 0;
        while let Some(row) = rows.next()? {
            if search.found.len() >= limit {
                return Ok(false);
            }
            search.after = row.get(0)?;
            search.batches += 1;
            looked_at += 1;
            // The batches of one payload for several destinations are neighbours.
            let payload: i64 = row.get(1)?;
            if search.last_payload.replace(payload) == Some(payload) {
                continue;
            }
            let body = row.get_ref(3)?.as_blob().map_err(rusqlite::Error::from)?;
            // Most payloads are left without decoding them.
            if finder.find(body).is_none() {
                continue;
            }
            let header: Arc<BatchHeader> = self.caches.header(&self.connection, row.get(2)?)?;
            let decoded = Rows::decode(Bytes::copy_from_slice(body))?;
            for index in 0..decoded.len() {
                if header.layout.read(decoded.bytes(index))?.recipient == recipient {
                    search.found.push(header.message_id(decoded.row(index)));
                }
            }
        }
        search.found.truncate(limit);
        Ok(looked_at == batches && search.found.len() < limit)
    }
}

fn answer<T>(result: Result<T, TxError>) -> Result<T, StoreError> {
    result.map_err(|error| error.to_store_error())
}

/// Which count of a view a phase fills.
type Counter = fn(&mut DestinationView) -> &mut u64;

fn destinations(connection: &Connection) -> Result<BTreeMap<String, DestinationView>, TxError> {
    let mut views: BTreeMap<i64, (String, DestinationView)> = BTreeMap::new();
    let mut select = connection.prepare(
        "SELECT n.seq, n.name, n.disabled_at, n.disabled_reason, coalesce(sum(d.accepted), 0),
             coalesce(sum(d.sent), 0), coalesce(sum(d.dead), 0), coalesce(sum(d.retrying), 0)
         FROM destinations n LEFT JOIN file_destinations d ON d.destination = n.seq GROUP BY n.seq",
    )?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let disabled_at: Option<i64> = row.get(2)?;
        let reason: Option<String> = row.get(3)?;
        let view = DestinationView {
            disabled: disabled_at.map(|at| (UnixMs(uint(at)), reason.unwrap_or_default())),
            counts: DestinationCounts {
                accepted: uint(row.get(4)?),
                sent: uint(row.get(5)?),
                dead: uint(row.get(6)?),
                retrying: uint(row.get(7)?),
            },
            ..DestinationView::default()
        };
        views.insert(row.get(0)?, (row.get(1)?, view));
    }
    // One query per phase: each is answered by its partial index.
    let phases: [(&str, Counter); 3] = [
        ("SELECT destination, count(*), min(not_before) FROM batches WHERE phase = 0 GROUP BY 1", |view| {
            &mut view.outstanding
        }),
        ("SELECT destination, count(*), NULL FROM batches WHERE phase = 1 GROUP BY 1", |view| {
            &mut view.queued
        }),
        ("SELECT destination, count(*), NULL FROM batches WHERE phase = 2 GROUP BY 1", |view| {
            &mut view.leased
        }),
    ];
    for (sql, count) in phases {
        let mut select = connection.prepare(sql)?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            if let Some((_, view)) = views.get_mut(&row.get(0)?) {
                *count(view) = uint(row.get(1)?);
                let due: Option<i64> = row.get(2)?;
                view.next_due = view.next_due.or(due.map(|due| UnixMs(uint(due))));
            }
        }
    }
    Ok(views.into_values().collect())
}
