use std::future::Future;

use super::{LATER, NOW, Subject, dead, fixtures, retry, sent};
use crate::{
    model::{file::FileState, ids::FileId},
    ports::{Release, Settled, Settlement, StoreError},
};

/// The ledger's contract.
pub async fn ledger<F: Future<Output = Subject>>(make: impl Fn() -> F) {
    messages_are_counted_once(make().await).await;
    a_retry_carries_its_messages_on_with_their_history(make().await).await;
    a_settlement_repeated_for_want_of_an_answer_changes_nothing(make().await).await;
    a_retry_without_its_batch_is_refused_whole(make().await).await;
    a_stale_worker_s_failures_are_dropped_and_its_2xx_stand(make().await).await;
    i7_a_late_2xx_finds_the_live_entry(make().await).await;
    i7_a_late_2xx_raises_the_dead(make().await).await;
    a_message_sent_by_a_stale_worker_is_not_carried_on(make().await).await;
    a_redrive_sends_the_dead_again(make().await).await;
    dead_stands_only_where_the_live_entry_is(make().await).await;
    files_settle_and_are_reported_once(make().await).await;
    rejects_come_in_pages(make().await).await;
    an_index_beyond_the_batch_is_refused(make().await).await;
}

async fn messages_are_counted_once(store: Subject) {
    let (file, lease) = store.one_lease(4).await;
    for _ in 0..2 {
        assert_eq!(store.settle(&lease, &[(0, sent()), (1, dead())]).await, Settled::Open);
        assert_eq!(store.tally(file.id).await, (4, 1, 1, 0));
        assert_eq!(store.outbox.depth().await, Ok(2));
    }
    assert_eq!(store.settle_with(&lease, &[(3, sent()), (2, retry())], &[2]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (4, 2, 1, 1));
    assert_eq!(store.outbox.depth().await, Ok(1), "a retrying message is still to be delivered");
    // The lease has ended: a repetition is stale, and harmless.
    assert_eq!(store.settle_with(&lease, &[(3, sent()), (2, retry())], &[2]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (4, 2, 1, 1));
    assert_eq!(store.dispatch(LATER).await, 1);
}

async fn a_retry_carries_its_messages_on_with_their_history(store: Subject) {
    let (file, lease) = store.one_lease(6).await;
    let verdicts = [(0, sent()), (1, retry()), (2, sent()), (3, retry()), (4, sent()), (5, sent())];
    assert_eq!(store.settle_with(&lease, &verdicts, &[1, 3]).await, Settled::Complete);
    assert_eq!(store.dispatch(NOW).await, 0, "not before it is due");
    assert_eq!(store.outbox.next_due().await, Ok(Some(LATER)));
    assert_eq!(store.dispatch(LATER).await, 1);
    let second = store.lease("w", "d", 9).await.pop().unwrap();
    assert_eq!((second.root, second.drive, second.attempt), (lease.token.batch, 0, 1));
    assert_eq!((second.losses, second.accepted_at, second.states.0.len()), (0, NOW, 2));
    assert_eq!(second.history, vec![vec![fixtures::failed(NOW)]; 2]);
    assert_eq!(second.header, lease.header);

    // A second failure moves a message on without counting it again.
    assert_eq!(store.settle_with(&second, &[(0, retry()), (1, dead())], &[0]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (6, 4, 1, 1));
    store.dispatch(LATER).await;
    let third = store.lease("w", "d", 9).await.pop().unwrap();
    assert_eq!((third.attempt, third.history[0].len()), (2, 2));
    assert_eq!(store.settle(&third, &[(0, sent())]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (6, 5, 1, 0));
    assert_eq!(store.outbox.depth().await, Ok(0));
}

/// The stages repeat what the store did not answer, under a lease that may be current still.
async fn a_settlement_repeated_for_want_of_an_answer_changes_nothing(store: Subject) {
    let (file, lease) = store.one_lease(9).await;
    let retries = |indexes: &[&[usize]]| -> Vec<_> {
        indexes.iter().map(|indexes| fixtures::retry(&lease, indexes, fixtures::failed(NOW), LATER)).collect()
    };
    let settlement = |verdicts: &[(u32, crate::model::outcome::Verdict)], retries| Settlement {
        token: lease.token,
        verdicts: verdicts.to_vec(),
        retries,
        records: Vec::new(),
    };
    // Two delays, so two batches; the messages of one begin before the other's end.
    let first = settlement(
        &[(0, sent()), (1, retry()), (2, retry()), (3, retry()), (4, dead())],
        retries(&[&[1, 3], &[2]]),
    );
    let second = settlement(&[(5, retry()), (6, sent())], retries(&[&[5]]));
    for _ in 0..3 {
        assert_eq!(store.ledger.settle(vec![first.clone()]).await, Ok(vec![Settled::Open]));
        assert_eq!(store.tally(file.id).await, (9, 1, 1, 3));
        assert_eq!(store.archive.count_outstanding().await, Ok(2));
    }
    // As part of a group, beside what is new.
    for _ in 0..2 {
        let group = vec![first.clone(), second.clone()];
        assert_eq!(store.ledger.settle(group).await, Ok(vec![Settled::Open; 2]));
        assert_eq!(store.tally(file.id).await, (9, 2, 1, 4));
        assert_eq!(store.archive.count_outstanding().await, Ok(3));
    }
    // When what it carried on has gone its way already.
    assert_eq!(store.dispatch(LATER).await, 3);
    for lease in store.lease("other", "d", 3).await {
        let verdicts: Vec<_> = lease.states.unsettled().map(|index| (index as u32, sent())).collect();
        assert_eq!(store.settle(&lease, &verdicts).await, Settled::Complete);
    }
    assert_eq!(store.tally(file.id).await, (9, 6, 1, 0));
    assert_eq!(store.ledger.settle(vec![second, first]).await, Ok(vec![Settled::Open; 2]));
    assert_eq!(store.tally(file.id).await, (9, 6, 1, 0));
    // The one that completes the batch ends the lease.
    let last = settlement(&[(7, retry()), (8, sent())], retries(&[&[7]]));
    assert_eq!(store.ledger.settle(vec![last.clone()]).await, Ok(vec![Settled::Complete]));
    let again = store.ledger.settle(vec![last]).await.unwrap()[0];
    assert!(matches!(again, Settled::Complete | Settled::Stale), "{again:?}");
    assert_eq!(store.tally(file.id).await, (9, 7, 1, 1));
    assert_eq!(store.dispatch(LATER).await, 1, "carried on once");
    assert_eq!((store.redrive)(LATER).await, 1);
}

async fn a_retry_without_its_batch_is_refused_whole(store: Subject) {
    let (file, lease) = store.one_lease(4).await;
    let carried = |indexes: &[usize]| vec![fixtures::retry(&lease, indexes, fixtures::failed(NOW), LATER)];
    let settlement = |retries| Settlement {
        token: lease.token,
        verdicts: vec![(0, sent()), (1, retry()), (2, retry())],
        retries,
        records: Vec::new(),
    };
    let mut other_body = carried(&[1, 2]);
    let mut header = (*other_body[0].header).clone();
    header.template = Some("{}".into());
    other_body[0].header = header.into();
    for retries in [carried(&[1]), carried(&[1, 2, 3]), vec![], other_body] {
        let refused = store.ledger.settle(vec![settlement(retries)]).await;
        assert!(matches!(refused, Err(StoreError::Permanent(_))), "{refused:?}");
        assert_eq!(store.tally(file.id).await, (4, 0, 0, 0), "all or nothing");
    }
    let taken = store.ledger.settle(vec![settlement(carried(&[1, 2]))]).await;
    assert_eq!(taken.unwrap(), [Settled::Open]);
}

async fn a_stale_worker_s_failures_are_dropped_and_its_2xx_stand(store: Subject) {
    let (file, old) = store.one_lease(4).await;
    store.queue.release(&[old.token], Release::Lost).await.unwrap();
    let new = store.lease("new", "d", 1).await.pop().unwrap();
    let verdicts = [(0, sent()), (1, dead()), (2, retry())];
    assert_eq!(store.settle_with(&old, &verdicts, &[2]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (4, 1, 0, 0));
    assert_eq!(store.dispatch(LATER).await, 0);
    // The new holder's word about the same message changes nothing.
    assert_eq!(store.settle(&new, &[(0, dead()), (1, sent()), (2, sent())]).await, Settled::Open);
    assert_eq!(store.tally(file.id).await, (4, 3, 0, 0));
    // The last message, told by the stale one: the batch is settled under the new holder's hands.
    assert_eq!(store.settle(&old, &[(3, sent())]).await, Settled::Stale);
    assert_eq!(store.settle(&new, &[(3, dead())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (4, 4, 0, 0));
    assert_eq!(store.outbox.depth().await, Ok(0));
}

async fn i7_a_late_2xx_finds_the_live_entry(store: Subject) {
    let (file, old) = store.one_lease(3).await;
    store.queue.release(&[old.token], Release::Lost).await.unwrap();
    let new = store.lease("new", "d", 1).await.pop().unwrap();
    let verdicts = [(0, retry()), (1, retry()), (2, sent())];
    assert_eq!(store.settle_with(&new, &verdicts, &[0, 1]).await, Settled::Complete);
    store.dispatch(LATER).await;
    let second = store.lease("new", "d", 1).await.pop().unwrap();
    assert_eq!(store.settle_with(&second, &[(0, retry()), (1, retry())], &[0, 1]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (3, 1, 0, 2));
    // The message's live entry is two batches on, and not even leased.
    assert_eq!(store.settle(&old, &[(1, sent())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (3, 2, 0, 1));
    store.dispatch(LATER).await;
    let third = store.lease("new", "d", 1).await.pop().unwrap();
    assert_eq!(third.states.unsettled().collect::<Vec<_>>(), [0], "what was sent is not sent again");
    assert_eq!(store.settle(&old, &[(0, sent()), (1, sent())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (3, 3, 0, 0));
    assert_eq!(store.settle(&third, &[(0, dead())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (3, 3, 0, 0));
    assert_eq!(store.outbox.depth().await, Ok(0));
}

async fn i7_a_late_2xx_raises_the_dead(store: Subject) {
    let (file, old) = store.one_lease(2).await;
    store.queue.release(&[old.token], Release::Lost).await.unwrap();
    let new = store.lease("new", "d", 1).await.pop().unwrap();
    assert_eq!(store.settle(&new, &[(0, dead()), (1, dead())]).await, Settled::Complete);
    assert_eq!(store.settle(&old, &[(0, sent())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (2, 1, 1, 0));
    assert_eq!((store.redrive)(LATER).await, 1, "only the other is still dead");
}

async fn a_message_sent_by_a_stale_worker_is_not_carried_on(store: Subject) {
    let (file, old) = store.one_lease(3).await;
    store.queue.release(&[old.token], Release::Lost).await.unwrap();
    let new = store.lease("new", "d", 1).await.pop().unwrap();
    store.settle(&old, &[(0, sent())]).await;
    let verdicts = [(0, retry()), (1, retry()), (2, retry())];
    assert_eq!(store.settle_with(&new, &verdicts, &[0, 1, 2]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (3, 1, 0, 2));
    store.dispatch(LATER).await;
    let second = store.lease("new", "d", 1).await.pop().unwrap();
    assert_eq!((second.states.0.len(), second.history.len()), (2, 2));
    assert_eq!(store.settle(&second, &[(0, sent()), (1, dead())]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (3, 2, 1, 0));
}

async fn a_redrive_sends_the_dead_again(store: Subject) {
    let (file, lease) = store.one_lease(5).await;
    let verdicts = [(0, sent()), (1, dead()), (2, retry()), (3, dead()), (4, sent())];
    store.settle_with(&lease, &verdicts, &[2]).await;
    store.dispatch(LATER).await;
    let second = store.lease("w", "d", 1).await.pop().unwrap();
    store.settle(&second, &[(0, dead())]).await;
    assert_eq!(store.tally(file.id).await, (5, 2, 3, 0));

    assert_eq!((store.redrive)(LATER).await, 3);
    assert_eq!((store.redrive)(LATER).await, 0);
    assert_eq!(store.tally(file.id).await, (5, 2, 0, 3));
    assert_eq!(store.outbox.depth().await, Ok(3));
    assert_eq!(store.dispatch(LATER).await, 1, "messages of one root travel together");
    let again = store.lease("w", "d", 9).await.pop().unwrap();
    assert_eq!((again.drive, again.attempt, again.accepted_at), (1, 0, LATER));
    assert_eq!((again.root, &again.header), (lease.token.batch, &lease.header));
    let histories: Vec<_> = again.history.iter().map(Vec::len).collect();
    assert_eq!(histories, [1, 2, 1]);
    // I4: the same bytes under the same ids.
    let rows =
        |lease: &crate::ports::Lease| crate::model::batch::Rows::decode(lease.payload.clone()).unwrap();
    let (before, after) = (rows(&lease), rows(&again));
    for (index, from) in [1, 2, 3].into_iter().enumerate() {
        assert_eq!(after.row(index), before.row(from));
        assert_eq!(after.bytes(index), before.bytes(from));
    }
    // A 2xx to the very first request, told only now.
    assert_eq!(store.settle(&lease, &[(1, sent())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (5, 3, 0, 2));
    store.settle(&again, &[(1, dead()), (2, sent())]).await;
    assert_eq!(store.tally(file.id).await, (5, 4, 1, 0));
    assert_eq!((store.redrive)(LATER).await, 1);
    store.dispatch(LATER).await;
    assert_eq!(store.lease("w", "d", 9).await.pop().unwrap().drive, 2);
}

/// A redrive takes `dead` back, so no other entry may keep it: a late 2xx would count it off twice.
async fn dead_stands_only_where_the_live_entry_is(store: Subject) {
    let (file, lease) = store.one_lease(2).await;
    assert_eq!(store.settle_with(&lease, &[(0, retry())], &[0]).await, Settled::Open);
    // The same worker contradicts itself: the message is dead, in the batch that carries it on.
    assert_eq!(store.settle(&lease, &[(0, dead())]).await, Settled::Open);
    assert_eq!(store.tally(file.id).await, (2, 0, 1, 0));
    assert_eq!((store.redrive)(LATER).await, 1);
    assert_eq!(store.tally(file.id).await, (2, 0, 0, 1));
    assert_eq!(store.settle(&lease, &[(0, sent())]).await, Settled::Open);
    assert_eq!(store.tally(file.id).await, (2, 1, 0, 0));
    assert_eq!(store.outbox.depth().await, Ok(1));
    assert_eq!(store.dispatch(LATER).await, 0, "what was sent is not sent again");
}

async fn files_settle_and_are_reported_once(store: Subject) {
    let unreported = async || -> Vec<FileId> {
        let reports = store.ledger.settled_files("feed", 9).await.unwrap();
        assert!(reports.iter().all(|report| report.is_settled() && report.settled_at.is_some()));
        reports.iter().map(|report| report.file.id).collect()
    };
    let file = fixtures::file("feed", 1, &["d"]);
    store.outbox.append(fixtures::step(&file, 1..=2, NOW)).await.unwrap();
    store.dispatch(NOW).await;
    let lease = store.lease("w", "d", 1).await.pop().unwrap();
    store.settle(&lease, &[(0, sent()), (1, dead())]).await;
    assert_eq!(unreported().await, [], "rows may still come");
    let mut end = fixtures::step_without(&file, 3..=3, &[3], &[], NOW);
    end.state = FileState::Ingested;
    end.at = LATER;
    store.outbox.append(end).await.unwrap();
    assert_eq!(unreported().await, [file.id]);
    assert_eq!(store.ledger.report(file.id).await.unwrap().unwrap().settled_at, Some(LATER));
    assert!(store.ledger.settled_files("other", 9).await.unwrap().is_empty());
    store.ledger.mark_reported(&[file.id]).await.unwrap();
    assert_eq!(unreported().await, []);

    (store.redrive)(LATER).await;
    store.ledger.mark_reported(&[file.id]).await.unwrap();
    assert_eq!(store.ledger.report(file.id).await.unwrap().unwrap().settled_at, None);
    store.dispatch(LATER).await;
    let again = store.lease("w", "d", 1).await.pop().unwrap();
    store.settle(&again, &[(0, sent())]).await;
    assert_eq!(unreported().await, [file.id], "a redrive makes the report out of date");
}

async fn rejects_come_in_pages(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    let bad: Vec<u64> = (1..=10).collect();
    store.outbox.append(fixtures::step_without(&file, 1..=12, &bad, &[11], NOW)).await.unwrap();
    let rows = async |after, limit| -> Vec<u64> {
        let page = store.ledger.rejects(file.id, after, limit).await.unwrap();
        page.iter().map(|reject| reject.row).collect()
    };
    assert_eq!(rows(0, 4).await, [1, 2, 3, 4]);
    assert_eq!(rows(4, 4).await, [5, 6, 7, 8]);
    assert_eq!(rows(8, 4).await, [9, 10]);
    assert_eq!(rows(10, 4).await, [0; 0]);
    let first = store.ledger.rejects(file.id, 0, 1).await.unwrap().pop().unwrap();
    assert_eq!((first.line, &first.raw[..], &first.reason[..]), (2, &b"bad-1"[..], "too few cells"));
    assert!(store.ledger.rejects(FileId([7; 16]), 0, 4).await.unwrap().is_empty());
}

async fn an_index_beyond_the_batch_is_refused(store: Subject) {
    let (file, lease) = store.one_lease(2).await;
    let verdicts = vec![(0, sent()), (2, sent())];
    let settlement = Settlement { token: lease.token, verdicts, retries: vec![], records: Vec::new() };
    let refused = store.ledger.settle(vec![settlement]).await;
    assert!(matches!(refused, Err(StoreError::Permanent(_))), "{refused:?}");
    assert_eq!(store.tally(file.id).await, (2, 0, 0, 0));
}
