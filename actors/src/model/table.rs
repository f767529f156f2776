//! Rows for a warehouse's table: how a message becomes one, by a mapping that travels with its batch.

use serde::{Deserialize, Serialize};

/// Where a column's value comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColumnSource {
    /// The message's id.
    Id,
    /// The recipient.
    Recipient,
    /// The feed's name.
    Feed,
    /// A field of the message's data: a column of its file, a key of its object, several keys by dots.
    Field(String),
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ColumnType {
    /// Any text without NUL.
    Text,
    /// 64 bits, signed.
    Integer,
    /// An exact decimal.
    Numeric,
    /// A binary floating point number.
    Double,
    /// `true` or `false`.
    Boolean,
    /// RFC 3339, or Unix seconds or milliseconds.
    Timestamp,
    /// `YYYY-MM-DD`.
    Date,
    /// JSON.
    Json,
}

/// One column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// Its name in the table.
    pub name: String,
    /// What it is filled with.
    pub source: ColumnSource,
    /// What it holds.
    pub kind: ColumnType,
    /// Whether a message without a value is refused.
    #[serde(default)]
    pub required: bool,
}

/// How a batch's messages become rows. It is the batch header's template, so that a change of the
/// configuration never changes a row that was accepted (I4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The columns, in the order of the statement; the first is the key, filled with the message's id.
    pub columns: Vec<Column>,
}

impl Mapping {
    /// As it travels in a batch's header.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("names and words are always JSON")
    }
}

/// The content type of a batch whose template is a [`Mapping`] as JSON.
pub const MAPPING_TYPE: &str = "application/vnd.postrider.table+json";

/// One row: a value per column of its mapping, as the database's input text; `None` is NULL.
#[derive(Clone, PartialEq, Eq)]
pub struct TableRow {
    /// The mapping, shared by the rows of a batch.
    pub mapping: std::sync::Arc<Mapping>,
    /// The values.
    pub values: Vec<Option<Box<str>>>,
}

impl std::fmt::Debug for TableRow {
    /// Counts, never values (I10).
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TableRow({} values)", self.values.len())
    }
}
