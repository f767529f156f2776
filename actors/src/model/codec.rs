//! How stores encode what they keep beside payloads. Each blob begins with a version byte: they outlive the
//! program that wrote them.

use super::{
    batch::{put_varint, take_varint},
    file::Reject,
    outcome::{Attempt, Reason},
    time::UnixMs,
};

const VERSION: u8 = 1;

/// Bytes that no version of this program wrote, or a newer one did.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("the stored {0} is damaged or was written by a newer version")]
pub struct Damaged(&'static str);

/// The failed attempts per message; `None` if there were none at all.
///
/// `version`, then per message `varint(count)` and per attempt `varint(at) varint(status) reason`.
pub fn encode_history(history: &[Vec<Attempt>]) -> Option<Vec<u8>> {
    if history.iter().all(Vec::is_empty) {
        return None;
    }
    let mut bytes = vec![VERSION];
    for attempts in history {
        put_varint(&mut bytes, attempts.len() as u64);
        for attempt in attempts {
            put_varint(&mut bytes, attempt.at.0);
            put_varint(&mut bytes, u64::from(attempt.status));
            bytes.push(attempt.reason as u8);
        }
    }
    Some(bytes)
}

/// Reads back what [`encode_history`] wrote.
pub fn decode_history(bytes: &[u8]) -> Result<Vec<Vec<Attempt>>, Damaged> {
    let read = || {
        let mut at = versioned(bytes)?;
        let mut history = Vec::new();
        while at < bytes.len() {
            let count = take_varint(bytes, &mut at)?;
            // Not `with_capacity(count)`: a damaged count must not allocate.
            let mut attempts = Vec::new();
            for _ in 0..count {
                let ended = UnixMs(take_varint(bytes, &mut at)?);
                let status = u16::try_from(take_varint(bytes, &mut at)?).ok()?;
                let reason = Reason::from_byte(*bytes.get(at)?)?;
                at += 1;
                attempts.push(Attempt { at: ended, status, reason });
            }
            history.push(attempts);
        }
        Some(history)
    };
    read().ok_or(Damaged("attempt history"))
}

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

/// When each message of a batch was sent, so that an operator can prove it: per message the HTTP status
/// (`u16`, 0: not sent) and the milliseconds since the batch was accepted (`u32`), little-endian.
/// Six bytes per message, at a fixed place: no version byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentTimes(pub Vec<u8>);

const SENT_BYTES: usize = 6;

impl SentTimes {
    /// None sent.
    pub fn none(count: usize) -> Self {
        Self(vec![0; count * SENT_BYTES])
    }

    /// Records the answer to the message at `index`. The first 2xx stands.
    pub fn set(&mut self, index: usize, status: u16, accepted_at: UnixMs, at: UnixMs) {
        let entry = self.0.get_mut(index * SENT_BYTES..(index + 1) * SENT_BYTES);
        if let Some(entry) = entry
            && entry[..2] == [0, 0]
        {
            // A clock that was set back makes 0, 49 days and more make the maximum.
            let offset = u32::try_from(at.since(accepted_at).as_millis()).unwrap_or(u32::MAX);
            entry[..2].copy_from_slice(&status.to_le_bytes());
            entry[2..].copy_from_slice(&offset.to_le_bytes());
        }
    }

    /// The HTTP status and time of the message at `index`, if it was sent.
    pub fn get(&self, index: usize, accepted_at: UnixMs) -> Option<(u16, UnixMs)> {
        let entry = self.0.get(index * SENT_BYTES..(index + 1) * SENT_BYTES)?;
        let status = u16::from_le_bytes([entry[0], entry[1]]);
        let offset = u32::from_le_bytes([entry[2], entry[3], entry[4], entry[5]]);
        (status != 0).then_some((status, UnixMs(accepted_at.0 + u64::from(offset))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attempt() -> impl Strategy<Value = Attempt> {
        (any::<u64>(), any::<u16>(), 1u8..=10).prop_map(|(at, status, reason)| Attempt {
            at: UnixMs(at),
            status,
            reason: Reason::from_byte(reason).expect("in range"),
        })
    }

    proptest! {
        #[test]
        fn histories_read_back(history in prop::collection::vec(prop::collection::vec(attempt(), 0..4), 0..20)) {
            match encode_history(&history) {
                None => prop_assert!(history.iter().all(Vec::is_empty)),
                Some(bytes) => prop_assert_eq!(decode_history(&bytes).unwrap(), history),
            }
        }

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
            let _ = (decode_history(&bytes), decode_rejects(&bytes), decode_row_numbers(&bytes));
        }
    }

    #[test]
    fn what_a_newer_version_wrote_is_refused() {
        assert!(decode_history(&[2]).is_err());
        assert!(decode_rejects(&[2]).is_err());
        assert!(decode_row_numbers(&[]).is_err());
    }

    #[test]
    fn the_first_2xx_of_a_message_stands_and_clocks_that_jump_do_no_harm() {
        let mut sent = SentTimes::none(3);
        let accepted_at = UnixMs(1_000);
        sent.set(1, 202, accepted_at, UnixMs(1_250));
        sent.set(1, 200, accepted_at, UnixMs(9_000));
        sent.set(2, 200, accepted_at, UnixMs(10));
        sent.set(7, 200, accepted_at, UnixMs(10)); // out of range: ignored
        assert_eq!(sent.get(0, accepted_at), None);
        assert_eq!(sent.get(1, accepted_at), Some((202, UnixMs(1_250))));
        assert_eq!(sent.get(2, accepted_at), Some((200, accepted_at)));
        assert_eq!(sent.get(7, accepted_at), None);
    }
}
