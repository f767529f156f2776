//! What the service does that its users would rather it did not (F47), seen through the fault proxy.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use aws_sdk_dynamodb::types::AttributeValue;
use postrider_actors::ports::console::{DeadFilter, FileSelector, Position, View as _};
use postrider_actors::{
    model::{
        file::FileState,
        ids::BatchId,
        ledger::{Evidence, MessageVerdict},
        outcome::{DeathCause, Verdict},
        time::UnixMs,
    },
    ports::{
        Appended, Archive as _, Claim, ClaimRequest, Claims as _, DueQuery, EntryId, Fetched, LeaseToken,
        Ledger as _, Outbox as _, OutboxPages as _, Release, Settled, Settlement, StoreError,
    },
    testing::{FakeClock, conformance, figure, fixtures},
};
use postrider_aws::dynamodb::{Console, DynamoSettings, DynamoStore, SCHEMA_VERSION, check, migrate};

use super::{
    client,
    cloud::{Fault, FaultProxy, Rule, Server},
    make_on, settings,
};

pub(crate) const NOW: UnixMs = UnixMs(1_700_000_000_000);
pub(crate) const LATER: UnixMs = UnixMs(NOW.0 + 60_000);

pub(crate) async fn open(endpoint: &str, settings: &DynamoSettings, clock: &Arc<FakeClock>) -> DynamoStore {
    DynamoStore::open(&client(endpoint), settings.clone(), clock.clone(), Arc::new(())).await.unwrap()
}

pub(crate) fn clock() -> Arc<FakeClock> {
    Arc::new(FakeClock::at(NOW))
}

/// What is due by `LATER` for `d` and `e`, but for `except`, up to `limit` of each.
pub(crate) async fn due(store: &DynamoStore, limit: usize, except: &[Arc<str>]) -> Vec<BatchId> {
    let wants = ["d", "e"].map(|name| (Arc::from(name), limit));
    let wants: Vec<_> = wants.into_iter().filter(|(name, _)| !except.contains(name)).collect();
    let query = DueQuery { process: store.process(), due_by: LATER, wants: &wants, confirm: &[] };
    store.due(query).await.unwrap().into_iter().map(|batch| batch.id).collect()
}

pub(crate) async fn claim(store: &DynamoStore, holder: &str, batches: Vec<BatchId>) -> Vec<Claim> {
    let request = ClaimRequest { holder: holder.into(), batches, until: LATER, now: NOW, born: NOW };
    store.claim(request).await.unwrap().into_iter().map(|(_, claim)| claim).collect()
}

