//! `postrider messages`

use std::{fmt::Write as _, path::Path, process::ExitCode};

use anyhow::bail;
use postrider_actors::model::ids::MessageId;

use super::{
    print, print_json,
    table::{cut_to, time},
};
use crate::exit::Exit;
use crate::{app::console, config::Config, shapes::Story, telemetry::escape};
use postrider_actors::ports::console::{
    Delivery, Fate, FileSelector, MessageReport, Search, View, receipts::MessageRow,
};

/// Batches per read of a search: what is held back from the store's log at once.
const SEARCH_BATCHES: usize = 256;

/// Show what happened to one message, or to everything for one recipient
///
/// State, every failed attempt with time, status and reason, and when it was sent. Works with or without a
/// running daemon. `--id` costs a few reads. `--recipient` reads every row that was accepted
/// and not archived; `--file` narrows it. An archived message has lost its payload and
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
    let config = super::load_for_store(config)?;
    let mut view = console::view(&config)?;
    let mut ids = match (&args.id, &args.recipient) {
        (Some(id), _) => vec![*id],
        (None, Some(recipient)) => search(&mut *view, recipient, args)?,
        (None, None) => unreachable!("clap requires one of them"),
    };
    let footer = cut_to(&mut ids, args.limit, "rows");
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
    let rows = rows(&config, &reports)?;
    let with_rows = reports.iter().map(|report| (report, row_of(&rows, report)));
    if args.json {
        print_json(&with_rows.map(|(report, row)| Story::of(report, row)).collect::<Vec<_>>())?;
    } else {
        let text = with_rows.map(|(report, row)| rendered(report, row)).collect::<Vec<_>>().join("\n");
        print(&(text + &footer))?;
    }
    Ok(Exit::Done.into())
}

/// What the ledger of rows says of them, if there is one: what came after the request.
fn rows(config: &Config, reports: &[MessageReport]) -> anyhow::Result<Vec<MessageRow>> {
    let Some(ledger) = console::rows(config)? else { return Ok(Vec::new()) };
    let mut ids: Vec<_> = reports.iter().map(|report| report.id).collect();
    ids.dedup();
    let mut rows = Vec::new();
    for id in ids {
        rows.extend(ledger.ask(|view| view.message(id))?);
    }
    Ok(rows)
}

fn row_of<'a>(rows: &'a [MessageRow], report: &MessageReport) -> Option<&'a MessageRow> {
    let Fate::Message(delivery) = &report.fate else { return None };
    rows.iter().find(|row| row.id == report.id && *row.destination == *delivery.destination)
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
        let left = args.limit.saturating_add(1).saturating_sub(found.len());
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

fn rendered(report: &MessageReport, row: Option<&MessageRow>) -> String {
    let mut text = format!("{}  row {} of {}\n", report.id, report.id.row, escape(&report.file_name));
    // Writing to a String can't fail.
    let _ = match &report.fate {
        Fate::Rejected { line, reason } => writeln!(text, "  rejected  line {line}: {}", escape(reason)),
        Fate::Duplicate => writeln!(text, "  duplicate  a row before it has the same recipient"),
        Fate::Message(delivery) => write!(text, "{}", rendered_delivery(delivery, row)),
    };
    text
}

fn rendered_delivery(delivery: &Delivery, row: Option<&MessageRow>) -> String {
    let mut text = format!(
        "  {} to {} at {}\n  {}  accepted\n",
        delivery.state.merge(row.map_or(delivery.state, |row| row.state)).as_str(),
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
    if let Some(at) = delivery.rendered_at {
        let _ = writeln!(
            text,
            "  {}  its body was made anew by another template, before it was ever sent",
            time(at)
        );
    }
    if let Some((status, at)) = delivery.sent {
        let _ = writeln!(text, "  {}  sent: {status}", time(at));
    }
    if let Some(cause) = delivery.cause {
        let _ = writeln!(text, "  given up: {}", cause.as_str());
    }
    if let Some(row) = row {
        text += &rendered_row(row);
    }
    if let Some(at) = delivery.not_before {
        let _ = writeln!(text, "  next attempt not before {}", time(at));
    }
    text
}

/// The destination's id for it, its answer and later receipts.
fn rendered_row(row: &MessageRow) -> String {
    let mut text = String::new();
    // Writing to a String can't fail.
    if let Some(id) = &row.provider_id {
        let _ = writeln!(text, "  provider id {}", escape(id));
    }
    if let Some(detail) = &row.detail {
        let _ = writeln!(text, "  in its words: {}", escape(detail));
    }
    if let Some(receipt) = &row.receipt {
        let facts = &receipt.facts;
        let at = receipt.at.map_or_else(|| "at an unknown time".to_owned(), time);
        let mut words = vec![format!("receipt: {}", receipt.state.as_str())];
        words.extend(facts.status.as_deref().map(|status| format!("status {}", escape(status))));
        words.extend(facts.carrier.as_deref().map(|carrier| format!("by {}", escape(carrier))));
        words.extend(facts.response.as_deref().map(|response| format!("\"{}\"", escape(response))));
        words.extend(facts.sent_at.map(|at| format!("sent at {}", time(at))));
        words.extend(facts.price.map(|price| format!("for {price}")));
        let _ = writeln!(text, "  {at}  {}", words.join(", "));
    }
    if row.reported.is_conflict() {
        let _ = writeln!(text, "  receipts say that it failed and that it arrived");
    }
    text
}
