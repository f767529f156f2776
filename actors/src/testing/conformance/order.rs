//! What is leased of a destination that keeps an order (B13).

use std::future::Future;

use super::{LATER, NOW, Subject, fixtures, retry, sent, want};
use crate::{
    model::{
        batch::Rows,
        hold::{FileHold, HoldChange},
        ids::FileId,
        time::{MonoMs, UnixMs},
    },
    ports::{Lease, LeaseRequest, Release, Settled, Want},
};

/// Not where several machines lease: `check-config` refuses it there.
pub(super) async fn order<F: Future<Output = Subject>>(make: impl Fn() -> F) {
    if make().await.carried.is_none() {
        b13_the_oldest_are_leased_due_or_not_to_one_holder(make().await).await;
        b13_a_held_or_closed_file_is_left_out_of_the_order(make().await).await;
    }
}

/// What `holder` gets of a destination that keeps an order.
async fn lease_in_order(store: &Subject, holder: &str, messages: usize, batches: usize) -> Vec<Lease> {
    let wants = vec![Want { in_order: true, ..want("d", messages, batches) }];
    let holder = holder.into();
    let request = LeaseRequest { holder, wants, until: MonoMs(900), now: NOW, born: UnixMs(0) };
    store.queue.lease(request).await.unwrap()
}

/// Files by their content, and first rows.
fn places(leases: &[Lease]) -> Vec<(FileId, u64)> {
    let first_row = |lease: &Lease| Rows::decode(lease.payload.clone()).unwrap().row(0);
    leases.iter().map(|lease| (lease.header.file, first_row(lease))).collect()
}

async fn b13_the_oldest_are_leased_due_or_not_to_one_holder(store: Subject) {
    let files = [1, 2, 3].map(|content| fixtures::file("feed", content, &["d"]));
    // Two files are read at once, and the clock is set back meanwhile.
    for (file, rows, at) in [(0, 1..=2, LATER), (1, 1..=2, NOW), (0, 3..=4, NOW), (2, 1..=2, NOW)] {
        store.outbox.append(fixtures::step(&files[file], rows, at)).await.unwrap();
    }
    let all = [(files[0].id, 1), (files[0].id, 3), (files[1].id, 1), (files[2].id, 1)];
    let first = lease_in_order(&store, "w", 99, 2).await;
    assert_eq!(places(&first), all[..2]);
    assert_eq!(lease_in_order(&store, "v", 99, 9).await, [], "another worker has something of it");
    // One message is to be tried again at `LATER`, and comes first all the same.
    assert_eq!(store.settle_and_end(&first[1], &[(0, retry()), (1, sent())]).await, Settled::Released);
    assert_eq!(lease_in_order(&store, "v", 99, 9).await, []);
    store.queue.release(&[first[0].token], Release::Unused).await.unwrap();
    let leased = lease_in_order(&store, "v", 3, 9).await;
    assert_eq!(places(&leased), all, "with what is due it is enough: {leased:?}");
    assert_eq!(leased[1].open.iter().map(|open| open.not_before).collect::<Vec<_>>(), [LATER]);
    assert_eq!(lease_in_order(&store, "v", 99, 9).await, [], "there is no other");
    let tokens: Vec<_> = leased.iter().map(|lease| lease.token).collect();
    store.queue.release(&tokens, Release::Unused).await.unwrap();
    assert_eq!(places(&lease_in_order(&store, "w", 99, 3).await), all[..3]);
    assert_eq!(places(&lease_in_order(&store, "w", 99, 3).await), all[3..], "who has some gets more");
}

async fn b13_a_held_or_closed_file_is_left_out_of_the_order(store: Subject) {
    let files = [1, 2, 3].map(|content| fixtures::file("feed", content, &["d"]));
    for file in &files {
        store.outbox.append(fixtures::step(file, 1..=2, NOW)).await.unwrap();
    }
    let first = lease_in_order(&store, "w", 1, 1).await;
    let closed = Release::Closed { from: NOW, until: LATER };
    store.queue.release(&[first[0].token], closed).await.unwrap();
    let second = lease_in_order(&store, "w", 1, 1).await;
    assert_eq!(places(&second), [(files[1].id, 1)]);
    store.queue.release(&[second[0].token], Release::Unused).await.unwrap();
    let hold = HoldChange::Hold(FileHold::by_operator(NOW, "wait"));
    store.steering.change_hold(files[1].id, None, &hold).await.unwrap();
    assert_eq!(places(&lease_in_order(&store, "w", 99, 9).await), [(files[2].id, 1)]);
}
