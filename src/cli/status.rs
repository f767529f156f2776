//! `postrider status`

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::ExitCode,
    thread,
    time::Duration,
};

use serde_json::json;

use super::{
    destinations::{self, shown},
    print, print_json,
    table::{number, table, text, time},
};
use crate::exit::Exit;
use crate::{
    app::{
        console,
        troubles::{self, TrafficNote, TrafficNotes},
    },
    config::Config,
    telemetry::escape,
};
use postrider_actors::{
    model::{
        room::{OpenMessages, holders},
        trouble::{Trouble, Troubles},
    },
    ports::console::DestinationView,
};

/// Show files, feeds that are parked, backlog and rates, per destination
///
/// Works with or without a running daemon. The rate is what was sent between two reads of the store. Parked feeds, files
/// that are held, and what destinations bear (permits, breakers, pauses) are what the daemon that runs on this machine
/// says. Damaged batches are set aside; the log names them.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Time between the two reads that give the rate; 0 leaves it out
    #[arg(long, value_name = "MS", default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(0..=60_000))]
    sample_ms: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is shown of a destination that the store, the configuration or both know.
struct DestinationLine {
    name: String,
    view: DestinationView,
    /// Messages per second at the moment, if measured.
    sent_per_s: Option<f64>,
    /// The limit on messages per second, if there is one.
    rate_per_s: Option<u32>,
    state: &'static str,
    /// Why nothing is sent to it from this machine.
    trouble: Option<Trouble>,
    /// What the daemon of this machine noted, if it sends there.
    traffic: Option<TrafficNote>,
    /// The feeds that it holds up, alone or together with others.
    holds: Vec<String>,
}

/// Shows the status.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    let config = super::load_for_store(config)?;
    let mut view = console::view(&config)?;
    let before = if args.sample_ms == 0 {
        None
    } else {
        let before = view.destinations()?;
        thread::sleep(Duration::from_millis(args.sample_ms));
        Some(before)
    };
    let after = view.destinations()?;
    let (files, depth) = (view.file_totals()?, view.depth()?);
    let troubles: Troubles = troubles::read(&config.state.dir)?;
    let traffic = troubles::read(&config.state.dir)?;
    let held: usize = troubles.feeds.values().map(|troubles| troubles.held.len()).sum();
    let sampled = |name: &str, view: &DestinationView| -> Option<f64> {
        let before = before.as_ref()?.get(name).map_or(0, |view| view.counts.sent);
        let sent = view.counts.sent.saturating_sub(before);
        Some(sent as f64 * 1_000.0 / args.sample_ms as f64)
    };
    let lines = lines(&config, after, &troubles, traffic, sampled);
    if args.json {
        let destinations: BTreeMap<_, _> = lines.iter().map(|line| (&line.name, json_of(line))).collect();
        print_json(&json!({
            "files": {
                "ingesting": files.ingesting,
                "open": files.open,
                "settled": files.settled,
                "failed": files.failed,
                "held": held,
            },
            "backlog": depth,
            "feeds": feeds_json(&config, &troubles),
            "destinations": destinations,
        }))?;
    } else {
        print(&format!(
            "files    {} being read, {} open, {} settled; {} failed, {held} held\nbacklog  {depth} messages\n{}\n{}",
            files.ingesting,
            files.open,
            files.settled,
            files.failed,
            trouble_lines(&troubles),
            rendered(&lines)
        ))?;
    }
    Ok(Exit::Done.into())
}

/// Files that are held and named, of each feed: `postrider files` has them all.
const HELD_MAX: usize = 5;

/// A line for each feed that is parked, and for files that are held.
fn trouble_lines(troubles: &Troubles) -> String {
    let parked = troubles.feeds.iter().filter_map(|(feed, troubles)| Some((feed, troubles.parked.as_ref()?)));
    let line = |(feed, trouble): (&String, &Trouble)| {
        format!("parked   feed {feed} since {}: {}\n", time(trouble.since), escape(&trouble.reason))
    };
    let held = troubles.feeds.iter().flat_map(|(feed, troubles)| {
        troubles.held.iter().take(HELD_MAX).map(move |(name, trouble)| (feed, name, trouble))
    });
    let held_line = |(feed, name, trouble): (&String, &String, &Trouble)| {
        let (name, since, reason) = (escape(name), time(trouble.since), escape(&trouble.reason));
        format!("held     file {name} of feed {feed} since {since}: {reason}\n")
    };
    parked.map(line).chain(held.map(held_line)).collect()
}

/// Every feed, with what is wrong with it.
fn feeds_json(config: &Config, troubles: &Troubles) -> serde_json::Value {
    let names: BTreeSet<_> =
        config.feeds.iter().map(|feed| &feed.name).chain(troubles.feeds.keys()).collect();
    let json = |name: &String| {
        let troubles = troubles.feeds.get(name).cloned().unwrap_or_default();
        let parked = troubles.parked.as_ref();
        let json = json!({
            "state": if parked.is_some() { "parked" } else { "enabled" },
            "parked_at": parked.map(|trouble| time(trouble.since)),
            "parked_reason": parked.map(|trouble| &trouble.reason),
            "held": troubles.held.len(),
        });
        (name.clone(), json)
    };
    names.into_iter().map(json).collect::<serde_json::Map<_, _>>().into()
}

