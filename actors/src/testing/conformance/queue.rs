use std::{future::Future, sync::Arc};

use super::{LATER, NOW, Subject, dead, fixtures, nth, retry, retry_at, sent, settlement, told, tries, want};
use crate::{
    model::{
        file::{FileRecord, FileState},
        hold::{FileHold, HeldFile, HoldCause, HoldChange},
        ids::FileId,
        ledger::CountChange,
        priority::{FilePriority, Priority},
        terms::Terms,
        time::{MonoMs, UnixMs},
    },
    ports::{
        Claim, ClaimRequest, Ended, FirstTurns, HoldStep, ItemOutcome, Lease, LeaseRequest, Release, Settled,
        Settlement, Want,
    },
};

/// The queue's contract.
pub async fn queue<F: Future<Output = Subject>>(make: impl Fn() -> F) {
    what_is_stored_is_leased_and_nothing_twice(make().await).await;
    never_more_than_asked_for_and_each_destination_for_itself(make().await).await;
    it_is_enough_once_so_many_messages_are_due(make().await).await;
    nothing_is_leased_before_it_is_due(make().await).await;
    a_batch_is_due_when_its_first_message_is(make().await).await;
    a_retry_is_leased_before_others_and_they_get_their_fifth(make().await).await;
    b11_a_small_file_behind_a_large_one_is_leased_with_the_next_batch(make().await).await;
    b11_files_share_by_how_urgent_they_are(make().await).await;
    b11_who_has_enough_gets_the_first_turns_of_other_files_and_retries(make().await).await;
    b11_how_urgent_a_file_is_is_ordered_while_it_is_on_its_way(make().await).await;
    a_lease_holds_until_its_deadline_and_extensions_move_it(make().await).await;
    release_charges_only_losses(make().await).await;
    a_lost_lease_is_due_as_it_was(make().await).await;
    b17_a_loss_charges_the_message_that_was_begun(make().await).await;
    b17_what_was_recorded_or_given_back_is_not_charged(make().await).await;
    a_gone_holder_loses_its_leases_and_no_other_s(make().await).await;
    every_lease_has_a_fence_of_its_own(make().await).await;
    a_disabled_destination_is_held(make().await).await;
    b11_a_held_file_waits_and_its_neighbours_do_not(make().await).await;
    b11_what_begins_before_the_held_row_goes(make().await).await;
    b11_what_is_leased_when_its_file_is_held_can_be_settled_and_waits_then(make().await).await;
    b11_a_step_that_is_repeated_holds_nothing_again(make().await).await;
    b11_a_cancelled_file_is_never_sent_and_balances(make().await).await;
    b11_what_is_open_when_its_time_is_over_is_unsent_whatever_holds_it(make().await).await;
    b11_what_is_redriven_when_its_time_is_over_is_unsent(make().await).await;
    b11_a_closed_file_waits_and_its_neighbours_do_not(make().await).await;
    what_the_store_has_given_away_is_not_leased_by_an_old_entry(make().await).await;
    super::order::order(make).await;
}

/// Two batches for each of `d` and `e`, of a file each: a queue that keeps order brings no other batch of a file while
/// one of it is leased.
async fn four_batches(store: &Subject) {
    for content in 1..=2 {
        let file = fixtures::file("feed", content, &["d", "e"]);
        store.outbox.append(fixtures::step(&file, 1..=10, NOW)).await.unwrap();
    }
    store.dispatch(NOW).await;
}

async fn what_is_stored_is_leased_and_nothing_twice(store: Subject) {
    four_batches(&store).await;
    let leases = store.lease("w", "d", 9).await;
    assert_eq!(leases.len(), 2);
    assert!(store.lease("v", "d", 9).await.is_empty());
    assert!(store.lease("w", "d", 9).await.is_empty());
    let lease = &leases[0];
    assert_eq!((lease.losses, lease.accepted_at, lease.count), (0, NOW, 10));
    assert_eq!(&lease.header.destination[..], "d");
    assert!(lease.is_first());
    assert!(lease.open.iter().all(|open| (open.not_before, open.drive, open.tries) == (NOW, 0, 0)));
    assert!(lease.open.iter().map(|open| open.index).eq(0..10));
    assert_eq!((lease.redriven.len(), lease.charged.len()), (0, 0));
}

async fn never_more_than_asked_for_and_each_destination_for_itself(store: Subject) {
    four_batches(&store).await;
    let wants = vec![want("d", 99, 1), want("e", 99, 5), want("unheard-of", 99, 5), want("d", 99, 0)];
    let request = LeaseRequest { holder: "w".into(), wants, until: MonoMs(900), now: NOW, born: UnixMs(0) };
    let leases = store.lease_all(request).await;
    let of = |name: &str| leases.iter().filter(|lease| lease.header.destination == name).count();
    assert_eq!((of("d"), of("e"), leases.len()), (1, 2, 3));
}

