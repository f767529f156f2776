use std::{collections::BTreeSet, future::Future};

use super::{LATER, NOW, Subject, dead, fixtures, retry, sent};
use crate::{
    model::{ids::BatchId, time::UnixMs},
    ports::{
        Claim, ClaimRequest, Cursor, Dispatch, Fetched, ItemOutcome, Lease, OutboxEntry, OutboxPages,
        PageQuery, Release, Settled, StoreError,
    },
};

/// The contract of archiving; with a queue that only carries, also that of [`OutboxPages`].
pub async fn archive<F: Future<Output = Subject>>(make: impl Fn() -> F) {
    what_a_redrive_needs_is_kept(make().await).await;
    what_is_to_be_tried_again_is_kept(make().await).await;
    what_is_archived_takes_late_facts(make().await).await;
    archiving_takes_what_is_old_in_steps(make().await).await;
    if make().await.carried.is_none() {
        return;
    }
    an_empty_outbox_has_one_empty_page(make().await).await;
    every_batch_is_listed_once_on_its_side(make().await).await;
    there_is_no_page_after_the_last(make().await).await;
    a_listing_goes_on_after_what_it_has_listed_is_gone(make().await).await;
    a_file_s_batches_come_in_order_of_row(make().await).await;
    what_is_not_a_cursor_is_refused(make().await).await;
    many_are_fetched_by_id(make().await).await;
    only_what_is_done_is_deleted(make().await).await;
    a_dead_message_keeps_its_batch(make().await).await;
}

fn pages(store: &Subject) -> &dyn OutboxPages {
    &*store.carried.as_ref().expect("only what is carried for is listed").pages
}

/// Everything that may go, step by step.
async fn archive_all(store: &Subject, before: UnixMs, limit: usize) -> usize {
    let mut taken = 0;
    for _ in 0..20 {
        let some = store.archive.archive(before, limit).await.unwrap();
        assert!(some <= limit);
        taken += some;
    }
    taken
}

/// Sends all that is due for `destination`.
async fn deliver(store: &Subject, destination: &str, now: UnixMs) {
    for lease in store.lease_at("w", destination, 9, now).await {
        let verdicts: Vec<_> = lease.open.iter().map(|open| (open.index, sent())).collect();
        assert_eq!(store.settle(&lease, &verdicts).await, Settled::Complete);
    }
}

fn query(dispatch: Dispatch, destination: Option<&str>, limit: usize) -> PageQuery {
    PageQuery { dispatch, destination: destination.map(Into::into), limit, cursor: None }
}

/// All pages of a listing; every one but the last must lead to another with something on it.
async fn list(store: &Subject, query: &PageQuery) -> Vec<OutboxEntry> {
    let mut query = query.clone();
    let mut listed = Vec::new();
    for _ in 0..1_000 {
        let page = pages(store).page(query.clone()).await.unwrap();
        assert!(page.entries.len() <= query.limit);
        assert!(query.cursor.is_none() || !page.entries.is_empty(), "a cursor to nothing");
        listed.extend(page.entries);
        match page.next {
            Some(next) => query.cursor = Some(next),
            None => return listed,
        }
    }
    panic!("the listing does not end");
}

async fn ids(
    store: &Subject,
    dispatch: Dispatch,
    destination: Option<&str>,
    limit: usize,
) -> BTreeSet<BatchId> {
    let listed = list(store, &query(dispatch, destination, limit)).await;
    let ids: BTreeSet<_> = listed.iter().map(|entry| entry.id).collect();
    assert_eq!(ids.len(), listed.len(), "each once");
    ids
}

async fn delete(store: &Subject, id: BatchId) -> ItemOutcome {
    let outcomes = pages(store).delete(&[id]).await.unwrap();
    assert_eq!(outcomes.len(), 1);
    assert_eq!(outcomes[0].0, id);
    outcomes[0].1.clone()
}

async fn fetch(store: &Subject, id: BatchId) -> Fetched {
    pages(store).get(&[id]).await.unwrap().pop().unwrap().1
}

fn is_kept(outcome: &ItemOutcome) -> bool {
    matches!(outcome, ItemOutcome::Permanent(_))
}

