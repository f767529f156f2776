//! How many file descriptors the daemon may need, and how many it may have (F7).
//!
//! Too few stop nothing: who finds none free waits, and no message is charged (F72). But the concurrency that was
//! configured is not reached, so it is said at the start and by `check-config`.

use std::{io, os::fd::AsFd as _};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{
    config::{Config, LedgerKind, SourceKind},
    findings::{Finding, Verdict},
    ops,
};
use postrider_http::receipts;

/// What the process keeps open when it is idle, as measured: the store, the runtime, the ops server.
const IDLE: usize = 32;

/// What it keeps open whatever it does, standard streams, what is read and written, and commands that ask the store
/// included.
const OWN: u64 = 64;

/// Raises the limit as far as this process may, and returns it; `None` means unlimited.
pub fn raise_limit() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return current;
    }
    // A sandbox may refuse it: then the limit is what it was.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    if raised.is_ok() { maximum } else { current }
}

/// Whether there are as many as an idle daemon has. With fewer a start fails somewhere on its way, and the runtime's panics.
pub fn check_start() -> io::Result<()> {
    let opened = (0..IDLE).map(|_| io::stderr().as_fd().try_clone_to_owned()).collect::<io::Result<Vec<_>>>();
    opened.map(drop)
}

/// What a daemon started like this process could raise its limit to; `None` means unlimited.
pub fn limit() -> Option<u64> {
    getrlimit(Resource::Nofile).maximum
}

/// What is wrong with a limit for a configuration, if anything.
pub fn shortfall(config: &Config, limit: Option<u64>) -> Option<Finding> {
    let (requests, rest) = needed(config);
    let limit = limit.filter(|&limit| limit < requests + rest)?;
    let needed = requests + rest;
    let lower = match limit.saturating_sub(rest) {
        0 => String::new(),
        fits => format!(", or delivery.concurrency to at most {fits}"),
    };
    let detail = format!(
        "RLIMIT_NOFILE is {limit}, and {needed} may be needed: {requests} for requests in flight, {rest} for the store, \
         files and other connections; set LimitNOFILE (or ulimit -n) to at least {needed}{lower}"
    );
    Some(Finding::new("descriptors", Verdict::Costly, detail))
}

/// Numbers that destinations are given and can't reach: all of them share `delivery.concurrency`.
pub fn crowding(config: &Config) -> Option<Finding> {
    let all = config.delivery.concurrency.min(config.record.max_unrecorded);
    let fixed =
        config.destinations.iter().filter_map(|known| Some((&known.name, known.webhook()?.concurrency?)));
    let total: usize = fixed.clone().map(|(_, number)| number).sum();
    let (most, number) = fixed.max_by_key(|(_, number)| *number)?;
    let limit =
        if all < config.delivery.concurrency { "record.max_unrecorded" } else { "delivery.concurrency" };
    let detail = if number > all {
        format!(
            "destinations.{most}.concurrency is {number}, and {limit} allows {all} requests in flight at all"
        )
    } else if total > all {
        format!(
            "the destinations' concurrency is {total} together, and {limit} allows {all} requests in flight: when all are \
             busy, each has an even part of it"
        )
    } else {
        return None;
    };
    let detail = format!("{detail}; raise {limit}, or lower the concurrency");
    Some(Finding::new("concurrency", Verdict::Costly, detail))
}

/// For requests, and for all else.
fn needed(config: &Config) -> (u64, u64) {
    let webhooks = config.destinations.iter().filter_map(|destination| destination.webhook());
    let requests: usize = webhooks.map(|webhook| webhook.in_flight_max()).sum();
    let warehouses: usize = config.warehouses.iter().map(|warehouse| warehouse.statements).sum();
    let ledger = if config.ledger.kind == LedgerKind::Postgres { config.postgres.connections } else { 0 };
    // Each connection of a server has a second one, to be closed by.
    let ops = config.ops.listen.map_or(0, |_| 2 * ops::CONNECTIONS_MAX);
    let is_http = config.receipt_sources.iter().any(|source| matches!(source.kind, SourceKind::Http(_)));
    let receipts = if is_http { 2 * receipts::CONNECTIONS_MAX } else { 0 };
    let feeds = config.feeds.len() * (1 + config.pools.parsers);
    let rest = OWN + (warehouses + ledger + feeds + ops + receipts) as u64;
    (requests.min(config.delivery.concurrency) as u64, rest)
}
