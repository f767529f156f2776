use async_trait::async_trait;

use crate::model::{
    call::{Failure, FailureKind},
    table::TableRow,
};

/// Why a statement wrote nothing.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum TableError {
    /// It may succeed later: no connection, a timeout, a lock, too many statements, or what an operator can
    /// fix while the rows wait (a missing table, a missing grant). Whether it was done may be unknown: the
    /// rows are written again, by the same keys.
    #[error("{0}")]
    Retryable(String),
    /// At least one of the rows is refused whenever it comes: a value that the column does not take, a
    /// constraint. The database's own words.
    #[error("{0}")]
    Refused(String),
}

impl From<Failure> for TableError {
    fn from(Failure { kind, why, .. }: Failure) -> Self {
        match kind {
            FailureKind::Invalid => Self::Refused(why),
            _ => Self::Retryable(why),
        }
    }
}

/// One table of a warehouse.
#[async_trait]
pub trait Table: Send + Sync {
    /// The most bytes that one statement may have; the caller divides what is larger.
    fn statement_bytes_max(&self) -> usize;

    /// Writes rows, all of them or none; a row whose key is there already is left as it is (S4.6). It returns
    /// after the commit and within the warehouse's timeout.
    async fn insert(&self, rows: &[TableRow]) -> Result<(), TableError>;
}
