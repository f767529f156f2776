//! The schema: its versions, its creation, and whether this program knows it.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::{Client, Error};

use super::open_error::{OpenError, SCHEMA_VERSION};
use super::{
    connect, error,
    settings::{PostgresSettings, Schema},
};

/// Steps from one version to the next. Never edit one that was released: append.
const MIGRATIONS: [&str; SCHEMA_VERSION as usize] = [include_str!("schema_1.sql")];

/// The oldest server that it runs on: before 14, an UPDATE by a join looks into every partition.
const SERVER_VERSION_MIN: i32 = 140_000;

/// Migrations may rewrite tables.
const MIGRATION_TIMEOUT: Duration = Duration::from_hours(1);

const ROLE_SQL: &str = include_str!("../../../../config/postgres/role.sql");

/// What a migration did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Migrated {
    /// The version that was found; 0 if there was no schema.
    pub from: i32,
    /// The version that is there now.
    pub to: i32,
}

/// What `check-config --connect` can say of a database that fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaInfo {
    /// The server's version, in its own words.
    pub server: String,
    /// The role that the URL names.
    pub role: String,
    /// Whether the connection is encrypted.
    pub encrypted: bool,
    /// More than the daemon needs, or something else that is worth a warning.
    pub warnings: Vec<String>,
}

/// Makes or updates the schema, as its owner. Several at once wait for each other; a schema that is up to date is
/// left as it is, but for the width of new partitions.
pub async fn migrate(settings: &PostgresSettings) -> Result<Migrated, OpenError> {
    let schema = Schema::parse(&settings.keys.schema)?;
    let mut client = connect::connect_once(settings).await?;
    let work = migrate_with(&mut client, &schema, settings.keys.partition_days);
    match timeout(MIGRATION_TIMEOUT, work).await {
        Ok(Ok(migrated)) => Ok(migrated),
        Ok(Err(Problem::Open(error))) => Err(error),
        Ok(Err(Problem::Database(error))) => Err(OpenError::Refused(error::words(&error))),
        Err(_) => {
            Err(OpenError::Unreachable(format!("the migration did not end within {MIGRATION_TIMEOUT:?}")))
        }
    }
}

enum Problem {
    Open(OpenError),
    Database(Error),
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self::Database(error)
    }
}

async fn migrate_with(
    client: &mut Client,
    schema: &Schema,
    partition_days: u32,
) -> Result<Migrated, Problem> {
    check_server(client).await.map_err(Problem::Open)?;
    let transaction = client.transaction().await?;
    transaction.batch_execute("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '60s'").await?;
    let lock = format!("SELECT pg_advisory_xact_lock(hashtextextended('postrider migrate {schema}', 0))");
    transaction.batch_execute(&lock).await?;
    // CREATE SCHEMA IF NOT EXISTS wants the right to make one even if it is there.
    let exists = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)";
    if !transaction.query_one(exists, &[&schema.to_string()]).await?.get::<_, bool>(0) {
        transaction.batch_execute(&format!("CREATE SCHEMA \"{schema}\"")).await?;
    }
    let from = if transaction.query_one("SELECT to_regclass('meta') IS NULL", &[]).await?.get(0) {
        0
    } else {
        transaction.query_one("SELECT version FROM meta", &[]).await?.get(0)
    };
    if from > SCHEMA_VERSION {
        return Err(Problem::Open(OpenError::Newer { schema: schema.to_string(), found: from }));
    }
    for step in &MIGRATIONS[from.max(0) as usize..] {
        transaction.batch_execute(step).await?;
    }
    transaction
        .execute(
            "INSERT INTO meta (version, partition_days) VALUES ($1, $2) \
             ON CONFLICT (only_row) DO UPDATE SET version = $1, partition_days = $2",
            &[&SCHEMA_VERSION, &partition_days.cast_signed()],
        )
        .await?;
    transaction
        .execute(
            "SELECT make_partition(current_date), make_partition(current_date + $1::integer)",
            &[&partition_days.cast_signed()],
        )
        .await?;
    transaction.commit().await?;
    Ok(Migrated { from, to: SCHEMA_VERSION })
}

/// Refuses a server that is too old, and a database that can't hold every text (F65).
pub(super) async fn check_server(client: &Client) -> Result<(), OpenError> {
    let facts = "SELECT current_setting('server_version_num')::integer, current_database()::text, \
                        current_setting('server_encoding')";
    let row = client.query_one(facts, &[]).await.map_err(|error| match error.as_db_error() {
        Some(_) => OpenError::Refused(error::words(&error)),
        None => OpenError::Unreachable(error::words(&error)),
    })?;
    let (version, database, encoding): (i32, String, String) = (row.get(0), row.get(1), row.get(2));
    if version < SERVER_VERSION_MIN {
        return Err(OpenError::Server { found: version / 10_000 });
    }
    if encoding != "UTF8" {
        return Err(OpenError::Encoding { database, found: encoding });
    }
    Ok(())
}

