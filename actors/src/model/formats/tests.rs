use proptest::prelude::*;

use super::*;
use crate::model::batch::MessageData;

const MAX: usize = 40;

fn csv(recipient: &str) -> Format {
    Format::Csv { delimiter: b',', recipient: recipient.into() }
}

fn ndjson() -> Format {
    Format::Ndjson { recipient: "id".into() }
}

/// Everything that is read from a file.
#[derive(Debug, PartialEq, Eq)]
struct ParsedFile {
    /// Row, recipient and data, as text.
    rows: Vec<(u64, String, String)>,
    offsets: Vec<u64>,
    rejects: Vec<Reject>,
    end: Position,
}

/// Reads `input` as a caller does: a buffer that is refilled with `chunk(i)` bytes and a block of so many rows.
fn read_in(
    format: &Format,
    input: &[u8],
    max: usize,
    skip: u64,
    rows_max: usize,
    mut chunk: impl FnMut() -> usize,
) -> Result<ParsedFile, FileError> {
    let mut parser = RowParser::new(format, max).skip_rows(skip);
    let mut block = RowBlock::new(rows_max);
    let mut read = ParsedFile { rows: vec![], offsets: vec![], rejects: vec![], end: parser.position() };
    let (mut buffer, mut left) = (Vec::new(), input);
    loop {
        let more = chunk().min(left.len());
        buffer.extend_from_slice(&left[..more]);
        left = &left[more..];
        loop {
            block.clear();
            let before = parser.position();
            let consumed = parser.parse(&buffer, left.is_empty(), &mut block)?;
            buffer.drain(..consumed);
            let layout = parser.layout().cloned();
            for (row, bytes) in block.iter() {
                let layout = layout.as_ref().expect("rows have a layout");
                let parts = layout.read(bytes).expect("rows are laid out by the layout");
                let data = match parts.data {
                    MessageData::None => String::new(),
                    MessageData::Columns(_, cells) => cells.collect::<Vec<_>>().join("|"),
                    MessageData::Object(object) => object.to_owned(),
                };
                read.rows.push((row.row, parts.recipient.to_owned(), data));
                read.offsets.push(row.offset);
            }
            read.rejects.append(&mut block.rejects.clone());
            assert!(parser.position().offset >= before.offset);
            if !block.is_full() {
                break;
            }
        }
        if left.is_empty() {
            assert_eq!(buffer.len(), 0, "the end consumes everything");
            read.end = parser.position();
            return Ok(read);
        }
    }
}

fn read(format: &Format, input: &[u8]) -> Result<ParsedFile, FileError> {
    read_in(format, input, MAX, 0, 1000, || usize::MAX)
}

/// Recipients of the accepted rows.
fn accepted(format: &Format, input: impl AsRef<[u8]>) -> Vec<String> {
    read(format, input.as_ref()).unwrap().rows.into_iter().map(|(_, recipient, _)| recipient).collect()
}

/// Row, line and reason of the rejected rows.
fn rejected(format: &Format, input: impl AsRef<[u8]>) -> Vec<(u64, u64, String)> {
    let read = read(format, input.as_ref()).unwrap();
    read.rejects.into_iter().map(|reject| (reject.row, reject.line, reject.reason)).collect()
}

fn reason(format: &Format, input: impl AsRef<[u8]>) -> String {
    let mut rejects = rejected(format, input);
    assert_eq!(rejects.len(), 1, "{rejects:?}");
    rejects.remove(0).2
}

