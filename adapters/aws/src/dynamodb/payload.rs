//! What batches carry, each content stored once under its digest (B4).
//!
//! A payload is what a batch's messages have in common, but for the destination, and its rows. Batches of several
//! destinations share it, and so do two processes that read the same bytes. It is put before the batches that need it,
//! never changed, and carries when it expires. While a batch needs it for longer, whoever looks at that batch has it
//! kept; what nobody looks at any more, or what was put for a step that was never stored, goes by itself.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    str::FromStr,
    sync::Arc,
};

use bytes::Bytes;
use postrider_actors::{
    model::{
        batch::{BatchHeader, NewBatch},
        ids::hex,
        time::UnixMs,
    },
    ports::StoreError,
};
use sha2::{Digest as _, Sha256};

use super::item::{
    DIGEST, Damaged, EXPIRES_AT, HEADER, Item, PAYLOAD, Reading, blob, item, number, size, text,
};

/// The most that an item may take, less what our count of it may be short of.
const ITEM_BYTES_MAX: usize = 400_000;

/// Bytes of payloads that are remembered, so that they need not be read when their batches are claimed.
const REMEMBERED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The first 128 bits of SHA-256 over a payload's content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct PayloadId([u8; 16]);

impl PayloadId {
    /// Of a header, as it is stored, and rows.
    fn derive(header: &str, rows: &[u8]) -> Self {
        let mut hash = Sha256::new();
        hash.update((header.len() as u64).to_le_bytes());
        hash.update(header);
        hash.update(rows);
        let mut id = [0; 16];
        id.copy_from_slice(&hash.finalize()[..16]);
        Self(id)
    }

    pub(super) fn key(self) -> Item {
        item([(DIGEST, text(self.to_string()))])
    }
}

impl fmt::Display for PayloadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for PayloadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PayloadId({self})")
    }
}

impl FromStr for PayloadId {
    type Err = Damaged;

    fn from_str(text: &str) -> Result<Self, Damaged> {
        let number = u128::from_str_radix(text, 16).map_err(|_| Damaged(DIGEST))?;
        if text.len() == 32 { Ok(Self(number.to_be_bytes())) } else { Err(Damaged(DIGEST)) }
    }
}

/// What several batches may carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Payload {
    /// Its destination is empty: that is the batch's.
    pub(super) header: Arc<BatchHeader>,
    pub(super) rows: Bytes,
}

impl Payload {
    /// What an item holds, if that is what was put under its digest (F61).
    pub(super) fn read(mut item: Item) -> Result<(PayloadId, Self), Damaged> {
        let rows: Bytes = match item.remove(PAYLOAD) {
            Some(aws_sdk_dynamodb::types::AttributeValue::B(bytes)) => bytes.into_inner().into(),
            _ => return Err(Damaged(PAYLOAD)),
        };
        let reading = Reading(&item);
        let (id, header) = (reading.text(DIGEST)?.parse()?, reading.text(HEADER)?);
        if PayloadId::derive(header, &rows) != id {
            return Err(Damaged(DIGEST));
        }
        let header: BatchHeader = serde_json::from_str(header).map_err(|_| Damaged(HEADER))?;
        Ok((id, Self { header: header.into(), rows }))
    }
}

/// A payload that is to be stored.
pub(super) struct NewPayload {
    pub(super) id: PayloadId,
    header: String,
    pub(super) payload: Payload,
}

impl NewPayload {
    pub(super) fn of(batch: &NewBatch) -> Result<Self, StoreError> {
        let common = BatchHeader { destination: String::new(), ..(*batch.header).clone() };
        let header = serde_json::to_string(&common)
            .map_err(|error| StoreError::Permanent(format!("the header of batch {}: {error}", batch.id)))?;
        let id = PayloadId::derive(&header, &batch.payload);
        let payload = Payload { header: common.into(), rows: batch.payload.clone() };
        let new = Self { id, header, payload };
        let bytes = size(&new.item(UnixMs(0)));
        if bytes > ITEM_BYTES_MAX {
            return Err(StoreError::Permanent(format!(
                "batch {} takes {bytes} bytes, an item of DynamoDB takes {ITEM_BYTES_MAX}: lower max_row of its feed, or \
                 shorten the template",
                batch.id
            )));
        }
        Ok(new)
    }

    pub(super) fn item(&self, until: UnixMs) -> Item {
        item([
            (DIGEST, text(self.id.to_string())),
            (HEADER, text(&*self.header)),
            (PAYLOAD, blob(&self.payload.rows[..])),
            (EXPIRES_AT, number(until.0 / 1000)),
        ])
    }
}

