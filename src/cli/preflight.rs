//! `postrider preflight`

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use postrider_actors::ports::console::FileSelector;
use serde_json::json;

use super::{
    print, print_json,
    table::{number, table, text, time},
};
use crate::{
    app::{
        console,
        preflight::{self, Estimate, Preflight},
    },
    config,
    exit::Exit,
    telemetry::escape,
};

/// Show what a feed would make of a file, without sending anything
///
/// Reads the file as the feed would: rows, duplicates, rejected rows by reason, the first bodies, and when all would be sent
/// at the configured rate. Writes nothing, with or without a running daemon. Exits with 1 if the file would be held or refused
/// as a whole.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The feed whose format and destinations it is for
    #[arg(long, value_name = "FEED")]
    feed: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Looks at a file.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    let resolved = config::load(config)?.resolve()?;
    let found = &preflight::look(&resolved, &args.feed, &args.file)?;
    // Without a store there is no backlog, and no file was ever read.
    let mut view = console::view(&resolved.config).ok();
    let known = match &mut view {
        Some(view) => view.files(Some(&FileSelector::from(found.file.as_str())), 1)?.pop(),
        None => None,
    };
    let views = view.as_mut().map(|view| view.destinations()).transpose()?.unwrap_or_default();
    let latencies = preflight::latencies(&resolved.config.state.dir);
    let estimates: Vec<(String, Estimate)> = found
        .destinations
        .iter()
        .filter_map(|name| {
            let destination = resolved.config.destination(name)?;
            let counts = views.get(name).map(|view| view.counts).unwrap_or_default();
            let backlog = counts.open();
            let latency = latencies.get(name).copied();
            let config = &resolved.config;
            Some((name.clone(), preflight::estimate(config, destination, found, backlog, latency)))
        })
        .collect();
    let known = known.map(|report| report.state.as_str());
    if args.json {
        print_json(&as_json(args, found, known, &estimates))?;
    } else {
        print(&rendered(args, found, known, &estimates))?;
    }
    Ok(if found.refused.is_some() { Exit::Failed } else { Exit::Done }.into())
}

fn as_json(
    args: &Args,
    found: &Preflight,
    known: Option<&str>,
    estimates: &[(String, Estimate)],
) -> serde_json::Value {
    let reasons: Vec<_> = found
        .reasons
        .iter()
        .map(|(reason, (rows, line))| json!({ "reason": reason, "rows": rows, "first_line": line }))
        .collect();
    let destinations: serde_json::Map<_, _> = estimates
        .iter()
        .map(|(name, estimate)| {
            let value = json!({
                "messages": found.accepted,
                "backlog": estimate.backlog,
                "rate_per_s": estimate.rate_per_s,
                "latency_ms": estimate.latency.map(|latency| latency.as_secs_f64() * 1_000.0),
                "takes_s": estimate.takes.map(|takes| takes.as_secs_f64()),
                "finish": estimate.finish.map(time),
                "bodies": found.bodies.get(name).cloned().unwrap_or_default(),
            });
            (name.clone(), value)
        })
        .collect();
    json!({
        "file": args.file,
        "id": found.file,
        "feed": args.feed,
        "known": known,
        "bytes": found.bytes,
        "rows": found.rows,
        "accepted": found.accepted,
        "duplicates": found.duplicates,
        "rejected": found.rejected,
        "reasons": reasons,
        "refused": found.refused,
        "terms": found.terms,
        "destinations": destinations,
    })
}

fn rendered(args: &Args, found: &Preflight, known: Option<&str>, estimates: &[(String, Estimate)]) -> String {
    let mut page = format!(
        "{}: {} bytes, {} rows: {} messages, {} duplicates, {} rejected\n",
        escape(&args.file.to_string_lossy()),
        found.bytes,
        found.rows,
        found.accepted,
        found.duplicates,
        found.rejected
    );
    // Writing to a String can't fail.
    if let Some(why) = &found.refused {
        let _ = writeln!(page, "it would be refused: {}", escape(why));
    }
    for line in found.terms.lines() {
        let _ = writeln!(page, "{line}");
    }
    if let Some(state) = known {
        let _ = writeln!(
            page,
            "the same bytes were read before: {state}; dropped again, nothing would be sent twice"
        );
    }
    for (reason, (rows, line)) in &found.reasons {
        let _ = writeln!(page, "rejected {rows} rows, the first on line {line}: {}", escape(reason));
    }
    let rows = estimates.iter().map(|(name, estimate)| {
        let seconds = |duration: std::time::Duration| format!("{:.1} s", duration.as_secs_f64());
        let latency = estimate.latency.map(|latency| format!("{:.1} ms", latency.as_secs_f64() * 1_000.0));
        vec![
            text(name),
            number(found.accepted),
            number(estimate.backlog),
            text(estimate.rate_per_s.map_or("-".to_owned(), |rate| format!("{rate}/s"))),
            text(latency.unwrap_or_else(|| "-".to_owned())),
            text(estimate.takes.map_or("-".to_owned(), seconds)),
            text(estimate.finish.map_or("-".to_owned(), time)),
        ]
    });
    page += "\n";
    page += &table(&["destination", "messages", "backlog", "rate", "latency", "takes", "finish"], rows);
    for (name, bodies) in &found.bodies {
        let _ = writeln!(page, "\nthe first bodies for {name}:");
        for body in bodies {
            let _ = writeln!(page, "{}", escape(body));
        }
    }
    page
}
