use std::future::Future;

use super::{LATER, NOW, Subject, dead, fixtures, nth, retry, sent, settlement};
use crate::{
    model::{ids::BatchId, ledger::MessageVerdict, time::UnixMs},
    ports::{
        Claim, ClaimRequest, Claims, DestinationDepth, DueQuery, ItemOutcome, Lease, LeaseToken, Origin,
        Release, Settled, Settlement,
    },
};

/// The contract of claims, of a store that another queue carries for.
pub async fn claims<F: Future<Output = Subject>>(make: impl Fn() -> F) {
    a_batch_is_granted_to_one_holder(make().await).await;
    a_claim_that_ran_out_is_lost(make().await).await;
    an_extended_claim_holds_on(make().await).await;
    release_charges_only_losses(make().await).await;
    an_earlier_life_has_lost_its_claims_at_once(make().await).await;
    a_repeated_claim_charges_nothing(make().await).await;
    settled_and_missing_batches_are_told_apart(make().await).await;
    what_is_not_due_is_early_and_stays_due(make().await).await;
    a_claim_brings_what_is_recorded_and_what_it_carries(make().await).await;
    a_claimed_batch_is_not_due_until_its_claim_ends(make().await).await;
    what_is_due_is_listed_for_each_destination_oldest_first(make().await).await;
    depths_count_messages_by_where_they_stand(make().await).await;
    a_disabled_destination_is_not_claimed(make().await).await;
    a_stale_claim_settles_no_failure(make().await).await;
}

const ME: &str = "node-a-7/delivery-0#1";
const OTHER: &str = "node-b-3/delivery-0#1";
const UNTIL: UnixMs = UnixMs(NOW.0 + 1_000);

fn claims_of(store: &Subject) -> &dyn Claims {
    &*store.carried.as_ref().expect("only a store that is carried for has claims").claims
}

async fn next_due(store: &Subject) -> Option<UnixMs> {
    store.carried.as_ref().expect("it has claims").claims.next_due().await.unwrap()
}

/// Stores one batch of `rows` for `d`.
async fn stored(store: &Subject, rows: u64) -> BatchId {
    let file = fixtures::file("feed", 1, &["d"]);
    let step = fixtures::step(&file, 1..=rows, NOW);
    let id = step.batches[0].id;
    store.outbox.append(step).await.unwrap();
    id
}

async fn claim_all(store: &Subject, holder: &str, batches: Vec<BatchId>, now: UnixMs) -> Vec<Claim> {
    let until = UnixMs(now.0 + 1_000);
    let request =
        ClaimRequest { holder: holder.into(), batches: batches.clone(), until, now, born: UnixMs(0) };
    let (ids, claims): (Vec<_>, Vec<_>) = claims_of(store).claim(request).await.unwrap().into_iter().unzip();
    assert_eq!(ids, batches, "one answer per id in order");
    claims
}

async fn claim(store: &Subject, holder: &str, batch: BatchId, now: UnixMs) -> Claim {
    claim_all(store, holder, vec![batch], now).await.pop().unwrap()
}

/// The token and the losses of a claim that must be granted.
async fn granted(store: &Subject, holder: &str, batch: BatchId, now: UnixMs) -> (LeaseToken, u8) {
    let lease = granted_lease(store, holder, batch, now).await;
    (lease.token, lease.losses)
}

async fn granted_lease(store: &Subject, holder: &str, batch: BatchId, now: UnixMs) -> Lease {
    match claim(store, holder, batch, now).await {
        Claim::Granted(lease) => *lease,
        other => panic!("{holder} is not granted what it claims: {other:?}"),
    }
}

async fn settle(store: &Subject, token: LeaseToken, verdicts: Vec<MessageVerdict>) -> Settled {
    store.ledger.settle(vec![settlement(token, verdicts)]).await.unwrap()[0]
}

async fn a_batch_is_granted_to_one_holder(store: Subject) {
    let id = stored(&store, 3).await;
    let (_, losses) = granted(&store, ME, id, NOW).await;
    assert_eq!(losses, 0);
    assert_eq!(claim(&store, OTHER, id, NOW).await, Claim::Held { until: UNTIL });
    assert_eq!(claim(&store, OTHER, id, UNTIL).await, Claim::Held { until: UNTIL }, "it holds until then");
    assert_eq!(claim(&store, "node-a-7/delivery-1#1", id, NOW).await, Claim::Held { until: UNTIL });
}

