//! Why the ledger can't be used, for the operator.

use crate::BadSettings;

/// The schema version that this program reads and writes.
pub const SCHEMA_VERSION: i32 = 1;

/// Why the ledger can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A setting says something impossible.
    #[error("{0}")]
    Settings(String),
    /// Nobody answers, or not to this role.
    #[error("can't reach Postgres: {0}; check `url`, `tls` and the server")]
    Unreachable(String),
    /// The database says no.
    #[error("{0}")]
    Refused(String),
    /// The server lacks what the schema needs.
    #[error("the server is Postgres {found}, {} or newer is needed", 14)]
    Server {
        /// Its major version.
        found: i32,
    },
    /// There are texts that it can't hold.
    #[error(
        "database {database:?} has encoding {found}, and the ledger needs UTF8, because any text may come: make another one \
         (CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0) and name it in `url`"
    )]
    Encoding {
        /// Its name.
        database: String,
        /// Its encoding.
        found: String,
    },
    /// There is no schema of ours.
    #[error("schema {schema:?} has no tables of Postrider; run `postrider migrate`")]
    Missing {
        /// Its name.
        schema: String,
    },
    /// A newer program made it (F16).
    #[error(
        "schema {schema:?} has version {found}, this program knows up to {SCHEMA_VERSION}: it was made by a newer \
         Postrider; run that version"
    )]
    Newer {
        /// Its name.
        schema: String,
        /// Its version.
        found: i32,
    },
    /// An older program made it.
    #[error(
        "schema {schema:?} has version {found}, this program needs {SCHEMA_VERSION}; run `postrider migrate`"
    )]
    Older {
        /// Its name.
        schema: String,
        /// Its version.
        found: i32,
    },
    /// The role may not do what the daemon does.
    #[error(
        "the role of `url` may not use schema {schema:?} as the daemon must: it lacks {missing}; run \
         config/postgres/role.sql as the schema's owner"
    )]
    Privileges {
        /// The schema's name.
        schema: String,
        /// What it may not do.
        missing: String,
    },
}

impl From<BadSettings> for OpenError {
    fn from(BadSettings(problem): BadSettings) -> Self {
        Self::Settings(problem)
    }
}
