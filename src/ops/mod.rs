//! The ops server: what an operator sees and gives orders by, over HTTP/1.1: metrics and health for Prometheus and for
//! probes, and the interface for programs. It stands on actix-web, with one thread of its own.
//!
//! Whoever asks is looked at before anything else happens (`access`): by which name, from which page, with which token.
//! Each connection gets one answer, and whoever only keeps one open costs little and not for long.

pub(crate) mod access;
pub(crate) mod health;
mod hosts;
mod page;
pub(crate) mod problem;
pub(crate) mod resources;

use std::{
    fmt, io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use actix_web::{
    App, Error, HttpMessage as _, HttpRequest, HttpResponse, HttpServer, ResponseError as _,
    body::{BoxBody, MessageBody},
    dev::{ServiceRequest, ServiceResponse},
    http::{
        KeepAlive, StatusCode,
        header::{
            ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS,
        },
    },
    middleware::{Next, from_fn},
    web::{self, Data},
};
use postrider_net::{
    seats::{Seat, SeatBounds, Seats},
    serving,
    tls::{Identity, server_config},
};
use secrecy::SecretString;

pub use self::health::{Health, Phase};
use self::{
    access::{Access, Caller, Head},
    problem::Problem,
    resources::readable,
};
use crate::{
    api::{self, Api},
    telemetry::metrics::{Format, Metrics},
};
pub use postrider_net::serving::Serving;

/// Connections at once: a few scrapers, probes and pages.
pub const CONNECTIONS_MAX: usize = 32;
/// How long a request's head may take to arrive: whoever sends a byte now and then loses the place.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an answer may take to be read, or a stream not be read: whoever does not read it loses the place.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may last, its one answer included; a stream may last longer.
const CONNECTION_AGE_MAX: Duration = Duration::from_mins(1);
/// How long the rest of a refused request is read, so that the sender sees why.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);

/// A bound server that answers nobody yet.
#[derive(Debug)]
pub struct OpsServer {
    listener: TcpListener,
    address: SocketAddr,
}

/// Who may ask, as the configuration has it.
#[derive(Clone, Default)]
pub struct OpsSecrets {
    /// Who brings it may look.
    pub view: Option<SecretString>,
    /// Who brings it may do everything.
    pub operate: Option<SecretString>,
    /// What the server shows; with it, it speaks TLS.
    pub identity: Option<Identity>,
}

impl fmt::Debug for OpsSecrets {
    /// Nothing of them (I10).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OpsSecrets")
    }
}

/// What requests are answered from.
#[derive(Debug)]
pub struct OpsSetup {
    /// Names that it goes by, in lower case.
    pub allowed_hosts: Vec<String>,
    /// Who may ask.
    pub secrets: OpsSecrets,
    /// How the daemon does.
    pub health: Health,
    /// What it has counted.
    pub metrics: Arc<Metrics>,
    /// The interface for programs.
    pub(crate) api: Api,
}

/// The state that requests are answered from.
#[derive(Debug)]
struct OpsState {
    access: Access,
    health: Health,
    metrics: Arc<Metrics>,
}

impl OpsServer {
    /// Takes the address. Port 0 takes a free one.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        Ok(Self { address: listener.local_addr()?, listener })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers from now on. Call it within a tokio runtime.
    pub fn serve(self, setup: OpsSetup) -> io::Result<Serving> {
        let OpsSetup { allowed_hosts, secrets, health, metrics, api } = setup;
        let access = Access::new(allowed_hosts, secrets.view.as_ref(), secrets.operate.as_ref());
        let (state, api) = (Data::new(OpsState { access, health, metrics }), Data::new(api));
        let seats = Seats::new(SeatBounds {
            connections_max: CONNECTIONS_MAX,
            idle_max: READ_TIMEOUT,
            age_max: CONNECTION_AGE_MAX,
            grace: Duration::ZERO,
        });
        let taking = seats.clone();
        let app = move || {
            App::new()
                .app_data(state.clone())
                .app_data(api.clone())
                .wrap(from_fn(guard))
                .service(readable("/metrics", render_metrics))
                .service(readable("/healthz", health_of))
                .service(readable("/readyz", readiness_of))
                .configure(api::routes)
                .configure(page::routes)
                .default_service(web::to(nothing))
        };
        let server = HttpServer::new(app)
            .on_connect(move |connection, data| serving::seat(&taking, connection, data))
            .workers(1)
            .max_connections(CONNECTIONS_MAX)
            .client_request_timeout(HEAD_TIMEOUT)
            .client_disconnect_timeout(DISCARD_TIMEOUT)
            // A scrape every 15 s gains nothing by keeping its connection.
            .keep_alive(KeepAlive::Disabled)
            .disable_signals();
        let server = match &secrets.identity {
            None => server.listen(self.listener)?,
            Some(identity) => server.listen_rustls_0_23(self.listener, server_config(identity))?,
        };
        Ok(Serving::start(server.run(), seats))
    }
}

/// Lets nobody in who may not, and completes every answer.
async fn guard(
    state: Data<OpsState>,
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let seat = request.conn_data::<Seat>().map(|seat| (seat.request(), seat.local()));
    let checked = match &seat {
        None => {
            Err(Problem::later(StatusCode::SERVICE_UNAVAILABLE, "no descriptor is left for this connection"))
        }
        Some((_, local)) => state.access.check(Head {
            method: request.method(),
            uri: request.uri(),
            headers: request.headers(),
            local: *local,
        }),
    };
    let mut response = match checked {
        Err(problem) => request.into_response(problem.error_response()),
        Ok(role) => {
            request.extensions_mut().insert(Caller { role, has_token: state.access.has_tokens() });
            next.call(request).await?.map_into_boxed_body()
        }
    };
    let headers = response.headers_mut();
    unless_given(headers, CACHE_CONTROL, "no-store");
    unless_given(headers, X_CONTENT_TYPE_OPTIONS, "nosniff");
    Ok(response)
}

fn unless_given(headers: &mut HeaderMap, name: HeaderName, value: &'static str) {
    if !headers.contains_key(&name) {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

async fn nothing() -> Result<HttpResponse, Problem> {
    Err(Problem::missing(
        "nothing is here; /api/v1/openapi.json lists what is, beside /metrics, /healthz and /readyz",
    ))
}

async fn render_metrics(state: Data<OpsState>, request: HttpRequest) -> HttpResponse {
    let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok());
    let format = Format::for_accept(accept);
    HttpResponse::Ok().insert_header((CONTENT_TYPE, format.media_type())).body(state.metrics.render(format))
}

async fn health_of(state: Data<OpsState>) -> HttpResponse {
    let stuck = state.health.stuck();
    if stuck.is_empty() {
        return text(StatusCode::OK, "ok\n".to_owned());
    }
    text(StatusCode::SERVICE_UNAVAILABLE, format!("stuck: {}\n", stuck.join(", ")))
}

async fn readiness_of(state: Data<OpsState>) -> HttpResponse {
    let phase = state.health.phase();
    let status = if phase == Phase::Ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    // A feed that waits is no reason to be taken out: files and entries wait where they are.
    let lines = std::iter::once(phase.as_str().to_owned()).chain(state.health.held());
    text(status, lines.map(|line| line + "\n").collect())
}

fn text(status: StatusCode, text: String) -> HttpResponse {
    HttpResponse::build(status).insert_header((CONTENT_TYPE, "text/plain; charset=utf-8")).body(text)
}
