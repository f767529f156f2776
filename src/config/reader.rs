//! Reads typed settings out of the tree. A wrong one is noted and reading goes on, so that every
//! problem is known at once; what nobody read is an unknown key.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    time::Duration,
};

use super::{
    problem::{Origin, Problem},
    tree::{self, Node, Table, Value, join},
};

/// What reading a tree has come to.
#[derive(Default)]
pub(super) struct Reader {
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
    pub(super) fn note(&self, key: &str, found: Option<String>, advice: impl Into<String>) {
        self.note_at(key, key, found, advice.into());
    }

    /// Notes that a setting does not go together with another, unless one of them was noted already.
    pub(super) fn conflict(&self, key: &str, other: &str, found: &impl ToString, advice: impl Into<String>) {
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

    /// Whether somebody wrote the setting, rather than leaving it to `default.toml`.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.inner.borrow().places.get(key).is_some_and(|(_, origin)| *origin != Origin::Default)
    }

    /// Whether the setting was written under its own name, not in a table named `*`.
    pub(super) fn is_own(&self, key: &str) -> bool {
        self.inner.borrow().places.get(key).is_some_and(|(path, _)| path == key)
    }

    /// Whether the setting is there at all.
    pub(super) fn is_there(&self, key: &str) -> bool {
        self.inner.borrow().places.contains_key(key)
    }

    /// The problems, and every key that was asked for.
    pub(super) fn finish(self) -> (Vec<Problem>, BTreeSet<String>) {
        let inner = self.inner.into_inner();
        (inner.problems, inner.asked)
    }

    fn place(&self, key: String, node: &Node) {
        self.inner.borrow_mut().places.insert(key, (node.path.clone(), node.origin.clone()));
    }
}

/// One table that is being read.
pub(super) struct Section<'r> {
    reader: &'r Reader,
    /// Its path in the configuration as it is used.
    pub(super) path: String,
    table: Table,
    known: Vec<&'static str>,
}

impl<'r> Section<'r> {
    /// The whole tree.
    pub(super) fn root(reader: &'r Reader, table: Table) -> Self {
        Self { reader, path: String::new(), table, known: Vec::new() }
    }

    /// A key's path.
    pub(super) fn key(&self, key: &str) -> String {
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
    pub(super) fn section(&mut self, key: &'static str) -> Section<'r> {
        let path = self.key(key);
        let table = match self.take(key) {
            Some(node) => self.as_table(&path, node).unwrap_or_default(),
            None => Table::new(),
        };
        Section { reader: self.reader, path, table, known: Vec::new() }
    }

    fn as_table(&self, path: &str, node: Node) -> Option<Table> {
        if let Value::Table(table) = node.value {
            return Some(table);
        }
        self.reader.note(path, Some(node.value.shown()), format!("write a table, [{path}]"));
        None
    }

    /// The named tables of a table, each laid over the one named `*`; and the one named `*` itself.
    pub(super) fn named(&mut self, key: &'static str) -> (Section<'r>, Vec<(String, Section<'r>)>) {
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
                (name, Section { reader: self.reader, path, table: merged, known: Vec::new() })
            })
            .collect();
        let path = join(&all.path, "*");
        (Section { reader: self.reader, path, table: star, known: Vec::new() }, named)
    }

    /// An integer within `range`; `what` says what it counts.
    pub(super) fn integer<T>(&mut self, key: &'static str, range: RangeInclusive<T>, what: &str) -> T
    where
        T: TryFrom<i128> + Into<u64> + Copy,
    {
        let (low, high): (u64, u64) = ((*range.start()).into(), (*range.end()).into());
        let allowed = || format!("write an integer from {low} to {high}: {what}");
        let Some(node) = self.take(key) else {
            self.reader.note(&self.key(key), None, format!("it is missing; {}", allowed()));
            return *range.start();
        };
        let number = match &node.value {
            Value::Integer(number) => Some(*number),
            Value::Environment(text) => text.trim().replace('_', "").parse().ok(),
            _ => None,
        };
        match number {
            Some(number) if number >= i128::from(low) && number <= i128::from(high) => {
                // The range's ends are values of T, so what lies between is one.
                T::try_from(number).unwrap_or(*range.start())
            }
            _ => {
                self.reader.note(&self.key(key), Some(node.value.shown()), allowed());
                *range.start()
            }
        }
    }

    /// An integer that counts milliseconds.
    pub(super) fn millis(&mut self, key: &'static str, range: RangeInclusive<u64>) -> Duration {
        Duration::from_millis(self.integer(key, range, "milliseconds"))
    }

    /// An integer that counts seconds.
    pub(super) fn seconds(&mut self, key: &'static str, range: RangeInclusive<u64>) -> Duration {
        Duration::from_secs(self.integer(key, range, "seconds"))
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, key: &'static str) -> bool {
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
    pub(super) fn text(&mut self, key: &'static str) -> Option<String> {
        let node = self.take(key)?;
        self.as_text(&self.key(key), node.value, true)
    }

    /// A text that may be or hold a secret: a wrong type is reported without the value.
    pub(super) fn private_text(&mut self, key: &'static str) -> Option<String> {
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
    pub(super) fn choice<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)]) -> Option<T> {
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
    pub(super) fn list(&mut self, key: &'static str, is_public: bool) -> Option<Vec<(String, String)>> {
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

    /// A list of pairs of numbers, if there is one; in the environment `1:2,3:4`.
    pub(super) fn pairs(&mut self, key: &'static str) -> Option<Vec<(u64, u64)>> {
        let node = self.take(key)?;
        let pairs = match &node.value {
            Value::Array(items) => items.iter().map(|item| as_pair(&item.value)).collect::<Option<Vec<_>>>(),
            Value::Environment(text) => text
                .split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty())
                .map(|item| {
                    let (first, second) = item.split_once(':')?;
                    Some((first.trim().parse().ok()?, second.trim().parse().ok()?))
                })
                .collect(),
            _ => None,
        };
        if pairs.is_none() {
            let advice = "write a list of pairs of whole numbers, [[1, 2], [3, 4]]";
            self.reader.note(&self.key(key), Some(node.value.shown()), advice);
        }
        pairs
    }

    /// A table of texts with names of the operator's choice; the values may be secrets.
    pub(super) fn private_texts(&mut self, key: &'static str) -> Vec<(String, String, String)> {
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
    pub(super) fn finish(self) {
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

fn as_pair(value: &Value) -> Option<(u64, u64)> {
    let Value::Array(items) = value else { return None };
    let number = |node: &Node| match node.value {
        Value::Integer(number) => u64::try_from(number).ok(),
        _ => None,
    };
    match &items[..] {
        [first, second] => Some((number(first)?, number(second)?)),
        _ => None,
    }
}
