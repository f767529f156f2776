//! `postrider migrate`

use std::{path::Path, process::ExitCode};

use serde_json::json;

use super::{findings, print, print_json};
use crate::{
    app::engines,
    config::{self, Config, Profile},
    findings::Finding,
};
use postrider_sqlite::{self as embedded, OpenError, SCHEMA_VERSION};

/// Create or update the schema, tables and queues of the configured engines
///
/// The embedded store is updated to the schema of this program; the daemon does this itself when it starts, and
/// must not run meanwhile. A missing store is not created. With profile = "aws" the queue, its dead-letter queue,
/// and the tables with their indexes are created; what exists is only checked. With ledger.kind = "postgres" its
/// schema is created or updated, as the schema's owner: see docs/postgres.md. This needs more permissions than the
/// daemon: see docs/aws.md. Exits with 78 if something has to be fixed by hand, with 75 if something could not be
/// reached.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only print which version the store has and which this program needs, and what queues and tables lack
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The versions of the embedded store's schema.
struct Versions {
    before: i32,
    after: i32,
}

/// Migrates.
pub fn run(args: &Args, file: &Path) -> anyhow::Result<ExitCode> {
    let config = config::load(file)?;
    let shared = shared(args, &config)?;
    let versions = match embedded(args, &config) {
        Ok(versions) => versions,
        // A new machine of several: its store is made when the daemon starts.
        Err(error) if !shared.is_empty() && is_missing(&error) => None,
        Err(error) => return Err(error),
    };
    let exit = findings::exit(&shared);
    if args.json {
        let mut value = json!({
            "before": versions.as_ref().map(|versions| versions.before),
            "after": versions.as_ref().map(|versions| versions.after),
            "needed": SCHEMA_VERSION,
        });
        if !shared.is_empty() {
            value["shared"] = findings::as_json(&shared);
        }
        print_json(&value)?;
    } else {
        let store = versions.map_or_else(String::new, |versions| versions.describe(args.dry_run));
        print(&(store + &findings::as_table(&shared)))?;
    }
    Ok(exit.into())
}

fn shared(args: &Args, config: &Config) -> anyhow::Result<Vec<Finding>> {
    if args.dry_run { engines::check_shared(config) } else { engines::migrate_shared(config) }
}

fn embedded(args: &Args, config: &Config) -> anyhow::Result<Option<Versions>> {
    if config.profile != Profile::Embedded {
        return Ok(None);
    }
    let dir = &config.state.dir;
    let before = embedded::schema_version(dir)?;
    let after = if args.dry_run { before } else { embedded::migrate(dir)? };
    Ok(Some(Versions { before, after }))
}

fn is_missing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(OpenError::Missing(_)))
}

impl Versions {
    fn describe(&self, dry_run: bool) -> String {
        let Self { before, after } = self;
        if dry_run {
            format!("the store has schema version {before}, this program needs {SCHEMA_VERSION}\n")
        } else if before == after {
            format!("schema version {after} is up to date\n")
        } else {
            format!("schema updated from version {before} to {after}\n")
        }
    }
}
