//! What is recorded of a batch: one small item of the ledger table, which changes often, apart from the
//! payload, which never does.

use std::{collections::BTreeMap, sync::Arc};

use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem};
use postrider_actors::{
    model::{
        batch::{BatchHeader, NewBatch, Rows, StateVector, put_varint, take_varint},
        ids::{BatchId, FileId},
        outcome::{Attempt, DeathCause, Reason},
        state::MessageState,
        time::UnixMs,
    },
    ports::StoreError,
};
use sha2::{Digest as _, Sha256};

use super::{
    calls::{Change, ledger_key, put},
    files::set,
    item::{
        ACCEPTED_AT, ATTEMPT, CARRIED_BY, COUNT, DEATHS, DETAILS, DRIVE, Damaged, FENCE, FILE, FIRST_ROW,
        HEADER_DIGEST, HOLDER, Item, LOSSES, NOT_BEFORE, ROOT, ROWS, Reading, SENT, STATES, TOPIC, UNSETTLED,
        UNTIL, VERSION, blob, item, number, payload_damaged, text, time,
    },
    schema,
};
use postrider_actors::model::codec::{self, SentTimes};

/// The claim on a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) holder: String,
    pub(super) until: UnixMs,
}

/// A batch and what is recorded of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) id: BatchId,
    pub(super) root: BatchId,
    pub(super) file: FileId,
    pub(super) destination: Arc<str>,
    pub(super) first_row: u64,
    pub(super) count: u32,
    pub(super) drive: u32,
    pub(super) attempt: u32,
    pub(super) accepted_at: UnixMs,
    pub(super) not_before: UnixMs,
    pub(super) header_digest: [u8; 16],
    /// Its row numbers, if there are gaps between them.
    gaps: Option<Vec<u64>>,
    pub(super) fence: u64,
    pub(super) held: Option<Held>,
    pub(super) losses: u32,
    pub(super) states: StateVector,
    pub(super) sent: Option<SentTimes>,
    /// Its dead messages by their indexes.
    pub(super) deaths: BTreeMap<u32, (Attempt, DeathCause)>,
    /// What the destination itself said of some of them.
    pub(super) details: BTreeMap<u32, Box<str>>,
    pub(super) unsettled: u32,
    /// Later batches that carry on some of its messages.
    pub(super) carried_by: Vec<BatchId>,
    /// Counts every change but that of the deadline.
    pub(super) version: u64,
}

/// What two headers that are alike have in common.
pub(super) fn header_digest(header: &BatchHeader) -> Result<[u8; 16], StoreError> {
    let json = serde_json::to_vec(header)
        .map_err(|error| StoreError::Permanent(format!("a header can't be written: {error}")))?;
    let mut digest = [0; 16];
    digest.copy_from_slice(&Sha256::digest(&json)[..16]);
    Ok(digest)
}

impl Record {
    /// Of a batch that is new.
    pub(super) fn of(batch: &NewBatch) -> Result<Self, StoreError> {
        let rows = Rows::decode(batch.payload.clone()).map_err(payload_damaged)?;
        if rows.len() != batch.count as usize || rows.is_empty() || rows.row(0) != batch.first_row {
            return Err(StoreError::Permanent(format!(
                "batch {} says that it has {} messages from row {}, its payload has {}",
                batch.id,
                batch.count,
                batch.first_row,
                rows.len()
            )));
        }
        let numbers = (0..rows.len()).map(|index| rows.row(index));
        let is_whole = rows.row(rows.len() - 1) - batch.first_row + 1 == u64::from(batch.count);
        Ok(Self {
            id: batch.id,
            root: batch.root,
            file: batch.header.file,
            destination: batch.header.destination.as_str().into(),
            first_row: batch.first_row,
            count: batch.count,
            drive: batch.drive,
            attempt: batch.attempt,
            accepted_at: batch.accepted_at,
            not_before: batch.not_before,
            header_digest: header_digest(&batch.header)?,
            gaps: (!is_whole).then(|| numbers.collect()),
            fence: 0,
            held: None,
            losses: 0,
            states: StateVector::accepted(batch.count),
            sent: None,
            deaths: BTreeMap::new(),
            details: BTreeMap::new(),
            unsettled: batch.count,
            carried_by: Vec::new(),
            version: 0,
        })
    }

    pub(super) fn row(&self, index: usize) -> u64 {
        match &self.gaps {
            Some(rows) => rows[index],
            None => self.first_row + index as u64,
        }
    }

