//! How fast one thread parses: rows per second for text, CSV and NDJSON, from memory, in the chunks that the
//! parser stage reads. `cargo bench --features full --bench ingest_parse`.

#![allow(missing_docs)] // criterion's macros make public items

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use postrider_actors::model::formats::{Format, RowBlock, RowParser};

const ROWS: usize = 200_000;
const CHUNK: usize = 256 * 1024;

/// Reads it all; returns how many rows were accepted.
fn read(format: &Format, input: &[u8], skip: u64, block: &mut RowBlock) -> usize {
    let mut parser = RowParser::new(format, 65536).skip_rows(skip);
    let (mut at, mut rows) = (0, 0);
    loop {
        let chunk = &input[at..input.len().min(at + CHUNK)];
        let end = at + chunk.len() == input.len();
        block.clear();
        at += parser.parse(chunk, end, block).expect("the input is sound");
        rows += block.rows.len();
        black_box(&block);
        if end && at == input.len() {
            return rows;
        }
    }
}

fn lines(header: &str, line: impl Fn(usize) -> String) -> String {
    std::iter::once(header.to_owned()).chain((0..ROWS).map(line)).collect()
}

fn parse(criterion: &mut Criterion) {
    let text = lines("", |n| format!("user-{n:010}\n"));
    let csv = lines("user_id,name,kind\n", |n| format!("{n:010},Ada Lovelace,alert-{}\n", n % 10));
    let quoted =
        lines("user_id,name,kind\n", |n| format!("\"{n:010}\",\"Ada \"\"L\"\"\",\"a,{}\"\n", n % 10));
    let ndjson = lines("", |n| format!("{{\"user_id\":\"{n:010}\",\"n\":{n},\"tags\":[\"a\",\"b\"]}}\n"));
    let csv_format = Format::Csv { delimiter: b',', recipient: "user_id".into() };

    let mut group = criterion.benchmark_group("parse");
    group.throughput(Throughput::Elements(ROWS as u64)).sample_size(20);
    let mut block = RowBlock::new(4096);
    for (name, format, input) in [
        ("text", &Format::Text, &text),
        ("csv", &csv_format, &csv),
        ("csv_quoted", &csv_format, &quoted),
        ("ndjson", &Format::Ndjson { recipient: "user_id".into() }, &ndjson),
    ] {
        assert_eq!(read(format, input.as_bytes(), 0, &mut block), ROWS);
        group.bench_function(name, |bench| bench.iter(|| read(format, input.as_bytes(), 0, &mut block)));
    }
    group.bench_function("csv_resumed", |bench| {
        bench.iter(|| read(&csv_format, csv.as_bytes(), ROWS as u64, &mut block));
    });
    group.finish();
}

criterion_group!(benches, parse);
criterion_main!(benches);