async fn a_claim_that_ran_out_is_lost(store: Subject) {
    let id = stored(&store, 3).await;
    let (old, _) = granted(&store, ME, id, NOW).await;
    let after = UnixMs(UNTIL.0 + 1);
    let (new, losses) = granted(&store, OTHER, id, after).await;
    assert_eq!(losses, 1);
    assert!(new.fence > old.fence);
    // The old holder can neither extend nor release what another has now.
    let stale = claims_of(&store).extend_claims(&[old], UnixMs(u64::MAX >> 1)).await.unwrap();
    assert!(matches!(stale[0], (batch, ItemOutcome::Permanent(_)) if batch == id), "{stale:?}");
    claims_of(&store).release_claims(&[old], Release::Lost).await.unwrap();
    assert!(matches!(claim(&store, ME, id, after).await, Claim::Held { .. }));
    // One's own claim runs out too.
    let (_, losses) = granted(&store, OTHER, id, UnixMs(after.0 + 1_001)).await;
    assert_eq!(losses, 2);
}

async fn an_extended_claim_holds_on(store: Subject) {
    let id = stored(&store, 3).await;
    let (token, _) = granted(&store, ME, id, NOW).await;
    let unknown = LeaseToken { batch: BatchId([9; 16]), fence: 1 };
    let extended = claims_of(&store).extend_claims(&[unknown, token], LATER).await.unwrap();
    assert!(
        matches!(&extended[0], (batch, ItemOutcome::Permanent(_)) if *batch == unknown.batch),
        "{extended:?}"
    );
    assert_eq!(extended[1], (id, ItemOutcome::Ok));
    assert_eq!(claim(&store, OTHER, id, LATER).await, Claim::Held { until: LATER });
    // Late, but nobody else came.
    let late = claims_of(&store).extend_claims(&[token], UnixMs(LATER.0 + 500)).await.unwrap();
    assert_eq!(late, [(id, ItemOutcome::Ok)]);
    let (_, losses) = granted(&store, OTHER, id, UnixMs(LATER.0 + 501)).await;
    assert_eq!(losses, 1);
}

async fn release_charges_only_losses(store: Subject) {
    let id = stored(&store, 3).await;
    let (first, _) = granted(&store, ME, id, NOW).await;
    claims_of(&store).release_claims(&[first], Release::Unused).await.unwrap();
    let (second, losses) = granted(&store, OTHER, id, NOW).await;
    assert_eq!(losses, 0);
    assert!(second.fence > first.fence);
    claims_of(&store).release_claims(&[second, second, first], Release::Lost).await.unwrap();
    let (third, losses) = granted(&store, ME, id, NOW).await;
    assert_eq!(losses, 1);
    assert!(third.fence > second.fence);
    claims_of(&store).release_claims(&[], Release::Lost).await.unwrap();
}

async fn an_earlier_life_has_lost_its_claims_at_once(store: Subject) {
    let id = stored(&store, 3).await;
    granted(&store, "node-a-7/delivery-3#9", id, NOW).await;
    assert!(matches!(claim(&store, "node-a-6/delivery-0#1", id, NOW).await, Claim::Held { .. }));
    assert!(matches!(claim(&store, "node-b-8/delivery-0#1", id, NOW).await, Claim::Held { .. }));
    let (_, losses) = granted(&store, "node-a-8/delivery-0#1", id, NOW).await;
    assert_eq!(losses, 1);
}

async fn a_repeated_claim_charges_nothing(store: Subject) {
    let id = stored(&store, 3).await;
    let (first, _) = granted(&store, ME, id, NOW).await;
    let (again, losses) = granted(&store, ME, id, UnixMs(NOW.0 + 500)).await;
    assert_eq!(losses, 0);
    assert!(again.fence >= first.fence);
    let until = UnixMs(NOW.0 + 1_500);
    assert_eq!(claim(&store, OTHER, id, UnixMs(NOW.0 + 1_400)).await, Claim::Held { until });
    let extended = claims_of(&store).extend_claims(&[again], until).await.unwrap();
    assert_eq!(extended, [(id, ItemOutcome::Ok)]);
}

async fn settled_and_missing_batches_are_told_apart(store: Subject) {
    let file = fixtures::file("feed", 1, &["d", "e"]);
    let step = fixtures::step(&file, 1..=2, NOW);
    let ids: Vec<_> = step.batches.iter().map(|batch| batch.id).collect();
    store.outbox.append(step).await.unwrap();
    let (token, _) = granted(&store, ME, ids[0], NOW).await;
    let verdicts = vec![nth(0, 1, sent()), nth(1, 1, dead())];
    assert_eq!(settle(&store, token, verdicts).await, Settled::Complete);
    let unknown = BatchId([9; 16]);
    let claims = claim_all(&store, ME, vec![unknown, ids[0], ids[1]], NOW).await;
    assert_eq!(claims[..2], [Claim::Missing, Claim::Settled]);
    assert!(matches!(claims[2], Claim::Granted(_)));
    // Its claim has ended with it.
    let late = claims_of(&store).extend_claims(&[token], LATER).await.unwrap();
    assert!(matches!(late[0].1, ItemOutcome::Permanent(_)), "{late:?}");
    claims_of(&store).release_claims(&[token], Release::Lost).await.unwrap();
    assert_eq!(claim(&store, OTHER, ids[0], LATER).await, Claim::Settled);
    assert!(claim_all(&store, ME, vec![], NOW).await.is_empty());
}

