//! Settings of the adapters for Postgres' protocol, derived from the configuration, and checking them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::Context as _;
use postrider_actors::ports::{CallObserver, StoreError};

use super::{error::StartError, patience::patiently, tables::OpenTable};
use crate::{
    config::{self, Addresses, Config, LedgerKind, Resolved},
    findings::{Finding, Verdict},
    telemetry::metrics::Metrics,
};
use postrider_postgres::{
    BadSettings,
    ledger::{self as postgres, OpenError, PostgresLedger, PostgresSettings, PostgresView, SCHEMA_VERSION},
    warehouse::{
        self, CheckError, CompareLimits, CompareReport, Compared, TableSettings, Warehouse,
        WarehouseSettings, WarehouseTable,
    },
};

/// What the ledger is called in findings.
const LEDGER: &str = "ledger";

/// How long a statement of a command that reads whole tables may take: the operator waits for it and can end it.
const COMMAND_STATEMENT: Duration = Duration::from_mins(10);

/// How long checking a table may take.
const LOOK_TIMEOUT: Duration = Duration::from_mins(1);

/// `[ledger.postgres]` for the adapter; `None` if the ledger is another.
fn settings(config: &Config, addresses: &Addresses) -> Option<PostgresSettings> {
    if config.ledger.kind != LedgerKind::Postgres {
        return None;
    }
    let settings = PostgresSettings::new(addresses.ledger.clone()?, config.postgres.clone());
    Some(PostgresSettings { keep_changes: config.receipts.events_to.is_some(), ..settings })
}

/// Opens the ledger for the daemon.
pub(super) async fn open_ledger(
    resolved: &Resolved,
    metrics: &Arc<Metrics>,
) -> Result<PostgresLedger, StartError> {
    let settings = settings(&resolved.config, &resolved.addresses)
        .expect("the caller looked at ledger.kind, and the address was resolved");
    patiently(async || {
        PostgresLedger::open(settings.clone(), metrics.clone()).await.map_err(|error| StartError::Engine {
            engine: LEDGER.to_owned(),
            may_pass: matches!(error, OpenError::Unreachable(_)),
            problem: error.to_string(),
        })
    })
    .await
}

/// Why a command has no ledger. A temporary failure has a type of its own, for the exit code.
fn not_open(error: OpenError) -> anyhow::Error {
    let cause = match error {
        OpenError::Unreachable(why) => StoreError::Retryable(why).into(),
        other => anyhow::Error::from(other),
    };
    cause.context(
        "the ledger of [ledger.postgres] can't be opened; `postrider check-config --connect` says what is wrong",
    )
}

/// Opens the ledger for commands that read.
pub(super) async fn view(config: &Config) -> anyhow::Result<PostgresView> {
    PostgresView::open(&command_settings(config)?).await.map_err(not_open)
}

/// Opens the ledger for commands that change it.
pub(super) async fn operate(config: &Config) -> anyhow::Result<PostgresLedger> {
    PostgresLedger::open(command_settings(config)?, Arc::new(())).await.map_err(not_open)
}

fn command_settings(config: &Config) -> anyhow::Result<PostgresSettings> {
    let mut settings = settings(config, &config.addresses()?).context("ledger.kind is not \"postgres\"")?;
    settings.timeouts.statement = settings.timeouts.statement.max(COMMAND_STATEMENT);
    Ok(settings)
}

/// Tries every database that the configuration names; with `may_make`, makes what is missing of Postrider's own.
pub(super) async fn try_engines(config: &Config, addresses: &Addresses, may_make: bool) -> Vec<Finding> {
    let mut findings: Vec<_> = try_ledger(config, addresses, may_make).await.into_iter().collect();
    findings.extend(try_tables(config, addresses).await);
    findings
}

/// Tries the ledger, and with `may_make` makes or updates its schema; nothing if it is another's.
async fn try_ledger(config: &Config, addresses: &Addresses, may_make: bool) -> Option<Finding> {
    let settings = settings(config, addresses)?;
    let work = async {
        if may_make {
            let migrated = postgres::migrate(&settings).await?;
            return Ok(Finding::new(
                LEDGER,
                Verdict::Fine,
                match migrated.from {
                    0 => format!("schema {} created, version {}", settings.keys.schema, migrated.to),
                    from if from == migrated.to => {
                        format!("schema {} is up to date, version {from}", settings.keys.schema)
                    }
                    from => {
                        format!(
                            "schema {} updated from version {from} to {}",
                            settings.keys.schema, migrated.to
                        )
                    }
                },
            ));
        }
        let checked = postgres::check(&settings).await?;
        let how = if checked.encrypted { "encrypted" } else { "not encrypted" };
        let detail = format!(
            "schema {}, version {SCHEMA_VERSION}, on {} as {}, {how}",
            settings.keys.schema, checked.server, checked.role
        );
        Ok::<_, OpenError>(if checked.warnings.is_empty() {
            Finding::new(LEDGER, Verdict::Fine, detail)
        } else {
            Finding::new(LEDGER, Verdict::Costly, format!("{detail}; {}", checked.warnings.join("; ")))
        })
    };
    // Each of its steps ends within the limits of its settings.
    Some(work.await.unwrap_or_else(|error| {
        let verdict =
            if matches!(error, OpenError::Unreachable(_)) { Verdict::Unreachable } else { Verdict::Wrong };
        Finding::new(LEDGER, verdict, error.to_string())
    }))
}

