//! Reads typed settings out of the tree. A wrong one is noted and reading continues, so that every
//! problem is known at once; what nobody read is an unknown key.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    time::Duration,
};

use crate::{
    problem::{Origin, Problem},
    tree::{self, DATE, Node, Table, Value, join, shown_text},
    value::{DURATION, SIZE, is_bare, parse_duration, parse_size, show_duration, show_size},
};

/// What reading a tree has found.
#[derive(Default)]
pub struct Reader {
    inner: RefCell<Inner>,
}

#[derive(Default)]
struct Inner {
    problems: Vec<Problem>,
    /// Where each setting came from, by its path in the configuration as it is used: a destination's
    /// key may have been written in `destinations."*"`.
    places: BTreeMap<String, (String, Origin)>,
    /// Settings that could not be read: checks that involve them would only repeat it.
    unread: BTreeSet<String>,
    asked: BTreeSet<String>,
}

impl Reader {
    /// Notes a problem of one setting with the place it was written at.
    pub fn note(&self, key: &str, found: Option<String>, advice: impl Into<String>) {
        self.note_at(key, key, found, advice.into());
    }

    /// Notes that a setting does not go together with another, unless one of them was noted already.
    pub fn conflict(&self, key: &str, other: &str, found: &impl ToString, advice: impl Into<String>) {
        let is_noted = {
            let inner = self.inner.borrow();
            inner.unread.contains(key) || inner.unread.contains(other)
        };
        if !is_noted {
            // A default can't be pointed at; what the operator wrote against it can.
            let place = if self.is_set(key) { key } else { other };
            self.note_at(key, place, Some(found.to_string()), advice.into());
        }
    }

    fn note_at(&self, key: &str, place: &str, found: Option<String>, advice: String) {
        let mut inner = self.inner.borrow_mut();
        inner.unread.insert(key.to_owned());
        let origin = inner.places.get(place).map(|(_, origin)| origin.clone());
        let key = match inner.places.get(key) {
            Some((path, origin)) if *origin != Origin::Default => path.clone(),
            _ => key.to_owned(),
        };
        inner.problems.push(Problem { key, origin, found, advice });
    }

    /// Whether somebody wrote the setting, rather than leaving it to its default.
    pub fn is_set(&self, key: &str) -> bool {
        self.inner.borrow().places.get(key).is_some_and(|(_, origin)| *origin != Origin::Default)
    }

    /// Whether the setting was written under its own name, not in a table named `*`.
    pub fn is_own(&self, key: &str) -> bool {
        self.inner.borrow().places.get(key).is_some_and(|(path, _)| path == key)
    }

    /// Whether something is wrong with the setting.
    pub fn is_unread(&self, key: &str) -> bool {
        self.inner.borrow().unread.contains(key)
    }

    /// Whether the setting is there at all.
    pub fn is_there(&self, key: &str) -> bool {
        self.inner.borrow().places.contains_key(key)
    }

    /// The problems, and every key that was asked for.
    pub fn finish(self) -> (Vec<Problem>, BTreeSet<String>) {
        let inner = self.inner.into_inner();
        (inner.problems, inner.asked)
    }

    fn place(&self, key: String, node: &Node) {
        self.inner.borrow_mut().places.insert(key, (node.path.clone(), node.origin.clone()));
    }
}

/// One table that is being read.
pub struct Section<'r> {
    reader: &'r Reader,
    /// Its path in the configuration as it is used.
    pub path: String,
    /// Whether keys without a default must be there.
    pub need: Need,
    table: Table,
    known: Vec<&'static str>,
}

/// Whether a key must be there. In a `"*"` table none must, and none of another kind's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// It must.
    Required,
    /// It may be left out.
    Optional,
}

impl<'r> Section<'r> {
    /// The whole tree.
    pub fn root(reader: &'r Reader, table: Table) -> Self {
        Self { reader, path: String::new(), need: Need::Required, table, known: Vec::new() }
    }

    /// A key's path.
    pub fn key(&self, key: &str) -> String {
        join(&self.path, key)
    }