async fn what_is_not_due_is_early_and_stays_due(store: Subject) {
    let id = stored(&store, 2).await;
    assert_eq!(claim(&store, ME, id, UnixMs(NOW.0 - 1)).await, Claim::Early { due: NOW });
    assert_eq!(next_due(&store).await, Some(NOW));
    let (token, _) = granted(&store, ME, id, NOW).await;
    settle(&store, token, vec![nth(0, 1, retry()), nth(1, 1, sent())]).await;
    claims_of(&store).release_claims(&[token], Release::Unused).await.unwrap();
    for now in [NOW, UnixMs(LATER.0 - 1)] {
        assert_eq!(claim(&store, OTHER, id, now).await, Claim::Early { due: LATER });
        assert_eq!(next_due(&store).await, Some(LATER));
    }
    let (again, losses) = granted(&store, OTHER, id, LATER).await;
    assert_eq!(losses, 0);
    assert!(again.fence > token.fence);
}

async fn a_claim_brings_what_is_recorded_and_what_it_carries(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    let step = fixtures::step(&file, 1..=4, NOW);
    let batch = step.batches[0].clone();
    store.outbox.append(step).await.unwrap();
    let first = granted_lease(&store, ME, batch.id, NOW).await;
    assert_eq!((first.count, first.open.len(), first.accepted_at), (4, 4, NOW));
    assert_eq!((&first.header, &first.payload), (&batch.header, &batch.payload));
    let verdicts = vec![nth(1, 1, sent()), nth(2, 1, dead()), nth(3, 1, retry())];
    assert_eq!(settle(&store, first.token, verdicts).await, Settled::Open);
    claims_of(&store).release_claims(&[first.token], Release::Lost).await.unwrap();
    let again = granted_lease(&store, OTHER, batch.id, NOW).await;
    assert_eq!((again.losses, again.count), (1, 4));
    let open: Vec<_> = again.open.iter().map(|open| (open.index, open.tries, open.not_before)).collect();
    assert_eq!(open, [(0, 0, NOW), (3, 1, LATER)]);
    assert_eq!((&again.header, &again.payload), (&batch.header, &batch.payload), "I4");
}

async fn a_claimed_batch_is_not_due_until_its_claim_ends(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    let step = fixtures::step(&file, 1..=3, NOW);
    let id = step.batches[0].id;
    store.outbox.append(step).await.unwrap();
    let carried = store.carried.as_ref().expect("it has claims");
    assert_eq!(next_due(&store).await, Some(NOW));
    assert_eq!(carried.due(NOW, 9).await.len(), 1);
    assert_eq!(carried.due(NOW, 9).await.len(), 1, "asking changes nothing");
    let (token, _) = granted(&store, ME, id, NOW).await;
    assert!(carried.due(NOW, 9).await.is_empty());
    claims_of(&store).release_claims(&[token], Release::Unused).await.unwrap();
    assert_eq!(carried.due(NOW, 9).await.len(), 1, "given back");
    let (token, _) = granted(&store, ME, id, NOW).await;
    claims_of(&store).release_claims(&[token], Release::Lost).await.unwrap();
    assert_eq!(carried.due(NOW, 9).await.len(), 1, "lost");
    let (token, _) = granted(&store, ME, id, NOW).await;
    let ends = Settlement {
        ends: true,
        ..settlement(token, vec![nth(0, 1, retry()), nth(1, 1, sent()), nth(2, 1, dead())])
    };
    assert_eq!(store.ledger.settle(vec![ends]).await, Ok(vec![Settled::Released]));
    assert_eq!(next_due(&store).await, Some(LATER), "to be tried again");
    assert!(carried.due(UnixMs(LATER.0 - 1), 9).await.is_empty());
    let batch = carried.due(LATER, 9).await.pop().unwrap();
    assert_eq!((batch.id, batch.due, &*batch.destination), (id, LATER, "d"));
    let (token, _) = granted(&store, ME, id, LATER).await;
    assert_eq!(settle(&store, token, vec![nth(0, 2, sent())]).await, Settled::Complete);
    assert_eq!(next_due(&store).await, None);
    let then = UnixMs(LATER.0 + 7);
    assert_eq!((store.redrive)(then).await, 1);
    assert_eq!(next_due(&store).await, Some(then), "redriven");
}

