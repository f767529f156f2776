//! Outbox and ledger in DynamoDB, for several machines that share the work.
//!
//! Two tables ([`schema`] has their layout). What a batch carries is written once, into the outbox table ([`payload`]);
//! what becomes of it changes small items of the ledger table, of which each batch has one record for its whole life.
//! `model::ledger` has every rule about it; here records are read, and written if nobody else has changed them. A
//! batch's way: [`append`] stores it in one transaction with its file's checkpoint; [`due`] says that it is due, without
//! a read where its own process asks; [`claims`] fence its workers; [`settle`] records what became of its messages; one
//! that leaves some to be tried again waits until they are due.
//!
//! Every write is conditional on what was read before, and all reads that decide something are strongly
//! consistent. The indexes are not: whoever finds a batch in one must expect that it has moved on.

mod append;
mod archive;
mod audit;
mod cache;
mod calls;
mod change;
mod claims;
mod cluster;
mod console;
mod dead;
mod depth;
mod destinations;
mod draft;
mod due;
mod ending;
mod entries;
mod entry_groups;
mod expiring;
mod files;
mod index;
mod item;
mod keys;
mod lane;
mod lookup;
mod payload;
mod payload_store;
mod rates;
mod record;
mod reporting;
mod reports;
mod retry;
pub mod schema;
mod settings;
mod settle;
mod state;
mod store_time;
#[cfg(test)]
mod templates;
mod view;
mod waiting;

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use aws_sdk_dynamodb::Client;
use postrider_actors::{
    model::{
        batch::Rendering,
        canary::Trial,
        file::{Checkpoint, FileReport, FileState, Reject},
        hold::{HeldFile, HoldChange},
        ids::{BatchId, FileId},
        priority::{FilePriority, Priority},
        rate_share::RateLeases,
        room::OpenMessages,
        time::UnixMs,
    },
    ports::{
        Append, AppendLimits, Appended, Archive, CallObserver, Claim, ClaimRequest, Claims, Clock,
        DestinationDepth, DueBatch, DueQuery, Ended, EntryId, Fetched, Hint, ItemOutcome, LeaseToken, Ledger,
        LimitsSet, Outbox, OutboxPages, Page, PageQuery, RateTable, Release, Settled, Settlement, Steering,
        StoreError, Want,
        console::{DeadFilter, DeadLetter, Position},
    },
};

pub use self::{
    append::DESTINATIONS_MAX, console::Console, schema::SCHEMA_VERSION, settings::DynamoSettings,
};
use self::{
    calls::Calls,
    state::Shared,
    store_time::{Learns, StoreTime},
};

/// The store. It runs nothing in the background.
pub struct DynamoStore {
    pub(in crate::dynamodb) shared: Shared,
}

impl DynamoStore {
    /// The process that it was opened as, `NODE-START`.
    pub fn process(&self) -> &str {
        &self.shared.settings.process
    }

    /// Opens the store, whose tables must be there and of this version. `observer` is told what calls
    /// consume.
    pub async fn open(
        client: &Client,
        mut settings: DynamoSettings,
        clock: Arc<dyn Clock>,
        observer: Arc<dyn CallObserver>,
    ) -> Result<Self, StoreError> {
        let time = Arc::new(StoreTime::default());
        let learns = Learns { time: time.clone(), clock: clock.clone() };
        let config = client.config().to_builder();
        let config = if settings.store_time { config.interceptor(learns) } else { config };
        let calls = Calls::new(&Client::from_conf(config.build()), settings.tables(), observer);
        let shards = schema::check_start(&calls).await?;
        if settings.keys.scan_concurrency > shards {
            let spread = schema::spread_over(&calls.tables, settings.keys.scan_concurrency);
            if let Err(error) = calls.update("noting the shards of the indexes", spread).await {
                // A command that may only read spreads nothing.
                tracing::warn!(%error, "machines with a smaller scan_concurrency don't know of this one's");
            }
        }
        settings.keys.scan_concurrency = settings.keys.scan_concurrency.max(shards);
        Ok(Self { shared: Shared::new(calls, settings, clock, time) })
    }
}

/// Makes the tables of `[outbox.dynamodb]` or brings them up to date. Refuses a newer version's.
pub async fn migrate(client: &Client, settings: &DynamoSettings) -> Result<(), StoreError> {
    let calls = Calls::new(client, settings.tables(), Arc::new(()));
    schema::migrate(&calls).await
}

/// What is wrong with the tables of `[outbox.dynamodb]`, each as a sentence; empty if they can be used.
pub async fn check(client: &Client, settings: &DynamoSettings) -> Result<Vec<String>, StoreError> {
    let calls = Calls::new(client, settings.tables(), Arc::new(()));
    schema::check(&calls).await
}

#[async_trait]
impl Outbox for DynamoStore {
    fn append_limits(&self) -> AppendLimits {
        append::LIMITS
    }

    async fn find_file(&self, id: FileId) -> Result<Option<(FileState, Checkpoint)>, StoreError> {
        Ok(self.shared.read_file(id).await?.map(|file| (file.state, file.checkpoint)))
    }

    async fn append(&self, append: Append) -> Result<Appended, StoreError> {
        self.shared.append(append).await
    }

    async fn known_entries(&self, entries: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        self.shared.known_entries(entries).await
    }

    async fn open_messages(&self) -> Result<OpenMessages, StoreError> {
        self.shared.depth.read(&self.shared.calls, self.shared.clock.mono()).await
    }
}

#[async_trait]
impl Claims for DynamoStore {
    async fn due(&self, query: DueQuery<'_>) -> Result<Vec<DueBatch>, StoreError> {
        self.shared.due(query).await
    }

