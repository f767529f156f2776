//! Processes at one transport that does everything a message service may do, over one store, in virtual time.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use postrider_settings::{Delay, DelayMode, Keys as _};
use tokio::{task::JoinHandle, time::Instant};

use super::{CarrySetup, SharedQueue};
use crate::{
    flow::{Bell, ProgressBoard},
    metrics::StageMetrics,
    model::{
        channel::Call,
        file::FileState,
        ids::{BatchId, FileId},
        outcome::Verdict,
        time::UnixMs,
    },
    ports::{
        Clock, Lease, LeaseRequest, Ledger as _, Outbox as _, Queue as _, Release, Settled, Settlement,
        StoreError, Transport as _, Want,
    },
    testing::{MemoryStore, MemoryTransport, TokioClock, TransportFaults, fixtures},
};

const NOW: UnixMs = UnixMs(1_700_000_000_000);
const LEASE: Duration = Duration::from_secs(30);

struct Process {
    queue: Arc<SharedQueue>,
    task: JoinHandle<Result<(), StoreError>>,
}

struct World {
    store: Arc<MemoryStore>,
    transport: Arc<MemoryTransport>,
    clock: Arc<TokioClock>,
    files: u8,
}

impl World {
    fn new(seed: u64, faults: TransportFaults, keeps_order: bool) -> Self {
        Self {
            store: Arc::default(),
            transport: Arc::new(MemoryTransport::new(seed, faults, keeps_order)),
            clock: Arc::new(TokioClock::at(NOW)),
            files: 0,
        }
    }

    fn reliable() -> Self {
        Self::new(1, TransportFaults::default(), false)
    }

    fn process(&self, name: &str) -> Process {
        self.process_with(name, |_| ())
    }

    fn process_with(&self, name: &str, change: impl FnOnce(&mut CarrySetup)) -> Process {
        let (transport, store) = (self.transport.clone(), self.store.clone());
        let queue = SharedQueue::new(transport, store, self.clock.clone(), name.into(), Bell::default());
        let queue = Arc::new(queue);
        let mut setup = CarrySetup {
            queue: queue.clone(),
            ledger: self.store.clone(),
            destinations: vec!["d".into(), "e".into()],
            paused: Vec::new(),
            delay: Delay::declared(),
            metrics: StageMetrics::default().queue(),
            progress: ProgressBoard::default().mark("coordinator"),
        };
        change(&mut setup);
        Process { queue, task: tokio::spawn(setup.run()) }
    }

    async fn append(&mut self, destination: &str, batches: u64) -> FileId {
        self.files += 1;
        let file = fixtures::file("feed", self.files, &[destination]);
        for batch in 0..batches {
            let first = batch * 10 + 1;
            let mut step = fixtures::step(&file, first..=first + 9, self.clock.wall());
            if batch + 1 == batches {
                step.state = FileState::Ingested;
            }
            self.store.append(step).await.unwrap();
        }
        file.id
    }

    async fn lease(&self, process: &Process, wants: &[&str], limit: usize) -> Vec<Lease> {
        let want = |name: &&str| Want::new(*name, usize::MAX, limit);
        let until = self.clock.mono().after(LEASE);
        let wants = wants.iter().map(want).collect();
        let request = LeaseRequest { holder: "w#1".into(), wants, until, now: self.clock.wall(), born: NOW };
        process.queue.lease(request).await.unwrap()
    }

