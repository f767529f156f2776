//! `postrider compare`

use std::{path::Path, process::ExitCode};

use crate::config::{self, Config};

/// Compare the tables of two destinations
///
/// Counts the rows of each file in both, and sums hashes of their keys; where a file differs, it narrows the difference down
/// to ranges of rows. A primary and a secondary of one feed have the same rows once everything is delivered. Exits with 1 if
/// they differ.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The first destination
    primary: String,
    /// The second
    secondary: String,
    /// Compare the values of the columns that both fill, too; not between Postgres and Redshift
    #[arg(long)]
    values: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Compares.
pub fn run(args: &Args, config: &Path) -> anyhow::Result<ExitCode> {
    compare(args, &config::load(config)?)
}

#[cfg(feature = "postgres")]
fn compare(args: &Args, config: &Config) -> anyhow::Result<ExitCode> {
    use super::{print, print_json};
    use crate::exit::Exit;

    let report = crate::app::compare(config, &args.primary, &args.secondary, args.values)?;
    if args.json {
        print_json(&report)?;
    } else {
        print(&report.to_string())?;
    }
    Ok(if report.is_equal() { Exit::Done } else { Exit::Failed }.into())
}

#[cfg(not(feature = "postgres"))]
fn compare(_: &Args, _: &Config) -> anyhow::Result<ExitCode> {
    use crate::built_in::{Engine, Engines};
    use crate::exit::{Exit, ExitContext as _};

    // A configuration with tables was refused already, so there is nothing to compare.
    let advice = Engines::BUILT_IN.missing(&[Engine::Warehouse]).unwrap_or_default();
    Err(anyhow::anyhow!(advice)).exit(Exit::Config)
}
