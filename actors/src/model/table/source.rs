//! Access to the fields of a message, for the values of columns.

use std::{borrow::Cow, collections::HashMap};

use serde_json::value::RawValue;

use crate::model::batch::MessageData;

/// How deep a field may be nested: `a.b.c` is three.
const DEPTH_MAX: usize = 16;

/// A value before it is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Raw<'a> {
    /// A text: a cell, or a JSON string without its quotes.
    Text(Cow<'a, str>),
    /// Any other JSON but `null`, as it stood in the file: numbers keep their digits.
    Json(&'a str),
}

/// What can be asked for by name.
pub(super) enum RowFields<'a> {
    None,
    Columns(HashMap<&'a str, &'a str>),
    Object(HashMap<String, &'a RawValue>),
}

impl<'a> RowFields<'a> {
    pub(super) fn of(data: &MessageData<'a>) -> Result<Self, String> {
        Ok(match data {
            MessageData::None => Self::None,
            MessageData::Columns(names, cells) => {
                Self::Columns(names.iter().map(String::as_str).zip(cells.clone()).collect())
            }
            MessageData::Object(object) => Self::Object(
                serde_json::from_str(object).map_err(|error| format!("not a JSON object: {error}"))?,
            ),
        })
    }

    /// `None` if there is no such field, or it is `null`. A key that has dots itself goes before a path.
    pub(super) fn get(&self, name: &str) -> Result<Option<Raw<'a>>, String> {
        match self {
            Self::None => Ok(None),
            Self::Columns(columns) => Ok(columns.get(name).map(|&cell| Raw::Text(cell.into()))),
            Self::Object(object) => match find(object, name, DEPTH_MAX) {
                Some(found) => raw(found.get()),
                None => Ok(None),
            },
        }
    }
}

/// One field by its name; `None` if it is missing or can't be read.
pub fn field<'a>(data: &MessageData<'a>, name: &str) -> Option<Raw<'a>> {
    RowFields::of(data).ok()?.get(name).ok()?
}

fn find<'a>(object: &HashMap<String, &'a RawValue>, name: &str, depth: usize) -> Option<&'a RawValue> {
    if let Some(found) = object.get(name) {
        return Some(found);
    }
    let (head, rest) = name.split_once('.')?;
    // Anything else but an object has no fields.
    let inner = serde_json::from_str(object.get(head)?.get()).ok()?;
    if depth > 1 { find(&inner, rest, depth - 1) } else { None }
}

fn raw(json: &str) -> Result<Option<Raw<'_>>, String> {
    Ok(match json.as_bytes().first() {
        Some(b'n') => None,
        Some(b'"') => {
            let text: Cow<'_, str> = serde_json::from_str::<Text<'_>>(json)
                .map_err(|error| format!("not a JSON string: {error}"))?
                .0;
            Some(Raw::Text(text))
        }
        _ => Some(Raw::Json(json)),
    })
}

/// Borrowed where the string has no escapes.
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
