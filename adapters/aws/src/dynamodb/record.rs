//! What is stored of a batch beside its payload: one small item of the ledger table for its whole life. Whatever
//! follows for it is decided by `model::ledger`; here it is read, and written if nobody else has changed it since.

use std::{collections::HashMap, sync::Arc};

use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem};
use postrider_actors::{
    model::{
        batch::{BatchHeader, NewBatch},
        ids::{BatchId, FileId},
        ledger::{
            Deadline, Failure, Holder, Record, RowNumbers,
            codec::{self, Head},
        },
        priority::Priority,
        time::UnixMs,
    },
    ports::StoreError,
};

use super::{
    change::{Change, When, put},
    item::{
        ACCEPTED_AT, BODY, COUNT, DELIVERY_TIME, DIGEST, DUE, Damaged, FENCE, FILE, FIRST_ROW, HOLDER, Item,
        KEPT_UNTIL, LOOK_AT, NOT_BEFORE, OPEN, OUTSTANDING_CREATED_TIME, OWNER, PRIORITY, ROWS, Reading,
        SHARD, TOPIC, TOPIC_SHARD, UNTIL, VERSION, blob, item, number, text, time,
    },
    keys::{self, Shards, ledger_key},
    payload::{Payload, PayloadId},
};

/// A batch and its record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredBatch {
    pub(super) id: BatchId,
    pub(super) file: FileId,
    pub(super) destination: Arc<str>,
    pub(super) rows: RowNumbers,
    /// What it carries …
    pub(super) payload: PayloadId,
    /// … and until when that is kept, at least.
    pub(super) kept_until: UnixMs,
    /// Nothing needs what it carried any more.
    pub(super) is_archived: bool,
    pub(super) record: Record,
    /// How urgent its file was when its rows were accepted.
    pub(super) priority: Priority,
    /// Counts every change but that of the deadline.
    pub(super) version: u64,
}

/// Where a change puts a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transition {
    /// It stays where it is.
    Same,
    /// Nobody has it; it is due then.
    Waits(UnixMs),
    /// Somebody has it.
    Claimed,
    /// Nothing is left to do for it.
    Done,
}

/// What is written with a change of side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamp<'a> {
    /// When, unique: see `Shared::stamp`.
    pub(super) at: u64,
    /// When another process looks at what has been due since `due`.
    pub(super) look_at: UnixMs,
    /// Which process sends hints of it.
    pub(super) owner: &'a str,
}

impl StoredBatch {
    /// Of a batch that is new.
    pub(super) fn of(batch: &NewBatch, payload: PayloadId, kept_until: UnixMs) -> Result<Self, StoreError> {
        Ok(Self {
            id: batch.id,
            file: batch.header.file,
            destination: batch.header.destination.as_str().into(),
            rows: batch.row_numbers().map_err(StoreError::Permanent)?,
            payload,
            kept_until: UnixMs(kept_until.0 / 1000 * 1000),
            is_archived: false,
            record: Record::new(batch.count, batch.accepted_at, batch.not_before),
            priority: batch.header.priority,
            version: 0,
        })
    }

    /// The batch, with what it carries.
    pub(super) fn batch(&self, payload: &Payload) -> NewBatch {
        let destination = self.destination.to_string();
        NewBatch {
            id: self.id,
            header: Arc::new(BatchHeader { destination, ..(*payload.header).clone() }),
            first_row: self.rows.row(0),
            count: self.rows.len() as u32,
            accepted_at: self.record.accepted_at,
            not_before: self.record.not_before,
            payload: payload.rows.clone(),
        }
    }