fn lines(
    config: &Config,
    mut views: BTreeMap<String, DestinationView>,
    troubles: &Troubles,
    mut traffic: TrafficNotes,
    sampled: impl Fn(&str, &DestinationView) -> Option<f64>,
) -> Vec<DestinationLine> {
    let configured = config.destinations.iter().map(|destination| destination.name.clone());
    let names: BTreeSet<String> = configured.chain(views.keys().cloned()).collect();
    let mut holds = holds(config, &views);
    names
        .into_iter()
        .map(|name| {
            let view = views.remove(&name).unwrap_or_default();
            let known = config.destinations.iter().find(|destination| destination.name == name);
            let trouble = known.and_then(|_| troubles.destinations.get(&name).cloned());
            DestinationLine {
                sent_per_s: sampled(&name, &view),
                rate_per_s: destinations::rate(known, &view),
                state: match known {
                    None => "not configured",
                    Some(_) if view.disabled.is_some() => "disabled",
                    Some(known) if known.paused => "paused",
                    Some(_) if trouble.is_some() => "blocked",
                    Some(_) => "enabled",
                },
                trouble,
                traffic: known.and_then(|_| traffic.remove(&name)),
                holds: holds.remove(&name).unwrap_or_default(),
                name,
                view,
            }
        })
        .collect()
}

/// The feeds that each destination holds up.
fn holds(config: &Config, views: &BTreeMap<String, DestinationView>) -> BTreeMap<String, Vec<String>> {
    let open: OpenMessages = views
        .iter()
        .map(|(name, view)| {
            let settled = view.counts.settled();
            (name.as_str().into(), view.counts.accepted.saturating_sub(settled))
        })
        .collect();
    let mut holds: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for feed in &config.feeds {
        let destinations = feed.destinations.iter().map(String::as_str);
        for destination in holders(&config.outbox, &open, destinations, false) {
            holds.entry(destination.to_owned()).or_default().push(feed.name.clone());
        }
    }
    holds
}

fn json_of(line: &DestinationLine) -> serde_json::Value {
    let view = &line.view;
    json!({
        "state": line.state,
        "disabled_at": view.disabled.as_ref().map(|(at, _)| time(*at)),
        "disabled_reason": view.disabled.as_ref().map(|(_, reason)| reason),
        "blocked_at": line.trouble.as_ref().map(|trouble| time(trouble.since)),
        "blocked_reason": line.trouble.as_ref().map(|trouble| &trouble.reason),
        "accepted": view.counts.accepted,
        "sent": view.counts.sent,
        "dead": view.counts.dead,
        "retrying": view.counts.retrying,
        "pending": view.counts.pending(),
        "unsent": view.counts.unsent,
        "cancelled": view.counts.cancelled,
        "sent_per_s": line.sent_per_s,
        "rate_per_s": line.rate_per_s,
        "rate_set": view.limits.rate_per_s.is_some(),
        "batches": {
            "outstanding": view.outstanding,
            "queued": view.queued,
            "leased": view.leased,
            "damaged": view.quarantined,
        },
        "next_due": view.next_due.map(time),
        "permits": line.traffic.as_ref().map(|note| note.limit),
        "out_since": line.traffic.as_ref().and_then(|note| note.open_since).map(time),
        "not_before": line.traffic.as_ref().and_then(|note| note.paused_until).map(time),
        "retry_tokens": line.traffic.as_ref().map(|note| note.retry_tokens),
        "holds": line.holds,
    })
}

/// Why nothing goes to a destination at the moment, if so.
fn standing(note: Option<&TrafficNote>) -> String {
    match note {
        Some(TrafficNote { open_since: Some(since), paused_until: Some(until), .. }) => {
            format!(", out since {}, next probe {}", time(*since), time(*until))
        }
        Some(TrafficNote { open_since: Some(since), .. }) => format!(", out since {}, probing", time(*since)),
        Some(TrafficNote { paused_until: Some(until), .. }) => {
            format!(", its receiver wants nothing before {}", time(*until))
        }
        _ => String::new(),
    }
}

fn rendered(lines: &[DestinationLine]) -> String {
    let header = [
        "destination",
        "state",
        "sent",
        "dead",
        "retrying",
        "pending",
        "now/s",
        "limit/s",
        "permits",
        "outstanding",
        "queued",
        "leased",
        "damaged",
        "holds",
    ];
    let rows = lines.iter().map(|line| {
        let view = &line.view;
        let state = match (&view.disabled, &line.trouble) {
            (Some((at, reason)), _) | (None, Some(Trouble { since: at, reason })) => {
                format!("{} since {}: {reason}", line.state, time(*at))
            }
            (None, None) => line.state.to_owned() + &standing(line.traffic.as_ref()),
        };
        vec![
            text(&line.name),
            text(state),
            number(view.counts.sent),
            number(view.counts.dead),
            number(view.counts.retrying),
            number(view.counts.pending()),
            number(line.sent_per_s.map_or_else(|| "-".into(), |rate| format!("{rate:.0}"))),
            number(shown(line.rate_per_s, view.limits.rate_per_s.is_some())),
            number(shown(line.traffic.as_ref().map(|note| note.limit), view.limits.concurrency.is_some())),
            number(view.outstanding),
            number(view.queued.map_or_else(|| "-".into(), |count| count.to_string())),
            number(view.leased.map_or_else(|| "-".into(), |count| count.to_string())),
            number(view.quarantined.map_or_else(|| "-".into(), |count| count.to_string())),
            text(if line.holds.is_empty() { "-".to_owned() } else { line.holds.join(", ") }),
        ]
    });
    table(&header, rows)
}
