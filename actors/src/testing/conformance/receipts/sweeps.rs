//! What time does.

use super::{
    DAY_MS, NOW, ReceiptSubject, arrival, by, delivered, failed, id, named, receipt, record, reject, sent,
};
use crate::{
    model::{record::MessageRecord, state::MessageState, time::UnixMs},
    ports::{Applied, Arrival, StatusChange, Taken},
};

fn after(ms: u64) -> UnixMs {
    UnixMs(NOW.0 + ms)
}

pub(super) async fn an_orphan_joins_when_its_message_comes(subject: ReceiptSubject) {
    let ledger = &subject.ledger;
    subject.take(&[delivered(1, 1), by("p-2", delivered(2, 2)), delivered(3, 3)]).await;
    assert_eq!(subject.drain_by(10, NOW).await.parked, 3);
    assert_eq!(ledger.parked().await, Ok(3));
    subject.take(&[delivered(4, 4)]).await;
    assert_eq!(subject.drain_by(10, after(10)).await.parked, 1);
    assert_eq!(ledger.orphan(NOW, 10).await, Ok(0), "parked at that time is not before it");
    assert_eq!(ledger.orphan(after(10), 2).await, Ok(2));
    assert_eq!(ledger.orphan(after(10), 10).await, Ok(1));
    assert_eq!(ledger.orphan(after(10), 10).await, Ok(0));
    assert_eq!((subject.tally().await.parked, subject.tally().await.orphans), (1, 3));
    assert_eq!(ledger.parked().await, Ok(1));

    subject.record(&[sent(1), named(2, "p-2"), sent(3), sent(4)]).await;
    assert_eq!(ledger.rejoin(10).await, Ok(0));
    assert_eq!(
        subject.drain().await,
        Applied { matched: 4, parked: 0, rejected: 0, changed: 4, conflicts: 0 }
    );
    for row in 1..=4 {
        assert_eq!(subject.state(row).await, MessageState::Delivered);
    }
    assert_eq!(subject.take(&[delivered(1, 1)]).await.known, 1, "what was given up is still known");
    assert_eq!(subject.tally().await.orphans, 0);
}

pub(super) async fn s0_5_what_has_no_receipt_in_time_expires_and_a_late_one_undoes_it(
    subject: ReceiptSubject,
) {
    let ledger = &subject.ledger;
    let late = MessageRecord { at: after(5_000), ..sent(7) };
    let elsewhere = MessageRecord { destination: "e".into(), ..sent(1) };
    let others = [record(5, MessageState::Dead, 1), record(6, MessageState::Retrying, 1), late, elsewhere];
    let rows: Vec<_> = (1..=4).map(sent).chain(others).collect();
    subject.record(&rows).await;
    subject.take(&[delivered(3, 1), receipt(4, 2, MessageState::Sent), failed(5, 3)]).await;
    subject.drain().await;
    assert_eq!(ledger.expire("d", after(1), 10, after(9_000)).await, Ok(0), "sent then is not before then");
    assert_eq!(ledger.expire("d", after(5_000), 2, after(9_000)).await, Ok(2));
    assert_eq!(ledger.expire("d", after(5_000), 10, after(9_000)).await, Ok(1));
    assert_eq!(ledger.expire("d", after(5_000), 10, after(9_000)).await, Ok(0));
    assert_eq!(ledger.expire("nowhere", after(5_000), 10, after(9_000)).await, Ok(0));
    let states = [
        (1, MessageState::Expired),
        (2, MessageState::Expired),
        (3, MessageState::Delivered),
        (4, MessageState::Expired),
        (5, MessageState::Failed),
        (6, MessageState::Retrying),
        (7, MessageState::Sent),
    ];
    for (row, state) in states {
        assert_eq!(subject.state(row).await, state, "row {row}");
    }
    assert_eq!(subject.row_at(1, "e").await.state, MessageState::Sent);
    // What delivery says again undoes nothing, nor does an interim receipt; a final one does.
    subject.record(&rows).await;
    subject.take(&[receipt(2, 4, MessageState::Sent), failed(1, 5)]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 2, parked: 0, rejected: 0, changed: 1, conflicts: 0 }
    );
    assert_eq!(subject.state(1).await, MessageState::Failed);
    assert_eq!(subject.state(2).await, MessageState::Expired);
    assert_eq!(ledger.expire("d", after(5_000), 10, after(9_000)).await, Ok(0));
    assert_eq!(ledger.expire("d", after(5_001), 10, after(9_000)).await, Ok(1), "the late one");
}

