//! One generation: the actors of one configuration, from their start to the end of their drain.

use std::{sync::Arc, time::Duration};

use actix::{Actor as _, Addr};
use actix_rt::Arbiter;
use postrider_actors::{
    coordinator::{CarrySetup, Coordinator},
    flow::{Bell, Bells},
    model::{backoff::Backoff, restart::RestartPolicy},
    supervision::{ChildSpec, Shutdown, Strategy, Supervisor, SupervisorSettings},
    sweeper::{Sweeper, SweeperSetup},
    throttle::{Throttle, ThrottleSetup},
};
use postrider_net::listener::Serving;
use tokio::sync::oneshot;

use super::{
    delivery::Webhooks,
    error::StartError,
    feeds::Feeds,
    machine::Machine,
    receipts::Receipts,
    signals::{Asked, Signals},
    stores::Carried,
    tables::Tables,
};
use crate::{
    config::{Config, Destination, Resolved},
    exit::Exit,
};

/// Event loops that the actors are spread over. Their work is on the runtime's threads; more gained nothing in
/// measurements.
const ARBITERS: usize = 2;

/// When a child is restarted, and when its supervisor gives up: one more than five restarts within a minute, and the
/// process ends with an error, so that systemd starts it anew. The waits before them are below 3.1 s together, so a
/// crash loop always gets there.
const RESTARTS: RestartPolicy = RestartPolicy {
    max_restarts: 5,
    period: Duration::from_mins(1),
    backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5)),
};

/// How long requests with receipts may take to finish when the daemon drains.
const LAST_REQUESTS: Duration = Duration::from_secs(2);

/// What a generation is built from, and that may fail to be built.
pub(super) struct Parts {
    feeds: Feeds,
    webhooks: Webhooks,
    tables: Tables,
    receipts: Receipts,
}

impl Parts {
    /// Makes the adapters of a configuration. Starts nothing.
    pub(super) async fn build(machine: &Machine, resolved: &Resolved) -> Result<Self, StartError> {
        Ok(Self {
            feeds: Feeds::build(machine, resolved).await?,
            webhooks: Webhooks::build(resolved)?,
            tables: Tables::build(machine, resolved).await?,
            receipts: Receipts::build(machine, resolved).await?,
        })
    }
}

/// Why a generation has ended, or is to end.
pub(super) enum End {
    /// Its tree gave up.
    Ended(Exit),
    /// The operator wants the daemon to stop.
    Stop,
    /// The operator wants the configuration to be read anew.
    Reload,
}

/// How a drain ended.
pub(super) struct Drained {
    /// The exit code, if the process ends now.
    pub(super) exit: Exit,
    /// Whether the operator wanted the daemon to stop meanwhile.
    pub(super) is_to_stop: bool,
}

/// A running tree.
pub(super) struct Generation {
    root: Addr<Supervisor>,
    ended: oneshot::Receiver<i32>,
    arbiters: Vec<Arbiter>,
    /// Takes receipts over HTTP, if any are expected.
    serving: Option<Serving>,
    shutdown_timeout: Duration,
}

impl Generation {
    /// Starts the tree. Infallible: a reload has drained the old one by now.
    pub(super) fn start(machine: &Arc<Machine>, resolved: &Resolved, mut parts: Parts) -> Self {
        let config = &resolved.config;
        // Rung when receipts are in the inbox.
        let arrived = Bell::default();
        let serving = parts.receipts.serve(machine, &arrived);
        let arbiter = |_| {
            let runtime = machine.runtime.clone();
            Arbiter::with_tokio_rt(move || runtime)
        };
        let arbiters: Vec<_> = (0..ARBITERS).map(arbiter).collect();
        for (number, arbiter) in arbiters.iter().enumerate() {
            // One that is stopped has no tasks left, and no mark.
            arbiter.spawn(machine.beat(&format!("arbiter {number}")));
        }
        let settings = SupervisorSettings {
            restarts: RESTARTS,
            // Three ranks drain one after the other; delivery, in the middle, takes the longest.
            drain_timeout: config.shutdown.timeout * 7 / 10,
            arbiters: arbiters.iter().map(Arbiter::handle).collect(),
            clock: machine.clock.clone(),
            metrics: machine.metrics.stages.clone(),
        };
        let specs = tree(machine, config, parts, &arrived, &settings);
        let (ended_to, ended) = oneshot::channel();
        let root = Supervisor::root(specs, above(&settings), ended_to).start();
        Self { root, ended, arbiters, serving, shutdown_timeout: config.shutdown.timeout }
    }

    /// Watches over the tree until it ends or the operator asks for something.
    pub(super) async fn until_asked(&mut self, signals: &mut Signals) -> End {
        tokio::select! {
            code = &mut self.ended => End::Ended(exit(&code)),
            asked = signals.next() => match asked {
                Asked::Stop => End::Stop,
                Asked::Reload => End::Reload,
            },
        }
    }

    /// Ends the tree in order, within the shutdown timeout. `is_stopping`: the operator has asked for the process' end
    /// already, and who asks again wants it at once.
    pub(super) async fn drain(mut self, signals: &mut Signals, is_stopping: bool) -> Drained {
        let mut is_to_stop = is_stopping;
        let exit = self.drain_tree(signals, &mut is_to_stop).await;
        Drained { exit, is_to_stop }
    }

