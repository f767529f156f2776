//! What batches carry: how long it is kept (B4), and what happens where it is damaged (F61).

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use aws_sdk_dynamodb::types::AttributeValue;
use postrider_actors::{
    model::{ids::BatchId, time::UnixMs},
    ports::{Claim, ClaimRequest, Claims as _, DueQuery, Outbox as _},
    testing::fixtures,
};
use postrider_aws::dynamodb::{DynamoSettings, migrate};

use super::{
    client,
    cloud::Server,
    faults::{NOW, clock, open},
    settings,
};

/// No daemon ran for longer than half of what a payload lives for: the first that starts has it kept. What has expired all
/// the same holds up nothing else, and is not asked for again and again.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn b4_what_waits_is_kept_by_who_starts_and_what_has_expired_holds_up_nothing() {
    const DAY: Duration = Duration::from_hours(24);
    let server = Server::dynamodb();
    let settings = DynamoSettings { payload_life: DAY * 60, ..settings() };
    let client = client(server.endpoint());
    migrate(&client, &settings).await.unwrap();
    let clock = clock();
    let store = open(server.endpoint(), &settings, &clock).await;
    let steps = [1, 2].map(|number| fixtures::step(&fixtures::file("feed", number, &["d"]), 1..=2, NOW));
    let [id, gone] = steps.each_ref().map(|step| step.batches[0].id);
    let [step, other] = steps;
    store.append(step).await.unwrap();
    let stored = async || client.scan().table_name(&settings.keys.table).send().await.unwrap().items.unwrap();
    let kept = stored().await.pop().unwrap();
    store.append(other).await.unwrap();
    drop(store);

    // The service deletes what has expired.
    for item in stored().await {
        if item["Digest"] != kept["Digest"] {
            let delete = client.delete_item().table_name(&settings.keys.table);
            delete.key("Digest", item["Digest"].clone()).send().await.unwrap();
        }
    }
    clock.advance(DAY * 31);
    let other = DynamoSettings { process: "another-1".into(), ..settings.clone() };
    let store = open(server.endpoint(), &other, &clock).await;
    let now = UnixMs(NOW.0 + (DAY * 31).as_millis() as u64);
    let wants = [(Arc::from("d"), 9)];
    let query = DueQuery { process: store.process(), due_by: now, wants: &wants, confirm: &[] };
    let found: BTreeSet<_> = store.due(query).await.unwrap().into_iter().map(|batch| batch.id).collect();
    assert_eq!(found, BTreeSet::from([id, gone]));
    let items = stored().await;
    let expires: u64 = items[0]["ExpiresAt"].as_n().unwrap().parse().unwrap();
    assert_eq!((items.len(), expires), (1, (now.0 + (DAY * 60).as_millis() as u64) / 1000));

    let request = ClaimRequest {
        holder: "another-1/w#1".into(),
        batches: vec![id, gone],
        until: now.after(DAY),
        now,
        born: now,
    };
    let claims: HashMap<_, _> = store.claim(request).await.unwrap().into_iter().collect();
    assert!(matches!(claims[&id], Claim::Granted(_)), "{claims:?}");
    assert_eq!(claims[&gone], Claim::Missing);
    assert_eq!(store.due(query).await.unwrap(), [], "it is not offered again at once");
    clock.advance(Duration::from_mins(1));
    let found: Vec<_> = store.due(query).await.unwrap().into_iter().map(|batch| batch.id).collect();
    assert_eq!(found, [gone], "and not forgotten");
}

