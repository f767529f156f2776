//! `postrider pause`, `resume`, `rate`, `concurrency`, `hold`, `release` and `cancel`: orders that hold while messages are
//! on their way.

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
        limits::{CONCURRENCY_MAX, Concurrency, LimitChange, RATE_MAX},
        time::UnixMs,
    },
    ports::console::{FileSelector, FilesAt, Order},
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
    /// The destination's name
    destination: String,
    /// Why; shown by `status` and `destinations`
    #[arg(long, value_name = "TEXT", default_value = "paused by an operator")]
    reason: String,
}

/// Send a paused destination's messages again
#[derive(Debug, clap::Args)]
pub struct ResumeArgs {
    /// The destination's name
    destination: String,
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
    #[arg(long, value_name = "TEXT", default_value = "held by an operator")]
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

#[derive(Debug, clap::Args)]
struct Files {
    /// The file's name, or its id if several have that name
    file: String,
    /// At this destination only
    #[arg(long, value_name = "NAME")]
    destination: Option<String>,
}

/// `postrider pause`
pub fn pause(args: &PauseArgs, config: &Path) -> anyhow::Result<ExitCode> {
    let config = config::load(config)?;
    let name = &args.destination;
    ensure_known(&config, name)?;
    let order = Order::Pause { destination: name.clone(), reason: args.reason.clone() };
    let changed = give(&config, &order)?;
    say(name, changed, "is paused; its messages are held", "was paused already; the first reason stands")
}

/// `postrider resume`
pub fn resume(args: &ResumeArgs, config: &Path) -> anyhow::Result<ExitCode> {
    let config = config::load(config)?;
    let name = &args.destination;
    ensure_known(&config, name)?;
    let changed = give(&config, &Order::Resume { destination: name.clone() })?;
    say(name, changed, "is resumed", "was not paused")
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
    let (config, of) = args.of.find(config)?;
    let changed = give(&config, &Order::Hold { of, reason: args.reason.clone() })?;
    say(&args.of.file, changed, "is held", "was held already; the first reason stands")
}

/// `postrider release`
pub fn release(args: &ReleaseArgs, config: &Path) -> anyhow::Result<ExitCode> {
    let (config, of) = args.of.find(config)?;
    let changed = give(&config, &Order::Release { of })?;
    say(&args.of.file, changed, "is released", "was not held")
}

/// `postrider cancel`
pub fn cancel(args: &CancelArgs, config: &Path) -> anyhow::Result<ExitCode> {
    let (config, of) = args.of.find(config)?;
    let changed = give(&config, &Order::Cancel { of, reason: args.reason.clone() })?;
    say(&args.of.file, changed, "is cancelled", "was cancelled already")
}

impl Files {
    /// The configuration, and which files are meant. A name that no file has must not look like success, and one that
    /// several have is not to be guessed at.
    fn find(&self, config: &Path) -> anyhow::Result<(Config, FilesAt)> {
        let config = config::load(config)?;
        let files = FileSelector::from(&*self.file);
        let found = console::view(&config)?.files(Some(&files), 2)?;
        let name = escape(&self.file);
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
        let of = FilesAt { files: FileSelector::Id(found[0].file.id), destination: self.destination.clone() };
        Ok((config, of))
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
