//! What an operator sees.

use std::{collections::BTreeMap, sync::Arc};

use postrider_actors::{
    model::{
        ids::MessageId,
        outcome::{Attempt, DeathCause, Reason, Verdict},
        state::MessageState,
        time::{MonoMs, UnixMs},
    },
    ports::{Archive, LeaseRequest, Ledger, Outbox, Queue, Settlement, Want},
    testing::fixtures,
};

use super::*;
use postrider_actors::ports::console::{
    DeadFilter, Delivery, Fate, MessageReport, Operate as _, Position, Search, View as _,
};

const NOW: UnixMs = UnixMs(1_000_000);

async fn lease(store: &EmbeddedStore, destination: &str, now: UnixMs) -> Lease {
    let wants = vec![Want::new(destination, 1, 1)];
    let request = LeaseRequest { holder: "w".into(), wants, until: MonoMs(9_999), now, born: UnixMs(0) };
    store.lease(request).await.unwrap().pop().expect("a batch is due")
}

/// Records what became of the first open message, and gives the rest back.
async fn settle(store: &EmbeddedStore, lease: &Lease, verdict: Verdict) {
    let settlement = Settlement {
        token: lease.token,
        verdicts: vec![lease.open[0].verdict(verdict)],
        details: BTreeMap::new(),
        records: Vec::new(),
        ends: true,
        begins: None,
    };
    store.settle(vec![settlement]).await.unwrap();
}

#[tokio::test]
async fn the_backlog_is_counted_by_where_batches_are() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(dir.path(), exit_on_fatal(|| {})).unwrap();
    assert_eq!(store.backlog(NOW).await, Ok(Backlog::default()));
    let file = fixtures::file("f", 1, &["d", "e"]);
    store.append(fixtures::step_without(&file, 1..=1, &[], &[], NOW)).await.unwrap();
    let of = |outstanding, queued, leased| Backlog {
        outstanding,
        queued,
        leased,
        quarantined: 0,
        oldest_due: Some(NOW),
    };
    assert_eq!(store.backlog(UnixMs(NOW.0 - 1)).await, Ok(of(2, 0, 0)));
    assert_eq!(store.backlog(NOW).await, Ok(of(0, 2, 0)));
    let held = lease(&store, "d", NOW).await;
    assert_eq!(store.backlog(NOW).await, Ok(of(0, 1, 1)));
    settle(&store, &held, Verdict::Sent { at: NOW, status: 200 }).await;
    assert_eq!(store.backlog(NOW).await, Ok(of(0, 1, 0)));
    let held = lease(&store, "e", NOW).await;
    let later = UnixMs(NOW.0 + 5000);
    let attempt = Attempt { at: NOW, status: 503, reason: Reason::Status };
    settle(&store, &held, Verdict::Retry { attempt, not_before: later }).await;
    let retrying = |outstanding, queued| Backlog {
        outstanding,
        queued,
        leased: 0,
        quarantined: 0,
        oldest_due: Some(later),
    };
    assert_eq!(store.backlog(NOW).await, Ok(retrying(1, 0)), "a retry is due at its own time");
    assert_eq!(store.backlog(later).await, Ok(retrying(0, 1)));
}

fn only(reports: Vec<MessageReport>, destination: &str) -> Delivery {
    let mut deliveries = reports.into_iter().filter_map(|report| match report.fate {
        Fate::Message(delivery) => Some(delivery),
        Fate::Rejected { .. } | Fate::Duplicate => None,
    });
    deliveries.find(|delivery| delivery.destination == destination).expect("it goes there")
}

