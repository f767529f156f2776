use std::future::Future;

use super::{LATER, NOW, Subject, dead, fixtures, sent};
use crate::{
    model::{ids::BatchId, time::UnixMs},
    ports::{Claim, ClaimRequest, ItemOutcome, LeaseToken, Release, Settled, Settlement},
};

/// The contract of claims.
pub async fn claims<F: Future<Output = Subject>>(make: impl Fn() -> F) {
    a_batch_is_granted_to_one_holder(make().await).await;
    a_claim_that_ran_out_is_lost(make().await).await;
    an_extended_claim_holds_on(make().await).await;
    release_charges_only_losses(make().await).await;
    an_earlier_life_has_lost_its_claims_at_once(make().await).await;
    a_repeated_claim_charges_nothing(make().await).await;
    settled_and_missing_batches_are_told_apart(make().await).await;
    a_claim_brings_what_is_recorded(make().await).await;
    a_claimed_batch_is_dispatched(make().await).await;
    a_disabled_destination_is_not_claimed(make().await).await;
    a_stale_claim_settles_no_failure(make().await).await;
}

const ME: &str = "node-a-7/delivery-0#1";
const OTHER: &str = "node-b-3/delivery-0#1";
const UNTIL: UnixMs = UnixMs(NOW.0 + 1_000);

/// Stores and dispatches one batch of `rows` for `d`.
async fn stored(store: &Subject, rows: u64) -> BatchId {
    let file = fixtures::file("feed", 1, &["d"]);
    let step = fixtures::step(&file, 1..=rows, NOW);
    let id = step.batches[0].id;
    store.outbox.append(step).await.unwrap();
    store.dispatch(NOW).await;
    id
}

async fn claim_all(store: &Subject, holder: &str, batches: Vec<BatchId>, now: UnixMs) -> Vec<Claim> {
    let until = UnixMs(now.0 + 1_000);
    let request = ClaimRequest { holder: holder.into(), batches: batches.clone(), until, now };
    let (ids, claims): (Vec<_>, Vec<_>) = store.claims.claim(request).await.unwrap().into_iter().unzip();
    assert_eq!(ids, batches, "one answer per id in order");
    claims
}

async fn claim(store: &Subject, holder: &str, batch: BatchId, now: UnixMs) -> Claim {
    claim_all(store, holder, vec![batch], now).await.pop().unwrap()
}

/// The token and the losses of a claim that must be granted.
async fn granted(store: &Subject, holder: &str, batch: BatchId, now: UnixMs) -> (LeaseToken, u32) {
    match claim(store, holder, batch, now).await {
        Claim::Granted { fence, losses, .. } => (LeaseToken { batch, fence }, losses),
        other => panic!("{holder} is not granted what it claims: {other:?}"),
    }
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
    let stale = store.claims.extend_claims(&[old], UnixMs(u64::MAX >> 1)).await.unwrap();
    assert!(matches!(stale[0], (batch, ItemOutcome::Permanent(_)) if batch == id), "{stale:?}");
    store.claims.release_claims(&[old], Release::Lost).await.unwrap();
    assert!(matches!(claim(&store, ME, id, after).await, Claim::Held { .. }));
    // One's own claim runs out too.
    let (_, losses) = granted(&store, OTHER, id, UnixMs(after.0 + 1_001)).await;
    assert_eq!(losses, 2);
}

async fn an_extended_claim_holds_on(store: Subject) {
    let id = stored(&store, 3).await;
    let (token, _) = granted(&store, ME, id, NOW).await;
    let unknown = LeaseToken { batch: BatchId([9; 16]), fence: 1 };
    let extended = store.claims.extend_claims(&[unknown, token], LATER).await.unwrap();
    assert!(
        matches!(&extended[0], (batch, ItemOutcome::Permanent(_)) if *batch == unknown.batch),
        "{extended:?}"
    );
    assert_eq!(extended[1], (id, ItemOutcome::Ok));
    assert_eq!(claim(&store, OTHER, id, LATER).await, Claim::Held { until: LATER });
    // Late, but nobody else came.
    let late = store.claims.extend_claims(&[token], UnixMs(LATER.0 + 500)).await.unwrap();
    assert_eq!(late, [(id, ItemOutcome::Ok)]);
    let (_, losses) = granted(&store, OTHER, id, UnixMs(LATER.0 + 501)).await;
    assert_eq!(losses, 1);
}

