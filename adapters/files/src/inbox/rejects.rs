//! `NAME.rejects.csv`: the rejected rows with their reasons, for a person to fix and drop again.
//!
//! The header is `row,line,reason,raw`. For a CSV feed the first record is `0,1,header,<the file's header
//! line>`, so that the rows keep their columns when they are dropped again.
//!
//! A cell that a spreadsheet would take for a formula (it starts with `=`, `+`, `-`, `@`, TAB or CR) is
//! exported behind a `'`, and so is one that starts with `'`: one leading `'` in a file is always ours, and
//! dropping it gives the row back byte by byte (F33).

use std::{
    borrow::Cow,
    fs::File,
    io::{self, BufReader, BufWriter, Read},
};

use csv_core::ReadFieldResult;
use postrider_actors::{model::file::Reject, ports::RejectSink};

use super::dir::{Dir, while_doing};

const HEADER: [&str; 4] = ["row", "line", "reason", "raw"];
const HEADER_LINE: &[u8] = b"row,line,reason,raw";
/// Which of the columns holds the row.
const RAW: usize = 3;

/// Writes an export under a hidden name until it is finished.
pub(super) struct RejectFile {
    dir: Dir,
    name: String,
    hidden: String,
    writer: Option<csv::Writer<BufWriter<File>>>,
}

impl RejectFile {
    /// Begins `name` in `dir`, with the header line of the file that the rows come from.
    pub(super) fn new(dir: Dir, name: String, header: Option<&[u8]>) -> io::Result<Self> {
        let hidden = format!(".{name}.tmp");
        let file = dir.create(&hidden, 0o644)?;
        let mut writer = csv::Writer::from_writer(BufWriter::new(file));
        writer.write_record(HEADER)?;
        if let Some(header) = header {
            writer.write_record([b"0", b"1", b"header".as_slice(), &neutral(header)])?;
        }
        Ok(Self { dir, name, hidden, writer: Some(writer) })
    }
}

impl RejectSink for RejectFile {
    fn push(&mut self, rejects: &[Reject]) -> io::Result<()> {
        let writer = self.writer.as_mut().expect("only `finish` takes it, and that takes the sink");
        for reject in rejects {
            let (row, line) = (reject.row.to_string(), reject.line.to_string());
            let reason = neutral(reject.reason.as_bytes());
            writer.write_record([row.as_bytes(), line.as_bytes(), &reason, &neutral(&reject.raw)])?;
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        let writer = self.writer.take().expect("only `finish` takes it");
        let file = writer.into_inner().map_err(|error| io::Error::from(error.error().kind()))?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        self.dir
            .rename(&self.hidden, &self.dir, &self.name)
            .map_err(|error| while_doing(error, format_args!("can't write {}", self.dir.at(&self.name))))
    }
}

impl Drop for RejectFile {
    fn drop(&mut self) {
        if self.writer.take().is_some() {
            // Unfinished. The next try overwrites what can't be removed.
            let _ = self.dir.remove(&self.hidden);
        }
    }
}

/// A cell that no spreadsheet takes for a formula.
fn neutral(cell: &[u8]) -> Cow<'_, [u8]> {
    match cell.first() {
        Some(b'=' | b'+' | b'-' | b'@' | b'\t' | b'\r' | b'\'') => Cow::Owned([b"'", cell].concat()),
        _ => Cow::Borrowed(cell),
    }
}

/// The rows inside `file` if it is an export of rejected rows, or `file` itself.
pub(super) fn unpack(mut file: impl Read + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
    // The longest start that must be looked at: a byte order mark, the header, CRLF.
    let mut start = Vec::with_capacity(32);
    file.by_ref().take(3 + HEADER_LINE.len() as u64 + 2).read_to_end(&mut start)?;
    let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&start);
    let body = text.strip_prefix(HEADER_LINE).and_then(|rest| match rest {
        [] => Some(rest),
        [b'\n', rest @ ..] | [b'\r', b'\n', rest @ ..] => Some(rest),
        _ => None,
    });
    Ok(match body {
        Some(body) => Box::new(RawColumn::new(io::Cursor::new(body.to_vec()).chain(file))),
        None => Box::new(io::Cursor::new(start).chain(file)),
    })
}

/// Streams the last column of an export, one row per line. Its memory does not depend on any cell's size.
struct RawColumn<R> {
    input: BufReader<R>,
    reader: csv_core::Reader,
    column: usize,
    /// Whether the cell that is read has begun: only its first byte may be the `'` of the export.
    begun: bool,
    record: u64,
    ready: Vec<u8>,
    taken: usize,
    ended: bool,
}

impl<R: Read> RawColumn<R> {
    fn new(input: R) -> Self {
        Self {
            input: BufReader::with_capacity(1 << 16, input),
            reader: csv_core::Reader::new(),
            column: 0,
            begun: false,
            record: 2,
            ready: Vec::new(),
            taken: 0,
            ended: false,
        }
    }

