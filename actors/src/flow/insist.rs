use std::{future::Future, pin::pin, time::Duration};

use super::{Progress, back_off};
use crate::{
    model::backoff::Backoff,
    ports::{Clock, StoreError},
};

/// A store that is back is noticed soon, one that is down is not stormed.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));

/// When an answer counts as one that never comes: after longer than the timeouts of any engine together. Only then does
/// the watchdog act.
const ANSWER_MAX: Duration = Duration::from_mins(7);

/// Repeats a store operation while its failure may pass: an engine across the network can be down for longer than
/// any number of restarts lasts, and held work is safest where it is. Every store operation may be repeated; only a
/// refusal ends this.
pub async fn insist<T, F>(
    what: &'static str,
    clock: &dyn Clock,
    progress: &Progress,
    mut operation: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut failures: u32 = 0;
    loop {
        match awaited(clock, progress, operation()).await {
            // The adapter has said what is missing, and says when it is there: no line per try.
            Err(error @ StoreError::Denied(_)) => tracing::debug!(%error, "{what}: waits for an operator"),
            Err(error @ (StoreError::Retryable(_) | StoreError::Unknown(_))) => {
                tracing::warn!(%error, "{what}: tried again until it succeeds");
            }
            done => return done,
        }
        failures = failures.saturating_add(1);
        back_off(BACKOFF, failures).await;
    }
}

/// Waits for one answer; who waits in vain says so.
async fn awaited<T>(clock: &dyn Clock, progress: &Progress, operation: impl Future<Output = T>) -> T {
    let mut operation = pin!(operation);
    if let Ok(answer) = tokio::time::timeout(ANSWER_MAX, operation.as_mut()).await {
        return answer;
    }
    progress.unanswered(clock.mono());
    let answer = operation.await;
    progress.answered();
    answer
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::{flow::ProgressBoard, model::time::UnixMs, testing::TokioClock};

    #[tokio::test(start_paused = true)]
    async fn a_slow_answer_is_no_stuck_actor_and_one_that_never_comes_is() {
        let clock = TokioClock::at(UnixMs(0));
        let board = ProgressBoard::default();
        let progress = board.mark("worker");
        let never = insist("waiting", &clock, &progress, std::future::pending::<Result<(), StoreError>>);
        assert!(tokio::time::timeout(Duration::from_mins(4), never).await.is_err());
        assert!(board.stuck(clock.mono()).is_empty(), "it may still come");
        let never = insist("waiting", &clock, &progress, std::future::pending::<Result<(), StoreError>>);
        assert!(tokio::time::timeout(Duration::from_mins(8), never).await.is_err());
        assert_eq!(board.stuck(clock.mono()), ["worker"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_pass_is_tried_again_and_a_refusal_is_not() {
        let clock = TokioClock::at(UnixMs(0));
        let progress = ProgressBoard::default().mark("worker");
        let mut tries = 0;
        let done = insist("trying", &clock, &progress, || {
            tries += 1;
            let answer = match tries {
                1..=5 => Err(StoreError::Unknown("no answer".into())),
                6..=8 => Err(StoreError::Retryable("throttled".into())),
                9..=10 => Err(StoreError::Denied("no permission".into())),
                _ => Ok(tries),
            };
            std::future::ready(answer)
        });
        assert_eq!(done.await, Ok(11));
        let refused = || std::future::ready(Err::<(), _>(StoreError::Permanent("no".into())));
        assert!(insist("trying", &clock, &progress, refused).await.is_err());
    }
}
