//! `postrider files`

use std::{path::Path, process::ExitCode};

use anyhow::bail;
use postrider_actors::model::file::FileReport;

use super::{
    print, print_json,
    table::{number, table, text},
};
use crate::exit::Exit;
use crate::{app::console, config};
use postrider_actors::ports::console::FileSelector;

/// Show what became of each file, and whether it balances
///
/// Per file and destination: rows = sent + dead + retrying + pending + rejected + duplicates. Works with
/// or without a running daemon. Exits with 1 if a file does not balance, or if no file has the given name.
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
    let config = config::load(config)?;
    let selector = args.file.as_deref().map(FileSelector::from);
    let reports = console::view(&config)?.files(selector.as_ref(), args.limit)?;
    if let (Some(name), true) = (&args.file, reports.is_empty()) {
        bail!("no file called {name:?} was ever read; `postrider files` lists those that were");
    }
    if args.json {
        let views: Vec<_> = reports.iter().map(FileReport::view).collect::<Result<_, _>>()?;
        print_json(&views)?;
    } else {
        print(&rendered(&reports))?;
    }
    let balanced = reports.iter().all(FileReport::is_balanced);
    Ok(if balanced { Exit::Done } else { Exit::Failed }.into())
}

fn rendered(reports: &[FileReport]) -> String {
    let header = [
        "file",
        "id",
        "state",
        "destination",
        "rows",
        "sent",
        "dead",
        "retrying",
        "pending",
        "rejected",
        "duplicates",
        "balanced",
    ];
    let row = |report: &FileReport, destination: &str| {
        let counts = report.destinations.get(destination).copied().unwrap_or_default();
        let state = match report.state.reason() {
            Some(reason) => format!("{}: {reason}", report.state.as_str()),
            None => report.state.as_str().to_owned(),
        };
        vec![
            text(&report.file.name),
            text(report.file.id.to_string()),
            text(state),
            text(destination),
            number(report.rows),
            number(counts.sent),
            number(counts.dead),
            number(counts.retrying),
            number(counts.pending()),
            number(report.rejected),
            number(report.duplicates),
            text(if report.is_balanced() { "yes" } else { "NO" }),
        ]
    };
    let rows = reports
        .iter()
        .flat_map(|report| report.file.destinations.iter().map(move |destination| row(report, destination)));
    table(&header, rows)
}
