use std::{future::Future, sync::Arc};

use super::{LATER, NOW, Subject, dead, fixtures, nth, retry, retry_at, sent, settlement, told, tries};
use crate::{
    model::{
        file::{FileRecord, FileState},
        ids::FileId,
        ledger::MessageVerdict,
        outcome::{Attempt, DeathCause, Reason, Verdict},
        terms::Terms,
        time::UnixMs,
    },
    ports::{Release, Settled, Settlement, StoreError},
};

/// The ledger's contract.
pub async fn ledger<F: Future<Output = Subject>>(make: impl Fn() -> F) {
    messages_are_counted_once(make().await).await;
    a_retry_is_the_same_batch_due_again(make().await).await;
    a_message_is_tried_again_under_the_same_lease(make().await).await;
    b5_an_attempt_that_is_not_the_next_one_is_not_recorded(make().await).await;
    a_settlement_repeated_for_want_of_an_answer_changes_nothing(make().await).await;
    a_lease_ends_when_the_worker_says_so_or_nothing_is_open(make().await).await;
    b7_settlements_of_one_group_see_each_other(make().await).await;
    a_stale_worker_s_failures_are_dropped_and_its_2xx_stand(make().await).await;
    i7_a_late_2xx_counts_after_retries(make().await).await;
    i7_a_late_2xx_raises_the_dead(make().await).await;
    a_message_sent_by_a_stale_worker_is_not_sent_again(make().await).await;
    a_redrive_sends_the_dead_again(make().await).await;
    b6_a_redrive_leaves_a_lease_alone(make().await).await;
    i4_only_what_was_never_sent_gets_another_body(make().await).await;
    a_late_2xx_of_an_earlier_drive_is_counted_once(make().await).await;
    files_settle_and_are_reported_once(make().await).await;
    files_with_a_time_are_known_until_they_are_settled(make().await).await;
    rejects_come_in_pages(make().await).await;
    an_index_beyond_the_batch_is_refused(make().await).await;
    what_is_not_stored_is_stale(make().await).await;
}

async fn messages_are_counted_once(store: Subject) {
    let (file, lease) = store.one_lease(4).await;
    for _ in 0..2 {
        assert_eq!(store.settle(&lease, &[(0, sent()), (1, dead())]).await, Settled::Open);
        assert_eq!(store.tally(file.id).await, (4, 1, 1, 0));
        assert_eq!(store.outbox.depth().await, Ok(2));
    }
    let rest = [(3, sent()), (2, retry())];
    assert_eq!(store.settle_and_end(&lease, &rest).await, Settled::Released);
    assert_eq!(store.tally(file.id).await, (4, 2, 1, 1));
    assert_eq!(store.outbox.depth().await, Ok(1), "a retrying message is still to be delivered");
    // The lease has ended: a repetition is stale, and harmless.
    assert_eq!(store.settle_and_end(&lease, &rest).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (4, 2, 1, 1));
    assert_eq!(tries(&store.again("w", LATER).await), [(2, 1)]);
}

