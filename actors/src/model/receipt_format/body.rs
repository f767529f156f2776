//! Receipts in one piece: a request's body, a queue's entry.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize,
    de::{Deserializer as _, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{Around, ReadReceipts, ReceiptFormat};

/// Why nothing of a body is taken: half an array would hide what is wrong with the rest.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BodyError {
    /// It is not JSON, or neither an object nor an array.
    #[error("{0}")]
    Invalid(String),
    /// It holds too many receipts.
    #[error("{found} receipts at once, more than the {max} that are taken: send several")]
    TooMany {
        /// How many there were.
        found: usize,
        /// How many there may be.
        max: usize,
    },
}

impl ReceiptFormat {
    /// Reads a JSON object, or an array of at most `receipts_max` objects. `place` says where the receipt of
    /// a number, from 0, stands.
    pub fn read_body(
        &self,
        body: &[u8],
        receipts_max: usize,
        place: impl Fn(usize) -> String,
    ) -> Result<ReadReceipts, BodyError> {
        let invalid = |why: &str| BodyError::Invalid(why.to_owned());
        let no_json = |error: serde_json::Error| BodyError::Invalid(format!("invalid JSON: {error}"));
        let text = std::str::from_utf8(body)
            .map_err(|error| {
                BodyError::Invalid(format!("invalid UTF-8 at byte {}", error.valid_up_to() + 1))
            })?
            .trim_matches([' ', '\t', '\r', '\n']);
        let mut read = ReadReceipts::default();
        match text.as_bytes().first() {
            Some(b'{') => {
                // One that was cut off comes again; a reject would be the end of it.
                serde_json::from_str::<&RawValue>(text).map_err(no_json)?;
                self.read_into(text.as_bytes(), Around::default(), || place(0), &mut read);
            }
            Some(b'[') => {
                let mut reader = serde_json::Deserializer::from_str(text);
                let elements = ReceiptElements { format: self, receipts_max, place: &place, read: &mut read };
                let found = reader
                    .deserialize_seq(elements)
                    .and_then(|found| reader.end().map(|()| found))
                    .map_err(no_json)?;
                if found > receipts_max {
                    return Err(BodyError::TooMany { found, max: receipts_max });
                }
            }
            None => return Err(invalid("it is empty, expected a JSON object or an array of objects")),
            Some(_) => return Err(invalid("it is neither a JSON object nor an array of objects")),
        }
        Ok(read)
    }
}

/// Takes an array's elements one at a time; the answer is how many there were.
struct ReceiptElements<'a, P> {
    format: &'a ReceiptFormat,
    receipts_max: usize,
    place: &'a P,
    read: &'a mut ReadReceipts,
}

impl<'de, P: Fn(usize) -> String> Visitor<'de> for ReceiptElements<'_, P> {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<usize, A::Error> {
        let mut found = 0;
        while let Some(element) = seq.next_element::<&RawValue>()? {
            if found < self.receipts_max {
                let text = element.get().as_bytes();
                self.format.read_into(text, Around::default(), || (self.place)(found), self.read);
            }
            found += 1;
        }
        Ok(found)
    }
}

/// What an Amazon SNS notification carries, if `body` is one: SNS wraps what it sends to a queue or over
/// HTTP unless "raw message delivery" is on.
pub fn notification(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Envelope<'a> {
        #[serde(borrow)]
        r#type: Cow<'a, str>,
        topic_arn: Option<serde::de::IgnoredAny>,
        message: String,
    }
    memchr::memmem::find(body, b"\"Notification\"")?;
    let envelope: Envelope<'_> = serde_json::from_slice(body).ok()?;
    (envelope.r#type == "Notification" && envelope.topic_arn.is_some()).then_some(envelope.message)
}
