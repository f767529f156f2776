//! `postrider destinations`

use std::{fmt::Display, path::Path, process::ExitCode};

use serde_json::json;

use super::{
    print, print_json,
    table::{number, table, text, time},
};
use crate::{
    app::console,
    config::Config,
    exit::Exit,
    shapes::{InFlightLimit, concurrency, rate},
};

/// List destinations, whether they are paused, and their limits
///
/// Works with or without a running daemon. `postrider pause`, `resume`, `rate` and `concurrency` change it; a limit that an
/// operator has set is marked `set`, any other is the configuration's.
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
    let configured_as = |name: &str| config.destination(name);
    let configured = |name: &str| configured_as(name).is_some();
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
                    "rate_per_s": rate(configured_as(name), view),
                    "rate_set": view.limits.rate_per_s.is_some(),
                    "concurrency": concurrency(configured_as(name), view).map(InFlightLimit::from),
                    "concurrency_set": view.limits.concurrency.is_some(),
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
            number(shown(rate(configured_as(name), view), view.limits.rate_per_s.is_some())),
            number(shown(concurrency(configured_as(name), view), view.limits.concurrency.is_some())),
            number(view.counts.open()),
            text(since),
            text(reason),
        ]
    });
    print(&table(
        &["destination", "state", "configured", "rate/s", "concurrency", "open", "since", "reason"],
        rows,
    ))
}

/// A limit, and whether an operator has set it.
pub(super) fn shown(limit: Option<impl Display>, is_set: bool) -> String {
    match limit {
        Some(limit) if is_set => format!("{limit} (set)"),
        Some(limit) => limit.to_string(),
        None => "-".to_owned(),
    }
}
