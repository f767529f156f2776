//! `postrider watch`

use std::{
    io::{self, IsTerminal as _},
    path::Path,
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::bail;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use postrider_actors::{
    model::{
        alarm::Growth,
        file::{DestinationCounts, FileReport, Stage},
        finish::{Rough, Thousands, percent_of, totals},
        ids::FileId,
        time::{MonoMs, UnixMs},
    },
    ports::console::{FileSelector, View},
};
use tokio::time::Instant;

use super::{
    files::{FileLine, find},
    print,
    steer::now,
    table::time,
};
use crate::{
    app::{ceiling, console},
    config::Config,
    exit::Exit,
    telemetry::escape,
};

/// Follow a file until it is done
///
/// With a progress bar; where the output is no terminal, with a line whenever something changes, every ten seconds at
/// most. Without a name it follows the file that is on its way, the latest one if there are several. A file that was
/// dropped just now is waited for. Works with or without a running daemon. Exits with 0 if every message of the file was
/// sent, else with 1: it failed, does not balance, or has messages that are dead, unsent or cancelled.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file's name or id; of several with one name the latest
    #[arg(value_name = "NAME or ID")]
    file: Option<String>,
    /// How long to wait for a file that is not known yet
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration)]
    wait: Duration,
}

/// Between two looks at the store.
const LOOK: Duration = Duration::from_millis(500);

/// The longest time between two lines, and the shortest between two that only say how far it is.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Follows a file.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    let config = super::load_for_store(config)?;
    let mut view = console::view(&config)?;
    let begun = Instant::now();
    let first = loop {
        if let Some(report) = first(&config, &mut *view, args.file.as_deref())? {
            break report;
        }
        if begun.elapsed() >= args.wait {
            match &args.file {
                Some(name) => {
                    bail!("no file called {name:?} was ever read; `postrider files` lists those that were")
                }
                None => bail!("no file is on its way; `postrider files` lists those that were"),
            }
        }
        thread::sleep(LOOK);
    };
    let (id, name) = (first.file.id, first.file.name);
    let mut screen = Screen::new(&name);
    let mut settled = Growth::new(Duration::from_secs(30));
    loop {
        let facts = ceiling::gather(&config, &mut *view)?;
        let Some(report) = by_id(&mut *view, id)? else {
            bail!("the file {id} is not in the store any more")
        };
        let now = now();
        let mut line = FileLine::new(report, &facts, now);
        settled.look(
            MonoMs(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX)),
            [totals(&line.report).0],
        );
        // On another machine's file nobody here has measured anything.
        line.per_s = line.per_s.or_else(|| Some(settled.per_s()).filter(|per_s| *per_s > 0.0));
        if line.report.is_settled() {
            screen.end(&line, now)?;
            return Ok(verdict(&line.report).into());
        }
        screen.show(&line, now)?;
        thread::sleep(LOOK);
    }
}

/// The file to follow.
fn first(config: &Config, view: &mut dyn View, name: Option<&str>) -> anyhow::Result<Option<FileReport>> {
    /// Files that are looked at for one that is on its way.
    const LOOKED_AT: usize = 1_000;
    let mut reports = find(config, view, name, if name.is_some() { 1 } else { LOOKED_AT })?.into_iter();
    Ok(reports.find(|report| name.is_some() || !report.is_settled()))
}

fn by_id(view: &mut dyn View, id: FileId) -> anyhow::Result<Option<FileReport>> {
    Ok(view.files(Some(&FileSelector::Id(id)), 1)?.pop())
}

/// What the command ends with.
fn verdict(report: &FileReport) -> Exit {
    let is_sent = |counts: &DestinationCounts| counts.sent == counts.accepted;
    let is_well = report.state.reason().is_none() && report.is_balanced();
    if is_well && report.destinations.values().all(is_sent) { Exit::Done } else { Exit::Failed }
}

/// Where it is shown.
enum Screen {
    Bar(ProgressBar),
    Lines {
        /// What was said last, and when.
        said: Option<(String, Instant)>,
    },
}

impl Screen {
    fn new(name: &str) -> Self {
        if !io::stdout().is_terminal() {
            return Self::Lines { said: None };
        }
        let style = ProgressStyle::with_template("{prefix} [{bar:40}] {msg}")
            .expect("the template is a constant")
            .progress_chars("=> ");
        let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stdout()).with_style(style);
        bar.set_prefix(escape(name).into_owned());
        Self::Bar(bar)
    }

    fn show(&mut self, line: &FileLine, now: UnixMs) -> anyhow::Result<()> {
        let text = text(line);
        match self {
            Self::Bar(bar) => {
                bar.set_position(percent_of(&line.report).unwrap_or_default());
                bar.set_message(escape(&text).into_owned());
            }
            Self::Lines { said } => {
                let key = format!("{} {}", line.report.stage(now).as_str(), line.ceiling.word());
                let is_due =
                    said.as_ref().is_none_or(|(before, at)| *before != key || at.elapsed() >= LINE_EVERY);
                if is_due {
                    *said = Some((key, Instant::now()));
                    say(line, &text, now)?;
                }
            }
        }
        Ok(())
    }

    fn end(&mut self, line: &FileLine, now: UnixMs) -> anyhow::Result<()> {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
        say(line, &text(line), now)
    }
}

