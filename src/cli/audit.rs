//! `postrider audit`

use std::{path::Path, process::ExitCode};

use postrider_actors::ports::console::AuditLine;

use super::{
    print, print_json,
    table::{cut_to, table, text, time},
};
use crate::{app::console, exit::Exit, shapes};

/// Show who ordered what, the latest first
///
/// One line for each order that changed something: pause, resume, rate, concurrency, hold, release, cancel. A redrive leaves
/// one when it begins and one when it has ended. The embedded store keeps the last 100,000.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show at most this many
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Lists the lines.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    let mut lines = console::view(&super::load_for_store(config)?)?.audit(args.limit.saturating_add(1))?;
    let footer = cut_to(&mut lines, args.limit, "lines");
    if args.json {
        print_json(&lines.into_iter().map(shapes::AuditLine::from).collect::<Vec<_>>())?;
    } else {
        let row = |line: &AuditLine| {
            vec![text(time(line.at)), text(&line.by), text(&line.verb), text(&line.of), text(&line.detail)]
        };
        print(&(table(&["at", "by", "order", "of", "detail"], lines.iter().map(row)) + &footer))?;
    }
    Ok(Exit::Done.into())
}
