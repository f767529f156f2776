//! Random histories: a store and the fake are told the same, in any order that can happen, and must
//! answer alike. What both must keep is checked against what the driver itself has told.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};

use super::{Subject, dead, fixtures, retry, sent};
use crate::{
    model::{
        batch::Rows,
        file::{FileRecord, FileState},
        ids::FileId,
        outcome::Verdict,
        time::{MonoMs, UnixMs},
    },
    ports::{Appended, Lease, LeaseRequest, OutboxEntry, Release, Settlement},
    testing::MemoryStore,
};

const STEPS: usize = 120;
const DESTINATIONS: [&str; 2] = ["d", "e"];

/// Plays the history of `seed` on an empty store and on the fake in lockstep, then lets the faults stop.
/// Panics, with the seed, where they differ or an invariant breaks.
pub async fn history(subject: Subject, seed: u64) {
    let store = Arc::new(MemoryStore::new());
    let mut world = World {
        subject,
        fake: Subject::of(store.clone()),
        store,
        rng: SmallRng::seed_from_u64(seed),
        seed,
        now: UnixMs(1_000_000),
        files: (1..=3).map(|content| (fixtures::file("feed", content, &DESTINATIONS), 0, false)).collect(),
        leases: Vec::new(),
        told_sent: BTreeSet::new(),
    };
    for _ in 0..STEPS {
        world.now.0 += world.rng.random_range(0..40_000);
        world.step().await;
        world.compare().await;
    }
    world.quiesce().await;
}

struct World {
    subject: Subject,
    fake: Subject,
    /// The fake's own store.
    store: Arc<MemoryStore>,
    rng: SmallRng,
    seed: u64,
    now: UnixMs,
    /// The file, its rows so far, whether it is closed.
    files: Vec<(Arc<FileRecord>, u64, bool)>,
    /// Every lease that was ever given, current or not.
    leases: Vec<Lease>,
    told_sent: BTreeSet<(FileId, String, u64)>,
}

impl World {
    fn only_carries(&self) -> bool {
        self.subject.queue.stores_batches()
    }

    async fn step(&mut self) {
        match self.rng.random_range(0..14) {
            0..=1 => self.append().await,
            2..=3 => self.dispatch().await,
            4..=5 => self.lease().await,
            6..=10 => self.settle().await,
            11 => self.release().await,
            12 => self.rescue().await,
            _ => {
                if self.rng.random_bool(0.3) {
                    self.redrive().await;
                } else {
                    self.report().await;
                }
            }
        }
    }

    async fn append(&mut self) {
        let chosen = self.rng.random_range(0..self.files.len());
        let (file, rows, closed) = self.files[chosen].clone();
        if closed {
            return;
        }
        let last = rows + self.rng.random_range(1..8);
        let mut step = fixtures::step(&file, rows + 1..=last, self.now);
        let close = self.rng.random_bool(0.2);
        if close {
            step.state = FileState::Ingested;
        }
        self.files[chosen] = (file, last, close);
        let repeats = if self.rng.random_bool(0.2) { 2 } else { 1 };
        for _ in 0..repeats {
            let answers =
                (self.subject.outbox.append(step.clone()).await, self.fake.outbox.append(step.clone()).await);
            assert_eq!(answers, (Ok(Appended::Stored), Ok(Appended::Stored)), "seed {}", self.seed);
        }
    }

    async fn dispatch(&mut self) {
        let limit = self.rng.random_range(1..5);
        self.subject.set_time(self.now);
        let entries = self.subject.outstanding(self.now, limit).await;
        let expected = self.fake.outstanding(self.now, limit).await;
        let brief = |entries: &[OutboxEntry]| -> Vec<_> {
            entries.iter().map(|entry| (entry.id, entry.count, entry.not_before)).collect()
        };
        assert_eq!(brief(&entries), brief(&expected), "seed {}", self.seed);
        if self.only_carries() {
            // The outbox learns of it only by what is marked, or claimed.
            self.subject.send(&entries).await;
        } else {
            let stored = self.subject.queue.send(&entries).await.unwrap();
            assert_eq!(stored, self.fake.queue.send(&expected).await.unwrap(), "seed {}", self.seed);
        }
        // A crash in between, now and then: it is sent again and must not be doubled.
        if self.rng.random_bool(0.8) {
            let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
            self.subject.outbox.mark_dispatched(&ids).await.unwrap();
            self.fake.outbox.mark_dispatched(&ids).await.unwrap();
        }
    }

