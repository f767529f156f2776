//! `/api/v1`: what the page, `top` and scripts see and order by. It answers from the same calls as the commands
//! (`ports::console`), asked on threads of their own (`desk`), and from one look at the store per second for all who watch
//! (`live`).
//!
//! Routes are listed once, in [`routes!`](self); each is described where it is handled, and `/openapi.json` has all of them: a
//! test compares the two.

mod answers;
mod dead;
pub(crate) mod desk;
mod events;
mod files;
pub(crate) mod live;
mod messages;
mod orders;
mod receipts;
mod series;

use std::{fmt, future::Future, io, pin::Pin, sync::Arc, time::Duration};

use actix_web::{
    FromRequest, HttpRequest, HttpResponse,
    dev::Payload,
    http::{StatusCode, header::CONTENT_TYPE},
    web::{self, Data, PathConfig, QueryConfig},
};
use postrider_actors::model::time::UnixMs;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::Semaphore;
use utoipa::OpenApi;

use self::{
    desk::Desk,
    events::STREAMS_MAX,
    live::{Live, Sources},
};
use crate::ops::{Problem, order, readable};

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
    get "/openapi.json" => openapi;
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

/// The description of all of it.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Postrider",
        description = "What a running daemon shows, and the orders it takes. See docs/operations.md."
    ),
    paths(
        answers::session,
        answers::overview,
        files::list,
        files::one,
        answers::destinations,
        answers::destination,
        answers::series,
        dead::list,
        dead::groups,
        messages::find,
        receipts::overview,
        receipts::parked,
        receipts::orphans,
        receipts::rejects,
        answers::actors,
        answers::alarms,
        answers::audit,
        events::stream,
        openapi,
        orders::pause,
        orders::resume,
        orders::rate,
        orders::concurrency,
        orders::hold,
        orders::release,
        orders::cancel,
        orders::priority,
        dead::redrive,
        orders::reload,
    )
)]
struct Description;

/// The description of this interface, which is this document
#[utoipa::path(get, path = "/api/v1/openapi.json", responses((status = 200, description = "OpenAPI", body = serde_json::Value)))]
async fn openapi() -> Result<HttpResponse, Problem> {
    let text = Description::openapi().to_json();
    let text = text.map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    Ok(HttpResponse::Ok().insert_header((CONTENT_TYPE, "application/json")).body(text))
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
        let payload = web::Payload::from_request(request, payload);
        Box::pin(async move {
            let payload = payload.await.map_err(|error| Problem::bad(error.to_string()))?;
            let read = tokio::time::timeout(BODY_TIMEOUT, payload.to_bytes_limited(BODY_BYTES_MAX)).await;
            let read = read
                .map_err(|_| Problem::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time"))?
                .map_err(|_| {
                    let detail = format!("the body is longer than {BODY_BYTES_MAX} bytes");
                    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
                })?;
            let bytes = read.map_err(|_| Problem::bad("the body was cut off"))?;
            serde_json::from_slice(&bytes)
                .map(Self)
                .map_err(|error| Problem::bad(format!("the body: {error}")))
        })
    }
}

/// What is asked of the daemon, from a handler.
type State = Data<Api>;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_route_is_described_and_every_description_is_of_a_route() {
        let description = serde_json::to_value(Description::openapi()).unwrap();
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
    fn limits_are_bounded() {
        assert_eq!(limit(None).unwrap(), LIMIT);
        assert_eq!(limit(Some(LIMIT_MAX)).unwrap(), LIMIT_MAX);
        assert!(limit(Some(0)).is_err() && limit(Some(LIMIT_MAX + 1)).is_err());
    }
}
