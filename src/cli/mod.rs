//! The command line: one file per command, and what they have in common.
//!
//! A command returns `anyhow::Result<ExitCode>`. An error becomes an exit code in one place,
//! [`Exit::of`]: by its type, or by the [`Exit`] that was attached with [`ExitContext::exit`](crate::exit::ExitContext::exit).

pub mod advise;
pub mod audit;
pub mod check_config;
pub mod compare;
pub mod completions;
pub mod dead;
pub mod demo;
pub mod destinations;
pub mod files;
mod findings;
pub mod messages;
pub mod migrate;
pub mod preflight;
pub mod receipts;
pub mod receiver;
pub mod reload;
pub mod run;
pub mod status;
pub mod steer;
mod table;
pub mod top;
pub mod watch;

use std::{
    env,
    ffi::OsString,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{
    Arg, ArgMatches, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, error::ErrorKind,
    parser::ValueSource,
};

use crate::{
    built_in::VERSION,
    config::{self, Config},
    exit::Exit,
    telemetry::{self, escape},
};

/// Delivers a file of user ids as signed webhook requests, and proves what happened to each
///
/// A file that is dropped into a watched directory is read row by row. Every row becomes one signed
/// HTTP request, every request ends in exactly one recorded state, and the file moves to `done` with a
/// report that balances.
#[derive(Debug, Parser)]
#[command(name = "postrider", version, long_version = VERSION.as_str(), after_help = AFTER_HELP, after_long_help = AFTER_LONG_HELP)]
pub struct Cli {
    /// The configuration file
    #[arg(
        short,
        long,
        global = true,
        value_name = "FILE",
        env = "POSTRIDER_CONFIG",
        default_value = "/etc/postrider/postrider.toml"
    )]
    pub config: PathBuf,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// Every command. Its arguments, its help and what it does are in its file.
#[derive(Debug, Subcommand)]
#[expect(missing_docs, reason = "a command's help is the documentation of its arguments")]
pub enum Command {
    Run(run::Args),
    Demo(demo::Args),
    Receiver(receiver::Args),
    CheckConfig(check_config::Args),
    Preflight(preflight::Args),
    Status(status::Args),
    Top(top::Args),
    Files(files::Args),
    Watch(watch::Args),
    Advise(advise::Args),
    Messages(messages::Args),
    Dead(dead::Args),
    Destinations(destinations::Args),
    Pause(steer::PauseArgs),
    Resume(steer::ResumeArgs),
    Rate(steer::RateArgs),
    Concurrency(steer::ConcurrencyArgs),
    Hold(steer::HoldArgs),
    Release(steer::ReleaseArgs),
    Cancel(steer::CancelArgs),
    Priority(steer::PriorityArgs),
    Audit(audit::Args),
    Receipts(receipts::Args),
    Compare(compare::Args),
    Reload(reload::Args),
    Migrate(migrate::Args),
    Completions(completions::Args),
}

const AFTER_HELP: &str = "See `postrider --help` for examples and exit codes.";

const AFTER_LONG_HELP: &str = "\
Examples:
  postrider demo
      Run the whole pipeline once: nothing to install, nothing to configure
  postrider check-config -c postrider.toml
      List everything that is wrong with a configuration
  postrider run -c postrider.toml
      Deliver what is dropped, until SIGTERM
  postrider files -c postrider.toml
      Show what became of each file, with or without a running daemon

Environment:
  POSTRIDER_CONFIG      the configuration file, if -c is not given
  POSTRIDER__TABLE__KEY overrides a key of it: POSTRIDER__POOLS__PARSERS=4
  POSTRIDER_TOKEN       the token that `top` sends, where ops wants one
  POSTRIDER_LOG         what is logged, by module: info,postrider_actors::coordinator=debug
  NO_COLOR              no colours

Exit codes:
   0  done
   1  failed; or the answer is no (a file that does not balance)
   2  wrong usage
  65  the store is damaged
  66  the configuration file can't be read, or there is no store yet
  70  a part failed again and again and its restarts were used up
  74  the disk or the store failed
  75  not now: try again later
  78  the configuration is wrong, or the state directory can't be used with it";

/// Commands that read no configuration.
const WITHOUT_CONFIG: [&str; 3] = ["demo", "receiver", "completions"];

/// The command line as it is parsed, shown and completed: no command offers an option that means nothing to it.
fn command() -> clap::Command {
    // In place of the global option, which is then not handed down.
    let hidden = || Arg::new("config").short('c').long("config").help("Not read").hide(true);
    let hide = |command: clap::Command, name| command.mut_subcommand(name, |sub| sub.arg(hidden()));
    WITHOUT_CONFIG.into_iter().fold(Cli::command(), hide)
}

