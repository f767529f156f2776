//! `postrider dead`

mod summary;

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Write},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{anyhow, bail, ensure};
use clap::{
    Subcommand, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
};
use postrider_actors::model::{
    batch::Rendering,
    body::BodyTemplate,
    ids::MessageId,
    outcome::{DeathCause, Reason},
    time::UnixMs,
};
use serde_json::json;

use super::{
    files::find,
    print, print_json, steer,
    table::{PAGE, cut, number, status, table, text, time},
};
use crate::exit::Exit;
use crate::{
    app::console,
    config::{self, Config},
    shapes::Dead,
};
use postrider_actors::ports::console::{
    AuditLine, DeadFilter, DeadLetter, FileSelector, Position, Rerendered, View,
};

/// List, count, export or redrive the messages that were given up
///
/// Works with or without a running daemon.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List dead letters
    ///
    /// In the order of file, destination and row.
    List {
        #[command(flatten)]
        which: Which,
        /// List at most this many
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Count dead letters by reason, status, cause, file and destination
    ///
    /// The largest group first. It looks at every dead letter that matches.
    Summary {
        #[command(flatten)]
        which: Which,
        /// Show at most this many groups
        #[arg(long, value_name = "N", default_value_t = 50)]
        limit: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Send dead letters again
    ///
    /// With the same ids and bodies as before; their attempts are counted from 1 again. This only makes them
    /// due: delivery keeps its rates. A running daemon picks them up by itself.
    Redrive {
        #[command(flatten)]
        which: Which,
        /// Redrive at most this many
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
        /// Redrive all of them; required without a filter
        #[arg(long)]
        all: bool,
        /// With new bodies, made by the templates that the configuration has now. Only those that were never sent:
        /// whose every attempt ended before a request, under the one lease since their bodies were made
        #[arg(long)]
        rerender: bool,
        /// Only say how many it would be
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write dead letters to standard output
    ///
    /// With their recipients. In CSV, a cell that a spreadsheet would take for a formula gets a leading
    /// apostrophe.
    Export {
        #[command(flatten)]
        which: Which,
        /// Export at most this many
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
        /// The format
        #[arg(long, value_enum, default_value_t = ExportFormat::Csv)]
        format: ExportFormat,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ExportFormat {
    /// With a header
    Csv,
    /// One JSON object per line
    Ndjson,
}

/// Which dead letters; all given filters must match.
#[derive(Debug, clap::Args)]
struct Which {
    /// Of the files with this name or id
    #[arg(long, value_name = "NAME or ID")]
    file: Option<String>,
    /// To this destination
    #[arg(long, value_name = "NAME")]
    destination: Option<String>,
    /// By the reason of the last failed attempt
    #[arg(long, value_name = "REASON", value_parser = words(Reason::ALL, Reason::as_str))]
    reason: Option<Reason>,
    /// By the status of the last answer: 401
    #[arg(long, value_name = "CODE", value_parser = clap::value_parser!(u16).range(100..=599))]
    status: Option<u16>,
    /// By the cause of death
    #[arg(long, value_name = "CAUSE", value_parser = words(DeathCause::ALL, DeathCause::as_str))]
    cause: Option<DeathCause>,
    /// Given up longer ago than this: 30m, 2h, 1day
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    older_than: Option<Duration>,
    /// Given up within this time: 30m, 2h, 1day
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    newer_than: Option<Duration>,
}

/// Takes the word for one of `all`, and lets shells complete it.
fn words<T, const N: usize>(all: [T; N], word: fn(T) -> &'static str) -> impl TypedValueParser<Value = T>
where
    T: Copy + Send + Sync + 'static,
{
    let words = PossibleValuesParser::new(all.map(word));
    words.map(move |given| all.into_iter().find(|one| word(*one) == given).expect("it is one of them"))
}

/// As it was asked for.
impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [
            ("--file", self.file.clone()),
            ("--destination", self.destination.clone()),
            ("--reason", self.reason.map(|reason| reason.as_str().to_owned())),
            ("--status", self.status.map(|status| status.to_string())),
            ("--cause", self.cause.map(|cause| cause.as_str().to_owned())),
            ("--older-than", self.older_than.map(|age| humantime::format_duration(age).to_string())),
            ("--newer-than", self.newer_than.map(|age| humantime::format_duration(age).to_string())),
        ];
        let given = words.into_iter().filter_map(|(name, value)| Some(format!("{name} {}", value?)));
        let given: Vec<_> = given.collect();
        f.write_str(if given.is_empty() { "all dead letters" } else { "dead letters " })?;
        f.write_str(&given.join(" "))
    }
}

impl Which {
    fn is_everything(&self) -> bool {
        self.file.is_none()
            && self.destination.is_none()
            && self.reason.is_none()
            && self.status.is_none()
            && self.cause.is_none()
            && self.older_than.is_none()
            && self.newer_than.is_none()
    }

    /// The filter for the store. A file or destination that nobody knows is an error, not a filter that nothing matches.
    fn known_filter(&self, config: &Config, view: &mut dyn View, now: UnixMs) -> anyhow::Result<DeadFilter> {
        let mut filter = self.filter(now);
        if let Some(name) = &self.file {
            let found = find(config, view, Some(name), 1)?;
            let Some(first) = found.first() else {
                bail!("no file called {name:?} was ever read; `postrider files` lists those that were");
            };
            // Under a second name of the same bytes the store knows it by its id alone.
            let selector = filter.file.as_ref();
            if view.files(selector, 1)?.is_empty() {
                filter.file = Some(FileSelector::Id(first.file.id));
            }
        }
        if let Some(name) = &self.destination
            && config.destination(name).is_none()
            && !view.destinations()?.contains_key(name)
        {
            bail!("no destination is called {name:?}; `postrider destinations` lists them");
        }
        Ok(filter)
    }

    fn filter(&self, now: UnixMs) -> DeadFilter {
        let ago =
            |age: Duration| UnixMs(now.0.saturating_sub(u64::try_from(age.as_millis()).unwrap_or(u64::MAX)));
        DeadFilter {
            file: self.file.as_deref().map(FileSelector::from),
            destination: self.destination.clone(),
            reason: self.reason,
            status: self.status,
            cause: self.cause,
            before: self.older_than.map(ago),
            since: self.newer_than.map(ago),
        }
    }
}

/// Lists, redrives or exports.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    let config = match args.command {
        Command::List { .. } | Command::Summary { .. } | Command::Export { .. } => {
            super::load_for_store(config)?
        }
        Command::Redrive { .. } => config::load(config)?,
    };
    let now = steer::now();
    match &args.command {
        Command::List { which, limit, json } => {
            let mut view = console::view(&config)?;
            let filter = which.known_filter(&config, &mut *view, now)?;
            let letters = view.dead(&filter, &Position::default(), *limit)?;
            if *json {
                let recipients = view.recipients(&letters)?;
                let letters = letters.iter().zip(recipients);
                print_json(&letters.map(|(letter, to)| Dead::of(letter, to)).collect::<Vec<_>>())?;
            } else {
                let is_cut = letters.len() >= *limit;
                let all = if is_cut { view.count_dead(&filter)? } else { letters.len() as u64 };
                print(&(rendered(&letters) + &cut(letters.len(), all, "dead letters")))?;
            }
        }
        Command::Summary { which, limit, json } => {
            let mut view = console::view(&config)?;
            let filter = which.known_filter(&config, &mut *view, now)?;
            let tally = summary::tally(&mut *view, &filter)?;
            if *json {
                print_json(&tally.largest(*limit, false))?;
            } else {
                print(&summary::rendered(tally, *limit))?;
            }
        }
        Command::Redrive { which, limit, all, rerender, dry_run, json } => {
            ensure!(
                *all || *dry_run || limit.is_some() || !which.is_everything(),
                "this would redrive every dead letter; name some with a filter or --limit, or pass --all"
            );
            let limit = limit.unwrap_or(usize::MAX);
            let mut view = console::view(&config)?;
            let filter = which.known_filter(&config, &mut *view, now)?;
            if *rerender {
                return rerendered(&config, which, &filter, limit, now, *dry_run, *json);
            }
            if *dry_run {
                let found = view.count_dead(&filter)?.min(limit as u64);
                return if *json {
                    print_json(&json!({ "would_redrive": found }))
                } else {
                    print(&format!("{found} would be redriven\n"))
                }
                .map(|()| Exit::Done.into());
            }
            let mut operate = console::operate(&config)?;
            operate.note(&line(which, now, BEGUN.to_owned()))?;
            let redriven = operate.redrive(&filter, limit, now)?;
            operate.note(&line(which, steer::now(), format!("{redriven} redriven")))?;
            if *json {
                print_json(&json!({ "redriven": redriven }))?;
            } else {
                print(&format!("{redriven} redriven\n"))?;
            }
        }
        Command::Export { which, limit, format } => {
            let mut view = console::view(&config)?;
            let filter = which.known_filter(&config, &mut *view, now)?;
            let limit = limit.unwrap_or(usize::MAX);
            export(&mut *view, &filter, limit, *format, &mut io::stdout().lock())?;
        }
    }
    Ok(Exit::Done.into())
}

/// What the audit says of a redrive before it works: one that is killed half-way has left this line.
const BEGUN: &str = "begun";

fn line(which: &Which, at: UnixMs, detail: String) -> AuditLine {
    AuditLine { at, by: steer::who(), verb: "redrive".to_owned(), of: which.to_string(), detail }
}

/// Sends dead letters again with new bodies.
fn rerendered(
    config: &Config,
    which: &Which,
    filter: &DeadFilter,
    limit: usize,
    now: UnixMs,
    dry_run: bool,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let mut renderings = BTreeMap::new();
    for destination in &config.destinations {
        let Some(webhook) = destination.webhook() else { continue };
        let wrong = |why: String| anyhow!("the template of destinations.{}: {why}", destination.name);
        let template = webhook.template.read().map_err(wrong)?;
        BodyTemplate::compile(template.as_deref(), &webhook.content_type)
            .map_err(|error| wrong(error.to_string()))?;
        let rendering = Rendering { template, content_type: webhook.content_type.clone() };
        renderings.insert(destination.name.clone(), rendering);
    }
    let mut operate = console::operate(config)?;
    if !dry_run {
        operate.note(&line(which, now, BEGUN.to_owned()))?;
    }
    let Rerendered { redriven, refused } = operate.rerender(filter, &renderings, limit, now, dry_run)?;
    if !dry_run {
        operate.note(&line(which, steer::now(), format!("{redriven} redriven with new bodies")))?;
    }
    if json {
        let done = if dry_run { "would_redrive" } else { "redriven" };
        print_json(&json!({ done: redriven, "refused": refused }))?;
    } else {
        let done = if dry_run { "would be redriven" } else { "redriven" };
        print(&format!(
            "{redriven} {done} with new bodies; {refused} may have been received and keep theirs\n"
        ))?;
    }
    Ok(Exit::Done.into())
}

fn id(letter: &DeadLetter) -> MessageId {
    MessageId { file: letter.file, row: letter.row }
}

fn rendered(letters: &[DeadLetter]) -> String {
    let mut header = vec!["at", "message", "file", "destination", "attempts", "status", "reason", "cause"];
    // Only some destinations' words are kept; for the others the column would be empty.
    let is_detailed = letters.iter().any(|letter| letter.detail.is_some());
    header.extend(is_detailed.then_some("detail"));
    let rows = letters.iter().map(|letter| {
        let mut cells = vec![
            text(time(letter.last.at)),
            text(id(letter).to_string()),
            text(&letter.file_name),
            text(&letter.destination),
            number(letter.attempts),
            number(status(letter.last.status)),
            text(letter.last.reason.as_str()),
            text(letter.cause.as_str()),
        ];
        cells.extend(is_detailed.then(|| text(letter.detail.as_deref().unwrap_or_default())));
        cells
    });
    table(&header, rows)
}

fn export(
    view: &mut dyn View,
    filter: &DeadFilter,
    limit: usize,
    format: ExportFormat,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let header = [
        "id",
        "file",
        "row",
        "destination",
        "recipient",
        "at",
        "attempts",
        "status",
        "reason",
        "cause",
        "detail",
    ];
    if matches!(format, ExportFormat::Csv) {
        write_csv(out, header)?;
    }
    let mut position = Position::default();
    let mut left = limit;
    while left > 0 {
        let letters = view.dead(filter, &position, PAGE.min(left))?;
        let Some(last) = letters.last() else { break };
        position.clone_from(&last.position);
        left -= letters.len();
        let recipients = view.recipients(&letters)?;
        for (letter, recipient) in letters.iter().zip(&recipients) {
            match format {
                ExportFormat::Csv => write_csv(
                    out,
                    [
                        &id(letter).to_string(),
                        &letter.file_name,
                        &letter.row.to_string(),
                        &letter.destination,
                        recipient,
                        &time(letter.last.at),
                        &letter.attempts.to_string(),
                        &if letter.last.status == 0 { String::new() } else { letter.last.status.to_string() },
                        letter.last.reason.as_str(),
                        letter.cause.as_str(),
                        letter.detail.as_deref().unwrap_or_default(),
                    ],
                )?,
                ExportFormat::Ndjson => {
                    serde_json::to_writer(&mut *out, &Dead::of(letter, recipient.clone()))?;
                    out.write_all(b"\n")?;
                }
            }
        }
    }
    out.flush()?;
    Ok(())
}

fn write_csv<'a>(out: &mut impl Write, cells: impl IntoIterator<Item = &'a str>) -> anyhow::Result<()> {
    let mut record = csv::WriterBuilder::new().from_writer(Vec::new());
    record.write_record(cells.into_iter().map(neutralised))?;
    out.write_all(&record.into_inner().map_err(csv::IntoInnerError::into_error)?)?;
    Ok(())
}