#[test]
fn f21_line_ends_marks_and_blanks_are_no_part_of_a_row() {
    for input in ["a\nb\n", "a\r\nb\r\n", "a\nb", "\u{feff}a\nb", "\n a\t\n\r\n  \nb\n\n", "a\nb\r"] {
        assert_eq!(accepted(&Format::Text, input), ["a", "b"], "{input:?}");
        assert_eq!(read(&Format::Text, input.as_bytes()).unwrap().end.rows, 2, "{input:?}");
    }
    // Only at the start of a file is the mark a mark, and a lone CR ends no line.
    assert_eq!(accepted(&Format::Text, "a\n\u{feff}b\n"), ["a", "\u{feff}b"]);
    assert_eq!(accepted(&csv("id"), "\u{feff}id\na\n\u{feff}b\n"), ["a", "\u{feff}b"]);
    assert_eq!(reason(&Format::Text, "a\rb\n"), "the recipient holds a control character");
}

#[test]
fn f21_bad_bytes_cost_their_row_and_are_reported_with_row_and_line() {
    let input = b"a\n\nb\0\nc\xff\nd\n\x1b[31m\n\xc2\x85\n";
    let read = read(&Format::Text, input).unwrap();
    assert_eq!(
        read.rows.iter().map(|(row, id, _)| (*row, id.as_str())).collect::<Vec<_>>(),
        [(1, "a"), (4, "d")]
    );
    let control = "the recipient holds a control character".to_owned();
    assert_eq!(
        rejected(&Format::Text, input),
        [
            (2, 3, "the row holds a NUL byte".to_owned()),
            (3, 4, "invalid UTF-8 at byte 2 of the row".to_owned()),
            (5, 6, control.clone()),
            (6, 7, control),
        ]
    );
    assert_eq!(read.rejects[1].raw, b"c\xff");
    assert_eq!(read.end, Position { offset: input.len() as u64, rows: 6, line: 8 });

    let input = b"id,n\n1,\0\n2,\xff\n\"3\n\xff\",x\n4,ok\n";
    assert_eq!(accepted(&csv("id"), input), ["4"]);
    assert_eq!(
        rejected(&csv("id"), input),
        [
            (1, 2, "the row holds a NUL byte".to_owned()),
            (2, 3, "invalid UTF-8 in column 2".to_owned()),
            (3, 4, "invalid UTF-8 in column 1".to_owned()),
        ]
    );
}

#[test]
fn f21_a_character_split_by_the_delimiter_is_no_character() {
    assert_eq!(reason(&csv("id"), b"id,n\n\xc3,\xa9\n"), "invalid UTF-8 in column 1");
}

#[test]
fn f21_files_that_are_no_utf_8_text_are_refused_with_advice() {
    for format in [Format::Text, csv("id"), ndjson()] {
        assert_eq!(read(&format, b"\xff\xfei\0d\0\n\0"), Err(FileError::Utf16));
        assert_eq!(read(&format, b"\xfe\xff\0i\0d\0\n"), Err(FileError::Utf16));
        let error = read(&format, b"\x1f\x8b\x08\0\0\0").unwrap_err().to_string();
        assert!(error.contains("gzip") && error.contains(".gz"), "{error}");
    }
    // UTF-16 without a mark: NULs give it away.
    let error = read(&csv("id"), b"i\0d\0\n\0").unwrap_err().to_string();
    assert!(error.starts_with("line 1:") && error.contains("UTF-16"), "{error}");
}

#[test]
fn f20_a_line_at_the_limit_is_read_and_one_byte_more_is_rejected() {
    for format in [Format::Text, csv("id")] {
        for ending in ["\n", "\r\n", ""] {
            let (fits, long) = ("x".repeat(MAX), "x".repeat(MAX + 1));
            assert_eq!(accepted(&format, format!("id\n{fits}{ending}")).pop(), Some(fits));
            let reason = reason(&format, format!("id\n{long}{ending}"));
            assert_eq!(
                reason,
                format!("the line is {} bytes long, longer than max_row = {MAX}; it is cut here", MAX + 1)
            );
        }
    }
}

