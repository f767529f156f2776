use std::future::Future;

use super::{LATER, NOW, Subject, fixtures, sent};
use crate::{
    model::{file::FileState, ids::BatchId, time::UnixMs},
    ports::{ItemOutcome, OutstandingQuery, StoreError},
};

/// The outbox's contract.
pub async fn outbox<F: Future<Output = Subject>>(make: impl Fn() -> F) {
    an_unknown_file_is_none_and_an_empty_store_is_empty(make().await).await;
    a_step_is_stored_with_its_checkpoint(make().await).await;
    a_repeated_step_changes_nothing(make().await).await;
    a_step_that_does_not_add_up_is_refused_whole(make().await).await;
    an_ingested_file_is_final_and_a_failed_one_reopens(make().await).await;
    outstanding_is_what_is_due_oldest_first(make().await).await;
    batches_come_back_as_they_went_in(make().await).await;
    dispatching_is_idempotent_and_knows_its_batches(make().await).await;
}

async fn an_unknown_file_is_none_and_an_empty_store_is_empty(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    assert_eq!(store.outbox.find_file(file.id).await, Ok(None));
    assert_eq!(store.outbox.depth().await, Ok(0));
    assert_eq!(store.outbox.next_due().await, Ok(None));
    assert!(
        store
            .outbox
            .outstanding(OutstandingQuery {
                due_by: UnixMs(u64::MAX),
                limit: 10,
                with_batches: true,
                except: &[]
            })
            .await
            .unwrap()
            .is_empty()
    );
}

async fn a_step_is_stored_with_its_checkpoint(store: Subject) {
    let file = fixtures::file("feed", 1, &["d", "e"]);
    let step = fixtures::step_without(&file, 1..=10, &[2, 3], &[7], NOW);
    store.outbox.append(step.clone()).await.unwrap();
    assert_eq!(store.outbox.find_file(file.id).await, Ok(Some((FileState::Ingesting, step.checkpoint))));
    assert_eq!(store.outbox.depth().await, Ok(14), "7 rows for 2 destinations");
    let report = store.ledger.report(file.id).await.unwrap().unwrap();
    assert_eq!((report.rows, report.rejected, report.duplicates), (10, 2, 1));
    assert_eq!(report.destinations["d"].pending(), 7);
    assert_eq!(report.file, *file);
    assert!(report.is_balanced());
}

async fn a_repeated_step_changes_nothing(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    let step = fixtures::step_without(&file, 1..=10, &[2], &[], NOW);
    for _ in 0..3 {
        store.outbox.append(step.clone()).await.unwrap();
    }
    assert_eq!(store.outbox.depth().await, Ok(9));
    assert_eq!(store.tally(file.id).await, (9, 0, 0, 0));
    assert_eq!(store.ledger.rejects(file.id, 0, 10).await.unwrap().len(), 1);
    assert_eq!(
        store
            .outbox
            .outstanding(OutstandingQuery { due_by: NOW, limit: 10, with_batches: false, except: &[] })
            .await
            .unwrap()
            .len(),
        1
    );
    // Nor after it was dispatched and settled.
    store.dispatch(NOW).await;
    let lease = store.lease("w", "d", 1).await.pop().unwrap();
    let verdicts: Vec<_> = (0..9).map(|index| (index, sent())).collect();
    store.settle(&lease, &verdicts).await;
    store.outbox.append(step).await.unwrap();
    assert_eq!(store.outbox.depth().await, Ok(0));
    assert_eq!(store.dispatch(LATER).await, 0);
}

async fn a_step_that_does_not_add_up_is_refused_whole(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    store.outbox.append(fixtures::step(&file, 1..=10, NOW)).await.unwrap();
    let lost_row = {
        let mut step = fixtures::step(&file, 11..=20, NOW);
        step.checkpoint.rows = 21;
        step
    };
    let doubled_rows = fixtures::step(&file, 10..=20, NOW);
    let unrecorded_reject = {
        let mut step = fixtures::step_without(&file, 11..=20, &[12], &[], NOW);
        step.rejects.clear();
        step
    };
    let elsewhere = {
        let mut step = fixtures::step(&file, 11..=20, NOW);
        step.batches[0].header = fixtures::header(&file, "unheard-of");
        step
    };
    for step in [lost_row, doubled_rows, unrecorded_reject, elsewhere] {
        let refused = store.outbox.append(step).await;
        assert!(matches!(refused, Err(StoreError::Permanent(_))), "{refused:?}");
        assert_eq!(store.outbox.depth().await, Ok(10));
        assert_eq!(store.outbox.find_file(file.id).await.unwrap().unwrap().1.rows, 10);
    }
    store.outbox.append(fixtures::step(&file, 11..=20, NOW)).await.unwrap();
    assert_eq!(store.tally(file.id).await, (20, 0, 0, 0));
}

