//! Every injection into SQS, and the counts.

use std::{collections::BTreeSet, fs, time::Duration};

use aws_sdk_sqs::{
    Client,
    config::timeout::TimeoutConfig,
    error::SdkError,
    operation::send_message_batch::{SendMessageBatchError, SendMessageBatchOutput},
    types::{
        ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry, Message,
        MessageAttributeValue, MessageSystemAttributeName, QueueAttributeName, SendMessageBatchRequestEntry,
    },
};
use tokio::time::Instant;

use super::{
    cloud::{Count, Counts, Fault, FaultProxy, Rule, Server},
    code, sdk_config,
};

/// Longer than an emulator needs, shorter than a test may take.
const TIMEOUT: Duration = Duration::from_secs(2);

/// What the name of a FIFO queue ends with.
const FIFO: &str = ".fifo";

/// A queue behind a proxy.
struct Queue {
    proxy: FaultProxy,
    client: Client,
    url: String,
    /// Past the proxy, for what a test looks at without being counted or hit.
    direct: Client,
    _server: Server,
}

impl Queue {
    async fn new(name: &str) -> Self {
        let server = Server::sqs();
        let proxy = FaultProxy::start(server.endpoint());
        let timeouts = TimeoutConfig::builder().operation_timeout(TIMEOUT).build();
        let config = sdk_config(proxy.endpoint()).into_builder().timeout_config(timeouts).build();
        let client = Client::new(&config);
        let direct = Client::new(&sdk_config(server.endpoint()));
        let mut create = direct.create_queue().queue_name(name);
        if name.ends_with(FIFO) {
            create = create.attributes(QueueAttributeName::FifoQueue, "true");
        }
        create.send().await.expect("ministack creates queues");
        let url = client.get_queue_url().queue_name(name).send().await.expect("it is there");
        let url = url.queue_url.expect("it has one");
        assert!(url.starts_with(proxy.endpoint()), "{url} leads past the proxy");
        proxy.reset_counts();
        Self { proxy, client, url, direct, _server: server }
    }

    fn inject(&self, operation: &'static str, fault: Fault) {
        self.proxy.inject(Rule::on(operation, fault));
    }

    async fn send(&self, bodies: &[&str]) -> SendMessageBatchOutput {
        self.try_send(bodies).await.expect("the batch is taken")
    }

    async fn try_send(
        &self,
        bodies: &[&str],
    ) -> Result<SendMessageBatchOutput, SdkError<SendMessageBatchError>> {
        let entries = bodies.iter().map(|body| {
            let kind = MessageAttributeValue::builder().data_type("String").string_value("batch");
            let entry = SendMessageBatchRequestEntry::builder().id(format!("id-{body}")).message_body(*body);
            let entry = entry.message_attributes("kind", kind.build().expect("it is whole"));
            if self.url.ends_with(FIFO) {
                return entry
                    .message_group_id("group")
                    .message_deduplication_id(*body)
                    .build()
                    .expect("whole");
            }
            entry.build().expect("it is whole")
        });
        let send = self.client.send_message_batch().queue_url(&self.url);
        send.set_entries(Some(entries.collect())).send().await
    }

    async fn receive(&self) -> Vec<Message> {
        self.receive_by(&self.client, 0).await
    }

