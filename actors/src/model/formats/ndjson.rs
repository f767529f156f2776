//! `ndjson`: one JSON object per line (RFC 8259), the recipient in a key of its top level.
//!
//! The object's text travels as it stood in the file, without the white space around it: numbers are
//! never reformatted, whatever their size. Only a number that no 64-bit float can hold, like
//! `1e400`, is refused, because no receiver could read it. The recipient is a string, taken
//! unescaped, or an integer, taken digit by digit. A key that occurs twice in one object is refused at
//! any depth: readers disagree about which one counts. So are values nested deeper than 127 objects
//! and arrays (`serde_json`'s limit) and escapes that are not Unicode text, like `"\ud800"`.

use std::{borrow::Cow, fmt, ops::Range};

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{RowError, check_recipient, check_text};
use crate::model::batch::put_cell;

#[derive(Debug)]
pub(super) struct NdjsonRules {
    recipient: String,
    keys: OpenKeys,
}

/// The keys of the objects that are open, unescaped.
#[derive(Debug, Default)]
pub(in crate::model) struct OpenKeys {
    text: String,
    spans: Vec<Range<usize>>,
}

impl OpenKeys {
    /// How many keys are open: where the next object's keys begin.
    pub(in crate::model) fn mark(&self) -> usize {
        self.spans.len()
    }

    /// The key that was read last.
    pub(in crate::model) fn last(&self) -> &str {
        self.spans.last().map_or("", |span| &self.text[span.clone()])
    }

    fn push(&mut self, key: &str) {
        let start = self.text.len();
        self.text.push_str(key);
        self.spans.push(start..self.text.len());
    }

    /// Closes the object whose keys began at `mark`; whether all of them differ.
    pub(in crate::model) fn close(&mut self, mark: usize) -> bool {
        let text = &self.text;
        let object = &mut self.spans[mark..];
        let start = object.first().map_or(text.len(), |span| span.start);
        object.sort_unstable_by(|a, b| text[a.clone()].cmp(&text[b.clone()]));
        let differ = object.windows(2).all(|pair| text[pair[0].clone()] != text[pair[1].clone()]);
        self.spans.truncate(mark);
        self.text.truncate(start);
        differ
    }
}

impl NdjsonRules {
    pub(super) fn new(recipient: String) -> Self {
        Self { recipient, keys: OpenKeys::default() }
    }

    /// Lays out a line; `false` if it is blank.
    pub(super) fn lay_out(&mut self, line: &[u8], bytes: &mut Vec<u8>) -> Result<bool, RowError> {
        let text = check_text(line)?.trim_matches([' ', '\t', '\r']);
        if text.is_empty() {
            return Ok(false);
        }
        if !text.starts_with('{') {
            return Err("the line is not a JSON object".into());
        }
        self.keys.text.clear();
        self.keys.spans.clear();
        let mut recipient = None;
        let mut reader = serde_json::Deserializer::from_str(text);
        TopLevel { wanted: &self.recipient, found: &mut recipient, keys: &mut self.keys }
            .deserialize(&mut reader)
            .and_then(|()| reader.end())
            .map_err(|error| {
                // `serde_json` sees each row as line 1, which would mislead.
                RowError::from(format!("invalid JSON: {error}").replace(" at line 1 column", " at column"))
            })?;
        let Some(recipient) = recipient else {
            return Err(format!("the object has no key `{}` (the feed's `recipient`)", self.recipient).into());
        };
        let recipient = self.read_recipient(recipient.get())?;
        check_recipient(&recipient)?;
        put_cell(bytes, &recipient);
        bytes.extend_from_slice(text.as_bytes());
        Ok(true)
    }

    fn read_recipient<'a>(&self, raw: &'a str) -> Result<Cow<'a, str>, RowError> {
        let refuse = |found: &str| {
            Err(format!("key `{}` must be a string or an integer, found {found}", self.recipient).into())
        };
        match raw.as_bytes()[0] {
            b'"' => {
                // `Cow` alone would always allocate; a borrowed string is the common case.
                match serde_json::from_str::<&str>(raw) {
                    Ok(text) => Ok(Cow::Borrowed(text)),
                    Err(_) => serde_json::from_str(raw)
                        .map(Cow::Owned)
                        .map_err(|_| "the recipient holds an escape that is not valid Unicode".into()),
                }
            }
            b'-' | b'0'..=b'9' if raw.bytes().all(|byte| byte == b'-' || byte.is_ascii_digit()) => {
                Ok(Cow::Borrowed(raw))
            }
            b'-' | b'0'..=b'9' => refuse("a number with a fraction or an exponent"),
            b't' | b'f' => refuse("a boolean"),
            b'n' => refuse("null"),
            b'[' => refuse("an array"),
            _ => refuse("an object"),
        }
    }
}

/// Reads the row's object, its recipient aside.
struct TopLevel<'a, 'de> {
    wanted: &'a str,
    found: &'a mut Option<&'de RawValue>,
    keys: &'a mut OpenKeys,
}

impl<'de> DeserializeSeed<'de> for TopLevel<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TopLevel<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key_seed(KeySeed(self.keys))?.is_some() {
            if self.keys.last() == self.wanted {
                // Kept as text, so that an integer of any length keeps its digits.
                *self.found = Some(map.next_value()?);
            } else {
                map.next_value_seed(Checked(self.keys))?;
            }
        }
        if self.keys.close(0) { Ok(()) } else { Err(A::Error::custom(TWICE)) }
    }
}

/// Why an object is refused.
pub(in crate::model) const TWICE: &str = "a key occurs twice in one object";

/// Reads a key.
pub(in crate::model) struct KeySeed<'a>(pub(in crate::model) &'a mut OpenKeys);

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<(), E> {
        self.0.push(key);
        Ok(())
    }
}

/// Reads any value for its form alone.
pub(in crate::model) struct Checked<'a>(pub(in crate::model) &'a mut OpenKeys);

impl<'de> DeserializeSeed<'de> for Checked<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Checked<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Checked(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mark = self.0.mark();
        while map.next_key_seed(KeySeed(self.0))?.is_some() {
            map.next_value_seed(Checked(self.0))?;
        }
        if self.0.close(mark) { Ok(()) } else { Err(A::Error::custom(TWICE)) }
    }
}
