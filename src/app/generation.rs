//! What runs by one configuration, and how another one takes its place.
//!
//! Each part is a tree of its own. When the configuration changes, delivery is handed over: the old workers begin nothing
//! more, give back at once what they have not begun and finish what is in flight; the new ones begin meanwhile, within the
//! same places and gates. What reads files, queues and receipts, and what sweeps, ends before its successor starts, for two
//! of them would take the same files.

use std::{mem, sync::Arc, time::Duration};

use postrider_actors::{
    canary_judge::{CanaryJudge, CanaryJudgeSetup},
    coordinator::{CarrySetup, Coordinator},
    flow::{Bell, Speaker, Tracing},
    model::{backoff::Backoff, restart::RestartPolicy},
    supervision::{ChildSpec, Parking, Strategy, Supervisor, SupervisorSettings},
    sweeper::{Sweeper, SweeperSetup},
    throttle::{RateShares, SetByOperators, Throttle, ThrottleSetup},
};
use postrider_net::serving::Serving;

use super::{
    announcer::Receivers,
    delivery::Webhooks,
    error::StartError,
    feeds::Feeds,
    machine::Machine,
    receipts::Receipts,
    stores::Carried,
    tables::Tables,
    traces::Traces,
    tree::{Tree, end_all, first_end},
};
use crate::{
    config::{Config, Delay, Destination, Resolved},
    exit::Exit,
};

/// When a child is restarted, and when its supervisor gives up: one more than five restarts within a minute, and the
/// process ends with an error, so that systemd starts it anew; but a feed is parked. The waits before them are below 3.1 s together, so a
/// crash loop always gets there.
const RESTARTS: RestartPolicy = RestartPolicy {
    max_restarts: 5,
    period: Duration::from_mins(1),
    backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5)),
};

/// Between two tries of a feed whose restarts are used up.
const PARKED: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_mins(1));

/// How long requests with receipts may take to finish when they are handed over or the daemon drains.
const LAST_REQUESTS: Duration = Duration::from_secs(2);

/// How long a delivery that is replaced may take to record what its last requests brought.
const LAST_RECORDS: Duration = Duration::from_secs(10);

/// Deliveries of earlier configurations that may be finishing at once; one more reload waits for one of them.
const LEAVING_MAX: usize = 4;

/// What a generation is built from, and that may fail to be built.
pub(super) struct Parts {
    feeds: Feeds,
    webhooks: Webhooks,
    tables: Tables,
    receipts: Receipts,
    events: Receivers,
    traces: Traces,
}

impl Parts {
    /// Makes the adapters of a configuration. Starts nothing.
    pub(super) async fn build(machine: &Machine, resolved: &Resolved) -> Result<Self, StartError> {
        Ok(Self {
            feeds: Feeds::build(machine, resolved).await?,
            webhooks: Webhooks::build(resolved)?,
            tables: Tables::build(machine, resolved).await?,
            receipts: Receipts::build(machine, resolved).await?,
            events: Receivers::build(resolved)?,
            traces: Traces::build(machine, resolved)?,
        })
    }
}

/// What runs.
#[derive(Default)]
pub(super) struct Generation {
    /// Counts the configurations.
    number: u64,
    /// Takes receipts over HTTP, if any are expected.
    serving: Option<Serving>,
    /// Joins receipts with messages, if rows are kept.
    receipts: Vec<Tree>,
    /// Takes files and entries in.
    feeds: Vec<Tree>,
    /// Keeps the queue going that several machines share, if they do …
    carry: Vec<Tree>,
    /// … of these destinations.
    carried: Option<CarriedDestinations>,
    /// Sends.
    delivery: Vec<Tree>,
    /// Deliveries of earlier configurations, which finish what is in flight.
    leaving: Vec<Tree>,
    /// Sweeps.
    store: Vec<Tree>,
    /// How long a part may take to end when the daemon drains: three do so one after the other, and delivery, the second,
    /// takes the longest.
    drain_timeout: Duration,
    /// How long delivery may take to end when it is replaced: its requests end by their own timeouts.
    leave_timeout: Duration,
}

