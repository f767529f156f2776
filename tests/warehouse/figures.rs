//! How fast rows are written one way and the other: the figures of `docs/decisions/0015-warehouse-tables.md`. Not a
//! check; run it by its name with `--run-ignored all --no-capture`.

use std::time::Duration;

use futures_util::SinkExt as _;
use postrider_actors::{model::table::TableRow, ports::Table as _, testing::MemoryTable};
use tokio::time::Instant;
use tokio_postgres::{Client, NoTls};

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

async fn by_copy(client: &Client, rows: &[TableRow]) {
    let stage = format!(
        "BEGIN; CREATE TEMP TABLE IF NOT EXISTS stage ON COMMIT DELETE ROWS AS SELECT {NAMES} FROM figures LIMIT 0"
    );
    client.batch_execute(&stage).await.unwrap();
    let sink = client.copy_in(&format!("COPY stage ({NAMES}) FROM STDIN")).await.unwrap();
    let mut text = String::new();
    for row in rows {
        let values: Vec<_> = row.values.iter().map(|value| value.as_deref().unwrap_or("\\N")).collect();
        text.push_str(&values.join("\t"));
        text.push('\n');
    }
    let mut sink = std::pin::pin!(sink);
    sink.send(bytes::Bytes::from(text)).await.unwrap();
    sink.as_mut().finish().await.unwrap();
    let insert = format!(
        "INSERT INTO figures ({NAMES}) SELECT {NAMES} FROM stage ON CONFLICT (id) DO NOTHING; COMMIT"
    );
    client.batch_execute(&insert).await.unwrap();
}

#[tokio::test]
#[ignore = "needs Postgres (POSTRIDER_POSTGRES): script/test installs it"]
async fn figures_of_the_ways_to_write() {
    const TOTAL: usize = 100_000;
    let server = Postgres::start_durable();
    println!("{:>18} {:>8} {:>10} {:>14}", "way", "rows", "rows/s", "ms/statement");
    for per_statement in [100, 1_000, 10_000] {
        for way in ["arrays", "copy", "merge", "arrays again"] {
            server.execute(&format!("DROP TABLE IF EXISTS figures; CREATE TABLE figures {TABLE}"));
            let dialect = if way == "merge" { Dialect::Redshift } else { Dialect::Postgres };
            let table = table(&server, dialect, "figures", &mapping());
            let (client, connection) = tokio_postgres::connect(&server.url(), NoTls).await.unwrap();
            let driving = tokio::spawn(connection);
            let total = if per_statement == 100 { TOTAL / 5 } else { TOTAL };
            let mut took = Duration::ZERO;
            for from in (0..total).step_by(per_statement) {
                let rows = rows(from, per_statement);
                let begun = Instant::now();
                match way {
                    "copy" => by_copy(&client, &rows).await,
                    _ => table.insert(&rows).await.unwrap(),
                }
                took += begun.elapsed();
            }
            assert_eq!(server.value("SELECT count(*)::text FROM figures"), total.to_string());
            driving.abort();
            let seconds = took.as_secs_f64();
            println!(
                "{way:>18} {per_statement:>8} {:>10.0} {:>14.2}",
                total as f64 / seconds,
                seconds * 1_000.0 / (total / per_statement) as f64
            );
        }
    }
}