/// A bit of a payload and a byte of a record flip: both are named and left alone, and what was claimed with them goes on.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn f61_what_is_damaged_holds_up_nothing_and_is_not_sent() {
    let server = Server::dynamodb();
    let settings = settings();
    let client = client(server.endpoint());
    migrate(&client, &settings).await.unwrap();
    let clock = clock();
    let store = open(server.endpoint(), &settings, &clock).await;
    let steps = [1, 2, 3].map(|number| fixtures::step(&fixtures::file("feed", number, &["d"]), 1..=2, NOW));
    let [sound, flipped, broken] = steps.each_ref().map(|step| step.batches[0].id);
    for step in steps {
        store.append(step).await.unwrap();
    }
    drop(store);
    let ledger = format!("{}-ledger", settings.keys.table);
    let record = |id: BatchId| {
        let get = client.get_item().table_name(&ledger).key("Pk", AttributeValue::S(format!("batch#{id}")));
        get.key("Sk", AttributeValue::S("batch".into())).send()
    };
    let digest = record(flipped).await.unwrap().item.unwrap()["Digest"].clone();
    let get = client.get_item().table_name(&settings.keys.table).key("Digest", digest);
    let mut payload = get.send().await.unwrap().item.unwrap();
    let mut rows = payload["Payload"].as_b().unwrap().clone().into_inner();
    *rows.last_mut().unwrap() ^= 1;
    payload.insert("Payload".into(), AttributeValue::B(rows.into()));
    client.put_item().table_name(&settings.keys.table).set_item(Some(payload)).send().await.unwrap();
    let mut damaged = record(broken).await.unwrap().item.unwrap();
    damaged.insert("Body".into(), AttributeValue::B(vec![0xff; 7].into()));
    client.put_item().table_name(&ledger).set_item(Some(damaged)).send().await.unwrap();

    clock.advance(Duration::from_mins(5));
    let other = DynamoSettings { process: "another-1".into(), ..settings.clone() };
    let store = open(server.endpoint(), &other, &clock).await;
    let now = NOW.after(Duration::from_mins(5));
    let wants = [(Arc::from("d"), 9)];
    let query = DueQuery { process: store.process(), due_by: now, wants: &wants, confirm: &[] };
    let found: BTreeSet<_> = store.due(query).await.unwrap().into_iter().map(|batch| batch.id).collect();
    assert_eq!(found, BTreeSet::from([sound, flipped]), "a record that can't be read is not offered");
    let request = ClaimRequest {
        holder: "another-1/w#1".into(),
        batches: vec![flipped, broken, sound],
        until: now.after(Duration::from_mins(1)),
        now,
        born: now,
    };
    let claims: HashMap<_, _> = store.claim(request).await.unwrap().into_iter().collect();
    assert!(matches!(claims[&sound], Claim::Granted(_)), "{claims:?}");
    assert_eq!((&claims[&flipped], &claims[&broken]), (&Claim::Missing, &Claim::Missing));
    assert_eq!(store.due(query).await.unwrap(), []);
    let kept = record(broken).await.unwrap().item.unwrap();
    assert_eq!(kept["Body"].as_b().unwrap().as_ref(), [0xff; 7], "nothing was written over it");
}

/// Two machines are given the same file, and the clock of the one that stores its rows last is behind: no batch counts on
/// more than is so.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs POSTRIDER_DYNOXIDE, which script/test sets"]
async fn b4_a_machine_that_puts_the_same_rows_takes_nothing_of_their_life() {
    let server = Server::dynamodb();
    let settings = settings();
    let client = client(server.endpoint());
    migrate(&client, &settings).await.unwrap();
    let (ahead, behind) = (clock(), clock());
    ahead.advance(Duration::from_mins(10));
    let first = open(server.endpoint(), &settings, &ahead).await;
    let other = DynamoSettings { process: "another-1".into(), ..settings.clone() };
    let second = open(server.endpoint(), &other, &behind).await;
    let step = fixtures::step(&fixtures::file("feed", 1, &["d"]), 1..=2, NOW);
    for store in [first, second] {
        store.append(step.clone()).await.unwrap();
    }
    let all = async |table: &str| client.scan().table_name(table).send().await.unwrap().items.unwrap();
    let payloads = all(&settings.keys.table).await;
    let items = all(&format!("{}-ledger", settings.keys.table)).await;
    let record = items.iter().find(|item| item.contains_key("KeptUntil")).expect("the batch has a record");
    let seconds = |value: &AttributeValue| -> u64 { value.as_n().unwrap().parse().unwrap() };
    assert_eq!(payloads.len(), 1);
    assert_eq!(seconds(&payloads[0]["ExpiresAt"]), (NOW.0 + settings.payload_life.as_millis() as u64) / 1000);
    assert!(seconds(&payloads[0]["ExpiresAt"]) >= seconds(&record["KeptUntil"]));
}
