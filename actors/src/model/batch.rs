//! Batches: the unit of durability, queueing, leasing, retry and acknowledgement (design §1).
//!
//! A payload is the batch's rows in a compact encoding, version 1:
//!
//! ```text
//! version  u8 = 1
//! row      varint(row - previous row) varint(byte length) bytes      repeated; "previous" starts at 0
//! bytes    Lines:   the recipient
//!          Columns: varint(length) cell, for each column of the header
//!          Objects: varint(length) recipient, then the JSON object as it stood in the file
//! ```
//!
//! Varints are LEB128. The encoding is stored: a change is a new version, and old ones stay readable.

use std::{fmt, ops::Range, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    ids::{BatchId, FileId, MessageId},
    outcome::Attempt,
    state::MessageState,
    time::UnixMs,
};

/// The payload encoding that this version writes.
pub const PAYLOAD_VERSION: u8 = 1;

/// How a row's bytes are laid out, by the format of the feed that accepted it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RowLayout {
    /// One id per line.
    Lines,
    /// The cells of a delimited row.
    Columns {
        /// The header's names, unique, in file order.
        names: Vec<String>,
        /// Which of them is the recipient.
        recipient: usize,
    },
    /// A JSON object and the recipient found in it.
    Objects,
}

/// What the messages of one file for one destination have in common. It travels with the batch as it
/// was when the rows were accepted, so that a config change never changes a body (I4).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BatchHeader {
    /// The feed's name.
    pub feed: String,
    /// The destination's name.
    pub destination: String,
    /// The file the rows came from.
    pub file: FileId,
    /// How the rows are laid out.
    pub layout: RowLayout,
    /// The body template's source; `None` is the default body,
    /// `{"id":…,"feed":…,"recipient":…,"data":{…}}`.
    pub template: Option<String>,
    /// The body's content type.
    pub content_type: String,
}

/// A batch as it enters the outbox.
#[derive(Clone, PartialEq, Eq)]
pub struct NewBatch {
    /// Its identity; appending an id that is there already changes nothing.
    pub id: BatchId,
    /// The batch of the first attempt that these messages belong to; its own id if it is that batch.
    pub root: BatchId,
    /// What its messages have in common.
    pub header: Arc<BatchHeader>,
    /// The first message's row.
    pub first_row: u64,
    /// How many messages.
    pub count: u32,
    /// The round of delivery: 0, +1 at each redrive.
    pub drive: u32,
    /// How many attempts its messages had in this drive; the same for all of them.
    pub attempt: u32,
    /// When the messages were accepted: what `retry.max_age_s` counts from.
    pub accepted_at: UnixMs,
    /// When it may be delivered.
    pub not_before: UnixMs,
    /// The encoded rows. Batches of one file and first row for several destinations share it.
    pub payload: Bytes,
    /// The failed attempts so far, one list per message in row order; empty for a first attempt.
    pub history: Vec<Vec<Attempt>>,
}

impl fmt::Debug for NewBatch {
    /// Counts, never payload (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewBatch")
            .field("id", &self.id)
            .field("destination", &self.header.destination)
            .field("first_row", &self.first_row)
            .field("count", &self.count)
            .field("attempt", &self.attempt)
            .field("payload_bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl NewBatch {
    /// Only its messages at `indexes`, of which there is at least one: what is left of a retry batch when some
    /// of its messages have settled meanwhile. `rows` is its decoded payload.
    #[must_use]
    pub fn only(&self, rows: &Rows, indexes: &[usize]) -> Self {
        let first_row = rows.row(indexes[0]);
        let header = &self.header;
        Self {
            id: BatchId::derive(header.file, &header.destination, first_row, self.drive, self.attempt),
            first_row,
            count: indexes.len() as u32,
            payload: rows.select(indexes.iter().copied()).finish(),
            // Empty for all, or one list per message.
            history: indexes.iter().filter_map(|&index| self.history.get(index).cloned()).collect(),
            ..self.clone()
        }
    }
}

/// A payload that can't be read. It never happens to bytes that Postrider wrote and the disk kept.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PayloadError {
    /// Written by a newer version, or no payload.
    #[error("payload version {0}, this program reads version {PAYLOAD_VERSION}")]
    Version(u8),
    /// It ends in the middle of a row or a cell.
    #[error("payload is cut off or damaged at byte {0}")]
    Damaged(usize),
}

/// Encodes rows into a payload.
#[derive(Debug)]
pub struct PayloadWriter {
    bytes: Vec<u8>,
    previous: u64,
    count: u32,
}

impl Default for PayloadWriter {
    fn default() -> Self {
        Self::with_capacity(0)
    }
}

