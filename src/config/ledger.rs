//! The ledger of rows, receipts, and warehouses.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use postrider_actors::model::receipt_format::{ReceiptFileFormat, ReceiptMapping};

use super::{QueueAddress, SecretSource};

/// `[ledger]`: where a row of each message is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ledger {
    /// Which engine.
    pub kind: LedgerKind,
    /// How long rows are kept; `None`: for ever.
    pub retention: Option<Duration>,
}

/// Which engine keeps a row of each message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LedgerKind {
    /// SQLite in the state directory, and only rows of messages whose destination has receipts.
    Embedded,
    /// Postgres, a row of every message.
    Postgres(PostgresLedger),
}

/// `[ledger.postgres]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostgresLedger {
    /// Where the address is kept, for it holds a password.
    pub url: SecretSource,
    /// The schema that `migrate` makes.
    pub schema: String,
    /// Connections at the same time.
    pub connections: usize,
    /// How the connection is secured.
    pub tls: Tls,
    /// Until a connection is open, or one of the pool is free.
    pub connect_timeout: Duration,
    /// One statement.
    pub statement_timeout: Duration,
    /// Of that, waiting for a lock.
    pub lock_timeout: Duration,
    /// Days per partition.
    pub partition_days: u32,
}

/// How a connection to Postgres is secured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// Not at all: on the loopback, or in a network of its own.
    Disable,
    /// The server's certificate is verified, against the system's roots and these.
    Require {
        /// Certificates that are trusted beside the system's.
        ca_file: Option<PathBuf>,
    },
}

/// `[receipts]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipts {
    /// Workers that apply receipts.
    pub reconcilers: usize,
    /// Receipts that are applied at once.
    pub max_receipts: usize,
    /// Bytes of them.
    pub max_bytes: usize,
    /// The longest that a receipt waits for others.
    pub linger: Duration,
    /// Receipts in the inbox, above which no source brings more.
    pub inbox_max: u64,
    /// After which a message without a receipt is expired.
    pub timeout: Duration,
    /// After which a receipt without a message is an orphan.
    pub park: Duration,
    /// The destination that hears of changes.
    pub events_to: Option<String>,
    /// Where sources of kind `http` listen.
    pub listen: Option<SocketAddr>,
    /// `[receipts.sources.NAME]`, by name.
    pub sources: Vec<ReceiptSource>,
}

/// Where receipts come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptSource {
    /// `[a-z0-9_-]{1,64}`
    pub name: String,
    /// The destination whose messages they are about.
    pub destination: String,
    /// What it is.
    pub kind: SourceKind,
    /// What the files of a directory look like.
    pub format: ReceiptFileFormat,
    /// Where in a receipt what stands, and what the provider's words mean.
    pub mapping: ReceiptMapping,
}

/// What a source of receipts is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// Files that are dropped.
    Directory(DirectorySource),
    /// Requests to `/receipts/NAME`.
    Http(HttpAuth),
    /// A queue.
    Sqs(SqsSource),
    /// Log groups.
    Cloudwatch(CloudwatchSource),
}

/// A watched directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectorySource {
    /// An absolute directory.
    pub path: PathBuf,
    /// How long size and mtime must stand still.
    pub settle: Duration,
}

/// How a sender proves who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HttpAuth {
    /// By the Standard Webhooks signature with any of these.
    Signature(Vec<SecretSource>),
    /// By any of these bearer tokens.
    Bearer(Vec<SecretSource>),
}

/// A queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SqsSource {
    /// The queue.
    pub queue: QueueAddress,
    /// How long a poll waits.
    pub wait: Duration,
    /// How long a received entry stays hidden.
    pub visibility: Duration,
}

/// Log groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudwatchSource {
    /// Their names.
    pub groups: Vec<String>,
    /// The filter pattern; `None`: every event.
    pub filter: Option<String>,
    /// Calls per second, over all groups.
    pub calls_per_s: u32,
    /// Between two looks at a group.
    pub poll: Duration,
    /// How far each look goes back behind the last, for late events.
    pub overlap: Duration,
    /// The newest events that are left for the next look.
    pub lag: Duration,
    /// How far back the first look goes.
    pub start: Duration,
    /// The longest window of one look.
    pub window: Duration,
}

/// `[warehouses.NAME]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warehouse {
    /// `[a-z0-9_-]{1,64}`
    pub name: String,
    /// Where the address is kept, for it holds a password.
    pub url: SecretSource,
    /// What it understands.
    pub dialect: WarehouseDialect,
    /// How the connection is secured.
    pub tls: Tls,
    /// Statements in flight.
    pub statements: usize,
    /// Statements per second; `None`: no bound.
    pub statements_per_s: Option<u32>,
    /// Until a connection is open, or one of the pool is free.
    pub connect_timeout: Duration,
    /// One statement.
    pub statement_timeout: Duration,
}

/// What a warehouse understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarehouseDialect {
    /// Postgres.
    Postgres,
    /// Amazon Redshift.
    Redshift,
}
