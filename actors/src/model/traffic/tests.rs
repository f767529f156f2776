use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::SmallRng};

use super::*;
use crate::model::outcome::{Obstacle, Shortage};

const FILE: FileId = FileId([1; 16]);
const SENT: Outcome = Outcome::Sent { status: 200 };
const START: MonoMs = MonoMs(1_000_000);

fn failed(status: u16, reason: Reason, retry_after: Option<Duration>) -> Outcome {
    Outcome::Retryable { status, reason, retry_after }
}

const TIMEOUT: Outcome = Outcome::Retryable { status: 0, reason: Reason::Timeout, retry_after: None };
const BROKEN: Outcome = Outcome::Retryable { status: 500, reason: Reason::Status, retry_after: None };

fn rules(bound: Bound) -> TrafficRules {
    TrafficRules { bound, storm_percent: 20 }
}

const AUTO: TrafficRules = TrafficRules { bound: Bound::Auto { ceiling: 1024 }, storm_percent: 20 };

fn at(ms: u64) -> MonoMs {
    MonoMs(START.0 + ms)
}

fn one(bound: Bound) -> Traffic {
    let mut traffic = Traffic::new(512);
    traffic.add(rules(bound), START);
    traffic
}

fn take(traffic: &mut Traffic, worker: u64, now: MonoMs) -> Result<Permit, Refusal> {
    let permit = traffic.may(0, worker, false, now)?;
    traffic.take(permit, now);
    Ok(permit)
}

fn attempt(traffic: &mut Traffic, now: MonoMs, outcome: &Outcome) -> Ended {
    let permit = take(traffic, 0, now).expect("it may go");
    traffic.ended(permit, now, Duration::from_millis(20), outcome, FILE, 1.0)
}

/// A receiver, and what is sent to it.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// It answers within 100 ms.
    Healthy,
    /// It never answers: attempts time out after 10 s.
    Hanging,
    /// It answers; five messages a second are sent.
    Limited,
    /// Nothing is sent to it.
    Idle,
}

/// Messages that reach the healthy receivers in 40 s, sent by two workers.
fn reached(kinds: &[(Kind, Bound)], pool: usize) -> usize {
    let mut traffic = Traffic::new(pool);
    let mut rng = SmallRng::seed_from_u64(7);
    let lines: Vec<_> = kinds.iter().map(|&(kind, bound)| (kind, traffic.add(rules(bound), START))).collect();
    let mut flying = BinaryHeap::new();
    let (mut reached, mut nth) = (0, 0u64);
    let mut sent = vec![0u64; lines.len()];
    for ms in 0..40_000u64 {
        let now = at(ms);
        while flying.peek().is_some_and(|Reverse((end, ..)): &Reverse<(MonoMs, u64, usize, u64)>| *end <= now)
        {
            let Reverse((_, _, line, worker)) = flying.pop().unwrap();
            let is_probe = traffic.is_probing(line);
            let outcome = if lines[line].0 == Kind::Hanging { TIMEOUT } else { SENT };
            let latency = Duration::from_millis(if outcome == SENT { 100 } else { 10_000 });
            let permit = Permit { destination: line, worker, is_retry: false, is_probe, epoch: 0 };
            traffic.ended(permit, now, latency, &outcome, FILE, rng.random());
            reached += usize::from(lines[line].0 == Kind::Healthy);
        }
        // Destinations take turns.
        let mut open: Vec<_> = lines.iter().filter(|(kind, _)| *kind != Kind::Idle).copied().collect();
        while !open.is_empty() {
            open.retain(|&(kind, line)| {
                let worker = nth % 2;
                if kind == Kind::Limited && sent[line] > ms / 200 {
                    return false;
                }
                let Ok(permit) = traffic.may(line, worker, false, now) else { return false };
                traffic.take(permit, now);
                sent[line] += 1;
                nth += 1;
                let takes = if kind == Kind::Hanging { 10_000 } else { 95 + nth % 10 };
                flying.push(Reverse((now.after(Duration::from_millis(takes)), nth, line, worker)));
                true
            });
        }
    }
    reached
}

/// What healthy destinations reach beside these, of what they reach without them.
fn share(healthy: usize, of_healthy: Bound, others: usize, kind: Kind, of_others: Bound, pool: usize) -> f64 {
    let mut kinds = vec![(Kind::Healthy, of_healthy); healthy];
    kinds.resize(healthy + others, (kind, of_others));
    let beside = reached(&kinds, pool);
    kinds.iter_mut().skip(healthy).for_each(|known| known.0 = Kind::Idle);
    beside as f64 / reached(&kinds, pool) as f64
}

