//! Lines: where they end, and how one that is too long streams by.

use super::file_error::FileError;

/// How much of an over-long line is kept in its [`Reject`].
pub const CUT_BYTES: usize = 256;

/// Ends the raw text of a row that was cut. A NUL is accepted by no format, so that half a row
/// can't be dropped again and taken for a whole one.
pub const CUT_MARK: u8 = 0;

/// The line at the start of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// `content` bytes without and `bytes` bytes with the line ending.
    Whole { content: usize, bytes: usize },
    /// It does not end here, and more is to come.
    Starved,
    /// Its content is longer than the limit.
    Overlong,
}

/// Finds the line at the start of `input`.
pub(super) fn line(input: &[u8], end: bool, max: usize) -> Line {
    let (content, bytes) = match memchr::memchr(b'\n', input) {
        Some(at) => (without_cr(&input[..at]), at + 1),
        // The byte after the limit may be the CR of a CRLF, the one after that can't be in a line that is
        // short enough.
        None if input.len() >= max + 2 => return Line::Overlong,
        None if !end => return Line::Starved,
        None => (without_cr(input), input.len()),
    };
    if content > max { Line::Overlong } else { Line::Whole { content, bytes } }
}

/// The length of a line's content: one CR before the line's end belongs to the ending.
pub(super) fn without_cr(line: &[u8]) -> usize {
    line.len() - usize::from(line.last() == Some(&b'\r'))
}

/// A row without its line ending.
pub(super) fn without_ending(row: &[u8]) -> &[u8] {
    let row = row.strip_suffix(b"\n").unwrap_or(row);
    &row[..without_cr(row)]
}

/// What is kept of a line that is too long.
#[derive(Debug, Default)]
pub(super) struct Overlong {
    /// Its bytes so far, line ending included.
    pub(super) bytes: u64,
    head: Vec<u8>,
    ends_with_cr: bool,
    ended_by_lf: bool,
}

impl Overlong {
    /// Moves on in the line; returns how many bytes it took and whether the line ended.
    pub(super) fn skip(&mut self, input: &[u8]) -> (usize, bool) {
        let ending = memchr::memchr(b'\n', input);
        let content = &input[..ending.unwrap_or(input.len())];
        let room = CUT_BYTES - self.head.len();
        self.head.extend_from_slice(&content[..content.len().min(room)]);
        if let Some(&last) = content.last() {
            self.ends_with_cr = last == b'\r';
        }
        let consumed = content.len() + usize::from(ending.is_some());
        self.bytes += consumed as u64;
        self.ended_by_lf = ending.is_some();
        (consumed, ending.is_some())
    }

    /// Its length without the line ending.
    pub(super) fn content_bytes(&self) -> u64 {
        self.bytes - u64::from(self.ended_by_lf) - u64::from(self.ends_with_cr)
    }

    #[cfg(test)]
    pub(super) fn raw_bytes(&self) -> usize {
        self.head.len() + 1
    }

    /// The start of the line, marked as cut.
    pub(super) fn into_raw(mut self) -> Vec<u8> {
        self.head.push(CUT_MARK);
        self.head
    }
}

const UTF8_BOM: &[u8] = b"\xef\xbb\xbf";

/// Starts of files that are not text, and what to do about them.
const COMPRESSED: [(&[u8], &str, &str); 3] = [
    (b"\x1f\x8b", "gzip", "drop it with a name that ends in `.gz`"),
    (b"\x28\xb5\x2f\xfd", "zstd", "drop it with a name that ends in `.zst`"),
    (b"PK\x03\x04", "zip (or spreadsheet)", "drop the text file inside it"),
];

/// Looks at the start of a file: how many bytes of byte order mark to drop, or `None` if it takes more
/// input to say.
pub(super) fn begin(input: &[u8], end: bool) -> Result<Option<usize>, FileError> {
    if input.len() < 4 && !end {
        return Ok(None);
    }
    if input.starts_with(b"\xff\xfe") || input.starts_with(b"\xfe\xff") {
        return Err(FileError::Utf16);
    }
    for (magic, kind, advice) in COMPRESSED {
        if input.starts_with(magic) {
            return Err(FileError::Compressed { kind, advice });
        }
    }
    Ok(Some(if input.starts_with(UTF8_BOM) { UTF8_BOM.len() } else { 0 }))
}
