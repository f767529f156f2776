//! Files, batches and steps, as ingest would make them.

use std::{ops::RangeInclusive, sync::Arc};

use crate::{
    model::{
        batch::{BatchHeader, NewBatch, PayloadWriter, RowLayout},
        file::{Checkpoint, FileRecord, FileState, Reject},
        ids::{BatchId, FileId},
        outcome::{Attempt, Reason},
        priority::Priority,
        terms::Terms,
        time::UnixMs,
    },
    ports::Append,
};

/// A file of `feed` whose content is known by `content`, for `destinations`.
pub fn file(feed: &str, content: u8, destinations: &[&str]) -> Arc<FileRecord> {
    Arc::new(FileRecord {
        id: FileId::derive(feed, &[content; 32]),
        feed: feed.into(),
        name: format!("{content}.csv"),
        bytes: 1_000,
        sha256: format!("{content:02x}").repeat(32),
        claimed_at: UnixMs(1_000),
        destinations: destinations.iter().map(|&name| name.into()).collect(),
        terms: Terms::default(),
        priority: Priority::Normal,
    })
}

/// The header of `file`'s batches for `destination`.
pub fn header(file: &FileRecord, destination: &str) -> Arc<BatchHeader> {
    Arc::new(BatchHeader {
        feed: file.feed.clone(),
        destination: destination.into(),
        file: file.id,
        layout: RowLayout::Lines,
        template: None,
        content_type: "application/json".into(),
        terms: file.terms.clone(),
        priority: file.priority,
    })
}

/// The rows `rows` as a batch; row `n` is for recipient `user-n`.
pub fn batch(
    file: &FileRecord,
    destination: &str,
    rows: impl IntoIterator<Item = u64>,
    at: UnixMs,
) -> NewBatch {
    let mut payload = PayloadWriter::default();
    let mut first_row = None;
    for row in rows {
        first_row.get_or_insert(row);
        payload.push(row, format!("user-{row}").as_bytes());
    }
    let first_row = first_row.expect("a batch has rows");
    let id = BatchId::derive(file.id, destination, first_row);
    NewBatch {
        id,
        header: header(file, destination),
        first_row,
        count: payload.count(),
        accepted_at: at,
        not_before: at,
        payload: payload.finish(),
    }
}

/// A step that accepts all of `rows` in one batch per destination, and leaves the file open.
pub fn step(file: &Arc<FileRecord>, rows: RangeInclusive<u64>, at: UnixMs) -> Append {
    step_without(file, rows, &[], &[], at)
}

/// A step over `rows` of which some are rejected and some are duplicates. Rows before it must all have
/// been accepted.
pub fn step_without(
    file: &Arc<FileRecord>,
    rows: RangeInclusive<u64>,
    rejected: &[u64],
    duplicates: &[u64],
    at: UnixMs,
) -> Append {
    let accepted: Vec<_> =
        rows.clone().filter(|row| !rejected.contains(row) && !duplicates.contains(row)).collect();
    let batch = |destination: &String| batch(file, destination, accepted.iter().copied(), at);
    let batches =
        if accepted.is_empty() { Vec::new() } else { file.destinations.iter().map(batch).collect() };
    let reject = |&row: &u64| Reject {
        row,
        line: row + 1,
        reason: "too few cells".into(),
        raw: format!("bad-{row}").into(),
    };
    Append {
        file: file.clone(),
        batches,
        rejects: rejected.iter().map(reject).collect(),
        duplicates: duplicates.to_vec(),
        checkpoint: Checkpoint {
            offset: rows.end() * 10,
            rows: *rows.end(),
            rejected: rejected.len() as u64,
            duplicates: duplicates.len() as u64,
        },
        state: FileState::Ingesting,
        hold: None,
        at,
        entries: Vec::new(),
    }
}

/// A failed attempt at `at`.
pub fn failed(at: UnixMs) -> Attempt {
    Attempt { at, status: 503, reason: Reason::Status }
}
