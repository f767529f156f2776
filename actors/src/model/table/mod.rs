//! Rows for a warehouse's table: how a message becomes one, by a mapping that travels with its batch.
//!
//! Values are checked and brought into one form before a statement is made of them ([`value`]), so that most of
//! what a database would refuse never costs a statement. What only the database can know (a text that is too
//! long, a constraint) is found by [`bisect`](super::bisect).

mod calendar;
mod identifier;
mod source;
pub mod value;

use std::{fmt, ops::Range, sync::Arc};

use serde::{Deserialize, Serialize};

pub use identifier::{IDENTIFIER_BYTES_MAX, Identifier, IdentifierError, TableName};
pub use source::{Raw, field};

use super::{
    batch::{BatchHeader, RowLayout},
    ids::MessageId,
};

/// The content type of a batch whose template is a [`Mapping`] as JSON.
pub const MAPPING_TYPE: &str = "application/vnd.postrider.table+json";

/// The most columns that a mapping may have: Postgres and Redshift take 1600 in a table.
pub const COLUMNS_MAX: usize = 1_600;

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

/// A mapping that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The batch is not for a table.
    #[error("the batch has no mapping: its content type is `{0}`, expected `{MAPPING_TYPE}`")]
    NotATable(String),
    /// It is not valid JSON.
    #[error("the mapping can't be read: {0}")]
    Json(#[from] serde_json::Error),
    /// The first column is not a key.
    #[error("the first column is the key: it has to be of type text and filled with the message's id")]
    NoKey,
    /// Too many.
    #[error("{0} columns, at most {COLUMNS_MAX} are possible")]
    TooMany(usize),
    /// A column's name.
    #[error(transparent)]
    Identifier(#[from] IdentifierError),
    /// Two columns of one name.
    #[error("the column `{0}` is filled twice")]
    Twice(String),
}

impl Mapping {
    /// The mapping that travels with a batch.
    pub fn of(header: &BatchHeader) -> Result<Arc<Self>, MappingError> {
        if header.content_type != MAPPING_TYPE {
            return Err(MappingError::NotATable(header.content_type.clone()));
        }
        let mapping: Self = serde_json::from_str(header.template.as_deref().unwrap_or_default())?;
        mapping.validate()?;
        Ok(Arc::new(mapping))
    }

    /// It as a batch header's template. [`Self::of`] reads it back.
    pub fn to_template(&self) -> String {
        serde_json::to_string(self).expect("names and words are always JSON")
    }

    /// Whether rows can be made by it: names are identifiers, none twice, the first column the key.
    pub fn validate(&self) -> Result<(), MappingError> {
        let is_key = |column: &Column| column.source == ColumnSource::Id && column.kind == ColumnType::Text;
        if !self.columns.first().is_some_and(is_key) {
            return Err(MappingError::NoKey);
        }
        if self.columns.len() > COLUMNS_MAX {
            return Err(MappingError::TooMany(self.columns.len()));
        }
        let mut names = std::collections::HashSet::new();
        for column in &self.columns {
            Identifier::parse(&column.name)?;
            // Unquoted, a database folds them to one.
            if !names.insert(column.name.to_ascii_lowercase()) {
                return Err(MappingError::Twice(column.name.clone()));
            }
        }
        Ok(())
    }

    /// What the rows of a file would all lack, if they do.
    pub fn lacks(&self, layout: &RowLayout) -> Option<String> {
        let has = |field: &String| match layout {
            RowLayout::Lines => false,
            RowLayout::Columns { names, .. } => names.contains(field),
            RowLayout::Objects => true, // each has keys of its own
        };
        self.columns.iter().find_map(|column| match &column.source {
            ColumnSource::Field(field) if column.required && !has(field) => Some(format!(
                "column `{}` is required and needs data.{field}, which the rows do not have",
                column.name
            )),
            _ => None,
        })
    }

    /// The row of message `id`, whose laid-out bytes are `bytes`. The error is for the operator, names the column
    /// and what was found, and no later attempt changes it.
    pub fn row(
        self: &Arc<Self>,
        header: &BatchHeader,
        id: MessageId,
        bytes: &[u8],
    ) -> Result<TableRow, String> {
        let parts = header.layout.read(bytes).map_err(|error| error.to_string())?;
        let fields = source::RowFields::of(&parts.data)?;
        let value = |column: &Column| {
            let raw = match &column.source {
                ColumnSource::Id => Some(source::Raw::Text(id.to_string().into())),
                ColumnSource::Recipient => Some(source::Raw::Text(parts.recipient.into())),
                ColumnSource::Feed => Some(source::Raw::Text(header.feed.as_str().into())),
                ColumnSource::Field(name) => fields.get(name)?,
            };
            let value = match raw {
                Some(raw) => value::normalise(column.kind, &raw)?,
                None => None,
            };
            if value.is_none() && column.required {
                return Err("has no value and is required".to_owned());
            }
            Ok(value)
        };
        let named = |column| value(column).map_err(|problem| format!("column `{}`: {problem}", column.name));
        let values = self.columns.iter().map(named).collect::<Result<_, _>>()?;
        Ok(TableRow { mapping: self.clone(), values })
    }
}

/// One row: a value per column of its mapping, as the database's input text; `None` is NULL.
#[derive(Clone, PartialEq, Eq)]
pub struct TableRow {
    /// The mapping, shared by the rows of a batch.
    pub mapping: Arc<Mapping>,
    /// The values.
    pub values: Vec<Option<Box<str>>>,
}

impl TableRow {
    /// The value of its key.
    pub fn key(&self) -> &str {
        self.values.first().and_then(Option::as_deref).unwrap_or_default()
    }

    /// The most bytes that it takes in a statement, however it is written there: between quotes, with every
    /// quote and backslash doubled, and `(`, `)` and commas around. As binary parameters a value takes 4 bytes
    /// beside its text and less than that.
    pub fn statement_bytes(&self) -> usize {
        let value = |value: &Option<Box<str>>| match value {
            Some(text) => {
                let doubled = text.bytes().filter(|byte| matches!(byte, b'\'' | b'\\')).count();
                text.len() + doubled + 4
            }
            None => 6,
        };
        4 + self.values.iter().map(value).sum::<usize>()
    }
}

impl fmt::Debug for TableRow {
    /// Counts, never values (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableRow({} values)", self.values.len())
    }
}

/// Divides rows, given by the bytes that each takes, into statements of at most `rows_max` rows and `bytes_max`
/// bytes. A row that is larger than a statement by itself is in none of them: the second list.
pub fn divide(
    sizes: impl IntoIterator<Item = usize>,
    rows_max: usize,
    bytes_max: usize,
) -> (Vec<Range<usize>>, Vec<usize>) {
    let (mut statements, mut too_large) = (Vec::<Range<usize>>::new(), Vec::new());
    let mut bytes = 0usize;
    for (index, size) in sizes.into_iter().enumerate() {
        if size > bytes_max {
            too_large.push(index);
            continue;
        }
        match statements.last_mut() {
            Some(last) if last.end == index && last.len() < rows_max && bytes + size <= bytes_max => {
                last.end += 1;
                bytes += size;
            }
            _ => {
                statements.push(index..index + 1);
                bytes = size;
            }
        }
    }
    (statements, too_large)
}

#[cfg(test)]
mod tests;
