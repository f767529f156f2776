//! `Outbox::append`: rows and checkpoint in one transaction.

use std::{collections::BTreeMap, sync::Arc};

use aws_sdk_dynamodb::types::TransactWriteItem;
use postrider_actors::{
    model::{
        batch::NewBatch,
        codec,
        entries::GroupChange,
        file::{FileState, Reject},
        ids::FileId,
        time::UnixMs,
    },
    ports::{Append, AppendLimits, Appended, HoldStep, StoreError},
};

use super::{
    cache::lock,
    calls::{ACTIONS_MAX, TransactOutcome},
    change::put,
    depth::DepthChange,
    entry_groups::{GroupKey, Groups},
    files::{StoredFile, json},
    item::{BATCHES, BODY, FEED, FILE, Item, NAME, blob, text},
    keys::{self, ledger_key},
    payload::NewPayload,
    record::StoredBatch,
    state::Shared,
};
/// Actions that a step takes beside its batches' records and its entries: the file, its place among files and among
/// open ones, where its batches are, and the depth.
const FIXED_ACTIONS: usize = 5;

/// What one step may hold. The actions of a transaction are divided between batches and groups of entries; payloads are
/// stored ahead of it, in calls of up to 16 MB.
pub(super) const LIMITS: AppendLimits = AppendLimits { batches: 40, bytes: 4_000_000, entry_minutes: 15 };

// A process makes each destination known once; a group of entries has a head and a chunk.
const _: () =
    assert!(LIMITS.batches + 2 * LIMITS.entry_minutes + FIXED_ACTIONS + DESTINATIONS_MAX <= ACTIONS_MAX);

/// Destinations that one feed may have: each row becomes a batch for every one of them in the same
/// transaction.
pub const DESTINATIONS_MAX: usize = 20;

/// Bytes per stored chunk of rejected rows.
const REJECT_CHUNK_BYTES: usize = 128 * 1024;

/// Bytes of a rejected row that are kept: its item must hold it.
const REJECT_RAW_MAX: usize = 256 * 1024;

/// How often a step is built again when another one of its file came first.
const ROUNDS: usize = 6;

/// What a refused action was about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    File,
    Entries,
    Batch,
    Else,
}

impl Shared {
    pub(super) async fn append(&self, mut append: Append) -> Result<Appended, StoreError> {
        let id = append.file.id;
        let _turn = self.appending[usize::from(id.0[0]) % self.appending.len()].lock().await;
        // Whoever goes on with a file has looked it up; what is not known here is taken to be new, and read if it is not.
        let mut known = self.cached_file(id);
        let mut is_current = false;
        // Once another machine was ahead, this one's steps begin and end where no other's do.
        if let Some(file) = known.as_ref().filter(|_| self.is_moved(id, false)) {
            append = append.after(file.checkpoint.rows).map_err(StoreError::Permanent)?;
        }
        for _ in 0..ROUNDS {
            match self.append_to(&append, known.as_ref(), is_current).await {
                Ok(Some(appended)) => return Ok(appended),
                Ok(None) => {
                    let before = known.map(|file| file.checkpoint).unwrap_or_default();
                    known = self.read_file(id).await?;
                    is_current = true;
                    // Another machine reads the same file and is ahead: this one goes on from there.
                    let now = known.as_ref().map(|file| file.checkpoint).unwrap_or_default();
                    if now.rows > before.rows {
                        self.is_moved(id, true);
                        append = append.after(now.rows).map_err(StoreError::Permanent)?;
                    }
                }
                Err(error) => {
                    self.cache_file(id, None);
                    return Err(error);
                }
            }
        }
        Err(StoreError::Retryable(format!("file {id} is being changed by somebody else")))
    }

