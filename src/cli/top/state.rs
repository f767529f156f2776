//! What `top` knows, and what keys and answers change of it. No terminal, no network, no clock.

use std::{cmp::Ordering, mem};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use serde_json::Value;

use super::{
    show::{shown, thousands},
    views::{Kind, Order, VIEWS, Verb, View},
};

/// What is to be done because of a key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Effect {
    /// Nothing but to draw.
    Draw,
    /// Look at the daemon now.
    Look,
    /// Ask the daemon for more of one thing: a path below `/api/v1`, by segments.
    LookAt(Vec<String>),
    /// Give an order.
    Give(Order),
    /// Leave.
    Quit,
}

/// What the keys mean at the moment.
#[derive(Debug, PartialEq)]
pub(super) enum Mode {
    /// The table.
    Table,
    /// A filter is typed.
    Filter,
    /// A verb waits for a yes.
    Confirm(Question),
    /// One thing by itself.
    One(Value),
    /// The list of keys.
    Help,
}

/// A verb that waits for a yes.
#[derive(Debug, PartialEq)]
pub(super) struct Question {
    pub(super) order: Order,
    /// `cancel spring.csv: nothing more of it is sent, ever`
    pub(super) text: String,
    /// What is to be typed, if it can't be undone, and what was.
    pub(super) typed: Option<(String, String)>,
}

/// What was seen of the daemon.
#[derive(Debug)]
pub(super) struct Seen {
    /// The view that was asked for.
    pub(super) view: usize,
    pub(super) overview: Value,
    pub(super) rows: Vec<Value>,
    /// How many there are, if the list says so: it may be cut.
    pub(super) total: Option<u64>,
}

/// Everything.
#[derive(Debug)]
pub(super) struct Top {
    pub(super) view: usize,
    pub(super) mode: Mode,
    pub(super) overview: Value,
    rows: Vec<Value>,
    pub(super) total: Option<u64>,
    /// The row that is chosen, by its id.
    chosen: Option<Vec<Value>>,
    /// The column that rows are sorted by, and whether the greatest comes first.
    pub(super) sorted: Option<(usize, bool)>,
    pub(super) filter: String,
    /// Lines of one thing that are scrolled past.
    pub(super) scrolled: u16,
    /// What became of the last order, or why the daemon did not answer.
    pub(super) message: Option<String>,
    /// Why the daemon can't be seen: what is shown is old.
    pub(super) lost: Option<String>,
}

fn id_of(view: &View, row: &Value) -> Vec<Value> {
    view.id.iter().map(|at| row.pointer(at).cloned().unwrap_or_default()).collect()
}

/// Numbers by size, texts by letter; what is not known comes last, whichever way.
fn compare(a: Option<&Value>, b: Option<&Value>, falling: bool) -> Ordering {
    let known = |value: Option<&Value>| value.is_some_and(|value| !value.is_null());
    match (known(a), known(b)) {
        (true, true) => {}
        (a, b) => return b.cmp(&a),
    }
    let number = |value: Option<&Value>| value.and_then(Value::as_f64);
    let order = match (number(a), number(b)) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        _ => a.map(Value::to_string).cmp(&b.map(Value::to_string)),
    };
    if falling { order.reverse() } else { order }
}

impl Top {
    /// Nothing is known yet.
    pub(super) fn new() -> Self {
        Self {
            view: 0,
            mode: Mode::Table,
            overview: Value::Null,
            rows: Vec::new(),
            total: None,
            chosen: None,
            sorted: None,
            filter: String::new(),
            scrolled: 0,
            message: None,
            lost: Some("not asked yet".to_owned()),
        }
    }

