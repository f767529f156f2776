//! Receipts and the messages that they are about.

use std::{collections::BTreeMap, sync::Arc};

use rand::{RngExt, SeedableRng, rngs::SmallRng, seq::SliceRandom};

use super::{
    DAY_MS, NOW, ReceiptSubject, arrival, by, delivered, event, failed, id, named, receipt, record, sent,
};
use crate::{
    model::{
        ids::{FileId, MessageId},
        receipt::{Price, Receipt, ReceiptFacts, ReceiptKey, ReportedStates},
        record::{MessageRecord, record_rank},
        state::MessageState,
        time::UnixMs,
    },
    ports::{Applied, Arrival, ReceiptLedger},
    testing::LedgerReceipt,
};

pub(super) async fn both_keys_of_a_message_name_one_row(subject: ReceiptSubject) {
    subject.record(&[named(1, "p-1"), named(2, "p-2")]).await;
    let best = delivered(1, 2);
    subject
        .take(&[by("p-1", failed(1, 1)), best.clone(), by("p-1", failed(1, 3)), by("p-2", failed(2, 4))])
        .await;
    // In one application: a message that is named twice is changed once.
    assert_eq!(
        subject.ledger.apply(10, usize::MAX, NOW).await,
        Ok(Applied { matched: 4, parked: 0, rejected: 0, changed: 2, conflicts: 1 })
    );
    let row = subject.row(1).await;
    assert_eq!((row.state, row.reported), (MessageState::Delivered, ReportedStates(3)));
    assert_eq!(row.receipt.and_then(|receipt| receipt.at), best.at);
    assert_eq!(subject.state(2).await, MessageState::Failed);
    // In one after the other.
    subject.take(&[delivered(2, 5)]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 1, parked: 0, rejected: 0, changed: 1, conflicts: 1 }
    );
    subject.take(&[by("p-2", delivered(2, 6))]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 1, parked: 0, rejected: 0, changed: 0, conflicts: 0 }
    );
    assert_eq!(subject.row(2).await.receipt.and_then(|receipt| receipt.at), Some(UnixMs(NOW.0 + 6)));
}

pub(super) async fn an_interim_receipt_changes_nothing_but_the_facts(subject: ReceiptSubject) {
    subject.record(&[sent(1), record(2, MessageState::Dead, 3), record(3, MessageState::Retrying, 1)]).await;
    let interim = |row: u64, number: u64| Receipt {
        facts: ReceiptFacts { carrier: Some("ACME".into()), ..ReceiptFacts::default() },
        ..receipt(row, number, MessageState::Sent)
    };
    subject.take(&[interim(1, 1), interim(2, 2), interim(3, 3)]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 3, parked: 0, rejected: 0, changed: 0, conflicts: 0 }
    );
    // I2: only a 2xx makes a message sent.
    for (row, state) in [(1, MessageState::Sent), (2, MessageState::Dead), (3, MessageState::Retrying)] {
        let row = subject.row(row).await;
        assert_eq!((row.state, row.reported), (state, ReportedStates(0)));
        assert_eq!(row.receipt.expect("it is kept").facts.carrier.as_deref(), Some("ACME"));
    }
    // A final one replaces all of it, whatever it leaves out (S0.3), and whatever delivery knows (I7).
    subject.take(&[delivered(1, 4), delivered(2, 5), failed(3, 6)]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 3, parked: 0, rejected: 0, changed: 3, conflicts: 0 }
    );
    subject.record(&[sent(3)]).await;
    let states = [(1, MessageState::Delivered), (2, MessageState::Delivered), (3, MessageState::Failed)];
    for (row, state) in states {
        let row = subject.row(row).await;
        assert_eq!(row.state, state);
        assert_eq!(row.receipt.expect("it is kept").facts, ReceiptFacts::default());
    }
    let row = subject.row(3).await;
    assert_eq!((row.attempts, row.status, row.reason), (1, 200, None), "delivery's own facts go on");
    assert_eq!(subject.ledger.changes(None, 10).await.unwrap().len(), 3);
}

