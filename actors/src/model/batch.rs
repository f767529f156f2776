//! Batches: the unit of durability, queueing, leasing, retry and acknowledgement (design §1).
//!
//! A payload is the batch's rows in a compact encoding, version 1:
//!
//! ```text
//! version  u8 = 1
//! row      varint(row - previous row) varint(byte length) bytes      repeated; "previous" starts at 0
//! bytes    Lines:   the recipient
//!          Columns: varint(length) cell, for each column of the header
//!          Objects: varint(length) recipient, then the JSON object as it was in the file
//! ```
//!
//! Varints are LEB128. The encoding is stored: a change is a new version, and old ones stay readable.

use std::{fmt, ops::Range, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    ids::{BatchId, FileId, MessageId},
    ledger::RowNumbers,
    priority::{FilePriority, Priority},
    state::MessageState,
    terms::Terms,
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
    /// When its messages may go.
    #[serde(default, skip_serializing_if = "Terms::is_default")]
    pub terms: Terms,
    /// How urgent the file was when the rows were accepted.
    #[serde(default, skip_serializing_if = "Priority::is_normal")]
    pub priority: Priority,
}

/// How bodies are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendering {
    /// See [`BatchHeader::template`].
    pub template: Option<String>,
    /// See [`BatchHeader::content_type`].
    pub content_type: String,
}

impl BatchHeader {
    /// How urgent its messages are: as `orders` say, or as they were when its rows were accepted.
    pub fn priority_by(&self, orders: &[FilePriority]) -> Priority {
        let is_its = |order: &&FilePriority| order.file == self.file && order.destination == self.destination;
        orders.iter().find(is_its).map_or(self.priority, |order| order.priority)
    }

    /// The same with bodies that are made otherwise.
    #[must_use]
    pub fn rendered_by(&self, rendering: &Rendering) -> Self {
        let Rendering { template, content_type } = rendering.clone();
        Self { template, content_type, ..self.clone() }
    }
}

/// A batch as it enters the outbox.
#[derive(Clone, PartialEq, Eq)]
pub struct NewBatch {
    /// Its identity; appending an id that is there already changes nothing.
    pub id: BatchId,
    /// What its messages have in common.
    pub header: Arc<BatchHeader>,
    /// The first message's row.
    pub first_row: u64,
    /// How many messages.
    pub count: u32,
    /// When the messages were accepted: what `retry.max_age_s` counts from.
    pub accepted_at: UnixMs,
    /// When it may be delivered.
    pub not_before: UnixMs,
    /// The encoded rows. Batches of one file and first row for several destinations share it.
    pub payload: Bytes,
}

