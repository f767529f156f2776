//! The rules, and a seeded simulation of them: random commands on one record, with what must hold after each.

use std::collections::{BTreeMap, HashMap};

use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::{
    codec::{self, Head},
    *,
};
use crate::model::{
    outcome::{Attempt, DeathCause, Reason, Verdict},
    retry::poisoned,
    state::MessageState,
    suspect::{LOST_REQUESTS_MAX, Pace, is_condemned},
    time::UnixMs,
};

pub(super) const ACCEPTED: UnixMs = UnixMs(1_000_000);

fn attempt(at: u64) -> Attempt {
    Attempt { at: UnixMs(at), status: 503, reason: Reason::Status }
}

fn sent(at: u64) -> Verdict {
    Verdict::Sent { at: UnixMs(at), status: 200 }
}

fn retry(at: u64, not_before: u64) -> Verdict {
    Verdict::Retry { attempt: attempt(at), not_before: UnixMs(not_before) }
}

fn dead(at: u64) -> Verdict {
    Verdict::Dead { attempt: attempt(at), cause: DeathCause::Attempts }
}

fn on(index: u32, attempt: u32, verdict: Verdict) -> MessageVerdict {
    MessageVerdict { index, drive: 0, attempt, verdict }
}

fn settle(record: &mut Record, fence: u64, verdicts: &[MessageVerdict]) -> Changes {
    let details = BTreeMap::new();
    record.settle(Standing { fence, verdicts, details: &details, ends: false, begins: None }).unwrap()
}

/// A record that is leased under fence 1.
fn leased(count: u32) -> Record {
    let mut record = Record::new(count, ACCEPTED, ACCEPTED);
    assert_eq!(record.lease("w", Deadline(10), Deadline(0), ACCEPTED, UnixMs(0)), Grant::Granted);
    record
}

#[test]
fn only_an_earlier_start_on_the_same_node_is_gone() {
    assert!(is_earlier_life("node-a-9/delivery-0#7", "node-a-10/delivery-1#1"));
    assert!(
        !is_earlier_life("node-a-10/w#1", "node-a-10/w#2"),
        "a worker's own supervisor says when it is gone"
    );
    assert!(!is_earlier_life("node-a-10/w#1", "node-a-9/w#1"));
    assert!(!is_earlier_life("node-b-9/w#1", "node-a-10/w#1"));
    assert!(!is_earlier_life("w-1", "w-2"));
    assert!(!is_earlier_life("node-x/w", "node-10/w"));
}

#[test]
fn a_lease_is_for_who_comes_first_and_for_what_is_due() {
    let mut record = Record::new(2, ACCEPTED, ACCEPTED);
    let early = UnixMs(ACCEPTED.0 - 1);
    assert_eq!(
        record.lease("a", Deadline(10), Deadline(0), early, UnixMs(0)),
        Grant::Early { due: ACCEPTED }
    );
    assert_eq!((record.fence, &record.holder), (0, &None));
    assert_eq!(record.lease("a", Deadline(10), Deadline(0), ACCEPTED, UnixMs(0)), Grant::Granted);
    assert_eq!(
        record.lease("b", Deadline(20), Deadline(10), ACCEPTED, UnixMs(0)),
        Grant::Held { until: Deadline(10) }
    );
    // Its first answer was lost: the same fence, and no deadline moves back.
    assert_eq!(record.lease("a", Deadline(5), Deadline(0), ACCEPTED, UnixMs(0)), Grant::Granted);
    assert_eq!((record.fence, record.losses), (1, 0));
    assert_eq!(record.holder.as_ref().map(|holder| holder.until), Some(Deadline(10)));
    // It has run out: lost, due or not.
    settle(&mut record, 1, &[on(0, 1, retry(1, u64::MAX)), on(1, 1, sent(1))]);
    assert_eq!(record.lease("b", Deadline(30), Deadline(11), ACCEPTED, UnixMs(0)), Grant::Granted);
    assert_eq!((record.fence, record.losses), (2, 1));
    assert!(!record.extend(1, Deadline(99)) && !record.release(1), "the old one is over");
    assert!(record.release(2) && !record.release(2));
    assert_eq!(
        record.lease("c", Deadline(40), Deadline(31), ACCEPTED, UnixMs(0)),
        Grant::Early { due: UnixMs(u64::MAX) }
    );
    settle(&mut record, 1, &[on(0, 1, sent(9))]);
    assert_eq!(record.lease("c", Deadline(40), Deadline(31), ACCEPTED, UnixMs(0)), Grant::Settled);
}

