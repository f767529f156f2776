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

use crate::console::{
    DeadFilter, DeadLetter, DestinationView, FileSelector, FileTotals, MessageReport, Position, Search, View,
};

use super::{
    messages,
    open::{self, Access, OpenError},
    redrive::{self, Place},
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
        let (mut after, mut last_payload) = read_position(&search.position)?;
        let finder = memchr::memmem::Finder::new(recipient.as_bytes());
        let mut select = self.connection.prepare_cached(
            "SELECT b.seq, b.payload, b.header, p.body FROM batches b JOIN payloads p ON p.seq = b.payload
             WHERE b.seq > ?1 AND b.root IS NULL AND b.archived = 0 AND (?2 IS NULL OR b.file = (SELECT seq FROM files WHERE id = ?2))
             ORDER BY b.seq LIMIT ?3",
        )?;
        let mut rows = select.query(params![after, file.map(|file| file.0), int(batches as u64)])?;
        let mut looked_at = 0;
        while let Some(row) = rows.next()? {
            if search.found.len() >= limit {
                return Ok(false);
            }
            after = row.get(0)?;
            search.batches += 1;
            looked_at += 1;
            // The batches of one payload for several destinations are neighbours.
            let payload: i64 = row.get(1)?;
            if last_payload.replace(payload) == Some(payload) {
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
        search.position = position(after, last_payload);
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

    fn file_totals(&mut self) -> Result<FileTotals, StoreError> {
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

    fn depth(&mut self) -> Result<u64, StoreError> {
        answer(reports::depth(&self.connection))
    }

    fn destinations(&mut self) -> Result<BTreeMap<String, DestinationView>, StoreError> {
        answer(destinations(&self.connection))
    }

    fn dead(
        &mut self,
        filter: &DeadFilter,
        position: &Position,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let found =
            Place::read(position).and_then(|place| redrive::select(&self.connection, filter, place, limit));
        answer(found.map(|found| found.into_iter().map(|found| found.letter).collect()))
    }

    fn recipients(&mut self, letters: &[DeadLetter]) -> Result<Vec<String>, StoreError> {
        answer(messages::recipients(&self.connection, &mut self.caches, letters))
    }

    fn message(&mut self, id: MessageId) -> Result<Vec<MessageReport>, StoreError> {
        answer(messages::report(&self.connection, &mut self.caches, id))
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

/// How far a search came, as an opaque position: the last batch, and its payload.
fn position(after: i64, payload: Option<i64>) -> Position {
    Position(format!("{after}.{}", payload.unwrap_or(0)))
}

/// Reads back what [`position`] made. Payloads are numbered from 1.
fn read_position(position: &Position) -> Result<(i64, Option<i64>), TxError> {
    if position.0.is_empty() {
        return Ok((0, None));
    }
    let parts = position.0.split_once('.').and_then(|(after, payload)| {
        Some((after.parse().ok()?, payload.parse().ok().filter(|&payload| payload > 0)))
    });
    parts.ok_or_else(|| TxError::Refused(format!("{:?} is no position of a search", position.0)))
}

fn answer<T>(result: Result<T, TxError>) -> Result<T, StoreError> {
    result.map_err(|error| error.to_store_error())
}

/// Which count of a view a phase fills.
type Counter = fn(&mut DestinationView, u64);

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
            queued: Some(0),
            leased: Some(0),
            ..DestinationView::default()
        };
        views.insert(row.get(0)?, (row.get(1)?, view));
    }
    // One query per phase: each is answered by its partial index.
    let phases: [(&str, Counter); 3] = [
        (
            "SELECT destination, count(*), min(not_before) FROM batches WHERE phase = 0 GROUP BY 1",
            |view, count| {
                view.outstanding = count;
            },
        ),
        ("SELECT destination, count(*), NULL FROM batches WHERE phase = 1 GROUP BY 1", |view, count| {
            view.queued = Some(count);
        }),
        ("SELECT destination, count(*), NULL FROM batches WHERE phase = 2 GROUP BY 1", |view, count| {
            view.leased = Some(count);
        }),
    ];
    for (sql, count) in phases {
        let mut select = connection.prepare(sql)?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            if let Some((_, view)) = views.get_mut(&row.get(0)?) {
                count(view, uint(row.get(1)?));
                let due: Option<i64> = row.get(2)?;
                view.next_due = view.next_due.or(due.map(|due| UnixMs(uint(due))));
            }
        }
    }
    Ok(views.into_values().collect())
}
