//! The actors of one feed: what takes a directory's files, or a queue's entries, to the outbox.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use actix::Recipient;
use postrider_actors::{
    batcher::{self, Batcher, BatcherSetup},
    file_watcher::{self, FileWatcher, FileWatcherSetup},
    flow::Bells,
    messages::{FileClaimed, ParsedRows},
    model::{
        builder::BatchLimits, formats::Format, intake::AccumulatorLimits, stable::StableRule,
        table::MAPPING_TYPE,
    },
    parser::{self, Parser, ParserSetup},
    ports::{Inbox, Intake},
    queue_feed::{self, QueueFeed, QueueFeedSettings, QueueFeedSetup},
    reading::{Duplicates, FeedDestination, FeedSettings, Readers},
    supervision::{Birth, ChildSpec},
};
use tokio::sync::Semaphore;

use super::{Machine, reign::mark};
use crate::config::{self, BATCH_BYTES, Config, Resolved, STATUS_FEED, Target};

/// Blocks of rows between a feed's parsers and the outbox: one is parsed while others wait for a sync.
const BLOCKS_PER_FEED: usize = 4;

/// The longest that a row waits for others to fill its batch. Files fill batches as fast as they are read: only their
/// last one waits.
const BATCH_LINGER: Duration = Duration::from_millis(50);

/// Long polls of an inbound queue that are open at the same time, and how long each waits: the most that SQS allows.
const QUEUE_POLLERS: usize = 2;
const QUEUE_WAIT: Duration = Duration::from_secs(20);

/// Open messages at which intake continues: a gap that is wide enough for it not to flap.
fn low_watermark(config: &Config) -> u64 {
    config.outbox.high_watermark / 4 * 3
}

/// Rows that one entry of an inbound queue may have. Each takes memory of its own, and an entry of 1 MiB, the
/// most that SQS carries, could have half a million.
const ENTRY_ROWS_MAX: usize = 10_000;

/// What one generation of a feed hands from the batcher up to the watcher, as they are born in turn.
#[derive(Default)]
struct Wiring {
    batcher: Option<Recipient<ParsedRows>>,
    parsers: Vec<Recipient<FileClaimed>>,
    readers: Readers,
    blocks: Option<Arc<Semaphore>>,
}

pub(super) fn feed_specs(
    machine: &Machine,
    resolved: &Resolved,
    feed: &config::Feed,
    directory: &config::DirectoryFeed,
    inbox: Arc<dyn Inbox>,
    appended: &Bells,
) -> Vec<ChildSpec> {
    let config = &resolved.config;
    let settings = Arc::new(feed_settings(resolved, feed, directory));
    let wiring: Arc<Mutex<Wiring>> = Arc::default();
    let (stores, clock, mark) = (machine.stores.clone(), machine.clock.clone(), mark(machine));

    let batcher = {
        let (wiring, settings, stores) = (wiring.clone(), settings.clone(), stores.clone());
        let (clock, mark, appended) = (clock.clone(), mark.clone(), appended.clone());
        let metrics = machine.metrics.stages.feed(&feed.name);
        move |birth: Birth| {
            let setup = BatcherSetup {
                feed: settings.clone(),
                outbox: stores.outbox.clone(),
                clock: clock.clone(),
                appended: appended.clone(),
                metrics: metrics.clone(),
                progress: mark(&birth),
            };
            let fault = birth.fault.clone();
            let address = birth.start(batcher::MAILBOX, move |_| Batcher::new(setup, fault));
            // The first of a new generation: nothing of the old one is left.
            *wiring.lock().unwrap_or_else(PoisonError::into_inner) = Wiring {
                batcher: Some(address.clone().recipient()),
                blocks: Some(Arc::new(Semaphore::new(BLOCKS_PER_FEED))),
                ..Wiring::default()
            };
            address.recipient()
        }
    };
    let parser = {
        let (wiring, settings, stores) = (wiring.clone(), settings, stores.clone());
        let (clock, mark, inbox) = (clock.clone(), mark.clone(), inbox.clone());
        move |birth: Birth| {
            let mut wiring = wiring.lock().unwrap_or_else(PoisonError::into_inner);
            let setup = ParserSetup {
                feed: settings.clone(),
                inbox: inbox.clone(),
                outbox: stores.outbox.clone(),
                ledger: stores.ledger.clone(),
                clock: clock.clone(),
                batcher: wiring.batcher.clone().expect("the batcher is born before the parsers"),
                blocks: wiring.blocks.clone().expect("the batcher is born before the parsers"),
                readers: wiring.readers.clone(),
                progress: mark(&birth),
            };
            let fault = birth.fault.clone();
            let address = birth.start(parser::MAILBOX, move |_| Parser::new(setup, fault));
            wiring.parsers.push(address.clone().recipient());
            address.recipient()
        }
    };
    let watcher = {
        let name: Arc<str> = feed.name.as_str().into();
        let rule =
            StableRule { stable_after: directory.stable_after, sidecar_required: directory.require_done };
        let rescan = directory.rescan;
        move |birth: Birth| {
            let setup = FileWatcherSetup {
                feed: name.clone(),
                inbox: inbox.clone(),
                ledger: stores.ledger.clone(),
                clock: clock.clone(),
                parsers: wiring.lock().unwrap_or_else(PoisonError::into_inner).parsers.clone(),
                rule,
                rescan,
                progress: mark(&birth),
            };
            let fault = birth.fault.clone();
            birth.start(file_watcher::MAILBOX, move |_| FileWatcher::new(setup, fault)).recipient()
        }
    };
    vec![
        ChildSpec { name: "batcher", of: None, count: 1, factory: Arc::new(batcher), rank: 0 },
        ChildSpec {
            name: "parser",
            of: None,
            count: config.pools.parsers,
            factory: Arc::new(parser),
            rank: 1,
        },
        ChildSpec { name: "file_watcher", of: None, count: 1, factory: Arc::new(watcher), rank: 2 },
    ]
}

