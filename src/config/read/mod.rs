//! Reads every key. `config/default.toml` documents each with its range and reason; a test holds
//! the two against each other.

mod destination;
mod engines;
mod feed;
mod ledger;
mod ops;

use std::path::{Component, Path, PathBuf};

use postrider_actors::model::restart::RestartPolicy;

pub(super) use self::destination::TEMPLATE_BYTES_MAX;
use self::{
    destination::destination,
    engines::{aws, outbox, queue},
    feed::feed,
    ledger::{ledger, receipts, warehouse},
    ops::{alarms, ops},
};
use super::{
    Batch, Config, Delivery, Lease, Log, LogFormat, LogLevel, Pools, Rate, Record, Shutdown, State,
    reader::{Reader, Section},
    tree::{Table, shown_text},
};

/// Feeds and destinations that one configuration may hold: each costs actors and tasks.
const NAMES_MAX: usize = 256;
/// Reads the tree; what is wrong is noted in `reader` and stands as a value within its range.
pub(super) fn config(reader: &Reader, tree: Table, file: &Path) -> Config {
    let mut root = Section::root(reader, tree);
    let outbox = outbox(reader, root.section("outbox"));
    let config = Config {
        file: file.to_owned(),
        state: state(reader, root.section("state")),
        log: log(root.section("log")),
        pools: pools(root.section("pools")),
        batch: batch(root.section("batch")),
        queue: queue(reader, root.section("queue")),
        aws: aws(reader, root.section("aws")),
        lease: lease(root.section("lease")),
        record: record(reader, root.section("record")),
        delivery: delivery(root.section("delivery")),
        supervision: supervision(root.section("supervision")),
        shutdown: shutdown(root.section("shutdown")),
        ops: ops(reader, root.section("ops")),
        alarms: alarms(reader, root.section("alarms"), &outbox),
        outbox,
        ledger: ledger(reader, root.section("ledger")),
        receipts: receipts(reader, root.section("receipts")),
        warehouses: named(reader, &mut root, "warehouses", warehouse),
        feeds: named(reader, &mut root, "feeds", feed),
        destinations: named(reader, &mut root, "destinations", destination),
    };
    root.finish();
    config
}

fn state(reader: &Reader, mut section: Section<'_>) -> State {
    let dir = path(reader, &mut section, "dir", Need::Required).unwrap_or_default();
    section.finish();
    State { dir }
}

fn log(mut section: Section<'_>) -> Log {
    let log = Log {
        format: section
            .choice(
                "format",
                &[
                    ("auto", LogFormat::Auto),
                    ("text", LogFormat::Text),
                    ("json", LogFormat::Json),
                    ("journald", LogFormat::Journald),
                ],
            )
            .unwrap_or(LogFormat::Auto),
        level: section
            .choice(
                "level",
                &[
                    ("error", LogLevel::Error),
                    ("warn", LogLevel::Warn),
                    ("info", LogLevel::Info),
                    ("debug", LogLevel::Debug),
                    ("trace", LogLevel::Trace),
                ],
            )
            .unwrap_or(LogLevel::Info),
        burst: section.integer("burst", 1..=100_000, "lines"),
        rate_per_s: section.integer("rate_per_s", 1..=100_000, "lines per second"),
    };
    section.finish();
    log
}

fn pools(mut section: Section<'_>) -> Pools {
    let pools = Pools {
        parsers: count(&mut section, "parsers", 1, 64, "parsers per feed"),
        deliveries: count(&mut section, "deliveries", 1, 64, "delivery workers"),
        tables: count(&mut section, "tables", 1, 64, "workers"),
        arbiters: count(&mut section, "arbiters", 1, 64, "arbiters"),
        workers: Some(count(&mut section, "workers", 0, 256, "threads, 0 = one per core"))
            .filter(|&threads| threads > 0),
    };
    section.finish();
    pools
}

fn batch(mut section: Section<'_>) -> Batch {
    let batch = Batch {
        max_messages: section.integer("max_messages", 1..=10_000, "messages"),
        max_bytes: count(&mut section, "max_bytes", 1 << 10, 16 << 20, "bytes"),
        linger: section.millis("linger_ms", 0..=60_000),
    };
    section.finish();
    batch
}

