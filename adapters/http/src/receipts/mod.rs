//! Receipts that a provider hands in: a listener of its own, with one path for each source.
//!
//! The path of one request: its head is checked (path, method, length, credentials) before anything is spent
//! on its body; the body is read within bounds of size and time, and its signature verified; each receipt in it
//! is judged by itself; all of them are durable in the inbox before the 2xx goes out. A sender that gets
//! anything else sends the request again, and the inbox recognises what it has by its event.

mod bounds;
mod credentials;
mod error;

use std::{
    cell::RefCell,
    collections::HashMap,
    convert::Infallible,
    fmt, io,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Body as _, Incoming},
    header::{
        ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue,
        TRANSFER_ENCODING, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
    },
    http::request,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use postrider_actors::{
    flow::Bell,
    metrics::SourceMetrics,
    model::receipt_format::{Around, BodyError, ReadReceipts, ReceiptFormat},
    ports::{Arrival, Clock, ReceiptLedger, StoreError},
};
use serde::Serialize;
use tokio::{net::TcpStream, sync::Semaphore, time::timeout};

pub use self::bounds::BODY_BYTES_MAX;
pub use self::credentials::{Credentials, CredentialsError};
use self::{
    bounds::{Bodies, Room, TAKE_TIMEOUT, too_long},
    credentials::{Admitted, NotAllowed},
    error::RequestError,
};
use postrider_net::listener::{Listener, Seat, Serving};

/// More receipts in one request are answered 413: it is what the ledger takes in one statement.
pub const RECEIPTS_MAX: usize = 1000;

/// Connections at once: a provider's own pool is smaller.
pub const CONNECTIONS_MAX: u32 = 128;
/// Requests at once whose receipts are read and stored. Others wait for their turn, and only a request whose
/// signature was verified takes one: whoever sends slowly holds nobody else up.
const TURNS_MAX: usize = 32;
/// How long the first request's head may take to arrive …
const FIRST_HEAD_TIMEOUT: Duration = Duration::from_secs(2);
/// … and that of a later one: only a connection that brought an accepted request gets one, and may be idle so long.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How much of a refused request's body is read, and for how long.
const DISCARD_BYTES_MAX: usize = 4 * BODY_BYTES_MAX;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection takes no more requests after this long …
const CONNECTION_AGE_MAX: Duration = Duration::from_mins(5);
/// … and is closed in the middle of one after this much longer.
const CONNECTION_GRACE: Duration = Duration::from_mins(1);
/// Bytes of a request's head, and headers in it.
const HEAD_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;
/// What comes before a source's name.
const PATH: &str = "/receipts/";

/// A bound listener that answers nobody yet.
#[derive(Debug)]
pub struct HttpReceipts(Listener);

/// One source: `POST /receipts/NAME`.
#[derive(Debug)]
pub struct HttpSource {
    /// How its receipts are read; it knows the source's name.
    pub format: ReceiptFormat,
    /// The destination whose messages its receipts are about.
    pub destination: Arc<str>,
    /// Who may hand them in.
    pub credentials: Credentials,
    /// What it counts.
    pub metrics: SourceMetrics,
}

/// Where receipts go.
#[derive(Clone)]
pub struct Sink {
    /// Takes them.
    pub ledger: Arc<dyn ReceiptLedger>,
    /// Requests are refused while the inbox holds more receipts than this. Those that are being taken when it fills
    /// up may come on top.
    pub inbox_max: u64,
    /// Rung when it has taken some.
    pub taken: Bell,
    /// Says when, and whether a signature is fresh.
    pub clock: Arc<dyn Clock>,
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sink")
    }
}

impl HttpReceipts {
    /// Takes the address. Port 0 takes a free one.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        Listener::bind(address).map(Self)
    }

    /// On an address that is taken already.
    pub fn on(listener: Listener) -> Self {
        Self(listener)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.0.address()
    }

    /// Answers from now on, until what this returns is stopped or dropped. Call it within a tokio runtime.
    pub fn serve(self, sources: Vec<HttpSource>, sink: Sink) -> io::Result<Serving> {
        let sources =
            sources.into_iter().map(|source| (source.format.source().to_string(), source)).collect();
        let (room, turns) = (Room::new(sink.inbox_max), Semaphore::new(TURNS_MAX));
        let endpoint = Arc::new(ReceiptEndpoint { sources, sink, room, bodies: Bodies::new(), turns });
        self.0.serve(CONNECTIONS_MAX, move |stream, peer, seat| {
            connection(stream, peer.ip(), seat, Arc::clone(&endpoint))
        })
    }
}

/// The endpoint's state.
struct ReceiptEndpoint {
    sources: HashMap<String, HttpSource>,
    sink: Sink,
    room: Room,
    bodies: Bodies,
    turns: Semaphore,
}

