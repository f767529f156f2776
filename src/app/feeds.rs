//! The actors of one feed: what takes a directory's files, or a queue's entries, to the outbox.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use postrider_actors::{
    batcher::{Batcher, BatcherSetup},
    file_watcher::{FileWatcher, FileWatcherSetup},
    flow::{Bells, FeedNotes, Speaker},
    messages::{FileClaimed, Inlet, ParsedRows},
    model::{builder::BatchLimits, conditions::Conditions, priority::Priority, table::MAPPING_TYPE},
    parser::{Parser, ParserSetup},
    ports::{Inbox, Intake},
    queue_feed::{QueueFeed, QueueFeedSettings, QueueFeedSetup},
    reading::{FeedDestination, FeedSettings, Readers},
    supervision::{ChildSpec, Stage as _},
};
use postrider_files::{
    inbox::{DirectoryInbox, InboxConfig},
    status_changes::StatusChangeIntake,
};
use postrider_settings::Keys as _;
use tokio::sync::Semaphore;

use super::{error::StartError, machine::Machine};
use crate::config::{self, FeedQueue, Resolved, STATUS_FEED, Target};

/// Blocks of rows between a feed's parsers and the outbox: one is parsed while others wait for a sync.
const BLOCKS_PER_FEED: usize = 4;

/// Long polls of an inbound queue that are open at the same time, and how long each waits: the most that SQS allows.
#[cfg(feature = "aws")]
const QUEUE_POLLERS: usize = 2;
#[cfg(feature = "aws")]
const QUEUE_WAIT: Duration = Duration::from_secs(20);

/// Rows that one entry of an inbound queue may have. Each takes memory of its own, and an entry of 1 MiB, the
/// most that SQS carries, could have half a million.
#[cfg(feature = "aws")]
const ENTRY_ROWS_MAX: usize = 10_000;

/// The feeds of a configuration.
#[derive(Default)]
pub(super) struct Feeds {
    directories: Vec<DirectoryFeed>,
    queues: Vec<(Arc<QueueFeedSettings>, Arc<dyn Intake>)>,
}

/// A feed that watches a directory.
struct DirectoryFeed {
    settings: Arc<FeedSettings>,
    inbox: Arc<dyn Inbox>,
    parsers: usize,
}

impl Feeds {
    /// Opens queues. Directories are opened by who watches them: one that can't be used parks its feed.
    pub(super) async fn build(machine: &Machine, resolved: &Resolved) -> Result<Self, StartError> {
        let config = &resolved.config;
        let mut feeds = Self::default();
        for feed in &config.feeds {
            if let Some(directory) = feed.directory() {
                feeds.directories.push(DirectoryFeed::new(resolved, feed, directory));
            }
        }
        #[cfg(feature = "aws")]
        for (feed, queue, intake) in super::remote::open_intakes(machine, config).await? {
            feeds.queues.push((Arc::new(queue_feed_settings(resolved, feed, queue)), intake));
        }
        if let (Some(destination), Some(ledger)) = (&config.receipts.events_to, &machine.stores.rows) {
            let intake = StatusChangeIntake::new(ledger.clone(), machine.clock.clone());
            feeds.queues.push((Arc::new(status_feed_settings(resolved, destination)), Arc::new(intake)));
        }
        Ok(feeds)
    }

    /// The directories that files are claimed from, for who writes their last reports.
    pub(super) fn inboxes(&self, machine: &Machine) -> Vec<(FeedNotes, Arc<dyn Inbox>)> {
        let notes = |name: &Arc<str>| machine.troubles.of(name.clone(), Speaker::Sweeper);
        self.directories.iter().map(|feed| (notes(&feed.settings.name), feed.inbox.clone())).collect()
    }

    /// The names of the feeds that come from a queue.
    pub(super) fn queue_feeds(&self) -> Vec<Arc<str>> {
        self.queues.iter().map(|(settings, _)| settings.name.clone()).collect()
    }

