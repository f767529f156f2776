//! The workers that send messages to webhooks.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use postrider_actors::{
    flow::{Bell, Gate},
    model::traffic::{TrafficRules, limiter::Bound},
    ports::Webhook,
    supervision::ChildSpec,
    throttle::{self, LimitedGate},
    webhook_delivery::{DeliveryDestination, DeliverySetup, WebhookDelivery},
};
use postrider_http::webhook::{HttpWebhook, WebhookSettings};
use secrecy::ExposeSecret as _;

use super::{error::StartError, machine::Machine};
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

/// Messages for which workers lease ahead where the limit on those in flight finds itself.
const AUTO_AHEAD: usize = 256;

struct OpenWebhook {
    destination: Destination,
    rules: TrafficRules,
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
            let client = client(resolved, destination, webhook)?;
            Ok(OpenWebhook {
                destination: destination.clone(),
                rules: rules(webhook),
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
    ) -> (ChildSpec, Vec<LimitedGate>) {
        let mut gates = Vec::new();
        let mut gate = |name: &str, rate: Option<config::Rate>| {
            let rate = rate?;
            let (rate_per_s, burst) = (NonZeroU32::new(rate.per_s)?, NonZeroU32::new(rate.burst)?);
            let granted = machine.metrics.stages.gate(name, rate.per_s);
            let limited =
                LimitedGate { name: name.into(), gate: Gate::default(), rate_per_s, burst, granted };
            gates.push(limited.clone());
            Some(limited.gate)
        };
        let all = gate(throttle::ALL, config.delivery.rate());
        let (delivery, record, lease) =
            (config.delivery.concurrency, config.record.max_unrecorded, config.lease.duration);
        let rules: Vec<_> = self.open.iter().map(|open| open.rules).collect();
        let names = self.open.iter().map(|open| open.destination.name.as_str().into());
        machine.traffic.configure(delivery.min(record), names.zip(rules.iter().copied()));
        let destinations: Vec<_> = self
            .open
            .into_iter()
            .map(|OpenWebhook { destination, rules, webhook }| DeliveryDestination {
                name: destination.name.as_str().into(),
                webhook,
                concurrency: ahead(rules.bound),
                gate: gate(&destination.name, destination.rate()),
                rate_per_s: rate_per_s(&[destination.rate(), config.delivery.rate()]),
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
            let part = |((index, destination), rules): ((usize, &DeliveryDestination), &TrafficRules)| {
                part(destination, rules.bound, worker + index, workers)
            };
            DeliverySetup {
                destinations: destinations.iter().enumerate().zip(&rules).map(part).collect(),
                worker: machine.worker(id, &queued[worker], lease),
                unrecorded: share(record, worker, workers).max(1),
                traffic: machine.traffic.clone(),
                in_flight: machine.in_flight.clone(),
                alone: machine.alone.clone(),
                record_group,
                record_linger,
                gate: all.clone(),
                troubles: machine.troubles.clone(),
            }
        });
        (spec.times(workers), gates)
    }
}

/// What an operator says about a webhook's traffic.
fn rules(webhook: &config::Webhook) -> TrafficRules {
    let bound = match webhook.concurrency {
        Some(number) => Bound::Fixed(number),
        None => Bound::Auto { ceiling: webhook.concurrency_max },
    };
    TrafficRules { bound, storm_percent: webhook.storm.percent }
}

/// Messages in flight that workers lease ahead for.
fn ahead(bound: Bound) -> usize {
    match bound {
        Bound::Auto { ceiling } => ceiling.min(AUTO_AHEAD),
        Bound::Fixed(number) => number,
    }
}

/// A worker's part in a destination. No more workers share it than may always have a message in flight: one that has
/// leased messages must get its turn.
fn part(
    destination: &DeliveryDestination,
    bound: Bound,
    worker: usize,
    workers: usize,
) -> DeliveryDestination {
    let (rank, sharing) = (worker % workers, workers.min(bound.floor()));
    let share = |total| if rank < sharing { share(total, rank, sharing) } else { 0 };
    DeliveryDestination {
        concurrency: share(destination.concurrency),
        rate_per_s: destination.rate_per_s.map(share),
        ..destination.clone()
    }
}

/// The lowest of these limits.
fn rate_per_s(rates: &[Option<config::Rate>]) -> Option<usize> {
    rates.iter().flatten().map(|rate| rate.per_s as usize).min()
}

fn client(
    resolved: &Resolved,
    destination: &Destination,
    webhook: &config::Webhook,
) -> Result<HttpWebhook, StartError> {
    let materials = &resolved.materials[&destination.name];
    let headers = materials.headers.iter();
    let headers = headers.map(|(name, value)| (name.clone(), value.expose_secret().to_owned())).collect();
    let keys = webhook.settings.clone();
    let settings = WebhookSettings::new(keys, materials.secrets.clone(), &destination.retry);
    let identity = materials.client.as_ref().map(|client| client.identity.clone());
    HttpWebhook::new(WebhookSettings { headers, identity, ..settings }).map_err(|problems| {
        StartError::Destination {
            name: destination.name.clone(),
            problems: problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        }
    })
}

/// A worker's share of `total` permits: what is left over goes to the first ones. Rotated by the caller,
/// so that destinations with a single permit don't all hang on one worker.
pub(super) fn share(total: usize, worker: usize, workers: usize) -> usize {
    total / workers + usize::from(worker % workers < total % workers)
}
