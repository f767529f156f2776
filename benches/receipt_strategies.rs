//! Ways to write receipts into the rows of messages, side by side: the same rows, the same receipts, one connection,
//! one run. `cargo bench --features full --bench receipt_strategies -- [rows [grown]]`; it needs Postgres (`POSTRIDER_POSTGRES`, see
//! `script/test`) and some 6 GB of disk for ten million rows, which it gives back.
//!
//! Receipts name the provider's id, as the seed's do, and bring a state, a status, a carrier, a response, a time and
//! a price. Each message gets one receipt in all. Strategies take turns in each round, so that none has the fresh
//! table or the quiet minute for itself: rates are medians of the rounds, ratios are medians of the ratios within a
//! round. All but `apply` are given the partition of the messages.
//!
//! - `case`: the seed's statement, a CASE with an arm per message for each column.
//! - `unnest`: arrays; rows locked in key order, then UPDATE … FROM.
//! - `copy`: COPY into a temporary table, then the same.
//! - `giant`: everything in a table beforehand, one UPDATE for all, its plan left to the planner. The bound.
//! - `apply`: what the ledger does, whole: out of the inbox, look up, join, write, commit.

#[path = "../tests/pg/mod.rs"]
mod pg;

use std::{
    collections::BTreeMap,
    env,
    fmt::Write as _,
    iter,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::SinkExt as _;
use postrider_actors::{
    model::{
        receipt::{EventId, Price, Receipt, ReceiptFacts, ReceiptKey},
        state::MessageState,
        time::UnixMs,
    },
    ports::{Arrival, ReceiptLedger as _},
};
use postrider_postgres::ledger::{PostgresLedger, PostgresSettings, migrate};
use rand::{SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};
use tokio::time::Instant;
use tokio_postgres::{Client, NoTls};

use pg::Postgres;

const ROUNDS: usize = 7;
/// Of the sizes that no ratio is made of.
const OTHER_ROUNDS: usize = 3;
/// Receipts per strategy, size and round.
const RECEIPTS: usize = 10_000;
/// Of the giant UPDATE.
const GIANT_RECEIPTS: usize = 20_000;
const FILE_ROWS: u64 = 100_000;
const WEEK_MS: u64 = 7 * 24 * 60 * 60 * 1000;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Strategy {
    Case,
    Unnest,
    Copy,
    Giant,
    Apply,
}

impl Strategy {
    fn name(self) -> &'static str {
        match self {
            Self::Case => "case",
            Self::Unnest => "unnest",
            Self::Copy => "copy",
            Self::Giant => "giant",
            Self::Apply => "apply",
        }
    }
}

fn main() {
    let mut arguments = env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let mut number =
        |default: u64| arguments.next().map_or(default, |text| text.parse().expect("a number of rows"));
    let rows = number(1_000_000);
    let grown = number(rows * 10);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(run(rows, grown));
}

async fn run(rows: u64, grown: u64) {
    let mut world = World::new(rows).await;
    world.load(0).await;
    println!("{rows} rows, receipts applied per second");
    let sized = |size| [Strategy::Case, Strategy::Unnest, Strategy::Copy, Strategy::Apply].map(|s| (s, size));
    let small = world.measure(&[&sized(1_000)[..], &[GIANT]].concat(), ROUNDS).await;
    print(&small);
    print(&world.measure(&[sized(100), sized(10_000)].concat(), OTHER_ROUNDS).await);
    let groups = grown / rows;
    for group in 1..groups {
        world.load(group).await;
    }
    world.settle();
    println!("\n{} rows in {groups} partitions, receipts for the latest", rows * groups);
    let large = world.measure(&[UNNEST, APPLY, GIANT], ROUNDS).await;
    print(&large);
    world.deal_more(rows..rows * groups);
    println!("\nthe same rows, receipts for all of them alike");
    print(&world.measure(&[APPLY], OTHER_ROUNDS).await);

    println!("\nwithin a round (median of {ROUNDS}; least and greatest)");
    for (what, rates, upper, lower) in [
        ("apply / case of 1000", &small, APPLY, CASE),
        ("apply / giant", &small, APPLY, GIANT),
        ("unnest / case of 1000", &small, UNNEST, CASE),
        ("unnest / giant", &small, UNNEST, GIANT),
        ("giant / case of 1000", &small, GIANT, CASE),
        ("apply / giant, grown", &large, APPLY, GIANT),
    ] {
        let ratios = iter::zip(&rates[&upper], &rates[&lower]).map(|(upper, lower)| upper / lower);
        let ratios = sorted(ratios);
        let (least, greatest) = (ratios[0], ratios[ratios.len() - 1]);
        println!("  {what:<22} {:.2}  ({least:.2} to {greatest:.2})", ratios[ratios.len() / 2]);
    }
    println!("between the two");
    for (name, key) in [("apply", APPLY), ("unnest", UNNEST), ("giant", GIANT)] {
        println!("  {name}, grown / small: {:.2}", median(&large[&key]) / median(&small[&key]));
    }
}

