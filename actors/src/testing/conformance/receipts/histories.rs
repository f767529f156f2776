//! Random histories: a ledger and the fake get the same calls and must end up the same.

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::{NOW, ReceiptSubject, event, id, record, reject};
use crate::{
    model::{
        receipt::{Receipt, ReceiptFacts, ReceiptKey},
        record::MessageRecord,
        state::MessageState,
        time::UnixMs,
    },
    ports::{Applied, Arrival, SourceCursor, StatusChange},
};

const STEPS: usize = 150;
const ROWS: u64 = 30;
const DESTINATIONS: [&str; 2] = ["d", "e"];
const SOURCES: [&str; 2] = ["s", "t"];

/// Plays the history of `seed` on an empty ledger and on the fake in lockstep. Panics, with the seed, where
/// they differ.
pub async fn receipt_history(subject: ReceiptSubject, seed: u64) {
    let rng = SmallRng::seed_from_u64(seed);
    let mut world = World {
        subject,
        fake: ReceiptSubject::in_memory(),
        rng,
        seed,
        now: NOW,
        applied: [Applied::default(); 2],
    };
    for step in 0..STEPS {
        world.now.0 += world.rng.random_range(0..1_000);
        world.step().await;
        if step % 10 == 9 {
            world.settle().await;
        }
    }
}

struct World {
    subject: ReceiptSubject,
    fake: ReceiptSubject,
    rng: SmallRng,
    seed: u64,
    now: UnixMs,
    /// The sums of all applications, by the ledger and by the fake.
    applied: [Applied; 2],
}

impl World {
    async fn step(&mut self) {
        let Self { seed, now, .. } = *self;
        match self.rng.random_range(0..10) {
            0..4 => {
                let records: Vec<_> = (0..self.rng.random_range(1..20)).map(|_| self.any_record()).collect();
                let (real, fake) =
                    (self.subject.ledger.record(records.clone()), self.fake.ledger.record(records));
                assert_eq!(real.await, fake.await, "seed {seed}");
            }
            4..8 => {
                let arrival = self.any_arrival();
                let (real, fake) =
                    (self.subject.ledger.take(arrival.clone()), self.fake.ledger.take(arrival));
                assert_eq!(real.await, fake.await, "seed {seed}");
            }
            // Which receipts these are is each ledger's affair.
            8 => {
                let limit = self.rng.random_range(1..30);
                let fake = self.fake.ledger.apply(limit, usize::MAX, now).await.unwrap();
                let mut real = Applied::default();
                while real.total() < fake.total() {
                    let left = (fake.total() - real.total()) as usize;
                    let some = self.subject.ledger.apply(left, usize::MAX, now).await.unwrap();
                    assert!(some.total() * 2 >= left as u64, "seed {seed}: {some:?} of {left}");
                    real += some;
                }
                assert_eq!(real.total(), fake.total(), "seed {seed}");
                self.count(real, fake);
            }
            _ => {
                self.settle().await;
                let before = UnixMs(now.0 - self.rng.random_range(0..20_000));
                let (real, fake) =
                    (self.subject.ledger.orphan(before, 1_000), self.fake.ledger.orphan(before, 1_000));
                assert_eq!(real.await, fake.await, "seed {seed}");
                let destination = DESTINATIONS[self.rng.random_range(0..2)];
                let (real, fake) = (
                    self.subject.ledger.expire(destination, before, 1_000, now),
                    self.fake.ledger.expire(destination, before, 1_000, now),
                );
                assert_eq!(real.await, fake.await, "seed {seed}");
            }
        }
        assert_eq!(self.subject.waiting().await, self.fake.waiting().await, "seed {seed}");
    }

