//! The receipt listener over real sockets: what it takes, what it refuses, and whom it does not wait for.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use postrider_actors::{
    flow::Bell,
    metrics::ReceiptMetrics,
    model::{
        receipt_format::{FieldPath, ReceiptFormat, ReceiptMapping, StatusMeaning, UnknownStatus},
        time::UnixMs,
    },
    ports::{Arrival, Clock as _, ReceiptLedger, SourceCursor, StoreError, Taken},
    testing::{FakeClock, MemoryReceipts, RowReader as _, figure},
};
use postrider_http::{
    receipts::{BODY_BYTES_MAX, Credentials, HttpReceipts, HttpSource, RECEIPTS_MAX, Sink},
    signature::SigningKey,
};
use postrider_net::serving::Serving;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Semaphore,
    time::Instant,
};

const NOW: UnixMs = UnixMs(1_700_000_000_000);
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const OLD_SECRET: &str = "whsec_c2VjcmV0cyBhcmUgcm90YXRlZA==";
const TOKEN: &str = "0123456789abcdef";

fn mapping() -> ReceiptMapping {
    let path = |text: &str| FieldPath::parse(text).unwrap();
    ReceiptMapping {
        message_id: None,
        provider_id: Some(path("message.id")),
        event_id: Some(path("event")),
        status: path("status"),
        time: Some(path("at")),
        carrier: Some(path("carrier")),
        response: None,
        sent_at: None,
        price: None,
        statuses: BTreeMap::from([
            ("DELIVERED".to_owned(), StatusMeaning::Delivered),
            ("UNDELIV".to_owned(), StatusMeaning::Failed),
            ("READ".to_owned(), StatusMeaning::Ignored),
        ]),
        otherwise: UnknownStatus::Reject,
    }
}

/// A receipt as JSON.
fn receipt(number: u32) -> Value {
    json!({ "event": format!("e-{number}"), "message": { "id": format!("SM{number}") }, "status": "DELIVERED" })
}

fn receipts(count: usize) -> Value {
    (0..count as u32).map(receipt).collect()
}

struct World {
    address: SocketAddr,
    serving: Serving,
    clock: Arc<FakeClock>,
    taken: Bell,
    metrics: Registry,
}

impl World {
    fn start(ledger: Arc<dyn ReceiptLedger>) -> Self {
        Self::start_bounded(ledger, 500_000)
    }

    fn start_bounded(ledger: Arc<dyn ReceiptLedger>, inbox_max: u64) -> Self {
        let secrets = [SECRET.to_owned().into(), OLD_SECRET.to_owned().into()];
        let mut registry = Registry::default();
        let metrics = ReceiptMetrics::register(&mut registry);
        let source = |name: &str, credentials| HttpSource {
            format: ReceiptFormat::new(name.into(), mapping()).unwrap(),
            destination: "sms".into(),
            credentials,
            metrics: metrics.source(name),
        };
        let sources = vec![
            source("signed", Credentials::signature(&secrets).unwrap()),
            source("bearer", Credentials::bearer(&[TOKEN.to_owned().into()]).unwrap()),
        ];
        let clock = Arc::new(FakeClock::at(NOW));
        let taken = Bell::default();
        let sink = Sink { ledger, inbox_max, taken: taken.clone(), clock: clock.clone() };
        let bound = HttpReceipts::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = bound.address();
        let serving = bound.serve(sources, sink).unwrap();
        Self { address, serving, clock, taken, metrics: registry }
    }

    /// Whether receipts were announced since the last check.
    async fn was_rung(&self) -> bool {
        let begun = Instant::now();
        self.taken.wait(Duration::from_millis(50)).await;
        begun.elapsed() < Duration::from_millis(50)
    }

    async fn post(&self, request: Request) -> Answer {
        exchange(self.address, &request.bytes(self.clock.wall())).await
    }
}

/// A request in the making.
#[derive(Clone)]
struct Request {
    method: &'static str,
    path: &'static str,
    headers: Vec<(&'static str, String)>,
    sign: Option<&'static str>,
    at: Option<u64>,
    body: Vec<u8>,
}

impl Request {
    fn signed(body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        let headers = vec![
            ("content-length", body.len().to_string()),
            ("content-type", "application/json; charset=utf-8".to_owned()),
        ];
        Self { method: "POST", path: "/receipts/signed", headers, sign: Some(SECRET), at: None, body }
    }