#[test]
fn f20_a_huge_line_is_one_rejected_row_in_flat_memory() {
    for format in [Format::Text, ndjson(), csv("id")] {
        let mut parser = RowParser::new(&format, MAX);
        let mut block = RowBlock::new(100);
        let chunk = [b'['; 4096];
        parser
            .parse(
                if matches!(format, Format::Csv { .. }) { b"id\r\n" } else { b"\n\n\n\n" },
                false,
                &mut block,
            )
            .unwrap();
        for _ in 0..10_000 {
            assert_eq!(parser.parse(&chunk, false, &mut block).unwrap(), chunk.len());
            assert!(block.is_empty());
        }
        let kept = parser.overlong.as_ref().map(lines::Overlong::raw_bytes);
        assert_eq!(kept, Some(CUT_BYTES + 1));
        let last: &[u8] = if matches!(format, Format::Ndjson { .. }) { b"\n{\"id\":1}\n" } else { b"\n1\n" };
        assert_eq!(parser.parse(last, true, &mut block).unwrap(), last.len());
        assert_eq!(block.rejects.len(), 1);
        assert_eq!(block.rejects[0].raw.len(), CUT_BYTES + 1);
        assert!(block.rejects[0].reason.contains("40960000 bytes"), "{}", block.rejects[0].reason);
        assert_eq!(block.rows[0].row, 2, "the next row is read");
    }
}

#[test]
fn f20_a_row_that_was_cut_is_never_taken_for_a_whole_one() {
    let long = "7".repeat(CUT_BYTES * 2);
    let object = format!("{{\"id\":\"{long}\"}}");
    for (format, head, line) in
        [(Format::Text, "", &long), (csv("id"), "id\n", &long), (ndjson(), "", &object)]
    {
        let mut raw = read(&format, format!("{head}{line}\n").as_bytes()).unwrap().rejects.remove(0).raw;
        raw.push(b'\n');
        let again = read_in(&format, &[head.as_bytes(), &raw].concat(), 65536, 0, 10, || 9999).unwrap();
        assert_eq!((again.rows.len(), again.rejects.len()), (0, 1));
    }
}

#[test]
fn f24_empty_files_headers_alone_and_missing_line_breaks_count_right() {
    for (format, input, rows) in [
        (Format::Text, "", 0),
        (Format::Text, "\n\n", 0),
        (Format::Text, "a", 1),
        (csv("id"), "", 0),
        (csv("id"), "\u{feff}", 0),
        (csv("id"), "id", 0),
        (csv("id"), "id\n", 0),
        (csv("id"), "id\r\n\r\n", 0),
        (csv("id"), "\n\nid\na", 1),
        (csv("id"), "id\n\"a\"", 1),
        (ndjson(), "", 0),
        (ndjson(), " \n{\"id\":1}", 1),
    ] {
        let read = read(&format, input.as_bytes()).unwrap();
        assert_eq!((read.rows.len(), read.end.rows), (rows, rows as u64), "{input:?}");
        assert_eq!(read.end.offset, input.len() as u64);
    }
}

#[test]
fn cells_are_taken_verbatim() {
    let input = "a;id;c\r\n\"x;\"\"y\"\"\r\nz\"; 7 ;\r\n\"\";\"8\"\"\";=cmd|' /C calc'!A0\r\n";
    let format = Format::Csv { delimiter: b';', recipient: "id".into() };
    let read = read(&format, input.as_bytes()).unwrap();
    assert_eq!(
        read.rows,
        [
            (1, " 7 ".to_owned(), "x;\"y\"\r\nz| 7 |".to_owned()),
            // F33: verbatim in the payload.
            (2, "8\"".to_owned(), "|8\"|=cmd|' /C calc'!A0".to_owned()),
        ]
    );
    assert_eq!(read.end.line, 5);
    // A CR inside of quotes is data, even at the record's end.
    assert_eq!(
        accepted(&Format::Csv { delimiter: b'\t', recipient: "id".into() }, "id\tn\r\n1\t\"x\r\"\r\n"),
        ["1"]
    );
    let kept = super::tests::read(&csv("id"), b"id,n\r\n1,\"x\r\"\r\n").unwrap();
    assert_eq!(kept.rows[0].2, "1|x\r");
}