    async fn drain_tree(&mut self, signals: &mut Signals, is_to_stop: &mut bool) -> Exit {
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
                asked = signals.next() => match asked {
                    Asked::Stop if *is_to_stop => {
                        tracing::warn!("asked to stop a second time: stopping at once");
                        return Exit::Failed;
                    }
                    Asked::Stop => {
                        tracing::info!("asked to stop during a reload: stopping when the drain is done");
                        *is_to_stop = true;
                    }
                    Asked::Reload => {}
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

/// Who wakes whom when there is something to deliver.
struct Wakes {
    /// Every worker: of webhooks, then of tables.
    workers: Vec<Bell>,
    /// Rung when batches were appended …
    appended: Bells,
    /// … or have become due again by the end of a lease.
    due_again: Bells,
}

impl Wakes {
    /// Workers lease what is due, unless several machines share it: then the coordinator sends hints of it first.
    fn new(machine: &Machine, workers: usize) -> Self {
        let workers: Vec<_> = (0..workers).map(|_| Bell::default()).collect();
        let all = Bells::from(workers.clone());
        machine.stores.queue.on_arrival(Arc::new({
            let all = all.clone();
            move || all.ring()
        }));
        let (appended, due_again) = if let Some(carried) = &machine.stores.carried {
            let bells = Bells::from(vec![carried.queue.bell()]);
            (bells.clone(), bells)
        } else {
            (all, Bells::default())
        };
        Self { workers, appended, due_again }
    }
}

/// `root → store, delivery, feeds, receipts`. Ranks drain from the highest: feeds first, then delivery.
fn tree(
    machine: &Arc<Machine>,
    config: &Config,
    parts: Parts,
    arrived: &Bell,
    settings: &SupervisorSettings,
) -> Vec<ChildSpec> {
    let wakes = Wakes::new(machine, parts.webhooks.workers() + parts.tables.workers());
    let (of_webhooks, of_tables) = wakes.workers.split_at(parts.webhooks.workers());
    let nested = |name, rank, settings, specs: Vec<ChildSpec>| {
        Supervisor::nested(name, None, rank, Strategy::OneForOne, settings, move || specs.clone())
    };
    let store = vec![sweeper(machine, config, &parts.feeds, &wakes)];
    let (webhook_delivery, mut gates) = parts.webhooks.spec(machine, config, &wakes.due_again, of_webhooks);
    let (table_delivery, statement_gates) = parts.tables.spec(machine, config, &wakes.due_again, of_tables);
    gates.extend(statement_gates);
    let throttle = {
        let machine = machine.clone();
        let shares = machine.stores.carried.as_ref().map(|carried| carried.shares.clone());
        ChildSpec::stage::<Throttle>(0, move |_| ThrottleSetup {
            gates: gates.clone(),
            clock: machine.clock.clone(),
            shares: shares.clone(),
        })
    };
    let mut delivery = vec![throttle, webhook_delivery];
    delivery.extend(table_delivery);
    delivery.extend(coordinator(machine, config));
    let feed = |(name, specs): (Arc<str>, Vec<ChildSpec>)| {
        Supervisor::nested("feed", Some(name), 0, Strategy::OneForAll, settings.clone(), move || {
            specs.clone()
        })
    };
    let feeds = parts.feeds.specs(machine, &wakes.appended).into_iter().map(feed).collect();
    let receipts = parts.receipts.specs(machine, config, arrived);
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

/// What only time asks for: leases that run out, final reports, what is archived.
fn sweeper(machine: &Arc<Machine>, config: &Config, feeds: &Feeds, wakes: &Wakes) -> ChildSpec {
    let machine = machine.clone();
    let leases_lost = machine.metrics.stages.leases_lost();
    // A retention of zero: nothing is archived, but what is remembered of inbound entries still ends.
    let retention = config.outbox.retention.unwrap_or_default();
    let (inboxes, queue_feeds, queued) = (feeds.inboxes(), feeds.queue_feeds(), wakes.workers.clone());
    ChildSpec::stage::<Sweeper>(0, move |id| SweeperSetup {
        queue: machine.stores.queue.clone(),
        ledger: machine.stores.ledger.clone(),
        inboxes: inboxes.clone(),
        queue_feeds: queue_feeds.clone(),
        archive: Some((machine.stores.archive.clone(), retention)),
        clock: machine.clock.clone(),
        queued: queued.clone(),
        leases_lost: leases_lost.clone(),
        progress: machine.mark(id),
    })
}

/// Keeps the queue going that several machines share, if they do.
fn coordinator(machine: &Arc<Machine>, config: &Config) -> Option<ChildSpec> {
    let Carried { queue, .. } = machine.stores.carried.clone()?;
    let machine = machine.clone();
    let named = |destination: &Destination| Arc::<str>::from(destination.name.as_str());
    let destinations: Vec<_> = config.destinations.iter().map(named).collect();
    let paused = config.destinations.iter().filter(|destination| destination.paused);
    let paused: Vec<_> = paused.map(named).collect();
    let delay = config.delay.clone();
    let metrics = machine.metrics.stages.queue();
    Some(ChildSpec::stage::<Coordinator>(2, move |id| CarrySetup {
        queue: queue.clone(),
        ledger: machine.stores.ledger.clone(),
        destinations: destinations.clone(),
        paused: paused.clone(),
        delay: delay.clone(),
        metrics: metrics.clone(),
        progress: machine.mark(id),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_loop_reaches_the_end_of_its_restarts() {
        assert!(RESTARTS.is_consistent());
    }
}