/// What the coordinator is made from.
#[derive(Clone, PartialEq)]
struct CarriedDestinations {
    names: Vec<Arc<str>>,
    paused: Vec<Arc<str>>,
    delay: Delay,
}

impl Generation {
    /// Starts everything.
    pub(super) async fn start(machine: &Arc<Machine>, resolved: &Resolved, parts: Parts) -> Self {
        let mut this = Self::default();
        // Nothing has to end for it.
        this.replace(machine, resolved, parts).await;
        this
    }

    /// Waits until few enough earlier deliveries are finishing for one more. An exit code other than done: one of them
    /// could not be ended.
    pub(super) async fn room(&mut self) -> Exit {
        while self.leaving.len() >= LEAVING_MAX {
            let exit = first_end(&mut self.leaving).await;
            if exit != Exit::Done {
                return exit;
            }
        }
        Exit::Done
    }

    /// Takes up another configuration. An exit code other than done: a part of the old one could not be ended.
    pub(super) async fn replace(
        &mut self,
        machine: &Arc<Machine>,
        resolved: &Resolved,
        mut parts: Parts,
    ) -> Exit {
        let config = &resolved.config;
        let drain_timeout = config.shutdown.timeout * 7 / 10;
        let settings = SupervisorSettings {
            restarts: RESTARTS,
            drain_timeout,
            arbiters: machine.arbiters.clone(),
            clock: machine.clock.clone(),
            metrics: machine.metrics.stages.clone(),
            actors: machine.actors.clone(),
            parking: None,
        };
        machine.announcer.configure(mem::take(&mut parts.events));
        self.number += 1;
        let number = self.number;
        let tree = |name, specs, settings| Tree::start(format!("{name}.{number}"), specs, settings);

        for old in &self.delivery {
            old.ask_to_end(self.leave_timeout);
        }
        self.leaving.append(&mut self.delivery);
        let tracing = parts.traces.tracing.clone();
        let specs = delivery(machine, config, (parts.webhooks, parts.tables), tracing, number);
        parts.traces.install(machine);
        self.delivery.push(tree("delivery", specs, settings.clone()));

        let (within, sweeper) = (self.drain_timeout, sweeper(machine, config, &parts.feeds));
        let feeds = end_all(&mut self.feeds, within).await;
        // Their successors say anew what is wrong.
        machine.troubles.forget(&[Speaker::Watcher, Speaker::Supervisor]);
        self.feeds.push(tree("feeds", feed_specs(machine, parts.feeds, &settings), above(&settings)));
        let store = end_all(&mut self.store, within).await;
        machine.troubles.forget(&[Speaker::Sweeper, Speaker::Judge]);
        let judge = canary_judge(machine, config);
        self.store.push(tree("store", vec![sweeper, judge], settings.clone()));

        // The listener is shared: who sends receipts is served by the one or the other.
        let serving = mem::replace(&mut self.serving, parts.receipts.serve(machine));
        let ((), receipts) = tokio::join!(stop_serving(serving), end_all(&mut self.receipts, within));
        let specs = parts.receipts.specs(machine, config);
        if !specs.is_empty() {
            self.receipts.push(tree("receipts", specs, settings.clone()));
        }

        let carried = machine.stores.carried.as_ref().map(|_| CarriedDestinations::of(config));
        let mut carry = Exit::Done;
        if carried != self.carried {
            carry = end_all(&mut self.carry, within).await;
            self.carry.extend(
                coordinator(machine, carried.as_ref()).map(|spec| tree("carry", vec![spec], settings)),
            );
            self.carried = carried;
        }
        self.drain_timeout = drain_timeout;
        self.leave_timeout = leave_timeout(config);
        worst([feeds, store, receipts, carry])
    }