async fn what_is_due_is_listed_for_each_destination_oldest_first(store: Subject) {
    let file = fixtures::file("feed", 1, &["d", "e"]);
    for (first, due) in [(1, 300), (11, 100), (21, 200), (31, 100)] {
        store.outbox.append(fixtures::step(&file, first..=first + 9, UnixMs(due))).await.unwrap();
    }
    let carried = store.carried.as_ref().expect("it has claims");
    let dues = async |now, limit| {
        let due = carried.due(UnixMs(now), limit).await;
        assert!(due.iter().all(|batch| batch.origin == Origin::Fresh && batch.open == 10));
        let of = |name: &str| -> Vec<u64> {
            due.iter().filter(|batch| &*batch.destination == name).map(|batch| batch.due.0).collect()
        };
        assert_eq!(of("d"), of("e"));
        of("d")
    };
    assert_eq!(next_due(&store).await, Some(UnixMs(100)));
    assert_eq!(dues(99, 10).await, [0; 0]);
    assert_eq!(dues(200, 10).await, [100, 100, 200]);
    assert_eq!(dues(999, 2).await, [100, 100]);
    // Nothing that was not asked for, however old.
    let wants = [("e".into(), 1)];
    let query = DueQuery { process: super::PROCESS, due_by: UnixMs(999), wants: &wants, confirm: &[] };
    let due = claims_of(&store).due(query).await.unwrap();
    assert_eq!(due.iter().map(|batch| &*batch.destination).collect::<Vec<_>>(), ["e"]);
    let query = DueQuery { process: super::PROCESS, due_by: UnixMs(999), wants: &[], confirm: &[] };
    assert_eq!(claims_of(&store).due(query).await, Ok(Vec::new()));
    let lanes: std::collections::BTreeSet<_> =
        carried.due(UnixMs(999), 9).await.iter().map(|batch| batch.lane).collect();
    assert_eq!(lanes.len(), 1, "one file");
}

/// B21.
async fn depths_count_messages_by_where_they_stand(store: Subject) {
    assert_eq!(claims_of(&store).depths(NOW).await, Ok(Vec::new()));
    let file = fixtures::file("feed", 1, &["d"]);
    for (first, due) in [(1, NOW), (11, NOW), (21, LATER)] {
        store.outbox.append(fixtures::step(&file, first..=first + 9, due)).await.unwrap();
    }
    let carried = store.carried.as_ref().expect("it has claims");
    let id = carried.due(NOW, 1).await[0].id;
    let depth = |due, waiting, leased| DestinationDepth { destination: "d".into(), due, waiting, leased };
    assert_eq!(claims_of(&store).depths(NOW).await, Ok(vec![depth(20, 10, 0)]));
    let (token, _) = granted(&store, ME, id, NOW).await;
    settle(&store, token, vec![nth(0, 1, sent())]).await;
    for (now, waiting) in [(NOW, 10), (LATER, 0)] {
        let depths = claims_of(&store).depths(now).await.unwrap();
        // What was recorded under a claim may be counted until it ends.
        let leased = depths[0].leased;
        assert!(leased == 9 || leased == 10, "{depths:?}");
        assert_eq!(depths, [depth(20 - waiting, waiting, leased)]);
    }
}

async fn a_disabled_destination_is_not_claimed(store: Subject) {
    let id = stored(&store, 3).await;
    store.ledger.disable_destination("d", "410 Gone", NOW).await.unwrap();
    let refused = claim(&store, ME, id, NOW).await;
    assert!(matches!(refused, Claim::Unavailable(_)), "{refused:?}");
    (store.enable)("d");
    let (_, losses) = granted(&store, ME, id, NOW).await;
    assert_eq!(losses, 0);
}

async fn a_stale_claim_settles_no_failure(store: Subject) {
    let id = stored(&store, 3).await;
    let (old, _) = granted(&store, ME, id, NOW).await;
    let (new, _) = granted(&store, OTHER, id, LATER).await;
    let verdicts = vec![nth(0, 1, sent()), nth(1, 1, dead())];
    assert_eq!(settle(&store, old, verdicts).await, Settled::Stale);
    assert_eq!(store.outbox.depth().await, Ok(2), "the 2xx is a fact, the failure is not");
    let verdicts = vec![nth(1, 1, sent()), nth(2, 1, sent())];
    assert_eq!(settle(&store, new, verdicts).await, Settled::Complete);
    assert_eq!(store.outbox.depth().await, Ok(0));
}
