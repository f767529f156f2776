//! Two processes at one carrier that does everything a message service may do, over one store.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use postrider_actors::{
    model::{
        file::FileState,
        ids::BatchId,
        outcome::Verdict,
        time::{MonoMs, UnixMs},
    },
    ports::{
        Clock, DispatchSource, DispatchTarget, ItemOutcome, Lease, LeaseRequest, Ledger, Outbox,
        OutstandingQuery, Queue, Release, Settled, Settlement, StoreError, Want,
    },
    testing::{Carrier, CarrierFaults, CarrierQueue, FakeClock, MemoryStore, fixtures},
};

const NOW: UnixMs = UnixMs(1_700_000_000_000);
const LEASE: Duration = Duration::from_secs(30);

struct World {
    store: Arc<MemoryStore>,
    carrier: Arc<Carrier>,
    clock: Arc<FakeClock>,
}

impl World {
    fn new(seed: u64) -> Self {
        let faults = CarrierFaults {
            duplicate: 0.3,
            reorder: true,
            refuse: 0.2,
            unanswered: 0.2,
            unanswered_receive: 0.2,
        };
        Self {
            store: Arc::default(),
            carrier: Arc::new(Carrier::new(seed, faults)),
            clock: Arc::new(FakeClock::at(NOW)),
        }
    }

    fn process(&self, name: &str) -> CarrierQueue {
        let (carrier, clock) = (self.carrier.clone(), self.clock.clone());
        CarrierQueue::new(carrier, self.store.clone(), clock, name, Duration::from_mins(15))
    }

    fn until(&self) -> MonoMs {
        self.clock.mono().after(LEASE)
    }

    /// As the dispatcher does it: what is not accepted is offered again.
    async fn dispatch(&self, queue: &CarrierQueue) {
        let due_by = self.clock.wall().after(queue.reach());
        let query = OutstandingQuery { due_by, limit: 100, except: &[] };
        let entries = self.store.outstanding(query).await.unwrap();
        let sent = queue.send(&entries).await.unwrap();
        let accepted: Vec<_> =
            sent.into_iter().filter(|(_, outcome)| *outcome == ItemOutcome::Ok).map(|(id, _)| id).collect();
        self.store.mark_dispatched(&accepted).await.unwrap();
    }

    async fn lease(&self, queue: &CarrierQueue, limit: usize) -> Vec<Lease> {
        let wants = vec![Want { destination: "d".into(), messages: usize::MAX, batches: limit }];
        let (until, now) = (self.until(), self.clock.wall());
        queue.lease(LeaseRequest { holder: "w#1".into(), wants, until, now, born: UnixMs(0) }).await.unwrap()
    }

    /// Sends what is due of it; what `fails` is to be tried again in two seconds.
    async fn deliver(&self, queue: &CarrierQueue, lease: &Lease, fails: impl Fn(u32, u32) -> bool) {
        let now = self.clock.wall();
        let due = lease.open.iter().filter(|open| open.not_before <= now);
        let verdicts = due.map(|open| {
            open.verdict(if fails(open.index, open.tries) {
                let not_before = now.after(Duration::from_secs(2));
                Verdict::Retry { attempt: fixtures::failed(now), not_before }
            } else {
                Verdict::Sent { at: now, status: 200 }
            })
        });
        let settlement = Settlement {
            token: lease.token,
            verdicts: verdicts.collect(),
            details: BTreeMap::new(),
            records: Vec::new(),
            ends: true,
            begins: None,
        };
        match self.store.settle(vec![settlement]).await.unwrap()[0] {
            Settled::Complete | Settled::Released => queue.acknowledge(&[lease.token]).await.unwrap(),
            Settled::Stale => queue.release(&[lease.token], Release::Unused).await.unwrap(),
            Settled::Open => panic!("the lease ends"),
        }
    }
}

