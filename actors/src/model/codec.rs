//! How stores encode what they keep beside payloads. Each blob begins with a version byte: they outlive the
//! program that wrote them.

use super::{
    batch::{put_varint, take_varint},
    file::Reject,
    ids::{FileId, MessageId},
    receipt::{EventId, Price, Receipt, ReceiptFacts, ReceiptKey},
    state::MessageState,
    time::UnixMs,
};

const VERSION: u8 = 1;

/// Bytes that no version of this program wrote, or a newer one did.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("the stored {0} is damaged or was written by a newer version")]
pub struct Damaged(pub(super) &'static str);

/// Rejected rows: `version`, then per row `varint(row) varint(line) text(reason) bytes(raw)`.
pub fn encode_rejects(rejects: &[Reject]) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    for reject in rejects {
        put_varint(&mut bytes, reject.row);
        put_varint(&mut bytes, reject.line);
        put_varint(&mut bytes, reject.reason.len() as u64);
        bytes.extend_from_slice(reject.reason.as_bytes());
        put_varint(&mut bytes, reject.raw.len() as u64);
        bytes.extend_from_slice(&reject.raw);
    }
    bytes
}

/// Reads back what [`encode_rejects`] wrote.
pub fn decode_rejects(bytes: &[u8]) -> Result<Vec<Reject>, Damaged> {
    let read = || {
        let mut at = versioned(bytes)?;
        let mut rejects = Vec::new();
        while at < bytes.len() {
            let row = take_varint(bytes, &mut at)?;
            let line = take_varint(bytes, &mut at)?;
            let reason = String::from_utf8(take_bytes(bytes, &mut at)?.to_vec()).ok()?;
            let raw = take_bytes(bytes, &mut at)?.to_vec();
            rejects.push(Reject { row, line, reason, raw });
        }
        Some(rejects)
    };
    read().ok_or(Damaged("list of rejected rows"))
}

/// Ascending row numbers: `version`, then `varint(row - previous row)`.
pub fn encode_row_numbers(rows: &[u64]) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    let mut previous = 0;
    for &row in rows {
        put_varint(&mut bytes, row - previous);
        previous = row;
    }
    bytes
}

/// Reads back what [`encode_row_numbers`] wrote.
pub fn decode_row_numbers(bytes: &[u8]) -> Result<Vec<u64>, Damaged> {
    let read = || {
        let mut at = versioned(bytes)?;
        let mut row = 0u64;
        let mut rows = Vec::new();
        while at < bytes.len() {
            row = row.checked_add(take_varint(bytes, &mut at)?)?;
            rows.push(row);
        }
        Some(rows)
    };
    read().ok_or(Damaged("list of duplicate rows"))
}

/// A receipt that was stored with others. One that can't be read hides no other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredReceipt {
    /// Its event.
    pub event: EventId,
    /// It.
    pub receipt: Result<Receipt, Damaged>,
}

/// All bits of `present`, below.
const PRESENT_MAX: u8 = 0x7f;

/// Receipts: `version`, then of each `bytes(event state present key at sent_at price status carrier response)`, with a bit
/// in `present` for the provider's key, and for each of what follows it.
pub fn encode_receipts(receipts: &[&Receipt]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + receipts.len() * 128);
    bytes.push(VERSION);
    let mut one = Vec::with_capacity(256);
    for Receipt { event, key, state, at, facts } in receipts {
        let ReceiptFacts { status, carrier, response, sent_at, price } = facts;
        one.clear();
        one.extend_from_slice(&event.0);
        one.extend([*state as u8, 0]);
        let mut present = u8::from(matches!(key, ReceiptKey::Provider(_)));
        match key {
            ReceiptKey::Message(id) => {
                one.extend_from_slice(&id.file.0);
                put_varint(&mut one, id.row);
            }
            ReceiptKey::Provider(id) => put_bytes(&mut one, id.as_bytes()),
        }
        let numbers = [at.map(|at| at.0), sent_at.map(|at| at.0), price.map(|price| price.0.cast_unsigned())];
        for (bit, number) in numbers.into_iter().enumerate() {
            if let Some(number) = number {
                present |= 2 << bit;
                one.extend_from_slice(&number.to_le_bytes());
            }
        }
        for (bit, text) in [status, carrier, response].into_iter().enumerate() {
            if let Some(text) = text {
                present |= 16 << bit;
                put_bytes(&mut one, text.as_bytes());
            }
        }
        one[17] = present;
        put_bytes(&mut bytes, &one);
    }
    bytes
}

/// Reads back what [`encode_receipts`] wrote.
pub fn decode_receipts(bytes: &[u8]) -> Result<Vec<StoredReceipt>, Damaged> {
    let read = || {
        let mut at = versioned(bytes)?;
        let mut receipts = Vec::new();
        while at < bytes.len() {
            let one = take_bytes(bytes, &mut at)?;
            let event = EventId(one.get(..16)?.try_into().ok()?);
            receipts
                .push(StoredReceipt { event, receipt: decode_receipt(event, one).ok_or(Damaged("receipt")) });
        }
        Some(receipts)
    };
    read().ok_or(Damaged("row of receipts"))
}