pub(super) async fn s0_4_a_conflict_is_counted_once(subject: ReceiptSubject) {
    subject.record(&[sent(1), sent(2)]).await;
    subject.take(&[delivered(1, 1), failed(2, 2)]).await;
    assert_eq!(subject.drain().await.conflicts, 0);
    subject.take(&[failed(1, 3)]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 1, parked: 0, rejected: 0, changed: 0, conflicts: 1 }
    );
    assert_eq!(subject.state(1).await, MessageState::Delivered);
    subject.take(&[failed(1, 4), delivered(1, 5), failed(2, 6)]).await;
    assert_eq!(subject.drain().await.conflicts, 0, "it is known");
    assert!(subject.row(1).await.reported.is_conflict());
    assert_eq!(subject.row(1).await.receipt.and_then(|receipt| receipt.at), Some(UnixMs(NOW.0 + 5)));
    assert_eq!(subject.row(2).await.reported, ReportedStates::by(MessageState::Failed));
}

pub(super) async fn s0_6_a_receipt_waits_for_its_message(subject: ReceiptSubject) {
    subject.take(&[delivered(1, 1), failed(1, 2), by("p-2", failed(2, 3)), delivered(3, 4)]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 0, parked: 4, rejected: 0, changed: 0, conflicts: 0 }
    );
    assert_eq!((subject.tally().await.parked, subject.tally().await.rows), (4, 0));
    assert_eq!(subject.ledger.rejoin(100).await, Ok(0), "no message is known by now");
    // Of another destination, of another message, without the provider's id.
    let elsewhere = MessageRecord { destination: "e".into(), ..named(1, "p-2") };
    subject.record(&[elsewhere, sent(2), named(4, "p-4")]).await;
    assert_eq!(subject.waiting().await, 0);

    subject.record(&[record(1, MessageState::Retrying, 1)]).await;
    assert_eq!((subject.waiting().await, subject.tally().await.parked), (2, 2), "both are back");
    assert_eq!(
        subject.drain().await,
        Applied { matched: 2, parked: 0, rejected: 0, changed: 1, conflicts: 1 }
    );
    assert_eq!(subject.state(1).await, MessageState::Delivered);
    subject.record(&[named(2, "p-2"), sent(3)]).await;
    assert_eq!(subject.waiting().await, 2);
    assert_eq!(
        subject.drain().await,
        Applied { matched: 2, parked: 0, rejected: 0, changed: 2, conflicts: 0 }
    );
    assert_eq!(
        (subject.state(2).await, subject.state(3).await),
        (MessageState::Failed, MessageState::Delivered)
    );
    assert_eq!(subject.tally().await.parked, 0);
    assert_eq!(subject.row_at(1, "e").await.state, MessageState::Sent);
    assert_eq!(subject.ledger.rejoin(100).await, Ok(0));
    assert_eq!(subject.take(&[delivered(1, 1), by("p-2", failed(2, 3))]).await.known, 2);
}

pub(super) async fn a_provider_s_id_that_comes_late_joins_what_waits_for_it(subject: ReceiptSubject) {
    subject.record(&[record(1, MessageState::Retrying, 1)]).await;
    subject.take(&[by("p-1", failed(1, 1)), delivered(2, 2), by("p-2", failed(2, 3))]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 0, parked: 3, rejected: 0, changed: 0, conflicts: 0 }
    );
    // The row is there; its id is new. And a row that brings both at once.
    subject.record(&[named(1, "p-1"), named(2, "p-2")]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 3, parked: 0, rejected: 0, changed: 2, conflicts: 1 }
    );
    assert_eq!(subject.state(1).await, MessageState::Failed);
    assert_eq!(subject.state(2).await, MessageState::Delivered);
}

pub(super) async fn provider_ids_are_per_destination(subject: ReceiptSubject) {
    let at_e = |record: MessageRecord| MessageRecord { destination: "e".into(), ..record };
    subject.record(&[named(1, "7"), at_e(named(1, "8")), at_e(named(2, "7"))]).await;
    subject.take(&[by("7", delivered(1, 1)), by("8", delivered(1, 2))]).await;
    let for_e =
        Arrival { source: "of-e".into(), destination: "e".into(), ..arrival(&[by("7", failed(2, 3))]) };
    subject.ledger.take(for_e).await.unwrap();
    assert_eq!(
        subject.drain().await,
        Applied { matched: 2, parked: 1, rejected: 0, changed: 2, conflicts: 0 }
    );
    assert_eq!(subject.state(1).await, MessageState::Delivered);
    assert_eq!(subject.row_at(1, "e").await.state, MessageState::Sent);
    assert_eq!(subject.row_at(2, "e").await.state, MessageState::Failed);
}