    /// The stages of each feed, by its name.
    pub(super) fn specs(self, machine: &Arc<Machine>) -> Vec<(Arc<str>, Vec<ChildSpec>)> {
        let appended = &machine.appended();
        let of_directories = self
            .directories
            .into_iter()
            .map(|feed| (feed.settings.name.clone(), feed.specs(machine, appended)));
        let of_queues = self.queues.into_iter().map(|(settings, intake)| {
            (settings.name.clone(), vec![queue_feed(machine, settings, intake, appended)])
        });
        of_directories.chain(of_queues).collect()
    }
}

/// What one generation of a feed hands from the batcher up to the watcher, as they are born in turn.
#[derive(Default)]
struct Wiring {
    batcher: Option<Inlet<ParsedRows>>,
    parsers: Vec<Inlet<FileClaimed>>,
    readers: Readers,
    blocks: Option<Arc<Semaphore>>,
}

impl DirectoryFeed {
    fn new(resolved: &Resolved, feed: &config::Feed, directory: &config::DirectoryFeed) -> Self {
        let config = &resolved.config;
        let inbox = DirectoryInbox::new(InboxConfig {
            feed: feed.name.clone(),
            settings: directory.settings.clone(),
            state_dir: config.state.dir.clone(),
            format: directory.format.clone(),
            max_row: feed.max_row,
            conditions: feed.conditions.clone(),
        });
        Self {
            settings: Arc::new(feed_settings(resolved, feed, directory)),
            inbox: Arc::new(inbox),
            parsers: config.pools.parsers,
        }
    }

    /// Batcher, parsers and watcher, which are born in this order, as one generation.
    fn specs(self, machine: &Arc<Machine>, appended: &Bells) -> Vec<ChildSpec> {
        let Self { settings, inbox, parsers } = self;
        let wiring: Arc<Mutex<Wiring>> = Arc::default();
        let lock = |wiring: &Arc<Mutex<Wiring>>| {
            let wiring = wiring.clone();
            move |change: &mut dyn FnMut(&mut Wiring)| {
                change(&mut wiring.lock().unwrap_or_else(PoisonError::into_inner));
            }
        };
        let metrics = machine.metrics.stages.feed(&settings.name);
        let batcher = {
            let (machine, settings, appended) = (machine.clone(), settings.clone(), appended.clone());
            let wire = lock(&wiring);
            ChildSpec::wired::<Batcher>(
                0,
                move |id| BatcherSetup {
                    feed: settings.clone(),
                    outbox: machine.stores.outbox.clone(),
                    clock: machine.clock.clone(),
                    appended: appended.clone(),
                    metrics: metrics.clone(),
                    progress: machine.mark(id),
                },
                // The first of a new generation: nothing of the old one is left.
                move |address, meter| {
                    wire(&mut |wiring| {
                        *wiring = Wiring {
                            batcher: Some(Inlet::new(
                                address.clone().recipient(),
                                Batcher::MAILBOX,
                                meter.clone(),
                            )),
                            blocks: Some(Arc::new(Semaphore::new(BLOCKS_PER_FEED))),
                            ..Wiring::default()
                        };
                    });
                },
            )
        };
        let parser = {
            let (machine, settings, inbox) = (machine.clone(), settings.clone(), inbox.clone());
            let (of_batcher, wire) = (wiring.clone(), lock(&wiring));
            ChildSpec::wired::<Parser>(
                1,
                move |id| {
                    let wiring = of_batcher.lock().unwrap_or_else(PoisonError::into_inner);
                    ParserSetup {
                        feed: settings.clone(),
                        inbox: inbox.clone(),
                        outbox: machine.stores.outbox.clone(),
                        ledger: machine.stores.ledger.clone(),
                        clock: machine.clock.clone(),
                        batcher: wiring.batcher.clone().expect("the batcher is born before the parsers"),
                        blocks: wiring.blocks.clone().expect("the batcher is born before the parsers"),
                        readers: wiring.readers.clone(),
                        held: machine.held.clone(),
                        progress: machine.mark(id),
                    }
                },
                move |address, meter| {
                    let recipient = address.clone().recipient();
                    let inlet = Inlet::new(recipient, Parser::MAILBOX, meter.clone());
                    wire(&mut |wiring| wiring.parsers.push(inlet.clone()));
                },
            )
        };
        let watcher = {
            let machine = machine.clone();
            ChildSpec::stage::<FileWatcher>(2, move |_| FileWatcherSetup {
                feed: settings.name.clone(),
                inbox: inbox.clone(),
                ledger: machine.stores.ledger.clone(),
                clock: machine.clock.clone(),
                parsers: wiring.lock().unwrap_or_else(PoisonError::into_inner).parsers.clone(),
                directory: settings.directory.clone(),
                notes: machine.troubles.of(settings.name.clone(), Speaker::Watcher),
            })
        };
        vec![batcher, parser.times(parsers), watcher]
    }
}