pub(super) async fn changes_are_kept_in_order_until_they_are_forgotten(subject: ReceiptSubject) {
    let ledger = &subject.ledger;
    assert_eq!(ledger.changes(None, 10).await, Ok(Vec::new()));
    subject.record(&[named(1, "p-1"), sent(2), sent(3), record(4, MessageState::Retrying, 1)]).await;
    subject.record(&[sent(4)]).await;
    assert_eq!(ledger.changes(None, 10).await, Ok(Vec::new()), "delivery reports its own");
    subject.take(&[failed(1, 1)]).await;
    subject.drain_by(10, after(1)).await;
    assert_eq!(ledger.expire("d", after(100), 10, after(2)).await, Ok(3));
    subject.take(&[delivered(1, 2), delivered(2, 3), delivered(1, 4), failed(1, 5)]).await;
    subject.drain_by(10, after(3)).await;

    let all = ledger.changes(None, 10).await.unwrap();
    assert!(all.windows(2).all(|pair| pair[0].number < pair[1].number), "unique and in order");
    let what = |change: &StatusChange| (change.id.row, change.before, change.state, change.at);
    let mut found: Vec<_> = all.iter().map(what).collect();
    found.sort_by_key(|&(row, .., at)| (at, row));
    let (sent, expired) = (MessageState::Sent, MessageState::Expired);
    let expected = vec![
        (1, sent, MessageState::Failed, after(1)),
        (2, sent, expired, after(2)),
        (3, sent, expired, after(2)),
        (4, sent, expired, after(2)),
        (1, MessageState::Failed, MessageState::Delivered, after(3)),
        (2, expired, MessageState::Delivered, after(3)),
    ];
    assert_eq!(found, expected);
    assert!(all.iter().all(|change| change.id == id(change.id.row) && &*change.destination == "d"));
    let named = |change: &StatusChange| change.provider_id.as_deref() == Some("p-1");
    assert!(all.iter().all(|change| named(change) == (change.id.row == 1)));

    assert_eq!(ledger.changes(None, 2).await.unwrap(), all[..2]);
    assert_eq!(ledger.changes(Some(all[1].number), 3).await.unwrap(), all[2..5]);
    assert_eq!(ledger.changes(Some(all[5].number), 3).await, Ok(Vec::new()));
    for _ in 0..2 {
        ledger.forget_changes(&[all[0].number, all[3].number]).await.unwrap();
        let left = [&all[1..3], &all[4..]].concat();
        assert_eq!(ledger.changes(None, 10).await.unwrap(), left);
    }
    ledger.forget_changes(&all.iter().map(|change| change.number).collect::<Vec<_>>()).await.unwrap();
    assert_eq!(ledger.changes(None, 10).await, Ok(Vec::new()));
    ledger.forget_changes(&[]).await.unwrap();
    // A number is never given twice, so that who remembers where it was misses nothing.
    subject.take(&[failed(3, 6)]).await;
    subject.drain().await;
    let next = ledger.changes(Some(all[5].number), 10).await.unwrap();
    assert_eq!(next.iter().map(|change| change.id.row).collect::<Vec<_>>(), [3]);
}

pub(super) async fn retention_goes_by_age_in_bounded_steps(subject: ReceiptSubject) {
    let ledger = &subject.ledger;
    let much_later = after(100 * DAY_MS);
    let new = MessageRecord { accepted_at: much_later, at: much_later, ..named(1_001, "p-new") };
    let new = MessageRecord {
        id: crate::model::ids::MessageId { file: crate::model::ids::FileId([9; 16]), row: 1 },
        ..new
    };
    let old: Vec<_> = (1..=30).map(|row| named(row, &format!("p-{row}"))).collect();
    subject.record(&old).await;
    let unknown = (101..=120).map(|row| delivered(row, row));
    let receipts: Vec<_> = (1..=30).map(|row| delivered(row, row)).chain(unknown).collect();
    let arrived = Arrival { rejects: vec![reject(900)], ..arrival(&receipts) };
    ledger.take(arrived.clone()).await.unwrap();
    assert_eq!(subject.drain().await.parked, 20);
    assert_eq!(ledger.orphan(after(1), 100).await, Ok(20));
    let of_new = Arrival { at: much_later, rejects: vec![reject(902)], ..arrival(&[delivered(200, 901)]) };
    subject.record(std::slice::from_ref(&new)).await;
    ledger.take(of_new.clone()).await.unwrap();
    assert_eq!(subject.drain_by(10, much_later).await.parked, 1);

    while ledger.retire(UnixMs(NOW.0 - DAY_MS), 7).await.unwrap() > 0 {}
    let tally = subject.tally().await;
    assert_eq!((tally.rows, tally.parked, tally.orphans, tally.rejects), (31, 1, 20, 2), "nothing is so old");
    let mut steps = 0;
    while ledger.retire(after(50 * DAY_MS), 7).await.unwrap() > 0 {
        steps += 1;
        assert!(steps < 1_000, "retention finishes");
    }
    let tally = subject.tally().await;
    assert_eq!((tally.rows, tally.parked, tally.orphans, tally.rejects), (1, 1, 0, 1));
    assert_eq!(subject.rows.row(id(1), "d").await, None);
    assert!(subject.rows.row(new.id, "d").await.is_some());
    assert_eq!(ledger.take(of_new).await, Ok(Taken { new: 0, known: 1, reused_ids: 0, rejected: 0 }));
    // What is forgotten comes as if for the first time.
    let again = ledger.take(Arrival { at: much_later, ..arrived }).await.unwrap();
    assert_eq!(again, Taken { new: 50, known: 0, reused_ids: 0, rejected: 1 });
    assert_eq!(subject.drain_by(100, much_later).await.parked, 50);
    subject.take(&[by("p-1", delivered(1, 950)), by("p-new", delivered(1, 951))]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 1, parked: 1, rejected: 0, changed: 1, conflicts: 0 }
    );
}
