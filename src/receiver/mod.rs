//! A receiver to try things against, and what the tests check deliveries with: it verifies signatures, fails on
//! purpose if asked to, counts, and logs each request before it answers.

mod bundle;
mod capacity;
mod counts;
mod log;
mod verdict;

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use secrecy::SecretString;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, OwnedSemaphorePermit, Semaphore, watch},
    time::Instant,
};

use self::{
    bundle::{Message, is_bundle, messages},
    log::{LogEntry, RequestLog},
    verdict::{Failures, Reply, RequestVerifier},
};
pub use self::{capacity::Capacity, counts::Counts};

/// A longer body is answered 413.
const BODY_BYTES_MAX: usize = 1024 * 1024;
/// More connections wait in the kernel's backlog: each costs a task and a buffer.
const CONNECTIONS_MAX: usize = 4096;
/// How long requests in progress may take to finish once the receiver is asked to stop.
const DRAIN: Duration = Duration::from_secs(1);

/// What the receiver does.
#[derive(Debug)]
pub struct ReceiverSettings {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// One of them must have signed each request; without any, signatures are not checked.
    pub secrets: Vec<SecretString>,
    /// The share of verified requests that fail, from 0 to 1.
    pub fail_rate: f64,
    /// What they are answered.
    pub fail_status: StatusCode,
    /// Sent as `Retry-After` with each of them.
    pub retry_after: Option<HeaderValue>,
    /// Which of them fail: the n-th request of two runs with the same seed fares the same.
    pub seed: u64,
    /// How long it takes and what it can bear; `PUT /capacity` changes it.
    pub capacity: Capacity,
    /// Where to append one JSON line per request.
    pub log: Option<PathBuf>,
    /// Whether the lines hold the bodies.
    pub log_bodies: bool,
    /// Whether what is accepted is answered with an id of the receiver's own (see [`answered_id`]).
    pub answer_ids: bool,
    /// Whether each message of a bundle has a status of its own.
    pub results: bool,
}

/// A bound receiver.
#[derive(Debug)]
pub struct Receiver {
    listener: TcpListener,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    verifier: RequestVerifier,
    failures: Failures,
    retry_after: Option<HeaderValue>,
    capacity: capacity::Counter,
    answer_ids: bool,
    results: bool,
    log: Option<RequestLog>,
    counts: counts::RequestCounters,
    /// Why the log can't be written any more. A receiver that can't log proves nothing: it stops.
    log_error: OnceLock<io::Error>,
    log_failed: Notify,
}

