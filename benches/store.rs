//! The store's share: CPU per message for append, lease and settle, in batches of 500 rows of about 60 bytes that all
//! go well, for several ways in which the work can come. `cargo bench --features full --bench store`.
//!
//! It prints microseconds of CPU (all threads, user and system) beside wall time, because the wall time
//! is mostly the disk's. The bound is 1 µs of CPU per message.

use std::{collections::BTreeMap, fs, sync::Arc, time::Duration};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use postrider_actors::{
    model::{
        batch::PayloadWriter,
        file::{Checkpoint, FileRecord, FileState},
        outcome::Verdict,
        time::{MonoMs, UnixMs},
    },
    ports::{Append, LeaseRequest, Ledger, Outbox, Queue, Settlement, Want},
    testing::fixtures,
};
use postrider_sqlite::{EmbeddedStore, exit_on_fatal};

const ROWS_PER_BATCH: u64 = 500;
const BATCHES_PER_ROUND: u64 = 200;
const AT: UnixMs = UnixMs(1_700_000_000_000);

fn step(file: &Arc<FileRecord>, first_row: u64, at: UnixMs) -> Append {
    let mut payload = PayloadWriter::with_capacity(32 * 1024);
    for row in first_row..first_row + ROWS_PER_BATCH {
        payload
            .push(row, format!("user-{row:010},Some Person,{row:08}.00,2024-05-01T00:00:00Z,x").as_bytes());
    }
    let mut batch = fixtures::batch(file, "d", [first_row], at);
    batch.count = payload.count();
    batch.payload = payload.finish();
    let rows = first_row + ROWS_PER_BATCH - 1;
    Append {
        file: file.clone(),
        batches: vec![batch],
        rejects: Vec::new(),
        duplicates: Vec::new(),
        checkpoint: Checkpoint { offset: rows * 60, rows, rejected: 0, duplicates: 0 },
        state: FileState::Ingesting,
        hold: None,
        at,
        entries: Vec::new(),
    }
}

/// How the work comes.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    /// Appends in flight at once: how many share a commit.
    appends: u64,
    /// Settlements per batch.
    settles: usize,
}

const LOADS: [Load; 3] = [
    // Parsers are ahead of the disk, and outcomes come batch by batch.
    Load { name: "grouped", appends: 8, settles: 1 },
    // The worst of it: each batch pays for a commit of its own.
    Load { name: "commit per append", appends: 1, settles: 1 },
    // Four batches in flight at once, so that each group of outcomes is about all four.
    Load { name: "grouped, 4 settlements per batch", appends: 8, settles: 4 },
];

/// Steps for one round, made outside of what is measured.
fn steps(file: &Arc<FileRecord>, first_row: u64) -> Vec<Append> {
    (0..BATCHES_PER_ROUND).map(|batch| step(file, first_row + batch * ROWS_PER_BATCH, AT)).collect()
}

/// The whole way of every batch.
async fn round(store: &Arc<EmbeddedStore>, steps: Vec<Append>, load: Load) {
    let at = AT;
    let settles = load.settles;
    let mut steps = steps.into_iter().peekable();
    while steps.peek().is_some() {
        let group = steps.by_ref().take(load.appends as usize).map(|step| store.append(step));
        let done = futures_util::future::join_all(group).await;
        assert!(done.iter().all(Result::is_ok), "{done:?}");
    }
    let mut open = BATCHES_PER_ROUND;
    while open > 0 {
        let wants = vec![Want::new("d", usize::MAX, 4)];
        let request =
            LeaseRequest { holder: "bench".into(), wants, until: MonoMs(u64::MAX), now: at, born: UnixMs(0) };
        let leases = store.lease(request).await.expect("lease");
        open -= leases.len() as u64;
        // At most 500 outcomes per call, as the daemon groups them, spread over `settles` batches.
        for leases in leases.chunks(settles) {
            for part in 0..settles {
                let settlements = leases
                    .iter()
                    .map(|lease| Settlement {
                        token: lease.token,
                        verdicts: lease
                            .open
                            .iter()
                            .filter(|message| message.index as usize % settles == part)
                            .map(|message| message.verdict(Verdict::Sent { at, status: 200 }))
                            .collect(),
                        details: BTreeMap::new(),
                        records: Vec::new(),
                        ends: false,
                        begins: None,
                    })
                    .collect();
                store.settle(settlements).await.expect("settle");
            }
        }
    }
}

fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn peak_rss_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

fn store(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().expect("runtime");
    let mut group = c.benchmark_group("store");
    let messages = ROWS_PER_BATCH * BATCHES_PER_ROUND;
    group.throughput(Throughput::Elements(messages));
    group.sample_size(10);
    for (number, load) in LOADS.into_iter().enumerate() {
        let dir = tempfile::tempdir_in(std::env::var_os("POSTRIDER_BENCH_DIR").unwrap_or("target".into()))
            .expect("a directory for the store");
        let store = Arc::new(EmbeddedStore::open(dir.path(), exit_on_fatal(|| {})).expect("open"));
        let file = fixtures::file("feed", number as u8, &["d"]);
        let (mut row, mut spent, mut done) = (1, Duration::ZERO, 0);
        group.bench_function(load.name, |b| {
            b.iter_batched(
                || {
                    let steps = steps(&file, row);
                    row += messages;
                    steps
                },
                |steps| {
                    let before = cpu();
                    runtime.block_on(round(&store, steps, load));
                    spent += cpu().saturating_sub(before);
                    done += messages;
                },
                BatchSize::PerIteration,
            );
        });
        // A filter on the command line leaves some out.
        if done == 0 {
            continue;
        }
        println!(
            "store, {}: {:.3} µs of CPU per message ({done} messages), peak RSS of the process {} KiB",
            load.name,
            spent.as_secs_f64() * 1e6 / done as f64,
            peak_rss_kib()
        );
    }
    group.finish();
}

criterion_group!(benches, store);
criterion_main!(benches);
