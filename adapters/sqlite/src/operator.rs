//! What an operator's commands write, with or without a running daemon: transactions of their own, each
//! bounded, so that the daemon's writer never waits long.

use std::{collections::BTreeMap, path::Path, thread, time::Duration};

use postrider_actors::{
    failpoint,
    model::{
        batch::Rendering,
        hold::{FileHold, HoldChange},
        time::UnixMs,
    },
    ports::{
        StoreError,
        console::{AuditLine, DeadFilter, Operate, Order, Rerendered},
    },
};
use rusqlite::Connection;
use tokio::time::Instant;

use super::{
    audit, holds, limits,
    open::{self, Access, OpenError},
    redrive::{self, RedriveCursor, RedrivePace, RedriveStep},
    tx::{Caches, Tx, TxError},
};

/// Between two transactions of many, so that the daemon's writer has its turn: it asks every millisecond.
const BETWEEN_STEPS: Duration = Duration::from_millis(3);

/// An operator's connection. The store must be there already.
pub struct Operator {
    connection: Connection,
    caches: Caches,
}

impl Operator {
    /// Opens the store in `state_dir`; neither makes nor migrates it.
    pub fn open(state_dir: &Path) -> Result<Self, OpenError> {
        Ok(Self { connection: open::open(state_dir, Access::Write)?, caches: Caches::default() })
    }

    /// Reads, outside of any transaction.
    pub(crate) fn read<T>(
        &self,
        run: impl FnOnce(&Connection) -> Result<T, TxError>,
    ) -> Result<T, StoreError> {
        run(&self.connection).map_err(|error| error.to_store_error())
    }

    /// One transaction; rolled back if it fails.
    pub(crate) fn transact<T>(
        &mut self,
        run: impl FnOnce(&mut Tx<'_>) -> Result<T, TxError>,
    ) -> Result<T, StoreError> {
        let connection = &self.connection;
        let caches = &mut self.caches;
        let transact = || {
            connection.execute_batch("BEGIN IMMEDIATE")?;
            let mut tx = Tx::new(connection, caches);
            let done = run(&mut tx)?;
            tx.flush()?;
            connection.execute_batch("COMMIT")?;
            Ok::<_, TxError>(done)
        };
        transact().map_err(|error| {
            if !connection.is_autocommit() {
                // The first error says why; the transaction ends with the connection at the latest.
                let _ = connection.execute_batch("ROLLBACK");
            }
            // What was interned in it is gone with it.
            self.caches = Caches::default();
            error.to_store_error()
        })
    }
}

impl Operator {
    /// Works through up to `limit` dead letters, each step a transaction of its own.
    fn step_by_step(
        &mut self,
        limit: usize,
        mut step: impl FnMut(&mut Tx<'_>, RedriveCursor, usize) -> Result<RedriveStep, TxError>,
    ) -> Result<Rerendered, StoreError> {
        let (mut done, mut looked_at) = (Rerendered::default(), 0);
        let (mut place, mut pace) = (RedriveCursor::default(), RedrivePace::default());
        while looked_at < limit {
            let most = pace.letters().min(limit - looked_at);
            let begun = Instant::now();
            let step = self.transact(|tx| step(tx, place, most))?;
            failpoint!("redrive.step");
            done.redriven += step.redriven;
            done.refused += step.looked_at - step.redriven;
            looked_at += step.looked_at;
            place = step.looked_until;
            if step.looked_at < most {
                break;
            }
            pace.took(begun.elapsed());
            thread::sleep(BETWEEN_STEPS);
        }
        Ok(done)
    }
}

impl Operate for Operator {
    fn redrive(&mut self, filter: &DeadFilter, limit: usize, now: UnixMs) -> Result<usize, StoreError> {
        let step = |tx: &mut Tx<'_>, place, most| redrive::redrive(tx, filter, place, most, now);
        Ok(self.step_by_step(limit, step)?.redriven)
    }

    fn rerender(
        &mut self,
        filter: &DeadFilter,
        renderings: &BTreeMap<String, Rendering>,
        limit: usize,
        now: UnixMs,
        dry_run: bool,
    ) -> Result<Rerendered, StoreError> {
        self.step_by_step(limit, |tx, place, most| {
            redrive::rerender(tx, filter, renderings, place, most, now, dry_run)
        })
    }

    fn order(&mut self, order: &Order, by: &str, at: UnixMs) -> Result<usize, StoreError> {
        self.transact(|tx| {
            let changed = match order {
                Order::Pause { destination, reason } => {
                    super::append::disable(tx, destination, reason, at).map(usize::from)
                }
                Order::Resume { destination } => enable(tx, destination),
                Order::Limit { destination, change } => {
                    limits::change(tx, destination, *change).map(usize::from)
                }
                Order::Hold { of, reason } => {
                    holds::change_of(tx, of, &HoldChange::Hold(FileHold::by_operator(at, reason)))
                }
                Order::Priority { of, priority } => holds::prioritize(tx, of, *priority),
                Order::Release { of } => holds::change_of(tx, of, &HoldChange::Release),
                Order::Cancel { of, reason } => {
                    holds::change_of(tx, of, &HoldChange::Hold(FileHold::cancelled(at, reason)))
                }
            }?;
            if changed > 0 {
                audit::note(tx, &order.line(by, at))?;
            }
            Ok(changed)
        })
    }

    fn note(&mut self, line: &AuditLine) -> Result<(), StoreError> {
        self.transact(|tx| audit::note(tx, line))
    }
}

fn enable(tx: &Tx<'_>, name: &str) -> Result<usize, TxError> {
    Ok(tx.connection.execute(
        "UPDATE destinations SET disabled_at = NULL, disabled_reason = NULL
         WHERE name = ?1 AND disabled_at IS NOT NULL",
        [name],
    )?)
}