async fn it_is_enough_once_so_many_messages_are_due(store: Subject) {
    for content in 1..=4 {
        let file = fixtures::file("feed", content, &["d"]);
        store.outbox.append(fixtures::step(&file, 1..=10, NOW)).await.unwrap();
    }
    store.dispatch(NOW).await;
    let wants = vec![want("d", 15, 9)];
    let request = LeaseRequest { holder: "w".into(), wants, until: MonoMs(900), now: NOW, born: UnixMs(0) };
    let leases = store.lease_all(request).await;
    let due: usize = leases.iter().map(|lease| lease.due_count(NOW)).sum();
    assert_eq!(due, 20, "two of ten");
    assert_eq!(store.lease("v", "d", 9).await.len(), 2);
}

async fn nothing_is_leased_before_it_is_due(store: Subject) {
    let (file, lease) = store.one_lease(3).await;
    let verdicts = [(0, sent()), (1, retry()), (2, dead())];
    assert_eq!(store.settle_and_end(&lease, &verdicts).await, Settled::Released);
    for now in [NOW, UnixMs(LATER.0 - 1)] {
        store.assert_idle(now).await;
    }
    if let Some(carried) = &store.carried {
        assert_eq!(carried.claims.next_due().await, Ok(Some(LATER)));
    }
    let again = store.again("w", LATER).await;
    assert_eq!((again.token.batch, again.accepted_at, again.count), (lease.token.batch, NOW, 3));
    assert_eq!((&again.header, &again.payload), (&lease.header, &lease.payload), "I4");
    assert_eq!(tries(&again), [(1, 1)]);
    assert!(!again.is_first());
    assert_eq!(again.open[0].not_before, LATER);
    // A file whose rows come late.
    let other = fixtures::file("feed", 2, &["d"]);
    let due = UnixMs(LATER.0 + 500);
    store.outbox.append(fixtures::step(&other, 1..=2, due)).await.unwrap();
    store.assert_idle(LATER).await;
    assert_eq!(store.again("w", due).await.header.file, other.id);
    assert_eq!(store.tally(file.id).await, (3, 1, 1, 1));
}

async fn a_batch_is_due_when_its_first_message_is(store: Subject) {
    let (_, lease) = store.one_lease(3).await;
    let (soon, late) = (UnixMs(NOW.0 + 20_000), UnixMs(NOW.0 + 40_000));
    let verdicts = [(0, retry_at(late)), (1, retry_at(soon)), (2, sent())];
    assert_eq!(store.settle_and_end(&lease, &verdicts).await, Settled::Released);
    store.assert_idle(UnixMs(soon.0 - 1)).await;
    let first = store.again("w", soon).await;
    assert_eq!(first.due_count(soon), 1);
    assert_eq!(first.open.iter().map(|open| open.not_before).collect::<Vec<_>>(), [late, soon]);
    // The other stays, for then.
    assert_eq!(store.settle_and_end(&first, &[(1, sent())]).await, Settled::Released);
    store.assert_idle(UnixMs(late.0 - 1)).await;
    assert_eq!(tries(&store.again("w", late).await), [(0, 1)]);
}

/// Batches of ten of one file for `d`, of which the first `retries` are to be tried again at `LATER`.
async fn both_lanes(store: &Subject, retries: usize, fresh: usize) {
    let file = fixtures::file("feed", 1, &["d"]);
    let step = async |nth: usize| {
        let first = nth as u64 * 10 + 1;
        store.outbox.append(fixtures::step(&file, first..=first + 9, NOW)).await.unwrap();
    };
    for nth in 0..retries {
        step(nth).await;
    }
    store.dispatch(NOW).await;
    for lease in store.lease("w", "d", retries).await {
        let verdicts: Vec<_> = (0..10).map(|index| (index, retry())).collect();
        assert_eq!(store.settle_and_end(&lease, &verdicts).await, Settled::Released);
    }
    for nth in retries..retries + fresh {
        step(nth).await;
    }
}

async fn lease_once(store: &Subject, messages: usize, batches: usize) -> Vec<Lease> {
    let wants = vec![want("d", messages, batches)];
    store
        .queue
        .lease(LeaseRequest { holder: "w".into(), wants, until: MonoMs(900), now: LATER, born: UnixMs(0) })
        .await
        .unwrap()
}

/// B11. A queue that only carries has no order.
async fn a_retry_is_leased_before_others_and_they_get_their_fifth(store: Subject) {
    if store.carried.is_some() {
        return;
    }
    both_lanes(&store, 12, 12).await;
    // The others have been due for longer.
    let one = lease_once(&store, usize::MAX, 1).await;
    assert!(!one[0].is_first());
    let firsts = |leases: &[Lease]| leases.iter().filter(|lease| lease.is_first()).count();
    let some = lease_once(&store, 50, 10).await;
    assert_eq!((some.len(), firsts(&some)), (5, 1), "a fifth for the others");
    let ten = lease_once(&store, usize::MAX, 10).await;
    assert_eq!((ten.len(), firsts(&ten)), (10, 10 - 7), "no more than 7 were left to retry");
    let rest = lease_once(&store, usize::MAX, 99).await;
    assert!(rest.iter().all(Lease::is_first), "nobody to share with");
    assert_eq!(rest.len(), 12 - 1 - 3);
}

