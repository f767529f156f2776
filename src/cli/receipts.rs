//! `postrider receipts`

use std::{
    path::Path,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use postrider_actors::{
    model::{ids::FileId, time::UnixMs},
    receipt_reread::RereadCounts,
};
use serde_json::{Value, json};

use super::{
    print, print_json,
    table::{PAGE, cut, cut_to, number, table, text, time},
};
use crate::exit::Exit;
use crate::{
    app::console::{self, RowLedger},
    config::{self, Config},
    shapes,
};
use postrider_actors::ports::console::{
    FileSelector,
    receipts::{GAP_AGES, Gap, GapPlace, HeldReceipt, ReceiptFilter, RejectedReceipt, SourceRow, StateCount},
};

/// Show receipts, find missing ones, and read rejected ones again
///
/// Works with or without a running daemon.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Count messages by destination and state, and show each source
    Status {
        /// Only messages of this file (its id, or its name if that is the only one)
        #[arg(long, value_name = "NAME or ID")]
        file: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List messages that were sent and have had no final receipt, the oldest first
    ///
    /// With how many there are by age.
    Gaps {
        /// Only to this destination; default: all that have receipts
        #[arg(long, value_name = "NAME")]
        destination: Option<String>,
        /// Sent longer ago than this: 30m, 2h, 1day
        #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "0s")]
        older_than: Duration,
        /// List at most this many
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List receipts that wait for a message that is not known yet
    Parked(List),
    /// List receipts whose message never came
    Orphans(List),
    /// List receipts that could not be read, and why
    ///
    /// With --json also what is kept of their texts, which may name recipients.
    Rejects(List),
    /// Read rejected receipts again
    ///
    /// By the mappings in the configuration file as it is now. What fits is taken like any other receipt, once; the
    /// rest stays among the rejects, with the new reason. A running daemon needs a reload to read new receipts by
    /// the same mapping.
    Reread {
        /// Only those of this source; default: of all configured sources
        #[arg(long, value_name = "NAME")]
        source: Option<String>,
        /// Stop when so many have left the rejects
        #[arg(long, value_name = "N")]
        limit: Option<u64>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct List {
    /// Only those of this source
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Only those about messages to this destination
    #[arg(long, value_name = "NAME")]
    destination: Option<String>,
    /// List at most this many
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl List {
    fn filter(&self) -> ReceiptFilter {
        ReceiptFilter { source: self.source.clone(), destination: self.destination.clone() }
    }
}

/// Without a ledger of rows.
const NO_RECEIPTS: &str = "there are no receipts: no [receipts.sources.NAME] is configured, and ledger.kind is \
                           \"embedded\"; `postrider messages` shows what was sent";

/// Lists, counts, and reads again.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    let config = match args.command {
        Command::Reread { .. } => config::load(config)?,
        _ => super::load_for_store(config)?,
    };
    let rows = || console::rows(&config)?.context(NO_RECEIPTS);
    match &args.command {
        Command::Status { file, json } => {
            let file = file.as_deref().map(|file| file_id(&config, file)).transpose()?;
            let rows = rows()?;
            let (counts, sources) = (rows.ask(|view| view.counts(file))?, rows.ask(|view| view.sources())?);
            if *json {
                print_json(&json!({
                    "messages": counts.iter().map(shapes::StateCount::from).collect::<Vec<_>>(),
                    "sources": sources.iter().map(shapes::Source::from).collect::<Vec<_>>(),
                }))?;
            } else {
                print(&counts_table(&counts))?;
                print(&sources_table(&sources))?;
            }
        }
        Command::Gaps { destination, older_than, limit, json } => {
            let found = gaps(&rows()?, &config, destination.as_deref(), *older_than, *limit)?;
            if *json {
                print_json(&found.iter().map(gaps_json).collect::<Vec<_>>())?;
            } else {
                for gaps in &found {
                    print(&gaps_table(gaps, *limit))?;
                }
            }
        }
        Command::Parked(list) => {
            let which = list.filter();
            held(rows()?.ask(|view| view.parked(&which, list.limit.saturating_add(1)))?, list)?;
        }
        Command::Orphans(list) => {
            let which = list.filter();
            held(rows()?.ask(|view| view.orphans(&which, list.limit.saturating_add(1)))?, list)?;
        }
        Command::Rejects(list) => {
            let which = list.filter();
            rejects(rows()?.ask(|view| view.rejects(&which, list.limit.saturating_add(1)))?, list)?;
        }
        Command::Reread { source, limit, json } => {
            reread(&config, source.as_deref(), limit.unwrap_or(u64::MAX), *json)?;
        }
    }
    Ok(Exit::Done.into())
}

fn reread(config: &Config, source: Option<&str>, limit: u64, as_json: bool) -> anyhow::Result<()> {
    let is_wanted = |name: &str| source.is_none_or(|source| source == name);
    let sources: Vec<_> = config.receipt_sources.iter().filter(|source| is_wanted(&source.name)).collect();
    if let (Some(name), []) = (source, &sources[..]) {
        let known: Vec<_> = config.receipt_sources.iter().map(|source| source.name.as_str()).collect();
        bail!("no source has the name {name:?}; known: {}", known.join(", "));
    }
    let rejects = console::rejects(config)?.context(NO_RECEIPTS)?;
    let mut counts = RereadCounts::default();
    for source in sources {
        let left = limit - counts.settled();
        rejects
            .reread(source, left, &mut counts)
            .with_context(|| format!("the rejects of {} were read in part only", source.name))?;
    }
    let RereadCounts { taken, known, ignored, rejected, incomplete } = counts;
    if as_json {
        return print_json(&json!({
            "taken": taken,
            "known": known,
            "ignored": ignored,
            "rejected": rejected,
            "incomplete": incomplete,
        }));
    }
    print(&format!(
        "{taken} taken, {known} known, {ignored} ignored, {rejected} rejected again, {incomplete} incomplete\n"
    ))
}

/// The file that an operator names.
fn file_id(config: &Config, name: &str) -> anyhow::Result<FileId> {
    let selector = FileSelector::from(name);
    if let FileSelector::Id(id) = selector {
        return Ok(id);
    }
    let files = console::view(config)?.files(Some(&selector), 2)?;
    match &files[..] {
        [file] => Ok(file.file.id),
        [] => bail!("no file has the name {name:?}; `postrider files` lists them"),
        _ => bail!("several files have the name {name:?}; name one by its id, which `postrider files` shows"),
    }
}

/// What of one destination has had no receipt.
struct Gaps {
    destination: String,
    ages: [u64; GAP_AGES.len()],
    oldest: Vec<Gap>,
}

fn gaps(
    rows: &RowLedger,
    config: &Config,
    destination: Option<&str>,
    older_than: Duration,
    limit: usize,
) -> anyhow::Result<Vec<Gaps>> {
    let mut destinations: Vec<&str> = match destination {
        Some(name) => vec![name],
        None => config.receipt_sources.iter().map(|source| source.destination.as_str()).collect(),
    };
    destinations.sort_unstable();
    destinations.dedup();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = UnixMs(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
    let before = UnixMs(now.0.saturating_sub(u64::try_from(older_than.as_millis()).unwrap_or(u64::MAX)));
    let mut found = Vec::new();
    for name in destinations {
        let mut oldest: Vec<Gap> = Vec::new();
        let mut after: Option<GapPlace> = None;
        while oldest.len() < limit {
            let page = PAGE.min(limit - oldest.len());
            let gaps = rows.ask(|view| view.gaps(name, before, after.as_ref(), page))?;
            let is_last = gaps.len() < page;
            after = gaps.last().map(Gap::place);
            oldest.extend(gaps);
            if is_last {
                break;
            }
        }
        let ages = rows.ask(|view| view.gap_ages(name, now))?;
        found.push(Gaps { destination: name.to_owned(), ages, oldest });
    }
    Ok(found)
}

fn age_word(index: usize) -> String {
    match GAP_AGES.get(index + 1) {
        Some(next) => format!("under {}", humantime::format_duration(*next)),
        None => format!("{} and more", humantime::format_duration(GAP_AGES[index])),
    }
}

fn gaps_json(gaps: &Gaps) -> Value {
    json!({
        "destination": gaps.destination,
        "ages": shapes::Gaps::ages(&gaps.ages),
        "messages": gaps.oldest.iter().map(|gap| json!({
            "id": gap.id.to_string(),
            "state": gap.state.as_str(),
            "provider_id": gap.provider_id,
            "sent_at": time(gap.sent_at),
        })).collect::<Vec<_>>(),
    })
}

fn gaps_table(gaps: &Gaps, limit: usize) -> String {
    let total: u64 = gaps.ages.iter().sum();
    let ages = gaps.ages.iter().enumerate();
    let ages = ages.map(|(index, messages)| vec![text(age_word(index)), number(messages)]);
    let rows = gaps.oldest.iter().map(|gap| {
        vec![
            text(time(gap.sent_at)),
            text(gap.id.to_string()),
            text(gap.state.as_str()),
            text(gap.provider_id.as_deref().unwrap_or_default()),
        ]
    });
    format!(
        "{}: {total} sent without a final receipt\n{}\n{}{}",
        crate::telemetry::escape(&gaps.destination),
        table(&["age", "messages"], ages),
        table(&["sent", "message", "state", "provider id"], rows),
        if gaps.oldest.len() >= limit { cut(gaps.oldest.len(), total, "messages") } else { String::new() },
    )
}

fn counts_table(counts: &[StateCount]) -> String {
    let rows = counts
        .iter()
        .map(|count| vec![text(&count.destination), text(count.state.as_str()), number(count.messages)]);
    table(&["destination", "state", "messages"], rows)
}

fn sources_table(sources: &[SourceRow]) -> String {
    let at = |at: Option<UnixMs>| text(at.map(time).unwrap_or_default());
    let rows = sources.iter().map(|source| {
        vec![
            text(&source.name),
            text(&source.destination),
            at(source.receipts_at),
            at(source.cursor_at),
            number(source.waiting),
            number(source.parked),
        ]
    });
    table(&["source", "destination", "last receipts", "cursor moved", "waiting", "parked"], rows)
}

fn held(mut receipts: Vec<HeldReceipt>, list: &List) -> anyhow::Result<()> {
    let footer = cut_to(&mut receipts, list.limit, "receipts");
    if list.json {
        return print_json(&receipts.iter().map(shapes::Held::from).collect::<Vec<_>>());
    }
    let rows = receipts.iter().map(|receipt| {
        vec![
            text(time(receipt.since)),
            text(&receipt.source),
            text(&receipt.destination),
            text(shapes::key_text(&receipt.key)),
            text(receipt.state.as_str()),
        ]
    });
    print(&(table(&["since", "source", "destination", "names", "state"], rows) + &footer))
}

fn rejects(mut rejects: Vec<RejectedReceipt>, list: &List) -> anyhow::Result<()> {
    let footer = cut_to(&mut rejects, list.limit, "receipts");
    if list.json {
        return print_json(&rejects.iter().map(shapes::Rejected::from).collect::<Vec<_>>());
    }
    let rows = rejects.iter().map(|reject| {
        vec![text(time(reject.at)), text(&reject.source), text(&reject.place), text(&reject.reason)]
    });
    print(&(table(&["at", "source", "place", "reason"], rows) + &footer))
}