/// Payloads that were put or read lately: bounded by their bytes, the oldest goes first.
#[derive(Default)]
pub(super) struct PayloadCache {
    /// With until when they are kept; `None` for what was only read.
    payloads: HashMap<PayloadId, (Payload, Option<UnixMs>)>,
    order: VecDeque<PayloadId>,
    bytes: usize,
}

impl PayloadCache {
    pub(super) fn get(&self, id: PayloadId) -> Option<&Payload> {
        self.payloads.get(&id).map(|(payload, _)| payload)
    }

    /// Until when a payload that was put is kept.
    pub(super) fn kept_until(&self, id: PayloadId) -> Option<UnixMs> {
        self.payloads.get(&id).and_then(|(_, until)| *until)
    }

    pub(super) fn insert(&mut self, id: PayloadId, payload: Payload, until: Option<UnixMs>) {
        let bytes = payload.rows.len();
        if let Some((_, known)) = self.payloads.get_mut(&id) {
            *known = until.max(*known);
            return;
        }
        self.payloads.insert(id, (payload, until));
        self.order.push_back(id);
        self.bytes += bytes;
        while self.bytes > REMEMBERED_BYTES_MAX {
            let Some(oldest) = self.order.pop_front() else { break };
            if let Some((payload, _)) = self.payloads.remove(&oldest) {
                self.bytes -= payload.rows.len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use aws_sdk_dynamodb::types::AttributeValue;
    use postrider_actors::testing::fixtures;

    use super::{super::record::StoredBatch, *};

    #[test]
    fn a_payload_reads_back_and_destinations_share_it() {
        let file = fixtures::file("feed", 1, &["d", "e"]);
        let batch = fixtures::batch(&file, "d", 3..=9, UnixMs(5));
        let new = NewPayload::of(&batch).unwrap();
        let (id, payload) = Payload::read(new.item(UnixMs(9_000))).unwrap();
        assert_eq!((id, id.to_string().parse()), (new.id, Ok(id)));
        let stored = StoredBatch::of(&batch, id, UnixMs(9_000)).unwrap();
        assert_eq!(stored.batch(&payload), batch);
        assert_eq!(NewPayload::of(&fixtures::batch(&file, "e", 3..=9, UnixMs(5))).unwrap().id, id);
        // Another cut, another template: another payload.
        assert_ne!(NewPayload::of(&fixtures::batch(&file, "d", 3..=8, UnixMs(5))).unwrap().id, id);
        let mut other = batch.clone();
        other.header = Arc::new(BatchHeader { template: Some("{}".into()), ..(*batch.header).clone() });
        assert_ne!(NewPayload::of(&other).unwrap().id, id);
        assert_eq!(Payload::read(Item::new()), Err(Damaged(PAYLOAD)));
        assert!("abc".parse::<PayloadId>().is_err());
    }

    #[test]
    fn f61_a_payload_that_was_altered_is_none() {
        let file = fixtures::file("feed", 1, &["d"]);
        let item =
            NewPayload::of(&fixtures::batch(&file, "d", 3..=9, UnixMs(5))).unwrap().item(UnixMs(9_000));
        let Some(AttributeValue::B(rows)) = item.get(PAYLOAD).cloned() else { panic!("rows are binary") };
        let mut rows = rows.into_inner();
        *rows.last_mut().unwrap() ^= 1;
        let mut altered = item.clone();
        altered.insert(PAYLOAD.to_owned(), blob(rows));
        assert_eq!(Payload::read(altered), Err(Damaged(DIGEST)));
        let mut altered = item;
        let Some(AttributeValue::S(json)) = altered.get_mut(HEADER) else { panic!("headers are text") };
        *json = json.replace("feed", "weed");
        assert_eq!(Payload::read(altered), Err(Damaged(DIGEST)));
    }

    #[test]
    fn i8_what_is_remembered_is_bounded_by_its_bytes() {
        let mut remembered = PayloadCache::default();
        let big = Payload {
            header: fixtures::header(&fixtures::file("feed", 1, &["d"]), "d"),
            rows: vec![0; REMEMBERED_BYTES_MAX / 4].into(),
        };
        let id = |number: u8| PayloadId([number; 16]);
        for number in 0..6 {
            remembered.insert(id(number), big.clone(), None);
        }
        remembered.insert(id(5), big, Some(UnixMs(7)));
        assert!(remembered.bytes <= REMEMBERED_BYTES_MAX && remembered.payloads.len() == 4);
        assert!(remembered.get(id(1)).is_none() && remembered.get(id(2)).is_some());
        assert_eq!(remembered.payloads[&id(5)].1, Some(UnixMs(7)), "it was put meanwhile");
    }
}
