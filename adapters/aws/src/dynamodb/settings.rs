//! How the store is used.

use std::time::Duration;

use postrider_actors::model::ledger::Evidence;
use postrider_settings::Dynamodb;

use super::{calls::Tables, keys::Shards};

/// How the store is used.
#[derive(Clone, Debug)]
pub struct DynamoSettings {
    /// `[outbox.dynamodb]`
    pub keys: Dynamodb,
    /// This process, `NODE-START`: see `model::ledger::is_earlier_life`.
    pub process: String,
    /// Entries of each shard that one sweep looks at, some 300 bytes each: a page ends at 1 MB.
    pub page_size: u16,
    /// Between two sweeps of the index.
    pub sweep_interval: Duration,
    /// How long after it is due a batch is looked at: its own process has sent a hint of it by then.
    pub grace: Duration,
    /// How long what a process has taken over, or keeps, is left to it. Each batch that waits costs a write so often; one
    /// whose holder is gone is found when that is over, if it was kept before it was claimed: some leases.
    pub kept_for: Duration,
    /// How much longer what another process looks after is left to it: its sweeps keep it meanwhile, if it is there.
    pub take_over_after: Duration,
    /// Whether deadlines go by the service's clock, as its answers tell it (B23); not where the clock is a test's.
    pub store_time: bool,
    /// How much longer than it says a claim is taken to be held by others: their clocks, and their calls, are not exact.
    pub clock_margin: Duration,
    /// Between two looks at files that another process may have settled.
    pub look_interval: Duration,
    /// How long what a batch carries is kept after it was put, or found to be needed; at least as long as no machine of
    /// several may be running.
    pub payload_life: Duration,
    /// How long settlements wait for others after a transaction has begun, if they are few.
    pub settle_linger: Duration,
    /// How long taken entries of inbound queues are remembered. SQS keeps a message for 14 days at most.
    pub entry_retention: Duration,
    /// What was in flight when this node's last life died (B17).
    pub evidence: Evidence,
}

impl DynamoSettings {
    /// With these keys, for a process.
    pub fn new(keys: Dynamodb, process: &str) -> Self {
        Self {
            keys,
            process: process.to_owned(),
            page_size: 1_000,
            sweep_interval: Duration::from_secs(5),
            grace: Duration::from_secs(5),
            kept_for: Duration::from_mins(2),
            take_over_after: Duration::from_secs(20),
            store_time: true,
            clock_margin: Duration::from_secs(5),
            look_interval: Duration::from_secs(30),
            payload_life: Duration::from_hours(60 * 24),
            settle_linger: Duration::ZERO,
            entry_retention: Duration::from_hours(15 * 24),
            evidence: Evidence::unknown(),
        }
    }

    pub(super) fn all_shards(&self) -> u32 {
        self.keys.scan_concurrency.into()
    }

    pub(super) fn shards(&self) -> Shards {
        Shards { of_destination: self.keys.shards, of_all: self.all_shards() }
    }

    pub(super) fn tables(&self) -> Tables {
        Tables { outbox: self.keys.table.clone(), ledger: self.keys.ledger_table() }
    }
}