    pub(super) fn find(&self, row: u64) -> Option<usize> {
        if let Some(rows) = &self.gaps {
            return rows.binary_search(&row).ok();
        }
        let index = row.checked_sub(self.first_row)?;
        (index < u64::from(self.count)).then_some(index as usize)
    }

    /// Whether the claim with this fence is held.
    pub(super) fn is_current(&self, fence: u64) -> bool {
        self.held.is_some() && self.fence == fence
    }

    /// Whether its messages were counted as `retrying` when it was made.
    pub(super) fn is_carrying_on(&self) -> bool {
        self.drive > 0 || self.attempt > 0
    }

    pub(super) fn has_dead(&self) -> bool {
        !self.deaths.is_empty()
    }

    /// Records that a message is dead. Of what the destination said of it there is room for so much per batch:
    /// the item is written whole at every change, and may not have more than 400 KB.
    pub(super) fn bury(&mut self, index: u32, attempt: Attempt, cause: DeathCause, detail: Option<&str>) {
        self.deaths.insert(index, (attempt, cause));
        if let Some(detail) = detail
            && self.detail_bytes() + detail.len() <= DETAILS_BYTES_MAX
        {
            self.details.insert(index, detail.into());
        }
    }

    /// Records that a message is not dead any more.
    pub(super) fn unbury(&mut self, index: u32) {
        self.deaths.remove(&index);
        self.details.remove(&index);
    }

    /// How many bytes the destination's words have.
    pub(super) fn detail_bytes(&self) -> usize {
        self.details.values().map(|detail| detail.len()).sum()
    }

    pub(super) fn key(id: BatchId) -> Item {
        ledger_key(&schema::batch_pk(id), schema::BATCH_SK)
    }

    pub(super) fn read(item: &Item) -> Result<Self, Damaged> {
        let reading = Reading(item);
        let id = reading.text(super::item::PK)?.strip_prefix(schema::BATCH_PREFIX);
        let count = reading.number(COUNT)?;
        let holder = reading.maybe_text(HOLDER)?;
        let gaps = reading.maybe_bytes(ROWS)?.map(codec::decode_row_numbers).transpose();
        let states = match reading.maybe_bytes(STATES)? {
            Some(states) => StateVector(states.to_vec()),
            None => StateVector::accepted(count),
        };
        let carried_by = match item.get(CARRIED_BY) {
            None => Vec::new(),
            Some(AttributeValue::L(ids)) => {
                let ids = ids.iter().map(|id| id.as_s().ok().and_then(|id| id.parse().ok()));
                ids.collect::<Option<_>>().ok_or(Damaged(CARRIED_BY))?
            }
            Some(_) => return Err(Damaged(CARRIED_BY)),
        };
        let deaths = reading.maybe_bytes(DEATHS)?.map(|bytes| decode_deaths(bytes).ok_or(Damaged(DEATHS)));
        let details =
            reading.maybe_bytes(DETAILS)?.map(|bytes| decode_details(bytes).ok_or(Damaged(DETAILS)));
        let digest = reading.bytes(HEADER_DIGEST)?.try_into().map_err(|_| Damaged(HEADER_DIGEST))?;
        if states.0.len() != count as usize {
            return Err(Damaged(STATES));
        }
        Ok(Self {
            id: id.and_then(|id| id.parse().ok()).ok_or(Damaged(super::item::PK))?,
            root: reading.batch_id(ROOT)?,
            file: reading.file_id(FILE)?,
            destination: reading.text(TOPIC)?.into(),
            first_row: reading.number(FIRST_ROW)?,
            count,
            drive: reading.number(DRIVE)?,
            attempt: reading.number(ATTEMPT)?,
            accepted_at: reading.time(ACCEPTED_AT)?,
            not_before: reading.time(NOT_BEFORE)?,
            header_digest: digest,
            gaps: gaps.map_err(|_| Damaged(ROWS))?,
            fence: reading.number(FENCE)?,
            held: match holder {
                Some(holder) => Some(Held { holder: holder.to_owned(), until: reading.time(UNTIL)? }),
                None => None,
            },
            losses: reading.number(LOSSES)?,
            states,
            sent: reading.maybe_bytes(SENT)?.map(|sent| SentTimes(sent.to_vec())),
            deaths: deaths.transpose()?.unwrap_or_default(),
            details: details.transpose()?.unwrap_or_default(),
            unsettled: reading.number(UNSETTLED)?,
            carried_by,
            version: reading.number(VERSION)?,
        })
    }

