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
    fmt, io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread,
    time::Duration,
};

use actix_web::{
    App, HttpRequest, HttpResponse, HttpServer,
    http::{
        ConnectionType, Method, StatusCode,
        header::{
            ALLOW, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue,
            TRANSFER_ENCODING, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
        },
    },
    web::{self, Payload},
};
use postrider_actors::{
    flow::Bell,
    metrics::SourceMetrics,
    model::receipt_format::{Around, BodyError, ReadReceipts, ReceiptFormat},
    ports::{Arrival, Clock, ReceiptLedger, StoreError},
};
use serde::Serialize;
use tokio::{sync::Semaphore, time::timeout};

pub use self::bounds::BODY_BYTES_MAX;
pub use self::credentials::{Credentials, CredentialsError};
use self::{
    bounds::{Bodies, Room, TAKE_TIMEOUT, too_long},
    credentials::{Admitted, NotAllowed},
    error::RequestError,
};
use postrider_net::{
    seats::{Seat, SeatBounds, Seats},
    serving::{self, Serving},
};

/// More receipts in one request are answered 413: it is what the ledger takes in one statement.
pub const RECEIPTS_MAX: usize = 1000;

/// Connections at once: a provider's own pool is smaller.
pub const CONNECTIONS_MAX: usize = 128;
/// Threads that read and verify requests, at most: the ledger that waits behind them is one.
const WORKERS_MAX: usize = 4;
/// Requests at once whose receipts are read and stored. Others wait for their turn, and only a request whose
/// signature was verified takes one: whoever sends slowly holds nobody else up.
const TURNS_MAX: usize = 32;
/// How long the first request's head may take to arrive …
const FIRST_HEAD_TIMEOUT: Duration = Duration::from_secs(2);
/// … and that of a later one: only a connection that brought an accepted request gets one, and may be idle so long.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the rest of a refused request's body is read, so that the sender sees why before the connection is closed.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection takes no more requests after this long …
const CONNECTION_AGE_MAX: Duration = Duration::from_mins(5);
/// … and is closed in the middle of one after this much longer.
const CONNECTION_GRACE: Duration = Duration::from_mins(1);
/// Bytes of a request's head, and headers in it. The server itself would take 128 KiB and 96.
const HEAD_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;
/// What comes before a source's name.
const PATH: &str = "/receipts/";

/// A bound listener that answers nobody yet.
#[derive(Debug)]
pub struct HttpReceipts {
    listener: TcpListener,
    address: SocketAddr,
}

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
        Self::on(TcpListener::bind(address)?)
    }

    /// On an address that is taken already.
    pub fn on(listener: TcpListener) -> io::Result<Self> {
        Ok(Self { address: listener.local_addr()?, listener })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers from now on, until what this returns is stopped or dropped. Call it within a tokio runtime.
    pub fn serve(self, sources: Vec<HttpSource>, sink: Sink) -> io::Result<Serving> {
        let sources =
            sources.into_iter().map(|source| (source.format.source().to_string(), source)).collect();
        let (room, turns) = (Room::new(sink.inbox_max), Semaphore::new(TURNS_MAX));
        let endpoint = Arc::new(ReceiptEndpoint { sources, sink, room, bodies: Bodies::new(), turns });
        let seats = Seats::new(SeatBounds {
            connections_max: CONNECTIONS_MAX,
            idle_max: HEAD_TIMEOUT,
            age_max: CONNECTION_AGE_MAX,
            grace: CONNECTION_GRACE,
        });
        let (workers, taking) = (workers(), seats.clone());
        let app = move || {
            let endpoint = Arc::clone(&endpoint);
            let answer = move |request: HttpRequest, body: Payload| {
                let endpoint = Arc::clone(&endpoint);
                async move { endpoint.answer(&request, body).await }
            };
            App::new().default_service(web::to(answer))
        };
        let server = HttpServer::new(app)
            .on_connect(move |connection, data| serving::seat(&taking, connection, data))
            .workers(workers)
            .max_connections(CONNECTIONS_MAX / workers)
            .client_request_timeout(FIRST_HEAD_TIMEOUT)
            .client_disconnect_timeout(DISCARD_TIMEOUT)
            .keep_alive(HEAD_TIMEOUT)
            .tcp_nodelay(true)
            .disable_signals()
            .listen(self.listener)?
            .run();
        Ok(Serving::start(server, seats))
    }
}

/// As many as there are cores, within [`WORKERS_MAX`].
fn workers() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get().min(WORKERS_MAX))
}