    async fn lease(&mut self) {
        let destination = DESTINATIONS[self.rng.random_range(0..2)];
        let request = LeaseRequest {
            holder: format!("w-{}", self.rng.random_range(0..3)).into(),
            wants: vec![(destination.into(), self.rng.random_range(1..4))],
            until: MonoMs(self.rng.random_range(0..1_000)),
        };
        let leases = self.subject.lease_all(request.clone()).await;
        let expected = if self.only_carries() {
            // Which ones it chooses is its own business.
            let ids: Vec<_> = leases.iter().map(|lease| lease.token.batch).collect();
            self.store.lease_these(&request.holder, &ids, request.until)
        } else {
            self.fake.queue.lease(request).await.unwrap()
        };
        let brief = |leases: &[Lease]| -> Vec<_> {
            leases
                .iter()
                .map(|lease| {
                    let place = (lease.token, lease.root, lease.drive, lease.attempt, lease.accepted_at);
                    (place, lease.payload.clone(), lease.states.clone(), lease.history.clone(), lease.losses)
                })
                .collect()
        };
        assert_eq!(brief(&leases), brief(&expected), "seed {}", self.seed);
        self.leases.extend(leases);
    }

    /// A worker tells about some messages of a lease that it has or had.
    async fn settle(&mut self) {
        if self.leases.is_empty() {
            return;
        }
        let lease = self.leases[self.rng.random_range(0..self.leases.len())].clone();
        let mut verdicts = Vec::new();
        for index in 0..lease.states.0.len() {
            if self.rng.random_bool(0.5) {
                verdicts.push((index as u32, [sent(), dead(), retry()][self.rng.random_range(0..3)]));
            }
        }
        self.tell(&lease, verdicts).await;
    }

    async fn tell(&mut self, lease: &Lease, verdicts: Vec<(u32, Verdict)>) {
        let rows = Rows::decode(lease.payload.clone()).unwrap();
        let mut retried = Vec::new();
        for &(index, verdict) in &verdicts {
            let row = rows.row(index as usize);
            match verdict {
                Verdict::Sent { .. } => {
                    let key = (lease.header.file, lease.header.destination.clone(), row);
                    self.told_sent.insert(key);
                }
                Verdict::Retry { .. } => retried.push(index as usize),
                Verdict::Dead { .. } => {}
            }
        }
        let due = UnixMs(self.now.0 + 1_000);
        // Retries come in one or two batches, as different delays would make them.
        let (some, others) = retried.split_at(self.rng.random_range(0..=retried.len()));
        let retries = [some, others]
            .into_iter()
            .filter(|indexes| !indexes.is_empty())
            .map(|indexes| fixtures::retry(lease, indexes, fixtures::failed(self.now), due))
            .collect();
        let settlement = Settlement { token: lease.token, verdicts, retries, records: Vec::new() };
        let answer = self.subject.ledger.settle(vec![settlement.clone()]).await;
        assert_eq!(answer, self.fake.ledger.settle(vec![settlement]).await, "seed {}", self.seed);
        let settled = answer.unwrap_or_else(|error| panic!("seed {}: {error}", self.seed))[0];
        self.subject.tell_queue(lease, settled).await;
        self.fake.tell_queue(lease, settled).await;
    }

    async fn release(&mut self) {
        if self.leases.is_empty() {
            return;
        }
        let token = self.leases[self.rng.random_range(0..self.leases.len())].token;
        let how = if self.rng.random_bool(0.5) { Release::Lost } else { Release::Unused };
        self.subject.queue.release(&[token], how).await.unwrap();
        self.fake.queue.release(&[token], how).await.unwrap();
    }

