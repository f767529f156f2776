use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::Semaphore;

/// How many may be in flight at once, whoever sends: the workers of a configuration, and those of the one before it that
/// finish what they have begun. Their number may change while places are taken.
#[derive(Clone, Debug)]
pub struct Places(Arc<Inside>);

#[derive(Debug)]
struct Inside {
    free: Semaphore,
    size: Mutex<usize>,
    /// Places that are taken and beyond the size: they are not given to anybody else.
    surplus: AtomicUsize,
}

/// A place that is given back when it is dropped.
#[derive(Debug)]
pub struct Place(Places);

impl Places {
    /// So many places.
    pub fn new(size: usize) -> Self {
        let free = Semaphore::new(size);
        Self(Arc::new(Inside { free, size: Mutex::new(size), surplus: AtomicUsize::new(0) }))
    }

    /// So many from now on. Who has a place keeps it.
    pub fn resize(&self, size: usize) {
        let inside = &*self.0;
        let mut current = inside.size.lock().unwrap_or_else(PoisonError::into_inner);
        let surplus = inside.surplus.load(Ordering::SeqCst);
        if size >= *current {
            let kept = surplus.min(size - *current);
            inside.surplus.store(surplus - kept, Ordering::SeqCst);
            inside.free.add_permits(size - *current - kept);
        } else {
            let less = *current - size;
            let taken_back = inside.free.forget_permits(less);
            inside.surplus.store(surplus + less - taken_back, Ordering::SeqCst);
        }
        *current = size;
    }

    /// A place, if one is free.
    pub fn try_take(&self) -> Option<Place> {
        self.0.free.try_acquire().ok()?.forget();
        Some(Place(self.clone()))
    }

    /// Waits for a place; first come, first served.
    pub async fn take(&self) -> Place {
        self.0.free.acquire().await.expect("nobody closes the semaphore").forget();
        Place(self.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let inside = &*self.0.0;
        if inside.surplus.load(Ordering::SeqCst) > 0 {
            let _size = inside.size.lock().unwrap_or_else(PoisonError::into_inner);
            let surplus = inside.surplus.load(Ordering::SeqCst);
            if surplus > 0 {
                inside.surplus.store(surplus - 1, Ordering::SeqCst);
                return;
            }
        }
        inside.free.add_permits(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_never_more_places_than_the_last_size_but_those_that_were_taken_before() {
        let places = Places::new(3);
        let mut taken: Vec<_> = (0..3).map(|_| places.try_take().unwrap()).collect();
        assert!(places.try_take().is_none());
        places.resize(1);
        taken.pop();
        taken.pop();
        assert!(places.try_take().is_none(), "one is taken, and there is one");
        places.resize(2);
        taken.push(places.try_take().unwrap());
        assert!(places.try_take().is_none());
        taken.clear();
        taken.extend([places.try_take().unwrap(), places.try_take().unwrap()]);
        assert!(places.try_take().is_none());
        places.resize(0);
        places.resize(4);
        taken.extend([places.try_take().unwrap(), places.try_take().unwrap()]);
        assert!(places.try_take().is_none());
    }
}