    async fn receive_by(&self, client: &Client, wait_s: i32) -> Vec<Message> {
        let receive = client
            .receive_message()
            .queue_url(&self.url)
            .max_number_of_messages(10)
            .visibility_timeout(60)
            .wait_time_seconds(wait_s)
            .message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount);
        receive.send().await.expect("ministack answers").messages.unwrap_or_default()
    }

    /// Visible, in flight and delayed.
    async fn depth(&self) -> [u64; 3] {
        let names = [
            QueueAttributeName::ApproximateNumberOfMessages,
            QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
            QueueAttributeName::ApproximateNumberOfMessagesDelayed,
        ];
        let get = self.direct.get_queue_attributes().queue_url(&self.url);
        let attributes = get.set_attribute_names(Some(names.to_vec())).send().await.expect("it is there");
        let attributes = attributes.attributes.expect("they were asked for");
        names.map(|name| attributes[&name].parse().expect("a number"))
    }

    async fn delete(&self, messages: &[Message]) -> (BTreeSet<String>, BTreeSet<String>) {
        let entries = messages.iter().enumerate().map(|(position, message)| {
            let entry = DeleteMessageBatchRequestEntry::builder().id(position.to_string());
            let handle = message.receipt_handle.as_deref().expect("it was received");
            entry.receipt_handle(handle).build().expect("it is whole")
        });
        let delete = self.client.delete_message_batch().queue_url(&self.url);
        let answer = delete.set_entries(Some(entries.collect())).send().await.expect("the batch is taken");
        (
            answer.successful.into_iter().map(|entry| entry.id).collect(),
            answer.failed.into_iter().map(|entry| entry.id).collect(),
        )
    }
}

fn bodies(messages: &[Message]) -> Vec<&str> {
    messages.iter().map(|message| message.body.as_deref().expect("they all have one")).collect()
}

