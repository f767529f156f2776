//! The formats that a feed reads: streaming push parsers, pure and bounded.
//!
//! The caller owns the buffer. It hands the parser what it has, takes the rows out of the
//! [`RowBlock`], drops the consumed bytes and refills. Memory is the caller's buffer, one block and
//! one row, whatever the file holds (I8). How the input is cut into chunks never changes the result.
//!
//! What holds for every format (`docs/formats.md` is the operator's version of this):
//!
//! - Text is UTF-8; a byte order mark at the start is dropped. A UTF-16 or compressed file is refused
//!   as a whole.
//! - A line ends with LF or CRLF, the last one may end with the file. CR alone ends nothing.
//! - Blank lines are not rows. Every other row has a number, from 1, and ends up in the block as a
//!   [`ParsedRow`] or as a [`Reject`], never as both or neither (I1).
//! - A row with a NUL byte or invalid UTF-8 is rejected, and so is a recipient that is empty, blank
//!   or holds a control character.
//! - A line longer than `max_row_bytes` is one rejected row, skipped as it streams by.

mod csv;
pub mod entry;
mod file_error;
mod lines;
mod ndjson;
mod text;

use super::{batch::RowLayout, file::Reject, rendering::BodyChecks};
pub(super) use csv::listed;
pub use file_error::FileError;
pub use lines::{CUT_BYTES, CUT_MARK};
use lines::{Line, Overlong};
pub(super) use ndjson::{Checked, KeySeed, OpenKeys, TWICE};
pub use postrider_settings::Format;

/// The most columns that a CSV header may have. Every batch carries the header's names.
pub const COLUMNS_MAX: usize = 1024;

/// One accepted row of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParsedRow {
    /// Its number in the file, from 1.
    pub row: u64,
    /// Where its laid-out bytes end in the block; they begin where the row before ends.
    pub end: u32,
    /// The byte after it in the decompressed stream.
    pub offset: u64,
}

/// What one call of [`RowParser::parse`] found. Reused: [`RowBlock::clear`] keeps the capacity.
#[derive(Debug)]
pub struct RowBlock {
    /// The accepted rows' bytes, laid out by the parser's [`RowLayout`], one after the other.
    pub bytes: Vec<u8>,
    /// The accepted rows, in order.
    pub rows: Vec<ParsedRow>,
    /// The rejected rows, in order. Merge by `row` for the order of the file.
    pub rejects: Vec<Reject>,
    rows_max: usize,
}

impl RowBlock {
    /// An empty block that is full at `rows_max` rows, rejected ones counted.
    pub fn new(rows_max: usize) -> Self {
        Self { bytes: Vec::new(), rows: Vec::new(), rejects: Vec::new(), rows_max: rows_max.max(1) }
    }

    /// Empties it, for the next call.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.rows.clear();
        self.rejects.clear();
    }

    /// Whether the parser stopped for want of room in the block rather than for want of input.
    pub fn is_full(&self) -> bool {
        self.rows.len() + self.rejects.len() >= self.rows_max
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.rejects.is_empty()
    }

    /// The laid-out bytes of the accepted row at `index`.
    pub fn row_bytes(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { self.rows[index - 1].end };
        &self.bytes[start as usize..self.rows[index].end as usize]
    }

    /// The accepted rows with their laid-out bytes.
    pub fn iter(&self) -> impl Iterator<Item = (ParsedRow, &[u8])> {
        let mut start = 0;
        self.rows.iter().map(move |&row| {
            let bytes = &self.bytes[start..row.end as usize];
            start = row.end as usize;
            (row, bytes)
        })
    }
}

/// How far a parser has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The byte after the last row, blank line or header that was consumed, in the decompressed stream.
    pub offset: u64,
    /// Rows before `offset`: accepted, rejected, and those that `skip_rows` left out.
    pub rows: u64,
    /// The number of the line that starts at `offset`, from 1.
    pub line: u64,
}

/// Why a row is refused, for the operator. No cell is quoted: a reason may be logged (I10).
#[derive(Clone, Debug, PartialEq, Eq)]
struct RowError(String);

impl From<&str> for RowError {
    fn from(reason: &str) -> Self {
        Self(reason.to_owned())
    }
}

impl From<String> for RowError {
    fn from(reason: String) -> Self {
        Self(reason)
    }
}

#[derive(Debug)]
enum Rules {
    Text,
    /// Lines without white space around them.
    Lines,
    Csv(Box<csv::CsvRules>),
    Ndjson(Box<ndjson::NdjsonRules>),
}

/// Reads the rows of one file. See the module for what it accepts.
#[derive(Debug)]
pub struct RowParser {
    rules: Rules,
    max_row_bytes: usize,
    skip_rows: u64,
    begun: bool,
    overlong: Option<Overlong>,
    position: Position,
    /// Where the last row began.
    line: u64,
    layout: Option<RowLayout>,
    bodies: Option<BodyChecks>,
}

