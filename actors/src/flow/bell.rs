use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tokio::sync::Notify;

/// A hint that there is something to do in a store. It holds nothing: a ring that nobody waits for is
/// kept for the next waiter, several rings are one, and a lost hint costs no more than a tick.
#[derive(Clone, Debug, Default)]
pub struct Bell(Arc<Notify>);

/// Bells that ring together: those of all who may have something to do.
#[derive(Clone, Debug, Default)]
pub struct Bells(Arc<RwLock<Vec<Bell>>>);

impl From<Vec<Bell>> for Bells {
    fn from(bells: Vec<Bell>) -> Self {
        Self(Arc::new(RwLock::new(bells)))
    }
}

impl Bells {
    /// Rings each.
    pub fn ring(&self) {
        self.0.read().unwrap_or_else(PoisonError::into_inner).iter().for_each(Bell::ring);
    }

    /// Others have something to do from now on.
    pub fn replace(&self, bells: Vec<Bell>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = bells;
    }
}

impl Bell {
    /// Wakes one waiter, now or when it comes.
    pub fn ring(&self) {
        self.0.notify_one();
    }

    /// Waits for a ring, but no longer than `tick`.
    pub async fn wait(&self, tick: Duration) {
        // Elapsing is not an error: the waiter looks into the store either way.
        let _ = tokio::time::timeout(tick, self.0.notified()).await;
    }
}
