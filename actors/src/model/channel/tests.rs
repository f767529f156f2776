//! The shows of issue 11 about the queue, played through: a store that is a set of batches, a queue that is a list of
//! entries, and workers that claim.

use super::*;

const WALL: u64 = 1_700_000_000_000;

const LIMITS: TransportLimits = TransportLimits {
    entries: 10,
    delay: Duration::from_mins(15),
    hidden: Duration::from_hours(12),
    keeps_order: false,
};

fn id(number: u32) -> BatchId {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&number.to_be_bytes());
    BatchId(id)
}

fn due(number: u32, origin: Origin) -> DueBatch {
    DueBatch { id: id(number), destination: "d".into(), lane: 0, open: 500, due: UnixMs(WALL), origin }
}

struct Entry {
    hint: Hint,
    visible_at: u64,
}

/// One destination, and the processes at its queue.
struct World {
    now: u64,
    processes: Vec<Channel>,
    /// Due and not claimed. Process 0 has appended them.
    unclaimed: BTreeMap<u32, Origin>,
    queue: Vec<Entry>,
    sent: HashMap<BatchId, u32>,
    claimed: usize,
    depth_works: bool,
    depth_calls: usize,
    handles: HashMap<Handle, Hint>,
}

impl World {
    fn new(processes: usize, batches: u32) -> Self {
        Self {
            now: 1_000,
            processes: (0..processes).map(|_| Channel::new(LIMITS)).collect(),
            unclaimed: (0..batches).map(|number| (number, Origin::Fresh)).collect(),
            queue: Vec::new(),
            sent: HashMap::new(),
            claimed: 0,
            depth_works: true,
            depth_calls: 0,
            handles: HashMap::new(),
        }
    }

    fn wall(&self) -> UnixMs {
        UnixMs(WALL + self.now)
    }

    fn visible(&self) -> usize {
        self.queue.iter().filter(|entry| entry.visible_at <= self.now).count()
    }

    fn step(&mut self, process: usize, wanted: usize, delay: Duration) {
        let (now, wall) = (MonoMs(self.now), self.wall());
        let channel = &mut self.processes[process];
        channel.ask(&"w".into(), usize::MAX, wanted, now);
        channel.give_back(now, false);
        if let Some(Listing { limit: asked, confirm }) = channel.to_list(now, delay) {
            assert!(confirm.len() <= CONFIRM_MAX);
            let seen = |origin| if process == 0 { origin } else { Origin::Found };
            let found = self.unclaimed.iter().take(asked);
            let found: Vec<_> = found.map(|(number, origin)| due(*number, seen(*origin))).collect();
            channel.listed(&found, asked, delay, now, wall);
        }
        while let Some((entries, delay)) = channel.take_sends(now) {
            for entry in entries {
                *self.sent.entry(entry.hint.batch).or_default() += 1;
                let visible_at = self.now + delay.as_millis() as u64;
                self.queue.push(Entry { hint: entry.hint, visible_at });
            }
        }
        if channel.wants_depth(now) {
            self.depth_calls += 1;
            let visible = self.queue.iter().filter(|entry| entry.visible_at <= now.0).count() as u64;
            let delayed = self.queue.len() as u64 - visible;
            let depth = QueueDepth { visible, in_flight: 0, delayed };
            channel.depth_read(self.depth_works.then_some(depth), now);
        }
        while !channel.take_deletes(now, true).is_empty() {}
        for (handle, hidden) in channel.take_hides(now) {
            let hint = self.handles[&handle];
            self.queue.push(Entry { hint, visible_at: self.now + hidden.as_millis() as u64 });
        }
    }

    /// A worker receives and claims one batch, if there is an entry.
    fn claim_one(&mut self, process: usize) -> Option<Stocked> {
        let (now, wall) = (MonoMs(self.now), self.wall());
        let channel = &mut self.processes[process];
        if channel.to_receive(now) > 0
            && let Some(at) = self.queue.iter().position(|entry| entry.visible_at <= self.now)
        {
            let hint = self.queue.remove(at).hint;
            let handle = Handle(format!("{}", self.handles.len()).into());
            self.handles.insert(handle.clone(), hint);
            channel.received(vec![Received { hint, handle }], now, wall);
        }
        let stocked = channel.take(1, "w", now).pop()?;
        let number = u32::from_be_bytes(stocked.hint.batch.0[..4].try_into().unwrap());
        let granted = self.unclaimed.remove(&number).is_some();
        self.claimed += usize::from(granted);
        let outcome = if granted { Claimed::Granted } else { Claimed::Refused };
        channel.claimed(stocked.clone(), outcome, now);
        Some(stocked)
    }