pub(crate) async fn granted(store: &DynamoStore, batch: BatchId) -> LeaseToken {
    match claim(store, "node-7/w#1", vec![batch]).await.pop() {
        Some(Claim::Granted(lease)) => lease.token,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn calls_of(proxy: &FaultProxy) -> u64 {
    proxy.counts().values().map(|count| count.calls).sum()
}

pub(crate) fn sent() -> Verdict {
    Verdict::Sent { at: NOW, status: 200 }
}

pub(crate) fn dead() -> Verdict {
    Verdict::Dead { attempt: fixtures::failed(NOW), cause: DeathCause::Permanent }
}

fn retry() -> Verdict {
    Verdict::Retry { attempt: fixtures::failed(NOW), not_before: LATER }
}

/// A verdict on the first attempt of a message.
pub(crate) fn first(index: u32, verdict: Verdict) -> MessageVerdict {
    MessageVerdict { index, drive: 0, attempt: 1, verdict }
}

pub(crate) fn all(count: u32, verdict: Verdict) -> Vec<MessageVerdict> {
    (0..count).map(|index| first(index, verdict)).collect()
}

pub(crate) fn settlement(token: LeaseToken, verdicts: Vec<MessageVerdict>) -> Settlement {
    Settlement { token, verdicts, details: BTreeMap::new(), records: Vec::new(), ends: false, begins: None }
}

/// The same, and the lease ends with it.
fn last(token: LeaseToken, verdicts: Vec<MessageVerdict>) -> Settlement {
    Settlement { ends: true, ..settlement(token, verdicts) }
}

/// Half of all items are unprocessed, statements fail, transactions conflict, calls are throttled and
/// answers are lost: the store answers as ever.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn f47_random_histories_under_partial_failures() {
    let server = Server::dynamodb();
    let proxy = FaultProxy::start(server.endpoint());
    let subject = async |seed| {
        proxy.clear_faults();
        let subject = make_on(proxy.endpoint(), seed).await;
        proxy.inject(Rule::on("BatchGetItem", Fault::Unprocessed { share: 0.5 }));
        proxy.inject(Rule::on("BatchWriteItem", Fault::Unprocessed { share: 0.5 }));
        let throttled = Fault::FailStatements { statements: 12, code: "ThrottlingError" };
        proxy.inject(Rule::on("BatchExecuteStatement", throttled).with_probability(0.5, seed));
        proxy.inject(
            Rule::on("TransactWriteItems", Fault::ConflictTransaction).with_probability(0.2, seed + 1),
        );
        for (nth, operation) in
            ["TransactWriteItems", "UpdateItem", "BatchExecuteStatement"].into_iter().enumerate()
        {
            let lost = Fault::Close { forward: true };
            proxy.inject(Rule::on(operation, lost).with_probability(0.1, seed + 2 + nth as u64));
        }
        for (nth, operation) in ["Query", "GetItem", "UpdateItem", "Scan"].into_iter().enumerate() {
            let slow = Fault::throughput_exceeded();
            proxy.inject(Rule::on(operation, slow).with_probability(0.1, seed + 9 + nth as u64));
        }
        subject
    };
    for seed in 0..4 {
        conformance::history(subject(seed).await, seed).await;
    }
    // A history makes too few single updates for one of them to fail in every run.
    for operation in ["BatchGetItem", "BatchExecuteStatement", "TransactWriteItems"] {
        assert!(proxy.injected(operation) > 0, "nothing happened to {operation}");
    }
    let injected: u64 = ["BatchGetItem", "BatchWriteItem", "BatchExecuteStatement", "TransactWriteItems"]
        .iter()
        .map(|operation| proxy.injected(operation))
        .sum();
    figure(format!(
        "4 random histories, {injected} injected failures: the same state as a store that never fails"
    ));
}

/// A batch that the index still lists is not dispatched again: its record says how it stands.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn f47_a_stale_index_does_no_harm() {
    let (server, copy) = (Server::dynamodb(), Server::dynamodb());
    let proxy = FaultProxy::with_stale_copy(server.endpoint(), copy.endpoint(), Duration::ZERO);
    let (settings, clock) = (settings(), clock());
    migrate(&client(proxy.endpoint()), &settings).await.unwrap();
    let ours = open(proxy.endpoint(), &settings, &clock).await;
    let file = fixtures::file("feed", 1, &["d", "e"]);
    let mut step = fixtures::step(&file, 1..=3, NOW);
    step.state = FileState::Ingested;
    let [claimed, waiting] = [0, 1].map(|index| step.batches[index].id);
    ours.append(step).await.unwrap();
    // Until the copy has it.
    while ours.count_outstanding().await.unwrap() < 2 {}
    tokio::time::sleep(Duration::from_millis(300)).await;
    proxy.freeze_copy(true);
    proxy.inject(Rule::on("Query", Fault::Stale));
    let token = granted(&ours, claimed).await;
    granted(&ours, waiting).await;
    let settlement = settlement(token, all(3, sent()));
    assert_eq!(ours.settle(vec![settlement]).await.unwrap(), [Settled::Complete]);

    let other = DynamoSettings { process: "other-1".into(), ..settings.clone() };
    let other = open(proxy.endpoint(), &other, &clock).await;
    clock.advance(Duration::from_secs(1));
    assert_eq!(due(&other, 9, &[]).await, []);
    assert!(proxy.injected("Query") > 0);
    assert_eq!(claim(&other, "other-1/w#1", vec![claimed]).await, [Claim::Settled]);
    let report = other.report(file.id).await.unwrap().unwrap();
    assert_eq!((report.destinations["d"].sent, report.destinations["e"].pending()), (3, 3));
    figure("an index that still lists 2 batches that are taken: none is dispatched again");
}