    pub(super) fn key(id: BatchId) -> Item {
        ledger_key(&keys::batch_pk(id), keys::BATCH_SK)
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
            id: keys::batch_of_key(item)?,
            file: reading.file_id(FILE)?,
            destination: reading.text(TOPIC)?.into(),
            rows: rows.map_err(|_| Damaged(ROWS))?,
            payload: reading.text(DIGEST)?.parse()?,
            kept_until: kept_until(item)?,
            is_archived: !item.contains_key(TOPIC_SHARD),
            record: codec::decode(head, reading.maybe_bytes(BODY)?).map_err(|_| Damaged(BODY))?,
            priority: reading
                .maybe_text(PRIORITY)?
                .map_or(Ok(Priority::Normal), |word| word.parse().map_err(|_| Damaged(PRIORITY)))?,
            version: reading.number(VERSION)?,
        })
    }

    /// The action that stores it, if nothing of it is stored yet.
    pub(super) fn insert(
        &self,
        table: &str,
        shards: Shards,
        stamp: Stamp<'_>,
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
            (DIGEST, text(self.payload.to_string())),
            (KEPT_UNTIL, number(self.kept_until.0 / 1000)),
            (TOPIC_SHARD, text(keys::topic_shard(&self.destination, self.file, shards.of_destination))),
            (SHARD, number(keys::batch_shard(self.id, shards.of_all))),
        ]));
        if !self.priority.is_normal() {
            written.insert(PRIORITY.to_owned(), text(self.priority.as_str()));
        }
        written.extend(codec::encode_rows(&self.rows).map(|rows| (ROWS.to_owned(), blob(rows))));
        written
            .extend(waiting(&self.record, stamp).into_iter().map(|(name, value)| (name.to_owned(), value)));
        put(table, written, Some("attribute_not_exists(Pk)"))
    }

    /// What is stored once the change to `record` is written.
    pub(super) fn changed_to(&self, record: Record) -> Self {
        Self { record, version: self.version + 1, ..self.clone() }
    }

    /// Where a change to `next` puts the batch. The claim takes it from one side to the other (S3.5); sending a hint of
    /// it changes nothing (B20).
    pub(super) fn transition(&self, next: &Record) -> Transition {
        let before = &self.record;
        match (next.due(), &next.holder) {
            (None, _) if before.is_settled() => Transition::Same,
            (None, _) => Transition::Done,
            (Some(due), None) if before.holder.is_some() || before.due() != Some(due) => {
                Transition::Waits(due)
            }
            (Some(_), Some(_)) if before.holder.is_none() || before.fence != next.fence => {
                Transition::Claimed
            }
            (Some(_), _) => Transition::Same,
        }
    }

    /// The change from this record to `next`, if nobody else has changed it since it was read; the stored version is
    /// one higher then. Only what differs is written.
    pub(super) fn change<'a>(&self, table: &'a str, next: &Record, stamp: Stamp<'_>) -> Change<'a> {
        let mut change = Change::of(table, Self::key(self.id))
            .when(When::Is(VERSION, number(self.version)))
            .set(VERSION, number(self.version + 1));
        if next.fence != self.record.fence {
            change.set.push((FENCE, number(next.fence)));
        }
        // The holder may have extended its lease meanwhile: a deadline is only written with a new claim.
        if next.holder != self.record.holder {
            match &next.holder {
                Some(Holder { name, until }) => {
                    change.set.extend([(HOLDER, text(name)), (UNTIL, number(until.0))]);
                }
                None => change.remove.extend([HOLDER, UNTIL]),
            }
        }
        let body = codec::encode(next);
        if body != codec::encode(&self.record) {
            change.set.push((BODY, blob(body)));
        }
        let was_outstanding = !self.record.is_settled() && self.record.holder.is_none();
        match self.transition(next) {
            Transition::Same => {}
            Transition::Waits(_) => {
                change.set.extend(waiting(next, stamp));
                if !was_outstanding {
                    change.remove.push(DELIVERY_TIME);
                }
            }
            side => {
                // A claim that takes over a lost one finds the batch on this side.
                if was_outstanding {
                    change.set.push((DELIVERY_TIME, number(stamp.at)));
                    change.remove.push(OUTSTANDING_CREATED_TIME);
                }
                if side == Transition::Done {
                    change.remove.push(LOOK_AT);
                } else {
                    // Who has it looks after it: if it starts anew, it finds what it had at once.
                    change.set.push((OWNER, text(stamp.owner)));
                }
            }
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
        let mut chunk = ledger_key(&keys::batch_pk(self.id), &keys::history_sk(self.record.fence, first));
        chunk.insert(BODY.to_owned(), blob(codec::encode_history(failures)));
        put(table, chunk, None)
    }
}

