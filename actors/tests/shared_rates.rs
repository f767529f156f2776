//! Three processes on one table, in virtual time: each is a throttle of its own with a gate and senders.

use std::{cell::RefCell, num::NonZeroU32, rc::Rc, sync::Arc, time::Duration};

use actix::{Addr, AsyncContext as _, Context};
use postrider_actors::{
    flow::{Bells, Gate, TrafficControl},
    metrics::StageMetrics,
    model::{
        limits::LimitChange,
        rate_share::lease,
        time::{MonoMs, UnixMs},
    },
    ports::{Clock, RateTable as _},
    supervision::{ChildId, Drain, Fault, Stage as _},
    testing::{MemoryRateTable, MemoryStore},
    throttle::{LimitedGate, RateShares, SetByOperators, Throttle, ThrottleSetup},
};
use tokio::{task::JoinHandle, time::Instant};

/// Virtual time, and each process's own idea of it.
struct VirtualClock {
    start: Instant,
    offset_ms: u64,
}

impl Clock for VirtualClock {
    fn wall(&self) -> UnixMs {
        UnixMs(0) // nothing here looks at it
    }

    fn mono(&self) -> MonoMs {
        MonoMs(self.start.elapsed().as_millis() as u64 + self.offset_ms)
    }
}

struct World {
    table: Arc<MemoryRateTable>,
    /// Where operators set what.
    store: Arc<MemoryStore>,
    start: Instant,
    rate_per_s: u32,
    burst: u32,
    /// When messages went through any gate, in milliseconds from the start, in order.
    sent_ms: Rc<RefCell<Vec<u64>>>,
    joined: u64,
}

struct Process {
    throttle: Addr<Throttle>,
    life: JoinHandle<()>,
    gate: Gate,
    senders: Vec<JoinHandle<()>>,
}

impl World {
    fn new(rate_per_s: u32, burst: u32) -> Self {
        tokio::time::pause();
        let (table, start) = (Arc::new(MemoryRateTable::new()), Instant::now());
        let (store, sent_ms) = (Arc::default(), Rc::default());
        Self { table, store, start, rate_per_s, burst, sent_ms, joined: 0 }
    }

    fn join(&mut self) -> Process {
        self.joined += 1;
        let gate = Gate::default();
        let clock = VirtualClock { start: self.start, offset_ms: self.joined * 1_000_003 };
        let clock: Arc<dyn Clock> = Arc::new(clock);
        let limited = LimitedGate {
            name: "d".into(),
            gate: gate.clone(),
            rate_per_s: NonZeroU32::new(self.rate_per_s),
            burst: NonZeroU32::new(self.burst).unwrap(),
            metrics: StageMetrics::default().gate("d"),
        };
        let process = format!("vm{}-1", self.joined).into();
        let setup = ThrottleSetup {
            gates: vec![limited],
            set: Some(SetByOperators {
                steering: self.store.clone(),
                traffic: TrafficControl::new(clock.clone()),
                workers: Bells::default(),
            }),
            clock,
            grants_burst: true,
            shares: Some(RateShares { table: self.table.clone(), process }),
        };
        let context = Context::new();
        let throttle = context.address();
        // As the supervisor does it, so that the life can be cut off.
        let life = actix_rt::spawn(context.into_future(Throttle::new(
            setup,
            &ChildId::first("throttle"),
            Fault::default(),
        )));
        Process { throttle, life, gate, senders: Vec::new() }
    }

    /// A process whose senders always have something to send.
    fn join_busy(&mut self) -> Process {
        let mut process = self.join();
        self.work(&mut process, usize::MAX);
        process
    }

    /// Lets `process` send `count` more messages, as fast as it may.
    fn work(&self, process: &mut Process, count: usize) {
        const SENDERS: usize = 16;
        for sender in 0..SENDERS {
            let (gate, sent, start) = (process.gate.clone(), self.sent_ms.clone(), self.start);
            let count = if count == usize::MAX {
                count
            } else {
                count / SENDERS + usize::from(sender < count % SENDERS)
            };
            process.senders.push(actix_rt::spawn(async move {
                for _ in 0..count {
                    gate.pass().await;
                    sent.borrow_mut().push(start.elapsed().as_millis() as u64);
                }
            }));
        }
    }

