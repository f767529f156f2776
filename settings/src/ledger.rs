//! The ledger of rows, receipts, and warehouses.

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use crate::{
    address::{optional_path, optional_text},
    daemon::listen,
    declare::{choice, duration, given, integer, unset},
    destinations::optional_secret,
    reader::Section,
    secret::SecretSource,
};

/// Which engine keeps a row of each message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LedgerKind {
    /// SQLite in the state directory, and only rows of messages whose destination has receipts.
    Embedded,
    /// Postgres, a row of every message.
    Postgres,
}

/// How a connection to Postgres is secured. There is no "if the server can": a man in the middle answers that it
/// can't.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    /// The server's certificate is verified.
    Require,
    /// Not at all: on the loopback, or in a network of its own.
    Disable,
}

/// What a warehouse understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarehouseDialect {
    /// Postgres.
    Postgres,
    /// Amazon Redshift.
    Redshift,
}

impl fmt::Display for WarehouseDialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Postgres => "postgres",
            Self::Redshift => "redshift",
        })
    }
}

const TLS: &[(&str, Tls)] = &[("require", Tls::Require), ("disable", Tls::Disable)];

crate::settings! {
    /// Where a row of each message is kept: its state, attempts, the destination's own id for it, and its receipts.
    /// The counts and dead letters of `postrider files` and `dead` stay with the outbox.
    Ledger {
        /// "embedded" keeps rows in the store of `state.dir`, and only of messages whose destination has a source of
        /// receipts; "postgres" keeps a row of every message.
        kind: LedgerKind = choice(&[("embedded", LedgerKind::Embedded), ("postgres", LedgerKind::Postgres)]);
        /// How long rows, orphans and rejects are kept; "0s" = for ever. Rows go by file, Postgres' by partition,
        /// after the last that was recorded. At least the longest `max_age` and the longer of `receipts.timeout` and
        /// `receipts.park` together, so that no message is forgotten while it is in flight.
        retention: Option<Duration> = duration("0s", "0s"..="3650d").or_none();
    }

    /// Used where `ledger.kind` = "postgres". Make the schema with `postrider migrate`; docs/postgres.md has the role
    /// that the daemon needs.
    Postgres {
        /// Where the address is kept, as it holds a password: "env:NAME", "file:/PATH" or "credential:NAME". The
        /// address is `postgres://USER:PASSWORD@HOST:PORT/DATABASE`.
        url: SecretSource = unset("\"credential:ledger\"", secret);
        /// The schema: 1 to 48 characters out of a-z, 0-9 and _.
        schema: String = given("\"postrider\"", schema);
        /// Open connections at most. Each delivery worker and table worker that records uses one at a time, and so do
        /// each reconciler, each source, the sweeper, and up to 16 requests with receipts.
        connections: usize = integer(8, 1..=100, "connections");
        /// "require" verifies the server's certificate; "disable" is for loopback and Unix sockets.
        tls: Tls = choice(TLS);
        /// PEM file of certificates to trust in addition to the system's; an absolute path.
        ca_file: Option<PathBuf> = unset("\"/etc/postrider/postgres-ca.pem\"", optional_path);
        /// Days of one partition. Retention drops whole partitions; a receipt by the provider's id looks into each of
        /// them, so keep them few: at most about 50 within `retention`.
        partition_days: u32 = integer(7, 1..=366, "days");
    }

    /// Later reports on messages (delivery receipts).
    Receipts {
        /// Workers that apply receipts to messages.
        reconcilers: usize = integer(2, 1..=64, "reconcilers");
        /// With no final receipt after this time a sent message becomes `expired`. A late receipt still updates it.
        timeout: Duration = duration("3d", "1s"..="365d");
        /// How long a receipt waits for a message that is not known yet; then it becomes an orphan.
        park: Duration = duration("1d", "1s"..="365d");
        /// The destination that gets each change of a message's state: a JSON object with `message_id`,
        /// `destination`, `provider_id`, `before`, `state` and `at`, delivered like any other message. None by
        /// default.
        events_to: Option<String> = unset("\"status\"", optional_text);
        /// Where sources of kind "http" listen, "ADDRESS:PORT"; "" = nowhere. Put a TLS proxy in front of it.
        listen: Option<SocketAddr> = given("\"\"", listen);
    }

    /// Databases for destinations of kind = "table". The limits on statements apply to all tables of one warehouse
    /// together.
    Warehouse {
        /// Where the address is kept, as it holds a password: "env:NAME", "file:/PATH" or "credential:NAME".
        url: SecretSource = unset("\"credential:warehouse\"", secret);
        /// What it understands.
        dialect: WarehouseDialect =
            choice(&[("postgres", WarehouseDialect::Postgres), ("redshift", WarehouseDialect::Redshift)]);
        /// How the connection is secured.
        tls: Tls = choice(TLS);
        /// PEM file of certificates to trust in addition to the system's; an absolute path.
        ca_file: Option<PathBuf> = unset("\"/etc/postrider/warehouse-ca.pem\"", optional_path);
        /// Statements in flight at once; also the most connections.
        statements: usize = integer(4, 1..=100, "statements in flight");
        /// Statements per second; 0 = no limit.
        statements_per_s: Option<u32> = integer(20, 0..=10_000, "statements per second, 0 = no limit").or_none();
        /// How long one statement may take; less than half of `lease.duration`.
        statement_timeout: Duration = duration("25s", "100ms"..="1h");
    }
}

/// Where a secret is kept. It must exist.
pub fn secret(section: &mut Section<'_>, key: &'static str) -> SecretSource {
    let source = optional_secret(section, key);
    section.require(key, "write where the address is kept, such as \"env:NAME\"");
    source.unwrap_or(SecretSource::Environment(String::new()))
}

fn schema(section: &mut Section<'_>, key: &'static str) -> String {
    // It is quoted wherever it is used; still, a name that needs no quotes spares the operator trouble (F57).
    let is_name = |schema: &str| {
        (1..=48).contains(&schema.len())
            && schema.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
            && !schema.starts_with(|first: char| first.is_ascii_digit())
            && !schema.starts_with("pg_")
    };
    let advice = "write a schema's name: 1 to 48 characters out of a-z, 0-9 and _, no digit first, not pg_…";
    section.checked_text(key, is_name, advice)
}