async fn an_ingested_file_is_final_and_a_failed_one_reopens(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    let mut step = fixtures::step(&file, 1..=10, NOW);
    step.state = FileState::Failed("unplugged".into());
    store.outbox.append(step.clone()).await.unwrap();
    let report = store.ledger.report(file.id).await.unwrap().unwrap();
    assert_eq!((report.state, report.closed_at), (FileState::Failed("unplugged".into()), Some(NOW)));

    // The same bytes are dropped again: first looked at, then read on.
    step.state = FileState::Ingesting;
    store.outbox.append(step.clone()).await.unwrap();
    let report = store.ledger.report(file.id).await.unwrap().unwrap();
    assert_eq!((report.state, report.closed_at), (FileState::Ingesting, None));
    let mut rest = fixtures::step(&file, 11..=12, NOW);
    rest.state = FileState::Ingested;
    rest.at = LATER;
    store.outbox.append(rest).await.unwrap();
    let ingested = store.ledger.report(file.id).await.unwrap().unwrap();
    assert_eq!((&ingested.state, ingested.closed_at, ingested.rows), (&FileState::Ingested, Some(LATER), 12));

    store.outbox.append(step).await.unwrap();
    assert_eq!(store.ledger.report(file.id).await.unwrap().unwrap(), ingested);
    let more = store.outbox.append(fixtures::step(&file, 13..=14, NOW)).await;
    assert!(matches!(more, Err(StoreError::Permanent(_))), "{more:?}");
}

async fn outstanding_is_what_is_due_oldest_first(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    for (first, due) in [(1, 300), (11, 100), (21, 200), (31, 100)] {
        store.outbox.append(fixtures::step(&file, first..=first + 9, UnixMs(due))).await.unwrap();
    }
    let due = |entries: Vec<crate::ports::OutboxEntry>| -> Vec<u64> {
        entries.iter().map(|entry| entry.not_before.0).collect()
    };
    assert_eq!(store.outbox.next_due().await, Ok(Some(UnixMs(100))));
    assert_eq!(
        due(store
            .outbox
            .outstanding(OutstandingQuery { due_by: UnixMs(99), limit: 10, with_batches: false, except: &[] })
            .await
            .unwrap()),
        [0; 0]
    );
    assert_eq!(
        due(store
            .outbox
            .outstanding(OutstandingQuery {
                due_by: UnixMs(200),
                limit: 10,
                with_batches: false,
                except: &[]
            })
            .await
            .unwrap()),
        [100, 100, 200]
    );
    assert_eq!(
        due(store
            .outbox
            .outstanding(OutstandingQuery { due_by: UnixMs(999), limit: 2, with_batches: false, except: &[] })
            .await
            .unwrap()),
        [100, 100]
    );
    store.dispatch(UnixMs(200)).await;
    assert_eq!(store.outbox.next_due().await, Ok(Some(UnixMs(300))));
    assert_eq!(store.outbox.depth().await, Ok(40), "dispatched is not delivered");
}

async fn batches_come_back_as_they_went_in(store: Subject) {
    let file = fixtures::file("feed", 1, &["d", "e"]);
    let step = fixtures::step(&file, 1..=10, NOW);
    store.outbox.append(step.clone()).await.unwrap();
    let entries = store
        .outbox
        .outstanding(OutstandingQuery { due_by: NOW, limit: 10, with_batches: true, except: &[] })
        .await
        .unwrap();
    assert_eq!(entries.len(), 2);
    for entry in entries {
        let batch = step.batches.iter().find(|batch| batch.id == entry.id).expect("it was appended");
        assert_eq!(entry.batch.as_ref(), Some(batch));
        assert_eq!((entry.count, &*entry.destination), (10, batch.header.destination.as_str()));
    }
}

async fn dispatching_is_idempotent_and_knows_its_batches(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    store.outbox.append(fixtures::step(&file, 1..=10, NOW)).await.unwrap();
    let known = fixtures::step(&file, 1..=10, NOW).batches[0].id;
    let unknown = BatchId([9; 16]);
    for _ in 0..2 {
        let outcomes = store.outbox.mark_dispatched(&[known, unknown]).await.unwrap();
        assert_eq!(outcomes[0], (known, ItemOutcome::Ok));
        assert!(matches!(&outcomes[1], (id, ItemOutcome::Permanent(_)) if *id == unknown), "{outcomes:?}");
    }
    assert_eq!(store.outbox.next_due().await, Ok(None));
}
