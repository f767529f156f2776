//! `postrider completions`

use std::process::ExitCode;

use clap_complete::Shell;

use super::{command, print};
use crate::exit::Exit;

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "For bash: postrider completions bash > /etc/bash_completion.d/postrider")]
pub struct Args {
    /// The shell
    shell: Shell,
}

/// Prints the script.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "postrider", &mut script);
    print(&String::from_utf8(script)?)?;
    Ok(Exit::Done.into())
}
