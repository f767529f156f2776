//! `csv`: delimited cells under a header (RFC 4180), read by `csv-core`.
//!
//! A cell in double quotes may hold the delimiter, line breaks and doubled quotes. Cells are taken
//! verbatim, white space included. A quote inside an unquoted cell is a character like any other, and
//! text after a closing quote is appended to the cell, as most readers do, as long as the row is on
//! one line.
//!
//! A row is judged as a whole. If its structure is sound (the header's number of cells, every quote
//! closed, nothing after a closing quote if it spans several lines, no NUL, at most `max_row_bytes`), it is one row, accepted or rejected, on however many
//! lines. If not, where it ends is anybody's guess: one stray quote could swallow the rest of
//! the file. So only its first line is rejected, and reading continues at the next (F22).
//!
//! The work per line is bounded by `max_row_bytes`: a row is never read further, and reading it stops at
//! the first surplus cell.

use csv_core::{ReadRecordResult, Reader, ReaderBuilder, Terminator};

use super::{
    COLUMNS_MAX, FileError, NUL_IN_ROW, ParseStep, RowError, check_recipient,
    lines::{Line, line, without_cr},
};
use crate::model::{
    batch::{RowLayout, put_cell},
    file::NAMELY,
};

#[derive(Debug)]
pub(super) struct CsvRules {
    delimiter: u8,
    /// The recipient's column, if there is one …
    wanted: Option<String>,
    /// … and its place.
    recipient: Option<usize>,
    columns: usize,
    max: usize,
    reader: Reader,
    /// Whether `reader` stopped in the middle of a record.
    dirty: bool,
    cells: Vec<u8>,
    ends: Vec<usize>,
    header: Option<Vec<u8>>,
}

/// The record at the start of an input.
enum CsvRecord {
    /// Sound so far: `bytes` with and `content` bytes without the line ending, so many cells.
    Whole { content: usize, bytes: usize, cells: usize },
    /// More input is needed.
    Starved,
    /// Its structure is unsound.
    Unsound(Unsound),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Unsound {
    Open,
    TooLong,
    TooManyCells,
}

impl CsvRules {
    pub(super) fn new(delimiter: u8, wanted: Option<String>, max: usize) -> Self {
        // LF alone ends a record: CRLF is seen to here, and a lone CR is data.
        let reader = ReaderBuilder::new().delimiter(delimiter).terminator(Terminator::Any(b'\n')).build();
        Self {
            delimiter,
            wanted,
            recipient: None,
            columns: COLUMNS_MAX,
            max,
            reader,
            dirty: true,
            cells: Vec::new(),
            ends: Vec::new(),
            header: None,
        }
    }

    pub(super) fn header(&self) -> Option<&[u8]> {
        self.header.as_deref()
    }

    /// Reads the header, which is not a row, and settles the layout.
    pub(super) fn read_header(
        &mut self,
        rest: &[u8],
        end: bool,
        line: u64,
        layout: &mut Option<RowLayout>,
    ) -> Result<ParseStep, FileError> {
        if let Some(step) = blank(rest, end) {
            return Ok(step);
        }
        let refuse = |problem: String| FileError::Header { line, problem };
        let (content, bytes, cells) = match self.record(rest, end) {
            CsvRecord::Whole { content, bytes, cells } => (content, bytes, cells),
            CsvRecord::Starved => return Ok(ParseStep::Starved),
            CsvRecord::Unsound(Unsound::Open) => {
                return Err(refuse("has a quoted name that does not end".into()));
            }
            CsvRecord::Unsound(Unsound::TooLong) => {
                return Err(refuse(format!("is longer than max_row = {}", self.max)));
            }
            CsvRecord::Unsound(Unsound::TooManyCells) => {
                return Err(refuse(format!("has more than {COLUMNS_MAX} columns")));
            }
        };
        if rest[..content].contains(&0) {
            return Err(refuse("holds a NUL byte: is the file UTF-16, or no text at all?".into()));
        }
        let mut names = Vec::with_capacity(cells);
        let mut start = 0;
        for &cell_end in &self.ends[..cells] {
            let name = std::str::from_utf8(&self.cells[start..cell_end])
                .map_err(|_| refuse(format!("is not UTF-8: column {}", names.len() + 1)))?;
            if let Some(first) = names.iter().position(|known| known == name) {
                return Err(refuse(format!(
                    "has one name for columns {} and {}{NAMELY}{name:?}",
                    first + 1,
                    names.len() + 1
                )));
            }
            names.push(name.to_owned());
            start = cell_end;
        }
        if let Some(wanted) = &self.wanted {
            self.recipient = names.iter().position(|name| name == wanted);
            if self.recipient.is_none() {
                let (wanted, found) = (wanted.clone(), listed(&names));
                return Err(FileError::NoRecipientColumn { line, wanted, found });
            }
        }
        self.columns = names.len();
        self.header = Some(rest[..content].to_vec());
        *layout = Some(RowLayout::Columns { names, recipient: self.recipient.unwrap_or(0) });
        Ok(ParseStep::NoRow(bytes))
    }

