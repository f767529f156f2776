//! `postrider demo`

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use indicatif::BinaryBytes;

use crate::demo::{DemoSettings, run as run_demo};

/// Run the whole pipeline once: nothing to install, nothing to configure
///
/// Makes a directory with a configuration and a generated CSV file, starts a receiver and the daemon,
/// drops the file and follows it until every row has its final state. Some rows are bad, some are
/// repeated, and the receiver fails one request in a thousand. Exits with 1 if a row is not accounted for.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How many rows the file has
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    messages: u64,

    /// A new or empty directory to use instead of a temporary one
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,

    /// Remove everything at the end
    #[arg(long, conflicts_with = "keep")]
    rm: bool,

    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

/// Runs it and prints the summary.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let settings = DemoSettings { messages: args.messages, directory: args.keep, progress: !args.json };
    let (summary, directory) = run_demo(&settings)?;
    let text = if args.json {
        serde_json::to_string_pretty(&summary)? + "\n"
    } else if args.rm {
        summary.table()
    } else {
        let place = directory.display();
        format!(
            "{}\n{}\nEverything is in {place} ({}); nothing of it is needed any more. Remove it: rm -r {place}\n",
            summary.table(),
            summary.files(),
            BinaryBytes(size(&directory)?)
        )
    };
    if args.rm {
        fs::remove_dir_all(&directory).with_context(|| format!("can't remove {}", directory.display()))?;
    }
    io::stdout().write_all(text.as_bytes())?;
    Ok(if summary.balanced { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The bytes of all files in a directory.
fn size(directory: &Path) -> io::Result<u64> {
    fs::read_dir(directory)?.try_fold(0, |bytes, entry| {
        let entry = entry?;
        let metadata = entry.metadata()?; // of a link itself
        Ok(bytes + if metadata.is_dir() { size(&entry.path())? } else { metadata.len() })
    })
}
