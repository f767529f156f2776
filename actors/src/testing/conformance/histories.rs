//! Random histories: a store and the fake get the same calls, in any order that can happen, and must
//! answer alike. What both must keep is checked against what the driver itself has reported.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};

use super::{Subject, fixtures, want};
use crate::{
    model::{
        file::{FileRecord, FileState},
        ids::FileId,
        ledger::MessageVerdict,
        outcome::{DeathCause, Verdict},
        time::{MonoMs, UnixMs},
    },
    ports::{Appended, Lease, LeaseRequest, Release, Settled, Settlement, StoreError},
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
        fake: Subject::of(&store),
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
    /// With its own queue, whatever the subject's is.
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
    async fn step(&mut self) {
        match self.rng.random_range(0..14) {
            0..=1 => self.append().await,
            2..=3 => self.dispatch().await,
            4..=5 => {
                self.lease().await;
            }
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

    /// The subject's coordinator takes a turn; the fake has its own queue and nothing to send.
    async fn dispatch(&mut self) {
        self.subject.dispatch(self.now).await;
    }

    /// Which batches are leased is the subject's choice; the fake leases the same, if the choice is a good one.
    async fn lease(&mut self) -> Vec<Lease> {
        let seed = self.seed;
        let destination = DESTINATIONS[self.rng.random_range(0..2)];
        let (messages, batches) = (self.rng.random_range(1..20), self.rng.random_range(1..4));
        let holder = format!("w-{}", self.rng.random_range(0..3));
        let until = MonoMs(self.rng.random_range(0..1_000));
        let request = LeaseRequest {
            holder: holder.as_str().into(),
            wants: vec![want(destination, messages, batches)],
            until,
            now: self.now,
            born: UnixMs(0),
        };
        let could = self.store.leasable(destination, self.now);
        let leases = self.subject.lease_all(request).await;
        let ids: Vec<_> = leases.iter().map(|lease| lease.token.batch).collect();
        let expected = self.store.lease_these(&holder, &ids, until, self.now);
        assert_eq!(leases, expected, "seed {seed}");
        let due: usize = leases.iter().map(|lease| lease.due_count(self.now)).sum();
        let is_enough = leases.len() == batches || due >= messages;
        if self.subject.carried.is_none() {
            assert!(is_enough || leases.len() == could, "seed {seed}: {} of {could}", leases.len());
            // By lane and file.
            let mut due: BTreeMap<_, Vec<_>> = BTreeMap::new();
            for lease in &leases {
                let is_first = lease.open.iter().all(|open| open.tries + open.drive == 0);
                let of_it = due.entry((is_first, lease.header.file)).or_default();
                of_it.push(lease.open.iter().map(|open| open.not_before).min());
            }
            assert!(due.values().all(|due| due.is_sorted()), "seed {seed}: what has been due for longest");
        }
        self.leases.extend(leases.iter().cloned());
        leases
    }

    /// A worker settles some messages of a lease that it has or had, whatever became of them since.
    async fn settle(&mut self) {
        if self.leases.is_empty() {
            return;
        }
        let lease = self.leases[self.rng.random_range(0..self.leases.len())].clone();
        let mut verdicts = Vec::new();
        for open in &lease.open {
            let mut attempt = open.tries + 1;
            while self.rng.random_bool(0.4) {
                let verdict = self.any_verdict();
                let (index, drive) = (open.index, open.drive);
                verdicts.push(MessageVerdict { index, drive, attempt, verdict });
                // Some are tried again under the same lease, some are reported twice, some out of turn.
                attempt = (attempt + self.rng.random_range(0..3)).saturating_sub(self.rng.random_range(0..2));
            }
        }
        let begins = if self.rng.random_bool(0.2) {
            Some(lease.open[self.rng.random_range(0..lease.open.len())].index)
        } else {
            None
        };
        let ends = self.rng.random_bool(0.3);
        self.settle_as(&lease, Settlement { ends, begins, ..super::settlement(lease.token, verdicts) }).await;
    }

    async fn settle_as(&mut self, lease: &Lease, settlement: Settlement) -> Settled {
        let rows = crate::model::batch::Rows::decode(lease.payload.clone()).unwrap();
        for message in &settlement.verdicts {
            if let Verdict::Sent { .. } = message.verdict {
                let header = &lease.header;
                let key = (header.file, header.destination.clone(), rows.row(message.index as usize));
                self.told_sent.insert(key);
            }
        }
        // Its first answer is lost, now and then.
        let repeats = if self.rng.random_bool(0.1) { 2 } else { 1 };
        let mut settled = Settled::Stale;
        for _ in 0..repeats {
            let answer = self.subject.ledger.settle(vec![settlement.clone()]).await;
            assert_eq!(answer, self.fake.ledger.settle(vec![settlement.clone()]).await, "seed {}", self.seed);
            settled = answer.unwrap_or_else(|error| panic!("seed {}: {error}", self.seed))[0];
        }
        self.subject.tell_queue(lease.token, settled).await;
        self.fake.tell_queue(lease.token, settled).await;
        settled
    }

    async fn release(&mut self) {
        if self.leases.is_empty() {
            return;
        }
        let token = self.leases[self.rng.random_range(0..self.leases.len())].token;
        let how = if self.rng.random_bool(0.5) { Release::Lost } else { Release::Unused };
        // A store that is throttled may say so: workers repeat it.
        let mut released = self.subject.queue.release(&[token], how).await;
        for _ in 0..3 {
            if !matches!(released, Err(StoreError::Retryable(_) | StoreError::Unknown(_))) {
                break;
            }
            released = self.subject.queue.release(&[token], how).await;
        }
        assert_eq!(released, Ok(()), "seed {}", self.seed);
        self.fake.queue.release(&[token], how).await.unwrap();
    }

    async fn rescue(&mut self) {
        let (now, holder) =
            (MonoMs(self.rng.random_range(0..1_000)), format!("w-{}", self.rng.next_u32() % 3));
        // One that only carries may count a lease that has ended without its knowing.
        let exact = self.subject.carried.is_none();
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
                let reported = sent.get(&(file.id, name)).copied().unwrap_or(0);
                assert_eq!(counts.sent, reported, "seed {seed}: I2 and I7: {name} of {file:?}");
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
            assert!(round < 400, "seed {}: I9: it never finishes", self.seed);
            self.now.0 += 3_600_000;
            self.subject.queue.rescue(MonoMs(u64::MAX)).await.unwrap();
            self.fake.queue.rescue(MonoMs(u64::MAX)).await.unwrap();
            self.dispatch().await;
            for lease in self.lease().await {
                let ends = lease.open.iter().map(|open| open.verdict(self.any_end())).collect();
                let settled = self.settle_as(&lease, super::settlement(lease.token, ends)).await;
                assert!(
                    matches!(settled, Settled::Complete | Settled::Stale),
                    "seed {}: {settled:?}",
                    self.seed
                );
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

    fn any_verdict(&mut self) -> Verdict {
        match self.rng.random_range(0..3) {
            0 => self.any_end(),
            _ => Verdict::Retry {
                attempt: fixtures::failed(self.now),
                not_before: UnixMs(self.now.0 + self.rng.random_range(0..60_000)),
            },
        }
    }

    fn any_end(&mut self) -> Verdict {
        if self.rng.random_bool(0.7) {
            Verdict::Sent { at: self.now, status: 200 }
        } else {
            Verdict::Dead { attempt: fixtures::failed(self.now), cause: DeathCause::Attempts }
        }
    }
}