    /// The view that is shown.
    pub(super) fn shows(&self) -> &'static View {
        &VIEWS[self.view]
    }

    /// The rows that the filter leaves, as they are sorted.
    pub(super) fn rows(&self) -> Vec<&Value> {
        let view = self.shows();
        let filter = self.filter.to_lowercase();
        let fits = |row: &&Value| {
            let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            filter.is_empty()
                || view
                    .columns
                    .iter()
                    .filter_map(|column| row.pointer(column.at))
                    .any(|value| text(value).to_lowercase().contains(&filter))
        };
        let mut rows: Vec<_> = self.rows.iter().filter(fits).collect();
        if let Some((column, falling)) = self.sorted {
            let at = view.columns[column].at;
            rows.sort_by(|a, b| compare(a.pointer(at), b.pointer(at), falling));
        }
        rows
    }

    /// How many rows the daemon has sent.
    pub(super) fn loaded(&self) -> usize {
        self.rows.len()
    }

    /// The place of the chosen row among those that are shown.
    pub(super) fn place(&self) -> Option<usize> {
        let rows = self.rows();
        let chosen = self.chosen.as_ref()?;
        rows.iter().position(|row| id_of(self.shows(), row) == *chosen)
    }

    fn chosen(&self) -> Option<Value> {
        let place = self.place()?;
        self.rows().get(place).map(|row| (*row).clone())
    }

    /// Takes in what was seen. What is chosen stays chosen, wherever it stands now.
    pub(super) fn see(&mut self, seen: Seen) {
        self.overview = seen.overview;
        self.lost = None;
        if seen.view == self.view {
            self.rows = seen.rows;
            self.total = seen.total;
            if self.place().is_none() {
                self.choose(0);
            }
        }
    }

    /// More of the thing that is looked at.
    pub(super) fn see_one(&mut self, one: Value) {
        if matches!(self.mode, Mode::One(_)) {
            self.mode = Mode::One(one);
        }
    }

    fn choose(&mut self, place: usize) {
        let rows = self.rows();
        let row = rows.get(place.min(rows.len().saturating_sub(1)));
        self.chosen = row.map(|row| id_of(self.shows(), row));
    }

    fn step(&mut self, by: isize) {
        let place = self.place().unwrap_or(0);
        self.choose(place.saturating_add_signed(by));
    }

    fn show(&mut self, view: usize) -> Effect {
        if view >= VIEWS.len() {
            return Effect::Draw;
        }
        let overview = mem::take(&mut self.overview);
        let (message, lost) = (self.message.take(), self.lost.take());
        *self = Self { view, overview, message, lost, ..Self::new() };
        Effect::Look
    }

    /// A key was pressed.
    pub(super) fn press(&mut self, key: KeyEvent) -> Effect {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Effect::Quit;
        }
        match mem::replace(&mut self.mode, Mode::Table) {
            Mode::Table => self.press_in_table(key.code),
            Mode::Filter => self.press_in_filter(key.code),
            Mode::Confirm(question) => self.answer(question, key.code),
            Mode::One(one) => match key.code {
                KeyCode::Esc | KeyCode::Enter | KeyCode::Char('q') => Effect::Look,
                KeyCode::Char(key) if self.ask(key, &one) => Effect::Draw,
                key => {
                    let by = match key {
                        KeyCode::Char('j') | KeyCode::Down => 1,
                        KeyCode::Char('k') | KeyCode::Up => -1,
                        KeyCode::PageDown => 20,
                        KeyCode::PageUp => -20,
                        _ => 0,
                    };
                    self.scrolled = self.scrolled.saturating_add_signed(by);
                    self.mode = Mode::One(one);
                    Effect::Draw
                }
            },
            Mode::Help => Effect::Draw,
        }
    }

    fn press_in_table(&mut self, key: KeyCode) -> Effect {
        self.message = None;
        match key {
            KeyCode::Char('q') => return Effect::Quit,
            KeyCode::Char('?') => self.mode = Mode::Help,
            KeyCode::Char('/') => self.mode = Mode::Filter,
            KeyCode::Char('j') | KeyCode::Down => self.step(1),
            KeyCode::Char('k') | KeyCode::Up => self.step(-1),
            KeyCode::PageDown => self.step(20),
            KeyCode::PageUp => self.step(-20),
            KeyCode::Home | KeyCode::Char('g') => self.choose(0),
            KeyCode::End | KeyCode::Char('G') => self.choose(usize::MAX),
            KeyCode::Char('s') => self.sort_by_next(),
            KeyCode::Char('S') => self.sorted = self.sorted.map(|(column, falling)| (column, !falling)),
            KeyCode::Tab => return self.show((self.view + 1) % VIEWS.len()),
            KeyCode::BackTab => return self.show((self.view + VIEWS.len() - 1) % VIEWS.len()),
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char(digit @ '1'..='9') => return self.show(digit as usize - '1' as usize),
            KeyCode::Enter => return self.drill(),
            KeyCode::Char(key) => {
                if let Some(row) = self.chosen() {
                    self.ask(key, &row);
                }
            }
            _ => {}
        }
        Effect::Draw
    }

    /// The next column; behind the last one, the order in which the daemon lists them.
    fn sort_by_next(&mut self) {
        let columns = self.shows().columns;
        let next = self.sorted.map_or(0, |(column, _)| column + 1);
        let is_text = |column: usize| columns[column].kind == Kind::Text;
        self.sorted = (next < columns.len()).then(|| (next, !is_text(next)));
    }

    fn press_in_filter(&mut self, key: KeyCode) -> Effect {
        match key {
            KeyCode::Esc => {
                self.filter.clear();
                return Effect::Draw;
            }
            KeyCode::Enter => return Effect::Draw,
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(character) if self.filter.len() < 64 => self.filter.push(character),
            _ => {}
        }
        self.mode = Mode::Filter;
        if self.place().is_none() {
            self.choose(0);
        }
        Effect::Draw
    }

    fn drill(&mut self) -> Effect {
        let Some(row) = self.chosen() else { return Effect::Draw };
        let view = self.shows();
        // A file that could not be registered has no id, and nothing more to say.
        let id = row.get("id").or_else(|| row.get("name")).and_then(Value::as_str).map(str::to_owned);
        (self.mode, self.scrolled) = (Mode::One(row), 0);
        match id {
            Some(id) if view.has_more => Effect::LookAt(vec![view.path.to_owned(), id]),
            _ => Effect::Draw,
        }
    }

    /// Whether `key` is a verb for `row`: then it waits for a yes.
    fn ask(&mut self, key: char, row: &Value) -> bool {
        let view = self.shows();
        let Some(verb) = view.verbs.iter().find(|verb| verb.key == key) else { return false };
        if row.get("id").is_some_and(Value::is_null) {
            self.message = Some("it was never registered: nothing of it can be steered".to_owned());
            return true;
        }
        let Verb { name, effect, is_final, order, .. } = verb;
        let called = shown(row.pointer(view.called), Kind::Text);
        let what = match row.get("messages").and_then(Value::as_u64) {
            Some(messages) => format!("{} messages of {called}", thousands(messages)),
            None => called.clone(),
        };
        let text = format!("{name} {what}: {effect}");
        let typed = is_final.then(|| (called, String::new()));
        self.mode = Mode::Confirm(Question { order: order(row), text, typed });
        true
    }

    fn answer(&mut self, mut question: Question, key: KeyCode) -> Effect {
        match (&mut question.typed, key) {
            (_, KeyCode::Esc) | (None, KeyCode::Char('n') | KeyCode::Enter) => return Effect::Draw,
            (None, KeyCode::Char('y')) => return Effect::Give(question.order),
            (Some((name, typed)), KeyCode::Enter) if name == typed => return Effect::Give(question.order),
            (Some((_, typed)), KeyCode::Backspace) => drop(typed.pop()),
            (Some((name, typed)), KeyCode::Char(character)) if typed.len() < name.len() => {
                typed.push(character);
            }
            _ => {}
        }
        self.mode = Mode::Confirm(question);
        Effect::Draw
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
