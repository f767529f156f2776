//! `postrider check-config`

use std::{fmt::Write as _, io, io::Write as _, path::Path, process::ExitCode};

use serde_json::{Value, json};

use super::{findings, print, print_json};
use crate::exit::Exit;
use crate::{
    app::engines,
    config::{
        self, Config, ConfigError, Duplicates, Feed, FeedSource, Format, LedgerKind, Origin, Problem,
        Problems, ReceiptSource, SourceKind, Target, TemplateSource,
    },
    descriptors,
};

/// Check the configuration and list everything that is wrong with it
///
/// Without --resolve or --connect it reads only the file, the environment and its own limits, and contacts nothing. Every
/// problem is printed to stderr, with its line, the value found and what is allowed. Exits with 78 if there is one.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Also read the secrets, templates and certificates that the configuration names; run it as the
    /// user that the daemon runs as
    #[arg(long)]
    resolve: bool,
    /// Also try the store, queues and tables: credentials, region, permission to read, attributes. It
    /// changes nothing and calls no destination. Exits with 78 if something has to be fixed, with 75 if
    /// something could not be reached
    #[arg(long)]
    connect: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Checks, and prints a summary or the problems.
pub fn run(args: &Args, file: &Path) -> anyhow::Result<ExitCode> {
    let checked = config::load(file).and_then(|config| {
        if args.resolve {
            config.clone().resolve()?;
        }
        Ok(config)
    });
    match checked {
        Ok(config) => {
            let mut found = if args.connect { engines::connect(&config)? } else { Vec::new() };
            found.extend(descriptors::shortfall(&config, descriptors::limit()));
            found.extend(descriptors::crowding(&config));
            let exit = findings::exit(&found);
            if args.json {
                let mut value = summary_json(&config);
                value["ok"] = (exit == Exit::Done).into();
                value["findings"] = findings::as_json(&found);
                print_json(&value)?;
            } else {
                let gap = if found.is_empty() { "" } else { "\n" };
                print(&(summary(&config) + gap + &findings::as_table(&found)))?;
            }
            Ok(exit.into())
        }
        Err(ConfigError::Invalid(problems)) => {
            if args.json {
                print_json(&problems_json(&problems))?;
            } else {
                writeln!(io::stderr(), "{problems}")?;
            }
            Ok(Exit::Config.into())
        }
        Err(error) => Err(error.into()),
    }
}

fn summary(config: &Config) -> String {
    let mut text = format!("{}: no problem found\n", config.file.display());
    // Writing to a String can't fail.
    for feed in &config.feeds {
        let recipient = recipient(feed).map(|name| format!(", recipient {name:?}")).unwrap_or_default();
        let _ = writeln!(
            text,
            "feed {}: {} in {}{recipient}, to {}",
            feed.name,
            format_word(feed),
            place(feed),
            feed.destinations.join(", "),
        );
    }
    for destination in &config.destinations {
        let paused = if destination.paused { ", paused" } else { "" };
        let what = match &destination.target {
            Target::Webhook(webhook) => {
                let rate = match destination.rate() {
                    Some(rate) => format!("{}/s in bursts of {}", rate.per_s, rate.burst),
                    None => "no rate".into(),
                };
                let signed = match webhook.secrets.len() {
                    0 => "not signed".into(),
                    1 => "signed".into(),
                    secrets => format!("signed with {secrets} secrets"),
                };
                let origin = webhook.url.origin().ascii_serialization();
                let in_flight = match webhook.concurrency {
                    Some(number) => format!("{number} in flight"),
                    None => format!("up to {} in flight as it can bear", webhook.in_flight_max()),
                };
                let attempts = destination.retry.max_attempts;
                (origin, format!("{rate}, {in_flight}, {attempts} attempts, {signed}"))
            }
            Target::Table(table) => (
                format!("table {} in {}", table.table.plain(), table.warehouse),
                format!(
                    "{} columns, {} attempts",
                    table.mapping.columns.len(),
                    destination.retry.max_attempts
                ),
            ),
        };
        let _ = writeln!(text, "destination {}: {}, {}{paused}", destination.name, what.0, what.1);
    }
    for source in &config.receipt_sources {
        let _ = writeln!(
            text,
            "receipts {}: {}, about messages to {}",
            source.name,
            source_place(config, source),
            source.destination
        );
    }
    let events = &config.alarms.events;
    if let Some(name) = &events.events_to {
        let _ = writeln!(text, "alarms: events to {name}");
    }
    if let Some(program) = events.command.first() {
        let _ = writeln!(text, "alarms: each runs {program}");
    }
    if config.has_rows() {
        let engine = match config.ledger.kind {
            LedgerKind::Embedded => {
                "a row of each message that receipts are about, in the embedded store".to_owned()
            }
            LedgerKind::Postgres => {
                format!("a row of each message in Postgres, schema {}", config.postgres.schema)
            }
        };
        let _ = writeln!(text, "ledger: {engine}");
    }
    text
}