#[tokio::test]
async fn a_message_s_whole_way_is_delivery_now() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(dir.path(), exit_on_fatal(|| {})).unwrap();
    let file = fixtures::file("f", 1, &["d", "e"]);
    store.append(fixtures::step_without(&file, 1..=5, &[3], &[4], NOW)).await.unwrap();
    let mut viewer = Viewer::open(dir.path()).unwrap();
    let id = MessageId { file: file.id, row: 1 };
    let mut delivery_now = || only(viewer.message(id).unwrap(), "d");
    let at = |ms| UnixMs(NOW.0 + ms);

    let delivery = delivery_now();
    assert_eq!((delivery.state, delivery.recipient.as_deref()), (MessageState::Accepted, Some("user-1")));
    assert_eq!(delivery.not_before, Some(NOW));

    let first = lease(&store, "d", NOW).await;
    settle(&store, &first, Verdict::Retry { attempt: fixtures::failed(at(1)), not_before: at(50) }).await;
    let delivery = delivery_now();
    assert_eq!((delivery.state, delivery.not_before), (MessageState::Retrying, Some(at(50))));
    assert_eq!(delivery.failed, [fixtures::failed(at(1))]);
    assert_eq!((delivery.sent, delivery.cause), (None, None));

    let second = lease(&store, "d", at(50)).await;
    let attempt = fixtures::failed(at(60));
    settle(&store, &second, Verdict::Dead { attempt, cause: DeathCause::Attempts }).await;
    let delivery = delivery_now();
    assert_eq!((delivery.state, delivery.cause), (MessageState::Dead, Some(DeathCause::Attempts)));
    assert_eq!(delivery.failed, [fixtures::failed(at(1)), attempt]);
    assert_eq!(delivery.not_before, None);

    let letters =
        Viewer::open(dir.path()).unwrap().dead(&DeadFilter::default(), &Position::default(), 9).unwrap();
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    assert_eq!(Viewer::open(dir.path()).unwrap().recipients(&letters).unwrap(), ["user-1"]);

    let mut operator = Operator::open(dir.path()).unwrap();
    assert_eq!(operator.redrive(&DeadFilter::default(), 9, at(100)).unwrap(), 1);
    let delivery = delivery_now();
    assert_eq!((delivery.state, delivery.drive), (MessageState::Retrying, 1));
    assert_eq!((delivery.accepted_at, delivery.not_before), (at(100), Some(at(100))));
    assert_eq!(delivery.failed.len(), 2, "a redrive forgets no attempt");
    let third = lease(&store, "d", at(100)).await;
    settle(&store, &third, Verdict::Sent { at: at(130), status: 202 }).await;
    let delivery = delivery_now();
    assert_eq!((delivery.state, delivery.sent), (MessageState::Sent, Some((202, at(130)))));
    assert_eq!(delivery.failed.len(), 2);

    assert_eq!(only(viewer.message(id).unwrap(), "e").state, MessageState::Accepted);
    let fate = |viewer: &mut Viewer, row| viewer.message(MessageId { file: file.id, row }).unwrap();
    assert!(matches!(
        &fate(&mut viewer, 3)[..],
        [MessageReport { fate: Fate::Rejected { line: 4, .. }, .. }]
    ));
    assert!(matches!(&fate(&mut viewer, 4)[..], [MessageReport { fate: Fate::Duplicate, .. }]));
    assert!(fate(&mut viewer, 6).is_empty());
}

#[tokio::test]
async fn a_search_finds_a_recipient_once_per_row_in_steps_of_any_size() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(dir.path(), exit_on_fatal(|| {})).unwrap();
    let files: Vec<_> = (1..=3).map(|content| fixtures::file("f", content, &["d", "e"])).collect();
    for file in &files {
        for first in [1, 11, 21] {
            store.append(fixtures::step(file, first..=first + 9, NOW)).await.unwrap();
        }
    }
    let mut viewer = Viewer::open(dir.path()).unwrap();
    // `user-1` is also the beginning of `user-10` to `user-19`, which are others.
    for (recipient, row) in [("user-1", 1), ("user-15", 15)] {
        for step in [1, 2, 7, 18, 19, 100] {
            let mut search = Search::default();
            while viewer.search(&mut search, recipient, None, step, 99).unwrap() {}
            search.found.dedup();
            let rows: Vec<_> = search.found.iter().map(|id| (id.file, id.row)).collect();
            assert_eq!(rows, files.iter().map(|file| (file.id, row)).collect::<Vec<_>>(), "step {step}");
            assert_eq!(search.batches, 18);
        }
        let mut search = Search::default();
        while viewer.search(&mut search, recipient, Some(files[1].id), 100, 99).unwrap() {}
        assert_eq!(search.found, [MessageId { file: files[1].id, row }]);
    }
    let mut search = Search::default();
    while viewer.search(&mut search, "user-1", None, 5, 2).unwrap() {}
    assert_eq!(search.found.len(), 2);
}

