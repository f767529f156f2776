//! The ledger of rows in Postgres does what every ledger of rows must do.
#![cfg(feature = "postgres")]

#[path = "pg/mod.rs"]
mod pg;
#[path = "receipt_view/mod.rs"]
mod receipt_view;

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use async_trait::async_trait;
use pg::{OWNER, Postgres};
use postrider_actors::ports::console::receipts::ReceiptView as _;
use postrider_actors::{
    model::ids::MessageId,
    testing::{
        LedgerReceipt, LedgerRow, LedgerSource, LedgerTally, RowReader, conformance,
        conformance::ReceiptSubject,
    },
};
use postrider_postgres::ledger::{self as postgres, PostgresLedger, PostgresSettings, PostgresView};

/// Looks through the view that commands have; it counts itself.
struct Rows {
    server: Arc<Postgres>,
    database: String,
    view: PostgresView,
}

#[async_trait]
impl RowReader for Rows {
    async fn row(&self, id: MessageId, destination: &str) -> Option<LedgerRow> {
        let rows = self.view.message(id).await.unwrap();
        let row = rows.into_iter().find(|row| &*row.destination == destination)?;
        Some(LedgerRow {
            id: row.id,
            destination: row.destination,
            feed: row.feed,
            recipient: row.recipient.into(),
            state: row.state,
            attempts: row.attempts,
            status: row.status,
            reason: row.reason,
            detail: row.detail.map(Box::from),
            provider_id: row.provider_id.map(Box::from),
            accepted_at: row.accepted_at,
            at: row.recorded_at,
            reported: row.reported,
            receipt: row.receipt.map(|receipt| LedgerReceipt {
                state: receipt.state,
                at: receipt.at,
                facts: receipt.facts,
            }),
        })
    }

    async fn tally(&self) -> LedgerTally {
        let count = |table: &str| {
            let sql = format!("SELECT count(*)::text FROM postrider.{table}");
            self.server.value_as(OWNER, &self.database, &sql).parse().unwrap()
        };
        LedgerTally {
            rows: count("messages"),
            parked: count("receipt_parked WHERE NOT orphan"),
            orphans: count("receipt_parked WHERE orphan"),
            rejects: count("receipt_rejects"),
        }
    }

    async fn source(&self, name: &str) -> Option<LedgerSource> {
        let source = self.view.sources().await.unwrap().into_iter().find(|source| &*source.name == name)?;
        Some(LedgerSource { receipts_at: source.receipts_at, cursor_at: source.cursor_at })
    }
}

static DATABASES: AtomicU32 = AtomicU32::new(0);

/// A database of its own with the schema, for a role with the daemon's grants and no more; its name too.
async fn database(server: &Postgres) -> (PostgresSettings, String) {
    let database = format!("d{}", DATABASES.fetch_add(1, Ordering::SeqCst));
    server.execute_as("postgres", "postgres", &format!("CREATE DATABASE {database} OWNER {OWNER}"));
    let owner = PostgresSettings::new(server.url_of(OWNER, &database).into());
    postgres::migrate(&owner).await.unwrap();
    server.execute_as(OWNER, &database, &postgres::grants("postrider", "daemon").unwrap());
    (PostgresSettings::new(server.url_of("daemon", &database).into()), database)
}

/// An empty ledger.
async fn subject(server: Arc<Postgres>) -> ReceiptSubject {
    let (mut settings, database) = database(&server).await;
    settings.keep_changes = true;
    let view = PostgresView::open(&settings).await.unwrap();
    ReceiptSubject {
        // Connections of its own, as a command has.
        rejects: Arc::new(PostgresLedger::open(settings.clone(), Arc::new(())).await.unwrap()),
        ledger: Arc::new(PostgresLedger::open(settings, Arc::new(())).await.unwrap()),
        rows: Arc::new(Rows { server: server.clone(), database, view }),
        guard: Box::new(server),
    }
}

fn server() -> Arc<Postgres> {
    let server = Postgres::start();
    server.execute_as("postgres", "postgres", "CREATE ROLE daemon LOGIN");
    Arc::new(server)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn ledger_of_rows() {
    let server = server();
    conformance::receipts(|| subject(server.clone())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn histories_are_the_fake_s() {
    let server = server();
    for seed in 0..8 {
        conformance::receipt_history(subject(server.clone()).await, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn what_commands_list_of_receipts() {
    let server = server();
    let (settings, _) = database(&server).await;
    let ledger = PostgresLedger::open(settings.clone(), Arc::new(())).await.unwrap();
    let view = PostgresView::open(&settings).await.unwrap();
    receipt_view::what_is_held_is_listed_by_source_and_destination(&ledger, &view).await;
}