    fn most_sent(&self) -> u32 {
        self.sent.values().copied().max().unwrap_or(0)
    }
}

/// 2,000 batches of 500 behind 100/s: one batch in five seconds, almost three hours.
#[test]
fn a_million_rows_behind_100_per_second_send_each_hint_once() {
    let mut world = World::new(1, 2_000);
    while !world.unclaimed.is_empty() {
        world.step(0, 3, Duration::ZERO);
        if world.now.is_multiple_of(5_000) {
            world.claim_one(0);
        }
        assert!(world.visible() <= SPARE, "shallow");
        world.now += 1_000;
        assert!(world.now < 11_000_000, "{} are left", world.unclaimed.len());
    }
    assert_eq!((world.sent.len(), world.most_sent()), (2_000, 1));
    assert!(world.depth_calls < 6_000, "one look in some seconds: {}", world.depth_calls);
}

#[test]
fn three_machines_at_one_backlog_send_each_hint_at_most_twice() {
    let mut world = World::new(3, 2_000);
    let mut turn = 0;
    while !world.unclaimed.is_empty() {
        for process in 0..3 {
            world.step(process, 6, Duration::ZERO);
        }
        if world.now.is_multiple_of(2_000) {
            turn = (turn + 1) % 3;
            world.claim_one(turn);
        }
        assert!(world.visible() <= 3 * SPARE, "shallow");
        world.now += 500;
        assert!(world.now < 11_000_000, "{} are left", world.unclaimed.len());
    }
    assert!(world.most_sent() <= 2, "{}", world.most_sent());
    let sent: u32 = world.sent.values().sum();
    assert!(sent < 2_200, "{sent}");
}

fn drain(world: &mut World, limit: u64) {
    let until = world.now + limit;
    while !world.unclaimed.is_empty() {
        world.step(0, 5, Duration::ZERO);
        world.claim_one(0);
        world.now += 100;
        assert!(world.now < until, "{} are left", world.unclaimed.len());
    }
}

#[test]
fn what_the_queue_loses_goes_out_again() {
    let mut world = World::new(1, 200);
    for round in 1..=3 {
        world.step(0, 5, Duration::ZERO);
        assert_eq!(world.queue.len(), SPARE, "round {round}");
        world.queue.clear();
        world.now += 60_000;
        world.step(0, 5, Duration::ZERO);
    }
    world.queue.clear();
    drain(&mut world, 300_000);
    assert!(world.most_sent() <= 5);
    assert!(world.sent.values().filter(|times| **times > 1).count() <= SPARE, "nothing else is sent again");
}

#[test]
fn an_unknown_depth_sends_nothing_again() {
    let mut world = World::new(1, 40);
    world.step(0, 5, Duration::ZERO);
    world.queue.clear();
    world.depth_works = false;
    for _ in 0..1_000 {
        world.now += 1_000;
        world.step(0, 5, Duration::ZERO);
    }
    assert_eq!((world.sent.len(), world.most_sent()), (SPARE, 1));
    assert!((100..210).contains(&world.depth_calls), "one look in five seconds: {}", world.depth_calls);
    world.depth_works = true;
    drain(&mut world, 300_000);
}

/// S2.1 and S2.10: one message per batch is the seed's way, and its count of calls.
#[test]
fn s2_1_a_thousand_batches_take_a_hundred_sends() {
    let mut world = World::new(1, 1_000);
    let mut calls = 0;
    while !world.unclaimed.is_empty() {
        let (now, wall) = (MonoMs(world.now), world.wall());
        let channel = &mut world.processes[0];
        channel.ask(&"w".into(), 12, 12, now);
        channel.brought(1);
        if let Some(Listing { limit: asked, .. }) = channel.to_list(now, Duration::ZERO) {
            let found = world.unclaimed.keys().take(asked);
            let found: Vec<_> =
                found.map(|number| DueBatch { open: 1, ..due(*number, Origin::Fresh) }).collect();
            channel.listed(&found, asked, Duration::ZERO, now, wall);
        }
        while let Some((entries, _)) = channel.take_sends(now) {
            calls += 1;
            let visible_at = world.now;
            world.queue.extend(entries.iter().map(|entry| Entry { hint: entry.hint, visible_at }));
        }
        for _ in 0..world.now % 4 {
            world.claim_one(0);
        }
        world.now += 1;
        assert!(world.now < 20_000, "{} are left", world.unclaimed.len());
    }
    assert!((100..=103).contains(&calls), "{calls}");
}

