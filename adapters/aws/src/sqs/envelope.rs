//! What an entry of the queue holds: a whole batch as JSON, version 2. `docs/sqs.md` documents it for other
//! readers; a change is a new version.
//!
//! Rows are written so that people and other programs can read them, and read back to the very bytes of the
//! payload (I4). A payload that would not, and one that is too large for a message, stays in the outbox: its
//! entry says `"body":"outbox"`, and who leases it loads it there (the "claim check" pattern).

use std::{borrow::Cow, io, sync::Arc};

use bytes::Bytes;
use memchr::memmem;
use postrider_actors::model::{
    batch::{BatchHeader, MessageData, NewBatch, PayloadWriter, RowLayout, Rows, put_cell},
    ids::{BatchId, FileId},
    time::UnixMs,
};
use serde::{Deserialize, Serialize};
use serde_json::ser::{CompactFormatter, Formatter};

/// The version that this program writes and reads.
pub(crate) const VERSION: u32 = 2;

/// Rows that one entry may have: more are refused before anything is allocated for them. `batch.max_messages` is
/// below it.
const ROWS_MAX: usize = 1_000_000;

/// A received entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The batch; its payload is empty if it stays in the outbox.
    pub(crate) batch: NewBatch,
    /// Whether the rows are to be loaded from the outbox.
    pub(crate) by_reference: bool,
}

/// Why a body can't be read as an entry. Without any of the body's text (I10).
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum EnvelopeError {
    #[error("version {0} of the envelope; this program reads version {VERSION}")]
    Version(u64),
    #[error("not an envelope: {0} at line {1}, column {2}")]
    Json(&'static str, usize, usize),
    #[error("damaged envelope: {0}")]
    Damaged(&'static str),
}

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    batch: BatchId,
    #[serde(flatten)]
    header: &'a BatchHeader,
    first_row: u64,
    count: u32,
    accepted_at: UnixMs,
    not_before: UnixMs,
    #[serde(skip_serializing_if = "Option::is_none")]
    rows: Option<Vec<RowText<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'static str>,
}

#[derive(Deserialize)]
struct Read<'a> {
    version: u32,
    batch: BatchId,
    feed: String,
    destination: String,
    file: FileId,
    layout: RowLayout,
    template: Option<String>,
    content_type: String,
    first_row: u64,
    count: u32,
    accepted_at: UnixMs,
    not_before: UnixMs,
    #[serde(borrow)]
    rows: Option<Vec<RowText<'a>>>,
    #[serde(borrow)]
    body: Option<Cow<'a, str>>,
}

/// One message. Which of the optional parts there are follows from the layout.
#[derive(Serialize, Deserialize)]
struct RowText<'a> {
    row: u64,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    recipient: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    cells: Option<Vec<Cow<'a, str>>>,
    /// The object's text as it stood in the file, as a string: parsed and written again it would not be the
    /// same bytes.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    object: Option<Cow<'a, str>>,
}

const OUTBOX: &str = "outbox";

/// The entry for `batch`, which is due at `not_before`; by reference if its rows can't be written so that they
/// read back.
pub(crate) fn write(batch: &NewBatch, not_before: UnixMs) -> String {
    let index = Rows::decode(batch.payload.clone());
    match index.as_ref().ok().and_then(|index| readable_rows(batch, index)) {
        Some(rows) => write_with(batch, not_before, Some(rows)),
        None => write_reference(batch, not_before),
    }
}

/// The entry for a batch whose rows stay in the outbox.
pub(crate) fn write_reference(batch: &NewBatch, not_before: UnixMs) -> String {
    write_with(batch, not_before, None)
}

fn write_with(batch: &NewBatch, not_before: UnixMs, rows: Option<Vec<RowText<'_>>>) -> String {
    let body = rows.is_none().then_some(OUTBOX);
    let written = Written {
        version: VERSION,
        batch: batch.id,
        header: &batch.header,
        first_row: batch.first_row,
        count: batch.count,
        accepted_at: batch.accepted_at,
        not_before,
        rows,
        body,
    };
    let mut text = Vec::with_capacity(batch.payload.len() * 2 + 512);
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, XmlSafe);
    written.serialize(&mut serializer).expect("an envelope has string keys, and a vector takes every write");
    String::from_utf8(text).expect("JSON is UTF-8")
}

