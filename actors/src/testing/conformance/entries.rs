use std::future::Future;

use super::{LATER, NOW, Subject, fixtures};
use crate::{
    model::time::UnixMs,
    ports::{Append, Appended, EntryId},
};

/// The contract about entries of inbound queues: each is taken once.
pub async fn entries<F: Future<Output = Subject>>(make: impl Fn() -> F) {
    an_entry_is_taken_once_and_its_step_all_or_nothing(make().await).await;
    a_repeated_step_is_stored_and_not_known(make().await).await;
    entries_are_told_apart_by_feed_and_id(make().await).await;
    entries_are_found_whenever_they_were_sent_and_however_many_there_are(make().await).await;
    old_entries_are_forgotten_in_steps(make().await).await;
}

fn entry(id: &str) -> EntryId {
    EntryId { feed: "feed".into(), id: id.into(), sent_at: NOW }
}

/// The step of a file of its own that brings one row per entry.
fn step(content: u8, entries: &[EntryId]) -> Append {
    let file = fixtures::file("feed", content, &["d"]);
    let mut step = fixtures::step(&file, 1..=entries.len() as u64, NOW);
    step.entries = entries.to_vec();
    step
}

async fn an_entry_is_taken_once_and_its_step_all_or_nothing(store: Subject) {
    let [a, b, c] = ["a", "b", "c"].map(entry);
    assert_eq!(store.outbox.known_entries(std::slice::from_ref(&a)).await, Ok(vec![]));
    let first = step(1, &[a.clone(), b.clone()]);
    assert_eq!(store.outbox.append(first).await, Ok(Appended::Stored));
    // `b` came again, in company of a new one.
    let second = step(2, &[b.clone(), c.clone()]);
    let file = second.file.id;
    assert_eq!(store.outbox.append(second).await, Ok(Appended::Known(vec![b.clone()])));
    assert_eq!(store.outbox.depth().await, Ok(2));
    let lease = store.again("w", LATER).await;
    assert_eq!(lease.header.file, step(1, &[]).file.id, "no batch of the refused step is there");
    assert_eq!(store.ledger.report(file).await.unwrap(), None);
    let known = store.outbox.known_entries(&[c.clone(), b.clone(), a.clone()]).await;
    assert_eq!(known, Ok(vec![b, a]), "in the order asked, and not the one that was refused with its step");
    assert_eq!(store.outbox.append(step(2, &[c])).await, Ok(Appended::Stored));
    assert_eq!(store.outbox.depth().await, Ok(3));
}

/// Its first answer was lost: the entries are known, but by this very step.
async fn a_repeated_step_is_stored_and_not_known(store: Subject) {
    let step = step(1, &[entry("a"), entry("b")]);
    for _ in 0..2 {
        assert_eq!(store.outbox.append(step.clone()).await, Ok(Appended::Stored));
        assert_eq!(store.tally(step.file.id).await, (2, 0, 0, 0));
    }
    assert_eq!(store.again("w", NOW).await.count, 2);
}

async fn entries_are_told_apart_by_feed_and_id(store: Subject) {
    let of = |feed: &str, id: &str| EntryId { feed: feed.into(), id: id.into(), sent_at: NOW };
    store.outbox.append(step(1, &[of("feed", "a")])).await.unwrap();
    let longest = "x".repeat(128);
    let asked = [of("other", "a"), of("feed", "A"), of("feed", "a"), of("feed", ""), of("feed", &longest)];
    assert_eq!(store.outbox.known_entries(&asked).await, Ok(vec![of("feed", "a")]));
    let file = fixtures::file("other", 1, &["d"]);
    let mut other = fixtures::step(&file, 1..=1, NOW);
    other.entries = vec![of("other", "a"), of("feed", &longest)];
    assert_eq!(store.outbox.append(other).await, Ok(Appended::Stored));
    assert_eq!(store.outbox.known_entries(&asked[4..]).await, Ok(vec![of("feed", &longest)]));
}

async fn entries_are_found_whenever_they_were_sent_and_however_many_there_are(store: Subject) {
    let limit = store.outbox.append_limits().entry_minutes.min(20) as u64;
    let sent = |minute: u64, number: u64| EntryId {
        sent_at: UnixMs(NOW.0 + minute * 60_000),
        ..entry(&number.to_string())
    };
    let mut all = Vec::new();
    // Few at a time, then many, then in every minute.
    for (content, (minutes, count)) in
        [(1, 40), (1, 5), (2, 120), (limit, 60), (1, 300), (limit, 3)].into_iter().enumerate()
    {
        let first = all.len() as u64;
        let step_entries: Vec<_> =
            (first..first + count).map(|number| sent(number % minutes, number)).collect();
        assert_eq!(store.outbox.append(step(content as u8, &step_entries)).await, Ok(Appended::Stored));
        all.extend(step_entries);
    }
    assert_eq!(store.outbox.known_entries(&all).await, Ok(all.clone()));
    for again in all.iter().step_by(50) {
        let fresh = sent(0, 1_000_000);
        let refused = store.outbox.append(step(99, &[fresh.clone(), again.clone()])).await;
        assert_eq!(refused, Ok(Appended::Known(vec![again.clone()])));
        assert_eq!(store.outbox.known_entries(&[fresh]).await, Ok(vec![]));
    }
}

async fn old_entries_are_forgotten_in_steps(store: Subject) {
    let old: Vec<_> = (0..5).map(|number| entry(&number.to_string())).collect();
    store.outbox.append(step(1, &old)).await.unwrap();
    assert_eq!(store.archive.forget_entries(NOW, 9).await, Ok(0), "not older than that");
    assert_eq!(store.outbox.known_entries(&old).await.unwrap().len(), 5);
    let before = UnixMs(NOW.0 + 1);
    let forgotten = store.archive.forget_entries(before, 3).await.unwrap();
    // A store may let them expire by itself instead.
    if forgotten > 0 {
        assert_eq!(forgotten, 3);
        assert_eq!(store.outbox.known_entries(&old).await.unwrap().len(), 2);
        assert_eq!(store.archive.forget_entries(before, 3).await, Ok(2));
        assert_eq!(store.archive.forget_entries(before, 3).await, Ok(0));
        assert_eq!(store.outbox.known_entries(&old).await, Ok(vec![]));
    }
}
