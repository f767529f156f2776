//! The configuration: what an operator may set, typed and checked.
//!
//! Three layers, the later wins: the compiled-in `config/default.toml`, which documents every key and
//! *is* the defaults; the operator's TOML file; `POSTRIDER__…` environment variables (the key's path in
//! any case, its parts joined by `__`: `POSTRIDER__POOLS__PARSERS=4`). `[feeds."*"]` and
//! `[destinations."*"]` are laid under each feed and destination.
//!
//! [`parse`] does no IO and reports every problem at once. [`Config::resolve`] then reads what the
//! configuration only names: secrets, template files, certificates.

mod checks;
mod destination;
mod ledger;
mod problem;
mod read;
mod reader;
mod resolve;
mod secret;
#[cfg(test)]
mod tests;
mod tree;

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fmt,
    fs::File,
    io::{self, Read as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use postrider_actors::model::{alarm::AlarmRule, restart::RestartPolicy};
use url::Url;

pub use destination::{Destination, Header, HeaderValue, Table, Target, TemplateSource, Webhook, WebhookUrl};
pub use ledger::{
    CloudwatchSource, DirectorySource, HttpAuth, Ledger, LedgerKind, PostgresLedger, ReceiptSource, Receipts,
    SourceKind, SqsSource, Tls, Warehouse, WarehouseDialect,
};
pub use problem::{ConfigError, Origin, Problem, Problems};
pub use resolve::{Addresses, Materials, Resolved};
pub use secret::SecretSource;
pub use tree::ENVIRONMENT_PREFIX;

/// The documented defaults, as compiled in.
pub const DEFAULT_TOML: &str = include_str!("../../config/default.toml");

/// The feed that status changes come from, for `receipts.events_to`.
pub const STATUS_FEED: &str = "receipt-changes";

/// The largest configuration file that is read: far above any sensible one, so that a wrong path (a
/// dropped file, a device) can't fill the memory.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A checked configuration. `config/default.toml` says what each key is for.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file it came from.
    pub file: PathBuf,
    /// `[state]`
    pub state: State,
    /// `[log]`
    pub log: Log,
    /// `[pools]`
    pub pools: Pools,
    /// `[batch]`
    pub batch: Batch,
    /// `[outbox]`
    pub outbox: Outbox,
    /// `[queue]`
    pub queue: Queue,
    /// `[aws]`
    pub aws: Aws,
    /// `[lease]`
    pub lease: Lease,
    /// `[record]`
    pub record: Record,
    /// `[delivery]`
    pub delivery: Delivery,
    /// `[supervision]`, consistent by [`RestartPolicy::is_consistent`].
    pub supervision: RestartPolicy,
    /// `[shutdown]`
    pub shutdown: Shutdown,
    /// `[ops]`
    pub ops: Ops,
    /// `[alarms]`
    pub alarms: Alarms,
    /// `[ledger]`
    pub ledger: Ledger,
    /// `[receipts]`
    pub receipts: Receipts,
    /// `[warehouses.NAME]`, by name.
    pub warehouses: Vec<Warehouse>,
    /// `[feeds.NAME]`, by name.
    pub feeds: Vec<Feed>,
    /// `[destinations.NAME]`, by name.
    pub destinations: Vec<Destination>,
}

/// Where Postrider keeps what it must not lose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// An absolute directory.
    pub dir: PathBuf,
}

/// What is logged, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// How a line looks.
    pub format: LogFormat,
    /// What is logged at least.
    pub level: LogLevel,
    /// Lines that one place in the code may log at once before it is slowed down.
    pub burst: u32,
    /// Lines per second that one place in the code may log after that.
    pub rate_per_s: u32,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// `journald` if stderr is the journal, else `text`.
    Auto,
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
    /// Text without time, with the priority prefix that the journal reads.
    Journald,
}

/// What is logged at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Only what needs a person.
    Error,
    /// And what may need one soon.
    Warn,
    /// And the milestones of each file.
    Info,
    /// And each batch.
    Debug,
    /// Everything.
    Trace,
}