    /// Sends what is due of it; what `fails` is to be tried again after `wait`.
    async fn deliver(
        &self,
        process: &Process,
        lease: &Lease,
        wait: Duration,
        fails: impl Fn(u32, u32) -> bool,
    ) {
        let now = self.clock.wall();
        let due = lease.open.iter().filter(|open| open.not_before <= now);
        let verdicts = due.map(|open| {
            open.verdict(if fails(open.index, open.tries) {
                Verdict::Retry { attempt: fixtures::failed(now), not_before: now.after(wait) }
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
            Settled::Complete | Settled::Released => process.queue.acknowledge(&[lease.token]).await.unwrap(),
            Settled::Stale => process.queue.release(&[lease.token], Release::Unused).await.unwrap(),
            Settled::Open => panic!("the lease ends"),
        }
    }

    /// Delivers everything of `destinations` in one process; how long it took.
    async fn deliver_all(&self, process: &Process, destinations: &[&str], file: FileId) -> Duration {
        let begun = Instant::now();
        while !self.store.report(file).await.unwrap().unwrap().is_settled() {
            for lease in self.lease(process, destinations, 4).await {
                self.deliver(process, &lease, LEASE, |_, _| false).await;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert!(begun.elapsed() < Duration::from_hours(1), "I9: it does not come to rest");
        }
        begun.elapsed()
    }
}

#[tokio::test(start_paused = true)]
async fn f48_two_processes_share_a_transport_that_does_anything_and_one_is_killed() {
    let mut killed_leases = 0;
    for seed in 0..40 {
        let faults = TransportFaults {
            duplicate: 0.3,
            reorder: true,
            refuse: 0.2,
            unanswered: 0.2,
            unanswered_receive: 0.1,
            lose: 0.2,
            unknown_depth: 0.3,
        };
        let mut world = World::new(seed, faults, seed % 4 == 3);
        let file = world.append("d", 40).await;
        let (one, other) = (world.process("node-a-1"), world.process("node-b-1"));
        let begun = Instant::now();
        let mut held: HashMap<BatchId, &str> = HashMap::new();
        let mut killed: Option<(Instant, Vec<BatchId>)> = None;
        while world.store.depth().await != Ok(0) {
            assert!(
                begun.elapsed() < Duration::from_hours(2),
                "seed {seed}: I9: {:?} are open, {} entries",
                world.store.depth().await,
                world.transport.len("d")
            );
            for (name, process) in [("one", &one), ("other", &other)] {
                if name == "one" && killed.is_some() {
                    continue;
                }
                let dies = name == "one" && begun.elapsed() > Duration::from_secs(2);
                let leases = world.lease(process, &["d"], 4).await;
                for lease in &leases {
                    let holder = held.insert(lease.token.batch, name);
                    assert_eq!(holder, None, "seed {seed}: at two processes at once");
                    if !dies {
                        // Every third message needs a second attempt, every ninth a third.
                        let fails = |index, tries| tries < 2 && index % 3u32.pow(tries + 1) == 0;
                        world.deliver(process, lease, Duration::from_secs(2), fails).await;
                        held.remove(&lease.token.batch);
                    }
                }
                if dies && !leases.is_empty() {
                    process.task.abort();
                    killed_leases += leases.len();
                    let batches = leases.iter().map(|lease| lease.token.batch).collect();
                    killed = Some((Instant::now(), batches));
                }
            }
            if let Some((at, batches)) = &killed
                && at.elapsed() >= LEASE
            {
                held.retain(|id, _| !batches.contains(id)); // its claims have run out
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        other.task.abort();
        let report = world.store.report(file).await.unwrap().unwrap();
        assert_eq!(report.destinations["d"].sent, 400, "seed {seed}");
        assert!(report.is_settled(), "seed {seed}: {report:?}");
        for (row, tries) in [(1, 3), (2, 1), (4, 2)] {
            let (fate, failures) = world.store.fate(file, "d", row).unwrap();
            assert_eq!((fate.tries, failures.len() as u32), (tries, tries - 1), "seed {seed}: row {row}");
        }
    }
    assert!(killed_leases > 40, "only {killed_leases} leases were in killed hands: the test shows nothing");
}

/// Issue 11: a destination that is paused, or that answers 503 with `Retry-After: 3600`, delays a healthy one by nothing.
#[tokio::test(start_paused = true)]
async fn f43_a_destination_that_waits_delays_no_other() {
    let alone = {
        let mut world = World::reliable();
        let process = world.process("node-a-1");
        let file = world.append("d", 50).await;
        world.deliver_all(&process, &["d"], file).await
    };
    // Paused, with a thousand batches in front.
    let mut world = World::reliable();
    let process = world.process_with("node-a-1", |setup| setup.paused = vec!["e".into()]);
    world.append("e", 1_000).await;
    let file = world.append("d", 50).await;
    let took = world.deliver_all(&process, &["d"], file).await;
    assert_eq!(world.transport.len("e"), 0, "what is paused stays in the store");
    assert!(took <= alone + Duration::from_millis(200), "{took:?} instead of {alone:?}");
    // Asking for an hour's rest.
    let mut world = World::reliable();
    let process = world.process("node-a-1");
    world.append("e", 1_000).await;
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        for lease in world.lease(&process, &["e"], 4).await {
            world.deliver(&process, &lease, Duration::from_hours(1), |_, _| true).await;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let file = world.append("d", 50).await;
    let took = world.deliver_all(&process, &["d"], file).await;
    assert!(took <= alone + Duration::from_millis(200), "{took:?} instead of {alone:?}");
    assert!(world.transport.len("e") <= 20, "shallow");
}

/// Issue 11: a queue that is purged, or deleted and made anew.
#[tokio::test(start_paused = true)]
async fn what_is_purged_is_sent() {
    for keeps_order in [false, true] {
        let mut world = World::new(1, TransportFaults::default(), keeps_order);
        let process = world.process("node-a-1");
        let file = world.append("d", 60).await;
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(3)).await;
            for lease in world.lease(&process, &["d"], 2).await {
                world.deliver(&process, &lease, LEASE, |_, _| false).await;
            }
            world.transport.purge("d");
        }
        let took = world.deliver_all(&process, &["d"], file).await;
        assert!(took < Duration::from_mins(3), "{took:?}");
    }
}

/// Issue 11: a missing permission on one call backs off, and sends nothing twice.
#[tokio::test(start_paused = true)]
async fn a_missing_permission_on_one_call_stops_only_its_queue() {
    for call in [Call::Send, Call::Receive, Call::Hide, Call::Delete, Call::Depth] {
        let mut world = World::reliable();
        let process = world.process("node-a-1");
        world.transport.deny("e", call, true);
        let stuck = world.append("e", 30).await;
        let mut sent: BTreeMap<BatchId, u32> = BTreeMap::new();
        let mut work = async |world: &World, seconds| {
            let end = Instant::now() + Duration::from_secs(seconds);
            while Instant::now() < end {
                for lease in world.lease(&process, &["d", "e"], 4).await {
                    *sent.entry(lease.token.batch).or_default() += 1;
                    world.deliver(&process, &lease, LEASE, |_, _| false).await;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        let file = world.append("d", 30).await;
        work(&world, 60).await;
        assert!(world.store.report(file).await.unwrap().unwrap().is_settled(), "{call:?}");
        let calls = world.transport.calls("e", call);
        assert!(calls < 40, "{call:?} was tried {calls} times in a minute");
        world.transport.deny("e", call, false);
        work(&world, 240).await;
        assert!(world.store.report(stuck).await.unwrap().unwrap().is_settled(), "{call:?}");
        assert!(sent.values().all(|leases| *leases == 1), "{call:?}");
        let most = world.transport.sent().into_values().max();
        assert!(most <= Some(2), "{call:?}: a hint was sent {most:?} times");
    }
}

/// Issue 11: a daemon that restarts takes up its own batches at once.
#[tokio::test(start_paused = true)]
async fn a_later_life_takes_up_what_the_earlier_one_had() {
    let mut world = World::reliable();
    let first = world.process("node-a-1");
    let file = world.append("d", 4).await;
    let mut leases = Vec::new();
    while leases.len() < 4 {
        leases.extend(world.lease(&first, &["d"], 4).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    first.task.abort();
    // Another machine does not get them before they run out, and its asking spends nothing.
    let other = world.process("node-b-1");
    assert!(world.lease(&other, &["d"], 4).await.is_empty());
    let second = world.process("node-a-2");
    let took = world.deliver_all(&second, &["d"], file).await;
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert!(world.lease(&other, &["d"], 4).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn s2_3_s2_6_entries_are_held_back_as_the_policy_says() {
    let mut world = World::reliable();
    let delay = Duration::from_secs(30);
    let process = world
        .process_with("node-a-1", |setup| (setup.delay.mode, setup.delay.fixed) = (DelayMode::Fixed, delay));
    let file = world.append("d", 30).await;
    let took = world.deliver_all(&process, &["d"], file).await;
    assert!(took >= delay && took < delay + Duration::from_secs(5), "{took:?}");
    // By the messages that are due: more than 1000 of them hold back for a minute.
    let mut world = World::reliable();
    let process = world.process_with("node-a-1", |setup| setup.delay.mode = DelayMode::ByDepth);
    let file = world.append("d", 101).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let depth = world.transport.depth("d").await.unwrap();
    assert_eq!((depth.delayed, depth.visible), (101, 0));
    let took = world.deliver_all(&process, &["d"], file).await;
    assert!(took >= Duration::from_secs(58) && took < Duration::from_secs(70), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn closing_gives_back_what_waits_and_deletes_what_is_done() {
    let mut world = World::reliable();
    let process = world.process("node-a-1");
    world.append("d", 10).await;
    let mut leases = Vec::new();
    while leases.is_empty() {
        leases = world.lease(&process, &["d"], 2).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    process.queue.stop();
    process.task.await.unwrap().unwrap();
    process.queue.close().await;
    let depth = world.transport.depth("d").await.unwrap();
    assert_eq!(depth.in_flight, 0, "{depth:?}");
    assert_eq!(depth.visible as usize, 10 - leases.len());
}
