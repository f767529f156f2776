//! `postrider destinations`

use std::{
    fmt::Display,
    num::{NonZeroU32, NonZeroUsize},
    path::Path,
    process::ExitCode,
};

use postrider_actors::{model::limits::Concurrency, ports::console::DestinationView};
use serde_json::json;

use super::{
    print, print_json,
    table::{number, table, text, time},
};
use crate::{
    app::console,
    config::{Config, Destination},
    exit::Exit,
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
                    "concurrency": concurrency(configured_as(name), view).map(|it| match it {
                        Concurrency::Auto => json!("auto"),
                        Concurrency::Fixed(number) => json!(number),
                    }),
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

/// The limit on messages per second to a destination, if there is one.
pub(super) fn rate(configured: Option<&Destination>, view: &DestinationView) -> Option<u32> {
    let by_config = || configured.and_then(|known| known.rate()).map(|rate| rate.per_s);
    view.limits.rate_per_s.map(NonZeroU32::get).or_else(by_config)
}

/// The requests that may be in flight to a webhook.
fn concurrency(configured: Option<&Destination>, view: &DestinationView) -> Option<Concurrency> {
    let by_config = || {
        let fixed = configured?.webhook()?.concurrency;
        Some(fixed.and_then(NonZeroUsize::new).map_or(Concurrency::Auto, Concurrency::Fixed))
    };
    view.limits.concurrency.or_else(by_config)
}

/// A limit, and whether an operator has set it.
pub(super) fn shown(limit: Option<impl Display>, is_set: bool) -> String {
    match limit {
        Some(limit) if is_set => format!("{limit} (set)"),
        Some(limit) => limit.to_string(),
        None => "-".to_owned(),
    }
}
