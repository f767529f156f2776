//! The Redshift dialect: literals in a staging table, merged into the table, one transaction.
//!
//! Everything goes as one message of the simple protocol: one answer to wait for. Redshift's MERGE wants both
//! branches ("MERGE", Amazon Redshift Database Developer Guide), so an existing row gets its own key again.
//! A key that is twice in the staging table would be inserted twice: duplicates are removed first.

use std::{
    collections::HashSet,
    fmt::{self, Write as _},
};

use postrider_actors::model::table::{Identifier, Mapping, TableName, TableRow};

use super::{
    WarehouseTable,
    connection::{backslash, keep_after},
    error::NotWritten,
    quote::Backslash,
};

impl WarehouseTable {
    pub(super) async fn insert_merged(&self, rows: &[TableRow]) -> Result<(), NotWritten> {
        let connections = self.connections();
        let held = connections.hold().await?;
        let work = async {
            let backslash = backslash(&held).await?;
            held.client().batch_execute(&statement(&self.name, rows, backslash)).await
        };
        match connections.within(work).await {
            None => Err(connections.no_answer().into()),
            Some(Ok(())) => {
                held.keep();
                Ok(())
            }
            Some(Err(error)) => {
                // The transaction is open and failed; a session that can't end it is not given back.
                let ended = connections.within(held.client().batch_execute("ROLLBACK")).await;
                if let Some(Ok(())) = ended {
                    keep_after(held, &error);
                }
                Err((&error).into())
            }
        }
    }
}

/// Names between commas, each after `prefix`.
struct ColumnNames<'a>(&'a Mapping, &'a str);

impl fmt::Display for ColumnNames<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, column) in self.0.columns.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{}{}", self.1, Quoted(&column.name))?;
        }
        Ok(())
    }
}

/// A name of a mapping that has been validated.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Identifier::parse(self.0).map_err(|_| fmt::Error)?.fmt(f)
    }
}

/// All that is sent.
fn statement(table: &TableName, rows: &[TableRow], backslash: Backslash) -> String {
    let mapping = &*rows[0].mapping;
    let key = Quoted(&mapping.columns[0].name);
    // A temporary table hides one of the same name.
    let stage =
        if table.name.as_str() == "postrider_stage" { "postrider_staging" } else { "postrider_stage" };
    let names = ColumnNames(mapping, "");
    let bytes: usize = rows.iter().map(TableRow::statement_bytes).sum();
    let mut statement = String::with_capacity(bytes + 2_000);
    // Made of a query and not LIKE the table: it takes the types and their lengths, and no constraint on columns that
    // are not filled. Writing to a String can't fail.
    let _ = write!(
        statement,
        "BEGIN; CREATE TEMP TABLE {stage} AS SELECT {names} FROM {table} WHERE false; \
         INSERT INTO {stage} ({names}) VALUES "
    );
    let mut keys = HashSet::with_capacity(rows.len());
    for row in rows.iter().filter(|row| keys.insert(row.key())) {
        if !statement.ends_with(' ') {
            statement.push(',');
        }
        for (at, value) in row.values.iter().enumerate() {
            statement.push(if at == 0 { '(' } else { ',' });
            backslash.value(&mut statement, value.as_deref());
        }
        statement.push(')');
    }
    let _ = write!(
        statement,
        "; MERGE INTO {table} USING {stage} ON {target}.{key} = {stage}.{key} \
         WHEN MATCHED THEN UPDATE SET {key} = {stage}.{key} \
         WHEN NOT MATCHED THEN INSERT ({names}) VALUES ({values}); \
         DROP TABLE {stage}; COMMIT",
        target = table.name,
        values = ColumnNames(mapping, &format!("{stage}.")),
    );
    statement
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use postrider_actors::model::table::{Column, ColumnSource, ColumnType};

    use super::*;

    fn rows(values: &[&str]) -> Vec<TableRow> {
        let column = |name: &str, source| Column {
            name: name.into(),
            source,
            kind: ColumnType::Text,
            required: false,
        };
        let columns = vec![column("id", ColumnSource::Id), column("Who", ColumnSource::Recipient)];
        let mapping = Arc::new(Mapping { columns });
        let row =
            |value: &&str| TableRow { mapping: mapping.clone(), values: vec![Some((*value).into()), None] };
        values.iter().map(row).collect()
    }

    #[test]
    fn keys_come_once_and_everything_is_quoted() {
        let table = TableName::parse("sales.orders").unwrap();
        let text = statement(&table, &rows(&["a'", "b", "a'"]), Backslash::Plain);
        assert_eq!(
            text,
            r#"BEGIN; CREATE TEMP TABLE postrider_stage AS SELECT "id", "Who" FROM "sales"."orders" WHERE false; INSERT INTO postrider_stage ("id", "Who") VALUES ('a''',NULL),('b',NULL); MERGE INTO "sales"."orders" USING postrider_stage ON "orders"."id" = postrider_stage."id" WHEN MATCHED THEN UPDATE SET "id" = postrider_stage."id" WHEN NOT MATCHED THEN INSERT ("id", "Who") VALUES (postrider_stage."id", postrider_stage."Who"); DROP TABLE postrider_stage; COMMIT"#
        );
        let own = statement(&TableName::parse("postrider_stage").unwrap(), &rows(&["a"]), Backslash::Plain);
        assert!(own.contains("CREATE TEMP TABLE postrider_staging "), "{own}");
    }

    #[test]
    fn a_statement_is_no_larger_than_its_rows_were_said_to_be() {
        let rows = rows(&["'''", r"\\\", "é"]);
        let table = TableName::parse("t").unwrap();
        let head = statement(
            &table,
            &rows[..0].iter().chain(&rows[2..]).cloned().collect::<Vec<_>>(),
            Backslash::Escape,
        );
        let all = statement(&table, &rows, Backslash::Escape);
        let said: usize = rows[..2].iter().map(TableRow::statement_bytes).sum();
        assert!(all.len() - head.len() <= said);
    }
}
