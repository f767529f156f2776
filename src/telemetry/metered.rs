//! Counts what is asked of a store, whichever it is, without the stages knowing.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use postrider_actors::{
    model::{
        canary::Trial,
        file::{Checkpoint, FileReport, FileState, Reject},
        hold::{HeldFile, HoldChange},
        ids::{BatchId, FileId},
        priority::{FilePriority, Priority},
        record::MessageRecord,
        room::OpenMessages,
        time::{MonoMs, UnixMs},
    },
    ports::{
        Append, AppendLimits, Appended, Applied, Arrival, Claim, ClaimRequest, Claims, DestinationDepth,
        DueBatch, DueQuery, Ended, EntryId, Handle, Hint, ItemOutcome, Lease, LeaseRequest, LeaseToken,
        Ledger, LimitsSet, Outbox, Outgoing, Queue, QueueDepth, ReceiptLedger, Received, Release, Settled,
        Settlement, SourceCursor, StatusChange, Steering, StoreError, Taken, Transport, TransportLimits,
        Want,
    },
};

use super::metrics::{Metrics, StoreCall};

/// A store whose operations are counted and timed. A port's new operation belongs in here too; one with a
/// default body would otherwise be answered by the default.
pub struct Metered<S: ?Sized> {
    calls: Calls,
    inner: Arc<S>,
}

macro_rules! calls {
    ($($port:literal { $($operation:ident),* })*) => {
        struct Calls { $($($operation: StoreCall,)*)* }

        impl Calls {
            fn of(metrics: &Metrics) -> Self {
                Self { $($($operation: metrics.store_call($port, stringify!($operation)),)*)* }
            }
        }
    };
}

calls! {
    "outbox" { find_file, append, known_entries, open_messages }
    "claims" { due, first_turns, next_due, depths, claim, extend_claims, release_claims }
    "queue" { lease, extend, release, release_holder, rescue, acknowledge }
    "transport" { send, receive, hide, delete, queue_depth }
    "ledger" {
        settle, disable_destination, disabled_destinations, report, rejects, latest_files, timed_files, settled_files,
        mark_reported
    }
    "steering" { held_files, set_limits, change_hold, priorities, prioritize, end_step, trial }
    "receipts" {
        record, take, cursor, apply, waiting, parked, rejoin, orphan, expire, changes, forget_changes, retire
    }
}

impl<S: ?Sized> Metered<S> {
    /// Counts what is asked of `inner`.
    pub fn new(inner: Arc<S>, metrics: &Metrics) -> Self {
        Self { calls: Calls::of(metrics), inner }
    }
}

#[async_trait]
impl<S: Outbox + ?Sized> Outbox for Metered<S> {
    async fn find_file(&self, id: FileId) -> Result<Option<(FileState, Checkpoint)>, StoreError> {
        self.calls.find_file.count(self.inner.find_file(id)).await
    }

    fn append_limits(&self) -> AppendLimits {
        self.inner.append_limits()
    }

    async fn append(&self, append: Append) -> Result<Appended, StoreError> {
        self.calls.append.count(self.inner.append(append)).await
    }

    async fn known_entries(&self, entries: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        self.calls.known_entries.count(self.inner.known_entries(entries)).await
    }

    async fn open_messages(&self) -> Result<OpenMessages, StoreError> {
        self.calls.open_messages.count(self.inner.open_messages()).await
    }
}

#[async_trait]
impl<S: Claims + ?Sized> Claims for Metered<S> {
    async fn due(&self, query: DueQuery<'_>) -> Result<Vec<DueBatch>, StoreError> {
        self.calls.due.count(self.inner.due(query)).await
    }

    async fn first_turns(&self, want: &Want, due_by: UnixMs) -> Result<Vec<Hint>, StoreError> {
        self.calls.first_turns.count(self.inner.first_turns(want, due_by)).await
    }

    async fn next_due(&self) -> Result<Option<UnixMs>, StoreError> {
        self.calls.next_due.count(self.inner.next_due()).await
    }

