use std::{
    future::poll_fn,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

tokio::task_local! {
    /// The meter of the actor whose code runs.
    static METER: Meter;
}

/// What waits for one life of an actor, and for how long its code has run. Clones are the same one.
///
/// It costs two looks at the clock each time the actor is polled, and one count per message: both are per batch or block,
/// never per row. What an actor leaves to tasks of its own (a webhook's senders) is not in it.
#[derive(Clone, Debug, Default)]
pub struct Meter(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Messages its mailbox has room for; 0: nobody sends it any but control messages.
    room: AtomicUsize,
    waiting: AtomicUsize,
    busy_ns: AtomicU64,
}

impl Meter {
    /// That of the actor whose code calls.
    pub fn current() -> Option<Self> {
        METER.try_with(Clone::clone).ok()
    }

    /// Runs an actor's life, and measures it.
    pub async fn measure<T>(self, life: impl Future<Output = T>) -> T {
        let meter = self.clone();
        METER
            .scope(self, async move {
                let mut life = pin!(life);
                poll_fn(|context| {
                    let _busy = meter.busy();
                    life.as_mut().poll(context)
                })
                .await
            })
            .await
    }

    /// The actor works until this is dropped, by a panic too.
    pub(crate) fn busy(&self) -> Busy {
        Busy { meter: self.clone(), since: Instant::now() }
    }

    /// Messages are sent to it, and its mailbox has room for so many.
    pub(crate) fn has_mailbox(&self, room: usize) {
        self.0.room.store(room, Ordering::Relaxed);
    }

    /// A message is on its way to it until this is dropped.
    pub(crate) fn waits(&self) -> Waits {
        self.0.waiting.fetch_add(1, Ordering::Relaxed);
        Waits(self.clone())
    }

    /// Messages that wait for it, and how many its mailbox has room for; `None` if nobody sends it any.
    pub fn mailbox(&self) -> Option<(usize, usize)> {
        let room = self.0.room.load(Ordering::Relaxed);
        (room > 0).then(|| (self.0.waiting.load(Ordering::Relaxed), room))
    }

    /// For how long its code has run, on its own thread or on one for work that blocks.
    pub fn worked(&self) -> Duration {
        Duration::from_nanos(self.0.busy_ns.load(Ordering::Relaxed))
    }
}

/// See [`Meter::busy`].
pub(crate) struct Busy {
    meter: Meter,
    since: Instant,
}

impl Drop for Busy {
    fn drop(&mut self) {
        let ns = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.meter.0.busy_ns.fetch_add(ns, Ordering::Relaxed);
    }
}

/// See [`Meter::waits`].
#[derive(Debug)]
pub(crate) struct Waits(Meter);

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::blocking;

    #[tokio::test(start_paused = true)]
    async fn only_what_an_actor_does_itself_is_measured() {
        let meter = Meter::default();
        let life = async {
            tokio::time::advance(Duration::from_secs(2)).await;
            Meter::current().expect("it is measured").has_mailbox(4);
            tokio::time::sleep(Duration::from_secs(50)).await;
        };
        meter.clone().measure(life).await;
        assert!(meter.worked() <= Duration::from_secs(2), "it slept: {:?}", meter.worked());
        assert_eq!(meter.mailbox(), Some((0, 4)));
        assert!(Meter::current().is_none());
    }

    #[tokio::test]
    async fn work_that_blocks_counts_wherever_it_is_done() {
        let meter = Meter::default();
        let work = || {
            std::thread::sleep(Duration::from_millis(60));
            Ok::<_, std::io::Error>(())
        };
        meter.clone().measure(async { blocking(work).await.expect("it sleeps") }).await;
        assert!(meter.worked() >= Duration::from_millis(60), "{:?}", meter.worked());
    }

    #[test]
    fn a_message_waits_until_it_is_taken() {
        let meter = Meter::default();
        assert_eq!(meter.mailbox(), None, "nobody sends it any");
        meter.has_mailbox(2);
        let (first, second) = (meter.waits(), meter.waits());
        assert_eq!(meter.mailbox(), Some((2, 2)));
        drop((first, second));
        assert_eq!(meter.mailbox(), Some((0, 2)));
    }
}