    fn fill(&mut self) -> io::Result<()> {
        use io::BufRead;
        let mut cell = [0; 4096];
        self.ready.clear();
        self.taken = 0;
        while self.ready.is_empty() && !self.ended {
            let input = self.input.fill_buf()?;
            let (result, read, wrote) = self.reader.read_field(input, &mut cell);
            self.input.consume(read);
            if self.column == RAW {
                let mut part = &cell[..wrote];
                if !self.begun && part.first() == Some(&b'\'') {
                    part = &part[1..];
                }
                self.begun |= wrote > 0;
                self.ready.extend_from_slice(part);
            }
            match result {
                ReadFieldResult::InputEmpty | ReadFieldResult::OutputFull => {}
                ReadFieldResult::Field { record_end } => self.end_cell(record_end)?,
                ReadFieldResult::End => self.ended = true,
            }
        }
        Ok(())
    }

    fn end_cell(&mut self, record_end: bool) -> io::Result<()> {
        if record_end != (self.column == RAW) {
            let text = format!(
                "record {} has not the 4 cells of an export of rejected rows: {}",
                self.record,
                std::str::from_utf8(HEADER_LINE).expect("it is ASCII")
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        self.begun = false;
        if record_end {
            self.ready.push(b'\n');
            self.column = 0;
            self.record += 1;
        } else {
            self.column += 1;
        }
        Ok(())
    }
}

impl<R: Read> Read for RawColumn<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.ready.len() {
            self.fill()?;
        }
        let bytes = buffer.len().min(self.ready.len() - self.taken);
        buffer[..bytes].copy_from_slice(&self.ready[self.taken..self.taken + bytes]);
        self.taken += bytes;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn export(header: Option<&[u8]>, rejects: &[Reject]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = Box::new(
            RejectFile::new(Dir::open(dir.path()).unwrap(), "a.rejects.csv".into(), header).unwrap(),
        );
        sink.push(rejects).unwrap();
        sink.finish().unwrap();
        let names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["a.rejects.csv"]);
        std::fs::read(dir.path().join("a.rejects.csv")).unwrap()
    }

    fn rows(bytes: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut rows = Vec::new();
        unpack(io::Cursor::new(bytes))?.read_to_end(&mut rows)?;
        Ok(rows)
    }

    fn reject(row: u64, raw: &[u8]) -> Reject {
        Reject { row, line: row + 1, reason: "-no".into(), raw: raw.to_vec() }
    }

    #[test]
    fn f33_formulas_are_neutralised_in_the_export_and_come_back_verbatim() {
        let raw: [&[u8]; 5] = [b"=cmd|' /C calc'!A0,1", b"+1", b"'x", b"\t@", b"7,\"=1\"\r\n2\""];
        let rejects: Vec<_> = (1..).zip(raw).map(|(row, raw)| reject(row, raw)).collect();
        let file = export(Some(b"=id,n"), &rejects);
        let text = String::from_utf8(file.clone()).unwrap();
        assert!(text.starts_with("row,line,reason,raw\n0,1,header,\"'=id,n\"\n1,2,'-no,\"'=cmd|"), "{text}");
        for record in csv::Reader::from_reader(&file[..]).records() {
            let record = record.unwrap();
            assert!(!record[3].starts_with(['=', '+', '-', '@', '\t', '\r']));
        }
        assert_eq!(rows(file).unwrap(), [b"=id,n".as_slice(), &raw.join(&b'\n'), b""].join(&b'\n'));
    }

    #[test]
    fn only_an_export_is_unpacked() {
        for plain in
            ["", "row,line", "row,line,reason,raw,x\n1,2,3,4,5\n", "row,line,reason,raws\n", "id\n1\n"]
        {
            assert_eq!(rows(plain.into()).unwrap(), plain.as_bytes());
        }
        assert_eq!(rows(b"row,line,reason,raw".to_vec()).unwrap(), b"");
        // As a spreadsheet saves it.
        assert_eq!(rows(b"\xef\xbb\xbfrow,line,reason,raw\r\n1,2,x,'=1\r\n".to_vec()).unwrap(), b"=1\n");
        let error = rows(b"row,line,reason,raw\n1,2,x,a\n2,3,x\n".to_vec()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("record 3"), "{error}");
        assert!(rows(b"row,line,reason,raw\n1,2,x,a,b\n".to_vec()).is_err());
    }

    #[test]
    fn an_export_that_is_not_finished_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        drop(RejectFile::new(Dir::open(dir.path()).unwrap(), "a".into(), None).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    proptest! {
        #[test]
        fn f33_exporting_is_invertible(raw in prop::collection::vec("[ -~\t\r'=éÿ\n\u{0}]{0,9}".prop_map(String::into_bytes), 0..9)) {
            let rejects: Vec<_> = (1..).zip(&raw).map(|(row, raw)| reject(row, raw)).collect();
            let mut expected = Vec::new();
            for raw in &raw {
                expected.extend(raw);
                expected.push(b'\n');
            }
            prop_assert_eq!(rows(export(None, &rejects)).unwrap(), expected);
        }
    }
}