pub(super) async fn a_provider_s_id_that_is_used_again_is_the_latest_message_s(subject: ReceiptSubject) {
    for file in [0, 0xff] {
        let at = UnixMs(NOW.0 - 9 * DAY_MS);
        let id = MessageId { file: FileId([file; 16]), row: 1 };
        subject.record(&[MessageRecord { id, accepted_at: at, at, ..named(1, "p") }]).await;
    }
    subject.record(&[named(1, "p")]).await;
    subject.take(&[by("p", delivered(1, 1))]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 1, parked: 0, rejected: 0, changed: 1, conflicts: 0 }
    );
    assert_eq!(subject.state(1).await, MessageState::Delivered);
    // Of one file, more than two.
    subject.record(&[4, 5, 2, 3].map(|row| named(row, "q"))).await;
    subject.take(&[by("q", delivered(2, 2)), by("q", delivered(2, 3)), delivered(3, 4)]).await;
    assert_eq!(
        subject.drain().await,
        Applied { matched: 3, parked: 0, rejected: 0, changed: 2, conflicts: 0 }
    );
    for (row, state) in [
        (2, MessageState::Sent),
        (3, MessageState::Delivered),
        (4, MessageState::Sent),
        (5, MessageState::Delivered),
    ] {
        assert_eq!(subject.state(row).await, state, "row {row}");
    }
}

