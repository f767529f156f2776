//! What a transaction will change, worked out before it is written: pure rules over records that were read.
//!
//! A batch's entry for a message goes from `accepted` to one of the settled states. `retrying` means that a
//! later batch carries the message on; the record names it (`carried_by`). The *live entry* is the one that
//! nobody carries on. Whatever arrives later than it should is told to the live entry, so that every message
//! is counted in exactly one place (I1) and its state is the maximum of all it was told (I7).

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use postrider_actors::{
    model::{
        batch::{NewBatch, Rows},
        ids::{BatchId, FileId},
        outcome::{Attempt, DeathCause, Verdict},
        record::{MessageRecord, details},
        state::MessageState,
        time::UnixMs,
    },
    ports::{LeaseToken, Settled, StoreError},
};

use super::{
    item::payload_damaged,
    record::{Record, header_digest},
};
use postrider_actors::model::codec::SentTimes;

/// A record as it was read; `None` if there is no such batch.
pub(super) type Known = HashMap<BatchId, Option<Record>>;

/// Why a step could not be worked out.
#[derive(Debug)]
pub(super) enum Stop {
    /// This record has to be read first.
    Need(BatchId),
    /// It is refused, whole.
    Refused(StoreError),
}

fn refuse<T>(why: String) -> Result<T, Stop> {
    Err(Stop::Refused(StoreError::Permanent(why)))
}

/// By how much a file's counts for a destination change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CountChange {
    pub(super) sent: i64,
    pub(super) dead: i64,
    pub(super) retrying: i64,
    /// The latest time at which one of its messages settled.
    pub(super) last_at: Option<UnixMs>,
}

/// Part of a settlement: verdicts and the batches that carry on the retried ones.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) token: LeaseToken,
    pub(super) verdicts: Vec<(u32, Verdict)>,
    pub(super) retries: Vec<NewBatch>,
    /// Those records of the settlement that hold the destination's own words.
    pub(super) records: Arc<[MessageRecord]>,
}

/// What a message is told that ends its way.
#[derive(Clone, Copy)]
enum Told<'a> {
    Sent {
        at: UnixMs,
        status: u16,
    },
    /// With the destination's own words, if they are kept.
    Dead {
        attempt: Attempt,
        cause: DeathCause,
        detail: Option<&'a str>,
    },
}

impl Told<'_> {
    fn state(self) -> MessageState {
        match self {
            Self::Sent { .. } => MessageState::Sent,
            Self::Dead { .. } => MessageState::Dead,
        }
    }
}

/// The changes so far.
#[derive(Clone, Default)]
pub(super) struct Draft {
    /// Records that are changed, as they will be; their `version` is the stored one.
    pub(super) changed: BTreeMap<BatchId, Record>,
    /// Whether a changed record had dead messages before.
    pub(super) had_dead: BTreeMap<BatchId, bool>,
    /// Batches that are made; their records are here, not in `changed`.
    pub(super) made: BTreeMap<BatchId, (NewBatch, Record)>,
    /// In which order.
    pub(super) made_order: Vec<BatchId>,
    pub(super) counts: BTreeMap<(FileId, Arc<str>), CountChange>,
}

