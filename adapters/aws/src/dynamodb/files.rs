//! A file's own item in the ledger table.

use aws_sdk_dynamodb::types::TransactWriteItem;
use postrider_actors::{
    model::{
        file::{Checkpoint, FileRecord, FileState},
        ids::FileId,
        time::UnixMs,
    },
    ports::StoreError,
};

use super::{
    change::{Change, When, put},
    item::{
        CLOSED_AT, DUPLICATES, Damaged, FEED, Item, OFFSET, OWNER, RECORD, REJECTED, REPORTED, ROWS_READ,
        Reading, STAMP, STATE, VERSION, item, number, text, time,
    },
    keys::{self, ledger_key},
};

/// A file as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredFile {
    pub(super) record: FileRecord,
    pub(super) checkpoint: Checkpoint,
    pub(super) state: FileState,
    pub(super) closed_at: Option<UnixMs>,
    /// When it was stored first, unique within its owner: the order of files.
    pub(super) stamp: u64,
    /// The node that writes its report.
    pub(super) owner: String,
    /// How it stood when its report was written: see `reports::FileStatus::mark`.
    pub(super) reported: Option<String>,
    /// Counts the steps.
    pub(super) version: u64,
}

impl StoredFile {
    pub(super) fn key(id: FileId) -> Item {
        ledger_key(&keys::file_pk(id), keys::FILE_SK)
    }

    pub(super) fn read(item: &Item) -> Result<Self, Damaged> {
        let reading = Reading(item);
        let record = serde_json::from_str(reading.text(RECORD)?).map_err(|_| Damaged(RECORD))?;
        let state = serde_json::from_str(reading.text(STATE)?).map_err(|_| Damaged(STATE))?;
        Ok(Self {
            record,
            checkpoint: Checkpoint {
                offset: reading.number(OFFSET)?,
                rows: reading.number(ROWS_READ)?,
                rejected: reading.number(REJECTED)?,
                duplicates: reading.number(DUPLICATES)?,
            },
            state,
            closed_at: reading.maybe_number(CLOSED_AT)?.map(UnixMs),
            stamp: reading.number(STAMP)?,
            owner: reading.text(OWNER)?.to_owned(),
            reported: reading.maybe_text(REPORTED)?.map(str::to_owned),
            version: reading.number(VERSION)?,
        })
    }

    /// What a step changes.
    fn step(&self) -> Result<Vec<(&'static str, aws_sdk_dynamodb::types::AttributeValue)>, StoreError> {
        let mut step = vec![
            (STATE, text(json(&self.state)?)),
            (OFFSET, number(self.checkpoint.offset)),
            (ROWS_READ, number(self.checkpoint.rows)),
            (REJECTED, number(self.checkpoint.rejected)),
            (DUPLICATES, number(self.checkpoint.duplicates)),
        ];
        step.extend(self.closed_at.map(|at| (CLOSED_AT, time(at))));
        Ok(step)
    }

    /// The action that stores it, if it is new.
    pub(super) fn insert(&self, table: &str) -> Result<TransactWriteItem, StoreError> {
        let mut written = Self::key(self.record.id);
        written.extend(item([
            (RECORD, text(json(&self.record)?)),
            (FEED, text(&self.record.feed)),
            (STAMP, number(self.stamp)),
            (OWNER, text(&self.owner)),
            (VERSION, number(self.version)),
        ]));
        written.extend(self.step()?.into_iter().map(|(name, value)| (name.to_owned(), value)));
        put(table, written, Some("attribute_not_exists(Pk)"))
    }

    /// The action that stores its next step, if nobody else has stored one. The stored version is one
    /// higher then. A report that was written is out of date.
    pub(super) fn replace(&self, table: &str) -> Result<TransactWriteItem, StoreError> {
        let mut change = Change::of(table, Self::key(self.record.id))
            .when(When::Is(VERSION, number(self.version)))
            .set(VERSION, number(self.version + 1))
            .remove(REPORTED);
        change.set.extend(self.step()?);
        if self.closed_at.is_none() {
            change.remove.push(CLOSED_AT);
        }
        change.action()
    }

    /// The item that says that its report is yet to be written.
    pub(super) fn open_item(&self) -> Item {
        let sk = keys::stamped_sk(self.stamp, self.record.id);
        ledger_key(&keys::open_pk(&self.owner, &self.record.feed), &sk)
    }
}

pub(super) fn json(value: &impl serde::Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value)
        .map_err(|error| StoreError::Permanent(format!("what is stored of a file can't be written: {error}")))
}
