//! Tables for people. `--json` is for programs.

use std::fmt::Display;

use comfy_table::{Cell, CellAlignment, Table, presets};
pub(super) use postrider_actors::model::time::rfc3339 as time;

use crate::telemetry::escape;

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
    fn f27_a_cell_can_not_drive_the_terminal() {
        let table = table(&["file"], [vec![text("a\u{1b}[2J\nb.csv")]]);
        assert_eq!(table.lines().count(), 2, "{table}");
        assert!(table.contains("\\u{1b}[2J\\nb.csv"), "{table}");
    }
}
