//! `postrider files`

use std::{fmt::Write as _, path::Path, process::ExitCode, time::Duration};

use anyhow::bail;
use comfy_table::Cell;
use postrider_actors::{
    model::{
        ceiling::{Ceiling, Facts},
        file::{DestinationCounts, FileReport},
        finish::{Rough, Thousands, percent, percent_of, totals},
        time::UnixMs,
    },
    ports::console::{FileSelector, FileTotals, View},
};
use serde_json::{Value, json};

use super::{
    print, print_json,
    status::answer,
    steer::now,
    table::{number, seconds, table, text, time},
};
use crate::{
    app::{ceiling, console},
    config::{Config, Feed},
    exit::Exit,
};

/// Show what became of each file, how far it is, and whether it balances
///
/// Per file and destination: rows = sent + dead + retrying + pending + unsent + cancelled + rejected + duplicates. A file is
/// `reading` until its last row is read, `sending` until its last message has its final state, then `done`, or `failed` if
/// it could not be used, or not to its end. It is `held`, with the reason below it, while it can't be taken, read,
/// rendered, moved away or reported on this machine, or while somebody holds its messages; `waiting` while its window or
/// `not_before` lets nothing go. Below a file that is not done stands what holds it up. Works with or without a running
/// daemon. Exits with 1 if a file does not balance, or if no file has the given name.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only the files with this name or id
    #[arg(value_name = "NAME or ID")]
    file: Option<String>,
    /// Show at most this many, the latest first
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    limit: usize,
    /// Print JSON: an array of reports as in NAME.report.json, with `stage`, `percent`, pace, estimate and `ceiling`
    #[arg(long)]
    json: bool,
}

/// Shows files.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    let config = super::load_for_store(config)?;
    let mut view = console::view(&config)?;
    let reports = find(&config, &mut *view, args.file.as_deref(), args.limit)?;
    let (facts, now) = (ceiling::gather(&config, &mut *view)?, now());
    let unread = unread(&facts, args.file.as_deref(), &reports, now);
    if let (Some(name), true) = (&args.file, reports.is_empty() && unread.is_empty()) {
        bail!("no file called {name:?} was ever read; `postrider files` lists those that were");
    }
    let files: Vec<_> = reports.into_iter().map(|report| FileLine::new(report, &facts, now)).collect();
    if args.json {
        let unread = unread.iter().map(|unread| Ok(unread.json()));
        print_json(&unread.chain(files.iter().map(FileLine::json)).collect::<Result<Vec<_>, _>>()?)?;
    } else {
        let totals = if args.file.is_none() { Some(view.file_totals()?) } else { None };
        print(&(rendered(&unread, &files) + &footer(&files, totals, args.limit)))?;
    }
    let balanced = files.iter().all(|file| file.report.is_balanced());
    Ok(if balanced { Exit::Done } else { Exit::Failed }.into())
}

/// Those that are called so, or all. Of the same bytes under a second name the store has only the first; the report beside the
/// file leads to it.
pub(super) fn find(
    config: &Config,
    view: &mut dyn View,
    name: Option<&str>,
    limit: usize,
) -> anyhow::Result<Vec<FileReport>> {
    let selector = name.map(FileSelector::from);
    let reports = view.files(selector.as_ref(), limit)?;
    let Some(name) = name.filter(|_| reports.is_empty()) else { return Ok(reports) };
    let mut directories = config.feeds.iter().filter_map(Feed::directory);
    let Some(id) = directories.find_map(|feed| postrider_files::inbox::reported(&feed.path, name)) else {
        return Ok(reports);
    };
    let mut reports = view.files(Some(&FileSelector::Id(id)), 1)?;
    for report in &mut reports {
        name.clone_into(&mut report.file.name);
    }
    Ok(reports)
}

/// A file that is in no store: it can't be taken, read, moved away or reported.
struct Unread {
    feed: String,
    name: String,
    ceiling: Ceiling,
}