    /// `postrider rate d RATE`, or `default`.
    fn set_rate(&self, rate_per_s: Option<u32>) {
        self.store.limit("d", LimitChange::Rate(rate_per_s.and_then(NonZeroU32::new)));
    }

    async fn until(&self, second: u64) {
        tokio::time::sleep_until(self.start + Duration::from_secs(second)).await;
    }

    fn sent_within(&self, from_ms: u64, to_ms: u64) -> usize {
        self.sent_ms.borrow().iter().filter(|&&at| (from_ms..to_ms).contains(&at)).count()
    }

    /// Messages in each second from the start.
    fn by_second(&self, seconds: u64) -> Vec<usize> {
        (0..seconds).map(|second| self.sent_within(second * 1000, second * 1000 + 1000)).collect()
    }

    /// The most messages in any stretch of a second.
    fn most_in_a_second(&self) -> usize {
        let sent = self.sent_ms.borrow();
        let end = |from: usize| sent.partition_point(|&at| at < sent[from] + 1000);
        (0..sent.len()).map(|from| end(from) - from).max().unwrap_or(0)
    }
}

impl Process {
    /// `kill -9`.
    fn kill(self) {
        self.life.abort();
        for sender in self.senders {
            sender.abort();
        }
    }
}

#[actix::test]
async fn three_processes_keep_the_rate_while_one_is_killed_and_one_joins() {
    let mut world = World::new(300, 30);
    let first = world.join_busy();
    let _second = world.join_busy();
    world.until(5).await;
    let _third = world.join_busy();
    world.until(15).await;
    first.kill();
    world.until(30).await;
    let _fourth = world.join_busy();
    world.until(45).await;
    let (by_second, most) = (world.by_second(45), world.most_in_a_second());
    assert!(most <= 300, "{most} in some second; {by_second:?}");
    for (second, &count) in by_second.iter().enumerate() {
        let settling = [(0, 2), (5, 3), (15, 8), (30, 3)]
            .iter()
            .any(|&(from, for_s)| (from..from + for_s).contains(&second));
        assert!(settling || count >= 270, "second {second}: {by_second:?}");
    }
}

#[actix::test]
async fn what_was_saved_up_by_all_is_one_burst() {
    let mut world = World::new(1_000, 60);
    let mut processes = [world.join(), world.join(), world.join()];
    for process in &mut processes {
        world.work(process, 2_000);
    }
    world.until(10).await;
    assert_eq!(world.sent_within(0, 9_000), 6_000, "{:?}", world.by_second(10));
    for process in &mut processes {
        world.work(process, 2_000);
    }
    world.until(20).await;
    assert_eq!(world.sent_within(0, 20_000), 12_000);
    let at_once = world.sent_within(10_000, 10_002);
    assert!((4..=63).contains(&at_once), "{at_once} at once");
    assert!(world.most_in_a_second() <= 1_060, "{}", world.most_in_a_second());
}

#[actix::test]
async fn a_busy_process_gets_what_idle_ones_leave() {
    let mut world = World::new(300, 3);
    let _busy = world.join_busy();
    let (mut idle, mut other) = (world.join(), world.join());
    for second in 1..=20 {
        world.until(second).await;
        world.work(&mut idle, 2);
        world.work(&mut other, 2);
    }
    let by_second = world.by_second(20);
    // The busy one sees the others after 5 s at most; what they want is known some renewals later.
    assert!(by_second[13..].iter().all(|count| (270..=303).contains(count)), "{by_second:?}");
}

#[actix::test]
async fn a_drain_gives_the_share_to_the_others_at_once() {
    let mut world = World::new(300, 3);
    let first = world.join_busy();
    let _second = world.join_busy();
    world.until(10).await;
    first.throttle.send(Drain).await.unwrap();
    first.life.await.unwrap();
    assert!(world.start.elapsed() < Duration::from_millis(10_100), "the table was there at once");
    let leases = world.table.load("d").await.unwrap().leases;
    assert_eq!(leases.iter().map(|lease| &lease.process).collect::<Vec<_>>(), ["vm2-1"]);
    world.until(13).await;
    let by_second = world.by_second(13);
    assert!(by_second[12] >= 290, "{by_second:?}");
    assert!(world.most_in_a_second() <= 303, "{by_second:?}");
}

