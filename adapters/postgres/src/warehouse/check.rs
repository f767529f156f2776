//! Checks a table against its settings by the database's catalogue, before the first row is written.

use std::collections::HashMap;
use std::fmt::Write as _;

use postrider_actors::model::table::{Column, ColumnType};

use super::{Dialect, WarehouseTable, connection::OpenError};

/// Why a table can't be written to.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum CheckError {
    /// It could not be asked.
    #[error("{0}")]
    Unreachable(String),
    /// One entry for each problem, with what to do.
    #[error("{}", .0.join("; "))]
    Unfit(Vec<String>),
}

impl From<OpenError> for CheckError {
    fn from(error: OpenError) -> Self {
        Self::Unreachable(error.to_string())
    }
}

/// A column of the catalogue.
struct CatalogueColumn {
    /// The type's name, without length or precision.
    kind: String,
    /// It takes no NULL and has no default.
    needed: bool,
    /// The database fills it itself.
    generated: bool,
}

impl WarehouseTable {
    /// Looks the table up: that it and its columns exist and take what they are filled with, that no
    /// other column is needed, that the key is unique (Postgres) and the role may write.
    pub async fn check(&self) -> Result<(), CheckError> {
        let found = match self.dialect() {
            Dialect::Postgres => self.columns_of_postgres().await?,
            Dialect::Redshift => self.columns_of_redshift().await?,
        };
        if found.is_empty() {
            let why = format!("no table {} is visible to the role: create it, or grant access", self.name);
            return Err(CheckError::Unfit(vec![why]));
        }
        let mut problems = self.unfit_columns(&found);
        // Of columns that are not there, no privilege can be asked.
        if problems.is_empty() {
            problems = match self.dialect() {
                Dialect::Postgres => self.unfit_postgres().await?,
                Dialect::Redshift => self.unfit_redshift().await?,
            };
        }
        if problems.is_empty() && self.dialect() == Dialect::Postgres {
            // The first rows are to cost no statement for what the catalogue says of them.
            self.look_again(&self.mapping).await;
        }
        if problems.is_empty() { Ok(()) } else { Err(CheckError::Unfit(problems)) }
    }

    fn unfit_columns(&self, found: &HashMap<String, CatalogueColumn>) -> Vec<String> {
        let table = &self.name;
        let mut problems = Vec::new();
        for Column { name, kind, .. } in &self.mapping.columns {
            match found.get(&self.folded(name)) {
                None => problems.push(format!("{table} has no column \"{name}\": add it or leave it out")),
                Some(CatalogueColumn { generated: true, .. }) => {
                    problems.push(format!("{table} fills its column \"{name}\" itself: leave it out"));
                }
                Some(CatalogueColumn { kind: in_table, .. }) => {
                    let fitting = types_for(*kind, self.dialect());
                    if !fitting.contains(&in_table.as_str()) {
                        problems.push(format!(
                            "{table} has the column \"{name}\" of type {in_table}, which does not take `{}` \
                             (expected {})",
                            word(*kind),
                            fitting.join(", "),
                        ));
                    }
                }
            }
        }
        let filled: Vec<_> = self.mapping.columns.iter().map(|column| self.folded(&column.name)).collect();
        let mut needed: Vec<_> =
            found.iter().filter(|(name, column)| column.needed && !filled.contains(name)).collect();
        needed.sort_by_key(|(name, _)| *name);
        for (name, _) in needed {
            problems.push(format!(
                "{table} has the column \"{name}\", which takes no NULL, has no default and is not filled: fill it"
            ));
        }
        problems
    }

    /// A name as the catalogue has it. Redshift folds quoted ones too, unless a session says otherwise
    /// (`enable_case_sensitive_identifier`).
    fn folded(&self, name: &str) -> String {
        match self.dialect() {
            Dialect::Postgres => name.to_owned(),
            Dialect::Redshift => name.to_ascii_lowercase(),
        }
    }

    async fn columns_of_postgres(&self) -> Result<HashMap<String, CatalogueColumn>, CheckError> {
        // Plain names hold neither quote nor backslash: they need no escaping.
        let query = format!(
            "SELECT a.attname, CASE t.typtype WHEN 'e' THEN 'enum' \
                 WHEN 'd' THEN pg_catalog.format_type(t.typbasetype, NULL) \
                 ELSE pg_catalog.format_type(a.atttypid, NULL) END, \
                 a.attnotnull AND NOT a.atthasdef AND a.attidentity = '', \
                 a.attgenerated <> '' OR a.attidentity = 'a' \
             FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid \
             WHERE a.attrelid = pg_catalog.to_regclass('{}') AND a.attnum > 0 AND NOT a.attisdropped",
            self.name
        );
        let rows = self.connections().ask(&query).await?;
        Ok(rows.into_iter().filter_map(|row| found(row, "t")).collect())
    }

    async fn columns_of_redshift(&self) -> Result<HashMap<String, CatalogueColumn>, CheckError> {
        let schema = match &self.name.schema {
            Some(schema) => format!("'{}'", schema.as_str().to_ascii_lowercase()),
            None => "current_schema()".to_owned(),
        };
        let query = format!(
            "SELECT lower(column_name), data_type, \
                 CASE WHEN is_nullable = 'NO' AND column_default IS NULL THEN 't' ELSE 'f' END, 'f' \
             FROM information_schema.columns \
             WHERE lower(table_schema) = {schema} AND lower(table_name) = '{}'",
            self.name.name.as_str().to_ascii_lowercase()
        );
        let rows = self.connections().ask(&query).await?;
        Ok(rows.into_iter().filter_map(|row| found(row, "t")).collect())
    }