fn unread(facts: &Facts, name: Option<&str>, reports: &[FileReport], now: UnixMs) -> Vec<Unread> {
    let held = facts.feeds.iter().flat_map(|(feed, facts)| facts.held.keys().map(move |name| (feed, name)));
    let held = held.filter(|(_, held)| name.is_none_or(|name| name == held.as_str()));
    // What a report says of itself is not said twice.
    let held = held.filter(|(feed, held)| {
        !reports
            .iter()
            .any(|report| !report.held.is_empty() && report.file.name == **held && report.file.feed == **feed)
    });
    let unread = |(feed, name): (&String, &String)| {
        let ceiling = facts.of_unread(feed, name, now)?;
        Some(Unread { feed: feed.clone(), name: name.clone(), ceiling })
    };
    held.filter_map(unread).collect()
}

impl Unread {
    /// As the report of a file without rows.
    fn json(&self) -> Value {
        json!({
            "id": null,
            "feed": self.feed,
            "name": self.name,
            "state": "held",
            "stage": "held",
            "reason": self.ceiling.reason(),
            "held_at": self.ceiling.since.map(time),
            "rows": 0,
            "rejected": 0,
            "duplicates": 0,
            "destinations": {},
            "balanced": true,
            "complete": false,
            "ceiling": self.ceiling.view(),
        })
    }
}

/// What is shown of a file.
pub(super) struct FileLine {
    pub(super) report: FileReport,
    pub(super) ceiling: Ceiling,
    /// Messages that got their final state per second, lately.
    pub(super) per_s: Option<f64>,
    at: UnixMs,
}

impl FileLine {
    pub(super) fn new(report: FileReport, facts: &Facts, now: UnixMs) -> Self {
        let ceiling = facts.of_file(&report, now);
        let per_s = facts.files_per_s.get(&report.file.id).copied();
        Self { report, ceiling, per_s, at: now }
    }

    /// From when it was claimed until all was settled, or until now.
    pub(super) fn took(&self) -> Duration {
        self.report.settled_at.unwrap_or(self.at).since(self.report.file.claimed_at)
    }

    /// How long until it is done, if that can be said.
    pub(super) fn left(&self) -> Option<Duration> {
        self.ceiling.finish.map(|finish| finish.since(self.at))
    }

    fn json(&self) -> serde_json::Result<Value> {
        let mut view = self.report.view()?;
        let (settled, accepted) = totals(&self.report);
        view["stage"] = self.report.stage(self.at).as_str().into();
        view["rows_final"] = self.report.state.is_closed().into();
        view["percent"] = percent_of(&self.report).into();
        view["settled"] = settled.into();
        view["accepted"] = accepted.into();
        view["took_s"] = self.took().as_secs_f64().into();
        view["per_s"] = self.per_s.into();
        view["left_s"] = self.left().map(|left| left.as_secs()).into();
        view["done_at"] = self.ceiling.done_at().map(time).into();
        view["ceiling"] = self.ceiling.view();
        Ok(view)
    }

    fn row(&self, destination: &str) -> Vec<Cell> {
        let report = &self.report;
        let counts = report.destinations.get(destination).copied().unwrap_or_default();
        let is_done = counts.open() == 0 && report.state.is_closed();
        let percent = report.state.is_closed().then(|| percent(counts.settled(), counts.accepted));
        let rows = if report.state.is_closed() {
            Thousands(report.rows).to_string()
        } else {
            format!("{} so far", Thousands(report.rows))
        };
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        vec![
            text(&report.file.name),
            text(&report.file.feed),
            text(report.stage(self.at).as_str()),
            text(destination),
            number(or_none(percent.map(|percent| percent.to_string()))),
            number(rows),
            number(Thousands(counts.sent)),
            number(Thousands(counts.dead)),
            number(Thousands(counts.retrying)),
            number(Thousands(counts.pending())),
            number(Thousands(counts.unsent)),
            number(Thousands(counts.cancelled)),
            number(Thousands(report.rejected)),
            number(Thousands(report.duplicates)),
            text(time(report.file.claimed_at)),
            text(or_none(report.settled_at.map(time))),
            number(seconds(self.took())),
            number(or_none(
                self.per_s.filter(|_| !is_done).map(|per_s| Thousands(per_s.round() as u64).to_string()),
            )),
            number(or_none(self.left().filter(|_| !is_done).map(|left| Rough(left).to_string()))),
            text(report.priority_at(destination).as_str()),
            text(if report.is_balanced() { "yes" } else { "NO" }),
            text(report.file.id.to_string()),
        ]
    }

