use std::{
    collections::HashMap,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;

use crate::{
    model::rate_share::RateLeases,
    ports::{RateTable, StoreError},
};

/// A table of leased rates in memory, which counts its calls and can be out of order.
#[derive(Debug, Default)]
pub struct MemoryRateTable {
    tables: Mutex<HashMap<String, RateLeases>>,
    down: AtomicBool,
    loads: AtomicU64,
    stores: AtomicU64,
}

impl MemoryRateTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether calls fail from now on.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    /// How many reads and writes there were.
    pub fn calls(&self) -> (u64, u64) {
        (self.loads.load(Ordering::SeqCst), self.stores.load(Ordering::SeqCst))
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.down.load(Ordering::SeqCst) {
            return Err(StoreError::Retryable("the table is down".to_owned()));
        }
        Ok(())
    }
}

#[async_trait]
impl RateTable for MemoryRateTable {
    async fn load(&self, destination: &str) -> Result<RateLeases, StoreError> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        self.check()?;
        let tables = self.tables.lock().expect("no operation panics half-way");
        Ok(tables.get(destination).cloned().unwrap_or_default())
    }

    async fn store(&self, destination: &str, leases: &RateLeases) -> Result<bool, StoreError> {
        self.stores.fetch_add(1, Ordering::SeqCst);
        self.check()?;
        let mut tables = self.tables.lock().expect("no operation panics half-way");
        let version = tables.get(destination).map_or(0, |stored| stored.version);
        if version.checked_add(1) != Some(leases.version) {
            return Ok(false);
        }
        tables.insert(destination.to_owned(), leases.clone());
        Ok(true)
    }
}
