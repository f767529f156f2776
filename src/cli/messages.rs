//! `postrider messages`

use std::{fmt::Write as _, path::Path, process::ExitCode};

use anyhow::bail;
use postrider_actors::model::{
    ids::MessageId,
    outcome::{Attempt, DeathCause},
};
use serde_json::{Value, json};

use super::{Exit, print, print_json, table::time};
use crate::{
    app::console,
    config,
    console::{Delivery, Fate, FileSelector, MessageReport, Search, View},
    telemetry::escape,
};

/// Batches per read of a search: what is held back from the store's log at once.
const SEARCH_BATCHES: usize = 256;

/// Show what happened to one message, or to everything for one recipient
///
/// State, every failed attempt with time, status and reason, and when it was sent. Works while the daemon
/// runs and while it does not. `--id` costs a few reads. `--recipient` reads every row that was accepted
/// and not archived; `--file` narrows it. Of an archived message all is kept but its payload and its
/// recipient. Exits with 1 if nothing is found.
#[derive(Debug, clap::Args)]
#[expect(clippy::doc_markdown, reason = "the documentation is the text of --help")]
#[command(group = clap::ArgGroup::new("which").required(true))]
pub struct Args {
    /// Every message for this recipient, byte for byte
    #[arg(long, value_name = "ID", group = "which")]
    recipient: Option<String>,
    /// The message with this id, as in the header webhook-id: msg_FILE_ROW
    #[arg(long, value_name = "MSG_ID", group = "which")]
    id: Option<MessageId>,
    /// Only of the files with this name or id
    #[arg(long, value_name = "NAME or ID")]
    file: Option<String>,
    /// Only to this destination
    #[arg(long, value_name = "NAME")]
    destination: Option<String>,
    /// Stop after this many messages
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Shows messages.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    let config = config::load(config)?;
    let mut view = console::view(&config)?;
    let ids = match (&args.id, &args.recipient) {
        (Some(id), _) => vec![*id],
        (None, Some(recipient)) => search(&mut *view, recipient, args)?,
        (None, None) => unreachable!("clap requires one of them"),
    };
    let mut reports = Vec::new();
    for id in ids {
        reports.extend(view.message(id)?.into_iter().filter(|report| is_wanted(report, args)));
    }
    if reports.is_empty() {
        bail!(
            "nothing was found; rows that are not read yet, and files that were never dropped, are not known, and \
             archived messages are found by --id only"
        );
    }
    if args.json {
        print_json(&reports.iter().map(json_of).collect::<Vec<_>>())?;
    } else {
        print(&reports.iter().map(rendered).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(Exit::Done.into())
}

fn search(view: &mut dyn View, recipient: &str, args: &Args) -> anyhow::Result<Vec<MessageId>> {
    let files = match args.file.as_deref().map(FileSelector::from) {
        None => vec![None],
        Some(selector) => {
            let reports = view.files(Some(&selector), usize::MAX)?;
            reports.iter().map(|report| Some(report.file.id)).collect()
        }
    };
    let mut found = Vec::new();
    for file in files {
        let mut search = Search::default();
        let left = args.limit.saturating_sub(found.len());
        while view.search(&mut search, recipient, file, SEARCH_BATCHES, left)? {}
        found.append(&mut search.found);
    }
    // The batches of one row for several destinations need not be neighbours.
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn is_wanted(report: &MessageReport, args: &Args) -> bool {
    let of_file = args.file.as_deref().map(FileSelector::from).is_none_or(|selector| match selector {
        FileSelector::Id(id) => report.id.file == id,
        FileSelector::Name(name) => report.file_name == name,
    });
    let to_destination = args.destination.as_ref().is_none_or(|wanted| match &report.fate {
        Fate::Message(delivery) => delivery.destination == *wanted,
        Fate::Rejected { .. } | Fate::Duplicate => true,
    });
    of_file && to_destination
}

fn json_of(report: &MessageReport) -> Value {
    let mut view = json!({
        "id": report.id.to_string(),
        "file": report.id.file.to_string(),
        "file_name": report.file_name,
        "row": report.id.row,
    });
    let fate = match &report.fate {
        Fate::Rejected { line, reason } => json!({ "state": "rejected", "line": line, "reason": reason }),
        Fate::Duplicate => json!({ "state": "duplicate" }),
        Fate::Message(delivery) => json!({
            "state": delivery.state.as_str(),
            "destination": delivery.destination,
            "recipient": delivery.recipient,
            "payload_archived": delivery.recipient.is_none(),
            "accepted_at": time(delivery.accepted_at),
            "redriven": delivery.drive,
            "attempts": delivery.failed.iter().map(attempt).collect::<Vec<_>>(),
            "sent": delivery.sent.map(|(status, at)| json!({ "at": time(at), "status": status })),
            "cause": delivery.cause.map(DeathCause::as_str),
            "next_attempt": delivery.not_before.map(time),
        }),
    };
    if let (Value::Object(view), Value::Object(fate)) = (&mut view, fate) {
        view.extend(fate);
    }
    view
}

fn attempt(attempt: &Attempt) -> Value {
    json!({
        "at": time(attempt.at),
        "status": (attempt.status != 0).then_some(attempt.status),
        "reason": attempt.reason.as_str(),
    })
}

fn rendered(report: &MessageReport) -> String {
    let mut text = format!("{}  row {} of {}\n", report.id, report.id.row, escape(&report.file_name));
    // Writing to a String can't fail.
    let _ = match &report.fate {
        Fate::Rejected { line, reason } => writeln!(text, "  rejected  line {line}: {}", escape(reason)),
        Fate::Duplicate => writeln!(text, "  duplicate  a row before it has the same recipient"),
        Fate::Message(delivery) => write!(text, "{}", rendered_delivery(delivery)),
    };
    text
}

fn rendered_delivery(delivery: &Delivery) -> String {
    let mut text = format!(
        "  {} to {} at {}\n  {}  accepted\n",
        delivery.state.as_str(),
        delivery.recipient.as_deref().map_or_else(|| "(payload archived)".into(), escape),
        escape(&delivery.destination),
        time(delivery.accepted_at),
    );
    // Writing to a String can't fail.
    for attempt in &delivery.failed {
        let _ = match attempt.status {
            0 => writeln!(text, "  {}  failed: {}, no answer", time(attempt.at), attempt.reason.as_str()),
            status => writeln!(text, "  {}  failed: {status}", time(attempt.at)),
        };
    }
    if delivery.drive > 0 {
        let _ = writeln!(text, "  redriven {} times, last at {}", delivery.drive, time(delivery.accepted_at));
    }
    if let Some((status, at)) = delivery.sent {
        let _ = writeln!(text, "  {}  sent: {status}", time(at));
    }
    if let Some(cause) = delivery.cause {
        let _ = writeln!(text, "  given up: {}", cause.as_str());
    }
    if let Some(at) = delivery.not_before {
        let _ = writeln!(text, "  next attempt not before {}", time(at));
    }
    text
}