    /// What is said below its rows.
    fn reason(&self) -> Option<String> {
        (self.ceiling.word() != "done").then(|| format!("  {}", answer(&self.ceiling, "    ")))
    }
}

const HEADER: [&str; 22] = [
    "file",
    "feed",
    "state",
    "destination",
    "%",
    "rows",
    "sent",
    "dead",
    "retrying",
    "pending",
    "unsent",
    "cancelled",
    "rejected",
    "duplicates",
    "started",
    "finished",
    "took",
    "now/s",
    "left",
    "priority",
    "balanced",
    "id",
];

/// Columns that are left out where nothing is in them.
const OPTIONAL: [&str; 8] =
    ["retrying", "pending", "unsent", "cancelled", "rejected", "duplicates", "now/s", "left"];

/// The columns that say something.
fn without_empty(rows: Vec<Vec<Cell>>) -> (Vec<&'static str>, Vec<Vec<Cell>>) {
    let is_said = |cell: &Cell| !matches!(cell.content().as_str(), "0" | "-");
    let is_kept: Vec<bool> = HEADER
        .iter()
        .enumerate()
        .map(|(column, name)| !OPTIONAL.contains(name) || rows.iter().any(|row| is_said(&row[column])))
        .collect();
    let header = HEADER.iter().zip(&is_kept).filter(|(_, kept)| **kept).map(|(name, _)| *name).collect();
    let kept = |row: Vec<Cell>| {
        row.into_iter().zip(&is_kept).filter(|(_, kept)| **kept).map(|(cell, _)| cell).collect()
    };
    (header, rows.into_iter().map(kept).collect())
}

fn rendered(unread: &[Unread], files: &[FileLine]) -> String {
    // Below which row of the table each reason stands.
    let (mut rows, mut reasons) = (Vec::new(), Vec::new());
    for unread in unread {
        let mut row = vec![text(&unread.name), text(&unread.feed), text("held")];
        row.resize_with(HEADER.len(), || text("-"));
        rows.push(row);
        reasons.push((rows.len(), format!("  {}", answer(&unread.ceiling, "    "))));
    }
    for file in files {
        rows.extend(file.report.file.destinations.iter().map(|destination| file.row(destination)));
        reasons.extend(file.reason().map(|reason| (rows.len(), reason)));
    }
    let (header, rows) = without_empty(rows);
    let table = table(&header, rows);
    let mut reasons = reasons.into_iter().peekable();
    let mut text = String::with_capacity(table.len());
    for (line, row) in table.lines().enumerate() {
        text.push_str(row);
        text.push('\n');
        if let Some((_, reason)) = reasons.next_if(|(below, _)| *below == line) {
            text.push_str(&reason);
            text.push('\n');
        }
    }
    text
}

/// The totals, and whether the list is cut.
fn footer(files: &[FileLine], totals: Option<FileTotals>, limit: usize) -> String {
    let all: DestinationCounts = files.iter().flat_map(|file| file.report.destinations.values()).sum();
    let rows: u64 = files.iter().map(|file| file.report.rows).sum();
    let shown = files.len() as u64;
    let count = |number: u64, what: &str| {
        format!("{} {what}{}", Thousands(number), if number == 1 { "" } else { "s" })
    };
    let mut text = format!(
        "\n{}, {}: {} sent, {} dead, {} open\n",
        count(shown, "file"),
        count(rows, "row"),
        Thousands(all.sent),
        Thousands(all.dead),
        Thousands(all.open()),
    );
    let known = totals.map(|totals| totals.ingesting + totals.open + totals.settled);
    let all = match known {
        Some(known) if known > shown => format!(" of {}", Thousands(known)),
        None if shown >= limit as u64 => " and there may be more".to_owned(),
        _ => return text,
    };
    // Writing to a String can't fail.
    let _ = writeln!(text, "Showing {}{all}, the latest first; --limit N shows more.", Thousands(shown));
    text
}
