#![allow(
    clippy::disallowed_types,
    reason = "a thread and a socket take real time: no test here can drive a clock"
)]

use std::{
    collections::HashMap,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::Instant,
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use postrider_actors::{
    metrics::StageMetrics,
    model::{
        ids::{BatchId, FileId},
        lease::LeaseToken,
        time::UnixMs,
        trace::{LeaseEnd, SpanId, TraceId},
    },
};
use prost::Message as _;

use super::{queue::QUEUED_MAX, *};

/// What a collector answers.
#[derive(Clone)]
enum Reply {
    Status(u16, &'static str),
    Taken(ExportTraceServiceResponse),
    Hang,
}

/// A request as it came.
struct Posted {
    path: String,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

/// A collector that answers by a script, its last reply for ever.
struct Collecting {
    address: SocketAddr,
    posted: Arc<Mutex<Vec<Posted>>>,
}

impl Collecting {
    fn start(script: &[Reply]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let posted = Arc::new(Mutex::new(Vec::new()));
        let (script, seen) = (script.to_vec(), posted.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (script, seen) = (script.clone(), seen.clone());
                thread::spawn(move || answer(&stream.unwrap(), &script, &seen));
            }
        });
        Self { address, posted }
    }

    fn settings(&self, path: &str) -> CollectorSettings {
        let endpoint = format!("http://{}{path}", self.address).parse().unwrap();
        CollectorSettings { endpoint, headers: vec![("x-api-key".into(), "s3cr3t".to_owned().into())] }
    }

    fn spans(&self) -> Vec<Span> {
        let posted = self.posted.lock().unwrap();
        let messages = posted.iter().map(|posted| ExportTraceServiceRequest::decode(&*posted.body).unwrap());
        let resources = messages.flat_map(|message| message.resource_spans);
        resources.flat_map(|of| of.scope_spans).flat_map(|of| of.spans).collect()
    }
}

fn answer(stream: &TcpStream, script: &[Reply], seen: &Mutex<Vec<Posted>>) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut headers = HashMap::new();
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let mut body = vec![0; headers["content-length"].parse().unwrap()];
        reader.read_exact(&mut body)?;
        let number = {
            let mut seen = seen.lock().unwrap();
            seen.push(Posted { path, headers, body });
            seen.len() - 1
        };
        let (status, more, body) = match script[number.min(script.len() - 1)].clone() {
            Reply::Status(status, more) => (status, more, Vec::new()),
            Reply::Taken(response) => (200, "", response.encode_to_vec()),
            Reply::Hang => {
                thread::sleep(Duration::from_mins(5));
                return Ok(());
            }
        };
        let head = format!("HTTP/1.1 {status} -\r\n{more}content-length: {}\r\n\r\n", body.len());
        (&mut &*stream).write_all(&[head.as_bytes(), &body].concat())?;
    }
}

fn a_span(number: u64) -> BatchSpan {
    let (file, batch) = (FileId([7; 16]), BatchId([8; 16]));
    BatchSpan {
        trace: TraceId::of(file),
        span: SpanId::of(LeaseToken { batch, fence: number }),
        feed: "alerts".into(),
        destination: "support".into(),
        file,
        batch,
        fence: number,
        started: UnixMs(1_800_000_000_000),
        took: Duration::from_millis(1_500),
        messages: 100,
        sent: 97,
        retried: 2,
        dead: 0,
        end: LeaseEnd::Settled,
    }
}

fn metrics() -> SpanMetrics {
    StageMetrics::default().spans()
}

/// Exported and dropped.
fn counts(metrics: &SpanMetrics) -> (u64, u64) {
    (metrics.exported.get(), metrics.dropped.get())
}

fn texts(attributes: &[KeyValue]) -> HashMap<String, String> {
    let text = |attribute: &KeyValue| {
        let text = match attribute.value.clone().unwrap().value.unwrap() {
            Value::StringValue(text) => text,
            Value::IntValue(number) => number.to_string(),
            other => panic!("{other:?}"),
        };
        (attribute.key.clone(), text)
    };
    attributes.iter().map(text).collect()
}

