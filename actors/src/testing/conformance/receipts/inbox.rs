//! What sources bring, and how much of it is applied at once.

use super::{NOW, ReceiptSubject, arrival, by, cursor, delivered, failed, id, named, receipt, reject, sent};
use crate::{
    model::{
        receipt::{PROVIDER_ID_BYTES_MAX, Price, RESPONSE_BYTES_MAX, Receipt, ReceiptFacts, WORD_BYTES_MAX},
        state::MessageState,
        time::UnixMs,
    },
    ports::{Applied, Arrival, Reread, Taken},
};

pub(super) async fn a_receipt_is_taken_once_by_its_source_and_event(subject: ReceiptSubject) {
    subject.record(&[sent(1), sent(2), sent(3)]).await;
    let (first, second) = (delivered(1, 1), failed(2, 2));
    let twice = [first.clone(), second.clone(), first.clone()];
    assert_eq!(subject.take(&twice).await, Taken { new: 2, known: 1, reused_ids: 0, rejected: 0 });
    assert_eq!(
        subject.take(&twice).await,
        Taken { new: 0, known: 3, reused_ids: 0, rejected: 0 },
        "while they wait"
    );
    assert_eq!(subject.waiting().await, 2);
    assert_eq!(
        subject.drain().await,
        Applied { matched: 2, parked: 0, rejected: 0, changed: 2, conflicts: 0 }
    );
    // What it says is a part of the event: see `EventId::saying`.
    let other = Receipt { event: first.event, ..delivered(3, 9) };
    let taken = subject.take(&[first.clone(), other, delivered(3, 4)]).await;
    assert_eq!(taken, Taken { new: 1, known: 2, reused_ids: 0, rejected: 0 }, "after they were applied");
    let elsewhere = Arrival { source: "t".into(), ..arrival(&[first]) };
    assert_eq!(
        subject.ledger.take(elsewhere).await,
        Ok(Taken { new: 1, known: 0, reused_ids: 0, rejected: 0 })
    );
    assert_eq!(
        subject.drain().await,
        Applied { matched: 2, parked: 0, rejected: 0, changed: 1, conflicts: 0 }
    );
    assert_eq!(subject.ledger.apply(10, usize::MAX, NOW).await, Ok(Applied::default()), "nothing waits");
}

/// A mapping that takes a message's id for a receipt's: `sent`, then `delivered`, under one id.
pub(super) async fn f51_another_receipt_under_a_known_id_is_taken_and_counted(subject: ReceiptSubject) {
    subject.record(&[sent(1), sent(2)]).await;
    let under = |id: u64, receipt: Receipt| Receipt { event: super::event(id).saying(&receipt), ..receipt };
    let interim = under(1, receipt(1, 1, MessageState::Sent));
    let (last, other) = (under(1, delivered(1, 2)), under(1, failed(2, 3)));
    let taken = |new, known, reused_ids| Taken { new, known, reused_ids, rejected: 0 };
    assert_eq!(subject.take(std::slice::from_ref(&interim)).await, taken(1, 0, 0));
    assert_eq!(subject.take(&[last.clone(), interim.clone()]).await, taken(1, 1, 1), "in the inbox");
    subject.drain().await;
    assert_eq!(subject.take(&[other, last.clone(), interim.clone()]).await, taken(1, 2, 1), "applied");
    let (one, two) = (under(4, delivered(1, 2)), under(4, failed(1, 3)));
    assert_eq!(subject.take(&[one, two]).await, taken(2, 0, 1), "at once");
    let elsewhere = Arrival { source: "t".into(), ..arrival(&[last]) };
    assert_eq!(subject.ledger.take(elsewhere).await, Ok(taken(1, 0, 0)));
    subject.drain().await;
    assert_eq!(subject.state(1).await, MessageState::Delivered);
    assert_eq!(subject.state(2).await, MessageState::Failed);
}