/// How many of each worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pools {
    /// Parsers per feed.
    pub parsers: usize,
    /// Delivery workers.
    pub deliveries: usize,
    /// Workers that write into warehouses' tables.
    pub tables: usize,
    /// Arbiters that actors are spread over.
    pub arbiters: usize,
    /// Threads of the tokio runtime; `None`: as many as there are cores.
    pub workers: Option<usize>,
}

/// When a batch is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Messages per batch.
    pub max_messages: u32,
    /// Payload bytes per batch.
    pub max_bytes: usize,
    /// The longest a batch waits to fill.
    pub linger: Duration,
}

/// Where accepted batches are kept, and when intake pauses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outbox {
    /// Which store; the ledger is in the same.
    pub kind: OutboxKind,
    /// Open messages at which intake pauses.
    pub high_watermark: u64,
    /// Open messages at which it goes on; below `high_watermark`.
    pub low_watermark: u64,
    /// From its dispatch to the removal of a settled batch, at least an hour; `None`: it is kept.
    pub retention: Option<Duration>,
}

/// Which store holds outbox and ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutboxKind {
    /// SQLite in the state directory.
    Embedded,
    /// Two tables that several processes share; only with [`QueueKind::Sqs`].
    Dynamodb(DynamodbOutbox),
}

/// `[outbox.dynamodb]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DynamodbOutbox {
    /// The outbox's table; the ledger's is [`DynamodbOutbox::ledger_table`].
    pub table: String,
    /// Shards per destination in the indexes.
    pub shards: u32,
    /// Segments of the parallel scan.
    pub scan_concurrency: usize,
    /// Between two looks at the index.
    pub sweep_interval: Duration,
    /// How long another process's batch is left to it.
    pub sweep_after: Duration,
}

impl DynamodbOutbox {
    /// The ledger's table.
    pub fn ledger_table(&self) -> String {
        format!("{}-ledger", self.table)
    }
}

/// What carries batches to workers, and how far those reach ahead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Which queue.
    pub kind: QueueKind,
    /// Batches leased per destination and worker.
    pub prefetch: usize,
}

/// Which queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueKind {
    /// The embedded store itself.
    Embedded,
    /// SQS.
    Sqs(SqsQueue),
}

/// `[queue.sqs]` and `[queue.delay]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SqsQueue {
    /// The queue.
    pub queue: QueueAddress,
    /// The name of the queue for what can't be read.
    pub dead_letter_name: String,
    /// Bytes of an entry, and of a call.
    pub max_bytes: usize,
    /// Long polls at the same time.
    pub pollers: usize,
    /// How long a poll waits.
    pub wait: Duration,
    /// Deliveries of an entry until SQS gives it up.
    pub max_receives: u32,
    /// Message groups per destination on a FIFO queue.
    pub lanes: u32,
    /// The throttle on what is sent; [`Delay::None`] on a FIFO queue.
    pub delay: Delay,
}

/// How new entries are delayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delay {
    /// Not at all.
    None,
    /// All alike.
    Fixed(Duration),
    /// By how many entries the queue holds.
    ByDepth {
        /// Entries above which a delay holds, ascending, and the delay, ascending.
        steps: Vec<(u64, Duration)>,
        /// How far the depth must fall below a step to leave it, in percent of the step.
        hysteresis_percent: u32,
        /// Between two looks at the depth.
        read_every: Duration,
    },
}

/// An SQS queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueAddress {
    /// By its name in the account and region of the credentials.
    Name(String),
    /// By its address, which ends in its name.
    Url(Url),
}

impl QueueAddress {
    /// The queue's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Name(name) => name,
            Self::Url(url) => url.path().rsplit('/').next().unwrap_or_default(),
        }
    }

    /// Whether it is a FIFO queue: SQS tells by the name.
    pub fn is_fifo(&self) -> bool {
        self.name().ends_with(FIFO_SUFFIX)
    }
}

impl fmt::Display for QueueAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Url(url) => f.write_str(url.as_str()),
        }
    }
}

/// What the names of FIFO queues end in (Amazon SQS API reference, `CreateQueue`).
const FIFO_SUFFIX: &str = ".fifo";

