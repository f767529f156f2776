//! `postrider pause`, `resume`, `rate`, `concurrency`, `hold`, `release`, `cancel` and `priority`: orders that hold while
//! messages are on their way.

use std::{
    fs,
    num::{NonZeroU32, NonZeroUsize},
    path::Path,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{bail, ensure};
use postrider_actors::{
    model::{
        ceiling::{HELD, PAUSED},
        limits::{CONCURRENCY_MAX, Concurrency, LimitChange, RATE_MAX},
        priority::Priority,
        time::UnixMs,
    },
    ports::console::{FileSelector, FilesAt, FilesCount, Order, OrderedFiles},
};

use super::print;
use crate::{
    app::console,
    config::{self, Config, Destination},
    exit::Exit,
    telemetry::escape,
};

/// Send nothing more to a destination until it is resumed
///
/// Its messages are held; none is lost. It holds within a second, with or without a running daemon, on every machine that
/// shares the store, and outlasts restarts and reloads. The daemon itself pauses a destination that answers 410.
#[derive(Debug, clap::Args)]
pub struct PauseArgs {
    #[command(flatten)]
    of: Destinations,
    /// Why; shown by `status` and `destinations`
    #[arg(long, value_name = "TEXT", default_value = PAUSED)]
    reason: String,
}

/// Send a paused destination's messages again
#[derive(Debug, clap::Args)]
pub struct ResumeArgs {
    #[command(flatten)]
    of: Destinations,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Destinations {
    /// The destination's name
    destination: Option<String>,
    /// All destinations of the configuration
    #[arg(long)]
    all: bool,
}

/// Set how many messages per second go to a destination
///
/// It holds within a second in the running daemon, on every machine that shares the store, and outlasts restarts and
/// reloads, until another one is set or the configuration's holds again. `burst` stays as it is configured.
#[derive(Debug, clap::Args)]
pub struct RateArgs {
    /// The destination's name
    destination: String,
    /// Messages per second, all machines together; `default`: as the configuration has it
    #[arg(value_name = "N|default", value_parser = rate_change)]
    rate: LimitChange,
}

/// Set how many requests may be in flight to a destination
///
/// It holds within a second in the running daemon, on every machine that shares the store, and outlasts restarts and
/// reloads, until another one is set or the configuration's holds again. What all destinations have in flight is bounded by
/// `delivery.concurrency`.
#[derive(Debug, clap::Args)]
pub struct ConcurrencyArgs {
    /// The destination's name
    destination: String,
    /// Requests in flight from each machine; `auto`: as many as the receiver can bear; `default`: as the configuration has it
    #[arg(value_name = "N|auto|default", value_parser = concurrency_change)]
    concurrency: LimitChange,
}

/// Send nothing more of a file until it is released
///
/// What is in flight ends; all else of the file waits, and its neighbours go on. It holds within a second, with or without
/// a running daemon, on every machine that shares the store, and outlasts restarts and reloads.
#[derive(Debug, clap::Args)]
pub struct HoldArgs {
    #[command(flatten)]
    of: Files,
    /// Why; shown by `status` and `files`
    #[arg(long, value_name = "TEXT", default_value = HELD)]
    reason: String,
}

/// Send the messages of a held file again
#[derive(Debug, clap::Args)]
pub struct ReleaseArgs {
    #[command(flatten)]
    of: Files,
}

/// Send nothing more of a file, ever
///
/// Its open messages end as cancelled, which is counted and balanced like any other end; what is in flight ends as the
/// receiver answers. Rows that are not read yet become messages and are cancelled as well. It can't be undone.
#[derive(Debug, clap::Args)]
pub struct CancelArgs {
    #[command(flatten)]
    of: Files,
    /// Why; shown by `audit`
    #[arg(long, value_name = "TEXT", default_value = "cancelled by an operator")]
    reason: String,
}

/// Send a file before others, or after them
///
/// Where files of all three priorities wait for a destination, 16 of 21 messages are urgent, 4 normal, 1 bulk; files of one
/// priority share evenly, and a file that comes anew goes first. It holds within a second, with or without a running
/// daemon, on every machine that shares the store, and outlasts restarts and reloads.
#[derive(Debug, clap::Args)]
#[command(allow_missing_positional = true)]
pub struct PriorityArgs {
    #[command(flatten)]
    of: Files,
    /// How urgent it is
    #[arg(value_parser = ["urgent", "normal", "bulk"])]
    priority: String,
}

#[derive(Debug, clap::Args)]
struct Files {
    #[command(flatten)]
    which: WhichFiles,
    /// At this destination only
    #[arg(long, value_name = "NAME")]
    destination: Option<String>,
    /// Only say how much it would be
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct WhichFiles {
    /// The file's name, or its id if several have that name
    file: Option<String>,
    /// All files of this feed that have open messages, or are being read
    #[arg(long, value_name = "NAME")]
    feed: Option<String>,
    /// All files that have open messages, or are being read
    #[arg(long)]
    all: bool,
}

/// `postrider pause`
pub fn pause(args: &PauseArgs, config: &Path) -> anyhow::Result<ExitCode> {
    let order = |destination| Order::Pause { destination, reason: args.reason.clone() };
    args.of.each(
        config,
        order,
        "is paused; its messages are held",
        "was paused already; the first reason stands",
    )
}

/// `postrider resume`
pub fn resume(args: &ResumeArgs, config: &Path) -> anyhow::Result<ExitCode> {
    args.of.each(config, |destination| Order::Resume { destination }, "is resumed", "was not paused")
}

/// `postrider rate`
pub fn rate(args: &RateArgs, config: &Path) -> anyhow::Result<ExitCode> {
    limit(&args.destination, args.rate, config)
}

/// `postrider concurrency`
pub fn concurrency(args: &ConcurrencyArgs, config: &Path) -> anyhow::Result<ExitCode> {
    limit(&args.destination, args.concurrency, config)
}

fn limit(name: &str, change: LimitChange, config: &Path) -> anyhow::Result<ExitCode> {
    let config = config::load(config)?;
    ensure_known(&config, name)?;
    if let Some(table) = config.destination(name).and_then(Destination::table) {
        let warehouse = &table.warehouse;
        bail!(
            "{name} is a table: [warehouses.{warehouse}] limits the statements to it, then `postrider reload`"
        );
    }
    let changed = give(&config, &Order::Limit { destination: name.to_owned(), change })?;
    let verb = change.verb();
    let (done, nothing) = match change {
        LimitChange::Rate(None) | LimitChange::Concurrency(None) => (
            format!("goes by the {verb} of its configuration"),
            format!("goes by the {verb} of its configuration already"),
        ),
        _ => (format!("goes by {verb} {change}"), format!("goes by {verb} {change} already")),
    };
    say(name, changed, &done, &nothing)
}

fn rate_change(word: &str) -> Result<LimitChange, String> {
    let number = || {
        let number = word.parse::<NonZeroU32>().ok().filter(|number| number.get() <= RATE_MAX);
        number
            .ok_or_else(|| format!("messages per second from 1 to {RATE_MAX}, or default; to stop, `pause`"))
    };
    Ok(LimitChange::Rate(if word == "default" { None } else { Some(number()?) }))
}

fn concurrency_change(word: &str) -> Result<LimitChange, String> {
    let number = || {
        let number = word.parse::<NonZeroUsize>().ok().filter(|number| number.get() <= CONCURRENCY_MAX);
        let advice =
            || format!("requests in flight from 1 to {CONCURRENCY_MAX}, auto, or default; to stop, `pause`");
        number.map(Concurrency::Fixed).ok_or_else(advice)
    };
    Ok(LimitChange::Concurrency(match word {
        "default" => None,
        "auto" => Some(Concurrency::Auto),
        _ => Some(number()?),
    }))
}

/// `postrider hold`
pub fn hold(args: &HoldArgs, config: &Path) -> anyhow::Result<ExitCode> {
    let order = |of| Order::Hold { of, reason: args.reason.clone() };
    args.of.carry_out(config, order, "held", "was held already; the first reason stands")
}

/// `postrider release`
pub fn release(args: &ReleaseArgs, config: &Path) -> anyhow::Result<ExitCode> {
    args.of.carry_out(config, |of| Order::Release { of }, "released", "was not held")
}

/// `postrider cancel`
pub fn cancel(args: &CancelArgs, config: &Path) -> anyhow::Result<ExitCode> {
    let order = |of| Order::Cancel { of, reason: args.reason.clone() };
    args.of.carry_out(config, order, "cancelled", "was cancelled already")
}

impl Destinations {
    /// Gives an order for each.
    fn each(
        &self,
        config: &Path,
        order: impl Fn(String) -> Order,
        done: &str,
        nothing: &str,
    ) -> anyhow::Result<ExitCode> {
        let config = config::load(config)?;
        let names = match &self.destination {
            Some(name) => {
                ensure_known(&config, name)?;
                vec![name.clone()]
            }
            None => config.destinations.iter().map(|destination| destination.name.clone()).collect(),
        };
        for name in names {
            let changed = give(&config, &order(name.clone()))?;
            say(&name, changed, done, nothing)?;
        }
        Ok(Exit::Done.into())
    }
}

/// `postrider priority`
pub fn priority(args: &PriorityArgs, config: &Path) -> anyhow::Result<ExitCode> {
    let priority: Priority = args.priority.parse().map_err(anyhow::Error::msg)?;
    let order = |of| Order::Priority { of, priority };
    args.of.carry_out(config, order, priority.as_str(), &format!("was {priority} already"))
}

impl Files {
    /// Gives an order about them, or says how much it would be.
    fn carry_out(
        &self,
        config: &Path,
        order: impl FnOnce(FilesAt) -> Order,
        done: &str,
        nothing: &str,
    ) -> anyhow::Result<ExitCode> {
        let config = config::load(config)?;
        let of = self.find(&config)?;
        let FilesCount { files, open, held, .. } = console::view(&config)?.count_files(&of)?;
        let what = match &self.which.file {
            Some(name) => name.clone(),
            None => of.to_string(),
        };
        let size = format!("{files} {}, {open} open messages", if files == 1 { "file" } else { "files" });
        if self.dry_run {
            let what = escape(&what);
            print(&format!("{what} would be {done}: {size}; held at {held} destinations now\n"))?;
            return Ok(Exit::Done.into());
        }
        let changed = give(&config, &order(of))?;
        let nothing = if self.which.file.is_some() { nothing } else { "- nothing to do" };
        say(&what, changed, &format!("{} {done}: {size}", if files == 1 { "is" } else { "are" }), nothing)
    }

    /// Which files are meant. A name that no file has must not look like success, and one that several have is not to be
    /// guessed at.
    fn find(&self, config: &Config) -> anyhow::Result<FilesAt> {
        let at = |files| FilesAt { files, destination: self.destination.clone() };
        let WhichFiles { file, feed, .. } = &self.which;
        let Some(file) = file else {
            if let Some(destination) = &self.destination {
                ensure_known(config, destination)?;
            }
            let Some(feed) = feed else { return Ok(at(OrderedFiles::Open)) };
            ensure!(
                config.feeds.iter().any(|known| known.name == *feed) || feed == config::STATUS_FEED,
                "no feed is called {feed:?}; the configuration has the names"
            );
            return Ok(at(OrderedFiles::OpenOf(feed.clone())));
        };
        let found = console::view(config)?.files(Some(&FileSelector::from(&**file)), 2)?;
        let name = escape(file);
        ensure!(!found.is_empty(), "no file is called {name}; `postrider files` lists them");
        if found.len() > 1 {
            bail!(
                "several files are called {name}; give the id of one, as `postrider files {name}` shows it"
            );
        }
        if let Some(destination) = &self.destination {
            ensure!(
                found[0].destinations.contains_key(destination),
                "{name} does not go to a destination {destination:?}"
            );
        }
        Ok(at(OrderedFiles::Named(FileSelector::Id(found[0].file.id))))
    }
}

/// A misspelt name must not look like success.
fn ensure_known(config: &Config, name: &str) -> anyhow::Result<()> {
    let configured = config.destinations.iter().any(|destination| destination.name == name);
    ensure!(
        configured || console::view(config)?.destinations()?.contains_key(name),
        "no destination is called {name:?}; `postrider destinations` lists them"
    );
    Ok(())
}

fn give(config: &Config, order: &Order) -> anyhow::Result<bool> {
    Ok(console::operate(config)?.order(order, &who(), now())? > 0)
}

fn say(what: &str, changed: bool, done: &str, nothing: &str) -> anyhow::Result<ExitCode> {
    print(&format!("{} {}\n", escape(what), if changed { done } else { nothing }))?;
    Ok(Exit::Done.into())
}

/// Who gives the order, for the audit: the user's name, and who became it by sudo. A user who may write to the store may
/// claim to be another; the line says what was ordered all the same.
pub(super) fn who() -> String {
    let uid = rustix::process::getuid().as_raw();
    let accounts = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let account = accounts.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, id) = (fields.next()?, fields.nth(1)?);
        (id == uid.to_string()).then(|| name.to_owned())
    });
    let user = account.unwrap_or_else(|| format!("uid {uid}"));
    match std::env::var("SUDO_USER") {
        Ok(by) if !by.is_empty() && by != user => format!("{user} (sudo: {by})"),
        _ => user,
    }
}

/// The wall clock.
pub(super) fn now() -> UnixMs {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMs(u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_by_the_words_that_the_help_has() {
        assert_eq!(rate_change("500"), Ok(LimitChange::Rate(NonZeroU32::new(500))));
        assert_eq!(rate_change("default"), Ok(LimitChange::Rate(None)));
        let fixed = NonZeroUsize::new(8).map(Concurrency::Fixed);
        assert_eq!(concurrency_change("8"), Ok(LimitChange::Concurrency(fixed)));
        assert_eq!(concurrency_change("auto"), Ok(LimitChange::Concurrency(Some(Concurrency::Auto))));
        assert_eq!(concurrency_change("default"), Ok(LimitChange::Concurrency(None)));
        for wrong in ["0", "-1", "1.5", "auto", "", "10000001", "Default"] {
            assert!(rate_change(wrong).unwrap_err().contains("pause"), "{wrong}");
        }
        for wrong in ["0", "-1", "65537", "", "AUTO"] {
            assert!(concurrency_change(wrong).unwrap_err().contains("pause"), "{wrong}");
        }
    }
}