/// The endpoint's state.
struct ReceiptEndpoint {
    sources: HashMap<String, HttpSource>,
    sink: Sink,
    room: Room,
    bodies: Bodies,
    turns: Semaphore,
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
    async fn answer(&self, request: &HttpRequest, body: Payload) -> HttpResponse {
        let Some(seat) = request.conn_data::<Seat>() else {
            let mut response = refused(RequestError::later());
            response.head_mut().set_connection_type(ConnectionType::Close);
            return response;
        };
        let _request = seat.request();
        let mut response = self.answer_to(request, body, seat).await;
        if !seat.is_kept() || seat.is_old() {
            response.head_mut().set_connection_type(ConnectionType::Close);
        }
        response
    }

    async fn answer_to(&self, request: &HttpRequest, mut body: Payload, seat: &Seat) -> HttpResponse {
        let name = request.path().strip_prefix(PATH).unwrap_or_default();
        let Some((name, source)) = self.sources.get_key_value(name) else {
            return refused(RequestError::new(StatusCode::NOT_FOUND, "no receipts are taken here"));
        };
        let (status, response) = match self.take(source, request, &mut body, seat).await {
            Ok(report) => {
                source.metrics.ignored(report.ignored);
                let text = serde_json::to_vec(&report).expect("numbers and texts can be written");
                (StatusCode::OK, json(StatusCode::OK, text))
            }
            Err(refusal) => {
                let (status, peer) = (refusal.status, request.peer_addr().map(|peer| peer.ip().to_string()));
                tracing::warn!(source = %name, peer, status = status.as_u16(), "receipts refused: {}", refusal.why);
                (status, refused(refusal))
            }
        };
        source.metrics.answered(status.as_u16());
        response
    }

    async fn take(
        &self,
        source: &HttpSource,
        request: &HttpRequest,
        body: &mut Payload,
        seat: &Seat,
    ) -> Result<ReceiptReport, RequestError> {
        let headers = request.headers();
        if is_too_long(request) {
            return Err(RequestError::new(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "the head is too long",
            ));
        }
        if request.method() != Method::POST {
            let refusal = RequestError::new(StatusCode::METHOD_NOT_ALLOWED, "receipts are sent by POST");
            return Err(refusal.with(ALLOW, HeaderValue::from_static("POST")));
        }
        let is_chunked = headers.contains_key(TRANSFER_ENCODING);
        if !headers.contains_key(CONTENT_LENGTH) && !is_chunked {
            return Err(RequestError::new(StatusCode::LENGTH_REQUIRED, "expected a body with its length"));
        }
        let said = headers.get(CONTENT_LENGTH).filter(|_| !is_chunked);
        let said = said.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        let now = self.sink.clock.wall();
        let not_allowed = |not_allowed| match not_allowed {
            NotAllowed::Missing(why) => RequestError::new(StatusCode::UNAUTHORIZED, why)
                .with(WWW_AUTHENTICATE, source.credentials.challenge()),
            NotAllowed::Refused(why) => RequestError::new(StatusCode::FORBIDDEN, why),
        };
        let admitted = source.credentials.admit(headers, now.0 / 1000).map_err(not_allowed)?;
        if matches!(admitted, Admitted::Bearer) {
            seat.keep();
        }
        let shape = shape(headers)?;
        if said.is_some_and(|bytes| bytes > BODY_BYTES_MAX as u64) {
            return Err(too_long());
        }
        if !self.room.is_left(&*self.sink.ledger).await {
            return Err(RequestError::again("the inbox is full, or can't be counted; send them again later"));
        }

        let body = self.bodies.read(body, said).await?;
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

/// Whether a request's head is longer than it may be.
fn is_too_long(request: &HttpRequest) -> bool {
    let headers = request.headers();
    let bytes = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum::<usize>();
    headers.len() > HEADERS_MAX || bytes + request.uri().path().len() > HEAD_BYTES_MAX
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
    let mut types = headers.get_all(CONTENT_TYPE);
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

fn refused(refusal: RequestError) -> HttpResponse {
    let text = serde_json::json!({ "error": refusal.why }).to_string();
    let mut response = json(refusal.status, text);
    if let Some((name, value)) = refusal.header {
        response.headers_mut().insert(name, value);
    }
    response
}

fn json(status: StatusCode, text: impl Into<web::Bytes>) -> HttpResponse {
    HttpResponse::build(status)
        .insert_header((CONTENT_TYPE, "application/json"))
        .insert_header((CACHE_CONTROL, "no-store"))
        .insert_header((X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .body(text.into())
}
