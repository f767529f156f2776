//! The configuration: what an operator may set, typed and checked.
//!
//! Keys are declared in `postrider-settings`; those whose values are made of the product's own notions (templates,
//! columns, receipts) are declared here, by the same macro. `config/default.toml` is made from the declarations.
//!
//! [`parse`] does no IO and reports every problem at once. [`Config::resolve`] then reads what the
//! configuration only names: secrets, template files, certificates.

mod checks;
mod destination;
mod document;
mod receipts;
mod resolve;
#[cfg(test)]
mod tests;

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read as _},
    ops::Deref,
    path::{Path, PathBuf},
};

use postrider_actors::model::conditions::Conditions;
use postrider_settings::{Keys as _, Need, Reader, Root, Section, named, refuse_keys};

use crate::built_in::Engines;

pub use destination::{
    Destination, DestinationKind, Header, HeaderValue, Table, TableKeys, Target, TemplateSource, Webhook,
};
pub use document::default_toml;
pub use postrider_settings::{
    AlarmEvents, Alarms, Aws, Batch, Canary, CloudwatchSource, ConfigError, DeadAlarm, Delay, DelayMode,
    Delivery, DepthAlarm, Directory, DiskAlarm, Duplicates, Dynamodb, FailuresAlarm, FeedKind, FeedQueue,
    Format, LatencyAlarm, Lease, Ledger, LedgerKind, Log, LogFormat, LogLevel, OPS_LISTEN, Ops, Origin,
    Outbox, Pools, Postgres, Problem, Problems, Profile, QueueAddress, Rate, Receipts, Record, Retry,
    SecretSource, Shutdown, Sqs, State, Tls, TracingKeys, Warehouse, WarehouseDialect,
};
pub use receipts::{DirectorySource, HttpAuth, HttpSource, ReceiptSource, SourceKind, SqsSource};
pub use resolve::{Addresses, Materials, Resolved};

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
    /// `profile`
    pub profile: Profile,
    /// `[state]`
    pub state: State,
    /// `[log]`
    pub log: Log,
    /// `[pools]`
    pub pools: Pools,
    /// `[batch]`
    pub batch: Batch,
    /// `[canary]`.
    pub canary: Canary,
    /// `[outbox]`
    pub outbox: Outbox,
    /// `[outbox.dynamodb]`
    pub dynamodb: Dynamodb,
    /// `[queue.sqs]`
    pub sqs: Sqs,
    /// `[queue.delay]`
    pub delay: Delay,
    /// `[aws]`
    pub aws: Aws,
    /// `[lease]`
    pub lease: Lease,
    /// `[record]`
    pub record: Record,
    /// `[delivery]`
    pub delivery: Delivery,
    /// `[shutdown]`
    pub shutdown: Shutdown,
    /// `[ops]`
    pub ops: Ops,
    /// `[alarms]`
    pub alarms: Alarms,
    /// `[tracing]`
    pub tracing: Tracing,
    /// `[ledger]`
    pub ledger: Ledger,
    /// `[ledger.postgres]`
    pub postgres: Postgres,
    /// `[receipts]`
    pub receipts: Receipts,
    /// `[receipts.sources.NAME]`, by name.
    pub receipt_sources: Vec<ReceiptSource>,
    /// `[warehouses.NAME]`, by name.
    pub warehouses: Vec<Named<Warehouse>>,
    /// `[feeds.NAME]`, by name.
    pub feeds: Vec<Feed>,
    /// `[destinations.NAME]`, by name.
    pub destinations: Vec<Destination>,
}

/// Who collects traces, if anybody does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracing {
    /// Its keys.
    pub settings: TracingKeys,
    /// Headers that each request to the collector carries.
    pub headers: Vec<Header>,
}

impl Deref for Tracing {
    type Target = TracingKeys;

    fn deref(&self) -> &TracingKeys {
        &self.settings
    }
}

/// A table with a name of the operator's choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named<T> {
    /// `[a-z0-9_-]{1,64}`
    pub name: String,
    /// Its keys.
    pub settings: T,
}

impl<T> Deref for Named<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.settings
    }
}

/// Where messages come from and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feed {
    /// `[a-z0-9_-]{1,64}`
    pub name: String,
    /// What all feeds have in common.
    pub settings: postrider_settings::Feed,
    /// When its messages may go.
    pub conditions: Conditions,
    /// Where messages come from.
    pub source: FeedSource,
}

impl Deref for Feed {
    type Target = postrider_settings::Feed;

    fn deref(&self) -> &Self::Target {
        &self.settings
    }
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
    /// Its keys.
    pub settings: Directory,
    /// What its files look like.
    pub format: Format,
}

