use std::future::Future;

use super::{NOW, Subject, fixtures, sent};
use crate::{
    model::time::{MonoMs, UnixMs},
    ports::{ItemOutcome, LeaseRequest, Release, Settled},
};

/// The queue's contract.
pub async fn queue<F: Future<Output = Subject>>(make: impl Fn() -> F) {
    nothing_is_leased_before_it_is_sent_and_nothing_twice(make().await).await;
    never_more_than_asked_for_and_each_destination_for_itself(make().await).await;
    a_lease_holds_until_its_deadline_and_extensions_move_it(make().await).await;
    release_charges_only_losses(make().await).await;
    a_gone_holder_loses_its_leases_and_no_other_s(make().await).await;
    every_lease_has_a_fence_of_its_own(make().await).await;
    a_disabled_destination_is_held(make().await).await;
    sending_twice_is_sending_once(make().await).await;
}

async fn four_batches(store: &Subject) {
    let file = fixtures::file("feed", 1, &["d", "e"]);
    for first in [1, 11] {
        store.outbox.append(fixtures::step(&file, first..=first + 9, NOW)).await.unwrap();
    }
}

async fn nothing_is_leased_before_it_is_sent_and_nothing_twice(store: Subject) {
    four_batches(&store).await;
    assert!(store.lease("w", "d", 9).await.is_empty());
    store.dispatch(NOW).await;
    let leases = store.lease("w", "d", 9).await;
    assert_eq!(leases.len(), 2);
    assert!(store.lease("v", "d", 9).await.is_empty());
    let lease = &leases[0];
    assert_eq!((lease.drive, lease.attempt, lease.losses, lease.accepted_at), (0, 0, 0, NOW));
    assert_eq!((lease.root, &lease.header.destination[..]), (lease.token.batch, "d"));
    assert_eq!(lease.states.unsettled().count(), 10);
    assert!(lease.history.is_empty());
}

async fn never_more_than_asked_for_and_each_destination_for_itself(store: Subject) {
    four_batches(&store).await;
    store.dispatch(NOW).await;
    let wants = vec![("d".into(), 1), ("e".into(), 5), ("unheard-of".into(), 5), ("d".into(), 0)];
    let leases = store.lease_all(LeaseRequest { holder: "w".into(), wants, until: MonoMs(9) }).await;
    let of = |name: &str| leases.iter().filter(|lease| lease.header.destination == name).count();
    assert_eq!((of("d"), of("e"), leases.len()), (1, 2, 3));
}

async fn a_lease_holds_until_its_deadline_and_extensions_move_it(store: Subject) {
    four_batches(&store).await;
    store.dispatch(NOW).await;
    let leases = store.lease_until("w", "d", 2, MonoMs(100)).await;
    assert_eq!(store.queue.rescue(MonoMs(100)).await, Ok(0), "not before the deadline has passed");
    let extended = store.queue.extend(&[leases[0].token], MonoMs(500)).await.unwrap();
    assert_eq!(extended, [(leases[0].token.batch, ItemOutcome::Ok)]);
    assert_eq!(store.queue.rescue(MonoMs(101)).await, Ok(1));
    assert_eq!(store.queue.rescue(MonoMs(101)).await, Ok(0));
    let late = store.queue.extend(&[leases[1].token], MonoMs(500)).await.unwrap();
    assert!(matches!(late[0].1, ItemOutcome::Permanent(_)), "{late:?}");
    let again = store.lease("v", "d", 9).await;
    assert_eq!(again.len(), 1);
    assert_eq!((again[0].token.batch, again[0].losses), (leases[1].token.batch, 1));
    // The old holder can neither extend nor release what another has now.
    let stale = store.queue.extend(&[leases[1].token], MonoMs(u64::MAX)).await.unwrap();
    assert!(matches!(stale[0].1, ItemOutcome::Permanent(_)), "{stale:?}");
    store.queue.release(&[leases[1].token], Release::Lost).await.unwrap();
    assert!(store.lease("w", "d", 9).await.is_empty());
}

async fn release_charges_only_losses(store: Subject) {
    let (_, lease) = store.one_lease(5).await;
    store.queue.release(&[lease.token], Release::Unused).await.unwrap();
    let lease = store.lease("w", "d", 1).await.pop().unwrap();
    assert_eq!(lease.losses, 0);
    store.queue.release(&[lease.token, lease.token], Release::Lost).await.unwrap();
    let lease = store.lease("w", "d", 1).await.pop().unwrap();
    assert_eq!(lease.losses, 1);
    assert_eq!(store.settle(&lease, &[(0, sent())]).await, Settled::Open);
    store.queue.release(&[lease.token], Release::Lost).await.unwrap();
    let lease = store.lease("w", "d", 1).await.pop().unwrap();
    assert_eq!(lease.losses, 2);
    assert_eq!(lease.states.unsettled().collect::<Vec<_>>(), [1, 2, 3, 4]);
}

async fn a_gone_holder_loses_its_leases_and_no_other_s(store: Subject) {
    four_batches(&store).await;
    store.dispatch(NOW).await;
    store.lease("w-1", "d", 9).await;
    let other = store.lease("w-2", "e", 9).await;
    assert_eq!(store.queue.release_holder("w-1").await, Ok(2));
    assert_eq!(store.queue.release_holder("w-1").await, Ok(0));
    assert!(store.lease("w-3", "d", 9).await.iter().all(|lease| lease.losses == 1));
    assert_eq!(store.queue.extend(&[other[0].token], MonoMs(9)).await.unwrap()[0].1, ItemOutcome::Ok);
}

async fn every_lease_has_a_fence_of_its_own(store: Subject) {
    let (_, mut lease) = store.one_lease(5).await;
    for _ in 0..5 {
        store.queue.release(&[lease.token], Release::Unused).await.unwrap();
        let next = store.lease("w", "d", 1).await.pop().unwrap();
        assert!(next.token.fence > lease.token.fence);
        lease = next;
    }
}

async fn a_disabled_destination_is_held(store: Subject) {
    four_batches(&store).await;
    store.dispatch(NOW).await;
    store.ledger.disable_destination("d", "410 Gone", NOW).await.unwrap();
    store.ledger.disable_destination("d", "again", UnixMs(NOW.0 + 1)).await.unwrap();
    assert_eq!(store.ledger.disabled_destinations().await.unwrap(), ["d".into()]);
    assert!(store.lease("w", "d", 9).await.is_empty());
    assert_eq!(store.lease("w", "e", 9).await.len(), 2);
    assert_eq!(store.outbox.depth().await, Ok(40), "held, not lost");
    (store.enable)("d");
    assert!(store.ledger.disabled_destinations().await.unwrap().is_empty());
    assert_eq!(store.lease("w", "d", 9).await.len(), 2);
}

async fn sending_twice_is_sending_once(store: Subject) {
    four_batches(&store).await;
    store.set_time(NOW);
    let entries = store.outstanding(NOW, 9).await;
    for _ in 0..2 {
        store.send(&entries).await;
    }
    let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
    store.outbox.mark_dispatched(&ids).await.unwrap();
    assert_eq!(store.lease("w", "d", 9).await.len(), 2);
    store.send(&entries).await;
    assert!(store.lease("w", "d", 9).await.is_empty(), "a leased batch is not queued a second time");
}
