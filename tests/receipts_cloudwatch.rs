//! Receipts from CloudWatch Logs, on the emulator and behind the fault proxy. Every look is made by a source
//! that was just made, as after a restart: what it knows comes from the cursor alone.
#![cfg(feature = "aws")]

#[path = "cloud/mod.rs"]
mod cloud;

use std::{collections::BTreeMap, num::NonZeroU32, sync::Arc, time::Duration};

use aws_sdk_cloudwatchlogs::{Client, config::timeout::TimeoutConfig, types::InputLogEvent};
use postrider::clock::SystemClock;
use postrider_actors::{
    model::{
        call::{CallOutcome, FailureKind},
        ids::{FileId, MessageId},
        receipt_format::{FieldPath, ReceiptFormat, ReceiptMapping, StatusMeaning, UnknownStatus},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::{
        Arrival, CallObserver, Clock as _, Polled, ReceiptLedger as _, ReceiptSource as _, StoreError, Taken,
    },
    testing::{FakeClock, MemoryReceipts, RowReader as _},
};
use postrider_aws::{
    AwsSettings,
    cloudwatch::{CallRate, CloudWatchReceipts, CloudWatchSettings},
    logs_client,
};
use postrider_settings::{CloudwatchSource, Keys as _};
use serde_json::json;

use cloud::{Fault, FaultProxy, Rule, Server, sdk_config};

const OPERATION: &str = "FilterLogEvents";
const DESTINATION: &str = "sms";

/// As SNS writes its SMS logs ("Viewing CloudWatch logs for SMS deliveries").
fn mapping() -> ReceiptMapping {
    let path = |text: &str| Some(FieldPath::parse(text).unwrap());
    ReceiptMapping {
        message_id: None,
        provider_id: path("notification.messageId"),
        event_id: None,
        status: path("status").unwrap(),
        time: path("notification.timestamp"),
        carrier: path("delivery.phoneCarrier"),
        response: path("delivery.providerResponse"),
        sent_at: None,
        price: path("delivery.priceInUSD"),
        statuses: BTreeMap::from([
            ("SUCCESS".to_owned(), StatusMeaning::Delivered),
            ("FAILURE".to_owned(), StatusMeaning::Failed),
        ]),
        otherwise: UnknownStatus::Reject,
    }
}

fn sns_event(number: u64) -> String {
    json!({
        "notification": { "messageId": format!("sns-{number}"), "timestamp": "2016-06-28 00:40:34.558" },
        "delivery": {
            "phoneCarrier": "My Phone Carrier",
            "mnc": 270,
            "destination": "+1XXX5550100",
            "priceInUSD": 0.00645,
            "smsType": "Transactional",
            "providerResponse": "Message has been accepted by phone carrier",
            "dwellTimeMs": 599,
        },
        "status": if number.is_multiple_of(10) { "FAILURE" } else { "SUCCESS" },
    })
    .to_string()
}

/// Counts throttled calls.
#[derive(Default)]
struct Throttled(std::sync::atomic::AtomicU64);

impl CallObserver for Throttled {
    fn call(
        &self,
        service: &'static str,
        operation: &'static str,
        outcome: CallOutcome,
        _: Duration,
        _: usize,
    ) {
        assert_eq!((service, operation), ("logs", OPERATION));
        let throttled = u64::from(outcome == CallOutcome::Failed(FailureKind::Throttled));
        self.0.fetch_add(throttled, std::sync::atomic::Ordering::SeqCst);
    }
}

struct World {
    server: Server,
    proxy: FaultProxy,
    client: Client,
    clock: Arc<FakeClock>,
    ledger: MemoryReceipts,
    rate: CallRate,
    throttled: Arc<Throttled>,
    settings: CloudWatchSettings,
}

impl World {
    async fn start(groups: &[&str], calls_per_s: u32) -> Self {
        let server = Server::logs();
        let proxy = FaultProxy::start(server.endpoint());
        let timeouts = TimeoutConfig::builder().operation_attempt_timeout(Duration::from_secs(20)).build();
        let config = sdk_config(proxy.endpoint()).into_builder().timeout_config(timeouts).build();
        let client = logs_client(&config, &AwsSettings::default());
        let direct = Client::new(&sdk_config(server.endpoint()));
        for group in groups {
            direct.create_log_group().log_group_name(*group).send().await.expect("moto makes groups");
            direct
                .create_log_stream()
                .log_group_name(*group)
                .log_stream_name("s")
                .send()
                .await
                .expect("and streams");
        }
        let keys = CloudwatchSource {
            log_groups: groups.iter().map(|group| (*group).to_owned()).collect(),
            overlap: Duration::from_mins(1),
            poll: Duration::from_secs(1),
            start: Duration::from_mins(30),
            ..CloudwatchSource::declared()
        };
        let settings = CloudWatchSettings {
            page_events: 1_000,
            lag: Duration::from_secs(5),
            window_max: Duration::from_mins(10),
            ..CloudWatchSettings::new(keys)
        };
        let rate = CallRate::per_second(NonZeroU32::new(calls_per_s).unwrap());
        let clock = Arc::new(FakeClock::at(SystemClock.wall()));
        let ledger = MemoryReceipts::new();
        Self { server, proxy, client, clock, ledger, rate, throttled: Arc::default(), settings }
    }

    /// Puts events there, past the proxy: each with its time and its message.
    async fn log(&self, group: &str, events: impl IntoIterator<Item = (UnixMs, String)>) {
        let direct = Client::new(&sdk_config(self.server.endpoint()));
        let events: Vec<_> = events
            .into_iter()
            .map(|(at, text)| {
                InputLogEvent::builder().timestamp(at.0.cast_signed()).message(text).build().unwrap()
            })
            .collect();
        for part in events.chunks(5_000) {
            let put = direct.put_log_events().log_group_name(group).log_stream_name("s");
            let answer = put.set_log_events(Some(part.to_vec())).send().await.expect("moto takes events");
            assert!(answer.rejected_log_events_info().is_none(), "{answer:?}");
        }
    }

    /// One look, and what it brings taken.
    async fn poll(&self) -> Result<Taken, StoreError> {
        let format = ReceiptFormat::new("sns".into(), mapping()).unwrap();
        let (client, settings) = (self.client.clone(), self.settings.clone());
        let (rate, clock) = (self.rate.clone(), self.clock.clone());
        let source = CloudWatchReceipts::new(client, settings, format, rate, clock, self.throttled.clone());
        let cursor = self.ledger.cursor("sns").await.unwrap();
        let behind = source.behind(cursor.as_ref(), self.clock.wall());
        assert_eq!(behind.is_some(), cursor.is_some(), "once a group was looked at, it is known up to when");
        let polled = source.poll(cursor.as_ref(), Duration::from_millis(10)).await?;
        let Polled { receipts, rejects, cursor, acks, .. } = polled;
        assert!(acks.is_empty() && receipts.len() <= 2_000, "bounded");
        let (source, destination) = ("sns".into(), DESTINATION.into());
        let arrival = Arrival { source, destination, receipts, rejects, cursor, at: self.clock.wall() };
        self.ledger.take(arrival).await
    }

    /// Looks until nothing is due any more; how many receipts were new.
    async fn drain(&self) -> u64 {
        let (mut new, mut idle) = (0, 0);
        // An empty look moves nothing; one with receipts that are all known does.
        for _ in 0..500 {
            let before = self.ledger.cursor("sns").await.unwrap();
            match self.poll().await {
                Ok(taken) => new += taken.new,
                Err(_) => continue,
            }
            idle = if before == self.ledger.cursor("sns").await.unwrap() { idle + 1 } else { 0 };
            if idle == 2 {
                return new;
            }
        }
        panic!("it never ends: {:?}", self.ledger.cursor("sns").await);
    }

    fn before(&self, by: Duration) -> UnixMs {
        UnixMs(self.clock.wall().0 - by.as_millis() as u64)
    }

    fn calls(&self) -> u64 {
        self.proxy.counts().get(OPERATION).map_or(0, |count| count.calls)
    }
}

fn id(row: u64) -> MessageId {
    MessageId { file: FileId([9; 16]), row }
}

/// Delivery's record of a message that the provider calls `sns-ROW`.
fn record(row: u64, at: UnixMs) -> MessageRecord {
    MessageRecord {
        id: id(row),
        destination: DESTINATION.into(),
        feed: "f".into(),
        recipient: "r".into(),
        state: MessageState::Sent,
        attempts: 1,
        status: 200,
        reason: None,
        detail: None,
        provider_id: Some(format!("sns-{row}").into()),
        accepted_at: at,
        at,
    }
}

#[tokio::test]
#[ignore = "needs moto (POSTRIDER_MOTO): script/test installs it"]
async fn s0_1_the_receipts_of_25_000_messages_come_within_the_rate() {
    const MESSAGES: u64 = 25_000;
    const CALLS_PER_S: usize = 3;
    let world = World::start(&["a", "b", "c"], CALLS_PER_S as u32).await;
    let begin = world.before(Duration::from_mins(29));
    for (index, group) in ["a", "b", "c"].into_iter().enumerate() {
        let rows = (0..MESSAGES).filter(|row| row % 3 == index as u64);
        // Spread over 28 minutes.
        world
            .log(group, rows.map(|row| (UnixMs(begin.0 + row * 28 * 60_000 / MESSAGES), sns_event(row))))
            .await;
    }
    world.ledger.record((0..MESSAGES).map(|row| record(row, begin)).collect()).await.unwrap();

    let begun = tokio::time::Instant::now();
    assert_eq!(world.drain().await, MESSAGES);
    let arrivals = world.proxy.arrivals(OPERATION);
    // The network may make two calls come a little closer than they left.
    let jitter = Duration::from_millis(100);
    for calls in arrivals.windows(CALLS_PER_S + 1) {
        let spread = calls[CALLS_PER_S] - calls[0];
        assert!(spread + jitter >= Duration::from_secs(1), "{} calls in {spread:?}", CALLS_PER_S + 1);
    }
    assert_eq!(world.throttled.0.load(std::sync::atomic::Ordering::SeqCst), 0);
    println!("{} calls in {:?} for {MESSAGES} receipts", arrivals.len(), begun.elapsed());

    while world.ledger.apply(1_000, usize::MAX, world.clock.wall()).await.unwrap().total() > 0 {}
    for row in 0..MESSAGES {
        let found = world.ledger.row(id(row), DESTINATION).await.expect("it was recorded");
        let expected = if row.is_multiple_of(10) { MessageState::Failed } else { MessageState::Delivered };
        assert_eq!(found.state, expected, "row {row}");
    }
    let receipt = world.ledger.row(id(1), DESTINATION).await.unwrap().receipt.unwrap();
    assert_eq!(receipt.at, Some(UnixMs(1_467_074_434_558)));
    assert_eq!(receipt.facts.carrier.as_deref(), Some("My Phone Carrier"));
    assert_eq!(receipt.facts.price, Some(postrider_actors::model::receipt::Price(645_000)));
    assert_eq!(world.ledger.tally().await.rejects, 0);
    assert_eq!(world.proxy.problems(), Vec::<String>::new());
}

#[tokio::test]
#[ignore = "needs moto (POSTRIDER_MOTO): script/test installs it"]
async fn s0_1_a_window_whose_call_fails_is_read_again_however_late() {
    let world = World::start(&["g"], 1_000).await;
    world.poll().await.expect("where the group begins is stored before anything can fail");
    assert_eq!(world.calls(), 0);
    let begin = world.before(Duration::from_mins(29));
    world.log("g", (0..3_000).map(|row| (UnixMs(begin.0 + row * 500), sns_event(row)))).await;

    // It fails in all ways for two hours: with the first call, and in the middle of a window.
    let mut failures = 0;
    for fault in [
        Fault::throttled(),
        Fault::internal_error(),
        Fault::unavailable(),
        Fault::Close { forward: false },
        Fault::Close { forward: true },
    ] {
        world.proxy.inject(Rule::on(OPERATION, fault).next(2));
        for _ in 0..2 {
            world.clock.advance(Duration::from_mins(12));
            let cursor = world.ledger.cursor("sns").await.unwrap();
            let error = world.poll().await.expect_err("the call fails");
            assert!(!matches!(error, StoreError::Permanent(_)), "{error}");
            assert_eq!(world.ledger.cursor("sns").await.unwrap(), cursor);
            failures += 1;
        }
        world.poll().await.expect("and now it works");
    }
    assert_eq!((failures, world.proxy.injected(OPERATION)), (10, 10));
    assert_eq!(world.throttled.0.load(std::sync::atomic::Ordering::SeqCst), 2);
    world.drain().await;
    assert_eq!(world.ledger.waiting().await.unwrap(), 3_000);
}

#[tokio::test]
#[ignore = "needs moto (POSTRIDER_MOTO): script/test installs it"]
async fn s0_1_nothing_is_lost_when_calls_fail_at_random() {
    let mut world = World::start(&["a", "b"], 1_000).await;
    world.settings.page_events = 200;
    let begin = world.before(Duration::from_mins(29));
    for (index, group) in ["a", "b"].into_iter().enumerate() {
        let rows = (0..4_000).filter(|row| row % 2 == index as u64);
        world.log(group, rows.map(|row| (UnixMs(begin.0 + row * 400), sns_event(row)))).await;
    }
    world.proxy.inject(Rule::on(OPERATION, Fault::internal_error()).with_probability(0.3, 1));
    world.proxy.inject(Rule::on(OPERATION, Fault::Close { forward: true }).with_probability(0.2, 2));
    world.drain().await;
    assert!(world.proxy.injected(OPERATION) > 3, "{}", world.proxy.injected(OPERATION));
    assert_eq!(world.ledger.waiting().await.unwrap(), 4_000);
}

#[tokio::test]
#[ignore = "needs moto (POSTRIDER_MOTO): script/test installs it"]
async fn s0_1_late_events_are_found_by_the_overlap_and_known_ones_left_out() {
    let world = World::start(&["g"], 1_000).await;
    let at = world.before(Duration::from_secs(10));
    world.log("g", (0..100).map(|row| (at, sns_event(row)))).await;
    assert_eq!(world.drain().await, 100);
    // Fifty more of the same moment arrive when that was read.
    world.log("g", (100..150).map(|row| (at, sns_event(row)))).await;
    world.clock.advance(Duration::from_secs(5));
    assert_eq!(world.drain().await, 50);
    // Longer than overlap and lag: not promised any more.
    world.clock.advance(Duration::from_mins(2));
    assert_eq!(world.drain().await, 0);
    world.log("g", [(at, sns_event(150))]).await;
    world.clock.advance(Duration::from_secs(5));
    assert_eq!(world.drain().await, 0);
}

#[tokio::test]
#[ignore = "needs moto (POSTRIDER_MOTO): script/test installs it"]
async fn a_refused_token_starts_the_window_over() {
    let world = World::start(&["g"], 1_000).await;
    let at = world.before(Duration::from_mins(20));
    world.log("g", (0..2_500).map(|row| (UnixMs(at.0 + row), sns_event(row)))).await;
    world.poll().await.unwrap();
    // The first window of ten minutes is empty; the third page of the second one is refused.
    let refused = Fault::Error { status: 400, code: "InvalidParameterException" };
    world.proxy.inject(Rule::on(OPERATION, refused).skip(3).next(1));
    world.drain().await;
    assert_eq!((world.proxy.injected(OPERATION), world.ledger.waiting().await.unwrap()), (1, 2_500));
}

#[tokio::test]
#[ignore = "needs moto (POSTRIDER_MOTO): script/test installs it"]
async fn f52_bad_events_and_missing_groups_keep_no_others_back() {
    let mut world = World::start(&["a", "c"], 1_000).await;
    world.settings.keys.log_groups.push("b-is-not-there".to_owned());
    let at = world.before(Duration::from_mins(5));
    let bad = [
        "START RequestId: 1",
        "{\"status\":\"SUCCESS\"}",
        "{\"notification\":{\"messageId\":\"x\"},\"status\":\"?\"}",
    ];
    let events =
        bad.iter().map(|text| (at, (*text).to_owned())).chain((0..10).map(|row| (at, sns_event(row))));
    world.log("a", events).await;
    world.log("c", (10..20).map(|row| (at, sns_event(row)))).await;
    for _ in 0..10 {
        // The missing one is said once nothing else is due.
        if let Err(error) = world.poll().await {
            assert!(error.to_string().contains("ResourceNotFoundException"), "{error}");
        }
    }
    assert_eq!((world.ledger.waiting().await.unwrap(), world.ledger.tally().await.rejects), (20, 3));
    assert!(world.poll().await.is_err());
}