fn lease(mut section: Section<'_>) -> Lease {
    let lease = Lease {
        // SQS holds no message back for longer than 12 hours.
        duration: section.millis("duration_ms", 1_000..=43_200_000),
        lost_cap: section.integer("lost_cap", 3..=100, "lost leases"),
    };
    section.finish();
    lease
}

fn record(reader: &Reader, mut section: Section<'_>) -> Record {
    let max_unrecorded = count(&mut section, "max_unrecorded", 1, 1_000_000, "outcomes");
    let mut max_outcomes = count(&mut section, "max_outcomes", 1, 10_000, "outcomes");
    if !reader.is_set("record.max_outcomes") {
        max_outcomes = max_outcomes.min(max_unrecorded);
    }
    let linger = section.millis("linger_ms", 0..=10_000);
    section.finish();
    Record { max_outcomes, linger, max_unrecorded }
}

fn delivery(mut section: Section<'_>) -> Delivery {
    let delivery = Delivery {
        concurrency: count(&mut section, "concurrency", 1, 65_536, "requests in flight"),
        rate: rate(&mut section),
    };
    section.finish();
    delivery
}

fn supervision(mut section: Section<'_>) -> RestartPolicy {
    let policy = RestartPolicy {
        max_restarts: section.integer("max_restarts", 1..=100, "restarts"),
        period: section.millis("period_ms", 100..=86_400_000),
        base: section.millis("base_ms", 1..=60_000),
        cap: section.millis("cap_ms", 1..=3_600_000),
    };
    section.finish();
    policy
}

fn shutdown(mut section: Section<'_>) -> Shutdown {
    let shutdown = Shutdown { timeout: section.millis("timeout_ms", 100..=600_000) };
    section.finish();
    shutdown
}

/// Whether a key must be there. In a `"*"` table none must.
#[derive(Clone, Copy, PartialEq)]
enum Need {
    Required,
    Optional,
}

fn named<T>(
    reader: &Reader,
    root: &mut Section<'_>,
    key: &'static str,
    read: impl Fn(&Reader, Section<'_>, String, Need) -> T,
) -> Vec<T> {
    let (star, named) = root.named(key);
    // Read for its problems alone: they are there even if nothing uses the defaults.
    read(reader, star, "*".into(), Need::Optional);
    if named.len() > NAMES_MAX {
        reader.note(key, Some(named.len().to_string()), format!("keep to {NAMES_MAX} {key}"));
    }
    named
        .into_iter()
        .take(NAMES_MAX)
        .map(|(name, section)| {
            let is_name = (1..=64).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte));
            if !is_name {
                let advice = "choose a name of 1 to 64 characters out of a-z, 0-9, - and _";
                reader.note(&section.path.clone(), Some(shown_text(&name)), advice);
            }
            read(reader, section, name, Need::Required)
        })
        .collect()
}

/// A size or number that counts things in memory.
fn count(section: &mut Section<'_>, key: &'static str, low: u32, high: u32, what: &str) -> usize {
    section.integer(key, low..=high, what) as usize
}

/// `rate_per_s` and `burst`.
fn rate(section: &mut Section<'_>) -> Option<Rate> {
    let per_s = section.integer("rate_per_s", 0..=10_000_000, "messages per second, 0 = no bound");
    let burst = section.integer("burst", 1..=10_000_000, "messages");
    (per_s > 0).then_some(Rate { per_s, burst })
}

/// Notes a key that must be there and is not.
fn require(reader: &Reader, section: &Section<'_>, key: &str, need: Need, advice: &str) {
    let key = section.key(key);
    if need == Need::Required && !reader.is_there(&key) {
        reader.note(&key, None, format!("it is missing; {advice}"));
    }
}

/// An absolute path, taken apart and put together again so that equal paths compare equal.
fn path(reader: &Reader, section: &mut Section<'_>, key: &'static str, need: Need) -> Option<PathBuf> {
    const ADVICE: &str = "write an absolute path without `..`";
    let text = section.text(key);
    require(reader, section, key, need, ADVICE);
    let text = text?;
    let path: PathBuf = Path::new(&text).components().collect();
    // `..` can't be compared without looking at the disk, and a relative path would depend on where
    // the daemon was started.
    let is_plain = path.is_absolute()
        && !text.contains('\0')
        && path.components().all(|component| component != Component::ParentDir);
    if !is_plain {
        reader.note(&section.key(key), Some(shown_text(&text)), ADVICE);
    }
    Some(path)
}
