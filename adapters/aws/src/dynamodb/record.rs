//! What is stored of a batch beside its payload: one small item of the ledger table for its whole life. Whatever
//! follows for it is decided by `model::ledger`; here it is read, and written if nobody else has changed it since.

use std::sync::Arc;

use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem};
use postrider_actors::{
    model::{
        batch::NewBatch,
        ids::{BatchId, FileId},
        ledger::{
            Deadline, Failure, Holder, Record, RowNumbers,
            codec::{self, Head},
        },
        time::UnixMs,
    },
    ports::StoreError,
};

use super::{
    calls::{Change, ledger_key, put},
    item::{
        ACCEPTED_AT, BODY, COUNT, DELIVERY_TIME, DUE, Damaged, FENCE, FILE, FIRST_ROW, HOLDER, Item,
        MESSAGE_ID, NOT_BEFORE, OUTSTANDING_CREATED_TIME, OWNER, ROWS, Reading, TOPIC, TOPIC_SHARD, UNTIL,
        VERSION, blob, item, number, text, time,
    },
    schema,
};

/// A batch and its record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) id: BatchId,
    pub(super) file: FileId,
    pub(super) destination: Arc<str>,
    pub(super) rows: RowNumbers,
    pub(super) record: Record,
    /// Counts every change but that of the deadline.
    pub(super) version: u64,
}

/// What a change says of dispatching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// Nothing.
    None,
    /// Whoever claims a batch has it from the queue: it is dispatched, at the latest now.
    Dispatched {
        /// A stamp.
        at: u64,
    },
    /// It is to be dispatched again.
    Outstanding(Waiting),
}

/// A batch that is to be dispatched again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    /// Since when: a stamp.
    pub(super) created: u64,
    /// When it is due.
    pub(super) due: UnixMs,
}

impl Stored {
    /// Of a batch that is new.
    pub(super) fn of(batch: &NewBatch) -> Result<Self, StoreError> {
        Ok(Self {
            id: batch.id,
            file: batch.header.file,
            destination: batch.header.destination.as_str().into(),
            rows: batch.row_numbers().map_err(StoreError::Permanent)?,
            record: Record::new(batch.count, batch.accepted_at, batch.not_before),
            version: 0,
        })
    }

    pub(super) fn key(id: BatchId) -> Item {
        ledger_key(&schema::batch_pk(id), schema::BATCH_SK)
    }

    pub(super) fn read(item: &Item) -> Result<Self, Damaged> {
        let reading = Reading(item);
        let count = reading.number(COUNT)?;
        let until = || reading.number(UNTIL).map(Deadline);
        let holder = reading.maybe_text(HOLDER)?;
        let holder = holder.map(|name| Ok(Holder { name: name.to_owned(), until: until()? })).transpose()?;
        let head = Head {
            count,
            accepted_at: reading.time(ACCEPTED_AT)?,
            not_before: reading.time(NOT_BEFORE)?,
            fence: reading.number(FENCE)?,
            holder,
        };
        let rows = codec::decode_rows(reading.number(FIRST_ROW)?, count, reading.maybe_bytes(ROWS)?);
        Ok(Self {
            id: reading.batch_of_key()?,
            file: reading.file_id(FILE)?,
            destination: reading.text(TOPIC)?.into(),
            rows: rows.map_err(|_| Damaged(ROWS))?,
            record: codec::decode(head, reading.maybe_bytes(BODY)?).map_err(|_| Damaged(BODY))?,
            version: reading.number(VERSION)?,
        })
    }

    /// The action that stores it, outstanding since `created`, if nothing of it is stored yet.
    pub(super) fn insert(
        &self,
        table: &str,
        shard: String,
        owner: &str,
        created: u64,
    ) -> Result<TransactWriteItem, StoreError> {
        let mut written = Self::key(self.id);
        written.extend(item([
            (VERSION, number(self.version)),
            (FENCE, number(self.record.fence)),
            (FILE, text(self.file.to_string())),
            (TOPIC, text(&*self.destination)),
            (FIRST_ROW, number(self.rows.row(0))),
            (COUNT, number(self.rows.len() as u64)),
            (ACCEPTED_AT, time(self.record.accepted_at)),
            (NOT_BEFORE, time(self.record.not_before)),
            (MESSAGE_ID, text(self.id.to_string())),
            (TOPIC_SHARD, text(shard)),
            (OUTSTANDING_CREATED_TIME, number(created)),
            (DUE, time(self.record.not_before)),
            (OWNER, text(owner)),
        ]));
        written.extend(codec::encode_rows(&self.rows).map(|rows| (ROWS.to_owned(), blob(rows))));
        put(table, written, Some("attribute_not_exists(Pk)"))
    }

