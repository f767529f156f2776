//! How `top` looks.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Modifier, Style},
    text::{Line, Span, Text},
    widgets::{Block, Cell, Clear, Paragraph, Row, Table, TableState, Wrap},
};
use serde_json::Value;

use super::{
    show::{shown, thousands},
    state::{Mode, Top},
    views::{Column, Kind, VIEWS},
};

/// Colour says nothing that a word does not say as well; a terminal without colours shows all of it.
const QUIET: Style = Style::new().add_modifier(Modifier::DIM);
const LOUD: Style = Style::new().add_modifier(Modifier::BOLD);
const CHOSEN: Style = Style::new().add_modifier(Modifier::REVERSED);

/// Lines above the table.
const HEAD: u16 = 4;

/// Draws everything.
pub(super) fn draw(top: &Top, frame: &mut Frame<'_>) {
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(HEAD), Constraint::Min(3), Constraint::Length(2)])
            .areas(frame.area());
    frame.render_widget(Paragraph::new(head_of(top)), head);
    match &top.mode {
        Mode::One(one) => draw_one(top, one, frame, body),
        _ => draw_table(top, frame, body),
    }
    frame.render_widget(Paragraph::new(foot_of(top)), foot);
    match &top.mode {
        Mode::Confirm(question) => {
            let mut lines = vec![Line::styled(question.text.clone(), LOUD), Line::default()];
            match &question.typed {
                Some((name, typed)) => {
                    lines.push(Line::raw(format!("It can't be undone. Type its name, {name}, and Enter:")));
                    lines.push(Line::styled(format!("> {}", plain(typed)), LOUD));
                    lines.push(Line::raw("Esc: keep it as it is"));
                }
                None => lines.push(Line::raw("y: do it    Esc: keep it as it is")),
            }
            pop_up(frame, "Sure?", lines);
        }
        Mode::Help => pop_up(frame, "Keys", help(top)),
        Mode::Table | Mode::Filter | Mode::One(_) => {}
    }
}

/// Text of others, escaped.
fn plain(text: &str) -> String {
    shown(Some(&Value::from(text)), Kind::Text)
}

fn at(value: &Value, pointer: &str, kind: Kind) -> String {
    shown(value.pointer(pointer), kind)
}

/// Will it be done, and if not, why not.
fn head_of(top: &Top) -> Text<'static> {
    let overview = &top.overview;
    let count = |pointer: &str| overview.pointer(pointer).and_then(Value::as_u64);
    let answer = if let Some(why) = &top.lost {
        format!("No contact with the daemon ({}). What is below is old.", plain(why))
    } else {
        match (count("/open"), overview.pointer("/done_at").and_then(Value::as_str)) {
            (None, _) => "What is open is not known at the moment.".to_owned(),
            (Some(0), _) => "Everything is settled.".to_owned(),
            (Some(open), Some(_)) => {
                let done = at(overview, "/done_at", Kind::Moment);
                format!("{} messages are open; about {done} they are sent.", thousands(open))
            }
            (Some(open), None) => {
                format!("{} messages are open, and it can't be said until when.", thousands(open))
            }
        }
    };
    let mut second = match overview.pointer("/ceiling/text") {
        Some(Value::String(why)) => {
            let of = overview.pointer("/ceiling_of").and_then(Value::as_str);
            format!("{}{}", of.map_or(String::new(), |of| format!("{}: ", plain(of))), plain(why))
        }
        _ => String::new(),
    };
    if let Some(false) = overview.pointer("/finish_by/in_time").and_then(Value::as_bool) {
        let [file, by] = [("/finish_by/file", Kind::Text), ("/finish_by/at", Kind::Moment)]
            .map(|(pointer, kind)| at(overview, pointer, kind));
        second = [second, format!("{file} will not be done by {by}")].join("    ");
    }
    let alarms = overview.pointer("/alarms").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let alarm = match alarms {
        [] if top.lost.is_some() => "Alarms are not known.".to_owned(),
        [] => "No alarm.".to_owned(),
        [first, more @ ..] => {
            let others =
                if more.is_empty() { String::new() } else { format!("  (and {} more: 5)", more.len()) };
            format!("! {}{others}", at(first, "/text", Kind::Text))
        }
    };
    let facts = format!(
        "{}/s  {} dead  {} % of attempts fail",
        at(overview, "/sent_per_s", Kind::PerS),
        at(overview, "/dead", Kind::Count),
        at(overview, "/failed_percent", Kind::Percent)
    );
    let tabs = VIEWS.iter().enumerate().flat_map(|(nth, view)| {
        let style = if nth == top.view { CHOSEN } else { QUIET };
        [Span::styled(format!(" {} {} ", nth + 1, view.name), style), Span::raw(" ")]
    });
    Text::from(vec![
        Line::from(vec![Span::styled(answer, LOUD), Span::raw("  "), Span::raw(facts)]),
        Line::raw(second),
        Line::styled(alarm, if alarms.is_empty() { QUIET } else { LOUD }),
        Line::from(tabs.collect::<Vec<_>>()),
    ])
}

