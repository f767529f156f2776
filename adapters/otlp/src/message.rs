//! What is posted: the messages of OTLP's `trace/v1/trace.proto` and what they are made of, as far as spans of batches need them.
//! They are stable; a test reads them with OpenTelemetry's own.

use std::fs;

use postrider_actors::model::trace::{BatchSpan, LeaseEnd};
use prost::Message;

/// The content type of requests.
pub const CONTENT_TYPE: &str = "application/x-protobuf";

/// What the spans are of, in resources and scopes.
const SERVICE: &str = "postrider";

#[derive(Clone, PartialEq, Message)]
struct ExportTraceServiceRequest {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<InstrumentationScope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<Span>,
}

#[derive(Clone, PartialEq, Message)]
struct InstrumentationScope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
    #[prost(fixed32, tag = "16")]
    flags: u32,
}

/// `SPAN_KIND_CLIENT`: receivers' own spans are its children.
const CLIENT: i32 = 3;

/// `flags`: the trace is sampled.
const SAMPLED: u32 = 1;

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(string, tag = "2")]
    message: String,
    #[prost(int32, tag = "3")]
    code: i32,
}

/// `STATUS_CODE_ERROR`
const ERROR: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(oneof = "Value", tags = "1, 3")]
    value: Option<Value>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Value {
    #[prost(string, tag = "1")]
    Text(String),
    #[prost(int64, tag = "3")]
    Number(i64),
}

#[derive(Clone, PartialEq, Message)]
struct ExportTraceServiceResponse {
    #[prost(message, optional, tag = "1")]
    partial_success: Option<ExportTracePartialSuccess>,
}

#[derive(Clone, PartialEq, Message)]
struct ExportTracePartialSuccess {
    #[prost(int64, tag = "1")]
    rejected_spans: i64,
    #[prost(string, tag = "2")]
    error_message: String,
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

fn attribute(key: &str, value: impl Into<Value>) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value.into()) }) }
}

/// The body of a request with these spans.
pub(crate) fn encode(spans: &[BatchSpan]) -> Vec<u8> {
    let version = env!("CARGO_PKG_VERSION");
    let mut attributes = vec![attribute("service.name", SERVICE), attribute("service.version", version)];
    // Which of several machines it is.
    let host = fs::read_to_string("/proc/sys/kernel/hostname").ok();
    attributes.extend(host.map(|host| attribute("host.name", host.trim())));
    let scope = InstrumentationScope { name: SERVICE.to_owned(), version: version.to_owned() };
    let scope_spans = vec![ScopeSpans { scope: Some(scope), spans: spans.iter().map(span).collect() }];
    let resource = Some(Resource { attributes });
    let resource_spans = vec![ResourceSpans { resource, scope_spans }];
    ExportTraceServiceRequest { resource_spans }.encode_to_vec()
}

fn span(span: &BatchSpan) -> Span {
    let BatchSpan { destination, started, took, sent, retried, dead, end, .. } = span;
    let start_time_unix_nano = started.0.saturating_mul(1_000_000);
    let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
    let error = |message: String| Status { message, code: ERROR };
    let status = match end {
        _ if *dead > 0 => Some(error(format!("{dead} messages were given up"))),
        LeaseEnd::Lost | LeaseEnd::Abandoned => Some(error(format!("the lease was {}", end.as_str()))),
        LeaseEnd::Settled | LeaseEnd::Retrying | LeaseEnd::Returned => None,
    };
    Span {
        trace_id: span.trace.0.to_vec(),
        id: span.span.0.to_vec(),
        name: format!("deliver {destination}"),
        kind: CLIENT,
        start_time_unix_nano,
        end_time_unix_nano: start_time_unix_nano.saturating_add(took),
        attributes: vec![
            attribute("postrider.feed", &*span.feed),
            attribute("postrider.destination", &**destination),
            attribute("postrider.file", span.file.to_string()),
            attribute("postrider.batch", span.batch.to_string()),
            attribute("postrider.lease", span.fence),
            attribute("postrider.messages", span.messages),
            attribute("postrider.sent", *sent),
            attribute("postrider.retried", *retried),
            attribute("postrider.dead", *dead),
            attribute("postrider.end", end.as_str()),
        ],
        status,
        flags: SAMPLED,
    }
}

/// How many spans an answer says were refused, and why. An answer that can't be read says nothing.
pub(crate) fn refused(answer: &[u8]) -> Option<(u64, String)> {
    let ExportTracePartialSuccess { rejected_spans, error_message } =
        ExportTraceServiceResponse::decode(answer).ok()?.partial_success?;
    // With 0 it may be advice, which is worth a line too.
    let is_said = rejected_spans > 0 || !error_message.is_empty();
    is_said.then(|| (u64::try_from(rejected_spans).unwrap_or(0), error_message))
}
