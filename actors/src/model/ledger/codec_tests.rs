//! What is encoded reads back, and what is damaged or newer is refused.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{
    codec::{self, Head},
    tests::{ACCEPTED, round_trip},
    *,
};
use crate::model::{
    outcome::{Attempt, DeathCause, Reason},
    state::MessageState,
    time::UnixMs,
};

fn any_exception() -> impl Strategy<Value = Exception> {
    let death = (any::<u64>(), any::<u16>(), 1u8..=4, prop::option::of(".{0,20}")).prop_map(
        |(at, status, cause, detail)| Death {
            attempt: Attempt { at: UnixMs(at), status, reason: Reason::Tls },
            cause: DeathCause::from_byte(cause).unwrap(),
            detail: detail.map(String::into),
        },
    );
    (
        any::<u64>(),
        any::<u32>(),
        prop::option::of(any::<u64>()),
        prop::option::of(death),
        any::<u8>(),
        any::<u8>(),
    )
        .prop_map(|(not_before, drive, redriven_at, death, losses, losses_alone)| Exception {
            not_before: UnixMs(not_before),
            drive,
            redriven_at: redriven_at.map(UnixMs),
            death,
            losses,
            losses_alone,
        })
}

fn any_record() -> impl Strategy<Value = Record> {
    (1usize..40).prop_flat_map(|count| {
        (
            prop::collection::vec(prop::sample::select(&MessageState::ALL), count),
            prop::collection::vec(any::<u8>(), count),
            prop::collection::vec((200u16..203, any::<u64>()), count),
            prop::collection::btree_map(0..count as u32, any_exception(), 0..count),
            (any::<u64>(), any::<u64>(), any::<u64>(), any::<u8>(), any::<u64>(), any::<u64>()),
            prop::option::of(0..count as u32),
            prop::option::of((".{0,9}", any::<u64>())),
        )
            .prop_map(move |(states, tries, sent, exceptions, numbers, begun, holder)| {
                let (accepted_at, not_before, fence, losses, rendered, at) = numbers;
                let mut record = Record::new(count as u32, UnixMs(accepted_at), UnixMs(not_before));
                record.states.0 = states.into_iter().map(|state| state as u8).collect();
                record.tries = tries;
                if record.states.0.iter().any(|&state| state >= MessageState::Sent as u8) {
                    let sent = sent.into_iter().map(|(status, after_ms)| Sent { status, after_ms });
                    let of_sent = |(&state, sent)| {
                        if state >= MessageState::Sent as u8 { sent } else { Sent::default() }
                    };
                    record.sent = record.states.0.iter().zip(sent).map(of_sent).collect();
                }
                record.exceptions = exceptions;
                record.rendered = Rendered { fence: rendered, at: UnixMs(at) };
                (record.fence, record.losses, record.begun) = (fence, losses, begun);
                record.holder = holder.map(|(name, until)| Holder { name, until: Deadline(until) });
                record
            })
    })
}

fn any_failure() -> impl Strategy<Value = Failure> {
    (0u32..9, 0u32..3, 1u32..300, any::<u64>(), any::<u16>(), 1u8..=12).prop_map(
        |(index, drive, attempt_number, at, status, reason)| Failure {
            index,
            drive,
            attempt_number,
            attempt: Attempt { at: UnixMs(at), status, reason: Reason::from_byte(reason).unwrap() },
        },
    )
}

