//! One tree under one configuration.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use actix::{Actor as _, Addr};
use actix_rt::Arbiter;
use postrider_actors::{
    dispatcher::{self, Dispatcher, DispatcherSetup},
    flow::{Bell, Bells, Gate, Progress, WorkerSetup},
    model::{
        delay::{DelayPolicy, DepthStep},
        restart::RestartPolicy,
        retry::RetrySchedule,
        roster::RosterLimits,
    },
    ports::{Inbox, Intake, Table, Webhook},
    queue_feed::QueueFeedSettings,
    supervision::{Birth, ChildSpec, Shutdown, Strategy, Supervisor, SupervisorSettings},
    sweeper::{self, Sweeper, SweeperSetup},
    throttle::{self, LimitedGate, Throttle, ThrottleSetup},
    webhook_delivery::{self, DeliveryDestination, DeliverySetup, WebhookDelivery},
};
use secrecy::ExposeSecret as _;
use tokio::sync::oneshot;

use super::{
    LOOK, LOOKS_PER_LOG_REPORT, Machine, PATIENCE, StartError,
    feeds::{feed_specs, format, queue_feed_settings, queue_feed_specs, status_feed_settings},
    receipts::{ReceiptParts, receipt_specs},
    signals::{Signals, Told},
    status::StatusReporter,
    stores::Carried,
    tables::{table_spec, table_workers},
    tell,
    watch::Watch,
};
use crate::{
    cli::Exit,
    config::{self, Config, DelayMode, Resolved},
};
use postrider_files::{
    inbox::{DirectoryInbox, InboxConfig, UnpackCaps},
    status_changes::StatusChangeIntake,
};
use postrider_http::webhook::{HttpWebhook, WebhookSettings};
use postrider_net::listener::Serving;

/// Everything a tree is built from that may fail to be built.
pub(super) struct Parts {
    inboxes: Vec<(Arc<str>, Arc<dyn Inbox>)>,
    queue_feeds: Vec<(Arc<QueueFeedSettings>, Arc<dyn Intake>)>,
    webhooks: Vec<Arc<dyn Webhook>>,
    tables: Vec<Arc<dyn Table>>,
    receipts: ReceiptParts,
}

impl Parts {
    /// Makes the adapters of a configuration. Starts nothing.
    pub(super) async fn build(machine: &Machine, resolved: &Resolved) -> Result<Self, StartError> {
        let config = &resolved.config;
        let mut inboxes = Vec::new();
        for (feed, directory) in directories(config) {
            let inbox = DirectoryInbox::new(InboxConfig {
                feed: feed.name.clone(),
                directory: directory.path.clone(),
                state_dir: config.state.dir.clone(),
                format: format(&directory.format),
                max_row_bytes: feed.max_row,
                sidecar_required: directory.require_done,
                caps: UnpackCaps {
                    ratio_max: directory.decompress_max_ratio.into(),
                    bytes_max: directory.decompress_max,
                },
            })
            .map_err(|error| StartError::Feed {
                feed: feed.name.clone(),
                path: directory.path.clone(),
                error,
            })?;
            inboxes.push((Arc::from(feed.name.as_str()), Arc::new(inbox) as Arc<dyn Inbox>));
        }
        let mut queue_feeds = Vec::new();
        for (feed, intake) in intakes(machine, config).await? {
            queue_feeds.push((Arc::new(queue_feed_settings(resolved, feed.0, feed.1)), intake));
        }
        if let (Some(destination), Some(ledger)) = (&config.receipts.events_to, &machine.stores.rows) {
            let intake = StatusChangeIntake::new(ledger.clone(), machine.clock.clone());
            queue_feeds.push((Arc::new(status_feed_settings(resolved, destination)), Arc::new(intake) as _));
        }
        let mut webhooks = Vec::new();
        for (destination, webhook) in webhook_destinations(config) {
            let materials = &resolved.materials[&destination.name];
            let headers = materials.headers.iter();
            let webhook = HttpWebhook::new(WebhookSettings {
                url: (*webhook.url).clone(),
                headers: headers
                    .map(|(name, value)| (name.clone(), value.expose_secret().to_owned()))
                    .collect(),
                secrets: materials.secrets.clone(),
                concurrency: webhook.concurrency,
                timeout: webhook.timeout,
                connect_timeout: CONNECT_TIMEOUT.min(webhook.timeout),
                response_bytes_max: RESPONSE_BYTES_MAX,
                retry_after_max: destination.retry.max_retry_after,
                provider_id: webhook.provider_id.clone(),
                ca_file: webhook.ca_file.clone(),
            })
            .map_err(|problems| StartError::Destination {
                name: destination.name.clone(),
                problems: problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
            })?;
            webhooks.push(Arc::new(webhook) as Arc<dyn Webhook>);
        }
        let tables = tables(resolved).await?;
        let receipts = ReceiptParts::build(machine, resolved).await?;
        Ok(Self { inboxes, queue_feeds, webhooks, tables, receipts })
    }
}

