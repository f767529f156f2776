use std::time::Duration;

use postrider_actors::{
    model::{
        ids::{BundleId, FileId, MessageId, RequestId},
        outcome::{Outcome, Reason},
        time::UnixMs,
    },
    ports::{Webhook as _, WebhookRequest},
};

use super::*;
use postrider_http::webhook::{HttpWebhook, WebhookKeys, WebhookSettings};
use postrider_settings::{Keys as _, Retry};

struct World {
    address: SocketAddr,
    stop: Arc<Notify>,
    served: tokio::task::JoinHandle<anyhow::Result<Counts>>,
}

impl World {
    async fn start(change: impl FnOnce(&mut ReceiverSettings)) -> Self {
        let mut settings = ReceiverSettings {
            listen: ([127, 0, 0, 1], 0).into(),
            secrets: vec!["s".to_owned().into()],
            fail_rate: 0.0,
            fail_status: StatusCode::SERVICE_UNAVAILABLE,
            retry_after: None,
            seed: 1,
            capacity: Capacity::default(),
            log: None,
            log_bodies: false,
            answer_ids: false,
            results: false,
        };
        change(&mut settings);
        let receiver = Receiver::bind(settings).await.unwrap();
        let address = receiver.local_addr().unwrap();
        let stop = Arc::new(Notify::new());
        let stopped = Arc::clone(&stop);
        let served = tokio::spawn(receiver.serve(async move { stopped.notified().await }));
        Self { address, stop, served }
    }

    fn webhook(&self, secret: &str) -> HttpWebhook {
        self.webhook_with(secret, |_| {})
    }

    fn webhook_with(&self, secret: &str, change: impl FnOnce(&mut WebhookKeys)) -> HttpWebhook {
        let url = format!("http://{}/hook?a=b", self.address).parse::<url::Url>().unwrap().into();
        let allow = vec!["127.0.0.1/32".parse().unwrap()];
        let mut keys = WebhookKeys { url, allow, ..WebhookKeys::declared() };
        change(&mut keys);
        let secrets = vec![secret.to_owned().into()];
        HttpWebhook::new(WebhookSettings::new(keys, secrets, &Retry::declared())).unwrap()
    }

    async fn stop(self) -> anyhow::Result<Counts> {
        self.stop.notify_one();
        self.served.await.unwrap()
    }
}

async fn send(webhook: &HttpWebhook, row: u64, body: &[u8]) -> Outcome {
    let id = MessageId { file: FileId([7; 16]), row };
    webhook.send(WebhookRequest::of_one(&id, UnixMs(now_ms()), "text/plain", body)).await.outcome
}

#[tokio::test]
async fn each_request_is_verified_counted_and_logged_with_its_digest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let world = World::start(|settings| {
        settings.log = Some(path.clone());
        settings.log_bodies = true;
    })
    .await;
    assert_eq!(send(&world.webhook("s"), 1, b"hello \xff\"").await, Outcome::Sent { status: 200 });
    let refused = send(&world.webhook("other"), 2, b"x").await;
    assert_eq!(refused, Outcome::Permanent { status: 401, reason: Reason::Status });

    let log = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["id"], format!("msg_{}_1", "07".repeat(16)));
    assert_eq!(lines[0]["path"], "/hook");
    assert_eq!(lines[0]["bytes"], 8);
    assert_eq!(lines[0]["status"], 200);
    assert_eq!(lines[0]["verified"], true);
    assert_eq!(lines[0]["body"], "hello \u{fffd}\"");
    // As `sha256sum` prints it.
    let digest = "2be4b3447b32c1705318cb13d2d90506ed95021bba95bcf8340e4ad7220b12aa";
    assert_eq!(lines[0]["body_sha256"], digest);
    assert_eq!((&lines[1]["status"], &lines[1]["verified"]), (&401.into(), &false.into()));

    let counts = world.stop().await.unwrap();
    assert_eq!((counts.requests, counts.accepted, counts.unverified), (2, 1, 1));
    assert_eq!(counts.bytes, 9);
    assert!(counts.first_at <= counts.last_at && counts.first_at.is_some());
}

#[tokio::test]
async fn failures_carry_the_status_and_retry_after_that_were_asked_for() {
    let world = World::start(|settings| {
        settings.fail_rate = 1.0;
        settings.fail_status = StatusCode::TOO_MANY_REQUESTS;
        settings.retry_after = Some(HeaderValue::from_static("7"));
    })
    .await;
    let expected =
        Outcome::Retryable { status: 429, reason: Reason::Status, retry_after: Some(Duration::from_secs(7)) };
    assert_eq!(send(&world.webhook("s"), 1, b"x").await, expected);
    assert_eq!(world.stop().await.unwrap().failed, 1);
}

