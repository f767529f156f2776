//! Receipts in a file: an object per line, or cells under a header. Memory is the caller's buffer and one
//! row; a line that is too long is one reject and streams by.

use serde::Serializer as _;

use super::{
    Around, REJECTS_BYTES_MAX, ReadReceipts, ReceiptFormat,
    fields::{FieldValue, Fields, MESSAGE_ID, PROVIDER_ID, STATUS},
    mapping::FIELDS,
    text_bytes,
};
use crate::model::{
    batch::{MessageData, RowLayout},
    formats::{FileError, RowBlock, RowParser, listed},
    receipt::RejectedText,
};

/// What a file of receipts is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiptFileFormat {
    /// One JSON object per line.
    Ndjson,
    /// Delimited cells under a header.
    Csv {
        /// The separator between cells: one ASCII byte other than `"`, NUL and line breaks.
        delimiter: u8,
    },
}

/// Why a file as a whole can't be read. What was read before stays valid.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReceiptFileError {
    /// It is no such text.
    #[error(transparent)]
    File(#[from] FileError),
    /// The header lacks a column without which no receipt can be read.
    #[error("line 1: no column is named {wanted}; the header has {found}")]
    NoColumn {
        /// What was looked for.
        wanted: String,
        /// How many columns were found, and which, for the operator.
        found: String,
    },
}

/// Reads the receipts of one file. How the input is cut into pieces never changes the result.
#[derive(Debug)]
pub struct ReceiptRows {
    format: ReceiptFormat,
    file: String,
    parser: RowParser,
    block: RowBlock,
    /// Where each field's column is, once the header was read.
    columns: Option<[Option<usize>; FIELDS]>,
}

impl ReceiptRows {
    /// At the start of the file that places call `file`. Lines longer than `line_bytes_max` are rejected.
    pub fn new(format: ReceiptFormat, kind: ReceiptFileFormat, file: String, line_bytes_max: usize) -> Self {
        let parser = match kind {
            ReceiptFileFormat::Ndjson => RowParser::lines(line_bytes_max),
            ReceiptFileFormat::Csv { delimiter } => RowParser::cells(delimiter, line_bytes_max),
        };
        Self { format, file, parser, block: RowBlock::new(1), columns: None }
    }

    /// Leaves out the first `rows` rows: how a file is gone on with.
    #[must_use]
    pub fn skip_rows(mut self, rows: u64) -> Self {
        self.parser = self.parser.skip_rows(rows);
        self
    }

    /// How many rows were read, those that were left out included.
    pub fn rows(&self) -> u64 {
        self.parser.position().rows
    }

    /// The smallest buffer that always lets [`ReceiptRows::read`] consume something.
    pub fn input_bytes_min(&self) -> usize {
        self.parser.input_bytes_min()
    }

    /// Reads whole rows from the start of `input` into `read`, until that [is full](ReadReceipts::is_full), and
    /// returns how many bytes it consumed; `end` says that nothing follows. The file is finished when a call with `end`
    /// has consumed all of its input.
    pub fn read(
        &mut self,
        input: &[u8],
        end: bool,
        receipts_max: usize,
        read: &mut ReadReceipts,
    ) -> Result<usize, ReceiptFileError> {
        let mut at = 0;
        let mut text = text_bytes(&read.rejects);
        while read.len() < receipts_max && text < REJECTS_BYTES_MAX {
            self.block.clear();
            // One row at a time, so that its line is known.
            at += self.parser.parse(&input[at..], end, &mut self.block)?;
            if self.columns.is_none()
                && let Some(RowLayout::Columns { names, .. }) = self.parser.layout()
            {
                self.columns = Some(columns(&self.format, names)?);
            }
            if self.block.is_empty() {
                break;
            }
            let known = read.rejects.len();
            self.take(read);
            text += text_bytes(&read.rejects[known..]);
        }
        Ok(at)
    }

    fn take(&self, read: &mut ReadReceipts) {
        let line = self.parser.row_line();
        let place = || format!("{}:{line}", self.file);
        for reject in &self.block.rejects {
            read.rejects.push(self.format.reject(&reject.raw, place(), reject.reason.clone()));
        }
        for (_, bytes) in self.block.iter() {
            let (Some(columns), Some(layout)) = (self.columns, self.parser.layout()) else {
                self.format.read_into(bytes, Around::default(), place, read);
                continue;
            };
            let receipt = cells(layout, &columns, bytes)
                .and_then(|fields| self.format.read(&fields, bytes, Around::default()));
            match receipt {
                Ok(Some(receipt)) => read.receipts.push(receipt),
                Ok(None) => read.ignored += 1,
                Err(reason) => {
                    let kept = as_object(layout, bytes);
                    let reject = self.format.rejected(bytes, Around::default(), place(), reason, kept);
                    read.rejects.push(reject);
                }
            }
        }
    }
}

/// A row as the object of its columns: that can be read without its header.
fn as_object(layout: &RowLayout, bytes: &[u8]) -> RejectedText {
    let Ok(parts) = layout.read(bytes) else { return RejectedText::of_other(bytes) };
    let MessageData::Columns(names, cells) = parts.data else { return RejectedText::of_other(bytes) };
    let mut text = Vec::new();
    serde_json::Serializer::new(&mut text)
        .collect_map(names.iter().zip(cells))
        .expect("texts can be written");
    RejectedText::of_receipt(&text)
}

/// Where the header has the mapping's columns.
fn columns(format: &ReceiptFormat, names: &[String]) -> Result<[Option<usize>; FIELDS], ReceiptFileError> {
    let paths = format.mapping.paths();
    let place = |field: usize| paths[field].and_then(|path| names.iter().position(|name| *name == path.text));
    let columns = std::array::from_fn(place);
    for needed in [&[STATUS][..], &[MESSAGE_ID, PROVIDER_ID]] {
        if needed.iter().all(|&field| columns[field].is_none()) {
            let wanted: Vec<_> =
                needed.iter().filter_map(|&field| paths[field]).map(|path| format!("`{path}`")).collect();
            return Err(ReceiptFileError::NoColumn { wanted: wanted.join(" or "), found: listed(names) });
        }
    }
    Ok(columns)
}

fn cells<'a>(
    layout: &'a RowLayout,
    columns: &[Option<usize>; FIELDS],
    bytes: &'a [u8],
) -> Result<Fields<'a>, String> {
    let mut fields = Fields::default();
    let parts = layout.read(bytes).map_err(|error| error.to_string())?;
    if let MessageData::Columns(_, cells) = parts.data {
        for (column, cell) in cells.enumerate() {
            for (field, place) in fields.iter_mut().zip(columns) {
                if *place == Some(column) {
                    *field = Some(FieldValue::Text(cell.into()));
                }
            }
        }
    }
    Ok(fields)
}
