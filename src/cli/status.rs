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
    destinations::shown,
    print, print_json,
    steer::now,
    table::{number, table, text, time},
};
use crate::exit::Exit;
use crate::{
    app::{ceiling, console, troubles},
    config::Config,
    shapes,
    telemetry::escape,
};
use postrider_actors::{
    model::{
        alarm::board::AlarmNotes,
        ceiling::{Ceiling, Facts},
        file::FileReport,
        finish::Thousands,
        standing::TrafficStanding,
        time::UnixMs,
        trouble::{Trouble, Troubles},
        window::clock,
    },
    ports::console::DestinationView,
};

/// Show what holds things up, files, feeds that are parked, backlog and rates, per destination
///
/// First the answer: what binds now, for the whole, for each destination and for each open file: the setting or fact
/// behind it, the last error, and what to do about it. Works with or without a running daemon. The rate is what was sent
/// between two reads of the store. Alarms, parked feeds, files that are held, and what destinations bear (permits, breakers,
/// pauses) are what the daemon that runs on this machine says. Damaged batches are set aside; the log names them.
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
    traffic: Option<TrafficStanding>,
    /// What binds it.
    ceiling: Ceiling,
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
    let alarms: AlarmNotes = troubles::read(&config.state.dir)?;
    let alarms: Vec<_> = alarms.raised.iter().map(shapes::Alarm::from).collect();
    let (facts, now) = (ceiling::gather(&config, &mut *view)?, now());
    let open_files = ceiling::open_files(&mut *view)?;
    let whole = facts.of_whole(&open_files.iter().collect::<Vec<_>>(), now);
    let of_file = |report: FileReport| {
        let ceiling = facts.of_file(&report, now);
        (report, ceiling)
    };
    let open_files: Vec<_> = open_files.into_iter().take(OPEN_FILES_MAX).map(of_file).collect();
    let held: usize = troubles.feeds.values().map(|troubles| troubles.held.len()).sum();
    let sampled = |name: &str, view: &DestinationView| -> Option<f64> {
        let before = before.as_ref()?.get(name).map_or(0, |view| view.counts.sent);
        let sent = view.counts.sent.saturating_sub(before);
        Some(sent as f64 * 1_000.0 / args.sample_ms as f64)
    };
    let lines = lines(&config, after, &facts, now, sampled);
    if args.json {
        let destinations: BTreeMap<_, _> = lines.iter().map(|line| (&line.name, json_of(line))).collect();
        let open_files = open_files.iter().map(|(report, ceiling)| {
            json!({ "id": report.file.id, "name": report.file.name, "feed": report.file.feed, "ceiling": ceiling.view() })
        });
        print_json(&json!({
            "at": time(now),
            "ceiling": whole.view(),
            "alarms": alarms,
            "open_files": open_files.collect::<Vec<_>>(),
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
            "now      {}\nfiles    {} being read, {} open, {} settled; {} failed, {held} held\nbacklog  {depth} messages\n{}{}\n{}{}",
            answer(&whole, "         "),
            files.ingesting,
            files.open,
            files.settled,
            files.failed,
            alarm_lines(&alarms),
            trouble_lines(&troubles),
            rendered(&lines),
            ceilings(&lines, &open_files, files.open + files.ingesting),
        ))?;
    }
    Ok(Exit::Done.into())
}

/// Files that are held and named, of each feed: `postrider files` has them all.
const HELD_MAX: usize = 5;

/// Alarms that are named: the page and `alarms.json` have them all.
const ALARMS_MAX: usize = 10;