/// Rows 1 to 30 of a file in batches of ten, due at `NOW`, for `d` and `e`.
async fn six_batches(store: &Subject, content: u8) -> BTreeSet<BatchId> {
    let file = fixtures::file("feed", content, &["d", "e"]);
    let mut ids = BTreeSet::new();
    for first in [1, 11, 21] {
        let step = fixtures::step(&file, first..=first + 9, NOW);
        ids.extend(step.batches.iter().map(|batch| batch.id));
        store.outbox.append(step).await.unwrap();
    }
    ids
}

/// Leases everything.
async fn lease_all(store: &Subject) -> Vec<Lease> {
    let mut leases = store.lease("w", "d", 99).await;
    leases.extend(store.lease("w", "e", 99).await);
    leases
}

async fn an_empty_outbox_has_one_empty_page(store: Subject) {
    for dispatch in [Dispatch::Outstanding, Dispatch::Dispatched] {
        let page = pages(&store).page(query(dispatch, None, 10)).await.unwrap();
        assert_eq!((page.entries.len(), page.next), (0, None));
        let page = pages(&store).page(query(dispatch, Some("unheard-of"), 10)).await.unwrap();
        assert_eq!((page.entries.len(), page.next), (0, None));
    }
    assert_eq!(pages(&store).count_outstanding().await, Ok(0));
}

async fn every_batch_is_listed_once_on_its_side(store: Subject) {
    let all = six_batches(&store, 1).await;
    for limit in [1, 2, 4, 100] {
        assert_eq!(ids(&store, Dispatch::Outstanding, None, limit).await, all);
        assert!(ids(&store, Dispatch::Dispatched, None, limit).await.is_empty());
        let of_d = list(&store, &query(Dispatch::Outstanding, Some("d"), limit)).await;
        assert_eq!(of_d.len(), 3);
        assert!(
            of_d.iter()
                .all(|entry| &*entry.destination == "d" && entry.count == 10 && entry.not_before == NOW)
        );
    }
    assert_eq!(pages(&store).count_outstanding().await, Ok(6));
    // Some are leased, one of them is to be tried again, and more comes.
    assert_eq!(store.lease("w", "d", 9).await.len(), 3);
    let mut leases = store.lease("w", "e", 9).await;
    let more = six_batches(&store, 2).await;
    let again = leases.pop().unwrap();
    let verdicts: Vec<_> = (0..9).map(|index| (index, sent())).chain([(9, retry())]).collect();
    assert_eq!(store.settle_and_end(&again, &verdicts).await, Settled::Released);
    let again = again.token.batch;
    for limit in [1, 3, 100] {
        let dispatched = ids(&store, Dispatch::Dispatched, None, limit).await;
        assert!(dispatched.is_subset(&all) && dispatched.len() == 5, "leased ones too");
        let outstanding = ids(&store, Dispatch::Outstanding, None, limit).await;
        assert!(outstanding.is_superset(&more) && outstanding.contains(&again) && outstanding.len() == 7);
        assert_eq!(ids(&store, Dispatch::Dispatched, Some("e"), limit).await.len(), 2);
        let of_e = list(&store, &query(Dispatch::Outstanding, Some("e"), limit)).await;
        let due: Vec<_> = of_e.iter().filter(|entry| entry.not_before == LATER).collect();
        assert!(of_e.len() == 4 && due.len() == 1 && due[0].id == again);
    }
    assert_eq!(pages(&store).count_outstanding().await, Ok(7));
}

async fn there_is_no_page_after_the_last(store: Subject) {
    six_batches(&store, 1).await;
    for dispatch in [Dispatch::Outstanding, Dispatch::Dispatched] {
        if dispatch == Dispatch::Dispatched {
            lease_all(&store).await;
        }
        for (destination, all) in [(None, 6), (Some("d"), 3)] {
            let page = pages(&store).page(query(dispatch, destination, all)).await.unwrap();
            assert_eq!((page.entries.len(), page.next), (all, None), "a full page that is the last");
        }
    }
}