/// Stores `batches` batches of ten of a file of `d`, which follow those of rows up to `after`.
async fn store_batches(store: &Subject, file: &Arc<FileRecord>, after: u64, batches: u64) {
    for first in (0..batches).map(|nth| after + nth * 10 + 1) {
        store.outbox.append(fixtures::step(file, first..=first + 9, NOW)).await.unwrap();
    }
}

/// A file for `d` that is so urgent.
fn file_of(content: u8, priority: Priority) -> Arc<FileRecord> {
    Arc::new(FileRecord { priority, ..(*fixtures::file("feed", content, &["d"])).clone() })
}

/// A queue that only carries has no order.
async fn b11_a_small_file_behind_a_large_one_is_leased_with_the_next_batch(store: Subject) {
    if store.carried.is_some() {
        return;
    }
    let (large, small) = (file_of(1, Priority::Normal), file_of(2, Priority::Normal));
    store_batches(&store, &large, 0, 9).await;
    assert_eq!(store.lease("w", "d", 3).await.len(), 3);
    store.outbox.append(fixtures::step(&small, 1..=2, NOW)).await.unwrap();
    assert_eq!(store.lease("w", "d", 1).await[0].header.file, small.id);
    let rest = store.lease("w", "d", 99).await;
    assert!(rest.len() == 6 && rest.iter().all(|lease| lease.header.file == large.id));
    // What is held takes no turn, and waits for none.
    let held = FileHold::by_operator(NOW, "why");
    store_batches(&store, &large, 90, 5).await;
    assert_eq!(store.steering.change_hold(large.id, None, &HoldChange::Hold(held)).await, Ok(1));
    store.outbox.append(fixtures::step(&small, 3..=4, NOW)).await.unwrap();
    let leases = store.lease("w", "d", 99).await;
    assert_eq!(leases.iter().map(|lease| lease.header.file).collect::<Vec<_>>(), [small.id]);
}

async fn b11_files_share_by_how_urgent_they_are(store: Subject) {
    if store.carried.is_some() {
        return;
    }
    let files =
        [(1, Priority::Bulk), (2, Priority::Normal), (3, Priority::Urgent)].map(|(nth, is)| file_of(nth, is));
    for file in &files {
        store_batches(&store, file, 0, 45).await;
    }
    let mut got = [0_usize; 3];
    for _ in 0..42 {
        let lease = store.lease("w", "d", 1).await.pop().unwrap();
        let at = files.iter().position(|file| file.id == lease.header.file).unwrap();
        assert_eq!(lease.header.priority, files[at].priority);
        got[at] += 1;
    }
    let is_fair = |(got, due): (usize, usize)| got.abs_diff(due) <= 1;
    assert!(got.into_iter().zip([2, 8, 32]).all(is_fair), "{got:?}");
}

/// What a worker that has enough gets: in one call, for such a queue answers at once.
async fn first_turns(store: &Subject, besides: &[FileId], retries: bool, now: UnixMs) -> Vec<Lease> {
    store.set_time(now);
    let first_turns = Some(FirstTurns { besides: besides.to_vec(), retries });
    let wants = vec![Want { first_turns, ..Want::new("d", 0, 2) }];
    let request = LeaseRequest { holder: "w".into(), wants, until: MonoMs(900), now, born: UnixMs(0) };
    store.queue.lease(request).await.unwrap()
}