/// Paused for longer than the queue keeps anything.
#[test]
fn a_destination_that_is_paused_past_the_queue_s_retention_loses_nothing() {
    let mut world = World::new(1, 50);
    world.step(0, 5, Duration::ZERO);
    world.processes[0].hold(true);
    world.queue.clear();
    for _ in 0..1_000 {
        world.now += 60_000;
        world.step(0, 5, Duration::ZERO);
        assert!(world.claim_one(0).is_none());
    }
    assert!(world.queue.is_empty(), "nothing is sent");
    world.processes[0].hold(false);
    drain(&mut world, 300_000);
}

#[test]
fn a_restart_asks_for_the_depth_before_it_sends_what_it_finds() {
    let mut world = World::new(1, 60);
    world.step(0, 5, Duration::ZERO);
    // The same process, in its next life.
    world.processes = vec![Channel::new(LIMITS)];
    world.unclaimed.values_mut().for_each(|origin| *origin = Origin::Found);
    world.depth_works = false;
    for _ in 0..50 {
        world.step(0, 5, Duration::ZERO);
        world.now += 1_000;
    }
    assert_eq!(world.queue.len(), SPARE, "an unknown depth sends nothing");
    world.depth_works = true;
    for _ in 0..50 {
        world.step(0, 5, Duration::ZERO);
        world.now += 1_000;
    }
    assert_eq!(world.queue.len(), SPARE, "all that was found may be there already, as far as it goes");
    drain(&mut world, 300_000);
    assert!(world.most_sent() <= 2);
}

#[test]
fn what_an_earlier_life_holds_is_claimed_without_an_entry() {
    let mut world = World::new(1, 2);
    world.unclaimed.insert(0, Origin::Mine);
    world.step(0, 5, Duration::ZERO);
    let mine = world.claim_one(0).expect("it is in stock");
    assert_eq!((mine.hint.batch, mine.handle), (id(0), None));
    assert_eq!(world.claim_one(0).map(|stocked| stocked.hint.batch), Some(id(1)), "by its entry");
    assert_eq!((world.sent.len(), world.claimed), (1, 2));
}

#[test]
fn s2_3_a_delay_holds_entries_back_and_is_no_rate_limit() {
    let mut world = World::new(1, 500);
    let delay = Duration::from_secs(30);
    for _ in 0..60 {
        world.step(0, 5, delay);
        world.now += 100;
    }
    assert_eq!((world.queue.len(), world.visible()), (500, 0), "more than a window's worth");
    world.now += 30_000;
    assert_eq!(world.visible(), 500);
    assert!(world.queue.iter().all(|entry| entry.hint.due >= UnixMs(WALL + 31_000)));
    drain(&mut world, 300_000);
    assert_eq!(world.most_sent(), 1);
}

#[test]
fn s2_5_what_comes_too_early_is_hidden_until_it_is_due() {
    let mut channel = Channel::new(LIMITS);
    channel.ask(&"w".into(), usize::MAX, 5, MonoMs(0));
    let entry = |number, after: u64| Received {
        hint: Hint { batch: id(number), due: UnixMs(WALL + after) },
        handle: Handle(number.to_string().into()),
    };
    let entries = vec![entry(1, 0), entry(2, 1_500), entry(3, 4_000), entry(4, u64::MAX / 2)];
    assert!(channel.received(entries, MonoMs(0), UnixMs(WALL)));
    let hides = channel.take_hides(MonoMs(0));
    assert_eq!(hides.len(), 2);
    assert_eq!(hides[0], (Handle("3".into()), Duration::from_secs(4)));
    assert_eq!(hides[1], (Handle("4".into()), LIMITS.hidden), "as long as it can be");
    assert_eq!(channel.take(9, "w", MonoMs(0)).len(), 1);
    assert_eq!(channel.take(9, "w", MonoMs(1_500)).len(), 1, "it was worth waiting for");
    assert!(channel.take_deletes(MonoMs(9_999), true).is_empty(), "neither was claimed");
}

#[test]
fn an_entry_is_deleted_when_its_claim_is_answered_and_in_order_when_its_lease_ends() {
    for keeps_order in [false, true] {
        let mut channel = Channel::new(TransportLimits { keeps_order, ..LIMITS });
        channel.ask(&"w".into(), usize::MAX, 5, MonoMs(0));
        let entries = (1..=3).map(|number| Received {
            hint: Hint { batch: id(number), due: UnixMs(WALL) },
            handle: Handle(number.to_string().into()),
        });
        channel.received(entries.collect(), MonoMs(0), UnixMs(WALL));
        let taken = channel.take(9, "w", MonoMs(0));
        let [granted, refused, unanswered] = <[_; 3]>::try_from(taken).unwrap();
        let mut kept = Vec::new();
        kept.extend(channel.claimed(granted, Claimed::Granted, MonoMs(0)));
        kept.extend(channel.claimed(refused, Claimed::Refused, MonoMs(0)));
        channel.put_back(vec![unanswered], &"w".into());
        assert_eq!(kept.len(), usize::from(keeps_order));
        assert!(channel.take_deletes(MonoMs(999), false).is_empty(), "it waits for others");
        assert_eq!(channel.take_deletes(MonoMs(1_000), false).len(), 2 - usize::from(keeps_order));
        assert!(channel.take(9, "v", MonoMs(999)).is_empty(), "it may be the other's");
        assert_eq!(channel.take(9, "w", MonoMs(1_000)).len(), 1, "asked again");
    }
}

