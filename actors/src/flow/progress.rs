use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::model::time::MonoMs;

/// When one actor last came round its loop. A loop that waits does so for no longer than a tick, so
/// an actor whose mark grows old is stuck.
#[derive(Clone, Debug)]
pub struct Progress(Arc<Mark>);

#[derive(Debug)]
struct Mark {
    actor: String,
    turned: AtomicU64,
}

impl Progress {
    /// The actor came round at `now`.
    pub fn turn(&self, now: MonoMs) {
        self.0.turned.store(now.0, Ordering::Relaxed);
    }
}

/// The marks of all living actors: what the systemd watchdog is tied to.
#[derive(Clone, Debug, Default)]
pub struct ProgressBoard(Arc<Mutex<Vec<Weak<Mark>>>>);

impl ProgressBoard {
    /// A mark for `actor`, which counts as turned at `now`. It is taken off the board when dropped.
    pub fn mark(&self, actor: impl Into<String>, now: MonoMs) -> Progress {
        let mark = Arc::new(Mark { actor: actor.into(), turned: AtomicU64::new(now.0) });
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        marks.retain(|mark| mark.strong_count() > 0);
        marks.push(Arc::downgrade(&mark));
        Progress(mark)
    }

    /// The actors that have not come round for longer than `stuck_after`.
    pub fn stuck(&self, now: MonoMs, stuck_after: Duration) -> Vec<String> {
        let marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        marks
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|mark| now.since(MonoMs(mark.turned.load(Ordering::Relaxed))) > stuck_after)
            .map(|mark| mark.actor.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_actor_is_stuck_until_it_turns_or_is_gone() {
        let board = ProgressBoard::default();
        let stuck_after = Duration::from_millis(100);
        let parser = board.mark("parser", MonoMs(0));
        let batcher = board.mark("batcher", MonoMs(0));
        assert!(board.stuck(MonoMs(100), stuck_after).is_empty());
        assert_eq!(board.stuck(MonoMs(101), stuck_after), ["parser", "batcher"]);
        parser.turn(MonoMs(50));
        assert_eq!(board.stuck(MonoMs(101), stuck_after), ["batcher"]);
        drop(batcher);
        assert!(board.stuck(MonoMs(101), stuck_after).is_empty());
    }
}
