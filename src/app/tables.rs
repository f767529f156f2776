//! The workers that write rows into warehouses' tables.

use std::{collections::BTreeMap, num::NonZeroU32, sync::Arc};

use postrider_actors::{
    flow::{Bell, Gate, Tracing},
    ports::Table,
    supervision::ChildSpec,
    table_delivery::{StatementGates, TableDelivery, TableDeliverySetup, TableDestination},
    throttle::LimitedGate,
};

use super::{delivery::rank, error::StartError, machine::Machine};
use crate::config::{self, Config, Resolved};

/// The tables of a configuration.
#[derive(Default)]
pub(super) struct Tables {
    open: Vec<OpenTable>,
    workers: usize,
}

/// A destination that is a table.
pub(super) struct OpenTable {
    /// The destination …
    pub(super) destination: config::Destination,
    /// … as a table …
    pub(super) settings: config::Table,
    /// … and the adapter for it.
    pub(super) table: Arc<dyn Table>,
}

impl Tables {
    /// Looks the tables up in their catalogues; what can't take its rows is refused.
    pub(super) async fn build(machine: &Machine, resolved: &Resolved) -> Result<Self, StartError> {
        #[cfg(feature = "postgres")]
        let open = super::postgres::tables(resolved, &machine.metrics).await?;
        // The configuration was refused if it names any.
        #[cfg(not(feature = "postgres"))]
        let (open, _) = (Vec::new(), machine);
        Ok(Self { workers: if open.is_empty() { 0 } else { resolved.config.pools.tables }, open })
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
    ) -> (Option<ChildSpec>, Vec<LimitedGate>) {
        if self.workers == 0 {
            return (None, Vec::new());
        }
        let (gates, limited) = statement_gates(machine, config);
        let destination = |OpenTable { destination, settings, table }: OpenTable| TableDestination {
            name: destination.name.as_str().into(),
            table,
            gates: gates[&settings.warehouse].clone(),
            group: settings.group.clone(),
            concurrency: config.warehouse(&settings.warehouse).map_or(1, |warehouse| warehouse.statements),
            retry: destination.retry.clone(),
            paused: destination.paused,
            recorded: config.is_recorded(&destination.name),
            metrics: machine.metrics.stages.destination(&destination.name),
        };
        let destinations: Vec<_> = self.open.into_iter().map(destination).collect();
        let lease = config.lease.duration;
        let (machine, queued) = (machine.clone(), queued.to_vec());
        let workers = queued.len();
        let spec = ChildSpec::stage::<TableDelivery>(0, move |id| {
            let worker = id.slot;
            let share_of_each = |(index, destination): (usize, &TableDestination)| TableDestination {
                concurrency: rank(worker, index, workers).share(destination.concurrency).max(1),
                ..destination.clone()
            };
            TableDeliverySetup {
                destinations: destinations.iter().enumerate().map(share_of_each).collect(),
                worker: machine.worker(id, &queued[worker], lease, tracing.clone()),
                in_flight: machine.in_flight.clone(),
                alone: machine.alone.clone(),
            }
        });
        (Some(spec.times(workers)), limited)
    }
}

/// What statements to each warehouse wait for, all tables of it together (S4.1).
fn statement_gates(
    machine: &Machine,
    config: &Config,
) -> (BTreeMap<String, StatementGates>, Vec<LimitedGate>) {
    let (mut all, mut limited) = (BTreeMap::new(), Vec::new());
    for warehouse in &config.warehouses {
        let name = format!("warehouse {}", warehouse.name);
        let in_flight = machine.places(&name, warehouse.statements);
        let rate = warehouse.statements_per_s.and_then(NonZeroU32::new).map(|rate_per_s| {
            let gate = LimitedGate {
                name: name.as_str().into(),
                gate: Gate::default(),
                rate_per_s: Some(rate_per_s),
                // No burst: a quota on statements per second is one on every second.
                burst: NonZeroU32::MIN,
                metrics: machine.metrics.stages.gate(&name),
            };
            limited.push(gate.clone());
            gate.gate
        });
        all.insert(warehouse.name.clone(), StatementGates { in_flight, rate });
    }
    (all, limited)
}
