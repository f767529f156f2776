//! How fast rows are written one way and the other: the figures of `docs/decisions/0015-warehouse-tables.md`. Not a
//! check; run it by its name with `--run-ignored all --no-capture`.

use std::time::Duration;

use futures_util::SinkExt as _;
use postrider_actors::{model::table::TableRow, ports::Table as _, testing::MemoryTable};
use tokio::time::Instant;
use tokio_postgres::{Client, NoTls, types::ToSql};

use super::*;

const TABLE: &str = "(id varchar(80) PRIMARY KEY, who text, amount bigint, price numeric(12,2), \
                     at timestamptz, note text)";
const NAMES: &str = "id, who, amount, price, at, note";

fn mapping() -> Arc<Mapping> {
    let columns = vec![
        key(),
        column("who", ColumnSource::Recipient, ColumnType::Text),
        field("amount", ColumnType::Integer),
        field("price", ColumnType::Numeric),
        field("at", ColumnType::Timestamp),
        field("note", ColumnType::Text),
    ];
    Arc::new(Mapping { columns })
}

fn rows(from: usize, count: usize) -> Vec<TableRow> {
    let mapping = mapping();
    (from..from + count)
        .map(|at| {
            // As ids of messages: many files, so that keys don't come in the index's order.
            let file = ((at / 500) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let values = [
                Some(format!("msg_{file:016x}{file:016x}_{at}")),
                Some(format!("user-{at}")),
                Some(at.to_string()),
                Some(format!("{at}.25")),
                Some("2023-11-14 22:13:20.500000+00".to_owned()),
                (at % 3 != 0).then(|| "a note of a few words, none of them long".to_owned()),
            ];
            let values: Vec<_> = values.iter().map(Option::as_deref).collect();
            MemoryTable::row(&mapping, &values)
        })
        .collect()
}

/// As COPY's text format has it: no value here needs escaping.
fn text(rows: &[TableRow]) -> String {
    let mut text = String::new();
    for row in rows {
        let values: Vec<_> = row.values.iter().map(|value| value.as_deref().unwrap_or("\\N")).collect();
        text.push_str(&values.join("\t"));
        text.push('\n');
    }
    text
}

async fn copy_into(client: &Client, table: &str, rows: &[TableRow]) {
    let sink = client.copy_in(&format!("COPY {table} ({NAMES}) FROM STDIN")).await.unwrap();
    let mut sink = std::pin::pin!(sink);
    sink.send(bytes::Bytes::from(text(rows))).await.unwrap();
    sink.as_mut().finish().await.unwrap();
}

async fn by_stage(client: &Client, rows: &[TableRow]) {
    let stage = format!(
        "BEGIN; CREATE TEMP TABLE IF NOT EXISTS stage ON COMMIT DELETE ROWS AS SELECT {NAMES} FROM figures LIMIT 0"
    );
    client.batch_execute(&stage).await.unwrap();
    copy_into(client, "stage", rows).await;
    let insert = format!(
        "INSERT INTO figures ({NAMES}) SELECT {NAMES} FROM stage ON CONFLICT (id) DO NOTHING; COMMIT"
    );
    client.batch_execute(&insert).await.unwrap();
}

async fn by_arrays(client: &Client, rows: &[TableRow]) {
    let columns: Vec<Vec<Option<&str>>> =
        (0..6).map(|at| rows.iter().map(|row| row.values[at].as_deref()).collect()).collect();
    let parameters: Vec<_> = columns.iter().map(|column| column as &(dyn ToSql + Sync)).collect();
    let insert = format!(
        "INSERT INTO figures ({NAMES}) SELECT a, b, c::bigint, d::numeric, e::timestamptz, f \
           FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[]) AS v (a, b, c, d, e, f) \
             ON CONFLICT (id) DO NOTHING"
    );
    client.execute(&insert, &parameters).await.unwrap();
}

/// The ways, and what the adapter itself does, against one `COPY` of all rows.
#[tokio::test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn figures_of_the_ways_to_write() {
    const TOTAL: usize = 100_000;
    let server = Postgres::start_durable();
    let empty =
        || server.execute(&format!("DROP TABLE IF EXISTS figures; CREATE TABLE figures {TABLE}; CHECKPOINT"));
    server.execute_as("postgres", "postgres", "GRANT pg_checkpoint TO postrider");
    let (client, connection) = tokio_postgres::connect(&server.url(), NoTls).await.unwrap();
    let driving = tokio::spawn(connection);
    let all = rows(0, TOTAL);
    let mut plain = 0f64;
    for _ in 0..3 {
        empty();
        let begun = Instant::now();
        copy_into(&client, "figures", &all).await;
        plain = plain.max(TOTAL as f64 / begun.elapsed().as_secs_f64());
    }
    println!("one COPY of {TOTAL} rows: {plain:.0} rows/s");
    println!("{:>10} {:>8} {:>10} {:>6} {:>14}", "way", "rows", "rows/s", "of it", "ms/statement");
    for per_statement in [10, 30, 100, 300, 1_000, 5_000, 10_000] {
        for way in ["arrays", "stage", "adapter", "merge"] {
            empty();
            let dialect = if way == "merge" { Dialect::Redshift } else { Dialect::Postgres };
            let table = table(&server, dialect, "figures", &mapping());
            // Connections, prepared statements and the catalogue are there before it counts.
            table.insert(&rows(TOTAL, per_statement)).await.unwrap();
            let total = (per_statement * 400).min(TOTAL);
            let mut took = Duration::ZERO;
            for rows in all[..total].chunks(per_statement) {
                let begun = Instant::now();
                match way {
                    "arrays" => by_arrays(&client, rows).await,
                    "stage" => by_stage(&client, rows).await,
                    _ => table.insert(rows).await.unwrap(),
                }
                took += begun.elapsed();
            }
            assert_eq!(
                server.value("SELECT count(*)::text FROM figures"),
                (total + per_statement).to_string()
            );
            let rate = total as f64 / took.as_secs_f64();
            println!(
                "{way:>10} {per_statement:>8} {rate:>10.0} {:>6.2} {:>14.2}",
                rate / plain,
                1_000.0 * per_statement as f64 / rate
            );
        }
    }
    driving.abort();
}