#[test]
fn an_earlier_life_of_the_same_process_has_lost_its_lease_at_once() {
    let mut record = Record::new(1, ACCEPTED, ACCEPTED);
    record.lease("node-a-7/w#1", Deadline(u64::MAX), Deadline(0), ACCEPTED, UnixMs(0));
    let ask =
        |record: &mut Record, asks: &str| record.lease(asks, Deadline(1), Deadline(0), ACCEPTED, UnixMs(0));
    assert!(matches!(ask(&mut record, "node-a-6/w#1"), Grant::Held { .. }));
    assert!(matches!(ask(&mut record, "node-b-8/w#1"), Grant::Held { .. }));
    assert_eq!(ask(&mut record, "node-a-8/w#1"), Grant::Granted);
    assert_eq!((record.fence, record.losses), (2, 1));
}

/// What was recorded before it must not cost another loss without evidence: I5.
#[test]
fn b17_a_suspect_that_was_charged_is_marked_again_at_once() {
    let mut record = leased(2);
    record.losses = 2;
    let details = BTreeMap::new();
    let verdicts = [on(0, 1, sent(1))];
    let standing =
        Standing { fence: 1, verdicts: &verdicts, details: &details, ends: false, begins: Some(1) };
    record.settle(standing).unwrap();
    assert_eq!((record.losses, record.begun), (0, Some(1)));
    record.lose();
    assert_eq!(Pace::of(record.losses), Pace::AloneMarked);
    assert_eq!(record.exceptions[&1].losses_alone, 1);
}

#[test]
fn b5_only_the_next_attempt_of_the_current_drive_fails_and_only_under_the_current_fence() {
    let mut record = leased(2);
    let before = record.clone();
    let others = [on(0, 0, dead(5)), on(0, 2, retry(5, 9)), MessageVerdict { drive: 1, ..on(0, 1, dead(5)) }];
    let changes = settle(&mut record, 1, &others);
    assert_eq!((&record, changes), (&before, Changes { was_current: true, ..Changes::default() }));
    let changes = settle(&mut record, 7, &[on(0, 1, dead(5)), on(1, 1, retry(5, 9))]);
    assert_eq!((&record, changes), (&before, Changes::default()));
    // Two of them in one word, in their order.
    let changes = settle(&mut record, 1, &[on(0, 1, retry(5, 6)), on(0, 2, dead(7))]);
    let failures: Vec<_> =
        changes.failures.iter().map(|failed| (failed.attempt_number, failed.attempt.at.0)).collect();
    assert_eq!(failures, [(1, 5), (2, 7)]);
    assert_eq!((changes.died, changes.last_at), (vec![0], Some(UnixMs(7))));
    assert_eq!(record.fate(0).unwrap().tries, 2);
}

#[test]
fn i2_a_2xx_is_taken_from_anybody_and_only_once() {
    let mut record = leased(3);
    settle(&mut record, 1, &[on(0, 1, retry(5, 6)), on(1, 1, dead(5))]);
    for _ in 0..2 {
        // Under a fence that never was, of an attempt that nobody knows.
        settle(&mut record, 99, &[on(0, 7, sent(ACCEPTED.0 + 8)), on(1, 1, sent(ACCEPTED.0 + 9))]);
        assert_eq!(record.fate(0).unwrap().sent, Some((200, UnixMs(ACCEPTED.0 + 8))));
        assert_eq!(record.fate(0).unwrap().tries, 7, "an answer is proof that it was made");
        let raised = record.fate(1).unwrap();
        assert_eq!((raised.state, raised.death, raised.not_before), (MessageState::Sent, None, None));
    }
    assert!(record.exceptions.is_empty(), "nothing is left to say of them");
    let later = settle(&mut record, 1, &[on(0, 8, dead(9)), on(0, 8, retry(9, 9))]);
    assert!(later.counts.is_zero() && later.failures.is_empty());
}

