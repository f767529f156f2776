use std::time::Duration;

use async_trait::async_trait;

use super::{ItemOutcome, StoreError};
pub use crate::model::hint::{Handle, Hint, Outgoing, QueueDepth, Received, TransportLimits};

/// A message service with one queue per destination (B24), as five calls: all else about a queue is the coordinator's.
/// It delivers at least once, to anybody, and may lose entries.
///
/// Each is one call to the service, of up to [`TransportLimits::entries`] entries, and is not repeated in here. Of
/// several entries each has an outcome, in order. A queue that is not there, or that this process may not use, is an
/// error of the call, and says which call it was.
#[async_trait]
pub trait Transport: Send + Sync {
    /// What it can do.
    fn limits(&self) -> TransportLimits;

    /// Sends entries that nobody receives before `delay` has passed. `Unknown`: it may be there.
    async fn send(
        &self,
        destination: &str,
        entries: &[Outgoing],
        delay: Duration,
    ) -> Result<Vec<ItemOutcome>, StoreError>;

    /// Receives up to `max` entries and hides them from every other receiver for `hidden`. An empty queue is polled for
    /// up to `wait`, or the transport's own maximum if that is less. Entries that can't be read are removed from the
    /// queue and logged.
    async fn receive(
        &self,
        destination: &str,
        max: usize,
        wait: Duration,
        hidden: Duration,
    ) -> Result<Vec<Received>, StoreError>;

    /// Hides received entries for a time that begins now; zero gives them back. `Permanent` for a handle that is out of
    /// date.
    async fn hide(
        &self,
        destination: &str,
        changes: &[(Handle, Duration)],
    ) -> Result<Vec<ItemOutcome>, StoreError>;

    /// Deletes received entries. `Ok` or `Permanent` for one that is gone.
    async fn delete(&self, destination: &str, handles: &[Handle]) -> Result<Vec<ItemOutcome>, StoreError>;

    /// How many entries there are. Unknown is an error, never 0.
    async fn depth(&self, destination: &str) -> Result<QueueDepth, StoreError>;
}