/// Not where order is kept.
async fn b11_who_has_enough_gets_the_first_turns_of_other_files_and_retries(store: Subject) {
    if store.carried.as_ref().is_some_and(|carried| carried.carry.queue.keeps_order()) {
        return;
    }
    let (large, small) = (file_of(1, Priority::Normal), file_of(2, Priority::Normal));
    store.dispatch(NOW).await; // the coordinator knows its destinations from its first turn on
    store_batches(&store, &large, 0, 2).await;
    let of = |leases: &[Lease]| leases.iter().map(|lease| lease.header.file).collect::<Vec<_>>();
    let first = first_turns(&store, &[], false, NOW).await;
    assert_eq!(of(&first), [large.id], "one of each file");
    store_batches(&store, &small, 0, 3).await;
    assert_eq!(of(&first_turns(&store, &[large.id], true, NOW).await), [small.id]);
    assert_eq!(of(&first_turns(&store, &[large.id, small.id], true, NOW).await), []);
    // The most urgent before others.
    for (content, priority) in [(3, Priority::Bulk), (4, Priority::Normal), (5, Priority::Urgent)] {
        store_batches(&store, &file_of(content, priority), 0, 1).await;
    }
    let some = first_turns(&store, &[large.id, small.id], false, NOW).await;
    assert_eq!((some.len(), some[0].header.priority), (2, Priority::Urgent), "no more than asked for");
    // A retry, whosever it is.
    let verdicts: Vec<_> = (0..10).map(|index| (index, if index == 0 { retry() } else { sent() })).collect();
    assert_eq!(store.settle_and_end(&first[0], &verdicts).await, Settled::Released);
    let others = [3, 4].map(|content| file_of(content, Priority::Normal).id);
    let besides = [&[large.id, small.id], &others[..]].concat();
    assert_eq!(of(&first_turns(&store, &besides, true, NOW).await), [], "it is not due");
    assert_eq!(of(&first_turns(&store, &besides, false, LATER).await), []);
    assert_eq!(of(&first_turns(&store, &besides, true, LATER).await), [large.id]);
    // What is held, or its destination, goes ahead of nothing.
    let held = FileHold::by_operator(NOW, "why");
    assert_eq!(store.steering.change_hold(small.id, None, &HoldChange::Hold(held)).await, Ok(1));
    let besides = [&[large.id], &others[..]].concat();
    assert_eq!(of(&first_turns(&store, &besides, true, LATER).await), []);
    store.ledger.disable_destination("d", "410 Gone", NOW).await.unwrap();
    assert_eq!(of(&first_turns(&store, &[], true, LATER).await), []);
}

async fn b11_how_urgent_a_file_is_is_ordered_while_it_is_on_its_way(store: Subject) {
    let (file, _) = store.one_lease(3).await;
    assert_eq!(store.steering.priorities().await, Ok(Vec::new()));
    let order = async |file, destination, priority| {
        store.steering.prioritize(file, destination, priority).await.unwrap()
    };
    assert_eq!(order(file.id, None, Priority::Urgent).await, 1);
    assert_eq!(order(file.id, Some("d"), Priority::Urgent).await, 0, "it is so already");
    assert_eq!(order(file.id, Some("elsewhere"), Priority::Bulk).await, 0);
    assert_eq!(order(FileId([9; 16]), None, Priority::Bulk).await, 0);
    let ordered = FilePriority { file: file.id, destination: "d".into(), priority: Priority::Urgent };
    assert_eq!(store.steering.priorities().await, Ok(vec![ordered]));
    let shown = async || store.ledger.report(file.id).await.unwrap().unwrap();
    assert_eq!(
        (shown().await.priority_at("d"), shown().await.file.priority),
        (Priority::Urgent, Priority::Normal)
    );
    // It is obeyed.
    let other = file_of(2, Priority::Normal);
    store_batches(&store, &other, 0, 1).await;
    store.outbox.append(fixtures::step(&file, 4..=13, NOW)).await.unwrap();
    let is_ordered = store.carried.as_ref().is_none_or(|carried| !carried.carry.queue.keeps_order());
    if is_ordered {
        let leases = first_turns(&store, &[], false, NOW).await;
        let files: Vec<_> = leases.iter().map(|lease| lease.header.file).collect();
        assert_eq!(files, [file.id, other.id]);
    }
    assert_eq!(order(file.id, Some("d"), Priority::Normal).await, 1);
    assert_eq!(shown().await.priority_at("d"), Priority::Normal);
}

async fn a_lease_holds_until_its_deadline_and_extensions_move_it(store: Subject) {
    four_batches(&store).await;
    let leases = store.lease_until("w", "d", 2, MonoMs(100), NOW).await;
    assert_eq!(store.queue.rescue(MonoMs(100)).await, Ok(0), "not before the deadline has passed");
    let extended = store.queue.extend(&[leases[0].token], MonoMs(500)).await.unwrap();
    assert_eq!(extended, [(leases[0].token.batch, ItemOutcome::Ok)]);
    assert_eq!(store.queue.rescue(MonoMs(101)).await, Ok(1));
    assert_eq!(store.queue.rescue(MonoMs(101)).await, Ok(0));
    let late = store.queue.extend(&[leases[1].token], MonoMs(500)).await.unwrap();
    assert!(matches!(late[0].1, ItemOutcome::Permanent(_)), "{late:?}");
    let again = store.again("v", NOW).await;
    assert_eq!((again.token.batch, again.losses), (leases[1].token.batch, 1));
    // The old holder can neither extend nor release what another has now.
    let stale = store.queue.extend(&[leases[1].token], MonoMs(u64::MAX)).await.unwrap();
    assert!(matches!(stale[0].1, ItemOutcome::Permanent(_)), "{stale:?}");
    store.queue.release(&[leases[1].token], Release::Lost).await.unwrap();
    store.assert_idle(NOW).await;
}

