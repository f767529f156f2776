//! What the receiver counts.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::verdict::Reply;

/// What came in so far: `GET /stats`, and what is printed at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Whole requests. A bundle is one of them, with several messages.
    pub requests: u64,
    /// Messages that were answered 2xx. Each message of a request is in exactly one of these three.
    pub accepted: u64,
    /// Messages that failed on purpose.
    pub failed: u64,
    /// Messages that were answered 401: no signature, a wrong one, or a timestamp more than five minutes off.
    pub unverified: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
    /// When the first came, in milliseconds since the epoch.
    pub first_at: Option<u64>,
    /// When the last came.
    pub last_at: Option<u64>,
}

#[derive(Debug, Default)]
pub(super) struct RequestCounters {
    requests: AtomicU64,
    accepted: AtomicU64,
    failed: AtomicU64,
    unverified: AtomicU64,
    bytes: AtomicU64,
    /// 0 for none.
    first_at: AtomicU64,
    last_at: AtomicU64,
}

impl RequestCounters {
    /// A request came, and its messages are answered so.
    pub(super) fn count(&self, replies: &[Reply], bytes: usize, at: u64) {
        for reply in replies {
            let counter = match reply {
                Reply::Accepted(_) => &self.accepted,
                Reply::Failed(_) => &self.failed,
                Reply::Unverified => &self.unverified,
            };
            counter.fetch_add(1, Relaxed);
        }
        self.requests.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes as u64, Relaxed);
        if self.first_at.load(Relaxed) == 0 {
            // The first of several at once wins; they differ by less than the clock's step.
            let _ = self.first_at.compare_exchange(0, at, Relaxed, Relaxed);
        }
        if self.last_at.load(Relaxed) < at {
            self.last_at.fetch_max(at, Relaxed);
        }
    }

    pub(super) fn read(&self) -> Counts {
        let time = |at: &AtomicU64| Some(at.load(Relaxed)).filter(|&at| at > 0);
        let [requests, accepted, failed, unverified] =
            [&self.requests, &self.accepted, &self.failed, &self.unverified]
                .map(|counter| counter.load(Relaxed));
        Counts {
            requests,
            accepted,
            failed,
            unverified,
            bytes: self.bytes.load(Relaxed),
            first_at: time(&self.first_at),
            last_at: time(&self.last_at),
        }
    }
}
