//! Files and records of batches, as they are stored now or as they were last seen.

use std::collections::hash_map::Entry;

use postrider_actors::{
    model::ids::{BatchId, FileId},
    ports::StoreError,
};

use super::{
    cache::lock,
    cache::{CACHED_MAX, make_room},
    calls::GetOutcome,
    files::StoredFile,
    record::{Records, StoredBatch},
    state::Shared,
};

impl Shared {
    /// A file as it is stored now.
    pub(super) async fn read_file(&self, id: FileId) -> Result<Option<StoredFile>, StoreError> {
        let item = self.calls.get("reading a file", StoredFile::key(id)).await?;
        let file = item.as_ref().map(StoredFile::read).transpose()?;
        self.cache_file(id, file.clone());
        Ok(file)
    }

    pub(super) fn cached_file(&self, id: FileId) -> Option<StoredFile> {
        lock(&self.files).get(&id).cloned()
    }

    /// Whether another machine has been ahead with a file; with `note`, it has now.
    pub(super) fn is_moved(&self, id: FileId, note: bool) -> bool {
        let mut moved = lock(&self.moved);
        if note {
            if moved.len() >= CACHED_MAX {
                moved.clear();
            }
            moved.insert(id);
        }
        moved.contains(&id)
    }

    pub(super) fn cache_file(&self, id: FileId, file: Option<StoredFile>) {
        let mut files = lock(&self.files);
        match file {
            Some(file) => {
                make_room(&mut files);
                files.insert(id, file);
            }
            None => {
                files.remove(&id);
            }
        }
    }

    /// A record as it was when it was last seen.
    pub(super) fn cached_record(&self, id: BatchId) -> Option<StoredBatch> {
        lock(&self.records).get(&id).cloned().flatten()
    }

    pub(super) fn cache_record(&self, record: StoredBatch) {
        let mut records = lock(&self.records);
        make_room(&mut records);
        match records.entry(record.id) {
            Entry::Occupied(mut known) => {
                // An answer that was overtaken tells nothing new.
                if known.get().as_ref().is_none_or(|known| known.version <= record.version) {
                    known.insert(Some(record));
                }
            }
            Entry::Vacant(unknown) => {
                unknown.insert(Some(record));
            }
        }
    }

    pub(super) fn forget_record(&self, id: BatchId) {
        lock(&self.records).remove(&id);
    }

    /// Records as they are stored now; with `cached`, those that are remembered as they were seen. What the service did not
    /// get to is left out, and answered apart. A damaged one is named and taken to be missing: nothing becomes of it, and
    /// it holds up no other (F61).
    pub(super) async fn look_up(
        &self,
        known: &mut Records,
        ids: impl IntoIterator<Item = BatchId>,
        cached: bool,
    ) -> Result<Vec<BatchId>, StoreError> {
        let mut missing = Vec::new();
        for id in ids {
            if known.contains_key(&id) || missing.contains(&id) {
                continue;
            }
            match self.cached_record(id).filter(|_| cached) {
                Some(record) => {
                    known.insert(id, Some(record));
                }
                None => missing.push(id),
            }
        }
        let mut unread = Vec::new();
        if missing.is_empty() {
            return Ok(unread);
        }
        let keys: Vec<_> = missing.iter().map(|id| StoredBatch::key(*id)).collect();
        let found = self.calls.get_many("reading records", &self.calls.tables.ledger, &keys, None).await?;
        for (id, got) in missing.into_iter().zip(found) {
            let record = match got {
                GetOutcome::Item(item) => match StoredBatch::read(&item) {
                    Ok(record) => Some(record),
                    Err(damaged) => {
                        tracing::error!(batch = %id, %damaged, "a batch's record can't be read: it is left alone");
                        None
                    }
                },
                GetOutcome::Missing => None,
                GetOutcome::Unprocessed => {
                    unread.push(id);
                    continue;
                }
            };
            if let Some(record) = &record {
                self.cache_record(record.clone());
            }
            known.insert(id, record);
        }
        Ok(unread)
    }

    /// The same where all are needed.
    pub(super) async fn look_up_all(
        &self,
        known: &mut Records,
        ids: impl IntoIterator<Item = BatchId>,
        cached: bool,
    ) -> Result<(), StoreError> {
        if self.look_up(known, ids, cached).await?.is_empty() {
            return Ok(());
        }
        Err(StoreError::Retryable("reading records: some were not read".into()))
    }
}