/// The cursor is a place, not a batch.
async fn a_listing_goes_on_after_what_it_has_listed_is_gone(store: Subject) {
    let all = six_batches(&store, 1).await;
    let mut query = query(Dispatch::Dispatched, None, 4);
    let leases = lease_all(&store).await;
    let first = pages(&store).page(query.clone()).await.unwrap();
    for lease in leases.iter().filter(|lease| lease.header.destination == "d") {
        let verdicts: Vec<_> = (0..10).map(|index| (index, sent())).collect();
        store.settle(lease, &verdicts).await;
        assert_eq!(delete(&store, lease.token.batch).await, ItemOutcome::Ok);
    }
    query.cursor = first.next;
    let second = pages(&store).page(query).await.unwrap();
    assert_eq!(second.next, None);
    let seen: BTreeSet<_> = first.entries.iter().chain(&second.entries).map(|entry| entry.id).collect();
    assert!(seen.is_superset(&ids(&store, Dispatch::Dispatched, None, 9).await), "nothing is skipped");
    assert!(seen.is_subset(&all) && seen.len() == first.entries.len() + second.entries.len());
}

async fn a_file_s_batches_come_in_order_of_row(store: Subject) {
    let files: Vec<_> = (1..=2).map(|content| fixtures::file("feed", content, &["d", "e"])).collect();
    for round in 0..7 {
        for file in &files {
            let first = 1 + round * 3;
            let step = fixtures::step(file, first..=first + 2, UnixMs(NOW.0 + round));
            store.outbox.append(step).await.unwrap();
        }
    }
    for destination in [Some("d"), None] {
        let listed = list(&store, &query(Dispatch::Outstanding, destination, 3)).await;
        let ids: Vec<_> = listed.iter().map(|entry| entry.id).collect();
        let mut rows = std::collections::BTreeMap::new();
        for (_, fetched) in pages(&store).get(&ids).await.unwrap() {
            let Fetched::Batch(batch) = fetched else { panic!("it was listed") };
            let key = (batch.header.file, batch.header.destination.clone());
            let of_file: &mut Vec<u64> = rows.entry(key).or_default();
            of_file.push(batch.first_row);
        }
        assert_eq!(rows.len(), if destination.is_some() { 2 } else { 4 });
        assert!(rows.values().all(|rows| rows.len() == 7 && rows.is_sorted()), "S3.10: {rows:?}");
    }
}

async fn what_is_not_a_cursor_is_refused(store: Subject) {
    six_batches(&store, 1).await;
    for text in ["", "garbage", "-1", "\u{1F4A5}", "99999999999999999999999999"] {
        let mut query = query(Dispatch::Outstanding, None, 2);
        query.cursor = Some(Cursor(text.into()));
        let refused = pages(&store).page(query).await;
        assert!(
            matches!(refused, Err(StoreError::Permanent(_))),
            "{text:?}: {:?}",
            refused.map(|page| page.next)
        );
    }
}

async fn many_are_fetched_by_id(store: Subject) {
    let file = fixtures::file("feed", 1, &["d", "e"]);
    let step = fixtures::step(&file, 1..=10, NOW);
    store.outbox.append(step.clone()).await.unwrap();
    let unknown = BatchId([9; 16]);
    let [one, other] = &step.batches[..] else { panic!("one per destination") };
    let fetched = pages(&store).get(&[unknown, other.id, one.id]).await.unwrap();
    let expected = [
        (unknown, Fetched::Missing),
        (other.id, Fetched::Batch(other.clone())),
        (one.id, Fetched::Batch(one.clone())),
    ];
    assert_eq!(fetched, expected);
    assert!(pages(&store).get(&[]).await.unwrap().is_empty());
    let many: Vec<_> = (0..250u16).map(|number| BatchId([number as u8; 16])).collect();
    assert!(pages(&store).get(&many).await.unwrap().iter().all(|(_, fetched)| *fetched == Fetched::Missing));
    // As it was accepted, whatever became of it.
    store.dispatch(NOW).await;
    let lease = store.lease("w", "d", 1).await.pop().unwrap();
    store.settle_and_end(&lease, &[(3, retry()), (5, sent())]).await;
    let one = step.batches.iter().find(|batch| batch.id == lease.token.batch).unwrap();
    assert_eq!(fetch(&store, one.id).await, Fetched::Batch(one.clone()));
}

