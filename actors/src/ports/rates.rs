use async_trait::async_trait;

use super::StoreError;
use crate::model::rate_share::RateLeases;

/// Where processes that share rates keep their leases: one small item per destination, changed by
/// compare-and-set. All that is decided is decided by `model::rate_share`; an implementation stores and
/// returns what it is given and never judges a lease, also not by its age.
///
/// Calls may take arbitrarily long, fail, or be cancelled after they were sent: a `store` may then still be
/// done later, unless the version has moved on.
#[async_trait]
pub trait RateTable: Send + Sync {
    /// The leases of `destination` as the last `store` that succeeded left them, whoever's it was (a strongly
    /// consistent read); empty and of version 0 if nothing was stored.
    async fn load(&self, destination: &str) -> Result<RateLeases, StoreError>;

    /// Replaces the leases of `destination` if their version is `leases.version - 1`; `false` if it is not.
    /// `Unknown` if it may have been done.
    ///
    /// An item, once written, stays, even without leases: a version that came back would make an old lease's
    /// mark look current.
    async fn store(&self, destination: &str, leases: &RateLeases) -> Result<bool, StoreError>;
}
