//! Entries of inbound queues that were taken (B22): `model::entries` packs them, here a group is read, and its head is
//! written if nobody else has changed it.
//!
//! A group that this process does not know is taken to be new: in most minutes nobody else takes anything, and if
//! somebody has, the condition does not hold. Of a feed that another process reads too, each step looks first: a query
//! costs a tenth of a transaction that is refused.

use std::sync::Arc;

use aws_sdk_dynamodb::types::TransactWriteItem;
use futures_util::{StreamExt as _, stream};
use postrider_actors::{
    model::entries::{EntryGroup, GroupChange},
    ports::{EntryId, StoreError},
};

use super::{
    cache::lock,
    calls::PARALLEL_CALLS,
    change::{Change, When, put},
    entry_groups::{GroupKey, Groups, key_of},
    item::{BODY, COUNT, EXPIRES_AT, PK, Reading, SK, VERSION, blob, number},
    keys::{self, ledger_key},
    state::Shared,
};

/// How often a group is read that somebody is writing.
const READS: usize = 4;

impl Shared {
    /// Which of these were taken before.
    pub(super) async fn known_entries(&self, entries: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        let groups = self.cached_groups(entries);
        let taken = groups.taken(entries);
        if taken.len() == entries.len() {
            return Ok(taken);
        }
        Ok(self.read_groups(groups).await?.taken(entries))
    }

    /// The groups of a step's entries, as they are known.
    pub(super) async fn groups_of(&self, entries: &[EntryId]) -> Result<Groups, StoreError> {
        let groups = self.cached_groups(entries);
        let is_shared = entries.first().is_some_and(|entry| lock(&self.entries).is_shared(&entry.feed));
        if is_shared { self.read_groups(groups).await } else { Ok(groups) }
    }

    fn cached_groups(&self, entries: &[EntryId]) -> Groups {
        let cache = lock(&self.entries);
        let group = |key: GroupKey| {
            let known = cache.get(&key).unwrap_or_default();
            (key, known)
        };
        Groups(entries.iter().map(key_of).map(group).collect())
    }

    /// What a step adds to groups, each if it is still as it was read.
    pub(super) fn write_groups(
        &self,
        changes: &[(GroupKey, GroupChange)],
    ) -> Result<Vec<TransactWriteItem>, StoreError> {
        let table = &self.calls.tables.ledger;
        let expires = number(self.clock.wall().after(self.settings.entry_retention).0 / 1000);
        let mut actions = Vec::with_capacity(changes.len());
        for ((minute, feed), change) in changes {
            let pk = keys::entries_pk(feed, *minute);
            let before = change.version - 1;
            let when = if before == 0 { When::Missing(PK) } else { When::Is(VERSION, number(before)) };
            let head = Change::of(table, ledger_key(&pk, keys::ENTRIES_HEAD_SK))
                .set(VERSION, number(change.version))
                .set(COUNT, number(change.count))
                .set(BODY, blob(change.head()))
                .set(EXPIRES_AT, expires.clone())
                .when(when);
            actions.push(head.action()?);
            if let Some(body) = change.chunk() {
                let mut chunk = ledger_key(&pk, &keys::entries_sk(change.version));
                chunk.insert(BODY.to_owned(), blob(body));
                chunk.insert(EXPIRES_AT.to_owned(), expires.clone());
                actions.push(put(table, chunk, None)?);
            }
        }
        Ok(actions)
    }

    /// A step has added to these groups.
    pub(super) fn groups_written(&self, groups: Groups, changes: Vec<(GroupKey, GroupChange)>) {
        let mut cache = lock(&self.entries);
        let mut groups = groups.0;
        for (key, change) in changes {
            let Some(mut group) = groups.remove(&key) else { continue };
            // The last copy, unless somebody looks at it: then it is changed as it stands.
            cache.remove(&key);
            Arc::make_mut(&mut group).written(change);
            cache.insert(key, group);
        }
    }

    /// Whether a step has added to these groups is not known.
    pub(super) fn forget_groups(&self, groups: &Groups) {
        let mut cache = lock(&self.entries);
        for key in groups.0.keys() {
            cache.remove(key);
        }
    }

    /// Reads groups that others have added to.
    pub(super) async fn groups_moved_on(&self, groups: &Groups) -> Result<(), StoreError> {
        let read = self.read_groups(groups.clone()).await?;
        for (key, group) in &groups.0 {
            // One that was not known here may be of this process's last life.
            if group.version() > 0 && read.0[key].version() > group.version() {
                lock(&self.entries).note_shared(key.1.clone());
            }
        }
        Ok(())
    }

    /// Groups as they are stored now.
    async fn read_groups(&self, groups: Groups) -> Result<Groups, StoreError> {
        let reads: Vec<_> = groups.0.into_iter().map(|(key, group)| self.read_group(key, group)).collect();
        let read: Vec<Result<_, StoreError>> = stream::iter(reads).buffered(PARALLEL_CALLS).collect().await;
        let read = Groups(read.into_iter().collect::<Result<_, _>>()?);
        let mut cache = lock(&self.entries);
        for (key, group) in read.0.iter().filter(|(_, group)| group.version() > 0) {
            cache.insert(key.clone(), group.clone());
        }
        Ok(read)
    }

    async fn read_group(
        &self,
        key: GroupKey,
        known: Arc<EntryGroup>,
    ) -> Result<(GroupKey, Arc<EntryGroup>), StoreError> {
        let pk = keys::entries_pk(&key.1, key.0);
        for _ in 0..READS {
            let (mut items, mut from) = (Vec::new(), None);
            loop {
                let after = [(":seen", keys::entries_sk(known.version()))];
                let call = self.calls.in_partition(&*pk, "Sk > :seen", after).set_exclusive_start_key(from);
                let (page, next) = self.calls.query("looking for entries", call).await?;
                items.extend(page);
                from = next;
                if from.is_none() {
                    break;
                }
            }
            let (mut head, mut chunks) = (None, Vec::with_capacity(items.len()));
            for item in &items {
                let reading = Reading(item);
                if reading.text(SK)? == keys::ENTRIES_HEAD_SK {
                    head = Some((reading.number(VERSION)?, reading.number(COUNT)?, reading.bytes(BODY)?));
                } else {
                    chunks.push(reading.bytes(BODY)?);
                }
            }
            let Some((version, count, ids)) = head else {
                return Ok((key, Arc::default())); // nobody has added to it
            };
            if version == known.version() {
                return Ok((key, known));
            }
            if let Some(group) = EntryGroup::clone(&known).read(version, count, ids, chunks) {
                return Ok((key, Arc::new(group)));
            }
        }
        Err(StoreError::Retryable(
            "looking for entries: a group is being written, or a part of it is missing".into(),
        ))
    }
}
