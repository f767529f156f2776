//! The workers that send messages to webhooks.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use postrider_actors::{
    flow::{Bell, ConfiguredTraffic, Gate, Tracing},
    model::{
        ahead::Rank,
        order::OrderingKey,
        traffic::{TrafficRules, limiter::Bound},
    },
    ports::Webhook,
    supervision::ChildSpec,
    throttle::{self, LimitedGate},
    webhook_delivery::{DeliveryDestination, DeliverySetup, WebhookDelivery},
};

use super::{clients::client, error::StartError, machine::Machine};
use crate::config::{self, Config, Destination, Profile, Resolved};

/// Outcomes that are recorded at once when so many wait, unless the window of I6 asks for it earlier, and the longest
/// that one waits: each group costs a sync, and each batch in it a record.
const RECORD_GROUP: usize = 1_000;
const RECORD_LINGER: Duration = Duration::from_millis(50);
/// The same where a group is a transaction across the network, for all workers together. What a crash repeats is bounded by `record.max_unrecorded`
/// (I6), however long it lingers.
const RECORD_LINGER_SHARED: Duration = Duration::from_secs(1);

/// The webhooks of a configuration.
pub(super) struct Webhooks {
    open: Vec<OpenWebhook>,
    workers: usize,
}

struct OpenWebhook {
    destination: Destination,
    traffic: ConfiguredTraffic,
    bundle: Option<usize>,
    order: Option<OrderingKey>,
    webhook: Arc<dyn Webhook>,
}

impl Webhooks {
    /// Makes the clients. Connects to nothing.
    pub(super) fn build(resolved: &Resolved) -> Result<Self, StartError> {
        let config = &resolved.config;
        let webhooks = config.destinations.iter().filter_map(|destination| {
            let webhook = destination.webhook()?;
            Some((destination, webhook))
        });
        let open = webhooks.map(|(destination, webhook)| {
            let client = client(resolved, destination, webhook.settings.clone())?;
            Ok(OpenWebhook {
                destination: destination.clone(),
                traffic: traffic(webhook),
                bundle: webhook.bundle,
                order: webhook.order(),
                webhook: Arc::new(client),
            })
        });
        Ok(Self { open: open.collect::<Result<_, StartError>>()?, workers: config.pools.deliveries })
    }

    /// How many workers there are.
    pub(super) fn workers(&self) -> usize {
        self.workers
    }

    /// The workers, which `queued` wakes, and the gates that the throttle feeds for them.
    pub(super) fn spec(
        self,
        machine: &Arc<Machine>,
        config: &Config,
        queued: &[Bell],
        tracing: Option<Tracing>,
    ) -> (ChildSpec, Vec<LimitedGate>) {
        let mut gates = Vec::new();
        let mut gate = |name: &str, rate_per_s: u32, burst: u32| {
            let limited = LimitedGate {
                name: name.into(),
                gate: Gate::default(),
                rate_per_s: NonZeroU32::new(rate_per_s),
                burst: NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN),
                metrics: machine.metrics.stages.gate(name),
            };
            gates.push(limited.clone());
            limited.gate
        };
        let all = config.delivery.rate().map(|rate| gate(throttle::ALL, rate.per_s, rate.burst));
        let (delivery, record, lease) =
            (config.delivery.concurrency, config.record.max_unrecorded, config.lease.duration);
        let traffic = self.open.iter().map(|open| (open.destination.name.as_str().into(), open.traffic));
        machine.traffic.configure(delivery.min(record), traffic);
        let destinations: Vec<_> = self
            .open
            .into_iter()
            .map(|OpenWebhook { destination, bundle, order, webhook, .. }| DeliveryDestination {
                name: destination.name.as_str().into(),
                webhook,
                rank: Rank { worker: 0, workers: 1 },
                bundle,
                order,
                gate: gate(&destination.name, destination.rate_per_s, destination.burst),
                retry: destination.retry.clone(),
                paused: destination.paused,
                recorded: config.is_recorded(&destination.name),
                metrics: machine.metrics.stages.destination(&destination.name),
            })
            .collect();
        let record_linger = match config.profile {
            Profile::Embedded => RECORD_LINGER,
            Profile::Aws => RECORD_LINGER_SHARED,
        };
        let (machine, queued) = (machine.clone(), queued.to_vec());
        let workers = queued.len();
        // What is in flight has its part of the window, and sending goes on while a group is recorded.
        let record_group = (record.saturating_sub(delivery) * 3 / 4).max(record / 4) / workers;
        let record_group = record_group.clamp(1, RECORD_GROUP);
        let spec = ChildSpec::stage::<WebhookDelivery>(0, move |id| {
            let worker = id.slot;
            let ranked = |(index, destination): (usize, &DeliveryDestination)| {
                let rank = rank(worker, index, workers);
                // Who keeps an order has to see all of it.
                let workers = if destination.order.is_some() { 1 } else { rank.workers };
                DeliveryDestination { rank: Rank { workers, ..rank }, ..destination.clone() }
            };
            DeliverySetup {
                destinations: destinations.iter().enumerate().map(ranked).collect(),
                worker: machine.worker(id, &queued[worker], lease, tracing.clone()),
                unrecorded: Rank { worker, workers }.share(record).max(1),
                traffic: machine.traffic.clone(),
                in_flight: machine.in_flight.clone(),
                alone: machine.alone.clone(),
                record_group,
                record_linger,
                gate: all.clone(),
                file_rates: machine.file_rates.clone(),
                troubles: machine.troubles.clone(),
            }
        });
        (spec.times(workers), gates)
    }
}

/// What the configuration says about a webhook's traffic.
fn traffic(webhook: &config::Webhook) -> ConfiguredTraffic {
    let ceiling = webhook.concurrency_max;
    let bound = webhook.concurrency.map_or(Bound::Auto { ceiling }, Bound::Fixed);
    ConfiguredTraffic { rules: TrafficRules { bound, storm_percent: webhook.storm.percent }, ceiling }
}

/// A worker's rank at the destination with this index: rotated, so that destinations with a single permit don't all hang on
/// one worker.
pub(super) fn rank(worker: usize, index: usize, workers: usize) -> Rank {
    Rank { worker: (worker + index) % workers, workers }
}
