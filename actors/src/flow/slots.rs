use std::sync::{Arc, Mutex, PoisonError};

/// A fixed number of numbered places, e.g. one per parser.
#[derive(Clone, Debug)]
pub struct Slots {
    free: Arc<Mutex<Vec<usize>>>,
    on_free: super::Bell,
}

impl Slots {
    /// `count` free places; `on_free` rings whenever one is given back.
    pub fn new(count: usize, on_free: super::Bell) -> Self {
        Self { free: Arc::new(Mutex::new((0..count).rev().collect())), on_free }
    }

    /// A free place, if there is one.
    pub fn take(&self) -> Option<Slot> {
        let index = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        Some(Slot { index, slots: self.clone() })
    }
}

/// A place that is given back when it is dropped, even by a panic.
#[derive(Debug)]
pub struct Slot {
    index: usize,
    slots: Slots,
}

impl Slot {
    /// Its number.
    pub fn index(&self) -> usize {
        self.index
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        self.slots.on_free.ring();
    }
}