#[test]
fn f43_f69_destinations_that_hang_or_are_slow_cost_the_others_nothing() {
    let few = Bound::Fixed(32);
    let auto = Bound::Auto { ceiling: 1024 };
    for (hanging, of_hanging) in [(1, few), (5, few), (9, few), (1, Bound::Fixed(512)), (9, auto)] {
        let share = share(10 - hanging, few, hanging, Kind::Hanging, of_hanging, 512);
        assert!(share >= 0.98, "{hanging} hang with {of_hanging:?}: {share}");
    }
    for of_healthy in [Bound::Fixed(64), auto] {
        let share = share(1, of_healthy, 9, Kind::Limited, few, 512);
        assert!(share >= 0.95, "nine are limited, {of_healthy:?}: {share}");
    }
    // With what each can bear found by itself, it is the pool that all of them share.
    let share = share(5, auto, 5, Kind::Hanging, auto, 512);
    assert!(share >= 0.95, "five hang, all are automatic: {share}");
}

#[test]
fn f69_who_was_idle_is_served_while_another_has_taken_all_that_is_lent() {
    let mut traffic = Traffic::new(160);
    for _ in 0..10 {
        traffic.add(rules(Bound::Fixed(512)), START);
    }
    let mut taken = Vec::new();
    while let Ok(permit) = take(&mut traffic, 0, at(0)) {
        taken.push(permit);
    }
    assert_eq!(taken.len(), 16, "nothing is lent to one that has not answered yet");
    let end = |traffic: &mut Traffic, permit| {
        traffic.ended(permit, at(1), Duration::from_millis(1), &SENT, FILE, 0.5);
    };
    end(&mut traffic, taken.pop().unwrap());
    while let Ok(permit) = take(&mut traffic, 0, at(1)) {
        taken.push(permit);
    }
    assert_eq!(taken.len(), 150, "all but a sixteenth");
    // Another one that was idle comes, and waits for the rest of its part.
    let mut of_other = 0;
    while let Ok(permit) = traffic.may(1, 0, false, at(1)) {
        traffic.take(permit, at(1));
        of_other += 1;
    }
    assert_eq!(of_other, 10);
    for permit in taken.drain(..30) {
        end(&mut traffic, permit);
    }
    assert_eq!(take(&mut traffic, 0, at(1)), Err(Refusal::Full), "it has more than its part, another waits");
    assert!(traffic.may(1, 0, false, at(1)).is_ok());
    // It does not answer any more: its part is all that it gets.
    for permit in taken.drain(..) {
        traffic.withdrawn(permit, at(1));
    }
    assert_eq!(std::iter::from_fn(|| take(&mut traffic, 0, at(5_000)).ok()).count(), 16);
}

#[test]
fn workers_share_a_destination_evenly_once_both_want_it() {
    let mut traffic = one(Bound::Fixed(8));
    let mut first: Vec<_> = (0..8).map(|_| take(&mut traffic, 1, at(0)).unwrap()).collect();
    assert_eq!(take(&mut traffic, 2, at(1)), Err(Refusal::Full));
    let end = |traffic: &mut Traffic, permit| {
        traffic.ended(permit, at(2), Duration::from_millis(1), &SENT, FILE, 0.5);
    };
    end(&mut traffic, first.pop().unwrap());
    assert_eq!(take(&mut traffic, 1, at(2)), Err(Refusal::Full), "the other one waits");
    assert_eq!(traffic.waiting(0, 1, at(2)), [2]);
    assert!(take(&mut traffic, 2, at(2)).is_ok());
    (0..3).for_each(|_| end(&mut traffic, first.pop().unwrap()));
    // It has its half now: whoever asks gets the rest, if the other one does not wait with less.
    (0..3).for_each(|_| assert!(take(&mut traffic, 2, at(3)).is_ok()));
    assert_eq!(take(&mut traffic, 2, at(3)), Err(Refusal::Full));
    end(&mut traffic, first.pop().unwrap());
    traffic.has_none(0, 2);
    assert!(take(&mut traffic, 1, at(3)).is_ok());
    // One that waits and is gone holds nobody up for long.
    assert_eq!(take(&mut traffic, 2, at(4)), Err(Refusal::Full));
    end(&mut traffic, first.pop().unwrap());
    end(&mut traffic, first.pop().unwrap());
    assert!(take(&mut traffic, 1, at(5_000)).is_ok());
}

