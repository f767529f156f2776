//! Warehouse tables on a real Postgres, in both dialects: the adapter by itself, and the stage that writes to it.
#![cfg(feature = "postgres")]

#[path = "pg/mod.rs"]
mod pg;

#[path = "warehouse/adapter.rs"]
mod adapter;
#[path = "warehouse/figures.rs"]
mod figures;
#[path = "warehouse/stage.rs"]
mod stage;

use std::sync::Arc;

use pg::Postgres;
use postrider_actors::model::table::{Column, ColumnSource, ColumnType, Mapping};
use postrider_postgres::warehouse::{Dialect, TableSettings, Warehouse, WarehouseSettings, WarehouseTable};

const DIALECTS: [Dialect; 2] = [Dialect::Postgres, Dialect::Redshift];

fn settings(server: &Postgres, dialect: Dialect) -> WarehouseSettings {
    WarehouseSettings::new(server.url().into(), dialect)
}

fn table(server: &Postgres, dialect: Dialect, table: &str, mapping: &Mapping) -> Arc<WarehouseTable> {
    let warehouse = Warehouse::new(settings(server, dialect), Arc::new(())).expect("the settings are fine");
    warehouse
        .table(&TableSettings { table: table.into(), mapping: mapping.clone() })
        .expect("the names are fine")
}

fn column(name: &str, source: ColumnSource, kind: ColumnType) -> Column {
    Column { name: name.into(), source, kind, required: false }
}

fn field(name: &str, kind: ColumnType) -> Column {
    column(name, ColumnSource::Field(name.into()), kind)
}

fn key() -> Column {
    column("id", ColumnSource::Id, ColumnType::Text)
}
