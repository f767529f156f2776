//! The body of an inbound queue's entry: one JSON object, or an array of objects. Each object is a row, by
//! the rules of `ndjson`, but it may span several lines.
//!
//! A body that can't be read is one rejected row that holds it; an element of an array that can't be used
//! is rejected by itself. An empty array has no rows.

use std::fmt;

use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{CUT_MARK, RowError, check_text, ndjson::NdjsonRules};

/// JSON's white space, RFC 8259 §2.
const WHITE_SPACE: [char; 4] = [' ', '\t', '\r', '\n'];

/// The rows of one entry, in order.
#[derive(Default, PartialEq, Eq)]
pub struct EntryRows {
    /// The accepted rows' bytes, laid out as `RowLayout::Objects`, one after the other.
    bytes: Vec<u8>,
    /// Place in the entry and end in `bytes` of each accepted row.
    accepted: Vec<(u32, u32)>,
    rejected: Vec<RejectedRow>,
    count: u32,
}

/// A row of an entry that can't be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RejectedRow {
    /// Its place in the entry, from 0.
    pub index: u32,
    /// What is wrong with it, for the operator.
    pub reason: String,
    /// Its text, cut to `max_row_bytes` and then ended by [`CUT_MARK`].
    pub raw: Vec<u8>,
}

/// A row of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryRow<'a> {
    /// Laid out as `RowLayout::Objects`.
    Accepted(&'a [u8]),
    /// It can't be used.
    Rejected(&'a RejectedRow),
}

impl fmt::Debug for EntryRows {
    /// Counts, never rows (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (accepted, rejected) = (self.accepted.len(), self.rejected.len());
        f.debug_struct("EntryRows")
            .field("accepted", &accepted)
            .field("rejected", &rejected)
            .finish_non_exhaustive()
    }
}

impl EntryRows {
    /// How many rows, rejected ones counted.
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether it has no row.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// About how many bytes of memory it takes.
    pub fn held_bytes(&self) -> usize {
        let rejected = |row: &RejectedRow| size_of::<RejectedRow>() + row.reason.len() + row.raw.len();
        self.bytes.len() + self.accepted.len() * 8 + self.rejected.iter().map(rejected).sum::<usize>()
    }

    /// The rows in order.
    pub fn iter(&self) -> impl Iterator<Item = EntryRow<'_>> {
        let mut accepted = self.accepted.iter().peekable();
        let mut rejected = self.rejected.iter();
        let mut start = 0;
        (0..self.count).map(move |index| {
            if let Some(&(_, end)) = accepted.next_if(|(place, _)| *place == index) {
                let bytes = &self.bytes[start..end as usize];
                start = end as usize;
                EntryRow::Accepted(bytes)
            } else {
                EntryRow::Rejected(rejected.next().expect("every row is accepted or rejected"))
            }
        })
    }

    fn reject(&mut self, reason: String, raw: &[u8], max_row_bytes: usize) {
        let raw = match raw.get(..max_row_bytes) {
            Some(cut) if cut.len() < raw.len() => [cut, &[CUT_MARK]].concat(),
            _ => raw.to_vec(),
        };
        self.rejected.push(RejectedRow { index: self.count, reason, raw });
        self.count += 1;
    }
}

/// Reads entries' bodies.
#[derive(Debug)]
pub struct EntryParser {
    rules: NdjsonRules,
    max_row_bytes: usize,
    rows_max: usize,
}

impl EntryParser {
    /// For objects that name their recipient under the key `recipient`. An object longer than
    /// `max_row_bytes` is rejected, and so is, as a whole, an entry of more than `rows_max` rows.
    pub fn new(recipient: String, max_row_bytes: usize, rows_max: usize) -> Self {
        Self { rules: NdjsonRules::new(recipient), max_row_bytes, rows_max }
    }