impl PayloadWriter {
    /// An empty payload with room for `bytes`.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut buffer = Vec::with_capacity(bytes + 1);
        buffer.push(PAYLOAD_VERSION);
        Self { bytes: buffer, previous: 0, count: 0 }
    }

    /// Appends a row whose bytes are laid out already. Rows come in ascending order.
    pub fn push(&mut self, row: u64, bytes: &[u8]) {
        debug_assert!(row > self.previous || self.count == 0, "rows ascend");
        put_varint(&mut self.bytes, row - self.previous);
        put_varint(&mut self.bytes, bytes.len() as u64);
        self.bytes.extend_from_slice(bytes);
        self.previous = row;
        self.count += 1;
    }

    /// How many rows it holds.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How many bytes it takes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it holds no row.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The finished payload.
    pub fn finish(self) -> Bytes {
        self.bytes.into()
    }
}

/// Where each row of a payload stands in it.
#[derive(Clone)]
pub struct Rows {
    payload: Bytes,
    rows: Vec<(u64, Range<u32>)>,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rows({} rows, {} bytes)", self.rows.len(), self.payload.len())
    }
}

impl Rows {
    /// Indexes a payload.
    pub fn decode(payload: Bytes) -> Result<Self, PayloadError> {
        match payload.first() {
            Some(&PAYLOAD_VERSION) => {}
            Some(&version) => return Err(PayloadError::Version(version)),
            None => return Err(PayloadError::Damaged(0)),
        }
        let mut rows = Vec::new();
        let mut at = 1;
        let mut row = 0u64;
        while at < payload.len() {
            let damaged = PayloadError::Damaged(at);
            let step = take_varint(&payload, &mut at).ok_or(damaged)?;
            let len = take_varint(&payload, &mut at).ok_or(damaged)?;
            row = row.checked_add(step).ok_or(damaged)?;
            let end = usize::try_from(len).ok().and_then(|len| at.checked_add(len)).ok_or(damaged)?;
            if end > payload.len() || u32::try_from(end).is_err() {
                return Err(damaged);
            }
            rows.push((row, at as u32..end as u32));
            at = end;
        }
        Ok(Self { payload, rows })
    }

    /// How many rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The row number of the message at `index`.
    pub fn row(&self, index: usize) -> u64 {
        self.rows[index].0
    }

    /// The laid-out bytes of the message at `index`.
    pub fn bytes(&self, index: usize) -> &[u8] {
        let range = &self.rows[index].1;
        &self.payload[range.start as usize..range.end as usize]
    }

    /// The index of the message of `row`.
    pub fn find(&self, row: u64) -> Option<usize> {
        self.rows.binary_search_by_key(&row, |(row, _)| *row).ok()
    }

    /// The payload with the numbers of its rows and nothing of them: what is left of an archived batch.
    pub fn skeleton(&self) -> PayloadWriter {
        let mut writer = PayloadWriter::with_capacity(2 * self.len());
        for (row, _) in &self.rows {
            writer.push(*row, b"");
        }
        writer
    }

    /// The payload of only the messages at `indexes`, which ascend: what a retry batch carries on.
    pub fn select(&self, indexes: impl IntoIterator<Item = usize>) -> PayloadWriter {
        let mut writer = PayloadWriter::default();
        for index in indexes {
            writer.push(self.row(index), self.bytes(index));
        }
        writer
    }
}

/// The parts of one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MessageParts<'a> {
    /// Who gets it.
    pub recipient: &'a str,
    /// What travels with it.
    pub data: MessageData<'a>,
}

/// The data of one message, as its layout has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MessageData<'a> {
    /// Nothing but the recipient.
    None,
    /// Cells in the order of the header's names, still encoded; see [`Cells`].
    Columns(&'a [String], Cells<'a>),
    /// A JSON object, as it stood in the file.
    Object(&'a str),
}

/// Iterates over the encoded cells of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cells<'a>(&'a [u8]);

impl<'a> Iterator for Cells<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        if self.0.is_empty() {
            return None;
        }
        let (cell, rest) = take_text(self.0)?;
        self.0 = rest;
        Some(cell)
    }
}

impl RowLayout {
    /// Reads one row's bytes.
    pub fn read<'a>(&'a self, bytes: &'a [u8]) -> Result<MessageParts<'a>, PayloadError> {
        let damaged = PayloadError::Damaged(0);
        match self {
            Self::Lines => Ok(MessageParts {
                recipient: std::str::from_utf8(bytes).map_err(|_| damaged)?,
                data: MessageData::None,
            }),
            Self::Columns { names, recipient } => {
                let cells = Cells(bytes);
                if cells.clone().count() != names.len() {
                    return Err(damaged);
                }
                Ok(MessageParts {
                    recipient: cells.clone().nth(*recipient).ok_or(damaged)?,
                    data: MessageData::Columns(names, cells),
                })
            }
            Self::Objects => {
                let (recipient, object) = take_text(bytes).ok_or(damaged)?;
                let object = std::str::from_utf8(object).map_err(|_| damaged)?;
                Ok(MessageParts { recipient, data: MessageData::Object(object) })
            }
        }
    }
}

/// Appends a length-prefixed cell; parsers lay out `Columns` rows and `Objects` recipients with it.
pub fn put_cell(bytes: &mut Vec<u8>, cell: &str) {
    put_varint(bytes, cell.len() as u64);
    bytes.extend_from_slice(cell.as_bytes());
}