/// The feeds that watch a directory, in the order of the configuration.
fn directories(config: &Config) -> impl Iterator<Item = (&config::Feed, &config::DirectoryFeed)> {
    config.feeds.iter().filter_map(|feed| Some((feed, feed.directory()?)))
}

/// The destinations that are webhooks, in the order of the configuration.
fn webhook_destinations(config: &Config) -> impl Iterator<Item = (&config::Destination, &config::Webhook)> {
    config.destinations.iter().filter_map(|destination| Some((destination, destination.webhook()?)))
}

/// Makes the tables of the configuration, in the order of [`table_destinations`]. Connects to nothing.
async fn tables(resolved: &Resolved) -> Result<Vec<Arc<dyn Table>>, StartError> {
    #[cfg(feature = "postgres")]
    return super::postgres::tables(resolved).await;
    #[cfg(not(feature = "postgres"))]
    {
        // The configuration was refused if it names any.
        let _ = resolved;
        Ok(Vec::new())
    }
}

/// A queue feed of the configuration and its queue.
type OpenIntake<'a> = ((&'a config::Feed, &'a config::QueueFeed), Arc<dyn Intake>);

/// The feeds that come from a queue, in the order of the configuration.
async fn intakes<'a>(machine: &Machine, config: &'a Config) -> Result<Vec<OpenIntake<'a>>, StartError> {
    let feeds = config.feeds.iter().filter_map(|feed| Some((feed, feed.queue()?)));
    #[cfg(feature = "aws")]
    return super::remote::open_intakes(machine, config, feeds).await;
    #[cfg(not(feature = "aws"))]
    {
        // The configuration was refused if it names any.
        let _ = (machine, feeds);
        Ok(Vec::new())
    }
}

/// Event loops that the actors are spread over. Their work is on the runtime's threads; more gained nothing in
/// measurements.
const ARBITERS: usize = 2;

/// When a child is restarted, and when its supervisor gives up: one more than five restarts within a minute, and the
/// process ends with an error, so that systemd starts it anew. The waits before them are below 3.1 s together, so a
/// crash loop always gets there.
const RESTARTS: RestartPolicy = RestartPolicy {
    max_restarts: 5,
    period: Duration::from_mins(1),
    base: Duration::from_millis(100),
    cap: Duration::from_secs(5),
};

/// Outcomes that are recorded in one group at most, and the longest that one waits for its group: each group costs a
/// sync.
const RECORD_GROUP: usize = 500;
const RECORD_LINGER: Duration = Duration::from_millis(50);

/// Until a connection to a webhook is open; a part of its timeout.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Bytes of an answer's body that are read before its connection is given up (design §10); the status counts all the
/// same.
const RESPONSE_BYTES_MAX: u64 = 64 << 10;

/// How far the depth must fall below a step before its delay ends, so that it does not flap, and how often it is read:
/// one call per reading.
const DELAY_HYSTERESIS_PERCENT: u32 = 10;
const DEPTH_READ_EVERY: Duration = Duration::from_secs(5);

/// How long requests with receipts may take to finish when the daemon drains.
const LAST_REQUESTS: Duration = Duration::from_secs(2);

/// Why a reign is over, or is to be.
pub(super) enum End {
    /// The tree gave up.
    Ended(Exit),
    /// The operator wants the daemon to stop.
    Stop,
    /// The operator wants the configuration to be read anew.
    Reload,
}

/// A running tree.
pub(super) struct Reign {
    root: Addr<Supervisor>,
    ended: oneshot::Receiver<i32>,
    arbiters: Vec<Arbiter>,
    /// Takes receipts over HTTP, if any are expected.
    serving: Option<Serving>,
    shutdown_timeout: Duration,
    status: StatusReporter,
}