#[test]
fn opentelemetry_reads_what_is_posted() {
    let collecting = Collecting::start(&[Reply::Status(200, "")]);
    let metrics = metrics();
    let exporter = Exporter::start(collecting.settings("/tenant/"), metrics.clone()).unwrap();
    exporter.take(a_span(1));
    exporter.take(BatchSpan { dead: 3, ..a_span(2) });
    exporter.take(BatchSpan { end: LeaseEnd::Lost, ..a_span(3) });
    assert!(exporter.close(Duration::from_secs(10)));
    let spans = collecting.spans();
    let span = &spans[0];
    assert_eq!((&span.trace_id[..], &span.span_id[..]), (&a_span(1).trace.0[..], &a_span(1).span.0[..]));
    assert!(span.parent_span_id.is_empty());
    assert_eq!((&*span.name, span.kind()), ("deliver support", SpanKind::Client));
    let times = (span.start_time_unix_nano, span.end_time_unix_nano);
    assert_eq!(times, (1_800_000_000_000_000_000, 1_800_000_001_500_000_000));
    assert_eq!(span.flags, 1, "sampled");
    assert_eq!(span.status, None);
    let attributes = texts(&span.attributes);
    for (key, value) in [
        ("feed", "alerts"),
        ("destination", "support"),
        ("file", "07070707070707070707070707070707"),
        ("messages", "100"),
        ("sent", "97"),
        ("retried", "2"),
        ("dead", "0"),
        ("end", "settled"),
    ] {
        assert_eq!(attributes[&format!("postrider.{key}")], value, "{key}");
    }
    for (span, message) in [(&spans[1], "3 messages were given up"), (&spans[2], "the lease was lost")] {
        let status = span.status.as_ref().unwrap();
        assert_eq!((status.code(), &*status.message), (StatusCode::Error, message));
    }
    let posted = collecting.posted.lock().unwrap();
    assert_eq!(posted.len(), 1, "together");
    assert_eq!(posted[0].path, "/tenant/v1/traces");
    assert_eq!(posted[0].headers["content-type"], "application/x-protobuf");
    assert_eq!(posted[0].headers["x-api-key"], "s3cr3t");
    let message = ExportTraceServiceRequest::decode(&*posted[0].body).unwrap();
    let resource = texts(&message.resource_spans[0].resource.as_ref().unwrap().attributes);
    assert_eq!(resource["service.name"], "postrider");
    assert!(!resource["host.name"].is_empty());
    assert_eq!(counts(&metrics), (3, 0));
}

#[test]
fn what_may_be_taken_later_is_posted_again() {
    let collecting = Collecting::start(&[Reply::Status(503, "retry-after: 1\r\n"), Reply::Status(200, "")]);
    let metrics = metrics();
    let exporter = Exporter::start(collecting.settings(""), metrics.clone()).unwrap();
    exporter.take(a_span(1));
    let until = Instant::now() + Duration::from_secs(20);
    while counts(&metrics) == (0, 0) && Instant::now() < until {
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(counts(&metrics), (1, 0));
    let spans = collecting.spans();
    assert_eq!(spans.len(), 2);
    assert_eq!(spans[0], spans[1]);
}

#[test]
fn what_the_collector_refuses_is_dropped_and_counted() {
    let rejected = ExportTracePartialSuccess { rejected_spans: 2, error_message: "too old".into() };
    let partial = ExportTraceServiceResponse { partial_success: Some(rejected) };
    for (reply, expected) in [(Reply::Status(400, ""), (0, 3)), (Reply::Taken(partial), (1, 2))] {
        let collecting = Collecting::start(&[reply]);
        let metrics = metrics();
        let exporter = Exporter::start(collecting.settings(""), metrics.clone()).unwrap();
        for number in 1..=3 {
            exporter.take(a_span(number));
        }
        assert!(exporter.close(Duration::from_secs(10)));
        assert_eq!(counts(&metrics), expected);
        assert_eq!(collecting.posted.lock().unwrap().len(), 1, "once");
    }
}

#[test]
fn a_collector_that_hangs_holds_up_nobody_and_the_queue_is_bounded() {
    let collecting = Collecting::start(&[Reply::Hang]);
    let metrics = metrics();
    let exporter = Exporter::start(collecting.settings(""), metrics.clone()).unwrap();
    exporter.take(a_span(0));
    let until = Instant::now() + Duration::from_secs(20);
    while collecting.posted.lock().unwrap().is_empty() && Instant::now() < until {
        thread::sleep(Duration::from_millis(20));
    }
    let begun = Instant::now();
    for number in 0..QUEUED_MAX as u64 + 100 {
        exporter.take(a_span(number));
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(counts(&metrics), (0, 100), "one request is out, the queue is full");
    assert!(!exporter.close(Duration::from_millis(100)));
    assert!(begun.elapsed() < Duration::from_secs(3));
}

#[test]
fn nobody_listens_at_the_end_and_it_ends_all_the_same() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoint = format!("http://{free}").parse().unwrap();
    let metrics = metrics();
    let settings = CollectorSettings { endpoint, headers: Vec::new() };
    let exporter = Exporter::start(settings, metrics.clone()).unwrap();
    for number in 0..1_000 {
        exporter.take(a_span(number));
    }
    assert!(exporter.close(Duration::from_secs(10)), "two tries, neither of which is repeated");
    assert_eq!(counts(&metrics), (0, 1_000));
}

#[test]
fn i10_settings_show_no_header() {
    let shown = format!("{:?}", Collecting::start(&[Reply::Hang]).settings(""));
    assert!(shown.contains("x-api-key") && !shown.contains("s3cr3t"), "{shown}");
}