/// The rows, if they read back to the payload's bytes.
fn readable_rows<'a>(batch: &'a NewBatch, index: &'a Rows) -> Option<Vec<RowText<'a>>> {
    let mut rows = Vec::with_capacity(index.len());
    let mut again = PayloadWriter::with_capacity(batch.payload.len());
    let mut bytes = Vec::new();
    for position in 0..index.len() {
        let parts = batch.header.layout.read(index.bytes(position)).ok()?;
        let recipient = Cow::Borrowed(parts.recipient);
        let row = match parts.data {
            MessageData::None => {
                RowText { row: index.row(position), recipient: Some(recipient), cells: None, object: None }
            }
            MessageData::Columns(_, cells) => RowText {
                row: index.row(position),
                recipient: None,
                cells: Some(cells.map(Cow::Borrowed).collect()),
                object: None,
            },
            MessageData::Object(object) => RowText {
                row: index.row(position),
                recipient: Some(recipient),
                cells: None,
                object: Some(Cow::Borrowed(object)),
            },
        };
        bytes.clear();
        lay_out(&batch.header.layout, &row, &mut bytes).ok()?;
        again.push(row.row, &bytes);
        rows.push(row);
    }
    (again.finish() == batch.payload && rows.len() == batch.count as usize).then_some(rows)
}

/// Lays a row out as the parsers do.
fn lay_out(layout: &RowLayout, row: &RowText<'_>, bytes: &mut Vec<u8>) -> Result<(), EnvelopeError> {
    match (layout, row) {
        (RowLayout::Lines, RowText { recipient: Some(recipient), cells: None, object: None, .. }) => {
            bytes.extend_from_slice(recipient.as_bytes());
        }
        (
            RowLayout::Columns { names, .. },
            RowText { recipient: None, cells: Some(cells), object: None, .. },
        ) if cells.len() == names.len() => {
            for cell in cells {
                put_cell(bytes, cell);
            }
        }
        (
            RowLayout::Objects,
            RowText { recipient: Some(recipient), cells: None, object: Some(object), .. },
        ) => {
            put_cell(bytes, recipient);
            bytes.extend_from_slice(object.as_bytes());
        }
        _ => return Err(EnvelopeError::Damaged("a row does not fit the layout")),
    }
    Ok(())
}

/// Reads an entry.
pub(crate) fn read(text: &str) -> Result<Entry, EnvelopeError> {
    let read: Read<'_> = serde_json::from_str(text).map_err(|error| unreadable(text, &error))?;
    if read.version != VERSION {
        return Err(EnvelopeError::Version(read.version.into()));
    }
    if let RowLayout::Columns { names, recipient } = &read.layout
        && *recipient >= names.len()
    {
        return Err(EnvelopeError::Damaged("the recipient's column does not exist"));
    }
    let by_reference = match (read.rows.is_some(), read.body.as_deref()) {
        (true, None) => false,
        (false, Some(OUTBOX)) => true,
        _ => return Err(EnvelopeError::Damaged("exactly one of `rows` and `\"body\":\"outbox\"` is needed")),
    };
    let payload = match &read.rows {
        Some(rows) => payload(&read.layout, rows, read.first_row, read.count)?,
        None => Bytes::new(),
    };
    let header = BatchHeader {
        feed: read.feed,
        destination: read.destination,
        file: read.file,
        layout: read.layout,
        template: read.template,
        content_type: read.content_type,
    };
    let batch = NewBatch {
        id: read.batch,
        header: Arc::new(header),
        first_row: read.first_row,
        count: read.count,
        accepted_at: read.accepted_at,
        not_before: read.not_before,
        payload,
    };
    Ok(Entry { batch, by_reference })
}