async fn only_what_is_done_is_deleted(store: Subject) {
    let file = fixtures::file("feed", 1, &["d", "e"]);
    let step = fixtures::step(&file, 1..=3, NOW);
    let [id, shares_its_rows] = [0, 1].map(|index| step.batches[index].id);
    store.outbox.append(step.clone()).await.unwrap();
    assert!(is_kept(&delete(&store, id).await), "outstanding");
    store.dispatch(NOW).await;
    assert!(is_kept(&delete(&store, id).await), "dispatched");
    let lease = store.lease("w", "d", 1).await.pop().unwrap();
    assert!(is_kept(&delete(&store, id).await), "leased");
    store.settle(&lease, &[(0, sent()), (1, sent())]).await;
    assert!(is_kept(&delete(&store, id).await), "not settled");
    assert_eq!(fetch(&store, id).await, Fetched::Batch(step.batches[0].clone()));
    assert_eq!(store.settle(&lease, &[(2, sent())]).await, Settled::Complete);
    let unknown = BatchId([9; 16]);
    for _ in 0..2 {
        let outcomes = pages(&store).delete(&[unknown, id]).await.unwrap();
        assert_eq!(outcomes, [(unknown, ItemOutcome::Ok), (id, ItemOutcome::Ok)]);
    }
    assert_eq!(fetch(&store, id).await, Fetched::Missing);
    assert!(ids(&store, Dispatch::Dispatched, Some("d"), 9).await.is_empty());
    assert_eq!(store.tally(file.id).await, (3, 3, 0, 0), "what became of its messages stays");
    // The step again, and the queue's entry again: no way back for it.
    store.outbox.append(step.clone()).await.unwrap();
    assert_eq!(store.outbox.depth().await, Ok(3));
    let request = ClaimRequest {
        holder: "node-1/w#1".into(),
        batches: vec![id],
        until: LATER,
        now: NOW,
        born: UnixMs(0),
    };
    let claims = &store.carried.as_ref().expect("it is carried for").claims;
    let claim = claims.claim(request).await.unwrap().pop().unwrap().1;
    assert!(matches!(claim, Claim::Settled | Claim::Missing), "{claim:?}");
    // The batch with the same rows for the other destination has lost nothing.
    assert_eq!(fetch(&store, shares_its_rows).await, Fetched::Batch(step.batches[1].clone()));
    let lease = store.lease("w", "e", 1).await.pop().unwrap();
    assert_eq!(lease.payload, step.batches[1].payload);
    store.settle(&lease, &[(0, sent()), (1, sent()), (2, sent())]).await;
    assert_eq!(delete(&store, shares_its_rows).await, ItemOutcome::Ok);
}

async fn a_dead_message_keeps_its_batch(store: Subject) {
    let (file, lease) = store.one_lease(2).await;
    let id = lease.token.batch;
    assert_eq!(store.settle(&lease, &[(0, sent()), (1, dead())]).await, Settled::Complete);
    assert!(is_kept(&delete(&store, id).await), "it is dead");
    assert_eq!((store.redrive)(LATER).await, 1);
    assert!(is_kept(&delete(&store, id).await), "it may die again");
    let again = store.again("w", LATER).await;
    assert!(is_kept(&delete(&store, id).await), "leased");
    assert_eq!(store.settle(&again, &[(1, sent())]).await, Settled::Complete);
    assert_eq!(delete(&store, id).await, ItemOutcome::Ok);
    assert_eq!(store.tally(file.id).await, (2, 2, 0, 0));
    assert_eq!((store.redrive)(LATER).await, 0);
}

const OVER: UnixMs = UnixMs(LATER.0 + 60_000);