/// The one stage of a feed that reads a queue.
fn queue_feed(
    machine: &Arc<Machine>,
    feed: Arc<QueueFeedSettings>,
    intake: Arc<dyn Intake>,
    appended: &Bells,
) -> ChildSpec {
    let (machine, appended) = (machine.clone(), appended.clone());
    let metrics = machine.metrics.stages.feed(&feed.name);
    ChildSpec::stage::<QueueFeed>(0, move |id| QueueFeedSetup {
        feed: feed.clone(),
        intake: intake.clone(),
        outbox: machine.stores.outbox.clone(),
        ledger: machine.stores.ledger.clone(),
        clock: machine.clock.clone(),
        appended: appended.clone(),
        metrics: metrics.clone(),
        held: machine.held.clone(),
        progress: machine.mark(id),
    })
}

/// A feed that reads a queue, for its stage.
#[cfg(feature = "aws")]
fn queue_feed_settings(
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
        conditions: feed.conditions.clone(),
        priority: feed.priority,
        batch: BatchLimits::new(&config.batch, feed.max_row),
        queue: queue.settings.clone(),
        pollers: QUEUE_POLLERS,
        wait: QUEUE_WAIT,
        backlog: config.outbox.clone(),
    }
}

/// The feed that reports changes of state to `destination`.
fn status_feed_settings(resolved: &Resolved, destination: &str) -> QueueFeedSettings {
    let config = &resolved.config;
    QueueFeedSettings {
        name: STATUS_FEED.into(),
        // An id, not a recipient: the receiver of changes knows the recipient by the message.
        recipient: "message_id".into(),
        max_row_bytes: STATUS_BYTES_MAX,
        max_entry_rows: 1,
        destinations: feed_destinations(resolved, &[destination.to_owned()]),
        conditions: Conditions::default(),
        priority: Priority::Normal,
        batch: BatchLimits::new(&config.batch, STATUS_BYTES_MAX),
        queue: FeedQueue { max_rows: config.batch.max_messages as usize, ..FeedQueue::declared() },
        pollers: 1,
        wait: STATUS_WAIT,
        backlog: config.outbox.clone(),
    }
}

/// A change is a handful of ids and words.
const STATUS_BYTES_MAX: usize = 4 << 10;

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

/// What the stages of a feed that watches a directory are given about it.
pub(super) fn feed_settings(
    resolved: &Resolved,
    feed: &config::Feed,
    directory: &config::DirectoryFeed,
) -> FeedSettings {
    let config = &resolved.config;
    FeedSettings {
        name: feed.name.as_str().into(),
        settings: feed.settings.clone(),
        directory: directory.settings.clone(),
        format: directory.format.clone(),
        destinations: feed_destinations(resolved, &feed.destinations),
        conditions: feed.conditions.clone(),
        batch: BatchLimits::new(&config.batch, feed.max_row),
        canary: config.canary.clone(),
        backlog: config.outbox.clone(),
    }
}