impl Reign {
    /// Builds and starts the tree.
    pub(super) async fn start(machine: &Machine, resolved: &Resolved) -> Result<Self, StartError> {
        let parts = Parts::build(machine, resolved).await?;
        Ok(Self::start_with(machine, resolved, parts))
    }

    /// Starts the tree. Infallible: a reload has drained the old one by now.
    pub(super) fn start_with(machine: &Machine, resolved: &Resolved, mut parts: Parts) -> Self {
        let config = &resolved.config;
        // Rung when receipts are in the inbox.
        let arrived = Bell::default();
        let serving = parts.receipts.serve(machine, &arrived);
        let arbiters: Vec<_> = (0..ARBITERS)
            .map(|_| {
                let runtime = machine.runtime.clone();
                Arbiter::with_tokio_rt(move || runtime)
            })
            .collect();
        let settings = SupervisorSettings {
            restarts: RESTARTS,
            // Three ranks drain one after the other; delivery, in the middle, takes the longest.
            drain_timeout: config.shutdown.timeout * 7 / 10,
            arbiters: arbiters.iter().map(Arbiter::handle).collect(),
            clock: machine.clock.clone(),
            metrics: machine.metrics.stages.clone(),
        };
        let specs = tree(machine, resolved, parts, &arrived, &settings);
        let (ended_to, ended) = oneshot::channel();
        let root = Supervisor::root(specs, above(&settings), ended_to).start();
        Self {
            root,
            ended,
            arbiters,
            serving,
            shutdown_timeout: config.shutdown.timeout,
            status: StatusReporter::new(machine),
        }
    }

    /// Watches over the tree until it ends or the operator says something.
    pub(super) async fn until_signalled(
        &mut self,
        machine: &Machine,
        watch: &mut Watch,
        signals: &mut Signals,
    ) -> End {
        let mut look = tokio::time::interval(LOOK);
        let mut looks = 0u64;
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                code = &mut self.ended => return End::Ended(exit(&code)),
                told = signals.next() => return match told {
                    Told::Stop => End::Stop,
                    Told::Reload => End::Reload,
                },
                _ = look.tick() => {
                    looks += 1;
                    if looks.is_multiple_of(LOOKS_PER_LOG_REPORT) {
                        machine.telemetry.report_suppressed();
                    }
                    let stuck = machine.health.stuck();
                    if !stuck.is_empty() {
                        tracing::error!(actors = ?stuck, patience_s = PATIENCE.as_secs(), "actors give no sign of life");
                    }
                    tell(machine.systemd.beat(stuck.is_empty()).map(drop));
                    watch.look().await;
                    if let Some(line) = self.status.line().await {
                        tell(machine.systemd.status(&line));
                    }
                }
            }
        }
    }

    /// Ends the tree in order, within the shutdown timeout; a second signal ends the process at once.
    pub(super) async fn drain(mut self, signals: &mut Signals) -> Exit {
        tracing::info!(timeout_ms = self.shutdown_timeout.as_millis() as u64, "draining");
        if let Some(serving) = self.serving.take()
            && !serving.stop(LAST_REQUESTS).await
        {
            tracing::warn!("requests with receipts were cut off; their senders send them again");
        }
        if self.root.send(Shutdown { code: 0 }).await.is_err() {
            tracing::error!("the root supervisor is gone");
            return Exit::Software;
        }
        let deadline = tokio::time::sleep(self.shutdown_timeout);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                code = &mut self.ended => {
                    for arbiter in &self.arbiters {
                        arbiter.stop();
                    }
                    let exit = exit(&code);
                    tracing::info!(?exit, "drained");
                    return exit;
                }
                () = &mut deadline => {
                    tracing::error!("the drain took longer than shutdown.timeout; what is in flight is resent later");
                    return Exit::Software;
                }
                told = signals.next() => if told == Told::Stop {
                    tracing::warn!("told to stop a second time: stopping at once");
                    return Exit::Failed;
                }
            }
        }
    }
}

/// A tree that did not end in order has used its restarts up.
fn exit(code: &Result<i32, oneshot::error::RecvError>) -> Exit {
    if *code == Ok(0) { Exit::Done } else { Exit::Software }
}