fn take_text(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let mut at = 0;
    let len = usize::try_from(take_varint(bytes, &mut at)?).ok()?;
    let end = at.checked_add(len)?;
    let text = std::str::from_utf8(bytes.get(at..end)?).ok()?;
    Some((text, &bytes[end..]))
}

/// Appends `value` in LEB128.
pub fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// Reads a LEB128 value at `*at` and moves past it; `None` if it is cut off or longer than 64 bits.
pub fn take_varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        if shift == 63 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// The state vector of a batch: one byte per message, in row order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateVector(pub Vec<u8>);

impl StateVector {
    /// All accepted.
    pub fn accepted(count: u32) -> Self {
        Self(vec![MessageState::Accepted as u8; count as usize])
    }

    /// The state at `index`; a byte that no version wrote counts as accepted, so that it is looked at.
    pub fn get(&self, index: usize) -> MessageState {
        self.0.get(index).copied().and_then(MessageState::from_byte).unwrap_or(MessageState::Accepted)
    }

    /// Merges a report and returns what stood there before (I7).
    pub fn merge(&mut self, index: usize, report: MessageState) -> MessageState {
        let before = self.get(index);
        if let Some(byte) = self.0.get_mut(index) {
            *byte = before.merge(report) as u8;
        }
        before
    }

    /// The indexes that still need delivery.
    pub fn unsettled(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.0.len()).filter(|&index| !self.get(index).is_settled())
    }
}

impl BatchHeader {
    /// The id of this file's message at `row`.
    pub fn message_id(&self, row: u64) -> MessageId {
        MessageId { file: self.file, row }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn payloads_read_back(rows in prop::collection::btree_map(1u64.., prop::collection::vec(any::<u8>(), 0..300), 0..40)) {
            let mut writer = PayloadWriter::default();
            for (row, bytes) in &rows {
                writer.push(*row, bytes);
            }
            let decoded = Rows::decode(writer.finish()).unwrap();
            prop_assert_eq!(decoded.len(), rows.len());
            for (index, (row, bytes)) in rows.iter().enumerate() {
                prop_assert_eq!(decoded.row(index), *row);
                prop_assert_eq!(decoded.bytes(index), &bytes[..]);
                prop_assert_eq!(decoded.find(*row), Some(index));
            }
            let odd: Vec<_> = (0..decoded.len()).filter(|index| index % 2 == 1).collect();
            let selected = Rows::decode(decoded.select(odd.iter().copied()).finish()).unwrap();
            for (index, from) in odd.into_iter().enumerate() {
                prop_assert_eq!(selected.row(index), decoded.row(from));
                prop_assert_eq!(selected.bytes(index), decoded.bytes(from));
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut payload = vec![PAYLOAD_VERSION];
            payload.extend(&bytes);
            let _ = Rows::decode(payload.into());
            let layouts = [
                RowLayout::Lines,
                RowLayout::Objects,
                RowLayout::Columns { names: vec!["a".into(), "b".into()], recipient: 1 },
            ];
            for layout in &layouts {
                let _ = layout.read(&bytes);
            }
        }

        #[test]
        fn varints_read_back(value: u64) {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            let mut at = 0;
            prop_assert_eq!(take_varint(&bytes, &mut at), Some(value));
            prop_assert_eq!(at, bytes.len());
        }
    }

    #[test]
    fn rows_of_every_layout_read_back() {
        assert_eq!(
            RowLayout::Lines.read("zoë".as_bytes()).unwrap(),
            MessageParts { recipient: "zoë", data: MessageData::None }
        );
        let columns = RowLayout::Columns { names: vec!["name".into(), "id".into()], recipient: 1 };
        let mut bytes = Vec::new();
        put_cell(&mut bytes, "");
        put_cell(&mut bytes, "u-1");
        let parts = columns.read(&bytes).unwrap();
        assert_eq!(parts.recipient, "u-1");
        let MessageData::Columns(names, cells) = parts.data else { panic!("columns") };
        assert_eq!(
            names.iter().map(String::as_str).zip(cells).collect::<Vec<_>>(),
            [("name", ""), ("id", "u-1")]
        );

        let mut bytes = Vec::new();
        put_cell(&mut bytes, "7");
        bytes.extend(br#"{"user_id":7}"#);
        assert_eq!(
            RowLayout::Objects.read(&bytes).unwrap(),
            MessageParts { recipient: "7", data: MessageData::Object(r#"{"user_id":7}"#) }
        );
    }

    #[test]
    fn a_newer_or_damaged_payload_is_refused() {
        assert_eq!(Rows::decode(Bytes::from_static(&[2])).unwrap_err(), PayloadError::Version(2));
        assert_eq!(Rows::decode(Bytes::new()).unwrap_err(), PayloadError::Damaged(0));
        assert_eq!(Rows::decode(Bytes::from_static(&[1, 1, 5, b'a'])).unwrap_err(), PayloadError::Damaged(1));
    }
}
