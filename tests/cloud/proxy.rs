//! The proxy in front of one emulator: it counts what comes through and makes faults happen.
//!
//! Faults change the JSON bodies of both services' current protocols, which name the operation in
//! `x-amz-target`. The `Host` header goes through as the client sent it: ministack makes queue URLs from it,
//! and so they lead through the proxy.

use std::{
    convert::Infallible,
    fs,
    net::{Ipv4Addr, TcpListener},
    ops::RangeInclusive,
    path::Path,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rand::{SeedableRng as _, rngs::SmallRng};
use tokio::{sync::oneshot, time::Instant};

use super::{
    calls::{Fate, Shared, lock},
    counts::Counts,
    faults::{Rule, Silence},
    replica::Replica,
    upstream::{BODY_BYTES_MAX, Problems, Upstream},
};

/// How long a call hangs if the client never gives up.
const HANG: Duration = Duration::from_mins(5);

/// A running proxy. It ends with this value.
#[derive(Debug)]
pub struct FaultProxy {
    endpoint: String,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FaultProxy {
    /// Starts one in front of `upstream`, an endpoint like `http://127.0.0.1:4566`. Without rules it changes
    /// nothing.
    pub fn start(upstream: &str) -> Self {
        Self::run(upstream, None)
    }

    /// Starts one in front of a DynamoDB, with `copy`, a second and empty one, that gets every write `lag` later
    /// and answers the reads that `Fault::Stale` happens to. Writes go one at a time, and all of them have to
    /// come through this proxy.
    pub fn with_stale_copy(upstream: &str, copy: &str, lag: Duration) -> Self {
        Self::run(upstream, Some((Upstream::new(copy), lag)))
    }

    fn run(upstream: &str, copy: Option<(Upstream, Duration)>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        listener.set_nonblocking(true).expect("a socket can be set");
        let endpoint = format!("http://{}", listener.local_addr().expect("it is bound"));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("the system has room for a runtime");
        let problems = Arc::new(Problems::default());
        let replica = copy.map(|(copy, lag)| {
            let _here = runtime.enter();
            Replica::start(copy, lag, Arc::clone(&problems))
        });
        let shared = Arc::new(Shared::new(Upstream::new(upstream), replica, problems));
        let (stop, stopped) = oneshot::channel();
        let serving = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    never = serve(listener, serving) => match never {},
                    _ = stopped => {}
                }
            });
            // Whatever hangs is dropped with it.
            runtime.shutdown_background();
        });
        Self { endpoint, shared, stop: Some(stop), thread: Some(thread) }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Puts a rule in force, behind those that are.
    pub fn inject(&self, rule: Rule) {
        lock(&self.shared.plan).add(rule);
    }

    /// Takes all rules back; what was injected stays counted.
    pub fn clear_faults(&self) {
        lock(&self.shared.plan).clear();
    }

    /// How many faults have happened to calls of `operation`. A test asserts it: else it might prove nothing.
    pub fn injected(&self, operation: &str) -> u64 {
        lock(&self.shared.plan).injected(operation)
    }

    /// Holds the stale copy where it is, or lets it catch up: exact where `lag` depends on the machine's pace.
    pub fn freeze_copy(&self, freeze: bool) {
        self.shared.replica.as_ref().expect("the proxy was started with a stale copy").freeze(freeze);
    }

    /// Delays every answer by a time from this range; AWS takes 5 to 15 ms.
    pub fn set_latency(&self, range: RangeInclusive<Duration>) {
        *lock(&self.shared.latency) = Some((range, SmallRng::seed_from_u64(0)));
    }

    /// What came through since the start or the last reset. The proxy's own calls are not among it.
    pub fn counts(&self) -> Counts {
        lock(&self.shared.counts).clone()
    }

    /// When each call of `operation` since the start arrived, in order.
    pub fn arrivals(&self, operation: &str) -> Vec<Instant> {
        lock(&self.shared.arrivals).get(operation).cloned().unwrap_or_default()
    }

    /// Resets the counts and returns them; no call falls in between.
    pub fn reset_counts(&self) -> Counts {
        std::mem::take(&mut *lock(&self.shared.counts))
    }

    /// Writes the counts as JSON, for a script: `{"SendMessageBatch": {"calls": 1, "items": 10, "empty": 0}}`.
    /// The file appears under its name only when it is whole.
    pub fn write_counts(&self, path: &Path) -> anyhow::Result<()> {
        let partial = path.with_extension("partial");
        fs::write(&partial, serde_json::to_vec_pretty(&self.counts())?)
            .with_context(|| format!("can't write the counts to {}", partial.display()))?;
        fs::rename(&partial, path).with_context(|| format!("can't rename the counts to {}", path.display()))
    }

    /// What went wrong with the proxy itself or behind it; nothing, if the test's surroundings were in order.
    pub fn problems(&self) -> Vec<String> {
        self.shared.problems.list()
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) -> Infallible {
    let listener = tokio::net::TcpListener::from_std(listener).expect("it is set for this");
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors; those of others come free.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&shared), request));
            // A client that goes away, or that we close on, is what tests are about.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// What makes hyper close a connection without an answer.
#[derive(Debug, thiserror::Error)]
#[error("closed without an answer")]
struct Closed;

/// Answers one request, or does not.
async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Closed> {
    let (head, body) = request.into_parts();
    let Ok(body) = Limited::new(body, BODY_BYTES_MAX).collect().await else {
        shared.problems.add(format!("a request was cut off or is larger than {BODY_BYTES_MAX} bytes"));
        return Err(Closed);
    };
    let request = Request::from_parts(head, body.to_bytes());
    let target = request.headers().get("x-amz-target").and_then(|target| target.to_str().ok());
    let operation = target.and_then(|target| Some(target.rsplit_once('.')?.1)).unwrap_or("?").to_owned();

    // A client that gives up must not undo what is forwarded already, but it must end a long poll: nobody
    // else should lose messages to it.
    let fate = if operation == "ReceiveMessage" {
        shared.pass(operation, request).await
    } else {
        let passing = Arc::clone(&shared);
        let passing = tokio::spawn(async move { passing.pass(operation, request).await });
        passing.await.unwrap_or_else(|error| {
            shared.problems.add(format!("a defect of the proxy: {error}"));
            Fate::Silent(Silence::Close)
        })
    };
    match fate {
        Fate::Answered(answer) => Ok(answer.map(Full::new)),
        Fate::Silent(Silence::Close) => Err(Closed),
        Fate::Silent(Silence::Hang) => {
            // Ends at once when the client closes the connection.
            tokio::time::sleep(HANG).await;
            Err(Closed)
        }
    }
}