#[test]
fn f38_a_retry_after_is_for_all_messages_of_the_destination() {
    for status in [429, 503] {
        let mut traffic = one(Bound::Fixed(8));
        let ahead = take(&mut traffic, 0, at(0)).unwrap();
        attempt(&mut traffic, at(0), &failed(status, Reason::Status, Some(Duration::from_secs(30))));
        assert_eq!(take(&mut traffic, 0, at(29_999)), Err(Refusal::Until(at(30_000))));
        assert_eq!(traffic.stands_until(0, at(29_999)), Some(at(30_000)));
        // A shorter one, or a success of one that was on its way, takes nothing back.
        traffic.ended(ahead, at(1_000), Duration::from_secs(1), &SENT, FILE, 0.5);
        assert!(take(&mut traffic, 0, at(1_000)).is_err());
        assert!(take(&mut traffic, 0, at(30_000)).is_ok());
        let age = Duration::from_mins(1);
        assert_eq!(
            traffic.stood(0, age, at(40_000)),
            Duration::from_secs(30),
            "no message grows older by it"
        );
    }
    let mut traffic = one(Bound::Fixed(8));
    attempt(&mut traffic, at(0), &failed(500, Reason::Status, Some(Duration::from_secs(30))));
    assert!(take(&mut traffic, 0, at(1)).is_ok(), "only those two say so of all");
}

#[test]
fn f44_time_that_a_breaker_is_open_makes_no_message_older() {
    let mut traffic = one(Bound::Fixed(64));
    let mut opened = None;
    while opened.is_none() {
        let ended = attempt(&mut traffic, at(0), &BROKEN);
        opened = ended.change;
    }
    assert!(matches!(opened, Some(Change::Opened { .. })));
    assert_eq!(take(&mut traffic, 0, at(4_000)), Err(Refusal::Until(at(5_000))));
    let age = |ms| Duration::from_millis(ms);
    assert_eq!(traffic.stood(0, age(60_000), at(4_000)), age(4_000));
    let probe = take(&mut traffic, 0, at(5_000)).unwrap();
    assert_eq!(take(&mut traffic, 0, at(5_000)), Err(Refusal::Full), "one at a time");
    traffic.ended(probe, at(15_000), age(10_000), &TIMEOUT, FILE, 1.0);
    assert_eq!(traffic.stood(0, age(60_000), at(16_000)), age(16_000), "the probe's time too");
    let probe = take(&mut traffic, 0, at(20_000)).unwrap();
    let ended = traffic.ended(probe, at(20_100), age(100), &SENT, FILE, 1.0);
    assert!(ended.grew && matches!(ended.change, Some(Change::Closed { .. })));
    assert_eq!(traffic.limit(0), 4, "slow start");
    assert_eq!(traffic.stood(0, age(60_000), at(80_000)), age(100));
    assert_eq!(traffic.stood(0, age(600_000), at(80_000)), age(20_100));
}

#[test]
fn a_fast_failure_keeps_its_destinations_permit_for_the_base_latency_but_not_the_pools() {
    let mut traffic = one(Bound::Fixed(2));
    for ms in 0..200 {
        let permit = take(&mut traffic, 0, at(ms)).unwrap();
        traffic.ended(permit, at(ms), Duration::from_millis(50), &SENT, FILE, 0.5);
    }
    let busy = failed(503, Reason::Status, None);
    for _ in 0..2 {
        let permit = take(&mut traffic, 0, at(300)).unwrap();
        traffic.ended(permit, at(300), Duration::from_millis(1), &busy, FILE, 0.5);
    }
    assert_eq!((traffic.in_flight, traffic.cools_at(0)), (0, Some(at(349))));
    assert_eq!(take(&mut traffic, 0, at(348)), Err(Refusal::Full));
    assert!(take(&mut traffic, 0, at(349)).is_ok());
}

#[test]
fn f44_an_empty_budget_defers_retries_and_no_first_attempt() {
    let mut traffic = one(Bound::Fixed(8));
    let mut retries = 0;
    let until = loop {
        match traffic.may(0, 0, true, at(0)) {
            Ok(permit) => {
                traffic.take(permit, at(0));
                traffic.ended(permit, at(0), Duration::ZERO, &Outcome::Gone, FILE, 0.5);
                retries += 1;
            }
            Err(Refusal::RetryUntil(until)) => break until,
            Err(other) => panic!("{other:?}"),
        }
    };
    assert_eq!(retries, 100);
    assert!(take(&mut traffic, 0, at(0)).is_ok());
    assert!(traffic.may(0, 0, true, until).is_ok());
}

#[test]
fn f68_a_suspect_destination_gets_nothing_until_an_operator_says_so() {
    let mut traffic = one(Bound::Fixed(64));
    let unauthorized = Outcome::Permanent { status: 401, reason: Reason::Status };
    let judged: Vec<_> = (0..20).map(|_| attempt(&mut traffic, at(0), &unauthorized)).collect();
    assert!(judged.iter().all(|ended| ended.judgement != Judgement::Ordinary));
    assert_eq!(judged.iter().filter(|ended| ended.became_suspect).count(), 1);
    assert_eq!(take(&mut traffic, 0, at(1_000_000)), Err(Refusal::Suspended));
    let failure = PermanentFailure::new(401, Reason::Status);
    assert_eq!(traffic.judge(0, 0, FILE, failure), Judgement::Suspect);
    assert!(traffic.view(0, at(0)).suspicion.is_some());
    traffic.resume(0, AUTO, at(2_000_000));
    assert!(take(&mut traffic, 0, at(2_000_000)).is_ok());
    assert_eq!(traffic.judge(0, 0, FILE, failure), Judgement::Outdated, "who waited for the verdict has it");
}