    async fn depths(&self, now: UnixMs) -> Result<Vec<DestinationDepth>, StoreError> {
        self.calls.depths.count(self.inner.depths(now)).await
    }

    async fn claim(&self, request: ClaimRequest) -> Result<Vec<(BatchId, Claim)>, StoreError> {
        self.calls.claim.count(self.inner.claim(request)).await
    }

    async fn extend_claims(
        &self,
        tokens: &[LeaseToken],
        until: UnixMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        self.calls.extend_claims.count(self.inner.extend_claims(tokens, until)).await
    }

    async fn release_claims(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        self.calls.release_claims.count(self.inner.release_claims(tokens, how)).await
    }
}

#[async_trait]
impl<S: Transport + ?Sized> Transport for Metered<S> {
    fn limits(&self) -> TransportLimits {
        self.inner.limits()
    }

    async fn send(
        &self,
        destination: &str,
        entries: &[Outgoing],
        delay: Duration,
    ) -> Result<Vec<ItemOutcome>, StoreError> {
        self.calls.send.count(self.inner.send(destination, entries, delay)).await
    }

    async fn receive(
        &self,
        destination: &str,
        max: usize,
        wait: Duration,
        hidden: Duration,
    ) -> Result<Vec<Received>, StoreError> {
        self.calls.receive.count(self.inner.receive(destination, max, wait, hidden)).await
    }

    async fn hide(
        &self,
        destination: &str,
        changes: &[(Handle, Duration)],
    ) -> Result<Vec<ItemOutcome>, StoreError> {
        self.calls.hide.count(self.inner.hide(destination, changes)).await
    }

    async fn delete(&self, destination: &str, handles: &[Handle]) -> Result<Vec<ItemOutcome>, StoreError> {
        self.calls.delete.count(self.inner.delete(destination, handles)).await
    }

    async fn depth(&self, destination: &str) -> Result<QueueDepth, StoreError> {
        self.calls.queue_depth.count(self.inner.depth(destination)).await
    }
}

#[async_trait]
impl<S: Queue + ?Sized> Queue for Metered<S> {
    fn on_arrival(&self, ring: Arc<dyn Fn() + Send + Sync>) {
        self.inner.on_arrival(ring);
    }

    async fn acknowledge(&self, tokens: &[LeaseToken]) -> Result<(), StoreError> {
        self.calls.acknowledge.count(self.inner.acknowledge(tokens)).await
    }

    async fn lease(&self, request: LeaseRequest) -> Result<Vec<Lease>, StoreError> {
        self.calls.lease.count(self.inner.lease(request)).await
    }

    async fn extend(
        &self,
        tokens: &[LeaseToken],
        until: MonoMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        self.calls.extend.count(self.inner.extend(tokens, until)).await
    }

    async fn release(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        self.calls.release.count(self.inner.release(tokens, how)).await
    }

    async fn release_holder(&self, holder: &str) -> Result<usize, StoreError> {
        self.calls.release_holder.count(self.inner.release_holder(holder)).await
    }

    async fn rescue(&self, now: MonoMs) -> Result<usize, StoreError> {
        self.calls.rescue.count(self.inner.rescue(now)).await
    }
}

#[async_trait]
impl<S: Ledger + ?Sized> Ledger for Metered<S> {
    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<Settled>, StoreError> {
        self.calls.settle.count(self.inner.settle(settlements)).await
    }

    async fn disable_destination(&self, name: &str, reason: &str, at: UnixMs) -> Result<(), StoreError> {
        self.calls.disable_destination.count(self.inner.disable_destination(name, reason, at)).await
    }

    async fn disabled_destinations(&self) -> Result<Vec<Arc<str>>, StoreError> {
        self.calls.disabled_destinations.count(self.inner.disabled_destinations()).await
    }

    async fn report(&self, file: FileId) -> Result<Option<FileReport>, StoreError> {
        self.calls.report.count(self.inner.report(file)).await
    }

    async fn rejects(&self, file: FileId, after: u64, limit: usize) -> Result<Vec<Reject>, StoreError> {
        self.calls.rejects.count(self.inner.rejects(file, after, limit)).await
    }

