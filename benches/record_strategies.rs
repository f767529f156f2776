//! Ways to record what became of messages, side by side: the same rows, one connection, one run.
//! `cargo bench --features full --bench record_strategies -- [rows]`; it needs Postgres (`POSTRIDER_POSTGRES`, see `script/test`).
//!
//! Every turn records messages that have no row yet, as nearly all are when they are recorded, in transactions of up
//! to 10,000 rows. Strategies take turns in a random order; the median of the rounds counts.
//!
//! - `unnest`: arrays, then INSERT … ON CONFLICT.
//! - `copy`: binary COPY into a temporary table, then the same.
//! - `bare`: binary COPY into the table itself. It can't merge with a row that is there: the bound.
//! - `record`: what the ledger does, whole: partition, order, merge, write, look for parked receipts, commit.

#[path = "../tests/pg/mod.rs"]
mod pg;

use std::{
    collections::BTreeMap,
    env,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use pg::Postgres;
use postrider_actors::{
    model::{
        ids::{FileId, MessageId},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::ReceiptLedger as _,
};
use postrider_postgres::ledger::{PostgresLedger, PostgresSettings, migrate};
use rand::{SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};
use tokio::time::Instant;
use tokio_postgres::{
    Client, NoTls, Statement,
    binary_copy::BinaryCopyInWriter,
    types::{ToSql, Type},
};
use uuid::Uuid;

const ROUNDS: usize = 5;
const TRANSACTION_ROWS: usize = 10_000;
const ALL: [(Strategy, usize); 9] = [
    (Strategy::Unnest, 100),
    (Strategy::Unnest, 1_000),
    (Strategy::Unnest, 10_000),
    (Strategy::Copy, 100),
    (Strategy::Copy, 1_000),
    (Strategy::Copy, 10_000),
    (Strategy::Bare, 1_000),
    (Strategy::Bare, 10_000),
    (Strategy::Record, 10_000),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Strategy {
    Unnest,
    Copy,
    Bare,
    Record,
}

fn main() {
    let mut arguments = env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let rows = arguments.next().map_or(100_000, |text| text.parse().expect("a number of rows per turn"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(run(rows));
}

async fn run(rows: u64) {
    let world = World::new().await;
    println!("{rows} rows per turn, recorded per second (median of {ROUNDS} rounds)");
    let mut rates: BTreeMap<_, Vec<f64>> = BTreeMap::new();
    for round in 0..ROUNDS {
        let mut order = ALL;
        order.shuffle(&mut SmallRng::seed_from_u64(round as u64));
        for (turn, (strategy, size)) in order.into_iter().enumerate() {
            let file = file(round * ALL.len() + turn);
            let records: Vec<_> = (1..=rows).map(|row| message(file, row, world.now)).collect();
            // No strategy is to pay for the pages that another has dirtied.
            world.server.execute_as("postgres", pg::DATABASE, "CHECKPOINT");
            let started = Instant::now();
            world.write(strategy, size, &records).await;
            let took = started.elapsed();
            rates.entry((strategy, size)).or_default().push(rows as f64 / took.as_secs_f64());
        }
    }
    let written = world.server.value("SELECT count(*)::text FROM postrider.messages");
    assert_eq!(written, (rows * (ROUNDS * ALL.len()) as u64).to_string(), "every strategy writes every row");
    for ((strategy, size), mut all) in rates {
        all.sort_by(f64::total_cmp);
        let name = format!("{strategy:?}").to_lowercase();
        println!("  {name:<7} {size:>6}  {:>9.0}/s", all[all.len() / 2]);
    }
}

struct World {
    server: Postgres,
    client: Client,
    ledger: PostgresLedger,
    destination: i32,
    day: String,
    now: UnixMs,
    /// The ledger's statement in shape, from arrays and from the temporary table.
    from_arrays: Statement,
    from_table: Statement,
}

impl World {
    async fn new() -> Self {
        let server = Postgres::start_durable();
        let mut settings = PostgresSettings::new(server.url().into(), pg::keys());
        settings.keys.connections = 1;
        migrate(&settings).await.expect("an empty database can be migrated");
        let ledger = PostgresLedger::open(settings, Arc::new(())).await.expect("it was migrated");
        let (client, connection) =
            tokio_postgres::connect(&server.url(), NoTls).await.expect("the server answers");
        tokio::spawn(connection);
        let setup = "SET search_path = postrider, pg_temp; SET jit = off; \
                     CREATE TEMP TABLE incoming (file uuid, row bigint, recipient text, state smallint, \
                     attempts integer, status smallint, reason smallint, detail text, provider_id text COLLATE \"C\", \
                     accepted_at timestamptz, recorded_at timestamptz) ON COMMIT DELETE ROWS";
        client.batch_execute(setup).await.expect("a temporary table");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as u64;
        let now = UnixMs(now);
        // The ledger makes the partition and the destination.
        ledger.record(vec![message(FileId([0xff; 16]), 1, now)]).await.expect("it records");
        server.execute("TRUNCATE postrider.messages");
        let id = server.value("SELECT id::text FROM postrider.destinations WHERE name = 'd'");
        let day = server.value("SELECT max(day)::text FROM postrider.files");
        let prepare = async |from: &str| {
            client.prepare(&insert(from, &day, &id)).await.expect("the statement is right")
        };
        let from_arrays = prepare(
            "unnest($1::uuid[], $2::bigint[], $3::text[], $4::smallint[], $5::integer[], $6::smallint[], \
                    $7::smallint[], $8::text[], $9::text[], $10::timestamptz[], $11::timestamptz[]) \
             AS r (file, row, recipient, state, attempts, status, reason, detail, provider_id, accepted_at, \
                   recorded_at)",
        )
        .await;
        let from_table = prepare("incoming").await;
        let destination = id.parse().expect("a number");
        Self { server, client, ledger, destination, day, now, from_arrays, from_table }
    }

    async fn write(&self, strategy: Strategy, size: usize, records: &[MessageRecord]) {
        if strategy == Strategy::Record {
            for some in records.chunks(size) {
                self.ledger.record(some.to_vec()).await.expect("it records");
            }
            return;
        }
        for transaction in records.chunks(TRANSACTION_ROWS) {
            self.client.batch_execute("BEGIN").await.expect("BEGIN");
            for some in transaction.chunks(size) {
                match strategy {
                    Strategy::Unnest => self.unnest(some).await,
                    Strategy::Copy => {
                        self.copy("incoming", COLUMNS, some, &[]).await;
                        self.client.execute(&self.from_table, &[]).await.expect("the INSERT");
                        // Emptied for the next statement; the commit does it for the last.
                        if size < TRANSACTION_ROWS {
                            self.client.batch_execute("TRUNCATE incoming").await.expect("TRUNCATE");
                        }
                    }
                    Strategy::Bare => self.bare(some).await,
                    Strategy::Record => unreachable!("it has its own transactions"),
                }
            }
            self.client.batch_execute("COMMIT").await.expect("COMMIT");
        }
    }

    async fn unnest(&self, records: &[MessageRecord]) {
        let rows: Vec<_> = records.iter().map(Columns::of).collect();
        let files: Vec<_> = rows.iter().map(|row| row.file).collect();
        let numbers: Vec<_> = rows.iter().map(|row| row.row).collect();
        let recipients: Vec<_> = rows.iter().map(|row| row.recipient).collect();
        let states: Vec<_> = rows.iter().map(|row| row.state).collect();
        let attempts: Vec<_> = rows.iter().map(|row| row.attempts).collect();
        let statuses: Vec<_> = rows.iter().map(|row| row.status).collect();
        let reasons: Vec<_> = rows.iter().map(|row| row.reason).collect();
        let details: Vec<_> = rows.iter().map(|row| row.detail).collect();
        let provider_ids: Vec<_> = rows.iter().map(|row| row.provider_id).collect();
        let times: Vec<_> = rows.iter().map(|row| row.at).collect();
        let columns: [&(dyn ToSql + Sync); 11] = [
            &files,
            &numbers,
            &recipients,
            &states,
            &attempts,
            &statuses,
            &reasons,
            &details,
            &provider_ids,
            &times,
            &times,
        ];
        self.client.execute(&self.from_arrays, &columns).await.expect("the INSERT");
    }

    /// Into the table itself: with `day` and `destination`, and the columns that the statement derives.
    async fn bare(&self, records: &[MessageRecord]) {
        let columns = "file, row, recipient, state, attempts, status, reason, detail, provider_id, accepted_at, \
                       recorded_at, recorded, updated_at, destination, day";
        let day = self.client.query_one("SELECT $1::text::date", &[&self.day]).await.expect("a date");
        let day: Day = day.get(0);
        let state = MessageState::Sent as i16;
        let now = time(self.now);
        self.copy("messages", columns, records, &[&state, &now, &self.destination, &day]).await;
    }

    async fn copy(
        &self,
        table: &str,
        columns: &str,
        records: &[MessageRecord],
        more: &[&(dyn ToSql + Sync)],
    ) {
        const TYPES: [Type; 15] = [
            Type::UUID,
            Type::INT8,
            Type::TEXT,
            Type::INT2,
            Type::INT4,
            Type::INT2,
            Type::INT2,
            Type::TEXT,
            Type::TEXT,
            Type::TIMESTAMPTZ,
            Type::TIMESTAMPTZ,
            Type::INT2,
            Type::TIMESTAMPTZ,
            Type::INT4,
            Type::DATE,
        ];
        let sql = format!("COPY {table} ({columns}) FROM STDIN (FORMAT binary)");
        let sink = self.client.copy_in(&sql).await.expect("COPY");
        let mut writer = pin!(BinaryCopyInWriter::new(sink, &TYPES[..11 + more.len()]));
        for record in records {
            let row = Columns::of(record);
            let own: [&(dyn ToSql + Sync); 11] = [
                &row.file,
                &row.row,
                &row.recipient,
                &row.state,
                &row.attempts,
                &row.status,
                &row.reason,
                &row.detail,
                &row.provider_id,
                &row.at,
                &row.at,
            ];
            let whole: Vec<_> = own.iter().chain(more).copied().collect();
            writer.as_mut().write(&whole).await.expect("COPY takes the row");
        }
        writer.finish().await.expect("COPY ends");
    }
}

/// Files in a random order: the rows of a turn are adjacent, those of the next are anywhere.
fn file(turn: usize) -> FileId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&(turn as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    FileId(id)
}

fn message(file: FileId, row: u64, now: UnixMs) -> MessageRecord {
    let number = u64::from_be_bytes(file.0[..8].try_into().expect("eight of sixteen")) ^ row;
    MessageRecord {
        id: MessageId { file, row },
        destination: "d".into(),
        feed: "feed".into(),
        recipient: format!("user-{row:07}").into(),
        state: MessageState::Sent,
        attempts: 1,
        status: 200,
        reason: None,
        detail: None,
        provider_id: Some(format!("SM{:016x}", number.wrapping_mul(0x2545_f491_4f6c_dd1d)).into()),
        accepted_at: now,
        at: now,
    }
}

/// The statement of the ledger, in shape.
fn insert(from: &str, day: &str, destination: &str) -> String {
    const GREATER: &str = "(excluded.recorded, excluded.accepted_at, excluded.attempts, excluded.recorded_at) \
         > (m.recorded, m.accepted_at, m.attempts, m.recorded_at)";
    let greater: String =
        ["recorded", "attempts", "status", "reason", "detail", "accepted_at", "recorded_at"]
            .map(|column| {
                format!("{column} = CASE WHEN {GREATER} THEN excluded.{column} ELSE m.{column} END, ")
            })
            .concat();
    format!(
        "INSERT INTO messages AS m (day, file, row, destination, recipient, state, recorded, attempts, status, \
                reason, detail, provider_id, accepted_at, recorded_at, updated_at) \
         SELECT '{day}'::date, file, row, {destination}, recipient, state, state, attempts, status, reason, detail, \
                provider_id, accepted_at, recorded_at, recorded_at FROM {from} \
         ON CONFLICT (day, file, row, destination) DO UPDATE SET {greater} \
            state = greatest(m.state, excluded.state), \
            provider_id = least(m.provider_id, excluded.provider_id), \
            updated_at = greatest(m.updated_at, excluded.updated_at) \
         WHERE {GREATER} OR least(m.provider_id, excluded.provider_id) IS DISTINCT FROM m.provider_id"
    )
}

const COLUMNS: &str =
    "file, row, recipient, state, attempts, status, reason, detail, provider_id, accepted_at, recorded_at";

/// A record in the types of its columns.
struct Columns<'a> {
    file: Uuid,
    row: i64,
    recipient: &'a str,
    state: i16,
    attempts: i32,
    status: i16,
    reason: Option<i16>,
    detail: Option<&'a str>,
    provider_id: Option<&'a str>,
    at: SystemTime,
}

impl<'a> Columns<'a> {
    fn of(record: &'a MessageRecord) -> Self {
        Self {
            file: Uuid::from_bytes(record.id.file.0),
            row: i64::try_from(record.id.row).expect("it is small"),
            recipient: &record.recipient,
            state: record.state as i16,
            attempts: 1,
            status: 200,
            reason: None,
            detail: None,
            provider_id: record.provider_id.as_deref(),
            at: time(record.at),
        }
    }
}

/// A date as the wire has it, from one answer to the next question.
#[derive(Debug)]
struct Day(Vec<u8>);

impl<'a> tokio_postgres::types::FromSql<'a> for Day {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(raw.to_vec()))
    }

    fn accepts(of: &Type) -> bool {
        *of == Type::DATE
    }
}

impl ToSql for Day {
    fn to_sql(
        &self,
        _: &Type,
        out: &mut bytes::BytesMut,
    ) -> Result<tokio_postgres::types::IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(&self.0);
        Ok(tokio_postgres::types::IsNull::No)
    }

    fn accepts(of: &Type) -> bool {
        *of == Type::DATE
    }

    tokio_postgres::types::to_sql_checked!();
}

fn time(at: UnixMs) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(at.0)
}