pub(super) async fn the_cursor_moves_with_what_is_taken(subject: ReceiptSubject) {
    let ledger = &subject.ledger;
    assert_eq!(ledger.cursor("s").await, Ok(None));
    assert_eq!(subject.take(&[delivered(1, 1)]).await.new, 1);
    assert_eq!(ledger.cursor("s").await, Ok(None), "a source without one");
    let long = "{\"ü\":\"\\\"}".repeat(1_000);
    let nothing: &[Receipt] = &[];
    for (receipts, at) in
        [(&[delivered(1, 1), delivered(2, 2)][..], "1"), (&[delivered(2, 2)], "0"), (nothing, &long)]
    {
        ledger.take(Arrival { cursor: Some(cursor(at)), ..arrival(receipts) }).await.unwrap();
        assert_eq!(ledger.cursor("s").await, Ok(Some(cursor(at))));
        ledger.take(arrival(receipts)).await.unwrap();
        assert_eq!(ledger.cursor("s").await, Ok(Some(cursor(at))), "it has not moved");
    }
    assert_eq!(ledger.cursor("S").await, Ok(None));
    assert_eq!(ledger.take(arrival(nothing)).await, Ok(Taken::default()));
    assert_eq!(subject.waiting().await, 2);
}

pub(super) async fn it_is_noted_when_receipts_came_and_when_the_cursor_moved(subject: ReceiptSubject) {
    let at = |second: u64| UnixMs(NOW.0 + 1_000 * second);
    let times = async || subject.rows.source("s").await.map(|source| (source.receipts_at, source.cursor_at));
    let bring = async |second, receipts: &[Receipt], rejects, to: Option<&str>| {
        let arrival = Arrival { rejects, cursor: to.map(cursor), at: at(second), ..arrival(receipts) };
        subject.ledger.take(arrival).await.unwrap();
    };
    assert_eq!(times().await, None);
    bring(1, &[], Vec::new(), Some("1")).await;
    assert_eq!(times().await, Some((None, Some(at(1)))), "a poll that found nothing");
    bring(2, &[delivered(1, 1)], Vec::new(), None).await;
    assert_eq!(times().await, Some((Some(at(2)), Some(at(1)))));
    bring(3, &[], vec![reject(5)], Some("2")).await;
    assert_eq!(times().await, Some((Some(at(3)), Some(at(3)))), "it came, if nobody can read it");
    bring(4, &[], Vec::new(), Some("3")).await;
    assert_eq!(times().await, Some((Some(at(3)), Some(at(4)))));
    bring(5, &[delivered(1, 1)], Vec::new(), Some("4")).await;
    assert_eq!(times().await, Some((Some(at(5)), Some(at(5)))), "known or not");
    // Nobody brings what is read again.
    let receipts = vec![(super::event(5), delivered(2, 5))];
    let (source, destination) = ("s".into(), "d".into());
    let (ignored, rejected) = (Vec::new(), Vec::new());
    let reread = Reread { source, destination, receipts, ignored, rejected, at: at(6) };
    assert_eq!(subject.rejects.settle_rejects(reread).await.unwrap().new, 1);
    assert_eq!(times().await, Some((Some(at(5)), Some(at(5)))));
}

pub(super) async fn an_application_is_bounded_by_receipts_and_bytes(subject: ReceiptSubject) {
    subject.record(&(1..=100).map(sent).collect::<Vec<_>>()).await;
    let large = |number: u64| {
        let response = Some("r".repeat(RESPONSE_BYTES_MAX).into());
        Receipt { facts: ReceiptFacts { response, ..ReceiptFacts::default() }, ..delivered(number, number) }
    };
    assert_eq!(subject.take(&(1..=100).map(large).collect::<Vec<_>>()).await.new, 100);
    let ledger = &subject.ledger;
    assert_eq!(ledger.apply(7, usize::MAX, NOW).await.unwrap().total(), 7);
    assert_eq!(subject.waiting().await, 93);
    assert_eq!(ledger.apply(50, 1, NOW).await.unwrap().total(), 1, "the first that has more");
    assert_eq!(subject.waiting().await, 92);
    let some = ledger.apply(1_000, 20 * RESPONSE_BYTES_MAX, NOW).await.unwrap().total();
    assert!((2..=21).contains(&some), "{some} receipts of {RESPONSE_BYTES_MAX} bytes and more");
    assert_eq!(subject.waiting().await, 92 - some);
    assert_eq!(ledger.apply(1_000, usize::MAX, NOW).await.unwrap().total(), 92 - some);
    for row in 1..=100 {
        assert_eq!(subject.state(row).await, MessageState::Delivered);
    }
}