#[tokio::test]
async fn f48_two_processes_share_a_carrier_and_one_is_killed() {
    let mut lost = 0;
    for seed in 0..200 {
        let world = World::new(seed);
        let file = fixtures::file("feed", 1, &["d"]);
        for first in (1..=400).step_by(10) {
            let mut step = fixtures::step(&file, first..=first + 9, NOW);
            step.state = if first == 391 { FileState::Ingested } else { FileState::Ingesting };
            world.store.append(step).await.unwrap();
        }
        let (one, other) = (world.process("node-a-1"), world.process("node-b-1"));
        let mut held: HashMap<BatchId, &str> = HashMap::new();
        let mut killed = Vec::new();
        for round in 0.. {
            assert!(round < 1_000, "seed {seed}: I9: {:?}", world.carrier.depth(world.clock.mono()));
            world.dispatch(&other).await;
            for (name, queue) in [("one", &one), ("other", &other)] {
                if name == "one" && round >= 4 {
                    continue; // it is killed, with leases in its hands
                }
                for lease in world.lease(queue, 4).await {
                    assert_eq!(
                        held.insert(lease.token.batch, name),
                        None,
                        "seed {seed}: at two processes at once"
                    );
                    assert!(round >= 4 || lease.losses == 0, "seed {seed}: nothing was lost yet");
                    if name == "one" && round == 3 {
                        killed.push(lease.token.batch);
                    } else {
                        // Every third message needs a second attempt, every ninth a third.
                        let fails = |index, tries| tries < 2 && index % 3u32.pow(tries + 1) == 0;
                        world.deliver(queue, &lease, fails).await;
                        held.remove(&lease.token.batch);
                    }
                }
            }
            world.clock.advance(Duration::from_secs(1));
            if round == 3 + LEASE.as_secs() {
                held.retain(|id, _| !killed.contains(id)); // its claims have run out
            }
            let depth = world.carrier.depth(world.clock.mono());
            if world.store.depth().await == Ok(0) && depth.total() == 0 && round > 4 {
                break;
            }
        }
        let report = world.store.report(file.id).await.unwrap().unwrap();
        assert_eq!(report.destinations["d"].sent, 400, "seed {seed}");
        assert!(report.is_settled(), "seed {seed}: {report:?}");
        for (row, tries) in [(1, 3), (2, 1), (4, 2)] {
            let (fate, failures) = world.store.fate(file.id, "d", row).unwrap();
            assert_eq!((fate.tries, failures.len() as u32), (tries, tries - 1), "seed {seed}: row {row}");
        }
        lost += killed.len();
    }
    assert!(lost > 400, "only {lost} leases were in the killed process's hands: the test shows nothing");
}

#[tokio::test]
async fn a_batch_waits_at_the_carrier_until_it_is_due() {
    let world = World { carrier: Arc::new(Carrier::new(1, CarrierFaults::default())), ..World::new(1) };
    let queue = world.process("node-a-1");
    let file = fixtures::file("feed", 1, &["d"]);
    world.store.append(fixtures::step(&file, 1..=3, NOW.after(Duration::from_mins(10)))).await.unwrap();
    world.store.append(fixtures::step(&file, 4..=6, NOW.after(Duration::from_mins(16)))).await.unwrap();
    world.dispatch(&queue).await;
    assert_eq!(queue.queue_depth().await.unwrap().delayed, 1, "beyond its reach it stays in the outbox");
    assert!(world.lease(&queue, 9).await.is_empty());
    world.clock.advance(Duration::from_mins(10));
    let lease = world.lease(&queue, 9).await.pop().unwrap();
    assert_eq!(queue.queue_depth().await.unwrap().in_flight, 1);
    world.deliver(&queue, &lease, |_, _| false).await;
    assert_eq!(queue.queue_depth().await.unwrap().total(), 0);
}

#[tokio::test]
async fn a_service_s_limits_are_real() {
    let world = World { carrier: Arc::new(Carrier::new(1, CarrierFaults::default())), ..World::new(1) };
    let file = fixtures::file("feed", 1, &["d"]);
    let batch = |row: u64, bytes: usize| {
        let mut batch = fixtures::batch(&file, "d", [row], NOW);
        batch.payload = vec![1; bytes].into();
        batch
    };
    let now = world.clock.mono();
    let send = |entries: Vec<_>| world.carrier.send(&entries, now);
    let refused = |sent: Result<_, _>| matches!(sent, Err(StoreError::Permanent(_)));
    let eleven = (1..=11).map(|row| (batch(row, 9), Duration::ZERO)).collect();
    assert!(refused(send(eleven)));
    let large = (1..=4).map(|row| (batch(row, 300_000), Duration::ZERO)).collect();
    assert!(refused(send(large)));
    let sent = send(vec![(batch(1, 9), Duration::from_secs(901)), (batch(2, 9), Duration::from_mins(15))]);
    assert!(matches!(&sent.unwrap()[..], [ItemOutcome::Permanent(_), ItemOutcome::Ok]));
    assert!(world.carrier.receive(11, LEASE, now).is_err());
    // The adapter packs what it is given into calls that are allowed.
    let queue = world.process("node-a-1");
    for row in 1..=25 {
        let mut step = fixtures::step(&file, row..=row, NOW);
        step.batches[0].payload = {
            let mut payload = postrider_actors::model::batch::PayloadWriter::default();
            payload.push(row, &vec![b'x'; if row % 2 == 0 { 400_000 } else { 10 }]);
            payload.finish()
        };
        world.store.append(step).await.unwrap();
    }
    world.dispatch(&queue).await;
    assert_eq!(world.store.next_due().await, Ok(None), "all are accepted");
}
