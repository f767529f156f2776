//! What an operator may set.
//!
//! A key is declared once, by [`settings!`]: its type, unit, range, default and help. From that declaration comes the
//! struct that adapters and stages are given, how the key is read, and its lines in `config/default.toml`.
//!
//! Three layers, the later wins: the declared defaults; the operator's TOML file; `POSTRIDER__…` environment
//! variables (the key's path in any case, its parts joined by `__`: `POSTRIDER__POOLS__PARSERS=4`).
//! `[feeds."*"]` and its like are laid under each feed. [`read`] does no IO and reports every problem at once.
//!
//! The tables here have plain types. Those whose keys are made of the product's own notions (templates, columns,
//! receipts) are declared in the binary, with the same macro.

mod address;
mod daemon;
mod declare;
mod destinations;
pub mod escape;
mod feeds;
mod ledger;
mod problem;
mod reader;
mod receipts;
mod secret;
mod tree;
mod value;

use std::{ffi::OsString, path::Path};

pub use address::{
    FIFO_SUFFIX, QueueAddress, absolute_path, optional_path, optional_text, queue, required_path, web_address,
};
pub use daemon::{
    AlarmEvents, Alarms, Aws, Batch, Canary, DEAD_LETTERS, DeadAlarm, Delay, DelayMode, Delivery, DepthAlarm,
    DiskAlarm, Dynamodb, FailuresAlarm, LatencyAlarm, Lease, Log, LogFormat, LogLevel, OPS_LISTEN, Ops,
    Outbox, Pools, Profile, Record, Root, Shutdown, Sqs, State, TracingKeys, listen,
};
pub use declare::{
    Choice, DocumentedValue, Flag, Integer, Key, KeyReader, Keys, OrNone, OrWord, Page, Shape, Size, Spec,
    Time, choice, duration, flag, given, integer, size, typed, unset,
};
pub use destinations::{Destination, Group, Rate, Retry, Storm, optional_secret, secrets};
pub use feeds::{Directory, Duplicates, Feed, FeedKind, FeedQueue, Format, FormatWord, Priority, delimiter};
pub use ledger::{Ledger, LedgerKind, Postgres, Receipts, Tls, Warehouse, WarehouseDialect, secret};
pub use problem::{ConfigError, Origin, Problem, Problems};
pub use reader::{Need, Reader, Section};
pub use receipts::CloudwatchSource;
pub use secret::{SOURCES, SecretSource};
pub use tree::{ENVIRONMENT_PREFIX, Table as Tree, join, shown_text};
pub use value::{parse_duration, parse_size, show_duration, show_size};

/// Lays the three layers over one another: `defaults` as TOML, the operator's text, the environment. `Err` if one of
/// the texts is not TOML at all.
pub fn layers(
    defaults: &str,
    text: &str,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<(Tree, Vec<Problem>), Vec<Problem>> {
    let mut tree = tree::parse(defaults, true)?;
    let mut problems = tree::merge(&mut tree, tree::parse(text, false)?);
    problems.extend(tree::overlay(&mut tree, environment));
    Ok((tree, problems))
}

/// Reads named tables, each laid over the one named `*`. A name goes into stores, paths and metrics (F57).
pub fn named<T>(
    parent: &mut Section<'_>,
    key: &'static str,
    read: impl Fn(&mut Section<'_>, &str) -> T,
) -> Vec<T> {
    let reader = parent.reader();
    let (mut star, named) = parent.named(key);
    // Read for its problems alone: they are there even if nothing uses the defaults.
    read(&mut star, "*");
    star.finish();
    if named.len() > NAMES_MAX {
        reader.note(key, Some(named.len().to_string()), format!("keep to {NAMES_MAX} {key}"));
    }
    named
        .into_iter()
        .take(NAMES_MAX)
        .map(|(name, mut section)| {
            let is_name = (1..=64).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte));
            if !is_name {
                let advice = "choose a name of 1 to 64 characters out of a-z, 0-9, - and _";
                reader.note(&section.path, Some(shown_text(&name)), advice);
            }
            let read = read(&mut section, &name);
            section.finish();
            read
        })
        .collect()
}

/// Feeds and destinations that one configuration may hold: each costs actors and tasks.
const NAMES_MAX: usize = 256;

/// Notes keys of another kind that were written for this very feed or destination. A `"*"` table may hold
/// them for others.
pub fn refuse_keys<T: Keys>(section: &Section<'_>, advice: &str) {
    for key in T::keys() {
        let path = section.key(key.name);
        if section.need == Need::Required && section.reader().is_own(&path) {
            section.reader().note(&path, None, advice);
        }
    }
}

/// Ends a reading: `Err` with everything that is wrong.
pub fn finish(reader: Reader, file: &Path, mut problems: Vec<Problem>) -> Result<(), Problems> {
    let (more, _) = reader.finish();
    problems.extend(more);
    Problems::check(file, problems)
}