/// Settings of a supervisor of supervisors. A child of it that fails has used its restarts up, and starting
/// it over would grant them again at each level: with three levels 216 failures instead of 6.
fn above(settings: &SupervisorSettings) -> SupervisorSettings {
    let mut settings = settings.clone();
    settings.restarts.max_restarts = 0;
    settings
}

/// `root → store, delivery, feeds, receipts`. Ranks drain from the highest: feeds first, then delivery.
fn tree(
    machine: &Machine,
    resolved: &Resolved,
    parts: Parts,
    arrived: &Bell,
    settings: &SupervisorSettings,
) -> Vec<ChildSpec> {
    let config = &resolved.config;
    // The bells of delivery workers, then those of the workers that write into tables.
    let workers = config.pools.deliveries + table_workers(config);
    let queued: Vec<_> = (0..workers).map(|_| Bell::default()).collect();
    let ring = Bells::from(queued.clone());
    machine.stores.queue.on_arrival(Arc::new(move || ring.ring()));
    // Workers lease what is due, unless a queue carries it to them: then the dispatcher has to send it first.
    let to_dispatch = Bell::default();
    let (appended, due_again) = if machine.stores.carried.is_some() {
        let bells = Bells::from(vec![to_dispatch.clone()]);
        (bells.clone(), bells)
    } else {
        (Bells::from(queued.clone()), Bells::default())
    };
    let queue_feeds = parts.queue_feeds.iter().map(|(feed, _)| feed.name.clone()).collect();
    let store = vec![sweeper_spec(
        machine,
        parts.inboxes.clone(),
        queue_feeds,
        queued.clone(),
        config.outbox.retention,
    )];
    let mut delivery = delivery_specs(machine, config, parts.webhooks, &parts.tables, &due_again, &queued);
    delivery.extend(dispatcher_spec(machine, config, to_dispatch, queued));
    let feed = |name, specs: Vec<ChildSpec>| {
        Supervisor::nested("feed", Some(name), 0, Strategy::OneForAll, settings.clone(), move || {
            specs.clone()
        })
    };
    let of_directories =
        directories(config).zip(parts.inboxes).map(|((settings, directory), (name, inbox))| {
            feed(name, feed_specs(machine, resolved, settings, directory, inbox, &appended))
        });
    let of_queues = parts.queue_feeds.into_iter().map(|(settings, intake)| {
        feed(settings.name.clone(), queue_feed_specs(machine, settings, intake, &appended))
    });
    let feeds = of_directories.chain(of_queues).collect();
    let nested = |name, rank, settings, specs: Vec<ChildSpec>| {
        Supervisor::nested(name, None, rank, Strategy::OneForOne, settings, move || specs.clone())
    };
    let receipts = receipt_specs(machine, config, parts.receipts.into_pulled(), arrived);
    let mut specs = vec![
        nested("store", 0, settings.clone(), store),
        nested("delivery", 1, settings.clone(), delivery),
        nested("feeds", 2, above(settings), feeds),
    ];
    if !receipts.is_empty() {
        // They wait for nothing that others do, and others don't wait for them.
        specs.push(nested("receipts", 2, settings.clone(), receipts));
    }
    specs
}

/// A sign of life for the child that is being born.
pub(super) fn mark(machine: &Machine) -> impl Fn(&Birth) -> Progress + Send + Sync + Clone + use<> {
    let (board, clock) = (machine.board.clone(), machine.clock.clone());
    move |birth| board.mark(birth.id.to_string(), clock.mono())
}

fn sweeper_spec(
    machine: &Machine,
    inboxes: Vec<(Arc<str>, Arc<dyn Inbox>)>,
    queue_feeds: Vec<Arc<str>>,
    queued: Vec<Bell>,
    retention: Option<Duration>,
) -> ChildSpec {
    let (stores, clock, mark) = (machine.stores.clone(), machine.clock.clone(), mark(machine));
    let leases_lost = machine.metrics.stages.leases_lost();
    // A retention of zero: nothing is archived, but what is remembered of inbound entries still ends.
    let archive = Some((stores.archive.clone(), retention.unwrap_or_default()));
    let factory = move |birth: Birth| {
        let setup = SweeperSetup {
            queue: stores.queue.clone(),
            ledger: stores.ledger.clone(),
            inboxes: inboxes.clone(),
            queue_feeds: queue_feeds.clone(),
            archive: archive.clone(),
            clock: clock.clone(),
            queued: queued.clone(),
            leases_lost: leases_lost.clone(),
            progress: mark(&birth),
        };
        let fault = birth.fault.clone();
        birth.start(sweeper::MAILBOX, move |_| Sweeper::new(setup, fault)).recipient()
    };
    ChildSpec { name: "sweeper", of: None, count: 1, factory: Arc::new(factory), rank: 0 }
}

