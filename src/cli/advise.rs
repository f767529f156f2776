//! `postrider advise`

use std::{fmt::Write as _, path::Path, process::ExitCode};

use postrider_actors::model::{
    ceiling::{Cause, Ceiling, DestinationFacts, Facts},
    file::FileReport,
    finish::Thousands,
    time::UnixMs,
};
use serde_json::{Value, json};

use super::{print, print_json, status::answer, steer::now};
use crate::{
    app::{ceiling, console},
    exit::Exit,
    telemetry::escape,
};

/// Say which one setting limits throughput, and what to set
///
/// It looks at the destination that has the most to do: what keeps its messages from going at once, how many requests are
/// in flight of those that may be, how long an answer takes, and what that makes per second. Ask while messages are on
/// their way. What the daemon of this machine has noted counts; the load of other machines is not known.
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
    let advice = Advice::of(&facts, &open.iter().collect::<Vec<_>>(), config.pools.parsers, now());
    if args.json { print_json(&advice.json()) } else { print(&advice.text()) }?;
    Ok(Exit::Done.into())
}

/// What limits, and the arithmetic behind it.
struct Advice {
    ceiling: Ceiling,
    /// What to set, if reading limits.
    key: Option<String>,
    /// What is known of the destination.
    reckoning: Option<String>,
}

impl Advice {
    fn of(facts: &Facts, open: &[&FileReport], parsers: usize, now: UnixMs) -> Self {
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
                Self { ceiling, key: None, reckoning }
            }
            None if facts.reading > 0 => {
                let key =
                    format!("pools.parsers = {parsers}: more files of a feed are read at the same time");
                Self { ceiling: whole, key: Some(key), reckoning: None }
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
        if self.ceiling.word() == "on-their-way" {
            text += "  Nothing that can be set holds a message up: the limit is this machine, its disk or the network. \
                     `postrider_store_call_duration_seconds` says how long the store takes.\n";
        }
        text
    }

    fn json(&self) -> Value {
        json!({ "ceiling": self.ceiling.view(), "reckoning": self.reckoning, "key": self.key })
    }
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
        file::DestinationCounts, standing::TrafficStanding, traffic::brake::Brake,
    };

    use super::*;

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
        let text = Advice::of(&facts(Brake::Limit, |_| {}), &[], 2, NOW).text();
        for says in [
            "support: concurrency = 64",
            "postrider concurrency support auto",
            "630 messages/s, 64 of 64 requests in flight; an answer takes 100 ms, so 64 in flight allow 640/s",
            "twice as many 1,280/s",
        ] {
            assert!(text.contains(says), "{says}: {text}");
        }
        let text =
            Advice::of(&facts(Brake::Rate, |support| support.rate_per_s = Some(500)), &[], 2, NOW).text();
        assert!(text.starts_with("support: rate_per_s = 500\n"), "{text}");
    }

    #[test]
    fn what_stands_is_put_right_first_and_reading_names_its_pool() {
        let paused = facts(Brake::Limit, |support| support.is_paused = true);
        let text = Advice::of(&paused, &[], 2, NOW).text();
        assert!(text.starts_with("support: paused = true") && !text.contains("messages/s"), "{text}");
        let reading = Facts { is_running: Some(true), reading: 3, ..Facts::default() };
        let text = Advice::of(&reading, &[], 2, NOW).text();
        assert!(text.contains("reading") && text.contains("pools.parsers = 2"), "{text}");
    }
}
