//! `postrider reload`

use std::{path::Path, process::ExitCode, time::Duration};

use postrider_actors::ports::console::AuditLine;

use super::{print, steer};
use crate::{
    app::{console, reload},
    config,
    exit::Exit,
    telemetry::escape,
};

/// Let the running daemon read its configuration anew, and wait until it has
///
/// What SIGHUP does. The daemon reads its own configuration file; this command's only says where its state directory is. If
/// the new configuration can't be used, the old one stays, nothing is interrupted, and it is said why. Whoever may write
/// to the state directory may do it: the daemon's user, and root.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The longest to wait: 30s, 2m
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = humantime::parse_duration)]
    wait: Duration,
}

/// Asks for a reload.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    // What is wrong elsewhere the daemon says itself.
    let (here, _) = config::load_for_store(config)?;
    let used = reload::ask(&here.state.dir, args.wait)?;
    let file = used.display().to_string();
    let line = AuditLine {
        at: steer::now(),
        by: steer::who(),
        verb: "reload".to_owned(),
        of: file.clone(),
        detail: String::new(),
    };
    console::operate(&here)?.note(&line)?;
    print(&format!("{} is in use\n", escape(&file)))?;
    Ok(Exit::Done.into())
}
