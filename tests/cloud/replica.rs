//! A second, empty DynamoDB emulator that gets the same writes some time later: what it answers is what an
//! eventually consistent read may see, evaluated by a real engine.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use hyper::Request;
use tokio::{
    sync::{Mutex, MutexGuard, mpsc, watch},
    time::Instant,
};

use super::upstream::{Problems, Upstream};

/// How many writes may be waiting for their time. Beyond that, writers wait.
const WAITING_MAX: usize = 100_000;

#[derive(Debug)]
pub(super) struct Replica {
    upstream: Upstream,
    lag: Duration,
    /// Held over a write, so that both copies see the writes in the same order.
    order: Mutex<()>,
    later: mpsc::Sender<(Instant, Request<Bytes>)>,
    is_frozen: watch::Sender<bool>,
    problems: Arc<Problems>,
}

impl Replica {
    /// To be called on the proxy's runtime.
    pub(super) fn start(upstream: Upstream, lag: Duration, problems: Arc<Problems>) -> Self {
        let (later, mut waiting) = mpsc::channel::<(Instant, Request<Bytes>)>(WAITING_MAX);
        let (is_frozen, mut frozen) = watch::channel(false);
        let (applying, reported) = (upstream.clone(), Arc::clone(&problems));
        tokio::spawn(async move {
            while let Some((due, write)) = waiting.recv().await {
                tokio::time::sleep_until(due).await;
                if frozen.wait_for(|frozen| !frozen).await.is_err() {
                    break; // The proxy has ended.
                }
                apply(&applying, write, &reported).await;
            }
        });
        Self { upstream, lag, order: Mutex::new(()), later, is_frozen, problems }
    }

    pub(super) fn freeze(&self, freeze: bool) {
        self.is_frozen.send_replace(freeze);
    }

    pub(super) fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    /// To be held from before a write until after `repeat`.
    pub(super) async fn in_order(&self) -> MutexGuard<'_, ()> {
        self.order.lock().await
    }

    /// Repeats a write that the service has accepted.
    pub(super) async fn repeat(&self, operation: &str, write: Request<Bytes>) {
        // Else reads would find no table or no index, instead of an old one.
        if matches!(operation, "CreateTable" | "UpdateTable") {
            apply(&self.upstream, write, &self.problems).await;
            return;
        }
        if self.later.send((Instant::now() + self.lag, write)).await.is_err() {
            self.problems.add("the stale copy's writer is gone".to_owned());
        }
    }
}

/// Whether an operation changes anything.
pub(super) fn is_write(operation: &str) -> bool {
    const READS: [&str; 4] = ["GetItem", "Query", "Scan", "TransactGetItems"];
    !READS.contains(&operation)
        && !["BatchGetItem", "Describe", "List"].iter().any(|start| operation.starts_with(start))
}

async fn apply(upstream: &Upstream, write: Request<Bytes>, problems: &Problems) {
    let problem = match upstream.send(write).await {
        Err(error) => error,
        Ok(answer) if answer.status().is_success() => return,
        Ok(answer) => format!("{}: {}", answer.status(), String::from_utf8_lossy(answer.body())),
    };
    problems.add(format!("the stale copy refused a write that the first one took: {problem}"));
}