/// What could not be read is not taken for missing.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn s3_4_unprocessed_keys_are_asked_for_again_and_told_from_missing_ones() {
    let server = Server::dynamodb();
    let proxy = FaultProxy::start(server.endpoint());
    let settings = settings();
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let appender = open(server.endpoint(), &settings, &clock()).await;
    let file = fixtures::file("feed", 1, &["d"]);
    let mut ids = Vec::new();
    for row in 1..=60 {
        let step = fixtures::step(&file, row..=row, NOW);
        ids.push(step.batches[0].id);
        appender.append(step).await.unwrap();
    }
    let store = open(proxy.endpoint(), &settings, &clock()).await;
    ids.extend((0..60).map(|number| BatchId([number; 16])));
    proxy.inject(Rule::on("BatchGetItem", Fault::Unprocessed { share: 0.5 }));
    let fetched = store.get(&ids).await.unwrap();
    assert!(proxy.injected("BatchGetItem") > 2);
    assert!(fetched.iter().map(|(id, _)| id).eq(&ids), "one answer per id in order");
    assert!(fetched[..60].iter().all(|(_, fetched)| matches!(fetched, Fetched::Batch(_))));
    assert!(fetched[60..].iter().all(|(_, fetched)| *fetched == Fetched::Missing));

    // The records are read, half of what they carry, and then no more.
    let store = open(proxy.endpoint(), &settings, &clock()).await;
    proxy.clear_faults();
    proxy.inject(Rule::on("BatchGetItem", Fault::Unprocessed { share: 0.5 }).skip(1).next(1));
    proxy.inject(Rule::on("BatchGetItem", Fault::throttled()).skip(2));
    let fetched = store.get(&ids[..60]).await.unwrap();
    let unprocessed = fetched.iter().filter(|(_, fetched)| *fetched == Fetched::Unprocessed).count();
    assert!((20..=40).contains(&unprocessed), "{unprocessed}");
    assert!(!fetched.iter().any(|(_, fetched)| *fetched == Fetched::Missing));
}

/// S3.6 and the rule that one destination's trouble never starves another.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn a_destination_that_can_t_be_sent_to_does_not_starve_another() {
    let server = Server::dynamodb();
    let settings = DynamoSettings { page_size: 2, ..settings() };
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let clock = clock();
    let gone = open(server.endpoint(), &settings, &clock).await;
    let held = fixtures::file("feed", 1, &["d"]);
    for row in 1..=60 {
        gone.append(fixtures::step(&held, row..=row, NOW)).await.unwrap();
    }
    let free = fixtures::file("feed", 2, &["e"]);
    gone.append(fixtures::step(&free, 1..=1, NOW)).await.unwrap();
    let other = DynamoSettings { process: "other-1".into(), ..settings.clone() };
    let store = open(server.endpoint(), &other, &clock).await;
    // A sweep takes two of each shard: what it has taken stands in nobody's way.
    let mut sweeps = 0;
    while due(&store, 9, &["d".into()]).await != [fixtures::step(&free, 1..=1, NOW).batches[0].id] {
        sweeps += 1;
        assert!(sweeps < 32, "it is never found");
        clock.advance(settings.sweep_interval);
    }
}