/// How AWS is reached. Credentials are the SDK's own matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aws {
    /// The region; `None`: where the SDK looks for it.
    pub region: Option<String>,
    /// The profile; `None`: where the SDK looks for it.
    pub profile: Option<String>,
    /// Another address for SQS.
    pub sqs_endpoint: Option<Url>,
    /// Another address for DynamoDB.
    pub dynamodb_endpoint: Option<Url>,
    /// Another address for CloudWatch Logs.
    pub logs_endpoint: Option<Url>,
    /// Until a connection is open.
    pub connect_timeout: Duration,
    /// One try of one call, the wait of a long poll not counted.
    pub attempt_timeout: Duration,
}

/// How long a worker may keep a batch without a sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// From a lease or its extension to its loss; more than twice every destination's timeout.
    pub duration: Duration,
    /// Lost leases after which a message is given up.
    pub lost_cap: u32,
}

/// How outcomes are grouped for the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Outcomes per group.
    pub max_outcomes: usize,
    /// The longest an outcome waits for its group.
    pub linger: Duration,
    /// Outcomes that are not recorded yet, above which no request is begun: the window of I6.
    pub max_unrecorded: usize,
}

/// Bounds over all destinations together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Requests in flight.
    pub concurrency: usize,
    /// Messages per second; `None`: no bound.
    pub rate: Option<Rate>,
}

/// A rate and the burst it allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Messages per second, at least 1.
    pub per_s: u32,
    /// Messages at once, at least 1.
    pub burst: u32,
}

/// How the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown {
    /// From SIGTERM to the exit.
    pub timeout: Duration,
}

/// Where metrics and health are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ops {
    /// Where; `None`: nowhere.
    pub listen: Option<SocketAddr>,
    /// Names that requests may call it by, in lower case.
    pub allowed_hosts: Vec<String>,
}

/// The alarms that are watched; `None`: this one is not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Alarms {
    /// Of messages without a final state.
    pub depth: Option<AlarmRule>,
    /// Of per cent.
    pub failures: Option<FailuresAlarm>,
    /// Of seconds.
    pub latency: Option<AlarmRule>,
    /// Of messages given up, and the window they are counted in.
    pub dead: Option<(AlarmRule, Duration)>,
}

/// When attempts or queue entries fail too often.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FailuresAlarm {
    /// Of per cent.
    pub rule: AlarmRule,
    /// How long is looked back.
    pub window: Duration,
    /// Attempts below which there is no rate.
    pub min_attempts: u64,
}

/// Where messages come from and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feed {
    /// `[a-z0-9_-]{1,64}`
    pub name: String,
    /// Where messages come from.
    pub source: FeedSource,
    /// Names of destinations, each of which gets every row; at least one, none twice.
    pub destinations: Vec<String>,
    /// Bytes per row.
    pub max_row_bytes: usize,
}

/// Where a feed's messages come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FeedSource {
    /// Files that are dropped.
    Directory(DirectoryFeed),
    /// Entries of an SQS queue.
    Queue(QueueFeed),
}

/// A watched directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryFeed {
    /// An absolute directory.
    pub path: PathBuf,
    /// What its files look like.
    pub format: FeedFormat,
    /// What becomes of a recipient's second row in a file.
    pub duplicates: Duplicates,
    /// How long size and mtime must stand still.
    pub settle: Duration,
    /// How often the directory is looked at whatever the watch says.
    pub rescan: Duration,
    /// Whether a file is taken only with its `NAME.done` sidecar.
    pub require_done: bool,
    /// Decompressed bytes per compressed byte.
    pub decompress_max_ratio: u32,
    /// Decompressed bytes per file.
    pub decompress_max_bytes: u64,
}

/// A queue whose entries are JSON objects or arrays of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueFeed {
    /// The queue, which no other feed reads.
    pub queue: QueueAddress,
    /// The top-level key that holds the recipient.
    pub recipient: String,
    /// Messages per step.
    pub max_rows: usize,
    /// Bytes of entries per step; at least `max_row_bytes` of the feed.
    pub max_bytes: usize,
    /// The longest that an entry waits for others.
    pub linger: Duration,
    /// Long polls at the same time.
    pub pollers: usize,
    /// How long a poll waits.
    pub wait: Duration,
    /// How long a received entry stays hidden; longer than `linger`.
    pub visibility: Duration,
}