pub(super) async fn f52_texts_at_their_bounds_are_stored_whole(subject: ReceiptSubject) {
    let long_id = "ü".repeat(PROVIDER_ID_BYTES_MAX / 2);
    let word = |letter: &str| Some(Box::from(letter.repeat(WORD_BYTES_MAX / letter.len())));
    let largest = ReceiptFacts {
        status: word("\u{1f4ee}"),
        carrier: word("\\"),
        response: Some("'\"\n".repeat(RESPONSE_BYTES_MAX / 3).into()),
        sent_at: Some(UnixMs(253_402_300_799_999)),
        price: Some(Price(i64::MAX)),
    };
    let least = ReceiptFacts {
        status: Some("".into()),
        carrier: Some("\u{1}".into()),
        response: Some(" ".into()),
        sent_at: Some(UnixMs(0)),
        price: Some(Price(-1)),
    };
    subject.record(&[named(1, &long_id), sent(2), sent(3), sent(4)]).await;
    let receipts = [
        by(&long_id, Receipt { facts: largest, ..delivered(1, 1) }),
        Receipt { facts: least, at: Some(UnixMs(0)), ..failed(2, 2) },
        Receipt { at: None, ..failed(3, 3) },
        Receipt {
            facts: ReceiptFacts { price: Some(Price(725_000)), ..ReceiptFacts::default() },
            ..receipt(4, 4, MessageState::Sent)
        },
    ];
    // What waits for its message is kept as whole as what is applied.
    assert_eq!(subject.take(&receipts).await.new, 4);
    let parked = receipts.clone().map(|receipt| Receipt {
        event: super::event(receipt.at.map_or(99, |at| at.0 % 1_000) + 1_000),
        key: crate::model::receipt::ReceiptKey::Provider(format!("late-{:?}", receipt.event).into()),
        ..receipt
    });
    assert_eq!(subject.take(&parked).await.new, 4);
    assert_eq!(subject.drain().await.matched, 4);
    let late: Vec<_> = (11..)
        .zip(&receipts)
        .map(|(row, receipt)| named(row, &format!("late-{:?}", receipt.event)))
        .collect();
    subject.record(&late).await;
    assert_eq!(subject.drain().await.matched, 4);
    for (row, expected) in (1..).zip(&receipts) {
        for row in [row, row + 10] {
            let found = subject.row(row).await.receipt.expect("it was applied");
            assert_eq!((found.state, found.at), (expected.state, expected.at));
            assert_eq!(found.facts, expected.facts, "row {row}");
        }
    }
}

pub(super) async fn f53_65536_receipts_at_once(subject: ReceiptSubject) {
    const MANY: u64 = 65_536;
    // Every other message is known; every receipt comes again at the end.
    let known: Vec<_> = (1..=MANY).step_by(2).map(sent).collect();
    for records in known.chunks(1_000) {
        subject.record(records).await;
    }
    let receipts: Vec<_> = (1..=MANY).map(|row| delivered(row, row)).collect();
    let all = Arrival { cursor: Some(cursor("end")), ..arrival(&receipts) };
    assert_eq!(
        subject.ledger.take(all.clone()).await,
        Ok(Taken { new: MANY, known: 0, reused_ids: 0, rejected: 0 })
    );
    assert_eq!(subject.ledger.cursor("s").await, Ok(Some(cursor("end"))));
    assert_eq!(subject.waiting().await, MANY);
    let half = MANY / 2;
    let applied = subject.drain_by(MANY as usize, NOW).await;
    assert_eq!(applied, Applied { matched: half, parked: half, rejected: 0, changed: half, conflicts: 0 });
    assert_eq!(subject.ledger.take(all).await, Ok(Taken { new: 0, known: MANY, reused_ids: 0, rejected: 0 }));
    for row in [1, 3, MANY - 1] {
        assert_eq!(subject.state(row).await, MessageState::Delivered);
    }
    assert_eq!(subject.rows.row(id(2), "d").await, None);
    assert_eq!(subject.tally().await.parked, half);
}