fn draw_table(top: &Top, frame: &mut Frame<'_>, area: Rect) {
    let view = top.shows();
    let is_number = |kind: Kind| !matches!(kind, Kind::Text | Kind::Moment);
    let header = view.columns.iter().enumerate().map(|(nth, column)| {
        let mark = match top.sorted {
            Some((sorted, falling)) if sorted == nth => {
                if falling {
                    "↓"
                } else {
                    "↑"
                }
            }
            _ => "",
        };
        let title = Line::raw(format!("{}{mark}", column.title));
        Cell::from(if is_number(column.kind) { title.right_aligned() } else { title })
    });
    let rows = top.rows();
    let shown_rows = rows.iter().map(|row| {
        Row::new(view.columns.iter().map(|column| {
            let value = Line::raw(shown(row.pointer(column.at), column.kind));
            Cell::from(if is_number(column.kind) { value.right_aligned() } else { value })
        }))
    });
    let widths = view.columns.iter().map(|column| match column.width {
        0 => Constraint::Fill(1),
        width => Constraint::Length(width),
    });
    let style = if top.lost.is_some() { QUIET } else { Style::new() };
    let table = Table::new(shown_rows, widths)
        .header(Row::new(header).style(LOUD))
        .row_highlight_style(CHOSEN)
        .style(style);
    let mut state = TableState::new().with_selected(top.place());
    frame.render_stateful_widget(table, area, &mut state);
    if rows.is_empty() && area.height > 1 {
        let text = if top.filter.is_empty() { "Nothing here." } else { "Nothing matches the filter." };
        frame.render_widget(Paragraph::new(text), Rect { y: area.y + 1, height: 1, ..area });
    }
}

/// Everything that is known of one thing.
fn draw_one(top: &Top, one: &Value, frame: &mut Frame<'_>, area: Rect) {
    let view = top.shows();
    // What is not known of a column is said; other facts are only there when they are known.
    let is_known = |fact: &&Column| one.pointer(fact.at).is_some_and(|value| !value.is_null());
    let facts = view.columns.iter().chain(view.facts.iter().filter(is_known));
    let mut lines: Vec<_> =
        facts.map(|fact| (fact.title.to_owned(), shown(one.pointer(fact.at), fact.kind))).collect();
    let of_destinations = one.pointer("/destinations").and_then(Value::as_object);
    for (name, part) in of_destinations.into_iter().flatten() {
        let counts = ["sent", "dead", "retrying", "pending"]
            .map(|state| format!("{} {state}", at(part, &format!("/{state}"), Kind::Count)))
            .join(", ");
        let why = ["/held/reason", "/ceiling/text"]
            .iter()
            .filter_map(|at| part.pointer(at).and_then(Value::as_str))
            .map(|why| format!(" – {}", plain(why)));
        lines.push((format!("at {}", plain(name)), counts + &why.collect::<String>()));
    }
    for group in one.pointer("/dead_groups").and_then(Value::as_array).into_iter().flatten() {
        let messages = at(group, "/messages", Kind::Count);
        let [reason, status, detail] =
            ["/reason", "/status", "/detail"].map(|pointer| at(group, pointer, Kind::Text));
        lines.push(("dead".to_owned(), format!("{messages} by {reason} {status} {detail}")));
    }
    for order in one.pointer("/audit").and_then(Value::as_array).into_iter().flatten() {
        let [by, what, detail] = ["/by", "/order", "/detail"].map(|pointer| at(order, pointer, Kind::Text));
        lines.push((at(order, "/at", Kind::Moment), format!("{what} by {by}: {detail}")));
    }
    let width = lines.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
    let line = |(label, value): (String, String)| {
        Line::from(vec![Span::styled(format!("{label:<width$}  "), QUIET), Span::raw(value)])
    };
    let last = lines.len().saturating_sub(1).min(usize::from(u16::MAX)) as u16;
    let text: Vec<_> = lines.into_iter().map(line).collect();
    let text = Paragraph::new(text).wrap(Wrap { trim: false }).scroll((top.scrolled.min(last), 0));
    frame.render_widget(text, area);
}