    async fn rescue(&mut self) {
        let (now, holder) =
            (MonoMs(self.rng.random_range(0..1_000)), format!("w-{}", self.rng.next_u32() % 3));
        // One that only carries may count a lease whose batch was settled under its holder's hands.
        let exact = !self.only_carries();
        let (lost, expected) =
            (self.subject.queue.rescue(now).await.unwrap(), self.fake.queue.rescue(now).await.unwrap());
        assert!(lost == expected || !exact && lost >= expected, "seed {}: {lost:?}, {expected:?}", self.seed);
        if self.rng.random_bool(0.3) {
            let lost = self.subject.queue.release_holder(&holder).await.unwrap();
            let expected = self.fake.queue.release_holder(&holder).await.unwrap();
            assert!(lost == expected || !exact && lost >= expected, "seed {}: {lost:?}", self.seed);
        }
    }

    async fn redrive(&mut self) {
        let redriven = (self.subject.redrive)(self.now).await;
        assert_eq!(redriven, (self.fake.redrive)(self.now).await, "seed {}", self.seed);
    }

    async fn report(&mut self) {
        let settled = self.subject.ledger.settled_files("feed", 9).await.unwrap();
        assert_eq!(settled, self.fake.ledger.settled_files("feed", 9).await.unwrap(), "seed {}", self.seed);
        let ids: Vec<_> = settled.iter().map(|report| report.file.id).collect();
        self.subject.ledger.mark_reported(&ids).await.unwrap();
        self.fake.ledger.mark_reported(&ids).await.unwrap();
    }

    async fn compare(&self) {
        let seed = self.seed;
        assert_eq!(self.subject.outbox.depth().await, self.fake.outbox.depth().await, "seed {seed}");
        assert_eq!(self.subject.outbox.next_due().await, self.fake.outbox.next_due().await, "seed {seed}");
        let mut sent: BTreeMap<(FileId, &str), u64> = BTreeMap::new();
        for (file, destination, _) in &self.told_sent {
            *sent.entry((*file, destination)).or_default() += 1;
        }
        for (file, ..) in &self.files {
            let report = self.subject.ledger.report(file.id).await.unwrap();
            assert_eq!(report, self.fake.ledger.report(file.id).await.unwrap(), "seed {seed}");
            let Some(report) = report else { continue };
            assert!(report.is_balanced(), "seed {seed}: I1: {report:?}");
            for (name, counts) in &report.destinations {
                let told = sent.get(&(file.id, name)).copied().unwrap_or(0);
                assert_eq!(counts.sent, told, "seed {seed}: I2 and I7: {name} of {file:?}");
            }
        }
    }

    /// No more faults: everything becomes terminal, and adds up.
    async fn quiesce(&mut self) {
        for (file, rows, closed) in self.files.clone() {
            if !closed {
                let mut step = fixtures::step(&file, rows + 1..=rows + 1, self.now);
                step.state = FileState::Ingested;
                self.subject.outbox.append(step.clone()).await.unwrap();
                self.fake.outbox.append(step).await.unwrap();
            }
        }
        for round in 0.. {
            assert!(round < 200, "seed {}: I9: it does not come to rest", self.seed);
            self.now.0 += 3_600_000;
            self.subject.queue.rescue(MonoMs(u64::MAX)).await.unwrap();
            self.fake.queue.rescue(MonoMs(u64::MAX)).await.unwrap();
            self.dispatch().await;
            let from = self.leases.len();
            self.lease().await;
            let given = self.leases.split_off(from);
            self.leases.extend(given.iter().cloned());
            for lease in given {
                let open: Vec<_> = lease.states.unsettled().collect();
                let verdicts = open.into_iter().map(|index| (index as u32, self.any_end())).collect();
                self.tell(&lease, verdicts).await;
            }
            self.compare().await;
            if self.subject.outbox.depth().await.unwrap() == 0 {
                break;
            }
        }
        for (file, ..) in &self.files {
            let report = self.subject.ledger.report(file.id).await.unwrap().unwrap();
            assert!(report.is_settled() && report.settled_at.is_some(), "seed {}: I9: {report:?}", self.seed);
        }
    }

    fn any_end(&mut self) -> Verdict {
        if self.rng.random_bool(0.7) { sent() } else { dead() }
    }
}
