//! Receipts through each ledger of rows, the same ones, in one run: taken into the inbox, applied, and both at once as the
//! daemon does. `cargo bench --features full --bench receipts -- [receipts]`; with Postgres if `POSTRIDER_POSTGRES` names
//! its programs (see `script/test`).
//!
//! Each message has one receipt, by the provider's id, with a state, a status, a carrier, a response, a time and a price.
//! They come either as messages were sent, as providers report, or in random order, which is the worst for any index. The
//! bound for Postgres is `INSERT … SELECT`: the same columns out of a table in memory into one with two indexes, the event
//! and the time, nothing else. Beside each rate stands this process's processor time per receipt.

#[cfg(feature = "postgres")]
#[path = "../tests/pg/mod.rs"]
mod pg;

use std::{env, sync::Arc, time::Duration};

use postrider_actors::{
    model::{
        ids::{FileId, MessageId},
        receipt::{EventId, Price, Receipt, ReceiptFacts, ReceiptKey},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::{Applied, Arrival, ReceiptLedger},
};
use postrider_sqlite::{EmbeddedStore, exit_on_fatal};
use rand::{SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};
use tokio::time::Instant;

/// As a directory's collector and the reconcilers have it.
const TAKEN_AT_ONCE: usize = 5_000;
const APPLIED_AT_ONCE: usize = 1_000;
const APPLIERS: usize = 2;
const NOW: UnixMs = UnixMs(1_700_000_000_000);

/// In which order receipts come.
#[derive(Clone, Copy)]
enum Order {
    AsSent,
    Random,
}

fn main() {
    let number = env::args().skip(1).find_map(|argument| argument.parse().ok());
    let receipts = number.unwrap_or(200_000);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(run(receipts));
}

async fn run(receipts: u64) {
    println!("{receipts} receipts, per second");
    for (order, name) in [(Order::AsSent, "as sent"), (Order::Random, "random")] {
        let directory = tempfile::tempdir().expect("a directory");
        let store = EmbeddedStore::open(directory.path(), exit_on_fatal(|| ())).expect("a new store");
        measure("embedded", name, order, Arc::new(store), receipts).await;
        #[cfg(feature = "postgres")]
        if env::var_os("POSTRIDER_POSTGRES").is_some() {
            postgres::measure(name, order, receipts).await;
        }
    }
}

/// Takes and applies a third of the receipts apart, and a third of them at once.
async fn measure(ledger: &str, name: &str, order: Order, into: Arc<dyn ReceiptLedger>, receipts: u64) {
    for some in (0..receipts * 2).map(record).collect::<Vec<_>>().chunks(5_000) {
        into.record(some.to_vec()).await.expect("it records");
    }
    let mut all: Vec<_> = (0..receipts * 2).collect();
    if matches!(order, Order::Random) {
        all.shuffle(&mut SmallRng::seed_from_u64(1));
    }
    let all: Vec<_> = all.into_iter().map(receipt).collect();
    let (apart, at_once) = all.split_at(receipts as usize);

    let watch = Watch::start();
    take(&into, apart).await;
    let taken = watch.read(receipts);
    let watch = Watch::start();
    let sum = apply(&into, receipts).await;
    let applied = watch.read(receipts);
    assert_eq!((sum.matched, sum.changed), (receipts, receipts));
    let watch = Watch::start();
    let (sum, ()) = tokio::join!(apply(&into, receipts), take(&into, at_once));
    let both = watch.read(receipts);
    assert_eq!(sum.changed, receipts);
    println!("  {ledger:<9} {name:<8}  taken {taken}  applied {applied}  both at once {both}");
}

/// Time, and this process's processor time: what others do on the machine is in the first alone.
struct Watch(Instant, Duration);

impl Watch {
    fn start() -> Self {
        Self(Instant::now(), cpu())
    }

    fn read(self, receipts: u64) -> String {
        let rate = receipts as f64 / self.0.elapsed().as_secs_f64();
        let cpu = cpu().saturating_sub(self.1).as_secs_f64() * 1e6 / receipts as f64;
        format!("{rate:>7.0}/s {cpu:>5.1} µs")
    }
}

/// User and system time: fields 14 and 15 of proc(5)'s `stat`, in ticks of 10 ms.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux has it");
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
    let ticks: u64 = fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}