    /// Waits until a part has given up; its exit code.
    pub(super) async fn give_up(&mut self) -> Exit {
        loop {
            tokio::select! {
                exit = first_end(&mut self.receipts) => return exit,
                exit = first_end(&mut self.feeds) => return exit,
                exit = first_end(&mut self.carry) => return exit,
                exit = first_end(&mut self.delivery) => return exit,
                exit = first_end(&mut self.store) => return exit,
                exit = first_end(&mut self.leaving) => {
                    if exit != Exit::Done {
                        return exit;
                    }
                    tracing::info!("what an earlier configuration had in flight is done");
                }
            }
        }
    }

    /// Ends everything in order: what takes in, then what sends, then what sweeps.
    pub(super) async fn end(&mut self) -> Exit {
        let within = self.drain_timeout;
        let ((), receipts, feeds) = tokio::join!(
            stop_serving(self.serving.take()),
            end_all(&mut self.receipts, within),
            end_all(&mut self.feeds, within)
        );
        let carry = end_all(&mut self.carry, within).await;
        self.delivery.append(&mut self.leaving);
        let delivery = end_all(&mut self.delivery, within).await;
        let store = end_all(&mut self.store, within).await;
        worst([receipts, feeds, carry, delivery, store])
    }
}

async fn stop_serving(serving: Option<Serving>) {
    if let Some(serving) = serving
        && !serving.stop(LAST_REQUESTS).await
    {
        tracing::warn!("requests with receipts were cut off; their senders send them again");
    }
}

fn worst<const PARTS: usize>(exits: [Exit; PARTS]) -> Exit {
    exits.into_iter().find(|exit| *exit != Exit::Done).unwrap_or(Exit::Done)
}

fn leave_timeout(config: &Config) -> Duration {
    let webhooks = config.destinations.iter().filter_map(Destination::webhook);
    let requests = webhooks.map(|webhook| webhook.timeout);
    let statements = config.warehouses.iter().map(|warehouse| warehouse.statement_timeout);
    let longest = requests.chain(statements).max().unwrap_or_default();
    (longest + LAST_RECORDS).max(config.shutdown.timeout)
}

/// Settings of a supervisor of supervisors. A child of it that fails has used its restarts up, and starting
/// it over would grant them again at each level: with two levels 36 failures instead of 6.
fn above(settings: &SupervisorSettings) -> SupervisorSettings {
    let mut settings = settings.clone();
    settings.restarts.max_restarts = 0;
    settings
}

/// Settings of the supervisor of one feed. Whatever is wrong with it, the others and the daemon go on (F58).
fn parked(settings: &SupervisorSettings, machine: &Machine, feed: &Arc<str>) -> SupervisorSettings {
    let notes = machine.troubles.of(feed.clone(), Speaker::Supervisor);
    let say = move |why: Option<&str>| {
        match why {
            Some(why) => notes.park(why),
            None => notes.resume(),
        };
    };
    SupervisorSettings { parking: Some(Parking { backoff: PARKED, say: Arc::new(say) }), ..settings.clone() }
}

/// The workers, and the throttle that feeds their gates. All end together: nobody waits at a gate any more.
fn delivery(
    machine: &Arc<Machine>,
    config: &Config,
    (webhooks, tables): (Webhooks, Tables),
    tracing: Option<Tracing>,
    number: u64,
) -> Vec<ChildSpec> {
    let workers: Vec<_> = (0..webhooks.workers() + tables.workers()).map(|_| Bell::default()).collect();
    machine.workers.replace(workers.clone());
    let (of_webhooks, of_tables) = workers.split_at(webhooks.workers());
    let (webhook_delivery, mut gates) = webhooks.spec(machine, config, of_webhooks, tracing.clone());
    let (table_delivery, statement_gates) = tables.spec(machine, config, of_tables, tracing);
    gates.extend(statement_gates);
    // While two of them share a rate they are two processes: no two living ones may have the same name.
    let shares = machine.stores.carried.as_ref().map(|Carried { shares, .. }| RateShares {
        process: if number == 1 {
            shares.process.clone()
        } else {
            format!("{}.{number}", shares.process).into()
        },
        ..shares.clone()
    });
    let machine = machine.clone();
    let throttle = ChildSpec::stage::<Throttle>(0, move |_| ThrottleSetup {
        gates: gates.clone(),
        set: Some(SetByOperators {
            steering: machine.stores.steering.clone(),
            traffic: machine.traffic.clone(),
            workers: machine.workers.clone(),
        }),
        clock: machine.clock.clone(),
        grants_burst: number == 1,
        shares: shares.clone(),
    });
    let mut specs = vec![throttle, webhook_delivery];
    specs.extend(table_delivery);
    specs
}

