//! What is only remembered: it is bounded, and what is missing of it is read again.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Entries of each map.
pub(super) const CACHED_MAX: usize = 4096;

/// Leaves room for one more.
pub(super) fn make_room<K: Eq + Hash + Clone, V>(map: &mut HashMap<K, V>) {
    if map.len() >= CACHED_MAX {
        // Any will do: what is missing is read again.
        let some: Vec<_> = map.keys().take(CACHED_MAX / 4).cloned().collect();
        for key in some {
            map.remove(&key);
        }
    }
}

/// Locks; a panic in between leaves nothing half-done that matters, for all of it is only remembered.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