const CASE: (Strategy, usize) = (Strategy::Case, 1_000);
const UNNEST: (Strategy, usize) = (Strategy::Unnest, 1_000);
const APPLY: (Strategy, usize) = (Strategy::Apply, 1_000);
const GIANT: (Strategy, usize) = (Strategy::Giant, GIANT_RECEIPTS);

/// Receipts per second, of each round.
type Rates = BTreeMap<(Strategy, usize), Vec<f64>>;

fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(values: &[f64]) -> f64 {
    sorted(values.iter().copied())[values.len() / 2]
}

fn print(rates: &Rates) {
    for (&(strategy, size), rates) in rates {
        println!("  {:<7} {size:>6}  {:>9.0}/s  (median of {})", strategy.name(), median(rates), rates.len());
    }
}

struct World {
    server: Postgres,
    /// As the daemon's connections plan.
    work: Client,
    /// The same, but for that it may read the temporary table, which has no index.
    copying: Client,
    /// As the server plans.
    free: Client,
    ledger: PostgresLedger,
    rows: u64,
    now: UnixMs,
    /// The partition of the latest messages, as a literal: what a plan is made for.
    latest: String,
    /// Messages that have had no receipt, in random order.
    deck: Vec<u64>,
}

impl World {
    async fn new(rows: u64) -> Self {
        let server = Postgres::start_durable();
        let mut settings = PostgresSettings::new(server.url().into());
        settings.pool = 1;
        settings.timeouts.statement = Duration::from_mins(10);
        migrate(&settings).await.expect("an empty database can be migrated");
        let ledger = PostgresLedger::open(settings, Arc::new(())).await.expect("it was migrated");
        let free = connect(&server, "").await;
        let settings = "SET enable_hashjoin = off; SET enable_mergejoin = off; \
                        SET plan_cache_mode = force_custom_plan;";
        let copying = connect(&server, settings).await;
        let work = connect(&server, &format!("SET enable_seqscan = off; {settings}")).await;
        let temporary = "CREATE TEMP TABLE incoming (provider_id text COLLATE \"C\", state smallint, status text, \
                             carrier text, response text, sent_at timestamptz, price numeric(20, 8)) \
                             ON COMMIT DELETE ROWS";
        copying.batch_execute(temporary).await.expect("a temporary table");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis();
        let now = UnixMs(now as u64);
        let latest = format!("make_partition(to_timestamp({})::date)", now.0 as f64 / 1000.0);
        let latest = free.query_one(&format!("SELECT {latest}::text"), &[]).await.expect("a partition");
        let latest = format!("date '{}'", latest.get::<_, &str>(0));
        let mut world = Self { server, work, copying, free, ledger, rows, now, latest, deck: Vec::new() };
        world.deal_more(0..rows);
        world
    }

    /// Shuffles messages under those that are left.
    fn deal_more(&mut self, messages: std::ops::Range<u64>) {
        let mut rng = SmallRng::seed_from_u64(messages.end);
        self.deck.extend(messages);
        self.deck.shuffle(&mut rng);
    }

