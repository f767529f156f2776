//! Connections: the pool, and what bounds transactions.

use deadpool_postgres::{Hook, HookError, Pool, Runtime, Transaction};
use postrider_actors::model::call::FailureKind;
use postrider_settings::Tls;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls};

use super::{
    error::{self, Failure},
    open_error::OpenError,
    settings::{PostgresSettings, Purpose, Schema, Timeouts, config},
};
use crate::pg::{self, Held};

/// Connections, as many as the settings allow, opened when they are needed.
#[derive(Clone)]
pub(super) struct Connections {
    pool: Pool,
    timeouts: Timeouts,
}

impl Connections {
    pub(super) fn new(settings: &PostgresSettings, purpose: Purpose) -> Result<Self, OpenError> {
        let schema = Schema::parse(&settings.keys.schema)?;
        let config = config(settings, &schema, purpose)?;
        let manager = pg::manager(config, settings.keys.tls, settings.keys.ca_file.as_deref())?;
        let timeouts = settings.timeouts;
        let pool = Pool::builder(manager)
            .max_size(settings.keys.connections.max(1))
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(timeouts.connect))
            .create_timeout(Some(timeouts.connect))
            .recycle_timeout(Some(timeouts.connect))
            .post_create(Hook::async_fn(|connection, _| {
                Box::pin(async move {
                    // What is answered as done must be on the disk, whatever the role's or the database's default
                    // says. A stronger setting stays.
                    let sync = "SELECT set_config('synchronous_commit', 'on', false) \
                                WHERE current_setting('synchronous_commit') = 'off'";
                    connection.simple_query(sync).await.map(drop).map_err(HookError::Backend)
                })
            }))
            .build()
            .expect("a runtime is given");
        Ok(Self { pool, timeouts })
    }

    pub(super) async fn hold(&self) -> Result<Held, Failure> {
        let connect = self.timeouts.connect;
        Held::of(&self.pool)
            .await
            .map_err(|error| Failure(pg::no_connection("Postgres", &self.pool, connect, connect, &error)))
    }
}

pub(super) async fn begin(timeouts: Timeouts, held: &mut Held) -> Result<Transaction<'_>, Failure> {
    let limit = timeouts.statement;
    let late =
        |_| Failure::new(FailureKind::Unavailable, format!("Postgres does not answer within {limit:?}"));
    Ok(timeout(limit, held.client_mut().transaction()).await.map_err(late)??)
}

/// Bounds what the server's own timeouts can't: a server that has stopped, a network that is gone.
pub(super) async fn within<T>(
    timeouts: Timeouts,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    // Each statement ends by the server's clock; a step has few that take long.
    let limit = timeouts.statement * 2 + timeouts.connect;
    timeout(limit, work).await.unwrap_or_else(|_| {
        // It may have hung in a statement that commits by itself.
        let why = format!("Postgres did not finish a step within {limit:?}");
        Err(Failure::new(FailureKind::Unknown, why))
    })
}

pub(super) async fn commit(timeouts: Timeouts, transaction: Transaction<'_>) -> Result<(), Failure> {
    postrider_actors::failpoint!("postgres_before_commit");
    match timeout(timeouts.statement, transaction.commit()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Failure::of_commit(error)),
        Err(_) => {
            let why = format!("Postgres did not answer a COMMIT within {:?}", timeouts.statement);
            Err(Failure::new(FailureKind::Unknown, why))
        }
    }
}

/// One connection outside of any pool. The task that drives it ends with the client.
pub(super) async fn connect_once(settings: &PostgresSettings) -> Result<Client, OpenError> {
    let schema = Schema::parse(&settings.keys.schema)?;
    let config = config(settings, &schema, Purpose::Look)?;
    let unreachable = |error: tokio_postgres::Error| OpenError::Unreachable(error::words(&error));
    let limit = settings.timeouts.connect * 2;
    let connecting = async {
        match settings.keys.tls {
            Tls::Disable => {
                let (client, connection) = config.connect(NoTls).await.map_err(unreachable)?;
                tokio::spawn(async move { drop(connection.await) });
                Ok(client)
            }
            Tls::Require => {
                let tls = pg::connector(settings.keys.ca_file.as_deref())?;
                let (client, connection) = config.connect(tls).await.map_err(unreachable)?;
                tokio::spawn(async move { drop(connection.await) });
                Ok(client)
            }
        }
    };
    timeout(limit, connecting)
        .await
        .unwrap_or_else(|_| Err(OpenError::Unreachable(format!("it does not answer within {limit:?}"))))
}