    /// What is stored once the change to `record` is written.
    pub(super) fn changed_to(&self, record: Record) -> Self {
        Self { record, version: self.version + 1, ..self.clone() }
    }

    /// The change from this record to `next`, if nobody else has changed it since it was read; the stored version is
    /// one higher then. Only what differs is written.
    pub(super) fn change<'a>(&self, table: &'a str, next: &Record, mark: Mark, owner: &str) -> Change<'a> {
        let mut change = Change {
            table,
            key: Self::key(self.id),
            update: String::new(),
            condition: Some("#Version = :Version"),
            names: vec![VERSION],
            values: vec![("Version", number(self.version)), ("next", number(self.version + 1))],
        };
        let mut set = vec!["#Version = :next"];
        let mut remove = Vec::new();
        let mut values: Vec<(&'static str, &'static str, AttributeValue)> = Vec::new();
        if next.fence != self.record.fence {
            values.push((FENCE, "#Fence = :Fence", number(next.fence)));
        }
        // The holder may have extended its lease meanwhile: a deadline is only written with a new claim.
        if next.holder != self.record.holder {
            match &next.holder {
                Some(Holder { name, until }) => {
                    values.push((HOLDER, "#Holder = :Holder", text(name)));
                    values.push((UNTIL, "#Until = :Until", number(until.0)));
                }
                None => remove.extend([(HOLDER, "#Holder"), (UNTIL, "#Until")]),
            }
        }
        let body = codec::encode(next);
        if body != codec::encode(&self.record) {
            values.push((BODY, "#Body = :Body", blob(body)));
        }
        match mark {
            Mark::None => {}
            Mark::Dispatched { at } => {
                // Marked before, it costs no change of an index.
                let set = "#DeliveryTime = if_not_exists(#DeliveryTime, :DeliveryTime)";
                values.push((DELIVERY_TIME, set, number(at)));
                remove.push((OUTSTANDING_CREATED_TIME, "#OutstandingCreatedTime"));
            }
            Mark::Outstanding(Waiting { created, due }) => {
                let set = "#OutstandingCreatedTime = :OutstandingCreatedTime";
                values.push((OUTSTANDING_CREATED_TIME, set, number(created)));
                values.push((DUE, "#Due = :Due", time(due)));
                values.push((OWNER, "#Owner = :Owner", text(owner)));
                remove.push((DELIVERY_TIME, "#DeliveryTime"));
            }
        }
        for (name, assignment, value) in values {
            change.names.push(name);
            change.values.push((name, value));
            set.push(assignment);
        }
        change.update = format!("SET {}", set.join(", "));
        if !remove.is_empty() {
            let (names, removed): (Vec<_>, Vec<_>) = remove.into_iter().unzip();
            change.names.extend(names);
            change.update.push_str(" REMOVE ");
            change.update.push_str(&removed.join(", "));
        }
        change
    }

    /// The action that keeps a group of failed attempts (B3).
    pub(super) fn keep_history(
        &self,
        table: &str,
        failures: &[Failure],
    ) -> Result<TransactWriteItem, StoreError> {
        let first =
            failures.iter().min_by_key(|failure| (failure.drive, failure.attempt_number, failure.index));
        let first = first.expect("a group has a failure");
        let mut chunk = ledger_key(&schema::batch_pk(self.id), &schema::history_sk(self.record.fence, first));
        chunk.insert(BODY.to_owned(), blob(codec::encode_history(failures)));
        put(table, chunk, None)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use postrider_actors::{
        model::{
            ledger::{DETAIL_BYTES_MAX, MessageVerdict, Standing},
            outcome::{DeathCause, Verdict},
        },
        testing::fixtures,
    };

    use super::{
        super::item::{SK, size},
        *,
    };

    const NOW: UnixMs = UnixMs(1_700_000_000_000);

    /// `batch.max_messages` at most.
    const MESSAGES_MAX: u32 = 1_000;

    /// DynamoDB's limit of an item, less what our count of it may be short of.
    const ITEM_BYTES_MAX: usize = 400_000;

    fn stored(rows: impl IntoIterator<Item = u64>) -> Stored {
        let file = fixtures::file("feed", 1, &["d"]);
        Stored::of(&fixtures::batch(&file, "d", rows, NOW)).unwrap()
    }

    /// The item that an action puts.
    fn put_item(action: &TransactWriteItem) -> Item {
        action.put().expect("it puts").item().clone()
    }

    /// What a change makes of an item.
    fn apply(item: &mut Item, change: &Change<'_>) {
        for (name, value) in &change.values {
            item.insert((*name).to_owned(), value.clone());
        }
        let next = item.remove("next").expect("every change has it");
        item.insert(VERSION.to_owned(), next);
        let removed = change.update.split_once(" REMOVE ").map_or("", |(_, removed)| removed);
        for name in removed.split(", ") {
            item.remove(name.trim_start_matches('#'));
        }
    }

    fn all_dead(record: &mut Record) -> Vec<Failure> {
        let verdicts: Vec<_> = (0..record.len() as u32)
            .map(|index| MessageVerdict {
                index,
                drive: 0,
                attempt: 1,
                verdict: Verdict::Dead { attempt: fixtures::failed(NOW), cause: DeathCause::Permanent },
            })
            .collect();
        let detail: Box<str> = "x".repeat(DETAIL_BYTES_MAX).into();
        let details: BTreeMap<_, _> = (0..record.len() as u32).map(|index| (index, detail.clone())).collect();
        let fence = record.fence;
        let standing = Standing { fence, verdicts: &verdicts, details: &details, ends: true, begins: None };
        record.settle(standing).unwrap().failures
    }

    #[test]
    fn a_record_reads_back_with_every_change() {
        for rows in [vec![3, 4, 5], vec![3, 5, 9]] {
            let before = stored(rows);
            let shard = "d#07".to_owned();
            let mut item = put_item(&before.insert("ledger", shard, "node-1", 17).unwrap());
            assert_eq!(Stored::read(&item).unwrap(), before);
            assert!(!item.contains_key(BODY), "nothing is recorded yet");

            let mut claimed = before.clone();
            claimed.record.lease("node-1/w", Deadline(NOW.0 + 60_000), Deadline(NOW.0), NOW, UnixMs(0));
            apply(
                &mut item,
                &before.change("ledger", &claimed.record, Mark::Dispatched { at: 18 }, "node-1"),
            );
            claimed.version = 1;
            assert_eq!(Stored::read(&item).unwrap(), claimed);
            assert!(!item.contains_key(OUTSTANDING_CREATED_TIME) && item.contains_key(DELIVERY_TIME));
            assert!(!item.contains_key(BODY), "a claim records nothing");

            let mut dead = claimed.clone();
            all_dead(&mut dead.record);
            apply(&mut item, &claimed.change("ledger", &dead.record, Mark::None, "node-1"));
            dead.version = 2;
            assert_eq!(Stored::read(&item).unwrap(), dead);

            let mut redriven = dead.clone();
            redriven.record.redrive([1], NOW);
            let mark = Mark::Outstanding(Waiting { created: 19, due: NOW });
            apply(&mut item, &dead.change("ledger", &redriven.record, mark, "node-2"));
            redriven.version = 3;
            assert_eq!(Stored::read(&item).unwrap(), redriven);
            assert!(item.contains_key(OUTSTANDING_CREATED_TIME) && !item.contains_key(DELIVERY_TIME));
            assert_eq!(item[OWNER], text("node-2"));
        }
        assert!(Stored::read(&Item::new()).is_err());
    }

    /// A deadline that was moved meanwhile is not moved back by who records something.
    #[test]
    fn a_settlement_writes_no_deadline() {
        let mut before = stored(1..=3);
        before.record.lease("w", Deadline(9), Deadline(1), NOW, UnixMs(0));
        let mut after = before.record.clone();
        after.begun = Some(2);
        let change = before.change("ledger", &after, Mark::None, "node-1");
        assert_eq!(change.update, "SET #Version = :next, #Body = :Body");
        assert_eq!(change.condition, Some("#Version = :Version"));
    }

    /// B3: a record is written for every group, and an item has a limit.
    #[test]
    fn the_worst_record_fits_into_an_item() {
        let before = stored((1..=u64::from(MESSAGES_MAX)).map(|row| row * 1_000_000));
        let mut item = put_item(&before.insert("ledger", "d#07".into(), "node-1", 17).unwrap());
        let mut after = before.clone();
        after.record.lease(&"w".repeat(200), Deadline(NOW.0), Deadline(1), NOW, UnixMs(0));
        let failures = all_dead(&mut after.record);
        apply(&mut item, &before.change("ledger", &after.record, Mark::None, "node-1"));
        assert_eq!(Stored::read(&item).unwrap().record, after.record);
        let details = after.record.exceptions.values().filter_map(|one| one.death.as_ref()?.detail.as_ref());
        assert!(details.map(|detail| detail.len()).sum::<usize>() > 60_000, "it holds all the words it may");
        assert!(size(&item) < ITEM_BYTES_MAX / 2, "{} bytes", size(&item));
        let chunk = put_item(&after.keep_history("ledger", &failures).unwrap());
        assert!(size(&chunk) < ITEM_BYTES_MAX / 2, "{} bytes", size(&chunk));
        assert!(chunk[SK].as_s().unwrap().starts_with("history#0000000000000001#00000000#00000001#"));
    }
}