    /// Messages `group * rows` on, in the partition that many weeks ago.
    async fn load(&self, group: u64) {
        let at = (self.now.0 - group * WEEK_MS) as f64 / 1000.0;
        let (from, to) = (group * self.rows, (group + 1) * self.rows);
        let day = format!("make_partition(to_timestamp({at})::date)");
        let statements = [
            "INSERT INTO destinations (name) VALUES ('d') ON CONFLICT DO NOTHING".to_owned(),
            format!(
                "INSERT INTO files SELECT lpad(to_hex(f), 32, '0')::uuid, {day}, 'feed' \
                     FROM generate_series({}, {}) f ON CONFLICT DO NOTHING",
                from / FILE_ROWS,
                (to - 1) / FILE_ROWS
            ),
            format!(
                "INSERT INTO messages (day, file, row, destination, recipient, state, recorded, attempts, status, \
                                           provider_id, accepted_at, recorded_at, updated_at) \
                     SELECT (SELECT {day}), lpad(to_hex(i / {FILE_ROWS}), 32, '0')::uuid, i % {FILE_ROWS} + 1, \
                            (SELECT id FROM destinations WHERE name = 'd'), 'user-' || i, 3, 3, 1, 200, \
                            'SM' || lpad(to_hex((i * 2654435761) & 4294967295), 8, '0') || lpad(to_hex(i), 8, '0'), \
                            t, t, t \
                       FROM generate_series({from}::bigint, {to}::bigint - 1) i, \
                            LATERAL (SELECT to_timestamp({at}) AS t) x"
            ),
        ];
        for statement in statements {
            self.free.batch_execute(&statement).await.unwrap_or_else(|error| panic!("{error:?}"));
        }
    }

    /// What autovacuum would do in a quiet hour, so that it does not come in the middle; and the latest partition is in
    /// memory, as it is on a server that works on it.
    fn settle(&self) {
        let warm = format!(
            "SELECT count(pg_prewarm(p.oid)) FROM pg_class c LEFT JOIN pg_index i ON i.indrelid = c.oid \
               JOIN pg_class p ON p.oid IN (c.oid, i.indexrelid) \
              WHERE c.relname = 'messages_' || to_char({}, 'YYYYMMDD')",
            self.latest
        );
        for statement in [
            "CREATE EXTENSION IF NOT EXISTS pg_prewarm",
            "VACUUM (ANALYZE) postrider.messages",
            "CHECKPOINT",
            &warm,
        ] {
            self.server.execute_as("postgres", pg::DATABASE, statement);
        }
    }

    async fn measure(&mut self, wanted: &[(Strategy, usize)], rounds: usize) -> Rates {
        let mut rates = Rates::new();
        self.settle();
        for round in 0..rounds {
            let mut order: Vec<_> = wanted.to_vec();
            order.shuffle(&mut SmallRng::seed_from_u64(round as u64));
            for (strategy, size) in order {
                let count = if strategy == Strategy::Giant { size } else { RECEIPTS };
                let left = self.deck.len().checked_sub(count).expect("enough rows for all rounds");
                let receipts: Vec<_> =
                    self.deck.split_off(left).iter().map(|&message| self.receipt(message)).collect();
                let took = self.apply(strategy, size, &receipts).await;
                rates.entry((strategy, size)).or_default().push(count as f64 / took.as_secs_f64());
            }
        }
        rates
    }

    fn receipt(&self, message: u64) -> Receipt {
        let hash = (message * 2_654_435_761) & 0xffff_ffff;
        let failed = message.is_multiple_of(20);
        Receipt {
            event: EventId::named("s", &message.to_string()),
            key: ReceiptKey::Provider(format!("SM{hash:08x}{message:08x}").into()),
            state: if failed { MessageState::Failed } else { MessageState::Delivered },
            at: Some(self.now),
            facts: ReceiptFacts {
                status: Some(if failed { "UNDELIVERABLE" } else { "DELIVERED" }.into()),
                carrier: Some(format!("carrier {}", message % 7).into()),
                response: Some(format!("{} accepted by handset", message % 1000).into()),
                sent_at: Some(self.now),
                price: Some(Price(645_000 + i64::try_from(message % 100).expect("it is small"))),
            },
        }
    }