#[test]
fn a_redrive_touches_the_dead_and_nothing_else() {
    let mut record = leased(4);
    settle(&mut record, 1, &[on(0, 1, dead(5)), on(1, 1, retry(5, 6)), on(2, 1, sent(5)), on(3, 1, dead(5))]);
    let before = record.clone();
    let changes = record.redrive([0, 1, 2, 9], UnixMs(77));
    assert_eq!((changes.rose, changes.counts.dead, changes.counts.retrying), (vec![0], -1, 1));
    assert_eq!((record.fence, &record.holder), (before.fence, &before.holder), "B6");
    for index in [1, 2, 3] {
        assert_eq!(record.fate(index), before.fate(index));
    }
    let fate = record.fate(0).unwrap();
    assert_eq!((fate.state, fate.drive, fate.tries), (MessageState::Retrying, 1, 0));
    assert_eq!((fate.accepted_at, fate.not_before, fate.death), (UnixMs(77), Some(ACCEPTED), None));
    assert_eq!(record.accepted_at, ACCEPTED, "B1: times of sending are offsets to it");
    // A verdict on the previous drive does not count for this one.
    assert!(settle(&mut record, 1, &[on(0, 1, dead(8))]).failures.is_empty());
    let next = MessageVerdict { drive: 1, ..on(0, 1, retry(8, 9)) };
    assert_eq!(settle(&mut record, 1, &[next]).failures.len(), 1);
    assert_eq!(record.redrive(0..4, UnixMs(78)).rose, [3]);
    assert!(record.redrive(0..4, UnixMs(79)).rose.is_empty());
}

#[test]
fn what_a_destination_says_is_kept_in_bounds() {
    let mut record = leased(1_000);
    let long = |index: u32| format!("{index:04}{}", "ü".repeat(DETAIL_BYTES_MAX));
    let details: BTreeMap<u32, Box<str>> = (0..1_000).map(|index| (index, long(index).into())).collect();
    let verdicts: Vec<_> = (0..1_000).map(|index| on(index, 1, dead(5))).collect();
    let standing = Standing { fence: 1, verdicts: &verdicts, details: &details, ends: false, begins: None };
    assert_eq!(record.settle(standing).unwrap().died.len(), 1_000);
    let kept: Vec<_> = (0..1_000).filter_map(|index| record.fate(index)?.death?.detail).collect();
    assert!(kept.iter().all(|detail| detail.len() == DETAIL_BYTES_MAX));
    assert!(kept.len() > 100 && kept.len() * DETAIL_BYTES_MAX <= 64 * 1024, "{}", kept.len());
    // DynamoDB: 400 KB an item (B3).
    assert!(codec::encode(&record).len() < 200_000);
}

#[test]
fn what_a_destination_says_of_many_messages_is_stored_once() {
    let mut record = leased(1_000);
    let details: BTreeMap<u32, Box<str>> = (0..1_000)
        .map(|index| (index, if index % 10 == 0 { "gone" } else { "no such user" }.into()))
        .collect();
    let verdicts: Vec<_> = (0..1_000).map(|index| on(index, 1, dead(5))).collect();
    let bare = {
        let mut record = leased(1_000);
        let none = BTreeMap::new();
        let standing = Standing { fence: 1, verdicts: &verdicts, details: &none, ends: false, begins: None };
        record.settle(standing).unwrap();
        codec::encode(&record).len()
    };
    let standing = Standing { fence: 1, verdicts: &verdicts, details: &details, ends: false, begins: None };
    record.settle(standing).unwrap();
    assert_eq!(codec::encode(&record).len(), bare + "gone".len() + "no such user".len() + 2);
    round_trip(&record);
    let detail = |index| record.fate(index).unwrap().death.unwrap().detail;
    assert_eq!((detail(990).as_deref(), detail(991).as_deref()), (Some("gone"), Some("no such user")));
}

#[test]
fn an_index_beyond_the_batch_changes_nothing() {
    let mut record = leased(2);
    let before = record.clone();
    let details = BTreeMap::new();
    for (verdicts, begins) in
        [(vec![on(0, 1, sent(1)), on(2, 1, sent(1))], None), (vec![on(0, 1, sent(1))], Some(2))]
    {
        let standing = Standing { fence: 1, verdicts: &verdicts, details: &details, ends: true, begins };
        assert_eq!(record.settle(standing), Err(Rejected { index: 2, messages: 2 }));
        assert_eq!(record, before);
    }
}