/// Refuses a schema that is not this program's.
pub(super) async fn check_version(client: &Client, schema: &str) -> Result<(), OpenError> {
    let found = client.query_opt("SELECT version FROM meta", &[]).await;
    let missing = || OpenError::Missing { schema: schema.to_owned() };
    let found: i32 = match found {
        Ok(Some(row)) => row.get(0),
        Ok(None) => return Err(missing()),
        Err(error) => {
            return Err(
                match error.as_db_error().map(|refused| refused.code().code().to_owned()).as_deref() {
                    Some("42P01" | "3F000") => {
                        let hidden = "SELECT has_schema_privilege($1, 'USAGE')";
                        match client.query_one(hidden, &[&schema]).await.map(|row| row.get(0)) {
                            Ok(false) => missing_grants(schema, format!("USAGE on {schema}")),
                            _ => missing(),
                        }
                    }
                    Some("42501") => missing_grants(schema, "SELECT on meta".to_owned()),
                    Some(_) => OpenError::Refused(error::words(&error)),
                    None => OpenError::Unreachable(error::words(&error)),
                },
            );
        }
    };
    match found {
        SCHEMA_VERSION => Ok(()),
        found if found > SCHEMA_VERSION => Err(OpenError::Newer { schema: schema.to_owned(), found }),
        found => Err(OpenError::Older { schema: schema.to_owned(), found }),
    }
}

/// What role.sql grants: relations, and the privileges on them.
const GRANTED: [(&[&str], &[&str]); 5] = [
    (&["meta", "message_words"], &["SELECT"]),
    (&["partitions"], &["SELECT", "UPDATE"]),
    (&["destinations"], &["SELECT", "INSERT"]),
    (&["messages", "sources"], &["SELECT", "INSERT", "UPDATE"]),
    (
        &["files", "receipt_inbox", "receipt_parked", "receipt_rejects", "receipt_events", "status_changes"],
        &["SELECT", "INSERT", "UPDATE", "DELETE"],
    ),
];

/// A query for those that the role lacks, in words; NULL if it has all.
fn missing_privileges() -> String {
    let mut needs = Vec::new();
    for (relations, privileges) in GRANTED {
        for relation in relations {
            // A privilege on columns will do where there are such.
            let has = |privilege: &&str| match *privilege {
                "DELETE" => format!("('DELETE on {relation}', has_table_privilege('{relation}', 'DELETE'))"),
                other => {
                    format!("('{other} on {relation}', has_any_column_privilege('{relation}', '{other}'))")
                }
            };
            needs.extend(privileges.iter().map(has));
        }
    }
    for function in ["make_partition(date)", "drop_partition(date, date)"] {
        needs.push(format!("('EXECUTE on {function}', has_function_privilege('{function}', 'EXECUTE'))"));
    }
    format!(
        "SELECT string_agg(need, ', ') FROM (VALUES {}) AS n (need, is_there) WHERE NOT is_there",
        needs.join(", ")
    )
}

fn missing_grants(schema: &str, missing: String) -> OpenError {
    OpenError::Privileges { schema: schema.to_owned(), missing }
}

/// Looks whether the daemon could work with this database: version, privileges.
pub async fn check(settings: &PostgresSettings) -> Result<SchemaInfo, OpenError> {
    let client = connect::connect_once(settings).await?;
    let limit = settings.timeouts.statement;
    timeout(limit, check_with(&client, &settings.keys.schema))
        .await
        .unwrap_or_else(|_| Err(OpenError::Unreachable(format!("it does not answer within {limit:?}"))))
}

async fn check_with(client: &Client, schema: &str) -> Result<SchemaInfo, OpenError> {
    let refused = |error: Error| OpenError::Refused(error::words(&error));
    check_server(client).await?;
    check_version(client, schema).await?;
    let row = client.query_one(&missing_privileges(), &[]).await.map_err(refused)?;
    if let Some(missing) = row.get(0) {
        return Err(missing_grants(schema, missing));
    }
    let facts = "SELECT current_setting('server_version'), current_user::text, \
                        (SELECT rolsuper FROM pg_roles WHERE rolname = current_user), \
                        (SELECT pg_has_role(current_user, relowner, 'USAGE') FROM pg_class \
                          WHERE oid = to_regclass('messages')), \
                        coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false), \
                        current_setting('fsync')";
    let row = client.query_one(facts, &[]).await.map_err(refused)?;
    let (role, is_super, is_owner): (String, bool, bool) = (row.get(1), row.get(2), row.get(3));
    let mut warnings = Vec::new();
    if is_super {
        warnings
            .push(format!("role {role} is a superuser; the daemon needs a role with the grants of role.sql"));
    } else if is_owner {
        warnings.push(format!(
            "role {role} owns the tables; the daemon needs only the grants of role.sql, and migrate the owner"
        ));
    }
    if row.get::<_, String>(5) == "off" {
        warnings.push("the server runs with fsync = off: a power cut loses what was recorded".to_owned());
    }
    Ok(SchemaInfo { server: row.get(0), role, encrypted: row.get(4), warnings })
}

/// The statements that give `role` what the daemon needs in `schema`, for the schema's owner to run.
pub fn grants(schema: &str, role: &str) -> Result<String, OpenError> {
    let schema = Schema::parse(schema)?;
    let role = format!("\"{}\"", role.replace('"', "\"\""));
    let statements: Vec<&str> = ROLE_SQL.lines().filter(|line| !line.starts_with("--")).collect();
    Ok(statements
        .join("\n")
        .replace("postrider_daemon", "\u{1}")
        .replace("SCHEMA postrider ", &format!("SCHEMA \"{schema}\" "))
        .replace("postrider.", &format!("\"{schema}\"."))
        .replace('\u{1}', &role))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_name_the_schema_and_the_role_that_were_asked_for() {
        let sql = grants("ledger_1", "the \"daemon\"").unwrap();
        assert!(sql.contains("GRANT USAGE ON SCHEMA \"ledger_1\" TO \"the \"\"daemon\"\"\";"), "{sql}");
        assert!(sql.contains("\"ledger_1\".make_partition(date)"), "{sql}");
        assert!(!sql.contains("postrider") && !sql.contains("--"), "{sql}");
        assert!(grants("a b", "r").is_err());
    }
}
