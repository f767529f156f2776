//! How stores encode what they keep beside payloads. Each blob begins with a version byte: they outlive the
//! program that wrote them.

use super::{
    batch::{put_varint, take_varint},
    file::Reject,
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
            let _ = (decode_rejects(&bytes), decode_row_numbers(&bytes));
        }
    }

    #[test]
    fn what_a_newer_version_wrote_is_refused() {
        assert!(decode_rejects(&[2]).is_err());
        assert!(decode_row_numbers(&[]).is_err());
    }
}