/// Another process's batches are left to it, unless it is gone for good or too long.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn what_another_process_left_is_taken_over_by_one_and_at_once_after_a_restart() {
    let server = Server::dynamodb();
    let settings = DynamoSettings { store_time: false, ..DynamoSettings::new(settings().keys, "node-7") };
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let clock = clock();
    let of = async |process: &str| {
        let settings = DynamoSettings { process: process.into(), ..settings.clone() };
        open(server.endpoint(), &settings, &clock).await
    };
    let gone = of("node-7").await;
    let file = fixtures::file("feed", 1, &["d"]);
    let [step, held] = [fixtures::step(&file, 1..=3, NOW), fixtures::step(&file, 4..=6, NOW)];
    let ids = [step.batches[0].id, held.batches[0].id];
    gone.append(step).await.unwrap();
    gone.append(held).await.unwrap();
    granted(&gone, ids[1]).await;
    drop(gone);
    let next_life = of("node-8").await;
    let found: BTreeSet<_> = due(&next_life, 9, &[]).await.into_iter().collect();
    assert_eq!(found, BTreeSet::from(ids), "what it had, and what it had not sent");
    let (one, two) = (of("other-1").await, of("another-1").await);
    // It lives and keeps what nobody has claimed.
    for _ in 0..30 {
        assert_eq!((due(&one, 9, &[]).await, due(&two, 9, &[]).await), (vec![], vec![]));
        assert_eq!(due(&next_life, 9, &[]).await.len(), 2);
        clock.advance(settings.sweep_interval);
    }
    drop(next_life);
    clock.advance(Duration::from_mins(3));
    let taken = [due(&one, 9, &[]).await, due(&two, 9, &[]).await];
    assert_eq!(taken.concat().len(), 2, "each by one of them: {taken:?}");
    assert_eq!(claim(&two, "another-1/w#1", vec![ids[0]]).await.len(), 1);
    clock.advance(Duration::from_mins(3));
    let taken = [due(&one, 9, &[]).await, due(&two, 9, &[]).await];
    assert!(taken.concat().contains(&ids[1]), "nobody has it: {taken:?}");
}

/// A worker that settles many batches at once: more actions than a transaction takes.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn a_call_that_is_too_large_is_recorded_in_parts() {
    let server = Server::dynamodb();
    let settings = settings();
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let store = open(server.endpoint(), &settings, &clock()).await;
    let file = fixtures::file("feed", 1, &["d"]);
    let mut tokens = Vec::new();
    for nth in 0..60 {
        let step = fixtures::step(&file, nth * 4 + 1..=nth * 4 + 4, NOW);
        let id = step.batches[0].id;
        store.append(step).await.unwrap();
        tokens.push(granted(&store, id).await);
    }
    assert_eq!(due(&store, 9, &[]).await, [], "what is claimed is dispatched");
    let verdicts = vec![first(0, sent()), first(1, dead()), first(2, dead()), first(3, retry())];
    let mut settlements: Vec<_> = tokens.iter().map(|token| last(*token, verdicts.clone())).collect();
    let mut refused = settlements.clone();
    refused[59].verdicts.push(first(4, sent()));
    assert!(store.settle(refused).await.is_err(), "there is no such message");
    assert_eq!(store.depth().await, Ok(240), "all or nothing");
    settlements.push(settlement(LeaseToken { batch: BatchId([9; 16]), fence: 1 }, vec![first(0, sent())]));
    let mut expected = vec![Settled::Released; 60];
    expected.push(Settled::Stale);
    assert_eq!(store.settle(settlements.clone()).await.unwrap(), expected);
    assert_eq!(store.settle(settlements).await.unwrap(), [Settled::Stale; 61], "a repetition");
    let counts = store.report(file.id).await.unwrap().unwrap().destinations["d"];
    assert_eq!((counts.sent, counts.dead, counts.retrying), (60, 120, 60));
    assert_eq!(store.depth().await, Ok(60));
    assert_eq!(due(&store, 200, &[]).await.len(), 60);
    let letters = store.dead_letters(&DeadFilter::default(), &Position::default(), 200).await.unwrap();
    assert_eq!((letters.len(), letters[0].row, letters[0].attempts), (120, 2, 1));
    let place = &letters[6].position;
    assert_eq!(store.dead_letters(&DeadFilter::default(), place, 200).await.unwrap(), letters[7..]);
    // In the middle of a batch.
    assert_eq!(store.redrive(&DeadFilter::default(), 5, LATER).await, Ok(5));
    assert_eq!(
        store.dead_letters(&DeadFilter::default(), &Position::default(), 200).await.unwrap(),
        letters[5..]
    );
    assert_eq!(store.redrive(&DeadFilter::default(), usize::MAX, LATER).await, Ok(115));
    assert_eq!(store.depth().await, Ok(180));
    assert_eq!(due(&store, 200, &[]).await.len(), 60, "the same batches");
}