/// One fact that a ledger is given.
#[derive(Clone)]
enum Fact {
    Record(MessageRecord),
    Receipt(&'static str, Receipt),
}

/// What a message must end as, joined without any rule of the ledger.
#[derive(Default)]
struct Expected {
    records: Vec<MessageRecord>,
    receipts: Vec<Receipt>,
}

/// Messages at two destinations, what delivery says of them, and receipts: by either key, conflicting, for
/// messages that no one ever sent, and for the right message at the wrong destination.
fn world(rng: &mut SmallRng) -> (Vec<Fact>, BTreeMap<(u64, &'static str), Expected>, u64) {
    let (mut facts, mut expected, mut unknown) = (Vec::new(), BTreeMap::<_, Expected>::new(), 0);
    let mut events = 0;
    let mut any_receipt = |rng: &mut SmallRng, key: ReceiptKey| {
        events += 1;
        let states = [MessageState::Sent, MessageState::Failed, MessageState::Delivered];
        let facts = ReceiptFacts {
            status: rng.random_bool(0.5).then(|| format!("status-{events}").into()),
            carrier: rng.random_bool(0.5).then(|| "carrier".into()),
            price: rng.random_bool(0.5).then(|| Price(rng.random_range(0..1_000))),
            ..ReceiptFacts::default()
        };
        let at = rng.random_bool(0.8).then(|| UnixMs(NOW.0 + rng.random_range(0..3)));
        Receipt { event: event(events), key, state: states[rng.random_range(0..3)], at, facts }
    };
    for row in 1..=40u64 {
        for destination in ["d", "e"] {
            if rng.random_bool(0.2) {
                continue;
            }
            let message = expected.entry((row, destination)).or_default();
            let provider_id: Box<str> = format!("p-{row}").into();
            let mut push = |record: MessageRecord| {
                let record = MessageRecord { destination: destination.into(), ..record };
                message.records.push(record.clone());
                facts.push(Fact::Record(record));
            };
            let attempts = rng.random_range(1..4);
            (1..attempts).for_each(|attempt| push(record(row, MessageState::Retrying, attempt)));
            let is_named = match rng.random_range(0..4) {
                0 => {
                    push(record(row, MessageState::Dead, attempts));
                    false
                }
                1 => {
                    push(record(row, MessageState::Sent, attempts));
                    false
                }
                _ => {
                    let provider_id = Some(provider_id.clone());
                    push(MessageRecord { provider_id, ..record(row, MessageState::Sent, attempts) });
                    true
                }
            };
            for _ in 0..rng.random_range(0..4) {
                let by_provider = rng.random_bool(0.5);
                let key = if by_provider {
                    ReceiptKey::Provider(provider_id.clone())
                } else {
                    ReceiptKey::Message(id(row))
                };
                let receipt = any_receipt(rng, key);
                facts.push(Fact::Receipt(destination, receipt.clone()));
                if by_provider && !is_named {
                    unknown += 1;
                } else {
                    message.receipts.push(receipt);
                }
            }
        }
    }
    for row in 100..110 {
        let key = if row % 2 == 0 {
            ReceiptKey::Provider(format!("p-{row}").into())
        } else {
            ReceiptKey::Message(id(row))
        };
        facts.push(Fact::Receipt(["d", "e", "f"][rng.random_range(0..3)], any_receipt(rng, key)));
        unknown += 1;
    }
    (facts, expected, unknown)
}

pub(super) async fn f51_order_and_repetition_do_not_matter(subject: ReceiptSubject, seed: u64) {
    let (facts, expected, unknown) = world(&mut SmallRng::seed_from_u64(51));
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut facts: Vec<_> = facts.iter().chain(&facts).chain(&facts).cloned().collect();
    match seed {
        // Every receipt before its message; after it; mixed.
        0 => facts.sort_by_key(|fact| matches!(fact, Fact::Record(_))),
        1 => facts.sort_by_key(|fact| matches!(fact, Fact::Receipt(..))),
        _ => facts.shuffle(&mut rng),
    }
    let mut left = &facts[..];
    while !left.is_empty() {
        let (now, later) = left.split_at(rng.random_range(1..=left.len().min(40)));
        left = later;
        let (mut records, mut receipts) = (Vec::new(), BTreeMap::<&str, Vec<Receipt>>::new());
        for fact in now {
            match fact.clone() {
                Fact::Record(record) => records.push(record),
                Fact::Receipt(destination, receipt) => receipts.entry(destination).or_default().push(receipt),
            }
        }
        subject.record(&records).await;
        for (destination, receipts) in receipts {
            let arrived = Arrival { destination: destination.into(), ..arrival(&receipts) };
            subject.ledger.take(arrived).await.unwrap();
        }
        if rng.random_bool(0.7) {
            subject.ledger.apply(rng.random_range(1..60), usize::MAX, NOW).await.unwrap();
        }
    }
    subject.drain_by(7, NOW).await;
    assert_eq!(subject.ledger.rejoin(10_000).await, Ok(0), "a ledger that one alone talks to has joined all");
    for ((number, destination), Expected { records, receipts }) in &expected {
        let row = subject.row_at(*number, destination).await;
        let record = records.iter().max_by_key(|record| record_rank(record)).expect("each has one");
        let found = (row.attempts, row.status, row.reason, row.at);
        assert_eq!(
            found,
            (record.attempts, record.status, record.reason, record.at),
            "row {number}, seed {seed}"
        );
        assert_eq!(row.provider_id, records.iter().find_map(|record| record.provider_id.clone()));
        let best = receipts.iter().max_by_key(|receipt| receipt.rank());
        let kept =
            best.map(|best| LedgerReceipt { state: best.state, at: best.at, facts: best.facts.clone() });
        assert_eq!(row.receipt, kept, "row {number} at {destination}, seed {seed}");
        let finals =
            receipts.iter().map(|receipt| receipt.state).filter(|state| *state != MessageState::Sent);
        assert_eq!(
            row.state,
            finals.clone().fold(record.state, MessageState::max),
            "row {number}, seed {seed}"
        );
        assert_eq!(
            row.reported,
            finals.fold(ReportedStates(0), |states, state| states.merge(ReportedStates::by(state)))
        );
    }
    let tally = subject.tally().await;
    assert_eq!((tally.rows, tally.parked), (expected.len() as u64, unknown), "seed {seed}");
}

/// How many workers apply at once.
const WORKERS: usize = 8;

/// Applies until `until` receipts of all workers together were; the sum of this one.
async fn applier(ledger: Arc<dyn ReceiptLedger>, receipts: usize) -> Applied {
    let mut sum = Applied::default();
    loop {
        let applied = ledger.apply(receipts, usize::MAX, NOW).await.unwrap();
        sum += applied;
        if applied.total() == 0 && ledger.waiting().await.unwrap() == 0 {
            return sum;
        }
        tokio::task::yield_now().await;
    }
}

pub(super) async fn f50_concurrent_appliers_apply_each_receipt_once(subject: ReceiptSubject) {
    const MESSAGES: u64 = 500;
    let records: Vec<_> = (1..=MESSAGES).map(|row| named(row, &format!("p-{row}"))).collect();
    subject.record(&records).await;
    // Overlapping: every message is in every worker's batches, and a few are unknown.
    let mut receipts = Vec::new();
    for round in 0..10 {
        for row in 1..=MESSAGES + 10 {
            let number = round * 10_000 + row;
            let receipt = if round % 2 == 0 { failed(row, number) } else { delivered(row, number) };
            receipts.push(if (round + row) % 3 == 0 { by(&format!("p-{row}"), receipt) } else { receipt });
        }
    }
    receipts.shuffle(&mut SmallRng::seed_from_u64(50));
    assert_eq!(subject.take(&receipts).await.new, 10 * (MESSAGES + 10));
    let workers: Vec<_> = (0..WORKERS).map(|_| tokio::spawn(applier(subject.ledger.clone(), 100))).collect();
    let mut sum = Applied::default();
    for worker in workers {
        sum += worker.await.unwrap();
    }
    assert_eq!((sum.matched, sum.parked), (10 * MESSAGES, 100));
    assert_eq!(
        sum.conflicts, MESSAGES,
        "both final states were reported of each message; it is counted once"
    );
    assert!((MESSAGES..=2 * MESSAGES).contains(&sum.changed), "{} changes", sum.changed);
    assert_eq!(subject.ledger.changes(None, 10_000).await.unwrap().len() as u64, sum.changed);
    for row in 1..=MESSAGES {
        let found = subject.row(row).await;
        assert_eq!(found.state, MessageState::Delivered);
        assert_eq!(found.receipt.and_then(|receipt| receipt.at), Some(UnixMs(NOW.0 + 90_000 + row)));
    }
}

pub(super) async fn s0_6_whichever_comes_second_finds_the_other(subject: ReceiptSubject) {
    const MESSAGES: u64 = 1_000;
    let rows: Vec<u64> = (1..=MESSAGES).collect();
    let recording = {
        let (ledger, rows) = (subject.ledger.clone(), rows.clone());
        async move {
            for rows in rows.chunks(10) {
                let records = rows.iter().map(|&row| named(row, &format!("p-{row}"))).collect();
                ledger.record(records).await.unwrap();
            }
        }
    };
    let taking = {
        let ledger = subject.ledger.clone();
        async move {
            for rows in rows.chunks(10) {
                let both = rows.iter().flat_map(|&row| {
                    [failed(row, row), by(&format!("p-{row}"), delivered(row, MESSAGES + row))]
                });
                ledger.take(arrival(&both.collect::<Vec<_>>())).await.unwrap();
                ledger.apply(15, usize::MAX, NOW).await.unwrap();
            }
        }
    };
    let appliers: Vec<_> = (0..4).map(|_| tokio::spawn(applier(subject.ledger.clone(), 20))).collect();
    let (recorded, taken) = (tokio::spawn(recording), tokio::spawn(taking));
    recorded.await.unwrap();
    taken.await.unwrap();
    for applier in appliers {
        applier.await.unwrap();
    }
    // What was parked while its message was being recorded is found by the sweep.
    while subject.ledger.rejoin(100).await.unwrap() + subject.waiting().await as usize > 0 {
        subject.drain().await;
    }
    assert_eq!(subject.tally().await.parked, 0);
    for row in 1..=MESSAGES {
        let found = subject.row(row).await;
        assert_eq!((found.state, found.reported), (MessageState::Delivered, ReportedStates(3)), "row {row}");
    }
}