    /// Reads one row and lays it out.
    pub(super) fn row(&mut self, rest: &[u8], end: bool, bytes: &mut Vec<u8>) -> ParseStep {
        if let Some(step) = blank(rest, end) {
            return step;
        }
        let reason = match self.record(rest, end) {
            CsvRecord::Starved => return ParseStep::Starved,
            CsvRecord::Whole { content, bytes: consumed, cells } if cells == self.columns => {
                let row = &rest[..content];
                let lines = memchr::memchr_iter(b'\n', row).count() as u64 + 1;
                if lines > 1 && !quotes_are_strict(row, self.delimiter) {
                    let reason = "text follows the closing quote of a cell that began lines before".into();
                    return self.first_line(rest, end, |_, _| reason);
                }
                if memchr::memchr(0, row).is_none() {
                    return match self.lay_out(bytes) {
                        Ok(()) => ParseStep::Row { bytes: consumed, lines },
                        Err(reason) => ParseStep::Refused { bytes: consumed, lines, raw: content, reason },
                    };
                }
                NUL_IN_ROW.into()
            }
            CsvRecord::Whole { cells, .. } => self.wrong_count(&cells.to_string()),
            CsvRecord::Unsound(Unsound::TooManyCells) => {
                return self.first_line(rest, end, |rules, line| {
                    // Counted only now, and no further than the line that is rejected anyway.
                    let found = rules.count_cells(line).map_or("more".to_owned(), |cells| cells.to_string());
                    rules.wrong_count(&found)
                });
            }
            CsvRecord::Unsound(Unsound::Open) => "a quoted cell that begins here does not end".into(),
            CsvRecord::Unsound(Unsound::TooLong) => {
                format!("the row that begins here does not end within max_row = {}", self.max).into()
            }
        };
        self.first_line(rest, end, |_, _| reason)
    }

    fn wrong_count(&self, found: &str) -> RowError {
        format!("expected {} cells as in the header, found {found}", self.columns).into()
    }

    /// Rejects the first line of a row whose structure is unsound.
    fn first_line(
        &mut self,
        rest: &[u8],
        end: bool,
        reason: impl FnOnce(&mut Self, &[u8]) -> RowError,
    ) -> ParseStep {
        match line(rest, end, self.max) {
            Line::Whole { content, bytes } => {
                ParseStep::Refused { bytes, lines: 1, raw: content, reason: reason(self, &rest[..content]) }
            }
            Line::Starved => ParseStep::Starved,
            Line::Overlong => ParseStep::Overlong,
        }
    }

    /// Reads the record at the start of `rest` into `cells` and `ends`.
    fn record(&mut self, rest: &[u8], end: bool) -> CsvRecord {
        if self.dirty {
            reset(&mut self.reader);
        }
        self.dirty = true;
        // A record that is short enough ends within its content and a CRLF.
        let window = &rest[..rest.len().min(self.max + 2)];
        if self.cells.len() <= window.len() {
            self.cells.resize(window.len() + 1, 0);
        }
        // One more than there should be, so that a surplus cell is seen as soon as it begins.
        self.ends.resize(self.columns + 1, 0);
        let (mut result, bytes, written, mut cells) =
            self.reader.read_record(window, &mut self.cells, &mut self.ends);
        let mut ended_by_lf = true;
        if result == ReadRecordResult::InputEmpty {
            if window.len() < rest.len() || window.len() == self.max + 2 {
                let open = memchr::memchr(b'\n', window).is_some();
                return CsvRecord::Unsound(if open { Unsound::Open } else { Unsound::TooLong });
            }
            if !end {
                return CsvRecord::Starved;
            }
            // The file ends without a line break. With one it ends the record, unless a quote is open.
            let (last, _, _, more) =
                self.reader.read_record(b"\n", &mut self.cells[written..], &mut self.ends[cells..]);
            result = last;
            cells += more;
            ended_by_lf = false;
        }
        match result {
            ReadRecordResult::Record => self.dirty = false,
            ReadRecordResult::OutputEndsFull => return CsvRecord::Unsound(Unsound::TooManyCells),
            ReadRecordResult::InputEmpty => return CsvRecord::Unsound(Unsound::Open),
            ReadRecordResult::OutputFull | ReadRecordResult::End => {
                unreachable!("the output has room for the input, which is not empty")
            }
        }
        let with_cr = &rest[..bytes - usize::from(ended_by_lf)];
        let content = without_cr(with_cr);
        if content > self.max {
            return CsvRecord::Unsound(Unsound::TooLong);
        }
        if content < with_cr.len() {
            // A CR before the record's end is outside of quotes, so it ends the last cell.
            self.ends[cells - 1] -= 1;
        }
        if cells > self.columns {
            return CsvRecord::Unsound(Unsound::TooManyCells);
        }
        CsvRecord::Whole { content, bytes, cells }
    }