fn summary_json(config: &Config) -> Value {
    let feeds: Vec<_> = config
        .feeds
        .iter()
        .map(|feed| {
            json!({
                "name": feed.name,
                "path": feed.directory().map(|directory| &directory.path),
                "queue": feed.queue().map(|queue| queue.queue.to_string()),
                "format": format_word(feed),
                "recipient": recipient(feed),
                "duplicates": match feed.directory().map(|directory| directory.duplicates) {
                    Some(Duplicates::First) => "first",
                    Some(Duplicates::Keep) | None => "keep",
                },
                "destinations": feed.destinations,
            })
        })
        .collect();
    let destinations: Vec<_> = config
        .destinations
        .iter()
        .map(|destination| {
            json!({
                "name": destination.name,
                "kind": if destination.table().is_some() { "table" } else { "webhook" },
                "origin": destination.webhook().map(|webhook| webhook.url.origin().ascii_serialization()),
                "table": destination.table().map(|table| table.table.plain()),
                "warehouse": destination.table().map(|table| &table.warehouse),
                "secrets": destination.webhook().map(|webhook| webhook.secrets.len()),
                "rate_per_s": destination.rate_per_s,
                "burst": destination.rate().map(|rate| rate.burst),
                "concurrency": destination.webhook().map(|webhook| match webhook.concurrency {
                    Some(number) => json!(number),
                    None => json!("auto"),
                }),
                "concurrency_max": destination.webhook().map(|webhook| webhook.in_flight_max()),
                "timeout_ms": destination.webhook().map(|webhook| webhook.timeout.as_millis() as u64),
                "max_attempts": destination.retry.max_attempts,
                "template": destination.webhook().is_some_and(|known| known.template != TemplateSource::Default),
                "paused": destination.paused,
            })
        })
        .collect();
    let receipts: Vec<_> = config
        .receipt_sources
        .iter()
        .map(|source| {
            json!({
                "name": source.name,
                "place": source_place(config, source),
                "destination": source.destination,
            })
        })
        .collect();
    json!({
        "ok": true,
        "file": config.file,
        "feeds": feeds,
        "destinations": destinations,
        "receipts": receipts,
        "ledger": if config.ledger.kind == LedgerKind::Embedded { "embedded" } else { "postgres" },
        "problems": [],
    })
}

fn problems_json(problems: &Problems) -> Value {
    let list: Vec<_> = problems.list.iter().map(problem_json).collect();
    json!({ "ok": false, "file": problems.file, "problems": list })
}

fn problem_json(problem: &Problem) -> Value {
    let (line, column, variable) = match &problem.origin {
        Some(Origin::File { line, column }) => (Some(line), Some(column), None),
        Some(Origin::Environment(name)) => (None, None, Some(name)),
        Some(Origin::Default) | None => (None, None, None),
    };
    json!({
        "key": problem.key,
        "line": line,
        "column": column,
        "variable": variable,
        "found": problem.found,
        "advice": problem.advice,
    })
}

/// Where receipts come from.
fn source_place(config: &Config, source: &ReceiptSource) -> String {
    match &source.kind {
        SourceKind::Directory(directory) => directory.path.display().to_string(),
        SourceKind::Http(_) => {
            let listen = config.receipts.listen.map(|address| address.to_string()).unwrap_or_default();
            format!("http://{listen}/receipts/{}", source.name)
        }
        SourceKind::Sqs(sqs) => format!("queue {}", sqs.queue.name()),
        SourceKind::Cloudwatch(cloudwatch) => format!("log groups {}", cloudwatch.log_groups.join(", ")),
    }
}

/// Where a feed's messages come from.
fn place(feed: &Feed) -> String {
    match &feed.source {
        FeedSource::Directory(directory) => directory.path.display().to_string(),
        FeedSource::Queue(queue) => format!("the queue {}", queue.queue),
    }
}

fn format_word(feed: &Feed) -> &'static str {
    match feed.directory().map(|directory| &directory.format) {
        Some(Format::Text) => "text",
        Some(Format::Csv { .. }) => "csv",
        Some(Format::Ndjson { .. }) => "ndjson",
        None => "json",
    }
}

fn recipient(feed: &Feed) -> Option<&str> {
    match &feed.source {
        FeedSource::Queue(queue) => Some(&queue.recipient),
        FeedSource::Directory(directory) => match &directory.format {
            Format::Text => None,
            Format::Csv { recipient, .. } | Format::Ndjson { recipient } => Some(recipient),
        },
    }
}
