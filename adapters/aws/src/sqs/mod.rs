//! The queue on Amazon SQS (port `DispatchTarget`), shared by any number of processes.
//!
//! An entry is a whole batch ([`envelope`]). SQS delivers at least once, in any order, to anybody; what makes a
//! lease exclusive is the *claim* in the store that holds outbox and ledger (port `Claims`). So a duplicate, a
//! redelivery or an expired visibility timeout costs a call and never a second request. An entry ends with the lease
//! that it led to: a batch with messages left comes again from the store, as another entry, when it is due.
//!
//!
//! - `send.rs`: packs entries into calls, repeats what may be repeated, and reports per entry.
//! - `receive.rs`: pollers, which run while workers want something, and the sweeper of the stock.
//! - `stock.rs`: which received entries are kept and which are given back.
//! - `leases.rs`: claims what is handed out; extends, releases.
//! - `deletes.rs`: acknowledgements, collected into calls of ten.
//! - `dead_letters.rs`: what can never be delivered, with the reason.
//! - `intake.rs`: something else, the queue that a feed reads (port `Intake`).
//! - `provision.rs`: creates the queues or says what is wrong with them.
//!
//! Sources: Amazon SQS API Reference and Developer Guide ("Amazon SQS message quotas", "Amazon SQS visibility
//! timeout", "Amazon SQS short and long polling", "FIFO queue delivery logic").

mod calls;
mod dead_letters;
mod deletes;
mod envelope;
mod intake;
mod leases;
mod packing;
pub mod provision;
mod receive;
mod send;
mod stock;

use std::{
    collections::HashMap,
    fmt,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use aws_sdk_sqs::{Client, types::QueueAttributeName};
use futures_util::FutureExt as _;
use postrider_actors::{
    flow::Bell,
    model::{
        ids::BatchId,
        time::{MonoMs, UnixMs},
    },
    ports::{
        Claims, Clock, DispatchTarget, ItemOutcome, Lease, LeaseRequest, LeaseToken, OutboxEntry,
        OutboxPages, Queue, QueueDepth, Release, StoreError,
    },
};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::Instant,
};

pub use self::intake::{SqsIntake, SqsIntakeSettings};
use self::{
    calls::Calls,
    deletes::Deletes,
    leases::Held,
    stock::{Stock, StockLimits},
};
use crate::{ApiObserver, AwsSettings};

/// The most bytes that SQS takes in one message or one call: 1 MiB since August 2025, 262,144 before
/// (`SendMessageBatch` in the Amazon SQS API Reference).
pub const BYTES_MAX: usize = 1_048_576;

/// Bytes of received payload that wait for a worker. Pollers pause above it (I8).
const STOCK_BYTES_MAX: usize = 16 * 1_048_576;

/// How long `close` waits for calls that are under way.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How the queue is used. The defaults are those of `config/default.toml`.
#[derive(Clone, Debug)]
pub struct SqsSettings {
    /// The queue. A name that ends in `.fifo` makes it a FIFO queue.
    pub queue_url: String,
    /// Where entries go that can't be read; `None`: they stay, hidden, until the queue's own redrive policy
    /// takes them.
    pub dead_letter_url: Option<String>,
    /// `NODE-START` of this process: the first part of its claims' holder names.
    pub process: Arc<str>,
    /// Bytes per message and per call, at most [`BYTES_MAX`].
    pub max_bytes: usize,
    /// `SendMessageBatch` calls in flight; a FIFO queue has one, to keep the order.
    pub sends_in_flight: usize,
    /// How long `send` repeats what was not accepted.
    pub send_budget: Duration,
    /// Receives in flight at most, each a long poll.
    pub pollers: usize,
    /// How long a long poll waits, at most 20 s.
    pub wait: Duration,
    /// The visibility timeout: the duration of a lease.
    pub visibility: Duration,
    /// Received entries that wait for a worker, per destination.
    pub shelf: usize,
    /// How long an acknowledgement waits for others.
    pub delete_linger: Duration,
    /// FIFO: message groups per destination.
    pub lanes: u32,
    /// Receives after which the queue's redrive policy takes an entry away. Short of it the entry is renewed.
    pub max_receives: u32,
    /// For the timeouts of calls.
    pub aws: AwsSettings,
}