/// A tree for each feed: nothing of one is restarted for another.
fn feed_specs(machine: &Arc<Machine>, feeds: Feeds, settings: &SupervisorSettings) -> Vec<ChildSpec> {
    let feed = |(name, specs): (Arc<str>, Vec<ChildSpec>)| {
        let settings = parked(settings, machine, &name);
        Supervisor::nested("feed", Some(name), 0, Strategy::OneForAll, settings, move || specs.clone())
    };
    feeds.specs(machine).into_iter().map(feed).collect()
}

/// What only time asks for: leases that run out, final reports, what is archived.
fn sweeper(machine: &Arc<Machine>, config: &Config, feeds: &Feeds) -> ChildSpec {
    let machine = machine.clone();
    // A retention of zero: nothing is archived, but what is remembered of inbound entries still ends.
    let retention = config.outbox.retention.unwrap_or_default();
    let (inboxes, queue_feeds) = (feeds.inboxes(&machine), feeds.queue_feeds());
    ChildSpec::stage::<Sweeper>(0, move |id| SweeperSetup {
        queue: machine.stores.queue.clone(),
        ledger: machine.stores.ledger.clone(),
        steering: machine.stores.steering.clone(),
        inboxes: inboxes.clone(),
        queue_feeds: queue_feeds.clone(),
        archive: Some((machine.stores.archive.clone(), retention)),
        clock: machine.clock.clone(),
        queued: machine.workers.clone(),
        metrics: machine.metrics.stages.clone(),
        on_settled: machine.announcer.on_settled(),
        progress: machine.mark(id),
    })
}

/// Between two looks at files that wait for their canary. Where the store is across the network, each costs calls.
const JUDGE_TICK: Duration = Duration::from_millis(250);
const JUDGE_TICK_SHARED: Duration = Duration::from_secs(1);

/// Lets large files go on after their first messages, or holds them.
fn canary_judge(machine: &Arc<Machine>, config: &Config) -> ChildSpec {
    let (machine, settings) = (machine.clone(), config.canary.clone());
    let tick = if machine.stores.is_shared() { JUDGE_TICK_SHARED } else { JUDGE_TICK };
    ChildSpec::stage::<CanaryJudge>(0, move |id| CanaryJudgeSetup {
        settings: settings.clone(),
        tick,
        steering: machine.stores.steering.clone(),
        ledger: machine.stores.ledger.clone(),
        clock: machine.clock.clone(),
        queued: machine.appended(),
        troubles: machine.troubles.clone(),
        progress: machine.mark(id),
    })
}

impl CarriedDestinations {
    fn of(config: &Config) -> Self {
        let named = |destination: &Destination| Arc::<str>::from(destination.name.as_str());
        let paused = config.destinations.iter().filter(|destination| destination.paused);
        Self {
            names: config.destinations.iter().map(named).collect(),
            paused: paused.map(named).collect(),
            delay: config.delay.clone(),
        }
    }
}

/// Keeps the queue going that several machines share, if they do.
fn coordinator(machine: &Arc<Machine>, carried: Option<&CarriedDestinations>) -> Option<ChildSpec> {
    let CarriedDestinations { names, paused, delay } = carried?.clone();
    let Carried { queue, .. } = machine.stores.carried.clone()?;
    let machine = machine.clone();
    let metrics = machine.metrics.stages.queue();
    Some(ChildSpec::stage::<Coordinator>(0, move |id| CarrySetup {
        queue: queue.clone(),
        ledger: machine.stores.ledger.clone(),
        destinations: names.clone(),
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