impl Deref for DirectoryFeed {
    type Target = Directory;

    fn deref(&self) -> &Directory {
        &self.settings
    }
}

/// A queue whose entries are JSON objects or arrays of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueFeed {
    /// Its keys.
    pub settings: FeedQueue,
    /// The top-level key that holds the recipient.
    pub recipient: String,
}

impl Deref for QueueFeed {
    type Target = FeedQueue;

    fn deref(&self) -> &FeedQueue {
        &self.settings
    }
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
    /// Each feed with each of its webhooks.
    pub(crate) fn uses_of_webhooks(&self) -> impl Iterator<Item = (&Feed, &Destination, &Webhook)> {
        let uses = self.feeds.iter().flat_map(|feed| feed.destinations.iter().map(move |name| (feed, name)));
        uses.filter_map(|(feed, name)| {
            let destination = self.destination(name)?;
            Some((feed, destination, destination.webhook()?))
        })
    }

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
        self.warehouses.iter().find(|warehouse| warehouse.name == name).map(|warehouse| &warehouse.settings)
    }

    /// Whether the ledger keeps a row of each message to that destination.
    pub fn is_recorded(&self, destination: &str) -> bool {
        self.ledger.kind != LedgerKind::Embedded
            || self.receipt_sources.iter().any(|source| source.destination == destination)
    }

    /// Whether any part of the ledger of rows is used.
    pub fn has_rows(&self) -> bool {
        self.ledger.kind != LedgerKind::Embedded || !self.receipt_sources.is_empty()
    }
}

/// Reads the operator's file and this process's environment.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let text = read_bounded(path, FILE_BYTES_MAX)
        .map_err(|error| ConfigError::Unreadable { path: path.to_owned(), error })?;
    Ok(parse(&text, path, std::env::vars_os())?)
}

/// What a command reads that only looks at a store: where that is. What is wrong elsewhere is no reason to show nothing; it is
/// given back, to be mentioned.
pub fn load_for_store(path: &Path) -> Result<(Config, Vec<Problem>), ConfigError> {
    let text = read_bounded(path, FILE_BYTES_MAX)
        .map_err(|error| ConfigError::Unreadable { path: path.to_owned(), error })?;
    Ok(parse_for_store(&text, path, std::env::vars_os())?)
}

