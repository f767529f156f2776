//! Warehouse tables: rows are written in statements of many, by keys that make writing them again harmless.
//!
//! Two dialects. *Postgres* takes a statement's rows by COPY, which is fastest and takes no key twice, or as arrays, one per
//! column, leaving rows alone whose key is there (`ON CONFLICT DO NOTHING`). *Redshift* knows neither arrays nor `ON CONFLICT` and nothing but its
//! wire protocol's simple form: rows are literals in a staging table, which is merged into the table. Why, and with
//! which figures: `docs/decisions/0015-warehouse-tables.md`.

mod check;
mod compare;
mod connection;
mod error;
mod postgres;
mod quote;
mod redshift;
mod settings;
mod shape;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use postrider_actors::{
    flow::{Call, Service},
    model::{
        bisect::Refusal,
        call::{CallOutcome, Failure, FailureKind},
        table::{Mapping, TableName, TableRow},
    },
    ports::{CallObserver, Table, TableError},
};
use postrider_settings::WarehouseDialect as Dialect;

use tokio::time::Instant;

pub use self::{
    check::CheckError,
    compare::{CompareLimits, CompareReport, Compared, FileDifference, RangeDifference, compare},
    connection::OpenError,
    settings::{STATEMENT_BYTES_MAX, WarehouseSettings},
};
use self::{connection::Connections, error::NotWritten, shape::Shape};
pub use crate::BadSettings;

/// One table of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableSettings {
    /// `table` or `schema.table`.
    pub table: String,
    /// The columns that are filled now, the key first. Rows that were accepted before a change of the configuration
    /// bring their own.
    pub mapping: Mapping,
}

/// A warehouse and its connections, which are opened when they are needed.
pub struct Warehouse {
    settings: WarehouseSettings,
    connections: Connections,
    observer: Arc<dyn CallObserver>,
}

impl fmt::Debug for Warehouse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Warehouse")
            .field("settings", &self.settings)
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

impl Warehouse {
    /// Connects to nothing yet.
    pub fn new(
        settings: WarehouseSettings,
        observer: Arc<dyn CallObserver>,
    ) -> Result<Arc<Self>, BadSettings> {
        let connections = Connections::new(&settings)?;
        Ok(Arc::new(Self { settings, connections, observer }))
    }

    /// A table of it. Hostile and impossible names are refused here (F57); whether it is there,
    /// [`WarehouseTable::check`] asks.
    pub fn table(self: &Arc<Self>, settings: &TableSettings) -> Result<Arc<WarehouseTable>, BadSettings> {
        let name =
            TableName::parse(&settings.table).map_err(|error| BadSettings(format!("`table`: {error}")))?;
        settings.mapping.validate().map_err(|error| BadSettings(format!("`columns`: {error}")))?;
        let service = Service::new("warehouse", format!("table {name}"), self.observer.clone());
        Ok(Arc::new(WarehouseTable {
            service,
            warehouse: self.clone(),
            name,
            mapping: Arc::new(settings.mapping.clone()),
            known: Mutex::default(),
        }))
    }
}

/// How old the catalogue's answer may be when a row is refused by it.
const CATALOGUE_FRESH: Duration = Duration::from_secs(1);

/// After a COPY that met a key which is there: how long rows are written in a way that leaves such keys alone.
const COPY_REST: Duration = Duration::from_mins(1);

/// A table of a warehouse.
pub struct WarehouseTable {
    service: Service,
    warehouse: Arc<Warehouse>,
    name: TableName,
    mapping: Arc<Mapping>,
    known: Mutex<Known>,
}

/// What is known of a table in the Postgres dialect.
#[derive(Default)]
struct Known {
    /// By the catalogue, for the last mapping. Forgotten when a statement fails by what the table is.
    shape: Option<Arc<Shape>>,
    /// No COPY before this.
    copy_from: Option<Instant>,
}

impl fmt::Debug for WarehouseTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WarehouseTable({})", self.name)
    }
}

impl WarehouseTable {
    fn connections(&self) -> &Connections {
        &self.warehouse.connections
    }