    async fn first_turns(&self, want: &Want, due_by: UnixMs) -> Result<Vec<Hint>, StoreError> {
        self.shared.first_turns(want, due_by).await
    }

    async fn next_due(&self) -> Result<Option<UnixMs>, StoreError> {
        let (shared, now) = (&self.shared, self.shared.clock.wall());
        let is_closed =
            |waiting: &waiting::Waiting| shared.is_closed(waiting.file, &waiting.batch.destination, now);
        Ok(shared.waiting().next_due(is_closed))
    }

    async fn depths(&self, now: UnixMs) -> Result<Vec<DestinationDepth>, StoreError> {
        self.shared.depths(now).await
    }

    async fn claim(&self, request: ClaimRequest) -> Result<Vec<(BatchId, Claim)>, StoreError> {
        self.shared.claim(&request).await
    }

    async fn extend_claims(
        &self,
        tokens: &[LeaseToken],
        until: UnixMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        Ok(self.shared.extend_claims(tokens, until).await)
    }

    async fn release_claims(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        self.shared.release_claims(tokens, how).await
    }
}

#[async_trait]
impl Ledger for DynamoStore {
    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<Settled>, StoreError> {
        self.shared.settle(settlements).await
    }

    async fn disable_destination(&self, name: &str, reason: &str, at: UnixMs) -> Result<(), StoreError> {
        self.shared.disable(name, reason, at).await?;
        Ok(())
    }

    async fn disabled_destinations(&self) -> Result<Vec<Arc<str>>, StoreError> {
        self.shared.disabled().await
    }

    async fn report(&self, file: FileId) -> Result<Option<FileReport>, StoreError> {
        let Some(look) = self.shared.look_at(file).await? else { return Ok(None) };
        let mut report = look.report;
        self.shared.add_holds(&mut report).await?;
        Ok(Some(report))
    }

    async fn rejects(&self, file: FileId, after: u64, limit: usize) -> Result<Vec<Reject>, StoreError> {
        self.shared.rejects(file, after, limit).await
    }

    async fn latest_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.shared.latest_files(limit).await
    }

    async fn timed_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.shared.timed_files(limit).await
    }

    async fn settled_files(&self, feed: &str, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.shared.settled_files(feed, limit).await
    }

    async fn mark_reported(&self, files: &[FileId]) -> Result<(), StoreError> {
        self.shared.mark_reported(files).await
    }
}

#[async_trait]
impl Steering for DynamoStore {
    async fn held_files(&self) -> Result<Vec<HeldFile>, StoreError> {
        Ok(self.shared.cluster_state().await?.held.clone())
    }

    async fn set_limits(&self) -> Result<LimitsSet, StoreError> {
        self.shared.set_limits().await
    }

    async fn change_hold(
        &self,
        file: FileId,
        destination: Option<&str>,
        change: &HoldChange,
    ) -> Result<usize, StoreError> {
        self.shared.change_hold(file, destination, change).await
    }

    async fn priorities(&self) -> Result<Vec<FilePriority>, StoreError> {
        Ok(self.shared.cluster_state().await?.priorities.clone())
    }

    async fn prioritize(
        &self,
        file: FileId,
        destination: Option<&str>,
        priority: Priority,
    ) -> Result<usize, StoreError> {
        self.shared.prioritize(file, destination, priority).await
    }

    async fn end_step(&self, batches: usize, now: UnixMs) -> Result<Ended, StoreError> {
        self.shared.end_step(batches, now).await
    }

    async fn trial(&self, file: FileId, destination: &str, before: u64) -> Result<Trial, StoreError> {
        self.shared.trial(file, destination, before).await
    }
}

#[async_trait]
impl OutboxPages for DynamoStore {
    async fn page(&self, query: PageQuery) -> Result<Page, StoreError> {
        self.shared.page(query).await
    }

    async fn get(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, Fetched)>, StoreError> {
        self.shared.get(ids).await
    }

    async fn delete(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        self.shared.delete(ids).await
    }

    async fn count_outstanding(&self) -> Result<u64, StoreError> {
        self.shared.count_outstanding().await
    }
}

#[async_trait]
impl Archive for DynamoStore {
    async fn archive(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        self.shared.archive(before, limit).await
    }
}

#[async_trait]
impl RateTable for DynamoStore {
    async fn load(&self, destination: &str) -> Result<RateLeases, StoreError> {
        self.shared.load_rates(destination).await
    }

    async fn store(&self, destination: &str, leases: &RateLeases) -> Result<bool, StoreError> {
        self.shared.store_rates(destination, leases).await
    }
}

impl DynamoStore {
    /// Lets a destination's messages go again. Whether it was disabled.
    pub async fn enable_destination(&self, name: &str) -> Result<bool, StoreError> {
        self.shared.enable(name).await
    }

    /// Up to `limit` dead letters after `position`, in the order of file, destination and batch. None only if there are no
    /// more.
    pub async fn dead_letters(
        &self,
        filter: &DeadFilter,
        position: &Position,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        self.shared.dead_letters(filter, position, limit).await
    }

    /// Sends every dead message again that was never sent, with a new body; how many.
    pub async fn rerender(
        &self,
        renderings: &BTreeMap<String, Rendering>,
        now: UnixMs,
    ) -> Result<usize, StoreError> {
        let all = DeadFilter::default();
        Ok(self.shared.rerender(&all, renderings, usize::MAX, now, false).await?.redriven)
    }

    /// Sends up to `limit` dead letters again that match `filter`; how many. It only opens them again: delivery keeps its
    /// rates. If it fails, what was redriven before stays so.
    pub async fn redrive(&self, filter: &DeadFilter, limit: usize, now: UnixMs) -> Result<usize, StoreError> {
        self.shared.redrive(filter, limit, now).await
    }
}
