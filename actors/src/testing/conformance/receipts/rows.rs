//! What delivery says.

use super::{NOW, ReceiptSubject, id, named, record, sent};
use crate::{
    model::{
        ids::{FileId, MessageId},
        outcome::Reason,
        receipt::{PROVIDER_ID_BYTES_MAX, ReportedStates},
        record::{MessageRecord, record_rank},
        state::MessageState,
        time::UnixMs,
    },
    testing::LedgerRow,
};

/// The row of a message of which this alone was said.
fn row_of(record: &MessageRecord) -> LedgerRow {
    let record = record.clone();
    LedgerRow {
        id: record.id,
        destination: record.destination,
        feed: record.feed,
        recipient: record.recipient,
        state: record.state,
        attempts: record.attempts,
        status: record.status,
        reason: record.reason,
        detail: record.detail,
        provider_id: record.provider_id,
        accepted_at: record.accepted_at,
        at: record.at,
        reported: ReportedStates(0),
        receipt: None,
    }
}

pub(super) async fn a_record_is_read_back_whole(subject: ReceiptSubject) {
    let far = MessageId { file: FileId([0xff; 16]), row: u64::from(u32::MAX) * 1_000 };
    let mut records = vec![
        MessageRecord {
            id: far,
            destination: "a destination, \"ü\"".into(),
            feed: "feed 'x'\n\\.\t".into(),
            recipient: "=cmd|' /C calc'!A0 ü \u{1f4ee}\r\n\\N\t{},\"".into(),
            state: MessageState::Dead,
            attempts: u32::MAX >> 1,
            status: 599,
            reason: Some(Reason::Render),
            detail: Some("d".repeat(500).into()),
            provider_id: Some("ü".repeat(PROVIDER_ID_BYTES_MAX / 2).into()),
            accepted_at: UnixMs(NOW.0 - 1),
            at: NOW,
        },
        MessageRecord { recipient: "".into(), status: 0, ..record(1, MessageState::Retrying, 1) },
        MessageRecord { detail: Some("".into()), provider_id: Some("".into()), ..sent(2) },
    ];
    for byte in (0..=u8::MAX).filter(|&byte| Reason::from_byte(byte).is_some()) {
        records.push(MessageRecord {
            reason: Reason::from_byte(byte),
            ..record(100 + u64::from(byte), MessageState::Dead, 1)
        });
    }
    for _ in 0..2 {
        subject.record(&records).await;
        for record in &records {
            let row = subject.rows.row(record.id, &record.destination).await;
            assert_eq!(row, Some(row_of(record)));
        }
    }
    assert_eq!(subject.tally().await.rows, records.len() as u64);
    assert_eq!(subject.rows.row(id(99), "d").await, None);
    assert_eq!(subject.rows.row(id(1), "e").await, None);
}

/// All orders of `items`.
fn permutations<T: Clone>(items: &[T]) -> Vec<Vec<T>> {
    let mut all = vec![Vec::new()];
    for item in items {
        let insert = |order: &Vec<T>| -> Vec<Vec<T>> {
            let at = |place: usize| {
                let mut longer = order.clone();
                longer.insert(place, item.clone());
                longer
            };
            (0..=order.len()).map(at).collect()
        };
        all = all.iter().flat_map(insert).collect();
    }
    all
}

pub(super) async fn records_merge_by_rank_whatever_their_order(subject: ReceiptSubject) {
    let said = |row: u64| {
        vec![
            MessageRecord { provider_id: Some("b".into()), ..record(row, MessageState::Retrying, 1) },
            MessageRecord { detail: Some("words".into()), ..record(row, MessageState::Dead, 4) },
            // A second drive: fewer attempts, and yet it says more.
            MessageRecord { provider_id: Some("c".into()), status: 202, ..sent(row) },
            MessageRecord {
                provider_id: Some("a".into()),
                status: 0,
                ..record(row, MessageState::Retrying, 3)
            },
        ]
    };
    for (row, order) in (1..).zip(permutations(&[0usize, 1, 2, 3])) {
        let said = said(row);
        for index in order.iter().chain(&order) {
            subject.record(&said[*index..=*index]).await;
        }
        let greatest = said.iter().max_by_key(|record| record_rank(record)).expect("four were said");
        let expected = MessageRecord { provider_id: Some("a".into()), ..greatest.clone() };
        assert_eq!(subject.row(row).await, row_of(&expected), "order {order:?}");
    }
    // Attempts before times, and times before nothing.
    let late = MessageRecord { at: UnixMs(NOW.0 + 9_000), ..record(50, MessageState::Retrying, 1) };
    let later = MessageRecord { at: UnixMs(NOW.0 + 9_001), status: 429, ..late.clone() };
    let more = MessageRecord { status: 408, ..record(50, MessageState::Retrying, 2) };
    subject.record(std::slice::from_ref(&later)).await;
    subject.record(&[late]).await;
    assert_eq!(subject.row(50).await, row_of(&later));
    subject.record(std::slice::from_ref(&more)).await;
    subject.record(&[later]).await;
    assert_eq!(subject.row(50).await, row_of(&more));
    // A redrive starts over: its result counts, however few its attempts.
    let dead = record(51, MessageState::Dead, 40);
    let redriven =
        MessageRecord { accepted_at: UnixMs(NOW.0 + 1), status: 400, ..record(51, MessageState::Dead, 1) };
    subject.record(std::slice::from_ref(&redriven)).await;
    subject.record(&[dead]).await;
    assert_eq!(subject.row(51).await, row_of(&redriven));
}

pub(super) async fn a_message_twice_in_one_call_is_one_row(subject: ReceiptSubject) {
    let (retrying, last) = (record(1, MessageState::Retrying, 1), named(1, "p"));
    subject.record(&[retrying.clone(), last.clone(), retrying, last.clone()]).await;
    assert_eq!(subject.row(1).await, row_of(&last));
    assert_eq!(subject.tally().await.rows, 1);
}

pub(super) async fn two_destinations_of_a_message_are_two_rows(subject: ReceiptSubject) {
    let here = named(1, "p");
    let there = MessageRecord { destination: "e".into(), ..record(1, MessageState::Dead, 5) };
    subject.record(&[here.clone(), there.clone()]).await;
    assert_eq!(subject.row(1).await, row_of(&here));
    assert_eq!(subject.row_at(1, "e").await, row_of(&there));
    assert_eq!(subject.tally().await.rows, 2);
}

pub(super) async fn records_come_in_any_number(subject: ReceiptSubject) {
    subject.record(&[]).await;
    assert_eq!(subject.tally().await.rows, 0);
    let many: Vec<_> = (1..=2_500).map(sent).collect();
    for _ in 0..2 {
        subject.record(&many).await;
        assert_eq!(subject.tally().await.rows, 2_500);
    }
    for row in [1, 1_000, 1_001, 2_500] {
        assert_eq!(subject.row(row).await, row_of(&sent(row)));
    }
}
