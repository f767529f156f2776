//! Traces: a span for each batch at a collector, and the header on each request that names it.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{self, BufReader, Read, Write},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::any_value::Value,
    trace::v1::{Span, status::StatusCode},
};
use postrider_actors::model::ids::hex;
use prost::Message as _;
use rustix::process::Signal;

use crate::{
    ops::{metric, serve},
    support::{
        LIVENESS, World,
        input::{Input, Kind},
        scripted::{Reply, Request, read_head},
        wait_until,
    },
};

/// A collector that takes spans, or never answers.
struct Collector {
    address: SocketAddr,
    bodies: Arc<Mutex<Vec<Vec<u8>>>>,
    hangs: Arc<AtomicBool>,
}

impl Collector {
    fn start() -> Self {
        Self::speaking(None)
    }

    /// By TLS, if there is a configuration for it.
    fn speaking(tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (bodies, hangs) = (Arc::<Mutex<Vec<_>>>::default(), Arc::new(AtomicBool::new(false)));
        let (seen, silent) = (bodies.clone(), hangs.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (seen, silent, tls) = (seen.clone(), silent.clone(), tls.clone());
                // A connection that breaks is the exporter's to notice.
                thread::spawn(move || {
                    let Ok(stream) = stream else { return Ok(()) };
                    let Some(tls) = tls else { return collect(stream, &seen, &silent) };
                    let session = rustls::ServerConnection::new(tls).expect("the configuration is whole");
                    collect(rustls::StreamOwned::new(session, stream), &seen, &silent)
                });
            }
        });
        Self { address, bodies, hangs }
    }

    fn hanging() -> Self {
        let collector = Self::start();
        collector.hangs.store(true, Ordering::SeqCst);
        collector
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What came, by the name of the span.
    fn spans(&self) -> HashMap<String, Span> {
        let bodies = self.bodies.lock().expect("no thread panics with it");
        let messages = bodies
            .iter()
            .map(|body| ExportTraceServiceRequest::decode(&**body).expect("OpenTelemetry can read it"));
        let resources = messages.flat_map(|message| message.resource_spans);
        let spans: Vec<_> =
            resources.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans).collect();
        let count = spans.len();
        let by_id: HashMap<_, _> = spans.into_iter().map(|span| (hex(&span.span_id), span)).collect();
        assert_eq!(by_id.len(), count, "no span comes twice");
        by_id
    }
}

fn collect(stream: impl Read + Write, seen: &Mutex<Vec<Vec<u8>>>, hangs: &AtomicBool) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some((_, _, length)) = read_head(&mut reader)? {
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        seen.lock().expect("no thread panics with it").push(body);
        while hangs.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(20));
        }
        reader.get_mut().write_all(b"HTTP/1.1 200 -\r\ncontent-length: 0\r\n\r\n")?;
    }
    Ok(())
}

/// An attribute of a span, as text.
fn attribute(span: &Span, key: &str) -> String {
    let key = format!("postrider.{key}");
    let found = span.attributes.iter().find(|attribute| attribute.key == key);
    let value = found.and_then(|attribute| attribute.value.clone()?.value);
    match value.unwrap_or_else(|| panic!("{key} is there")) {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        other => panic!("{key} is {other:?}"),
    }
}

fn number(span: &Span, key: &str) -> usize {
    attribute(span, key).parse().expect("it is a number")
}

/// Trace, span and flags of a request's header.
fn trace_of(request: &Request) -> (String, String, String) {
    let header = request.headers.get("traceparent").expect("every request has one");
    let parts: Vec<_> = header.split('-').map(str::to_owned).collect();
    let [version, trace, span, flags] = parts.try_into().expect("four parts");
    assert_eq!((&*version, trace.len(), span.len(), flags.len()), ("00", 32, 16, 2), "{header}");
    (trace, span, flags)
}

/// File and row of a message.
fn file_and_row(id: &str) -> (String, usize) {
    let (file, row) = id.strip_prefix("msg_").and_then(|id| id.rsplit_once('_')).expect("msg_FILE_ROW");
    (file.to_owned(), row.parse().expect("a row"))
}

