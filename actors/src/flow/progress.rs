use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{model::time::MonoMs, ports::Clock};

/// How often a thread gives a sign of life.
const BEAT: Duration = Duration::from_secs(1);

/// An actor's mark on the board. Actors wait for disks, networks and one another, for as long as it takes: that is no
/// fault of the process. Only one that is owed an answer by this process which never comes says so here.
#[derive(Clone, Debug)]
pub struct Progress(Arc<Mark>);

#[derive(Debug)]
struct Mark {
    name: String,
    /// From when on it counts as stuck.
    stuck_from: AtomicU64,
}

impl Progress {
    /// The actor waits for an answer that never comes.
    pub fn unanswered(&self, now: MonoMs) {
        self.0.stuck_from.store(now.0, Ordering::Relaxed);
    }

    /// The answer came after all.
    pub fn answered(&self) {
        self.0.stuck_from.store(u64::MAX, Ordering::Relaxed);
    }
}

/// What the systemd watchdog is tied to: threads that give no sign of life, actors that are never answered.
#[derive(Clone, Debug, Default)]
pub struct ProgressBoard(Arc<Mutex<Vec<Weak<Mark>>>>);

impl ProgressBoard {
    /// A mark for `actor`. It is taken off the board when dropped.
    pub fn mark(&self, actor: impl Into<String>) -> Progress {
        Progress(self.add(actor.into(), u64::MAX))
    }

    /// Gives signs of life of the thread that it runs on, named `thread`, which is stuck when none came for
    /// `stuck_after`. Whatever tasks wait for, a thread that is not blocked gets round to this one.
    pub fn beat(
        &self,
        thread: &str,
        stuck_after: Duration,
        clock: Arc<dyn Clock>,
    ) -> impl Future<Output = ()> + use<> {
        let stuck_from = move |now: MonoMs| now.after(stuck_after).0;
        let mark = self.add(thread.to_owned(), stuck_from(clock.mono()));
        async move {
            loop {
                mark.stuck_from.store(stuck_from(clock.mono()), Ordering::Relaxed);
                tokio::time::sleep(BEAT).await;
            }
        }
    }

    fn add(&self, name: String, stuck_from: u64) -> Arc<Mark> {
        let mark = Arc::new(Mark { name, stuck_from: stuck_from.into() });
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        marks.retain(|mark| mark.strong_count() > 0);
        marks.push(Arc::downgrade(&mark));
        mark
    }

    /// The threads and actors that are stuck.
    pub fn stuck(&self, now: MonoMs) -> Vec<String> {
        let marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let marks = marks.iter().filter_map(Weak::upgrade);
        let stuck = marks.filter(|mark| now.0 > mark.stuck_from.load(Ordering::Relaxed));
        stuck.map(|mark| mark.name.clone()).collect()
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::{model::time::UnixMs, testing::FakeClock};

    #[tokio::test(start_paused = true)]
    async fn a_thread_is_stuck_until_it_beats_or_is_gone() {
        let clock = Arc::new(FakeClock::at(UnixMs(0)));
        let board = ProgressBoard::default();
        let stuck_after = Duration::from_secs(20);
        let beat = board.beat("arbiter 0", stuck_after, clock.clone());
        clock.advance(stuck_after);
        assert!(board.stuck(clock.mono()).is_empty());
        clock.advance(Duration::from_millis(1));
        assert_eq!(board.stuck(clock.mono()), ["arbiter 0"]);
        let beating = tokio::spawn(beat);
        tokio::task::yield_now().await;
        assert!(board.stuck(clock.mono()).is_empty());
        clock.advance(2 * stuck_after);
        tokio::time::sleep(BEAT).await;
        tokio::task::yield_now().await;
        assert!(board.stuck(clock.mono()).is_empty());
        clock.advance(2 * stuck_after);
        assert_eq!(board.stuck(clock.mono()), ["arbiter 0"]);
        beating.abort();
        assert!(beating.await.is_err_and(|error| error.is_cancelled()));
        assert!(board.stuck(clock.mono()).is_empty());
    }

    #[test]
    fn an_actor_is_stuck_while_it_is_owed_an_answer() {
        let board = ProgressBoard::default();
        let parser = board.mark("parser");
        assert!(board.stuck(MonoMs(1_000_000)).is_empty(), "it may wait as long as it likes");
        parser.unanswered(MonoMs(1_000_000));
        assert_eq!(board.stuck(MonoMs(1_000_001)), ["parser"]);
        parser.answered();
        assert!(board.stuck(MonoMs(1_000_001)).is_empty());
    }
}