    async fn apply(&self, strategy: Strategy, size: usize, receipts: &[Receipt]) -> Duration {
        let latest = &self.latest;
        match strategy {
            Strategy::Case => {
                // Written before the clock starts: the database is what is measured.
                let statements: Vec<_> = receipts.chunks(size).map(|some| case(latest, some)).collect();
                let started = Instant::now();
                for statement in statements {
                    self.work.batch_execute(&statement).await.expect("the CASE statement");
                }
                started.elapsed()
            }
            Strategy::Unnest => self.unnest(size, receipts).await,
            Strategy::Copy => {
                let started = Instant::now();
                for some in receipts.chunks(size) {
                    self.copying.batch_execute("BEGIN").await.expect("BEGIN");
                    copy(&self.copying, "incoming", some).await;
                    self.copying.batch_execute(&joined(latest, "incoming")).await.expect("the UPDATE");
                    self.copying.batch_execute("COMMIT").await.expect("COMMIT");
                }
                started.elapsed()
            }
            Strategy::Giant => {
                let make = "DROP TABLE IF EXISTS giant; CREATE TEMP TABLE giant (provider_id text COLLATE \"C\", \
                                state smallint, status text, carrier text, response text, sent_at timestamptz, \
                                price numeric(20, 8))";
                self.free.batch_execute(make).await.expect("a temporary table");
                copy(&self.free, "giant", receipts).await;
                self.free.batch_execute("ANALYZE giant").await.expect("ANALYZE");
                let giant = format!(
                    "UPDATE messages m SET {SET}, updated_at = now() FROM giant i \
                          WHERE m.day = {latest} AND m.destination = 1 AND m.provider_id = i.provider_id"
                );
                let started = Instant::now();
                self.free.batch_execute(&giant).await.expect("the UPDATE");
                started.elapsed()
            }
            Strategy::Apply => {
                let arrival = Arrival {
                    source: "s".into(),
                    destination: "d".into(),
                    receipts: receipts.to_vec(),
                    rejects: Vec::new(),
                    cursor: None,
                    at: self.now,
                };
                self.ledger.take(arrival).await.expect("the inbox takes them");
                let (mut changed, started) = (0, Instant::now());
                while changed < receipts.len() as u64 {
                    let applied = self.ledger.apply(size, usize::MAX, self.now).await.expect("they apply");
                    assert!(applied.changed > 0, "{applied:?}");
                    changed += applied.changed;
                }
                started.elapsed()
            }
        }
    }

    async fn unnest(&self, size: usize, receipts: &[Receipt]) -> Duration {
        let sql = joined(
            &self.latest,
            "(SELECT provider_id, state, status, carrier, response, sent_at, units * 0.00000001 AS price \
                FROM unnest($1::text[], $2::smallint[], $3::text[], $4::text[], $5::text[], $6::timestamptz[], \
                            $7::bigint[]) AS r (provider_id, state, status, carrier, response, sent_at, units))",
        );
        let statement = self.work.prepare(&sql).await.expect("the statement is right");
        let started = Instant::now();
        for some in receipts.chunks(size) {
            let ids: Vec<_> = some.iter().map(provider_id).collect();
            let states: Vec<_> = some.iter().map(|receipt| receipt.state as i16).collect();
            let statuses: Vec<_> = some.iter().map(|receipt| receipt.facts.status.as_deref()).collect();
            let carriers: Vec<_> = some.iter().map(|receipt| receipt.facts.carrier.as_deref()).collect();
            let responses: Vec<_> = some.iter().map(|receipt| receipt.facts.response.as_deref()).collect();
            let times: Vec<_> = some.iter().map(|receipt| receipt.facts.sent_at.map(time)).collect();
            let prices: Vec<_> =
                some.iter().map(|receipt| receipt.facts.price.map(|price| price.0)).collect();
            let written = self
                .work
                .execute(&statement, &[&ids, &states, &statuses, &carriers, &responses, &times, &prices])
                .await
                .expect("the UPDATE");
            assert_eq!(written, some.len() as u64);
        }
        started.elapsed()
    }
}

const SET: &str = "state = greatest(m.state, i.state), reported = m.reported | (i.state - 4), receipt_state = i.state, \
                       provider_status = i.status, carrier = i.carrier, response = i.response, \
                       provider_sent_at = i.sent_at, price = i.price";