/// Every request names the span of its batch, in the trace of its file.
fn check(requests: &[Request], spans: &HashMap<String, Span>) {
    let mut batches = HashMap::new();
    for request in requests {
        let (trace, span, flags) = trace_of(request);
        assert_eq!(flags, "01");
        let span = spans.get(&span).unwrap_or_else(|| panic!("the span {span} has come"));
        assert_eq!(hex(&span.trace_id), trace);
        assert_eq!(request.path, format!("/{}", attribute(span, "destination")));
        for (id, _) in request.messages() {
            let (file, row) = file_and_row(&id);
            assert_eq!((&trace, &attribute(span, "file")), (&file, &file), "the trace is the file's");
            let batch = attribute(span, "batch");
            let known = batches.entry((request.path.clone(), id)).or_insert_with(|| batch.clone());
            assert_eq!(*known, batch, "row {row} is in one batch, whichever lease it is tried under");
        }
    }
}

#[test]
fn a_span_of_every_batch_comes_and_its_requests_name_it() {
    let collector = Collector::start();
    let mut world = World::new("csv");
    world
        .set("tracing.endpoint", collector.endpoint())
        .add_destination("audit")
        .set("destinations.audit.bundle", 30)
        .add_feed("others", "csv", &["support", "audit"]);
    // For longer than a worker keeps a batch that waits: it is leased again.
    world.script(|request| match (request.earlier, file_and_row_of(request)) {
        (0, Some(7)) => Reply::Header(503, "retry-after", "12".into()),
        (_, Some(8)) => Reply::Status(404),
        _ => Reply::Status(200),
    });
    world.drop_file(Input::csv("a.csv", 450));
    world.drop_into("others", Input::csv("b.csv", 250));
    world.start_ready().wait_settled(LIVENESS);
    world.stop();
    let (requests, spans) = (world.requests(), collector.spans());
    check(&requests, &spans);
    let traces: HashSet<_> = spans.values().map(|span| hex(&span.trace_id)).collect();
    assert_eq!(traces.len(), 2, "a trace of each file, at whichever destination");
    let total = |key| spans.values().map(|span| number(span, key)).sum::<usize>();
    assert_eq!((total("sent"), total("retried"), total("dead")), (450 + 2 * 250 - 2, 2, 2));
    for span in spans.values() {
        assert!(span.parent_span_id.is_empty());
        assert!(span.end_time_unix_nano > span.start_time_unix_nano);
        let is_error = span.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error);
        assert_eq!(is_error, number(span, "dead") > 0, "{span:?}");
        assert!(["settled", "retrying", "returned"].contains(&&*attribute(span, "end")), "{span:?}");
    }
    let leases = |batch: &str| spans.values().filter(|span| attribute(span, "batch") == batch).count();
    let again: Vec<_> = spans.values().filter(|span| number(span, "lease") > 1).collect();
    assert!(!again.is_empty(), "one was leased again");
    assert!(
        again.iter().all(|span| leases(&attribute(span, "batch")) > 1),
        "each lease has a span of its own"
    );
    world.prove();
}

/// The row of a request with a single message.
fn file_and_row_of(request: &Request) -> Option<usize> {
    request.id.starts_with("msg_").then(|| file_and_row(&request.id).1)
}

#[test]
fn nothing_is_traced_unless_the_configuration_says_so_and_a_reload_begins() {
    let collector = Collector::start();
    let mut world = World::new("csv");
    world.script(|_| Reply::Status(200));
    for name in ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] {
        world.environment(name, &collector.endpoint());
    }
    world.drop_file(Input::csv("before.csv", 150).all(Kind::Sent)).start_ready().wait_settled(LIVENESS);
    let before = world.requests();
    assert!(before.iter().all(|request| !request.headers.contains_key("traceparent")));
    world.set("tracing.endpoint", collector.endpoint()).configure();
    assert_eq!(world.postrider(&["reload"]).code, Some(0));
    world.drop_file(Input::csv("after.csv", 150).all(Kind::Sent)).wait_settled(LIVENESS);
    world.daemon().signal(Signal::HUP); // the same collector: nothing of the spans is lost
    world.stop();
    let after = &world.requests()[before.len()..];
    let spans = collector.spans();
    check(after, &spans);
    let sent: usize = spans.values().map(|span| number(span, "sent")).sum();
    assert_eq!(sent, 150);
    world.prove();
}