    fn lay_out(&self, bytes: &mut Vec<u8>) -> Result<(), RowError> {
        let ends = &self.ends[..self.columns];
        let all = ends.last().map_or(0, |&last| last);
        // One check for the whole row; a cell may still begin or end inside a character only if the
        // delimiter were part of one, and it is ASCII.
        let Ok(text) = std::str::from_utf8(&self.cells[..all]) else {
            return Err(self.invalid_cell());
        };
        let mut start = 0;
        for (column, &end) in ends.iter().enumerate() {
            let Some(cell) = text.get(start..end) else { return Err(self.invalid_cell()) };
            if Some(column) == self.recipient {
                check_recipient(cell)?;
            }
            put_cell(bytes, cell);
            start = end;
        }
        Ok(())
    }

    fn invalid_cell(&self) -> RowError {
        let mut start = 0;
        for (column, &end) in self.ends[..self.columns].iter().enumerate() {
            if std::str::from_utf8(&self.cells[start..end]).is_err() {
                return format!("invalid UTF-8 in column {}", column + 1).into();
            }
            start = end;
        }
        "invalid UTF-8".into()
    }

    /// How many cells the one line has, if it is a record of its own.
    fn count_cells(&mut self, line: &[u8]) -> Option<usize> {
        self.dirty = true;
        reset(&mut self.reader);
        let mut cells = 0;
        let mut ends = [0; 64];
        let mut output = vec![0; line.len() + 2];
        let mut written = 0;
        for (mut input, last) in [(line, false), (b"\n".as_slice(), true)] {
            loop {
                let (result, read, wrote, ended) =
                    self.reader.read_record(input, &mut output[written..], &mut ends);
                input = &input[read..];
                written += wrote;
                cells += ended;
                match result {
                    ReadRecordResult::OutputEndsFull => {}
                    ReadRecordResult::InputEmpty if !last => break,
                    ReadRecordResult::Record => return Some(cells),
                    _ => return None,
                }
            }
        }
        None
    }
}

/// Whether every quoted cell of a row ends at its closing quote. Where it does not, a quote that was never
/// closed has probably run into the opening quote of a later row and swallowed the rows between.
fn quotes_are_strict(row: &[u8], delimiter: u8) -> bool {
    let mut rest = row;
    loop {
        let Some(quoted) = rest.strip_prefix(b"\"") else {
            match memchr::memchr(delimiter, rest) {
                Some(at) => rest = &rest[at + 1..],
                None => return true,
            }
            continue;
        };
        let mut cell = quoted;
        rest = loop {
            let Some(at) = memchr::memchr(b'"', cell) else { return false };
            match cell.get(at + 1) {
                Some(b'"') => cell = &cell[at + 2..],
                Some(&next) if next == delimiter => break &cell[at + 2..],
                Some(_) => return false,
                None => return true,
            }
        };
    }
}

/// Brings a reader to the start of a record. A fresh one drops a byte order mark, but one in the middle of
/// the file is data; a reader that has read a record is not fresh. (A clone is no way out: `csv-core`
/// 0.1.13 clones readers without their tables.)
fn reset(reader: &mut Reader) {
    reader.reset();
    let (result, ..) = reader.read_record(b"x\n", &mut [0; 2], &mut [0; 2]);
    debug_assert_eq!(result, ReadRecordResult::Record);
}

/// A blank line at the start of `rest`, or too little input to decide; `None` if a record starts here.
fn blank(rest: &[u8], end: bool) -> Option<ParseStep> {
    match rest {
        [b'\n', ..] => Some(ParseStep::NoRow(1)),
        [b'\r', b'\n', ..] => Some(ParseStep::NoRow(2)),
        [b'\r'] if end => Some(ParseStep::NoRow(1)),
        [b'\r'] => Some(ParseStep::Starved),
        _ => None,
    }
}

/// How many columns there are, and their names for the operator: enough of them to see what is wrong.
pub(in crate::model) fn listed(names: &[String]) -> String {
    const SHOWN: usize = 20;
    // Escaped and cut: the header is foreign text (F27).
    let shown =
        names.iter().take(SHOWN).map(|name| name.chars().take(40).flat_map(char::escape_debug).collect());
    let text = shown.collect::<Vec<String>>().join(", ");
    let rest = if names.len() > SHOWN { " and others" } else { "" };
    let columns = if names.len() == 1 { "column" } else { "columns" };
    format!("{} {columns}{NAMELY}{text}{rest}", names.len())
}
