//! `postrider run`: everything before the daemon itself: configuration, logs, secrets and templates.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use crate::{
    app,
    config::{self, LogFormat, Resolved},
    exit::ExitContext as _,
    systemd::Notifier,
    telemetry::{self, Telemetry},
};

/// Run the daemon until SIGTERM or SIGINT
///
/// Reads the configuration, locks the state directory and delivers what is dropped. SIGTERM drains: requests
/// in flight are finished and recorded, within shutdown.timeout. A second SIGTERM exits at once; nothing is
/// lost either way. SIGHUP reloads the configuration.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Format of log lines; overrides log.format
    #[arg(long, value_name = "FORMAT", value_parser = log_format())]
    pub log_format: Option<LogFormat>,
}

fn log_format() -> impl TypedValueParser<Value = LogFormat> {
    let values = LogFormat::WORDS.iter().map(|(word, format)| PossibleValue::new(*word).help(about(*format)));
    PossibleValuesParser::new(values).map(|word| {
        let found = LogFormat::WORDS.iter().find(|(known, _)| *known == word);
        found.expect("the parser takes no other word").1
    })
}

fn about(format: LogFormat) -> &'static str {
    match format {
        LogFormat::Auto => "journald if stderr is the journal, else text",
        LogFormat::Text => "For people",
        LogFormat::Json => "One JSON object per line",
        LogFormat::Journald => "Text without time, with the priority prefix that the journal reads",
    }
}

/// What the daemon starts with.
#[derive(Debug)]
pub struct Prepared {
    /// The configuration and everything it names.
    pub resolved: Resolved,
    /// The logging set-up, with its limits.
    pub telemetry: Telemetry,
    /// The connection to systemd.
    pub notifier: Notifier,
}

/// Reads the configuration, sets up logs and connects to systemd.
pub fn prepare(args: &Args, file: &Path) -> anyhow::Result<Prepared> {
    let resolved = load(args, file)?;
    let telemetry = telemetry::init(&resolved.config.log)?;
    let notifier = Notifier::from_environment().context("can't reach NOTIFY_SOCKET")?;
    Ok(Prepared { resolved, telemetry, notifier })
}

/// Reads the configuration as the daemon uses it; again at SIGHUP.
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