/// I9: what a process has perhaps written, its sweep finds, before others would take it over.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn f47_what_was_never_answered_is_found_by_the_next_sweep() {
    let server = Server::dynamodb();
    let proxy = FaultProxy::start(server.endpoint());
    let settings = DynamoSettings { store_time: false, ..DynamoSettings::new(settings().keys, "node-7") };
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let clock = clock();
    let store = open(proxy.endpoint(), &settings, &clock).await;
    let file = fixtures::file("feed", 1, &["d"]);
    let steps = [1, 4, 7].map(|row| fixtures::step(&file, row..=row + 2, NOW));
    let [released, settled, appended] = steps.each_ref().map(|step| step.batches[0].id);
    let [first_step, second_step, third_step] = steps;
    store.append(first_step).await.unwrap();
    store.append(second_step).await.unwrap();
    let tokens = [granted(&store, released).await, granted(&store, settled).await];

    for operation in ["BatchExecuteStatement", "TransactWriteItems"] {
        proxy.inject(Rule::on(operation, Fault::Close { forward: true }));
    }
    let answers = tokio::join!(
        store.release_claims(&tokens[..1], Release::Unused),
        store.settle(vec![last(tokens[1], all(3, retry()))]),
        store.append(third_step.clone()),
    );
    let unknown = |error: StoreError| assert!(matches!(error, StoreError::Unknown(_)), "{error}");
    unknown(answers.0.unwrap_err());
    unknown(answers.1.unwrap_err());
    unknown(answers.2.unwrap_err());
    proxy.clear_faults();
    assert_eq!(due(&store, 9, &[]).await, [], "it is not known");
    clock.advance(LATER.since(NOW) + settings.grace + settings.sweep_interval);
    let found: BTreeSet<_> = due(&store, 9, &[]).await.into_iter().collect();
    assert_eq!(found, BTreeSet::from([released, settled, appended]));

    // Whoever repeats it changes nothing.
    store.release_claims(&tokens[..1], Release::Unused).await.unwrap();
    assert_eq!(store.settle(vec![last(tokens[1], all(3, retry()))]).await, Ok(vec![Settled::Stale]));
    assert_eq!(store.append(third_step).await, Ok(Appended::Stored));
    assert_eq!(due(&store, 9, &[]).await.len(), 3);
    assert_eq!(store.count_outstanding().await, Ok(3));
}