    /// Its item while it is new.
    fn write_new(&self) -> Item {
        let mut written = Self::key(self.id);
        written.extend(item([
            (ROOT, text(self.root.to_string())),
            (FILE, text(self.file.to_string())),
            (TOPIC, text(&*self.destination)),
            (FIRST_ROW, number(self.first_row)),
            (COUNT, number(self.count)),
            (DRIVE, number(self.drive)),
            (ATTEMPT, number(self.attempt)),
            (ACCEPTED_AT, time(self.accepted_at)),
            (NOT_BEFORE, time(self.not_before)),
            (HEADER_DIGEST, blob(self.header_digest)),
            (FENCE, number(0)),
            (LOSSES, number(0)),
            (VERSION, number(0)),
            (UNSETTLED, number(self.unsettled)),
        ]));
        if let Some(rows) = &self.gaps {
            written.insert(ROWS.to_owned(), blob(codec::encode_row_numbers(rows)));
        }
        // A message may be told about in the transaction that makes its batch.
        for (name, value) in self.recorded() {
            written.insert(name.to_owned(), value);
        }
        written
    }

    /// The attributes that recording changes, as far as there is anything to say.
    fn recorded(&self) -> Vec<(&'static str, AttributeValue)> {
        let mut recorded = Vec::new();
        if self.states.0.iter().any(|&state| state != MessageState::Accepted as u8) {
            recorded.push((STATES, blob(&self.states.0[..])));
        }
        if let Some(sent) = &self.sent {
            recorded.push((SENT, blob(&sent.0[..])));
        }
        if !self.deaths.is_empty() {
            recorded.push((DEATHS, blob(encode_deaths(&self.deaths))));
        }
        if !self.details.is_empty() {
            recorded.push((DETAILS, blob(encode_details(&self.details))));
        }
        if !self.carried_by.is_empty() {
            let ids = self.carried_by.iter().map(|id| text(id.to_string()));
            recorded.push((CARRIED_BY, AttributeValue::L(ids.collect())));
        }
        recorded
    }

    /// The action that stores it, if nothing of it is stored yet.
    pub(super) fn insert(&self, table: &str) -> Result<TransactWriteItem, StoreError> {
        put(table, self.write_new(), Some("attribute_not_exists(Pk)"))
    }

    /// The action that replaces what is recorded, if nobody else has changed it since it was read. The
    /// stored version is one higher then.
    pub(super) fn replace(&self, table: &str) -> Result<TransactWriteItem, StoreError> {
        let mut update = String::from("SET #Version = :next, #Unsettled = :Unsettled");
        let mut names = vec![VERSION, UNSETTLED];
        let mut values = vec![
            ("Version", number(self.version)),
            ("next", number(self.version + 1)),
            ("Unsettled", number(self.unsettled)),
        ];
        for (name, value) in self.recorded() {
            update.push_str(&set(name));
            names.push(name);
            values.push((name, value));
        }
        let mut remove = Vec::new();
        if self.held.is_none() {
            remove.extend([HOLDER, UNTIL]);
        }
        if self.deaths.is_empty() {
            remove.push(DEATHS);
        }
        if self.details.is_empty() {
            remove.push(DETAILS);
        }
        for (nth, name) in remove.into_iter().enumerate() {
            update.push_str(if nth == 0 { " REMOVE #" } else { ", #" });
            update.push_str(name);
            names.push(name);
        }
        Change {
            table,
            key: Self::key(self.id),
            update,
            condition: Some("#Version = :Version"),
            names,
            values,
        }
        .action()
    }
}

/// The most that a batch keeps of its destination's words on dead messages, in bytes. What has no room is
/// left out: the reason is always there.
const DETAILS_BYTES_MAX: usize = 64 * 1024;

/// Words on dead messages: a version byte, then per message `varint(index - previous index) varint(bytes)` and
/// the bytes.
fn encode_details(details: &BTreeMap<u32, Box<str>>) -> Vec<u8> {
    let mut bytes = vec![1];
    let mut previous = 0;
    for (&index, detail) in details {
        put_varint(&mut bytes, u64::from(index - previous));
        put_varint(&mut bytes, detail.len() as u64);
        bytes.extend(detail.as_bytes());
        previous = index;
    }
    bytes
}

fn decode_details(bytes: &[u8]) -> Option<BTreeMap<u32, Box<str>>> {
    let mut at = (*bytes.first()? == 1).then_some(1)?;
    let mut index = 0u32;
    let mut details = BTreeMap::new();
    while at < bytes.len() {
        index = index.checked_add(u32::try_from(take_varint(bytes, &mut at)?).ok()?)?;
        let len = usize::try_from(take_varint(bytes, &mut at)?).ok()?;
        let detail = bytes.get(at..at.checked_add(len)?)?;
        at += len;
        details.insert(index, str::from_utf8(detail).ok()?.into());
    }
    Some(details)
}