#[actix::test]
async fn without_the_table_the_gate_closes_and_opens_again() {
    let mut world = World::new(300, 30);
    let process = world.join_busy();
    world.until(5).await;
    world.table.set_down(true);
    world.until(20).await;
    let closed_ms = 5_000 + lease(1).as_millis() as u64;
    assert!(world.sent_within(5_000, 8_000) > 800, "a lease outlasts a short outage");
    assert_eq!(world.sent_within(closed_ms, 20_000), 0);
    world.table.set_down(false);
    world.until(23).await;
    let by_second = world.by_second(23);
    assert!(by_second[22] >= 290, "{by_second:?}");
    assert!(world.most_in_a_second() <= 303, "nothing was saved up while it was closed: {by_second:?}");
    // Without other processes a drain ends too.
    world.table.set_down(true);
    process.throttle.send(Drain).await.unwrap();
    process.life.await.unwrap();
    assert_eq!(process.gate.unserved(), 16, "the messages wait");
}

#[actix::test]
async fn alone_a_renewal_is_one_write_and_idle_it_costs_nothing() {
    let mut world = World::new(1_000, 10);
    let mut process = world.join();
    world.until(10).await;
    assert_eq!(world.table.calls(), (0, 0), "nobody has asked for anything");
    world.work(&mut process, 5_000);
    world.until(60).await;
    assert_eq!(world.sent_within(0, 60_000), 5_000);
    let (reads, writes) = world.table.calls();
    assert_eq!(reads, 1);
    // 5 s of work, 10 s without, the release.
    assert!((4..=6).contains(&writes), "{writes}");
    let before = world.table.calls();
    world.until(120).await;
    assert_eq!(world.table.calls(), before);
    world.work(&mut process, 100);
    world.until(122).await;
    assert_eq!(world.sent_within(120_000, 122_000), 100);
}

#[actix::test]
async fn a_throttle_that_is_restarted_takes_its_lease_over() {
    let mut world = World::new(300, 3);
    let first = world.join_busy();
    world.until(5).await;
    first.life.abort();
    world.joined -= 1;
    let mut again = world.join();
    world.work(&mut again, usize::MAX);
    world.until(8).await;
    let by_second = world.by_second(8);
    assert!(by_second[6] >= 290 && world.most_in_a_second() <= 303, "{by_second:?}");
}

#[actix::test]
async fn a_rate_that_is_set_holds_for_all_within_a_second_and_is_used_soon() {
    let mut world = World::new(300, 30);
    let _processes = [world.join_busy(), world.join_busy(), world.join_busy()];
    world.until(10).await;
    world.set_rate(Some(30));
    world.until(20).await;
    world.set_rate(Some(600));
    world.until(30).await;
    world.set_rate(None);
    world.until(45).await;
    let by_second = world.by_second(45);
    assert!(by_second[11..20].iter().all(|&count| count <= 30), "lowered: {by_second:?}");
    assert!(by_second[14..20].iter().all(|&count| count >= 26), "lowered: {by_second:?}");
    assert!(by_second[20..30].iter().all(|&count| count <= 600), "raised: {by_second:?}");
    assert!(by_second[24..30].iter().all(|&count| count >= 540), "raised: {by_second:?}");
    assert!(by_second[31..].iter().all(|&count| count <= 300), "as configured: {by_second:?}");
    assert!(by_second[35..].iter().all(|&count| count >= 270), "as configured: {by_second:?}");
}

#[actix::test]
async fn a_rate_may_be_set_where_the_configuration_has_none() {
    let mut world = World::new(0, 30);
    let mut process = world.join();
    world.work(&mut process, 1_000);
    world.until(1).await;
    assert_eq!(world.sent_within(0, 1_000), 1_000, "nothing limits it");
    world.set_rate(Some(50));
    world.until(2).await;
    world.work(&mut process, 1_000);
    world.until(7).await;
    let limited = world.sent_within(2_000, 7_000);
    // It begins with the first lease.
    assert!((200..=250).contains(&limited), "{limited} in 5 s");
    world.set_rate(None);
    world.until(8).await;
    assert_eq!(world.sent_within(0, 8_000), 2_000, "nothing limits it any more");
}