impl Draft {
    pub(super) fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.made.is_empty() && self.counts.is_empty()
    }

    /// Actions that it takes in a transaction.
    pub(super) fn actions(&self) -> usize {
        let marks =
            self.changed.iter().filter(|(id, record)| self.had_dead[*id] != record.has_dead()).count();
        let new_marks = self.made.values().filter(|(_, record)| record.has_dead()).count();
        // And one for the depth.
        self.changed.len() + 2 * self.made.len() + marks + new_marks + self.counts.len() + 1
    }

    /// Bytes that it takes in a transaction, roughly.
    pub(super) fn bytes(&self) -> usize {
        let recorded = |record: &Record| {
            512 + record.states.0.len() * 8 + record.deaths.len() * 20 + record.detail_bytes()
        };
        let changed: usize = self.changed.values().map(recorded).sum();
        let history =
            |batch: &NewBatch| batch.history.iter().map(|attempts| 1 + attempts.len() * 16).sum::<usize>();
        let made = self.made.values().map(|(batch, record)| {
            1024 + batch.payload.len() + history(batch) + recorded(record) + record.count as usize * 3
        });
        changed + made.sum::<usize>() + self.counts.len() * 256
    }

    fn record(&mut self, known: &Known, id: BatchId) -> Result<Option<&mut Record>, Stop> {
        if let Some((_, record)) = self.made.get_mut(&id) {
            return Ok(Some(record));
        }
        match known.get(&id) {
            None => Err(Stop::Need(id)),
            Some(None) => Ok(None),
            Some(Some(record)) => Ok(Some(self.changed.entry(id).or_insert_with(|| {
                self.had_dead.insert(id, record.has_dead());
                record.clone()
            }))),
        }
    }

    /// Forgets records that were only looked at.
    fn drop_unchanged(&mut self, known: &Known) {
        self.changed.retain(|id, record| known.get(id).and_then(Option::as_ref) != Some(record));
    }

    fn count(&mut self, record: &(FileId, Arc<str>), change: impl FnOnce(&mut CountChange)) {
        change(self.counts.entry(record.clone()).or_default());
    }

    /// How a batch stands by this draft.
    fn look<'a>(&'a self, known: &'a Known, id: BatchId) -> Option<&'a Record> {
        let made = self.made.get(&id).map(|(_, record)| record);
        made.or_else(|| self.changed.get(&id)).or_else(|| known.get(&id)?.as_ref())
    }

    /// Records one part of a settlement.
    pub(super) fn settle(&mut self, known: &Known, part: &Part) -> Result<Settled, Stop> {
        let id = part.token.batch;
        let Some(record) = self.record(known, id)? else {
            tracing::warn!(batch = %id, "settled a batch that the store does not know");
            return Ok(Settled::Stale);
        };
        let current = record.is_current(part.token.fence);
        let len = record.states.0.len();
        let mut retried = Vec::new();
        let mut elsewhere = Vec::new();
        let details = details(&part.records);
        for &(index, verdict) in &part.verdicts {
            let index = index as usize;
            if index >= len {
                return refuse(format!("batch {id} has {len} messages, a verdict is about index {index}"));
            }
            let told = match verdict {
                Verdict::Sent { at, status } => Told::Sent { at, status },
                // Failures are the current holder's to tell.
                Verdict::Dead { .. } | Verdict::Retry { .. } if !current => continue,
                Verdict::Dead { attempt, cause } => {
                    let row = self.must(known, id)?.row(index);
                    Told::Dead { attempt, cause, detail: details.get(&row).map(|detail| &**detail) }
                }
                Verdict::Retry { .. } => {
                    retried.push((index, self.retry(known, id, index)?));
                    continue;
                }
            };
            if self.tell(known, id, index, told)? == MessageState::Retrying {
                elsewhere.push((index, told));
            }
        }
        if current {
            self.make_retries(known, id, &retried, &part.retries)?;
        }
        for (index, told) in elsewhere {
            self.tell_live_entry(known, id, index, told)?;
        }
        let unsettled = self.record(known, id)?.map_or(0, |record| record.unsettled);
        self.drop_unchanged(known);
        Ok(match (current, unsettled) {
            (false, _) => Settled::Stale,
            (true, 0) => Settled::Complete,
            (true, _) => Settled::Open,
        })
    }

    fn must(&mut self, known: &Known, id: BatchId) -> Result<&mut Record, Stop> {
        match self.record(known, id)? {
            Some(record) => Ok(record),
            None => refuse(format!("batch {id} carries messages on, but is not stored")),
        }
    }

    /// Merges `retrying` and returns what stood there before.
    fn retry(&mut self, known: &Known, id: BatchId, index: usize) -> Result<MessageState, Stop> {
        let record = self.must(known, id)?;
        let before = record.states.merge(index, MessageState::Retrying);
        if before == MessageState::Accepted {
            let is_first = !record.is_carrying_on();
            record.settle_one();
            let of = (record.file, record.destination.clone());
            self.count(&of, |counts| counts.retrying += i64::from(is_first));
        }
        Ok(before)
    }

    /// Merges a final state and returns what stood there before. Counts it, unless it was `retrying`: then
    /// it counts where the live entry is.
    fn tell(
        &mut self,
        known: &Known,
        id: BatchId,
        index: usize,
        told: Told<'_>,
    ) -> Result<MessageState, Stop> {
        let record = self.must(known, id)?;
        let before = record.states.get(index);
        // Only a 2xx is recorded where the message was before. `dead` stands at the live entry alone: a
        // redrive takes it back there, and a copy of it would be counted off once more.
        if before >= told.state() || (before == MessageState::Retrying && matches!(told, Told::Dead { .. })) {
            return Ok(before);
        }
        record.states.merge(index, told.state());
        if let Told::Sent { at, status } = told {
            let (len, accepted_at) = (record.states.0.len(), record.accepted_at);
            record.sent.get_or_insert_with(|| SentTimes::none(len)).set(index, status, accepted_at, at);
        }
        if before == MessageState::Retrying {
            return Ok(before);
        }
        let was_dead = before == MessageState::Dead;
        let was_retrying = !was_dead && record.is_carrying_on();
        if was_dead {
            record.unbury(index as u32);
        } else {
            record.settle_one();
        }
        if let Told::Dead { attempt, cause, detail } = told {
            record.bury(index as u32, attempt, cause, detail);
        }
        let of = (record.file, record.destination.clone());
        self.count(&of, |counts| {
            counts.dead -= i64::from(was_dead);
            counts.retrying -= i64::from(was_retrying);
            let at = match told {
                Told::Sent { at, .. } => {
                    counts.sent += 1;
                    at
                }
                Told::Dead { attempt, .. } => {
                    counts.dead += 1;
                    attempt.at
                }
            };
            // A death that is taken back settles nothing that was not settled.
            if !was_dead {
                counts.last_at = counts.last_at.max(Some(at));
            }
        });
        Ok(before)
    }

    /// Tells the live entry of a message that `id` has as retrying.
    fn tell_live_entry(
        &mut self,
        known: &Known,
        id: BatchId,
        index: usize,
        told: Told<'_>,
    ) -> Result<(), Stop> {
        let mut at = (id, index);
        loop {
            let record = self.must(known, at.0)?;
            let row = record.row(at.1);
            let later = record.carried_by.clone();
            let mut found = None;
            // The latest first: a redrive comes after a retry.
            for later in later.into_iter().rev() {
                if let Some(index) = self.must(known, later)?.find(row) {
                    found = Some((later, index));
                    break;
                }
            }
            let Some(found) = found else {
                return refuse(format!(
                    "row {row} of batch {} is retrying, but no later batch carries it on",
                    at.0
                ));
            };
            if self.must(known, found.0)?.states.get(found.1) != MessageState::Retrying {
                self.tell(known, found.0, found.1, told)?;
                return Ok(());
            }
            at = found;
        }
    }

    /// Makes the batches that carry on the messages of `retried` (index and state before). Every message
    /// that is retrying from now on must be in one of them, or it would be lost.
    fn make_retries(
        &mut self,
        known: &Known,
        id: BatchId,
        retried: &[(usize, MessageState)],
        retries: &[NewBatch],
    ) -> Result<(), Stop> {
        if retried.is_empty() && retries.is_empty() {
            return Ok(());
        }
        let record = self.must(known, id)?.clone();
        let mut waiting: BTreeMap<u64, bool> = BTreeMap::new();
        for &(index, before) in retried {
            *waiting.entry(record.row(index)).or_default() |= before == MessageState::Accepted;
        }
        for retry in retries {
            let rows = check_retry(&record, retry)?;
            let mut live = Vec::with_capacity(rows.len());
            for index in 0..rows.len() {
                match waiting.remove(&rows.row(index)) {
                    Some(true) => live.push(index),
                    // Settled before this verdict came, e.g. by a stale worker's 2xx: not to be sent again.
                    Some(false) => {}
                    None => return refuse_retry(retry, "it carries on a message without a retry verdict"),
                }
            }
            let reduced = if live.len() == rows.len() {
                retry.clone()
            } else if live.is_empty() {
                continue;
            } else {
                retry.only(&rows, &live)
            };
            self.make(known, reduced)?;
            let made = *self.made_order.last().expect("one was just made");
            self.must(known, id)?.carried_by.push(made);
        }
        match waiting.into_iter().find(|&(_, live)| live) {
            None => Ok(()),
            Some((row, _)) => refuse(format!(
                "row {row} of file {} is to be retried, but no retry batch carries it on",
                record.file
            )),
        }
    }

    fn make(&mut self, known: &Known, batch: NewBatch) -> Result<(), Stop> {
        let id = batch.id;
        if self.look(known, id).is_some() {
            return refuse_retry(&batch, "a batch with its id is stored already");
        }
        let record = Record::of(&batch).map_err(Stop::Refused)?;
        self.made.insert(id, (batch, record));
        self.made_order.push(id);
        Ok(())
    }

    /// Takes dead messages back: `batch` carries them on from now on. `dead` names where each of its
    /// messages is dead, in order.
    pub(super) fn redrive(
        &mut self,
        known: &Known,
        batch: NewBatch,
        dead: &[(BatchId, u32)],
    ) -> Result<(), Stop> {
        let of = (batch.header.file, Arc::from(batch.header.destination.as_str()));
        let messages = i64::from(batch.count);
        let made = batch.id;
        for &(id, index) in dead {
            let record = self.must(known, id)?;
            record.states.0[index as usize] = MessageState::Retrying as u8;
            record.unbury(index);
            if record.carried_by.last() != Some(&made) {
                record.carried_by.push(made);
            }
        }
        self.make(known, batch)?;
        self.count(&of, |counts| {
            counts.dead -= messages;
            counts.retrying += messages;
        });
        Ok(())
    }
}

