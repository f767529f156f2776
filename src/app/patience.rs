//! Waiting for engines at the start.

use std::time::Duration;

use postrider_actors::{flow::back_off, model::backoff::Backoff};
use tokio::time::Instant;

use super::error::StartError;

/// How long an engine that does not answer is waited for at the start: the machine, or the network, may have
/// just come up. Then systemd tries again, for as long as the engine is away.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between two attempts.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(4));

/// Repeats what may pass, for a while.
pub(super) async fn patiently<T>(open: impl AsyncFn() -> Result<T, StartError>) -> Result<T, StartError> {
    let until = Instant::now() + PATIENCE;
    let mut failures = 0;
    loop {
        match open().await {
            Err(StartError::Engine { engine, problem, may_pass: true }) if Instant::now() < until => {
                tracing::warn!(engine, problem, "not there yet: waiting for it");
                failures += 1;
                back_off(BACKOFF, failures).await;
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn away(may_pass: bool) -> StartError {
        StartError::Engine { engine: "ledger".to_owned(), problem: "refused".to_owned(), may_pass }
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_pass_is_waited_for_and_nothing_else() {
        let attempts = Cell::new(0);
        let open = async |answers_at: u32, may_pass| {
            attempts.set(0);
            patiently(async || {
                attempts.set(attempts.get() + 1);
                if attempts.get() >= answers_at { Ok(attempts.get()) } else { Err(away(may_pass)) }
            })
            .await
        };
        assert_eq!(open(5, true).await.unwrap(), 5);
        assert!(matches!(open(5, false).await, Err(StartError::Engine { may_pass: false, .. })));
        assert_eq!(attempts.get(), 1);
        let started = Instant::now();
        assert!(matches!(open(u32::MAX, true).await, Err(StartError::Engine { may_pass: true, .. })));
        let waited = started.elapsed();
        assert!(waited >= PATIENCE && waited < PATIENCE + BACKOFF.cap, "{waited:?}");
    }
}