fn say(line: &FileLine, text: &str, now: UnixMs) -> anyhow::Result<()> {
    print(&escape(&format!("{} {}: {text}", time(now), line.report.file.name)))?;
    print("\n")
}

/// How far it is, in a line.
fn text(line: &FileLine) -> String {
    let report = &line.report;
    let (settled, accepted) = totals(report);
    let sum = |of: fn(&DestinationCounts) -> u64| report.destinations.values().map(of).sum::<u64>();
    let mut parts = Vec::new();
    match percent_of(report) {
        Some(percent) => parts.push(format!(
            "{percent} %, {} of {} messages settled",
            Thousands(settled),
            Thousands(accepted)
        )),
        None => parts.push(format!("reading, {} rows so far", Thousands(report.rows))),
    }
    let ends = [("dead", sum(|counts| counts.dead)), ("retrying", sum(|counts| counts.retrying))];
    let ends = ends.into_iter().chain([
        ("unsent", sum(|counts| counts.unsent)),
        ("cancelled", sum(|counts| counts.cancelled)),
        ("rejected", report.rejected),
        ("duplicates", report.duplicates),
    ]);
    parts.extend(
        ends.filter(|(_, count)| *count > 0).map(|(word, count)| format!("{} {word}", Thousands(count))),
    );
    if report.is_settled() {
        parts.push(format!("took {}", Rough(line.took())));
        match report.stage(line.ceiling.at) {
            Stage::Failed => parts.push(line.ceiling.to_string()),
            stage => parts.push(stage.as_str().to_owned()),
        }
        return parts.join(" · ");
    }
    parts.extend(line.per_s.map(|per_s| format!("{}/s", Thousands(per_s.round() as u64))));
    parts.extend(line.left().map(|left| format!("{} left", Rough(left))));
    parts.push(line.ceiling.to_string());
    parts.join(" · ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use postrider_actors::model::{
        ceiling::Facts,
        file::{FileRecord, FileState},
        priority::Priority,
        terms::Terms,
    };

    use super::*;

    fn line(change: impl FnOnce(&mut FileReport)) -> FileLine {
        let counts = DestinationCounts { accepted: 1_000, sent: 1_000, ..DestinationCounts::default() };
        let mut report = FileReport {
            file: FileRecord {
                id: FileId([1; 16]),
                feed: "alerts".into(),
                name: "a.csv".into(),
                bytes: 1,
                sha256: "00".into(),
                claimed_at: UnixMs(0),
                destinations: vec!["support".into()],
                terms: Terms::default(),
                priority: Priority::Normal,
            },
            state: FileState::Ingested,
            closed_at: Some(UnixMs(2)),
            settled_at: Some(UnixMs(61_000)),
            rows: 1_000,
            rejected: 0,
            duplicates: 0,
            destinations: BTreeMap::from([("support".to_owned(), counts)]),
            held: BTreeMap::new(),
            priorities: BTreeMap::new(),
            failures: BTreeMap::new(),
        };
        change(&mut report);
        FileLine::new(report, &Facts::default(), UnixMs(70_000))
    }

    fn counts(report: &mut FileReport) -> &mut DestinationCounts {
        report.destinations.get_mut("support").unwrap()
    }

    #[test]
    fn the_exit_code_is_0_only_if_every_message_was_sent() {
        let exit = |change: &dyn Fn(&mut FileReport)| verdict(&line(change).report);
        assert_eq!(exit(&|_| {}), Exit::Done);
        assert_eq!(exit(&|report| (counts(report).sent, counts(report).dead) = (999, 1)), Exit::Failed);
        assert_eq!(exit(&|report| report.state = FileState::Failed("torn".into())), Exit::Failed);
        assert_eq!(exit(&|report| report.rows = 999), Exit::Failed);
    }

    #[test]
    fn a_line_says_how_far_it_is_and_what_holds_it_up() {
        assert_eq!(text(&line(|_| {})), "100 %, 1,000 of 1,000 messages settled · took 61 s · done");
        let on_its_way = line(|report| (counts(report).sent, counts(report).dead) = (400, 3));
        assert_eq!(
            text(&on_its_way),
            "40 %, 403 of 1,000 messages settled · 3 dead · the configuration has no such destination"
        );
        let reading = line(|report| {
            report.state = FileState::Ingesting;
            report.destinations.clear();
        });
        assert_eq!(text(&reading), "reading, 1,000 rows so far · reading");
    }
}