    /// Stores a step behind `stored`; `None` if that is not how the file stands. `is_current` if it was just read.
    async fn append_to(
        &self,
        append: &Append,
        stored: Option<&StoredFile>,
        is_current: bool,
    ) -> Result<Option<Appended>, StoreError> {
        let id = append.file.id;
        let before = stored.map(|file| file.checkpoint).unwrap_or_default();
        let after = append.checkpoint;
        let advances = (after.rows, after.offset) > (before.rows, before.offset);
        let mut file = stored.cloned().unwrap_or_else(|| StoredFile {
            record: (*append.file).clone(),
            checkpoint: before,
            state: FileState::Ingesting,
            closed_at: None,
            stamp: self.stamp(),
            owner: self.node.clone(),
            reported: None,
            version: 0,
        });
        // An ingested file stays so: what comes late is a repetition.
        let changes_state = append.state != file.state && file.state != FileState::Ingested;
        if stored.is_some() && !advances && !changes_state {
            // The file may have gone on since it was cached, but never back.
            return Ok(Some(Appended::Stored));
        }
        if advances {
            if file.state == FileState::Ingested {
                return Err(StoreError::Permanent(format!(
                    "file {id} is ingested with {} rows; it can't go on to row {}",
                    before.rows, after.rows
                )));
            }
            if let Err(why) = append.check_balance(&before) {
                // Perhaps the file is not as it was taken to be.
                return if is_current { Err(StoreError::Permanent(why)) } else { Ok(None) };
            }
            self.put_rejects(append).await?;
            file.checkpoint = after;
        }
        // Before the rows are there, or another machine could send them meanwhile; what is held of a file that is not
        // there is harmless.
        if let Some(HoldStep { destinations, change }) = &append.hold {
            let names: Vec<_> = destinations.iter().map(|name| &**name).collect();
            match self.change_hold_of(&[(&append.file, names)], change).await {
                Err(StoreError::Permanent(why)) => {
                    tracing::warn!(file = %id, why, "the file goes without a canary");
                }
                changed => drop(changed?),
            }
        }
        if changes_state {
            file.state = append.state.clone();
            file.closed_at = append.state.is_closed().then_some(append.at);
        }
        let groups = if advances { self.groups_of(&append.entries).await? } else { Groups::new() };
        let taken = groups.taken(&append.entries);
        if !taken.is_empty() {
            // Perhaps by this very step.
            return Ok(is_current.then_some(Appended::Known(taken)));
        }
        let entries = groups.add(&append.entries);
        let slot = self.depth.slot().await;
        let batches: &[NewBatch] = if advances { &append.batches } else { &[] };
        let mut messages = DepthChange::new();
        for batch in batches {
            *messages.entry(batch.header.destination.as_str().into()).or_default() += i64::from(batch.count);
        }
        let records = self.records_of(batches).await?;
        let new: Vec<_> = records.iter().map(|record| (record, self.stamp())).collect();
        let (mut actions, about) = self.actions(append, &file, stored.is_none(), &entries, &new)?;
        if !messages.is_empty() {
            actions.push(self.depth.change(&self.calls.tables.ledger, &slot.name(), &messages)?);
            actions.extend(self.register(&append.file.destinations)?);
        }
        match self.calls.transact("storing a step", actions).await {
            Ok(TransactOutcome::Done) => {}
            Ok(TransactOutcome::Refused(refused)) => {
                let of = |index: &usize| about.get(*index).copied().unwrap_or(About::Else);
                if refused.iter().any(|index| of(index) == About::File) {
                    return Ok(None);
                }
                if refused.iter().any(|index| of(index) == About::Entries) {
                    self.groups_moved_on(&groups).await?;
                    return Ok(None);
                }
                return Err(StoreError::Permanent(format!(
                    "file {id}: batches between rows {} and {} are stored already, but its checkpoint is not \
                     beyond them",
                    before.rows, after.rows
                )));
            }
            Err(error) => {
                // It may be stored all the same; a sweep finds its batches then.
                self.forget_groups(&groups);
                self.depth.unknown();
                return Err(error);
            }
        }
        drop(slot);
        self.groups_written(groups, entries);
        file.version = stored.map_or(0, |stored| stored.version + 1);
        file.reported = None;
        self.depth.changed(&messages);
        if !messages.is_empty() {
            self.registered(&append.file.destinations);
        }
        self.touched(&file.record.feed, id, stored.is_none());
        self.note_times(&file.record, true);
        self.cache_file(id, Some(file));
        for (record, stamp) in &new {
            self.waits(record, record.record.not_before, *stamp);
        }
        for record in records {
            self.cache_record(record);
        }
        Ok(Some(Appended::Stored))
    }