impl fmt::Debug for NewBatch {
    /// Counts, never payload (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewBatch")
            .field("id", &self.id)
            .field("destination", &self.header.destination)
            .field("first_row", &self.first_row)
            .field("count", &self.count)
            .field("payload_bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl NewBatch {
    /// The numbers of its rows; what is wrong with it, if its payload is not what it says.
    pub fn row_numbers(&self) -> Result<RowNumbers, String> {
        let rows =
            Rows::decode(self.payload.clone()).map_err(|error| format!("batch {}: {error}", self.id))?;
        match rows.numbers() {
            Some(numbers) if numbers.len() == self.count as usize && numbers.row(0) == self.first_row => {
                Ok(numbers)
            }
            _ => Err(format!(
                "batch {} says that it has {} messages from row {}, its payload has {}",
                self.id,
                self.count,
                self.first_row,
                rows.len()
            )),
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

/// The place of each row in a payload.
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

    /// Whether it has no rows.
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

    /// The numbers of its rows; `None` if it holds none.
    pub fn numbers(&self) -> Option<RowNumbers> {
        (!self.is_empty()).then(|| RowNumbers::of(self.rows.iter().map(|(row, _)| *row).collect()))
    }

    /// The payload of only the messages at `indexes`, which ascend.
    fn select(&self, indexes: impl IntoIterator<Item = usize>) -> PayloadWriter {
        let mut writer = PayloadWriter::default();
        for index in indexes {
            writer.push(self.row(index), self.bytes(index));
        }
        writer
    }
}

/// The rows of a leased batch's open messages, found by their index in the batch. If they are few, they are
/// copied and the payload is dropped (B9).
#[derive(Clone, Debug)]
pub struct OpenRows {
    /// The number of the batch's first row, open or not.
    first_row: u64,
    rows: Rows,
    /// The indexes of the rows that were copied out; `None`: all were kept.
    copied: Option<Vec<u32>>,
}

impl OpenRows {
    /// The rows at `open`, which ascends, of a batch of `count` messages; what is wrong with the payload, otherwise.
    pub fn of(payload: Bytes, count: usize, open: &[u32]) -> Result<Self, String> {
        let rows = Rows::decode(payload).map_err(|error| error.to_string())?;
        if rows.len() != count {
            return Err(format!("the payload has {} rows, the record {count} messages", rows.len()));
        }
        let first_row = if rows.is_empty() { 0 } else { rows.row(0) };
        if open.len() * 2 > count {
            return Ok(Self { first_row, rows, copied: None });
        }
        let few = rows.select(open.iter().map(|&index| index as usize)).finish();
        let rows = Rows::decode(few).map_err(|error| error.to_string())?;
        Ok(Self { first_row, rows, copied: Some(open.to_vec()) })
    }

    /// Only those at `open` of them, which ascends; copied, so that the others take no memory any more.
    #[must_use]
    pub fn narrow(&self, open: &[u32]) -> Self {
        let mut writer = PayloadWriter::default();
        let keep = |&index: &u32| {
            let (row, bytes) = self.get(index)?;
            writer.push(row, bytes);
            Some(index)
        };
        let copied = Some(open.iter().filter_map(keep).collect());
        let rows = Rows::decode(writer.finish()).expect("what was just encoded is readable");
        Self { first_row: self.first_row, rows, copied }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The bytes that hold them.
    pub fn bytes(&self) -> usize {
        self.rows.payload.len() + self.rows.rows.len() * size_of::<(u64, Range<u32>)>()
    }

    /// Of a batch that can't be read.
    pub fn none() -> Self {
        Self { first_row: 0, rows: Rows { payload: Bytes::new(), rows: Vec::new() }, copied: None }
    }

    /// The number of the batch's first row.
    pub fn first_row(&self) -> u64 {
        self.first_row
    }

    /// The row number and the laid-out bytes of the message at `index`; `None` if it is not one of the open ones.
    pub fn get(&self, index: u32) -> Option<(u64, &[u8])> {
        let at = match &self.copied {
            None => index as usize,
            Some(copied) => copied.binary_search(&index).ok()?,
        };
        (at < self.rows.len()).then(|| (self.rows.row(at), self.rows.bytes(at)))
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

    /// Changes the state at `index`, which must be one of the batch.
    pub(super) fn set(&mut self, index: usize, state: MessageState) {
        self.0[index] = state as u8;
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

    #[test]
    fn open_rows_are_narrowed_to_some_of_them() {
        let mut writer = PayloadWriter::default();
        for row in 5..15u64 {
            writer.push(row, format!("u{row}").as_bytes());
        }
        let all: Vec<u32> = (0..10).collect();
        let rows = OpenRows::of(writer.finish(), 10, &all).unwrap();
        let few = rows.narrow(&[2, 7, 99]).narrow(&[7]);
        assert_eq!((few.len(), few.first_row()), (1, 5));
        assert_eq!(few.get(7), Some((12, &b"u12"[..])));
        assert_eq!((few.get(2), few.get(0)), (None, None));
        assert!(few.bytes() * 5 < rows.bytes());
        assert!(rows.narrow(&[]).is_empty());
    }

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
        fn open_rows_are_found_by_their_index_whether_they_were_copied_out_or_not(
            rows in prop::collection::btree_map(1u64.., prop::collection::vec(any::<u8>(), 0..50), 1..30),
            is_open in prop::collection::vec(any::<bool>(), 30),
        ) {
            let mut writer = PayloadWriter::default();
            for (row, bytes) in &rows {
                writer.push(*row, bytes);
            }
            let payload = writer.finish();
            let open: Vec<u32> = (0..rows.len() as u32).filter(|index| is_open[*index as usize]).collect();
            let found = OpenRows::of(payload.clone(), rows.len(), &open).unwrap();
            let is_copied = open.len() * 2 <= rows.len();
            prop_assert_eq!(found.copied.is_some(), is_copied);
            for (index, (row, bytes)) in rows.iter().enumerate() {
                let there = (!is_copied || is_open[index]).then_some((*row, &bytes[..]));
                prop_assert_eq!(found.get(index as u32), there);
            }
            prop_assert_eq!(found.get(rows.len() as u32), None);
            prop_assert!(OpenRows::of(payload, rows.len() + 1, &open).is_err());
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

    #[test]
    fn a_batch_s_row_numbers_are_those_of_its_payload() {
        let header = BatchHeader {
            feed: "f".into(),
            destination: "d".into(),
            file: FileId([0; 16]),
            layout: RowLayout::Lines,
            template: None,
            content_type: String::new(),
            terms: Terms::default(),
            priority: Priority::Normal,
        };
        let batch = |first_row, count, rows: &[u64]| {
            let mut writer = PayloadWriter::default();
            for row in rows {
                writer.push(*row, b"x");
            }
            let at = UnixMs(1);
            let (id, header) = (BatchId([1; 16]), Arc::new(header.clone()));
            NewBatch {
                id,
                header,
                first_row,
                count,
                accepted_at: at,
                not_before: at,
                payload: writer.finish(),
            }
        };
        assert_eq!(batch(3, 2, &[3, 4]).row_numbers(), Ok(RowNumbers::Whole { first: 3, count: 2 }));
        assert_eq!(batch(3, 2, &[3, 5]).row_numbers(), Ok(RowNumbers::Gaps(vec![3, 5])));
        for wrong in [batch(3, 3, &[3, 5]), batch(4, 2, &[3, 5]), batch(1, 0, &[])] {
            assert!(wrong.row_numbers().unwrap_err().contains("its payload has"));
        }
    }
}
