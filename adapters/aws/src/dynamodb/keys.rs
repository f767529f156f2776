//! The keys of items and indexes: see [`super::schema`] for the layout.

use postrider_actors::model::{
    ids::{BatchId, FileId},
    ledger::Failure,
    shard::shard,
};

use super::item::{Damaged, Item, PK, Reading, SK, item, text};

pub(super) const OUTSTANDING: &str = "Outstanding";
pub(super) const OUTSTANDING_ALL_TOPICS: &str = "OutstandingAllTopics";
pub(super) const DELIVERED: &str = "Delivered";
pub(super) const DELIVERED_ALL_TOPICS: &str = "DeliveredAllTopics";

pub(super) const BATCH_PREFIX: &str = "batch#";
pub(super) const BATCH_SK: &str = "batch";
pub(super) const HISTORY_PREFIX: &str = "history#";
pub(super) const STEP_PREFIX: &str = "step#";
pub(super) const FILE_SK: &str = "file";
pub(super) const FILES_PK: &str = "files";
pub(super) const DEAD_PK: &str = "dead";
pub(super) const ENTRIES_HEAD_SK: &str = "head";
pub(super) const DEPTH_PK: &str = "depth";
pub(super) const CLUSTER_PK: &str = "cluster";
pub(super) const AUDIT_PK: &str = "audit";
pub(super) const DESTINATIONS_PK: &str = "destinations";

/// The key of an item in the ledger table.
pub(super) fn ledger_key(pk: &str, sk: &str) -> Item {
    item([(PK, text(pk)), (SK, text(sk))])
}

/// The batch whose partition of the ledger table an item is in: indexes bring the table's key along.
pub(super) fn batch_of_key(item: &Item) -> Result<BatchId, Damaged> {
    let id = Reading(item).text(PK)?.strip_prefix(BATCH_PREFIX);
    id.and_then(|id| id.parse().ok()).ok_or(Damaged(PK))
}

pub(super) fn batch_pk(id: BatchId) -> String {
    format!("{BATCH_PREFIX}{id}")
}

/// Where a group of failed attempts is kept: no other group has the same first one.
pub(super) fn history_sk(fence: u64, first: &Failure) -> String {
    let Failure { drive, attempt_number, index, .. } = first;
    format!("{HISTORY_PREFIX}{fence:016x}#{drive:08x}#{attempt_number:08x}#{index:08x}")
}

pub(super) fn file_pk(id: FileId) -> String {
    format!("file#{id}")
}

pub(super) fn step_sk(last_row: u64) -> String {
    format!("{STEP_PREFIX}{last_row:016x}")
}

pub(super) fn counts_sk(destination: &str, node: &str) -> String {
    format!("file#{destination}#{node}")
}

pub(super) fn rejects_sk(last_row: u64) -> String {
    format!("rejects#{last_row:016x}")
}

pub(super) fn duplicates_sk(last_row: u64) -> String {
    format!("duplicates#{last_row:016x}")
}

pub(super) fn stamped_sk(stamp: u64, file: FileId) -> String {
    format!("{stamp:016x}#{file}")
}

pub(super) fn open_pk(node: &str, feed: &str) -> String {
    format!("open#{node}#{feed}")
}

/// Of a batch with dead messages.
pub(super) fn dead_sk(file: FileId, destination: &str, first_row: u64, id: BatchId) -> String {
    format!("{file}#{destination}#{first_row:016x}#{id}")
}

pub(super) fn entries_pk(feed: &str, minute: u64) -> String {
    format!("entries#{feed}#{minute:08x}")
}

/// Of a chunk of entries: before the head's.
pub(super) fn entries_sk(version: u64) -> String {
    format!("{version:016x}")
}

pub(super) fn rate_pk(destination: &str) -> String {
    format!("rate#{destination}")
}

/// The shard of one destination's batches of a file in the indexes (S3.9).
pub(super) fn topic_shard(destination: &str, file: FileId, shards: u32) -> String {
    topic_shard_key(destination, shard(Some(&file.to_string()), shards, 0))
}

pub(super) fn topic_shard_key(destination: &str, shard: u32) -> String {
    format!("{destination}#{shard:02}")
}

/// How many shards batches are spread over in the indexes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shards {
    /// In those of one destination's batches.
    pub(super) of_destination: u32,
    /// In those of all.
    pub(super) of_all: u32,
}

/// The shard of a batch in the indexes over all destinations.
pub(super) fn batch_shard(id: BatchId, shards: u32) -> u32 {
    shard(Some(&id.to_string()), shards, 0)
}