/// A line for each alarm, and one for what to do.
fn alarm_lines(alarms: &[shapes::Alarm]) -> String {
    let line = |alarm: &shapes::Alarm| {
        let subject = alarm.subject.as_deref().map(|subject| format!(" ({subject})")).unwrap_or_default();
        let text = escape(&format!("{}{subject}: {}", alarm.alarm, alarm.text)).into_owned();
        let remedy = alarm.remedy.iter().map(|remedy| format!("         {}\n", escape(remedy)));
        format!("alarm    {text}\n{}", remedy.collect::<String>())
    };
    let cut =
        (alarms.len() > ALARMS_MAX).then(|| format!("alarm    {ALARMS_MAX} of {} are shown\n", alarms.len()));
    alarms.iter().take(ALARMS_MAX).map(line).chain(cut).collect()
}

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
    facts: &Facts,
    now: UnixMs,
    sampled: impl Fn(&str, &DestinationView) -> Option<f64>,
) -> Vec<DestinationLine> {
    let mut holds = ceiling::holds(config, &views);
    facts
        .destinations
        .iter()
        .map(|(name, of)| {
            let view = views.remove(name).unwrap_or_default();
            let known = config.destination(name);
            let trouble = of.blocked.clone().filter(|_| of.is_configured);
            DestinationLine {
                name: name.clone(),
                sent_per_s: sampled(name, &view),
                rate_per_s: shapes::rate(known, &view),
                state: match () {
                    () if !of.is_configured => "not configured",
                    () if view.disabled.is_some() => "disabled",
                    () if of.is_paused => "paused",
                    () if trouble.is_some() => "blocked",
                    () => "enabled",
                },
                trouble,
                traffic: of.traffic.clone().filter(|_| of.is_configured),
                ceiling: facts.of_destination(name, now),
                holds: holds.remove(name).unwrap_or_default(),
                view,
            }
        })
        .collect()
}

/// Open files that are shown.
const OPEN_FILES_MAX: usize = 20;

/// A ceiling, with everything that belongs to it on lines of their own behind `indent`.
pub(super) fn answer(ceiling: &Ceiling, indent: &str) -> String {
    let place = match (&ceiling.file, &ceiling.destination) {
        (Some(file), Some(destination)) => format!("{file} at {destination}: "),
        (Some(name), None) | (None, Some(name)) => format!("{name}: "),
        (None, None) => String::new(),
    };
    let mut text = escape(&format!("{place}{ceiling}")).into_owned();
    let mut line = |more: String| {
        text.push('\n');
        text.push_str(indent);
        text.push_str(&escape(&more));
    };
    let is_going = !ceiling.is_stop();
    if let Some(error) =
        ceiling.last_error.as_ref().filter(|error| !is_going || is_recent(error.attempt.at, ceiling.at))
    {
        let said = error.text.as_ref().map(|text| format!(": {text}")).unwrap_or_default();
        line(format!("last error {}, {}{said}", clock(error.attempt.at, ceiling.at), error.word()));
    }
    if let Some(finish) = ceiling.done_at() {
        line(format!("done by {}", clock(finish, ceiling.at)));
    }
    if let Some(warning) = ceiling.warning() {
        line(warning);
    }
    if let Some(remedy) = ceiling.remedy() {
        line(remedy);
    }
    text
}

/// An error of longer ago says nothing of what goes now.
fn is_recent(at: UnixMs, now: UnixMs) -> bool {
    now.since(at) < Duration::from_mins(5)
}

/// What binds each destination and each open file of which something is to be said.
fn ceilings(lines: &[DestinationLine], files: &[(FileReport, Ceiling)], open: u64) -> String {
    let destinations = lines.iter().map(|line| &line.ceiling).filter(|ceiling| ceiling.word() != "done");
    let all = destinations.chain(files.iter().map(|(_, ceiling)| ceiling));
    let text: String = all.map(|ceiling| answer(ceiling, "  ") + "\n").collect();
    let shown = files.len() as u64;
    let footer = if shown < open {
        format!("Showing {shown} of {} open files.\n", Thousands(open))
    } else {
        String::new()
    };
    if text.is_empty() { footer } else { format!("\n{text}{footer}") }
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
        "ceiling": line.ceiling.view(),
    })
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
            (None, None) => line.state.to_owned(),
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