/// What the rules made of the input's beginning.
enum ParseStep {
    /// More input is needed.
    Starved,
    /// A blank line or a header of so many bytes.
    NoRow(usize),
    /// A row, laid out in the block, of so many bytes on so many lines.
    Row { bytes: usize, lines: u64 },
    /// A row that is refused.
    Refused { bytes: usize, lines: u64, raw: usize, reason: RowError },
    /// The line that begins here is too long: skip it as it streams by.
    Overlong,
}

impl RowParser {
    /// A parser at the start of a file. Rows longer than `max_row_bytes`, line ending not counted, are
    /// rejected. The format has passed [`Format::check`].
    pub fn new(format: &Format, max_row_bytes: usize) -> Self {
        let (rules, layout) = match format {
            Format::Text => (Rules::Text, Some(RowLayout::Lines)),
            Format::Csv { delimiter, recipient } => {
                let rules = csv::CsvRules::new(*delimiter, Some(recipient.clone()), max_row_bytes);
                (Rules::Csv(Box::new(rules)), None)
            }
            Format::Ndjson { recipient } => {
                let rules = ndjson::NdjsonRules::new(recipient.clone());
                (Rules::Ndjson(Box::new(rules)), Some(RowLayout::Objects))
            }
        };
        Self::with(rules, max_row_bytes, layout)
    }

    /// Lines of anything, laid out as they are without the white space around them: what is not a message and
    /// has no recipient.
    pub(super) fn lines(max_row_bytes: usize) -> Self {
        Self::with(Rules::Lines, max_row_bytes, Some(RowLayout::Lines))
    }

    /// Delimited cells under a header, none of which is a recipient.
    pub(super) fn cells(delimiter: u8, max_row_bytes: usize) -> Self {
        Self::with(
            Rules::Csv(Box::new(csv::CsvRules::new(delimiter, None, max_row_bytes))),
            max_row_bytes,
            None,
        )
    }

    fn with(rules: Rules, max_row_bytes: usize, layout: Option<RowLayout>) -> Self {
        Self {
            rules,
            max_row_bytes,
            skip_rows: 0,
            begun: false,
            overlong: None,
            position: Position { offset: 0, rows: 0, line: 1 },
            line: 1,
            layout,
            bodies: None,
        }
    }

    /// The line that the last row began on.
    pub(super) fn row_line(&self) -> u64 {
        self.line
    }

    /// Counts the first `rows` rows without putting them into a block: how a file is resumed behind
    /// its checkpoint.
    #[must_use]
    pub fn skip_rows(mut self, rows: u64) -> Self {
        self.skip_rows = rows;
        self
    }

    /// Rejects rows whose bodies can't be made.
    #[must_use]
    pub fn checking(mut self, bodies: BodyChecks) -> Self {
        self.bodies = Some(bodies);
        self
    }

    /// What was found about bodies.
    pub fn bodies(&self) -> Option<&BodyChecks> {
        self.bodies.as_ref()
    }

    /// The smallest buffer that always lets [`RowParser::parse`] consume something.
    pub fn input_bytes_min(&self) -> usize {
        // A row and its CRLF.
        self.max_row_bytes + 2
    }

    /// How rows are laid out: known at once for text and NDJSON, after the header for CSV.
    pub fn layout(&self) -> Option<&RowLayout> {
        self.layout.as_ref()
    }

    /// The CSV header as it stood in the file, without its line ending, once it was read.
    pub fn header(&self) -> Option<&[u8]> {
        match &self.rules {
            Rules::Csv(rules) => rules.header(),
            Rules::Text | Rules::Lines | Rules::Ndjson(_) => None,
        }
    }

