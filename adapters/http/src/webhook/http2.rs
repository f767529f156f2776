//! HTTP/2 (RFC 9113), where TLS negotiates it: connections that carry many requests at once, by the `h2` library.
//!
//! An attempt takes a [`Place`] on a connection, opens a stream on it, and gives the place back. No connection carries
//! more streams than its receiver allows; beyond that another one is opened. A stream that is cancelled is reset and
//! disturbs no other. What the receiver says it has not processed (GOAWAY, `REFUSED_STREAM`) counts as not sent.

use std::{
    future::{Future as _, poll_fn},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use hyper::{Request, Response, header::RETRY_AFTER};
use postrider_actors::model::outcome::Reason;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout_at},
};
use tokio_rustls::client::TlsStream;

use super::{
    connection::{Answer, NoAnswer, is_tls, kept_bytes_max},
    response::{HEAD_BYTES_MAX, parse_retry_after},
    shortage::Trouble,
};

/// The longest that a connection stays open without a stream. Unlike one of HTTP/1.1 it may be closed by the receiver at
/// any time without doubt about a request: GOAWAY says what was not processed.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Bytes of answers that may be on their way to one connection. Each stream's are read as they come.
const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;

/// A connection.
struct Shared {
    send: SendRequest<Bytes>,
    streams: AtomicUsize,
    /// It takes no further streams: it has ended, is going away, or says nothing.
    is_over: AtomicBool,
    state: Mutex<SharedState>,
}

struct SharedState {
    /// When an answer came last.
    heard: Instant,
    /// When its last stream ended.
    used: Instant,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, SharedState> {
        // Instants are set as a whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Relaxed)
    }

    fn end(&self) {
        self.is_over.store(true, Relaxed);
    }
}

/// The right to one stream on a connection.
pub(super) struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.state().used = Instant::now();
        self.0.streams.fetch_sub(1, Relaxed);
    }
}

#[derive(Default)]
struct Open {
    /// The oldest first.
    connections: Vec<Arc<Shared>>,
    /// Whether a task waits to close what nobody uses.
    has_reaper: bool,
}

/// The connections of one destination that carry many requests each.
pub(super) struct SharedConnections {
    open: Arc<Mutex<Open>>,
    limit: usize,
    /// Whether the receiver may speak HTTP/2, as far as is known.
    is_likely: AtomicBool,
    /// Held by who opens a connection. What kept the last one from being opened, and when that was known.
    opening: tokio::sync::Mutex<Option<(Instant, Trouble)>>,
}

/// The turn to open a connection that others wait to share.
pub(super) type Turn<'a> = tokio::sync::MutexGuard<'a, Option<(Instant, Trouble)>>;

impl SharedConnections {
    /// None yet, and never more than `limit`. `is_likely` says whether the receiver may speak HTTP/2.
    pub(super) fn new(limit: usize, is_likely: bool) -> Self {
        let is_likely = AtomicBool::new(is_likely);
        Self { open: Arc::default(), limit, is_likely, opening: tokio::sync::Mutex::default() }
    }

    /// A place on an open connection, if there is one. The oldest connections are filled first, so that what is not
    /// needed any more falls idle.
    pub(super) fn take(&self) -> Option<Place> {
        let mut open = lock(&self.open);
        open.connections.retain(|shared| !shared.is_over());
        let has_room =
            |shared: &&Arc<Shared>| shared.streams.load(Relaxed) < shared.send.current_max_send_streams();
        let shared = open.connections.iter().find(has_room)?.clone();
        // Under the lock, so that no two take the same place.
        shared.streams.fetch_add(1, Relaxed);
        Some(Place(shared))
    }

    /// Waits for the turn to open a connection; `None` where others would not share it. Many attempts begin at once, and
    /// one connection does for all of them; what keeps one of them from opening it keeps all that waited meanwhile.
    pub(super) async fn turn(&self, deadline: Instant) -> Result<Option<Turn<'_>>, Trouble> {
        let since = Instant::now();
        if !self.is_likely.load(Relaxed) {
            return Ok(None);
        }
        let turn = timeout_at(deadline, self.opening.lock()).await.map_err(|_| Reason::Timeout)?;
        match *turn {
            _ if !self.is_likely.load(Relaxed) => Ok(None),
            Some((at, trouble)) if at >= since => Err(trouble),
            _ => Ok(Some(turn)),
        }
    }

    /// The receiver has negotiated HTTP/1.1.
    pub(super) fn learn_http_1(&self) {
        self.is_likely.store(false, Relaxed);
    }

    /// Takes over a connection on which HTTP/2 was negotiated; the first place on it.
    pub(super) async fn open(
        &self,
        stream: TlsStream<TcpStream>,
        deadline: Instant,
    ) -> Result<Place, Trouble> {
        self.is_likely.store(true, Relaxed);
        let mut builder = h2::client::Builder::new();
        builder
            .enable_push(false)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_header_list_size(HEAD_BYTES_MAX as u32);
        let handshake = timeout_at(deadline, builder.handshake(stream)).await;
        let (send, connection) = handshake.map_err(|_| Reason::Timeout)?.map_err(|_| Reason::Connect)?;
        let now = Instant::now();
        let state = Mutex::new(SharedState { heard: now, used: now });
        let shared =
            Arc::new(Shared { send, streams: AtomicUsize::new(1), is_over: AtomicBool::new(false), state });
        // It ends with the connection, or when nobody has a place and the list has dropped it.
        let ended = Arc::downgrade(&shared);
        tokio::spawn(async move {
            let _ = connection.await;
            if let Some(shared) = ended.upgrade() {
                shared.end();
            }
        });
        let mut open = lock(&self.open);
        if open.connections.len() < self.limit {
            open.connections.push(shared.clone());
            if !std::mem::replace(&mut open.has_reaper, true) {
                tokio::spawn(reap(Arc::downgrade(&self.open)));
            }
        }
        Ok(Place(shared))
    }
}

