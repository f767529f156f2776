//! What the receiver can bear: how long it takes for a request, and how many at once or per second.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde::Deserialize;
use tokio::time::Instant;

/// `PUT /capacity` has it as JSON; what it doesn't name is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// Milliseconds from a request to its answer.
    #[serde(default)]
    pub latency_ms: u64,
    /// Requests in progress; one more is answered 503 at once.
    pub slots: Option<u32>,
    /// Requests per second; more of them wait in a queue without an end.
    pub per_s: Option<f64>,
}

/// What it is now, and what is in progress.
#[derive(Debug)]
pub(super) struct Counter(Mutex<Progress>);

#[derive(Debug)]
struct Progress {
    capacity: Capacity,
    taken: u32,
    /// When the last request of the queue will have been served.
    served: Instant,
}

/// A request in progress.
pub(super) struct Place<'a> {
    counter: &'a Counter,
    /// When its answer is due.
    pub(super) due: Instant,
}

impl Counter {
    pub(super) fn new(capacity: Capacity) -> Self {
        Self(Mutex::new(Progress { capacity, taken: 0, served: Instant::now() }))
    }

    pub(super) fn set(&self, capacity: Capacity) {
        self.lock().capacity = capacity;
    }

    /// A place for a request that came `now`; `None` if there is no slot left.
    pub(super) fn enter(&self, now: Instant) -> Option<Place<'_>> {
        let mut progress = self.lock();
        let Capacity { latency_ms, slots, per_s } = progress.capacity;
        if slots.is_some_and(|slots| progress.taken >= slots) {
            return None;
        }
        progress.taken += 1;
        let mut due = now + Duration::from_millis(latency_ms);
        if let Some(per_s) = per_s.filter(|per_s| *per_s > 0.0) {
            progress.served = progress.served.max(now) + Duration::from_secs_f64(1.0 / per_s);
            due += progress.served - now;
        }
        Some(Place { counter: self, due })
    }

    /// Each change is one assignment: a panic elsewhere leaves nothing half done.
    fn lock(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.counter.lock().taken -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn slots_are_given_back_and_a_queue_grows_with_each_request() {
        let counter = Counter::new(Capacity { latency_ms: 10, slots: Some(2), per_s: Some(100.0) });
        let now = Instant::now();
        let first = counter.enter(now).unwrap();
        let second = counter.enter(now).unwrap();
        assert!(counter.enter(now).is_none());
        assert_eq!(first.due - now, Duration::from_millis(20));
        assert_eq!(second.due - now, Duration::from_millis(30));
        drop(first);
        assert_eq!(counter.enter(now).unwrap().due - now, Duration::from_millis(40));
        counter.set(Capacity::default());
        let free: Vec<_> = (0..1000).map(|_| counter.enter(now).unwrap().due).collect();
        assert!(free.iter().all(|due| *due == now));
    }
}