    fn dialect(&self) -> Dialect {
        self.warehouse.settings.keys.dialect
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Changed by infallible steps only.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shape_for(&self, mapping: &Arc<Mapping>) -> Option<Arc<Shape>> {
        self.known().shape.clone().filter(|shape| shape.mapping == *mapping)
    }

    fn remember(&self, shape: Option<Arc<Shape>>) {
        self.known().shape = shape;
    }

    fn forget_shape(&self) {
        self.remember(None);
    }

    fn may_copy(&self) -> bool {
        self.known().copy_from.is_none_or(|from| Instant::now() >= from)
    }

    fn met_a_key(&self) {
        self.known().copy_from = Some(Instant::now() + COPY_REST);
    }

    /// Makes one call with rows. A refusal is an answer: who is to blame for it, the caller finds out and says.
    async fn with_rows<T>(
        &self,
        operation: &'static str,
        rows: &[TableRow],
        request: impl Future<Output = Result<T, NotWritten>>,
    ) -> Result<T, TableError> {
        let Some(first) = rows.first() else {
            return Err(TableError::Retryable("no rows".to_owned()));
        };
        let alike = |row: &TableRow| {
            let same = Arc::ptr_eq(&row.mapping, &first.mapping) || row.mapping == first.mapping;
            same && row.values.len() == row.mapping.columns.len()
        };
        // Names go into the statement, so they are looked at here too, wherever they came from (F57).
        if !rows.iter().all(alike) || first.mapping.validate().is_err() {
            let words = "rows of a statement that are not made alike".to_owned();
            let refusal = Refusal { kind: FailureKind::Invalid, code: "".into(), words };
            return Err(TableError::Refused(refusal));
        }
        let request = async {
            match request.await {
                Ok(done) => Ok(Ok(done)),
                Err(NotWritten::Refused(refusal)) => Ok(Err(TableError::Refused(refusal))),
                Err(NotWritten::Short(shortage)) => Ok(Err(TableError::Short(shortage))),
                Err(NotWritten::Failed(failure)) => Err(failure),
            }
        };
        let outcome = |answer: &Result<T, TableError>| match answer {
            Ok(_) => (CallOutcome::Ok, 0),
            Err(TableError::Refused(refusal)) => (CallOutcome::Failed(refusal.kind), 0),
            Err(_) => (CallOutcome::Failed(FailureKind::Unavailable), 0),
        };
        let answer = self.service.judged(Call::of(operation).with(rows.len()), request, outcome).await;
        answer.unwrap_or_else(|Failure { why, .. }| Err(TableError::Retryable(why)))
    }
}

#[async_trait]
impl Table for WarehouseTable {
    fn statement_bytes_max(&self) -> usize {
        // What a statement says beside its rows: names of columns, several times over.
        let names: usize = self.mapping.columns.iter().map(|column| column.name.len() + 40).sum();
        STATEMENT_BYTES_MAX.saturating_sub(4 * names + 1_000)
    }

    async fn unfit(&self, rows: &[TableRow]) -> Vec<(usize, String)> {
        let Some(first) = rows.first() else { return Vec::new() };
        let Some(mut shape) = self.shape_for(&first.mapping) else { return Vec::new() };
        let is_any_refused = rows.iter().any(|row| shape.refuses(row).is_some());
        // A column may have been widened since: nobody is refused by an old answer.
        if is_any_refused && shape.at.elapsed() > CATALOGUE_FRESH {
            match self.look_again(&first.mapping).await {
                Some(now) => shape = now,
                None => return Vec::new(),
            }
        }
        let refused = |(at, row)| Some((at, shape.refuses(row)?));
        rows.iter().enumerate().filter_map(refused).collect()
    }

    async fn insert(&self, rows: &[TableRow]) -> Result<(), TableError> {
        if rows.is_empty() {
            return Ok(());
        }
        let insert = async {
            match self.dialect() {
                Dialect::Postgres => self.insert_fast(rows).await,
                Dialect::Redshift => self.insert_merged(rows).await,
            }
        };
        self.with_rows("insert", rows, insert).await
    }

    /// As far as it is known: the role may have lost its right to make temporary objects.
    fn sifts(&self) -> bool {
        let shape = self.known().shape.clone();
        self.dialect() == Dialect::Postgres && shape.is_none_or(|shape| shape.sift.is_some())
    }

    async fn sift(&self, rows: &[TableRow]) -> Result<Vec<(usize, Refusal)>, TableError> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        self.with_rows("sift", rows, self.insert_each(rows)).await
    }
}
