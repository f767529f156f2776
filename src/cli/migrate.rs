//! `postrider migrate`

use std::{path::Path, process::ExitCode};

use serde_json::json;

use super::{Exit, print, print_json};
use crate::{
    adapters::embedded::{self, SCHEMA_VERSION},
    config,
};

/// Bring the store's schema up to date
///
/// The daemon does this by itself when it starts; with this command it can be done, and fail, beforehand.
/// The daemon must not run meanwhile. A store that is missing is not made.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only say which version the store has and which this program needs
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Migrates.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    let state_dir = config::load(config)?.state.dir;
    let before = embedded::schema_version(&state_dir)?;
    let after = if args.dry_run { before } else { embedded::migrate(&state_dir)? };
    if args.json {
        print_json(&json!({ "before": before, "after": after, "needed": SCHEMA_VERSION }))?;
    } else if args.dry_run {
        print(&format!("the store has schema version {before}, this program needs {SCHEMA_VERSION}\n"))?;
    } else if before == after {
        print(&format!("schema version {after} is up to date\n"))?;
    } else {
        print(&format!("schema version {before} became {after}\n"))?;
    }
    Ok(Exit::Done.into())
}