fn parse_for_store(
    text: &str,
    file: &Path,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<(Config, Vec<Problem>), Problems> {
    let (config, checked) = read_and_check(text, file, environment, Engines::BUILT_IN)?;
    let problems = checked.err().map_or_else(Vec::new, |problems| problems.list);
    let is_of_store =
        |problem: &Problem| STORE_TABLES.contains(&problem.key.split('.').next().unwrap_or_default());
    let (of_store, elsewhere): (Vec<_>, Vec<_>) = problems.into_iter().partition(is_of_store);
    Problems::check(file, of_store).map(|()| (config, elsewhere))
}

/// The top-level keys that say where batches and their records are.
const STORE_TABLES: [&str; 6] = ["profile", "state", "outbox", "queue", "aws", "ledger"];

/// Checks a configuration without IO. `file` is how problems name it.
pub fn parse(
    text: &str,
    file: &Path,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Config, Problems> {
    parse_for(text, file, environment, Engines::BUILT_IN)
}

/// As [`parse`], for a binary with these engines.
fn parse_for(
    text: &str,
    file: &Path,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    built_in: Engines,
) -> Result<Config, Problems> {
    let (config, checked) = read_and_check(text, file, environment, built_in)?;
    checked.map(|()| config)
}

/// The configuration, with values within their ranges in place of what is wrong, and what that is. `Err` if the text is not
/// TOML at all.
fn read_and_check(
    text: &str,
    file: &Path,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    built_in: Engines,
) -> Result<(Config, Result<(), Problems>), Problems> {
    let (tree, problems) = postrider_settings::layers(&default_toml(), text, environment)
        .map_err(|list| Problems { file: file.to_owned(), list })?;
    let reader = Reader::default();
    let config = read(Section::root(&reader, tree), file);
    checks::check(&reader, &config, built_in);
    Ok((config, postrider_settings::finish(reader, file, problems)))
}

/// Reads the tree; what is wrong is noted and replaced by a value within its range.
fn read(mut tree: Section<'_>, file: &Path) -> Config {
    let root = &mut tree;
    let profile = Root::read(root).profile;
    let mut outbox = root.section("outbox");
    let mut queue = root.section("queue");
    let mut alarms = root.section("alarms");
    let mut tracing = root.section("tracing");
    let mut ledger = root.section("ledger");
    let mut receipts = root.section("receipts");
    let alarm_events = AlarmEvents::read(&mut alarms);
    let outbox_keys = Outbox::read(&mut outbox);
    let ledger_keys = Ledger::read(&mut ledger);
    queue.need = needed_if(profile == Profile::Aws);
    ledger.need = needed_if(ledger_keys.kind == LedgerKind::Postgres);
    let config = Config {
        file: file.to_owned(),
        profile,
        state: State::read_table(root, "state"),
        log: Log::read_table(root, "log"),
        pools: Pools::read_table(root, "pools"),
        batch: Batch::read_table(root, "batch"),
        canary: Canary::read_table(root, "canary"),
        dynamodb: Dynamodb::read_table(&mut outbox, "dynamodb"),
        sqs: Sqs::read_table(&mut queue, "sqs"),
        delay: Delay::read_table(&mut queue, "delay"),
        aws: Aws::read_table(root, "aws"),
        lease: Lease::read_table(root, "lease"),
        record: Record::read_table(root, "record"),
        delivery: Delivery::read_table(root, "delivery"),
        shutdown: Shutdown::read_table(root, "shutdown"),
        ops: Ops::read_table(root, "ops"),
        alarms: Alarms {
            events: alarm_events,
            depth: depth_alarm(&mut alarms, &outbox_keys),
            failures: FailuresAlarm::read_table(&mut alarms, "failures"),
            disk: DiskAlarm::read_table(&mut alarms, "disk"),
            latency: LatencyAlarm::read_table(&mut alarms, "latency"),
            dead: DeadAlarm::read_table(&mut alarms, "dead"),
        },
        tracing: Tracing {
            settings: TracingKeys::read(&mut tracing),
            headers: destination::headers(&mut tracing),
        },
        outbox: outbox_keys,
        ledger: ledger_keys,
        postgres: Postgres::read_table(&mut ledger, "postgres"),
        receipts: Receipts::read(&mut receipts),
        receipt_sources: named(&mut receipts, "sources", receipts::source),
        warehouses: named(root, "warehouses", |section, name| Named {
            name: name.to_owned(),
            settings: Warehouse::read(section),
        }),
        feeds: named(root, "feeds", feed),
        destinations: named(root, "destinations", destination::destination),
    };
    for section in [outbox, queue, alarms, tracing, ledger, receipts, tree] {
        section.finish();
    }
    config
}

fn depth_alarm(alarms: &mut Section<'_>, outbox: &Outbox) -> DepthAlarm {
    let mut alarm = DepthAlarm::read_table(alarms, "depth");
    if !alarms.reader().is_set("alarms.depth.max_messages") {
        // Above the watermark it could never be.
        alarm.max_messages = alarm.max_messages.min(outbox.low_watermark());
    }
    alarm
}

/// Whether what belongs to a kind must be there.
fn needed_if(is_that_kind: bool) -> Need {
    if is_that_kind { Need::Required } else { Need::Optional }
}

/// Reads `[feeds.NAME]`. Every key is read whatever the kind: `[feeds."*"]` sets defaults for both kinds.
fn feed(section: &mut Section<'_>, name: &str) -> Feed {
    let settings = postrider_settings::Feed::read(section);
    let mut conditions = Conditions::read(section);
    conditions.destinations.clone_from(&settings.destinations);
    let (need, is_queue) = (section.need, settings.kind == FeedKind::Sqs);
    let is_needed = need == Need::Required;
    section.need = needed_if(is_needed && !is_queue);
    let directory = Directory::read(section);
    section.need = needed_if(is_needed && is_queue);
    let mut queue = FeedQueue::read(section);
    section.need = need;
    if !section.reader().is_set(&section.key("max_size")) {
        // Allowing longer rows does not require making room for one too.
        queue.max_size = queue.max_size.max(settings.max_row);
    }
    let source = if is_queue {
        let advice = "a feed of kind = \"sqs\" takes messages from a queue, not from files: remove it";
        refuse_keys::<Directory>(section, advice);
        FeedSource::Queue(QueueFeed { settings: queue, recipient: settings.entry_recipient(section) })
    } else {
        let advice = "only kind = \"sqs\" has it: remove it, or say that messages come from a queue";
        refuse_keys::<FeedQueue>(section, advice);
        let format = settings.file_format(section, directory.delimiter);
        FeedSource::Directory(DirectoryFeed { settings: directory, format })
    };
    Feed { name: name.to_owned(), settings, conditions, source }
}

/// A file's text, or what is wrong with it.
fn read_text(path: &Path, bytes_max: u64) -> Result<String, String> {
    read_bounded(path, bytes_max).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => "it is not UTF-8".to_owned(),
        _ => error.to_string(),
    })
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
