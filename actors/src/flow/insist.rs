use std::{future::Future, time::Duration};

use rand::RngExt as _;

use super::Progress;
use crate::ports::{Clock, StoreError};

/// The longest first wait; doubled with each.
const BASE: Duration = Duration::from_millis(100);

/// The longest wait: a store that is back is noticed soon, one that is down is not stormed.
const CAP: Duration = Duration::from_secs(10);

/// Does a store operation again and again while what stands in its way may pass: an engine across the
/// network can be away for longer than any number of restarts lasts, and what is in hand meanwhile is
/// safest where it is. Every store operation may be repeated; only a refusal ends it.
///
/// Waits are drawn at random below a bound that doubles (full jitter).
pub async fn insist<T, F>(
    what: &'static str,
    clock: &dyn Clock,
    progress: &Progress,
    mut operation: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut bound = BASE;
    loop {
        let error = match operation().await {
            Err(error @ (StoreError::Retryable(_) | StoreError::Unknown(_))) => error,
            done => return done,
        };
        progress.turn(clock.mono());
        tracing::warn!(%error, "{what}: tried again until it succeeds");
        let wait = bound.mul_f64(rand::rng().random());
        tokio::time::sleep(wait).await;
        bound = (bound * 2).min(CAP);
        progress.turn(clock.mono());
    }
}
