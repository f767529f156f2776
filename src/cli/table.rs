//! Tables for people. `--json` is for programs.

use std::{fmt::Display, time::Duration};

use comfy_table::{Cell, CellAlignment, Table, presets};
use postrider_actors::model::finish::Thousands;
pub(super) use postrider_actors::model::time::rfc3339 as time;

use crate::telemetry::escape;

/// Rows of a list that are read from the store at a time.
pub(super) const PAGE: usize = 1_000;

/// A status, or a dash where no answer came.
pub(super) fn status(status: u16) -> String {
    if status == 0 { "-".to_owned() } else { status.to_string() }
}

/// A span that is over: to the second, `4m 12s`.
pub(super) fn seconds(span: Duration) -> String {
    humantime::format_duration(Duration::from_secs(span.as_secs())).to_string()
}

/// What stands below a list that is cut; nothing below one that is whole.
pub(super) fn cut(shown: usize, all: u64, what: &str) -> String {
    if shown as u64 >= all {
        return String::new();
    }
    format!("Showing {} of {} {what}; --limit N shows more.\n", Thousands(shown as u64), Thousands(all))
}

/// Cuts a list of which one more than `limit` was asked for; what stands below it then.
pub(super) fn cut_to<T>(list: &mut Vec<T>, limit: usize, what: &str) -> String {
    if list.len() <= limit {
        return String::new();
    }
    list.truncate(limit);
    format!("Showing {} {what}, and there are more; --limit N shows more.\n", Thousands(limit as u64))
}

/// A cell of text, which may come from a file or a receiver: escaped (F27).
pub(super) fn text(text: impl AsRef<str>) -> Cell {
    Cell::new(escape(text.as_ref()))
}

/// A cell of a number, to the right.
pub(super) fn number(value: impl Display) -> Cell {
    Cell::new(value).set_alignment(CellAlignment::Right)
}

/// A table under `header`.
pub(super) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<Cell>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().map(|name| name.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    table.trim_fmt() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_is_cut_says_so() {
        assert_eq!(
            cut(100, 48_211, "dead letters"),
            "Showing 100 of 48,211 dead letters; --limit N shows more.\n"
        );
        assert_eq!(cut(100, 100, "dead letters"), "");
        let mut list = vec![1, 2, 3];
        assert_eq!(cut_to(&mut list, 3, "lines"), "");
        assert_eq!(
            cut_to(&mut list, 2, "lines"),
            "Showing 2 lines, and there are more; --limit N shows more.\n"
        );
        assert_eq!(list, [1, 2]);
    }

    #[test]
    fn f27_a_cell_can_not_drive_the_terminal() {
        let table = table(&["file"], [vec![text("a\u{1b}[2J\nb.csv")]]);
        assert_eq!(table.lines().count(), 2, "{table}");
        assert!(table.contains("\\u{1b}[2J\\nb.csv"), "{table}");
    }
}