    /// The actions that store a step, and what the first of them are about.
    fn actions(
        &self,
        append: &Append,
        file: &StoredFile,
        is_new: bool,
        entries: &[(GroupKey, GroupChange)],
        new: &[(&StoredBatch, u64)],
    ) -> Result<(Vec<TransactWriteItem>, Vec<About>), StoreError> {
        let id = append.file.id;
        let table = &self.calls.tables.ledger;
        let mut actions = vec![if is_new { file.insert(table)? } else { file.replace(table)? }];
        let mut about = vec![About::File];
        for action in self.write_groups(entries)? {
            actions.push(action);
            about.push(About::Entries);
        }
        for &(record, stamp) in new {
            let stamp = self.stamp_of(&record.record, stamp);
            actions.push(record.insert(table, self.settings.shards(), stamp)?);
            about.push(About::Batch);
        }
        if !new.is_empty() {
            actions.push(put(table, step_of_file(append)?, None)?);
        }
        if is_new {
            let mut listed = ledger_key(keys::FILES_PK, &keys::stamped_sk(file.stamp, id));
            listed.insert(NAME.to_owned(), text(&file.record.name));
            listed.insert(FEED.to_owned(), text(&file.record.feed));
            listed.insert(FILE.to_owned(), text(id.to_string()));
            actions.push(put(table, listed, None)?);
        }
        if is_new || file.reported.is_some() {
            actions.push(put(table, file.open_item(), None)?);
        }
        if actions.len() >= ACTIONS_MAX {
            return Err(StoreError::Permanent(format!(
                "a step of file {id} with {} batches and {} groups of entries does not fit into one transaction: a feed of \
                 a DynamoDB outbox may have up to {DESTINATIONS_MAX} destinations",
                append.batches.len(),
                entries.len()
            )));
        }
        Ok((actions, about))
    }

    /// Stores what new batches carry; their records.
    async fn records_of(&self, batches: &[NewBatch]) -> Result<Vec<StoredBatch>, StoreError> {
        let new = batches.iter().map(NewPayload::of).collect::<Result<Vec<_>, _>>()?;
        let ids: Vec<_> = new.iter().map(|payload| payload.id).collect();
        // A batch that is refused must not have its payload stored before.
        let records = batches.iter().zip(&ids).map(|(batch, id)| StoredBatch::of(batch, *id, UnixMs(0)));
        let mut records = records.collect::<Result<Vec<_>, _>>()?;
        let kept = self.put_payloads(new).await?;
        for record in &mut records {
            record.kept_until = kept[&record.payload];
        }
        Ok(records)
    }

    /// Writes rejects and duplicates ahead of the transaction: they may be more than it takes. What a crash
    /// leaves behind is beyond the checkpoint and not shown, and is written again as it is.
    async fn put_rejects(&self, append: &Append) -> Result<(), StoreError> {
        let pk = keys::file_pk(append.file.id);
        let mut items: Vec<Item> = Vec::new();
        let mut put = |sk: String, body: Vec<u8>| {
            let mut item = ledger_key(&pk, &sk);
            item.insert(BODY.to_owned(), blob(body));
            items.push(item);
        };
        for chunk in chunks(&append.rejects) {
            let last = chunk.last().expect("a chunk has a row").row;
            put(keys::rejects_sk(last), codec::encode_rejects(&chunk));
        }
        // A row number takes at most ten bytes.
        for rows in append.duplicates.chunks(REJECT_CHUNK_BYTES / 10) {
            let last = *rows.last().expect("a chunk has a row");
            put(keys::duplicates_sk(last), codec::encode_row_numbers(rows));
        }
        self.calls.put_all("storing rejected rows", &self.calls.tables.ledger, items).await
    }

    /// Takes note that a file may have settled, or be open again; `is_first`: it was not known before.
    fn touched(&self, feed: &str, id: FileId, is_first: bool) {
        let now = is_first.then(|| self.clock.mono());
        lock(&self.reporting).touch(Arc::from(feed), id, now);
    }
}

/// Where the batches of a step are found by their rows: the first rows of each destination's.
fn step_of_file(append: &Append) -> Result<Item, StoreError> {
    let mut batches: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for batch in &append.batches {
        batches.entry(&batch.header.destination).or_default().push(batch.first_row);
    }
    let mut step = ledger_key(&keys::file_pk(append.file.id), &keys::step_sk(append.checkpoint.rows));
    step.insert(BATCHES.to_owned(), text(json(&batches)?));
    Ok(step)
}

/// Rejected rows in chunks that fit an item each.
fn chunks(rejects: &[Reject]) -> Vec<Vec<Reject>> {
    let mut chunks: Vec<Vec<Reject>> = Vec::new();
    let mut bytes = 0;
    for reject in rejects {
        let mut reject = reject.clone();
        reject.raw.truncate(REJECT_RAW_MAX);
        let size = reject.raw.len() + reject.reason.len() + 16;
        match chunks.last_mut() {
            Some(chunk) if bytes + size <= REJECT_CHUNK_BYTES => {
                bytes += size;
                chunk.push(reject);
            }
            _ => {
                bytes = size;
                chunks.push(vec![reject]);
            }
        }
    }
    chunks
}