    /// Applies all that waits; then both must agree about everything.
    async fn settle(&mut self) {
        let (seed, now, limit) = (self.seed, self.now, self.rng.random_range(1..60));
        let (real, fake) = (self.subject.drain_by(limit, now).await, self.fake.drain_by(limit, now).await);
        self.count(real, fake);
        // How often a receipt was parked before, and how often a message changed, goes by the order in which
        // receipts were applied. Each was matched once, and each conflict found once.
        let [real, fake] = self.applied.map(|applied| (applied.matched, applied.conflicts));
        assert_eq!(real, fake, "seed {seed}");
        assert_eq!(self.subject.tally().await, self.fake.tally().await, "seed {seed}");
        for row in 1..=ROWS {
            for destination in DESTINATIONS {
                let real = self.subject.rows.row(id(row), destination).await;
                assert_eq!(real, self.fake.rows.row(id(row), destination).await, "seed {seed}");
            }
        }
        for source in SOURCES {
            let real = self.subject.ledger.cursor(source).await;
            assert_eq!(real, self.fake.ledger.cursor(source).await, "seed {seed}");
        }
        // How many steps a message took is each ledger's affair, where it got to is not.
        let mut ends = Vec::new();
        for ledger in [&self.subject.ledger, &self.fake.ledger] {
            let changes = ledger.changes(None, 10_000).await.unwrap();
            assert!(changes.iter().all(|change| change.before < change.state), "seed {seed}");
            let numbers: Vec<_> = changes.iter().map(|change| change.number).collect();
            ledger.forget_changes(&numbers).await.unwrap();
            let end = |change: StatusChange| ((change.id, change.destination), change.state);
            ends.push(changes.into_iter().map(end).collect::<BTreeMap<_, _>>());
        }
        assert_eq!(ends[0], ends[1], "seed {seed}");
    }

    fn count(&mut self, real: Applied, fake: Applied) {
        for (sum, applied) in self.applied.iter_mut().zip([real, fake]) {
            *sum += applied;
        }
    }

    fn any_record(&mut self) -> MessageRecord {
        let rng = &mut self.rng;
        let row = rng.random_range(1..=ROWS);
        let states = [MessageState::Retrying, MessageState::Dead, MessageState::Sent];
        let state = states[rng.random_range(0..3)];
        let destination = DESTINATIONS[rng.random_range(0..2)];
        let is_named = state == MessageState::Sent && row % 3 > 0;
        MessageRecord {
            destination: destination.into(),
            provider_id: is_named.then(|| format!("p-{row}").into()),
            ..record(row, state, rng.random_range(1..5))
        }
    }

    fn any_arrival(&mut self) -> Arrival {
        let rng = &mut self.rng;
        let mut receipts = Vec::new();
        for _ in 0..rng.random_range(0..15) {
            // Some for messages that there never are.
            let row = rng.random_range(1..=ROWS + 3);
            // What a receipt says follows from its event: what comes again says the same.
            let number = row * 8 + rng.random_range(0..8);
            let key = if number.is_multiple_of(2) {
                ReceiptKey::Message(id(row))
            } else {
                ReceiptKey::Provider(format!("p-{row}").into())
            };
            let states =
                [MessageState::Sent, MessageState::Failed, MessageState::Delivered, MessageState::Delivered];
            let facts =
                ReceiptFacts { status: Some(format!("word {number}").into()), ..ReceiptFacts::default() };
            let state = states[number as usize % 4];
            receipts.push(Receipt {
                event: event(number),
                key,
                state,
                at: Some(UnixMs(NOW.0 + number % 5)),
                facts,
            });
        }
        let rejects = (0..rng.random_range(0..2)).map(|_| reject(rng.random_range(10_000..10_020)));
        let rejects = rejects.collect();
        // One source = one destination.
        let which = rng.random_range(0..2);
        let cursor = rng.random_bool(0.5).then(|| SourceCursor(self.now.0.to_string()));
        Arrival {
            source: SOURCES[which].into(),
            destination: DESTINATIONS[which].into(),
            receipts,
            rejects,
            cursor,
            at: self.now,
        }
    }
}