/// Parses a command line.
fn parse(line: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Cli, clap::Error> {
    let mut command = command();
    let matches = command.try_get_matches_from_mut(line)?;
    if let Some((name, own)) = matches.subcommand().filter(|(name, _)| WITHOUT_CONFIG.contains(name)) {
        let is_given =
            |matches: &ArgMatches| matches.value_source("config") == Some(ValueSource::CommandLine);
        if is_given(&matches) || is_given(own) {
            let text = format!("`postrider {name}` reads no configuration: leave --config out");
            return Err(command.error(ErrorKind::ArgumentConflict, text));
        }
    }
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    // Before there is a second thread: the kernel ties threads to their parents, not processes.
    if let Err(error) = crate::demo::end_with_parent() {
        return fail(&error);
    }
    // Reads FAILPOINTS in a build with that feature, and is nothing in any other.
    let _failpoints = fail::FailScenario::setup();
    let cli = parse(env::args_os()).unwrap_or_else(|error| error.exit());
    let result = match cli.command {
        Command::Run(args) => run::run(args, cli.config),
        Command::Demo(args) => demo::run(args),
        Command::Receiver(args) => receiver::run(args),
        Command::Status(args) => status::run(&args, &cli.config),
        Command::Top(args) => top::run(&args, &cli.config),
        Command::Files(args) => files::run(&args, &cli.config),
        Command::Watch(args) => watch::run(&args, &cli.config),
        Command::Advise(args) => advise::run(&args, &cli.config),
        Command::Messages(args) => messages::run(&args, &cli.config),
        Command::Dead(args) => dead::run(&args, &cli.config),
        Command::Destinations(args) => destinations::run(&args, &cli.config),
        Command::Pause(args) => steer::pause(&args, &cli.config),
        Command::Resume(args) => steer::resume(&args, &cli.config),
        Command::Rate(args) => steer::rate(&args, &cli.config),
        Command::Concurrency(args) => steer::concurrency(&args, &cli.config),
        Command::Hold(args) => steer::hold(&args, &cli.config),
        Command::Release(args) => steer::release(&args, &cli.config),
        Command::Cancel(args) => steer::cancel(&args, &cli.config),
        Command::Priority(args) => steer::priority(&args, &cli.config),
        Command::Audit(args) => audit::run(&args, &cli.config),
        Command::Receipts(args) => receipts::run(&args, &cli.config),
        Command::Compare(args) => compare::run(&args, &cli.config),
        Command::Reload(args) => reload::run(&args, &cli.config),
        Command::Migrate(args) => migrate::run(&args, &cli.config),
        Command::CheckConfig(args) => check_config::run(&args, &cli.config),
        Command::Preflight(args) => preflight::run(&args, &cli.config),
        Command::Completions(args) => completions::run(&args),
    };
    let exit = result.unwrap_or_else(|error| fail(&error));
    telemetry::flush();
    exit
}

/// Prints on stderr why a command failed; its exit code.
pub fn fail(error: &anyhow::Error) -> ExitCode {
    let exit = Exit::of(error);
    // Whoever closed the pipe has read enough: `postrider files | head`.
    if exit != Exit::Done {
        for line in format!("{error:#}").lines() {
            telemetry::write(&format!("postrider: {}\n", escape(line)));
        }
    }
    exit.into()
}

/// Reads as much of the configuration as says where the store is. What is wrong elsewhere is mentioned on stderr.
fn load_for_store(path: &Path) -> anyhow::Result<Config> {
    let (config, elsewhere) = config::load_for_store(path)?;
    if !elsewhere.is_empty() {
        // There is nowhere else to say it.
        let _ = writeln!(
            io::stderr(),
            "postrider: {} has errors that don't concern the store; `postrider check-config` lists them",
            escape(&path.to_string_lossy())
        );
    }
    Ok(config)
}

/// Writes a command's output. `print!` would panic on a closed pipe; [`fail`] treats that error as success.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}

/// Writes a value as JSON, for `--json`.
pub fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_and_argument_has_help() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
            for command in command.get_subcommands() {
                assert!(command.get_about().is_some(), "{}", command.get_name());
                check(command);
            }
        }
        check(&command());
    }

    #[test]
    fn what_reads_no_configuration_offers_none() {
        let help = |name| {
            let mut command = command();
            command.build();
            command.find_subcommand_mut(name).unwrap().render_long_help().to_string()
        };
        for name in WITHOUT_CONFIG {
            let line = ["postrider", name, "bash", "-c", "/x"];
            let line: Vec<_> =
                line.into_iter().filter(|word| *word != "bash" || name == "completions").collect();
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains("reads no configuration"), "{error}");
            assert!(!help(name).contains("--config"), "{}", help(name));
        }
        assert!(help("files").contains("--config"), "{}", help("files"));
        parse(["postrider", "demo", "--rm"]).unwrap();
    }

    #[test]
    fn the_configuration_may_be_named_before_and_after_the_command() {
        for line in ["postrider -c /x check-config", "postrider check-config --config /x"] {
            let cli = parse(line.split(' ')).unwrap();
            assert_eq!(cli.config, PathBuf::from("/x"));
        }
    }

    #[test]
    fn the_help_lists_every_exit_code() {
        for exit in Exit::ALL {
            let code = format!("\n  {:>2}  ", exit as u8);
            assert!(AFTER_LONG_HELP.contains(&code), "{exit:?} is missing in --help");
        }
    }
}