    /// The rows of one body.
    pub fn parse(&mut self, body: &[u8]) -> EntryRows {
        let mut rows = EntryRows::default();
        if let Err(RowError(reason)) = self.read(body, &mut rows) {
            // All or nothing: whoever fixes the entry and sends it again would send every row again.
            rows = EntryRows::default();
            rows.reject(reason, body, self.max_row_bytes);
        }
        rows
    }

    fn read(&mut self, body: &[u8], rows: &mut EntryRows) -> Result<(), RowError> {
        let text = check_text(body)?.trim_matches(WHITE_SPACE);
        match text.as_bytes().first() {
            Some(b'{') => {
                self.row(text, rows);
                Ok(())
            }
            Some(b'[') => {
                let mut reader = serde_json::Deserializer::from_str(text);
                reader
                    .deserialize_seq(EntryElements { parser: self, rows })
                    .and_then(|in_limit| reader.end().map(|()| in_limit))
                    .map_err(|error| RowError::from(format!("the entry is not valid JSON: {error}")))?
                    .map_err(RowError::from)
            }
            None => Err("the entry is empty".into()),
            Some(_) => Err("the entry is neither a JSON object nor an array of objects".into()),
        }
    }

    fn row(&mut self, text: &str, rows: &mut EntryRows) {
        let laid_out = rows.bytes.len();
        let taken = if text.len() > self.max_row_bytes {
            let why = format!(
                "the object is {} bytes long, longer than max_row = {}; it is cut here",
                text.len(),
                self.max_row_bytes
            );
            Err(why.into())
        } else if text.starts_with('{') {
            self.rules.lay_out(text.as_bytes(), &mut rows.bytes)
        } else {
            Err("the array's element is not a JSON object".into())
        };
        match taken {
            Ok(_) => {
                rows.accepted.push((rows.count, rows.bytes.len() as u32));
                rows.count += 1;
            }
            Err(RowError(reason)) => {
                rows.bytes.truncate(laid_out);
                rows.reject(reason, text.as_bytes(), self.max_row_bytes);
            }
        }
    }
}

/// Takes an array's elements one at a time. What is invalid JSON is an error; too many elements are an
/// answer.
struct EntryElements<'a> {
    parser: &'a mut EntryParser,
    rows: &'a mut EntryRows,
}