#[test]
fn a_header_that_can_t_be_used_fails_the_file_and_says_why() {
    let error = |input: &[u8]| read(&csv("user_id"), input).unwrap_err().to_string();
    let text = error(b"\nname,mail\nx,y\n");
    assert!(text.starts_with("line 2: no column is named `user_id`"), "{text}");
    assert!(text.contains("`recipient`") && text.contains("name, mail"), "{text}");
    assert!(error(b"user_id,a,a\n").contains("columns 2 and 3"));
    assert!(error(b"user_id,\xff\n").contains("not UTF-8: column 2"));
    assert!(error(b"user_id,\"a\n1,2\n").contains("does not end"));
    assert!(error("x".repeat(MAX + 1).as_bytes()).contains("max_row = 40"));
    assert!(!error(b"\x1b[2J,b\n").contains('\x1b'), "F27: foreign text is escaped");
    // pandas leaves its index column without a name.
    assert_eq!(accepted(&csv("user_id"), b",user_id\n0,a\n"), ["a"]);

    let wide = |columns: usize| (0..columns).map(|n| format!("c{n}")).collect::<Vec<_>>().join(",");
    let read = |columns| read_in(&csv("c0"), wide(columns).as_bytes(), 65536, 0, 10, || usize::MAX);
    assert!(read(COLUMNS_MAX).is_ok());
    assert!(read(COLUMNS_MAX + 1).unwrap_err().to_string().contains("more than 1024"));
}

#[test]
fn f22_an_unclosed_quote_costs_its_line_and_no_other() {
    let filler = "7,n\n".repeat(20);
    let input = format!("id,n\n1,a\n2,\"open\n{filler}8,b\n");
    assert_eq!(
        rejected(&csv("id"), &input),
        [(2, 3, "a quoted cell that begins here does not end".to_owned())]
    );
    assert_eq!(accepted(&csv("id"), &input).len(), 22);
    // At the end of the file, before the limit.
    let input = "id,n\n1,a\n2,\"open\n3,c\n4,d";
    assert_eq!(rejected(&csv("id"), input).len(), 1);
    assert_eq!(accepted(&csv("id"), input), ["1", "3", "4"]);
    assert_eq!(accepted(&csv("id"), "id\n1\n\"2"), ["1"]);
}

#[test]
fn f22_a_wrong_number_of_cells_costs_one_line_and_says_what_was_found() {
    let input = "id,n\n1\n2,b,c\n3,\"x\ny\",z,zz\n4,d\n";
    assert_eq!(
        rejected(&csv("id"), input),
        [
            (1, 2, "expected 2 cells as in the header, found 1".to_owned()),
            (2, 3, "expected 2 cells as in the header, found 3".to_owned()),
            (3, 4, "expected 2 cells as in the header, found more".to_owned()),
            (4, 5, "expected 2 cells as in the header, found 3".to_owned()),
        ]
    );
    assert_eq!(accepted(&csv("id"), input), ["4"]);
    let many = format!("id,n\n{}\n", ["1"; 15].join(","));
    assert!(reason(&csv("id"), many).ends_with("found 15"));
}

#[test]
fn empty_recipients_are_rejected() {
    for input in ["id,n\n,a\n", "id,n\n \t,a\n", "id,n\n\"\",a\n"] {
        assert_eq!(reason(&csv("id"), input), "the recipient is empty");
    }
    assert_eq!(reason(&ndjson(), "{\"id\":\"\"}"), "the recipient is empty");
    assert_eq!(reason(&ndjson(), "{\"id\":\"a\\u0000\"}"), "the recipient holds a control character");
    assert_eq!(reason(&ndjson(), "{\"id\":\"a\\nb\"}"), "the recipient holds a control character");
}

