//! The store that an operator's commands work on, as the configuration chooses.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use postrider_actors::{
    model::receipt_format::ReceiptFormat,
    ports::{ReceiptRejects, StoreError},
    receipt_reread::{RereadCounts, reread},
};
use tokio::runtime::Runtime;

use super::engines::runtime;
#[cfg(not(all(feature = "aws", feature = "postgres")))]
use crate::built_in::{Engine, Engines};
use crate::{
    clock::SystemClock,
    config::{Config, LedgerKind, Profile, ReceiptSource},
};
use postrider_actors::ports::console::{Operate, View, receipts::ReceiptView};
use postrider_sqlite::{Operator, ReceiptOperator, ReceiptViewer, Viewer};

/// What is missing. The configuration is refused before this is reached.
#[cfg(not(all(feature = "aws", feature = "postgres")))]
fn refused(engine: Engine) -> anyhow::Error {
    anyhow::anyhow!(Engines::BUILT_IN.missing(&[engine]).unwrap_or_default())
}

/// Opens the store to read. It must be there already.
pub fn view(config: &Config) -> anyhow::Result<Box<dyn View>> {
    match config.profile {
        Profile::Embedded => Ok(Box::new(Viewer::open(&config.state.dir)?)),
        #[cfg(feature = "aws")]
        Profile::Aws => Ok(Box::new(super::aws::console(config)?)),
        #[cfg(not(feature = "aws"))]
        Profile::Aws => Err(refused(Engine::Dynamodb)),
    }
}

/// The ledger of rows, and a runtime to wait for it on.
pub struct RowLedger {
    view: Box<dyn ReceiptView>,
    runtime: Runtime,
}

impl RowLedger {
    /// Asks one thing.
    pub fn ask<'a, T>(
        &'a self,
        question: impl FnOnce(&'a dyn ReceiptView) -> BoxFuture<'a, Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        self.runtime.block_on(question(&*self.view))
    }
}

/// Opens the ledger of rows to read; `None` if the configuration has none.
pub fn rows(config: &Config) -> anyhow::Result<Option<RowLedger>> {
    if !config.has_rows() {
        return Ok(None);
    }
    let runtime = runtime()?;
    let view: Box<dyn ReceiptView> = match config.ledger.kind {
        LedgerKind::Embedded => Box::new(ReceiptViewer::open(&config.state.dir)?),
        #[cfg(feature = "postgres")]
        LedgerKind::Postgres => Box::new(runtime.block_on(super::postgres::view(config))?),
        #[cfg(not(feature = "postgres"))]
        LedgerKind::Postgres => return Err(refused(Engine::Postgres)),
    };
    Ok(Some(RowLedger { view, runtime }))
}

/// The rejects of the ledger of rows, and a runtime to wait for it on.
pub struct Rejects {
    store: Box<dyn ReceiptRejects>,
    runtime: Runtime,
}

impl Rejects {
    /// Reads the rejects of `source` again, as the configuration maps them now, until `limit` of them are settled.
    pub fn reread(
        &self,
        source: &ReceiptSource,
        limit: u64,
        counts: &mut RereadCounts,
    ) -> anyhow::Result<()> {
        let format = ReceiptFormat::new(source.name.as_str().into(), source.mapping.clone())?;
        let destination = Arc::from(source.destination.as_str());
        let reading = reread(&*self.store, &format, &destination, limit, &SystemClock, counts);
        Ok(self.runtime.block_on(reading)?)
    }
}

/// Opens the ledger of rows to read its rejects again; `None` if the configuration has none.
pub fn rejects(config: &Config) -> anyhow::Result<Option<Rejects>> {
    if !config.has_rows() {
        return Ok(None);
    }
    let runtime = runtime()?;
    let store: Box<dyn ReceiptRejects> = match config.ledger.kind {
        LedgerKind::Embedded => Box::new(ReceiptOperator::open(&config.state.dir)?),
        #[cfg(feature = "postgres")]
        LedgerKind::Postgres => Box::new(runtime.block_on(super::postgres::operate(config))?),
        #[cfg(not(feature = "postgres"))]
        LedgerKind::Postgres => return Err(refused(Engine::Postgres)),
    };
    Ok(Some(Rejects { store, runtime }))
}

/// Opens the store to change it. It must be there already.
pub fn operate(config: &Config) -> anyhow::Result<Box<dyn Operate>> {
    match config.profile {
        Profile::Embedded => Ok(Box::new(Operator::open(&config.state.dir)?)),
        #[cfg(feature = "aws")]
        Profile::Aws => Ok(Box::new(super::aws::console(config)?)),
        #[cfg(not(feature = "aws"))]
        Profile::Aws => Err(refused(Engine::Dynamodb)),
    }
}