pub(super) fn queue_feed_settings(
    resolved: &Resolved,
    feed: &config::Feed,
    queue: &config::QueueFeed,
) -> QueueFeedSettings {
    let config = &resolved.config;
    QueueFeedSettings {
        name: feed.name.as_str().into(),
        recipient: queue.recipient.clone(),
        max_row_bytes: feed.max_row,
        max_entry_rows: ENTRY_ROWS_MAX,
        destinations: feed_destinations(resolved, &feed.destinations),
        batch: BatchLimits { max_messages: config.batch.max_messages, max_bytes: feed.batch_bytes() },
        accumulate: AccumulatorLimits {
            rows: queue.max_rows,
            bytes: queue.max_size,
            // Entries without rows must not pile up either.
            entries: queue.max_rows,
            linger: queue.linger,
        },
        pollers: QUEUE_POLLERS,
        wait: QUEUE_WAIT,
        high_watermark: config.outbox.high_watermark,
        low_watermark: low_watermark(config),
    }
}

/// The one stage of a feed that reads a queue.
pub(super) fn queue_feed_specs(
    machine: &Machine,
    feed: Arc<QueueFeedSettings>,
    intake: Arc<dyn Intake>,
    appended: &Bells,
) -> Vec<ChildSpec> {
    let (stores, clock, mark) = (machine.stores.clone(), machine.clock.clone(), mark(machine));
    let (appended, metrics) = (appended.clone(), machine.metrics.stages.feed(&feed.name));
    let factory = move |birth: Birth| {
        let setup = QueueFeedSetup {
            feed: feed.clone(),
            intake: intake.clone(),
            outbox: stores.outbox.clone(),
            ledger: stores.ledger.clone(),
            clock: clock.clone(),
            appended: appended.clone(),
            metrics: metrics.clone(),
            progress: mark(&birth),
        };
        let fault = birth.fault.clone();
        birth.start(queue_feed::MAILBOX, move |_| QueueFeed::new(setup, fault)).recipient()
    };
    vec![ChildSpec { name: "queue_feed", of: None, count: 1, factory: Arc::new(factory), rank: 0 }]
}

/// The feed that reports changes of state to `destination`.
pub(super) fn status_feed_settings(resolved: &Resolved, destination: &str) -> QueueFeedSettings {
    let config = &resolved.config;
    QueueFeedSettings {
        name: STATUS_FEED.into(),
        // An id, not a recipient: the receiver of changes knows the recipient by the message.
        recipient: "message_id".into(),
        max_row_bytes: STATUS_BYTES_MAX,
        max_entry_rows: 1,
        destinations: feed_destinations(resolved, &[destination.to_owned()]),
        batch: BatchLimits { max_messages: config.batch.max_messages, max_bytes: BATCH_BYTES },
        accumulate: AccumulatorLimits {
            rows: config.batch.max_messages as usize,
            bytes: BATCH_BYTES,
            entries: config.batch.max_messages as usize,
            linger: STATUS_LINGER,
        },
        pollers: 1,
        wait: STATUS_WAIT,
        high_watermark: config.outbox.high_watermark,
        low_watermark: low_watermark(config),
    }
}

/// A change is a handful of ids and words.
const STATUS_BYTES_MAX: usize = 4 << 10;

/// The longest that a change waits for others.
const STATUS_LINGER: Duration = Duration::from_millis(500);

/// How long a poll for changes waits for one.
const STATUS_WAIT: Duration = Duration::from_secs(1);

/// A feed's destinations, with what their batches carry along.
fn feed_destinations(resolved: &Resolved, names: &[String]) -> Vec<FeedDestination> {
    let destination = |name: &String| {
        let destination = resolved.config.destination(name);
        let (template, content_type) =
            match &destination.expect("the config was checked: a feed's destinations exist").target {
                Target::Webhook(webhook) => {
                    (resolved.materials[name].template.clone(), webhook.content_type.clone())
                }
                Target::Table(table) => (Some(table.mapping.to_template()), MAPPING_TYPE.to_owned()),
            };
        FeedDestination { name: name.as_str().into(), template, content_type }
    };
    names.iter().map(destination).collect()
}

fn feed_settings(
    resolved: &Resolved,
    feed: &config::Feed,
    directory: &config::DirectoryFeed,
) -> FeedSettings {
    let config = &resolved.config;
    FeedSettings {
        name: feed.name.as_str().into(),
        format: format(&directory.format),
        max_row_bytes: feed.max_row,
        duplicates: match directory.duplicates {
            config::Duplicates::Keep => Duplicates::Keep,
            config::Duplicates::First => Duplicates::First,
        },
        destinations: feed_destinations(resolved, &feed.destinations),
        batch: BatchLimits { max_messages: config.batch.max_messages, max_bytes: feed.batch_bytes() },
        linger: BATCH_LINGER,
        high_watermark: config.outbox.high_watermark,
        low_watermark: low_watermark(config),
    }
}

pub(super) fn format(format: &config::FeedFormat) -> Format {
    match format.clone() {
        config::FeedFormat::Text => Format::Text,
        config::FeedFormat::Csv { delimiter, recipient } => Format::Csv { delimiter, recipient },
        config::FeedFormat::Ndjson { recipient } => Format::Ndjson { recipient },
    }
}
