//! `postrider advise`

use std::{fmt::Write as _, path::Path, process::ExitCode};

use postrider_actors::{
    model::{
        ceiling::{Cause, Ceiling, DestinationFacts, Facts},
        file::FileReport,
        finish::Thousands,
        standing::least_busy,
        time::UnixMs,
    },
    parser::Parser,
    supervision::Stage as _,
    webhook_delivery::WebhookDelivery,
};
use serde_json::{Value, json};

use super::{print, print_json, status::answer, steer::now};
use crate::{
    app::{ceiling, console},
    config::Pools,
    exit::Exit,
    telemetry::escape,
};

/// Say which one setting limits throughput, and what to set
///
/// It looks at the destination that has the most to do: what keeps its messages from going at once, how many requests are
/// in flight of those that may be, how long an answer takes, and what that makes per second; and at how busy the pools of
/// actors are. Ask while messages are on their way. What the daemon of this machine has noted counts; the load of other machines is not known.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Advises.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    let config = super::load_for_store(config)?;
    let mut view = console::view(&config)?;
    let facts = ceiling::gather(&config, &mut *view)?;
    let open = ceiling::open_files(&mut *view)?;
    let advice = Advice::of(&facts, &open.iter().collect::<Vec<_>>(), &config.pools, now());
    if args.json { print_json(&advice.json()) } else { print(&advice.text()) }?;
    Ok(Exit::Done.into())
}

/// What limits, and the arithmetic behind it.
struct Advice {
    ceiling: Ceiling,
    /// What to set, or not to set, of the pools.
    key: Option<String>,
    /// What is known of the destination.
    reckoning: Option<String>,
}

