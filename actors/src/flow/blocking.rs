use std::io;

use super::Meter;

/// Runs `work` off the actors' threads. A panic in it is the caller's own: its actor dies of it and is
/// restarted.
pub async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<io::Error> + Send + 'static,
{
    let meter = Meter::current();
    let work = move || {
        let _busy = meter.as_ref().map(Meter::busy);
        work()
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down.
            Err(cancelled) => Err(io::Error::other(cancelled).into()),
        },
    }
}