fn delivery_specs(
    machine: &Machine,
    config: &Config,
    webhooks: Vec<Arc<dyn Webhook>>,
    tables: &[Arc<dyn Table>],
    due_again: &Bells,
    queued: &[Bell],
) -> Vec<ChildSpec> {
    let mut gates = Vec::new();
    let mut gate = |name: &str, rate: Option<config::Rate>| {
        let rate = rate?;
        let (rate_per_s, burst) = (NonZeroU32::new(rate.per_s)?, NonZeroU32::new(rate.burst)?);
        let granted = machine.metrics.stages.gate(name, rate.per_s);
        let limited = LimitedGate { name: name.into(), gate: Gate::default(), rate_per_s, burst, granted };
        gates.push(limited.clone());
        Some(limited.gate)
    };
    let all = gate(throttle::ALL, config.delivery.rate());
    let destinations: Vec<_> = webhook_destinations(config)
        .zip(webhooks)
        .map(|((destination, settings), webhook)| DeliveryDestination {
            name: destination.name.as_str().into(),
            webhook,
            concurrency: settings.concurrency,
            gate: gate(&destination.name, destination.rate()),
            retry: schedule(&destination.retry),
            paused: destination.paused,
            recorded: config.is_recorded(&destination.name),
            metrics: machine.metrics.stages.destination(&destination.name),
        })
        .collect();
    let workers = config.pools.deliveries;
    let setups: Vec<_> = (0..workers)
        .map(|worker| {
            let share_of_each = |(index, destination): (usize, &DeliveryDestination)| DeliveryDestination {
                concurrency: share(destination.concurrency, worker + index, workers),
                ..destination.clone()
            };
            let limits = RosterLimits {
                concurrency: share(config.delivery.concurrency, worker, workers).max(1),
                unrecorded: share(config.record.max_unrecorded, worker, workers).max(1),
            };
            (destinations.iter().enumerate().map(share_of_each).collect::<Vec<_>>(), limits)
        })
        .collect();
    let (webhook_bells, table_bells) = queued.split_at(workers);
    let (tables, statement_gates) = table_spec(machine, config, tables, due_again, table_bells.to_vec());
    gates.extend(statement_gates);
    let mut specs = vec![
        throttle_spec(machine, gates),
        worker_spec(machine, config, setups, all, due_again, webhook_bells),
    ];
    specs.extend(tables);
    specs
}

/// A worker's share of `total` permits: what is left over goes to the first ones. Rotated by the caller,
/// so that destinations with a single permit don't all hang on one worker.
pub(super) fn share(total: usize, worker: usize, workers: usize) -> usize {
    total / workers + usize::from(worker % workers < total % workers)
}

fn throttle_spec(machine: &Machine, gates: Vec<LimitedGate>) -> ChildSpec {
    let (clock, mark) = (machine.clock.clone(), mark(machine));
    let shares = machine.stores.carried.as_ref().map(|carried| carried.shares.clone());
    let factory = move |birth: Birth| {
        let setup = ThrottleSetup {
            gates: gates.clone(),
            clock: clock.clone(),
            progress: mark(&birth),
            shares: shares.clone(),
        };
        let generation = birth.id.generation;
        birth.start(throttle::MAILBOX, move |_| Throttle::new(setup, generation)).recipient()
    };
    ChildSpec { name: "throttle", of: None, count: 1, factory: Arc::new(factory), rank: 0 }
}

/// What the worker that is being born has in common with every other, given its own bell.
pub(super) fn worker(
    machine: &Machine,
    config: &Config,
    due_again: &Bells,
) -> impl Fn(&Birth, &Bell) -> WorkerSetup + Send + Sync + Clone + use<> {
    let (stores, clock, mark) = (machine.stores.clone(), machine.clock.clone(), mark(machine));
    let (due_again, lease) = (due_again.clone(), config.lease.duration);
    let born = machine.born;
    move |birth, queued| WorkerSetup {
        born,
        queue: stores.queue.clone(),
        ledger: stores.ledger.clone(),
        clock: clock.clone(),
        queued: queued.clone(),
        due_again: due_again.clone(),
        lease,
        progress: mark(birth),
    }
}

