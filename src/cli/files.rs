//! `postrider files`

use std::{path::Path, process::ExitCode};

use anyhow::bail;
use postrider_actors::{
    model::{
        file::FileReport,
        time::UnixMs,
        trouble::{Trouble, Troubles},
    },
    ports::console::FileSelector,
};
use serde_json::json;

use super::{
    print, print_json,
    steer::now,
    table::{number, table, text, time},
};
use crate::{
    app::{console, troubles},
    exit::Exit,
};

/// Show what became of each file, and whether it balances
///
/// Per file and destination: rows = sent + dead + retrying + pending + unsent + cancelled + rejected + duplicates. A file is `held`, with the
/// reason, while it can't be taken, read, rendered, moved away or reported on this machine, or while messages of it wait
/// at a destination because somebody holds them; it is `closed` while its window or `not_before` lets nothing go. Works with or without a running daemon.
/// Exits with 1 if a file does not balance, or if no file has the given name.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only the files with this name or id
    #[arg(value_name = "NAME or ID")]
    file: Option<String>,
    /// Show at most this many, the latest first
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    limit: usize,
    /// Print JSON: an array of reports as in NAME.report.json, with `pending`, `balanced` and `complete`
    #[arg(long)]
    json: bool,
}

/// Shows files.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    let config = super::load_for_store(config)?;
    let selector = args.file.as_deref().map(FileSelector::from);
    let reports = console::view(&config)?.files(selector.as_ref(), args.limit)?;
    let troubles = troubles::read(&config.state.dir)?;
    let mut held: Vec<_> =
        held(&troubles).filter(|held| args.file.as_deref().is_none_or(|name| name == held.name)).collect();
    // What a report says of itself is not said twice.
    held.retain(|held| !reports.iter().any(|report| held.is_of(report)));
    if let (Some(name), true) = (&args.file, reports.is_empty() && held.is_empty()) {
        bail!("no file called {name:?} was ever read; `postrider files` lists those that were");
    }
    if args.json {
        let held = held.iter().map(|held| Ok(held.json()));
        print_json(&held.chain(reports.iter().map(FileReport::view)).collect::<Result<Vec<_>, _>>()?)?;
    } else {
        print(&rendered(&held, &reports, now()))?;
    }
    let balanced = reports.iter().all(FileReport::is_balanced);
    Ok(if balanced { Exit::Done } else { Exit::Failed }.into())
}

/// A file that waits for something outside of Postrider to change.
struct HeldFile<'a> {
    feed: &'a str,
    name: &'a str,
    trouble: &'a Trouble,
}

fn held(troubles: &Troubles) -> impl Iterator<Item = HeldFile<'_>> {
    troubles.feeds.iter().flat_map(|(feed, troubles)| {
        troubles.held.iter().map(move |(name, trouble)| HeldFile { feed, name, trouble })
    })
}

impl HeldFile<'_> {
    /// Whether it is the file of this report, which says at which destinations it is held.
    fn is_of(&self, report: &FileReport) -> bool {
        !report.held.is_empty() && report.file.name == self.name && report.file.feed == self.feed
    }

    /// As the report of a file without rows.
    fn json(&self) -> serde_json::Value {
        json!({
            "id": null,
            "feed": self.feed,
            "name": self.name,
            "state": "held",
            "reason": self.trouble.reason,
            "held_at": time(self.trouble.since),
            "rows": 0,
            "rejected": 0,
            "duplicates": 0,
            "destinations": {},
            "balanced": true,
            "complete": false,
        })
    }
}

fn rendered(held: &[HeldFile<'_>], reports: &[FileReport], now: UnixMs) -> String {
    let header = [
        "file",
        "id",
        "state",
        "destination",
        "priority",
        "rows",
        "sent",
        "dead",
        "retrying",
        "pending",
        "unsent",
        "cancelled",
        "rejected",
        "duplicates",
        "balanced",
    ];
    let row = |report: &FileReport, destination: &str| {
        let counts = report.destinations.get(destination).copied().unwrap_or_default();
        let reason = report.state.reason().map(|reason| format!(": {reason}")).unwrap_or_default();
        let hold = report.held.get(destination);
        let hold = hold.map(|hold| format!(", held since {}: {}", time(hold.since), hold.reason));
        let until = report.file.terms.closed_until(now).filter(|_| counts.open() > 0);
        let closed = until.map(|until| match until {
            _ if report.file.terms.is_over(now) => ", its time is over".to_owned(),
            until => format!(", closed until {}", time(until)),
        });
        let state = format!(
            "{}{reason}{}{}",
            report.state.as_str(),
            hold.unwrap_or_default(),
            closed.unwrap_or_default()
        );
        vec![
            text(&report.file.name),
            text(report.file.id.to_string()),
            text(state),
            text(destination),
            text(report.priority_at(destination).as_str()),
            number(report.rows),
            number(counts.sent),
            number(counts.dead),
            number(counts.retrying),
            number(counts.pending()),
            number(counts.unsent),
            number(counts.cancelled),
            number(report.rejected),
            number(report.duplicates),
            text(if report.is_balanced() { "yes" } else { "NO" }),
        ]
    };
    let held = held.iter().map(|held| {
        let state = format!("held since {}: {}", time(held.trouble.since), held.trouble.reason);
        let mut row = vec![text(held.name), text("-"), text(state)];
        row.resize_with(header.len(), || text("-"));
        row
    });
    let rows = reports
        .iter()
        .flat_map(|report| report.file.destinations.iter().map(move |destination| row(report, destination)));
    table(&header, held.chain(rows))
}
