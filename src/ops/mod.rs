//! The ops server: metrics and health over HTTP/1.1, for Prometheus and for probes. It changes nothing,
//! answers GET and HEAD alone, and spends little on whoever only keeps connections open.

mod health;
mod hosts;

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body as _, Incoming},
    header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;

pub use self::health::{Health, Phase};
use self::hosts::{HostRejection, Hosts};
use crate::telemetry::metrics::{Format, Metrics};
use postrider_net::listener::Listener;
pub use postrider_net::listener::Serving;

/// Connections at once: a few scrapers and probes.
pub const CONNECTIONS_MAX: u32 = 32;
/// How long a request's head may take to arrive: whoever sends a byte now and then loses the place.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may last, its one answer included: whoever does not read it loses the place.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes of a request's head, and headers in it.
const HEAD_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;

/// A bound server that answers nobody yet.
#[derive(Debug)]
pub struct OpsServer(Listener);

/// The state that requests are answered from.
#[derive(Debug)]
struct OpsState {
    hosts: Hosts,
    health: Health,
    metrics: Arc<Metrics>,
}

impl OpsServer {
    /// Takes the address. Port 0 takes a free one.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        Listener::bind(address).map(Self)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.0.address()
    }

    /// Answers from now on. `allowed_hosts` are names in lower case. Call it within a tokio runtime.
    pub fn serve(
        self,
        allowed_hosts: Vec<String>,
        health: Health,
        metrics: Arc<Metrics>,
    ) -> io::Result<Serving> {
        let state = Arc::new(OpsState { hosts: Hosts::new(allowed_hosts), health, metrics });
        self.0.serve(CONNECTIONS_MAX, move |stream, _, _| connection(stream, Arc::clone(&state)))
    }
}

async fn connection(stream: TcpStream, state: Arc<OpsState>) {
    let Ok(local) = stream.local_addr() else {
        return; // it is gone
    };
    let service = service_fn(|request| {
        let answer = state.answer(&request, local.ip());
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        // A scrape every 15 s gains nothing by keeping its connection.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // What a peer does to its own connection is no concern of ours.
    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
}

impl OpsState {
    fn answer(&self, request: &Request<Incoming>, local: IpAddr) -> Response<Full<Bytes>> {
        match self.hosts.check(request.headers(), request.uri(), local) {
            Ok(()) => {}
            Err(HostRejection::Unclear) => {
                return text(StatusCode::BAD_REQUEST, "expected exactly one Host header\n");
            }
            Err(HostRejection::Host) => {
                let advice = "not known by this name: add it to ops.allowed_hosts\n";
                return text(StatusCode::MISDIRECTED_REQUEST, advice);
            }
            Err(HostRejection::Origin) => {
                return text(StatusCode::FORBIDDEN, "not for pages of other origins\n");
            }
        }
        if request.method() != Method::GET && request.method() != Method::HEAD {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        if !request.body().is_end_stream() {
            return text(StatusCode::PAYLOAD_TOO_LARGE, "without a body, please\n");
        }
        match request.uri().path() {
            "/metrics" => {
                let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok());
                let format = Format::for_accept(accept);
                let mut response = text(StatusCode::OK, self.metrics.render(format));
                let media_type = HeaderValue::from_static(format.media_type());
                response.headers_mut().insert(CONTENT_TYPE, media_type);
                response
            }
            "/healthz" => self.health(),
            "/readyz" => self.readiness(),
            _ => text(StatusCode::NOT_FOUND, "/metrics, /healthz or /readyz\n"),
        }
    }

    fn health(&self) -> Response<Full<Bytes>> {
        let stuck = self.health.stuck();
        if stuck.is_empty() {
            return text(StatusCode::OK, "ok\n");
        }
        text(StatusCode::SERVICE_UNAVAILABLE, format!("stuck: {}\n", stuck.join(", ")))
    }

    fn readiness(&self) -> Response<Full<Bytes>> {
        let phase = self.health.phase();
        let status = if phase == Phase::Ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        // A feed that waits is no reason to be taken out: files and entries wait where they are.
        let lines = std::iter::once(phase.as_str().to_owned()).chain(self.health.held());
        text(status, lines.map(|line| line + "\n").collect::<String>())
    }
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