/// Two machines are given the same entries again and again, some answers are lost, and one of them starts anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn b22_f48_machines_that_share_a_feed_take_every_entry_once() {
    const ENTRIES: u64 = 600;
    let server = Server::dynamodb();
    let proxy = FaultProxy::start(server.endpoint());
    let (settings, clock) = (settings(), clock());
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let lost = Fault::Close { forward: true };
    proxy.inject(Rule::on("TransactWriteItems", lost).with_probability(0.2, 7));
    let entry = |number: u64| EntryId {
        feed: "feed".into(),
        id: number.to_string(),
        sent_at: UnixMs(NOW.0 + number * 300), // 200 a minute
    };
    let work = async |process: &str, first_file: u8, stride: u64| {
        let own = DynamoSettings { process: process.into(), ..settings.clone() };
        let mut store = open(proxy.endpoint(), &own, &clock).await;
        let mut taken = 0;
        for nth in 0..20u8 {
            if nth == 12 {
                store = open(proxy.endpoint(), &own, &clock).await;
            }
            let first = u64::from(nth) * stride % 20 * 28;
            let mut entries: Vec<_> = (first..(first + 70).min(ENTRIES)).map(entry).collect();
            let mut known = store.known_entries(&entries[..10]).await.unwrap();
            loop {
                entries.retain(|entry| !known.contains(entry));
                if entries.is_empty() {
                    break;
                }
                let file = fixtures::file("feed", first_file + nth, &["d"]);
                let mut step = fixtures::step(&file, 1..=entries.len() as u64, NOW);
                step.entries.clone_from(&entries);
                match store.append(step).await {
                    Ok(Appended::Stored) => break,
                    Ok(Appended::Known(others)) => {
                        assert!(!others.is_empty() && others.iter().all(|one| entries.contains(one)));
                        known = others;
                    }
                    Err(StoreError::Retryable(_) | StoreError::Unknown(_)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            taken += entries.len() as u64;
        }
        taken
    };
    let (one, other) = tokio::join!(work("node-7", 0, 1), work("other-1", 100, 7));
    assert_eq!(one + other, ENTRIES, "{one} and {other}");
    assert!(one > 0 && other > 0 && proxy.injected("TransactWriteItems") > 0);
    let store = open(proxy.endpoint(), &settings, &clock).await;
    assert_eq!(store.depth().await, Ok(ENTRIES));
    let all: Vec<_> = (0..ENTRIES).map(entry).collect();
    assert_eq!(store.known_entries(&all).await, Ok(all));
}

/// What is claimed elsewhere is listed no more, once it is looked at; what is lost on its way is listed for as long as
/// nobody claims it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn what_waits_is_listed_until_somebody_has_it() {
    let server = Server::dynamodb();
    let settings = DynamoSettings { store_time: false, ..DynamoSettings::new(settings().keys, "node-7") };
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let clock = clock();
    let store = open(server.endpoint(), &settings, &clock).await;
    let other = DynamoSettings { process: "other-1".into(), ..settings.clone() };
    let other = open(server.endpoint(), &other, &clock).await;
    let step = fixtures::step(&fixtures::file("feed", 1, &["d", "e"]), 1..=3, NOW);
    let [claimed, lost] = [0, 1].map(|index| step.batches[index].id);
    store.append(step).await.unwrap();
    let depths = async || {
        let depths = other.depths(NOW).await.unwrap();
        depths.into_iter().map(|of| (of.due, of.waiting, of.leased)).collect::<Vec<_>>()
    };
    assert_eq!(depths().await, [(3, 0, 0), (3, 0, 0)]);
    assert!(matches!(claim(&other, "other-1/w#1", vec![claimed]).await[..], [Claim::Granted(_)]));
    assert_eq!(depths().await, [(0, 0, 3), (3, 0, 0)]);
    assert_eq!(due(&store, 9, &[]).await, [claimed, lost], "it is not known yet");
    clock.advance(settings.grace + settings.sweep_interval);
    for _ in 0..8 {
        assert_eq!(due(&store, 9, &[]).await, [lost]);
        assert_eq!(due(&other, 9, &[]).await, []);
        clock.advance(settings.sweep_interval);
    }
}

/// B17: what a node's last life died with is charged when its claims are taken over.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn only_what_was_in_flight_is_charged_with_the_death_of_its_process() {
    let server = Server::dynamodb();
    let settings = settings();
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let clock = clock();
    let gone = open(server.endpoint(), &settings, &clock).await;
    let step = fixtures::step(&fixtures::file("feed", 1, &["d"]), 1..=3, NOW);
    let id = step.batches[0].id;
    gone.append(step).await.unwrap();
    granted(&gone, id).await;
    drop(gone);
    let evidence = Evidence::of([(id, Some(1))]);
    let next = DynamoSettings { process: "node-8".into(), evidence, ..settings };
    let next = open(server.endpoint(), &next, &clock).await;
    let claims = claim(&next, "node-8/w#1", vec![id]).await;
    let Claim::Granted(lease) = &claims[0] else { panic!("{claims:?}") };
    assert_eq!((lease.losses, &lease.charged), (0, &BTreeMap::from([(1, (1, 1))])));
    assert!(lease.open[1].not_before > NOW && lease.open[0].not_before == NOW, "the suspect waits");
    next.release_claims(&[lease.token], Release::Unused).await.unwrap();
    let claims = claim(&next, "node-8/w#1", vec![id]).await;
    let Claim::Granted(again) = &claims[0] else { panic!("{claims:?}") };
    assert_eq!((again.losses, &again.charged, &again.open), (0, &lease.charged, &lease.open), "charged once");
}

