//! Tables for people. `--json` is for programs.

use std::fmt::Display;

use comfy_table::{Cell, CellAlignment, Table, presets};
use postrider_actors::model::time::UnixMs;

use crate::telemetry::escape;

/// The last millisecond of the year 9999: what RFC 3339 can say.
const RFC_3339_MS_MAX: u64 = 253_402_300_799_999;

/// A time as RFC 3339 in UTC, in milliseconds.
pub(super) fn time(at: UnixMs) -> String {
    let at = std::time::Duration::from_millis(at.0.min(RFC_3339_MS_MAX));
    humantime::format_rfc3339_millis(std::time::UNIX_EPOCH + at).to_string()
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
    fn f27_a_cell_can_not_drive_the_terminal() {
        let table = table(&["file"], [vec![text("a\u{1b}[2J\nb.csv")]]);
        assert_eq!(table.lines().count(), 2, "{table}");
        assert!(table.contains("\\u{1b}[2J\\nb.csv"), "{table}");
    }

    #[test]
    fn every_time_can_be_shown() {
        assert_eq!(time(UnixMs(0)), "1970-01-01T00:00:00.000Z");
        assert_eq!(time(UnixMs(u64::MAX)), "9999-12-31T23:59:59.999Z");
    }
}