/// Dead messages: a version byte, then per message `varint(index - previous index) varint(at)
/// varint(status) reason cause`.
fn encode_deaths(deaths: &BTreeMap<u32, (Attempt, DeathCause)>) -> Vec<u8> {
    let mut bytes = vec![1];
    let mut previous = 0;
    for (&index, (attempt, cause)) in deaths {
        put_varint(&mut bytes, u64::from(index - previous));
        put_varint(&mut bytes, attempt.at.0);
        put_varint(&mut bytes, u64::from(attempt.status));
        bytes.extend([attempt.reason as u8, *cause as u8]);
        previous = index;
    }
    bytes
}

fn decode_deaths(bytes: &[u8]) -> Option<BTreeMap<u32, (Attempt, DeathCause)>> {
    let mut at = (*bytes.first()? == 1).then_some(1)?;
    let mut index = 0u32;
    let mut deaths = BTreeMap::new();
    while at < bytes.len() {
        index = index.checked_add(u32::try_from(take_varint(bytes, &mut at)?).ok()?)?;
        let ended = UnixMs(take_varint(bytes, &mut at)?);
        let status = u16::try_from(take_varint(bytes, &mut at)?).ok()?;
        let reason = Reason::from_byte(*bytes.get(at)?)?;
        let cause = DeathCause::from_byte(*bytes.get(at + 1)?)?;
        at += 2;
        deaths.insert(index, (Attempt { at: ended, status, reason }, cause));
    }
    Some(deaths)
}

#[cfg(test)]
mod tests {
    use postrider_actors::testing::fixtures;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_record_reads_back() {
        let file = fixtures::file("feed", 1, &["d"]);
        let batch = fixtures::batch(&file, "d", [3, 4, 9], UnixMs(5));
        let mut record = Record::of(&batch).unwrap();
        assert_eq!((record.row(2), record.find(9), record.find(5)), (9, Some(2), None));
        assert_eq!(Record::read(&record.write_new()).unwrap(), record);
        record.states.merge(1, MessageState::Dead);
        record.bury(1, fixtures::failed(UnixMs(7)), DeathCause::Age, Some("value too long for type ü"));
        record.carried_by.push(BatchId([7; 16]));
        record.sent = Some(SentTimes::none(3));
        assert_eq!(Record::read(&record.write_new()).unwrap(), record);

        record.unbury(1);
        assert_eq!((record.deaths.len(), record.details.len()), (0, 0));
        assert_eq!(Record::read(&record.write_new()).unwrap(), record);

        let whole = Record::of(&fixtures::batch(&file, "d", 3..=9, UnixMs(5))).unwrap();
        assert_eq!((whole.row(6), whole.find(9), whole.find(10), whole.find(2)), (9, Some(6), None, None));
        assert_eq!(Record::read(&whole.write_new()).unwrap(), whole);
    }

    #[test]
    fn words_on_dead_messages_are_bounded_per_batch() {
        let file = fixtures::file("feed", 1, &["d"]);
        let mut record = Record::of(&fixtures::batch(&file, "d", 1..=1_000, UnixMs(5))).unwrap();
        for index in 0..1_000 {
            record.bury(index, fixtures::failed(UnixMs(7)), DeathCause::Permanent, Some(&"x".repeat(500)));
        }
        assert_eq!((record.deaths.len(), record.details.len()), (1_000, DETAILS_BYTES_MAX / 500));
    }

    proptest! {
        #[test]
        fn deaths_read_back(deaths in prop::collection::btree_map(any::<u32>(), (any::<u64>(), any::<u16>(), 1u8..=10, 1u8..=4), 0..20)) {
            let deaths: BTreeMap<_, _> = deaths.into_iter().map(|(index, (at, status, reason, cause))| {
                let attempt = Attempt { at: UnixMs(at), status, reason: Reason::from_byte(reason).unwrap() };
                (index, (attempt, DeathCause::from_byte(cause).unwrap()))
            }).collect();
            prop_assert_eq!(decode_deaths(&encode_deaths(&deaths)), Some(deaths));
        }

        #[test]
        fn details_read_back(details in prop::collection::btree_map(any::<u32>(), "\\PC{0,300}", 0..20)) {
            let details: BTreeMap<u32, Box<str>> =
                details.into_iter().map(|(index, detail)| (index, detail.into())).collect();
            prop_assert_eq!(decode_details(&encode_details(&details)), Some(details));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = decode_deaths(&bytes);
            let _ = decode_details(&bytes);
        }
    }
}