/// A cell that no spreadsheet takes for a formula (F33). Reversible: an apostrophe gets one too.
fn neutralised(cell: &str) -> String {
    if cell.starts_with(['=', '+', '-', '@', '\t', '\r', '\'']) {
        format!("'{cell}")
    } else {
        cell.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use postrider_actors::model::{
        ids::{BatchId, FileId},
        outcome::Attempt,
    };

    use super::*;

    #[test]
    fn f33_formulas_are_neutralised_and_nothing_else_is() {
        for cell in ["=cmd|'/c calc'!A0", "+1", "-1", "@x", "\tx", "\rx", "'x"] {
            assert_eq!(neutralised(cell), format!("'{cell}"));
        }
        for cell in ["", "user-1", "a=b", "1+1"] {
            assert_eq!(neutralised(cell), cell);
        }
        let mut csv = Vec::new();
        write_csv(&mut csv, ["=1+1", "a,b", "x"]).unwrap();
        assert_eq!(csv, b"'=1+1,\"a,b\",x\n");
    }

    #[test]
    fn f33_the_words_of_a_destination_are_shown_escaped() {
        let letter = |detail: Option<&str>| DeadLetter {
            position: Position::default(),
            file: FileId([1; 16]),
            file_name: "a.csv".into(),
            destination: "d".into(),
            row: 7,
            attempts: 1,
            last: Attempt { at: UnixMs(0), status: 0, reason: Reason::Render },
            cause: DeathCause::Permanent,
            detail: detail.map(Into::into),
            batch: BatchId([2; 16]),
        };
        let hostile = letter(Some("=1+1 \u{1b}[2J\nvalue too long"));
        let shown = rendered(&[letter(None), hostile.clone()]);
        assert_eq!(shown.lines().count(), 3, "{shown}");
        assert!(shown.contains("DETAIL") && shown.contains("=1+1 \\u{1b}[2J\\nvalue too long"), "{shown}");
        assert!(!rendered(&[letter(None)]).contains("DETAIL"));
    }

    #[test]
    fn ages_become_times() {
        let mut which = Which {
            file: None,
            destination: None,
            reason: None,
            status: None,
            cause: None,
            older_than: None,
            newer_than: None,
        };
        assert!(which.is_everything());
        which.older_than = Some(Duration::from_mins(1));
        which.newer_than = Some(Duration::MAX);
        let filter = which.filter(UnixMs(100_000));
        assert_eq!((filter.before, filter.since), (Some(UnixMs(40_000)), Some(UnixMs(0))));
        assert!(!which.is_everything());
    }
}
