//! What keeps the listener's memory and the inbox bounded, whatever is sent (I8).

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use actix_web::{http::StatusCode, web::Payload};
use futures_util::StreamExt as _;
use postrider_actors::ports::ReceiptLedger;
use tokio::{
    sync::{Mutex, Semaphore, SemaphorePermit},
    time::{Instant, timeout, timeout_at},
};

use super::error::RequestError;

/// A longer body is answered 413.
pub const BODY_BYTES_MAX: usize = 1 << 20;

/// How long a body may take to arrive: whoever sends a byte now and then loses the place.
const BODY_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a request waits for its turn or for memory, and how long the ledger may then take. Senders commonly give
/// up after 15 to 30 seconds.
pub(super) const TAKE_TIMEOUT: Duration = Duration::from_secs(15);

/// The first bytes of a body, which every connection may have in memory …
const BODY_BYTES_FIRST: usize = 64 << 10;
/// … and what all longer bodies together may have. Who sends slowly, and has yet to prove who it is, holds a
/// part of it for as long as a body may take; bodies up to the first bytes never wait for it.
const BODIES_BYTES_MAX: usize = 32 << 20;

/// How old a count of the inbox may be.
const COUNT_EVERY: Duration = Duration::from_secs(2);

/// Nobody knows how many wait: more than any bound.
const UNKNOWN: u64 = u64::MAX;

pub(super) fn too_long() -> RequestError {
    RequestError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("the body is longer than {BODY_BYTES_MAX} bytes"),
    )
}

/// Bodies in memory.
pub(super) struct Bodies(Semaphore);

/// A body, and its share of the memory.
pub(super) struct BoundedBody<'a> {
    pub(super) bytes: Vec<u8>,
    _share: Option<SemaphorePermit<'a>>,
}

impl Bodies {
    pub(super) fn new() -> Self {
        Self(Semaphore::new(BODIES_BYTES_MAX))
    }

    /// Reads a body as far as it may go; `said` is its length, if the sender has said it. Its share is taken once and as a
    /// whole, so that bodies that are half read never wait for each other.
    pub(super) async fn read(
        &self,
        from: &mut Payload,
        said: Option<u64>,
    ) -> Result<BoundedBody<'_>, RequestError> {
        let whole = said.map_or(BODY_BYTES_MAX, |bytes| bytes.min(BODY_BYTES_MAX as u64) as usize);
        let mut deadline = Instant::now() + BODY_TIMEOUT;
        let mut bytes = Vec::with_capacity(whole.min(BODY_BYTES_FIRST));
        let mut share = None;
        loop {
            let data = timeout_at(deadline, from.next()).await.map_err(|_| {
                RequestError::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")
            })?;
            let Some(data) = data else { return Ok(BoundedBody { bytes, _share: share }) };
            // The sender is gone or broke the framing; it may not get this.
            let data =
                data.map_err(|_| RequestError::new(StatusCode::BAD_REQUEST, "the body was cut off"))?;
            let length = bytes.len() + data.len();
            if length > BODY_BYTES_MAX {
                return Err(too_long());
            }
            if length > BODY_BYTES_FIRST && share.is_none() {
                let asked = Instant::now();
                let taken = timeout(TAKE_TIMEOUT, self.0.acquire_many(whole as u32)).await;
                let taken = taken.map_err(|_| RequestError::later())?;
                share = Some(taken.expect("nobody closes the semaphore"));
                // The sender did not cause that wait.
                deadline += asked.elapsed();
                bytes.reserve_exact(whole - bytes.len());
            }
            bytes.extend_from_slice(&data);
        }
    }
}

/// Whether the inbox has room, by a count that is a few seconds old at most.
pub(super) struct Room {
    max: u64,
    /// What the last count found, and what was taken since.
    waiting: AtomicU64,
    /// When that was.
    counted: Mutex<Option<Instant>>,
}

impl Room {
    /// For more while no more than `max` receipts wait.
    pub(super) fn new(max: u64) -> Self {
        Self { max, waiting: AtomicU64::new(UNKNOWN), counted: Mutex::default() }
    }

    /// Whether there is room. An unknown number leaves none.
    pub(super) async fn is_left(&self, ledger: &dyn ReceiptLedger) -> bool {
        match self.counted.try_lock() {
            Ok(mut counted) if counted.is_none_or(|at| at.elapsed() >= COUNT_EVERY) => {
                let waiting = timeout(TAKE_TIMEOUT, ledger.waiting()).await.ok().and_then(Result::ok);
                self.waiting.store(waiting.unwrap_or(UNKNOWN), Relaxed);
                *counted = waiting.map(|_| Instant::now());
            }
            // Another request counts. If there is nothing else to go by, this one goes by what it finds.
            Err(_) if self.waiting.load(Relaxed) == UNKNOWN => drop(self.counted.lock().await),
            _ => {}
        }
        self.waiting.load(Relaxed) <= self.max
    }

    /// So many more wait.
    pub(super) fn took(&self, receipts: u64) {
        self.waiting.update(Relaxed, Relaxed, |waiting| waiting.saturating_add(receipts));
    }
}