/// One record, what its store keeps beside it, and the verdicts it was given.
struct World {
    rng: SmallRng,
    seed: u64,
    now: u64,
    record: Record,
    /// Kept by the changes alone, as a store does it.
    counts: CountChange,
    history: Vec<Vec<u8>>,
    failures: Vec<Failure>,
    /// The leases that were granted: holder and deadline by fence.
    granted: BTreeMap<u64, (String, u64)>,
    reported_sent: Vec<bool>,
    /// What was said, to be said again.
    words: Vec<(u64, Vec<MessageVerdict>)>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let count = rng.random_range(1..7);
        Self {
            seed,
            now: ACCEPTED.0,
            record: Record::new(count, ACCEPTED, ACCEPTED),
            counts: CountChange { accepted: count.into(), ..CountChange::default() },
            history: Vec::new(),
            failures: Vec::new(),
            granted: BTreeMap::new(),
            reported_sent: vec![false; count as usize],
            words: Vec::new(),
            rng,
        }
    }

    fn step(&mut self) {
        self.now += self.rng.random_range(0..2_000);
        match self.rng.random_range(0..11) {
            0..=2 => self.lease(),
            3..=6 => self.say(),
            7 => self.repeat(),
            8 => self.end(),
            9 => self.redrive(),
            _ => self.end_open(),
        }
        self.check();
    }

    fn any_fence(&mut self) -> u64 {
        let current = self.record.fence;
        if self.rng.random_bool(0.7) { current } else { self.rng.random_range(0..current + 2) }
    }

    fn lease(&mut self) {
        let asks = ["a-1/w", "a-2/w", "b-1/w", "c"][self.rng.random_range(0..4)];
        let (until, before) = (self.now + self.rng.random_range(0..5_000), self.record.clone());
        let grant = self.record.lease(asks, Deadline(until), Deadline(self.now), UnixMs(self.now), UnixMs(0));
        let holder = before.holder.as_ref();
        let is_gone = holder
            .is_some_and(|holder| holder.until < Deadline(self.now) || is_earlier_life(&holder.name, asks));
        match grant {
            Grant::Granted if self.record.fence == before.fence => {
                assert_eq!(holder.map(|holder| &*holder.name), Some(asks), "seed {}", self.seed);
            }
            Grant::Granted => {
                assert!(holder.is_none() || is_gone, "seed {}: two holders at once", self.seed);
                assert_eq!(self.record.fence, before.fence + 1);
                assert!(self.granted.insert(self.record.fence, (asks.to_owned(), until)).is_none());
            }
            Grant::Held { until } => {
                assert!(!is_gone && until >= Deadline(self.now), "seed {}", self.seed);
                assert_eq!(self.record, before);
            }
            Grant::Early { due } => {
                assert!(due > UnixMs(self.now) && self.record.due() == Some(due));
                assert_eq!(self.record, before);
            }
            Grant::Settled => assert!(before.is_settled() && self.record == before),
        }
    }

    fn say(&mut self) {
        let fence = self.any_fence();
        let mut verdicts = Vec::new();
        for index in 0..self.record.len() {
            // From the last one or the next on; some are skipped, some reported twice, none out of order.
            let mut attempt = u32::from(self.record.tries[index]) + self.rng.random_range(0..2);
            while self.rng.random_bool(0.4) {
                attempt += self.rng.random_range(0..2);
                let drive = self.record.drive(index).saturating_sub(u32::from(self.rng.random_bool(0.1)));
                let verdict = match self.rng.random_range(0..5) {
                    0 => sent(self.now),
                    1 => dead(self.now),
                    _ => retry(self.now, self.now + self.rng.random_range(0..4_000)),
                };
                verdicts.push(MessageVerdict { index: index as u32, drive, attempt, verdict });
            }
        }
        self.settle(fence, &verdicts);
        self.words.push((fence, verdicts));
    }

    fn settle(&mut self, fence: u64, verdicts: &[MessageVerdict]) {
        let ends = self.rng.random_bool(0.1);
        let begins = self.rng.random_bool(0.2).then(|| self.rng.random_range(0..self.record.len() as u32));
        let before = self.record.clone();
        let details = BTreeMap::new();
        let standing = Standing { fence, verdicts, details: &details, ends, begins };
        let changes = self.record.settle(standing).unwrap();
        assert_eq!(changes.was_current, before.is_current(fence));
        if !changes.was_current {
            assert!(changes.failures.is_empty(), "seed {}: B5", self.seed);
            assert_eq!((&self.record.holder, self.record.begun), (&before.holder, before.begun));
        } else if ends || self.record.is_settled() {
            assert_eq!((&self.record.holder, self.record.begun), (&None, None));
        } else {
            assert_eq!(self.record.holder, before.holder);
        }
        for message in verdicts.iter().filter(|message| matches!(message.verdict, Verdict::Sent { .. })) {
            self.reported_sent[message.index as usize] = true;
        }
        self.apply(&before, &changes);
        // B5, whatever else is reported of the lease: repeating the same facts changes nothing.
        let once = self.record.clone();
        let again = Standing { fence, verdicts, details: &details, ends: false, begins: None };
        let changes = self.record.settle(again).unwrap();
        assert!(changes.counts.is_zero() && changes.failures.is_empty(), "seed {}: {changes:?}", self.seed);
        assert!(changes.died.is_empty() && changes.rose.is_empty() && changes.last_at.is_none());
        assert_eq!(self.record, once, "seed {}", self.seed);
    }

    fn apply(&mut self, before: &Record, changes: &Changes) {
        self.counts += changes.counts;
        if !changes.failures.is_empty() {
            self.history.push(codec::encode_history(&changes.failures));
            self.failures.extend(&changes.failures);
        }
        for index in 0..self.record.len() {
            let (was, is) = (before.states.get(index), self.record.states.get(index));
            let is_dead = |state| state == MessageState::Dead;
            let at = index as u32;
            assert!(!changes.died.contains(&at) || !is_dead(was), "seed {}", self.seed);
            assert!(!is_dead(is) || is_dead(was) || changes.died.contains(&at), "seed {}", self.seed);
            assert!(!is_dead(was) || is_dead(is) || changes.rose.contains(&at), "seed {}", self.seed);
        }
    }

    /// What was said once is said again, in any order relative to what came since.
    fn repeat(&mut self) {
        if self.words.is_empty() {
            return;
        }
        let (fence, verdicts) = self.words[self.rng.random_range(0..self.words.len())].clone();
        let before = self.record.clone();
        let details = BTreeMap::new();
        let standing = Standing { fence, verdicts: &verdicts, details: &details, ends: false, begins: None };
        let changes = self.record.settle(standing).unwrap();
        let was_current = before.is_current(fence);
        if !was_current {
            assert!(changes.failures.is_empty(), "seed {}", self.seed);
        }
        // Its 2xx were taken the first time.
        assert_eq!(changes.counts.sent, 0, "seed {}", self.seed);
        // Under a fence that is current still, what was out of turn then may be in turn now.
        self.apply(&before, &changes);
    }

    fn end(&mut self) {
        let (fence, before) = (self.any_fence(), self.record.clone());
        let open: Vec<u32> = self.record.open().map(|index| index as u32).collect();
        match self.rng.random_range(0..4) {
            0 => assert_eq!(self.record.release(fence), before.is_current(fence)),
            1 => assert_eq!(self.record.extend(fence, Deadline(self.now + 9)), before.is_current(fence)),
            2 => self.record.lose(),
            _ => {
                let some: Vec<u32> = open.into_iter().filter(|_| self.rng.random_bool(0.5)).collect();
                self.record.charge(&some, some.len() == 1);
            }
        }
        assert_eq!((self.record.fence, &self.record.states), (before.fence, &before.states));
        assert!(self.record.losses >= before.losses);
    }

    fn redrive(&mut self) {
        let some: Vec<u32> = (0..8).filter(|_| self.rng.random_bool(0.5)).collect();
        let before = self.record.clone();
        let changes = self.record.redrive(some.iter().copied(), UnixMs(self.now));
        for index in 0..before.len() {
            let was_dead = before.states.get(index) == MessageState::Dead;
            let is_redriven = was_dead && some.contains(&(index as u32));
            assert_eq!(changes.rose.contains(&(index as u32)), is_redriven);
            assert_eq!(self.record.fate(index) != before.fate(index), is_redriven, "seed {}", self.seed);
        }
        let lease = |record: &Record| (record.fence, record.holder.clone(), record.begun, record.losses);
        assert_eq!(lease(&self.record), lease(&before), "seed {}: B6", self.seed);
        self.apply(&before, &changes);
    }

    fn end_open(&mut self) {
        let ends = [MessageState::Cancelled, MessageState::Unsent];
        let state = ends[self.rng.random_range(0..ends.len())];
        let before = self.record.clone();
        let changes = self.record.end_open(state, UnixMs(self.now));
        assert!(self.record.is_settled() && self.record.due().is_none(), "seed {}", self.seed);
        let ended = changes.counts.cancelled + changes.counts.unsent;
        assert_eq!(ended, i64::from(before.open_count()), "seed {}", self.seed);
        let is_ended = |index: &usize| self.record.states.get(*index) == state;
        assert!(before.open().all(|index| is_ended(&index)), "seed {}", self.seed);
        let kept = |index: &usize| !before.states.get(*index).is_open();
        for index in (0..before.len()).filter(kept) {
            assert_eq!(self.record.fate(index), before.fate(index), "seed {}", self.seed);
        }
        let lease = |record: &Record| (record.fence, record.holder.clone(), record.begun, record.losses);
        assert_eq!(lease(&self.record), lease(&before), "seed {}: B6", self.seed);
        self.apply(&before, &changes);
    }

    fn check(&self) {
        let (record, seed) = (&self.record, self.seed);
        let states = || (0..record.len()).map(|index| record.states.get(index));
        let count = |is: fn(MessageState) -> bool| states().filter(|&state| is(state)).count();
        let count = |is| i64::try_from(count(is)).unwrap();
        let recount = CountChange {
            accepted: i64::try_from(record.len()).unwrap(),
            sent: count(|state| state >= MessageState::Sent),
            dead: count(|state| state == MessageState::Dead),
            retrying: count(|state| state == MessageState::Retrying),
            unsent: count(|state| state == MessageState::Unsent),
            cancelled: count(|state| state == MessageState::Cancelled),
        };
        assert_eq!(self.counts, recount, "seed {seed}: B8");
        assert_eq!(self.counts.depth(), i64::from(record.open_count()));
        let dues = record.open().map(|index| record.fate(index).unwrap().not_before.unwrap());
        assert_eq!(record.due(), dues.min(), "seed {seed}");
        for index in 0..record.len() {
            let fate = record.fate(index).unwrap();
            assert_eq!(fate.state == MessageState::Sent, self.reported_sent[index], "seed {seed}: I2, I7");
            assert_eq!(fate.sent.is_some(), fate.state == MessageState::Sent);
            assert_eq!(fate.death.is_some(), fate.state == MessageState::Dead, "seed {seed}");
            assert_eq!(fate.not_before.is_some(), fate.state.is_open());
            let chunks = self.history.iter().map(Vec::as_slice);
            let read = codec::failures_of(chunks, index as u32).unwrap();
            let mut kept: Vec<_> =
                self.failures.iter().filter(|failure| failure.index == index as u32).collect();
            kept.sort_by_key(|failure| (failure.drive, failure.attempt_number));
            assert_eq!(read, kept.iter().map(|failure| failure.attempt).collect::<Vec<_>>(), "seed {seed}");
            let of_drive = kept.iter().filter(|failure| failure.drive == fate.drive).count() as u32;
            let is_whole = if fate.sent.is_some() { of_drive <= fate.tries } else { of_drive == fate.tries };
            assert!(is_whole, "seed {seed}: {of_drive} failures, {} tries", fate.tries);
        }
        assert_eq!(record.has_dead(), recount.dead > 0);
        assert_eq!(record.why_kept().is_none(), recount.settled() - recount.dead == recount.accepted);
        assert_eq!(round_trip(record), *record, "seed {seed}");
    }
}