#[test]
fn what_the_machine_lacked_says_nothing_of_the_receiver() {
    let mut traffic = one(Bound::Fixed(8));
    for _ in 0..100 {
        attempt(&mut traffic, at(0), &Outcome::Unsent(Obstacle::Shortage(Shortage::Descriptors)));
    }
    assert!(!traffic.is_probing(0) && traffic.stands_until(0, at(0)).is_none());
}

#[test]
fn times_of_standing_are_bounded() {
    let mut stood = Stood::default();
    for nth in 0..1_000u64 {
        stood.add(at(nth * 1_000), at(nth * 1_000 + 10));
    }
    assert_eq!(stood.0.len(), STANDS_MAX);
    let age = Duration::from_secs(2_000);
    assert_eq!(stood.within(age, at(1_000_000)), Duration::from_secs(10));
    stood.add(at(998_000), at(1_000_000));
    assert_eq!(stood.within(Duration::from_secs(2), at(1_000_000)), Duration::from_secs(2), "counted once");
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Ask { destination: usize, worker: u64, is_retry: bool },
    End { which: u8, outcome: u8 },
    Withdraw(u8),
    None { destination: usize, worker: u64 },
    Wait(u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0usize..3, 0u64..3, any::<bool>())
            .prop_map(|(destination, worker, is_retry)| Step::Ask { destination, worker, is_retry }),
        4 => (any::<u8>(), 0u8..6).prop_map(|(which, outcome)| Step::End { which, outcome }),
        1 => any::<u8>().prop_map(Step::Withdraw),
        1 => (0usize..3, 0u64..3).prop_map(|(destination, worker)| Step::None { destination, worker }),
        2 => (0u64..4_000).prop_map(Step::Wait),
    ]
}

proptest! {
    #[test]
    fn permits_are_never_lost_nor_too_many(steps in prop::collection::vec(any_step(), 0..500), pool in 1usize..12) {
        let mut traffic = Traffic::new(pool);
        let bounds = [Bound::Auto { ceiling: 8 }, Bound::Fixed(3), Bound::Fixed(512)];
        for bound in bounds {
            traffic.add(rules(bound), START);
        }
        let (mut now, mut held) = (START, Vec::<(Permit, MonoMs)>::new());
        for step in steps {
            match step {
                Step::Ask { destination, worker, is_retry } => {
                    if let Ok(permit) = traffic.may(destination, worker, is_retry, now) {
                        traffic.take(permit, now);
                        held.push((permit, now));
                    }
                }
                Step::End { which, outcome } if !held.is_empty() => {
                    let (permit, begun) = held.remove(usize::from(which) % held.len());
                    let outcome = [
                        SENT,
                        TIMEOUT,
                        BROKEN,
                        failed(429, Reason::Status, Some(Duration::from_secs(2))),
                        Outcome::Unsent(Obstacle::Shortage(Shortage::Ports)),
                        Outcome::Gone,
                    ][usize::from(outcome)];
                    traffic.ended(permit, now, now.since(begun), &outcome, FILE, 0.5);
                }
                Step::Withdraw(which) if !held.is_empty() => {
                    let (permit, _) = held.remove(usize::from(which) % held.len());
                    traffic.withdrawn(permit, now);
                }
                Step::End { .. } | Step::Withdraw(_) => {}
                Step::None { destination, worker } => traffic.has_none(destination, worker),
                Step::Wait(ms) => now = now.after(Duration::from_millis(ms)),
            }
            prop_assert!(traffic.in_flight == held.len() && held.len() <= pool);
            for (index, known) in traffic.destinations.iter().enumerate() {
                let of_it = held.iter().filter(|(permit, _)| permit.destination == index).count();
                prop_assert_eq!(known.in_flight, of_it + known.cooling.len());
                prop_assert_eq!(known.parts.iter().map(|part| part.held).sum::<usize>(), of_it);
                prop_assert!(of_it <= bounds[index].ceiling());
            }
        }
        for (permit, _) in held {
            traffic.withdrawn(permit, now);
        }
        now = now.after(Duration::from_mins(6));
        // Whatever has happened, a message goes to each in the end.
        for destination in 0..3 {
            prop_assert!(traffic.may(destination, 9, false, now).is_ok());
        }
    }
}