#[test]
fn what_no_worker_takes_is_given_back() {
    let mut channel = Channel::new(LIMITS);
    channel.ask(&"w".into(), usize::MAX, 5, MonoMs(0));
    let hint = Hint { batch: id(1), due: UnixMs(WALL) };
    channel.received(vec![Received { hint, handle: Handle("1".into()) }], MonoMs(0), UnixMs(WALL));
    channel.give_back(MonoMs(3_999), false);
    assert!(channel.take_hides(MonoMs(3_999)).is_empty());
    channel.give_back(MonoMs(4_000), false);
    assert_eq!(channel.take_hides(MonoMs(4_000)), [(Handle("1".into()), Duration::ZERO)]);
    assert_eq!(channel.to_receive(MonoMs(4_000)), 0, "nobody has asked for a while");
}

#[test]
fn a_doubled_entry_is_claimed_once_and_both_are_deleted() {
    let mut channel = Channel::new(LIMITS);
    channel.ask(&"w".into(), usize::MAX, 5, MonoMs(0));
    let hint = Hint { batch: id(1), due: UnixMs(WALL) };
    let twice = ["1", "2"].map(|handle| Received { hint, handle: Handle(handle.into()) });
    channel.received(twice.into(), MonoMs(0), UnixMs(WALL));
    let mut taken = channel.take(9, "w", MonoMs(0));
    assert_eq!(taken.len(), 1);
    channel.claimed(taken.remove(0), Claimed::Granted, MonoMs(0));
    assert_eq!(channel.take_deletes(MonoMs(0), true).len(), 2);
}

/// A missing permission, for example.
#[test]
fn a_call_that_fails_backs_off_alone_and_says_so_once() {
    let mut world = World::new(1, 50);
    let channel = &mut world.processes[0];
    assert!(channel.failed(Call::Delete, MonoMs(0), 0.9));
    let mut waits = Vec::new();
    let mut now = MonoMs(0);
    for _ in 0..20 {
        assert!(!channel.failed(Call::Delete, now, 0.9));
        let until = channel.failing[Call::Delete as usize].until;
        assert!(!channel.may(Call::Delete, MonoMs(until.0 - 1)) && channel.may(Call::Delete, until));
        waits.push(until.since(now));
        now = until;
    }
    assert!(waits.is_sorted() && waits[19] <= BACKOFF.cap, "{waits:?}");
    for call in [Call::Send, Call::Receive, Call::Hide, Call::Depth] {
        assert!(channel.may(call, now));
    }
    assert!(channel.worked(Call::Delete) && !channel.worked(Call::Delete));
}

#[test]
fn what_is_not_sent_is_listed_again_and_an_unknown_outcome_is_left_to_the_depth() {
    let mut world = World::new(1, 1);
    let channel = &mut world.processes[0];
    channel.ask(&"w".into(), usize::MAX, 5, MonoMs(1_000));
    let list = |channel: &mut Channel, now| {
        let asked = channel.to_list(MonoMs(now), Duration::ZERO).map_or(0, |listing| listing.limit);
        channel.listed(&[due(0, Origin::Fresh)], asked, Duration::ZERO, MonoMs(now), UnixMs(WALL));
        channel.take_sends(MonoMs(now))
    };
    assert!(list(channel, 1_000).is_some());
    channel.unsent(id(0));
    assert!(list(channel, 1_100).is_some(), "it was refused");
    channel.doubt();
    assert!(channel.wants_depth(MonoMs(1_200)));
    channel.depth_read(Some(QueueDepth { visible: 1, in_flight: 0, delayed: 0 }), MonoMs(1_200));
    assert_eq!(list(channel, 1_300), None, "it is there");
    channel.doubt();
    assert!(!channel.wants_depth(MonoMs(1_300)) && channel.wants_depth(MonoMs(2_200)));
    channel.depth_read(Some(QueueDepth::default()), MonoMs(2_200));
    assert!(list(channel, 2_300).is_some(), "it is not");
}
