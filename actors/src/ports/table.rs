use async_trait::async_trait;

use crate::model::{bisect::Refusal, outcome::Shortage, table::TableRow};

/// Why a statement wrote nothing.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum TableError {
    /// It may succeed later: no connection, no answer. Whether it was done may be unknown: the rows are written
    /// again, by the same keys.
    #[error("{0}")]
    Retryable(String),
    /// Nothing left this machine, which has run out of that: no attempt was made (F72).
    #[error("this machine lacks {}", .0.as_str())]
    Short(Shortage),
    /// The database answered and the connection lives: it refuses the statement, for one of its rows or as a whole.
    #[error("the database refuses it (SQLSTATE {})", .0.code)]
    Refused(Refusal),
}

/// One table of a warehouse.
#[async_trait]
pub trait Table: Send + Sync {
    /// The most bytes that one statement may have; the caller divides what is larger.
    fn statement_bytes_max(&self) -> usize;

    /// Rows that the table can't take by its catalogue, by their place, and why. It costs no statement.
    async fn unfit(&self, _rows: &[TableRow]) -> Vec<(usize, String)> {
        Vec::new()
    }

    /// Writes rows, all of them or none; a row whose key is there already is left as it is (S4.6). It returns
    /// after the commit and within the warehouse's timeout.
    async fn insert(&self, rows: &[TableRow]) -> Result<(), TableError>;

    /// Whether [`Self::sift`] can be tried.
    fn sifts(&self) -> bool {
        false
    }

    /// Writes rows each by itself, in one statement; which were refused, by their place, and why. An error wrote
    /// nothing.
    async fn sift(&self, _rows: &[TableRow]) -> Result<Vec<(usize, Refusal)>, TableError> {
        Err(TableError::Retryable("this table writes no rows by themselves".to_owned()))
    }
}
