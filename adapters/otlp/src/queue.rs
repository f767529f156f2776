//! What is between the workers and the thread that posts.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use postrider_actors::model::trace::BatchSpan;

/// Spans that wait at most, some 400 bytes each (I8): at 140 batches per second, 70,000 messages, those of a quarter of a minute. As
/// OpenTelemetry's own batch processor has it.
pub(crate) const QUEUED_MAX: usize = 2_048;

/// Spans of one request, and how long the first of them waits for others.
pub(crate) const REQUEST_MAX: usize = 512;
const LINGER: Duration = Duration::from_secs(1);

/// Spans that wait to be posted.
#[derive(Default)]
pub(crate) struct SpanQueue {
    state: Mutex<State>,
    /// A span came, or the queue is closed.
    changed: Condvar,
    /// The thread has ended.
    over: Condvar,
}

#[derive(Default)]
struct State {
    spans: VecDeque<BatchSpan>,
    is_closed: bool,
    has_ended: bool,
}

impl SpanQueue {
    fn state(&self) -> MutexGuard<'_, State> {
        // Changed by infallible steps only.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a span in; whether there was room.
    pub(crate) fn push(&self, span: BatchSpan) -> bool {
        let mut state = self.state();
        let has_room = !state.is_closed && state.spans.len() < QUEUED_MAX;
        if has_room {
            state.spans.push_back(span);
            // The thread waits for the first, and then until there is a request's worth.
            if matches!(state.spans.len(), 1 | REQUEST_MAX) {
                self.changed.notify_one();
            }
        }
        has_room
    }

    /// Takes out the spans of the next request; `None` once it is closed and empty.
    pub(crate) fn next(&self) -> Option<Vec<BatchSpan>> {
        let is_none = |state: &mut State| state.spans.is_empty() && !state.is_closed;
        let state = self.changed.wait_while(self.state(), is_none).unwrap_or_else(PoisonError::into_inner);
        let is_few = |state: &mut State| state.spans.len() < REQUEST_MAX && !state.is_closed;
        let waited = self.changed.wait_timeout_while(state, LINGER, is_few);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let count = state.spans.len().min(REQUEST_MAX);
        (count > 0).then(|| state.spans.drain(..count).collect())
    }

    /// Waits before another try. Whether there may be one: not once it is closed.
    pub(crate) fn sleep(&self, wait: Duration) -> bool {
        let is_open = |state: &mut State| !state.is_closed;
        let waited = self.changed.wait_timeout_while(self.state(), wait, is_open);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !state.is_closed
    }

    /// Takes nothing more, and waits until the thread is done with what is left; whether it is.
    pub(crate) fn close(&self, within: Duration) -> bool {
        let mut state = self.state();
        state.is_closed = true;
        self.changed.notify_one();
        let waited = self.over.wait_timeout_while(state, within, |state| !state.has_ended);
        waited.unwrap_or_else(PoisonError::into_inner).0.has_ended
    }

    /// The thread has ended.
    pub(crate) fn ended(&self) {
        self.state().has_ended = true;
        self.over.notify_all();
    }
}
