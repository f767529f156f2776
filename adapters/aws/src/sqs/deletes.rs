//! Acknowledgements: deletes, collected for a short while so that ten go in one call.
//!
//! Nothing depends on them. An entry that is not deleted comes again when its visibility timeout has run out, is
//! found `Settled` by its claim, and is deleted then.

use std::{sync::Arc, time::Duration};

use tokio::sync::{Semaphore, mpsc, oneshot};

use super::calls::{Calls, ENTRIES_MAX};
use crate::full_jitter;

/// Handles that wait for their call. Above it, who acknowledges waits too.
const WAITING_MAX: usize = 1_000;

/// Calls in flight.
const CALLS_IN_FLIGHT: u32 = 4;

/// Tries of a delete.
const TRIES: u32 = 4;

/// The bound of the first wait between two tries; doubled with each.
const WAIT_BASE: Duration = Duration::from_millis(200);

enum Order {
    Delete(String),
    /// Answered when everything before it is done.
    Flush(oneshot::Sender<()>),
}

/// The way to the task that deletes.
pub(super) struct Deletes(mpsc::Sender<Order>);

impl Deletes {
    /// The way, and the task to run. The task ends when the way is dropped.
    pub(super) fn new(
        calls: Calls,
        queue: &str,
        linger: Duration,
    ) -> (Self, impl Future<Output = ()> + use<>) {
        let (sender, orders) = mpsc::channel(WAITING_MAX);
        (Self(sender), run(calls, queue.into(), linger, orders))
    }

    /// Deletes messages, soon.
    pub(super) async fn push(&self, handles: impl IntoIterator<Item = String>) {
        for handle in handles {
            if self.0.send(Order::Delete(handle)).await.is_err() {
                return; // closed: it comes again, and is deleted then
            }
        }
    }

    /// Waits until everything is deleted, or given up.
    pub(super) async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.0.send(Order::Flush(done)).await.is_ok() {
            let _ = flushed.await; // dropped: the task is gone
        }
    }
}

async fn run(calls: Calls, queue: Arc<str>, linger: Duration, mut orders: mpsc::Receiver<Order>) {
    let in_flight = Arc::new(Semaphore::new(CALLS_IN_FLIGHT as usize));
    while let Some(order) = orders.recv().await {
        let mut handles = Vec::with_capacity(ENTRIES_MAX);
        let mut flush = None;
        let mut next = Some(order);
        let deadline = tokio::time::Instant::now() + linger;
        while let Some(order) = next.take() {
            match order {
                Order::Delete(handle) => handles.push(handle),
                Order::Flush(done) => {
                    flush = Some(done);
                    break;
                }
            }
            if handles.len() < ENTRIES_MAX {
                // Elapsed or closed: what there is goes.
                next = tokio::time::timeout_at(deadline, orders.recv()).await.ok().flatten();
            }
        }
        if !handles.is_empty() {
            let permit = in_flight.clone().acquire_owned().await.expect("the semaphore is never closed");
            let (calls, queue) = (calls.clone(), queue.clone());
            tokio::spawn(async move {
                delete(&calls, &queue, handles).await;
                drop(permit);
            });
        }
        if let Some(done) = flush {
            let all = in_flight.acquire_many(CALLS_IN_FLIGHT).await.expect("the semaphore is never closed");
            drop(all);
            let _ = done.send(()); // who asked may have stopped waiting
        }
    }
}

async fn delete(calls: &Calls, queue: &str, mut handles: Vec<String>) {
    let mut bound = WAIT_BASE;
    for attempt in 1..=TRIES {
        match calls.delete(queue, &handles).await {
            Ok(refusals) => {
                let mut index = 0..;
                handles.retain(|_| {
                    let id = index.next().map(|index: usize| index.to_string()).unwrap_or_default();
                    // A handle that is refused for itself won't get better.
                    refusals.get(&id).is_some_and(|refusal| !refusal.sender_fault)
                });
            }
            Err(failure) if attempt == TRIES => {
                let why = failure.why;
                tracing::warn!(
                    why,
                    entries = handles.len(),
                    "settled entries could not be deleted; they come again and are deleted then"
                );
                return;
            }
            Err(_) => {}
        }
        if handles.is_empty() || attempt == TRIES {
            return;
        }
        tokio::time::sleep(full_jitter(bound)).await;
        bound *= 2;
    }
}
