//! A destination's idle connections: a stack, so that as few as needed stay warm and the rest age out.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::{Instant, sleep_until};

use super::connection::Connection;

struct Idle {
    connection: Connection,
    until: Instant,
}

#[derive(Default)]
struct Stack {
    /// The one used last is at the back.
    idle: VecDeque<Idle>,
    /// Whether a task waits to close what nobody uses.
    has_reaper: bool,
}

/// The stack, shared by all attempts at one destination.
pub(super) struct IdleConnections {
    stack: Arc<Mutex<Stack>>,
    limit: usize,
}

impl IdleConnections {
    /// Keeps at most `limit` connections.
    pub(super) fn new(limit: usize) -> Self {
        Self { stack: Arc::default(), limit }
    }

    /// The connection that was used last and is still good. Those that are not are closed.
    pub(super) fn take(&self) -> Option<Connection> {
        // One at a time, so that looking at a socket never happens under the lock.
        loop {
            let mut idle = lock(&self.stack).idle.pop_back()?;
            if idle.until > Instant::now() && idle.connection.is_quiet() {
                return Some(idle.connection);
            }
        }
    }

    /// Keeps a connection until then, if there is room.
    pub(super) fn put(&self, connection: Connection, until: Instant) {
        let mut stack = lock(&self.stack);
        if stack.idle.len() >= self.limit {
            return;
        }
        stack.idle.push_back(Idle { connection, until });
        if !stack.has_reaper {
            stack.has_reaper = true;
            tokio::spawn(reap(Arc::downgrade(&self.stack), until));
        }
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        lock(&self.stack).idle.len()
    }
}

/// Closes connections when their time is over, for as long as there are any. Without it a quiet
/// destination would hold sockets that the other side closed long ago.
async fn reap(stack: std::sync::Weak<Mutex<Stack>>, mut next: Instant) {
    loop {
        sleep_until(next).await;
        let Some(stack) = stack.upgrade() else { return };
        let mut stack = lock(&stack);
        let now = Instant::now();
        stack.idle.retain(|idle| idle.until > now);
        let Some(earliest) = stack.idle.iter().map(|idle| idle.until).min() else {
            stack.has_reaper = false;
            return;
        };
        next = earliest;
    }
}

/// A panic under the lock leaves a stack that is still a stack.
fn lock(stack: &Mutex<Stack>) -> MutexGuard<'_, Stack> {
    stack.lock().unwrap_or_else(PoisonError::into_inner)
}