async fn connection(stream: TcpStream, peer: IpAddr, seat: Seat, endpoint: Arc<ReceiptEndpoint>) {
    let _ = stream.set_nodelay(true);
    let is_used = AtomicBool::new(false);
    let service = service_fn(|request| {
        is_used.store(true, Relaxed);
        let (endpoint, seat) = (&endpoint, &seat);
        async move { Ok::<_, Infallible>(endpoint.answer(request, peer, seat).await) }
    });
    let is_unused = async {
        tokio::time::sleep(FIRST_HEAD_TIMEOUT).await;
        if is_used.load(Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    // What a peer does to its own connection is no concern of ours.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = is_unused => return,
        () = seat.stopped() => {}
        () = tokio::time::sleep(CONNECTION_AGE_MAX) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(CONNECTION_GRACE, connection).await;
}

/// What became of a request's receipts.
#[derive(Debug, Default, Serialize)]
struct ReceiptReport {
    /// New ones.
    taken: u64,
    /// Those that had been taken before, in other requests or in this one.
    known: u64,
    /// Those whose status is of no interest.
    ignored: u64,
    rejected: Vec<RejectedItem>,
}

#[derive(Debug, Serialize)]
struct RejectedItem {
    /// Which one, from 0.
    item: usize,
    reason: String,
}

/// How the receipts of a body are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BodyShape {
    /// One JSON object or array.
    Json,
    /// One JSON object per line.
    Lines,
}

impl ReceiptEndpoint {
    async fn answer(&self, request: Request<Incoming>, peer: IpAddr, seat: &Seat) -> Response<Full<Bytes>> {
        let mut response = self.answer_to(request, peer, seat).await;
        if !seat.is_kept() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    async fn answer_to(
        &self,
        request: Request<Incoming>,
        peer: IpAddr,
        seat: &Seat,
    ) -> Response<Full<Bytes>> {
        let name = request.uri().path().strip_prefix(PATH).unwrap_or_default();
        let Some((name, source)) = self.sources.get_key_value(name) else {
            return refused(RequestError::new(StatusCode::NOT_FOUND, "no receipts are taken here"));
        };
        let (head, mut body) = request.into_parts();
        let (status, response) = match self.take(source, &head, &mut body, seat).await {
            Ok(report) => {
                source.metrics.ignored(report.ignored);
                let text = serde_json::to_vec(&report).expect("numbers and texts can be written");
                (StatusCode::OK, json(StatusCode::OK, text))
            }
            Err(refusal) => {
                let status = refusal.status;
                // Who has not sent a body in its time gets no more of ours.
                if status != StatusCode::REQUEST_TIMEOUT {
                    discard(&mut body).await;
                }
                tracing::warn!(source = %name, %peer, status = status.as_u16(), "receipts refused: {}", refusal.why);
                (status, refused(refusal))
            }
        };
        source.metrics.answered(status.as_u16());
        response
    }

    async fn take(
        &self,
        source: &HttpSource,
        head: &request::Parts,
        body: &mut Incoming,
        seat: &Seat,
    ) -> Result<ReceiptReport, RequestError> {
        if head.method != Method::POST {
            let refusal = RequestError::new(StatusCode::METHOD_NOT_ALLOWED, "receipts are sent by POST");
            return Err(refusal.with(ALLOW, HeaderValue::from_static("POST")));
        }
        if !head.headers.contains_key(CONTENT_LENGTH) && !head.headers.contains_key(TRANSFER_ENCODING) {
            return Err(RequestError::new(StatusCode::LENGTH_REQUIRED, "expected a body with its length"));
        }
        let now = self.sink.clock.wall();
        let not_allowed = |not_allowed| match not_allowed {
            NotAllowed::Missing(why) => RequestError::new(StatusCode::UNAUTHORIZED, why)
                .with(WWW_AUTHENTICATE, source.credentials.challenge()),
            NotAllowed::Refused(why) => RequestError::new(StatusCode::FORBIDDEN, why),
        };
        let admitted = source.credentials.admit(&head.headers, now.0 / 1000).map_err(not_allowed)?;
        if matches!(admitted, Admitted::Bearer) {
            seat.keep();
        }
        let shape = shape(&head.headers)?;
        if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
            return Err(too_long());
        }
        if !self.room.is_left(&*self.sink.ledger).await {
            return Err(RequestError::again("the inbox is full, or can't be counted; send them again later"));
        }

        let body = self.bodies.read(body).await?;
        admitted.check(&body.bytes).map_err(not_allowed)?;
        seat.keep();
        // Held until the receipts are stored.
        let turn = timeout(TAKE_TIMEOUT, self.turns.acquire()).await.map_err(|_| RequestError::later())?;
        let _turn = turn.expect("nobody closes the semaphore");

        let request_id = admitted.request_id();
        let rejected = RefCell::new(Vec::new());
        let place = |item: usize| {
            rejected.borrow_mut().push(item);
            match &request_id {
                Some(id) => format!("request {id}, item {item}"),
                None => format!("item {item}"),
            }
        };
        let read = match shape {
            BodyShape::Json => source.format.read_body(&body.bytes, RECEIPTS_MAX, place),
            BodyShape::Lines => read_lines(&source.format, &body.bytes, place),
        };
        drop(body);
        let read = read.map_err(|error| {
            let status = match error {
                BodyError::TooMany { .. } => StatusCode::PAYLOAD_TOO_LARGE,
                BodyError::Invalid(_) => StatusCode::BAD_REQUEST,
            };
            RequestError::new(status, error.to_string())
        })?;
        let ReadReceipts { receipts, rejects, ignored } = read;
        let item = |(item, reject): (usize, &postrider_actors::model::receipt::ReceiptReject)| RejectedItem {
            item,
            reason: reject.reason.clone(),
        };
        let rejected = rejected.into_inner().into_iter().zip(&rejects).map(item).collect();
        let mut report = ReceiptReport { ignored, rejected, ..ReceiptReport::default() };
        if receipts.is_empty() && rejects.is_empty() {
            return Ok(report);
        }
        let arrival = Arrival {
            source: Arc::clone(source.format.source()),
            destination: Arc::clone(&source.destination),
            receipts,
            rejects,
            cursor: None,
            at: now,
        };
        let taken = match timeout(TAKE_TIMEOUT, self.sink.ledger.take(arrival)).await {
            Ok(Ok(taken)) => taken,
            Ok(Err(error @ StoreError::Permanent(_))) => {
                tracing::error!(source = %source.format.source(), %error, "receipts can't be stored");
                let why = "receipts can't be stored; the operator has to act";
                return Err(RequestError::new(StatusCode::INTERNAL_SERVER_ERROR, why));
            }
            Ok(Err(error)) => {
                tracing::warn!(source = %source.format.source(), %error, "receipts can't be stored now");
                return Err(RequestError::later());
            }
            Err(_) => return Err(RequestError::later()),
        };
        if taken.new > 0 {
            self.sink.taken.ring();
        }
        self.room.took(taken.new);
        source.metrics.taken(taken);
        report.taken = taken.new;
        report.known = taken.known;
        Ok(report)
    }
}

/// Reads what is left of a refused request's body for a moment: a connection that is closed with bytes unread is
/// reset, and the sender would never see why.
async fn discard(body: &mut Incoming) {
    let discarding = async {
        let mut left = DISCARD_BYTES_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                break;
            }
        }
    };
    let _ = timeout(DISCARD_TIMEOUT, discarding).await;
}