    async fn unfit_postgres(&self) -> Result<Vec<String>, CheckError> {
        let table = &self.name;
        let key = &self.mapping.columns[0].name;
        let mut query = format!(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_index i \
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] \
                 WHERE i.indrelid = r.oid AND a.attname = '{key}' AND i.indnkeyatts = 1 AND i.indisunique \
                 AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL), \
             pg_catalog.has_column_privilege(r.oid, '{key}', 'SELECT')"
        );
        for column in &self.mapping.columns {
            // Writing to a String can't fail.
            let _ = write!(query, ", pg_catalog.has_column_privilege(r.oid, '{}', 'INSERT')", column.name);
        }
        let _ = write!(query, " FROM (SELECT pg_catalog.to_regclass('{table}') AS oid) r");
        let answers = self.connections().ask(&query).await?.into_iter().next().unwrap_or_default();
        let mut answers = answers.into_iter().map(|answer| answer.as_deref() == Some("t"));
        let mut problems = Vec::new();
        if !answers.next().unwrap_or(false) {
            problems.push(format!(
                "the key \"{key}\" of {table} is not unique, so that a repeated statement would double rows: \
                 CREATE UNIQUE INDEX CONCURRENTLY ON {table} (\"{key}\")"
            ));
        }
        // "INSERT", Postgres' manual: the columns of a conflict's target have to be readable.
        if !answers.next().unwrap_or(false) {
            problems
                .push(format!("the role may not read the key: GRANT SELECT (\"{key}\") ON {table} TO ROLE"));
        }
        let denied: Vec<_> = self
            .mapping
            .columns
            .iter()
            .zip(answers)
            .filter(|(_, may)| !may)
            .map(|(column, _)| format!("\"{}\"", column.name))
            .collect();
        if !denied.is_empty() {
            let columns = denied.join(", ");
            problems.push(format!("the role may not write: GRANT INSERT ({columns}) ON {table} TO ROLE"));
        }
        Ok(problems)
    }

    async fn unfit_redshift(&self) -> Result<Vec<String>, CheckError> {
        let table = &self.name;
        let query = format!(
            "SELECT has_table_privilege('{table}', 'INSERT'), has_table_privilege('{table}', 'SELECT'), \
             has_table_privilege('{table}', 'UPDATE'), has_database_privilege(current_database(), 'TEMP')"
        );
        let answers = self.connections().ask(&query).await?.into_iter().next().unwrap_or_default();
        let needs = [
            format!("GRANT INSERT ON {table} TO ROLE"),
            format!("GRANT SELECT ON {table} TO ROLE"),
            format!("GRANT UPDATE ON {table} TO ROLE (MERGE asks for it; no row is changed)"),
            "GRANT TEMP ON DATABASE … TO ROLE (rows are staged in a temporary table)".to_owned(),
        ];
        let problem = |(need, answer): (String, Option<String>)| {
            let may = matches!(answer.as_deref(), Some("t" | "true"));
            (!may).then(|| format!("the role lacks a right: {need}"))
        };
        Ok(needs.into_iter().zip(answers).filter_map(problem).collect())
    }
}

fn found(row: Vec<Option<String>>, yes: &str) -> Option<(String, CatalogueColumn)> {
    let mut row = row.into_iter();
    let (name, kind) = (row.next()??, row.next()??);
    let mut is = || row.next().flatten().as_deref() == Some(yes);
    Some((name, CatalogueColumn { kind, needed: is(), generated: is() }))
}

fn word(kind: ColumnType) -> &'static str {
    match kind {
        ColumnType::Text => "text",
        ColumnType::Integer => "integer",
        ColumnType::Numeric => "numeric",
        ColumnType::Double => "double",
        ColumnType::Boolean => "boolean",
        ColumnType::Timestamp => "timestamp",
        ColumnType::Date => "date",
        ColumnType::Json => "json",
    }
}

/// The types that take a value as it is. None that would round it without a word: an exact decimal in a binary
/// column, a number in a text.
fn types_for(kind: ColumnType, dialect: Dialect) -> &'static [&'static str] {
    match (kind, dialect) {
        (ColumnType::Text, Dialect::Postgres) => {
            &["text", "character varying", "character", "uuid", "citext", "enum", "inet"]
        }
        (ColumnType::Text, Dialect::Redshift) => &["character varying", "character", "text"],
        (ColumnType::Integer, _) => &["bigint", "integer", "smallint", "numeric"],
        (ColumnType::Numeric, _) => &["numeric"],
        (ColumnType::Double, _) => &["double precision", "real"],
        (ColumnType::Boolean, _) => &["boolean"],
        (ColumnType::Timestamp, _) => &["timestamp with time zone", "timestamp without time zone"],
        (ColumnType::Date, _) => &["date"],
        (ColumnType::Json, Dialect::Postgres) => &["jsonb", "json", "text"],
        // A literal in a SUPER column is a string, not the JSON in it.
        (ColumnType::Json, Dialect::Redshift) => &["character varying", "text"],
    }
}