pub(super) fn round_trip(record: &Record) -> Record {
    let head = Head {
        count: record.len() as u32,
        accepted_at: record.accepted_at,
        not_before: record.not_before,
        fence: record.fence,
        holder: record.holder.clone(),
    };
    codec::decode(head, Some(&codec::encode(record))).expect("it reads back")
}

#[test]
fn the_rules_hold_for_any_reports_in_any_order() {
    for seed in 0..400 {
        let mut world = World::new(seed);
        for _ in 0..200 {
            world.step();
        }
    }
}

/// The same facts, in any order, from workers that come and go: I7.
#[test]
fn i7_late_2xx_win_in_any_order() {
    for seed in 0..200 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut facts: Vec<(u64, MessageVerdict)> = Vec::new();
        for index in 0..4 {
            for attempt in 1..4 {
                let verdict = [sent(9), retry(9, 9), dead(9)][rng.random_range(0..3)];
                facts.push((rng.random_range(0..3), on(index, attempt, verdict)));
            }
        }
        let reported_sent: Vec<bool> = (0..4u32)
            .map(|index| {
                let of = facts.iter().filter(|(_, message)| message.index == index);
                of.into_iter().any(|(_, message)| matches!(message.verdict, Verdict::Sent { .. }))
            })
            .collect();
        for _ in 0..10 {
            let mut record = leased(4);
            let mut permuted = facts.clone();
            for at in (1..permuted.len()).rev() {
                permuted.swap(at, rng.random_range(0..=at));
            }
            for (fence, message) in permuted.iter().chain(&facts) {
                settle(&mut record, *fence, &[*message]);
            }
            let is_sent: Vec<_> = (0..4).map(|index| record.fate(index).unwrap().sent.is_some()).collect();
            assert_eq!(is_sent, reported_sent, "seed {seed}");
        }
    }
}