impl Receiver {
    /// Binds the address and opens the log.
    pub async fn bind(settings: ReceiverSettings) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(settings.listen)
            .await
            .with_context(|| format!("can't listen on {}", settings.listen))?;
        let log = settings.log.map(|path| RequestLog::open(&path, settings.log_bodies)).transpose()?;
        let state = State {
            verifier: RequestVerifier::new(&settings.secrets)?,
            failures: Failures::new(settings.fail_rate, settings.fail_status, settings.seed),
            retry_after: settings.retry_after,
            capacity: capacity::Counter::new(settings.capacity),
            answer_ids: settings.answer_ids,
            results: settings.results,
            log,
            counts: counts::RequestCounters::default(),
            log_error: OnceLock::new(),
            log_failed: Notify::new(),
        };
        Ok(Self { listener, state: Arc::new(state) })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`, lets requests in progress finish for a second, and returns what it counted.
    /// The error is that the log could not be written.
    pub async fn serve(self, stop: impl Future<Output = ()>) -> anyhow::Result<Counts> {
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let (stopping, stopped) = watch::channel(());
        tokio::select! {
            () = stop => {}
            () = self.state.log_failed.notified() => {}
            () = self.accept(&permits, &stopped) => {}
        }
        drop(stopping);
        // All permits are back when the last connection has ended.
        let _ = tokio::time::timeout(DRAIN, permits.acquire_many(CONNECTIONS_MAX as u32)).await;
        match self.state.log_error.get() {
            Some(error) => Err(io::Error::new(error.kind(), error.to_string()))
                .context("can't write the log, so stopped"),
            None => Ok(self.state.counts.read()),
        }
    }

    async fn accept(&self, permits: &Arc<Semaphore>, stopped: &watch::Receiver<()>) {
        loop {
            let permit = Arc::clone(permits).acquire_owned().await.expect("nobody closes the semaphore");
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let _ = stream.set_nodelay(true);
                    tokio::spawn(connection(stream, Arc::clone(&self.state), stopped.clone(), permit));
                }
                // Out of descriptors, or a peer that is gone again: neither passes faster by spinning.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }
}

async fn connection(
    stream: TcpStream,
    state: Arc<State>,
    mut stopped: watch::Receiver<()>,
    _permit: OwnedSemaphorePermit,
) {
    let service = service_fn(|request| {
        let state = Arc::clone(&state);
        async move { Ok::<_, Infallible>(state.answer(request).await) }
    });
    let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    // What a peer does to its own connection is no concern of a receiver that counts requests.
    tokio::select! {
        _ = connection.as_mut() => {}
        _ = stopped.changed() => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

impl State {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() == Method::GET && request.uri().path() == "/stats" {
            let counts = serde_json::to_value(self.counts.read()).expect("counts are numbers");
            return json(StatusCode::OK, &counts);
        }
        let is_change = request.method() == Method::PUT && request.uri().path() == "/capacity";
        if !is_change && request.method() != Method::POST {
            return empty(StatusCode::METHOD_NOT_ALLOWED);
        }
        let (head, body) = request.into_parts();
        let body = match Limited::new(body, BODY_BYTES_MAX).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => return empty(StatusCode::PAYLOAD_TOO_LARGE),
            // The sender is gone; this goes nowhere.
            Err(_) => return empty(StatusCode::BAD_REQUEST),
        };
        if is_change {
            let Ok(capacity) = serde_json::from_slice(&body) else { return empty(StatusCode::BAD_REQUEST) };
            self.capacity.set(capacity);
            return empty(StatusCode::NO_CONTENT);
        }
        let at = now_ms();
        let place = self.capacity.enter(Instant::now());
        let verified = self.verifier.verify(&head.headers, &body, at / 1000);
        let webhook_id = text(&head.headers, "webhook-id");
        let messages = messages(webhook_id, &body);
        let is_bundle = webhook_id.is_some_and(is_bundle);
        let refused = match (verified, &place) {
            (Some(false), _) => Some(Reply::Unverified),
            (_, None) => Some(Reply::Failed(StatusCode::SERVICE_UNAVAILABLE)),
            _ => None,
        };
        let has_results = is_bundle && self.results && refused.is_none();
        let replies: Vec<_> = if has_results {
            messages.iter().map(|_| self.failures.next()).collect()
        } else {
            vec![refused.unwrap_or_else(|| self.failures.next()); messages.len()]
        };
        if let Some(log) = &self.log {
            let entry = |(message, reply)| {
                let (message, reply): (&Message<'_>, &Reply) = (message, reply);
                let entry = LogEntry {
                    at,
                    id: message.id.as_deref(),
                    bundle: webhook_id.filter(|_| is_bundle),
                    of: is_bundle.then_some(messages.len()),
                    timestamp: text(&head.headers, "webhook-timestamp"),
                    path: head.uri.path(),
                    status: reply.status().as_u16(),
                    bytes: message.body.len(),
                    verified,
                };
                (entry, message.body)
            };
            if let Err(error) = log.append(messages.iter().zip(&replies).map(entry)) {
                let _ = self.log_error.set(error);
                self.log_failed.notify_one();
                return empty(StatusCode::INTERNAL_SERVER_ERROR);
            }
        }
        self.counts.count(&replies, body.len(), at);
        if let Some(place) = place {
            tokio::time::sleep_until(place.due).await;
        }
        if has_results {
            let items = messages.iter().zip(&replies).map(|(message, &reply)| self.item(message, reply));
            let items: Vec<_> = items.collect();
            return json(StatusCode::OK, &serde_json::json!({ "items": items }));
        }
        // An array has one message at least: an empty one is answered as nothing is.
        let (Some(message), Some(reply)) = (messages.first(), replies.first()) else {
            return empty(StatusCode::BAD_REQUEST);
        };
        let mut response = match (reply, &message.id) {
            (Reply::Accepted(status), Some(id)) if self.answer_ids && !is_bundle => {
                json(*status, &serde_json::json!({ "message": answered(id) }))
            }
            _ => empty(reply.status()),
        };
        if let (Reply::Failed(_), Some(retry_after)) = (reply, &self.retry_after) {
            response.headers_mut().insert(RETRY_AFTER, retry_after.clone());
        }
        response
    }

    /// What is said of one message of a bundle.
    fn item(&self, message: &Message<'_>, reply: Reply) -> serde_json::Value {
        let mut item = serde_json::json!({ "id": message.id, "status": reply.status().as_u16() });
        if let (Reply::Accepted(_), Some(id), true) = (reply, &message.id, self.answer_ids) {
            item["message"] = answered(id);
        }
        item
    }
}

fn empty(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// The receiver's own id for the message with `webhook_id`: unlike ours, and a test can compute it.
fn answered_id(webhook_id: &str) -> String {
    let digest = <sha2::Sha256 as sha2::Digest>::digest(webhook_id.as_bytes());
    digest.iter().take(12).fold(String::from("prv-"), |mut id, byte| {
        use std::fmt::Write as _;
        let _ = write!(id, "{byte:02x}"); // writing to a String can't fail
        id
    })
}

fn answered(webhook_id: &str) -> serde_json::Value {
    serde_json::json!({ "id": answered_id(webhook_id) })
}

fn json(status: StatusCode, body: &serde_json::Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.to_string().into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests;
