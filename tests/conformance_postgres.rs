//! The ledger of rows in Postgres does what every ledger of rows must do.
#![cfg(feature = "postgres")]

#[path = "pg/mod.rs"]
mod pg;

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use async_trait::async_trait;
use pg::{OWNER, Postgres};
use postrider::{
    adapters::postgres::{self, PostgresLedger, PostgresSettings, PostgresView},
    console::receipts::ReceiptView as _,
};
use postrider_actors::{
    model::ids::MessageId,
    testing::{LedgerReceipt, LedgerRow, LedgerTally, RowReader, conformance, conformance::ReceiptSubject},
};

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
            told: row.told,
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
}

static DATABASES: AtomicU32 = AtomicU32::new(0);

/// An empty ledger in a database of its own, used by a role with the daemon's grants and no more.
async fn subject(server: Arc<Postgres>) -> ReceiptSubject {
    let database = format!("d{}", DATABASES.fetch_add(1, Ordering::SeqCst));
    server.execute_as("postgres", "postgres", &format!("CREATE DATABASE {database} OWNER {OWNER}"));
    let owner = PostgresSettings::new(server.url_of(OWNER, &database).into());
    postgres::migrate(&owner).await.unwrap();
    server.execute_as(OWNER, &database, &postgres::grants("postrider", "daemon").unwrap());
    let mut settings = PostgresSettings::new(server.url_of("daemon", &database).into());
    settings.keep_changes = true;
    let view = PostgresView::open(&settings).await.unwrap();
    let ledger = PostgresLedger::open(settings).await.unwrap();
    ReceiptSubject {
        ledger: Arc::new(ledger),
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
