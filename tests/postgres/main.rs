//! The ledger of rows on a real Postgres server: what goes wrong around it, and its schema.
#![cfg(feature = "postgres")]

mod faults;
#[path = "../pg/mod.rs"]
mod pg;
mod schema;

use std::{sync::Arc, time::Duration};

use pg::Postgres;
use postrider_actors::{
    model::{
        ids::{FileId, MessageId},
        receipt::{EventId, Receipt, ReceiptFacts, ReceiptKey},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::{Arrival, ReceiptLedger as _, StoreError},
};
use postrider_postgres::ledger::{PostgresLedger, PostgresSettings, grants, migrate};

const NOW: UnixMs = UnixMs(1_700_000_000_000);
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

fn server() -> Arc<Postgres> {
    let server = Postgres::start();
    server.execute_as("postgres", "postgres", "CREATE ROLE daemon LOGIN");
    Arc::new(server)
}

/// Short timeouts: faults are to show within seconds.
fn settings(server: &Postgres) -> PostgresSettings {
    let mut settings = PostgresSettings::new(server.url_of("daemon", pg::DATABASE).into(), pg::keys());
    settings.timeouts.connect = Duration::from_secs(2);
    settings.timeouts.statement = Duration::from_secs(10);
    settings.timeouts.lock = Duration::from_secs(1);
    settings
}

async fn install(server: &Postgres) {
    let mut owner = PostgresSettings::new(server.url().into(), pg::keys());
    owner.keys.partition_days = 1;
    migrate(&owner).await.unwrap();
    server.execute(&grants("postrider", "daemon").unwrap());
}

async fn ledger(server: &Postgres) -> PostgresLedger {
    ledger_with(server, |_| {}).await
}

async fn ledger_with(server: &Postgres, change: impl FnOnce(&mut PostgresSettings)) -> PostgresLedger {
    install(server).await;
    let mut settings = settings(server);
    change(&mut settings);
    PostgresLedger::open(settings, Arc::new(())).await.unwrap()
}

/// File `n` was accepted on day `n`.
fn record(file: u8, row: u64) -> MessageRecord {
    let at = UnixMs(NOW.0 + u64::from(file) * DAY_MS);
    MessageRecord {
        id: MessageId { file: FileId([file; 16]), row },
        destination: "d".into(),
        feed: "feed".into(),
        recipient: format!("user-{file}-{row}").into(),
        state: MessageState::Sent,
        attempts: 1,
        status: 200,
        reason: None,
        detail: None,
        provider_id: Some(format!("p-{file}-{row}").into()),
        accepted_at: at,
        at,
    }
}

/// By the provider's id for odd numbers.
fn receipt(file: u8, row: u64, number: u64, state: MessageState) -> Receipt {
    let id = MessageId { file: FileId([file; 16]), row };
    let key = if number.is_multiple_of(2) {
        ReceiptKey::Message(id)
    } else {
        ReceiptKey::Provider(format!("p-{file}-{row}").into())
    };
    Receipt {
        event: EventId::named("s", &format!("{file} {row} {number} {}", state.as_str())),
        key,
        state,
        at: Some(UnixMs(NOW.0 + number)),
        facts: ReceiptFacts { carrier: Some(format!("carrier {number}").into()), ..ReceiptFacts::default() },
    }
}

fn arrival(receipts: Vec<Receipt>) -> Arrival {
    Arrival {
        source: "s".into(),
        destination: "d".into(),
        receipts,
        rejects: Vec::new(),
        cursor: None,
        at: NOW,
    }
}

/// Repeats what may be repeated; what is refused permanently fails the test.
async fn insist<T, F>(work: impl Fn() -> F) -> T
where
    F: Future<Output = Result<T, StoreError>>,
{
    let started = tokio::time::Instant::now();
    loop {
        match work().await {
            Ok(done) => return done,
            Err(StoreError::Permanent(why)) => panic!("refused: {why}"),
            Err(error) => assert!(started.elapsed() < Duration::from_secs(90), "no end to it: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn drain(ledger: &PostgresLedger) {
    while insist(|| ledger.waiting()).await > 0 {
        insist(|| ledger.apply(1000, usize::MAX, NOW)).await;
    }
}

/// Everything that a receipt can change, of every message.
fn standings(server: &Postgres) -> Vec<Vec<Option<String>>> {
    server.rows(
        "SELECT file::text, row::text, state::text, reported::text, receipt_event::text, carrier \
           FROM postrider.messages ORDER BY file, row",
    )
}

/// A transaction of somebody else's that has run `sql`, open until it is dropped.
async fn open_transaction(server: &Postgres, sql: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client.batch_execute(&format!("BEGIN; {sql}")).await.unwrap();
    client
}