async fn take(into: &Arc<dyn ReceiptLedger>, receipts: &[Receipt]) {
    for some in receipts.chunks(TAKEN_AT_ONCE) {
        let taken = into.take(arrival(some.to_vec())).await.expect("it takes");
        assert_eq!(taken.new, some.len() as u64);
    }
}

/// By several, until all are.
async fn apply(into: &Arc<dyn ReceiptLedger>, receipts: u64) -> Applied {
    let sum = Arc::new(std::sync::Mutex::new(Applied::default()));
    let appliers = (0..APPLIERS).map(|_| {
        let (into, sum) = (into.clone(), sum.clone());
        tokio::spawn(async move {
            while sum.lock().expect("no panic").total() < receipts {
                let applied = into.apply(APPLIED_AT_ONCE, 1 << 20, NOW).await.expect("it applies");
                if applied.total() == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                *sum.lock().expect("no panic") += applied;
            }
        })
    });
    futures_util::future::join_all(appliers).await;
    *sum.lock().expect("no panic")
}

fn message(number: u64) -> MessageId {
    MessageId { file: FileId([7; 16]), row: number + 1 }
}

/// Ids as providers make them: they tell nothing of the order.
fn provider_id(number: u64) -> Box<str> {
    let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    format!("SM{hash:016x}{number:08x}").into()
}

fn record(number: u64) -> MessageRecord {
    MessageRecord {
        id: message(number),
        destination: "d".into(),
        feed: "feed".into(),
        recipient: format!("user-{number}").into(),
        state: MessageState::Sent,
        attempts: 1,
        status: 200,
        reason: None,
        detail: None,
        provider_id: Some(provider_id(number)),
        accepted_at: NOW,
        at: NOW,
    }
}

fn receipt(number: u64) -> Receipt {
    let receipt = Receipt {
        event: EventId::named("s", &number.to_string()),
        key: ReceiptKey::Provider(provider_id(number)),
        state: if number.is_multiple_of(20) { MessageState::Failed } else { MessageState::Delivered },
        at: Some(NOW),
        facts: ReceiptFacts {
            status: Some("DELIVERED".into()),
            carrier: Some(format!("carrier {}", number % 7).into()),
            response: Some(format!("{} accepted by handset", number % 1000).into()),
            sent_at: Some(NOW),
            price: Some(Price(645_000)),
        },
    };
    Receipt { event: receipt.event.saying(&receipt), ..receipt }
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

#[cfg(feature = "postgres")]
mod postgres {
    use std::sync::Arc;

    use postrider_postgres::ledger::{PostgresLedger, PostgresSettings, migrate};
    use tokio::time::Instant;
    use tokio_postgres::NoTls;

    use super::{Order, pg, pg::Postgres};

    pub(super) async fn measure(name: &str, order: Order, receipts: u64) {
        let server = Postgres::start_durable();
        let settings = || PostgresSettings::new(server.url().into(), pg::keys());
        migrate(&settings()).await.expect("an empty database");
        let ledger = PostgresLedger::open(settings(), Arc::new(())).await.expect("it was migrated");
        super::measure("postgres", name, order, Arc::new(ledger), receipts).await;
        let (client, connection) = tokio_postgres::connect(&server.url(), NoTls).await.expect("it answers");
        tokio::spawn(connection);
        // As many bytes as a receipt has, in as many columns.
        let tables = format!(
            "CREATE TEMP TABLE bound_from AS
             SELECT md5(i::text)::uuid AS event, 'SM' || md5(i::text) AS provider_id, now() AS at, 6::smallint AS state,
                    'DELIVERED' AS status, 'carrier 1' AS carrier, '100 accepted by handset' AS response,
                    now() AS sent_at, 645000::bigint AS price FROM generate_series(1, {receipts}) i;
             CREATE TABLE bound (LIKE bound_from, PRIMARY KEY (event)); CREATE INDEX ON bound (at);"
        );
        client.batch_execute(&tables).await.expect("tables");
        let began = Instant::now();
        client.batch_execute("INSERT INTO bound SELECT * FROM bound_from").await.expect("rows");
        let rate = receipts as f64 / began.elapsed().as_secs_f64();
        println!("  INSERT … SELECT, two indexes: {rate:.0}");
    }
}
