use std::future::Future;

use super::{LATER, NOW, Subject, fixtures, sent};
use crate::{
    model::{file::FileState, time::UnixMs},
    ports::StoreError,
};

/// The outbox's contract.
pub async fn outbox<F: Future<Output = Subject>>(make: impl Fn() -> F) {
    an_unknown_file_is_not_found_and_an_empty_store_is_empty(make().await).await;
    a_step_is_stored_with_its_checkpoint(make().await).await;
    a_repeated_step_changes_nothing(make().await).await;
    a_step_that_does_not_add_up_is_refused_whole(make().await).await;
    an_ingested_file_is_final_and_a_failed_one_reopens(make().await).await;
}

async fn an_unknown_file_is_not_found_and_an_empty_store_is_empty(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    assert_eq!(store.outbox.find_file(file.id).await, Ok(None));
    assert_eq!(store.outbox.depth().await, Ok(0));
    store.assert_idle(NOW).await;
    if let Some(carried) = &store.carried {
        assert_eq!(carried.claims.next_due().await, Ok(None));
        assert!(carried.due(UnixMs(u64::MAX), 10).await.is_empty());
    }
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
    // Nor after it was settled.
    let lease = store.again("w", NOW).await;
    let verdicts: Vec<_> = (0..9).map(|index| (index, sent())).collect();
    store.settle(&lease, &verdicts).await;
    store.outbox.append(step).await.unwrap();
    assert_eq!(store.outbox.depth().await, Ok(0));
    store.assert_idle(LATER).await;
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
    let other_rows = {
        let mut step = fixtures::step(&file, 11..=20, NOW);
        step.batches[0].payload = fixtures::batch(&file, "d", 12..=20, NOW).payload;
        step
    };
    for step in [lost_row, doubled_rows, unrecorded_reject, elsewhere, other_rows] {
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