async fn release_charges_only_losses(store: Subject) {
    let (_, lease) = store.one_lease(5).await;
    store.queue.release(&[lease.token], Release::Unused).await.unwrap();
    let mut lease = store.again("w", NOW).await;
    assert_eq!(lease.losses, 0);
    for losses in 1..=3 {
        store.queue.release(&[lease.token, lease.token], Release::Lost).await.unwrap();
        lease = store.again("w", NOW).await;
        assert_eq!((lease.losses, lease.charged.len()), (losses, 0), "nothing says what was in flight");
    }
    // What is recorded is progress.
    assert_eq!(store.settle(&lease, &[(0, sent())]).await, Settled::Open);
    store.queue.release(&[lease.token], Release::Lost).await.unwrap();
    let lease = store.again("w", NOW).await;
    assert_eq!(lease.losses, 1);
    assert_eq!(tries(&lease), [(1, 0), (2, 0), (3, 0), (4, 0)]);
}

async fn a_lost_lease_is_due_as_it_was(store: Subject) {
    let (_, lease) = store.one_lease(1).await;
    assert_eq!(store.settle(&lease, &[(0, retry())]).await, Settled::Open);
    store.queue.release(&[lease.token], Release::Lost).await.unwrap();
    store.assert_idle(NOW).await;
    let again = store.again("w", LATER).await;
    assert_eq!((tries(&again), again.losses), (vec![(0, 1)], 1));
}

async fn b17_a_loss_charges_the_message_that_was_begun(store: Subject) {
    let (_, lease) = store.one_lease(4).await;
    let begins = |lease: &Lease, index| Settlement { begins: Some(index), ..told(lease, &[]) };
    assert_eq!(store.settle_as(begins(&lease, 2)).await, Settled::Open);
    store.queue.release(&[lease.token], Release::Lost).await.unwrap();
    let lease = store.again("w", NOW).await;
    assert_eq!(lease.charged.clone().into_iter().collect::<Vec<_>>(), [(2, (1, 1))]);
    // The commit that records one marks the next.
    let next = Settlement { begins: Some(1), ..told(&lease, &[(0, sent())]) };
    assert_eq!(store.settle_as(next).await, Settled::Open);
    assert_eq!(store.queue.release_holder("w").await, Ok(1));
    let lease = store.again("w", NOW).await;
    assert_eq!(lease.charged.clone().into_iter().collect::<Vec<_>>(), [(1, (1, 1)), (2, (1, 1))]);
    // What is recorded at last is charged no more.
    assert_eq!(store.settle(&lease, &[(2, retry_at(NOW))]).await, Settled::Open);
    store.queue.release(&[lease.token], Release::Unused).await.unwrap();
    let lease = store.again("w", NOW).await;
    assert_eq!(lease.charged.into_iter().collect::<Vec<_>>(), [(1, (1, 1))]);
}

async fn b17_what_was_recorded_or_given_back_is_not_charged(store: Subject) {
    let (_, lease) = store.one_lease(3).await;
    store.settle_as(Settlement { begins: Some(0), ..told(&lease, &[]) }).await;
    assert_eq!(store.settle(&lease, &[(0, retry_at(NOW))]).await, Settled::Open);
    store.queue.release(&[lease.token], Release::Lost).await.unwrap();
    let lease = store.again("w", NOW).await;
    assert_eq!((lease.charged.len(), lease.losses), (0, 1));
    // Marked, but never sent: the worker drains. Nor does it last beyond a lease that ends in good order.
    store.settle_as(Settlement { begins: Some(1), ..told(&lease, &[]) }).await;
    store.queue.release(&[lease.token], Release::Unused).await.unwrap();
    let lease = store.again("w", NOW).await;
    store.queue.release(&[lease.token], Release::Lost).await.unwrap();
    let lease = store.again("w", NOW).await;
    assert_eq!(lease.charged.len(), 0);
    store.settle_as(Settlement { ends: true, begins: Some(2), ..settlement(lease.token, vec![]) }).await;
    let lease = store.again("w", NOW).await;
    store.queue.release(&[lease.token], Release::Lost).await.unwrap();
    assert_eq!(store.again("w", NOW).await.charged.len(), 0);
    // A worker that was thought dead marks nothing.
    let stale = settlement(lease.token, vec![nth(1, 1, retry_at(NOW))]);
    assert_eq!(store.settle_as(Settlement { begins: Some(1), ..stale }).await, Settled::Stale);
    assert_eq!(store.queue.release_holder("w").await, Ok(1));
    assert_eq!(store.again("w", NOW).await.charged.len(), 0);
}

async fn a_gone_holder_loses_its_leases_and_no_other_s(store: Subject) {
    four_batches(&store).await;
    store.lease("w-1", "d", 9).await;
    let other = store.lease("w-2", "e", 9).await;
    assert_eq!(store.queue.release_holder("w-1").await, Ok(2));
    assert_eq!(store.queue.release_holder("w-1").await, Ok(0));
    store.dispatch(NOW).await;
    let lost = store.lease("w-3", "d", 9).await;
    assert_eq!(lost.iter().map(|lease| lease.losses).collect::<Vec<_>>(), [1, 1]);
    assert_eq!(store.queue.extend(&[other[0].token], MonoMs(9)).await.unwrap()[0].1, ItemOutcome::Ok);
}

