use std::{convert::Infallible, fmt::Write as _, sync::Arc, time::Duration};

use actix_web::{
    HttpRequest, HttpResponse,
    http::{StatusCode, header::CONTENT_TYPE},
    web::Bytes,
};
use futures_util::stream;
use postrider_net::seats::{Seat, Streaming};
use serde::Serialize;
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::{
    State,
    live::{Live, Snapshot},
};
use crate::ops::problem::Problem;

/// Without news for so long, something is said all the same: who listens knows that the connection lives.
const QUIET_MAX: Duration = Duration::from_secs(5);
/// When to come back after a stream has ended.
const HEAD: &str = "retry: 2000\n\n";

/// What changes, once per second
///
/// A stream of `text/event-stream` with the events `overview`, `files` (all open ones, and those that were settled since the last
/// event), `destinations`, `sample` (every five seconds) and `alarm`. Their `id` counts up by one; where it does not, the reader was
/// slow and some were left out. A stream that is not read for ten seconds is cut off.
#[utoipa::path(get, path = "/api/v1/events",
    responses((status = 200, description = "The stream", content_type = "text/event-stream", body = String),
        (status = 429, description = "Too many streams")))]
pub(super) async fn stream(request: HttpRequest, api: State) -> Result<HttpResponse, Problem> {
    let too_many = || Problem::later(StatusCode::TOO_MANY_REQUESTS, "too many streams at once");
    let place = Arc::clone(&api.streams).try_acquire_owned().map_err(|_| too_many())?;
    let seat = request.conn_data::<Seat>().ok_or_else(too_many)?;
    // Their number is bounded here.
    seat.keep();
    let reader = Reader {
        live: api.live.clone(),
        snapshots: api.live.subscribe(),
        connection: seat.stream(),
        is_new: true,
        _place: place,
    };
    let frames = stream::unfold(reader, |mut reader| async move {
        let frame = reader.next().await?;
        Some((Ok::<_, Infallible>(frame), reader))
    });
    Ok(HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/event-stream"))
        // A proxy that collects it would make it late.
        .insert_header(("x-accel-buffering", "no"))
        .streaming(frames))
}

struct Reader {
    live: Live,
    snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    connection: Streaming,
    is_new: bool,
    _place: OwnedSemaphorePermit,
}

impl Reader {
    /// What comes next; `None` at the end. It is asked for when what came before has been written.
    async fn next(&mut self) -> Option<Bytes> {
        self.connection.read();
        self.live.want();
        if std::mem::take(&mut self.is_new) {
            return Some(Bytes::from_static(HEAD.as_bytes()));
        }
        match tokio::time::timeout(QUIET_MAX, self.snapshots.changed()).await {
            Err(_) => Some(Bytes::from_static(b":\n\n")),
            Ok(Err(_)) => None,
            Ok(Ok(())) => {
                let snapshot = self.snapshots.borrow_and_update().clone()?;
                Some(snapshot.frame())
            }
        }
    }
}

impl Snapshot {
    /// The snapshot as events, written once for all who read.
    fn frame(&self) -> Bytes {
        self.frame.get_or_init(|| self.written().into()).clone()
    }

    fn written(&self) -> String {
        let mut text = String::new();
        let number = self.number;
        add(&mut text, number, "overview", &self.overview);
        let files: Vec<_> = self.files.iter().chain(&self.settled).collect();
        add(&mut text, number, "files", &json!({ "items": files, "cut": self.is_cut }));
        add(&mut text, number, "destinations", &json!({ "items": self.destinations }));
        if let Some((at, samples)) = &self.sample {
            add(&mut text, number, "sample", &json!({ "at": at, "destinations": samples }));
        }
        for alarm in &self.alarms {
            add(&mut text, number, "alarm", alarm);
        }
        text
    }
}

/// An event is one line of JSON, which holds no line break of its own.
fn add(text: &mut String, number: u64, name: &str, data: &impl Serialize) {
    let data = serde_json::to_string(data).expect("shapes can be written");
    // Writing to a String can't fail.
    let _ = write!(text, "id: {number}\nevent: {name}\ndata: {data}\n\n");
}
