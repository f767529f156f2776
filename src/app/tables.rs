//! The workers that write rows into warehouses' tables.

use std::{collections::BTreeMap, num::NonZeroU32, sync::Arc};

use postrider_actors::{
    flow::{Bell, Bells, Gate},
    ports::Table,
    supervision::{Birth, ChildSpec},
    table_delivery::{
        self, GroupLimits, StatementGates, TableDelivery, TableDeliverySetup, TableDestination,
    },
    throttle::LimitedGate,
};
use tokio::sync::Semaphore;

use super::{
    Machine,
    reign::{holders, share, worker},
};
use crate::config::{self, Config};

/// The destinations that are tables, in the order of the configuration.
pub(super) fn table_destinations(
    config: &Config,
) -> impl Iterator<Item = (&config::Destination, &config::Table)> {
    config.destinations.iter().filter_map(|destination| Some((destination, destination.table()?)))
}

/// How many workers write into tables: none where there is no table.
pub(super) fn table_workers(config: &Config) -> usize {
    if table_destinations(config).next().is_some() { config.pools.tables } else { 0 }
}

/// The workers, and the gates that a throttle feeds for them. `tables` are in the order of
/// [`table_destinations`], `queued` has a bell per worker.
pub(super) fn table_spec(
    machine: &Machine,
    config: &Config,
    tables: &[Arc<dyn Table>],
    due_again: &Bells,
    queued: Vec<Bell>,
) -> (Option<ChildSpec>, Vec<LimitedGate>) {
    let workers = queued.len();
    if workers == 0 {
        return (None, Vec::new());
    }
    let (gates, limited) = statement_gates(machine, config);
    let shares: Vec<Vec<_>> = (0..workers)
        .map(|worker| {
            let of_each = |(index, ((destination, settings), table)): (usize, (_, Arc<dyn Table>))| {
                let (destination, settings): (&config::Destination, &config::Table) = (destination, settings);
                let warehouse = config.warehouse(&settings.warehouse);
                let statements = warehouse.map_or(1, |warehouse| warehouse.statements);
                TableDestination {
                    name: destination.name.as_str().into(),
                    table,
                    gates: gates[&settings.warehouse].clone(),
                    group: GroupLimits {
                        rows: settings.max_rows,
                        bytes: GROUP_BYTES_MAX,
                        linger: settings.linger,
                        batches: GROUP_BATCHES_MAX,
                    },
                    concurrency: share(statements, worker + index, workers).max(1),
                    retry: destination.retry.clone(),
                    paused: destination.paused,
                    recorded: config.is_recorded(&destination.name),
                    metrics: machine.metrics.stages.destination(&destination.name),
                }
            };
            table_destinations(config).zip(tables.iter().cloned()).enumerate().map(of_each).collect()
        })
        .collect();
    let worker = worker(machine, config, due_again);
    let (in_flight, alone) = (machine.in_flight.clone(), machine.alone.clone());
    let factory = move |birth: Birth| {
        let slot = birth.id.slot;
        let setup = TableDeliverySetup {
            destinations: shares[slot].clone(),
            worker: worker(&birth, &queued[slot]),
            in_flight: in_flight.clone(),
            alone: alone.clone(),
        };
        let (holder, predecessor) = holders(&birth);
        let fault = birth.fault.clone();
        birth
            .start(table_delivery::MAILBOX, move |_| TableDelivery::new(setup, &holder, predecessor, fault))
            .recipient()
    };
    let spec =
        ChildSpec { name: "table_delivery", of: None, count: workers, factory: Arc::new(factory), rank: 1 };
    (Some(spec), limited)
}

/// Payload bytes that wait for one statement: a few times what a batch has by default.
const GROUP_BYTES_MAX: usize = 4 << 20;

/// Batches that wait for one statement: a queue feed may make a batch of every entry.
const GROUP_BATCHES_MAX: usize = 256;

/// What statements to each warehouse wait for, all tables of it together (S4.1).
fn statement_gates(
    machine: &Machine,
    config: &Config,
) -> (BTreeMap<String, StatementGates>, Vec<LimitedGate>) {
    let (mut all, mut limited) = (BTreeMap::new(), Vec::new());
    for warehouse in &config.warehouses {
        let rate = warehouse.statements_per_s.and_then(NonZeroU32::new).map(|rate_per_s| {
            let name = format!("warehouse {}", warehouse.name);
            let granted = machine.metrics.stages.gate(&name, rate_per_s.get());
            // No burst: a quota on statements per second is one on every second.
            let burst = NonZeroU32::MIN;
            let gate = LimitedGate { name: name.into(), gate: Gate::default(), rate_per_s, burst, granted };
            limited.push(gate.clone());
            gate.gate
        });
        let in_flight = Arc::new(Semaphore::new(warehouse.statements));
        all.insert(warehouse.name.clone(), StatementGates { in_flight, rate });
    }
    (all, limited)
}