/// A worker's life after another, with a poisonous message or none, and machines that vanish for no reason of their
/// messages. Nothing says what was in flight.
#[test]
fn b17_the_innocent_are_not_condemned_while_progress_is_made() {
    for seed in 0..300 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let count = rng.random_range(1..12u32);
        let poison = rng.random_bool(0.5).then(|| rng.random_range(0..count));
        let mut record = Record::new(count, ACCEPTED, ACCEPTED);
        let mut lost: HashMap<u32, u32> = HashMap::new();
        let mut condemned = Vec::new();
        let group = rng.random_range(1..4);
        // Losses that no message is to blame for: never two in a row without a message recorded between them.
        let mut is_chance_due = rng.random_bool(0.5);
        for life in 1.. {
            assert!(life < 1_000, "seed {seed}: it never finishes");
            match record.lease("w", Deadline(life), Deadline(life), ACCEPTED, UnixMs(0)) {
                Grant::Settled => break,
                grant => assert_eq!(grant, Grant::Granted),
            }
            let fence = record.fence;
            let next = |record: &Record, index: u32, verdict| {
                let tries = u32::from(record.tries[index as usize]);
                MessageVerdict { index, drive: 0, attempt: tries + 1, verdict }
            };
            for index in 0..count {
                let alone = record.exceptions.get(&index).map_or(0, |exception| exception.losses_alone);
                if is_condemned(alone) && record.states.get(index as usize).is_open() {
                    let verdict = next(&record, index, poisoned(ACCEPTED));
                    settle(&mut record, fence, &[verdict]);
                    condemned.push(index);
                }
            }
            let open: Vec<u32> = record.open().map(|index| index as u32).collect();
            let pace = Pace::of(record.losses);
            let (mut was_lost, mut recorded) = (false, false);
            // Sent, and not recorded yet.
            let mut unrecorded: Vec<u32> = Vec::new();
            let mut report = |record: &mut Record, indexes: Vec<u32>, begins: Option<u32>| {
                recorded |= !indexes.is_empty();
                let verdicts: Vec<_> =
                    indexes.into_iter().map(|index| next(record, index, sent(ACCEPTED.0))).collect();
                let details = BTreeMap::new();
                let standing =
                    Standing { fence, verdicts: &verdicts, details: &details, ends: false, begins };
                record.settle(standing).unwrap();
            };
            for &index in &open {
                if pace == Pace::AloneMarked {
                    report(&mut record, std::mem::take(&mut unrecorded), Some(index));
                } else if unrecorded.len() == group {
                    report(&mut record, std::mem::take(&mut unrecorded), None);
                }
                unrecorded.push(index);
                let is_chance = is_chance_due && rng.random_bool(0.2) && pace != Pace::AloneMarked;
                if poison == Some(index) || is_chance {
                    is_chance_due &= !is_chance;
                    was_lost = true;
                    break;
                }
            }
            if was_lost {
                for index in unrecorded {
                    *lost.entry(index).or_default() += 1;
                }
                record.lose();
            } else {
                report(&mut record, unrecorded, None);
            }
            is_chance_due |= recorded;
        }
        assert_eq!(condemned, Vec::from_iter(poison), "seed {seed}");
        assert!(lost.values().all(|&lost| lost <= LOST_REQUESTS_MAX), "seed {seed}: I5: {lost:?}");
    }
}
