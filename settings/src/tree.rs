//! The merged tree of settings: declared defaults, the operator's file, the environment. Every
//! value remembers where it was written.

use std::{collections::BTreeMap, ffi::OsString};

use toml::de::{DeTable, DeValue};

use crate::problem::{Origin, Problem};

/// Environment variables that override settings begin with this, in any case.
pub const ENVIRONMENT_PREFIX: &str = "POSTRIDER__";

/// The settings of one table.
pub type Table = BTreeMap<String, Node>;

/// The kind of a value that is a date, a time of day, or both.
pub(crate) const DATE: &str = "date";

/// A value and where it was written.
#[derive(Clone, Debug)]
pub struct Node {
    /// The key's full path where it was written.
    pub path: String,
    /// Where that was.
    pub origin: Origin,
    /// What was written.
    pub value: Value,
}

/// A setting before its type is checked.
#[derive(Clone, Debug)]
pub enum Value {
    /// A text in quotes.
    Text(String),
    /// A whole number.
    Integer(i128),
    /// `true` or `false`.
    Boolean(bool),
    /// A float or a date, as text: no setting has such a type.
    Other(&'static str, String),
    /// A list.
    Array(Vec<Node>),
    /// A table.
    Table(Table),
    /// A variable's text: its type is what the key asks for.
    Environment(String),
}

impl Value {
    /// The value as an operator would recognise it, in one short line.
    pub fn shown(&self) -> String {
        match self {
            Self::Text(text) | Self::Environment(text) => shown_text(text),
            Self::Integer(number) => number.to_string(),
            Self::Boolean(flag) => flag.to_string(),
            Self::Other(kind, text) => format!("the {kind} {text}"),
            Self::Array(_) => "an array".into(),
            Self::Table(_) => "a table".into(),
        }
    }
}

/// Quoted, escaped and cut to 60 characters.
pub fn shown_text(text: &str) -> String {
    let short: String = text.chars().take(60).collect();
    let rest = if short.len() < text.len() { "…" } else { "" };
    format!("{short:?}{rest}")
}

/// `parent.key`, quoted where TOML needs it.
pub fn join(parent: &str, key: &str) -> String {
    let bare =
        !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    let key = if bare { key.to_owned() } else { format!("{key:?}") };
    if parent.is_empty() { key } else { format!("{parent}.{key}") }
}

/// Parses TOML. Every syntax error is reported, by line and column and without the line's text: it
/// may hold a secret.
pub(crate) fn parse(text: &str, is_default: bool) -> Result<Table, Vec<Problem>> {
    let lines = LineIndex::new(text);
    let (table, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        return Ok(convert_table(table.get_ref(), "", &lines, is_default));
    }
    Err(errors
        .into_iter()
        .map(|error| Problem {
            key: String::new(),
            origin: error.span().map(|span| lines.origin(span.start)),
            found: None,
            advice: format!("TOML syntax: {}", error.message()),
        })
        .collect())
}

/// Finds line and column of a byte.
struct LineIndex<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> LineIndex<'a> {
    fn new(text: &'a str) -> Self {
        let breaks = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        Self { text, starts: std::iter::once(0).chain(breaks).collect() }
    }

    fn origin(&self, at: usize) -> Origin {
        let line = self.starts.partition_point(|&start| start <= at);
        let before = self.text.get(self.starts[line - 1]..at).unwrap_or("");
        Origin::File { line, column: before.chars().count() + 1 }
    }
}

fn convert_table(table: &DeTable<'_>, path: &str, lines: &LineIndex<'_>, is_default: bool) -> Table {
    table
        .iter()
        .map(|(key, value)| {
            let origin = if is_default { Origin::Default } else { lines.origin(key.span().start) };
            let path = join(path, key.get_ref());
            (key.get_ref().to_string(), convert(value.get_ref(), path, origin, lines, is_default))
        })
        .collect()
}

fn convert(
    value: &DeValue<'_>,
    path: String,
    origin: Origin,
    lines: &LineIndex<'_>,
    is_default: bool,
) -> Node {
    let value = match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Integer(number),
            Err(_) => Value::Other("number", number.to_string()),
        },
        DeValue::Float(number) => Value::Other("float", number.to_string()),
        DeValue::Boolean(flag) => Value::Boolean(*flag),
        DeValue::Datetime(date) => Value::Other(DATE, date.to_string()),
        DeValue::Array(items) => Value::Array(
            items
                .iter()
                .enumerate()
                .map(|(index, item)| {
                    let origin = if is_default { Origin::Default } else { lines.origin(item.span().start) };
                    convert(item.get_ref(), format!("{path}[{index}]"), origin, lines, is_default)
                })
                .collect(),
        ),
        DeValue::Table(table) => Value::Table(convert_table(table, &path, lines, is_default)),
    };
    Node { path, origin, value }
}

