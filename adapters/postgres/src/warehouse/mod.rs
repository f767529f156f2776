//! Warehouse tables: rows are written in statements of many, by keys that make writing them again harmless.
//!
//! Two dialects. *Postgres* takes a statement's rows as arrays, one per column, and leaves rows alone whose key is
//! there (`ON CONFLICT DO NOTHING`). *Redshift* knows neither arrays nor `ON CONFLICT` and nothing but its
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

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use postrider_actors::{
    flow::{Call, Service},
    model::{
        call::FailureKind,
        table::{Mapping, TableName, TableRow},
    },
    ports::{CallObserver, Table, TableError},
};
use postrider_settings::WarehouseDialect as Dialect;

use self::connection::Connections;
pub use self::{
    check::CheckError,
    compare::{CompareLimits, CompareReport, FileDifference, RangeDifference, compare},
    connection::OpenError,
    settings::{STATEMENT_BYTES_MAX, WarehouseSettings},
};
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
            statement: Mutex::default(),
        }))
    }
}

/// A table's statement, and for which mapping it was made.
type MadeFor<T> = Option<(Arc<Mapping>, Arc<T>)>;

/// A table of a warehouse.
pub struct WarehouseTable {
    service: Service,
    warehouse: Arc<Warehouse>,
    name: TableName,
    mapping: Arc<Mapping>,
    /// The Postgres dialect's statement for the last mapping: it names the columns' types, which the catalogue
    /// has to be asked for. Forgotten when a statement fails for another reason than its rows.
    statement: Mutex<MadeFor<String>>,
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

    fn statement_for(&self, mapping: &Arc<Mapping>) -> Option<Arc<String>> {
        let made = self.statement.lock().unwrap_or_else(PoisonError::into_inner);
        made.as_ref().filter(|(of, _)| of == mapping).map(|(_, statement)| statement.clone())
    }

    fn remember(&self, made: MadeFor<String>) {
        *self.statement.lock().unwrap_or_else(PoisonError::into_inner) = made;
    }
}

#[async_trait]
impl Table for WarehouseTable {
    fn statement_bytes_max(&self) -> usize {
        // What a statement says beside its rows: names of columns, several times over.
        let names: usize = self.mapping.columns.iter().map(|column| column.name.len() + 40).sum();
        STATEMENT_BYTES_MAX.saturating_sub(4 * names + 1_000)
    }

    async fn insert(&self, rows: &[TableRow]) -> Result<(), TableError> {
        let Some(first) = rows.first() else {
            return Ok(());
        };
        let alike = |row: &TableRow| {
            let same = Arc::ptr_eq(&row.mapping, &first.mapping) || row.mapping == first.mapping;
            same && row.values.len() == row.mapping.columns.len()
        };
        // Names go into the statement, so they are looked at here too, wherever they came from (F57).
        if !rows.iter().all(alike) || first.mapping.validate().is_err() {
            return Err(TableError::Refused("rows of a statement that are not made alike".to_owned()));
        }
        let insert = async {
            match self.dialect() {
                Dialect::Postgres => self.insert_arrays(rows).await,
                Dialect::Redshift => self.insert_merged(rows).await,
            }
        };
        let written = self.service.call(Call::of("insert").with(rows.len()), insert).await;
        if written.as_ref().is_err_and(|failure| failure.kind != FailureKind::Invalid) {
            self.remember(None);
        }
        Ok(written?)
    }
}