/// What a feed's files look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FeedFormat {
    /// One id per line.
    Text,
    /// Delimited, with a header.
    Csv {
        /// One ASCII character.
        delimiter: u8,
        /// The column that holds the recipient.
        recipient: String,
    },
    /// One JSON object per line.
    Ndjson {
        /// The top-level key that holds the recipient.
        recipient: String,
    },
}

/// What becomes of a recipient's second row in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duplicates {
    /// It is a message of its own.
    Keep,
    /// It is counted as a duplicate and not sent.
    First,
}

impl Feed {
    /// The watched directory, if it is one.
    pub fn directory(&self) -> Option<&DirectoryFeed> {
        match &self.source {
            FeedSource::Directory(directory) => Some(directory),
            FeedSource::Queue(_) => None,
        }
    }

    /// The queue, if it is one.
    pub fn queue(&self) -> Option<&QueueFeed> {
        match &self.source {
            FeedSource::Directory(_) => None,
            FeedSource::Queue(queue) => Some(queue),
        }
    }
}

impl Config {
    /// The feed of that name.
    pub fn feed(&self, name: &str) -> Option<&Feed> {
        self.feeds.iter().find(|feed| feed.name == name)
    }

    /// The destination of that name.
    pub fn destination(&self, name: &str) -> Option<&Destination> {
        self.destinations.iter().find(|destination| destination.name == name)
    }

    /// The warehouse of that name.
    pub fn warehouse(&self, name: &str) -> Option<&Warehouse> {
        self.warehouses.iter().find(|warehouse| warehouse.name == name)
    }

    /// Whether the ledger keeps a row of each message to that destination.
    pub fn is_recorded(&self, destination: &str) -> bool {
        self.ledger.kind != LedgerKind::Embedded
            || self.receipts.sources.iter().any(|source| source.destination == destination)
    }

    /// Whether any part of the ledger of rows is used.
    pub fn has_rows(&self) -> bool {
        self.ledger.kind != LedgerKind::Embedded || !self.receipts.sources.is_empty()
    }
}

/// Reads the operator's file and this process's environment.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let text = read_bounded(path, FILE_BYTES_MAX)
        .map_err(|error| ConfigError::Unreadable { path: path.to_owned(), error })?;
    Ok(parse(&text, path, std::env::vars_os())?)
}

/// Checks a configuration without IO. `file` is how problems name it.
pub fn parse(
    text: &str,
    file: &Path,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Config, Problems> {
    let (result, _) = parse_tracked(text, file, environment);
    result
}

/// As [`parse`], with every key that was asked for, so that a test can hold them against the
/// documentation.
fn parse_tracked(
    text: &str,
    file: &Path,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> (Result<Config, Problems>, BTreeSet<String>) {
    let invalid = |list| Problems { file: file.to_owned(), list };
    // Compiled in, and a test parses it.
    let mut tree = match tree::parse(DEFAULT_TOML, true) {
        Ok(tree) => tree,
        Err(list) => return (Err(invalid(list)), BTreeSet::new()),
    };
    let mut problems = match tree::parse(text, false) {
        Ok(over) => tree::merge(&mut tree, over),
        Err(list) => return (Err(invalid(list)), BTreeSet::new()),
    };
    problems.extend(tree::overlay(&mut tree, environment));
    let reader = reader::Reader::default();
    let config = read::config(&reader, tree, file);
    checks::check(&reader, &config);
    let (more, asked) = reader.finish();
    problems.extend(more);
    (Problems::check(file, problems).map(|()| config), asked)
}

/// The text of a file of at most `bytes_max` bytes.
fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(bytes_max + 1).read_to_string(&mut text)?;
    if text.len() as u64 > bytes_max {
        return Err(io::Error::other(format!("it is larger than {bytes_max} bytes")));
    }
    Ok(text)
}