/// What of the list is seen, and what can be done.
fn foot_of(top: &Top) -> Text<'static> {
    let view = top.shows();
    let (shown_rows, loaded) = (top.rows().len(), top.loaded());
    let cut = match top.total {
        Some(total) if total > loaded as u64 => format!(" of {}", thousands(total)),
        _ if shown_rows < loaded => format!(" of {}", thousands(loaded as u64)),
        _ => String::new(),
    };
    let mut first = vec![format!("Showing {}{cut}", thousands(shown_rows as u64))];
    match (&top.mode, top.filter.is_empty()) {
        (Mode::Filter, _) => {
            first = vec![format!("Filter: {}_   Enter: keep   Esc: none", plain(&top.filter))];
        }
        (_, false) => first.push(format!("filter: {} (Esc: none)", plain(&top.filter))),
        (_, true) => {}
    }
    first.extend(top.message.as_deref().map(plain));
    let first = first.join("   ");
    let verbs: Vec<_> = view.verbs.iter().map(|verb| format!("{} {}", verb.key, verb.name)).collect();
    let verbs = verbs.join("  ");
    let keys = match top.mode {
        Mode::One(_) => format!("{verbs}  Esc back"),
        _ => format!("{verbs}  / filter  s sort  Enter more  Tab next  ? keys  q quit"),
    };
    Text::from(vec![Line::raw(first), Line::styled(keys, QUIET)])
}

fn help(top: &Top) -> Vec<Line<'static>> {
    let mut keys = vec![
        ("1–6, Tab", "another view"),
        ("j k ↓ ↑", "another row; PageDown, PageUp, g, G"),
        ("Enter", "all that is known of it"),
        ("/", "filter; Esc takes it away"),
        ("s, S", "sort by the next column; the other way"),
        ("q", "quit"),
    ]
    .into_iter()
    .map(|(key, what)| (key.to_owned(), what.to_owned()))
    .collect::<Vec<_>>();
    keys.extend(
        top.shows()
            .verbs
            .iter()
            .map(|verb| (verb.key.to_string(), format!("{}: {}", verb.name, verb.effect))),
    );
    keys.into_iter().map(|(key, what)| Line::raw(format!("{key:<9} {what}"))).collect()
}

fn pop_up(frame: &mut Frame<'_>, title: &'static str, lines: Vec<Line<'static>>) {
    let area = frame.area();
    let width = area.width.saturating_sub(4).min(90);
    let inner = usize::from(width.saturating_sub(2)).max(1);
    let height: usize = lines.iter().map(|line| line.width().div_ceil(inner).max(1)).sum();
    let height = u16::try_from(height + 2).unwrap_or(u16::MAX).min(area.height);
    let area = Rect { x: (area.width - width) / 2, y: (area.height - height) / 2, width, height };
    frame.render_widget(Clear, area);
    let block = Block::bordered().title(title);
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: false }).block(block), area);
}
