//! What operators have set for destinations.

use std::num::{NonZeroU32, NonZeroUsize};

use postrider_actors::{
    model::limits::{Concurrency, LimitChange, SetLimits},
    ports::LimitsSet,
};
use rusqlite::{Connection, Row, params};

use super::tx::{Tx, TxError, int};

/// What is set, in two columns, the first of them at `at`.
pub(crate) fn read(row: &Row<'_>, at: usize) -> Result<SetLimits, TxError> {
    let (rate, concurrency): (Option<u32>, Option<u32>) = (row.get(at)?, row.get(at + 1)?);
    let fixed =
        |number: u32| NonZeroUsize::new(number as usize).map_or(Concurrency::Auto, Concurrency::Fixed);
    Ok(SetLimits { rate_per_s: rate.and_then(NonZeroU32::new), concurrency: concurrency.map(fixed) })
}

/// `Steering::set_limits`.
pub(crate) fn list(connection: &Connection) -> Result<LimitsSet, TxError> {
    let mut select = connection.prepare_cached(
        "SELECT name, rate_per_s, concurrency FROM destinations
         WHERE rate_per_s IS NOT NULL OR concurrency IS NOT NULL",
    )?;
    let mut rows = select.query([])?;
    let mut limits = LimitsSet::new();
    while let Some(row) = rows.next()? {
        limits.insert(row.get::<_, String>(0)?.into(), read(row, 1)?);
    }
    Ok(limits)
}

/// Sets a limit of a destination; whether that changes anything.
pub(crate) fn change(tx: &mut Tx<'_>, name: &str, change: LimitChange) -> Result<bool, TxError> {
    let destination = tx.destination(name)?;
    let (column, value) = match change {
        LimitChange::Rate(rate) => ("rate_per_s", rate.map(|rate| i64::from(rate.get()))),
        LimitChange::Concurrency(set) => {
            let number = |set| match set {
                Concurrency::Auto => 0,
                Concurrency::Fixed(number) => int(number.get() as u64),
            };
            ("concurrency", set.map(number))
        }
    };
    let update = format!("UPDATE destinations SET {column} = ?2 WHERE seq = ?1 AND {column} IS NOT ?2");
    Ok(tx.connection.execute(&update, params![destination, value])? == 1)
}
