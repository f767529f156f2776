//! Attribute names and how values are written to and read from items.

use std::collections::HashMap;

use aws_sdk_dynamodb::{primitives::Blob, types::AttributeValue};
use postrider_actors::{
    model::{batch::PayloadError, ids::FileId, time::UnixMs},
    ports::StoreError,
};

/// An item of either table.
pub(super) type Item = HashMap<String, AttributeValue>;

macro_rules! attributes {
    ($($name:ident = $text:literal;)*) => {
        $(pub(super) const $name: &str = $text;)*
    };
}

attributes! {
    // Both tables.
    ACCEPTED_AT = "AcceptedAt";
    COUNT = "Count";
    EXPIRES_AT = "ExpiresAt";
    FILE = "File";
    FIRST_ROW = "FirstRow";
    NOT_BEFORE = "NotBefore";
    TOPIC = "Topic";
    // The outbox table, and of a batch which payload it has.
    DIGEST = "Digest";
    HEADER = "Header";
    PAYLOAD = "Payload";
    // The ledger table.
    PK = "Pk";
    SK = "Sk";
    VERSION = "Version";
    BODY = "Body";
    // … of a batch.
    TOPIC_SHARD = "TopicShard";
    OUTSTANDING_CREATED_TIME = "OutstandingCreatedTime";
    DELIVERY_TIME = "DeliveryTime";
    OWNER = "Owner";
    DUE = "Due";
    SHARD = "Shard";
    LOOK_AT = "LookAt";
    OPEN = "Open";
    ROWS = "Rows";
    FENCE = "Fence";
    HOLDER = "Holder";
    UNTIL = "Until";
    KEPT_UNTIL = "KeptUntil";
    PRIORITY = "Priority";
    BATCHES = "Batches";
    // … of a file.
    RECORD = "Record";
    OFFSET = "Offset";
    ROWS_READ = "RowsRead";
    REJECTED = "Rejected";
    DUPLICATES = "Duplicates";
    STATE = "State";
    CLOSED_AT = "ClosedAt";
    STAMP = "Stamp";
    FEED = "Feed";
    NAME = "Name";
    REPORTED = "Reported";
    // … of a file's counts and of the depth.
    SENT = "Sent";
    DEAD = "Dead";
    RETRYING = "Retrying";
    UNSENT = "Unsent";
    CANCELLED = "Cancelled";
    CHANGES = "Changes";
    LAST_AT = "LastAt";
}

/// A stored item that this program can't read.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("attribute {0} of an item is missing, damaged, or was written by a newer version")]
pub(super) struct Damaged(pub(super) &'static str);

impl From<Damaged> for StoreError {
    fn from(damaged: Damaged) -> Self {
        Self::Permanent(damaged.to_string())
    }
}

pub(super) fn payload_damaged(error: PayloadError) -> StoreError {
    StoreError::Permanent(format!("a stored batch can't be read: {error}"))
}

/// Before a destination's name: how many of its messages are open.
pub(super) const MESSAGES_OF: &str = "Messages#";

pub(super) fn number(value: impl Into<i128>) -> AttributeValue {
    AttributeValue::N(value.into().to_string())
}

pub(super) fn time(at: UnixMs) -> AttributeValue {
    number(at.0)
}

pub(super) fn text(value: impl Into<String>) -> AttributeValue {
    AttributeValue::S(value.into())
}

pub(super) fn blob(bytes: impl Into<Vec<u8>>) -> AttributeValue {
    AttributeValue::B(Blob::new(bytes))
}

/// An item from its attributes.
pub(super) fn item<const N: usize>(attributes: [(&str, AttributeValue); N]) -> Item {
    attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// Reads the attributes of an item.
pub(super) struct Reading<'a>(pub(super) &'a Item);

impl<'a> Reading<'a> {
    pub(super) fn text(&self, name: &'static str) -> Result<&'a str, Damaged> {
        self.maybe_text(name)?.ok_or(Damaged(name))
    }

    pub(super) fn maybe_text(&self, name: &'static str) -> Result<Option<&'a str>, Damaged> {
        let value = self.0.get(name).map(AttributeValue::as_s).transpose();
        Ok(value.map_err(|_| Damaged(name))?.map(String::as_str))
    }

    pub(super) fn number<T: std::str::FromStr>(&self, name: &'static str) -> Result<T, Damaged> {
        self.maybe_number(name)?.ok_or(Damaged(name))
    }

    pub(super) fn maybe_number<T: std::str::FromStr>(
        &self,
        name: &'static str,
    ) -> Result<Option<T>, Damaged> {
        let value = self.0.get(name).map(AttributeValue::as_n).transpose().map_err(|_| Damaged(name))?;
        value.map(|value| value.parse()).transpose().map_err(|_| Damaged(name))
    }

    pub(super) fn time(&self, name: &'static str) -> Result<UnixMs, Damaged> {
        self.number(name).map(UnixMs)
    }

    pub(super) fn maybe_bytes(&self, name: &'static str) -> Result<Option<&'a [u8]>, Damaged> {
        let value = self.0.get(name).map(AttributeValue::as_b).transpose();
        Ok(value.map_err(|_| Damaged(name))?.map(Blob::as_ref))
    }

    pub(super) fn bytes(&self, name: &'static str) -> Result<&'a [u8], Damaged> {
        self.maybe_bytes(name)?.ok_or(Damaged(name))
    }

    pub(super) fn file_id(&self, name: &'static str) -> Result<FileId, Damaged> {
        self.text(name)?.parse().map_err(|_| Damaged(name))
    }
}

/// Roughly what an item takes of DynamoDB's limits: names and values, numbers by their digits
/// ("DynamoDB item sizes and formats").
pub(super) fn size(item: &Item) -> usize {
    item.iter().map(|(name, value)| name.len() + value_size(value)).sum()
}

fn value_size(value: &AttributeValue) -> usize {
    match value {
        AttributeValue::S(text) | AttributeValue::N(text) => text.len() + 1,
        AttributeValue::B(bytes) => bytes.as_ref().len(),
        _ => 8,
    }
}
