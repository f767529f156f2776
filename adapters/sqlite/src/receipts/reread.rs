//! Rejects that a command reads again, with or without a running daemon.

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use postrider_actors::{
    flow::blocking,
    model::receipt::{EventId, ReceiptReject, RejectedText},
    ports::{ReceiptRejects, Reread, StoreError, Taken},
};
use rusqlite::{Connection, params};

use super::{events::Events, take, time};
use crate::{
    OpenError,
    operator::Operator,
    tx::{Tx, TxError, int},
};

/// An operator's hand on the rejects of the ledger of rows.
pub struct ReceiptOperator(Arc<Mutex<Operator>>);

impl ReceiptOperator {
    /// Opens the store in `state_dir`; neither makes nor migrates it.
    pub fn open(state_dir: &Path) -> Result<Self, OpenError> {
        Ok(Self(Arc::new(Mutex::new(Operator::open(state_dir)?))))
    }

    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Operator) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let operator = self.0.clone();
        // A panic leaves a transaction open at worst, which the next one refuses to begin in.
        let work = move || Ok(work(&mut operator.lock().unwrap_or_else(PoisonError::into_inner)));
        blocking(work).await.unwrap_or_else(|error: io::Error| Err(StoreError::Retryable(error.to_string())))
    }
}

#[async_trait]
impl ReceiptRejects for ReceiptOperator {
    async fn rejects(
        &self,
        source: &str,
        after: Option<EventId>,
        limit: usize,
    ) -> Result<Vec<ReceiptReject>, StoreError> {
        let source = source.to_owned();
        self.work(move |operator| operator.read(|connection| rejects(connection, &source, after, limit)))
            .await
    }

    async fn settle_rejects(&self, reread: Reread) -> Result<Taken, StoreError> {
        self.work(move |operator| operator.transact(|tx| settle(tx, &reread))).await
    }
}

fn rejects(
    connection: &Connection,
    source: &str,
    after: Option<EventId>,
    limit: usize,
) -> Result<Vec<ReceiptReject>, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT event, happened_at, place, reason, text, is_whole FROM receipt_rejects
         WHERE source = (SELECT seq FROM receipt_sources WHERE name = ?1) AND event > ?2
         ORDER BY event LIMIT ?3",
    )?;
    // The empty event comes before all others.
    let after = after.as_ref().map_or(&[][..], |event| &event.0);
    let mut rows = select.query(params![source, after, int(limit as u64)])?;
    let mut rejects = Vec::new();
    while let Some(row) = rows.next()? {
        rejects.push(ReceiptReject {
            event: EventId(row.get(0)?),
            at: time(row.get(1)?),
            place: row.get(2)?,
            reason: row.get(3)?,
            text: RejectedText { text: row.get(4)?, is_whole: row.get(5)? },
        });
    }
    Ok(rejects)
}

/// `ReceiptRejects::settle_rejects`.
fn settle(tx: &mut Tx<'_>, reread: &Reread) -> Result<Taken, TxError> {
    let destination = tx.destination(&reread.destination)?;
    let source = take::note_source(tx, &reread.source, destination, None, None)?;
    let receipts = reread.receipts.iter().map(|(_, receipt)| receipt);
    let taken = take::put(tx, source, destination, receipts, reread.at)?;
    let events: Vec<_> = reread.receipts.iter().map(|(event, _)| *event).collect();
    Events::open(tx)?.remember(source, reread.at, &events)?;
    let mut delete =
        tx.connection.prepare_cached("DELETE FROM receipt_rejects WHERE source = ?1 AND event = ?2")?;
    for event in reread.receipts.iter().map(|(event, _)| event).chain(&reread.ignored) {
        delete.execute(params![source, event.0])?;
    }
    let mut update = tx
        .connection
        .prepare_cached("UPDATE receipt_rejects SET reason = ?3 WHERE source = ?1 AND event = ?2")?;
    for (event, reason) in &reread.rejected {
        update.execute(params![source, event.0, reason])?;
    }
    Ok(taken)
}