    fn take(&mut self, key: &'static str) -> Option<Node> {
        self.known.push(key);
        let path = self.key(key);
        self.reader.inner.borrow_mut().asked.insert(path.clone());
        let node = self.table.remove(key)?;
        self.reader.place(path, &node);
        Some(node)
    }

    /// A table; empty if it is missing or none.
    #[must_use]
    pub fn section(&mut self, key: &'static str) -> Section<'r> {
        let path = self.key(key);
        let table = match self.take(key) {
            Some(node) => self.as_table(&path, node).unwrap_or_default(),
            None => Table::new(),
        };
        Section { reader: self.reader, path, need: self.need, table, known: Vec::new() }
    }

    fn as_table(&self, path: &str, node: Node) -> Option<Table> {
        if let Value::Table(table) = node.value {
            return Some(table);
        }
        self.reader.note(path, Some(node.value.shown()), format!("write a table, [{path}]"));
        None
    }

    /// The named tables of a table, each laid over the one named `*`; and the one named `*` itself.
    pub fn named(&mut self, key: &'static str) -> (Section<'r>, Vec<(String, Section<'r>)>) {
        let all = self.section(key);
        let (mut star, mut named) = (Table::new(), Vec::new());
        for (name, node) in all.table {
            let path = join(&all.path, &name);
            self.reader.place(path.clone(), &node);
            let Some(table) = self.as_table(&path, node) else {
                continue;
            };
            if name == "*" {
                star = table;
            } else {
                named.push((name, path, table));
            }
        }
        let named = named
            .into_iter()
            .map(|(name, path, table)| {
                let mut merged = star.clone();
                self.reader.inner.borrow_mut().problems.extend(tree::merge(&mut merged, table));
                (
                    name,
                    Section {
                        reader: self.reader,
                        path,
                        need: Need::Required,
                        table: merged,
                        known: Vec::new(),
                    },
                )
            })
            .collect();
        let path = join(&all.path, "*");
        (Section { reader: self.reader, path, need: Need::Optional, table: star, known: Vec::new() }, named)
    }

    /// An integer within `range`; `what` says what it counts.
    pub fn integer(&mut self, key: &'static str, range: RangeInclusive<u64>, what: &str) -> u64 {
        let (low, high) = (*range.start(), *range.end());
        let allowed = format!("write an integer from {low} to {high}: {what}");
        let Some(node) = self.take(key) else {
            self.reader.note(&self.key(key), None, format!("it is missing; {allowed}"));
            return low;
        };
        let number = match &node.value {
            Value::Integer(number) => u64::try_from(*number).ok(),
            Value::Environment(text) => text.trim().replace('_', "").parse().ok(),
            _ => None,
        };
        let found = number.filter(|number| range.contains(number));
        found.unwrap_or_else(|| {
            self.reader.note(&self.key(key), Some(node.value.shown()), allowed);
            low
        })
    }

    /// Whether a key is that word; if so, it is read.
    pub fn take_word(&mut self, key: &'static str, word: &str) -> bool {
        let is_word = self.table.get(key).is_some_and(|node| match &node.value {
            Value::Text(text) => text == word,
            Value::Environment(text) => text.trim() == word,
            _ => false,
        });
        is_word && self.take(key).is_some()
    }

    /// A time within `range`.
    pub fn duration(&mut self, key: &'static str, range: RangeInclusive<Duration>) -> Duration {
        let (low, high) = (*range.start(), *range.end());
        let allowed = format!("write a time from {} to {}", show_duration(low), show_duration(high));
        self.measure(key, DURATION, &allowed, |text| {
            parse_duration(text).filter(|found| range.contains(found))
        })
        .unwrap_or(low)
    }

    /// A size in bytes within `range`.
    pub fn size(&mut self, key: &'static str, range: RangeInclusive<u64>) -> u64 {
        let (low, high) = (*range.start(), *range.end());
        let allowed = format!("write a size from {} to {}", show_size(low), show_size(high));
        self.measure(key, SIZE, &allowed, |text| parse_size(text).filter(|found| range.contains(found)))
            .unwrap_or(low)
    }

    /// A number with its unit. `how` says how to write one, `allowed` within which bounds.
    fn measure<T>(
        &mut self,
        key: &'static str,
        how: &str,
        allowed: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let path = self.key(key);
        let Some(node) = self.take(key) else {
            self.reader.note(&path, None, format!("it is missing; {allowed}, {how}"));
            return None;
        };
        let text = match &node.value {
            Value::Text(text) | Value::Environment(text) => Some(text.as_str()),
            _ => None,
        };
        let found = text.and_then(parse);
        if found.is_none() {
            let is_number = matches!(node.value, Value::Integer(_)) || text.is_some_and(is_bare);
            let advice = if is_number {
                format!("it has no unit; write {how}; {allowed}")
            } else {
                format!("{allowed}, {how}")
            };
            self.reader.note(&path, Some(node.value.shown()), advice);
        }
        found
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, key: &'static str) -> bool {
        let node = self.take(key);
        let flag = match node.as_ref().map(|node| &node.value) {
            Some(Value::Boolean(flag)) => Some(*flag),
            Some(Value::Environment(text)) => text.trim().to_ascii_lowercase().parse().ok(),
            _ => None,
        };
        flag.unwrap_or_else(|| {
            let found = node.map(|node| node.value.shown());
            self.reader.note(&self.key(key), found, "write true or false");
            false
        })
    }

    /// A text, if there is one.
    pub fn text(&mut self, key: &'static str) -> Option<String> {
        let node = self.take(key)?;
        self.as_text(&self.key(key), node.value, true)
    }

    /// A text that may be or hold a secret: a wrong type is reported without the value.
    pub fn private_text(&mut self, key: &'static str) -> Option<String> {
        let node = self.take(key)?;
        self.as_text(&self.key(key), node.value, false)
    }

    fn as_text(&self, key: &str, value: Value, is_public: bool) -> Option<String> {
        match value {
            Value::Text(text) | Value::Environment(text) => Some(text),
            other => {
                self.reader.note(key, is_public.then(|| other.shown()), "write a text in quotes");
                None
            }
        }
    }

    /// One of some words, if there is one.
    pub fn choice<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)]) -> Option<T> {
        let node = self.take(key)?;
        let text = match &node.value {
            Value::Text(text) => Some(text.as_str()),
            Value::Environment(text) => Some(text.trim()),
            _ => None,
        };
        let chosen = words.iter().find(|(word, _)| text.is_some_and(|text| text == *word));
        if chosen.is_none() {
            let allowed = words.iter().map(|(word, _)| format!("{word:?}")).collect::<Vec<_>>().join(", ");
            let advice = format!("write one of {allowed}");
            self.reader.note(&self.key(key), Some(node.value.shown()), advice);
        }
        chosen.map(|(_, value)| *value)
    }

    /// A list of texts with the path of each, if there is one; in the environment they are
    /// separated by commas. `is_public` is false where an item may be a secret.
    pub fn list(&mut self, key: &'static str, is_public: bool) -> Option<Vec<(String, String)>> {
        let node = self.take(key)?;
        let path = self.key(key);
        match node.value {
            Value::Array(items) => Some(
                items
                    .into_iter()
                    .enumerate()
                    .filter_map(|(index, item)| {
                        let path = format!("{path}[{index}]");
                        self.reader.place(path.clone(), &item);
                        Some((path.clone(), self.as_text(&path, item.value, is_public)?))
                    })
                    .collect(),
            ),
            Value::Environment(ref text) => Some(
                text.split(',')
                    .map(str::trim)
                    .filter(|item| !item.is_empty())
                    .enumerate()
                    .map(|(index, item)| {
                        let path = format!("{path}[{index}]");
                        let place = (format!("{}[{index}]", node.path), node.origin.clone());
                        self.reader.inner.borrow_mut().places.insert(path.clone(), place);
                        (path, item.to_owned())
                    })
                    .collect(),
            ),
            other => {
                self.reader.note(&path, is_public.then(|| other.shown()), "write a list, [\"…\", \"…\"]");
                None
            }
        }
    }

    /// A text or a list of them, with the path of each, if there is one.
    pub fn texts(&mut self, key: &'static str) -> Option<Vec<(String, String)>> {
        match self.table.get(key).map(|node| &node.value) {
            Some(Value::Text(_) | Value::Environment(_)) => Some(vec![(self.key(key), self.text(key)?)]),
            _ => self.list(key, true),
        }
    }

    /// The text of a point in time, in quotes or as TOML has them, if there is one.
    pub fn date(&mut self, key: &'static str) -> Option<String> {
        let node = self.take(key)?;
        match node.value {
            Value::Other(DATE, text) => Some(text),
            other => self.as_text(&self.key(key), other, true),
        }
    }

    /// A list of pairs of a whole number and a time, if there is one; in the environment `1:2s,3:4s`.
    pub fn pairs(&mut self, key: &'static str) -> Option<Vec<(u64, Duration)>> {
        let node = self.take(key)?;
        let pairs = match &node.value {
            Value::Array(items) => items.iter().map(|item| as_pair(&item.value)).collect::<Option<Vec<_>>>(),
            Value::Environment(text) => text
                .split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty())
                .map(|item| {
                    let (first, second) = item.split_once(':')?;
                    Some((first.trim().parse().ok()?, parse_duration(second)?))
                })
                .collect(),
            _ => None,
        };
        if pairs.is_none() {
            let advice = "write a list of pairs of a whole number and a time, [[1, \"2s\"], [3, \"4s\"]]";
            self.reader.note(&self.key(key), Some(node.value.shown()), advice);
        }
        pairs
    }

    /// Notes a key that must be there and is not.
    pub fn require(&self, key: &str, advice: &str) {
        let key = self.key(key);
        if self.need == Need::Required && !self.reader.is_there(&key) {
            self.reader.note(&key, None, format!("it is missing; {advice}"));
        }
    }

    /// A text that `is_right` accepts; empty if it is missing or of another type.
    pub fn checked_text(
        &mut self,
        key: &'static str,
        is_right: impl Fn(&str) -> bool,
        advice: &str,
    ) -> String {
        let text = self.text(key).unwrap_or_default();
        let path = self.key(key);
        if self.reader.is_there(&path) && !is_right(&text) {
            self.reader.note(&path, Some(shown_text(&text)), advice);
        }
        text
    }

    /// The reader that problems are noted in.
    pub fn reader(&self) -> &'r Reader {
        self.reader
    }

    /// A table of texts with names of the operator's choice; the values may be secrets.
    pub fn private_texts(&mut self, key: &'static str) -> Vec<(String, String, String)> {
        let section = self.section(key);
        section
            .table
            .into_iter()
            .filter_map(|(name, node)| {
                let path = join(&section.path, &name);
                self.reader.place(path.clone(), &node);
                let text = self.as_text(&path, node.value, false)?;
                Some((path, name, text))
            })
            .collect()
    }

    /// Ends the reading: what is left is unknown.
    pub fn finish(self) {
        for (key, node) in self.table {
            let nearest = self
                .known
                .iter()
                .map(|known| (strsim::jaro_winkler(known, &key.to_lowercase()), known))
                .filter(|(similarity, _)| *similarity > 0.7)
                .max_by(|(a, _), (b, _)| a.total_cmp(b));
            let advice = match nearest {
                Some((_, known)) => format!("unknown key; did you mean `{known}`?"),
                None => format!("unknown key; known here: {}", self.known.join(", ")),
            };
            let mut inner = self.reader.inner.borrow_mut();
            // The value of a key that nobody knows may be a secret: it is not shown.
            inner.problems.push(Problem { key: node.path, origin: Some(node.origin), found: None, advice });
        }
    }
}

fn as_pair(value: &Value) -> Option<(u64, Duration)> {
    let Value::Array(items) = value else { return None };
    match &items[..] {
        [Node { value: Value::Integer(number), .. }, Node { value: Value::Text(text), .. }] => {
            Some((u64::try_from(*number).ok()?, parse_duration(text)?))
        }
        _ => None,
    }
}