impl Default for SqsSettings {
    fn default() -> Self {
        Self {
            queue_url: String::new(),
            dead_letter_url: None,
            process: "node-0".into(),
            max_bytes: BYTES_MAX,
            sends_in_flight: 4,
            send_budget: Duration::from_secs(10),
            pollers: 2,
            wait: Duration::from_secs(20),
            visibility: Duration::from_mins(1),
            shelf: 20,
            delete_linger: Duration::from_secs(1),
            lanes: 16,
            max_receives: 1_000,
            aws: AwsSettings::default(),
        }
    }
}

impl SqsSettings {
    /// Whether it is a FIFO queue.
    pub fn is_fifo(&self) -> bool {
        provision::is_fifo(&self.queue_url)
    }
}

/// One process at an SQS queue.
pub struct SqsQueue {
    desk: Arc<Desk>,
    /// `None` when it was closed.
    tasks: Mutex<Option<Tasks>>,
}

impl fmt::Debug for SqsQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqsQueue").field("queue", &self.desk.settings.queue_url).finish_non_exhaustive()
    }
}

/// What the queue's operations and tasks share.
struct Desk {
    calls: Calls,
    settings: SqsSettings,
    claims: Arc<dyn Claims>,
    pages: Arc<dyn OutboxPages>,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    deletes: Deletes,
    /// Bytes per message and call: the settings', or the queue's own where that is less.
    max_bytes: AtomicUsize,
    /// Rung when workers ask, so that pollers look.
    asked: Notify,
    /// Rung when something was put into stock, so that the sweeper looks.
    stocked: Bell,
    ring: Mutex<Option<Ring>>,
    closing: watch::Sender<bool>,
    /// What the stock counts its time from.
    begun: Instant,
}

type Ring = Arc<dyn Fn() + Send + Sync>;

struct State {
    stock: Stock,
    leases: HashMap<BatchId, Held>,
}