/// Drops connections that nobody has used for long, for as long as there are any: then they close.
async fn reap(open: Weak<Mutex<Open>>) {
    loop {
        sleep(IDLE_MAX / 4).await;
        let Some(open) = open.upgrade() else { return };
        let mut open = lock(&open);
        let is_used = |shared: &Arc<Shared>| {
            shared.streams.load(Relaxed) > 0 || shared.state().used.elapsed() < IDLE_MAX
        };
        open.connections.retain(|shared| !shared.is_over() && is_used(shared));
        if open.connections.is_empty() {
            open.has_reaper = false;
            return;
        }
    }
}

/// A panic under the lock leaves a list that is still a list.
fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Place {
    /// Sends a request on a stream of its own, and reads the answer. Once its head has come, the status counts, whatever
    /// becomes of the body: see `docs/decisions/0008…`. With `keep_body`, the body of a 2xx is kept, and the beginning of others always.
    pub(super) async fn exchange(
        self,
        request: Request<()>,
        body: Bytes,
        deadline: Instant,
        body_bytes_max: u64,
        keep_body: bool,
    ) -> Result<Answer, NoAnswer> {
        let begun = Instant::now();
        let mut answer = None;
        let talk = async {
            // Fails only where the connection takes no streams any more.
            let send = self.0.send.clone().ready().await;
            let sent = send.and_then(|mut send| send.send_request(request, body.is_empty()));
            let (response, mut stream) = sent.map_err(|_| {
                self.0.end();
                NoAnswer { trouble: Reason::Connect.into(), nothing_sent: true }
            })?;
            stream.reserve_capacity(body.len());
            let response = answered(response, stream, body).await.map_err(|error| self.no_answer(&error))?;
            self.0.state().heard = Instant::now();
            let (head, mut stream) = response.into_parts();
            let retry_after = head.headers.get(RETRY_AFTER);
            let retry_after = retry_after.and_then(|value| parse_retry_after(value.as_bytes()));
            let status = head.status.as_u16();
            answer = Some(Answer { status, retry_after, body: None });
            let kept_max = kept_bytes_max(status, keep_body);
            if let Some(body) = read_body(&mut stream, body_bytes_max, kept_max).await {
                answer = Some(Answer { status, retry_after, body: Some(body) });
            }
            Ok::<_, NoAnswer>(())
        };
        let ended = timeout_at(deadline, talk).await;
        match (answer, ended) {
            (Some(answer), _) => Ok(answer),
            (None, Ok(Err(no_answer))) => Err(no_answer),
            (None, Ok(Ok(()))) => unreachable!("talk succeeds only after it has set the answer"),
            (None, Err(_)) => {
                // One slow answer among others is that message's own. Where none came, the connection may be dead.
                if self.0.state().heard <= begun {
                    self.0.end();
                }
                Err(Reason::Timeout.into())
            }
        }
    }

    /// Why a stream ended without an answer.
    fn no_answer(&self, error: &h2::Error) -> NoAnswer {
        if error.is_go_away() || error.is_io() {
            self.0.end();
        }
        // RFC 9113, sections 6.8 and 8.7: what came after the last stream that GOAWAY names, and a refused stream, were not
        // processed. The library reports GOAWAY to such streams only.
        let is_refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        let nothing_sent = error.is_remote() && (error.is_go_away() || is_refused);
        let reason = if nothing_sent { Reason::Connect } else { reason(error) };
        NoAnswer { trouble: reason.into(), nothing_sent }
    }
}

/// Sends the body as the receiver's windows allow, until the head of the answer is there: it may come first, and then
/// counts.
async fn answered(
    mut response: ResponseFuture,
    mut stream: h2::SendStream<Bytes>,
    mut left: Bytes,
) -> Result<Response<h2::RecvStream>, h2::Error> {
    poll_fn(|cx| {
        if let Poll::Ready(answered) = Pin::new(&mut response).poll(cx) {
            return Poll::Ready(answered);
        }
        // Where the stream takes nothing any more, the answer or its error says why.
        while !left.is_empty()
            && let Poll::Ready(Some(Ok(room))) = stream.poll_capacity(cx)
        {
            let part = left.split_to(room.min(left.len()));
            let is_last = left.is_empty();
            if stream.send_data(part, is_last).is_err() {
                break;
            }
        }
        Poll::Pending
    })
    .await
}

/// Reads the body and drops it, or keeps so many bytes of it. What is kept, if it came whole. What is longer than allowed is left
/// unread, which resets the stream.
async fn read_body(stream: &mut h2::RecvStream, bytes_max: u64, kept_max: Option<usize>) -> Option<Vec<u8>> {
    let mut kept = kept_max.map(|_| Vec::new());
    let mut bytes = 0;
    while let Some(part) = stream.data().await {
        let part = part.ok()?;
        bytes += part.len() as u64;
        if bytes > bytes_max {
            return None;
        }
        if let (Some(kept), Some(bytes_max)) = (&mut kept, kept_max) {
            kept.extend_from_slice(&part[..part.len().min(bytes_max - kept.len())]);
        }
        stream.flow_control().release_capacity(part.len()).ok()?;
    }
    kept
}

/// The reason for a stream, or a connection, that broke.
fn reason(error: &h2::Error) -> Reason {
    match error.get_io() {
        Some(error) if is_tls(error) => Reason::Tls,
        None if error.is_library() => Reason::Protocol,
        _ => Reason::Reset,
    }
}