async fn what_a_redrive_needs_is_kept(store: Subject) {
    let (file, lease) = store.one_lease(4).await;
    let verdicts = [(0, sent()), (1, dead()), (2, sent()), (3, sent())];
    assert_eq!(store.settle(&lease, &verdicts).await, Settled::Complete);
    assert_eq!(archive_all(&store, OVER, 9).await, 0);
    assert_eq!((store.redrive)(LATER).await, 1);
    assert_eq!(archive_all(&store, OVER, 9).await, 0);
    let again = store.again("w", LATER).await;
    assert_eq!((&again.payload, again.open.len()), (&lease.payload, 1));
    assert_eq!(archive_all(&store, OVER, 9).await, 0);
    assert_eq!(store.settle(&again, &[(1, sent())]).await, Settled::Complete);
    assert_eq!(archive_all(&store, OVER, 9).await, 1);
    assert_eq!(store.tally(file.id).await, (4, 4, 0, 0), "what became of its messages stays");
    assert_eq!((store.redrive)(LATER).await, 0);
}

async fn what_is_to_be_tried_again_is_kept(store: Subject) {
    let (_, lease) = store.one_lease(2).await;
    assert_eq!(archive_all(&store, OVER, 9).await, 0, "leased");
    assert_eq!(store.settle_and_end(&lease, &[(0, sent()), (1, retry())]).await, Settled::Released);
    assert_eq!(archive_all(&store, OVER, 9).await, 0, "to be tried again");
    let again = store.again("w", LATER).await;
    assert_eq!(again.payload, lease.payload);
    store.settle(&again, &[(1, sent())]).await;
    assert_eq!(archive_all(&store, OVER, 9).await, 1);
}

/// A worker that was thought dead reports when everything is over.
async fn what_is_archived_takes_late_facts(store: Subject) {
    let (file, old) = store.one_lease(2).await;
    store.queue.release(&[old.token], Release::Lost).await.unwrap();
    let new = store.again("new", NOW).await;
    assert_eq!(store.settle(&new, &[(0, sent()), (1, sent())]).await, Settled::Complete);
    assert_eq!(archive_all(&store, OVER, 9).await, 1);
    assert_eq!(store.settle(&old, &[(0, sent()), (1, sent())]).await, Settled::Stale);
    assert_eq!(store.settle_and_end(&old, &[(0, dead()), (1, retry())]).await, Settled::Stale);
    assert_eq!(store.tally(file.id).await, (2, 2, 0, 0));
    assert_eq!(store.outbox.depth().await, Ok(0));
    store.assert_idle(LATER).await;
}

async fn archiving_takes_what_is_old_in_steps(store: Subject) {
    six_batches(&store, 1).await;
    store.dispatch(NOW).await;
    let mut leases: Vec<Lease> = store.lease("w", "d", 9).await;
    let all =
        |verdict| (0..10).map(|index| (index, if index == 9 { verdict } else { sent() })).collect::<Vec<_>>();
    let dying = leases.pop().unwrap();
    assert_eq!(store.settle(&dying, &all(dead())).await, Settled::Complete);
    for lease in &leases {
        assert_eq!(store.settle(lease, &all(sent())).await, Settled::Complete);
    }
    assert_eq!(archive_all(&store, NOW, 9).await, 0, "not older than that");
    assert_eq!(store.archive.archive(LATER, 0).await, Ok(0));
    let taken = archive_all(&store, LATER, 1).await;
    assert_eq!(taken, 2, "neither the dead nor what is on its way to the other destination");
    if store.carried.is_some() {
        let kept = ids(&store, Dispatch::Dispatched, None, 4).await;
        assert!(kept.len() == 1 && kept.contains(&dying.token.batch));
        assert_eq!(ids(&store, Dispatch::Outstanding, None, 4).await.len(), 3);
    }
    deliver(&store, "e", NOW).await;
    assert_eq!(archive_all(&store, LATER, 2).await, 3);
    assert_eq!((store.redrive)(LATER).await, 1);
    store.dispatch(LATER).await;
    deliver(&store, "d", LATER).await;
    assert_eq!(archive_all(&store, OVER, 9).await, 1);
    if store.carried.is_some() {
        assert!(ids(&store, Dispatch::Dispatched, None, 4).await.is_empty());
        assert_eq!(pages(&store).count_outstanding().await, Ok(0));
    }
}