#[test]
fn objects_travel_as_they_stood_and_numbers_keep_their_digits() {
    let rows = [
        ("{\"id\":\"z\\u00f6\\u00eb\"}", "zöë"),
        (" {\"x\": 1.00, \"id\" : 9007199254740993} \t", "9007199254740993"),
        ("{\"id\":123456789012345678901234567890}", "123456789012345678901234567890"),
        ("{\"i\\u0064\":-0}", "-0"),
        ("{\"x\":{\"id\":1},\"id\":\"2\"}", "2"),
        ("{\"id\":1,\"x\":123456789012345678901e20}", "1"),
    ];
    for (line, recipient) in rows {
        let read = read_in(&ndjson(), line.as_bytes(), 100, 0, 10, || 7).unwrap();
        assert_eq!(read.rows, [(1, recipient.to_owned(), line.trim().to_owned())], "{:?}", read.rejects);
    }
}

#[test]
fn f23_what_readers_of_json_disagree_about_is_rejected() {
    for (line, why) in [
        ("{\"id\":1,\"id\":2}", "a key occurs twice"),
        ("{\"id\":1,\"a\":{\"b\":1,\"\\u0062\":2}}", "a key occurs twice"),
        ("{\"id\":1,\"a\":[{\"b\":1,\"c\":[{}],\"b\":2}]}", "a key occurs twice"),
        ("{\"id\":1,\"x\":1e400}", "out of range"),
        ("{\"id\":1,\"x\":\"\\ud800\"}", "hex escape"),
        ("{\"id\":\"\\ud800\"}", "not valid Unicode"),
        ("{\"id\":1.5}", "found a number with a fraction"),
        ("{\"id\":1e5}", "found a number with a fraction"),
        ("{\"id\":null}", "found null"),
        ("{\"id\":true}", "found a boolean"),
        ("{\"id\":[1]}", "found an array"),
        ("{\"id\":{}}", "found an object"),
        ("{\"ID\":1}", "no key `id`"),
        ("{\"id\":NaN}", "invalid JSON"),
        ("{\"id\":1,}", "invalid JSON"),
        ("{\"id\":1} {}", "invalid JSON"),
        ("{\"id\":1", "invalid JSON"),
        ("[\"id\"]", "not a JSON object"),
        ("\"id\"", "not a JSON object"),
    ] {
        let reason = reason(&ndjson(), line);
        assert!(reason.contains(why), "{line}: {reason}");
        assert!(!reason.contains("line 1"), "{reason}");
    }
    // The same key in different objects is fine.
    assert_eq!(accepted(&ndjson(), "{\"a\":{\"b\":1},\"b\":{\"b\":1},\"id\":1}\n"), ["1"]);
}

