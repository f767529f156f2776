//! The Postgres dialect: one array per column, one statement, no transaction of its own.

use std::{fmt::Write as _, sync::Arc};

use postrider_actors::model::{
    call::{Failure, FailureKind},
    table::{Identifier, Mapping, TableRow},
};
use tokio_postgres::types::{ToSql, Type};

use super::{WarehouseTable, connection::keep_after, error::of_rows};
use crate::pg::Held;

impl WarehouseTable {
    pub(super) async fn insert_arrays(&self, rows: &[TableRow]) -> Result<(), Failure> {
        let mapping = &rows[0].mapping;
        let connections = self.connections();
        let held = connections.hold().await?;
        let work = async {
            let statement = match self.statement_for(mapping) {
                Some(statement) => statement,
                None => self.make_statement(&held, mapping).await?,
            };
            let columns: Vec<Vec<Option<&str>>> = (0..mapping.columns.len())
                .map(|column| rows.iter().map(|row| row.values[column].as_deref()).collect())
                .collect();
            let parameters: Vec<&(dyn ToSql + Sync)> =
                columns.iter().map(|column| column as &(dyn ToSql + Sync)).collect();
            let types = vec![Type::TEXT_ARRAY; columns.len()];
            let prepared =
                held.client().prepare_typed_cached(&statement, &types).await.map_err(Failed::Driver)?;
            held.client().execute(&prepared, &parameters).await.map_err(Failed::Driver)
        };
        match connections.within(work).await {
            None => Err(connections.no_answer()),
            Some(Ok(_)) => {
                held.keep();
                Ok(())
            }
            Some(Err(Failed::Unready(why))) => {
                held.keep();
                Err(Failure::new(FailureKind::Refused, why))
            }
            Some(Err(Failed::Driver(error))) => {
                let failure = of_rows(&error);
                // A prepared statement that the table has outgrown must not come back.
                if failure.kind == FailureKind::Invalid {
                    keep_after(held, &error);
                }
                Err(failure)
            }
        }
    }

    /// `INSERT … SELECT … FROM unnest($1, $2, …) … ON CONFLICT (key) DO NOTHING`. Each text is cast to its
    /// column's type without the type's length or precision: a cast to `varchar(20)` would cut, the
    /// assignment that follows refuses.
    async fn make_statement(&self, held: &Held, mapping: &Arc<Mapping>) -> Result<Arc<String>, Failed> {
        let query = "SELECT a.attname::text, pg_catalog.format_type(a.atttypid, -1) \
                     FROM pg_catalog.pg_attribute a \
                     WHERE a.attrelid = pg_catalog.to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped";
        let found = held.client().query_typed(query, &[(&self.name.to_string(), Type::TEXT)]).await;
        let types: std::collections::HashMap<String, String> =
            found.map_err(Failed::Driver)?.iter().map(|row| (row.get(0), row.get(1))).collect();
        if types.is_empty() {
            return Err(Failed::Unready(format!("the table {} does not exist", self.name)));
        }
        let (mut names, mut values, mut arrays) = (String::new(), String::new(), String::new());
        for (at, column) in mapping.columns.iter().enumerate() {
            let Some(kind) = types.get(&column.name) else {
                return Err(Failed::Unready(format!(
                    "the table {} has no column {:?}",
                    self.name, column.name
                )));
            };
            let comma = if at == 0 { "" } else { ", " };
            let name = quoted(&column.name)?;
            // Writing to a String can't fail.
            let _ = write!(names, "{comma}{name}");
            let _ = write!(values, "{comma}v.c{at}::{kind}");
            let _ = write!(arrays, "{comma}${}", at + 1);
        }
        let aliases: Vec<_> = (0..mapping.columns.len()).map(|at| format!("c{at}")).collect();
        let statement = Arc::new(format!(
            "INSERT INTO {} ({names}) SELECT {values} FROM unnest({arrays}) AS v({}) ON CONFLICT ({}) DO NOTHING",
            self.name,
            aliases.join(", "),
            quoted(&mapping.columns[0].name)?,
        ));
        self.remember(Some((mapping.clone(), statement.clone())));
        Ok(statement)
    }
}

enum Failed {
    Driver(tokio_postgres::Error),
    /// The table, or its settings, can't take rows now, and why.
    Unready(String),
}

fn quoted(name: &str) -> Result<Identifier, Failed> {
    Identifier::parse(name).map_err(|error| Failed::Unready(error.to_string()))
}