/// Lays `over` on `base`: tables are merged key by key, anything else is replaced. A value where a
/// table belongs is a problem, and the table stays as it was.
pub(crate) fn merge(base: &mut Table, over: Table) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (key, node) in over {
        match (base.get_mut(&key), node) {
            (Some(Node { value: Value::Table(below), .. }), Node { value: Value::Table(above), .. }) => {
                problems.extend(merge(below, above));
            }
            (Some(Node { value: Value::Table(_), .. }), node) => problems.push(Problem {
                found: Some(node.value.shown()),
                advice: format!("write a table, [{}]", node.path),
                key: node.path,
                origin: Some(node.origin),
            }),
            (_, node) => {
                base.insert(key, node);
            }
        }
    }
    problems
}

/// Lays the environment's `POSTRIDER__…` variables over the tree.
///
/// The rest of a name is the key's path, its parts joined by two underscores. Case does not matter,
/// and `_` also matches `-`: `POSTRIDER__DESTINATIONS__SUPPORT_EU__RATE_PER_S` finds
/// `destinations.support-eu.rate_per_s`. A name that is in no file is added in lower case.
pub(crate) fn overlay(
    root: &mut Table,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut ours: Vec<_> = variables
        .into_iter()
        .filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            let prefix = name.get(..ENVIRONMENT_PREFIX.len())?;
            prefix.eq_ignore_ascii_case(ENVIRONMENT_PREFIX).then_some((name, value))
        })
        .collect();
    ours.sort();
    for (name, value) in ours {
        let path = name[ENVIRONMENT_PREFIX.len()..].to_ascii_lowercase();
        let result = match value.into_string() {
            Ok(value) => set(root, "", &path, &name, value),
            Err(_) => Err((path.replace("__", "."), "the value must be UTF-8".into())),
        };
        if let Err((key, advice)) = result {
            problems.push(Problem { key, origin: Some(Origin::Environment(name)), found: None, advice });
        }
    }
    problems
}

fn normal(key: &str) -> String {
    key.to_ascii_lowercase().replace('-', "_")
}

fn set(
    table: &mut Table,
    parent: &str,
    path: &str,
    name: &str,
    value: String,
) -> Result<(), (String, String)> {
    let (part, rest) = match path.split_once("__") {
        Some((part, rest)) => (part, Some(rest)),
        None => (path, None),
    };
    if part.is_empty() {
        return Err((parent.to_owned(), format!("write {ENVIRONMENT_PREFIX}TABLE__KEY=value")));
    }
    let wanted = normal(part);
    let mut matches = table.keys().filter(|key| normal(key) == wanted);
    let key = match (matches.next(), matches.next()) {
        (Some(key), None) => key.clone(),
        (None, _) if parent.ends_with(".headers") => part.replace('_', "-"),
        (None, _) => part.to_owned(),
        (Some(one), Some(other)) => {
            let advice = format!("it could mean {one:?} or {other:?}: set it in the file");
            return Err((join(parent, part), advice));
        }
    };
    let here = join(parent, &key);
    let origin = Origin::Environment(name.to_owned());
    match (rest, table.get_mut(&key)) {
        (None, Some(Node { origin: Origin::Environment(other), value: Value::Environment(_), .. })) => {
            Err((here, format!("{other} sets it too: keep one of them")))
        }
        (None, Some(Node { value: Value::Table(_), .. })) => {
            Err((here, format!("it is a table: write {name}__KEY=value")))
        }
        (None, _) => {
            table.insert(key, Node { path: here, origin, value: Value::Environment(value) });
            Ok(())
        }
        (Some(rest), Some(Node { value: Value::Table(inner), .. })) => set(inner, &here, rest, name, value),
        (Some(_), Some(_)) => Err((here, "it is a value, not a table".into())),
        (Some(rest), None) => {
            let mut inner = Table::new();
            set(&mut inner, &here, rest, name, value)?;
            table.insert(key, Node { path: here, origin, value: Value::Table(inner) });
            Ok(())
        }
    }
}
