//! What can't be read, and what becomes of it when it is read again.

use super::{NOW, ReceiptSubject, arrival, cursor, delivered, event, failed, reject, sent};
use crate::{
    model::{
        receipt::{EventId, REJECTED_BYTES_MAX, Receipt, ReceiptReject, RejectedText},
        state::MessageState,
        time::UnixMs,
    },
    ports::{Applied, Arrival, Reread, Taken},
};

/// Of source `s`, some time later.
fn reread() -> Reread {
    Reread {
        source: "s".into(),
        destination: "d".into(),
        receipts: Vec::new(),
        ignored: Vec::new(),
        rejected: Vec::new(),
        at: UnixMs(NOW.0 + 1_000),
    }
}

async fn all(subject: &ReceiptSubject, source: &str) -> Vec<ReceiptReject> {
    subject.rejects.rejects(source, None, 1_000).await.unwrap()
}

pub(super) async fn rejects_are_kept_once(subject: ReceiptSubject) {
    let rejects = vec![reject(1), reject(2), reject(1)];
    let arrived = Arrival { rejects, cursor: Some(cursor("x")), ..arrival(&[delivered(1, 3)]) };
    assert_eq!(
        subject.ledger.take(arrived.clone()).await,
        Ok(Taken { new: 1, known: 0, reused_ids: 0, rejected: 2 })
    );
    assert_eq!(
        subject.ledger.take(arrived.clone()).await,
        Ok(Taken { new: 0, known: 1, reused_ids: 0, rejected: 0 })
    );
    assert_eq!(subject.tally().await.rejects, 2);
    let elsewhere = Arrival { source: "t".into(), ..arrived };
    assert_eq!(
        subject.ledger.take(elsewhere).await,
        Ok(Taken { new: 1, known: 0, reused_ids: 0, rejected: 2 })
    );
    assert_eq!(subject.tally().await.rejects, 4);
    assert_eq!(subject.waiting().await, 2, "a reject is not applied");
}

pub(super) async fn rejects_are_read_back_whole_page_by_page(subject: ReceiptSubject) {
    let with = |number: u64, text: RejectedText| ReceiptReject { text, ..reject(number) };
    let longest = format!("{{\"a\":\"{}\"}}", "ü".repeat((REJECTED_BYTES_MAX - 8) / 2));
    let mut rejects = vec![
        with(1, RejectedText::of_receipt(longest.as_bytes())),
        with(2, RejectedText::of_receipt(b"{\"a\": \"\\u0000 \\\\ '\\n\", \"\xc3\xbc\":\t1.50}")),
        with(3, RejectedText::of_other("=1+1\r\n\u{1f4ee}\u{1}".as_bytes())),
        with(4, RejectedText::default()),
        ReceiptReject { at: Some(UnixMs(NOW.0 - 5)), ..with(5, RejectedText::of_receipt(b"")) },
    ];
    rejects.extend((6..=700).map(reject));
    rejects.sort_by_key(|reject| reject.event);
    // As many as there are: they are divided.
    let taken = subject.ledger.take(Arrival { rejects: rejects.clone(), ..arrival(&[]) }).await;
    assert_eq!(taken, Ok(Taken { new: 0, known: 0, reused_ids: 0, rejected: 700 }));
    for page in [1, 300, 1_000] {
        let (mut found, mut after): (Vec<ReceiptReject>, Option<EventId>) = (Vec::new(), None);
        while page > 1 || found.len() < 3 {
            let some = subject.rejects.rejects("s", after, page).await.unwrap();
            assert!(some.len() <= page);
            let Some(last) = some.last() else { break };
            after = Some(last.event);
            found.extend(some);
        }
        assert!(found == rejects[..found.len()], "{page} at a time");
        assert!(found.len() == if page == 1 { 3 } else { 700 });
    }
    assert!(all(&subject, "t").await.is_empty());
}

pub(super) async fn what_can_be_read_now_is_taken_once_and_rejected_no_more(subject: ReceiptSubject) {
    subject.record(&[sent(1), sent(2), sent(3)]).await;
    let rejects: Vec<_> = (1..=5).map(reject).collect();
    let arrived = Arrival { rejects, ..arrival(&[]) };
    let elsewhere = Arrival { source: "t".into(), ..arrived.clone() };
    subject.ledger.take(arrived.clone()).await.unwrap();
    subject.ledger.take(elsewhere).await.unwrap();

    // The first has the event of its text, the second one of its own, and so has the third: the same one.
    let own = Receipt { event: event(72), ..failed(2, 2) };
    let read = Reread {
        receipts: vec![
            (event(1), delivered(1, 1)),
            (event(2), own.clone()),
            (event(3), Receipt { event: event(72), ..failed(3, 3) }),
        ],
        ignored: vec![event(4), event(99)],
        rejected: vec![(event(5), "another reason \u{1f4ee}".to_owned()), (event(98), "x".to_owned())],
        ..reread()
    };
    assert_eq!(
        subject.rejects.settle_rejects(read.clone()).await,
        Ok(Taken { new: 2, known: 1, reused_ids: 0, rejected: 0 })
    );
    let left = ReceiptReject { reason: "another reason \u{1f4ee}".to_owned(), ..reject(5) };
    assert_eq!(all(&subject, "s").await, [left]);
    assert_eq!(all(&subject, "t").await.len(), 5, "another source's are its own");
    assert_eq!(subject.waiting().await, 2);
    assert_eq!(
        subject.rejects.settle_rejects(read).await,
        Ok(Taken { new: 0, known: 3, reused_ids: 0, rejected: 0 })
    );
    assert_eq!(
        subject.drain().await,
        Applied { matched: 2, parked: 0, rejected: 0, changed: 2, conflicts: 0 }
    );
    let states = [subject.state(1).await, subject.state(2).await, subject.state(3).await];
    assert_eq!(states, [MessageState::Delivered, MessageState::Failed, MessageState::Sent]);

    // What its source brings again is known by either event. What was of no interest may be of some one day.
    assert_eq!(
        subject.take(&[delivered(1, 1), own]).await,
        Taken { new: 0, known: 2, reused_ids: 0, rejected: 0 }
    );
    assert_eq!(
        subject.ledger.take(arrived).await,
        Ok(Taken { new: 0, known: 0, reused_ids: 0, rejected: 1 })
    );
    assert_eq!(all(&subject, "s").await.len(), 2);
    let nothing = Reread { source: "nobody".into(), ignored: vec![event(1)], ..reread() };
    assert_eq!(subject.rejects.settle_rejects(nothing).await, Ok(Taken::default()));
}

pub(super) async fn what_was_taken_meanwhile_is_known_when_its_reject_is_read(subject: ReceiptSubject) {
    let rejects = vec![reject(1), reject(2)];
    subject.ledger.take(Arrival { rejects, ..arrival(&[]) }).await.unwrap();
    subject.take(&[delivered(1, 1)]).await;
    let receipts = vec![(event(1), delivered(1, 1)), (event(2), delivered(2, 2))];
    let (one, two) = (Reread { receipts, ..reread() }, arrival(&[delivered(1, 1), delivered(2, 2)]));
    let (one, two) = tokio::join!(subject.rejects.settle_rejects(one), subject.ledger.take(two));
    assert_eq!(one.unwrap().new + two.unwrap().new, 1, "whoever comes first takes it");
    assert_eq!((subject.waiting().await, subject.tally().await.rejects), (2, 0));
}