/// What is written of a batch that begins to wait.
fn waiting(record: &Record, stamp: Stamp<'_>) -> [(&'static str, AttributeValue); 5] {
    [
        (OUTSTANDING_CREATED_TIME, number(stamp.at)),
        (DUE, time(record.due().unwrap_or(record.not_before))),
        (LOOK_AT, time(stamp.look_at)),
        (OWNER, text(stamp.owner)),
        (OPEN, number(record.open_count())),
    ]
}

/// Until when what a batch carries is kept, at least.
pub(super) fn kept_until(item: &Item) -> Result<UnixMs, Damaged> {
    Ok(UnixMs(Reading(item).number::<u64>(KEPT_UNTIL)? * 1000))
}

/// Records as they are stored; `None` where there is no such batch.
pub(super) type Records = HashMap<BatchId, Option<StoredBatch>>;

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
        super::{
            item::{SK, size},
            payload::NewPayload,
        },
        *,
    };

    const NOW: UnixMs = UnixMs(1_700_000_000_000);

    /// `batch.max_messages` at most.
    const MESSAGES_MAX: u32 = 1_000;

    /// DynamoDB's limit of an item, less what our count of it may be short of.
    const ITEM_BYTES_MAX: usize = 400_000;

    fn stored(rows: impl IntoIterator<Item = u64>) -> StoredBatch {
        let file = fixtures::file("feed", 1, &["d"]);
        let batch = fixtures::batch(&file, "d", rows, NOW);
        StoredBatch::of(&batch, NewPayload::of(&batch).unwrap().id, UnixMs(NOW.0 + 999)).unwrap()
    }

    /// The item that an action puts.
    fn put_item(action: &TransactWriteItem) -> Item {
        action.put().expect("it puts").item().clone()
    }

    /// What a change makes of an item.
    fn apply(item: &mut Item, change: &Change<'_>) {
        for (name, value) in &change.set {
            item.insert((*name).to_owned(), value.clone());
        }
        for name in &change.remove {
            item.remove(*name);
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
        let detail = |index: u32| format!("{index:04}{}", "x".repeat(DETAIL_BYTES_MAX - 4)).into();
        let details: BTreeMap<u32, Box<str>> =
            (0..record.len() as u32).map(|index| (index, detail(index))).collect();
        let fence = record.fence;
        let standing = Standing { fence, verdicts: &verdicts, details: &details, ends: true, begins: None };
        record.settle(standing).unwrap().failures
    }

    const SHARDS: Shards = Shards { of_destination: 20, of_all: 4 };

    fn stamp(at: u64, owner: &str) -> Stamp<'_> {
        Stamp { at, look_at: UnixMs(NOW.0 + 10), owner }
    }

    #[test]
    fn a_record_reads_back_with_every_change() {
        for rows in [vec![3, 4, 5], vec![3, 5, 9]] {
            let before = stored(rows);
            let mut item = put_item(&before.insert("ledger", SHARDS, stamp(17, "node-1")).unwrap());
            assert_eq!(StoredBatch::read(&item).unwrap(), before);
            assert!(!item.contains_key(BODY), "nothing is recorded yet");
            assert_eq!((&item[LOOK_AT], &item[OPEN]), (&time(UnixMs(NOW.0 + 10)), &number(3)));

            let mut claimed = before.clone();
            claimed.record.lease("node-2/w", Deadline(NOW.0 + 60_000), Deadline(NOW.0), NOW, UnixMs(0));
            let later = Stamp { look_at: UnixMs(u64::MAX), ..stamp(18, "node-2") };
            apply(&mut item, &before.change("ledger", &claimed.record, later));
            claimed.version = 1;
            assert_eq!(
                (StoredBatch::read(&item).unwrap(), before.transition(&claimed.record)),
                (claimed.clone(), Transition::Claimed)
            );
            assert!(!item.contains_key(OUTSTANDING_CREATED_TIME) && item.contains_key(DELIVERY_TIME));
            assert_eq!(item[LOOK_AT], time(UnixMs(NOW.0 + 10)), "a claim leaves it alone (B20)");
            assert_eq!(item[OWNER], text("node-2"));
            assert!(!item.contains_key(BODY), "a claim records nothing");

            let mut dead = claimed.clone();
            all_dead(&mut dead.record);
            apply(&mut item, &claimed.change("ledger", &dead.record, stamp(19, "node-2")));
            dead.version = 2;
            assert_eq!(
                (StoredBatch::read(&item).unwrap(), claimed.transition(&dead.record)),
                (dead.clone(), Transition::Done)
            );
            assert!(!item.contains_key(LOOK_AT) && item[DELIVERY_TIME] == number(18));

            let mut redriven = dead.clone();
            redriven.record.redrive([1], NOW);
            apply(&mut item, &dead.change("ledger", &redriven.record, stamp(20, "node-3")));
            redriven.version = 3;
            assert_eq!(StoredBatch::read(&item).unwrap(), redriven);
            assert_eq!(dead.transition(&redriven.record), Transition::Waits(NOW));
            assert!(item.contains_key(OUTSTANDING_CREATED_TIME) && !item.contains_key(DELIVERY_TIME));
            assert_eq!((&item[OWNER], &item[OPEN]), (&text("node-3"), &number(1)));
        }
        assert!(StoredBatch::read(&Item::new()).is_err());
    }

    /// A deadline that was moved meanwhile is not moved back by who records something.
    #[test]
    fn a_settlement_writes_no_deadline_and_no_index() {
        let mut before = stored(1..=3);
        before.record.lease("w", Deadline(9), Deadline(1), NOW, UnixMs(0));
        let mut after = before.record.clone();
        after.begun = Some(2);
        let change = before.change("ledger", &after, stamp(1, "node-1"));
        let set: Vec<_> = change.set.iter().map(|(name, _)| *name).collect();
        assert_eq!((set, change.remove.is_empty()), (vec![VERSION, BODY], true));
        assert_eq!(change.when, [When::Is(VERSION, number(0))]);
    }

    /// Sent by a worker whose lease is over: the batch waits as it did, or is done without a claim.
    #[test]
    fn a_late_fact_takes_a_batch_that_waits_to_where_it_belongs() {
        let before = stored(1..=2);
        let sent = |index| MessageVerdict {
            index,
            drive: 0,
            attempt: 1,
            verdict: Verdict::Sent { at: NOW, status: 200 },
        };
        let settle = |record: &mut Record, verdicts: &[MessageVerdict]| {
            let details = BTreeMap::new();
            let standing = Standing { fence: 9, verdicts, details: &details, ends: true, begins: None };
            record.settle(standing).unwrap();
        };
        let mut item = put_item(&before.insert("ledger", SHARDS, stamp(17, "node-1")).unwrap());
        let mut half = before.clone();
        settle(&mut half.record, &[sent(0)]);
        assert_eq!(before.transition(&half.record), Transition::Same);
        let mut all = half.clone();
        settle(&mut all.record, &[sent(1)]);
        apply(&mut item, &half.change("ledger", &all.record, stamp(18, "node-1")));
        assert!(!item.contains_key(OUTSTANDING_CREATED_TIME) && !item.contains_key(LOOK_AT));
        assert_eq!(item[DELIVERY_TIME], number(18));
    }

    /// B3: a record is written for every group, and an item has a limit.
    #[test]
    fn the_worst_record_fits_into_an_item() {
        let before = stored((1..=u64::from(MESSAGES_MAX)).map(|row| row * 1_000_000));
        let mut item = put_item(&before.insert("ledger", SHARDS, stamp(17, "node-1")).unwrap());
        let mut after = before.clone();
        after.record.lease(&"w".repeat(200), Deadline(NOW.0), Deadline(1), NOW, UnixMs(0));
        let failures = all_dead(&mut after.record);
        apply(&mut item, &before.change("ledger", &after.record, stamp(18, "node-1")));
        assert_eq!(StoredBatch::read(&item).unwrap().record, after.record);
        let details = after.record.exceptions.values().filter_map(|one| one.death.as_ref()?.detail.as_ref());
        assert!(details.map(|detail| detail.len()).sum::<usize>() > 60_000, "it holds all the words it may");
        assert!(size(&item) < ITEM_BYTES_MAX / 2, "{} bytes", size(&item));
        let chunk = put_item(&after.keep_history("ledger", &failures).unwrap());
        assert!(size(&chunk) < ITEM_BYTES_MAX / 2, "{} bytes", size(&chunk));
        assert!(chunk[SK].as_s().unwrap().starts_with("history#0000000000000001#00000000#00000001#"));
    }
}