async fn a_retry_is_the_same_batch_due_again(store: Subject) {
    let (file, lease) = store.one_lease(6).await;
    let verdicts = [(0, sent()), (1, retry()), (2, sent()), (3, retry()), (4, sent()), (5, sent())];
    assert_eq!(store.settle_and_end(&lease, &verdicts).await, Settled::Released);
    assert_eq!(store.tally(file.id).await, (6, 4, 0, 2));
    let second = store.again("w", LATER).await;
    assert_eq!((second.token.batch, second.losses, second.accepted_at), (lease.token.batch, 0, NOW));
    assert_eq!(tries(&second), [(1, 1), (3, 1)]);

    // A second failure moves a message on without counting it again.
    let then = UnixMs(LATER.0 + 60_000);
    let verdicts = [(1, retry_at(then)), (3, dead())];
    assert_eq!(store.settle_and_end(&second, &verdicts).await, Settled::Released);
    assert_eq!(store.tally(file.id).await, (6, 4, 1, 1));
    store.assert_idle(LATER).await;
    let third = store.again("w", then).await;
    assert_eq!(tries(&third), [(1, 2)]);
    assert_eq!(store.settle(&third, &[(1, sent())]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (6, 5, 1, 0));
    assert_eq!(store.outbox.depth().await, Ok(0));
    store.assert_idle(then).await;
}

/// B9: what is due soon is tried again by who has the batch, and may be recorded in one go.
async fn a_message_is_tried_again_under_the_same_lease(store: Subject) {
    let (file, lease) = store.one_lease(3).await;
    let twice = vec![
        nth(0, 1, retry_at(NOW)),
        nth(1, 1, retry_at(NOW)),
        nth(0, 2, retry_at(NOW)),
        nth(1, 2, sent()),
        nth(0, 3, dead()),
    ];
    for _ in 0..2 {
        assert_eq!(store.settle_as(settlement(lease.token, twice.clone())).await, Settled::Open);
        assert_eq!(store.tally(file.id).await, (3, 1, 1, 0));
    }
    assert_eq!(store.settle(&lease, &[(2, retry_at(NOW))]).await, Settled::Open);
    assert_eq!(store.tally(file.id).await, (3, 1, 1, 1));
    let ends = Settlement { ends: true, ..settlement(lease.token, vec![nth(2, 2, retry())]) };
    assert_eq!(store.settle_as(ends).await, Settled::Released);
    let again = store.again("w", LATER).await;
    assert_eq!(tries(&again), [(2, 2)]);
    assert_eq!(store.settle(&again, &[(2, sent())]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (3, 2, 1, 0));
}

async fn b5_an_attempt_that_is_not_the_next_one_is_not_recorded(store: Subject) {
    let (file, lease) = store.one_lease(2).await;
    let wrong = vec![nth(0, 0, dead()), nth(0, 2, dead()), MessageVerdict { drive: 1, ..nth(0, 1, dead()) }];
    assert_eq!(store.settle_as(settlement(lease.token, wrong)).await, Settled::Open);
    assert_eq!(store.tally(file.id).await, (2, 0, 0, 0));
    // The first verdict on an attempt counts.
    assert_eq!(store.settle(&lease, &[(0, retry_at(NOW)), (0, dead())]).await, Settled::Open);
    assert_eq!(store.settle(&lease, &[(1, dead()), (1, retry())]).await, Settled::Open);
    assert_eq!(store.tally(file.id).await, (2, 0, 1, 1));
    // But a 2xx is a fact, whichever attempt it answers.
    assert_eq!(store.settle_as(settlement(lease.token, vec![nth(1, 9, sent())])).await, Settled::Open);
    assert_eq!(store.tally(file.id).await, (2, 1, 0, 1));
    assert_eq!(store.settle(&lease, &[(1, dead()), (0, sent())]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (2, 2, 0, 0));
}

/// The stages repeat what the store did not answer, under a lease that may be current still.
async fn a_settlement_repeated_for_want_of_an_answer_changes_nothing(store: Subject) {
    let (file, lease) = store.one_lease(9).await;
    let first = told(&lease, &[(0, sent()), (1, retry()), (2, retry_at(NOW)), (3, retry()), (4, dead())]);
    let second = told(&lease, &[(5, retry()), (6, sent())]);
    for _ in 0..3 {
        assert_eq!(store.ledger.settle(vec![first.clone()]).await, Ok(vec![Settled::Open]));
        assert_eq!(store.tally(file.id).await, (9, 1, 1, 3));
    }
    // As part of a group, beside what is new.
    for _ in 0..2 {
        let group = vec![first.clone(), second.clone()];
        assert_eq!(store.ledger.settle(group).await, Ok(vec![Settled::Open; 2]));
        assert_eq!(store.tally(file.id).await, (9, 2, 1, 4));
    }
    // When the next attempt was made already.
    let third = settlement(lease.token, vec![nth(2, 2, retry())]);
    assert_eq!(store.ledger.settle(vec![third]).await, Ok(vec![Settled::Open]));
    assert_eq!(store.ledger.settle(vec![second.clone(), first.clone()]).await, Ok(vec![Settled::Open; 2]));
    // The one that ends the lease.
    let last = Settlement { ends: true, ..told(&lease, &[(7, retry()), (8, sent())]) };
    assert_eq!(store.ledger.settle(vec![last.clone()]).await, Ok(vec![Settled::Released]));
    let again = store.ledger.settle(vec![last.clone()]).await.unwrap()[0];
    assert!(matches!(again, Settled::Released | Settled::Stale), "{again:?}");
    store.queue.acknowledge(&[lease.token]).await.unwrap();
    assert_eq!(store.tally(file.id).await, (9, 3, 1, 5));
    // When the batch has gone its way already.
    let lease = store.again("other", LATER).await;
    assert_eq!(tries(&lease), [(1, 1), (2, 2), (3, 1), (5, 1), (7, 1)]);
    let verdicts: Vec<_> = lease.open.iter().map(|open| (open.index, sent())).collect();
    let complete = told(&lease, &verdicts);
    assert_eq!(store.ledger.settle(vec![complete.clone()]).await, Ok(vec![Settled::Complete]));
    let again = store.ledger.settle(vec![complete]).await.unwrap()[0];
    assert!(matches!(again, Settled::Complete | Settled::Stale), "{again:?}");
    store.queue.acknowledge(&[lease.token]).await.unwrap();
    let late = store.ledger.settle(vec![last, second, first]).await;
    assert_eq!(late, Ok(vec![Settled::Stale; 3]));
    assert_eq!(store.tally(file.id).await, (9, 8, 1, 0));
    assert_eq!((store.redrive)(LATER).await, 1);
}

async fn a_lease_ends_when_the_worker_says_so_or_nothing_is_open(store: Subject) {
    let (_, lease) = store.one_lease(2).await;
    assert_eq!(store.settle(&lease, &[(0, retry_at(NOW))]).await, Settled::Open);
    store.assert_idle(NOW).await;
    // Nothing to record, only leases to return.
    assert_eq!(store.settle_and_end(&lease, &[]).await, Settled::Released);
    let again = store.again("w", NOW).await;
    assert_eq!((tries(&again), again.losses), (vec![(0, 1), (1, 0)], 0));
    let verdicts = [(0, dead()), (1, sent())];
    assert_eq!(store.settle(&again, &verdicts).await, Settled::Complete);
    assert_eq!(store.queue.release_holder("w").await, Ok(0));
    store.assert_idle(LATER).await;
}

async fn b7_settlements_of_one_group_see_each_other(store: Subject) {
    let (file, lease) = store.one_lease(3).await;
    let group = vec![
        settlement(lease.token, vec![nth(0, 1, retry_at(NOW)), nth(1, 1, sent())]),
        settlement(lease.token, vec![nth(0, 2, sent())]),
        settlement(lease.token, vec![nth(2, 1, dead())]),
        settlement(lease.token, vec![nth(2, 2, retry())]),
    ];
    let settled = store.ledger.settle(group).await;
    let expected = vec![Settled::Open, Settled::Open, Settled::Complete, Settled::Stale];
    assert_eq!(settled, Ok(expected));
    assert_eq!(store.tally(file.id).await, (3, 2, 1, 0));
}

async fn a_stale_worker_s_failures_are_dropped_and_its_2xx_stand(store: Subject) {
    let (file, old) = store.one_lease(4).await;
    store.queue.release(&[old.token], Release::Lost).await.unwrap();
    let new = store.again("new", NOW).await;
    let verdicts = [(0, sent()), (1, dead()), (2, retry())];
    assert_eq!(store.settle_and_end(&old, &verdicts).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (4, 1, 0, 0));
    // The new holder's word about the same message changes nothing.
    let verdicts = [(0, dead()), (1, sent()), (2, sent())];
    assert_eq!(store.settle(&new, &verdicts).await, Settled::Open);
    assert_eq!(store.tally(file.id).await, (4, 3, 0, 0));
    // The last message, reported by the stale holder: the batch is settled while the new one holds it.
    assert_eq!(store.settle(&old, &[(3, sent())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (4, 4, 0, 0));
    assert_eq!(store.settle(&new, &[(3, dead())]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (4, 4, 0, 0));
    assert_eq!(store.outbox.depth().await, Ok(0));
}

async fn i7_a_late_2xx_counts_after_retries(store: Subject) {
    let (file, old) = store.one_lease(3).await;
    store.queue.release(&[old.token], Release::Lost).await.unwrap();
    let new = store.again("new", NOW).await;
    let verdicts = [(0, retry()), (1, retry()), (2, sent())];
    assert_eq!(store.settle_and_end(&new, &verdicts).await, Settled::Released);
    let second = store.again("new", LATER).await;
    let then = UnixMs(LATER.0 + 60_000);
    let verdicts = [(0, retry_at(then)), (1, retry_at(then))];
    assert_eq!(store.settle_and_end(&second, &verdicts).await, Settled::Released);
    assert_eq!(store.tally(file.id).await, (3, 1, 0, 2));
    // The batch is two leases on, and nobody has it.
    assert_eq!(store.settle(&old, &[(1, sent())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (3, 2, 0, 1));
    let third = store.again("new", then).await;
    assert_eq!(tries(&third), [(0, 2)], "what was sent is not sent again");
    assert_eq!(store.settle(&old, &[(0, sent()), (1, sent())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (3, 3, 0, 0));
    assert_eq!(store.settle(&third, &[(0, dead())]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (3, 3, 0, 0));
    assert_eq!(store.outbox.depth().await, Ok(0));
}

async fn i7_a_late_2xx_raises_the_dead(store: Subject) {
    let (file, old) = store.one_lease(2).await;
    store.queue.release(&[old.token], Release::Lost).await.unwrap();
    let new = store.again("new", NOW).await;
    assert_eq!(store.settle(&new, &[(0, dead()), (1, dead())]).await, Settled::Complete);
    assert_eq!(store.settle(&old, &[(0, sent())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (2, 1, 1, 0));
    assert_eq!((store.redrive)(LATER).await, 1, "only the other is still dead");
}

async fn a_message_sent_by_a_stale_worker_is_not_sent_again(store: Subject) {
    let (file, old) = store.one_lease(3).await;
    store.queue.release(&[old.token], Release::Lost).await.unwrap();
    let new = store.again("new", NOW).await;
    store.settle(&old, &[(0, sent())]).await;
    let verdicts = [(0, retry()), (1, retry()), (2, retry())];
    assert_eq!(store.settle_and_end(&new, &verdicts).await, Settled::Released);
    assert_eq!(store.tally(file.id).await, (3, 1, 0, 2));
    let second = store.again("new", LATER).await;
    assert_eq!(tries(&second), [(1, 1), (2, 1)]);
    assert_eq!(store.settle(&second, &[(1, sent()), (2, dead())]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (3, 2, 1, 0));
}

async fn a_redrive_sends_the_dead_again(store: Subject) {
    let (file, lease) = store.one_lease(5).await;
    let verdicts = [(0, sent()), (1, dead()), (2, retry()), (3, dead()), (4, sent())];
    store.settle_and_end(&lease, &verdicts).await;
    let second = store.again("w", LATER).await;
    assert_eq!(store.settle(&second, &[(2, dead())]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (5, 2, 3, 0));

    assert_eq!((store.redrive)(LATER).await, 3);
    assert_eq!((store.redrive)(LATER).await, 0);
    assert_eq!(store.tally(file.id).await, (5, 2, 0, 3));
    assert_eq!(store.outbox.depth().await, Ok(3));
    let again = store.again("w", LATER).await;
    assert_eq!((again.token.batch, again.accepted_at), (lease.token.batch, NOW));
    assert_eq!((&again.header, &again.payload), (&lease.header, &lease.payload), "I4");
    let opened: Vec<_> = again.open.iter().map(|open| (open.index, open.drive, open.tries)).collect();
    assert_eq!(opened, [(1, 1, 0), (2, 1, 0), (3, 1, 0)]);
    assert!([1, 2, 3].iter().all(|&index| again.since(index) == LATER) && again.since(0) == NOW);
    // A failure of the drive before is not a failure of this one.
    assert_eq!(store.settle(&lease, &[(3, dead())]).await, Settled::Stale);
    // A 2xx to the very first request, reported only now.
    assert_eq!(store.settle(&lease, &[(1, sent())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (5, 3, 0, 2));
    assert_eq!(store.settle(&again, &[(2, dead()), (3, sent())]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (5, 4, 1, 0));
    assert_eq!((store.redrive)(UnixMs(LATER.0 + 1)).await, 1);
    let third = store.again("w", UnixMs(LATER.0 + 1)).await;
    assert_eq!((third.open.len(), third.open[0].index, third.open[0].drive), (1, 2, 2));
}

async fn i4_only_what_was_never_sent_gets_another_body(store: Subject) {
    let died_of = |reason| {
        let attempt = Attempt { at: NOW, status: 0, reason };
        let dead = Verdict::Dead { attempt, cause: DeathCause::Permanent };
        [(0, dead), (1, dead)]
    };
    let (file, lease) = store.one_lease(2).await;
    assert_eq!(store.settle(&lease, &died_of(Reason::Render)).await, Settled::Complete);
    assert_eq!((store.rerender)("one", LATER).await, 2);
    assert_eq!((store.rerender)("other", LATER).await, 0, "they are open");
    assert_eq!(store.tally(file.id).await, (2, 0, 0, 2));
    let again = store.again("again", LATER).await;
    assert_eq!((again.header.template.as_deref(), &*again.header.content_type), (Some("one"), "text/plain"));
    assert_eq!((again.token.batch, &again.payload), (lease.token.batch, &lease.payload), "the same messages");
    // It was wrong again.
    assert_eq!(store.settle(&again, &died_of(Reason::Render)).await, Settled::Complete);
    assert_eq!((store.rerender)("two", LATER).await, 2);
    let third = store.again("third", LATER).await;
    assert_eq!(third.header.template.as_deref(), Some("two"));
    assert_eq!(store.settle(&third, &died_of(Reason::Timeout)).await, Settled::Complete);
    assert_eq!((store.rerender)("three", LATER).await, 0, "they may have been received");
    assert_eq!((store.redrive)(LATER).await, 2);
    let last = store.again("last", LATER).await;
    assert_eq!(last.header.template.as_deref(), Some("two"));
    assert_eq!(store.settle(&last, &[(0, sent()), (1, sent())]).await, Settled::Complete);
}

async fn b6_a_redrive_leaves_a_lease_alone(store: Subject) {
    let (file, lease) = store.one_lease(3).await;
    assert_eq!(store.settle(&lease, &[(0, dead()), (1, sent())]).await, Settled::Open);
    assert_eq!((store.redrive)(NOW).await, 1);
    assert_eq!(store.tally(file.id).await, (3, 1, 0, 1));
    store.assert_idle(NOW).await;
    // To who has the batch, the message is another now; so are its repetitions.
    assert_eq!(store.settle(&lease, &[(0, dead())]).await, Settled::Open);
    assert_eq!(store.tally(file.id).await, (3, 1, 0, 1));
    // It knows of two messages, the record of three.
    assert_eq!(store.settle(&lease, &[(2, sent())]).await, Settled::Open);
    assert_eq!(store.settle_and_end(&lease, &[]).await, Settled::Released);
    let again = store.again("w", NOW).await;
    assert_eq!((tries(&again), again.open[0].drive), (vec![(0, 0)], 1));
    assert_eq!(store.settle(&again, &[(0, sent())]).await, Settled::Complete);
    assert_eq!(store.tally(file.id).await, (3, 3, 0, 0));
}

/// A redrive takes `dead` back: a late 2xx must not count it off twice.
async fn a_late_2xx_of_an_earlier_drive_is_counted_once(store: Subject) {
    let (file, lease) = store.one_lease(2).await;
    assert_eq!(store.settle(&lease, &[(0, dead())]).await, Settled::Open);
    assert_eq!((store.redrive)(LATER).await, 1);
    assert_eq!(store.tally(file.id).await, (2, 0, 0, 1));
    for _ in 0..2 {
        assert_eq!(store.settle(&lease, &[(0, sent())]).await, Settled::Open);
        assert_eq!(store.tally(file.id).await, (2, 1, 0, 0));
    }
    assert_eq!(store.outbox.depth().await, Ok(1));
    assert_eq!(store.settle(&lease, &[(1, sent())]).await, Settled::Complete);
    store.assert_idle(LATER).await;
}

async fn files_settle_and_are_reported_once(store: Subject) {
    let unreported = async || -> Vec<FileId> {
        let reports = store.ledger.settled_files("feed", 9).await.unwrap();
        assert!(reports.iter().all(|report| report.is_settled() && report.settled_at.is_some()));
        reports.iter().map(|report| report.file.id).collect()
    };
    let file = fixtures::file("feed", 1, &["d"]);
    store.outbox.append(fixtures::step(&file, 1..=2, NOW)).await.unwrap();
    let lease = store.again("w", NOW).await;
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
    let again = store.again("w", LATER).await;
    store.settle(&again, &[(1, sent())]).await;
    assert_eq!(unreported().await, [file.id], "a redrive makes the report out of date");
}

async fn files_with_a_time_are_known_until_they_are_settled(store: Subject) {
    let timed = async || -> Vec<FileId> {
        let reports = store.ledger.timed_files(9).await.unwrap();
        reports.iter().map(|report| report.file.id).collect()
    };
    let file = |content: u8, finish_by: Option<UnixMs>| {
        let file = fixtures::file("feed", content, &["d"]);
        let terms = Terms { finish_by, ..Terms::default() };
        Arc::new(FileRecord { terms, ..(*file).clone() })
    };
    let (late, never, early) = (file(1, Some(UnixMs(9_000))), file(2, None), file(3, Some(UnixMs(8_000))));
    for file in [&late, &never] {
        store.outbox.append(fixtures::step(file, 1..=2, NOW)).await.unwrap();
    }
    store.outbox.append(fixtures::step_without(&early, 1..=1, &[1], &[], NOW)).await.unwrap();
    assert_eq!(timed().await, [early.id, late.id], "the earliest first, and none without a time");
    assert_eq!(store.ledger.timed_files(1).await.unwrap().len(), 1);
    let mut end = fixtures::step_without(&early, 2..=2, &[2], &[], NOW);
    end.checkpoint.rejected = 2;
    end.state = FileState::Ingested;
    store.outbox.append(end).await.unwrap();
    assert_eq!(timed().await, [late.id], "it is closed, and nothing of it is open");
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
    let beyond = settlement(lease.token, vec![nth(0, 1, sent()), nth(2, 1, sent())]);
    let begun = Settlement { begins: Some(2), ..settlement(lease.token, vec![nth(0, 1, sent())]) };
    for refused in [beyond, begun] {
        // With another in its group: all or nothing.
        let group = vec![told(&lease, &[(1, sent())]), refused];
        let refused = store.ledger.settle(group).await;
        assert!(matches!(refused, Err(StoreError::Permanent(_))), "{refused:?}");
        assert_eq!(store.tally(file.id).await, (2, 0, 0, 0));
    }
}

async fn what_is_not_stored_is_stale(store: Subject) {
    let (file, lease) = store.one_lease(1).await;
    let mut unknown = told(&lease, &[(0, sent())]);
    unknown.token.batch.0[0] ^= 1;
    let settled = store.ledger.settle(vec![unknown, told(&lease, &[(0, sent())])]).await;
    assert_eq!(settled, Ok(vec![Settled::Stale, Settled::Complete]));
    assert_eq!(store.tally(file.id).await, (1, 1, 0, 0));
}