/// Looks up one by one, as the ledger does, locks in key order, then writes. OFFSET keeps the look-up as it is: the
/// temporary table has no statistics, and other plans read the whole partition.
fn joined(latest: &str, from: &str) -> String {
    format!(
        "WITH found AS (SELECT k.file, k.row, i.state, i.status, i.carrier, i.response, i.sent_at, i.price \
                          FROM {from} i, \
                               LATERAL (SELECT file, row FROM messages \
                                         WHERE day = {latest} AND destination = 1 AND provider_id = i.provider_id \
                                        OFFSET 0) k), \
              i AS (SELECT m.day, m.file, m.row, m.destination, f.state, f.status, f.carrier, f.response, f.sent_at, \
                           f.price \
                      FROM found f JOIN messages m ON m.day = {latest} AND m.file = f.file AND m.row = f.row \
                                                  AND m.destination = 1 \
                     ORDER BY m.file, m.row FOR UPDATE OF m) \
         UPDATE messages m SET {SET}, updated_at = now() FROM i \
          WHERE m.day = {latest} AND m.file = i.file AND m.row = i.row AND m.destination = i.destination"
    )
}

fn case(latest: &str, receipts: &[Receipt]) -> String {
    let mut sql = "UPDATE messages SET updated_at = now(), reported = 2".to_owned();
    let quoted = |text: Option<&str>| format!("'{}'", text.unwrap_or_default().replace('\'', "''"));
    let mut column = |name: &str, value: &dyn Fn(&Receipt) -> String| {
        write!(sql, ", {name} = CASE provider_id").expect("a String takes it");
        for receipt in receipts {
            write!(sql, " WHEN '{}' THEN {}", provider_id(receipt), value(receipt))
                .expect("a String takes it");
        }
        write!(sql, " ELSE {name} END").expect("a String takes it");
    };
    column("state", &|receipt| (receipt.state as i16).to_string());
    column("provider_status", &|receipt| quoted(receipt.facts.status.as_deref()));
    column("carrier", &|receipt| quoted(receipt.facts.carrier.as_deref()));
    column("response", &|receipt| quoted(receipt.facts.response.as_deref()));
    column("provider_sent_at", &|receipt| {
        let seconds = receipt.facts.sent_at.map_or(0, |at| at.0 / 1000);
        format!("to_timestamp({seconds})")
    });
    column("price", &|receipt| format!("{}e-8", receipt.facts.price.map_or(0, |price| price.0)));
    let ids: Vec<_> = receipts.iter().map(|receipt| format!("'{}'", provider_id(receipt))).collect();
    let keys = ids.join(", ");
    write!(sql, " WHERE day = {latest} AND destination = 1 AND provider_id IN ({keys})")
        .expect("a String takes it");
    sql
}

async fn copy(client: &Client, table: &str, receipts: &[Receipt]) {
    let mut text = String::new();
    for receipt in receipts {
        let ReceiptFacts { status, carrier, response, sent_at, price } = &receipt.facts;
        writeln!(
            text,
            "{}\t{}\t{}\t{}\t{}\t{}\t{}e-8",
            provider_id(receipt),
            receipt.state as i16,
            status.as_deref().unwrap_or("\\N"),
            carrier.as_deref().unwrap_or("\\N"),
            response.as_deref().unwrap_or("\\N"),
            humantime::format_rfc3339_millis(sent_at.map_or(UNIX_EPOCH, time)),
            price.map_or(0, |price| price.0),
        )
        .expect("a String takes it");
    }
    let sink = client.copy_in(&format!("COPY {table} FROM STDIN")).await.expect("COPY");
    let mut sink = std::pin::pin!(sink);
    sink.send(bytes::Bytes::from(text)).await.expect("COPY takes the rows");
    sink.finish().await.expect("COPY ends");
}

fn provider_id(receipt: &Receipt) -> &str {
    match &receipt.key {
        ReceiptKey::Provider(id) => id,
        ReceiptKey::Message(_) => unreachable!("receipts here name the provider's id"),
    }
}

fn time(at: UnixMs) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(at.0)
}

async fn connect(server: &Postgres, settings: &str) -> Client {
    let (client, connection) =
        tokio_postgres::connect(&server.url(), NoTls).await.expect("the server answers");
    tokio::spawn(connection);
    let settings = format!("SET search_path = postrider, pg_temp; SET jit = off; {settings}");
    client.batch_execute(&settings).await.expect("settings");
    client
}