#[test]
fn f23_depth_is_limited() {
    let nested = |depth: usize| format!("{{\"id\":1,\"x\":{}{}}}\n", "[".repeat(depth), "]".repeat(depth));
    let read = |depth| read_in(&ndjson(), nested(depth).as_bytes(), 65536, 0, 10, || usize::MAX).unwrap();
    assert_eq!(read(126).rows.len(), 1);
    for depth in [127, 10_000] {
        let reason = &read(depth).rejects[0].reason;
        assert!(reason.contains("recursion limit"), "{reason}");
    }
    // Nor does the recipient's own value find a way around the limit.
    let line = format!("{{\"id\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let read = read_in(&ndjson(), line.as_bytes(), 65536, 0, 10, || usize::MAX).unwrap();
    assert_eq!((read.rows.len(), read.rejects.len()), (0, 1));
}

#[test]
fn hostile_quotes_cost_no_more_than_the_limit_per_line() {
    // Every line opens a quote, or closes one and opens the next. Without the stop at the first surplus
    // cell each would read on to the limit: 3 GB instead of a few hundred kB.
    let input = ["id,n\n".to_owned(), "x\"x,\"\n".repeat(50_000)].concat();
    let read = read_in(&csv("id"), input.as_bytes(), 65536, 0, 4096, || 1 << 18).unwrap();
    assert_eq!(read.end.rows, read.rows.len() as u64 + read.rejects.len() as u64);
    assert_eq!(read.end.offset, input.len() as u64);
}

fn format() -> impl Strategy<Value = Format> {
    prop_oneof![Just(Format::Text), Just(csv("id")), Just(ndjson())]
}

/// Bytes that are likely to mean something to some format.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        6 => prop::sample::select(vec![
            "\n", "\r\n", "\r", "\"", "\"\"", ",", "id", "id,n\n", "a,b\n", "\"a\n\",b\n", "1\n", "{\"id\":1}\n",
            "{\"id\":\"", "\"}", "é", " ", "\u{feff}", "=", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        ]).prop_map(|text| text.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..6),
    ];
    (any::<bool>(), prop::collection::vec(piece, 0..60)).prop_map(|(header, pieces)| {
        let mut bytes = if header { b"id,n\n".to_vec() } else { Vec::new() };
        bytes.extend(pieces.concat());
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// The way a file is cut into chunks and blocks changes nothing, not even an error; every row is
    /// accounted for once, in order.
    #[test]
    fn chunks_change_nothing(
        format in format(),
        input in hostile(),
        chunks in prop::collection::vec(1usize..70, 1..20),
        rows_max in 1usize..6,
    ) {
        let whole = read(&format, &input);
        let mut chunks = chunks.into_iter().cycle();
        let cut = read_in(&format, &input, MAX, 0, rows_max, || chunks.next().unwrap());
        prop_assert_eq!(&whole, &cut);
        if let Ok(whole) = whole {
            let mut numbers: Vec<_> =
                whole.rows.iter().map(|row| row.0).chain(whole.rejects.iter().map(|reject| reject.row)).collect();
            numbers.sort_unstable();
            prop_assert_eq!(numbers, (1..=whole.end.rows).collect::<Vec<_>>());
            prop_assert_eq!(whole.end.offset, input.len() as u64);
            prop_assert!(whole.offsets.is_sorted());
            prop_assert!(whole.rejects.iter().all(|reject| reject.raw.len() <= CUT_BYTES + 1));
        }
    }

    /// Skipping is reading and dropping.
    #[test]
    fn skipped_rows_are_the_first_ones(
        format in format(),
        input in hostile(),
        skip in 0u64..12,
        chunk in 1usize..70,
    ) {
        let whole = read(&format, &input);
        let rest = read_in(&format, &input, MAX, skip, 3, || chunk);
        prop_assert_eq!(whole.is_err(), rest.is_err());
        if let (Ok(mut whole), Ok(rest)) = (whole, rest) {
            let first = whole.rows.iter().filter(|row| row.0 <= skip).count();
            whole.rows.drain(..first);
            whole.offsets.drain(..first);
            whole.rejects.retain(|reject| reject.row > skip);
            prop_assert_eq!(whole, rest);
        }
    }

    /// What a careful writer of CSV wrote is read back, whatever the cells.
    #[test]
    fn quoted_cells_read_back(
        rows in prop::collection::vec(("[a-z]{1,5}", "[a,\"\r\n é=]{0,6}", "[a,\"\r\n é=]{0,6}"), 1..8),
        crlf: bool,
        last: bool,
    ) {
        let ending = if crlf { "\r\n" } else { "\n" };
        let mut input = format!("x,id,y{ending}");
        let quote = |cell: &str| format!("\"{}\"", cell.replace('"', "\"\""));
        for (id, x, y) in &rows {
            input.extend([&quote(x), ",", id, ",", &quote(y), ending]);
        }
        if last {
            input.truncate(input.len() - ending.len());
        }
        let read = read_in(&csv("id"), input.as_bytes(), 65536, 0, 100, || 13).unwrap();
        let expected: Vec<_> = rows.iter().map(|(id, x, y)| format!("{x}|{id}|{y}")).collect();
        prop_assert_eq!(read.rejects, vec![]);
        prop_assert_eq!(read.rows.into_iter().map(|row| row.2).collect::<Vec<_>>(), expected);
    }
}