async fn release_charges_only_losses(store: Subject) {
    let id = stored(&store, 3).await;
    let (first, _) = granted(&store, ME, id, NOW).await;
    store.claims.release_claims(&[first], Release::Unused).await.unwrap();
    let (second, losses) = granted(&store, OTHER, id, NOW).await;
    assert_eq!(losses, 0);
    assert!(second.fence > first.fence);
    store.claims.release_claims(&[second, second, first], Release::Lost).await.unwrap();
    let (third, losses) = granted(&store, ME, id, NOW).await;
    assert_eq!(losses, 1);
    assert!(third.fence > second.fence);
    store.claims.release_claims(&[], Release::Lost).await.unwrap();
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
    let extended = store.claims.extend_claims(&[again], until).await.unwrap();
    assert_eq!(extended, [(id, ItemOutcome::Ok)]);
}

async fn settled_and_missing_batches_are_told_apart(store: Subject) {
    let file = fixtures::file("feed", 1, &["d", "e"]);
    let step = fixtures::step(&file, 1..=2, NOW);
    let ids: Vec<_> = step.batches.iter().map(|batch| batch.id).collect();
    store.outbox.append(step).await.unwrap();
    store.dispatch(NOW).await;
    let (token, _) = granted(&store, ME, ids[0], NOW).await;
    let settlement =
        Settlement { token, verdicts: vec![(0, sent()), (1, dead())], retries: vec![], records: Vec::new() };
    assert_eq!(store.ledger.settle(vec![settlement]).await.unwrap(), [Settled::Complete]);
    let unknown = BatchId([9; 16]);
    let claims = claim_all(&store, ME, vec![unknown, ids[0], ids[1]], NOW).await;
    assert_eq!(claims[..2], [Claim::Missing, Claim::Settled]);
    assert!(matches!(claims[2], Claim::Granted { .. }));
    // Its claim has ended with it.
    let late = store.claims.extend_claims(&[token], LATER).await.unwrap();
    assert!(matches!(late[0].1, ItemOutcome::Permanent(_)), "{late:?}");
    store.claims.release_claims(&[token], Release::Lost).await.unwrap();
    assert_eq!(claim(&store, OTHER, ids[0], LATER).await, Claim::Settled);
    assert!(claim_all(&store, ME, vec![], NOW).await.is_empty());
}

async fn a_claim_brings_what_is_recorded(store: Subject) {
    let id = stored(&store, 4).await;
    let (token, _) = granted(&store, ME, id, NOW).await;
    let settlement =
        Settlement { token, verdicts: vec![(1, sent()), (2, dead())], retries: vec![], records: Vec::new() };
    assert_eq!(store.ledger.settle(vec![settlement]).await.unwrap(), [Settled::Open]);
    store.claims.release_claims(&[token], Release::Lost).await.unwrap();
    match claim(&store, OTHER, id, NOW).await {
        Claim::Granted { losses, states, .. } => {
            assert_eq!(losses, 1);
            assert_eq!(states.0.len(), 4);
            assert_eq!(states.unsettled().collect::<Vec<_>>(), [0, 3]);
        }
        other => panic!("{other:?}"),
    }
}

/// A queue may deliver before its acceptance is recorded.
async fn a_claimed_batch_is_dispatched(store: Subject) {
    let file = fixtures::file("feed", 1, &["d"]);
    let step = fixtures::step(&file, 1..=3, NOW);
    let id = step.batches[0].id;
    store.outbox.append(step).await.unwrap();
    let (token, _) = granted(&store, ME, id, NOW).await;
    assert_eq!(store.outbox.next_due().await, Ok(None));
    assert_eq!(store.outbox.mark_dispatched(&[id]).await, Ok(vec![(id, ItemOutcome::Ok)]));
    assert!(
        matches!(claim(&store, OTHER, id, NOW).await, Claim::Held { .. }),
        "marking it takes no claim away"
    );
    store.claims.release_claims(&[token], Release::Unused).await.unwrap();
    assert_eq!(store.outbox.next_due().await, Ok(None), "the queue has it, nothing is to be dispatched");
    granted(&store, OTHER, id, NOW).await;
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
    let settle = async |token, verdicts| {
        store
            .ledger
            .settle(vec![Settlement { token, verdicts, retries: vec![], records: Vec::new() }])
            .await
            .unwrap()[0]
    };
    assert_eq!(settle(old, vec![(0, sent()), (1, dead())]).await, Settled::Stale);
    match store.outbox.depth().await {
        Ok(depth) => assert_eq!(depth, 2, "the 2xx is a fact, the failure is not"),
        Err(error) => panic!("{error}"),
    }
    assert_eq!(settle(new, vec![(1, sent()), (2, sent())]).await, Settled::Complete);
    assert_eq!(store.outbox.depth().await, Ok(0));
}
