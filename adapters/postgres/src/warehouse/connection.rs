//! The pool, and which of its connections are sound after an error.

use std::{fmt, time::Duration};

use deadpool_postgres::{Hook, HookError, Pool, Runtime};
use postrider_actors::model::call::{Failure, FailureKind};
use postrider_settings::WarehouseDialect as Dialect;
use tokio_postgres::{SimpleQueryMessage, config::TargetSessionAttrs};

use super::{
    error::{NoConnection, leaves_session},
    quote::{Backslash, PROBE},
    settings::WarehouseSettings,
};
use crate::pg::{self, BadSettings, Held, words};

/// Why a warehouse could not be asked.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum OpenError {
    /// No connection, or no answer in time.
    #[error("{0}")]
    Unreachable(String),
    /// It answered and refused. SQLSTATE and words.
    #[error("{0}")]
    Refused(String),
}

/// Connections, as many as the settings allow, opened when they are needed.
#[derive(Clone)]
pub(super) struct Connections {
    pool: Pool,
    connect: Duration,
    statement: Duration,
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connections({:?})", self.pool.status())
    }
}

impl Connections {
    pub(super) fn new(settings: &WarehouseSettings) -> Result<Self, BadSettings> {
        let (connect, keys) = (settings.connect_timeout, &settings.keys);
        let statement = keys.statement_timeout;
        let mut config = pg::config(&settings.url, keys.tls, connect, statement + connect)?;
        // Settings are made by statements: Redshift refuses startup options.
        let mut prepare = format!("SET statement_timeout TO {}", statement.as_millis().max(1));
        if keys.dialect == Dialect::Postgres {
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
            // What is reported as committed has to be on the disk, whatever the role's default is; times are read as
            // UTC.
            prepare.push_str(
                "; SET timezone TO 'UTC'; SELECT set_config('synchronous_commit', 'on', false) \
                 WHERE current_setting('synchronous_commit') = 'off'",
            );
        }
        let pool = Pool::builder(pg::manager(config, keys.tls, keys.ca_file.as_deref())?)
            .max_size(keys.statements.max(1))
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(connect))
            .create_timeout(Some(connect * 2))
            .recycle_timeout(Some(connect))
            .post_create(Hook::async_fn(move |connection, _| {
                let prepare = prepare.clone();
                Box::pin(async move { connection.batch_execute(&prepare).await.map_err(HookError::Backend) })
            }))
            .build()
            .expect("a runtime is given");
        Ok(Self { pool, connect, statement })
    }

    pub(super) async fn hold(&self) -> Result<Held, NoConnection> {
        let connect = self.connect;
        Held::of(&self.pool).await.map_err(|error| NoConnection {
            failure: pg::no_connection("the warehouse", &self.pool, connect, connect * 2, &error),
            shortage: pg::shortage(&error),
        })
    }

    /// Bounds what the server's own timeout can't: a server that has stopped, a network that is gone. `None` if it
    /// took too long; the connection is to be dropped then.
    pub(super) async fn within<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::time::timeout(self.statement + self.connect, work).await.ok()
    }

    /// For when [`Self::within`] has given up.
    pub(super) fn no_answer(&self) -> Failure {
        let why = format!("the warehouse did not answer within {:?}", self.statement + self.connect);
        Failure::new(FailureKind::Unknown, why)
    }

    /// Asks, and gives the connection back. Rows of texts: the simple protocol's.
    pub(super) async fn ask(&self, query: &str) -> Result<Vec<Vec<Option<String>>>, OpenError> {
        let unreachable = |failure: Failure| OpenError::Unreachable(failure.why);
        let held = self.hold().await.map_err(|none| unreachable(none.failure))?;
        match self.within(held.client().simple_query(query)).await {
            None => Err(unreachable(self.no_answer())),
            Some(Err(error)) => {
                let refused = error.as_db_error().is_some();
                let why = words(&error);
                keep_after(held, &error);
                Err(if refused { OpenError::Refused(why) } else { OpenError::Unreachable(why) })
            }
            Some(Ok(messages)) => {
                held.keep();
                let texts = |message: &SimpleQueryMessage| match message {
                    SimpleQueryMessage::Row(row) => {
                        Some((0..row.len()).map(|at| row.get(at).map(ToOwned::to_owned)).collect())
                    }
                    _ => None,
                };
                Ok(messages.iter().filter_map(texts).collect())
            }
        }
    }
}

/// How literals are written on a connection.
pub(super) async fn backslash(held: &Held) -> Result<Backslash, tokio_postgres::Error> {
    let answer = held.client().simple_query(PROBE).await?;
    let text = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    // The safe one of both: it doubles backslashes, which changes a text but lets nothing out.
    Ok(text.and_then(Backslash::by_probe).unwrap_or(Backslash::Escape))
}

/// Gives a connection back if the error has left it as it was.
pub(super) fn keep_after(held: Held, error: &tokio_postgres::Error) {
    if leaves_session(error) {
        held.keep();
    }
}