fn decode_receipt(event: EventId, bytes: &[u8]) -> Option<Receipt> {
    let (state, present) = (MessageState::from_byte(*bytes.get(16)?)?, *bytes.get(17)?);
    if present > PRESENT_MAX {
        return None;
    }
    let mut place = 18;
    let text = |place: &mut usize| Some(Box::from(std::str::from_utf8(take_bytes(bytes, place)?).ok()?));
    let key = if present & 1 == 0 {
        let file = FileId(bytes.get(place..place + 16)?.try_into().ok()?);
        place += 16;
        ReceiptKey::Message(MessageId { file, row: take_varint(bytes, &mut place)? })
    } else {
        ReceiptKey::Provider(text(&mut place)?)
    };
    let mut numbers = [None; 3];
    for (bit, number) in numbers.iter_mut().enumerate() {
        if present & (2 << bit) != 0 {
            *number = Some(u64::from_le_bytes(bytes.get(place..place + 8)?.try_into().ok()?));
            place += 8;
        }
    }
    let mut texts = [None, None, None];
    for (bit, one) in texts.iter_mut().enumerate() {
        if present & (16 << bit) != 0 {
            *one = Some(text(&mut place)?);
        }
    }
    let [at, sent_at, price] = numbers;
    let [status, carrier, response] = texts;
    let price = price.map(|price| Price(price.cast_signed()));
    let facts = ReceiptFacts { status, carrier, response, sent_at: sent_at.map(UnixMs), price };
    (place == bytes.len()).then_some(Receipt { event, key, state, at: at.map(UnixMs), facts })
}

fn put_bytes(bytes: &mut Vec<u8>, more: &[u8]) {
    put_varint(bytes, more.len() as u64);
    bytes.extend_from_slice(more);
}

fn versioned(bytes: &[u8]) -> Option<usize> {
    (*bytes.first()? == VERSION).then_some(1)
}

fn take_bytes<'a>(bytes: &'a [u8], at: &mut usize) -> Option<&'a [u8]> {
    let len = usize::try_from(take_varint(bytes, at)?).ok()?;
    let end = at.checked_add(len)?;
    let taken = bytes.get(*at..end)?;
    *at = end;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn receipt() -> impl Strategy<Value = Receipt> {
        let key = prop_oneof![
            (any::<[u8; 16]>(), any::<u64>())
                .prop_map(|(file, row)| ReceiptKey::Message(MessageId { file: FileId(file), row })),
            ".{0,9}".prop_map(|id| ReceiptKey::Provider(id.into())),
        ];
        let text = || prop::option::of(".{0,9}".prop_map(Box::<str>::from));
        let facts = (text(), text(), text(), prop::option::of(any::<u64>()), prop::option::of(any::<i64>()));
        let facts = facts.prop_map(|(status, carrier, response, sent_at, price)| ReceiptFacts {
            status,
            carrier,
            response,
            sent_at: sent_at.map(UnixMs),
            price: price.map(Price),
        });
        (any::<[u8; 16]>(), key, prop::option::of(any::<u64>()), facts).prop_map(|(event, key, at, facts)| {
            Receipt { event: EventId(event), key, state: MessageState::Failed, at: at.map(UnixMs), facts }
        })
    }

    proptest! {
        #[test]
        fn rejects_read_back(rejects in prop::collection::vec((any::<u64>(), any::<u64>(), ".{0,9}", any::<[u8; 5]>()), 0..9)) {
            let rejects: Vec<_> = rejects.into_iter()
                .map(|(row, line, reason, raw)| Reject { row, line, reason, raw: raw.to_vec() }).collect();
            prop_assert_eq!(decode_rejects(&encode_rejects(&rejects)).unwrap(), rejects);
        }

        #[test]
        fn row_numbers_read_back(rows in prop::collection::btree_set(any::<u64>(), 0..30)) {
            let rows: Vec<_> = rows.into_iter().collect();
            prop_assert_eq!(decode_row_numbers(&encode_row_numbers(&rows)).unwrap(), rows);
        }

        #[test]
        fn any_bytes_are_read_or_refused_without_a_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            bytes.insert(0, VERSION);
            let _ = (decode_rejects(&bytes), decode_row_numbers(&bytes), decode_receipts(&bytes));
        }

        #[test]
        fn f52_receipts_read_back_and_one_that_is_damaged_hides_no_other(
            receipts in prop::collection::vec(receipt(), 1..9), which: prop::sample::Index, place in 16..18usize,
        ) {
            let all: Vec<_> = receipts.iter().collect();
            let mut bytes = encode_receipts(&all);
            let read = decode_receipts(&bytes).unwrap();
            prop_assert_eq!(read.iter().map(|stored| stored.receipt.as_ref().unwrap()).collect::<Vec<_>>(), all.clone());
            prop_assert!(read.iter().zip(&all).all(|(stored, receipt)| stored.event == receipt.event));
            // Its state, or what is present.
            let which = which.index(receipts.len());
            let before = encode_receipts(&all[..which]).len();
            let mut at = before;
            take_varint(&bytes, &mut at).unwrap();
            bytes[at + place] = 255;
            let read = decode_receipts(&bytes).unwrap();
            for (index, stored) in read.iter().enumerate() {
                prop_assert_eq!(stored.event, receipts[index].event);
                prop_assert_eq!(stored.receipt.is_ok(), index != which);
            }
        }
    }

    #[test]
    fn what_a_newer_version_wrote_is_refused() {
        assert!(decode_rejects(&[2]).is_err());
        assert!(decode_row_numbers(&[]).is_err());
    }
}