    fn bearer(body: impl Into<Vec<u8>>) -> Self {
        let signed = Self { path: "/receipts/bearer", sign: None, ..Self::signed(body) };
        signed.with("authorization", format!("Bearer {TOKEN}"))
    }

    /// With this header in place of one of the same name.
    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self = self.without(name);
        self.headers.push((name, value.into()));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(other, _)| *other != name);
        self
    }

    fn bytes(&self, now: UnixMs) -> Vec<u8> {
        let start = format!("{} {} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n", self.method, self.path);
        let mut lines = vec![start];
        if let Some(secret) = self.sign {
            let at = self.at.unwrap_or(now.0 / 1000).to_string();
            let mut signature = Vec::new();
            let key = SigningKey::new(&secret.to_owned().into()).unwrap();
            key.sign(b"req-1", at.as_bytes(), &self.body, &mut signature);
            let signature = String::from_utf8(signature).unwrap();
            lines.push(format!(
                "webhook-id: req-1\r\nwebhook-timestamp: {at}\r\nwebhook-signature: {signature}\r\n"
            ));
        }
        lines.extend(self.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")));
        lines.push("\r\n".to_owned());
        let mut bytes = lines.concat().into_bytes();
        bytes.extend(&self.body);
        bytes
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Value,
}

/// Sends bytes and reads the answer.
async fn exchange(address: SocketAddr, bytes: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may answer and close before it has read all.
    let _ = stream.write_all(bytes).await;
    read_answer(&mut stream).await.expect("an answer")
}

/// One answer up to the end of the stream; `None` at its end.
async fn read_answer(stream: &mut TcpStream) -> Option<Answer> {
    let mut bytes = Vec::new();
    // A reset after the answer: the server did not want the rest of the request.
    let _ = stream.read_to_end(&mut bytes).await;
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Some(Answer {
        status,
        head: head.to_lowercase(),
        body: serde_json::from_str(body).unwrap_or(Value::Null),
    })
}

#[tokio::test]
async fn objects_arrays_and_lines_are_taken_and_known_when_they_come_again() {
    let ledger = Arc::new(MemoryReceipts::new());
    let world = World::start(ledger.clone());
    let one = world.post(Request::signed(receipt(1).to_string())).await;
    assert_eq!((one.status, &one.body), (200, &json!({"taken":1,"known":0,"ignored":0,"rejected":[]})));
    assert!(world.was_rung().await);

    let several = world.post(Request::bearer(receipts(10).to_string())).await;
    assert_eq!(several.body["taken"], 10, "another source: its events are others");
    let again = world.post(Request::bearer(receipts(12).to_string())).await;
    assert_eq!(again.body, json!({"taken":2,"known":10,"ignored":0,"rejected":[]}));

    let lines = format!("{}\r\n\n  {}\n", receipt(1), receipt(2));
    let lines = world.post(Request::signed(lines).with("content-type", "application/x-ndjson")).await;
    assert_eq!(lines.body, json!({"taken":1,"known":1,"ignored":0,"rejected":[]}));
    assert!(world.was_rung().await);

    let none = world.post(Request::signed("[]")).await;
    assert_eq!((none.status, &none.body["taken"]), (200, &json!(0)));
    assert!(!world.was_rung().await, "nothing new");
    assert_eq!(ledger.waiting().await.unwrap(), 14);
    let mut metrics = String::new();
    prometheus_client::encoding::text::encode(&mut metrics, &world.metrics).unwrap();
    for line in [
        "receipts_total{source=\"signed\",outcome=\"new\"} 2",
        "receipts_total{source=\"bearer\",outcome=\"known\"} 10",
        "receipt_requests_total{source=\"signed\",status=\"200\"} 3",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[tokio::test]
async fn f52_what_is_wrong_with_one_receipt_keeps_no_other_back() {
    let ledger = Arc::new(MemoryReceipts::new());
    let world = World::start(ledger.clone());
    let mut items: Vec<_> = (0..RECEIPTS_MAX as u32).map(receipt).collect();
    items[3]["message"]["id"] = "a\u{0}b".into();
    items[500]["status"] = "GONE".into();
    items[501]["status"] = "READ".into();
    items[999]["message"]["id"] = "x".repeat(201).into();
    let answer = world.post(Request::signed(Value::from(items.clone()).to_string())).await;
    assert_eq!(
        (answer.status, &answer.body["taken"], &answer.body["ignored"]),
        (200, &json!(996), &json!(1))
    );
    let rejected: Vec<_> = answer.body["rejected"].as_array().unwrap().iter().map(|r| &r["item"]).collect();
    assert_eq!(rejected, [3, 500, 999]);
    for (index, expected) in ["message.id", "GONE", "message.id"].iter().enumerate() {
        let reason = answer.body["rejected"][index]["reason"].as_str().unwrap();
        assert!(reason.contains(expected), "{reason}");
    }
    assert_eq!((ledger.waiting().await.unwrap(), ledger.tally().await.rejects), (996, 3));
    let mut exported = String::new();
    prometheus_client::encoding::text::encode(&mut exported, &world.metrics).unwrap();
    let counted = "receipts_total{source=\"signed\",outcome=\"ignored\"} 1";
    assert!(exported.contains(counted), "{exported}");

    let lines = format!("{}\nnot json\n{{\"event\":1}}\n", receipt(7));
    let answer = world.post(Request::bearer(lines).with("content-type", "application/jsonl")).await;
    assert_eq!((answer.status, &answer.body["taken"]), (200, &json!(1)));
    assert_eq!(
        (&answer.body["rejected"][0]["item"], &answer.body["rejected"][1]["item"]),
        (&json!(1), &json!(2))
    );
    figure(
        "1,000 receipts, 1 with NUL, 1 with an id of 201 bytes, 1 with an unknown status: 3 rejected, 996 taken, 1 ignored",
    );
}

#[tokio::test]
async fn what_can_t_be_taken_is_refused_with_its_reason() {
    let ledger = Arc::new(MemoryReceipts::new());
    let world = World::start(ledger.clone());
    let good = || Request::signed(receipt(1).to_string());
    let chunked = |body: &str| {
        let framed = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
        // Signed as it is framed: refused for its length before anybody looks.
        Request::bearer(framed).without("content-length").with("transfer-encoding", "chunked")
    };
    let long = " ".repeat(BODY_BYTES_MAX + 1);
    for (request, status, says) in [
        (Request { path: "/receipts/other", ..good() }, 404, "no receipts"),
        (Request { path: "/receipts/", ..good() }, 404, "no receipts"),
        (Request { path: "/", ..good() }, 404, "no receipts"),
        (Request { path: "/receipts/signed/", ..good() }, 404, "no receipts"),
        (Request { method: "GET", ..good() }, 405, "POST"),
        (Request { method: "PUT", ..good() }, 405, "POST"),
        (Request::signed("").without("content-length"), 411, "length"),
        (good().with("content-type", "text/plain"), 415, "application/json"),
        (good().with("content-encoding", "gzip"), 415, "compressed"),
        (Request::bearer(long.clone()), 413, "1048576 bytes"),
        (chunked(&long), 413, "1048576 bytes"),
        (Request::signed(receipts(RECEIPTS_MAX + 1).to_string()), 413, "1001 receipts"),
        (
            Request::signed("{}\n".repeat(RECEIPTS_MAX + 1)).with("content-type", "application/x-ndjson"),
            413,
            "1001",
        ),
        (Request::signed(""), 400, "empty"),
        (Request::signed("true"), 400, "neither"),
        (Request::signed("[{}"), 400, "invalid JSON"),
        (Request::signed("{\"event\":\"e-1\","), 400, "invalid JSON"),
        (Request::signed(format!("{0}{0}", receipt(1))), 400, "invalid JSON"),
        (Request::signed(vec![b'"', 0xff, b'"']), 400, "UTF-8"),
    ] {
        let what = format!("{} {} {:?}", request.method, request.path, request.headers);
        let answer = world.post(request).await;
        assert_eq!(answer.status, status, "{what}: {}", answer.body);
        assert!(answer.body["error"].as_str().unwrap().contains(says), "{what}: {}", answer.body);
        assert_eq!(answer.head.contains("\r\nallow: post"), status == 405);
    }
    // A cut body: its length promises more. The sender is gone; whether it gets an answer does not matter.
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(&good().with("content-length", "5000").bytes(NOW)).await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(read_answer(&mut stream).await.is_none_or(|answer| answer.status == 400));
    assert_eq!(ledger.writes(), 0);
    let mut padded = receipt(1).to_string();
    padded.push_str(&" ".repeat(BODY_BYTES_MAX - padded.len()));
    let at_the_limit = Request::bearer(padded);
    assert_eq!(world.post(at_the_limit).await.body["taken"], 1);
    let body = receipts(RECEIPTS_MAX).to_string();
    assert_eq!(world.post(chunked(&body)).await.body["taken"], RECEIPTS_MAX - 1);
}

#[tokio::test]
async fn f55_forged_and_stale_requests_are_refused_and_replayed_ones_change_nothing() {
    let ledger = Arc::new(MemoryReceipts::new());
    let world = World::start(ledger.clone());
    let good = || Request::signed(receipt(1).to_string());
    let now = NOW.0 / 1000;
    for (request, status) in [
        (Request { sign: None, ..good() }, 401),
        (Request { sign: Some("whsec_b3RoZXI="), ..good() }, 403),
        (Request { at: Some(now - 301), ..good() }, 403),
        (Request { at: Some(now + 301), ..good() }, 403),
        (Request { sign: None, ..good() }.with("authorization", format!("Bearer {TOKEN}")), 401),
        (Request { path: "/receipts/bearer", ..good() }, 401),
        (Request::bearer("{}").without("authorization"), 401),
        (Request::bearer("{}").with("authorization", "Bearer 0123456789abcdeX"), 403),
    ] {
        let what = format!("{:?} {:?}", request.path, request.headers);
        let answer = world.post(request).await;
        assert_eq!(answer.status, status, "{what}: {}", answer.body);
        assert_eq!(answer.head.contains("\r\nwww-authenticate: "), status == 401, "{}", answer.head);
        assert!(!answer.body.to_string().contains("0123456789"), "I10: {}", answer.body);
    }
    assert_eq!(ledger.writes(), 0, "nothing was stored");

    let captured = Request { sign: Some(OLD_SECRET), at: Some(now - 300), ..good() };
    assert_eq!(world.post(captured.clone()).await.body["taken"], 1, "at the edge, by the older secret");
    assert_eq!(
        world.post(captured.clone()).await.body,
        json!({"taken":0,"known":1,"ignored":0,"rejected":[]})
    );
    world.clock.advance(Duration::from_secs(1));
    assert_eq!(world.post(captured).await.status, 403);
    assert_eq!(ledger.waiting().await.unwrap(), 1);
    figure("8 forged or stale requests: 401 or 403, 0 writes; a replay: 0 taken");
}

/// Any single bit of a genuine request, its head and its body: what comes of it is never more than the
/// genuine receipts.
#[tokio::test]
async fn f55_no_flipped_bit_brings_anything_new() {
    let ledger = Arc::new(MemoryReceipts::new());
    let world = World::start(ledger.clone());
    let genuine = Request::signed(receipts(2).to_string()).bytes(NOW);
    assert_eq!(exchange(world.address, &genuine).await.body["taken"], 2);
    let body_at = genuine.len() - receipts(2).to_string().len();
    let mut refused = 0;
    for bit in 0..genuine.len() * 8 {
        let mut flipped = genuine.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        let _ = stream.write_all(&flipped).await;
        let _ = stream.shutdown().await;
        match read_answer(&mut stream).await {
            Some(Answer { status: 200, body, .. }) => {
                assert!(bit / 8 < body_at, "a bit of the body");
                assert_eq!(body, json!({"taken":0,"known":2,"ignored":0,"rejected":[]}), "bit {bit}");
            }
            Some(Answer { status, .. }) => {
                assert!((400..500).contains(&status), "bit {bit}: {status}");
                refused += 1;
            }
            None => refused += 1,
        }
    }
    assert!(refused > (genuine.len() - body_at) * 8, "{refused}");
    assert_eq!((ledger.waiting().await.unwrap(), ledger.tally().await.rejects), (2, 0));
    figure(format!("{} flipped bits: {refused} refused, the others without effect", genuine.len() * 8));
}

#[tokio::test]
async fn a_store_that_is_away_is_said_and_nothing_is_lost_by_it() {
    let ledger = Arc::new(MemoryReceipts::new());
    let world = World::start(ledger.clone());
    let request = || Request::signed(receipts(5).to_string());
    ledger.set_down(true);
    let down = world.post(request()).await;
    assert_eq!(down.status, 503);
    assert!(down.head.contains("\r\nretry-after: 10"), "{}", down.head);
    ledger.set_down(false);
    ledger.lose_answers(1);
    assert_eq!(world.post(request()).await.status, 503, "it may have happened");
    assert_eq!(world.post(request()).await.body, json!({"taken":0,"known":5,"ignored":0,"rejected":[]}));
    assert_eq!(ledger.waiting().await.unwrap(), 5);
}

/// A ledger that takes nothing until the test allows it.
struct Slow {
    ledger: MemoryReceipts,
    gate: Semaphore,
    asked: Semaphore,
}

impl Slow {
    fn new() -> Arc<Self> {
        Arc::new(Self { ledger: MemoryReceipts::new(), gate: Semaphore::new(0), asked: Semaphore::new(0) })
    }
}

#[async_trait]
impl ReceiptLedger for Slow {
    async fn take(&self, arrival: Arrival) -> Result<Taken, StoreError> {
        self.asked.add_permits(1);
        self.gate.acquire().await.unwrap().forget();
        self.ledger.take(arrival).await
    }

    async fn record(&self, _: Vec<postrider_actors::model::record::MessageRecord>) -> Result<(), StoreError> {
        unreachable!("a listener takes and does nothing else")
    }

    async fn cursor(&self, _: &str) -> Result<Option<SourceCursor>, StoreError> {
        unreachable!()
    }

    async fn apply(
        &self,
        _: usize,
        _: usize,
        _: UnixMs,
    ) -> Result<postrider_actors::ports::Applied, StoreError> {
        unreachable!()
    }

    async fn waiting(&self) -> Result<u64, StoreError> {
        self.ledger.waiting().await
    }

    async fn parked(&self) -> Result<u64, StoreError> {
        unreachable!()
    }

    async fn rejoin(&self, _: usize) -> Result<usize, StoreError> {
        unreachable!()
    }

    async fn orphan(&self, _: UnixMs, _: usize) -> Result<usize, StoreError> {
        unreachable!()
    }

    async fn expire(&self, _: &str, _: UnixMs, _: usize, _: UnixMs) -> Result<usize, StoreError> {
        unreachable!()
    }

    async fn changes(
        &self,
        _: Option<u64>,
        _: usize,
    ) -> Result<Vec<postrider_actors::ports::StatusChange>, StoreError> {
        unreachable!()
    }

    async fn forget_changes(&self, _: &[u64]) -> Result<(), StoreError> {
        unreachable!()
    }

    async fn retire(&self, _: UnixMs, _: usize) -> Result<usize, StoreError> {
        unreachable!()
    }
}

#[tokio::test]
async fn the_2xx_waits_for_the_commit_and_a_stop_for_the_answer() {
    let ledger = Slow::new();
    let world = World::start(ledger.clone());
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(&Request::signed(receipts(3).to_string()).bytes(NOW)).await.unwrap();
    ledger.asked.acquire().await.unwrap().forget();
    let early = tokio::time::timeout(Duration::from_millis(100), stream.read_u8()).await;
    assert!(early.is_err(), "answered before it was durable");

    // One that is idle and one that has sent half a request do not hold the stop up.
    let idle = TcpStream::connect(world.address).await.unwrap();
    let stopping = tokio::spawn(world.serving.stop(Duration::from_secs(5)));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!stopping.is_finished(), "a request is in progress");
    ledger.gate.add_permits(1);
    let answer = read_answer(&mut stream).await.unwrap();
    assert_eq!((answer.status, &answer.body["taken"]), (200, &json!(3)));
    assert!(stopping.await.unwrap(), "all connections have ended");
    assert!(TcpStream::connect(world.address).await.is_err(), "nobody listens any more");
    drop(idle);
}

#[tokio::test]
async fn a_store_that_never_answers_costs_the_sender_15_seconds() {
    let world = World::start(Slow::new());
    let begun = Instant::now();
    assert_eq!(world.post(Request::signed(receipts(3).to_string())).await.status, 503);
    assert_eq!(begun.elapsed().as_secs(), 15);
}

#[tokio::test]
async fn slow_senders_lose_their_place() {
    let world = World::start(Arc::new(MemoryReceipts::new()));
    let bytes = Request::signed(receipts(3).to_string()).bytes(NOW);
    let body_at = memchr::memmem::find(&bytes, b"\r\n\r\n").unwrap() + 4;
    for (at_once, seconds_max, status) in [(0, 4, Some(408)), (20, 4, Some(408)), (body_at, 18, Some(408))] {
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        stream.write_all(&bytes[..at_once]).await.unwrap();
        let begun = Instant::now();
        let (mut reading, mut writing) = stream.into_split();
        let bytes = bytes.clone();
        let trickle = tokio::spawn(async move {
            for byte in &bytes[at_once..] {
                tokio::time::sleep(Duration::from_secs(1)).await;
                if at_once > 0 && writing.write_all(&[*byte]).await.is_err() {
                    break;
                }
            }
        });
        let mut answer = Vec::new();
        let _ = reading.read_to_end(&mut answer).await;
        trickle.abort();
        let status_seen =
            answer.get(9..12).map(|digits| std::str::from_utf8(digits).unwrap().parse().unwrap());
        assert_eq!(status_seen, status, "{:?}", String::from_utf8_lossy(&answer));
        assert!(begun.elapsed() <= Duration::from_secs(seconds_max), "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn f55_slow_forgers_hold_no_genuine_sender_up() {
    let ledger = Arc::new(MemoryReceipts::new());
    let world = World::start(ledger.clone());
    let mut forgers = Vec::new();
    for _ in 0..64 {
        let forged = Request { sign: Some("whsec_b3RoZXI="), ..Request::signed(receipts(3).to_string()) };
        let bytes = forged.bytes(NOW);
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        stream.write_all(&bytes[..bytes.len() - 1]).await.unwrap();
        forgers.push(stream);
    }
    let begun = Instant::now();
    assert_eq!(world.post(Request::signed(receipts(3).to_string())).await.body["taken"], 3);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    figure(format!("64 forgers in the middle of a body: answered after {} ms", begun.elapsed().as_millis()));
}

/// Whoever opens connections without credentials keeps neither a peer of its own address out, nor one that has brought
/// a request before.
#[tokio::test]
async fn f55_idle_and_slow_connections_without_credentials_hold_nobody_up() {
    let world = World::start(Arc::new(MemoryReceipts::new()));
    let forged =
        Request { sign: Some("whsec_b3RoZXI="), ..Request::signed(receipts(3).to_string()) }.bytes(NOW);
    let body_at = memchr::memmem::find(&forged, b"\r\n\r\n").unwrap() + 4;
    let text = receipt(1).to_string();
    let head = format!(
        "POST /receipts/bearer HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: {}\r\n\r\n{text}",
        text.len()
    );
    for at_once in [0, 20, body_at + 1] {
        let mut known = TcpStream::connect(world.address).await.unwrap();
        known.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 12];
        known.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");

        let mut idle = Vec::new();
        for _ in 0..250 {
            let mut stream = TcpStream::connect(world.address).await.unwrap();
            stream.write_all(&forged[..at_once]).await.unwrap();
            idle.push(stream);
        }
        let begun = Instant::now();
        let new = world.post(Request::signed(receipts(3).to_string())).await;
        assert_eq!(new.status, 200);
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?} with {at_once} bytes", begun.elapsed());
        known.write_all(head.as_bytes()).await.unwrap();
        let again = Instant::now();
        let mut rest = vec![0; 4096];
        let mut seen = String::new();
        while seen.matches("HTTP/1.1 200").count() < 1 || !seen.ends_with('}') {
            let length = known.read(&mut rest).await.unwrap();
            assert!(length > 0, "the connection of a known sender was closed: {seen}");
            seen.push_str(std::str::from_utf8(&rest[..length]).unwrap());
        }
        assert!(again.elapsed() < Duration::from_secs(1), "{:?}", again.elapsed());
    }
}

#[tokio::test]
async fn a_refused_sender_loses_its_connection() {
    let world = World::start(Arc::new(MemoryReceipts::new()));
    let forged = Request { sign: Some("whsec_b3RoZXI="), ..Request::signed("[]") }.bytes(NOW);
    let forged = String::from_utf8(forged).unwrap().replace("connection: close\r\n", "");
    let answer = exchange(world.address, forged.as_bytes()).await;
    assert_eq!(answer.status, 403);
    assert!(answer.head.contains("\r\nconnection: close"), "{}", answer.head);
}

#[tokio::test]
async fn connections_and_turns_are_bounded_and_the_next_one_gets_its_turn() {
    let ledger = Slow::new();
    let world = World::start(ledger.clone());
    // 128 connections at once; the others wait in the backlog. 32 requests have their turn.
    let mut streams = Vec::new();
    for number in 0..200 {
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        let request = Request::signed(Value::from(vec![receipt(number)]).to_string());
        stream.write_all(&request.bytes(NOW)).await.unwrap();
        streams.push(stream);
    }
    ledger.asked.acquire_many(32).await.unwrap().forget();
    let more = tokio::time::timeout(Duration::from_millis(200), ledger.asked.acquire()).await;
    assert!(more.is_err(), "one more is being stored");
    ledger.gate.add_permits(200);
    for stream in &mut streams {
        assert_eq!(read_answer(stream).await.unwrap().body["taken"], 1);
    }
    assert_eq!(ledger.ledger.waiting().await.unwrap(), 200);
}

#[tokio::test]
async fn a_full_inbox_takes_no_more_until_it_has_drained() {
    let ledger = Arc::new(MemoryReceipts::new());
    let world = World::start_bounded(ledger.clone(), 10);
    let some =
        |numbers: std::ops::Range<u32>| Request::signed(numbers.map(receipt).collect::<Value>().to_string());
    assert_eq!(world.post(some(0..8)).await.body["taken"], 8);
    assert_eq!(world.post(some(8..12)).await.body["taken"], 4, "eight waited, no more than ten");
    // The ledger does not drain.
    for world in [&world, &World::start_bounded(ledger.clone(), 11)] {
        let full = world.post(some(12..13)).await;
        assert_eq!(full.status, 503);
        assert!(full.head.contains("\r\nretry-after: 10"), "{}", full.head);
        assert!(full.body["error"].as_str().unwrap().contains("the inbox is full"), "{}", full.body);
    }
    assert_eq!(ledger.waiting().await.unwrap(), 12);

    ledger.apply(1_000, 1 << 20, NOW).await.unwrap();
    let drained = async {
        while world.post(some(12..13)).await.status != 200 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), drained).await.expect("it is counted again");
    assert_eq!(ledger.waiting().await.unwrap(), 1);
}

#[tokio::test]
async fn i8_long_bodies_wait_for_the_memory_of_others_and_short_ones_do_not() {
    let world = World::start(Arc::new(MemoryReceipts::new()));
    let long = |number| {
        let mut padded = receipt(number).to_string();
        padded.push_str(&" ".repeat(BODY_BYTES_MAX - padded.len()));
        Request::bearer(padded).bytes(NOW)
    };
    // 32 MiB of bodies whose senders may be anybody.
    let mut forgers = Vec::new();
    for _ in 0..32 {
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        let forged = Request { sign: Some("whsec_b3RoZXI="), ..Request::signed(vec![b' '; BODY_BYTES_MAX]) };
        let bytes = forged.bytes(NOW);
        stream.write_all(&bytes[..bytes.len() - 1]).await.unwrap();
        forgers.push(stream);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let (mut reading, mut writing) = stream.split();
    let sending = async {
        let _ = writing.write_all(&long(1)).await;
        std::future::pending::<()>().await;
    };
    let early = async {
        tokio::select! { _ = reading.read_u8() => {}, () = sending => {} }
    };
    assert!(tokio::time::timeout(Duration::from_secs(1), early).await.is_err(), "its body is in memory");
    assert_eq!(world.post(Request::bearer(receipt(2).to_string())).await.body["taken"], 1);
    drop(forgers);
    // Its body may have left as a whole and be taken now: another one, with a receipt of its own.
    drop(stream);
    assert_eq!(exchange(world.address, &long(3)).await.body["taken"], 1);
}