#[tokio::test]
async fn dead_letters_are_filtered_by_everything_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(EmbeddedStore::open(dir.path(), exit_on_fatal(|| {})).unwrap());
    for content in 1..=2 {
        store.append(fixtures::step(&fixtures::file("f", content, &["d", "e"]), 1..=1, NOW)).await.unwrap();
    }
    for (ms, destination) in [(1, "d"), (2, "e"), (3, "d"), (4, "e")] {
        let leased = lease(&store, destination, NOW).await;
        let attempt = fixtures::failed(UnixMs(NOW.0 + ms));
        settle(&store, &leased, Verdict::Dead { attempt, cause: DeathCause::Age }).await;
    }
    let mut viewer = Viewer::open(dir.path()).unwrap();
    let mut count = |filter: DeadFilter| viewer.dead(&filter, &Position::default(), 99).unwrap().len();
    assert_eq!(count(DeadFilter::default()), 4);
    let named = DeadFilter { file: Some("1.csv".into()), ..DeadFilter::default() };
    assert_eq!(count(named.clone()), 2);
    assert_eq!(count(DeadFilter { destination: Some("e".into()), ..named.clone() }), 1);
    assert_eq!(count(DeadFilter { cause: Some(DeathCause::Poison), ..named }), 0);
    let since = Some(UnixMs(NOW.0 + 2));
    assert_eq!(count(DeadFilter { since, before: Some(UnixMs(NOW.0 + 4)), ..DeadFilter::default() }), 2);
    let view = &viewer.destinations().unwrap()["d"];
    assert_eq!((view.counts.dead, view.counts.accepted), (2, 2));
    assert_eq!((view.outstanding, view.queued, view.leased), (0, Some(0), Some(0)));
    // Pages meet without a gap.
    let page = viewer.dead(&DeadFilter::default(), &Position::default(), 3).unwrap();
    assert_eq!(viewer.dead(&DeadFilter::default(), &page[2].position, 3).unwrap().len(), 1);
    let mut operator = Operator::open(dir.path()).unwrap();
    let only_d = DeadFilter { destination: Some("d".into()), ..DeadFilter::default() };
    assert_eq!(operator.redrive(&only_d, 1, NOW).unwrap(), 1);
    assert_eq!(operator.redrive(&only_d, 99, NOW).unwrap(), 1);
    assert_eq!(store.depth().await.unwrap(), 2);
}

#[tokio::test]
async fn an_archived_message_is_shown_without_its_recipient() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(dir.path(), exit_on_fatal(|| {})).unwrap();
    let file = fixtures::file("f", 1, &["d", "e"]);
    store.append(fixtures::step_without(&file, 1..=2, &[1], &[], NOW)).await.unwrap();
    let mut viewer = Viewer::open(dir.path()).unwrap();
    let id = MessageId { file: file.id, row: 2 };
    let at = UnixMs(NOW.0 + 5);
    let bytes_left = || -> i64 {
        let connection = rusqlite::Connection::open(dir.path().join(DATABASE)).unwrap();
        connection
            .query_row("SELECT coalesce(sum(length(body)), 0) FROM payloads", [], |row| row.get(0))
            .unwrap()
    };
    assert!(bytes_left() > 0);
    for (destination, is_last) in [("d", false), ("e", true)] {
        let lease = lease(&store, destination, NOW).await;
        settle(&store, &lease, Verdict::Sent { at, status: 202 }).await;
        assert_eq!(store.archive(UnixMs(NOW.0 + 1), 9).await, Ok(1));
        let delivery = only(viewer.message(id).unwrap(), destination);
        assert_eq!((delivery.state, delivery.recipient), (MessageState::Sent, None));
        assert_eq!((delivery.accepted_at, delivery.sent), (NOW, Some((202, at))));
        assert_eq!(bytes_left() == 0, is_last, "the other destination needs the payload that they share");
    }
    let mut search = Search::default();
    for recipient in ["user-2", ""] {
        assert!(!viewer.search(&mut search, recipient, None, 9, 9).unwrap());
    }
    assert!(search.found.is_empty());
}