/// `postrider dead list` in pages that end in the middle of a batch.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn dead_letters_are_listed_once_whatever_the_page() {
    let server = Server::dynamodb();
    let settings = settings();
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let store = open(server.endpoint(), &settings, &clock()).await;
    for content in 1..=2 {
        let file = fixtures::file("feed", content, &["d", "e"]);
        for first in [1, 11] {
            let step = fixtures::step(&file, first..=first + 9, NOW);
            store.append(step.clone()).await.unwrap();
            for batch in step.batches {
                let token = granted(&store, batch.id).await;
                let settlement = settlement(token, all(10, dead()));
                store.settle(vec![settlement]).await.unwrap();
            }
        }
    }
    let endpoint = server.endpoint().to_owned();
    let listing = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let store = runtime.block_on(open(&endpoint, &settings, &clock()));
        let mut console = Console::new(runtime, store);
        let both = DeadFilter::default();
        let by_name = DeadFilter { file: Some(FileSelector::Name("2.csv".into())), ..DeadFilter::default() };
        let of_e = DeadFilter { destination: Some("e".into()), ..DeadFilter::default() };
        for (filter, expected) in [(both, 80), (by_name, 40), (of_e, 40)] {
            for limit in [1, 7, 100] {
                let mut position = Position::default();
                let mut seen = BTreeSet::new();
                loop {
                    let page = console.dead(&filter, &position, limit).unwrap();
                    let Some(last) = page.last() else { break };
                    assert!(page.len() <= limit);
                    position = last.position.clone();
                    for letter in page {
                        assert!(seen.insert((letter.file, letter.destination, letter.row)), "listed twice");
                    }
                }
                assert_eq!(seen.len(), expected, "pages of {limit}");
            }
        }
    });
    tokio::task::spawn_blocking(|| listing.join().unwrap()).await.unwrap();
}

/// What a process remembers is out of date as soon as another one has written: the condition fails, it reads
/// again, and nothing is lost or set back.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn f47_a_failed_condition_loses_nothing_and_sets_nothing_back() {
    let server = Server::dynamodb();
    let settings = settings();
    migrate(&client(server.endpoint()), &settings).await.unwrap();
    let clock = clock();
    let one = open(server.endpoint(), &settings, &clock).await;
    let other = DynamoSettings { process: "other-1".into(), ..settings };
    let other = open(server.endpoint(), &other, &clock).await;
    let file = fixtures::file("feed", 1, &["d"]);
    let steps = [fixtures::step(&file, 1..=3, NOW), fixtures::step(&file, 4..=6, NOW)];
    one.append(steps[0].clone()).await.unwrap();
    other.append(steps[1].clone()).await.unwrap();
    // The first one takes the file to be where it left it.
    one.append(steps[1].clone()).await.unwrap();
    assert_eq!(one.find_file(file.id).await.unwrap().unwrap().1.rows, 6);
    assert_eq!(other.depth().await, Ok(6));

    let id = steps[0].batches[0].id;
    let old = granted(&one, id).await;
    let request = ClaimRequest {
        holder: "other-1/w#1".into(),
        batches: vec![id],
        until: UnixMs(LATER.0 * 2),
        now: UnixMs(LATER.0 + 1),
        born: UnixMs(0),
    };
    let claims = other.claim(request).await.unwrap();
    let Claim::Granted(lease) = &claims[0].1 else { panic!("{claims:?}") };
    assert_eq!(lease.losses, 1);
    let new = lease.token;
    let settle = async |store: &DynamoStore, token, verdicts| {
        store.settle(vec![settlement(token, verdicts)]).await.unwrap()[0]
    };
    assert_eq!(settle(&one, old, vec![first(0, sent()), first(1, dead())]).await, Settled::Stale);
    assert_eq!(settle(&other, new, vec![first(0, dead()), first(1, sent())]).await, Settled::Open);
    assert_eq!(settle(&one, old, vec![first(2, sent())]).await, Settled::Stale);
    assert_eq!(settle(&other, new, vec![first(2, dead())]).await, Settled::Complete, "nothing is left");
    let counts = one.report(file.id).await.unwrap().unwrap().destinations["d"];
    assert_eq!((counts.accepted, counts.sent, counts.dead, counts.retrying), (6, 3, 0, 0));
    for store in [one, other] {
        clock.advance(Duration::from_secs(16));
        assert_eq!(store.depth().await, Ok(3));
    }
    figure("2 stores on one batch, 2 settlements under an old fence: 3 of 3 recorded, no state set back");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn tables_are_made_once_and_checked() {
    let server = Server::dynamodb();
    let (client, settings) = (client(server.endpoint()), settings());
    let wrong = check(&client, &settings).await.unwrap();
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    assert!(wrong[0].contains("is missing") && wrong[0].contains("postrider migrate"), "{wrong:?}");
    let refused = DynamoStore::open(&client, settings.clone(), clock(), Arc::new(())).await;
    assert!(refused.err().unwrap().to_string().contains("postrider migrate"));
    for _ in 0..2 {
        migrate(&client, &settings).await.unwrap();
        assert!(check(&client, &settings).await.unwrap().is_empty());
    }
    // An index that somebody removed is made again.
    let delete = aws_sdk_dynamodb::types::DeleteGlobalSecondaryIndexAction::builder().index_name("Delivered");
    let update =
        aws_sdk_dynamodb::types::GlobalSecondaryIndexUpdate::builder().delete(delete.build().unwrap());
    let call = client
        .update_table()
        .table_name(format!("{}-ledger", settings.keys.table))
        .global_secondary_index_updates(update.build());
    call.send().await.unwrap();
    while !check(&client, &settings).await.unwrap().iter().any(|wrong| wrong.contains("no index Delivered")) {
    }
    migrate(&client, &settings).await.unwrap();
    assert!(check(&client, &settings).await.unwrap().is_empty());
    // A newer program was here.
    let put = client.put_item().table_name(format!("{}-ledger", settings.keys.table));
    let put =
        put.item("Pk", AttributeValue::S("schema".into())).item("Sk", AttributeValue::S("version".into()));
    put.item("Version", AttributeValue::N((SCHEMA_VERSION + 1).to_string())).send().await.unwrap();
    assert!(migrate(&client, &settings).await.is_err());
    assert_eq!(check(&client, &settings).await.unwrap().len(), 1);
    assert!(DynamoStore::open(&client, settings, clock(), Arc::new(())).await.is_err());
}