    async fn latest_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.calls.latest_files.count(self.inner.latest_files(limit)).await
    }

    async fn timed_files(&self, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.calls.timed_files.count(self.inner.timed_files(limit)).await
    }

    async fn settled_files(&self, feed: &str, limit: usize) -> Result<Vec<FileReport>, StoreError> {
        self.calls.settled_files.count(self.inner.settled_files(feed, limit)).await
    }

    async fn mark_reported(&self, files: &[FileId]) -> Result<(), StoreError> {
        self.calls.mark_reported.count(self.inner.mark_reported(files)).await
    }
}

#[async_trait]
impl<S: Steering + ?Sized> Steering for Metered<S> {
    async fn held_files(&self) -> Result<Vec<HeldFile>, StoreError> {
        self.calls.held_files.count(self.inner.held_files()).await
    }

    async fn set_limits(&self) -> Result<LimitsSet, StoreError> {
        self.calls.set_limits.count(self.inner.set_limits()).await
    }

    async fn change_hold(
        &self,
        file: FileId,
        destination: Option<&str>,
        change: &HoldChange,
    ) -> Result<usize, StoreError> {
        self.calls.change_hold.count(self.inner.change_hold(file, destination, change)).await
    }

    async fn priorities(&self) -> Result<Vec<FilePriority>, StoreError> {
        self.calls.priorities.count(self.inner.priorities()).await
    }

    async fn prioritize(
        &self,
        file: FileId,
        destination: Option<&str>,
        priority: Priority,
    ) -> Result<usize, StoreError> {
        self.calls.prioritize.count(self.inner.prioritize(file, destination, priority)).await
    }

    async fn end_step(&self, batches: usize, now: UnixMs) -> Result<Ended, StoreError> {
        self.calls.end_step.count(self.inner.end_step(batches, now)).await
    }

    async fn trial(&self, file: FileId, destination: &str, before: u64) -> Result<Trial, StoreError> {
        self.calls.trial.count(self.inner.trial(file, destination, before)).await
    }
}

#[async_trait]
impl<S: ReceiptLedger + ?Sized> ReceiptLedger for Metered<S> {
    async fn record(&self, records: Vec<MessageRecord>) -> Result<(), StoreError> {
        self.calls.record.count(self.inner.record(records)).await
    }

    async fn take(&self, arrival: Arrival) -> Result<Taken, StoreError> {
        self.calls.take.count(self.inner.take(arrival)).await
    }

    async fn cursor(&self, source: &str) -> Result<Option<SourceCursor>, StoreError> {
        self.calls.cursor.count(self.inner.cursor(source)).await
    }

    async fn apply(&self, receipts: usize, bytes: usize, at: UnixMs) -> Result<Applied, StoreError> {
        self.calls.apply.count(self.inner.apply(receipts, bytes, at)).await
    }

    async fn waiting(&self) -> Result<u64, StoreError> {
        self.calls.waiting.count(self.inner.waiting()).await
    }

    async fn parked(&self) -> Result<u64, StoreError> {
        self.calls.parked.count(self.inner.parked()).await
    }

    async fn rejoin(&self, limit: usize) -> Result<usize, StoreError> {
        self.calls.rejoin.count(self.inner.rejoin(limit)).await
    }

    async fn orphan(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        self.calls.orphan.count(self.inner.orphan(before, limit)).await
    }

    async fn expire(
        &self,
        destination: &str,
        before: UnixMs,
        limit: usize,
        at: UnixMs,
    ) -> Result<usize, StoreError> {
        self.calls.expire.count(self.inner.expire(destination, before, limit, at)).await
    }

    async fn changes(&self, after: Option<u64>, limit: usize) -> Result<Vec<StatusChange>, StoreError> {
        self.calls.changes.count(self.inner.changes(after, limit)).await
    }

    async fn forget_changes(&self, numbers: &[u64]) -> Result<(), StoreError> {
        self.calls.forget_changes.count(self.inner.forget_changes(numbers)).await
    }

    async fn retire(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        self.calls.retire.count(self.inner.retire(before, limit)).await
    }
}
