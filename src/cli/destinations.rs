//! `postrider destinations`

use std::{path::Path, process::ExitCode};

use serde_json::json;

use super::{
    print, print_json,
    table::{number, table, text, time},
};
use crate::{app::console, config::Config, exit::Exit};

/// List destinations and whether they are paused
///
/// Works with or without a running daemon. `postrider pause` and `postrider resume` change it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Lists them.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    list(&super::load_for_store(config)?, args.json)?;
    Ok(Exit::Done.into())
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
