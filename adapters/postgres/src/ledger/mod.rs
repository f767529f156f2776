//! The ledger of rows in Postgres: a row per message and destination, and the receipts that are joined with them.
//!
//! A receipt's path: [`take`] puts it into the inbox, unless its event is known; [`apply`] takes a batch out, looks up
//! the rows of its messages, joins them with the receipts and writes each of them once; what has no message is
//! parked. [`record`] writes delivery's records, a thousand rows per statement, and sends parked
//! receipts of these messages back into the inbox. [`sweep`] does the timed work.
//!
//! Messages are partitioned by the day on which their file was first recorded. All writers lock rows in the same
//! order: the latest partition first, in it by file, row and destination (F50). Nothing is held between
//! transactions, and each is a bounded step.

mod apply;
mod connect;
mod error;
mod look_up;
mod names;
mod open_error;
mod record;
mod reread;
mod schema;
mod settings;
mod sweep;
mod take;
mod values;
mod view;
mod waiting;

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use postrider_actors::{
    flow::{Call, Service},
    model::{
        receipt::{EventId, ReceiptReject},
        record::MessageRecord,
        time::UnixMs,
    },
    ports::{
        Applied, Arrival, CallObserver, ReceiptLedger, ReceiptRejects, Reread, SourceCursor, StatusChange,
        StoreError, Taken,
    },
};

pub use open_error::{OpenError, SCHEMA_VERSION};
pub use schema::{Migrated, SchemaInfo, check, grants, migrate};
pub use settings::{PostgresSettings, Timeouts};

pub use view::PostgresView;

use connect::Connections;
use error::Failure;
use names::Names;
use settings::Purpose;

impl Shared {
    /// Bounds what the server's own timeouts can't: a server that has stopped, a network that is gone.
    async fn within<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        connect::within(self.timeouts, work).await
    }
}

/// The ledger of rows. Clones share their connections.
#[derive(Clone)]
pub struct PostgresLedger {
    service: Service,
    shared: Arc<Shared>,
}

struct Shared {
    connections: Connections,
    timeouts: Timeouts,
    keep_changes: bool,
    names: Names,
    files: record::FilePartitions,
    rejoining: sweep::Rejoining,
    sources: take::Sources,
}

impl fmt::Debug for PostgresLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresLedger").finish_non_exhaustive()
    }
}

impl PostgresLedger {
    /// Connects, and refuses a database that can't hold every text, and a schema that is not this program's.
    pub async fn open(
        settings: PostgresSettings,
        observer: Arc<dyn CallObserver>,
    ) -> Result<Self, OpenError> {
        let client = connect::connect_once(&settings).await?;
        let look = async {
            schema::check_server(&client).await?;
            schema::check_version(&client, &settings.keys.schema).await
        };
        let limit = settings.timeouts.statement;
        tokio::time::timeout(limit, look)
            .await
            .map_err(|_| OpenError::Unreachable(format!("it does not answer within {limit:?}")))??;
        let connections = Connections::new(&settings, Purpose::Work)?;
        Ok(Self {
            service: Service::new("postgres", "Postgres, the ledger of rows", observer),
            shared: Arc::new(Shared {
                connections,
                timeouts: settings.timeouts,
                keep_changes: settings.keep_changes,
                names: Names::default(),
                files: record::FilePartitions::default(),
                rejoining: sweep::Rejoining::default(),
                sources: take::Sources::default(),
            }),
        })
    }
    /// One operation of the ledger: a few bounded transactions, which end by their own timeouts.
    fn step<T>(
        &self,
        operation: &'static str,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> impl Future<Output = Result<T, StoreError>> {
        let work = async { work.await.map_err(|Failure(failure)| failure) };
        let call = self.service.call(Call::of(operation), work);
        async { Ok(call.await?) }
    }
}

#[async_trait]
impl ReceiptLedger for PostgresLedger {
    async fn record(&self, records: Vec<MessageRecord>) -> Result<(), StoreError> {
        let unwritable = self.step("record", self.shared.record(&records)).await?;
        for (code, rows) in unwritable {
            self.service.rejected("record", &code, rows);
        }
        Ok(())
    }

    async fn take(&self, arrival: Arrival) -> Result<Taken, StoreError> {
        self.step("take", self.shared.take(arrival)).await
    }

    async fn cursor(&self, source: &str) -> Result<Option<SourceCursor>, StoreError> {
        self.step("cursor", self.shared.cursor(source)).await
    }

    async fn apply(&self, receipts: usize, bytes: usize, at: UnixMs) -> Result<Applied, StoreError> {
        self.step("apply", self.shared.apply(receipts, bytes, at)).await
    }

    async fn waiting(&self) -> Result<u64, StoreError> {
        self.step(
            "waiting",
            self.shared.depth("SELECT coalesce(sum(cardinality(event)), 0)::bigint FROM receipt_inbox"),
        )
        .await
    }

    async fn parked(&self) -> Result<u64, StoreError> {
        self.step("parked", self.shared.depth("SELECT count(*) FROM receipt_parked WHERE NOT orphan")).await
    }

    async fn rejoin(&self, limit: usize) -> Result<usize, StoreError> {
        self.step("rejoin", self.shared.rejoin(limit)).await
    }

    async fn orphan(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        self.step("orphan", self.shared.orphan(before, limit)).await
    }

    async fn expire(
        &self,
        destination: &str,
        before: UnixMs,
        limit: usize,
        at: UnixMs,
    ) -> Result<usize, StoreError> {
        self.step("expire", self.shared.expire(destination, before, limit, at)).await
    }

    async fn changes(&self, after: Option<u64>, limit: usize) -> Result<Vec<StatusChange>, StoreError> {
        self.step("changes", self.shared.changes(after, limit)).await
    }

    async fn forget_changes(&self, numbers: &[u64]) -> Result<(), StoreError> {
        self.step("forget_changes", self.shared.forget_changes(numbers)).await
    }

    async fn retire(&self, before: UnixMs, limit: usize) -> Result<usize, StoreError> {
        self.step("retire", self.shared.retire(before, limit)).await
    }
}

#[async_trait]
impl ReceiptRejects for PostgresLedger {
    async fn rejects(
        &self,
        source: &str,
        after: Option<EventId>,
        limit: usize,
    ) -> Result<Vec<ReceiptReject>, StoreError> {
        self.step("rejects", self.shared.rejects(source, after, limit)).await
    }

    async fn settle_rejects(&self, reread: Reread) -> Result<Taken, StoreError> {
        self.step("settle_rejects", self.shared.settle_rejects(&reread)).await
    }
}