fn payload(
    layout: &RowLayout,
    rows: &[RowText<'_>],
    first_row: u64,
    count: u32,
) -> Result<Bytes, EnvelopeError> {
    if rows.is_empty() || rows.len() > ROWS_MAX || rows.len() != count as usize {
        return Err(EnvelopeError::Damaged("`count` is not the number of rows"));
    }
    if rows[0].row != first_row || !rows.is_sorted_by(|a, b| a.row < b.row) {
        return Err(EnvelopeError::Damaged("rows do not ascend from `first_row`"));
    }
    let mut writer = PayloadWriter::default();
    let mut bytes = Vec::new();
    for row in rows {
        bytes.clear();
        lay_out(layout, row, &mut bytes)?;
        writer.push(row.row, &bytes);
    }
    Ok(writer.finish())
}

/// The version matters more than what else is wrong: a newer one may differ in anything.
fn unreadable(text: &str, error: &serde_json::Error) -> EnvelopeError {
    #[derive(Deserialize)]
    struct Versioned {
        version: u64,
    }
    match serde_json::from_str::<Versioned>(text) {
        Ok(Versioned { version }) if version != u64::from(VERSION) => EnvelopeError::Version(version),
        _ => {
            let kind = match error.classify() {
                serde_json::error::Category::Syntax => "not JSON",
                serde_json::error::Category::Eof => "the JSON is cut off",
                serde_json::error::Category::Data => "a field is missing or of the wrong type",
                serde_json::error::Category::Io => "it can't be read",
            };
            EnvelopeError::Json(kind, error.line(), error.column())
        }
    }
}

/// JSON in the characters that SQS takes: those of XML 1.0's `Char` (`SendMessage` in the Amazon SQS API Reference:
/// `#x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF`). Of the others a string can hold
/// control characters, which JSON escapes anyway, and U+FFFE and U+FFFF.
struct XmlSafe;

impl Formatter for XmlSafe {
    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        // U+FFFE is EF BF BE and U+FFFF is EF BF BF; so are U+FFC0 to U+FFFD before their last byte.
        while let Some(at) = memmem::find(rest.as_bytes(), b"\xEF\xBF") {
            let (before, from) = rest.split_at(at);
            CompactFormatter.write_string_fragment(writer, before)?;
            let mut chars = from.chars();
            match chars.next() {
                Some('\u{FFFE}') => writer.write_all(b"\\ufffe")?,
                Some('\u{FFFF}') => writer.write_all(b"\\uffff")?,
                _ => writer.write_all(&from.as_bytes()[..3])?,
            }
            rest = chars.as_str();
        }
        CompactFormatter.write_string_fragment(writer, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batch(layout: RowLayout, rows: &[(u64, Vec<u8>)]) -> NewBatch {
        let mut payload = PayloadWriter::default();
        for (row, bytes) in rows {
            payload.push(*row, bytes);
        }
        let file = FileId([3; 16]);
        NewBatch {
            id: BatchId([1; 16]),
            header: Arc::new(BatchHeader {
                feed: "feed".into(),
                destination: "d".into(),
                file,
                layout,
                template: Some("{{ recipient }}\u{FFFE}\u{1}".into()),
                content_type: "application/json".into(),
            }),
            first_row: rows.first().map_or(1, |(row, _)| *row),
            count: payload.count(),
            accepted_at: UnixMs(1_700_000_000_000),
            not_before: UnixMs(1_700_000_000_001),
            payload: payload.finish(),
        }
    }

    fn is_xml_char(c: char) -> bool {
        matches!(c, '\u{9}' | '\u{A}' | '\u{D}' | '\u{20}'..='\u{D7FF}' | '\u{E000}'..='\u{FFFD}' | '\u{10000}'..)
    }

    /// Any text, with the troublesome characters in it more often than chance would have them.
    fn text() -> impl Strategy<Value = String> {
        let odd = prop::sample::select(vec![
            '\0', '\u{1F}', '\u{7F}', '\u{FFFD}', '\u{FFFE}', '\u{FFFF}', '\u{FFC0}', '"', '\\',
        ]);
        prop::collection::vec(prop_oneof![any::<char>(), odd], 0..12).prop_map(String::from_iter)
    }

    fn rows_of(layout: &RowLayout, texts: &[(String, String)]) -> Vec<Vec<u8>> {
        let lay_out = |(first, second): &(String, String)| {
            let mut bytes = Vec::new();
            match layout {
                RowLayout::Lines => bytes.extend(first.bytes()),
                RowLayout::Columns { .. } => {
                    put_cell(&mut bytes, first);
                    put_cell(&mut bytes, second);
                }
                RowLayout::Objects => {
                    put_cell(&mut bytes, first);
                    bytes.extend(second.bytes());
                }
            }
            bytes
        };
        texts.iter().map(lay_out).collect()
    }

    proptest! {
        #[test]
        fn i4_every_batch_reads_back_to_the_same_bytes_in_characters_that_sqs_takes(
            which in 0usize..3,
            texts in prop::collection::btree_map(1u64.., (text(), text()), 1..20),
        ) {
            let layout = [
                RowLayout::Lines,
                RowLayout::Columns { names: vec!["a\u{FFFF}".into(), "b".into()], recipient: 1 },
                RowLayout::Objects,
            ][which].clone();
            let (numbers, texts): (Vec<_>, Vec<_>) = texts.into_iter().unzip();
            let rows: Vec<_> = numbers.into_iter().zip(rows_of(&layout, &texts)).collect();
            let batch = batch(layout, &rows);
            let written = write(&batch, batch.not_before);
            prop_assert!(written.chars().all(is_xml_char), "{written:?}");
            prop_assert_eq!(read(&written), Ok(Entry { batch, by_reference: false }));
        }

        #[test]
        fn i4_a_payload_that_would_not_read_back_stays_in_the_outbox(
            which in 0usize..3, rows in prop::collection::btree_map(1u64.., prop::collection::vec(any::<u8>(), 0..30), 1..9),
        ) {
            let layout = [
                RowLayout::Lines,
                RowLayout::Columns { names: vec!["a".into(), "b".into()], recipient: 0 },
                RowLayout::Objects,
            ][which].clone();
            let rows: Vec<_> = rows.into_iter().collect();
            let batch = batch(layout, &rows);
            let entry = read(&write(&batch, batch.not_before)).unwrap();
            if entry.by_reference {
                prop_assert!(entry.batch.payload.is_empty());
                prop_assert_eq!(entry.batch.id, batch.id);
            } else {
                prop_assert_eq!(entry.batch, batch);
            }
        }

        #[test]
        fn any_text_is_read_or_refused_without_a_panic(text in "\\PC{0,80}") {
            let _ = read(&text);
        }
    }

    #[test]
    fn rows_are_readable() {
        let lines = batch(RowLayout::Lines, &[(7, b"u1".to_vec())]);
        assert!(write(&lines, UnixMs(9)).contains(r#""rows":[{"row":7,"recipient":"u1"}]"#));
        let layout = RowLayout::Columns { names: vec!["id".into(), "name".into()], recipient: 0 };
        let rows = rows_of(&layout, &[("u1".into(), "Zo\u{eb}".into())]);
        let columns = batch(layout, &[(7, rows[0].clone())]);
        let written = write(&columns, UnixMs(9));
        assert!(written.contains("\"rows\":[{\"row\":7,\"cells\":[\"u1\",\"Zo\u{eb}\"]}]"), "{written}");
        assert!(
            written.contains(r#""layout":{"kind":"columns","names":["id","name"],"recipient":0}"#),
            "{written}"
        );
        let rows = rows_of(&RowLayout::Objects, &[("7".into(), r#"{"user_id": 7}"#.into())]);
        let objects = batch(RowLayout::Objects, &[(7, rows[0].clone())]);
        let written = write(&objects, UnixMs(9));
        assert!(written.contains(r#"{"row":7,"recipient":"7","object":"{\"user_id\": 7}"}"#), "{written}");
    }

    #[test]
    fn a_reference_has_no_rows() {
        let batch = batch(RowLayout::Lines, &[(7, b"u1".to_vec())]);
        let written = write_reference(&batch, UnixMs(9));
        assert!(written.ends_with(r#""not_before":9,"body":"outbox"}"#), "{written}");
        let entry = read(&written).unwrap();
        assert!(entry.by_reference && entry.batch.payload.is_empty() && entry.batch.not_before == UnixMs(9));
    }

    #[test]
    fn what_can_t_be_read_says_why_and_shows_nothing_of_the_body() {
        let good = write(&batch(RowLayout::Lines, &[(7, b"secret-user".to_vec())]), UnixMs(9));
        let cases = [
            (good.replacen(r#""version":2"#, r#""version":3,"rows":{}"#, 1), "version 3"),
            (r#"{"version":7}"#.to_owned(), "version 7"),
            ("hello".to_owned(), "not JSON"),
            (good[..good.len() - 5].to_owned(), "cut off"),
            (good.replacen(r#""count":1"#, r#""count":2"#, 1), "`count`"),
            (good.replacen(r#""first_row":7"#, r#""first_row":6"#, 1), "ascend"),
            (good.replacen(r#""recipient":"secret-user""#, r#""cells":["a"]"#, 1), "layout"),
            (good.replacen(r#""rows":["#, r#""body":"outbox","rows":["#, 1), "exactly one"),
            (good.replacen(r#""batch":""#, r#""batch":"x"#, 1), "wrong type"),
        ];
        for (body, expected) in cases {
            let why = read(&body).unwrap_err().to_string();
            assert!(why.contains(expected) && !why.contains("secret"), "{why} instead of {expected}");
        }
    }
}