/// Which shape a body has, by its type; without one it is JSON.
fn shape(headers: &HeaderMap) -> Result<BodyShape, RequestError> {
    let unsupported = |why: &str| RequestError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, why);
    if headers
        .get(CONTENT_ENCODING)
        .is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
    {
        return Err(unsupported("a compressed body is not taken"));
    }
    let mut types = headers.get_all(CONTENT_TYPE).iter();
    let (Some(media_type), None) = (types.next(), types.next()) else {
        return if headers.contains_key(CONTENT_TYPE) {
            Err(unsupported("one Content-Type, please"))
        } else {
            Ok(BodyShape::Json)
        };
    };
    let media_type = media_type.to_str().unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match &*media_type {
        "application/x-ndjson" | "application/ndjson" | "application/jsonl" | "application/x-jsonlines" => {
            Ok(BodyShape::Lines)
        }
        json if json == "application/json" || json.starts_with("application/") && json.ends_with("+json") => {
            Ok(BodyShape::Json)
        }
        _ => Err(unsupported("expected application/json, or application/x-ndjson with one receipt per line")),
    }
}

/// Reads one receipt per line; blank lines don't count.
fn read_lines(
    format: &ReceiptFormat,
    body: &[u8],
    place: impl Fn(usize) -> String,
) -> Result<ReadReceipts, BodyError> {
    let lines = body.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let found = lines.clone().count();
    if found > RECEIPTS_MAX {
        return Err(BodyError::TooMany { found, max: RECEIPTS_MAX });
    }
    let mut read = ReadReceipts::default();
    for (item, line) in lines.enumerate() {
        format.read_into(line, Around::default(), || place(item), &mut read);
    }
    Ok(read)
}

fn refused(refusal: RequestError) -> Response<Full<Bytes>> {
    let text = serde_json::json!({ "error": refusal.why }).to_string();
    let mut response = json(refusal.status, text);
    if let Some((name, value)) = refusal.header {
        response.headers_mut().insert(name, value);
    }
    response
}

fn json(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
