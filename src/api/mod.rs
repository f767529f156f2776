//! `/api/v1`: what the page, `top` and scripts see and order by. It answers from the same calls as the commands
//! (`ports::console`), asked on threads of their own (`desk`), and from one look at the store per second for all who watch
//! (`live`).
//!
//! Routes are listed once, in [`routes!`](self); each is described where it is handled, and `/openapi.json` has all of them: a
//! test compares the two.

mod answers;
mod dead;
mod describe;
pub(crate) mod desk;
mod events;
mod files;
pub(crate) mod live;
mod messages;
mod orders;
mod receipts;
mod series;
mod words;

use std::{fmt, future::Future, io, pin::Pin, sync::Arc, time::Duration};

use actix_web::{
    FromRequest, HttpMessage as _, HttpRequest,
    dev::Payload,
    http::{StatusCode, header::CONTENT_TYPE},
    web::{self, Data, PathConfig, QueryConfig},
};
use postrider_actors::model::time::UnixMs;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::Semaphore;

use self::{
    desk::Desk,
    live::{Live, Sources},
};
use crate::ops::{
    access::{Caller, Role},
    problem::Problem,
    resources::{order, readable},
};

/// Streams of events at once.
const STREAMS_MAX: usize = 16;
/// Bytes of a request's body.
const BODY_BYTES_MAX: usize = 16 << 10;
/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// What requests are answered from.
#[derive(Clone)]
pub(crate) struct Api {
    desk: Desk,
    live: Live,
    /// Places for those who watch.
    streams: Arc<Semaphore>,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Api")
    }
}

impl Api {
    /// Starts the threads that ask and look.
    pub(crate) fn start(sources: Sources) -> io::Result<Self> {
        let desk = Desk::open(&sources.in_use)?;
        Ok(Self { desk, live: Live::start(sources)?, streams: Arc::new(Semaphore::new(STREAMS_MAX)) })
    }

    fn now(&self) -> UnixMs {
        self.live.sources().clock.wall()
    }
}

/// Lists the routes, and makes what registers them.
macro_rules! routes {
    ($($method:ident $path:literal => $handler:path;)*) => {
        /// Method and path of every route.
        #[cfg(test)]
        const ROUTES: &[(&str, &str)] = &[$((stringify!($method), concat!("/api/v1", $path)),)*];

        /// Registers the routes.
        pub(crate) fn routes(config: &mut web::ServiceConfig) {
            config
                .app_data(QueryConfig::default().error_handler(|error, _| Problem::bad(error.to_string()).into()))
                .app_data(PathConfig::default().error_handler(|error, _| Problem::bad(error.to_string()).into()));
            $(config.service(routes!(@$method concat!("/api/v1", $path), $handler));)*
        }
    };
    (@get $path:expr, $handler:path) => { readable($path, $handler) };
    (@post $path:expr, $handler:path) => { order($path, $handler) };
}

routes! {
    get "/session" => answers::session;
    get "/overview" => answers::overview;
    get "/files" => files::list;
    get "/files/{file}" => files::one;
    get "/files/{file}/rejects" => files::rejects;
    get "/destinations" => answers::destinations;
    get "/destinations/{name}" => answers::destination;
    get "/series" => answers::series;
    get "/dead" => dead::list;
    get "/dead/groups" => dead::groups;
    get "/messages" => messages::find;
    get "/receipts" => receipts::overview;
    get "/receipts/parked" => receipts::parked;
    get "/receipts/orphans" => receipts::orphans;
    get "/receipts/rejects" => receipts::rejects;
    get "/actors" => answers::actors;
    get "/alarms" => answers::alarms;
    get "/audit" => answers::audit;
    get "/events" => events::stream;
    get "/openapi.json" => describe::openapi;
    post "/destinations/{name}/pause" => orders::pause;
    post "/destinations/{name}/resume" => orders::resume;
    post "/destinations/{name}/rate" => orders::rate;
    post "/destinations/{name}/concurrency" => orders::concurrency;
    post "/files/{file}/hold" => orders::hold;
    post "/files/{file}/release" => orders::release;
    post "/files/{file}/cancel" => orders::cancel;
    post "/files/{file}/priority" => orders::priority;
    post "/dead/redrive" => dead::redrive;
    post "/reload" => orders::reload;
}