#[tokio::test]
async fn a_request_is_logged_before_it_is_answered_and_finished_at_a_stop() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let world = World::start(|settings| {
        settings.log = Some(path.clone());
        settings.capacity.latency_ms = 300;
    })
    .await;
    let webhook = world.webhook("s");
    let sending = tokio::spawn(async move { send(&webhook, 1, b"x").await });
    while std::fs::read_to_string(&path).unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!sending.is_finished(), "answered before the latency was over");
    assert_eq!(world.stop().await.unwrap().accepted, 1);
    assert_eq!(sending.await.unwrap(), Outcome::Sent { status: 200 });
}

#[tokio::test]
async fn a_log_that_cannot_be_written_stops_the_receiver_and_accepts_nothing() {
    let world = World::start(|settings| settings.log = Some("/dev/full".into())).await;
    let outcome = send(&world.webhook("s"), 1, b"x").await;
    assert!(matches!(outcome, Outcome::Retryable { status: 500, .. }), "{outcome:?}");
    let error = world.served.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("can't write the log"), "{error}");
}

#[tokio::test]
async fn bodies_are_bounded() {
    let world = World::start(|_| {}).await;
    let webhook = world.webhook("s");
    assert_eq!(send(&webhook, 1, &vec![b'x'; BODY_BYTES_MAX]).await, Outcome::Sent { status: 200 });
    let outcome = send(&webhook, 2, &vec![b'x'; BODY_BYTES_MAX + 1]).await;
    assert_eq!(outcome, Outcome::Permanent { status: 413, reason: Reason::Status });
    assert_eq!(world.stop().await.unwrap().requests, 1);
}

#[tokio::test]
async fn stats_are_served_and_other_methods_refused() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let world = World::start(|_| {}).await;
    let get = async |path: &str| {
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    send(&world.webhook("s"), 1, b"abc").await;
    let stats = get("/stats").await;
    let counts: Counts = serde_json::from_str(stats.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!((counts.requests, counts.accepted, counts.bytes), (1, 1, 3));
    assert!(get("/").await.starts_with("HTTP/1.1 405"));
}

async fn send_bundle(
    webhook: &HttpWebhook,
    rows: std::ops::RangeInclusive<u64>,
) -> postrider_actors::ports::Answer {
    let messages: Vec<_> = rows.map(|row| MessageId { file: FileId([7; 16]), row }).collect();
    let bodies: Vec<_> = messages.iter().map(|id| format!(r#"{{"id":"{id}"}}"#)).collect();
    let body = format!("[{}]", bodies.join(","));
    let id = RequestId::Bundle(BundleId::derive(&messages));
    let (at, content_type) = (UnixMs(now_ms()), "application/json");
    webhook
        .send(WebhookRequest {
            id,
            messages: &messages,
            at,
            content_type,
            body: body.as_bytes(),
            trace: None,
        })
        .await
}

#[tokio::test]
async fn a_bundle_is_one_request_and_each_message_of_it_counts_and_has_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let world = World::start(|settings| settings.log = Some(path.clone())).await;
    let answer = send_bundle(&world.webhook("s"), 1..=3).await;
    assert_eq!((answer.outcome, answer.items), (Outcome::Sent { status: 200 }, vec![]));
    let log = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[1]["id"], format!("msg_{}_2", "07".repeat(16)));
    assert_eq!((&lines[1]["of"], &lines[1]["bytes"]), (&3.into(), &47.into()));
    assert!(
        lines[0]["bundle"].as_str().unwrap().starts_with("bundle_")
            && lines[0]["bundle"] == lines[2]["bundle"]
    );
    let counts = world.stop().await.unwrap();
    assert_eq!((counts.requests, counts.accepted, counts.failed), (1, 3, 0));
}

#[tokio::test]
async fn each_message_of_a_bundle_has_a_status_of_its_own_if_asked_for() {
    let world = World::start(|settings| {
        (settings.results, settings.answer_ids) = (true, true);
        settings.fail_rate = 0.5;
    })
    .await;
    let webhook = world.webhook_with("s", |keys| {
        keys.results = Some("/items".parse().unwrap());
        keys.provider_id = Some("/message/id".parse().unwrap());
    });
    let answer = send_bundle(&webhook, 1..=40).await;
    assert_eq!(answer.items.len(), 40);
    let sent: Vec<_> =
        answer.items.iter().filter(|item| item.outcome == Outcome::Sent { status: 200 }).collect();
    assert!((5..36).contains(&sent.len()), "{}", sent.len());
    assert!(sent.iter().all(|item| item.provider_id.as_deref().is_some_and(|id| id.starts_with("prv-"))));
    let counts = world.stop().await.unwrap();
    assert_eq!(
        (counts.requests, counts.accepted as usize, counts.failed as usize),
        (1, sent.len(), 40 - sent.len())
    );
}