/// The names under which a worker leases in this life, and did in its last one.
pub(super) fn holders(birth: &Birth) -> (String, Option<String>) {
    let mut last = birth.id.clone();
    last.generation -= 1;
    (birth.id.to_string(), (last.generation > 0).then(|| last.to_string()))
}

fn worker_spec(
    machine: &Machine,
    config: &Config,
    shares: Vec<(Vec<DeliveryDestination>, RosterLimits)>,
    gate: Option<Gate>,
    due_again: &Bells,
    queued: &[Bell],
) -> ChildSpec {
    let (worker, queued) = (worker(machine, config, due_again), queued.to_vec());
    let (in_flight, alone) = (machine.in_flight.clone(), machine.alone.clone());
    let count = shares.len();
    let record_group = RECORD_GROUP.min(config.record.max_unrecorded);
    let factory = move |birth: Birth| {
        let slot = birth.id.slot;
        let (destinations, limits) = shares[slot].clone();
        let setup = DeliverySetup {
            destinations,
            worker: worker(&birth, &queued[slot]),
            limits,
            in_flight: in_flight.clone(),
            alone: alone.clone(),
            record_group,
            record_linger: RECORD_LINGER,
            gate: gate.clone(),
        };
        let (holder, predecessor) = holders(&birth);
        let fault = birth.fault.clone();
        birth
            .start(webhook_delivery::MAILBOX, move |_| {
                WebhookDelivery::new(setup, &holder, predecessor, fault)
            })
            .recipient()
    };
    ChildSpec { name: "webhook_delivery", of: None, count, factory: Arc::new(factory), rank: 1 }
}

/// How the queue holds back what is dispatched (S2.3, S2.6).
fn delay_policy(config: &Config) -> DelayPolicy {
    let delay = &config.delay;
    match delay.mode {
        DelayMode::None => DelayPolicy::None,
        DelayMode::Fixed => DelayPolicy::Fixed(delay.fixed),
        DelayMode::ByDepth => DelayPolicy::ByDepth {
            steps: delay.steps.iter().map(|&(above, delay)| DepthStep { above, delay }).collect(),
            hysteresis_percent: DELAY_HYSTERESIS_PERCENT,
            read_every: DEPTH_READ_EVERY,
        },
    }
}

/// A destination's schedule for its stage.
pub(super) fn schedule(retry: &config::Retry) -> RetrySchedule {
    RetrySchedule {
        max_attempts: retry.max_attempts,
        max_age: retry.max_age,
        base: retry.base,
        cap: retry.cap,
    }
}

/// Sends due batches to the queue that carries them, if one does.
fn dispatcher_spec(
    machine: &Machine,
    config: &Config,
    appended: Bell,
    queued: Vec<Bell>,
) -> Option<ChildSpec> {
    let Carried { source, target, .. } = machine.stores.carried.clone()?;
    let (ledger, clock, mark) = (machine.stores.ledger.clone(), machine.clock.clone(), mark(machine));
    let paused = config.destinations.iter().filter(|destination| destination.paused);
    let paused: Vec<Arc<str>> = paused.map(|destination| destination.name.as_str().into()).collect();
    let delay = delay_policy(config);
    let metrics = machine.metrics.stages.queue();
    let factory = move |birth: Birth| {
        let setup = DispatcherSetup {
            source: source.clone(),
            target: target.clone(),
            ledger: ledger.clone(),
            paused: paused.clone(),
            delay: delay.clone(),
            clock: clock.clone(),
            appended: appended.clone(),
            queued: queued.clone(),
            metrics: metrics.clone(),
            progress: mark(&birth),
        };
        let fault = birth.fault.clone();
        birth.start(dispatcher::MAILBOX, move |_| Dispatcher::new(setup, fault)).recipient()
    };
    Some(ChildSpec { name: "dispatcher", of: None, count: 1, factory: Arc::new(factory), rank: 2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_loop_reaches_the_end_of_its_restarts() {
        assert!(RESTARTS.is_consistent());
    }
}