fn count(calls: u64, items: u64, empty: u64) -> Count {
    Count { calls, items, empty }
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn calls_and_items_are_counted_exactly() {
    let queue = Queue::new("counted").await;
    queue.send(&["a", "b", "c"]).await;
    queue.send(&["d", "e"]).await;
    queue.client.send_message().queue_url(&queue.url).message_body("f").send().await.expect("taken");
    let received = queue.receive().await;
    assert_eq!(received.len(), 6);
    assert!(queue.receive().await.is_empty());
    queue.delete(&received[..4]).await;
    // An answer that nobody gets is a call all the same, and brings nothing.
    queue.proxy.inject(Rule::on("ReceiveMessage", Fault::Close { forward: true }).next(1));
    queue.client.receive_message().queue_url(&queue.url).send().await.expect_err("closed");
    let expected: Counts = [
        ("DeleteMessageBatch", count(1, 4, 0)),
        ("ReceiveMessage", count(3, 6, 1)),
        ("SendMessage", count(1, 1, 0)),
        ("SendMessageBatch", count(2, 5, 0)),
    ]
    .map(|(operation, count)| (operation.to_owned(), count))
    .into();
    assert_eq!(queue.proxy.counts(), expected);

    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("counts.json");
    queue.proxy.write_counts(&path).expect("it is ours");
    let written: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).expect("written")).expect("JSON");
    assert_eq!(written["SendMessageBatch"], serde_json::json!({ "calls": 2, "items": 5, "empty": 0 }));
    assert_eq!(queue.proxy.reset_counts(), expected);
    assert_eq!(queue.proxy.counts(), Counts::new());
    assert_eq!(queue.proxy.problems(), Vec::<String>::new());
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn counting_is_exact_under_load() {
    let queue = Queue::new("crowded").await;
    queue.proxy.inject(Rule::on("SendMessageBatch", Fault::unavailable()).with_probability(0.3, 7));
    let sends = (0..100).map(|number| {
        let queue = &queue;
        async move { queue.try_send(&[&number.to_string(), "b"]).await.is_ok() }
    });
    let sent = futures_util::future::join_all(sends).await.into_iter().filter(|sent| *sent).count() as u64;
    assert_eq!(queue.proxy.counts()["SendMessageBatch"], count(100, 200, 0));
    assert_eq!(sent, 100 - queue.proxy.injected("SendMessageBatch"));
    assert!((10..90).contains(&sent), "{sent}");
    assert_eq!(queue.depth().await, [2 * sent, 0, 0]);
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn part_of_a_batch_fails_and_only_the_rest_is_forwarded() {
    let queue = Queue::new("partial").await;
    for (fault, sender_fault) in [(Fault::fail_entries(3), false), (Fault::refuse_entries(3), true)] {
        queue.proxy.inject(Rule::on("SendMessageBatch", fault).next(1));
        let answer = queue.send(&["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]).await;
        assert_eq!((answer.successful.len(), answer.failed.len()), (7, 3));
        assert!(answer.failed.iter().all(|failed| failed.sender_fault == sender_fault), "{answer:?}");
        let failed: BTreeSet<_> = answer.failed.iter().map(|failed| failed.id.clone()).collect();
        let received = queue.receive().await;
        let missing: BTreeSet<_> = ('a'..='j')
            .map(|body| body.to_string())
            .filter(|body| !bodies(&received).contains(&body.as_str()))
            .map(|body| format!("id-{body}"))
            .collect();
        assert_eq!(missing, failed);
        queue.delete(&received).await;
    }
    queue.inject("SendMessageBatch", Fault::fail_entries(10));
    let answer = queue.send(&["a", "b"]).await;
    assert_eq!((answer.successful.len(), answer.failed.len()), (0, 2), "all of them can fail");
    assert_eq!(queue.depth().await, [0, 0, 0]);
    assert_eq!(queue.proxy.injected("SendMessageBatch"), 3);
    assert_eq!(queue.proxy.counts()["SendMessageBatch"], count(3, 22, 0));
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn deletes_and_extensions_fail_for_some() {
    let queue = Queue::new("undeleted").await;
    queue.send(&["a", "b", "c", "d"]).await;
    let received = queue.receive().await;
    queue.proxy.inject(Rule::on("ChangeMessageVisibilityBatch", Fault::fail_entries(1)));
    let entries = received.iter().enumerate().map(|(position, message)| {
        let entry = ChangeMessageVisibilityBatchRequestEntry::builder().id(position.to_string());
        let handle = message.receipt_handle.as_deref().expect("it was received");
        entry.receipt_handle(handle).visibility_timeout(0).build().expect("it is whole")
    });
    let change = queue.client.change_message_visibility_batch().queue_url(&queue.url);
    let answer = change.set_entries(Some(entries.collect())).send().await.expect("the batch is taken");
    assert_eq!((answer.successful.len(), answer.failed.len()), (3, 1));
    assert_eq!(queue.depth().await, [3, 1, 0]);

    let received = queue.receive().await;
    queue.proxy.inject(Rule::on("DeleteMessageBatch", Fault::fail_entries(2)).next(1));
    let (deleted, failed) = queue.delete(&received).await;
    assert_eq!((deleted.len(), failed.len()), (1, 2));
    assert_eq!(queue.depth().await, [0, 3, 0], "these two, and the one that was never released");
    let again: Vec<_> =
        failed.iter().map(|id| received[id.parse::<usize>().expect("ours")].clone()).collect();
    assert_eq!(queue.delete(&again).await.0.len(), 2);
    assert_eq!(queue.depth().await, [0, 1, 0]);
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn errors_are_the_ones_that_the_sdk_knows() {
    let queue = Queue::new("throttled").await;
    queue.proxy.inject(Rule::on("SendMessageBatch", Fault::sqs_throttled()).next(1));
    let error = queue.try_send(&["a"]).await.expect_err("throttled");
    assert!(error.as_service_error().is_some_and(SendMessageBatchError::is_request_throttled), "{error:?}");
    for (fault, expected, status) in [
        (Fault::throttled(), "ThrottlingException", 400),
        (Fault::internal_error(), "InternalServerError", 500),
        (Fault::unavailable(), "ServiceUnavailable", 503),
    ] {
        queue.proxy.inject(Rule::on("SendMessageBatch", fault).next(1));
        let error = queue.try_send(&["a"]).await.expect_err(expected);
        assert_eq!(code(&error), Some(expected));
        assert_eq!(error.raw_response().map(|response| response.status().as_u16()), Some(status));
    }
    assert_eq!(queue.depth().await, [0, 0, 0], "nothing was forwarded");
    queue.send(&["a"]).await;
    assert_eq!(queue.depth().await, [1, 0, 0], "and then everything is");
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn calls_without_an_answer_were_forwarded_or_not() {
    let queue = Queue::new("silent").await;
    for (fault, forwarded, hangs) in [
        (Fault::Hang { forward: false }, 0, true),
        (Fault::Close { forward: false }, 0, false),
        (Fault::Hang { forward: true }, 1, true),
        (Fault::Close { forward: true }, 2, false),
    ] {
        queue.proxy.inject(Rule::on("SendMessageBatch", fault.clone()).next(1));
        let begun = Instant::now();
        let error = queue.try_send(&["a"]).await.expect_err("no answer");
        assert!(error.as_service_error().is_none(), "{fault:?}: {error:?}");
        assert_eq!(begun.elapsed() >= TIMEOUT, hangs, "{fault:?}");
        assert_eq!(queue.depth().await, [forwarded, 0, 0], "{fault:?}");
    }
    assert_eq!(queue.proxy.injected("SendMessageBatch"), 4);
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn a_forwarded_call_is_carried_out_although_its_client_has_given_up() {
    let queue = Queue::new("late").await;
    queue.proxy.set_latency(TIMEOUT + TIMEOUT / 4..=TIMEOUT + TIMEOUT / 4);
    queue.try_send(&["a"]).await.expect_err("too late");
    let carried_out = async {
        while queue.depth().await != [1, 0, 0] {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), carried_out).await.expect("it is carried out");
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn duplicates_come_later_under_another_handle_and_only_once() {
    for name in ["repeated", "repeated.fifo"] {
        let queue = Queue::new(name).await;
        // Nothing to duplicate yet: the rule is not used up.
        queue.proxy.inject(Rule::on("ReceiveMessage", Fault::Duplicate { messages: 1, delay_s: 1 }).next(1));
        assert!(queue.receive().await.is_empty());
        assert_eq!(queue.proxy.injected("ReceiveMessage"), 0);

        queue.send(&["a"]).await;
        let first = queue.receive().await;
        assert_eq!(bodies(&first), ["a"]);
        assert_eq!(queue.proxy.injected("ReceiveMessage"), 1);
        assert!(first[0].message_attributes.is_none(), "it was not asked for: {first:?}");
        assert_eq!(first[0].attributes.as_ref().map(std::collections::HashMap::len), Some(1), "{first:?}");
        queue.inject("ReceiveMessage", Fault::Duplicate { messages: 10, delay_s: 1 });
        queue.delete(&first).await;
        let again = queue.client.receive_message().queue_url(&queue.url).wait_time_seconds(10);
        let again = again.message_attribute_names("ki.*").visibility_timeout(60);
        let config = aws_sdk_sqs::config::Config::builder().timeout_config(TimeoutConfig::disabled());
        let again = again.customize().config_override(config).send().await.expect("ministack answers");
        let again = again.messages.expect("the duplicate has come");
        assert_eq!(bodies(&again), ["a"]);
        assert_eq!(again[0].message_id, first[0].message_id);
        assert_ne!(again[0].receipt_handle, first[0].receipt_handle);
        let attributes = again[0].message_attributes.as_ref().expect("they were asked for");
        assert_eq!(attributes["kind"].string_value.as_deref(), Some("batch"));
        queue.delete(&again).await;
        assert_eq!(queue.depth().await, [0, 0, 0], "a duplicate is not duplicated");
        assert_eq!(queue.proxy.problems(), Vec::<String>::new());
    }
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn messages_are_reordered() {
    let names: Vec<String> = ('a'..='j').map(|body| body.to_string()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let queue = Queue::new("mixed").await;
    queue.send(&names).await;
    let received = queue.receive().await;
    assert_eq!(bodies(&received), names, "ministack itself keeps the order");
    queue.delete(&received).await;

    queue.proxy.inject(Rule::on("ReceiveMessage", Fault::Reorder).next(1));
    queue.send(&names).await;
    let received = queue.receive().await;
    assert_ne!(bodies(&received), names);
    assert_eq!(bodies(&received).into_iter().collect::<BTreeSet<_>>(), names.iter().copied().collect());
    queue.delete(&received).await;

    queue.proxy.inject(Rule::on("SendMessageBatch", Fault::Scatter { delay_s_max: 5 }).next(1));
    queue.send(&names).await;
    let [visible, _, delayed] = queue.depth().await;
    assert!(visible > 0 && delayed > 0 && visible + delayed == 10, "{visible} {delayed}");
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn visibility_expires_behind_the_receivers_back() {
    let queue = Queue::new("expired").await;
    queue.send(&["a", "b", "c"]).await;
    let after = Duration::from_secs(1);
    queue.proxy.inject(Rule::on("ReceiveMessage", Fault::ExpireVisibility { messages: 2, after }).next(1));
    let first = queue.receive().await;
    assert_eq!((first.len(), queue.depth().await), (3, [0, 3, 0]));
    let again = queue.receive_by(&queue.direct, 10).await;
    assert_eq!(bodies(&again), ["a", "b"]);
    let counts: Vec<_> = again
        .iter()
        .map(|message| {
            let attributes = message.attributes.as_ref().expect("they were asked for");
            attributes[&MessageSystemAttributeName::ApproximateReceiveCount].as_str()
        })
        .collect();
    assert_eq!(counts, ["2", "2"]);
    let (deleted, failed) = queue.delete(&first).await;
    assert_eq!((deleted.len(), failed.len()), (1, 2), "ministack forgets the old handles");
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn rules_hold_when_and_as_often_as_they_say() {
    let queue = Queue::new("ruled").await;
    let outcomes = async |rules: Vec<Rule>, calls: usize| {
        queue.proxy.clear_faults();
        for rule in rules {
            queue.proxy.inject(rule);
        }
        let mut outcomes = String::new();
        for _ in 0..calls {
            let outcome = queue.try_send(&["a"]).await;
            outcomes.push(if outcome.is_ok() { '+' } else { '-' });
        }
        outcomes
    };
    let rule = || Rule::on("SendMessageBatch", Fault::unavailable());
    assert_eq!(outcomes(vec![rule().next(2)], 4).await, "--++");
    assert_eq!(outcomes(vec![rule().skip(1).next(1)], 4).await, "+-++");
    assert_eq!(outcomes(vec![rule()], 3).await, "---");
    assert_eq!(outcomes(vec![Rule::on("DeleteMessageBatch", Fault::unavailable())], 2).await, "++");
    let random = outcomes(vec![rule().with_probability(0.5, 1)], 40).await;
    assert!(random.contains('+') && random.contains('-'), "{random}");
    assert_eq!(outcomes(vec![rule().with_probability(0.5, 1)], 40).await, random, "the seed repeats it");
    assert_ne!(outcomes(vec![rule().with_probability(0.5, 2)], 40).await, random);

    // Two rules at once; the one that could not happen because the other ended the call is not used up.
    let both = vec![Rule::on("SendMessageBatch", Fault::fail_entries(1)).next(1), rule().next(1)];
    assert_eq!(outcomes(both, 1).await, "-");
    assert_eq!(queue.send(&["a", "b"]).await.failed.len(), 1);
    assert_eq!(queue.send(&["a", "b"]).await.failed.len(), 0);
}

#[tokio::test]
#[ignore = "needs POSTRIDER_MINISTACK, which script/test sets"]
async fn latency_is_added() {
    let queue = Queue::new("far").await;
    queue.proxy.set_latency(Duration::from_millis(100)..=Duration::from_millis(150));
    let begun = Instant::now();
    queue.send(&["a"]).await;
    queue.send(&["b"]).await;
    assert!(begun.elapsed() >= Duration::from_millis(200));
}