/// A payload is written once, whoever brings it and however often its batches are tried: only small records change (B4).
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn a_payload_is_written_once_and_kept_while_it_is_needed() {
    const DAY: Duration = Duration::from_hours(24);
    let server = Server::dynamodb();
    let settings = DynamoSettings { payload_life: DAY * 10, ..settings() };
    let client = client(server.endpoint());
    migrate(&client, &settings).await.unwrap();
    let clock = clock();
    let store = open(server.endpoint(), &settings, &clock).await;
    let step = fixtures::step(&fixtures::file("feed", 1, &["d", "e"]), 1..=2, NOW);
    let [id, other] = [0, 1].map(|index| step.batches[index].id);
    store.append(step).await.unwrap();
    let stored = async || client.scan().table_name(&settings.keys.table).send().await.unwrap().items.unwrap();
    let before = stored().await;
    assert_eq!(before.len(), 1, "both destinations share it");
    let expires = |items: &[HashMap<String, AttributeValue>]| -> u64 {
        items[0]["ExpiresAt"].as_n().unwrap().parse().unwrap()
    };
    assert_eq!(expires(&before), NOW.0 / 1000 + 10 * 86_400);

    let token = granted(&store, id).await;
    let verdicts = vec![first(0, retry()), first(1, dead())];
    assert_eq!(store.settle(vec![last(token, verdicts)]).await.unwrap(), [Settled::Released]);
    let all_sent = settlement(granted(&store, other).await, all(2, sent()));
    assert_eq!(store.settle(vec![all_sent]).await.unwrap(), [Settled::Complete]);
    assert_eq!(store.redrive(&DeadFilter::default(), 9, LATER).await, Ok(1));
    assert_eq!(due(&store, 9, &[]).await, [id]);
    assert_eq!(stored().await, before);

    // What is archived leaves it to the other; that has it kept when half of its time is over.
    assert_eq!(store.archive(UnixMs(u64::MAX), 9).await, Ok(1));
    clock.advance(DAY * 6);
    assert_eq!(due(&store, 9, &[]).await, [id]);
    assert_eq!(store.get(&[other]).await.unwrap(), [(other, Fetched::Missing)]);
    let kept = stored().await;
    assert_eq!((kept.len(), expires(&kept)), (1, NOW.0 / 1000 + 16 * 86_400));
    assert_eq!(store.archive(UnixMs(u64::MAX), 9).await, Ok(0), "it is needed");
    assert!(matches!(store.get(&[id]).await.unwrap()[0].1, Fetched::Batch(_)));
}