impl<'de> Visitor<'de> for EntryElements<'_> {
    type Value = Result<(), String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let Self { parser, rows } = self;
        let mut surplus = 0;
        while let Some(element) = seq.next_element::<&RawValue>()? {
            if rows.len() == parser.rows_max {
                surplus += 1;
            } else {
                parser.row(element.get(), rows);
            }
        }
        Ok(if surplus == 0 {
            Ok(())
        } else {
            Err(format!(
                "the entry has {} rows, more than the {} that are taken from one: send several",
                rows.len() + surplus,
                parser.rows_max
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::batch::{MessageData, RowLayout};
    use proptest::prelude::*;

    fn parser() -> EntryParser {
        EntryParser::new("id".into(), 100, 1000)
    }

    /// Recipient and object of accepted rows, reason of rejected ones.
    fn parse(parser: &mut EntryParser, body: &str) -> Vec<Result<(String, String), String>> {
        let rows = parser.parse(body.as_bytes());
        let read = |row: EntryRow<'_>| match row {
            EntryRow::Accepted(bytes) => {
                let parts = RowLayout::Objects.read(bytes).unwrap();
                let MessageData::Object(object) = parts.data else { panic!("not an object") };
                Ok((parts.recipient.to_owned(), object.to_owned()))
            }
            EntryRow::Rejected(row) => Err(row.reason.clone()),
        };
        rows.iter().map(read).collect()
    }

    #[test]
    fn an_object_is_one_row_unchanged() {
        let body = "\n{\"id\": 7,\n \"n\": 1.00}\r\n";
        let row = Ok(("7".to_owned(), "{\"id\": 7,\n \"n\": 1.00}".to_owned()));
        assert_eq!(parse(&mut parser(), body), [row]);
    }

    #[test]
    fn an_arrays_bad_elements_are_rejected_by_themselves() {
        let body = r#"[{"id":"a"}, 5, {"no":1}, [{"id":"x"}], {"id":"b"}, {"id":"c","id":"d"}]"#;
        let rows = parse(&mut parser(), body);
        assert_eq!(
            rows.iter().map(Result::is_ok).collect::<Vec<_>>(),
            [true, false, false, false, true, false]
        );
        assert_eq!(rows[4].as_ref().unwrap().0, "b");
    }

    #[test]
    fn a_body_that_cannot_be_read_is_one_rejected_row_that_holds_it() {
        for body in ["", "hello", "[{\"id\":1},", "[{\"id\":1}] x", "{\"id\":1", "nul\0", "\"text\"", "null"]
        {
            let rows = parser().parse(body.as_bytes());
            let [EntryRow::Rejected(row)] = rows.iter().collect::<Vec<_>>()[..] else {
                panic!("{body:?}: {rows:?}")
            };
            assert_eq!((row.index, &*row.raw), (0, body.as_bytes()), "{body:?}");
        }
        assert_eq!(parser().parse(b"\xff\xfe").len(), 1);
    }

    #[test]
    fn an_empty_array_is_no_row() {
        assert!(parser().parse(b" [ ] ").is_empty());
    }

    #[test]
    fn f23_depth_duplicate_keys_and_huge_numbers_are_rejected() {
        let deep = format!("[{}1{}]", "[".repeat(10_000), "]".repeat(10_000));
        let mut parser = EntryParser::new("id".into(), 100_000, 10);
        assert!(parse(&mut parser, &deep)[0].is_err());
        for body in [r#"{"id":1,"a":{"b":1,"b":2}}"#, r#"[{"id":1,"n":1e400}]"#] {
            assert!(parse(&mut parser, body)[0].is_err(), "{body}");
        }
    }

    #[test]
    fn rows_at_the_limits_are_taken_and_beyond_them_rejected() {
        let mut parser = EntryParser::new("id".into(), 10, 3);
        let long = |len: usize| format!("{{\"id\":{}}}", "1".repeat(len - 7));
        assert!(parse(&mut parser, &long(10))[0].is_ok());
        let rows = parser.parse(long(11).as_bytes());
        let [EntryRow::Rejected(row)] = rows.iter().collect::<Vec<_>>()[..] else { panic!("{rows:?}") };
        assert_eq!(row.raw, [&long(11).as_bytes()[..10], &[CUT_MARK]].concat());
        let array = |rows: usize| format!("[{}]", vec!["{\"id\":1}"; rows].join(","));
        assert_eq!(parse(&mut parser, &array(3)).len(), 3);
        let too_many = parse(&mut parser, &array(4));
        assert_eq!(too_many.len(), 1);
        assert!(too_many[0].as_ref().unwrap_err().contains("4 rows"), "{too_many:?}");
    }

    proptest! {
        #[test]
        fn an_array_is_its_elements_one_by_one(elements in prop::collection::vec(
            prop_oneof![Just(r#"{"id":"ü","x":[1, {}]}"#), Just("17"), Just(r#"{"id":1.5}"#), Just("{ \"id\" : \"\" }"),
                Just("{\"id\":12}"), Just("\"\""), Just("{}")], 0..20,
        )) {
            let mut parser = parser();
            let together = parse(&mut parser, &format!("[{}]", elements.join(" ,\n")));
            let apart: Vec<_> = elements.iter().map(|element| parse(&mut parser, &format!("[{element}]"))).collect();
            prop_assert_eq!(together, apart.concat());
        }

        #[test]
        fn whatever_comes_is_rows_or_one_reject(body: Vec<u8>) {
            let rows = parser().parse(&body);
            prop_assert_eq!(rows.iter().count(), rows.len());
        }
    }
}
