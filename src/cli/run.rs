//! Everything before the daemon itself: configuration, logs, and what the configuration names.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::{
    app,
    cli::ExitContext as _,
    config::{self, LogFormat, Resolved},
    systemd::Notifier,
    telemetry::{self, Telemetry},
};

/// Run the daemon until SIGTERM or SIGINT
///
/// It reads the configuration, takes the state directory for itself and delivers what is dropped. A
/// SIGTERM drains: requests in flight are finished and recorded, within shutdown.timeout. A second
/// one exits at once; nothing is lost either way. SIGHUP reads the configuration again.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How log lines look; overrides log.format
    #[arg(long, value_name = "FORMAT", value_parser = log_format())]
    pub log_format: Option<LogFormat>,
}

fn log_format() -> impl TypedValueParser<Value = LogFormat> {
    let words = LogFormat::WORDS.iter().map(|(word, _)| *word);
    PossibleValuesParser::new(words).map(|word| {
        let found = LogFormat::WORDS.iter().find(|(known, _)| *known == word);
        found.expect("the parser takes no other word").1
    })
}

/// What the daemon starts with.
#[derive(Debug)]
pub struct Prepared {
    /// The configuration and everything it names.
    pub resolved: Resolved,
    /// What keeps the log within bounds.
    pub telemetry: Telemetry,
    /// Where systemd hears how it goes.
    pub notifier: Notifier,
}

/// Reads the configuration, sets up logs and connects to systemd.
pub fn prepare(args: &Args, file: &Path) -> anyhow::Result<Prepared> {
    let resolved = load(args, file)?;
    let telemetry = telemetry::init(&resolved.config.log)?;
    let notifier = Notifier::from_environment().context("can't reach NOTIFY_SOCKET")?;
    Ok(Prepared { resolved, telemetry, notifier })
}

/// Reads the configuration as the daemon uses it; at SIGHUP once more.
pub fn load(args: &Args, file: &Path) -> anyhow::Result<Resolved> {
    let mut config = config::load(file)?;
    if let Some(format) = args.log_format {
        config.log.format = format;
    }
    Ok(config.resolve()?)
}

/// Runs the daemon.
pub fn run(args: Args, file: PathBuf) -> anyhow::Result<ExitCode> {
    let Prepared { resolved, telemetry, notifier } = prepare(&args, &file)?;
    match app::run(resolved, notifier, telemetry, move || load(&args, &file)) {
        Ok(exit) => Ok(exit.into()),
        Err(error) => {
            let exit = error.exit();
            Err(error).exit(exit)
        }
    }
}