/// What every handler answers.
type Answer<T> = Result<web::Json<T>, Problem>;

#[expect(clippy::unnecessary_wraps, reason = "what a handler returns: others refuse")]
fn answer<T: Serialize>(value: T) -> Answer<T> {
    Ok(web::Json(value))
}

/// One page of a list, and where the next one begins.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct Page<T> {
    items: Vec<T>,
    /// For the parameter `cursor`; `null`: there is no more.
    next: Option<String>,
}

/// The whole of a list.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct Items<T> {
    items: Vec<T>,
}

/// The most items of one answer, and how many there are if nobody says.
const LIMIT_MAX: usize = 1_000;
const LIMIT: usize = 100;

fn limit(asked: Option<usize>) -> Result<usize, Problem> {
    match asked {
        None => Ok(LIMIT),
        Some(limit @ 1..=LIMIT_MAX) => Ok(limit),
        Some(_) => Err(Problem::bad(format!("limit is from 1 to {LIMIT_MAX}"))),
    }
}

/// A JSON object that came in time and is not too long.
#[derive(Debug)]
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned + 'static> FromRequest for Body<T> {
    type Error = Problem;
    type Future = Pin<Box<dyn Future<Output = Result<Self, Problem>>>>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let is_json = is_json(request);
        let payload = web::Payload::from_request(request, payload);
        Box::pin(async move {
            if !is_json {
                return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "expected application/json"));
            }
            let payload = payload.await.map_err(|error| Problem::bad(error.to_string()))?;
            let read = tokio::time::timeout(BODY_TIMEOUT, payload.to_bytes_limited(BODY_BYTES_MAX)).await;
            let read = read
                .map_err(|_| Problem::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time"))?
                .map_err(|_| {
                    let detail = format!("the body is longer than {BODY_BYTES_MAX} bytes");
                    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
                })?;
            let bytes = read.map_err(|_| Problem::bad("the body was cut off"))?;
            // serde would take an array for a struct.
            if bytes.trim_ascii_start().first() != Some(&b'{') {
                return Err(Problem::bad("the body: expected a JSON object"));
            }
            serde_json::from_slice(&bytes)
                .map(Self)
                .map_err(|error| Problem::bad(format!("the body: {error}")))
        })
    }
}

/// Whether the body is said to be JSON. A page of another origin can't send this type without asking first (CORS), and is
/// never allowed to: so it gives no order, with or without tokens (F56).
fn is_json(request: &HttpRequest) -> bool {
    let media_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = media_type.unwrap_or_default().split(';').next().unwrap_or_default();
    media_type.trim().eq_ignore_ascii_case("application/json")
}

/// Who asks. The guard of the server has noted it; who came past it may only look.
fn caller(request: &HttpRequest) -> Caller {
    let noted = request.extensions().get::<Caller>().copied();
    noted.unwrap_or(Caller { role: Role::View, has_token: false })
}

/// What is asked of the daemon, from a handler.
type State = Data<Api>;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_route_is_described_and_every_description_is_of_a_route() {
        let description = describe::document();
        let described: BTreeSet<(String, String)> = description["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, item)| {
                item.as_object().unwrap().keys().map(|method| (method.clone(), path.clone()))
            })
            .collect();
        let routes: BTreeSet<_> =
            ROUTES.iter().map(|(method, path)| ((*method).to_owned(), (*path).to_owned())).collect();
        assert_eq!(described, routes);
        assert_eq!(routes.len(), ROUTES.len(), "none is listed twice");
    }

    #[test]
    fn f56_only_what_no_page_can_send_is_json() {
        let says = |media_type: &str| {
            let request = actix_web::test::TestRequest::post().insert_header((CONTENT_TYPE, media_type));
            is_json(&request.to_http_request())
        };
        assert!(says("application/json") && says("Application/JSON; charset=utf-8"));
        for simple in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""] {
            assert!(!says(simple), "{simple}");
        }
    }

    #[test]
    fn limits_are_bounded() {
        assert_eq!(limit(None).unwrap(), LIMIT);
        assert_eq!(limit(Some(LIMIT_MAX)).unwrap(), LIMIT_MAX);
        assert!(limit(Some(0)).is_err() && limit(Some(LIMIT_MAX + 1)).is_err());
    }
}
