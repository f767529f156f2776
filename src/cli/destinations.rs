//! `postrider destinations`

use std::{
    path::Path,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::ensure;
use clap::Subcommand;
use postrider_actors::model::time::UnixMs;
use serde_json::json;

use super::{
    print, print_json,
    table::{number, table, text, time},
};
use crate::exit::Exit;
use crate::{
    app::console,
    config::{self, Config},
};

/// List destinations, or disable and enable one
///
/// The messages of a disabled destination are held until it is enabled; none is lost. The daemon disables a
/// destination that answers 410. Works with or without a running daemon.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List destinations and whether they are disabled
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Send a destination's messages again
    Enable {
        /// Its name
        name: String,
    },
    /// Hold a destination's messages
    Disable {
        /// Its name
        name: String,
        /// Why; shown by `list`
        #[arg(long, value_name = "TEXT", default_value = "disabled by an operator")]
        reason: String,
    },
}

/// Lists, enables or disables.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    if let Command::List { json } = &args.command {
        list(&super::load_for_store(config)?, *json)?;
        return Ok(Exit::Done.into());
    }
    let config = config::load(config)?;
    match &args.command {
        Command::List { .. } => {}
        Command::Enable { name } => {
            ensure_known(&config, name)?;
            let changed = console::operate(&config)?.enable(name)?;
            print(&format!("{name} {}\n", if changed { "is enabled" } else { "was enabled already" }))?;
        }
        Command::Disable { name, reason } => {
            ensure_known(&config, name)?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let now = UnixMs(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
            console::operate(&config)?.disable(name, reason, now)?;
            print(&format!("{name} is disabled; its messages are held\n"))?;
        }
    }
    Ok(Exit::Done.into())
}

/// A misspelt name must not look like success.
fn ensure_known(config: &Config, name: &str) -> anyhow::Result<()> {
    let configured = config.destinations.iter().any(|destination| destination.name == name);
    ensure!(
        configured || console::view(config)?.destinations()?.contains_key(name),
        "no destination is called {name:?}; `postrider destinations list` lists them"
    );
    Ok(())
}

fn list(config: &Config, as_json: bool) -> anyhow::Result<()> {
    let mut views = console::view(config)?.destinations()?;
    for destination in &config.destinations {
        views.entry(destination.name.clone()).or_default();
    }
    let configured = |name: &str| config.destinations.iter().any(|destination| destination.name == name);
    if as_json {
        let all: Vec<_> = views
            .iter()
            .map(|(name, view)| {
                json!({
                    "name": name,
                    "configured": configured(name),
                    "disabled": view.disabled.is_some(),
                    "disabled_at": view.disabled.as_ref().map(|(at, _)| time(*at)),
                    "disabled_reason": view.disabled.as_ref().map(|(_, reason)| reason),
                    "open": view.counts.open(),
                })
            })
            .collect();
        return print_json(&all);
    }
    let rows = views.iter().map(|(name, view)| {
        let (since, reason) = match &view.disabled {
            Some((at, reason)) => (time(*at), reason.as_str()),
            None => (String::new(), ""),
        };
        vec![
            text(name),
            text(if view.disabled.is_some() { "disabled" } else { "enabled" }),
            text(if configured(name) { "yes" } else { "no" }),
            number(view.counts.open()),
            text(since),
            text(reason),
        ]
    });
    print(&table(&["destination", "state", "configured", "open", "since", "reason"], rows))
}