impl Record {
    /// One message less to deliver; with none left the claim ends.
    fn settle_one(&mut self) {
        self.unsettled -= 1;
        if self.unsettled == 0 {
            self.held = None;
        }
    }
}

fn refuse_retry<T>(retry: &NewBatch, why: &str) -> Result<T, Stop> {
    refuse(format!("retry batch {} is refused: {why}", retry.id))
}

fn check_retry(record: &Record, retry: &NewBatch) -> Result<Rows, Stop> {
    if header_digest(&retry.header).map_err(Stop::Refused)? != record.header_digest {
        return refuse_retry(retry, "its header is not that of the batch it carries on (I4)");
    }
    if (retry.root, retry.drive, retry.attempt) != (record.root, record.drive, record.attempt + 1) {
        return refuse_retry(
            retry,
            "its root, drive or attempt does not follow from the batch it carries on",
        );
    }
    let rows = Rows::decode(retry.payload.clone()).map_err(|error| Stop::Refused(payload_damaged(error)))?;
    if rows.len() != retry.count as usize || !(retry.history.is_empty() || retry.history.len() == rows.len())
    {
        return refuse_retry(retry, "its payload, count and history disagree");
    }
    Ok(rows)
}

impl Part {
    /// Two parts that together say the same; `None` if it can't be divided: a retry batch goes in one piece.
    pub(super) fn halves(&self) -> Option<(Self, Self)> {
        if !self.retries.is_empty() || self.verdicts.len() < 2 {
            return None;
        }
        let (left, right) = self.verdicts.split_at(self.verdicts.len() / 2);
        let part = |verdicts: &[_]| Self { verdicts: verdicts.to_vec(), retries: Vec::new(), ..self.clone() };
        Some((part(left), part(right)))
    }

    /// Divides it so that each retry batch has a part of its own; the record says which rows are which.
    pub(super) fn by_retry(&self, record: &Record) -> Result<Vec<Self>, StoreError> {
        let part =
            |verdicts, retries| Self { token: self.token, verdicts, retries, records: self.records.clone() };
        let mut left = self.verdicts.clone();
        let mut parts = Vec::new();
        for retry in &self.retries {
            let rows = Rows::decode(retry.payload.clone()).map_err(payload_damaged)?;
            let (own, others) = left.into_iter().partition(|&(index, verdict)| {
                matches!(verdict, Verdict::Retry { .. })
                    && (index as usize) < record.states.0.len()
                    && rows.find(record.row(index as usize)).is_some()
            });
            parts.push(part(own, vec![retry.clone()]));
            left = others;
        }
        parts.push(part(left, Vec::new()));
        Ok(parts)
    }
}