async fn every_lease_has_a_fence_of_its_own(store: Subject) {
    let (_, mut lease) = store.one_lease(5).await;
    for _ in 0..5 {
        store.queue.release(&[lease.token], Release::Unused).await.unwrap();
        let next = store.again("w", NOW).await;
        assert!(next.token.fence > lease.token.fence);
        lease = next;
    }
}

async fn a_disabled_destination_is_held(store: Subject) {
    four_batches(&store).await;
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

/// B18: an entry is a hint, and one that is out of date brings nothing.
async fn what_the_store_has_given_away_is_not_leased_by_an_old_entry(store: Subject) {
    let Some(carried) = &store.carried else { return };
    four_batches(&store).await;
    let ids: Vec<_> = carried.due(NOW, 9).await.into_iter().map(|batch| batch.id).collect();
    assert_eq!(ids.len(), 4);
    let other = ClaimRequest {
        holder: "node-2/w#1".into(),
        batches: ids.clone(),
        until: UnixMs(NOW.0 + 1_000),
        now: NOW,
        born: UnixMs(0),
    };
    let claims = carried.claims.claim(other).await.unwrap();
    let leases: Vec<_> = claims
        .into_iter()
        .map(|(_, claim)| match claim {
            Claim::Granted(lease) => *lease,
            refused => panic!("{refused:?}"),
        })
        .collect();
    store.assert_idle(NOW).await;
    // Given back, they come again.
    let tokens: Vec<_> = leases.iter().map(|lease| lease.token).collect();
    carried.claims.release_claims(&tokens, Release::Unused).await.unwrap();
    store.dispatch(NOW).await;
    assert_eq!(store.lease("w", "d", 9).await.len(), 2);
    assert_eq!(store.lease("w", "e", 9).await.len(), 2);
}

fn by_operator() -> FileHold {
    FileHold::by_operator(NOW, "the template is wrong")
}

async fn b11_a_held_file_waits_and_its_neighbours_do_not(store: Subject) {
    four_batches(&store).await;
    let file = fixtures::file("feed", 1, &["d", "e"]);
    let hold = HoldChange::Hold(by_operator());
    assert_eq!(store.steering.change_hold(file.id, Some("d"), &hold).await, Ok(1));
    assert_eq!(store.steering.change_hold(file.id, Some("d"), &hold).await, Ok(0), "it is held already");
    assert_eq!(store.steering.change_hold(file.id, Some("unheard-of"), &hold).await, Ok(0));
    let nobody = fixtures::file("feed", 9, &["d"]).id;
    assert_eq!(store.steering.change_hold(nobody, None, &hold).await, Ok(0));

    let leases = store.lease("w", "d", 9).await;
    assert!(leases.iter().map(|lease| lease.header.file).eq([fixtures::file("feed", 2, &["d", "e"]).id]));
    assert_eq!(store.lease("w", "e", 9).await.len(), 2, "there it is not held");
    store.assert_idle(NOW).await;
    assert_eq!(store.outbox.depth().await, Ok(40), "held, not lost");
    let held = HeldFile {
        file: file.id,
        feed: "feed".into(),
        name: file.name.clone(),
        destination: "d".into(),
        hold: by_operator(),
    };
    assert_eq!(store.steering.held_files().await.unwrap(), [held]);
    let report = store.ledger.report(file.id).await.unwrap().unwrap();
    assert_eq!(report.held, [("d".to_owned(), by_operator())].into());

    assert_eq!(store.steering.change_hold(file.id, None, &HoldChange::Release).await, Ok(1), "of two");
    assert_eq!(store.steering.held_files().await.unwrap(), []);
    store.dispatch(NOW).await;
    assert_eq!(store.lease("w", "d", 9).await.len(), 1);
}

async fn b11_what_begins_before_the_held_row_goes(store: Subject) {
    let file = fixtures::file("feed", 1, &["d", "e"]);
    let canary = FileHold { since: NOW, from_row: 11, cause: HoldCause::Canary, reason: "first ten".into() };
    let mut step = fixtures::step(&file, 1..=10, NOW);
    step.hold = Some(HoldStep { destinations: vec!["d".into()], change: HoldChange::Hold(canary.clone()) });
    store.outbox.append(step).await.unwrap();
    for first in [11, 21, 31] {
        let rest = fixtures::step(&file, first..=first + 9, NOW);
        store.outbox.append(rest).await.unwrap();
    }
    assert_eq!(deliver_all(&store, "d").await, 1);
    assert_eq!(deliver_all(&store, "e").await, 4);
    store.assert_idle(NOW).await;
    // A part of them follows, then the rest.
    let ramp = FileHold { from_row: 31, cause: HoldCause::Ramp, ..canary };
    assert_eq!(store.steering.change_hold(file.id, None, &HoldChange::Judge(ramp)).await, Ok(1));
    assert_eq!(deliver_all(&store, "d").await, 2);
    assert_eq!(store.steering.change_hold(file.id, Some("d"), &HoldChange::Pass).await, Ok(1));
    assert_eq!(deliver_all(&store, "d").await, 1);
}

/// Sends whatever may be sent to a destination, in batches of ten; how many. A queue that keeps order brings one batch of
/// a file at a time.
async fn deliver_all(store: &Subject, destination: &str) -> usize {
    let all: Vec<_> = (0..10).map(|index| (index, sent())).collect();
    let mut delivered = 0;
    loop {
        store.dispatch(NOW).await;
        let leases = store.lease("w", destination, 9).await;
        if leases.is_empty() {
            return delivered;
        }
        for lease in &leases {
            store.settle(lease, &all).await;
        }
        delivered += leases.len();
    }
}

async fn b11_what_is_leased_when_its_file_is_held_can_be_settled_and_waits_then(store: Subject) {
    let (file, lease) = store.one_lease(3).await;
    let hold = HoldChange::Hold(by_operator());
    assert_eq!(store.steering.change_hold(file.id, None, &hold).await, Ok(1));
    let verdicts = [(0, sent()), (1, retry()), (2, dead())];
    assert_eq!(store.settle_and_end(&lease, &verdicts).await, Settled::Released);
    assert_eq!(store.tally(file.id).await, (3, 1, 1, 1));
    assert_eq!((store.redrive)(NOW).await, 1);
    store.assert_idle(LATER).await;
    store.steering.change_hold(file.id, None, &HoldChange::Release).await.unwrap();
    assert_eq!(store.again("w", LATER).await.due_count(LATER), 2);
}

async fn b11_a_step_that_is_repeated_holds_nothing_again(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    let mut step = fixtures::step(&file, 1..=10, NOW);
    let canary = FileHold { since: NOW, from_row: 1, cause: HoldCause::Canary, reason: "all".into() };
    step.hold = Some(HoldStep { destinations: vec!["d".into()], change: HoldChange::Hold(canary) });
    store.outbox.append(step.clone()).await.unwrap();
    store.assert_idle(NOW).await;
    store.steering.change_hold(file.id, None, &HoldChange::Release).await.unwrap();
    store.outbox.append(step).await.unwrap();
    assert_eq!(store.steering.held_files().await.unwrap(), []);
    store.dispatch(NOW).await;
    assert_eq!(store.lease("w", "d", 9).await.len(), 1);
}

async fn b11_a_cancelled_file_is_never_sent_and_balances(store: Subject) {
    let (file, lease) = store.one_lease(3).await;
    store.outbox.append(fixtures::step(&file, 4..=13, NOW)).await.unwrap();
    let cancel = HoldChange::Hold(FileHold::cancelled(NOW, "the wrong list"));
    assert_eq!(store.steering.change_hold(file.id, None, &cancel).await, Ok(1));
    assert_eq!(
        store.steering.change_hold(file.id, None, &HoldChange::Release).await,
        Ok(0),
        "it is for ever"
    );
    store.assert_idle(NOW).await;
    // What was in flight ends as it ends; what was not is given back.
    assert_eq!(store.settle_and_end(&lease, &[(0, sent()), (1, retry())]).await, Settled::Released);
    end_all(&store).await;
    assert_eq!(store.tally(file.id).await, (13, 1, 0, 0));
    assert_eq!(store.counts(file.id).await.cancelled, 12);
    assert_eq!(store.outbox.depth().await, Ok(0));
    store.assert_idle(LATER).await;
    // A row that is read later is cancelled as well; then nothing is left to hold.
    let mut last = fixtures::step(&file, 14..=14, NOW);
    last.state = FileState::Ingested;
    store.outbox.append(last).await.unwrap();
    end_all(&store).await;
    assert_eq!(store.counts(file.id).await.cancelled, 13);
    assert_eq!(store.steering.held_files().await.unwrap(), []);
    let report = store.ledger.report(file.id).await.unwrap().unwrap();
    assert!(report.is_balanced() && report.is_settled(), "{report:?}");
}

/// As a sweeper does it, until nothing is left to do.
async fn end_all(store: &Subject) -> Ended {
    let mut ended = Ended::default();
    loop {
        let step = store.steering.end_step(1, LATER).await.unwrap();
        if step.batches == 0 {
            assert_eq!(store.steering.end_step(9, LATER).await, Ok(Ended::default()));
            return ended;
        }
        ended += step;
    }
}

/// A file for `d` whose time is over at [`LATER`].
fn expiring() -> Arc<FileRecord> {
    let file = fixtures::file("feed", 1, &["d"]);
    let terms = Terms { expires_at: Some(LATER), ..Terms::default() };
    Arc::new(FileRecord { terms, ..(*file).clone() })
}

async fn b11_what_is_open_when_its_time_is_over_is_unsent_whatever_holds_it(store: Subject) {
    let file = expiring();
    store.outbox.append(fixtures::step(&file, 1..=3, NOW)).await.unwrap();
    store.dispatch(NOW).await;
    let lease = store.lease("w", "d", 9).await.pop().expect("its time is not over yet");
    assert_eq!(lease.header.terms, file.terms);
    store.outbox.append(fixtures::step(&file, 4..=13, NOW)).await.unwrap();
    let hold = HoldChange::Hold(by_operator());
    assert_eq!(store.steering.change_hold(file.id, None, &hold).await, Ok(1));
    let early = UnixMs(LATER.0 - 1);
    assert_eq!(store.steering.end_step(9, early).await, Ok(Ended::default()));
    assert_eq!(store.counts(file.id).await.unsent, 0);
    // What was in flight ends as it ends; what was not is given back.
    assert_eq!(store.settle_and_end(&lease, &[(0, sent()), (1, retry())]).await, Settled::Released);
    store.ledger.disable_destination("d", "paused", NOW).await.unwrap();
    let ended = end_all(&store).await;
    assert_eq!(ended.counts["d"], CountChange { unsent: 12, retrying: -1, ..CountChange::default() });
    assert_eq!(store.tally(file.id).await, (13, 1, 0, 0));
    assert_eq!(store.counts(file.id).await.unsent, 12);
    assert_eq!(store.outbox.depth().await, Ok(0));
    // What its receiver says late is a fact.
    assert_eq!(store.settle(&lease, &[(2, sent())]).await, Settled::Stale);
    assert_eq!((store.counts(file.id).await.sent, store.counts(file.id).await.unsent), (2, 11));
    // A row that is read later has no time either.
    let mut last = fixtures::step(&file, 14..=14, NOW);
    last.state = FileState::Ingested;
    store.outbox.append(last).await.unwrap();
    end_all(&store).await;
    let report = store.ledger.report(file.id).await.unwrap().unwrap();
    assert!(report.is_balanced() && report.is_settled(), "{report:?}");
    assert_eq!((report.file.terms, report.destinations["d"].unsent), (file.terms.clone(), 12));
    assert_eq!(store.steering.held_files().await.unwrap(), [], "there is nothing to hold any more");
}

async fn b11_what_is_redriven_when_its_time_is_over_is_unsent(store: Subject) {
    let file = expiring();
    let mut step = fixtures::step(&file, 1..=3, NOW);
    step.state = FileState::Ingested;
    store.outbox.append(step).await.unwrap();
    store.dispatch(NOW).await;
    let lease = store.lease("w", "d", 9).await.pop().expect("it is due");
    store.settle(&lease, &[(0, sent()), (1, dead()), (2, dead())]).await;
    end_all(&store).await;
    assert_eq!(store.tally(file.id).await, (3, 1, 2, 0));
    assert_eq!((store.redrive)(LATER).await, 2);
    // A sweeper does that as well.
    assert_eq!(store.ledger.settled_files("feed", 9).await.unwrap(), []);
    end_all(&store).await;
    assert_eq!(store.tally(file.id).await, (3, 1, 0, 0));
    assert_eq!(store.counts(file.id).await.unsent, 2);
}

async fn b11_a_closed_file_waits_and_its_neighbours_do_not(store: Subject) {
    let (file, lease) = store.one_lease(3).await;
    let neighbour = fixtures::file("feed", 2, &["d"]);
    store.outbox.append(fixtures::step(&neighbour, 1..=3, NOW)).await.unwrap();
    store.outbox.append(fixtures::step(&file, 4..=13, NOW)).await.unwrap();
    let (from, until) = (UnixMs(NOW.0 + 10), UnixMs(NOW.0 + 1_000));
    store.queue.release(&[lease.token], Release::Closed { from, until }).await.unwrap();
    let found = store.again("w", from).await;
    assert_eq!(found.header.file, neighbour.id);
    store.settle(&found, &[(0, sent()), (1, sent()), (2, sent())]).await;
    store.assert_idle(UnixMs(until.0 - 1)).await;
    store.dispatch(until).await;
    let opened = store.lease_at("w", "d", 1, until).await;
    assert_eq!((opened.len(), opened[0].losses), (1, 0), "it is charged nothing");
    store
        .queue
        .release(&[opened[0].token], Release::Closed { from: UnixMs(until.0 + 9), until: LATER })
        .await
        .unwrap();
    // Found by a clock that was ahead (F9).
    store.dispatch(until).await;
    assert_eq!(store.lease_at("w", "d", 1, until).await.len(), 1);
}