/// For commands: nobody reads their metrics.
fn unobserved() -> Arc<dyn CallObserver> {
    Arc::new(())
}

/// A table of the configuration: its destination's name, and the table itself.
type OpenedTable<'a> = (&'a config::Destination, &'a config::Table, Arc<WarehouseTable>);

/// The tables of the configuration, in the order of its destinations. Connects to nothing.
fn open_tables<'a>(
    config: &'a Config,
    addresses: &Addresses,
    observer: &Arc<dyn CallObserver>,
) -> Result<Vec<OpenedTable<'a>>, StartError> {
    let mut warehouses = BTreeMap::new();
    for warehouse in &config.warehouses {
        let refused = |BadSettings(problem)| StartError::Engine {
            engine: format!("warehouse {}", warehouse.name),
            problem,
            may_pass: false,
        };
        let url = addresses.warehouses[&warehouse.name].clone();
        let settings = WarehouseSettings::new(url, warehouse.settings.clone());
        warehouses.insert(&warehouse.name, Warehouse::new(settings, observer.clone()).map_err(refused)?);
    }
    let tables =
        config.destinations.iter().filter_map(|destination| Some((destination, destination.table()?)));
    let open = |(destination, table): (&'a config::Destination, &'a config::Table)| {
        let settings = TableSettings { table: table.table.plain(), mapping: table.mapping.clone() };
        let refused = |error: BadSettings| StartError::Destination {
            name: destination.name.clone(),
            problems: error.to_string(),
        };
        let opened = warehouses[&table.warehouse].table(&settings).map_err(refused)?;
        Ok((destination, table, opened))
    };
    tables.map(open).collect()
}

/// The tables of the configuration, looked up in their catalogues: what can't take its rows is refused (F57). A
/// warehouse that does not answer is no reason not to start: its rows wait.
pub(super) async fn tables(
    resolved: &Resolved,
    metrics: &Arc<Metrics>,
) -> Result<Vec<OpenTable>, StartError> {
    let observer: Arc<dyn CallObserver> = metrics.clone();
    let mut tables = Vec::new();
    for (destination, settings, table) in open_tables(&resolved.config, &resolved.addresses, &observer)? {
        match look(&table).await {
            Ok(()) => {}
            Err(error @ CheckError::Unfit(_)) => {
                let (name, problems) = (destination.name.clone(), error.to_string());
                return Err(StartError::Destination { name, problems });
            }
            Err(CheckError::Unreachable(why)) => {
                let destination = &destination.name;
                tracing::warn!(destination, why, "the table can't be checked now; its rows wait");
            }
        }
        tables.push(OpenTable { destination: destination.clone(), settings: settings.clone(), table });
    }
    Ok(tables)
}

async fn look(table: &WarehouseTable) -> Result<(), CheckError> {
    let late = || CheckError::Unreachable(format!("no answer within {} s", LOOK_TIMEOUT.as_secs()));
    tokio::time::timeout(LOOK_TIMEOUT, table.check()).await.unwrap_or_else(|_| Err(late()))
}

/// Tries the table of each destination.
async fn try_tables(config: &Config, addresses: &Addresses) -> Vec<Finding> {
    let tables = match open_tables(config, addresses, &unobserved()) {
        Ok(tables) => tables,
        Err(error) => return vec![Finding::new("warehouses", Verdict::Wrong, error.to_string())],
    };
    let mut findings = Vec::new();
    for (destination, _, table) in tables {
        let engine = format!("table of {}", destination.name);
        findings.push(match look(&table).await {
            Ok(()) => Finding::new(engine, Verdict::Fine, "it and its columns exist"),
            Err(CheckError::Unreachable(why)) => Finding::new(engine, Verdict::Unreachable, why),
            Err(error @ CheckError::Unfit(_)) => Finding::new(engine, Verdict::Wrong, error.to_string()),
        });
    }
    findings
}

/// Counts the tables of two destinations by ranges of keys.
pub fn compare(
    config: &Config,
    primary: &str,
    secondary: &str,
    values: bool,
) -> anyhow::Result<CompareReport> {
    let mut config = config.clone();
    for warehouse in &mut config.warehouses {
        warehouse.settings.statement_timeout = warehouse.statement_timeout.max(COMMAND_STATEMENT);
    }
    let tables = open_tables(&config, &config.addresses()?, &unobserved())?;
    let tables: BTreeMap<_, _> =
        tables.into_iter().map(|(destination, _, table)| (destination.name.clone(), table)).collect();
    let table = |name: &str| {
        tables.get(name).with_context(|| {
            let known: Vec<_> = tables.keys().map(String::as_str).collect();
            format!("{name:?} is not a destination of kind = \"table\"; known: {}", known.join(", "))
        })
    };
    let (primary, secondary) = (table(primary)?, table(secondary)?);
    let what = if values { Compared::Values } else { Compared::Keys };
    let comparing = warehouse::compare(primary, secondary, what, CompareLimits::default());
    let compared = super::engines::runtime()?.block_on(comparing).map_err(|error| match error {
        warehouse::OpenError::Unreachable(why) => StoreError::Retryable(why).into(),
        other @ warehouse::OpenError::Refused(_) => anyhow::Error::from(other),
    });
    compared.context("a table can't be counted")
}