    /// How far it has come.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Reads whole rows from the start of `input` into `block` and returns how many bytes it consumed;
    /// `end` says that nothing follows. It stops when the block is full or the rest holds no whole row.
    ///
    /// The file is finished when a call with `end` has consumed all of its input. A caller who offers
    /// [`RowParser::input_bytes_min`] bytes or more always makes progress; one who offers less at a
    /// time reads the same rows, more slowly. After an error the parser is of no further use.
    pub fn parse(&mut self, input: &[u8], end: bool, block: &mut RowBlock) -> Result<usize, FileError> {
        let mut at = 0;
        if !self.begun {
            match lines::begin(input, end)? {
                Some(bytes) => at = bytes,
                None => return Ok(0),
            }
            self.begun = true;
            self.position.offset += at as u64;
        }
        while at < input.len() && !block.is_full() {
            let rest = &input[at..];
            if let Some(overlong) = &mut self.overlong {
                let (consumed, ended) = overlong.skip(rest);
                at += consumed;
                if ended {
                    self.end_overlong(block);
                }
                continue;
            }
            // What a row to be skipped lays out is taken back: skipping must judge rows as reading does.
            let laid_out = block.bytes.len();
            match self.step(rest, end, block)? {
                ParseStep::Starved => break,
                ParseStep::NoRow(bytes) => {
                    self.position.line += memchr::memchr_iter(b'\n', &rest[..bytes]).count() as u64;
                    self.position.offset += bytes as u64;
                    at += bytes;
                }
                ParseStep::Row { bytes, lines } => {
                    let line = self.position.line;
                    self.count_row(bytes as u64, lines);
                    at += bytes;
                    if self.position.rows <= self.skip_rows {
                        block.bytes.truncate(laid_out);
                    } else if let Err(reason) = self.check_body(&block.bytes[laid_out..]) {
                        block.bytes.truncate(laid_out);
                        self.reject(block, line, reason, || lines::without_ending(&rest[..bytes]).to_vec());
                    } else {
                        block.rows.push(ParsedRow {
                            row: self.position.rows,
                            end: block.bytes.len() as u32,
                            offset: self.position.offset,
                        });
                    }
                }
                ParseStep::Refused { bytes, lines, raw, reason } => {
                    block.bytes.truncate(laid_out);
                    let line = self.position.line;
                    self.count_row(bytes as u64, lines);
                    at += bytes;
                    self.reject(block, line, reason.0, || rest[..raw].to_vec());
                }
                ParseStep::Overlong => self.overlong = Some(Overlong::default()),
            }
        }
        if end && at == input.len() && self.overlong.is_some() {
            self.end_overlong(block);
        }
        Ok(at)
    }

    fn step(&mut self, rest: &[u8], end: bool, block: &mut RowBlock) -> Result<ParseStep, FileError> {
        if let Rules::Csv(rules) = &mut self.rules {
            return if self.layout.is_some() {
                Ok(rules.row(rest, end, &mut block.bytes))
            } else {
                rules.read_header(rest, end, self.position.line, &mut self.layout)
            };
        }
        let (content, bytes) = match lines::line(rest, end, self.max_row_bytes) {
            Line::Whole { content, bytes } => (content, bytes),
            Line::Starved => return Ok(ParseStep::Starved),
            Line::Overlong => return Ok(ParseStep::Overlong),
        };
        let line = &rest[..content];
        let taken = match &mut self.rules {
            Rules::Text => text::lay_out(line, &mut block.bytes),
            Rules::Lines => text::lay_out_line(line, &mut block.bytes),
            Rules::Ndjson(rules) => rules.lay_out(line, &mut block.bytes),
            Rules::Csv(_) => unreachable!("read above"),
        };
        Ok(match taken {
            Ok(true) => ParseStep::Row { bytes, lines: 1 },
            Ok(false) => ParseStep::NoRow(bytes),
            Err(reason) => ParseStep::Refused { bytes, lines: 1, raw: content, reason },
        })
    }

    fn check_body(&mut self, row: &[u8]) -> Result<(), String> {
        let (Some(bodies), Some(layout)) = (&mut self.bodies, &self.layout) else { return Ok(()) };
        bodies.check(self.position.rows, layout, row)
    }

    fn end_overlong(&mut self, block: &mut RowBlock) {
        let Some(overlong) = self.overlong.take() else { return };
        let line = self.position.line;
        self.count_row(overlong.bytes, 1);
        let reason = format!(
            "the line is {} bytes long, longer than max_row = {}; it is cut here",
            overlong.content_bytes(),
            self.max_row_bytes
        );
        self.reject(block, line, reason, || overlong.into_raw());
    }

    fn count_row(&mut self, bytes: u64, lines: u64) {
        self.line = self.position.line;
        self.position.offset += bytes;
        self.position.rows += 1;
        self.position.line += lines;
    }

    fn reject(&self, block: &mut RowBlock, line: u64, reason: String, raw: impl FnOnce() -> Vec<u8>) {
        if self.position.rows > self.skip_rows {
            block.rejects.push(Reject { row: self.position.rows, line, reason, raw: raw() });
        }
    }
}

/// The rules for a recipient, whatever it was found in.
fn check_recipient(recipient: &str) -> Result<(), RowError> {
    if recipient.bytes().all(|byte| byte == b' ' || byte == b'\t') {
        return Err("the recipient is empty".into());
    }
    // One look at the bytes settles it for ASCII: C1 controls are the only others.
    let plain = recipient.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    if !plain && recipient.chars().any(char::is_control) {
        return Err("the recipient holds a control character".into());
    }
    Ok(())
}

/// The rules for a row's bytes, whatever the format.
fn check_text(row: &[u8]) -> Result<&str, RowError> {
    match std::str::from_utf8(row) {
        Ok(text) if !row.contains(&0) => Ok(text),
        Ok(_) => Err(NUL_IN_ROW.into()),
        Err(error) => Err(format!("invalid UTF-8 at byte {} of the row", error.valid_up_to() + 1).into()),
    }
}

const NUL_IN_ROW: &str = "the row holds a NUL byte";

#[cfg(test)]
mod tests;