#[test]
fn requests_of_files_that_are_not_sampled_say_so() {
    let collector = Collector::start();
    let mut world = World::new("csv");
    world.script(|_| Reply::Status(200));
    world.set("tracing.endpoint", collector.endpoint()).set("tracing.sample_percent", 0);
    world.drop_file(Input::csv("left-out.csv", 150).all(Kind::Sent)).start_ready().wait_settled(LIVENESS);
    world.stop();
    for request in world.requests() {
        let (trace, _, flags) = trace_of(&request);
        assert_eq!((trace, &*flags), (file_and_row(&request.id).0, "00"));
    }
    assert!(collector.spans().is_empty());
}

#[test]
fn a_collector_behind_tls_is_one_that_the_system_trusts() {
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let key = rustls::pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).expect("it is DER");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has them")
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .expect("they fit");
    let collector = Collector::speaking(Some(Arc::new(tls)));
    for is_trusted in [false, true] {
        let mut world = World::new("csv");
        if is_trusted {
            let roots = world.path("roots.pem");
            fs::write(&roots, own.cert.pem()).expect("the directory is ours");
            world.environment("SSL_CERT_FILE", &roots.display().to_string());
        }
        let endpoint = format!("https://localhost:{}", collector.address.port());
        world.receive(&[]).set("tracing.endpoint", endpoint);
        world.drop_file(Input::csv("tls.csv", 150).all(Kind::Sent)).start_ready().wait_settled(LIVENESS);
        world.stop();
        let sent: usize = collector.spans().values().map(|span| number(span, "sent")).sum();
        assert_eq!(sent, if is_trusted { 150 } else { 0 });
        let is_said = world.daemon_log_text().contains("does not take spans");
        assert_eq!(is_said, !is_trusted);
        world.prove();
    }
}

/// A world with one batch per message, so that there are more spans than the queue has room for.
fn many_batches(rows: usize) -> World {
    let mut world = World::new("csv");
    world.receive(&[]).set("batch.max_messages", 1);
    world.drop_file(Input::csv("many.csv", rows).all(Kind::Sent));
    world
}

#[test]
fn a_collector_that_hangs_delays_nothing_and_what_is_dropped_is_counted() {
    const ROWS: usize = 4_000;
    let mut took = Vec::new();
    for collector in [None, Some(Collector::hanging())] {
        let mut world = many_batches(ROWS);
        if let Some(collector) = &collector {
            world.set("tracing.endpoint", collector.endpoint());
        }
        let begun = Instant::now();
        let address = serve(&mut world);
        world.wait_settled(LIVENESS);
        took.push(begun.elapsed());
        if collector.is_some() {
            let dropped = || metric(address, "postrider_spans_total{outcome=\"dropped\"}");
            // 2,048 wait, 512 are on their way.
            let least = (ROWS - 2_048 - 512) as f64;
            wait_until(LIVENESS, "dropped spans to be counted", || dropped() >= Some(least));
        }
        let begun = Instant::now();
        world.stop();
        assert!(begun.elapsed() < Duration::from_secs(10), "the end waits for nobody: {:?}", begun.elapsed());
        let says_so = world.daemon_log_text().contains("the last spans are lost");
        assert_eq!(says_so, collector.is_some());
        world.prove();
    }
    assert!(took[1] < took[0] * 2 + Duration::from_secs(5), "{took:?}");
    println!(
        "{ROWS} batches of one message: {} ms without tracing, {} ms with a collector that hangs",
        took[0].as_millis(),
        took[1].as_millis()
    );
}

#[test]
fn a_collector_that_is_down_is_said_once_and_costs_no_message() {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let mut world = World::new("csv");
    world.receive(&[]).set("tracing.endpoint", format!("http://{}", free.expect("a free port")));
    world.drop_file(Input::csv("down.csv", 500).all(Kind::Sent)).start_ready().wait_settled(LIVENESS);
    wait_until(LIVENESS, "the log to say so", || world.daemon_log_text().contains("does not take spans"));
    world.stop();
    let log = world.daemon_log_text();
    assert_eq!(log.lines().filter(|line| line.contains("does not take spans")).count(), 1);
    world.prove();
}