proptest! {
    #[test]
    fn the_record_is_due_when_its_first_open_message_is(record in any_record()) {
        prop_assert_eq!(record.due(), record.open().map(|index| record.due_of(index)).min());
    }

    #[test]
    fn any_record_reads_back(record in any_record()) {
        prop_assert_eq!(round_trip(&record), record);
    }

    #[test]
    fn any_bytes_are_read_or_refused_without_a_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..120), count in 1u32..20, cut: usize, record in any_record(),
    ) {
        let head = |count| Head { count, accepted_at: ACCEPTED, not_before: ACCEPTED, fence: 1, holder: None };
        bytes.insert(0, 1);
        let _ = (codec::decode(head(count), Some(&bytes)), codec::decode_history(&bytes));
        let _ = codec::decode_rows(1, count, Some(&bytes));
        // One that was cut off, or belongs to another batch.
        let whole = codec::encode(&record);
        let own = record.len() as u32;
        let _ = codec::decode(head(own), Some(&whole[..cut % whole.len()]));
        let other = codec::decode(head(own + 1), Some(&whole));
        prop_assert!(other.is_err() || other.unwrap().len() as u32 == own + 1);
    }

    #[test]
    fn histories_read_back_and_failures_are_complete_and_in_order(
        chunks in prop::collection::vec(prop::collection::vec(any_failure(), 0..20), 0..6),
    ) {
        let mut all: BTreeMap<(u32, u32, u32), Attempt> = BTreeMap::new();
        let mut encoded = Vec::new();
        for mut chunk in chunks {
            // An attempt is recorded once.
            chunk.retain(|failure| {
                let key = (failure.index, failure.drive, failure.attempt_number);
                !all.contains_key(&key) && all.insert(key, failure.attempt).is_none()
            });
            let bytes = codec::encode_history(&chunk);
            let mut read = codec::decode_history(&bytes).unwrap();
            let key = |failure: &Failure| (failure.index, failure.drive, failure.attempt_number);
            read.sort_by_key(key);
            chunk.sort_by_key(key);
            prop_assert_eq!(read, chunk);
            encoded.push(bytes);
        }
        // One that was written twice says the same twice, and their order does not matter.
        encoded.extend(encoded.clone());
        encoded.reverse();
        for index in 0..9 {
            let read = codec::failures_of(encoded.iter().map(Vec::as_slice), index).unwrap();
            let kept: Vec<_> = all.range((index, 0, 0)..(index + 1, 0, 0)).map(|(_, attempt)| *attempt).collect();
            prop_assert_eq!(read, kept);
        }
    }

    #[test]
    fn row_numbers_read_back(numbers in prop::collection::btree_set(1u64.., 1..30), from in 1u64..1_000, many in 1u32..50) {
        let whole: Vec<u64> = (from..from + u64::from(many)).collect();
        for numbers in [numbers.into_iter().collect::<Vec<_>>(), whole] {
            let rows = RowNumbers::of(numbers.clone());
            prop_assert_eq!(rows.len(), numbers.len());
            for (index, &number) in numbers.iter().enumerate() {
                prop_assert_eq!((rows.row(index), rows.find(number)), (number, Some(index)));
                for near in [number.wrapping_sub(1), number.wrapping_add(1)] {
                    prop_assert_eq!(rows.find(near), numbers.binary_search(&near).ok());
                }
            }
            let gaps = codec::encode_rows(&rows);
            prop_assert_eq!(gaps.is_none(), matches!(rows, RowNumbers::Whole { .. }));
            let read = codec::decode_rows(numbers[0], numbers.len() as u32, gaps.as_deref()).unwrap();
            prop_assert_eq!(read, rows);
        }
    }
}

#[test]
fn what_a_newer_version_wrote_is_refused() {
    let head = Head { count: 1, accepted_at: ACCEPTED, not_before: ACCEPTED, fence: 0, holder: None };
    let mut body = codec::encode(&Record::new(1, ACCEPTED, ACCEPTED));
    assert!(codec::decode(head.clone(), Some(&body)).is_ok());
    body[0] = 2;
    assert!(codec::decode(head.clone(), Some(&body)).is_err());
    assert!(codec::decode_history(&[2]).is_err());
    assert_eq!(codec::decode(head, None), Ok(Record::new(1, ACCEPTED, ACCEPTED)), "nothing was recorded yet");
    // Rows that are not those of the batch.
    let gaps = codec::encode_rows(&RowNumbers::of(vec![3, 5])).unwrap();
    assert!(codec::decode_rows(3, 2, Some(&gaps)).is_ok());
    assert!(codec::decode_rows(3, 3, Some(&gaps)).is_err());
    assert!(codec::decode_rows(2, 2, Some(&gaps)).is_err());
}