impl Advice {
    fn of(facts: &Facts, open: &[&FileReport], pools: &Pools, now: UnixMs) -> Self {
        // What stands is put right first: where nothing moves there is no throughput to advise on.
        let whole = facts.of_whole(open, now);
        if whole.is_stop() {
            return Self { ceiling: whole, key: None, reckoning: None };
        }
        let busiest = facts.destinations.iter().max_by_key(|(_, facts)| facts.counts.open());
        match busiest.filter(|(_, facts)| facts.counts.open() > 0) {
            Some((name, of)) => {
                let ceiling = facts.of_destination(name, now);
                let reckoning = reckon(&ceiling, of);
                let key = if ceiling.word() == ON_THEIR_WAY { deliveries(facts, pools) } else { None };
                Self { ceiling, key, reckoning }
            }
            None if facts.reading > 0 => {
                Self { ceiling: whole, key: Some(parsers(facts, pools)), reckoning: None }
            }
            None => Self { ceiling: whole, key: None, reckoning: None },
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{}\n", answer(&self.ceiling, "  "));
        for line in self.reckoning.iter().chain(&self.key) {
            // Writing to a String can't fail.
            let _ = writeln!(text, "  {}", escape(line));
        }
        if self.ceiling.word() == ON_THEIR_WAY && self.key.is_none() {
            text += "  Nothing that can be set holds a message up: the limit is this machine, its disk or the network. \
                     `postrider_store_call_duration_seconds` says how long the store takes.\n";
        }
        text
    }

    fn json(&self) -> Value {
        json!({ "ceiling": self.ceiling.view(), "reckoning": self.reckoning, "key": self.key })
    }
}

/// The word for messages that nothing holds up.
const ON_THEIR_WAY: &str = "on-their-way";

/// From here on a pool has no time left for more, in percent.
const BUSY: u32 = 80;

/// What limits where files are read.
fn parsers(facts: &Facts, pools: &Pools) -> String {
    let parsers = pools.parsers;
    match least_busy(&facts.actors, Parser::NAME, parsers) {
        Some(busy) if busy >= BUSY => format!(
            "pools.parsers = {parsers}: every one of them is at least {busy} % busy; with more of them, more files of a feed \
             are read at the same time, as far as this machine has cores"
        ),
        Some(busy) => format!(
            "pools.parsers = {parsers} is enough: one of them is {busy} % busy, the rest of the time they wait for the store; \
             `postrider_store_call_duration_seconds` says how long it takes"
        ),
        None => format!("pools.parsers = {parsers}: more files of a feed are read at the same time"),
    }
}

/// What to set where nothing but the workers that deliver limits.
fn deliveries(facts: &Facts, pools: &Pools) -> Option<String> {
    let deliveries = pools.deliveries;
    let busy = least_busy(&facts.actors, WebhookDelivery::NAME, deliveries).filter(|busy| *busy >= BUSY)?;
    Some(format!(
        "pools.deliveries = {deliveries}: every one of them is at least {busy} % busy; more of them share the work, as far \
         as this machine has cores"
    ))
}

/// What the requests in flight and the latency make per second, in a line.
fn reckon(ceiling: &Ceiling, facts: &DestinationFacts) -> Option<String> {
    let traffic = facts.traffic.as_ref()?;
    let per_s = |per_s: f64| Thousands(per_s.round() as u64);
    let mut text = format!(
        "{} messages/s, {} of {} requests in flight",
        per_s(traffic.per_s),
        traffic.in_flight,
        traffic.limit
    );
    let answer_ms = traffic.answer_ms.filter(|answer_ms| *answer_ms > 0.0)?;
    let allows = traffic.limit as f64 * 1_000.0 / answer_ms;
    let _ = write!(
        text,
        "; an answer takes {answer_ms:.0} ms, so {} in flight allow {}/s",
        traffic.limit,
        per_s(allows)
    );
    match &ceiling.cause {
        Cause::Rate { .. } => text += ": without the rate",
        Cause::Limit { is_found: false, .. } => {
            let _ = write!(text, ", twice as many {}/s if the receiver can bear them", per_s(allows * 2.0));
        }
        _ => {}
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use postrider_actors::model::{
        file::DestinationCounts,
        standing::{ActorStanding, TrafficStanding},
        traffic::brake::Brake,
    };

    use super::*;

    /// Two of each.
    fn pools() -> Pools {
        Pools { parsers: 2, deliveries: 2, tables: 2 }
    }

    const NOW: UnixMs = UnixMs(1_800_000_000_000);

    fn facts(brake: Brake, change: impl FnOnce(&mut DestinationFacts)) -> Facts {
        let traffic = TrafficStanding {
            limit: 64,
            limit_max: 64,
            in_flight: 64,
            answer_ms: Some(100.0),
            per_s: 630.0,
            brake: Some((brake, NOW)),
            ..TrafficStanding::default()
        };
        let mut support = DestinationFacts {
            is_configured: true,
            counts: DestinationCounts { accepted: 9_000, ..DestinationCounts::default() },
            traffic: Some(traffic),
            ..DestinationFacts::default()
        };
        change(&mut support);
        let calm = DestinationFacts { is_configured: true, ..DestinationFacts::default() };
        Facts {
            is_running: Some(true),
            has_files: true,
            destinations: [("calm".to_owned(), calm), ("support".to_owned(), support)].into(),
            ..Facts::default()
        }
    }

    #[test]
    fn the_one_setting_is_named_with_its_arithmetic() {
        let text = Advice::of(&facts(Brake::Limit, |_| {}), &[], &pools(), NOW).text();
        for says in [
            "support: concurrency = 64",
            "postrider concurrency support auto",
            "630 messages/s, 64 of 64 requests in flight; an answer takes 100 ms, so 64 in flight allow 640/s",
            "twice as many 1,280/s",
        ] {
            assert!(text.contains(says), "{says}: {text}");
        }
        let text =
            Advice::of(&facts(Brake::Rate, |support| support.rate_per_s = Some(500)), &[], &pools(), NOW)
                .text();
        assert!(text.starts_with("support: rate_per_s = 500\n"), "{text}");
    }

    #[test]
    fn what_stands_is_put_right_first_and_reading_names_its_pool() {
        let paused = facts(Brake::Limit, |support| support.is_paused = true);
        let text = Advice::of(&paused, &[], &pools(), NOW).text();
        assert!(text.starts_with("support: paused = true") && !text.contains("messages/s"), "{text}");
        let reading = Facts { is_running: Some(true), reading: 3, ..Facts::default() };
        let text = Advice::of(&reading, &[], &pools(), NOW).text();
        assert!(text.contains("reading") && text.contains("pools.parsers = 2:"), "{text}");
    }

    #[test]
    fn a_pool_is_blamed_only_if_all_of_it_is_busy() {
        let busy = |name: &str, percents: [u32; 2]| {
            percents.map(|busy_percent| ActorStanding {
                path: format!("root/{name}"),
                name: name.into(),
                busy_percent,
                waiting: 0,
            })
        };
        let reading = |percents| {
            let actors = busy("parser", percents).into();
            let facts = Facts { is_running: Some(true), reading: 3, actors, ..Facts::default() };
            Advice::of(&facts, &[], &pools(), NOW).text()
        };
        let text = reading([97, 85]);
        assert!(text.contains("pools.parsers = 2: every one of them is at least 85 % busy"), "{text}");
        let text = reading([97, 20]);
        assert!(
            text.contains("pools.parsers = 2 is enough") && text.contains("wait for the store"),
            "{text}"
        );
        let sending = |percents| {
            let mut facts = facts(Brake::Limit, |support| {
                support.traffic = Some(TrafficStanding::default());
            });
            facts.actors = busy("webhook_delivery", percents).into();
            Advice::of(&facts, &[], &pools(), NOW)
        };
        let advice = sending([99, 90]);
        assert_eq!(advice.ceiling.word(), ON_THEIR_WAY, "{}", advice.text());
        assert!(advice.text().contains("pools.deliveries = 2: every one"), "{}", advice.text());
        assert!(sending([99, 10]).text().contains("its disk or the network"), "{}", sending([99, 10]).text());
    }
}