impl Desk {
    fn state(&self) -> MutexGuard<'_, State> {
        // Its steps are infallible.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stock's time. It goes by the visibility timeouts that run at SQS, and so by real time, whatever clock the
    /// leases go by.
    fn stock_time(&self) -> MonoMs {
        MonoMs(u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// A deadline by the wall clock, for claims that other machines read.
    fn wall(&self, until: MonoMs) -> UnixMs {
        self.clock.wall().after(until.since(self.clock.mono()))
    }

    fn max_bytes(&self) -> usize {
        self.max_bytes.load(Ordering::Relaxed)
    }

    fn ring(&self) {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(ring) = ring {
            ring();
        }
    }

    fn is_closing(&self) -> bool {
        *self.closing.borrow()
    }

    fn close(&self) {
        self.closing.send_replace(true);
        self.asked.notify_waiters();
        self.stocked.ring();
    }
}

impl SqsQueue {
    /// Begins to use a queue: spawns its tasks on the current tokio runtime. Calls nothing before it is asked
    /// for something.
    pub fn new(
        client: Client,
        settings: SqsSettings,
        claims: Arc<dyn Claims>,
        pages: Arc<dyn OutboxPages>,
        clock: Arc<dyn Clock>,
        observer: Arc<dyn ApiObserver>,
    ) -> Self {
        let calls = Calls::new(client, observer, settings.aws.timeouts(settings.wait));
        let (deletes, deleting) = Deletes::new(calls.clone(), &settings.queue_url, settings.delete_linger);
        let limits = StockLimits {
            shelf_max: settings.shelf.max(1),
            bytes_max: STOCK_BYTES_MAX,
            visibility: settings.visibility,
        };
        let desk = Arc::new(Desk {
            max_bytes: AtomicUsize::new(settings.max_bytes.min(BYTES_MAX)),
            calls,
            claims,
            pages,
            clock,
            state: Mutex::new(State { stock: Stock::new(limits), leases: HashMap::new() }),
            deletes,
            asked: Notify::new(),
            stocked: Bell::default(),
            ring: Mutex::new(None),
            closing: watch::Sender::new(false),
            begun: Instant::now(),
            settings,
        });
        let tasks = Tasks {
            receiving: (0..desk.settings.pollers.max(1))
                .map(|index| keep_running("a poller", desk.clone(), move |desk| receive::poll(desk, index)))
                .chain([keep_running("the stock's sweeper", desk.clone(), receive::sweep)])
                .collect(),
            deleting: tokio::spawn(deleting),
        };
        Self { desk, tasks: Mutex::new(Some(tasks)) }
    }

    /// Holds the settings against the queue's own: takes over its message size where that is less, and says what
    /// else does not fit. To be called at the start.
    pub async fn check(&self) -> Result<Vec<provision::Difference>, StoreError> {
        let Desk { calls, settings, max_bytes, .. } = &*self.desk;
        let found = provision::attributes(calls, &settings.queue_url).await?;
        if let Some(limit) = found.maximum_message_bytes {
            max_bytes.store(limit.min(settings.max_bytes).min(BYTES_MAX), Ordering::Relaxed);
        }
        Ok(found.differences(&provision::Expected {
            fifo: settings.is_fifo(),
            visibility: settings.visibility,
            max_bytes: settings.max_bytes,
            max_receives: settings.max_receives,
        }))
    }

    /// Ends in good order: no new receives, what is in stock is given back, acknowledgements are made. Leases are
    /// their workers' to settle or release, before. Takes some seconds at most; what is not done by then is
    /// visible again after the visibility timeout, and is found settled or unclaimed.
    pub async fn close(&self) {
        self.desk.close();
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Tasks { receiving, deleting }) = tasks else { return };
        let finish = async {
            for task in receiving {
                // It ends when it sees that the queue is closing; a panic was logged.
                let _ = task.await;
            }
            self.desk.deletes.flush().await;
        };
        if tokio::time::timeout(CLOSE_TIMEOUT, finish).await.is_err() {
            tracing::warn!(
                "the SQS queue did not close in time; entries in hand come again after their visibility timeout"
            );
        }
        deleting.abort();
    }
}

impl Drop for SqsQueue {
    /// Its tasks end by themselves then.
    fn drop(&mut self) {
        self.desk.close();
    }
}

struct Tasks {
    receiving: Vec<JoinHandle<()>>,
    deleting: JoinHandle<()>,
}

/// Runs a task until it ends by itself; a panic in it is logged, and it is begun anew.
fn keep_running<F>(
    name: &'static str,
    desk: Arc<Desk>,
    task: impl Fn(Arc<Desk>) -> F + Send + 'static,
) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send,
{
    tokio::spawn(async move {
        while AssertUnwindSafe(task(desk.clone())).catch_unwind().await.is_err() {
            tracing::error!("{name} of the SQS queue panicked; it is begun anew");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    })
}

#[async_trait]
impl DispatchTarget for SqsQueue {
    /// What SQS delays by itself; a FIFO queue delays no single message.
    fn reach(&self) -> Duration {
        if self.desk.settings.is_fifo() { Duration::ZERO } else { calls::DELAY_MAX }
    }

    async fn send(&self, entries: &[OutboxEntry]) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        Ok(self.desk.send(entries).await)
    }

    async fn queue_depth(&self) -> Result<QueueDepth, StoreError> {
        use QueueAttributeName as Name;
        let names = [
            Name::ApproximateNumberOfMessages,
            Name::ApproximateNumberOfMessagesNotVisible,
            Name::ApproximateNumberOfMessagesDelayed,
        ];
        let found = self.desk.calls.attributes(&self.desk.settings.queue_url, &names).await?;
        let count = |name: &Name| {
            found
                .get(name)
                .and_then(|count| count.parse().ok())
                .ok_or_else(|| StoreError::Retryable(format!("the queue did not say its {}", name.as_str())))
        };
        Ok(QueueDepth {
            visible: count(&names[0])?,
            in_flight: count(&names[1])?,
            delayed: count(&names[2])?,
        })
    }
}

#[async_trait]
impl Queue for SqsQueue {
    fn on_arrival(&self, ring: Arc<dyn Fn() + Send + Sync>) {
        *self.desk.ring.lock().unwrap_or_else(PoisonError::into_inner) = Some(ring);
    }

    async fn acknowledge(&self, tokens: &[LeaseToken]) -> Result<(), StoreError> {
        self.desk.acknowledge(tokens).await;
        Ok(())
    }

    async fn lease(&self, request: LeaseRequest) -> Result<Vec<Lease>, StoreError> {
        self.desk.lease(request).await
    }

    async fn extend(
        &self,
        tokens: &[LeaseToken],
        until: MonoMs,
    ) -> Result<Vec<(BatchId, ItemOutcome)>, StoreError> {
        self.desk.extend(tokens, until).await
    }

    async fn release(&self, tokens: &[LeaseToken], how: Release) -> Result<(), StoreError> {
        self.desk.release(tokens, how).await
    }

    async fn release_holder(&self, holder: &str) -> Result<usize, StoreError> {
        self.desk.lose(|held| *held.holder == *holder).await
    }

    async fn rescue(&self, now: MonoMs) -> Result<usize, StoreError> {
        self.desk.lose(|held| held.until < now).await
    }
}
